"""The machine of a BOINC task: a VM of its own, or one that is there and that all tasks share.

Both have the same steps, each of them short, and to be asked for again at any time.

What it is not: what runs there (boincwork.py). It names no hypervisor. Threads: all of it belongs to one.
"""

import contextlib
import logging
import os
import shutil
import time
from typing import Any, Callable, Dict, List

from boinchost import HostAgent, Trouble
from boincjob import RESET
from boincslot import Record
from faults import (
    AlreadyExists,
    InvalidParams,
    NoSuchCommand,
    NoSuchVM,
    NotSupported,
    TransferError,
    VMHostError,
)
from hostclient import NoHost

log = logging.getLogger('vmboinc')

CHECKPOINT = 'checkpoint '     # + a number: name of a snapshot
LEASE = 60                     # seconds without its wrapper after which a VM is saved
TELL_AFTER = 10.0              # seconds without a machine after which it is told what is waited for
LEASE_EVERY = 10.0             # seconds between two renewals
COMMAND_ID = 'boinc-'          # begin of the id of a task's command
NO_SUCH_FOLDER = ('does not exist', 'not a directory')     # how the error of a folder that isn't there ends


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
