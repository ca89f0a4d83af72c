"""Topics and queues: who is sent which message, and what becomes of one that nobody took.

What it is not: a server. It knows neither sockets nor sessions: a subscription has an ``Outlet``
(the broker's connection), which takes bytes and says whether it has room.

Threads: none of its own. All of it is called on the broker's thread, so nothing here needs a lock.
"""

import collections
import heapq
import itertools
import logging
import re
import time
from typing import Any, Callable, Dict, FrozenSet, Iterable, List, NamedTuple, Optional, Tuple

import agent
import protocol
from protocol import WireFrame

log = logging.getLogger('vmhost.broker')

LARGE = 32 * 1024                         # a body from here on is sent as it is, never copied
# Bytes that is taken beside texts and bodies, by:
FRAME_OVERHEAD = 200                      # a frame that waits for COMMIT, or a subscription
MESSAGE_OVERHEAD = 320                    # a message in a queue
ENVELOPE_OVERHEAD = 256                   # what messages with the same head share
NEVER = float('inf')
DEAD_LETTERS = '/queue/DLQ'               # where messages go that were refused too often
# Headers of a SEND that are about this one sending, or that MESSAGE has of its own.
NOT_PASSED_ON = frozenset(('receipt', 'transaction', 'content-length', 'message-id',
                           'subscription', 'ack', 'redelivered'))

# What other brokers have and this one hasn't: headers of SEND, and beginnings of names.
NOT_FOR_SEND = dict.fromkeys(('AMQ_SCHEDULED_DELAY', 'AMQ_SCHEDULED_PERIOD', 'AMQ_SCHEDULED_REPEAT',
                              'AMQ_SCHEDULED_CRON'), 'scheduled messages')
NOT_FOR_SEND['JMSXGroupID'] = 'message groups'
NO_SUCH_PLACES = {'/temp-queue/': 'temporary queues', '/temp-topic/': 'temporary topics',
                  '/remote-temp-queue/': 'temporary queues', '/remote-temp-topic/': 'temporary topics',
                  '/reply-queue/': 'temporary queues', '/dsub/': 'durable subscriptions'}
_NO_SUCH = tuple(NO_SUCH_PLACES)

# Whether a subscriber is to get a message; of topics alone.
Audience = Callable[[Any], bool]


class DestinationError(Exception):
    """A message can't be taken: a queue is full, or a header makes no sense."""


def is_queue(name: str) -> bool:
    """What isn't /queue/…, or RabbitMQ's other name for one, is a topic."""
    return name.startswith(('/queue/', '/amq/queue/'))


def cost_of(headers: Dict[str, str], body: bytes = b'') -> int:
    """About how many bytes a frame takes that is kept."""
    return FRAME_OVERHEAD + protocol.size_of(headers) + len(body)


def expiry(headers: Dict[str, str]) -> float:
    """When a message with these headers that is sent now is of no more use; seconds since 1970. ``expires``
    is in milliseconds since then, as ActiveMQ has it, and 0 is never; ``expiration`` in milliseconds from
    now, as RabbitMQ has it. Raises DestinationError."""
    end = _milliseconds(headers, 'expires', 'milliseconds since 1970') or NEVER
    if 'expiration' in headers:
        end = min(end, time.time() + _milliseconds(headers, 'expiration', 'milliseconds'))
    return end


def _milliseconds(headers: Dict[str, str], name: str, what: str) -> float:
    """Seconds; 0 where there is no such header."""
    if name not in headers:
        return 0.0
    text = headers[name].strip()
    if re.match('[0-9]{1,18}$', text) is None:
        raise DestinationError('%s is no time in %s: %.40r' % (name, what, text))
    return int(text) / 1000.0


def check_send(headers: Dict[str, str]) -> None:
    """Raises DestinationError where a SEND asks for what isn't there, or for no time."""
    check_name(headers['destination'])
    if not headers.keys().isdisjoint(NOT_FOR_SEND):
        name = next(name for name in NOT_FOR_SEND if name in headers)
        raise DestinationError('this broker has no %s: header %s' % (NOT_FOR_SEND[name], name))
    if headers.get('reply-to', '').startswith('/temp-'):
        raise DestinationError('this broker has no temporary queues: header reply-to')
    expiry(headers)


