"""VirtualBox's connection: the manager and every COM object, errors, finding VMs, waiting for them, locks.

What it is not: it does nothing with a VM; that is done by the classes in virtualbox.py, vboximages.py and
vboxnetwork.py, all of which use one `Connection`. One thread, no locks of threads.
"""

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import agent
from faults import (
    BadState,
    Busy,
    DeadlineExceeded,
    HypervisorError,
    InvalidParams,
    NoSuchVM,
    NotSupported,
    VMHostError,
)
from hypervisor import NOT_READY, ConnectionLost, Job, either, spoken
from protocol import is_mac

log = logging.getLogger('vmhost.virtualbox')

# Extra-data keys of VMs. The value is the VM's uuid: VirtualBox copies extra data into clones, which aren't
# ours.
MADE_BY_US = 'vmhost/made'         # createVM made it
MAKING = 'vmhost/making'           # still being made; left behind by a host that died meanwhile
KEEP = 'vmhost/keep'               # cleanup leaves it alone

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
# Verbs after which VirtualBox writes the VM's settings, and how much room it is to have for that, in bytes.
WRITES_SETTINGS = ('start', 'save_state', 'discard_state', 'take_snapshot', 'delete_snapshot',
                   'restore_snapshot', 'set_limits')
ROOM = 1 << 20
NO_ROOM = 'the disk of %s is full, and VirtualBox left nothing of the VM\'s settings: %s'
ENDED = '%s is %s, and not %s: its process ended; getLog should tell why'       # instead of these states
UNREADABLE = 'VirtualBox can\'t read %s: %s; `rm` takes it out of VirtualBox, and leaves its files'
STALL = 600                        # seconds without any progress after which a job is given up

# Status codes of the API (VirtualBox.xidl, "Result codes"; the last ones are COM's own).
OBJECT_NOT_FOUND = 0x80bb0001
INVALID_VM_STATE = 0x80bb0002
NOT_SUPPORTED = 0x80bb0009
INVALID_OBJECT_STATE = 0x80bb0007
INVALID_SESSION_STATE = 0x80bb000b
OBJECT_IN_USE = 0x80bb000c
ACCESS_DENIED = 0x80070005
INVALID_ARGUMENT = 0x80070057
NOT_IMPLEMENTED = 0x80004001
FAULT_OF_CODE = {
    INVALID_VM_STATE: BadState,
    NOT_SUPPORTED: NotSupported,
    NOT_IMPLEMENTED: NotSupported,
    INVALID_OBJECT_STATE: BadState,
    INVALID_SESSION_STATE: Busy,
    OBJECT_IN_USE: Busy,
    ACCESS_DENIED: Busy,               # as VirtualBox uses it: to an object, not to a person
}  # type: Dict[int, Any]
LOCKED = (INVALID_OBJECT_STATE, INVALID_SESSION_STATE, OBJECT_IN_USE)      # by somebody else
DEAD = (0x80004004, 0x800706be, 0x800706ba, 0x80010108,    # abort, call failed, RPC down, gone
        0x800706bf, 0x800706b5, 0x80010007, 0x80010012, 0x800401fd)    # what Windows says of it as well
CALL_AGAIN = (0x80010001, 0x8001010a)          # Windows: the server is busy, and has done nothing
FAULT_OF_CODE.update((code, Busy) for code in CALL_AGAIN)

PROGRAMS = ('VBoxHeadless', 'VirtualBoxVM', 'VirtualBox')       # in which VMs run
SOURCE = re.compile(r'\.?\s+\S+\.cpp\[\d+\] \(.*\)$', re.DOTALL)    # where VirtualBox's code found an error
# What VirtualBox says of more memory or processors than it gives a VM.
BEYOND = re.compile(r'Invalid (RAM size|virtual CPU count): (\d+)(?: MB)? '
                    r'\(must be in range \[(\d+), (\d+)\](?: MB)?\)')
NO_MORE_TOLD = re.compile(r'Code \w+ \(0x[0-9a-f]{8}\) - (.*?) \(extended info not available\)')
NO_DRIVER = ('VERR_VM_DRIVER', 'rc=-1908', 'VERR_SUPDRV', 'vboxdrv')
MEND_DRIVER = ('the kernel module vboxdrv is not loaded: install the kernel headers, then run '
               '/sbin/vboxconfig (Debian: dpkg-reconfigure virtualbox-dkms), and with Secure Boot '
               'enrol its key')
