"""Programs that somebody talks to: input, terminals, output as it is written. Real host, real guests."""

import hashlib
import os
import threading
import time
import xmlrpc.client

import pytest
from agents import Agent, Host
from brokers import free_port
from helpers import fault_of, wait_until

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')


@pytest.fixture(scope='module')
def host(tmp_path_factory):
    with Host(tmp_path_factory.mktemp('host')) as host:
        yield host


@pytest.fixture(scope='module')
def guest(host, tmp_path_factory):
    with Agent(tmp_path_factory.mktemp('guest'), host, 'one') as guest:
        yield guest


@pytest.fixture
def api(host, guest):
    with host.api as api:
        yield api


def begin(api, *words, **options):
    return api.runCmd('one', words[0], list(words[1:]), {}, '', '', options)


def put_all(api, cmd_id, data, eof=True):
    """Puts all of it, as fast as it is taken."""
    at = 0
    while at < len(data) or eof:
        piece = data[at:at + 512 * 1024]
        is_last = at + len(piece) == len(data)
        taken = api.putCmdInput(cmd_id, piece, eof and is_last)
        at += taken
        if is_last and taken == len(piece):
            return


def output(api, cmd_id, until, timeout=10):
    """What a command wrote, as it is followed, until that is in it."""
    text, deadline = b'', time.monotonic() + timeout
    while until not in text:
        assert time.monotonic() < deadline, text
        part = api.getCmdOutput(cmd_id, 'out', len(text), 65536, 2)
        text += part['data'].data
        assert not part['eof'] or until in text, text
    return text


# --- input ---

def test_input_that_comes_bit_by_bit(api):
    cmd_id = begin(api, 'cat', stdin='stream')
    for n in range(3):
        assert api.putCmdInput(cmd_id, b'line %d\n' % n) == 7
        output(api, cmd_id, b'line %d\n' % n)
    assert api.putCmdInput(cmd_id, b'', True) == 0
    assert api.waitCmd(cmd_id, 10)
    assert api.getCmdResults(cmd_id)['out'] == 'line 0\nline 1\nline 2\n'


def test_input_is_whole_in_bounded_memory(host, api):
    data = os.urandom(2 ** 20) * 40
    cmd_id = begin(api, 'sha256sum', stdin='stream')
    put_all(api, cmd_id, data)
    assert api.waitCmd(cmd_id, 30)
    assert api.getCmdResults(cmd_id)['out'].split()[0] == hashlib.sha256(data).hexdigest()


def test_a_program_that_does_not_read_takes_no_more_than_fits(api):
    cmd_id = begin(api, 'sleep', '600', stdin='stream')
    total = 0
    while total < 16 * 2 ** 20:
        taken = api.putCmdInput(cmd_id, bytes(2 ** 20))
        total += taken
        if not taken:
            break
    assert 2 ** 16 < total < 4 * 2 ** 20
    api.signalCmd(cmd_id, 'KILL')
    assert api.waitCmd(cmd_id, 10)
    assert fault_of(api.putCmdInput, cmd_id, b'x').faultCode == 4


def test_what_was_put_before_is_not_taken_twice(api):
    cmd_id = begin(api, 'cat', stdin='stream')
    for _ in range(2):
        assert api.putCmdInput(cmd_id, b'abc', False, 0) == 3
    assert api.putCmdInput(cmd_id, b'bcdef', False, 1) == 5
    assert fault_of(api.putCmdInput, cmd_id, b'x', False, 100).faultCode == 4
    assert api.getCmdStatus(cmd_id, False)['inOffset'] == 6
    for _ in range(2):
        assert api.putCmdInput(cmd_id, b'f!', True, 5) == 2
    assert api.waitCmd(cmd_id, 10)
    assert api.getCmdResults(cmd_id)['out'] == 'abcdef!'
    assert fault_of(api.putCmdInput, cmd_id, b'x').faultCode == 4


def test_what_has_no_such_input_says_so(api):
    cmd_id = begin(api, 'sleep', '600')
    assert fault_of(api.putCmdInput, cmd_id, b'x').faultCode == 4
    assert fault_of(api.resizeCmd, cmd_id, 10, 10).faultCode == 4
    api.signalCmd(cmd_id, 'KILL')
    streamed = begin(api, 'cat', stdin='stream')
    assert fault_of(api.resizeCmd, streamed, 10, 10).faultCode == 4
    assert fault_of(api.putCmdInput, streamed, b'x', False, -2).faultCode == -32602
    api.putCmdInput(streamed, b'', True)
    for options in ({'terminal': {'rows': 0}}, {'terminal': {'colour': 1}}, {'terminal': {}, 'stdin': 'x'},
                    {'terminal': {'term': 1}}):
        assert fault_of(api.runCmd, 'one', 'cat', [], {}, '', '', options).faultCode == -32602
    assert fault_of(api.runCmd, 'one', 'cat', [], {}, '', 'file', {'stdin': 'stream'}).faultCode == -32602
    exact = begin(api, 'cat', stdin=xmlrpc.client.Binary(b'stream'))
    assert api.waitCmd(exact, 10) and api.getCmdResults(exact)['out'] == 'stream'


