"""From here to a Chirp server: files and folders, resumed, verified, in place all at once.

What it is not: the door to it (chirpclient.py), how small files go (chirpsmall.py), what is known of a folder
there (chirpfolder.py). No threads; an object belongs to one thread at a time, but for ``CLAIMS``, which all
threads share: its lock guards its list alone.
"""

import collections
import contextlib
import errno
import os
import posixpath
import stat
import threading
import time
from typing import Any, Deque, Iterator, List, Optional, Tuple

from chirpagain import Again, Listed, changed_here
from chirpfolder import Arrived, Folder, Known
from chirplanding import check_no_link
from chirplocal import (
    beginning,
    is_link,
    join,
    link_there,
    mode_there,
    open_regular,
    pinned,
    pinned_below,
    read_small,
    space_of,
    stat_here,
    times_of,
    to_remote,
    tree_size,
    unpinned,
)
from chirpmove import (
    AHEAD,
    NEITHER,
    PENDING,
    PIECE,
    Failures,
    Meter,
    Options,
    altered,
    check_whole,
    part_path,
)
from chirprequests import Connection
from chirpsmall import Further, Lane, SmallFile, SmallFiles
from chirpwire import (
    CHECKED,
    CRC32,
    EXISTS,
    IS_DIR,
    NO_SPACE,
    NOT_DIR,
    NOT_EMPTY,
    OF_SERVERS,
    PWRITE_CRC32,
    RESERVED,
    SMALL,
    TOO_BIG,
    Busy,
    Crc32,
    Path,
    Refused,
    Special,
    Stat,
    Unlistable,
    may_have_changed,
    new_buffer,
    new_hash,
    part_name,
    quote,
    seconds,
    shown,
    to_bytes,
)


class Claims:
    """What this process is putting, and where: the server can't tell two that write one partial file.

    Safe from any thread.
    """

    def __init__(self) -> None:
        # Guards the list; nothing is called while it is held.
        self._lock = threading.Lock()
        self._held: List[Tuple[str, int, bytes]] = []

    @contextlib.contextmanager
    def holding(self, client: Connection, target: bytes) -> Iterator[None]:
        """Raises Busy where that target of that server is held already."""
        claim = client.address, client.port, posixpath.normpath(b'/' + target.lstrip(b'/'))
        with self._lock:
            if claim in self._held:
                raise Busy(target)
            self._held.append(claim)
        try:
            yield
        finally:
            with self._lock:
                self._held.remove(claim)


CLAIMS = Claims()


