"""Files over Chirp, the protocol of cctools: a client, a server, and a wrapper round its chirp_server.

What it is not: a file system, a cache, or a server for the public: it serves one folder to the
addresses it was told of, and its rights are those of the one ACL it was given.

Threads: the client has none of its own, except, while a large file is verified that goes on after a cut, or
comes from a server that isn't ours, one that asks for its checksum (``chirp-hash``). A client object
belongs to one thread at a time. The server has one that accepts (``chirp``) and one per
connection (``chirp-N``); ``start``, ``stop``, ``allow`` and ``address`` may be called from any.

Paths of the server are text (or bytes), ``/`` between the names; bytes that are not UTF-8 are kept
as surrogate escapes.
"""

import argparse
import bisect
import collections
import contextlib
import errno
import fnmatch
import itertools
import logging
import os
import posixpath
import re
import selectors
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
    Union,
)

from chirpticket import CHALLENGE, HOST_SUBJECT, SIGNATURE, PublicKey, Ticket
from chirpwire import (
    BAD_FD,
    BLOCK,
    CODES,
    COMMON,
    CRC32,
    DOESNT_EXIST,
    EXISTS,
    GMAC,
    INVALID,
    IS_DIR,
    LINE,
    MEANINGS,
    NO_SPACE,
    NOT_AUTHENTICATED,
    NOT_AUTHORIZED,
    NOT_DIR,
    PATH,
    PORT,
    RESERVED,
    SLOWEST,
    SMALL,
    STAT_LINE,
    TO_QUOTE,
    TOO_MANY_OPEN,
    AccessDenied,
    Busy,
    Cancelled,
    Changed,
    ChirpError,
    Disconnected,
    EndOfStream,
    Incomplete,
    Path,
    ProtocolError,
    Refused,
    Shrunk,
    Stat,
    TimedOut,
    Wire,
    computes,
    is_zero,
    new_buffer,
    new_hash,
    parse_stat,
    quote,
    shown,
    stat_line,
    to_bytes,
    to_text,
    unquote,
)

try:
    import fcntl
except ImportError:                    # Windows
    fcntl = None               # type: ignore

log = logging.getLogger('vmhost.chirp')
PIECE = 4 * 1024 * 1024        # bytes that one pread or pwrite of the client moves
SLOWEST_HASH = 2 * 1024 * 1024         # and of which it must compute a checksum
TEMPORARY = b'.__put.'         # files that are still being received
LINKS = 40                     # symbolic links that one path may lead through
DEEPEST = 200                  # levels that rmall goes down


class Root:
    """A folder as the peers see it. Every path is resolved name by name, from descriptor to descriptor,
    without the kernel following a link; links are resolved here, within the folder. So no ``..``, no
    link and no race leads out, whoever made it. Raises OSError. Any thread may use it."""

    def __init__(self, path: str) -> None:
        if os.open not in os.supports_dir_fd:
            raise ChirpError('this system can\'t open files relative to a folder: it can\'t serve')
        self.path = os.path.realpath(path)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        self._closed = False

    def close(self) -> None:
        """Closes its descriptor. A second call does nothing: the number may be another file's by then."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)

    @contextlib.contextmanager
    def parent(self, path: bytes, follow: bool = True) -> Iterator[Tuple[int, bytes]]:
        """The descriptor of the folder that a path's last name is in, and that name ('.': the root).
        With ``follow`` the name isn't a link, or wasn't a moment ago: use it without following."""
        fd, name = self._walk(split_path(path), follow)
        try:
            yield fd, name
        finally:
            self._leave(fd)

    def free_bytes(self) -> int:
        return free_bytes(self._fd)

    def stat(self, path: bytes, follow: bool = True) -> os.stat_result:
        with self.parent(path, follow) as (fd, name):
            return os.stat(name, dir_fd=fd, follow_symlinks=False)

    def open(self, path: bytes, flags: int = os.O_RDONLY, mode: int = 0o600) -> int:
        """A descriptor of a regular file or, to read, of a folder."""
        with self.parent(path) as (fd, name):
            return open_in(fd, name, flags, mode)

    def list(self, path: bytes) -> Iterator[Tuple[bytes, os.stat_result]]:
        """What is in a folder, ``.`` and ``..`` too; not what can't be said in a line."""
        fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield b'.', os.fstat(fd)
            yield b'..', os.fstat(fd)
            for name in map(os.fsencode, os.listdir(fd)):
                if b'\n' in name or name.startswith(RESERVED):
                    continue
                try:
                    yield name, os.stat(name, dir_fd=fd, follow_symlinks=False)
                except OSError:                # it has gone, or may not be looked at
                    continue
        finally:
            os.close(fd)

    def _walk(self, names: List[bytes], follow: bool) -> Tuple[int, bytes]:
        here, done, links = self._fd, [], 0    # type: int, List[bytes], int
        try:
            while names:
                name = names.pop(0)
                if name == b'..':              # in a link; what is done holds no links
                    names[:0] = done[:-1]
                    here, done = self._leave(here), []
                    continue
                target = None
                if names:
                    there, target = self._step(here, name)
                    if target is None:
                        self._leave(here)
                        here = there
                        done.append(name)
                        continue
                elif follow:
                    target = link_target(here, name)
                if target is None:
                    return here, name
                links += 1
                if links > LINKS:
                    raise OSError(errno.EINVAL, 'too many links')
                names[:0] = link_names(target)
                if target.startswith(b'/'):
                    here, done = self._leave(here), []
            return here, b'.'
        except BaseException:
            self._leave(here)
            raise

    def _step(self, here: int, name: bytes) -> Tuple[int, Optional[bytes]]:
        """The descriptor of a folder in a folder, or where the link of that name leads."""
        try:
            return os.open(name, WALK, dir_fd=here), None
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP, errno.EMLINK):
                raise
            target = link_target(here, name)
            if target is None:
                raise NotADirectoryError(errno.ENOTDIR, 'not a directory')
            return -1, target

    def _leave(self, fd: int) -> int:
        """Closes a descriptor of the walk; the root's, which stays."""
        if fd != self._fd:
            os.close(fd)
        return self._fd


# Flags that a walk opens folders with: without O_PATH a folder that may be entered but not read is shut.
WALK = (getattr(os, 'O_PATH', 0) | getattr(os, 'O_DIRECTORY', 0) | getattr(os, 'O_NOFOLLOW', 0)
        | getattr(os, 'O_CLOEXEC', 0))


def split_path(path: bytes) -> List[bytes]:
    """The names of a path of a request, which can't climb over the root. Raises OSError for ours."""
    if len(path) > PATH:
        raise OSError(errno.ENAMETOOLONG, 'path too long')
    names = []                 # type: List[bytes]
    for name in path.split(b'/'):
        if name == b'..':
            del names[-1:]
        elif name not in (b'', b'.'):
            names.append(name)
    check_reserved(names)
    return names


def link_names(target: bytes) -> List[bytes]:
    """The names of a link's target; ``..`` stay, since what precedes may be a link, too."""
    names = [name for name in target.split(b'/') if name not in (b'', b'.')]
    check_reserved(names)
    return names


def check_reserved(names: Sequence[bytes]) -> None:
    """Raises PermissionError for a name that is the server's own."""
    if any(name.startswith(RESERVED) for name in names):
        raise PermissionError(errno.EACCES, 'a name of the server\'s own')


def link_target(fd: int, name: bytes) -> Optional[bytes]:
    """Where a link leads; None where it is none, or nothing."""
    try:
        return os.readlink(name, dir_fd=fd)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return None
        raise


def open_in(fd: int, name: bytes, flags: int, mode: int = 0o600) -> int:
    """Opens a regular file or, to read, a folder; never waits, as a pipe would have it."""
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        opened = os.open(name, flags, mode, dir_fd=fd)
    except OSError as error:
        if error.errno == errno.ELOOP:         # it became a link since it was looked at
            raise OSError(errno.EINVAL, 'a link')
        raise
    found = os.fstat(opened)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        os.close(opened)
        raise OSError(errno.EINVAL, 'neither file nor folder')
    return opened


def remove_tree(fd: int, name: bytes, depth: int = 0) -> None:
    """Removes a file, or a folder and all in it, the server's own files too; follows no link."""
    try:
        os.unlink(name, dir_fd=fd)
        return
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
        if not stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
            raise
    if depth >= DEEPEST:
        raise OSError(errno.EMFILE, 'too deep')
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
    try:
        for entry in os.listdir(inner):
            remove_tree(inner, os.fsencode(entry), depth + 1)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=fd)


def remove_folder(fd: int, name: bytes) -> None:
    """rmdir; a folder that holds nothing but the server's own files is empty."""
    try:
        os.rmdir(name, dir_fd=fd)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
    try:
        names = [os.fsencode(entry) for entry in os.listdir(inner)]
        if all(entry.startswith(RESERVED) for entry in names):
            for entry in names:
                os.unlink(entry, dir_fd=inner)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=fd)


# --- the server: rights ----------------------------------------------------------------------

RIGHTS = 'rwldpaxv'


class Acl:
    """Who may do what, everywhere in the folder: lines of a subject, in which ``*`` stands for any
    text, and letters of RIGHTS."""

    def __init__(self, lines: Sequence[Tuple[str, str]]) -> None:
        self.lines = [(subject, ''.join(letter for letter in RIGHTS if letter in rights))
                      for subject, rights in lines]

    def rights(self, subject: str) -> str:
        """All that the lines give to a subject."""
        return ''.join(rights for pattern, rights in self.lines
                       if fnmatch.fnmatchcase(subject, pattern.replace('[', '[[]').replace('?', '[?]')))

    def text(self) -> bytes:
        """As getacl says it."""
        return ''.join('%s %s\n' % line for line in self.lines).encode('utf-8')


# --- the server: a connection ----------------------------------------------------------------

AUTHENTICATION_TIME = 10.0     # seconds from the connection to a subject
OPEN_FILES = 128               # of one connection
PREAD = 16 * 1024 * 1024       # bytes that a pread gives at most
PWRITE = PREAD                 # and that a pwrite stores at most


