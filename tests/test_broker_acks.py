"""ACK, NACK, redelivery and transactions. Docstrings name the rules."""

import itertools
import time

import pytest
from stomp_client import Client, frame, running

from stompbroker import Broker

NUMBERS = itertools.count()
VERSIONS = ['1.0', '1.1', '1.2']


@pytest.fixture
def topic():
    """A topic that no other test uses."""
    return '/topic/acks-%d' % next(NUMBERS)


@pytest.fixture
def queue():
    """A queue that no other test uses."""
    return '/queue/acks-%d' % next(NUMBERS)


def key_of(message, version):
    """The header lines that ACK or NACK names a message by."""
    if version == '1.2':
        return ['id:' + message.get('ack')]
    if version == '1.1':
        return ['message-id:' + message.get('message-id'), 'subscription:' + message.get('subscription')]
    return ['message-id:' + message.get('message-id')]


def consumer_of(connect, queue, mode, *bodies, version='1.2'):
    """A client that got these messages and has acknowledged none."""
    client = connect(version)
    client.subscribe(queue, 'ack:' + mode)
    client.publish(queue, *bodies)
    messages = client.take_all(len(bodies))
    assert [message.body for message in messages] == list(bodies)
    return client, messages


def rest_of(connect, queue):
    """What the next consumer gets."""
    client = connect('1.2')
    client.subscribe(queue)
    return client.bodies()


# --- what MESSAGE says ---

@pytest.mark.parametrize('mode', ['client', 'client-individual'])
@pytest.mark.parametrize('kind', ['/queue/', '/topic/'])
def test_messages_to_be_acknowledged_have_an_ack_header(connect, kind, mode):
    """MESSAGE: ack:client: MESSAGE has an 'ack' header (1.2)
    MESSAGE: ack:client-individual: MESSAGE has an 'ack' header (1.2)
    MESSAGE: ack:client on a topic: MESSAGE has an 'ack' header, ACK is taken"""
    client, messages = consumer_of(connect, '%sacks-%d' % (kind, next(NUMBERS)), mode, b'a', b'b')
    assert len({message.get('ack') for message in messages} - {None, ''}) == 2
    assert not any(set(': \\') & set(message.get('ack')) for message in messages)
    client.ask('ACK', 'id:' + messages[0].get('ack'))
    client.ask('ACK', 'id:' + messages[1].get('ack'))
    client.ask('DISCONNECT')


@pytest.mark.parametrize('version, mode', [('1.2', 'auto'), ('1.1', 'client'), ('1.0', 'client')])
def test_other_messages_have_none(connect, queue, version, mode):
    client, messages = consumer_of(connect, queue, mode, b'a', version=version)
    assert messages[0].get('ack') is None
    client.ask('ACK', *key_of(messages[0], version)) if mode == 'client' else None


# --- redelivery ---

@pytest.mark.parametrize('version, mode', [
    ('1.2', 'client'), ('1.2', 'client-individual'), ('1.1', 'client'), ('1.1', 'client-individual'),
    ('1.0', 'client')])
@pytest.mark.parametrize('vanish', ['close', 'reset', 'disconnect', 'error'])
def test_what_is_not_acknowledged_comes_again(connect, queue, version, mode, vanish):
    """SUBSCRIBE ack Header: client: an un-ACKed queue message is delivered again when the connection fails
    SUBSCRIBE ack Header: client-individual: an un-ACKed queue message is delivered again
    SUBSCRIBE: 1.0 ack:client: an un-ACKed queue message is delivered again"""
    client, first = consumer_of(connect, queue, mode, b'a', b'b', b'c', version=version)
    other = connect('1.2')
    other.subscribe(queue)
    assert other.bodies() == []
    if vanish in ('close', 'reset'):
        getattr(client, vanish)()
    else:
        client.send(frame({'error': 'NOSUCH'}.get(vanish, vanish.upper()), 'id:0'))
    again = other.take_all(3)
    assert [message.body for message in again] == [b'a', b'b', b'c']
    assert {message.get('redelivered') for message in first} == {None}
    assert {message.get('redelivered') for message in again} == {'true'}


