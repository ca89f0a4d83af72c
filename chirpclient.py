"""Files and folders to and from a Chirp server: verified, resumed, in place all at once.

What it is not: a synchroniser: what a folder holds beside what is moved into it stays. No threads; an object
belongs to one thread at a time.
"""

import collections
import contextlib
import errno
import logging
import os
import posixpath
import stat
import threading
import time
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Set,
    Tuple,
    Union,
)

import agent
import localnames
from chirplocal import (
    NESTED,
    beginning,
    check_own_place,
    check_room,
    check_target,
    finish_part,
    give_up_part,
    is_device,
    is_link,
    join,
    keep,
    link_there,
    local_part,
    locked_folder,
    make_folder,
    make_link,
    may_leave,
    mode_of_file,
    mode_there,
    open_device,
    open_part,
    open_regular,
    open_regular_fd,
    pinned,
    remove_tree,
    stat_here,
    through_links,
    to_local,
    to_local_link,
    to_remote,
    tree_size,
    unpinned,
    write_here,
)
from chirprequests import SLOWEST_HASH, Connection, Pipeline, leads_nowhere, unkept_by
from chirpwire import (
    BLOCK,
    CHECKED,
    CRC32,
    DOESNT_EXIST,
    EXISTS,
    INVALID,
    IS_DIR,
    MODE_UNKEPT,
    NO_SPACE,
    NOT_AUTHENTICATED,
    NOT_AUTHORIZED,
    NOT_DIR,
    NOT_EMPTY,
    OF_SERVERS,
    PREAD_CRC32,
    PWRITE_CRC32,
    READ_ONLY,
    RESERVED,
    SMALL,
    TIME_UNKEPT,
    TOO_BIG,
    UNKEPT,
    AccessDenied,
    Busy,
    Cancelled,
    Changed,
    ChirpError,
    Crc32,
    Disconnected,
    Incomplete,
    Path,
    ProtocolError,
    Refused,
    Shrunk,
    Stat,
    TimedOut,
    Unlistable,
    Wire,
    hash_file,
    is_part,
    may_have_changed,
    new_buffer,
    new_hash,
    part_name,
    quote,
    shown,
    shown_whole,
    to_bytes,
)

log = logging.getLogger('vmhost.chirp')

# Bytes that one pread or pwrite moves. chirp_server takes in all of a pwrite before it writes it: meanwhile
# the next one fills the socket's buffers, if it is no larger than they are; and it wipes 16 MB for each.
PIECE = 4 * 1024 * 1024
AHEAD = 6 * PIECE              # bytes of preads or pwrites that are under way
WINDOW = 64 * 1024 * 1024      # bytes of which a server of ours is asked for the checksum at once
RETRIES = 2                    # new connections without progress before a transfer fails
OVERLAP = 64 * 1024            # bytes of a partial file that are fetched again, to see if it goes on
READER = 60.0                  # seconds that somebody has to begin to read from a FIFO
FAILURES = 10000               # failures of a folder that are told one by one
LONG_PATHS = 1 << 20           # characters of paths that are told whole, of those: a guest may make up any
KNOWN = 50000                  # names of a folder that are held; of more, each is asked for
ENTRIES = 10 * 1000 * 1000     # in a folder that is fetched, with all in it
FURTHER = 1                    # connections beside the first, for small files to a server that isn't ours
FURTHER_WORTH = 50             # small files that are worth one more
FURTHER_SOON = 2.0             # seconds in which it must be there
PENDING = 1000                 # folders in a folder that wait until its files have been moved
NEITHER = 'neither file, folder nor link'
AT_TARGET = ' (at the target)'  # ends the reason of a failure there
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

Progress = Callable[[int, int], None]


class Meter:
    """Tells how far a transfer is, not too often; and whether it was cancelled."""

    EVERY = 0.1                # seconds

    def __init__(self, progress: Optional[Progress], cancel: Optional[threading.Event]) -> None:
        self._progress = progress
        self._cancel = cancel
        self._told = 0.0
        self.moved = 0         # bytes that are where they should be
        self.total = 0
        self.best = 0          # the furthest that any attempt came

    def add(self, count: int) -> None:
        """So many bytes more are there. Raises Cancelled."""
        self.moved += count
        self.best = max(self.best, self.moved)
        self.look_up()
        if self._progress is not None and time.monotonic() >= self._told + self.EVERY:
            self.tell()

    def look_up(self) -> None:
        """Raises Cancelled."""
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled('cancelled')

    def tell(self) -> None:
        """Tells it now."""
        if self._progress is not None:
            self._told = time.monotonic()
            self._progress(self.moved, max(self.moved, self.total))

    def wait(self, seconds: float) -> None:
        """Raises Cancelled."""
        if self._cancel is None:
            time.sleep(seconds)
        elif self._cancel.wait(seconds):
            raise Cancelled('cancelled')


class Failures:
    """What of a folder could not be moved, or was not kept: ``some`` of the (path, reason), and the ``count``
    of all. The path is the source's; ``is_targets``: whether an error tells of the target."""

    def __init__(self, is_targets: Callable[[Any], bool] = lambda error: False) -> None:
        self._is_targets = is_targets
        self.clear()

    def clear(self) -> None:
        self.some: List[Tuple[str, str]] = []
        self._room = LONG_PATHS
        self.count = 0

    def add(self, path: Path, error: Any) -> None:
        self.count += 1
        if len(self.some) < FAILURES:
            reason = error.strerror if isinstance(error, OSError) else getattr(error, 'reason', '')
            told = path if isinstance(path, bytes) else to_remote(agent.short_path(unpinned(path)))
            text = shown_whole(told) if self._room > 0 else shown(told)
            self._room -= len(text)
            self.some.append((text, (reason or str(error)) + AT_TARGET * self._is_targets(error)))

    def add_unkept(self, path: Path, bits: int) -> None:
        """What the disk there didn't keep, bits of chirpwire.UNKEPT: often 0."""
        if bits:
            self.add(path, UNKEPT[bits])

    def check(self) -> None:
        """Raises Incomplete."""
        if self.count:
            raise Incomplete(self.some, self.count)


