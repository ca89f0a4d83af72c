"""The real VirtualBox by its program VBoxManage: what that driver alone must do, and does in its own way; the
contract of drivers is test_contract.py's."""

import contextlib
import glob
import os
import shutil
import signal
import time

import pytest
from helpers import beside, others_take, wait_until
from rig import (
    cards_of,
    facts,
    forget_networks,
    forwards_are_served_and_move,
    manage,
    stopped,
    try_manage,
    uplinks,
    vboxsvc,
    vm_process,
)
from test_hypervisor import opened
from vms import SETTINGS, VMHost, command_line, environment, fault_of, kill, processes

import faults
import hosthypervisor
import hypervisor
import vboximages
import vmstates

SERIAL = 'vmhost:' + '5' * 32


@pytest.fixture
def box(home, remove_all, tmp_path):
    settings = dict(SETTINGS, state_dir=str(tmp_path), command_timeout=45)
    with opened(hosthypervisor.Hypervisor, 'VBoxManage', settings) as box:
        yield box


@pytest.fixture
def vm(box):
    box.create_vm('-by-hand', '', {'memory': 16, 'diskSize': 4, 'cpus': 1})
    return '-by-hand'


def test_a_vm_is_what_was_asked_for(box, vm):
    found, said = box.describe(vm), facts(box.known_uuid(vm))
    assert (found['memory'], found['cpus'], found['tagged'], found['native']) == (16, 1, True, 'PoweredOff')
    assert found['id'].replace(':', '') == said['macaddress1'] and said['nic1'] == 'nat'
    assert box.describe(found['id'])['uuid'] == box.describe(found['uuid'].lower())['uuid'] == found['uuid']
    assert os.path.exists(os.path.splitext(said['CfgFile'])[0] + '.vdi')
    assert box.machine_states() == box.machine_states() and box.machine_states()['Stuck'] == 8


def test_snapshots(box, vm):
    for name in ('-live', 'b "quoted"\\', 'same', 'same'):
        assert box._call('take_snapshot', (vm, name, 'its\ndescription', True)) is True
    rows = box.snapshots(vm)
    assert [(row['name'], row['parent'], row['depth'], row['current']) for row in rows] == [
        ('-live', '', 0, False), ('b "quoted"\\', '-live', 1, False), ('same', 'b "quoted"\\', 2, False),
        ('same', 'same', 3, True)]
    assert rows[0]['desc'] == 'its\ndescription'
    for error, verb, args in ((faults.AlreadyExists, 'take_snapshot', (vm, '-live')),
                              (faults.HypervisorError, 'restore_snapshot', (vm, 'none')),
                              (faults.HypervisorError, 'delete_snapshot', (vm, 'same'))):
        with pytest.raises(error):
            getattr(box, verb)(*args)
    with pytest.raises(faults.BadState, match='snapshots'):
        box.remove_vm(vm, True)
    assert box.restore_snapshot(vm, '-live') is True and box.snapshots(vm)[0]['current']
    assert box.take_snapshot(vm, 'second') is True
    begun = time.monotonic()
    with pytest.raises(faults.BadState, match='more than the one snapshot'):
        box.delete_snapshot(vm, '-live')
    assert time.monotonic() - begun < 20 and box.delete_snapshot(vm, 'second') is True
    for row in reversed(rows):
        assert box.delete_snapshot(vm, row['id']) is True
    assert box.snapshots(vm) == []


def test_saved_and_back(box, vm):
    box.start(vm)
    assert box.describe(vm)['pid'] == vm_process(box.known_uuid(vm))
    assert box.take_snapshot(vm, 'live') is True and box.state(vm) == 'Running'
    assert box.set_limits(vm, {'cpuPercent': 50}) is True
    for verb, native in (('pause', 'Paused'), ('save_state', 'Saved'), ('start', 'Running'),
                         ('reset', 'Running'), ('save_state', 'Saved'), ('discard_state', 'PoweredOff')):
        assert getattr(box, verb)(vm) is True and box.state(vm) == native, verb
    assert 'VBoxHeadless' in box.get_log(vm) and box.describe(vm)['pid'] == 0
    assert facts(box.known_uuid(vm))['cpuexecutioncap'] == '50'
    with pytest.raises(faults.NotSupported, match='VBoxManage can\'t limit the network'):
        box.set_limits(vm, {'netKBps': 100})


def test_the_secret_of_the_firmware(home, remove_all, tmp_path):
    """Is what the VM gets, and in no list of processes."""
    seen = []
    box = hosthypervisor.Hypervisor('VBoxManage', dict(SETTINGS, state_dir=str(tmp_path), command_timeout=45),
                                    serial_of=lambda id, uuid: SERIAL)
    box.open()
    with contextlib.closing(box), command_lines(seen):
        box.create_vm('secretive', '', {'memory': 16, 'diskSize': 0})
        box.start('secretive')
        host, port = box.chirp_endpoint('secretive')
    assert host == '127.0.0.1' and 0 < port < 65536
    told = manage('getextradata', 'secretive', 'enumerate')
    assert 'pcbios/0/Config/DmiBoardSerial, Value: string:' + SERIAL in told
    assert any('VBoxManage' in line for line in seen) and not any('5' * 32 in line for line in seen)


