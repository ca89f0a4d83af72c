"""What VBoxManage prints, read; where it is looked for; and what it is told that nobody else may see."""

import json
import os
import socket
import sys
import time
import types

import pytest
from helpers import wait_until
from test_hypervisor import opened
from vms import SETTINGS

import drivers
import hosthypervisor
import hypervisor
import vboxasking
import vboxconnection
import vboximages
import vboxmanage
import vboxnetwork
import vboxprogram
from faults import AlreadyExists, BadState, DeadlineExceeded, HypervisorError, InvalidParams, NoSuchVM

INFO = r'''name="b \"c\" \\"
memory=16
"SATA-0-0"="C:\\Users\\x.vdi"
VMState="poweroff"
 rec_screen0
description="x\"
VMState=\"running\"
y"
SnapshotName="a "quoted"\"
SnapshotUUID="1"
SnapshotDescription="two
lines, one="of"
SnapshotName-1="b"
SnapshotUUID-1="2"
VMState="paused"
CurrentSnapshotUUID="2"
'''


def test_what_a_vm_is():
    info = vboxprogram.read_info(INFO)
    assert (info['name'], info['memory'], info['SATA-0-0']) == ('b "c" \\', '16', 'C:\\Users\\x.vdi')
    assert info['VMState'] == 'poweroff' and info['description'] == 'x"\nVMState="running"\ny'
    assert vboxprogram.read_snapshots(info) == [
        {'name': 'a "quoted"\\', 'id': '1', 'parent': '', 'depth': 0, 'desc': 'two\nlines, one="of',
         'taken': 0, 'online': False, 'current': False},
        {'name': 'b', 'id': '2', 'parent': 'a "quoted"\\', 'depth': 1, 'desc': '', 'taken': 0,
         'online': False, 'current': True}]


def a_program(tmp_path, monkeypatch, text):
    """A VBoxManage that does this, first on the PATH."""
    path = tmp_path / 'VBoxManage'
    path.write_text('#!%s\nimport sys, time\n%s\n' % (sys.executable, text))
    path.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(vboxprogram.tempfile, 'tempdir', str(tmp_path))   # for turns
    return vboxprogram.Program(20)


@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
@pytest.mark.parametrize('text, code, told', [
    ('print("VBoxManage: error: Not now\\nVBoxManage: error: Details: code VBOX_E_X (0x80bb0007), component",'
     ' file=sys.stderr)', 0x80bb0007, 'Not now'),
    ('sys.exit("no library")', 0, 'no library'), ('sys.exit(3)', 0, 'ended with 3')])
def test_what_it_refuses(tmp_path, monkeypatch, text, code, told):
    with pytest.raises(vboxprogram.Refused, match=told) as refused:
        a_program(tmp_path, monkeypatch, text).run('list', 'vms')
    assert refused.value.code == code


@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
@pytest.mark.parametrize('text, is_refused', [
    ('print(sys.argv)', False), ('sys.exit("VBoxManage: error: VD: error VERR_EOF opening image")', True),
    ('sys.exit("VBoxManage: error: VD: error VERR_SHARING_VIOLATION opening image")', False),
    ('import os; os.abort()', True), ('sys.exit("VBoxManage: error: VERR_VD_VDI_INVALID_HEADER")', True)])
def test_a_disk_is_opened_by_a_process_that_may_die_of_it(tmp_path, monkeypatch, text, is_refused):
    image = str(tmp_path / 'image.vdi')
    a_program(tmp_path, monkeypatch, text)
    if is_refused:
        with pytest.raises(HypervisorError, match='image.vdi is cut or damaged'):
            vboxprogram.check_opens(image)
    else:
        vboxprogram.check_opens(image)


@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_one_that_hangs_is_ended(tmp_path, monkeypatch):
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        a_program(tmp_path, monkeypatch, 'time.sleep(100)').run('list', 'vms', patience=0.2)
    assert time.monotonic() - begun < 50


@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_a_secret_is_read_from_a_file_that_goes(tmp_path, monkeypatch):
    program = a_program(tmp_path, monkeypatch,
                        'path = sys.argv[1][1:]; import os\n'
                        'print(sys.argv, oct(os.stat(os.path.dirname(path)).st_mode)[-3:], path)\n'
                        'print(open(path).read())')
    told, secret = program.run('setextradata', 'uuid', 'key', 'string:se cret', secret=True).splitlines()
    assert secret == "setextradata uuid key 'string:se cret'"
    assert 'se cret' not in told and told.split()[-2] == '700' and not os.path.exists(told.split()[-1])