def check_name(name: str) -> None:
    """Raises DestinationError where it names what isn't there: a topic would take it, and nobody get it."""
    if name.startswith(_NO_SUCH):
        what = next(what for beginning, what in NO_SUCH_PLACES.items() if name.startswith(beginning))
        raise DestinationError('this broker has no %s: %.100s' % (what, name))


class Envelope:
    """What stands round the bodies of one SEND head: destination and headers, encoded once. Raises
    DestinationError where they ask for what isn't there."""
    __slots__ = ('destination', 'headers', 'expires', 'kept', '_lines', '_cost')

    def __init__(self, headers: Dict[str, str]) -> None:
        check_send(headers)
        self.destination = headers['destination']
        self.headers = headers
        self.expires = expiry(headers)
        self.kept = 0                      # messages in its queue that have it
        self._lines = {}  # type: Dict[str, bytes]
        self._cost = 0

    @property
    def cost(self) -> int:
        """Bytes that it takes while messages that have it are kept; once for all of them."""
        if not self._cost:
            texts = sum(map(len, self.headers)) + sum(map(len, self.headers.values()))
            self._cost = ENVELOPE_OVERHEAD + protocol.size_of(self.headers) + texts
        return self._cost

    def lines(self, version: str) -> bytes:
        """The header lines as a receiver of that version gets them."""
        lines = self._lines.get(version)
        if lines is None:
            passed_on = [item for item in self.headers.items() if item[0] not in NOT_PASSED_ON]
            text = '\n'.join(protocol.header_lines(passed_on, version) + [''])
            lines = self._lines[version] = text.encode('utf-8', 'replace')
        return lines


class BrokerMessage:
    """A SEND on its way. ``serial`` counts up, ``number`` is its name. The rest is a queue's: the bytes that
    it takes, when it came, whether it was given to somebody before, how often it was refused, and by which of
    the present consumers."""
    __slots__ = ('serial', 'number', 'envelope', 'body', 'cost', 'since', 'redelivered', 'refusals',
                 'refusers')

    def __init__(self, serial: int, number: str, envelope: Envelope, body: bytes) -> None:
        self.serial = serial
        self.number = number
        self.envelope = envelope
        self.body = body
        self.redelivered = False

    def enters_queue(self) -> None:
        self.cost = MESSAGE_OVERHEAD + len(self.body)
        self.since = time.monotonic()
        self.refusals = 0
        self.refusers = NOBODY

    @property
    def is_expired(self) -> bool:
        return self.envelope.expires < NEVER and self.envelope.expires <= time.time()

    def head(self, version: str, acked: bool) -> bytes:
        """The head from the message's number on: a subscription's ``lead`` stands before it."""
        number = self.number.encode('ascii')
        if acked:
            number = b'%b\nmessage-id:%b' % (number, number)
        if self.redelivered:
            number += b'\nredelivered:true'
        return b'%b\n%bcontent-length:%d\n\n' % (number, self.envelope.lines(version),
                                                 len(self.body))

    def rest(self, version: str, acked: bool, lead: bytes = b'') -> bytes:
        """The whole frame from the message's number on, or with the lead that stands before it."""
        if acked or self.redelivered:
            return b'%b%b%b\0\n' % (lead, self.head(version, acked), self.body)
        # The same in one go: a quarter of what a message through a queue costs is to make its frame.
        body = self.body
        return b'%b%b\n%bcontent-length:%d\n\n%b\0\n' % (
            lead, self.number.encode('ascii'), self.envelope.lines(version), len(body), body)


class Outlet:
    """Where a subscriber's messages go to. The broker's connection is one."""
    __slots__ = ()

    def put(self, parts: Tuple[bytes, ...], frames: int, delivery: Any = None) -> None:
        """Takes bytes. ``delivery``: a queue and a message that it is told to settle once they are written,
        or to take back if they never are."""
        raise NotImplementedError

    def has_room(self) -> bool:
        """Whether a queue may give more; if not, the queue's ``dispatch`` is called when it may."""
        raise NotImplementedError