class Options(NamedTuple):
    """How a transfer is done: see ``ChirpClient.put``."""
    verify: bool
    keep: bool
    links: str


class ChirpClient(Connection):
    """Puts and gets files and folders. What isn't whole yet has a name of ``part_name``, beside its own.

    ``unkept``: whose modes and times the disk didn't keep where the last put or get came to: its content is
    there all the same. Of a put to chirp_server, it is what that refused.
    """

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        self.unkept = Failures()

    def put(self, source: str, target: Path, progress: Optional[Progress] = None,
            cancel: Optional[threading.Event] = None, verify: bool = True, keep: bool = True,
            links: str = 'keep', within: Optional[float] = None) -> None:
        """Sends a file or folder, to be called ``target`` there. A folder goes into one that is there, whose
        mode, owner and time stay; a file that is replaced leaves its owner and mode to the new one. Where
        ``target`` is a link, what it leads to is; within a folder, a link is replaced itself.

        ``progress`` gets (bytes moved, bytes in all) from time to time; ``verify``: compare checksums;
        ``keep``: modes and times. Of a folder's symbolic links, ``keep`` makes the same, ``follow`` moves
        what they lead to, ``skip`` leaves them out. ``within``: seconds that all of it may take. Raises
        ChirpError, Incomplete where only some entries of a folder failed, and OSError for what is read here;
        Busy where this process puts something else there at the same time.
        """
        with self._moving(progress, cancel, within) as meter:
            Upload(self, meter, options(verify, keep, links)).run(
                localnames.long_path(os.fspath(source)), to_bytes(target).rstrip(b'/') or b'/')

    def get(self, source: Path, target: str, progress: Optional[Progress] = None,
            cancel: Optional[threading.Event] = None, verify: bool = True, keep: bool = True,
            links: str = 'keep', within: Optional[float] = None, given: Optional['Given'] = None) -> None:
        """Fetches a file or folder; as ``put``, and raises OSError for what is written here; Busy where
        any process on this machine fetches something else to there at the same time. A device or FIFO is
        written to; ``given``: what it got by earlier calls, and by this one.

        Of a folder's symbolic links, ``keep`` makes those that stay within it, with no ``..`` after a
        name; the others are told of in Incomplete. Through a link nothing is written, but where ``target``
        itself is one.
        """
        if not source:
            raise ChirpError('an empty path is no source')
        with self._moving(progress, cancel, within) as meter:
            target = os.fspath(target)
            localnames.check_path(target)
            Download(self, meter, options(verify, keep, links)).run(
                to_bytes(source), localnames.long_path(target.rstrip(SEPARATORS) or target), given or Given())

    def fetch(self, source: Path, target: str, limit: int, progress: Optional[Progress] = None,
              cancel: Optional[threading.Event] = None, within: Optional[float] = None) -> int:
        """Fetches a file, or its first ``limit`` bytes; says how many there are."""
        with self._moving(progress, cancel, within) as meter:
            download = Download(self, meter, Options(True, False, 'skip'))
            return download.fetch(to_bytes(source), os.fspath(target), limit)

    def read(self, source: Path, write: Callable[[memoryview], Any], progress: Optional[Progress] = None,
             cancel: Optional[threading.Event] = None) -> None:
        """Gives the content of a file to ``write``, piece by piece, each once."""
        with self._moving(progress, cancel, None) as meter:
            Download(self, meter, Options(True, False, 'skip')).stream(to_bytes(source), write, Given())

    @contextlib.contextmanager
    def _moving(self, progress: Optional[Progress], cancel: Optional[threading.Event],
                within: Optional[float]) -> Iterator[Meter]:
        meter, self.unkept = Meter(progress, cancel), Failures()
        self.cancel = cancel
        self.until = None if within is None else time.monotonic() + within
        try:
            meter.add(0)
            yield meter
            meter.tell()
        except BaseException:
            self.disconnect()          # replies may still be under way
            raise
        finally:
            self.cancel = self.until = None

    def persist(self, meter: Meter, step: Callable[[], Any]) -> Any:
        """Does it; again, with a new connection, where that broke, as long as this leads anywhere."""
        failed = 0
        while True:
            before = meter.best
            try:
                return step()
            except Disconnected as error:
                self.disconnect()
                failed = 0 if meter.best > before else failed + 1
                if isinstance(error, (TimedOut, ProtocolError)) or failed > RETRIES:
                    raise
                log.info('%s:%d: %s; trying again', self.address, self.port, error)
                meter.wait(0.05 * 4 ** failed)

    def until_it_holds_still(self, meter: Meter, path: Path, step: Callable[[], Any]) -> Any:
        """``persist``; again where a file changed meanwhile, some times. Raises Changed."""
        tries = 0
        while True:
            try:
                return self.persist(meter, step)
            except (Changed, Shrunk) as error:
                self.disconnect()
                tries += 1
                if tries > RETRIES:
                    raise Changed(path, error.reason if isinstance(error, Changed) else str(error))

    def has_same(self, path: bytes, file: Any, size: int, meter: Meter) -> bool:
        """Whether the first bytes of the server's file and of an open one here are the same. Both are read
        at the same time. A server that isn't ours has the checksum of a whole file alone."""
        window = WINDOW if self.is_ours else size
        for start in range(0, size, window or 1):
            count = min(window, size - start)
            algorithm, request = self.asking_for_digest(path, start, count)
            wire = self.connect()
            wire.put(request)
            wire.flush()
            digest = hash_file(file, algorithm, start, count, meter.look_up)
            try:
                length = self.result(wire, 'checksum of %s' % shown(path), count / SLOWEST_HASH)
            except Refused as refused:
                if refused.code in (DOESNT_EXIST, NOT_AUTHORIZED):
                    return False
                raise
            if length != len(digest):
                raise self.broken('a checksum of %d bytes' % length)
            if wire.read(length) != digest:
                return False
        return True



def concerns_all(refused: Refused) -> bool:
    """Whether what else there is of a folder would be refused, too."""
    return refused.code in (NO_SPACE, NOT_AUTHENTICATED) or refused.name == READ_ONLY


