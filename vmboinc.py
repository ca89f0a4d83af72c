#!/usr/bin/env python3
"""The BOINC wrapper: what a BOINC client starts as a task's main program.

It has the host agent run the task's science in a virtual machine, and speaks BOINC's application protocol to
the client: progress, CPU time, suspend, resume, quit, abort, finished. docs/boinc.md says how a project's
admin uses it, and what a volunteer sees.

What it is not: a host agent. It starts one where none answers, and talks to it as the command line does.

Threads: ``main`` hears the client and tells it how far the task is, ten times a second; ``work`` does one
step after the other. They hand each other a step, and what came of it.

The next line tells a BOINC server that this program talks through a file that is mapped into memory.
API_VERSION_7.20.5
"""

import codecs
import contextlib
import logging
import os
import queue
import runpy
import signal
import sys
import threading
import time
from typing import Any, Callable, List, Optional

import agent
import boincslot
from boinchost import HostAgent
from boincjob import FILE, RESET, Job, JobError, read_words
from boinclife import FIRST_DELAY, LONGEST_DELAY, End, Life
from boincslot import (
    CONTROL,
    GRAPHICS,
    HEARTBEAT,
    STATUS,
    TRICKLE_UP,
    Channels,
    Client,
    Record,
    Slot,
    words_of,
)
from boincwork import Work

log = logging.getLogger('vmboinc')

USAGE = """\
usage: vmboinc.py [WORD ...]           as a BOINC task, in its slot; by hand in a folder with a vbox_job.xml
       vmboinc.py --version
       vmboinc.py --bundle FILE        write the whole program as the one file of an app version
       vmboinc.py --host-agent INI [VERB ...]
                                       run the host agent, as a task does by itself; or ask the running one
"""
BUNDLED, PROGRAMS = ['status.html'], ['vmhost']        # what the bundle holds beside this program
TICK = 0.1                     # seconds between two looks at what the client says
STATUS_EVERY = 1.0
LAST_STATUS = 2.0              # seconds in which the client reads the last status
LOCK_PATIENCE = 35.0           # seconds that an earlier wrapper may still need to go
LOCK_DELAY = 600               # seconds of the temporary exit after that
TAKEN = 'Waiting to acquire slot directory lock. Another instance may be running.'      # as libboinc says it
# Signals after which a client starts a task again, as if it were its machine's fault and not the task's.
STARTED_AGAIN = [getattr(signal, 'SIG' + name, 0) for name in ('HUP', 'INT', 'QUIT', 'KILL', 'TERM', 'STOP')]


