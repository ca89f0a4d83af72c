"""Who is in between: hears all that host and guest say, and may drop, alter, repeat and add what it likes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import xmlrpc.client

import pytest
from agents import TOP, Agent, Process
from cutting import CuttingProxy
from fake_guest import Guest
from helpers import wait_until
from test_trust_guests import may_make_networks

from protocol import CLIENT_COMMANDS, SERVER_COMMANDS, FrameReader, encode

pytestmark = [pytest.mark.whole, pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]


class Between(CuttingProxy):
    """Passes on what ``mangle(frame)`` makes of each frame; remembers the signed ones."""

    def __init__(self, server):
        self.mangle = lambda frame: [frame]
        self.signed = {'up': [], 'down': []}
        super().__init__(server)

    def _pass(self, source, target, way, number):
        reader = FrameReader(CLIENT_COMMANDS if way == 'up' else SERVER_COMMANDS, '1.2')
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b''):
                reader.feed(data)
                for frame in iter(reader.next_frame, None):
                    self.signed[way] += [frame] * ('mac' in frame.headers)
                    self.say(target, *self.mangle(frame))
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(2)

    def say(self, target, *frames):
        target.sendall(b''.join(encode(*frame) for frame in frames))

    def again(self, way, frames):
        """Says frames once more on the newest connection."""
        near, far = self.connections[-1]
        self.say(far if way == 'up' else near, *frames)


@pytest.fixture(scope='module')
def between(host):
    with Between(('127.0.0.1', host.broker_port)) as between:
        yield between
        for index in range(len(between.connections)):
            between.end(index)


@pytest.fixture(scope='module')
def guest(host, between, tmp_path_factory):
    """One that met its host before."""
    keys = {'port': between.address[1], 'heartbeat': 0}
    with Agent(tmp_path_factory.mktemp('guest'), host, 'one', keys) as guest:
        yield guest


def is_word(frame, word):
    return frame.body.split(b' ')[0] == word.encode()


def altering(word, headers=(), **keys):
    """Says each such word altered before it says it as it was."""
    def mangle(frame):
        if not is_word(frame, word):
            return [frame]
        altered = dict(json.loads(frame.body.partition(b' ')[2].decode() or '{}'), **keys)
        body = ('%s %s' % (word, json.dumps(altered))).encode()
        return [frame._replace(headers=dict(frame.headers, **dict(headers)), body=body), frame]
    return mangle


def cut(between):
    """Ends the connection, and waits for the next one."""
    connections = len(between.connections)
    between.end(-1)
    wait_until(lambda: len(between.connections) > connections, 30)


def answers(api):
    try:
        return api.ping('one', 1)
    except xmlrpc.client.Fault:
        return None


def untrusted(api):
    return api.agentInfo()['untrusted']


def test_an_altered_command_is_not_run(host, guest, between, tmp_path):
    mark = str(tmp_path / 'mark')
    for change in ({'args': json.dumps([mark])}, {'cmd': 'touch', 'user': 'root'}, {'cmd-id': 'other'}):
        between.mangle = altering('CMD_RUN', change)
        assert host.run('one', 'echo', 'as it was')['out'] == 'as it was\n'
    between.mangle = altering('CMD_RUN', args=[mark], cmd='touch')
    assert host.run('one', 'echo', 'as it was')['out'] == 'as it was\n'
    assert not os.path.exists(mark) and 'dropped a word' in guest.log()


def test_an_altered_result_is_not_taken(host, guest, between, api):
    before = untrusted(api)
    between.mangle = altering('CMD_RESULTS', exitCodeOrSignal=66, out='forged')
    results = host.run('one', 'echo', 'honest')
    assert (results['out'], results['exitCodeOrSignal']) == ('honest\n', 0) and untrusted(api) > before


def test_what_is_said_three_times_is_done_once(host, guest, between, api, tmp_path):
    between.mangle = lambda frame: [frame] * (3 if 'mac' in frame.headers else 1)
    counted = tmp_path / 'counted'
    for number in range(3):
        host.run('one', 'sh', '-c', 'echo %d >> %s' % (number, counted))
    assert counted.read_text() == '0\n1\n2\n' and api.ping('one') == 'PONG from one'


def test_what_is_added_is_dropped(host, guest, between, api, tmp_path):
    between.mangle = lambda frame: [frame]
    running = api.runCmd('one', 'sleep', ['60'])
    wait_until(lambda: api.getCmdStatus(running)['state'] == 'running')
    down, up = between.signed['down'][-1], between.signed['up'][-1]
    before = untrusted(api)
    for command in (b'CMD_SIGNAL', b'CMD_ACK', b'BYE'):
        headers = dict(down.headers, **{'cmd-id': running, 'signal': 'KILL'})
        between.again('down', [down._replace(headers=headers, body=command)])
    for body in (b'CMD_RESULTS {"state": "exited"}', b'BYE', b'CMD_STATUS {"state": "unknown"}'):
        headers = dict(up.headers, **{'cmd-id': running, 'seq': '9999'})
        between.again('up', [up._replace(headers=headers, body=body)])
    wait_until(lambda: untrusted(api) >= before + 3)
    assert api.ping('one') == 'PONG from one' and api.getCmdStatus(running)['state'] == 'running'
    api.signalCmd(running, 'KILL')
    assert host.results(running)['state'] == 'signaled'


def test_words_of_an_earlier_session_are_nothing_in_a_later_one(host, guest, between, api, tmp_path):
    between.mangle = lambda frame: [frame]
    counted = tmp_path / 'counted'
    host.run('one', 'sh', '-c', 'echo once >> %s' % counted)
    said = {way: list(frames) for way, frames in between.signed.items()}
    cut(between)
    wait_until(lambda: answers(api), 30)
    before = untrusted(api)
    for way in 'down', 'up':
        between.again(way, said[way])
    wait_until(lambda: untrusted(api) >= before + len(said['up']), 20)
    assert host.run('one', 'echo', 'still there')['out'] == 'still there\n'
    assert counted.read_text() == 'once\n'


def test_a_greeting_said_again_begins_no_session_anew(host, guest, between, api):
    """Its words would be good once more, and the guest's own would count from 1 again."""
    greetings = []

    def mangle(frame):
        greetings.extend([frame] * (is_word(frame, 'HELLO') and b'"proof"' in frame.body))
        return [frame]
    between.mangle = mangle
    cut(between)
    wait_until(lambda: answers(api), 30)
    said = len(between.signed['down'])
    running = api.runCmd('one', 'sleep', ['60'])
    wait_until(lambda: api.getCmdStatus(running)['state'] == 'running')
    api.signalCmd(running, 'STOP')
    api.signalCmd(running, 'CONT')
    wait_until(lambda: api.getCmdStatus(running)['state'] == 'running')
    between.again('down', greetings[-1:] + between.signed['down'][said:-1])
    for _ in range(5):
        assert api.ping('one') == 'PONG from one'
    assert api.getCmdStatus(running)['state'] == 'running'         # not stopped by the second STOP
    api.signalCmd(running, 'KILL')
    assert host.results(running)['state'] == 'signaled'