class Fault(Exception):
    """An error reply, with its code."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(MEANINGS[code])


class OpenFile:
    """What a client has open. ``checksum`` goes on while what is written, or read, follows on what was
    hashed."""
    __slots__ = ('fd', 'reads', 'writes', 'checksum', 'hashed', 'before', 'alone', 'node', 'appends')

    def __init__(self, fd: int, reads: bool, writes: bool, appends: bool) -> None:
        self.fd = fd
        self.reads = reads
        self.writes = writes
        self.appends = appends
        self.checksum = None           # type: Any
        self.hashed = 0                # bytes that went into it
        self.before = None             # type: Optional[Tuple[int, ...]]    # its state after the last of it
        self.alone = True              # nobody else could write to it since it was opened
        self.node = (0, 0)             # device and inode, of what is open for writing


def state_of(found: os.stat_result) -> Tuple[int, ...]:
    """What changes whenever a file does; the last of it even where its times are set back."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Checksums:
    """Checksum states of files, so that a file that grows after its checksum was asked for need not be
    read again. A client that asks before it writes has the checksum of what it wrote at once."""

    KEPT = 64

    def __init__(self) -> None:
        # Guards the tables, and ``alone`` of the files; nothing is called while it is held.
        self._lock = threading.Lock()
        self._known = collections.OrderedDict()        # type: collections.OrderedDict
        self._writers = {}             # type: Dict[Tuple[int, int], List[OpenFile]]

    def find(self, found: os.stat_result, algorithm: str = '') -> Any:
        """A copy of the state of a file that hasn't changed since, or None. '': of any algorithm."""
        with self._lock:
            state, checksum = self._known.get((found.st_dev, found.st_ino), (None, None))
        if state != state_of(found):
            return None
        return checksum.copy() if algorithm in ('', checksum.name) else None

    def keep(self, found: os.stat_result, checksum: Any, own: Iterable[OpenFile]) -> None:
        """Remembers the state of a file as a whole, unless another than ``own`` may be writing to it."""
        own = list(own)
        with self._lock:
            if not all(file in own for file in self._writers.get((found.st_dev, found.st_ino), ())):
                return
            self._known[found.st_dev, found.st_ino] = (state_of(found), checksum)
            self._known.move_to_end((found.st_dev, found.st_ino))
            while len(self._known) > self.KEPT:
                self._known.popitem(last=False)

    def opened(self, file: OpenFile, found: os.stat_result) -> None:
        """It can be written to from now on: what another writer counts is no more the file's checksum."""
        with self._lock:
            file.node = found.st_dev, found.st_ino
            writers = self._writers.setdefault(file.node, [])
            writers.append(file)
            if len(writers) > 1:
                for writer in writers:
                    writer.alone = False

    def closed(self, file: OpenFile) -> None:
        with self._lock:
            writers = self._writers.get(file.node, [])
            if file in writers:
                writers.remove(file)
            if not writers:
                self._writers.pop(file.node, None)

    def forget(self, found: os.stat_result) -> None:
        """It is about to change. Its times tell that only where some milliseconds have passed."""
        with self._lock:
            self._known.pop((found.st_dev, found.st_ino), None)

    def disturb(self, found: os.stat_result) -> None:
        """It is about to change beside what its writers write."""
        self.forget(found)
        with self._lock:
            for writer in self._writers.get((found.st_dev, found.st_ino), ()):
                writer.alone = False


