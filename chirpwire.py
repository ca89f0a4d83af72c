"""What both ends of Chirp share: errors, words on the wire, a connected socket, checksums.

What it is not: a request (chirprequests.py), or its answer (chirpserver.py). No threads, no locks: a socket
belongs to one thread at a time.
"""

import contextlib
import errno
import logging
import os
import re
import select
import selectors
import socket
import stat
import threading
import time
import zlib
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple, Union

import agent

try:
    import fcntl
except ImportError:                    # Windows
    fcntl = None               # type: ignore

log = logging.getLogger('vmhost.chirp')

PORT = 9094
LINE = 1023                    # bytes of a line before its LF; the real server hangs up at more
PATH = 1023                    # bytes of a decoded path
RECEIVE = 64 * 1024         # bytes that are taken from a socket at once, beside file content
BLOCK = 512 * 1024             # bytes that pass through memory at once
SMALL = 64 * 1024              # a file up to here is read whole, and goes with its reply
HOLE = 32 * 1024              # zeros that are worth a hole in a file
CHECKED = 4 * 1024 * 1024      # bytes of content whose checksum goes along
TICK = 0.1                     # seconds in which a file may change twice, and have the same time
SLICE = 0.2                    # seconds between looks at whether a wait was cancelled
SLOWEST = 10 * 1024            # bytes per second that a peer must move, beside the timeout

# What two programs of this project say to each other beyond the protocol; docs/protocol.md has it in full.
CRC32 = 'crc32'                # the checksum between ours: half of the time that SHA-1 takes
PREAD_CRC32, PWRITE_CRC32 = 'preadcrc32', 'pwritecrc32'        # of ours, which move content with it
SECRET = 'secret'              # the way of authentication by a secret that both have
CHALLENGE = 32                 # bytes of its challenge, each two digits on the wire

RESERVED = b'.__'              # names that begin so are the server's own; real servers keep their ACLs so
TEMPORARY = b'.__put.'         # what a server of ours is still receiving

OF_SERVERS = (TEMPORARY, b'.__acl', b'.__uuid', b'.__ticket.', b'.__alloc')      # ours, and the real one

MODE_UNKEPT, TIME_UNKEPT = 1, 2        # bits: what a disk didn't keep, though it may have taken it
UNKEPT = {MODE_UNKEPT: 'its mode', TIME_UNKEPT: 'its time', MODE_UNKEPT | TIME_UNKEPT: 'its mode and time'}
KEEPS_NONE = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)     # what disks say that keep none
FINEST = 2                     # seconds, which FAT knows the even ones of

Path = Union[str, bytes]


class ChirpError(Exception):
    """Base of this module's errors."""


class Disconnected(ChirpError):
    """The connection broke, or could not be made."""


class EndOfStream(Disconnected):
    """The peer ended its side in good order."""


class TimedOut(Disconnected):
    """The peer was silent, or slower than SLOWEST, for too long."""


class ProtocolError(Disconnected):
    """The peer broke the rules of the protocol; the connection is given up."""


class AccessDenied(ChirpError):
    """The server accepts none of the ways of authentication that we offer."""


class TurnedAway(AccessDenied):
    """The connection was ended before the server said anything: as to a stranger, and by one that is just
    stopping, or a NAT with nobody behind it."""


class Cancelled(ChirpError):
    """Whoever asked for it changed their mind."""


class Busy(ChirpError):
    """Another transfer to the same target is under way."""

    def __init__(self, target: Path) -> None:
        super().__init__('another transfer to %s is under way' % shown(target))


class Shrunk(Disconnected):
    """A file became shorter after its length was announced, so the connection had to be given up."""


class Changed(ChirpError):
    """A file changed while it was read, so that what arrived is no state that it was ever in. ``reason``: the
    same without its path."""

    def __init__(self, path: Path, reason: str) -> None:
        self.reason = reason
        super().__init__('%s: %s' % (shown(path), reason))


