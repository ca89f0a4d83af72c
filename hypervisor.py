"""Hypervisors: what a driver offers, and the processes in which every driver runs.

`Driver` is the contract: a driver derives from it, says how each verb is done, and is named in drivers.py;
nothing else has to change. `Hypervisor` is what the rest of the host holds: each verb is a method there.

What it is not: it knows no hypervisor, and neither guests nor commands.

Processes. A driver never runs in the host's process: a crash or a hang inside a hypervisor's library
touches neither broker nor journal. One process, the watcher, looks at all VMs and answers what can be
answered at once. Whatever waits, or talks to a VM's own process, is carried out by a worker: a process that
does one thing at a time, is killed when it hangs, and then takes nobody else's work along. Workers are
started when they are needed, and end when nobody did for a while. A process that lost its hypervisor ends,
too; its successor connects anew.

Threads of the host: `hypervisor` reads what the watcher says, `worker-N` what a worker says, `vm-events`
calls `on_event`. Whoever calls a verb waits on his own thread.
"""

import base64
import collections
import contextlib
import gc
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import agent
import faults
from faults import BadState, Busy, DeadlineExceeded, HypervisorError, InvalidParams, NotSupported, VMHostError
from vmstates import CHANGING, INACCESSIBLE, PAUSED, RUNNING, STUCK

log = logging.getLogger('vmhost.hypervisor')

SILENCE = 20.0                 # seconds beyond command_timeout after which a silent process hangs
HUNG = 15.0                    # seconds of silence after which a VM that is switched off is one that hangs
LIST_PATIENCE = 0.6            # seconds until a list is what was seen last, rather than what is there now
FIRST_PATIENCE = 5.0           # seconds of silence until who asks for one VM, or for news, waits no more
COMES_UP_IN = 10.0             # seconds for which a process that was just started may be silent
LOOK_PATIENCE = 5.0            # seconds that who changed a VM, or asks for one, waits while there are answers
EVER = float('inf')
LOOK_EVERY = 1.0               # seconds between two looks where no news come, and something has just happened
LOOK_AT_LEAST = 20.0           # seconds after which is looked in any case
NEWS_EVERY = 0.25              # seconds between two questions for news
NOT_READY = 2.0                # seconds that a hypervisor may take to make an object, or to end it
WORKERS = 8                    # at most: as many changes go on at once
WORKER_IDLE = 60.0             # seconds without work after which a worker ends
PRINTED_KEPT = 1024 * 1024     # bytes of a driver's log file, beyond which it begins anew
ALIVE_EVERY = 0.2              # seconds between two signs of life of a process that looks at many VMs
REST_EVERY = 0.1               # seconds after which it looks whether something else is asked
NESTED = 3                     # questions at most that are answered within each other
# What is told again while nothing answers.
REMEMBERED = 'version', 'machine_states', 'find_chirp'
# Changes of a VM after which its ports are where they were.
MOVE_NO_PORT = 'pause', 'resume', 'take_snapshot', 'delete_snapshot', 'keep', 'set_limits', 'remote_desktop'


class ConnectionLost(Exception):
    """The hypervisor died, or was never there; it may come back. Stays between a driver and its process."""


class NotReady(Exception):
    """The hypervisor is still making an object, or about to end it. Stays between driver and process."""


# --- the contract ------------------------------------------------------------------------------

def quick(verb: Any) -> Any:
    """A verb that only looks, answers within moments, and never talks to a VM's own process."""
    verb.kind = 'quick'
    return verb


def looking(verb: Any) -> Any:
    """A verb that only looks, but may take its time, or talks to a VM's own process: a worker's."""
    verb.kind = 'looking'
    return verb


def changing(verb: Any) -> Any:
    """A verb that changes something: a worker's; never begun twice, and never two at once for a VM."""
    verb.kind = 'changing'
    return verb