NO_FRAMEWORK = ('macOS lets no VM have the processor (sysctl kern.hv_support): a Mac of before 2010 cannot; '
                'where macOS itself is a VM, switch on nested virtualisation there')


class Connection:
    """The manager and every COM object: connecting, errors, finding VMs, waiting for their states, locks."""

    def __init__(self, settings: Dict[str, Any], connect: Callable[[], Any]) -> None:
        self.network = settings['network']
        self.desktop = settings['remote_desktop']
        self.chirp_port = settings['chirp_port']
        self.timeout = settings['command_timeout']
        self.broker_hint = settings.get('broker_hint', '')
        self._connect = connect
        self.manager = None  # type: Any
        self.vbox = None  # type: Any
        self.states = {}  # type: Dict[int, str]
        self._listener = None  # type: Any

    def connect(self) -> bool:
        """True where it was done only now.

        A VBoxSVC that has just died can take 10 s to make room for the next one: the VMs' processes hold its
        socket until they notice.
        """
        if self.vbox is not None:
            if not self.answers():
                raise ConnectionLost('VirtualBox (VBoxSVC) died')
            return False
        self.manager = self._connect()
        why = ''
        try:
            self.vbox = self.manager.getVirtualBox()
        except Exception as error:
            why = str(error)
        if self.vbox is None:
            self.manager = None
            raise ConnectionLost('VirtualBox does not answer: VBoxSVC could not be started. ' + why)
        names = self.manager.constants.all_values('MachineState')
        self.states = {code: name for name, code in names.items()
                       if not name.startswith(('First', 'Last'))}
        return True

    def disconnect(self) -> None:
        self.vbox = self.manager = self._listener = None

    def answers(self) -> bool:
        """Whether VBoxSVC does."""
        try:
            return self.vbox.revision is not None
        except Exception as error:
            log.debug('VBoxSVC does not answer: %s', error)
            return False

    def has_news(self) -> Optional[bool]:
        """Whether VirtualBox told an event since this was asked last, as it does of every change; None
        where it tells none."""
        self.manager.waitForEvents(0)
        source = self.vbox.eventSource
        try:
            if self._listener is None:
                listener = source.createListener()
                source.registerListener(listener, [self.const('VBoxEventType_Any')], False)
                self._listener = listener
                return True
            news = False
            while True:
                event = source.getEvent(self._listener, 0)
                if event is None:
                    return news
                source.eventProcessed(self._listener, event)
                news = True
        except Exception as error:
            if self.is_dead(error):
                raise
            log.debug('no events of VirtualBox: %s', error)
            self._listener = None                   # it forgets a listener that was silent for long
            return None

    def array(self, thing: Any, name: str) -> List[Any]:
        return list(self.manager.getArray(thing, name) or [])

    def const(self, name: str) -> int:
        return getattr(self.manager.constants, name)

    def api(self) -> Tuple[int, int]:
        """Version of the API: some calls' arguments differ."""
        major, minor = self.vbox.APIVersion.split('_')[:2]
        return int(major), int(minor)

    # Errors.

    def code(self, error: Exception) -> int:
        """COM's status code, 0 for other errors: of an OSError, too, vboxapi's XPCOM would give the errno."""
        if self.manager is None or not self.manager.xcptIsOurXcptKind(error):
            return 0
        return int(self.manager.xcptGetStatus(error)) & 0xffffffff

    def is_dead(self, error: Exception) -> bool:
        return self.code(error) in DEAD or self.vbox is None

    def is_not_ready(self, error: Exception) -> bool:
        """VirtualBox refuses access to an object that it is still making, or about to end ("The object is
        not ready"): seen of a VM that another call was importing."""
        return self.code(error) == ACCESS_DENIED

    def translate(self, error: Exception) -> VMHostError:
        """VirtualBox's error as ours, with its text and code."""
        if isinstance(error, OSError):              # of ours: a file that can't be read, a full disk
            return HypervisorError(agent.sentence(error))
        code = self.code(error)
        if not code:
            return error if isinstance(error, VMHostError) else HypervisorError(
                '%s: %s' % (type(error).__name__, error))
        text = self.manager.xcptGetMessage(error) or str(error)
        return fault_of(code, text)

    def finish(self, job: Job, progress: Any, text: str) -> None:
        """Waits for a Progress of VirtualBox's, and raises what it failed with."""
        last, changed = -1, time.monotonic()
        while not progress.completed:
            percent = min(100, progress.percent)
            job.report(percent, text)
            if percent != last:
                last, changed = percent, time.monotonic()
            elif time.monotonic() - changed > max(STALL, self.timeout):
                raise DeadlineExceeded('%s: no progress for %d s, at %d%%; VirtualBox goes on '
                                       'with it' % (text, STALL, percent))
            job.wait(0.05)
        job.renew_deadline()
        code = progress.resultCode & 0xffffffff
        if code:
            raise fault_of(code, error_text(progress.errorInfo))

    def finish_in_process(self, job: Job, progress: Any, text: str) -> None:
        """Like finish, for a Progress that lives in the VM's process, and may end with it."""
        try:
            self.finish(job, progress, text)
        except Exception as error:
            if not self.is_dead(error) or not self.answers():
                raise

    # Finding.

    def find(self, vm: str) -> Any:
        """The IMachine of this name, id or uuid. Raises BadState where VirtualBox can't read it."""
        machine = self.find_any(vm)
        if not machine.accessible:
            raise BadState(UNREADABLE % (vm, access_trouble(machine)))
        return machine

    def find_any(self, vm: str) -> Any:
        """As find, of machines that VirtualBox can't read, too."""
        wanted = str(vm)
        if is_mac(wanted):
            for machine in self.machines_now():
                if self.id_of(machine) == wanted.upper():
                    return machine
        try:
            found = self.vbox.findMachine(wanted)
        except Exception as error:
            if self.code(error) != OBJECT_NOT_FOUND:
                raise
        else:
            return self._named_so(wanted, found)
        for machine in self.unreadable():
            if name_in_path(machine) == wanted:
                return machine
        for machine in self.machines_now():         # a name that looks like a uuid
            if machine.name == wanted:
                return machine
        raise NoSuchVM('no VM has the name, id or uuid %r' % wanted)

    def _named_so(self, wanted: str, found: Any) -> Any:
        """What VirtualBox found by a word; where that is a uuid in braces or capitals, it forgets the VM that
        is called so."""
        if wanted == found.id or self.if_there(lambda each: each.accessible and each.name == wanted, found):
            return found
        return next((each for each in self.machines_now() if each.name == wanted), found)

    def machines_now(self) -> List[Any]:
        """All machines that are there, and whose settings VirtualBox can read."""
        return [machine for machine in self.array(self.vbox, 'machines') if self.if_there(
            lambda each: each.accessible and self.state_of(each), machine)]

    def unreadable(self) -> List[Any]:
        """All machines whose settings VirtualBox can't read."""
        return [machine for machine in self.array(self.vbox, 'machines')
                if self.if_there(lambda each: not each.accessible, machine)]

    def if_there(self, read: Callable[[Any], Any], machine: Any) -> Any:
        """What `read` gives; None of a machine that isn't ready: nobody could mean it yet, or any more."""
        try:
            return read(machine)
        except Exception as error:
            if not self.is_not_ready(error):
                raise
            return None

    def state_of(self, machine: Any) -> str:
        return self.states.get(machine.state, 'Unknown%s' % machine.state)

    def cards(self, machine: Any) -> Iterator[Any]:
        """The network cards in use."""
        for slot in range(8):
            card = machine.getNetworkAdapter(slot)
            if card.enabled:
                yield card

    def card_of(self, machine: Any) -> Any:
        """The card whose MAC is the VM's id: host-only or NAT by the mode, else the first."""
        names = (('NAT', 'NATNetwork') if self.network['mode'] == 'nat' else ('HostOnly', 'HostOnlyNetwork'))
        kinds = self.attachments(*names)
        first = None
        for card in self.cards(machine):            # mostly the first one: each look takes its time
            if card.attachmentType in kinds:
                return card
            first = first or card
        return first

    def attachments(self, *names: str) -> List[int]:
        """The codes of these kinds of attachment of a card, as far as this VirtualBox has them."""
        known = self.manager.constants.all_values('NetworkAttachmentType')
        return [known[name] for name in names if name in known]

    def id_of(self, machine: Any) -> str:
        card = self.card_of(machine)
        return colons(card.MACAddress) if card else ''

    # Waiting for a VM.

    def ready(self, job: Job, vm: str, verb: str) -> Any:
        """Finds and checks the VM: it is in a state in which `verb` makes sense. One that VirtualBox is just
        making, or about to end, gets a moment."""
        until = time.monotonic() + NOT_READY
        while True:
            try:
                machine = self.find(vm)
                check_fits(verb, machine.name, self.settled(job, machine), machine.settingsFilePath)
                return machine
            except Exception as error:
                if not self.is_not_ready(error) or time.monotonic() > until:
                    raise
            job.wait(0.05)

    def settled(self, job: Job, machine: Any) -> str:
        """Waits while the VM is on its way from one state to another."""
        first = self.const('MachineState_FirstTransient')
        on_its_way = self.const('SessionState_Spawning'), self.const('SessionState_Unlocking')
        while first <= machine.state or machine.sessionState in on_its_way:
            job.check_deadline(Busy('%s is still %s%s' % (
                machine.name, self.state_of(machine), self._nobody_at_work(machine))))
            job.wait(0.05)
        return self.state_of(machine)

    def _nobody_at_work(self, machine: Any) -> str:
        if machine.sessionState != self.const('SessionState_Unlocked'):
            return '; `stop --force` ends its process'
        return (', and no process works at it: VirtualBox lost track. End VBoxSVC when no VM runs, or '
                'restart the machine; nothing on its disks is lost')

    def reached(self, job: Job, machine: Any, *states: str) -> None:
        """Waits until the VM is in one of these states and nobody is about to let it go. Raises
        HypervisorError where it has ended instead."""
        now = self.state_of(machine)
        while now not in states:
            if now in OFF + SAVED:
                raise HypervisorError(ENDED % (machine.name, now, either(states)))
            job.check_deadline(DeadlineExceeded('%s is %s, and not yet %s after %d s' % (
                machine.name, now, either(states), self.timeout)))
            job.wait(0.05)
            now = self.state_of(machine)
        self.settled(job, machine)

    def disks_of(self, machine: Any) -> List[str]:
        """The paths of all that lies in its drives, and of the disks on which these lie."""
        paths = []
        for place in self.array(machine, 'mediumAttachments'):
            medium = place.medium
            while medium is not None:
                paths.append(medium.location)
                medium = medium.parent
        return paths

    # Locks.

    def lock(self, job: Job, machine: Any) -> Any:
        """A session that holds the VM's lock: shared with its process where it runs."""
        session = self.manager.getSessionObject()

        def take() -> Any:
            online = self.state_of(machine) in ONLINE
            machine.lockMachine(session, self.const('LockType_Shared' if online else 'LockType_Write'))
            return session
        return self.when_unlocked(job, machine, take)

    def when_unlocked(self, job: Job, machine: Any, take: Callable[[], Any]) -> Any:
        """What `take` gives, once nobody else holds the VM's lock, as Job.when_free."""
        def held(error: Exception) -> str:
            return str(self.translate(error)) if self.code(error) in LOCKED else ''
        return job.when_free(take, held, machine.name)

    def unlock(self, session: Any) -> None:
        """Lets go; a VM process that has ended has done so already."""
        try:
            if session.state == self.const('SessionState_Locked'):
                session.unlockMachine()
        except Exception as error:
            log.debug('unlocking: %s', error)

    @contextlib.contextmanager
    def locked(self, job: Job, machine: Any) -> Iterator[Any]:
        """The session, for as long as it holds the VM's lock."""
        session = self.lock(job, machine)
        try:
            yield session
        finally:
            self.unlock(session)

    def tell_console(self, job: Job, machine: Any, act: Callable[[Any], Any], text: str = '') -> None:
        """Does `act` with the VM's console, and waits for its Progress if it gives one."""
        with self.locked(job, machine) as session:
            console = session.console
            if console is None:
                raise BadState('%s is %s' % (machine.name, self.state_of(machine)))
            progress = act(console)
            if progress is not None:
                self.finish_in_process(job, progress, text)

    def edit(self, job: Job, machine: Any, change: Callable[[Any], None]) -> None:
        """Changes settings through a session's mutable machine, and saves them: all or nothing."""
        check_room(machine.name, machine.settingsFilePath)
        with self.locked(job, machine) as session:
            try:
                change(session.machine)
                session.machine.saveSettings()
            except Exception:
                with contextlib.suppress(Exception):
                    session.machine.discardSettings()
                raise