class Upload(Again):
    """One ``put``."""

    _arrived: Optional[Arrived] = None           # of a folder

    def __init__(self, client: Connection, meter: Meter, unkept: Failures, options: Options) -> None:
        super().__init__(client, meter, unkept, options)
        self._further = Further(client)
        self._follows = True           # reads what a link leads to

    def run(self, source: str, target: bytes) -> None:
        found, asked = stat_here(source), target
        target = self._client.through_links(asked.rstrip(b'/') or b'/')
        if stat.S_ISDIR(found.st_mode):
            check_no_link(asked, not asked.endswith(b'/') and target != asked)
        self._check_name(posixpath.basename(target), target)
        folder = posixpath.dirname(target) or b'/'
        with CLAIMS.holding(self._client, target), self._client.holding(target, linkless=folder):
            if not stat.S_ISDIR(found.st_mode):
                self._meter.total = found.st_size
                self._send_still(source, target)
                return
            self._check_apart(target, lambda root: (source, root + os.fsdecode(target)))
            self._top = source
            self._meter.total, self._space = tree_size(source)
            with contextlib.closing(self._further):
                self._persist(lambda: self._put_tree(source, target))
        self._failures.check()

    # One file.

    def _put_file(self, source: str, target: bytes) -> os.stat_result:
        """Under a temporary name, which becomes its own at the end. Gives the stat of what was sent."""
        with CLAIMS.holding(self._client, target):
            return self._send_still(source, target)

    def _send_still(self, source: str, target: bytes) -> os.stat_result:
        base = self._meter.moved
        with naming(target):
            return self._until_it_holds_still(  # type: ignore[no-any-return]
                to_remote(source), lambda: self._send_file(source, target, base))

    def _send_file(self, source: str, target: bytes, base: int) -> os.stat_result:
        """What is there of it when it begins: a file may grow meanwhile."""
        with open_regular(source, self._follows) as file:
            found, begin, seen = os.fstat(file.fileno()), beginning(file), time.time()
            self._meter.moved = base
            there = self._client.find(target)
            check_file_there(there, target)
            if self._is_same(file, source, found, target, there):
                self._meter.add(found.st_size)
                return found
            part = part_path(target)
            self._client.replacing(part, target)       # raises where that is too long
            start = self._resume(file, found, part)
            self._meter.add(start)
            checked = self._options.verify and self._client.is_ours
            wanted = self._wanted_mode(found, there, begin)
            with self._keeping_room(part, target, space_of(found) - start):
                mode = self._send_rest(file, start, found, part, wanted, checked)
            if not found.st_size:
                self._send_unsized(file, source, part)
            elif self._options.verify and not checked or may_have_changed(
                    found, seen, os.fstat(file.fileno())):
                if not self._has_same(part, file, found.st_size):
                    self._client.unlink(part)
                    raise altered(to_remote(source))
        bits = 0
        if mode != wanted:
            bits = self._client.keep_mode(part, wanted)
        if self._options.keep:
            bits |= self._client.keep_times(part, *times_of(found), wanted)
        self._client.replace(part, target)
        self._unkept.add_unkept(source, bits)
        return found

    def _wanted_mode(self, found: os.stat_result, there: Optional[Stat], begin: bytes) -> int:
        """That of the file which is replaced, unless an earlier attempt left that; else of the source."""
        if self._merges and there is not None and there.is_file:
            return there.mode & 0o777
        return mode_there(found, begin)

    @contextlib.contextmanager
    def _keeping_room(self, part: bytes, target: bytes, count: int) -> Iterator[None]:
        """Looks whether so many bytes have room; what turns out to have none is removed."""
        self._client.check_room(posixpath.dirname(part) or b'/', count, target)
        try:
            yield
        except Refused as refused:
            if refused.code in (NO_SPACE, TOO_BIG):
                self._client.disconnect()      # pieces are under way
                with contextlib.suppress(Refused):
                    self._client.unlink(part)
                raise refused.about(shown(target))
            raise

    def _is_same(self, file: Any, source: str, found: os.stat_result, target: bytes,
                 there: Optional[Stat]) -> bool:
        """Whether nothing needs to be sent."""
        if there is None or there.size != found.st_size or there.mtime != seconds(found.st_mtime_ns):
            return False
        if not self._options.keep or self._options.verify and not self._has_same(target, file, found.st_size):
            return False
        wanted = self._wanted_mode(found, there, beginning(file))
        if there.mode & 0o777 != wanted:
            self._unkept.add_unkept(source, self._client.keep_mode(target, wanted))
        return True

    def _resume(self, file: Any, found: os.stat_result, part: bytes) -> int:
        """How much of the file is there already."""
        there = self._client.find(part, False)
        if there is None:
            return 0
        if (there.is_file and there.nlink == 1         # else another file's name as well
                and 0 < there.size <= found.st_size and self._has_same(part, file, there.size)):
            return there.size
        self._client.rmall(part)       # a connection that has just ended may still write to that file
        return 0

    def _send_rest(self, file: Any, start: int, found: os.stat_result, part: bytes, mode: int,
                   checked: bool) -> int:
        """Writes what is missing; the mode that the part has: ``mode``, where it is made. ``checked``: with a
        checksum of each piece."""
        number, there = self._client.open(part, 'wc' if start else 'wct', mode)
        with self._client.moving_content():
            self._send_pieces(file, number, start, found.st_size, checked, part)
        self._client.close(number)
        return there.mode & 0o777

    def _send_unsized(self, file: Any, source: str, part: bytes) -> None:
        """The content of a file that says that it has none: those of /proc do."""
        data = file.read(SMALL + 1)
        if len(data) > SMALL:
            raise OSError(errno.EINVAL, 'a file that doesn\'t say how long it is', source)
        if data:
            self._client.putfile(part, data)
            self._meter.add(len(data))

    def _send_pieces(self, file: Any, number: int, start: int, end: int, checked: bool, path: bytes) -> None:
        """``checked``: each piece is, as it arrives."""
        file.seek(start)
        wire, buffer, size = self._client.connect(), new_buffer(), CHECKED if checked else PIECE
        sent: Deque[Tuple[int, bytes]] = collections.deque()
        while start < end or sent:
            if start < end and len(sent) * size < AHEAD:
                count, checksum = min(size, end - start), new_hash(CRC32) if checked else None
                wire.put(self._client.ask(PWRITE_CRC32 if checked else 'pwrite', number, count, start))
                wire.send_copy(file, count, buffer, checksum)
                sent.append((count, checksum.digest() if checksum is not None else b''))
                start += count
            else:
                count, digest = sent.popleft()
                if self._client.result(wire, 'write') != count:
                    raise self._client.broken('pwrite: a wrong count')
                if checked and wire.read(Crc32.digest_size) != digest:
                    raise altered(path)
                self._meter.add(count)

    # A folder.

    def _put_tree(self, source: str, target: bytes) -> None:
        """Into the folder of that name, or, where there is none, into a temporary one."""
        self._begin()
        there = self._client.find(target)
        self._merges = there is not None
        if there is None:
            return self._put_new(source, target)
        if not there.is_dir:
            raise Refused(NOT_DIR, shown(target))
        self._put_folder(source, target, True)
        self._look_again()

    def _begin(self) -> None:
        """Forgets an earlier attempt, whose requests may be under way."""
        self._failures = Failures(lambda error: isinstance(error, Refused))
        self._unkept.clear()
        self._meter.moved = 0
        self._around.clear()
        self._forget_listed()
        self._further.close()
        self._follows = self._options.links == 'follow'
        self._small = SmallFiles(self._further, lambda connection: Lane(
            connection, self._meter, self._failures, self._unkept, self._options))
        self._arrived = None if self._client.is_ours else Arrived(self._client)

    def _put_new(self, source: str, target: bytes) -> None:
        """Under a temporary name, which becomes its own at the end."""
        part = part_path(target)
        self._client.ask('rename', quote(part), quote(target))         # raises where that is too long
        old = self._client.find(part, False)
        if old is None:
            self._client.check_room(posixpath.dirname(part) or b'/', self._space, target)
        elif not old.is_dir:
            self._client.unlink(part)
        try:
            with naming(target):
                self._put_folder(source, part, False)
                self._look_again()
                if self._arrived is not None:
                    self._arrived.check(self._arrived.latest)
        except (Refused, OSError) as error:
            self._leave(part, target, error)
            raise
        try:
            self._client.rename(part, target)
        except Refused as refused:
            if refused.code in (NOT_EMPTY, NOT_DIR, EXISTS):
                raise Refused(refused.code, '%s was made meanwhile; what has arrived is in %s' % (
                    shown(target), shown(part)))
            raise

    def _leave(self, part: bytes, target: bytes, error: Exception) -> None:
        """Removes a folder that nothing has arrived in. Raises Refused of a full disk that tells what has."""
        self._client.disconnect()              # requests may be under way
        self._further.close()
        with contextlib.suppress(Refused):
            self._client.rmdir(part)
        if isinstance(error, Refused) and error.code == NO_SPACE:
            if self._client.find(part, False) is None:
                raise Refused(NO_SPACE, shown(target))
            raise Refused(NO_SPACE, '%s: what has arrived is in %s' % (shown(target), shown(part)))

    def _put_folder(self, source: str, target: bytes, merge: bool) -> None:
        """``merge``: others may read what is there already, so files must come in place all at once, and what
        the source doesn't have stays."""
        with pinned(source, self._follows or not self._around) as here:    # first the user's own link
            found, seen = os.stat(here), time.time()
            listed = Listed(unpinned(source), target, self._names(source), merge, not merge,
                            list(self._around), found, seen)
            self._note_listed(listed)
            with self._inside(found.st_dev, found.st_ino):
                made = self._put_content(here, target, merge)
            if made or not merge:
                self._keep_folder(here, listed)

    def _names(self, source: str) -> Tuple[str, ...]:
        """Those that lead to a folder from the one that is put."""
        return tuple(name for name in unpinned(source)[len(self._top):].split(os.sep) if name)

    def _changed(self, first: bool) -> List[Listed]:
        changed = changed_here(list(self._listed.values()), first, self._follows)
        if changed and self._arrived is not None:
            self._arrived.check()              # before what is there is taken as it is
        return changed

    def _fill_again(self, listed: Listed) -> None:
        with pinned_below(self._top, listed.names, self._follows) as here:
            listed = listed._replace(found=os.stat(here), seen=time.time())
            self._note_listed(listed)
            with self._inside(listed.found.st_dev, listed.found.st_ino):
                self._put_content(here, listed.target, listed.merge)
            if listed.kept:
                self._keep_folder(here, listed)

    def _keep_folder(self, source: str, listed: Listed) -> None:
        """Its mode and times, now that all is in it."""
        self._note_listed(listed._replace(kept=True))
        if not self._options.keep:
            return
        found, target, mode = listed.found, listed.target, mode_there(listed.found)
        bits = self._client.keep_mode(target, mode)
        bits |= self._client.keep_times(target, *times_of(found), mode)
        self._unkept.add_unkept(source, bits)

    def _put_content(self, source: str, target: bytes, merge: bool) -> bool:
        """Makes the folder, unless it is there, and puts all into it; whether it was made."""
        made = self._make_folder(target)
        folder = Folder(self._client, self._small.asking, target, merge)
        if not made:
            if self._client.root is None and not self._client.lstat(target).is_dir:
                raise Refused(NOT_DIR, shown(target))          # as cp: not through a link
            if not merge:
                self._client.chmod(target, 0o700)
            try:
                folder.known.fill(None if merge or self._again else source)
            except Unlistable:
                if not self._again:
                    raise
                folder.known.must_ask = True
        with os.scandir(source) as entries:
            for entry in entries:
                failed, name = self._failures.count, to_remote(entry.name)
                told = self._again and self._failures.is_told(entry.path)
                with self._failing(entry.path):
                    if not told and not self._has_come(entry, folder, name):
                        self._put_entry(entry, folder, name)
                if told or self._failures.count > failed:
                    folder.unmoved.add(part_name(name))
                if len(folder.waiting) >= PENDING:
                    self._put_folders(source, folder)
        self._put_folders(source, folder)
        if not merge:
            folder.known.remove_parts(folder.unmoved)
            if self._arrived is not None and not self._failures.count:
                self._arrived.check_folder(target, folder.sent)
        return made

    def _has_come(self, entry: os.DirEntry, folder: Folder, name: bytes) -> bool:
        """Whether what is looked at again has been moved."""
        if not self._again:
            return False
        there = self._find(folder.known, name)
        found = os.stat(entry.path, follow_symlinks=self._follows)
        return there is not None and not folder.merge or self._is_listed(found) or (
            there is not None and there.is_file and stat.S_ISREG(found.st_mode)
            and (there.size, there.mtime) == (found.st_size, seconds(found.st_mtime_ns)))

    def _put_entry(self, entry: os.DirEntry, folder: Folder, name: bytes) -> None:
        """A file or a link; a folder waits until those have been moved."""
        check_whole(name)
        self._check_name(name)
        file: Optional[os.stat_result] = None
        if entry.is_dir(follow_symlinks=self._follows) and (self._follows or not is_link(entry)):
            if not folder.merge:
                self._make_way(folder, name)
            folder.waiting.append(entry.name)
        elif not self._follows and is_link(entry):
            if self._options.links == 'skip':
                return
            folder.twins.check(entry.name)
            self._put_link(entry.path, folder, name)
        else:
            folder.twins.check(entry.name)
            file = self._put_regular(entry, folder, name)
        if self._arrived is not None:
            folder.note(name, file if self._options.keep else None)

    def _check_name(self, name: bytes, path: Path = b'') -> None:
        """Raises OSError for what would be there, and in no listing; or what no server has written."""
        if name.startswith(RESERVED) and self._client.root is None:
            raise OSError(errno.EINVAL, 'chirp_server shows nobody what is called so', shown(path) or None)
        if name.startswith(OF_SERVERS):
            raise OSError(errno.EINVAL, 'Chirp servers keep their own things under that name: choose another',
                          shown(path) or None)

    def _put_folders(self, source: str, folder: Folder) -> None:
        """Those that wait."""
        self._small.finish()
        for name in folder.waiting:
            self._put_waiting(os.path.join(source, name), folder, name)
        folder.waiting.clear()

    def _put_waiting(self, source: str, folder: Folder, name: str) -> None:
        target = join(folder.path, to_remote(name))
        with self._failing_apart(source, lambda: self._is_mounted(target), self._small.begin_afresh):
            self._meter.add(0)
            folder.twins.check(name)
            self._put_folder(source, target, folder.merge)

    def _is_mounted(self, target: bytes) -> bool:
        """Whether a folder of the server has a disk of its own."""
        here, around = [self._client.find(path, False) for path in (target, posixpath.dirname(target))]
        return here is not None and around is not None and here.dev != around.dev

    def _make_way(self, folder: Folder, name: bytes) -> None:
        """Removes what an earlier attempt left where a folder is to be."""
        there = self._find(folder.known, name)
        if there is not None and not there.is_dir:
            self._small.asking(lambda: self._client.unlink(join(folder.path, name)))

    def _make_folder(self, target: bytes) -> bool:
        """Whether it wasn't there."""
        try:
            self._client.mkdir(target, 0o700)
            return True
        except Refused as refused:
            if refused.code != EXISTS:
                raise
            return False

    def _put_regular(self, entry: os.DirEntry, folder: Folder, name: bytes) -> os.stat_result:
        """A file; gives the stat of what was sent."""
        target, merge = join(folder.path, name), folder.merge
        there = self._find(folder.known, name)
        if not entry.is_file():
            entry.stat()               # raises where a link leads nowhere
            raise OSError(errno.EINVAL, NEITHER)
        if there is not None:
            found = entry.stat()
            if self._small.asking(lambda: self._has(entry.path, found, target, there)):
                self._meter.add(found.st_size)
                return found
            if not merge:              # an earlier attempt's, which nobody may be able to write to
                self._small.asking(lambda: self._client.rmall(target))
                there = None
            check_file_there(there, target)
        read = read_small(entry.path, self._follows)
        if read is not None:
            found, data = read
            if merge and folder.known.has_part(name):
                self._small.asking(lambda: self._client.rmall(part_path(target)))
            mode = self._wanted_mode(found, there, data)
            self._small.put(SmallFile(unpinned(entry.path), target, merge, mode, there is not None, found,
                                      data))
            return found
        return self._small.asking(lambda: self._put_file(entry.path, target))

    def _find(self, known: Known, name: bytes) -> Optional[Stat]:
        """What is there of that name."""
        return self._small.asking(lambda: known.find(name)) if known.must_ask else known.find(name)

    def _has(self, source: str, found: os.stat_result, target: bytes, there: Optional[Stat]) -> bool:
        if there is None or not there.is_file or there.size != found.st_size:
            return False
        with open_regular(source, self._follows) as file:
            return self._is_same(file, source, found, target, there)

    def _put_link(self, source: str, folder: Folder, name: bytes) -> None:
        target, leads = join(folder.path, name), link_there(source)
        self._small.finish()
        there = folder.known.find(name)
        if there is not None:
            if there.is_link and to_bytes(self._client.readlink(target)) == leads:
                return
            (self._client.unlink if folder.merge else self._client.rmall)(target)
        self._client.symlink(leads, target)


@contextlib.contextmanager
def naming(target: bytes) -> Iterator[None]:
    """Has what is refused name the target: a person knows no other name."""
    try:
        yield
    except Refused as refused:
        raise refused.about(refused.what.replace(shown(part_path(target)), shown(target)))


def check_file_there(there: Optional[Stat], target: bytes) -> None:
    """Raises Refused for what no file may replace: a folder, or a device, FIFO or socket."""
    if there is not None and there.is_dir:
        raise Refused(IS_DIR, shown(target))
    if there is not None and not there.is_file and not there.is_link:
        raise Special(shown(target))