class Incomplete(ChirpError):
    """Some entries of a folder were not moved; all others were. ``failures``: (path, reason) of each, to
    some number; ``count``: how many there are."""

    def __init__(self, failures: List[Tuple[str, str]], count: int) -> None:
        self.failures = failures
        self.count = count
        text = '; '.join('%s: %s' % (shortened(path), reason) for path, reason in failures[:3])
        super().__init__('%d of the entries could not be moved: %s%s' % (
            count, text, '; and %d more' % (count - 3) if count > 3 else ''))


class Refused(ChirpError):
    """The peer answered with an error. ``code`` is the protocol's (negative), ``name`` the one of the errno
    that it had there, where the code doesn't say that, ``reason`` what both say."""

    def __init__(self, code: int, what: str = '', name: str = '') -> None:
        self.code = code if code in MEANINGS else UNKNOWN
        self.what = what
        self.name = name
        self.reason = meaning_of(name) or MEANINGS[self.code]
        super().__init__('%s%s' % (what + ': ' if what else '', self.reason))


    def about(self, what: str) -> 'Refused':
        """The same of something else."""
        return Refused(self.code, what, self.name)


class Unlistable(Refused):
    """A folder whose list can't be told from a shorter one. Nothing of it is known for sure."""

    def __init__(self, path: Path) -> None:
        super().__init__(INVALID, shown(path))
        self.reason = 'a name in it begins with a line feed, or has two in a row: that can\'t be listed'
        self.args = ('%s: %s' % (self.what, self.reason),)


class Special(Refused):
    """A device, FIFO or socket, which no file may replace."""

    def __init__(self, what: str) -> None:
        super().__init__(INVALID, what)
        self.reason = 'neither a file nor a folder'
        self.args = ('%s: %s' % (self.what, self.reason),)

    def about(self, what: str) -> 'Special':
        return Special(what)


NOT_AUTHENTICATED, NOT_AUTHORIZED, DOESNT_EXIST, EXISTS, TOO_BIG, NO_SPACE = -1, -2, -3, -4, -5, -6
INVALID, TOO_MANY_OPEN, BUSY, BAD_FD, IS_DIR, NOT_DIR, NOT_EMPTY = -8, -9, -10, -12, -13, -14, -15
NOT_SUPPORTED = -23
UNKNOWN = -127

# What the codes say, and the errnos that become them. Real clients take -18, -19, -20, -11 and -127
# for a reason to ask again, for up to an hour; so a server of ours says -8 where an errno has no code.
MEANINGS = {
    -1: 'not authenticated', -2: 'not authorized', -3: 'does not exist', -4: 'exists already',
    -5: 'too big', -6: 'no space left', -7: 'out of memory', -8: 'invalid request',
    -9: 'too many open files', -10: 'busy', -11: 'try again', -12: 'bad file number',
    -13: 'is a directory', -14: 'not a directory', -15: 'directory not empty',
    -16: 'on another device', -17: 'offline', -18: 'timed out', -19: 'disconnected',
    -20: 'unreachable', -21: 'no such job', -22: 'is a pipe', -23: 'not supported',
    -24: 'name too long', -127: 'unknown error'}
CODES = {
    errno.EACCES: -2, errno.EPERM: -2, errno.EROFS: -2, errno.ENOENT: -3, errno.EEXIST: -4,
    errno.EFBIG: -5, errno.ENOSPC: -6, errno.EDQUOT: -6, errno.ENOMEM: -7, errno.EINVAL: -8,
    errno.EMFILE: -9, errno.ENFILE: -9, errno.EBUSY: -10, errno.ETXTBSY: -10, errno.EBADF: -12,
    errno.EISDIR: -13, errno.ENOTDIR: -14, errno.ENOTEMPTY: -15, errno.EXDEV: -16,
    errno.ESPIPE: -22, errno.EOPNOTSUPP: -23, errno.ENAMETOOLONG: -24}
