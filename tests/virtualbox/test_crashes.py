"""VBoxSVC, VM or host die, or another program holds the lock: nothing is destroyed, and it goes on."""

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from agents import Agent
from helpers import wait_until
from rig import facts, manage, state_of, try_manage, vboxsvc, vm_process
from vms import VMHost, command_line, fault_of, kill

FULL = os.environ.get('VMHOST_FULL')
SMALL = {'memory': 16, 'diskSize': 4}
HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture
def vm(api, remove_all):
    api.createVM('victim', '', SMALL)
    return 'victim'


def test_vboxsvc_killed_under_the_host(host, api, vm):
    for _ in range(3):
        kill(wait_until(vboxsvc, 60))          # the one that was begun after the last
        assert vm in api.listVMs()
    assert api.start(vm) is True
    assert api.getState(vm) == 'Running'


def test_vboxsvc_killed_while_a_vm_runs(host, api, vm):
    host.wait_for_event('vm-added', vm)
    before = host.last_event()
    api.start(vm)
    after = host.wait_for_event('vm-state', vm, before, text='Running')['seq']
    kill(vboxsvc())
    assert vm in api.listVMs()
    wait_until(lambda: api.getState(vm) in ('Aborted', 'PoweredOff'), 30)
    assert host.wait_for_event('vm-state', vm, after)['text'] in ('Aborted', 'PoweredOff')
    assert api.start(vm) is True
    assert api.listSnapshots(vm) == []


@pytest.mark.skipif(not FULL, reason='takes a minute, for XPCOM waits so long: VMHOST_FULL=1')
def test_vboxsvc_killed_in_the_middle_of_a_change(host, api, vm):
    """The call says so, or was done; nothing is begun twice, and the next call works."""
    answers = []
    with host.api as other:
        starter = threading.Thread(target=lambda: answers.append(fault_of(other.start, vm)))
        starter.start()
        wait_until(lambda: vm_process(vm), 20)
        kill(vboxsvc())
        starter.join(90)
    assert not starter.is_alive()
    assert answers[0][0] in (0, 5), answers
    wait_until(lambda: api.getState(vm) in ('Aborted', 'PoweredOff', 'Running'), 30)
    if api.getState(vm) == 'Running':
        api.powerOff(vm)
    assert api.start(vm) is True


def test_the_driver_process_killed(host, api, vm):
    before = host.driver_pid()
    kill(before)
    assert vm in api.listVMs()
    assert host.driver_pid() != before
    assert api.start(vm) is True


def test_a_vm_process_killed(host, api, vm, tmp_path):
    api.start(vm)
    with Agent(tmp_path, host, api.getVM(vm)['id']):
        wait_until(lambda: api.listRegisteredVMs() == [vm])
        running = api.runCmd(vm, 'sleep', ['1000'])
        wait_until(lambda: api.getCmdStatus(running)['state'] == 'running')
        after, begun = host.last_event(), time.monotonic()
        kill(vm_process(vm))
        event = host.wait_for_event('vm-aborted', vm, after)
        assert time.monotonic() - begun < 5 and 'Running' in event['text']
        assert api.getState(vm) == 'Aborted'
        wait_until(lambda: api.getCmdStatus(running, False)['state'] == 'lost')
        results = api.getCmdResults(running)
        assert (results['state'], results['exitCodeOrSignal'], results['finished']) == ('lost', -1, False)
        assert 'process died' in results['error']
    assert api.start(vm) is True
    assert api.getState(vm) == 'Running'


def test_a_vm_killed_while_the_host_was_away(home, vm, api, tmp_path):
    with VMHost(tmp_path) as other:
        with other.api as its_api:
            its_api.start(vm)
        other.stop(signal.SIGKILL)
        kill(vm_process(vm))
        wait_until(lambda: state_of(vm) == 'aborted', 20)
        other.start()
        with other.api as its_api:
            assert its_api.getState(vm) == 'Aborted'
            assert its_api.start(vm) is True


def all_there_is(home, image):
    """VMs, the files in their folder, and the disks but for the image, which nobody made here."""
    files = [os.path.join(folder, name) for folder, _, names in os.walk(os.path.join(home, 'vms'))
             for name in names]
    disks = set(re.findall('Location: +(.*)', manage('list', 'hdds'))) - {image}
    return manage('list', 'vms'), disks, sorted(files)


@pytest.fixture
def foreign(remove_all, tmp_path):
    """A VM and a disk that aren't ours."""
    disk = str(tmp_path / 'foreign.vdi')
    manage('createvm', '--name', 'foreign', '--ostype', 'Linux_64', '--register')
    manage('createmedium', 'disk', '--filename', disk, '--size', '4')
    yield
    manage('closemedium', 'disk', disk, '--delete')


