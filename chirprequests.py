"""The requests of the Chirp protocol, one by one, on a connection of their own.

No threads; an object belongs to one thread at a time.
"""

import bisect
import contextlib
import errno
import os
import re
import socket
import stat
import struct
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, TypeVar

from chirpticket import CHALLENGE, Ticket
from chirpwire import (
    CODES,
    COMMON,
    CRC32,
    GMAC,
    IS_DIR,
    LINE,
    PORT,
    RESERVED,
    STAT_LINE,
    AccessDenied,
    Disconnected,
    EndOfStream,
    Path,
    ProtocolError,
    Refused,
    Stat,
    TimedOut,
    Wire,
    computes,
    new_hash,
    parse_stat,
    quote,
    shown,
    to_text,
)

LARGE = 64 * 1024 * 1024       # a file from here on, OpenSSL is worth the time of loading it
PIECE = 4 * 1024 * 1024        # bytes that one pread or pwrite of the client moves
SLOWEST_HASH = 2 * 1024 * 1024         # and of which it must compute a checksum


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
        self._records: List[bytes] = []
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
        self.cancel: Optional[threading.Event] = None
        self.subject = ''              # who the server says that we are
        self._wire: Optional[Wire] = None
        self._used = False             # whether this connection has answered a request
        self._knows: Dict[str, bool] = {}    # checksums, once it was asked for

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
        deadline = wire.deadline(LISTING)
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
        lines: List[Tuple[str, str]] = []
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


PART = b'.vmhost-part'         # how the name of what isn't whole yet ends; nobody else's does
