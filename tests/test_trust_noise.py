"""One guest's noise is its own trouble: another one's words get through, and the host grows within bounds.

How long they take is measured by bench/noise.py; here, that they come at all, on a busy machine, too.
"""

import contextlib
import json
import os
import socket
import sys

import pytest
from agents import TOP, Agent
from fake_guest import CONNECTIONS, RESPONSES, Guest
from helpers import wait_until
from test_chirp_hostile import HostileServer
from test_chirp_trust import trickle

sys.path.append(os.path.join(TOP, 'bench'))

import noise  # noqa: E402

pytestmark = [pytest.mark.once,
              pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='needs /proc')]


@pytest.fixture(scope='module')
def honest(host, tmp_path_factory):
    with Agent(tmp_path_factory.mktemp('guest'), host, 'honest') as agent:
        yield agent


@pytest.mark.parametrize('word', sorted(noise.WORDS))
def test_another_guest_is_heard(host, honest, api, word):
    memory, journal = noise.resident(host.process.pid), noise.journal_size(host)
    one = noise.Noise(host.broker_port, word)
    one.start()
    try:
        wait_until(lambda: one.said > {'large': 10, 'newcomer': 50}.get(word, 300), 30)
        for _ in range(10):
            assert api.ping('honest', 10) == 'PONG from honest'
        assert host.run('honest', 'echo', word)['out'] == word + '\n'
    finally:
        one.stop()
    assert noise.resident(host.process.pid) - memory < noise.MEMORY_TARGET
    assert noise.journal_size(host) - journal < noise.JOURNAL_TARGET


def test_a_first_frame_is_short(host, honest, api):
    """200 HELLOs of a megabyte: none is taken, nothing is kept."""
    memory = noise.resident(host.process.pid)
    for _ in range(200):
        with Guest(host.broker_port, 'giant') as giant:
            body = 'HELLO ' + json.dumps({'nonce': '0' * 32, 'chirp': {'port': 'x' * 10 ** 6}})
            try:
                giant.put(CONNECTIONS, {'id': 'giant'}, body)
                giant.take_end_or_error()
            except ConnectionError:
                continue
    assert noise.resident(host.process.pid) - memory < noise.MEMORY_TARGET
    assert 'giant' not in api.getNamesToIdsMapping().values()


def trickles(line):
    """The answers of a file server, as slow as it gets away with."""
    if line.startswith(b'pread'):
        return trickle()
    return b'' if len(line) == 65 else b'0\n1 2 33188 1 0 0 0 5000000 4096 8 0 0 0\n'


def test_file_servers_that_trickle_hold_up_no_others_output(host, honest, api):
    """As many as there were threads that fetch, and some more."""
    hello = b'yes\n' + b'00' * 32 + b'\nyes\nyes\nsecret\nx\n'
    result = {'state': 'exited', 'exitCodeOrSignal': 0, 'spool': '/x', 'out-size': 9000, 'out-offset': 9000}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(HostileServer(trickles, hello))
        for number in range(8):
            guest = stack.enter_context(Guest(host.broker_port, 'slow-%d' % number))
            guest.join(chirp={'port': server.address[1]})
            cmd_id = api.runCmd(guest.id, 'true')
            guest.hear('CMD_RUN')
            guest.word('CMD_RESULTS', headers={'cmd-id': cmd_id}, **result)
        wait_until(lambda: server.asked >= 4)
        cmd_id = api.runCmd('honest', 'sh', ['-c', 'yes | head -c 300000'])
        host.results(cmd_id)
        wait_until(lambda: any('.%s.' % cmd_id in name for name in os.listdir(os.path.join(
            host.state, 'output'))), 10)


def joined(host, id):
    """A guest that has joined; None where it is sent away."""
    try:
        return Guest(host.broker_port, id).join()
    except (OSError, AssertionError):
        return None


def test_10000_connections(host, honest, api):
    """All from the address of the honest ones, as in NAT mode: silent ones, then those of one known."""
    def count():
        return api.agentInfo()['broker']['counters']['connections']
    before = count()
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            for _ in range(100):
                stack.enter_context(socket.create_connection(('127.0.0.1', host.broker_port), 20))
            api.ping('honest', 10)
        wait_until(lambda: count() <= before + 64)
        # once they have had their second
        stack.enter_context(wait_until(lambda: joined(host, 'newcomer'), 30))
        wait_until(lambda: 'newcomer' in api.listRegisteredVMs())
    wait_until(lambda: count() <= before)
    with contextlib.ExitStack() as stack:
        known = stack.enter_context(Guest(host.broker_port, 'many-armed')).join()
        for _ in range(100):
            stack.enter_context(Guest(host.broker_port, 'many-armed', known.secret)).hello()
        wait_until(lambda: count() < before + 20)
        assert api.ping('honest', 10) == 'PONG from honest'
    assert host.log().count(' is sent away') + host.log().count(' goes: ') < 5


def test_what_a_guest_says_begins_no_line_of_the_log(host, honest, api):
    evil = 'x\n2026-01-01 00:00:00,000 INFO vmhost: forged\x1b[2J'
    with Guest(host.broker_port, 'writer') as writer:
        writer.hello(name=evil, host=evil, os=evil, version=evil, boot=evil, session=evil)
        for word in ('BYE', 'CMD_STATUS', 'CMD_RESULTS', 'NONSENSE ' + evil, evil):
            writer.word(word, headers={'cmd-id': 'x'}, reason=evil, state=evil, error=evil)
        writer.put(RESPONSES, {'from': 'writer', 'cmd-id': evil.replace('\n', ' ')}, evil)
        writer.put(CONNECTIONS, {'id': 'writer'}, 'HELLO ' + json.dumps({'nonce': evil}))
        before = api.agentInfo()['aint']
        writer.word('NONSENSE')
        wait_until(lambda: api.agentInfo()['aint'] > before)
    log = host.log()
    assert '\x1b' not in log
    assert not [line for line in log.splitlines() if line.startswith("2026-01-01 00:00:00,000")]
