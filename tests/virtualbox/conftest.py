"""The real VirtualBox of the rig, with a home of its own for the time of the tests."""

import os
import shutil
import subprocess
import tempfile

import pytest
from rig import manage, remove, settings_files, try_manage
from vms import VMHost, command_line, kill, processes

IN_RIG = os.path.exists('/etc/vmhost-rig')
EVERY_INSTRUCTION = ('HM/HMForced=0', 'HM/FallbackToIEM=1', 'EM/IemExecutesAll=1')
# The BIOS fades its logo in and out, and asks for a key: half of what a VM takes that boots nothing.
NO_LOGO = tuple('Devices/vga/0/Config/' + key for key in (
    'FadeIn=0', 'FadeOut=0', 'LogoTime=0', 'ShowBootMenu=0'))
HERE = os.path.dirname(os.path.abspath(__file__))
MEGABYTES = int(os.environ.get('VMHOST_IMAGE_MB') or 192)
# A boot sector that writes R to the first serial port, and powers off when the ACPI button is pressed.
BUTTON_SYSTEM = bytes([
    0xba, 0xf8, 0x03, 0xb0, 0x52, 0xee,                 # mov dx,3f8h; mov al,'R'; out dx,al
    0xba, 0x00, 0x40, 0xed, 0xa9, 0x00, 0x01,           # again: mov dx,4000h; in ax,dx; test ax,PWRBTN_STS
    0x75, 0x04, 0xfb, 0xf4, 0xeb, 0xf3,                 # jnz off; sti; hlt; jmp again
    0xba, 0x04, 0x40, 0xb8, 0x00, 0x34, 0xef, 0xf4])    # off: mov dx,4004h; mov ax,S5+SLP_EN; out dx,ax; hlt


def pytest_collection_modifyitems(items):
    for item in items:
        if str(item.fspath).startswith(HERE + os.sep):
            item.add_marker(pytest.mark.rig)
            if not IN_RIG:
                item.add_marker(pytest.mark.skip(
                    reason='needs the VirtualBox rig: tests/rigs/run-virtualbox-tests'))


@pytest.fixture(scope='session')
def home():
    """VirtualBox with no VM, which interprets every instruction; ended at the end of the tests."""
    folder = tempfile.mkdtemp(prefix='vmhost-rig-')
    os.environ.update(VBOX_USER_HOME=folder, VBOX_IPC_SOCKETID=os.path.basename(folder))
    manage('setproperty', 'machinefolder', os.path.join(folder, 'vms'))
    for key in EVERY_INSTRUCTION + NO_LOGO:
        name, _, value = key.partition('=')
        manage('setextradata', 'global', 'VBoxInternal/' + name, value)
    yield folder
    end_processes('VBoxHeadless', 'VBoxSVC', 'VBoxXPCOMIPCD')
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope='session')
def host(home, tmp_path_factory):
    """A host agent in NAT mode."""
    with VMHost(tmp_path_factory.mktemp('host')) as host:
        yield host


@pytest.fixture
def remove_all(host):
    """Whatever VM a test made goes with it; and a VirtualBox that answers nobody any more, so that this fails
    one test, and not all that follow."""
    before, hung = set(settings_files()), False
    yield
    try:
        listed()
    except subprocess.TimeoutExpired:
        hung = True
        end_processes('VBoxHeadless', 'VBoxSVC')
        listed()
    for uuid in set(settings_files()) - before:
        remove(uuid)
    assert not hung, 'VirtualBox did not answer, and was ended'


def listed():
    """Fails where VirtualBox doesn't answer."""
    manage('list', 'vms', patience=120)


def end_processes(*programs):
    for pid in processes():
        if (command_line(pid) or [''])[0].endswith(programs):
            kill(pid)


@pytest.fixture(scope='session')
def images(home, tmp_path_factory):
    """A folder with the same small disk as .vdi, .vmdk and .vhd, in an .ova and an .ovf; and an .iso."""
    folder = tmp_path_factory.mktemp('images')

    def path(name):
        return str(folder / name)

    with open(path('raw'), 'wb') as file:
        file.write(BUTTON_SYSTEM.ljust(510, b'\0') + b'\x55\xaa')
        file.truncate(2 << 20)
    with open(path('disc.iso'), 'wb') as file:
        file.truncate(2 << 20)
    for kind in ('vdi', 'vmdk', 'vhd'):
        manage('convertfromraw', path('raw'), path('disk.' + kind), '--format', kind.upper())
    manage('createvm', '--name', 'exported', '--ostype', 'Linux_64', '--register')
    manage('modifyvm', 'exported', '--memory', '16', '--nic1', 'nat')
    manage('storagectl', 'exported', '--name', 'SATA', '--add', 'sata')
    manage('storageattach', 'exported', '--storagectl', 'SATA', '--port', '0', '--type', 'hdd', '--medium',
           path('disk.vdi'))
    manage('export', 'exported', '--output', path('appliance.ova'))
    manage('export', 'exported', '--output', path('appliance.ovf'))
    manage('unregistervm', 'exported')
    try_manage('closemedium', 'disk', path('disk.vdi'))
    return folder


@pytest.fixture(scope='session')
def appliance(home, tmp_path_factory):
    """A large image, VMHOST_IMAGE_MB of it, as PATH.vdi and PATH.ova: data that can't be compressed."""
    path = str(tmp_path_factory.mktemp('appliance') / 'big')
    with open(path, 'wb') as file:
        for _ in range(MEGABYTES):
            file.write(os.urandom(1 << 20))
    manage('convertfromraw', path, path + '.vdi', '--format', 'VDI')
    os.remove(path)
    manage('createvm', '--name', 'big', '--ostype', 'Linux_64', '--register')
    manage('storagectl', 'big', '--name', 'SATA', '--add', 'sata')
    manage('storageattach', 'big', '--storagectl', 'SATA', '--port', '0', '--type', 'hdd', '--medium',
           path + '.vdi')
    manage('export', 'big', '--output', path + '.ova')
    manage('storageattach', 'big', '--storagectl', 'SATA', '--port', '0', '--medium', 'none')
    manage('closemedium', 'disk', path + '.vdi')
    manage('unregistervm', 'big', '--delete')
    return path
