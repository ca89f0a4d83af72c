"""What cleanup takes, above all what it leaves alone, and what createVM leaves behind that it could take.

The fake VirtualBox is within reach of the test here.
"""

import os
import struct
import subprocess
import time
import uuid

import fake_virtualbox
import pytest
from appliance_files import appliance_at
from helpers import wait_until
from vms import SETTINGS, here

import faults
import imagefiles
import vboximages


@pytest.fixture
def vbox(tmp_path, monkeypatch):
    """The fake itself: a test does with it what a user does with VirtualBox."""
    monkeypatch.setenv('FAKE_VIRTUALBOX', str(tmp_path))
    return fake_virtualbox.VirtualBox()


@pytest.fixture
def box(vbox):
    """The driver on the fake, to which it is connected."""
    with here(SETTINGS, vbox) as box:
        box.version()
        yield box


def create(box, vbox, name, **options):
    """A new VM of ours, as VirtualBox knows it."""
    box.create_vm(name, '', dict({'diskSize': 4}, **options))
    return vbox.findMachine(name)


@pytest.fixture
def appliance(tmp_path):
    """The path of an appliance."""
    return appliance_at(str(tmp_path / 'image.ova'))


def disk_of(machine):
    """The path of the VM's disk."""
    return machine.mediumAttachments[0].medium.location


def attach(machine, disk):
    machine.attachDevice('SATA', 1, 0, disk.deviceType, disk)


def foreign_disk(vbox, tmp_path):
    """A disk that VirtualBox knows, and we didn't make."""
    disk = vbox.createMedium('VDI', str(tmp_path / 'foreign.vdi'), 0, 0)
    disk.createBaseStorage(4, [])
    return disk


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
    os.rename(machine.settingsFilePath, machine.settingsFilePath + '-prev')     # as VirtualBox does
    machine.mediumAttachments.clear()
    machine.saveSettings()
    box.remove_vm('gone')
    assert os.path.exists(machine.settingsFilePath)
    assert rows(box.cleanup(False)) == [('disk', disk)]
    assert not os.path.exists(os.path.dirname(disk))


@pytest.mark.parametrize('harm, told', [
    (lambda path: None, 'uses it'), (lambda path: open(path, 'w').close(), 'may use it'),
    (lambda path: os.rename(path, path + '-prev'), 'may use it')])
def test_a_vm_that_was_taken_out_of_the_list_keeps_its_disk_and_settings(box, vbox, harm, told):
    """`rm`, or VBoxManage unregistervm: `create` of its .vbox file brings it back."""
    machine = create(box, vbox, 'out')
    disk, settings = disk_of(machine), machine.settingsFilePath
    box.remove_vm('out')
    harm(settings)
    files = os.listdir(os.path.dirname(disk))
    row, = box.cleanup(False)
    assert (row['kind'], row['name']) == ('kept', disk)
    assert row['why'].startswith('the VM of %s %s' % (settings, told))
    assert os.listdir(os.path.dirname(disk)) == files


def test_settings_of_an_unlisted_vm_that_has_another_disk_stay(box, vbox, tmp_path):
    machine = create(box, vbox, 'out')
    disk = disk_of(machine)
    machine.mediumAttachments.clear()
    attach(machine, foreign_disk(vbox, tmp_path))
    machine.saveSettings()
    box.remove_vm('out')
    assert rows(box.cleanup(False)) == [('disk', disk)]
    assert os.path.exists(machine.settingsFilePath)


def test_a_foreign_disk_of_our_vm_stays(box, vbox, tmp_path):
    machine = create(box, vbox, 'ours')
    own, foreign = disk_of(machine), foreign_disk(vbox, tmp_path)
    attach(machine, foreign)
    assert rows(box.cleanup(False, ['ours'])) == [('vm', 'ours')]
    assert not os.path.exists(own) and os.path.exists(foreign.location)


def test_another_disk_in_the_place_of_ours_stays(box, vbox):
    machine = create(box, vbox, 'ours')
    disk = machine.mediumAttachments[0].medium
    disk.id = 'another'
    assert rows(box.cleanup(False, ['ours'])) == [('vm', 'ours')]
    assert os.path.exists(disk.location)
    assert box.cleanup() == []


def test_the_snapshots_of_our_disk_go_with_it(box, vbox, tmp_path):
    machine = create(box, vbox, 'ours')
    base = machine.mediumAttachments[0].medium
    child = machine.mediumAttachments[0].medium = base.make_child(str(tmp_path / 'ours' / 'child.vdi'))
    assert rows(box.cleanup(False, ['ours'])) == [('vm', 'ours')]
    assert not os.path.exists(base.location) and not os.path.exists(child.location)
    assert box.cleanup() == []


@pytest.mark.parametrize('remove', [
    lambda box: box.cleanup(False, ['ours']), lambda box: box.remove_vm('ours', True)])