def test_an_altered_hello_is_put_right_by_a_signed_one(host, guest, between, api):
    """Who the guest is was pinned before; what it says of itself it says again, signed."""
    between.mangle = lambda frame: [frame] if 'mac' in frame.headers else altering(
        'HELLO', chirp={'port': 1}, name='stolen', boot='x')(frame)[:1]
    cut(between)
    wait_until(lambda: between.signed['down'] and answers(api), 30)
    assert api.getNamesToIdsMapping() == {'one': 'one'} and api.getVM('one')['facts']['chirp']['port'] > 1


def test_a_challenge_that_is_passed_on_opens_nothing(host, guest, api, tmp_path):
    """Another guest has the host connect to its own file server, which is the first one's."""
    (tmp_path / 'file').write_text('secret')
    port = api.getVM('one')['facts']['chirp']['port']
    with CuttingProxy(('127.0.0.1', port)) as passing, Guest(host.broker_port, 'two') as two:
        two.join(chirp={'port': passing.address[1]})
        wait_until(lambda: 'two' in api.listRegisteredVMs())
        out, err, status = api.cpFileToVM('two', str(tmp_path / 'file'), 'taken')
        assert status != 0 and passing.up > 0 and 'another secret' in err, (out, err)
        assert api.cpFileFromVM('two', '/', str(tmp_path / 'back'))[2] != 0
    assert os.listdir(guest.files) == []


