"""The contract of drivers, on the real VirtualBox: by its API, and by its program VBoxManage."""

import pytest
from driver_cases import *  # noqa: F403 (the tests, for pytest to find)
from rig import a_vm_is_moved
from test_hypervisor import opened
from vms import SETTINGS

import hosthypervisor
import vboxmanage
import virtualbox


@pytest.fixture(params=[virtualbox.VirtualBox, vboxmanage.VBoxManage])
def driver_class(request):
    return request.param


@pytest.fixture
def box(home, remove_all, tmp_path, driver_class):
    settings = dict(SETTINGS, state_dir=str(tmp_path), command_timeout=45)
    with opened(hosthypervisor.Hypervisor, driver_class.__name__, settings) as box:
        yield box


def test_a_vm_that_was_moved_is_found_again(box, images, tmp_path):
    a_vm_is_moved(box, images, tmp_path)
