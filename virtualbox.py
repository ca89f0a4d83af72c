"""VirtualBox: the driver. The only code that imports vboxapi.

`VirtualBox` is the driver, as hypervisor.py wants it; its verbs are in classes by subject: `Life`,
`Snapshots`, `Images`, `Cleaning`, `Network`, `Cards`, `Desktop`, `Measuring`, `Checks`. All of them use one
`Connection`, which owns vboxapi's manager and every COM object: finding VMs, waiting for states, locks,
errors.

What it is not: a process or a thread. All of it runs on the one thread of a driver's process
(driverserver.py), where importing vboxapi starts COM; no lock is needed.

Seen with 7.2: VBoxSVC is also the hub of XPCOM's messages, so once it has died a client process never finds
the next one, whatever it drops or creates anew. A fresh process does: a process that lost VBoxSVC ends.
"""

import base64
import fnmatch
import gc
import ipaddress
import logging
import os
import platform
import re
import secrets
import sys
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import agent
import hypervisor
import vmstates
from faults import (
    AlreadyExists,
    BadState,
    DeadlineExceeded,
    HypervisorError,
    InvalidParams,
    NotSupported,
    VMHostError,
)
from hypervisor import ConnectionLost, Driver, Job, either, is_local, option, options_over
from vboxconnection import (
    KEEP,
    MADE_BY_US,
    NOT_SUPPORTED,
    OFF,
    ONLINE,
    SAVED,
    Connection,
    access_trouble,
    check_disks,
    has_mark,
    kill_process,
    name_in_path,
    progress_of,
    put_back_settings,
    system_lines,
    system_warnings,
)
from vboximages import LARGEST, Cleaning, Disks, Images
from vboxnetwork import Cards, Network

log = logging.getLogger('vmhost.virtualbox')

BANDWIDTH_GROUP = 'vmhost'
DESKTOP_SECURITY = {'tls': 'TLS', 'rdp': 'RDP', 'negotiate': 'Negotiate'}
SERIAL_KEY = 'VBoxInternal/Devices/%s/0/Config/DmiBoardSerial'     # of the firmware: pcbios or efi
CHASSIS_KEY = 'VBoxInternal/Devices/%s/0/Config/DmiChassisSerial'

STATE_OF_NATIVE = {                # the seam's states; all others are on their way from one to another
    'Running': vmstates.RUNNING, 'DeletingSnapshotOnline': vmstates.RUNNING,
    'Teleporting': vmstates.RUNNING, 'Paused': vmstates.PAUSED, 'Stuck': vmstates.STUCK,
    'Saved': vmstates.SAVED,
    'AbortedSaved': vmstates.SAVED, 'PoweredOff': vmstates.OFF, 'Aborted': vmstates.OFF,
    'Teleported': vmstates.OFF}
OLDEST = (6, 1)                    # of VirtualBox, whose API this code speaks
NOT_FROM_SAVED = (' -- if its saved state is damaged or missing, discardState (discard) gives it up: the VM '
                  'then boots anew from its disks')
STAYS = 1.0                        # seconds that a VM must run before a start or resume is believed
LOG_HEAD = 4096                    # bytes of a VM's log in which its process is told
LOG_TAIL = 65536                   # bytes of a VM's log in which a reason is looked for


class VirtualBox(Driver):
    """The driver: finds each verb in the class of its subject."""
    name = 'VirtualBox'

    def __init__(self, settings: Dict[str, Any], connect: Optional[Callable[[], Any]] = None) -> None:
        super().__init__(settings)
        self._box = box = Connection(settings, connect or import_virtualbox)
        network, disks, desktop = Network(box), Disks(box), Desktop(box)
        cards = Cards(box, network)
        self._parts = [Looking(box, cards, desktop, self._take_a_rest), Life(box, cards), Snapshots(box),
                       Images(box, cards, disks), Cleaning(box, disks), network, cards, desktop,
                       Measuring(box), Checks(box, network)]

    def _take_a_rest(self, moved: bool) -> None:
        self.rest(moved)

    def find_verb(self, name: str) -> Callable[..., Any]:
        found = [getattr(part, name) for part in self._parts if hasattr(part, name)]
        return found[0] if found else super().find_verb(name)

    def connect(self) -> None:
        if self._box.connect():
            disks = Disks(self._box)
            disks.forget_what_never_came(disks.in_the_making())

    def disconnect(self) -> None:
        self._box.disconnect()

    def is_lost(self, error: Exception) -> bool:
        return self._box.is_dead(error) and not self._box.answers()

    def translate(self, error: Exception) -> Exception:
        if self._box.is_not_ready(error):
            return hypervisor.NotReady(str(self._box.translate(error)))
        if not self._box.code(error) and not isinstance(error, OSError):
            log.error('a fault of this program', exc_info=error)
        return self._box.translate(error)

    def has_news(self) -> Optional[bool]:
        return self._box.has_news()


