"""The command line on the real VirtualBox: each verb's words, exit code and effect, and how it says no."""

import json
import os
import re

import pytest
from helpers import others_take, wait_until
from rig import AS_VBOXMANAGE_SAYS, facts, manage, slowed, vboxsvc
from terminals import Terminal

VM = 'told'
HELD_UP = r'vmhost: VirtualBox (has not answered for|takes its time).*VMs are told as they were seen .*\n'
LIFE = [                        # a verb, what it says, and the state in which it leaves the VM
    (['create', VM, '--memory', '16', '--cpus', '2', '--disk', '4', '--network', 'nat'], VM, 'PoweredOff'),
    (['snap', 'take', VM, 'base'], 'snapshot taken', 'PoweredOff'),
    (['start', VM], VM + ' is running', 'Running'),
    (['reset', VM], VM + ' is reset', 'Running'),
    (['snap', 'take', VM, 'live'], 'snapshot taken', 'Running'),
    (['snap', 'ls', VM], 'base\nlive', 'Running'),
    (['pause', VM], VM + ' is paused', 'Paused'),
    (['resume', VM], VM + ' is running', 'Running'),
    (['save', 'tol*'], VM + ' is saved', 'Saved'),
    (['start', VM], VM + ' is running', 'Running'),
    (['stop', '--force', VM], VM + ' is off', 'PoweredOff'),
    (['snap', 'restore', VM], 'snapshot restored', 'Saved'),
    (['discard', VM], VM + ' is off', 'PoweredOff'),
    (['snap', 'rm', VM, 'live'], 'snapshot deleted', 'PoweredOff'),
    (['snap', 'restore', VM, 'base'], 'snapshot restored', 'PoweredOff'),
    (['rm', VM, '--disks'], VM + ' removed', None),
]
NOT_NOW = {                     # what the VM's states don't allow
    'PoweredOff': [['stop', VM], ['stop', '--force', VM], ['pause', VM], ['resume', VM], ['save', VM],
                   ['reset', VM], ['call', 'discardState', VM], ['call', '-r', 'screenshot', VM]],
    'Running': [['start', VM], ['resume', VM], ['rm', VM], ['snap', 'restore', VM]],
    'Paused': [['start', VM], ['pause', VM], ['reset', VM], ['stop', VM]],
    'Saved': [['pause', VM], ['stop', VM], ['stop', '--force', VM]],
}
NOBODY = [[verb, 'nobody'] for verb in (
    'start', 'stop', 'pause', 'resume', 'save', 'reset', 'rm', 'rdp', 'info', 'ping')]
NOBODY += [['snap', 'ls', 'nobody'], ['snap', 'take', 'nobody', 'x'], ['snap', 'restore', 'nobody'],
           ['snap', 'rm', 'nobody', 'x'], ['put', 'nobody', __file__], ['get', 'nobody', 'x'],
           ['run', 'nobody', '--', 'true'], ['start', 'nobody*']]
NOBODY += [['call', method, 'nobody'] for method in ('screenshot', 'getLog', 'getStats', 'discardState')]


def said(host, *words):
    """A verb's exit code, and what it printed where."""
    done = host.verb(*words)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def told(host, *words):
    """What a verb printed; it does what it should. Where others' work holds VirtualBox up, it says that."""
    code, out, err = said(host, *words)
    assert code == 0 and (not err or others_take() > 1 and re.fullmatch(HELD_UP, err)), (words, out, err)
    return out


def refusal(host, *words, code=1):
    """The one sentence with which a verb says no."""
    found, out, err = said(host, *words)
    assert (found, out) == (code, ''), (words, out, err)
    assert re.match(r'vmhost: [^\n]{10,400}\n\Z', err), (words, err)
    assert 'Traceback' not in err, err
    return err[len('vmhost: '):]


@pytest.fixture
def small(host, remove_all):
    """A VM that runs, with nothing to boot."""
    told(host, 'create', VM, '--memory', '16', '--disk', '4')
    told(host, 'start', VM)
    return VM


