"""The standard input that is streamed to a command, and its terminal: a Unix socket from agent to runner.

The socket lies in the command's folder, so that the next agent finds it, too. What the agent sends says where
in the whole input it begins; the runner takes each byte once, and tells how far it is.

What it is not: the words (guestconsole.py), or the program (guestrunner.py). No threads, no locks.
"""

import contextlib
import errno
import fcntl
import logging
import os
import select
import socket
import struct
import sys
import termios
import time
from typing import Any, Dict, List, NamedTuple, Optional

log = logging.getLogger('vmguest')

NAME = 'input'                 # of the socket, in the command's folder
LONGEST_PATH = 100             # bytes: an address holds 104 of them on some systems, with the NUL
NEWS_PATIENCE = 0.002          # seconds in which output may follow a piece of input: both are told at once
HELD = 256 * 1024              # bytes that a runner holds for a program that doesn't read
RECEIVE = 256 * 1024           # bytes that are received at once
SET_PIPE_SIZE = 1031           # fcntl's F_SETPIPE_SZ, which Python has from 3.10 on
PIECE = struct.Struct('<QIHHB')        # offset, length, rows, columns, whether it is the end; then the bytes
NOTICE = struct.Struct('<QB')          # how far the input was taken; whether its end was


class Piece(NamedTuple):
    """A part of the input, and what else is to be done at that place."""
    offset: int
    data: bytes
    is_end: bool = False
    rows: int = 0                  # of the terminal; 0: as they are
    columns: int = 0

    def head(self) -> bytes:
        """What the socket carries before the data."""
        return PIECE.pack(self.offset, len(self.data), self.rows, self.columns, self.is_end)

    def packed(self) -> bytes:
        """As the socket carries it."""
        return self.head() + self.data


def with_short_path(folder: str, use: Any) -> Any:
    """What ``use`` does with the address of the socket in a folder, whose path may be too long for one.

    Raises OSError.
    """
    path = os.path.join(folder, NAME)
    if len(os.fsencode(path)) <= LONGEST_PATH:
        return use(path)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return use('/proc/self/fd/%d/%s' % (descriptor, NAME))
    finally:
        os.close(descriptor)


def connect(folder: str) -> socket.socket:
    """The agent's end, which never blocks. Raises OSError where no runner listens there."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with_short_path(folder, connection.connect)
        connection.setblocking(False)
    except BaseException:
        connection.close()
        raise
    return connection


def set_size(terminal: int, rows: int, columns: int) -> None:
    """Tells a terminal how large it is, which tells its foreground programs. Raises OSError."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', rows, columns, 0, 0))


def widen(pipe: int) -> None:
    """Has a pipe on Linux hold what is received at once, if that is allowed: 64 KiB else, and each of those
    costs the program and its runner a turn."""
    if sys.platform.startswith('linux'):
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, SET_PIPE_SIZE, RECEIVE)