VBOXAPI = ('`python -m pip install .` in its folder sdk\\install or sdk\\installer\\python'
           if agent.ON_WINDOWS else
           'on Debian the package virtualbox, elsewhere `python -m pip install .` in the folder '
           'sdk/installer/python of VirtualBox, or its SDK')


def import_virtualbox() -> Any:
    """A VirtualBoxManager from vboxapi, or HypervisorError that says what is missing."""
    try:
        import vboxapi
    except ImportError as error:
        raise HypervisorError(
            'vboxapi is not installed for Python %s (%s): %s. It comes with VirtualBox: %s'
            % (platform.python_version(), sys.executable, error, VBOXAPI))
    except Exception as error:
        raise HypervisorError('vboxapi can not be imported: %s: %s'
                              % (type(error).__name__, error))
    try:
        if sys.platform == 'win32':
            prepare_com()
        return vboxapi.VirtualBoxManager()
    except ImportError as error:       # on Windows it is imported here alone
        raise HypervisorError('%s: vboxapi needs pywin32 on Windows: %s -m pip install pywin32'
                              % (error, sys.executable))
    except Exception as error:
        raise HypervisorError('vboxapi does not work with this Python %s: %s: %s'
                              % (platform.python_version(), type(error).__name__, error))


GENERATED = 'vmhost-gen_py'    # in the folder for temporary files, where win32com puts modules that it makes
IN_USE = 'in-use'              # a file that is open in a process' own folder there


def prepare_com() -> None:
    """Has pywin32 do on Windows what vboxapi needs, and more processes than one. Raises ImportError.

    vboxapi deletes the modules that win32com has generated, and has them made anew: each process gets a
    folder of its own for them. COM's objects are let go of on the thread that made them: so the collector of
    cycles, which may run on any, doesn't run by itself; the driver's loop calls it (driverserver.py).
    """
    import tempfile

    import win32com
    top = os.path.join(tempfile.gettempdir(), GENERATED)
    remove_unused(top)
    folder = os.path.join(top, str(os.getpid()))
    os.makedirs(folder, exist_ok=True)
    HELD.append(open(os.path.join(folder, IN_USE), 'w'))
    win32com.__gen_path__ = folder
    win32com.gen_py.__path__ = [folder]
    gc.disable()


HELD = []                      # type: List[Any]


def remove_unused(top: str) -> None:
    """Removes folders of processes that have ended: Windows renames none in which a file is open."""
    import shutil
    for name in os.listdir(top) if os.path.isdir(top) else ():
        path = os.path.join(top, name)
        try:
            os.rename(path, path + '.gone')
            shutil.rmtree(path + '.gone')
        except OSError as error:
            log.debug('%s stays: %s', path, error)


# --- what there is -----------------------------------------------------------------------------

