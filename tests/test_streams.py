"""Input and output of commands by HTTP as they are: what curl does with them."""

import contextlib
import http.client
import os
import signal

import pytest
from agents import Agent
from helpers import halt

import hostclient
from faults import BadState, NoSuchCommand

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')


@pytest.fixture(scope='module')
def guest(host, tmp_path_factory):
    with Agent(tmp_path_factory.mktemp('guest'), host, 'one') as guest:
        yield guest


def ask(host, method, path, body=None, **headers):
    """(status, headers, body) of a request by TCP."""
    connection = http.client.HTTPConnection(*host.address.split(':'), timeout=20)
    with contextlib.closing(connection):
        headers.setdefault('Authorization', 'Bearer ' + host.token)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def test_exact_bytes_both_ways(host, guest):
    data = bytes(range(256)) * 100
    with host.api as api:
        cmd_id = api.runCmd('one', 'cat', [], {}, '', '', {'stdin': 'stream'})
        assert ask(host, 'POST', '/input/' + cmd_id, data)[::2] == (200, b'25600\n')
        assert ask(host, 'POST', '/input/%s?eof=1&offset=25599' % cmd_id, b'\xffend')[::2] == (200, b'4\n')
        assert api.waitCmd(cmd_id, 20)
    status, headers, body = ask(host, 'GET', '/output/%s?offset=250&length=25354' % cmd_id)
    assert (status, body) == (200, (data + b'end')[250:250 + 25354])
    assert (headers['Vmhost-Size'], headers['Vmhost-Eof']) == ('25603', '1')
    assert headers['Content-Type'] == 'application/octet-stream'
    assert ask(host, 'GET', '/output/%s?stream=err&timeout=1' % cmd_id)[2] == b''


@pytest.mark.parametrize('method, path, status, fault', [
    ('GET', '/output/20200101-000000-00000000', 404, '3'), ('POST', '/input/nothing', 404, '3'),
    ('GET', '/output/ID?stream=in', 400, '-32602'), ('GET', '/output/ID?offset=much', 400, '-32602'),
    ('GET', '/output/ID?offset=nan', 400, '-32602'), ('GET', '/output/ID?length=-1', 400, '-32602'),
    ('POST', '/input/ID', 409, '4'), ('POST', '/input/ID?offset=1e99', 400, '-32602'),
    ('GET', '/terminal/ID', 405, None), ('POST', '/terminal/ID', 405, None),
    ('POST', '/output/ID', 405, None), ('GET', '/input/ID', 405, None), ('GET', '/output/', 404, '3')])
def test_what_cannot_be_answered_says_why(host, guest, method, path, status, fault):
    cmd_id = host.run('one', 'true')['cmd-id']
    found, headers, body = ask(host, method, path.replace('ID', cmd_id), b'x' if method == 'POST' else None)
    assert (found, headers['Vmhost-Fault']) == (status, fault) and body


def test_who_may_not_ask(host):
    for path in '/output/x', '/input/x', '/terminal/x':
        method = 'GET' if path == '/output/x' else 'POST'
        assert ask(host, method, path, Authorization='Bearer no')[0] == 401
        assert ask(host, method, path, Origin='http://elsewhere.example')[0] == 403
        assert ask(host, method, path, Host='elsewhere.example')[0] == 403


def test_the_command_line_asks_so(host, guest):
    client = hostclient.Client(host.state)
    with host.api as api:
        cmd_id = api.runCmdOnAll('o*', 'cat', [], {}, '', '', {'stdin': 'stream'})
        key, = api.getCmdDetails(cmd_id)['executions']
        assert '@' in key and client.put_input(key, b'a\r\n\0', True, 0) == 4
        assert api.waitCmd(cmd_id, 20)
    assert client.output(key, 'out', 0, 100) == (b'a\r\n\0', True)
    with pytest.raises(BadState):
        client.put_input(key, b'more', False, 4)
    with pytest.raises(NoSuchCommand):
        client.output('no such thing/../%', 'out', 0, 100)
    assert client.call('agentInfo')['proto'] == 2          # the connection is still of use


def test_a_host_agent_that_hangs_is_told(host, guest, monkeypatch):
    monkeypatch.setattr(hostclient, 'UNHEARD', 0.2)
    monkeypatch.setattr(hostclient, 'SILENCE', 0.2)
    monkeypatch.setattr(hostclient, 'LOOK_UP', 0.05)
    client = hostclient.Client(host.state)
    with host.api as api:
        cmd_id = api.runCmd('one', 'sleep', ['600'], {}, '', '', {'stdin': 'stream'})
    assert client.call('waitCmd', cmd_id, 1) is False          # which only takes its time
    halt(host.process.pid)
    try:
        for ask in (lambda: client.call('agentInfo'), lambda: client.output(cmd_id, 'out', 0, 1),
                    lambda: client.put_input(cmd_id, bytes(2 ** 20), False, 0)):
            with pytest.raises(hostclient.NoHost, match='no host agent answers at .*(hangs|timed out)'):
                ask()
    finally:
        host.process.send_signal(signal.SIGCONT)
    assert client.call('signalCmd', cmd_id, 'KILL') is True