@pytest.mark.parametrize('version, mode', [
    ('1.2', 'client'), ('1.2', 'client-individual'), ('1.1', 'client'), ('1.1', 'client-individual'),
    ('1.0', 'client')])
def test_what_is_acknowledged_does_not_come_again(connect, queue, version, mode):
    """ACK: 1.2: ACKed messages are not delivered again (client)
    ACK: 1.2: ACKed messages are not delivered again (client-individual)
    ACK: 1.1: ACK by message-id + subscription
    ACK: 1.0: ACK by message-id alone"""
    client, messages = consumer_of(connect, queue, mode, b'a', b'b', b'c', version=version)
    for message in messages[:2]:
        client.ask('ACK', *key_of(message, version))
    client.close()
    other = connect('1.2')
    other.subscribe(queue)
    assert other.take().body == b'c'
    assert other.bodies() == []


def test_1_0_acknowledges_with_a_subscription_header_too(connect, queue):
    """Some clients of 1.0 send it; the destination's subscription had no id."""
    client = connect('1.0')
    client.ask('SUBSCRIBE', 'destination:' + queue, 'ack:client')
    client.publish(queue, b'a')
    message = client.take()
    client.ask('ACK', 'message-id:' + message.get('message-id'), 'subscription:0')
    client.close()
    assert rest_of(connect, queue) == []


def test_client_mode_is_cumulative(connect, queue):
    """SUBSCRIBE ack Header: client: ACK is cumulative"""
    client, messages = consumer_of(connect, queue, 'client', b'a', b'b', b'c', b'd')
    client.ask('ACK', *key_of(messages[2], '1.2'))
    client.say('ACK', *key_of(messages[0], '1.2'))       # already
    client.take_error()
    assert rest_of(connect, queue) == [b'd']


def test_client_individual_is_not_cumulative(connect, queue):
    """SUBSCRIBE ack Header: client-individual: ACK of the 3rd message leaves the 1st and 2nd un-ACKed"""
    client, messages = consumer_of(connect, queue, 'client-individual', b'a', b'b', b'c')
    client.ask('ACK', *key_of(messages[2], '1.2'))
    client.ask('DISCONNECT')
    assert rest_of(connect, queue) == [b'a', b'b']


def test_no_lock_step(connect, queue):
    """SUBSCRIBE ack Header: client: several messages may be un-ACKed at a time (no lock step)"""
    client, messages = consumer_of(connect, queue, 'client', *[b'%d' % number for number in range(500)])
    client.ask('ACK', *key_of(messages[-1], '1.2'))


def test_ack_counts_per_subscription(connect, queue):
    """SUBSCRIBE ack Header: client: ACK counts per subscription, not per connection"""
    client = connect('1.2')
    client.subscribe(queue + 'a', 'ack:client', id='a')
    client.subscribe(queue + 'b', 'ack:client', id='b')
    client.publish(queue + 'a', b'1')
    client.take()
    client.publish(queue + 'b', b'2')
    client.ask('ACK', *key_of(client.take(), '1.2'))
    client.ask('DISCONNECT')
    assert rest_of(connect, queue + 'a') == [b'1']
    assert rest_of(connect, queue + 'b') == []


def test_two_client_subscriptions_to_one_queue(connect, queue):
    client = connect('1.2')
    client.subscribe(queue, 'ack:client', id='a')
    client.subscribe(queue, 'ack:client', id='b')
    client.publish(queue, b'1', b'2', b'3', b'4')
    messages = client.take_all(4)
    of_a = [message for message in messages if message.get('subscription') == 'a']
    assert len(of_a) == 2
    client.ask('ACK', *key_of(of_a[-1], '1.2'))
    client.ask('DISCONNECT')
    assert rest_of(connect, queue) == sorted({b'1', b'2', b'3', b'4'} - {message.body for message in of_a})


