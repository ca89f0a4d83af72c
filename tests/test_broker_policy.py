"""The broker's hook for policies, the host's own policy through it, and the counters."""

import logging

import pytest
from helpers import wait_until
from stomp_client import Client, frame, running

from protocol import CMD_REQUESTS, CMD_RESPONSES, CONNECTIONS
from stompbroker import Broker, Policy, Refused
from vmhost import HostPolicy


class Recorder(Policy):
    """Allows what its tests don't forbid, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def connecting(self, session, headers):
        self.asked.append(('connecting', session))
        session.policy_data = headers.get('login', '')
        if session.policy_data == 'nobody':
            raise Refused('you are nobody')

    def subscribing(self, session, destination, headers):
        self.asked.append(('subscribing', destination))
        if destination == '/topic/secret':
            raise Refused('that is secret')
        if destination == '/topic/broken':
            raise KeyError('a mistake in the policy')

    def sending(self, session, destination, frame):
        self.asked.append(('sending', destination))
        if destination == '/topic/secret':
            raise Refused('that is secret')
        frame.headers['from'] = session.policy_data
        return 'drop me' not in frame.headers

    def audience(self, destination, frame):
        to = frame.headers.get('to')
        return to and (lambda session: session.policy_data == to)

    def closed(self, session):
        self.asked.append(('closed', session))
        if session.policy_data == 'clumsy':
            raise KeyError('a mistake in the policy')


@pytest.fixture
def policy():
    return Recorder()


@pytest.fixture
def broker(policy):
    with running(Broker(port=0, policy=policy)) as broker:
        yield broker


def test_a_refused_connection(broker, policy, connect):
    client = connect(None)
    client.say('CONNECT', 'accept-version:1.2', 'host:x', 'login:nobody')
    assert client.take_error().get('message') == 'you are nobody'
    assert broker.counters()['refused'] == 1
    (_, session), closed = policy.asked
    assert closed == ('closed', session)


def test_it_is_asked_only_where_the_login_is_right(policy):
    with running(Broker(port=0, policy=policy, login='me', passcode='x')) as broker:
        with Client(broker.address) as client:
            client.say('CONNECT', 'accept-version:1.2', 'host:x', 'login:me', 'passcode:wrong')
            client.take_error()
    assert policy.asked == []


@pytest.mark.parametrize('vanish', ['close', 'reset', 'disconnect', 'error'])
def test_the_end_of_a_session_is_told_once(broker, policy, connect, vanish):
    client = connect('1.2', 'login:a')
    if vanish in ('close', 'reset'):
        getattr(client, vanish)()
    else:
        client.say('DISCONNECT' if vanish == 'disconnect' else 'NOSUCH')
        client.take_end_or_error()
        client.close()
    wait_until(lambda: broker.counters()['connections'] == 0)
    assert [what for what, _ in policy.asked] == ['connecting', 'closed']


def test_who_never_connects_is_no_session(broker, policy, connect):
    for data in b'', b'NOSUCH\n\n\0', b'CONNECT\naccept-version:9\n\n\0':
        client = connect(None)
        client.send(data)
        client.close()
    wait_until(lambda: broker.counters()['connections_total'] == 3 and not broker.counters()['connections'])
    assert policy.asked == []


@pytest.mark.parametrize('command, lines', [
    ('SUBSCRIBE', ['id:1', 'destination:/topic/secret']), ('SEND', ['destination:/topic/secret'])])
def test_refused_frames(broker, policy, connect, command, lines):
    client = connect('1.2', 'login:a')
    client.say(command, *(lines + ['receipt:r']))
    error = client.take_error()
    assert (error.get('message'), error.get('receipt-id')) == ('that is secret', 'r')
    assert broker.counters()['refused'] == 1 and broker.counters()['errors'] == 1


def test_sending_may_drop_in_silence_and_write_headers(broker, connect):
    client = connect('1.2', 'login:a:b')
    client.subscribe('/topic/a')
    client.ask('SEND', 'destination:/topic/a', 'drop me:')
    assert client.bodies() == []
    assert broker.counters()['refused'] == 1
    for lie in (), ('from:another',), ('from:another',), ():
        client.ask('SEND', 'destination:/topic/a', *lie)
        message, = client.before_now()
        assert message.get('from') == 'a\\cb'


def test_senders_with_the_same_head_are_not_taken_for_each_other(broker, connect):
    """Heads that repeat are parsed once; what the policy writes into them is each sender's own."""
    listener = connect('1.2')
    listener.subscribe('/topic/a')
    senders = [connect('1.2', 'login:' + name) for name in ('a', 'b')]
    for sender in senders * 3:
        sender.ask('SEND', 'destination:/topic/a')
    assert [message.get('from') for message in listener.before_now()] == ['a', 'b'] * 3