class Looking:
    """What there is, and how each VM is."""

    def __init__(self, box: Connection, cards: 'Cards', desktop: 'Desktop',
                 rest: Callable[[bool], None]) -> None:
        self._cards = cards
        self._desktop = desktop
        self._rest = rest
        self.box = box

    def version(self, job: Job) -> str:
        return re.split(r'[^0-9.]', self.box.vbox.version)[0]

    def machine_states(self, job: Job) -> Dict[str, int]:
        return {name: code for code, name in self.box.states.items()}

    def machines(self, job: Job) -> List[Dict[str, Any]]:
        machines = self.box.array(self.box.vbox, 'machines')
        rows = [self.box.if_there(self._next_row, machine) for machine in machines]
        return [row for row in rows if row is not None]

    def _next_row(self, machine: Any) -> Dict[str, Any]:
        self._rest(True)
        return self._row(machine)

    def _row(self, machine: Any) -> Dict[str, Any]:
        if not machine.accessible:
            return {'name': name_in_path(machine), 'id': '', 'uuid': machine.id, 'native': 'Inaccessible',
                    'state': vmstates.INACCESSIBLE, 'trouble': access_trouble(machine)}
        native = self.box.state_of(machine)
        return {'name': machine.name, 'id': self.box.id_of(machine), 'uuid': machine.id,
                'state': STATE_OF_NATIVE.get(native, vmstates.CHANGING), 'native': native,
                'trouble': pause_trouble(machine) if native == 'Paused' else ''}

    def describe(self, job: Job, vm: str, anew: bool = False) -> Dict[str, Any]:
        machine = self.box.find_any(vm)
        row = self._row(machine)
        if not machine.accessible:
            return dict(row, memory=0, cpus=0, ostype='', snapshot='', tagged=False, rdp={}, pid=0,
                        forwards=[], bridged='')
        snapshot = machine.currentSnapshot
        return dict(row, memory=machine.memorySize, cpus=machine.CPUCount, ostype=machine.OSTypeId,
                    snapshot=snapshot.name if snapshot else '', tagged=has_mark(machine, MADE_BY_US),
                    rdp=self._desktop.facts(machine), forwards=self._cards.forwards_of(machine),
                    bridged=self._cards.bridge_of(machine),
                    pid=process_in(machine.queryLogFilename(0)) if row['native'] in ONLINE else 0)


# --- life of a VM ------------------------------------------------------------------------------

