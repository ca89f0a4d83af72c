"""A driver's processes, from the host's side: started, asked, waited for, given up where they hang.

One process, the watcher, looks at all VMs and answers what can be answered at once. Whatever waits, or talks
to a VM's own process, is carried out by a worker: a process that does one thing at a time, is killed when it
hangs, and then takes nobody else's work along. Workers are started when they are needed, and end when nobody
did for a while. A process that lost its hypervisor ends, too; its successor connects anew.

What it is not: what runs in these processes (driverserver.py, and a driver), or what is asked, and whom
(hosthypervisor.py).

Threads: `hypervisor` reads what the watcher says, `worker-N` what a worker says.
"""

import collections
import contextlib
import json
import logging
import subprocess
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple  # noqa: F401

import agent
import faults
import hypervisor
from faults import DeadlineExceeded, HypervisorError, VMHostError
from hypervisor import spoken

log = logging.getLogger('vmhost.hypervisor')

SILENCE = 20.0                 # seconds beyond command_timeout after which a silent process hangs
ALONE = 10.0                   # seconds of silence of the process that looks, while others are answered
LIST_PATIENCE = 0.6            # seconds until a list is what was seen last, rather than what is there now
COMES_UP_IN = 10.0             # seconds for which a process that was just started may be silent
EVER = float('inf')
KEPT = 20                      # questions at most that are still asked though nobody waits any more
WORKERS = 8                    # at most: as many changes go on at once


class Child:
    """A driver's process, seen from the host."""

    def __init__(self, command: List[str], setup: Dict[str, Any], stderr: Any) -> None:
        # A host agent without a console, as BOINC's: Windows would open one for it, for everybody to close.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            creationflags=getattr(subprocess, 'CREATE_NO_WINDOW', 0))
        # Keeps two requests from mixing on the pipe. Held while writing to it.
        self._writing = threading.Lock()
        self.write(setup)

    def write(self, message: Dict[str, Any]) -> None:
        with self._writing:
            try:
                self.process.stdin.write(json.dumps(message).encode() + b'\n')     # type: ignore
                self.process.stdin.flush()                                         # type: ignore
            except (OSError, ValueError) as error:      # it ended: its successor is told instead
                log.debug('the driver\'s process does not listen: %s', error)

    def messages(self) -> Iterator[Dict[str, Any]]:
        """What it says, until it ends; then all of it is closed."""
        with self.process.stdout as answers:                                       # type: ignore
            for line in answers:
                message = read_message(line)
                if message is None:
                    self.process.kill()
                    break
                yield message
        self.hang_up()
        self.process.wait()

    def hang_up(self) -> None:
        """It ends by itself then, unless it hangs."""
        if self._writing.acquire(timeout=1):            # whoever writes to one that hangs, has it
            try:
                close_quietly(self.process.stdin)
            finally:
                self._writing.release()

    def kill(self) -> None:
        self.process.kill()


class Call:
    """One call of a verb, and who waits for its answer. `asked` is when that began, `heard` when the driver
    last said something of it."""

    def __init__(self, number: int, verb: str, args: Tuple[Any, ...]) -> None:
        self.id = number
        self.verb = verb
        self.args = args
        self.vm = args[0] if args and isinstance(args[0], str) else ''
        self.others = []  # type: List[List[str]]
        self.sent_to = None  # type: Optional[Child]
        self.tries = 0
        self.troubles = []  # type: List[str]   # what went wrong beside
        self.begun = False                      # the hypervisor answered, and the driver began with it
        self.given_up = False                   # by who switched the VM off: its process is ended
        self.percent = 0
        self.text = ''
        self.asked = self.heard = time.monotonic()
        self.done = threading.Event()
        self.value = None  # type: Any
        self.error = None  # type: Optional[Exception]

    def hand_to(self, child: Child) -> None:
        """A process that is told only now hasn't been silent for long."""
        self.heard, self.sent_to = time.monotonic(), child
        self.tries += 1
        child.write({'id': self.id, 'verb': self.verb, 'args': self.args, 'others': self.others})

    def hear(self, message: Dict[str, Any]) -> None:
        """What the driver says of it, progress apart."""
        self.heard = time.monotonic()
        if 'begun' in message:
            self.begun = True
        elif 'trouble' in message:
            self.troubles.append(message['trouble'])
        elif 'error' in message:
            self.fail(error_from(message['error']))
        elif 'value' in message:
            self.succeed(message['value'])

    def succeed(self, value: Any) -> None:
        self.value = value
        self.done.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done.set()

    def answer(self) -> Any:
        if self.error:
            raise self.error
        return self.value


