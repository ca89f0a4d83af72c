"""SIGKILL at each named point of a command's way, to the last byte of its output.

It runs at most once, and has exactly one result.
"""

import os
import signal

import pytest
from faultrig import Agent, Host, Proof, events
from helpers import wait_until

import guestspool

pytestmark = [pytest.mark.once, pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]


# --- the guest agent dies ---

AGENT_POINTS = {
    'before the spool folder is made': ['Spool.claim', 'before', 1],
    'after the spool folder is made, before request.json': ['Spool.claim', 'after', 1],
    'when the result has its room, before request.json': ['reserve', 'after', 1],
    'after request.json, before the runner is asked for': ['Commands._accept', 'after', 1],
    'before the fork server is asked': ['ForkServer.run', 'before', 1],
    'after the fork server was asked': ['ForkServer.run', 'after', 1],
    'after the first status': ['Reports.status', 'after', 1],
    'after result.json, before sending': ['Commands._send_results', 'before', 1],
    'after sending, before CMD_ACK': ['Reports.results', 'after', 1],
    'when CMD_ACK comes': ['Commands.acknowledge', 'before', 1],
    'between the file acked and the removal from the table': ['Command.acknowledge', 'after', 1],
    'after CMD_ACK': ['Commands.acknowledge', 'after', 1],
}


@pytest.mark.parametrize('point', list(AGENT_POINTS))
def test_the_agent_dies(host, tmp_path, point):
    guest = Agent(tmp_path / 'guest', host, 'agent-%d' % list(AGENT_POINTS).index(point))
    guest.faults = {'die': AGENT_POINTS[point]}
    guest.start()
    try:
        proof = Proof(tmp_path, 0.3)
        cmd_id = proof.ask(host, guest.id)
        guest.wait_for_death()
        guest.start()
        proof.check(host.results(cmd_id))
        wait_until(lambda: os.path.exists(os.path.join(guest.spool, cmd_id, 'acked')), 20)
        assert len(events(host, cmd_id, 'cmd-finished')) == 1
    finally:
        guest.stop()


TAKING_UP = {
    'before it reads the spool': (['Spool.load', 'before', 1], 'goes on'),
    'when it has read a command': (['Spool._load', 'after', 1], 'goes on'),
    'before it takes a command up': (['Commands._take_up', 'before', 1], 'goes on'),
    'before it ends what a dead runner left': (['Command.end_processes', 'before', 1], 'lost'),
    'after that, before result.json': (['Command.end_processes', 'after', 1], 'lost'),
    'after result.json, before HELLO': (['Command.end', 'after', 1], 'lost'),
    'after HELLO': (['Agent._say_hello', 'after', 1], 'goes on'),
}


@pytest.mark.parametrize('point', list(TAKING_UP))
def test_the_next_agent_dies_when_it_takes_up_what_the_last_one_left(host, tmp_path, point):
    die, end = TAKING_UP[point]
    guest = Agent(tmp_path / 'guest', host, 'taking-up-%d' % list(TAKING_UP).index(point)).start()
    proof = Proof(tmp_path, 1)
    try:
        cmd_id = proof.ask(host, guest.id)
        command = guestspool.Command(cmd_id, os.path.join(guest.spool, cmd_id))
        shell = wait_until(lambda: proof.runs() and command.process(), 20)
        os.kill(shell, signal.SIGSTOP)
        guest.stop(signal.SIGKILL)
        if end == 'lost':
            os.kill(command.read('process.json')['runner'], signal.SIGKILL)
        guest.faults = {'die': die}
        guest.start(wait=False)
        guest.wait_for_death()
        if end == 'goes on':
            os.kill(shell, signal.SIGCONT)
        guest.start()
        results = host.results(cmd_id)
        if end == 'goes on':
            proof.check(results)
        else:
            assert results['state'] == 'lost' and 'runner was killed' in results['error'], results
        assert proof.runs() == 1 and not running(proof)
        assert len(events(host, cmd_id, 'cmd-finished')) == 1
    finally:
        guest.stop()
        for pid in running(proof):
            os.kill(pid, signal.SIGKILL)


LETTING_GO = {
    'before': ['Command.empty', 'before', 1],
    'after two files': ['os.remove', 'after', 2],
    'after four files': ['os.remove', 'after', 4],
    'after': ['Command.empty', 'after', 1],
}


