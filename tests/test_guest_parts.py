"""The guest agent's parts: what it finds out by itself, its spool, its bundle, what it says of output."""

import errno
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types

import pytest
from agents import TOP, Agent, Host
from helpers import wait_until
from hypothesis import given
from hypothesis import strategies as st

import agent
import guestagent
import guestcgroup
import guestidentity
import guestmachine
import guestreports
import guestrequests
import guestrunner
import guestspool
import gueststart
import hostfollow
import protocol

GUEST = os.path.join(TOP, 'vmguest.py')
MAC = '02:00:00:00:AA:02'


@pytest.mark.ends
@pytest.mark.skipif(not os.path.isdir('/proc/self/fdinfo'), reason='needs /proc')
def test_programs_get_no_descriptor_that_the_agent_was_started_with(tmp_path):
    """A lock of whoever started it, or a pipe that somebody waits on, would be held for days."""
    ini = tmp_path / 'guest.ini'
    ini.write_text('[Broker]\nhost = 127.0.0.1\nport = 1\n[VM]\nid = one\nstate_dir = state\n')
    reader, writer = os.pipe()
    guest = subprocess.Popen([sys.executable, GUEST, str(ini)], pass_fds=[writer], stderr=subprocess.DEVNULL)
    try:
        def is_closed_by_exec():
            with open('/proc/%d/fdinfo/%d' % (guest.pid, writer)) as file:
                flags = [line.split()[1] for line in file if line.startswith('flags:')]
            return int(flags[0], 8) & os.O_CLOEXEC
        wait_until(is_closed_by_exec, 20)
    finally:
        guest.terminate()
        guest.wait()
        os.close(reader)
        os.close(writer)


# --- the network ---

def in_namespace(name, *words, **options):
    return subprocess.run(['ip', 'netns', 'exec', name] + list(words), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True, timeout=60, **options)


def may_make_namespaces():
    if not shutil.which('ip') or os.getuid() != 0:
        return False
    name = 'vmhost-try-%d' % os.getpid()
    made = subprocess.call(['ip', 'netns', 'add', name], stderr=subprocess.DEVNULL) == 0
    if made:
        subprocess.call(['ip', 'netns', 'del', name])
    return made


@pytest.fixture
def network():
    """Two namespaces joined by a cable: the host's at 10.93.0.1, and the guest's. Their names."""
    if not may_make_namespaces():
        pytest.skip('needs root, iproute2 and the right to make network namespaces')
    host, guest = 'vmh-%d' % os.getpid(), 'vmg-%d' % os.getpid()
    try:
        for words in (['netns', 'add', host], ['netns', 'add', guest],
                      ['link', 'add', 'cable', 'netns', host, 'type', 'veth', 'peer', 'name', 'card',
                       'netns', guest]):
            subprocess.check_call(['ip'] + words)
        for name, words in [
                (host, 'addr add 10.93.0.1/24 dev cable'), (host, 'link set cable up'),
                (host, 'link set lo up'), (guest, 'link set lo up'),
                (guest, 'link set card address ' + MAC), (guest, 'addr add 10.93.0.7/24 dev card'),
                (guest, 'link set card up')]:
            subprocess.check_call(['ip', '-n', name] + words.split())
        yield host, guest
    finally:
        for name in (host, guest):
            subprocess.call(['ip', 'netns', 'del', name])


@pytest.mark.parametrize('route', ['gateway', 'first address of its subnet'])
def test_it_finds_broker_card_and_id_by_itself(network, route, tmp_path):
    host, guest = network
    if route == 'gateway':
        subprocess.check_call(['ip', '-n', guest, 'route', 'add', 'default', 'via', '10.93.0.1'])
    broker = subprocess.Popen(['ip', 'netns', 'exec', host, sys.executable,
                               os.path.join(TOP, 'stompbroker.py'), '--host', '10.93.0.1', '--port', '61613'],
                              stdout=subprocess.PIPE)
    try:
        assert b'listening on 10.93.0.1:61613' in broker.stdout.readline()
        done = in_namespace(guest, sys.executable, GUEST, '--check')
        assert done.returncode == 0, done.stdout
        for words in ('10.93.0.1:61613', MAC, 'card'):
            assert words in done.stdout
    finally:
        broker.terminate()
        broker.wait()
        broker.stdout.close()
    done = in_namespace(guest, sys.executable, GUEST, '--check')
    assert done.returncode == 1 and '10.93.0.1:61613' in done.stdout and 'Traceback' not in done.stdout