def command_lines(seen):
    """Those of all processes that there are meanwhile, as often as they can be read."""
    return beside(lambda: seen.extend(' '.join(command_line(pid)) for pid in processes()), 0.005)


def test_a_disk_on_an_image_that_stays(box, images, tmp_path, monkeypatch):
    """A task's VM: in a folder of its own, on the project's image; removed with its disk, nothing else is."""
    monkeypatch.setattr(hosthypervisor, 'FIRST_PATIENCE', 60.0)    # while its server comes up, beside others
    image = str(images / 'disk.vdi')
    before = (images / 'disk.vdi').read_bytes()
    for name in ('task-1', 'task-2'):
        box.create_vm(name, image, {'memory': 16, 'linked': True, 'owner': 'the project',
                                    'folder': str(tmp_path)})
    box.create_vm('copied', image, {'memory': 16})
    path = str(tmp_path / 'foreign.vdi')
    manage('createmedium', 'disk', '--filename', path, '--size', '4')
    manage('storageattach', 'task-1', '--storagectl', 'IDE', '--port', '0', '--device', '0', '--type', 'hdd',
           '--medium', path)
    box.start('task-2')
    box.save_state('task-2')
    assert box.cleanup(True, ['task-2', 'copied'], 'the project') == [
        {'kind': 'vm', 'name': 'task-2', 'why': 'named'}]
    assert box.cleanup(False, ['task-2', 'copied'], 'another') == []
    assert box.cleanup(False, ['task-2', 'copied'], 'the project') == [
        {'kind': 'vm', 'name': 'task-2', 'why': 'named'}]
    assert box.remove_vm('task-1', True) == [[path, vboximages.ELSEWHERE]] and os.path.exists(path)
    assert box.remove_vm('copied', True) == []
    assert (images / 'disk.vdi').read_bytes() == before and not glob.glob(str(tmp_path / 'task-*'))
    assert image not in manage('list', 'hdds') and 'task' not in manage('list', 'hdds')
    manage('closemedium', 'disk', path)


def test_a_vm_on_an_image_for_a_stream_goes_with_all_its_disks(box, tmp_path):
    """VirtualBox lays one more on the one that was made with it."""
    image = str(tmp_path / 'stream.vmdk')
    manage('createmedium', 'disk', '--filename', image, '--size', '4', '--format', 'VMDK', '--variant=Stream')
    manage('closemedium', 'disk', image)
    box.create_vm('task', image, {'memory': 16, 'linked': True, 'folder': str(tmp_path)})
    assert box.remove_vm('task', True) == [] and os.path.exists(image)
    assert not (tmp_path / 'task').exists() and str(tmp_path) not in manage('list', 'hdds')


def test_ports_of_a_guest_are_reached_here(box):
    """And a saved VM's moves, where another program took it meanwhile."""
    box.create_vm('serves', '', {'memory': 16, 'diskSize': 0, 'forwards': [
        {'guestPort': 80}, {'guestPort': 22, 'isRemote': True}]})
    forwards_are_served_and_move(
        'serves', lambda: wait_until(lambda: box.describe('serves').get('forwards'), 60),
        lambda: box.start('serves'), lambda: box.save_state('serves'))


def test_what_it_leaves_to_vboxapi(box, vm, images):
    for verb, args in (('screenshot', (vm,)), ('get_stats', (vm,)), ('remote_desktop', (vm,)),
                       ('cleanup', ()), ('create_vm', ('x', str(images / 'appliance.ova'))),
                       ('create_vm', ('/some/where.vbox',)), ('get_network', ())):
        with pytest.raises(faults.NotSupported, match='VBoxManage can\'t'):
            getattr(box, verb)(*args)


def test_a_hung_vm(box, vm):
    """Lists answer, others go on, and powerOff ends its process."""
    box.start(vm)
    with stopped(vm_process(box.known_uuid(vm))):
        begun = time.monotonic()
        rows = {row['name']: row['state'] for row in box.list_rows()}
        assert rows[vm] == vmstates.RUNNING and time.monotonic() - begun < 2
        assert box.create_vm('beside', '', {'memory': 16, 'diskSize': 0}) == 'beside'
        assert box.start('beside') is True
        begun = time.monotonic()
        for verb, args in (('restore_snapshot', (vm, 'any')), ('remove_vm', (vm,)), ('start', (vm,))):
            with pytest.raises(faults.BadState, match=vm + ' is Running; ' + verb.replace('_', ' ')):
                getattr(box, verb)(*args)
        assert time.monotonic() - begun < 30 * others_take()        # 45 s each, where it waits for the VM
        assert box.power_off(vm) is True and box.vms_with_state()[vm] == box.state(vm) == 'Aborted'


