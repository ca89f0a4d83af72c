"""From a Chirp server to here: files and folders, resumed, verified, in place all at once; or given away as
they come.

What it is not: the door to it (chirpclient.py), nor files here (chirplocal.py). No threads; an object belongs
to one thread at a time.
"""

import collections
import contextlib
import errno
import os
import stat
import time
from typing import Any, Callable, Deque, Iterator, List, Optional, Set, Tuple, Union

import agent
import localnames
from chirpagain import Again, Listed, changed_there
from chirplanding import check_no_link
from chirplocal import (
    NO_LINK,
    check_own_place,
    check_room,
    check_target,
    finish_part,
    give_up_part,
    is_device,
    join,
    keep,
    local_part,
    locked_folder,
    make_folder,
    make_link,
    may_leave,
    mode_of_file,
    open_device,
    open_part,
    open_regular,
    pinned,
    pinned_below,
    remove_tree,
    stat_of,
    through_links,
    to_local,
    to_local_link,
    to_remote,
    write_here,
    write_whole,
)
from chirpmove import (
    AHEAD,
    FULL,
    KNOWN,
    NEITHER,
    PENDING,
    PIECE,
    Failures,
    Meter,
    altered,
    check_whole,
    reads_same,
)
from chirprequests import SLOWEST_HASH, Connection, Pipeline, leads_nowhere
from chirpwire import (
    BLOCK,
    CHECKED,
    CRC32,
    DOESNT_EXIST,
    INVALID,
    IS_DIR,
    NOT_DIR,
    PREAD_CRC32,
    SMALL,
    Busy,
    Changed,
    Crc32,
    Disconnected,
    Path,
    ProtocolError,
    Refused,
    Stat,
    Wire,
    is_part,
    new_buffer,
    new_hash,
    part_name,
    quote,
    seconds,
    shown,
    to_bytes,
)

OVERLAP = 64 * 1024            # bytes of a partial file that are fetched again, to see if it goes on
READER = 60.0                  # seconds that somebody has to begin to read from a FIFO
ENTRIES = 10 * 1000 * 1000     # in a folder that is fetched, with all in it


class Given:
    """What somebody got of a file who takes each byte once."""

    def __init__(self) -> None:
        self.count = 0
        self.found: Optional[Stat] = None      # of the file, when it began
        self.checksum = new_hash(CRC32)

    def check(self, source: Path, found: Stat) -> None:
        """Raises Changed where another file has the name by now, or it has become shorter."""
        self.found = self.found or found
        if (found.dev, found.ino) != (self.found.dev, self.found.ino) or found.size < self.found.size:
            raise altered(source)


