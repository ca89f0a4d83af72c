"""The embedded Chirp server: serves one folder, for programs of ours and for those of cctools.

What it is not: a server for the public. It serves whoever proves a secret, or comes from an address that it
was told of; its rights are those of the one ACL that it was given.

Threads: one that accepts (``chirp``), and one per connection (``chirp-N``). ``start``, ``stop``, ``allow``
and ``address`` may be called from any.
"""

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
from typing import Any, Callable, Dict, FrozenSet, Iterable, Iterator, List, Optional, Sequence, Tuple

from chirproot import (
    WALK,
    Root,
    change_mode,
    change_mode_of_shut,
    check_access,
    free_bytes,
    keep_owner,
    open_in,
    remove_folder,
    remove_tree,
    split_path,
    statfs_line,
    write_all,
)
from chirpwire import (
    BAD_FD,
    BLOCK,
    BUSY,
    CHALLENGE,
    CRC32,
    INVALID,
    IS_DIR,
    MEANINGS,
    NO_SPACE,
    NOT_AUTHORIZED,
    PREAD_CRC32,
    PWRITE_CRC32,
    SECRET,
    SLICE,
    SMALL,
    TEMPORARY,
    TOO_BIG,
    TOO_MANY_OPEN,
    ChirpError,
    Disconnected,
    EndOfStream,
    ProtocolError,
    Wire,
    check_unmounted,
    error_line,
    hash_file,
    is_part,
    is_trusted,
    lock_part,
    may_have_changed,
    new_buffer,
    new_hash,
    part_name,
    quote,
    secret_answer,
    stat_line,
    taking,
    unkept,
    unlock_part,
    unquote,
)

log = logging.getLogger('vmhost.chirp')

RIGHTS = 'rwldpaxv'
AUTHENTICATION_TIME = 10.0     # seconds from the connection to a subject
OPEN_FILES = 128               # of one connection
PREAD = 16 * 1024 * 1024       # bytes that a pread gives at most
PWRITE = PREAD                 # and that a pwrite stores at most
ACL_LINES = 1000               # that clients set
NUMBER = re.compile(br'[+-]?[0-9]{1,19}$')
MOST = (1 << 63) - 1           # the highest number on the wire, and the largest size of a file


class Acl:
    """Who may do what in the folder: lines of a subject, in which ``*`` stands for any text, and letters of
    RIGHTS. What clients set for a folder is told back, and opens or closes nothing: who may come in is the
    address's or the secret's to say, and what one may do is the server's. Safe from any thread."""

    def __init__(self, lines: Sequence[Tuple[str, str]]) -> None:
        self._lines = [(subject, in_order(rights)) for subject, rights in lines]
        # Guards the table; nothing is called while it is held.
        self._lock = threading.Lock()
        self._set: Dict[Tuple[bytes, str], str] = {}

    def rights(self, subject: str) -> str:
        """All that the lines give to a subject."""
        return ''.join(rights for pattern, rights in self._lines
                       if fnmatch.fnmatchcase(subject, pattern.replace('[', '[[]').replace('?', '[?]')))

    def set(self, folder: bytes, subject: str, rights: str) -> None:
        """Notes what a client wants for a folder. Raises Fault where there is no room for it."""
        with self._lock:
            self._note(folder, subject, rights)

    def reset(self, folder: bytes, subject: str, rights: str) -> None:
        """Notes that a folder is to be a client's alone, who may go on saying so. Raises Fault likewise."""
        with self._lock:
            self._set = {place: said for place, said in self._set.items() if place[0] != folder}
            for pattern, _ in self._lines:
                self._note(folder, pattern, '')
            self._note(folder, subject, rights + 'a')

    def _note(self, folder: bytes, subject: str, rights: str) -> None:
        if len(self._set) >= ACL_LINES and (folder, subject) not in self._set:
            raise Fault(NO_SPACE)
        self._set[folder, subject] = in_order(rights)

    def text(self, folder: bytes) -> bytes:
        """As getacl says it."""
        lines = dict(self._lines)
        with self._lock:
            lines.update((subject, rights) for (where, subject), rights in self._set.items()
                         if where == folder)
        return ''.join('%s %s\n' % line for line in lines.items() if line[1]).encode('utf-8')


def in_order(rights: str) -> str:
    return ''.join(letter for letter in RIGHTS if letter in rights)


