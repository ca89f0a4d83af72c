"""The embedded STOMP broker: topics and queues for STOMP 1.0, 1.1 and 1.2.

What it is not: persistent (messages live in memory, and end with it), clustered, or aware of what
the messages mean; the host's rules about who may say what come in as a ``Policy``.

Threads: one, named ``broker``. It owns every socket, session and destination, so nothing here
needs a lock; ``start``, ``stop``, ``counters`` and ``address`` may be called from any thread.

Why it is made so (bench/broker.py, 2 cores, messages of 64 bytes, each beside this design in one run).
What one ``recv`` brings is gathered, and each session gets what it is owed in one write. Tried, and lost:

* delivering after each frame: 0.3 times the messages a second one to one, 0.03 times one to 100
* parsing each head, though it is the one before once more: 0.6 times one to one
* the pieces by ``sendmsg``, not joined first: 0.8 times one to one, 0.2 times one to 100
* joining for each subscription, not once for all with the same lead: 0.8 times one to 100
* a thread for each connection, or asyncio: prototypes with no checks, limits, acks or escapes had 1.7
  times the messages one to one, and 0.2 times one to 100
"""

import argparse
import collections
import contextlib
import enum
import heapq
import hmac
import itertools
import logging
import os
import re
import selectors
import socket
import ssl
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

import agent
import protocol
from protocol import CLIENT_COMMANDS, FrameReader, RemoteError, WireFrame

log = logging.getLogger('vmhost.broker')

SERVER = 'vmhost-broker/' + agent.VERSION
VERSIONS = ('1.2', '1.1', '1.0')          # the best first
RECEIVE = 64 * 1024                       # bytes taken from a client at a time
JOINED = 256 * 1024                       # bytes that one write carries, if the chunks are small
LARGE = 32 * 1024                         # a body from here on is sent as it is, never copied
SHORTEST_MARGIN = 1.0                     # seconds that a client's heart-beat may be late
LONGEST_END = 30.0                        # seconds that a client has to read its last frames
LINGER = 2.0                              # seconds from our last byte to the socket's end
MOST_FOR_SELECT = 500                     # connections that select() can look after
LONGEST_SLEEP = 3600.0                    # seconds; system calls don't take any number
NEVER = float('inf')
WOULD_BLOCK = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
MESSAGE_OVERHEAD = 512                    # bytes that a kept message costs beside its texts
# Headers of a SEND that are about this one sending, or that MESSAGE has of its own.
NOT_PASSED_ON = frozenset(('receipt', 'transaction', 'content-length', 'message-id',
                           'subscription', 'ack'))


class BrokerError(Exception):
    """Base of this module's errors."""


class Refused(BrokerError):
    """A policy forbids it. The text goes into an ERROR frame; then the connection is closed."""


class Fault(BrokerError):
    """A client broke a rule of STOMP or a limit; handled like Refused."""


class Policy:
    """Who may do what. This one allows everything; the host passes its own.

    All methods are called on the broker's thread and must not block.
    """

    def connecting(self, session: 'Session', headers: Dict[str, str]) -> None:
        """A CONNECT whose login and passcode matched. May raise Refused, or make the session essential."""

    def subscribing(self, session: 'Session', destination: str, headers: Dict[str, str]) -> None:
        """A SUBSCRIBE. May raise Refused."""

    def sending(self, session: 'Session', destination: str, frame: WireFrame) -> Optional[bool]:
        """A SEND. May raise Refused, or return False: dropped in silence, counted as refused."""

    def audience(self, destination: str,
                 frame: WireFrame) -> Optional[Callable[['Session'], bool]]:
        """None: all subscribers get the message; or a function that says which sessions do.

        Asked about topics alone: a message in a queue is for whichever subscriber is next.
        """

    def closed(self, session: 'Session') -> None:
        """A session that ``connecting`` was asked about is over."""


class Counters:
    """What the broker has done; plain integers, written on its thread alone."""

    def __init__(self) -> None:
        self.connections_total = 0         # since the start
        self.frames_in = 0
        self.frames_out = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.waiting_bytes = 0             # that clients have not read yet
        self.queued_bytes = 0              # in queues
        self.held_bytes = 0                # in unfinished frames, transactions, subscriptions
        self.dropped = 0                   # messages that nobody wanted
        self.refused = 0                   # connections and frames, by login, limit or policy
        self.errors = 0                    # ERROR frames
        self.cut_off = 0                   # clients that did not read


class Limits(NamedTuple):
    """How much of anything a client, or all together, may take.

    A client that passes one of its own limits gets an ERROR; who takes the most when a limit of
    all is passed is cut off.
    """
    connections: int = 10000
    subscriptions: int = 1000              # a client
    transactions: int = 100                # a client
    waiting: int = 8 * 1024 * 1024         # bytes that one client has not read yet
    waiting_in_all: int = 256 * 1024 * 1024
    queued: int = 64 * 1024 * 1024         # bytes in all queues
    held: int = 128 * 1024 * 1024          # bytes in all unfinished frames, transactions, subscriptions
    unacknowledged: int = 10000            # messages of a subscription
    connect_time: float = 10.0             # seconds from the connection to a whole CONNECT
    max_frame: int = 1024 * 1024           # bytes of a body


# --- messages and destinations -----------------------------------------------------------------

class Envelope:
    """What stands round the bodies of one SEND head: destination and headers, encoded once."""
    __slots__ = ('destination', 'headers', '_lines', '_cost')

    def __init__(self, headers: Dict[str, str]) -> None:
        self.destination = headers['destination']
        self.headers = headers
        self._lines = {}  # type: Dict[str, bytes]
        self._cost = 0

    @property
    def cost(self) -> int:
        """Bytes that it takes while a message is kept."""
        if not self._cost:
            self._cost = _cost_of(self.headers)
        return self._cost

    def lines(self, version: str) -> bytes:
        """The header lines as a receiver of that version gets them."""
        lines = self._lines.get(version)
        if lines is None:
            escape = protocol.escape
            lines = self._lines[version] = ''.join(
                '%s:%s\n' % (escape(name, version), escape(value, version))
                for name, value in self.headers.items()
                if name not in NOT_PASSED_ON).encode('utf-8', 'replace')
        return lines


def _cost_of(headers: Dict[str, str], body: bytes = b'') -> int:
    """About how many bytes a frame takes: its texts, what was encoded of them, and the body."""
    return (MESSAGE_OVERHEAD + len(body)
            + 2 * (sum(map(len, headers)) + sum(map(len, headers.values()))))


class Message:
    """A SEND on its way: its number, envelope and body."""
    __slots__ = ('number', 'envelope', 'body', 'refusers')

    def __init__(self, number: str, envelope: Envelope, body: bytes) -> None:
        self.number = number
        self.envelope = envelope
        self.body = body
        self.refusers = ()  # type: Tuple['Subscription', ...]

    @property
    def cost(self) -> int:
        """Bytes that it takes while it is kept."""
        return len(self.body) + self.envelope.cost

    def head(self, version: str, acked: bool) -> bytes:
        """The head from the message's number on: a subscription's ``lead`` stands before it."""
        number = self.number.encode('ascii')
        if acked:
            number = b'%b\nmessage-id:%b' % (number, number)
        return b'%b\n%bcontent-length:%d\n\n' % (number, self.envelope.lines(version),
                                                 len(self.body))

    def rest(self, version: str, acked: bool) -> bytes:
        """The whole frame from the message's number on."""
        return b'%b%b\0\n' % (self.head(version, acked), self.body)


