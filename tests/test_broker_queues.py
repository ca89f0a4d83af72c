"""Queues lose nothing: consumers that die, limits, order, expiry, prefetch. Each was wrong once."""

import contextlib
import itertools
import os
import threading
import time

import pytest
from helpers import wait_until
from process_memory import MEMORY_IS_KNOWN, most_memory
from stomp_client import Client, Program, frame, running

from stompbroker import Broker, Policy
from stompoutbox import Memory, Outbox
from stompqueues import LARGE, BrokerMessage, Destinations, Envelope

pytestmark = pytest.mark.ends

MIB = 1024 * 1024
NUMBERS = itertools.count()


@pytest.fixture
def queue():
    """A queue that no other test uses."""
    return '/queue/queues-%d' % next(NUMBERS)


def numbered(count, size=0):
    return [b'%d ' % number + b'x' * size for number in range(count)]


def number_of(message):
    return int(message.body.split()[0])


def everything(client, queue, count, *lines):
    """The numbers of so many messages, as a new consumer gets them; then no more come."""
    client.subscribe(queue, *lines)
    found = [number_of(client.take()) for _ in range(count)]
    assert client.bodies() == []
    return found


# --- consumers that die ---

@pytest.mark.once
@pytest.mark.parametrize('vanish', ['close', 'reset', 'disconnect', 'error'])
@pytest.mark.parametrize('busy', [False, True])
def test_a_dead_auto_consumer_costs_what_was_written_to_it(vanish, busy):
    """20,001 messages pour in; what its socket has not taken is still there, in its order."""
    with running(Broker(port=0)) as broker, contextlib.ExitStack() as stack:
        sender, consumer = (stack.enter_context(Client(broker.address, receive_buffer=size))
                            for size in (None, 4096))
        for client in sender, consumer:
            client.connect('1.2')
        consumer.subscribe('/queue/a')
        consumer.subscribe('/queue/a', id='second')
        written = broker.counters()['bytes_out']
        frames = [frame('SEND', 'destination:/queue/a', body=body) for body in numbered(20001, 200)]
        sender.send(b''.join(frames[:10000]))
        sender.before_now()
        if vanish in ('close', 'reset'):
            getattr(consumer, vanish)()
        elif not busy:
            consumer.say('DISCONNECT' if vanish == 'disconnect' else 'NOSUCH')
        sender.send(b''.join(frames[10000:]))
        if busy and vanish in ('disconnect', 'error'):
            consumer.say('DISCONNECT' if vanish == 'disconnect' else 'NOSUCH')
        sender.before_now()
        if vanish in ('disconnect', 'error'):
            got = [one for one in consumer.take_end_of_frames() if one.command == 'MESSAGE']
            lost = len(got)              # all of it was read
            assert [number_of(one) for one in got] == list(range(lost))
        else:
            wait_until(lambda: broker.counters()['connections'] == 1)
            lost = 15000
        written = broker.counters()['bytes_out'] - written
        with Client(broker.address) as other:
            other.connect('1.2')
            other.subscribe('/queue/a')
            first = number_of(other.take())
            assert first <= lost <= 15000
            assert [number_of(other.take()) for _ in range(first + 1, 20001)] == list(range(first + 1, 20001))
            assert first * other.received / (20001 - first) <= written
            assert other.bodies() == []
        wait_until(lambda: broker.counters()['connections'] == 1)
        assert broker.counters()['queued_bytes'] == 0


@pytest.mark.parametrize('waiting', [1, 100000])
@pytest.mark.parametrize('mode', ['auto', 'client'])
def test_a_queue_waits_for_a_slow_consumer_whatever_may_wait(waiting, mode):
    """It was cut off, and lost what was on its way, for what its queue gave it."""
    with running(Broker(port=0, waiting=waiting, max_frame=40000)) as broker:
        with Client(broker.address) as sender, Client(broker.address, receive_buffer=4096) as consumer:
            sender.connect('1.2')
            consumer.connect('1.2')
            for number in '01':
                consumer.subscribe('/queue/a', 'ack:' + mode, id=number)
            bodies = numbered(300, 30000)
            for body in bodies:
                sender.ask('SEND', 'destination:/queue/a', body=body)
            assert [consumer.take().body for _ in bodies] == bodies
            assert broker.counters()['cut_off'] == 0


