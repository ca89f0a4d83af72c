"""Which ids a host with a hypervisor lets in, and the secrets of firmware. VirtualBox is the fake one."""

import contextlib
import json
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import fake_server
import fake_virtualbox
import pytest
import vms
from fake_guest import CONNECTIONS, Guest
from helpers import fault_of, wait_until
from vms import VMHost

import faults
import virtualbox

pytestmark = [pytest.mark.ends, pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]


@pytest.fixture(scope='module')
def host(tmp_path_factory):
    environment = fake_virtualbox.install(tmp_path_factory.mktemp('fake'))
    with VMHost(tmp_path_factory.mktemp('host'), environment) as host:
        yield host


@pytest.fixture
def guest(host):
    """``guest(id, secret)``: a fake one, connected."""
    made = []

    def make(id, secret=None):
        made.append(Guest(host.broker_port, id, secret))
        return made[-1]
    yield make
    for one in made:
        one.close()


def refusal(guest):
    """Why a HELLO isn't let in: by an ERROR at once, or by a word once the hypervisor was asked."""
    keys = {'nonce': '0' * 32, 'secret': guest.secret.hex()}
    guest.put(CONNECTIONS, {'id': guest.id}, 'HELLO ' + json.dumps(keys))
    frame = guest.take()
    if frame.command == 'ERROR':
        return frame.get('message')
    return json.loads(frame.body.partition(b' ')[2].decode())['refused']


def firmware_secret(host, uuid):
    """What the host wrote into a VM's firmware."""
    journal = sqlite3.connect(os.path.join(host.state, 'journal.sqlite'))
    try:
        found = journal.execute('SELECT secret FROM secrets WHERE holder = ?', ('vm/' + uuid,)).fetchone()
        return bytes.fromhex(found[0])
    finally:
        journal.close()


def test_an_id_is_one_of_a_vms(host, guest, api):
    assert 'no VM has the network card 02:00:00:00:00:99' in refusal(guest('02:00:00:00:00:99'))
    assert 'other_machines' in refusal(guest('lab12'))


def test_the_mac_of_a_vm_that_is_off_goes_to_nobody(host, guest, api):
    api.createVM('off', '', {'memory': 16})
    mac = api.getVM('off')['id']
    assert 'is off' in refusal(guest(mac))
    api.start('off')
    wait_until(lambda: api.getState('off') == 'Running')
    guest(mac).join()
    assert api.listRegisteredVMs() == ['off']
    api.powerOff('off')
    assert 'forget' in refusal(guest(mac))


def test_a_vm_proves_itself_by_its_firmware(host, guest, api):
    api.createVM('firm', '', {'memory': 16})
    api.start('firm')
    vm = api.getVM('firm')
    secret = firmware_secret(host, vm['uuid'])
    assert len(secret) == 16
    early = guest(vm['id']).join()             # another one who says that id before it, and tells a secret
    api.runCmd('firm', 'id')
    early.hear('CMD_RUN')
    agent = guest(vm['id'], secret)
    agent.hello(tell=False, **{'secret-id': agent.secret_id()})
    agent.hear('PING')
    agent.word('STILL_ALIVE', CONNECTIONS)
    second = api.runCmd('firm', 'echo')
    assert vm['id'] + ' proved itself by its firmware' in host.log()       # and says whose it may have been
    headers = {}
    while headers.get('cmd-id') != second:
        headers, _ = agent.hear('CMD_RUN')
    assert 'forget' in refusal(guest(vm['id'], early.secret))      # its time is over
    api.reset('firm')
    assert firmware_secret(host, vm['uuid']) == secret
    api.powerOff('firm')
    assert api.forgetVM('firm') is True
    api.start('firm')
    assert firmware_secret(host, vm['uuid']) != secret


def test_where_nobody_is_let_in_by_first_use_the_firmware_and_pairing_do(tmp_path):
    environment = fake_virtualbox.install(tmp_path / 'fake')
    with VMHost(tmp_path / 'host', environment, first_use='no', other_machines='yes') as host, \
            host.api as api, contextlib.ExitStack() as stack:
        def guest(id, secret=None):
            return stack.enter_context(Guest(host.broker_port, id, secret))
        api.createVM('web', '', {'memory': 16})
        api.start('web')
        vm = api.getVM('web')
        for id in (vm['id'], 'outside'):
            assert 'first_use' in refusal(guest(id))
        agent = guest(vm['id'], firmware_secret(host, vm['uuid']))
        agent.hello(tell=False, **{'secret-id': agent.secret_id()})
        agent.word('STILL_ALIVE', CONNECTIONS)
        (tmp_path / 'secret').write_text('ab' * 32 + '\r\n', encoding='utf-16')     # as PowerShell's > does
        api.pairVM('outside', str(tmp_path / 'secret'))
        guest('outside', bytes.fromhex('ab' * 32)).hello(tell=False)
        wait_until(lambda: api.listRegisteredVMs() == ['web'])