class Life:
    """Starting, stopping, pausing, saving."""

    def __init__(self, box: Connection, cards: 'Cards') -> None:
        self._cards = cards
        self.box = box

    def start(self, job: Job, vm: str, gui_mode: bool = False, board_serial: str = '') -> bool:
        machine = self.box.ready(job, vm, 'start')
        check_disks(machine.name, self.box.disks_of(machine))
        self._cards.check_interfaces(machine)
        self._cards.move_forwards(job, machine)
        self._cards.move_bridge(job, machine)
        if self.box.state_of(machine) in OFF:
            self.box.edit(job, machine, lambda mutable: self._prepare(mutable, board_serial))
        self._launch(job, machine, 'gui' if gui_mode else 'headless')
        self.box.reached(job, machine, *ONLINE + OFF + SAVED)
        state = self.box.state_of(machine)
        if state not in ('Running', 'Paused'):
            raise HypervisorError('%s came up, and is %s already: its log, getLog, should tell why'
                                  % (machine.name, state))
        self._check_pause(job, machine, 0)
        return True

    def _prepare(self, machine: Any, board_serial: str) -> None:
        """Before a cold start; `machine` is a session's mutable one."""
        self._tell(machine, SERIAL_KEY, board_serial)
        self._tell(machine, CHASSIS_KEY, self.box.broker_hint)
        self._cards.settle(machine)

    def _tell(self, machine: Any, key: str, serial: str) -> None:
        """What the firmware tells the guest. The key of the other kind of firmware keeps a VM from
        starting."""
        firmware = machine.firmwareSettings.firmwareType if self.box.api() >= (7, 1) else machine.firmwareType
        bios = firmware == self.box.const('FirmwareType_BIOS')
        machine.setExtraData(key % ('efi' if bios else 'pcbios'), '')
        machine.setExtraData(key % ('pcbios' if bios else 'efi'), serial and 'string:' + serial)

    def _launch(self, job: Job, machine: Any, kind: str) -> None:
        environment = [] if self.box.api() >= (6, 1) else ''
        session = self.box.manager.getSessionObject()

        def launch() -> Any:
            self.box.ready(job, machine.id, 'start')       # whoever holds the lock may be starting it
            return machine.launchVMProcess(session, kind, environment)
        try:
            progress = self.box.when_unlocked(job, machine, launch)
            self.box.finish(job, progress, 'starting')
        except Exception as error:
            why = '' if self.box.is_dead(error) else self._why_not_started(machine)
            fault = self.box.translate(error)
            if not why or not isinstance(fault, HypervisorError):
                raise
            raise HypervisorError(str(fault) + why)
        finally:
            self.box.unlock(session)

    def _why_not_started(self, machine: Any) -> str:
        if self.box.state_of(machine) in SAVED:
            return NOT_FROM_SAVED
        if max(machine.settingsFilePath) > '~' and locale_name() in ('', 'C', 'POSIX'):
            return (' -- its name is beyond ASCII, and in the locale C VirtualBox starts no such VM: '
                    'run the host agent with LC_ALL=C.UTF-8')
        return ''

    def shutdown(self, job: Job, vm: str) -> bool:
        machine = self.box.ready(job, vm, 'shutdown')
        self.box.tell_console(job, machine, lambda console: console.powerButton())
        while self.box.state_of(machine) not in OFF:
            job.check_deadline(DeadlineExceeded(
                '%s took no notice of the ACPI power button for %d s; powerOff pulls the plug'
                % (machine.name, self.box.timeout)))
            job.wait(0.1)
        self.box.settled(job, machine)
        put_back_settings(job, machine.settingsFilePath)
        return True

    def reset(self, job: Job, vm: str) -> bool:
        machine = self.box.ready(job, vm, 'reset')
        self.box.tell_console(job, machine, lambda console: console.reset())
        self.box.reached(job, machine, 'Running')
        return True

    def power_off(self, job: Job, vm: str) -> bool:
        machine = self.box.find(vm)
        if self._is_at_work(machine):
            return self.end_process(job, vm)
        machine = self.box.ready(job, vm, 'power_off')
        try:
            self.box.tell_console(job, machine, lambda console: console.powerDown(), 'powering off')
        except Exception:               # its process has died meanwhile, perhaps: it is off then, too
            self.box.settled(job, machine)
            if self.box.state_of(machine) not in OFF:
                raise
        self.box.reached(job, machine, *OFF)
        put_back_settings(job, machine.settingsFilePath)
        return True

    def _is_at_work(self, machine: Any) -> bool:
        """Whether it has been on its way for long, such as LiveSnapshotting, and a process is there to
        end."""
        until = time.monotonic() + 5
        while time.monotonic() < until:
            if machine.state < self.box.const('MachineState_FirstTransient'):
                return False
            time.sleep(0.1)
        return bool(machine.sessionState == self.box.const('SessionState_Locked'))

    def end_process(self, job: Job, vm: str) -> bool:
        machine = self.box.find(vm)
        if self.box.state_of(machine) not in OFF:
            machine.launchVMProcess(None, 'emergencystop', [] if self.box.api() >= (6, 1) else '')
        self.box.reached(job, machine, *OFF + SAVED)
        put_back_settings(job, machine.settingsFilePath)
        return True

    def hears(self, job: Job, vm: str) -> bool:
        """VBoxSVC asks the VM's process for a guest property, as it knows those of a VM that is off alone."""
        self.box.find(vm).getGuestPropertyValue('vmhost')
        return True

    def kill_process(self, job: Job, vm: str) -> bool:
        return kill_process(job, vm)

    def pause(self, job: Job, vm: str) -> bool:
        machine = self.box.ready(job, vm, 'pause')
        self.box.tell_console(job, machine, lambda console: console.pause())
        self.box.reached(job, machine, 'Paused')
        return True

    def resume(self, job: Job, vm: str) -> bool:
        machine = self.box.ready(job, vm, 'resume')
        self.box.tell_console(job, machine, lambda console: console.resume())
        self._check_pause(job, machine, STAYS)
        self.box.reached(job, machine, 'Running')
        return True

    def _check_pause(self, job: Job, machine: Any, seconds: float) -> None:
        """A VM that VirtualBox pauses again at once, as one whose disk is full, doesn't run: says why."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.box.state_of(machine) != 'Paused':
            job.wait(0.1)
        if self.box.state_of(machine) == 'Paused':
            raise BadState('%s is paused again: %s' % (
                machine.name, pause_trouble(machine) or 'its log, getLog, should tell why'))

    def save_state(self, job: Job, vm: str) -> bool:
        machine = self.box.ready(job, vm, 'save_state')
        failure = None
        try:
            with self.box.locked(job, machine) as session:
                self.box.finish_in_process(job, session.machine.saveState(), 'saving the state')
        except VMHostError as error:
            failure = error
        if failure is not None:
            self.box.settled(job, machine)
            if self.box.state_of(machine) != 'Saved':
                raise failure
            self._write_settings(job, machine, failure)
        self.box.reached(job, machine, 'Saved')
        return True

    def _write_settings(self, job: Job, machine: Any, failure: Exception) -> None:
        """Seen with 7.2, once in 60: the state is saved, but an assertion of VBoxSVC's fails while it
        writes the .vbox file, which then doesn't name the state. A change writes it again."""
        log.info('%s is saved, though VirtualBox says: %s', machine.name, failure)
        text = machine.description
        for each in (text + ' ', text):
            self.box.edit(job, machine, lambda mutable, each=each: setattr(  # type: ignore
                mutable, 'description', each))

    def discard_state(self, job: Job, vm: str) -> bool:
        machine = self.box.ready(job, vm, 'discard_state')
        with self.box.locked(job, machine) as session:
            session.machine.discardSavedState(True)
        self.box.reached(job, machine, *OFF)
        return True

    def keep(self, job: Job, vm: str, on: bool = True) -> bool:
        machine = self.box.find(vm)
        self.box.edit(job, machine, lambda mutable: mutable.setExtraData(KEEP, machine.id if on else ''))
        return True