class Subscription:
    """What a SUBSCRIBE made: ``lead`` begins each of its MESSAGE frames."""
    __slots__ = ('session', 'connection', 'id', 'key', 'cost', 'destination', 'mode', 'lead', 'kind',
                 'unacked')

    def __init__(self, session: 'Session', number: int, key: str, headers: Dict[str, str],
                 destination: 'Destination', mode: str) -> None:
        version = session.version
        self.session = session
        self.connection = session.connection
        self.id = str(number)
        self.key = key
        self.cost = _cost_of(headers)
        self.destination = destination
        self.mode = mode
        ack_header = mode != 'auto' and version == '1.2'
        self.kind = version, ack_header
        self.unacked = collections.OrderedDict()  # type: collections.OrderedDict[str, Message]
        lead = 'MESSAGE\n'
        if 'id' in headers:
            lead += 'subscription:%s\n' % protocol.escape(headers['id'], version)
        lead += 'ack:%d-' % number if ack_header else 'message-id:'
        self.lead = lead.encode('utf-8', 'replace')

    def give(self, message: Message) -> None:
        """Sends one message to the subscriber."""
        if len(message.body) < LARGE:
            self.connection.put(self.lead + message.rest(*self.kind), 1)
        else:
            self.connection.put(self.lead + message.head(*self.kind), 1)
            self.connection.put(message.body, 0)
            self.connection.put(b'\0\n', 0)

    def acknowledge(self, number: str) -> Iterable[Message]:
        """Takes the messages that an ACK or NACK of this one is about, out of ``unacked``."""
        if number not in self.unacked:
            return []
        if self.mode == 'client-individual':
            return [self.unacked.pop(number)]
        taken = []
        while number in self.unacked:
            taken.append(self.unacked.popitem(last=False)[1])
        return taken


class Destination:
    """A name with subscribers; either a Topic or a Queue."""

    def __init__(self, broker: 'Broker', name: str) -> None:
        self.broker = broker
        self.name = name
        self.subscriptions = ()  # type: Tuple[Subscription, ...]

    def add(self, subscription: Subscription) -> None:
        self.subscriptions += (subscription,)

    def remove(self, subscription: Subscription) -> None:
        self.subscriptions = tuple(other for other in self.subscriptions
                                   if other is not subscription)

    @property
    def idle(self) -> bool:
        """Whether it may be forgotten."""
        return not self.subscriptions


class Topic(Destination):
    """Each subscriber gets each message; without subscribers it is dropped.

    Messages are gathered while the broker reads, and given to each subscriber in one piece: the
    subscription's lead, joined between the rests of the frames, which all subscribers share.
    """

    MOST_BLOBS = 64        # that are kept for subscribers whose lead is the same

    def __init__(self, broker: 'Broker', name: str) -> None:
        super().__init__(broker, name)
        self._batch = []  # type: List[Message]

    def publish(self, message: Message,
                audience: Optional[Callable[['Session'], bool]] = None) -> None:
        if not self.subscriptions:
            self.broker.count.dropped += 1
        elif audience is None and len(message.body) < LARGE:
            self._batch.append(message)
            self.broker.gathering(self)
        else:
            self.flush()
            for subscription in self.subscriptions:
                if audience is None or audience(subscription.session):
                    subscription.give(message)

    def flush(self) -> None:
        """Gives what was gathered to the subscribers."""
        if not self._batch:
            return
        batch, self._batch = self._batch, []
        rests = {}  # type: Dict[Tuple[str, bool], List[bytes]]
        blobs = {}  # type: Dict[Tuple[Tuple[str, bool], bytes], bytes]
        for subscription in self.subscriptions:
            kind, lead = subscription.kind, subscription.lead
            blob = blobs.get((kind, lead))
            if blob is None:
                if len(blobs) >= self.MOST_BLOBS:
                    blobs.clear()
                if kind not in rests:
                    rests[kind] = [b''] + [message.rest(*kind) for message in batch]
                blob = blobs[kind, lead] = lead.join(rests[kind])
            subscription.connection.put(blob, len(batch))

    def add(self, subscription: Subscription) -> None:
        self.flush()
        super().add(subscription)

    def remove(self, subscription: Subscription) -> None:
        self.flush()
        super().remove(subscription)


class Queue(Destination):
    """Each message goes to one subscriber, in turn; without subscribers it waits."""

    MOST_REFUSALS = 5      # of one message, after which nobody else is asked
    MOST_REFUSED = 1000    # messages that wait for a consumer which did not refuse them

    def __init__(self, broker: 'Broker', name: str) -> None:
        super().__init__(broker, name)
        self._messages = collections.deque()  # type: collections.deque[Message]
        self._refused = []                    # type: List[Message]
        self._turns = collections.deque()  # type: collections.deque[Subscription]

    @property
    def idle(self) -> bool:
        return not (self.subscriptions or self._messages or self._refused)

    def publish(self, message: Message,
                audience: Optional[Callable[['Session'], bool]] = None) -> None:
        self.broker.keep(message.cost)
        self._messages.append(message)
        self._hand_out()

    def dispatch(self) -> None:
        """Gives out what consumers have room for, messages that others refused first."""
        if self._refused:
            self._offer_refused()
        self._hand_out()

    def _hand_out(self) -> None:
        while self._messages:
            consumer = self._next_consumer()
            if consumer is None:
                return
            self._give(consumer, self._messages.popleft())

    def _next_consumer(self) -> Optional[Subscription]:
        for _ in range(len(self._turns)):
            consumer = self._turns[0]
            self._turns.rotate(-1)
            if self._has_room(consumer):
                return consumer
        return None

    def _has_room(self, consumer: Subscription) -> bool:
        return (consumer.connection.has_room()
                and len(consumer.unacked) < self.broker.limits.unacknowledged)

    def _give(self, consumer: Subscription, message: Message) -> None:
        if consumer.mode == 'auto':
            self.broker.let_go(message.cost)
        else:
            consumer.unacked[message.number] = message
        consumer.give(message)

    def add(self, subscription: Subscription) -> None:
        super().add(subscription)
        self._turns.append(subscription)
        self.dispatch()

    def remove(self, subscription: Subscription) -> None:
        super().remove(subscription)
        self._turns.remove(subscription)
        self._messages.extendleft(reversed(list(subscription.unacked.values())))
        subscription.unacked.clear()
        for message in self._refused:
            message.refusers = tuple(one for one in message.refusers if one is not subscription)
        self.dispatch()

    def acknowledged(self, messages: Iterable[Message]) -> None:
        for message in messages:
            self.broker.let_go(message.cost)
        self.dispatch()

    def refused(self, messages: Iterable[Message], refuser: Subscription) -> None:
        """NACK: offered to the other consumers; after several refusals it is dropped."""
        for message in messages:
            message.refusers += (refuser,)
            if len(message.refusers) < self.MOST_REFUSALS:
                self._refused.append(message)
            else:
                self._drop(message)
        self.dispatch()
        while len(self._refused) > self.MOST_REFUSED:
            self._drop(self._refused.pop(0))

    def _drop(self, message: Message) -> None:
        self.broker.count.dropped += 1
        self.broker.let_go(message.cost)

    def _offer_refused(self) -> None:
        """A message goes to no consumer that refused it; it waits for another."""
        waiting, self._refused = self._refused, []
        for message in waiting:
            for consumer in self._turns:
                if consumer not in message.refusers and self._has_room(consumer):
                    self._give(consumer, message)
                    break
            else:
                self._refused.append(message)


