"""VirtualBox without vboxapi: a driver that runs the program VBoxManage, one process for each thing to do.

It is for machines where vboxapi can't be had, such as most volunteers' with Windows or macOS, and
has what a task's VM needs: made from a disk or from nothing, its life, snapshots, the share of the processor,
NAT, files. All else (`LACKS` in vboxasking.py) is virtualbox.py's alone: fault 9 here, with a sentence.

It reads what VBoxManage prints for programs (`--machinereadable`); VMs are named by their uuid
alone, so that no name is taken for an option, and secrets go into a file that VBoxManage reads, since every
user may see a command line.

What it is not: the connection to VirtualBox's API (vboxconnection.py), of which it uses what is said of
VirtualBox: states, marks, errors. One thread, that of a driver's process; no locks.
"""

import contextlib
import logging
import os
import re
import uuid as uuid_of
from typing import Any, Callable, Dict, List, Optional

import faults
import imagefiles
import vboxconnection
import vboximages
import vboxnetwork
import vboxprogram
import virtualbox
import vmstates
from hypervisor import HUNG, Job
from vboxasking import NOBODY, Asking
from vboxconnection import KEEP, MADE_BY_US, MAKING, OFF, ONLINE, SAVED, check_room
from vboxprogram import Refused, attached_in, disk_path, log_in, native_of, rules_in, slots_of

log = logging.getLogger('vmhost.virtualbox')

CONTROLS = {                       # verb: VBoxManage's words, the states that they lead to, what takes long
    'reset': (('controlvm', 'reset'), ('Running',), ''), 'pause': (('controlvm', 'pause'), ('Paused',), ''),
    'resume': (('controlvm', 'resume'), ('Running',), ''),
    'save_state': (('controlvm', 'savestate'), ('Saved',), 'saving the state'),
    'shutdown': (('controlvm', 'acpipowerbutton'), OFF, ''), 'discard_state': (('discardstate',), OFF, '')}
UNFIT_IN_WORDS = vboximages.BROKEN + '|storage format|with UUID'     # VBoxManage's, of an image
NEW_DISK = r'UUID: +([0-9a-f-]{36})'        # what createmedium and clonemedium tell
DEFAULT_DISK = 8192                # MB: VBoxManage doesn't tell what VirtualBox recommends


