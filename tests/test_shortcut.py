"""Shortcuts: their pieces, how a host comes by one, and that all goes on without it."""

import base64
import contextlib
import os
import select
import socket
import time

import pytest
from fake_guest import Guest, keyed
from helpers import wait_until
from stomp_client import Client, running
from test_guest_commands import guests  # noqa: F401
from test_guest_console import put, taken

import hostclient
from hostclient import OUTPUT
from protocol import Message
from shortcut import BEGIN, HEAD, INPUT, LONGEST, Shortcut
from stompbroker import Broker, Policy

pytestmark = [pytest.mark.once, pytest.mark.skipif(not hasattr(select, 'poll'), reason='it needs poll')]
KEY = b'k' * 32
TERMINAL = {'terminal': {'rows': 24, 'columns': 80}}


@pytest.fixture
def ends():
    """(the host's, the guest's, their sockets)."""
    here, there = socket.socketpair()
    with here, there:
        yield Shortcut(here, KEY, 'host'), Shortcut(there, KEY, 'guest'), here, there


def hear(end, timeout=10):
    """The next pieces, once there are any."""
    deadline = time.monotonic() + timeout
    while True:
        pieces = end.hear()
        if pieces:
            return pieces
        assert select.select([end], [], [], max(0.0, deadline - time.monotonic()))[0]


def test_pieces_come_as_they_were_said(ends):
    host, guest, _, _ = ends
    host.say(INPUT, 0, b'a')
    host.say(INPUT, 1, b'\0\xff\n')
    guest.say(OUTPUT, 2 ** 40, b'')
    assert hear(guest) == [(INPUT, 0, b'a'), (INPUT, 1, b'\0\xff\n')]
    assert hear(host) == [(OUTPUT, 2 ** 40, b'')] and host.hear() == []


def test_what_finds_no_room_is_sent_later_in_its_order(ends):
    host, guest, _, _ = ends
    for number in range(30):
        host.say(INPUT, number, bytes([number]) * 100000)
    assert host.unsent
    heard = []
    while len(heard) < 30:
        heard += hear(guest)
        host.flush()
    assert heard == [(INPUT, number, bytes([number]) * 100000) for number in range(30)] and not host.unsent


@pytest.mark.parametrize('change', ['another key', 'a byte', 'twice', 'left out', 'its own'])
def test_what_the_other_side_did_not_say_ends_it(ends, change):
    host, guest, here, there = ends
    said = []
    for number in range(2):
        host.say(INPUT, number, b'x')
        said.append(there.recv(1000))
    if change == 'another key':
        Shortcut(here, b'o' * 32, 'host').say(INPUT, 0, b'x')
    elif change == 'a byte':
        here.send(said[0].replace(b'x', b'y'))
    elif change == 'twice':
        here.send(said[0] + said[0])
    elif change == 'left out':
        here.send(said[1])
    else:
        guest.say(OUTPUT, 0, b'x')
        here.send(here.recv(1000))
    with pytest.raises(ConnectionAbortedError, match='not signed'):
        while True:
            guest.hear()


def test_a_piece_that_is_too_long_is_not_waited_for(ends):
    _, guest, here, _ = ends
    here.send(HEAD.pack(INPUT, 0, LONGEST + 1))
    with pytest.raises(ConnectionAbortedError, match='a piece of'):
        guest.hear()


def test_the_end_is_told(ends):
    host, guest, _, _ = ends
    host.close()
    with pytest.raises(ConnectionResetError):
        guest.hear()


class Taking(Policy):
    """Takes each connection that names a token."""

    def __init__(self):
        self.taken, self.closings = [], []

    def taking(self, headers):
        return self.taken.append if 'shortcut' in headers else None

    def closed(self, session):
        self.closings.append(session)


