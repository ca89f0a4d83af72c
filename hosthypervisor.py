"""A hypervisor and its machines, as the host sees them: verbs, lists, what was seen last, events.

`Hypervisor` is what the rest of the host holds: each verb of `Driver` (hypervisor.py) is a method there. It
decides who asks which of the driver's processes, how long for, and what is told where none answers.

What it is not: a driver, which lives in processes of its own; it knows neither guests nor commands.

Threads: `vm-pulse` asks VMs that run (hostpulse.py); `vm-events` calls `on_event`, and lets workers go that
had nothing to do for long. Whoever calls a verb waits on his own thread.
"""

import base64
import contextlib
import itertools
import logging
import os
import queue
import sys
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import agent
import driverprocesses
import hypervisor
from driverprocesses import EVER, Call, Child, Unanswered, Unresponsive, Watcher, Workers
from faults import BadState, Busy, DeadlineExceeded, HypervisorError, NoSuchVM, VMHostError
from hostpulse import Pulse
from hostseen import NEVER, Told, Watch
from hostturns import TURN_OF_THE_PLUG, Turns
from hypervisor import HANGS, HUNG_VM, is_local, kind_of, spoken
from vmstates import CHANGING, PAUSED, RUNNING, STUCK

log = logging.getLogger('vmhost.hypervisor')

FIRST_PATIENCE = 5.0           # seconds of silence until who asks for what was never told waits no more
AT_WORK_PATIENCE = 0.3         # seconds more for a list, while there are other answers
LOOK_PATIENCE = 5.0            # seconds of silence that who changed a VM waits for a look at it; …
DONE_PATIENCE = 15.0           # … where it was done: so the hypervisor answered just now; …
BUSY_PATIENCE = 15.0           # … and how many more while there are other answers
WORKER_IDLE = 60.0             # seconds without work after which a worker ends
PRINTED_KEPT = 1024 * 1024     # bytes of a driver's log file, beyond which it begins anew
# What is told again while nothing answers.
NAMES_NO_VM = 'create_vm', 'register_vm', 'kill_process'       # verbs that take another word first