# --- snapshots ---------------------------------------------------------------------------------

class Snapshots:
    """A VM's tree of snapshots."""

    def __init__(self, box: Connection) -> None:
        self.box = box

    def snapshots(self, job: Job, vm: str) -> List[Dict[str, Any]]:
        return self._rows(self.box.find(vm))

    def _rows(self, machine: Any) -> List[Dict[str, Any]]:
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
                     for child in reversed(self.box.array(snapshot, 'children'))]
        return rows

    def _find(self, machine: Any, name: str) -> Any:
        return machine.findSnapshot(pick_snapshot(machine.name, self._rows(machine), name)['id'])

    def take_snapshot(self, job: Job, vm: str, name: str, desc: str = '', again: bool = False) -> bool:
        if not name:
            raise InvalidParams('a snapshot needs a name')
        machine = self.box.ready(job, vm, 'take_snapshot')
        if not again and any(row['name'] == name for row in self._rows(machine)):
            raise AlreadyExists('%s has a snapshot %r already' % (machine.name, name))
        before = self.box.state_of(machine)
        with self.box.locked(job, machine) as session:
            progress = session.machine.takeSnapshot(name, desc, before != 'Running')
            self.box.finish(job, progress_of(progress), 'taking the snapshot')
        self.box.reached(job, machine, before)
        return True

    def restore_snapshot(self, job: Job, vm: str, name: str = '') -> bool:
        machine = self.box.ready(job, vm, 'restore_snapshot')
        snapshot = self._find(machine, name)
        check_disks(machine.name, self.box.disks_of(snapshot.machine), 'go back to a snapshot')
        with self.box.locked(job, machine) as session:
            self.box.finish(job, session.machine.restoreSnapshot(snapshot), 'restoring the snapshot')
        self.box.settled(job, machine)
        return True

    def delete_snapshot(self, job: Job, vm: str, name: str) -> bool:
        if not name:
            raise InvalidParams('which snapshot?')
        machine = self.box.ready(job, vm, 'delete_snapshot')
        snapshot = self._find(machine, name)
        with self.box.locked(job, machine) as session:
            self.box.finish(job, session.machine.deleteSnapshot(snapshot.id), 'deleting the snapshot')
        self.box.settled(job, machine)
        return True


# --- the screen, measuring, limits -------------------------------------------------------------