def test_the_life_of_a_vm(host, remove_all):
    """Each verb says what it did, in each state the others say why not, and VBoxManage sees the same."""
    refused = set()
    for words, answer, state in LIFE:
        assert told(host, *words) == answer + '\n', words
        if state is None:
            break
        assert facts(VM)['VMState'] == AS_VBOXMANAGE_SAYS[state], words
        if state in refused:
            continue
        refused.add(state)
        assert re.search(r'(?m)^%s +%s +never +- +0$' % (VM, state), told(host, 'ls'))
        for no in NOT_NOW[state]:
            assert re.match(r'told is %s; .* needs it to be ' % state, refusal(host, *no)), no
    assert VM not in manage('list', 'vms') and VM not in told(host, 'ls')
    assert refused == set(NOT_NOW)


@pytest.mark.parametrize('words', NOBODY, ids=' '.join)
def test_an_unknown_vm(host, words):
    assert 'nobody' in refusal(host, *words, code=255 if words[0] == 'run' else 1)


def test_mistakes_about_vms_disks_and_snapshots(host, small, tmp_path):
    (tmp_path / 'torn.ova').write_bytes(b'x' * 1000)
    (tmp_path / 'image.txt').write_text('')
    for words, why in [
            (['create', VM], 'there is a VM'), (['create', 'new', '/no/such.ova'], 'no such image file'),
            (['create', 'a/b'], 'is no name'), (['create', '/no/such.vbox'], 'no such file'),
            (['create', 'new', str(tmp_path / 'torn.ova')], 'is cut or damaged'),
            (['create', 'new', str(tmp_path / 'image.txt')], 'an image is'),
            (['create', 'new', '--ostype', 'Plan9_65'], 'knows no ostype'),
            (['create', 'new', '--memory', '1'], 'whole number from 4'),
            (['snap', 'restore', VM, 'x'], 'needs it to be'), (['snap', 'rm', VM, 'x'], 'has no snapshot'),
            (['snap', 'rm', VM], 'no snapshot named'), (['snap', 'take', VM], 'no snapshot named'),
            (['call', 'setLimits', VM, '{"cpuPercent": 0}'], '1 to 100'),
            (['call', 'setLimits', VM, '{"cpuPercent": '], 'not valid JSON'),
            (['run', VM, '--', 'true'], 'agent'), (['ping', VM], 'agent'), (['get', VM, 'x'], 'agent')]:
        assert why in refusal(host, *words, code=255 if words[0] == 'run' else 1), words
    assert 'new' not in told(host, 'ls')
    assert json.loads(told(host, 'info', VM, '--json'))['state'] == 'Running'


def test_looking_at_a_vm(host, small, tmp_path):
    row, = [vm for vm in json.loads(told(host, 'ls', '--json')) if vm['name'] == VM]
    alone = json.loads(told(host, 'info', VM, '--json'))
    assert row == {key: alone[key] for key in alone if key not in ('rdp', 'pid', 'forwards', 'bridged')}
    assert (row['state'], row['agent'], row['uuid']) == ('Running', 'never', facts(VM)['UUID'])
    assert row['id'].replace(':', '') == facts(VM)['macaddress1'] and row['id'] in told(host, 'ls', '-l')
    assert re.search(r'(?m)^state +Running$', told(host, 'info', row['id']))
    png = host.verb('call', '-r', 'screenshot', VM)
    assert (png.returncode, png.stdout[:8]) == (0, b'\x89PNG\r\n\x1a\n') and png.stdout[-8:-4] == b'IEND'
    assert 'VirtualBox VM' in told(host, 'call', '-r', 'getLog', VM, '1000000')
    stats = json.loads(told(host, 'call', 'getStats', VM, 'RAM/*'))
    assert [row['name'] for row in stats] == ['RAM/Usage/Used']
    assert told(host, 'call', 'setLimits', VM, '{"cpuPercent": 50}') == 'true\n'
    assert facts(VM)['cpuexecutioncap'] == '50'
    desktop = told(host, 'rdp', VM)
    where, password = desktop.splitlines()
    assert where == '127.0.0.1:%s (authentication password, security none)' % facts(VM)['vrdeports']
    assert re.match(r'password: \w{8} \(shown once\)$', password)
    assert json.loads(told(host, 'rdp', VM, '--json'))['enabled'] is True
    assert told(host, 'rdp', VM, '--off') == 'off\n' and facts(VM)['vrde'] == 'off'
    assert re.search(r'vm-state +told Running\n', told(host, 'events'))


