"""Commands as the host keeps them: named by their caller, cancelled, expired, queued, and in lists."""

import base64
import os
import re
import shutil
import signal
import threading
import time
import xmlrpc.client
from unittest import mock

import pytest
from agents import Agent, Host
from cutting import CuttingProxy
from helpers import fault_of, wait_until

import faults
import hostcommands
import hostcontrol
import hostguests
import hostjournal
import hostrequests
import hostwords
import protocol

pytestmark = pytest.mark.ends


@pytest.fixture(scope='module')
def host(tmp_path_factory):
    with Host(tmp_path_factory.mktemp('host'), vm_gc_grace=6) as host:
        yield host


@pytest.fixture(scope='module')
def guest(host, tmp_path_factory):
    with Agent(tmp_path_factory.mktemp('one'), host, 'one') as guest:
        yield guest


@pytest.fixture(scope='module')
def comes_and_goes(host, tmp_path_factory):
    """An agent that has been there."""
    with Agent(tmp_path_factory.mktemp('away'), host, 'away') as guest:
        pass
    return guest


@pytest.fixture
def absent(host, comes_and_goes):
    """An agent that was there, and is away."""
    with host.api as api:
        wait_until(lambda: 'away' not in api.listRegisteredVMs(), 20)
    yield comes_and_goes
    comes_and_goes.stop()


class Proof:
    """A command that leaves a line in a file each time that it runs."""

    def __init__(self, tmp_path):
        self.path = str(tmp_path / 'proof')

    def words(self, then=':'):
        return 'sh', ['-c', 'echo ran >> "$1"; ' + then, 'sh', self.path]

    def runs(self):
        try:
            with open(self.path) as lines:
                return len(lines.readlines())
        except FileNotFoundError:
            return 0


def all_run(api, multicast):
    return all(status['state'] == 'running' for status in api.getCmdStatus(multicast).values())


# --- the caller's own id ---

@pytest.mark.windows
def test_the_same_id_again_is_answered_as_the_first_time(host, guest, tmp_path):
    proof, answers = Proof(tmp_path), []

    def call():
        with host.api as api:
            answers.append(api.runCmd('one', *proof.words(), {}, '', '', {'id': 'mine.1', 'timeout': 60}))
    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == ['mine.1'] * 8 and host.results('mine.1')['state'] == 'exited'
    call()
    assert answers[-1] == 'mine.1' and proof.runs() == 1
    with host.api as api:
        assert len([event for event in api.getEvents(-1000)['events']
                    if (event['type'], event['cmdId']) == ('cmd-submitted', 'mine.1')]) == 1


def test_an_id_is_of_one_command(host, guest, api):
    api.runCmd('one', 'true', [], {}, '', '', {'id': 'mine.2'})
    for vm, cmd, args in (('one', 'false', []), ('one', 'true', ['x'])):
        fault = fault_of(api.runCmd, vm, cmd, args, {}, '', '', {'id': 'mine.2'})
        assert fault.faultCode == 8 and 'mine.2' in fault.faultString
    assert fault_of(api.runCmdOnAll, 'one', 'false', [], {}, '', '', {'id': 'mine.2'}).faultCode == 8
    for odd in ('', '../x', 'a@b', ' ', '-x', 'x' * 65, 'ä'):      # '': a variable of a shell that isn't set
        assert fault_of(api.runCmd, 'one', 'true', [], {}, '', '', {'id': odd}).faultCode == -32602


def test_an_id_is_of_one_command_whoever_comes_at_the_same_time(host, guest, tmp_path):
    answers, begin = [], threading.Barrier(8)

    def call(number):
        with host.api as api:
            begin.wait(30)
            try:
                answers.append(api.runCmd('one', 'true', [str(number)], {}, '', '', {'id': 'mine.5'}))
            except xmlrpc.client.Fault as fault:
                answers.append(fault.faultCode)
    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(answers, key=str) == [8] * 7 + ['mine.5']


def test_what_is_too_late_is_not_sent_any_more(host, guest, tmp_path, api):
    proof = Proof(tmp_path)
    cmd_id = api.runCmd('one', *proof.words(), {}, '', '', {'expires': 1e-9})
    assert host.results(cmd_id)['state'] == 'expired' and proof.runs() == 0