@pytest.mark.parametrize('version, lines', [
    ('1.2', ['id:nothing']), ('1.2', ['id:1-nothing-1']), ('1.2', ['id:-']),
    ('1.1', ['message-id:x', 'subscription:0']), ('1.1', ['message-id:x', 'subscription:unknown']),
    ('1.0', ['message-id:x'])])
@pytest.mark.parametrize('command', ['ACK', 'NACK'])
@pytest.mark.parametrize('within', [[], ['transaction:t']])
def test_unknown_ids(connect, queue, version, lines, command, within):
    """ACK: ACK of an unknown id: ERROR and close, or ignored; nothing hangs"""
    client, _ = consumer_of(connect, queue, 'client', b'a', version=version)
    client.ask('BEGIN', 'transaction:t')
    client.say(command, 'receipt:r', *(lines + within))
    error = client.take_error()
    assert error.get('receipt-id') == 'r'
    assert error.get('message').endswith(repr(lines[0].split(':', 1)[1]))
    assert rest_of(connect, queue) == [b'a']


@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize('command', ['ACK', 'NACK'])
def test_what_is_settled_can_not_be_settled_again(connect, queue, version, command):
    mode = 'client' if version == '1.0' else 'client-individual'
    client, messages = consumer_of(connect, queue, mode, b'a', b'b', version=version)
    client.ask('ACK', *key_of(messages[0], version))
    client.say(command, *key_of(messages[0], version))
    client.take_error()
    assert rest_of(connect, queue) == [b'b']


def test_another_client_can_not_acknowledge(connect, queue):
    client, messages = consumer_of(connect, queue, 'client', b'a')
    other = connect('1.2')
    other.subscribe(queue + '-other', 'ack:client')
    other.say('ACK', 'id:' + messages[0].get('ack'))
    other.take_error()
    client.close()
    assert rest_of(connect, queue) == [b'a']


@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize('command', ['ACK', 'NACK'])
def test_what_a_subscription_was_sent_is_settled_after_its_end(broker, connect, queue, version, command):
    """Messages that were on their way at UNSUBSCRIBE are the client's until it is gone."""
    client, messages = consumer_of(connect, queue, 'client', b'a', b'b', b'c', version=version)
    client.ask('UNSUBSCRIBE', 'id:0')
    other = connect('1.2')
    other.subscribe(queue)
    assert other.bodies() == []
    client.subscribe(queue + '-new')                     # of the same id
    client.ask(command, *key_of(messages[1], version))
    assert other.bodies() == ([b'a', b'b'] if command == 'NACK' else [])
    held = broker.counters()['held_bytes']
    client.ask('ACK', *key_of(messages[2], version))
    assert broker.counters()['held_bytes'] < held        # the last one's ACK frees the subscription
    assert broker.counters()['queued_bytes'] == 0


def test_what_a_subscription_was_sent_comes_again_at_the_client_s_end(connect, queue):
    client, messages = consumer_of(connect, queue, 'client-individual', b'a', b'b', b'c')
    client.ask('UNSUBSCRIBE', 'id:0')
    client.ask('ACK', *key_of(messages[1], '1.2'))
    client.ask('DISCONNECT')
    assert rest_of(connect, queue) == [b'a', b'c']


@pytest.mark.parametrize('version', VERSIONS)
def test_acks_of_topics_are_taken_at_any_time(connect, topic, version):
    client, messages = consumer_of(connect, topic, 'client', b'a', b'b', version=version)
    client.ask('ACK', *key_of(messages[1], version))
    client.ask('ACK', *key_of(messages[0], version))
    client.ask('UNSUBSCRIBE', 'id:0')
    client.ask('ACK', *key_of(messages[1], version))


def test_messages_that_come_again_are_the_first(connect, queue):
    client, messages = consumer_of(connect, queue, 'client-individual', b'a', b'b', b'c')
    client.ask('ACK', *key_of(messages[1], '1.2'))
    client.publish(queue, b'd')
    client.ask('DISCONNECT')
    assert rest_of(connect, queue) == [b'a', b'c', b'd']


