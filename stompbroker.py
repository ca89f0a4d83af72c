"""The embedded STOMP broker: a server for STOMP 1.0, 1.1 and 1.2, in one thread.

What it is not: persistent (messages live in memory, and end with it), clustered, or aware of what
the messages mean; the host's rules about who may say what come in as a ``Policy``. Who is sent
which message is decided in stompqueues.py; what waits for a client is in stompoutbox.py.

From the socket inwards: ``Listener``, ``Connection`` (its ``State``, ``Outbox``, ``Clock``), ``Session``
(what the client says, in STOMP), destinations; ``Broker`` is the loop round them.

Threads: one, named ``broker``. It owns every socket, session and destination, so nothing here needs a
lock but the one that is held for each round: the broker's turn, which ``do`` takes between two rounds.
From any thread: ``start``, ``stop``, ``do``, ``counters``, ``status``, ``address`` and ``fileno``.

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
import errno
import heapq
import hmac
import itertools
import logging
import os
import queue
import re
import select
import selectors
import signal
import socket
import sys
import threading
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import agent
from protocol import CLIENT_COMMANDS, FrameReader, RemoteError, WireFrame, would_block
from stompoutbox import RECEIVE, SHARE, Delivery, Memory, Outbox
from stompqueues import NEVER, Audience, DestinationError, Destinations, Outlet, Status
from stompsession import Session, StompError

log = logging.getLogger('vmhost.broker')

SERVER = 'vmhost-broker/' + agent.VERSION
READ_AT_ONCE = 1024 * 1024                # bytes that are read before what they bring is given out,
PUT_AT_ONCE = 8 * 1024 * 1024             # and that are put into outboxes before they are written
DELIVERIES_IN_A_ROUND = 20000             # of topics; who makes more of them goes on in the next round,
DELIVERIES_IN_A_TURN = 1000               # but each may make so many
QUEUES_GIVE = 256 * 1024                  # bytes that may wait for a client, at most, beside one message
UNIDENTIFIED_TIME = 1.0                   # seconds that a client has before another may take its place
SHORTEST_MARGIN = 1.0                     # seconds that a client's heart-beat may be late
LONGEST_END = 30.0                        # seconds that a client has to read its last frames
LINGER = 2.0                              # seconds from our last byte to the socket's end
MOST_FOR_SELECT = 500                     # connections that select() can look after
LONGEST_SLEEP = 3600.0                    # seconds; system calls don't take any number
# Selectors that notice what another thread changes while they wait.
SHARED = tuple(getattr(selectors, name) for name in ('EpollSelector', 'KqueueSelector')
               if hasattr(selectors, name))
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
TRIES_FOR_A_PORT = 20                     # that is free on each of several addresses
NO_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class BrokerError(Exception):
    """Base of this module's errors."""


class Refused(BrokerError):
    """A policy forbids it. The text goes into an ERROR frame; then the connection is closed."""


class Policy:
    """Who may do what, and how much of it. This one allows everything; the host passes its own.

    All methods are called on the broker's thread and must not block. What they may set:

    ``session.rate = (frames a second, frames at once)``, in ``connecting``: beyond that the
    connection is read more slowly; nothing is dropped. What isn't a SEND counts a tenth.
    ``session.byte_rate``: the same in bytes of bodies.
    ``session.identified = False``, in ``connecting``: the client has to say who it is by its first
    SEND, in ``limits.connect_time`` from its connection on, in a body of at most 64 KiB; ``sending``
    sets it to True, or the connection ends with an ERROR. Of those that have not said it yet,
    ``limits.unidentified`` may come from one address; one more takes the place of the oldest.
    ``session.policy_data``: whatever the policy likes. ``session.peer`` is the address.
    """

    def connecting(self, session: Session, headers: Dict[str, str]) -> None:
        """A CONNECT whose login and passcode matched. May raise Refused."""

    def taking(self, headers: Dict[str, str]) -> Optional[Callable[[socket.socket], None]]:
        """A CONNECT whose login and passcode matched. Not None: that takes the connection, which is not the
        broker's, then; what follows is no STOMP."""
        return None

    def subscribing(self, session: Session, destination: str, headers: Dict[str, str]) -> None:
        """A SUBSCRIBE. May raise Refused."""

    def sending(self, session: Session, destination: str, frame: WireFrame) -> Optional[bool]:
        """A SEND. May raise Refused, or return False: dropped in silence, counted as refused."""

    def audience(self, destination: str, frame: WireFrame) -> Optional[Audience]:
        """None: all subscribers get the message; or a function that says of a session whether it does.

        Asked about topics alone: a message in a queue is for whichever subscriber is next.
        """

    def closed(self, session: Session) -> None:
        """A session that ``connecting`` was asked about is over."""


class Counters:
    """What the broker has done; plain integers, written on its thread alone."""

    def __init__(self) -> None:
        self.connections_total = 0         # since the start
        self.frames_in = 0
        self.frames_out = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.held_bytes = 0                # in unfinished frames, transactions, subscriptions
        self.held_up = 0                   # times that a sender had to wait for a door
        self.slowed = 0                    # times that a client was over its rate
        self.refused = 0                   # connections and frames, by login, limit or policy
        self.errors = 0                    # ERROR frames
        self.cut_off = 0                   # clients that did not read


class Limits(NamedTuple):
    """How much of anything a client, a queue, or all together may take.

    A client that passes one of its own limits gets an ERROR; who takes the most when a limit of
    all is passed is cut off.
    """
    connections: int = 10000
    per_address: int = 5000                # connections
    unidentified: int = 5000               # connections of an address that haven't said who they are
    connect_time: float = 10.0             # seconds from the connection until that is said
    subscriptions: int = 1000              # a client
    transactions: int = 100                # a client
    unacknowledged: int = 10000            # messages of a subscription
    refusals: int = 5                      # of a message, then it goes to the dead letters
    max_frame: int = 1024 * 1024           # bytes of a body
    waiting: int = 8 * 1024 * 1024         # bytes that one client has not read yet, and max_frame more
    waiting_in_all: int = 256 * 1024 * 1024
    queued: int = 64 * 1024 * 1024         # bytes in a queue
    queued_in_all: int = 256 * 1024 * 1024
    held: int = 128 * 1024 * 1024          # bytes in all unfinished frames, transactions, subscriptions