def test_where_windows_has_it(tmp_path, monkeypatch):
    """Never in the working folder."""
    monkeypatch.setattr(sys, 'platform', 'win32')
    for name in ('VBOX_MSI_INSTALL_PATH', 'VBOX_INSTALL_PATH', 'ProgramFiles'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'VBoxManage.exe').write_text('')
    with pytest.raises(HypervisorError, match='install VirtualBox'):
        vboxprogram.find_program()
    monkeypatch.setenv('VBOX_MSI_INSTALL_PATH', str(tmp_path))
    assert vboxprogram.find_program() == str(tmp_path / 'VBoxManage.exe')


def test_which_drivers_are_tried():
    assert drivers.names_of('auto') == drivers.names_of('VirtualBox') == ['VirtualBox', 'VBoxManage']
    assert drivers.names_of('VBoxManage') == ['VBoxManage'] and drivers.names_of('none') == []


ONE = '6f1c1b0e-3a5b-4c1d-9e2f-0123456789ab'
SCRIPT = r"""
import json
import os
saying = open(os.path.join(os.path.dirname(__file__), 'saying')).read()
if sys.argv[1] == '--version':
    print('7.2.4r1')
elif sys.argv[1:] == ['list', 'vms']:
    print('"one" {%(one)s}')
elif sys.argv[1] == 'showvminfo':
    if saying:
        sys.exit('VBoxManage: error: No\nVBoxManage: error: Details: code X (0x' + saying + '), component')
    print('name="one"\nUUID="%(one)s"\nCfgFile="/no/such"\nVMState="poweroff"')
""" % {'one': ONE}


@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
@pytest.mark.parametrize('code, still_there', [('80bb0007', True), ('80bb0001', False)])
def test_a_vm_of_which_virtualbox_says_no_has_not_gone(tmp_path, monkeypatch, code, still_there):
    """As where another program holds its lock: its agent would be taken for one that went with its VM."""
    (tmp_path / 'saying').write_text('')
    a_program(tmp_path, monkeypatch, SCRIPT)
    driver = vboxmanage.VBoxManage(dict(SETTINGS, command_timeout=20))
    driver.connect()
    seen = driver.machines(None)
    assert [(row['name'], row['native']) for row in seen] == [('one', 'PoweredOff')]
    (tmp_path / 'saying').write_text(code)
    assert driver.machines(None) == (seen if still_there else [])


NOBODIES = r"""
words = sys.argv[1:]
if words[0] == '--version':
    print('7.2.4r1')
elif words == ['list', 'vms', '--long']:
    print('UUID:            %(two)s\nConfig file:     /no/torn.vbox')
    sys.exit('VBoxManage: error: no')
elif words == ['list', 'vms']:
    print('"<inaccessible>" {%(two)s}\n"<inaccessible>" {%(one)s}')
elif words[:2] == ['showvminfo', '%(two)s']:
    sys.exit('VBoxManage: error: The object functionality is limited')
elif words[0] == 'showvminfo':
    print('name="<inaccessible>"\nUUID="%(one)s"\nCfgFile="/no/one.vbox"\nVMState="poweroff"')
elif words[0] == 'unregistervm':
    open(__file__ + '.done', 'a').write(' '.join(words) + '\n')
""" % {'one': ONE, 'two': ONE.replace('6', '7')}


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_a_vm_may_have_the_name_of_those_that_can_not_be_read(tmp_path, monkeypatch):
    """VBoxManage lists both alike."""
    a_program(tmp_path, monkeypatch, NOBODIES)
    driver = vboxmanage.VBoxManage(dict(SETTINGS, command_timeout=20))
    driver.connect()
    job = hypervisor.Job({'verb': 'remove_vm'}, 20, lambda message: None)
    for _ in range(2):
        assert [(row['name'], row['state']) for row in driver.machines(job)] == [
            ('torn', 'inaccessible'), ('<inaccessible>', 'off')]
    for name in ('<inaccessible>', 'torn'):
        with pytest.raises(AlreadyExists):
            driver.create_vm(job, name, '', {})
    assert driver.remove_vm(job, '<inaccessible>', True) == [] == driver.remove_vm(job, 'torn', True)
    assert (tmp_path / 'VBoxManage.done').read_text().splitlines() == [
        'unregistervm %s --delete' % ONE, 'unregistervm ' + ONE.replace('6', '7')]