class Waiting(Policy):
    """Holds the broker's thread while it takes a SEND that says so."""

    def __init__(self):
        self.waits, self.go_on = threading.Event(), threading.Event()

    def sending(self, session, destination, frame):
        if frame.body == b'wait':
            self.waits.set()
            assert self.go_on.wait(30)


def test_a_consumer_that_a_write_shows_to_be_dead():
    """On a busy broker, a failing write tells it before the end can be read."""
    policy = Waiting()
    with running(Broker(port=0, policy=policy)) as broker, contextlib.ExitStack() as stack:
        sender, other = (stack.enter_context(Client(broker.address)) for _ in range(2))
        consumer = stack.enter_context(Client(broker.address, receive_buffer=4096))
        for client in sender, other, consumer:
            client.connect('1.2')
        consumer.subscribe('/topic/a', id='topic')
        consumer.say('SUBSCRIBE', 'id:0', 'destination:/queue/a')
        frames = [frame('SEND', 'destination:/queue/a', body=body) for body in numbered(20001, 200)]
        sender.send(b''.join(frames))
        sender.before_now()
        sender.say('SEND', 'destination:/topic/a', body=b'wait')
        assert policy.waits.wait(30)
        consumer.reset()
        policy.go_on.set()
        wait_until(lambda: broker.counters()['connections'] == 2)
        other.subscribe('/queue/a')
        first = number_of(other.take())
        assert first < 15000
        assert [number_of(other.take()) for _ in range(first + 1, 20001)] == list(range(first + 1, 20001))


def test_what_a_socket_took_before_it_failed_is_written():
    """The client may have read it, and hung up: it would come again as if nobody had seen it."""
    queue = Destinations('a', MIB, MIB, 5).get('/queue/a')
    messages = [BrokerMessage(number, str(number), Envelope({'destination': queue.name}), b'')
                for number in range(2)]
    outbox = Outbox(Memory())
    for message in messages:
        queue.publish(message)
        outbox.put((b'x' * LARGE,), (queue, message))

    class Failing:
        sends = iter([LARGE])

        def send(self, data):
            for sent in self.sends:
                return sent
            raise ConnectionResetError()
    with pytest.raises(ConnectionResetError):
        outbox.write(Failing())
    assert outbox.clear() == [(queue, messages[1])]


@pytest.mark.parametrize('vanish', ['close', 'reset', 'disconnect', 'error'])
@pytest.mark.parametrize('second', ['auto', 'client', 'client-individual'])
def test_a_second_subscription_of_the_dead_gets_nothing(connect, queue, vanish, second):
    """What it had not acknowledged goes to others, and nothing comes behind the RECEIPT of DISCONNECT."""
    client, other = connect('1.2'), connect('1.2')
    client.subscribe(queue, 'ack:client-individual')
    client.publish(queue, *numbered(10))
    client.take_all(10)
    client.subscribe(queue, 'ack:' + second, id='second')
    if vanish in ('close', 'reset'):
        getattr(client, vanish)()
    else:
        client.say('DISCONNECT' if vanish == 'disconnect' else 'NOSUCH', 'receipt:r')
        assert [one.command for one in client.take_end_of_frames()] == [
            'RECEIPT' if vanish == 'disconnect' else 'ERROR']
    assert everything(other, queue, 10) == list(range(10))


def test_order_after_two_consumers_died(connect, queue):
    one, two, sender = connect('1.2'), connect('1.2'), connect('1.2')
    for client in one, two:
        client.subscribe(queue, 'ack:client')
    sender.publish(queue, *numbered(8))
    assert [number_of(message) for message in one.take_all(4)] == [0, 2, 4, 6]
    assert len(two.take_all(4)) == 4
    two.close()
    sender.before_now()
    one.close()
    wait_until(lambda: sender.before_now() == [])
    assert everything(sender, queue, 8) == list(range(8))