def check_fits(verb: str, vm: str, state: str, settings: str) -> None:
    """Raises BadState where the verb makes no sense in this state, HypervisorError where there is no room."""
    if state not in ACCEPTABLE[verb]:
        raise BadState('%s is %s; %s needs it to be %s' % (
            vm, state, spoken(verb), either(ACCEPTABLE[verb])))
    if verb in WRITES_SETTINGS:
        check_room(vm, settings)


def check_disks(vm: str, paths: List[str], what: str = 'start') -> None:
    """Raises BadState where a disk is missing of a VM that is to start, or to do something else: VirtualBox
    names the first of many errors, or none."""
    for path in paths:
        if path and os.path.isabs(path) and not os.path.exists(path):
            raise BadState('%s can\'t %s: its disk %s is missing; put it back, or detach it '
                           '(VBoxManage storageattach … --medium none)' % (vm, what, path))


def check_room(vm: str, settings: str) -> None:
    """Raises HypervisorError where there is none for a VM's settings.

    Seen with 7.2: on a full disk VirtualBox says that all went well, leaves an empty file, and forgets the
    VM's disks.
    """
    with contextlib.suppress(OSError):              # there is no such folder: VirtualBox says so
        if shutil.disk_usage(os.path.dirname(settings)).free < ROOM:
            raise HypervisorError('%s: the disk of %s is full, and VirtualBox would lose the VM\'s settings: '
                                  'make room first' % (vm, settings))


