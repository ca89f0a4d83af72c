"""The spool: what a guest remembers of commands, a folder for each.

What it is not: who runs them (guestrunner.py), or tells the host (guestreports.py). No threads; no lock but
that of a file, by which one agent at a time uses a spool, and one that whoever signals a command holds.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import math
import os
import re
import signal
import stat
import threading
import time
from typing import Any, Dict, Iterator, List, Optional, Tuple

import agent
import protocol
from guestcgroup import Group
from guestidentity import make_folder
from guestprocesses import (
    PAGE,
    all_stand_still,
    descendants,
    has_proc,
    in_session,
    is_stopped,
    is_traced,
    processes_with,
    signal_all,
    signal_session,
    stands_still,
    start_ticks,
    tracer_of,
)
from guestrequests import read_request

log = logging.getLogger('vmguest')


# --- spool -----------------------------------------------------------------------------------

SHOWN_AS = '.vmguest-spool'     # the name under which the host reads it by Chirp
FORMAT = 1                     # of request.json and result.json; a newer one is left alone
ENDS = ('exited', 'signaled', 'timeout', 'failed', 'lost', 'cancelled', 'expired')
# The way of a command through its states: from each to which. docs/protocol.md has the same table.
WAY = {
    # Past `starting`: a runner that the agent before this one asked may take it late.
    'queued': ('starting', 'running', 'stopped', 'exited', 'signaled', 'timeout', 'failed', 'lost',
               'cancelled', 'expired'),
    'starting': ('queued', 'running', 'stopped', 'exited', 'signaled', 'timeout', 'failed', 'lost',
                 'cancelled', 'expired'),
    'running': ('stopped', 'exited', 'signaled', 'timeout', 'failed', 'lost', 'cancelled'),
    'stopped': ('running', 'exited', 'signaled', 'timeout', 'failed', 'lost', 'cancelled'),
    'exited': ('acknowledged',), 'signaled': ('acknowledged',), 'timeout': ('acknowledged',),
    'failed': ('acknowledged',), 'lost': ('acknowledged',), 'cancelled': ('acknowledged',),
    'expired': ('acknowledged',),
    'acknowledged': ('emptied',),
    'emptied': (),
}
SAFE_ID = re.compile('[A-Za-z0-9][A-Za-z0-9._@-]{0,127}')
EMPTYING = 0o1700              # mode of a folder whose command is over, while its files are deleted
EMPTIED = 0o500                # … and from then on
RESERVED = 8192                # bytes that each command has on the disk from its begin, for its result
LONGEST_ERROR = 1000           # characters of an error, so that a result fits into that
# What makes a request another one: all that its host says each time, whatever this guest's defaults are.
OWN_KEYS = ('cmd', 'args', 'env', 'path', 'user', 'fileForStdin', 'timeout', 'limits')
SIGNAL, DUE = 'signal-', 'due-'        # begins of files' names: of signals that the host sent; that wait
LARGEST_JSON = 16 * 1024 * 1024        # characters of a file that is read as JSON
STOPPING = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
KILL_ROUNDS = 10               # of KILL, for what forks as fast as it is killed
TRACE_PATIENCE = 1.0           # seconds by which a runner may be late that a process traces
LARGEST_PROGRESS = 4096        # bytes of a progress file
SWEEP_SLICE = 200              # folders that one look for old ones goes through
SAVE_CLOCK_EVERY = 600.0       # seconds: so much more a boot may add to what is kept for a while


def folder_name(cmd_id: str) -> str:
    """A name for the folder of a cmd-id, whatever text that is."""
    if SAFE_ID.fullmatch(cmd_id):
        return cmd_id
    import hashlib  # rarely needed, and it weighs some MB
    return 'x-' + hashlib.sha256(cmd_id.encode('utf-8', 'surrogateescape')).hexdigest()


def unrun_result(state: str, error: str) -> Dict[str, Any]:
    """The results of what never ran, or of which nothing is known."""
    return {'format': FORMAT, 'state': state, 'error': error[:LONGEST_ERROR], 'finished': False,
            'exitCodeOrSignal': -1, 'resources': dict.fromkeys(protocol.RUSAGE_FIELDS, 0),
            'wall': 0.0, 'started': 0.0, 'ended': time.time(),
            'out-truncated': False, 'err-truncated': False}


def private(path: str, flags: int) -> int:
    """An opener of files that are the agent's alone: their folders may be passed by others.

    Whatever a program has put in the place of one (a pipe, a link, a device), nobody waits for that, nor
    reads it. Raises OSError.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, 'no regular file', path)
    return descriptor


