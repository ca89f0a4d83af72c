"""What a put and a get share: how far it is, what failed, when to try again, whether two files are the same.

What it is not: a transfer: chirpupload.py and chirpdownload.py are one way each. No threads; an object
belongs to one thread at a time.
"""

import contextlib
import errno
import logging
import os
import threading
import time
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Set, Tuple

import agent
from chirplocal import NESTED, to_remote, unpinned
from chirprequests import SLOWEST_HASH, Connection
from chirpwire import (
    DOESNT_EXIST,
    NO_SPACE,
    NOT_AUTHENTICATED,
    NOT_AUTHORIZED,
    UNKEPT,
    Busy,
    Cancelled,
    Changed,
    Disconnected,
    Incomplete,
    Path,
    ProtocolError,
    Refused,
    Shrunk,
    TimedOut,
    Wire,
    hash_file,
    is_part,
    part_name,
    seconds,
    shown,
    shown_whole,
)

log = logging.getLogger('vmhost.chirp')

# Bytes that one pread or pwrite moves. chirp_server takes in all of a pwrite before it writes it: meanwhile
# the next one fills the socket's buffers, if it is no larger than they are; and it wipes 16 MB for each.
PIECE = 4 * 1024 * 1024
AHEAD = 6 * PIECE              # bytes of preads or pwrites that are under way
WINDOW = 64 * 1024 * 1024      # bytes of which a server of ours is asked for the checksum at once
RETRIES = 2                    # new connections without progress before a transfer fails
FAILURES = 10000               # failures of a folder that are told one by one
LONG_PATHS = 1 << 20           # characters of paths that are told whole, of those: a guest may make up any
KNOWN = 50000                  # names of a folder that are held; of more, each is asked for
PENDING = 1000                 # folders in a folder that wait until its files have been moved
NEITHER = 'neither file, folder nor link'
AT_TARGET = ' (at the target)'  # ends the reason of a failure there
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
FULL = NO_ROOM + (errno.EFBIG, errno.EROFS)

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
        self._told: Optional[Set[str]] = None
        self.count = 0

    def tell_once(self) -> None:
        """From now on, what has been told of isn't told again."""
        self._told = {path for path, _ in self.some}

    def is_told(self, path: Path) -> bool:
        """Whether ``tell_once`` has been called, and this been told before it."""
        return self._told is not None and self._text(path) in self._told

    def _text(self, path: Path) -> str:
        told = path if isinstance(path, bytes) else to_remote(agent.short_path(unpinned(path)))
        return shown_whole(told) if self._room > 0 else shown(told)

    def add(self, path: Path, error: Any) -> None:
        text = self._text(path)
        if self._told is not None and (text in self._told or len(self.some) >= FAILURES):
            return
        self.count += 1
        if len(self.some) < FAILURES:
            reason = error.strerror if isinstance(error, OSError) else getattr(error, 'reason', '')
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


def concerns_all(refused: Refused) -> bool:
    """Whether what else there is of a folder would be refused, too. What can't be written may be the disk of
    one folder in it."""
    return refused.code in (NO_SPACE, NOT_AUTHENTICATED)


def has_no_room(error: Exception) -> bool:
    """Whether a disk, there or here, is full."""
    return isinstance(error, Refused) and error.code == NO_SPACE \
        or isinstance(error, OSError) and error.errno in NO_ROOM


def altered(path: Path) -> Changed:
    return Changed(path, 'it changed while it was read, or arrived altered')


def options(verify: bool, keep: bool, links: str) -> Options:
    if links not in ('keep', 'skip', 'follow'):
        raise ValueError('links is keep, skip or follow, not %s' % links)
    return Options(verify, keep, links)


