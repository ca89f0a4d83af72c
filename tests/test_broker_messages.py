"""SEND, SUBSCRIBE, UNSUBSCRIBE, MESSAGE, RECEIPT, ERROR, DISCONNECT. Docstrings name the rules."""

import itertools

import pytest
from helpers import wait_until
from stomp_client import Client, frame, running

from stompbroker import Broker

NUMBERS = itertools.count()
VERSIONS = ['1.0', '1.1', '1.2']


@pytest.fixture
def topic():
    """A topic that no other test uses."""
    return '/topic/messages-%d' % next(NUMBERS)


@pytest.fixture
def queue():
    """A queue that no other test uses."""
    return '/queue/messages-%d' % next(NUMBERS)


def numbered(count):
    return [b'%d' % number for number in range(count)]


# --- receipts ---

@pytest.mark.parametrize('version', VERSIONS)
def test_every_frame_has_a_receipt_if_it_asks(connect, topic, version):
    """RECEIPT: SEND, SUBSCRIBE, UNSUBSCRIBE with receipt are answered by RECEIPT
    RECEIPT: BEGIN, COMMIT, ABORT with receipt are answered by RECEIPT
    RECEIPT: a SEND inside a transaction with receipt is answered by RECEIPT (at COMMIT at the latest)
    RECEIPT: no RECEIPT comes unasked
    RECEIPT: RECEIPT has no body
    DISCONNECT: DISCONNECT with receipt is answered by RECEIPT
    """
    client = connect(version)
    lines = {'SEND': ('destination:' + topic,), 'SUBSCRIBE': ('id:0', 'destination:' + topic),
             'UNSUBSCRIBE': ('id:0', 'destination:' + topic), 'BEGIN': ('transaction:t',),
             'COMMIT': ('transaction:t',), 'ABORT': ('transaction:t',)}
    for command in 'SEND', 'SUBSCRIBE', 'UNSUBSCRIBE', 'BEGIN', 'COMMIT', 'BEGIN', 'ABORT':
        client.ask(command, *lines[command], receipt='of ' + command)      # ask checks all of the frame
    client.ask('BEGIN', 'transaction:t')
    client.ask('SEND', 'destination:' + topic, 'transaction:t', receipt='in a transaction')
    client.ask('COMMIT', 'transaction:t')
    for command in 'SEND', 'SUBSCRIBE', 'UNSUBSCRIBE', 'BEGIN', 'COMMIT', 'BEGIN', 'ABORT':
        client.say(command, *lines[command])
    assert client.before_now() == []
    client.ask('DISCONNECT', receipt='bye')
    client.take_end()


@pytest.mark.parametrize('version, key', [('1.2', 'ack'), ('1.1', 'message-id'), ('1.0', 'message-id')])
def test_ack_and_nack_have_receipts(connect, queue, version, key):
    """RECEIPT: ACK with receipt is answered by RECEIPT (1.2)"""
    client = connect(version)
    client.subscribe(queue, 'ack:client-individual')
    client.publish(queue, b'a', b'b')
    messages = client.take_all(2)
    other = connect('1.2')
    other.subscribe(queue)
    for command, message in zip(('ACK', 'NACK'), messages):
        lines = ['%s:%s' % ('id' if key == 'ack' else key, message.get(key))]
        if version == '1.1':
            lines.append('subscription:0')
        client.ask(command, *lines)
    assert other.bodies() == [b'b']


def test_receipt_of_subscribe_means_that_it_is_active(connect, topic):
    """RECEIPT: RECEIPT of SUBSCRIBE means that the subscription is active (50 times)"""
    publisher = connect('1.2')
    for number in range(50):
        client = connect('1.2')
        client.subscribe(topic)
        publisher.publish(topic, b'%d' % number)
        assert client.bodies() == [b'%d' % number]
        client.close()


def test_a_receipt_covers_all_frames_before_it(connect, topic):
    """RECEIPT: RECEIPT of a pipelined last SEND comes after all 300 SENDs were received"""
    listener, client = connect('1.2'), connect('1.2')
    listener.subscribe(topic)
    client.publish(topic, *numbered(300))
    assert listener.bodies() == numbered(300)


