"""Faults by name: what follows from each, as the table in docs/protocol.md promises."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xmlrpc.client

import pytest
import run
from faultrig import HERE, Agent, Host, Proof, events, free_port
from helpers import wait_until

import agent

pytestmark = [pytest.mark.once, pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]
TOP = os.path.dirname(os.path.dirname(HERE))
LINUX = pytest.mark.skipif(not os.path.isdir('/proc/self/task'), reason='needs Linux\'s /proc')


def wait_for_state(host, cmd_id, state, timeout=20):
    with host.api as api:
        wait_until(lambda: api.getCmdStatus(cmd_id)['state'] == state, timeout)


# --- guests ---

def test_commands_go_on_without_their_agent_and_report_exact_usage(host, tmp_path):
    guest = Agent(tmp_path / 'guest', host, 'alone').start()
    try:
        with host.api as api:
            burn = 'import time; b = time.process_time()\nwhile time.process_time() - b < 1: pass'
            ids = [api.runCmd('alone', sys.executable, ['-c', burn]) for _ in range(2)]
        for cmd_id in ids:
            wait_for_state(host, cmd_id, 'running')
        guest.stop(signal.SIGKILL)
        wait_until(lambda: all(os.path.exists(os.path.join(guest.spool, cmd_id, 'result.json'))
                               for cmd_id in ids), 60)
        guest.start()
        for cmd_id in ids:
            results = host.results(cmd_id)
            used = results['resources']['ru_utime'] + results['resources']['ru_stime']
            assert results['state'] == 'exited' and 1 <= used < 1.5
    finally:
        guest.stop()


@LINUX
def test_a_killed_fork_server_begins_anew(host, tmp_path):
    with Agent(tmp_path / 'guest', host, 'forks') as guest:
        proof = Proof(tmp_path, 1.5)
        cmd_id = proof.ask(host, 'forks')
        wait_for_state(host, cmd_id, 'running')
        with open('/proc/%d/task/%d/children' % (guest.process.pid, guest.process.pid)) as children:
            os.kill(int(children.read().split()[0]), signal.SIGKILL)
        wait_until(lambda: 'restarts itself' in guest.log(), 20)
        wait_until(lambda: host.api.getVM('forks')['agent'] == 'alive', 20)
        proof.check(host.results(cmd_id))
        assert host.run('forks', 'echo', 'well', queue=True)['out'] == 'well\n'


@LINUX
def test_an_agent_that_is_stopped_while_it_begins_anew_stops(host, tmp_path):
    guest = Agent(tmp_path / 'guest', host, 'stopped-anew', beacon_interval=0.5)
    guest.faults = {'die': ['Agent.stop', 'before', 1], 'signal': int(signal.SIGTERM)}
    with guest:
        with open('/proc/%d/task/%d/children' % (guest.process.pid, guest.process.pid)) as children:
            os.kill(int(children.read().split()[0]), signal.SIGKILL)
        assert guest.process.wait(20) == 0 and guest.has_died(), guest.log()


def test_a_reboot_loses_what_was_unfinished(host, tmp_path):
    guest = Agent(tmp_path / 'guest', host, 'boots')
    guest.faults = {'boot': 'one'}
    guest.start()
    try:
        proof = Proof(tmp_path, 6)
        cmd_id = proof.ask(host, 'boots')
        wait_for_state(host, cmd_id, 'running')
        guest.stop(signal.SIGKILL)
        guest.faults = {'boot': 'two'}
        guest.start()
        results = host.results(cmd_id, 20)
        assert results['state'] == 'lost' and 'rebooted' in results['error']
        assert proof.runs() == 1
    finally:
        guest.stop()


def can_mount():
    return os.geteuid() == 0 and os.path.exists('/dev/loop-control') and shutil.which('mount')


class Disk:
    """A file system of its own in a file, mounted at a folder."""

    def __init__(self, folder, system, image):
        self.image, self.folder = str(image), str(folder)
        os.makedirs(self.folder, exist_ok=True)
        with open(self.image, 'wb') as file:
            file.truncate(400 << 20)           # what XFS wants at least
        call('mkfs.' + system, self.image)
        self.mount(self.image)

    def mount(self, image):
        call('mount', '-o', 'loop', image, self.folder)

    def unmount(self):
        wait_until(lambda: subprocess.call(['umount', self.folder], stderr=subprocess.DEVNULL) == 0, 20)


def call(*words):
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


CUT = """
echo ran >> "$1/proof"
cp --sparse=always "$1/disk" "$1/cutting"
mv "$1/cutting" "$1/cut"
while [ ! -e "$1/go" ]; do sleep 0.1; done
"""


@pytest.mark.once
@pytest.mark.skipif(not can_mount(), reason='needs root, and loop devices')
@pytest.mark.parametrize('system', ['ext4', 'xfs', 'btrfs'])
def test_what_ran_when_the_power_was_cut_is_lost(host, tmp_path, system):
    """The program copies the disk as it is: that is what the next boot finds."""
    if shutil.which('mkfs.' + system) is None:
        pytest.skip('needs mkfs.' + system)
    guest = Agent(tmp_path / 'guest', host, 'cut-' + system)
    try:
        disk = Disk(guest.state, system, tmp_path / 'disk')
    except subprocess.CalledProcessError as error:
        pytest.skip('a container, perhaps: %s' % error.stderr.decode(errors='replace').strip())
    try:
        guest.faults = {'boot': 'one'}
        guest.start()
        with host.api as api:
            cmd_id = api.runCmd(guest.id, 'sh', ['-c', CUT, 'sh', str(tmp_path)])
        wait_until(lambda: (tmp_path / 'cut').exists(), 60)
        guest.stop(signal.SIGKILL)
        (tmp_path / 'go').write_text('')
        disk.unmount()
        disk.mount(str(tmp_path / 'cut'))
        guest.faults = {'boot': 'two'}
        guest.start()
        results = host.results(cmd_id, 20)
        assert results['state'] == 'lost' and 'rebooted' in results['error']
        assert 'damaged' not in guest.log()
        assert (tmp_path / 'proof').read_text() == 'ran\n'
    finally:
        guest.stop()
        disk.unmount()


@LINUX
def test_a_lost_disk_is_told(host, tmp_path):
    """The guest comes back with an empty disk: what ran is lost, and isn't run again."""
    guest = Agent(tmp_path / 'guest', host, 'disk').start()
    try:
        proof = Proof(tmp_path, 2)
        cmd_id = proof.ask(host, 'disk')
        wait_until(lambda: any(event for event in events(host, cmd_id, 'cmd-running')), 20)
        guest.stop(signal.SIGKILL)
        shutil.rmtree(os.path.dirname(guest.spool))
        guest.start()
        results = host.results(cmd_id, 20)
        assert results['state'] == 'lost' and 'disk' in results['error']
        assert proof.runs() == 1
    finally:
        guest.stop()