def test_what_was_never_written_is_not_called_redelivered(broker, connect, queue):
    sender, slow = connect('1.2'), connect(None, receive_buffer=4096)
    slow.connect('1.2')
    slow.subscribe(queue)
    sender.publish(queue, *numbered(100, 100000))      # more than the kernel takes for one that doesn't read
    slow.reset()
    other = connect('1.2')
    other.subscribe(queue)
    messages = [other.take()]
    while number_of(messages[-1]) < 99:
        messages.append(other.take())
    assert [number_of(one) for one in messages] == list(range(number_of(messages[0]), 100))
    assert {one.get('redelivered') for one in messages[1:]} == {None}


# --- prefetch ---

@pytest.mark.parametrize('header', ['prefetch-count', 'activemq.prefetchSize'])
@pytest.mark.parametrize('mode', ['client', 'client-individual'])
def test_prefetch(connect, queue, header, mode):
    """1,000 wait; nobody takes more of them than it asked for, and all come in order."""
    sender, one, two = connect('1.2'), connect('1.2'), connect('1.2')
    sender.publish(queue, *numbered(1000))
    one.subscribe(queue, 'ack:' + mode, header + ':1')
    two.subscribe(queue, 'ack:' + mode, header + ':10')
    assert len(one.before_now()) == 1
    messages = two.before_now()
    assert len(messages) == 10
    for _ in range(3):
        two.ask('ACK', 'id:' + messages[-1].get('ack'))
        messages = two.before_now()
        assert len(messages) == (10 if mode == 'client' else 1)
    one.close()
    two.close()
    third = connect('1.2')
    third.subscribe(queue, header + ':0')
    assert len(third.bodies()) == (970 if mode == 'client' else 997)


@pytest.mark.parametrize('value', ['x', '-1', '1.5', '', '99999999999999999999'])
def test_bad_prefetch(connect, queue, value):
    client = connect('1.2')
    client.say('SUBSCRIBE', 'id:0', 'destination:' + queue, 'prefetch-count:' + value)
    assert 'prefetch' in client.take_error().get('message')


# --- what isn't built, and expires ---

@pytest.mark.parametrize('line, words', [
    ("selector:a = 'b'", 'selectors'), ('durable:true', 'durable subscriptions'),
    ('activemq.subscriptionName:x', 'durable subscriptions'),
    ('durable-subscription-name:x', 'durable subscriptions'),
    ('activemq.subcriptionName:x', 'durable subscriptions'), ('browser:true', 'queue browsers'),
    ('activemq.exclusive:true', 'exclusive consumers'), ('no-local:true', "subscriptions without one's own"),
    ('activemq.retroactive:true', 'retroactive subscriptions')])
@pytest.mark.parametrize('kind', ['/queue/', '/topic/'])
def test_what_is_not_built_is_refused(connect, line, words, kind):
    client = connect('1.2')
    client.say('SUBSCRIBE', 'id:0', 'destination:%sa' % kind, line, 'receipt:r')
    error = client.take_error()
    assert 'has no ' + words in error.get('message') and error.get('receipt-id') == 'r'


@pytest.mark.parametrize('within', [[], ['transaction:t']])
@pytest.mark.parametrize('line, words', [
    ('AMQ_SCHEDULED_DELAY:1000', 'scheduled messages'), ('JMSXGroupID:a', 'message groups'),
    ('reply-to:/temp-queue/a', 'temporary queues')])
def test_a_send_that_asks_for_what_is_not_built(connect, queue, line, words, within):
    """It would be delivered at once, or out of its group, or its answer to nobody."""
    client = connect('1.2')
    client.ask('BEGIN', 'transaction:t')
    client.say('SEND', 'destination:' + queue, line, *within)
    assert 'has no ' + words in client.take_error().get('message')