class Session:
    """One connection of a client, on a thread of its own."""

    def __init__(self, server: 'ChirpServer', sock: socket.socket, peer: str) -> None:
        self._server = server
        self._root = server.root
        self._wire = Wire(sock, AUTHENTICATION_TIME)
        self.peer = peer
        self._subject = ''
        self._rights = ''
        self._files = {}               # type: Dict[int, OpenFile]
        self._buffer = None            # type: Optional[memoryview]   # once a file passed

    def run(self) -> None:
        """Serves until one side ends it."""
        try:
            if self._authenticate():
                log.debug('%s is %s', self.peer, self._subject)
                self._wire.timeout = self._server.idle_timeout
                self._serve()
        except Disconnected as error:
            log.debug('%s: %s', self.peer, error)
        except Exception:              # one connection's end is not the server's
            log.exception('while serving %s', self.peer)
        finally:
            with contextlib.suppress(Disconnected):
                self._wire.flush()     # what was answered before the end
            self._wire.close()
            for number_ in list(self._files):
                self._close_file(number_)

    def interrupt(self) -> None:
        """Ends the connection, and so ``run``. Safe from any thread."""
        self._wire.interrupt()

    def _authenticate(self) -> bool:
        end = time.monotonic() + AUTHENTICATION_TIME
        while time.monotonic() < end:
            method = self._wire.line()
            if method == b'address' and self._server.auth == 'address':
                self._wire.put(b'yes\nyes\n')
                self._admit('address', self.peer, 'address:' + self.peer)
                return True
            if method == b'ticket' and self._server.auth == 'ticket':
                self._wire.put(b'yes\n')
                if self._check_ticket(end):
                    return True
                continue
            self._wire.put(b'no\n')
        return False

    def _check_ticket(self, end: float) -> bool:
        """Lets the client show tickets until one is good, or it has no more."""
        while time.monotonic() < end:
            digest = self._wire.line()
            if len(digest) != 32:
                break
            key = self._server.ticket
            if key is None or digest != key.digest.encode('ascii'):
                self._wire.put(b'declined\n')
                continue
            challenge = os.urandom(CHALLENGE)
            self._wire.put(b'%d\n' % CHALLENGE + challenge)
            if key.verify(challenge, self._read_signature()):
                self._wire.put(b'success\n')
                self._admit('ticket', key.digest, HOST_SUBJECT)
                return True
            self._wire.put(b'failure\n')
        return False

    def _read_signature(self) -> bytes:
        word = self._wire.line()
        if not NUMBER.match(word) or not 0 < int(word) <= SIGNATURE:
            raise ProtocolError('not a signature')
        return self._wire.read(int(word))

    def _admit(self, method: str, name: str, subject: str) -> None:
        self._wire.put(('yes\n%s\n%s\n' % (method, name)).encode('ascii', 'replace'))
        self._subject = subject
        self._rights = self._server.acl.rights(subject)

    def _serve(self) -> None:
        while True:
            line = self._wire.line()
            if line.startswith(b'\x04'):
                return
            words = line.replace(b'\t', b' ').split()
            if words:
                self._wire.put(self._answer(line, words))

    def _answer(self, line: bytes, words: List[bytes]) -> bytes:
        handler, count, right = COMMANDS.get(words[0], NO_COMMAND)
        try:
            if line[:1] in b' \t' or len(words) <= count:
                raise Fault(INVALID)
            if words[0] in RAW_PATHS:
                words = line.split(None, count)
            if right and not set(right) & set(self._rights):
                raise Fault(NOT_AUTHORIZED)
            return handler(self, *words[1:count + 1])
        except Fault as fault:
            return b'%d\n' % fault.code
        except OSError as error:
            return b'%d\n' % CODES.get(error.errno or 0, INVALID)
        except MemoryError:
            return b'-7\n'

    # Whole files.

    def _getfile(self, path: bytes) -> bytes:
        fd = self._root.open(unquote(path))
        try:
            found = os.fstat(fd)
            if stat.S_ISDIR(found.st_mode):
                raise Fault(IS_DIR)
            if found.st_size <= SMALL:
                data = os.read(fd, found.st_size) if found.st_size else b''
                return b'%d\n' % len(data) + data
            self._wire.put(b'%d\n' % found.st_size)
            self._wire.send_file(fd, 0, found.st_size)
            return b''
        finally:
            os.close(fd)

    def _putfile(self, path: bytes, mode: bytes, length: bytes) -> bytes:
        bits, count = number(mode) & 0o777 | 0o600, number(length)
        if count < 0:
            raise Fault(INVALID)
        with self._replacement(path, bits) as fd:
            if count > free_bytes(fd):
                raise Fault(NO_SPACE)
            self._wire.put(b'0\n')
            self._receive(fd, count, 0)
        return b'%d\n' % count

    @contextlib.contextmanager
    def _replacement(self, path: bytes, mode: int) -> Iterator[int]:
        """A new file to write to, which takes its place under its name if all goes well."""
        with self._root.parent(unquote(path)) as (fd, name):
            self._check_target(fd, name)
            temporary = TEMPORARY + os.urandom(8).hex().encode('ascii')
            file = open_in(fd, temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                yield file
                os.fchmod(file, mode)
                os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=fd)
                raise
            finally:
                os.close(file)

    def _check_target(self, fd: int, name: bytes) -> None:
        """Whether a file of that name may be written, or made."""
        try:
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return self._need('wp')
        self._need('w')
        if stat.S_ISDIR(found.st_mode):
            raise Fault(IS_DIR)
        if not stat.S_ISREG(found.st_mode):
            raise Fault(INVALID)
        if not os.access(name, os.W_OK, dir_fd=fd):
            raise Fault(NOT_AUTHORIZED)

    def _need(self, rights: str) -> None:
        if not set(rights) & set(self._rights):
            raise Fault(NOT_AUTHORIZED)

    @property
    def buffer(self) -> memoryview:
        """What content passes through."""
        if self._buffer is None:
            self._buffer = new_buffer()
        return self._buffer

    def _receive(self, fd: int, count: int, offset: int, checksum: Any = None, holes: bool = True) -> None:
        """Content for a file. All of it is read from the wire, even where it can't be written."""
        deadline = time.monotonic() + self._wire.timeout + count / SLOWEST
        buffer = self.buffer
        while count:
            got = self._wire.read_into(buffer[:min(count, BLOCK)], deadline)
            count -= got
            try:
                write_all(fd, buffer[:got], offset, holes)
            except OSError:
                self._wire.skip(count)
                raise
            if checksum is not None:
                checksum.update(buffer[:got])
            offset += got

    def _getstream(self, path: bytes) -> bytes:
        fd = self._root.open(best_path(self._root, path))
        try:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise Fault(IS_DIR)
            self._wire.put(b'0\n')
            self._wire.send_file(fd, 0, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        raise EndOfStream('the end of a stream')

    def _putstream(self, path: bytes) -> bytes:
        with self._replacement(path, 0o644) as fd:
            self._wire.put(b'0\n')
            self._receive_stream(fd)
        raise EndOfStream('the end of a stream')

    def _receive_stream(self, fd: int) -> None:
        buffer, at = self.buffer, 0
        with contextlib.suppress(EndOfStream):
            while True:
                got = self._wire.read_into(buffer)
                write_all(fd, buffer[:got], at)
                at += got

    # Open files.

    def _open(self, path: bytes, flags: bytes, mode: bytes) -> bytes:
        reads, writes = b'r' in flags, b'w' in flags or b'a' in flags
        how = os.O_RDWR if reads and writes else os.O_WRONLY if writes else os.O_RDONLY
        for letter, flag in ((b'c', os.O_CREAT), (b't', os.O_TRUNC), (b'x', os.O_EXCL),
                             (b'a', os.O_APPEND), (b's', os.O_SYNC)):
            if letter in flags:
                how |= flag
        number_ = self._free_number()
        with self._root.parent(unquote(path)) as (fd, name):
            if writes:
                self._check_target(fd, name)
            else:
                self._need('rl')
                how &= ~(os.O_CREAT | os.O_TRUNC | os.O_EXCL)
            opened = open_in(fd, name, how, number(mode) & 0o777 | 0o600)
        file = self._files[number_] = OpenFile(opened, reads or not writes, writes, b'a' in flags)
        found = os.fstat(opened)
        if writes:
            self._server.checksums.opened(file, found)
        else:
            try:
                self._need('l' if stat.S_ISDIR(found.st_mode) else 'r')
            except Fault:
                self._close_file(number_)
                raise
        return b'%d\n' % number_ + stat_line(found)

    def _free_number(self) -> int:
        for candidate in range(OPEN_FILES):
            if candidate not in self._files:
                return candidate
        raise Fault(TOO_MANY_OPEN)

    def _file(self, word: bytes) -> OpenFile:
        file = self._files.get(number(word))
        if file is None:
            raise Fault(BAD_FD)
        return file

    def _close(self, file: bytes) -> bytes:
        self._file(file)
        self._close_file(number(file))
        return b'0\n'

    def _close_file(self, number_: int) -> None:
        file = self._files.pop(number_)
        try:
            self._keep_checksum(file)
        finally:
            self._server.checksums.closed(file)
            os.close(file.fd)

    def _pread(self, word: bytes, length: bytes, offset: bytes) -> bytes:
        file, count, at = self._file(word), number(length), number(offset)
        if not file.reads:
            raise Fault(BAD_FD)
        if count < 0 or at < 0:
            raise Fault(INVALID)
        count = min(count, PREAD)
        if file.checksum is not None and not file.writes and file.hashed == at:
            return self._pread_passing(file, count)
        if count <= SMALL:
            data = os.pread(file.fd, count, at)
            return b'%d\n' % len(data) + data
        found = os.fstat(file.fd)
        if stat.S_ISDIR(found.st_mode):
            raise Fault(IS_DIR)
        count = max(0, min(count, found.st_size - at))
        self._wire.put(b'%d\n' % count)
        self._wire.send_file(file.fd, at, count)
        return b''

    def _pread_passing(self, file: OpenFile, count: int) -> bytes:
        """The next bytes of a file whose checksum is wanted, read once for both."""
        count = max(0, min(count, os.fstat(file.fd).st_size - file.hashed))
        self._wire.put(b'%d\n' % count)
        with open(file.fd, 'rb', buffering=0, closefd=False) as content:
            content.seek(file.hashed)
            send_passing(self._wire, content, count, self.buffer, file.checksum)
        file.hashed += count
        return b''

    def _hashread(self, word: bytes, algorithm: bytes) -> bytes:
        """Of ours alone: a file will be read from its start on. When it is closed after its last byte, its
        checksum is known, and ``crc32`` or ``gmac`` gives it at once."""
        file = self._file(word)
        name = algorithm.decode('ascii', 'replace')
        if not computes(name):
            raise Fault(INVALID)
        found = os.fstat(file.fd)
        if not file.reads or file.writes or not stat.S_ISREG(found.st_mode):
            raise Fault(BAD_FD)
        file.checksum, file.hashed, file.before = new_hash(name), 0, state_of(found)
        return b'0\n'

    def _pwrite(self, word: bytes, length: bytes, offset: bytes) -> bytes:
        count = number(length)
        if count < 0:
            raise Fault(INVALID)
        with self._announced(count):
            file, at = self._file(word), number(offset)
            if not file.writes:
                raise Fault(BAD_FD)
            if at < 0 or at + count > MOST:
                raise Fault(INVALID)
        stored = min(count, PWRITE)
        self._follow_checksum(file, at)
        try:
            self._receive(file.fd, stored, at, file.checksum, not file.appends)
        except (OSError, Disconnected):
            file.checksum = None
            raise
        file.hashed += stored
        if file.checksum is not None:
            file.before = state_of(os.fstat(file.fd))
        self._wire.skip(count - stored)
        return b'%d\n' % stored

    @contextlib.contextmanager
    def _announced(self, count: int) -> Iterator[None]:
        """Data that follows a request whatever becomes of it."""
        self._check_announced(count)
        try:
            yield
        except (Fault, OSError):
            self._wire.skip(count)
            raise

    def _check_announced(self, count: int) -> None:
        """More than the disk has room for isn't waited for: it would keep this connection for years."""
        if count > PWRITE and count > self._root.free_bytes():
            raise ProtocolError('%d bytes are announced, which no file here could hold' % count)

    def _follow_checksum(self, file: OpenFile, at: int) -> None:
        """The checksum of a file goes on where its end is what is written, and ends anywhere else."""
        found = os.fstat(file.fd)
        if file.checksum is None:
            if found.st_size == at:
                file.checksum, file.hashed = self._server.checksums.find(found), at
        elif file.hashed != at or state_of(found) != file.before:
            file.checksum = None
        self._server.checksums.forget(found)

    def _keep_checksum(self, file: OpenFile) -> None:
        """Where all of a file passed, and nobody else's bytes are in it."""
        if file.checksum is not None and file.alone:
            found = os.fstat(file.fd)
            if found.st_size == file.hashed and state_of(found) == file.before:
                self._server.checksums.keep(found, file.checksum, [file])

    def _fstat(self, file: bytes) -> bytes:
        return b'0\n' + stat_line(os.fstat(self._file(file).fd))

    def _fsync(self, file: bytes) -> bytes:
        os.fsync(self._file(file).fd)
        return b'0\n'

    def _ftruncate(self, file: bytes, length: bytes) -> bytes:
        if not self._file(file).writes:
            raise Fault(BAD_FD)
        self._truncate_open(self._file(file).fd, number(length))
        return b'0\n'

    def _truncate_open(self, fd: int, length: int) -> None:
        self._server.checksums.disturb(os.fstat(fd))
        os.ftruncate(fd, length)

    def _fchmod(self, file: bytes, mode: bytes) -> bytes:
        change_mode(self._file(file).fd, number(mode))
        return b'0\n'

    def _fchown(self, file: bytes, user: bytes, group: bytes) -> bytes:
        self._file(file)
        return b'0\n'

    def _fstatfs(self, file: bytes) -> bytes:
        return statfs_line(self._file(file).fd)

    # Names.

    def _getlongdir(self, path: bytes) -> bytes:
        self._list(path, lambda name, found: name + b'\n' + stat_line(found))
        return b'\n'

    def _getdir(self, path: bytes) -> bytes:
        self._list(path, lambda name, found: name + b'\n')
        return b'\n'

    def _list(self, path: bytes, say: Callable[[bytes, os.stat_result], bytes]) -> None:
        entries = self._root.list(unquote(path))
        with contextlib.closing(entries):      # type: ignore
            first = next(entries)              # raises if it can't be listed
            self._wire.put(b'0\n' + say(*first))
            for entry in entries:
                self._wire.put(say(*entry))

    def _stat(self, path: bytes) -> bytes:
        return b'0\n' + stat_line(self._root.stat(unquote(path)))

    def _lstat(self, path: bytes) -> bytes:
        return b'0\n' + stat_line(self._root.stat(unquote(path), False))

    def _mkdir(self, path: bytes, mode: bytes) -> bytes:
        with self._root.parent(unquote(path), False) as (fd, name):
            os.mkdir(name, number(mode) & 0o777 | 0o700, dir_fd=fd)
        return b'0\n'

    def _unlink(self, path: bytes) -> bytes:
        with self._root.parent(unquote(path), False) as (fd, name):
            os.unlink(name, dir_fd=fd)
        return b'0\n'

    def _rmdir(self, path: bytes) -> bytes:
        with self._root.parent(unquote(path), False) as (fd, name):
            remove_folder(fd, name)
        return b'0\n'

    def _rmall(self, path: bytes) -> bytes:
        with self._root.parent(unquote(path), False) as (fd, name):
            if name == b'.':
                raise Fault(NOT_AUTHORIZED)
            remove_tree(fd, name)
        return b'0\n'

    def _rename(self, old: bytes, new: bytes) -> bytes:
        self._need('d')
        with self._root.parent(unquote(old), False) as (old_fd, old_name), \
                self._root.parent(unquote(new), False) as (new_fd, new_name):
            os.rename(old_name, new_name, src_dir_fd=old_fd, dst_dir_fd=new_fd)
        return b'0\n'

    def _link(self, old: bytes, new: bytes) -> bytes:
        self._need('r')
        with self._root.parent(unquote(old)) as (old_fd, old_name), \
                self._root.parent(unquote(new), False) as (new_fd, new_name):
            os.link(old_name, new_name, src_dir_fd=old_fd, dst_dir_fd=new_fd, follow_symlinks=False)
        return b'0\n'

    def _symlink(self, target: bytes, new: bytes) -> bytes:
        with self._root.parent(unquote(new), False) as (fd, name):
            os.symlink(unquote(target), name, dir_fd=fd)
        return b'0\n'

    def _readlink(self, path: bytes, length: bytes) -> bytes:
        with self._root.parent(unquote(path), False) as (fd, name):
            target = os.readlink(name, dir_fd=fd)[:max(0, number(length))]
        return b'%d\n' % len(target) + target

    def _chmod(self, path: bytes, mode: bytes) -> bytes:
        with self._opened(path) as fd:
            change_mode(fd, number(mode))
        return b'0\n'

    @contextlib.contextmanager
    def _opened(self, path: bytes, flags: int = os.O_RDONLY) -> Iterator[int]:
        fd = self._root.open(unquote(path), flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def _chown(self, path: bytes, user: bytes, group: bytes) -> bytes:
        self._root.stat(unquote(path), False)
        return b'0\n'

    def _utime(self, path: bytes, atime: bytes, mtime: bytes) -> bytes:
        with self._root.parent(unquote(path)) as (fd, name):
            os.utime(name, (number(atime), number(mtime)), dir_fd=fd, follow_symlinks=False)
        return b'0\n'

    def _truncate(self, path: bytes, length: bytes) -> bytes:
        with self._opened(path, os.O_WRONLY) as fd:
            self._truncate_open(fd, number(length))
        return b'0\n'

    def _access(self, path: bytes, mask: bytes) -> bytes:
        bits = number(mask) & 7
        with self._root.parent(unquote(path)) as (fd, name):
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            self._need('l' if stat.S_ISDIR(found.st_mode) else 'r')
            if bits & os.W_OK:
                self._need('w')
            if not os.access(name, bits, dir_fd=fd):
                raise Fault(NOT_AUTHORIZED)
        return b'0\n'

    def _statfs(self, path: bytes) -> bytes:
        with self._opened(path) as fd:
            return statfs_line(fd)

    # Checksums.

    def _hash(self, algorithm: bytes, path: bytes) -> bytes:
        if algorithm not in (b'md5', b'sha1'):
            raise Fault(INVALID)
        return self._digest(algorithm.decode(), path)

    def _md5(self, path: bytes) -> bytes:
        return self._digest('md5', path)

    def _crc32(self, path: bytes) -> bytes:
        """Of ours alone."""
        return self._digest(CRC32, path)

    def _gmac(self, path: bytes) -> bytes:
        """Of ours alone, and not everywhere."""
        if not computes(GMAC):
            raise Fault(INVALID)
        return self._digest(GMAC, path)

    def _digest(self, algorithm: str, path: bytes) -> bytes:
        fd = self._root.open(best_path(self._root, path))
        try:
            found = os.fstat(fd)
            if stat.S_ISDIR(found.st_mode):
                raise Fault(IS_DIR)
            checksum = self._server.checksums.find(found, algorithm)
            if checksum is None:
                self._wire.flush()
                checksum = hash_file(fd, algorithm)
                self._server.checksums.keep(found, checksum.copy(), self._files.values())
        finally:
            os.close(fd)
        digest = checksum.digest()
        return b'%d\n' % len(digest) + digest

    # Identity.

    def _whoami(self, length: bytes) -> bytes:
        subject = self._subject.encode('ascii', 'replace')[:max(0, number(length))]
        return b'%d\n' % len(subject) + subject

    def _getacl(self, path: bytes) -> bytes:
        self._root.stat(unquote(path))
        return b'0\n' + self._server.acl.text() + b'\n'

    def _localpath(self, path: bytes) -> bytes:
        name = b'/' + b'/'.join(split_path(best_path(self._root, path)))
        return b'%d\n' % len(name) + name

    # What is refused.

    def _unknown(self) -> bytes:
        raise Fault(INVALID)

    def _forbidden(self) -> bytes:
        raise Fault(NOT_AUTHORIZED)

    def _data_at_third(self, first: bytes, second: bytes, third: bytes) -> bytes:
        """A request that isn't known here, but which data follows: ``setxattr P NAME LENGTH``."""
        with self._announced(max(0, number(third))):
            raise Fault(INVALID)

    def _data_at_second(self, first: bytes, second: bytes) -> bytes:
        """The same for ``swrite FD LENGTH``."""
        with self._announced(max(0, number(second))):
            raise Fault(INVALID)


NO_COMMAND = (Session._unknown, 0, '')

# What is understood: the method, how many words follow, and of which rights one is needed at least.
COMMANDS: Dict[bytes, Tuple[Callable[..., bytes], int, str]] = {
    b'getfile': (Session._getfile, 1, 'r'), b'putfile': (Session._putfile, 3, 'wp'),
    b'getstream': (Session._getstream, 1, 'r'), b'putstream': (Session._putstream, 1, 'wp'),
    b'open': (Session._open, 3, ''), b'close': (Session._close, 1, ''),
    b'pread': (Session._pread, 3, ''), b'pwrite': (Session._pwrite, 3, ''),
    b'hashread': (Session._hashread, 2, ''),
    b'fstat': (Session._fstat, 1, ''), b'fsync': (Session._fsync, 1, ''),
    b'ftruncate': (Session._ftruncate, 2, ''), b'fchmod': (Session._fchmod, 2, 'w'),
    b'fchown': (Session._fchown, 3, 'w'), b'fstatfs': (Session._fstatfs, 1, ''),
    b'getlongdir': (Session._getlongdir, 1, 'l'), b'getdir': (Session._getdir, 1, 'l'),
    b'stat': (Session._stat, 1, 'l'), b'lstat': (Session._lstat, 1, 'l'),
    b'mkdir': (Session._mkdir, 2, 'wv'), b'unlink': (Session._unlink, 1, 'd'),
    b'rmdir': (Session._rmdir, 1, 'd'), b'rmall': (Session._rmall, 1, 'd'),
    b'rename': (Session._rename, 2, 'w'), b'link': (Session._link, 2, 'w'),
    b'symlink': (Session._symlink, 2, 'w'), b'readlink': (Session._readlink, 2, 'r'),
    b'chmod': (Session._chmod, 2, 'w'), b'chown': (Session._chown, 3, 'w'),
    b'lchown': (Session._chown, 3, 'w'), b'utime': (Session._utime, 3, 'w'),
    b'truncate': (Session._truncate, 2, 'w'), b'access': (Session._access, 2, ''),
    b'statfs': (Session._statfs, 1, 'l'), b'hash': (Session._hash, 2, 'r'),
    b'md5': (Session._md5, 1, 'r'), b'crc32': (Session._crc32, 1, 'r'),
    b'gmac': (Session._gmac, 1, 'r'), b'whoami': (Session._whoami, 1, ''),
    b'getacl': (Session._getacl, 1, ''), b'localpath': (Session._localpath, 1, 'l'),
    b'setacl': (Session._forbidden, 0, ''), b'resetacl': (Session._forbidden, 0, ''),
    b'thirdput': (Session._forbidden, 0, ''), b'debug': (Session._forbidden, 0, ''),
    b'whoareyou': (Session._forbidden, 0, ''),
    b'swrite': (Session._data_at_second, 2, ''), b'setxattr': (Session._data_at_third, 3, ''),
    b'fsetxattr': (Session._data_at_third, 3, ''), b'lsetxattr': (Session._data_at_third, 3, ''),
    b'ticket_register': (Session._data_at_third, 3, ''),
}

# Requests whose path the real clients send as it is, not quoted: it is the rest of the line.
RAW_PATHS = frozenset((b'hash', b'localpath', b'getstream', b'putstream'))

NUMBER = re.compile(br'[+-]?[0-9]{1,19}$')
MOST = (1 << 63) - 1           # the highest number on the wire, and the largest size of a file


def number(word: bytes) -> int:
    """A signed integer of 64 bits. Raises Fault."""
    if not NUMBER.match(word) or not -MOST - 1 <= int(word) <= MOST:
        raise Fault(INVALID)
    return int(word)


def best_path(root: Root, path: bytes) -> bytes:
    """A path that may be quoted or not: as what something is found, else unquoted."""
    if b'%' in path:
        with contextlib.suppress(OSError):
            root.stat(path)
            return path
    return unquote(path)


def write_all(fd: int, view: memoryview, offset: int, holes: bool = True) -> None:
    """Writes all of it at an offset; zeros beyond the file's end become a hole. No holes in a file that is
    open to append: what is written there goes to its end, wherever that is by then."""
    if holes and is_zero(view) and os.fstat(fd).st_size <= offset:
        os.ftruncate(fd, offset + len(view))
        return
    while view:
        count = os.pwrite(fd, view, offset)
        offset += count
        view = view[count:]


def change_mode(fd: int, mode: int) -> None:
    """chmod; the owner's own rights stay, setuid and its like don't come."""
    keep = 0o700 if stat.S_ISDIR(os.fstat(fd).st_mode) else 0o600
    os.fchmod(fd, mode & 0o777 | keep)


def statfs_line(fd: int) -> bytes:
    found = os.fstatvfs(fd)
    return b'0\n%d %d %d %d %d %d %d\n' % (0, found.f_frsize, found.f_blocks, found.f_bfree, found.f_bavail,
                                           found.f_files, found.f_ffree)


def free_bytes(fd: int) -> int:
    """What the disk of a file or folder has room for."""
    found = os.fstatvfs(fd)
    return found.f_bavail * found.f_frsize


def hash_file(fd: int, algorithm: str, checksum: Any = None, count: Optional[int] = None) -> Any:
    """The checksum of a file, or its first bytes, read from the start, not moving where it stands."""
    checksum = checksum or new_hash(algorithm)
    at = 0
    while count is None or at < count:
        data = os.pread(fd, BLOCK if count is None else min(BLOCK, count - at), at)
        if not data:
            break
        checksum.update(data)
        at += len(data)
    return checksum


# --- the server ------------------------------------------------------------------------------

CLIENTS = 32                   # connections at once
IDLE = 300.0                   # seconds that a client may say nothing
KEEPALIVE = (('TCP_KEEPIDLE', 60), ('TCP_KEEPINTVL', 20), ('TCP_KEEPCNT', 3))    # where there is such a thing


class ChirpServer:
    """Serves a folder to the addresses that it is told of. Threads: see above.

    ``auth``: ``address``, or ``ticket``: then only the owner of the private part of ``ticket`` (a public
    key, PEM) is let in, and nobody until it is known. Raises OSError where it can't listen.
    """

    def __init__(self, root: str, host: str = '127.0.0.1', port: int = 0,
                 allow: Optional[Iterable[str]] = None, rights: str = 'rwld',
                 auth: str = 'address', ticket: str = '', max_clients: int = CLIENTS,
                 idle_timeout: float = IDLE) -> None:
        self.root = Root(root)
        self.checksums = Checksums()
        self.auth = auth
        self.ticket = None             # type: Optional[PublicKey]
        self.idle_timeout = idle_timeout
        self._where = (host, port)
        self._rights = rights
        self._max_clients = max_clients
        # Guards the list of sessions; nothing but starting and closing happens while it is held.
        self._lock = threading.Lock()
        self._sessions = {}            # type: Dict[threading.Thread, Session]
        self._count = 0
        self._stopping = False
        self._listener = None          # type: Optional[socket.socket]
        self._thread = None            # type: Optional[threading.Thread]
        self.allow(allow or ())
        if ticket:
            self.set_ticket(ticket)

    def allow(self, addresses: Iterable[str]) -> None:
        """From now on these addresses may connect, and no other; connections of others end."""
        self._allowed = frozenset(addresses)
        subjects = ([HOST_SUBJECT] if self.auth == 'ticket' else
                    ['address:' + address for address in sorted(self._allowed)])
        self.acl = Acl([(subject, self._rights) for subject in subjects])
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            if session.peer not in self._allowed:
                session.interrupt()

    def set_ticket(self, pem: str) -> None:
        """From now on, with ``auth='ticket'``, this public key opens, and no other; connections that
        another one opened end. Raises ChirpError."""
        key = PublicKey(pem)
        with self._lock:
            known, self.ticket = self.ticket, key
            sessions = list(self._sessions.values())
        if known is not None and known.digest != key.digest:
            for session in sessions:
                session.interrupt()

    @property
    def address(self) -> Tuple[str, int]:
        """Host and port that it listens on."""
        if self._listener is None:
            raise ChirpError('the server is not started')
        return self._listener.getsockname()[:2]

    def start(self) -> 'ChirpServer':
        """Listens and returns. Where it can't it lets go of the folder, and is of no more use."""
        try:
            self._listener = listen(*self._where)
        except OSError:
            self.root.close()
            raise
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name='chirp', daemon=True)
        self._thread.start()
        log.info('serving %s on %s:%d', self.root.path, *self.address)
        return self

    def stop(self, timeout: float = 5.0) -> None:
        """Ends all connections, and waits for their threads at most so many seconds."""
        end = time.monotonic() + timeout
        with self._lock:
            self._stopping = True
            sessions = dict(self._sessions)
        if self._thread is not None:
            self._waker.close()
        for session in sessions.values():
            session.interrupt()
        threads = list(sessions)
        if self._thread is not None:
            threads.append(self._thread)
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                log.warning('thread %s still runs', thread.name)
        self.root.close()

    def __enter__(self) -> 'ChirpServer':
        return self.start()

    def __exit__(self, *exception: Any) -> None:
        self.stop()

    def _run(self) -> None:
        with self._listener, self._wake, selectors.DefaultSelector() as selector:     # type: ignore
            selector.register(self._listener, selectors.EVENT_READ)                   # type: ignore
            selector.register(self._wake, selectors.EVENT_READ)
            while not self._stopping:
                selector.select()
                self._accept()

    def _accept(self) -> None:
        try:
            sock, peer = self._listener.accept()       # type: ignore
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                log.warning('a client can\'t be served: %s', error)
                time.sleep(0.1)        # the backlog stays ready: don't turn in a tight loop
            return
        if peer[0] not in self._allowed or not self._begin(sock, peer[0]):
            log.info('%s is turned away', peer[0])
            sock.close()

    def _begin(self, sock: socket.socket, peer: str) -> bool:
        notice_death(sock)
        session = Session(self, sock, peer)
        with self._lock:
            if self._stopping or len(self._sessions) >= self._max_clients:
                return False
            self._count += 1
            thread = threading.Thread(target=self._serve, args=(session,),
                                      name='chirp-%d' % self._count, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:      # no more threads, of this process or of its user
                log.warning('a client can\'t be served: %s', error)
                return False
            self._sessions[thread] = session
        return True

    def _serve(self, session: Session) -> None:
        try:
            session.run()
        finally:
            with self._lock:
                self._sessions.pop(threading.current_thread(), None)


def notice_death(sock: socket.socket) -> None:
    """Has the system look, from time to time, whether a silent peer still is there: a machine that was
    switched off says no good-bye."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE:
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# --- the real server -------------------------------------------------------------------------

START_TIME = 20.0              # seconds until the real server listens
RESTART_MOST = 30.0            # seconds before it is started again, at most


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, and doesn't block. Raises OSError."""
    family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(64)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


class RealChirpServer:
    """Runs cctools' chirp_server with the same rights as ours, and starts it again should it end.

    What its ACL files say it reads at every request, so what may come in can change while it runs. It
    takes any connection and then refuses it, and its clients can reach ``.__acl``: ours is tighter.
    Thread ``chirp-watch`` starts the process and waits for it. Raises ChirpError where its folder, its
    user or its key is no good.
    """

    def __init__(self, root: str, host: str = '127.0.0.1', port: int = 0,
                 allow: Optional[Iterable[str]] = None, rights: str = 'rwld',
                 auth: str = 'address', ticket: str = '', max_clients: int = CLIENTS,
                 idle_timeout: float = IDLE, user: str = 'nobody', program: str = 'chirp_server') -> None:
        self.root = os.path.realpath(root)
        self._host, self._port = host, port
        self._rights = rights
        self._auth = auth
        self._limits = (max_clients, idle_timeout)
        self._user = user if os.getuid() == 0 else ''
        self._program = program
        self._allowed = sorted(allow or ())
        self._ticket = ticket
        self._folder = ''              # what the server keeps beside
        self._process = None           # type: Optional[subprocess.Popen]
        self._listens = False
        self._trouble = ''             # why it didn't start, the last time that it didn't
        self._tried = threading.Event()        # it has listened, or failed to
        self._stopping = threading.Event()
        self._thread = None            # type: Optional[threading.Thread]

    @property
    def address(self) -> Tuple[str, int]:
        """Host and port that it listens on; port 0 while it doesn't."""
        if self._thread is None:
            raise ChirpError('the server is not started')
        return self._host, self._port if self._listens else 0

    def allow(self, addresses: Iterable[str]) -> None:
        """From now on these addresses may do something, and no other."""
        self._allowed = sorted(addresses)
        if self._thread is not None:
            self._write_rights()

    def set_ticket(self, pem: str) -> None:
        """From now on, with ``auth='ticket'``, this public key opens, and no other. Raises ChirpError."""
        PublicKey(pem)
        self._ticket = pem
        if self._thread is not None:
            self._write_rights()

    def start(self) -> 'RealChirpServer':
        """Returns once it listens. Raises ChirpError where it doesn't at the first try."""
        self.begin(lambda: None, 2 * START_TIME)
        if not self._listens:
            self.stop(0)
            raise ChirpError('%s: %s' % (self._program, self._trouble))
        return self

    def begin(self, listens: Callable[[], None], patience: float) -> None:
        """Waits at most so many seconds until it listens, or has failed to; tries on in the background.
        ``listens`` is called on the thread ``chirp-watch`` each time that it has come up."""
        import tempfile
        self._folder = tempfile.mkdtemp(prefix='chirp-')
        try:
            self._give(self._folder)
            self._write_rights()
        except (OSError, ChirpError) as error:
            self._clean()
            raise ChirpError('%s: %s' % (self._program, error))
        self._thread = threading.Thread(target=self._watch, args=(listens,), name='chirp-watch', daemon=True)
        self._thread.start()
        self._tried.wait(patience)

    def stop(self, timeout: float = 5.0) -> None:
        """Ends it and its connections."""
        self._stopping.set()
        self._end_process(timeout)
        if self._thread is not None:
            self._thread.join(timeout)
        self._end_process(0)           # one that the watcher had just started
        self._clean()

    def __enter__(self) -> 'RealChirpServer':
        return self.start()

    def __exit__(self, *exception: Any) -> None:
        self.stop()

    def _words(self) -> List[str]:
        clients, idle = self._limits
        words = [self._program, '-r', self.root, '-I', self._host, '-p', str(self._port),
                 '-Z', self._file('port'), '-a', self._auth, '--inherit-default-acl',
                 '-u', '127.0.0.1', '-U', '1000d',      # else it tells a public catalog of itself
                 '-n', 'guest', '-y', self._folder, '-t', str(int(idle)), '-M', str(clients), '-E']
        return words + (['-i', self._user] if self._user else [])

    def _file(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def _give(self, path: str) -> None:
        """Lets the server's user have it."""
        if self._user:
            import shutil  # it and tempfile are megabytes that the embedded server doesn't need
            try:
                shutil.chown(path, self._user)
            except LookupError:
                raise ChirpError('no user %s' % self._user)

    def _write_rights(self) -> None:
        subjects = [HOST_SUBJECT] if self._auth == 'ticket' else ['address:' + a for a in self._allowed]
        self._write('.__acl', ''.join('%s %s\n' % (subject, self._rights) for subject in subjects))
        if self._auth == 'ticket':
            wanted = self._write_ticket() if self._ticket else ''
            for name in os.listdir(self.root):
                if name.startswith('.__ticket.') and name != wanted:
                    os.unlink(os.path.join(self.root, name))

    def _write_ticket(self) -> str:
        key = PublicKey(self._ticket)
        name = '.__ticket.' + key.digest
        self._write(name, 'subject "%s"\nticket "%s"\nexpiration "%d"\nrights "/" "%s"\n' % (
            HOST_SUBJECT, key.pem, time.time() + 10 * 365 * 86400, self._rights))
        return name

    def _write(self, name: str, text: str) -> None:
        """All at once, and not through a link that lies there."""
        temporary = os.path.join(self.root, '.__' + os.urandom(8).hex())
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, 'w') as file:
            file.write(text)
        self._give(temporary)
        os.rename(temporary, os.path.join(self.root, name))

    def _launch(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._file('port'))
        with open(self._file('log'), 'wb') as output:
            self._process = subprocess.Popen(self._words(), stdin=subprocess.DEVNULL, stdout=output,
                                             stderr=output, cwd=self._folder)
        end = time.monotonic() + START_TIME
        while not self._read('port').endswith('\n'):
            if self._process.poll() is not None or time.monotonic() > end or self._stopping.wait(0.02):
                self._end_process(0)
                raise ChirpError('it did not start: %s' % self._read('log').strip()[-300:])
        self._port = int(self._read('port'))

    def _read(self, name: str) -> str:
        try:
            with open(self._file(name), errors='replace') as file:
                return file.read()
        except OSError:
            return ''

    def _watch(self, listens: Callable[[], None]) -> None:
        pause = 1.0
        while not self._stopping.is_set():
            began = time.monotonic()
            why = self._run(listens)
            self._tried.set()
            if time.monotonic() - began > RESTART_MOST:
                pause = 1.0
            if why != self._trouble and not self._stopping.is_set():
                log.warning('%s: %s; it is started again in %g s', self._program, why, pause)
            self._trouble = why
            self._stopping.wait(pause)
            pause = min(2 * pause, RESTART_MOST)

    def _run(self, listens: Callable[[], None]) -> str:
        """Starts it, and waits for its end; what became of it."""
        try:
            self._launch()
        except (OSError, ChirpError) as error:
            return str(error)
        assert self._process is not None
        self._trouble, self._listens = '', True
        log.info('%s serves %s on %s:%d', self._program, self.root, *self.address)
        self._tried.set()
        listens()
        code = self._process.wait()
        self._listens = False
        return 'it ended with %d' % code

    def _end_process(self, timeout: float) -> None:
        """Politely, then with force; the processes that serve its clients, too: they are its group."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if process.poll() is None:
                process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
        with contextlib.suppress(OSError):
            if os.getpgid(0) != process.pid:
                os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            process.kill()
        process.wait()

    def _clean(self) -> None:
        import shutil
        self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)


# --- the client: requests --------------------------------------------------------------------

REPLY = 64 * 1024              # bytes of a reply that isn't file content
LISTING = 8 * 1024 * 1024      # bytes that the listings which are held at once may take


class Entry(NamedTuple):
    """What a listing says of a name: bytes, mode with its type bits, seconds."""
    name: str
    size: int
    mode: int
    mtime: int

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)


class Listing:
    """The entries of a folder, in the order of their names; kept small, since a folder may be large."""

    ENTRY = struct.Struct('>QLq')
    MORE = 50                  # bytes that Python adds to a record

    def __init__(self, limit: int) -> None:
        self._records = []             # type: List[bytes]
        self._limit = limit
        self.size = 0                  # bytes that it takes

    def add(self, name: bytes, found: Stat) -> None:
        """Raises ProtocolError where it becomes too large."""
        record = name + b'\0' + self.ENTRY.pack(found.size, found.mode & 0xffffffff,
                                                max(-1 << 62, min(found.mtime, 1 << 62)))
        self.size += len(record) + self.MORE
        if self.size > self._limit:
            raise ProtocolError('a folder of too many entries')
        self._records.append(record)

    def sort(self) -> 'Listing':
        self._records.sort()
        return self

    def folders(self) -> 'Listing':
        """Those of the entries alone."""
        found = Listing(self._limit)
        found._records = [record for record in self._records if self._entry(record).is_dir]
        found.size = sum(len(record) + self.MORE for record in found._records)
        return found

    def without_parts(self) -> 'Listing':
        """Forgets what isn't whole yet."""
        self._records = [record for record in self._records
                         if not record[:-self.ENTRY.size].endswith(PART + b'\0')]
        return self

    def find(self, name: bytes) -> Optional[Entry]:
        """The entry of that name."""
        index = bisect.bisect_left(self._records, name + b'\0')
        if index < len(self._records) and self._records[index].startswith(name + b'\0'):
            return self._entry(self._records[index])
        return None

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Entry]:
        return map(self._entry, self._records)

    def _entry(self, record: bytes) -> Entry:
        name, _, numbers = record.partition(b'\0')
        size, mode, mtime = self.ENTRY.unpack(numbers)
        return Entry(to_text(name), size, mode, mtime)


def is_safe_name(name: bytes) -> bool:
    """Whether a name of a listing is one of an entry, and not a way elsewhere."""
    return (name not in (b'', b'.', b'..') and b'/' not in name and b'\0' not in name
            and not name.startswith(RESERVED) and len(name) <= 255)


class Requests:
    """The calls of the protocol, one by one, on a connection that is made when it is needed, and
    again, once, where it has ended between two requests (servers end idle ones). All of them
    raise Refused for an error reply, and Disconnected, TimedOut, AccessDenied, Cancelled."""

    def __init__(self, address: str, port: int = PORT, timeout: float = 30.0,
                 ticket: Optional[Ticket] = None) -> None:
        self.address = address
        self.port = port
        self.timeout = timeout
        self.ticket = ticket
        self.cancel = None             # type: Optional[threading.Event]
        self.subject = ''              # who the server says that we are
        self._wire = None              # type: Optional[Wire]
        self._used = False             # whether this connection has answered a request
        self._knows = {}               # type: Dict[str, bool]         # checksums, once it was asked for

    def __enter__(self: 'Client') -> 'Client':
        return self

    def __exit__(self, *exception: Any) -> None:
        self.disconnect()

    # The connection.

    def connect(self) -> Wire:
        """The connection, authenticated; made now, unless it is there."""
        if self._wire is None:
            wire = Wire(self._dial(), self.timeout)
            wire.cancel = self.cancel
            try:
                self.subject = self._authenticate(wire)
            except BaseException:
                wire.close()
                raise
            self._wire, self._used = wire, False
        self._wire.cancel = self.cancel
        return self._wire

    def disconnect(self) -> None:
        """Ends the connection, if there is one. The next request makes another."""
        wire, self._wire, self._knows = self._wire, None, {}
        if wire is not None:
            wire.close()

    @contextlib.contextmanager
    def moving_content(self) -> Iterator[None]:
        """Where a file here fails, the connection ends: bytes that were announced won't be sent, or taken."""
        try:
            yield
        except OSError:
            self.disconnect()
            raise

    def give_up_ended(self) -> None:
        """Notices that the server has ended the connection, before requests are sent ahead on it. No request
        may be under way."""
        if self._wire is not None and self._wire.has_ended():
            self.disconnect()

    def _dial(self) -> socket.socket:
        try:
            return socket.create_connection((self.address, self.port), self.timeout)
        except socket.timeout:
            raise TimedOut('%s:%d doesn\'t answer' % (self.address, self.port))
        except OSError as error:
            raise Disconnected('%s:%d can\'t be reached: %s' % (self.address, self.port, error))

    def _authenticate(self, wire: Wire) -> str:
        """By ticket, if there is one, else by address; never ``unix``, where the server names a file
        that the client makes."""
        try:
            if self.ticket is not None and self._show_ticket(wire, self.ticket):
                return self._subject_of(wire)
            wire.put(b'address\n')
            if wire.line() == b'yes' and wire.line() == b'yes':
                return self._subject_of(wire)
        except EndOfStream:
            raise AccessDenied('%s:%d turns us away' % (self.address, self.port))
        raise AccessDenied('%s:%d doesn\'t let us in' % (self.address, self.port))

    def _show_ticket(self, wire: Wire, ticket: Ticket) -> bool:
        wire.put(b'ticket\n')
        if wire.line() != b'yes':
            return False
        wire.put(ticket.public.digest.encode('ascii') + b'\n')
        answer = wire.line()
        if answer == b'%d' % CHALLENGE:
            signature = ticket.sign(wire.read(CHALLENGE))
            wire.put(b'%d\n' % len(signature) + signature)
            if wire.line() == b'success':
                return True
        elif answer not in (b'declined', b'failure'):
            raise ProtocolError('ticket: %.80r' % answer)
        wire.put(b'==\n')
        return False

    def _subject_of(self, wire: Wire) -> str:
        if wire.line() != b'yes':
            raise ProtocolError('authentication went wrong')
        return to_text(wire.line() + b':' + wire.line())

    def ask(self, what: str, *words: Any) -> bytes:
        """A request line: text and numbers as they are; bytes are quoted already."""
        line = b' '.join([what.encode('ascii')] + [
            word if isinstance(word, bytes) else str(word).encode('ascii') for word in words])
        if len(line) > LINE:
            raise Refused(CODES[errno.ENAMETOOLONG], shown(words[0]))
        return line + b'\n'

    def result(self, wire: Wire, what: str = '') -> int:
        """The number of a reply. Raises Refused where it is negative."""
        line = wire.line()
        if not REPLY_LINE.match(line):
            raise self.broken('not a reply: %.80r' % line)
        self._used = True
        if line.startswith(b'-'):
            raise Refused(int(line), what)
        return int(line)

    def broken(self, why: str) -> ProtocolError:
        """Gives the connection up; an error to raise."""
        self.disconnect()
        return ProtocolError(why)

    def call(self, what: str, *words: Any, about: Path = '', data: bytes = b'', again: bool = True,
             read: Optional[Callable[[Wire, int], Any]] = None, patience: float = 0) -> Any:
        """A request and its reply: the number, or what ``read`` makes of it. ``again``: may be repeated
        where the connection had ended before. ``patience``: seconds that the reply may take longer."""
        line = self.ask(what, *words)
        while True:
            wire = self.connect()
            fresh = not self._used
            try:
                wire.put(line + data)
                with wire.patient(patience):
                    result = self.result(wire, shown(about))
                return result if read is None else read(wire, result)
            except Refused:
                raise
            except EndOfStream:
                self.disconnect()
                if fresh or not again:
                    raise
            except BaseException:
                self.disconnect()
                raise

    # Files and folders.

    def whoami(self) -> str:
        """Who the server says that we are, ``address:…`` or the subject of a ticket."""
        return to_text(self.call('whoami', 1024, read=self._payload(1024)))

    def stat(self, path: Path) -> Stat:
        """Of what the path leads to, through links."""
        return self.call('stat', quote(path), about=path, read=read_stat)

    def lstat(self, path: Path) -> Stat:
        """Of what has this name, a link itself."""
        return self.call('lstat', quote(path), about=path, read=read_stat)

    def ls(self, path: Path = '/', held: int = 0) -> Listing:
        """The entries of a folder. Names that could lead elsewhere raise ProtocolError, as does a listing
        that takes, with the ``held`` bytes of others, more than LISTING."""
        return self.call('getlongdir', quote(path), about=path,
                         read=lambda wire, _: self._read_listing(wire, LISTING - held))

    def mkdir(self, path: Path, mode: int = 0o755) -> None:
        self.call('mkdir', quote(path), mode, about=path, again=False)

    def unlink(self, path: Path) -> None:
        self.call('unlink', quote(path), about=path, again=False)

    def rmdir(self, path: Path) -> None:
        self.call('rmdir', quote(path), about=path, again=False)

    def rmall(self, path: Path) -> None:
        """Removes a file, or a folder and all in it."""
        self.call('rmall', quote(path), about=path, again=False)

    def rename(self, old: Path, new: Path) -> None:
        self.call('rename', quote(old), quote(new), about=old, again=False)

    def link(self, old: Path, new: Path) -> None:
        self.call('link', quote(old), quote(new), about=new, again=False)

    def symlink(self, target: Path, new: Path) -> None:
        self.call('symlink', quote(target), quote(new), about=new, again=False)

    def readlink(self, path: Path) -> str:
        return to_text(self.call('readlink', quote(path), 4096, about=path, read=self._payload(4096)))

    def chmod(self, path: Path, mode: int) -> None:
        self.call('chmod', quote(path), mode & 0o7777, about=path)

    def utime(self, path: Path, atime: int, mtime: int) -> None:
        self.call('utime', quote(path), int(atime), int(mtime), about=path)

    def truncate(self, path: Path, length: int) -> None:
        self.call('truncate', quote(path), length, about=path)

    def access(self, path: Path, mask: int = os.R_OK) -> None:
        """Raises Refused where the path can't be used so."""
        self.call('access', quote(path), mask, about=path)

    def statfs(self, path: Path = '/') -> Tuple[int, ...]:
        """(type, block size, blocks, free, available, files, free files)."""
        return self.call('statfs', quote(path), about=path, read=self._read_statfs)

    def hash(self, path: Path, algorithm: str = 'sha1', size: int = 0) -> bytes:
        """The digest, ``sha1``, ``md5``, or, by a server of ours, ``crc32`` or ``gmac``, that the server has.
        ``size``: the file's, for the time that it may take."""
        return self.call(*words_of_hash(path, algorithm), about=path, read=self._payload(64),
                         patience=size / SLOWEST_HASH)

    def algorithm(self, size: int = 0) -> str:
        """The algorithm to verify a file of that size with: the fastest that both have. No request may be
        under way."""
        if size >= LARGE and computes(GMAC) and self._has(GMAC):
            return GMAC
        return CRC32 if self._has(CRC32) else COMMON

    def _has(self, algorithm: str) -> bool:
        """Whether the server has one of ours."""
        if algorithm not in self._knows:
            self._knows[algorithm] = False
            try:
                self.hash('/', algorithm)
            except Refused as refused:     # who knows what is asked for says that of a folder
                self._knows[algorithm] = refused.code == IS_DIR
        return self._knows[algorithm]

    def has_same(self, path: Path, checksum: Any, size: int) -> bool:
        """Whether the server's file, of that size, has this checksum, of hashlib's kind."""
        return self.hash(path, checksum.name, size) == checksum.digest()

    def reads_same(self, wire: Wire, count: int, content: bytes) -> bool:
        """Whether the digest that follows is the content's; ``count``: the reply to its request."""
        checksum = new_hash(self.algorithm(), content)
        if count != checksum.digest_size:
            raise self.broken('hash: a wrong count')
        return wire.read(count) == checksum.digest()

    def getacl(self, path: Path = '/') -> List[Tuple[str, str]]:
        """(subject, rights) pairs."""
        return self.call('getacl', quote(path), about=path, read=self._read_acl)

    def setacl(self, path: Path, subject: str, rights: str) -> None:
        self.call('setacl', quote(path), quote(subject), rights, about=path)

    def getfile(self, path: Path, limit: int = 16 * 1024 * 1024) -> bytes:
        """A small file's content. Raises ProtocolError where it is larger than the limit."""
        return self.call('getfile', quote(path), about=path, read=self._payload(limit))

    def putfile(self, path: Path, content: bytes, mode: int = 0o644) -> None:
        """Writes a small file; on a real server others may see it half-written."""
        self.call('putfile', quote(path), mode & 0o777, len(content), about=path,
                  read=lambda wire, _: self._send_content(wire, content, path))

    # Open files.

    def open(self, path: Path, flags: str = 'r', mode: int = 0o600) -> Tuple[int, Stat]:
        """(number, stat); flags are r, w, c create, t truncate, x exclusive, a append, s sync."""
        return self.call('open', quote(path), flags, mode, about=path, again='x' not in flags,
                         read=lambda wire, number: (number, read_stat(wire, number)))

    def close(self, file: int) -> None:
        self.call('close', file, again=False)

    def fstat(self, file: int) -> Stat:
        return self.call('fstat', file, again=False, read=read_stat)

    def pread(self, file: int, length: int, offset: int) -> bytes:
        return self.call('pread', file, length, offset, again=False, read=self._payload(length))

    def pwrite(self, file: int, data: bytes, offset: int) -> int:
        """How many bytes were written."""
        return self.call('pwrite', file, len(data), offset, data=data, again=False)

    def fsync(self, file: int) -> None:
        self.call('fsync', file, again=False)

    def ftruncate(self, file: int, length: int) -> None:
        self.call('ftruncate', file, length, again=False)

    # Reading replies.

    def _payload(self, limit: int) -> Callable[[Wire, int], bytes]:
        def read(wire: Wire, count: int) -> bytes:
            if count > limit:
                raise ProtocolError('%d bytes where %d were asked for' % (count, limit))
            return wire.read(count)
        return read

    def _send_content(self, wire: Wire, content: bytes, path: Path) -> None:
        wire.put(content)
        if self.result(wire, shown(path)) != len(content):
            raise ProtocolError('putfile: a wrong count')

    def _read_listing(self, wire: Wire, limit: int) -> Listing:
        listing = Listing(limit)
        deadline = time.monotonic() + self.timeout + LISTING / SLOWEST
        name = wire.line(NAME_LINE)
        while name:
            line = wire.line(NAME_LINE)
            while not STAT_LINE.match(line):           # a newline in a name, as the real server has it
                name += b'\n' + line
                if len(name) > NAME_LINE:
                    raise ProtocolError('a name of more than %d bytes' % NAME_LINE)
                line = wire.line(NAME_LINE)
            if name not in (b'.', b'..') and not name.startswith(RESERVED):
                if not is_safe_name(name):
                    raise ProtocolError('a listing with the name %.300r' % name)
                listing.add(name, parse_stat(line))
            if time.monotonic() > deadline:
                raise TimedOut('a listing without an end')
            name = wire.line(NAME_LINE)
        return listing.sort()

    def _read_statfs(self, wire: Wire, _: int) -> Tuple[int, ...]:
        line = wire.line()
        if not re.match(br'-?[0-9]{1,20}( -?[0-9]{1,20}){6} *$', line):
            raise ProtocolError('not a statfs line: %.80r' % line)
        return tuple(map(int, line.split()))

    def _read_acl(self, wire: Wire, _: int) -> List[Tuple[str, str]]:
        lines = []             # type: List[Tuple[str, str]]
        line = wire.line()
        while line:
            words = to_text(line).rpartition(' ')
            lines.append((words[0], words[2]))
            if len(lines) > 1000:
                raise ProtocolError('an ACL without an end')
            line = wire.line()
        return lines


REPLY_LINE = re.compile(br'-?[0-9]{1,18} *$')
NAME_LINE = 1024               # bytes of a line in a listing
Client = TypeVar('Client', bound=Requests)


def words_of_hash(path: Path, algorithm: str) -> Tuple[Any, ...]:
    """The request for a file's digest."""
    return (algorithm, quote(path)) if algorithm in (CRC32, GMAC) else ('hash', algorithm, quote(path))


def read_stat(wire: Wire, _: int) -> Stat:
    """The stat line after a reply."""
    return parse_stat(wire.line())


# --- the client: files and folders -----------------------------------------------------------

DEPTH = 32                     # requests that are sent ahead
AHEAD = 16 * 1024              # and their bytes: what a server takes in while it waits for us to read
PIECES = 3                     # preads or pwrites that are under way
MANY = 20                      # small files after which a second connection is worth making
RETRIES = 2                    # new connections without progress before a transfer fails
BESIDE = 8 * 1024 * 1024       # a file from here on is hashed by the server while it is moved
LARGE = 64 * 1024 * 1024       # and from here on, OpenSSL is worth the time of loading it
OVERLAP = 64 * 1024            # bytes of a partial file that are fetched again, to see if it goes on
NESTED = 200                   # levels of a folder that are followed
FAILURES = 100                 # failures of a folder that are told one by one
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

Progress = Callable[[int, int], None]


PART = b'.vmhost-part'         # how the name of what isn't whole yet ends; nobody else's does
PLAIN_NAME = 200               # bytes of a quoted name that a part's begins with; both share a line


def part_name(name: bytes) -> bytes:
    """Under which name a file is while it is not whole."""
    if len(TO_QUOTE.sub(b'%00', name)) <= PLAIN_NAME:
        return name + PART
    return new_hash('sha1', name).hexdigest()[:16].encode('ascii') + PART


def part_path(path: bytes) -> bytes:
    """The same for a path of the server."""
    folder, slash, name = path.rstrip(b'/').rpartition(b'/')
    return folder + slash + part_name(name)


def to_remote(name: str) -> bytes:
    """The server's name of what is called so here."""
    return os.fsencode(name) if os.name == 'posix' else name.encode('utf-8', 'surrogatepass')


def to_local(name: str) -> str:
    """What an entry of the server is called here. Raises OSError where that can't be."""
    if os.name == 'posix':
        return os.fsdecode(to_bytes(name))
    if NOT_ON_WINDOWS.search(name):
        raise OSError(errno.EINVAL, 'no file can have this name here')
    return name


NOT_ON_WINDOWS = re.compile(r'[\x00-\x1f<>:"/\\|?*\ud800-\udfff]|[ .]$'
                            r'|^(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)', re.IGNORECASE)


def local_part(path: str) -> str:
    """Under which name a file is here while it is not whole."""
    folder, name = os.path.split(path)
    return os.path.join(folder, os.fsdecode(part_name(os.fsencode(name))))


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
        self._waiting = collections.deque()    # type: collections.deque
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
            result = self._client.result(wire)     # type: Union[int, Refused]
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


def hash_part(file: Any, checksum: Any, start: int, end: int) -> None:
    """Takes a part of a local file into a checksum."""
    view = new_buffer()
    file.seek(start)
    while start < end:
        count = file.readinto(view[:min(BLOCK, end - start)])
        if not count:
            return
        checksum.update(view[:count])
        start += count


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
        self._some = []        # type: List[Tuple[str, str]]
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
        self._held = []        # type: List[Tuple[str, int, bytes]]

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
        self._lanes = []               # type: List[SmallFiles]
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
        sent = []              # type: List[int]
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
        folders = []           # type: List[os.DirEntry]
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
        self._after = []               # type: List[Callable[[], None]]
        self._keeps_modes = None       # type: Optional[bool]

    def put(self, file: 'SmallFile') -> None:
        """Its content goes once the server has agreed, with what completes the last one."""
        if self._pipeline.is_idle():
            self.client.give_up_ended()
            if self._verify:
                self.client.algorithm()        # so that it is known while something is under way
        agreed = []            # type: List[Union[int, Refused]]
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
        self.error = None              # type: Optional[ChirpError]

    def check(self, wire: Optional[Wire], result: Union[int, Refused]) -> None:
        """Notes a refusal."""
        if isinstance(result, Refused) and self.error is None:
            self.error = result


def open_regular(path: str) -> Any:
    """Opens a local file to read, unbuffered. Raises OSError where it is something else."""
    fd = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0)
                 | getattr(os, 'O_NOCTTY', 0) | getattr(os, 'O_CLOEXEC', 0))
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, 'not a regular file', path)
    return os.fdopen(fd, 'rb', buffering=0)


