"""One VM's trouble is its own: it hangs, can't be read, has another's card, or its host's disk is full."""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import threading
import time

import pytest
from helpers import beside, others_take, wait_until
from rig import facts, manage, stopped, vboxsvc, vm_process
from test_hypervisor import opened
from vms import SETTINGS, command_line, fault_of, kill

import faults
import hosthypervisor
import hypervisor

NUMBERS = itertools.count(1)
SMALL = {'memory': 16, 'diskSize': 4}
# A boot sector that looks for `vmhost:` where the firmware's tables are, and writes that word to the first
# serial port, or N.
SERIAL_READER = bytes([
    0xb8, 0x00, 0xe0, 0x8e, 0xc0, 0x31, 0xff, 0xba, 0xf8, 0x03,    # es:di = E000:0; dx = 3f8h
    0x26, 0x66, 0x81, 0x3d, 0x76, 0x6d, 0x68, 0x6f, 0x74, 0x08,    # next: cmp dword es:[di],'vmho'; je found
    0x47, 0x75, 0xf3, 0xb0, 0x4e, 0xee, 0xeb, 0x15,                # inc di; jnz next; out 'N'; jmp halt
    0xb9, 0x27, 0x00,                                              # found: mov cx,39
    0xba, 0xfd, 0x03, 0xec, 0xa8, 0x20, 0x74, 0xfb,                # more: wait until the port is ready
    0xba, 0xf8, 0x03, 0x26, 0x8a, 0x05, 0xee, 0x47, 0xe2, 0xee,    # out es:[di]; inc di; loop more
    0xf4, 0xeb, 0xfd])                                             # halt: hlt; jmp halt

# A boot sector that writes 32 KB after 32 KB of the BIOS to the first disk.
WRITER = bytes([
    0x31, 0xc0, 0x8e, 0xd8, 0xb2, 0x80,                            # ds = 0; dl = 80h
    0xbe, 0x19, 0x7c, 0xb8, 0x00, 0x43, 0xcd, 0x13,                # again: si = packet; ah = 43h; int 13h
    0x66, 0x81, 0x06, 0x21, 0x7c, 0x40, 0, 0, 0, 0xeb, 0xed,       # add dword [packet + 8],64; jmp again
    0x10, 0, 0x40, 0, 0, 0, 0, 0xf0, 0x40, 0, 0, 0, 0, 0, 0, 0])   # packet: 64 sectors at F000:0 to LBA 64


def boot_disk(tmp_path, disk, sector, megabytes):
    """Makes a disk that boots this sector."""
    raw = str(tmp_path / 'raw')
    with open(raw, 'wb') as file:
        file.write(sector.ljust(510, b'\0') + b'\x55\xaa')
        file.truncate(megabytes << 20)
    manage('convertfromraw', raw, disk)


@pytest.fixture
def swept(api):
    """What a test's VMs leave goes after them."""
    yield
    api.cleanup(False)


@pytest.fixture
def vm(api, swept, remove_all):
    name = 'troubled-%d' % next(NUMBERS)        # what a broken snapshot left may keep the name
    api.createVM(name, '', SMALL)
    return name


def running(api, vm):
    """Starts it; gives the number of its process."""
    api.start(vm)
    return vm_process(api.getVM(vm)['uuid'])


@contextlib.contextmanager
def lists_are_asked(host, pause=0.02):
    """Asks for all VMs again and again meanwhile, as often as a busy page would; gives how long each answer
    took. With a longer ``pause`` where it goes on for a minute: VMs need processors, too."""
    took = []

    def ask():
        for method in 'listVMs', 'listVMsWithState':
            begun = time.monotonic()
            getattr(api, method)()
            took.append(time.monotonic() - begun)
    with host.api as api, beside(ask, pause):
        yield took


def test_a_hung_vm_is_switched_off_and_blocks_nobody(host, api, vm):
    api.createVM('other', '', SMALL)
    pid = running(api, vm)
    after = host.last_event()
    with stopped(pid):
        wait_until(lambda: api.getVM(vm)['trouble'] == hypervisor.HANGS, 30)
        assert host.wait_for_event('vm-trouble', vm, after)['text'] == hypervisor.HANGS
        assert {each['trouble'] for each in api.getVMs() if each['name'] != vm} == {''}
    wait_until(lambda: not api.getVM(vm)['trouble'], 30)
    with stopped(pid), lists_are_asked(host) as took:
        with host.api as killer:
            ended = []
            killing = threading.Thread(target=lambda: ended.append(fault_of(killer.powerOff, vm)))
            begun = time.monotonic()
            killing.start()
            assert api.start('other') is True and api.pause('other') is True
            killing.join(60)
        print('ended after %.1f s, lists took %.2f s at most' % (time.monotonic() - begun, max(took)))
    assert ended == [(0, True)] and max(took) < 1.5
    assert api.getState(vm) == 'Aborted' and api.getState('other') == 'Paused'
    assert api.start(vm) is True