class Fault(Exception):
    """An error reply, with its code."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(MEANINGS[code])


class Holds:
    """Who puts something where, so that two never write into one temporary file or folder, whichever way
    their paths lead there. Safe from any thread."""

    def __init__(self) -> None:
        # Guards the table; nothing is called while it is held.
        self._lock = threading.Lock()
        self._held: Dict[Tuple[int, int, bytes], Tuple[bytes, 'Session']] = {}

    def take(self, place: Tuple[int, int, bytes], mark: bytes, session: 'Session') -> None:
        """From now on the place is that session's. Raises Fault where it is another one's. One with the same
        mark is an earlier connection of the same client, and ends; until it has, what it took in already may
        still be written."""
        with self._lock:
            held = self._held.get(place)
            if held is None or held == (mark, session):
                self._held[place] = mark, session
                return
        if held[0] == mark:
            held[1].interrupt()
        raise Fault(BUSY)

    def leave(self, session: 'Session') -> None:
        """All its places are free."""
        with self._lock:
            self._held = {place: held for place, held in self._held.items() if held[1] is not session}


class Locks:
    """The partial files and folders that a session writes. They are locked as those are that come by a
    fetch: another server may serve the folder, too, or a client on this machine fetch to it."""

    def __init__(self) -> None:
        self._fds: Dict[Tuple[int, int, bytes], int] = {}
        self.wanted = False            # once the session holds a place: others' clients hold none

    def take(self, folder: int, name: bytes, opened: Optional[int] = None) -> None:
        """``opened``: it, where it is open already. Raises Fault where another one has it."""
        if not self.wanted or not is_part(name) or len(self._fds) >= OPEN_FILES:
            return
        place = place_of(folder, name)
        if place in self._fds:
            return
        if opened is not None:
            check_unmounted(opened, folder)
        try:
            fd = os.open(name, LOOKS, dir_fd=folder) if opened is None else os.dup(opened)
        except OSError:                # there is none, or it is a link, which nobody writes to
            return
        try:
            if not lock_part(fd) or not is_still(fd, folder, name):
                raise Fault(BUSY)
        except BaseException:
            os.close(fd)
            raise
        self._fds[place] = fd

    def leave(self, folder: int, name: bytes) -> None:
        """It has its name, or is gone."""
        if self._fds:
            fd = self._fds.pop(place_of(folder, name), None)
            if fd is not None:
                unlock_part(fd)

    def leave_all(self) -> None:
        while self._fds:
            unlock_part(self._fds.popitem()[1])

    def remove_anothers(self, folder: int, name: bytes, found: os.stat_result, begins: bool) -> bool:
        """Removes what isn't trusted where a partial file or folder is to be; whether it was so. ``begins``:
        nothing of it is gone on with. Raises OSError; Fault where that user's own transfer has it."""
        if is_trusted(found, os.fstat(folder)):
            return False
        if not begins:
            raise PermissionError(errno.EPERM, 'another user has made it')
        self.leave(folder, name)
        fd = os.open(name, LOOKS, dir_fd=folder)
        try:
            if not lock_part(fd):
                raise Fault(BUSY)
            remove_tree(folder, name)
        finally:
            os.close(fd)
        return True


LOOKS = os.O_RDONLY | getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_NOCTTY', 0)


def check_place(folder: int, name: bytes) -> None:
    """Raises OSError where something is mounted under that name."""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(name, WALK & ~getattr(os, 'O_DIRECTORY', 0), dir_fd=folder)
        try:
            check_unmounted(fd, folder)
        finally:
            os.close(fd)


def place_of(folder: int, name: bytes) -> Tuple[int, int, bytes]:
    found = os.fstat(folder)
    return found.st_dev, found.st_ino, name


