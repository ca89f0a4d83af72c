"""Runners: processes that run commands to their end, and leave the results in the spool.

A runner outlives the agent. It has no threads.
"""

import collections
import contextlib
import fcntl
import gc
import json
import logging
import os
import pwd
import resource
import select
import signal
import socket
import time
from typing import Any, Dict, Iterator, Optional, Tuple  # noqa: F401

import agent
import protocol
from guestprocesses import family, peak_memory, signal_session, start_ticks
from guestspool import PASSED, Command, describe_error, private

log = logging.getLogger('vmguest')
ACK_PATIENCE = 0.05            # seconds after which results that nobody has yet are brought to the disk
DRAIN = 2.0                    # seconds for the pipes to be emptied after the end of the process
FIRST_LOOK = 0.002             # seconds between the first two looks at a program's memory
LONGEST_LOOK = 1.0
EXEC_NEEDS = 1024              # KiB that a child may still touch on its way into exec
PUMP = 256 * 1024              # bytes read from a pipe at a time
LIMITS = {'as': resource.RLIMIT_AS, 'cpu': resource.RLIMIT_CPU, 'fsize': resource.RLIMIT_FSIZE,
          'nofile': resource.RLIMIT_NOFILE, 'nproc': getattr(resource, 'RLIMIT_NPROC', None)}