class Driver:
    """What a driver offers. Verbs that it doesn't have are fault 9, with a sentence.

    It lives in a process of its own, all of it on one thread. Every verb gets the `Job` that it is done
    for, waits with `job.wait`, tells how far it is with `job.report`, and gives plain values (of JSON). A
    `vm` is a name, an id (MAC) or a uuid. Errors are VMHostErrors: NoSuchVM, BadState, Busy (somebody else
    holds the VM), DeadlineExceeded, NotSupported, AlreadyExists, InvalidParams (an argument makes no sense)
    or HypervisorError with the hypervisor's own words; whatever else is raised goes through `translate`.

    From the rows of `machines` the host tells these events: vm-added, vm-removed, vm-renamed, vm-card,
    vm-state, vm-aborted, vm-stuck, vm-clash, vm-inaccessible, vm-trouble; from the reports of jobs:
    vm-progress.

    settings    {network{…}, remote_desktop{…}: as the sections [Network] and [RemoteDesktop]; chirp_port,
                state_dir, machine_folder, command_timeout: s; broker_hint: what the firmware of VMs is to
                tell as the chassis' serial number, '' for nothing}
    """
    name = ''                      # as a person knows it

    def __init__(self, settings: Dict[str, Any]) -> None:
        self.settings = settings
        self.rest = lambda moved: None       # type: Callable[[bool], None]

    # Between the driver and its process: `rest` is the latter's. A verb that looks at many VMs, or waits for
    # one, calls it now and then: what others ask is answered meanwhile, by this driver's other verbs. moved:
    # the hypervisor answered something since the last time.

    def connect(self) -> None:
        """Reaches the hypervisor, where that isn't done. Before each verb but `check`.

        Raises ConnectionLost where a new process may reach it, VMHostError where something has to
        be fixed first.
        """

    def disconnect(self) -> None:
        """Lets it go, at the end."""

    def is_lost(self, error: Exception) -> bool:
        """Whether this error means that the hypervisor is gone."""
        return False

    def translate(self, error: Exception) -> Exception:
        """The error as one of ours; NotReady where a second try may succeed at once."""
        if isinstance(error, OSError):              # a file that can't be read, a full disk
            return HypervisorError(agent.sentence(error))
        return HypervisorError('%s: %s' % (type(error).__name__, error))

    def has_news(self) -> Optional[bool]:
        """Whether a VM may have changed since this was asked last; None where the driver can't tell."""
        return None

    def find_verb(self, name: str) -> Callable[..., Any]:
        """What carries out a verb: takes the job and the verb's arguments."""
        return getattr(self, name)

    def _cannot(self, what: str) -> Any:
        raise NotSupported('%s can\'t %s' % (self.name or 'this hypervisor', what))

    # What there is.

    @quick
    def version(self, job: 'Job') -> str:
        """The hypervisor's version, such as 7.2.4."""
        return self._cannot('tell its version')

    @quick
    def machine_states(self, job: 'Job') -> Dict[str, int]:
        """{name of a native state: its code}."""
        return {}

    @quick
    def machines(self, job: 'Job') -> List[Dict[str, Any]]:
        """All VMs: [{name, id, uuid, state, native, trouble}].

        id: the MAC, '' without a card; state: one of STATES; native: the state as the API's getState says
        it, a MachineState name; trouble: what is wrong with the VM, '' for nothing.
        """
        return self._cannot('list VMs')

    @quick
    def describe(self, job: 'Job', vm: str) -> Dict[str, Any]:
        """A row of `machines` with memory (MB), cpus, ostype, snapshot, tagged (made by us), rdp{…}, pid (of
        the process in which it runs; 0 where none does, or it isn't known), forwards (create_vm's, with the
        host ports that they have), bridged (the interface of this machine to which a card is; '')."""
        return self._cannot('describe a VM')

    @quick
    def warnings(self, job: 'Job') -> List[str]:
        """Sentences about what will not work, for the log at start."""
        return []

    @looking
    def check(self, job: 'Job') -> List[Tuple[bool, str, str, bool]]:
        """[(all right?, what, how to mend, whether VMs need it)]. Works without the hypervisor, too."""
        return []

    # Life of a VM.

    @changing
    def create_vm(self, job: 'Job', name: str, image: str = '', options: Dict[str, Any] = {}) -> str:  # noqa: B006
        """Makes a VM, and gives its name. Never touches the image. What images and options there are, is the
        driver's.

        Option `forwards`: [{guestPort, hostPort, isRemote}], TCP ports of the guest that are reached on this
        machine: on 127.0.0.1, or with isRemote on all its addresses. hostPort 0: one that is free at each
        start, so that it moves where another program has taken it meanwhile; any other one that is taken
        then is BadState. InvalidParams where the VM's network can't have that.

        Option `bridged`: an interface of this machine, or auto: the default route's, anew at each start. The
        VM gets one more card, which is part of that interface's network, beside the one over which its
        agent speaks; so the default is none. InvalidParams where there is no such interface; BadState at a
        start.
        """
        return self._cannot('make VMs')

    @changing
    def register_vm(self, job: 'Job', name: str, folder: str, owner: str = '') -> bool:
        """Has a VM known again that create_vm made with these options; its folder may have been moved since.
        False, and nothing done, where there are no files of it; AlreadyExists where it is known."""
        return self._cannot('register VMs')

    @changing
    def remove_vm(self, job: 'Job', vm: str, delete_disks: bool = False,
                  all_disks: bool = False) -> List[str]:
        """Takes out a VM that is off or saved, or can't be read. delete_disks: its files go, too, and the
        disks that were made with it; all_disks: those that were attached from elsewhere as well. Gives the
        disks kept.
        """
        return self._cannot('remove VMs')

    @changing
    def start(self, job: 'Job', vm: str, gui_mode: bool = False, board_serial: str = '') -> bool:
        """Starts, or goes on from the saved state; True once it runs. board_serial: what the firmware tells
        the guest as its board's serial number, from this cold start on."""
        return self._cannot('start VMs')

    @changing
    def shutdown(self, job: 'Job', vm: str) -> bool:
        """Presses the power button. True once it is off; DeadlineExceeded if the guest takes no notice."""
        return self._cannot('press the power button')

    @changing
    def reset(self, job: 'Job', vm: str) -> bool:
        """Presses the reset button."""
        return self._cannot('press the reset button')

    @changing
    def power_off(self, job: 'Job', vm: str) -> bool:
        """Pulls the plug. True once it is off."""
        return self._cannot('switch VMs off')

    @changing
    def end_process(self, job: 'Job', vm: str) -> bool:
        """Ends the process of a VM that answers nobody: called where power_off hung. True once it is off."""
        return self._cannot('end the process of a VM')

    @changing
    def pause(self, job: 'Job', vm: str) -> bool:
        """Halts it in memory."""
        return self._cannot('pause VMs')

    @changing
    def resume(self, job: 'Job', vm: str) -> bool:
        """Lets a paused VM go on; an error with the reason, where it is paused again at once."""
        return self._cannot('resume VMs')

    @changing
    def save_state(self, job: 'Job', vm: str) -> bool:
        """Writes the memory to disk and stops. True once it is saved."""
        return self._cannot('save the state of VMs')

    @changing
    def discard_state(self, job: 'Job', vm: str) -> bool:
        """Forgets the saved state: the VM is off then."""
        return self._cannot('discard a saved state')

    @changing
    def keep(self, job: 'Job', vm: str, on: bool = True) -> bool:
        """Whether `cleanup` leaves this VM alone in any case."""
        return self._cannot('mark VMs')

    # Snapshots.

    @quick
    def snapshots(self, job: 'Job', vm: str) -> List[Dict[str, Any]]:
        """[{name, id, parent, depth, desc, taken (s since 1970), online, current}], each parent before its
        children."""
        return self._cannot('list snapshots')

    @changing
    def take_snapshot(self, job: 'Job', vm: str, name: str, desc: str = '', again: bool = False) -> bool:
        """Takes one, live too. AlreadyExists when the VM has one of this name, but for `again`."""
        return self._cannot('take snapshots')

    @changing
    def restore_snapshot(self, job: 'Job', vm: str, name: str = '') -> bool:
        """Goes back to the snapshot, or to the current one. The VM must be off or saved."""
        return self._cannot('restore snapshots')

    @changing
    def delete_snapshot(self, job: 'Job', vm: str, name: str) -> bool:
        """Deletes one; what the VM is now stays as it is."""
        return self._cannot('delete snapshots')

    # Looking in, limits, the screen.

    @looking
    def get_stats(self, job: 'Job', vm: str, key: str = '*') -> List[Dict[str, Any]]:
        """[{name, values, unit}] of the metrics that match; the last seconds, oldest first."""
        return self._cannot('measure VMs')

    @quick
    def get_log(self, job: 'Job', vm: str, tail: int = 65536) -> str:
        """The last `tail` bytes of the VM's log, as text."""
        return self._cannot('show a log')

    @looking
    def screenshot(self, job: 'Job', vm: str) -> str:
        """PNG, in base64."""
        return self._cannot('take a picture of the screen')

    @changing
    def set_limits(self, job: 'Job', vm: str, limits: Dict[str, Any]) -> bool:
        """cpuPercent 1 to 100; netKBps, 0 for none; network: False, no or off unplugs the cable. All or
        nothing."""
        return self._cannot('limit VMs')

    @changing
    def remote_desktop(self, job: 'Job', vm: str, enable: bool = True, options: Dict[str, Any] = {}  # noqa: B006
                       ) -> Dict[str, Any]:
        """Switches it, and gives {enabled, address, port, auth, security}, and a new password where it has
        one."""
        return self._cannot('offer a remote desktop')

    # The network, and the whole.

    @quick
    def get_network(self, job: 'Job') -> Dict[str, Any]:
        """{mode, interface, hostIp, netmask, dhcp{server, lower, upper, enabled}}, as they are."""
        return self._cannot('show its network')

    @changing
    def setup_network(self, job: 'Job') -> Dict[str, Any]:
        """Makes what [Network] says, where it differs."""
        return self._cannot('set up a network')

    @quick
    def find_chirp(self, job: 'Job', vm: str) -> Optional[List[Any]]:
        """[host, port] by which the guest's Chirp port is reached where its address can't be; None where it
        can, or there is none yet."""
        return None

    @changing
    def forward_chirp(self, job: 'Job', vm: str) -> List[Any]:
        """Makes what find_chirp then finds."""
        return self._cannot('forward a port')

    @changing
    def cleanup(self, job: 'Job', dry_run: bool = True, vms: List[str] = [], owner: str = ''  # noqa: B006
                ) -> List[Dict[str, str]]:
        """[{kind: vm|disk, name, why}] of what create_vm began and nobody needs, and of the VMs named;
        removes it unless dry_run. Rows of kind `kept` say what can't be decided, and why. With an owner: of
        the VMs made for that owner alone, those named that don't run, and those whose folder is gone."""
        return self._cannot('clean up')