def is_still(fd: int, folder: int, name: bytes) -> bool:
    """Whether what is open has this name there."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=folder, follow_symlinks=False))
    except FileNotFoundError:
        return False


class Session:
    """One connection of a client, on a thread of its own: who it is, and its requests, one by one."""

    def __init__(self, server: 'ChirpServer', sock: socket.socket, peer: str) -> None:
        self.server = server
        self.root = server.root
        self.peer = peer
        self.subject = ''
        self.waits_since: Optional[float] = time.monotonic()       # for a request, with no file open
        self._sock = sock
        self.wire = Wire(sock, AUTHENTICATION_TIME)
        self._rights: FrozenSet[str] = frozenset()
        self._ended = False
        self._names_errors = False
        self._buffer: Optional[memoryview] = None      # once a file passed
        self.locks = Locks()
        self._parts: Dict[type, Part] = {kind: kind(self) for kind in REQUESTS}

    def run(self) -> None:
        """Serves until one side ends it."""
        try:
            self.wire.until = time.monotonic() + AUTHENTICATION_TIME
            if hasattr(self._sock, 'do_handshake'):
                self._shake_hands()
            if self._authenticate():
                log.debug('%s is %s', self.peer, self.subject)
                self.wire.timeout, self.wire.until = self.server.idle_timeout, None
                self._serve()
        except Disconnected as error:
            log.debug('%s: %s', self.peer, error)
        except Exception:              # one connection's end is not the server's
            log.exception('while serving %s', self.peer)
        finally:
            with contextlib.suppress(Disconnected):
                self.wire.flush()      # what was answered before the end
            self.wire.close()
            self._open_files.close_all()
            self.let_go()

    def interrupt(self) -> None:
        """Ends the connection, and so ``run``. Safe from any thread."""
        self._ended = True
        self.wire.interrupt()

    def let_go(self) -> None:
        """Of what it holds."""
        self.server.holds.leave(self)
        self.locks.leave_all()
        if self.root.ours:
            self.root.lead_through_no_link(None)

    def look_up(self) -> None:
        """Raises EndOfStream where it was ended, for what takes long without the wire."""
        if self._ended:
            raise EndOfStream('the server ends it')

    @property
    def _open_files(self) -> Any:
        return self._parts[OpenFiles]

    def need(self, rights: str) -> None:
        """Raises Fault unless the client has one of these."""
        if self._rights.isdisjoint(rights):
            raise Fault(NOT_AUTHORIZED)

    def greet(self, version: bytes) -> None:
        """The client is one of ours: names and modes are what they are from now on, and from version 2 on it
        takes errnos' names."""
        self._names_errors = version != b'1'
        if not self.root.ours:
            self.root = self.root.for_ours()

    @property
    def least(self) -> int:
        """The rights of its own that an owner keeps whatever mode is asked for: the programs of cctools count
        on them."""
        return 0 if self.root.ours else 0o700

    @property
    def buffer(self) -> memoryview:
        """What content passes through."""
        if self._buffer is None:
            self._buffer = new_buffer()
        return self._buffer

    def receive(self, fd: int, count: int, offset: int, holes: bool = True, checksum: Any = None) -> None:
        """Content for a file, added to a checksum. All of it is read from the wire, even where it can't be
        written."""
        deadline = self.wire.deadline(count)
        while count:
            got = self.wire.read_into(self.buffer[:min(count, BLOCK)], deadline)
            count -= got
            try:
                write_all(fd, self.buffer[:got], offset, holes)
            except OSError:
                self.wire.skip(count)
                raise
            if checksum is not None:
                checksum.update(self.buffer[:got])
            offset += got

    def check_announced(self, count: int) -> None:
        """More than the disk has room for isn't waited for: it would keep this connection for years."""
        if count > PWRITE and count > self.root.free_bytes():
            raise ProtocolError('%d bytes are announced, which no file here could hold' % count)

    @contextlib.contextmanager
    def announced(self, count: int) -> Iterator[None]:
        """Data that follows a request whatever becomes of it."""
        self.check_announced(count)
        try:
            yield
        except (Fault, OSError):
            self.wire.skip(count)
            raise

    def _shake_hands(self) -> None:
        self._sock.settimeout(AUTHENTICATION_TIME)
        try:
            self._sock.do_handshake()          # type: ignore
        except (OSError, ValueError) as error:
            raise Disconnected('no TLS: %s' % error)
        self._sock.settimeout(SLICE)

    def _authenticate(self) -> bool:
        assert self.wire.until is not None
        while time.monotonic() < self.wire.until:
            method = self.wire.line().decode('ascii', 'replace')
            if method != self.server.auth:
                self.wire.put(b'no\n')
            elif method == SECRET:
                self.wire.put(b'yes\n')
                if self._knows_secret():
                    self._admit(method, self.server.id)
                    return True
                self.wire.put(b'no\n')
            else:
                self.wire.put(b'yes\n')
                self._admit(method, self.peer)
                return True
        return False

    def _knows_secret(self) -> bool:
        import hmac
        challenge = os.urandom(CHALLENGE).hex().encode('ascii')
        self.wire.put(challenge + b'\n')
        answer = secret_answer(self.server.secret, self.server.id, challenge)
        return hmac.compare_digest(answer, self.wire.line().lower())

    def _admit(self, method: str, name: str) -> None:
        self.wire.put(('yes\nyes\n%s\n%s\n' % (method, name)).encode('ascii', 'replace'))
        self.subject = '%s:%s' % (method, name)
        self.root.look_again()
        self._rights = frozenset(self.server.acl.rights(self.subject))

    def _serve(self) -> None:
        while True:
            self.waits_since = None if self._open_files else time.monotonic()
            line = self.wire.line()
            self.waits_since = None
            if line.startswith(b'\x04'):
                return
            words = line.replace(b'\t', b' ').split()
            if words:
                self.wire.put(self._answer(line, words))

    def _answer(self, line: bytes, words: List[bytes]) -> bytes:
        kind, name, count, right = COMMANDS.get(words[0], COMMANDS[b'unknown'])
        try:
            if line[:1] in b' \t' or len(words) <= count:
                raise Fault(INVALID)
            if words[0] in RAW_PATHS:
                words = line.split(None, count)
            if right:
                self.need(right)
            if words[0] in WITH_MORE:
                count += 1
            return getattr(self._parts[kind], name)(*words[1:count + 1])
        except Fault as fault:
            return b'%d\n' % fault.code
        except OSError as error:
            return error_line(error, self._names_errors)
        except MemoryError:
            return b'-7\n'


