"""What the host agent does for a BOINC task: its machine, its files, its command. One step at a time.

Each step of `Work` is short, can be asked for again at any time, and gives True once what it is for is so;
what it has to wait for it looks at, and says False. So a step that a dead agent or a killed wrapper cut
short is simply taken again.

What it is not: what is done next, or told to the client (boinclife.py). It names no hypervisor.
Threads: all of it belongs to one.
"""

import contextlib
import glob
import hashlib
import logging
import os
import posixpath
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import agent
import hostconfig
from boincjob import COMMAND, FILE, LEAST_MEMORY, RESET, Job, Moved, Trigger, Words, fraction_of, read_trigger
from boincslot import InitData, Record, Slot
from faults import (
    AlreadyExists,
    Busy,
    InvalidParams,
    NoSuchCommand,
    NoSuchVM,
    NotSupported,
    TransferError,
    VMHostError,
)
from hostclient import Client, NoHost

log = logging.getLogger('vmboinc')

CHECKPOINT = 'checkpoint '     # + a number: name of a snapshot
LEASE = 60                     # seconds without its wrapper after which a VM is saved
TELL_AFTER = 10.0              # seconds without a machine after which it is told what is waited for
LINK_EVERY = 60.0              # seconds between two links to the status page; one is good for two minutes
LEASE_EVERY = 10.0             # seconds between two renewals
START_PATIENCE = 60.0          # seconds that a host agent may take to answer
START_AGAIN = 10.0             # seconds after which another one is started: the first may have met
                               # one that was about to end
LONGEST_NAME = 150             # characters of a machine's name
NO_SUCH_FOLDER = ('does not exist', 'not a directory')     # how the error of a folder that isn't there ends
NO_OUTPUT = NO_SUCH_FOLDER + (         # … of what is no file, or none that the guest's agent may read
    'neither file, folder nor link', 'is a directory', 'not authorized')
LAST_WORDS = 8192              # characters of the program's standard error that the task's keeps
MOST_TRICKLES = 100            # messages that wait for the client to take them
LOOK_AT_FILES = 2.0            # seconds between two looks for trigger files
BROKER_PORT = 61613            # of a guest's agent that isn't told another one
COMMAND_ID = 'boinc-'          # begin of the id of a task's command
OWNER = 'boinc '               # + the project's folder: owner of a task's VM
INI = """\
# The host agent that serves this project's tasks. Written once, by vmboinc: what you change here stays.
[Broker]
# It stays the same, so that VMs that were saved find it again.
port = %d

[Host]
xmlrpc_port = auto
state_dir = state
idle_end = 10m

[Hypervisor]
machine_folder = machines

[Network]
mode = nat

[Logging]
file = vmhost.log
"""


LEAVE = 'vmboinc.ini'          # in the client's folder; the volunteer's alone: no project's files are there
LEAVES = {'Bridged': {'projects': (agent.text, ''), 'interface': (agent.given, 'auto')}}


class Trouble(Exception):
    """Not the science's fault: the task is to be tried again in a while. The text says
    why, and what to do."""


class NotStarted(Trouble):
    """No host agent answers, though one was started."""


class Look(NamedTuple):
    """What was seen of the science."""
    ended: bool = False
    state: str = 'running'             # as getCmdStatus has it; away: its machine doesn't run
    cpu: float = 0.0                   # seconds, of this attempt
    fraction: Optional[float] = None
    code: int = 0                      # once it ended: exit code or signal
    why: str = ''
    done: Optional[Trigger] = None     # the completion trigger file
    pause: Optional[Trigger] = None    # the temporary exit trigger file
    messages: Tuple[str, ...] = ()     # to the client: there is a trickle message, or a file to upload


