"""The agents' connection to a broker, against brokers that this test plays itself, byte by byte."""

import contextlib
import queue
import re
import socket
import threading
import time

import pytest
from helpers import wait_until

import protocol
import stompbroker

CONNECTED = b'CONNECTED\nversion:1.2\nheart-beat:%s\n\n\0'


class Peer:
    """A listening socket; each connection that is made to it is answered by the test."""

    def __init__(self):
        self.listener = socket.socket()
        self.listener.bind(('127.0.0.1', 0))
        self.listener.listen(8)
        self.listener.settimeout(20)
        self.address = self.listener.getsockname()
        self.open = []

    def accept(self, answer=CONNECTED % b'0,0', confirm=True):
        """The next connection, up to CONNECTED and the receipts of its subscriptions."""
        connection, _ = self.listener.accept()
        connection.settimeout(20)
        self.open.append(connection)
        self.connect = self.frame(connection)
        connection.sendall(answer)
        if confirm:
            self.subscribe = self.frame(connection)
            receipt = re.search(b'receipt:(.*)\n', self.subscribe).group(1)
            connection.sendall(b'RECEIPT\nreceipt-id:' + receipt + b'\n\n\0')
        return connection

    def frame(self, connection):
        """One whole frame, without heart-beats before it."""
        data = b''
        while not data.endswith(b'\0'):
            byte = connection.recv(1)
            assert byte, 'the link hung up after %r' % data
            data = (data + byte).lstrip(b'\n')
        return data

    def close(self):
        for connection in self.open + [self.listener]:
            connection.close()


@pytest.fixture
def peer():
    with contextlib.closing(Peer()) as peer:
        yield peer


@pytest.fixture
def link(peer):
    """A function that makes a started link to the peer; what it tells is in ``told``."""
    links = []

    def make(on_message=lambda frame: None, ack='client-individual', **options):
        told = queue.Queue()
        made = protocol.Link(lambda: [peer.address], [('/topic/x', ack)], lambda link: told.put('up'),
                             on_message, lambda reason: told.put(reason),
                             first_delay=options.pop('first_delay', 0.01), **options)
        made.told = told
        links.append(made)
        made.start()
        return made
    yield make
    peer.close()                # else each link waits a second for the receipt of its goodbye
    before = time.monotonic()
    for made in links:
        made.close()
    assert time.monotonic() - before < 10
    assert not [thread for thread in threading.enumerate() if thread.name == 'link']


def test_it_asks_for_every_version_and_says_who_it_is(peer, link):
    link(login='me', passcode='a:b', heartbeat=3)
    peer.accept()
    for line in (b'accept-version:1.0,1.1,1.2\n', b'heart-beat:3000,3000\n', b'login:me\n'):
        assert line in peer.connect
    assert b'ack:client-individual\n' in peer.subscribe and b'destination:/topic/x\n' in peer.subscribe


def test_it_is_up_once_the_subscription_is_confirmed(peer, link):
    made = link()
    connection = peer.accept(confirm=False)
    peer.frame(connection)
    assert not made.up and made.send('/topic/y', {}, b'') is False
    connection.sendall(b'RECEIPT\nreceipt-id:subscribed-0\n\n\0')
    assert made.told.get(timeout=20) == 'up' and made.up
    assert made.send('/topic/y', {'a': 'b:c'}, b'body') is True
    sent = peer.frame(connection)
    assert sent.startswith(b'SEND\n') and b'a:b\\cc\n' in sent and b'content-length:4\n' in sent


@pytest.mark.parametrize('version, key', [
    (b'1.2', b'ACK\nid:a-7\n'), (b'1.1', b'ACK\nmessage-id:7\nsubscription:0\n'),
    (b'1.0', b'ACK\nmessage-id:7\n')])
def test_what_was_heard_is_acknowledged_in_the_words_of_each_version(peer, link, version, key):
    heard = []
    link(lambda frame: heard.append(frame.body))
    connection = peer.accept(b'CONNECTED\nversion:' + version + b'\n\n\0')
    connection.sendall(b'MESSAGE\nsubscription:0\nmessage-id:7\nack:a-7\ndestination:/topic/x\n\nhi\0')
    lines = peer.frame(connection)
    assert all(line + b'\n' in lines for line in key.splitlines())
    assert heard == ['hi']


def test_a_burst_is_acknowledged_whole_and_in_its_order(peer, link):
    link()
    connection = peer.accept()
    message = b'MESSAGE\nsubscription:0\nmessage-id:7\nack:a-%d\ndestination:/topic/x\n\nhi\0'
    connection.sendall(b''.join(message % number for number in range(250)))
    for number in range(250):
        assert peer.frame(connection).startswith(b'ACK\nid:a-%d\n' % number)


def test_what_was_heard_is_acknowledged_before_the_link_says_goodbye(peer, link):
    made = link(lambda frame: made.told.put(frame.body))
    connection = peer.accept()
    connection.sendall(b'MESSAGE\nsubscription:0\nmessage-id:7\nack:a-7\ndestination:/topic/x\n\nhi\0')
    assert [made.told.get(timeout=20) for _ in range(2)] == ['up', 'hi']
    made.close()
    commands = [peer.frame(connection).split(b'\n')[0] for _ in range(2)]
    assert commands == [b'ACK', b'DISCONNECT']


