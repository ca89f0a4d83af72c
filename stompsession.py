"""What a client says in STOMP 1.0, 1.1 and 1.2, and what follows from it: a method for each command.

What it is not: a socket, or the decision about who is sent which message. A ``Session`` is given whole
frames by its connection (stompbroker.py), answers through it, and turns to destinations
(stompqueues.py). Sections of the STOMP specifications are named where they matter.

Threads: none of its own. All of it is called on the broker's thread, so nothing here needs a lock.
"""

import itertools
import logging
import re
from typing import Any, Callable, Dict, List, Optional, Tuple

import protocol
from protocol import WireFrame
from stompqueues import BrokerMessage, Queue, Subscription, check_name, check_send, cost_of

log = logging.getLogger('vmhost.broker')

VERSIONS = ('1.2', '1.1', '1.0')          # the best first


class StompError(Exception):
    """A client broke a rule of STOMP, or a limit. The text goes into an ERROR frame; then the connection
    is closed."""


# Headers of SUBSCRIBE that ask for what isn't there, and what that is.
NOT_BUILT = {'selector': 'selectors', 'durable': 'durable subscriptions',
             'activemq.subscriptionName': 'durable subscriptions',
             'activemq.subcriptionName': 'durable subscriptions',      # as ActiveMQ's own examples spell it
             'durable-subscription-name': 'durable subscriptions',
             'browser': 'queue browsers', 'activemq.exclusive': 'exclusive consumers',
             'activemq.retroactive': 'retroactive subscriptions',
             'no-local': 'subscriptions without one\'s own messages',
             'activemq.noLocal': 'subscriptions without one\'s own messages'}


def _is_no(value: Optional[str]) -> bool:
    """Python's clients say False."""
    return value in ('false', 'False')


class Transactions:
    """The open transactions of a session: the frames of each, until COMMIT or ABORT."""
    __slots__ = ('_open', '_most', '_hold')

    def __init__(self, most: int, hold: Callable[[int], None]) -> None:
        self._open = {}  # type: Dict[str, List[WireFrame]]
        self._most = most
        self._hold = hold                  # accounts the bytes that they take; may raise StompError

    def begin(self, name: str) -> None:
        if name in self._open:
            raise StompError('transaction %.80r is open already' % name)
        if len(self._open) >= self._most:
            raise StompError('more than %d transactions' % self._most)
        self._hold(cost_of({'transaction': name}))
        self._open[name] = []

    def add(self, frame: WireFrame) -> None:
        """The frame waits for COMMIT. Raises StompError where its transaction isn't open."""
        frames = self._find(frame.headers['transaction'])
        self._hold(cost_of(frame.headers, frame.body))
        frames.append(frame)

    def end(self, name: str) -> List[WireFrame]:
        """The frames, in their order; the transaction is over."""
        frames = self._find(name)
        del self._open[name]
        self._hold(-cost_of({'transaction': name}))
        for frame in frames:
            self._hold(-cost_of(frame.headers, frame.body))
        return frames

    def _find(self, name: str) -> List[WireFrame]:
        if name not in self._open:
            raise StompError('no transaction %.80r' % name)
        return self._open[name]


class Settled:
    """Which messages the ACKs and NACKs of one transaction settle."""

    def __init__(self) -> None:
        self._numbers = {}  # type: Dict[Subscription, Any]       # a set of them
        self._unacked = {}  # type: Dict[Subscription, Any]       # what is left of those that it was given

    def add(self, subscription: Subscription, number: str) -> bool:
        """An ACK or NACK of that message, which nobody settled yet. False: an earlier one of these does."""
        numbers = self._numbers.setdefault(subscription, set())
        if number in numbers:
            return False
        numbers.add(number)
        if subscription.mode == 'client':      # with all that were given before it
            before = self._unacked.setdefault(subscription, iter(subscription.unacked))
            numbers.update(itertools.takewhile(number.__ne__, before))
        return True