class Runner:
    """Runs one command to its end, and leaves result.json; in a process without threads, in its own session.

    It is the parent of the command, feeds the spool from its pipes, and waits for it with wait4, which
    tells the exact usage of this command and the children that it waited for.
    """

    def __init__(self, folder: str, wakeup: int, reports: int, unsynced: 'Unsynced') -> None:
        """``wakeup``: a descriptor that can be read once a child ended. ``reports``: the agent's, for the
        folder's name. ``unsynced``: what earlier commands of this process left."""
        self.command = Command('', folder)
        self.pid = 0
        self.pipes = {}                # type: Dict[int, Tuple[str, int]]
        self.truncated = {'out': False, 'err': False}
        self.failure = ''              # why writing the spool failed
        self.timed_out = False
        self.ended = False             # whether the program was waited for
        self.kill_at = None            # type: Optional[float]
        self.floor = 0                 # KiB below which wait4 can't tell the program's peak memory
        self.peak = 0                  # KiB that the program was seen to have, as long as below that
        self.next_look = None          # type: Optional[float]
        self.look_every = FIRST_LOOK
        self.report_at = None          # type: Optional[float]
        self._lock = None              # type: Any
        self._wakeup = wakeup
        self._reports = reports
        self.unsynced = unsynced

    def claim(self) -> bool:
        """Takes the lock of the command; False where another runner has it, or had it before.

        ``runner`` is another name of request.json, which is locked before it has that name.
        """
        path = self.command.path('request.json')
        try:
            self._lock = open(path, 'r+b')
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.link(path, self.command.path('runner'))
            return True
        except (BlockingIOError, FileExistsError, FileNotFoundError) as error:
            log.debug('%s is not for this runner: %s', path, error)   # emptied, while this one slept, say
            return False

    def run(self) -> None:
        """The whole life of the command."""
        try:
            self._start()
        except Exception as error:      # of Python, subprocess or the system: it is the command's
            self.abandon()
            return self._finish('failed', describe_error(error))
        deadline = self._deadline()
        while not self._has_ended():
            self._pump(self._patience(deadline))
            self._enforce(deadline)
            self._look_at_memory()
            self._report_that_it_runs()
            self.unsynced.sync_due()
        status, usage = self.status
        ended = time.monotonic()
        while self.pipes and time.monotonic() < ended + DRAIN and not self.failure:
            self._pump(ended + DRAIN - time.monotonic())
        if self.timed_out:
            self._end_session()
        self._finish_exited(status, usage, ended)

    def close(self) -> None:
        """Lets go of pipes, files and the lock."""
        for reader, (_, target) in self.pipes.items():
            os.close(reader)
            if target >= 0:
                os.close(target)
        self.pipes = {}
        if self._lock is not None:
            self._lock.close()

    def _deadline(self) -> Optional[float]:
        timeout = self.request.get('timeout')
        return self.begin + float(timeout) if timeout else None

    def _start(self) -> None:
        """Begins the program. Raises whatever prevents that."""
        self.request = json.loads(self._lock.read().decode('utf-8'))
        limit = int(self.request['output-limit'])
        self.room = {'out': limit, 'err': limit}
        # What was never begun may be begun again after a loss of power; nothing else may. The names tell
        # that it was begun: what request.json says can wait until it matters.
        for folder in (self.command.folder, os.path.dirname(self.command.folder)):
            agent.sync(folder)
        self.floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + EXEC_NEEDS
        self._spawn()
        self.next_look = time.monotonic()
        self._write_process()
        self._open_outputs()
        self.report_at = self.begin + FIRST_STATUS

    def _write_process(self) -> None:
        # Torn, it is as good as none: what a dead runner left is found by its environment, too.
        with open(self.command.path('process.json'), 'w', opener=private) as file:
            file.write(json.dumps({'pid': self.pid, 'started': self.started, 'begin': self.begin,
                                   'ticks': start_ticks(self.pid)}))

    def abandon(self) -> None:
        """Ends a program that can't be accounted for, since a file of it couldn't be written, say."""
        if self.pid and not self.ended:
            os.kill(self.pid, signal.SIGKILL)
            signal_session(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.ended = True

    def _spawn(self) -> None:
        """Starts the program, in a session of its own. Raises what that raised, in the child too."""
        import subprocess  # the fork server has it already; the agent never needs it
        request, user = self.request, self._find_user(self.request.get('user'))
        settles = user is not None or request.get('nice') or request.get('limits')
        with contextlib.ExitStack() as stack:
            report, reporter = os.pipe()
            stack.callback(os.close, report)
            stack.callback(os.close, reporter)
            out, err = self._open_pipe('out', stack), self._open_pipe('err', stack)
            self.begin, self.started = time.monotonic(), time.time()
            try:
                process = subprocess.Popen(
                    [request['cmd']] + request['args'], env=self._environment(user),
                    stdin=stack.enter_context(self._open_stdin()), stdout=out, stderr=err,
                    start_new_session=True, cwd=None if settles else self._work_folder(),
                    preexec_fn=(lambda: self._settle(user, reporter)) if settles else None)
            except subprocess.SubprocessError:
                raise StartError(*json.loads(os.read(report, 4096).decode()))
        self.pid, process.returncode = process.pid, 0      # it is waited for here, and not by Popen

    def _open_pipe(self, name: str, stack: contextlib.ExitStack) -> int:
        """The program's end of the pipe of a stream, closed here by ``stack``."""
        reader, writer = os.pipe()
        stack.callback(os.close, writer)
        os.set_blocking(reader, False)
        self.pipes[reader] = (name, -1)
        return writer

    def _open_outputs(self) -> None:
        """Makes the files of both streams, while the program comes to life."""
        for reader, (name, _) in self.pipes.items():
            self.pipes[reader] = (name, os.open(self.command.path(name),
                                                os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))

    def _work_folder(self) -> str:
        return os.path.join(self.request['root'], self.request['path'])

    def _environment(self, user: Any) -> Dict[str, Any]:
        """What the program finds in its environment: the agent's, the user's, what was asked for."""
        env = {} if self.request.get('env-clear') else dict(os.environ)  # type: Dict[str, Any]
        if user is not None:
            env.update(HOME=user.pw_dir, USER=user.pw_name, LOGNAME=user.pw_name)
        env['VM_PROGRESS_FILE'] = self.command.path('progress')
        env.update({name: os.fsencode(value) and value for name, value in self.request['env'].items()})
        return env

    def _settle(self, user: Any, reporter: int) -> None:
        """In the child, just before the program: priority, limits, user, folder."""
        try:
            if self.request.get('nice'):
                os.nice(int(self.request['nice']))
            for name, value in self.request.get('limits', {}).items():
                self._limit(name, int(value))
            if user is not None and user.pw_uid != os.getuid():
                self._open_progress(user)
                os.initgroups(user.pw_name, user.pw_gid)
                os.setgid(user.pw_gid)
                os.setuid(user.pw_uid)
            os.chdir(self._work_folder())
        except Exception as error:
            os.write(reporter, json.dumps([type(error).__name__, str(error)]).encode()[:4096])
            raise

    def _open_stdin(self) -> Any:
        name = self.request.get('fileForStdin')
        if 'stdin' in self.request:
            return open(self.command.path('stdin'), 'rb')
        return open(os.path.join(self.request['root'], name) if name else os.devnull, 'rb')

    def _find_user(self, name: Optional[str]) -> Any:
        if not name:
            return None
        try:
            return pwd.getpwnam(name)
        except KeyError:
            raise LookupError('no user %s' % name)

    def _open_progress(self, user: Any) -> None:
        """Another user can write the progress file, though not look into the spool."""
        path = self.command.path('progress')
        os.close(private(path, os.O_WRONLY | os.O_CREAT))
        os.chown(path, user.pw_uid, user.pw_gid)
        os.chmod(self.command.folder, PASSED)

    def _limit(self, name: str, value: int) -> None:
        which = LIMITS.get(name)
        if which is None:
            raise ValueError('no limit %s on this system' % name)
        resource.setrlimit(which, (value, value + 5 if name == 'cpu' else value))

    def _has_ended(self) -> bool:
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        self.status = status, usage
        self.ended = pid != 0
        return self.ended

    def _patience(self, deadline: Optional[float]) -> float:
        due = [moment for moment in (None if self.timed_out else deadline, self.kill_at, self.next_look,
                                     self.report_at, self.unsynced.due)
               if moment is not None]
        # A timeout of centuries is more than select takes.
        return max(0.0, min(60.0, min(due) - time.monotonic())) if due else 60.0

    def _pump(self, timeout: float) -> None:
        """Waits for output, the end of a child, or the time; writes what came into the spool."""
        ready, _, _ = select.select(list(self.pipes) + [self._wakeup], [], [], timeout)
        for descriptor in ready:
            if descriptor == self._wakeup:
                drain(descriptor)
            else:
                self._read_pipe(descriptor)

    def _read_pipe(self, descriptor: int) -> None:
        name, target = self.pipes[descriptor]
        try:
            data = os.read(descriptor, PUMP)
        except BlockingIOError:
            return
        if not data:
            del self.pipes[descriptor]
            os.close(descriptor)
            os.close(target)
            return
        kept = data[:self.room[name]]
        self.room[name] -= len(kept)
        self.truncated[name] |= len(kept) < len(data)
        try:
            while kept and not self.failure:
                kept = kept[os.write(target, kept):]
        except OSError as error:
            # A full disk: the command can't be accounted for, and is ended.
            self.failure = describe_error(error)
            signal_session(self.pid, signal.SIGKILL)

    def _enforce(self, deadline: Optional[float]) -> None:
        """TERM at the timeout, KILL kill-after seconds later."""
        now = time.monotonic()
        if deadline is not None and now >= deadline and not self.timed_out:
            self.timed_out = True
            self.kill_at = now + float(self.request['kill-after'])
            signal_session(self.pid, signal.SIGTERM)
        elif self.kill_at is not None and now >= self.kill_at:
            self.kill_at = now + 1
            signal_session(self.pid, signal.SIGKILL)

    def _look_at_memory(self) -> None:
        """Looks at the peak memory of a program that needs less than the process it was forked from.

        Linux keeps the peak across exec, so that wait4 can't tell less than ``floor``. Above it
        wait4 is exact, and nobody needs to look any more.
        """
        now = time.monotonic()
        if self.next_look is None or now < self.next_look:
            return
        self.peak = max([self.peak] + [peak_memory(pid) for pid in family(self.pid)])
        self.look_every = min(LONGEST_LOOK, 2 * self.look_every)
        self.next_look = now + self.look_every if self.peak < self.floor else None

    def _report_that_it_runs(self) -> None:
        """Once, of a command that isn't over in a moment: the agent tells its status."""
        if self.report_at is not None and time.monotonic() >= self.report_at:
            self.report_at = None
            self.report()

    def report(self) -> None:
        """Has the agent, if it still lives, look at the command's folder."""
        try:
            os.write(self._reports, (os.path.basename(self.command.folder) + '\n').encode())
        except OSError as error:
            log.debug('the agent is gone: %s', error)

    def _memory(self, usage: Any) -> int:
        if usage.ru_maxrss > self.floor or not self.peak:
            return usage.ru_maxrss
        return min(self.peak, usage.ru_maxrss)

    def _end_session(self) -> None:
        """After a timeout: no process of the session stays."""
        while signal_session(self.pid, 0):
            now = time.monotonic()
            if self.kill_at is None or now >= self.kill_at:
                signal_session(self.pid, signal.SIGKILL)
            time.sleep(0.02)

    def _finish_exited(self, status: int, usage: Any, ended: float) -> None:
        exited = os.WIFEXITED(status)
        code = os.WEXITSTATUS(status) if exited else os.WTERMSIG(status)
        state = 'timeout' if self.timed_out else 'exited' if exited else 'signaled'
        error = ''
        if self.timed_out:
            error = 'ran longer than its timeout of %g s' % float(self.request['timeout'])
        if self.failure:
            state, error = 'failed', self.failure
        resources = {name: getattr(usage, name) for name in protocol.RUSAGE_FIELDS}
        resources['ru_maxrss'] = self._memory(usage)
        self._finish(state, error, finished=exited, exitCodeOrSignal=code,
                     resources=resources, wall=ended - self.begin, started=self.started,
                     **{'out-truncated': self.truncated['out'], 'err-truncated': self.truncated['err']})

    def _finish(self, state: str, error: str, **more: Any) -> None:
        """result.json, by rename. On a full disk, without reserved room, it takes the output's."""
        try:
            self.command.end(state, error, durable=False, **more)
        except OSError as failed:
            for name in filter(self.command.has, ('out', 'err')):
                os.truncate(self.command.path(name), 0)
            more.update({'out-truncated': True, 'err-truncated': True})
            self.command.end('failed', describe_error(failed), **more)


class StartError(OSError):
    """What the child met before the program began."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Unsynced:
    """Results that may not be on the disk yet, in the process that left them.

    Most are acknowledged within milliseconds, and need never be: the host has them safe then.
    """

    def __init__(self) -> None:
        self._waiting = collections.deque()    # type: collections.deque     # (when it is due, Command)

    @property
    def due(self) -> Optional[float]:
        """When ``sync_due`` has something to do, by the monotonic clock."""
        return self._waiting[0][0] if self._waiting else None

    def add(self, command: Command) -> None:
        self._waiting.append((time.monotonic() + ACK_PATIENCE, command))

    def sync_due(self) -> None:
        """Brings to the disk what the host hasn't acknowledged in time."""
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            self._sync(self._waiting.popleft()[1])

    def sync_all(self) -> None:
        """The same, without waiting for anybody."""
        while self._waiting:
            self._sync(self._waiting.popleft()[1])

    def _sync(self, command: Command) -> None:
        try:
            if not command.has('acked'):
                command.sync()
        except OSError as error:       # its folder may be gone by now, or the disk
            log.warning('%s: not brought to the disk: %s', command.folder, describe_error(error))


def be_runner(orders: socket.socket, reports: int) -> None:
    """A runner's main: runs the commands of the spool folders that come, one after the other.

    Says by a byte that it is free again. It ends once the agent is gone, after the command that it has.
    """
    os.setsid()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    wakeup, waker = os.pipe()
    for descriptor in (wakeup, waker):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(waker)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    gc.enable()
    unsynced = Unsynced()
    try:
        for folder in folders_to_run(orders, unsynced):
            runner = Runner(folder, wakeup, reports, unsynced)
            try:
                run_command(runner)
            except Exception:       # the agent sees that the command has no runner any more
                log.exception('runner of %s', folder)
            orders.send(b'.')       # before the report: the next command may follow at once
            runner.report()
    finally:
        unsynced.sync_all()


def folders_to_run(orders: socket.socket, unsynced: Unsynced) -> Iterator[str]:
    """The spool folders that the agent names, until it is gone."""
    line = b''
    while True:
        due = unsynced.due
        ready, _, _ = select.select([orders], [], [], due and max(0.0, due - time.monotonic()))
        unsynced.sync_due()
        if not ready:
            continue
        data = orders.recv(65536)
        if not data:
            return
        line += data
        if line.endswith(b'\n'):    # no other order comes before this one is done
            yield os.fsdecode(line[:-1])
            line = b''


def run_command(runner: Runner) -> None:
    """Runs one command, whatever happens to an end that can be told."""
    try:
        if not runner.claim():
            return
        runner.run()
    except Exception as error:      # whatever it is: a command has a result
        log.exception('runner of %s', runner.command.folder)
        runner.abandon()
        if not runner.command.has('result.json'):
            runner.command.end('failed', describe_error(error))
    finally:
        runner.close()
    runner.unsynced.add(runner.command)
FIRST_STATUS = 0.05            # seconds after which a command that still runs is reported


def drain(descriptor: int) -> None:
    """Reads away what a wake-up pipe holds."""
    try:
        while len(os.read(descriptor, 4096)) == 4096:
            continue
    except BlockingIOError:
        return