def send_passing(wire: Wire, file: Any, count: int, buffer: memoryview, checksum: Any) -> None:
    """Sends the next bytes of a file, read once for the wire and, if one is given, the checksum.

    Not by sendfile even where no checksum is wanted: it hands on pages that nobody has touched lately, and on
    one machine the receiver, who has more to do, waits for the memory then (chirp_server: a fifth slower).
    """
    wire.flush()
    while count:
        got = file.readinto(buffer[:min(count, BLOCK)])
        if not got:
            raise Shrunk('the file became shorter while it was sent')
        wire.send(buffer[:got])
        if checksum is not None:
            checksum.update(buffer[:got])
        count -= got


def check_unchanged(source: bytes, found: Stat, after: Stat) -> None:
    """Raises Changed where a file at the server is another one, or became another, since it was found."""
    if any(getattr(found, what) != getattr(after, what) for what in ('dev', 'ino', 'size', 'mtime')):
        raise Changed('%s changed while it was read' % shown(source))


def changed(before: os.stat_result, after: os.stat_result) -> bool:
    return (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)


def hash_local(path: str, size: int, algorithm: str) -> Any:
    """The checksum object of the first bytes of a local file."""
    checksum = new_hash(algorithm)
    with open_regular(path) as file:
        hash_part(file, checksum, 0, size)
    return checksum


