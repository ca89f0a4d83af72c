"""A real BOINC client with tasks that run vmboinc, for the tests.

The client is that of tests/rigs/boinc-rig. The programs of its tasks run on this machine, by a guest agent,
so that no hypervisor is needed; or in VMs of the hypervisor that is here.
"""

import contextlib
import copy
import importlib.machinery
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import types

import fake_server
import fake_virtualbox
import pytest
import vms
from agents import TOP, Agent
from brokers import free_port
from helpers import wait_until

import bundles
import hostclient
import vboxnetwork
import vmboinc

PATH = os.path.join(TOP, 'tests', 'rigs', 'boinc-rig')
PATIENCE = 180                 # seconds for what takes some 10 on a machine with nothing else to do
COUNT = """\
#!/bin/sh
# Counts, with progress, until the test has it finish.
echo $$ >> starts
n=$(cat counted 2> /dev/null || echo 0)
while ! [ -e finish ]; do
    i=0; while [ $i -lt 2000 ]; do i=$((i + 1)); done
    n=$((n + 1))
    echo $n > counted
    printf '0.%04d\n' $n > $VM_PROGRESS_FILE
    sleep 0.2
done
{ cat in more/in; echo "$@"; wc -l < starts; times; } > out
"""
JOB = """\
<vbox_job>
  <os_name>Linux_64</os_name>
  <memory_size_mb>256</memory_size_mb>
  <minimum_checkpoint_interval>1</minimum_checkpoint_interval>
%s</vbox_job>
"""


def why_not():
    """Why there can be no such client here, '' where there can."""
    if platform.machine() != 'x86_64' or sys.platform != 'linux':
        return 'the BOINC rig is for Linux on x86_64'
    missing = [name for name in ('apt-get', 'apt-cache', 'dpkg-deb', 'ldd') if shutil.which(name) is None]
    return 'the BOINC rig needs %s (Debian, Ubuntu)' % missing[0] if missing else ''


def seconds_of(lines):
    """The sum of what a shell's `times` printed."""
    return sum(60 * float(minutes) + float(seconds) for minutes, seconds in re.findall(
        r'(\d+)m([\d.]+)s', ' '.join(lines)))


def status_of(pid):
    """{key: value} of what this machine's kernel says of a process."""
    with open('/proc/%d/status' % pid) as file:
        return dict(line.rstrip('\n').split(':\t', 1) for line in file)


def assert_only_grow(reports):
    """What a client was told of one task went back in nothing, from first to last."""
    assert reports
    for number in range(3):
        values = [report[number] for report in reports if report[number] is not None]
        assert values == sorted(values), number


def load_rig():
    """The rig's program as a module."""
    loader = importlib.machinery.SourceFileLoader('boinc_rig', PATH)
    found = importlib.util.module_from_spec(importlib.util.spec_from_loader('boinc_rig', loader))
    with contextlib.suppress(ImportError):
        before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        loader.exec_module(found)
        sys.dont_write_bytecode = before
    return found


