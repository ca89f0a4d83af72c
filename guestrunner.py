"""Runners: processes that run commands to their end, and leave the results in the spool.

A runner outlives the agent.

What it is not: the start of a program (gueststart.py), or what forks the runners (guestforks.py). No threads;
the lock is a file's, which tells that a command has a runner.
"""

import collections
import contextlib
import errno
import gc
import json
import logging
import math
import os
import select
import signal
import socket
import time
from typing import Any, Dict, Iterator, List, Optional, Tuple

import agent
import protocol
from guestcgroup import LIMITS as OF_GROUPS
from guestcgroup import Group, no_limit  # noqa: F401
from guestinput import Inlet, read_output, set_size, wait_until_ready
from guestprocesses import (
    all_stand_still,
    descendants,
    has_children,
    has_proc,
    in_session,
    is_traced,
    signal_all,
    signal_session,
    stands_still,
    start_ticks,
    was_killed_for_memory,
)
from guestspool import (
    TRACE_PATIENCE,
    Command,
    describe_error,
    is_regular,
    make_way,
    named,
    private,
    remove,
    unrun_result,
)
from gueststart import Origin, Start, become_subreaper, blame, inheritance

ACK_PATIENCE = 0.05            # seconds after which results that nobody has yet are brought to the disk
FULL = (b'\r\n[the output limit of %d bytes is reached: nothing more is shown. Type ~. at the begin of a '
        b'line to leave; `kill -9` ends the command, and a new `shell` begins anew]\r\n')
DRAIN = 2.0                    # seconds for the pipes to be emptied after the end of the process
SETTLE = 0.05                  # seconds more for orphans to end, where there are any
CLOCK_DRIFT = 1.0              # seconds by which the machine's clock may be adjusted, without being set
UNCOUNTED = 0.001              # seconds of CPU that the sums of two ways to count may differ by
NOISE = 1.002                  # and as a factor, where there were many processes
END_PATIENCE = 10.0            # seconds for processes to be ended that the system doesn't let go of
FIRST_STATUS = 0.05            # seconds after which a command that still runs is reported
FIRST_LOOK, LONGEST_LOOK = 0.02, 1.0   # seconds between looks whether others than a stopped program go on
OUTPUT_IS_LOST = {'out-truncated': True, 'err-truncated': True}
LONGEST_TOLD = 300             # characters of an error in a result that has to fit into a pipe at once
PUMP = 256 * 1024              # bytes read from a pipe at a time
# What a program brings upon itself: no other process has sent it.
OF_ITSELF = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS,
             signal.SIGPIPE, signal.SIGXCPU, signal.SIGXFSZ)

log = logging.getLogger('vmguest')