def altered(path: Path) -> Changed:
    return Changed(path, 'it changed while it was read, or arrived altered')


def options(verify: bool, keep: bool, links: str) -> Options:
    if links not in ('keep', 'skip', 'follow'):
        raise ValueError('links is keep, skip or follow, not %s' % links)
    return Options(verify, keep, links)


def own_name(source: str, separators: str = '/') -> str:
    """The last name of a path; '' for ``/``, ``.`` and ``..``."""
    for separator in separators:
        source = source.replace(separator, '/')
    name = source.rstrip('/').rpartition('/')[2]
    return '' if name in ('.', '..') else name


IsFolder = Callable[[str], Optional[bool]]     # None: there is nothing of that name


def landing(name: str, target: str, is_folder: IsFolder, of_folder: Callable[[], bool], paths: Any) -> str:
    """Where ``cp -r`` would put something of that name: in a folder that is there, else under the target's
    own name. ``paths``: the module that knows the target's system. Raises ChirpError where there is no such
    place."""
    if not target:
        if not name:
            raise ChirpError('name the target: the source has no name of its own')
        return name
    there = is_folder(target)
    separators = separators_of(paths)
    if there:
        return target.rstrip(separators) + paths.sep + name if name else target
    if there is None:
        check_folder(paths.dirname(target.rstrip(separators)), is_folder)
    if target[-1] in separators and not of_folder():
        raise ChirpError('%s is not a folder' % target)
    return target


def check_folder(path: str, is_folder: IsFolder) -> None:
    """Raises ChirpError where no folder is that something could be made in."""
    there = is_folder(path) if path else True
    if there is None:
        raise ChirpError('the folder %s does not exist' % path)
    if not there:
        raise ChirpError('%s is not a folder' % path)


def separators_of(paths: Any) -> str:
    return paths.sep + (paths.altsep or '')


def landing_there(client: Connection, source: str, target: str) -> str:
    """What a file or folder from here is to be called at the server, as by ``cp -r``. Raises ChirpError."""
    def is_folder(path: str) -> Optional[bool]:
        found = client.find(path)
        return None if found is None else found.is_dir
    return landing(own_name(source, SEPARATORS), target, is_folder, lambda: os.path.isdir(source), posixpath)


def landing_here(client: Connection, source: str, target: str) -> str:
    """What a file or folder of the server is to be called here, as by ``cp -r``. Raises ChirpError,
    OSError."""
    def is_folder(path: str) -> Optional[bool]:
        return os.path.isdir(path) if os.path.exists(path) else None
    name = own_name(source)
    if name and source[-1] == '/' and not client.stat(source).is_dir:
        raise Refused(NOT_DIR, source)
    if name and (not target or os.path.isdir(target)):
        name = to_local(name)          # raises where that can't be a name here
    return landing(name, target, is_folder, lambda: client.stat(source).is_dir, os.path)


SEPARATORS = separators_of(os.path)


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


class Move:
    """What both directions share."""

    def __init__(self, client: ChirpClient, meter: Meter, options: Options) -> None:
        self._client = client
        self._meter = meter
        self._options = options
        self._failures = Failures()
        self._unkept = client.unkept
        self._merges = True            # whether what is at the target already is somebody's
        self._around: List[Tuple[int, int]] = []       # (device, inode) of the folders that we are in

    @contextlib.contextmanager
    def _failing(self, path: Path) -> Iterator[None]:
        """One entry's failure isn't the folder's, unless the others would fail, too."""
        try:
            yield
        except (Refused, Changed, Busy, OSError) as error:
            if isinstance(error, Refused) and concerns_all(error) \
                    or isinstance(error, OSError) and error.errno in FULL:
                raise
            self._failures.add(path, error)

    def _check_apart(self, path: Path, ways: Callable[[str], Tuple[str, str]]) -> None:
        """Raises OSError for a folder that would be copied into itself, where what is served is on this
        machine. ``ways``: the source and the target here, if it is served from that folder."""
        root = self._client.root
        if os.name != 'posix' or not root:
            return
        try:
            here, there = os.stat(root), self._client.stat('/')
        except (OSError, Refused):
            return
        if (here.st_dev, here.st_ino, int(here.st_mtime)) == (there.dev, there.ino, there.mtime):
            source, target = [os.path.join(os.path.realpath(way), '') for way in ways(root + '/')]
            if target.startswith(source):
                raise OSError(errno.EINVAL, 'a folder can\'t be copied into itself', shown(path))

    @contextlib.contextmanager
    def _inside(self, device: int, inode: int) -> Iterator[None]:
        """Raises OSError where a link has led back to a folder that we are in, or down too far."""
        if len(self._around) > NESTED:
            raise OSError(errno.ENAMETOOLONG, 'too deep')
        if self._options.links == 'follow' and (device, inode) in self._around:
            raise OSError(errno.ELOOP, 'a link to a folder that it is in')
        self._around.append((device, inode))
        try:
            yield
        finally:
            self._around.pop()