def tree_size(path: str) -> int:
    """Bytes of the files in a folder that will be sent, for the progress only."""
    size = 0
    deepest = path.count(os.sep) + NESTED
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders
                      if not to_remote(name).endswith(PART) and folder.count(os.sep) <= deepest]
        for name in names:
            if to_remote(name).endswith(PART):
                continue
            with contextlib.suppress(OSError):
                found = os.lstat(os.path.join(folder, name))
                size += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return size


def join(folder: bytes, name: bytes) -> bytes:
    return folder.rstrip(b'/') + b'/' + name


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
        checksum = beside = None       # type: Any
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
        asked = []             # type: List[int]
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
        deadline = time.monotonic() + self._client.timeout + count / SLOWEST
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
        self.data = None               # type: Optional[bytes]


class RemoteHash:
    """The server's own checksum of a file, asked for on a connection of its own, so that it is
    computed while the file moves. ``digest()``: None where that did not work out."""

    def __init__(self, client: ChirpClient, path: bytes, algorithm: str, size: int) -> None:
        self._client = client.twin()
        self._path = path
        self._algorithm = algorithm
        self._size = size
        self._digest = None            # type: Optional[bytes]
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


def check_target(path: str) -> None:
    """Raises OSError for what no file may replace: a folder, or a device, FIFO or socket."""
    try:
        mode = os.stat(path).st_mode
    except OSError:                    # nothing, or a link to it
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, 'neither a file nor a folder', path)