def test_a_disk_under_a_linked_clone_stays(box, vbox, tmp_path, remove):
    machine, clone = create(box, vbox, 'ours'), create(box, vbox, 'clone', diskSize=0, keep=True)
    base = machine.mediumAttachments[0].medium
    own = machine.mediumAttachments[0].medium = base.make_child(str(tmp_path / 'ours' / 'child.vdi'))
    attach(clone, base.make_child(str(tmp_path / 'clone.vdi')))
    told = remove(box)
    assert told in ([{'kind': 'vm', 'name': 'ours', 'why': 'named'}], [[base.location, 'needed by clone']])
    assert [row['name'] for row in box.machines()] == ['clone']
    assert not os.path.exists(own.location)
    assert os.path.exists(base.location) and os.path.exists(disk_of(clone))


def test_foreign_disks_are_deleted_only_on_demand(box, vbox, tmp_path):
    for all_disks in (False, True):
        machine = create(box, vbox, 'ours')
        foreign = foreign_disk(vbox, tmp_path)
        own = disk_of(machine)
        attach(machine, foreign)
        assert box.remove_vm('ours', True, all_disks) == ([] if all_disks else [
            [foreign.location, 'attached from elsewhere; --all-disks (allDisks) deletes it, too']])
        assert not os.path.exists(own) and os.path.exists(foreign.location) is not all_disks
        vbox.hardDisks.clear()


def test_who_removes_a_vm_is_told_of_what_was_written_over_a_foreign_disk(box, vbox, tmp_path):
    """As it lies in the VM's own folder, and nobody would look for it there."""
    foreign = foreign_disk(vbox, tmp_path)
    machine = create(box, vbox, 'ours', diskSize=0)
    over = foreign.make_child(os.path.join(os.path.dirname(machine.settingsFilePath), 'over.vdi'))
    attach(machine, over)
    told = dict(box.remove_vm('ours', True))
    assert told[foreign.location].startswith('attached from elsewhere')
    assert 'written over %s' % foreign.location in told[over.location] and os.path.exists(over.location)


@pytest.mark.parametrize('all_disks', [False, True])
def test_who_removes_a_vm_is_told_of_the_disk_that_another_one_has(box, vbox, tmp_path, all_disks):
    machines = create(box, vbox, 'ours', diskSize=0), create(box, vbox, 'theirs', diskSize=0)
    shared = foreign_disk(vbox, tmp_path)
    for machine in machines:
        attach(machine, shared)
    assert box.remove_vm('ours', True, all_disks) == [[shared.location, 'needed by theirs']]
    assert os.path.exists(shared.location)


def test_who_removes_a_vm_that_can_not_be_read_is_told_that_its_files_stay(box, vbox, tmp_path):
    unread = create(box, vbox, 'unread')
    (tmp_path / 'unread-unread').write_text('its file is torn')
    (path, why), = box.remove_vm('unread', True)
    assert path == os.path.dirname(unread.settingsFilePath) and os.path.exists(unread.settingsFilePath)
    assert why == 'VirtualBox can\'t read the VM: what is its own there, nobody can tell'


def test_a_vm_that_can_not_be_read_may_use_any_disk(box, vbox, tmp_path):
    """The real VirtualBox doesn't know the disks of such a VM. What is half made goes all the same."""
    machine, unread = create(box, vbox, 'ours'), create(box, vbox, 'unread')
    half = create(box, vbox, 'half')
    half.setExtraData('vmhost/making', half.id)
    disk = machine.mediumAttachments.pop().medium
    (tmp_path / 'unread-unread').write_text('its file is torn')
    attachments, unread.mediumAttachments = unread.mediumAttachments, []
    kept = [row for row in box.cleanup(False) if row['kind'] == 'kept']
    assert sorted(row['name'] for row in kept) == sorted([disk.location, attachments[0].medium.location])
    assert {row['why'] for row in kept} == {'VirtualBox can\'t read unread, which may use it'}
    assert os.path.exists(disk.location) and half not in vbox.machines
    (tmp_path / 'unread-unread').unlink()
    unread.mediumAttachments = attachments
    assert rows(box.cleanup(False)) == [('disk', disk.location)]


def test_a_vm_that_can_not_be_read_is_listed_and_removed(box, vbox, tmp_path):
    unread = create(box, vbox, 'unread')
    (tmp_path / 'unread-unread').write_text('its file is torn')
    row, = box.machines()
    assert (row['name'], row['state'], row['trouble']) == ('unread', 'inaccessible', 'its file is torn')
    assert box.describe('unread')['uuid'] == unread.id
    for verb in (box.start, box.pause, box.get_log):
        with pytest.raises(faults.BadState, match='its file is torn'):
            verb(unread.id)
    with pytest.raises(faults.AlreadyExists):
        box.create_vm('unread')
    assert box.remove_vm('unread') == [] == box.machines()
    assert os.path.exists(unread.settingsFilePath)