def put_back_settings(job: Job, settings: str) -> None:
    """After a VM was stopped, which has to be possible on a full disk, too: has it keep its settings.

    Seen with 7.2: VirtualBox leaves an empty file there, and what was in it beside, as .vbox-prev. It knows
    the settings itself until VBoxSVC ends; then the VM can't be read.
    """
    if is_whole(settings) or not is_whole(settings + '-prev'):
        return
    try:
        os.link(settings + '-prev', settings + '-back')       # which takes no room
        os.replace(settings + '-back', settings)
        job.tell_trouble(NO_ROOM % (settings, 'those of before were put back; make room'))
    except OSError as error:
        job.tell_trouble(NO_ROOM % (settings, 'those of before are in %s-prev (%s); make room, and put them '
                                    'back' % (settings, agent.sentence(error))))


def is_whole(settings: str) -> bool:
    """Whether this is a .vbox file to its end."""
    with contextlib.suppress(OSError), open(settings, 'rb') as file:
        return b'</VirtualBox>' in file.read()
    return False


def fault_of(code: int, text: str) -> VMHostError:
    """VirtualBox's code, 0 where there is none, and text as an error of ours."""
    if any(word in text for word in NO_DRIVER) or (
            'unexpectedly during startup' in text and lacks_module()):
        text += ' -- ' + MEND_DRIVER
    text = NO_MORE_TOLD.sub(r'\1', SOURCE.sub('', text))
    if code in DEAD or re.search('NS_ERROR_ABORT|Operation aborted', text):
        text += ' -- the VM\'s process ended meanwhile, or VirtualBox did'
    if 'VERR_DISK_FULL' in text:
        path = re.search('\'(/.*?|[A-Za-z]:.*?)\'', text)
        text += ' -- the disk%s is full: make room' % (' of ' + path.group(1) if path is not None else '')
    if code == ACCESS_DENIED and 'not ready' in text:
        text += ' -- VirtualBox is about to make it, or to end it'
    beyond = BEYOND.search(text)
    if beyond is not None:
        what, given, least, most = beyond.groups()
        return InvalidParams('%s is a whole number from %s to %s in this VirtualBox, not %s' % (
            'memory' if what == 'RAM size' else 'cpus', least, most, given))
    told = ' (VirtualBox 0x%08x)' % code if code else ''
    return FAULT_OF_CODE.get(code, HypervisorError)(' '.join(text.split()) + told)


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