# Those whose code means another one: between two of ours their names are said beside it, as of all without.
UNSAID = frozenset((errno.EROFS, errno.EDQUOT, errno.ENFILE, errno.ETXTBSY))


def error_line(error: OSError, named: bool) -> bytes:
    """The reply for an error. ``named``: to a client that takes an errno's name."""
    number = error.errno or 0
    name = errno.errorcode.get(number, '') if named and (number in UNSAID or number not in CODES) else ''
    return ('%d %s' % (CODES.get(number, INVALID), name)).rstrip().encode('ascii') + b'\n'


def meaning_of(name: str) -> str:
    """What an errno of that name says; '' where this system has none."""
    number = getattr(errno, name, None) if name else None
    if number is None:
        return ''
    text = os.strerror(number)
    return text if text[1:2].isupper() or text[1:2] == '/' else text[:1].lower() + text[1:]


def inherited(mode: int) -> int:
    """Of a folder's mode, the bit by which what is made in it has its group: it has that of the folder that
    it is in, as by ``cp``."""
    return mode & stat.S_ISGID if stat.S_ISDIR(mode) else 0


def unkept(found: os.stat_result, mode: Optional[int], mtime: Optional[int]) -> int:
    """What of a mode and a time was not kept of what has that stat, bits of UNKEPT. None: none was given."""
    bits = MODE_UNKEPT if mode is not None and (found.st_mode ^ mode) & 0o777 else 0
    if mtime is not None and abs(found.st_mtime - mtime) > FINEST:
        bits |= TIME_UNKEPT
    return bits


@contextlib.contextmanager
def taking(known: bool = True) -> Iterator[None]:
    """Where a mode or time is set: passes over what a disk says that keeps none, where somebody is going to
    know that."""
    try:
        yield
    except OSError as error:
        if not known or error.errno not in KEEPS_NONE:
            raise


# --- words on the wire -----------------------------------------------------------------------

TO_QUOTE = re.compile(br'[\x00-\x20%\x7f\\<>\'"{|}~]')     # what the real clients quote, and no more
QUOTED = re.compile(br'%([0-9A-Fa-f]{2})')


def to_bytes(path: Path) -> bytes:
    """The bytes of a path of the server."""
    return path if isinstance(path, bytes) else path.encode('utf-8', 'surrogateescape')


def to_text(path: bytes) -> str:
    """The text of a path of the server; ``to_bytes`` gives the same bytes back."""
    return path.decode('utf-8', 'surrogateescape')


def quote(path: Path) -> bytes:
    """A path as a word of a request. Raises Refused if it can't be one."""
    path = to_bytes(path)
    if b'\0' in path or len(path) > PATH:
        raise Refused(INVALID if b'\0' in path else CODES[errno.ENAMETOOLONG], shown(path))
    return TO_QUOTE.sub(lambda match: b'%%%02X' % match.group()[0], path) or b'/'


def unquote(word: bytes) -> bytes:
    """The path that a word of a request stands for; cut at a NUL."""
    if b'%' in word:
        word = QUOTED.sub(lambda match: bytes([int(match.group(1), 16)]), word)
    return word.split(b'\0', 1)[0]


PART = re.compile(br'(\.[0-9a-f]{16}\.vmhost-part|%s[0-9a-f]{16})$' % re.escape(TEMPORARY))


def part_name(name: bytes) -> bytes:
    """Under which name a file or folder is while it isn't whole, beside where it will be. No user's file has
    such a name but by intent."""
    return b'.%s.vmhost-part' % new_hash('sha1', name).hexdigest()[:16].encode('ascii')