class Desktop:
    """The remote desktop."""

    def __init__(self, box: Connection) -> None:
        self.box = box

    def remote_desktop(self, job: Job, vm: str, enable: bool = True, options: Dict[str, Any] = {}  # noqa: B006
                       ) -> Dict[str, Any]:
        wish = self._wish(options)
        machine = self.box.find(vm)
        if enable and not self.box.vbox.systemProperties.defaultVRDEExtPack:
            raise NotSupported('VirtualBox has no remote desktop server: install its extension '
                               'pack (VBoxManage extpack install …)')
        self.box.settled(job, machine)
        password = ''
        if enable:
            check_desktop_address(wish['address'])
            wish['port'] = wish['port'] or self._present_port(machine, wish['address']) or self._free_port(
                machine, wish['address'])
            password = make_password() if self._is_vnc() else ''
        self.box.edit(job, machine, lambda mutable: self._switch(mutable, enable, wish, password))
        return dict(self.facts(machine), **({'password': password} if password else {}))

    def _wish(self, options: Dict[str, Any]) -> Dict[str, Any]:
        """[RemoteDesktop], and the options over it, checked."""
        defaults = dict(self.box.desktop, port=0)
        del defaults['ports']
        wish = options_over(defaults, options, 'remoteDesktop')
        wish['port'] = option('port', wish['port'], agent.integer(0, 65535))
        for key, known in (('auth', self._auth_types()), ('security', DESKTOP_SECURITY)):
            if str(wish[key]).lower() not in known:
                raise InvalidParams('%s is %s, not %r' % (key, either(sorted(known)), wish[key]))
        wish['security'] = DESKTOP_SECURITY[str(wish['security']).lower()]
        if self._is_vnc() and {'auth', 'security'} & set(options):
            raise InvalidParams('auth and security are for VirtualBox\'s own extension pack; the VNC pack '
                                'knows a password, which it is given, and nothing else')
        return wish

    def _is_vnc(self) -> bool:
        return bool(self.box.vbox.systemProperties.defaultVRDEExtPack == 'VNC')

    def _switch(self, machine: Any, enable: bool, wish: Dict[str, Any], password: str) -> None:
        server = machine.VRDEServer
        if enable:
            server.authType = self._auth_types()[str(wish['auth']).lower()]
            server.setVRDEProperty('TCP/Address', str(wish['address']))
            server.setVRDEProperty('TCP/Ports', str(wish['port']))
            if password:
                server.setVRDEProperty('VNCPassword', password)
            else:
                server.setVRDEProperty('Security/Method', wish['security'])
        server.enabled = enable

    def _auth_types(self) -> Dict[str, int]:
        names = self.box.manager.constants.all_values('AuthType')
        return {name.lower(): code for name, code in names.items()}

    def _present_port(self, machine: Any, address: str) -> int:
        """The one that it has there already, 0 for none: who asks again finds it where it was."""
        now = self.facts(machine)
        low, _, high = self.box.desktop['ports'].partition('-')
        stays = now['enabled'] and now['address'] == address and int(low) <= now['port'] <= int(high)
        return int(now['port']) if stays else 0

    def _free_port(self, machine: Any, address: str) -> int:
        taken = {self.facts(each)['port'] for each in self.box.machines_now()
                 if each.id != machine.id and each.VRDEServer.enabled}
        low, _, high = self.box.desktop['ports'].partition('-')
        for port in range(int(low), int(high) + 1):
            if port not in taken and agent.port_is_free(address, port):
                return port
        raise HypervisorError('no port of %s is free on %s' % (self.box.desktop['ports'], address))

    def facts(self, machine: Any) -> Dict[str, Any]:
        """{enabled, port, address, auth, security} as they hold: the VNC pack knows a password alone."""
        server = machine.VRDEServer
        port = re.split(r'\D', server.getVRDEProperty('TCP/Ports') or '')[0]
        auth = {code: name for name, code in self._auth_types().items()}
        vnc = self._is_vnc()
        return {'enabled': bool(server.enabled), 'port': int(port or 0),
                'address': server.getVRDEProperty('TCP/Address') or '',
                'auth': 'password' if vnc else auth.get(server.authType, ''),
                'security': 'none' if vnc else server.getVRDEProperty('Security/Method') or ''}