TAKEN = r"""
words = sys.argv[1:]
if words[0] == '--version':
    print('7.2.4r1')
elif words[0] == 'createvm':
    print("VBoxManage: error: Machine settings file '/no/_/_.vbox' already exists", file=sys.stderr)
    print('VBoxManage: error: Details: code VBOX_E_FILE_ERROR (0x80bb0004), component', file=sys.stderr)
    sys.exit(1)
elif words == ['list', 'vms']:
    print('"?" {%(one)s}' if 'listed' in __file__ else '')
elif words[0] == 'showvminfo':
    print('name="?"\nUUID="%(one)s"\nCfgFile="/no/_/_.vbox"\nLogFldr="/no"\nVMState="poweroff"')
""" % {'one': 36 * 'a'}


@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
@pytest.mark.parametrize('folder, whose', [
    ('listed', "the VM '?'"), ('other', vboximages.NOT_REGISTERED)])
def test_whose_settings_are_in_the_way_is_told(tmp_path, monkeypatch, folder, whose):
    """VMs of different names may have the same folder."""
    (tmp_path / folder).mkdir()
    a_program(tmp_path / folder, monkeypatch, TAKEN)
    driver = vboxmanage.VBoxManage(dict(SETTINGS, command_timeout=20))
    driver.connect()
    job = hypervisor.Job({'verb': 'create_vm'}, 20, lambda message: None)
    with pytest.raises(AlreadyExists) as told:
        driver.create_vm(job, '*', '', {'ostype': ''})
    assert str(told.value).endswith("'/no/_/_.vbox' already exists, of " + whose), told.value


FORWARDING = r"""
import json, os
path = os.path.join(os.path.dirname(__file__), 'vm.json')
vm = json.load(open(path)) if os.path.exists(path) else {}
before = json.dumps(vm)
words = sys.argv[1:]
with open(path + '.calls', 'a') as calls:
    calls.write(' '.join(words) + '\n')
if words[0] == '--version':
    print('7.2.4r1')
elif os.path.exists(path + '.no-server'):
    sys.exit('VBoxManage: error: No')
elif words[0] == 'createvm':
    vm = {'state': 'poweroff', 'rules': [], 'marks': {}, 'bridge': ''}
    print('Virtual machine is created and registered.\nUUID: %(one)s')
elif vm and (words == ['list', 'vms'] or
             words == ['list', 'runningvms'] and vm['state'] in ('running', 'paused')):
    print('"one" {%(one)s}')
elif words[0] == 'unregistervm':
    vm = {}
elif os.path.exists(path + '.hangs') and words[0] == 'showvminfo':
    import time
    time.sleep(60)
elif os.path.exists(path + '.gone') and words[0] == 'showvminfo':
    sys.exit('VBoxManage: error: Could not find a registered machine with UUID {%(one)s}\n'
             'VBoxManage: error: Details: code VBOX_E_OBJECT_NOT_FOUND (0x80bb0001), component')
elif os.path.exists(path + '.dies') and words[0] == 'setextradata' and words[1] != 'global':
    os.remove(path + '.dies')
    sys.exit('VBoxManage: error: Code NS_ERROR_ABORT (0x80004004) - Operation aborted '
             '(extended info not available)')
elif words[0] == 'showvminfo':
    print('name="one"\nUUID="%(one)s"\nCfgFile="/no/one.vbox"\nLogFldr="/no"\nfirmware="BIOS"\nmemory=4')
    print('cpus=1\nostype="Linux"\nnic1="nat"\nmacaddress1="080027000001"\nVMState="%%s"' %% vm['state'])
    if vm['bridge']:
        print('nic2="bridged"\nbridgeadapter2="%%s"\nmacaddress2="080027000002"' %% vm['bridge'])
    for number, rule in enumerate(vm['rules']):
        print('Forwarding(%%d)="%%s"' %% (number, rule))
elif words == ['list', 'bridgedifs']:
    print(open(os.path.join(os.path.dirname(__file__), 'interfaces')).read())
elif words[0] == 'modifyvm':
    vm['bridge'] = ''.join(word[len('--bridgeadapter2='):] for word in words
                           if word.startswith('--bridgeadapter2=')) or vm['bridge']
    while '--natpf1' in words:
        words = words[words.index('--natpf1') + 1:]
        if words[0] == 'delete':
            left = [rule for rule in vm['rules'] if rule.split(',')[0] != words[1]]
            assert len(left) == len(vm['rules']) - 1
            vm['rules'] = left
        else:
            assert words[0].split(',')[0] not in [rule.split(',')[0] for rule in vm['rules']]
            vm['rules'].append(words[0])
elif words[0] == 'setextradata' and words[1] != 'global':
    marks = vm.setdefault('marks', {})
    if words[3:]:
        marks[words[2]] = words[3]
    elif os.path.exists(path + '.keeps'):
        os.remove(path + '.keeps')
    else:
        marks.pop(words[2], None)
elif words[0] == 'getextradata':
    for pair in vm.get('marks', {}).items():
        print('Key: %%s, Value: %%s' %% pair)
elif words[0] == 'clonemedium':
    sys.exit('VBoxManage: error: Could not get the storage format of the medium (VERR_NOT_SUPPORTED)')
elif words[0] == 'startvm' and os.path.exists(path + '.cut'):
    sys.exit('VBoxManage: error: The VM session was closed before any attempt to power it on')
elif words[0] == 'startvm':
    vm['state'] = 'running'
elif words[0] == 'controlvm':
    vm['state'] = {'savestate': 'saved', 'poweroff': 'poweroff', 'reset': 'aborted',
                   'pause': 'paused'}[words[2]]
if json.dumps(vm) != before:            # others run beside this one
    with open(path + '.new', 'w') as file:
        json.dump(vm, file)
    os.replace(path + '.new', path)
""" % {'one': ONE}