def lock_part(fd: int) -> bool:
    """Keeps everybody else, of either end, out of a partial file or folder that is open, until it is closed;
    False where another one has it. On POSIX."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:           # a file system that has none
        log.debug('no lock: %s', error)
    return True


def unlock_part(fd: int) -> None:
    """Closes it; a process that was forked meanwhile has it open still, and locks it no more."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def check_unmounted(fd: int, folder: int) -> None:
    """Raises OSError where what is open is mounted in that folder, which is open, too: what is somebody
    else's isn't ours to empty, whatever it is called."""
    if mount_of(fd) != mount_of(folder):
        raise OSError(errno.EBUSY, 'something is mounted there')


def mount_of(fd: int) -> int:
    """What tells one mount from another one; where only Linux' kernel knows it, its device."""
    with contextlib.suppress(OSError), open('/proc/self/fdinfo/%d' % fd) as lines:
        for line in lines:
            if line.startswith('mnt_id:'):
                return int(line[len('mnt_id:'):])
    return os.fstat(fd).st_dev


def is_trusted(found: os.stat_result, folder: os.stat_result) -> bool:
    """Whether what is there already, where a partial file or folder is to be, is this user's: another one
    could have made it, in a folder that all may write to, such as /tmp, to read what comes into it, and to
    change that. Who has the folder, or the machine, can do so anyway; some disks have one owner for all."""
    return not hasattr(os, 'geteuid') or found.st_uid in (os.geteuid(), 0, folder.st_uid)


def keep_attributes(part: Union[int, Path], old: Path) -> None:
    """Gives a file, open or by its path, the access list and the user's attributes of the one that it
    replaces: without the list the group would have what its mask says, which is what the mode shows.
    Of Linux. Raises OSError where the list can't be had, or set."""
    if not hasattr(os, 'listxattr'):
        return
    follow, there = isinstance(part, int), attributes(old)
    if ACL in there:
        os.setxattr(part, ACL, os.getxattr(old, ACL, follow_symlinks=False), follow_symlinks=follow)
    elif ACL in attributes(part):      # of the folder's default
        os.removexattr(part, ACL, follow_symlinks=follow)
    for name in there:
        if name.startswith('user.'):
            with contextlib.suppress(OSError):         # of a file that we may not read
                os.setxattr(part, name, os.getxattr(old, name, follow_symlinks=False), follow_symlinks=follow)


def attributes(path: Union[int, Path]) -> List[str]:
    """The extended attributes of a file, not of what a link leads to; none where its disk has none."""
    try:
        return os.listxattr(path, follow_symlinks=isinstance(path, int))
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS):
            raise
        return []


ACL = 'system.posix_acl_access'


def is_part(name: bytes) -> bool:
    """Whether what is called so isn't whole: a transfer's, or what a server of ours is still receiving."""
    return PART.match(name) is not None


def secret_answer(secret: bytes, id: str, challenge: bytes) -> bytes:
    """What proves that one knows the secret of that guest; ``challenge``: its digits, as they were sent."""
    import hmac
    return hmac.new(secret, b'chirp\n' + id.encode('ascii') + b'\n' + challenge,
                    'sha256').hexdigest().encode('ascii')


def shown(path: Path) -> str:
    """A path for a message: one line, not endless."""
    return shortened(shown_whole(path))


def shown_whole(path: Path) -> str:
    """A path on one line, for a program."""
    text = to_bytes(path).decode('utf-8', 'backslashreplace')
    return ''.join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def shortened(text: str) -> str:
    return text if len(text) <= 300 else text[:140] + '…' + text[-140:]


class Stat(NamedTuple):
    """What a stat line says: integers, times in seconds. ``name``: in a listing, the entry's."""
    name: str
    dev: int
    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blksize: int
    blocks: int
    atime: int
    mtime: int
    ctime: int

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)


def stat_line(found: os.stat_result) -> bytes:
    """A stat result for the wire."""
    return b'%d %d %d %d %d %d %d %d %d %d %d %d %d\n' % (
        found.st_dev, found.st_ino, found.st_mode, found.st_nlink, found.st_uid, found.st_gid,
        found.st_rdev, found.st_size, 4096, found.st_blocks, seconds(found.st_atime_ns),
        seconds(found.st_mtime_ns), seconds(found.st_ctime_ns))