def test_rabbitmq_s_other_name_of_a_queue(connect):
    """It keeps what nobody takes yet; what looks like an exchange is a topic."""
    client = connect('1.2')
    for name, kept in ('/amq/queue/a', [b'a']), ('/exchange/amq.topic/a', []):
        client.publish(name, b'a')
        client.subscribe(name, id=name)
        assert client.bodies() == kept
        client.publish(name, b'b')
        assert client.take().body == b'b'


@pytest.mark.parametrize('name', ['/temp-queue/a', '/temp-topic/a', '/reply-queue/a', '/dsub/a'])
@pytest.mark.parametrize('command', ['SEND', 'SUBSCRIBE'])
def test_names_that_mean_something_elsewhere(broker, connect, name, command):
    """Taken for topics, they would lose what is sent there."""
    client = connect('1.2')
    client.say(command, 'destination:' + name, 'id:0')
    assert 'has no' in client.take_error().get('message')
    assert broker.counters()['destinations'] == 0


@pytest.mark.parametrize('line', ['selector:', 'durable:false', 'durable:False', 'auto-delete:true',
                                  'persistent:true'])
def test_what_asks_for_nothing_is_taken(connect, queue, line):
    client = connect('1.2')
    client.subscribe(queue, line)
    client.ask('SEND', 'destination:' + queue, line, body=b'a')
    assert client.bodies() == [b'a']


def milliseconds(later):
    return 'expires:%d' % ((time.time() + later) * 1000)


def test_expired_messages_are_not_delivered(broker, connect, queue):
    client, pause = connect('1.2'), threading.Event()
    expired = broker.counters()['expired']
    lines = milliseconds(-1), milliseconds(60), milliseconds(0.3), 'expires:0', 'a:b'
    for number, line in enumerate(lines):
        client.ask('SEND', 'destination:' + queue, line, body=b'%d' % number)
    assert broker.counters()['expired'] == expired + 1
    pause.wait(0.5)
    client.subscribe(queue, 'ack:client')
    messages = client.before_now()
    assert [one.body for one in messages] == [b'1', b'3', b'4']
    assert messages[0].get('expires') and broker.counters()['expired'] == expired + 2
    client.ask('ACK', 'id:' + messages[-1].get('ack'))
    assert broker.counters()['queued_bytes'] == 0


def test_expiration_counts_from_each_sending(connect, queue):
    """RabbitMQ's name; each message with the same head has a time of its own."""
    client = connect('1.2')
    for number in range(2):
        client.ask('SEND', 'destination:' + queue, 'expiration:600', body=b'%d' % number)
        end = time.time() + 0.4
        wait_until(lambda: time.time() > end)  # noqa: B023
    client.subscribe(queue, 'ack:client-individual', id='a')
    message, = client.before_now()
    assert message.body == b'1' and message.get('expiration') == '600'
    client.ask('NACK', 'id:' + message.get('ack'), 'requeue:false')
    client.subscribe('/queue/DLQ', id='dead')
    assert client.take().get('expiration') is None


def test_expired_messages_of_a_topic(connect):
    client = connect('1.2')
    client.subscribe('/topic/a')
    for line in milliseconds(-1), milliseconds(60):
        client.ask('SEND', 'destination:/topic/a', line, body=line.encode())
    assert len(client.bodies()) == 1


def test_an_expired_message_does_not_come_again(connect, queue):
    client, pause = connect('1.2'), threading.Event()
    client.subscribe(queue, 'ack:client')
    client.ask('SEND', 'destination:' + queue, milliseconds(0.3), body=b'a')
    client.take()
    client.close()
    pause.wait(0.4)
    other = connect('1.2')
    other.subscribe(queue)
    assert other.bodies() == []


@pytest.mark.parametrize('value', ['x', '-1', '1e3', '', '9' * 30])
@pytest.mark.parametrize('within', [[], ['transaction:t']])
@pytest.mark.parametrize('name', ['expires', 'expiration'])
def test_bad_expires(connect, queue, name, value, within):
    client = connect('1.2')
    client.ask('BEGIN', 'transaction:t')
    client.say('SEND', 'destination:' + queue, name + ':' + value, *within)
    assert name in client.take_error().get('message')