def test_a_virtualbox_that_hangs_hides_no_vm(box, vm):
    """What was seen last is told at once, of one VM as of all."""
    before = wait_until(lambda: [found for found in [box.describe(vm)] if not found['trouble']], 60)[0]
    names = wait_until(lambda: box.list_snapshots(vm) == [] and box.version(), 60)
    with stopped(vboxsvc()):
        for ask, seconds in ((box.list_rows, 0.8), (lambda: box.snapshots(vm), 0.8), (box.version, 0.8),
                             (lambda: box.describe(vm), hosthypervisor.FIRST_PATIENCE),
                             (lambda: box.state(vm), 0.8)):
            begun = time.monotonic()
            assert ask() in ([], names, 'PoweredOff', [box._watch.row_of(vm)],
                             dict(before, trouble=box.trouble()))
            assert time.monotonic() - begun < seconds + 0.2 * others_take()
    wait_until(lambda: box.list_rows() and not box.trouble(), 60)


def test_a_vm_that_hangs_holds_up_nobody_who_looks(box, vm):
    """Though it was off when it was seen last: it runs, as VirtualBox says. What is asked of others is told
    while that one is asked."""
    box.create_vm('beside', '', {'memory': 16, 'diskSize': 0})
    box.take_snapshot('beside', 'known')
    uuid, took = box.known_uuid(vm), []
    wait_until(lambda: box.describe('beside').get('memory') == 16 and box.list_snapshots('beside'), 60)
    with stopped(box._watcher._child.process.pid):
        manage('startvm', uuid, '--type=headless')
        os.kill(vm_process(uuid), signal.SIGSTOP)
    for _ in range(3):
        for ask in (lambda: box.vms_with_state()['beside'] == 'PoweredOff',
                    lambda: box.list_snapshots('beside') == ['known'],
                    lambda: box.describe('beside')['memory'] == 16, lambda: box.describe(vm)['name'] == vm):
            begun = time.monotonic()
            assert ask()
            took.append(time.monotonic() - begun)
    assert max(took) < (hosthypervisor.FIRST_PATIENCE + 0.2) * others_take(), took
    wait_until(lambda: box.state(vm) == 'Running' and box.describe(vm)['trouble'] == hypervisor.HANGS, 60)
    with pytest.raises(faults.DeadlineExceeded, match=vm + '.*its process does not answer'):
        box.list_snapshots(vm)
    assert box.power_off(vm) is True


def test_what_another_tool_does_is_seen(box, vm):
    uuid = box.describe(vm)['uuid']
    name = 're"named\nby " {another}'
    wait_until(lambda: try_manage('modifyvm', uuid, '--name', name), 20)    # while nobody looks at it
    wait_until(lambda: ('vm-renamed', name, 'was ' + vm) in box.happened, 40)
    assert box.describe(name)['uuid'] == uuid and box.list_vms() == [name]
    wait_until(lambda: try_manage('startvm', uuid, '--type', 'headless'), 20)
    wait_until(lambda: ('vm-state', name, 'Running') in box.happened, 40)
    assert box.power_off(name) is True


def test_where_no_network_was_made_a_vm_gets_nat_until_there_is_one(home, remove_all, tmp_path):
    """Its id stays. Of one that wants a host-only card it is said what is missing."""
    forget_networks()
    network = {'mode': 'hostonly', 'interface': 'vboxnet0', 'host_ip': '192.168.56.1'}
    settings = dict(SETTINGS, network=network, state_dir=str(tmp_path), command_timeout=45)
    with opened(hosthypervisor.Hypervisor, 'VBoxManage', settings) as box:
        box.create_vm('early', '', {'memory': 16, 'diskSize': 0})
        box.create_vm('hasty', '', {'memory': 16, 'diskSize': 0, 'network': 'hostonly'})
        uuid, mac = box.known_uuid('early'), box.describe('early')['id']
        assert box.start('early') is True and facts(uuid)['nic1'] == 'nat'
        assert box.chirp_endpoint('early')[0] == '127.0.0.1'
        with pytest.raises(faults.BadState, match='no host-only interface vboxnet0'):
            box.start('hasty')
        box.power_off('early')
        manage('hostonlyif', 'create')
        with contextlib.suppress(faults.HypervisorError):       # the rig lacks the kernel's module
            box.start('early')
        found = facts(uuid)
        assert (found['nic1'], found['hostonlyadapter1'], box.describe('early')['id']) == (
            'hostonly', 'vboxnet0', mac)
        assert box.chirp_endpoint('early') is None
    forget_networks()