def test_messages_that_come_again_come_before_those_that_waited():
    with running(Broker(port=0, unacknowledged=2)) as broker, Client(broker.address) as client:
        client.connect('1.2')
        client.subscribe('/queue/a', 'ack:client')
        client.publish('/queue/a', b'1', b'2', b'3', b'4')
        assert client.bodies() == [b'1', b'2']
        client.ask('DISCONNECT')
        with Client(broker.address) as other:
            other.connect('1.2')
            other.subscribe('/queue/a')
            assert other.bodies() == [b'1', b'2', b'3', b'4']


def test_unacknowledged_messages_are_limited():
    with running(Broker(port=0, unacknowledged=3)) as broker, Client(broker.address) as client:
        client.connect('1.2')
        client.subscribe('/queue/a', 'ack:client-individual')
        client.publish('/queue/a', *[b'%d' % number for number in range(5)])
        messages = client.before_now()
        assert [message.body for message in messages] == [b'0', b'1', b'2']
        client.ask('ACK', *key_of(messages[1], '1.2'))
        assert client.bodies() == [b'3']


# --- NACK ---

@pytest.mark.parametrize('version', ['1.1', '1.2'])
def test_a_refused_message_goes_to_another_consumer(connect, queue, version):
    """NACK: 1.2: NACK is taken (RECEIPT)
    NACK: 1.1: NACK by message-id + subscription is taken (RECEIPT)
    NACK: NACK of one message (client-individual) does not touch the others"""
    client, messages = consumer_of(connect, queue, 'client-individual', b'a', b'b', b'c', version=version)
    other = connect('1.2')
    other.subscribe(queue, 'ack:client')
    client.ask('NACK', *key_of(messages[1], version))
    assert client.bodies() == []                 # not to the one that refused it
    message, = other.before_now()
    assert (message.body, message.get('redelivered')) == (b'b', 'true')
    other.ask('ACK', *key_of(message, '1.2'))
    client.ask('ACK', *key_of(messages[2], version))
    client.close()
    assert other.take().body == b'a'
    assert other.bodies() == []
    other.close()
    assert rest_of(connect, queue) == [b'a']


def test_nack_in_client_mode_is_cumulative(connect, queue):
    client, messages = consumer_of(connect, queue, 'client', b'a', b'b', b'c')
    other = connect('1.2')
    other.subscribe(queue)
    client.ask('NACK', *key_of(messages[1], '1.2'))
    assert other.bodies() == [b'a', b'b']
    client.ask('ACK', *key_of(messages[2], '1.2'))


def test_the_only_consumer_is_asked_again(connect, queue):
    client, messages = consumer_of(connect, queue, 'client-individual', b'a')
    client.ask('NACK', *key_of(messages[0], '1.2'))
    again, = client.before_now()
    assert (again.body, again.get('redelivered')) == (b'a', 'true')
    client.ask('ACK', *key_of(again, '1.2'))


def test_who_refused_is_asked_again_when_all_have(connect, queue):
    """And when the one that it waits for goes."""
    one, two, third = connect('1.2'), connect('1.2'), connect('1.2')
    for client in one, two:
        client.subscribe(queue, 'ack:client-individual', 'prefetch-count:1')
    third.publish(queue, b'a')
    message, = one.before_now()
    one.ask('NACK', *key_of(message, '1.2'))
    assert one.bodies() == []
    message, = two.before_now()
    two.ask('NACK', *key_of(message, '1.2'))
    message, = one.before_now()                  # whose turn it is
    assert two.bodies() == []
    two.publish(queue, b'b')                     # two is busy with this one
    assert two.take().body == b'b'
    one.ask('NACK', *key_of(message, '1.2'))
    assert one.bodies() == []                    # it waits for two
    one.publish(queue, b'c')                     # which doesn't hold up what comes later
    other, = one.before_now()
    assert other.body == b'c'
    one.ask('ACK', *key_of(other, '1.2'))
    two.close()
    for body in b'a', b'b':
        message = one.take()
        assert message.body == body
        one.ask('ACK', *key_of(message, '1.2'))