def test_a_disk_that_was_moved_is_still_ours(box, vbox, tmp_path):
    disk = create(box, vbox, 'ours').mediumAttachments.pop().medium
    moved = str(tmp_path / 'moved.vdi')
    os.rename(disk.location, moved)
    disk.location = moved
    assert rows(box.cleanup(False)) == [('disk', moved)]
    assert not os.path.exists(moved) and not vbox.extra


def test_a_disk_in_the_place_of_one_that_went_is_in_use(box, vbox):
    disk = create(box, vbox, 'ours').mediumAttachments[0].medium
    vbox.setExtraData('vmhost/disk/of-one-that-went', disk.location)
    assert box.cleanup() == []
    assert 'vmhost/disk/of-one-that-went' not in vbox.extra


def test_cleanup_leaves_what_is_kept_or_merely_off(box, vbox):
    create(box, vbox, 'off')
    create(box, vbox, 'kept')
    box.keep('kept')
    assert box.cleanup() == [] and rows(box.cleanup(False, ['kept'])) == [('kept', 'kept')]
    box.keep('kept', False)
    assert rows(box.cleanup(False, ['kept'])) == [('vm', 'kept')]


def test_a_clone_that_the_user_made_is_not_ours(box, vbox):
    machine = create(box, vbox, 'ours')
    vbox.clone(machine, 'clone')
    assert [box.describe(name)['tagged'] for name in ('ours', 'clone')] == [True, False]
    assert rows(box.cleanup(False, ['ours'])) == [('vm', 'ours')]
    assert [row['name'] for row in box.machines()] == ['clone']


def test_the_settings_of_an_unregistered_clone_stay(box, vbox):
    machine = create(box, vbox, 'ours')
    clone = vbox.clone(machine, 'clone')
    disk = disk_of(machine)
    path = os.path.join(os.path.dirname(disk), 'clone.vbox')
    os.rename(clone.settingsFilePath, path)
    machine.mediumAttachments.clear()
    machine.saveSettings()
    vbox.machines.clear()
    assert rows(box.cleanup(False)) == [('disk', disk)]
    assert os.listdir(os.path.dirname(disk)) == ['clone.vbox']


def test_a_clone_of_a_half_made_vm_is_not_half_made(box, vbox):
    machine = create(box, vbox, 'ours', keep=True)
    machine.setExtraData('vmhost/making', machine.id)
    vbox.clone(machine, 'clone')
    assert box.cleanup() == []
    machine.setExtraData('vmhost/keep', '')
    assert [(row['name'], row['why']) for row in box.cleanup()] == [('ours', 'half made')]


def test_what_is_being_made_is_left_alone(box, vbox, appliance):
    machine = create(box, vbox, 'made')
    machine.setExtraData('vmhost/making', machine.id)
    disk = machine.mediumAttachments.pop().medium
    box.others = [['create_vm', 'made']]
    assert box.cleanup() == [] and os.path.exists(disk.location)
    box.others = []
    assert rows(box.cleanup(False)) == [('vm', 'made'), ('disk', disk.location)]


@pytest.mark.parametrize('kind', ['', 'appliance'])
def test_what_another_host_agent_is_just_making_is_left_alone(box, vbox, appliance, monkeypatch, kind):
    """From the moment that it is known to VirtualBox; and nobody else takes its name."""
    told = []

    def look(machine, value):
        machine._memory = value
        if value != 16:
            return
        with here(SETTINGS, vbox) as other:
            told.append(other.cleanup(False) + other.cleanup(False, ['made']))
            with pytest.raises(faults.AlreadyExists, match='made'):
                other.create_vm('made', '', {})

    memory = property(lambda machine: machine._memory, look)
    monkeypatch.setattr(fake_virtualbox.Machine, 'memorySize', memory)
    box.create_vm('made', kind and appliance, {'memory': 16})
    assert told == [[{'kind': 'kept', 'name': 'made', 'why': 'it is just being made'}]]
    assert [row['name'] for row in box.machines()] == ['made']
    assert box.cleanup() == [] and not [key for key in vbox.extra if 'maker' in key]


def test_a_name_that_another_host_agent_is_about_to_take_is_taken(box, vbox, monkeypatch):
    """Before VirtualBox knows of it, and, where both asked at once, by VirtualBox's word."""
    def look(machine, flags):
        with here(SETTINGS, vbox) as other:
            with pytest.raises(faults.AlreadyExists, match='another program is just making a VM .made.'):
                other.create_vm('made', '', {'diskSize': 0})

    def refuse(vbox, *arguments):
        raise fake_virtualbox.FakeError(0x80004005, 'Could not create the file (VERR_ALREADY_EXISTS)')

    monkeypatch.setattr(fake_virtualbox.Machine, 'applyDefaults', look)
    assert box.create_vm('made', '', {'diskSize': 0}) == 'made'
    monkeypatch.setattr(fake_virtualbox.VirtualBox, 'createMachine', refuse)
    with pytest.raises(faults.AlreadyExists, match='has just taken the name .raced.: .*EXISTS'):
        box.create_vm('raced', '', {'diskSize': 0})
    assert not [key for key in vbox.extra if 'maker' in key]