# --- connections -------------------------------------------------------------------------------

class State(enum.IntEnum):
    """Where a connection stands. It only moves down this list; ``Connection._enter`` moves it."""
    HANDSHAKE = 0          # of TLS
    OPENING = 1            # until CONNECT
    CONNECTED = 2
    UNREACHABLE = 3        # nothing can be written any more; what it said before is still taken
    ENDING = 4             # nothing is taken any more; what is owed is written
    DRAINING = 5           # the same, and the client says no more
    LINGERING = 6          # all is written, our half closed: the client gets a moment to close first
    CLOSED = 7


class Outbox:
    """The bytes that wait for one client, first in, first out; small chunks leave in one write."""
    __slots__ = ('_chunks', 'waiting')

    def __init__(self) -> None:
        self._chunks = collections.deque()  # type: collections.deque[Any]
        self.waiting = 0                   # bytes

    def put(self, data: Any) -> None:
        self._chunks.append(data)
        self.waiting += len(data)

    def clear(self) -> None:
        self._chunks.clear()
        self.waiting = 0

    @property
    def begun(self) -> int:
        """Bytes of the chunk that is being sent."""
        return len(self._chunks[0]) if self._chunks else 0

    def write(self, sock: socket.socket) -> None:
        """Sends until nothing is left, or the socket takes no more. Raises OSError where it never will."""
        chunks = self._chunks
        while chunks:
            chunk = self._next_chunk()
            chunks.appendleft(chunk)
            try:
                sent = sock.send(chunk)
            except WOULD_BLOCK:
                return                     # the selector says when to go on
            self.waiting -= sent
            chunks.popleft()
            if sent < len(chunk):
                chunks.appendleft(memoryview(chunk)[sent:])
                return

    def _next_chunk(self) -> Any:
        """The first chunk, or several small ones in one. What was begun stays as it is: TLS wants
        the same bytes again."""
        chunks = self._chunks
        first = chunks.popleft()
        if not chunks or len(first) >= LARGE or isinstance(first, memoryview):
            return first
        parts, size = [first], len(first)
        while chunks and size < JOINED and len(chunks[0]) < LARGE:
            parts.append(chunks.popleft())
            size += len(parts[-1])
        return b''.join(parts)


class Clock:
    """When a connection has to be looked at: for its deadline, and its heart-beats both ways."""
    __slots__ = ('heard', 'spoke', 'beat', 'silence', 'deadline')

    def __init__(self, now: float, patience: float) -> None:
        self.heard = self.spoke = now
        self.beat = 0.0                    # seconds between our beats; 0: none
        self.silence = 0.0                 # seconds without a word after which it is dead; 0: any
        self.deadline = now + patience

    def negotiate(self, ours: int, offered: str) -> None:
        """STOMP 1.2, Heart-beating; milliseconds. On a busy machine beats may be late by more than
        a short interval. Raises Fault."""
        match = re.match(r'\s*([0-9]{1,18})\s*,\s*([0-9]{1,18})\s*\Z', offered)
        if match is None:
            raise Fault('heart-beat is not two numbers: %.40r' % offered)
        theirs, wanted = int(match.group(1)), int(match.group(2))
        if ours and wanted:
            self.beat = max(ours, wanted) / 1000.0
        if ours and theirs:
            interval = max(ours, theirs) / 1000.0
            self.silence = max(2 * interval, interval + SHORTEST_MARGIN)

    def end_within(self, now: float, patience: float) -> None:
        """Heart-beats are over; there is a deadline instead."""
        self.beat = self.silence = 0.0
        self.deadline = now + patience

    @property
    def next(self) -> float:
        """When something has to be done, unless the client or we speak before."""
        beat = self.spoke + 0.6 * self.beat if self.beat else NEVER
        death = self.heard + self.silence if self.silence else NEVER
        return min(self.deadline, beat, death)

    def is_silent(self, now: float) -> bool:
        return bool(self.silence) and now >= self.heard + self.silence

    def is_to_beat(self, now: float) -> bool:
        return bool(self.beat) and now >= self.spoke + 0.6 * self.beat