@pytest.mark.parametrize('virtual, said', [(True, 'no card here'), (False, 'is no virtual machine')])
def test_who_has_no_candidates_is_told_why(monkeypatch, virtual, said):
    monkeypatch.setattr(guestmachine, 'is_virtual', lambda: virtual)
    text = guestmachine.Network().why_nowhere(61613)
    assert said in text and '--broker HOST' in text and ('61613' in text) is not virtual


@pytest.mark.parametrize('system', ['exec', 'umount -l /sys; exec'])
def test_addresses_and_cards(network, system):
    _, guest = network
    subprocess.check_call(['ip', '-n', guest, 'route', 'add', 'default', 'via', '10.93.0.1'])
    done = in_namespace(guest, 'sh', '-c', system + ' "$@"', 'sh',
                        sys.executable, '-c', 'import guestmachine, json\n'
                        'net = guestmachine.Network()\n'
                        'print(json.dumps([net.gateways(), net.candidates(61613), net.interfaces(), '
                        'net.mac_of("card"), net.address_of("card"), net.interface_with("10.93.0.7"), '
                        'net.interface_with("127.0.0.1"), net.mac_of("lo"), net.mac_of("none")]))', cwd=TOP)
    gateways, candidates, cards, mac, address, carries, over_loopback, lo, none = json.loads(done.stdout)
    assert gateways == ['10.93.0.1'] and candidates[0] == '10.93.0.1' and '127.0.0.1' not in candidates
    assert (cards, mac, address) == (['card'], MAC, '10.93.0.7')
    assert (carries, over_loopback, lo, none) == ('card', 'card', '', '')


def test_both_gateways_of_a_machine_with_two_are_tried(network):
    """As of a VM with one more card in its host's network, whose router is preferred, and no host. The id is
    the MAC of the card by which the host is reached."""
    _, guest = network
    for words in ('link add lan type veth peer name far', 'addr add 10.94.0.7/24 dev lan', 'link set lan up',
                  'link set far up', 'route add default via 10.94.0.1 dev lan metric 10',
                  'route add default via 10.93.0.1 dev card metric 20'):
        subprocess.check_call(['ip', '-n', guest] + words.split())
    done = in_namespace(guest, sys.executable, '-c', 'import guestmachine, json\n'
                        'guestmachine.is_virtual = lambda: True\n'
                        'net = guestmachine.Network()\n'
                        'print(json.dumps([net.gateways(), net.candidates(61613), '
                        'net.interface_with("10.93.0.7")]))',
                        cwd=TOP)
    gateways, candidates, carries = json.loads(done.stdout)
    assert gateways == ['10.94.0.1', '10.93.0.1'] == candidates[:2] and carries == 'card'


LISTENER = '''
import os, socket, sys
sock = socket.socket()
sock.bind(('127.0.0.1', 0))
if sys.argv[1]:
    os.setuid(int(sys.argv[1]))
    sock = socket.socket()
    sock.bind(('127.0.0.1', 0))
sock.listen(1)
print(sock.getsockname()[1], flush=True)
sys.stdin.read()
'''