def test_a_signal_that_may_be_lost_is_not_told_as_sent(host, guest, tmp_path, api):
    deaf = tmp_path / 'deaf'            # it may come yet, which must not end what is killed then
    cmd_id = api.runCmd('one', 'sh', ['-c', 'trap "" USR1; > %s; exec sleep 600' % deaf])
    wait_until(deaf.exists, 20)
    wait_until(lambda: api.getCmdStatus(cmd_id)['pid'], 20)
    os.kill(guest.process.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: api.getCmdStatus(cmd_id)['age'] > 1, 20)     # nothing it said is on its way
        assert fault_of(api.signalCmd, cmd_id, 'USR1').faultCode == 7
    finally:
        os.kill(guest.process.pid, signal.SIGCONT)
    assert api.signalCmd(cmd_id, 'KILL')
    assert host.results(cmd_id)['state'] == 'signaled'


@pytest.mark.parametrize('name', ['KILL', '9'])
def test_a_kill_that_met_nobody_is_not_told_as_sent(host, guest, tmp_path, api, name):
    """Its command ended a moment ago, and nobody here knows that yet."""
    program = 'until [ -e "$0" ]; do sleep 0.05; done; exit 3'
    cmd_id = api.runCmd('one', 'sh', ['-c', program, str(tmp_path / 'go')])
    wait_until(lambda: api.getCmdStatus(cmd_id)['state'] == 'running', 20)
    result = os.path.join(guest.state, 'spool', 'one', cmd_id, 'result.json')
    os.kill(guest.process.pid, signal.SIGSTOP)
    try:
        (tmp_path / 'go').touch()
        wait_until(lambda: os.path.exists(result), 20)
        goes_on = threading.Timer(0.3, os.kill, (guest.process.pid, signal.SIGCONT))
        goes_on.start()
        assert api.signalCmd(cmd_id, name) is False
        goes_on.join()
    finally:
        os.kill(guest.process.pid, signal.SIGCONT)
    assert host.results(cmd_id)['exitCodeOrSignal'] == 3


def test_a_multicast_with_an_id_runs_once_on_each(host, guest, tmp_path, api):
    proof = Proof(tmp_path)
    with Agent(tmp_path / 'two', host, 'one-more'):
        for _ in range(3):
            assert api.runCmdOnAll('one*', *proof.words(), {}, '', '', {'id': 'many'}) == 'many'
        wait_until(lambda: api.waitCmd('many', 20), 30)
        assert proof.runs() == 2 == len(api.getCmdResults('many'))


def test_a_known_id_is_answered_though_its_agent_went_away(host, absent, api):
    options = {'id': 'mine.3', 'queue': True}
    assert api.runCmd('away', 'true', [], {}, '', '', options) == 'mine.3'
    del options['queue']
    assert api.runCmd('away', 'true', [], {}, '', '', options) == 'mine.3'
    assert fault_of(api.runCmd, 'away', 'true', [], {}, '', '', {}).faultCode == 2


class AnswerCutter(CuttingProxy):
    """Cuts the next answer, once ``cuts_next`` is set."""
    cuts_next = False

    def _count(self, data, way):
        if way == 'down' and self.cuts_next:
            self.cuts_next, self.cuts = False, self.cuts + 1
            return b'', True
        return super()._count(data, way)


def test_an_answer_that_is_cut_costs_no_second_run(host, guest, tmp_path):
    """xmlrpc.client sends a call again where the connection breaks before the answer."""
    proof = Proof(tmp_path)
    address, port = host.address.split(':')
    with AnswerCutter((address, int(port))) as proxy, xmlrpc.client.ServerProxy(
            'http://vmhost:%s@127.0.0.1:%d/' % (host.token, proxy.address[1])) as api:
        api.agentInfo()
        proxy.cuts_next = True
        assert api.runCmd('one', *proof.words(), {}, '', '', {'id': 'cut'}) == 'cut'
        assert proxy.cuts == 1
    host.results('cut')
    assert proof.runs() == 1


# --- cancelled ---

