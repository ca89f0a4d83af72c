"""VirtualBox: the driver, and the process that it runs in.
"""

import base64
import collections
import contextlib
import fnmatch
import ipaddress
import json
import logging
import os
import platform
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from typing import Any, Callable, Dict, Generator, Iterator, List, Optional, Tuple

import agent
from faults import (
    AccessDenied,
    AlreadyExists,
    BadState,
    Busy,
    DeadlineExceeded,
    HypervisorError,
    InvalidParams,
    NoSuchVM,
    NotSupported,
    VMHostError,
)
from hosttrust import is_mac

# `Driver` owns the manager and every COM object; all of it runs on one thread, and each verb is a
# job: a generator that yields whenever it has to wait. `Watch` turns what the driver saw into
# events.
#
# The driver lives in a process of its own. Seen with 7.2: VBoxSVC is also the hub of XPCOM's
# messages, so once it has died a client process never finds the next one, whatever it drops or
# creates anew. A fresh process does. So a process that lost VBoxSVC answers what it can, exits,
# and is started again. It also keeps a crash or a hang inside vboxapi away from broker and journal.
# Where `connect` is given, the driver runs in the thread `vbox` instead.

vbox_log = logging.getLogger('vmhost.virtualbox')

# Extra-data keys of VMs. The value is the VM's uuid: VirtualBox copies extra data into clones, which aren't
# ours.
MADE_BY_US = 'vmhost/made'         # createVM made it
MAKING = 'vmhost/making'           # still being made; left behind by a host that died meanwhile
KEEP = 'vmhost/keep'               # cleanup leaves it alone
# Global extra-data keys.
IMPORTING = 'vmhost/importing/'    # + name: the .vbox that an import will register
DISK_MADE = 'vmhost/disk'          # + path of a disk that createVM made: its uuid, or `unfinished` and when
DISK_UNFINISHED = 'unfinished '
UUID = re.compile(r'^{?[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}}?$')
CHIRP_RULE = 'vmhost-chirp'        # name of the NAT port forwarding
BANDWIDTH_GROUP = 'vmhost'
DESKTOP_SECURITY = {'tls': 'TLS', 'rdp': 'RDP', 'negotiate': 'Negotiate'}

OFF = ('PoweredOff', 'Aborted', 'Teleported')
SAVED = ('Saved', 'AbortedSaved')
ONLINE = ('Running', 'Paused', 'Stuck')
ACCEPTABLE = {                     # the states in which a verb makes sense
    'start': OFF + SAVED,
    'shutdown': ('Running',),
    'reset': ('Running',),
    'power_off': ONLINE,
    'pause': ('Running',),
    'resume': ('Paused',),
    'save_state': ('Running', 'Paused'),
    'discard_state': SAVED,
    'take_snapshot': OFF + SAVED + ('Running', 'Paused'),
    'delete_snapshot': OFF + SAVED + ('Running', 'Paused'),
    'restore_snapshot': OFF + SAVED,
    'remove_vm': OFF + SAVED,
    'set_limits': OFF + ('Running',),
    'screenshot': ('Running', 'Paused'),
}
CHANGING = frozenset((             # verbs that are never begun twice; all others only look
    'create_vm', 'remove_vm', 'start', 'shutdown', 'reset', 'power_off', 'pause', 'resume',
    'save_state', 'discard_state', 'take_snapshot', 'restore_snapshot', 'delete_snapshot',
    'set_limits', 'remote_desktop', 'setup_network', 'cleanup'))
LOOKING = frozenset((
    'version', 'machine_states', 'machines', 'describe', 'state', 'list_snapshots', 'snapshots',
    'get_stats', 'get_log', 'screenshot', 'get_network', 'chirp_endpoint', 'check'))

# Status codes of the API (VirtualBox.xidl, "Result codes"; the last ones are COM's own).
OBJECT_NOT_FOUND = 0x80bb0001
INVALID_VM_STATE = 0x80bb0002
NOT_SUPPORTED = 0x80bb0009
INVALID_OBJECT_STATE = 0x80bb0007
INVALID_SESSION_STATE = 0x80bb000b
OBJECT_IN_USE = 0x80bb000c
ACCESS_DENIED = 0x80070005
NOT_IMPLEMENTED = 0x80004001
FAULT_OF_CODE = {
    INVALID_VM_STATE: BadState,
    NOT_SUPPORTED: NotSupported,
    NOT_IMPLEMENTED: NotSupported,
    INVALID_OBJECT_STATE: BadState,
    INVALID_SESSION_STATE: Busy,
    OBJECT_IN_USE: Busy,
    ACCESS_DENIED: AccessDenied,
}
DEAD = (0x80004004, 0x800706be, 0x800706ba, 0x80010108)   # abort, call failed, RPC down, gone

NO_DRIVER = ('VERR_VM_DRIVER', 'rc=-1908', 'VERR_SUPDRV', 'vboxdrv')
MEND_DRIVER = ('the kernel module vboxdrv is not loaded: install the kernel headers, then run '
               '/sbin/vboxconfig (Debian: dpkg-reconfigure virtualbox-dkms), and with Secure Boot '
               'enrol its key')
OLDEST = (6, 1)                    # of VirtualBox, whose API this code speaks
STALL = 600                        # seconds without any progress after which a job is given up
NOT_READY = 2                      # seconds that VirtualBox may take to make an object, or to end it
SILENCE = 20                       # seconds that the driver may be silent about a call
LARGEST = 2 ** 31 - 1              # of the numbers that options hold
PRINTED_KEPT = 1024 * 1024         # bytes of virtualbox.log, beyond which the next process begins anew
Steps = Generator[float, None, Any]    # a verb under way: yields how many seconds it waits


class ConnectionLost(Exception):
    """VBoxSVC died, or was never there. Stays inside the driver."""