@pytest.fixture
def one(tmp_path, monkeypatch):
    """Calls a verb on a VBoxManage that knows one VM, `one`, and its rules of NAT."""
    a_program(tmp_path, monkeypatch, FORWARDING)
    monkeypatch.setattr(vboxmanage.uuid_of, 'uuid4', lambda: ONE)
    driver = vboxmanage.VBoxManage(dict(SETTINGS, command_timeout=20))
    driver.connect()

    def call(verb, *args, timeout=20):
        driver._program._timeout = timeout
        job = hypervisor.Job({'verb': verb, 'args': args}, 20, lambda told: None)
        return driver.find_verb(verb)(job, *args)
    call.translate = driver.translate
    return call


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
@pytest.mark.parametrize('verb', ['power_off', 'save_state'])
def test_ports_of_a_guest_are_reached_here(one, verb):
    """And where another program takes one while the VM doesn't run, by another one."""
    one('create_vm', 'one', '', {'diskSize': 0, 'forwards': [
        {'guestPort': 80}, {'guestPort': 22, 'isRemote': True}]})
    first, second = one('describe', 'one')['forwards']
    assert (first['guestPort'], first['isRemote'], second['guestPort'], second['isRemote']) == (
        80, False, 22, True)
    assert one('start', 'one') and one('describe', 'one')['forwards'] == [first, second]
    assert one(verb, 'one')
    with socket.socket() as other:
        other.bind(('127.0.0.1', first['hostPort']))
        other.listen(1)
        assert one('start', 'one')
    moved = one('describe', 'one')['forwards']
    assert moved == [dict(first, hostPort=moved[0]['hostPort']), second]
    assert moved[0]['hostPort'] not in (first['hostPort'], second['hostPort'])


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_what_to_do_where_the_saved_state_is_cut(one, tmp_path):
    one('create_vm', 'one', '', {'diskSize': 0})
    assert one('start', 'one') and one('save_state', 'one')
    (tmp_path / 'vm.json.cut').write_text('')
    with pytest.raises(vboxprogram.Refused, match='closed before.*discardState .discard. gives it up'):
        one('start', 'one')


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_no_vm_that_was_made_keeps_the_mark_of_one_in_the_making(one, tmp_path):
    """For which `cleanup` would take it away: VirtualBox was seen to keep it, though it says yes."""
    (tmp_path / 'vm.json.keeps').write_text('')
    one('create_vm', 'one', '', {'diskSize': 0})
    assert json.loads((tmp_path / 'vm.json').read_text())['marks'] == {vboxmanage.MADE_BY_US: ONE}
    assert not (tmp_path / 'vm.json.keeps').exists()


