"""VirtualBox's driver on Windows: vboxapi's part for it, pywin32 and COM are real, the VMs are the fake's.

As com_virtualbox.py says, the type library describes three classes, and not all, as VirtualBox' own does. The
cases are those of vm_cases.py: some of them, or all with VMHOST_FULL=1.
"""

import os
import shutil

import pytest
from vms import VMHost, environment, removing_new_vms
from wine import path_there, python

if os.environ.get('VMHOST_FULL'):
    from vm_cases import *  # noqa: F403 (the tests, for pytest to find)
    del test_looking_in        # noqa: F821 (its figures come by vboxapi's own collector, which the fake lacks)
else:
    from vm_cases import test_limits, test_lists, test_snapshots_are_a_tree  # noqa: F401

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SERVER = os.path.join(TESTS, 'windows', 'com_virtualbox.py')
VBOXAPI = os.environ.get('VMHOST_RIG', '/var/tmp/vmhost-rig') + '/usr/lib/python3/dist-packages/vboxapi'
# Python 3.11.7's is no class method, which only 3.11.9's own modules take: the rig has both.
REPAIRED = '''
import importlib.metadata
importlib.metadata.MetadataPathFinder.invalidate_caches = classmethod(lambda cls: None)
'''


class WindowsVMHost(VMHost):
    """A host agent there."""
    on_windows = True


@pytest.fixture(scope='module')
def fake(tmp_path_factory):
    """The folder that steers the fake."""
    return tmp_path_factory.mktemp('fake')


@pytest.fixture(scope='module')
def registered(windows, fake, tmp_path_factory):
    """The environment in which a host agent finds vboxapi and the registered classes."""
    if not os.path.exists(VBOXAPI):
        pytest.skip('no vboxapi here: the VirtualBox rig has one')
    folder = tmp_path_factory.mktemp('com')
    shutil.copytree(VBOXAPI, str(folder / 'vboxapi'))
    (folder / 'sitecustomize.py').write_text(REPAIRED)
    paths = [folder, TESTS, os.path.join(TESTS, 'windows')]
    found = {'PYTHONPATH': ';'.join(map(path_there, paths)), 'FAKE_VIRTUALBOX': str(fake)}
    with environment(found):
        code, said = python(path_there(SERVER), path_there(folder))
        assert code == 0, said
        yield found
        assert python(path_there(SERVER), '--unregister') == (0, '')


@pytest.fixture(scope='module')
def host(registered, tmp_path_factory):
    with WindowsVMHost(tmp_path_factory.mktemp('host'), registered) as host:
        yield host


@pytest.fixture
def remove_all(api):
    with removing_new_vms(api):
        yield


@pytest.fixture
def vm(api, remove_all):
    """A VM that is off, with a small disk."""
    api.createVM('vm', '', {'memory': 16, 'diskSize': 4})
    return 'vm'


@pytest.fixture
def abort(fake):
    """Kills the process of a VM."""
    return lambda vm: (fake / ('abort-' + vm)).write_text('')
