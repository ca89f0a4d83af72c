"""The real VirtualBox of the rig, with a home of its own for the time of the tests."""

import os
import shutil
import tempfile

import pytest
from rig import manage, remove
from vms import VMHost, command_line, kill, processes

IN_RIG = os.path.exists('/etc/vmhost-rig')
EVERY_INSTRUCTION = ('HM/HMForced=0', 'HM/FallbackToIEM=1', 'EM/IemExecutesAll=1')
HERE = os.path.dirname(os.path.abspath(__file__))


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
    for key in EVERY_INSTRUCTION:
        name, _, value = key.partition('=')
        manage('setextradata', 'global', 'VBoxInternal/' + name, value)
    yield folder
    for pid in processes():
        if (command_line(pid) or [''])[0].endswith(('VBoxHeadless', 'VBoxSVC', 'VBoxXPCOMIPCD')):
            kill(pid)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope='session')
def host(home, tmp_path_factory):
    """A host agent in NAT mode."""
    with VMHost(tmp_path_factory.mktemp('host')) as host:
        yield host


@pytest.fixture
def remove_all(host):
    """Whatever VM a test made goes with it."""
    before = set(manage('list', 'vms').splitlines())
    yield
    for line in set(manage('list', 'vms').splitlines()) - before:
        remove(line.rpartition('{')[2].rstrip('}'))