@pytest.mark.windows
def test_what_waits_for_an_agent_is_cancelled_at_once_and_for_good(host, absent, tmp_path, api):
    proof = Proof(tmp_path)
    cmd_id = api.runCmd('away', *proof.words(), {}, '', '', {'queue': True})
    fault = fault_of(api.signalCmd, cmd_id, 'CONT')
    assert fault.faultCode == 4 and 'waits' in fault.faultString
    assert api.getCmdStatus(cmd_id)['state'] == 'queued'
    assert api.signalCmd(cmd_id) is True
    results = api.getCmdResults(cmd_id)
    assert (results['state'], results['by'], results['exitCodeOrSignal']) == ('cancelled', 'signalCmd', -1)
    assert re.match('ECANCELED: signal [A-Z]+ before it began', results['error'])
    assert api.signalCmd(cmd_id) is False
    with absent:
        assert host.run('away', 'true')['state'] == 'exited' and proof.runs() == 0
    assert api.forgetCmd(cmd_id) is True


def test_what_an_agent_does_not_answer_for_is_cancelled_and_told_truly(host, guest, tmp_path, api):
    """It hangs, and has the command already: what becomes of it replaces what was told before."""
    proof = Proof(tmp_path)
    os.kill(guest.process.pid, signal.SIGSTOP)
    try:
        cmd_id = api.runCmd('one', *proof.words('sleep 60'))
        begin = time.monotonic()
        assert api.signalCmd(cmd_id, 'KILL') is True
        assert time.monotonic() - begin < 5
        assert api.getCmdStatus(cmd_id)['state'] == 'cancelled'
    finally:
        os.kill(guest.process.pid, signal.SIGCONT)
    assert host.run('one', 'true', queue=True)['state'] == 'exited'        # words come in turn

    def told():
        results = api.getCmdResults(cmd_id)
        return results['state'], results['exitCodeOrSignal']
    wait_until(lambda: told()[0] != 'cancelled' or not proof.runs(), 20)


@pytest.mark.once
@pytest.mark.parametrize('name', ['TERM', 'KILL'])
def test_what_is_cancelled_while_its_agent_starts_anew_never_runs(host, tmp_path, api, name):
    """The agent was killed a moment ago, and nobody knows yet; the next one is there before the time for an
    answer is over, and is sent the command again."""
    proof = Proof(tmp_path)
    with Agent(tmp_path / 'again', host, 'again-' + name) as agent:
        agent.stop(signal.SIGKILL)
        cmd_id = api.runCmd(agent.id, *proof.words('sleep 5'), {}, '', '', {'queue': True})
        begun = threading.Timer(0.1, agent.start, (False,))
        begun.start()
        assert api.signalCmd(cmd_id, name) is True
        begun.join()
        results = host.results(cmd_id)
        assert (results['state'], results['by']) == ('cancelled', 'signalCmd')
        assert host.run(agent.id, 'true', queue=True)['state'] == 'exited'     # words come in turn
        assert proof.runs() == 0 and api.getCmdResults(cmd_id)['state'] == 'cancelled'


@pytest.mark.once
def test_what_waits_in_a_restored_spool_and_ran_since_never_runs_again(host, tmp_path, api):
    proofs = {name: Proof(tmp_path / name) for name in ('over', 'begun', 'waits')}
    with Agent(tmp_path / 'restored', host, 'restored', max_commands=1) as agent:
        last, copy = str(tmp_path / 'go'), str(tmp_path / 'copy')
        spool = os.path.join(agent.state, 'spool')
        first = api.runCmd(agent.id, 'sh', ['-c', 'until [ -e "$0" ]; do sleep 0.05; done', last])
        ids = {}
        for name in proofs:
            os.mkdir(str(tmp_path / name))
            then = 'until [ -e "$1.go" ]; do sleep 0.05; done' if name == 'begun' else ':'
            ids[name] = api.runCmd(agent.id, *proofs[name].words(then))
        wait_until(lambda: api.getCmdStatus(ids['waits'])['state'] == 'queued', 20)
        agent.stop(signal.SIGKILL)
        shutil.copytree(spool, copy)
        agent.start()
        open(last, 'w').close()
        assert host.results(first)['state'] == host.results(ids['over'])['state'] == 'exited'
        wait_until(proofs['begun'].runs, 20)
        wait_until(lambda: api.getCmdStatus(ids['begun'])['state'] == 'running', 20)
        agent.stop(signal.SIGKILL)
        shutil.rmtree(spool)
        shutil.copytree(copy, spool)
        agent.start()
        assert host.results(ids['waits'])['state'] == 'exited'
        assert host.results(ids['over'])['state'] == 'exited'
        assert host.results(ids['begun'])['state'] == 'lost'
        assert {name: proof.runs() for name, proof in proofs.items()} == {'over': 1, 'begun': 1, 'waits': 1}
        open(proofs['begun'].path + '.go', 'w').close()