class Connection:
    """A client's socket: bytes in, frames to its ``Session``, and what waits for the client out.

    What it does with either depends on its ``state``.
    """
    __slots__ = ('broker', 'peer', 'number', 'state', 'clock', 'session', '_sock', '_reader', '_outbox',
                 '_counted', '_to_flush', '_wants_room', '_held_up', '_events', '_unfinished', 'held')

    HIGH = 256 * 1024      # bytes waiting at which queues give no more

    def __init__(self, broker: 'Broker', sock: socket.socket, peer: Tuple[Any, ...], number: int) -> None:
        self.broker = broker
        self.peer = peer
        self.number = number
        self.state = State.OPENING if broker.tls is None else State.HANDSHAKE
        self.clock = Clock(broker.now, broker.limits.connect_time)
        self._sock = sock
        # Until CONNECT nothing large is waited for, whoever that may be.
        self._reader = FrameReader(CLIENT_COMMANDS, max_body=RECEIVE)
        self._outbox = Outbox()
        self._counted = 0                  # bytes of the outbox that are in the broker's counter
        self._to_flush = False             # the broker will call ``flush`` in this round
        self._wants_room = False           # queues have more for it
        self._held_up = False              # not read until an essential session has read
        self._events = 0                   # that the selector looks for
        self._unfinished = 0               # bytes that wait for the rest of their frame
        self.held = 0                      # bytes that the client makes the broker keep
        self.session = Session(self)

    def __repr__(self) -> str:
        return '<connection of %s>' % _spoken(self.peer)

    # -- states

    def begin(self) -> None:
        """From now on the selector looks after the socket, and the clock after all of it."""
        self._listen_for(selectors.EVENT_READ)
        self.broker.came(self)
        self.set_clock()

    def opened(self, version: str) -> None:
        """CONNECT was right."""
        self.state = State.CONNECTED
        self._reader.version = version
        self._reader.max_body = self.broker.limits.max_frame
        self.clock.deadline = NEVER
        self.set_clock()

    def _enter(self, state: State) -> None:
        """Moves on to a state of the end."""
        if self.state < State.ENDING:
            self.broker.flush_gathered()   # which it may be owed
        before, self.state = self.state, state
        if before < State.ENDING:
            self._release()
        if state is State.CLOSED:
            return self._shut()
        if state is State.LINGERING:
            self.clock.end_within(self.broker.now, LINGER)
        elif before < State.ENDING:
            self.clock.end_within(self.broker.now, LONGEST_END)
        self.set_clock()
        self._listen()

    def _release(self) -> None:
        """It takes nothing any more, so nothing is kept for it but what it is owed."""
        self.session.leave()
        self.hold(-self.held)
        self._unfinished = 0

    def _shut(self) -> None:
        if self.session.essential:
            self.broker.let_all_go_on()
        self._listen_for(0)
        self._outbox.clear()
        self._count_waiting()
        self.broker.alarms.cancel(self.number)
        self._sock.close()
        self.broker.gone(self)
        del self.session                   # the two would keep each other until the collector comes

    def guarded(self, step: Callable[..., None], *arguments: Any) -> None:
        """Does one of its steps. An error of the broker's own ends this connection alone."""
        if self.state is State.CLOSED:     # by another one, earlier in this round
            return
        try:
            step(*arguments)
        except OSError as error:
            self.close(str(error))
        except Exception:
            log.exception('%r is closed after an error of the broker', self)
            self.close('internal error')

    def ready(self, events: int) -> None:
        """The selector says that the socket can be read or written."""
        self.guarded(self._ready, events)

    def _ready(self, events: int) -> None:
        if self.state is State.HANDSHAKE:
            if not self._shake_hands():
                return
            events = selectors.EVENT_READ          # TLS may have taken in more than the handshake
        if events & selectors.EVENT_READ:
            if self._has_to_wait():
                self._held_up = True
                self._listen()
            else:
                self._read()
        if events & selectors.EVENT_WRITE and self.state is not State.CLOSED:
            self.flush()

    def _shake_hands(self) -> bool:
        """Whether TLS is established."""
        try:
            self._sock.do_handshake()  # type: ignore[attr-defined]
        except ssl.SSLWantReadError:
            self._listen_for(selectors.EVENT_READ)
        except ssl.SSLWantWriteError:
            self._listen_for(selectors.EVENT_WRITE)
        else:
            self.state = State.OPENING
            self._listen()
        return self.state is State.OPENING

    def _listen(self) -> None:
        """Has the selector look for what matters in this state."""
        events = selectors.EVENT_WRITE if self._outbox.waiting else 0
        if not self._held_up and self.state is not State.DRAINING:
            events |= selectors.EVENT_READ
        self._listen_for(events)

    def _listen_for(self, events: int) -> None:
        if events != self._events:
            self.broker.listen_for(self._sock, events, self._events, self.ready)
            self._events = events

    def _has_to_wait(self) -> bool:
        """Whether an essential session must read first. Who ends, or hasn't begun, adds nothing for it."""
        return (self.broker.is_held_up and State.CONNECTED <= self.state < State.ENDING
                and not self.session.essential)

    def go_on(self) -> None:
        """If it had to wait, it is read again; that it wasn't heard was not its fault."""
        if self._held_up:
            self._held_up = False
            self.clock.heard = self.broker.now
            self._listen()

    # -- reading

    def _read(self) -> None:
        data = self._receive()
        while data:
            self.clock.heard = self.broker.now
            self.broker.count.bytes_in += len(data)
            if self.state < State.ENDING:
                self._take(data)
            data = self._receive() if self._is_buffered_by_tls() else None
        if data == b'':
            self._hung_up()

    def _receive(self) -> Optional[bytes]:
        """What has come; b'' at the end, None where nothing has."""
        try:
            return self._sock.recv(RECEIVE)
        except WOULD_BLOCK:
            return None

    def _is_buffered_by_tls(self) -> bool:
        return self.broker.tls is not None and self.state is not State.CLOSED and bool(
            self._sock.pending())  # type: ignore[attr-defined]

    def _hung_up(self) -> None:
        """The client says no more; it may still read what it is owed."""
        self.end()
        if self.waiting:
            self._enter(State.DRAINING)
        else:
            self.close('closed by the client')

    def _take(self, data: bytes) -> None:
        """Bytes of the client, and each frame that they finish."""
        reader, frame = self._reader, None
        try:
            reader.feed(data)
            frame = reader.next_frame()
            while frame is not None:
                self.broker.count.frames_in += 1
                self.session.handle(frame)
                if self.state >= State.ENDING:
                    return
                frame = reader.next_frame()
            if reader.held or self._unfinished:
                self._hold_unfinished(reader.held)
        except Refused as error:
            self.broker.count.refused += 1
            self.fail(str(error), frame)
        except RemoteError as error:
            self.fail(str(error), reader.refused)
        except Fault as error:
            self.fail(str(error), frame)
        except Exception:
            log.exception('%r ends by an error of the broker', self)
            self.fail('internal error', frame)

    def _hold_unfinished(self, size: int) -> None:
        change, self._unfinished = size - self._unfinished, size
        self.hold(change)

    def hold(self, cost: int) -> None:
        """Accounts bytes that the client makes the broker keep; a negative cost lets go of them."""
        self.held += cost
        self.broker.count.held_bytes += cost
        if cost > 0 and self.broker.count.held_bytes > self.broker.limits.held:
            self.broker.relieve_held(self)

    # -- writing

    def put(self, data: Any, frames: int) -> None:
        """Bytes for the client; they leave with all others when the broker has read its round."""
        if self.state > State.CONNECTED:
            return
        self._outbox.put(data)
        self.broker.count.frames_out += frames
        if not self._to_flush:
            self._ask_for_flush()
        if self.session.essential:
            if self._outbox.waiting > self.broker.limits.waiting // 2:
                self.broker.is_held_up = True
        elif self._outbox.waiting > self.broker.most_in_a_round:
            self._relieve()

    def _ask_for_flush(self) -> None:
        self._to_flush = True
        self.broker.to_flush(self)

    def _relieve(self) -> None:
        """One round brings more than may wait: only after a try to write is it known who is slow."""
        self._write()
        if self._outbox.waiting > self.broker.most_in_a_round:
            self.cut_off()

    def has_room(self) -> bool:
        """Whether a queue may give more; if not, the queues are asked again when there is."""
        if self._outbox.waiting < self.HIGH:
            return True
        self._wants_room = True
        return False

    def flush(self) -> None:
        """Writes as much as the socket takes, and does what follows from what is left."""
        self._to_flush = False
        if self.state is State.HANDSHAKE:
            return
        self._write()
        self._count_waiting()
        if self.session.essential and self.waiting < self.broker.limits.waiting // 4:
            self.broker.let_all_go_on()
        if self._has_too_much():
            return self.cut_off()
        if not self.waiting and self.state in (State.ENDING, State.DRAINING):
            return self._finish()
        self._listen()
        if self._wants_room and self.waiting < self.HIGH // 2:
            self._wants_room = False
            self.session.ask_queues()

    def _write(self) -> None:
        before = self._outbox.waiting
        try:
            self._outbox.write(self._sock)
        except OSError as error:
            log.debug('%r: %s', self, error)
            self._outbox.clear()
            if self.state < State.UNREACHABLE:
                self.state = State.UNREACHABLE
        else:
            sent = before - self._outbox.waiting
            if sent:
                self.clock.spoke = self.broker.now
                self.broker.count.bytes_out += sent

    def _has_too_much(self) -> bool:
        """The frame that is being sent doesn't count, or no body could be larger than the limit."""
        return (not self.session.essential
                and self.waiting - self._outbox.begun > self.broker.limits.waiting)

    def _count_waiting(self) -> None:
        self.broker.count.waiting_bytes += self.waiting - self._counted
        self._counted = self.waiting

    @property
    def waiting(self) -> int:
        """Bytes that it was sent and has not read."""
        return self._outbox.waiting

    # -- the clock

    def set_clock(self) -> None:
        self.broker.alarms.set(self.number, self.clock.next, self.tick)

    def tick(self) -> None:
        """The clock reached what was set."""
        self.guarded(self._tick)

    def _tick(self) -> None:
        now, clock = self.broker.now, self.clock
        if self._held_up:
            clock.heard = now
        if now >= clock.deadline:
            return self._time_is_over()
        if clock.is_silent(now):
            log.info('%r is taken for dead: silent for %.1f s', self, now - clock.heard)
            return self.close('silent')
        if clock.is_to_beat(now):
            if not self.waiting:           # else what waits there is beat enough
                self.put(b'\n', 0)
            clock.spoke = now
        self.set_clock()

    def _time_is_over(self) -> None:
        """No CONNECT came in time, or the end takes too long."""
        if self.state is State.OPENING:
            self.fail('no CONNECT within %g s' % self.broker.limits.connect_time)
        else:
            self.close('its time to connect or to end is over')

    # -- the end

    def fail(self, text: str, frame: Optional[WireFrame] = None) -> None:
        """An ERROR frame, then the end."""
        self.broker.count.errors += 1
        log.info('%r: %s', self, text)
        self.session.say_error(' '.join(text.replace('\0', ' ').split()), frame)
        self.end()

    def end(self) -> None:
        """No frame is taken any more; what is owed is still written, then the socket closed."""
        if self.state is State.UNREACHABLE:
            self.close('ended')
        elif self.state < State.ENDING:
            self._enter(State.ENDING)
            if not self._to_flush:
                self._ask_for_flush()

    def _finish(self) -> None:
        """All is written: says so, and waits shortly for the peer to close first, since closing
        with unread bytes would throw away what the peer has not read yet."""
        if self.state is State.DRAINING:
            return self.close('ended')
        self._say_goodbye_in_tls()
        self._sock.shutdown(socket.SHUT_WR)
        self._enter(State.LINGERING)

    def _say_goodbye_in_tls(self) -> None:
        """Tells a TLS client that this is the end, and no attacker's cut; its answer isn't waited for."""
        if self.broker.tls is not None:
            with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                self._sock.unwrap()  # type: ignore[attr-defined]

    def cut_off(self) -> None:
        """Closes the connection of one that doesn't read: too much waits for it."""
        self.broker.count.cut_off += 1
        log.warning('%r is cut off: it has not read %d bytes', self, self.waiting)
        self.close('does not read')

    def close(self, why: str) -> None:
        """Closes the socket at once."""
        if self.state is not State.CLOSED:
            log.debug('%r is closed: %s', self, why)
            self._enter(State.CLOSED)