class Watcher:
    """The process that looks: it is started again whenever it ends. `ask` may be called from any thread.

    Its thread `hypervisor` lives from `start` to `stop`.
    """

    def __init__(self, launch: Callable[[bool], Child], seen: Callable[[List[Dict[str, Any]]], None],
                 answered: Callable[[str, Any], None], patience: float) -> None:
        self._launch = launch
        self._tell_seen = seen
        self._tell_answered = answered
        self._patience = patience
        # Guards the calls under way and which process has them. Held for moments, never while writing.
        self._lock = threading.Lock()
        self._calls = collections.OrderedDict()  # type: Dict[int, Call]
        self._looks = set()  # type: Set[int]    # calls for all VMs that have no answer yet
        self._child = None  # type: Optional[Child]
        self._wanted = threading.Event()         # somebody calls: start the process now
        self._closing = False
        self._owes_since = 0.0                   # when it was first asked what it hasn't answered; 0: it has
        self._silent_since = 0.0                 # the same, whichever process it was that was asked
        self._others_at = 0.0                    # when another process was last answered
        self._heard_at = 0.0                     # when it last said anything
        self._comes_up_until = 0.0               # it was started: patience for who asks what was never told
        self._why = ''                           # why the last process lost its hypervisor
        self._thread = threading.Thread(target=self._run, name='hypervisor', daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Ends the process; whoever waits gets an error. True when the thread ended."""
        self._closing = True
        self._wanted.set()
        for way, share in (('hang_up', 0.7), ('terminate', 0.1), ('kill', 0.2)):
            with self._lock:
                child = self._child
            if child is not None:
                if way != 'hang_up':
                    log.warning('the process that looks at the VMs hangs: %s', way)
                getattr(child if way == 'hang_up' else child.process, way)()
            self._thread.join(share * timeout)
            if not self._thread.is_alive():
                break
        self._fail_all(HypervisorError('the host agent is stopping'))
        return not self._thread.is_alive()

    def silence(self) -> float:
        """Seconds for which it has said nothing, though it was asked; 0 where it has answered."""
        since = self._silent_since
        return time.monotonic() - since if since else 0.0

    def others_were_answered(self) -> None:
        """The hypervisor doesn't hang, whoever is silent here: what is asked now is waited for again, and
        for ALONE."""
        with self._lock:
            self._others_at = time.monotonic()
            self._silent_since = self._others_at if self._silent_since else 0.0

    def ask(self, call: Call, patience: Optional[float] = None, at_most: float = 0) -> Any:
        """The answer of a quick verb. Raises DeadlineExceeded after `patience` seconds, or LIST_PATIENCE
        where it has been silent for as long already; at_most: where the process is coming up, or says
        something to others, after so many."""
        begun = time.monotonic()
        patience = EVER if patience is None else max(min(patience, LIST_PATIENCE), patience - self.silence())

        def deadline() -> float:
            moved = min(begun + at_most, max(self._heard_at, self._comes_up_until))
            return max(begun, moved) + patience

        with self._lock:
            if self._closing:
                raise HypervisorError('the host agent is stopping')
            self._calls[call.id] = call
            if call.verb == 'machines':
                self._looks.add(call.id)
            child = self._child
            self._silent_since = self._silent_since or begun
            if child is not None:
                call.sent_to = child
                self._owes_since = self._owes_since or time.monotonic()
        try:
            self._wanted.set()
            if child is not None:
                call.hand_to(child)
            while not call.done.wait(min(1.0, max(0.0, deadline() - time.monotonic()))):
                self._check_silence(call, deadline())
            return call.answer()
        finally:
            with self._lock:
                if call.done.is_set() or len(self._calls) > KEPT:
                    self._calls.pop(call.id, None)

    def is_to_look(self) -> bool:
        """Whether it was asked for all VMs, and hasn't answered yet."""
        return bool(self._looks)

    def _check_silence(self, call: Call, deadline: float) -> None:
        """Raises DeadlineExceeded where nobody waits any longer; a process that hangs is ended, even where
        all who ask have little patience."""
        now = time.monotonic()
        hangs = self._end_if_hung(call, now)
        if now >= deadline:
            raise Unanswered('the hypervisor did not answer %s at once' % call.verb)
        if hangs or now - call.heard > self._patience:
            raise Unanswered('the hypervisor did not answer %s for %d s' % (call.verb, self._patience))

    def _end_if_hung(self, call: Call, now: float) -> bool:
        with self._lock:
            child = self._child
            patience = ALONE if self._others_at > self._owes_since else self._patience
            hangs = (child is not None and child is call.sent_to and self._owes_since > 0
                     and now - self._owes_since > patience)
        if hangs and child is not None:
            log.warning('the process that looks at the VMs hangs: starting another one')
            self._comes_up_until = -1.0             # the next one will hang as well, perhaps
            child.kill()
        return hangs

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            calls = list(self._calls.values())
            self._calls.clear()
        for call in calls:
            call.fail(error)

    def _run(self) -> None:
        delay = 0.0
        while not self._closing:
            started = time.monotonic()
            self._wanted.clear()
            try:
                self._live_with(self._launch(True))
            except OSError as error:
                self._fail_all(not_started(error))
            delay = 0.0 if time.monotonic() - started > 10 else min(max(0.2, 2 * delay), 30)
            with self._lock:
                waited_for = bool(self._calls)
            if not self._closing and not waited_for:
                self._wanted.wait(delay)

    def _live_with(self, child: Child) -> None:
        with self._lock:
            self._child = child
            self._looks.intersection_update(self._calls)       # of the others nobody tells any more
            calls = [call for call in self._calls.values() if not call.done.is_set()]
            self._owes_since = time.monotonic() if calls else 0.0
            if self._comes_up_until >= 0:
                self._comes_up_until = time.monotonic() + COMES_UP_IN
        for call in calls:
            if call.tries >= 3:
                with self._lock:
                    self._calls.pop(call.id, None)
                call.fail(HypervisorError(self._why or 'the hypervisor died %d times during %s'
                                          % (call.tries, call.verb)))
            else:
                call.hand_to(child)
        if self._closing:               # while it was being started
            child.hang_up()
        for message in child.messages():
            self._hear(message)
        with self._lock:
            self._child = None
        if not self._closing:
            log.info('the process that looks at the VMs ended (%s) %s', child.process.returncode, self._why)

    def _hear(self, message: Dict[str, Any]) -> None:
        if 'seen' in message:
            self._tell_seen(message['seen'])
        elif 'lost' in message:
            self._why = message['lost']
            return
        elif 'alive' not in message:
            with self._lock:
                call, is_look = self._calls.get(message['id']), message['id'] in self._looks
                self._looks.discard(message['id'])
            if is_look and 'value' in message:     # here, so that no older look is taken for the latest; …
                self._tell_seen(message['value'])
            if call is not None:                   # … before it is answered; also where nobody waits any more
                if 'value' in message:
                    self._tell_answered(call.verb, message['value'])
                call.hear(message)
                with self._lock:
                    self._calls.pop(call.id if call.done.is_set() else 0, None)
        with self._lock:                            # it works
            owes = any(not each.done.is_set() for each in self._calls.values())
            self._heard_at = time.monotonic()
            self._owes_since = self._silent_since = self._heard_at if owes else 0.0
            self._comes_up_until = 0.0


class Worker:
    """A process that does one thing at a time; its thread `worker-N` reads what it says."""

    def __init__(self, number: int, child: Child, progressed: Callable[[Call, int, str], None]) -> None:
        self.child = child
        self.idle_since = time.monotonic()
        self.why = ''                           # why it lost its hypervisor
        self.ended = threading.Event()
        self._progressed = progressed
        self._call = None  # type: Optional[Call]
        self.thread = threading.Thread(target=self._read, name='worker-%d' % number, daemon=True)
        self.thread.start()

    def carry_out(self, call: Call, patience: float, begins_in: float = EVER,
                  answers: Callable[[], bool] = lambda: True, hangs: Callable[[], bool] = lambda: False
                  ) -> bool:
        """Waits until the call is done; False where the process ended without an answer. Where it is silent
        for `patience` seconds, or HUNG ones and the VM `hangs`, it is killed, and the call has failed with
        `Unresponsive`. Until it begins, it is the machine that takes its time, and not the VM; or the
        hypervisor, which `answers` tells, once the call was asked for `begins_in` seconds ago."""
        self._call = call
        call.hand_to(self.child)
        while not call.done.wait(0.5):
            if self.ended.is_set():
                return call.done.is_set()
            silent = time.monotonic() - call.heard
            if silent > (patience if call.begun else max(patience, SILENCE)) or (
                    not call.begun and time.monotonic() - call.asked > begins_in and not answers()) or (
                    call.begun and silent > hypervisor.HUNG and hangs() and not call.done.is_set()):
                self.child.kill()
                self.ended.wait(5)
                why = ('the VM\'s own process hangs, perhaps; powerOff (stop --force) ends it'
                       if call.vm and call.begun else 'the hypervisor itself hangs, perhaps')
                call.fail(Unresponsive('%s: no answer for %d s: %s' % (spoken(call.verb), silent, why)))
        self.idle_since = time.monotonic()
        return True

    def _read(self) -> None:
        for message in self.child.messages():
            call = self._call
            if 'lost' in message:
                self.why = message['lost']
            elif call is not None and message.get('id') == call.id:
                if 'percent' in message:
                    call.heard = time.monotonic()
                    self._progressed(call, message['percent'], message['text'])
                else:
                    call.hear(message)
        self.ended.set()
        call = self._call
        if call is not None and not call.done.is_set():
            call.heard = time.monotonic()


class Unanswered(DeadlineExceeded):
    """Nobody waits any longer; the process that was asked may answer yet."""


class Unresponsive(DeadlineExceeded):
    """A VM, or the hypervisor on its behalf, hangs; the process that talked to it was given up."""


class Workers:
    """The processes that change VMs: as many as there is to do at once, WORKERS at most. From any thread."""

    def __init__(self, launch: Callable[[bool], Child], progressed: Callable[[Call, int, str], None]) -> None:
        self._launch = launch
        self._progressed = progressed
        # Guards the lists of workers; a condition, so that who waits for one wakes up. Held for moments.
        self._free_one = threading.Condition()
        self._idle = []  # type: List[Worker]
        self._all = []  # type: List[Worker]
        self._last_number = 0
        self._closing = False

    @contextlib.contextmanager
    def one(self) -> Iterator[Worker]:
        """A worker for this thread alone, as soon as there is one."""
        worker = self._take()
        try:
            yield worker
        finally:
            with self._free_one:
                self._forget_ended()
                if worker in self._all and not worker.ended.is_set():
                    self._idle.append(worker)
                self._free_one.notify()

    def _take(self) -> Worker:
        with self._free_one:
            while True:
                self._forget_ended()
                if self._closing:
                    raise HypervisorError('the host agent is stopping')
                if self._idle:
                    return self._idle.pop()
                if len(self._all) < WORKERS:
                    break
                self._free_one.wait(1)
            self._last_number += 1
            worker = Worker(self._last_number, self._start(), self._progressed)
            self._all.append(worker)
            return worker

    def _start(self) -> Child:
        try:
            return self._launch(False)
        except OSError as error:
            raise not_started(error)

    def _forget_ended(self) -> None:
        self._all = [worker for worker in self._all if not worker.ended.is_set()]
        self._idle = [worker for worker in self._idle if not worker.ended.is_set()]

    def end_idle(self, before: float) -> None:
        """Lets those go that have had nothing to do since then (monotonic time)."""
        with self._free_one:
            tired = [worker for worker in self._idle if worker.idle_since < before]
            self._idle = [worker for worker in self._idle if worker not in tired]
        for worker in tired:
            worker.child.hang_up()

    def stop(self, timeout: float) -> bool:
        """Ends all of them. True when their threads ended."""
        with self._free_one:
            self._closing = True
            workers = list(self._all)
            idle = list(self._idle)
            self._free_one.notify_all()
        deadline = time.monotonic() + timeout
        for worker in workers:
            worker.child.hang_up()
        for worker in workers:
            if worker in idle:
                worker.thread.join(max(0.1, deadline - time.monotonic() - 0.3 * timeout))
            if worker.thread.is_alive():
                worker.child.kill()
                worker.thread.join(max(0.1, deadline - time.monotonic()))
        return not any(worker.thread.is_alive() for worker in workers)


# --- plain helpers -----------------------------------------------------------------------------

def read_message(line: bytes) -> Any:
    """What a driver's process said; None for half a line, the last one of a process that died."""
    try:
        return json.loads(line.decode())
    except ValueError:
        log.warning('the driver\'s process broke off in the middle of a line: %.80r', line)
        return None


def close_quietly(stream: Any) -> None:
    try:
        stream.close()
    except OSError as error:            # unsent bytes for a process that has gone
        log.debug('closing: %s', error)


def not_started(error: OSError) -> HypervisorError:
    """What those get who wait for a process that the system refused."""
    return HypervisorError('the driver\'s process could not be started: %s' % agent.sentence(error))


def error_from(parts: List[str]) -> Exception:
    """The error that a driver's process reported as [class, text]."""
    kind = getattr(faults, parts[0], None)
    known = isinstance(kind, type) and issubclass(kind, VMHostError)
    return kind(parts[1]) if known else HypervisorError(parts[1])      # type: ignore