class Upload(Move):
    """One ``put``."""

    _arrived: Optional['Arrived'] = None           # of a folder

    def __init__(self, client: ChirpClient, meter: Meter, options: Options) -> None:
        super().__init__(client, meter, options)
        self._further = Further(client)
        self._follows = True           # reads what a link leads to

    def run(self, source: str, target: bytes) -> None:
        found = stat_here(source)
        target = self._client.through_links(target)
        self._check_name(posixpath.basename(target), target)
        with CLAIMS.holding(self._client, target), self._client.holding(target):
            if not stat.S_ISDIR(found.st_mode):
                self._meter.total = found.st_size
                self._send_still(source, target)
                return
            self._check_apart(target, lambda root: (source, root + os.fsdecode(target)))
            self._meter.total = tree_size(source)
            with contextlib.closing(self._further):
                self._client.persist(self._meter, lambda: self._put_tree(source, target))
        self._failures.check()

    # One file.

    def _put_file(self, source: str, target: bytes) -> os.stat_result:
        """Under a temporary name, which becomes its own at the end. Gives the stat of what was sent."""
        with CLAIMS.holding(self._client, target):
            return self._send_still(source, target)

    def _send_still(self, source: str, target: bytes) -> os.stat_result:
        base = self._meter.moved
        with naming(target):
            return self._client.until_it_holds_still(  # type: ignore[no-any-return]
                self._meter, to_remote(source), lambda: self._send_file(source, target, base))

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
                if not self._client.has_same(part, file, found.st_size, self._meter):
                    self._client.unlink(part)
                    raise altered(to_remote(source))
        bits = 0
        if mode != wanted:
            bits = self._client.keep_mode(part, wanted)
        if self._options.keep:
            bits |= self._client.keep_times(part, int(found.st_atime), int(found.st_mtime), wanted)
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
        if there is None or there.size != found.st_size or there.mtime != int(found.st_mtime):
            return False
        if not self._options.keep or self._options.verify and not self._client.has_same(
                target, file, found.st_size, self._meter):
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
                and 0 < there.size <= found.st_size
                and self._client.has_same(part, file, there.size, self._meter)):
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
        self._failures = Failures(lambda error: isinstance(error, Refused))
        self._unkept.clear()
        self._meter.moved = 0
        self._around.clear()
        self._further.close()          # an earlier attempt's: requests may be under way
        self._follows = self._options.links == 'follow'
        self._small = SmallFiles(self._client, self._further, self._meter, self._failures, self._options)
        self._arrived = None if self._client.is_ours else Arrived(self._client)
        there = self._client.find(target)
        self._merges = there is not None
        if there is not None and not there.is_dir:
            raise Refused(NOT_DIR, shown(target))
        if there is not None:
            return self._put_folder(source, target, True)
        part = part_path(target)
        self._client.ask('rename', quote(part), quote(target))         # raises where that is too long
        old = self._client.find(part, False)
        if old is None:
            self._client.check_room(posixpath.dirname(part) or b'/', self._meter.total, target)
        if old is not None and not old.is_dir:
            self._client.unlink(part)
        try:
            with naming(target):
                self._put_folder(source, part, False)
                if self._arrived is not None:
                    self._arrived.check()
        except (Refused, OSError) as error:
            self._client.disconnect()          # requests may be under way
            self._further.close()
            with contextlib.suppress(Refused):
                self._client.rmdir(part)       # which nothing has arrived in
            if isinstance(error, Refused) and error.code == NO_SPACE:
                if self._client.find(part, False) is None:
                    raise Refused(NO_SPACE, shown(target))
                raise Refused(NO_SPACE, '%s: what has arrived is in %s' % (shown(target), shown(part)))
            raise
        try:
            self._client.rename(part, target)
        except Refused as refused:
            if refused.code in (NOT_EMPTY, NOT_DIR, EXISTS):
                raise Refused(refused.code, '%s was made meanwhile; what has arrived is in %s' % (
                    shown(target), shown(part)))
            raise

    def _put_folder(self, source: str, target: bytes, merge: bool) -> None:
        """``merge``: others may read what is there already, so files must come in place all at once, and what
        the source doesn't have stays."""
        with pinned(source, self._follows or not self._around) as here:    # first the user's own link
            found = os.stat(here)
            with self._inside(found.st_dev, found.st_ino):
                made = self._put_content(here, target, merge)
            if self._options.keep and (made or not merge):
                mode = mode_there(found)
                self._unkept.add_unkept(here, self._client.keep_mode(target, mode)
                                        | self._client.keep_times(target, int(found.st_atime),
                                                                  int(found.st_mtime), mode))

    def _put_content(self, source: str, target: bytes, merge: bool) -> bool:
        """Makes the folder, unless it is there, and puts all into it; whether it was made."""
        made = self._make_folder(target)
        known, twins = Known(self._client, target), Twins(self._client, self._small, target)
        if not made:
            if not merge:
                self._client.chmod(target, 0o700)
            known.fill(None if merge else source)
        unmoved: Set[bytes] = set()            # partial files that a later attempt goes on from
        sent: 'Sent' = {}
        folders: List[str] = []
        with os.scandir(source) as entries:
            for entry in entries:
                failed, name = self._failures.count, to_remote(entry.name)
                with self._failing(entry.path):
                    check_whole(name)
                    self._check_name(name)
                    file: Optional[os.stat_result] = None
                    if entry.is_dir(follow_symlinks=self._follows) and (self._follows or not is_link(entry)):
                        if not merge:
                            self._make_way(known, target, name)
                        folders.append(entry.name)
                    elif not self._follows and is_link(entry):
                        if self._options.links == 'skip':
                            continue
                        twins.check(entry.name)
                        self._put_link(entry.path, target, name, known, merge)
                    else:
                        twins.check(entry.name)
                        file = self._put_entry(entry, target, name, known, merge)
                    self._note(sent, name, file)
                if self._failures.count > failed:
                    unmoved.add(part_name(name))
                if len(folders) >= PENDING:
                    self._put_folders(source, folders, target, merge, twins)
        self._put_folders(source, folders, target, merge, twins)
        if not merge:
            known.remove_parts(unmoved)
            if self._arrived is not None and not self._failures.count:
                self._arrived.check_folder(target, sent)
        return made

    def _check_name(self, name: bytes, path: Path = b'') -> None:
        """Raises OSError for what would be there, and in no listing; or what no server has written."""
        if name.startswith(RESERVED) and self._client.root is None:
            raise OSError(errno.EINVAL, 'chirp_server shows nobody what is called so', shown(path) or None)
        if name.startswith(OF_SERVERS):
            raise OSError(errno.EINVAL, 'Chirp servers keep their own things under that name: choose another',
                          shown(path) or None)

    def _put_folders(self, source: str, names: List[str], target: bytes, merge: bool,
                     twins: 'Twins') -> None:
        self._small.finish()
        for name in names:
            path = os.path.join(source, name)
            with self._failing(path):
                self._meter.add(0)
                twins.check(name)
                self._put_folder(path, join(target, to_remote(name)), merge)
        names.clear()

    def _make_way(self, known: 'Known', folder: bytes, name: bytes) -> None:
        """Removes what an earlier attempt left where a folder is to be."""
        there = self._find(known, name)
        if there is not None and not there.is_dir:
            self._small.asking(lambda: self._client.unlink(join(folder, name)))

    def _make_folder(self, target: bytes) -> bool:
        """Whether it wasn't there."""
        try:
            self._client.mkdir(target, 0o700)
            return True
        except Refused as refused:
            if refused.code != EXISTS:
                raise
            return False

    def _put_entry(self, entry: os.DirEntry, folder: bytes, name: bytes, known: 'Known',
                   merge: bool) -> os.stat_result:
        """A file; gives the stat of what was sent."""
        target = join(folder, name)
        there = self._find(known, name)
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
            if merge and known.has_part(name):
                self._small.asking(lambda: self._client.rmall(part_path(target)))
            mode = self._wanted_mode(found, there, data)
            self._small.put(SmallFile(unpinned(entry.path), target, merge, mode, there is not None, found,
                                      data))
            return found
        return self._small.asking(lambda: self._put_file(entry.path, target))

    def _find(self, known: 'Known', name: bytes) -> Optional[Stat]:
        """What is there of that name."""
        return self._small.asking(lambda: known.find(name)) if known.must_ask else known.find(name)

    def _note(self, sent: 'Sent', name: bytes, found: Optional[os.stat_result]) -> None:
        """What was sent, to be looked at, as far as memory allows. ``found``: of a file; those of /proc tell
        no size."""
        if self._arrived is not None and len(sent) < KNOWN:
            sent[name] = (found.st_size, int(found.st_mtime)) \
                if found is not None and found.st_size and self._options.keep else None

    def _has(self, source: str, found: os.stat_result, target: bytes, there: Optional[Stat]) -> bool:
        if there is None or not there.is_file or there.size != found.st_size:
            return False
        with open_regular(source, self._follows) as file:
            return self._is_same(file, source, found, target, there)

    def _put_link(self, source: str, folder: bytes, name: bytes, known: 'Known', merge: bool) -> None:
        target, leads = join(folder, name), link_there(source)
        self._small.finish()
        there = known.find(name)
        if there is not None:
            if there.is_link and to_bytes(self._client.readlink(target)) == leads:
                return
            (self._client.unlink if merge else self._client.rmall)(target)
        self._client.symlink(leads, target)