def test_a_second_agent_of_one_id_is_turned_away(host, tmp_path):
    with Agent(tmp_path / 'first', host, 'twin') as first:
        second = Agent(tmp_path / 'second', host, 'twin').start(wait=False)
        third = Agent(tmp_path / 'third', host, 'twin', state_dir=first.state).start(wait=False)
        try:
            wait_until(lambda: 'another secret' in second.log(), 20)
            assert third.process.wait(20) == 1 and 'another vmguest with the id twin' in third.log()
            proof = Proof(tmp_path)
            proof.check(host.results(proof.ask(host, 'twin')))
            assert all(name.startswith('.') for name in os.listdir(second.spool))
        finally:
            second.stop()
            third.stop()


def test_another_version_over_the_running_one_loses_nothing(host, tmp_path):
    folder = tmp_path / 'newer'
    os.makedirs(str(folder))
    for name in (name for name in os.listdir(TOP) if name.endswith('.py')):
        with contextlib.suppress(FileNotFoundError), open(os.path.join(TOP, name), encoding='utf-8') as file:
            text = file.read().replace("VERSION = '%s'" % agent.VERSION, "VERSION = '99.9.9'")
            (folder / name).write_text(text, encoding='utf-8')
    guest = Agent(tmp_path / 'guest', host, 'upgrade').start()
    newer = None
    try:
        proof = Proof(tmp_path, 1.5)
        cmd_id = proof.ask(host, 'upgrade')
        wait_for_state(host, cmd_id, 'running')
        guest.stop()
        newer = subprocess.Popen([sys.executable, str(folder / 'vmguest.py'), guest.ini],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        proof.check(host.results(cmd_id))
        with host.api as api:
            assert api.getVM('upgrade')['facts']['version'] == '99.9.9'
    finally:
        guest.stop()
        if newer is not None:
            newer.terminate()
            newer.wait(20)


# --- damage ---

def test_damaged_spool_folders_are_set_aside(host, tmp_path):
    """Torn request.json, result.json, process.json, and a folder that isn't one: the rest goes on."""
    guest = Agent(tmp_path / 'guest', host, 'torn').start()
    try:
        proofs = {}
        for name in ('request.json', 'result.json', 'process.json', 'nothing'):
            os.makedirs(str(tmp_path / name))
            proof = Proof(tmp_path / name, 4)           # nothing ends before the agent is killed
            proofs[name] = proof, proof.ask(host, 'torn')
        for _, cmd_id in proofs.values():
            wait_for_state(host, cmd_id, 'running')
        guest.stop(signal.SIGKILL)
        wait_until(lambda: all(os.path.exists(os.path.join(guest.spool, cmd_id, 'result.json'))
                               for _, cmd_id in proofs.values()), 20)
        for name in ('request.json', 'result.json', 'process.json'):
            with open(os.path.join(guest.spool, proofs[name][1], name), 'w') as file:
                file.write('{"torn": ')
        with open(os.path.join(guest.spool, 'no-folder'), 'w') as file:
            file.write('x')
        guest.start()
        for name in ('process.json', 'nothing'):
            proofs[name][0].check(host.results(proofs[name][1]))
        for name in ('request.json', 'result.json'):
            results = host.results(proofs[name][1])
            assert results['state'] == 'lost' and results['error'], results
            assert proofs[name][0].runs() == 1
        assert guest.log().count('set aside') == 2
        assert host.run('torn', 'echo', 'well')['out'] == 'well\n'
    finally:
        guest.stop()


def test_a_spool_of_a_newer_agent_is_refused(host, tmp_path):
    guest = Agent(tmp_path / 'guest', host, 'newer')
    folder = os.path.join(guest.spool, 'a-command')
    os.makedirs(folder)
    request = {'format': 99, 'cmd-id': 'a-command'}
    with open(os.path.join(folder, 'request.json'), 'w') as file:
        json.dump(request, file)
    guest.start(wait=False)
    assert guest.process.wait(20) == 1
    assert 'newer vmguest' in guest.log() and 'Traceback' not in guest.log()
    with open(os.path.join(folder, 'request.json')) as file:
        assert json.load(file) == request


def test_a_damaged_journal_is_set_aside_and_results_are_orphans(tmp_path):
    host = Host(tmp_path / 'host').start()
    guest = Agent(tmp_path / 'guest', host, 'g')
    try:
        guest.start()
        proof = Proof(tmp_path, 1.5)
        cmd_id = proof.ask(host, 'g')
        wait_for_state(host, cmd_id, 'running')
        host.stop(signal.SIGKILL)
        path = os.path.join(host.state, 'journal.sqlite')
        for suffix in ('-wal', '-shm'):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path + suffix)
        with open(path, 'r+b') as file:
            file.write(b'no journal' * 1000)
        host.start()
        assert 'set aside' in host.log()
        # With the journal the guests' secrets are gone: the guest trusts this host once it is told to.
        wait_until(lambda: 'knows no secret of g' in guest.log(), 20)
        guest.stop()
        os.remove(os.path.join(guest.state, 'g.host'))
        guest.start()
        wait_until(lambda: events(host, cmd_id, 'orphan-result'), 20)
        with host.api as api:
            proof.check(api.getCmdResults(cmd_id))
        wait_until(lambda: os.path.exists(os.path.join(guest.spool, cmd_id, 'acked')), 20)
    finally:
        guest.stop()
        host.stop()