@pytest.mark.parametrize('point', list(LETTING_GO))
def test_the_agent_dies_when_it_lets_the_spool_go(host, tmp_path, point):
    die = LETTING_GO[point]
    guest = Agent(tmp_path / 'guest', host, 'spool-%d' % list(LETTING_GO).index(point), keep_spool=0)
    guest.faults = {'die': die, 'set': {'HOUSEKEEPING_EVERY': 0.2}}
    guest.start()
    try:
        proof = Proof(tmp_path, 0.1)
        cmd_id = proof.ask(host, guest.id)
        results = host.results(cmd_id)
        guest.wait_for_death()
        guest.start()
        folder = os.path.join(guest.spool, cmd_id)
        wait_until(lambda: os.stat(folder).st_mode & 0o777 == 0o500, 10)
        assert os.listdir(folder) == []
        proof.check(results)
    finally:
        guest.stop()


# --- a runner dies ---

RUNNER_POINTS = {
    'before the claim': (['Runner.claim', 'before', 1], 'once'),
    'after the claim, before the start': (['Runner._start', 'before', 1], 'lost'),
    'when the request is on the disk, before the program begins': (['Runner._spawn', 'before', 1], 'lost'),
    'after the start, before process.json': (['Runner._write_process', 'before', 1], 'lost'),
    'while the program runs': (['Runner._pump', 'before', 1], 'lost'),
    'after the exit, before result.json': (['Runner.finish', 'before', 1], 'lost'),
    'after result.json, before the agent is told': (['Runner.finish', 'after', 1], 'once'),
}


@pytest.mark.parametrize('point', list(RUNNER_POINTS))
def test_a_runner_dies(host, tmp_path, point):
    """What it had claimed is lost, with the reason; nothing of it goes on running."""
    die, end = RUNNER_POINTS[point]
    guest = Agent(tmp_path / 'guest', host, 'runner-%d' % list(RUNNER_POINTS).index(point))
    guest.faults = {'die': die, 'set': {'START_PATIENCE': 0.3, 'POLL': 0.1}}
    with guest:
        proof = Proof(tmp_path, 0 if end == 'once' or 'exit' in point else 60)
        results = host.results(proof.ask(host, guest.id))
        assert guest.has_died()
        if end == 'once':
            proof.check(results)
        else:
            assert results['state'] == 'lost' and 'runner was killed' in results['error'], results
            assert proof.runs() <= 1
        assert not running(proof)


