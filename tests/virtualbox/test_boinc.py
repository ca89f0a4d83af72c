"""A real BOINC client's task with the real VirtualBox: vmboinc makes its VM on the project's image, in the
slot, has it paused and saved, and leaves nothing of it. VirtualBox interprets every instruction here, so
nothing boots in that time: what runs in VMs is tested with the fake (test_boinc_client.py).
"""

import glob
import hashlib
import os
import re

import boinc as boinc_rig
import pytest
from helpers import wait_until
from rig import facts, manage, state_of

PATIENCE = 120                 # seconds for what takes some 5 on a machine with nothing else to do

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


def test_the_vm_of_a_task(boinc, image):
    rig = boinc.rig
    boinc.add('t1', 'sleep 600\n', '<multiattach_vdi_file>image.vdi</multiattach_vdi_file>', files=[image])
    image = os.path.join(boinc.project, 'image.vdi')
    before = digest(image)
    vm = os.path.basename(boinc.project) + '_t1'

    def reaches(state):
        wait_until(lambda: state_of(vm) == state, PATIENCE, 0.3)
    rig.start()
    reaches('running')
    folder = os.path.join(rig.slot('t1'), vm)
    assert facts(vm)['CfgFile'] == os.path.join(folder, vm + '.vbox')
    disk, = glob.glob(folder + '/*.vdi')
    assert uuid_of(disk, 'Parent UUID') == uuid_of(image)
    rig.operate('suspend', 't1')
    reaches('paused')
    rig.operate('resume', 't1')
    reaches('running')
    rig.stop()
    assert state_of(vm) == 'saved'
    rig.start()
    reaches('running')
    rig.operate('abort', 't1')
    end = rig.wait('t1', 'done=true', PATIENCE)
    assert (end['state'], end['exit']) == ('aborted', 203), rig.stderr('t1')
    assert vm not in manage('list', 'vms') and not os.path.exists(folder)
    assert digest(image) == before and 'image.vdi' not in manage('list', 'hdds')