def test_a_vm_that_can_not_be_read(box, vm):
    uuid = box.describe(vm)['uuid']
    path = facts(uuid)['CfgFile']
    with open(path, 'w') as file:
        file.write('no settings')
    kill(vboxsvc())
    row = wait_until(lambda: [row for row in box.list_rows() if row['state'] == vmstates.INACCESSIBLE], 60)[0]
    name = os.path.splitext(os.path.basename(path))[0]      # VirtualBox allows no file to begin with a dash
    assert (row['name'], row['uuid']) == (name, uuid) and path in row['trouble']
    assert box.describe(name)['native'] == 'Inaccessible'
    with pytest.raises(faults.BadState, match='`rm` takes it out'):
        box.start(name)
    assert box.remove_vm(name) == [] and box.list_vms() == []
    shutil.rmtree(os.path.dirname(path))       # which stay: nobody can tell what is in there


def test_a_task_whose_folder_is_gone(box, tmp_path):
    """A client empties its slot: VirtualBox still has the VM, until its owner cleans up."""
    for name in ('task', 'another'):
        box.create_vm(name, '', {'memory': 16, 'diskSize': 0, 'owner': 'the owner of ' + name,
                                 'folder': str(tmp_path / 'slot')})
    shutil.rmtree(str(tmp_path / 'slot'))
    kill(vboxsvc())
    wait_until(lambda: [row['state'] for row in box.list_rows()] == 2 * [vmstates.INACCESSIBLE], 60)
    assert box.cleanup(False, [], 'the owner of task') == [
        {'kind': 'vm', 'name': 'task', 'why': 'its folder is gone'}]
    assert box.list_vms() == ['another']


def test_a_card_in_the_network_of_this_machine(box):
    with uplinks() as route:
        box.create_vm('follows', '', {'memory': 16, 'diskSize': 0, 'bridged': 'auto'})
        assert cards_of('follows') == [('nat', ''), ('bridged', 'eth7')]
        found = box.describe('follows')
        assert (found['bridged'], found['id'].replace(':', '')) == ('eth7', facts('follows')['macaddress1'])
        route('eth8')
        with contextlib.suppress(faults.HypervisorError):       # the rig lacks the kernel's module
            box.start('follows')
        assert cards_of('follows') == [('nat', ''), ('bridged', 'eth8')]
        with pytest.raises(faults.InvalidParams, match='no interface eth9; there are: .*eth7'):
            box.create_vm('wrong', '', {'diskSize': 0, 'bridged': 'eth9'})
    with pytest.raises(faults.BadState, match='no interface eth8'):
        box.start('follows')
    assert box.list_vms() == ['follows']


def test_a_vm_that_was_taken_out_of_the_list_is_registered_again(box, images, tmp_path):
    """By its folder, with its disk on an image; and its owner."""
    options = {'memory': 16, 'linked': True, 'owner': 'me', 'folder': str(tmp_path)}
    box.create_vm('task', str(images / 'disk.vdi'), options)
    id = box.describe('task')['id']
    wait_until(lambda: try_manage('unregistervm', 'task'), 20)      # while nobody looks at it
    assert box.register_vm('other', str(tmp_path)) is False
    assert box.register_vm('task', str(tmp_path), 'another') is True and box.describe('task')['id'] == id
    with pytest.raises(faults.AlreadyExists):
        box.register_vm('task', str(tmp_path))
    assert box.cleanup(False, ['task'], 'me') == [] and len(box.cleanup(False, ['task'], 'another')) == 1
    assert not os.path.exists(str(tmp_path / 'task'))


def test_a_host_agent_without_vboxapi_takes_it_by_itself(home, remove_all, tmp_path):
    (tmp_path / 'vboxapi.py').write_text('raise ImportError("no module named vboxapi")\n')
    paths = [str(tmp_path), os.environ.get('PYTHONPATH', '')]
    with VMHost(tmp_path / 'host', {'PYTHONPATH': os.pathsep.join(paths)},
                hypervisor={'hypervisor': 'auto'}) as host, host.api as api:
        assert api.agentInfo()['hypervisor'] == 'VBoxManage' and 'vboxapi is not installed' in host.log()
        assert api.createVM('volunteered', '', {'memory': 16, 'diskSize': 4}) == [True, 'volunteered']
        assert api.start('volunteered') is True and api.getVM('volunteered')['state'] == 'Running'
        code, text = fault_of(api.remoteDesktop, 'volunteered')
        assert code == 9 and 'VBoxManage can\'t' in text
        assert api.saveSnapshot('volunteered', 7) is True and api.listSnapshots('volunteered') == ['7']
        with environment(host.environment):
            checked = host.verb('check')
        assert b'driven by' in checked.stdout, checked
        assert api.powerOff('volunteered') is True
