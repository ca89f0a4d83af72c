"""What must hold of every VM method, on the real VirtualBox and on the fake alike.

Imported by test_vm_methods.py and virtualbox/test_methods.py, which have the fixtures: ``host``
and its ``api``; ``vm``, the name of a new VM that is off; ``abort(vm)``, which kills its process.
"""

import re
import xmlrpc.client

import pytest
from helpers import wait_until
from vms import fault_of

PNG = b'\x89PNG\r\n\x1a\n'
STATES = ('PoweredOff', 'Running', 'Paused', 'Saved', 'Aborted')
OFF = ('PoweredOff', 'Aborted')
CHANGES = {                     # method: {state in which it makes sense: state afterwards}
    'start': {'PoweredOff': 'Running', 'Aborted': 'Running', 'Saved': 'Running'},
    'reset': {'Running': 'Running'},
    'powerOff': {'Running': 'PoweredOff', 'Paused': 'PoweredOff'},
    'pause': {'Running': 'Paused'},
    'resume': {'Paused': 'Running'},
    'saveState': {'Running': 'Saved', 'Paused': 'Saved'},
    'discardState': {'Saved': 'PoweredOff'},
    'restoreSnapshot': dict.fromkeys(OFF + ('Saved',), 'PoweredOff'),
    'removeVM': dict.fromkeys(OFF + ('Saved',), None),
    'shutdown': {'Running': None},     # whether it ends is up to the guest
}
STEADY = {                      # methods that leave the state alone, with their further arguments
    'getState': (), 'getVM': (), 'getStats': (), 'getLog': (), 'listSnapshots': (),
    'setLimits': ({'cpuPercent': 50},), 'remoteDesktop': (), 'takeSnapshot': ('steady',),
    'deleteSnapshot': ('steady',), 'screenshot': (),
}
ONLY_IN = {'screenshot': ('Running', 'Paused'), 'setLimits': ('PoweredOff', 'Running', 'Aborted')}


def bring(api, abort, vm, state):
    """Takes a VM that is off to a state."""
    if state != 'PoweredOff':
        api.start(vm)
    if state == 'Paused':
        api.screenshot(vm)              # whoever pauses a VM before it has a screen gets no picture
        api.pause(vm)
    elif state == 'Saved':
        api.saveState(vm)
    elif state == 'Aborted':
        abort(vm)
        wait_until(lambda: api.getState(vm) == 'Aborted', 20)
    assert api.getState(vm) == state


@pytest.mark.parametrize('state', STATES)
def test_methods_that_leave_the_state_alone(api, vm, abort, state):
    bring(api, abort, vm, state)
    for method, args in STEADY.items():
        code, answer = fault_of(getattr(api, method), vm, *args)
        if state in ONLY_IN.get(method, STATES):
            assert code == 0, '%s on %s: %s' % (method, state, answer)
        else:
            assert_bad_state(method, state, code, answer)
        assert api.getState(vm) == state, method
    assert api.listSnapshots(vm) == []


@pytest.mark.parametrize('state', STATES)
def test_methods_that_do_not_fit_the_state(api, vm, abort, state):
    api.takeSnapshot(vm, 'base')
    bring(api, abort, vm, state)
    for method, fitting in CHANGES.items():
        if state not in fitting:
            code, answer = fault_of(getattr(api, method), vm)
            assert_bad_state(method, state, code, answer)
            assert api.getState(vm) == state, method


def test_the_process_in_which_a_vm_runs(api, vm):
    assert api.getVM(vm)['pid'] == 0
    api.start(vm)
    assert api.getVM(vm)['pid'] > 0
    api.powerOff(vm)
    assert api.getVM(vm)['pid'] == 0


def assert_bad_state(method, state, code, text):
    assert code == 4, '%s on %s: %s %s' % (method, state, code, text)
    assert state in text and len(text.split()) > 5, text


@pytest.mark.parametrize('method, state', [
    (method, state) for method, fitting in CHANGES.items() for state in fitting if fitting[state]])