def test_a_restored_journal_asks_again_for_results_that_were_acknowledged(tmp_path):
    host = Host(tmp_path / 'host')
    host.faults = {'set': {'RETRY_DELAYS': [0.5]}}
    host.start()
    guest = Agent(tmp_path / 'guest', host, 'g')
    try:
        guest.start()
        proof = Proof(tmp_path, 0.5)
        cmd_id = proof.ask(host, 'g')
        wait_until(lambda: events(host, cmd_id, 'cmd-running'), 20)
        host.stop(signal.SIGKILL)
        copy = str(tmp_path / 'copy')
        shutil.copytree(host.state, copy, ignore=shutil.ignore_patterns('*.sock'))
        host.start()
        proof.check(host.results(cmd_id))
        wait_until(lambda: os.path.exists(os.path.join(guest.spool, cmd_id, 'acked')), 20)
        host.stop(signal.SIGKILL)
        shutil.rmtree(host.state)
        shutil.copytree(copy, host.state)
        host.start()
        proof.check(host.results(cmd_id))
    finally:
        guest.stop()
        host.stop()


def wait_until_emptied(guest, cmd_id):
    wait_until(lambda: os.listdir(os.path.join(guest.spool, cmd_id)) == [], 20)


def test_a_guest_clock_that_jumps_forgets_no_command(tmp_path):
    """So that a host whose journal was restored to before a command's end has it run only once."""
    host = Host(tmp_path / 'host')
    host.faults = {'die': ['Control.publish', 'after', 1]}
    host.start()
    guest = Agent(tmp_path / 'guest', host, 'g', keep_spool=0)
    clock = run.Clock(str(tmp_path / 'guest'))
    guest.faults = {'clock': clock.path, 'set': {'HOUSEKEEPING_EVERY': 0.1}}
    try:
        guest.start()
        proof = Proof(tmp_path)
        proof.ask(host, 'g')
        host.wait_for_death()
        shutil.copytree(host.state, str(tmp_path / 'copy'), ignore=shutil.ignore_patterns('*.sock'))
        host.start()
        with host.api as api:
            cmd_id = api.listCmds()[0]['cmdId']
        proof.check(host.results(cmd_id))
        wait_until_emptied(guest, cmd_id)
        clock.set(30e6)
        for _ in range(3):          # so that the agent has been through all of its spool once more
            other = host.api.runCmd('g', 'true')
            host.results(other)
            wait_until_emptied(guest, other)
        host.stop(signal.SIGKILL)
        shutil.rmtree(host.state)
        shutil.move(str(tmp_path / 'copy'), host.state)
        host.start()
        results = host.results(cmd_id)
        assert results['state'] == 'lost' and 'isn\'t run again' in results['error'] and proof.runs() == 1
    finally:
        guest.stop()
        host.stop()