def seconds(nanoseconds: int) -> int:
    """The second that a time is in: as a float, the last moment of one is the next one."""
    return nanoseconds // 10 ** 9


STAT_LINE = re.compile(br'-?[0-9]{1,20}(?: -?[0-9]{1,20}){12} *$')


def parse_stat(line: bytes, name: str = '') -> Stat:
    """Raises ProtocolError."""
    if not STAT_LINE.match(line):
        raise ProtocolError('not a stat line: %.80r' % line)
    numbers = list(map(int, line.split()))
    found = Stat(name, *numbers)
    if found.size < 0 or max(numbers) >= 1 << 64:
        raise ProtocolError('a stat line out of range: %.300r' % line)
    return found


def no_sendfile(*_: Any) -> int:
    """What Windows has of it."""
    raise OSError(errno.ENOSYS, 'no sendfile')


SENDFILE = getattr(os, 'sendfile', no_sendfile)


class Wire:
    """A connected socket, with a buffer for each way. What was ``put`` leaves at the latest before the
    next wait for the peer, so requests, or replies, that belong together share a packet.

    ``timeout``: seconds of silence that are allowed. SLOWEST bounds how long a number of bytes may take, and
    ``until``, a monotonic time, everything. Raises Disconnected, TimedOut, ProtocolError, and Cancelled once
    the event ``cancel`` is set.
    """

    OUT = 64 * 1024            # bytes that are held back at most

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self._sock = sock
        self.timeout = timeout
        self.cancel: Optional[threading.Event] = None
        self.until: Optional[float] = None
        self._data = bytearray()
        self._at = 0           # up to where the data has been taken
        self._out: List[bytes] = []
        self._out_size = 0
        # TLS has no descriptor that the kernel could send a file to.
        self._sendfile = no_sendfile if hasattr(sock, 'context') else SENDFILE
        sock.settimeout(SLICE)
        with contextlib.suppress(OSError):     # a socket pair has no such option
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        """Ends the connection. For the thread that uses it."""
        self._sock.close()

    def has_ended(self) -> bool:
        """Whether the end arrived, or what nobody asked for."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._sock, selectors.EVENT_READ)
            return bool(selector.select(0))

    def interrupt(self) -> None:
        """Ends the connection for whoever waits on it, who closes it then. Safe from any thread."""
        with contextlib.suppress(OSError):     # a TLS socket's own shutdown is for its thread alone
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    # Receiving.

    def line(self, limit: int = LINE) -> bytes:
        """The next line, without its LF and any CR."""
        return self.raw_line(limit).replace(b'\r', b'')

    def raw_line(self, limit: int = LINE) -> bytes:
        """The next line, without its LF."""
        end = self._data.find(b'\n', self._at)
        if end < 0:
            end = self._wait_for_line(limit)
        if end - self._at > limit:
            raise ProtocolError('a line of more than %d bytes' % limit)
        line = bytes(self._data[self._at:end])
        self._at = end + 1
        return line

    def read(self, count: int) -> bytes:
        """Exactly so many bytes; for small counts."""
        deadline = self.deadline(count)
        while len(self._data) - self._at < count:
            self._receive_more(deadline)
        data = bytes(self._data[self._at:self._at + count])
        self._at += count
        return data

    def read_into(self, view: memoryview, deadline: Optional[float] = None) -> int:
        """Fills some of the view, at least a byte; says how many. With a little, what follows it is received,
        too: who sent the next request along with a small file gets both replies at once."""
        if self._at == len(self._data) and len(view) < RECEIVE:
            self._receive_more(deadline or self.deadline(0))
        have = len(self._data) - self._at
        if have:
            count = min(have, len(view))
            view[:count] = self._data[self._at:self._at + count]
            self._at += count
            return count
        self.flush()
        return self._receive(self._sock.recv_into, view, deadline or self.deadline(0))

    def fill(self, view: memoryview, deadline: float) -> None:
        """Fills all of the view."""
        at = 0
        while at < len(view):
            at += self.read_into(view[at:], deadline)

    def skip(self, count: int) -> None:
        """Reads so many bytes, and forgets them."""
        view = memoryview(bytearray(min(count, BLOCK)))
        deadline = self.deadline(count)
        while count > 0:
            count -= self.read_into(view[:min(count, BLOCK)], deadline)

    def deadline(self, count: int) -> float:
        """Until when so many bytes must have moved."""
        deadline = time.monotonic() + self.timeout + count / SLOWEST
        return deadline if self.until is None else min(deadline, self.until)

    def _wait_for_line(self, limit: int) -> int:
        deadline = self.deadline(0)
        searched = self._at
        while True:
            have = len(self._data) - self._at
            if have > limit:
                raise ProtocolError('a line of more than %d bytes' % limit)
            self._receive_more(deadline)
            searched = self._at + have
            end = self._data.find(b'\n', searched)
            if end >= 0:
                return end

    def _receive_more(self, deadline: float) -> None:
        self.flush()
        if self._at:
            del self._data[:self._at]
            self._at = 0
        self._data += self._receive(self._sock.recv, RECEIVE, deadline)

    def _receive(self, how: Callable[[Any], Any], what: Any, deadline: float) -> Any:
        """What ``recv`` or ``recv_into`` returns once something has come."""
        silence = self.deadline(0)
        while True:
            try:
                got = how(what)
            except socket.timeout:
                self._look_up(silence, deadline)
                continue
            except OSError as error:
                raise Disconnected('the connection broke: %s' % agent.sentence(error))
            if not got:
                raise EndOfStream('the peer closed the connection')
            self.check_cancelled()
            self._check_pace(deadline)
            return got

    def _look_up(self, silence: float, deadline: float) -> None:
        """While nothing moves: until ``silence`` something must have."""
        self.check_cancelled()
        self._check_pace(deadline)
        if time.monotonic() > silence:
            raise TimedOut('nothing moved for %g seconds' % self.timeout)

    def _check_pace(self, deadline: float) -> None:
        now = time.monotonic()
        if self.until is not None and now > self.until:
            raise TimedOut('it takes longer than it may')
        if now > deadline:
            raise TimedOut('the peer is too slow')

    def check_cancelled(self) -> None:
        """Raises Cancelled."""
        if self.cancel is not None and self.cancel.is_set():
            raise Cancelled('cancelled')

    # Sending.

    def put(self, data: bytes) -> None:
        """Sends it now, or with what follows."""
        self._out.append(data)
        self._out_size += len(data)
        if self._out_size >= self.OUT:
            self.flush()

    def flush(self) -> None:
        """Sends what was put."""
        if self._out:
            data = self._out[0] if len(self._out) == 1 else b''.join(self._out)
            self._out.clear()
            self._out_size = 0
            self.send(data)

    def send(self, data: Any) -> None:
        """Sends it at once; what was put must be out."""
        view = memoryview(data)
        deadline = self.deadline(len(view))
        silence = self.deadline(0)
        while view:
            try:
                view = view[self._sock.send(view):]
            except socket.timeout:
                self._look_up(silence, deadline)
            except OSError as error:
                raise Disconnected('the connection broke: %s' % agent.sentence(error))
            else:
                if not view:
                    return
                silence = self.deadline(0)
                self._check_pace(deadline)

    def send_file(self, fd: int, offset: int, count: int) -> None:
        """Sends a part of a regular file. If the file has become shorter the connection is broken: the
        count has been announced."""
        self.flush()
        deadline = self.deadline(count)
        end = offset + count
        try:
            while offset < end:
                offset += self._send_some(fd, offset, end - offset, deadline)
                self._check_pace(deadline)
        except (Disconnected, Cancelled):
            raise
        except OSError as error:
            raise Disconnected('the file can\'t be sent: %s' % agent.sentence(error))

    def send_copy(self, file: Any, count: int, buffer: memoryview, checksum: Any = None) -> None:
        """Sends the next bytes of an unbuffered file by way of memory, and adds them to a checksum.

        A client does so, not by sendfile: that hands on pages that nobody has touched lately, and on one
        machine the receiver, who has more to do, waits for the memory then (chirp_server: a fifth slower).
        """
        self.flush()
        while count:
            got = file.readinto(buffer[:min(count, len(buffer))])
            if not got:
                raise Shrunk('it became shorter while it was sent')
            self.send(buffer[:got])
            if checksum is not None:
                checksum.update(buffer[:got])
            count -= got

    def _send_some(self, fd: int, offset: int, count: int, deadline: float) -> int:
        try:
            sent = self._sendfile(self._sock.fileno(), fd, offset, count)
        except (BlockingIOError, InterruptedError):
            self._wait_to_send(deadline)
            return 0
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            sent = self._send_through_memory(fd, offset, count)
        if not sent:
            raise Shrunk('it became shorter while it was sent')
        return sent

    def _send_through_memory(self, fd: int, offset: int, count: int) -> int:
        """Where the system, the file system or the connection knows no sendfile."""
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, min(count, BLOCK))
        self.send(data)
        return len(data)

    def _wait_to_send(self, deadline: float) -> None:
        silence = self.deadline(0)
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        while not poll.poll(SLICE * 1000):
            self._look_up(silence, deadline)


# --- checksums -------------------------------------------------------------------------------

class Crc32:
    """zlib's CRC-32, as hashlib has its checksums."""

    digest_size = 4

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self.digest_size, 'big')