class VirtualBox:
    """The hypervisor, for the rest of the host.

    Every method may be called from any thread, waits, and gives plain values. Errors are
    VMHostErrors: NoSuchVM, BadState, Busy (somebody else holds the VM's lock), DeadlineExceeded,
    NotSupported, AlreadyExists, or HypervisorError with VirtualBox's own text and code; InvalidParams
    where an argument makes no sense. A `vm` is a name, an id (MAC) or a uuid.

    `network` and `remote_desktop` have the attributes of the sections [Network] and
    [RemoteDesktop]. `command_timeout` is in seconds, and bounds each call but those whose length
    depends on the size of a disk or a memory: these report their progress. What VirtualBox prints is
    kept in `state_dir`, or nowhere where that is ''. `on_event(type, vm, text)` is called on the thread
    `vbox-events`. `connect` makes a VirtualBoxManager.
    """

    def __init__(self, network: Any, remote_desktop: Any, chirp_port: int, state_dir: str,
                 command_timeout: float = 45,
                 on_event: Callable[[str, str, str], None] = lambda type, vm, text: None,
                 connect: Optional[Callable[[], Any]] = None) -> None:
        self._settings = {
            'network': dict(vars(network)), 'remote_desktop': dict(vars(remote_desktop)),
            'chirp_port': chirp_port, 'state_dir': state_dir,
            'command_timeout': command_timeout}  # type: Dict[str, Any]
        self._mode = network.mode
        self._on_event = on_event
        self._connect = connect
        self._command_timeout = command_timeout
        # Guards the calls under way, their numbers and the inbox. Held for moments, never while
        # anything outside this class is called, nor while writing to the process.
        self._lock = threading.Lock()
        # Keeps two requests from mixing on the pipe. Held while writing to it.
        self._writing = threading.Lock()
        self._calls = collections.OrderedDict()  # type: Dict[int, Call]
        self._last_id = 0
        self._inbox = queue.Queue()  # type: queue.Queue
        self._events = queue.Queue()  # type: queue.Queue
        self._child = None  # type: Optional[subprocess.Popen]
        self._wanted = threading.Event()         # somebody calls: start the process now
        self._closing = False
        self._watch = Watch(self._happened)
        self._threads = []  # type: List[threading.Thread]

    # life of the thread

    def start_thread(self) -> None:
        """Start the threads `vbox` and `vbox-events`. Gives no error: the first call does."""
        main = self._run_here if self._connect else self._run_process
        for name, target in (('vbox', main), ('vbox-events', self._tell_events)):
            thread = threading.Thread(target=target, name=name)
            thread.daemon = True
            thread.start()
            self._threads.append(thread)

    def close(self, timeout: float = 10) -> bool:
        """End the threads; VMs go on. Whoever still waits gets an error. True when all ended."""
        self._closing = True
        self._wanted.set()
        self._inbox.put(None)
        deadline = time.monotonic() + timeout
        self._hang_up()
        self._end_process(timeout)
        for thread in self._threads:
            if thread.name == 'vbox-events':
                self._events.put(None)
            thread.join(max(0.1, deadline - time.monotonic()))
            if thread.is_alive():
                vbox_log.warning('the thread %s did not end in time', thread.name)
        self._fail_all('the host agent is stopping')
        return not any(thread.is_alive() for thread in self._threads)

    # what there is

    def version(self) -> str:
        """VirtualBox's version, such as 7.2.4."""
        return self._call('version')

    def machine_states(self) -> Dict[str, int]:
        """{name of a MachineState: its code in this VirtualBox}."""
        return self._call('machine_states')

    def list_vms(self) -> List[str]:
        """Names of all VMs that VirtualBox knows, sorted."""
        return sorted(row['name'] for row in self._machines())

    def list_running(self) -> List[str]:
        """Names of the VMs that have a process: running, paused or on their way."""
        return sorted(row['name'] for row in self._machines() if row['online'])

    def vms_with_state(self) -> Dict[str, str]:
        """{name: MachineState name}."""
        return {row['name']: row['state'] for row in self._machines()}

    def names_to_ids(self) -> Dict[str, str]:
        """{name: MAC}, of those VMs that have a card. Read from VirtualBox now."""
        return {row['name']: row['id'] for row in self._machines() if row['id']}

    def name_of(self, mac: str) -> str:
        """The name of the VM with this MAC, '' when there is none. An unknown one is looked up."""
        return self._watch.name_of(mac) or {
            row['id']: row['name'] for row in self._machines()}.get(mac.upper(), '')

    def known_name(self, mac: str) -> str:
        """Like name_of, but asks nobody: what was seen a second ago."""
        return self._watch.name_of(mac)

    def known_state(self, vm: str) -> str:
        """Like state, but asks nobody; '' for a VM that was not seen."""
        return self._watch.state_of(vm)

    def known_vms(self) -> List[Tuple[str, str, str]]:
        """(name, MachineState name, id) of all VMs, as they were seen a second ago; asks nobody."""
        return self._watch.rows()

    def broker_address(self) -> str:
        """This machine's address on the host-only network, '' while it has none."""
        wanted = self._settings['network']['host_ip']
        if self._mode == 'nat':
            return ''
        return wanted if is_local(wanted) else ''

    def describe(self, vm: str) -> Dict[str, Any]:
        """{name, id, uuid, state, memory, cpus, ostype, snapshot, tagged, rdp{…}}."""
        return self._call('describe', vm)

    def state(self, vm: str) -> str:
        """The MachineState name."""
        return self._call('state', vm)

    def under_way(self) -> List[Dict[str, Any]]:
        """Long jobs now: [{verb, vm, percent, text}]. Asks nobody."""
        with self._lock:
            calls = [call for call in self._calls.values() if call.text]
        return [{'verb': call.verb, 'vm': call.vm, 'percent': call.percent, 'text': call.text}
                for call in calls]

    # life of a VM

    def create_vm(self, name: str, image: str = '', options: Optional[Dict[str, Any]] = None,
                  progress: Optional[Callable[[int, str], None]] = None) -> str:
        """Make a VM, and give its name. Never touches the image.

        `image`: .ova or .ovf (imported), a disk such as .vdi or .vmdk (copied into the VM's
        folder), .iso (in the drive, with an empty disk beside it), or ''. A sole argument that
        ends in .vbox registers that machine. Options: memory (MB), cpus, ostype, network
        (hostonly, nat, none), diskSize (MB), keep (cleanup leaves it alone).
        """
        return self._call('create_vm', name, image, options or {}, progress=progress)

    def remove_vm(self, vm: str, delete_disks: bool = False) -> bool:
        """Unregister a VM that is off or saved; with delete_disks all its files go, too."""
        return self._call('remove_vm', vm, bool(delete_disks))

    def start(self, vm: str, gui_mode: bool = False) -> bool:
        """Start, or go on from the saved state. True once it runs."""
        return self._call('start', vm, bool(gui_mode))

    def shutdown(self, vm: str) -> bool:
        """Press the ACPI power button. True once it is off; DeadlineExceeded if the guest
        takes no notice."""
        return self._call('shutdown', vm)

    def reset(self, vm: str) -> bool:
        """Press the reset button."""
        return self._call('reset', vm)

    def power_off(self, vm: str) -> bool:
        """Pull the plug. True once it is off."""
        return self._call('power_off', vm)

    def pause(self, vm: str) -> bool:
        return self._call('pause', vm)

    def resume(self, vm: str) -> bool:
        return self._call('resume', vm)

    def save_state(self, vm: str) -> bool:
        """Write the memory to disk and stop. True once it is Saved."""
        return self._call('save_state', vm)

    def discard_state(self, vm: str) -> bool:
        """Forget the saved state: the VM is then PoweredOff."""
        return self._call('discard_state', vm)

    # snapshots

    def take_snapshot(self, vm: str, name: str, desc: str = '') -> bool:
        """Take one, live too. AlreadyExists when the VM has one of this name."""
        return self._call('take_snapshot', vm, name, desc)

    def restore_snapshot(self, vm: str, name: str = '') -> bool:
        """Go back to the snapshot, or to the current one. The VM must be off or saved."""
        return self._call('restore_snapshot', vm, name)

    def delete_snapshot(self, vm: str, name: str) -> bool:
        return self._call('delete_snapshot', vm, name)

    def list_snapshots(self, vm: str) -> List[str]:
        """Names, each parent before its children."""
        return [row['name'] for row in self.snapshots(vm)]

    def snapshots(self, vm: str) -> List[Dict[str, Any]]:
        """[{name, id, parent, depth, desc, taken (seconds since 1970), online, current}]."""
        return self._call('snapshots', vm)

    # looking in, and limits

    def get_stats(self, vm: str, key: str = '*') -> List[Dict[str, Any]]:
        """[{name, values, unit}] of the metrics that match; the last seconds, oldest first."""
        return self._call('get_stats', vm, key)

    def get_log(self, vm: str, tail: int = 65536) -> str:
        """The last `tail` bytes of VBox.log, as text."""
        return self._call('get_log', vm, int(tail))

    def screenshot(self, vm: str) -> bytes:
        """PNG."""
        return base64.b64decode(self._call('screenshot', vm))

    def set_limits(self, vm: str, limits: Dict[str, Any]) -> bool:
        """cpuPercent 1 to 100; netKBps, 0 for none; network: False, no or off unplugs the cable."""
        return self._call('set_limits', vm, dict(limits))

    def remote_desktop(self, vm: str, enable: bool = True,
                       options: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
        """Switch it, and give {enabled, address, port, auth, security}. Options: address, port,
        auth (external, guest, null), security (TLS, RDP, Negotiate)."""
        return self._call('remote_desktop', vm, bool(enable), options or {})

    # network, and the whole

    def get_network(self) -> Dict[str, Any]:
        """{mode, interface, hostIp, netmask, dhcp{server, lower, upper, enabled}}, as they are."""
        return self._call('get_network')

    def setup_network(self) -> Dict[str, Any]:
        """Make the host-only interface, its address and DHCP pool where they differ."""
        return self._call('setup_network')

    def chirp_endpoint(self, vm: str) -> Optional[Tuple[str, int]]:
        """(host, port) by which the guest's Chirp port is reached in NAT mode, else None."""
        if self._mode != 'nat':
            return None
        host, port = self._call('chirp_endpoint', vm)
        return host, port

    def cleanup(self, dry_run: bool = True) -> List[Dict[str, str]]:
        """[{kind: vm|disk, name, why}] of what create_vm made and nobody uses; removes it."""
        return self._call('cleanup', bool(dry_run))

    def check(self) -> List[Tuple[bool, str, str]]:
        """[(all right?, what, how to mend)]. Works without VirtualBox, too."""
        return [(bool(ok), what, mend) for ok, what, mend in self._call('check')]

    # calls and answers

    def _machines(self) -> List[Dict[str, Any]]:
        return self._call('machines')

    def _call(self, verb: str, *args: Any,
              progress: Optional[Callable[[int, str], None]] = None) -> Any:
        call = Call(verb, args, progress)
        with self._lock:
            if self._closing or not self._threads:
                raise HypervisorError('VirtualBox is not connected: the host agent is stopping')
            self._last_id += 1
            call.id = self._last_id
            self._calls[call.id] = call
        try:
            self._send(call)
            return self._answer(call)
        finally:
            with self._lock:
                self._calls.pop(call.id, None)

    def _answer(self, call: 'Call') -> Any:
        patience = self._command_timeout + SILENCE
        while not call.done.wait(1):
            child = call.sent_to        # read before the clock: it may be handed on meanwhile
            if time.monotonic() - call.heard > patience:
                self._give_up_on_process(child)
                raise DeadlineExceeded('VirtualBox did not answer %s for %d s'
                                       % (call.verb, patience))
        if call.error:
            raise call.error
        return call.value

    def _send(self, call: 'Call') -> None:
        if self._connect:
            self._inbox.put(call.message())
            return
        self._wanted.set()
        with self._lock:
            child = self._child
            if child is None or call.sent_to is child:
                return
            call.hand_to(child)
        self._write(child, call.message())

    def _write(self, child: Any, message: Dict[str, Any]) -> None:
        with self._writing:
            try:
                child.stdin.write(json.dumps(message).encode() + b'\n')
                child.stdin.flush()
            except (OSError, ValueError) as error:      # it ended: its successor is told instead
                vbox_log.debug('the VirtualBox process does not listen: %s', error)

    def _heard(self, message: Dict[str, Any]) -> None:
        if 'seen' in message:
            self._watch.look(message['seen'])
            return
        with self._lock:
            call = self._calls.get(message['id'])
        if call is None:
            return
        call.heard = time.monotonic()
        if 'begun' in message:
            call.begun = True
        elif 'percent' in message:
            self._progressed(call, message['percent'], message['text'])
        elif 'error' in message:
            call.fail(error_from(message['error']))
        elif 'again' in message:
            call.begun, call.why = False, message['again']
        else:
            call.succeed(message['value'])

    def _progressed(self, call: 'Call', percent: int, text: str) -> None:
        tenth = percent // 10
        news = text and (tenth != call.percent // 10 or not call.text)
        call.percent, call.text = percent, text
        if not text:
            return
        if call.progress:
            self._events.put(lambda: call.progress(percent, text))
        if news:
            self._happened('vm-progress', call.vm, '%s: %d%%, %s' % (call.verb, percent, text))

    def _fail_all(self, why: str, only_begun: bool = False) -> None:
        with self._lock:
            calls = [call for call in self._calls.values() if call.begun or not only_begun]
        for call in calls:
            call.fail(HypervisorError(why))

    # events

    def _happened(self, type: str, vm: str, text: str) -> None:
        self._events.put(lambda: self._on_event(type, vm, text))

    def _tell_events(self) -> None:
        while True:
            event = self._events.get()
            if event is None:
                return
            try:
                event()
            except Exception:
                vbox_log.exception('an event could not be delivered')

    # the driver in this thread

    def _run_here(self) -> None:
        assert self._connect is not None
        Driver(self._settings, self._connect, self._inbox, self._heard).run()

    # the driver in a process

    def _run_process(self) -> None:
        delay = 0.0
        while not self._closing:
            started = time.monotonic()
            self._wanted.clear()
            try:
                self._live_with(self._start_process())
            except OSError as error:
                self._fail_all('the VirtualBox process could not be started: %s' % error)
            lived = time.monotonic() - started
            delay = 0.0 if lived > 10 else min(max(0.2, 2 * delay), 30)
            if not self._closing and not self._has_calls():
                self._wanted.wait(delay)

    def _has_calls(self) -> bool:
        with self._lock:
            return bool(self._calls)

    def _live_with(self, child: Any) -> None:
        with self._lock:
            self._child = child
            calls = [call for call in self._calls.values()
                     if call.sent_to is not child and not call.done.is_set()]
            for call in calls:
                call.hand_to(child)
        for call in calls:
            self._hand_over(child, call)
        if self._closing:               # while it was being started
            self._hang_up()
        for line in child.stdout:
            message = read_message(line)
            if message is None:
                child.kill()
                break
            self._heard(message)
        with self._lock:
            self._child = None
        with self._writing:
            close_quietly(child.stdin)
        child.stdout.close()
        code = child.wait()
        if not self._closing:
            vbox_log.info('the VirtualBox process ended (%s)', code)
        self._fail_all('VirtualBox (VBoxSVC) died meanwhile; look what state the VM is in',
                       only_begun=True)

    def _hand_over(self, child: subprocess.Popen, call: 'Call') -> None:
        call.tries += 1
        if call.tries > 3:
            call.fail(HypervisorError(call.why or 'VirtualBox died %d times during %s'
                                      % (call.tries - 1, call.verb)))
        else:
            self._write(child, call.message())

    def _start_process(self) -> subprocess.Popen:
        here = os.path.abspath(__file__)
        code = ('import sys; sys.path.insert(0, sys.argv[1]); import %s as host; '
                'host.drive_virtualbox(sys.argv[2])'
                % os.path.splitext(os.path.basename(here))[0])
        with self._open_stderr() as stderr:
            return subprocess.Popen(
                [sys.executable, '-c', code, os.path.dirname(here), json.dumps(self._settings)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr)

    def _open_stderr(self) -> Any:
        """vboxapi prints its troubles; they are kept for who looks for a reason, and each process adds to
        what those before it left."""
        folder = self._settings['state_dir']
        if not folder or not os.path.isdir(folder):
            return open(os.devnull, 'wb')
        path = os.path.join(folder, 'virtualbox.log')
        full = os.path.exists(path) and os.path.getsize(path) > PRINTED_KEPT
        return open(path, 'wb' if full else 'ab')

    def _hang_up(self) -> None:
        with self._lock:
            child = self._child
        if child and self._writing.acquire(timeout=1):      # whoever writes to one that hangs, has it
            try:
                close_quietly(child.stdin)
            finally:
                self._writing.release()

    def _end_process(self, timeout: float) -> None:
        """Which ends by itself when nobody speaks to it any more, unless it hangs inside VirtualBox."""
        for way, patience in (('terminate', 0.7 * timeout), ('kill', 0.1 * timeout)):
            for thread in self._threads[:1]:        # ends with its process
                thread.join(patience)
            with self._lock:
                child = self._child
            if child is None:
                return
            vbox_log.warning('the VirtualBox process hangs: %s', way)
            getattr(child, way)()

    def _give_up_on_process(self, child: Any) -> None:
        """It hangs inside a call of VirtualBox: only a new process helps, unless there is one already."""
        with self._lock:
            present = self._child
        if present is not None and child is present:
            vbox_log.warning('the VirtualBox process hangs: starting another one')
            present.kill()


class Call:
    """One call that waits for its answer. `heard` is when the driver last said something of it."""

    def __init__(self, verb: str, args: tuple,
                 progress: Optional[Callable[[int, str], None]]) -> None:
        self.id = 0
        self.verb = verb
        self.args = args
        self.progress = progress
        self.vm = args[0] if args and isinstance(args[0], str) else ''
        self.sent_to = None  # type: Any        # the process that was told, guarded by the lock
        self.tries = 0
        self.why = ''                           # why the driver could not yet
        self.begun = False
        self.percent = 0
        self.text = ''
        self.heard = time.monotonic()
        self.done = threading.Event()
        self.value = None  # type: Any
        self.error = None  # type: Optional[Exception]

    def hand_to(self, child: Any) -> None:
        """A process that is told only now hasn't been silent for long."""
        self.heard = time.monotonic()
        self.sent_to = child

    def message(self) -> Dict[str, Any]:
        return {'id': self.id, 'verb': self.verb, 'args': self.args}

    def succeed(self, value: Any) -> None:
        self.value = value
        self.done.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done.set()


class Watch:
    """Compares what the driver saw with what it saw before, and tells the difference.

    The memory is here and not in the driver, so that a VM that died together with VBoxSVC is
    noticed by the driver's successor. `look` runs on one thread, `name_of` on any.
    """

    def __init__(self, happened: Callable[[str, str, str], None]) -> None:
        self._happened = happened
        # Replaced as a whole, never changed: so any thread may read them.
        self._seen = None  # type: Optional[Dict[str, List[str]]]
        self._names = {}  # type: Dict[str, str]
        self._states = {}  # type: Dict[str, str]

    def name_of(self, mac: str) -> str:
        return self._names.get(mac.upper(), '')

    def state_of(self, vm: str) -> str:
        return self._states.get(vm, '')

    def rows(self) -> List[Tuple[str, str, str]]:
        return [(row[0], row[1], row[2]) for row in (self._seen or {}).values()]

    def look(self, seen: Dict[str, List[str]]) -> None:
        """`seen`: {uuid: [name, state, id]}. The first look tells nothing."""
        before, self._seen = self._seen, seen
        self._names = {mac: name for name, state, mac in seen.values() if mac}
        self._states = {key: row[1] for uuid, row in seen.items()
                        for key in (uuid, row[2], row[0])}
        if before is None:
            return
        for uuid in before:
            if uuid not in seen:
                self._happened('vm-removed', before[uuid][0], '')
        for uuid, row in seen.items():
            if uuid not in before:
                self._happened('vm-added', row[0], row[1])
            elif row != before[uuid]:
                self._tell_change(before[uuid], row)

    def _tell_change(self, before: List[str], now: List[str]) -> None:
        name, state, mac = now
        if name != before[0]:
            self._happened('vm-renamed', name, 'was ' + before[0])
        if mac != before[2]:
            self._happened('vm-card', name, '%s, was %s' % (mac or 'none', before[2] or 'none'))
        if state != before[1]:
            self._happened('vm-state', name, state)
            if state in ('Aborted', 'AbortedSaved'):
                self._happened('vm-aborted', name, 'its process died; it was ' + before[1])
            elif state == 'Stuck':
                self._happened('vm-stuck', name, 'the guest stopped with an error')


def read_message(line: bytes) -> Any:
    """What the driver's process said; None for half a line, the last one of a process that died."""
    try:
        return json.loads(line.decode())
    except ValueError:
        vbox_log.warning('the VirtualBox process broke off in the middle of a line: %.80r', line)
        return None


def close_quietly(stream: Any) -> None:
    try:
        stream.close()
    except OSError as error:            # unsent bytes for a process that has gone
        vbox_log.debug('closing: %s', error)


def error_from(parts: List[str]) -> Exception:
    """The error that the driver's process reported as [class, text]."""
    known = {kind.__name__: kind for kind in (
        NoSuchVM, BadState, HypervisorError, DeadlineExceeded, AlreadyExists, NotSupported, Busy,
        AccessDenied, InvalidParams)}
    return known.get(parts[0], HypervisorError)(parts[1])


def drive_virtualbox(settings: str) -> None:
    """Main of the driver's process: requests on stdin, answers on stdout, a JSON object a line.

    VirtualBox starts processes that inherit descriptors 0 to 2 and outlive us, and vboxapi prints:
    so both ends of the conversation are moved out of their way.
    """
    if hasattr(signal, 'SIGINT'):
        signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is for the host agent
    requests, answers = os.fdopen(os.dup(0), 'rb'), os.fdopen(os.dup(1), 'wb')
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    inbox = queue.Queue()  # type: queue.Queue

    def read() -> None:
        for line in requests:
            inbox.put(json.loads(line.decode()))
        inbox.put(None)

    def tell(message: Dict[str, Any]) -> None:
        answers.write(json.dumps(message).encode() + b'\n')
        answers.flush()

    threading.Thread(target=read, name='requests', daemon=True).start()
    code = 0
    try:
        Driver(json.loads(settings), import_virtualbox, inbox, tell, in_process=True).run()
    except ConnectionLost:
        code = 3
    except BrokenPipeError:
        code = 1
    os._exit(code)                      # COM's own end can take half a minute after a loss


def import_virtualbox() -> Any:
    """A VirtualBoxManager from vboxapi, or HypervisorError that says what is missing."""
    try:
        import vboxapi
    except ImportError as error:
        raise HypervisorError(
            'vboxapi is not installed for Python %s (%s): %s. It comes with VirtualBox: on Debian '
            'the package virtualbox, elsewhere `python -m pip install .` in the folder '
            'sdk/installer/python of VirtualBox, or its SDK'
            % (platform.python_version(), sys.executable, error))
    except Exception as error:
        raise HypervisorError('vboxapi can not be imported: %s: %s'
                              % (type(error).__name__, error))
    try:
        return vboxapi.VirtualBoxManager()
    except Exception as error:
        raise HypervisorError('vboxapi does not work with this Python %s: %s: %s'
                              % (platform.python_version(), type(error).__name__, error))


class Job:
    """One verb being carried out: a generator that is resumed at `due`."""

    def __init__(self, message: Dict[str, Any], timeout: float,
                 tell: Callable[[Dict[str, Any]], None]) -> None:
        self.id = message['id']
        self.verb = message['verb']
        self.args = message['args']
        self.steps = None  # type: Optional[Steps]
        self.due = 0.0
        self.tries = 0
        self.begun = time.monotonic()
        self.deadline = self.begun + timeout
        self._timeout = timeout
        self._tell = tell
        self._told = 0.0
        self._last = (-1, '')

    def check_deadline(self, error: Exception) -> None:
        if time.monotonic() > self.deadline:
            raise error

    def renew_deadline(self) -> None:
        """Something long is done, which has a limit of its own; what comes after it has not begun late.

        Whoever waits hears of it, lest the driver be silent for longer than he has patience.
        """
        self.deadline = time.monotonic() + self._timeout
        self._tell({'id': self.id, 'percent': 100, 'text': ''})

    def break_off(self) -> None:
        """What it cleans up then may fail, and hinders nothing else."""
        try:
            if self.steps is not None:
                self.steps.close()
        except Exception as error:
            vbox_log.warning('breaking off %s: %s', self.verb, error)

    def report(self, percent: int, text: str) -> None:
        """Progress; told at once when it changed, else now and then as a sign of life."""
        now = time.monotonic()
        if (percent, text) != self._last and now - self._told > 0.2 or now - self._told > 2:
            self._last, self._told = (percent, text), now
            self._tell({'id': self.id, 'percent': percent, 'text': text})


class Driver:
    """Owns the manager and every COM object. All of it runs on the thread that calls `run`."""

    def __init__(self, settings: Dict[str, Any], connect: Callable[[], Any], inbox: queue.Queue,
                 tell: Callable[[Dict[str, Any]], None], in_process: bool = False) -> None:
        self.network = settings['network']
        self.desktop = settings['remote_desktop']
        self.chirp_port = settings['chirp_port']
        self.timeout = settings['command_timeout']
        self._connect = connect
        self._inbox = inbox
        self._tell = tell
        self._in_process = in_process
        self._jobs = []  # type: List[Job]
        self._owners = {}  # type: Dict[str, Job]       # uuid: the job that changes this VM
        self._measured = set()  # type: set             # uuids whose metrics are collected
        self._told = None  # type: Any
        self._next_look = 0.0
        self.manager = None  # type: Any
        self.vbox = None  # type: Any
        self.states = {}  # type: Dict[int, str]

    # the loop

    def run(self) -> None:
        """Carry out requests until None comes."""
        while self._take_requests():
            self._resume_jobs()
            self._pump_events()
            if time.monotonic() >= self._next_look:
                self._look()
        for job in self._jobs:
            job.break_off()
        self._jobs = []
        self._disconnect()

    def _take_requests(self) -> bool:
        message = self._wait_for_request()
        while message is not False:
            if message is None:
                return False
            self._begin(message)
            message = self._next_request()
        return True

    def _wait_for_request(self) -> Any:
        due = min([job.due for job in self._jobs] + [self._next_look])
        try:
            return self._inbox.get(timeout=max(0.001, due - time.monotonic()))
        except queue.Empty:
            return False

    def _next_request(self) -> Any:
        try:
            return self._inbox.get_nowait()
        except queue.Empty:
            return False

    def _begin(self, message: Dict[str, Any]) -> None:
        job = Job(message, self.timeout, self._tell)
        self._jobs.append(job)

    def _resume_jobs(self) -> None:
        for job in list(self._jobs):
            if job in self._jobs and job.due <= time.monotonic():
                self._resume(job)

    def _resume(self, job: Job) -> None:
        try:
            if job.steps is None:
                result = self._first_step(job)
                if not isinstance(result, types.GeneratorType):
                    for each in self._same_question(job):
                        self._end(each, {'id': each.id, 'value': result})
                    return
                job.steps = result
            job.due = time.monotonic() + next(job.steps)
        except StopIteration as result:
            self._end(job, {'id': job.id, 'value': result.value})
        except ConnectionLost as error:
            self._lost(job, str(error))
        except VMHostError as error:
            self._end(job, {'id': job.id, 'error': [type(error).__name__, str(error)]})
        except Exception as error:
            self._failed(job, error)

    def _same_question(self, job: Job) -> List[Job]:
        """The job, and those that came before it began and ask the same: a crowd of clients costs
        as much as one."""
        return [each for each in self._jobs if each is job or (
            job.verb in LOOKING and each.steps is None
            and (each.verb, each.args) == (job.verb, job.args))]

    def _first_step(self, job: Job) -> Any:
        """The verb's answer, or its generator where it has to wait for something."""
        if job.verb not in CHANGING and job.verb not in LOOKING:
            raise InvalidParams('no verb %s' % job.verb)
        if job.verb != 'check':
            self._ensure_connected()
        if job.verb in CHANGING:
            self._tell({'id': job.id, 'begun': True})
        return getattr(self, job.verb)(job, *job.args)

    def _failed(self, job: Job, error: Exception) -> None:
        if self._is_dead(error) and not self._answers():
            self._lost(job)
            return
        if self._is_not_ready(error) and job.verb in LOOKING and time.monotonic() < job.begun + NOT_READY:
            job.steps, job.due = None, time.monotonic() + 0.05
            return
        if not self._is_com_error(error) and not isinstance(error, OSError):
            vbox_log.exception('%s failed', job.verb)
        fault = self.translate(error)
        self._end(job, {'id': job.id, 'error': [type(fault).__name__, str(fault)]})

    def _end(self, job: Job, answer: Dict[str, Any]) -> None:
        self._jobs.remove(job)
        for uuid in [uuid for uuid, owner in self._owners.items() if owner is job]:
            del self._owners[uuid]
        job.break_off()
        if job.verb in CHANGING:
            self._look_at_once()
        self._tell(answer)

    # connection

    def _ensure_connected(self) -> None:
        if self.vbox is not None:
            if self._answers():
                return
            raise ConnectionLost()
        self._connect_anew()
        names = self.manager.constants.all_values('MachineState')
        self.states = {code: name for name, code in names.items()
                       if not name.startswith(('First', 'Last'))}
        self._next_look = 0.0
        self._forget_what_never_came()

    def _connect_anew(self) -> None:
        """A VBoxSVC that has just died can take 10 s to make room for the next one: the VMs'
        processes hold its socket until they notice."""
        self.manager = self._connect()
        why = ''
        try:
            self.vbox = self.manager.getVirtualBox()
        except Exception as error:
            why = str(error)
        if self.vbox is None:
            self.manager = None
            raise ConnectionLost('VirtualBox does not answer: VBoxSVC could not be started. ' + why)

    def _disconnect(self) -> None:
        self.vbox = self.manager = None
        self._measured = set()

    def _answers(self) -> bool:
        try:
            return self.vbox.revision is not None
        except Exception as error:
            vbox_log.debug('VBoxSVC does not answer: %s', error)
            return False

    def _lost(self, job: Job, why: str = '') -> None:
        """VBoxSVC died. What had begun to change something is told so, the rest begins again."""
        vbox_log.warning('lost VirtualBox (VBoxSVC died); connecting again')
        for each in list(self._jobs):
            if each.verb in CHANGING and each.steps is not None:
                self._end(each, {'id': each.id, 'error': [
                    'HypervisorError', 'VirtualBox (VBoxSVC) died during %s; look what state the '
                    'VM is in' % each.verb]})
            else:
                self._try_again(each, why)
        self._owners = {}
        self._disconnect()
        if self._in_process:
            raise ConnectionLost()

    def _try_again(self, job: Job, why: str) -> None:
        job.steps = None
        job.tries += 1
        job.due = time.monotonic() + min(0.2 * 2 ** job.tries, 5)
        if time.monotonic() > job.deadline:
            self._end(job, {'id': job.id, 'error': ['HypervisorError', why or 'VBoxSVC died']})
        else:
            self._tell({'id': job.id, 'again': why})

    def _pump_events(self) -> None:
        if self.manager is not None:
            self.manager.waitForEvents(0)

    # errors

    def _is_com_error(self, error: Exception) -> bool:
        return self._code(error) != 0

    def _code(self, error: Exception) -> int:
        """COM's status code, 0 for other errors: of an OSError, too, vboxapi's XPCOM would give the errno."""
        if self.manager is None or not self.manager.xcptIsOurXcptKind(error):
            return 0
        return int(self.manager.xcptGetStatus(error)) & 0xffffffff

    def _is_dead(self, error: Exception) -> bool:
        return self._is_com_error(error) and self._code(error) in DEAD or self.vbox is None

    def _is_not_ready(self, error: Exception) -> bool:
        """VirtualBox refuses access to an object that it is still making, or about to end ("The object is
        not ready"): seen of a VM that another call was importing."""
        return self._is_com_error(error) and self._code(error) == ACCESS_DENIED

    def translate(self, error: Exception) -> VMHostError:
        """VirtualBox's error as ours, with its text and code."""
        if isinstance(error, OSError):              # of ours: a file that can't be read, a full disk
            return HypervisorError(str(error))
        code = self._code(error)
        if not code:
            return HypervisorError('%s: %s' % (type(error).__name__, error))
        text = self.manager.xcptGetMessage(error) or str(error)
        return fault_of(code, text)

    def finish(self, job: Job, progress: Any, text: str) -> Steps:
        """Wait for a Progress of VirtualBox's, in slices, and raise what it failed with."""
        last, changed = -1, time.monotonic()
        while not progress.completed:
            percent = min(100, progress.percent)
            job.report(percent, text)
            if percent != last:
                last, changed = percent, time.monotonic()
            elif time.monotonic() - changed > max(STALL, self.timeout):
                raise DeadlineExceeded('%s: no progress for %d s, at %d%%; VirtualBox goes on '
                                       'with it' % (text, STALL, percent))
            yield 0.1
        job.renew_deadline()
        code = progress.resultCode & 0xffffffff
        if code:
            raise fault_of(code, error_text(progress.errorInfo))

    # finding

    def find(self, vm: str) -> Any:
        """The IMachine of this name, id or uuid."""
        wanted = str(vm)
        if is_mac(wanted):
            for machine in self.machines_now():
                if self.id_of(machine) == wanted.upper():
                    return machine
        try:
            return self.vbox.findMachine(wanted)
        except Exception as error:
            if self._code(error) != OBJECT_NOT_FOUND:
                raise
        raise NoSuchVM('no VM has the name, id or uuid %r' % wanted)

    def array(self, thing: Any, name: str) -> List[Any]:
        return list(self.manager.getArray(thing, name) or [])

    def machines_now(self) -> List[Any]:
        """All machines that are there, and whose settings VirtualBox can read."""
        return [machine for machine in self.array(self.vbox, 'machines') if self._if_there(
            lambda each: each.accessible and self.state_of(each), machine)]

    def _if_there(self, read: Callable[[Any], Any], machine: Any) -> Any:
        """What `read` gives; None of a machine that isn't ready: nobody could mean it yet, or any more."""
        try:
            return read(machine)
        except Exception as error:
            if not self._is_not_ready(error):
                raise
            return None

    def state_of(self, machine: Any) -> str:
        return self.states.get(machine.state, 'Unknown%s' % machine.state)

    def const(self, name: str) -> int:
        return getattr(self.manager.constants, name)

    def cards(self, machine: Any) -> Iterator[Any]:
        for slot in range(8):
            card = machine.getNetworkAdapter(slot)
            if card.enabled:
                yield card

    def card_of(self, machine: Any) -> Any:
        """The card whose MAC is the VM's id: host-only or NAT by the mode, else the first."""
        kinds = self._kinds_of_card()
        first = None
        for card in self.cards(machine):            # mostly the first one: each look takes its time
            if card.attachmentType in kinds:
                return card
            first = first or card
        return first

    def _kinds_of_card(self) -> List[int]:
        names = (('NAT', 'NATNetwork') if self.network['mode'] == 'nat'
                 else ('HostOnly', 'HostOnlyNetwork'))
        known = self.manager.constants.all_values('NetworkAttachmentType')
        return [known[name] for name in names if name in known]

    def id_of(self, machine: Any) -> str:
        card = self.card_of(machine)
        return colons(card.MACAddress) if card else ''

    def _look(self) -> None:
        """Tell the state of all VMs when it changed. Every second, VirtualBox willing."""
        self._next_look = time.monotonic() + 1
        try:
            self._ensure_connected()
            self._tell_seen()
        except ConnectionLost:
            self._lost_while_looking()
            return
        except Exception as error:
            self._look_failed(error)

    def _tell_seen(self) -> None:
        seen = {machine.id: [machine.name, self.state_of(machine), self.id_of(machine)]
                for machine in self.machines_now()}
        if seen != self._told:
            self._told = seen
            self._tell({'seen': seen})

    def _look_at_once(self) -> None:
        """After a change: whoever made it finds the new state known, and no state goes untold."""
        self._next_look = 0.0
        if self.vbox is not None:
            try:
                self._tell_seen()
            except Exception as error:              # the loop looks again, and knows what to do
                vbox_log.debug('looking at the VMs: %s', error)

    def _look_failed(self, error: Exception) -> None:
        if self.vbox is None:                       # not there: nothing to look at
            self._next_look = time.monotonic() + 5
            vbox_log.debug('no VirtualBox: %s', error)
        elif self._answers():                       # a VM that went meanwhile: look again
            vbox_log.debug('looking at the VMs: %s', error)
        else:
            self._lost_while_looking()

    def _lost_while_looking(self) -> None:
        self._told = None
        jobs = [job for job in self._jobs]
        if jobs:
            self._lost(jobs[0])
            return
        self._disconnect()
        if self._in_process:
            raise ConnectionLost()

    # waiting for a VM

    def own(self, job: Job, machine: Any) -> Steps:
        """Be the only job that changes this VM, until the job ends."""
        uuid = machine.id
        while self._owners.get(uuid, job) is not job:
            job.check_deadline(Busy('%s is busy: %s is under way'
                                    % (machine.name, self._owners[uuid].verb)))
            yield 0.05
        self._owners[uuid] = job

    def ready(self, job: Job, vm: str, verb: str) -> Steps:
        """Find, own and check the VM: it is in a state in which `verb` makes sense."""
        machine = self.find(vm)
        yield from self.own(job, machine)
        state = yield from self.settled(job, machine)
        if state not in ACCEPTABLE[verb]:
            raise BadState('%s is %s; %s needs it to be %s' % (
                machine.name, state, verb.replace('_', ' '),
                either([name for name in ACCEPTABLE[verb] if name in self.states.values()])))
        return machine

    def settled(self, job: Job, machine: Any) -> Steps:
        """Wait while the VM is on its way from one state to another."""
        first = self.const('MachineState_FirstTransient')
        while first <= machine.state or machine.sessionState in self._session_on_its_way():
            job.check_deadline(Busy('%s is still %s' % (machine.name, self.state_of(machine))))
            yield 0.05
        return self.state_of(machine)

    def _session_on_its_way(self) -> Tuple[int, int]:
        return self.const('SessionState_Spawning'), self.const('SessionState_Unlocking')

    def reached(self, job: Job, machine: Any, *states: str) -> Steps:
        """Wait until the VM is in one of these states and nobody is about to let it go."""
        while self.state_of(machine) not in states:
            job.check_deadline(DeadlineExceeded(
                '%s is %s, and not yet %s after %d s' % (
                    machine.name, self.state_of(machine), either(states), self.timeout)))
            yield 0.05
        yield from self.settled(job, machine)

    # sessions

    def lock(self, job: Job, machine: Any) -> Steps:
        """A session that holds the VM's lock: shared with its process where it runs.

        Somebody else may hold it for a moment: tried again, less and less often, until the
        deadline of the job.
        """
        pause = 0.05
        while True:
            online = self.state_of(machine) in ONLINE
            session = self.manager.getSessionObject()
            try:
                machine.lockMachine(session, self.const(
                    'LockType_Shared' if online else 'LockType_Write'))
                return session
            except Exception as error:
                if self._code(error) not in (INVALID_OBJECT_STATE, INVALID_SESSION_STATE,
                                             OBJECT_IN_USE):
                    raise
                job.check_deadline(Busy('%s is locked by another program: %s'
                                        % (machine.name, self.translate(error))))
            yield pause
            pause = min(2 * pause, 2)

    def unlock(self, session: Any) -> None:
        """Let go; a VM process that has ended has done so already."""
        try:
            if session.state == self.const('SessionState_Locked'):
                session.unlockMachine()
        except Exception as error:
            vbox_log.debug('unlocking: %s', error)

    def tell_console(self, job: Job, machine: Any, act: Callable[[Any], Any], text: str
                     ) -> Steps:
        """Do `act` with the VM's console, and wait for its Progress if it gives one."""
        session = yield from self.lock(job, machine)
        try:
            console = session.console
            if console is None:
                raise BadState('%s is %s' % (machine.name, self.state_of(machine)))
            progress = act(console)
            if progress is not None:
                yield from self.finish_in_process(job, progress, text)
        finally:
            self.unlock(session)

    def finish_in_process(self, job: Job, progress: Any, text: str) -> Steps:
        """Like finish, for a Progress that lives in the VM's process, and may end with it."""
        try:
            yield from self.finish(job, progress, text)
        except Exception as error:
            if not self._is_dead(error) or not self._answers():
                raise

    def edit(self, job: Job, machine: Any, change: Callable[[Any], None]) -> Steps:
        """Change settings through a session's mutable machine, and save them."""
        session = yield from self.lock(job, machine)
        try:
            change(session.machine)
            session.machine.saveSettings()
        finally:
            self.unlock(session)

    # verbs: what there is

    def version(self, job: Job) -> Any:
        return re.split(r'[^0-9.]', self.vbox.version)[0]

    def machine_states(self, job: Job) -> Any:
        return {name: code for code, name in self.states.items()}

    def machines(self, job: Job) -> Any:
        first, last = (self.const('MachineState_FirstOnline'),
                       self.const('MachineState_LastOnline'))
        return [{'name': machine.name, 'uuid': machine.id, 'id': self.id_of(machine),
                 'state': self.state_of(machine), 'online': first <= machine.state <= last}
                for machine in self.machines_now()]

    def state(self, job: Job, vm: str) -> Any:
        return self.state_of(self.find(vm))

    def describe(self, job: Job, vm: str) -> Any:
        machine = self.find(vm)
        snapshot = machine.currentSnapshot
        return {'name': machine.name, 'id': self.id_of(machine), 'uuid': machine.id,
                'state': self.state_of(machine), 'memory': machine.memorySize,
                'cpus': machine.CPUCount, 'ostype': machine.OSTypeId,
                'snapshot': snapshot.name if snapshot else '',
                'tagged': has_mark(machine, MADE_BY_US),
                'rdp': self._desktop_of(machine)}

    # verbs: life of a VM

    def start(self, job: Job, vm: str, gui_mode: bool) -> Steps:
        machine = yield from self.ready(job, vm, 'start')
        if self.network['mode'] == 'nat' and self.state_of(machine) in OFF:
            yield from self.edit(job, machine, self.forward_chirp)
        yield from self._launch(job, machine, 'gui' if gui_mode else 'headless')
        yield from self.reached(job, machine, *ONLINE + OFF + SAVED)
        state = self.state_of(machine)
        if state not in ('Running', 'Paused'):
            raise HypervisorError('%s came up, and is %s already: its log, getLog, should tell why'
                                  % (machine.name, state))
        return True

    def _launch(self, job: Job, machine: Any, kind: str) -> Steps:
        environment = [] if self.api() >= (6, 1) else ''
        pause = 0.05
        while True:
            session = self.manager.getSessionObject()
            try:
                progress = machine.launchVMProcess(session, kind, environment)
                break
            except Exception as error:
                if self._code(error) != INVALID_OBJECT_STATE:
                    raise
                job.check_deadline(Busy('%s is locked by another program: %s'
                                        % (machine.name, self.translate(error))))
            yield pause
            pause = min(2 * pause, 2)
        try:
            yield from self.finish(job, progress, 'starting')
        finally:
            self.unlock(session)

    def shutdown(self, job: Job, vm: str) -> Steps:
        machine = yield from self.ready(job, vm, 'shutdown')
        yield from self.tell_console(job, machine, lambda console: console.powerButton(), '')
        while self.state_of(machine) not in OFF:
            job.check_deadline(DeadlineExceeded(
                '%s took no notice of the ACPI power button for %d s; powerOff pulls the plug'
                % (machine.name, self.timeout)))
            yield 0.1
        yield from self.settled(job, machine)
        return True

    def reset(self, job: Job, vm: str) -> Steps:
        machine = yield from self.ready(job, vm, 'reset')
        yield from self.tell_console(job, machine, lambda console: console.reset(), '')
        yield from self.reached(job, machine, 'Running')
        return True

    def power_off(self, job: Job, vm: str) -> Steps:
        machine = yield from self.ready(job, vm, 'power_off')
        failure = None
        try:
            yield from self.tell_console(job, machine, lambda console: console.powerDown(),
                                         'powering off')
        except Exception as error:      # its process has died meanwhile, perhaps: it is off then, too
            failure = error
        if failure is not None:
            yield from self.settled(job, machine)
            if self.state_of(machine) not in OFF:
                raise failure
        yield from self.reached(job, machine, *OFF)
        return True

    def pause(self, job: Job, vm: str) -> Steps:
        machine = yield from self.ready(job, vm, 'pause')
        yield from self.tell_console(job, machine, lambda console: console.pause(), '')
        yield from self.reached(job, machine, 'Paused')
        return True

    def resume(self, job: Job, vm: str) -> Steps:
        machine = yield from self.ready(job, vm, 'resume')
        yield from self.tell_console(job, machine, lambda console: console.resume(), '')
        yield from self.reached(job, machine, 'Running')
        return True

    def save_state(self, job: Job, vm: str) -> Steps:
        machine = yield from self.ready(job, vm, 'save_state')
        session = yield from self.lock(job, machine)
        failure = None
        try:
            yield from self.finish_in_process(job, session.machine.saveState(), 'saving the state')
        except VMHostError as error:
            failure = error
        finally:
            self.unlock(session)
        if failure is not None:
            yield from self.settled(job, machine)
            if self.state_of(machine) != 'Saved':
                raise failure
            yield from self._write_settings(job, machine, failure)
        yield from self.reached(job, machine, 'Saved')
        return True

    def _write_settings(self, job: Job, machine: Any, failure: Exception) -> Steps:
        """Seen with 7.2, once in 60: the state is saved, but an assertion of VBoxSVC's fails while it
        writes the .vbox file, which then doesn't name the state. A change writes it again."""
        vbox_log.info('%s is saved, though VirtualBox says: %s', machine.name, failure)
        text = machine.description
        for each in (text + ' ', text):
            yield from self.edit(job, machine, lambda mutable, each=each: setattr(  # type: ignore
                mutable, 'description', each))

    def discard_state(self, job: Job, vm: str) -> Steps:
        machine = yield from self.ready(job, vm, 'discard_state')
        session = yield from self.lock(job, machine)
        try:
            session.machine.discardSavedState(True)
        finally:
            self.unlock(session)
        yield from self.reached(job, machine, *OFF)
        return True

    # verbs: snapshots

    def snapshots(self, job: Job, vm: str) -> Any:
        return self._snapshots_of(self.find(vm))

    def _snapshots_of(self, machine: Any) -> List[Dict[str, Any]]:
        """Without recursion: a chain of snapshots may be hundreds deep."""
        if not machine.snapshotCount:
            return []
        current = machine.currentSnapshot.id if machine.currentSnapshot else ''
        rows, todo = [], [(machine.findSnapshot(''), '', 0)]
        while todo:
            snapshot, parent, depth = todo.pop()
            rows.append({'name': snapshot.name, 'id': snapshot.id, 'parent': parent,
                         'depth': depth, 'desc': snapshot.description,
                         'taken': snapshot.timeStamp // 1000, 'online': bool(snapshot.online),
                         'current': snapshot.id == current})
            todo += [(child, snapshot.name, depth + 1)
                     for child in reversed(self.array(snapshot, 'children'))]
        return rows

    def list_snapshots(self, job: Job, vm: str) -> Any:
        return [row['name'] for row in self._snapshots_of(self.find(vm))]

    def _find_snapshot(self, machine: Any, name: str) -> Any:
        if not name:
            if machine.currentSnapshot is None:
                raise HypervisorError('%s has no snapshot' % machine.name)
            return machine.currentSnapshot
        same = [row for row in self._snapshots_of(machine) if name in (row['name'], row['id'])]
        if not same:
            raise HypervisorError('%s has no snapshot %r' % (machine.name, name))
        if len(same) > 1:
            raise HypervisorError('%s has %d snapshots named %r: use a uuid, one of %s' % (
                machine.name, len(same), name, ', '.join(row['id'] for row in same)))
        return machine.findSnapshot(same[0]['id'])

    def take_snapshot(self, job: Job, vm: str, name: str, desc: str) -> Steps:
        if not name:
            raise InvalidParams('a snapshot needs a name')
        machine = yield from self.ready(job, vm, 'take_snapshot')
        if any(row['name'] == name for row in self._snapshots_of(machine)):
            raise AlreadyExists('%s has a snapshot %r already' % (machine.name, name))
        before = self.state_of(machine)
        session = yield from self.lock(job, machine)
        try:
            progress = session.machine.takeSnapshot(name, desc, before != 'Running')
            yield from self.finish(job, progress_of(progress), 'taking the snapshot')
        finally:
            self.unlock(session)
        yield from self.reached(job, machine, before)
        return True

    def restore_snapshot(self, job: Job, vm: str, name: str) -> Steps:
        machine = yield from self.ready(job, vm, 'restore_snapshot')
        snapshot = self._find_snapshot(machine, name)
        session = yield from self.lock(job, machine)
        try:
            yield from self.finish(job, session.machine.restoreSnapshot(snapshot),
                                   'restoring the snapshot')
        finally:
            self.unlock(session)
        yield from self.settled(job, machine)
        return True

    def delete_snapshot(self, job: Job, vm: str, name: str) -> Steps:
        if not name:
            raise InvalidParams('which snapshot?')
        machine = yield from self.ready(job, vm, 'delete_snapshot')
        snapshot = self._find_snapshot(machine, name)
        session = yield from self.lock(job, machine)
        try:
            yield from self.finish(job, session.machine.deleteSnapshot(snapshot.id),
                                   'deleting the snapshot')
        finally:
            self.unlock(session)
        yield from self.settled(job, machine)
        return True

    # verbs: making and removing

    def create_vm(self, job: Job, name: str, image: str, options: Dict[str, Any]
                  ) -> Steps:
        wish = wishes(options)
        registers = not image and name.lower().endswith('.vbox')
        kind = os.path.splitext(name if registers else image)[1].lower()
        check_fitting(options, kind)
        if registers:
            return self._register(os.path.abspath(name))
        self._check_new_name(job, name)
        self._check_ostype(wish['ostype'])
        if image and not os.path.isfile(image):
            raise InvalidParams('no such image file: %s' % image)
        if kind in ('.ova', '.ovf'):
            yield from self._import(job, name, os.path.abspath(image), wish)
        elif kind in ('', '.iso', '.vdi', '.vmdk', '.vhd', '.vhdx', '.qcow', '.qcow2', '.hdd'):
            yield from self._build(job, name, image and os.path.abspath(image), kind, wish)
        else:
            raise NotSupported('an image is .ova, .ovf, .iso, .vdi, .vmdk, .vhd or .qcow, not %r'
                               % kind)
        return name

    def _check_new_name(self, job: Job, name: str) -> None:
        if not name or re.search(r'[/\\\x00-\x1f]', name) or name in ('.', '..'):
            raise InvalidParams('%r is no name for a VM' % name)
        self._check_is_no_id(name)
        if name in [machine.name for machine in self.machines_now()]:
            raise AlreadyExists('there is a VM %r already' % name)
        path = self.vbox.composeMachineFilename(name, '', '', '')
        if path in self._in_the_making(besides=job):
            raise AlreadyExists('a VM %r is being made already' % name)
        if os.path.exists(path):
            raise AlreadyExists('%s exists already, of a VM that is not registered' % path)

    def _check_is_no_id(self, name: str) -> None:
        """Whoever means a VM of that name would reach the one that has the id."""
        if is_mac(name) or UUID.match(name):
            raise InvalidParams('%r is an id, and no name for a VM' % name)

    def _check_ostype(self, ostype: str) -> None:
        known = [each.id for each in self.array(self.vbox, 'guestOSTypes')] if ostype else ['']
        if ostype not in known:
            raise InvalidParams('VirtualBox knows no ostype %r; `VBoxManage list ostypes` lists them'
                             % ostype)

    def _register(self, path: str) -> str:
        if not os.path.isfile(path):
            raise InvalidParams('no such file: %s' % path)
        for machine in self.array(self.vbox, 'machines'):       # those that can't be read, too
            if os.path.abspath(self._if_there(lambda each: each.settingsFilePath, machine) or '') == path:
                raise AlreadyExists('%s is registered already' % path)
        password = ('',) if self.api() >= (7, 0) else ()
        machine = self.vbox.openMachine(path, *password)
        self._check_is_no_id(machine.name)
        if machine.name in [each.name for each in self.machines_now()]:
            raise AlreadyExists('there is a VM %r already' % machine.name)
        self.vbox.registerMachine(machine)
        return machine.name

    def _build(self, job: Job, name: str, image: str, kind: str, wish: Dict[str, Any]
               ) -> Steps:
        machine = self._new_machine(name, wish['ostype'])
        disk = None
        try:
            yield from self.own(job, machine)
            disk = yield from self._new_disk(job, machine, image, kind, wish['diskSize'])
            yield from self.edit(job, machine, lambda mutable: self._fit_out(
                mutable, wish, disk, image if kind == '.iso' else ''))
        except BaseException:
            self._remove_half_made(machine, disk)
            raise

    def _new_machine(self, name: str, ostype: str) -> Any:
        """Registered at once, marked as half made: if we die now, cleanup will find it."""
        ostype = ostype or 'Linux_64'
        if self.api() >= (7, 1):
            arch = self.vbox.getGuestOSType(ostype).platformArchitecture
            arguments = ['', name, arch, [], ostype, '', '', '', '']
        elif self.api() >= (7, 0):
            arguments = ['', name, [], ostype, '', '', '', '']
        else:
            arguments = ['', name, [], ostype, '']
        machine = self.vbox.createMachine(*arguments)
        machine.applyDefaults('')
        machine.setExtraData(MADE_BY_US, machine.id)
        machine.setExtraData(MAKING, machine.id)
        machine.saveSettings()
        self.vbox.registerMachine(machine)
        return machine

    def _remove_half_made(self, machine: Any, disk: Any = None) -> None:
        """And the new disk, which it may not have attached yet."""
        try:
            note = IMPORTING + machine.name
            if disk is not None and not self.array(disk, 'machineIds'):
                location = disk.location
                disk.deleteStorage().waitForCompletion(10000)
                self.vbox.setExtraData(DISK_MADE + location, '')
            progress = self._delete(machine, only_ours=True)
            progress.waitForCompletion(10000)
            self.vbox.setExtraData(note, '')
        except Exception as error:
            vbox_log.warning('a half-made VM is left for cleanup: %s', self.translate(error))

    def _new_disk(self, job: Job, machine: Any, image: str, kind: str, size: Optional[int]
                  ) -> Steps:
        copied = image and kind != '.iso'
        if not copied and size == 0:
            return None
        folder = os.path.dirname(machine.settingsFilePath)
        disk = self.vbox.createMedium('VDI', os.path.join(folder, machine.name + '.vdi'),
                                      self.const('AccessMode_ReadWrite'),
                                      self.const('DeviceType_HardDisk'))
        self.vbox.setExtraData(DISK_MADE + disk.location, unfinished())
        variant = [self.const('MediumVariant_Standard')]
        if copied:
            yield from self._copy_disk(job, image, disk, variant)
        else:
            megabytes = self._default_size(machine) if size is None else size
            yield from self.finish(job, disk.createBaseStorage(megabytes << 20, variant),
                                   'making a disk')
        self.vbox.setExtraData(DISK_MADE + disk.location, disk.id)
        return disk

    def _default_size(self, machine: Any) -> int:
        return max(1024, self.vbox.getGuestOSType(machine.OSTypeId).recommendedHDD >> 20)

    def _copy_disk(self, job: Job, image: str, disk: Any, variant: List[int]) -> Steps:
        own_copy = False
        try:
            source = self._open_disk(image)
        except Exception as error:
            if self._code(error) != OBJECT_NOT_FOUND:
                raise
            own_copy = True
            source = yield from self._open_twin(job, image, os.path.dirname(disk.location))
        try:
            yield from self.finish(job, source.cloneTo(disk, variant, None), 'copying the disk')
        finally:
            self._let_go(source, own_copy)

    def _let_go(self, source: Any, own_copy: bool) -> None:
        """VirtualBox goes on with a copying that was broken off, and then refuses: cleanup finds our copy."""
        try:
            if own_copy:
                twin = source.location
                source.deleteStorage().waitForCompletion(10000)
                self.vbox.setExtraData(DISK_MADE + twin, '')
            elif not self.array(source, 'machineIds'):
                source.close()
        except Exception as error:
            vbox_log.info('an image stays open: %s', self.translate(error))

    def _open_disk(self, image: str, mode: str = 'ReadOnly', new_uuid: bool = False) -> Any:
        return self.vbox.openMedium(image, self.const('DeviceType_HardDisk'),
                                    self.const('AccessMode_' + mode), new_uuid)

    def _open_twin(self, job: Job, image: str, folder: str) -> Steps:
        """Of a copy of a disk that VirtualBox knows: both have the same uuid, so it opens neither
        the copy nor, without writing into it, gives it another. A copy of the copy gets one."""
        twin = os.path.join(folder, 'copy-of-' + os.path.basename(image))
        self.vbox.setExtraData(DISK_MADE + twin, unfinished())
        try:
            yield from self._copy_file(job, image, twin)
            return self._open_disk(twin, 'ReadWrite', True)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(twin)
            self.vbox.setExtraData(DISK_MADE + twin, '')
            raise

    def _copy_file(self, job: Job, image: str, target: str) -> Steps:
        total = os.path.getsize(image) or 1
        with open(image, 'rb') as source, open(target, 'wb') as copy:
            for block in iter(lambda: source.read(4 << 20), b''):
                copy.write(block)
                job.report(100 * source.tell() // total, 'copying the image')
                yield 0
        job.renew_deadline()

    def _fit_out(self, machine: Any, wish: Dict[str, Any], disk: Any, iso: str) -> None:
        if disk is not None:
            bus, port = self._free_place(machine, ('SATA', 'SCSI', 'VirtioSCSI', 'IDE'))
            machine.attachDevice(bus, port, 0, self.const('DeviceType_HardDisk'), disk)
        if iso:
            medium = self.vbox.openMedium(iso, self.const('DeviceType_DVD'),
                                          self.const('AccessMode_ReadOnly'), False)
            self._insert(machine, medium)
        self._apply(machine, wish)

    def _free_place(self, machine: Any, kinds: Tuple[str, ...]) -> Tuple[str, int]:
        buses = self.manager.constants.all_values('StorageBus')
        for kind in kinds:
            for controller in self.array(machine, 'storageControllers'):
                if controller.bus == buses.get(kind):
                    return controller.name, self._free_port_of(machine, controller)
        controller = machine.addStorageController('SATA', buses['SATA'])
        controller.portCount = 2
        return controller.name, 0

    def _free_port_of(self, machine: Any, controller: Any) -> int:
        used = {place.port for place in self.array(machine, 'mediumAttachments')
                if place.controller == controller.name}
        free = [port for port in range(controller.maxPortCount) if port not in used]
        if free[0] >= controller.portCount:
            controller.portCount = free[0] + 1
        return free[0]

    def _insert(self, machine: Any, medium: Any) -> None:
        """Into the drive that the machine has, else into a new one."""
        dvd = self.const('DeviceType_DVD')
        for place in self.array(machine, 'mediumAttachments'):
            if place.type == dvd:
                machine.mountMedium(place.controller, place.port, place.device, medium, True)
                return
        bus, port = self._free_place(machine, ('IDE', 'SATA'))
        machine.attachDevice(bus, port, 0, dvd, medium)

    def _apply(self, machine: Any, wish: Dict[str, Any]) -> None:
        if wish['memory']:
            machine.memorySize = wish['memory']
        if wish['cpus']:
            machine.CPUCount = wish['cpus']
        self._give_card(machine, wish['network'] or self.network['mode'])
        if wish['keep']:
            machine.setExtraData(KEEP, machine.id)
        machine.setExtraData(MADE_BY_US, machine.id)
        machine.setExtraData(MAKING, '')

    def _give_card(self, machine: Any, network: str) -> None:
        """The card over which the agent will speak. An appliance keeps those it came with."""
        cards = list(self.cards(machine))
        if network == 'none':
            for card in cards:
                card.enabled = False
        elif network == 'nat':
            self._nat_card(self._card_for(machine, cards, ('NAT',)), machine)
        else:
            self._host_only_card(self._card_for(machine, cards, ('HostOnly', 'HostOnlyNetwork')))

    def _card_for(self, machine: Any, cards: List[Any], kinds: Tuple[str, ...]) -> Any:
        known = self.manager.constants.all_values('NetworkAttachmentType')
        fitting = [card for card in cards if card.attachmentType in
                   [known.get(kind) for kind in kinds]]
        fresh = has_mark(machine, MAKING)        # its only card is what applyDefaults gave it
        card = (fitting or (cards if fresh else []) or [self._unused_card(machine)])[0]
        card.enabled = True
        return card

    def _unused_card(self, machine: Any) -> Any:
        for slot in range(8):
            card = machine.getNetworkAdapter(slot)
            if not card.enabled:
                return card
        raise HypervisorError('%s has no network slot left' % machine.name)

    def _nat_card(self, card: Any, machine: Any) -> None:
        card.attachmentType = self.const('NetworkAttachmentType_NAT')
        self._reach_localhost(card.NATEngine)
        if self.network['mode'] == 'nat':
            self.forward_chirp(machine)

    def _host_only_card(self, card: Any) -> None:
        if self.networks_on_mac():
            card.attachmentType = self.const('NetworkAttachmentType_HostOnlyNetwork')
            card.hostOnlyNetwork = self.network['interface']
            return
        card.attachmentType = self.const('NetworkAttachmentType_HostOnly')
        card.hostOnlyInterface = self.network['interface']

    def _import(self, job: Job, name: str, image: str, wish: Dict[str, Any]) -> Steps:
        """VirtualBox registers the VM when all its disks are there; until then a note of ours
        says whose it will be."""
        appliance = self.vbox.createAppliance()
        yield from self.finish(job, appliance.read(image), 'reading the appliance')
        appliance.interpret()
        systems = self.array(appliance, 'virtualSystemDescriptions')
        if len(systems) != 1:
            raise NotSupported('%s holds %d machines, not one' % (image, len(systems)))
        path = self.vbox.composeMachineFilename(name, '', '', '')
        self._rename_system(systems[0], name, path)
        note = IMPORTING + name
        self.vbox.setExtraData(note, path)
        self._expect_disks(systems[0], os.path.dirname(path))
        try:
            yield from self.finish(job, appliance.importMachines([]), 'importing')
        except Exception as error:                  # VirtualBox goes on, or died: what comes is ours
            if not isinstance(error, DeadlineExceeded) and not self._is_dead(error):
                self._forget(os.path.dirname(path))
            raise
        machine = self.vbox.findMachine(self.array(appliance, 'machines')[0])
        try:
            yield from self.own(job, machine)
            self._remember_disks(machine)
            yield from self.edit(job, machine, lambda mutable: self._apply(mutable, wish))
        except BaseException:
            self._remove_half_made(machine)
            raise
        self.vbox.setExtraData(note, '')

    def _rename_system(self, system: Any, name: str, path: str) -> None:
        kinds, _, _, values, extra = system.getDescription()
        renamed = {self.const('VirtualSystemDescriptionType_Name'): name,
                   self.const('VirtualSystemDescriptionType_SettingsFile'): path}
        values = [renamed.get(kind, value) for kind, value in zip(kinds, values)]
        system.setFinalValues([True] * len(kinds), values, extra)

    def _expect_disks(self, system: Any, folder: str) -> None:
        """Notes the disks that an import will make: the VM that has them is there at its end alone."""
        disk = self.const('VirtualSystemDescriptionType_HardDiskImage')
        kinds, _, _, values, _ = system.getDescription()
        for kind, value in zip(kinds, values):
            location = os.path.join(folder, value)
            if kind == disk and not os.path.exists(location):
                self.vbox.setExtraData(DISK_MADE + location, unfinished())

    def _forget(self, folder: str) -> None:
        """Drops the notes of what was to come in this folder and didn't: what lies there later isn't ours."""
        for key, path in self._begun():
            if os.path.dirname(path) == folder and not is_recent(path, self.vbox.getExtraData(key)):
                self.vbox.setExtraData(key, '')

    def _begun(self) -> Iterator[Tuple[str, str]]:
        """(key of the note, path) of unfinished disks, and of the .vbox files that imports make."""
        for key in self.vbox.getExtraDataKeys():
            note = self.vbox.getExtraData(key)
            if key.startswith(IMPORTING):
                yield key, note
            elif key.startswith(DISK_MADE) and note.startswith(DISK_UNFINISHED):
                yield key, key[len(DISK_MADE):]

    def _disks_of(self, machine: Any) -> List[Any]:
        disk = self.const('DeviceType_HardDisk')
        return [place.medium for place in self.array(machine, 'mediumAttachments')
                if place.type == disk and place.medium]

    def _remember_disks(self, machine: Any) -> None:
        for disk in self._disks_of(machine):
            self.vbox.setExtraData(DISK_MADE + disk.location, disk.id)

    def remove_vm(self, job: Job, vm: str, delete_disks: bool) -> Steps:
        machine = yield from self.ready(job, vm, 'remove_vm')
        if machine.sessionState != self.const('SessionState_Unlocked'):
            session = yield from self.lock(job, machine)       # waits, or says Busy
            self.unlock(session)
        if delete_disks:
            yield from self._finish_delete(job, machine, only_ours=False)
        else:
            machine.unregister(self.const('CleanupMode_UnregisterOnly'))
        return True

    def _finish_delete(self, job: Job, machine: Any, only_ours: bool) -> Steps:
        yield from self.finish(job, self._delete(machine, only_ours), 'deleting')

    def _delete(self, machine: Any, only_ours: bool) -> Any:
        """Unregister and delete the VM's files, and those of its disks that nothing else needs: all of
        them, or only what we made."""
        media = self._unused(machine.unregister(self.const('CleanupMode_DetachAllReturnHardDisksOnly')))
        if only_ours:
            media = [medium for medium in media if self._is_made(medium)]
        for medium in media:
            if not medium.parent:
                self.vbox.setExtraData(DISK_MADE + medium.location, '')
        return machine.deleteConfig(media)

    def _unused(self, media: List[Any]) -> List[Any]:
        """Of the disks that a VM had, and its snapshots: those that no other VM has attached, nor a disk
        that lies on them, such as a linked clone's."""
        had, needed = {medium.id for medium in media}, set()
        for medium in media:
            if self.array(medium, 'machineIds') or {
                    child.id for child in self.array(medium, 'children')} - had:
                while medium and medium.id not in needed:
                    needed.add(medium.id)
                    medium = medium.parent
        return [medium for medium in media if medium.id not in needed]

    def _is_made(self, medium: Any) -> bool:
        """Whether we made this disk, or the one that it lies on."""
        base = medium.base
        return is_noted(base, self.vbox.getExtraData(DISK_MADE + base.location))

    # verbs: what was left behind

    def cleanup(self, job: Job, dry_run: bool) -> Steps:
        removed = []  # type: List[Dict[str, str]]
        unread = [self._if_there(lambda each: each.settingsFilePath, machine) or 'a VM that comes or goes'
                  for machine in self.array(self.vbox, 'machines')
                  if not self._if_there(lambda each: each.accessible, machine)]
        if unread:                                  # which disks are theirs, VirtualBox doesn't know
            vbox_log.warning('cleanup removes nothing while VirtualBox can not read %s: any disk may be '
                             'in use there', ', '.join(unread))
            return removed
        self._forget_what_never_came()
        for machine in self.machines_now():
            why = self._why_left(machine)
            if why:
                row = {'kind': 'vm', 'name': machine.name, 'why': why}
                if dry_run or (yield from self._succeeds(row, self._remove_left_vm(job, machine))):
                    removed.append(row)
        for location, note in self._left_disks():
            row = {'kind': 'disk', 'name': location, 'why': 'no VM uses it'}
            if dry_run or (yield from self._succeeds(row, self._remove_disk(job, location, note))):
                removed.append(row)
        return removed

    def _succeeds(self, row: Dict[str, str], steps: Steps) -> Steps:
        """Removes it. What can't be removed mustn't hide what was, nor keep the rest."""
        try:
            yield from steps
            return True
        except Exception as error:
            if self._is_dead(error):
                raise
            vbox_log.warning('cleanup could not remove the %s %s: %s', row['kind'], row['name'],
                             error if isinstance(error, VMHostError) else self.translate(error))
            return False

    def _remove_left_vm(self, job: Job, machine: Any) -> Steps:
        yield from self.own(job, machine)
        yield from self._finish_delete(job, machine, only_ours=True)

    def _why_left(self, machine: Any) -> str:
        """Why this VM may go, '' when it must not."""
        if has_mark(machine, KEEP) or machine.id in self._owners:
            return ''
        if machine.sessionState != self.const('SessionState_Unlocked'):
            return ''
        if has_mark(machine, MAKING) or self._import_left(machine):
            return 'half made'
        state = self.state_of(machine)
        return state if has_mark(machine, MADE_BY_US) and state in OFF else ''

    def _import_left(self, machine: Any) -> bool:
        path = self.vbox.getExtraData(IMPORTING + machine.name)
        return bool(path) and path == machine.settingsFilePath and path not in self._in_the_making()

    def _in_the_making(self, besides: Optional[Job] = None) -> List[str]:
        """The .vbox files of the VMs that jobs are making: an imported one has no owner until it is whole."""
        return [self.vbox.composeMachineFilename(job.args[0], '', '', '') for job in self._jobs
                if job.verb == 'create_vm' and job.steps is not None and job is not besides]

    def _forget_what_never_came(self) -> None:
        """As _forget, for whatever a host began that has died. The sooner the better: a user may put files
        of his own there."""
        if not self._works():
            making = self._folders_in_the_making()
            for folder in {os.path.dirname(path) for _, path in self._begun()}.difference(making):
                self._forget(folder)

    def _works(self) -> bool:
        """Whether VirtualBox is at work: it goes on with what a host began that has died."""
        return bool(self.array(self.vbox, 'progressOperations'))

    def _left_disks(self) -> List[Tuple[str, str]]:
        """(path, note) of the disks that we made and that no VM has attached, nor a disk that lies on them.

        Nothing unfinished is left while VirtualBox works.
        """
        works = self._works()
        making = self._folders_in_the_making()
        known = {disk.location: disk for disk in self.array(self.vbox, 'hardDisks')}
        left = []
        for key in self.vbox.getExtraDataKeys():
            location, note = key[len(DISK_MADE):], self.vbox.getExtraData(key)
            if not key.startswith(DISK_MADE) or os.path.dirname(location) in making:
                continue
            if works and note.startswith(DISK_UNFINISHED):
                continue
            if not is_recent(location, note):
                self.vbox.setExtraData(key, '')
            elif location not in known or self._is_left(known[location], note):
                left.append((location, note))
        return left

    def _is_left(self, disk: Any, note: str) -> bool:
        return is_noted(disk, note) and not (
            self.array(disk, 'machineIds') or self.array(disk, 'children'))

    def _folders_in_the_making(self) -> List[str]:
        machines = self.machines_now() if self._owners else []
        owned = [machine.settingsFilePath for machine in machines if machine.id in self._owners]
        return [os.path.dirname(path) for path in owned + self._in_the_making()]

    def _remove_disk(self, job: Job, location: str, note: str) -> Steps:
        try:
            medium = self._open_disk(location, 'ReadWrite')
        except Exception as error:
            if self._is_dead(error) or not note.startswith(DISK_UNFINISHED):
                raise
            os.remove(location)                     # not even a disk yet, or still the twin of another
        else:
            if not is_noted(medium, note):
                medium.close()                      # VirtualBox didn't know it before
                raise HypervisorError('%s is another disk than the one that was made there'
                                      % location)
            yield from self.finish(job, medium.deleteStorage(), 'deleting a disk')
        self.vbox.setExtraData(DISK_MADE + location, '')
        if not self._is_folder_of_vm(os.path.dirname(location)):
            remove_leavings(os.path.dirname(location))

    def _is_folder_of_vm(self, folder: str) -> bool:
        """Whether a registered VM has its settings there; one that VirtualBox can't read is a VM, too."""
        return os.path.realpath(folder) in [
            os.path.realpath(os.path.dirname(machine.settingsFilePath))
            for machine in self.array(self.vbox, 'machines')]

    # verbs: the network

    def networks_on_mac(self) -> bool:
        """macOS has host-only networks in place of interfaces, from VirtualBox 7 on."""
        return sys.platform == 'darwin' and self.api() >= (7, 0)

    def get_network(self, job: Job) -> Dict[str, Any]:
        if self.networks_on_mac():
            return self._network_on_mac()
        found = self._interface()
        dhcp = self._dhcp_server()
        return {'mode': self.network['mode'], 'interface': self.network['interface'],
                'hostIp': found.IPAddress if found else '',
                'netmask': found.networkMask if found else '',
                'dhcp': self._dhcp_facts(dhcp)}

    def _dhcp_facts(self, dhcp: Any) -> Dict[str, Any]:
        if dhcp is None:
            return {'server': '', 'lower': '', 'upper': '', 'enabled': False}
        return {'server': dhcp.IPAddress, 'lower': dhcp.lowerIP, 'upper': dhcp.upperIP,
                'enabled': bool(dhcp.enabled)}

    def _interface(self) -> Any:
        kind = self.const('HostNetworkInterfaceType_HostOnly')
        for each in self.array(self.vbox.host, 'networkInterfaces'):
            if each.interfaceType == kind and each.name == self.network['interface']:
                return each
        return None

    def _dhcp_server(self) -> Any:
        name = 'HostInterfaceNetworking-' + self.network['interface']
        for dhcp in self.array(self.vbox, 'DHCPServers'):
            if dhcp.networkName == name:
                return dhcp
        return None

    def setup_network(self, job: Job) -> Steps:
        """Changes only what differs, so that it can be called again at any time."""
        if self.network['mode'] == 'nat':
            return self.get_network(job)            # nothing to make: each VM has its own
        problem = address_problem(self.network) or range_problem(self.network['host_ip'])
        if problem:
            raise HypervisorError(problem)
        if self.networks_on_mac():
            self._setup_on_mac()
            return self.get_network(job)
        if self._interface() is None:
            yield from self._make_interface(job)
        self._address_interface()
        self._setup_dhcp()
        return self.get_network(job)

    def _make_interface(self, job: Job) -> Steps:
        answer = self.vbox.host.createHostOnlyNetworkInterface()
        yield from self.finish(job, progress_of(answer), 'making the interface')
        made = next(part for part in answer if not hasattr(part, 'completed'))
        if made.name == self.network['interface']:
            return
        name = made.name
        yield from self.finish(job, self.vbox.host.removeHostOnlyNetworkInterface(made.id), '')
        raise HypervisorError('VirtualBox would call the new interface %s: write interface=%s in '
                              '[Network]' % (name, name))

    def _address_interface(self) -> None:
        wanted = self.network['host_ip'], self.network['netmask']
        found = self._interface()
        if (found.IPAddress, found.networkMask) != wanted or not is_local(wanted[0]):
            found.enableStaticIPConfig(*wanted)

    def _setup_dhcp(self) -> None:
        wish = self.network
        dhcp = self._dhcp_server()
        if dhcp is None:
            dhcp = self.vbox.createDHCPServer('HostInterfaceNetworking-' + wish['interface'])
        wanted = (wish['dhcp_server'], wish['netmask'], wish['dhcp_lower'], wish['dhcp_upper'])
        if (dhcp.IPAddress, dhcp.networkMask, dhcp.lowerIP, dhcp.upperIP) != wanted:
            dhcp.setConfiguration(*wanted)
        self._announce_router(dhcp)
        if not dhcp.enabled:
            dhcp.enabled = True

    def _announce_router(self, dhcp: Any) -> None:
        """The guest looks for the broker at its gateway, which is this host."""
        router = self.network['host_ip']
        if self.api() >= (6, 1):
            dhcp.globalConfig.setOption(self.const('DHCPOption_Routers'),
                                        self.const('DHCPOptionEncoding_Normal'), router)
        else:
            dhcp.addGlobalOption(self.const('DhcpOpt_Router'), router)

    def _mac_network(self) -> Any:
        for each in self.array(self.vbox, 'hostOnlyNetworks'):
            if each.networkName == self.network['interface']:
                return each
        return None

    def _network_on_mac(self) -> Dict[str, Any]:
        found = self._mac_network()
        return {'mode': self.network['mode'], 'interface': self.network['interface'],
                'hostIp': self.network['host_ip'] if found else '',
                'netmask': found.networkMask if found else '',
                'dhcp': {'server': '', 'lower': found.lowerIP if found else '',
                         'upper': found.upperIP if found else '',
                         'enabled': bool(found and found.enabled)}}

    def _setup_on_mac(self) -> None:
        network = self._mac_network()
        if network is None:
            network = self.vbox.createHostOnlyNetwork(self.network['interface'])
        network.networkMask = self.network['netmask']
        network.lowerIP, network.upperIP = self.network['host_ip'], self.network['dhcp_upper']
        network.enabled = True

    # verbs: is all well?

    def check(self, job: Job) -> List[Tuple[bool, str, str]]:
        try:
            self._ensure_connected()
        except VMHostError as error:
            return [(False, 'VirtualBox', str(error))] + [module_line()]
        lines = [version_line(self.vbox.version, self.api()), module_line(), self._vtx_line()]
        if self.network['mode'] == 'hostonly':
            lines += self._network_lines()
        lines.append(self._desktop_line())
        return lines

    def _vtx_line(self) -> Tuple[bool, str, str]:
        has = self.vbox.host.getProcessorFeature(self.const('ProcessorFeature_HWVirtEx'))
        return (bool(has), 'hardware virtualisation (VT-x, AMD-V)',
                '' if has else 'switch it on in the firmware (BIOS), and off in other hypervisors '
                '(KVM, Hyper-V); without it VMs do not start, or crawl')

    def _network_lines(self) -> List[Tuple[bool, str, str]]:
        name = self.network['interface']
        problem = address_problem(self.network) or range_problem(self.network['host_ip'])
        lines = [(not problem, 'addresses of the host-only network', problem)]
        now = self.get_network(Job({'id': 0, 'verb': 'get_network', 'args': []}, 1, self._tell))
        there = now['hostIp'] == self.network['host_ip'] and is_local(now['hostIp'])
        mend = '`vmhost.py host.ini call setupNetwork` makes it, or manage=yes in [Network]'
        lines.append((there, 'interface %s with address %s' % (name, self.network['host_ip']),
                      '' if there else mend))
        lines.append((now['dhcp']['enabled'], 'DHCP server of ' + name,
                      '' if now['dhcp']['enabled'] else mend))
        return lines

    def _desktop_line(self) -> Tuple[bool, str, str]:
        pack = self.vbox.systemProperties.defaultVRDEExtPack
        return (bool(pack), 'remote desktop server' + (' (%s)' % pack if pack else ''),
                '' if pack else 'install the extension pack of this version from virtualbox.org: '
                'VBoxManage extpack install FILE; all else works without it')

    # verbs: looking in

    def get_stats(self, job: Job, vm: str, key: str) -> Steps:
        """Collection begins with the first question, which therefore takes 2 s."""
        machine = self.find(vm)
        collector = self.vbox.performanceCollector
        if machine.id not in self._measured:
            collector.setupMetrics(['*'], [machine], 1, 10)
            self._measured.add(machine.id)
        wanted = time.monotonic() + 3
        rows = self._query(collector, machine, key)
        while not rows and time.monotonic() < wanted:
            yield 0.3
            rows = self._query(collector, machine, key)
        return rows

    def _query(self, collector: Any, machine: Any, key: str) -> List[Dict[str, Any]]:
        answer = self.manager.getPerfCollector(self.vbox).query(['*'], [machine])
        return [{'name': row['name'], 'unit': row['unit'],
                 'values': [value / float(row['scale'] or 1) for value in row['values']]}
                for row in answer if row['values'] and metric_matches(row['name'], key)]

    def get_log(self, job: Job, vm: str, tail: int) -> str:
        path = self.find(vm).queryLogFilename(0)
        try:
            with open(path, 'rb') as log_file:
                size = log_file.seek(0, os.SEEK_END)
                log_file.seek(max(0, size - max(0, tail)))
                return log_file.read(max(0, tail)).decode('utf-8', 'replace')
        except FileNotFoundError:
            return ''                               # it never ran

    def screenshot(self, job: Job, vm: str) -> Steps:
        machine = yield from self.ready(job, vm, 'screenshot')
        session = yield from self.lock(job, machine)
        try:
            while True:
                try:
                    return self._shoot(session.console.display)
                except Exception as error:          # none yet, just after the start
                    if self._code(error) != NOT_SUPPORTED:
                        raise
                    job.check_deadline(self.translate(error))
                yield 0.2
        finally:
            self.unlock(session)

    def _shoot(self, display: Any) -> str:
        width, height = display.getScreenResolution(0)[:2]
        png = display.takeScreenShotToArray(0, width or 640, height or 480,
                                            self.const('BitmapFormat_PNG'))
        return base64.b64encode(bytes(bytearray(png))).decode()

    # verbs: limits and remote desktop

    def set_limits(self, job: Job, vm: str, limits: Dict[str, Any]) -> Steps:
        wish = read_limits(limits)
        machine = yield from self.ready(job, vm, 'set_limits')
        yield from self.edit(job, machine, lambda mutable: self._limit(mutable, wish))
        return True

    def _limit(self, machine: Any, limits: Dict[str, Any]) -> None:
        if 'cpuPercent' in limits:
            machine.CPUExecutionCap = limits['cpuPercent']
        if 'netKBps' in limits:
            self._limit_rate(machine, limits['netKBps'] * 1024)
        if 'network' in limits:
            for card in self.cards(machine):
                card.cableConnected = limits['network']

    def _limit_rate(self, machine: Any, rate: int) -> None:
        """The rate can be altered while the VM runs; which cards it is of, can not."""
        control = machine.bandwidthControl
        groups = {group.name: group for group in self.array(control, 'allBandwidthGroups')}
        cards = [card for card in self.cards(machine) if rate and not self._is_limited(card)]
        if cards and self.state_of(machine) in ONLINE:
            raise BadState('the first netKBps of a VM, or of a new card, can only be set while it is off')
        if BANDWIDTH_GROUP in groups:
            groups[BANDWIDTH_GROUP].maxBytesPerSec = rate
        elif cards:
            control.createBandwidthGroup(BANDWIDTH_GROUP, self.const('BandwidthGroupType_Network'), rate)
        for card in cards:
            card.bandwidthGroup = control.getBandwidthGroup(BANDWIDTH_GROUP)

    def _is_limited(self, card: Any) -> bool:
        group = card.bandwidthGroup
        return group is not None and group.name == BANDWIDTH_GROUP

    def remote_desktop(self, job: Job, vm: str, enable: bool, options: Dict[str, Any]
                       ) -> Steps:
        wish = self._desktop_wish(options)
        machine = self.find(vm)
        if enable and not self.vbox.systemProperties.defaultVRDEExtPack:
            raise NotSupported('VirtualBox has no remote desktop server: install its extension '
                               'pack (VBoxManage extpack install …)')
        yield from self.own(job, machine)
        yield from self.settled(job, machine)
        if enable:
            check_desktop_address(wish['address'])
            wish['port'] = wish['port'] or self._free_desktop_port(machine, wish['address'])
        yield from self.edit(job, machine,
                             lambda mutable: self._switch_desktop(mutable, enable, wish))
        return self._desktop_of(machine)

    def _desktop_wish(self, options: Dict[str, Any]) -> Dict[str, Any]:
        """[RemoteDesktop], and the options over it, checked."""
        wish = dict(self.desktop, port=0)
        del wish['ports']
        unknown = set(options) - set(wish)
        if unknown:
            raise InvalidParams('remoteDesktop knows no option %s; it knows %s' % (
                ', '.join(sorted(unknown)), ', '.join(sorted(wish))))
        wish.update(options)
        wish['port'] = read_option('port', wish['port'], agent.integer(0, 65535))
        for key, known in (('auth', self._auth_types()), ('security', DESKTOP_SECURITY)):
            if str(wish[key]).lower() not in known:
                raise InvalidParams('%s is %s, not %r' % (key, either(sorted(known)), wish[key]))
        wish['security'] = DESKTOP_SECURITY[str(wish['security']).lower()]
        return wish

    def _switch_desktop(self, machine: Any, enable: bool, wish: Dict[str, Any]) -> None:
        server = machine.VRDEServer
        if enable:
            server.authType = self._auth_types()[str(wish['auth']).lower()]
            server.setVRDEProperty('TCP/Address', str(wish['address']))
            server.setVRDEProperty('TCP/Ports', str(wish['port']))
            server.setVRDEProperty('Security/Method', wish['security'])
        server.enabled = enable

    def _auth_types(self) -> Dict[str, int]:
        names = self.manager.constants.all_values('AuthType')
        return {name.lower(): code for name, code in names.items()}

    def _free_desktop_port(self, machine: Any, address: str) -> int:
        taken = {self._desktop_of(each)['port'] for each in self.machines_now()
                 if each.id != machine.id and each.VRDEServer.enabled}
        return self._free_port(self.desktop['ports'], address, taken)

    def _free_port(self, ports: str, address: str, taken: set) -> int:
        low, _, high = ports.partition('-')
        for port in range(int(low), int(high) + 1):
            if port not in taken and port_is_free(address, port):
                return port
        raise HypervisorError('no port of %s is free on %s' % (ports, address))

    def _desktop_of(self, machine: Any) -> Dict[str, Any]:
        server = machine.VRDEServer
        port = re.split(r'\D', server.getVRDEProperty('TCP/Ports') or '')[0]
        auth = {code: name for name, code in self._auth_types().items()}
        return {'enabled': bool(server.enabled), 'port': int(port or 0),
                'address': server.getVRDEProperty('TCP/Address') or '',
                'auth': auth.get(server.authType, ''),
                'security': server.getVRDEProperty('Security/Method') or ''}

    # NAT: the guest's Chirp port on our loopback

    def chirp_endpoint(self, job: Job, vm: str) -> Steps:
        machine = self.find(vm)
        rule = self._chirp_rule(self.card_of(machine))
        if not rule:
            yield from self.own(job, machine)
            yield from self.settled(job, machine)
            yield from self.edit(job, machine, self.forward_chirp)
            rule = self._chirp_rule(self.card_of(machine))
        if not rule:
            raise HypervisorError('%s has no NAT card: its Chirp port can not be reached'
                                  % machine.name)
        return [rule[2], int(rule[3])]

    def _chirp_rule(self, card: Any) -> Optional[List[str]]:
        """name, protocol, host address, host port, guest address, guest port."""
        if card is None or card.attachmentType != self.const('NetworkAttachmentType_NAT'):
            return None
        for row in self.array(card.NATEngine, 'redirects'):
            rule = row.split(',')
            if rule[0] == CHIRP_RULE and rule[5] == str(self.chirp_port):
                return rule
        return None

    def forward_chirp(self, machine: Any) -> None:
        """Give the VM what NAT mode needs; `machine` is a session's mutable one."""
        card = self.card_of(machine)
        if card is None or card.attachmentType != self.const('NetworkAttachmentType_NAT'):
            return
        engine = card.NATEngine
        rule = self._chirp_rule(card)
        if self.state_of(machine) in OFF:
            self._reach_localhost(engine)
            if rule and not port_is_free(rule[2], int(rule[3])):
                rule = None                         # meanwhile, another program listens there
        if rule:
            return
        names = [row.split(',')[0] for row in self.array(engine, 'redirects')]
        if CHIRP_RULE in names:
            engine.removeRedirect(CHIRP_RULE)
        engine.addRedirect(CHIRP_RULE, self.const('NATProtocol_TCP'), '127.0.0.1',
                           self._free_forward_port(), '', self.chirp_port)

    def _reach_localhost(self, engine: Any) -> None:
        if self.api() >= (7, 0):                    # before, it could always be reached
            engine.localhostReachable = True

    def _free_forward_port(self) -> int:
        taken = {int(row.split(',')[3]) for machine in self.machines_now()
                 for card in self.cards(machine)
                 for row in self.array(card.NATEngine, 'redirects')}
        while True:
            with socket.socket() as probe:
                probe.bind(('127.0.0.1', 0))
                port = probe.getsockname()[1]
            if port not in taken:
                return port

    def api(self) -> Tuple[int, int]:
        """Version of the API: some calls' arguments differ."""
        major, minor = self.vbox.APIVersion.split('_')[:2]
        return int(major), int(minor)


# Plain helpers.

def fault_of(code: int, text: str) -> VMHostError:
    """VirtualBox's code and text as an error of ours."""
    if any(word in text for word in NO_DRIVER) or (
            'unexpectedly during startup' in text and not module_line()[0]):
        text += ' -- ' + MEND_DRIVER
    return FAULT_OF_CODE.get(code, HypervisorError)('%s (VirtualBox 0x%08x)'
                                                    % (' '.join(text.split()), code))


def error_text(info: Any) -> str:
    """The text of an IVirtualBoxErrorInfo and of those chained to it."""
    texts = []
    while info is not None:
        if info.text:
            texts.append(info.text)
        info = info.next
    return '; '.join(texts) or 'no reason given'


def progress_of(answer: Any) -> Any:
    """Methods with a Progress and further results answer with a tuple, Progress first or last."""
    if not isinstance(answer, (tuple, list)):
        return answer
    return next(part for part in answer if hasattr(part, 'completed'))


def colons(mac: str) -> str:
    """080027AABBCC as 08:00:27:AA:BB:CC."""
    return ':'.join(mac[at:at + 2] for at in range(0, len(mac), 2)).upper()


def either(names: Any) -> str:
    names = list(names)
    return names[0] if len(names) == 1 else ', '.join(names[:-1]) + ' or ' + names[-1]


def metric_matches(name: str, key: str) -> bool:
    """`*` means all but the averages, minima and maxima, which have a colon in their name."""
    return fnmatch.fnmatchcase(name, key or '*') and (':' in key or ':' not in name)


def port_is_free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def wishes(options: Dict[str, Any]) -> Dict[str, Any]:
    """createVM's options, checked; None or '' where nothing was asked for."""
    wish = {'memory': None, 'cpus': None, 'ostype': '', 'network': '', 'diskSize': None,
            'keep': False}  # type: Dict[str, Any]
    unknown = set(options) - set(wish)
    if unknown:
        raise InvalidParams('createVM knows no option %s; it knows %s' % (
            ', '.join(sorted(unknown)), ', '.join(sorted(wish))))
    wish.update(options)
    for name, least in (('memory', 4), ('cpus', 1), ('diskSize', 0)):
        if wish[name] is not None:
            wish[name] = read_option(name, wish[name], agent.integer(least, LARGEST))
    wish['keep'] = read_option('keep', wish['keep'], agent.yes_no)
    if wish['network'] not in ('', 'hostonly', 'nat', 'none'):
        raise InvalidParams('network is hostonly, nat or none, not %r' % wish['network'])
    return wish


def unfinished() -> str:
    """The note of a disk that is about to be made. Two seconds are what some file systems' clocks are off."""
    return DISK_UNFINISHED + '%d' % (time.time() - 2)


def is_recent(location: str, note: str) -> bool:
    """Whether there is a file, and none that is older than what was noted as unfinished."""
    try:
        written = os.path.getmtime(location)
    except OSError:
        return False
    return not note.startswith(DISK_UNFINISHED) or written >= int(note[len(DISK_UNFINISHED):])


def is_noted(disk: Any, note: str) -> bool:
    """Whether the disk is the one that this note of ours is about."""
    if note.startswith(DISK_UNFINISHED):
        return is_recent(disk.location, note)
    return bool(disk.id == note)


def has_mark(machine: Any, key: str) -> bool:
    """Whether the VM itself has this mark of ours, and not just one that it was cloned from."""
    return bool(machine.getExtraData(key) == machine.id)


def names_its_own_mark(settings: str) -> bool:
    """has_mark of MADE_BY_US, from the text of a .vbox file."""
    uuid = re.search(r'<Machine\b[^>]*\suuid="{(.+?)}"', settings)
    return uuid is not None and 'name="%s" value="%s"' % (MADE_BY_US, uuid.group(1)) in settings


def check_fitting(options: Dict[str, Any], kind: str) -> None:
    """Options that would change nothing, since the image decides, are refused rather than forgotten."""
    if kind in ('', '.iso'):
        return
    decided = {'.vbox': tuple(options), '.ova': ('diskSize', 'ostype'), '.ovf': ('diskSize', 'ostype')}
    for name in decided.get(kind, ('diskSize',)):
        if options.get(name) not in (None, ''):
            raise InvalidParams('%s is no option where a VM is made from a %s file, which decides it'
                                % (name, kind))


def read_option(name: str, value: Any, kind: Callable[[str], Any]) -> Any:
    """An option's value, as a client sent it. Raises InvalidParams, which names it and says what it is."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)                          # as some clients send numbers
    try:
        return kind(str(value))
    except ValueError as error:
        raise InvalidParams('%s is %s, not %r' % (name, error, value))


def read_limits(limits: Dict[str, Any]) -> Dict[str, Any]:
    """setLimits' limits, checked."""
    kinds = {'cpuPercent': agent.integer(1, 100), 'netKBps': agent.integer(0, LARGEST),
             'network': agent.yes_no}  # type: Dict[str, Callable[[str], Any]]
    unknown = set(limits) - set(kinds)
    if unknown:
        raise InvalidParams('no limit is called ' + ', '.join(sorted(unknown)))
    return {name: read_option(name, value, kinds[name]) for name, value in limits.items()}


def check_desktop_address(address: Any) -> None:
    """VirtualBox takes any text, and then listens nowhere, or everywhere."""
    try:
        known = is_local(str(ipaddress.IPv4Address(str(address))))
    except ValueError:
        known = False
    if not known:
        raise InvalidParams('address is an IPv4 address of this machine, not %r' % address)


def remove_leavings(folder: str) -> None:
    """Settings of an unregistered VM of ours whose disk has gone; and the folder, once empty."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.endswith(('.vbox', '.vbox-prev')):
            with open(path, encoding='utf-8', errors='replace') as settings:
                ours = names_its_own_mark(settings.read())
            if ours:
                os.remove(path)
    if not os.listdir(folder):
        os.rmdir(folder)


def address_problem(network: Dict[str, Any]) -> str:
    """What is wrong with the addresses of [Network], '' when nothing is."""
    try:
        net = ipaddress.ip_network('%s/%s' % (network['host_ip'], network['netmask']), False)
        for key in ('dhcp_server', 'dhcp_lower', 'dhcp_upper'):
            if ipaddress.ip_address(network[key]) not in net:
                return '[Network] %s=%s is not in the network %s' % (key, network[key], net)
        lower, upper, host = (int(ipaddress.ip_address(network[key]))
                              for key in ('dhcp_lower', 'dhcp_upper', 'host_ip'))
    except ValueError as error:
        return '[Network]: %s' % error
    if lower > upper:
        return '[Network] dhcp_lower is above dhcp_upper'
    if lower <= host <= upper:
        return '[Network] host_ip is among the addresses that DHCP gives away'
    return ''


def range_problem(host_ip: str, path: str = '/etc/vbox/networks.conf') -> str:
    """On Linux, macOS and Solaris, VirtualBox allows host-only addresses in some ranges alone."""
    if sys.platform == 'win32':
        return ''
    ranges = allowed_ranges(path)
    if any(ipaddress.ip_address(host_ip) in each for each in ranges):
        return ''
    return ('VirtualBox does not allow the address %s for a host-only network, but %s: take one of '
            'these, or add a line `* RANGE/BITS` to %s'
            % (host_ip, ', '.join(str(each) for each in ranges) or 'none', path))


def allowed_ranges(path: str) -> List[Any]:
    try:
        with open(path) as conf:
            lines = [line.split() for line in conf]
    except OSError:
        return [ipaddress.ip_network('192.168.56.0/21')]
    words = [word for line in lines if line[:1] == ['*'] for word in line[1:]]
    return [ipaddress.ip_network(word, False) for word in words if ':' not in word]


def is_local(address: str) -> bool:
    """Has this machine the address?"""
    return port_is_free(address, 0)


def version_line(version: str, api: Tuple[int, int]) -> Tuple[bool, str, str]:
    recent = api >= OLDEST
    return (recent, 'VirtualBox ' + version,
            '' if recent else 'too old: %d.%d or later is needed' % OLDEST)


def module_line() -> Tuple[bool, str, str]:
    """Whether the kernel has VirtualBox's driver; known on Linux alone."""
    there = not sys.platform.startswith('linux') or os.path.exists('/dev/vboxdrv')
    return there, 'kernel module vboxdrv', '' if there else MEND_DRIVER
