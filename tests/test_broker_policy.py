"""The broker's hook for policies, the host's own policy through it, and the counters."""

import logging
import threading

import pytest
from door_client import Program
from helpers import wait_until
from stomp_client import Client, frame, running

from hostpolicy import CLAIMS, HostPolicy
from protocol import CMD_REQUESTS, CMD_RESPONSES, CONNECTIONS
from stompbroker import Broker, Policy, Refused

pytestmark = pytest.mark.ends


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

def judge(machine_id, hello):
    if machine_id == 'stranger':
        raise ValueError('no stranger is let in')


@pytest.fixture
def hosted():
    """A broker as the host runs it, and what makes clients of it."""
    policy = HostPolicy(judge)
    broker = Broker(port=0, policy=policy)
    program = Program(broker, CONNECTIONS, CMD_RESPONSES)
    with running(broker), program:
        clients = []

        def client(*lines):
            clients.append(Client(broker.address))
            clients[-1].connect('1.2', *lines)
            return clients[-1]
        client.broker, client.policy, client.program = broker, policy, program
        yield client
        for one in clients:
            one.close()


@pytest.fixture
def the_host(hosted):
    return hosted.program


def claim(hosted, the_host, id, *lines):
    """A guest that subscribed and said HELLO, and the number of its connection."""
    client = hosted(*lines)
    client.subscribe(CMD_REQUESTS)
    client.ask('SEND', 'destination:' + CONNECTIONS, 'id:' + id, body=b'HELLO {"session":"%s"}' % id.encode())
    message, = the_host.before_now()
    number, claimed, address = message.get('connection').split(' ')
    assert (claimed, address) == (id, '127.0.0.1')
    return client, number


def guest(hosted, the_host, id, *lines):
    """The same, once it has proved its id to the host."""
    client, number = claim(hosted, the_host, id, *lines)
    hosted.policy.prove(number)
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


@pytest.mark.parametrize('body', [b'CMD_RESULTS {}', b'STILL_ALIVE', b'', b'HELLO {', b'HELLO'])
def test_who_has_not_said_hello_says_nothing(hosted, the_host, body):
    client = hosted()
    client.say('SEND', 'destination:' + CMD_RESPONSES, 'from:one', body=body)
    client.take_error()
    assert the_host.before_now() == []


@pytest.mark.parametrize('id', ['stranger', 'gauß', 'a b', '', '08:00:27:AA:ﬀ:01', 'x' * 65])
def test_who_is_not_let_in(hosted, the_host, id):
    client = hosted()
    client.say('SEND', 'destination:' + CONNECTIONS, 'id:' + id, body=b'HELLO')
    assert 'stranger' in client.take_error().get('message') or id != 'stranger'
    assert the_host.before_now() == []


def test_each_guest_gets_what_is_addressed_to_it(hosted, the_host):
    one, two = guest(hosted, the_host, 'one'), guest(hosted, the_host, '0A:00:00:00:00:09')
    silent = hosted()
    silent.subscribe(CMD_REQUESTS)

    def sent(to, body=b'CMD_RUN'):
        the_host.say(CMD_REQUESTS, body, to=to)
        return [len(client.before_now_as_guest()) for client in (one, two, silent)]
    assert sent('one') == [1, 0, 0]
    assert sent('0A:00:00:00:00:09') == [0, 1, 0]
    assert sent('*', b'HELLO') == [1, 1, 1]
    for nobody in ('ONE', 'o*', '0a:00:00:00:00:09', 'three', ''):
        assert sent(nobody) == [0, 0, 0]


def test_an_id_that_is_not_proved_gets_what_is_for_its_connection(hosted, the_host):
    one = guest(hosted, the_host, 'one')
    thief, number = claim(hosted, the_host, 'one')
    the_host.say(CMD_REQUESTS, b'CMD_RUN', to='one')
    assert (len(one.before_now_as_guest()), thief.before_now_as_guest()) == (1, [])
    the_host.say(CMD_REQUESTS, b'HELLO', to='one', connection=number)
    greeting, = thief.before_now_as_guest()
    assert greeting.get('connection') is None and one.before_now_as_guest() == []


def test_who_proves_an_id_takes_the_place_of_who_had_it(hosted, the_host):
    first, again = guest(hosted, the_host, 'one'), guest(hosted, the_host, 'one')
    first.close()
    wait_until(lambda: hosted.broker.counters()['connections'] == 1)
    the_host.say(CMD_REQUESTS, b'CMD_RUN', to='one')
    assert len(again.before_now_as_guest()) == 1


def test_connections_that_claim_an_id_are_few(hosted, the_host):
    """In NAT mode all guests have one address, and its connections are for all of them."""
    honest = guest(hosted, the_host, 'one')
    thieves = [claim(hosted, the_host, 'one')[0] for _ in range(20)]
    assert hosted.broker.counters()['connections'] == CLAIMS
    thieves[0].take_end_or_error()
    again = guest(hosted, the_host, 'one')                 # the honest one, at its next connection
    honest.close()
    wait_until(lambda: hosted.broker.counters()['connections'] < CLAIMS)
    the_host.say(CMD_REQUESTS, b'CMD_RUN', to='one')
    assert len(again.before_now_as_guest()) == 1


def test_a_connection_is_bound_to_one_id(hosted, the_host):
    client = guest(hosted, the_host, '0A:00:00:00:00:09')
    client.ask('SEND', 'destination:' + CMD_RESPONSES, 'from:0a\\c00\\c00\\c00\\c00\\c09', body=b'PONG')
    assert len(the_host.before_now()) == 1
    client.say('SEND', 'destination:' + CONNECTIONS, 'id:other', body=b'HELLO')
    client.take_error()
    assert the_host.before_now() == []


def test_many_results_do_not_cut_the_host_off(hosted, the_host):
    """Which hasn't read yet, as its machine is busy: 30 guests, 900 KB each."""
    guests = [guest(hosted, the_host, 'g%d' % number) for number in range(30)]
    the_host.pause()
    result = b'CMD_RESULTS ' + b'x' * 900000
    threads = [threading.Thread(target=client.say, args=('SEND', 'destination:' + CMD_RESPONSES),
                                kwargs={'body': result}) for client in guests]
    for thread in threads:
        thread.start()
    wait_until(lambda: hosted.broker.counters()['held_up'], 30)
    assert hosted.broker.counters()['waiting_bytes'] < hosted.broker.limits.waiting
    the_host.read()
    for thread in threads:
        thread.join(30)
    for client in guests:
        client.ask('SEND', 'destination:' + CMD_RESPONSES, body=b'PONG')
    got = [one for one in the_host.before_now() if one.body != b'PONG']
    assert {one.body for one in got} == {result}
    assert sorted(one.get('connection').split()[1] for one in got) == sorted('g%d' % n for n in range(30))
    assert hosted.broker.counters()['cut_off'] == 0


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