@pytest.mark.once
def test_many_refused_messages_cost_the_others_nothing(connect, queue):
    """3,000 wait for one that is busy; each ACK of another's is as quick as ever."""
    busy, client = connect('1.2'), connect('1.2')
    busy.subscribe(queue, 'ack:client-individual', 'prefetch-count:1')
    client.publish(queue, b'keeps it busy')
    client.subscribe(queue, 'ack:client-individual')

    def seconds(number):
        client.publish(queue, *[b'%d' % each for each in range(number)])
        acks = [frame('ACK', *key_of(message, '1.2')) for message in client.take_all(number)]
        begin = time.monotonic()
        for ack in acks:
            client.send(ack)
        client.before_now()
        return time.monotonic() - begin

    before = min(seconds(1000) for _ in range(3))
    client.publish(queue, *[b'refused'] * 3000)
    client.send(b''.join(frame('NACK', *key_of(message, '1.2')) for message in client.take_all(3000)))
    assert client.bodies() == []
    assert min(seconds(1000) for _ in range(3)) < 3 * before + 0.1
    for one in busy, client:
        one.ask('DISCONNECT')
    assert rest_of(connect, queue) == [b'keeps it busy'] + [b'refused'] * 3000


def test_a_refused_message_waits_for_room(connect, queue):
    """The other consumer has room again only once it acknowledges."""
    with running(Broker(port=0, unacknowledged=1)) as broker, Client(broker.address) as client:
        client.connect('1.2')
        with Client(broker.address) as busy:
            busy.connect('1.2')
            busy.subscribe(queue, 'ack:client')
            busy.publish(queue, b'first')
            first = busy.take()
            client.subscribe(queue, 'ack:client')
            busy.publish(queue, b'second')
            client.ask('NACK', *key_of(client.take(), '1.2'))
            assert busy.bodies() == []
            busy.ask('ACK', *key_of(first, '1.2'))
            assert busy.bodies() == [b'second']


DEAD = '/queue/DLQ'


@pytest.mark.parametrize('number', [1, 6])
def test_what_is_refused_too_often_goes_to_the_dead_letters(broker, connect, queue, number):
    consumers = [connect('1.2') for _ in range(number)]
    for consumer in consumers:
        consumer.subscribe(queue, 'ack:client-individual')
    consumers[0].ask('SEND', 'destination:' + queue, 'mine:a', 'expires:99999999999999', body=b'poison')
    refusals = 0
    while True:
        found = [(consumer, message) for consumer in consumers for message in consumer.before_now()]
        if not found:
            break
        for consumer, message in found:
            consumer.ask('NACK', *key_of(message, '1.2'))
            refusals += 1
    assert refusals == 5
    reader = connect('1.2')
    reader.subscribe(DEAD, 'ack:client-individual')
    message = reader.take()
    assert message.body == b'poison' and message.get('destination') == DEAD
    assert message.get('original-destination') == queue and message.get('mine') == 'a'
    assert message.get('reason') == 'refused 5 times' and message.get('expires') is None
    for _ in range(7):                           # there it stays, whoever refuses it
        reader.ask('NACK', *key_of(message, '1.2'))
        message = reader.take()
    reader.ask('ACK', *key_of(message, '1.2'))
    assert broker.counters()['queued_bytes'] == 0


@pytest.mark.parametrize('no', ['false', 'False'])
def test_who_refuses_may_say_that_nobody_is_to_be_asked_again(connect, queue, no):
    """RabbitMQ's ``requeue:false``."""
    one, two = connect('1.2'), connect('1.2')
    one.subscribe(queue, 'ack:client-individual')
    two.publish(queue, b'poison')
    two.subscribe(queue, 'ack:client-individual')
    one.ask('NACK', 'requeue:' + no, *key_of(one.take(), '1.2'))
    assert two.bodies() == []
    one.subscribe(DEAD, id='dead')
    message = one.take()
    assert message.body == b'poison' and message.get('reason') == 'refused 1 time'


