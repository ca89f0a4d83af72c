"""The consoles of a guest's commands: input that the host streams to them, output that it follows.

What it is not: where the input goes (guestinput.py, in the runner), or a record of anything: who follows asks
again, and input is sent again until the runner has taken it.

Threads: the link's thread brings the host's words, the main thread what runners and time bring. One lock
guards the table and each console; nothing that waits happens while it is held.
"""

import binascii
import contextlib
import logging
import os
import socket
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import protocol
import shortcut
from guestinput import NOTICE, Piece, connect
from guestreports import Reports, offsets_in
from guestrequests import screen_size
from guestspool import Command, private
from protocol import BadWord, Message
from shortcut import Shortcut

LOOK_EVERY = 0.01              # seconds between looks at output that no runner tells of
ACK_AFTER = 0.01               # seconds in which news of taken input gather, …
ACK_AT_ONCE = 512 * 1024       # … but for so many bytes: the host may be waiting to send more
RECEIVE = 64 * 1024            # bytes of notices that are read at once
UNSENT = 4 * 1024 * 1024       # bytes of input that wait for one runner; what is more comes again
SHOWN = 64 * 1024              # bytes of output that a shortcut carries at once
AHEAD = 1024 * 1024            # bytes of output that are told before the host asks again
LONGEST_FOLLOW = 3600.0        # seconds
WORDS_AT_ONCE = 200            # that tell of output by themselves, …
WORDS = 60.0                   # … and so many a second

log = logging.getLogger('vmguest')