def test_receipts_come_in_order(connect, topic):
    client = connect('1.2')
    receipts = [str(number) for number in range(1000)]
    client.send(b''.join(frame('SEND', 'destination:' + topic, 'receipt:' + one) for one in receipts))
    assert [one.get('receipt-id') for one in client.take_all(1000)] == receipts


def test_a_receipt_does_not_overtake_messages(connect, topic):
    client = connect('1.2')
    client.subscribe(topic)
    send = 'SEND', 'destination:' + topic
    client.send(frame(*send) + frame(*send, 'receipt:b') + frame(*send) + frame('NOSUCH'))
    assert [one.command for one in client.take_all(5)] == [
        'MESSAGE', 'MESSAGE', 'RECEIPT', 'MESSAGE', 'ERROR']


@pytest.mark.parametrize('vanish', ['close', 'reset'])
def test_frames_before_the_client_vanished_count(connect, topic, vanish):
    """RECEIPT: frames received before the client vanished (no DISCONNECT) are still processed"""
    listener, client = connect('1.2'), connect('1.2')
    listener.subscribe(topic)
    client.send(b''.join(frame('SEND', 'destination:' + topic, body=body) for body in numbered(100)))
    client.close() if vanish == 'close' else client.reset()
    assert [one.body for one in listener.take_all(100)] == numbered(100)


def test_a_client_that_says_no_more_still_reads(connect, topic):
    """Half of a connection may be closed: what is owed is still sent."""
    client = connect('1.2')
    client.subscribe(topic)
    client.say('SEND', 'destination:' + topic, 'receipt:r', body=b'last')
    client.socket.shutdown(1)
    found = {one.command: one for one in client.take_all(2)}
    assert found['MESSAGE'].body == b'last' and found['RECEIPT'].get('receipt-id') == 'r'
    client.take_end()


# --- errors ---

@pytest.mark.parametrize('version, command, lines', [
    ('1.2', 'SEND', []), ('1.1', 'SEND', []), ('1.0', 'SEND', []), ('1.2', 'SEND', ['destination:']),
    ('1.2', 'SUBSCRIBE', ['destination:/topic/a']), ('1.1', 'SUBSCRIBE', ['destination:/topic/a']),
    ('1.2', 'SUBSCRIBE', ['id:', 'destination:/topic/a']),
    ('1.2', 'SUBSCRIBE', ['id:0']), ('1.1', 'SUBSCRIBE', ['id:0']), ('1.0', 'SUBSCRIBE', []),
    ('1.2', 'SUBSCRIBE', ['id:0', 'destination:/topic/a', 'ack:maybe']),
    ('1.2', 'SUBSCRIBE', ['id:0', 'destination:/topic/a', 'ack:']),
    ('1.2', 'SUBSCRIBE', ['id:0', 'destination:/topic/a', 'ack:AUTO']),
    ('1.2', 'UNSUBSCRIBE', []), ('1.2', 'UNSUBSCRIBE', ['destination:/topic/a']),
    ('1.2', 'UNSUBSCRIBE', ['id:9']), ('1.1', 'UNSUBSCRIBE', []), ('1.0', 'UNSUBSCRIBE', []),
    ('1.0', 'UNSUBSCRIBE', ['destination:/topic/other']),
    ('1.2', 'ACK', []), ('1.2', 'NACK', []), ('1.2', 'ACK', ['message-id:1', 'subscription:1']),
    ('1.1', 'ACK', ['subscription:1']), ('1.1', 'ACK', ['message-id:1']), ('1.1', 'NACK', ['subscription:1']),
    ('1.0', 'ACK', []),
    ('1.2', 'BEGIN', []), ('1.2', 'COMMIT', []), ('1.2', 'ABORT', []), ('1.2', 'COMMIT', ['transaction:no']),
    ('1.2', 'ABORT', ['transaction:no']), ('1.2', 'SEND', ['destination:/topic/a', 'transaction:no']),
    ('1.2', 'ACK', ['id:1', 'transaction:no']), ('1.2', 'CONNECT', ['accept-version:1.2'])])