class Known:
    """What is in a folder of the server, as far as memory allows; of more names it asks."""

    def __init__(self, client: ChirpClient, folder: bytes) -> None:
        self._client = client
        self._folder = folder
        self._entries: Dict[bytes, Stat] = {}
        self._parts: List[bytes] = []
        self.must_ask = False

    def fill(self, source: Optional[str]) -> None:
        """Reads the folder. ``source``: what isn't in that folder here is removed there."""
        for entry in self._client.ls(self._folder):
            name = to_bytes(entry.name)
            if is_part(name):
                self._parts.append(name)
            elif source is not None and not os.path.lexists(os.path.join(source, to_local(entry.name))):
                self._client.rmall(join(self._folder, name))
            elif len(self._entries) < KNOWN:
                self._entries[name] = entry
            else:
                self.must_ask = True

    def find(self, name: bytes) -> Optional[Stat]:
        if name in self._entries:
            return self._entries[name]
        return self._client.find(join(self._folder, name), False) if self.must_ask else None

    def has_part(self, name: bytes) -> bool:
        return bool(self._parts) and part_name(name) in self._parts

    def remove_parts(self, unmoved: Set[bytes]) -> None:
        """Of files that the source doesn't have; those of the others have their names by now, but for
        ``unmoved``."""
        for name in self._parts:
            if name not in unmoved and self._client.find(join(self._folder, name), False) is not None:
                self._client.rmall(join(self._folder, name))


Sent = Dict[bytes, Optional[Tuple[int, int]]]  # names in a folder, of files with size and time, where known


class Arrived:
    """What has been put to a server that isn't ours, which keeps nobody out of a partial folder: whether that
    is still what is there when the folder gets its name."""

    def __init__(self, client: ChirpClient) -> None:
        self._client = client
        self._folders: Dict[bytes, int] = {}           # with a sum of what was in them
        self._latest = b''             # of them

    def check_folder(self, folder: bytes, sent: Sent) -> None:
        """Raises Changed."""
        def look(entry: Stat) -> Stat:
            name = to_bytes(entry.name)
            expected = sent.pop(name, None)
            if expected is not None and not (
                    entry.size == expected[0] and is_about(entry.mtime, expected[1])):
                raise self._changed(join(folder, name))
            return entry
        with contextlib.suppress(Unlistable):
            self._folders[folder], self._latest = sum_of(map(look, self._client.ls(folder))), folder
            if sent:
                raise self._changed(join(folder, next(iter(sent))))

    def check(self) -> None:
        """Of all folders but the latest, which has just been looked at. Raises Changed."""
        for folder, expected in self._folders.items():
            if folder != self._latest and sum_of(self._client.ls(folder)) != expected:
                raise self._changed(folder)

    def _changed(self, path: bytes) -> Changed:
        return Changed(path, 'it changed while the folder was sent: does another transfer go there?')


def is_about(there: int, sent: int) -> bool:
    """Whether a time may be what a server's disk has made of another one."""
    return abs(there - sent) <= 2 or not DOS_BEGIN < sent < DOS_END


DOS_BEGIN, DOS_END = 315619200, 4354732800     # 1980 and 2108: FAT knows the time between


def sum_of(entries: Iterable[Stat]) -> int:
    """One number for a listing, in whatever order it comes."""
    result = 0
    for entry in entries:
        about = (0, 0) if entry.is_dir else (entry.size, entry.mtime)
        result ^= hash((entry.name, entry.ino) + about)
    return result