@pytest.mark.skipif(not os.path.exists('/proc/net/tcp'), reason='needs /proc/net/tcp')
def test_on_no_virtual_machine_only_this_users_and_roots_brokers_count(monkeypatch):
    monkeypatch.setattr(guestmachine, 'is_virtual', lambda: False)
    for uid in ['', '65534'] if os.getuid() == 0 else ['']:
        with subprocess.Popen([sys.executable, '-c', LISTENER, uid], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as listener:
            port = int(listener.stdout.readline())
            assert guestmachine.Network().candidates(port) == ([] if uid else ['127.0.0.1'])
            listener.stdin.close()
    assert guestmachine.Network().candidates(port) == []        # nobody listens there any more


def test_what_is_a_virtual_machine(tmp_path):
    cpuinfo = tmp_path / 'cpuinfo'
    cpuinfo.write_text('model name\t: hypervisor-less\nflags\t\t: fpu vme de\n')
    (tmp_path / 'sys_vendor').write_text('Dell Inc.\n')
    assert not guestmachine.is_virtual(str(tmp_path), str(cpuinfo))
    for vendor in ('innotek GmbH', 'QEMU', 'VMware, Inc.', 'Xen'):
        (tmp_path / 'sys_vendor').write_text(vendor + '\n')
        assert guestmachine.is_virtual(str(tmp_path), str(cpuinfo))
    cpuinfo.write_text('flags\t\t: fpu vme hypervisor lahf_lm\n')
    assert guestmachine.is_virtual('/nowhere', str(cpuinfo))
    assert not guestmachine.is_virtual('/nowhere', '/no')


def test_without_proc_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(guestmachine.Network, '_has_proc', lambda self: False)
    monkeypatch.setitem(sys.modules, 'netifaces', None)
    with pytest.raises(agent.AgentError, match='netifaces-plus'):
        guestmachine.Network().interfaces()


# --- the spool ---

@given(st.text(min_size=1, max_size=200))
def test_any_cmd_id_has_a_folder_name_of_its_own(cmd_id):
    name = guestspool.folder_name(cmd_id)
    assert re.fullmatch('[A-Za-z0-9][A-Za-z0-9._@-]{0,127}', name)
    assert name == cmd_id or name.startswith('x-')


@pytest.fixture
def spool(tmp_path):
    spool = guestspool.Spool(str(tmp_path), 'A', 'boot')
    yield spool
    spool.close()


def test_a_folder_is_claimed_once(spool):
    assert spool.claim('c-1') is not None
    assert spool.claim('c-1') is None


def test_one_agent_at_a_time(spool, tmp_path):
    with pytest.raises(agent.AgentError, match='another vmguest with the id A'):
        guestspool.Spool(str(tmp_path), 'A', 'boot')
    guestspool.Spool(str(tmp_path), 'B', 'boot').close()


DAY = 86400.0


class Machine:
    """A guest whose clocks the test sets; its agents keep files for 10 s, and cmd-ids for 7 days."""

    def __init__(self, root, monkeypatch):
        self.root = str(root)
        self.wall, self.monotonic, self.boots = 1.7e9, 1000.0, 0
        monkeypatch.setattr(guestspool.time, 'time', lambda: self.wall)
        monkeypatch.setattr(guestspool.time, 'monotonic', lambda: self.monotonic)
        self.start()

    def start(self):
        self.spool = guestspool.Spool(self.root, 'A', 'boot-%d' % self.boots)
        self.spool.load()

    def die(self):
        """As SIGKILL does it: nothing is saved."""
        self.spool._lock.close()

    def reboot(self, orderly=False):
        self.spool.close() if orderly else self.die()
        self.boots += 1
        self.monotonic = 5.0
        self.start()

    def pass_time(self, seconds):
        self.monotonic += seconds
        self.wall += seconds
        self.sweep()

    def set_clock(self, seconds):
        self.wall = seconds
        self.sweep()

    def sweep(self):
        while not self.spool.sweep(10, 7 * DAY):
            continue

    def end_command(self, cmd_id):
        """It ran, and its results are acknowledged."""
        command = self.spool.claim(cmd_id)
        for name in ('request.json', 'result.json'):
            guestspool.write_file(command.path(name), json.dumps({'cmd-id': cmd_id, 'state': 'exited'}))
        command.acknowledge(self.spool.clock.now())
        return command

    def remembers(self, cmd_id):
        command = self.spool.claim(cmd_id)
        if command is not None:
            command.discard()
        return command is None


@pytest.fixture
def machine(tmp_path, monkeypatch):
    machine = Machine(tmp_path, monkeypatch)
    yield machine
    machine.spool.close()


def test_only_time_that_passed_lets_a_command_go(machine):
    command = machine.end_command('c')
    for wall in (2.7e9, 0.0, 1.7e9, 2.7e9):         # 2055, 1970
        machine.set_clock(wall)
        assert command.has('result.json')
    machine.pass_time(9)
    assert command.has('result.json')
    machine.pass_time(2)
    assert os.listdir(command.folder) == [] and machine.remembers('c')
    for wall in (0.0, 2.7e9, 1.7e9):
        machine.set_clock(wall)
        machine.pass_time(2 * DAY)
        assert machine.remembers('c')
    machine.pass_time(DAY + 1)
    assert not machine.remembers('c')


def test_agents_of_one_boot_go_on_counting(machine):
    machine.end_command('c')
    machine.pass_time(11)
    for wall in (2.7e9, 0.0, 1.7e9):
        machine.die()
        machine.monotonic += 2 * DAY
        machine.wall = wall
        machine.start()
        machine.sweep()
        assert machine.remembers('c')
    machine.pass_time(DAY + 1)
    assert not machine.remembers('c')


@pytest.mark.parametrize('orderly', [True, False])
def test_another_boot_counts_what_was_saved(machine, orderly):
    machine.end_command('c')
    machine.pass_time(11)
    for wall in (2.7e9, 0.0, 1.7e9):
        machine.pass_time(2 * DAY)
        machine.set_clock(wall)
        machine.reboot(orderly)
        machine.sweep()
        assert machine.remembers('c')
    machine.pass_time(DAY - 60)
    assert machine.remembers('c')
    machine.pass_time(60 + 4 * guestspool.SAVE_CLOCK_EVERY)
    assert not machine.remembers('c')


def test_a_damaged_clock_keeps_all_for_longer(machine):
    machine.end_command('c')
    machine.pass_time(11)
    machine.pass_time(6 * DAY)
    machine.die()
    with open(os.path.join(machine.spool.folder, '.clock'), 'w') as file:
        file.write('{"torn')
    machine.start()
    machine.pass_time(6 * DAY)
    assert machine.remembers('c')
    machine.pass_time(DAY + 20)
    assert not machine.remembers('c')


def test_what_is_damaged_is_set_aside_and_never_forgotten_meanwhile(machine, monkeypatch):
    """The agent dies at each step of that: the cmd-id stays taken."""
    for step in range(1, 6):
        command = machine.spool.claim('c-%d' % step)
        for name in ('runner', 'request.json', 'out'):
            guestspool.write_file(command.path(name), '{"torn')
        machine.die()
        with monkeypatch.context() as patch:
            die_at(patch, step)
            try:
                machine.start()
            except Killed:
                machine.die()
        assert os.path.isdir(command.folder)
    machine.start()
    assert all(machine.remembers('c-%d' % step) for step in range(1, 6))
    aside, = glob.glob(os.path.join(machine.spool.folder, '.corrupt-c-5-*'))
    assert sorted(os.listdir(aside)) == ['out', 'request.json', 'runner']


class Killed(BaseException):
    pass


def die_at(patch, step):
    """At that call of what changes a folder."""
    calls = []

    def dying(original):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) == step:
                raise Killed
            return original(*args, **kwargs)
        return call
    for name in ('mkdir', 'rename', 'chmod', 'remove'):
        patch.setattr(os, name, dying(getattr(os, name)))