# --- connections -------------------------------------------------------------------------------

class State:
    """Where a connection stands. It only moves down this list; ``Connection._enter`` moves it.

    Numbers, since an enum's members cost up to 6 times as much to look up, for each write.
    """
    HANDSHAKE = 0          # of TLS
    OPENING = 1            # until CONNECT
    CONNECTED = 2
    UNREACHABLE = 3        # nothing can be written any more; what it said before is still taken
    ENDING = 4             # nothing is taken any more; what is owed is written
    DRAINING = 5           # the same, and the client says no more
    LINGERING = 6          # all is written, our half closed: the client gets a moment to close first
    CLOSED = 7


class Bucket:
    """A rate: so much a second, and so much at once."""
    __slots__ = ('_rate', '_burst', '_left', '_when')

    PAUSE = 0.1            # seconds at least, when it is empty: so that it isn't looked at for each frame

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate, self._burst = rate, burst
        self._left, self._when = burst, now

    def take(self, cost: float, now: float) -> float:
        """Takes so much; gives the seconds until more may be taken."""
        self._left = min(self._burst, self._left + (now - self._when) * self._rate) - cost
        self._when = now
        return self.PAUSE - self._left / self._rate if self._left < 0 else 0.0


def _frames_in(frame: WireFrame) -> float:
    return 1.0 if frame.command == 'SEND' else 0.1


def _bytes_in(frame: WireFrame) -> float:
    return float(len(frame.body))


class Clock:
    """When a connection has to be looked at: for its deadline, and its heart-beats both ways."""
    __slots__ = ('heard', 'spoke', 'beat', 'silence', 'deadline', 'pause')

    def __init__(self, now: float, patience: float) -> None:
        self.heard = self.spoke = now
        self.beat = 0.0                    # seconds between our beats; 0: none
        self.silence = 0.0                 # seconds without a word after which it is dead; 0: any
        self.deadline = now + patience
        self.pause = NEVER                 # until when it is not read, since it said too much

    def negotiate(self, ours: int, offered: str) -> None:
        """STOMP 1.2, Heart-beating; milliseconds. On a busy machine beats may be late by more than
        a short interval. Raises StompError."""
        match = re.match(r'\s*([0-9]{1,18})\s*,\s*([0-9]{1,18})\s*\Z', offered)
        if match is None:
            raise StompError('heart-beat is not two numbers: %.40r' % offered)
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
        self.pause = NEVER

    @property
    def next(self) -> float:
        """When something has to be done, unless the client or we speak before."""
        beat = self.spoke + 0.6 * self.beat if self.beat else NEVER
        death = self.heard + self.silence if self.silence else NEVER
        return min(self.deadline, beat, death, self.pause)

    def is_silent(self, now: float) -> bool:
        return bool(self.silence) and now >= self.heard + self.silence

    def is_to_beat(self, now: float) -> bool:
        return bool(self.beat) and now >= self.spoke + 0.6 * self.beat