def open_part(target: str) -> Any:
    """Opens the partial file of a target here, to go on with it; never through a link. Raises Busy where
    somebody else has it open so, until it has its name or is closed."""
    path = local_part(target)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_NONBLOCK', 0)
    try:
        fd = os.open(path, flags | getattr(os, 'O_BINARY', 0) | getattr(os, 'O_CLOEXEC', 0), 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR):
            raise
        remove_part(path, target)
        return open_part(target)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        os.unlink(path)
        return open_part(target)
    file = os.fdopen(fd, 'r+b', buffering=0)
    try:
        lock(fd, target)
        if is_still(fd, path):
            return file
    except BaseException:
        file.close()
        raise
    file.close()
    return open_part(target)


def remove_part(path: str, target: str) -> None:
    """Removes a partial folder, or a link, where a partial file is to be. Raises Busy. shutil is imported
    here alone: a guest that waits does without its memory."""
    if os.path.islink(path):
        os.unlink(path)
    else:
        import shutil
        with locked_folder(path, target):
            shutil.rmtree(path)


def lock(fd: int, target: str) -> None:
    """Locks what is made for a target, until it is closed. Raises Busy."""
    if fcntl is None:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy(to_remote(target))
    except OSError as error:           # a file system that has none
        log.debug('%s: no lock: %s', target, error)


