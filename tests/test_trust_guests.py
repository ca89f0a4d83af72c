"""What a guest does where somebody else than its host answers: a stranger's broker, a host without proof.

The stranger has a whole broker, and says what it likes to whoever comes.
"""

import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import pytest
from agents import Agent, Host, Process
from fake_guest import RESPONSES, keyed, signature
from helpers import wait_until
from stomp_client import Client

import guestmachine
import guesttrust
import protocol
from protocol import CMD_REQUESTS, CONNECTIONS, Message
from stompbroker import Broker

pytestmark = [pytest.mark.ends, pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]
TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Stranger:
    """A broker, and somebody at it who plays the host for whoever says HELLO."""

    def __init__(self, port=0, host='127.0.0.1'):
        self.broker = Broker(host, port)
        self.broker.start()
        self.host = Client(self.broker.address)
        self.host.connect('1.2')
        for number, topic in enumerate((CONNECTIONS, RESPONSES)):
            self.host.subscribe(topic, id=str(number))

    def hear(self, wanted, timeout=30):
        """(headers, keys) of the next such word."""
        deadline = time.monotonic() + timeout
        while True:
            frame = self.host.take(max(0.1, deadline - time.monotonic()))
            word, _, text = frame.body.decode().partition(' ')
            if word == wanted:
                return frame, json.loads(text) if text else {}

    def say(self, body, to, **headers):
        lines = ['%s:%s' % (name.replace('_', '-'), value) for name, value in headers.items()]
        self.host.say('SEND', 'destination:' + CMD_REQUESTS, 'to:' + to, *lines, body=body.encode())

    def heard(self):
        """The words that came by now."""
        return [frame.body.split(b' ')[0].decode() for frame in self.host.before_now()]

    def close(self):
        self.host.close()
        self.broker.stop()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


class At:
    """Stands for a host in ``Agent``: a port alone."""

    def __init__(self, port):
        self.broker_port = port


@pytest.fixture
def stranger():
    with Stranger() as stranger:
        yield stranger


def guest_at(stranger, folder, **vm):
    return Agent(folder, At(stranger.broker.address[1]), 'one', **vm)


GREETINGS = {
    'as of 1.0': {'name': 'one', 'session': 's', 'max_frame': 2 ** 20},
    'with a proof of its own': {'nonce': '0' * 32, 'key': 'k', 'proof': '0' * 64, 'name': 'one'},
    'with nonsense': {'nonce': ['x'], 'proof': {}, 'key': 7}, 'refused': {'refused': 'go\n away\x1b[2J'}}


def test_a_host_without_proof_is_obeyed_in_nothing(tmp_path):
    """Four of them at once: each guest waits for some seconds before it comes back."""
    met = {}
    with contextlib.ExitStack() as stack:
        for number, greeting in enumerate(sorted(GREETINGS)):
            stranger = stack.enter_context(Stranger())
            agent = guest_at(stranger, tmp_path / str(number))
            stack.callback(agent.stop)
            met[greeting] = stranger, agent.start(wait=False)
        for greeting, (stranger, agent) in met.items():
            give_orders_without_proof(greeting, stranger, agent, tmp_path / 'mark')
        for stranger, agent in met.values():
            stranger.hear('HELLO', 90)         # it comes back, since there may be its host by then
            assert agent.log().count('not obeyed') == 1


def give_orders_without_proof(greeting, stranger, agent, mark):
    stranger.hear('HELLO')
    stranger.say('HELLO ' + json.dumps(GREETINGS[greeting]), 'one')
    for signed in ({}, {'seq': 1, 'mac': '0' * 32}):
        stranger.say('CMD_RUN', 'one', cmd_id='x', cmd='touch', args=json.dumps([str(mark)]), **signed)
        stranger.say('PING', 'one', ping_id='p', **signed)
    for _ in range(100):
        stranger.say('HELLO {"proof": []}', 'one')
    wait_until(lambda: 'not obeyed' in agent.log(), 20)
    wait_until(lambda: stranger.broker.counters()['connections'] == 1, 20)
    assert not set(stranger.heard()) - {'HELLO'} and not mark.exists()
    log = agent.log()
    assert '127.0.0.1:%d' % stranger.broker.address[1] in log and '\x1b' not in log
    assert log.count('AINT') <= 1
    assert 'vmhost 1.0 gives none' in log or greeting != 'as of 1.0'


@pytest.mark.once
def test_who_takes_the_hosts_place_gets_a_guest_that_does_nothing(tmp_path):
    """A local user on its port while it is away; or who is asked by ARP for its address."""
    with Host(tmp_path / 'host') as host:
        with Agent(tmp_path / 'guest', host, 'one') as agent:
            port = host.broker_port
            host.stop()
            with Stranger(port) as stranger:
                _, told = stranger.hear('HELLO', 60)
                assert 'secret' not in told and 'nonce' in told        # from then on it is never told again
                stranger.say('HELLO {"name": "one", "session": "s"}', 'one')
                stranger.say('CMD_RUN', 'one', cmd_id='x', cmd='touch',
                             args=json.dumps([str(tmp_path / 'mark')]))
                wait_until(lambda: 'not obeyed' in agent.log(), 20)
                assert set(stranger.heard()) <= {'HELLO'}
            with open(host.ini) as file:
                text = file.read().replace('port = 0', 'port = %d' % port, 1)
            with open(host.ini, 'w') as file:
                file.write(text)
            host.start()
            wait_until(agent.has_joined, 60)
            assert host.run('one', 'echo', 'back')['out'] == 'back\n'
            assert not (tmp_path / 'mark').exists()