class Part:
    """Some of the requests of a session: methods that take words and give the reply."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._wire = session.wire

    @property
    def _root(self) -> Root:
        return self._session.root

    @contextlib.contextmanager
    def _opened(self, path: bytes, flags: int = os.O_RDONLY) -> Iterator[int]:
        fd = self._root.open(path, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _file(self, path: bytes) -> Iterator[int]:
        """A file, to read. Raises Fault for a folder."""
        with self._opened(path) as fd:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise Fault(IS_DIR)
            yield fd

    def _check_target(self, fd: int, name: bytes) -> Optional[os.stat_result]:
        """What a file of that name would replace. Raises Fault where it may be neither written nor made."""
        try:
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            self._session.need('wp')
            return None
        self._session.need('w')
        if stat.S_ISDIR(found.st_mode):
            raise Fault(IS_DIR)
        if not stat.S_ISREG(found.st_mode):
            raise Fault(INVALID)
        check_access(fd, name, os.W_OK)
        return found


class WholeFiles(Part):
    """Requests for a whole file, and for checksums."""

    def getfile(self, path: bytes) -> bytes:
        with self._file(unquote(path)) as fd:
            size = os.fstat(fd).st_size
            if size > SMALL:
                self._wire.put(b'%d\n' % size)
                self._wire.send_file(fd, 0, size)
                return b''
            # One that says that it has no bytes may have some: those of /proc do.
            data = read_to_end(fd) if not size else os.read(fd, size)
            return b'%d\n' % len(data) + data

    def putfile(self, path: bytes, mode: bytes, length: bytes) -> bytes:
        bits, count = number(mode), number(length)
        if count < 0:
            raise Fault(INVALID)
        with self._replacement(path, bits) as fd:
            if count > free_bytes(fd):
                raise Fault(NO_SPACE)
            self._wire.put(b'0\n')
            self._session.receive(fd, count, 0)
        return b'%d\n' % count

    @contextlib.contextmanager
    def _replacement(self, path: bytes, mode: int) -> Iterator[int]:
        """A new file to write to, which takes its place under its name if all goes well."""
        with self._root.changing(unquote(path)) as (fd, name):
            old = self._check_target(fd, name)
            temporary = TEMPORARY + os.urandom(8).hex().encode('ascii')
            file = open_in(fd, temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                yield file
                if old is not None:
                    keep_owner((fd, temporary), (fd, name), old)
                with taking():         # one of ours is told with the time
                    change_mode(file, mode, self._session.least)
                os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=fd)
                raise
            finally:
                os.close(file)

    def getstream(self, path: bytes) -> bytes:
        with self._file(best_path(self._root, path)) as fd:
            self._wire.put(b'0\n')
            self._wire.send_file(fd, 0, os.fstat(fd).st_size)
        raise EndOfStream('the end of a stream')

    def putstream(self, path: bytes) -> bytes:
        with self._replacement(best_path(self._root, path), 0o644) as fd:
            self._wire.put(b'0\n')
            at, buffer = 0, self._session.buffer
            with contextlib.suppress(EndOfStream):
                while True:
                    got = self._wire.read_into(buffer)
                    write_all(fd, buffer[:got], at)
                    at += got
        raise EndOfStream('the end of a stream')

    def hash(self, algorithm: bytes, path: bytes) -> bytes:
        if algorithm not in (b'md5', b'sha1'):
            raise Fault(INVALID)
        return self._digest(algorithm.decode(), path, 0, MOST)

    def md5(self, path: bytes) -> bytes:
        return self._digest('md5', path, 0, MOST)

    def crc32(self, path: bytes, offset: bytes, length: bytes) -> bytes:
        """Of ours alone."""
        start, count = number(offset), number(length)
        if start < 0 or count < 0:
            raise Fault(INVALID)
        return self._digest(CRC32, unquote(path), start, count)

    def _digest(self, algorithm: str, path: bytes, start: int, count: int) -> bytes:
        with self._file(path if algorithm == CRC32 else best_path(self._root, path)) as fd:
            self._wire.flush()
            start = min(start, os.fstat(fd).st_size)
            with open(fd, 'rb', buffering=0, closefd=False) as file:
                digest = hash_file(file, algorithm, start, count, self._session.look_up, self._session.buffer)
        return b'%d\n' % len(digest) + digest


class OpenFile:
    """What a client has open."""
    __slots__ = ('fd', 'found', 'seen', 'reads', 'writes', 'appends')

    def __init__(self, fd: int, found: os.stat_result, reads: bool, writes: bool, appends: bool) -> None:
        self.fd = fd
        self.found = found             # what it was when it was opened …
        self.seen = time.time()        # … and when that was
        self.reads = reads
        self.writes = writes
        self.appends = appends


class OpenFiles(Part):
    """Requests for files that stay open between them."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._files: Dict[int, OpenFile] = {}

    def __len__(self) -> int:
        return len(self._files)

    def close_all(self) -> None:
        for fd in list(self._files):
            os.close(self._files.pop(fd).fd)

    def open(self, path: bytes, flags: bytes, mode: bytes) -> bytes:
        reads, writes = b'r' in flags, b'w' in flags or b'a' in flags
        how = os.O_RDWR if reads and writes else os.O_WRONLY if writes else os.O_RDONLY
        for letter, flag in ((b'c', os.O_CREAT), (b't', os.O_TRUNC), (b'x', os.O_EXCL),
                             (b'a', os.O_APPEND), (b's', os.O_SYNC)):
            if letter in flags:
                how |= flag
        candidate = self._free_number()
        find = self._root.changing if writes else self._root.parent
        with find(unquote(path)) as (fd, name):
            if writes:
                there = self._check_target(fd, name)
                if is_part(name) and (there is None or self._session.locks.remove_anothers(
                        fd, name, there, b't' in flags)):
                    how |= os.O_EXCL   # else another user's may come meanwhile
            else:
                self._session.need('rl')
                how &= ~(os.O_CREAT | os.O_TRUNC | os.O_EXCL)
            opened = open_in(fd, name, how & ~os.O_TRUNC, number(mode) & 0o777 | 0o600)
            try:
                if writes:
                    self._session.locks.take(fd, name, opened)
                if how & os.O_TRUNC:
                    os.ftruncate(opened, 0)
            except BaseException:
                os.close(opened)
                raise
        found = os.fstat(opened)
        file = OpenFile(opened, found, reads or not writes, writes, b'a' in flags)
        if not writes:
            try:
                self._session.need('l' if stat.S_ISDIR(found.st_mode) else 'r')
            except Fault:
                os.close(opened)
                raise
        self._files[candidate] = file
        return b'%d\n' % candidate + stat_line(found)

    def _free_number(self) -> int:
        for candidate in range(OPEN_FILES):
            if candidate not in self._files:
                return candidate
        raise Fault(TOO_MANY_OPEN)

    def _find(self, word: bytes, writes: bool = False) -> OpenFile:
        file = self._files.get(number(word))
        if file is None or writes and not file.writes:
            raise Fault(BAD_FD)
        return file

    def close(self, word: bytes) -> bytes:
        self._find(word)
        os.close(self._files.pop(number(word)).fd)
        return b'0\n'

    def pread(self, word: bytes, length: bytes, offset: bytes) -> bytes:
        return self._pread(word, length, offset)

    def preadcrc32(self, word: bytes, length: bytes, offset: bytes) -> bytes:
        """Of ours alone: the same, and after the content its CRC-32."""
        return self._pread(word, length, offset, new_hash(CRC32))

    def _pread(self, word: bytes, length: bytes, offset: bytes, checksum: Any = None) -> bytes:
        file, count, at = self._find(word), number(length), number(offset)
        if not file.reads:
            raise Fault(BAD_FD)
        if count < 0 or at < 0:
            raise Fault(INVALID)
        count = min(count, PREAD)
        if count <= SMALL:
            data = os.pread(file.fd, count, at)
            if checksum is None:
                return b'%d\n' % len(data) + data
            checksum.update(data)
            return b'%d\n' % len(data) + data + checksum.digest()  # type: ignore[no-any-return]
        found = os.fstat(file.fd)
        if stat.S_ISDIR(found.st_mode):
            raise Fault(IS_DIR)
        count = max(0, min(count, found.st_size - at))
        self._wire.put(b'%d\n' % count)
        if checksum is None:
            self._wire.send_file(file.fd, at, count)
            return b''
        with open(file.fd, 'rb', buffering=0, closefd=False) as content:
            content.seek(at)
            self._wire.send_copy(content, count, self._session.buffer, checksum)
        return checksum.digest()  # type: ignore[no-any-return]

    def pwrite(self, word: bytes, length: bytes, offset: bytes) -> bytes:
        return b'%d\n' % self._pwrite(word, length, offset)

    def pwritecrc32(self, word: bytes, length: bytes, offset: bytes) -> bytes:
        """Of ours alone: the same, and after the count the CRC-32 of what was written."""
        checksum = new_hash(CRC32)
        return b'%d\n' % self._pwrite(word, length, offset, checksum) + checksum.digest()

    def _pwrite(self, word: bytes, length: bytes, offset: bytes, checksum: Any = None) -> int:
        count = number(length)
        if count < 0:
            raise Fault(INVALID)
        with self._session.announced(count):
            file, at = self._find(word, True), number(offset)
            if at < 0 or at + count > MOST:
                raise Fault(INVALID)
        stored = min(count, PWRITE)
        self._session.receive(file.fd, stored, at, not file.appends, checksum)
        self._wire.skip(count - stored)
        return stored

    def fstat(self, word: bytes) -> bytes:
        return b'0\n' + stat_line(os.fstat(self._find(word).fd))

    def fchanged(self, word: bytes) -> bytes:
        """Of ours alone: 1 where the file may have changed since it was opened, else 0."""
        file = self._find(word)
        return b'%d\n' % may_have_changed(file.found, file.seen, os.fstat(file.fd))

    def fsync(self, word: bytes) -> bytes:
        os.fsync(self._find(word).fd)
        return b'0\n'

    def ftruncate(self, word: bytes, length: bytes) -> bytes:
        os.ftruncate(self._find(word, True).fd, number(length))
        return b'0\n'

    def fchmod(self, word: bytes, mode: bytes) -> bytes:
        change_mode(self._find(word).fd, number(mode), self._session.least)
        return b'0\n'

    def fchown(self, word: bytes, user: bytes, group: bytes) -> bytes:
        self._find(word)
        return b'0\n'

    def fstatfs(self, word: bytes) -> bytes:
        return statfs_line(self._find(word).fd)