def test_a_host_that_starts_with_a_wrong_clock_lets_no_result_go(tmp_path):
    host = Host(tmp_path / 'host')
    clock = run.Clock(str(tmp_path / 'host'))
    host.faults = {'clock': clock.path, 'set': {'HOUSEKEEPING_EVERY': 0.5}}
    with host, Agent(tmp_path / 'guest', host, 'g') as guest:
        cmd_id = host.api.runCmd('g', 'echo', ['kept'])
        host.results(cmd_id)
        host.stop()
        clock.set(30e6)
        host.start()
        wait_until(guest.has_joined, 20)
        with host.api as api:           # a state is journalled by the tick that lets results go
            other = api.runCmd('g', 'sleep', ['600'])
            wait_until(lambda: any(event['type'] == 'cmd-running' and event['cmdId'] == other
                                   for event in api.getEvents(-100, 0)['events']), 20)
            api.signalCmd(other, 'KILL')
            host.results(other)
            assert api.getCmdResults(cmd_id)['out'] == 'kept\n'
        assert 'nothing is deleted' in host.log()


# --- limits ---

def test_results_fit_into_what_the_host_takes(tmp_path):
    """max_frame is smaller than the output that a guest would send, and than its list of commands."""
    with Host(tmp_path / 'host', broker={'max_frame': '24K'}) as host:
        guest = Agent(tmp_path / 'guest', host, 'g', inline_output='256K')
        guest.faults = {'set': {'HELLO_LIMIT': 500}}
        check_small_words(tmp_path, host, guest)