class Subscription:
    """What a SUBSCRIBE made: ``lead`` begins each of its MESSAGE frames. ``unacked``: what a queue
    gave it and waits for its ACK, at most ``prefetch``."""
    __slots__ = ('owner', 'outlet', 'id', 'key', 'cost', 'destination', 'mode', 'lead', 'kind', 'prefetch',
                 'unacked')

    def __init__(self, owner: Any, outlet: Outlet, version: str, number: int, key: str,
                 headers: Dict[str, str], destination: Any, prefetch: int, cost: int) -> None:
        self.owner = owner                 # whom a policy knows
        self.outlet = outlet
        self.id = str(number)
        self.key = key
        self.cost = cost
        self.destination = destination
        self.mode = headers.get('ack', 'auto')
        ack_header = self.mode != 'auto' and version == '1.2'
        self.kind = version, ack_header
        self.prefetch = prefetch
        self.unacked = collections.OrderedDict()  # type: collections.OrderedDict[str, BrokerMessage]
        lead = 'MESSAGE\n'
        if 'id' in headers:
            lead += 'subscription:%s\n' % protocol.escape(headers['id'], version)
        lead += 'ack:%d-' % number if ack_header else 'message-id:'
        self.lead = lead.encode('utf-8', 'replace')

    def give(self, message: BrokerMessage, delivery: Any = None) -> None:
        """Sends one message to the subscriber."""
        if len(message.body) < LARGE:
            version, acked = self.kind
            parts = (message.rest(version, acked, self.lead),)  # type: Tuple[bytes, ...]
        else:
            parts = self.lead + message.head(*self.kind), message.body, b'\0\n'
        self.outlet.put(parts, 1, delivery)

    def acknowledge(self, number: str) -> List[BrokerMessage]:
        """Takes the messages that an ACK or NACK of this one is about, out of ``unacked``."""
        if number not in self.unacked:
            return []
        if self.mode == 'client-individual':
            return [self.unacked.pop(number)]
        taken = []
        while number in self.unacked:
            taken.append(self.unacked.popitem(last=False)[1])
        return taken


NOBODY = frozenset()  # type: FrozenSet[Subscription]


class Status(NamedTuple):
    """What can be seen of a destination."""
    name: str
    waiting: int           # messages that were given to nobody yet
    consumers: int
    came: int              # messages, since the destination is there
    went: int
    oldest: float          # seconds that the first one waits


class Destination:
    """A name with subscribers; either a Topic or a Queue."""
    __slots__ = ('all', 'name', 'subscriptions', 'came', 'went')

    OVERHEAD = 600         # bytes that it takes

    def __init__(self, all_of_them: 'Destinations', name: str) -> None:
        self.all = all_of_them
        self.name = name
        self.subscriptions = {}  # type: Dict[Subscription, None]
        self.came = 0
        self.went = 0

    def add(self, subscription: Subscription) -> None:
        self.subscriptions[subscription] = None

    def remove(self, subscription: Subscription) -> None:
        """It gets no more. What it costs doesn't depend on how many others there are."""
        del self.subscriptions[subscription]

    def dispatch(self) -> None:
        """Gives out what waits, as far as subscribers have room."""

    def has_room_again(self, subscription: Subscription) -> None:
        """The subscription can be given more."""

    @property
    def idle(self) -> bool:
        """Whether it may be forgotten."""
        return not self.subscriptions

    def status(self) -> Status:
        return Status(self.name, 0, len(self.subscriptions), self.came, self.went, 0.0)


class Topic(Destination):
    """Each subscriber gets each message; without subscribers it is dropped.

    Messages are gathered while the broker reads, and given to each subscriber in one piece: the
    subscription's lead, joined between the rests of the frames, which all subscribers share.
    """

    __slots__ = ('_batch',)

    MOST_BLOBS = 64        # that are kept for subscribers whose lead is the same

    def __init__(self, all_of_them: 'Destinations', name: str) -> None:
        super().__init__(all_of_them, name)
        self._batch = []  # type: List[BrokerMessage]

    def publish(self, message: BrokerMessage, audience: Optional[Audience]) -> None:
        self.came += 1
        if not self.subscriptions:
            self.all.dropped += 1
        elif message.is_expired:
            self.all.expired += 1
        elif audience is None and len(message.body) < LARGE:
            self._batch.append(message)
            self.all.gathering = self
        else:
            self.flush()
            self.all.deliveries += len(self.subscriptions)
            for subscription in list(self.subscriptions):       # who doesn't read is removed meanwhile
                if audience is None or audience(subscription.owner):
                    self.went += 1
                    subscription.give(message)

    def flush(self) -> None:
        """Gives what was gathered to the subscribers."""
        if not self._batch:
            return
        batch, self._batch = self._batch, []
        self.went += len(batch) * len(self.subscriptions)
        self.all.deliveries += len(self.subscriptions)
        rests = {}  # type: Dict[Tuple[str, bool], List[bytes]]
        blobs = {}  # type: Dict[Tuple[Tuple[str, bool], bytes], bytes]
        for subscription in list(self.subscriptions):
            kind, lead = subscription.kind, subscription.lead
            blob = blobs.get((kind, lead))
            if blob is None:
                if len(blobs) >= self.MOST_BLOBS:
                    blobs.clear()
                if kind not in rests:
                    rests[kind] = [b''] + [message.rest(*kind) for message in batch]
                blob = blobs[kind, lead] = lead.join(rests[kind])
            subscription.outlet.put((blob,), len(batch))

    def add(self, subscription: Subscription) -> None:
        self.flush()
        super().add(subscription)

    def remove(self, subscription: Subscription) -> None:
        self.flush()
        super().remove(subscription)