def test_forged_repeated_and_reordered_words_of_a_host(stranger, tmp_path):
    """On a broker where everybody may say everything: the host is known, and another one is there, too."""
    secret = os.urandom(32)
    agent = guest_at(stranger, tmp_path / 'guest', secret=secret.hex(), beacon_interval=1).start(wait=False)
    try:
        _, told = stranger.hear('HELLO')
        assert 'secret' not in told            # one that is configured is never told
        assert told['secret-id'] == keyed(secret, 'id', 'one').hexdigest()[:16]
        nonces = 'one', told['nonce'], 'a' * 32
        stranger.say('HELLO {"nonce": "%s", "proof": "%s"}' % ('b' * 32, '0' * 64), 'one')     # a forger
        stranger.say('HELLO ' + json.dumps({'nonce': 'a' * 32, 'key': 'k', 'name': 'one', 'proof': keyed(
            secret, 'host', *nonces).hexdigest()}), 'one')
        key = keyed(secret, 'session', *nonces).digest()

        def ping(seq, ping_id, key=key, **changes):
            headers = {'from': 'host', 'to': 'one', 'ping-id': ping_id}
            mac = signature(key, 'host', str(seq), CMD_REQUESTS, headers, 'PING')
            headers = dict(dict(headers, seq=seq, mac=mac), **changes)
            stranger.host.say('SEND', 'destination:' + CMD_REQUESTS,
                              *['%s:%s' % item for item in headers.items()], body=b'PING')

        def answered():
            return stranger.hear('PONG')[0].get('ping-id')
        ping(3, 'third')
        ping(1, 'first')
        assert [answered(), answered()] == ['third', 'first']
        ping(3, 'third')                       # again
        ping(4, 'fourth', mac='0' * 32)
        ping(4, 'fourth', key=os.urandom(32))
        ping(5, 'fifth', **{'ping-id': 'sixth'})
        ping(200, 'far')
        ping(136, 'too late')
        ping(137, 'last one')
        assert [answered(), answered()] == ['far', 'last one']
        assert agent.log().count('dropped a word') == 1
        frame, _ = stranger.hear('STILL_ALIVE')
        own = {line.partition(':')[0]: line.partition(':')[2] for line in frame.lines}
        assert own['mac'] == signature(key, 'guest', own['seq'], CONNECTIONS, own, frame.body.decode())
    finally:
        agent.stop()


def test_who_ends_while_the_host_greets_says_bye(stranger, tmp_path):
    """The host knows it from its HELLO on, and would miss it."""
    secret = os.urandom(32)
    agent = guest_at(stranger, tmp_path / 'guest', secret=secret.hex()).start(wait=False)
    try:
        told = {}
        while 'chirp' not in told:
            _, told = stranger.hear('HELLO')
        os.kill(agent.process.pid, signal.SIGTERM)
        wait_until(lambda: not listens(told['chirp']['port']))      # its file server ends first
        nonces = 'one', told['nonce'], 'a' * 32
        stranger.say('HELLO ' + json.dumps({'nonce': 'a' * 32, 'key': 'k', 'name': 'one', 'proof': keyed(
            secret, 'host', *nonces).hexdigest()}), 'one')
        frame, _ = stranger.hear('BYE')
        assert frame.get('mac') and agent.process.wait(10) == 0
    finally:
        agent.stop()


@pytest.mark.parametrize('own, told', [(3600, 0.5), (0.5, 3600)])
def test_a_beacon_comes_as_often_as_the_guest_or_its_host_wants(stranger, tmp_path, own, told):
    """A host asks for what it can do with; who wants more is not slowed."""
    secret = os.urandom(32)
    agent = guest_at(stranger, tmp_path / 'guest', secret=secret.hex(), beacon_interval=own).start(wait=False)
    try:
        nonces = 'one', stranger.hear('HELLO')[1]['nonce'], 'a' * 32
        stranger.say('HELLO ' + json.dumps({
            'nonce': 'a' * 32, 'key': 'k', 'name': 'one', 'beacon_interval': told,
            'proof': keyed(secret, 'host', *nonces).hexdigest()}), 'one')
        for _ in range(3):
            stranger.hear('STILL_ALIVE')
    finally:
        agent.stop()


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(('127.0.0.1', port)) == 0