def check_small_words(tmp_path, host, guest):
    with guest:
        program = 'import os; os.write(1, bytes(range(256)) * 2000)'
        with host.api as api:
            cmd_id = api.runCmd('g', sys.executable, ['-c', program])
            results = host.results(cmd_id)
            assert results['out-size'] == 512000 and results['out-offset'] > 0
            part = api.getCmdOutput(cmd_id, 'out', 1, 256 * 1024)
            data = part['data'].data
            assert data and (bytes(range(256)) * 2000)[1:].startswith(data)
            gate = str(tmp_path / 'gate')
            ids = [api.runCmd('g', 'sh', ['-c', 'until [ -e "$1" ]; do sleep 1; done', 'sh', gate])
                   for _ in range(20)]
            wait_until(lambda: api.listCmds({'state': 'running', 'limit': 1000})[19:], 60)
        guest.stop(signal.SIGKILL)
        with open(gate, 'w'):
            guest.start()
        assert {host.results(cmd_id, 120)['state'] for cmd_id in ids} == {'exited'}


def test_output_that_was_let_go_is_a_clear_fault(host, tmp_path):
    guest = Agent(tmp_path / 'guest', host, 'gone', keep_spool=0, inline_output=10)
    guest.faults = {'set': {'HOUSEKEEPING_EVERY': 0.2}}
    with guest:
        cmd_id = host.api.runCmd('gone', 'sh', ['-c', 'seq 1000'])
        host.results(cmd_id)
        wait_until_emptied(guest, cmd_id)
        begin = time.monotonic()
        try:
            part = host.api.getCmdOutput(cmd_id, 'out', 0, 100)
            assert part['data'].data.startswith(b'1\n2\n')      # it was fetched before
        except xmlrpc.client.Fault as fault:
            assert 'deleted' in fault.faultString
        assert time.monotonic() - begin < 4


# --- full disks ---

@contextlib.contextmanager
def small_disk(folder, size):
    if not run.mount_small_disk(str(folder), size):
        pytest.skip('only root can mount a small disk')
    try:
        yield str(folder)
    finally:
        subprocess.call(['umount', '-l', str(folder)])


def test_a_full_guest_disk_fails_the_command_with_that_error(host, tmp_path):
    with small_disk(tmp_path / 'guest' / 'state', '8M') as disk, \
            Agent(tmp_path / 'guest', host, 'full') as guest:
        os.makedirs(str(tmp_path / 'safe'))
        safe = Proof(tmp_path / 'safe', 1)
        safe_id = safe.ask(host, 'full')
        wait_for_state(host, safe_id, 'running')
        with run.full(disk):
            proof = Proof(tmp_path)
            results = host.results(proof.ask(host, 'full'))
            assert results['state'] == 'failed' and 'No space left' in results['error']
            assert proof.runs() == 0
            results = host.results(safe_id)          # its result has had its room from the begin
            assert results['state'] in ('exited', 'failed') and safe.runs() == 1
        results = host.run('full', 'sh', '-c', 'head -c 20000000 /dev/zero')
        assert results['state'] == 'failed' and 'No space left' in results['error']
        with host.api as api:
            api.getVM('full')
        assert host.run('full', 'echo', 'x')['state'] in ('failed', 'exited')
        assert guest.process.poll() is None


def test_a_full_host_disk_refuses_commands_and_keeps_results_in_the_guests(tmp_path):
    with small_disk(tmp_path / 'host' / 'vmhost-state', '8M'), Host(tmp_path / 'host') as host:
        guest = Agent(tmp_path / 'guest', host, 'g')
        guest.faults = {'set': {'RESEND_EVERY': 1.0}}
        with guest:
            proof = Proof(tmp_path, 1)
            cmd_id = proof.ask(host, 'g')
            wait_for_state(host, cmd_id, 'running')
            with run.full(host.state):
                fill_journal(host)
                with pytest.raises(xmlrpc.client.Fault, match='full'), host.api as api:
                    api.runCmd('g', 'true')
                wait_until(lambda: os.path.exists(os.path.join(guest.spool, cmd_id, 'result.json')), 20)
                with host.api as api:
                    assert api.ping('g') == 'PONG from g'
                    assert api.getCmdResults(cmd_id) == ''
            proof.check(host.results(cmd_id))
            assert host.run('g', 'echo', 'well')['out'] == 'well\n'