def test_what_is_wrong_is_answered_by_error_and_the_end(connect, version, command, lines):
    """SEND: SEND without destination: ERROR, then close
    ERROR: ERROR has a 'message' header
    ERROR: ERROR caused by a frame with receipt has the receipt-id
    RECEIPT: a failed frame gets no RECEIPT
    ERROR: ERROR with a body has content-length and content-type
    SUBSCRIBE id Header: 1.2: SUBSCRIBE without id: ERROR, then close
    SUBSCRIBE id Header: 1.1: SUBSCRIBE without id: ERROR, then close
    SUBSCRIBE: SUBSCRIBE without destination: ERROR, then close
    SUBSCRIBE ack Header: an ack mode that is not auto/client/client-individual: ERROR, then close
    UNSUBSCRIBE: UNSUBSCRIBE without id: ERROR, then close
    UNSUBSCRIBE: UNSUBSCRIBE with an unknown id: ERROR, then close
    ACK: ACK without id: ERROR, then close
    ACK: 1.1: ACK without message-id: ERROR, then close
    NACK: NACK without id: ERROR, then close
    BEGIN: BEGIN without transaction: ERROR, then close
    COMMIT: COMMIT of an unknown transaction: ERROR, then close
    ABORT: ABORT of an unknown transaction: ERROR, then close
    SEND: SEND in an unknown transaction: ERROR, then close; nothing is delivered
    """
    client, listener = connect(version), connect('1.2')
    listener.subscribe('/topic/a')
    client.say(command, *(lines + ['receipt:r 1']))
    client.say('SEND', 'destination:/topic/a', body=b'behind the error')
    error = client.take_error()                    # checks message, content-length and content-type, too
    assert error.get('receipt-id') == 'r 1'
    assert listener.bodies() == []


def test_an_error_names_no_receipt_of_another_frame(connect, topic):
    client = connect('1.2')
    client.send(frame('SEND', 'destination:' + topic, 'receipt:good') + frame('NOSUCH'))
    assert client.take().get('receipt-id') == 'good'
    assert client.take_error().get('receipt-id') is None
    for bad in frame('SEND'), frame('SEND', 'destination:/a', 'x:\\t'), b'SEND\na:b\0':
        client = connect('1.2')
        client.send(frame('SEND', 'destination:' + topic, 'receipt:good') + bad)
        assert client.take().get('receipt-id') == 'good'
        assert client.take_error().get('receipt-id') is None


def test_what_an_error_quotes_can_not_break_it(connect):
    client = connect('1.2')
    client.say('UNSUBSCRIBE', 'id:a\\n\\nMESSAGE\\nb\\rc', 'receipt:\\n\\n')
    assert client.take_error().get('receipt-id') == '\\n\\n'


# --- topics ---

@pytest.mark.parametrize('version', VERSIONS)
def test_every_subscriber_gets_the_message(connect, topic, version):
    """SEND: /topic/: every subscriber gets the message, the sender as well
    MESSAGE: subscription header matches the id of the subscription"""
    sender, *others = clients = [connect(version) for _ in range(4)]
    for number, client in enumerate(clients):
        client.subscribe(topic, id='sub %d' % number)
    sender.publish(topic, b'to all')
    for number, client in enumerate(clients):
        message, = client.before_now()
        assert message.body == b'to all' and message.get('subscription') == 'sub %d' % number


def test_without_subscribers_it_is_dropped(broker, connect, topic):
    """SEND: /topic/: a message without subscribers is dropped"""
    client = connect('1.2')
    dropped = broker.counters()['dropped']
    client.publish(topic, b'lost')
    assert broker.counters()['dropped'] == dropped + 1
    client.subscribe(topic)
    assert client.bodies() == []


