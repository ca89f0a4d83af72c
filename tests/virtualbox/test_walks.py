"""Random walks of 20 calls over one VM: each answer is the one the model expects, and in the end
VBoxManage sees what the model and the API say. And walks over two VMs with a chaos beside them, to which it
belongs that their disk fills: lists answer at once, nothing foreign is touched, and in the end all agree.
VMHOST_WALKS says how many of each, VMHOST_WALK_SEED where to begin."""

import contextlib
import glob
import os
import random
import re
import shutil
import subprocess
import sys
import time

import pytest
from helpers import beside, others_take, wait_until
from rig import AS_VBOXMANAGE_SAYS, Refused, facts, manage, stopped, vboxsvc, vm_process
from test_trouble import lists_are_asked
from vm_cases import CHANGES
from vms import fault_of, kill

from driverprocesses import LIST_PATIENCE

WALKS = int(os.environ.get('VMHOST_WALKS') or 1)
SEED = int(os.environ.get('VMHOST_WALK_SEED') or 0)
CALLS = 20


class Model:
    """What state and snapshots a VM should have."""

    def __init__(self):
        self.state = 'PoweredOff'
        self.snapshots = {}     # name: (parent, has saved memory)
        self.current = ''

    def expect(self, method, name):
        """Does it; gives the fault that it should end with, 0 for none."""
        if method in ('takeSnapshot', 'deleteSnapshot', 'restoreSnapshot'):
            return getattr(self, method)(name)
        after = CHANGES[method].get(self.state)
        if after is None:
            return 4
        self.state = after
        return 0

    def takeSnapshot(self, name):
        if name in self.snapshots:
            return 8
        self.snapshots[name] = (self.current, self.state in ('Running', 'Paused', 'Saved'))
        self.current = name
        return 0

    def deleteSnapshot(self, name):
        if name not in self.snapshots:
            return 5
        children = [each for each, (parent, _) in self.snapshots.items() if parent == name]
        if len(children) > 1 or (children and name == self.current):
            return 4
        parent, _ = self.snapshots.pop(name)
        for child in children:
            self.snapshots[child] = (parent, self.snapshots[child][1])
        if self.current == name:
            self.current = parent
        return 0

    def restoreSnapshot(self, name):
        if self.state in ('Running', 'Paused'):
            return 4
        if name not in self.snapshots:
            return 5
        self.current = name
        self.state = 'Saved' if self.snapshots[name][1] else 'PoweredOff'
        return 0


def a_call(chance):
    """A method and its further arguments."""
    method = chance.choice([
        'start', 'start', 'reset', 'powerOff', 'pause', 'resume', 'saveState', 'discardState', 'takeSnapshot',
        'takeSnapshot', 'deleteSnapshot', 'restoreSnapshot', 'kill'])
    return method, [chance.choice('abc')] if method.endswith('Snapshot') else []


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(SEED, SEED + WALKS))
def test_a_walk(host, api, remove_all, seed):
    chance = random.Random(seed)
    vm = 'walk-%d' % seed
    api.createVM(vm, '', {'memory': 16, 'diskSize': 4})
    model, done = Model(), []
    for _ in range(CALLS):
        method, args = a_call(chance)
        done.append((method, args))
        if method == 'kill':
            crash(api, vm, model)
        else:
            expected = model.expect(method, args[0] if args else '')
            code, answer = fault_of(getattr(api, method), vm, *args)
            state = api.getState(vm)
            if (code, state) != (expected, model.state):
                assert has_crashed(vm, model), '%s: %s %s, and it is %s' % (done, code, answer, state)
                return
    assert facts(vm)['VMState'] == AS_VBOXMANAGE_SAYS[model.state] or has_crashed(vm, model), done
    assert snapshots_of(vm) == {name: parent for name, (parent, _) in model.snapshots.items()}, done
    assert sorted(api.listSnapshots(vm)) == sorted(model.snapshots)


def has_crashed(vm, model):
    """Whether the VM's process died by itself: the rig's interpreter has a segmentation fault after one
    restored state in thirty. Which calls and states follow from that, no model can tell."""
    return model.state in ('Running', 'Paused', 'PoweredOff', 'Saved') and 'aborted' in facts(vm)['VMState']


