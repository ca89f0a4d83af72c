"""The whole job, in a real Linux that VirtualBox runs, with the bundled agent; and a snapshot restored under
commands. VirtualBox interprets every instruction here: the agent's start alone takes most of the time."""

import os
import shutil
import time

import pytest
from guests import agent_on_offer
from helpers import wait_until
from rig import facts
from vms import VMHost, fault_of

FULL = os.environ.get('VMHOST_FULL')
SAVED = '/opt/linux-guest'
VM = 'linux-guest'
PATIENCE = 400                 # seconds for what takes some 40 on a machine with nothing else to do
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

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not os.path.exists(SAVED + '/linux-guest.vbox'), reason='no saved guest: tests/rigs/virtualbox guest')]


class Guest:
    """linux-guest under a host agent in NAT mode."""

    def __init__(self, host, api):
        self.host = host
        self.api = api
        self.begun = time.monotonic()
        self.times = []

    def note(self, what):
        self.times.append('%s %.0f s' % (what, time.monotonic() - self.begun))

    def wait_for_agent(self):
        """Until it answers: after a restored state its connection is one that nobody knows."""
        wait_until(lambda: fault_of(self.api.ping, VM, 20)[0] == 0, PATIENCE, 0.2)

    def put(self, name, data):
        """A file into the guest."""
        path = os.path.join(self.host.folder, name)
        with open(path, 'wb') as file:
            file.write(data)
        assert self.api.cpFileToVM(VM, path, '/' + name)[2] == 0

    def get(self, name):
        """A file of the guest's."""
        path = os.path.join(self.host.folder, 'got-' + name)
        assert self.api.cpFileFromVM(VM, '/' + name, path)[2] == 0
        with open(path, 'rb') as file:
            return file.read()


@pytest.fixture(scope='module')
def guest(home, tmp_path_factory):
    """linux-guest, registered, restored, started, its agent there; and a snapshot of that."""
    folder = os.path.join(home, 'vms', VM)
    shutil.copytree(SAVED, folder)
    os.makedirs('/root/linux-guest', exist_ok=True)
    shutil.move(os.path.join(folder, 'guest.iso'), '/root/linux-guest/guest.iso')
    tmp_path = tmp_path_factory.mktemp('linux-guest')
    host = VMHost(tmp_path / 'host', broker={'port': 61613}, hypervisor={'command_timeout': 120})
    with host, host.api as api, agent_on_offer('127.0.0.1', '', tmp_path):
        guest = Guest(host, api)
        assert api.createVM(os.path.join(folder, VM + '.vbox')) == [True, VM]
        assert api.listSnapshots(VM) == ['ready']
        api.restoreSnapshot(VM, 'ready')
        api.start(VM)
        wait_until(lambda: api.listRegisteredVMs() == [VM], PATIENCE, 0.2)
        guest.note('agent there')
        api.takeSnapshot(VM, 'with agent')
        guest.note('snapshot')
        yield guest
        if api.getState(VM) == 'Running':
            api.powerOff(VM)
        api.removeVM(VM, True)


def test_the_whole_job(guest):
    api = guest.api
    found = api.getVM(VM)
    assert (found['id'].replace(':', ''), found['state'], found['agent']) == (
        facts(VM)['macaddress1'], 'Running', 'alive')
    guest.put('input', b''.join(b'%d\n' % number for number in range(1, 21)))
    guest.put('program', PROGRAM.encode())
    guest.note('input there')
    cmd_id = api.runCmd(VM, 'sh', ['program'], {}, '', '', {'statusInterval': 1})
    wait_until(lambda: api.getCmdStatus(cmd_id)['progress'].startswith('at '), PATIENCE, 0.5)
    guest.note('progress seen')
    api.pause(VM)
    assert api.getCmdStatus(cmd_id)['state'] == 'suspended'
    assert [row['state'] for row in api.listCmds({'cmdId': cmd_id})] == ['suspended']
    api.resume(VM)
    assert api.getCmdStatus(cmd_id, False)['state'] == 'running'
    api.saveState(VM)
    assert (api.getState(VM), api.getCmdStatus(cmd_id)['state']) == ('Saved', 'suspended')
    api.start(VM)
    guest.wait_for_agent()
    guest.note('saved and back')
    results = guest.host.results(cmd_id, PATIENCE)
    guest.note('ended')
    assert (results['state'], results['exitCodeOrSignal'], results['err']) == ('exited', 0, '')
    totals = [number * (number + 1) // 2 for number in range(1, 21)]
    assert results['out'].split() == [str(total) for total in totals]
    usage = results['resources']
    assert len(usage) == 16 and usage['ru_utime'] + usage['ru_stime'] > 0 and usage['ru_maxrss'] > 500
    assert results['wall'] >= 20
    assert guest.get('output') == b'210\n'
    assert guest.get('starts') == b'started\n'
    guest.note('output here')
    assert api.powerOff(VM) is True
    guest.note('off')
    print(', '.join(guest.times))
    assert not FULL or time.monotonic() - guest.begun < 180, guest.times


def test_a_snapshot_restored_under_commands(guest):
    """What ran is lost, for its disk went back in time; what was only sent is sent again."""
    api = guest.api
    if api.getState(VM) == 'Running':
        api.powerOff(VM)
    api.restoreSnapshot(VM, 'with agent')
    api.start(VM)
    guest.wait_for_agent()
    running = api.runCmd(VM, 'sleep', ['3000'])
    wait_until(lambda: api.getCmdStatus(running)['state'] == 'running', PATIENCE, 0.5)
    api.pause(VM)
    sent = api.runCmd(VM, 'echo', ['once'])
    assert api.getCmdStatus(sent)['state'] == 'sent'
    api.powerOff(VM)
    api.restoreSnapshot(VM, 'with agent')
    api.start(VM)
    guest.wait_for_agent()
    results = guest.host.results(sent, PATIENCE)
    assert (results['out'], results['state']) == ('once\n', 'exited')
    wait_until(lambda: api.getCmdResults(running), PATIENCE, 0.5)
    results = api.getCmdResults(running)
    assert (results['state'], results['finished'], results['exitCodeOrSignal']) == ('lost', False, -1)
    assert len([event for event in guest.host.events() if event['cmdId'] == sent and 'exited' in (
        event['text'], event['type'])]) <= 1