class HostAgent:
    """The host agent of a project's folder, which one of its tasks starts, and which serves them all."""

    def __init__(self, folder: str, command: List[str]) -> None:
        """
        folder     where its ini file, state and log are
        command    what starts a host agent, but for its ini file
        """
        self.folder = folder
        self.ini = os.path.join(folder, 'host.ini')
        self._command = command
        self._client: Optional[Client] = None
        self._settings = None          # type: Any
        self._started = self._deadline = 0.0

    def call(self, method: str, *args: Any) -> Any:
        """What a method of its API answers. Raises VMHostError."""
        if self._client is None:
            raise NoHost('no host agent was started yet')
        return self._client.call(method, *args)

    @property
    def drives_vms(self) -> bool:
        """Whether tasks get VMs; not where the volunteer's host.ini says hypervisor=none."""
        with self._usable():
            return bool(self._read_settings().Hypervisor.hypervisor != 'none')

    def how_to(self, verb: str) -> str:
        """What a person types to ask it."""
        return ' '.join(map(shlex.quote, self._command + [self.ini, verb]))

    def connect(self) -> bool:
        """Whether it answers; starts one where none does. Raises Trouble."""
        with self._usable():
            try:
                settings = self._read_settings()
                self._client = Client(settings.Host.state_dir)
                version = self._client.call('agentInfo')['version']
                if is_older(version):
                    return self._end_older(version)
                if self._started:
                    with contextlib.suppress(OSError):
                        os.remove(os.path.join(self.folder, STARTING))
                self._started = self._deadline = 0.0
                return True
            except NoHost:
                self._start()
                return False

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except (agent.AgentError, OSError) as error:
            raise Trouble('the host agent in %s can\'t be used: %s' % (self.folder, agent.sentence(error)))

    def _end_older(self, version: str) -> bool:
        """Ends one of an application version before this one, which may lack what this one asks of it: its
        commands and VMs go on, and its tasks get along with a newer one."""
        log.warning('the host agent is of version %s: it ends, one of version %s takes its place', version,
                    agent.VERSION)
        self.call('stopHost')
        self._started = 0.0
        return False

    def _read_settings(self) -> Any:
        if self._settings is None:
            if not os.path.exists(self.ini):
                os.makedirs(self.folder, mode=0o700, exist_ok=True)
                write_new(self.ini, INI % self._free_port())
            self._settings = hostconfig.read_settings(self.ini)
        return self._settings

    def _start(self) -> None:
        now = time.monotonic()
        self._deadline = self._deadline or now + START_PATIENCE
        if now > self._deadline:
            self._deadline = 0.0
            raise NotStarted('the host agent doesn\'t start: %s' % self._last_words())
        if (now - self._started > START_AGAIN or not self._started) and self._is_first():
            self._started = now
            start_orphaned(self._command + [self.ini], self.folder)

    def _is_first(self) -> bool:
        """Whether no other task has started one just now: a client starts many tasks at once."""
        path = os.path.join(self.folder, STARTING)
        with contextlib.suppress(OSError):
            if not 0 <= time.time() - os.stat(path).st_mtime < START_AGAIN:
                os.remove(path)
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return False
        except OSError:                # the start itself tells why nothing can be written there
            pass
        return True

    def _free_port(self) -> int:
        """The port that guests' agents try by themselves, where it is free now, and no other project of the
        client has it; else any that is free."""
        projects = os.path.dirname(os.path.dirname(os.path.abspath(self.folder)))
        taken = []
        for path in glob.glob(os.path.join(glob.escape(projects), '*', 'vmhost', 'host.ini')):
            with contextlib.suppress(OSError), open(path, encoding='utf-8', errors='replace') as file:
                taken += re.findall(r'^port *= *(\d+)', file.read(), re.MULTILINE)
        if str(BROKER_PORT) not in taken and agent.port_is_free('127.0.0.1', BROKER_PORT):
            return BROKER_PORT
        with socket.socket() as listener:
            listener.bind(('127.0.0.1', 0))
            return int(listener.getsockname()[1])

    def take_another_port(self) -> bool:
        """Has its broker listen on a free port from now on, where another program has taken its own; not
        where the ini file isn't as it was written here. Whether that was done. Raises OSError."""
        port = self._read_settings().Broker.port
        with open(self.ini, encoding='utf-8') as file:
            text = file.read()
        if agent.port_is_free('127.0.0.1', port) or text != INI % port:
            return False
        with open(self.ini + '.new', 'w', encoding='utf-8') as file:
            file.write(INI % self._free_port())
        agent.replace(self.ini + '.new', self.ini)
        self._settings = None
        return True

    def _last_words(self) -> str:
        """The last line of what it printed."""
        with contextlib.suppress(OSError, IndexError):
            with open(os.path.join(self.folder, PRINTED), encoding='utf-8', errors='replace') as file:
                return file.read().strip().splitlines()[-1]
        return 'its log is in %s' % self.folder


def is_older(version: str) -> bool:
    """Whether a version is before ours."""
    theirs, ours = [[int(number) for number in re.findall('[0-9]+', each)]
                    for each in (version, agent.VERSION)]
    return theirs < ours