def test_output_that_a_full_host_disk_can_not_take_stays_in_the_guest(tmp_path):
    """It is fetched into a file; nothing is acknowledged before that is whole."""
    with small_disk(tmp_path / 'host' / 'vmhost-state', '8M'), Host(tmp_path / 'host') as host:
        guest = Agent(tmp_path / 'guest', host, 'g')
        guest.faults = {'set': {'RESEND_EVERY': 0.5}}
        with guest, host.api as api:
            program = 'until test -e go; do sleep 0.1; done; yes | head -c 2000000'
            cmd_id = api.runCmd('g', 'sh', ['-c', program])
            wait_for_state(host, cmd_id, 'running')
            with run.full(host.state):
                open(os.path.join(guest.files, 'go'), 'w').close()
                folder = os.path.join(guest.spool, cmd_id)
                wait_until(lambda: os.path.exists(os.path.join(folder, 'result.json')), 20)
                wait_until(lambda: len(FULL.findall(host.log())) >= 2, 60)
                assert not os.path.exists(os.path.join(folder, 'acked'))
                assert api.ping('g') == 'PONG from g'
            results = host.results(cmd_id)
            assert (results['state'], results['out-size']) == ('exited', 2000000)
            wait_until(lambda: os.path.exists(os.path.join(folder, 'acked')), 20)
            told = api.getCmdOutput(cmd_id, 'out', 1999990)
            assert (told['size'], told['data'].data) == (2000000, b'y\n' * 5)


FULL = re.compile('disk is full|No space left')


def fill_journal(host):
    """The log of the journal may have had room left."""
    with host.api as api:
        for _ in range(5000):
            try:
                api.runCmd('g', 'true', ['x' * 7000])
            except xmlrpc.client.Fault:
                return


# --- hosts and brokers ---

def test_a_host_that_was_down_for_an_hour_of_guest_time(tmp_path):
    host = Host(tmp_path / 'host').start()
    guest = Agent(tmp_path / 'guest', host, 'g', keep_spool=10)
    clock = run.Clock(str(tmp_path / 'guest'))
    guest.faults = {'clock': clock.path, 'set': {'HOUSEKEEPING_EVERY': 0.2}}
    try:
        guest.start()
        proof = Proof(tmp_path, 1)
        cmd_id = proof.ask(host, 'g')
        wait_for_state(host, cmd_id, 'running')
        host.stop(signal.SIGKILL)
        wait_until(lambda: os.path.exists(os.path.join(guest.spool, cmd_id, 'result.json')), 20)
        clock.set(3600.0, 3600.0)
        time.sleep(0.5)             # the guest's hour
        host.start()
        proof.check(host.results(cmd_id, 60))
    finally:
        guest.stop()
        host.stop()


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.once
def test_a_broker_that_bounces(tmp_path):
    """Killed 30 times; with VMHOST_FULL=1 100 times, in half a minute where nothing else has to be done."""
    port, broker = free_port(), None
    words = [sys.executable, os.path.join(TOP, 'stompbroker.py'), '--host', '127.0.0.1', '--port', str(port)]

    def start():
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert b'listening' in process.stdout.readline()
        return process

    def stop(process):
        process.kill()
        process.wait()
        process.stdout.close()

    broker = start()
    host = Host(tmp_path / 'host', broker={'embedded': 'no', 'host': '127.0.0.1', 'port': port})
    try:
        with host, Agent(tmp_path / 'guest', host, 'g'):
            proofs = []
            for number in range(100 if os.environ.get('VMHOST_FULL') else 30):
                os.makedirs(str(tmp_path / str(number)))
                proof = Proof(tmp_path / str(number), 0.2 * (number % 5))
                proofs.append((proof, proof.ask(host, 'g', queue=True)))
                begin = time.monotonic()
                stop(broker)
                broker = start()
                time.sleep(max(0, begin + 0.3 - time.monotonic()))      # the rate is what is tried
            for proof, cmd_id in proofs:
                proof.check(host.results(cmd_id, 120))
    finally:
        stop(broker)