@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_a_vm_whose_process_ends_under_a_verb_is_told_at_once(one):
    one('create_vm', 'one', '', {'diskSize': 0})
    assert one('start', 'one')
    with pytest.raises(HypervisorError, match='one is Aborted, and not Running.*getLog'):
        one('reset', 'one')


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_a_forward_of_a_port_that_was_asked_for_stays_there(one):
    with socket.socket() as other:
        other.bind(('127.0.0.1', 0))
        other.listen(1)
        port = other.getsockname()[1]
        one('create_vm', 'one', '', {'diskSize': 0, 'forwards': [{'guestPort': 80, 'hostPort': port}]})
        with pytest.raises(BadState, match='another program listens on port %d' % port):
            one('start', 'one')
    assert one('start', 'one')


def interfaces(tmp_path, *rows):
    text = ''.join('Name:            %s\nGUID:            0\nDHCP:            Disabled\n'
                   'IPAddress:       %s\nNetworkMask:     255.255.255.0\nStatus:          Up\n'
                   'VBoxNetworkName: HostInterfaceNetworking-%s\n\n' % (name, address, name)
                   for name, address in rows)
    (tmp_path / 'interfaces').write_text(text)


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
@pytest.mark.parametrize('verb', ['power_off', 'save_state'])
def test_a_card_in_the_network_of_this_machine(one, tmp_path, monkeypatch, verb):
    """Which follows the default route, or stays at the interface that was named."""
    eths = ('eth 0', '192.0.2.7'), ('eth1', '198.51.100.7')
    interfaces(tmp_path, *eths)
    monkeypatch.setattr(vboxnetwork, 'address_outwards', lambda: '192.0.2.7')
    with pytest.raises(InvalidParams, match='^bridged: no interface eth7; there are: eth 0, eth1'):
        one('create_vm', 'one', '', {'diskSize': 0, 'bridged': 'eth7'})
    one('create_vm', 'one', '', {'diskSize': 0, 'bridged': 'auto'})
    assert (one('describe', 'one')['bridged'], one('describe', 'one')['id']) == ('eth 0', '08:00:27:00:00:01')
    monkeypatch.setattr(vboxnetwork, 'address_outwards', lambda: '198.51.100.7')
    assert one('start', 'one') and one('describe', 'one')['bridged'] == 'eth1' and one(verb, 'one')
    interfaces(tmp_path, eths[0])
    with pytest.raises(BadState, match='one can\'t start: bridged: no interface eth1; there are: eth 0'):
        one('start', 'one')
    monkeypatch.setattr(vboxnetwork, 'address_outwards', lambda: '')
    interfaces(tmp_path, *eths)
    assert one('start', 'one') and one('describe', 'one')['bridged'] == 'eth1'


@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_an_image_that_is_none_is_told_to_be_so(one, tmp_path):
    (tmp_path / 'image.vdi').write_text('')
    with pytest.raises(HypervisorError, match='image.vdi: it is damaged, .*VERR_NOT_SUPPORTED'):
        one('create_vm', 'one', str(tmp_path / 'image.vdi'), {})


@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_only_nat_forwards_ports(one):
    with pytest.raises(InvalidParams, match='^forwards: expected network=nat'):
        one('create_vm', 'one', '', {'network': 'hostonly', 'forwards': [{'guestPort': 80}]})


STARTS_LATE = r"""
import json
import os
path = os.path.join(os.path.dirname(__file__), 'asked')
with open(path, 'a') as file:
    file.write(sys.argv[1] + ' ')
if sys.argv[1] == 'list' and open(path).read().count('list') < 3:
    sys.exit('VBoxManage: error: ' + %r)
print('7.2.4r1')
"""


@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
@pytest.mark.parametrize('told', ['Failed to create the VirtualBox object!',
                                  'Failed to assign the machine to the session (E_ACCESSDENIED)',
                                  "The machine 'vm' was unlocked unexpectedly while attempting to share its "
                                  "session"])