class Queue(Destination):
    """Each message goes to one consumer, in turn; without consumers it waits.

    It is the queue's, and counts as its bytes, until it is settled: by an ACK, or for ``auto`` when it
    is written to the consumer's socket. Until then it comes back to its place when the consumer
    goes. A refused one (NACK) is offered to the consumers that haven't refused it; when all have,
    to all again; after several refusals it goes to ``DEAD_LETTERS``.
    """
    __slots__ = ('bytes', '_fresh', '_back', '_turns')

    OVERHEAD = 1600
    MOST_GROUPS = 64       # of messages that wait for others than those who refused them

    def __init__(self, all_of_them: 'Destinations', name: str) -> None:
        super().__init__(all_of_them, name)
        self.bytes = 0
        self._fresh = collections.deque()  # type: collections.deque[BrokerMessage]
        # Those that came back, the oldest first, by who refused them: what an ACK costs depends on
        # the number of these groups, never on the number of messages.
        self._back = {}  # type: Dict[FrozenSet[Subscription], List[Tuple[int, BrokerMessage]]]
        # Consumers that may have room, the next one first. Who has none is out until it says so:
        # what a SEND costs doesn't depend on how many of them there are.
        self._turns = collections.OrderedDict()  # type: collections.OrderedDict[Subscription, None]

    @property
    def idle(self) -> bool:
        return not self.subscriptions and not self.bytes

    # -- messages that come and go

    def publish(self, message: BrokerMessage) -> None:
        """Raises DestinationError where there is no room."""
        message.enters_queue()
        if message.envelope.expires < NEVER and message.is_expired:
            self.came += 1
            self.all.expired += 1
            return self.all.forget(self)
        self.keep(message)
        self._fresh.append(message)
        self.came += 1
        if self._turns:
            self.dispatch()

    def keep(self, message: BrokerMessage) -> None:
        """From now on it is counted. Raises DestinationError where there is no room."""
        cost, envelope, all_of_them = message.cost, message.envelope, self.all
        if not envelope.kept:
            cost += envelope.cost
        in_all = cost if self.bytes else cost + self.OVERHEAD
        if self.bytes + cost > all_of_them.most_bytes or all_of_them.bytes + in_all > all_of_them.most_in_all:
            all_of_them.make_room(self, cost)
            in_all = cost if self.bytes else cost + self.OVERHEAD
        if envelope.expires < NEVER and not envelope.kept:
            all_of_them.expires(self, envelope)
        envelope.kept += 1
        self.bytes += cost
        all_of_them.bytes += in_all

    def drop(self, message: BrokerMessage) -> None:
        """It is kept no longer."""
        cost, envelope = message.cost, message.envelope
        envelope.kept -= 1
        if not envelope.kept:
            cost += envelope.cost
        self.bytes -= cost
        self.all.bytes -= cost
        if not self.bytes:
            self.all.bytes -= self.OVERHEAD

    def settle(self, messages: Iterable[BrokerMessage]) -> None:
        """They have arrived. ``Destinations.forget`` must follow."""
        for message in messages:
            self.drop(message)

    def written(self, message: BrokerMessage) -> None:
        """An ``auto`` consumer's socket has it."""
        self.drop(message)
        if not (self.bytes or self.subscriptions):
            self.all.forget(self)

    # -- who is next

    def dispatch(self) -> None:
        """Gives out what waits, each to the next consumer that has room."""
        turns, passed_over = self._turns, 0
        while (self._fresh or self._back) and passed_over < len(turns):
            consumer = next(iter(turns))
            if len(consumer.unacked) >= consumer.prefetch or not consumer.outlet.has_room():
                del turns[consumer]
                continue
            turns.move_to_end(consumer)
            message = self._next_for(consumer)
            if message is None:
                passed_over += 1
            else:
                passed_over = 0
                self._give(consumer, message)

    def has_room_again(self, subscription: Subscription) -> None:
        if subscription in self.subscriptions:
            self._turns.setdefault(subscription)
            self.dispatch()

    def _next_for(self, consumer: Subscription) -> Optional[BrokerMessage]:
        """The oldest message that the consumer hasn't refused; those that are expired go."""
        while self._fresh or self._back:
            message = self._pop(consumer) if self._back else self._fresh.popleft()
            if message is None or message.envelope.expires == NEVER or not message.is_expired:
                return message
            self._expire(message)
        return None

    def _pop(self, consumer: Subscription) -> Optional[BrokerMessage]:
        heads = [(heap[0][0], refusers) for refusers, heap in self._back.items() if consumer not in refusers]
        serial, refusers = min(heads, default=(NEVER, NOBODY), key=lambda head: head[0])
        if self._fresh and self._fresh[0].serial < serial:
            return self._fresh.popleft()
        if serial == NEVER:
            return None
        heap = self._back[refusers]
        message = heapq.heappop(heap)[1]
        message.refusers = refusers
        if not heap:
            del self._back[refusers]
        return message

    def _give(self, consumer: Subscription, message: BrokerMessage) -> None:
        self.went += 1
        if consumer.mode == 'auto':
            consumer.give(message, (self, message))
        else:
            consumer.unacked[message.number] = message
            consumer.give(message)

    # -- consumers that come and go

    def add(self, subscription: Subscription) -> None:
        super().add(subscription)
        self._turns[subscription] = None
        self.dispatch()

    def remove(self, subscription: Subscription) -> None:
        """It gets no more. What it has not acknowledged stays with it; see ``take_back``."""
        super().remove(subscription)
        self._turns.pop(subscription, None)
        for refusers in [each for each in self._back if self._group(each) != each]:
            self._regroup(refusers)              # nobody waits for one who is gone

    def _regroup(self, refusers: FrozenSet[Subscription]) -> None:
        fewer = self._back.pop(refusers)
        group = self._group(refusers)
        more = self._back.setdefault(group, [])
        if len(more) < len(fewer):
            fewer, more = more, fewer
            self._back[group] = more
        for entry in fewer:
            heapq.heappush(more, entry)

    def _group(self, refusers: FrozenSet[Subscription]) -> FrozenSet[Subscription]:
        """Those of them who aren't asked again: the present ones, as long as there are others."""
        if not refusers:
            return NOBODY
        present = frozenset(each for each in refusers if each in self.subscriptions)
        if len(present) == len(self.subscriptions) or (
                present not in self._back and len(self._back) >= self.MOST_GROUPS):
            return NOBODY
        return present

    def take_back(self, messages: Iterable[BrokerMessage], redelivered: bool = True) -> None:
        """What was given to a consumer that is gone; ``dispatch`` must follow."""
        for message in messages:
            message.redelivered = message.redelivered or redelivered
            self._put_back(message, message.refusers)

    def _put_back(self, message: BrokerMessage, refusers: FrozenSet[Subscription]) -> None:
        message.refusers = NOBODY                # its group says it; who is gone is not held by it
        heapq.heappush(self._back.setdefault(self._group(refusers), []), (message.serial, message))

    def refuse(self, messages: Iterable[BrokerMessage], refuser: Subscription, for_good: bool) -> None:
        """NACK. They are offered again when this round is over, behind the NACK's RECEIPT; or, for good,
        go to the dead letters at once."""
        for message in messages:
            message.refusals += 1
            message.redelivered = True
            enough = for_good or message.refusals >= self.all.most_refusals
            if not enough or not self.all.bury(self, message):
                self._put_back(message, message.refusers | {refuser})
        if refuser in self.subscriptions:
            self._turns.setdefault(refuser)
        self.all.to_dispatch[self] = None

    # -- expiry

    def expire(self) -> float:
        """Forgets all that is expired, which is else found when its turn comes; says when the next is."""
        self._fresh = collections.deque(self._without_expired(self._fresh))
        for refusers, heap in list(self._back.items()):
            of_use = {message.serial for message in self._without_expired([message for _, message in heap])}
            self._back[refusers] = [entry for entry in heap if entry[0] in of_use]
            heapq.heapify(self._back[refusers])
            if not of_use:
                del self._back[refusers]
        waiting = itertools.chain(self._fresh, (each for heap in self._back.values() for _, each in heap))
        return min((message.envelope.expires for message in waiting), default=NEVER)

    def _without_expired(self, messages: Iterable[BrokerMessage]) -> List[BrokerMessage]:
        of_use = []
        for message in messages:
            if message.is_expired:
                self._expire(message)
            else:
                of_use.append(message)
        return of_use

    def _expire(self, message: BrokerMessage) -> None:
        self.all.expired += 1
        self.drop(message)

    def status(self) -> Status:
        heads = [heap[0][1] for heap in self._back.values()] + list(itertools.islice(self._fresh, 1))
        oldest = max((time.monotonic() - message.since for message in heads), default=0.0)
        return Status(self.name, len(self._fresh) + sum(map(len, self._back.values())),
                      len(self.subscriptions), self.came, self.went, oldest)