def test_what_virtualbox_writes_once_the_maker_has_died_is_removed(box, vbox, monkeypatch):
    """It ends the call that it was asked for; meanwhile another host agent has looked."""
    machine = create(box, vbox, 'half', diskSize=0)
    path = machine.settingsFilePath
    vbox.setExtraData('vmhost/maker/' + os.path.dirname(path), '999999999 1')
    vbox.machines.remove(machine)
    os.rename(path, path + '-later')
    assert box.cleanup() == [] == box.cleanup(False)
    os.rename(path + '-later', path)
    assert rows(box.cleanup(False)) == [('vm', path)] and not os.path.exists(path)
    monkeypatch.setattr(vboximages, 'WRITES_LATER', 0)
    assert box.cleanup(False) == [] and not [key for key in vbox.extra if 'maker' in key]


def test_what_a_host_agent_that_died_was_making_is_removed(box, vbox, tmp_path, monkeypatch):
    monkeypatch.setattr(vboximages, 'WRITES_LATER', 0)
    machine = create(box, vbox, 'half')
    machine.setExtraData('vmhost/making', machine.id)
    disk = machine.mediumAttachments.pop().medium
    maker = subprocess.Popen(['sleep', '1000'])
    note = 'vmhost/maker/' + os.path.dirname(machine.settingsFilePath)
    vbox.setExtraData(note, vboximages.note_of(maker.pid))
    assert box.cleanup() == []
    maker.kill()                # and nobody waits for it
    wait_until(lambda: rows(box.cleanup(False)) == [('vm', 'half'), ('disk', disk.location)])
    maker.wait()
    assert not vbox.extra
    vbox.setExtraData(note, '%d of another start' % os.getpid())       # whose number is another one's now
    box.cleanup(False)
    assert not vbox.extra


def test_a_vm_is_half_made_until_it_has_its_disk(box, vbox, monkeypatch):
    """VirtualBox saves at once that the mark is gone: a host agent that died then had left a VM without one;
    and its disk alone where it was to be kept."""
    had, set_extra_data = [], fake_virtualbox.Machine.setExtraData

    def put(machine, key, value):
        if key == 'vmhost/keep' or (key, value) == ('vmhost/making', ''):
            had.append((key, len(machine.saved_attachments)))
        set_extra_data(machine, key, value)

    monkeypatch.setattr(fake_virtualbox.Machine, 'setExtraData', put)
    create(box, vbox, 'web1', keep=True)
    assert had == [('vmhost/keep', 1), ('vmhost/making', 1)]


def test_a_failed_import_notes_nothing(box, vbox, appliance):
    vbox.importing = fake_virtualbox.Failed('no')
    with pytest.raises(faults.HypervisorError):
        box.create_vm('failed', appliance, {})
    assert not vbox.extra


def test_an_import_that_is_refused_notes_nothing(box, vbox, appliance, monkeypatch):
    def refuse(appliance, options):
        raise fake_virtualbox.FakeError(fake_virtualbox.INVALID_ARGUMENT, 'no')

    monkeypatch.setattr(fake_virtualbox.Appliance, 'importMachines', refuse)
    with pytest.raises(faults.HypervisorError):
        box.create_vm('refused', appliance, {})
    assert not vbox.extra


@pytest.mark.parametrize('disk', ['disk.vmdk', 'sub/disk.vmdk'])
def test_a_failed_import_leaves_no_disks(box, vbox, appliance, tmp_path, monkeypatch, disk):
    """Where it is the settings that VirtualBox doesn't like, it leaves the disks, however large."""
    folder = tmp_path / 'failed'
    monkeypatch.setattr(fake_virtualbox.VirtualBox, 'composeMachineFilename',
                        lambda vbox, name, *others: str(folder / 'failed.vbox'))
    monkeypatch.setattr(fake_virtualbox.Description, 'values', ['its name', '', disk])

    def fail(appliance, options):
        (folder / disk).parent.mkdir(parents=True, exist_ok=True)
        (folder / disk).write_bytes(b'x')
        (folder / 'mine.vmdk').write_bytes(b'x')
        return fake_virtualbox.Failed('Invalid port count: 0')

    monkeypatch.setattr(fake_virtualbox.Appliance, 'importMachines', fail)
    with pytest.raises(faults.HypervisorError, match='Invalid port count'):
        box.create_vm('failed', appliance, {})
    assert not (folder / disk).exists() and (folder / 'mine.vmdk').exists()


@pytest.mark.parametrize('stage, words', [
    ('reading', 'Premature end of data in tag VirtualQuantity line 46'),
    ('reading', 'Error reading OVA (VERR_TAR_UNEXPECTED_EOS)'),
    ('importing', 'Could not create the imported medium (VERR_EOF)'),
    ('importing', 'Digest mismatch (VERR_NOT_EQUAL): Attribute \'SHA1\' on \'disk.vmdk\' does not match'),
    ('importing', 'Unexpected end of OVA package')])
