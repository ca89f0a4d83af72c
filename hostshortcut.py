"""The host's end of shortcuts (shortcut.py): of a terminal's, and of one for input that is streamed.

It asks for them, and waits at a terminal for both sides at once. What it is not: what becomes of the bytes
(hostterminal.py, hostinput.py), or a way that has to be there: without it all goes by words.

Threads: the person's line alone, or who has the input's lock; but the broker's turn brings the connection.
One lock, for handing it over.
"""

import contextlib
import logging
import select
import socket
import threading
import time
from typing import Any, Callable, List, Optional

import protocol
from hostjournal import Execution
from hostpolicy import BYTE_RATE, RATE
from shortcut import BEGIN, INPUT, LAST_INPUT, OUTPUT, Shortcut
from stompbroker import Bucket

log = logging.getLogger('vmhost')

LOOK_EVERY = 0.25              # seconds until it is seen that the command runs
ASK_EVERY = 20.0               # seconds until a guest that made none is asked again: it may be back by then


class Invitation:
    """Asks a command's guest for a shortcut, and has it once it is there. For one thread at a time."""

    def __init__(self, link: Any, execution: Execution, ring: Callable[[], None] = lambda: None) -> None:
        """ring(): in the broker's turn, when one arrives."""
        self._link = link
        self._execution = execution
        self._ring = ring
        self._token, self._key = '', b''
        self._is_closed = False
        self._lock = threading.Lock()
        self._arrived: Optional[socket.socket] = None

    def ask(self) -> None:
        """For one, or another one, if there can be any."""
        vm_id, cmd_id = self._execution.vm_id, self._execution.cmd_id
        self._link.expect_no_shortcut(self._token)
        self._token, self._key = self._link.expect_shortcut(vm_id, self._arrive)
        if self._token:
            self._link.say(protocol.CMD_QUERY.howToSay(vm_id, cmd_id, shortcut=self._token))

    def take(self) -> Optional[Shortcut]:
        """What has arrived."""
        with self._lock:
            arrived, self._arrived = self._arrived, None
        return Shortcut(arrived, self._key, 'host') if arrived is not None else None

    def close(self) -> None:
        """Whoever comes now is refused."""
        with self._lock:
            self._is_closed = True
            arrived, self._arrived = self._arrived, None
        self._link.expect_no_shortcut(self._token)
        if arrived is not None:
            arrived.close()

    def _arrive(self, connection: socket.socket) -> None:
        """In the broker's turn."""
        with self._lock:
            if not self._is_closed and self._arrived is None:
                self._arrived = connection
                self._ring()
                return
        connection.close()


class Feed:
    """One for input that is streamed to a program without a terminal: nothing is told there.

    Its methods never wait. Within the input's lock.
    """

    def __init__(self, link: Any, execution: Execution) -> None:
        self._invitation = Invitation(link, execution)
        self._execution = execution
        self._shortcut: Optional[Shortcut] = None
        self._ask_at = 0.0             # monotonic

    def is_there(self) -> bool:
        """Whether it may be put to now; else one is asked for, from time to time."""
        if self._shortcut is None:
            self._shortcut = self._invitation.take()
        if self._shortcut is None and time.monotonic() >= self._ask_at and self._execution.state == 'running':
            self._ask_at = time.monotonic() + ASK_EVERY
            self._invitation.ask()
        return self._shortcut is not None

    def put(self, offset: int, data: bytes, is_last: bool) -> bool:
        """Says what comes next; False where it breaks."""
        try:
            assert self._shortcut is not None
            self._shortcut.say(LAST_INPUT if is_last else INPUT, offset, data)
        except OSError as error:
            log.debug('%s: the shortcut breaks: %s', self._execution.key, error)
            return False
        return True

    def flush(self) -> bool:
        """Sends what there is room for; False where it breaks."""
        try:
            if self._shortcut is not None:
                self._shortcut.flush()
        except OSError as error:
            log.debug('%s: the shortcut breaks: %s', self._execution.key, error)
            return False
        return True

    def unsent(self) -> Optional[Shortcut]:
        """The one that has to wait for room, if it does."""
        return self._shortcut if self._shortcut is not None and self._shortcut.unsent else None

    def give_up(self) -> bool:
        """All goes by words for a while; whether it went another way."""
        was_there = self._shortcut is not None
        if self._shortcut is not None:
            self._shortcut.close()
            self._shortcut = None
        return was_there

    def close(self) -> None:
        """The command has ended."""
        self._invitation.close()
        self.give_up()


