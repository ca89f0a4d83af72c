"""The cases of vm_cases.py on the real VirtualBox."""

import itertools

import pytest
from rig import vm_process
from vm_cases import *  # noqa: F403 (the tests, for pytest to find)
from vms import kill

NUMBERS = itertools.count(1)


@pytest.fixture
def vm(api, remove_all):
    """A VM that is off, with a small disk and nothing to boot."""
    name = 'vm-%d' % next(NUMBERS)
    api.createVM(name, '', {'memory': 16, 'diskSize': 4})
    return name


@pytest.fixture
def abort(api):
    """Kills the process of a VM."""
    return lambda vm: kill(vm_process(api.getVM(vm)['uuid']))