def test_a_broker_gives_a_connection_away():
    policy = Taking()
    with running(Broker(port=0, policy=policy)) as broker:
        with Client(broker.address) as client:
            client.say('CONNECT', 'accept-version:1.2', 'host:/', 'shortcut:t')
            wait_until(lambda: policy.taken)
            wait_until(lambda: broker.counters()['connections'] == 0)
            with policy.taken[0] as taken:
                client.socket.sendall(b'no STOMP\0')
                assert select.select([taken], [], [], 10)[0] and taken.recv(100) == b'no STOMP\0'
                taken.send(b'neither\n')
                assert client.socket.recv(100) == b'neither\n'
        with Client(broker.address) as other:
            other.connect('1.2')
        wait_until(lambda: len(policy.closings) == 1)      # the other's, which it was asked about


def test_whose_login_is_wrong_gets_no_connection_away():
    policy = Taking()
    with running(Broker(port=0, policy=policy, login='me', passcode='secret')) as broker:
        with Client(broker.address) as client:
            client.say('CONNECT', 'accept-version:1.2', 'host:/', 'shortcut:t', 'login:me', 'passcode:wrong')
            assert client.take().command == 'ERROR'
        assert not policy.taken


# --- a guest ---------------------------------------------------------------------------------

def test_a_guest_tells_by_its_shortcut_and_by_words_once_that_is_gone(guests):  # noqa: F811
    guest = guests()
    here, there = socket.socketpair()          # after the guest's fork server, which would keep it open
    host = Shortcut(here, KEY, 'host')
    guest.consoles._dial = lambda token: Shortcut(there, KEY, 'guest')
    guest.run('c', 'sh', '-c', 'stty raw -echo; echo ready; exec cat', terminal={})
    query(guest, **{'follow': 60, 'out-offset': 0})
    wait_until(lambda: told(guest) == b'ready\n')
    query(guest, shortcut='0' * 32)
    put(guest, 'c', 0, b'a')                   # the host has not begun yet
    wait_until(lambda: told(guest) == b'ready\na')
    host.say(BEGIN, 0)
    host.say(INPUT, 1, b'bcd')
    shown = b''
    while len(shown) < 3:
        for kind, offset, data in hear(host, 30):
            assert (kind, offset) == (OUTPUT, 7 + len(shown))
            shown += data
    assert shown == b'bcd'
    wait_until(lambda: taken(guest, 'c') == 4)
    host.close()
    put(guest, 'c', 4, b'e')
    wait_until(lambda: told(guest, 10) == b'e')
    guest.signal('c', 'KILL')
    assert guest.result('c')['out'] == 'ready\nabcde'


def query(guest, **keys):
    guest.commands.query(Message('', 'CMD_QUERY', {'cmd-id': 'c'}, keys))


def told(guest, since=0):
    """What words told of the output, from there on."""
    found = {message.number('out-offset'): message.text('out') for message in list(guest.said['c'])
             if message.word == 'CMD_STATUS' and message.get('out')}
    return ''.join(text for offset, text in sorted(found.items()) if offset >= since).encode()


# --- with a host, and a guest that shares no code with it --------------------------------------

class Feeding:
    """A command of a fake guest, which makes a shortcut for its input."""

    OPTIONS = {'stdin': 'stream'}

    def __init__(self, host, name):
        self.guest = Guest(host.broker_port, name).join()
        self.client = hostclient.Client(host.state)
        self.cmd_id = self.client.call('runCmd', name, 'cat', [], {}, '', '', self.OPTIONS)
        self.guest.hear('CMD_RUN')
        self.status(state='running', **{'in-offset': 0, 'out-size': 0})

    def status(self, **keys):
        self.guest.word('CMD_STATUS', headers={'cmd-id': self.cmd_id}, **keys)

    def make_shortcut(self, timeout=30):
        """As protocol.md says; gives the socket, on which the host has said what begins it."""
        headers, keys = self.guest.hear('CMD_QUERY', timeout)
        while 'shortcut' not in keys:
            headers, keys = self.guest.hear('CMD_QUERY', timeout)
        assert headers['cmd-id'] == self.cmd_id
        return self.dial(keys['shortcut'])

    def dial(self, token):
        """With that token."""
        self.key = keyed(self.guest.key, 'shortcut', token).digest()
        self.said = self.heard = 0
        way = socket.create_connection(('127.0.0.1', self.guest.port), 30)
        way.sendall(b'CONNECT\naccept-version:1.2\nhost:/\nshortcut:%b\n\n\0' % token.encode())
        return way

    def take(self, way):
        """A piece of the host's."""
        self.heard += 1
        head = receive(way, 13)
        data = receive(way, int.from_bytes(head[9:], 'big'))
        mac = keyed(self.key, 'host', '%d' % self.heard, '')
        mac.update(head + data)
        assert receive(way, 32).decode() == mac.hexdigest()[:32]
        return head[:1], int.from_bytes(head[1:9], 'big'), data

    def typed(self):
        """By words: {offset, data64}."""
        return self.guest.hear('CMD_INPUT')

    def close(self):
        self.guest.close()