def running(proof):
    """The processes that have the proof's path in their command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open('/proc/%s/cmdline' % pid, 'rb') as file:
                if proof.path.encode() in file.read().split(b'\0'):
                    found.append(int(pid))
        except OSError:
            continue
    return found


# --- the host dies ---

HOST_POINTS = {
    'within the transaction of the journal': (['Transaction.add_execution', 'after', 1], 'never'),
    'before the journal is written': (['Commands.new', 'before', 1], 'never'),
    'after the journal is written, before publishing': (['Commands.new', 'after', 1], 'once'),
    'after publishing': (['Control.publish', 'after', 1], 'once'),
    'when a status came, before the state is written': (['Commands.heard_status', 'after', 1], 'once'),
    'when the results come, before they are journalled': (['Commands.finish', 'before', 1], 'once'),
    'after journalling, before CMD_ACK': (['Commands.finish', 'after', 1], 'once'),
    # The first one is for the guest's secret.
    'after the journal is on the disk, before CMD_ACK': (['Journal.sync', 'after', 2], 'once'),
    'after CMD_ACK': (['Host._acknowledge', 'after', 1], 'once'),
}


@pytest.mark.parametrize('point', list(HOST_POINTS))
def test_the_host_dies(tmp_path, point):
    die, end = HOST_POINTS[point]
    host = Host(tmp_path / 'host')
    host.faults = {'die': die}
    host.start()
    guest = Agent(tmp_path / 'guest', host, 'g')
    try:
        guest.start()
        proof = Proof(tmp_path, 0.3)
        proof.ask(host, 'g')
        host.wait_for_death()
        host.start()
        with host.api as api:
            asked = [command['cmdId'] for command in api.listCmds()]
        assert len(asked) == (end == 'once')
        for cmd_id in asked:
            proof.check(host.results(cmd_id))
            assert len(events(host, cmd_id, 'cmd-finished')) == 1
            assert len(events(host, cmd_id, 'cmd-submitted')) == 1
        assert proof.runs() == len(asked)
    finally:
        guest.stop()
        host.stop()


TAKING_UP_AGAIN = {
    'when it has read its journal': ['Commands.__init__', 'after', 1],
    'when a guest that has it says HELLO': ['Words.heard_hello', 'before', 1],
    'when that was answered': ['Words.heard_hello', 'after', 1],
}


@pytest.mark.parametrize('point', list(TAKING_UP_AGAIN))
def test_the_next_host_dies_when_it_takes_up_what_the_last_one_left(tmp_path, point):
    host = Host(tmp_path / 'host').start()
    guest = Agent(tmp_path / 'guest', host, 'g')
    try:
        guest.start()
        proof = Proof(tmp_path, 1)
        cmd_id = proof.ask(host, 'g')
        wait_until(proof.runs, 20)
        host.stop(signal.SIGKILL)
        host.faults = {'die': TAKING_UP_AGAIN[point]}
        host.start(wait=False)
        host.wait_for_death()
        host.start()
        proof.check(host.results(cmd_id))
        assert len(events(host, cmd_id, 'cmd-finished')) == 1
    finally:
        guest.stop()
        host.stop()


# --- one of both dies while the output that didn't come with the results is fetched ---

LONG = 'echo ran >> "$1"; yes out | head -c 6000000; yes err | head -c 6000000 >&2; exit 7'
FETCH_POINTS = {
    'the host, before it fetches': ('host', ['Fetcher._fetch_streams', 'before', 1]),
    'the host, when a piece of the output is here': ('host', ['Download._receive_piece', 'after', 1]),
    'the host, when all pieces are here, before their file has its name': (
        'host', ['Download._receive_rest', 'after', 1]),
    'the host, between out and err': ('host', ['chirpclient.ChirpClient.fetch', 'after', 1]),
    'the host, when all is here, before that is journalled': ('host', ['Fetcher._fetch_streams', 'after', 1]),
    'the host, when that is journalled, before CMD_ACK': ('host', ['Commands.fetched', 'after', 1]),
    'the guest, when it is asked for the output': ('guest', ['Session._answer', 'before', 1]),
    'the guest, before the first byte is sent': ('guest', ['Wire.send_copy', 'before', 1]),
    'the guest, within a piece': ('guest', ['Crc32.update', 'after', 2]),       # the first is of nothing
    'the guest, after the first stream': ('guest', ['OpenFiles.close', 'after', 1]),
}


@pytest.mark.parametrize('point', list(FETCH_POINTS))
def test_one_dies_while_output_is_fetched(tmp_path, point):
    who, die = FETCH_POINTS[point]
    host = Host(tmp_path / 'host')
    host.faults = {'die': die} if who == 'host' else {}
    host.start()
    guest = Agent(tmp_path / 'guest', host, 'g')
    guest.faults = dict({'set': {'RESEND_EVERY': 1.0}}, **({'die': die} if who == 'guest' else {}))
    try:
        guest.start()
        proof = Proof(tmp_path)
        with host.api as api:
            cmd_id = api.runCmd('g', 'sh', ['-c', LONG, 'sh', proof.path])
        victim = host if who == 'host' else guest
        victim.wait_for_death()
        victim.start()
        wait_until(lambda: os.path.exists(os.path.join(guest.spool, cmd_id, 'acked')), 30)
        results = host.results(cmd_id)
        assert (results['state'], results['exitCodeOrSignal'], results['out-size'], results['err-size']) == \
            ('exited', 7, 6000000, 6000000) and proof.runs() == 1
        folder = os.path.join(host.state, 'output')
        kept = {name.rpartition('.')[2]: (tmp_path / 'host' / 'vmhost-state' / 'output' / name).read_text()
                for name in os.listdir(folder)}
        assert kept == {'out': 'out\n' * 1500000, 'err': 'err\n' * 1500000}
        assert len(events(host, cmd_id, 'cmd-finished')) == 1
    finally:
        guest.stop()
        host.stop()