def hosts_in(folder, among=None):
    """Pids of the host agents in a folder, not of the processes of their drivers; of all, or among some."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir('/proc'))) if among is None else among:
        with contextlib.suppress(OSError):             # it may end meanwhile
            if os.readlink('/proc/%d/cwd' % pid) == str(folder) and '--host-agent' in vms.command_line(pid):
                found.append(pid)
    return found


class Boinc:
    """A client, stopped at first; ``add`` tasks, then ``rig.start()``."""

    def __init__(self, folder):
        """Tasks get VMs, for which vmboinc writes its host.ini itself."""
        self.folder = str(folder)
        self.program = os.path.join(self.folder, 'vmboinc')
        self.use(load_rig().Rig(os.path.join(self.folder, 'rig')))

    def use(self, rig):
        """This is about that rig's project."""
        self.rig = rig
        self.project = rig.project
        self.state = os.path.join(self.project, 'vmhost', 'state')
        self.client = hostclient.Client(self.state)

    def setup(self):
        """What tasks need, once the rig's client is there."""
        bundles.write_bundle(self.program, 'vmboinc', vmboinc.BUNDLED, vmboinc.PROGRAMS)
        self.rig.change('global_prefs_override.xml', ['disk_interval=1'])
        self.rig.change('cc_config.xml', ['ncpus=16'])

    def end_hosts(self):
        for pid in self.host_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def close(self):
        self.end_hosts()
        self.rig.clean()

    def add(self, name, program, job='', inputs=(), outputs=(), arguments='', files=()):
        """A task.

        program    the text of boinc_app
        job        further lines of the job file
        inputs     (name, text) of each
        files      paths of files of the application
        """
        options = [word for path in files for word in ('--file', path)]
        for logical, text in [('vbox_job.xml', JOB % job), ('boinc_app', program)] + list(inputs):
            path = self.write(name + '-' + logical.replace('/', '_'), text)
            options += ['--input', '%s=%s' % (logical, path)]
        for logical in outputs:
            options += ['--output', logical]
        if arguments:
            options += ['--args', arguments]
        self.rig.add(name, self.program, options + ['--flag', 'dont_throttle'])

    def forget(self):
        """The stopped client forgets all tasks, as at a reset; its host agent stays."""
        state = self.rig.read('data', 'client_state.xml')
        for tag in ('file', 'app', 'app_version', 'workunit', 'result', 'active_task_set'):
            state = re.sub('<%s>.*?</%s>\n' % (tag, tag), '', state, flags=re.DOTALL)
        self.rig.write(state, 'data', 'client_state.xml')
        shutil.rmtree(self.rig.path('data', 'slots'))
        for entry in os.scandir(self.project):
            if entry.is_file():
                os.remove(entry.path)

    def write(self, name, text):
        path = os.path.join(self.folder, name)
        with open(path, 'w') as file:
            file.write(text)
        return path

    def vm(self, name):
        """What a task's VM is called."""
        return '%s_%s' % (os.path.basename(self.project), name)

    def host_pids(self):
        """The host agents of the project."""
        return hosts_in(os.path.join(self.project, 'vmhost'), self.rig.leftovers())

    def told(self, slot=0):
        """(CPU time, that of the checkpoint, fraction or None) of each report of that slot's task that the
        client logged; a fraction below 0 tells none."""
        report = ('msg from slot %d: <current_cpu_time>(.*)</.*>\n<checkpoint_cpu_time>(.*)</.*>\n'
                  '(?:<fraction_done>(.*)</.*>)?' % slot)
        return [tuple(None if text is None or text[0] == '-' else float(text) for text in found.groups())
                for found in re.finditer(report, self.rig.read('client.log'))]

    def stderr_says(self, name, text):
        return wait_until(lambda: text in self.rig.stderr(name), 20)


class Watched:
    """A task whose fraction and CPU time are looked at, and may only grow."""

    def __init__(self, boinc, name):
        self.boinc, self.name = boinc, name
        self.last, self.most = {'fraction': 0, 'cpu': 0}, 0.0

    def task(self):
        now = self.boinc.rig.task(self.name)
        if now['process'] == 'running' and now['fraction'] and now['cpu']:
            for key, before in self.last.items():
                assert now[key] >= before - 1e-6, '%s went back from %s: %s' % (key, before, now)
                self.last[key] = now[key]
            self.most = max(self.most, now['fraction'])      # without a CPU time it may be the client's guess
        return now

    def wait(self, predicate, seconds=60):
        return wait_until(lambda: predicate(self.task()), seconds, 0.2)

    def begins_at_a_checkpoint(self):
        """A client that starts a task remembers what it wrote when the last checkpoint was told."""
        self.last = {'fraction': 0, 'cpu': 0}

    def wrapper(self, seconds=60):
        """The pid of the task's wrapper, once it has one: who kills 0 kills all that runs these tests."""
        return wait_until(lambda: self.boinc.rig.task(self.name)['pid'], seconds, 0.2)

    def kill_wrapper(self, seconds=60):
        """The task's wrapper is killed, and the client starts another one."""
        wrapper = self.wrapper(seconds)
        os.kill(wrapper, signal.SIGKILL)
        self.began_again(wrapper, seconds)

    def began_again(self, wrapper, seconds=60):
        """Waits until the client has another wrapper than that one; until it hears of that, it counts from
        the last checkpoint on."""
        wait_until(lambda: self.boinc.rig.task(self.name)['pid'] not in (0, wrapper), seconds, 0.2)
        self.begins_at_a_checkpoint()

    def gets_further(self, seconds=60):
        """Waits until its client has heard of more than it ever had."""
        self.task()
        before = self.most
        self.wait(lambda now: now['process'] == 'running' and now['fraction'] > before, seconds)