class Typist(Feeding):
    """A person at its terminal."""

    OPTIONS = TERMINAL

    def __init__(self, host, name):
        super().__init__(host, name)
        self.line = self.client.terminal(self.cmd_id, 0)

    def dial(self, token):
        way = super().dial(token)
        assert self.take(way) == (b'b', 0, b'')
        return way

    def show(self, way, offset, data, key=None):
        self.said += 1
        piece = b'o' + offset.to_bytes(8, 'big') + len(data).to_bytes(4, 'big') + data
        mac = keyed(key or self.key, 'guest', '%d' % self.said, '')
        mac.update(piece)
        way.sendall(piece + mac.hexdigest()[:32].encode())

    def shown(self, length):
        """So much of what the person sees."""
        data, deadline = b'', time.monotonic() + 30
        while len(data) < length:
            assert select.select([self.line], [], [], max(0.0, deadline - time.monotonic()))[0], data
            data += b''.join(piece for kind, _, piece in self.line.take() if kind == OUTPUT)
        return data

    def close(self):
        self.line.close()
        super().close()


def receive(way, length):
    data = b''
    while len(data) < length:
        data += way.recv(length - len(data))
    return data


@pytest.fixture
def typist(host, request):
    with contextlib.closing(Typist(host, 'typist-%s' % os.urandom(4).hex())) as typist:
        yield typist


def test_keys_and_what_they_show_go_by_the_shortcut(typist):
    with typist.make_shortcut() as way:
        typist.line.put(0, b'ab')
        assert typist.take(way) == (b'i', 0, b'ab')
        typist.show(way, 0, b'AB')
        assert typist.shown(2) == b'AB'
        typist.line.put(2, b'c', True)
        assert typist.take(way) == (b'l', 2, b'c')
        typist.status(state='running', **{'in-offset': 3, 'in-eof': True, 'out-size': 3, 'out-offset': 2,
                                          'out': 'C'})
        assert typist.shown(1) == b'C'         # by a word, where the shortcut had ended
    assert typist.client.output(typist.cmd_id, 'out', 0, 10, 5).data == b'ABC'     # for others, too


def test_a_shortcut_that_breaks_costs_nothing(typist):
    with typist.make_shortcut() as way:
        typist.line.put(0, b'ab')
        assert typist.take(way) == (b'i', 0, b'ab')
    headers, keys = typist.typed()             # it may have been lost
    assert (headers['offset'], keys['data64']) == ('0', 'YWI=')
    typist.status(state='running', **{'in-offset': 2, 'out-size': 2, 'out-offset': 0, 'out': 'AB'})
    assert typist.shown(2) == b'AB'
    typist.line.put(2, b'c')
    assert typist.typed()[0]['offset'] == '2'


def test_what_a_guest_did_not_sign_is_not_shown(typist):
    with typist.make_shortcut() as way:
        typist.show(way, 0, b'forged', os.urandom(32))
        assert way.recv(100) == b''            # it is closed
    typist.status(state='running', **{'in-offset': 0, 'out-size': 2, 'out-offset': 0, 'out': 'ok'})
    assert typist.shown(2) == b'ok'