def test_order_of_1000_messages_at_3_subscribers(connect, topic):
    """MESSAGE: 1000 messages of one sender come in order to 3 subscribers"""
    listeners = [connect(version) for version in VERSIONS]
    for listener in listeners:
        listener.subscribe(topic)
    sender = connect('1.2')
    sender.publish(topic, *numbered(1000))
    for listener in listeners:
        assert listener.bodies() == numbered(1000)


def test_order_across_destinations_and_sizes(connect, topic):
    """What one client sends comes in order, also where it goes through different places."""
    listener, sender = connect('1.2'), connect('1.2')
    listener.subscribe(topic + 'a', id='a')
    listener.subscribe(topic + 'b', id='b')
    bodies = [b'%d' % number + b'x' * (40000 if number % 7 == 0 else 0) for number in range(200)]
    for number, body in enumerate(bodies):
        sender.say('SEND', 'destination:' + topic + ('a' if number % 3 else 'b'), body=body)
    assert [one.body for one in listener.take_all(200)] == bodies


def test_headers_of_message(connect, topic):
    """MESSAGE: message-id is there and unique (100 messages)
    MESSAGE: a message-id header given by the sender does not make ids collide
    SEND: user defined headers are passed through
    MESSAGE: content-type of SEND is passed on, MESSAGE has content-length
    """
    client = connect('1.2')
    client.subscribe(topic)
    for _ in range(100):
        client.say('SEND', 'destination:' + topic, 'message-id:mine', 'subscription:mine', 'ack:mine',
                   'receipt:r', 'content-type:text/plain;charset=utf-8', 'priority:4',
                   'x-user:a b', body=b'body')
    messages = [one for one in client.take_all(200) if one.command == 'MESSAGE']
    ids = {message.get('message-id') for message in messages}
    assert len(ids) == 100
    assert not any(set(': \\') & set(one) for one in ids)
    for message in messages:
        assert len(set(message.names())) == len(message.names())
        assert message.get('subscription') == '0'
        assert message.get('destination') == topic
        assert message.get('content-type') == 'text/plain;charset=utf-8'
        assert message.get('content-length') == '4'
        assert message.get('priority') == '4' and message.get('x-user') == 'a b'
        assert message.get('receipt') is None and message.get('ack') is None


# --- subscriptions ---

def test_1_0_needs_no_id(connect, topic):
    """SUBSCRIBE: 1.0: SUBSCRIBE without id works
    SUBSCRIBE: 1.0: the body of SUBSCRIBE is ignored
    SUBSCRIBE: 1.0: SUBSCRIBE with id: MESSAGE has the subscription header"""
    client = connect('1.0')
    client.ask('SUBSCRIBE', 'destination:' + topic, body=b'ignored')
    client.ask('SUBSCRIBE', 'destination:' + topic, 'id:x')
    client.publish(topic, b'a')
    assert sorted(one.get('subscription', 'none') for one in client.before_now()) == ['none', 'x']


@pytest.mark.parametrize('subscribe, unsubscribe', [
    ([], ['destination:%s']), (['id:x'], ['id:x']), (['id:x'], ['destination:%s']),
    (['id:x'], ['id:x', 'destination:%s'])])
def test_1_0_unsubscribes_by_destination_or_id(connect, topic, subscribe, unsubscribe):
    """UNSUBSCRIBE: 1.0: UNSUBSCRIBE by destination
    UNSUBSCRIBE: 1.0: UNSUBSCRIBE by id"""
    client = connect('1.0')
    client.ask('SUBSCRIBE', 'destination:' + topic, *subscribe)
    client.ask('SUBSCRIBE', 'destination:' + topic + '/other')
    client.ask('UNSUBSCRIBE', *[line.replace('%s', topic) for line in unsubscribe])
    client.publish(topic, b'a')
    client.publish(topic + '/other', b'b')
    assert client.bodies() == [b'b']