class Twins:
    """Names of one folder that differ by case or accents alone, which the server's disk may take for one."""

    def __init__(self, client: ChirpClient, small: 'SmallFiles', folder: bytes) -> None:
        self._client = client
        self._small = small
        self._folder = folder
        self._first: Dict[str, str] = {}
        self._folds: Optional[bool] = None     # whether the disk ignores case, once there are too many names

    def check(self, name: str) -> None:
        """What comes next. Raises OSError where it would replace another one that came before it."""
        if len(self._first) >= KNOWN:
            return self._check_disk()
        first = self._first.setdefault(localnames.case_folded(name), name)
        if first != name and self._are_one(first, name):
            raise OSError(errno.EEXIST, 'there it would be the same file as %s, which came before it' % first)

    def _check_disk(self) -> None:
        """More names can't be held: raises OSError, where the disk ignores case."""
        if self._folds is None:
            name = next((name for name in self._first.values() if name.swapcase() != name), '')
            self._folds = bool(name) and self._are_one(name, name.swapcase())
        if self._folds:
            raise OSError(errno.EINVAL, 'a folder of too many names for a disk that ignores case')

    def _are_one(self, *names: str) -> bool:
        one, other = self._small.asking(lambda: [
            self._client.find(join(self._folder, to_remote(name)), False) for name in names])
        return one is not None and other is not None and (one.dev, one.ino) == (other.dev, other.ino)


class SmallFile:
    """A small file on its way to the server."""
    __slots__ = ('source', 'target', 'name', 'mode', 'first_mode', 'replaces', 'found', 'data', 'error',
                 'unkept')

    def __init__(self, source: str, target: bytes, merge: bool, mode: int, replaces: bool,
                 found: os.stat_result, data: bytes) -> None:
        self.source = source
        self.target = target
        self.name = part_path(target) if merge else target     # by which it is sent
        self.mode = self.first_mode = mode
        self.replaces = replaces       # a file, whose mode that is
        self.found = found
        self.data = data
        self.error: Optional[Exception] = None
        self.unkept = 0                # bits of chirpwire.UNKEPT

    def mode_set(self, _: Optional[Wire], result: Union[int, Refused]) -> None:
        self._set(result, MODE_UNKEPT)

    def times_set(self, _: Optional[Wire], result: Union[int, Refused]) -> None:
        self._set(result, TIME_UNKEPT)

    def _set(self, result: Union[int, Refused], what: int) -> None:
        try:
            self.unkept |= unkept_by(result, what)
        except Refused:
            self.check(None, result)

    def check(self, _: Optional[Wire], result: Union[int, Refused]) -> None:
        """Notes a refusal."""
        if isinstance(result, Refused) and self.error is None:
            self.error = result


class Further:
    """Connections beside a client's own, for the small files of a folder that goes to a server which isn't
    ours: there each file costs a round trip. One that is refused or lost just means that there are none."""

    def __init__(self, client: Connection) -> None:
        self._client = client
        self._others: List[Connection] = []
        self._wanted = True

    def another(self) -> Optional[Connection]:
        """One more, where there may be one. It is made now."""
        if not self._wanted or self._client.is_ours or len(self._others) >= FURTHER:
            return None
        try:
            self._others.append(self._client.another(FURTHER_SOON))
        except (Disconnected, AccessDenied) as error:
            log.debug('%s; one connection will do', error)
            self._wanted = False
            return None
        return self._others[-1]

    def lose(self, connection: Connection, error: Exception) -> Exception:
        """What to raise where a connection broke. Where it isn't the client's own, all begins again with that
        alone, whatever the error was."""
        if connection is self._client:
            return error
        self._wanted = False
        return Disconnected('a further connection: %s' % error)

    def close(self) -> None:
        """Ends those that there are. More can be made."""
        while self._others:
            self._others.pop().disconnect()


class SmallFiles:
    """Small files of a folder, one after the other; by turns over what connections there are."""

    def __init__(self, client: ChirpClient, further: Further, meter: Meter, failures: Failures,
                 options: Options) -> None:
        self._further = further
        self._new_lane = lambda connection: Lane(connection, meter, failures, client.unkept, options)
        self._lanes = [self._new_lane(client)]
        self._count = 0

    def put(self, file: SmallFile) -> None:
        """Begins to send it."""
        self._count += 1
        if self._count % FURTHER_WORTH == 0:
            self._widen()
        lane = self._lanes[self._count % len(self._lanes)]
        try:
            lane.put(file)
        except (Disconnected, AccessDenied) as error:
            raise self._further.lose(lane.connection, error)

    def _widen(self) -> None:
        connection = self._further.another()
        if connection is not None:
            self._lanes.append(self._new_lane(connection))

    def asking(self, do: Callable[[], Any]) -> Any:
        """Does what asks the server by itself, once all are in place."""
        self.finish()
        return do()

    def finish(self) -> None:
        """Waits until all are in place."""
        for lane in self._lanes:
            try:
                lane.finish()
            except (Disconnected, AccessDenied) as error:
                raise self._further.lose(lane.connection, error)


