"""A real BOINC client's task with the real VirtualBox: vmboinc makes its VM on the project's image, in the
slot, has it paused and saved, and leaves nothing of it; and the science runs in a real Linux there.

VirtualBox interprets every instruction here, and a Linux takes 43 minutes to boot. So the task is unloaded
while its VM boots, and meanwhile the VM gets the hardware and the memory of linux-guest, which has booted.
"""

import copy
import glob
import hashlib
import os
import re
import shutil
import signal
import time
import xml.etree.ElementTree

import boinc as boinc_rig
import pytest
from guests import agent_on_offer
from helpers import wait_until
from rig import facts, manage, state_of, vm_process

import boincwork

SAVED = '/opt/linux-guest'
SCHEMA = '{http://www.virtualbox.org/}'
PATIENCE = 120                 # seconds for what takes some 5 on a machine with nothing else to do
LONG_PATIENCE = 900            # … and for what takes some 40

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not os.path.isdir(os.path.expanduser('~/.cache/boinc-rig')),
                                 reason='no BOINC client in the rig: tests/rigs/virtualbox boinc')]


@pytest.fixture
def boinc(home, tmp_path):
    with boinc_rig.running(tmp_path, boinc_rig.Boinc) as found:
        yield found


@pytest.fixture
def image(home, tmp_path):
    """A project's disk image, which VirtualBox doesn't know yet."""
    raw, path = str(tmp_path / 'raw'), str(tmp_path / 'image.vdi')
    with open(raw, 'wb') as file:
        file.truncate(4 << 20)
    manage('convertfromraw', raw, path, '--format', 'VDI')
    return path


def digest(path):
    with open(path, 'rb') as file:
        return hashlib.md5(file.read()).hexdigest()


def uuid_of(disk, whose='UUID'):
    return re.search('^%s: *(.*)$' % whose, manage('showmediuminfo', disk), re.MULTILINE).group(1)


def reaches(vm, state):
    wait_until(lambda: state_of(vm) == state, PATIENCE, 1)     # to ask takes 0.05 s of a processor


def test_the_vm_of_a_task(boinc, image):
    rig = boinc.rig
    boinc.add('t1', 'sleep 600\n', '<multiattach_vdi_file>image.vdi</multiattach_vdi_file>', files=[image])
    image = os.path.join(boinc.project, 'image.vdi')
    before = digest(image)
    vm = boinc.vm('t1')
    rig.start()
    reaches(vm, 'running')
    folder = os.path.join(rig.slot('t1'), vm)
    assert facts(vm)['CfgFile'] == os.path.join(folder, vm + '.vbox')
    disk, = glob.glob(folder + '/*.vdi')
    assert uuid_of(disk, 'Parent UUID') == uuid_of(image)
    process = vm_process(facts(vm)['UUID'])
    assert boinc.client.call('getVM', vm)['pid'] == process
    os.setpriority(os.PRIO_PROCESS, process, 0)        # as what VirtualBox's own window has started
    nice = os.getpriority(os.PRIO_PROCESS, rig.task('t1')['pid'])
    wait_until(lambda: os.getpriority(os.PRIO_PROCESS, process) == nice, PATIENCE, 0.3)
    rig.operate('suspend', 't1')
    reaches(vm, 'paused')
    rig.operate('resume', 't1')
    reaches(vm, 'running')
    rig.stop()
    assert state_of(vm) == 'saved'
    rig.start()
    reaches(vm, 'running')
    rig.operate('abort', 't1')
    end = rig.wait('t1', 'done=true', PATIENCE)
    assert (end['state'], end['exit']) == ('aborted', 203), rig.stderr('t1')
    assert vm not in manage('list', 'vms') and not os.path.exists(folder)
    assert digest(image) == before and 'image.vdi' not in manage('list', 'hdds')