class Destinations:
    """All topics and queues by name, and what the queues hold together.

    token: begins the name of each message. most_bytes: in one queue; most_in_all: in all together.
    """

    def __init__(self, token: str, most_bytes: int, most_in_all: int, most_refusals: int) -> None:
        self.most_refusals = most_refusals
        self.bytes = 0                     # in all queues
        self.dropped = 0                   # messages that nobody wanted
        self.expired = 0
        self.deliveries = 0                # of topics, to a subscription each: what their messages cost
        self.doors = {}          # type: Dict[str, Any]     # of the program itself, by topics that go out there
        self.gathering = None    # type: Optional[Topic]
        self.to_dispatch = {}    # type: Dict[Queue, None]
        self._told = agent.Seldom(log)
        self.most_bytes = most_bytes
        self.most_in_all = most_in_all
        self._places = {}        # type: Dict[str, Any]
        self._expiring = {}      # type: Dict[Queue, float]   # those with messages that expire, and when
        self._next_expiry = NEVER          # the first of these; seconds since 1970
        self._pause_until = 0.0            # of looking for what is expired
        self._envelope = Envelope({'destination': ''})   # of the last SEND: the next is often like it
        self._serials = itertools.count(1)
        self._of_topic, self._of_queue = token + '-t%d', token + '-q%d'

    def __len__(self) -> int:
        return len(self._places)

    def status(self) -> List[Status]:
        return sorted(place.status() for place in self._places.values())

    @staticmethod
    def overhead(name: str) -> int:
        """Bytes that a topic or queue of that name takes."""
        return (Queue if is_queue(name) else Topic).OVERHEAD

    def get(self, name: str) -> Any:
        """The topic or queue of that name."""
        place = self._places.get(name)
        if place is None:
            place = self._places[name] = (Queue if is_queue(name) else Topic)(self, name)
        return place

    def forget(self, place: Destination) -> None:
        """Drops one that holds nothing."""
        if place.idle:
            self._places.pop(place.name, None)
            if type(place) is Queue:
                self._expiring.pop(place, None)

    def is_of_topic(self, number: str) -> bool:
        """Whether that is the name of a topic's message: nothing is kept of it."""
        return number.startswith(self._of_topic[:-2])

    def send(self, frame: WireFrame, sender: Any,
             audience: Callable[[str, WireFrame], Optional[Audience]]) -> None:
        """Gives a SEND to its destination; ``sender``: the outlet of who said it. One topic at a time
        gathers, so that order holds between destinations, too. Raises DestinationError."""
        if self.doors and frame.headers['destination'] in self.doors:
            return self.doors[frame.headers['destination']].let_out(frame, sender)  # type: ignore[no-any-return]
        envelope = self._envelope
        if frame.headers != envelope.headers or 'expiration' in frame.headers:
            envelope = self._envelope = Envelope(frame.headers)
        name = envelope.destination
        place = self._places.get(name)     # type: Any
        if place is None:
            if not is_queue(name):
                self.dropped += 1
                return
            place = self.get(name)
        if self.gathering is not place:
            self.flush()
        serial = next(self._serials)
        if type(place) is Topic:
            message = BrokerMessage(serial, self._of_topic % serial, envelope, frame.body)
            place.publish(message, audience(name, frame))
        else:
            place.publish(BrokerMessage(serial, self._of_queue % serial, envelope, frame.body))

    def flush(self) -> None:
        """Gives out what a topic has gathered."""
        if self.gathering is not None:
            self.gathering.flush()
            self.gathering = None

    def dispatch(self) -> None:
        """Offers what was refused in this round."""
        while self.to_dispatch:
            self.to_dispatch.popitem()[0].dispatch()

    def check_room(self, frames: Iterable[WireFrame]) -> None:
        """Raises DestinationError unless all of these SENDs find room."""
        wanted = collections.Counter()  # type: Dict[str, int]
        for frame in frames:
            name = frame.headers['destination']
            if is_queue(name):
                wanted[name] += MESSAGE_OVERHEAD + len(frame.body) + Envelope(frame.headers).cost
        self._check_room(wanted)

    def make_room(self, queue: Queue, cost: int) -> None:
        """Raises DestinationError where there is none for so many bytes."""
        try:
            self._check_room({queue.name: cost})
        except DestinationError:
            self.forget(queue)
            raise

    def _check_room(self, wanted: Dict[str, int]) -> None:
        """Raises DestinationError where there isn't so much for these queues, though what is expired goes."""
        text = self._refusal(wanted)
        if text:
            self._expire(wanted)
            text = self._refusal(wanted)
        if text:
            raise DestinationError(text)

    def _refusal(self, wanted: Dict[str, int]) -> str:
        """Why there is no room; '' where there is."""
        in_all = self.bytes
        for name, cost in wanted.items():
            held = getattr(self._places.get(name), 'bytes', 0)
            in_all += cost if held else cost + Queue.OVERHEAD
            if held + cost > self.most_bytes:
                return '%.100s is full: a queue may hold %d bytes' % (name, self.most_bytes)
        if in_all > self.most_in_all:
            return 'the queues are full: all together may hold %d bytes' % self.most_in_all
        return ''

    # -- expiry

    def expires(self, queue: Queue, envelope: Envelope) -> None:
        """A message with this envelope came to the queue."""
        self._expiring[queue] = min(envelope.expires, self._expiring.get(queue, NEVER))
        self._next_expiry = min(self._next_expiry, envelope.expires)

    def _expire(self, wanted: Iterable[str]) -> None:
        """Drops what is expired in all queues; those of ``wanted`` stay, though they hold nothing any more.
        Looking for it takes a twentieth of the time at most."""
        begin = time.monotonic()
        if begin < self._pause_until or time.time() < self._next_expiry:
            return
        for queue, soonest in list(self._expiring.items()):
            if soonest <= time.time():
                self._expiring[queue] = queue.expire()
                if self._expiring[queue] == NEVER:
                    del self._expiring[queue]
                if queue.name not in wanted:
                    self.forget(queue)
        self._next_expiry = min(self._expiring.values(), default=NEVER)
        self._pause_until = begin + 20 * (time.monotonic() - begin)

    def bury(self, queue: Queue, message: BrokerMessage) -> bool:
        """Moves a message that was refused too often to ``DEAD_LETTERS``. False: it can't go there."""
        if queue.name == DEAD_LETTERS:
            return False
        headers = {name: value for name, value in message.envelope.headers.items()
                   if name not in ('expires', 'expiration')}
        headers.update({'destination': DEAD_LETTERS, 'original-destination': queue.name,
                        'reason': 'refused %d time%s' % (message.refusals, 's' * (message.refusals > 1))})
        serial = next(self._serials)
        letter = BrokerMessage(serial, self._of_queue % serial, Envelope(headers), message.body)
        queue.drop(message)
        try:
            self.get(DEAD_LETTERS).publish(letter)
        except DestinationError as error:
            self._told.warn(queue.name, '%s keeps what was refused %s times: %s',
                            queue.name, message.refusals, error)
            self._places[queue.name] = queue     # if it was forgotten, as one that holds nothing
            queue.keep(message)
            return False
        return True