class Connection(Outlet):
    """A client's socket: bytes in, frames to its ``Session``, and what waits for the client out.

    What it does with either depends on its ``state``.
    """
    __slots__ = ('broker', 'peer', 'number', 'since', 'state', 'clock', 'session', 'backlog',
                 'held', '_sock', '_reader', '_outbox', '_buckets', '_counted', '_to_flush',
                 '_wants_room', '_held_up', '_events', '_unfinished')

    def __init__(self, broker: 'Broker', sock: socket.socket, peer: Tuple[Any, ...], number: int) -> None:
        self.broker = broker
        self.peer = peer
        self.number = number
        self.since = broker.now
        self.state = State.OPENING if broker.tls is None else State.HANDSHAKE
        self.clock = Clock(broker.now, broker.limits.connect_time)
        self.backlog = 0                   # bytes that it said, and a door's program has not taken
        self.held = 0                      # bytes that the client makes the broker keep
        self._sock = sock
        # Until it is known who that is, nothing large is waited for.
        self._reader = FrameReader(CLIENT_COMMANDS, max_body=RECEIVE)
        self._outbox = Outbox(broker.memory)
        self._buckets = ()  # type: Tuple[Tuple[Bucket, Callable[[WireFrame], float]], ...]
        self._counted = 0                  # bytes that are its own, as the broker's memory knows them
        self._to_flush = False             # the broker will call ``flush`` in this round
        self._wants_room = False           # queues have more for it
        self._held_up = False              # not read until a door's program has taken more
        self._events = 0                   # that the selector looks for
        self._unfinished = 0               # bytes that wait for the rest of their frame
        self.session = Session(self)

    def __repr__(self) -> str:
        return '<connection of %s>' % _spoken(self.peer)

    # -- states

    def begin(self) -> None:
        """From now on the selector looks after the socket, and the clock after all of it."""
        self._listen_for(READ)
        self.broker.came(self)
        self.set_clock()

    def opened(self) -> None:
        """CONNECT was right, and the policy has said what holds for this client."""
        session = self.session
        self._reader.version = session.version
        self._buckets = tuple((Bucket(*rate, now=self.broker.now), cost) for rate, cost in (
            (session.rate, _frames_in), (session.byte_rate, _bytes_in)) if rate is not None)
        self._enter(State.CONNECTED)

    def identified(self) -> None:
        """It is known who that is."""
        self._reader.max_body = self.broker.limits.max_frame
        self.clock.deadline = NEVER
        self.broker.peers.identified(self)

    def _enter(self, state: int) -> None:
        """The one place where the state changes, and what each one brings with it."""
        if self.state < State.ENDING <= state:
            self.broker.destinations.flush()       # it may be owed what was gathered
        before, self.state = self.state, state
        if state >= State.UNREACHABLE:
            unwritten = self._forget_outbox() if state in (State.UNREACHABLE, State.CLOSED) else []
            self.session.stop(unwritten, state >= State.ENDING)
        if before < State.ENDING <= state:
            self.hold(-self.held)
            self._unfinished = 0
            del self._reader               # what it holds was let go of
            self.clock.end_within(self.broker.now, LONGEST_END)
        if state == State.LINGERING:
            self.clock.end_within(self.broker.now, LINGER)
        if state == State.CLOSED:
            return self._shut()
        self.set_clock()
        self._listen()

    def _forget_outbox(self) -> List[Delivery]:
        """Gives what queues have to take back."""
        unwritten = self._outbox.clear()
        self._count_waiting()
        return unwritten

    def _shut(self) -> None:
        self._listen_for(0)
        self.broker.alarms.cancel(self.number)
        self._sock.close()
        self.broker.gone(self)
        del self.session                   # the two would keep each other until the collector comes

    def failed(self, error: Exception) -> None:
        """What it tried can't be done. An error of the broker's own ends this connection alone."""
        if not isinstance(error, OSError):
            log.error('%r is closed after an error of the broker', self, exc_info=error)
        self.close(agent.sentence(error))

    def ready(self, events: int) -> None:
        """The selector says that the socket can be read or written."""
        if self.state == State.CLOSED:     # by another one, earlier in this round
            return
        try:
            self._ready(events)
        except Exception as error:
            self.failed(error)

    def _ready(self, events: int) -> None:
        if self.state == State.HANDSHAKE:
            if not self._shake_hands():
                return
            events = READ          # TLS may have taken in more than the handshake
        if events & READ:
            if self._has_to_wait():
                self._held_up = True
                self.broker.count.held_up += 1
                self._listen()
            else:
                self._read()
        if events & WRITE and self.state != State.CLOSED:
            self.flush()

    def _shake_hands(self) -> bool:
        """Whether TLS is established."""
        import ssl  # some memory, where there is TLS
        try:
            self._sock.do_handshake()  # type: ignore[attr-defined]
        except ssl.SSLWantReadError:
            self._listen_for(READ)
        except ssl.SSLWantWriteError:
            self._listen_for(WRITE)
        else:
            self._enter(State.OPENING)
        return self.state == State.OPENING

    def _listen(self) -> None:
        """Has the selector look for what matters in this state."""
        events = WRITE if self._outbox.waiting else 0
        if not self._is_paused and self.state != State.DRAINING:
            events |= READ
        if events != self._events:
            self._listen_for(events)

    def _listen_for(self, events: int) -> None:
        if events != self._events:
            self.broker.listen_for(self._sock, events, self._events, self.ready)
            self._events = events

    @property
    def _is_paused(self) -> bool:
        """Whether it is not read for a while."""
        return self.state < State.ENDING and (self._held_up or self.clock.pause < NEVER)

    def _has_to_wait(self) -> bool:
        """Whether a door's program must take more first. Who ends, or hasn't begun, adds nothing for it."""
        return ((self.broker.is_held_up or self.backlog > SHARE)
                and State.CONNECTED <= self.state < State.ENDING)

    def go_on(self) -> None:
        """If it had to wait, it is read again; that it wasn't heard was not its fault."""
        if self._held_up and self.state != State.CLOSED:
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
        except OSError as error:
            if not would_block(error):
                raise
            return None

    def _is_buffered_by_tls(self) -> bool:
        return self.broker.tls is not None and self.state != State.CLOSED and bool(
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
        reader, frame, places = self._reader, None, self.broker.destinations
        most = self.broker.most_deliveries()
        try:
            reader.feed(data)
            frame = reader.next_frame()
            while frame is not None:
                self.broker.count.frames_in += 1
                self.session.handle(frame)
                if self.state >= State.ENDING:
                    return
                if self._buckets and self._is_too_fast(frame):
                    break
                if places.deliveries > most:
                    self._pause_for(1e-6)      # few bytes may make much work: others have their turn first
                    break
                frame = reader.next_frame()
            if reader.held or self._unfinished:
                self._hold_unfinished(reader.held)
        except Refused as error:
            self.broker.count.refused += 1
            self.fail(str(error), frame)
        except RemoteError as error:
            self.fail(str(error), reader.refused)
        except (StompError, DestinationError) as error:
            self.fail(str(error), frame)
        except Exception:
            log.exception('%r ends by an error of the broker', self)
            self.fail('internal error', frame)

    def _is_too_fast(self, frame: WireFrame) -> bool:
        """Whether it has to pause: the frames that were received already wait, too."""
        pause = max(bucket.take(cost(frame), self.broker.now) for bucket, cost in self._buckets)
        if pause:
            self.broker.count.slowed += 1
            self._pause_for(pause)
        return bool(pause)

    def _pause_for(self, seconds: float) -> None:
        self.clock.pause = self.broker.now + seconds
        self.set_clock()
        self._listen()

    def _end_pause(self) -> None:
        self.clock.pause = NEVER
        self._take(b'')
        self._listen()

    def _hold_unfinished(self, size: int) -> None:
        size += size // 8                  # that a growing buffer has in reserve
        change, self._unfinished = size - self._unfinished, size
        self.hold(change)

    def hold(self, cost: int) -> None:
        """Accounts bytes that the client makes the broker keep; a negative cost lets go of them."""
        self.held += cost
        self.broker.count.held_bytes += cost
        if cost > 0 and self.broker.count.held_bytes > self.broker.much_is_held:
            self.broker.relieve_held(self)

    # -- writing

    def put(self, parts: Tuple[bytes, ...], frames: int, delivery: Optional[Delivery] = None) -> None:
        """Bytes for the client; they leave with all others when the broker has read its round."""
        if self.state > State.CONNECTED:
            return
        self.broker.put_at_once += self._outbox.put(parts, delivery)
        self.broker.count.frames_out += frames
        if not self._to_flush:
            self._ask_for_flush()
        if self._outbox.waiting > self.broker.most_in_a_round:
            self._relieve()
        elif self.broker.put_at_once > PUT_AT_ONCE:
            self.broker.write_early()

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
        if self.state != State.CONNECTED:
            return False
        if self._outbox.waiting < self.broker.enough_for_queues:
            return True
        self._wants_room = True
        return False

    def flush(self) -> None:
        """Writes as much as the socket takes, and does what follows from what is left."""
        self._to_flush = False
        if self.state in (State.HANDSHAKE, State.CLOSED):
            return
        self._write()
        if self.state == State.CLOSED:
            return
        waiting = self._count_waiting()
        if waiting and self._has_too_much():
            return self.cut_off()
        if not waiting and self.state in (State.ENDING, State.DRAINING):
            return self._finish()
        self._listen()
        if self._wants_room and waiting <= self.broker.enough_for_queues // 2:
            self._wants_room = False
            self.session.ask_queues()

    def _write(self) -> None:
        try:
            sent = self._outbox.write(self._sock)
        except OSError as error:
            log.debug('%r: %s', self, error)
            if self.state > State.CONNECTED:
                return self.close(agent.sentence(error))
            return self._enter(State.UNREACHABLE)
        if sent:
            self.clock.spoke = self.broker.now
            self.broker.count.bytes_out += sent

    def _has_too_much(self) -> bool:
        """The frame that is being sent doesn't count, and one more may always wait: none is too large
        for a client that reads."""
        most = self.broker.limits.waiting + self.broker.limits.max_frame
        return self._outbox.waiting - self._outbox.begun > most

    def _count_waiting(self) -> int:
        """Tells the broker's memory what waits; gives it."""
        waiting = self.waiting
        own = waiting - self._outbox.large
        self.broker.memory.bytes += own - self._counted
        self._counted = own
        return waiting

    @property
    def share(self) -> float:
        """Bytes of the broker's memory that wait for it."""
        return self._outbox.share

    @property
    def waiting(self) -> int:
        """Bytes that it was sent and has not read."""
        return self._outbox.waiting

    # -- the clock

    def set_clock(self) -> None:
        self.broker.alarms.set(self.number, self.clock.next, self.tick)

    def tick(self) -> None:
        """The clock reached what was set."""
        try:
            self._tick()
        except Exception as error:
            self.failed(error)

    def _tick(self) -> None:
        now, clock = self.broker.now, self.clock
        if self._is_paused:
            clock.heard = now
        if now >= clock.pause:
            self._end_pause()
            if self.state == State.CLOSED:
                return
        if now >= clock.deadline:
            return self._time_is_over()
        if clock.is_silent(now):
            self.broker.tell('is silent', self.peer, '%s is taken for dead: silent for %.1f s', self,
                             now - clock.heard)
            return self.close('silent')
        if clock.is_to_beat(now):
            if not self.waiting:           # else what waits there is beat enough
                self.put((b'\n',), 0)
            clock.spoke = now
        self.set_clock()

    def _time_is_over(self) -> None:
        """It was not said in time who that is, or the end takes too long."""
        if self.state in (State.OPENING, State.CONNECTED):
            self.fail('no %s within %g s' % ('CONNECT' if self.state == State.OPENING else 'word who this is',
                                             self.broker.limits.connect_time))
        else:
            self.close('timed out while it connected or ended')

    # -- the end

    def fail(self, text: str, frame: Optional[WireFrame] = None) -> None:
        """An ERROR frame, then the end."""
        if self.state == State.CLOSED:     # cut off by what its own frame brought
            return
        self.broker.count.errors += 1
        self.broker.tell('fails', self.peer, '%s: %s', self, text)
        self.session.say_error(' '.join(text.replace('\0', ' ').split()), frame)
        self.end()

    def end(self) -> None:
        """No frame is taken any more; what is owed is still written, then the socket closed."""
        if self.state == State.UNREACHABLE:
            self.close('ended')
        elif self.state < State.ENDING:
            self._enter(State.ENDING)
            if not self._to_flush:
                self._ask_for_flush()

    def _finish(self) -> None:
        """All is written: says so, and waits shortly for the peer to close first, since closing
        with unread bytes would throw away what the peer has not read yet."""
        if self.state == State.DRAINING:
            return self.close('ended')
        self._say_goodbye_in_tls()
        self._sock.shutdown(socket.SHUT_WR)
        self._enter(State.LINGERING)

    def _say_goodbye_in_tls(self) -> None:
        """Tells a TLS client that this is the end, and no attacker's cut; its answer isn't waited for."""
        if self.broker.tls is not None:
            import ssl
            with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                self._sock.unwrap()  # type: ignore[attr-defined]

    def cut_off(self) -> None:
        """Closes the connection of one that doesn't read: too much waits for it."""
        self.broker.count.cut_off += 1
        self.broker.told.warn('cut off ' + self.peer[0], '%s is cut off: it has not read %s bytes', self,
                              self.waiting)
        self.close('does not read')

    def give_away(self, take: Callable[[socket.socket], None]) -> None:
        """The socket is for somebody else."""
        taken = self._sock.dup()
        self.close('handed over')
        take(taken)

    def close(self, why: str) -> None:
        """Closes the socket at once."""
        if self.state != State.CLOSED:
            log.debug('%r is closed: %s', self, why)
            self._enter(State.CLOSED)


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
        return min(max(0.0, self.first - time.monotonic()), LONGEST_SLEEP) if self._times else None

    @property
    def first(self) -> float:
        """When the next one is."""
        return self._times[0][0] if self._times else NEVER

    def delay(self, now: float) -> float:
        """Seconds by which the next one is late."""
        return now - self._times[0][0] if self._times else 0.0

    def ring(self, now: float) -> None:
        """Calls those whose time has come."""
        while self._times and self._times[0][0] <= now:
            when, number = heapq.heappop(self._times)
            if self._is_set(when, number):
                self._set.pop(number)[1]()


class Peers:
    """How many connections each address has, and which of them have not said who they are."""

    def __init__(self, limits: Limits, told: agent.Seldom) -> None:
        self._limits = limits
        self._told = told
        self._all = collections.Counter()  # type: Dict[str, int]
        self._unidentified = {}  # type: Dict[str, collections.OrderedDict[int, Connection]]

    def refusal(self, address: str, now: float) -> str:
        """Why no more may come from there, or ''; the oldest that doesn't say who it is may have to go."""
        unidentified = self._unidentified.get(address, collections.OrderedDict())
        if self._all[address] >= self._limits.per_address:
            return 'its address has %d already' % self._all[address]
        if unidentified and len(unidentified) >= self._limits.unidentified:
            self._let_go(unidentified, now)
        if len(unidentified) >= self._limits.unidentified:
            return 'its address has %d already that have not said who they are' % len(unidentified)
        return ''

    def make_room(self, now: float) -> None:
        """There are as many as there may be: of the address that has most of them, the oldest that doesn't
        say who it is has to go."""
        if self._unidentified:
            self._let_go(max(self._unidentified.values(), key=len), now)

    def _let_go(self, unidentified: 'collections.OrderedDict[int, Connection]', now: float) -> None:
        oldest = next(iter(unidentified.values()))
        if now - oldest.since > UNIDENTIFIED_TIME:
            self._told.warn('goes ' + oldest.peer[0],
                            '%s is disconnected: too many have not said who they are', oldest)
            oldest.close('to make room for another')

    def came(self, connection: Connection) -> None:
        address = connection.peer[0]
        self._all[address] += 1
        self._unidentified.setdefault(address, collections.OrderedDict())[connection.number] = connection

    def identified(self, connection: Connection) -> None:
        address = connection.peer[0]
        self._unidentified[address].pop(connection.number, None)
        if not self._unidentified[address]:
            del self._unidentified[address]

    def gone(self, connection: Connection) -> None:
        address = connection.peer[0]
        if connection.number in self._unidentified.get(address, ()):
            self.identified(connection)
        self._all[address] -= 1
        if not self._all[address]:
            del self._all[address]


class Listener:
    """A socket that clients connect to."""

    BACKLOG = 4096         # 2,000 at once lose a second where it is 1,024

    def __init__(self, broker: 'Broker', family: int, address: Tuple[Any, ...], alone: bool) -> None:
        """alone: no other listener has the other family's addresses. Raises OSError."""
        self._broker = broker
        self._sock = socket.socket(family)
        try:
            _claim_port(self._sock)
            _notice_the_dead(self._sock)
            if family == getattr(socket, 'AF_INET6', None):
                self._sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if alone else 1)
            self._sock.bind(address)
            self._sock.listen(self.BACKLOG)
            self._sock.setblocking(False)
        except OSError:
            self._sock.close()
            raise

    @property
    def address(self) -> Tuple[str, int]:
        return self._sock.getsockname()[:2]

    def begin(self) -> None:
        self._broker.listen_for(self._sock, READ, 0, self._accept)

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
        self._broker.told.warn('no descriptors', 'cannot accept a connection: %s', agent.sentence(error))
        self._broker.listen_for(self._sock, 0, READ, self._accept)
        self._broker.alarms.set(-self._sock.fileno(), self._broker.now + 0.5, self.begin)


