"""GET /metrics: what Prometheus is told."""

import contextlib
import http.client
import os
import re

import pytest
from agents import Agent, Host

import hostmetrics

pytestmark = [pytest.mark.whole, pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]


def get(host, authorization):
    connection = http.client.HTTPConnection(*host.address.split(':'), timeout=20)
    with contextlib.closing(connection):
        connection.request('GET', '/metrics', headers={'Authorization': authorization})
        answer = connection.getresponse()
        return answer.status, answer.headers['Content-Type'], answer.read().decode()


def test_what_is_counted(tmp_path):
    with Host(tmp_path / 'host') as host, Agent(tmp_path / 'guest', host, 'one'):
        host.run('one', 'sh', '-c', 'exit 3')
        host.run('one', 'no-such-program')
        assert get(host, 'Bearer no')[0] == 401
        status, kind, text = get(host, 'Bearer ' + host.token)
    assert status == 200 and kind == hostmetrics.CONTENT_TYPE
    told = dict(line.rsplit(' ', 1) for line in text.splitlines() if not line.startswith('#'))
    assert told['vmhost_agents{state="alive"}'] == '1' and told['vmhost_agents{state="lost"}'] == '0'
    assert told['vmhost_commands_kept{state="exited"}'] == '1'
    assert told['vmhost_commands_kept{state="failed"}'] == '1'
    assert told['vmhost_commands_unfinished{state="running"}'] == '0'
    assert told['vmhost_broker_connected'] == '1' and float(told['vmhost_uptime_seconds']) > 0
    assert told['vmhost_agent_up{vm="one"}'] == '1' and 'untyped' not in text
    assert '# TYPE vmhost_broker_connections gauge\n' in text
    assert '# TYPE vmhost_broker_errors counter\n' in text
    counted = {name[len('vmhost_broker_'):] for name in told if name.startswith('vmhost_broker_')}
    assert counted == set(hostmetrics.COUNTED) | {'connected'}
    for line in text.splitlines():             # each is a comment, or a name, labels and a number
        assert re.match(r'# (HELP|TYPE) vmhost_\w+ .+$|vmhost_\w+(\{\w+="[^"]*"\})? [0-9.e+-]+$', line), line


def test_labels_are_escaped():
    assert hostmetrics.describe('x', 'gauge', 'X.', [({'a': 'q"\\\n'}, 1)])[2] == \
        'vmhost_x{a="q\\"\\\\\\n"} 1'