# --- limits ---

def fill(broker, destination, size, *lines):
    """Sends until there is an ERROR; gives its text, and how many were taken."""
    with Client(broker.address) as client:
        client.connect('1.2')
        for taken in itertools.count():
            client.say('SEND', 'destination:' + destination, 'receipt:r', *lines, body=b'x' * size)
            answer = client.take()
            if answer.command == 'ERROR':
                return answer.get('message'), taken


def test_a_full_queue_is_its_own_trouble():
    with running(Broker(port=0, queued=100000, queued_in_all=350000)) as broker:
        for name in 'abc':
            text, taken = fill(broker, '/queue/' + name, 5000)
            assert '/queue/%s is full' % name in text and 10 < taken < 20
            with Client(broker.address) as client:
                client.connect('1.2')
                client.subscribe('/queue/other')
                client.publish('/queue/other', b'goes on')
                assert client.bodies() == [b'goes on']
        text, taken = fill(broker, '/queue/d', 5000)
        assert 'all together' in text and taken < 15
        with Client(broker.address) as client:
            client.connect('1.2')
            client.subscribe('/queue/a')
            client.before_now()
            client.publish('/queue/d', b'has room again')


def test_expired_messages_make_room():
    with running(Broker(port=0, queued=100000)) as broker:
        _, taken = fill(broker, '/queue/a', 5000, milliseconds(1))
        pause = threading.Event()
        pause.wait(1.1)
        assert fill(broker, '/queue/a', 5000)[1] == taken


def test_what_is_expired_in_one_queue_makes_room_for_all():
    """Nobody reads the first queue; for a COMMIT the same holds."""
    with running(Broker(port=0, queued_in_all=100000)) as broker, Client(broker.address) as client:
        client.connect('1.2')

        def fill_with_what_expires():
            end = time.time() + 1
            assert 'all together' in fill(broker, '/queue/a', 5000, 'expires:%d' % (end * 1000))[0]
            wait_until(lambda: time.time() > end)
        fill_with_what_expires()
        client.publish('/queue/b', *[b'x' * 5000] * 12)
        client.subscribe('/queue/b')
        client.take_all(12)
        fill_with_what_expires()
        client.ask('BEGIN', 'transaction:t')
        client.say('SEND', 'destination:/queue/b', 'transaction:t', body=b'y' * 5000)
        client.ask('COMMIT', 'transaction:t')
        assert client.take().body == b'y' * 5000


def test_queues_that_hold_nothing_are_forgotten(broker, connect, queue):
    """Whether the message was expired as it came, or its consumer unsubscribed before it was written."""
    client = connect('1.2')
    client.send(b''.join(frame('SEND', 'destination:%s-%d' % (queue, number), 'expires:1')
                         for number in range(100)))
    for number in range(100):
        client.send(frame('SUBSCRIBE', 'id:a', 'destination:%s.%d' % (queue, number))
                    + frame('SEND', 'destination:%s.%d' % (queue, number)) + frame('UNSUBSCRIBE', 'id:a'))
    assert len(client.before_now()) == 100
    wait_until(lambda: broker.counters()['destinations'] == 0)


# --- many consumers ---