class Runner:
    """Runs one command to its end, and leaves result.json; in a process without threads, in its own session.

    The program and its descendants stay below this process, whatever sessions they make: where the system has
    subreapers, orphans become its children. It feeds the spool from their pipes, and waits for all of them
    by wait4, which tells their exact usage. Where it may make a control group, they are in that, too.
    """

    def __init__(self, folder: str, process: 'RunnerProcess') -> None:
        self.command = Command('', folder)
        self.process = process
        self.request = {}              # type: Any
        self.pid = 0                   # of the program
        self.begin = self.started = 0.0        # monotonic, and by the machine's clock
        self.group = None              # type: Optional[Group]    # of its processes, where there can be one
        self.usage = Usage()
        self.pipes = {}                # type: Any       # {descriptor: (name, the file's descriptor)}
        self.terminal = -1             # the program's end of its terminal
        self.inlet = None              # type: Optional[Inlet]    # of a streamed input
        self.truncated = {'out': False, 'err': False}
        self.files = {}                # type: Dict[str, os.stat_result]   # of outputs, as they were closed
        self.failure = ''              # why writing the spool failed
        self.timed_out = False
        self.status = None             # type: Optional[int]      # of the program, once it ended
        self.own_cpu = 0.0             # seconds that it used, with what it has waited for
        self.deadline = None           # type: Optional[float]
        self.is_stopped = False        # the program itself, by a signal
        self.stopped_at = None         # type: Optional[float]    # since when all its processes are
        self.look_at, self.look_after = math.inf, 0.0  # when to see again whether they are; seconds on
        self.kill_at = None            # type: Optional[float]
        self.report_at = None          # type: Optional[float]
        self.refused = []              # type: List[int]   # processes that didn't get a signal of this runner
        self.told = ''                 # what process.json holds, which the program may delete or alter
        self._starter = 0              # the process that began the program, if that wasn't this one
        self._lock = None              # type: Any

    def claim(self) -> bool:
        """Takes the lock of the command; False where it was taken or cancelled before."""
        self._lock = self.command.claim()
        return self._lock is not None

    def run(self) -> None:
        """The whole life of the command."""
        try:
            self._start()
        except InterruptedError as error:
            self.abandon()
            return self.finish('cancelled', describe_error(error), by='signalCmd')
        except ChildProcessError as error:
            self.abandon()
            return self.finish('lost', describe_error(error))
        except Exception as error:      # of Python or the system: it is the command's
            return self.fail(error)
        while not self._reap():
            self._pump(self._patience())
            self._enforce()
            self._report_that_it_runs()
            self.process.unsynced.sync_due()
        ended = time.monotonic()
        self.timed_out |= was_ended_late(self, ended)
        self._close_terminal()
        while self.pipes and time.monotonic() < ended + DRAIN and not self.failure:
            self._pump(ended + DRAIN - time.monotonic())
        if self.timed_out or self.request.get('end-left') or signal.SIGKILL in self.command.sent_signals():
            self._end_all()
        self._wait_for_orphans(time.monotonic() + SETTLE)
        self._finish_exited(ended)

    def close(self) -> None:
        """Lets go of pipes, files, input and the lock."""
        self._close_pipes()
        if self.inlet is not None:
            self.inlet.close()
        if self.group is not None:
            self.group.remove()        # the agent does, once those have ended that were left
        if self._lock is not None:
            self._lock.close()

    def _close_pipes(self) -> None:
        self._close_terminal()
        for reader in list(self.pipes):
            self._close_pipe(reader)

    def _close_pipe(self, reader: int) -> None:
        name, target = self.pipes.pop(reader)
        os.close(reader)
        if target >= 0:
            self.files[name] = os.fstat(target)
            os.close(target)

    def _start(self) -> None:
        """Begins the program. Raises whatever prevents that."""
        self.request = json.loads(self._lock.read().decode('utf-8'))
        limit = int(self.request['output-limit'])
        self.room = {'out': limit, 'err': limit}
        # What was never begun may be begun again after a loss of power; nothing else may. The names tell
        # that it was begun: what request.json says can wait until it matters.
        for folder in (self.command.folder, os.path.dirname(self.command.folder)):
            agent.sync(folder)
        self._write_process()          # before anybody can stop this runner without being known
        self._spawn()
        timeout = self.request.get('timeout')
        self.deadline = self.begin + float(timeout) if timeout else None
        with contextlib.suppress(OSError):     # it runs, and is found by its environment, too
            self._write_process()
        is_awaited = self.inlet is not None or self.command.sent_signals()
        self.report_at = self.begin + (0 if is_awaited else FIRST_STATUS)

    def _write_process(self) -> None:
        # Torn, it is as good as none: what a dead runner left is found by its environment, too. What is there
        # is written over by what is longer, so that it is whole at any time.
        text = self.told = json.dumps({
            'pid': self.pid, 'started': self.started, 'begin': self.begin,
            'ticks': start_ticks(self.pid) if self.pid else 0, 'runner': os.getpid(),
            'group': self.group.folder if self.group is not None else ''})
        path = self.command.path('process.json')
        make_way(path)
        with named(path), os.fdopen(private(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC), 'wb', 0) as file:
            file.write(text.encode())

    def fail(self, error: Exception) -> None:
        """Ends what can't be accounted for, with the result: what began isn't told as what never did."""
        self.abandon()
        if self.status is not None:
            return self.finish('failed', describe_error(error), **as_it_ended(self))
        by = {'by': 'oom'} if self.group is not None and self.group.oom_kills() > 0 else {}
        self.finish('lost' if self.pid else 'failed', describe_error(error), **by)

    def abandon(self) -> None:
        """Ends a program that can't be accounted for, since a file of it couldn't be written, say."""
        self._close_pipes()
        if self.status is None:
            self._end_all()

    def _spawn(self) -> None:
        """Starts the program, in a session of its own. Raises what that raised, in the child too."""
        self._make_group()
        start = Start(self.command, self.request, self.process.origin, self.group)
        with contextlib.ExitStack() as stack:
            places = self._open_terminal() if self.request.get('terminal') else self._open_pipes(stack)
            self._open_outputs()       # what can't be kept doesn't begin
            self.begin, self.started = time.monotonic(), time.time()
            start.begin(*places)
        self.pid = start.wait()
        if self.pid != start.child:
            self._starter = start.child
        if self.group is not None and not self.group.holds(self.pid):
            self._do_without_group()

    def _make_group(self) -> None:
        """Raises OSError where there is no group that keeps the limits."""
        limits = limits_of_group(self.request)
        self.group = self.process.origin.place.make_group(self.command.folder)
        if self.group is not None:
            self.group.limit(limits)
        elif limits:
            raise no_limit(min(limits))

    def _do_without_group(self) -> None:
        """The program couldn't begin there: this kernel has no such fork, say. Raises OSError."""
        if self.group is not None:
            self.group.remove()
        self.group = None
        limits = limits_of_group(self.request)
        if limits:
            raise no_limit(min(limits))

    def _open_pipes(self, stack: contextlib.ExitStack) -> Tuple[int, int, int]:
        """The program's ends: two outputs, an input."""
        out, err, stdin = self._open_pipe('out', stack), self._open_pipe('err', stack), self.process.null
        if self.request.get('stream'):
            stdin, writer = os.pipe()
            stack.callback(os.close, stdin)
            self.inlet = Inlet(self.command.folder, writer, False)
        return out, err, stdin

    def _open_terminal(self) -> Tuple[int, int, int]:
        """The same, of which all are one terminal: what is written there is the output."""
        master, self.terminal = os.openpty()
        self.pipes[master] = ('out', -1)
        self.inlet = Inlet(self.command.folder, master, True)
        set_size(self.terminal, self.request['terminal']['rows'], self.request['terminal']['columns'])
        return self.terminal, self.terminal, self.terminal

    def _close_terminal(self) -> None:
        """Not before the program has ended: while nobody has it open, it would seem to be gone."""
        if self.terminal >= 0:
            os.close(self.terminal)
        self.terminal = -1

    def _open_pipe(self, name: str, stack: contextlib.ExitStack) -> int:
        """The program's end of the pipe of a stream, closed here by ``stack``."""
        reader, writer = os.pipe()
        stack.callback(os.close, writer)
        os.set_blocking(reader, False)
        self.pipes[reader] = (name, -1)
        return writer

    def _open_outputs(self) -> None:
        """Makes the files of both streams."""
        for reader, (name, _) in self.pipes.items():
            make_way(self.command.path(name))
            self.pipes[reader] = (name, private(self.command.path(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                                                | os.O_APPEND | os.O_CLOEXEC))

    def _reap(self) -> bool:
        """Waits for whatever has ended; whether the program has."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
                # Who has its parent trace it (ptrace) stands still at each signal, and is not stopped.
                if pid == self.pid and not (os.WIFSTOPPED(status) and is_traced(pid)):
                    self.is_stopped = os.WIFSTOPPED(status)
                    self.look_at, self.look_after = 0.0, FIRST_LOOK
            elif pid == self._starter:
                self.usage.of_starter = usage.ru_utime + usage.ru_stime
            else:
                self.usage.add(usage)
                if pid == self.pid:
                    self.status = status
                    self.own_cpu = usage.ru_utime + usage.ru_stime
        return self.status is not None

    def _note_stop(self) -> None:
        """The time for which all of it is stopped isn't its own: its timeout comes so much later."""
        now = time.monotonic()
        if now < self.look_at:
            return
        is_stopped = self.is_stopped or stands_still(self.pid)     # of one within vfork nothing tells that
        goes_on_looking = is_stopped or self.look_after < LONGEST_LOOK
        self.look_at = now + self.look_after if goes_on_looking else math.inf
        self.look_after = min(LONGEST_LOOK, 2 * self.look_after)
        is_still = is_stopped and has_proc() and all_stand_still(self._signalled())    # none is unseen
        if is_still == (self.stopped_at is not None):
            return
        if self.stopped_at is not None and self.deadline is not None:
            self.deadline += now - self.stopped_at
        self.stopped_at = now if is_still else None
        self.report()

    def _patience(self) -> float:
        deadline = None if self.timed_out or self.stopped_at else self.deadline
        due = [moment for moment in (deadline, self.kill_at, self.report_at, self.process.unsynced.due)
               if moment is not None]
        # A timeout of centuries is more than select takes.
        return max(0.0, min(60.0, min(due + [self.look_at]) - time.monotonic()))

    def _pump(self, timeout: float) -> None:
        """Waits for output, the end of a child, or the time; writes what came into the spool."""
        inlet = self.inlet
        if inlet is None:
            self._pump_once(timeout)
        elif self._pump_once(inlet.patience(timeout)):
            self._pump_once(inlet.patience(timeout))       # the key is shown before anything else is done

    def _pump_once(self, timeout: float) -> bool:
        """Whether a terminal was given what it may show at once."""
        inlet = self.inlet
        sources = list(self.pipes) + [self.process.wakeup]
        ready = wait_until_ready(sources + (inlet.readable() if inlet is not None else []),
                                 inlet.writable() if inlet is not None else [], timeout)
        for descriptor in [each for each in sources if each in ready]:
            if descriptor == self.process.wakeup:
                drain(descriptor)
                self.look_at, self.look_after = 0.0, FIRST_LOOK
            else:
                self._read_pipe(descriptor)
        return inlet is not None and inlet.react(ready)

    def _read_pipe(self, descriptor: int) -> None:
        name, target = self.pipes[descriptor]
        try:
            data = read_output(descriptor, PUMP)
        except BlockingIOError:
            return
        if not data:
            if self.request.get('terminal') and self.inlet is not None:
                self.inlet.close_target()
            self._close_pipe(descriptor)
            return
        kept = data[:self.room[name]]
        self.room[name] -= len(kept)
        if len(kept) < len(data) and not self.truncated[name]:
            self.truncated[name] = True
            if self.request.get('terminal'):       # else a person waits for ever to see what is typed
                kept += FULL % int(self.request['output-limit'])
        try:
            while kept and not self.failure:
                kept = kept[os.write(target, kept):]
        except OSError as error:
            # A full disk: the command can't be accounted for, and is ended.
            self.failure = describe_error(OSError(error.errno, error.strerror, self.command.path(name)))
            self._signal(signal.SIGKILL)
        if self.inlet is not None:
            self.inlet.tell()

    def _enforce(self) -> None:
        """TERM at the timeout, KILL kill-after seconds later."""
        self._note_stop()
        now = time.monotonic()
        if self.deadline is not None and now >= self.deadline and not self.timed_out and not self.stopped_at:
            self.timed_out = True
            self.kill_at = now + float(self.request['kill-after'])
            self._signal(signal.SIGTERM)
        elif self.kill_at is not None and now >= self.kill_at:
            self.kill_at = now + 1
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> int:
        """To all processes of the command; how many there were."""
        if not has_proc():
            return signal_session(self.pid, number) if self.pid else 0
        if number == signal.SIGKILL and self.group is not None and not self.request.get('leave'):
            self.group.kill()
        return signal_all(self._signalled(), number, self.refused if number else None)

    def _signalled(self) -> List[int]:
        """Whom signals to the command go to."""
        is_all = not self.request.get('leave')
        return self._members() if is_all else in_session(descendants(os.getpid()), self.pid)

    def _members(self) -> List[int]:
        """The living processes of the command: also those that have left its group, by su, say."""
        pids = descendants(os.getpid())
        if self.group is None or not self.group.is_populated():
            return pids
        return sorted(set(pids).union(self.group.pids()))

    def _end_all(self) -> None:
        """After a timeout or KILL, or where none is to be left: no process stays, but one that the system
        doesn't let go of."""
        give_up = time.monotonic() + float(self.request.get('kill-after', 0)) + END_PATIENCE
        while self._count_living() and time.monotonic() < give_up:
            if self.kill_at is None or time.monotonic() >= self.kill_at:
                self._signal(signal.SIGKILL)
            self._pump(0.02)

    def _wait_for_orphans(self, deadline: float) -> None:
        """Those that have no output any more are mostly about to end, too, and are to be measured."""
        self._reap()
        while has_children() and time.monotonic() < deadline:
            self._pump(max(0.0, deadline - time.monotonic()))
            self._reap()

    def _count_living(self) -> int:
        """How many processes live that get signals; those that have ended are waited for."""
        self._reap()
        return self._signal(0)

    def _report_that_it_runs(self) -> None:
        """Once, of a command that isn't over in a moment: the agent tells its status."""
        if self.report_at is not None and time.monotonic() >= self.report_at:
            self.report_at = None
            self.report(self.told)

    def report(self, told: str = '') -> None:
        """Has the agent, if it still lives, look at the command's folder, and remember what is ``told``."""
        try:
            name = os.path.basename(self.command.folder)
            os.write(self.process.reports, ' '.join(filter(None, (name, told))).encode() + b'\n')
        except OSError as error:
            log.debug('the agent is gone: %s', error)

    def _finish_exited(self, ended: float) -> None:
        self._close_pipes()
        limit = int(self.request['output-limit'])
        harms = {name: harm_to(self.command.path(name), file, limit - self.room[name], self.truncated[name])
                 for name, file in self.files.items()}
        more = self._of_the_group()
        more.update({name + '-truncated': it or bool(harms.get(name)) for name, it in self.truncated.items()})
        exited, code = how_it_ended(self.status or 0)
        state = 'timeout' if self.timed_out else 'exited' if exited else 'signaled'
        by = self._ended_by(exited, code)
        error = past_its_timeout(self) if self.timed_out else \
            'ENOMEM: the kernel killed it for want of memory' if by == 'oom' else \
            self._limit_that_ended_it(0 if exited or by == 'signalCmd' else code)
        error = error or max(harms.values(), default='')
        if self.failure:
            state, error = 'failed', self.failure
        self.finish(state, error, finished=exited, exitCodeOrSignal=code, by=by,
                    resources=self.usage.fields, inexact=self.usage.inexact(bool(self._starter)),
                    left=len(self._members()) or some_unseen(),
                    **times_of(self.begin, self.started, ended), **more)

    def _of_the_group(self) -> Dict[str, Any]:
        """What its control group alone can tell, as keys of the result."""
        if self.group is None:
            return {}
        cpu = self.group.cpu()
        # Processes that nobody waits for, as their parent ignores their end, and those that are left.
        uncounted = self.usage.of_starter + UNCOUNTED
        if cpu is not None and sum(cpu) > self.usage.cpu() + uncounted:
            self.usage.is_partial = sum(cpu) > NOISE * self.usage.cpu() + uncounted and not self._members()
            self.usage.fields.update(ru_utime=cpu[0], ru_stime=cpu[1])
        peak, kills = self.group.memory_peak(), self.group.oom_kills()
        return dict({} if peak is None else {'memory-peak': peak}, **{'oom-kills': kills} if kills else {})

    def _blame(self, number: int) -> Tuple[str, int]:
        return blame(self.request.get('limits', {}), number, self.group, self.own_cpu)

    def _limit_that_ended_it(self, number: int) -> str:
        """A sentence for who asked for a limit, of which this signal tells that it was met; else ''."""
        name, code = self._blame(number)
        is_sure = code != errno.ENOMEM
        return name and describe_error(OSError(code, 'ended by signal %d%s' % (
            number, '' if is_sure else ', perhaps for want of room'), name))

    def _ended_by(self, exited: bool, number: int) -> str:
        """Who ended the program: itself, timeout, signalCmd, oom (the kernel, for memory), or other.

        The only place that decides it. '': this runner, since the output couldn't be kept.
        """
        if self.failure:
            return ''
        if self.timed_out:
            return 'timeout'
        if exited:
            return 'itself'
        if number in self.command.sent_signals():
            return 'signalCmd'
        if number in OF_ITSELF or self._blame(number)[1] == errno.ETIME:
            return 'itself'
        if number == signal.SIGKILL and (self.group is not None and self.group.oom_kills()
                                         or was_killed_for_memory(self.pid, self.begin)):
            return 'oom'
        return 'other'

    def finish(self, state: str, error: str, **more: Any) -> None:
        """result.json, by rename. On a full disk, without reserved room, it takes the output's; in a folder
        made anew, where the program deleted it. Where nothing can be written any more (a file system that
        turned read-only, say), the agent is told the result itself."""
        try:
            return self.command.end(state, error, durable=False, **more)
        except OSError as failed:
            why = describe_error(failed)
        try:
            for name in filter(is_regular, map(self.command.path, ('out', 'err'))):
                os.truncate(name, 0)
            state, error = 'failed', why
            more.update(OUTPUT_IS_LOST)
            os.makedirs(self.command.folder, 0o700, exist_ok=True)
            self.command.end(state, error, **more)
        except OSError:
            log.error('%s: its result can\'t be written: %s', self.command.folder, why)
            self.report(json.dumps(dict(unrun_result(state, error[:LONGEST_TOLD]), **more)))


class Usage:
    """What the processes of a command have used: a sum, but for the peak memory."""

    def __init__(self) -> None:
        self.fields = dict.fromkeys(protocol.RUSAGE_FIELDS, 0)      # type: Any
        self.of_starter = 0.0          # seconds of CPU of who started it, perhaps in its group
        self.is_partial = False        # there were processes that nobody waited for: their CPU alone is known

    def add(self, usage: Any) -> None:
        """What wait4 tells of one that ended, and of children that it waited for."""
        for name in protocol.RUSAGE_FIELDS:
            value = getattr(usage, name)
            self.fields[name] = max(self.fields[name], value) if name == 'ru_maxrss' \
                else self.fields[name] + value

    def inexact(self, is_peak_known: bool) -> List[str]:
        """The fields that aren't exact."""
        if self.is_partial:
            return [name for name in protocol.RUSAGE_FIELDS if name not in ('ru_utime', 'ru_stime')]
        return [] if is_peak_known else ['ru_maxrss']

    def cpu(self) -> float:
        """Seconds of the processor."""
        return float(self.fields['ru_utime'] + self.fields['ru_stime'])


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


class RunnerProcess:
    """A runner's main: runs the commands of the spool folders that come, one after the other.

    Says by a byte that it is free again. It ends once the agent is gone, after the command that it has; after
    a command that left processes, which then belong to whoever takes orphans; and after one that changed what
    the next would begin with (``renice -p $PPID``).
    """

    def __init__(self, orders: socket.socket, reports: int, origin: Origin) -> None:
        """``reports``: where the agent reads names of folders."""
        os.setsid()
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        # A program may signal its parent (kill $PPID): that costs nobody the result. The agent's end is seen
        # by its socket.
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT,
                       signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
            signal.signal(number, lambda *_: None)
        self.wakeup, waker = os.pipe()         # it can be read once a child ended
        for descriptor in (self.wakeup, waker):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(waker)
        self.null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1):
            os.dup2(self.null, descriptor)
        gc.enable()
        self.reports = reports
        self.origin = origin
        if not become_subreaper():
            origin.starter = -1
        self.unsynced = Unsynced()
        self._orders = orders

    def run(self) -> None:
        """Until the agent is gone, or a command left processes."""
        as_begun = inheritance()
        try:
            for folder in folders_to_run(self._orders, self.unsynced):
                runner = Runner(folder, self)
                try:
                    run_command(runner)
                except Exception:       # the agent sees that the command has no runner any more
                    log.exception('runner of %s', folder)
                goes_on = not has_children() and inheritance() == as_begun and self._say_free()
                runner.report()         # after that: the next command may follow at once
                if not goes_on:
                    return
        finally:
            self.unsynced.sync_all()

    def _say_free(self) -> bool:
        """False where nobody gives this one commands any more."""
        try:
            return self._orders.send(b'.') > 0
        except ConnectionError:
            return False


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