class Names(Part):
    """Requests for folders, and for what has a name."""

    def getlongdir(self, path: bytes) -> bytes:
        say = quote if self._root.ours else bytes      # type: Callable[[bytes], bytes]
        return self._list(path, lambda name, found: say(name) + b'\n' + stat_line(found))

    def getdir(self, path: bytes) -> bytes:
        return self._list(path, lambda name, found: name + b'\n')

    def _list(self, path: bytes, say: Callable[[bytes, os.stat_result], bytes]) -> bytes:
        entries = self._root.list(unquote(path))
        with contextlib.closing(entries):      # type: ignore
            first = next(entries)              # raises if it can't be listed
            self._wire.put(b'0\n' + say(*first))
            for entry in entries:
                self._wire.put(say(*entry))
        return b'\n'

    def stat(self, path: bytes) -> bytes:
        return b'0\n' + stat_line(self._root.stat(unquote(path)))

    def lstat(self, path: bytes) -> bytes:
        return b'0\n' + stat_line(self._root.stat(unquote(path), False))

    def mkdir(self, path: bytes, mode: bytes) -> bytes:
        with self._root.changing(unquote(path), False) as (fd, name):
            try:
                os.mkdir(name, number(mode) & 0o777 | 0o700, dir_fd=fd)
            except FileExistsError:
                if any(map(is_part, split_path(unquote(path)))):
                    check_place(fd, name)      # which the client is going to clear
                there = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if not is_part(name) or not self._session.locks.remove_anothers(fd, name, there, True):
                    raise
                os.mkdir(name, number(mode) & 0o777 | 0o700, dir_fd=fd)
            finally:
                self._session.locks.take(fd, name)
        return b'0\n'

    def unlink(self, path: bytes) -> bytes:
        with self._root.changing(unquote(path), False, removes=True) as (fd, name):
            os.unlink(name, dir_fd=fd)
            self._session.locks.leave(fd, name)
        return b'0\n'

    def rmdir(self, path: bytes) -> bytes:
        with self._root.changing(unquote(path), False) as (fd, name):
            remove_folder(fd, name)
        return b'0\n'

    def rmall(self, path: bytes) -> bytes:
        with self._root.changing(unquote(path), False, removes=True) as (fd, name):
            if name == b'.':
                raise Fault(NOT_AUTHORIZED)
            remove_tree(fd, name)
            self._session.locks.leave(fd, name)
        return b'0\n'

    def rename(self, old: bytes, new: bytes) -> bytes:
        self._session.need('d')
        with self._root.changing(unquote(old), False) as (old_fd, old_name), \
                self._root.changing(unquote(new), False) as (new_fd, new_name):
            os.rename(old_name, new_name, src_dir_fd=old_fd, dst_dir_fd=new_fd)
            self._session.locks.leave(old_fd, old_name)
        return b'0\n'

    def replace(self, old: bytes, new: bytes) -> bytes:
        """Of ours alone: ``rename`` of a file, which gets the owner, and the access list, of the one that it
        replaces."""
        with contextlib.suppress(FileNotFoundError), self._root.changing(unquote(old), False) as part, \
                self._root.changing(unquote(new), False) as (fd, name):
            there = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISREG(there.st_mode):
                keep_owner(part, (fd, name), there)
        return self.rename(old, new)

    def hold(self, path: bytes, mark: bytes) -> bytes:
        """Of ours alone: nobody else may put something there until this connection ends, or lets go."""
        with self._root.changing(unquote(path)) as (fd, name):
            self._session.server.holds.take(place_of(fd, name), mark, self._session)
            self._session.locks.wanted = True
            try:
                self._session.locks.take(fd, part_name(name))
            except Fault:
                self._session.let_go()
                raise
        return b'0\n'

    def nolinks(self, path: bytes) -> bytes:
        """Of ours alone: below that folder no link leads on, until this connection ends, or lets go."""
        if not self._root.ours:
            raise Fault(INVALID)
        self._root.lead_through_no_link(unquote(path))
        return b'0\n'

    def letgo(self) -> bytes:
        """Of ours alone: of what it holds, and of ``nolinks``."""
        self._session.let_go()
        return b'0\n'

    def link(self, old: bytes, new: bytes) -> bytes:
        self._session.need('r')
        with self._root.changing(unquote(old)) as (old_fd, old_name), \
                self._root.changing(unquote(new), False) as (new_fd, new_name):
            os.link(old_name, new_name, src_dir_fd=old_fd, dst_dir_fd=new_fd, follow_symlinks=False)
        return b'0\n'

    def symlink(self, target: bytes, new: bytes) -> bytes:
        with self._root.changing(unquote(new), False) as (fd, name):
            os.symlink(unquote(target), name, dir_fd=fd)
        return b'0\n'

    def readlink(self, path: bytes, length: bytes) -> bytes:
        with self._root.parent(unquote(path), False) as (fd, name):
            target = os.readlink(name, dir_fd=fd)[:max(0, number(length))]
        return b'%d\n' % len(target) + target

    def chmod(self, path: bytes, mode: bytes) -> bytes:
        with self._root.changing(unquote(path)) as (folder, name):     # raises where it may not be changed
            with taking(self._root.ours):
                try:
                    with self._opened(unquote(path)) as fd:
                        change_mode(fd, number(mode), self._session.least)
                except PermissionError as error:
                    if not hasattr(os, 'O_PATH') or error.errno != errno.EACCES:
                        raise
                    change_mode_of_shut(folder, name, number(mode), self._session.least)
            return self._kept(folder, name, number(mode), None)

    def _kept(self, folder: int, name: bytes, mode: Optional[int], mtime: Optional[int]) -> bytes:
        """The reply to what sets them: to a program of ours with what the disk hasn't kept."""
        if not self._root.ours:
            return b'0\n'
        return b'%d\n' % unkept(os.stat(name, dir_fd=folder, follow_symlinks=False), mode, mtime)

    def chown(self, path: bytes, user: bytes, group: bytes) -> bytes:
        self._root.stat(unquote(path), False)
        return b'0\n'

    lchown = chown

    def utime(self, path: bytes, atime: bytes, mtime: bytes, *mode: bytes) -> bytes:
        """``mode``: of ours alone, that which the file should have by now."""
        with self._root.changing(unquote(path)) as (fd, name):
            with taking(self._root.ours):
                os.utime(name, (number(atime), number(mtime)), dir_fd=fd, follow_symlinks=False)
            return self._kept(fd, name, number(mode[0]) if mode else None, number(mtime))

    def truncate(self, path: bytes, length: bytes) -> bytes:
        with self._opened(unquote(path), os.O_WRONLY) as fd:
            os.ftruncate(fd, number(length))
        return b'0\n'

    def access(self, path: bytes, mask: bytes) -> bytes:
        bits = number(mask) & 7
        with self._root.parent(unquote(path)) as (fd, name):
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            self._session.need('l' if stat.S_ISDIR(found.st_mode) else 'r')
            if bits & os.W_OK:
                self._session.need('w')
            check_access(fd, name, bits)
        return b'0\n'

    def statfs(self, path: bytes) -> bytes:
        with self._opened(unquote(path)) as fd:
            return statfs_line(fd)


