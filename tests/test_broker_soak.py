"""Producers, consumers of every kind, transactions, refusals, limits, and deaths at any byte, by a seed: no
message is lost, none comes that should not, and each producer's come in order where one consumer is."""

import collections
import os
import random
import threading
import time

import pytest
from helpers import wait_until
from stomp_client import Client, frame, running

from stompbroker import Broker

pytestmark = pytest.mark.once

DEAD_LETTERS = '/queue/DLQ'
REFUSALS = 3
LIMITS = {'queued': 300000, 'queued_in_all': 700000, 'held': 400000, 'refusals': REFUSALS}
# Queue: the ack modes of its consumers, how many there are at a time, and whether they refuse messages.
QUEUES = {
    '/queue/auto': (['auto'], 1, False), '/queue/autos': (['auto'], 3, False),
    '/queue/client': (['client'], 1, False), '/queue/individual': (['client-individual'], 1, False),
    '/queue/mixed': (['auto', 'client', 'client-individual'], 3, False),
    '/queue/refused': (['client', 'client-individual'], 2, True)}


class Recorder:
    """A socket of the broker's that remembers what the system took to send."""

    def __init__(self, sock):
        self._sock = sock
        self.sent = bytearray()
        self.closed = threading.Event()

    def __getattr__(self, name):
        return getattr(self._sock, name)

    def send(self, data):
        count = self._sock.send(data)
        self.sent += memoryview(data)[:count]
        return count

    def close(self):
        self._sock.close()
        self.closed.set()


class RecordingBroker(Broker):
    """Knows what was written to each client; ``recorders``: by the client's address."""

    def __init__(self, **keys):
        super().__init__(**keys)
        self.recorders = {}

    def admit(self, sock, peer):
        self.recorders[peer] = recorder = Recorder(sock)
        super().admit(recorder, peer)


class Gone(Exception):
    """The connection is over: by the plan, or as the broker wants it."""


class Actor:
    """A client that lives again and again until the run is over; each life is one connection."""

    def __init__(self, run, name):
        self.run = run
        self.chance = random.Random('%d %s' % (run.seed, name))
        self.name = name
        self.client = None
        self.recorder = None
        self.thread = threading.Thread(target=self.live, name=name)

    def live(self):
        try:
            while not self.run.over.is_set():
                self.one_life()
        except Exception as error:
            self.run.failures.append('%s: %r' % (self.name, error))
            self.run.over.set()
            raise

    def one_life(self):
        with Client(self.run.broker.address, receive_buffer=self.chance.choice([None, 4096])) as client:
            self.client = client
            address = client.socket.getsockname()
            try:
                client.connect(self.chance.choice(['1.1', '1.2']))
                self.recorder = self.run.broker.recorders[address]
                self.act()
            except (Gone, OSError):
                pass
            client.close()
        assert self.recorder.closed.wait(60), 'the broker keeps the connection'
        self.after_life()
        del self.run.broker.recorders[address]

    def take(self, timeout):
        """The next frame, or None. An ERROR is the end."""
        try:
            found = self.client.take(timeout)
        except AssertionError as error:
            if 'ended' in str(error):
                raise Gone('closed')
            return None
        if found.command == 'ERROR':
            self.run.errors[found.get('message').split(':')[0][:40]] += 1
            raise Gone(found.get('message'))
        return found

    def die(self, data=b''):
        """In the middle of what it says, or after it, in one of several ways."""
        self.client.send(data[:self.chance.randrange(len(data) + 1)] if data else b'')
        way = self.chance.choice(['close', 'reset', 'DISCONNECT', 'NOSUCH'])
        if way in ('close', 'reset'):
            getattr(self.client, way)()
        elif not data:
            self.client.say(way)
        raise Gone(way)


