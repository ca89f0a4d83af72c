"""The requests of the Chirp protocol on a connection to a server, one by one.

What it is not: that connection (chirpchannel.py), nor a mover of files and folders (chirpclient.py). No
threads; an object belongs to one thread at a time. Paths of the server are text (or bytes), ``/`` between the
names; bytes that are not UTF-8 are kept as surrogate escapes.
"""

import collections
import errno
import os
import posixpath
import re
import time
from typing import Any, Callable, Iterator, List, Optional, Tuple, Union

from chirpchannel import Channel
from chirpwire import (
    CRC32,
    DOESNT_EXIST,
    LINE,
    MODE_UNKEPT,
    NO_SPACE,
    NOT_AUTHORIZED,
    NOT_DIR,
    NOT_SUPPORTED,
    RESERVED,
    STAT_LINE,
    TIME_UNKEPT,
    UNKEPT,
    ChirpError,
    Path,
    ProtocolError,
    Refused,
    Stat,
    TimedOut,
    Unlistable,
    Wire,
    parse_stat,
    quote,
    shown,
    to_bytes,
    to_text,
    unquote,
)

SLOWEST_HASH = 2 * 1024 * 1024         # bytes per second of which a peer must compute a checksum
LISTING = 256 * 1024 * 1024    # bytes of a folder's names that are taken in
IN_MEMORY = 1024 * 1024        # and of these, what is not on disk
STATFS_LINE = re.compile(br'-?[0-9]{1,20}( -?[0-9]{1,20}){6} *$')
NAME_LINE = 1024               # bytes of a line in a listing
LINKS = 40                     # symbolic links that one path may lead through
DEPTH = 32                     # requests that are sent ahead
AHEAD = 16 * 1024              # and their bytes: what a server takes in while it waits for us to read