# --- what it says of output ---

@given(st.binary(max_size=300), st.integers(0, 310))
def test_a_tail_begins_where_it_says(data, room):
    class Kept(guestspool.Command):
        def size(self, name):
            return len(data)

        def slice(self, name, offset, length):
            return data[offset:offset + length]
    keys = {}
    guestreports.put_tail(keys, 'out', Kept('', '/'), room)
    offset = keys['out-offset']
    assert keys['out-size'] == len(data) and len(data) - offset <= room
    message = protocol.Message('', 'CMD_RESULTS', None, keys)
    if 'out64' in keys:
        import base64
        assert base64.b64decode(keys['out64']) == data[offset:]
    else:
        assert message.text('out').encode() == data[offset:]


@pytest.mark.parametrize('data', [
    b'', b'plain text\n' * 1000, 'Größe\n'.encode() * 1000, b'\x1b[1m\r\n', bytes(9000),
    bytes(range(256)) * 300, b'cut \xe2\x82', '\ufffd'.encode()], ids=lambda data: repr(data[:9]))
def test_a_slice_is_exact_and_takes_at_most_twice_its_room(data):
    keys = guestreports.written('out', data)
    assert hostfollow.slice_in(protocol.Message('', 'CMD_STATUS', None, keys), 'out') == data
    assert len(protocol.write_object(keys)) <= 2 * len(data) + 100


@pytest.mark.parametrize('name, number', [('TERM', 15), ('SIGKILL', 9), ('2', 2), ('int', 2)])
def test_signals_by_name_and_number(name, number):
    assert guestrequests.signal_number(name) == number


@pytest.mark.parametrize('name', ['', 'NONSENSE', '0', '-9', '9999', '٣'])
def test_what_is_no_signal(name):
    with pytest.raises(protocol.BadWord):
        guestrequests.signal_number(name)