def test_one_session_after_another(tmp_path):
    """The guest's part by itself: words of the session before are still heard, those of two before not."""
    class Secret:
        value, may_be_told, host_key = bytes(32), False, ''

        def pin(self, key):
            self.host_key = key
    secret, now = Secret(), [0.0]
    trust = guesttrust.HostTrust('one', secret, lambda: now[0])
    trust.connected()

    def greet(host_nonce):
        nonces = 'one', trust.hello()['nonce'], host_nonce
        assert trust.greeted(Message('', 'HELLO', {}, {
            'nonce': host_nonce, 'key': 'k', 'proof': protocol.host_proof(secret.value, *nonces)}))
        return protocol.Signatures(protocol.session_key(secret.value, *nonces), 'host')

    def is_heard(session):
        try:
            trust.check(CMD_REQUESTS, session.sign(CMD_REQUESTS, {'to': 'one'}, b'PING'), b'PING')
            return True
        except protocol.Untrusted:
            return False
    sessions = [greet(digit * 32) for digit in '123']
    assert [is_heard(session) for session in sessions] == [False, True, True] and secret.host_key == 'k'
    trust.connected()
    assert not any(map(is_heard, sessions)) and not trust.is_proved
    now[0] = 2.9
    assert trust.verdict(True)[0] == ''
    now[0] = 3.1
    assert 'orders' in trust.verdict(True)[0]


def test_a_silent_broker_is_left_where_there_is_another_address():
    now = [0.0]
    trust = guesttrust.HostTrust('one', None, lambda: now[0])
    trust.connected()
    now[0] = 10.1
    assert trust.verdict(True) == ('', float('inf')) and 'no host greets' in trust.verdict(False)[0]


# --- in a network of its own ---

def may_make_networks():
    made = subprocess.call('ip netns add vmhost-probe && ip netns del vmhost-probe', shell=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) if os.getuid() == 0 else 1
    return made == 0


STRANGER = '''
import sys, json, time
sys.path[:0] = [%r, %r]
from test_trust_guests import Stranger
with Stranger(61613, '10.99.0.1') as stranger:
    print('up', flush=True)
    while True:
        _, told = stranger.hear('HELLO', 1000)
        stranger.say('HELLO {"name": "one", "session": "s"}', 'one')
        stranger.say('CMD_RUN', 'one', cmd_id='x', cmd='touch', args=json.dumps([sys.argv[1]]))
        print(told.get('secret'), flush=True)
''' % (TOP, os.path.join(TOP, 'tests'))


@pytest.mark.once
@pytest.mark.skipif(not may_make_networks(), reason='needs network namespaces')
def test_the_default_gateways_broker_commands_nobody(tmp_path):
    """And what it is told at the first use isn't what the host is told, at the next address."""
    names = ['vmhost-gate-%d' % os.getpid(), 'vmhost-lap-%d' % os.getpid()]
    gate, laptop = (['ip', 'netns', 'exec', name] for name in names)
    with contextlib.ExitStack() as stack:
        for name in names:
            subprocess.check_call(['ip', 'netns', 'add', name])
            stack.callback(subprocess.call, ['ip', 'netns', 'del', name])
        for card, network in ('eth', '10.99.0'), ('private', '10.98.0'):
            subprocess.check_call(['ip', 'link', 'add', card, 'netns', names[0], 'type', 'veth', 'peer',
                                   'name', card, 'netns', names[1]])
            for number, name in enumerate(names, 1):
                for words in ('addr add %s.%d/24 dev %s' % (network, number, card), 'link set %s up' % card,
                              'link set lo up'):
                    subprocess.check_call(['ip', '-n', name] + words.split())
        subprocess.check_call(['ip', '-n', names[1], 'route', 'add', 'default', 'via', '10.99.0.1'])
        mark = tmp_path / 'mark'
        there = subprocess.Popen(gate + [sys.executable, '-c', STRANGER, str(mark)], stdout=subprocess.PIPE)
        stack.callback(there.stdout.close)
        stack.callback(there.wait)
        stack.callback(there.kill)
        assert there.stdout.readline() == b'up\n'
        agent = within(laptop, Process(tmp_path / 'guest', 'vmguest', {
            'VM': {'id': 'one', 'state_dir': str(tmp_path / 'state')}}))
        host = within(gate, Process(tmp_path / 'host', 'vmhost', {
            'Broker': {'host': '10.98.0.1'}, 'Hypervisor': {'hypervisor': 'none'}}))
        with host, agent:
            if guestmachine.is_virtual():
                secret = there.stdout.readline().decode().strip()
                wait_until(lambda: 'not obeyed' in agent.log(), 30)
                assert not re.search('joined the host at 10.99', agent.log())
                wait_until(lambda: 'joined the host at 10.98.0.1' in agent.log(), 30)
                assert len(secret) == 64 and pinned(host, 'one') not in ('', secret)
            else:
                wait_until(lambda: 'no broker to join' in agent.log(), 30)
        assert not mark.exists()


def within(network, process):
    words = process.words()
    process.words = lambda: network + words
    return process


def pinned(host, id):
    """The secret by which a host knows a guest, from its journal."""
    path = os.path.join(host.folder, 'vmhost-state', 'journal.sqlite')
    with contextlib.closing(sqlite3.connect(path)) as journal:
        return journal.execute('SELECT secret FROM secrets WHERE holder = ?', (id,)).fetchone()[0]