def test_a_clone_has_a_secret_of_its_own(host, guest, api):
    """Whatever it was cloned with; with the original's it doesn't get in."""
    api.createVM('original', '', {'memory': 16})
    api.start('original')
    with vms.environment(host.environment):
        box = fake_server.VirtualBoxManager().getVirtualBox()
        clone = box.clone(box.findMachine('original'), 'clone')
        key = virtualbox.SERIAL_KEY % 'pcbios'
        before = clone.getExtraData(key)
    wait_until(lambda: 'clone' in api.listVMs())
    api.start('clone')
    secrets = [firmware_secret(host, api.getVM(name)['uuid']) for name in ('original', 'clone')]
    assert before == 'string:vmhost:' + secrets[0].hex() and secrets[0] != secrets[1]
    assert clone.getExtraData(key) == 'string:vmhost:' + secrets[1].hex()
    agents = [guest(api.getVM(name)['id'], secret) for name, secret in zip(('original', 'clone'), secrets)]
    for agent in agents:
        agent.hello(tell=False, **{'secret-id': agent.secret_id()})
        agent.hear('PING')
        agent.word('STILL_ALIVE', CONNECTIONS)
    wait_until(lambda: {'original', 'clone'} <= set(api.listRegisteredVMs()))
    thief = guest(agents[0].id, secrets[1])
    keys = {'nonce': '0' * 32, 'secret-id': thief.secret_id()}
    thief.put(CONNECTIONS, {'id': thief.id}, 'HELLO ' + json.dumps(keys))
    assert 'forget' in thief.take_error().get('message')


def test_nobody_has_the_name_of_a_vm_as_an_id(tmp_path):
    """Whether that VM ever had an agent, and whether the VM or the machine outside came first."""
    environment = fake_virtualbox.install(tmp_path / 'fake')
    with VMHost(tmp_path / 'host', environment, other_machines='yes') as host, host.api as api, \
            contextlib.ExitStack() as stack:
        def guest(id):
            return stack.enter_context(Guest(host.broker_port, id))
        api.createVM('web1', '', {'memory': 16})
        wait_until(lambda: api.getState('web1') == 'PoweredOff')
        assert 'is a VM\'s name' in refusal(guest('web1'))
        outside = guest('lab12').join()
        api.runCmd('lab12', 'true')
        outside.hear('CMD_RUN')
        api.createVM('lab12', '', {'memory': 16})
        assert api.getVM('lab12')['id'] != 'lab12'
        assert fault_of(api.runCmd, 'lab12', 'id').faultCode == 2      # the VM's agent isn't there
        api.start('lab12')
        inside = guest(api.getVM('lab12')['id']).join()
        wait_until(lambda: api.getIdsToNamesMapping().get('lab12') == 'lab12-lab12')
        cmd_id = api.runCmd('lab12', 'id')
        assert inside.hear('CMD_RUN')[0]['cmd-id'] == cmd_id
        assert '\'s name' in refusal(guest('lab12'))


def test_macs_are_written_in_any_case(host, guest, api):
    api.createVM('lower', '', {'memory': 16})
    api.start('lower')
    mac = api.getVM('lower')['id']
    one = guest(mac)
    one.nonce = os.urandom(16).hex()
    keys = {'nonce': one.nonce, 'secret': one.secret.hex()}
    one.put(CONNECTIONS, {'id': mac.lower()}, 'HELLO ' + json.dumps(keys))
    wait_until(lambda: 'lower' in api.listRegisteredVMs())
    assert api.getVM(mac.lower())['name'] == 'lower'


def test_launch_waits_for_the_agent(host, guest, api, tmp_path):
    with ThreadPoolExecutor(1) as pool, host.api as other:
        launched = pool.submit(host.verb, 'launch', 'launched', image_in(tmp_path), '--memory', '16')
        wait_until(lambda: other.listVMsWithState().get('launched') == 'Running', 20)
        mac = other.getVM('launched')['id']
        assert not launched.done()
        guest(mac).join()
        done = launched.result(30)
    assert (done.returncode, done.stdout, done.stderr) == (0, b'launched\n', b'')
    fault = fault_of(api.launchVM, 'silent', image_in(tmp_path, 'silent'), {'timeout': 0.1})
    assert fault.faultCode == faults.DeadlineExceeded.fault and 'silent runs' in fault.faultString
    assert api.getState('silent') == 'Running'
    fault = fault_of(api.launchVM, 'never', image_in(tmp_path), {'timeout': 'long'})
    assert fault.faultCode == faults.InvalidParams.fault and 'never' not in api.listVMs()


def image_in(folder, name='image'):
    """The path of a disk of its own."""
    path = folder / (name + '.vdi')
    path.write_text(fake_virtualbox.disk(len(name)))
    return str(path)
