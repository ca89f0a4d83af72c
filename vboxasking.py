"""Asking VBoxManage what there is, and how each VM is; what to do where it or a VM answers nobody.

What it is not: it changes nothing; what does is vboxmanage.py's. One thread, that of a driver's process; no
locks.
"""

import contextlib
import re
import time
from typing import Any, Dict, List, Optional, Tuple

import faults
import vboxconnection
import vboxnetwork
import vboxprogram
import virtualbox
import vmstates
from hypervisor import ANSWERS_IN, HANGS, HUNG, HUNG_VM, Driver, Job, either, meant_twice
from vboxconnection import MADE_BY_US, OFF, ONLINE, SAVED
from vboxprogram import Program, Refused, log_in, native_of, rules_in, slots_of

LACKS = ('statistics, screenshots, the remote desktop, limits of the network, host-only networks, appliances '
         'and ISO images, cleanup of what was left half made')
NOBODY = '<inaccessible>'          # what `list vms` calls a VM that can't be read; one may have that name
NOT_FOR_A_MOMENT = 'more than the one snapshot allowed for deletion'     # as VirtualBox says it
SURELY_ANSWERS_IN = HUNG       # seconds that a VM's process has to answer who wants something of it; or …
MUCH_LONGER = 20               # … so many times as long as VirtualBox itself took: the machine is busy then
ASK_AGAIN = 15.0                   # seconds until one that didn't is asked again