def name_in_path(machine: Any) -> str:
    """The name of a VM that VirtualBox can't read: that of its file."""
    return name_of_file(machine.settingsFilePath)


def name_of_file(path: str) -> str:
    """What a .vbox file is called: its VM's name."""
    return os.path.splitext(os.path.basename(path.replace('\\', '/')))[0]


def access_trouble(machine: Any) -> str:
    """Why VirtualBox can't read a VM."""
    return ' '.join(SOURCE.sub('', error_text(machine.accessError)).split())


def has_mark(machine: Any, key: str) -> bool:
    """Whether the VM itself has this mark of ours, and not just one that it was cloned from."""
    return bool(machine.getExtraData(key) == machine.id)


def kill_process(job: Job, uuid: str) -> bool:
    """As Driver.kill_process: by the list of processes, which is there on Linux alone."""
    pid = process_of(uuid)
    if not pid:
        raise NotSupported('no process can be told to be that of the VM %s' % uuid)
    log.warning('the process %d of the VM %s is killed', pid, uuid)
    os.kill(pid, signal.SIGKILL)
    while process_of(uuid) == pid:
        job.check_deadline(DeadlineExceeded('the process %d was killed, and is still there' % pid))
        job.wait(0.05)
    return True


def process_of(uuid: str) -> int:
    """The process of this user in which the VM runs, as the list of processes tells it; 0 for none."""
    for name in os.listdir('/proc') if sys.platform.startswith('linux') else ():
        with contextlib.suppress(OSError, StopIteration, LookupError, ValueError):
            if name.isdigit() and runs_vm(name, uuid):
                return int(name)
    return 0