def seconds_of_the_end(broker, queue, others):
    """That a client with 1,000 subscriptions takes to end, where there are so many others."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(broker.address)) for _ in range(others // 1000 + 2)]
        for client in clients:
            client.connect('1.2')
        for client in clients[1:]:
            client.send(b''.join(frame('SUBSCRIBE', 'id:%d' % number, 'destination:' + queue)
                                 for number in range(1000)))
            client.before_now()
        begin = time.monotonic()
        clients[-1].ask('DISCONNECT')
        clients[0].before_now()
        return time.monotonic() - begin


@pytest.mark.once
@pytest.mark.parametrize('kind', ['queue', 'topic'])
def test_the_end_of_a_subscription_costs_the_same_among_many(kind):
    with running(Broker(port=0)) as broker:
        few = min(seconds_of_the_end(broker, '/%s/a' % kind, 0) for _ in range(3))
        assert min(seconds_of_the_end(broker, '/%s/a' % kind, 10000) for _ in range(3)) < 3 * few + 0.1


def test_consumers_without_room_cost_the_others_nothing(connect, queue):
    """2,000 consumers have what they may have; nobody asks them with each message."""
    sender = connect('1.2')

    def seconds():
        begin = time.monotonic()
        sender.send(frame('SEND', 'destination:' + queue) * 1000)
        sender.before_now()
        return time.monotonic() - begin
    before = min(seconds() for _ in range(3))
    all_busy = [connect('1.2') for _ in range(2)]
    for busy in all_busy:
        busy.send(b''.join(frame('SUBSCRIBE', 'id:%d' % number, 'destination:' + queue, 'ack:client',
                                 'prefetch-count:1') for number in range(1000)))
        assert len(busy.before_now()) == 1000
    assert min(seconds() for _ in range(3)) < 3 * before + 0.1
    last = connect('1.2')
    last.subscribe(queue, id='last')
    assert len(last.take_all(4000)) == 4000
    for busy in all_busy:
        busy.ask('DISCONNECT')
    assert len(last.take_all(2000)) == 2000


def test_who_refused_and_goes_among_many(connect, queue):
    """What three of four refused waits for the fourth; as each of them goes, nothing is lost or doubled."""
    busy, *others = [connect('1.2') for _ in range(4)]
    busy.subscribe(queue, 'ack:client-individual', 'prefetch-count:1')
    busy.publish(queue, b'first')
    first = busy.take()
    for other in others:
        other.subscribe(queue, 'ack:client-individual')
    bodies = numbered(60)
    busy.publish(queue, *bodies)
    left = 180
    while left:
        for other in others:
            messages = [message for message in other.before_now() if message.command == 'MESSAGE']
            left -= len(messages)
            other.send(b''.join(frame('NACK', 'id:' + message.get('ack')) for message in messages))
    for other in others:
        other.ask('DISCONNECT')
    assert busy.bodies() == []
    busy.ask('ACK', 'id:' + first.get('ack'))
    for body in bodies:
        message = busy.take()
        assert message.body == body and message.get('redelivered') == 'true'
        busy.ask('ACK', 'id:' + message.get('ack'))


def test_a_body_that_the_broker_took_cuts_nobody_off():
    """Bodies of 16 MiB for subscribers that read 20 MB/s, where 8 MiB may wait."""
    with running(Broker(port=0, max_frame=16 * MIB)) as broker, contextlib.ExitStack() as stack:
        sender, *readers = [stack.enter_context(Client(broker.address)) for _ in range(3)]
        bodies = [os.urandom(16 * MIB) for _ in range(2)]
        counts = [0, 0]
        for client in [sender] + readers:
            client.connect('1.2')
        for reader in readers:
            reader.subscribe('/topic/a')

        def read(which):
            begin = time.monotonic()
            while counts[which] < 2 * 16 * MIB:
                counts[which] += len(readers[which].socket.recv(MIB))
                ahead = counts[which] / 20e6 - (time.monotonic() - begin)
                if ahead > 0:
                    time.sleep(ahead)            # the speed of the reader is what is tested
        threads = [threading.Thread(target=read, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for body in bodies:
            sender.say('SEND', 'destination:/topic/a', 'content-length:%d' % len(body), body=body)
        for thread in threads:
            thread.join(30)
        assert broker.counters()['cut_off'] == 0 and min(counts) >= 2 * 16 * MIB


# What the interpreter takes at the first use of this and that; Wine's own libraries lie in that memory, too.
SPARE = MIB if os.name == 'posix' else 4 * MIB


@pytest.mark.once
@pytest.mark.skipif(not MEMORY_IS_KNOWN, reason='nobody tells how much memory a process has')
def test_unfinished_bodies_take_no_more_than_they_may():
    """60 clients with 10 MB each, of bodies that never end, where 64 MiB may be held; those who had to go
    don't read their ERROR, nor close."""
    with Program('--held', str(64 * MIB)) as program, contextlib.ExitStack() as stack:
        monitor = stack.enter_context(Client(program.address))
        monitor.connect('1.2')
        before = most_memory(program.process)
        for _ in range(60):
            client = stack.enter_context(Client(program.address, receive_buffer=4096))
            client.connect('1.2')
            with contextlib.suppress(OSError):
                client.send(b'SEND\ndestination:/topic/a\ncontent-length:10000001\n\n' + b'x' * 10000000)
        monitor.before_now()
        assert most_memory(program.process) - before < 1.1 * 64 * MIB + 22 * MIB  # and two being read