def crash(api, vm, model):
    """Kills the VM's process, where it has one."""
    if model.state in ('Running', 'Paused'):
        kill(vm_process(api.getVM(vm)['uuid']))
        model.state = 'Aborted'
        wait_until(lambda: api.getState(vm) == 'Aborted', 20)


def snapshots_of(vm):
    """{name: name of its parent}, as VBoxManage says."""
    if facts(vm).get('SnapshotName') is None:
        return {}
    names = dict(re.findall(r'^SnapshotName((?:-\d+)*)="(.*)"$', manage(
        'snapshot', vm, 'list', '--machinereadable'), re.MULTILINE))
    return {name: names.get(path.rpartition('-')[0], '') if path else '' for path, name in names.items()}


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 30 MB."""
    folder = str(tmp_path / 'small')
    os.mkdir(folder)
    subprocess.check_call(['mount', '-t', 'tmpfs', '-o', 'size=30m', 'small', folder])
    yield folder
    subprocess.check_call(['umount', '--lazy', folder])


class Chaos:
    """Another tool, and an unkind machine, that do something to a VM at each `act`. ``vms``: {uuid: its two
    names}; ``folder``: on the disk where they are."""

    def __init__(self, chance, host, vms, folder):
        self.chance, self.host, self.vms, self.folder = chance, host, vms, folder
        self.acts = [self.power_off, self.stop, self.kill, self.lock, self.describe, self.rename,
                     self.unregister, self.fill]
        self.done = []

    def act(self):
        act, vm = self.chance.choice(self.acts), self.chance.choice(sorted(self.vms))
        self.done.append((act.__name__, vm))
        with contextlib.suppress(Refused, ProcessLookupError,       # of a VM that is on its way
                                 subprocess.TimeoutExpired):        # or for which VirtualBox waits for ever
            act(vm)
        time.sleep(self.chance.uniform(0, 0.5))

    def power_off(self, vm):
        """Given up after some time: under a live snapshot both wait for one another for ever."""
        other = subprocess.Popen(['VBoxManage', 'controlvm', vm, 'poweroff'], stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            other.wait(10)
        other.kill()
        other.wait()

    def a_process(self, vm):
        """Mostly the VM's own; or VirtualBox's, or a driver's; None where there is none."""
        kind = self.chance.choice(['vm'] * 5 + ['VBoxSVC', 'watcher', 'worker'])
        self.done.append(kind)
        if kind in ('vm', 'VBoxSVC'):
            return vm_process(vm) if kind == 'vm' else vboxsvc()
        return next(iter(self.host.driver_pids(kind)), None)

    def stop(self, vm):
        pid = self.a_process(vm)
        if pid:
            with stopped(pid):
                time.sleep(self.chance.uniform(0.5, 3))

    def kill(self, vm):
        pid = self.a_process(vm)
        if pid:
            kill(pid)

    def lock(self, vm):
        program = os.path.join(os.path.dirname(__file__), 'lock_holder.py')
        holder = subprocess.Popen([sys.executable, program, vm],
                                  stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(1)
        with contextlib.suppress(BrokenPipeError):
            holder.stdin.close()
        holder.wait(120)

    def describe(self, vm):
        manage('modifyvm', vm, '--description', 'chaos')

    def rename(self, vm):
        """To its other name, which it keeps; the folder on the small disk, too."""
        now = facts(vm)['name']
        manage('modifyvm', vm, '--name', next(name for name in self.vms[vm] if name != now))

    def unregister(self, vm):
        """For a moment, as who moves it would. Seen with 7.2: on a full disk VirtualBox leaves an empty
        .vbox file; its user has the one before."""
        path = facts(vm)['CfgFile']
        manage('unregistervm', vm)
        time.sleep(self.chance.uniform(0, 2))
        until = time.monotonic() + 120
        while True:
            try:
                return manage('registervm', path)
            except Refused as error:
                assert time.monotonic() < until, error
                if not os.path.getsize(path):
                    shutil.copy(path + '-prev', path)
                time.sleep(0.5)

    def fill(self, vm):
        """The disk, for some moments."""
        path = os.path.join(self.folder, 'filling')
        with contextlib.suppress(OSError), open(path, 'wb', buffering=0) as file:
            while True:
                file.write(bytes(1 << 18))
        time.sleep(self.chance.uniform(0.5, 3))
        os.remove(path)


@pytest.fixture
def foreign(remove_all, tmp_path):
    """What another tool made: a VM with a disk and a snapshot. Gives what VBoxManage and the system say."""
    disk = str(tmp_path / 'foreign.vdi')
    manage('createvm', '--name', 'foreign', '--ostype', 'Linux_64', '--register')
    manage('createmedium', 'disk', '--filename', disk, '--size', '4')
    manage('storagectl', 'foreign', '--name', 'SATA', '--add', 'sata')
    manage('storageattach', 'foreign', '--storagectl', 'SATA', '--port', '0', '--type', 'hdd',
           '--medium', disk)
    manage('snapshot', 'foreign', 'take', 'its own')

    def look():
        found = facts('foreign')
        for key in ('VMStateChangeTime', 'localhostReachable'):     # 7.2 reads other ones than it wrote
            del found[key]
        files = glob.glob(os.path.dirname(found['CfgFile']) + '/**', recursive=True) + [disk]
        return found, {path: (os.path.getsize(path), os.path.getmtime(path)) for path in files}
    return look


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(SEED, SEED + WALKS))
def test_a_walk_with_chaos(host, api, small_disk, foreign, seed):
    chance, before = random.Random(seed), foreign()
    vms = {}
    for number in range(2):
        names = 'chaos-%d' % number, 'renamed-%d' % number
        api.createVM(names[0], '', {'memory': 16, 'diskSize': 4, 'folder': small_disk})
        vms[facts(names[0])['UUID']] = names
    chaos, done = Chaos(random.Random(seed + 1000), host, vms, small_disk), []
    with lists_are_asked(host) as took, beside(chaos.act):
        for _ in range(CALLS):
            uuid = chance.choice(sorted(vms))
            method, args = a_fitting_call(chance, fault_of(api.getState, uuid)[1])
            vm = chance.choice(3 * (uuid,) + vms[uuid])
            code, answer = fault_of(getattr(api, method), vm, *args)
            done.append((method, vm, code, answer))
            assert code in (0, 1, 4, 5, 7, 8, 10), done
    print('lists took %.2f s at most, load %.1f' % (max(took), os.getloadavg()[0]), done, chaos.done)
    for uuid in vms:
        settled, said = settle(api, uuid), facts(uuid)
        assert AS_VBOXMANAGE_SAYS[settled] == said['VMState']
        assert sorted(api.listSnapshots(uuid)) == sorted(snapshots_of(uuid))
        told = api.getVM(uuid)
        assert (told['name'], told['id'].replace(':', '')) == (said['name'], said['macaddress1'])
        assert said['name'] in api.listVMs()
    api.cleanup(False)
    assert foreign() == before and all(facts(uuid) for uuid in vms)
    assert max(took) < LIST_PATIENCE + 0.4 * others_take()     # 1 s, where nothing else wants the processors


def a_fitting_call(chance, state):
    """As a_call, mostly one that makes sense in this state."""
    while True:
        method, args = a_call(chance)
        fits = state in CHANGES.get(method, ()) or method in ('takeSnapshot', 'deleteSnapshot')
        if method != 'kill' and (fits or chance.random() < 0.1):
            return method, args


def settle(api, vm):
    """Waits until its state is one that stays; one that hangs is switched off, as its user would."""
    with contextlib.suppress(AssertionError):
        return wait_until(lambda: settled_state(api, vm), 20, 0.3)
    api.powerOff(vm)
    return wait_until(lambda: settled_state(api, vm), 60, 0.3)


def settled_state(api, vm):
    """The state, once it is one that stays, and VBoxManage sees the same."""
    state = api.getState(vm)
    if state not in AS_VBOXMANAGE_SAYS:        # on its way: for one that hangs there VBoxManage would wait
        return None
    return state if AS_VBOXMANAGE_SAYS[state] == facts(vm)['VMState'] else None