def write_new(path: str, text: str) -> None:
    """Writes a file, whole or not at all, unless there is one: another task may be doing the same. Raises
    OSError."""
    # Not by tempfile: see agent.momentary_file.
    temporary = '%s.%s' % (path, os.urandom(8).hex())
    with open(temporary, 'x', encoding='utf-8') as file:
        file.write(text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:                    # a file system without links
        agent.replace(temporary, path)
        return
    os.remove(temporary)


STARTING = 'starting'                  # there while a host agent was started by one of the tasks
PRINTED = 'printed.log'                # what a host agent prints, which doesn't go into its log


def start_orphaned(command: List[str], folder: str) -> None:
    """Starts a program that is nobody's child: a BOINC client ends a task's descendants at its end.

    It lives in ``folder``, and what it prints is kept there. Raises OSError.
    """
    starter = ('import subprocess, sys\n'
               'with open(sys.argv[1], "ab") as out:\n'
               '    subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, stdout=out, stderr=out, '
               '**({"creationflags": 0x8} if sys.platform == "win32" else {"start_new_session": True}))')
    with open(os.path.join(folder, PRINTED), 'ab'):    # here, where it is told why it can't be
        pass
    environment = {name: value for name, value in os.environ.items() if name != 'LD_LIBRARY_PATH'}
    subprocess.run([sys.executable, '-c', starter, PRINTED] + command, cwd=folder, env=environment,
                   check=True, stdin=subprocess.DEVNULL)


def share_priority(pid: int) -> None:
    """Has another process, with all its threads, computed no sooner than this one, whose priority is what
    the client's user wants: a service of a hypervisor's may have started a VM's process at its own."""
    if os.name == 'nt':
        import windows  # there alone
        windows.share_priority(pid)
        return
    mine, threads = os.getpriority(os.PRIO_PROCESS, 0), [pid]
    with contextlib.suppress(OSError):                 # where there is no /proc, a process has one priority
        threads = list(map(int, os.listdir('/proc/%d/task' % pid)))
    for thread in threads:
        with contextlib.suppress(OSError):             # it has ended
            if os.getpriority(os.PRIO_PROCESS, thread) < mine:
                os.setpriority(os.PRIO_PROCESS, thread, mine)


class VirtualMachine:
    """A VM of the task's own, made on the project's image, which stays as it is."""

    def __init__(self, host: HostAgent, name: str, image: str, options: Dict[str, Any],
                 limits: Callable[[], Dict[str, Any]], record: Record) -> None:
        """
        image      path of the disk on which its own lies
        options    createVM's: folder, owner, memory, cpus, ostype, forwards, bridged
        limits     gives setLimits' limits, as they are to be now
        """
        self.name = name
        self.files = ''                # the folder of the task in what the guest serves: all of it
        self.pid = 0                   # of its process on this machine, while it runs; 0: not known
        self._host = host
        self._image = image
        self._options = dict(options, linked=True)
        self._limits = limits
        self._record = record
        self._has_run = False          # since it was told last that it doesn't
        self._forwards = []            # type: List[Dict[str, Any]]    # as getVM tells them
        self._leased = 0.0

    @property
    def memory(self) -> int:
        """Bytes that it takes of this machine's, 0 once it is saved."""
        return self._options['memory'] << 20 if self._leased else 0

    def ready(self) -> bool:
        """Whether it runs, and its agent is there; does what is next to get there."""
        if self._host.call('agentInfo')['hypervisor'] == 'none':
            raise Trouble('no hypervisor answers here: install VirtualBox; what is missing tells: %s'
                          % self._host.how_to('check'))
        self._follow()
        state = self._host.call('listVMsWithState').get(self.name)
        if state not in ('Running', 'Paused') and not os.path.isfile(self._image):
            raise Trouble('the project\'s disk image %s is missing: %sthe application\'s version lacks it'
                          % (self._image, RESET))
        if state not in ('Running', 'Paused') and self._has_run:
            log.warning('the machine is %s, by somebody else or since its lease was over: it goes on',
                        state or 'gone')
            self._has_run = False
        if state is not None:          # before it starts: this process may die at any moment
            self.lease()
        if state is None:
            self._make()
        elif state in ('PoweredOff', 'Aborted') and self._checkpoints():
            log.warning('the machine is %s: it goes on from its last checkpoint', state)
            self._host.call('restoreSnapshot', self.name, self._checkpoints()[-1])
        elif state in ('PoweredOff', 'Aborted'):
            self.limit()
            self._host.call('start', self.name)
        elif state in ('Saved', 'AbortedSaved'):
            self._host.call('start', self.name)
        elif state == 'Paused':
            self._host.call('resume', self.name)
        elif state == 'Stuck':
            log.warning('the machine has stopped with an error: it is powered off')
            self._host.call('powerOff', self.name)
        elif state == 'Inaccessible' and not self._register():
            raise Trouble('the machine %s can\'t be read: %s; if it stays so, abort the task'
                          % (self.name, self._host.call('getVM', self.name)['trouble']))
        elif state == 'Running':
            self._has_run = True
            told = self._host.call('getVM', self.name)
            self.pid = int(told['pid'])
            self._forwards = told['forwards']
            return bool(told['agent'] == 'alive')
        return False

    def _make(self) -> None:
        """Makes it; or has the hypervisor know it again, where somebody took it out of the list of VMs."""
        if self._record.put and self._register():
            return
        folder = os.path.join(self._options['folder'], self.name)
        if os.path.exists(folder):     # it was being made when something died, and nothing has run there
            shutil.rmtree(folder)
        try:
            self._host.call('createVM', self.name, self._image, self._options)
        except (InvalidParams, NotSupported) as error:         # which no hiccup is
            raise Trouble('the machine can\'t be made: %s' % error)

    def _follow(self) -> None:
        """Has the hypervisor find it where the client's folder was moved to."""
        here = self._options['folder']
        if self._record.folder != here:
            if self._record.folder:
                self._register()
            self._record.folder = here
            self._record.save()

    def _register(self) -> bool:
        """Has the hypervisor know it again, by its files; whether that was needed, and they are there."""
        with contextlib.suppress(AlreadyExists):       # it knows it, though it can't read it
            if self._host.call('registerVM', self.name, self._options['folder'], self._options['owner']):
                log.warning('the machine wasn\'t known any more: it is registered again')
                return True
        return False

    def port_to(self, port: int) -> int:
        """The port of this machine that leads to one of the guest's; 0 for none."""
        return next((int(each['hostPort']) for each in self._forwards if each['guestPort'] == port), 0)

    def runs(self) -> bool:
        """Whether it does, as far as its hypervisor knows."""
        self.lease()
        if self._host.call('getState', self.name) != 'Running':
            self.pid = 0
            return False
        return True

    def lease(self) -> None:
        """Has it saved where this process dies."""
        now = time.monotonic()
        if not self._leased or now - self._leased > LEASE_EVERY:
            self._host.call('lease', self.name, LEASE)
            self._leased = now
            if self.pid:
                share_priority(self.pid)

    def pause(self, command: str) -> None:
        """Halts it in memory."""
        if self._state() == 'Running':
            self._host.call('pause', self.name)
        self.lease()

    def resume(self, command: str) -> None:
        """Lets it go on."""
        if self._state() == 'Paused':
            self._host.call('resume', self.name)

    def save(self, command: str) -> None:
        """Writes it to disk, and stops it."""
        self.pid = 0
        if self._state() in ('Running', 'Paused'):
            self._host.call('saveState', self.name)
        self._leased = 0.0

    def checkpoint(self) -> None:
        """Keeps what it is now, memory and all, for when its process dies; what was kept before goes."""
        before = self._checkpoints()
        self._host.call('takeSnapshot', self.name, '%s%d' % (CHECKPOINT, time.time()))
        for name in before:
            self._host.call('deleteSnapshot', self.name, name)
        self.lease()

    def _checkpoints(self) -> List[str]:
        """Names of snapshots, the newest last."""
        return [name for name in self._host.call('listSnapshots', self.name) if name.startswith(CHECKPOINT)]

    def remove(self, command: str) -> None:
        """Takes it away, with its disk."""
        self.pid = 0
        state = self._state()
        if state in ('Running', 'Paused', 'Stuck'):
            self._host.call('powerOff', self.name)
        elif state in ('Saved', 'AbortedSaved'):
            self._host.call('discardState', self.name)
        if state:
            self._host.call('removeVM', self.name, True)

    def limit(self) -> None:
        """Keeps it within the user's preferences. What can't be set now waits for its next start."""
        wish = self._limits()
        for limits in (wish, {'cpuPercent': wish['cpuPercent']}):
            try:
                self._host.call('setLimits', self.name, limits)
                return
            except (NoHost, NoSuchVM):
                raise
            except VMHostError as error:
                log.warning('the limits %s of the preferences are not set: %s', limits, error)

    def _state(self) -> str:
        try:
            return str(self._host.call('getState', self.name))
        except NoSuchVM:
            return ''


def commands_of(host: HostAgent, is_meant: Callable[[str], bool]) -> List[Dict[str, Any]]:
    """listCmds' rows of the commands, unfinished, of tasks on given machines; is_meant takes the name of a
    task's folder."""
    rows = [row for row in host.call('listCmds', {'finished': False}) if row['cmdId'].startswith(COMMAND_ID)]
    tasks = [host.call('getCmdDetails', row['cmdId'])['path'] for row in rows]
    return [dict(row, task=task) for row, task in zip(rows, tasks) if is_meant(task)]


class GivenMachine:
    """A machine that is there, whose agent has joined a host agent without a hypervisor: all tasks share it,
    each has a folder of its own. To pause is to stop the command's processes."""
    pid = memory = 0                   # no process of this machine is one

    def __init__(self, host: HostAgent, name: str, record: Record) -> None:
        self.files = name
        self._host = host
        self._record = record
        self._emptying = ''            # id of the command that removes what is in the folder
        self._missing_since = 0.0      # 0: it isn't
        self._is_told = False

    @property
    def name(self) -> str:
        """The one that was chosen, for good: the task's files are there."""
        return self._record.machine

    def ready(self) -> bool:
        """Whether it is there; at first, whether there is any, and the one with the fewest commands is it."""
        names = self._host.call('listRegisteredVMs')
        self._tell_missing(names)
        if not names or not self.name and not self._end_former(names):
            return False
        if not self.name:
            load = {name: len(self._host.call('getVM', name)['commands']) for name in names}
            self._record.machine = min(names, key=lambda name: (load[name], name))
            self._record.save()
        return self.name in names and (self._record.emptied or self._is_emptied())

    def _tell_missing(self, names: List[str]) -> None:
        """Says once what has been waited for for a while."""
        if self.name in names or names and not self.name:
            self._missing_since = 0.0
            return
        now = time.monotonic()
        self._missing_since = self._missing_since or now
        if not self._is_told and now - self._missing_since > TELL_AFTER:
            self._is_told = True
            log.info('the machine %s isn\'t connected', self.name) if self.name else log.info(
                'no machine has joined: vmguest is to be started on one, with the broker and the port that '
                'stand in %s', self._host.ini)

    def _end_former(self, names: List[str]) -> bool:
        """Whether nothing goes on, on those machines, of a task of the same name that was reset, and that
        its server has sent again; ends what does."""
        former = [row for row in commands_of(self._host, lambda task: task == self.files)
                  if row['vm'] in names]
        for row in former:
            log.info('ended what is left of this task from before it was reset: %s', row['cmdId'])
            self._signal(row['cmdId'], 'KILL')
        return not former

    def _is_emptied(self) -> bool:
        """Whether the task's folder held nothing of such a task, once; has it removed where it does."""
        if not self._emptying and (self._record.put or not self.has_folder()):
            self._record.emptied = True
            self._record.save()
        elif not self._emptying:
            self._emptying = self._host.call('runCmd', self.name, 'rm', ['-rf', self.files])
        elif self._host.call('getCmdStatus', self._emptying)['ended']:
            self._emptying = ''
        return self._record.emptied

    def has_folder(self) -> bool:
        """Whether the task has its folder there."""
        try:
            self._host.call('listDir', self.name, '/' + self.files)
            return True
        except TransferError as error:
            if str(error).endswith(NO_SUCH_FOLDER):
                return False
            raise

    def port_to(self, port: int) -> int:
        """None leads there: it may be another computer."""
        return 0

    def runs(self) -> bool:
        """Whether its agent is there."""
        return self.name in self._host.call('listRegisteredVMs')

    def lease(self) -> None:
        """Nobody can save it."""

    def pause(self, command: str) -> None:
        """Stops the processes of the command."""
        self._signal(command, 'STOP')

    def resume(self, command: str) -> None:
        """Lets them go on."""
        self._signal(command, 'CONT')

    def save(self, command: str) -> None:
        """As ``pause``: the machine stays. The host agent hears that, so that it can be idle."""
        self._signal(command, 'STOP')
        with contextlib.suppress(NoSuchCommand):
            self._host.call('getCmdStatus', command)

    def checkpoint(self) -> None:
        """It stays, whatever happens to this process."""

    def remove(self, command: str) -> None:
        """Ends the command, and removes the task's folder."""
        if self.name:                  # else none was chosen yet
            self.take_away(self.name, command)

    def take_away(self, machine: str, command: str) -> None:
        """The same on the machine of that name."""
        self._signal(command, 'KILL')
        self._host.call('runCmd', machine, 'rm', ['-rf', self.files], {}, '', '', {'queue': True})

    def limit(self) -> None:
        """It is nobody's to limit."""

    def _signal(self, command: str, name: str) -> None:
        with contextlib.suppress(NoSuchCommand):
            self._host.call('signalCmd', command, name)


class Work:
    """The steps. Each raises Trouble, or a VMHostError; NoHost where the host agent went away meanwhile."""

    def __init__(self, slot: Slot, job: Job, words: Words, record: Record, host: HostAgent) -> None:
        self.host = host
        self.machine = None            # type: Any
        self._slot = slot
        self._job = job
        self._words = words
        self._record = record
        self.shown = []                # type: List[str]       # for the client's channel of graphics
        self._linked = 0.0             # when the status page's link was made
        self._guest = GuestFiles(self, record)
        self._transfer = ''
        self._waiting = []             # type: List[Tuple[str, str, str]]
        self._collected = False
        self._place = slot.project_dir
        # Not made of the task's name: host and guest remember what they ran under it, before a reset.
        record.digest = record.digest or os.urandom(8).hex()
        self._name = self._name_of(slot.init)
        self._owner = OWNER + self._place

    @property
    def vm_pid(self) -> int:
        """The process in which the task's VM runs; 0 where none does. For any thread."""
        return self.machine.pid if self.machine is not None else 0

    @property
    def vm_memory(self) -> int:
        """Bytes that the task's VM takes; 0 where there is none. For any thread."""
        return int(self.machine.memory) if self.machine is not None else 0

    @property
    def command(self) -> str:
        """The id of the science's command."""
        return '%s%s-%d' % (COMMAND_ID, self._record.digest, self._record.attempt)

    # Before it runs.

    def connect(self) -> bool:
        """The host agent answers."""
        self.machine = self.machine or self._choose_machine()
        try:
            if not self.host.connect():
                return False
        except NotStarted as error:
            if self._has_no_machine() and self.host.take_another_port():
                raise Trouble('%s; it takes another port from now on' % error)
            raise
        return True

    def _bridge(self) -> str:
        """The interface to which the VM gets one more card, '' for none. Raises Trouble where the
        project wants one, and the volunteer hasn't allowed that."""
        if not self._job.network_bridged_mode:
            return ''
        project, folder = os.path.basename(self._place), self._slot.client_dir
        path = os.path.join(folder or 'BOINC\'s data folder', LEAVE)
        try:
            leave = agent.read_settings(path if folder and os.path.exists(path) else None, LEAVES).Bridged
        except (agent.AgentError, OSError) as error:
            raise Trouble(agent.sentence(error))
        if not {project, '*'} & set(leave.projects.replace(',', ' ').split()):
            raise Trouble('network_bridged_mode: refused: the project\'s VM would be a machine of its own in '
                          'your network. You can allow it: two lines, [Bridged] and projects = %s, in %s'
                          % (project, path))
        return str(leave.interface)

    def _choose_machine(self) -> Any:
        if not self.host.drives_vms:
            for what, wanted in (('port is forwarded', self._job.forwards),
                                 ('card is bridged', self._job.network_bridged_mode)):
                if wanted:
                    log.warning('no %s: the science runs on a machine that has joined, in no VM', what)
            return GivenMachine(self.host, self._name, self._record)
        wish = {'cpus': self._words.cpus}      # type: Dict[str, Any]
        memory = self._words.memory or int(self._job.memory_size_mb)
        wish['memory'] = max(memory, LEAST_MEMORY)
        if self._job.os_name:
            wish['ostype'] = self._job.os_name
        bridge = self._bridge()
        if bridge:
            wish['bridged'] = bridge
        if self._job.forwards:
            wish['forwards'] = [{'guestPort': guest, 'hostPort': host} for guest, host in self._job.forwards]
        parent = self._job.multiattach_vdi_file
        image = os.path.join(self._slot.project_dir, parent) if parent else \
            self._slot.resolve(self._words.image)
        wish.update(folder=os.path.abspath(self._slot.folder), owner=self._owner)
        return VirtualMachine(self.host, self._name, image, wish, self._limits, self._record)

    def clean(self) -> bool:
        """No VM is left of tasks of this project that the client has forgotten (a reset, say); nor one of
        this name, where this slot has had none: a server sends tasks again that were reset."""
        if not self._record.made and not isinstance(self.machine, GivenMachine):
            self._remove([self._name])
        slots = self._slots()
        if not all(slot.has_client and slot.init.is_whole for slot in slots):
            return True                # by hand; or one is written just now: whose it is tells the next start
        known = [self._name_of(slot.init) for slot in slots]
        if isinstance(self.machine, GivenMachine):
            self._end_forgotten(known)
        with contextlib.suppress(NotSupported):
            self._remove([name for name in self.host.call('listVMs')
                          if name.startswith(self._name_of(InitData())) and name not in known + [self._name]])
        return True

    def _remove(self, names: List[str]) -> None:
        """Removes VMs of the project's, by their names."""
        with contextlib.suppress(NotSupported):
            for row in self.host.call('cleanup', False, names, self._owner):
                log.info('removed what an earlier task left: %s (%s)', row['name'], row['why'])

    def _end_forgotten(self, known: List[str]) -> None:
        """Ends, on given machines, commands of tasks whose names aren't known, and removes their files."""
        begin = self._name_of(InitData())
        for row in commands_of(self.host, lambda task: task.startswith(begin) and task not in known):
            log.info('ended what an earlier task left: %s', row['task'])
            GivenMachine(self.host, row['task'], self._record).take_away(row['vm'], row['cmdId'])

    def _slots(self) -> List[Slot]:
        """Those of the project's tasks that the client knows, or may know; without one, this one's alone."""
        if not self._slot.has_client:
            return [self._slot]
        place = os.path.dirname(os.path.abspath(self._slot.folder))
        slots = [slot for slot in [Slot(os.path.join(place, name)) for name in os.listdir(place)]
                 if slot.has_client]
        return [slot for slot in slots
                if not slot.init.is_whole or slot.init.text('project_dir') == self._place]

    def _has_no_machine(self) -> bool:
        """Whether no task of the project has a VM, whose agent knows the broker's port."""
        slots = self._slots()
        return all(slot.init.is_whole for slot in slots if slot.has_client) and \
            not any(os.path.exists(slot.path(self._name_of(slot.init))) for slot in slots)

    def _name_of(self, init: InitData) -> str:
        """What a task's machine is called, after its project and its name; without one, how all begin."""
        result = init.text('result_name')
        name = '%s_%s' % (os.path.basename(self._place), re.sub(r'[^A-Za-z0-9._-]', '_', result))
        if len(name) <= LONGEST_NAME:
            return name
        # Names of tasks often differ at their ends alone.
        digest = hashlib.md5(result.encode()).hexdigest()[:16]
        return '%s-%s' % (name[:LONGEST_NAME - len(digest) - 1], digest)

    def ready(self) -> bool:
        """The machine runs, and its agent is there."""
        if not self._record.made:
            self._record.made = True
            self._record.save()
        return bool(self.machine.ready())

    def put(self) -> bool:
        """The guest has the task's files."""
        if self._record.put:
            return True
        if not self._waiting:
            self._waiting = [('put', self._slot.resolve(moved.logical), self.there(moved.path))
                             for moved in self._inputs()] or self._bare_folder()
        if not self._move_all():
            return False
        self._record.put = True
        self._record.save()
        return True

    def _bare_folder(self) -> List[Tuple[str, str, str]]:
        """What makes the task's folder in the guest, where that is missing and no file does."""
        if not self.machine.files or self.machine.has_folder():
            return []
        bare = self.in_slot('vmboinc.bare')
        os.makedirs(bare, exist_ok=True)
        return [('put', bare, self.machine.files)]

    def _inputs(self) -> List[Moved]:
        found = list(self._job.inputs) + [Moved(name, posixpath.basename(name))
                                          for name in self._job.copy_to_shared]
        if not self._job.command and not any(moved.path == COMMAND[1] for moved in found):
            found.append(Moved(COMMAND[1], COMMAND[1]))
        found += [moved for moved in self._shared() if os.path.exists(self._slot.resolve(moved.logical))]
        if self._job.copy_cmdline_to_shared:
            with open(self._slot.path('cmdline'), 'w', encoding='utf-8') as file:
                file.write(' '.join(self._words.rest))
            found.append(Moved('cmdline', 'cmdline'))
        missing = [moved.logical for moved in found
                   if not moved.optional and not os.path.exists(self._slot.resolve(moved.logical))]
        if missing:
            raise Trouble('the file %s is missing in the slot: %s%s names a file that the task doesn\'t have'
                          % (missing[0], RESET, FILE))
        found = [moved for moved in found if os.path.exists(self._slot.resolve(moved.logical))]
        for path in [self._slot.resolve(moved.logical) for moved in found]:
            if not os.path.isfile(path) and not os.path.isdir(path):       # a pipe has no end
                raise Trouble('%s is neither file nor folder: reset the project' % path)
        return found

    def _shared(self) -> List[Moved]:
        """The files in the slot's folder shared/, which is what the guest serves."""
        return [Moved(name, name[len('shared/'):]) for name in self._slot.names_in('shared')]

    def there(self, path: str) -> str:
        """A path in the guest, of a file of the task's."""
        return posixpath.join(self.machine.files, path)

    def in_slot(self, name: str) -> str:
        """The path of a file in the slot, for other processes too."""
        return os.path.abspath(self._slot.path(name))

    def _may_write(self, logical: str) -> bool:
        """Whether the file of that name is the task's: its link may be one that the project has sent."""
        if self._slot.is_within(self._slot.resolve(logical)):
            return True
        log.error('%s leads out of the task\'s folders, to %s: it isn\'t written', logical,
                  self._slot.resolve(logical))
        return False

    def upload(self, name: str) -> bool:
        """Fetches an output before the end, and asks the client to upload it. Whether that was possible."""
        if not self._may_write(name):
            return False
        error, status = 'a client uploads none in a folder before the end', True
        if '/' not in name:
            _, error, status = self.host.call('cpFileFromVM', self.machine.name, self.there(name),
                                              self._slot.resolve(name))
        if status:
            log.warning('%s isn\'t uploaded: %s', name, error)
            return False
        let_read(self._slot.resolve(name))
        open(self._slot.path('boinc_ufr_' + name), 'w').close()
        return True

    def _move_all(self) -> bool:
        """Moves the files that wait, one after the other. Whether all are where they should be."""
        self.machine.lease()
        told = self._transfer_told()
        if told.get('state') in ('waiting', 'running'):
            return False
        self._transfer = ''
        if told.get('state') == 'done':
            direction, _, target = self._waiting.pop(0)
            if direction == 'get':
                let_read(target)
        elif told and self._is_no_output(told['error']):
            log.error('what the program left can\'t be fetched, as if it were missing: %s', told['error'])
            self._waiting.pop(0)
        elif told:
            raise Trouble('%s: %s' % (os.path.basename(self._waiting[0][1]), told['error']))
        if self._waiting:
            direction, source, target = self._waiting[0]
            if direction == 'get':             # a client makes no folders of outputs that it copies
                os.makedirs(os.path.dirname(target), exist_ok=True)
            self._transfer = self._start_transfer(direction, self.machine.name, source, target)
        return not self._waiting

    def _start_transfer(self, *how: str) -> str:
        """The id of a transfer that was begun; or of the same one, which a wrapper before this one began."""
        try:
            return str(self.host.call('startTransfer', *how))
        except Busy as error:
            found = re.search('transfer-[0-9a-f]+', str(error))
            if not found:
                raise
            return found.group()

    def _is_no_output(self, error: str) -> bool:
        """Whether it tells that what is to be fetched is no file, nor leads to one: that never passes."""
        direction, source, _ = self._waiting[0]
        return direction == 'get' and (error in ['%s: %s' % (source, how) for how in NO_OUTPUT]
                                       or error.startswith(source + ' is a link to '))

    def _transfer_told(self) -> Dict[str, Any]:
        """What getTransfer tells of the one that was begun; {} where there is none, or no longer: a host
        agent that goes away forgets what it was moving."""
        try:
            return self.host.call('getTransfer', self._transfer) if self._transfer else {}
        except InvalidParams:
            return {}

    # While it runs.

    def begin(self) -> bool:
        """The command has been begun, and isn't halted; where it runs already, this changes nothing."""
        run = self._job.run(self._words.rest)
        self.host.call('runCmd', self.machine.name, run[0], run[1:], {}, self.machine.files, '',
                       {'id': self.command, 'endLeft': True, 'mayReturn': self._job.checkpoint == 'state'})
        return self.resume()

    def look(self) -> Look:
        """How far it is."""
        status = self.host.call('getCmdStatus', self.command)
        if status['ended']:
            seen = self._end(status)           # its last words may be in files
            return self._guest.look(self._job, seen, True) if seen.state in ('exited', 'signaled') else seen
        if not self.machine.runs():
            return Look(state='away')
        self._show_page()
        seen = Look(state=status['state'], cpu=cpu_of(status), fraction=fraction_of(status['progress']))
        return self._guest.look(self._job, seen)

    def _show_page(self) -> None:
        """The client's button opens the page that the VM serves, where the job file forwards its port; else
        the host agent's status page: by a link that opens it once, and soon."""
        now = time.monotonic()
        if not self._linked or now - self._linked > LINK_EVERY:
            self._linked = now
            port = self.machine.port_to(self._job.pf_guest_port)
            page = 'http://localhost:%d' % port if port else self.host.call('getStatusLink')
            self.shown.append('<web_graphics_url>%s</web_graphics_url>' % page)

    def show_desktop(self) -> bool:
        """The VM's screen can be looked at, where the job file wants that and the hypervisor can. Where there
        is a password, it is in a file of the slot that only this user can read."""
        if self._job.enable_remotedesktop:
            try:
                desktop = self.host.call('remoteDesktop', self.machine.name, True)
            except VMHostError as error:
                log.warning('no remote desktop: %s', error)
                return True
            self.shown.append('<remote_desktop_addr>%s:%s</remote_desktop_addr>'
                              % (desktop['address'], desktop['port']))
            path = self.in_slot('remote_desktop_password')
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 'w') as file:
                file.write(desktop.get('password', '') + '\n')
        return True

    def _end(self, status: Dict[str, Any]) -> Look:
        results = self.host.call('getCmdResults', self.command)
        if results['err']:
            log.info('the last that the program said:')
            for line in results['err'][-LAST_WORDS:].splitlines():
                log.info('  %s', agent.printable(line))
        return Look(True, results['state'], cpu_of(results), 1.0, int(results['exitCodeOrSignal']),
                    results['error'] or status['end'])

    def pause(self) -> bool:
        """It doesn't compute."""
        self.machine.pause(self.command)
        return True

    def resume(self) -> bool:
        """It does again."""
        self.machine.resume(self.command)
        return True

    def checkpoint(self) -> bool:
        """It can go on from here where its machine dies."""
        self.machine.checkpoint()
        return True

    def save(self) -> bool:
        """It takes neither processor nor memory, and can go on."""
        self.machine.save(self.command)
        return True

    def stay(self) -> bool:
        """The machine stays paused: its lease goes on."""
        self.machine.lease()
        return True

    def limit(self) -> bool:
        """The VM keeps within the preferences of now."""
        self.machine.limit()
        return True

    def _limits(self) -> Dict[str, Any]:
        """setLimits' limits, as the user's preferences have them."""
        init = self._slot.init
        percent = init.number('cpu_usage_limit')
        rates = [rate for rate in (init.number('max_bytes_sec_up'), init.number('max_bytes_sec_down'))
                 if rate > 0]
        return {'cpuPercent': max(1, int(percent)) if 0 < percent < 100 else 100,
                'netKBps': max(1, int(min(rates) / 1024)) if rates else 0}

    # After it ended.

    def collect(self) -> bool:
        """What it made is where the client looks for it; what is missing there isn't made up."""
        if self._record.collected:     # by a wrapper before this one; they may be gone in the guest by now
            return True
        if not self._collected:
            self._waiting = [('get', self.there(moved.path), self._slot.resolve(moved.logical))
                             for moved in self._outputs() if self._guest.exists(self.there(moved.path))]
            self._collected = True
        if not self._move_all():
            return False
        self._record.collected = True
        with contextlib.suppress(OSError):             # without it they are fetched again
            self._record.save()
        return True

    def _outputs(self) -> List[Moved]:
        found = self._job.outputs or [moved for moved in self._shared()
                                      if not os.path.exists(self._slot.resolve(moved.logical))]
        found = [moved for moved in found if self._may_write(moved.logical)]
        for moved in found:
            if not moved.optional and not self._guest.exists(self.there(moved.path)):
                log.error('the program left no file %s', moved.path)
        return found

    def remove(self) -> bool:
        """Nothing of the task is left on this machine."""
        self.machine.remove(self.command)
        return True


