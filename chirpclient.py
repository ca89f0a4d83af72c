"""Files and folders from and to a Chirp server: verified, going on where an attempt stopped.

Thread ``chirp-hash`` asks for a checksum while a large file moves.
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
from typing import Any, Callable, Iterator, List, Optional, Tuple, Union

from chirplocal import (
    NESTED,
    changed,
    check_target,
    hash_local,
    hash_part,
    join,
    let_go,
    local_part,
    locked_folder,
    make_folder,
    may_leave,
    open_part,
    open_regular,
    part_name,
    part_path,
    set_mode,
    set_times,
    to_local,
    to_local_link,
    to_remote,
    tree_size,
    write_here,
)
from chirprequests import LARGE, PART, PIECE, Entry, Listing, Requests, words_of_hash
from chirpwire import (
    BLOCK,
    COMMON,
    DOESNT_EXIST,
    EXISTS,
    INVALID,
    IS_DIR,
    NO_SPACE,
    NOT_AUTHENTICATED,
    NOT_DIR,
    SMALL,
    AccessDenied,
    Busy,
    Cancelled,
    Changed,
    ChirpError,
    Disconnected,
    Incomplete,
    Path,
    ProtocolError,
    Refused,
    Shrunk,
    Stat,
    TimedOut,
    Wire,
    new_buffer,
    new_hash,
    quote,
    send_passing,
    shown,
    to_bytes,
)

log = logging.getLogger('vmhost.chirp')


# --- the client: files and folders -----------------------------------------------------------

DEPTH = 32                     # requests that are sent ahead
AHEAD = 16 * 1024              # and their bytes: what a server takes in while it waits for us to read
PIECES = 3                     # preads or pwrites that are under way
MANY = 20                      # small files after which a second connection is worth making
RETRIES = 2                    # new connections without progress before a transfer fails
BESIDE = 8 * 1024 * 1024       # a file from here on is hashed by the server while it is moved
OVERLAP = 64 * 1024            # bytes of a partial file that are fetched again, to see if it goes on
FAILURES = 100                 # failures of a folder that are told one by one
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
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled('cancelled')
        if self._progress is not None and time.monotonic() >= self._told + self.EVERY:
            self.tell()

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


class Pipeline:
    """Requests sent ahead, and what to do with each reply, in order."""

    def __init__(self, client: Requests) -> None:
        self._client = client
        self._waiting: collections.deque = collections.deque()
        self._bytes = 0

    def add(self, line: bytes, read: Callable[[Wire, Union[int, Refused]], None]) -> None:
        """Sends a request; ``read`` gets the wire and the number of the reply, or the refusal."""
        self._client.connect().put(line)
        self._waiting.append((len(line), read))
        self._bytes += len(line)
        while len(self._waiting) > DEPTH or self._bytes > AHEAD:
            self.step()

    def step(self) -> None:
        """Reads the reply of the oldest request."""
        size, read = self._waiting.popleft()
        self._bytes -= size
        wire = self._client.connect()
        try:
            result: Union[int, Refused] = self._client.result(wire)
        except Refused as refused:
            result = refused
        read(wire, result)

    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return not self._waiting

    def drain(self) -> None:
        """Reads all replies."""
        while self._waiting:
            self.step()


class ChirpClient(Requests):
    """Puts and gets files and folders: verified, going on where an earlier attempt stopped, in place
    all at once. What isn't whole yet is called ``NAME.vmhost-part``: such names are ours, and of a folder
    they are left out."""

    def put(self, source: str, target: Path, progress: Optional[Progress] = None,
            cancel: Optional[threading.Event] = None, verify: bool = True, keep: bool = True) -> None:
        """Sends a file or folder. A folder goes into one of the same name that is there.

        ``progress`` gets (bytes moved, bytes in all) from time to time; ``verify``: compare checksums;
        ``keep``: modes and times. Raises ChirpError, and OSError for what is read here; Busy where this
        process puts something else there at the same time.
        """
        with self._moving(progress, cancel) as meter:
            Upload(self, meter, verify, keep).run(os.fspath(source), to_bytes(target).rstrip(b'/') or b'/')

    def get(self, source: Path, target: str, progress: Optional[Progress] = None,
            cancel: Optional[threading.Event] = None, verify: bool = True, keep: bool = True,
            links: str = 'inside') -> None:
        """Fetches a file or folder; as ``put``, and raises OSError for what is written here; Busy where
        any process on this machine fetches something else to there at the same time.

        Of a folder's symbolic links, ``inside`` makes those that stay within it, with no ``..`` after a
        name (the others are told of in Incomplete), ``all`` makes all, ``none`` leaves them out. Nothing
        is written through a link.
        """
        with self._moving(progress, cancel) as meter:
            target = os.fspath(target)
            Download(self, meter, verify, keep, links).run(
                to_bytes(source), target.rstrip(os.sep + (os.altsep or '')) or target)

    def fetch(self, source: Path, target: str, limit: int, progress: Optional[Progress] = None,
              cancel: Optional[threading.Event] = None) -> int:
        """Fetches a file, or its first ``limit`` bytes; says how many there are."""
        with self._moving(progress, cancel) as meter:
            download = Download(self, meter, True, False, 'none')
            return download.fetch(to_bytes(source), os.fspath(target), limit)

    @contextlib.contextmanager
    def _moving(self, progress: Optional[Progress], cancel: Optional[threading.Event]) -> Iterator[Meter]:
        meter = Meter(progress, cancel)
        self.cancel = cancel
        try:
            meter.add(0)
            yield meter
            meter.tell()
        except BaseException:
            self.disconnect()          # replies may still be under way
            raise
        finally:
            self.cancel = None

    def twin(self) -> 'ChirpClient':
        """A client of the same server, not yet connected."""
        return ChirpClient(self.address, self.port, self.timeout, self.ticket)

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


class Failures:
    """What of a folder could not be moved."""

    def __init__(self) -> None:
        self._some: List[Tuple[str, str]] = []
        self._count = 0

    def add(self, path: Path, error: Any) -> None:
        self._count += 1
        if len(self._some) < FAILURES:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            self._some.append((shown(path if isinstance(path, bytes) else to_remote(path)), str(reason)))

    def clear(self) -> None:
        self.__init__()        # type: ignore

    def check(self) -> None:
        """Raises Incomplete."""
        if self._count:
            raise Incomplete(self._some, self._count)


class Claims:
    """What this process is putting, and where: the server can't tell two that write one partial file.

    Safe from any thread.
    """

    def __init__(self) -> None:
        # Guards the list; nothing is called while it is held.
        self._lock = threading.Lock()
        self._held: List[Tuple[str, int, bytes]] = []

    @contextlib.contextmanager
    def holding(self, client: Requests, target: bytes) -> Iterator[None]:
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


class Upload:
    """One ``put``."""

    def __init__(self, client: ChirpClient, meter: Meter, verify: bool, keep: bool) -> None:
        self._client = client
        self._meter = meter
        self._verify = verify
        self._keep = keep
        self._failures = Failures()
        self._lanes: List[SmallFiles] = []
        self._small = 0                # small files sent
        self._part_mode = 0            # of the large file that is under way
        self._streams = True           # whether ``putstream`` is worth a try

    def run(self, source: str, target: bytes) -> None:
        found = os.stat(source)
        if stat.S_ISDIR(found.st_mode):
            self._meter.total = tree_size(source)
            with CLAIMS.holding(self._client, target):
                try:
                    self._client.persist(self._meter, lambda: self._put_tree(source, target))
                finally:
                    self._close_lanes()
            self._failures.check()
        else:
            self._meter.total = found.st_size
            self._put_file(source, target)

    # One file.

    def _put_file(self, source: str, target: bytes) -> None:
        """Under a temporary name, which becomes its own at the end."""
        base = self._meter.moved
        tries = 0
        while True:
            try:
                with CLAIMS.holding(self._client, target):
                    return self._client.persist(self._meter, lambda: self._send_file(source, target, base))
            except (Changed, Shrunk):
                self._client.disconnect()
                tries += 1
                if tries > RETRIES:
                    raise Changed('%s changes while it is read' % source)

    def _send_file(self, source: str, target: bytes, base: int) -> None:
        with open_regular(source) as file:
            found = os.fstat(file.fileno())
            self._meter.moved = base
            if self._is_there(source, found, target):
                return self._meter.add(found.st_size)
            part = part_path(target)
            self._renaming(part, target)
            start, checksum = self._resume(source, found, part)
            self._meter.add(start)
            whole = self._streams and not start and found.st_size >= LARGE and checksum.name == COMMON
            with self._client.moving_content():
                if not (whole and self._stream(file, found, part, checksum if self._verify else None)):
                    self._send_rest(file, found, part, start, checksum)
            if changed(found, os.fstat(file.fileno())):
                raise Changed('%s changed while it was read' % source)
        if self._verify and not self._client.has_same(part, checksum, found.st_size):
            self._client.unlink(part)
            raise Changed('%s arrived altered' % source)
        self._settle(part, target, found)

    def _is_there(self, source: str, found: os.stat_result, target: bytes) -> bool:
        """Whether an earlier attempt got to the end. Raises Refused where a folder is in the way."""
        try:
            there = self._client.stat(target)
        except Refused as refused:
            if refused.code == DOESNT_EXIST:
                return False
            raise
        if there.is_dir:
            raise Refused(IS_DIR, shown(target))
        return self._is_same(source, found, target, there)

    def _is_same(self, source: str, found: os.stat_result, target: bytes, there: Union[Stat, Entry]) -> bool:
        """Whether nothing needs to be sent; where only the mode differs, it is set."""
        if there.size != found.st_size or there.mtime != int(found.st_mtime) or not self._keep:
            return False
        if self._verify and not self._client.has_same(
                target, hash_local(source, there.size, self._client.algorithm(there.size)), there.size):
            return False
        self._keep_mode(found, target, there.mode)
        return True

    def _keep_mode(self, found: os.stat_result, target: bytes, mode: int) -> None:
        """Sets the mode of a file; ``mode``: what it is. The owner may always read and write."""
        if mode & 0o777 != found.st_mode & 0o777 | 0o600:
            self._client.chmod(target, found.st_mode & 0o777)

    def _resume(self, source: str, found: os.stat_result, part: bytes) -> Tuple[int, Any]:
        """How much of the file is there already, and the checksum of that much."""
        algorithm = self._client.algorithm(found.st_size)
        try:
            there = self._client.lstat(part)
        except Refused as refused:
            if refused.code == DOESNT_EXIST:
                return 0, new_hash(algorithm)
            raise
        if there.is_link or there.is_dir:
            self._client.rmall(part)
        elif there.is_file and 0 < there.size <= found.st_size:
            checksum = hash_local(source, there.size, algorithm)
            if self._client.has_same(part, checksum, there.size):
                return there.size, checksum
        return 0, new_hash(algorithm)

    def _stream(self, file: Any, found: os.stat_result, part: bytes, checksum: Any) -> bool:
        """Sends a whole file by one request, as the real server spends a millisecond on each; says whether
        it agreed. That server keeps what arrives, answers nothing, and ends the connection. Where it doesn't
        work, it isn't tried again: the rest goes by ``pwrite``, which tells what is wrong."""
        self._streams = False
        number_, _ = self._client.open(part, 'wct', found.st_mode & 0o777)
        self._client.close(number_)
        try:
            self._client.call('putstream', quote(part), again=False)
        except Refused:
            return False
        self._pass_on(file, found.st_size, checksum)
        there = self._client.lstat(part)
        if there.size < found.st_size:
            raise Disconnected('the server took in a part of the file')
        self._part_mode = there.mode & 0o777
        self._streams = True
        return True

    def _pass_on(self, file: Any, size: int, checksum: Any) -> None:
        wire, buffer = self._client.connect(), new_buffer()
        file.seek(0)
        for start in range(0, size, PIECE):
            count = min(PIECE, size - start)
            send_passing(wire, file, count, buffer, checksum)
            self._meter.add(count)
        wire.end()
        self._client.disconnect()

    def _send_rest(self, file: Any, found: os.stat_result, part: bytes, start: int, checksum: Any) -> None:
        """Writes what is missing; the checksum becomes that of the whole."""
        number_, there = self._client.open(part, 'wc' if start else 'wct', found.st_mode & 0o777)
        self._part_mode = there.mode & 0o777
        if self._verify and not start:
            self._client.hash(part, checksum.name)     # a server of ours goes on from here as it writes
        self._send_pieces(file, number_, start, found.st_size, checksum if self._verify else None)
        self._client.close(number_)

    def _send_pieces(self, file: Any, number_: int, start: int, end: int, checksum: Any) -> None:
        file.seek(start)
        buffer = new_buffer()
        wire = self._client.connect()
        sent: List[int] = []
        while start < end or sent:
            if start < end and len(sent) < PIECES:
                count = min(PIECE, end - start)
                wire.put(self._client.ask('pwrite', number_, count, start))
                send_passing(wire, file, count, buffer, checksum)
                sent.append(count)
                start += count
            else:
                count = sent.pop(0)
                if self._client.result(wire, 'write') != count:
                    raise self._client.broken('pwrite: a wrong count')
                self._meter.add(count)

    def _settle(self, part: bytes, target: bytes, found: os.stat_result) -> None:
        """Gives a file its mode, time and name."""
        if self._keep:
            self._keep_mode(found, part, self._part_mode)
            self._client.utime(part, int(found.st_atime), int(found.st_mtime))
        self._client.rename(part, target)

    def _renaming(self, part: bytes, target: bytes) -> bytes:
        """The request that ends it. Raises Refused where the two paths don't fit into one line."""
        return self._client.ask('rename', quote(part), quote(target))

    # A folder.

    def _put_tree(self, source: str, target: bytes) -> None:
        """Into the folder of that name, or, where there is none, into a temporary one."""
        self._failures.clear()
        self._meter.moved = self._small = 0
        self._close_lanes()
        self._lanes = [self._new_lane(self._client)]
        there = self._find(target)
        if there is not None and not there.is_dir:
            raise Refused(NOT_DIR, shown(target))
        folder = target if there is not None else part_path(target)
        if there is None:
            self._renaming(folder, target)
            self._clear_way(folder)
        self._put_folder(source, folder, there is not None, 0)
        if there is None:
            self._client.rename(folder, target)

    def _find(self, path: bytes) -> Optional[Stat]:
        try:
            return self._client.stat(path)
        except Refused as refused:
            if refused.code == DOESNT_EXIST:
                return None
            raise

    def _clear_way(self, part: bytes) -> None:
        """Removes a partial file where a partial folder is to be."""
        with contextlib.suppress(Refused):             # of what isn't there; or mkdir will say what is wrong
            if not self._client.lstat(part).is_dir:
                self._client.unlink(part)

    def _put_folder(self, source: str, target: bytes, merge: bool, depth: int) -> None:
        """``merge``: others may read what is there already, so files must come in place all at once."""
        if depth > NESTED:
            raise OSError(errno.ENAMETOOLONG, 'too deep')
        listing = self._make_folder(target)
        folders: List[os.DirEntry] = []
        with os.scandir(source) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if to_remote(entry.name).endswith(PART):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry)
                    continue
                with self._failing(entry.path):
                    self._put_entry(entry, join(target, to_remote(entry.name)), listing, merge)
        self._finish_files()
        del listing                    # or a server could make us hold one for each level
        for entry in folders:
            with self._failing(entry.path):
                self._put_folder(entry.path, join(target, to_remote(entry.name)), merge, depth + 1)
        if self._keep:
            self._keep_folder(os.stat(source), target)

    @contextlib.contextmanager
    def _failing(self, path: str) -> Iterator[None]:
        """One entry's failure isn't the folder's, unless the others would fail, too."""
        try:
            yield
        except (Refused, Changed, Busy, OSError) as error:
            if isinstance(error, Refused) and error.code in (NO_SPACE, NOT_AUTHENTICATED):
                raise
            self._failures.add(path, error)

    def _make_folder(self, target: bytes) -> Listing:
        """What is in it already."""
        try:
            self._client.mkdir(target, 0o700)
            return Listing(0)
        except Refused as refused:
            if refused.code != EXISTS:
                raise
            return self._client.ls(target)

    def _keep_folder(self, found: os.stat_result, target: bytes) -> None:
        if found.st_mode & 0o777 != 0o700:
            self._client.chmod(target, found.st_mode & 0o777)
        self._client.utime(target, int(found.st_atime), int(found.st_mtime))

    def _put_entry(self, entry: os.DirEntry, target: bytes, listing: Listing, merge: bool) -> None:
        there = listing.find(to_remote(entry.name))
        if entry.is_symlink():
            self._finish_files()
            return self._put_link(os.readlink(entry.path), target, there)
        found = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, 'neither file, folder nor link')
        if there is not None and there.is_file:
            self._finish_files()
            if self._is_same(entry.path, found, target, there):
                return self._meter.add(found.st_size)
        if found.st_size > SMALL:
            self._finish_files()
            return self._put_file(entry.path, target)
        part = listing.find(part_name(to_remote(entry.name)))
        if part is not None and part.is_dir:
            self._finish_files()
            self._client.rmall(part_path(target))
        self._put_small(entry.path, target, merge)

    def _put_link(self, leads: str, target: bytes, there: Optional[Entry]) -> None:
        if there is not None:
            if there.is_link and to_bytes(self._client.readlink(target)) == to_remote(leads):
                return
            self._client.unlink(target)
        self._client.symlink(to_remote(leads), target)

    def _put_small(self, source: str, target: bytes, merge: bool) -> None:
        with open_regular(source) as file:
            found = os.fstat(file.fileno())
            data = file.read(SMALL + 1)
        if len(data) > SMALL:
            self._finish_files()
            return self._put_file(source, target)
        name = part_path(target) if merge else target
        renaming = self._renaming(name, target) if merge else b''
        self._small += 1
        if self._small == MANY:
            self._add_lane()
        lane = self._lanes[self._small % len(self._lanes)]
        lane.put(SmallFile(source, target, name, renaming, found, data))

    def _new_lane(self, client: ChirpClient) -> 'SmallFiles':
        return SmallFiles(client, self._meter, self._failures, self._verify, self._keep)

    def _add_lane(self) -> None:
        """A second connection for small files to the real server, which has a process for each, and spends
        a millisecond or two on every request."""
        self._finish_files()
        if self._client.algorithm() != COMMON:
            return
        client = self._client.twin()
        client.cancel = self._client.cancel
        try:
            client.connect()
        except (Disconnected, AccessDenied) as error:
            log.debug('%s:%d: no second connection: %s', client.address, client.port, error)
        else:
            self._lanes.append(self._new_lane(client))

    def _close_lanes(self) -> None:
        for lane in self._lanes[1:]:
            lane.client.disconnect()
        del self._lanes[1:]

    def _finish_files(self) -> None:
        """Waits until all small files are in place."""
        for lane in self._lanes:
            lane.finish()