def test_vms_of_two_projects(boinc, image, tmp_path):
    """Two tasks of one project, one of the other, of one client: what becomes of the one's is nothing to the
    other's, and nothing is left of any."""
    rig, other_image = boinc.rig, str(tmp_path / 'other.vdi')
    manage('createmedium', 'disk', '--filename', other_image, '--size', '4')
    manage('closemedium', 'disk', other_image)
    job = '<multiattach_vdi_file>%s</multiattach_vdi_file>'
    for name in ('a', 'b'):
        boinc.add(name, 'sleep 600\n', job % 'image.vdi', files=[image])
    other = copy.copy(boinc)
    other.use(rig.beside('other'))
    other.add('c', 'sleep 600\n', job % 'other.vdi', files=[other_image])
    project_of = {'a': boinc, 'b': boinc, 'c': other}
    machines = {name: project_of[name].vm(name) for name in project_of}
    rig.start()
    try:
        for vm in machines.values():
            reaches(vm, 'running')
        settings = [facts(vm)['CfgFile'] for vm in machines.values()]
        assert all(path.startswith(rig.path('data', 'slots')) for path in settings)
        hosts = boinc.host_pids(), other.host_pids()
        assert [len(pids) for pids in hosts] == [1, 1]
        rig.operate('abort', 'a')
        rig.wait('a', 'done=true', PATIENCE)
        wait_until(lambda: machines['a'] not in manage('list', 'vms'), PATIENCE, 0.3)
        theirs = boincwork.OWNER + boinc.project
        assert boinc.client.call('cleanup', False, [machines['c']], theirs) == []
        assert (state_of(machines['b']), state_of(machines['c'])) == ('running', 'running')
        rig.stop()
        assert (state_of(machines['b']), state_of(machines['c'])) == ('saved', 'saved')
        rig.start()
        for name in ('b', 'c'):
            reaches(machines[name], 'running')
        for name in ('c', 'b'):
            project_of[name].rig.operate('abort', name)
            rig.wait(name, 'done=true', PATIENCE)
        wait_until(lambda: not any(vm in manage('list', 'vms') for vm in machines.values()), PATIENCE, 0.3)
        assert not glob.glob(rig.path('data', 'slots', '*', '*', '*.vdi'))
        assert 'image.vdi' not in manage('list', 'hdds') and 'other.vdi' not in manage('list', 'hdds')
    finally:
        other.end_hosts()


def as_if_booted(vm):
    """Gives a saved VM the hardware of linux-guest, and the memory that this had when it waited for an agent.
    Its own disk stays where it is: for a machine with one more device that memory is refused."""
    manage('discardstate', vm)
    settings = facts(vm)['CfgFile']
    manage('unregistervm', vm)
    xml.etree.ElementTree.register_namespace('', SCHEMA.strip('{}'))
    tree = xml.etree.ElementTree.parse(settings)
    machine = tree.find(SCHEMA + 'Machine')
    guest = xml.etree.ElementTree.parse(SAVED + '/linux-guest.vbox').find(SCHEMA + 'Machine')
    old, new = machine.find(SCHEMA + 'Hardware'), guest.find(SCHEMA + 'Hardware')
    machine.insert(list(machine).index(old), new)
    machine.remove(old)
    registry = machine.find(SCHEMA + 'MediaRegistry')
    if registry is None:
        registry = xml.etree.ElementTree.Element(SCHEMA + 'MediaRegistry')
        machine.insert(0, registry)
    for discs in registry.findall(SCHEMA + 'DVDImages'):
        registry.remove(discs)
    registry.append(guest.find(SCHEMA + 'MediaRegistry').find(SCHEMA + 'DVDImages'))
    next(registry.find(SCHEMA + 'DVDImages').iter(SCHEMA + 'Image')).set('location', SAVED + '/guest.iso')
    next(new.iter(SCHEMA + 'Port')).set('path', os.path.join(os.path.dirname(settings), 'serial.log'))
    tree.write(settings, encoding='utf-8', xml_declaration=True)
    manage('registervm', settings)
    memory, = glob.glob(SAVED + '/Snapshots/*.sav')
    manage('adoptstate', vm, shutil.copy(memory, os.path.dirname(settings)))       # which goes with the VM


