"""The broker's door for the program that it is part of: frames go in and come out without a socket, or STOMP.

What it is not: a client, or a subscriber. Topics of its own go out there, and nowhere else.

Threads: ``send`` and ``close`` are for any thread, ``wait`` and ``taken`` for the one that takes what comes
out. All else is called in the broker's turn (stompbroker.py), so nothing here needs a lock; the one that
there is rings.
"""

import threading
from typing import Any, Callable, Dict, Iterable, List, Optional

from protocol import LocalError, WireFrame
from stompoutbox import RECEIVE, Lanes


class Door:
    """The program at its own broker, which it made and has not started yet.

    What comes out waits in lanes, one for each sender, which are served in turn. Whoever has more than
    ``SHARE`` bytes there is not read until that is less; nobody is while half of ``limits.waiting`` waits.
    """

    backlog = 0            # bytes that it said, and others have not taken: they never wait for each other

    def __init__(self, broker: Any, topics: Iterable[str],
                 take_at_once: Callable[[WireFrame], bool] = lambda frame: False) -> None:
        """take_at_once: is shown each frame before which no other one waits, in the broker's turn; whether it
        took it. Must not wait."""
        self._broker = broker
        self._take_at_once = take_at_once
        self._lanes = Lanes()
        self._batch: Optional[List[WireFrame]] = []    # that whoever waits may take
        self._is_handed_over = False       # and has not been taken yet
        self._is_closed = False
        self._bell = threading.Lock()      # held until there is a batch
        self._bell.acquire()
        self._topics = tuple(topics)
        for topic in self._topics:
            broker.destinations.doors[topic] = self

    # From any thread.

    def send(self, destination: str, headers: Dict[str, str], body: bytes) -> bool:
        """Gives a message to its destination; False where the broker has ended. Raises LocalError."""
        if self._is_closed:
            return False
        if '\0' in ''.join(headers) or '\0' in ''.join(headers.values()):
            raise LocalError('NUL in a header')
        frame = WireFrame('SEND', dict(headers, destination=destination), body)
        self._broker.do(lambda: self._send(frame))
        return True

    def close(self) -> None:
        """Nothing goes in or comes out any more."""
        self._broker.do(self.shut)

    # For the thread that takes what comes out.

    def wait(self) -> Optional[List[WireFrame]]:
        """The next frames, as soon as there are any; None once the door is closed. ``taken`` must follow."""
        self._bell.acquire()
        return self._batch

    def taken(self) -> None:
        """They are done with."""
        self._broker.do(self._go_on)

    # In the broker's turn.

    def _send(self, frame: WireFrame) -> None:
        self._broker.count.frames_in += 1
        self._broker.destinations.send(frame, self, self._broker.policy.audience)

    def let_out(self, frame: WireFrame, sender: Any) -> None:
        """A SEND for the program: at once if that waits, else with others once it has taken what it has."""
        self._broker.count.frames_out += 1
        if not self._is_handed_over:
            if not self._take_at_once(frame):
                self._hand_over([frame])
            return
        size = len(frame.body) + sum(map(len, frame.headers)) + sum(map(len, frame.headers.values()))
        self._lanes.add(sender, size, frame)
        self._broker.memory.bytes += size
        if self._lanes.waiting > self._broker.limits.waiting // 2:
            self._broker.is_held_up = True

    def _take(self, most: int) -> List[WireFrame]:
        """Out of the lanes, so many bytes and the rest of a frame."""
        before, batch = self._lanes.waiting, []        # type: int, List[WireFrame]
        while self._lanes.waiting > max(0, before - most):
            batch.append(self._lanes.take())
        self._broker.memory.bytes -= before - self._lanes.waiting
        if self._lanes.waiting < self._broker.limits.waiting // 4:
            self._broker.let_all_go_on()
        return batch

    def _hand_over(self, batch: Optional[List[WireFrame]]) -> None:
        self._batch, self._is_handed_over = batch, True
        self._bell.release()

    def _go_on(self) -> None:
        self._is_handed_over = False
        if self._is_closed:
            self._hand_over(None)
        elif self._lanes.waiting:
            self._hand_over(self._take(RECEIVE))

    def shut(self) -> None:
        """The same as ``close``."""
        if self._is_closed:
            return
        self._is_closed = True
        for topic in self._topics:
            del self._broker.destinations.doors[topic]
        self._take(self._lanes.waiting)
        if not self._is_handed_over:
            self._hand_over(None)

    def go_on(self) -> None:
        """It never had to wait."""