class SmallFiles:
    """Small files that go over one connection, the next one's request with the content of the last."""

    def __init__(self, client: ChirpClient, meter: Meter, failures: Failures, verify: bool,
                 keep: bool) -> None:
        self.client = client
        self._meter = meter
        self._failures = failures
        self._verify = verify
        self._keep = keep
        self._pipeline = Pipeline(client)
        self._after: List[Callable[[], None]] = []
        self._keeps_modes: Optional[bool] = None

    def put(self, file: 'SmallFile') -> None:
        """Its content goes once the server has agreed, with what completes the last one."""
        if self._pipeline.is_idle():
            self.client.give_up_ended()
            if self._verify:
                self.client.algorithm()        # so that it is known while something is under way
        agreed: List[Union[int, Refused]] = []
        mode = file.found.st_mode & 0o777
        self._pipeline.add(self.client.ask('putfile', quote(file.name), mode, len(file.data)),
                           lambda wire, result: agreed.append(result))
        self._pipeline.drain()
        if isinstance(agreed[0], Refused):
            self._complete()
            raise Refused(agreed[0].code, shown(file.target))
        wire = self.client.connect()
        wire.put(file.data)
        self._follow(file)
        wire.flush()           # the server works on it while the next file is read here

    def finish(self) -> None:
        """Waits until all are in place."""
        self._pipeline.drain()
        self._complete()
        self._pipeline.drain()

    def _follow(self, file: 'SmallFile') -> None:
        """What comes after the content, without waiting; its name last, once all replies were good."""
        add, ask, name = self._pipeline.add, self.client.ask, quote(file.name)
        add(b'', lambda wire, result: self._arrived(file, result))
        self._complete()
        if self._verify:
            add(ask(*words_of_hash(file.name, self.client.algorithm())),
                lambda wire, result: self._compare(file, wire, result))
        if self._keep:
            if not self._modes_are_kept(file):
                add(ask('chmod', name, file.found.st_mode & 0o777), file.check)
            # The time comes last: by it a later attempt knows what is complete.
            add(ask('utime', name, int(file.found.st_atime), int(file.found.st_mtime)), file.check)
        self._after.append(lambda: self._rename(file))

    def _arrived(self, file: 'SmallFile', result: Union[int, Refused]) -> None:
        file.check(None, result)
        if isinstance(result, Refused):
            if result.code == NO_SPACE:
                raise Refused(NO_SPACE, shown(file.target))
        elif result != len(file.data):
            raise self.client.broken('putfile: a wrong count')
        else:
            self._meter.add(result)

    def _compare(self, file: 'SmallFile', wire: Wire, result: Union[int, Refused]) -> None:
        file.check(wire, result)
        if not isinstance(result, Refused):
            if not self.client.reads_same(wire, result, file.data):
                file.error = Changed('it arrived altered')

    def _modes_are_kept(self, file: 'SmallFile') -> bool:
        """Whether the server gives a file the mode that it came with; the real one has a umask of 077."""
        if not file.found.st_mode & 0o077:
            return True
        if self._keeps_modes is None:
            self._pipeline.drain()
            with contextlib.suppress(Refused):
                mode = self.client.lstat(file.name).mode & 0o777
                self._keeps_modes = mode == file.found.st_mode & 0o777 | 0o600
        return bool(self._keeps_modes)

    def _rename(self, file: 'SmallFile') -> None:
        if file.error is not None:
            self._failures.add(file.source, file.error)
        elif file.renaming:
            self._pipeline.add(file.renaming, lambda wire, result: self._renamed(file, result))

    def _renamed(self, file: 'SmallFile', result: Union[int, Refused]) -> None:
        if isinstance(result, Refused):
            self._failures.add(file.source, result)

    def _complete(self) -> None:
        """Asks for what had to wait for the replies of the file before."""
        after, self._after = self._after, []
        for ask in after:
            ask()