def test_who_wakes_an_agent_that_has_stopped_meets_nothing():
    """As the link's thread does, which may outlive it on a busy machine."""
    forks = types.SimpleNamespace(stop=lambda: None)
    guest = guestagent.Agent(agent.read_settings(None, guestagent.SETTINGS), forks)
    descriptors = os.listdir('/proc/self/fd')
    guest.wake()
    guest.stop()
    guest.wake()
    assert len(os.listdir('/proc/self/fd')) < len(descriptors)


@pytest.mark.parametrize('pipes', [0, 1, 2])
def test_a_runner_out_of_descriptors_fails_and_keeps_none(pipes, tmp_path, monkeypatch):
    """It runs other commands later."""
    request = {'cmd': 'true', 'args': [], 'env': {}, 'path': '', 'root': str(tmp_path), 'output-limit': 1000}
    (tmp_path / 'request.json').write_text(json.dumps(request))
    left, pipe = iter(range(pipes)), os.pipe

    def limited():
        if next(left, None) is None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return pipe()
    before = os.listdir('/proc/self/fd')
    monkeypatch.setattr(os, 'pipe', limited)
    origin = gueststart.Origin(-1, guestcgroup.Place(''))
    process = types.SimpleNamespace(wakeup=0, reports=0, null=0, origin=origin,
                                    unsynced=guestrunner.Unsynced())
    runner = guestrunner.Runner(str(tmp_path), process)
    assert runner.claim()
    runner.run()
    runner.close()
    assert os.listdir('/proc/self/fd') == before
    result = json.loads((tmp_path / 'result.json').read_text())
    assert result['state'] == 'failed' and os.strerror(errno.EMFILE) in result['error']


def test_results_that_nobody_acknowledges_are_brought_to_the_disk(monkeypatch):
    class Command:
        def __init__(self, folder, acknowledged=False, error=None):
            self.folder, self.acknowledged, self.error, self.synced = folder, acknowledged, error, 0

        def has(self, name):
            return name == 'acked' and self.acknowledged

        def sync(self):
            if self.error:
                raise self.error
            self.synced += 1
    now = [100.0]
    monkeypatch.setattr(guestspool.time, 'monotonic', lambda: now[0])
    unsynced = guestrunner.Unsynced()
    assert unsynced.due is None
    commands = [Command('acknowledged', True), Command('gone', error=FileNotFoundError()), Command('alone')]
    for command in commands:
        unsynced.add(command)
    later = Command('later')
    now[0] += guestrunner.ACK_PATIENCE / 2
    unsynced.add(later)
    assert unsynced.due == 100 + guestrunner.ACK_PATIENCE
    unsynced.sync_due()
    assert not any(command.synced for command in commands)
    now[0] = unsynced.due
    unsynced.sync_due()
    assert [command.synced for command in commands + [later]] == [0, 0, 1, 0]
    unsynced.sync_all()                     # the process is about to end
    assert later.synced == 1 and unsynced.due is None


# --- one file ---

def bundle_by(python, target):
    stomper = os.path.dirname(os.path.dirname(os.path.abspath(__import__('stomper').__file__)))
    subprocess.check_call([python, GUEST, '--bundle', str(target)],
                          env=dict(os.environ, PYTHONPATH=stomper, PYTHONDONTWRITEBYTECODE='1'))
    return target.read_bytes()


def pythons():
    """One python of each installed version that this machine has."""
    root = os.path.expanduser(os.environ.get('PYENV_ROOT', '~/.pyenv'))
    return sorted(glob.glob(root + '/versions/3.*/bin/python')) + [sys.executable]


@pytest.mark.once
def test_the_bundle_is_the_same_from_every_python(tmp_path):
    made = {bundle_by(python, tmp_path / ('%d.pyz' % n)) for n, python in enumerate(pythons())}
    assert len(made) == 1


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('bundle') / 'vmguest.pyz')
    subprocess.check_call([sys.executable, GUEST, '--bundle', path])
    return path


@pytest.mark.once
@pytest.mark.parametrize('python', pythons(), ids=lambda path: path.split('/')[-3])
def test_the_bundle_runs_alone_in_an_empty_folder(python, host, bundle, tmp_path):
    folder, name = tmp_path / 'empty', 'alone-' + python.split('/')[-3]
    folder.mkdir()
    shutil.copy(bundle, str(folder))
    (folder / 'guest.ini').write_text(
        '[Broker]\nhost = 127.0.0.1\nport = %d\n[VM]\nid = %s\nname = %s\nstate_dir = state\n'
        '[Chirp]\nport = 0\n' % (host.broker_port, name, name))
    with open(str(tmp_path / 'log'), 'wb') as log:
        guest = subprocess.Popen([python, '-I', '-S', 'vmguest.pyz', 'guest.ini'], cwd=str(folder),
                                 stdout=log, stderr=log)
    try:
        with host.api as api:
            wait_until(lambda: name in api.listVMs(), 30)
        assert host.run(name, 'echo', 'hello')['out'] == 'hello\n'
    finally:
        guest.send_signal(signal.SIGTERM)
        assert guest.wait(10) == 0