def kind_of(verb: str) -> str:
    """quick, looking or changing; '' for what is no verb of the contract."""
    return getattr(getattr(Driver, verb, None), 'kind', '')


class Job:
    """One request, as the driver sees it. On the driver's thread."""

    def __init__(self, message: Dict[str, Any], timeout: float,
                 tell: Callable[[Dict[str, Any]], None]) -> None:
        self.id = message.get('id', 0)
        self.verb = message['verb']
        self.args = message.get('args', [])
        self.others = message.get('others', [])     # [verb, vm] of what else is under way
        self.begun = time.monotonic()
        self.timeout = timeout
        self.deadline = self.begun + timeout
        self._tell = tell
        self._told = 0.0
        self._last = (-1, '')

    def wait(self, seconds: float) -> None:
        """Sleeps, while the process tells that it lives."""
        time.sleep(seconds)
        self.report(*self._last)

    def check_deadline(self, error: Exception) -> None:
        if time.monotonic() > self.deadline:
            raise error

    def when_free(self, act: Callable[[], Any], held: Callable[[Exception], str], what: str) -> Any:
        """What `act` gives. Somebody else may hold `what` for a moment: tried again, less and less often,
        until the deadline; Busy then. held: what an error tells of that, '' for any other error."""
        pause = 0.05
        while True:
            try:
                return act()
            except Exception as error:
                told = held(error)
                if not told:
                    raise
                self.check_deadline(Busy('%s is locked by another program: %s' % (what, told)))
            self.wait(pause)
            pause = min(2 * pause, 2)

    def renew_deadline(self) -> None:
        """Something long is done, which has a limit of its own; what comes after it has not begun late."""
        self.deadline = time.monotonic() + self.timeout
        self._last = (-1, '')

    def report(self, percent: int, text: str) -> None:
        """Progress; told at once when it changed, else now and then as a sign of life."""
        now = time.monotonic()
        if (percent, text) != self._last and now - self._told > 0.2 or now - self._told > 2:
            self._last, self._told = (percent, text), now
            self._tell({'id': self.id, 'percent': percent, 'text': text})


# --- the driver's process ----------------------------------------------------------------------

