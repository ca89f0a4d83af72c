"""The contract of drivers, on the real VirtualBox."""

import pytest
from driver_cases import *  # noqa: F403 (the tests, for pytest to find)
from test_hypervisor import opened
from vms import SETTINGS

import hypervisor
import virtualbox


@pytest.fixture
def box(home, remove_all, tmp_path):
    settings = dict(SETTINGS, state_dir=str(tmp_path), command_timeout=45)
    with opened(hypervisor.Hypervisor, 'VirtualBox', settings) as box:
        yield box


@pytest.fixture
def driver_class():
    return virtualbox.VirtualBox