class WithMachine(Boinc):
    """Without a hypervisor: this machine is the one on which the tasks' programs run."""

    def __init__(self, folder):
        super().__init__(folder)
        self.broker_port = free_port()
        self.guest = None

    def setup(self):
        super().setup()
        os.makedirs(os.path.join(self.project, 'vmhost'), mode=0o700)
        with open(os.path.join(self.project, 'vmhost', 'host.ini'), 'w') as file:
            file.write('[Broker]\nport = %d\n[Host]\nxmlrpc_port = auto\nstate_dir = state\nidle_end = 10m\n'
                       '[Hypervisor]\nhypervisor = none\n[Logging]\nfile = vmhost.log\n' % self.broker_port)
        self.guest = Agent(os.path.join(self.folder, 'guest'), types.SimpleNamespace(
            broker_port=self.broker_port), 'g1')
        self.guest.start(wait=False)

    def close(self):
        self.guest.stop()
        self.guest.end_programs()
        super().close()

    def reboot(self, program):
        """The machine fails, with the program of that pid, and is there again."""
        for pid in (self.guest.process.pid, status_of(program)['PPid'], program):
            os.kill(int(pid), signal.SIGKILL)
        self.guest.process.wait()
        self.guest.start(wait=False)

    def task_folder(self, name):
        """Where a task's program runs, in what the guest serves."""
        return os.path.join(self.guest.files, '%s_%s' % (os.path.basename(self.project), name))

    def read(self, name, file):
        """The text of a file that a task's program wrote, '' while there is none."""
        with contextlib.suppress(OSError):
            with open(os.path.join(self.task_folder(name), file)) as opened:
                return opened.read()
        return ''


def chirp_port(box, vm):
    """The port of this machine that a VM of the fake's in NAT mode has for its Chirp server."""
    rules = [row.split(',') for row in
             box.getVirtualBox().findMachine(vm).getNetworkAdapter(0).NATEngine.redirects]
    return next(int(rule[3]) for rule in rules if rule[0] == vboxnetwork.CHIRP_RULE)


class WithFakeVMs(Boinc):
    """Tasks get VMs of the fake VirtualBox; what would be a VM's agent runs beside it."""

    def __init__(self, folder):
        super().__init__(folder)
        self.environment = fake_virtualbox.install(os.path.join(self.folder, 'fake'))
        self.agents = []
        self.box = None
        self.others = []               # of further projects
        self.image = self.write('image.vdi', fake_virtualbox.disk())

    def setup(self):
        with vms.environment(self.environment):
            super().setup()

    def start(self):
        with vms.environment(self.environment):
            self.rig.start()

    def beside(self, name):
        """One more project of the same client, for tasks that are added after all those of this one."""
        other = copy.copy(self)
        other.use(self.rig.beside(name))
        other.image = self.write(name + '.vdi', fake_virtualbox.disk(len(self.others) + 2))
        self.others.append(other)
        return other

    def vms(self):
        """{name: state}, {} while no host agent answers."""
        with contextlib.suppress(hostclient.NoHost):
            return self.client.call('listVMsWithState')
        return {}

    def has(self, name, state):
        return wait_until(lambda: self.vms().get(self.vm(name)) == state, PATIENCE)

    def add_counting(self, name, job=''):
        """A task that counts, with two inputs and an output, until ``finish``."""
        self.add(name, COUNT, '<multiattach_vdi_file>%s</multiattach_vdi_file><input>in</input>'
                 '<input>more/in</input><output>out</output>%s' % (os.path.basename(self.image), job),
                 [('in', 'apples\n'), ('more/in', 'pears\n')], ['out'], 'and plums', [self.image])

    def boot(self, name):
        """Starts what runs in a task's VM, once that does."""
        self.has(name, 'Running')
        if self.box is None:
            with vms.environment(self.environment):
                self.box = fake_server.VirtualBoxManager()     # which lives on while somebody talks to it
        port = int(self.client.call('agentInfo')['broker']['address'].rpartition(':')[2])
        found = Agent(os.path.join(self.folder, 'guest-' + name), types.SimpleNamespace(broker_port=port),
                      self.client.call('getVM', self.vm(name))['id'],
                      chirp={'port': chirp_port(self.box, self.vm(name))})
        self.agents.append(found)
        found.start(wait=False)
        return found

    def close(self):
        for each in self.agents:
            each.stop()
            each.end_programs()
        for each in self.others:
            each.end_hosts()
        super().close()
        for each in [self] + self.others:
            if each.box is not None:
                each.box.line.connection.close()


def set_up(rig):
    """Has a rig's client there, stopped. Skips the test where none can be had."""
    try:
        rig.setup(free_port())
    except (OSError, SystemExit, subprocess.CalledProcessError) as error:
        pytest.skip('no BOINC client can be had here: %s' % error)


def path_with_python():
    """PATH, on which python3 is this one."""
    return os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH']


@contextlib.contextmanager
def running(folder, kind=WithMachine):
    """A Boinc of that kind that is set up, and at the end leaves no process."""
    with vms.environment({'PATH': path_with_python()}), contextlib.ExitStack() as stack:
        boinc = kind(folder)
        set_up(boinc.rig)
        boinc.setup()
        stack.callback(boinc.close)
        yield boinc