class Cards(Asking):
    """The network cards of VMs, and the ports of this machine that lead to them."""

    def _card_words(self, mode: str, slot: int) -> List[str]:
        """For modifyvm: the card over which the agent speaks."""
        if mode == 'hostonly':
            return ['--nic%d=hostonly' % slot,
                    '--hostonlyadapter%d=%s' % (slot, self.settings['network']['interface'])]
        return ['--nic%d=%s' % (slot, mode)] + (self._localhost_words(slot) if mode == 'nat' else [])

    def _bridge_words(self, slot: int, interface: str) -> List[str]:
        return ['--nic%d=bridged' % slot, '--bridgeadapter%d=%s' % (slot, interface)]

    def _move_bridge(self, job: Job, info: Dict[str, str]) -> None:
        """As vboxnetwork.Cards.move_bridge."""
        for slot in slots_of(info, 'bridged')[:1]:
            uuid, now = info['UUID'], info['bridgeadapter%d' % slot]
            follows = self._marks(uuid).get(vboxnetwork.BRIDGED) == uuid
            wanted = vboxnetwork.moved_bridge(info['name'], now, follows, self._bridgeable())
            if wanted != now:
                self._change(job, 'modifyvm', uuid, *self._bridge_words(slot, wanted))

    def _settle_card(self, job: Job, info: Dict[str, str]) -> None:
        """Before a cold start, as vboxnetwork.Cards.settle."""
        uuid, mode = info['UUID'], self.settings['network']['mode']
        waits = mode == 'hostonly' and self._marks(uuid).get(vboxnetwork.NAT_FOR_NOW) == uuid
        if waits and self._has_network():
            slot = self._card_of(info)
            forget = ['--natpf%d' % slot, 'delete', vboxnetwork.CHIRP_RULE] if self._chirp_rule(info) else []
            self._change(job, 'modifyvm', uuid, *forget + self._card_words(mode, slot))
            self._change(job, 'setextradata', uuid, vboxnetwork.NAT_FOR_NOW)
        elif waits or mode == 'nat':
            self._add_chirp_rule(job, info)

    def _localhost_words(self, slot: int) -> List[str]:
        """Before 7.0, a guest could always reach its host's 127.0.0.1."""
        return ['--nat-localhostreachable%d=on' % slot] if self._api() >= (7, 0) else []

    def find_chirp(self, job: Job, vm: str) -> Optional[List[Any]]:
        rule = self._chirp_rule(self._seen(job, vm)[0])
        return [rule[2], int(rule[3])] if rule else None

    def forward_chirp(self, job: Job, vm: str) -> List[Any]:
        info = self._settled(job, self._find(job, vm))
        self._add_chirp_rule(job, info)
        found = self.find_chirp(job, vm)
        if not found:
            raise faults.HypervisorError('%s has no NAT card: its Chirp port can not be reached'
                                         % info['name'])
        return found

    def _chirp_rule(self, info: Dict[str, str]) -> List[str]:
        """name, protocol, host address, host port, guest address, guest port; [] for none."""
        return next((rule for rule in rules_in(info) if rule[0] == vboxnetwork.CHIRP_RULE
                     and rule[5] == str(self.settings['chirp_port'])), [])

    def _add_chirp_rule(self, job: Job, info: Dict[str, str]) -> None:
        slot = next(iter(slots_of(info, 'nat')), 0)
        online = native_of(info) in ONLINE
        if not slot or self._chirp_rule(info):
            return
        port = vboxnetwork.free_port('127.0.0.1', [int(each[3]) for each in rules_in(info)])
        new = '%s,tcp,127.0.0.1,%d,,%d' % (vboxnetwork.CHIRP_RULE, port, self.settings['chirp_port'])
        tell = ['controlvm', info['UUID'], 'natpf%d' % slot] if online else [
            'modifyvm', info['UUID'], '--natpf%d' % slot]
        if any(value.startswith(vboxnetwork.CHIRP_RULE + ',') for value in info.values()):
            self._change(job, *tell + ['delete', vboxnetwork.CHIRP_RULE])
        self._change(job, *tell + [new] + ([] if online else self._localhost_words(slot)))

    def _move_forwards(self, job: Job, info: Dict[str, str]) -> None:
        """As vboxnetwork.Cards.move_forwards."""
        words = []  # type: List[str]
        key = '--natpf%d' % next(iter(slots_of(info, 'nat')), 0)
        for rule in vboxnetwork.moved_forwards(info['name'], rules_in(info)):
            words += [key, 'delete', rule[0], key, ','.join(rule)]
        if words:
            self._change(job, 'modifyvm', info['UUID'], *words)