@contextlib.contextmanager
def locked_folder(path: str, target: str) -> Iterator[None]:
    """Makes the partial folder of a target, and locks it. Raises Busy."""
    if os.path.lexists(path) and (os.path.islink(path) or not os.path.isdir(path)):
        with open_part(target) as file:
            let_go(file)
            os.unlink(path)
    make_folder(path)
    if fcntl is None:
        yield
        return
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        lock(fd, target)
        if not is_still(fd, path):
            raise Busy(to_remote(target))
        yield
    finally:
        os.close(fd)


def is_still(fd: int, path: str) -> bool:
    """Whether what is open has this name: who had it locked before may have given it another one."""
    try:
        return fcntl is None or os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def let_go(file: Any) -> None:
    """Closes a file that is to be renamed or removed, where no system does that with an open one; elsewhere
    it stays locked meanwhile."""
    if fcntl is None:
        file.close()


def write_here(file: Any, view: memoryview) -> None:
    """Writes all of it, zeros as a hole: the file ends here."""
    if is_zero(view):
        file.seek(len(view), os.SEEK_CUR)
        return
    while view:
        view = view[file.write(view):]


def set_times(file: Any, atime: int, mtime: int) -> None:
    with contextlib.suppress(OverflowError):           # a server may say any number
        os.utime(file.fileno() if os.utime in os.supports_fd else file.name, (atime, mtime))


