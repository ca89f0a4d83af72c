"""The input of commands that is streamed to them, and the sizes of their terminals.

A window of it is held for each command: it is sent, and sent again, until the guest has taken it. Each byte
has its offset in the whole input, so none is taken twice; and what a guest has taken it tells any host.

What comes in large pieces goes by a shortcut, where there can be one: as base64 in JSON, through the broker,
it would cost several times as much.

What it is not: the output (hostoutput.py), or shortcuts (hostshortcut.py). Nothing of it is journalled: it
may be a password, or an image.

Threads: any thread may call; ``heard`` and ``joined`` are for ``link``, ``tick`` for ``main``. One lock for
the table, one for each input; under the latter words are said, so that pieces go in their order.
"""

import contextlib
import logging
import select
import threading
import time
from typing import Any, Callable, Dict, NamedTuple, Optional

import protocol
from faults import BadState, DeadlineExceeded
from hostcommands import Commands
from hostcontrol import Control
from hostjournal import Execution
from protocol import STREAM, Message

log = logging.getLogger('vmhost')

WINDOW = 2 * 1024 * 1024       # bytes that are held for a command that doesn't read
PIECE = 256 * 1024             # bytes of one word, or less where the broker takes less
ROOM_PATIENCE = 1.0            # seconds that a caller waits for the command to read
ASK_TIMEOUT = 5.0              # seconds in which a guest tells how much it has taken
FIRST_RESEND = 1.0             # seconds after which a piece is sent again, doubled up to …
LAST_RESEND = 30.0

HAS_POLL = hasattr(select, 'poll')      # else words will do

Way = Callable[[int, bytes, bool], bool]       # offset, bytes, whether they are the last; if it took them


class Visitor(NamedTuple):
    """Who types at a terminal at which others may type, too: counts alone what they typed themselves."""
    name: str
    typed: int                     # where what is said for the first time begins


class _Input:
    """One command's: what the guest has not taken yet, and where that begins in the whole."""

    def __init__(self, execution: Execution, taken: int, is_terminal: bool) -> None:
        self.execution = execution
        self.is_terminal = is_terminal
        self.taken = taken             # bytes that the guest has
        self.held = bytearray()        # that it may not have
        self.sent = taken              # how far it was sent, as far as anybody knows
        self.is_ended = self.is_end_taken = False
        self.visitors: Dict[str, int] = {}     # up to where each one's input was taken, by their own count
        self.size: Dict[str, int] = {}     # of the terminal, as it was set last
        self.resend_at: Optional[float] = None
        self.pause = FIRST_RESEND
        self.way_end = -1              # up to where it went by a shortcut
        self.feed: Any = None          # a shortcut of its own, once there is much
        # Guards all of it; words are said while it is held, nothing else is.
        self.changed = threading.Condition(threading.Lock())

    @property
    def end(self) -> int:
        """Where the next byte comes."""
        return self.taken + len(self.held)

    def end_for(self, visitor: Optional[Visitor]) -> int:
        """Where that visitor's next byte comes, by their count. Of those who were here before the host was
        restarted, what the guest has was taken, as far as anybody knows."""
        if visitor is None:
            return self.end
        return self.visitors.setdefault(visitor.name, min(self.end, visitor.typed))

    @property
    def is_open(self) -> bool:
        """Whether something is on its way."""
        return bool(self.held) or self.is_ended and not self.is_end_taken


