"""What a policy may ask for, so that one client's noise is its own trouble: rates, lanes, strangers."""

import contextlib
import threading
import time

import pytest
from helpers import wait_until
from stomp_client import Client, frame, running

from stompbroker import Broker, Policy

pytestmark = pytest.mark.ends

WHERE = 'destination:/topic/a'


class Strict(Policy):
    """Login ``slow`` is read slowly; ``stranger`` has to say who it is: by HELLO."""
    rate = 100, 50

    def connecting(self, session, headers):
        login = headers.get('login', '')
        if login == 'slow':
            session.rate = self.rate
        if login == 'heavy':
            session.byte_rate = 4e6, 1e6
        session.identified = login != 'stranger'

    def sending(self, session, destination, frame):
        if frame.body.startswith(b'HELLO'):
            session.identified = True
        return b'drop me' not in frame.body


@pytest.fixture
def broker():
    with running(Broker(port=0, policy=Strict(), unidentified=5, connect_time=1.0)) as broker:
        yield broker


# --- who has not said who it is ---

def test_a_stranger_says_who_it_is(broker, connect):
    listener, client = connect('1.2'), connect('1.2', 'login:stranger')
    listener.subscribe('/topic/a')
    client.subscribe('/topic/answer')
    client.ask('SEND', WHERE, body=b'HELLO')
    client.ask('SEND', WHERE, body=b'x' * 500000)
    assert [len(body) for body in listener.bodies()] == [5, 500000]
    assert client.silent_for(1.5)                # its time to say it is over, and it has


@pytest.mark.parametrize('body', [b'something else', b'drop me'])
def test_the_first_word_must_be_it(broker, connect, body):
    listener, client = connect('1.2'), connect('1.2', 'login:stranger')
    listener.subscribe('/topic/a')
    client.say('SEND', WHERE, 'receipt:r', body=body)
    assert client.take_error().get('receipt-id') == 'r'
    assert listener.bodies() == [] and broker.counters()['refused'] == 1


def test_its_first_word_is_short(broker, connect):
    client = connect('1.2', 'login:stranger')
    client.send(b'SEND\n' + WHERE.encode() + b'\ncontent-length:65537\n\nHELLO')
    client.take_error()


def test_it_has_not_much_time(broker, connect):
    """From its connection on, and whatever else it says."""
    begin = time.monotonic()
    client = connect('1.2', 'login:stranger')
    client.subscribe('/topic/a')
    client.say('BEGIN', 'transaction:t')
    assert 'who this is' in client.take_error().get('message')
    assert time.monotonic() - begin < 3


def test_strangers_of_one_address_are_few(broker, connect):
    """Those that say who they are make room; a newcomer takes the place of one that has had its time."""
    known = [connect('1.2') for _ in range(10)]
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(Client(broker.address)) for _ in range(5)]
        strangers[1].connect('1.2', 'login:stranger')
        wait_until(lambda: broker.counters()['connections'] == 15)
        with Client(broker.address) as one_more:
            one_more.take_end()
        strangers[1].ask('SEND', WHERE, body=b'HELLO')
        sixth = stack.enter_context(Client(broker.address))
        wait_until(lambda: broker.counters()['connections'] == 16)
        with Client(broker.address) as one_more:
            one_more.take_end()
        sixth.connect('1.2')
        known[0].ask('SEND', WHERE)
    assert broker.counters()['refused'] == 2


def test_the_oldest_stranger_makes_room():
    with running(Broker(port=0, unidentified=3)) as broker, contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(Client(broker.address)) for _ in range(3)]
        wait_until(lambda: broker.counters()['connections'] == 3)
        pause = threading.Event()
        pause.wait(1.2)
        with Client(broker.address) as client:
            client.connect('1.2')
            strangers[0].take_end_or_error()
            client.ask('SEND', WHERE)
        assert strangers[1].silent_for(0.1)


def test_strangers_of_many_addresses_lock_nobody_out():
    with running(Broker('127.0.0.1', port=0, connections=6)) as broker, contextlib.ExitStack() as stack:
        def client(source):
            return stack.enter_context(Client(broker.address, source=source))
        known = client('127.0.0.2')
        known.connect('1.2')
        strangers = [client('127.0.0.%d' % (3 + n % 2)) for n in range(5)]
        wait_until(lambda: broker.counters()['connections'] == 6)
        client('127.0.0.2').take_end_or_error()            # each of them has a second
        pause = threading.Event()
        pause.wait(1.2)
        newcomer = client('127.0.0.2')
        newcomer.connect('1.2')
        strangers[0].take_end_or_error()                   # of the address that has most of them
        for one in known, newcomer:
            one.ask('SEND', WHERE)


def test_addresses_are_limited_each_by_itself():
    with running(Broker('127.0.0.1', port=0, per_address=3)) as broker, contextlib.ExitStack() as stack:
        def client(source):
            one = stack.enter_context(Client(broker.address, source=source))
            one.say('CONNECT', 'accept-version:1.2', 'host:x')
            return one
        for _ in range(3):
            assert client('127.0.0.1').take().command == 'CONNECTED'
        client('127.0.0.1').take_end_or_error()
        for _ in range(3):
            last = client('127.0.0.2')
            assert last.take().command == 'CONNECTED'
        last.close()
        wait_until(lambda: broker.counters()['connections'] == 5)
        assert client('127.0.0.2').take().command == 'CONNECTED'