class Download(Again):
    """One ``get`` or ``fetch``."""

    def run(self, source: bytes, target: str, given: Given, follows: bool) -> None:
        """``follows``: a folder, too, goes where a link leads that the target is."""
        found = find_source(self._client, source)
        if found.is_dir:
            check_no_link(target, not follows and os.path.islink(target))
        if not is_device(target):
            target = through_links(target)
        if found.is_dir:
            if is_device(target):
                raise Refused(IS_DIR, shown(source))
            there = os.fsdecode(self._client.through_links(source))    # its links lead within what is served
            self._check_apart(source, lambda root: (root + there, target))
            with self._client.holding(None, linkless=None if self._options.links == 'follow' else source):
                self._persist(lambda: self._get_tree(source, target))
            return self._failures.check()
        if not found.is_file:
            raise OSError(errno.EINVAL, NEITHER, shown(source))
        self._meter.total = found.size
        if is_device(target):
            with open_waiting(target, self._meter) as file:
                return self.stream(source, lambda view: write_named(file, view, target), given)
        self._get_file(source, target, None)

    def fetch(self, source: bytes, target: str, limit: int) -> int:
        """The first bytes of a file."""
        self._get_file(source, target, limit)
        return self._meter.moved

    def stream(self, source: bytes, write: Callable[[memoryview], Any], given: Given) -> None:
        """Each byte once, as it comes, also where the connection breaks meanwhile. Raises Changed where the
        file did: what has been given is neither what it was nor what it is."""
        def give(view: memoryview) -> None:
            write(view)
            given.count += len(view)
            given.checksum.update(view)

        def step() -> None:
            number, found = self._client.open(source, 'r')
            if not found.is_file:
                raise Refused(IS_DIR if found.is_dir else INVALID, shown(source))
            went_on = given.found is not None
            given.check(source, found)
            assert given.found is not None
            size = self._meter.total = given.found.size
            if not size:
                return write(memoryview(self._client.getfile(source)))
            self._meter.add(given.count - self._meter.moved)
            self._receive_pieces(source, number, given.count, size, give, self._client.is_ours)
            self._check_given(source, number, given, went_on)
            self._client.close(number)
        self._persist(step)

    def _check_given(self, source: bytes, number: int, given: Given, went_on: bool) -> None:
        """Raises Changed. ``went_on``: from where an earlier connection broke."""
        found, after = given.found, self._client.fstat(number)
        assert found is not None
        if self._client.is_ours and (went_on or self._client.has_changed(number)):
            _, request = self._client.asking_for_digest(source, 0, found.size)
            wire = self._client.connect()
            wire.put(request)
            length = self._client.result(wire, 'checksum of %s' % shown(source), found.size / SLOWEST_HASH)
            if not reads_same(wire, length, given.checksum):
                raise altered(source)
        elif not self._client.is_ours and (found.size, found.mtime) != (after.size, after.mtime):
            raise altered(source)

    # One file.

    def _get_file(self, source: bytes, target: str, limit: Optional[int]) -> None:
        check_target(target)
        base = self._meter.moved
        self._until_it_holds_still(source, lambda: self._receive_file(source, target, base, limit))

    def _receive_file(self, source: bytes, target: str, base: int, limit: Optional[int]) -> None:
        """What is there of it when it begins: a file may grow meanwhile."""
        self._meter.moved = base
        number, found = self._client.open(source, 'r')
        if not found.is_file:
            raise Refused(IS_DIR if found.is_dir else INVALID, shown(source))
        size = found.size if limit is None else min(found.size, limit)
        self._meter.total = max(self._meter.total, base + size)
        if limit is None and self._is_there(source, found, target):
            self._client.close(number)
            if os.path.lexists(local_part(target)):
                with open_part(target) as file:
                    give_up_part(file, target)         # of what it was meanwhile
            return self._meter.add(size)
        with open_part(target) as file:
            try:
                start = self._resume(file, number, size)
                check_room(os.path.dirname(target) or '.', min(size, found.blocks * 512) - start)
                self._meter.add(start)
                self._receive_rest(file, number, source, start, found, size)
            except (Changed, OSError) as error:
                if isinstance(error, Changed) or error.errno in FULL:
                    give_up_part(file, target)         # it leads to nothing
                raise
            if self._options.keep:
                there = mode_of_file(target) if self._merges else None
                self._unkept.add_unkept(source, finish_part(
                    file, target, (found.atime, found.mtime), found.mode if there is None else there))
            else:
                finish_part(file, target)

    def _is_there(self, source: bytes, found: Stat, target: str) -> bool:
        """Whether an earlier attempt got to the end."""
        try:
            here = os.lstat(target)
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(here.st_mode) or here.st_size != found.size:
            return False
        if seconds(here.st_mtime_ns) != found.mtime or not self._options.keep:
            return False
        try:
            file = open_regular(target)
        except PermissionError:        # who may not read it may replace it, or is told then why not
            return False
        with file:
            if self._options.verify and not self._has_same(source, file, found.size):
                return False
            if not self._merges:
                self._unkept.add_unkept(source, keep(file.fileno(), None, found.mode))
            return True

    def _resume(self, file: Any, number: int, size: int) -> int:
        """How much of the file is here already: what is here, if its end is the same there."""
        start = os.fstat(file.fileno()).st_size
        if start > size:
            start = 0
        overlap = min(start, OVERLAP)
        if overlap:
            file.seek(start - overlap)
            if self._client.pread(number, overlap, start - overlap) != file.read(overlap):
                start = 0
        file.truncate(start)
        return start

    def _receive_rest(self, file: Any, number: int, source: bytes, start: int, found: Stat,
                      size: int) -> None:
        """Fetches what is missing of a file, and checks the whole."""
        file.seek(start)
        if not found.size:             # of those of /proc, which say so, the content has no end but its end
            data = self._client.getfile(source)
            write_whole(file, memoryview(data))
            return self._meter.add(len(data))
        checked = self._options.verify and self._client.is_ours
        with self._client.moving_content():
            self._receive_pieces(source, number, start, size, lambda view: write_here(file, view), checked)
            file.truncate(size)        # where it ends with a hole
        after, doubt = self._client.fstat(number), 0       # bytes that may not be what they should
        if checked and not self._client.has_changed(number):
            doubt = start
        elif size == found.size and (
                self._options.verify or (found.size, found.mtime) != (after.size, after.mtime)):
            doubt = size
        self._client.close(number)
        if doubt and not (self._has_same(source, file, doubt)
                          if self._client.is_ours or after.size == size
                          else self._has_same_start(source, file, size)):
            raise altered(source)

    def _has_same_start(self, source: bytes, file: Any, size: int) -> bool:
        """Of a file that grew, where the server has checksums of whole files alone: by fetching it again."""
        def compare(view: memoryview) -> None:
            if file.read(len(view)) != view:
                raise altered(source)
        moved = self._meter.moved
        number, _ = self._client.open(source, 'r')
        file.seek(0)
        self._receive_pieces(source, number, 0, size, compare)
        self._client.close(number)
        self._meter.moved = moved
        return True

    def _receive_pieces(self, source: bytes, number: int, start: int, end: int,
                        write: Callable[[memoryview], Any], checked: bool = False) -> None:
        """``checked``: each piece is, as it comes."""
        wire, buffer, size = self._client.connect(), new_buffer(), CHECKED if checked else PIECE
        asked: Deque[int] = collections.deque()
        while start < end or asked:
            if start < end and len(asked) * size < AHEAD:
                asked.append(min(size, end - start))
                wire.put(self._client.ask(PREAD_CRC32 if checked else 'pread', number, asked[-1], start))
                start += asked[-1]
            else:
                checksum = new_hash(CRC32) if checked else None
                self._receive_piece(source, wire, asked.popleft(), buffer, write, checksum)
                if checksum is not None and wire.read(Crc32.digest_size) != checksum.digest():
                    raise altered(source)

    def _receive_piece(self, source: bytes, wire: Wire, count: int, buffer: memoryview,
                       write: Callable[[memoryview], Any], checksum: Any) -> None:
        got = self._client.result(wire, 'read')
        if got > count:
            raise self._client.broken('pread: %d bytes where %d were asked for' % (got, count))
        if got < count:
            raise Changed(source, 'it became shorter while it was read')
        deadline = wire.deadline(count)
        while count:
            got = wire.read_into(buffer[:min(count, BLOCK)], deadline)
            write(buffer[:got])
            if checksum is not None:
                checksum.update(buffer[:got])
            count -= got
            self._meter.add(got)

    # A folder.

    def _get_tree(self, source: bytes, target: str) -> None:
        """Into the folder of that name, or, where there is none, into a temporary one."""
        self._begin()
        found = self._client.stat(source)
        self._merges = os.path.lexists(target)
        if not self._merges:
            return self._get_new(source, target, found)
        check_no_link(target, os.path.islink(target))  # which has come meanwhile
        self._top = target
        self._get_folder(source, target, found, (), True, make_folder(target))
        self._look_again()

    def _begin(self) -> None:
        """Forgets an earlier attempt."""
        self._failures = Failures(lambda error: isinstance(error, OSError) and error.filename is not None)
        self._unkept.clear()
        self._meter.moved = self._meter.total = self._entries = 0
        self._around.clear()
        self._forget_listed()
        self._pipeline = Pipeline(self._client)

    def _get_new(self, source: bytes, target: str, found: Stat) -> None:
        """Under a temporary name, which becomes its own at the end."""
        part = local_part(target)
        with locked_folder(part, target) as made:
            try:
                self._top = part
                self._get_folder(source, part, found, (), False, made)
                self._look_again()
            except BaseException as error:
                with contextlib.suppress(OSError):
                    os.rmdir(part)             # which nothing has arrived in
                if isinstance(error, OSError) and error.errno in FULL:
                    why = error.strerror
                    if os.path.lexists(part):
                        why = '%s; what has arrived is in %s' % (why, agent.short_path(part))
                    raise OSError(error.errno, why, target)
                raise
            try:
                agent.replace(part, target)
            except OSError as error:
                if os.path.lexists(target):
                    raise OSError(error.errno, 'it was made meanwhile; what has arrived is in %s: %s' % (
                        agent.short_path(part), error.strerror), target)
                raise

    def _get_folder(self, source: bytes, target: str, found: Stat, inside: Tuple[str, ...],
                    merge: bool, made: bool) -> None:
        """Into a folder that is here. ``merge``: what is there already, and the server doesn't have, stays;
        ``made``: that is nothing."""
        if not made and not merge:
            check_own_place(target)
        with pinned(target) as here:
            if not inside:
                self._fold = localnames.folding(here)
            listed = Listed(source, here, inside, merge, made or not merge, list(self._around), found, 0)
            with self._filling(listed):
                self._fill_folder(LocalFolder(source, here, inside, merge), made)

    @contextlib.contextmanager
    def _filling(self, listed: Listed) -> Iterator[None]:
        found = listed.found
        self._note_listed(listed)
        with self._inside(found.dev, found.ino):
            try:
                yield
            except (Refused, Changed, Busy, OSError):
                self._pipeline.drain()         # of what is to come to here
                raise
        if self._options.keep and listed.kept:
            self._unkept.add_unkept(listed.source, keep(listed.target, (found.mtime,) * 2, found.mode))

    def _changed(self, first: bool) -> List[Listed]:
        return changed_there(self._client, list(self._listed.values()), first, self._options.links)

    def _fill_again(self, listed: Listed) -> None:
        found = (self._client.lstat if listed.names and self._options.links != 'follow'
                 else self._client.stat)(listed.source)
        if not found.is_dir:
            raise Refused(NOT_DIR, shown(listed.source))
        with pinned_below(self._top, map(to_local, listed.names)) as here:
            listed = listed._replace(target=here, found=found)
            with self._filling(listed):
                self._fill_folder(LocalFolder(listed.source, here, listed.names, listed.merge), False)

    def _fill_folder(self, folder: 'LocalFolder', made: bool) -> None:
        if not made and not folder.merge:
            if not self._again:
                keep(folder.target, None, 0o700)
                self._remove_others(folder.source, folder.target)
            elif not os.access(folder.target, os.W_OK | os.X_OK):
                keep(folder.target, None, 0o700)
        names = localnames.Names(self._fold)
        for entry in self._client.ls(folder.source):
            name = to_bytes(entry.name)
            self._entries += 1
            if self._entries > ENTRIES:
                raise ProtocolError('a folder of too many entries')
            path = join(folder.source, name)
            if self._again and (self._failures.is_told(path) or folder.has(entry) or self._is_listed(entry)):
                continue
            with self._failing(path):
                check_whole(name)
                names.add(to_local(entry.name))
                if not stat.S_IFMT(entry.mode):            # the server may not look at it
                    self._pipeline.drain()
                    entry = self._client.lstat(path)._replace(name=entry.name)
                if entry.is_link and self._options.links == 'follow':
                    self._pipeline.drain()
                    entry = followed(self._client, path)._replace(name=entry.name)
                if entry.is_dir:
                    folder.waiting.append(entry)
                else:
                    self._get_entry(entry, folder, path)
            if len(folder.waiting) >= PENDING:
                self._get_folders(folder)
        self._get_folders(folder)

    def _get_folders(self, folder: 'LocalFolder') -> None:
        """Waits for the small files, fetches those again that changed, and then the folders in it."""
        self._pipeline.drain()
        for path, here in folder.again:
            with self._failing(path):
                self._get_file(path, here, None)
        folder.again.clear()
        for entry in folder.waiting:
            self._get_waiting(entry, folder)
        folder.waiting.clear()

    def _get_waiting(self, entry: Stat, folder: 'LocalFolder') -> None:
        path = join(folder.source, to_bytes(entry.name))
        here = os.path.join(folder.target, to_local(entry.name))
        with self._failing_apart(path, lambda: os.path.ismount(here), self._begin_afresh):
            self._meter.add(0)
            self._check_new(entry.dev, entry.ino)      # before a folder is made for it
            if not folder.merge and os.path.lexists(here) and (
                    os.path.islink(here) or not os.path.isdir(here)):
                os.unlink(here)
            self._get_folder(path, here, entry, folder.inside + (entry.name,), folder.merge,
                             make_folder(here))

    def _begin_afresh(self) -> None:
        self._client.disconnect()
        self._pipeline = Pipeline(self._client)

    def _remove_others(self, source: bytes, target: str) -> None:
        """What an earlier attempt brought of another source."""
        names: Set[bytes] = set()
        parts: Set[bytes] = set()      # of its files: they are gone on with
        for entry in self._client.ls(source):
            if len(names) > KNOWN:
                break
            names.add(to_bytes(entry.name))
            if entry.is_file or entry.is_link and self._options.links == 'follow':
                parts.add(part_name(to_bytes(entry.name)))
        with os.scandir(target) as entries:
            for here in entries:
                name = to_remote(here.name)
                if name not in names and name not in parts and (len(names) <= KNOWN or is_part(name)
                                          or self._client.find(join(source, name), False) is None):
                    remove_tree(here.path)

    def _get_entry(self, entry: Stat, folder: 'LocalFolder', path: bytes) -> None:
        here = os.path.join(folder.target, to_local(entry.name))
        self._meter.total += entry.size if entry.is_file else 0
        if not folder.merge and os.path.isdir(here) and not os.path.islink(here):
            remove_tree(here)
        if entry.is_link:
            self._pipeline.drain()
            return self._get_link(path, here, folder.inside)
        if not entry.is_file:
            raise OSError(errno.EINVAL, NEITHER)
        if entry.size > SMALL or os.path.lexists(here) or os.path.lexists(local_part(here)):
            self._pipeline.drain()
            return self._get_file(path, here, None)
        self._get_small(entry, path, here, folder.again)

    def _get_link(self, path: bytes, here: str, inside: Tuple[str, ...]) -> None:
        if self._options.links == 'skip':
            return
        leads = link_of(self._client, path)
        if may_leave(leads, inside):
            raise OSError(errno.EINVAL, 'a link that leads out of the folder, or could, to %s' % shown(leads))
        if os.path.islink(here) and os.readlink(here) == to_local_link(leads):
            return
        if os.path.lexists(here):
            os.unlink(here)            # raises where it is a folder
        make_link(to_local_link(leads), here,
                  lambda: self._client.stat(self._client.through_links(path)).is_dir)

    def _get_small(self, entry: Stat, path: bytes, here: str, again: List[Tuple[bytes, str]]) -> None:
        """Asks for a small file, without waiting for it."""
        if self._pipeline.is_idle():
            self._client.drop_if_ended()
        fetched = Fetched(entry, path, here, again)
        self._pipeline.add(self._client.ask('getfile', quote(path)),
                           lambda wire, result: self._on_content(fetched, wire, result))
        if self._options.verify:
            algorithm, request = self._client.asking_for_digest(path, 0, MOST_SMALL)
            self._pipeline.add(request, lambda wire, result: self._on_digest(
                fetched, algorithm, wire, result))

    def _on_content(self, fetched: 'Fetched', wire: Wire, result: Union[int, Refused]) -> None:
        if isinstance(result, Refused):
            self._failures.add(fetched.path, result)
        elif result > MOST_SMALL:      # of a size that the server made up, or it grew: the next listing tells
            raise Disconnected('%s is larger than it was' % shown(fetched.path))
        elif result > 2 * SMALL:
            wire.skip(result)
            fetched.get_again()
        else:
            fetched.data = wire.read(result)
            if not self._options.verify:
                self._write_small(fetched)

    def _on_digest(self, fetched: 'Fetched', algorithm: str, wire: Wire,
                   result: Union[int, Refused]) -> None:
        if isinstance(result, Refused):
            if fetched.data is not None:
                self._failures.add(fetched.path, result)
        elif reads_same(wire, result, new_hash(algorithm, fetched.data or b'')) and fetched.data is not None:
            self._write_small(fetched)
        elif fetched.data is not None:
            fetched.get_again()

    def _write_small(self, fetched: 'Fetched') -> None:
        data, entry = fetched.data or b'', fetched.entry
        fetched.data = None
        with self._failing(fetched.path):
            with open_part(fetched.here) as file:
                write_here(file, memoryview(data))
                file.truncate(len(data))
                if self._options.keep:
                    bits = finish_part(file, fetched.here, (entry.mtime, entry.mtime), entry.mode)
                    self._unkept.add_unkept(fetched.path, bits)
                else:
                    finish_part(file, fetched.here)
            self._meter.add(len(data))