class Hands:
    """The thread ``work``, which does a step at a time."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._steps = queue.Queue()    # type: queue.Queue
        self._done = queue.Queue()     # type: queue.Queue
        threading.Thread(target=self._run, name='work', daemon=True).start()

    def begin(self, step: str) -> None:
        """Has a step done. Returns at once."""
        self._steps.put(step)

    def result(self, timeout: float) -> Optional[List[Any]]:
        """[value, error] of the step that ended; None where none does within so many seconds."""
        try:
            return self._done.get(timeout=timeout)
        except queue.Empty:
            return None

    def _run(self) -> None:
        while True:
            step = self._steps.get()
            try:
                self._done.put([getattr(self._work, step)(), None])
            except Exception as error:         # Life knows what each kind means
                log.debug('%s', step, exc_info=True)
                self._done.put([None, error])


class Task:
    """One run of the wrapper, in its slot."""

    def __init__(self, slot: Slot, words: List[str], command: List[str]) -> None:
        """Raises JobError, OSError.

        command    what starts a host agent, but for its ini file
        """
        now = time.monotonic()
        init = slot.init
        self._slot = slot
        self._channels = Channels(slot.memory())
        job = read_job(slot)
        for warning in job.warnings:
            log.warning('%s', warning)
        read = read_words(words, init.number('ncpus', 1.0))
        for word in read.passed_over:
            log.warning('%s does nothing here', word)
        record = Record(slot.path(Record.FILE), max(0.0, init.number('wu_cpu_time')))
        host = HostAgent(os.path.join(slot.project_dir, 'vmhost'), command)
        self._work = Work(slot, job, read, record, host)
        self._life = Life(job, record, now, init.number('checkpoint_period') or 300.0)
        self._client = Client(int(init.number('client_pid')), slot.has_client, now)
        self._told, self._is_alone = 0.0, False
        self._may_name = job.checkpoint != 'none'
        self._has_named = False

    def run(self) -> End:
        """Lives until the end, and gives it."""
        hands = Hands(self._work)
        while self._life.end is None:
            now = time.monotonic()
            self._hear(now)
            step = self._life.next(now)
            if step:
                hands.begin(step)
            self._tell(now)
            result = hands.result(TICK)
            if result is not None:
                self._take(*result)
        return self._life.end

    def broke(self, error: Exception) -> End:
        """How it ends where this process can't go on."""
        self._life.broke(error)
        assert self._life.end is not None
        return self._life.end

    def _take(self, value: Any, error: Optional[Exception]) -> None:
        if error is not None:
            self._life.failed(error, time.monotonic())
        else:
            self._life.succeeded(value, time.monotonic())

    def _hear(self, now: float) -> None:
        if self._is_alone:             # what comes is from the next client, and for the next wrapper
            return
        for word in words_of(self._channels.receive(CONTROL)):
            if word == 'reread_app_info':
                self._slot.read_init()
            self._life.hear(word, now)
        self._client.hear(self._channels.receive(HEARTBEAT), now)
        if self._client.is_gone(now):
            self._is_alone = True
            self._life.hear('quit', now)

    def _tell(self, now: float) -> None:
        if now - self._told >= STATUS_EVERY and self._life.is_told():
            self._told = now
            self.tell_status()
        shown = self._work.shown       # the other thread only appends to it
        if shown and self._channels.send(GRAPHICS, shown[0]):
            shown.pop(0)
        if self._life.messages and self._channels.send(TRICKLE_UP, self._life.messages[0]):
            self._life.messages = self._life.messages[1:]

    def tell_status(self) -> bool:
        """Tells the client how far it is; False where it hasn't read the last one."""
        init = self._slot.init
        status = self._life.status(init.number('fraction_done_start'), init.number('fraction_done_end', 1.0))
        if init.takes_memory and self._work.vm_memory:
            status += '<wss>%e</wss>\n' % self._work.vm_memory
        return self._channels.send(STATUS, status + self._whose_process())

    def _whose_process(self) -> str:
        """Names the VM's process as the task's own, to a client that would halt all tasks for it.

        A client kills what was named last when this process ends: before that it is this process itself; and
        no VM is named that has no checkpoint to go on from, if this one is killed.
        """
        ends = self._life.end is not None or self._life.wish in ('quit', 'abort')
        named = self._work.vm_pid if self._may_name and not ends and self._slot.init.minds_foreign_cpu else 0
        if not named and not self._has_named:
            return ''
        self._has_named = True
        return '<other_pid>%d</other_pid>\n' % (named or os.getpid())

    def tell_last_status(self) -> None:
        """Has the client read the last one before the process ends."""
        deadline = time.monotonic() + LAST_STATUS
        while not self.tell_status() and time.monotonic() < deadline:
            time.sleep(TICK)
        while self._channels.waits(STATUS) and time.monotonic() < deadline:
            time.sleep(TICK)


def read_job(slot: Slot) -> Job:
    """Raises JobError, OSError."""
    try:
        with open(slot.resolve(FILE), 'rb') as file:
            content = file.read()
        is_wide = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)        # as PowerShell writes
        return Job(content.decode('utf-16' if is_wide else 'utf-8', 'replace'))
    except FileNotFoundError:
        raise JobError('%s is missing in the slot: %sthe application\'s version lacks it' % (FILE, RESET))


class PlainFormatter(logging.Formatter):
    """Lines for stderr.txt, that the client can copy into its own files."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line, with its traceback if it has one."""
        return boincslot.without_markup(super().format(record))