class Way:
    """One line's, there or not. ``wait``, ``put`` and ``close`` on the line's thread."""

    def __init__(self, host: Any, execution: Execution, show: Callable[[int, bytes], None],
                 lost: Callable[[], None]) -> None:
        """show(offset, bytes): what the terminal shows; lost(): what was said last may not have arrived."""
        self._execution = execution
        self._show = show
        self._lost = lost
        self._shortcut: Optional[Shortcut] = None
        self._ask_at = 0.0
        self._paused_until = 0.0       # monotonic: it isn't read so long, since its guest said too much
        now = time.monotonic()
        self._pieces, self._bytes = Bucket(*RATE, now=now), Bucket(*BYTE_RATE, now=now)
        self._bell, self._ringer = socket.socketpair()
        self._invitation = Invitation(host.connection, execution, self._ring)

    def wait(self, person: socket.socket) -> None:
        """Until that can be read; meanwhile what the guest tells is shown."""
        if not hasattr(select, 'poll'):
            return                     # reading will wait
        while True:
            if self._shortcut is None:
                self._take_or_ask()
            until = self._paused_until or (self._ask_at if self._shortcut is None else 0.0)
            ready = wait_until_ready(person, self._bell, self._shortcut, until)
            if self._paused_until and time.monotonic() >= self._paused_until:
                self._paused_until = 0.0
            if self._shortcut is not None and self._shortcut.fileno() in ready:
                self._hear(self._shortcut)
            if person.fileno() in ready:
                return

    def put(self, kind: bytes, offset: int, data: bytes) -> bool:
        """Says what was typed; False where that has to go by words."""
        if self._shortcut is None:
            return False
        try:
            self._shortcut.say(kind, offset, data)
        except OSError as error:
            log.debug('%s: the shortcut breaks: %s', self._execution.key, error)
            return False               # ``wait`` will meet it, too
        return True

    def give_up(self) -> None:
        """All goes by words for a while."""
        if self._shortcut is not None:
            self._shortcut.close()
            self._shortcut = None
            self._lost()

    def close(self) -> None:
        """The person has left."""
        self._invitation.close()
        self.give_up()                 # what it had no room for goes on by words
        self._bell.close()
        self._ringer.close()

    def _hear(self, way: Shortcut) -> None:
        try:
            way.flush()
            pieces = way.hear()
            for kind, offset, data in pieces:
                if kind == OUTPUT:
                    self._show(offset, data)
            now = time.monotonic()
            pause = max(self._pieces.take(len(pieces), now),
                        self._bytes.take(sum(len(data) for _, _, data in pieces), now))
            if pause:
                self._paused_until = now + pause
        except OSError as error:
            log.debug('%s: the shortcut ends: %s', self._execution.key, error)
            self.give_up()

    def _take_or_ask(self) -> None:
        self._shortcut = self._invitation.take()
        if self._shortcut is not None:
            self._bell.recv(1)
            self.put(BEGIN, 0, b'')
        elif self._execution.state != 'running':
            self._ask_at = time.monotonic() + LOOK_EVERY
        elif time.monotonic() >= self._ask_at:
            self._ask_at = time.monotonic() + ASK_EVERY
            self._invitation.ask()

    def _ring(self) -> None:
        """In the broker's turn."""
        with contextlib.suppress(OSError):
            self._ringer.send(b'.')


def wait_until_ready(person: socket.socket, bell: socket.socket, way: Optional[Shortcut],
                     until: float) -> List[int]:
    """The descriptors that are, at the latest at that monotonic time, if it isn't 0; until then a shortcut is
    not read."""
    poll = select.poll()
    poll.register(person, select.POLLIN)
    if way is None:
        poll.register(bell, select.POLLIN)
    elif way.unsent or not until:
        poll.register(way, (0 if until else select.POLLIN) | (select.POLLOUT if way.unsent else 0))
    return [number for number, _ in poll.poll(1000 * max(0.0, until - time.monotonic()) if until else None)]