def set_mode(file: Any, mode: int) -> None:
    """The owner may always read and write."""
    if hasattr(os, 'fchmod'):
        os.fchmod(file.fileno(), mode | 0o600)


def make_folder(path: str) -> None:
    """Makes a folder, or takes the one that is there. Raises OSError for a link or file."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)


def may_leave(target: str, inside: Tuple[str, ...]) -> bool:
    """Whether a link in that folder, below the top, could lead out of the top.

    After a name no ``..`` may come: the name may be a link that we made, to elsewhere in the top, and
    from there fewer steps lead out. Up from a real folder, then through names alone, each of them real or
    a link of this kind: that stays inside, whatever the links.
    """
    if target.startswith('/') or '\\' in target and os.name == 'nt' or ':' in target and os.name == 'nt':
        return True
    names = [name for name in target.split('/') if name not in ('', '.')]
    ups = len(list(itertools.takewhile(lambda name: name == '..', names)))
    return ups > len(inside) or '..' in names[ups:]


def to_local_link(target: str) -> str:
    """Where a link leads, for this system. Raises OSError where that can't be said here."""
    if os.name == 'posix':
        return os.fsdecode(to_bytes(target))
    return os.sep.join(name if name in ('', '.', '..') else to_local(name) for name in target.split('/'))


# --- the command line ------------------------------------------------------------------------

def parse_address(text: str) -> Tuple[str, int]:
    """HOST, HOST:PORT or [HOST]:PORT."""
    found = re.match(r'(?:\[(.+)\]|([^:]+))(?::([0-9]{1,5}))?$', text)
    if not found or int(found.group(3) or 0) > 65535:
        raise argparse.ArgumentTypeError('expected HOST:PORT, not %s' % text)
    return found.group(1) or found.group(2), int(found.group(3) or PORT)


def parse_port(text: str) -> int:
    if not re.match(r'[0-9]{1,5}$', text) or int(text) > 65535:
        raise argparse.ArgumentTypeError('expected 0 to 65535, not %s' % text)
    return int(text)


def parse_timeout(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= threading.TIMEOUT_MAX:       # nor is it nan
        raise argparse.ArgumentTypeError('expected seconds, more than 0, not %s' % text)
    return seconds


def parse_words(words: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='chirp.py', description='Files over Chirp.')
    verbs = parser.add_subparsers(dest='verb', metavar='serve|put|get|ls')
    serve = verbs.add_parser('serve', help='serve a folder until SIGTERM or Ctrl-C')
    serve.add_argument('folder')
    serve.add_argument('--host', default='127.0.0.1', help='address to listen on (default %(default)s)')
    serve.add_argument('--port', type=parse_port, default=PORT, help='default %(default)s; 0: any')
    serve.add_argument('--allow', action='append', metavar='ADDRESS',
                       help='who may connect, as often as wanted (default 127.0.0.1)')
    serve.add_argument('--rights', default='rwld', help='of r, w, l, d (default %(default)s)')
    serve.add_argument('--ticket', metavar='FILE', help='public key (PEM): let only its owner in')
    for verb, what in (('put', 'send a file or folder'), ('get', 'fetch a file or folder')):
        moving = verbs.add_parser(verb, help=what)
        moving.add_argument('address', type=parse_address, metavar='HOST:PORT')
        moving.add_argument('source')
        moving.add_argument('target', nargs='?', help='default: the name of the source')
    listing = verbs.add_parser('ls', help='list a folder')
    listing.add_argument('address', type=parse_address, metavar='HOST:PORT')
    listing.add_argument('path', nargs='?', default='/')
    listing.add_argument('-l', action='store_true', dest='long', help='with mode, size and time')
    for verb in ('put', 'get', 'ls'):
        verbs.choices[verb].add_argument('--timeout', type=parse_timeout, default=30.0, metavar='SECONDS',
                                         help='silence that is borne (default %(default)s)')
        verbs.choices[verb].add_argument('--ticket', metavar='FILE', help='private key (PEM)')
    parsed = parser.parse_args(words)
    if parsed.verb is None:
        parser.error('expected serve, put, get or ls')
    return parsed


def read_text(path: Optional[str]) -> str:
    if not path:
        return ''
    with open(path) as file:
        return file.read()


def serve_folder(words: argparse.Namespace) -> None:
    told = []              # type: List[int]       # a handler may wait for no lock, as an event has
    for number_ in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number_, lambda number_, _: told.append(number_))
    server = ChirpServer(words.folder, words.host, words.port, words.allow or ['127.0.0.1'], words.rights,
                         'ticket' if words.ticket else 'address', read_text(words.ticket))
    with server:
        print('serving %s on %s:%d' % ((server.root.path,) + server.address), flush=True)
        while not told:
            time.sleep(0.2)


class Bar:
    """Progress on a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        self._shows = sys.stderr is not None and sys.stderr.isatty()       # None: it is closed

    def __call__(self, moved: int, total: int) -> None:
        if self._shows:
            sys.stderr.write('\r%3d %%  %d of %d bytes ' % (moved * 100 // max(total, 1), moved, total))
            sys.stderr.flush()

    def end(self) -> None:
        if self._shows:
            sys.stderr.write('\n')


def move(client: ChirpClient, words: argparse.Namespace) -> None:
    name = os.path.basename(words.source.rstrip('/' + (os.sep if words.verb == 'put' else '')))
    target = words.target or name
    if not target or target in ('.', '..'):
        raise ChirpError('name the target: %s has no name of its own' % words.source)
    bar = Bar()
    try:
        if words.verb == 'put':
            client.put(words.source, os.fsencode(target), progress=bar)
        else:
            client.get(os.fsencode(words.source), target, progress=bar)
    finally:
        bar.end()


def print_listing(client: ChirpClient, words: argparse.Namespace) -> None:
    if sys.stdout is None:
        raise OSError(errno.EBADF, 'the standard output is closed')
    for entry in client.ls(os.fsencode(words.path)):
        name = shown(entry.name) + ('/' if entry.is_dir else '')
        if words.long:
            stamp = time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(entry.mtime))
            name = '%s %12d %s %s' % (stat.filemode(entry.mode), entry.size, stamp, name)
        encoding = sys.stdout.encoding or 'utf-8'
        print(name.encode(encoding, 'backslashreplace').decode(encoding))


def main(words: Optional[Sequence[str]] = None) -> int:
    """The command line; the exit code."""
    parsed = parse_words(words)
    try:
        if parsed.verb == 'serve':
            serve_folder(parsed)
            return 0
        ticket = Ticket.from_pem(read_text(parsed.ticket)) if parsed.ticket else None
        with ChirpClient(parsed.address[0], parsed.address[1], parsed.timeout, ticket) as client:
            (print_listing if parsed.verb == 'ls' else move)(client, parsed)
        return 0
    except (ChirpError, OSError) as error:
        print('chirp.py: %s' % error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == '__main__':
    sys.exit(main())