def log_to_stderr() -> None:
    """What is logged goes to the task's stderr.txt."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter('%(asctime)s vmboinc: %(message)s', '%Y-%m-%d %H:%M:%S'))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def run_task(words: List[str]) -> int:
    """Runs the task of this slot; gives the exit code."""
    log_to_stderr()
    signal.signal(signal.SIGINT, signal.SIG_DFL)       # it ends as by any other signal
    slot = Slot('.')
    try:
        if slot.finished() is None and not boincslot.wait_for_lock(slot, LOCK_PATIENCE):
            return leave(slot, End(delay=LOCK_DELAY, message=TAKEN))
        code = slot.finished()         # by now: the wrapper before may have brought it to its end
        if code is not None:
            log.info('the task was over already, as %s says%s', boincslot.FINISH_FILE,
                     '' if slot.has_client else ': without that file, it begins anew')
            return exit_code(code)
        return leave(slot, live(slot, words))
    except OSError as error:
        why = 'the slot can\'t be used: %s' % agent.sentence(error)
        return leave(slot, End(delay=FIRST_DELAY, message=why))
    finally:
        slot.unlock()


def live(slot: Slot, words: List[str]) -> End:
    """Runs the task; gives how it ended."""
    log.info('vmboinc %s, pid %d, task %s', agent.VERSION, os.getpid(), slot.init.text('result_name'))
    lacks = what_is_lacking(slot)
    if lacks:
        return End(delay=FIRST_DELAY, message=lacks)
    try:
        task = Task(slot, words, host_agent_command())
    except (JobError, OSError) as error:
        return End(delay=LONGEST_DELAY, message=agent.sentence(error))
    except Exception as error:
        log.exception('the wrapper failed')
        return End(delay=LONGEST_DELAY,
                   message='vmboinc can\'t go on: %s: %s' % (type(error).__name__, error))
    try:
        end = task.run()
    except Exception as error:
        log.exception('the wrapper failed')
        end = task.broke(error)
    task.tell_last_status()
    return end


def what_is_lacking(slot: Slot) -> str:
    """Why a client's init_data.xml can't be gone by: half of it was written, to a full disk, say. Without it
    this would be a task without a name, with the slot for its project. '' where all is there."""
    if not slot.has_client:
        return ''
    tags = [tag for tag in ('project_dir', 'result_name') if not slot.init.text(tag)]
    if slot.init.is_whole and not tags:
        return ''
    what = 'lacks <%s>' % tags[0] if slot.init.is_whole else 'is cut off'
    return 'the client\'s init_data.xml %s in slot %s: is the disk full?' % (
        what, os.path.abspath(slot.folder))


def leave(slot: Slot, end: End) -> int:
    """Tells the client how it ended, as files do; gives the exit code."""
    if end.delay:
        log.warning('again in %.0f s: %s', end.delay, end.message)
        insist(slot, lambda: slot.exit_for_a_while(end.delay, end.message, end.notice))
    elif end.finish:
        log.info('over, exit code %d%s', end.code, ': ' + end.message if end.message else '')
        insist(slot, lambda: slot.finish(end.code, end.message, end.notice))
        if not slot.has_client:        # a client empties the slot; a person tries it again
            with contextlib.suppress(OSError):
                os.remove(slot.path(Record.FILE))
        if end.signal:
            slot.unlock()
            die_of(end.signal)
    return exit_code(end.code)


def exit_code(code: int) -> int:
    """That of this process, for a task's: POSIX has 8 bits for it, and only 0 may look like 0."""
    return code if os.name != 'posix' else code & 0xff or (255 if code else 0)


def insist(slot: Slot, write: Callable[[], None]) -> None:
    """Writes it, as soon as that is possible (the disk may be full): without it a client would start the task
    again at once, and again. Not beyond a client's <quit/>, <abort/> or end."""
    channels = Channels(slot.memory())
    client = Client(int(slot.init.number('client_pid')), slot.has_client, time.monotonic())
    is_told = False
    while True:
        try:
            return write()
        except OSError as error:
            if not is_told:
                log.error('%s: it is tried again', agent.sentence(error))
            is_told = True
        client.hear(channels.receive(HEARTBEAT), time.monotonic())
        ends = {'quit', 'abort'} & set(words_of(channels.receive(CONTROL)))
        if ends or not slot.has_client or client.is_gone(time.monotonic()):
            return
        time.sleep(TICK)


def die_of(number: int) -> None:
    """Ends this process as the science ended, by a signal; returns where the client would start it again, and
    where this system has none of that number: a guest told it."""
    if os.name != 'posix' or number in STARTED_AGAIN:
        return
    import resource  # POSIX
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError, OverflowError):
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def host_agent_command() -> List[str]:
    """What starts a host agent, but for its ini file: this program."""
    return [sys.executable, os.path.abspath(sys.argv[0]), '--host-agent']


def run_host_agent(words: List[str]) -> None:
    """The host agent's own program, with its ini file and perhaps a verb, in place of this one. Raises
    SystemExit."""
    sys.argv[1:] = words
    runpy.run_module('vmhost', run_name='__main__')


def main(argv: Optional[List[str]] = None) -> int:
    """The command line; gives the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['--bundle'] and len(argv) == 2:
        import bundles  # a task does without
        return bundles.bundle(argv[1], 'vmboinc', BUNDLED, PROGRAMS)
    if argv[:1] == ['--host-agent'] and len(argv) > 1:
        run_host_agent(argv[1:])
    if argv[:1] in (['--bundle'], ['--host-agent']):
        print(USAGE, end='', file=sys.stderr)
        return 2
    if argv in (['-h'], ['--help']):
        print(USAGE, end='')
        return 0
    if argv == ['--version']:
        print('vmboinc %s' % agent.VERSION)
        return 0
    return run_task(argv)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