def test_output_that_is_nowhere_any_more_is_no_empty_output(host, guest, api):
    cmd_id = api.runCmd('one', 'head', ['-c', '200000', '/dev/zero'])
    assert host.results(cmd_id)['out-size'] == 200000

    def has_fetched():
        return os.path.exists(os.path.join(guest.state, 'spool', 'one', cmd_id, 'acked'))
    wait_until(has_fetched, 20)
    assert len(api.getCmdOutput(cmd_id, 'out', 0, 100)['data'].data) == 100
    kept = os.path.join(host.state, 'output')
    for path in [os.path.join(guest.state, 'spool', 'one', cmd_id, 'out')] + [
            os.path.join(kept, name) for name in os.listdir(kept) if cmd_id in name]:
        os.remove(path)
    fault = fault_of(api.getCmdOutput, cmd_id, 'out', 0, 100)
    assert fault.faultCode == 4 and 'no longer' in fault.faultString


def test_an_end_that_was_decided_here_gives_way_to_the_truth(tmp_path):
    journal = hostjournal.Journal(str(tmp_path / 'journal'))
    try:
        commands = hostcommands.Commands(journal)
        request = {'cmd': 'x', 'args': [], 'env': {}, 'path': '', 'options': {}}
        cmd_id, [execution] = commands.new(request, 'a', False, [hostguests.Guest('A', 'a')], 'tester')
        commands.call_off(execution, 'cancelled', 'signal TERM before it began', 'signalCmd')
        truth = dict(hostcommands.lost_results(cmd_id, '', 'exited'), exitCodeOrSignal=3)
        commands.correct(commands.finished(cmd_id, 'A'), truth, fetched=True)
        assert commands.find(cmd_id)[0].answer() == truth
        assert [event['type'] for event in journal.events_after(0, 0)['events']] == [
            'cmd-submitted', 'cmd-finished', 'cmd-corrected']
    finally:
        journal.close()


class ExpiresJustNow(hostcommands.Commands):
    """Another thread ends each command as expired, right after it was found to be unfinished."""

    def find_open(self, cmd_id, vm_id):
        found = super().find_open(cmd_id, vm_id)
        ender = threading.Thread(target=self.call_off, args=(found, 'expired', 'it had not begun'))
        ender.start()
        ender.join()
        return found


def test_results_are_the_truth_though_the_command_expires_as_they_come(tmp_path):
    journal = hostjournal.Journal(str(tmp_path / 'journal'))
    try:
        commands = ExpiresJustNow(journal)
        request = {'cmd': 'x', 'args': [], 'env': {}, 'path': '', 'options': {}}
        cmd_id, _ = commands.new(request, 'a', False, [hostguests.Guest('A', 'a')], 'tester')
        acknowledged = []
        others = [mock.MagicMock() for _ in range(5)]
        words = hostwords.Words(*others, commands, *others[:4], acknowledged.append)
        message = protocol.CMD_RESULTS.howToSay(cmd_id, {'state': 'exited', 'finished': True,
                                                         'exitCodeOrSignal': 3})
        message.headers['from'] = 'A'
        words.heard_cmd_results(message)
        [execution] = commands.find(cmd_id)
        assert (execution.state, execution.answer()['exitCodeOrSignal']) == ('exited', 3)
        assert acknowledged == [('A', cmd_id)]
        assert [event['type'] for event in journal.events_after(0, 0)['events']] == [
            'cmd-submitted', 'cmd-finished', 'cmd-corrected']
    finally:
        journal.close()


