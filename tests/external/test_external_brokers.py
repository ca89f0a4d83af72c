"""The same host and guests on RabbitMQ and ActiveMQ, by configuration alone.

The tests of the spine that don't know what the broker is run here once more, on each of them. The
brokers run with what docs/broker.md shows.
"""

import os
import shutil
import signal
import socket

import pytest
from agents import Agent, Host
from brokers import GUEST, HOST, RabbitMQ, broker_section, make_certificate
from helpers import wait_until
from test_spine import (  # noqa: F401
    test_a_signal_is_no_exit_code,
    test_bytes_that_xml_can_not_carry,
    test_env_is_laid_over_the_guests_own,
    test_exit_codes_from_16_clients,
    test_names_and_ids,
    test_output_and_usage_of_a_running_command,
    test_stdin_as_text_bytes_and_file,
    test_the_result_of_a_program,
    test_timeout_leaves_no_process,
    test_what_can_not_start_fails_at_once,
)

from protocol import SERVER_COMMANDS, FrameReader, encode

pytestmark = [pytest.mark.slow, pytest.mark.once,
              pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]


@pytest.fixture
def exit_codes():
    """What the many at once are about is the host's own; here, that a broker carries them."""
    return list(range(0, 200, 1 if os.environ.get('VMHOST_FULL') else 6))


@pytest.fixture(scope='module')
def host(broker, tmp_path_factory):
    with Host(tmp_path_factory.mktemp('host'), broker.broker_keys(HOST)) as host:
        yield host


@pytest.fixture(scope='module')
def guest(broker, host, tmp_path_factory):
    with Agent(tmp_path_factory.mktemp('guest'), host, 'one', broker.broker_keys(GUEST)) as guest:
        yield guest


def test_the_api_says_which_broker(broker, host, api):
    shown = api.agentInfo()['broker']
    assert shown['embedded'] is False and shown['server'].startswith(broker.name)


def test_clocks_are_compared_though_brokers_stamp_messages(host, guest, api):
    assert abs(api.getVM('one')['clockOffset']) < 10


def test_multicast(broker, host, guest, api, tmp_path):
    agents = [Agent(tmp_path / name, host, name, broker.broker_keys(GUEST)) for name in ('m1', 'm2', 'm3')]
    try:
        for agent in agents:
            agent.start()
        cmd_id = api.runCmdOnAll('m*', 'sh', ['-c', 'echo $$'])
        assert len({result['out'] for result in host.results(cmd_id).values()}) == 3
        assert len(host.results(cmd_id)) == 3
    finally:
        for agent in agents:
            agent.stop()


def test_its_crash_and_restart_lose_nothing(broker, host, guest, api):
    """Commands that run while the broker is away, and one that is asked for meanwhile."""
    marks = os.path.join(guest.files, 'marks')
    gate = os.path.join(guest.files, 'gate')
    script = 'echo run >> %s; while [ ! -e %s ]; do sleep 0.1; done; echo done' % (marks, gate)
    before = [api.runCmd('one', 'sh', ['-c', script]) for _ in range(3)]
    wait_until(lambda: all(api.getCmdStatus(cmd_id, False)['state'] == 'running' for cmd_id in before), 30)
    broker.stop(signal.SIGKILL)
    wait_until(lambda: 'no connection to the broker' in host.log(), 60)
    during = api.runCmd('one', 'sh', ['-c', 'echo run >> %s; echo later' % marks])
    open(gate, 'w').close()
    broker.start()
    assert [host.results(cmd_id, 120)['out'] for cmd_id in before] == ['done\n'] * 3
    assert host.results(during, 120)['out'] == 'later\n'
    with open(marks) as file:
        assert file.read() == 'run\n' * 4
    os.remove(gate)
    os.remove(marks)


def answer_to(broker, user, frame):
    """The first frame that comes back for one that asks for a receipt."""
    reader = FrameReader(SERVER_COMMANDS, '1.2')
    with socket.create_connection(('127.0.0.1', broker.port), 20) as client:
        client.sendall(encode('CONNECT', {'accept-version': '1.2', 'host': '/', 'login': user['username'],
                                          'passcode': user['password']}, version='1.2'))
        client.sendall(frame)
        found = None
        while found is None or found.command == 'CONNECTED':
            data = client.recv(65536)
            assert data, 'closed without an answer'
            reader.feed(data)
            found = reader.next_frame() or found
            if found is not None and found.command == 'CONNECTED':
                found = reader.next_frame()
        return found.command


@pytest.mark.parametrize('command, destination, answer', [
    ('SEND', 'connections', 'RECEIPT'), ('SUBSCRIBE', 'connections', 'ERROR'),
    ('SEND', 'cmd_responses', 'RECEIPT'), ('SUBSCRIBE', 'cmd_responses', 'ERROR'),
    ('SEND', 'cmd_requests', 'ERROR'), ('SUBSCRIBE', 'cmd_requests', 'RECEIPT')])
def test_what_a_guest_may(broker, command, destination, answer):
    headers = {'destination': '/topic/' + destination, 'receipt': 'r'}
    if command == 'SUBSCRIBE':
        headers['id'] = '0'
    assert answer_to(broker, GUEST, encode(command, headers)) == answer


@pytest.mark.skipif(bool(RabbitMQ.missing()), reason=RabbitMQ.missing())
def test_tls(tmp_path):
    with RabbitMQ(tmp_path / 'broker', make_certificate(str(tmp_path)), True) as broker:
        with Host(tmp_path / 'host', broker.broker_keys(HOST)) as host:
            with Agent(tmp_path / 'guest', host, 'secure', broker.broker_keys(GUEST)):
                assert host.run('secure', 'echo', 'x' * 5000)['out'] == 'x' * 5000 + '\n'


@pytest.mark.skipif(not shutil.which('openssl'), reason='needs openssl')
def test_tls_of_the_embedded_broker(tmp_path):
    """As the page shows it; and nobody gets in without the password, or past another certificate."""
    make_certificate(str(tmp_path))
    files = {name: tmp_path / (name.partition('_')[0].replace('ca', 'cert') + '.pem')
             for name in ('cert_file', 'key_file', 'ca_file')}
    shown = broker_section('host.ini', 'Embedded')
    keys = dict(shown, host='127.0.0.1', **{name: files[name] for name in files if name in shown})
    with Host(tmp_path / 'host', keys) as host:
        joins = dict(broker_section('guest.ini', 'Embedded'), host='127.0.0.1', ca_file=files['ca_file'])
        with Agent(tmp_path / 'secure', host, 'secure', joins):
            assert host.run('secure', 'echo', 'x' * 5000)['out'] == 'x' * 5000 + '\n'
        for name, wrong, why in (('stranger', {'password': 'guessed'}, 'login or passcode is wrong'),
                                 ('trusting', {'ca_file': ''}, 'CERTIFICATE_VERIFY_FAILED')):
            stays_out(Agent(tmp_path / name, host, name, dict(joins, **wrong)), why)


def stays_out(agent, why):
    try:
        agent.start(wait=False)
        wait_until(lambda: why in agent.log(), 20)
        assert not agent.has_joined()
    finally:
        agent.stop()