class Measuring:
    """Statistics, the log, the screen's picture; and limits."""

    def __init__(self, box: Connection) -> None:
        self.box = box

    def get_stats(self, job: Job, vm: str, key: str = '*') -> List[Dict[str, Any]]:
        """Collection begins with the first question, which therefore takes 2 s."""
        machine = self.box.find(vm)
        rows = self._query(machine, key)
        if not rows:
            self.box.vbox.performanceCollector.setupMetrics(['*'], [machine], 1, 10)
        wanted = time.monotonic() + 3
        while not rows and time.monotonic() < wanted:
            job.wait(0.3)
            rows = self._query(machine, key)
        return rows

    def _query(self, machine: Any, key: str) -> List[Dict[str, Any]]:
        answer = self.box.manager.getPerfCollector(self.box.vbox).query(['*'], [machine])
        return [{'name': row['name'], 'unit': row['unit'],
                 'values': [value / float(row['scale'] or 1) for value in row['values']]}
                for row in answer if row['values'] and metric_matches(row['name'], key)]

    def get_log(self, job: Job, vm: str, tail: int = LOG_TAIL) -> str:
        return log_of(self.box.find(vm), tail)

    def screenshot(self, job: Job, vm: str) -> str:
        machine = self.box.ready(job, vm, 'screenshot')
        with self.box.locked(job, machine) as session:
            while True:
                try:
                    return self._shoot(session.console.display)
                except Exception as error:          # none yet, just after the start
                    if self.box.code(error) != NOT_SUPPORTED:
                        raise
                    job.check_deadline(self.box.translate(error))
                job.wait(0.2)

    def _shoot(self, display: Any) -> str:
        width, height = display.getScreenResolution(0)[:2]
        png = display.takeScreenShotToArray(0, width or 640, height or 480,
                                            self.box.const('BitmapFormat_PNG'))
        return base64.b64encode(bytes(bytearray(png))).decode()

    def set_limits(self, job: Job, vm: str, limits: Dict[str, Any]) -> bool:
        wish = read_limits(limits)
        machine = self.box.ready(job, vm, 'set_limits')
        self.box.edit(job, machine, lambda mutable: self._limit(mutable, wish))
        return True

    def _limit(self, machine: Any, limits: Dict[str, Any]) -> None:
        """What may be refused comes first: a running VM takes the rest at once, and for good."""
        if 'netKBps' in limits:
            self._limit_rate(machine, limits['netKBps'] * 1024)
        if 'cpuPercent' in limits:
            machine.CPUExecutionCap = limits['cpuPercent']
        if 'network' in limits:
            for card in self.box.cards(machine):
                card.cableConnected = limits['network']

    def _limit_rate(self, machine: Any, rate: int) -> None:
        """The rate can be altered while the VM runs; which cards it is of, can not."""
        control = machine.bandwidthControl
        groups = {group.name: group for group in self.box.array(control, 'allBandwidthGroups')}
        cards = [card for card in self.box.cards(machine) if rate and not self._is_limited(card)]
        if cards and self.box.state_of(machine) in ONLINE:
            raise BadState('the first netKBps of a VM, or of a new card, can only be set while it is off')
        if BANDWIDTH_GROUP in groups:
            groups[BANDWIDTH_GROUP].maxBytesPerSec = rate
        elif cards:
            control.createBandwidthGroup(BANDWIDTH_GROUP, self.box.const('BandwidthGroupType_Network'), rate)
        for card in cards:
            card.bandwidthGroup = control.getBandwidthGroup(BANDWIDTH_GROUP)

    def _is_limited(self, card: Any) -> bool:
        group = card.bandwidthGroup
        return group is not None and group.name == BANDWIDTH_GROUP


# --- is all well? ------------------------------------------------------------------------------

class Checks:
    """What a start of VMs needs."""

    def __init__(self, box: Connection, network: 'Network') -> None:
        self._network = network
        self.box = box

    def warnings(self, job: Job) -> List[str]:
        return system_warnings()

    def check(self, job: Job) -> List[Tuple[bool, str, str, bool]]:
        try:
            self.box.connect()
        except (ConnectionLost, VMHostError) as error:
            return [(False, 'VirtualBox', str(error), True)] + system_lines()
        lines = [version_line(self.box.vbox.version, self.box.api())] + system_lines() + self._vtx_lines()
        lines += self._network.check_lines(job)
        lines.append(self._desktop_line())
        return lines

    def _vtx_lines(self) -> List[Tuple[bool, str, str, bool]]:
        if sys.platform == 'darwin':        # system_lines has asked macOS itself
            return []
        has = self.box.vbox.host.getProcessorFeature(self.box.const('ProcessorFeature_HWVirtEx'))
        return [(bool(has), 'hardware virtualisation (VT-x, AMD-V)',
                 '' if has else 'switch it on in the firmware (BIOS), and off in other hypervisors '
                 '(KVM, Hyper-V); without it VMs do not start, or crawl', True)]

    def _desktop_line(self) -> Tuple[bool, str, str, bool]:
        pack = self.box.vbox.systemProperties.defaultVRDEExtPack
        return (bool(pack), 'remote desktop server' + (' (%s)' % pack if pack else ''),
                '' if pack else 'install the extension pack of this version from virtualbox.org: '
                'VBoxManage extpack install FILE; all else works without it', False)


