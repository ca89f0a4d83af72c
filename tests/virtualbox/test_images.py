"""VMs made from every kind of image; ACPI shutdown of a guest that listens; what cleanup finds."""

import hashlib
import os
import shutil
import struct
import threading

import pytest
from helpers import wait_until
from rig import facts, manage, try_manage
from vms import VMHost, fault_of


def digest(path):
    with open(str(path), 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


@pytest.mark.parametrize('image', ['disk.vdi', 'disk.vmdk', 'disk.vhd', 'appliance.ova', 'appliance.ovf'])
def test_a_vm_from_an_image_runs_and_shuts_down(api, host, images, remove_all, tmp_path, image):
    before = digest(images / image)
    name = 'from ' + image
    assert api.createVM(name, str(images / image), {'memory': 16, 'network': 'nat'}) == [True, name]
    found = facts(name)
    assert (found['memory'], found['VMState'], found['nic1']) == ('16', 'poweroff', 'nat')
    manage('modifyvm', name, '--uart1', '0x3f8', '4', '--uartmode1', 'file', str(tmp_path / 'serial'))
    assert api.start(name) is True
    wait_until(lambda: (tmp_path / 'serial').exists() and (tmp_path / 'serial').read_bytes() == b'R', 60)
    assert api.shutdown(name) is True
    assert api.getState(name) == 'PoweredOff'
    assert api.removeVM(name, True) is True
    assert digest(images / image) == before
    assert str(images) not in manage('list', 'hdds')


def test_what_an_appliance_brings_leads_nowhere_out_of_its_vm(api, images, remove_all, tmp_path):
    """Who made it could have had files of the host's user read and written, ports opened, cards bridged."""
    victim, elsewhere = tmp_path / 'victim', tmp_path / 'elsewhere'
    victim.write_bytes(b'precious')
    elsewhere.mkdir()
    manage('createvm', '--name', 'stranger', '--ostype', 'Linux_64', '--register')
    manage('modifyvm', 'stranger', '--memory', '16', '--nic1', 'nat', '--nat-tftp-prefix1', '/',
           '--nat-tftp-file1', 'x', '--nat-pf1', 'ssh,tcp,0.0.0.0,2299,,22', '--nictrace1', 'on',
           '--nictracefile1', str(victim))
    manage('modifyvm', 'stranger', '--nic2', 'bridged', '--bridgeadapter2', 'eth0', '--nic3', 'generic',
           '--nic-generic-drv3', 'UDPTunnel', '--nic4', 'nat', '--nat-localhostreachable4', 'on',
           '--lptmode1', str(victim), '--lpt1', '0x378', '7', '--uart1', '0x3f8', '4',
           '--uartmode1', 'file', str(victim))
    manage('modifyvm', 'stranger', '--vrde', 'on', '--vrdeaddress', '0.0.0.0', '--vrdeport', '3399',
           '--clipboard-mode', 'bidirectional', '--draganddrop', 'bidirectional', '--teleporter', 'on',
           '--teleporterport', '6000', '--snapshotfolder', str(elsewhere), '--usbohci', 'on')
    manage('modifyvm', 'stranger', '--audio-driver', 'null', '--audio-enabled', 'on', '--audio-in', 'on',
           '--recording', 'on', '--recordingfile', str(victim), '--bioslogoimagepath', str(victim))
    manage('modifyvm', 'stranger', '--nic5', 'intnet', '--intnet5', 'others', '--natnet1', '10.9.9.0/24')
    try_manage('modifyvm', 'stranger', '--tracing-enabled', 'on', '--tracing-config', 'x',
               '--usbcardreader', 'on')
    try_manage('modifyvm', 'stranger', '--tpm-type', 'swtpm', '--tpm-location', 'localhost:6543',
               '--paravirt-provider', 'hyperv', '--paravirt-debug', 'enabled=1,address=127.0.0.1,port=6544',
               '--nic-promisc1', 'allow-all')
    manage('storagectl', 'stranger', '--name', 'IDE', '--add', 'ide')
    manage('storageattach', 'stranger', '--storagectl', 'IDE', '--port', '0', '--device', '0',
           '--type', 'dvddrive', '--medium', 'emptydrive', '--passthrough', 'on')
    try_manage('usbfilter', 'add', '0', '--target', 'stranger', '--name', 'all', '--active', 'yes')
    manage('export', 'stranger', '--output', str(tmp_path / 'stranger.ova'))
    manage('unregistervm', 'stranger')
    assert api.createVM('guarded', str(tmp_path / 'stranger.ova'), {'network': 'nat'}) == [True, 'guarded']
    found = facts('guarded')
    assert [found['nic%d' % slot] for slot in (1, 2, 3, 4, 5)] == ['nat', 'null', 'null', 'nat', 'null']
    assert (found['vrde'], found['clipboard'], found['draganddrop']) == ('off', 'disabled', 'disabled')
    assert os.path.samefile(os.path.dirname(found['SnapFldr']), folder_of('guarded'))
    with open(found['CfgFile']) as file:
        settings = file.read()
    for word in (str(tmp_path), 'TFTP', '2299', 'trace="true"', 'enabledIn="true"', 'DeviceFilter ',
                 '<Teleporter enabled="true"', '<Recording enabled="true"', '<Tracing enabled="true"',
                 '<CardReader enabled="true"', 'passthrough="true"', '10.9.9.0', 'imagePath', '6543', '6544',
                 'AllowAll'):
        assert word not in settings, word
    assert api.start('guarded') is True and api.powerOff('guarded') is True
    assert victim.read_bytes() == b'precious' and not os.listdir(str(elsewhere))


def test_two_vms_from_one_image(api, images, remove_all):
    """VirtualBox refuses two disks of one uuid."""
    for name in ('first', 'second'):
        api.createVM(name, str(images / 'disk.vdi'), {'memory': 16})
    disks = [facts(name)['SATA-ImageUUID-0-0'] for name in ('first', 'second')]
    assert disks[0] != disks[1]


def folder_of(vm):
    return os.path.join(os.environ['VBOX_USER_HOME'], 'vms', vm)


def test_an_image_that_another_vm_uses(api, images, remove_all):
    api.createVM('user', str(images / 'disk.vdi'), {'memory': 16})
    used = next(value for key, value in facts('user').items() if value.endswith('.vdi'))
    api.start('user')
    code, text = fault_of(api.createVM, 'copy', used, {'memory': 16})
    assert (code, 'user uses it' in text) == (10, True), text
    assert 'copy' not in api.listVMs() and not os.path.exists(folder_of('copy'))
    assert api.getState('user') == 'Running'
    api.powerOff('user')
    api.createVM('copy', used, {'memory': 16})


def test_a_copy_of_a_known_disk_has_a_uuid_of_its_own(api, images, remove_all, tmp_path):
    """The image file is a byte copy of a disk that VirtualBox has open under the same uuid."""
    api.createVM('original', str(images / 'disk.vdi'), {'memory': 16})
    used = next(value for key, value in facts('original').items() if value.endswith('.vdi'))
    twin = tmp_path / 'twin.vdi'
    with open(used, 'rb') as source:
        twin.write_bytes(source.read())
    before = digest(twin)
    api.createVM('from twin', str(twin), {'memory': 16})
    assert facts('from twin')['SATA-ImageUUID-0-0'] != facts('original')['SATA-ImageUUID-0-0']
    assert digest(twin) == before
    assert not [name for name in os.listdir(folder_of('from twin')) if 'copy-of' in name]


def test_a_vm_from_an_iso(api, images, remove_all):
    api.createVM('live', str(images / 'disc.iso'), {'memory': 16, 'diskSize': 8, 'cpus': 2})
    found = facts('live')
    assert str(images / 'disc.iso') in found.values() and found['cpus'] == '2'
    disk = next(value for value in found.values() if value.endswith('.vdi'))
    assert 'Capacity:       8 MBytes' in manage('showmediuminfo', disk)
    api.start('live')
    api.powerOff('live')
    api.removeVM('live', True)
    assert os.path.exists(str(images / 'disc.iso')) and not os.path.exists(disk)


def test_what_an_appliance_brought_in_its_drive_is_nothing_to_clean_up(api, images, remove_all, tmp_path):
    """Its ISO was taken for a disk that was left half made: cleanup deleted it, in its VM's drive."""
    api.createVM('live', str(images / 'disc.iso'), {'memory': 16, 'diskSize': 0})
    manage('export', 'live', '--output', str(tmp_path / 'live.ova'), '--options', 'iso')
    api.removeVM('live')
    api.createVM('brought', str(tmp_path / 'live.ova'))
    brought = [value for value in facts('brought').values() if value.endswith('.iso')]
    assert len(brought) == 1 and brought[0].startswith(folder_of('brought')), brought
    assert api.cleanup(False) == [] and os.path.exists(brought[0])


@pytest.mark.parametrize('way', ['--ovf10', '--ovf09', '--legacy09'])
def test_what_was_in_a_drive_is_taken_out_where_it_is_not_brought(api, images, remove_all, tmp_path, way):
    """Else a stranger who knows its uuid has the guest read it. All that VirtualBox exports is taken."""
    api.createVM('carrier', str(images / 'disc.iso'), {'memory': 16, 'diskSize': 4})
    manage('export', 'carrier', '--output', str(tmp_path / 'carrier.ova'), way)
    api.createVM('brought', str(tmp_path / 'carrier.ova'))
    values = list(facts('brought').values())
    assert 'emptydrive' in values and not [value for value in values if value.endswith('.iso')], values
    assert [value for value in facts('carrier').values() if value.endswith('.iso')]


def test_a_vbox_file_is_registered(api, images, remove_all, home):
    api.createVM('registered', str(images / 'disk.vdi'), {'memory': 16})
    path = facts('registered')['CfgFile']
    assert fault_of(api.createVM, path)[0] == 8
    assert api.removeVM('registered') is True
    assert 'registered' not in api.listVMs() and os.path.exists(path)
    assert fault_of(api.createVM, 'registered')[0] == 8        # its files are still there
    assert api.createVM(path) == [True, 'registered']
    assert api.getState('registered') == 'PoweredOff'
    api.start('registered')


@pytest.mark.parametrize('name', ['torn.ova', 'torn.vdi', 'torn.vmdk', 'torn.ovf'])
def test_a_torn_image_leaves_nothing(api, images, remove_all, tmp_path, name):
    whole = images / name.replace('torn.ov', 'appliance.ov').replace('torn', 'disk')
    torn = tmp_path / name
    torn.write_bytes(whole.read_bytes()[:300])
    media = manage('list', 'hdds')
    code, text = fault_of(api.createVM, 'torn', str(torn), {'memory': 16})
    assert code == 5 and str(torn) in text, text
    assert 'torn' not in api.listVMs()
    assert manage('list', 'hdds') == media
    assert not os.path.exists(folder_of('torn')), os.listdir(folder_of('torn'))


def test_removing_keeps_disks_that_others_use(api, images, remove_all):
    api.createVM('one', str(images / 'disk.vdi'), {'memory': 16})
    api.createVM('two', '', {'memory': 16, 'diskSize': 0})
    disk = next(value for value in facts('one').values() if value.endswith('.vdi'))
    manage('storageattach', 'one', '--storagectl', 'SATA', '--port', '0', '--medium', 'none')
    manage('modifymedium', 'disk', disk, '--type', 'multiattach')
    for vm in ('one', 'two'):
        manage('storageattach', vm, '--storagectl', 'SATA', '--port', '0', '--type', 'hdd', '--medium', disk)
    assert api.removeVM('one', True) is True
    assert os.path.exists(disk)
    api.start('two')
    assert api.cleanup() == []
    api.powerOff('two')
    assert api.removeVM('two', True) is True
    api.cleanup(False)
    assert not os.path.exists(disk)


def test_cleanup_touches_nothing_else(api, images, remove_all, tmp_path):
    manage('createvm', '--name', 'foreign', '--ostype', 'Linux_64', '--register')
    foreign_disk = str(tmp_path / 'foreign.vdi')
    manage('createmedium', 'disk', '--filename', foreign_disk, '--size', '4')
    api.createVM('ours', '', {'memory': 16, 'diskSize': 4})
    api.createVM('saved', '', {'memory': 16, 'diskSize': 4})
    api.start('saved')
    api.saveState('saved')
    api.createVM('left disk', '', {'memory': 16, 'diskSize': 4})
    left = next(value for value in facts('left disk').values() if value.endswith('.vdi'))
    manage('storageattach', 'left disk', '--storagectl', 'SATA', '--port', '0', '--medium', 'none')
    api.removeVM('left disk')
    try:
        planned = [(row['kind'], row['name']) for row in api.cleanup()]
        assert planned == [('disk', left)]
        assert [row['name'] for row in api.cleanup(True, ['ours'])] == ['ours', left]
        assert os.path.exists(left) and 'ours' in api.listVMs()
        removed = [(row['kind'], row['name']) for row in api.cleanup(False, ['ours'])]
        assert removed == [('vm', 'ours')] + planned
        assert not os.path.exists(left) and os.path.exists(foreign_disk)
        assert {'foreign', 'saved'} <= set(api.listVMs()) and 'ours' not in api.listVMs()
        assert api.getState('saved') == 'Saved'
        assert api.cleanup() == []
    finally:
        try_manage('closemedium', 'disk', foreign_disk, '--delete')


@pytest.mark.parametrize('image, options', [
    ('disk.vdi', {'memory': 2 ** 30}), ('disk.vdi', {'cpus': 1000}), ('', {'memory': 2 ** 30, 'diskSize': 4}),
    ('torn.iso', {'diskSize': 4}), ('torn.vdi', {}), ('torn.vmdk', {}), ('torn.vdi', {'linked': True}),
    ('torn.qcow2', {}), ('torn.ova', {})])
def test_a_vm_that_can_not_be_made_leaves_nothing(api, images, remove_all, tmp_path, image, options):
    if image.startswith('torn'):
        with open(str(images / 'disk.vdi'), 'rb') as file:
            (tmp_path / image).write_bytes(file.read(100000 if image == 'torn.vdi' else 0))
    before = manage('list', 'hdds'), manage('list', 'dvds'), manage('list', 'vms')
    path = str((tmp_path if image.startswith('torn') else images) / image) if image else ''
    code, text = fault_of(api.createVM, 'fails', path, options)
    assert code == (-32602 if {'memory', 'cpus'} & set(options) else 5), text
    assert not image.startswith('torn') or image in text
    assert 'Object corresponding' not in text.partition(' (')[0], text
    assert (manage('list', 'hdds'), manage('list', 'dvds'), manage('list', 'vms')) == before
    assert not os.path.exists(folder_of('fails')) and api.cleanup() == []


@pytest.mark.parametrize('options', [{}, {'linked': True}])
def test_an_image_that_can_not_be_opened_never_meets_virtualbox_s_server(api, images, remove_all, tmp_path,
                                                                        options):
    """Which could die of it: a process of its own tells what is wrong."""
    with open(str(images / 'disk.vdi'), 'rb') as file:
        data = file.read()
    odd = tmp_path / 'odd.vdi'
    odd.write_bytes(data[:68] + b'\1\0\2\0' + data[72:])       # of a version that nobody has made
    code, text = fault_of(api.createVM, 'fails', str(odd), options)
    assert code == 5 and '%s is cut or damaged' % odd in text and 'VERR_VD_VDI_UNSUPPORTED_VERSION' in text


def qcow2(data, below=b''):
    """A disk of 1 MB that begins with this data, or lies on another file."""
    head = struct.pack('>4sIQIIQIIQQIIQ', b'QFI\xfb', 2, 512 if below else 0, len(below), 16, 1 << 20, 0, 1,
                       3 << 16, 1 << 16, 1, 0, 0)
    parts = [head.ljust(512, b'\0') + below, struct.pack('>Q', 2 << 16), struct.pack('>6H', *6 * [1]),
             struct.pack('>Q', 4 << 16 | 1 << 63), struct.pack('>Q', 5 << 16 | 1 << 63 if data else 0), data]
    return b''.join(part.ljust(1 << 16, b'\0') for part in parts)


def test_an_image_of_qemu_is_copied_where_it_is_all_there_is(api, remove_all, tmp_path):
    """VirtualBox doesn't look at the file on which one lies, and copies zeros."""
    below, image, raw = (tmp_path / name for name in ('below', 'image.qcow2', 'raw'))
    below.write_bytes(b'below'.ljust(1 << 20, b'.'))
    image.write_bytes(qcow2(b'whole'))
    api.createVM('whole', str(image), {'memory': 16})
    disk = next(value for value in facts('whole').values() if value.endswith('.vdi'))
    manage('clonemedium', 'disk', disk, str(raw), '--format', 'RAW')
    assert raw.read_bytes() == b'whole'.ljust(1 << 20, b'\0')
    manage('closemedium', 'disk', str(raw), '--delete')
    image.write_bytes(qcow2(b'', str(below).encode()))
    code, text = fault_of(api.createVM, 'parts', str(image), {'memory': 16})
    assert code == 5 and str(below) in text
    manage('clonemedium', 'disk', str(image), str(raw), '--format', 'RAW')
    assert raw.read_bytes() == bytes(1 << 20)       # else a refusal is for its content's sake
    for path in raw, image:
        manage('closemedium', 'disk', str(path))


def test_what_a_linked_vm_has_is_not_left_over(api, images, remove_all):
    """VirtualBox lists only the disks that lie on no other."""
    api.createVM('on it', str(images / 'disk.vdi'), {'memory': 16, 'linked': True})
    assert api.cleanup() == []
    api.takeSnapshot('on it', 'once')
    assert api.cleanup() == []
    assert api.removeVM('on it', True) is True
    assert str(images) not in manage('list', 'hdds') and api.cleanup() == []


@pytest.mark.parametrize('driver', ['VirtualBox', 'VBoxManage'])
def test_no_disk_stays_known_whose_file_went(home, appliance, remove_all, tmp_path, driver):
    """With its VM's folder, while that is made or later: nobody could ever take it away."""
    disk = os.path.join(folder_of('gone'), 'gone.vdi')
    with VMHost(tmp_path, hypervisor={'hypervisor': driver}) as host, host.api as api, host.api as maker:
        told = []
        making = threading.Thread(
            target=lambda: told.append(fault_of(maker.createVM, 'gone', appliance + '.vdi')))
        making.start()
        wait_until(lambda: os.path.exists(disk) and os.path.getsize(disk), 60)
        shutil.rmtree(folder_of('gone'), ignore_errors=True)
        making.join(120)
        assert told and 'gone' not in api.listVMs() and disk not in manage('list', 'hdds')
        assert api.cleanup() == [] if driver == 'VirtualBox' else True
        shutil.rmtree(folder_of('gone'), ignore_errors=True)
        api.createVM('gone', '', {'memory': 16, 'diskSize': 4})
        os.remove(disk)
        assert api.removeVM('gone', True) is True and disk not in manage('list', 'hdds')
    try_manage('closemedium', 'disk', appliance + '.vdi')
