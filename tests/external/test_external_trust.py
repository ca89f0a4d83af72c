"""On RabbitMQ and ActiveMQ: somebody who has the broker's own login, and may hear and say everything."""

import json
import os
import time

import pytest
from agents import Agent, Host
from brokers import GUEST, HOST
from fake_guest import CONNECTIONS, REQUESTS, RESPONSES, Guest
from helpers import wait_until
from stomp_client import Client

pytestmark = [pytest.mark.slow, pytest.mark.once,
              pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]


@pytest.fixture(scope='module')
def host(broker, tmp_path_factory):
    with Host(tmp_path_factory.mktemp('host'), broker.broker_keys(HOST), vm_gc_grace=300) as host:
        yield host


@pytest.fixture(scope='module')
def guest(broker, host, tmp_path_factory):
    keys = dict(broker.broker_keys(GUEST), username=HOST['username'], password=HOST['password'])
    with Agent(tmp_path_factory.mktemp('guest'), host, 'one', keys) as guest:
        yield guest


LOGIN = 'login:' + HOST['username'], 'passcode:' + HOST['password'], 'host:/', 'accept-version:1.2'


class Spy(Client):
    """Hears all that is said, and says it again as it likes."""

    def __init__(self, broker):
        super().__init__(('127.0.0.1', broker.port))
        self.connect(None, *LOGIN)
        for number, topic in enumerate((CONNECTIONS, REQUESTS, RESPONSES)):
            self.subscribe(topic, id=str(number))

    def put(self, topic, lines, body):
        self.say('SEND', 'destination:' + topic, 'content-length:%d' % len(body), *lines, body=body)

    def hear(self, word, timeout=30):
        deadline = time.monotonic() + timeout
        while True:
            frame = self.take(max(0.1, deadline - time.monotonic()))
            if frame.command == 'MESSAGE' and frame.body.split(b' ')[0] == word:
                return frame

    def repeat(self, frame):
        own = [line for line in frame.lines if line.partition(':')[0] not in (
            'destination', 'subscription', 'message-id', 'ack', 'content-length', 'expires', 'priority',
            'timestamp', 'redelivered', 'persistent')]
        self.put(frame.get('destination').replace('\\c', ':'), own, frame.body)


@pytest.fixture
def spy(broker):
    with Spy(broker) as spy:
        yield spy


def untrusted(api):
    return api.agentInfo()['untrusted']


@pytest.mark.parametrize('args, env, path', [
    ([], {}, ''), (['a:b\\c', '', ' x ', 'ü\n"\t'], {'A': 'b: \\n'}, ''), (['x' * 9000], {}, 'sub folder')])
def test_what_is_said_arrives_as_it_was_signed(host, guest, api, args, env, path):
    """Brokers escape, trim and add; empty headers, colons, backslashes and spaces must live through that."""
    os.makedirs(os.path.join(guest.files, 'sub folder'), exist_ok=True)
    results = host.results(api.runCmd('one', 'printf', ['%s|'] + args, env, path), 40)
    assert results['out'] == ''.join(arg + '|' for arg in args or [''])


def test_a_command_is_run_for_the_host_alone(host, guest, spy, api, tmp_path):
    mark = tmp_path / 'mark'
    args = json.dumps([str(mark)]).replace(':', '\\c')
    lines = ['to:one', 'from:host', 'cmd-id:forged', 'cmd:touch', 'args:' + args]
    spy.put(REQUESTS, lines, b'CMD_RUN')
    spy.put(REQUESTS, lines + ['seq:999', 'mac:' + '0' * 32], b'CMD_RUN')
    greeting = {'nonce': '0' * 32, 'key': 'k', 'proof': '0' * 64, 'name': 'one'}
    spy.put(REQUESTS, ['to:one'], b'HELLO ' + json.dumps(greeting).encode())
    counted = tmp_path / 'counted'
    assert host.results(api.runCmd('one', 'sh', ['-c', 'echo once >> %s' % counted]), 40)['state'] == 'exited'
    run = spy.hear(b'CMD_RUN')
    while run.get('seq') in (None, '999'):
        run = spy.hear(b'CMD_RUN')
    spy.repeat(run)
    spy.repeat(run._replace(lines=[line if not line.startswith('seq') else 'seq:500' for line in run.lines]))
    assert host.run('one', 'echo', 'still there')['out'] == 'still there\n'
    assert counted.read_text() == 'once\n' and not mark.exists()
    assert 'not obeyed' not in guest.log()


def test_a_result_is_the_guests_alone(host, guest, spy, api):
    cmd_id = api.runCmd('one', 'sh', ['-c', 'sleep 2; echo honest'])
    spy.hear(b'CMD_RUN')
    before = untrusted(api)
    forged = {'cmd-id': cmd_id, 'state': 'exited', 'finished': True, 'exitCodeOrSignal': 66}
    body = json.dumps(forged).encode()
    for lines in ([], ['seq:50', 'mac:' + '0' * 32]):
        spy.put(RESPONSES, ['from:one', 'id:one'] + lines, b'CMD_RESULTS ' + body)
    status = {'boot': 'x', 'session': 'x', 'cmds': {}, 'nonce': '0' * 32}
    spy.put(CONNECTIONS, ['from:one', 'id:one', 'ip:6.6.6.6'], b'HELLO ' + json.dumps(status).encode())
    spy.put(CONNECTIONS, ['from:one', 'id:one'], b'BYE')
    wait_until(lambda: untrusted(api) >= before + 3, 20)
    assert host.results(cmd_id)['out'] == 'honest\n' and api.getVM('one')['ip'] != '6.6.6.6'
    spy.repeat(spy.hear(b'CMD_RESULTS'))
    assert api.ping('one') == 'PONG from one'


def test_a_second_guest_is_its_own(broker, host, guest, api):
    with Guest(broker.port, 'two', login=LOGIN) as two:
        two.join()
        wait_until(lambda: 'two' in api.listRegisteredVMs(), 20)
        two.put(RESPONSES, dict(two.signed('PONG')[0], **{'from': 'one'}), 'PONG')
        cmd_id = api.runCmdOnAll('*', 'echo', ['all'])
        headers, _ = two.hear('CMD_RUN')
        assert headers['cmd-id'] == cmd_id
        two.word('CMD_RESULTS', headers={'cmd-id': cmd_id}, state='exited', finished=True, exitCodeOrSignal=0)
        assert {key.partition('@')[2] for key in host.results(cmd_id, 40)} == {'one', 'two'}


def test_a_multicast_to_many_guests(broker, host, guest, api):
    """Each hears what is for the others, too: four times as many have sixteen times as much to do."""
    crowd, many = [], 200 if os.environ.get('VMHOST_FULL') else 50
    try:
        for number in range(many):
            crowd.append(Guest(broker.port, 'crowd-%d' % number, login=LOGIN).join())
        wait_until(lambda: len(api.listRegisteredVMs()) >= many, 60)
        cmd_id = api.runCmdOnAll('crowd-*', 'true')
        for one in crowd:
            one.hear('CMD_RUN')
            one.word('CMD_RESULTS', headers={'cmd-id': cmd_id}, state='exited', exitCodeOrSignal=0)
        assert len(host.results(cmd_id, 90)) == many
    finally:
        for one in crowd:
            one.close()