@pytest.mark.once
def test_all_of_a_multicast_are_signalled_whoever_is_away(host, guest, absent, tmp_path, api):
    absent.start()
    cmd_id = api.runCmdOnAll('*', 'sleep', ['60'])
    wait_until(lambda: all_run(api, cmd_id), 20)
    absent.stop(signal.SIGKILL)
    wait_until(lambda: 'away' not in api.listRegisteredVMs(), 30)
    assert fault_of(api.signalCmd, cmd_id, 'KILL').faultCode == 2
    assert host.results(cmd_id + '@one')['state'] == 'signaled'
    with absent:
        assert api.signalCmd(cmd_id, 'KILL') is True
        assert host.results(cmd_id + '@away')['state'] == 'signaled'


def test_what_is_forgotten_makes_room_in_its_guest(host, guest, api):
    cmd_id = api.runCmd('one', 'echo', ['hi'])
    assert host.results(cmd_id)['out'] == 'hi\n'
    folder = os.path.join(guest.state, 'spool', 'one', cmd_id)
    assert os.listdir(folder)
    assert api.forgetCmd(cmd_id) is True
    wait_until(lambda: os.listdir(folder) == [], 10)


# --- expired ---

@pytest.mark.once
def test_what_has_not_begun_in_time_never_does(tmp_path):
    proof = Proof(tmp_path)
    with Host(tmp_path / 'host', vm_gc_grace=1) as host:
        guest = Agent(tmp_path / 'guest', host, 'g')
        with guest:
            pass
        with host.api as api:
            wait_until(lambda: not api.listVMs(), 10)
            soon, late, never = [api.runCmd('g', *proof.words(), {}, '', '', dict(options, queue=True))
                                 for options in ({'expires': 0.5}, {'expires': 2}, {'expires': 3600})]
        results = host.results(soon, 10)
        assert results['state'] == 'expired' and results['error'].startswith('ETIME: '), results
        host.stop()
        host.start()
        assert host.results(late, 10)['state'] == 'expired'
        guest = Agent(tmp_path / 'guest', host, 'g')
        with guest:
            assert host.results(never)['state'] == 'exited' and proof.runs() == 1
        with host.api as api:
            assert sorted(row['state'] for row in api.listCmds()) == ['exited', 'expired', 'expired']


def test_an_agent_is_told_what_is_left_of_the_time():
    request = {'cmd': 'x', 'args': [], 'env': {}, 'path': '', 'options': {'expires': 100}}
    assert hostcontrol.cmd_run('g', 'c', request, 49.9996).keys['expires'] == 50
    assert hostcontrol.cmd_run('g', 'c', request, -50).keys['expires'] > 0


# --- queue ---

def test_whom_a_glob_matches_that_are_all_away_are_not_unknown(absent, api):
    fault = fault_of(api.runCmdOnAll, 'awa[y]', 'true')
    assert fault.faultCode == 2 and 'away' in fault.faultString and 'queue' in fault.faultString

def test_a_multicast_waits_for_those_that_are_away(host, guest, absent, tmp_path, api):
    proof = Proof(tmp_path)
    cmd_id = api.runCmdOnAll('*', *proof.words(), {}, '', '', {'queue': True})
    assert host.results(cmd_id + '@one')['state'] == 'exited'
    assert api.getCmdStatus(cmd_id + '@away')['state'] == 'queued'
    with absent:
        assert host.results(cmd_id + '@away')['state'] == 'exited' and proof.runs() == 2
    here = api.runCmdOnAll('*', 'true')
    assert 'one' in str(api.getCmdDetails(here)['executions'])
    for options in ({}, {'queue': True}):
        assert fault_of(api.runCmdOnAll, 'nobody*', 'true', [], {}, '', '', options).faultCode == 1


# --- bytes ---