def test_the_audience_of_a_topic(broker, connect):
    sender, *listeners = [connect('1.2', 'login:' + name) for name in ('s', 'a', 'b', 'a')]
    for listener in listeners:
        listener.subscribe('/topic/x')
    where = 'destination:/topic/x'
    sender.send(frame('SEND', where, body=b'1') + frame('SEND', where, 'to:a', body=b'2')
                + frame('SEND', where, body=b'3') + frame('SEND', where, 'to:b', body=b'4' * 50000)
                + frame('SEND', where, 'to:c', body=b'5') + frame('SEND', where, 'receipt:r', body=b'6'))
    assert sender.take().command == 'RECEIPT'
    found = [[body[:1] for body in listener.bodies()] for listener in listeners]
    assert found == [[b'1', b'2', b'3', b'6'], [b'1', b'3', b'4', b'6'], [b'1', b'2', b'3', b'6']]


def test_in_a_transaction_it_is_asked_when_the_frame_comes(broker, policy, connect):
    client = connect('1.2', 'login:a')
    client.ask('BEGIN', 'transaction:t')
    client.ask('SEND', 'destination:/topic/a', 'transaction:t')
    assert ('sending', '/topic/a') in policy.asked
    del policy.asked[:]
    client.ask('COMMIT', 'transaction:t')
    assert ('sending', '/topic/a') not in policy.asked


def test_a_mistake_in_the_policy_ends_one_session_alone(broker, connect, caplog):
    other = connect('1.2')
    client = connect('1.2', 'login:clumsy')
    with caplog.at_level(logging.CRITICAL):
        client.say('SUBSCRIBE', 'id:1', 'destination:/topic/broken', 'receipt:r')
        error = client.take_error()
        assert error.get('message') == 'internal error' and error.get('receipt-id') == 'r'
        client.close()
        other.ask('SEND', 'destination:/topic/a')


# --- the host's policy ---

SECRET = 'known to the host alone'


@pytest.fixture
def hosted():
    """A broker as the host runs it, and what makes clients of it."""
    with running(Broker(port=0, policy=HostPolicy(SECRET, lambda address: ''))) as broker:
        clients = []

        def client(*lines):
            clients.append(Client(broker.address))
            clients[-1].connect('1.2', *lines)
            return clients[-1]
        yield client
        for one in clients:
            one.close()


@pytest.fixture
def the_host(hosted):
    host = hosted('vmhost-secret:' + SECRET)
    host.subscribe(CONNECTIONS, id='c')
    host.subscribe(CMD_RESPONSES, id='r')
    return host


def guest(hosted, the_host, id, *lines):
    """A guest that subscribed and said HELLO."""
    client = hosted(*lines)
    client.subscribe(CMD_REQUESTS)
    client.ask('SEND', 'destination:' + CONNECTIONS, 'id:' + id, body=b'HELLO {"session":"%s"}' % id.encode())
    message, = the_host.before_now()
    assert message.get('from') == id
    return client


@pytest.mark.parametrize('command, lines', [
    ('SUBSCRIBE', ['id:1', 'destination:' + CONNECTIONS]),
    ('SUBSCRIBE', ['id:1', 'destination:' + CMD_RESPONSES]),
    ('SUBSCRIBE', ['id:1', 'destination:/queue/any']), ('SEND', ['destination:' + CMD_REQUESTS]),
    ('SEND', ['destination:/topic/any']), ('SEND', ['destination:/queue/any']),
    ('SEND', ['destination:' + CMD_RESPONSES, 'from:other']),
    ('SEND', ['destination:' + CONNECTIONS, 'id:other'])])