class Identity(Part):
    """Requests for who and where one is, and what is refused."""

    def vmhost(self, version: bytes) -> bytes:
        """Of ours alone: the client is one, too. Told is where the folder is."""
        self._session.greet(version)
        path = os.fsencode(self._root.path)
        return b'%d\n' % len(path) + path

    def whoami(self, length: bytes) -> bytes:
        if number(length) < 0:
            raise Fault(INVALID)
        subject = self._session.subject.encode('ascii', 'replace')[:number(length)]
        return b'%d\n' % len(subject) + subject

    def getacl(self, path: bytes) -> bytes:
        return b'0\n' + self._session.server.acl.text(self._folder(path)) + b'\n'

    def setacl(self, path: bytes, subject: bytes, rights: bytes) -> bytes:
        """See ``Acl``."""
        who = unquote(subject).decode('utf-8', 'replace')
        self._session.server.acl.set(self._folder(path, alone=True), who, rights.decode('ascii', 'replace'))
        return b'0\n'

    def resetacl(self, path: bytes, rights: bytes) -> bytes:
        """See ``Acl``."""
        self._session.server.acl.reset(self._folder(path, alone=True), self._session.subject,
                                       rights.decode('ascii', 'replace'))
        return b'0\n'

    def _folder(self, path: bytes, alone: bool = False) -> bytes:
        """Of something that is there; ``alone``: of a folder alone."""
        if not stat.S_ISDIR(self._root.stat(unquote(path)).st_mode) and alone:
            raise NotADirectoryError(errno.ENOTDIR, 'not a directory')
        return b'/' + b'/'.join(split_path(unquote(path)))

    def localpath(self, path: bytes) -> bytes:
        name = b'/' + b'/'.join(split_path(best_path(self._root, path)))
        return b'%d\n' % len(name) + name


