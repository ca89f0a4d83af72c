"""The embedded Chirp server.

Threads: one that accepts (``chirp``), and one per connection (``chirp-N``).
"""

import collections
import contextlib
import errno
import fnmatch
import logging
import os
import re
import selectors
import socket
import stat
import threading
import time
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from chirproot import (
    TEMPORARY,
    Root,
    change_mode,
    free_bytes,
    hash_file,
    open_in,
    remove_folder,
    remove_tree,
    split_path,
    statfs_line,
    write_all,
)
from chirpticket import CHALLENGE, HOST_SUBJECT, SIGNATURE, PublicKey
from chirpwire import (
    BAD_FD,
    BLOCK,
    CODES,
    CRC32,
    GMAC,
    INVALID,
    IS_DIR,
    MEANINGS,
    NO_SPACE,
    NOT_AUTHORIZED,
    SMALL,
    TOO_MANY_OPEN,
    ChirpError,
    Disconnected,
    EndOfStream,
    ProtocolError,
    Wire,
    computes,
    new_buffer,
    new_hash,
    send_passing,
    stat_line,
    unquote,
)

log = logging.getLogger('vmhost.chirp')


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
        self.checksum: Any = None
        self.hashed = 0                # bytes that went into it
        self.before: Optional[Tuple[int, ...]] = None    # its state after the last of it
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
        self._known: collections.OrderedDict = collections.OrderedDict()
        self._writers: Dict[Tuple[int, int], List[OpenFile]] = {}

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
        self._files: Dict[int, OpenFile] = {}
        self._buffer: Optional[memoryview] = None    # once a file passed

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
        deadline = self._wire.deadline(count)
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
        with self._root.parent(unquote(path), write=writes) as (fd, name):
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
        with self._root.parent(unquote(path), False, write=False) as (fd, name):
            target = os.readlink(name, dir_fd=fd)[:max(0, number(length))]
        return b'%d\n' % len(target) + target

    def _chmod(self, path: bytes, mode: bytes) -> bytes:
        with self._opened(path) as fd:
            change_mode(fd, number(mode))
        return b'0\n'

    @contextlib.contextmanager
    def _opened(self, path: bytes, flags: int = os.O_RDONLY, write: bool = True) -> Iterator[int]:
        fd = self._root.open(unquote(path), flags, write=write)
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
        with self._root.parent(unquote(path), write=bool(bits & os.W_OK)) as (fd, name):
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            self._need('l' if stat.S_ISDIR(found.st_mode) else 'r')
            if bits & os.W_OK:
                self._need('w')
            if not os.access(name, bits, dir_fd=fd):
                raise Fault(NOT_AUTHORIZED)
        return b'0\n'

    def _statfs(self, path: bytes) -> bytes:
        with self._opened(path, write=False) as fd:
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


# --- the server ------------------------------------------------------------------------------

CLIENTS = 32                   # connections at once
IDLE = 300.0                   # seconds that a client may say nothing
KEEPALIVE = (('TCP_KEEPIDLE', 60), ('TCP_KEEPINTVL', 20), ('TCP_KEEPCNT', 3))    # where there is such a thing


class ChirpServer:
    """Serves a folder to the addresses that it is told of. Threads: see above.

    ``auth``: ``address``, or ``ticket``: then only the owner of the private part of ``ticket`` (a public
    key, PEM) is let in, and nobody until it is known. ``shown``: see Root. Raises OSError where it can't
    listen.
    """

    def __init__(self, root: str, host: str = '127.0.0.1', port: int = 0,
                 allow: Optional[Iterable[str]] = None, rights: str = 'rwld',
                 auth: str = 'address', ticket: str = '', max_clients: int = CLIENTS,
                 idle_timeout: float = IDLE, shown: Optional[Dict[str, str]] = None) -> None:
        self.root = Root(root, shown)
        self.checksums = Checksums()
        self.auth = auth
        self.ticket: Optional[PublicKey] = None
        self.idle_timeout = idle_timeout
        self._where = (host, port)
        self._rights = rights
        self._max_clients = max_clients
        # Guards the list of sessions; nothing but starting and closing happens while it is held.
        self._lock = threading.Lock()
        self._sessions: Dict[threading.Thread, Session] = {}
        self._count = 0
        self._stopping = False
        self._listener: Optional[socket.socket] = None
        self._thread: Optional[threading.Thread] = None
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
