"""The whole job, in a real Linux that VirtualBox runs, with the bundled agent, by the command line and by
XML-RPC; and a snapshot restored under commands. VirtualBox interprets every instruction here: to start the
agent takes most of the time, and to compile it most of that. So it comes compiled, but with VMHOST_FULL=1; as
a bundle is, it runs in the Linux of test_host_only_guest.py."""

import itertools
import json
import os
import shutil
import subprocess
import time
import xmlrpc.client

import pytest
from guests import agent_on_offer
from helpers import others_take, wait_until
from rig import facts, manage
from terminals import Terminal
from vms import VMHost, fault_of

SAVED = '/opt/linux-guest'
VM = 'linux-guest'
PATIENCE = 900                 # seconds for what takes some 40 on a machine with nothing else to do
JOB = 300                      # seconds that the whole job may take
# The guest's clock goes at a fifth of its speed, in %: since it is interpreted, it would do little but serve
# its timer, the more so the less of a processor it gets. Beside others' work the agent's start took 149 s of
# one, and hadn't come to its end.
SLOW_CLOCK, CLOCK = 'VBoxInternal/TM/WarpDrivePercentage', '20'
BEACONS = '[VM]\nbeacon_interval = 3\n'        # by which it sees that a restored connection is none
NUMBERS = range(1, 5)          # of which each takes a second of the guest's
PROGRAM = '''
echo started >> starts
total=0
while read number; do
    total=$((total + number))
    echo "at $number" > $VM_PROGRESS_FILE
    echo $total
    sleep 1
done < input
echo $total > output
'''
SCIENCE = '''#!/bin/sh
total=0
while read number; do
    total=$((total + number))
    echo $total
done < input
# The first time it is told to quit, and waits, with nothing to do for who interprets it, until it runs again.
if mkfifo gate 2> /dev/null; then read number < gate; else echo > gate; fi
echo $total > output
echo done >&2
'''

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not os.path.exists(SAVED + '/linux-guest.vbox'), reason='no saved guest: tests/rigs/virtualbox guest')]


class Guest:
    """linux-guest under a host agent in NAT mode."""

    def __init__(self, host, api, folder):
        self.host = host
        self.api = api
        self.folder = folder           # of the VM
        self.fresh = False             # whether it runs, its agent is there, and no command runs

    def begin(self, before=0.0):
        """The job's time runs from here; ``before``: seconds that are part of it already."""
        self.begun = time.monotonic() - before
        self.times = []

    def note(self, what):
        self.times.append('%s %.0f s' % (what, time.monotonic() - self.begun))

    def wait_for_agent(self):
        """Until it answers: after a restored state its connection is one that nobody knows."""
        wait_until(lambda: fault_of(self.api.ping, VM, 4)[0] == 0, PATIENCE, 0.2)

    def off(self):
        """No power, whatever it does."""
        if self.api.getState(VM) in ('Running', 'Paused'):
            self.api.powerOff(VM)

    def refresh(self):
        """Back at the snapshot with the agent, unless it is fresh; for one test."""
        if not self.fresh:
            self.off()
            self.api.restoreSnapshot(VM, 'with agent')
            self.api.start(VM)
            self.wait_for_agent()
        self.fresh = False

    def local(self, name, data=b''):
        """The path of a file on this side."""
        path = os.path.join(self.host.folder, name)
        with open(path, 'wb') as file:
            file.write(data)
        return path


class ByXMLRPC:
    """What the job needs, each as one call."""

    def __init__(self, guest):
        self.guest = guest
        self.api = guest.api

    def found(self):
        return self.api.getVM(VM)

    def put(self, path, name):
        assert self.api.cpFileToVM(VM, path, name)[2] == 0

    def get(self, name, path):
        assert self.api.cpFileFromVM(VM, name, path)[2] == 0

    def run(self, *words):
        return self.api.runCmd(VM, words[0], list(words[1:]), {}, '', '', {'statusInterval': 1})

    def progress(self, cmd_id):
        return self.api.getCmdStatus(cmd_id)['progress']

    def states(self, cmd_id):
        """The command's, as it is shown and listed."""
        return {self.api.getCmdStatus(cmd_id)['state']} | {
            row['state'] for row in self.api.listCmds({'cmdId': cmd_id})}

    def pause(self):
        assert self.api.pause(VM) is True

    def resume(self):
        assert self.api.resume(VM) is True

    def save(self):
        assert self.api.saveState(VM) is True

    def start(self):
        assert self.api.start(VM) is True

    def power_off(self):
        assert self.api.powerOff(VM) is True

    def results(self, cmd_id):
        return self.guest.host.results(cmd_id, PATIENCE)