def test_an_appliance_that_is_cut_is_told_to_be_so(box, vbox, appliance, stage, words):
    setattr(vbox, stage, fake_virtualbox.Failed(words))
    with pytest.raises(faults.HypervisorError) as told:
        box.create_vm('cut', appliance, {})
    assert str(told.value).startswith('%s is cut or damaged, or no appliance: get it anew (%s' % (
        appliance, words))


@pytest.mark.parametrize('words', ['VERR_DISK_FULL', 'VERR_ACCESS_DENIED'])
def test_an_appliance_for_which_there_is_no_room_is_not_told_to_be_cut(box, vbox, appliance, words):
    vbox.importing = fake_virtualbox.Failed('Could not create the imported medium (%s)' % words)
    with pytest.raises(faults.HypervisorError, match='^Could not create'):
        box.create_vm('whole', appliance, {})


@pytest.mark.parametrize('linked', [False, True])
def test_a_disk_that_is_cut_makes_no_vm(box, vbox, tmp_path, linked):
    """VirtualBox lays a VM's disk on half an image, and says nothing."""
    image = tmp_path / 'cut.vdi'
    head = bytearray(4096)
    struct.pack_into('<II', head, 64, 0xbeda107f, 0x10001)
    struct.pack_into('<II', head, 340, 1 << 20, 2 << 20)
    struct.pack_into('<QIIII', head, 368, 8 << 20, 1 << 20, 0, 8, 3)
    with open(str(image), 'wb') as file:
        file.write(head)
        file.truncate(3 << 20)
    with pytest.raises(faults.HypervisorError) as told:
        box.create_vm('cut', str(image), {'linked': linked})
    assert str(told.value) == ('%s is cut: it has 3145728 bytes, and 5242880 by what it says itself; get it '
                               'anew' % image)
    with open(str(image), 'ab') as file:
        file.truncate(5 << 20)
    imagefiles.check_image(str(image))


def growing_vhd():
    """Its head, and where its second block ends."""
    head = bytearray(2048)
    head[:8] = b'conectix'
    struct.pack_into('>Q', head, 16, 512)
    head[512:520] = b'cxsparse'
    struct.pack_into('>QIII', head, 512 + 16, 1536, 0, 3, 1 << 20)
    struct.pack_into('>III', head, 1536, 2049 + 4, 2 ** 32 - 1, 4)
    return head, 2048 + 2 * (512 + (1 << 20))


def growing_vmdk():
    head = bytearray(4096)
    head[:4] = b'KDMV'
    struct.pack_into('<QQQQIQQ', head, 12, 256, 128, 0, 0, 512, 0, 1)
    struct.pack_into('<I', head, 512, 2)                 # a table of tables …
    struct.pack_into('<II', head, 1024, 8, 8 + 128)      # … and a table of blocks
    return head, 4096 + 2 * 128 * 512


@pytest.mark.parametrize('kind, made', [('vhd', growing_vhd), ('vmdk', growing_vmdk)])
def test_a_disk_of_another_maker_that_is_cut_is_told_to_be_so(tmp_path, kind, made):
    image = tmp_path / ('cut.' + kind)
    head, whole = made()
    for length, is_whole in ((whole, True), (whole + 512, True), (whole - (1 << 20), False),
                             (len(head), False)):
        with open(str(image), 'wb') as file:
            file.write(head)
            file.truncate(max(len(head), length))
        if is_whole:
            imagefiles.check_image(str(image))
        else:
            with pytest.raises(faults.HypervisorError, match='is cut: it has .* get it anew'):
                imagefiles.check_image(str(image))


def test_what_looks_like_a_disk_and_tells_nonsense_is_left_to_virtualbox(tmp_path):
    image = tmp_path / 'odd.vmdk'
    for start, fill in ((b'KDMV', b'\0'), (b'conectix', b'\0'), (b'conectix', b'\xff')):
        image.write_bytes(start + 600 * fill)
        imagefiles.check_image(str(image))
    image.write_bytes(b'conectix' + 8 * b'\0' + 8 * b'\xff' + 600 * b'\0')
    imagefiles.check_image(str(image))


def test_settings_of_a_vm_whose_maker_died_at_once_are_no_obstacle(box, vbox, monkeypatch):
    """Before VirtualBox listed it, so that no list shows it, and nobody could make one of that name."""
    machine = create(box, vbox, 'early', diskSize=0)
    folder = os.path.dirname(machine.settingsFilePath)
    vbox.machines.remove(machine)
    assert box.cleanup() == []                           # the files of one that somebody took out
    vbox.setExtraData('vmhost/maker/' + folder, '999999999 1')
    with pytest.raises(faults.AlreadyExists, match='`cleanup` removes'):
        box.create_vm('early', '', {'diskSize': 0})
    assert rows(box.cleanup(False)) == [('vm', machine.settingsFilePath)]
    assert not os.path.exists(folder) and box.create_vm('early', '', {'diskSize': 0})
    assert box.cleanup() == []