class Connection(Channel):
    """The calls of the protocol, one by one; raise what a Channel does."""

    def another(self, patience: float) -> 'Connection':
        """One more to the same server, made now: in so many seconds at most. Raises as ``connect``."""
        other = Connection(self.address, self.port, min(patience, self.timeout), self.secret, self.id,
                           self.tls)
        other.cancel, other.until = self.cancel, self.until
        other.connect().timeout = other.timeout = self.timeout
        return other

    # Files and folders.

    def stat(self, path: Path) -> Stat:
        """Of what the path leads to, through links."""
        return self.call('stat', quote(path), about=path, read=read_stat)

    def lstat(self, path: Path) -> Stat:
        """Of what has this name, a link itself."""
        return self.call('lstat', quote(path), about=path, read=read_stat)

    def find(self, path: Path, follow: bool = True) -> Optional[Stat]:
        """``stat`` or ``lstat``; None of what isn't there."""
        try:
            return self.stat(path) if follow else self.lstat(path)
        except Refused as refused:
            if refused.code in (DOESNT_EXIST, NOT_DIR):
                return None
            raise

    def through_links(self, path: bytes) -> bytes:
        """What is written to where that path is a link: what it leads to, without a link on the way. Raises
        ChirpError where that is nothing, or nothing that is served."""
        found = self.find(path, False)
        if found is None or not found.is_link:
            return path
        return self._walk(path.split(b'/'), lambda: leads_nowhere(path, self.readlink(path)))

    def without_climbing(self, path: str) -> str:
        """A path without ``..``, each of which leads where the kernel has it: to what the folder is in that
        a link before it leads to. (A server drops the name before it, whatever that is.)"""
        names = to_bytes(path).split(b'/')
        if b'..' not in names:
            return path
        end = len(names) - names[::-1].index(b'..')
        climbed = self._walk(names[:end], lambda: Refused(DOESNT_EXIST, shown(path)))
        return to_text(posixpath.join(climbed, b'/'.join(names[end:]).lstrip(b'/') or b'.'))

    def _walk(self, names: List[bytes], error: Callable[[], Exception]) -> bytes:
        done, links = b'', 0
        while names:
            name = names.pop(0)
            if name in (b'', b'.', b'..'):
                done = posixpath.dirname(done).rstrip(b'/') if name == b'..' else done
                continue
            here = done + b'/' + name
            found = self.find(here, False)
            if found is None or links > LINKS or not found.is_dir and not found.is_link and b'..' in names:
                raise error()
            if not found.is_link:
                done = here
                continue
            leads, links = to_bytes(self.readlink(here)), links + 1
            names[:0] = leads.split(b'/')
            if leads.startswith(b'/'):
                done = b''             # that of what is served
        return done or b'/'

    def ls(self, path: Path = '/') -> Iterator[Stat]:
        """The entries of a folder, in any order, however many: beyond some they are kept on disk meanwhile.
        Names that could lead elsewhere raise ProtocolError; ones for which another server than ours ends its
        list too early, Unlistable."""
        return entries_in(self.call('getlongdir', quote(path), about=path,
                                    read=lambda wire, _: self._read_listing(wire, path)))

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

    def replacing(self, old: Path, new: Path) -> bytes:
        """The request that gives a file its name; by a server of ours with the owner of what it replaces.
        Raises Refused where the two paths don't fit into one line."""
        return self.ask('replace' if self.is_ours else 'rename', quote(old), quote(new))

    def replace(self, old: Path, new: Path) -> None:
        """Gives a file its name, as ``replacing`` says."""
        self.call('replace' if self.is_ours else 'rename', quote(old), quote(new), about=new, again=False)

    def symlink(self, target: Path, new: Path) -> None:
        """Raises OSError for what another server than ours would make another link of."""
        self.call('symlink', quote(target) if self.is_ours else link_word(target), quote(new), about=new,
                  again=False)

    def readlink(self, path: Path) -> str:
        leads: bytes = self.call('readlink', quote(path), 4096, about=path, read=payload(4096))
        if b'\0' in leads:
            raise ProtocolError('a link to %.300r' % leads)
        return to_text(leads)

    def chmod(self, path: Path, mode: int) -> None:
        self.call('chmod', quote(path), mode & 0o7777, about=path)

    def utime(self, path: Path, atime: int, mtime: int) -> None:
        self.call('utime', quote(path), int(atime), int(mtime), about=path)

    def keep_mode(self, path: Path, mode: int) -> int:
        """``chmod``; gives what the disk there didn't keep, bits of chirpwire.UNKEPT, as far as the server
        tells that."""
        return self._keep(MODE_UNKEPT, 'chmod', path, mode & 0o777)

    def keep_times(self, path: Path, atime: int, mtime: int, mode: int) -> int:
        """``utime`` of what has that mode; gives what of both isn't kept."""
        return self._keep(TIME_UNKEPT, 'utime', path, atime, mtime, *self.mode_to_tell(mode))

    def mode_to_tell(self, mode: int) -> Tuple[int, ...]:
        """What ``utime`` says beside the times: a server of ours looks whether that is the mode."""
        return (mode,) if self.is_ours else ()

    def _keep(self, what: int, *words: Any) -> int:
        try:
            return self.call(words[0], quote(words[1]), *words[2:], about=words[1]) & max(UNKEPT)
        except Refused as refused:
            return unkept_by(refused, what)

    def free_bytes(self, path: Path = '/') -> int:
        """What the disk of a folder has room for."""
        return self.call('statfs', quote(path), about=path, read=read_free_bytes)

    def check_room(self, folder: Path, count: int, target: Path) -> None:
        """Raises Refused, about the target, where a folder's disk has no room for so many bytes."""
        if count <= self.free_bytes(folder):
            return
        try:
            self.call('access', quote(folder), os.W_OK)        # one that is read only has no room, too
        except Refused as refused:
            if refused.code == NOT_AUTHORIZED:
                raise refused.about(shown(target))
        raise Refused(NO_SPACE, '%s: %d bytes' % (shown(target), count))

    def hash(self, path: Path, algorithm: str = 'sha1', size: int = 0) -> bytes:
        """The digest, ``sha1`` or ``md5``, that the server has of a file. ``size``: the file's, for the time
        that it may take."""
        return self.call('hash', algorithm, quote(path), about=path, read=payload(64),
                         patience=size / SLOWEST_HASH)

    def asking_for_digest(self, path: Path, start: int, count: int) -> Tuple[str, bytes]:
        """(algorithm, request): CRC-32 of a part, by a server of ours, else SHA-1 of the whole."""
        if self.is_ours:
            return CRC32, self.ask(CRC32, quote(path), start, count)
        return 'sha1', self.ask('hash', 'sha1', quote(path))

    def getfile(self, path: Path, limit: int = 16 * 1024 * 1024) -> bytes:
        """A small file's content. Raises ProtocolError where it is larger than the limit."""
        return self.call('getfile', quote(path), about=path, read=payload(limit))

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

    def has_changed(self, file: int) -> bool:
        """Whether it may have, since it was opened; of a server that doesn't know, it may."""
        try:
            return bool(self.call('fchanged', file, again=False))
        except Refused:
            return True

    def pread(self, file: int, length: int, offset: int) -> bytes:
        return self.call('pread', file, length, offset, again=False, read=payload(length))

    def pwrite(self, file: int, data: bytes, offset: int) -> int:
        """How many bytes were written."""
        return self.call('pwrite', file, len(data), offset, data=data, again=False)

    # Reading replies.

    def _send_content(self, wire: Wire, content: bytes, path: Path) -> None:
        wire.put(content)
        if self.result(wire, path) != len(content):
            raise ProtocolError('putfile: a wrong count')

    def _read_listing(self, wire: Wire, path: Path) -> Any:
        """A file of entries: the size of a name, the name, its stat line. All of a listing is read before
        anything else can be asked for."""
        import tempfile
        file = tempfile.SpooledTemporaryFile(IN_MEMORY, prefix='chirp-')
        try:
            deadline, taken = wire.deadline(LISTING), 0
            for name, line in entries_of(wire):
                taken += len(name) + len(line)
                if taken > LISTING:
                    raise ProtocolError('a folder of too many entries')
                if time.monotonic() > deadline:
                    raise TimedOut('a listing without an end')
                name = unquote(name) if self.root is not None else name
                if name in (b'.', b'..') or self.root is None and name.startswith(RESERVED):
                    continue
                if not is_safe_name(name):
                    raise ProtocolError('a listing with the name %.300r' % name)
                parse_stat(line)
                file.write(b'%d\n%s%s\n' % (len(name), name, line))
            if self.root is None:
                self._check_end(wire, path)
            file.seek(0)
            return file
        except BaseException:
            file.close()
            raise

    def _check_end(self, wire: Wire, path: Path) -> None:
        """The list ends with an empty line. A name that begins with a line feed starts with one, too: what
        follows is then more of the list, and no answer to what is asked here. Raises Unlistable."""
        wire.put(self.ask('whoami', LINE))
        try:
            follows = payload(LINE)(wire, self._number(wire, ''))
        except (ProtocolError, Refused):
            follows = b''
        if to_text(follows) != self.subject:
            self.disconnect()          # nobody knows what the rest belongs to
            raise Unlistable(path)