class ByCommandLine:
    """What the job needs, each as one verb; what takes long on a terminal, which shows how far it is."""

    def __init__(self, guest):
        self.guest = guest
        self.running = None

    def verb(self, *words):
        done = self.guest.host.verb(*words, timeout=PATIENCE)
        assert (done.returncode, done.stderr) == (0, b''), (words, done)
        return done.stdout.decode()

    def on_terminal(self, *words):
        """The verb's last line, and whether it said before how long it has been at it."""
        code, text = Terminal(self.guest.host.command(*words)).wait()
        lines = [line.strip() for line in text.replace('\r', '\n').splitlines() if line.strip()]
        assert code == 0, text
        return lines[-1], any(line.startswith(VM + ': ') for line in lines[:-1])

    def register(self):
        assert self.verb('create', os.path.join(self.guest.folder, VM + '.vbox')) == VM + '\n'
        assert json.loads(self.verb('snap', 'ls', VM, '--json')) == ['ready']
        assert self.verb('snap', 'restore', VM, 'ready') == 'snapshot restored\n'
        self.start()

    def take(self, name):
        assert self.on_terminal('snap', 'take', VM, name) == ('snapshot taken', True)

    def found(self):
        found, = json.loads(self.verb('ls', '--json'))
        return found

    def put(self, path, name):
        assert self.verb('put', VM, path, name) == ''

    def get(self, name, path):
        assert self.verb('get', VM, name, path) == ''

    def run(self, *words):
        """In the foreground: it brings the output, whatever becomes of the VM meanwhile."""
        self.running = subprocess.Popen(
            self.guest.host.command('run', VM, '--', *words), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return wait_until(lambda: [row['cmdId'] for row in json.loads(self.verb('ps', VM, '--json'))
                                   if not row['ended']], PATIENCE)[0]

    def progress(self, cmd_id):
        return json.loads(self.verb('info', cmd_id, '--json'))['status']['progress']

    def states(self, cmd_id):
        """The command's, as it is shown and listed."""
        return {json.loads(self.verb('info', cmd_id, '--json'))['status']['state']} | {
            row['state'] for row in json.loads(self.verb('ps', '--json')) if row['cmdId'] == cmd_id}

    def pause(self):
        assert self.verb('pause', VM) == VM + ' is paused\n'

    def resume(self):
        assert self.verb('resume', VM) == VM + ' is running\n'

    def save(self):
        assert self.on_terminal('save', VM) == (VM + ' is saved', True)

    def start(self):
        assert self.verb('start', VM) == VM + ' is running\n'

    def power_off(self):
        assert self.verb('stop', '--force', VM) == VM + ' is off\n'

    def results(self, cmd_id):
        """What `run` brought is all there is."""
        out, err = self.running.communicate(timeout=PATIENCE)
        results = json.loads(self.verb('info', cmd_id, '--json'))['results']
        assert self.running.returncode == results['exitCodeOrSignal']
        # The VM was paused and saved meanwhile, of which a person who waits is told.
        assert err in (b'', b'vmhost: the VM does not answer; still waiting\n')
        assert out.decode() == results['out'] == self.verb('out', cmd_id)
        return results


@pytest.fixture(scope='module')
def guest(home, tmp_path_factory):
    """linux-guest, made and started by the command line, its agent there; and a snapshot of that."""
    folder = os.path.join(home, 'vms', VM)
    shutil.copytree(SAVED, folder)
    os.makedirs('/root/linux-guest', exist_ok=True)
    shutil.move(os.path.join(folder, 'guest.iso'), '/root/linux-guest/guest.iso')
    if not os.environ.get('VMHOST_FULL'):
        manage('setextradata', 'global', SLOW_CLOCK, CLOCK)
    tmp_path = tmp_path_factory.mktemp('linux-guest')
    host = VMHost(tmp_path / 'host', broker={'port': 61613, 'heartbeat': 20}, xmlrpc_auth='no',
                  vm_gc_grace=120, hypervisor={'command_timeout': 120})    # the guest's seconds are long ones
    with host, host.api as api, agent_on_offer(
            '127.0.0.1', BEACONS, tmp_path, compiled=not os.environ.get('VMHOST_FULL')):
        guest = Guest(host, api, folder)
        guest.begin()
        verbs = ByCommandLine(guest)
        verbs.register()
        wait_until(lambda: api.listRegisteredVMs() == [VM], PATIENCE, 0.2)
        guest.note('agent there')
        verbs.take('with agent')
        guest.note('snapshot')
        guest.fresh, guest.making = True, time.monotonic() - guest.begun
        yield guest
        guest.off()
        api.removeVM(VM, True)
    manage('setextradata', 'global', SLOW_CLOCK)


def test_a_snapshot_restored_under_commands(guest):
    """What ran is lost, for its disk went back in time; what was only sent is sent again."""
    api = guest.api
    guest.refresh()
    running = api.runCmd(VM, 'sleep', ['3000'])
    wait_until(lambda: api.getCmdStatus(running)['state'] == 'running', PATIENCE, 0.5)
    api.pause(VM)
    sent = api.runCmd(VM, 'echo', ['once'])
    assert api.getCmdStatus(sent)['state'] == 'sent'
    guest.refresh()
    results = guest.host.results(sent, PATIENCE)
    assert (results['out'], results['state']) == ('once\n', 'exited')
    wait_until(lambda: api.getCmdResults(running), PATIENCE, 0.5)
    results = api.getCmdResults(running)
    assert (results['state'], results['finished'], results['exitCodeOrSignal']) == ('lost', False, -1)
    assert len([event for event in guest.host.events() if event['cmdId'] == sent and 'exited' in (
        event['text'], event['type'])]) <= 1
    guest.fresh = True


@pytest.mark.parametrize('way', [ByCommandLine, pytest.param(ByXMLRPC, marks=pytest.mark.skipif(
    not os.environ.get('VMHOST_FULL'), reason='the old wrapper does much the same: VMHOST_FULL=1'))])
def test_the_whole_job(guest, way):
    """By the command line from the VM's registration on, by XML-RPC from the snapshot with the agent."""
    by = way(guest)
    guest.begin(guest.making if way is ByCommandLine else 0)
    guest.refresh()
    found = by.found()
    assert (found['id'].replace(':', ''), found['state'], found['agent']) == (
        facts(VM)['macaddress1'], 'Running', 'alive')
    by.put(guest.local('input', b''.join(b'%d\n' % number for number in NUMBERS)), 'input')
    by.put(guest.local('program', PROGRAM.encode()), 'program')
    guest.note('input there')
    cmd_id = by.run('sh', 'program')
    wait_until(lambda: by.progress(cmd_id).startswith('at '), PATIENCE, 1)      # each asks the slow guest
    guest.note('progress seen')
    by.pause()
    assert by.found()['state'] == 'Paused' and by.states(cmd_id) == {'suspended'}
    by.resume()
    assert by.states(cmd_id) == {'running'}
    by.save()
    assert by.found()['state'] == 'Saved' and by.states(cmd_id) == {'suspended'}
    by.start()
    guest.wait_for_agent()
    guest.note('saved and back')
    results = by.results(cmd_id)
    guest.note('ended')
    assert (results['state'], results['exitCodeOrSignal'], results['err']) == ('exited', 0, '')
    assert [int(line) for line in results['out'].split()] == list(itertools.accumulate(NUMBERS))
    usage = results['resources']
    assert len(usage) == 16 and usage['ru_utime'] + usage['ru_stime'] > 0 and usage['ru_maxrss'] > 500
    assert results['wall'] >= len(NUMBERS)
    for name, content in (('output', b'%d\n' % sum(NUMBERS)), ('starts', b'started\n')):
        got = guest.local('got')
        by.get(name, got)
        with open(got, 'rb') as file:
            assert file.read() == content
    guest.note('output here')
    by.power_off()
    assert by.found()['state'] == 'PoweredOff'
    guest.note('off')
    print(', '.join(guest.times))
    assert time.monotonic() - guest.begun < JOB * others_take(), guest.times


class OldWrapper:
    """The BOINC wrapper of 2009, call for call: what its Python 2 script asks an older host agent for, with
    its arguments as they are, at its address, without a password. Its task is a program and a file of input,
    which are copied into the VM; its client tells it by ``orders`` to checkpoint, suspend, resume or quit,
    one in each round."""

    def __init__(self, host, folder):
        self.vms = xmlrpc.client.ServerProxy('http://localhost:%s/RPC2' % host.address.rpartition(':')[2])
        self.folder = folder
        self.cmd_id = ''               # of the task's command
        self.cpu_times = []            # of the VM, in s, as it reports them

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.vms('close')()

    def run(self, orders):
        """Until the task has ended: its results. None where it was told to quit."""
        assert VM in self.vms.listAvailableVMs()
        self.begin()
        self.cmd_id = self.vms.runCmd(VM, './science', [' 8 '], '{}', 'None', 'input')
        while orders or self.cmd_id not in self.vms.listFinishedCmds():
            order = orders.pop(0) if orders else 'poll'
            if order == 'quit':
                self.vms.saveState(VM)
                return self.end()
            self.obey(order)
        results = self.vms.getCmdResults(self.cmd_id)
        assert results['resources']['ru_stime'] + results['resources']['ru_utime'] > 0
        self.wait_for_agent()
        assert self.vms.cpFileFromVM(VM, 'output', os.path.join(self.folder, 'output'))[2] == 0
        self.vms.saveState(VM)
        self.end()
        return results

    def begin(self):
        if self.vms.getState(VM) != 'Saved':
            self.vms.restoreSnapshot(VM)
        if VM not in self.vms.listRunningVMs():
            self.vms.start(VM)
        assert VM in self.vms.listRunningVMs()
        self.wait_for_agent()
        for name, remote in (('science', './science'), ('input', 'input')):
            out, err, status = self.vms.cpFileToVM(VM, os.path.join(self.folder, name), remote)
            assert status == 0, err

    def wait_for_agent(self):
        wait_until(lambda: fault_of(self.vms.ping, VM)[0] == 0, PATIENCE, 0.5)

    def obey(self, order):
        if order == 'checkpoint':
            self.vms.saveSnapshot(VM, '')
        elif order == 'suspend':
            self.vms.pause(VM)
            assert self.vms.getState(VM) == 'Paused'
        elif order == 'resume':
            self.vms.unpause(VM)
        if order != 'suspend':                      # of a VM that is paused it asks for no time
            self.cpu_times.append(self.cpu_time())

    def cpu_time(self):
        cmd_id = self.vms.runCmd(VM, 'cat', ['/proc/uptime'])
        wait_until(lambda: cmd_id in self.vms.listFinishedCmds(), PATIENCE, 0.2)
        up, idle = map(float, self.vms.getCmdResults(cmd_id)['out'].split())
        return up - idle

    def end(self):
        if VM in self.vms.listRunningVMs():
            self.vms.saveState(VM)


def test_the_old_wrappers_job(guest, tmp_path):
    """With its checkpoints, suspended, told to quit, and started again: it then runs its command anew."""
    guest.begin()
    guest.off()
    guest.fresh = False
    (tmp_path / 'input').write_text(''.join('%d\n' % number for number in NUMBERS))
    (tmp_path / 'science').write_text(SCIENCE)
    os.chmod(str(tmp_path / 'science'), 0o755)
    before = guest.api.listSnapshots(VM)
    with OldWrapper(guest.host, str(tmp_path)) as wrapper:
        assert wrapper.run(['poll', 'checkpoint', 'suspend', 'resume', 'quit']) is None
        guest.note('told to quit')
        first = wrapper.cmd_id
        assert guest.api.getCmdStatus(first)['state'] == 'suspended'
        assert guest.api.getState(VM) == 'Saved' and len(guest.api.listSnapshots(VM)) == len(before) + 1
    with OldWrapper(guest.host, str(tmp_path)) as wrapper:
        results = wrapper.run(['checkpoint'])
    guest.note('ended')
    assert guest.api.getCmdStatus(first)['state'] == 'exited'      # though its wrapper has forgotten it
    assert (results['finished'], results['exitCodeOrSignal'], results['err']) == (True, 0, 'done\n')
    assert [int(line) for line in results['out'].split()] == list(itertools.accumulate(NUMBERS))
    assert (tmp_path / 'output').read_text() == '%d\n' % sum(NUMBERS)
    assert guest.api.getState(VM) == 'Saved' and len(wrapper.cpu_times) >= 1
    made = [name for name in guest.api.listSnapshots(VM) if name not in before]
    assert len(made) == 2
    for name in reversed(made):
        guest.api.deleteSnapshot(VM, name)
    guest.note('cleaned up')
    print(', '.join(guest.times))
    assert time.monotonic() - guest.begun < JOB * others_take(), guest.times
