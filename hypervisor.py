"""Hypervisors: what a driver offers, and what it is given.

`Driver` is the contract: a driver derives from it, says how each verb is done, and is named in drivers.py;
nothing else has to change. What the rest of the host holds is in hosthypervisor.py.

What it is not: it knows no hypervisor, and neither guests nor commands.

A driver never runs in the host's process, but in some of its own (driverprocesses.py): a crash or a hang
inside a hypervisor's library touches neither broker nor journal.
"""

import contextlib
import socket
import time
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import agent
from faults import Busy, HypervisorError, InvalidParams, NotSupported
from vmstates import INACCESSIBLE

HUNG = 15.0                    # seconds of silence after which a VM that is switched off is one that hangs
ANSWERS_IN = 3.0               # seconds in which a VM's own process has to answer who only looks
HANGS = 'its process does not answer'       # what is wrong with a VM where it doesn't
HUNG_VM = '%s: %s; powerOff (stop --force) ends it'         # what those are told who want something of it
ALONE = 'check', 'kill_process'    # verbs that do without the hypervisor
# Verbs that a VM's own process carries out, where it has one.
TALKS_TO_VM = ('pause', 'resume', 'shutdown', 'reset', 'save_state', 'take_snapshot', 'delete_snapshot',
               'set_limits', 'remote_desktop', 'keep', 'forward_chirp', 'get_stats', 'screenshot')
NOT_READY = 2.0                # seconds that a hypervisor may take to make an object, or to end it


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
    vm-progress, vm-trouble.

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
        """Reaches the hypervisor, where that isn't done. Before each verb but those of ALONE.

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
    def describe(self, job: 'Job', vm: str, anew: bool = False) -> Dict[str, Any]:
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
                  all_disks: bool = False) -> List[List[str]]:
        """Takes out a VM that is off or saved, or can't be read. delete_disks: its files go, too, and the
        disks that were made with it; all_disks: those that were attached from elsewhere as well. Gives
        [path, why] of what is kept then.
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

    @looking
    def hears(self, job: 'Job', vm: str) -> bool:
        """Asks the VM's own process something small, and takes no lock for that: True once it has answered.
        Who asks gives it up. NotSupported where `machines` tells by itself which VMs hang (HANGS)."""
        return self._cannot('ask the process of a VM')

    @changing
    def kill_process(self, job: 'Job', vm: str) -> bool:
        """Ends the process of a VM, by its uuid, without asking the hypervisor: called where that answers
        nobody. True once it has ended; NotSupported where it can't be told from others for certain."""
        return self._cannot('end the process of a VM by itself')

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


def spoken(verb: str) -> str:
    """A verb as a person reads it."""
    return verb.replace('_', ' ')


def kind_of(verb: str) -> str:
    """quick, looking or changing; '' for what is no verb of the contract."""
    return getattr(getattr(Driver, verb, None), 'kind', '')


def row_of(described: Dict[str, Any]) -> Dict[str, Any]:
    """What `Driver.machines` tells of a VM, of what `Driver.describe` does."""
    return {key: described[key] for key in ('name', 'id', 'uuid', 'state', 'native', 'trouble')}


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

    def tell_trouble(self, text: str) -> None:
        """What went wrong beside, though the verb succeeds: the host makes an event of it."""
        self._tell({'id': self.id, 'trouble': text})

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


# --- plain helpers -----------------------------------------------------------------------------

def meant_twice(word: str, rows: List[Dict[str, Any]]) -> str:
    """A sentence, where a word means more than one of these VMs, whose name, id or uuid it is; else ''. One
    that can't be read is called as its file is, and so only where no other is."""
    named = [row for row in rows if row['name'] == word]
    named = [row for row in named if row['state'] != INACCESSIBLE] or named
    if len(named) > 1:
        return '%s is the name of %d VMs: use the uuid of one, %s' % (
            word, len(named), either(sorted(row['uuid'] for row in named)))
    for key in ('uuid', 'id') if named else ():
        for row in rows:
            if row not in named and row[key] and word.lower() == row[key].lower():
                return '%s is the name of a VM, and the %s of %s: use the name of that one, or %s, the ' \
                    'uuid of this one' % (word, key, row['name'], named[0]['uuid'])
    return ''


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


def options_over(defaults: Dict[str, Any], options: Dict[str, Any], method: str) -> Dict[str, Any]:
    """The defaults of a method's options, and over them what a client asked for. Raises InvalidParams for
    one that isn't among them."""
    unknown = set(options) - set(defaults)
    if unknown:
        raise InvalidParams('%s knows no option %s; it knows %s' % (
            method, ', '.join(sorted(unknown)), ', '.join(sorted(defaults))))
    return dict(defaults, **options)


def option(name: str, value: Union[str, int, float, bool], kind: Callable[[str], Any]) -> Any:
    """An option's value, as a client sent it. Raises InvalidParams, which names it and says what it is."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)                          # as some clients send numbers
    try:
        return kind(str(value))
    except ValueError as error:
        raise InvalidParams('%s is %s, not %r' % (name, error, value))