def entries_in(file: Any) -> Iterator[Stat]:
    """The entries that ``_read_listing`` put into a file, which is closed at their end."""
    with file:
        for head in iter(file.readline, b''):
            name = file.read(int(head))
            yield parse_stat(file.readline().rstrip(b'\n'), to_text(name))


def link_word(target: Path) -> bytes:
    """What a link leads to as a word for chirp_server, which takes that as it comes. Raises OSError."""
    target = to_bytes(target)
    if target.split() != [target]:
        raise OSError(errno.EINVAL, 'chirp_server makes no link to a path with white space in it')
    return target


def leads_nowhere(path: Path, leads: str) -> ChirpError:
    """What to raise for a link of the server."""
    return ChirpError('%s is a link to %s, where nothing is that is served' % (shown(path), shown(leads)))


def unkept_by(result: Union[int, Refused], what: int) -> int:
    """What a reply to a request that sets a mode or time says isn't kept; ``what``: which of them. Raises
    Refused, unless that is what a disk says that keeps none."""
    if not isinstance(result, Refused):
        return result & max(UNKEPT)
    if result.code not in (NOT_AUTHORIZED, NOT_SUPPORTED) or result.name:
        raise result
    return what


def payload(limit: int) -> Callable[[Wire, int], bytes]:
    """What reads as many bytes as the reply says, if that is what was asked for."""
    def read(wire: Wire, count: int) -> bytes:
        if count > limit:
            raise ProtocolError('%d bytes where %d were asked for' % (count, limit))
        return wire.read(count)
    return read


def read_stat(wire: Wire, _: int) -> Stat:
    """The stat line after a reply."""
    return parse_stat(wire.line())


def read_free_bytes(wire: Wire, _: int) -> int:
    line = wire.line()
    if not STATFS_LINE.match(line):
        raise ProtocolError('not a statfs line: %.80r' % line)
    numbers = [int(word) for word in line.split()]
    return numbers[1] * numbers[4]


def entries_of(wire: Wire) -> Iterator[Tuple[bytes, bytes]]:
    """(name, stat line) of each entry of a listing. A name with a newline is more than one line, as the real
    server has it; one with a carriage return is what it is."""
    name = wire.raw_line(NAME_LINE)
    while name:
        line = wire.raw_line(NAME_LINE)
        while not STAT_LINE.match(line):
            name += b'\n' + line
            if len(name) > NAME_LINE:
                raise ProtocolError('a name of more than %d bytes' % NAME_LINE)
            line = wire.raw_line(NAME_LINE)
        yield name, line
        name = wire.raw_line(NAME_LINE)


def is_safe_name(name: bytes) -> bool:
    """Whether a name of a listing is one of an entry, and not a way elsewhere."""
    return name not in (b'', b'.', b'..') and b'/' not in name and b'\0' not in name and len(name) <= 255


class Pipeline:
    """Requests sent ahead, and what to do with each reply, in order."""

    def __init__(self, client: Connection) -> None:
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