def test_what_a_guest_may_not(hosted, the_host, command, lines):
    client = guest(hosted, the_host, 'one')
    other = guest(hosted, the_host, 'two')
    client.say(command, *lines, body=b'STILL_ALIVE')
    client.take_error()
    assert the_host.before_now() == [] and other.before_now_as_guest() == []


def test_a_secret_that_is_wrong_makes_a_guest(hosted):
    for lines in (), ('vmhost-secret:',), ('vmhost-secret:guessed',), ('vmhost-secret:ü',):
        client = hosted(*lines)
        client.say('SUBSCRIBE', 'id:1', 'destination:' + CONNECTIONS)
        client.take_error()


def test_who_has_not_said_hello_says_nothing(hosted, the_host):
    client = hosted()
    client.ask('SEND', 'destination:' + CMD_RESPONSES, 'from:one', body=b'CMD_RESULTS {}')
    assert the_host.before_now() == []


def test_each_guest_gets_what_is_addressed_to_it(hosted, the_host):
    one, two = guest(hosted, the_host, 'one'), guest(hosted, the_host, 'two')
    silent = hosted()
    silent.subscribe(CMD_REQUESTS)

    def sent(to, body=b'CMD_RUN'):
        the_host.ask('SEND', 'destination:' + CMD_REQUESTS, 'to:' + to, body=body)
        return [len(client.before_now_as_guest()) for client in (one, two, silent)]
    assert sent('one') == [1, 0, 0]
    assert sent('t*') == [0, 1, 0]
    assert sent('*') == [1, 1, 0]
    assert sent('*', b'HELLO') == [1, 1, 1]
    assert sent('three') == [0, 0, 0]


def test_an_id_is_bound_to_one_connection(hosted, the_host):
    first = guest(hosted, the_host, 'one')
    thief = hosted()
    thief.say('SEND', 'destination:' + CONNECTIONS, 'id:one', body=b'HELLO {"session":"another","boot":""}')
    thief.take_error()
    assert the_host.before_now() == []
    again = guest(hosted, the_host, 'one')                   # the same session: a reconnect
    first.take_end()
    again.ask('SEND', 'destination:' + CONNECTIONS, body=b'STILL_ALIVE')
    message, = the_host.before_now()
    assert message.get('from') == 'one'


# --- counters ---

def test_counters(policy):
    with running(Broker(port=0)) as broker:
        def change(**expected):
            wait_until(lambda: all(broker.counters()[name] == value for name, value in expected.items()), 20)
        assert set(broker.counters().values()) == {0}
        with Client(broker.address) as client, Client(broker.address) as lazy:
            change(connections=2, connections_total=2)
            client.connect('1.2')
            connect_size = len(frame('CONNECT', 'accept-version:1.2', 'host:localhost'))
            change(frames_in=1, frames_out=1, bytes_in=connect_size)
            client.subscribe('/topic/a')
            change(frames_in=2, frames_out=2, destinations=1)
            change(bytes_out=client.received)
            client.publish('/topic/a', b'1', b'2', b'3')
            change(frames_in=5, frames_out=6, dropped=0)
            client.publish('/topic/nobody', b'1', b'2')
            change(frames_in=7, frames_out=7, dropped=2)
            client.publish('/queue/a', b'x' * 1000)
            assert broker.counters()['queued_bytes'] > 1000
            change(destinations=2)
            lazy.say('NOSUCH')
            change(errors=1, refused=0)
            lazy.take_error()
        change(connections=0, connections_total=2, waiting_bytes=0, held_bytes=0, cut_off=0)
        with Client(broker.address) as client:
            client.connect('1.2')
            client.subscribe('/queue/a')
            assert client.bodies() == [b'x' * 1000]
        change(queued_bytes=0, destinations=0, connections=0)
