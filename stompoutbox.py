"""What waits for a client, until its socket takes it; and the memory that all of it is.

What it is not: a loop, or who decides that a client goes. Outboxes are told by their connection
(stompbroker.py) to put and to write; queues (stompqueues.py) are told by outboxes what is written.

Threads: none of its own. All of it is called on the broker's thread, so nothing here needs a lock.
"""

import collections
import socket
from typing import Any, List, Optional, Tuple

from protocol import would_block
from stompqueues import LARGE, BrokerMessage, Queue

RECEIVE = 64 * 1024                       # bytes taken from a client, or from its senders' lanes, at a time
JOINED = 256 * 1024                       # bytes that one write carries, if the chunks are small
SHARE = 256 * 1024                        # bytes that one sender may have waiting at a door

Delivery = Tuple[Queue, BrokerMessage]


class Memory:
    """The bytes that wait in all outboxes. A large chunk that waits for many is there once."""

    def __init__(self) -> None:
        self.bytes = 0
        self._holders = collections.Counter()  # type: collections.Counter[int]   # by the id of a large chunk

    def take(self, chunk: bytes) -> None:
        """A large chunk waits in an outbox."""
        if not self._holders[id(chunk)]:
            self.bytes += len(chunk)
        self._holders[id(chunk)] += 1

    def leave(self, chunk: bytes) -> None:
        self._holders[id(chunk)] -= 1
        if not self._holders[id(chunk)]:
            del self._holders[id(chunk)]
            self.bytes -= len(chunk)

    def holders(self, chunk: bytes) -> int:
        """In how many outboxes it waits; 0 for what is no large chunk."""
        return self._holders.get(id(chunk), 0)


class Outbox:
    """The bytes that wait for one client, first in, first out; small chunks leave in one write."""
    __slots__ = ('_chunks', '_written', '_deliveries', '_memory', '_join_at', 'waiting', 'large')

    MANY = 1000            # small chunks that are joined when the socket doesn't take them

    def __init__(self, memory: Memory) -> None:
        self._chunks = collections.deque()  # type: collections.deque[Any]
        self._deliveries = None  # type: Optional[collections.deque[Tuple[int, Delivery]]]
        self._written = 0                  # bytes, since the beginning
        self._memory = memory
        self._join_at = self.MANY          # chunks
        self.waiting = 0                   # bytes
        self.large = 0                     # of them, those of large chunks: the memory counts them

    def put(self, parts: Tuple[bytes, ...], delivery: Optional[Delivery] = None) -> int:
        """Gives the number of bytes."""
        self._chunks.extend(parts)
        size = len(parts[0]) if len(parts) == 1 else sum(map(len, parts))
        self.waiting += size
        if size >= LARGE:
            self._take_large(parts)
        if delivery is not None:
            if self._deliveries is None:   # few clients need it, and it takes a tenth of an idle one
                self._deliveries = collections.deque()
            self._deliveries.append((self._written + self.waiting, delivery))
        return size

    def _take_large(self, parts: Tuple[bytes, ...]) -> None:
        for part in parts:
            if len(part) >= LARGE:
                self._memory.take(part)
                self.large += len(part)

    @property
    def begun(self) -> int:
        """Bytes of the chunk that is being sent."""
        return len(self._chunks[0]) if self._chunks else 0

    def write(self, sock: socket.socket) -> int:
        """Sends until nothing is left, or the socket takes no more; gives the number of bytes.
        Raises OSError where it never will; what it took before is written all the same."""
        before = self.waiting
        try:
            self._send(sock)
        finally:
            self._written += before - self.waiting
            if self._deliveries is not None:
                self._settle(self._deliveries)
        if len(self._chunks) > self._join_at:
            self._join()
        return before - self.waiting

    def _send(self, sock: socket.socket) -> None:
        chunks = self._chunks
        while chunks:
            chunk = self._next(chunks)
            chunks.appendleft(chunk)
            try:
                sent = sock.send(chunk)
            except OSError as error:
                if not would_block(error):
                    raise
                return                     # the selector says when to go on
            self.waiting -= sent
            chunks.popleft()
            if self.large:
                self._count_large(chunk, sent)
            if sent < len(chunk):
                chunks.appendleft(memoryview(chunk)[sent:])
                return

    @staticmethod
    def _next(chunks: 'collections.deque[Any]') -> Any:
        """Takes the first chunk, or several small ones in one. What was begun stays as it is: TLS wants
        the same bytes again."""
        first = chunks.popleft()
        if not chunks or len(first) >= LARGE or isinstance(first, memoryview):
            return first
        parts, size = [first], len(first)
        while chunks and size < JOINED and len(chunks[0]) < LARGE:
            parts.append(chunks.popleft())
            size += len(parts[-1])
        return b''.join(parts)

    def _count_large(self, chunk: Any, sent: int) -> None:
        whole = _whole(chunk)
        if self._memory.holders(whole):
            self.large -= sent
            if sent == len(chunk):
                self._memory.leave(whole)

    def _join(self) -> None:
        """Many small chunks take much more than their bytes. The first one stays as it is."""
        chunks, self._chunks = self._chunks, collections.deque()
        self._chunks.append(chunks.popleft())
        while chunks:
            self._chunks.append(self._next(chunks))
        self._join_at = 2 * len(self._chunks) + self.MANY

    @property
    def share(self) -> float:
        """Bytes of memory that are its own, and its part of what waits for others as well."""
        shared = 0.0
        if self.large:
            for whole in map(_whole, self._chunks):
                holders = self._memory.holders(whole)
                shared += len(whole) / holders if holders else 0
        return self.waiting - self.large + shared

    def _settle(self, deliveries: 'collections.deque[Tuple[int, Delivery]]') -> None:
        """What is written, queues need not keep."""
        while deliveries and deliveries[0][0] <= self._written:
            queue, message = deliveries.popleft()[1]
            queue.written(message)

    def clear(self) -> List[Delivery]:
        """Forgets what waits; gives what queues have to take back."""
        unwritten = [delivery for _, delivery in self._deliveries or ()]
        for whole in map(_whole, self._chunks):
            if self._memory.holders(whole):
                self._memory.leave(whole)
        self._chunks.clear()
        self._deliveries = None
        self.waiting = self.large = 0
        return unwritten


def _whole(chunk: Any) -> bytes:
    """What it is the rest of, if it was begun."""
    return chunk.obj if isinstance(chunk, memoryview) else chunk  # type: ignore[no-any-return,return-value]


class Lanes:
    """What waits for a door's program: a lane for each sender, served in turn, a frame of each."""
    __slots__ = ('_lanes', 'waiting')

    def __init__(self) -> None:
        self._lanes = collections.OrderedDict()  # type: collections.OrderedDict[Any, Any]
        self.waiting = 0                   # bytes

    def add(self, sender: Any, size: int, frame: Any) -> None:
        """A frame of so many bytes."""
        if sender not in self._lanes:
            self._lanes[sender] = collections.deque()
        self._lanes[sender].append((size, frame))
        self.waiting += size
        sender.backlog += size

    def take(self) -> Any:
        """The next frame; its sender is the last to be served again."""
        sender, lane = self._lanes.popitem(last=False)
        size, frame = lane.popleft()
        if lane:
            self._lanes[sender] = lane
        self.waiting -= size
        sender.backlog -= size
        if sender.backlog < SHARE // 2:
            sender.go_on()
        return frame