class VBoxManage(Cards):
    """The driver: what it does to VMs."""

    def find_verb(self, name: str) -> Callable[..., Any]:
        return self.control if name in CONTROLS else super().find_verb(name)

    # Life of a VM.

    def start(self, job: Job, vm: str, gui_mode: bool = False, board_serial: str = '') -> bool:
        info = self._ready(job, vm, 'start')
        uuid = info['UUID']
        wanted = [info.get('hostonlyadapter%d' % slot, '') for slot in slots_of(info, 'hostonly')]
        vboxnetwork.check_interfaces(info['name'], wanted, self._interfaces)
        vboxconnection.check_disks(info['name'], [path for _, _, _, path, _ in attached_in(info)])
        self._move_forwards(job, info)
        self._move_bridge(job, info)
        if native_of(info) in OFF:
            self._tell_firmware(job, info, board_serial)
            self._settle_card(job, info)
        try:
            self._change(job, 'startvm', uuid, '--type=' + ('gui' if gui_mode else 'headless'),
                         text='starting')
        except Refused as error:
            if native_of(self._settled(job, uuid)) not in SAVED:
                raise
            raise Refused(str(error) + virtualbox.NOT_FROM_SAVED, error.code)
        job.renew_deadline()
        self._reached(job, uuid, 'Running', 'Paused', *OFF + SAVED)
        if native_of(self._info(uuid)) not in ('Running', 'Paused'):
            raise faults.HypervisorError('%s came up, and is off already: its log, getLog, should tell why'
                                         % info['name'])
        return True

    def _tell_firmware(self, job: Job, info: Dict[str, str], serial: str) -> None:
        """The key of the other kind of firmware would keep the VM from starting."""
        kind, other = ('pcbios', 'efi') if info['firmware'] == 'BIOS' else ('efi', 'pcbios')
        hint = self.settings.get('broker_hint', '')
        for key, value in ((virtualbox.SERIAL_KEY, serial), (virtualbox.CHASSIS_KEY, hint)):
            self._change(job, 'setextradata', info['UUID'], key % other)
            told = ['string:' + value] if value else []
            self._change(job, 'setextradata', info['UUID'], key % kind, *told, secret=True)

    def control(self, job: Job, vm: str) -> bool:
        """Carries out the job's verb, as CONTROLS says."""
        words, states, text = CONTROLS[job.verb]
        uuid = self._ready(job, vm, job.verb)['UUID']
        try:
            self._change(job, words[0], uuid, *words[1:], text=text)
        except Refused:
            if job.verb != 'save_state' or native_of(self._settled(job, uuid)) != 'Saved':
                raise
            self._write_settings(job, uuid)
        job.renew_deadline()
        return self._stopped(job, uuid) if job.verb == 'shutdown' else self._reached(job, uuid, *states)

    def _write_settings(self, job: Job, uuid: str) -> None:
        """Seen with 7.2: the state is saved, but VBoxSVC fails while it writes the .vbox file, which then
        doesn't name the state. A change writes it again."""
        text = self._info(uuid).get('description', '')
        for each in (text + ' ', text):
            self._change(job, 'modifyvm', uuid, '--description=' + each)

    def power_off(self, job: Job, vm: str) -> bool:
        uuid = self._find(job, vm)
        try:
            with contextlib.suppress(Refused):      # which is told below
                self._run('showvminfo', uuid, '--machinereadable', job=job, text='powering off',
                          patience=min(HUNG, job.timeout))
        except faults.DeadlineExceeded:             # its process answers nobody
            return self.end_process(job, vm)
        self._ready(job, uuid, 'power_off')
        self._change(job, 'controlvm', uuid, 'poweroff')
        return self._stopped(job, uuid)

    def end_process(self, job: Job, vm: str) -> bool:
        """Asks VBoxSVC alone, as the VM's own process doesn't answer."""
        uuid = self._find(job, vm)
        with contextlib.suppress(Refused):          # it has ended meanwhile, or runs still
            self._run('startvm', uuid, '--type=emergencystop')
        while uuid in [each for _, each in self._listed('runningvms')]:
            job.check_deadline(faults.DeadlineExceeded('%s still runs' % vm))
            job.wait(0.1)
        self._ask_at.pop(uuid, None)
        return self._stopped(job, uuid)

    def _stopped(self, job: Job, uuid: str) -> bool:
        """True, once it is off, and has its settings still."""
        vboxconnection.put_back_settings(job, self._once_in(job, uuid, *OFF + SAVED)['CfgFile'])
        return True

    def kill_process(self, job: Job, vm: str) -> bool:
        return vboxconnection.kill_process(job, vm)

    # Making a VM.

    def create_vm(self, job: Job, name: str, image: str = '', options: Dict[str, Any] = {}) -> str:  # noqa: B006
        wish = vboximages.wishes(options, self.settings['network']['mode'])
        kind = os.path.splitext(image)[1].lower()
        vboximages.check_fitting(options, kind)
        if wish['linked'] and kind not in vboximages.DISKS:
            raise faults.InvalidParams(vboximages.NOT_LINKED)
        if not image and name.lower().endswith('.vbox'):
            self._cannot('register VMs here: `VBoxManage registervm` does')
        vboximages.check_name(name)
        with contextlib.suppress(faults.NoSuchVM):
            self._find(job, name)
            raise faults.AlreadyExists('there is a VM %r already' % name)
        imagefiles.check_is_file(image)
        if kind not in ('',) + vboximages.DISKS:
            self._cannot('make VMs from %s, but from disks: %s' % (kind, ', '.join(vboximages.DISKS)))
        imagefiles.check_image(image)
        if kind:
            vboxprogram.check_opens(image)
        if wish['bridged']:
            vboxnetwork.pick_interface(wish['bridged'], self._bridgeable())
        wanted = str(uuid_of.uuid4())                  # if we die now, cleanup will find it by that
        self._run('setextradata', 'global', vboximages.MAKES + wanted, vboximages.note_of(os.getpid()))
        try:
            made = self._make(job, name, wish, wanted)
            self._fit_out(job, made, image and os.path.abspath(image), wish)
        except BaseException as error:
            self._take_back(job, wanted, error)
            raise
        self._run('setextradata', 'global', maker_of(self._info(made)))
        self._run('setextradata', 'global', vboximages.MAKES + wanted)
        return name

    def _take_back(self, job: Job, wanted: str, why: BaseException) -> None:
        """A VM that isn't whole, if it came so far; what can't be removed now is cleanup's."""
        try:
            if wanted in [each for _, each in self._listed('vms')]:
                self._delete(job, self._info(wanted), False)
            self._run('setextradata', 'global', vboximages.MAKES + wanted)
        except (Refused, faults.VMHostError) as error:
            log.warning('a half-made VM is left for cleanup: %s (%s)', error, why)

    def register_vm(self, job: Job, name: str, folder: str, owner: str = '') -> bool:
        wish = vboximages.wishes({'folder': folder, 'owner': owner}, self.settings['network']['mode'])
        vboximages.check_name(name)
        path = os.path.join(wish['folder'] or self._default_folder(), name, name + '.vbox')
        if not os.path.isfile(path):
            return False
        for row in self.machines(job):
            known = self._rows[row['uuid']][0]
            if vboximages.is_moved(known, path):
                vboximages.follow_move(known, path)
                self._run('unregistervm', row['uuid'])
            elif row['name'] == name:
                raise faults.AlreadyExists('there is a VM %r already' % name)
        self._run('registervm', path)
        if owner:
            self._run('setextradata', 'global', vboximages.OWNER + self._find(job, name), owner)
        return True

    def _default_folder(self) -> str:
        found = re.search(r'^Default machine folder: +(.*?)\r?$', self._run('list', 'systemproperties'),
                          re.MULTILINE)
        return found.group(1) if found else ''

    def _make(self, job: Job, name: str, wish: Dict[str, Any], wanted: str) -> str:
        words = ['--name=' + name, '--uuid=' + wanted, '--ostype=' + (wish['ostype'] or 'Linux_64'),
                 '--register', '--default']
        words += ['--basefolder=' + wish['folder']] if wish['folder'] else []
        try:
            told = self._run('createvm', *words)
        except Refused as error:
            if 'already exists' in str(error):
                known = [row['name'] for row in self.machines(job)
                         if "'%s'" % self._rows[row['uuid']][0] in str(error)]
                raise faults.AlreadyExists('%s, of %s' % (
                    error, 'the VM %r' % known[0] if known else vboximages.NOT_REGISTERED))
            raise
        uuid = re.findall(r'^UUID: +([0-9a-f-]{36})', told, re.MULTILINE)[-1]
        self._run('setextradata', 'global', maker_of(self._info(uuid)), vboximages.note_of(os.getpid()))
        for mark in (MADE_BY_US, MAKING):           # if we die now, cleanup will find it
            self._change(job, 'setextradata', uuid, mark, uuid)
        return uuid

    def _fit_out(self, job: Job, uuid: str, image: str, wish: Dict[str, Any]) -> None:
        info = self._info(uuid)
        check_room(info['name'], info['CfgFile'])
        words = ['--%s=%d' % (key, wish[key]) for key in ('memory', 'cpus') if wish[key]]
        mode = wish['network'] or self.settings['network']['mode']
        if mode == 'hostonly' and not wish['network'] and not self._has_network():
            mode = 'nat'
            self._change(job, 'setextradata', uuid, vboxnetwork.NAT_FOR_NOW, uuid)
        for rule in vboxnetwork.new_forwards(wish['forwards']):
            words += ['--natpf1', ','.join(rule)]
        if wish['bridged']:
            words += self._bridge_words(2, vboxnetwork.pick_interface(wish['bridged'], self._bridgeable()))
        self._change(job, 'modifyvm', uuid, *self._card_words(mode, 1) + words)
        if wish['bridged'] == vboxnetwork.AUTO:
            self._change(job, 'setextradata', uuid, vboxnetwork.BRIDGED, uuid)
        path = disk_path(info)
        if self._make_disk(job, path, image, wish):
            vboximages.check_still_there(path)
            buses = {info[key.replace('name', 'type')]: info[key] for key in sorted(info)
                     if key.startswith('storagecontrollername')}
            bus = buses.get('IntelAhci') or next(iter(buses.values()))
            self._change(job, 'storageattach', uuid, '--storagectl=' + bus, '--port=0', '--device=0',
                         '--type=hdd', '--medium=' + path)
            self._run('setextradata', 'global', vboximages.EXPECTED + path)
        if wish['keep']:
            self._change(job, 'setextradata', uuid, KEEP, uuid)
        if wish['owner']:
            self._run('setextradata', 'global', vboximages.OWNER + uuid, wish['owner'])
        self._is_made(job, info)

    def _is_made(self, job: Job, info: Dict[str, str]) -> None:
        """It is half made no longer, where there is room for that. Seen with 7.2, where others look at the VM
        meanwhile: VirtualBox says yes, and keeps the mark, for which `cleanup` would take a whole VM away."""
        uuid = info['UUID']
        check_room(info['name'], info['CfgFile'])
        self._change(job, 'setextradata', uuid, MAKING)
        while MAKING in self._marks(uuid):
            job.check_deadline(faults.Busy('VirtualBox keeps %s of %s' % (MAKING, uuid)))
            job.wait(0.2)
            self._change(job, 'setextradata', uuid, MAKING)

    def _make_disk(self, job: Job, path: str, image: str, wish: Dict[str, Any]) -> bool:
        """Whether one is wanted."""
        try:
            self._run_disk(job, path, image, wish)
        except Refused as error:
            if not image or not re.search(UNFIT_IN_WORDS, str(error)):
                raise
            raise faults.HypervisorError(vboximages.unfit(image, str(self.translate(error))))
        job.renew_deadline()
        return bool(image or wish['diskSize'] != 0)

    def _run_disk(self, job: Job, path: str, image: str, wish: Dict[str, Any]) -> None:
        if not image and wish['diskSize'] == 0:
            return
        vboximages.check_is_free(path)
        # If we die now, cleanup will find it: by the same notes as vboximages.Disks has.
        self._run('setextradata', 'global', vboximages.EXPECTED + path, vboximages.begun_now())
        if image:
            told = self._from_image(job, path, image, wish['linked'])
        else:
            size = DEFAULT_DISK if wish['diskSize'] is None else wish['diskSize']
            told = self._run('createmedium', 'disk', '--filename=' + path, '--size=%d' % size, job=job,
                             text='making a disk')
        for disk in re.findall(NEW_DISK, told)[-1:]:
            self._run('setextradata', 'global', vboximages.DISK_MADE + disk, path)

    def _from_image(self, job: Job, path: str, image: str, linked: bool) -> str:
        """What VBoxManage tells. VirtualBox remembers an image that it is shown: it has to forget it, above
        all a damaged one, or it takes no other copy; but where a disk lies on it now."""
        known = re.search('^Location: +%s\r?$' % re.escape(image), self._run('list', 'hdds'), re.MULTILINE)
        words, text = ((['createmedium', 'disk', '--filename=' + path, '--diffparent=' + image],
                        'making a disk on the image') if linked else
                       (['clonemedium', 'disk', image, path, '--format=VDI'], 'copying the disk'))
        stays = known is not None
        if stays:
            self._check_room_of_users(image)
        try:
            told = self._run(*words, job=job, text=text)
            stays = stays or linked
            return told
        finally:
            if not stays:
                with contextlib.suppress(Refused, faults.VMHostError):     # it never knew it
                    self._run('closemedium', 'disk', image)

    def _check_room_of_users(self, image: str) -> None:
        """As vboximages.Images has it."""
        users = self._run('showmediuminfo', 'disk', image).partition('In use by VMs:')[2]
        for uuid in re.findall(r'\(UUID: ([0-9a-f-]{36})\)', users):
            info = self._info(uuid)
            check_room(info['name'], info['CfgFile'])

    # Removing.

    def remove_vm(self, job: Job, vm: str, delete_disks: bool = False,
                  all_disks: bool = False) -> List[List[str]]:
        uuid = self._find(job, vm)
        if (NOBODY, uuid) in self._listed('vms') and not self._can_be_read(uuid):
            folder = os.path.dirname(self._rows[uuid][0])
            self._run('unregistervm', uuid)
            return vboximages.files_of_unreadable(folder) if delete_disks or all_disks else []
        info = self._ready(job, uuid, 'remove_vm')
        if not delete_disks and not all_disks:
            self._change(job, 'unregistervm', uuid)
            return []
        return self._delete(job, info, all_disks)

    def _delete(self, job: Job, info: Dict[str, str], all_disks: bool) -> List[List[str]]:
        """The VM, its files, and its disks, those in its folder or all of them; gives [path, why] of those
        that are kept.

        VBoxManage by itself would also delete the image under a VM's disk: so no disk is left to it.
        """
        uuid, folder = info['UUID'], os.path.realpath(os.path.dirname(info['CfgFile'])) + os.sep
        if 'SnapshotName' in info:
            raise faults.BadState('%s has snapshots: delete them first, or remove the VM without its disks'
                                  % info['name'])
        if native_of(info) in SAVED:                # of which no disk can be detached
            self._change(job, 'discardstate', uuid)
        kept = []
        for controller, port, device, path, disk in attached_in(info):
            try:
                told = self._run('showmediuminfo', 'disk', disk)
            except Refused:                         # a CD, of which nothing is deleted
                continue
            self._change(job, 'storageattach', uuid, '--storagectl=' + controller, '--port=' + port,
                         '--device=' + device, '--medium=none')
            if not all_disks and not os.path.realpath(path).startswith(folder):
                kept.append([path, vboximages.ELSEWHERE])
                continue
            try:
                self._run('closemedium', 'disk', disk, *delete_words(path), job=job, text='deleting a disk')
                self._run('setextradata', 'global', vboximages.DISK_MADE + disk)
                self._forget_image(told)
            except Refused as error:                # another VM has it, or a disk that lies on it
                kept.append([path, 'VirtualBox can\'t delete it: %s' % error])
        self._delete_unfinished(disk_path(info))
        self._change(job, 'unregistervm', uuid, '--delete')
        for key in (vboximages.OWNER + uuid, vboximages.MAKES + uuid, maker_of(info)):
            self._run('setextradata', 'global', key)
        return sorted(kept)

    def _delete_unfinished(self, path: str) -> None:
        """The disk of a VM whose making was cut short, which isn't attached yet."""
        notes = self._marks('global')
        begun = notes.get(vboximages.EXPECTED + path, '')
        if not begun:
            return
        is_there = vboximages.is_recent(path, begun)
        try:
            self._run('closemedium', 'disk', path, *delete_words(path) if is_there else ())
        except Refused:                             # not even a disk yet
            if is_there:
                with contextlib.suppress(OSError):
                    os.remove(path)
        for key, value in notes.items():
            if key == vboximages.EXPECTED + path or (key.startswith(vboximages.DISK_MADE) and value == path):
                self._run('setextradata', 'global', key)

    def _forget_image(self, told: str) -> None:
        """What a disk lay on that is deleted, unless another one lies on it: the image, whose file stays; and
        before that a disk that was made with the VM, on which VirtualBox laid another one by itself, as it
        does on an image for a stream."""
        while True:
            parent = re.search(r'^Parent UUID: +([0-9a-f-]{36})\r?$', told, re.MULTILINE)
            if parent is None:
                return
            disk = parent.group(1)
            path = self._marks('global').get(vboximages.DISK_MADE + disk, '')
            try:
                told = self._run('showmediuminfo', 'disk', disk)
                self._run('closemedium', 'disk', disk, *delete_words(path) if path else ())
            except Refused:
                return
            if not path:
                return
            self._run('setextradata', 'global', vboximages.DISK_MADE + disk)

    def cleanup(self, job: Job, dry_run: bool = True, vms: List[str] = [], owner: str = ''  # noqa: B006
                ) -> List[Dict[str, str]]:
        if not owner:
            self._cannot('find what was left half made: vboxapi can')
        owners = self._marks('global')
        rows = [row for row in self.machines(job) if owners.get(vboximages.OWNER + row['uuid']) == owner]
        named = [row for row in rows if {row['name'], row['uuid']} & set(vms) and self._may_go(row)]
        lost = [row for row in rows if row['state'] == vmstates.INACCESSIBLE
                and self._rows[row['uuid']][0] and not os.path.exists(self._rows[row['uuid']][0])]
        for row in named if not dry_run else ():
            self._delete(job, self._info(row['uuid']), False)
        for row in lost if not dry_run else ():
            self._run('unregistervm', row['uuid'])
            self._run('setextradata', 'global', vboximages.OWNER + row['uuid'])
        return [{'kind': 'vm', 'name': row['name'], 'why': why}
                for found, why in ((named, 'named'), (lost, 'its folder is gone')) for row in found]

    def _may_go(self, row: Dict[str, Any]) -> bool:
        marks = self._marks(row['uuid']) if row['native'] in OFF + SAVED else {}
        return marks.get(MADE_BY_US) == row['uuid'] != marks.get(KEEP)

    # Snapshots.

    def snapshots(self, job: Job, vm: str) -> List[Dict[str, Any]]:
        return vboxprogram.read_snapshots(self._seen(job, vm)[0])

    def take_snapshot(self, job: Job, vm: str, name: str, desc: str = '', again: bool = False) -> bool:
        if not name:
            raise faults.InvalidParams('a snapshot needs a name')
        info = self._ready(job, vm, 'take_snapshot')
        if not again and name in [row['name'] for row in vboxprogram.read_snapshots(info)]:
            raise faults.AlreadyExists('%s has a snapshot %r already' % (info['name'], name))
        live = ['--live'] if native_of(info) == 'Running' else []
        self._change(job, 'snapshot', info['UUID'], 'take', name, *['--description=' + desc] + live,
                     text='taking the snapshot')
        job.renew_deadline()
        return self._reached(job, info['UUID'], native_of(info))

    def restore_snapshot(self, job: Job, vm: str, name: str = '') -> bool:
        return self._on_snapshot(job, vm, name, 'restore', 'restoring the snapshot')

    def delete_snapshot(self, job: Job, vm: str, name: str) -> bool:
        if not name:
            raise faults.InvalidParams('which snapshot?')
        return self._on_snapshot(job, vm, name, 'delete', 'deleting the snapshot')

    def _on_snapshot(self, job: Job, vm: str, name: str, act: str, text: str) -> bool:
        info = self._ready(job, vm, act + '_snapshot')
        wanted = virtualbox.pick_snapshot(info['name'], vboxprogram.read_snapshots(info), name)
        self._change(job, 'snapshot', info['UUID'], act, wanted['id'], text=text)
        job.renew_deadline()
        self._settled(job, info['UUID'])
        return True

    # Looking in, and limits.

    def get_log(self, job: Job, vm: str, tail: int = virtualbox.LOG_TAIL) -> str:
        return virtualbox.end_of_file(log_in(self._seen(job, vm)[0]), tail)

    def set_limits(self, job: Job, vm: str, limits: Dict[str, Any]) -> bool:
        wish = virtualbox.read_limits(limits)
        if set(wish) - {'cpuPercent'}:
            self._cannot('limit the network: vboxapi can')
        info = self._ready(job, vm, 'set_limits')
        if 'cpuPercent' in wish and native_of(info) in ONLINE:
            self._change(job, 'controlvm', info['UUID'], 'cpuexecutioncap', str(wish['cpuPercent']))
        elif 'cpuPercent' in wish:
            self._change(job, 'modifyvm', info['UUID'], '--cpuexecutioncap=%d' % wish['cpuPercent'])
        return True


def maker_of(info: Dict[str, str]) -> str:
    """The key of the note which process makes a VM."""
    return vboximages.MAKER + os.path.dirname(info['CfgFile'])


def delete_words(path: str) -> List[str]:
    """For closemedium, which can't delete a file that is gone, and then keeps the disk."""
    return ['--delete'] if os.path.lexists(path) else []
