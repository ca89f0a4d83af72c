"""A host agent without vboxapi and VBoxManage, with broken ones, without the kernel module: it says so, does
the rest."""

import contextlib
import os
import subprocess

import pytest
from agents import Agent
from vms import VMHost, fault_of

MANAGER = 'class VirtualBoxManager:\n    def %s(self):\n        raise Exception("no XPCOM")'
HEADLESS = '/usr/lib/virtualbox/VBoxHeadless'
PROGRAM = '/usr/lib/virtualbox/VBoxManage'


@contextlib.contextmanager
def replaced(path, other):
    """The rig has another file in this place. VBoxHeadless as VirtualBox ships it demands the kernel's
    driver."""
    subprocess.check_call(['mount', '--bind', other, path])
    try:
        yield
    finally:
        subprocess.check_call(['umount', path])


def works_without_vms(host, tmp_path):
    """Commands on a machine without a hypervisor, and faults of VM methods that say what is missing."""
    with host.api as api, Agent(tmp_path / 'agent', host, 'plain'):
        assert api.agentInfo()['hypervisor'] == 'none'
        code, text = fault_of(api.start, 'plain')
        assert code == 9 and 'VirtualBox' in text
        assert api.listVMs() == ['plain'] and api.getState('plain') == 'Running'
        assert host.run('plain', 'echo', 'all the rest')['out'] == 'all the rest\n'


def lines_of(host, words):
    return [line for line in host.log().splitlines() if words in line]


@pytest.mark.parametrize('hypervisor, module, told', [
    ('VirtualBox', 'raise ImportError("no module named vboxapi")', 'vboxapi is not installed'),
    ('auto', 'import no_such_module_of_xpcom', 'vboxapi is not installed'),
    ('auto', 'raise SystemError("XPCOM is of another Python")', 'XPCOM is of another Python'),
    ('VirtualBox', 'import os; os.abort()', 'VirtualBox'),
    ('auto', MANAGER % '__init__', 'no XPCOM'), ('auto', MANAGER % 'getVirtualBox', 'no XPCOM')])
def test_vboxapi_missing_or_broken(tmp_path, hypervisor, module, told):
    (tmp_path / 'vboxapi.py').write_text(module + '\n')
    paths = [str(tmp_path), os.environ.get('PYTHONPATH', '')]
    with replaced(PROGRAM, '/dev/null'), VMHost(tmp_path / 'host', {'PYTHONPATH': os.pathsep.join(paths)},
                hypervisor={'hypervisor': hypervisor, 'command_timeout': '3'}) as host:
        lines = lines_of(host, 'can\'t be controlled')
        assert len(lines) == 1 and told in lines[0], host.log()
        assert 'Traceback' not in host.log()
        works_without_vms(host, tmp_path)


def test_the_kernel_module_missing(home, remove_all, tmp_path):
    with replaced(HEADLESS, HEADLESS + '.with-driver'), \
            VMHost(tmp_path / 'host', other_machines='yes') as host, host.api as api:
        lines = lines_of(host, 'vboxdrv')
        assert len(lines) == 1 and 'VMs can\'t be started' in lines[0] and 'vboxconfig' in lines[0]
        api.createVM('stands', '', {'memory': 16, 'diskSize': 4})
        code, text = fault_of(api.start, 'stands')
        assert code == 5 and 'vboxdrv' in text, text
        assert api.getState('stands') in ('PoweredOff', 'Aborted')
        assert api.takeSnapshot('stands', 'all the same') is True
        with Agent(tmp_path / 'agent', host, 'elsewhere'):
            assert host.run('elsewhere', 'echo', 'rest')['out'] == 'rest\n'