# --- sessions ----------------------------------------------------------------------------------

class Transactions:
    """The open transactions of a session: the frames of each, until COMMIT or ABORT."""
    __slots__ = ('_open', '_most', '_hold')

    def __init__(self, most: int, hold: Callable[[int], None]) -> None:
        self._open = {}  # type: Dict[str, List[WireFrame]]
        self._most = most
        self._hold = hold                  # accounts the bytes that they take; may raise Fault

    def begin(self, name: str) -> None:
        if name in self._open:
            raise Fault('transaction %.80r is open already' % name)
        if len(self._open) >= self._most:
            raise Fault('more than %d transactions' % self._most)
        self._hold(_cost_of({'transaction': name}))
        self._open[name] = []

    def add(self, frame: WireFrame) -> None:
        """The frame waits for COMMIT. Raises Fault where its transaction isn't open."""
        frames = self._find(frame.headers['transaction'])
        self._hold(_cost_of(frame.headers, frame.body))
        frames.append(frame)

    def end(self, name: str) -> List[WireFrame]:
        """The frames, in their order; the transaction is over."""
        frames = self._find(name)
        del self._open[name]
        self._hold(-_cost_of({'transaction': name}))
        for frame in frames:
            self._hold(-_cost_of(frame.headers, frame.body))
        return frames

    def _find(self, name: str) -> List[WireFrame]:
        if name not in self._open:
            raise Fault('no transaction %.80r' % name)
        return self._open[name]