@pytest.mark.once
@pytest.mark.skipif(not MEMORY_IS_KNOWN, reason='nobody tells how much memory a process has')
def test_queues_take_no_more_memory_than_they_may():
    """Small messages and large ones, and what comes back from a consumer that dies."""
    with Program('--queued', str(40 * MIB), '--queued-in-all', str(64 * MIB)) as program:
        before = most_memory(program.process)
        for name, size in ('a', 10), ('b', 1000), ('c', 100000):
            with Client(program.address) as client:
                client.connect('1.2')
                with contextlib.suppress(OSError):
                    for _ in range(200):
                        client.send(frame('SEND', 'destination:/queue/' + name, body=b'x' * size)
                                    * (40 * MIB // 100 // (size + 600)))
                client.take_end_or_error()
        with Client(program.address, receive_buffer=4096) as client:
            client.connect('1.2')
            client.say('SUBSCRIBE', 'id:0', 'destination:/queue/a', 'ack:client')
            client.take_all(100)
        with Client(program.address) as client:
            client.connect('1.2')
            client.before_now()
        assert most_memory(program.process) - before < 1.1 * 64 * MIB


@pytest.mark.once
@pytest.mark.skipif(not MEMORY_IS_KNOWN, reason='nobody tells how much memory a process has')
@pytest.mark.parametrize('what', ['names', 'headers', 'letters'])
def test_what_stands_round_a_message_counts_as_well(what):
    """Queues of one message each, messages of 900 short headers, and headers of which one letter makes
    the others take four bytes."""
    with Program('--queued-in-all', str(16 * MIB)) as program, Client(program.address) as client:
        client.connect('1.2')
        client.before_now()
        before = most_memory(program.process)
        with contextlib.suppress(OSError):
            for number in range(100000):
                destination, lines = '/queue/a', []
                if what == 'names':
                    destination += str(number)
                elif what == 'headers':
                    lines = ['%x:%x' % (each, number) for each in range(900)]
                else:
                    lines = ['a:%d' % number + '\U0001f600' + 'x' * 9000]
                client.send(frame('SEND', 'destination:' + destination, *lines))
        client.take_end_or_error()
        with Client(program.address) as other:
            other.connect('1.2')
            other.before_now()
        assert most_memory(program.process) - before < 1.1 * 16 * MIB + SPARE


@pytest.mark.once
@pytest.mark.skipif(not MEMORY_IS_KNOWN, reason='nobody tells how much memory a process has')
@pytest.mark.parametrize('kind', ['topic', 'queue'])
def test_subscriptions_take_no_more_memory_than_they_may(kind):
    """Each to a destination of its own."""
    with Program('--held', str(16 * MIB)) as program, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(program.address)) for _ in range(30)]
        for client in clients:
            client.connect('1.2')
        clients[0].before_now()
        before = most_memory(program.process)
        for which, client in enumerate(clients[1:]):
            place = 'destination:/%s/%d.' % (kind, which)
            with contextlib.suppress(OSError):
                client.send(b''.join(frame('SUBSCRIBE', 'id:%d' % number, place + str(number))
                                     for number in range(999)))
            clients[0].before_now()
        assert most_memory(program.process) - before < 1.1 * 16 * MIB + SPARE