def test_nothing_is_lost_where_the_dead_letters_are_full(caplog):
    """And who refuses again and again fills no log with it, nor writes lines of its own there."""
    name = '/queue/a\\n\x1b[31m'
    with running(Broker(port=0, queued=4500, refusals=2)) as broker, Client(broker.address) as client:
        client.connect('1.2')
        client.publish(DEAD, b'x' * 3000)
        client.subscribe(name, 'ack:client-individual')
        client.publish(name, b'y' * 3000)
        for _ in range(5):
            client.ask('NACK', *key_of(client.take(), '1.2'))
        line, = [one for one in caplog.messages if 'keeps what was refused' in one]
        assert line.isprintable()
        client.ask('ACK', *key_of(client.take(), '1.2'))
        client.subscribe(DEAD, id='1')
        assert client.bodies() == [b'x' * 3000] and broker.counters()['queued_bytes'] == 0


def test_nothing_is_lost_by_1500_refusals():
    with running(Broker(port=0)) as broker, Client(broker.address) as client:
        client.connect('1.2')
        client.subscribe('/queue/a', 'ack:client-individual')
        bodies = [b'%d' % number for number in range(1500)]
        client.publish('/queue/a', *bodies)
        for _ in range(4):
            client.send(b''.join(frame('NACK', *key_of(one, '1.2')) for one in client.take_all(1500)))
        client.send(b''.join(frame('NACK', *key_of(one, '1.2')) for one in client.take_all(1500)))
        assert client.bodies() == []
        client.subscribe(DEAD, id='dead')
        assert client.bodies() == bodies
        assert broker.counters()['queued_bytes'] == 0


def test_nack_on_a_topic_changes_nothing(connect, topic):
    client, messages = consumer_of(connect, topic, 'client', b'a')
    client.ask('NACK', *key_of(messages[0], '1.2'))
    client.publish(topic, b'b')
    assert client.bodies() == [b'b']


# --- transactions ---

@pytest.mark.parametrize('version', VERSIONS)
def test_commit_and_abort(connect, topic, version):
    """BEGIN: SENDs of a transaction are delivered at COMMIT, not before, in order
    ABORT: ABORT throws the SENDs away
    BEGIN: 1.0: transaction with COMMIT and ABORT
    BEGIN: a SEND outside the transaction is delivered at once
    BEGIN: the id of a finished transaction can be used again
    """
    listener, client = connect(version), connect(version)
    listener.subscribe(topic)
    client.ask('BEGIN', 'transaction:t')
    for body in b'a', b'b', b'c':
        client.ask('SEND', 'destination:' + topic, 'transaction:t', body=body)
    client.publish(topic, b'outside')
    assert listener.bodies() == [b'outside']
    client.ask('COMMIT', 'transaction:t')
    messages = listener.before_now()
    assert [message.body for message in messages] == [b'a', b'b', b'c']
    assert not any(message.get('transaction') for message in messages)
    client.ask('BEGIN', 'transaction:t')
    client.ask('SEND', 'destination:' + topic, 'transaction:t', body=b'never')
    client.ask('ABORT', 'transaction:t')
    client.ask('BEGIN', 'transaction:t')
    client.ask('COMMIT', 'transaction:t')
    assert listener.bodies() == []


def test_two_transactions(connect, queue):
    """BEGIN: two transactions of a connection are independent
    BEGIN: the same transaction id in two connections: no clash"""
    one, two, listener = connect('1.2'), connect('1.2'), connect('1.2')
    listener.subscribe(queue)
    for client, name in (one, 't'), (one, 'u'), (two, 't'):
        client.ask('BEGIN', 'transaction:' + name)
    one.ask('SEND', 'destination:' + queue, 'transaction:t', body=b'one t')
    one.ask('SEND', 'destination:' + queue, 'transaction:u', body=b'one u')
    two.ask('SEND', 'destination:' + queue, 'transaction:t', body=b'two t')
    one.ask('COMMIT', 'transaction:u')
    assert listener.bodies() == [b'one u']
    two.ask('COMMIT', 'transaction:t')
    assert listener.bodies() == [b'two t']
    one.ask('ABORT', 'transaction:t')
    assert listener.bodies() == []


