"""What cleanup takes, and above all what it leaves alone, on a fake VirtualBox within reach of the test."""

import os
import types

import fake_virtualbox
import pytest

import vmhost


@pytest.fixture
def vbox(tmp_path, monkeypatch):
    """The fake itself: a test does with it what a user does with VirtualBox."""
    monkeypatch.setenv('FAKE_VIRTUALBOX', str(tmp_path))
    return fake_virtualbox.VirtualBox()


@pytest.fixture
def box(vbox, tmp_path, monkeypatch):
    """The host's side, on the fake."""
    manager = fake_virtualbox.VirtualBoxManager()
    monkeypatch.setattr(manager, 'getVirtualBox', lambda: vbox)
    network, desktop = types.SimpleNamespace(mode='nat', host_ip=''), types.SimpleNamespace(ports='')
    box = vmhost.VirtualBox(network, desktop, 9094, str(tmp_path), 1, connect=lambda: manager)
    box.start_thread()
    yield box
    assert box.close()


def create(box, vbox, name, **options):
    """A new VM of ours, as VirtualBox knows it."""
    box.create_vm(name, '', dict({'diskSize': 4}, **options))
    return vbox.findMachine(name)


def disk_of(machine):
    """The path of the VM's disk."""
    return machine.mediumAttachments[0].medium.location


def rows(found):
    return [(row['kind'], row['name']) for row in found]


def test_a_registered_vm_keeps_its_settings_when_its_disk_goes(box, vbox):
    machine = create(box, vbox, 'kept', keep=True)
    disk = disk_of(machine)
    machine.mediumAttachments.clear()
    assert rows(box.cleanup(False)) == [('disk', disk)]
    assert not os.path.exists(disk) and os.path.exists(machine.settingsFilePath)


def test_an_unregistered_vm_loses_its_settings_with_its_disk(box, vbox):
    machine = create(box, vbox, 'gone')
    disk = disk_of(machine)
    machine.mediumAttachments.clear()
    box.remove_vm('gone')
    assert os.path.exists(machine.settingsFilePath)
    assert rows(box.cleanup(False)) == [('disk', disk)]
    assert not os.path.exists(os.path.dirname(disk))