@pytest.mark.skipif(not os.environ.get('VMHOST_FULL'), reason='takes minutes: VMHOST_FULL=1')
@pytest.mark.skipif(not os.path.exists(SAVED + '/linux-guest.vbox'),
                    reason='no saved guest: tests/rigs/virtualbox guest')
def test_the_science_of_a_task(boinc, image, tmp_path):
    """Through all that can end a process: one program, or its last checkpoint. The output comes back;
    fraction and CPU time never go back, and the CPU time is the one that the guest's kernel tells. It takes
    some seven minutes with a processor of its own, half of that until the agent has started."""
    rig, begun = boinc.rig, time.monotonic()

    def note(what):
        print('%3.0f s: %s' % (time.monotonic() - begun, what))
    boinc.add('t1', boinc_rig.COUNT.replace('2000', '200'),
              '<multiattach_vdi_file>image.vdi</multiattach_vdi_file><input>in</input><input>more/in</input>'
              '<output>out</output><minimum_checkpoint_interval>15</minimum_checkpoint_interval>',
              [('in', 'apples\n'), ('more/in', 'pears\n')], ['out'], 'and plums', [image])
    vm = boinc.vm('t1')
    rig.start()
    reaches(vm, 'running')
    rig.stop()
    as_if_booted(vm)
    note('as if booted')
    task = boinc_rig.Watched(boinc, 't1')
    with agent_on_offer('127.0.0.1', '', tmp_path):
        rig.start()
        task.wait(lambda now: now['cpu'] > 0 and now['checkpoint'] > 0, LONG_PATIENCE)
    note('progress seen, and a checkpoint')
    rig.operate('suspend', 't1')
    reaches(vm, 'paused')
    rig.operate('resume', 't1')
    task.gets_further(LONG_PATIENCE)
    note('suspended')
    rig.change('global_prefs_override.xml', ['leave_apps_in_memory=0'])
    rig.operate('suspend', 't1')
    rig.wait('t1', 'process=none', PATIENCE)
    assert state_of(vm) == 'saved'
    rig.operate('resume', 't1')
    task.gets_further(LONG_PATIENCE)
    note('unloaded')
    rig.stop()
    assert state_of(vm) == 'saved'
    task.begins_at_a_checkpoint()
    rig.start()
    reaches(vm, 'running')
    task.gets_further(LONG_PATIENCE)
    note('its client quit')
    rig.kill()
    reaches(vm, 'saved')
    task.begins_at_a_checkpoint()
    rig.start()
    reaches(vm, 'running')
    task.gets_further(LONG_PATIENCE)
    note('its client was killed')
    process = wait_until(lambda: vm_process(facts(vm)['UUID']), PATIENCE)
    task.kill_wrapper(PATIENCE)
    task.gets_further(LONG_PATIENCE)
    note('its wrapper was killed')
    host, = boinc.host_pids()
    os.kill(host, signal.SIGKILL)
    task.wait(lambda now: len(boinc.host_pids()) == 1 and boinc.host_pids() != [host], PATIENCE)
    task.gets_further(LONG_PATIENCE)
    assert vm_process(facts(vm)['UUID']) == process
    note('its host agent was killed')
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: 'goes on from its last checkpoint' in rig.stderr('t1'), PATIENCE, 0.3)
    task.gets_further(LONG_PATIENCE)
    note('its VM was killed')
    boinc.client.call('runCmd', vm, 'touch', ['finish'], {}, '', '', {'queue': True})
    end = rig.wait('t1', 'done=true', LONG_PATIENCE)
    note('ended')
    assert (end['state'], end['exit']) == ('uploaded', 0), rig.stderr('t1')
    with open(rig.file('t1', 'out')) as file:
        lines = file.read().split('\n')
    assert lines[:4] == ['apples', 'pears', 'and plums', '1']
    used = boinc_rig.seconds_of(lines[4:6])
    print('CPU time %.2f s, of which the guest says %.2f s' % (end['cpu'], used))
    assert end['cpu'] == pytest.approx(used, rel=0.05, abs=0.05)
    boinc_rig.assert_only_grow(boinc.told())
    assert vm not in manage('list', 'vms') and not glob.glob(rig.path('data', 'slots', '*', '*'))