class SmallFile:
    """A small file on its way to the server."""
    __slots__ = ('source', 'target', 'name', 'renaming', 'found', 'data', 'error')

    def __init__(self, source: str, target: bytes, name: bytes, renaming: bytes, found: os.stat_result,
                 data: bytes) -> None:
        self.source = source
        self.target = target
        self.name = name               # by which it is sent
        self.renaming = renaming       # the request that gives it its own, if that is another one
        self.found = found
        self.data = data
        self.error: Optional[ChirpError] = None

    def check(self, wire: Optional[Wire], result: Union[int, Refused]) -> None:
        """Notes a refusal."""
        if isinstance(result, Refused) and self.error is None:
            self.error = result


def check_unchanged(source: bytes, found: Stat, after: Stat) -> None:
    """Raises Changed where a file at the server is another one, or became another, since it was found."""
    if any(getattr(found, what) != getattr(after, what) for what in ('dev', 'ino', 'size', 'mtime')):
        raise Changed('%s changed while it was read' % shown(source))


class Download:
    """One ``get`` or ``fetch``."""

    def __init__(self, client: ChirpClient, meter: Meter, verify: bool, keep: bool, links: str) -> None:
        self._client = client
        self._meter = meter
        self._verify = verify
        self._keep = keep
        self._links = links
        self._held = 0                 # bytes of the listings of the folders that we are in
        self._failures = Failures()
        self._pipeline = Pipeline(client)

    def run(self, source: bytes, target: str) -> None:
        found = self._client.stat(source)
        if found.is_dir:
            self._client.persist(self._meter, lambda: self._get_tree(source, target))
            self._failures.check()
        else:
            self._meter.total = found.size
            self._get_file(source, target, None)

    def fetch(self, source: bytes, target: str, limit: int) -> int:
        """The first bytes of a file."""
        self._get_file(source, target, limit)
        return self._meter.moved

    # One file.

    def _get_file(self, source: bytes, target: str, limit: Optional[int]) -> None:
        check_target(target)
        base = self._meter.moved
        tries = 0
        while True:
            try:
                return self._client.persist(
                    self._meter, lambda: self._receive_file(source, target, base, limit))
            except Changed:
                self._client.disconnect()
                tries += 1
                if tries > RETRIES:
                    raise

    def _receive_file(self, source: bytes, target: str, base: int, limit: Optional[int]) -> None:
        self._meter.moved = base
        number_, found = self._client.open(source, 'r')
        if not found.is_file:
            raise Refused(IS_DIR if found.is_dir else INVALID, shown(source))
        size = found.size if limit is None else min(found.size, limit)
        self._meter.total = max(self._meter.total, base + size)
        if limit is None and self._is_there(source, found, target):
            self._client.close(number_)
            return self._meter.add(size)
        with open_part(target) as file:
            try:
                self._receive_rest(file, number_, source, found, size)
            except Changed:
                let_go(file)
                os.unlink(local_part(target))          # it is a prefix of nothing that is there now
                raise
            if self._keep:
                set_times(file, found.atime, found.mtime)
                set_mode(file, found.mode & 0o777)
            let_go(file)
            os.replace(local_part(target), target)

    def _is_there(self, source: bytes, found: Stat, target: str) -> bool:
        """Whether an earlier attempt got to the end; where only the mode differs, it is set."""
        try:
            here = os.lstat(target)
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(here.st_mode) or here.st_size != found.size:
            return False
        if int(here.st_mtime) != found.mtime or not self._keep:
            return False
        if self._verify and not self._client.has_same(
                source, hash_local(target, found.size, self._client.algorithm(found.size)), found.size):
            return False
        if here.st_mode & 0o777 != found.mode & 0o777 | 0o600:
            with open_regular(target) as file:
                set_mode(file, found.mode & 0o777)
        return True

    def _receive_rest(self, file: Any, number_: int, source: bytes, found: Stat, size: int) -> None:
        """Fetches what is missing of a file, and checks the whole."""
        start = self._resume(file, number_, size)
        checksum: Any = None
        beside: Optional[RemoteHash] = None
        if self._verify and size == found.size:
            checksum = self._begin_checksum(file, start, size)
            if size >= BESIDE and (start or not self._hashes_along(number_, checksum.name)):
                beside = RemoteHash(self._client, source, checksum.name, size)
        try:
            self._meter.add(start)
            whole = not start and LARGE <= size == found.size and self._client.algorithm() == COMMON
            with self._client.moving_content():
                if whole:
                    self._receive_whole(file, source, found, checksum)
                else:
                    self._receive_pieces(file, number_, start, size, checksum)
            after = self._client.stat(source) if whole else self._client.fstat(number_)
            self._client.close(number_)
            if size == found.size:
                check_unchanged(source, found, after)
            if checksum is not None:
                digest = beside.digest() if beside is not None else None
                if not (digest == checksum.digest() if digest
                        else self._client.has_same(source, checksum, size)):
                    raise Changed('%s changed while it was read, or arrived altered' % shown(source))
        finally:
            if beside is not None:
                beside.stop()

    def _hashes_along(self, number_: int, algorithm: str) -> bool:
        """Whether the server computes the checksum while it sends: ours does, once asked."""
        if algorithm == COMMON:
            return False
        self._client.call('hashread', number_, algorithm, again=False)
        return True

    def _resume(self, file: Any, number_: int, size: int) -> int:
        """How much of the file is here already: what is here, if its end is the same there."""
        start = os.fstat(file.fileno()).st_size
        if start > size:
            start = 0
        overlap = min(start, OVERLAP)
        if overlap:
            file.seek(start - overlap)
            if self._client.pread(number_, overlap, start - overlap) != file.read(overlap):
                start = 0
        file.truncate(start)
        return start

    def _receive_whole(self, file: Any, source: bytes, found: Stat, checksum: Any) -> None:
        """By one request, as the real server spends a millisecond on each. Where the file becomes shorter,
        that server sends no more, and doesn't say so."""
        wire = self._client.connect()
        file.seek(0)
        wire.put(self._client.ask('getfile', quote(source)))
        try:
            if self._client.result(wire, 'getfile') != found.size:
                raise Changed('%s changed before it was read' % shown(source))
            self._receive_content(wire, file, found.size, new_buffer(), checksum)
        except TimedOut:
            self._client.disconnect()
            check_unchanged(source, found, self._client.stat(source))
            raise
        file.truncate(found.size)      # where it ends with a hole

    def _receive_pieces(self, file: Any, number_: int, start: int, end: int, checksum: Any) -> None:
        """The checksum, if one is given, becomes that of the whole."""
        wire, buffer = self._client.connect(), new_buffer()
        file.seek(start)
        asked: List[int] = []
        while start < end or asked:
            if start < end and len(asked) < PIECES:
                asked.append(min(PIECE, end - start))
                wire.put(self._client.ask('pread', number_, asked[-1], start))
                start += asked[-1]
            else:
                self._receive_piece(wire, file, asked.pop(0), buffer, checksum)
        file.truncate(end)             # where it ends with a hole

    def _begin_checksum(self, file: Any, start: int, size: int) -> Any:
        """Of what is here already of a file of that size."""
        checksum = new_hash(self._client.algorithm(size))
        hash_part(file, checksum, 0, start)
        return checksum

    def _receive_piece(self, wire: Wire, file: Any, count: int, buffer: memoryview, checksum: Any) -> None:
        got = self._client.result(wire, 'read')
        if got > count:
            raise self._client.broken('pread: %d bytes where %d were asked for' % (got, count))
        if got < count:
            raise Changed('the file became shorter while it was read')
        self._receive_content(wire, file, count, buffer, checksum)

    def _receive_content(self, wire: Wire, file: Any, count: int, buffer: memoryview, checksum: Any) -> None:
        deadline = wire.deadline(count)
        while count:
            got = wire.read_into(buffer[:min(count, BLOCK)], deadline)
            write_here(file, buffer[:got])
            if checksum is not None:
                checksum.update(buffer[:got])
            count -= got
            self._meter.add(got)

    # A folder.

    def _get_tree(self, source: bytes, target: str) -> None:
        """Into the folder of that name, or, where there is none, into a temporary one."""
        self._failures.clear()
        self._meter.moved = self._meter.total = self._held = 0
        self._pipeline = Pipeline(self._client)
        merge = os.path.lexists(target)
        folder = target if merge else local_part(target)
        if os.path.islink(target) and os.path.isdir(target):
            folder = os.path.realpath(target)          # the user's own link, above what we fetch
        found = self._client.stat(source)
        if merge:
            return self._get_folder(source, folder, found.mode, found.mtime, ())
        with locked_folder(folder, target):
            self._get_folder(source, folder, found.mode, found.mtime, ())
            os.rename(folder, target)

    def _get_folder(self, source: bytes, target: str, mode: int, mtime: int, inside: Tuple[str, ...]) -> None:
        if len(inside) > NESTED:
            raise OSError(errno.ENAMETOOLONG, 'too deep')
        make_folder(target)
        folders = self._get_files(source, target, inside)
        self._held += folders.size
        for entry in folders:
            path = join(source, to_bytes(entry.name))
            with self._failing(path):
                self._get_folder(path, os.path.join(target, to_local(entry.name)), entry.mode,
                                 entry.mtime, inside + (entry.name,))
        self._held -= folders.size
        if self._keep:
            os.chmod(target, mode & 0o777 | 0o700)
            with contextlib.suppress(OverflowError):   # a server may say any number
                os.utime(target, (mtime, mtime))

    def _get_files(self, source: bytes, target: str, inside: Tuple[str, ...]) -> Listing:
        """All but the folders in it, which are returned."""
        listing = self._client.ls(source, self._held).without_parts()
        for entry in listing:
            self._meter.total += entry.size if entry.is_file else 0
        for entry in listing:
            if not entry.is_dir:
                with self._failing(join(source, to_bytes(entry.name))):
                    self._get_entry(entry, source, target, inside)
        self._pipeline.drain()
        return listing.folders()

    @contextlib.contextmanager
    def _failing(self, path: bytes) -> Iterator[None]:
        """One entry's failure isn't the folder's, unless the others would fail, too."""
        held = self._held
        try:
            yield
        except (Refused, Changed, Busy, OSError) as error:
            self._held = held
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            self._failures.add(path, error)

    def _get_entry(self, entry: Entry, source: bytes, target: str, inside: Tuple[str, ...]) -> None:
        path, here = join(source, to_bytes(entry.name)), os.path.join(target, to_local(entry.name))
        if entry.is_link:
            self._pipeline.drain()
            return self._get_link(path, here, inside)
        if not entry.is_file:
            raise OSError(errno.EINVAL, 'neither file, folder nor link')
        if entry.size > SMALL or os.path.lexists(here) or os.path.lexists(local_part(here)):
            self._pipeline.drain()
            return self._get_file(path, here, None)
        self._get_small(entry, path, here)

    def _get_link(self, path: bytes, here: str, inside: Tuple[str, ...]) -> None:
        if self._links == 'none':
            return
        leads = self._client.readlink(path)
        if self._links == 'inside' and may_leave(leads, inside):
            raise OSError(errno.EINVAL, 'a link that leads out of the folder, or could, to %s' % shown(leads))
        if os.path.islink(here) and os.readlink(here) == to_local_link(leads):
            return
        if os.path.lexists(here):
            os.unlink(here)            # raises where it is a folder
        os.symlink(to_local_link(leads), here)

    def _get_small(self, entry: Entry, path: bytes, here: str) -> None:
        """Asks for a small file, without waiting for it."""
        fetched = Fetched(entry, path, here)
        if self._verify:
            self._client.algorithm()       # of a connection that may be new; soon something is under way
        add, ask = self._pipeline.add, self._client.ask
        add(ask('getfile', quote(path)), lambda wire, result: self._on_content(fetched, wire, result))
        if self._verify:
            add(ask(*words_of_hash(path, self._client.algorithm())),
                lambda wire, result: self._on_hash(fetched, wire, result))

    def _on_content(self, fetched: 'Fetched', wire: Wire, result: Union[int, Refused]) -> None:
        if isinstance(result, Refused):
            self._failures.add(fetched.path, result)
        elif result > 2 * SMALL:       # of a size that the server made up, or it grew: the next listing tells
            raise Disconnected('%s is larger than it was' % shown(fetched.path))
        else:
            fetched.data = wire.read(result)
            if not self._verify:
                self._write_small(fetched)

    def _on_hash(self, fetched: 'Fetched', wire: Wire, result: Union[int, Refused]) -> None:
        if isinstance(result, Refused):
            if fetched.data is not None:
                self._failures.add(fetched.path, result)
            return
        same = self._client.reads_same(wire, result, fetched.data or b'')
        if fetched.data is not None:
            if same:
                self._write_small(fetched)
            else:
                self._failures.add(fetched.path, Changed('it changed while it was read'))

    def _write_small(self, fetched: 'Fetched') -> None:
        data, entry = fetched.data or b'', fetched.entry
        fetched.data = None
        with self._failing(fetched.path):
            with open_part(fetched.here) as file:
                write_here(file, memoryview(data))
                file.truncate(len(data))
                if self._keep:
                    set_times(file, entry.mtime, entry.mtime)
                    set_mode(file, entry.mode & 0o777)
                let_go(file)
                os.replace(local_part(fetched.here), fetched.here)
            self._meter.add(len(data))


class Fetched:
    """A small file on its way from the server."""
    __slots__ = ('entry', 'path', 'here', 'data')

    def __init__(self, entry: Entry, path: bytes, here: str) -> None:
        self.entry = entry
        self.path = path
        self.here = here
        self.data: Optional[bytes] = None


class RemoteHash:
    """The server's own checksum of a file, asked for on a connection of its own, so that it is
    computed while the file moves. ``digest()``: None where that did not work out."""

    def __init__(self, client: ChirpClient, path: bytes, algorithm: str, size: int) -> None:
        self._client = client.twin()
        self._path = path
        self._algorithm = algorithm
        self._size = size
        self._digest: Optional[bytes] = None
        self._client.cancel = self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name='chirp-hash', daemon=True)
        self._thread.start()

    def digest(self) -> Optional[bytes]:
        """Waits for it."""
        self._thread.join()
        return self._digest

    def stop(self) -> None:
        """It isn't needed any more."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._client:
                self._digest = self._client.hash(self._path, self._algorithm, self._size)
        except ChirpError as error:
            log.debug('checksum of %s: %s', shown(self._path), error)