def test_who_says_too_much_is_read_more_slowly(typist):
    with typist.make_shortcut() as way:
        begin = time.monotonic()
        for number in range(700):              # 500 at once, then 100 a second
            typist.show(way, number, b'x')
        assert typist.shown(700) == b'x' * 700
        typist.line.put(0, b'k')
        assert typist.take(way) == (b'i', 0, b'k')
        typist.show(way, 700, b'.')
        assert typist.shown(1) == b'.' and time.monotonic() - begin > 1.5


def test_no_key_overtakes_words_that_are_on_their_way(typist):
    typist.line.put(0, b'a')
    assert typist.typed()[0]['offset'] == '0'
    with typist.make_shortcut():
        typist.line.put(1, b'b')
        assert typist.typed()[0]['offset'] == '1'


def test_a_token_is_good_for_one_connection_and_dies_with_the_line(host, typist):
    with typist.make_shortcut():
        pass
    _, keys = typist.guest.hear('CMD_QUERY', 40)
    while 'shortcut' not in keys:
        _, keys = typist.guest.hear('CMD_QUERY', 40)
    typist.line.close()
    wait_until(lambda: refuses(host, keys['shortcut']), 20)


def refuses(host, token):
    """Whether who comes with it is a client like all others, and not hung up on since the line just ends."""
    with Client(('127.0.0.1', host.broker_port)) as client:
        client.say('CONNECT', 'accept-version:1.2', 'host:/', 'shortcut:' + token)
        with contextlib.suppress(AssertionError):
            return client.take().command == 'CONNECTED'


MUCH = 256 * 1024              # bytes of input from which on it goes by a shortcut


@pytest.fixture
def feeding(host):
    with contextlib.closing(Feeding(host, 'feeding-%s' % os.urandom(4).hex())) as feeding:
        yield feeding


def begin_feeding(feeding):
    """(the shortcut, how much input was so_far): the first went by words."""
    assert feeding.client.put_input(feeding.cmd_id, bytes(MUCH), False, 0) == MUCH
    way = feeding.make_shortcut()
    assert feeding.typed()[0]['offset'] == '0'
    for so_far in range(MUCH, MUCH + 100):      # its end at the host comes by another thread
        feeding.status(state='running', **{'in-offset': so_far})
        assert feeding.client.put_input(feeding.cmd_id, b'x', False, so_far) == 1
        if select.select([way], [], [], 0.5)[0]:
            assert feeding.take(way) == (b'i', so_far, b'x')
            feeding.status(state='running', **{'in-offset': so_far + 1})
            return way, so_far + 1
    raise AssertionError('the shortcut is not used')


def test_much_input_goes_by_a_shortcut(feeding):
    way, so_far = begin_feeding(feeding)
    with way:
        data = os.urandom(MUCH)
        assert feeding.client.put_input(feeding.cmd_id, data, False, so_far) == MUCH
        assert feeding.take(way) == (b'i', so_far, data)
        assert feeding.client.put_input(feeding.cmd_id, b'.', True, so_far + MUCH) == 1
        assert feeding.take(way) == (b'l', so_far + MUCH, b'.')
        feeding.status(state='running', **{'in-offset': so_far + MUCH + 1, 'in-eof': True})


@pytest.mark.parametrize('how', ['it breaks', 'its other end hangs'])
def test_input_that_a_shortcut_did_not_bring_comes_by_words(feeding, how):
    way, so_far = begin_feeding(feeding)
    with way:
        data = os.urandom(MUCH)
        if how == 'it breaks':
            way.close()
        assert feeding.client.put_input(feeding.cmd_id, data, False, so_far) == MUCH
        headers, keys = feeding.typed()
        while headers['offset'] != str(so_far) or base64.b64decode(keys['data64']) != data:
            headers, keys = feeding.typed()    # what went before was not acknowledged


def test_little_input_makes_no_shortcut(feeding):
    for offset in range(3):
        assert feeding.client.put_input(feeding.cmd_id, b'x', False, offset) == 1
        assert feeding.typed()[0]['offset'] == str(offset)
        feeding.status(state='running', **{'in-offset': offset + 1})
    while True:
        with contextlib.suppress(AssertionError):
            _, keys = feeding.guest.hear('CMD_QUERY', 0.3)
            assert 'shortcut' not in keys
            continue
        break