class Producer(Actor):
    """Sends its numbers; which of them the broker has for sure, is told by receipts."""
    count = 0

    def act(self):
        for _ in range(self.chance.randrange(1, 40)):
            if self.run.over.is_set():
                return
            self.batch(self.chance.choice(list(QUEUES)), self.chance.choice(['', '', 'COMMIT', 'ABORT']))

    def batch(self, queue, transaction):
        numbers = range(self.count, self.count + self.chance.randrange(1, 20))
        self.count = numbers.stop
        lines = ['destination:' + queue] + (['transaction:t'] if transaction else [])
        bodies = [('%s %d ' % (self.name, number)).encode()
                  + b'x' * self.chance.choice([0, 100, 3000, 40000 if number % 50 == 0 else 0])
                  for number in numbers]
        data = b''.join(frame('SEND', *lines, body=body) for body in bodies)
        ids = [(self.name, number) for number in numbers]
        if transaction:
            data = frame('BEGIN', 'transaction:t') + data + frame(transaction, 'transaction:t', 'receipt:r')
        else:
            data += frame('SEND', 'destination:/topic/nobody', 'receipt:r')
        dies = self.chance.random() < 0.05
        if transaction == 'ABORT':
            self.run.never.update(ids)
        elif transaction:
            self.run.together.append(ids)
        if dies:
            self.die(data)
        self.client.send(data)
        answer = self.take(30)
        assert answer is not None and answer.command == 'RECEIPT', answer
        if transaction != 'ABORT':
            self.run.sure.update(ids)

    def after_life(self):
        self.run.over.wait(self.chance.random() * 0.02)


class Consumer(Actor):
    """Takes messages of one queue, and does what its mode allows."""

    def __init__(self, run, name, queue):
        super().__init__(run, name)
        self.queue = queue
        self.modes, number, self.refuses = QUEUES[queue]
        self.is_alone = number == 1
        self.mode = ''

    def act(self):
        self.mode = self.chance.choice(self.modes)
        self.began = time.monotonic()
        self.unacked = []            # (id, frame)
        self.acknowledged = set()
        self.last = {}               # of each producer, in this life
        prefetch = self.chance.choice([[], ['prefetch-count:1'], ['prefetch-count:20']])
        self.client.say('SUBSCRIBE', 'id:0', 'destination:' + self.queue, 'ack:' + self.mode, *prefetch)
        for _ in range(self.chance.randrange(1, 300)):
            if self.run.over.is_set():
                return
            found = self.take(0.05)
            if found is not None:
                self.got(found)
            elif self.chance.random() < 0.5:
                self.settle()
            if self.unacked and self.chance.random() < 0.3:
                self.settle()
            if self.chance.random() < 0.01:
                self.die()

    def got(self, found):
        one = self.run.note(found, self.began)
        name, number = one
        if one in self.acknowledged:
            self.run.failures.append('%s: %r comes again to who acknowledged it' % (self.queue, one))
        if self.is_alone and number <= self.last.get(name, -1):
            self.run.failures.append('%s: %r after %d' % (self.queue, one, self.last[name]))
        self.last[name] = number
        if self.mode != 'auto':
            self.unacked.append((one, found))

    def settle(self):
        """ACK or NACK, perhaps in a transaction, perhaps with its last word."""
        if not self.unacked:
            return
        chosen = self.chance.randrange(len(self.unacked))
        if self.mode == 'client':
            settled, self.unacked = self.unacked[:chosen + 1], self.unacked[chosen + 1:]
        else:
            settled = [self.unacked.pop(chosen)]
        message = settled[-1][1]
        if message.get('ack') is not None:
            lines = ['id:' + message.get('ack')]
        else:
            lines = ['message-id:' + message.get('message-id'), 'subscription:0']
        command = 'NACK' if self.refuses and self.chance.random() < 0.4 else 'ACK'
        end = self.chance.choice(['', '', 'COMMIT', 'ABORT'])
        ids = [one for one, _ in settled]
        if command == 'NACK' and end != 'ABORT':
            self.run.refusals.update(ids)
        if not end:
            data = frame(command, 'receipt:r', *lines)
        else:
            data = (frame('BEGIN', 'transaction:t') + frame(command, 'transaction:t', *lines)
                    + frame(end, 'transaction:t', 'receipt:r'))
        if self.chance.random() < 0.03:
            self.die(data)
        self.client.send(data)
        answer = self.take(30)
        while answer is not None and answer.command == 'MESSAGE':
            self.got(answer)
            answer = self.take(30)
        assert answer is not None and answer.command == 'RECEIPT', answer
        if end == 'ABORT':
            self.unacked = settled + self.unacked
        elif command == 'ACK':
            self.acknowledged.update(ids)
            self.run.settled.update(dict.fromkeys(ids, time.monotonic()))

    def after_life(self):
        """What was written to a dead auto consumer's socket may be lost; nothing else."""
        if self.mode == 'auto':
            for part in bytes(self.recorder.sent).split(b'\0\n')[:-1]:
                head, _, body = part.partition(b'\n\n')
                if head.lstrip(b'\n').startswith(b'MESSAGE\n'):
                    self.run.written.add(id_of(body))