class Asking(Driver):
    """What there is, and how each VM is: the driver's base. It asks by `showvminfo`: `info` is {key: value}
    of that."""
    name = 'VBoxManage'

    def __init__(self, settings: Dict[str, Any]) -> None:
        super().__init__(settings)
        self._program = None  # type: Any
        self._version = ''
        self._rows = {}  # type: Dict[str, Tuple[str, Any, Dict[str, Any]]]  # uuid: (.vbox, its stamp, row)
        self._names = {}  # type: Dict[str, str]             # uuid: name of the VMs that were listed last
        self._ask_at = {}  # type: Dict[str, float]          # uuid of a VM whose process hangs: when to ask
        self._infos = {}  # type: Dict[str, Dict[str, str]]  # uuid of a VM that runs: what was told of it last

    # Between the driver and its process.

    def connect(self) -> None:
        if self._program is None:
            program = Program(self.settings['command_timeout'])
            found = re.search(r'^(\d+\.\d+\.\d+)', program.run('--version'), re.MULTILINE)
            if found is None:
                raise faults.HypervisorError('%s tells no version of VirtualBox' % program.path)
            program.run('list', 'vms')              # as the version doesn't need VBoxSVC
            program.rest = self._take_a_rest
            self._program, self._version = program, found.group(1)

    def _take_a_rest(self, moved: bool) -> None:
        self.rest(moved)

    def translate(self, error: Exception) -> Exception:
        if isinstance(error, Refused) and vboxprogram.NO_SERVER in str(error):
            return faults.HypervisorError('VirtualBox does not answer: VBoxSVC could not be started')
        if isinstance(error, Refused):
            gone = re.search(r'a registered machine \S+ UUID \{([0-9a-f-]{36})\}', str(error))
            if gone is not None:
                return faults.NoSuchVM('%s is gone: somebody removed it meanwhile' % self._names.get(
                    gone.group(1), gone.group(1)))
            return vboxconnection.fault_of(error.code, str(error))
        return super().translate(error)

    def _run(self, *words: str, **how: Any) -> str:
        """As Program.run; says which VM hangs, where one does."""
        try:
            return str(self._program.run(*words, **how))
        except faults.DeadlineExceeded:
            vm = next((self._names[word] for word in words if word in self._names), '')
            if how.get('patience') or not vm or not self._lists_vms():
                raise
            raise faults.DeadlineExceeded(HUNG_VM % (vm, HANGS))

    def _lists_vms(self) -> bool:
        """Whether VirtualBox itself answers: it does so without asking a VM's own process."""
        with contextlib.suppress(Refused, faults.DeadlineExceeded):
            return bool(self._program.run('list', 'vms', patience=ANSWERS_IN))
        return False

    def _change(self, job: Job, *words: str, text: str = '', secret: bool = False) -> str:
        """Like _run; somebody else may hold the VM for a moment: tried again until the job's deadline."""
        return str(job.when_free(
            lambda: self._run(*words, job=job, text=text, secret=secret),
            lambda error: str(error) if is_held(error) else '', 'the VM'))

    def _api(self) -> Tuple[int, int]:
        major, minor = self._version.split('.')[:2]
        return int(major), int(minor)

    # What there is.

    def version(self, job: Job) -> str:
        """Whoever asks wants to know whether VirtualBox answers: `VBoxManage --version` asks nobody."""
        self._run('list', 'vms')
        return self._version

    def machine_states(self, job: Job) -> Dict[str, int]:
        names = [name for name in vboxprogram.STATES if name != 'AbortedSaved' or self._api() >= (7, 0)]
        return {name: code for code, name in enumerate(names)}

    def machines(self, job: Job) -> List[Dict[str, Any]]:
        running = {uuid for _, uuid in self._listed('runningvms')}
        rows = [self._look(name, uuid, uuid in running) for name, uuid in self._listed('vms')]
        return [row for row in rows if row is not None]

    def _listed(self, what: str, patience: float = 0) -> List[Tuple[str, str]]:
        """(name, uuid) of each VM; VirtualBox lets a name have quotes and ends of lines."""
        told = self._run('list', what, patience=patience)
        found = re.findall(r'^"(.*?)" \{([0-9a-f-]{36})\}\r?$', told, re.MULTILINE | re.DOTALL)
        if what == 'vms':
            self._names = {uuid: name for name, uuid in found}
        return found

    def _look(self, name: str, uuid: str, runs: bool) -> Optional[Dict[str, Any]]:
        """A VM's row; the last one where it is off, and its settings, which hold its state, are the same; or
        where its process hangs, which is asked now and then; or where VirtualBox says no. None of one that
        went meanwhile."""
        path, stamp, row = self._rows.get(uuid, ('', None, {
            'name': name, 'id': '', 'uuid': uuid, 'native': 'PoweredOff', 'state': vmstates.OFF}))
        now = vboxprogram.stamp_of(path)
        if name == NOBODY and row['native'] == 'Inaccessible' and stamp == now:
            return row
        if not runs and row['native'] in OFF + SAVED and stamp == now is not None:
            return row
        try:
            info, trouble = self._glance(uuid, runs)
        except faults.DeadlineExceeded:
            return self._hung(row)
        except (Refused, faults.BadState) as error:
            if name == NOBODY and self._rows.get(uuid, ('', None, {}))[2].get('native') == 'Inaccessible':
                return self._rows[uuid][2]          # as it was seen just now
            gone = getattr(error, 'code', 0) == vboxconnection.OBJECT_NOT_FOUND
            return row if uuid in self._rows and not gone else None
        self._rows[uuid] = (info['CfgFile'], now if path == info['CfgFile'] else None, self._row(info))
        return dict(self._rows[uuid][2], trouble=trouble)

    def _hung(self, row: Dict[str, Any]) -> Dict[str, Any]:
        """The row of a VM whose process doesn't answer: it runs, and may have been off when it was seen."""
        was_off = {'native': 'Running', 'state': vmstates.RUNNING} if row['native'] in OFF + SAVED else {}
        return dict(row, trouble=HANGS, **was_off)

    def _glance(self, uuid: str, runs: bool, patience: float = ANSWERS_IN) -> Tuple[Dict[str, str], str]:
        """As _info, for who only looks, and what is wrong: of a VM whose process hangs, which is asked now
        and then, what was told last. Raises DeadlineExceeded where that is nothing."""
        if not runs:
            self._infos.pop(uuid, None)
            self._ask_at.pop(uuid, None)
            return self._info(uuid), ''
        if time.monotonic() >= self._ask_at.get(uuid, 0):
            self._ask_at[uuid] = time.monotonic() + ASK_AGAIN       # for who asks meanwhile, too
            hangs = False
            try:
                self._infos[uuid] = self._info(uuid, patience)
                return self._infos[uuid], ''
            except faults.DeadlineExceeded:
                hangs = True
            finally:
                if not hangs:
                    self._ask_at.pop(uuid, None)
        if uuid not in self._infos:
            raise faults.DeadlineExceeded(HUNG_VM % (
                self._rows[uuid][2]['name'] if uuid in self._rows else uuid, HANGS))
        return self._infos[uuid], HANGS

    def _seen(self, job: Job, vm: str, changed: bool = False) -> Tuple[Dict[str, str], str]:
        """As _glance, of the VM that is meant; changed: it is asked, whether it hung or not."""
        uuid = self._find(job, vm)
        runs = uuid in {each for _, each in self._listed('runningvms')}
        if changed:
            self._ask_at.pop(uuid, None)
        return self._glance(uuid, runs, HUNG if changed else ANSWERS_IN)

    def _unreadable(self, uuid: str) -> Dict[str, Any]:
        """The row of a VM whose settings VirtualBox can't read; called as its file is."""
        path, stamp, row = self._rows.get(uuid, ('', None, {}))
        if row.get('native') != 'Inaccessible' or stamp != vboxprogram.stamp_of(path):
            told = ''
            try:
                self._run('list', 'vms', '--long', patience=ANSWERS_IN)
            except Refused as error:
                told = error.told
            path = ''.join(re.findall(r'^UUID: +%s\r?\nConfig file: +(.*?)\r?$' % uuid, told, re.MULTILINE))
            self._rows[uuid] = path, vboxprogram.stamp_of(path), {
                'name': vboxconnection.name_of_file(path) or uuid, 'id': '', 'uuid': uuid,
                'native': 'Inaccessible', 'state': vmstates.INACCESSIBLE,
                'trouble': 'VirtualBox can\'t read %s; `VBoxManage list vms --long` tells why' % path}
        return self._rows[uuid][2]

    def _can_be_read(self, uuid: str) -> bool:
        try:
            return bool(self._info(uuid))
        except faults.BadState:
            return False

    def _info(self, uuid: str, patience: float = 0) -> Dict[str, str]:
        """Raises BadState where VirtualBox can't read it."""
        try:
            told = self._run('showvminfo', uuid, '--machinereadable', patience=patience)
            return vboxprogram.read_info(told)
        except Refused as error:
            if 'functionality is limited' not in str(error):
                raise
            row = self._unreadable(uuid)
            raise faults.BadState(vboxconnection.UNREADABLE % (row['name'], row['trouble']))

    def _row(self, info: Dict[str, str]) -> Dict[str, Any]:
        native = native_of(info)
        card = self._card_of(info)
        mac = vboxconnection.colons(info['macaddress%d' % card]) if card else ''
        return {'name': info['name'], 'id': mac, 'uuid': info['UUID'], 'native': native, 'trouble': '',
                'state': virtualbox.STATE_OF_NATIVE.get(native, vmstates.CHANGING)}

    def describe(self, job: Job, vm: str) -> Dict[str, Any]:
        return self._described(job, vm, False)

    def describe_changed(self, job: Job, vm: str) -> Dict[str, Any]:
        """Its process answered whoever changed it, though it may have hung a moment ago."""
        return self._described(job, vm, True)

    def _described(self, job: Job, vm: str, changed: bool) -> Dict[str, Any]:
        try:
            info, trouble = self._seen(job, vm, changed)
        except faults.BadState:
            return dict(self._unreadable(self._find(job, vm)), memory=0, cpus=0, ostype='', snapshot='',
                        tagged=False, rdp={}, pid=0, forwards=[], bridged='')
        uuid = info['UUID']
        return dict(self._row(info), trouble=trouble, memory=int(info['memory']), cpus=int(info['cpus']),
                    ostype=info['ostype'], snapshot=info.get('CurrentSnapshotName', ''),
                    tagged=self._marks(uuid).get(MADE_BY_US) == uuid, rdp={},
                    forwards=vboxnetwork.forwards_in(rules_in(info)),
                    bridged=info.get('bridgeadapter%d' % next(iter(slots_of(info, 'bridged')), 0), ''),
                    pid=virtualbox.process_in(log_in(info)) if native_of(info) in ONLINE else 0)

    def warnings(self, job: Job) -> List[str]:
        return ['VirtualBox is driven by %s, without vboxapi, which brings %s' % (
            self._program.path, LACKS)] + vboxconnection.system_warnings()

    def check(self, job: Job) -> List[Tuple[bool, str, str, bool]]:
        try:
            self.connect()
        except Exception as error:
            found = error if isinstance(error, faults.VMHostError) else self.translate(error)
            return [(False, 'VBoxManage', str(found), True)]
        lines = [virtualbox.version_line(self._version, self._api())] + vboxconnection.system_lines()
        lines += [(False, 'vboxapi', why, False) for why in self.warnings(job)[:1]]
        if self.settings['network']['mode'] == 'hostonly' and not self._has_network():
            lines.append((False, 'host-only network', 'without it new VMs get NAT, as with mode=nat; vboxapi '
                          'makes it, or `VBoxManage hostonlyif create`', False))
        return lines

    def _interfaces(self) -> List[str]:
        return re.findall(r'^Name: +(.*?)\r?$', self._run('list', 'hostonlyifs'), re.MULTILINE)

    def _bridgeable(self) -> List[Tuple[str, str]]:
        """(name, IPv4 address) of each interface to which a card can be bridged."""
        return re.findall(r'^Name: +(.*?)\r?$(?:(?!^Name:).)*?^IPAddress: +(.*?)\r?$',
                          self._run('list', 'bridgedifs'), re.MULTILINE | re.DOTALL)

    def _has_network(self) -> bool:
        """Whether there is the host-only network of [Network]."""
        return self.settings['network']['interface'] in self._interfaces()

    # Finding, and waiting.

    def _find(self, job: Job, vm: str) -> str:
        """The uuid of the VM of this name, id or uuid."""
        wanted = str(vm)
        vms = self._listed('vms')
        named = [uuid for name, uuid in vms if wanted == name != NOBODY]
        found = [uuid for _, uuid in vms if wanted == uuid] or named
        refusal = meant_twice(wanted, [{'name': name, 'uuid': uuid, 'id': '', 'state': ''}
                                       for name, uuid in vms if name != NOBODY])
        if refusal and wanted in job.args[:1]:      # who asks may not have seen both
            raise faults.BadState(refusal)
        if not found:                               # an id, or the name of one that can't be read
            found = [row['uuid'] for row in self.machines(job)
                     if wanted and (wanted == row['name'] or wanted.upper() == row['id'])]
        if not found:
            raise faults.NoSuchVM('no VM has the name, id or uuid %r' % wanted)
        return found[0]

    def _ready(self, job: Job, vm: str, verb: str) -> Dict[str, str]:
        """What the VM is; in a state in which `verb` makes sense."""
        begun = time.monotonic()
        uuid, takes_running = self._find(job, vm), set(ONLINE) & set(vboxconnection.ACCEPTABLE[verb])
        surely = max(SURELY_ANSWERS_IN, MUCH_LONGER * (time.monotonic() - begun))
        try:
            info = self._settled(job, uuid, surely if takes_running else ANSWERS_IN)
        except faults.DeadlineExceeded:
            if self._runs(uuid):
                if takes_running:
                    raise faults.DeadlineExceeded(HUNG_VM % (self._names[uuid], HANGS))
                vboxconnection.check_fits(verb, self._names[uuid], self._online_state(uuid), '')
            info = self._settled(job, uuid)    # no process of its own, or the machine is busy
        vboxconnection.check_fits(verb, info['name'], native_of(info), info['CfgFile'])
        return info

    def _runs(self, uuid: str) -> bool:
        """Whether VirtualBox says so, and doesn't take its time itself."""
        with contextlib.suppress(faults.DeadlineExceeded):
            return uuid in {each for _, each in self._listed('runningvms', ANSWERS_IN)}
        return False

    def _online_state(self, uuid: str) -> str:
        """Of a VM that runs, as VirtualBox says, though its process doesn't answer."""
        native = self._rows[uuid][2]['native'] if uuid in self._rows else ''
        return native if native in ONLINE else 'Running'

    def _settled(self, job: Job, uuid: str, patience: float = 0) -> Dict[str, str]:
        """Waits while the VM is on its way from one state to another."""
        while True:
            info = self._info(uuid, patience)
            if native_of(info) in virtualbox.STATE_OF_NATIVE:
                return info
            job.check_deadline(faults.Busy('%s is still %s' % (info['name'], native_of(info))))
            job.wait(0.2)

    def _reached(self, job: Job, uuid: str, *states: str) -> bool:
        """True, once the VM is in one of these states. Raises HypervisorError where it is off instead."""
        return bool(self._once_in(job, uuid, *states))

    def _once_in(self, job: Job, uuid: str, *states: str) -> Dict[str, str]:
        """As _reached; gives what the VM is then."""
        while True:
            info = self._info(uuid)
            native = native_of(info)
            if native in states:
                return info
            if native in OFF:
                raise faults.HypervisorError(vboxconnection.ENDED % (info['name'], native, either(states)))
            job.check_deadline(faults.DeadlineExceeded('%s is %s, and not yet %s' % (
                info['name'], native, either(states))))
            job.wait(0.1)

    def _marks(self, uuid: str) -> Dict[str, str]:
        """{key: value} of a VM's extra data, or of `global`."""
        return dict(re.findall(r'^Key: (.*?), Value: (.*?)\r?$', self._run('getextradata', uuid, 'enumerate'),
                               re.MULTILINE))

    def _card_of(self, info: Dict[str, str]) -> int:
        """The slot of the card whose MAC is the VM's id: host-only or NAT by the mode, else the first; 0
        for none."""
        kind = self.settings['network']['mode']
        return next(iter(slots_of(info, kind, kind + 'network') or slots_of(info)), 0)


# --- plain helpers -----------------------------------------------------------------------------

def is_held(error: Exception) -> bool:
    """Whether somebody else holds the VM for a moment; VirtualBox has the same code for a snapshot of which
    another one's disk is made, which stays so."""
    return getattr(error, 'code', 0) in vboxconnection.LOCKED and not re.search(NOT_FOR_A_MOMENT, str(error))