def test_looking_at_the_hypervisor(host, remove_all):
    assert re.match(r'mode +nat\n', told(host, 'net')) and told(host, 'net', '--setup') == told(host, 'net')
    assert json.loads(told(host, 'status', '--json'))['hypervisor'] == 'VirtualBox'
    code, out, err = said(host, 'check')                # the rig has no kernel module
    assert (code, err) == (1, '') and re.search(r'✗  kernel module vboxdrv: .*vboxconfig', out), out
    assert re.search(r'✓  VirtualBox 7\.\d', out)
    told(host, 'create', VM, '--memory', '16', '--disk', '4')
    disk = next(value for value in facts(VM).values() if value.endswith('.vdi'))
    manage('createvm', '--name', 'foreign', '--ostype', 'Linux_64', '--register')
    assert said(host, 'cleanup') == (0, '', '')
    manage('storageattach', VM, '--storagectl', 'SATA', '--port', '0', '--medium', 'none')
    assert said(host, 'cleanup') == (0, 'would remove disk %s (no VM uses it)\n' % disk,
                                     'vmhost: nothing was removed; use cleanup --yes\n')
    assert told(host, 'keep', VM) == VM + ' is kept\n'
    code, out, _ = said(host, 'cleanup', '--vms', VM)
    assert code == 1 and 'vm ' + VM not in out and 'kept %s (`keep` excludes it)\n' % VM in out
    assert told(host, 'keep', VM, '--off') == VM + ' is not kept any more\n'
    assert json.loads(told(host, 'cleanup', '--json', '--vms', VM)) == [
        {'kind': 'vm', 'name': VM, 'why': 'named'}, {'kind': 'disk', 'name': disk, 'why': 'no VM uses it'}]
    assert told(host, 'cleanup', '--yes', '--vms', VM) == (
        'removed vm %s (named)\nremoved disk %s (no VM uses it)\n' % (VM, disk))
    assert told(host, 'cleanup') == '' and '"foreign"' in manage('list', 'vms')


def test_from_images_and_off_by_acpi(host, images, remove_all, tmp_path, monkeypatch):
    """Paths are those of the shell; a VM removed without its disks comes back from its .vbox file."""
    name = 'from disk'
    assert said(host, 'create', name, os.path.relpath(str(images / 'disk.vdi')), '--memory', '16') == (
        0, name + '\n', '')
    serial = tmp_path / 'serial'
    manage('modifyvm', name, '--uart1', '0x3f8', '4', '--uartmode1', 'file', str(serial))
    path = facts(name)['CfgFile']
    assert told(host, 'rm', name) == name + ' removed\n'
    monkeypatch.chdir(os.path.dirname(path))
    assert told(host, 'create', os.path.basename(path)) == name + '\n'
    assert 'registered already' in refusal(host, 'create', path)
    told(host, 'start', name)
    wait_until(lambda: serial.exists() and serial.read_bytes() == b'R', 60)
    assert told(host, 'stop', 'from*') == name + ' is off\n'
    assert facts(name)['VMState'] == 'poweroff'


def test_ctrl_c_in_the_middle_of_create(host, api, appliance, remove_all):
    """The host goes on with it, and the one line says so; what it made can be seen, and removed."""
    hdds = manage('list', 'hdds')
    terminal = Terminal(host.command('create', 'begun', appliance + '.ova'))
    with slowed(vboxsvc()):
        wait_until(lambda: re.search(rb'begun: .* s, \d+ %, .* left importing', terminal.written), 60)
        terminal.type(b'\x03')
        code, text = terminal.wait()
        goes_on = 'begun: the host agent continues; `ls` shows the progress'
        assert (code, text.splitlines()[-1]) == (130, 'vmhost: ' + goes_on)
        assert api.cleanup(False) == []                 # it is not left, it is being made
        assert re.search(r'(?m)^begun: importing, \d+ %$', told(host, 'ls'))
    wait_until(lambda: not api.agentInfo()['jobs'], 300, 0.1)
    assert said(host, 'cleanup') == (0, '', '')
    assert told(host, 'rm', 'begun', '--disks') == 'begun removed\n'
    assert told(host, 'cleanup') == '' and manage('list', 'hdds') == hdds