def test_methods_that_change_the_state(api, vm, abort, method, state):
    api.takeSnapshot(vm, 'base')
    bring(api, abort, vm, state)
    assert getattr(api, method)(vm) is True
    assert api.getState(vm) == CHANGES[method][state]
    if CHANGES[method][state] == 'Running':
        assert vm in api.listRunningVMs()


@pytest.mark.parametrize('state', sorted(CHANGES['removeVM']))
def test_removing(api, vm, abort, state):
    bring(api, abort, vm, state)
    assert api.removeVM(vm, True) is True
    assert vm not in api.listVMs()
    assert fault_of(api.getState, vm)[0] == 1


def test_an_unknown_vm_is_fault_1(api):
    more = {'takeSnapshot': ('s',), 'deleteSnapshot': ('s',), 'setLimits': ({},), 'runCmd': ('true',)}
    for method in list(CHANGES) + list(STEADY) + ['ping', 'runCmd']:
        args = more.get(method) or (STEADY.get(method) or ())
        code, text = fault_of(getattr(api, method), 'nobody', *args)
        assert (code, 'nobody' in text) == (1, True), '%s: %s %s' % (method, code, text)


def test_the_name_the_id_and_the_uuid_name_a_vm(api, vm):
    found = api.getVM(vm)
    assert re.match('^([0-9A-F]{2}:){5}[0-9A-F]{2}$', found['id'])
    for name in (found['id'], found['id'].lower(), found['uuid']):
        assert api.getVM(name)['name'] == vm
        assert api.getState(name) == 'PoweredOff'
    assert api.getNamesToIdsMapping()[vm] == found['id']
    assert api.getIdsToNamesMapping()[found['id']] == vm


def test_vm_state_and_agent_state_are_apart(api, vm):
    found = api.getVM(vm)
    assert (found['state'], found['agent'], found['commands']) == ('PoweredOff', 'never', [])
    assert found['rdp']['enabled'] is False
    code, _ = fault_of(api.ping, vm)
    assert code == 2
    assert fault_of(api.runCmd, vm, 'true')[0] == 2
    api.start(vm)
    found = api.getVM(vm)
    assert (found['state'], found['agent']) == ('Running', 'never')


def test_lists(api, vm):
    assert vm in api.listVMs() and vm in api.listAvailableVMs()
    assert vm not in api.listRunningVMs() and vm not in api.listRegisteredVMs()
    assert api.listVMsWithState()[vm] == 'PoweredOff'
    api.start(vm)
    assert vm in api.listRunningVMs()
    api.pause(vm)
    assert vm in api.listRunningVMs()
    assert api.listVMsWithState()[vm] == 'Paused'
    assert api.unpause(vm) is True


def test_what_the_hypervisor_is(api):
    assert re.match(r'^\d+\.\d+\.\d+$', api.version())
    states = api.states()
    assert states['Running'] != states['PoweredOff']
    assert {'Paused', 'Saved', 'Aborted', 'Stuck'} <= set(states)
    assert not [name for name in states if name.startswith(('First', 'Last'))]
    assert api.agentInfo()['hypervisor'] == 'VirtualBox'


def test_making_a_vm_with_options(host, api, remove_all):
    options = {'memory': 24, 'cpus': 2, 'ostype': 'Debian_64', 'network': 'nat', 'diskSize': 4}
    assert api.createVM('made', '', options) == [True, 'made']
    assert fault_of(api.createVM, 'made')[0] == 8
    assert api.listSnapshots('made') == []
    assert api.getVM('made')['state'] == 'PoweredOff'
    assert host.wait_for_event('vm-added', 'made')
    assert api.removeVM('made', True) is True
    assert host.wait_for_event('vm-removed', 'made')


@pytest.mark.parametrize('options, told', [
    ({'memroy': 64}, 'memroy'), ({'memory': 'much'}, 'memory'), ({'memory': '\xb2'}, 'memory'),
    ({'keep': 'perhaps'}, 'keep'), ({'cpus': 0}, 'cpus'), ({'diskSize': 2097153}, 'diskSize'),
    ({'ostype': 'Plan9_65'}, 'Plan9_65'), ({'network': 'wlan'}, 'wlan'), ({'diskSize': -1}, 'diskSize')])