def open_waiting(target: str, meter: Meter) -> Any:
    """Waits for who reads from a FIFO, as cp does, but not for ever: a transfer keeps its place."""
    until = time.monotonic() + READER
    while True:
        try:
            return open_device(target)
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > until:
                raise
        meter.wait(0.05)


def write_named(file: Any, view: memoryview, path: str) -> None:
    """Raises OSError that names the path."""
    try:
        write_whole(file, view)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path)


def find_source(client: Connection, source: bytes) -> Stat:
    """Of what is to be fetched. Raises Refused, or ChirpError for a link that leads nowhere."""
    try:
        return client.stat(source)
    except Refused:
        found = client.find(source, False)
        if found is None or not found.is_link:
            raise
        raise leads_nowhere(source, client.readlink(source))


def followed(client: Connection, path: bytes) -> Stat:
    """What a link leads to. Raises OSError, which tells where, for one that leads nowhere, or round."""
    try:
        return client.stat(path)
    except Refused as refused:
        if refused.code not in (DOESNT_EXIST, INVALID):
            raise
        raise OSError(errno.ENOENT, 'a link to %s, where nothing is that is served' %
                      shown(client.readlink(path)))


def link_of(client: Connection, path: bytes) -> str:
    """Where a link of the server leads. Raises Changed where it is none any more."""
    try:
        return client.readlink(path)
    except Refused as refused:
        if refused.code != INVALID or refused.name:
            raise
        raise Changed(path, NO_LINK)