class Inlet:
    """A runner's end: takes pieces from the agent, and writes them to the program as fast as that reads."""

    def __init__(self, folder: str, target: int, is_terminal: bool) -> None:
        """``target``: where the program reads; a terminal's master stays the caller's. Raises OSError."""
        self._news_due: Optional[float] = None     # monotonic: when to tell of taken input
        self.taken = 0                 # bytes of the input that came so far, and are the program's
        self._folder = folder
        self._is_terminal = is_terminal
        self._target = target          # -1: closed
        self._waiting = bytearray()    # for the program to read
        self._is_ended = False         # there is no more input
        self._is_end_told = False      # to the terminal
        self._last = b'\n'             # byte that was written
        self._received = bytearray()   # of a piece that isn't whole yet
        self._agent: Optional[socket.socket] = None
        os.set_blocking(target, False)
        if not is_terminal:
            widen(target)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        with_short_path(folder, self._listener.bind)
        with_short_path(folder, lambda path: os.chmod(path, 0o600))
        self._listener.listen(1)

    def readable(self) -> List[Any]:
        """What should be watched for something to read: not while the program has enough to read itself."""
        found: List[Any] = [self._listener]
        return found + [self._agent] * (self._agent is not None and len(self._waiting) < HELD)

    def writable(self) -> List[int]:
        """What should be watched for room."""
        return [self._target] * (self._target >= 0 and bool(self._waiting))

    def patience(self, most: float) -> float:
        """Seconds until ``react`` has something to do by itself, at most so many."""
        return most if self._news_due is None else max(0.0, min(most, self._news_due - time.monotonic()))

    def react(self, ready: List[Any]) -> bool:
        """To what of these is ready, and to the time. Whether its terminal got something, which most show."""
        before = self.taken
        if self._listener in ready:
            self._accept()
        if self._agent is not None and self._agent in ready:
            self._receive(self._agent)
        if self._target >= 0 and self._target in ready and self._waiting:
            self._write()
        if self._news_due is not None and time.monotonic() >= self._news_due:
            self.tell()
        return self._is_terminal and self.taken > before

    def _accept(self) -> None:
        """One agent at a time: a new one takes the old one's place."""
        with contextlib.suppress(OSError):
            agent, _ = self._listener.accept()
            self._leave()
            agent.setblocking(False)
            self._agent = agent
            self.tell()

    def _leave(self) -> None:
        if self._agent is not None:
            self._agent.close()
        self._agent = None
        del self._received[:]

    def _receive(self, agent: socket.socket) -> None:
        try:
            data = agent.recv(RECEIVE)
        except BlockingIOError:
            return
        except OSError as error:
            log.debug('the agent is gone: %s', error)
            data = b''
        if not data:
            return self._leave()
        self._received += data
        self._take_pieces()
        if self._waiting:
            self._write()
        self._end()
        self._news_due = self._news_due or time.monotonic() + NEWS_PATIENCE

    def _take_pieces(self) -> None:
        """All that are whole."""
        while len(self._received) >= PIECE.size:
            offset, length, rows, columns, is_end = PIECE.unpack_from(self._received)
            if len(self._received) < PIECE.size + length:
                return
            with memoryview(self._received) as view:
                data = bytes(view[PIECE.size:PIECE.size + length])
            del self._received[:PIECE.size + length]
            self._take(Piece(offset, data, bool(is_end), rows, columns))

    def _take(self, piece: Piece) -> None:
        """What was taken before is left out; what lies behind a gap is left alone: it comes again."""
        if piece.rows and piece.columns and self._is_terminal and self._target >= 0:
            with contextlib.suppress(OSError):
                set_size(self._target, piece.rows, piece.columns)
        if piece.offset > self.taken or self._is_ended:
            return
        data = piece.data[self.taken - piece.offset:]
        self.taken += len(data)
        if self._target >= 0:          # else nobody reads it any more, and it is taken all the same
            self._waiting += data
        if piece.is_end and piece.offset + len(piece.data) == self.taken:
            self._is_ended = True

    def _write(self) -> None:
        """Gives the program what it has room for."""
        try:
            with memoryview(self._waiting) as view:
                written = os.write(self._target, view[:HELD])
        except BlockingIOError:
            return
        except OSError as error:       # it has closed its input
            log.debug('no more input is read: %s', error)
            self.close_target()
            return
        self._last = bytes(self._waiting[written - 1:written])
        del self._waiting[:written]
        self._end()

    def _end(self) -> None:
        """Tells the program that there is no more, once it has read all."""
        if not self._is_ended or self._waiting or self._target < 0:
            return
        if not self._is_terminal:
            self.close_target()
        elif not self._is_end_told:
            self._is_end_told = True
            # In the middle of a line the first one ends the line alone.
            self._waiting += self._end_of_file() * (1 if self._last == b'\n' else 2)
            if self._waiting:
                self._write()

    def _end_of_file(self) -> bytes:
        """What its terminal takes for that now; nothing where the program reads key by key."""
        try:
            _, _, _, modes, _, _, characters = termios.tcgetattr(self._target)
        except termios.error:
            return b''
        return bytes(characters[termios.VEOF]) if modes & termios.ICANON else b''

    def close_target(self) -> None:
        """Nobody reads there any more."""
        if self._target >= 0 and not self._is_terminal:
            os.close(self._target)
        self._target = -1
        del self._waiting[:]

    def tell(self) -> None:
        """Has the agent look: at how far the input was taken, and at the output."""
        self._news_due = None
        if self._agent is None:
            return
        try:
            self._agent.send(NOTICE.pack(self.taken, self._is_ended))
        except BlockingIOError:
            log.debug('the agent has enough to read')      # and looks then
        except OSError:
            self._leave()

    def close(self) -> None:
        """Lets go of everything."""
        self.close_target()
        self._leave()
        self._listener.close()
        with contextlib.suppress(OSError):
            os.remove(os.path.join(self._folder, NAME))


def wait_until_ready(readable: List[Any], writable: List[Any], timeout: float) -> List[Any]:
    """Those that are, or whose other end is gone, at the latest after so many seconds.

    By poll, as select takes no descriptor above 1,023. Who waits is who closes them: one that another thread
    had closed would be no descriptor any more (ValueError), or another one's.
    """
    by_number: Dict[int, Any] = {}
    poll = select.poll()
    watched = [(select.POLLIN, each) for each in readable] + [(select.POLLOUT, each) for each in writable]
    for event, each in watched:
        number = each if isinstance(each, int) else each.fileno()
        poll.register(number, event | (select.POLLIN if number in by_number else 0))
        by_number[number] = each
    return [by_number[number] for number, _ in poll.poll(1000 * max(0.0, timeout))]


def read_output(descriptor: int, length: int) -> bytes:
    """What a program wrote; b'' at the end, which a terminal tells by an error. Raises OSError."""
    try:
        return os.read(descriptor, length)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b''