def test_settings_that_were_lost_on_a_full_disk_are_told_where_they_are(box, vbox):
    machine = create(box, vbox, 'lost')
    path = machine.settingsFilePath
    os.rename(path, path + '-prev')
    with open(path, 'w'):
        pass
    vbox.machines.remove(machine)
    with pytest.raises(faults.HypervisorError, match='is empty, .* copy %s-prev over it' % path):
        box.create_vm(path)


def test_why_a_vm_can_not_be_read_is_told_in_words_for_its_user(box, vbox):
    """And not where VirtualBox's code found it."""
    create(box, vbox, 'torn')
    with open(fake_virtualbox.steering('unread-torn'), 'w') as file:
        file.write('Document is empty.\n/build/src/MachineImpl.cpp[999] (nsresult Machine::i_init())')
    assert [row['trouble'] for row in box.machines()] == ['Document is empty']


def test_why_a_vm_that_was_named_stays_is_told(box, vbox):
    create(box, vbox, 'kept', keep=True)
    create(box, vbox, 'runs')
    create(box, vbox, 'off')
    foreign = vbox.clone(create(box, vbox, 'origin'), 'foreign')
    foreign = foreign or vbox.findMachine('foreign')
    assert box.start('runs')
    assert [(row['kind'], row['name'], row['why']) for row in box.cleanup(
        True, ['kept', 'runs', 'foreign', 'off'])] == [
            ('kept', 'kept', '`keep` excludes it'), ('kept', 'runs', 'it is Running, and not off'),
            ('vm', 'off', 'named'), ('kept', 'foreign', '`create` did not make it')]
    box.power_off('runs')


@pytest.fixture
def half(vbox, tmp_path, monkeypatch):
    """Notes the file in which a host that died was making a disk; gives its path."""
    path = tmp_path / 'half' / 'disk.vdi'
    vbox.setExtraData('vmhost/expected' + str(path), '%d' % (time.time() - 2))
    vbox.setExtraData('vmhost/importing/half', str(tmp_path / 'half' / 'half.vbox'))
    path.parent.mkdir()
    return path


@pytest.mark.parametrize('content', ['', 'uuid'])
def test_what_a_host_that_died_left_is_removed(box, vbox, half, content):
    half.write_text(content)
    vbox.progressOperations.append('going on')
    row, = box.cleanup(False)
    assert (row['kind'], row['name']) == ('kept', str(half)) and 'VirtualBox is at work' in row['why']
    vbox.progressOperations.clear()
    assert rows(box.cleanup()) == [('disk', str(half))] == rows(box.cleanup(False))
    assert not half.parent.exists()
    box.cleanup()
    assert not vbox.extra and not vbox.hardDisks


def test_a_file_that_comes_after_the_next_host_has_begun_is_not_ours(half, box, vbox):
    half.write_text('')
    assert box.cleanup(False) == [] and half.exists()
    assert not vbox.extra


def test_a_file_from_before_is_not_ours(box, vbox, half):
    half.write_text('uuid')
    os.utime(str(half), (time.time() - 10, time.time() - 10))
    assert box.cleanup(False) == [] and half.exists()
    os.utime(str(half))
    assert box.cleanup(False) == [] and half.exists()


def test_half_a_copy_of_a_known_disk_is_removed(box, vbox, half, tmp_path):
    known = foreign_disk(vbox, tmp_path)
    half.write_text(known.id)
    assert rows(box.cleanup(False)) == [('disk', str(half))]
    assert vbox.hardDisks == [known] and os.path.exists(known.location)


def test_another_disk_that_was_put_in_the_place_of_ours_stays(box, vbox):
    disk = create(box, vbox, 'ours').mediumAttachments.pop().medium
    disk.close()
    with open(disk.location, 'w') as file:
        file.write('another')
    assert rows(box.cleanup(False, ['ours'])) == [('vm', 'ours'), ('kept', disk.location)]
    assert os.path.exists(disk.location) and not vbox.hardDisks


def test_what_can_not_be_removed_does_not_hide_the_rest(box, vbox, monkeypatch, caplog):
    names = ['first', 'second', 'third', 'fourth']
    machines = [create(box, vbox, name) for name in names]
    refused = {machines[0], machines[2].mediumAttachments.pop().medium}
    left = machines[3].mediumAttachments.pop().medium

    def refuse(method):
        def tried(thing, *args):
            if thing in refused:
                raise fake_virtualbox.FakeError(fake_virtualbox.IN_USE, 'no')
            return method(thing, *args)
        return tried

    monkeypatch.setattr(fake_virtualbox.Machine, 'unregister', refuse(fake_virtualbox.Machine.unregister))
    monkeypatch.setattr(fake_virtualbox.Medium, 'deleteStorage', refuse(fake_virtualbox.Medium.deleteStorage))
    found = box.cleanup(False, names)
    assert [row['why'] for row in found if row['kind'] == 'kept'] == [
        'could not be removed: no (VirtualBox 0x80bb000c)'] * 2
    assert [row for row in rows(found) if row[0] != 'kept'] == [
        ('vm', 'second'), ('vm', 'third'), ('vm', 'fourth'), ('disk', left.location)]
    assert 'the vm first: no' in caplog.text and 'third.vdi: no' in caplog.text
    refused.clear()
    assert [kind for kind, name in rows(box.cleanup(False, ['first']))] == ['vm', 'disk']
    assert not vbox.machines and not vbox.hardDisks and not vbox.extra