@pytest.mark.parametrize('version', ['1.1', '1.2'])
def test_an_id_is_taken_while_it_lives(connect, topic, version):
    """SUBSCRIBE id Header: a second subscription with the id of a living one: ERROR, then close
    UNSUBSCRIBE: the id can be used again after UNSUBSCRIBE"""
    client = connect(version)
    client.subscribe(topic)
    client.ask('UNSUBSCRIBE', 'id:0')
    client.subscribe(topic)
    client.publish(topic, b'once')
    assert client.bodies() == [b'once']
    client.say('SUBSCRIBE', 'id:0', 'destination:' + topic + '/other')
    client.take_error()


def test_the_same_id_in_two_connections(connect, topic):
    """SUBSCRIBE id Header: the same id in two connections: no clash"""
    one, two = connect('1.2'), connect('1.2')
    one.subscribe(topic)
    two.subscribe(topic)
    one.publish(topic, b'a')
    one.ask('UNSUBSCRIBE', 'id:0')
    two.publish(topic, b'b')
    assert one.bodies() == [b'a'] and two.bodies() == [b'a', b'b']


def test_two_subscriptions_of_one_connection(connect, topic):
    """SUBSCRIBE id Header: two subscriptions of one connection to one topic: a MESSAGE for each
    UNSUBSCRIBE: after UNSUBSCRIBE nothing comes; the other subscription goes on"""
    client = connect('1.2')
    client.subscribe(topic, id='a')
    client.subscribe(topic, id='b')
    client.publish(topic, b'1', b'2')
    found = [(one.get('subscription'), one.body) for one in client.before_now()]
    assert sorted(found) == [('a', b'1'), ('a', b'2'), ('b', b'1'), ('b', b'2')]
    client.ask('UNSUBSCRIBE', 'id:a')
    client.publish(topic, b'3')
    assert [(one.get('subscription'), one.body) for one in client.before_now()] == [('b', b'3')]


def test_unsubscribing_in_the_middle_of_a_burst(connect, topic):
    """What was sent before UNSUBSCRIBE comes, what was sent after it doesn't; all in one segment."""
    client = connect('1.2')
    client.subscribe(topic)
    where = 'destination:' + topic
    client.send(frame('SEND', where, body=b'a') + frame('UNSUBSCRIBE', 'id:0')
                + frame('SEND', where, body=b'b') + frame('SUBSCRIBE', 'id:0', where)
                + frame('SEND', where, body=b'c'))
    assert client.bodies() == [b'a', b'c']


# --- queues ---

def test_a_queue_keeps_messages_in_order(broker, connect, queue):
    """SEND: /queue/: messages are kept until a subscriber comes, in order"""
    sender = connect('1.2')
    sender.publish(queue, *numbered(100))
    assert broker.counters()['queued_bytes'] > 0
    sender.close()
    client = connect('1.2')
    client.subscribe(queue)
    assert client.bodies() == numbered(100)
    assert broker.counters()['queued_bytes'] == 0


def test_each_message_of_a_queue_goes_to_one_consumer(connect, queue):
    """SEND: /queue/: of two consumers each message goes to exactly one"""
    consumers = [connect('1.2'), connect('1.1')]
    for consumer in consumers:
        consumer.subscribe(queue)
    connect('1.2').publish(queue, *numbered(100))
    found = [consumer.bodies() for consumer in consumers]
    assert sorted(found[0] + found[1]) == sorted(numbered(100))
    assert min(map(len, found)) == 50        # in turn


def test_auto_ack_is_not_delivered_again(connect, queue):
    """SEND: /queue/: with auto ack a message is not delivered again after the consumer left"""
    consumer = connect('1.2')
    consumer.subscribe(queue)
    consumer.publish(queue, b'a', b'b')
    assert consumer.bodies() == [b'a', b'b']
    consumer.close()
    other = connect('1.2')
    other.subscribe(queue)
    assert other.bodies() == []


