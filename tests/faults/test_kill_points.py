"""SIGKILL at each named point of a command's way: it runs at most once, and has exactly one result."""

import os

import pytest
from faultrig import Agent, Host, Proof, events
from helpers import wait_until

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')


@pytest.fixture(scope='module')
def host(tmp_path_factory):
    with Host(tmp_path_factory.mktemp('host')) as host:
        yield host


# --- the guest agent dies ---

AGENT_POINTS = {
    'before the spool folder is made': ['Spool.claim', 'before', 1],
    'after the spool folder is made, before request.json': ['Spool.claim', 'after', 1],
    'when the result has its room, before request.json': ['reserve', 'after', 1],
    'after request.json, before the runner is asked for': ['Agent._accept', 'after', 1],
    'before the fork server is asked': ['ForkServer.run', 'before', 1],
    'after the fork server was asked': ['ForkServer.run', 'after', 1],
    'after the first status': ['Agent._tell_status', 'after', 1],
    'after result.json, before sending': ['Agent._send_results', 'before', 1],
    'after sending, before CMD_ACK': ['Agent._tell_results', 'after', 1],
    'when CMD_ACK comes': ['Agent.heard_cmd_ack', 'before', 1],
    'between the file acked and the removal from the table': ['Command.acknowledge', 'after', 1],
    'after CMD_ACK': ['Agent.heard_cmd_ack', 'after', 1],
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
        guest.faults = {}
        guest.start()
        proof.check(host.results(cmd_id))
        wait_until(lambda: os.path.exists(os.path.join(guest.spool, cmd_id, 'acked')), 20)
        assert len(events(host, cmd_id, 'cmd-finished')) == 1
    finally:
        guest.stop()


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
    'spare, before it has a command': (['Runner.take', 'before', 1], 'once'),
    'after the fork, before the claim': (['Runner.claim', 'before', 1], 'once'),
    'after the claim, before the start': (['Runner._start', 'before', 1], 'lost'),
    'after the start, before process.json': (['Runner._write_process', 'before', 1], 'lost'),
    'while the program runs': (['Runner._pump', 'before', 1], 'lost'),
    'after the exit, before result.json': (['Runner._finish', 'before', 1], 'lost'),
    'after result.json, before the agent is told': (['Runner._finish', 'after', 1], 'once'),
}


@pytest.mark.parametrize('point', list(RUNNER_POINTS))
def test_a_runner_dies(host, tmp_path, point):
    """What it had claimed is lost, with the reason; nothing of it goes on running."""
    die, end = RUNNER_POINTS[point]
    guest = Agent(tmp_path / 'guest', host, 'runner-%d' % list(RUNNER_POINTS).index(point))
    guest.faults = {'die': die, 'set': {'START_PATIENCE': 1.0}}
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
    'after publishing': (['Host.publish', 'after', 1], 'once'),
    'when a status came, before the state is written': (['Commands.heard_status', 'after', 1], 'once'),
    'when the results come, before they are journalled': (['Commands.finish', 'before', 1], 'once'),
    'after journalling, before CMD_ACK': (['Commands.finish', 'after', 1], 'once'),
    'after the journal is on the disk, before CMD_ACK': (['Journal.sync', 'after', 1], 'once'),
    'after CMD_ACK': (['Host.heard_cmd_results', 'after', 1], 'once'),
}


@pytest.mark.parametrize('point', list(HOST_POINTS))
def test_the_host_dies(tmp_path, point):
    die, end = HOST_POINTS[point]
    host = Host(tmp_path / 'host').start()
    guest = Agent(tmp_path / 'guest', host, 'g')
    try:
        guest.start()
        host.stop()
        host.faults = {'die': die}
        host.start()
        wait_until(guest.has_joined, 20)
        proof = Proof(tmp_path, 0.3)
        proof.ask(host, 'g')
        host.wait_for_death()
        host.faults = {}
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