class Session:
    """What a client says, in STOMP, over its connection: one method for each command.

    ``peer``, ``id``, ``policy_data``, ``essential`` and ``close`` are for the policy; the rest is
    the broker's own.
    """
    __slots__ = ('broker', 'connection', 'peer', 'id', 'policy_data', 'essential', 'version',
                 '_subscriptions', '_by_number', '_numbers', '_transactions', '_is_known')

    def __init__(self, connection: Connection) -> None:
        self.broker = connection.broker
        self.connection = connection
        self.peer = connection.peer
        self.id = '%s-%d' % (self.broker.token, connection.number)
        self.policy_data = None  # type: Any
        self.essential = False             # others are read no further while too much waits for this one
        self.version = '1.0'
        self._subscriptions = {}  # type: Dict[str, Subscription]
        self._by_number = {}      # type: Dict[str, Subscription]
        self._numbers = 0
        self._transactions = Transactions(self.broker.limits.transactions, connection.hold)
        self._is_known = False             # the policy was asked

    def __repr__(self) -> str:
        return '<session %s of %s>' % (self.id, _spoken(self.peer))

    def close(self, why: str) -> None:
        """Ends it at once. On the broker's thread."""
        self.connection.close(why)

    def handle(self, frame: WireFrame) -> None:
        """A frame of the client. Raises Refused or Fault."""
        if self.connection.state is State.OPENING:
            if frame.command not in ('CONNECT', 'STOMP'):
                raise Fault('%s before CONNECT' % frame.command)
            return self._connect(frame)
        _HANDLERS[frame.command](self, frame)
        if 'receipt' in frame.headers and frame.command != 'DISCONNECT':
            self._say_receipt(frame)

    def _say_receipt(self, frame: WireFrame) -> None:
        self._say('RECEIPT', {'receipt-id': frame.headers['receipt']})

    def _say(self, command: str, headers: Dict[str, str], body: bytes = b'') -> None:
        if self._subscriptions:
            # No RECEIPT or ERROR overtakes the messages of frames before its own.
            self.broker.flush_gathered()
        self.connection.put(protocol.encode(command, headers, body, self.version), 1)

    def say_error(self, text: str, frame: Optional[WireFrame]) -> None:
        """ERROR, about that frame."""
        headers = {'message': text}
        if frame is not None and 'receipt' in frame.headers:
            headers['receipt-id'] = frame.headers['receipt']
        if self.connection.state < State.CONNECTED:
            headers['version'] = ','.join(reversed(VERSIONS))
        headers['content-type'] = 'text/plain'
        self._say('ERROR', headers, (text + '\n').encode('utf-8', 'replace'))

    def leave(self) -> None:
        """Leaves destinations and transactions, and tells the policy."""
        subscriptions, self._subscriptions = self._subscriptions, {}
        for subscription in subscriptions.values():
            self._leave(subscription)
        self._transactions = Transactions(0, self.connection.hold)
        if self._is_known:
            self._is_known = False
            try:
                self.broker.policy.closed(self)
            except Exception:
                log.exception('the policy, about the end of %r', self)

    def _needed(self, frame: WireFrame, name: str) -> str:
        value = frame.headers.get(name)
        if not value:
            raise Fault('%s without the header %s' % (frame.command, name))
        return value

    # -- CONNECT and DISCONNECT

    def _connect(self, frame: WireFrame) -> None:
        headers = frame.headers
        version = self._negotiate(headers.get('accept-version'))
        answer = {'version': version, 'session': self.id, 'server': SERVER}
        if version != '1.0':
            self.connection.clock.negotiate(self.broker.beat_ms, headers.get('heart-beat', '0,0'))
            answer['heart-beat'] = '%d,%d' % (self.broker.beat_ms, self.broker.beat_ms)
        if not self.broker.admits(headers.get('login', ''), headers.get('passcode', '')):
            raise Refused('login or passcode is wrong')
        self._is_known = True
        self.broker.policy.connecting(self, headers)
        self.version = version
        self.connection.opened(version)
        self._say('CONNECTED', answer)
        log.debug('%r connected, STOMP %s', self, version)

    def _negotiate(self, accepted: Optional[str]) -> str:
        if accepted is None:
            return '1.0'
        offered = [version.strip() for version in accepted.split(',')]
        for version in VERSIONS:
            if version in offered:
                return version
        raise Fault('no common version: this broker speaks 1.0, 1.1 and 1.2')

    def _again(self, frame: WireFrame) -> None:
        raise Fault('%s on a session that is connected' % frame.command)

    def _disconnect(self, frame: WireFrame) -> None:
        if 'receipt' in frame.headers:
            self._say_receipt(frame)
        self.connection.end()

    # -- SEND

    def _send(self, frame: WireFrame) -> None:
        destination = self._needed(frame, 'destination')
        if self.broker.policy.sending(self, destination, frame) is False:
            self.broker.count.refused += 1
        elif 'transaction' in frame.headers:
            self._transactions.add(frame)
        else:
            self.broker.route(frame)

    # -- SUBSCRIBE and UNSUBSCRIBE

    def _subscribe(self, frame: WireFrame) -> None:
        destination = self._needed(frame, 'destination')
        mode = frame.headers.get('ack', 'auto')
        if self.version == '1.0':
            key = frame.headers.get('id', 'destination ' + destination)
        else:
            key = self._needed(frame, 'id')
        if key in self._subscriptions:
            raise Fault('there is a subscription with the id %.80r already' % key)
        if mode not in ('auto', 'client', 'client-individual'):
            raise Fault('ack is none of auto, client, client-individual: %.40r' % mode)
        if len(self._subscriptions) >= self.broker.limits.subscriptions:
            raise Fault('more than %d subscriptions' % self.broker.limits.subscriptions)
        self.broker.policy.subscribing(self, destination, frame.headers)
        self.connection.hold(_cost_of(frame.headers))
        self._numbers += 1
        place = self.broker.destination(destination)
        subscription = Subscription(self, self._numbers, key, frame.headers, place, mode)
        self._subscriptions[key] = self._by_number[subscription.id] = subscription
        place.add(subscription)

    def _unsubscribe(self, frame: WireFrame) -> None:
        if self.version == '1.0' and 'id' not in frame.headers:
            subscription = self._subscribed_to(self._needed(frame, 'destination'))
        else:
            subscription = self._subscriptions.get(self._needed(frame, 'id'))
        if subscription is None:
            raise Fault('no such subscription')
        del self._subscriptions[subscription.key]
        self.connection.hold(-subscription.cost)
        self._leave(subscription)

    def _subscribed_to(self, destination: str) -> Optional[Subscription]:
        for subscription in self._subscriptions.values():
            if subscription.destination.name == destination:
                return subscription
        return None

    def _leave(self, subscription: Subscription) -> None:
        del self._by_number[subscription.id]
        subscription.destination.remove(subscription)
        self.broker.forget(subscription.destination)

    def ask_queues(self) -> None:
        """There is room again for what queues have."""
        for subscription in list(self._subscriptions.values()):
            if isinstance(subscription.destination, Queue):
                subscription.destination.dispatch()

    # -- ACK and NACK

    def _ack(self, frame: WireFrame) -> None:
        if self.version == '1.2':
            self._needed(frame, 'id')
        else:
            self._needed(frame, 'message-id')
            if self.version == '1.1':
                self._needed(frame, 'subscription')
        if 'transaction' in frame.headers:
            self._transactions.add(frame)
        else:
            self._settle(frame)

    def _settle(self, frame: WireFrame) -> None:
        """ACK or NACK. One that fits nothing is ignored: the message may be gone for reasons
        that the client couldn't know. Topics keep nothing, so there it has no effect."""
        subscription, number = self._find_unacked(frame.headers)
        if subscription is None or not isinstance(subscription.destination, Queue):
            return
        messages = subscription.acknowledge(number)
        if frame.command == 'ACK':
            subscription.destination.acknowledged(messages)
        else:
            subscription.destination.refused(messages, subscription)

    def _find_unacked(self, headers: Dict[str, str]) -> Tuple[Optional[Subscription], str]:
        if self.version == '1.2':
            key, _, number = headers['id'].partition('-')
            return self._by_number.get(key), number
        number = headers['message-id']
        if self.version == '1.1':
            return self._subscriptions.get(headers['subscription']), number
        for subscription in self._subscriptions.values():
            if number in subscription.unacked:
                return subscription, number
        return None, number

    # -- BEGIN, COMMIT and ABORT

    def _begin(self, frame: WireFrame) -> None:
        self._transactions.begin(self._needed(frame, 'transaction'))

    def _commit(self, frame: WireFrame) -> None:
        for part in self._transactions.end(self._needed(frame, 'transaction')):
            if part.command == 'SEND':
                self.broker.route(part)
            else:
                self._settle(part)

    def _abort(self, frame: WireFrame) -> None:
        self._transactions.end(self._needed(frame, 'transaction'))


_HANDLERS = {
    'CONNECT': Session._again, 'STOMP': Session._again, 'SEND': Session._send,
    'SUBSCRIBE': Session._subscribe, 'UNSUBSCRIBE': Session._unsubscribe,
    'ACK': Session._ack, 'NACK': Session._ack, 'BEGIN': Session._begin,
    'COMMIT': Session._commit, 'ABORT': Session._abort, 'DISCONNECT': Session._disconnect,
}  # type: Dict[str, Callable[[Session, WireFrame], None]]


# --- the broker --------------------------------------------------------------------------------

class Alarms:
    """Who wants to be called, and when; each has a number, and one time at most."""

    def __init__(self) -> None:
        self._times = []         # type: List[Tuple[float, int]]
        self._set = {}           # type: Dict[int, Tuple[float, Callable[[], None]]]

    def __len__(self) -> int:
        return len(self._times)

    def set(self, number: int, when: float, ring: Callable[[], None]) -> None:
        """``ring`` is called then, or when it was said before, if that is earlier."""
        if when == NEVER or (number in self._set and self._set[number][0] <= when):
            return
        self._set[number] = when, ring
        heapq.heappush(self._times, (when, number))
        if len(self._times) > 4 * len(self._set) + 1000:
            self._forget_stale()

    def cancel(self, number: int) -> None:
        self._set.pop(number, None)

    def _is_set(self, when: float, number: int) -> bool:
        return number in self._set and self._set[number][0] == when

    def _forget_stale(self) -> None:
        """Connections come, go, and change their time; what was set before stays in the heap."""
        self._times[:] = [entry for entry in self._times if self._is_set(*entry)]
        heapq.heapify(self._times)

    def patience(self) -> Optional[float]:
        """Seconds until the next one."""
        if not self._times:
            return None
        return min(max(0.0, self._times[0][0] - time.monotonic()), LONGEST_SLEEP)

    def delay(self, now: float) -> float:
        """Seconds by which the next one is late."""
        return now - self._times[0][0] if self._times else 0.0

    def ring(self, now: float) -> None:
        """Calls those whose time has come."""
        while self._times and self._times[0][0] <= now:
            when, number = heapq.heappop(self._times)
            if self._is_set(when, number):
                self._set.pop(number)[1]()