class Refusals(Part):
    """Requests that are refused."""

    def unknown(self) -> bytes:
        raise Fault(INVALID)

    def thirdput(self) -> bytes:
        raise Fault(NOT_AUTHORIZED)

    debug = whoareyou = thirdput

    def setxattr(self, first: bytes, second: bytes, third: bytes) -> bytes:
        """Data follows: ``setxattr P NAME LENGTH``."""
        with self._session.announced(max(0, number(third))):
            raise Fault(INVALID)

    fsetxattr = lsetxattr = ticket_register = setxattr

    def swrite(self, first: bytes, second: bytes) -> bytes:
        """The same: ``swrite FD LENGTH``."""
        with self._session.announced(max(0, number(second))):
            raise Fault(INVALID)


# What is understood: how many words follow, and of which rights one is needed at least.
REQUESTS: Dict[type, Dict[str, Tuple[int, str]]] = {
    WholeFiles: {
        'getfile': (1, 'r'), 'putfile': (3, 'wp'), 'getstream': (1, 'r'), 'putstream': (1, 'wp'),
        'hash': (2, 'r'), 'md5': (1, 'r'), 'crc32': (3, 'r')},
    OpenFiles: {
        'open': (3, ''), 'close': (1, ''), 'pread': (3, ''), 'pwrite': (3, ''), 'fstat': (1, ''),
        PREAD_CRC32: (3, ''), PWRITE_CRC32: (3, ''),
        'fchanged': (1, ''), 'fsync': (1, ''), 'ftruncate': (2, ''), 'fchmod': (2, 'w'), 'fchown': (3, 'w'),
        'fstatfs': (1, '')},
    Names: {
        'getlongdir': (1, 'l'), 'getdir': (1, 'l'), 'stat': (1, 'l'), 'lstat': (1, 'l'), 'mkdir': (2, 'wv'),
        'unlink': (1, 'd'), 'rmdir': (1, 'd'), 'rmall': (1, 'd'), 'rename': (2, 'w'), 'replace': (2, 'w'),
        'hold': (2, 'wp'), 'nolinks': (1, ''), 'letgo': (0, ''),
        'link': (2, 'w'), 'symlink': (2, 'w'), 'readlink': (2, 'r'), 'chmod': (2, 'w'), 'chown': (3, 'w'),
        'lchown': (3, 'w'), 'utime': (3, 'w'), 'truncate': (2, 'w'), 'access': (2, ''), 'statfs': (1, 'l')},
    Identity: {
        'vmhost': (1, ''), 'whoami': (1, ''), 'getacl': (1, ''), 'setacl': (3, 'wa'), 'resetacl': (2, 'wa'),
        'localpath': (1, 'l')},
    Refusals: {
        'thirdput': (0, ''), 'debug': (0, ''), 'whoareyou': (0, ''), 'swrite': (2, ''),
        'setxattr': (3, ''), 'fsetxattr': (3, ''), 'lsetxattr': (3, ''), 'ticket_register': (3, ''),
        'unknown': (0, '')}}
COMMANDS = {word.encode('ascii'): (kind, word, count, right) for kind, requests in REQUESTS.items()
            for word, (count, right) in requests.items()}

# Requests with a word that may be left out.
WITH_MORE = frozenset((b'utime',))

# Requests whose path the real clients send as it is, not quoted: it is the rest of the line.
RAW_PATHS = frozenset((b'hash', b'localpath', b'getstream', b'putstream'))


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


def read_to_end(fd: int) -> bytes:
    """What is in a file that doesn't know its size. Raises Fault where that is more than goes in a reply."""
    data = b''
    while True:
        more = os.read(fd, BLOCK)
        if not more:
            return data
        data += more
        if len(data) > PREAD:
            raise Fault(TOO_BIG)