class Session:
    """What a client says, in STOMP, over its connection: one method for each command.

    ``peer``, ``id``, ``policy_data``, ``rate``, ``byte_rate``, ``identified`` and ``close`` are
    for the policy; the rest is the broker's own.
    """
    __slots__ = ('broker', 'connection', 'peer', 'id', 'policy_data', 'rate', 'byte_rate',
                 'identified', 'version', '_subscriptions', '_by_number', '_numbers', '_transactions',
                 '_is_connected', '_was_asked', '_was_identified')

    def __init__(self, connection: Any) -> None:
        self.broker = connection.broker
        self.connection = connection
        self.peer = connection.peer
        self.id = '%s-%d' % (self.broker.token, connection.number)
        self.policy_data = None  # type: Any
        self.rate = None  # type: Optional[Tuple[float, float]]
        self.byte_rate = None  # type: Optional[Tuple[float, float]]
        self.identified = True
        self.version = '1.0'
        self._subscriptions = {}  # type: Dict[str, Subscription]
        # The same, and those that were ended while messages were not acknowledged.
        self._by_number = {}      # type: Dict[str, Subscription]
        self._numbers = 0
        self._transactions = Transactions(self.broker.limits.transactions, connection.hold)
        self._is_connected = False
        self._was_asked = False            # the policy, so that it has to be told of the end
        self._was_identified = False       # the policy said who it is, and the connection knows

    def __repr__(self) -> str:
        return '<session %s of %s:%s>' % (self.id, self.peer[0], self.peer[1])

    def close(self, why: str) -> None:
        """Ends it at once. On the broker's thread."""
        self.connection.close(why)

    def handle(self, frame: WireFrame) -> None:
        """A frame of the client. Raises what makes an ERROR."""
        if not self._is_connected:
            if frame.command not in ('CONNECT', 'STOMP'):
                raise StompError('%s before CONNECT' % frame.command)
            return self._connect(frame)
        _HANDLERS[frame.command](self, frame)
        if 'receipt' in frame.headers and frame.command != 'DISCONNECT':
            self._say_receipt(frame)

    def _say_receipt(self, frame: WireFrame) -> None:
        self._say('RECEIPT', {'receipt-id': frame.headers['receipt']})

    def _say(self, command: str, headers: Dict[str, str], body: bytes = b'') -> None:
        if self._subscriptions:
            # No RECEIPT or ERROR overtakes the messages of frames before its own.
            self.broker.destinations.flush()
        self.connection.put((protocol.encode(command, headers, body, self.version),), 1)

    def say_error(self, text: str, frame: Optional[WireFrame]) -> None:
        """ERROR, about that frame."""
        headers = {'message': text}
        if frame is not None and 'receipt' in frame.headers:
            headers['receipt-id'] = frame.headers['receipt']
        if not self._is_connected:
            headers['version'] = ','.join(reversed(VERSIONS))
        headers['content-type'] = 'text/plain'
        self._say('ERROR', headers, (text + '\n').encode('utf-8', 'replace'))

    def stop(self, unwritten: List[Tuple[Queue, BrokerMessage]], for_good: bool) -> None:
        """It is sent no more, and queues take back what it wasn't sent (``unwritten``). For good: it says no
        more, either; they take back all, transactions are forgotten, and the policy is told."""
        places = {each.destination: None for each in self._by_number.values()}  # type: Dict[Any, None]
        for subscription in self._subscriptions.values():
            subscription.destination.remove(subscription)
        self._subscriptions = {}
        for queue, message in unwritten:
            queue.take_back([message], redelivered=False)
            places[queue] = None
        if for_good:
            for subscription in self._by_number.values():
                if subscription.unacked:
                    subscription.destination.take_back(subscription.unacked.values())
            self._by_number = {}
            self._transactions = Transactions(0, self.connection.hold)
        for place in places:               # now that each of them has all of it, in its order
            place.dispatch()
            self.broker.destinations.forget(place)
        if self._was_asked and for_good:
            self._was_asked = False
            try:
                self.broker.policy.closed(self)
            except Exception:
                log.exception('the policy, about the end of %r', self)

    def _needed(self, frame: WireFrame, name: str) -> str:
        value = frame.headers.get(name)
        if not value:
            raise StompError('%s without the header %s' % (frame.command, name))
        return value

    # -- CONNECT and DISCONNECT

    def _connect(self, frame: WireFrame) -> None:
        headers = frame.headers
        version = self._negotiate(headers.get('accept-version'))
        answer = {'version': version, 'session': self.id, 'server': self.broker.server}
        if version != '1.0':
            self.connection.clock.negotiate(self.broker.beat_ms, headers.get('heart-beat', '0,0'))
            answer['heart-beat'] = '%d,%d' % (self.broker.beat_ms, self.broker.beat_ms)
        if not self.broker.admits(headers.get('login', ''), headers.get('passcode', '')):
            self.broker.count.refused += 1
            self.broker.told.warn('login ' + self.peer[0], '%s: login or passcode is wrong', self.connection)
            raise StompError('login or passcode is wrong')
        take = self.broker.policy.taking(headers)
        if take is not None:
            return self.connection.give_away(take)     # type: ignore[no-any-return]
        self._was_asked = True
        self.broker.policy.connecting(self, headers)
        self.version = version
        self._is_connected = True
        self.connection.opened()
        if self.identified:
            self._identify()
        self._say('CONNECTED', answer)
        log.debug('%r connected, STOMP %s', self, version)

    def _identify(self) -> None:
        """The policy knows who that is."""
        if not self.identified:
            self.broker.count.refused += 1
            raise StompError('the first SEND did not say who this is')
        self._was_identified = True
        self.connection.identified()

    def _negotiate(self, accepted: Optional[str]) -> str:
        if accepted is None:
            return '1.0'
        offered = [version.strip() for version in accepted.split(',')]
        for version in VERSIONS:
            if version in offered:
                return version
        raise StompError('no common version: this broker speaks 1.0, 1.1 and 1.2')

    def _again(self, frame: WireFrame) -> None:
        raise StompError('%s on a session that is connected' % frame.command)

    def _disconnect(self, frame: WireFrame) -> None:
        if 'receipt' in frame.headers:
            self._say_receipt(frame)
        self.connection.end()

    # -- SEND

    def _send(self, frame: WireFrame) -> None:
        destination = frame.headers.get('destination') or self._needed(frame, 'destination')
        allowed = self.broker.policy.sending(self, destination, frame)
        if not self._was_identified:
            self._identify()
        if allowed is False:
            self.broker.count.refused += 1
        elif 'transaction' in frame.headers:
            check_send(frame.headers)      # else it would be found at COMMIT
            self._transactions.add(frame)
        else:
            self._route(frame)

    def _route(self, frame: WireFrame) -> None:
        self.broker.destinations.send(frame, self.connection, self.broker.policy.audience)

    # -- SUBSCRIBE and UNSUBSCRIBE

    def _subscribe(self, frame: WireFrame) -> None:
        destination = self._needed(frame, 'destination')
        mode = frame.headers.get('ack', 'auto')
        if self.version == '1.0':
            key = frame.headers.get('id', 'destination ' + destination)
        else:
            key = self._needed(frame, 'id')
        if key in self._subscriptions:
            raise StompError('there is a subscription with the id %.80r already' % key)
        if mode not in ('auto', 'client', 'client-individual'):
            raise StompError('ack is none of auto, client, client-individual: %.40r' % mode)
        if len(self._by_number) >= self.broker.limits.subscriptions:
            raise StompError('more than %d subscriptions' % self.broker.limits.subscriptions)
        check_name(destination)
        for name in NOT_BUILT:
            if frame.headers.get(name) and not _is_no(frame.headers[name]):
                raise StompError('this broker has no %s: header %s' % (NOT_BUILT[name], name))
        prefetch = self._prefetch(frame.headers)
        self.broker.policy.subscribing(self, destination, frame.headers)
        cost = cost_of(frame.headers) + self.broker.destinations.overhead(destination)
        self.connection.hold(cost)
        self._numbers += 1
        place = self.broker.destinations.get(destination)
        subscription = Subscription(self, self.connection, self.version, self._numbers, key, frame.headers,
                                    place, prefetch, cost)
        self._subscriptions[key] = self._by_number[subscription.id] = subscription
        place.add(subscription)

    def _prefetch(self, headers: Dict[str, str]) -> int:
        """Messages that a queue gives before one of them is acknowledged; RabbitMQ's name, and ActiveMQ's."""
        most = self.broker.limits.unacknowledged
        text = headers.get('prefetch-count', headers.get('activemq.prefetchSize', '0')).strip()
        if re.match('[0-9]{1,9}$', text) is None:
            raise StompError('prefetch-count is no number: %.40r' % text)
        return min(int(text) or most, most)

    def _unsubscribe(self, frame: WireFrame) -> None:
        if self.version == '1.0' and 'id' not in frame.headers:
            subscription = self._subscribed_to(self._needed(frame, 'destination'))
        else:
            subscription = self._subscriptions.get(self._needed(frame, 'id'))
        if subscription is None:
            raise StompError('no such subscription')
        del self._subscriptions[subscription.key]
        subscription.destination.remove(subscription)
        self._forget_if_done(subscription)
        self.broker.destinations.forget(subscription.destination)

    def _forget_if_done(self, subscription: Subscription) -> None:
        """One that ended lives on until all that it was sent is acknowledged."""
        if not subscription.unacked and self._subscriptions.get(subscription.key) is not subscription:
            del self._by_number[subscription.id]
            self.connection.hold(-subscription.cost)

    def _subscribed_to(self, destination: str) -> Optional[Subscription]:
        for subscription in self._subscriptions.values():
            if subscription.destination.name == destination:
                return subscription
        return None

    def ask_queues(self) -> None:
        """There is room again for what queues have."""
        for subscription in list(self._subscriptions.values()):
            subscription.destination.has_room_again(subscription)

    # -- ACK and NACK

    def _ack(self, frame: WireFrame) -> None:
        if self.version == '1.2':
            self._needed(frame, 'id')
        else:
            self._needed(frame, 'message-id')
            if self.version == '1.1':
                self._needed(frame, 'subscription')
        self._check_ack(frame)
        if 'transaction' in frame.headers:
            self._transactions.add(frame)
        else:
            self._settle(frame)

    def _check_ack(self, frame: WireFrame, settled: Optional[Settled] = None) -> None:
        """Raises StompError where nothing is there to be settled. For topics, which keep nothing, an ACK
        has no effect. ``settled``: by what stands before it in its transaction, to which it is added."""
        subscription, number = self._find_unacked(frame.headers)
        is_there = subscription is not None or self.broker.destinations.is_of_topic(number)
        if is_there and subscription is not None and settled is not None:
            is_there = settled.add(subscription, number)
        if not is_there:
            meant = frame.headers['id' if self.version == '1.2' else 'message-id']
            raise StompError('%s of a message that this client has not, or has settled: %.80r'
                             % (frame.command, meant))

    def _settle(self, frame: WireFrame) -> None:
        """ACK or NACK."""
        subscription, number = self._find_unacked(frame.headers)
        if subscription is None:
            return
        messages = subscription.acknowledge(number)
        queue = subscription.destination
        if frame.command == 'ACK':
            queue.settle(messages)
            queue.has_room_again(subscription)
        else:
            queue.refuse(messages, subscription, _is_no(frame.headers.get('requeue')))
        self._forget_if_done(subscription)
        self.broker.destinations.forget(queue)

    def _find_unacked(self, headers: Dict[str, str]) -> Tuple[Optional[Subscription], str]:
        """The subscription that waits for this ACK, and the message's name."""
        if self.version == '1.2':
            key, _, number = headers['id'].partition('-')
            candidates = [self._by_number[key]] if key in self._by_number else []
        else:
            key, number = headers.get('subscription', ''), headers['message-id']
            if self.broker.destinations.is_of_topic(number):
                return None, number
            candidates = [self._subscriptions[key]] if key in self._subscriptions else []
            if not candidates or number not in candidates[0].unacked:
                candidates = [each for each in self._by_number.values()
                              if self.version == '1.0' or each.key == key]
        return next((each for each in candidates if number in each.unacked), None), number

    # -- BEGIN, COMMIT and ABORT

    def _begin(self, frame: WireFrame) -> None:
        self._transactions.begin(self._needed(frame, 'transaction'))

    def _commit(self, frame: WireFrame) -> None:
        """All of it, or an ERROR and nothing."""
        frames = self._transactions.end(self._needed(frame, 'transaction'))
        settled = Settled()
        for part in frames:
            if part.command != 'SEND':
                self._check_ack(part, settled)
        self.broker.destinations.check_room(part for part in frames if part.command == 'SEND')
        for part in frames:
            if part.command == 'SEND':
                self._route(part)
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