class Listener:
    """The socket that clients connect to."""

    BACKLOG = 4096         # 2,000 at once lose a second where it is 1,024

    def __init__(self, broker: 'Broker', host: str, port: int) -> None:
        """Raises BrokerError where the address can't be had."""
        self._broker = broker
        if not 0 <= port <= 65535:
            raise BrokerError('there is no port %d' % port)           # getaddrinfo takes another one
        try:
            found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)[0]
            self._sock = socket.socket(found[0], found[1])
            try:
                _claim_port(self._sock)
                _notice_the_dead(self._sock)
                self._sock.bind(found[4])
                self._sock.listen(self.BACKLOG)
                self._sock.setblocking(False)
            except OSError:
                self._sock.close()
                raise
        except (OSError, UnicodeError) as error:
            raise BrokerError('the broker cannot listen on %s: %s' % (_spoken((host, port)), error))

    @property
    def address(self) -> Tuple[str, int]:
        return self._sock.getsockname()[:2]

    def begin(self) -> None:
        self._broker.listen_for(self._sock, selectors.EVENT_READ, 0, self._accept)

    def close(self) -> None:
        self._sock.close()

    def _accept(self, events: int) -> None:
        """Takes the connections that wait."""
        for _ in range(128):
            try:
                sock, peer = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as error:
                return self._pause(error)
            self._broker.admit(sock, peer)

    def _pause(self, error: OSError) -> None:
        """No descriptors left: waits for some to be closed, without spinning."""
        log.error('cannot accept a connection: %s', error)
        self._broker.listen_for(self._sock, 0, selectors.EVENT_READ, self._accept)
        self._broker.alarms.set(0, self._broker.now + 0.5, self.begin)


class Broker:
    """A STOMP server on one address. ``start``, then ``stop``; both from any thread.

    tls: an ssl.SSLContext for servers, or None. heartbeat: the shortest interval, in seconds,
    that is offered in both directions; the larger of it and what a client asks for holds; 0: none.
    Further keywords are the fields of Limits.
    """

    def __init__(self, host: str = '127.0.0.1', port: int = 61613, login: str = '',
                 passcode: str = '', tls: Optional[ssl.SSLContext] = None,
                 policy: Optional[Policy] = None, heartbeat: float = 0.2,
                 **limits: Any) -> None:
        self.limits = Limits(**limits)
        self.policy = policy or Policy()
        self.tls = tls
        self.beat_ms = int(heartbeat * 1000)
        self.token = '%08x' % int.from_bytes(os.urandom(4), 'big')
        self.count = Counters()
        self.now = time.monotonic()
        self.alarms = Alarms()
        # What a round may gather for a client before it must be written. Twice the limit, since
        # only after a try to write it is known whether the client is slow.
        self.most_in_a_round = 2 * self.limits.waiting + self.limits.max_frame
        self.is_held_up = False            # too much waits for an essential session
        self._host, self._port = host, port
        self._login, self._passcode = login, passcode
        self._listener = None  # type: Optional[Listener]
        self._waker = None     # type: Optional[socket.socket]
        self._thread = None    # type: Optional[threading.Thread]
        self._stopping = False
        self._most_connections = self.limits.connections
        self._connections = {}   # type: Dict[int, Connection]
        self._destinations = {}  # type: Dict[str, Destination]
        self._envelope = Envelope({'destination': ''})   # of the last SEND: the next is often like it
        self._gathering = None   # type: Optional[Topic]
        self._to_flush = []      # type: List[Connection]
        self._connection_numbers = itertools.count(1)
        self._message_numbers = itertools.count(1)

    # -- from any thread

    def start(self) -> None:
        """Listens, and starts the thread. Raises BrokerError where the address can't be had."""
        _allow_many_sockets()
        self._stopping = False
        self._listener = Listener(self, self._host, self._port)
        self._selector = selectors.DefaultSelector()
        if isinstance(self._selector, selectors.SelectSelector):      # on Windows, and bounded there
            self._most_connections = min(self._most_connections, MOST_FOR_SELECT)
        self._wakee, self._waker = socket.socketpair()
        self._wakee.setblocking(False)
        self._selector.register(self._wakee, selectors.EVENT_READ, self._woken)
        self._listener.begin()
        self._thread = threading.Thread(target=self._run, name='broker', daemon=True)
        self._thread.start()

    @property
    def address(self) -> Tuple[str, int]:
        """Host and port that it listens on."""
        if self._listener is None:
            raise BrokerError('the broker does not listen')
        return self._listener.address

    def stop(self, timeout: float = 3.0) -> None:
        """Closes all sockets and ends the thread; waits for it at most ``timeout`` seconds."""
        if self._thread is None or self._waker is None:
            return
        self._stopping = True
        try:
            self._waker.send(b'.')
        except OSError:
            log.debug('the thread saw the flag before it could be woken')
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.error('thread %s still runs %.1f s after stop', self._thread.name, timeout)
        else:
            self._waker.close()
        self._thread = None

    def counters(self) -> Dict[str, int]:
        """What it did so far, and holds now."""
        counted = dict(vars(self.count))
        counted['connections'] = len(self._connections)
        counted['destinations'] = len(self._destinations)
        return counted

    # -- the loop

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._round()
        except Exception:
            log.exception('the broker ends')
        finally:
            self._close_all()

    def _round(self) -> None:
        ready = self._selector.select(self.alarms.patience())
        self.now = time.monotonic()
        for key, events in ready:
            key.data(events)
        self._deliver()
        if self.alarms.delay(self.now) > SHORTEST_MARGIN:
            self._forgive()
        self.alarms.ring(self.now)
        self._deliver()

    def _woken(self, events: int) -> None:
        self._wakee.recv(64)

    def _close_all(self) -> None:
        for connection in list(self._connections.values()):
            connection.close('the broker stops')
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._wakee.close()
        self._selector.close()

    def admit(self, sock: socket.socket, peer: Tuple[Any, ...]) -> None:
        """A client came."""
        self.count.connections_total += 1
        if len(self._connections) >= self._most_connections:
            self.count.refused += 1
            log.warning('%s is sent away: %d connections', _spoken(peer), len(self._connections))
            sock.close()
            return
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if self.tls is not None:
                sock = self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            Connection(self, sock, peer, next(self._connection_numbers)).begin()
        except (OSError, ValueError) as error:
            log.info('%s is gone already: %s', _spoken(peer), error)
            sock.close()

    def _deliver(self) -> None:
        """Gives out what the round gathered, each connection its own in one write."""
        self.flush_gathered()
        self._flush()
        if self.count.waiting_bytes > self.limits.waiting_in_all:
            self._relieve_waiting()
            self._flush()

    def _flush(self) -> None:
        waiting = self._to_flush
        for connection in waiting:         # grows while queues find room
            connection.guarded(connection.flush)
        del waiting[:]

    def _relieve_waiting(self) -> None:
        """All clients together don't read enough: those for whom most waits go."""
        others = [each for each in self._connections.values() if not each.session.essential]
        for connection in sorted(others, key=lambda each: -each.waiting):
            if self.count.waiting_bytes <= self.limits.waiting_in_all:
                return
            connection.cut_off()

    def relieve_held(self, asking: Connection) -> None:
        """The broker keeps too much for its clients: the one who makes it keep most goes."""
        worst = max(self._connections.values(), key=lambda each: each.held)
        text = 'the broker keeps %d bytes for this client, and too many in all' % worst.held
        if worst is asking:
            raise Fault(text)
        worst.fail(text)

    def _forgive(self) -> None:
        """This process was stopped, or starved: that clients weren't heard may be its own fault."""
        log.info('the clock stood still for %.1f s', self.alarms.delay(self.now))
        for connection in self._connections.values():
            connection.clock.heard = self.now

    # -- for connections, sessions and destinations, on the broker's thread

    def admits(self, login: str, passcode: str) -> bool:
        """Whether login and passcode are right. The time it takes tells nothing about them."""
        if not self._login and not self._passcode:
            return True
        right = [hmac.compare_digest(ours.encode('utf-8'), theirs.encode('utf-8', 'replace'))
                 for ours, theirs in ((self._login, login), (self._passcode, passcode))]
        return all(right)

    def destination(self, name: str) -> Destination:
        """The topic or queue of that name. What isn't /queue/… is a topic."""
        place = self._destinations.get(name)
        if place is None:
            kind = Queue if name.startswith('/queue/') else Topic
            place = self._destinations[name] = kind(self, name)
        return place

    def forget(self, destination: Destination) -> None:
        """Drops a destination that holds nothing."""
        if destination.idle:
            self._destinations.pop(destination.name, None)

    def route(self, frame: WireFrame) -> None:
        """Gives a SEND to its destination."""
        envelope = self._envelope
        if frame.headers != envelope.headers:
            envelope = self._envelope = Envelope(frame.headers)
        name = envelope.destination
        place = self._destinations.get(name)
        if place is None:
            if not name.startswith('/queue/'):
                self.count.dropped += 1
                return
            place = self.destination(name)
        if self._gathering is not place:
            self.flush_gathered()
        message = Message('%s-%d' % (self.token, next(self._message_numbers)), envelope,
                          frame.body)
        place.publish(message, self.policy.audience(name, frame))  # type: ignore[union-attr]

    def flush_gathered(self) -> None:
        if self._gathering is not None:
            self._gathering.flush()
            self._gathering = None

    def gathering(self, topic: Topic) -> None:
        """The topic has a batch. One at a time does, so that order holds between topics, too."""
        self._gathering = topic

    def to_flush(self, connection: Connection) -> None:
        self._to_flush.append(connection)

    def let_all_go_on(self) -> None:
        """An essential session has read, or is gone. Where another one hasn't, they soon wait again."""
        if self.is_held_up:
            self.is_held_up = False
            for connection in self._connections.values():
                connection.go_on()

    def keep(self, cost: int) -> None:
        """Accounts bytes that wait in queues. Raises Fault where it's too much."""
        if self.count.queued_bytes + cost > self.limits.queued:
            raise Fault('queues hold %d bytes already' % self.count.queued_bytes)
        self.count.queued_bytes += cost

    def let_go(self, cost: int) -> None:
        self.count.queued_bytes -= cost

    def listen_for(self, sock: socket.socket, events: int, before: int,
                   ready: Callable[[int], None]) -> None:
        """Has the selector look for other events than before; ``ready`` is told which came."""
        if not events:
            self._selector.unregister(sock)
        elif not before:
            self._selector.register(sock, events, ready)
        else:
            self._selector.modify(sock, events, ready)

    def came(self, connection: Connection) -> None:
        self._connections[connection.number] = connection

    def gone(self, connection: Connection) -> None:
        self._connections.pop(connection.number, None)