class Lane:
    """Small files over one connection, the next one's request with the content of the last."""

    def __init__(self, connection: Connection, meter: Meter, failures: Failures, unkept: Failures,
                 options: Options) -> None:
        self.connection = connection
        self._meter = meter
        self._failures = failures
        self._unkept = unkept
        self._options = options
        self._pipeline = Pipeline(connection)
        self._asked: Optional[SmallFile] = None        # the one whose content waits for the server's consent
        self._last: Optional[SmallFile] = None         # the one that has no name yet

    def put(self, file: SmallFile) -> None:
        """Asks for it, in one packet with the content of the last one, which the server has agreed to
        meanwhile: it takes as many bytes as that has, and then reads on. This one's content can't go along:
        after a refusal, it would be taken for requests."""
        if self._pipeline.is_idle():
            self.connection.drop_if_ended()
        if file.name != file.target:
            self.connection.replacing(file.name, file.target)     # raises where that is too long
        file.first_mode = self._first_mode(file)
        line = self.connection.ask('putfile', quote(file.name), file.first_mode, len(file.data))
        self._send_asked()
        self._asked = file
        self._pipeline.add(line, lambda wire, result: self._agreed(file, result))
        self.connection.connect().flush()         # the server works on it while the next file is read here

    def finish(self) -> None:
        """Waits until all are in place."""
        self._send_asked()
        self._pipeline.drain()
        self._complete_last()
        self._pipeline.drain()

    def _send_asked(self) -> None:
        """Sends the content of the one that was asked for, once the server has agreed; and what follows."""
        self._pipeline.drain()
        file, self._asked = self._asked, None
        if file is not None:
            self.connection.connect().put(file.data)
            self._follow(file)

    def _agreed(self, file: SmallFile, result: Union[int, Refused]) -> None:
        if isinstance(result, Refused):
            self._asked = None
            if concerns_all(result):
                raise result.about(shown(file.target))
            self._failures.add(file.source, result)

    def _follow(self, file: SmallFile) -> None:
        """What comes after the content, without waiting; its name last, once all replies were good."""
        add, ask, name = self._pipeline.add, self.connection.ask, quote(file.name)
        add(b'', lambda wire, result: self._arrived(file, result))
        self._complete_last()
        if self._options.verify:
            algorithm, request = self.connection.asking_for_digest(file.name, 0, len(file.data))
            add(request, lambda wire, result: self._compare(file, algorithm, wire, result))
        if file.first_mode != file.mode and (self._options.keep or file.replaces):
            add(ask('chmod', name, file.mode), file.mode_set)
        if self._options.keep:
            # The time comes last: by it a later attempt knows what is complete.
            add(ask('utime', name, int(file.found.st_atime), int(file.found.st_mtime),
                    *self.connection.mode_to_tell(file.mode)), file.times_set)
        self._last = file

    def _first_mode(self, file: SmallFile) -> int:
        """What it has first: a server of ours has to read it for its checksum; the real one has a umask."""
        return file.mode | 0o400 if self.connection.is_ours else file.mode & ~0o077

    def _arrived(self, file: SmallFile, result: Union[int, Refused]) -> None:
        file.check(None, result)
        if isinstance(result, Refused):
            if concerns_all(result):
                raise result.about(shown(file.target))
        elif result != len(file.data):
            raise self.connection.broken('putfile: a wrong count')
        else:
            self._meter.add(result)

    def _compare(self, file: SmallFile, algorithm: str, wire: Wire, result: Union[int, Refused]) -> None:
        file.check(wire, result)
        if not isinstance(result, Refused) and not reads_same(wire, result, new_hash(algorithm, file.data)):
            file.error = altered(file.target)

    def _complete_last(self) -> None:
        """Gives the last one its name, now that all replies are known."""
        file, self._last = self._last, None
        if file is not None and file.error is not None:
            self._failures.add(file.source, file.error)
            return
        if file is not None and file.unkept:
            self._unkept.add_unkept(file.source, file.unkept)
        if file is not None and file.name != file.target:
            source = file.source
            self._pipeline.add(self.connection.replacing(file.name, file.target),
                               lambda wire, result: self._named(source, result))

    def _named(self, source: str, result: Union[int, Refused]) -> None:
        if isinstance(result, Refused):
            self._failures.add(source, result)


def read_small(path: str, follow: bool) -> Optional[Tuple[os.stat_result, bytes]]:
    """A file's stat and content; None of one that is larger than SMALL."""
    fd, found = open_regular_fd(path, follow)
    try:
        if found.st_size > SMALL:
            return None
        data = os.read(fd, SMALL + 1)
        while len(data) != found.st_size and len(data) <= SMALL:       # those of /proc say 0
            more = os.read(fd, SMALL + 1 - len(data))
            if not more:
                break
            data += more
        return (found, data) if len(data) <= SMALL else None
    finally:
        os.close(fd)


def reads_same(wire: Wire, count: int, checksum: Any) -> bool:
    """Whether the digest that follows is that one's; ``count``: the reply to its request."""
    digest = checksum.digest()
    if count != len(digest):
        raise ProtocolError('a checksum of %d bytes' % count)
    return wire.read(count) == digest


@contextlib.contextmanager
def naming(target: bytes) -> Iterator[None]:
    """Has what is refused name the target: a person knows no other name."""
    try:
        yield
    except Refused as refused:
        raise refused.about(refused.what.replace(shown(part_path(target)), shown(target)))


def check_file_there(there: Optional[Stat], target: bytes) -> None:
    """Raises Refused, or OSError, for what no file may replace: a folder, or a device, FIFO or socket."""
    if there is not None and there.is_dir:
        raise Refused(IS_DIR, shown(target))
    if there is not None and not there.is_file and not there.is_link:
        raise OSError(errno.EINVAL, 'neither a file nor a folder', shown(target))


def check_whole(name: bytes) -> None:
    """Raises OSError for what isn't whole yet, or never will be: it is no copy of anything."""
    if is_part(name):
        raise OSError(errno.EINVAL, 'a transfer has begun it, and not ended: repeat that, or remove this')


def part_path(path: bytes) -> bytes:
    """Where a file or folder of the server is while it isn't whole."""
    folder, slash, name = path.rstrip(b'/').rpartition(b'/')
    return folder + slash + part_name(name)


def space_of(found: Any) -> int:
    """Bytes on disk that a file of that stat needs: one with holes needs less than its size."""
    return min(found.st_size, found.st_blocks * 512) if hasattr(found, 'st_blocks') else found.st_size


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