def test_bytes_reach_the_guest_in_base64():
    request, _ = hostrequests.read_request(
        'rm', [hostrequests.Binary(b'\xe4.txt'), 'ä', 5], {'N': hostrequests.Binary(b'\xff'), 'M': 'm'},
        hostrequests.Binary(b'\xfe/'), '', {})
    message = hostcontrol.cmd_run('g', 'c', request)
    assert message.keys['args64'] == [hostcontrol.to_base64(text) for text in ('\udce4.txt', 'ä', '5')]
    assert message.keys['env64'] == {'N': '/w=='} and message.mapping('env') == {'M': 'm'}
    assert message.keys['path64'] == '/i8=' and 'cmd64' not in message.keys
    message.body().decode('ascii')
    with pytest.raises(faults.InvalidParams, match='NUL'):
        hostrequests.read_request('x', [hostrequests.Binary(b'a\0')], {}, '', '', {})


def test_bytes_reach_the_program(host, guest, api):
    exact = xmlrpc.client.Binary(b'\xe4 \x01\n')
    folder = os.path.join(os.fsencode(guest.files), b'\xfc')
    os.mkdir(folder)
    cmd_id = api.runCmd('one', 'sh', ['-c', 'printf "%s|%s|" "$1" "$N"; pwd', 'sh', exact], {'N': exact},
                        xmlrpc.client.Binary(b'\xfc'))
    out = base64.b64decode(host.results(cmd_id)['out64'])
    assert out == b'\xe4 \x01\n|\xe4 \x01\n|' + os.path.realpath(folder) + b'\n'


def test_bytes_are_shown_as_they_were_given(host, guest, api):
    exact, control = xmlrpc.client.Binary(b'\xe4.txt'), xmlrpc.client.Binary(b'a\x01b')
    cmd_id = api.runCmd('one', 'true', [exact, control, 'plain'], {'N': exact})
    details = api.getCmdDetails(cmd_id)
    assert details['args'] == [exact, control, 'plain'] and details['env'] == {'N': exact}
    host.results(cmd_id)
    assert api.listCmds({'cmdId': cmd_id})[0]['line'].endswith('plain')


# --- lists ---

def test_lists_carry_no_more_than_they_show(host, absent, api):
    for _ in range(20):
        api.runCmd('away', 'x' * 3000, ['y' * 200000], {}, '', '', {'queue': True, 'stdin': 'z' * 300000})
    rows = api.listCmds({'vm': 'away', 'finished': False})
    assert len(rows) >= 20 and len(str(rows)) < 2500 * len(rows)
    assert rows[-1]['line'] == 'x' * 1000 + '…' and rows[-1]['cmd'] == 'x' * 1000
    assert api.getCmdDetails(rows[-1]['cmdId'])['args'] == ['y' * 200000]
    for row in rows:
        api.signalCmd(row['cmdId'])


# --- one of many ---

def test_one_that_hangs_is_waited_for_once(host, guest, absent, api):
    with absent:
        cmd_id = api.runCmdOnAll('*', 'sleep', ['60'])
        wait_until(lambda: all_run(api, cmd_id), 20)
        os.kill(absent.process.pid, signal.SIGSTOP)
        try:
            spans = []
            for _ in range(4):
                begin = time.monotonic()
                shown = api.getCmdStatus(cmd_id)
                spans.append(time.monotonic() - begin)
            assert sum(spans) < 4 and shown[cmd_id + '@one']['age'] < 2, spans
        finally:
            os.kill(absent.process.pid, signal.SIGCONT)
        api.signalCmd(cmd_id, 'KILL')
        wait_until(lambda: api.waitCmd(cmd_id, 20), 30)


# --- how long they are kept ---

def test_what_is_kept_for_seconds_goes_in_seconds(tmp_path):
    """Whatever the pace at which what is kept for days is looked for."""
    with Host(tmp_path / 'host', keep_results=3) as host, \
            Agent(tmp_path / 'guest', host, 'one', keep_spool=1) as guest, host.api as api:
        cmd_id = host.run('one', 'echo', 'x')['cmd-id']
        folder = os.path.join(guest.state, 'spool', 'one', cmd_id)
        assert os.listdir(folder)
        wait_until(lambda: not os.listdir(folder), 20)
        wait_until(lambda: cmd_id not in api.listFinishedCmds(), 20)