def limits_of_group(request: Dict[str, Any]) -> Dict[str, Any]:
    """Those that a group has to keep."""
    limits = request.get('limits', {})
    return {name: limits[name] for name in OF_GROUPS if name in limits}


def run_command(runner: Runner) -> None:
    """Runs one command, whatever happens to an end that can be told."""
    try:
        if not runner.claim():
            return
        runner.run()
    except Exception as error:      # whatever it is: a command has a result
        log.exception('runner of %s', runner.command.folder)
        if runner.command.has_result():
            runner.abandon()
        else:
            runner.fail(error)
    finally:
        runner.close()
    runner.process.unsynced.add(runner.command)


def as_it_ended(runner: Runner) -> Dict[str, Any]:
    """Keys of the result of what began and has ended, where nothing more can be told."""
    exited, code = how_it_ended(runner.status or 0)
    return dict(times_of(runner.begin, runner.started, time.monotonic()), finished=exited,
                exitCodeOrSignal=code, by='itself' if exited else '', resources=runner.usage.fields,
                inexact=list(protocol.RUSAGE_FIELDS), **OUTPUT_IS_LOST)


def was_ended_late(runner: Runner, ended: float) -> bool:
    """Whether the agent had to: the runner had no turn, as it was traced (ptrace)."""
    is_over = runner.deadline is not None and ended > runner.deadline + TRACE_PATIENCE
    return is_over and not runner.is_stopped and runner.status == signal.SIGKILL \
        and signal.SIGKILL not in runner.command.sent_signals()