class Broker:
    """A STOMP server on each address that ``host`` has. ``start``, then ``stop``; both from any thread.

    tls: an ssl.SSLContext for servers, or None. heartbeat: the shortest interval, in seconds,
    that is offered in both directions; the larger of it and what a client asks for holds; 0: none.
    Further keywords are the fields of Limits.
    """

    def __init__(self, host: str = '127.0.0.1', port: int = 61613, login: str = '',
                 passcode: str = '', tls: Any = None,
                 policy: Optional[Policy] = None, heartbeat: float = 0.2,
                 **limits: Any) -> None:
        self.limits = Limits(**limits)
        self.policy = policy or Policy()
        self.tls = tls
        self.beat_ms = int(heartbeat * 1000)
        self.server = SERVER
        self.token = '%08x' % int.from_bytes(os.urandom(4), 'big')
        self.count = Counters()
        self.memory = Memory()             # of what clients have not read yet
        self.put_at_once = 0               # bytes, into outboxes, since all of them were written
        self.now = time.monotonic()
        self.alarms = Alarms()
        self.told = agent.Seldom(log)
        self.peers = Peers(self.limits, self.told)
        self.destinations = Destinations(self.token, self.limits.queued, self.limits.queued_in_all,
                                         self.limits.refusals)
        # What a round may gather for a client before it must be written. Twice the limit, since
        # only after a try to write it is known whether the client is slow.
        self.most_in_a_round = 2 * (self.limits.waiting + self.limits.max_frame)
        # Bytes waiting for a client at which queues give it no more; it is never cut off for what they have.
        self.enough_for_queues = max(1, min(QUEUES_GIVE, self.limits.waiting // 2))
        self.is_held_up = False            # too much waits for a door's program
        self.failure = None      # type: Optional[Exception]
        self._host, self._port = host, port
        self._login, self._passcode = login, passcode
        self._listeners = []     # type: List[Listener]
        self._waker = None       # type: Optional[socket.socket]
        self._thread = None      # type: Optional[threading.Thread]
        self._stopping = False
        self._questions = collections.deque()  # type: collections.deque[queue.Queue[List[Status]]]
        self._turn = threading.Lock()      # held while anything of the broker changes, but not while it waits
        self._jobs = collections.deque()  # type: collections.deque[Callable[[], None]]
        self._shares_turns = True          # whether other threads may take one
        self._most_connections = self.limits.connections
        self._connections = {}   # type: Dict[int, Connection]
        self._to_flush = []      # type: List[Connection]
        self._is_flushing = False
        self._deliveries_before = 0        # this round
        self._has_holes = False            # the memory; it is looked after from so many bytes on:
        self.much_is_held = self.limits.held // 2
        self._connection_numbers = itertools.count(1)

    # -- from any thread

    def start(self) -> None:
        """Listens, and starts the thread. Raises BrokerError where an address is not available."""
        self._most_connections = self._as_many_as_may_be(_allow_many_sockets())
        self._stopping = False
        self._listeners = self._listen()
        self._selector = selectors.DefaultSelector()
        if isinstance(self._selector, selectors.SelectSelector):      # on Windows, and bounded there
            self._most_connections = min(self._most_connections, MOST_FOR_SELECT)
        self._shares_turns = isinstance(self._selector, SHARED)
        self._wakee, self._waker = socket.socketpair()
        self._wakee.setblocking(False)
        self._selector.register(self._wakee, READ, self._woken)
        for listener in self._listeners:
            listener.begin()
        self._thread = threading.Thread(target=self._run, name='broker', daemon=True)
        self._thread.start()

    def _as_many_as_may_be(self, descriptors: Optional[int]) -> int:
        """Connections: some of the process's descriptors stay free for its other work, whoever comes."""
        if descriptors is None:
            return self.limits.connections
        most = descriptors - min(LEFT_FREE, descriptors // 2)
        if most < self.limits.connections:
            log.warning('no more than %d connections, since the process may open %d files (ulimit -n)',
                        most, descriptors)
        return min(self.limits.connections, most)

    def _listen(self) -> List[Listener]:
        """A listener for each address of the host; those that this machine hasn't are left out, unless
        it has none of them."""
        if not 0 <= self._port <= 65535:
            raise BrokerError('there is no port %d' % self._port)     # getaddrinfo takes another one
        tries = 1 if self._port else TRIES_FOR_A_PORT
        try:
            found = list(dict.fromkeys(
                (family, address) for family, _, _, _, address in socket.getaddrinfo(
                    self._host, self._port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)))
            while True:
                tries -= 1
                try:
                    return self._listen_on(found)
                except OSError as error:
                    if error.errno != errno.EADDRINUSE or not tries:
                        raise
        except (OSError, UnicodeError) as error:
            wanted = _spoken((self._host, self._port))
            raise BrokerError('the broker cannot listen on %s: %s' % (wanted, agent.sentence(error)))

    def _listen_on(self, found: List[Any]) -> List[Listener]:
        """On each (family, address), all with one port. Raises OSError."""
        listeners, port = [], self._port   # type: List[Listener], int
        try:
            for number, (family, address) in enumerate(found):
                try:
                    listeners.append(Listener(self, family, (address[0], port) + address[2:],
                                              alone=len(found) == 1))
                except OSError as error:
                    if error.errno not in NO_ADDRESS or number == len(found) - 1 and not listeners:
                        raise
                    log.warning('%s is no address of this machine', address[0])
                else:
                    port = listeners[-1].address[1]
        except OSError:
            for listener in listeners:
                listener.close()
            raise
        return listeners

    @property
    def address(self) -> Tuple[str, int]:
        """Host and port that it listens on; the first one."""
        return self.addresses[0]

    @property
    def addresses(self) -> List[Tuple[str, int]]:
        """All that it listens on."""
        if not self._listeners:
            raise BrokerError('the broker does not listen')
        return [listener.address for listener in self._listeners]

    def stop(self, timeout: float = 3.0) -> None:
        """Closes all sockets and ends the thread; waits for it at most ``timeout`` seconds."""
        if self._thread is None or self._waker is None:
            return
        self._stopping = True
        self._wake()
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.error('thread %s still runs %.1f s after stop', self._thread.name, timeout)
        else:
            self._waker.close()
        self._thread = None

    def _wake(self) -> None:
        assert self._waker is not None
        try:
            self._waker.send(b'.')
        except OSError:
            log.debug('the thread ends already')

    def fileno(self) -> int:
        """Of a socket that can be read once the thread has ended, by ``stop`` or by ``failure``."""
        assert self._waker is not None
        return self._waker.fileno()

    def do(self, job: Callable[[], None]) -> None:
        """Has that done in the broker's turn: at once if it waits for its clients, else at the end of the
        round that goes on. Never waits; jobs keep their order."""
        self._jobs.append(job)
        if self._shares_turns:
            self._do_jobs()
        else:
            self._wake()

    def _do_jobs(self) -> None:
        """Whoever has the turn does the jobs of those who didn't get it, and looks once more afterwards."""
        while self._jobs and self._turn.acquire(False):
            try:
                self.now, first = time.monotonic(), self.alarms.first
                while self._jobs:
                    self._jobs.popleft()()
                self._deliver()
                if self.alarms.first < first:
                    self._wake()           # it would sleep longer than that
            except Exception:
                log.exception('a job of the broker\'s')
            finally:
                self._turn.release()

    def counters(self) -> Dict[str, int]:
        """What it did so far, and holds now."""
        counted = dict(vars(self.count))
        counted['connections'] = len(self._connections)
        counted['destinations'] = len(self.destinations)
        counted['waiting_bytes'] = self.memory.bytes
        counted['queued_bytes'] = self.destinations.bytes
        counted['dropped'] = self.destinations.dropped
        counted['expired'] = self.destinations.expired
        return counted

    def status(self, timeout: float = 3.0) -> List[Status]:
        """What each destination has, by name. Raises BrokerError where the thread doesn't answer."""
        answer = queue.Queue()  # type: queue.Queue[List[Status]]
        self._questions.append(answer)
        self._wake()
        try:
            return answer.get(timeout=timeout)
        except queue.Empty:
            raise BrokerError('the broker does not answer')

    # -- the loop

    def _run(self) -> None:
        try:
            while not self._stopping:
                ready = self._selector.select(self.alarms.patience())
                with self._turn:
                    self._round(ready)
                self._do_jobs()
        except Exception as error:
            log.exception('the broker ends')
            self.failure = error
        finally:
            with self._turn:
                self._close_all()
            self._shares_turns = True      # nobody else is there any more
            self._do_jobs()

    def _round(self, ready: List[Tuple[selectors.SelectorKey, int]]) -> None:
        self.now = time.monotonic()
        self._deliveries_before = self.destinations.deliveries
        enough = self.count.bytes_in + READ_AT_ONCE
        for key, events in ready:
            key.data(events)
            if self.count.bytes_in >= enough:
                self._deliver()
                enough = self.count.bytes_in + READ_AT_ONCE
        self._deliver()
        if self.alarms.delay(self.now) > SHORTEST_MARGIN:
            self._forgive()
        self.alarms.ring(self.now)
        self._deliver()
        if self._has_holes:
            self._fill_holes()

    def _fill_holes(self) -> None:
        """What large frames leave in the memory adds up to as much again as may be held."""
        self._has_holes = False
        self.much_is_held = min(self.limits.held, max(self.limits.held // 2, self.count.held_bytes)
                                + self.limits.held // 16)
        agent.release_memory()

    def _woken(self, events: int) -> None:
        self._wakee.recv(64)
        while self._questions:
            self._questions.popleft().put(self.destinations.status())

    def _close_all(self) -> None:
        for connection in list(self._connections.values()):
            connection.close('the broker stops')
        for door in set(self.destinations.doors.values()):
            door.shut()
        for listener in self._listeners:
            listener.close()
        self._listeners = []
        self._selector.close()
        self._wakee.close()

    def admit(self, sock: socket.socket, peer: Tuple[Any, ...]) -> None:
        """A client came."""
        self.count.connections_total += 1
        why = self._refusal(peer[0])
        if why:
            self.count.refused += 1
            self.told.warn('sent away ' + peer[0], '%s is sent away: %s', _spoken(peer), why)
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
            self.tell('is gone', peer, '%s disconnected already: %s', _spoken(peer), agent.sentence(error))
            sock.close()

    def tell(self, what: str, peer: Tuple[Any, ...], text: str, *values: Any) -> None:
        """Logs what clients do that isn't the operator's to mend: of each kind and address it is seldom told,
        lest strangers fill a disk; but with debugging on, each time."""
        if log.isEnabledFor(logging.DEBUG):
            log.info(text, *[agent.shown(value) for value in values])
        else:
            self.told.info('%s %s' % (what, peer[0]), text, *values)

    def _refusal(self, address: str) -> str:
        """Why no more may come from there, or ''."""
        if len(self._connections) >= self._most_connections:
            self.peers.make_room(self.now)
        if len(self._connections) >= self._most_connections:
            return 'there are %d already' % len(self._connections)
        return self.peers.refusal(address, self.now)

    def _deliver(self) -> None:
        """Gives out what the round gathered, each connection its own in one write."""
        self.destinations.flush()
        self.destinations.dispatch()
        self._flush()

    def most_deliveries(self) -> int:
        """How many there may be, all in all, at the end of a connection's turn."""
        return max(self._deliveries_before + DELIVERIES_IN_A_ROUND,
                   self.destinations.deliveries + DELIVERIES_IN_A_TURN)

    def write_early(self) -> None:
        """What one round brings may be much more than may wait, times all subscriptions."""
        if not self._is_flushing:
            self._flush()

    def _flush(self) -> None:
        self._is_flushing = True
        self._write_all()
        if self.memory.bytes > self.limits.waiting_in_all:
            self._relieve_waiting()
            self._write_all()
        self._is_flushing = False
        self.put_at_once = 0

    def _write_all(self) -> None:
        waiting = self._to_flush
        for connection in waiting:         # grows while queues find room
            try:
                connection.flush()
            except Exception as error:
                connection.failed(error)
        del waiting[:]

    def _relieve_waiting(self) -> None:
        """All clients together don't read enough: those who take most of the memory go."""
        for connection in sorted(self._connections.values(), key=lambda each: -each.share):
            if self.memory.bytes <= self.limits.waiting_in_all:
                return
            connection.cut_off()

    def relieve_held(self, asking: Connection) -> None:
        """The broker keeps much for its clients. When it is too much, who makes it keep most goes."""
        self._has_holes = True
        if self.count.held_bytes <= self.limits.held:
            return
        worst = max(self._connections.values(), key=lambda each: each.held)
        text = 'the broker keeps %d bytes for this client, and too many in all' % worst.held
        if worst is asking:
            raise StompError(text)
        worst.fail(text)

    def _forgive(self) -> None:
        """This process was stopped, or starved: that clients weren't heard may be its own fault."""
        log.info('the clock stood still for %.1f s', self.alarms.delay(self.now))
        for connection in self._connections.values():
            connection.clock.heard = self.now

    # -- for connections and sessions, on the broker's thread

    def admits(self, login: str, passcode: str) -> bool:
        """Whether login and passcode are right. The time it takes tells nothing about them."""
        if not self._login and not self._passcode:
            return True
        right = [hmac.compare_digest(ours.encode('utf-8', 'surrogateescape'),
                                     theirs.encode('utf-8', 'replace'))
                 for ours, theirs in ((self._login, login), (self._passcode, passcode))]
        return all(right)

    def to_flush(self, connection: Connection) -> None:
        self._to_flush.append(connection)

    def let_all_go_on(self) -> None:
        """A door's program has taken what waited. Where another one hasn't, they soon wait again."""
        if self.is_held_up:
            self.is_held_up = False
            for connection in self._connections.values():
                connection.go_on()

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
        self.peers.came(connection)

    def gone(self, connection: Connection) -> None:
        if self._connections.pop(connection.number, None) is not None:
            self.peers.gone(connection)


def _claim_port(listener: socket.socket) -> None:
    """On POSIX the port is free at once after a stop; on Windows nobody may share it."""
    exclusive = getattr(socket, 'SO_EXCLUSIVEADDRUSE', None)
    if exclusive is not None:
        listener.setsockopt(socket.SOL_SOCKET, exclusive, 1)
    else:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def _notice_the_dead(listener: socket.socket) -> None:
    """Peers that vanish without a word are noticed in 2 minutes; where sockets inherit it (Linux)."""
    for name, value in (('TCP_KEEPIDLE', 60), ('TCP_KEEPINTVL', 20), ('TCP_KEEPCNT', 3)):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


DESCRIPTORS = (65536, 10240, 4096, 1024)       # that are asked for, as many as there may be
LEFT_FREE = 200                                # of them, for files and programs; half, if they are few


def _allow_many_sockets() -> Optional[int]:
    """Raises the process's limit of descriptors, where there is such a thing; gives what it is then."""
    try:
        import resource
    except ImportError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return None
    for wanted in DESCRIPTORS:         # macOS says that there is no limit, and has one of 10,240 or so
        wanted = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        if wanted <= soft:
            break
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
        except (OSError, ValueError) as error:
            log.info('no more than %d descriptors: %s', wanted - 1, error)
    return soft


def _spoken(address: Tuple[Any, ...]) -> str:
    host = str(address[0])
    return '%s:%s' % ('[%s]' % host if ':' in host else host, address[1])


# --- the command line --------------------------------------------------------------------------

LIMITS = {                 # of Limits: what --help says
    'connections': 'connections in all', 'per_address': 'connections of one address',
    'unidentified': 'connections of one address that have not said CONNECT yet',
    'connect_time': 'seconds that a connection has until CONNECT',
    'subscriptions': 'of a client', 'transactions': 'of a client, at a time',
    'unacknowledged': 'messages that a subscription is sent before it acknowledges one',
    'refusals': 'of a message (NACK), then it goes to /queue/DLQ', 'max_frame': 'bytes of a body',
    'waiting': 'bytes that a client has not read, beside --max-frame; it is cut off then',
    'waiting_in_all': 'bytes that all clients have not read', 'queued': 'bytes in a queue',
    'queued_in_all': 'bytes in all queues',
    'held': 'bytes in all unfinished frames, transactions and subscriptions'}
NEVER_0 = frozenset(('connections', 'per_address', 'unidentified', 'unacknowledged', 'refusals'))
PROGRAM = Limits(max_frame=16 * 1024 * 1024)     # what holds where no option says otherwise
# On Windows, Ctrl-Break.
SIGNAL_OF_STATUS = getattr(signal, 'SIGUSR1', None) or getattr(signal, 'SIGBREAK', None)


def _arguments(arguments: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='A STOMP broker; messages live in memory. SIGUSR1 has it print what it holds.')
    parser.add_argument('--host', default='127.0.0.1', type=_not_empty,
                        help='name or address; of a name, all its addresses')
    parser.add_argument('--port', type=int, default=61613)
    parser.add_argument('--login', type=_not_empty)
    parser.add_argument('--passcode', type=_not_empty, help='others can see it in the list of processes')
    parser.add_argument('--passcode-file', metavar='FILE', type=_not_empty,
                        help='whose first line is the passcode')
    parser.add_argument('--tls-cert', metavar='FILE', type=_not_empty, help='PEM; turns TLS on')
    parser.add_argument('--tls-key', metavar='FILE', type=_not_empty,
                        help='PEM, where it is not in the other file')
    parser.add_argument('-v', '--verbose', action='store_true')
    limits = parser.add_argument_group('limits')
    for name, default in PROGRAM._asdict().items():
        limits.add_argument('--' + name.replace('_', '-'), default=default, metavar='N', help='%s; %s' % (
            LIMITS[name], default), type=_no_less_than(1 if name in NEVER_0 else 0, type(default)))
    chosen = parser.parse_args(arguments)
    if chosen.tls_key and not chosen.tls_cert:
        parser.error('--tls-key needs --tls-cert: without it nothing would be encrypted')
    if chosen.passcode and chosen.passcode_file:
        parser.error('--passcode and --passcode-file exclude each other')
    return chosen


def _no_less_than(least: int, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError('less than %d: %s' % (least, text))
        return value
    return number


def _not_empty(text: str) -> str:
    """What a shell makes of a variable that isn't set must not turn off passcode or TLS."""
    if not text:
        raise argparse.ArgumentTypeError('there is nothing in it')
    return text


def main(arguments: Optional[List[str]] = None) -> int:
    """Runs a broker until SIGTERM or Ctrl-C; 1 where it can't begin, or fails."""
    chosen = _arguments(arguments)
    logging.basicConfig(level=logging.DEBUG if chosen.verbose else logging.WARNING,
                        format='%(asctime)s %(levelname)s %(name)s: %(message)s')
    signals = agent.catch_signals()
    if SIGNAL_OF_STATUS is not None:
        signal.signal(SIGNAL_OF_STATUS, lambda *_: None)       # and so its number comes by the socket, too
    try:
        passcode = _read_passcode(chosen.passcode_file) if chosen.passcode_file else chosen.passcode or ''
        broker = Broker(chosen.host, chosen.port, chosen.login or '', passcode,
                        _server_tls(chosen.tls_cert, chosen.tls_key),
                        **{name: getattr(chosen, name) for name in Limits._fields})
        broker.start()
        _print('\n'.join('listening on %s' % _spoken(address) for address in broker.addresses), sys.stdout)
        _serve(broker, signals)
    except BrokerError as error:
        print('stompbroker: %s' % error, file=sys.stderr)
        return 1
    return 0


def _serve(broker: Broker, signals: socket.socket) -> None:
    """Until a signal says that it is over. Raises BrokerError where the broker's thread ends by itself."""
    try:
        while True:
            select.select([signals.fileno(), broker.fileno()], [], [])
            if broker.failure is not None:
                raise BrokerError('the broker has failed: %r' % broker.failure)
            if signals.recv(1)[0] != SIGNAL_OF_STATUS:
                return
            try:
                table = status_table(broker)
            except BrokerError as error:   # it is busy, and goes on
                table = 'stompbroker: %s' % error
            _print(table, sys.stderr)
    finally:
        broker.stop()


def _print(text: str, file: Any) -> None:
    """For whoever started the broker; where that one reads no more, the broker goes on without."""
    try:
        print(text, file=file, flush=True)
    except (OSError, ValueError) as error:
        log.info('nobody reads what is printed: %s', agent.sentence(error))


def status_table(broker: Broker) -> str:
    """What the broker has done and holds, and each destination, for people."""
    lines = ['  '.join('%s %d' % item for item in sorted(broker.counters().items()))]
    lines.append('%-40s %9s %9s %9s %9s %9s' % ('destination', 'waiting', 'consumers', 'in', 'out', 'oldest'))
    for place in broker.status():
        lines.append('%-40s %9d %9d %9d %9d %7.1f s' % ((ascii(place.name)[1:-1],) + place[1:]))
    return '\n'.join(lines)


def _read_passcode(path: str) -> str:
    try:
        with open(path, encoding='utf-8-sig') as file:      # Windows' Notepad puts a mark before it
            if os.name == 'posix' and os.fstat(file.fileno()).st_mode & 0o077:
                log.warning('others can read the passcode: chmod 600 %s', path)
            passcode = file.readline().rstrip('\r\n')
    except (OSError, UnicodeError) as error:
        raise BrokerError('passcode file %s: %s' % (path, getattr(error, 'strerror', None) or error))
    if not passcode:
        raise BrokerError('passcode file %s: the first line is empty' % path)
    return passcode


def _server_tls(cert: Optional[str], key: Optional[str]) -> Any:
    if not cert:
        return None
    try:
        return agent.server_tls(cert, key or '')
    except agent.AgentError as error:
        raise BrokerError(str(error))


if __name__ == '__main__':
    sys.exit(main())