@pytest.mark.parametrize('kind', ['.vdi', '.ova'])
@pytest.mark.parametrize('dead', ['host', 'host and driver', 'all'])
def test_the_host_killed_while_it_makes_a_vm(home, foreign, appliance, tmp_path, dead, kind):
    """The next one finds what is left of it, takes that away when it is told to, and nothing else."""
    image = appliance + kind
    before, server, removed = all_there_is(home, image), vboxsvc(), []
    with VMHost(tmp_path) as other:
        with other.api as maker, other.api as api:
            making = threading.Thread(target=fault_or_end_of, args=(maker.createVM, 'half', image))
            making.start()
            wait_until(lambda: is_in_the_middle(api), 60)
            os.kill(server, signal.SIGSTOP)
            assert is_in_the_middle(api)
            driver = other.driver_pid()
            for pid in {'host': [], 'host and driver': [driver], 'all': [driver, server]}[dead]:
                os.kill(pid, signal.SIGKILL)
            other.stop(signal.SIGKILL)
            if dead != 'all':
                os.kill(server, signal.SIGCONT)
            making.join(20)
        wait_until(lambda: not command_line(driver), 60)
        other.start()
        with other.api as api:
            def is_clean():
                removed.extend(api.cleanup(False))
                return all_there_is(home, image) == before
            wait_until(is_clean, 60, 0.2)
            # Where VirtualBox died as well, nothing of it may have been written down.
            assert (removed or dead == 'all') and all('half' in row['name'] for row in removed)
            assert api.cleanup() == []
    try_manage('closemedium', 'disk', image)


def is_in_the_middle(api):
    """Whether the disk of a new VM is being written."""
    return [job for job in api.agentInfo()['jobs'] if job['text'] in ('importing', 'copying the disk')]


def fault_or_end_of(call, *args):
    """Calls, whatever becomes of it: the other side dies meanwhile."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        fault_of(call, *args)


@contextlib.contextmanager
def locked(vm):
    """Another program holds the VM's lock; gives what lets it go."""
    holder = subprocess.Popen([sys.executable, os.path.join(HERE, 'lock_holder.py'), vm],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b'locked\n'
        yield lambda: (holder.stdin.close(), holder.wait(20))
    finally:
        if not holder.stdin.closed:
            holder.stdin.close()
        holder.wait(20)
        holder.stdout.close()


def test_a_lock_that_another_program_holds(home, vm, tmp_path):
    disk = next(value for value in facts(vm).values() if value.endswith('.vdi'))
    manage('snapshot', vm, 'take', 'base')
    with VMHost(tmp_path, hypervisor={'command_timeout': '1'}) as host, host.api as api:
        with locked(vm):
            for method, args in (('start', ()), ('takeSnapshot', ('s',)), ('restoreSnapshot', ()),
                                 ('deleteSnapshot', ('base',)), ('setLimits', ({'cpuPercent': 50},)),
                                 ('removeVM', (True,)), ('remoteDesktop', ())):
                begun = time.monotonic()
                code, text = fault_of(getattr(api, method), vm, *args)
                assert code == 10 and vm in text, '%s: %s %s' % (method, code, text)
                assert 0.8 < time.monotonic() - begun < 20, method
            assert api.getState(vm) == 'PoweredOff' and api.listSnapshots(vm) == ['base']
            assert api.getVM(vm)['name'] == vm
            assert api.cleanup(False) == []
        assert os.path.exists(disk)
        assert api.start(vm) is True


def test_a_lock_that_is_let_go_in_time(api, vm):
    with locked(vm) as let_go, contextlib.ExitStack() as stack:
        timer = threading.Timer(1.5, let_go)
        timer.start()
        stack.callback(timer.join)
        assert api.start(vm) is True
    assert api.getState(vm) == 'Running'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_the_host_restarted_while_vms_run(home, vm, api, tmp_path, number):
    with VMHost(tmp_path / 'host', broker={'port': free_port()}) as other:
        with other.api as its_api:
            its_api.start(vm)
            process = vm_process(vm)
            with Agent(tmp_path / 'agent', other, its_api.getVM(vm)['id']):
                wait_until(lambda: its_api.listRegisteredVMs() == [vm])
                os.mkfifo(str(tmp_path / 'agent' / 'files' / 'gate'))
                cmd_id = its_api.runCmd(vm, 'sh', ['-c', 'echo begun; read line < gate; echo ended'])
                driver = other.driver_pid()
                other.stop(number)
                wait_until(lambda: not command_line(driver), 20)
                other.start()
                with other.api as new_api:
                    assert new_api.getState(vm) == 'Running' and vm in new_api.listRunningVMs()
                    wait_until(lambda: new_api.listRegisteredVMs() == [vm], 60)
                    with open(str(tmp_path / 'agent' / 'files' / 'gate'), 'w') as gate:
                        gate.write('\n')
                    results = other.results(cmd_id)
                    assert (results['out'], results['exitCodeOrSignal']) == ('begun\nended\n', 0)
                    assert vm_process(vm) == process
                    assert new_api.powerOff(vm) is True


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]