MOST_SMALL = 16 * 1024 * 1024  # bytes that a file may have grown to, which was small when it was listed


class LocalFolder:
    """One that is filled. ``inside``: the names that lead to it from the one that was asked for; ``merge``:
    what is in ``target`` already stays."""

    def __init__(self, source: bytes, target: str, inside: Tuple[str, ...], merge: bool) -> None:
        self.source = source
        self.target = target
        self.inside = inside
        self.merge = merge
        self.waiting: List[Stat] = []          # folders in it, until its files are here
        self.again: List[Tuple[bytes, str]] = []       # files that changed meanwhile: (path, where to)

    def has(self, entry: Stat) -> bool:
        """Whether what is looked at again has been fetched."""
        here = stat_of(os.path.join(self.target, to_local(entry.name)), False)
        return here is not None and (not self.merge or entry.is_file and stat.S_ISREG(here.st_mode) and (
            here.st_size, seconds(here.st_mtime_ns)) == (entry.size, entry.mtime))


class Fetched:
    """A small file on its way from the server."""
    __slots__ = ('entry', 'path', 'here', 'data', '_again')

    def __init__(self, entry: Stat, path: bytes, here: str, again: List[Tuple[bytes, str]]) -> None:
        self.entry = entry
        self.path = path
        self.here = here
        self.data: Optional[bytes] = None
        self._again = again

    def get_again(self) -> None:
        """It changed meanwhile: once the small ones are here, it is fetched as a large one is."""
        self.data = None
        self._again.append((self.path, self.here))