@pytest.mark.parametrize('command', ['BEGIN', 'SEND', 'COMMIT', 'ABORT'])
def test_wrong_transactions(connect, topic, command):
    """BEGIN: BEGIN of a transaction that is open: ERROR, then close"""
    listener, client = connect('1.2'), connect('1.2')
    listener.subscribe(topic)
    client.ask('BEGIN', 'transaction:t')
    client.say('SEND', 'destination:' + topic, 'transaction:t', body=b'never')
    name = 't' if command == 'BEGIN' else 'T'
    client.say(command, 'destination:' + topic, 'transaction:' + name, 'receipt:r')
    assert client.take_error().get('receipt-id') == 'r'
    assert listener.bodies() == []


@pytest.mark.parametrize('end', ['disconnect', 'close', 'reset', 'error'])
def test_the_end_aborts_transactions(connect, topic, end):
    """BEGIN: DISCONNECT aborts open transactions
    BEGIN: a lost connection aborts open transactions"""
    listener, client = connect('1.2'), connect('1.2')
    listener.subscribe(topic)
    client.ask('BEGIN', 'transaction:t')
    client.ask('SEND', 'destination:' + topic, 'transaction:t', body=b'never')
    if end in ('close', 'reset'):
        getattr(client, end)()
    else:
        client.say('DISCONNECT' if end == 'disconnect' else 'NOSUCH')
        client.take_end_or_error()
    assert listener.bodies() == []


@pytest.mark.parametrize('version', VERSIONS)
def test_acks_in_transactions(connect, queue, version):
    """ACK: ACK in an aborted transaction does not count
    ACK: ACK in a committed transaction counts"""
    client, messages = consumer_of(connect, queue, 'client', b'a', b'b', b'c', version=version)
    client.ask('BEGIN', 'transaction:t')
    client.ask('ACK', 'transaction:t', *key_of(messages[2], version))
    client.ask('ABORT', 'transaction:t')
    client.ask('BEGIN', 'transaction:t')
    client.ask('ACK', 'transaction:t', *key_of(messages[0], version))
    client.ask('COMMIT', 'transaction:t')
    client.ask('BEGIN', 'transaction:t')
    client.ask('ACK', 'transaction:t', *key_of(messages[1], version))
    client.ask('UNSUBSCRIBE', 'id:0')
    client.ask('COMMIT', 'transaction:t')
    client.close()
    assert rest_of(connect, queue) == [b'c']


def test_a_nack_in_a_transaction(connect, queue):
    client, messages = consumer_of(connect, queue, 'client-individual', b'a')
    client.ask('BEGIN', 'transaction:t')
    client.ask('NACK', 'transaction:t', *key_of(messages[0], '1.2'))
    other = connect('1.2')
    other.subscribe(queue)
    assert other.bodies() == []
    client.ask('COMMIT', 'transaction:t')
    assert other.bodies() == [b'a']


@pytest.mark.parametrize('version', VERSIONS)
def test_a_commit_does_all_or_nothing(connect, queue, topic, version):
    """One of its ACKs is of a message that was settled meanwhile."""
    mode = 'client' if version == '1.0' else 'client-individual'
    client, messages = consumer_of(connect, queue, mode, b'a', b'b', version=version)
    listener = connect('1.2')
    listener.subscribe(topic)
    client.ask('BEGIN', 'transaction:t')
    client.ask('SEND', 'destination:' + topic, 'transaction:t', body=b'never')
    client.ask('ACK', 'transaction:t', *key_of(messages[1], version))
    client.ask('ACK', 'transaction:t', *key_of(messages[0], version))
    client.ask('ACK', *key_of(messages[0], version))
    client.say('COMMIT', 'transaction:t', 'receipt:r')
    assert client.take_error().get('receipt-id') == 'r'
    assert listener.bodies() == [] and rest_of(connect, queue) == [b'b']