def test_what_could_not_be_worked_off_is_refused_and_the_link_lives_on(peer, link):
    def fail(frame):
        raise KeyError(frame.body)
    link(fail)
    connection = peer.accept()
    for _ in range(2):
        connection.sendall(b'MESSAGE\nsubscription:0\nmessage-id:7\nack:a-7\ndestination:/topic/x\n\nhi\0')
        assert peer.frame(connection).startswith(b'NACK\nid:a-7\n')


@pytest.mark.parametrize('end', ['closed', 'garbage', 'error', 'half'])
def test_it_comes_back_whatever_ended_the_connection(peer, link, end):
    made = link()
    connection = peer.accept()
    assert made.told.get(timeout=20) == 'up'
    connection.sendall({'closed': b'', 'garbage': b'\xff\xfe NO FRAME \0\n\n', 'half': b'MESSAGE\nsub',
                        'error': b'ERROR\nmessage:enough\n\nreally\0'}[end])
    if end in ('closed', 'half'):
        connection.close()
    reason = made.told.get(timeout=20)
    assert '%s:%d' % peer.address in reason
    if end == 'error':
        assert 'enough' in reason and 'really' in reason
    peer.accept()
    assert made.told.get(timeout=20) == 'up'


def test_a_silent_broker_is_given_up(peer, link):
    made = link(heartbeat=0.2)
    peer.accept(CONNECTED % b'200,200')
    assert made.told.get(timeout=20) == 'up'
    assert 'nothing heard' in made.told.get(timeout=20)
    connection = peer.accept(CONNECTED % b'0,200')      # this one never promised any
    assert made.told.get(timeout=20) == 'up'
    assert connection.recv(1) == b'\n'                  # ours come all the same
    assert made.up


def test_a_broker_that_refuses_is_asked_ever_more_rarely(peer, link):
    made = link(first_delay=0.05)
    times = []
    for _ in range(5):
        connection = peer.accept(b'ERROR\nmessage:go away%s\n\n\0' % (b'!' * 60000), confirm=False)
        times.append(time.monotonic())
        connection.close()
    assert times[4] - times[3] > 4 * 0.05
    assert 'go away' in made.last_error and len(made.last_error) < 1000    # each is a line of the log


def test_a_broker_that_does_not_read_holds_up_nobody(peer, link):
    made = link()
    peer.accept()
    assert made.told.get(timeout=20) == 'up'
    begin = time.monotonic()
    accepted = sum(made.send('/topic/y', {}, b'x' * 100000) for _ in range(1000))
    assert time.monotonic() - begin < 10
    assert accepted * 100000 < protocol.OUTBOX_LIMIT + 10 * 2 ** 20


def test_the_next_address_is_tried(peer):
    with socket.socket() as nobody:
        nobody.bind(('127.0.0.1', 0))
        up = threading.Event()
        made = protocol.Link(lambda: [nobody.getsockname(), peer.address], [], lambda link: up.set(),
                             lambda frame: None)
        made.start()
        peer.accept(confirm=False)
        assert up.wait(20)
        assert made.peer_address == peer.address
        made.close()


@pytest.mark.parametrize('answer', [b'', b'CONNEC', b'CONNECTED\nversion:1.2\n\n\0'])
def test_it_ends_at_once_at_any_moment(peer, answer):
    made = protocol.Link(lambda: [peer.address], [('/topic/x', 'auto')], lambda link: None,
                         lambda frame: None)
    made.start()
    peer.accept(answer, confirm=False)
    begin = time.monotonic()
    made.close()
    assert time.monotonic() - begin < 2.4
    assert not made.up


def test_it_joins_a_real_broker_whatever_pieces_the_bytes_come_in():
    broker = stompbroker.Broker(port=0)
    broker.start()
    heard = queue.Queue()
    made = protocol.Link(lambda: [broker.address], [('/topic/x', 'client-individual')],
                         lambda link: link.send('/topic/x', {}, 'grüß\n'.encode() * 20000),
                         lambda frame: heard.put(frame.body))
    made.start()
    assert heard.get(timeout=20) == 'grüß\n' * 20000
    made.close()
    broker.stop()
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == 'link'])


# --- a broker whose host can't be trusted ---

def test_an_abandoned_broker_is_left_for_the_next_one(peer, link):
    with contextlib.closing(Peer()) as other:
        made = link(first_delay=0.01)
        made._candidates = lambda: [peer.address, other.address]
        peer.accept()
        assert made.told.get(timeout=20) == 'up'
        made.abandon('it gives no proof')
        assert 'it gives no proof' in made.told.get(timeout=20)
        other.accept()
        assert made.told.get(timeout=20) == 'up' and made.peer_address == other.address
        other.close()


def test_the_abandoned_one_is_told_of_once_a_night(peer, link, caplog):
    caplog.set_level('INFO', 'vmhost.link')
    made = link(first_delay=0.01)
    for _ in range(3):
        peer.accept()
        assert made.told.get(timeout=20) == 'up'
        made.abandon('it gives no proof')
        made.told.get(timeout=20)
    assert caplog.text.count('it gives no proof') == 1 and 'running' not in caplog.text