def id_of(body):
    name, number, _ = body.split(b' ', 2)
    return name.decode(), int(number)


class Run:
    """What all know."""

    def __init__(self, seed, broker):
        self.seed = seed
        self.broker = broker
        self.over = threading.Event()
        self.failures = []
        self.errors = collections.Counter()
        self.sure = set()            # the broker said that it has them
        self.never = set()           # of transactions that were aborted
        self.together = []           # of transactions that may have been committed
        self.seen = collections.Counter()
        self.first = set()           # of those seen, the copies that were not called redelivered
        self.settled = {}            # the broker said that they are acknowledged: when
        self.refusals = collections.Counter()
        self.written = set()         # to auto consumers
        self.most = collections.Counter()
        self._lock = threading.Lock()

    def note(self, found, began):
        """A message that somebody was sent whose connection began then: what came to one that was cut off is
        read late, perhaps after the copy that the next one got, and even after the next one's ACK."""
        one = id_of(found.body)
        with self._lock:
            if self.settled.get(one, began) < began:
                self.failures.append('%r comes again though it was acknowledged' % (one,))
            if found.get('redelivered') != 'true' and found.get('destination') != DEAD_LETTERS:
                if one in self.first:
                    self.failures.append('%r comes again without redelivered' % (one,))
                self.first.add(one)
            self.seen[one] += 1
        return one

    def watch(self):
        for name, value in self.broker.counters().items():
            self.most[name] = max(self.most[name], value)


def drain(run, queue):
    """What lies in a queue at the end, in its order."""
    with Client(run.broker.address) as client:
        client.connect('1.2')
        began = time.monotonic()
        client.subscribe(queue)
        found = client.before_now()
        while True:
            more = client.before_now()
            if not more:
                return [run.note(one, began) for one in found]
            found += more


def a_run(seed, seconds):
    with running(RecordingBroker(port=0, **LIMITS)) as broker:
        run = Run(seed, broker)
        actors = [Producer(run, 'p%d' % number) for number in range(4)]
        for queue, (_, number, _) in QUEUES.items():
            actors += [Consumer(run, '%s-%d' % (queue[7:], one), queue) for one in range(number)]
        for actor in actors:
            actor.thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not run.over.wait(0.05):
            run.watch()
        run.over.set()
        for actor in actors:
            actor.thread.join(90)
            assert not actor.thread.is_alive(), actor.name
        dead = drain(run, DEAD_LETTERS)
        for queue in QUEUES:
            left = drain(run, queue)
            for name in {one[0] for one in left}:
                numbers = [number for each, number in left if each == name]
                if numbers != sorted(numbers):
                    run.failures.append('%s is out of order: %r' % (queue, numbers))
        wait_until(lambda: not broker.counters()['connections'])
        judge(run, dead)


def judge(run, dead):
    there = set(run.seen) | run.written
    lost = run.sure - there
    torn = [ids for ids in run.together if 0 < len(there.intersection(ids)) < len(ids)]
    early = [one for one in dead if run.refusals[one] < REFUSALS]
    print('\nseed %d: %d sent for sure, %d seen, %d of them more than once, %d only written, '
          '%d dead letters, errors %s\n%d lost, %d out of order or wrong, %d transactions torn' % (
              run.seed, len(run.sure), len(run.seen), sum(number > 1 for number in run.seen.values()),
              len(run.written - set(run.seen)), len(dead), dict(run.errors), len(lost), len(run.failures),
              len(torn)))
    assert not run.failures, run.failures[:10]
    assert not lost, sorted(lost)[:10]
    assert not torn and not early and not run.never & there
    counters = run.broker.counters()
    assert not any(counters[name] for name in ('queued_bytes', 'held_bytes', 'waiting_bytes', 'destinations'))
    assert run.most['queued_bytes'] <= LIMITS['queued_in_all']
    assert run.most['held_bytes'] <= 1.1 * LIMITS['held']


@pytest.mark.parametrize('seed', [1, 2] if os.environ.get('VMHOST_FULL') else [1])
def test_a_short_run(seed):
    a_run(seed, 6)


@pytest.mark.soak
def test_a_long_run():
    """SOAK_SECONDS=600 SOAK_SEED=…: as long as one likes."""
    a_run(int(os.environ.get('SOAK_SEED', time.time())), float(os.environ.get('SOAK_SECONDS', '600')))