def test_what_the_host_imports_is_on_every_system():
    """Windows and macOS have nothing of this."""
    program = ('import os, sys\n'
               'for name in ("fcntl", "resource", "pwd", "grp", "termios"): sys.modules[name] = None\n'
               'del os.fork\n'
               'import vmhost, hostagent, hostcheck, stompbroker, chirp, protocol\n')
    subprocess.check_call([sys.executable, '-c', program], cwd=TOP)


# --- start and stop ---

@pytest.mark.parametrize('words, found', [
    ([], ([], {})), (['a.ini'], (['a.ini'], {})), (['--check', 'a.ini'], (['a.ini'], {'--check': 'yes'})),
    (['--broker', 'here', 'a.ini'], (['a.ini'], {'--broker': 'here'})), (['--broker='], (['--broker='], {})),
    (['--broker=here'], ([], {'--broker': 'here'})), (['--broker'], (['--broker'], {}))])
def test_options(words, found):
    assert guestagent.split_options(words) == found


@pytest.mark.parametrize('text, found', [
    ('here', ('here', 1)), ('here:61613', ('here', 61613)), ('::1', ('::1', 1)), ('[::1]', ('::1', 1)),
    ('[::1]:2', ('::1', 2)), ('fe80::1:2', ('fe80::1:2', 1)), ('here:', None), ('here:x', None), (':5', None),
    ('here:0', None), ('here:99999', None), ('[::1]:', None)])
def test_where_the_broker_is(text, found):
    if found is None:
        with pytest.raises(agent.ConfigError, match='HOST:PORT'):
            guestagent.read_broker(text, 1)
    else:
        assert guestagent.read_broker(text, 1) == found


def test_a_dead_fork_server_is_replaced(tmp_path):
    with Host(tmp_path / 'host') as host, Agent(tmp_path / 'guest', host, 'g') as guest:
        with host.api as api:
            long = api.runCmd('g', 'sh', ['-c', 'sleep 2; echo still here'])
            wait_until(lambda: api.getCmdStatus(long)['state'] == 'running', 20)
        with open('/proc/%d/task/%d/children' % (guest.process.pid, guest.process.pid)) as children:
            os.kill(int(children.read().split()[0]), signal.SIGKILL)
        assert host.run('g', 'echo', 'hello')['out'] == 'hello\n'
        assert host.results(long)['out'] == 'still here\n'
        assert 'restarts itself' in guest.log()


@pytest.mark.parametrize('ini, words', [
    ('[VM]\nmax_comands = 3\n', '[VM] max_comands: unknown key'),
    ('[VM]\nkill_after = soon\n', '[VM] kill_after = soon: expected a duration'),
    ('[VMs]\n', '[VMs] is unknown'), ('no ini', 'no ini'),
    ('[VM]\nid = x\ndir_to_serve = /no/such/folder\n', '/no/such/folder')])
def test_a_wrong_configuration_is_one_sentence(ini, words, tmp_path):
    path = tmp_path / 'guest.ini'
    path.write_text(ini)
    done = subprocess.run([sys.executable, GUEST, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=60)
    assert done.returncode == 1 and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and 'Traceback' not in done.stderr


@pytest.mark.parametrize('told, host, port', [
    ('vmhost-port:40000\n', 'auto', 40000), ('vmhost-port:40000', '10.0.2.2', 61613), ('', 'auto', 61613),
    ('vmhost-port:0', 'auto', 61613), ('vmhost-port:99999', 'auto', 61613), ('Not Specified', 'auto', 61613)])
def test_a_vms_firmware_may_tell_the_brokers_port(told, host, port, tmp_path):
    path = tmp_path / 'chassis_serial'
    path.write_text(told)
    broker = types.SimpleNamespace(host=host, port=61613)
    assert guestidentity.find_broker_port(broker, str(path)) == port
    assert guestidentity.find_broker_port(broker, str(tmp_path / 'missing')) == 61613