def test_what_just_ends_is_asked_again(tmp_path, monkeypatch, told):
    a_program(tmp_path, monkeypatch, STARTS_LATE % told)
    vboxmanage.VBoxManage(dict(SETTINGS, command_timeout=20)).connect()
    assert (tmp_path / 'asked').read_text() == '--version list list list '


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_a_refusal_that_comes_late_is_asked_again_too(tmp_path, monkeypatch):
    """On a busy machine one takes longer than what it tells may last."""
    monkeypatch.setitem(vboxprogram.PASSING, 'not ready', 0.001)
    a_program(tmp_path, monkeypatch, """
import os
path = os.path.join(os.path.dirname(__file__), 'asked')
if not os.path.exists(path):
    open(path, 'w').close()
    sys.exit('VBoxManage: error: The object is not ready')
print('well')
""")
    assert vboxprogram.Program(20).run('startvm', 'x') == 'well\n'


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
@pytest.mark.parametrize('vm', ['u-1', 'u-2'])
def test_what_was_refused_and_is_done_nevertheless_is_done(tmp_path, monkeypatch, vm):
    """But for a disk that another VM has."""
    a_program(tmp_path, monkeypatch, """
import os
path = os.path.join(os.path.dirname(__file__), 'asked')
if os.path.exists(path):
    sys.exit('VBoxManage: error: medium is already associated with the current state of machine uuid {u-1}!')
open(path, 'w').close()
sys.exit('VBoxManage: error: The session is not locked')
""")
    program = vboxprogram.Program(20)
    if vm == 'u-1':
        assert program.run('storageattach', vm, '--medium', 'disk') == ''
    else:
        with pytest.raises(vboxprogram.Refused, match='already associated'):
            program.run('storageattach', vm, '--medium', 'disk')


@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_a_version_is_a_sign_that_virtualbox_answers(one, tmp_path):
    """Who ends a VM by force, and hears nothing, asks for it: the VM hangs, or VirtualBox does."""
    assert one('version') == '7.2.4'
    (tmp_path / 'vm.json.no-server').write_text('')
    with pytest.raises(vboxprogram.Refused):
        one('version')


def test_no_text_of_a_snapshot_is_another_snapshot(tmp_path):
    """VBoxManage tells names and descriptions as they are."""
    text = ('CfgFile="%s"\nVMState="poweroff"\nSnapshotName="a "q"\nb"\nSnapshotUUID="1"\n'
            'SnapshotDescription="x"\nSnapshotName-2="none"\nSnapshotName-1="not b"\nSnapshotUUID-1="3"\n'
            'SnapshotName-7="no"\nSnapshotUUID-7="7"\n"\n'
            'SnapshotName-1="b"\nSnapshotUUID-1="2"\nCurrentSnapshotUUID="2"\n')
    found = vboxprogram.read_snapshots(vboxprogram.read_info(text % '/no/such'))
    assert [row['id'] for row in found] == ['1', '2', '7']
    (tmp_path / 'one.vbox').write_text(
        '<Snapshot uuid="{1}" name="a"><Snapshot name="b" uuid="{2}"/></Snapshot>')
    found = vboxprogram.read_snapshots(vboxprogram.read_info(text % (tmp_path / 'one.vbox')))
    assert [(row['name'], row['id'], row['depth']) for row in found] == [('a "q"\nb', '1', 0), ('b', '2', 1)]


@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_a_vm_named_like_anothers_uuid_is_not_that_one(tmp_path, monkeypatch):
    other = ONE.replace('6', '7')
    listed = 'print(\'"one" {%s}\')' % ONE
    assert listed in SCRIPT
    a_program(tmp_path, monkeypatch, SCRIPT.replace(
        listed, 'print(\'"%s" {%s}\\n"one" {%s}\')' % (ONE, other, ONE)))
    (tmp_path / 'saying').write_text('')
    driver = vboxmanage.VBoxManage(dict(SETTINGS, command_timeout=20))
    driver.connect()
    for verb in ('describe', 'remove_vm'):
        job = hypervisor.Job({'verb': verb, 'args': [ONE]}, 20, lambda told: None)
        assert driver._find(job, other) == other
        with pytest.raises(BadState, match='^%s is the name of a VM, and the uuid of one: use' % ONE):
            driver._find(job, ONE)


