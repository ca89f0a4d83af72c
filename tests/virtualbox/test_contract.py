"""The contract of drivers, on the real VirtualBox."""

import pytest
from driver_cases import *  # noqa: F403 (the tests, for pytest to find)
from rig import a_vm_is_moved
from test_hypervisor import opened
from vms import SETTINGS

import hosthypervisor
import virtualbox


@pytest.fixture
def box(home, remove_all, tmp_path):
    settings = dict(SETTINGS, state_dir=str(tmp_path), command_timeout=45)
    with opened(hosthypervisor.Hypervisor, 'VirtualBox', settings) as box:
        yield box


@pytest.fixture
def driver_class():
    return virtualbox.VirtualBox


def test_a_vm_that_was_moved_is_found_again(box, images, tmp_path):
    a_vm_is_moved(box, images, tmp_path)