def test_a_host_that_slept_forgives(tmp_path):
    clock = run.Clock(str(tmp_path / 'host'))
    host = Host(tmp_path / 'host', vm_gc_grace=3)
    host.faults = {'clock': clock.path}
    with host, Agent(tmp_path / 'guest', host, 'g'):
        for wall, sleep in ((3600.0, 3600.0), (90000.0, 0.0)):
            clock.set(wall, sleep)
            proof = Proof(tmp_path)
            host.results(proof.ask(host, 'g'))
        host.process.send_signal(signal.SIGSTOP)
        time.sleep(5)               # longer than the guest may be silent
        host.process.send_signal(signal.SIGCONT)
        assert host.run('g', 'echo', 'well')['out'] == 'well\n'
        with host.api as api:
            types = [event['type'] for event in api.getEvents(0, 0)['events']]
        assert not {'guest-late', 'guest-lost'} & set(types)
        wait_until(lambda: 'clock jumped' in host.log(), 20)


def test_a_paused_vm_is_suspended_and_not_lost(tmp_path):
    """Its processes are stopped, as VirtualBox does it, for longer than the grace and the heart-beats."""
    state = str(tmp_path / 'state')

    def become(text):
        with open(state + '.new', 'w') as file:
            file.write(text)
        os.rename(state + '.new', state)

    become('running')
    vm = '08:00:27:00:00:01'
    host = Host(tmp_path / 'host', broker={'heartbeat': 1, 'host': '127.0.0.1'}, vm_gc_grace=3)
    host.faults = {'vm_state': state}
    with host, Agent(tmp_path / 'guest', host, vm, broker={'heartbeat': 1}) as guest, host.api as api:
        proof = Proof(tmp_path, 1)
        cmd_id = proof.ask(host, vm)
        wait_for_state(host, cmd_id, 'running')
        become('paused')
        guest.process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(5)       # after 4.5 s it would be off the list
            assert api.getCmdStatus(cmd_id)['state'] == 'suspended'
            assert api.listCmds({'cmdId': cmd_id})[0]['state'] == 'suspended'
        finally:
            guest.process.send_signal(signal.SIGCONT)
        become('running')
        proof.check(host.results(cmd_id))
        types = {event['type'] for event in api.getEvents(0, 0)['events']}
        assert 'guest-lost' not in types        # late it may be: its link has to come up again


def test_the_journal_is_an_audit_trail(host, tmp_path):
    with Agent(tmp_path / 'guest', host, 'audit'), host.api as api:
        cmd_id = api.runCmd('audit', 'sleep', ['60'])
        wait_until(lambda: events(host, cmd_id, 'cmd-running'), 20)
        api.signalCmd(cmd_id, 'KILL')
        host.results(cmd_id)
        with pytest.raises(xmlrpc.client.Fault):
            api.powerOff('audit')
        api.forgetCmd(cmd_id)
        texts = {type: events(host, cmd_id, type) for type in (
            'cmd-submitted', 'cmd-running', 'asked', 'cmd-finished', 'cmd-forgotten')}
        assert {type: len(found) for type, found in texts.items()} == {
            'cmd-submitted': 1, 'cmd-running': 1, 'asked': 2, 'cmd-finished': 1, 'cmd-forgotten': 1}
        assert texts['cmd-submitted'][0]['text'] == 'by vmhost@127.0.0.1: sleep 60'
        assert texts['cmd-finished'][0]['text'] == 'signaled 9' and texts['cmd-finished'][0]['vm'] == 'audit'
        assert texts['asked'][0]['text'].startswith("by vmhost@127.0.0.1: signalCmd('")
        refused = [event for event in events(host, '', 'refused') if event['vm'] == 'audit']
        assert len(refused) == 1 and 'powerOff' in refused[0]['text'] and 'fault 9' in refused[0]['text']