def past_its_timeout(runner: Runner) -> str:
    """What is told of a timeout; also whom the agent, as it isn't root, couldn't signal."""
    count = len(set(runner.refused))
    error = 'ETIME: ran longer than its timeout, %g s' % runner.request['timeout']
    if count:
        error += '; %d of its processes got no signal: another user\'s (setuid, sudo)' % count
    return error


def times_of(begin: float, started: float, ended: float) -> Dict[str, float]:
    """How long it took, when it began and ended, by the machine's clock as that stood at the begin; by how
    many seconds that was set meanwhile. ``begin``, ``ended``: monotonic; ``started``: begin by the clock."""
    wall = ended - begin
    was_set = time.time() - started - (time.monotonic() - begin)
    return dict({'wall': wall, 'started': started, 'ended': started + wall},
                **{'clock-set': round(was_set, 3)} if abs(was_set) > CLOCK_DRIFT else {})


def harm_to(path: str, file: os.stat_result, size: int, is_cut: bool) -> str:
    """What somebody did to an output's file that had that name, and so many bytes unless it was cut: a
    sentence, or ''. What has the name instead was never the program's, and is deleted."""
    with contextlib.suppress(OSError):
        there = os.lstat(path)
        if os.path.samestat(there, file):
            return '' if is_cut or there.st_size == size else \
                'EINVAL: what it wrote isn\'t what is there, as somebody changed ' + path
        remove(path)
    return 'ENOENT: what it wrote is lost, as somebody deleted ' + path


def some_unseen() -> int:
    """1 where a command left processes, and nothing tells how many; else 0."""
    return int(not has_proc() and has_children())


def how_it_ended(status: int) -> Tuple[bool, int]:
    """(whether it exited, with what code, or signal else), of a status of wait4."""
    exited = os.WIFEXITED(status)
    return exited, os.WEXITSTATUS(status) if exited else os.WTERMSIG(status)


def drain(descriptor: int) -> None:
    """Reads away what a wake-up pipe holds."""
    try:
        while len(os.read(descriptor, 4096)) == 4096:
            continue
    except BlockingIOError:
        return