def calls(tmp_path, *first):
    """What VBoxManage was told since, of the calls that begin so."""
    return [line for line in (tmp_path / 'vm.json.calls').read_text().splitlines()
            if line.split()[:len(first)] == list(first)]


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_an_image_that_is_no_good_is_forgotten(one, tmp_path):
    """VirtualBox remembers it, and then takes no good copy of it."""
    image = tmp_path / 'image.vdi'
    image.write_text('')
    with pytest.raises(HypervisorError, match='image.vdi'):
        one('create_vm', 'one', str(image), {})
    assert calls(tmp_path, 'closemedium', 'disk', str(image)) == ['closemedium disk %s' % image]


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_a_vm_that_could_not_be_made_is_taken_back(one, tmp_path):
    """Whatever step VirtualBox refuses, or dies of; the words are for a person."""
    (tmp_path / 'vm.json.dies').write_text('')
    with pytest.raises(vboxprogram.Refused) as told:
        one('create_vm', 'one', '', {'diskSize': 0})
    assert str(vboxconnection.fault_of(told.value.code, str(told.value))) == (
        'Operation aborted -- the VM\'s process ended meanwhile, or VirtualBox did')
    assert json.loads((tmp_path / 'vm.json').read_text()) == {}
    assert calls(tmp_path, 'setextradata', 'global', vboximages.MAKES + ONE)[-1].split()[3:] == []


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_a_vm_whose_settings_find_no_room_is_taken_back(one, tmp_path, monkeypatch):
    """VirtualBox says that all went well, and leaves an empty .vbox file."""
    monkeypatch.setattr(vboxconnection.shutil, 'disk_usage', lambda folder: types.SimpleNamespace(free=0))
    with pytest.raises(HypervisorError, match='^one: the disk of /no/one.vbox is full'):
        one('create_vm', 'one', '', {'diskSize': 0})
    assert json.loads((tmp_path / 'vm.json').read_text()) == {}


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_a_vm_that_hung_is_asked_again_by_whoever_has_heard_of_it(one, tmp_path, monkeypatch):
    monkeypatch.setattr(vboxasking, 'ANSWERS_IN', 1)
    one('create_vm', 'one', '', {'diskSize': 0})
    assert one('start', 'one') and one('describe', 'one')['trouble'] == ''
    (tmp_path / 'vm.json.hangs').write_text('')
    assert one('describe', 'one')['trouble'] == hypervisor.HANGS
    (tmp_path / 'vm.json.hangs').unlink()
    assert one('describe', 'one')['trouble'] == hypervisor.HANGS
    assert one('describe_changed', 'one')['trouble'] == ''


# For so many seconds, at what its second word says; leaves a file where another one did so, too.
LOOKS_AT = """
import os
here = os.path.join(os.path.dirname(__file__), sys.argv[2])
if os.path.exists(here):
    open(here + '.two', 'w')
open(here, 'w')
time.sleep(%g)
os.remove(here)
"""


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_those_who_look_at_one_vm_take_turns(tmp_path, monkeypatch):
    """VirtualBox's server dies of two that look at one VM that is off, and all VMs with it."""
    program = a_program(tmp_path, monkeypatch, LOOKS_AT % 0.1)
    looks = []
    for words in (('showvminfo', 'a'), ('list', 'a', '--long'), ('showvminfo', 'b'), ('showvminfo', 'a')):
        looks.append(os.fork())
        if not looks[-1]:
            program.run(*words)
            os._exit(0)
    assert [os.waitpid(look, 0)[1] for look in looks] == [0, 0, 0, 0]
    assert not (tmp_path / 'a.two').exists()


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
@pytest.mark.parametrize('words', [('showvminfo', 'a'), ('list', 'a', '--long')])
def test_a_question_within_another_one_waits_for_its_look_at_the_vm(tmp_path, monkeypatch, words):
    """Both are one process's, which no lock keeps apart."""
    program, nested = a_program(tmp_path, monkeypatch, LOOKS_AT % 0.4), []

    def rest(moved):
        if (tmp_path / 'a').exists() and not nested:
            nested.append(words)
            program.run(*words)
    program.rest = rest
    assert program.run('showvminfo', 'a') == '' and nested
    assert not (tmp_path / 'a.two').exists()


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_one_that_looks_at_a_vm_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(vboxprogram, 'LONGEST_TURN', 0.2)
    program = a_program(tmp_path, monkeypatch, 'print("well")')
    taken, other = os.pipe()
    looks = os.fork()
    if not looks:
        os.write(other, str(vboxprogram.take_turn(vboxprogram.open_turns(), 'a')).encode())
        time.sleep(60)
        os._exit(0)
    try:
        assert os.read(taken, 9) == b'True' and program.run('showvminfo', 'a') == 'well\n'
    finally:
        os.kill(looks, 9)
        os.waitpid(looks, 0)
        os.close(taken)
        os.close(other)