def _claim_port(listener: socket.socket) -> None:
    """On POSIX the port is free at once after a stop; on Windows nobody may share it."""
    exclusive = getattr(socket, 'SO_EXCLUSIVEADDRUSE', None)
    if exclusive is not None:
        listener.setsockopt(socket.SOL_SOCKET, exclusive, 1)
    else:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listener.family == getattr(socket, 'AF_INET6', None):
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)


def _notice_the_dead(listener: socket.socket) -> None:
    """Peers that vanish without a word are noticed in 2 minutes; where sockets inherit it (Linux)."""
    for name, value in (('TCP_KEEPIDLE', 60), ('TCP_KEEPINTVL', 20), ('TCP_KEEPCNT', 3)):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _allow_many_sockets() -> None:
    """Raises the process's limit of descriptors, where there is such a thing."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:
            log.info('at most %d descriptors: %s', soft, error)


def _spoken(address: Tuple[Any, ...]) -> str:
    host = str(address[0])
    return '%s:%s' % ('[%s]' % host if ':' in host else host, address[1])


# --- the command line --------------------------------------------------------------------------

def _arguments(arguments: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='A STOMP broker.')
    parser.add_argument('--host', default='127.0.0.1')
    parser.add_argument('--port', type=int, default=61613)
    parser.add_argument('--login', default='')
    parser.add_argument('--passcode', default='')
    parser.add_argument('--tls-cert', metavar='FILE', help='PEM; turns TLS on')
    parser.add_argument('--tls-key', metavar='FILE', help='PEM, where it is not in the other file')
    parser.add_argument('--max-frame', type=int, default=16 * 1024 * 1024, metavar='BYTES')
    parser.add_argument('-v', '--verbose', action='store_true')
    return parser.parse_args(arguments)


def main(arguments: Optional[List[str]] = None) -> int:
    """Runs a broker until SIGTERM or Ctrl-C."""
    chosen = _arguments(arguments)
    logging.basicConfig(level=logging.DEBUG if chosen.verbose else logging.WARNING,
                        format='%(asctime)s %(levelname)s %(name)s: %(message)s')
    ended = agent.catch_signals()
    try:
        broker = Broker(chosen.host, chosen.port, chosen.login, chosen.passcode,
                        _server_tls(chosen.tls_cert, chosen.tls_key), max_frame=chosen.max_frame)
        broker.start()
    except BrokerError as error:
        print('stompbroker: %s' % error, file=sys.stderr)
        return 1
    print('listening on %s' % _spoken(broker.address), flush=True)
    ended.recv(1)
    broker.stop()
    return 0


def _server_tls(cert: Optional[str], key: Optional[str]) -> Optional[ssl.SSLContext]:
    if not cert:
        return None
    try:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(cert, key)
    except OSError as error:
        raise BrokerError('certificate %s, key %s: %s' % (cert, key or cert, error))
    return tls


if __name__ == '__main__':
    sys.exit(main())