@pytest.mark.parametrize('vanish', ['close', 'reset', 'disconnect', 'unsubscribe'])
def test_the_living_consumer_gets_the_messages(connect, queue, vanish):
    """SUBSCRIBE: a closed connection loses its subscriptions: queue messages go to the living consumer"""
    gone, living, sender = connect('1.2'), connect('1.2'), connect('1.2')
    gone.subscribe(queue)
    living.subscribe(queue)
    if vanish == 'unsubscribe':
        gone.ask('UNSUBSCRIBE', 'id:0')
    elif vanish == 'disconnect':
        gone.ask('DISCONNECT')
    else:
        getattr(gone, vanish)()
        living.before_now()                  # the broker has read the end by now
    sender.publish(queue, *numbered(20))
    assert living.bodies() == numbered(20)


def test_queues_are_bounded():
    with running(Broker(port=0, queued=100 * 1000)) as broker, Client(broker.address) as client:
        client.connect('1.2')
        # In one piece: who still sends some seconds after an ERROR is cut off, and may not see it.
        client.send(b''.join(frame('SEND', 'destination:/queue/full', 'receipt:%d' % number, body=b'x' * 1000)
                             for number in range(1000)))
        accepted = 0
        answer = client.take()
        while answer.command == 'RECEIPT':
            accepted += 1
            answer = client.take()
        assert answer.command == 'ERROR' and answer.get('receipt-id') == str(accepted)
        assert 20 < accepted < 100
        with Client(broker.address) as consumer:
            consumer.connect('1.2')
            consumer.subscribe('/queue/full')
            assert len(consumer.bodies()) == accepted
            consumer.publish('/queue/full', b'there is room again')
            assert consumer.bodies() == [b'there is room again']


# --- the end ---

def test_disconnect(connect, topic):
    """Connection Lingering: the server closes its end some time after DISCONNECT
    DISCONNECT: RECEIPT of DISCONNECT: all the earlier SENDs were received"""
    listener, client = connect('1.2'), connect('1.2')
    listener.subscribe(topic)
    for body in numbered(100):
        client.say('SEND', 'destination:' + topic, body=body)
    client.ask('DISCONNECT')
    client.take_end(5)
    assert listener.bodies() == numbered(100)


def test_nothing_counts_behind_disconnect(connect, topic):
    listener, client = connect('1.2'), connect('1.2')
    listener.subscribe(topic)
    client.send(frame('DISCONNECT', 'receipt:r') + frame('SEND', 'destination:' + topic))
    assert client.take().get('receipt-id') == 'r'
    client.take_end()
    assert listener.bodies() == []


@pytest.mark.parametrize('version', VERSIONS)
def test_disconnect_without_headers(connect, version):
    """DISCONNECT: 1.0: DISCONNECT without headers ends the session without ERROR"""
    client = connect(version)
    client.say('DISCONNECT')
    client.take_end()


def test_what_a_session_had_is_gone_with_it(broker, connect, topic):
    before = broker.counters()
    client = connect('1.2')
    client.subscribe(topic)
    client.ask('BEGIN', 'transaction:t')
    client.say('SEND', 'destination:' + topic, 'transaction:t', body=b'x' * 1000)
    client.send(b'SEND\ndestination:half')
    wait_until(lambda: broker.counters()['held_bytes'] > before['held_bytes'] + 1000)
    assert broker.counters()['connections'] == before['connections'] + 1
    assert broker.counters()['destinations'] == before['destinations'] + 1
    client.close()
    wait_until(lambda: broker.counters()['connections'] == before['connections'])
    for name in 'destinations', 'held_bytes', 'waiting_bytes', 'queued_bytes':
        assert broker.counters()[name] == before[name]


# --- limits of a session ---

def test_subscriptions_and_transactions_are_limited():
    with running(Broker(port=0, subscriptions=3, transactions=2)) as broker:
        for command, line, number in ('SUBSCRIBE', 'id', 3), ('BEGIN', 'transaction', 2):
            with Client(broker.address) as client:
                client.connect('1.2')
                for one in range(number):
                    client.ask(command, '%s:%d' % (line, one), 'destination:/topic/a')
                client.say(command, '%s:more' % line, 'destination:/topic/a', 'receipt:r')
                assert client.take_error().get('receipt-id') == 'r'