def runs_vm(pid: str, uuid: str) -> bool:
    """Whether this process is one of VirtualBox's, and this user's, that was started for the VM. Its folder
    in /proc may be root's, as VirtualBox's programs are set-uid. Raises as `process_of` knows."""
    with open('/proc/%s/cmdline' % pid, 'rb') as file:
        words = file.read().decode('utf-8', 'replace').split('\0')
    if os.path.basename(words[0]) not in PROGRAMS or words[words.index('--startvm') + 1] != uuid:
        return False
    with open('/proc/%s/status' % pid, encoding='utf-8', errors='replace') as file:
        user = next(line.split()[1] for line in file if line.startswith('Uid:'))
    return int(user) == os.getuid()


def lacks_module() -> bool:
    """Whether the kernel lacks VirtualBox's driver; known on Linux alone."""
    return sys.platform.startswith('linux') and not os.path.exists('/dev/vboxdrv')


def system_warnings() -> List[str]:
    """What the log says at start of what VMs need of this system."""
    return ['VMs can\'t be started, all the rest works: ' + mend
            for ok, _, mend, needed in system_lines() if needed and not ok]


def system_lines() -> List[Tuple[bool, str, str, bool]]:
    """What `check` says of what VMs need of this system: nothing where that isn't known."""
    if sys.platform == 'darwin':
        return [framework_line()]
    if not sys.platform.startswith('linux'):
        return []
    lacks = lacks_module()
    return [(not lacks, 'kernel module vboxdrv', MEND_DRIVER if lacks else '', True)]


def framework_line() -> Tuple[bool, str, str, bool]:
    """Whether macOS lets VMs have the processor: its Hypervisor framework (`hvf`), in the place of VT-x."""
    what = 'hardware virtualisation (Hypervisor framework)'
    try:
        has = sysctl('kern.hv_support')
        if sysctl('hw.optional.arm64') == '1':     # where a Python for Intel is told of an Intel processor
            what += ' of Apple silicon: guests are ARM systems, images for Intel do not start'
    except (OSError, subprocess.SubprocessError) as error:
        return (False, what, 'nobody can say: ' + agent.sentence(error), False)
    return (has == '1', what, '' if has == '1' else NO_FRAMEWORK, True)


def sysctl(key: str) -> str:
    """What macOS tells by this name; '' where it knows no such name. Raises OSError, SubprocessError."""
    path = shutil.which('sysctl') or '/usr/sbin/sysctl'        # a PATH may lack sbin
    return subprocess.run([path, '-n', key], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, timeout=10).stdout.decode('utf-8', 'replace').strip()