@pytest.mark.parametrize('limit, why', [
    ('connections', 'there are 1 already'), ('per_address', 'its address has 1 already'),
    ('unidentified', 'its address has 1 already that have not said who they are')])
def test_the_log_says_which_limit_sends_a_client_away(caplog, limit, why):
    with running(Broker('127.0.0.1', port=0, **{limit: 1})) as broker:
        with Client(broker.address), Client(broker.address) as second:
            peer = '%s:%s' % second.socket.getsockname()
            second.take_end_or_error()
    assert [record.getMessage() for record in caplog.records if 'sent away' in record.getMessage()] == [
        '%s is sent away: %s' % (peer, why)]


# --- rates ---

def test_a_rate(broker, connect):
    """A burst passes at once; what is more comes later; nothing is lost, and nobody else waits."""
    listener, slow, other = connect('1.2'), connect('1.2', 'login:slow', 'heart-beat:300,0'), connect('1.2')
    listener.subscribe('/topic/a')
    begin = time.monotonic()
    slow.send(b''.join(frame('SEND', WHERE, body=b'%d' % number) for number in range(250)))
    for number in range(45):
        assert listener.take().body == b'%d' % number
    assert time.monotonic() - begin < 1.0
    other.publish('/topic/b', b'meanwhile')
    assert time.monotonic() - begin < 1.5
    assert [listener.take().body for _ in range(205)] == [b'%d' % number for number in range(45, 250)]
    assert 1.8 < time.monotonic() - begin < 10
    assert broker.counters()['slowed'] > 0 and broker.counters()['held_bytes'] < 2000


def test_a_rate_counts_bytes(broker, connect):
    """Of few frames that are large: the first three pass at once, and the sixth once five have been paid for:
    2.5 MB, less the megabyte that is free, at 4 MB a second."""
    listener, slow = connect('1.2'), connect('1.2', 'login:heavy')
    listener.subscribe('/topic/a')
    begin = time.monotonic()
    slow.send(frame('SEND', WHERE, body=b'x' * 500000) * 6)
    assert len(listener.take_all(6)) == 6 and 0.37 < time.monotonic() - begin < 10
    assert broker.counters()['slowed'] > 0


def test_who_floods_and_goes_is_heard_to_its_end(broker, connect):
    listener, slow = connect('1.2'), connect('1.2', 'login:slow')
    listener.subscribe('/topic/a')
    slow.send(frame('SEND', WHERE) * 120)
    slow.close()
    assert len(listener.take_all(120)) == 120


def test_who_pauses_gets_what_it_is_sent(broker, connect):
    slow, other = connect('1.2', 'login:slow', 'heart-beat:0,200'), connect('1.2')
    slow.subscribe('/topic/b')
    slow.send(frame('SEND', WHERE) * 200)
    other.publish('/topic/b', b'a' * 100000)
    begin = time.monotonic()
    assert len(slow.take().body) == 100000
    slow.take_beats(2)
    assert time.monotonic() - begin < 1.3


def test_other_frames_count_little(broker, connect):
    slow = connect('1.2', 'login:slow')
    slow.ask('BEGIN', 'transaction:first')
    begin = time.monotonic()
    for _ in range(100):
        slow.say('BEGIN', 'transaction:t')
        slow.say('ABORT', 'transaction:t')
    slow.ask('ABORT', 'transaction:first')
    assert time.monotonic() - begin < 2 and broker.counters()['slowed'] == 0
    for _ in range(500):
        slow.say('BEGIN', 'transaction:t')
        slow.say('ABORT', 'transaction:t')
    slow.ask('BEGIN', 'transaction:last')
    assert broker.counters()['slowed'] > 0


@pytest.mark.once
@pytest.mark.parametrize('how', ['two topics', 'receipts'])
def test_few_bytes_that_make_much_work_delay_nobody(how):
    """A message to 500 subscriptions costs as much as 500; what one read brought was done in one turn."""
    with running(Broker(port=0, waiting=64 * 1024 * 1024)) as broker, contextlib.ExitStack() as stack:
        sender, quiet, subscriber = (stack.enter_context(Client(broker.address)) for _ in range(3))
        for client in sender, quiet, subscriber:
            client.connect('1.2')
        for number in range(1000):
            subscriber.say('SUBSCRIBE', 'destination:/topic/%d' % (number % 2), 'id:%d' % number)
        subscriber.before_now()
        sender.subscribe('/topic/own')         # no RECEIPT overtakes what it may be sent
        lines = ('receipt:r',) if how == 'receipts' else ()
        places = '00' if how == 'receipts' else '01'
        sent = [frame('SEND', 'destination:/topic/' + place, *lines) for place in places] * 300
        before = broker.counters()['frames_in']
        sender.send(b''.join(sent))
        for number in range(3):
            quiet.ask('SEND', 'destination:/topic/none', receipt=str(number))
        assert broker.counters()['frames_in'] < before + len(sent)
        sender.before_now()
        assert broker.counters()['frames_in'] > before + len(sent)