class Console:
    """One command's."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.connection: Optional[socket.socket] = None    # to its runner
        self.unsent = bytearray()      # pieces of input for that
        self.received = b''            # of a notice that isn't whole yet
        self.ack_at: Optional[float] = None    # when to tell how much input was taken
        self.acked = 0                 # bytes of which that was told
        self.is_end_taken = False
        self.offsets: Dict[str, int] = {}      # of streams that are followed: what is told next
        self.until = 0.0               # monotonic: for so long
        self.ahead = 0                 # bytes that may be told before the host asks again
        self.has_notice = False        # the runner told that there may be output
        self.shortcut: Optional[Shortcut] = None       # to the host
        self.offered: List[Optional[Shortcut]] = []    # what takes its place
        self.is_begun = False          # whether the host was heard there
        self.out = -1                  # descriptor of what its terminal wrote, while there is a shortcut

    def connect(self) -> bool:
        """Whether there is a connection, now or from before."""
        if self.connection is None and self.command.request.get('stream'):
            try:
                self.connection = connect(self.command.folder)
            except OSError as error:
                log.debug('%s: no runner takes input now: %s', self.command.cmd_id, error)
        return self.connection is not None

    def send(self) -> None:
        """Gives the runner what it has room for."""
        while self.unsent and self.connection is not None:
            try:
                with memoryview(self.unsent) as view:
                    sent = self.connection.send(view)
            except BlockingIOError:
                return
            except OSError as error:
                log.debug('%s: %s', self.command.cmd_id, error)
                self._break_off()
                return
            del self.unsent[:sent]

    def _break_off(self) -> None:
        """The runner takes no more. On any thread: ``receive`` meets the end, and disconnects."""
        del self.unsent[:]
        with contextlib.suppress(OSError):     # it isn't connected any more
            assert self.connection is not None
            self.connection.shutdown(socket.SHUT_RDWR)

    def receive(self) -> bool:
        """Reads notices; whether there may be more."""
        if self.connection is None:
            return False
        try:
            data = self.connection.recv(RECEIVE)
        except BlockingIOError:
            return False
        except OSError:
            data = b''
        if not data:
            self.disconnect()
            return False
        is_more = len(data) == RECEIVE
        data = self.received + data
        whole = len(data) // NOTICE.size * NOTICE.size
        self.received = data[whole:]
        self.has_notice = self.has_notice or whole > 0
        if whole:
            taken, is_end = NOTICE.unpack(data[whole - NOTICE.size:whole])
            if (taken, bool(is_end)) != (self.command.taken, self.is_end_taken):
                self.command.taken, self.is_end_taken = taken, bool(is_end)
                self.ack_at = self.ack_at or time.monotonic() + ACK_AFTER
                if taken - self.acked >= ACK_AT_ONCE:
                    self.ack_at = time.monotonic()
        return is_more

    def disconnect(self) -> None:
        """The runner is gone; what it hasn't got is lost with it.

        On the main thread alone: it may be waiting for just this connection.
        """
        if self.connection is not None:
            self.connection.close()
        self.connection, self.received = None, b''
        del self.unsent[:]

    # The shortcut.

    def offer(self, made: Optional[Shortcut]) -> None:
        """For ``take_offered``; None: words alone."""
        self.offered.append(made)

    def take_offered(self) -> None:
        """On the main thread alone: it may be waiting for the one before."""
        while self.offered:
            self.take_shortcut(self.offered.pop(0))

    def take_shortcut(self, made: Optional[Shortcut]) -> None:
        """The same for this one."""
        if self.shortcut is not None:
            self.shortcut.close()
        if self.out >= 0:
            os.close(self.out)
        self.shortcut, self.is_begun, self.out = made, False, -1

    def hear_shortcut(self) -> None:
        """What the person typed, for the runner."""
        if self.shortcut is None:
            return
        try:
            self.shortcut.flush()
            for kind, offset, data in self.shortcut.hear():
                if kind == shortcut.BEGIN:
                    self.is_begun = self.has_notice = True
                if kind != shortcut.BEGIN and len(self.unsent) < UNSENT:
                    self.unsent += Piece(offset, data, kind == shortcut.LAST_INPUT).head()
                    self.unsent += data
        except OSError as error:
            log.debug('%s: the shortcut ends: %s', self.command.cmd_id, error)
            self.take_shortcut(None)

    @property
    def has_unsent(self) -> bool:
        """Whether the shortcut has no room for what was said there."""
        return self.shortcut is not None and bool(self.shortcut.unsent)

    @property
    def is_to_be_looked_at(self) -> bool:
        """Whether there is more to do than to pass on what comes."""
        return (self.shortcut is None or self.connection is None or self.has_notice or self.has_unsent
                or bool(self.unsent) or bool(self.offered))

    @property
    def is_short(self) -> bool:
        """Whether what its terminal shows goes by the shortcut."""
        return self.is_begun and 'out' in self.offsets

    def show(self) -> None:
        """Tells the person what is new."""
        assert self.shortcut is not None
        try:
            if self.out < 0:
                self.out = private(self.command.path('out'), os.O_RDONLY | os.O_CLOEXEC)
            data = os.pread(self.out, SHOWN, self.offsets['out'])
            self.has_notice = len(data) == SHOWN       # there may be more
            if data:
                self.shortcut.say(shortcut.OUTPUT, self.offsets['out'], data)
        except OSError as error:
            log.debug('%s: the shortcut breaks: %s', self.command.cmd_id, error)
            return self.take_shortcut(None)
        self.offsets['out'] += len(data)
        self.ahead -= len(data)

    def is_acked(self, now: float) -> bool:
        """Whether it is to be told how much input was taken."""
        return self.ack_at is not None and now >= self.ack_at

    def is_followed(self, now: float) -> bool:
        return bool(self.offsets) and now < self.until

    def may_have_grown(self, now: float) -> bool:
        """Whether there may be more output than was told, and it is to be told."""
        if not self.is_followed(now) or self.ahead <= 0:
            return False
        if self.is_short and self.connection is not None:      # whose runner tells of all that it writes
            return self.has_notice and not self.has_unsent
        return self.has_notice or any(self.command.size(stream) > offset
                                      for stream, offset in self.offsets.items())


class Consoles:
    """The consoles of all commands that have one."""

    def __init__(self, reports: Reports, look_by: Callable[[float], None],
                 dial: Callable[[str], Optional[Shortcut]] = lambda token: None) -> None:
        """look_by(moment): has the main thread call ``look`` by then. dial(token): a shortcut to the host;
        None where there can't be one."""
        self._reports = reports
        self._dial = dial
        self._look_by = look_by
        # Guards the table, the consoles in it, and the words that may be said.
        self._lock = threading.Lock()
        self._consoles: Dict[str, Console] = {}
        self._words = float(WORDS_AT_ONCE)
        self._counted = time.monotonic()

    def _of(self, command: Command) -> Console:
        """With the lock held."""
        return self._consoles.setdefault(command.cmd_id, Console(command))

    def close(self) -> None:
        """Lets go of the connections; the runners go on."""
        with self._lock:
            for console in self._consoles.values():
                console.disconnect()
                console.take_offered()
                console.take_shortcut(None)
            self._consoles.clear()

    # What the host asks for, on the link's thread.

    def input(self, command: Optional[Command], message: Message) -> None:
        """CMD_INPUT, for that command of the spool. Raises BadWord."""
        piece = read_piece(message)
        if command is None:
            self._reports.unknown(message.text('cmd-id'))
            return
        if command.has_ended() or not command.request.get('stream'):
            self._reports.news(command)
            return
        with self._lock:
            console = self._of(command)
            if len(console.unsent) < UNSENT:
                console.unsent += piece.packed()
            was_watched = console.connection is not None
            if console.connect():
                console.send()
            if command.taken is not None and piece.offset + len(piece.data) <= command.taken:
                console.ack_at = console.ack_at or time.monotonic() + ACK_AFTER     # it didn't hear so before
            is_watched = was_watched and not console.unsent and console.ack_at is None
        if not is_watched:
            self._look_by(time.monotonic())

    def query(self, command: Command, query: Message) -> bool:
        """CMD_QUERY; False where it doesn't ask to follow. Raises BadWord."""
        if query.text('shortcut'):
            self._make_shortcut(command, protocol.read_nonce(query.text('shortcut')))
            return False
        seconds = min(query.number('follow'), LONGEST_FOLLOW)
        is_unknown = command.taken is None and command.request.get('stream') and not command.has_ended()
        if seconds <= 0 and not is_unknown:
            return False
        slices, ends = self._reports.slices_from(command, offsets_in(query))
        with self._lock:
            console = self._of(command)
            if seconds > 0:
                console.offsets.update(ends)
                console.until, console.ahead = time.monotonic() + seconds, AHEAD
            console.connect()
        if seconds > 0:
            self._reports.news(command, **slices)
        self._look_by(time.monotonic())
        return seconds > 0

    def _make_shortcut(self, command: Command, token: str) -> None:
        if command.request.get('stream') and not command.has_ended():
            made = self._dial(token)
            with self._lock:
                self._of(command).offer(made)
            self._look_by(time.monotonic())

    # What runners and time bring, on the main thread.

    def pass_on(self, ready: List[Any]) -> Optional[float]:
        """What these shortcuts, and the runners behind them, have to say. When ``look`` is due for that; None
        where it is now, since there is something else."""
        rest, due = len(ready), float('inf')
        with self._lock:
            for console in self._consoles.values():
                if console.shortcut is None or console.connection is None:
                    continue
                if console.shortcut in ready:
                    rest -= 1
                    console.hear_shortcut()
                    console.send()
                if console.connection in ready:
                    rest -= 1
                    console.receive()
                    now = time.monotonic()
                    if console.is_short and console.may_have_grown(now) and self._have_words(now):
                        self._words -= 1
                        console.show()
                if console.is_to_be_looked_at:
                    rest += 1
                due = min(due, console.ack_at or due)
        return None if rest else due

    def watched(self) -> Tuple[List[Any], List[Any]]:
        """The runners and shortcuts that may tell something, and those that should take something."""
        with self._lock:
            ends = [(end, bool(unsent)) for console in self._consoles.values()
                    for end, unsent in ((console.connection, console.unsent),
                                        (console.shortcut, console.has_unsent)) if end is not None]
        return [end for end, _ in ends], [end for end, has_unsent in ends if has_unsent]

    def due(self) -> Optional[float]:
        """When ``look`` is due, by the monotonic clock; None: not before something happens."""
        now = time.monotonic()
        moments: List[float] = []
        with self._lock:
            for console in self._consoles.values():
                if console.ack_at is not None:
                    moments.append(console.ack_at)
                is_followed = console.is_followed(now) and console.ahead > 0
                if console.connection is None and (console.unsent or is_followed) \
                        or console.may_have_grown(now):
                    moments.append(now + LOOK_EVERY)
        return min(moments) if moments else None

    def look(self, now: float) -> None:
        """Takes what runners tell, and tells what the host waits for."""
        with self._lock:
            consoles = list(self._consoles.values())
            for console in consoles:
                self._look_at(console, now)
            due = [console for console in consoles if self._is_due(console, now)]
        for console in due:
            self._tell(console, now)

    def _have_words(self, now: float) -> bool:
        """Whether one is to spare. With the lock held."""
        self._words = min(float(WORDS_AT_ONCE), self._words + WORDS * (now - self._counted))
        self._counted = now
        return self._words >= 1

    def _look_at(self, console: Console, now: float) -> None:
        """With the lock held."""
        if console.command.has_ended() or not (
                console.is_followed(now) or console.connection is not None or console.unsent
                or console.shortcut is not None or console.offered or console.ack_at is not None):
            console.disconnect()
            console.take_offered()
            console.take_shortcut(None)
            del self._consoles[console.command.cmd_id]
            return
        console.take_offered()
        console.hear_shortcut()
        if console.connect():
            console.send()
            while console.receive():
                pass

    def _is_due(self, console: Console, now: float) -> bool:
        """Whether there is something to tell, and a word to spare. With the lock held."""
        return self._have_words(now) and (console.is_acked(now) or console.may_have_grown(now))

    def _tell(self, console: Console, now: float) -> None:
        """How much input was taken, and the new output, if there is any."""
        with self._lock:
            keys: Dict[str, Any] = {}
            if console.is_short and console.may_have_grown(now):
                self._words -= 1
                console.show()
                if not console.is_acked(now):
                    return
            elif console.may_have_grown(now):
                console.has_notice = False
                keys, ends = self._reports.slices_from(console.command, console.offsets)
                told = sum(ends[stream] - console.offsets[stream] for stream in ends)
                if not told and not console.is_acked(now):
                    return
                console.ahead -= told
                console.offsets.update(ends)
            self._words -= 1
            console.ack_at, console.acked = None, console.command.taken or 0
            if console.is_end_taken:
                keys['in-eof'] = True
        self._reports.news(console.command, **keys)


def read_piece(message: Message) -> Piece:
    """What a CMD_INPUT hands over. Raises BadWord."""
    offset = message.number('offset')
    if not 0 <= offset < 2 ** 62:
        raise BadWord('CMD_INPUT: offset should be a number of bytes')
    try:
        data = binascii.a2b_base64(message.text('data64'))
    except ValueError:
        raise BadWord('CMD_INPUT: data64 is no base64')
    return Piece(int(offset), data, message.flag('eof'), screen_size(message, 'rows'),
                 screen_size(message, 'columns'))