def test_what_hung_vms_are_asked_fails_alone(host, api, swept, remove_all):
    """Each is given up by itself long before the 65 seconds that XPCOM may take, and sooner where the VM is
    told to hang already; meanwhile others are looked at."""
    calls = {'pause': (), 'setLimits': ({'cpuPercent': 50},), 'takeSnapshot': ('s',), 'screenshot': ()}
    ended, again, driver = {}, {}, host.driver_pid()

    def ask(method):
        with host.api as asker:
            call, vm = getattr(asker, method), 'hung-' + method
            for told in ended, again:
                begun = time.monotonic()
                told[method] = fault_of(call, vm, *calls[method]) + (time.monotonic() - begun,)
            again[method + ', getStats'] = fault_of(asker.getStats, vm) + (0,)
            asker.powerOff(vm)
    with contextlib.ExitStack() as stack:
        for method in calls:
            api.createVM('hung-' + method, '', SMALL)
            stack.enter_context(stopped(running(api, 'hung-' + method)))
        with lists_are_asked(host, 0.3) as took:
            asking = [threading.Thread(target=ask, args=(method,)) for method in calls]
            for thread in asking:
                thread.start()
            for thread in asking:
                thread.join()
        print('lists took %.2f s at most' % max(took), ended, again)
        assert all(code == 7 and 'stop --force' in text and seconds < 30 * others_take()
                   for code, text, seconds in ended.values())
        assert all(code == 7 and text.endswith('its process does not answer; powerOff (stop --force) ends it')
                   and seconds < 10 * others_take() for code, text, seconds in again.values())
        assert max(took) < 1.5 and host.driver_pid() == driver
    for method in calls:
        assert api.start('hung-' + method) is True