@pytest.mark.parametrize('image', ['', 'appliance'])
def test_options_that_virtualbox_refuses_leave_nothing_behind(box, vbox, appliance, tmp_path, image):
    image, before = image and appliance, sorted(os.listdir(str(tmp_path)))
    with pytest.raises(faults.InvalidParams, match='memory is a whole number from 4 to 2097152'):
        box.create_vm('again', image, {'memory': 3000000})
    assert sorted(os.listdir(str(tmp_path))) == before
    assert not vbox.machines and not vbox.hardDisks and not vbox.extra
    assert box.create_vm('again', image) == 'again'


# Disks that lie on an image, folders and owners.

@pytest.fixture
def image(vbox, tmp_path):
    """The path of a disk that a project gave, and that VirtualBox doesn't know."""
    (tmp_path / 'image.vdi').write_text(fake_virtualbox.disk())
    return str(tmp_path / 'image.vdi')


def create_on(box, vbox, name, image, **options):
    box.create_vm(name, image, dict({'linked': True}, **options))
    return vbox.findMachine(name)


def test_an_image_on_which_no_disk_can_be_laid_is_forgotten(box, vbox, tmp_path, monkeypatch):
    """VirtualBox remembers it, and then takes no good copy of it."""
    image = tmp_path / 'image.vhd'
    image.write_text(fake_virtualbox.SIGNATURE + 'image')
    monkeypatch.setattr(fake_virtualbox.Medium, 'createDiffStorage', lambda *_: fake_virtualbox.Failed(
        'Could not create the differencing medium storage unit (VERR_VD_INVALID_SIZE)'))
    with pytest.raises(faults.HypervisorError, match='image.vhd is cut or damaged'):
        box.create_vm('laid', str(image), {'linked': True})
    assert not vbox.hardDisks and image.exists()


def test_disks_lie_on_an_image_that_stays(box, vbox, image, tmp_path):
    before = open(image).read()
    first = create_on(box, vbox, 'first', image, folder=str(tmp_path / 'slot'), owner='me')
    second = create_on(box, vbox, 'second', image)
    assert first.settingsFilePath == str(tmp_path / 'slot' / 'first' / 'first.vbox')
    disk = disk_of(first)
    assert os.path.dirname(disk) == os.path.dirname(first.settingsFilePath)
    assert first.mediumAttachments[0].medium.parent is second.mediumAttachments[0].medium.parent
    assert box.cleanup() == []
    assert box.remove_vm('first', True) == [] and not os.path.exists(disk)
    assert [medium.location for medium in vbox.hardDisks] == [image]
    assert box.remove_vm('second', True, True) == []           # all disks: the image is none of them
    assert not vbox.hardDisks and open(image).read() == before
    assert vbox.extra == {}


@pytest.mark.parametrize('options, what', [
    ({'linked': True}, 'linked'), ({'linked': 'perhaps'}, 'linked'), ({'folder': 'here'}, 'absolute'),
    ({'owner': 5}, 'owner'), ({'owner': 'a\nb'}, 'owner')])
def test_what_makes_no_sense_is_refused(options, what, box):
    with pytest.raises(faults.InvalidParams, match=what):
        box.create_vm('one', '', options)


def test_an_owners_cleanup_takes_its_own_alone(box, vbox, image, tmp_path):
    for name, owner in (('mine', 'me'), ('kept', 'me'), ('gone', 'me'), ('runs', 'me'), ('yours', 'you')):
        create_on(box, vbox, name, image, owner=owner, folder=str(tmp_path / name))
    box.start('runs', False, '')
    for name in ('gone', 'yours'):
        machine = vbox.findMachine(name)
        os.remove(machine.settingsFilePath)
        machine.readable = False
    wanted = [('vm', 'mine'), ('vm', 'gone')]
    assert rows(box.cleanup(True, ['mine', 'runs', 'yours'], 'me')) == wanted
    assert rows(box.cleanup(False, ['mine', 'runs', 'yours'], 'me')) == wanted
    assert sorted(machine.name for machine in vbox.machines) == ['kept', 'runs', 'yours']
    assert rows(box.cleanup(True, [], 'nobody')) == []


