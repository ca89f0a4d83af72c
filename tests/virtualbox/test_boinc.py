"""The whole job of a real BOINC client's task in a VM: vmboinc makes it on the project's image, in the slot,
and the science runs in a real Linux there.

VirtualBox interprets every instruction here, and a boot takes a quarter of an hour. So the task is unloaded
while its VM boots; and meanwhile the VM gets the hardware and the memory of linux-guest, which has booted.
"""

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

import hostclient

SAVED = '/opt/linux-guest'
SCHEMA = '{http://www.virtualbox.org/}'
PATIENCE = 900                 # seconds for what takes some 40 on a machine with nothing else to do

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not os.path.exists(SAVED + '/linux-guest.vbox'),
                                 reason='no saved guest: tests/rigs/virtualbox guest'),
              pytest.mark.skipif(not os.path.isdir(os.path.expanduser('~/.cache/boinc-rig')),
                                 reason='no BOINC client in the rig: tests/rigs/virtualbox boinc')]


@pytest.fixture
def boinc(home, tmp_path):
    with boinc_rig.running(tmp_path, boinc_rig.Boinc) as found:
        yield found
        print(found.rig.stderr('t1'))


@pytest.fixture
def image(home, tmp_path):
    """A project's disk image, which VirtualBox doesn't know yet."""
    raw, path = str(tmp_path / 'raw'), str(tmp_path / 'image.vdi')
    with open(raw, 'wb') as file:
        file.truncate(4 << 20)
    manage('convertfromraw', raw, path, '--format', 'VDI')
    return path


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


def digest(path):
    with open(path, 'rb') as file:
        return hashlib.md5(file.read()).hexdigest()


def test_a_task_in_a_vm_of_its_own(boinc, image, tmp_path):
    rig, begun = boinc.rig, time.monotonic()

    def note(what):
        print('%3.0f s: %s' % (time.monotonic() - begun, what))

    def until(condition, seconds=PATIENCE):
        return wait_until(condition, seconds, 0.3)
    boinc.add('t1', boinc_rig.COUNT.replace('20000', '200'),
              '<multiattach_vdi_file>image.vdi</multiattach_vdi_file><checkpoint>files</checkpoint>'
              '<input>in</input><input>more/in</input><output>out</output>',
              [('in', 'apples\n'), ('more/in', 'pears\n')], ['out'], 'and plums', [image])
    image = os.path.join(boinc.project, 'image.vdi')
    before = digest(image)
    vm = os.path.basename(boinc.project) + '_t1'
    rig.start()
    until(lambda: state_of(vm) == 'running')
    note('it boots')
    folder = os.path.join(rig.slot('t1'), vm)
    assert facts(vm)['CfgFile'] == os.path.join(folder, vm + '.vbox')
    disk, = glob.glob(folder + '/*.vdi')
    assert re.search('Parent UUID: *(.*)', manage('showmediuminfo', disk)).group(1) == re.search(
        'UUID: *(.*)', manage('showmediuminfo', image)).group(1)
    rig.stop()
    assert state_of(vm) == 'saved'
    note('saved')
    as_if_booted(vm)
    with agent_on_offer('127.0.0.1', '', tmp_path):
        rig.start()
        until(lambda: rig.task('t1')['cpu'] > 0)
    note('progress seen')
    rig.operate('suspend', 't1')
    until(lambda: state_of(vm) == 'paused')
    rig.operate('resume', 't1')
    until(lambda: state_of(vm) == 'running')
    note('suspended and resumed')
    process = vm_process(facts(vm)['UUID'])
    wrapper = rig.task('t1')['pid']
    os.kill(wrapper, signal.SIGKILL)
    until(lambda: rig.task('t1')['pid'] not in (0, wrapper))
    fraction = rig.task('t1')['fraction']
    until(lambda: rig.task('t1')['fraction'] > fraction)
    assert vm_process(facts(vm)['UUID']) == process
    note('another wrapper')
    hostclient.Client(boinc.state).call('runCmd', vm, 'touch', ['finish'])
    end = rig.wait('t1', 'done=true', PATIENCE)
    note('ended')
    assert (end['state'], end['exit']) == ('uploaded', 0), rig.stderr('t1')
    with open(rig.file('t1', 'out')) as file:
        lines = file.read().split('\n')
    assert lines[:4] == ['apples', 'pears', 'and plums', '1']
    used = sum(60 * float(minutes) + float(seconds) for minutes, seconds in re.findall(
        r'(\d+)m([\d.]+)s', ' '.join(lines[4:6])))
    assert end['cpu'] == pytest.approx(used, rel=0.05, abs=0.2)
    assert not os.path.exists(folder) and vm not in manage('list', 'vms')
    assert digest(image) == before