def test_another_tool_switches_a_vm_off_under_a_live_snapshot(api, vm):
    """Seen with 7.2: both wait for one another in the VM's process, for ever. Its end frees all."""
    running(api, vm)
    other = subprocess.Popen(['VBoxManage', 'controlvm', vm, 'poweroff'], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    try:
        print(fault_of(api.takeSnapshot, vm, 's'))
        if other.poll() is None or api.getState(vm) not in ('PoweredOff', 'Aborted'):
            print(api.getState(vm), fault_of(api.powerOff, vm))
        other.wait(30)
    finally:
        other.kill()
        other.wait()
    assert api.getState(vm) in ('PoweredOff', 'Aborted')


def test_a_vm_that_can_not_be_read(host, api, vm):
    path, uuid = facts(vm)['CfgFile'], api.getVM(vm)['uuid']
    with open(path) as file:
        whole = file.read()
    api.removeVM(vm)
    api.createVM(path)
    with open(path, 'w') as file:
        file.write(whole[:200])
    kill(vboxsvc())                     # the next one reads the file anew
    wait_until(lambda: fault_of(api.getState, uuid)[1] == 'Inaccessible', 60)
    assert vm in api.listVMs() and api.getVM(vm)['trouble']
    assert fault_of(api.start, vm)[0] == 4
    assert fault_of(api.createVM, vm)[0] == 8
    assert [row for row in api.cleanup(False) if row['kind'] != 'kept'] == []
    assert api.removeVM(uuid) is True and vm not in api.listVMs()
    row, = [row for row in api.cleanup(False) if path in row['why']]    # who mends the file has the VM again
    assert row['kind'] == 'kept' and ' may use it' in row['why']
    shutil.rmtree(os.path.dirname(path))
    assert row not in api.cleanup()


def test_two_vms_with_one_card(host, api, vm):
    api.createVM('twin', '', SMALL)
    after = host.last_event()
    manage('modifyvm', 'twin', '--macaddress1', api.getVM(vm)['id'].replace(':', ''))
    assert host.wait_for_event('vm-clash', vm, after)
    for name in (vm, 'twin'):
        assert fault_of(api.start, name)[0] == 4 and 'same MAC' in api.getVM(name)['trouble']
    assert api.start(api.getVM('twin')['uuid']) is True
    api.powerOff(api.getVM('twin')['uuid'])
    manage('modifyvm', 'twin', '--macaddress1', 'auto')
    wait_until(lambda: not api.getVM(vm)['trouble'], 20)
    assert api.start(vm) is True


@pytest.fixture
def secret_box(home, remove_all, tmp_path):
    """A hypervisor that gives each VM a secret of its own, made of the first digit of its uuid."""
    box = hosthypervisor.Hypervisor('VirtualBox', dict(SETTINGS, state_dir=str(tmp_path), command_timeout=45),
                                    serial_of=lambda id, uuid: 'vmhost:' + 32 * uuid[0])
    box.open()
    yield box
    assert box.close()


@pytest.mark.parametrize('firmware, device', [('bios', 'pcbios'), ('efi', 'efi')])
def test_a_cold_start_tells_the_firmware_its_serial(secret_box, firmware, device):
    manage('createvm', '--name', 'cold', '--ostype', 'Linux_64', '--register')
    manage('modifyvm', 'cold', '--memory', '64', '--firmware', firmware, '--nic1', 'nat')
    assert secret_box.start('cold') is True
    key = 'VBoxInternal/Devices/%s/0/Config/DmiBoardSerial' % device
    digit = secret_box.describe('cold')['uuid'][0]
    assert manage('getextradata', 'cold', key).strip() == 'Value: string:vmhost:' + 32 * digit
    assert secret_box.power_off('cold') is True


def test_the_host_agent_gives_each_vm_a_secret(api, vm):
    api.start(vm)
    told = manage('getextradata', vm, 'VBoxInternal/Devices/pcbios/0/Config/DmiBoardSerial').strip()
    assert re.match('Value: string:vmhost:[0-9a-f]{32}$', told)


def test_the_guest_reads_the_serial_and_its_clone_one_of_its_own(secret_box, tmp_path):
    disk, serial = (str(tmp_path / name) for name in ('disk.vdi', 'serial'))
    boot_disk(tmp_path, disk, SERIAL_READER, 2)
    secret_box.create_vm('read', disk, {'memory': 16})
    manage('modifyvm', 'read', '--uart1', '0x3f8', '4', '--uartmode1', 'file', serial)
    said = {}
    for name in ('read', 'clone'):
        if name == 'clone':
            manage('clonevm', 'read', '--name', 'clone', '--register')
        secret_box.start(name)
        wait_until(lambda: os.path.exists(serial) and os.path.getsize(serial) >= 39, 60)
        secret_box.power_off(name)
        with open(serial) as file:
            said[name] = file.read()
        os.remove(serial)
        assert said[name] == 'vmhost:' + 32 * secret_box.describe(name)['uuid'][0]


@pytest.fixture
def small_disk(tmp_path):
    """A folder for 8 MB."""
    folder = str(tmp_path / 'small')
    os.makedirs(folder)
    subprocess.check_call(['mount', '-t', 'tmpfs', '-o', 'size=8m', 'small', folder])
    yield folder
    subprocess.check_call(['umount', '-l', folder])


def test_a_full_disk_pauses_a_vm_for_a_reason_that_is_told(host, api, remove_all, small_disk, tmp_path):
    disk = os.path.join(small_disk, 'disk.vdi')
    boot_disk(tmp_path, disk, WRITER, 64)
    api.createVM('writer', '', {'memory': 16, 'diskSize': 0})
    manage('storageattach', 'writer', '--storagectl', 'SATA', '--port', '0', '--type', 'hdd',
           '--medium', disk)
    after = host.last_event()
    fault_of(api.start, 'writer')
    assert 'disk is full' in host.wait_for_event('vm-trouble', 'writer', after, 60)['text']
    assert api.getState('writer') == 'Paused' and 'disk is full' in api.getVM('writer')['trouble']
    # At once, but where the guest gets too little of the processor to write meanwhile.
    code, text = wait_until(lambda: [each for each in [fault_of(api.resume, 'writer')]
                                     if 'disk is full' in str(each[1])], 60)[0]
    assert code == 4, text
    subprocess.check_call(['mount', '-o', 'remount,size=200m', small_disk])
    assert api.resume('writer') is True
    assert api.getVM('writer')['trouble'] == ''
    api.powerOff('writer')


@pytest.mark.parametrize('driver', ['VirtualBox', 'VBoxManage'])
def test_on_a_full_disk_a_vm_keeps_its_settings(home, remove_all, small_disk, tmp_path, driver):
    """VirtualBox would leave an empty file, and say that the snapshot is restored."""
    settings = dict(SETTINGS, state_dir=str(tmp_path), command_timeout=45)
    with opened(hosthypervisor.Hypervisor, driver, settings) as box:
        box.create_vm('full', '', dict(SMALL, folder=small_disk))
        box.start('full')
        box.take_snapshot('full', 'live')
        box.power_off('full')
        before = facts('full')
        fill(small_disk)
        for verb, args in (('restore_snapshot', ('live',)), ('take_snapshot', ('x',)),
                           ('delete_snapshot', ('live',)), ('start', ()),
                           ('set_limits', ({'cpuPercent': 50},))):
            with pytest.raises(faults.HypervisorError, match='full.vbox is full'):
                getattr(box, verb)('full', *args)
        with pytest.raises(faults.HypervisorError, match='full.vbox is full'):  # which is written, too
            box.create_vm('copy', os.path.join(small_disk, 'full', 'full.vdi'), {'memory': 16})
        os.remove(os.path.join(small_disk, 'filling'))
        now = facts('full')
        assert os.path.getsize(now['CfgFile'])
        assert sorted(set(now.items()) ^ set(before.items())) == []
        assert box.restore_snapshot('full', 'live') and box.start('full') and box.power_off('full')


@pytest.mark.parametrize('driver, verb', [('VirtualBox', 'power_off'), ('VBoxManage', 'power_off'),
                                          ('VBoxManage', 'end_process')])
def test_a_vm_stopped_on_a_full_disk_keeps_its_settings(home, remove_all, small_disk, tmp_path, driver, verb):
    """VirtualBox leaves an empty file; whoever asks it knows them still, until its server ends."""
    settings = dict(SETTINGS, state_dir=str(tmp_path), command_timeout=45)
    with opened(hosthypervisor.Hypervisor, driver, settings) as box:
        box.create_vm('full', '', dict(SMALL, folder=small_disk))
        box.start('full')
        path = os.path.join(small_disk, 'full', 'full.vbox')
        fill(small_disk)
        assert box._call(verb, ('full',)) is True
        text, = wait_until(lambda: [text for type, vm, text in box.happened if type == 'vm-trouble'])
        assert text == ('the disk of %s is full, and VirtualBox left nothing of the VM\'s settings: those of '
                        'before were put back; make room' % path)
        known = facts('full')
        kill(vboxsvc())                 # the next one knows what is in the file alone
        wait_until(lambda: not box.trouble() and box.known_state('full') == 'off', 60)
        os.remove(os.path.join(small_disk, 'filling'))
        now = facts('full')
        assert {key: now[key] for key in known if 'Change' not in key and key != 'VMState'} == {
            key: known[key] for key in known if 'Change' not in key and key != 'VMState'}
        assert box.start('full') and box.power_off('full')


def fill(folder):
    """Has the disk of this folder full, of a file `filling`."""
    with open(os.path.join(folder, 'filling'), 'wb', buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_who_switches_a_hung_vm_off_waits_for_nobody_who_hangs_in_it(api, host, vm):
    """Whoever waits for the answer is told, too."""
    told = []
    api.start(vm)
    with stopped(vm_process(facts(vm)['UUID'])), host.api as another:
        pausing = threading.Thread(target=lambda: told.append(fault_of(another.pause, vm)))
        pausing.start()
        wait_until(lambda: host.driver_pids('worker'))
        begun = time.monotonic()
        assert api.powerOff(vm) is True
        assert time.monotonic() - begun < 40          # 15 s of silence, and what a process takes to end
        pausing.join(20)
    code, text = told[0]               # 4: VirtualBox itself told it first that the VM's process ended
    assert code == 7 and ('switched off' in text or 'hangs' in text) or code == 4 and 'Aborted' in text, told
    assert api.getState(vm) == 'Aborted'


def test_what_hangs_hides_no_vm(api, host, vm):
    """VBoxSVC answers nobody for a while: what was seen last is told at once, of one VM as of all, and that
    it is so; or a fault says it."""
    uuid, version, states, network = api.getVM(vm)['uuid'], api.version(), api.states(), api.getNetwork()
    api.takeSnapshot(vm, 'known')
    assert api.listSnapshots(vm) == ['known'] and api.cleanup() == []      # after which all is known still
    with stopped(vboxsvc()):
        for seconds, ask in (
                (0.8, lambda: vm in api.listVMs()), (0.8, lambda: vm in str(api.getVMs())),
                (5, lambda: api.getVM(vm)['uuid'] == uuid), (0.8, lambda: api.getState(vm) == 'PoweredOff'),
                (0.8, lambda: api.listSnapshots(vm) == ['known']), (0.8, lambda: api.version() == version),
                (0.8, lambda: api.getNetwork() == network), (5, lambda: fault_of(api.cleanup)[0] == 7),
                (5, lambda: fault_of(api.getLog, vm)[0] == 7),     # which is never kept
                (0.8, lambda: 'has not answered for' in api.getVM(vm)['trouble']),
                (0.8, lambda: 'has not answered for' in api.agentInfo()['trouble'])):
            begun = time.monotonic()
            assert ask(), ask.__code__.co_names
            assert time.monotonic() - begun < seconds + 0.2 * others_take()
    wait_until(lambda: api.agentInfo()['trouble'] == '', 20)
    with stopped(vboxsvc()):           # anew: a process that looks, and hangs for 65 s, is replaced
        for ask in (lambda: api.states() == states, lambda: fault_of(api.getVM, 'nobody')[0] == 7,
                    lambda: fault_of(api.screenshot, vm)[0] == 7):
            begun = time.monotonic()
            assert ask() and time.monotonic() - begun < 5 + 0.2 * others_take()
    assert api.start(vm) is True
    assert api.agentInfo()['trouble'] == '' == api.getVM(vm)['trouble']


def test_a_vm_is_switched_off_while_virtualbox_hangs(api, host, vm):
    """By its process, which VBoxSVC would end in no other way."""
    assert api.start(vm) is True
    pid, after = vm_process(api.getVM(vm)['uuid']), host.last_event()
    assert pid
    with stopped(vboxsvc()):
        assert api.powerOff(vm) is True
        assert not command_line(pid)
        assert vm in api.listVMs() and 'has not answered for' in api.agentInfo()['trouble']
    text = host.wait_for_event('vm-trouble', vm, after)['text']
    assert text.startswith('its process was ended, since VirtualBox has not answered for'), text
    wait_until(lambda: fault_of(api.getState, vm) == (0, 'Aborted'), 60)
    assert api.start(vm) is True


@pytest.mark.parametrize('driver', ['VirtualBox', 'VBoxManage'])
def test_a_cut_image_makes_no_vm(home, remove_all, small_image, tmp_path, driver):
    """Whatever it is cut of."""
    settings = dict(SETTINGS, state_dir=str(tmp_path), command_timeout=45)
    with opened(hosthypervisor.Hypervisor, driver, settings) as box:
        before = box.list_vms()
        for path, size in cut(small_image, tmp_path):
            for options in ({}, {'linked': True}):
                if path.endswith('.ova') and (options or driver == 'VBoxManage'):
                    continue
                with pytest.raises(faults.VMHostError) as told:
                    box.create_vm('cut', path, options)
                text = str(told.value)
                assert path in text and re.search('(is cut|damaged)[ :,]', text), (size, text)
        assert box.list_vms() == before and (driver == 'VBoxManage' or box.cleanup() == [])


@pytest.fixture
def small_image(home, tmp_path):
    """A disk of 8 MB, all of which is written, and an appliance that holds it."""
    (tmp_path / 'raw').write_bytes(os.urandom(8 << 20))
    disk, appliance = str(tmp_path / 'whole.vdi'), str(tmp_path / 'whole.ova')
    manage('convertfromraw', str(tmp_path / 'raw'), disk)
    manage('createvm', '--name', 'whole', '--ostype', 'Linux_64', '--register')
    manage('storagectl', 'whole', '--name', 'SATA', '--add', 'sata')
    manage('storageattach', 'whole', '--storagectl', 'SATA', '--port', '0', '--type', 'hdd', '--medium', disk)
    manage('export', 'whole', '-o', appliance)
    manage('unregistervm', 'whole', '--delete')
    manage('convertfromraw', str(tmp_path / 'raw'), disk)
    return disk, appliance


def cut(images, tmp_path):
    """(path, bytes) of what is left of each of them."""
    for image in images:
        whole = open(image, 'rb').read()
        for part in (0.0, 0.00001, 0.3, 0.8):
            path = str(tmp_path / ('part-%g' % part)) + os.path.splitext(image)[1]
            with open(path, 'wb') as file:
                file.write(whole[:int(part * len(whole))])
            yield path, int(part * len(whole))