def test_another_tools_rules_may_have_any_name():
    ours = 'vmhost-forward-0,tcp,127.0.0.1,2000,,22'
    assert vboxprogram.rules_in({'Forwarding(0)': 'a', 'Forwarding(1)': ours}) == [ours.split(',')]


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_a_vm_whose_process_hangs_is_told_to_whoever_changes_it(one, tmp_path):
    """And not that VBoxManage didn't answer, which leads nowhere."""
    one('create_vm', 'one', '', {'diskSize': 0})
    (tmp_path / 'vm.json.hangs').write_text('')
    with pytest.raises(DeadlineExceeded, match='^one: its process does not answer; powerOff'):
        one('take_snapshot', 'one', 'x', timeout=1)


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
@pytest.mark.parametrize('verb, args', [('pause', ()), ('set_limits', ({'cpuPercent': 50},))])
def test_a_vm_whose_process_hangs_is_told_so_before_the_timeout(one, tmp_path, monkeypatch, verb, args):
    """But where it doesn't run: then it is the machine that takes its time."""
    monkeypatch.setattr(vboxasking, 'SURELY_ANSWERS_IN', 0.2)
    monkeypatch.setattr(vboxasking, 'MUCH_LONGER', 1)
    one('create_vm', 'one', '', {'diskSize': 0})
    hangs = tmp_path / 'vm.json.hangs'
    hangs.write_text('')
    with pytest.raises(DeadlineExceeded, match='VBoxManage did not answer|its process does not'):
        one(verb, 'one', *args, timeout=1.5)
    hangs.unlink()
    assert one('start', 'one') is True
    hangs.write_text('')
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded, match='^one: its process does not answer; powerOff'):
        one(verb, 'one', *args, timeout=60)
    assert time.monotonic() - begun < 20


@pytest.mark.once
@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_a_vm_that_hung_a_moment_ago_is_told_as_it_was_changed(tmp_path, monkeypatch):
    """And not as it was before, until it is asked again: its process answered whoever changed it."""
    a_program(tmp_path, monkeypatch, FORWARDING)
    settings = dict(SETTINGS, state_dir=str(tmp_path), command_timeout=20)
    with opened(hosthypervisor.Hypervisor, 'VBoxManage', settings) as box:
        (tmp_path / 'vm.json').write_text(json.dumps({'state': 'running', 'rules': [], 'bridge': ''}))
        wait_until(lambda: box.known_native('one') == 'Running')
        (tmp_path / 'vm.json.hangs').write_text('')
        wait_until(lambda: box.describe('one')['trouble'] == hypervisor.HANGS, 30)
        (tmp_path / 'vm.json.hangs').unlink()
        assert box.pause('one') is True and box.state('one') == 'Paused'
        wait_until(lambda: box.describe('one')['trouble'] == '')


@pytest.mark.skipif(os.name == 'nt', reason='runs a script')
def test_a_vm_that_somebody_removes_meanwhile_is_told_by_its_name(one, tmp_path):
    one('create_vm', 'one', '', {'diskSize': 0})
    (tmp_path / 'vm.json.gone').write_text('')
    with pytest.raises(vboxprogram.Refused) as told:
        one('start', 'one')
    fault = one.translate(told.value)
    assert isinstance(fault, NoSuchVM) and str(fault) == 'one is gone: somebody removed it meanwhile'


def test_a_full_disk_is_named():
    told = "Could not create the clone medium '/srv/a b/x.vdi' (VERR_DISK_FULL)"
    assert str(vboxconnection.fault_of(0, told)) == told + ' -- the disk of /srv/a b/x.vdi is full: make room'


@pytest.mark.once
@pytest.mark.skipif(os.name != 'posix', reason='runs a script, which ends by a signal')
@pytest.mark.parametrize('word', ['showvminfo', 'startvm'])
def test_one_that_crashes_while_it_only_looks_is_asked_again(tmp_path, monkeypatch, word):
    a_program(tmp_path, monkeypatch, """
import os
path = os.path.join(os.path.dirname(__file__), 'asked')
open(path, 'a').write('.')
if os.path.getsize(path) < 3:
    os.kill(os.getpid(), 11)
print('well')
""")
    program = vboxprogram.Program(20)
    if word == 'showvminfo':
        assert program.run(word, 'x') == 'well\n'
    else:
        with pytest.raises(vboxprogram.Refused, match='ended with -11'):
            program.run(word, 'x')