class Download(Move):
    """One ``get`` or ``fetch``."""

    def run(self, source: bytes, target: str, given: 'Given') -> None:
        found = self._find_source(source)
        if not is_device(target):
            target = through_links(target)
        if found.is_dir:
            if is_device(target):
                raise Refused(IS_DIR, shown(source))
            self._check_apart(source, lambda root: (root + os.fsdecode(source), target))
            self._client.persist(self._meter, lambda: self._get_tree(source, target))
            return self._failures.check()
        if not found.is_file:
            raise OSError(errno.EINVAL, NEITHER, shown(source))
        self._meter.total = found.size
        if is_device(target):
            with self._open_device(target) as file:
                return self.stream(source, lambda view: write_whole(file, view), given)
        self._get_file(source, target, None)

    def _open_device(self, target: str) -> Any:
        """Waits for who reads from a FIFO, as cp does, but not for ever: a transfer keeps its place."""
        until = time.monotonic() + READER
        while True:
            try:
                return open_device(target)
            except OSError as error:
                if error.errno != errno.ENXIO or time.monotonic() > until:
                    raise
            self._meter.wait(0.05)

    def _find_source(self, source: bytes) -> Stat:
        try:
            return self._client.stat(source)
        except Refused:
            found = self._client.find(source, False)
            if found is None or not found.is_link:
                raise
            raise leads_nowhere(source, self._client.readlink(source))

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
        self._client.persist(self._meter, step)

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
        self._client.until_it_holds_still(
            self._meter, source, lambda: self._receive_file(source, target, base, limit))

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
        if int(here.st_mtime) != found.mtime or not self._options.keep:
            return False
        try:
            file = open_regular(target)
        except PermissionError:        # who may not read it may replace it, or is told then why not
            return False
        with file:
            if self._options.verify and not self._client.has_same(source, file, found.size, self._meter):
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
        if doubt and not (self._client.has_same(source, file, doubt, self._meter)
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
        self._failures = Failures(lambda error: isinstance(error, OSError) and error.filename is not None)
        self._unkept.clear()
        self._meter.moved = self._meter.total = self._entries = 0
        self._around.clear()
        self._pipeline = Pipeline(self._client)
        found = self._client.stat(source)
        self._merges = os.path.lexists(target)
        if self._merges:
            if os.path.islink(target) and os.path.isdir(target):
                target = os.path.realpath(target)      # the user's own link, above what we fetch
            made = make_folder(target)
            self._fold = localnames.folding(target)
            return self._get_folder(source, target, found, (), True, made)
        part = local_part(target)
        with locked_folder(part, target) as made:
            self._fold = localnames.folding(part)
            try:
                self._get_folder(source, part, found, (), False, made)
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
        with self._inside(found.dev, found.ino), pinned(target) as here:
            try:
                self._fill_folder(source, here, inside, merge, made)
            except (Refused, Changed, Busy, OSError):
                self._pipeline.drain()         # of what is to come to here
                raise
            if self._options.keep and (made or not merge):
                self._unkept.add_unkept(source, keep(here, (found.mtime, found.mtime), found.mode))

    def _fill_folder(self, source: bytes, target: str, inside: Tuple[str, ...], merge: bool,
                     made: bool) -> None:
        if not made and not merge:
            os.chmod(target, 0o700)
            self._remove_others(source, target)
        folders: List[Stat] = []
        again: List[Tuple[bytes, str]] = []
        names = localnames.Names(self._fold)
        for entry in self._client.ls(source):
            name = to_bytes(entry.name)
            self._entries += 1
            if self._entries > ENTRIES:
                raise ProtocolError('a folder of too many entries')
            with self._failing(join(source, name)):
                check_whole(name)
                names.add(to_local(entry.name))
                if not stat.S_IFMT(entry.mode):            # the server may not look at it
                    self._pipeline.drain()
                    entry = self._client.lstat(join(source, name))._replace(name=entry.name)
                if entry.is_link and self._options.links == 'follow':
                    self._pipeline.drain()
                    entry = self._followed(join(source, name))._replace(name=entry.name)
                if entry.is_dir:
                    folders.append(entry)
                else:
                    self._get_entry(entry, source, target, inside, merge, again)
            if len(folders) >= PENDING:
                self._get_folders(source, target, folders, inside, merge, again)
        self._get_folders(source, target, folders, inside, merge, again)

    def _followed(self, path: bytes) -> Stat:
        """What a link leads to. Raises OSError, which tells where, for one that leads nowhere, or round."""
        try:
            return self._client.stat(path)
        except Refused as refused:
            if refused.code not in (DOESNT_EXIST, INVALID):
                raise
            raise OSError(errno.ENOENT, 'a link to %s, where nothing is that is served' %
                          shown(self._client.readlink(path)))

    def _get_folders(self, source: bytes, target: str, folders: List[Stat], inside: Tuple[str, ...],
                     merge: bool, again: List[Tuple[bytes, str]]) -> None:
        """Waits for the small files, fetches those again that changed, and then the folders in it."""
        self._pipeline.drain()
        for path, here in again:
            with self._failing(path):
                self._get_file(path, here, None)
        again.clear()
        for entry in folders:
            path = join(source, to_bytes(entry.name))
            with self._failing(path):
                self._meter.add(0)
                here = os.path.join(target, to_local(entry.name))
                if not merge and os.path.lexists(here) and (os.path.islink(here) or not os.path.isdir(here)):
                    os.unlink(here)
                self._get_folder(path, here, entry, inside + (entry.name,), merge, make_folder(here))
        folders.clear()

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

    def _get_entry(self, entry: Stat, source: bytes, target: str, inside: Tuple[str, ...], merge: bool,
                   again: List[Tuple[bytes, str]]) -> None:
        path, here = join(source, to_bytes(entry.name)), os.path.join(target, to_local(entry.name))
        self._meter.total += entry.size if entry.is_file else 0
        if not merge and os.path.isdir(here) and not os.path.islink(here):
            remove_tree(here)
        if entry.is_link:
            self._pipeline.drain()
            return self._get_link(path, here, inside)
        if not entry.is_file:
            raise OSError(errno.EINVAL, NEITHER)
        if entry.size > SMALL or os.path.lexists(here) or os.path.lexists(local_part(here)):
            self._pipeline.drain()
            return self._get_file(path, here, None)
        self._get_small(entry, path, here, again)

    def _get_link(self, path: bytes, here: str, inside: Tuple[str, ...]) -> None:
        if self._options.links == 'skip':
            return
        leads = self._client.readlink(path)
        if may_leave(leads, inside):
            raise OSError(errno.EINVAL, 'a link that leads out of the folder, or could, to %s' % shown(leads))
        if os.path.islink(here) and os.readlink(here) == to_local_link(leads):
            return
        if os.path.lexists(here):
            os.unlink(here)            # raises where it is a folder
        make_link(to_local_link(leads), here, lambda: self._client.stat(path).is_dir)

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


MOST_SMALL = 16 * 1024 * 1024  # bytes that a file may have grown to, which was small when it was listed


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


def write_whole(file: Any, view: memoryview) -> None:
    while view:
        view = view[file.write(view):]