class Move:
    """What both directions share."""

    def __init__(self, client: Connection, meter: Meter, unkept: Failures, options: Options) -> None:
        self._client = client
        self._meter = meter
        self._unkept = unkept          # see ``ChirpClient``
        self._options = options
        self._failures = Failures()
        self._merges = True            # whether what is at the target already is somebody's
        self._around: List[Tuple[int, int]] = []       # (device, inode) of the folders that we are in

    @contextlib.contextmanager
    def _failing(self, path: Path) -> Iterator[None]:
        """One entry's failure isn't the folder's, unless the others would fail, too."""
        try:
            yield
        except (Refused, Changed, Busy, OSError) as error:
            if isinstance(error, Refused) and concerns_all(error) or has_no_room(error):
                raise
            self._failures.add(path, error)

    @contextlib.contextmanager
    def _failing_apart(self, path: Path, is_apart: Callable[[], bool],
                       begin_afresh: Callable[[], None]) -> Iterator[None]:
        """``_failing`` of a folder. One that has no room, and ``is_apart``, on a disk of its own, isn't the
        others' failure; ``begin_afresh``: forgets what is under way, all of which goes to that folder."""
        with self._failing(path):
            try:
                yield
            except (Refused, OSError) as error:
                if not has_no_room(error):
                    raise
                begin_afresh()
                if not is_apart():
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
        if (here.st_dev, here.st_ino, seconds(here.st_mtime_ns)) == (there.dev, there.ino, there.mtime):
            source, target = [os.path.join(os.path.realpath(way), '') for way in ways(root + '/')]
            if target.startswith(source):
                raise OSError(errno.EINVAL, 'a folder can\'t be copied into itself', shown(path))

    def _check_new(self, device: int, inode: int) -> None:
        """Raises OSError where a link has led back to a folder that we are in, or down too far."""
        if len(self._around) > NESTED:
            raise OSError(errno.ENAMETOOLONG, 'too deep')
        if self._options.links == 'follow' and (device, inode) in self._around:
            raise OSError(errno.ELOOP, 'a link to a folder that it is in')

    @contextlib.contextmanager
    def _inside(self, device: int, inode: int) -> Iterator[None]:
        """Raises as ``_check_new``."""
        self._check_new(device, inode)
        self._around.append((device, inode))
        try:
            yield
        finally:
            self._around.pop()

    def _persist(self, step: Callable[[], Any]) -> Any:
        """Does it; again, with a new connection, where that broke, as long as this leads anywhere."""
        failed = 0
        while True:
            before = self._meter.best
            try:
                return step()
            except Disconnected as error:
                self._client.disconnect()
                failed = 0 if self._meter.best > before else failed + 1
                if isinstance(error, (TimedOut, ProtocolError)) or failed > RETRIES:
                    raise
                log.info('%s:%d: %s; trying again', self._client.address, self._client.port, error)
                self._meter.wait(0.05 * 4 ** failed)

    def _until_it_holds_still(self, path: Path, step: Callable[[], Any]) -> Any:
        """``_persist``; again where a file changed meanwhile, some times. Raises Changed."""
        tries = 0
        while True:
            try:
                return self._persist(step)
            except (Changed, Shrunk) as error:
                self._client.disconnect()
                tries += 1
                if tries > RETRIES:
                    raise Changed(path, error.reason if isinstance(error, Changed) else str(error))

    def _has_same(self, path: bytes, file: Any, size: int) -> bool:
        """Whether the first bytes of the server's file and of an open one here are the same. Both are read
        at the same time. A server that isn't ours has the checksum of a whole file alone."""
        window = WINDOW if self._client.is_ours else size
        for start in range(0, size, window or 1):
            count = min(window, size - start)
            algorithm, request = self._client.asking_for_digest(path, start, count)
            wire = self._client.connect()
            wire.put(request)
            wire.flush()
            digest = hash_file(file, algorithm, start, count, self._meter.look_up)
            try:
                length = self._client.result(wire, 'checksum of %s' % shown(path), count / SLOWEST_HASH)
            except Refused as refused:
                if refused.code in (DOESNT_EXIST, NOT_AUTHORIZED):
                    return False
                raise
            if length != len(digest):
                raise self._client.broken('a checksum of %d bytes' % length)
            if wire.read(length) != digest:
                return False
        return True


def reads_same(wire: Wire, count: int, checksum: Any) -> bool:
    """Whether the digest that follows is that one's; ``count``: the reply to its request."""
    digest = checksum.digest()
    if count != len(digest):
        raise ProtocolError('a checksum of %d bytes' % count)
    return wire.read(count) == digest


def check_whole(name: bytes) -> None:
    """Raises OSError for what isn't whole yet, or never will be: it is no copy of anything."""
    if is_part(name):
        raise OSError(errno.EINVAL, 'a transfer has begun it, and not ended: repeat that, or remove this')


def part_path(path: bytes) -> bytes:
    """Where a file or folder of the server is while it isn't whole."""
    folder, slash, name = path.rstrip(b'/').rpartition(b'/')
    return folder + slash + part_name(name)