def test_a_vm_whose_removal_was_cut_short_goes_with_its_disk(box, vbox, monkeypatch):
    """The host agent died between two steps: nobody could make a VM of that name, and its disk stayed."""
    machine = create(box, vbox, 'half')
    disk, folder = disk_of(machine), os.path.dirname(machine.settingsFilePath)

    def die(self, media):
        raise KeyboardInterrupt
    with monkeypatch.context() as dying:
        dying.setattr(fake_virtualbox.Machine, 'deleteConfig', die)
        with pytest.raises(KeyboardInterrupt):
            box.remove_vm('half', True)
    assert os.path.exists(machine.settingsFilePath)
    assert rows(box.cleanup(True)) == rows(box.cleanup(False)) == [
        ('disk', disk), ('vm', machine.settingsFilePath)]
    assert not os.path.exists(folder) and box.cleanup() == []
    assert not [key for key in vbox.getExtraDataKeys() if key.startswith(vboximages.REMOVING)]


@pytest.mark.parametrize('change', ['written', 'listed'])
def test_a_vm_that_somebody_took_up_again_is_no_half_removed_one(box, vbox, monkeypatch, change):
    machine = create(box, vbox, 'half')
    vbox.setExtraData(vboximages.REMOVING + machine.settingsFilePath,
                      vboximages.removal_of(machine.settingsFilePath, machine.id))
    if change == 'written':
        box.remove_vm('half')
        with open(machine.settingsFilePath, 'a') as file:
            file.write(' ')
    box.cleanup(False)
    box.remove_vm('half') if change == 'listed' else None
    assert [row['kind'] for row in box.cleanup(False)] == ['kept']
    assert os.path.exists(machine.settingsFilePath)


@pytest.mark.parametrize('alive', [True, False])
def test_a_vm_whose_maker_died_before_its_marks_is_half_made(box, vbox, alive):
    """By VBoxManage, which registers a VM before anything can be written of it."""
    machine = create(box, vbox, 'new', diskSize=0)
    machine.setExtraData('vmhost/made', '')
    vbox.setExtraData(vboximages.MAKES + machine.id,
                      vboximages.note_of(os.getpid()) if alive else '1000000 1')
    assert rows(box.cleanup(False)) == ([] if alive else [('vm', 'new')])
    assert bool(vbox.getExtraData(vboximages.MAKES + machine.id)) == alive


def test_a_note_of_a_disk_that_another_one_replaced_is_told_by_nobody(box, vbox):
    """Of two disks that were made at one place, one after the other, the file says which it is."""
    machine = create(box, vbox, 'out')
    disk = disk_of(machine)
    box.remove_vm('out')
    head = bytearray(imagefiles.VDI_HEAD + 16)
    struct.pack_into('<II', head, 64, *imagefiles.VDI_1_1)
    head[imagefiles.VDI_HEAD:] = uuid.UUID('12345678-1234-1234-1234-123456789abc').bytes_le
    with open(disk, 'wb') as file:
        file.write(head)
    vbox.hardDisks[:] = [each for each in vbox.hardDisks if each.location != disk]
    for old in [key for key in vbox.getExtraDataKeys() if key.startswith(vboximages.DISK_MADE)]:
        vbox.setExtraData(old, '')
    for each in ('12345678-1234-1234-1234-123456789abc', '12345678-1234-1234-1234-00000000000d'):
        vbox.setExtraData(vboximages.DISK_MADE + each, disk)
    open(machine.settingsFilePath, 'w').close()
    assert rows(box.cleanup()) == [('kept', disk)]


def test_a_file_in_the_place_of_a_new_disk_is_named(box, vbox, tmp_path):
    (tmp_path / 'new').mkdir()
    (tmp_path / 'new' / 'new.vdi').write_text('of somebody')
    with pytest.raises(faults.AlreadyExists, match='new.vdi lies where the new disk would be'):
        box.create_vm('new', '', {'diskSize': 4})
    assert (tmp_path / 'new' / 'new.vdi').read_text() == 'of somebody' and vbox.machines == []


def test_a_vm_that_is_called_as_another_ones_uuid_in_braces(box, vbox):
    first, second = create(box, vbox, 'first'), create(box, vbox, 'second')
    second.name = '{%s}' % first.id
    assert box.describe(second.name)['uuid'] == second.id
    assert box.remove_vm(second.name, True) == [] and vbox.machines == [first]


@pytest.mark.parametrize('times', [1, 10 ** 6])
def test_a_vm_that_another_program_just_looks_at_is_removed_all_the_same(box, vbox, monkeypatch, times):
    """For it locks it; what stays locked is told, and no removal of it is noted."""
    machine = create(box, vbox, 'seen')
    refused, unregister = [], machine.unregister
    monkeypatch.setattr(vboximages, 'NOT_READY', 0.3)

    def look(mode):
        if len(refused) < times:
            refused.append(mode)
            raise fake_virtualbox.FakeError(fake_virtualbox.OBJECT_STATE, 'it is locked')
        return unregister(mode)
    monkeypatch.setattr(machine, 'unregister', look)
    if times == 1:
        assert box.remove_vm('seen', True) == [] and vbox.machines == []
    else:
        with pytest.raises(Exception, match='locked'):
            box.remove_vm('seen', True)
    assert not [key for key in vbox.getExtraDataKeys() if key.startswith(vboximages.REMOVING)]