def test_wrong_options_of_a_new_vm(api, options, told):
    code, text = fault_of(api.createVM, 'wrong', '', options)
    assert (code, told in text) == (-32602, True), text
    assert 'wrong' not in api.listVMs()


@pytest.mark.parametrize('name, image, code', [
    ('', '', -32602), ('a/b', '', -32602), ('..', '', -32602), ('wrong', '/no/such.ova', -32602),
    ('08:00:27:0a:0B:0c', '', -32602), ('6f1c1b0e-3a5b-4C1d-9e2f-0123456789ab', '', -32602),
    ('{6f1c1b0e-3a5b-4c1d-9e2f-0123456789ab}', '', -32602),
    ('/no/such.vbox', '', -32602), ('wrong', __file__, 9)])
def test_wrong_names_and_images_of_a_new_vm(api, name, image, code):
    found, text = fault_of(api.createVM, name, image)
    assert found == code, text
    assert 'wrong' not in api.listVMs()


@pytest.mark.parametrize('image, options, told', [
    ('m.vbox', {'memory': 64}, 'memory'), ('m.vbox', {'keep': True}, 'keep'),
    ('m.ova', {'ostype': 'Linux_64'}, 'ostype'), ('m.ovf', {'diskSize': 4}, 'diskSize'),
    ('m.vdi', {'memory': 16, 'diskSize': 0}, 'diskSize')])
def test_options_that_an_image_decides(api, tmp_path, image, options, told):
    (tmp_path / image).write_text('')
    path = str(tmp_path / image)
    code, text = fault_of(api.createVM, *((path, '') if image == 'm.vbox' else ('wrong', path)) + (options,))
    assert (code, text.split()[0]) == (-32602, told), text
    assert 'wrong' not in api.listVMs()


def test_snapshots_are_a_tree(api, vm):
    assert fault_of(api.restoreSnapshot, vm)[0] == 5
    api.takeSnapshot(vm, 'root', 'the first')
    api.takeSnapshot(vm, 'left')
    api.restoreSnapshot(vm, 'root')
    api.saveSnapshot(vm, 'right')
    assert api.listSnapshots(vm) == ['root', 'left', 'right']
    code, text = fault_of(api.takeSnapshot, vm, 'left')
    assert (code, 'left' in text) == (8, True)
    assert fault_of(api.takeSnapshot, vm, '')[0] == -32602
    assert fault_of(api.restoreSnapshot, vm, 'middle')[0] == 5
    assert fault_of(api.deleteSnapshot, vm, 'middle')[0] == 5
    code, text = fault_of(api.deleteSnapshot, vm, 'root')     # it has two children
    assert (code, '2 child' in text) == (4, True), text
    for name in ('left', 'right', 'root'):
        assert api.deleteSnapshot(vm, name) is True
    assert api.listSnapshots(vm) == []


def test_a_live_snapshot_is_saved_memory(api, vm):
    api.start(vm)
    api.takeSnapshot(vm, 'live')
    assert api.getState(vm) == 'Running'
    api.powerOff(vm)
    api.restoreSnapshot(vm)
    assert api.getState(vm) == 'Saved'
    api.start(vm)
    assert api.getState(vm) == 'Running'


def test_looking_in(host, api, vm):
    assert api.getLog(vm) == ''
    api.start(vm)
    picture = api.screenshot(vm)
    assert isinstance(picture, xmlrpc.client.Binary) and picture.data.startswith(PNG)
    assert host.verb('call', '-r', 'screenshot', vm).stdout.startswith(PNG)
    assert len(api.getLog(vm, 100)) <= 100 < len(api.getLog(vm))
    names = [row['name'] for row in api.getStats(vm)]
    assert {'CPU/Load/User', 'RAM/Usage/Used'} <= set(names) and not [n for n in names if ':' in n]
    assert {name.split('/')[0] for name in names} >= {'CPU', 'RAM', 'Net', 'Disk'}
    only = api.getPerformanceData(vm, 'RAM/*')
    assert [row['name'] for row in only] == ['RAM/Usage/Used']
    assert only[0]['unit'] == 'kB' and only[0]['values'][0] > 1000