def new_hash(algorithm: str, data: bytes = b'') -> Any:
    """``crc32``, or one of hashlib's. That is imported by need alone: a guest that waits does without the
    megabytes of OpenSSL."""
    if algorithm == CRC32:
        checksum: Any = Crc32()
    else:
        import hashlib
        checksum = hashlib.new(algorithm)
    checksum.update(data)
    return checksum


def hash_file(file: Any, algorithm: str, start: int, count: int, look_up: Callable[[], None],
              buffer: Optional[memoryview] = None) -> bytes:
    """The digest of a part of an unbuffered file, as far as it goes. ``look_up`` is called now and then;
    ``buffer``: what the content passes through, where there is one already."""
    checksum, buffer = new_hash(algorithm), buffer or new_buffer()
    file.seek(start)
    while count > 0:
        got = file.readinto(buffer[:min(len(buffer), count)])
        if not got:
            break
        checksum.update(buffer[:got])
        count -= got
        look_up()
    return checksum.digest()


def may_have_changed(before: os.stat_result, seen: float, after: os.stat_result) -> bool:
    """Whether a file may have changed between two looks at it; ``seen``: when the first one was, by the
    clock. A change right after another one may leave no trace: file systems' clocks tick slowly."""
    return seen < before.st_mtime + TICK or any(
        getattr(before, name) != getattr(after, name) for name in ('st_size', 'st_mtime_ns', 'st_ctime_ns'))


def new_buffer() -> memoryview:
    """What content passes through on its way."""
    return memoryview(bytearray(BLOCK))


ZEROS = bytes(BLOCK)


def is_zero(view: memoryview) -> bool:
    """Whether these are zeros, and enough of them for a hole in a file to be worth it."""
    count = len(view)
    return (count >= HOLE and not (view[0] or view[count // 2] or view[-1])
            and view.tobytes() == (ZEROS if count == BLOCK else bytes(count)))


# --- the server: a folder that nothing leads out of ------------------------------------------