class GuestFiles:
    """Small files in the guest by which a program tells something."""

    LARGEST = 64 * 1024        # bytes of one that is read

    def __init__(self, work: Work, record: Record) -> None:
        self._work = work
        self._record = record
        self._looked = 0.0
        self._seen = {}                # type: Dict[str, str]  # {name: the file's time and size}
        self._complained = {}          # type: Dict[str, str]  # {name: why it can't be read}
        self._fraction = None          # type: Optional[float]
        self._trickles = []            # type: List[Tuple[str, str, str]]     # name, text, time and size

    def exists(self, path: str) -> bool:
        """Whether there is such a file in the guest."""
        return posixpath.basename(path) in self._list(posixpath.dirname(path))

    def look(self, job: Job, seen: Look, is_last: bool = False) -> Look:
        """What was seen, and what files tell; as a rule, only every two seconds."""
        now = time.monotonic()
        names = [job.fraction_done_filename, job.completion_trigger_file, job.temporary_exit_trigger_file,
                 job.trickle_trigger_file] + job.intermediate_upload_file
        if not any(names) or now - self._looked < LOOK_AT_FILES and not is_last:
            return seen._replace(fraction=first_of(seen.fraction, self._fraction))
        self._looked = now
        news = self._news({name: self._work.there(name) for name in names if name})
        texts = {}                     # type: Dict[str, str]
        for name in news:
            text = None if name in job.intermediate_upload_file else self._read(name)
            if text is not None:
                texts[name] = text
        if job.fraction_done_filename in texts:
            self._fraction = fraction_of(texts[job.fraction_done_filename] or '0')
        done, pause = [read_trigger(texts[name]) if name in texts else None
                       for name in (job.completion_trigger_file, job.temporary_exit_trigger_file)]
        if pause is not None and not done:     # the file is still there when the task goes on
            self._take(job.temporary_exit_trigger_file, self._seen[job.temporary_exit_trigger_file])
        if job.trickle_trigger_file in texts and len(self._trickles) < MOST_TRICKLES:
            self._trickles.append((job.trickle_trigger_file, texts[job.trickle_trigger_file],
                                   self._seen[job.trickle_trigger_file]))
        uploads = [name for name in job.intermediate_upload_file if name in news and self._work.upload(name)]
        for name in uploads:
            self._take(name, self._seen[name])
        messages = self._trickle() + ['<have_new_upload_file/>'] * bool(uploads)
        return seen._replace(fraction=first_of(seen.fraction, self._fraction), done=done, pause=pause,
                             messages=tuple(messages))

    def _trickle(self) -> List[str]:
        """Hands the next trickle message to the client, which takes one at a time."""
        path = self._work.in_slot('trickle_up.xml')
        if not self._trickles or os.path.exists(path):
            return []
        variety, text, mark = self._trickles.pop(0)
        with open(path, 'w', encoding='utf-8') as file:
            file.write('<variety>%s</variety>\n%s' % (variety, text))
        self._take(variety, mark)
        return ['<have_new_trickle_up/>']

    def _take(self, name: str, mark: str) -> None:
        """Remembers that this was acted upon: the wrapper that comes next doesn't do it again."""
        self._record.taken[name] = mark
        self._record.save()

    def _news(self, wanted: Dict[str, str]) -> List[str]:
        """Those of the names whose files have come, or changed, since the last look. wanted: {name: path}"""
        folders = {folder: self._list(folder) for folder in {posixpath.dirname(each)
                                                             for each in wanted.values()}}
        news = []
        for name, path in wanted.items():
            mark = folders[posixpath.dirname(path)].get(posixpath.basename(path))
            if mark is not None and mark not in (self._seen.get(name), self._record.taken.get(name)):
                self._seen[name] = mark
                news.append(name)
        return news

    def _list(self, folder: str) -> Dict[str, str]:
        """{name: 'when it was changed, size'} of what is in a folder of the guest; {} where there is none."""
        try:
            rows = self._work.host.call('listDir', self._work.machine.name, '/' + folder)
        except TransferError as error:
            if str(error).endswith(NO_SUCH_FOLDER):
                return {}
            raise
        return {row['name']: '%d %d' % (row['mtime'], row['size']) for row in rows if not row['isDir']}

    def _read(self, name: str) -> Optional[str]:
        """The text of a file that was just seen; None for one that is too large, or can't be read now: the
        next look tries that again."""
        if int(self._seen[name].split()[1]) > self.LARGEST:
            log.warning('%s in the guest is larger than %d bytes, and not read', name, self.LARGEST)
            return None
        local = self._work.in_slot('vmboinc.told')
        _, error, status = self._work.host.call('cpFileFromVM', self._work.machine.name,
                                                self._work.there(name), local)
        if status:
            if self._complained.get(name) != error:
                log.warning('%s in the guest can\'t be read: %s', name, error)
            self._complained[name] = error
            del self._seen[name]
            return None
        with open(local, encoding='utf-8', errors='replace') as file:
            return file.read(self.LARGEST)


def let_read(path: str) -> None:
    """Has this user's programs, such as the client, read a file that came with its mode in the guest."""
    with contextlib.suppress(OSError):         # it is another user's
        os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) | stat.S_IRUSR | stat.S_IWUSR)


def first_of(*values: Optional[float]) -> Optional[float]:
    """The first that isn't None."""
    return next((value for value in values if value is not None), None)


def cpu_of(told: Dict[str, Any]) -> float:
    """CPU seconds, by the guest's accounting."""
    used = told['resources']
    return float(used.get('ru_utime', 0)) + float(used.get('ru_stime', 0))