class Hypervisor:
    """A hypervisor, for the rest of the host. Each verb of `Driver` is a method that takes its arguments
    but the job, waits, and gives its value or raises its VMHostError. Any thread may call any method.

    name        of the driver, in drivers.py
    settings    as Driver's; what the driver prints is kept in `state_dir`, or nowhere where that is ''
    on_event    called with (type, vm, text) on the thread `vm-events`
    serial_of   called with a VM's id and uuid before each start: gives what its firmware tells the guest as
                the board's serial number, '' for nothing
    """

    def __init__(self, name: str, settings: Dict[str, Any],
                 on_event: Callable[[str, str, str], None] = lambda type, vm, text: None,
                 serial_of: Callable[[str, str], str] = lambda id, uuid: '') -> None:
        self.name = name
        self._settings = settings
        self._on_event = on_event
        self._serial_of = serial_of
        self._patience = settings['command_timeout'] + driverprocesses.SILENCE
        self._events = queue.Queue()  # type: queue.Queue
        self._watch = Watch(self._happened)
        self._watcher = Watcher(self._launch, self._watch.look, self._answered, self._patience)
        self._workers = Workers(self._launch, self._progressed)
        self._pulse = Pulse(lambda uuid, patience: self._call('hears', (uuid,), patience),
                            self._watch.rows, self._watch.mark,
                            lambda: self._call('machine_states', (), FIRST_PATIENCE))
        self._turns = Turns(settings['command_timeout'], self._check_begins)
        self._numbers = itertools.count(1)
        self._told = Told()
        self._closing = False
        self._asked_in_vain = 0.0               # monotonic: when a list was told last as it was seen before
        self._teller = threading.Thread(target=self._tell_events, name='vm-events', daemon=True)

    def open(self) -> None:
        """Starts the threads and the process that looks. Gives no error: the first call does."""
        self._watcher.start()
        self._teller.start()
        self._pulse.start()

    def close(self, timeout: float = 10) -> bool:
        """Ends all processes; VMs go on. Whoever still waits gets an error. True when all ended."""
        self._closing = True
        self._turns.close()
        self._pulse.stop()
        ended = self._workers.stop(0.5 * timeout)
        ended = self._watcher.stop(timeout) and ended
        self._events.put(None)
        self._teller.join(1)
        if not ended or self._teller.is_alive():
            log.warning('a thread of the hypervisor\'s did not end in time')
        return ended and not self._teller.is_alive()

    def _launch(self, watches: bool) -> Child:
        with open_stderr(self._settings['state_dir'], self.name) as stderr:
            return Child(self._command() + ['watcher' if watches else 'worker'],
                         {'settings': self._settings, 'watches': watches}, stderr)

    def _command(self) -> List[str]:
        """What runs a driver's process; its last word is for who looks at a list of processes."""
        code = 'import sys; sys.path.insert(0, sys.argv[1]); import drivers; drivers.run(sys.argv[2])'
        return [sys.executable, '-c', code, os.path.dirname(os.path.abspath(__file__)), self.name]

    # Verbs.

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        if not kind_of(verb):
            raise AttributeError(verb)

        ask = self._at_once if kind_of(verb) == 'quick' and verb != 'warnings' else self._call
        return lambda *args: ask(verb, args)

    def _at_once(self, verb: str, args: Tuple[Any, ...]) -> Any:
        """A quick verb's answer: as it is now; of what hardly changes, where that takes longer than a moment,
        as it was told last. Raises DeadlineExceeded, with the reason, where it never was."""
        vm = str(args[0]) if args else ''
        uuid = self._watch.uuid_of(vm) or vm
        last = self._told.last(verb, uuid)     # others may forget it meanwhile
        found, why = self._now(verb, args, last is not NEVER)
        if why:
            return last
        self._told.keep(verb, uuid, found)
        return found

    def _now(self, verb: str, args: Tuple[Any, ...], is_known: bool,
             patience: Tuple[float, float] = (driverprocesses.LIST_PATIENCE, AT_WORK_PATIENCE)
             ) -> Tuple[Any, str]:
        """A quick verb's answer, and ''. Where something was told before, and is to be told again as soon as
        it takes longer than a list may, or the hypervisor ended and isn't there again yet: None, and why.
        Else raises VMHostError, DeadlineExceeded after FIRST_PATIENCE of silence. patience: seconds until
        what was told before is told again, of silence, and how much more while there are other answers."""
        patience = patience if is_known else (FIRST_PATIENCE, EVER)
        try:
            return self._call(verb, args, *patience), ''
        except Unanswered as error:
            if not is_known:
                raise self._silent(error)
            self._asked_in_vain = time.monotonic()
            if not self._watcher.is_to_look():          # whose answer ends the trouble that is told
                self._look(0)
            return None, '%s takes its time' % self.name
        except (DeadlineExceeded, HypervisorError) as error:        # the driver's: as where the VM hangs
            if not is_known or self._closing:
                raise
            log.debug('%s is told as it was before: %s', verb, error)
            return None, str(error)

    def trouble(self) -> str:
        """A sentence, where the hypervisor answers nobody, or what lists tell is not of now; else ''."""
        silence, looked_at = self._watcher.silence(), self._watch.looked_at
        if silence < driverprocesses.LIST_PATIENCE:
            return '' if self._asked_in_vain <= looked_at else (
                '%s takes its time: VMs are told as they were seen %d s ago' % (
                    self.name, max(1, time.monotonic() - looked_at)))
        return '%s has not answered for %d s: %s' % (
            self.name, max(1, silence), 'no VM was seen yet' if self._watch.rows() is None
            else 'VMs are told as they were seen before')

    def _silent(self, error: Exception) -> DeadlineExceeded:
        """What those get who ask what isn't known."""
        return DeadlineExceeded(self.trouble().partition(':')[0] or str(error))

    def _answers(self) -> bool:
        """Whether the hypervisor says anything, to whoever asks."""
        with contextlib.suppress(VMHostError):
            self._call('version', (), FIRST_PATIENCE)
        return self._watcher.silence() < FIRST_PATIENCE

    def _check_answers(self) -> None:
        """Before something that only looks, but takes its time. Raises DeadlineExceeded."""
        try:
            self._call('version', (), FIRST_PATIENCE, EVER)
        except DeadlineExceeded as error:
            raise self._silent(error)
        except VMHostError as error:
            log.debug('%s: whoever does the work will tell', error)

    def _check_begins(self, call: Call) -> None:
        """For one that waits for another change, which hasn't begun: where the hypervisor answers nobody, it
        is told so as soon as if it were alone. Raises DeadlineExceeded."""
        if (time.monotonic() - call.asked > driverprocesses.SILENCE
                and self._watcher.silence() > FIRST_PATIENCE):
            raise self._silent(DeadlineExceeded('the hypervisor answers nobody'))

    def _call(self, verb: str, args: Tuple[Any, ...] = (), patience: Optional[float] = None,
              at_most: float = 0) -> Any:
        if self._closing:
            raise HypervisorError('the host agent is stopping')
        call = Call(next(self._numbers), verb, args)
        self._refuse_two_meant(call)
        if kind_of(verb) == 'quick':
            return self._watcher.ask(call, patience, at_most)
        if verb == 'cleanup' and (not args or args[0]) or kind_of(verb) == 'looking' and verb != 'check':
            self._check_answers()
        if self._hangs(call):
            raise DeadlineExceeded(HUNG_VM % (call.vm, HANGS))
        with self._turns.of(call, self._watch.uuid_of(call.vm) or call.vm):
            try:
                done = self._work(call, patience or self._patience)
                if verb not in hypervisor.ALONE:
                    self._watcher.others_were_answered()
                return done
            finally:
                for text in call.troubles:
                    self._happened('vm-trouble', self._watch.called(call.vm), text)
                if call.begun and kind_of(verb) == 'changing' and not self._closing:
                    self._told.forget(call.verb, {self._watch.uuid_of(call.vm) or call.vm, call.vm})
                    self._look_at_changed(call)

    def _work(self, call: Call, patience: float) -> Any:
        """Has it done by a worker; by another one where the first lost the hypervisor before it began."""
        deadline, pause = time.monotonic() + self._settings['command_timeout'], 0.2
        while True:
            with self._workers.one() as worker:
                done = worker.carry_out(call, patience, self._begins_in(call.verb), self._answers,
                                        lambda: self._hangs(call))
                why = worker.why
            begun = call.begun and kind_of(call.verb) == 'changing'
            if done and isinstance(call.error, Unresponsive) and not self._answers():
                why = str(self._silent(call.error))
                raise (Unresponsive('%s; whether %s was done is not known' % (why, spoken(call.verb)))
                       if begun else DeadlineExceeded(why))
            if done and isinstance(call.error, HypervisorError) and call.verb in hypervisor.TALKS_TO_VM \
                    and self._watch.hangs(call.vm):
                raise DeadlineExceeded(HUNG_VM % (call.vm, HANGS))
            if done:
                return call.answer()
            why = why or 'the driver\'s process ended'
            if call.given_up:
                raise Unresponsive('%s: no answer, and %s was to be switched off' % (
                    spoken(call.verb), call.vm))
            if self._closing:
                raise HypervisorError('the host agent is stopping')
            if begun:
                raise HypervisorError('%s: %s; look what state the VM is in' % (spoken(call.verb), why))
            if time.monotonic() + pause > deadline or call.tries >= 10:
                raise HypervisorError(why)
            time.sleep(pause)
            pause = min(2 * pause, 5)

    def _hangs(self, call: Call) -> bool:
        """Whether it needs a VM that answers nobody for certain; where that just began, it is known soon."""
        if call.verb not in hypervisor.TALKS_TO_VM:
            return False
        self._pulse.want()
        return self._watch.hangs(call.vm) and self._pulse.still_hangs(self._watch.uuid_of(call.vm))

    def _begins_in(self, verb: str) -> float:
        """Seconds until who asked for something looks why it hasn't begun, which takes FIRST_PATIENCE: less,
        the longer the hypervisor has answered nobody; never, where that isn't needed."""
        least = driverprocesses.SILENCE - FIRST_PATIENCE - self._watcher.silence()
        return EVER if verb in hypervisor.ALONE else max(FIRST_PATIENCE, least)

    def _look(self, patience: float = LOOK_PATIENCE) -> None:
        """No state goes untold."""
        with contextlib.suppress(VMHostError):
            self._call('machines', patience=patience)

    def _look_at_changed(self, call: Call) -> None:
        """Whoever made the change finds the new state known, and all of that VM: it alone is asked for, where
        it is still there, and the others were seen before."""
        vm = self._watch.uuid_of(call.vm) or call.vm
        alone = bool(vm) and call.verb != 'remove_vm' and self._watch.rows() is not None
        is_done = call.done.is_set() and not call.error and call.verb not in hypervisor.ALONE
        try:
            self._call('describe_changed' if alone else 'machines', (vm,) if alone else (),
                       DONE_PATIENCE if is_done else LOOK_PATIENCE, BUSY_PATIENCE)
        except NoSuchVM:                            # made, and taken back, say
            self._look()
        except VMHostError as error:
            log.debug('%s is told as before: %s', call.vm, error)

    def _answered(self, verb: str, value: Any) -> None:
        """On the watcher's thread: what it said of a VM is known, also where nobody waits for it any more."""
        if verb in ('describe', 'describe_changed'):
            self._told.keep('describe', value['uuid'], value)
            self._watch.describe(value)

    # Verbs that are more than one call of the driver's.

    def start(self, vm: str, gui_mode: bool = False) -> bool:
        """Starts, or goes on from the saved state. True once it runs."""
        row = self._row(vm)
        serial = self._serial_of(row['id'], row['uuid']) if row is not None else ''
        return self._call('start', (vm, bool(gui_mode), serial))

    def remove_vm(self, vm: str, delete_disks: bool = False, all_disks: bool = False) -> List[List[str]]:
        """[path, why] of what is kept. No list shows the VM any more, however long the next look at all
        takes."""
        uuid = self._watch.uuid_of(vm)
        kept = self._call('remove_vm', (vm, delete_disks, all_disks))
        self._watch.forget(uuid)
        return kept  # type: ignore[no-any-return]

    def power_off(self, vm: str) -> bool:
        """Pulls the plug; of a VM that hangs, or whose hypervisor answers nobody, ends the process."""
        uuid = self._watch.uuid_of(vm)
        try:
            with self._turns.pulling(uuid or vm):       # whatever else waits until it is off
                return self._pull_the_plug(vm)
        except DeadlineExceeded as error:
            if not uuid or self._answers() or not self._was_killed(vm, uuid):
                raise
            text = 'its process was ended, since %s; what is listed tells that once it answers' % (
                self._silent(error))
            log.warning('%s: %s', vm, text)
            self._happened('vm-trouble', vm, text)
            return True

    def _was_killed(self, vm: str, uuid: str) -> bool:
        try:
            return bool(self._call('kill_process', (uuid,)))
        except VMHostError as error:
            log.warning('the process of %s could not be ended: %s', vm, error)
            return False

    def _pull_the_plug(self, vm: str) -> bool:
        patience = self._settings['command_timeout']
        key, deadline, hangs = self._watch.uuid_of(vm) or vm, time.monotonic() + patience, False
        while True:                             # another change may take its turn before each of these
            hangs = self._turns.give_up(key, TURN_OF_THE_PLUG if hangs else hypervisor.HUNG) or hangs
            try:
                if hangs:
                    return self._call('end_process', (vm,))  # type: ignore[no-any-return]
                return self._call('power_off', (vm,), min(hypervisor.HUNG, patience + 2))
            except Busy:
                if time.monotonic() > deadline:
                    raise
            except Unresponsive as error:
                if hangs or not self._answers():        # not the VM hangs, and nobody can be asked to end it
                    raise
                log.warning('%s hangs: its process is ended (%s)', vm, error)
                hangs = True

    def _row(self, vm: str) -> Optional[Dict[str, Any]]:
        """A VM's row, looked up where it wasn't seen; None for an unknown one."""
        if self._watch.row_of(vm) is None:
            self.list_rows()
        return self._watch.row_of(vm)

    def check(self) -> List[Tuple[bool, str, str, bool]]:
        """As Driver's; who asks sits there and waits, even where nothing answers."""
        return self._call('check', patience=driverprocesses.SILENCE)  # type: ignore[no-any-return]

    def screenshot(self, vm: str) -> bytes:
        """PNG."""
        return base64.b64decode(self._call('screenshot', (vm,)))

    def list_snapshots(self, vm: str) -> List[str]:
        """Names, each parent before its children."""
        return [row['name'] for row in self.snapshots(vm)]

    def chirp_endpoint(self, vm: str) -> Optional[Tuple[str, int]]:
        """(host, port) by which the guest's Chirp port is reached where its address can't be, else None."""
        if self._row(vm) is None:       # a machine outside the hypervisor
            return None
        found = self.find_chirp(vm)
        if not found and self._settings['network']['mode'] == 'nat':
            found = self._call('forward_chirp', (vm,))
            self._told.keep('find_chirp', self._watch.uuid_of(vm) or vm, found)
        return (found[0], found[1]) if found else None

    # Lists: what is there now; where that takes too long, what was seen last.

    def list_rows(self) -> List[Dict[str, Any]]:
        """The rows of `Driver.machines`."""
        self._pulse.want()
        found, why = self._now('machines', (), self._watch.rows() is not None)
        if why:
            self._asked_in_vain = time.monotonic()
        return self._watch.marked(found if not why else self._watch.rows() or [])

    def list_vms(self) -> List[str]:
        """Names of all VMs, sorted."""
        return sorted((row['name'] for row in self.list_rows()), key=agent.in_order)

    def list_running(self) -> List[str]:
        """Names of the VMs that have a process: running, paused or on their way."""
        online = RUNNING, PAUSED, STUCK, CHANGING
        return sorted((row['name'] for row in self.list_rows() if row['state'] in online), key=agent.in_order)

    def vms_with_state(self) -> Dict[str, str]:
        """{name: native state}."""
        return {row['name']: row['native'] for row in self.list_rows()}

    def name_of(self, mac: str) -> str:
        """The name of the VM with this MAC, '' when there is none. An unknown one is looked up."""
        if not self._watch.name_of(mac):
            self.list_rows()
        return self._watch.name_of(mac)

    def state(self, vm: str) -> str:
        """The native state."""
        return str(self.describe(vm)['native'])

    def describe(self, vm: str) -> Dict[str, Any]:
        """As Driver's; of a VM that was seen, where that takes longer than a moment, what was seen last: a
        row of `Driver.machines` at least."""
        self._pulse.want()
        seen = self._watch.row_of(vm)
        found, why = self._now('describe', (vm,), seen is not None, (FIRST_PATIENCE, LOOK_PATIENCE))
        if not why or seen is None:
            return self._watch.marked([found])[0]
        seen = self._watch.row_of(seen['uuid']) or seen        # others may have been told of it meanwhile
        last = self._told.last('describe', seen['uuid'])
        is_so = last is not NEVER and last['native'] == seen['native']
        return dict(last if is_so else {}, **dict(
            seen, trouble=seen['trouble'] or self.trouble() or 'told as it was seen before: ' + why))

    # What was seen last: asks nobody.

    def known_name(self, mac: str) -> str:
        """Like name_of; '' for a MAC that two VMs have."""
        return self._watch.name_of(mac)

    def known_uuid(self, vm: str) -> str:
        """The uuid of a VM, by name or id; '' for one that was not seen, or an id that two VMs have."""
        return self._watch.uuid_of(vm)

    def known_state(self, vm: str) -> str:
        """One of STATES; '' for a VM that was not seen."""
        row = self._watch.row_of(vm)
        return row['state'] if row is not None else ''

    def known_native(self, vm: str) -> str:
        """The native state; '' for a VM that was not seen."""
        row = self._watch.row_of(vm)
        return row['native'] if row is not None else ''

    def known_vms(self) -> List[Dict[str, Any]]:
        """The rows of `Driver.machines`."""
        return self._watch.rows() or []

    def clash_of(self, vm: str) -> str:
        """A sentence, where the VM of this name or id shares its id with another one; else ''."""
        return self._watch.clash_of(vm)

    def refusal_of(self, vm: str) -> str:
        """A sentence, where this word means two VMs, or one that can't be told from another; else ''."""
        return self._watch.meant_twice(vm) or self.clash_of(vm)

    def _refuse_two_meant(self, call: Call) -> None:
        """Before any verb, whichever driver has it: so that all say the same."""
        if call.verb not in NAMES_NO_VM:
            changes = kind_of(call.verb) == 'changing' and call.verb != 'remove_vm'
            refusal = self._watch.meant_twice(call.vm) or (self.clash_of(call.vm) if changes else '')
            if refusal:
                raise BadState(refusal)

    def broker_address(self) -> str:
        """This machine's address on the VMs' network, '' while it has none."""
        network = self._settings['network']
        return network['host_ip'] if network['mode'] != 'nat' and is_local(network['host_ip']) else ''

    def under_way(self) -> List[Dict[str, Any]]:
        """Long jobs now: [{verb, vm, percent, text}]."""
        return [{'verb': call.verb, 'vm': call.vm, 'percent': call.percent, 'text': call.text}
                for call in self._turns.calls() if call.text]

    # Events.

    def _progressed(self, call: Call, percent: int, text: str) -> None:
        if not text:
            return
        news = percent // 10 != call.percent // 10 or not call.text
        call.percent, call.text = percent, text
        if news:
            self._happened('vm-progress', call.vm, '%s: %d%%, %s' % (call.verb, percent, text))

    def _happened(self, type: str, vm: str, text: str) -> None:
        self._events.put(lambda: self._on_event(type, vm, text))

    def _tell_events(self) -> None:
        while True:
            try:
                event = self._events.get(timeout=WORKER_IDLE / 2)
            except queue.Empty:
                self._workers.end_idle(time.monotonic() - WORKER_IDLE)
                continue
            if event is None:
                return
            try:
                event()
            except Exception:
                log.exception('an event could not be delivered')


# --- plain helpers -----------------------------------------------------------------------------

def open_stderr(folder: str, name: str) -> Any:
    """A driver's library prints its troubles; they are kept for who looks for a reason, and each process adds
    to what those before it left."""
    if not folder or not os.path.isdir(folder):
        return open(os.devnull, 'wb')
    path = os.path.join(folder, name.lower() + '.log')
    full = os.path.exists(path) and os.path.getsize(path) > PRINTED_KEPT
    return open(path, 'wb' if full else 'ab')