# --- the server ------------------------------------------------------------------------------

CLIENTS = 32                   # connections at once
IDLE = 300.0                   # seconds that a client may say nothing
SPARE = 1.0                    # and that one is left alone that says nothing while others wait
KEEPALIVE = (('TCP_KEEPIDLE', 60), ('TCP_KEEPINTVL', 20), ('TCP_KEEPCNT', 3))    # where there is such a thing


class ChirpServer:
    """Serves a folder, ``root``. Threads: see above.

    ``auth``: ``address``: whoever comes from one of the addresses of ``allow`` is let in. ``secret``: whoever
    proves to know the secret (bytes) of the guest of that ``id``, from anywhere, or, where ``allow`` is
    given, from those addresses. ``rights``: of r, w, l, d. ``shown``: {name: folder} of what can be read as
    ``/NAME``, and never changed. ``tls``: an ssl.SSLContext with a certificate: then nobody is served without
    TLS. Raises OSError where it can't listen, ChirpError for arguments that make no sense.
    """

    def __init__(self, root: str, host: str = '127.0.0.1', port: int = 0,
                 allow: Optional[Iterable[str]] = None, rights: str = 'rwld', auth: str = 'address',
                 secret: bytes = b'', id: str = '', tls: Any = None, max_clients: int = CLIENTS,
                 idle_timeout: float = IDLE, shown: Optional[Dict[str, str]] = None) -> None:
        if auth not in ('address', SECRET):
            raise ChirpError('auth is address or secret, not %s' % auth)
        if auth == SECRET and not (secret and id):
            raise ChirpError('auth=secret needs a secret and an id')
        self.root = Root(root, shown)
        self.holds = Holds()
        self.auth = auth
        self.secret = secret
        self.id = id
        self.tls = tls
        self.idle_timeout = idle_timeout
        self._where = (host, port)
        self._rights = rights
        self._max_clients = max_clients
        # Guards the list of sessions; nothing but starting and closing happens while it is held.
        self._lock = threading.Lock()
        self._sessions: Dict[threading.Thread, Session] = {}
        self._ended = threading.Event()        # one of them has
        self._count = 0
        self._stopping = False
        self._listener: Optional[socket.socket] = None
        self._address = '', 0
        self._thread: Optional[threading.Thread] = None
        self.allow(None if auth == SECRET and allow is None else allow or ())

    def allow(self, addresses: Optional[Iterable[str]]) -> None:
        """From now on these addresses may connect, and no other; connections of others end. None: all may,
        who then have to prove the secret."""
        if addresses is None and self.auth != SECRET:
            raise ChirpError('auth=address needs addresses')
        self._allowed = None if addresses is None else frozenset(addresses)
        subjects = (['%s:%s' % (SECRET, self.id)] if self.auth == SECRET else
                    ['address:' + address for address in sorted(self._allowed or ())])
        self.acl = Acl([(subject, self._rights) for subject in subjects])
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            if not self._admits(session.peer):
                session.interrupt()

    def _admits(self, peer: str) -> bool:
        return self._allowed is None or peer in self._allowed

    @property
    def address(self) -> Tuple[str, int]:
        """Host and port that it listens on, or listened: another thread may ask while it is stopped."""
        if self._listener is None:
            raise ChirpError('the server is not started')
        return self._address

    def start(self) -> 'ChirpServer':
        """Listens and returns. Where it can't, it closes the folder, and is of no more use."""
        try:
            self._listener = listen(*self._where)
        except OSError:
            self.root.close()
            raise
        self._address = self._listener.getsockname()[:2]
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name='chirp', daemon=True)
        self._thread.start()
        log.info('serving %s on %s:%d', self.root.path, *self.address)
        if self.auth == 'address' and self.address[0].startswith(('127.', '::1')):
            log.warning('files are open to every user of this machine: auth=address, on %s', self.address[0])
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
                if self._has_room():
                    self._accept()
                else:
                    self._ended.wait(0.1)      # who comes waits in the backlog

    def _has_room(self) -> bool:
        """Whether one more can be served; if not, who has been silent for the longest time is let go."""
        self._ended.clear()
        with self._lock:
            if len(self._sessions) < self._max_clients:
                return True
            sessions = list(self._sessions.values())
        silent = [(since, session) for since, session in (
            (session.waits_since, session) for session in sessions)
            if since is not None and since + SPARE < time.monotonic()]
        if silent:
            min(silent, key=lambda each: each[0])[1].interrupt()
        return False

    def _accept(self) -> None:
        try:
            sock, peer = self._listener.accept()       # type: ignore
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                log.warning('a client can\'t be served: %s', error)
                time.sleep(0.1)        # the backlog stays ready: don't turn in a tight loop
            return
        if not self._admits(peer[0]) or not self._begin(sock, peer[0]):
            log.info('%s is turned away', peer[0])
            sock.close()

    def _begin(self, sock: socket.socket, peer: str) -> bool:
        notice_death(sock)
        if self.tls is not None:
            sock = self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        session = Session(self, sock, peer)
        with self._lock:
            if self._stopping:
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
            self._ended.set()


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
    name = host  # type: Any
    with contextlib.suppress(UnicodeEncodeError):
        name = host.encode('ascii')        # as text, Python would load its tables for names of all languages
    family, kind, protocol, _, where = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
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