def is_regular(path: str) -> bool:
    """Whether there is a file of that name, and neither a link to one nor anything else."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def is_want(error: Exception) -> bool:
    """Whether it tells nothing of the file, only that the system lacks descriptors or memory now."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def remove(path: str) -> None:
    """Deletes whatever has that name, a folder too. Raises OSError."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        import shutil  # rarely needed, and it brings compressors along
        shutil.rmtree(path)
    else:
        os.remove(path)


def make_way(path: str) -> None:
    """Deletes what isn't a file, where one is to be. Raises OSError."""
    if os.path.lexists(path) and not is_regular(path):
        remove(path)


def reserve(path: str) -> None:
    """Takes room on the disk, that ``write_file`` of that path uses later. Raises OSError."""
    with open(path + '.new', 'wb', opener=private) as file:
        file.write(b' ' * RESERVED)


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """Errors within are of that file: those of a descriptor don't say so."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, path)
        raise


def write_file(path: str, text: str, durable: bool = True) -> None:
    """Writes a small file so that it is either whole, or not there; ``durable``: on the disk, too.

    Where its room was reserved, a full disk can't prevent it.
    """
    new = path + '.new'
    for place in (new, path):
        make_way(place)
    with named(new), open(new, 'rb+' if os.path.exists(new) else 'wb', opener=private) as file:
        file.write(text.encode('utf-8'))
        file.truncate()
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.rename(new, path)


class Folder:
    """The files of one command, which its program may have replaced by anything."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def has(self, name: str) -> bool:
        return os.path.exists(self.path(name))

    def read(self, name: str) -> Dict[str, Any]:
        """A JSON file of the folder. Raises OSError, ValueError."""
        with open(self.path(name), opener=private) as file:
            text = file.read(LARGEST_JSON + 1)
        if len(text) > LARGEST_JSON:
            raise ValueError('%s: larger than any that was written here' % self.path(name))
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError('%s: no JSON object' % self.path(name))
        return value

    def holds(self, name: str, content: bytes) -> bool:
        """Whether a file of it is just that."""
        return self.slice(name, 0, len(content) + 1) == content

    def slice(self, name: str, offset: int, length: int) -> bytes:
        return self.read_part(name, offset, length)[0]

    def read_part(self, name: str, offset: int, length: int) -> Tuple[bytes, int]:
        """A slice of a file, and the file's size."""
        try:
            descriptor = private(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return b'', 0
        try:
            size = os.fstat(descriptor).st_size
            return os.pread(descriptor, max(0, min(length, size - offset)), offset), size
        except OSError:
            return b'', 0
        finally:
            os.close(descriptor)


class Command(Folder):
    """One command: its spool folder, and what the agent knows of it.

    The folder holds request.json (what was asked for), runner (locked while its runner lives),
    process.json (the pid), out, err, stdin, progress, signal-N, result.json, acked. It is empty, and not
    writable, once all that is over. Until there is a result, result.json.new keeps room for it.
    """

    def __init__(self, cmd_id: str, folder: str) -> None:
        super().__init__(folder)
        self.cmd_id = cmd_id
        self.request = {}              # type: Dict[str, Any]
        self.state = 'queued'          # as far as the agent has seen: see WAY
        self.held_until = 0.0          # monotonic: until then it waits for the host to want it
        self.begun = 0.0               # monotonic: when the fork server was asked
        self._process = {}             # type: Dict[str, Any]  # that its runner told: the file may be altered
        self._runner = (0, 0)          # its pid and start time, while somebody may delete what says so
        self.told = 0.0                # monotonic: when its status was last sent
        self._progress = ''            # as it was read last
        self.sent = 0.0                # monotonic: when its results were last sent
        self.taken = None              # type: Optional[int]   # bytes of a streamed input, as far as is known
        self.signals = []              # type: List[int]   # that its processes haven't got yet
        self.refused = 0               # processes that didn't get the last one, as they are another user's
        self.delivery = threading.Lock()       # held by who sends them
        self.noted = []                # type: List[int]   # that the host has sent, as far as this agent knows
        self.unwritten = None          # type: Optional[Dict[str, Any]]    # its result, if the disk has no place

    def size(self, name: str) -> int:
        if name == 'err' and self.request.get('terminal'):
            return 0                   # what is shown there is all out
        try:
            found = os.lstat(self.path(name))
        except OSError:
            return 0
        return found.st_size if stat.S_ISREG(found.st_mode) else 0

    def write_request(self, request: Dict[str, Any], now: float) -> None:
        """Keeps what was asked for; ``now`` by the spool's clock. Raises OSError."""
        reserve(self.path('result.json'))
        stdin = request.pop('stdin', None)
        if stdin is not None:
            with open(self.path('stdin'), 'wb', opener=private) as file:
                file.write(stdin)
            request['stdin'] = True
        request.update({'cmd-id': self.cmd_id, 'format': FORMAT, 'received': time.time()})
        if request.get('expires'):
            request['expires-at'] = now + request['expires']
        self.request = request
        self.taken = 0 if request.get('stream') else None
        # Not by rename: whether a torn one was begun is seen by its other name, runner. The runner brings
        # both names to the disk, before the program begins.
        with open(self.path('request.json'), 'w', opener=private) as file:
            file.write(json.dumps(request))

    def is_another(self, message: protocol.Message, defaults: Any) -> bool:
        """Whether a CMD_RUN asks for something else than what this command was, as far as can be told."""
        if 'cmd' not in self.request:       # cancelled before it came, say
            return False
        try:
            asked = read_request(message, defaults)
        except protocol.BadWord:
            return True
        stdin = asked.get('stdin')
        if any(asked.get(name) != self.request[name] for name in OWN_KEYS if name in self.request) \
                or (stdin is not None) != bool(self.request.get('stdin')):
            return True
        return stdin is not None and self.has('stdin') and not self.holds('stdin', stdin)

    def runner_lives(self) -> bool:
        """Whether the runner has its lock; also where that can't be told, without descriptors, say."""
        try:
            with open(self.path('request.json'), opener=private) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except OSError as error:       # of one that lives: BlockingIOError
            if error.errno in (errno.ENOENT, errno.EINVAL, errno.ELOOP):
                return self._program_lives()   # deleted, or replaced by what is no file
            log.debug('%s: %s', self.folder, error)
            return True

    def _program_lives(self) -> bool:
        """Whether the program does that its runner told of: then that still has this command."""
        pid, ticks = int(self._process.get('pid', 0)), self._process.get('ticks')
        return bool(pid and ticks) and start_ticks(pid) == ticks

    def was_cut(self) -> bool:
        """Whether it was begun, and power was lost before the system wrote what it had been asked for."""
        return self.has('runner') and not self.slice('runner', 0, PAGE).strip(b'\0')

    def read_process(self) -> Dict[str, Any]:
        """What process.json holds, or held when its runner told it. Raises OSError, ValueError."""
        return self._process or self.read('process.json')

    def process(self) -> int:
        """The pid, which is the session, of the command; 0 where it hasn't begun."""
        try:
            return int(self.read_process()['pid'])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def group(self) -> Optional[Group]:
        """Its control group, if it has one whose processes are to be ended with it."""
        try:
            folder = self.read_process()['group']
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Group(str(folder)) if folder and not self.request.get('leave') else None

    def note_runner(self) -> None:
        """Remembers who its runner is."""
        if not self._runner[0]:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                runner = int(self.read_process()['runner'])
                self._runner = runner, start_ticks(runner)

    def end_what_is_left(self) -> bool:
        """Of one whose folder was emptied, unless the runner that is remembered lives: that makes the folder
        anew at the end, with a result. Whether there will be none; then there is a folder again."""
        pid, ticks = self._runner
        if pid and start_ticks(pid) == ticks or self.has_result():
            return False
        self.end_processes()
        os.makedirs(self.folder, 0o700, exist_ok=True)
        return True

    def was_deleted(self) -> bool:
        """Whether no runner can take it any more; then it has a folder, so that it isn't run again."""
        if self.has('request.json'):
            return False
        os.makedirs(self.folder, 0o700, exist_ok=True)
        return True

    def continue_runner(self) -> None:
        """Has its living runner go on, where somebody on this machine stopped it. A process of the command
        that traces it (ptrace), so that it can't end the command in time, is ended."""
        try:
            runner = int(self.read_process()['runner'])
        except (OSError, ValueError, KeyError, TypeError):
            return
        if is_stopped(runner) or not has_proc():       # to one that goes on, it is nothing
            signal_all([runner], signal.SIGCONT)
        elif is_traced(runner) and 0 < self.request.get('timeout', 0) < self.wall() - TRACE_PATIENCE:
            signal_all(set(self.members()).intersection([tracer_of(runner)]), signal.SIGKILL)

    def wall(self) -> float:
        """Seconds since the program began; 0 where it hasn't."""
        try:
            return max(0.0, time.monotonic() - float(self.read_process()['begin']))
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    def progress(self) -> str:
        """What the program wrote into $VM_PROGRESS_FILE; while it writes anew, what was read there last."""
        found = self.slice('progress', 0, LARGEST_PROGRESS).decode('utf-8', 'replace').strip()
        self._progress = found or self._progress
        return self._progress

    def is_running(self) -> bool:
        """Whether a runner has it, or will."""
        return self.state in ('starting', 'running', 'stopped')

    def told_state(self) -> str:
        """The state as the host is told it: what no runner has taken yet still waits."""
        if self.state != 'starting':
            return self.state
        return 'running' if self.has_begun() else 'queued'

    def has_begun(self) -> bool:
        """Whether a runner has taken it."""
        return bool(self._process) or self.has('runner')

    def has_ended(self) -> bool:
        """Whether it has a result, or had one."""
        return self.state in ENDS or self.state == 'acknowledged'

    def read_state(self) -> str:
        """The state, as the folder shows it."""
        if self.has_result():
            try:
                return str(self.result()['state'])
            except (OSError, ValueError) as error:
                return 'running' if is_want(error) else 'lost'
        if not self.has_begun():
            return 'queued'
        is_still = stands_still(self.process()) and all_stand_still(self.members())
        return 'stopped' if is_still else 'running'

    def end(self, state: str, error: str, durable: bool = True, **more: Any) -> None:
        """Writes a result for what has none; not ``durable``: ``sync`` brings it to the disk."""
        text = json.dumps(dict(unrun_result(state, error), **more))
        write_file(self.path('result.json'), text, durable)

    def end_anyhow(self, state: str, error: str, **more: Any) -> None:
        """The same, where the disk takes nothing any more, too: then this agent remembers it."""
        try:
            self.end(state, error, **more)
        except OSError as failed:
            log.error('%s: its result can\'t be written: %s', self.folder, describe_error(failed))
            self.unwritten = dict(unrun_result(state, error), **more)

    def remember(self, text: str) -> None:
        """Takes what a runner tells, as JSON: who runs the command, or a result that it couldn't write; ''
        for nothing."""
        with contextlib.suppress(ValueError):
            told = json.loads(text) if text else {}
            if 'state' in told:
                self.unwritten = told
            elif told:
                self._process = told

    def has_result(self) -> bool:
        return self.unwritten is not None or is_regular(self.path('result.json'))

    def sync(self) -> None:
        """Brings request, output and result to the disk."""
        for name in ('request.json', 'out', 'err', 'result.json'):
            if is_regular(self.path(name)):
                with open(self.path(name), 'rb', opener=private) as file:
                    agent.sync_descriptor(file.fileno())
        agent.sync(self.folder)

    def result(self) -> Dict[str, Any]:
        """What result.json says. Raises OSError, ValueError where that is no result."""
        result = self.read('result.json') if self.unwritten is None else self.unwritten
        if result.get('state') not in ENDS:
            raise ValueError('no state %.40r' % result.get('state'))
        if result.get('by') == 'other' and result.get('exitCodeOrSignal') in self.noted:
            result['by'] = 'signalCmd'     # which the runner wasn't told
        return result

    def sound_result(self) -> Dict[str, Any]:
        """The result; of one that is torn, that it is lost. Raises OSError where it can't be read now, or
        the torn one can't be set aside."""
        try:
            return self.result()
        except (OSError, ValueError) as error:
            if is_want(error):
                raise                       # it is whole, for all we know
            return self._replace_result(error)

    def _replace_result(self, error: Exception) -> Dict[str, Any]:
        aside = self.path('result.json.corrupt-%d' % time.time())
        log.error('%s is damaged (%s): set aside as %s', self.path('result.json'), error, aside)
        os.rename(self.path('result.json'), aside)
        self.end('lost', 'its result was damaged: %s' % error)
        return self.result()

    def acknowledge(self, now: float) -> None:
        """Notes that the host has the results; ``now`` by the spool's clock. Raises OSError."""
        make_way(self.path('acked'))
        open(self.path('acked'), 'w', opener=private).close()
        os.utime(self.path('acked'), (now, now))

    def empty(self, now: float, aside: str = '') -> None:
        """Deletes the files, or moves them to the folder ``aside``; ``now`` by the spool's clock.

        The folder stays, so that the command isn't run again.
        """
        os.chmod(self.folder, EMPTYING)        # should this agent die here, the next one goes on
        for name in os.listdir(self.folder):
            if aside:
                os.rename(self.path(name), os.path.join(aside, name))
            else:
                remove(self.path(name))
        os.utime(self.folder, (now, now))
        os.chmod(self.folder, EMPTIED)

    def discard(self) -> None:
        """Deletes folder and files of what was never begun. Raises OSError."""
        for name in ('request.json', 'stdin', 'result.json.new', 'result.json'):
            with contextlib.suppress(FileNotFoundError):
                remove(self.path(name))
        try:
            os.rmdir(self.folder)       # which needs no descriptor, unlike a list of what is in it
        except OSError:
            for name in os.listdir(self.folder):
                remove(self.path(name))
            os.rmdir(self.folder)

    def claim(self) -> Any:
        """Takes the command for a runner, or to cancel it: a file that is its lock as long as it is open.

        None where somebody took it before. ``runner`` is another name of request.json, which is locked
        before it has that name. Where a file system has no hard links, it is a file of its own.
        """
        path = self.path('request.json')
        try:
            lock = open(path, 'r+b', opener=private)
        except FileNotFoundError as error:
            log.debug('%s is not to be taken: %s', path, error)     # emptied, while a runner slept, say
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._name_runner(path)
            return lock
        except (BlockingIOError, FileExistsError, FileNotFoundError) as error:
            log.debug('%s is not to be taken: %s', path, error)
        lock.close()
        return None

    def _name_runner(self, request: str) -> None:
        """Raises FileExistsError, FileNotFoundError."""
        try:
            os.link(request, self.path('runner'))
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError:
            with open(self.path('runner'), 'x', opener=private) as file:
                file.write('{}')

    def note_signal(self, number: int) -> None:
        """Notes, before it is sent, that a signal is the host's: so the runner knows who sent it.

        By a file without content, for which a full disk mostly has room; where it has none, this agent
        remembers it. Raises OSError.
        """
        self.noted.append(number)
        open(self.path('%s%d' % (SIGNAL, number)), 'w', opener=private).close()

    def sent_signals(self) -> List[int]:
        """The numbers of the signals that the host has sent so far."""
        return self._noted(SIGNAL)

    def due_signals(self) -> List[int]:
        """Those among them of which an agent noted that the processes hadn't got them yet, as they came."""
        return [number for _, number, _ in self._noted_as_due()]

    def _noted(self, kind: str) -> List[int]:
        return [int(name[len(kind):]) for name in self._names() if re.fullmatch(kind + '[0-9]{1,3}', name)]

    def _names(self) -> List[str]:
        """Of its files."""
        try:
            return os.listdir(self.folder)
        except OSError:
            return []

    def _noted_as_due(self) -> List[Tuple[int, int, str]]:
        """[(place in the order, number of the signal, name of the file)], as they came. Older agents noted
        no place."""
        found = [re.fullmatch(DUE + '(?:([0-9]{1,9})-)?([0-9]{1,3})', name) for name in self._names()]
        return sorted((int(match.group(1) or 0), int(match.group(2)), match.group())
                      for match in found if match)

    def note_due(self) -> None:
        """Notes those that wait for the processes: should this agent end, the next one sends them, in their
        order."""
        with self.delivery, contextlib.suppress(OSError):      # of a full disk
            noted = self._noted_as_due()
            first = noted[-1][0] + 1 if noted else 1
            for place, number in enumerate(self.signals[len(noted):], first):
                open(self.path('%s%d-%d' % (DUE, place, number)), 'w', opener=private).close()

    def _drop_due(self, number: int) -> None:
        """Its processes have the first of that number."""
        for _, due, name in self._noted_as_due():
            if due == number:
                with contextlib.suppress(OSError):
                    os.unlink(self.path(name))
                return

    def deliver(self) -> None:
        """Sends what is due, in the order in which it came, as far as its processes are seen: the next look
        tries again."""
        with self.delivery:
            while self.signals and self.process() and self.send_signal(self.signals[0]):
                self._drop_due(self.signals.pop(0))

    def members(self) -> List[int]:
        """The living processes of the command, while its runner lives."""
        try:
            process = self.read_process()
            runner, pid = int(process['runner']), int(process['pid'])
        except (OSError, ValueError, KeyError, TypeError):
            return []
        found = descendants(runner)
        # Just handed from the starter to its runner, the program may be seen at neither; and without /proc
        # there is nothing to be seen at all.
        if pid and pid not in found and start_ticks(pid) == process.get('ticks'):
            found = found + [pid]
        if not self.runner_lives():     # asked afterwards: else these may be of the runner's next command
            return []
        if self.request.get('leave'):
            return in_session(found, pid)
        group = self.group()
        return found if group is None else sorted(set(found).union(group.pids()))

    def send_signal(self, number: int) -> bool:
        """To all its processes; whether there were any. Another user's, as of a setuid program, may refuse
        it: how many did is noted, for who asked."""
        refused = []                   # type: List[int]
        if number != signal.SIGKILL:
            is_sent = bool(signal_all(self.members(), number, refused))
        else:
            is_sent = self.kill_group()
            for _ in range(KILL_ROUNDS):       # what is forked meanwhile is killed, too
                del refused[:]
                if not signal_all(self.members(), number, refused):
                    break
                is_sent = True
        self.refused = len(refused)
        if number in STOPPING:
            self._have_runner_look()
        return is_sent or bool(refused)

    def _have_runner_look(self) -> None:
        """Wakes its runner, which isn't told of a program that is stopped within ``vfork``."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            signal_all([int(self.read_process()['runner'])], signal.SIGCHLD)

    def kill_group(self) -> bool:
        """KILLs all at once, where it has a control group; whether there were any. ``members`` may tell of
        others."""
        group = self.group()
        return group is not None and self.runner_lives() and group.kill()

    def end_processes(self) -> int:
        """KILLs what a dead runner left of the command; how many processes there were.

        Only what is surely the command's: its control group; its session, while the leader is the process
        that was started, by pid and start time; and whatever has its VM_PROGRESS_FILE, which names the
        folder.
        """
        try:
            process = self.read_process()
            leader, ticks = int(process['pid']), process.get('ticks')
        except (OSError, ValueError, KeyError, TypeError):
            leader, ticks = 0, None
        group = self.group()
        count = int(group is not None and group.kill())
        if leader and ticks and start_ticks(leader) == ticks:
            count += signal_session(leader, signal.SIGKILL)
        return count + signal_all(processes_with('VM_PROGRESS_FILE', self.path('progress')), signal.SIGKILL)


class Clock:
    """Seconds that passed while agents used a spool: setting the machine's clock doesn't move it.

    What is kept for a while carries it as the time of change of its file or folder. It goes on over
    the agents of one boot, and over a boot from where it was saved last. So time may be missing (while
    the machine was off, or slept), and things are kept for longer; never for less.
    """

    def __init__(self, path: str, boot: str) -> None:
        self._path = path
        self._boot = boot
        self._begin = self._read() - time.monotonic()
        self.save()

    def _read(self) -> float:
        try:
            with open(self._path) as file:
                saved = json.load(file)
            here = saved['boot'] == self._boot
            return float(saved['seconds']) + max(0.0, time.monotonic() - saved['monotonic']) * here
        except FileNotFoundError:
            return 0.0
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning('%s is damaged (%s): what is in the spool is kept for longer', self._path, error)
            return 0.0

    def now(self) -> float:
        """Seconds since the first agent. From any thread."""
        return self._begin + time.monotonic()

    def age(self, path: str) -> float:
        """Seconds since a file or folder was stamped. One from the future is stamped now.

        It has its stamp from the machine's clock, or this clock began anew.
        """
        seconds = self.now() - os.stat(path).st_mtime
        if seconds < 0:
            os.utime(path, (self.now(), self.now()))
        return max(0.0, seconds)

    def save(self) -> None:
        """Has the next boot go on from here."""
        self._saved = time.monotonic()
        try:
            write_file(self._path, json.dumps({'format': FORMAT, 'boot': self._boot, 'seconds': self.now(),
                                               'monotonic': self._saved}))
        except OSError as error:
            log.warning('%s: %s', self._path, describe_error(error))

    def tick(self) -> None:
        """Saves it now and then."""
        if time.monotonic() - self._saved >= SAVE_CLOCK_EVERY:
            self.save()


class Spool:
    """The folders of all commands of one agent, named by its id. One agent at a time may use it."""

    def __init__(self, state_dir: str, machine_id: str, boot: str) -> None:
        """``boot``: see read_boot_id. Raises AgentError where it can't be made, or another agent uses it."""
        self.chirp_path = '/%s/%s' % (SHOWN_AS, folder_name(machine_id))
        self.shown = os.path.join(state_dir, 'spool')      # the folder that the host may read
        self.folder = os.path.join(self.shown, folder_name(machine_id))
        self._entries = None           # type: Any    # of the sweep that is under way
        self._troubles = agent.Seldom(log)
        for folder in (state_dir, self.shown, self.folder):
            make_folder(folder)
        try:
            self._lock = open(os.path.join(self.folder, '.agent'), 'w', opener=private)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise agent.AgentError('another vmguest with the id %s runs on %s; give this one an id of '
                                   'its own in [VM]' % (machine_id, state_dir))
        except OSError as error:
            raise agent.AgentError('the spool %s can\'t be used: %s' % (self.folder, error.strerror))
        self.clock = Clock(os.path.join(self.folder, '.clock'), boot)

    def close(self) -> None:
        """Lets another agent use it."""
        self.clock.save()
        self._lock.close()

    def command(self, cmd_id: str) -> Command:
        """A command by its id, whether its folder is there or not."""
        return Command(cmd_id, os.path.join(self.folder, folder_name(cmd_id)))

    def find(self, cmd_id: str) -> Optional[Command]:
        """A command that has files here, acknowledged or not. Raises OSError: see ``is_want``."""
        command = self.command(cmd_id)
        try:
            command.request = command.read('request.json')
        except (OSError, ValueError) as error:
            if is_want(error):
                raise                   # it may be there
            return None
        command.state = command.read_state()
        return command

    def claim(self, cmd_id: str) -> Optional[Command]:
        """The folder of a new command; None where there is one. mkdir is the lock. Raises OSError."""
        command = self.command(cmd_id)
        try:
            os.mkdir(command.folder, 0o700)
        except FileExistsError:
            return None
        return command

    def is_there(self) -> bool:
        """Whether its folder is still the one that this agent locked."""
        try:
            return os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self._lock.name))
        except OSError:
            return False

    def names(self) -> Iterator[str]:
        """Names of all folders of commands; there may be a million."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not entry.name.startswith('.') and entry.is_dir(follow_symlinks=False):
                    yield entry.name

    def set_aside(self, name: str, why: Any) -> None:
        """Puts files out of the way that can't be understood; their command is never run again."""
        command = Command('', os.path.join(self.folder, name))
        aside = os.path.join(self.folder, '.corrupt-%s-%d' % (name, time.time()))
        log.error('%s is damaged (%s): set aside as %s', command.folder, why, aside)
        command.end_processes()
        try:
            os.makedirs(aside, 0o700, exist_ok=True)
            command.empty(self.clock.now(), aside)      # it may have run: its folder stays
        except OSError as error:        # a full disk, say
            log.error('%s stays as it is: %s', command.folder, describe_error(error))

    def load(self) -> List[Command]:
        """The commands that aren't over, in the order in which they were asked for.

        Raises AgentError where a newer agent wrote one of them.
        """
        found = []
        for name in self.names():
            try:
                command = self._load(os.path.join(self.folder, name))
            except (OSError, ValueError, KeyError, TypeError) as error:
                if is_want(error):
                    raise agent.AgentError('the spool %s can\'t be read now: %s'
                                           % (self.folder, describe_error(error)))
                self.set_aside(name, error)
                continue
            if command is not None:
                found.append(command)
        return sorted(found, key=lambda command: command.request.get('received', 0))

    def _load(self, folder: str) -> Optional[Command]:
        command = Command('', folder)
        mode = stat.S_IMODE(os.stat(folder).st_mode)
        if mode == EMPTYING:
            command.empty(self.clock.now())
        if mode in (EMPTYING, EMPTIED):
            return None
        try:
            command.request = command.read('request.json')
        except (FileNotFoundError, ValueError):
            if command.was_cut():
                command.request = {'cmd-id': os.path.basename(folder)}     # of no boot, so it is lost
            elif command.has('runner') or command.has('result.json'):
                raise
            else:
                command.discard()      # claimed, and never begun: the host asks again
                return None
        if command.request.get('format', FORMAT) > FORMAT:
            raise agent.AgentError('the spool %s was written by a newer vmguest (format %s, this one '
                                   'knows %d): update this one'
                                   % (self.folder, command.request['format'], FORMAT))
        command.cmd_id = str(command.request['cmd-id'])
        command.state = 'acknowledged' if command.has('acked') else command.read_state()
        if command.state == 'queued' and 'cmd' not in command.request:
            command.discard()          # to be refused or cancelled, which wasn't written down any more
            return None
        command.held_until = math.inf if command.state == 'queued' else 0.0
        return command

    def let_go(self, cmd_id: str) -> None:
        """Empties the folder of what was acknowledged, before its time. From any thread."""
        command = self.command(cmd_id)
        try:
            if command.has('acked'):
                command.empty(self.clock.now())
                log.info('%s: its files are deleted', cmd_id)
        except OSError as error:       # the sweep comes by again
            self._troubles.warn('forget', '%s: %s', command.folder, describe_error(error))

    def sweep(self, keep_spool: float, dedupe_ttl: float) -> bool:
        """Empties what was acknowledged long ago, forgets what was emptied longer ago.

        Goes through the next folders only, so that a million of them hold nothing up; True at
        the end of a round.
        """
        if self._entries is None:
            self._entries = os.scandir(self.folder)
        entries = list(itertools.islice(self._entries, SWEEP_SLICE))
        for entry in entries:
            try:
                self._sweep_one(Command('', entry.path), keep_spool, dedupe_ttl)
            except OSError as error:
                self._troubles.warn('sweep', '%s: %s', entry.path, error)
        if len(entries) == SWEEP_SLICE:
            return False
        self._entries = None
        self.clock.tick()
        return True

    def _sweep_one(self, command: Command, keep_spool: float, dedupe_ttl: float) -> None:
        name = os.path.basename(command.folder)
        if name.startswith('.'):
            if name.startswith('.corrupt-') and self.clock.age(command.folder) > dedupe_ttl:
                import shutil  # rarely needed, and it brings compressors along
                shutil.rmtree(command.folder)
        elif command.has('acked'):
            if self.clock.age(command.path('acked')) >= keep_spool:
                command.empty(self.clock.now())
                log.debug('%s: its files are deleted', name)
        elif stat.S_IMODE(os.stat(command.folder).st_mode) == EMPTIED \
                and self.clock.age(command.folder) > dedupe_ttl:
            os.rmdir(command.folder)


def describe_error(error: Exception) -> str:
    """What went wrong: errno's name first, where it has one."""
    number = getattr(error, 'errno', None)
    if not number:
        return '%s: %s' % ('EINVAL' if isinstance(error, ValueError) else type(error).__name__, error)
    about = getattr(error, 'filename', None)
    name = os.fsdecode(about) if isinstance(about, (str, bytes)) else ''
    return '%s: %s%s' % (errno.errorcode.get(number, number), getattr(error, 'strerror', error),
                         ': ' + name if name else '')