@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize('mode, said', [
    ('client-individual', [('NACK', 1), ('ACK', 1)]), ('client-individual', [('ACK', 1), ('ACK', 1)]),
    ('client', [('NACK', 1), ('ACK', 0)]), ('client', [('ACK', 2), ('NACK', 1)])])
def test_what_a_transaction_says_twice_is_an_error(connect, queue, topic, version, mode, said):
    """As without one: which of the two held was known to nobody."""
    if version == '1.0' and (mode != 'client' or said[0][0] == 'NACK'):
        mode, said = 'client', [('ACK', 1), ('ACK', 0)]
    elif version == '1.0':
        said = [('ACK', 2), ('ACK', 2)]
    client, messages = consumer_of(connect, queue, mode, b'a', b'b', b'c', version=version)
    listener = connect('1.2')
    listener.subscribe(topic)
    client.ask('BEGIN', 'transaction:t')
    client.ask('SEND', 'destination:' + topic, 'transaction:t', body=b'never')
    for command, number in said:
        client.ask(command, 'transaction:t', *key_of(messages[number], version))
    client.say('COMMIT', 'transaction:t', 'receipt:r')
    assert client.take_error().get('receipt-id') == 'r'
    assert listener.bodies() == [] and rest_of(connect, queue) == [b'a', b'b', b'c']


def test_several_cumulative_acks_in_a_transaction(connect, queue):
    client, messages = consumer_of(connect, queue, 'client', b'a', b'b', b'c', b'd')
    client.ask('BEGIN', 'transaction:t')
    for number in 0, 2:
        client.ask('ACK', 'transaction:t', *key_of(messages[number], '1.2'))
    client.ask('COMMIT', 'transaction:t')
    client.close()
    assert rest_of(connect, queue) == [b'd']


@pytest.mark.parametrize('limit', ['queued', 'queued_in_all'])
def test_a_commit_that_meets_a_limit_does_nothing(limit):
    with running(Broker(port=0, **{limit: 10000})) as broker, Client(broker.address) as client:
        client.connect('1.2')
        client.subscribe('/queue/acks', 'ack:client')
        client.publish('/queue/acks', b'taken')
        message = client.take()
        client.ask('BEGIN', 'transaction:t')
        client.ask('ACK', 'transaction:t', *key_of(message, '1.2'))
        for number in range(12):
            client.ask('SEND', 'destination:/queue/full', 'transaction:t', body=b'%d' % number * 500)
        client.say('COMMIT', 'transaction:t')
        assert 'may hold 10000 bytes' in client.take_error().get('message')
        with Client(broker.address) as other:
            other.connect('1.2')
            other.subscribe('/queue/full', id='1')
            other.subscribe('/queue/acks', id='2')
            assert other.bodies() == [b'taken']


def test_transactions_are_bounded_in_bytes():
    with running(Broker(port=0, held=100 * 1000)) as broker, Client(broker.address) as client:
        client.connect('1.2')
        client.ask('BEGIN', 'transaction:t')
        client.ask('SEND', 'destination:/topic/a', 'transaction:t', body=b'x' * 50000)
        with Client(broker.address) as modest:
            modest.connect('1.2')
            modest.ask('BEGIN', 'transaction:t')
            modest.ask('SEND', 'destination:/topic/a', 'transaction:t', body=b'x' * 40000)
            # Now it is too much; the one who makes the broker keep most has to go.
            modest.ask('SEND', 'destination:/topic/a', 'transaction:t', body=b'x' * 9000)
            client.take_error()
            modest.ask('COMMIT', 'transaction:t')
        with Client(broker.address) as greedy:
            greedy.connect('1.2')
            greedy.ask('BEGIN', 'transaction:t')
            for _ in range(200):
                greedy.say('SEND', 'destination:/topic/a', 'transaction:t', 'long:' + 'x' * 1000)
            greedy.take_error()