def test_input_for_a_guest_that_is_away_waits_for_it(host, tmp_path):
    with host.api as api:
        agent = Agent(tmp_path, host, 'away').start()
        cmd_id = api.runCmd('away', 'cat', [], {}, '', '', {'stdin': 'stream'})
        assert api.putCmdInput(cmd_id, b'before ') == 7
        wait_until(lambda: api.getCmdStatus(cmd_id)['state'] == 'running')
        wait_until(lambda: api.getCmdOutput(cmd_id)['size'] == 7)
        agent.stop()
        assert api.putCmdInput(cmd_id, b'between ') == 8
        with agent:
            wait_until(agent.has_joined)
            assert api.putCmdInput(cmd_id, b'after', True) == 5
            assert api.waitCmd(cmd_id, 20)
            assert api.getCmdResults(cmd_id)['out'] == 'before between after'


def test_input_goes_on_after_a_restart_of_the_host(tmp_path):
    with Host(tmp_path / 'host', broker={'port': free_port()}) as host, \
            Agent(tmp_path / 'guest', host, 'one') as agent:
        with host.api as api:
            cmd_id = begin(api, 'cat', stdin='stream')
            assert api.putCmdInput(cmd_id, b'before ') == 7
            wait_until(lambda: api.getCmdOutput(cmd_id)['size'] == 7)
        host.stop()
        host.start()
        wait_until(agent.has_joined, 20)
        with host.api as api:
            wait_until(lambda: api.getCmdStatus(cmd_id)['inOffset'] == 7)
            assert api.putCmdInput(cmd_id, b're after', True, 4) == 8
            assert api.waitCmd(cmd_id, 20)
            assert api.getCmdResults(cmd_id)['out'] == 'before after'


# --- output ---

def test_output_is_here_as_it_is_written(host, api):
    script = 'import time\nfor _ in range(10): print(time.time(), flush=True); time.sleep(0.1)'
    cmd_id = begin(api, 'python3', '-c', script)
    late, text = [], b''
    while True:
        part = api.getCmdOutput(cmd_id, 'out', len(text), 65536, 10)
        late += [time.time() - float(line) for line in part['data'].data.split()]
        text += part['data'].data
        if part['eof']:
            break
    assert len(late) == 10
    assert sorted(late)[5] < 0.05, late


def test_nothing_comes_and_that_takes_as_long_as_it_was_to_wait(host, api):
    cmd_id = begin(api, 'sleep', '600')
    begun = time.monotonic()
    part = api.getCmdOutput(cmd_id, 'out', 0, 100, 0.4)
    assert part['data'].data == b'' and not part['eof']
    assert 0.35 < time.monotonic() - begun < 3
    kill = threading.Thread(target=lambda: host.api.signalCmd(cmd_id, 'KILL'))     # on another connection
    kill.start()
    assert api.getCmdOutput(cmd_id, 'err', 0, 100, 20)['eof']
    kill.join()


# --- terminals ---

def test_a_shell_on_a_terminal(api):
    cmd_id = begin(api, 'sh', '-i', terminal={'rows': 40, 'columns': 132, 'term': 'xterm-256color'})
    api.putCmdInput(cmd_id, b'PS1="> "; stty size; echo $TERM\n')
    assert b'40 132' in output(api, cmd_id, b'\nxterm-256color')
    assert api.resizeCmd(cmd_id, 50, 100)
    api.putCmdInput(cmd_id, b'stty size\n')
    output(api, cmd_id, b'50 100')
    for number, key in ((1, b'\x03'), (2, b'\x1a')):
        api.putCmdInput(cmd_id, b"sh -c 'echo wait$((%d + 10)); exec sleep 600'\n" % number)
        output(api, cmd_id, b'wait1%d' % number)
        api.putCmdInput(cmd_id, key)
        api.putCmdInput(cmd_id, b'echo back$((%d + 10))\n' % number)
        output(api, cmd_id, b'back1%d' % number)
    assert b'Stopped' in output(api, cmd_id, b'back12')
    api.putCmdInput(cmd_id, b'exit 7\nexit 7\n')
    assert api.waitCmd(cmd_id, 10)
    assert api.getCmdResults(cmd_id)['exitCodeOrSignal'] == 7