def test_limits(api, vm):
    assert api.setLimits(vm, {'cpuPercent': 40, 'netKBps': 100, 'network': False}) is True
    api.start(vm)
    assert api.setLimits(vm, {'cpuPercent': 60, 'netKBps': 50, 'network': True}) is True
    assert api.setLimits(vm, {'netKBps': 0}) is True
    for limits, told in (({'cpuPercent': 0}, 'cpuPercent'), ({'cpuPercent': 101}, 'cpuPercent'),
                         ({'cpuPercent': 'abc'}, 'cpuPercent'), ({'cpuPercent': 50.9}, 'cpuPercent'),
                         ({'netKBps': -1}, 'netKBps'), ({'netKBps': 'x'}, 'netKBps'),
                         ({'network': 'loose'}, 'network'), ({'network': ''}, 'network'),
                         ({'ram': 1}, 'ram')):
        code, text = fault_of(api.setLimits, vm, limits)
        assert (code, told in text) == (-32602, True), text
    assert api.setLimits(vm, {'cpuPercent': 50.0, 'netKBps': '20', 'network': 'on'}) is True


def test_the_first_rate_limit_needs_a_vm_that_is_off(api, vm):
    api.start(vm)
    assert fault_of(api.setLimits, vm, {'netKBps': 10})[0] == 4


def test_remote_desktop(api, vm):
    """By the VNC pack, which both have: it knows a password, and no more. It is shown once."""
    found = api.remoteDesktop(vm)
    password = found.pop('password')
    assert re.match('^[a-z0-9]{8}$', password)
    assert found == {'enabled': True, 'address': '127.0.0.1', 'port': found['port'],
                     'auth': 'password', 'security': 'none'}
    assert 5000 <= found['port'] <= 5050
    assert api.getVM(vm)['rdp'] == found
    assert 'password' not in api.remoteDesktop(vm, False)
    again = api.remoteDesktop(vm, True, {'port': 5007, 'address': '127.0.0.1'})
    assert (again['port'], again['password'] != password) == (5007, True)
    for options in ({'colour': 1}, {'auth': 'maybe'}, {'security': 'none at all'}, {'port': 70000},
                    {'port': 'x'}, {'address': 'nonsense..', 'port': 5001}, {'address': ''},
                    {'address': '::1'}, {'address': '192.0.2.1'}, {'auth': 'external'}, {'security': 'TLS'}):
        code, text = fault_of(api.remoteDesktop, vm, True, options)
        assert code == -32602, text


def test_a_remote_desktop_takes_a_free_port(api, vm, remove_all):
    port = api.remoteDesktop(vm)['port']
    api.createVM('second', '', {'memory': 16, 'diskSize': 0})
    assert api.remoteDesktop('second')['port'] != port


def test_cleanup_leaves_a_vm_that_is_merely_off(api, vm, remove_all):
    api.createVM('kept', '', {'memory': 16, 'diskSize': 4, 'keep': True})
    api.takeSnapshot(vm, 'a snapshot')
    assert left_over(api.cleanup()) == [] == left_over(api.cleanup(False))
    assert {vm, 'kept'} <= set(api.listVMs())


def left_over(rows):
    return [(row['kind'], row['name']) for row in rows if row['why']]


def test_nat_mode_has_no_network_to_make(api):
    before = api.getNetwork()
    assert before['mode'] == 'nat'
    assert api.setupNetwork() == before


def test_the_state_is_told(host, api, vm, abort):
    host.wait_for_event('vm-added', vm)
    after = host.last_event()
    api.start(vm)
    host.wait_for_event('vm-state', vm, after, text='Running')
    abort(vm)
    assert 'Running' in host.wait_for_event('vm-aborted', vm, after, 10)['text']