# --- a neighbour who takes the host's address, in networks of their own ---

NEIGHBOUR = '''
import socket, sys, threading, time
sys.path[:0] = [%r, %r]
from test_trust_guests import Stranger

def claim():
    """The host's address is at this card: an answer to a question that nobody asked, again and again."""
    card = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    card.bind(('eth', 0))
    mac, ip = card.getsockname()[4], socket.inet_aton('10.98.0.1')
    head = b'\\xff' * 6 + mac + b'\\x08\\x06\\0\\x01\\x08\\0\\x06\\x04\\0\\x02'
    answer = head + mac + ip + b'\\xff' * 6 + ip
    while True:
        card.send(answer)
        time.sleep(0.1)

threading.Thread(target=claim, daemon=True).start()
with Stranger(61613, '10.98.0.1') as stranger:
    while True:
        _, told = stranger.hear('HELLO', 1000)
        print('told' if 'secret' in told else 'asked', flush=True)
        stranger.say('HELLO {"name": "one", "session": "s"}', 'one')
        stranger.say('CMD_RUN', 'one', cmd_id='x', cmd='touch', args='["%%s"]' %% sys.argv[1])
''' % (TOP, os.path.join(TOP, 'tests'))


@pytest.mark.slow
@pytest.mark.skipif(not may_make_networks(), reason='needs network namespaces')
def test_a_neighbour_who_takes_the_hosts_address_commands_nobody(tmp_path):
    """By ARP, as anybody on the same network can."""
    names = {role: 'vmhost-%s-%d' % (role, os.getpid()) for role in ('switch', 'host', 'guest', 'other')}
    mark = tmp_path / 'mark'

    def inside(role, process):
        words = process.words()
        process.words = lambda: ['ip', 'netns', 'exec', names[role]] + words
        return process
    with contextlib.ExitStack() as stack:
        def ip(*words):
            subprocess.check_call(['ip'] + ' '.join(words).split())
        for name in names.values():
            ip('netns add', name)
            stack.callback(subprocess.call, ['ip', 'netns', 'del', name])
        ip('-n', names['switch'], 'link add switch type bridge')
        ip('-n', names['switch'], 'link set switch up')
        for role, address in ('host', '10.98.0.1/24'), ('guest', '10.98.0.2/24'), ('other', '10.98.0.1/24'):
            ip('link add eth netns', names[role], 'type veth peer name', role, 'netns', names['switch'])
            ip('-n', names['switch'], 'link set', role, 'master switch up')
            ip('-n', names[role], 'link set lo up')
            ip('-n', names[role], 'addr add', address, 'dev eth')
            if role != 'other':
                ip('-n', names[role], 'link set eth up')
        keys = {'Broker': {'host': '10.98.0.1'}, 'Hypervisor': {'hypervisor': 'none'}}
        host = stack.enter_context(inside('host', Process(tmp_path / 'host', 'vmhost', keys)))
        wait_until(lambda: 'vmhost 1' in host.log(), 20)
        agent = inside('guest', Process(tmp_path / 'guest', 'vmguest', {
            'Broker': {'host': '10.98.0.1', 'heartbeat': 1},
            'VM': {'id': 'one', 'state_dir': str(tmp_path / 'state')}}))
        stack.enter_context(agent)
        wait_until(lambda: 'joined the host' in agent.log(), 20)
        ip('-n', names['other'], 'link set eth up')
        there = subprocess.Popen(['ip', 'netns', 'exec', names['other'], sys.executable, '-c', NEIGHBOUR,
                                  str(mark)], stdout=subprocess.PIPE)
        stack.callback(there.stdout.close)
        stack.callback(there.wait)
        stack.callback(there.send_signal, signal.SIGKILL)
        assert there.stdout.readline() == b'asked\n'           # the secret is told to nobody any more
        wait_until(lambda: 'not obeyed' in agent.log(), 30)
        there.kill()
        ip('-n', names['other'], 'link set eth down')
        wait_until(lambda: agent.log().count('joined the host') > 1, 60)
        assert not mark.exists()