class Server:
    """Carries out requests, one after the other; the watcher's looks at all VMs as well. In the driver's
    process."""

    def __init__(self, driver: Driver, inbox: queue.Queue, tell: Callable[[Dict[str, Any]], None],
                 watches: bool) -> None:
        self._driver = driver
        self._inbox = inbox                        # messages; None: the host hung up
        self._tell = tell
        self._watches = watches
        self._waiting = []  # type: List[Dict[str, Any]]
        self._seen = None  # type: Any
        self._next_news = 0.0
        self._next_look = 0.0                      # when to look without news
        self._pause = LOOK_EVERY
        self._nested = 0
        self._alive_at = self._rested_at = 0.0
        if watches:
            driver.rest = self._rest

    def run(self) -> None:
        """Until the host hangs up. Raises ConnectionLost when the hypervisor is gone."""
        try:
            while self._take_messages():
                if self._waiting:
                    self._serve(self._waiting.pop(0))
                if self._watches and time.monotonic() >= self._next_news:
                    self._watch()
                if not gc.isenabled():             # by a driver whose objects may end on this thread alone
                    gc.collect()
        finally:
            self._driver.disconnect()

    def _rest(self, moved: bool) -> None:
        """Within something long: a sign of life, and answers for who asks for something else than all VMs."""
        now = time.monotonic()
        if moved and now - self._alive_at > ALIVE_EVERY:
            self._alive_at = now
            self._tell({'alive': True})
        if now - self._rested_at < REST_EVERY or self._nested >= NESTED:
            return
        self._rested_at = now
        if not self._take_messages(0.001):
            self._inbox.put(None)                   # for who is at it
        asked = [each for each in self._waiting if kind_of(each['verb']) == 'quick'
                 and each['verb'] != 'machines' and now >= each.get('due', 0)]
        self._nested += 1
        try:
            while asked:
                self._waiting.remove(asked[0])
                self._serve(asked[0])
                asked = [each for each in asked[1:] if each in self._waiting]
        finally:
            self._nested -= 1

    def _take_messages(self, wait: Optional[float] = None) -> bool:
        if wait is None and self._watches:
            wait = max(0.001, self._next_news - time.monotonic())
        try:
            message = self._inbox.get(timeout=0.001 if self._waiting else wait)
            while message is not None:
                self._waiting.append(message)
                message = self._inbox.get_nowait()
            return False
        except queue.Empty:
            return True

    def _serve(self, message: Dict[str, Any]) -> None:
        """Answers a request; and all that ask the same, where it only looks: a crowd costs as much as one."""
        if time.monotonic() < message.get('due', 0):
            self._waiting.append(message)
            return
        job = Job(message, self._driver.settings['command_timeout'], self._tell)
        answer = self._answer(job, message)
        if answer is None:                          # not ready: looked at again in a moment
            message['due'] = time.monotonic() + 0.05
            message.setdefault('until', time.monotonic() + NOT_READY)
            self._waiting.append(message)
            return
        same = [each for each in self._waiting if kind_of(job.verb) == 'quick'
                and (each['verb'], each['args']) == (job.verb, job.args)]
        for each in [message] + same:
            self._tell(dict(answer, id=each['id']))
        self._waiting = [each for each in self._waiting if each not in same]

    def _answer(self, job: Job, message: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        try:
            return {'value': self._carry_out(job)}
        except VMHostError as error:
            return {'error': [type(error).__name__, str(error)]}
        except ConnectionLost:
            raise
        except Exception as error:
            if self._driver.is_lost(error):
                raise ConnectionLost('the hypervisor died during %s' % job.verb)
            fault = self._driver.translate(error)
            if isinstance(fault, NotReady) and kind_of(job.verb) != 'changing' \
                    and time.monotonic() < message.get('until', float('inf')):
                return None
            kind = 'AccessDenied' if isinstance(fault, NotReady) else type(fault).__name__
            return {'error': [kind, str(fault)]}

    def _carry_out(self, job: Job) -> Any:
        if not kind_of(job.verb):
            raise InvalidParams('no verb %s' % job.verb)
        if job.verb != 'check':
            self._driver.connect()
        if kind_of(job.verb) == 'changing':
            self._tell({'id': job.id, 'begun': True})
        return self._driver.find_verb(job.verb)(job, *job.args)

    # Watching.

    def _watch(self) -> None:
        now = time.monotonic()
        self._next_news = now + NEWS_EVERY
        try:
            self._driver.connect()
            news = self._driver.has_news()
            if news or now >= self._next_look:
                changed = self._look()
                quiet = news is not None or not changed
                self._pause = min(self._pause * 1.5, LOOK_AT_LEAST) if quiet else LOOK_EVERY
                self._next_look = time.monotonic() + (LOOK_AT_LEAST if news is not None else self._pause)
        except (ConnectionLost, VMHostError):
            if self._seen is not None:
                raise ConnectionLost('the hypervisor is gone')
            self._next_news = now + 5               # it isn't there: whoever calls is told why
        except Exception as error:
            if self._driver.is_lost(error):
                raise ConnectionLost('the hypervisor died')
            log.debug('looking at the VMs: %s', error)
            self._next_look = now + LOOK_EVERY      # a VM that went meanwhile: looked at again

    def _look(self) -> bool:
        """Tells all VMs where they differ from what was told last. Whether they do."""
        rows = self._driver.find_verb('machines')(Job({'verb': 'machines'}, 0, self._tell))
        changed = bool(rows != self._seen)
        if changed:
            self._seen = rows
            self._tell({'seen': rows})
        return changed


def run_driver(make: Callable[[Dict[str, Any]], Driver]) -> None:
    """Main of a driver's process: requests on stdin, answers on stdout, a JSON object a line.

    The first line holds the settings. A hypervisor starts processes that inherit descriptors 0 to 2 and
    outlive us, and its library prints: so both ends of the conversation are moved out of their way.
    """
    for name in ('SIGINT', 'SIGBREAK'):             # Ctrl-C, and Windows' Ctrl-Break, are for the host agent
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    requests, answers = os.fdopen(os.dup(0), 'rb'), os.fdopen(os.dup(1), 'wb')
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    inbox = queue.Queue()  # type: queue.Queue
    setup = json.loads(requests.readline().decode())

    def read() -> None:
        for line in requests:
            inbox.put(json.loads(line.decode()))
        inbox.put(None)

    def tell(message: Dict[str, Any]) -> None:
        try:
            answers.write(json.dumps(message).encode() + b'\n')
            answers.flush()
        except OSError:                 # the host died: its successor finds what is half made, and decides
            os._exit(1)

    threading.Thread(target=read, name='requests', daemon=True).start()
    code = 0
    try:
        Server(make(setup['settings']), inbox, tell, setup['watches']).run()
    except ConnectionLost as error:
        tell({'lost': str(error)})
        code = 3
    os._exit(code)                      # a hypervisor's library may take half a minute to end


# --- the host's side ---------------------------------------------------------------------------

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
    """One call of a verb, and who waits for its answer. `heard` is when the driver last said something of
    it."""

    def __init__(self, number: int, verb: str, args: Tuple[Any, ...]) -> None:
        self.id = number
        self.verb = verb
        self.args = args
        self.vm = args[0] if args and isinstance(args[0], str) else ''
        self.others = []  # type: List[List[str]]
        self.sent_to = None  # type: Optional[Child]
        self.tries = 0
        self.begun = False                      # the driver began to change something
        self.given_up = False                   # by who switched the VM off: its process is ended
        self.percent = 0
        self.text = ''
        self.heard = time.monotonic()
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
                 patience: float) -> None:
        self._launch = launch
        self._tell_seen = seen
        self._patience = patience
        # Guards the calls under way and which process has them. Held for moments, never while writing.
        self._lock = threading.Lock()
        self._calls = collections.OrderedDict()  # type: Dict[int, Call]
        self._child = None  # type: Optional[Child]
        self._wanted = threading.Event()         # somebody calls: start the process now
        self._closing = False
        self._owes_since = 0.0                   # when it was first asked what it hasn't answered; 0: it has
        self._silent_since = 0.0                 # the same, whichever process it was that was asked
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
        """The hypervisor doesn't hang, whoever is silent here: what is asked now is waited for again."""
        with self._lock:
            self._silent_since = time.monotonic() if self._silent_since else 0.0

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
                self._calls.pop(call.id, None)

    def _check_silence(self, call: Call, deadline: float) -> None:
        """Raises DeadlineExceeded where nobody waits any longer; a process that hangs is ended, even where
        all who ask have little patience."""
        now = time.monotonic()
        hangs = self._end_if_hung(call, now)
        if now >= deadline:
            raise DeadlineExceeded('the hypervisor did not answer %s at once' % call.verb)
        if hangs or now - call.heard > self._patience:
            raise DeadlineExceeded('the hypervisor did not answer %s for %d s' % (call.verb, self._patience))

    def _end_if_hung(self, call: Call, now: float) -> bool:
        with self._lock:
            child = self._child
            hangs = (child is not None and child is call.sent_to and self._owes_since > 0
                     and now - self._owes_since > self._patience)
        if hangs and child is not None:
            log.warning('the process that looks at the VMs hangs: starting another one')
            self._comes_up_until = -1.0             # the next one will hang as well, perhaps
            child.kill()
        return hangs

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            calls = list(self._calls.values())
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
            calls = [call for call in self._calls.values() if not call.done.is_set()]
            self._owes_since = time.monotonic() if calls else 0.0
            if self._comes_up_until >= 0:
                self._comes_up_until = time.monotonic() + COMES_UP_IN
        for call in calls:
            if call.tries >= 3:
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
                call = self._calls.get(message['id'])
            if call is not None:
                call.hear(message)
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

    def carry_out(self, call: Call, patience: float, answers: Callable[[], bool] = lambda: True) -> bool:
        """Waits until the call is done; False where the process ended without an answer. Where it is silent
        for `patience` seconds it is killed, and the call has failed with `Unresponsive`. Until it begins,
        it is the machine that takes its time, and not the VM; or the hypervisor, which `answers` tells."""
        self._call = call
        call.hand_to(self.child)
        while not call.done.wait(0.5):
            if self.ended.is_set():
                return call.done.is_set()
            silent = time.monotonic() - call.heard
            if silent > (patience if call.begun else max(patience, SILENCE)) or (
                    not call.begun and silent > SILENCE and not answers()):
                self.child.kill()
                self.ended.wait(5)
                why = ('the VM\'s own process hangs, perhaps; powerOff (stop --force) ends it'
                       if call.vm and call.begun else 'the hypervisor itself hangs, perhaps')
                call.fail(Unresponsive('%s: no answer for %d s: %s' % (call.verb, silent, why)))
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
        self._patience = settings['command_timeout'] + SILENCE
        self._events = queue.Queue()  # type: queue.Queue
        self._watch = Watch(self._happened)
        self._watcher = Watcher(self._launch, self._watch.look, self._patience)
        self._workers = Workers(self._launch, self._progressed)
        # Guards numbers and calls under way; a condition, so that who waits for a VM wakes up. Held for
        # moments.
        self._free = threading.Condition()
        self._last_id = 0
        self._under_way = collections.OrderedDict()  # type: Dict[str, Call]     # what is owned: by which call
        self._calls = []  # type: List[Call]
        self._told = {}  # type: Dict[Tuple[str, str], Any]         # by verb and uuid: what was told last
        self._closing = False
        self._teller = threading.Thread(target=self._tell_events, name='vm-events', daemon=True)

    def open(self) -> None:
        """Starts the threads and the process that looks. Gives no error: the first call does."""
        self._watcher.start()
        self._teller.start()

    def close(self, timeout: float = 10) -> bool:
        """Ends all processes; VMs go on. Whoever still waits gets an error. True when all ended."""
        self._closing = True
        ended = self._workers.stop(0.5 * timeout)
        ended = self._watcher.stop(timeout) and ended
        self._events.put(None)
        self._teller.join(1)
        if not ended or self._teller.is_alive():
            log.warning('a thread of the hypervisor\'s did not end in time')
        return ended and not self._teller.is_alive()

    def _launch(self, watches: bool) -> Child:
        with self._open_stderr() as stderr:
            return Child(self._command() + ['watcher' if watches else 'worker'],
                         {'settings': self._settings, 'watches': watches}, stderr)

    def _command(self) -> List[str]:
        """What runs a driver's process; its last word is for who looks at a list of processes."""
        code = 'import sys; sys.path.insert(0, sys.argv[1]); import drivers; drivers.run(sys.argv[2])'
        return [sys.executable, '-c', code, os.path.dirname(os.path.abspath(__file__)), self.name]

    def _open_stderr(self) -> Any:
        """A driver's library prints its troubles; they are kept for who looks for a reason, and each
        process adds to what those before it left."""
        folder = self._settings['state_dir']
        if not folder or not os.path.isdir(folder):
            return open(os.devnull, 'wb')
        path = os.path.join(folder, self.name.lower() + '.log')
        full = os.path.exists(path) and os.path.getsize(path) > PRINTED_KEPT
        return open(path, 'wb' if full else 'ab')

    # Verbs.

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        if not kind_of(verb):
            raise AttributeError(verb)

        ask = self._at_once if kind_of(verb) == 'quick' and verb != 'warnings' else self._call
        return lambda *args: ask(verb, args)

    def _at_once(self, verb: str, args: Tuple[Any, ...]) -> Any:
        """A quick verb's answer: as it is now; of what hardly changes, where nothing is heard for a while, as
        it was told last. Raises DeadlineExceeded, with the reason, where it never was."""
        vm = str(args[0]) if args else ''
        key = verb, self._watch.uuid_of(vm) or vm
        known = key in self._told
        try:
            found = self._call(verb, args, FIRST_PATIENCE, EVER)
        except DeadlineExceeded as error:
            if known:
                return self._told[key]
            raise self._silent(error)
        if verb in REMEMBERED:
            self._told[key] = found
        return found

    def trouble(self) -> str:
        """A sentence, where the hypervisor answers nobody; else ''."""
        silence = self._watcher.silence()
        return '' if silence < LIST_PATIENCE else '%s has not answered for %d s: %s' % (
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

    def _call(self, verb: str, args: Tuple[Any, ...] = (), patience: Optional[float] = None,
              at_most: float = 0) -> Any:
        with self._free:
            if self._closing:
                raise HypervisorError('the host agent is stopping')
            self._last_id += 1
            call = Call(self._last_id, verb, args)
        if kind_of(verb) == 'quick':
            return self._watcher.ask(call, patience, at_most)
        if verb == 'cleanup' and (not args or args[0]) or kind_of(verb) == 'looking' and verb != 'check':
            self._check_answers()
        with self._owning(call):
            try:
                done = self._work(call, patience or self._patience)
                self._watcher.others_were_answered()
                return done
            finally:
                if kind_of(verb) == 'changing' and not self._closing:
                    self._forget_told(call)
                    self._look()

    def _work(self, call: Call, patience: float) -> Any:
        """Has it done by a worker; by another one where the first lost the hypervisor before it began."""
        deadline, pause = time.monotonic() + self._settings['command_timeout'], 0.2
        while True:
            with self._workers.one() as worker:
                done, why = worker.carry_out(call, patience, self._answers), worker.why
            if done and isinstance(call.error, Unresponsive) and not self._answers():
                why = str(self._silent(call.error))
                raise (Unresponsive('%s; whether %s was done is not known' % (why, call.verb)) if call.begun
                       else DeadlineExceeded(why))
            if done:
                return call.answer()
            why = why or 'the driver\'s process ended'
            if call.given_up:
                raise Unresponsive('%s: no answer, and %s was to be switched off' % (call.verb, call.vm))
            if self._closing:
                raise HypervisorError('the host agent is stopping')
            if call.begun and kind_of(call.verb) == 'changing':
                raise HypervisorError('%s: %s; look what state the VM is in' % (call.verb, why))
            if time.monotonic() + pause > deadline or call.tries >= 10:
                raise HypervisorError(why)
            time.sleep(pause)
            pause = min(2 * pause, 5)

    def _forget_told(self, call: Call) -> None:
        """What was told of a VM is no longer so."""
        changed = self._watch.uuid_of(call.vm) or call.vm
        for verb, vm in list(self._told):
            if vm in (changed, call.vm) and not (verb == 'find_chirp' and call.verb in MOVE_NO_PORT):
                self._told.pop((verb, vm), None)

    def _look(self) -> None:
        """After a change: whoever made it finds the new state known, and no state goes untold."""
        with contextlib.suppress(VMHostError):
            self._watch.look(self._call('machines', patience=LOOK_PATIENCE))

    # One change at a time for each VM.

    @contextlib.contextmanager
    def _owning(self, call: Call) -> Iterator[None]:
        """Nobody else changes this VM meanwhile; and none is made while cleanup looks for what is half
        made."""
        if kind_of(call.verb) == 'changing' and call.verb not in ('create_vm', 'remove_vm'):
            self._refuse_clash(call.vm)
        key = self._watch.uuid_of(call.vm) or call.vm
        deadline = time.monotonic() + self._settings['command_timeout']
        with self._free:
            while kind_of(call.verb) == 'changing' and self._in_the_way(call, key):
                if time.monotonic() > deadline or self._closing:
                    other = self._in_the_way(call, key)
                    raise Busy('%s is busy: %s is under way' % (call.vm or 'the hypervisor', other))
                self._free.wait(0.5)
            call.others = [[each.verb, each.vm] for each in self._calls]
            self._calls.append(call)
            if kind_of(call.verb) == 'changing':
                self._under_way[key] = call
        try:
            yield
        finally:
            with self._free:
                self._calls.remove(call)
                if self._under_way.get(key) is call:
                    del self._under_way[key]
                self._free.notify_all()

    def _in_the_way(self, call: Call, key: str) -> str:
        """The verb for which this call has to wait, '' for none."""
        if key in self._under_way:
            return self._under_way[key].verb
        cleans = any(each.verb == 'cleanup' for each in self._calls)
        return 'cleanup' if call.verb == 'create_vm' and cleans else ''

    # Verbs that are more than one call of the driver's.

    def start(self, vm: str, gui_mode: bool = False) -> bool:
        """Starts, or goes on from the saved state. True once it runs."""
        row = self._row(vm)
        serial = self._serial_of(row['id'], row['uuid']) if row is not None else ''
        return self._call('start', (vm, bool(gui_mode), serial))

    def remove_vm(self, vm: str, delete_disks: bool = False, all_disks: bool = False) -> List[str]:
        """The disks kept. No list shows the VM any more, however long the next look at all of them takes."""
        uuid = self._watch.uuid_of(vm)
        kept = self._call('remove_vm', (vm, delete_disks, all_disks))
        self._watch.forget(uuid)
        return kept  # type: ignore[no-any-return]

    def power_off(self, vm: str) -> bool:
        """Pulls the plug; of a VM that hangs, ends the process."""
        if self._gives_up(self._watch.uuid_of(vm) or vm):
            return self._call('end_process', (vm,))  # type: ignore[no-any-return]
        try:
            return self._call('power_off', (vm,), patience=min(HUNG, self._settings['command_timeout'] + 2))
        except Unresponsive as error:
            log.warning('%s hangs: its process is ended (%s)', vm, error)
            return self._call('end_process', (vm,))

    def _gives_up(self, key: str) -> bool:
        """Ends the change of this VM that is under way, where it hangs. Waits until that is known; True where
        the VM's process is to be ended, then; False where nothing was under way, had begun, or it does
        something."""
        until = time.monotonic() + HUNG + 1
        with self._free:
            while key in self._under_way and time.monotonic() < until:
                other = self._under_way[key]
                if other.sent_to is not None and time.monotonic() - other.heard > HUNG:
                    log.warning('%s hangs in %s, which is given up', other.vm, other.verb)
                    other.given_up = True
                    other.sent_to.kill()
                    return other.begun
                self._free.wait(0.5)
        return False

    def _row(self, vm: str) -> Optional[Dict[str, Any]]:
        """A VM's row, looked up where it wasn't seen; None for an unknown one."""
        if self._watch.row_of(vm) is None:
            self.list_rows()
        return self._watch.row_of(vm)

    def check(self) -> List[Tuple[bool, str, str, bool]]:
        """As Driver's; who asks sits there and waits, even where nothing answers."""
        return self._call('check', patience=SILENCE)  # type: ignore[no-any-return]

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
            self._told['find_chirp', self._watch.uuid_of(vm) or vm] = found
        return (found[0], found[1]) if found else None

    # Lists: what is there now; where that takes too long, what was seen last.

    def list_rows(self) -> List[Dict[str, Any]]:
        """The rows of `Driver.machines`."""
        seen = self._watch.rows()
        try:
            rows = self._call('machines', (), *((FIRST_PATIENCE, EVER) if seen is None else (LIST_PATIENCE,)))
        except DeadlineExceeded as error:
            if seen is None:
                raise self._silent(error)
            return seen
        self._watch.look(rows)
        return rows

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

    def names_to_ids(self) -> Dict[str, str]:
        """{name: MAC}, of those VMs that have a card of their own."""
        rows = self.list_rows()
        return {row['name']: row['id'] for row in rows if row['id']}

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
        seen = self._watch.row_of(vm)
        try:
            found = self._call('describe', (vm,), FIRST_PATIENCE, EVER if seen is None else LOOK_PATIENCE)
            self._told['describe', found['uuid']] = found
            return found  # type: ignore[no-any-return]
        except DeadlineExceeded as error:
            if seen is None:
                raise self._silent(error)
            last = self._told.get(('describe', seen['uuid']), {})
            why = self.trouble() or 'told as it was seen before: %s takes its time' % self.name
            return dict(last if last.get('native') == seen['native'] else {},
                        **dict(seen, trouble=seen['trouble'] or why))

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

    def _refuse_clash(self, vm: str) -> None:
        clash = self.clash_of(vm)
        if clash:
            raise BadState(clash)

    def broker_address(self) -> str:
        """This machine's address on the VMs' network, '' while it has none."""
        network = self._settings['network']
        return network['host_ip'] if network['mode'] != 'nat' and is_local(network['host_ip']) else ''

    def under_way(self) -> List[Dict[str, Any]]:
        """Long jobs now: [{verb, vm, percent, text}]."""
        with self._free:
            calls = [call for call in self._calls if call.text]
        return [{'verb': call.verb, 'vm': call.vm, 'percent': call.percent, 'text': call.text}
                for call in calls]

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


class Watch:
    """Compares the VMs with what was seen before, and tells the difference.

    The memory is here and not in the driver, so that a VM that died together with its hypervisor is noticed
    by the driver's successor. From any thread.
    """

    def __init__(self, happened: Callable[[str, str, str], None]) -> None:
        self._happened = happened
        # Only one look at a time; guards what was seen. Events are only queued while it is held.
        self._lock = threading.Lock()
        # Replaced as a whole, never changed: so any thread may read them.
        self._seen = None  # type: Optional[Dict[str, Dict[str, Any]]]       # by uuid
        self._by_word = {}  # type: Dict[str, Dict[str, Any]]                # by name, id and uuid
        self._clashes = {}  # type: Dict[str, List[str]]                     # id: the names that share it

    def rows(self) -> Optional[List[Dict[str, Any]]]:
        """All of them; None before the first look."""
        seen = self._seen
        return None if seen is None else list(seen.values())

    def row_of(self, vm: str) -> Optional[Dict[str, Any]]:
        return self._by_word.get(vm) or (self._by_word.get(vm.upper()) if ':' in vm else None)

    def uuid_of(self, vm: str) -> str:
        row = self.row_of(vm)
        return row['uuid'] if row is not None else ''

    def name_of(self, mac: str) -> str:
        row = self._by_word.get(mac.upper())
        return row['name'] if row is not None and row['id'] == mac.upper() else ''

    def clash_of(self, vm: str) -> str:
        row = self._by_word.get(vm)
        names = self._clashes.get(row['id'] if row is not None else vm.upper(), [])
        if not names or (row is not None and vm == row['uuid']):
            return ''
        return clash_text(row['id'] if row is not None else vm.upper(), names)

    def look(self, rows: List[Dict[str, Any]]) -> None:
        """`rows`: as Driver.machines gives them. The first look tells clashes and trouble alone."""
        with self._lock:
            before, self._seen = self._seen, {row['uuid']: row for row in rows}
            names = collections.OrderedDict()  # type: Dict[str, List[str]]
            for row in rows:
                if row['id']:
                    names.setdefault(row['id'], []).append(row['name'])
            clashed = self._clashes
            self._clashes = {mac: each for mac, each in names.items() if len(each) > 1}
            self._by_word = {row[key]: row for key in ('name', 'id', 'uuid') for row in rows
                             if row[key] and not (key == 'id' and row['id'] in self._clashes)}
            for mac in self._clashes:
                if mac not in clashed:
                    for name in self._clashes[mac]:
                        self._happened('vm-clash', name, clash_text(mac, self._clashes[mac]))
            self._tell_difference(before)

    def forget(self, uuid: str) -> None:
        """That VM was removed; nobody may have looked since."""
        seen = self._seen or {}
        if uuid in seen:
            self.look([row for row in seen.values() if row['uuid'] != uuid])

    def _tell_difference(self, before: Optional[Dict[str, Dict[str, Any]]]) -> None:
        seen = self._seen or {}
        for uuid, row in seen.items():
            known = (before or {}).get(uuid)
            if row['trouble'] and row['trouble'] != (known or {}).get('trouble'):
                self._happened('vm-inaccessible' if row['state'] == INACCESSIBLE else 'vm-trouble',
                               row['name'], row['trouble'])
            if before is not None and known is None:
                self._happened('vm-added', row['name'], row['native'])
            elif known is not None and row != known:
                self._tell_change(known, row)
        for uuid, row in (before or {}).items():
            if uuid not in seen:
                self._happened('vm-removed', row['name'], '')

    def _tell_change(self, before: Dict[str, Any], now: Dict[str, Any]) -> None:
        name = now['name']
        if name != before['name']:
            self._happened('vm-renamed', name, 'was ' + before['name'])
        if now['id'] != before['id']:
            self._happened('vm-card', name, '%s, was %s' % (now['id'] or 'none', before['id'] or 'none'))
        if now['native'] != before['native']:
            self._happened('vm-state', name, now['native'])
            if now['native'].startswith('Aborted'):
                self._happened('vm-aborted', name, 'its process died; it was ' + before['native'])
            elif now['state'] == STUCK:
                self._happened('vm-stuck', name, 'the guest stopped with an error')


# --- plain helpers -----------------------------------------------------------------------------

def clash_text(mac: str, names: List[str]) -> str:
    """What is wrong where VMs share a MAC, and how to fix it."""
    return ('%s have the same MAC address, %s, so nobody can tell their guests apart: give one of them '
            'another while it is off (VBoxManage modifyvm NAME --macaddress1 auto)'
            % (either(sorted(names), 'and'), mac))


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


def either(names: Any, word: str = 'or') -> str:
    """a, b or c."""
    names = list(names)
    return names[0] if len(names) == 1 else '%s %s %s' % (', '.join(names[:-1]), word, names[-1])


def is_local(address: str) -> bool:
    """Has this machine the address?"""
    return agent.port_is_free(address, 0)


def address_outwards() -> str:
    """This machine's IPv4 address on the interface of the default route; '' where there is no such route."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(('192.0.2.1', 9))             # of nobody; and nothing is sent
        return str(probe.getsockname()[0])
    return ''


def option(name: str, value: Union[str, int, float, bool], kind: Callable[[str], Any]) -> Any:
    """An option's value, as a client sent it. Raises InvalidParams, which names it and says what it is."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)                          # as some clients send numbers
    try:
        return kind(str(value))
    except ValueError as error:
        raise InvalidParams('%s is %s, not %r' % (name, error, value))