class Inputs:
    """The inputs of all commands that have one."""

    def __init__(self, commands: Commands, control: Control, say: Callable[[Message], bool],
                 max_frame: int, make_feed: Callable[[Execution], Any]) -> None:
        """make_feed: a Feed of hostshortcut.py."""
        self._commands = commands
        self._control = control
        self._say = say
        self._piece = min(PIECE, max_frame // 2)
        self._make_feed = make_feed
        self._lock = threading.Lock()
        self._inputs: Dict[Execution, _Input] = {}     # whose name and id may change

    # What the API asks.

    def put(self, execution: Execution, data: bytes, is_end: bool, offset: int = -1,
            way: Optional[Way] = None, visitor: Optional[Visitor] = None) -> int:
        """How many of the bytes were taken: less than there are while the program doesn't read.

        ``offset``: where they begin in the whole input, if it is not the end of what was put so far; what was
        put before counts as taken, and is left alone. ``way``: a shortcut, if there is one. ``visitor``: who
        counts so. Raises BadState, DeadlineExceeded.
        """
        found = self._of(execution)
        with found.changed:
            end = found.end_for(visitor)
            before = 0 if offset < 0 else end - offset
            if before < 0:
                raise BadState('%s has had %d bytes of input; these begin at %d'
                               % (execution.key, end, offset))
            if before >= len(data) and (found.is_ended or not is_end):
                return len(data)
            if before > len(data):
                raise BadState('%s has had %d bytes of input; these end at %d'
                               % (execution.key, end, offset + len(data)))
            data = data[before:]
            self._check_open(found)
            self._wait_for_room(found, min(len(data), PIECE))
            taken = data[:WINDOW - len(found.held)]
            found.held += taken
            if visitor is not None:
                found.visitors[visitor.name] = end + len(taken)
            found.is_ended = is_end and len(taken) == len(data)
            if found.feed is None and len(taken) >= PIECE and HAS_POLL and not found.is_terminal:
                found.feed = self._make_feed(execution)
            self._send(found, way=way)
        self._wait_for_feed(found)
        return before + len(taken)

    def _wait_for_feed(self, found: _Input) -> None:
        """Until a shortcut has had room for all, or for a moment: nobody else waits for that."""
        deadline = time.monotonic() + ROOM_PATIENCE
        while True:
            with found.changed:
                waits = found.feed.unsent() if found.feed is not None and self._flush(found) else None
                number = waits.fileno() if waits is not None else -1
            left = deadline - time.monotonic()
            if number < 0 or left <= 0:
                return
            poll = select.poll()       # its number may be another's by now: then it is looked again
            poll.register(number, select.POLLOUT)
            poll.poll(1000 * left)

    def _check_open(self, found: _Input) -> None:
        if found.execution.ended:
            raise BadState('%s has ended' % found.execution.key)
        if found.is_ended:
            raise BadState('the input of %s has ended' % found.execution.key)

    def _wait_for_room(self, found: _Input, wanted: int) -> None:
        """For a program that reads slowly; with the lock held, which is let go meanwhile."""
        deadline = time.monotonic() + ROOM_PATIENCE
        while len(found.held) + wanted > WINDOW and time.monotonic() < deadline:
            found.changed.wait(deadline - time.monotonic())
            self._check_open(found)

    def resize(self, execution: Execution, rows: int, columns: int) -> None:
        """Tells a terminal its size. Raises BadState, DeadlineExceeded."""
        found = self._of(execution)
        with found.changed:
            self._check_open_terminal(found)
            found.size = {'rows': rows, 'columns': columns}
            self._say(self._word(found, found.sent, b'', **found.size))

    def _check_open_terminal(self, found: _Input) -> None:
        if found.execution.ended:
            raise BadState('%s has ended' % found.execution.key)
        if not found.is_terminal:
            raise no_terminal(found.execution)

    def check_terminal(self, execution: Execution) -> None:
        """Raises BadState for a command without one."""
        if 'terminal' not in self._options(execution):
            raise no_terminal(execution)

    def _options(self, execution: Execution) -> Dict[str, Any]:
        options = self._commands.request(execution.cmd_id)['request']['options']   # type: Dict[str, Any]
        return options

    def next_offset(self, execution: Execution, refresh: bool) -> int:
        """Where the next byte of the input comes, as far as it is known; its guest may be asked."""
        if refresh and not execution.ended and execution.status.get('in-offset') is None:
            with contextlib.suppress(BadState, DeadlineExceeded):      # no such input, or no answer
                return self._of(execution).end
        with self._lock:
            found = self._inputs.get(execution)
        return found.end if found is not None else execution.status.get('in-offset', 0)

    def _of(self, execution: Execution) -> _Input:
        """Raises BadState, DeadlineExceeded."""
        with self._lock:
            found = self._inputs.get(execution)
        if found is not None:
            return found
        options = self._options(execution)
        if options.get('stdin') != STREAM and 'terminal' not in options:
            raise BadState('the input of %s is not streamed: run it with the option stdin=\'%s\', or terminal'
                           % (execution.key, STREAM))
        if execution.ended:
            raise BadState('%s has ended' % execution.key)
        made = _Input(execution, self._ask_taken(execution), 'terminal' in options)
        with self._lock:
            return self._inputs.setdefault(execution, made)

    def _ask_taken(self, execution: Execution) -> int:
        """How much the guest has taken of what another run of this host may have sent."""
        if execution.state == 'queued':
            return 0
        known = execution.status.get('in-offset')
        if known is not None:
            return max(0, int(known))
        with self._control.answers.expected(
                execution.index, lambda message: message.get('in-offset') is not None) as answer:
            self._control.query(execution)
            message = answer.wait(ASK_TIMEOUT)
        if message is None:
            raise DeadlineExceeded('%s doesn\'t tell how much input %s has taken'
                                   % (execution.vm, execution.key))
        return max(0, int(message.number('in-offset')))

    # Sending, with the input's lock held.

    def _word(self, found: _Input, offset: int, data: bytes, **keys: Any) -> Message:
        vm_id, cmd_id = found.execution.vm_id, found.execution.cmd_id
        return protocol.CMD_INPUT.howToSay(vm_id, cmd_id, offset, data, **keys)

    def _send(self, found: _Input, most: int = WINDOW, way: Optional[Way] = None) -> None:
        """What was not sent yet, or is to be sent again; ``most`` bytes."""
        begin = max(found.sent, found.taken)
        stop = min(found.end, begin + most)
        while True:
            upto = min(stop, begin + self._piece)
            is_end = found.is_ended and upto == found.end
            if upto == begin and not (is_end and not found.is_end_taken):
                break
            with memoryview(found.held) as held:
                data = bytes(held[begin - found.taken:upto - found.taken])
            # No shortcut overtakes words that are on their way: what comes too early isn't taken.
            is_next = begin in (found.taken, found.way_end)
            feeds = found.feed is not None and found.feed.is_there()
            if feeds and not is_next:
                break                  # it goes there once the words were taken
            if feeds and not found.feed.put(begin, data, is_end):
                begin = self._give_up(found)
                continue
            if feeds or way is not None and is_next and way(begin, data, is_end):
                found.way_end = upto
            elif not self._say(self._word(found, begin, data, **({'eof': True} if is_end else {}))):
                break                  # its guest isn't there; it is sent when that is back
            begin = found.sent = upto
            if is_end:
                break
        if found.is_open and found.resend_at is None:
            found.resend_at = time.monotonic() + found.pause

    def _flush(self, found: _Input) -> bool:
        """Sends what its shortcut has room for; False where that broke."""
        if found.feed is None or found.feed.flush():
            return True
        self._give_up(found)
        self._send(found)
        return False

    def _give_up(self, found: _Input) -> int:
        """Its shortcut, of which what wasn't taken may be lost: from where it goes on by words."""
        if found.feed is not None and found.feed.give_up():
            found.sent, found.way_end = found.taken, -1
        return max(found.sent, found.taken)

    # What guests and time bring.

    def heard(self, execution: Execution, status: Message) -> None:
        """A CMD_STATUS: how much was taken. Raises BadWord."""
        with self._lock:
            found = self._inputs.get(execution)
        if found is None or status.get('in-offset') is None:
            return
        taken = int(status.number('in-offset'))
        with found.changed:
            moved = min(taken, found.end) - found.taken
            if moved > 0:
                del found.held[:moved]
                found.taken += moved
            is_end_taken = found.is_ended and (status.flag('in-eof') or taken > found.end)
            found.is_end_taken = found.is_end_taken or is_end_taken
            if moved > 0 or found.is_end_taken:
                found.pause, found.resend_at = FIRST_RESEND, None
                if found.is_open and self._flush(found):
                    self._send(found)
                found.changed.notify_all()

    def joined(self, vm_id: str) -> None:
        """A guest is there, perhaps again: what it may have missed is sent to it."""
        for found in self._all():
            if found.execution.vm_id == vm_id and not found.execution.ended:
                with found.changed:
                    self._give_up(found)
                    found.sent, found.resend_at, found.pause = found.taken, None, FIRST_RESEND
                    if found.size:
                        self._say(self._word(found, found.taken, b'', **found.size))
                    self._send(found)

    def say_again(self, execution: Execution) -> None:
        """By words, what a shortcut may have lost."""
        with self._lock:
            found = self._inputs.get(execution)
        if found is not None and not execution.ended:
            with found.changed:
                found.sent, found.way_end = found.taken, -1
                self._send(found)

    def tick(self) -> None:
        """Sends again what wasn't taken in time, and forgets what has ended."""
        now = time.monotonic()
        for found in self._all():
            with found.changed:
                if found.execution.ended:
                    found.changed.notify_all()
                    if found.feed is not None:
                        found.feed.close()
                    with self._lock:
                        self._inputs.pop(found.execution, None)
                elif found.resend_at is not None and now >= found.resend_at:
                    found.pause = min(LAST_RESEND, 2 * found.pause)
                    self._give_up(found)
                    found.sent, found.resend_at = found.taken, None
                    self._send(found, self._piece)     # the rest follows once this was taken

    def _all(self) -> list:
        with self._lock:
            return list(self._inputs.values())


def no_terminal(execution: Execution) -> BadState:
    """What is raised for a command without one."""
    return BadState('%s has no terminal: run it with the option terminal' % execution.key)