# --- plain helpers -----------------------------------------------------------------------------

def pick_snapshot(vm: str, rows: List[Dict[str, Any]], name: str) -> Dict[str, Any]:
    """The row of `Driver.snapshots` that is meant by a name or id; the current one's where that is ''."""
    same = [row for row in rows if name in (row['name'], row['id']) or not name and row['current']]
    if not same:
        raise HypervisorError('%s has no snapshot%s' % (vm, name and ' %r' % name))
    if len(same) > 1:
        raise HypervisorError('%s has %d snapshots named %r: use a uuid, one of %s' % (
            vm, len(same), name, ', '.join(row['id'] for row in same)))
    return same[0]


def metric_matches(name: str, key: str) -> bool:
    """`*` means all but the averages, minima and maxima, which have a colon in their name."""
    return fnmatch.fnmatchcase(name, key or '*') and (':' in key or ':' not in name)


def read_limits(limits: Dict[str, Any]) -> Dict[str, Any]:
    """setLimits' limits, checked."""
    kinds = {'cpuPercent': agent.integer(1, 100), 'netKBps': agent.integer(0, LARGEST),
             'network': agent.yes_no}  # type: Dict[str, Callable[[str], Any]]
    unknown = set(limits) - set(kinds)
    if unknown:
        raise InvalidParams('no limit is called ' + ', '.join(sorted(unknown)))
    return {name: option(name, value, kinds[name]) for name, value in limits.items()}


def check_desktop_address(address: Any) -> None:
    """VirtualBox takes any text, and then listens nowhere, or everywhere."""
    try:
        known = is_local(str(ipaddress.IPv4Address(str(address))))
    except ValueError:
        known = False
    if not known:
        raise InvalidParams('address is an IPv4 address of this machine, not %r' % address)


def version_line(version: str, api: Tuple[int, int]) -> Tuple[bool, str, str, bool]:
    recent = api >= OLDEST
    return (recent, 'VirtualBox ' + version,
            '' if recent else 'too old: %d.%d or later is needed' % OLDEST, True)


def log_of(machine: Any, tail: int) -> str:
    """The end of VBox.log; '' of a VM that never ran."""
    return end_of_file(machine.queryLogFilename(0), tail)


def end_of_file(path: str, tail: int) -> str:
    """Its last bytes as text; '' where there is none."""
    try:
        with open(path, 'rb') as log_file:
            size = log_file.seek(0, os.SEEK_END)
            log_file.seek(max(0, size - max(0, tail)))
            return log_file.read(max(0, tail)).decode('utf-8', 'replace')
    except FileNotFoundError:
        return ''


def process_in(log_path: str) -> int:
    """The process that began this VBox.log, which is a VM's own; 0 where it doesn't say, or isn't there."""
    try:
        with open(log_path, 'rb') as log_file:
            found = re.search(rb'Process ID: +(\d+)', log_file.read(LOG_HEAD))
    except OSError:
        return 0
    return int(found.group(1)) if found else 0


PAUSES = [                         # what VBox.log says where VirtualBox pauses a VM by itself; why
    (re.compile(r'DISKFULL|VERR_DISK_FULL'), 'the host\'s disk is full: make room, then resume'),
    (re.compile(r'HostMemoryLow'), 'the host\'s memory is used up: free some, then resume'),
    (re.compile(r'_IOERR|FILETOOBIG|_TRANSPORT'),
     'the host could not read or write the VM\'s disk: see its log')]


def pause_trouble(machine: Any) -> str:
    """Why VirtualBox itself paused a VM, from its log; '' where a person did."""
    text = log_of(machine, LOG_TAIL)
    since = text[text.rfind("'RESUMING' to 'RUNNING'") + 1:]
    return next((why for pattern, why in PAUSES if pattern.search(since)), '')


def make_password() -> str:
    """Eight characters: what VNC takes."""
    letters = 'abcdefghijkmnpqrstuvwxyz23456789'
    return ''.join(secrets.choice(letters) for _ in range(8))


def locale_name() -> str:
    """Of the environment, as a program in C sees it."""
    return next((os.environ[key] for key in ('LC_ALL', 'LC_CTYPE', 'LANG') if os.environ.get(key)), '')
