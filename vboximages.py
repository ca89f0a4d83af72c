"""VirtualBox's images and disks: making VMs, removing them, and what a host that died has left.

What it is not: it starts no VM. One thread, that of virtualbox.py; no locks.
"""

import contextlib
import logging
import os
import re
import time
import xml.sax.saxutils as saxutils
from typing import Any, Callable, Dict, Iterator, List, Tuple

import agent
import imagefiles
from appliances import APPLIANCES, check_appliance
from faults import (
    AlreadyExists,
    BadState,
    Busy,
    DeadlineExceeded,
    HypervisorError,
    InvalidParams,
    NotSupported,
)
from hypervisor import NOT_READY, Job, either, option, options_over
from protocol import is_mac
from vboxconnection import (
    INVALID_ARGUMENT,
    INVALID_OBJECT_STATE,
    KEEP,
    MADE_BY_US,
    MAKING,
    OBJECT_IN_USE,
    OBJECT_NOT_FOUND,
    OFF,
    SAVED,
    Connection,
    check_room,
    has_mark,
    name_in_path,
)
from vboxdoors import close_doors
from vboxnetwork import Cards, check_bridged, check_card, read_forwards
from vboxprogram import check_opens

log = logging.getLogger('vmhost.virtualbox')

# Global extra-data keys.
IMPORTING = 'vmhost/importing/'    # + name: the .vbox that an import will register
EXPECTED = 'vmhost/expected'       # + path of a disk that createVM is about to make: when it began
DISK_MADE = 'vmhost/disk/'         # + uuid of a disk that createVM made: its path then
OWNER = 'vmhost/owner/'            # + uuid of a VM that createVM made: whose it is
REMOVING = 'vmhost/removing/'      # + .vbox of a VM that removeVM deletes: its uuid, and the file's stamp
MAKES = 'vmhost/makes/'            # + uuid of a VM that createVM is about to make: the process that does
MAKER = 'vmhost/maker/'            # + folder of a VM that createVM is making: the process that does (note_of)
DIED = 'died'                      # or this word, and when it was seen to be dead: in seconds since 1970
WRITES_LATER = 60                  # seconds that VirtualBox may go on with what a process asked for that died

DISKS = ('.vdi', '.vmdk', '.vhd', '.vhdx', '.qcow', '.qcow2', '.hdd')
PREVIOUS = '-prev'                 # after the name of a .vbox file: what it was before the last change
HAS_DISK = re.compile(r'<AttachedDevice\b[^>]*\btype="HardDisk"')
UUID = re.compile(r'^{?[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}}?$')
LARGEST = 2 ** 31 - 1              # of the numbers that options hold
LARGEST_DISK = 2 ** 21             # MB: VirtualBox's own limit; of more it writes a table for minutes
NOT_LINKED = 'linked: expected an image that is a disk, on which the VM\'s own can lie'
# In VirtualBox's words where a disk in an appliance is cut, damaged or missing.
BROKEN = 'VERR_(EOF|TAR|VD|ZIP|XAR)|Digest mismatch|Unexpected end of OVA'
UNFIT = ('VirtualBox can\'t open the image %s: it is damaged, of another kind than its name says, or a copy '
         'of a disk that VirtualBox has%s')
NOT_REGISTERED = ('a VM that is not registered: `create` of that file brings it back, and `cleanup` removes '
                  'one that was left half made')
LONGEST_NAME = 200                 # bytes of a VM's name: it names files
ELSEWHERE = 'attached from elsewhere; --all-disks (allDisks) deletes it, too'      # why a disk is kept
WRITTEN_OVER = 'holds what was written over %s, which was attached from elsewhere; --all-disks deletes both'


class Images:
    """Making a VM: from an appliance, a disk, an ISO, nothing, or by registering one."""

    def __init__(self, box: Connection, cards: 'Cards', disks: 'Disks') -> None:
        self._cards = cards
        self._disks = disks
        self.box = box

    def create_vm(self, job: Job, name: str, image: str = '', options: Dict[str, Any] = {}) -> str:  # noqa: B006
        wish = wishes(options, self.box.network['mode'])
        registers = not image and name.lower().endswith('.vbox')
        kind = os.path.splitext(name if registers else image)[1].lower()
        check_fitting(options, kind)
        if wish['linked'] and kind in ('', '.iso') + APPLIANCES:
            raise InvalidParams(NOT_LINKED)
        if registers:
            return self._register(job, os.path.abspath(name))
        check_name(name)
        self._check_is_new(name, self._path_of(name, wish))
        self._check_ostype(wish['ostype'])
        imagefiles.check_is_file(image)
        if kind not in ('', '.iso') + APPLIANCES + DISKS:
            raise NotSupported('an image is %s, not %r' % (either(APPLIANCES + ('.iso',) + DISKS), kind))
        (check_appliance if kind in APPLIANCES else imagefiles.check_image)(image)
        if kind in DISKS:
            check_opens(image)
        self._cards.interface_of(wish['bridged'])
        with self._making(name, self._path_of(name, wish)):
            if kind in APPLIANCES:
                self._import(job, name, os.path.abspath(image), wish)
            else:
                self._build(job, name, image and os.path.abspath(image), kind, wish)
        return name

    @contextlib.contextmanager
    def _making(self, name: str, path: str) -> Iterator[None]:
        """Notes which process makes the VM: no other host agent takes its name meanwhile, or cleans it up."""
        folder = os.path.dirname(path)
        if folder in self._disks.in_the_making():
            raise AlreadyExists('another program is just making a VM %r' % name)
        self.box.vbox.setExtraData(MAKER + folder, note_of(os.getpid()))
        try:
            yield
        finally:
            with contextlib.suppress(Exception):    # VirtualBox died: so does this process
                self.box.vbox.setExtraData(MAKER + folder, '')

    @contextlib.contextmanager
    def _taking(self, name: str) -> Iterator[None]:
        """Says what is wrong where VirtualBox has a VM of this name by now."""
        try:
            yield
        except Exception as error:
            told = str(self.box.translate(error))
            if not re.search('already (exists|registered)|ALREADY_EXISTS', told):
                raise
            raise AlreadyExists('another program has just taken the name %r: %s' % (name, told))

    @contextlib.contextmanager
    def _reading(self, image: str, cut: str) -> Iterator[None]:
        """Names the image, of which VirtualBox tells where it is wrong. cut: what its words match."""
        try:
            yield
        except HypervisorError as error:
            if not re.search(cut, str(error)):
                raise
            raise HypervisorError('%s is cut or damaged, or no %s: get it anew (%s)' % (
                image, 'appliance' if image.lower().endswith(('.ova', '.ovf')) else 'disk', error))

    def _path_of(self, name: str, wish: Dict[str, Any]) -> str:
        """Where the settings of a new VM will be."""
        return str(self.box.vbox.composeMachineFilename(name, '', '', wish['folder']))

    def _check_is_new(self, name: str, path: str) -> None:
        if name in [machine.name for machine in self.box.machines_now()] + [
                name_in_path(machine) for machine in self.box.unreadable()]:
            raise AlreadyExists('there is a VM %r already' % name)
        if os.path.exists(path):
            raise AlreadyExists('%s exists already, of %s' % (path, next((
                'the VM %r' % machine.name for machine in self.box.machines_now()
                if machine.settingsFilePath == path), NOT_REGISTERED)))

    def _check_ostype(self, ostype: str) -> None:
        known = [each.id for each in self.box.array(self.box.vbox, 'guestOSTypes')] if ostype else ['']
        if ostype not in known:
            raise InvalidParams('VirtualBox knows no ostype %r; `VBoxManage list ostypes` lists them'
                                % ostype)

    def register_vm(self, job: Job, name: str, folder: str, owner: str = '') -> bool:
        wish = wishes({'folder': folder, 'owner': owner}, self.box.network['mode'])
        check_name(name)
        path = self._path_of(name, wish)
        if not os.path.isfile(path):
            return False
        self._forget_moved(path)
        uuid = self.box.find(self._register(job, path)).id
        if owner:
            self.box.vbox.setExtraData(OWNER + uuid, owner)
        return True

    def _forget_moved(self, path: str) -> None:
        """Takes out a VM whose settings are there now, and no longer where VirtualBox knows them."""
        for machine in self.box.array(self.box.vbox, 'machines'):
            known = self.box.if_there(lambda each: each.settingsFilePath, machine) or path
            if is_moved(known, path):
                follow_move(known, path)
                machine.unregister(self.box.const('CleanupMode_UnregisterOnly'))

    def _register(self, job: Job, path: str) -> str:
        if not os.path.isfile(path):
            raise InvalidParams('no such file: %s' % path)
        if not os.path.getsize(path) and os.path.isfile(path + PREVIOUS):
            raise HypervisorError('%s is empty, as VirtualBox leaves it where the disk is full: make room, '
                                  'and copy %s over it' % (path, path + PREVIOUS))
        for machine in self.box.array(self.box.vbox, 'machines'):       # those that can't be read, too
            there = self.box.if_there(lambda each: each.settingsFilePath, machine) or ''
            if os.path.abspath(there) == path:
                raise AlreadyExists('%s is registered already' % path)
        machine = self._open(job, path)
        check_is_no_id(machine.name)
        if machine.name in [each.name for each in self.box.machines_now()]:
            raise AlreadyExists('there is a VM %r already' % machine.name)
        self.box.vbox.registerMachine(machine)
        return machine.name

    def _open(self, job: Job, path: str) -> Any:
        """Seen with 7.2: a saved VM that was just taken out is an invalid argument; soon it isn't."""
        password, until = ('',) if self.box.api() >= (7, 0) else (), time.monotonic() + NOT_READY
        while True:
            try:
                return self.box.vbox.openMachine(path, *password)
            except Exception as error:
                if self.box.code(error) != INVALID_ARGUMENT or time.monotonic() > until:
                    raise
            job.wait(0.1)

    def _build(self, job: Job, name: str, image: str, kind: str, wish: Dict[str, Any]) -> None:
        machine = self._new_machine(name, wish)
        disk = None
        try:
            disk = self._new_disk(job, machine, image, kind, wish)
            if disk is not None:
                check_still_there(disk.location)
            self.box.edit(job, machine, lambda mutable: self._fit_out(
                mutable, wish, disk, image if kind == '.iso' else ''))
        except BaseException:
            self._remove_half_made(machine, disk)
            raise

    def _new_machine(self, name: str, wish: Dict[str, Any]) -> Any:
        """Registered at once, marked as half made: if we die now, cleanup will find it."""
        ostype, path = wish['ostype'] or 'Linux_64', self._path_of(name, wish)
        if self.box.api() >= (7, 1):
            arch = self.box.vbox.getGuestOSType(ostype).platformArchitecture
            arguments = [path, name, arch, [], ostype, '', '', '', '']
        elif self.box.api() >= (7, 0):
            arguments = [path, name, [], ostype, '', '', '', '']
        else:
            arguments = [path, name, [], ostype, '']
        with self._taking(name):
            machine = self.box.vbox.createMachine(*arguments)
        machine.applyDefaults('')
        machine.setExtraData(MADE_BY_US, machine.id)
        machine.setExtraData(MAKING, machine.id)
        with self._taking(name):
            machine.saveSettings()
            self.box.vbox.registerMachine(machine)
        return machine

    def _remove_half_made(self, machine: Any, disk: Any = None) -> None:
        """And the new disk, which it may not have attached yet."""
        try:
            note = IMPORTING + machine.name
            if disk is not None and not self.box.array(disk, 'machineIds'):
                self._disks.take_away(disk)
            path = machine.settingsFilePath
            self._disks.delete(machine, self._disks.is_made)[0].waitForCompletion(10000)
            self._disks.forget_removing(path)
            self.box.vbox.setExtraData(note, '')
        except Exception as error:
            log.warning('a half-made VM is left for cleanup: %s', self.box.translate(error))

    def _new_disk(self, job: Job, machine: Any, image: str, kind: str, wish: Dict[str, Any]) -> Any:
        copied, size = image and kind != '.iso', wish['diskSize']
        if not copied and size == 0:
            return None
        path = os.path.join(os.path.dirname(machine.settingsFilePath), machine.name + '.vdi')
        check_is_free(path)
        disk = self.box.vbox.createMedium('VDI', path,
                                          self.box.const('AccessMode_ReadWrite'),
                                          self.box.const('DeviceType_HardDisk'))
        self._disks.expect(disk.location)
        variant = [self.box.const('MediumVariant_Standard')]
        if copied and wish['linked']:
            self._lay_on(job, image, disk, variant)
        elif copied:
            self._copy_disk(job, image, disk, variant)
        else:
            megabytes = self._default_size(machine) if size is None else size
            self.box.finish(job, disk.createBaseStorage(megabytes << 20, variant), 'making a disk')
        self._disks.remember(disk)
        return disk

    def _default_size(self, machine: Any) -> int:
        return max(1024, self.box.vbox.getGuestOSType(machine.OSTypeId).recommendedHDD >> 20)

    def _lay_on(self, job: Job, image: str, disk: Any, variant: List[int]) -> None:
        """A differencing disk: what is written goes there, and the image is only read, by all on it."""
        with self._opening(image):
            source = self._disks.open(image)
        try:
            self._check_room_of_users(source)
            with self._reading(image, BROKEN):
                self.box.finish(job, source.createDiffStorage(disk, variant), 'making a disk on the image')
        except BaseException:
            self._drop_source(source, False)
            raise

    def _copy_disk(self, job: Job, image: str, disk: Any, variant: List[int]) -> None:
        own_copy = False
        try:
            source = self._disks.open(image)
        except Exception as error:
            if self.box.code(error) != OBJECT_NOT_FOUND:
                raise
            own_copy = True
            with self._opening(image):
                source = self._open_twin(job, image, os.path.dirname(disk.location))
        try:
            self._check_room_of_users(source)
            with self._reading(image, BROKEN):
                self.box.finish(job, self._clone(source, disk, variant), 'copying the disk')
        finally:
            self._drop_source(source, own_copy)

    @contextlib.contextmanager
    def _opening(self, image: str) -> Iterator[None]:
        """Names the image, of which VirtualBox says no more than that an object does not exist."""
        try:
            yield
        except Exception as error:
            if self.box.code(error) != OBJECT_NOT_FOUND:
                raise
            raise HypervisorError(unfit(image, str(self.box.translate(error))))

    def _check_room_of_users(self, disk: Any) -> None:
        """Raises HypervisorError where there is none for the settings of a VM that has this disk: VirtualBox
        writes them, too, where the disk is copied, or another one laid on it."""
        for uuid in self.box.array(disk, 'machineIds'):
            machine = self.box.vbox.findMachine(uuid)
            check_room(machine.name, machine.settingsFilePath)

    def _clone(self, source: Any, disk: Any, variant: List[int]) -> Any:
        try:
            return source.cloneTo(disk, variant, None)
        except Exception as error:
            if self.box.code(error) not in (INVALID_OBJECT_STATE, OBJECT_IN_USE):
                raise
            raise Busy('%s is locked: %s uses it (%s)' % (
                source.location, either([self.box.vbox.findMachine(each).name for each in self.box.array(
                    source, 'machineIds')] or ['another program'], 'and'), self.box.translate(error)))

    def _drop_source(self, source: Any, own_copy: bool) -> None:
        """VirtualBox goes on with a copying that was broken off, and then refuses: cleanup finds our copy."""
        try:
            if own_copy:
                twin = source.location
                source.deleteStorage().waitForCompletion(10000)
                self._disks.forget_expected(twin)
            elif not self.box.array(source, 'machineIds'):
                source.close()
        except Exception as error:
            log.info('an image stays open: %s', self.box.translate(error))

    def _open_twin(self, job: Job, image: str, folder: str) -> Any:
        """Of a copy of a disk that VirtualBox knows: both have the same uuid, so it opens neither
        the copy nor, without writing into it, gives it another. A copy of the copy gets one."""
        twin = os.path.join(folder, 'copy-of-' + os.path.basename(image))
        self._disks.expect(twin)
        try:
            self._copy_file(job, image, twin)
            return self._disks.open(twin, 'ReadWrite', True)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(twin)
            self._disks.forget_expected(twin)
            raise

    def _copy_file(self, job: Job, image: str, target: str) -> None:
        total = os.path.getsize(image) or 1
        with open(image, 'rb') as source, open(target, 'wb') as copy:
            for block in iter(lambda: source.read(4 << 20), b''):
                copy.write(block)
                job.report(100 * source.tell() // total, 'copying the image')
        job.renew_deadline()

    def _fit_out(self, machine: Any, wish: Dict[str, Any], disk: Any, iso: str) -> None:
        """The disk last: one attached in vain counts as in use until VirtualBox ends (seen with 7.2)."""
        self._apply(machine, wish)
        if iso:
            with self._opening(iso):
                medium = self.box.vbox.openMedium(iso, self.box.const('DeviceType_DVD'),
                                                  self.box.const('AccessMode_ReadOnly'), False)
            self._insert(machine, medium)
        if disk is not None:
            bus, port = self._free_place(machine, ('SATA', 'SCSI', 'VirtioSCSI', 'IDE'))
            machine.attachDevice(bus, port, 0, self.box.const('DeviceType_HardDisk'), disk)
        machine.saveSettings()
        self._finish(machine, wish)

    def _free_place(self, machine: Any, kinds: Tuple[str, ...]) -> Tuple[str, int]:
        buses = self.box.manager.constants.all_values('StorageBus')
        for kind in kinds:
            for controller in self.box.array(machine, 'storageControllers'):
                if controller.bus == buses.get(kind):
                    return controller.name, self._free_port_of(machine, controller)
        controller = machine.addStorageController('SATA', buses['SATA'])
        controller.portCount = 2
        return controller.name, 0

    def _free_port_of(self, machine: Any, controller: Any) -> int:
        used = {place.port for place in self.box.array(machine, 'mediumAttachments')
                if place.controller == controller.name}
        free = [port for port in range(controller.maxPortCount) if port not in used]
        if free[0] >= controller.portCount:
            controller.portCount = free[0] + 1
        return free[0]

    def _insert(self, machine: Any, medium: Any) -> None:
        """Into the drive that the machine has, else into a new one."""
        dvd = self.box.const('DeviceType_DVD')
        for place in self.box.array(machine, 'mediumAttachments'):
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
        self._cards.give(machine, wish['network'], wish['forwards'])
        self._cards.bridge(machine, wish['bridged'])
        if wish['owner']:
            self.box.vbox.setExtraData(OWNER + machine.id, wish['owner'])
        machine.setExtraData(MADE_BY_US, machine.id)

    def _finish(self, machine: Any, wish: Dict[str, Any]) -> None:
        """Once it has all that it is to have: VirtualBox saves a mark at once, and nothing else with it.
        `cleanup` passes a VM over that is kept, but not a disk that it hasn't got."""
        if wish['keep']:
            machine.setExtraData(KEEP, machine.id)
        machine.setExtraData(MAKING, '')

    def _import(self, job: Job, name: str, image: str, wish: Dict[str, Any]) -> None:
        """VirtualBox registers the VM when all its disks are there; until then a note of ours
        says whose it will be."""
        appliance = self.box.vbox.createAppliance()
        with self._reading(image, ''):
            self.box.finish(job, appliance.read(image), 'reading the appliance')
        appliance.interpret()
        systems = self.box.array(appliance, 'virtualSystemDescriptions')
        if len(systems) != 1:
            raise NotSupported('%s holds %d machines, not one' % (image, len(systems)))
        self._check_licence(systems[0], image, wish['acceptEula'])
        path = self._path_of(name, wish)
        self._rename_system(systems[0], name, path)
        note, is_new = IMPORTING + name, not os.path.exists(os.path.dirname(path))
        self.box.vbox.setExtraData(note, path)
        self._expect_disks(systems[0], os.path.dirname(path))
        try:
            with self._reading(image, BROKEN):
                self.box.finish(job, appliance.importMachines([]), 'importing')
        except Exception as error:                  # VirtualBox goes on, or died: what comes is ours
            if not isinstance(error, DeadlineExceeded) and not self.box.is_dead(error):
                self._disks.delete_left_in(os.path.dirname(path))
                self._disks.forget_in(os.path.dirname(path))
                if is_new:
                    with contextlib.suppress(OSError):      # there is something in it
                        os.rmdir(os.path.dirname(path))
            raise
        machine = self.box.vbox.findMachine(self.box.array(appliance, 'machines')[0])
        try:
            for disk in self._disks.of(machine):
                self._disks.remember(disk)
            self.box.edit(job, machine, lambda mutable: self._take_in(mutable, wish))
        except BaseException:
            self._remove_half_made(machine)
            raise
        self.box.vbox.setExtraData(note, '')

    def _take_in(self, machine: Any, wish: Dict[str, Any]) -> None:
        close_doors(self.box, machine)
        self._apply(machine, wish)
        self._finish(machine, wish)

    def _check_licence(self, system: Any, image: str, accepted: bool) -> None:
        kind = self.box.const('VirtualSystemDescriptionType_License')
        kinds, _, _, values, _ = system.getDescription()
        texts = [value for each, value in zip(kinds, values) if each == kind and value]
        if texts and not accepted:
            raise BadState('%s comes under a licence; once you accept it (createVM option acceptEula, '
                           'create --accept-eula) it is imported:\n%s' % (image, '\n'.join(texts)))

    def _rename_system(self, system: Any, name: str, path: str) -> None:
        kinds, _, _, values, extra = system.getDescription()
        renamed = {self.box.const('VirtualSystemDescriptionType_Name'): name,
                   self.box.const('VirtualSystemDescriptionType_SettingsFile'): path}
        values = [renamed.get(kind, value) for kind, value in zip(kinds, values)]
        system.setFinalValues([True] * len(kinds), values, extra)

    def _expect_disks(self, system: Any, folder: str) -> None:
        """Notes the disks that an import will make: the VM that has them is there at its end alone."""
        disk = self.box.const('VirtualSystemDescriptionType_HardDiskImage')
        kinds, _, _, values, _ = system.getDescription()
        for kind, value in zip(kinds, values):
            location = os.path.normpath(os.path.join(folder, value))
            if kind == disk and not os.path.exists(location):
                self._disks.expect(location)


# --- disks, and what was left behind -----------------------------------------------------------

class Disks:
    """Disks: opening and deleting them, and the notes of which are ours.

    The note of a disk that is there has its uuid: it may be moved. One that is about to be made has none
    yet, so its note has the path, and when it began.
    """

    def __init__(self, box: Connection) -> None:
        self.box = box

    def open(self, image: str, mode: str = 'ReadOnly', new_uuid: bool = False) -> Any:
        return self.box.vbox.openMedium(image, self.box.const('DeviceType_HardDisk'),
                                        self.box.const('AccessMode_' + mode), new_uuid)

    def of(self, machine: Any) -> List[Any]:
        disk = self.box.const('DeviceType_HardDisk')
        return [place.medium for place in self.box.array(machine, 'mediumAttachments')
                if place.type == disk and place.medium]

    def all(self) -> List[Any]:
        """All that VirtualBox knows, those that lie on others, too."""
        found = list(self.box.array(self.box.vbox, 'hardDisks'))
        for disk in found:                          # which grows
            found += self.box.array(disk, 'children')
        return found

    # Notes.

    def expect(self, path: str) -> None:
        """A disk will be made there."""
        self.box.vbox.setExtraData(EXPECTED + path, begun_now())

    def remember(self, disk: Any) -> None:
        """It is there, and ours."""
        self.box.vbox.setExtraData(DISK_MADE + disk.id, disk.location)
        self.forget_expected(disk.location)

    def forget(self, uuid: str, path: str) -> None:
        """It is gone, or about to go."""
        self.box.vbox.setExtraData(DISK_MADE + uuid, '')
        self.forget_expected(path)

    def forget_expected(self, path: str) -> None:
        self.box.vbox.setExtraData(EXPECTED + path, '')

    def is_made(self, medium: Any) -> bool:
        """Whether we made this disk, or the one that it lies on."""
        while medium:
            if self.box.vbox.getExtraData(DISK_MADE + medium.id) or is_recent(
                    medium.location, self.box.vbox.getExtraData(EXPECTED + medium.location)):
                return True
            medium = medium.parent
        return False

    def made(self) -> List[Tuple[str, str]]:
        """(uuid, path where it was made) of the disks that we made."""
        keys = [key for key in self.box.vbox.getExtraDataKeys() if key.startswith(DISK_MADE)]
        return [(key[len(DISK_MADE):], self.box.vbox.getExtraData(key)) for key in keys]

    def expected(self) -> List[Tuple[str, str]]:
        """(path, when it began) of the disks that were to be made."""
        keys = [key for key in self.box.vbox.getExtraDataKeys() if key.startswith(EXPECTED)]
        return [(key[len(EXPECTED):], self.box.vbox.getExtraData(key)) for key in keys]

    def forget_in(self, folder: str) -> None:
        """Drops the notes of what was to come in this folder and didn't: what lies there later isn't ours."""
        for key, path, begun in self._begun():
            if os.path.dirname(path) == folder and not is_recent(path, begun):
                self.box.vbox.setExtraData(key, '')

    def delete_left_in(self, folder: str) -> None:
        """What a failed import made there, and VirtualBox knows no longer. It deletes that itself, as a rule;
        where it is the settings that it doesn't like, the disks stay, however large."""
        known = {disk.location for disk in self.all()}
        for path, begun in self.expected():
            if path.startswith(os.path.join(folder, '')) and is_recent(path, begun) and path not in known:
                with contextlib.suppress(OSError):      # cleanup will find it
                    os.remove(path)

    def _begun(self) -> List[Tuple[str, str, str]]:
        """(key of the note, path, when it began) of unfinished disks, and of the .vbox files that imports
        make."""
        imports = [key for key in self.box.vbox.getExtraDataKeys() if key.startswith(IMPORTING)]
        return [(EXPECTED + path, path, begun) for path, begun in self.expected()] + [
            (key, self.box.vbox.getExtraData(key), '0') for key in imports]

    def forget_what_never_came(self, making: List[str]) -> None:
        """As forget_in, for whatever a host began that has died, but for the folders where VMs are being
        made. The sooner the better: a user may put files of his own there."""
        if not self.work_goes_on():
            begun = {os.path.dirname(path) for _, path, _ in self._begun()}
            for folder in begun.difference(making):
                self.forget_in(folder)

    def in_the_making(self) -> List[str]:
        """The folders of VMs that processes of any host agent are just making. Forgets those that died, and
        left nothing."""
        folders = []
        for key in self.box.vbox.getExtraDataKeys():
            note = self.box.vbox.getExtraData(key) if key.startswith(MAKER) else ''
            if note and is_at_work(note):
                folders.append(key[len(MAKER):])
            elif note and not leavings_in(key[len(MAKER):]):
                self._forget_maker(key, note)
        return folders

    def _forget_maker(self, key: str, note: str) -> None:
        """Once WRITES_LATER seconds have gone since it was first seen to be dead."""
        now = int(time.time())
        word, _, since = note.partition(' ')
        if abs(now - (int(since) if word == DIED else now)) >= WRITES_LATER:
            self.box.vbox.setExtraData(key, '')
        elif word != DIED:
            self.box.vbox.setExtraData(key, '%s %d' % (DIED, now))

    def makers_folders(self) -> List[str]:
        """Of VMs that are being made, and of those whose maker died and left settings."""
        return [key[len(MAKER):] for key in self.box.vbox.getExtraDataKeys() if key.startswith(MAKER)]

    def work_goes_on(self) -> bool:
        """Whether VirtualBox is at work: it goes on with what a host began that has died."""
        return bool(self.box.array(self.box.vbox, 'progressOperations'))

    # Deleting.

    def delete(self, machine: Any, wanted: Callable[[Any], bool]) -> Tuple[Any, List[List[str]]]:
        """Unregisters and deletes the VM's files, and of those of its disks that nothing else needs the
        wanted ones. Gives the Progress, and [path, why] of the disks that are kept, images apart. Notes what
        goes, so that cleanup finds it if we die meanwhile: once done, who calls it has to forget_removing."""
        uuid, path = machine.id, machine.settingsFilePath
        self.box.vbox.setExtraData(REMOVING + path, removal_of(path, uuid))
        try:
            had = self._unregister(machine)
        except Exception:
            self.forget_removing(path)
            raise
        self.box.vbox.setExtraData(REMOVING + path, removal_of(path, uuid))     # it may be written by that
        media, images = self._unused(had), self.images_under(had)      # these are never ours, who wants them
        unused = {medium.id for medium in media}
        reasons = {medium.base.location: 'needed by ' + self._users(medium) for medium in had
                   if medium.id not in unused and medium.id not in images}
        kept = [medium for medium in media if medium.id in images or not wanted(medium)]
        media = [medium for medium in media if medium not in kept]
        noted = [(medium.id, medium.location) for medium in media
                 if not medium.parent or self.is_noted(medium)]
        for medium in kept:
            if medium.id not in images:
                reasons[medium.base.location] = ELSEWHERE
                if medium.parent:
                    reasons[medium.location] = WRITTEN_OVER % medium.base.location
        progress = machine.deleteConfig([medium for medium in media if not self._close_gone(medium)])
        for disk, location in noted:
            self.forget(disk, location)
        return progress, [[path, why] for path, why in sorted(reasons.items())]

    def _unregister(self, machine: Any) -> List[Any]:
        """The disks that it had. Whoever looks at a VM by VBoxManage locks it for a moment."""
        until = time.monotonic() + NOT_READY
        while True:
            try:
                return list(machine.unregister(self.box.const('CleanupMode_DetachAllReturnHardDisksOnly')))
            except Exception as error:
                if self.box.code(error) != INVALID_OBJECT_STATE or time.monotonic() > until:
                    raise
            time.sleep(0.1)

    def forget_removing(self, path: str) -> None:
        """Of a VM that is gone, with all that was to go with it."""
        self.box.vbox.setExtraData(REMOVING + path, '')

    def half_removed(self, listed: List[str]) -> List[str]:
        """The .vbox files of VMs whose removal was cut short. Forgets those that are gone, altered since, or
        listed again."""
        found = []
        for key in self.box.vbox.getExtraDataKeys():
            path = key[len(REMOVING):] if key.startswith(REMOVING) else ''
            if path and os.path.exists(path) and os.path.realpath(path) not in listed \
                    and self.box.vbox.getExtraData(key) == removal_of(
                        path, self.box.vbox.getExtraData(key).partition(' ')[0]):
                found.append(path)
            elif path:
                self.box.vbox.setExtraData(key, '')
        return found

    def _users(self, medium: Any) -> str:
        """Who has a disk, or one that lies on it."""
        users, disks = [], [medium]
        for disk in disks:                          # which grows
            users += self.box.array(disk, 'machineIds')
            disks += self.box.array(disk, 'children')
        names = sorted(machine.name for machine in self.box.machines_now() if machine.id in users)
        return either(names, 'and') if names else 'a disk that lies on it'

    def take_away(self, disk: Any) -> None:
        """A disk that we made and that nothing uses."""
        uuid, path = disk.id, disk.location
        if not self._close_gone(disk):
            disk.deleteStorage().waitForCompletion(10000)
        self.forget(uuid, path)

    def _close_gone(self, medium: Any) -> bool:
        """Whether a disk's file isn't there any more: VirtualBox, which can't delete it, forgets it then."""
        if not os.path.isabs(medium.location) or os.path.lexists(medium.location):
            return False
        try:
            medium.close()
        except Exception as error:                  # another disk lies on it, perhaps
            log.info('%s, whose file is gone, stays known: %s', medium.location, self.box.translate(error))
            return False
        return True

    def images_under(self, media: List[Any]) -> Dict[str, Any]:
        """{uuid: disk} of the images on which disks lie that createVM made, at the bottom of these."""
        found = {}
        for medium in media:
            while medium and medium.parent:
                if self.is_noted(medium):
                    found[medium.parent.id] = medium.parent
                medium = medium.parent
        return found

    def close_unused(self, images: Dict[str, Any]) -> None:
        """Has VirtualBox forget images on which nothing lies any more; their files stay."""
        for image in images.values():
            try:
                if not self.box.array(image, 'machineIds') and not self.box.array(image, 'children'):
                    image.close()
            except Exception as error:
                log.info('an image stays open: %s', self.box.translate(error))

    def is_noted(self, medium: Any) -> bool:
        """Whether createVM made this very disk."""
        return bool(self.box.vbox.getExtraData(DISK_MADE + medium.id))

    def _unused(self, media: List[Any]) -> List[Any]:
        """Of the disks that a VM had, and its snapshots: those that no other VM has attached, nor a disk
        that lies on them, such as a linked clone's."""
        had = {medium.id for medium in media}
        needed = set()  # type: set
        for medium in media:
            if self.box.array(medium, 'machineIds') or {
                    child.id for child in self.box.array(medium, 'children')} - had:
                while medium and medium.id not in needed:
                    needed.add(medium.id)
                    medium = medium.parent
        return [medium for medium in media if medium.id not in needed]


class Cleaning:
    """Removing VMs, and what a host that died has left."""

    def __init__(self, box: Connection, disks: Disks) -> None:
        self._disks = disks
        self.box = box

    def remove_vm(self, job: Job, vm: str, delete_disks: bool = False,
                  all_disks: bool = False) -> List[List[str]]:
        machine = self.box.find_any(vm)
        if not machine.accessible:
            folder = os.path.dirname(machine.settingsFilePath)
            machine.unregister(self.box.const('CleanupMode_UnregisterOnly'))
            return files_of_unreadable(folder) if delete_disks or all_disks else []
        machine = self.box.ready(job, vm, 'remove_vm')
        self.box.vbox.setExtraData(MAKER + os.path.dirname(machine.settingsFilePath), '')      # it was made
        if machine.sessionState != self.box.const('SessionState_Unlocked'):
            self.box.unlock(self.box.lock(job, machine))       # waits, or says Busy
        if not delete_disks and not all_disks:
            machine.unregister(self.box.const('CleanupMode_UnregisterOnly'))
            return []
        folder = os.path.realpath(os.path.dirname(machine.settingsFilePath))

        def belongs(medium: Any) -> bool:
            inside = os.path.realpath(medium.base.location).startswith(folder + os.sep)
            return all_disks or inside or self._disks.is_made(medium)
        return self._delete(job, machine, belongs)

    def _delete(self, job: Job, machine: Any, wanted: Callable[[Any], bool]) -> List[List[str]]:
        """The VM, its files, and those of its disks that are wanted; gives [path, why] of the others."""
        images = self._disks.images_under(self._disks.of(machine))
        uuid, path = machine.id, machine.settingsFilePath
        owner = OWNER + uuid
        progress, kept = self._disks.delete(machine, wanted)
        self.box.finish(job, progress, 'deleting')
        self._disks.forget_removing(path)
        self.box.vbox.setExtraData(MAKES + uuid, '')
        self.box.vbox.setExtraData(owner, '')
        self._disks.close_unused(images)
        return kept

    def cleanup(self, job: Job, dry_run: bool = True, vms: List[str] = [], owner: str = ''  # noqa: B006
                ) -> List[Dict[str, str]]:
        making = self._folders_in_the_making(job)       # once: a maker that dies now is dead for the next one
        self._disks.forget_what_never_came(making)
        rows = self._left_of(job, vms, owner) if owner else (
            self._left_vms(job, vms, making) + self._left_disks(job, making) + self._left_settings(making)
            + self._left_of_removed(making))
        if dry_run:
            return [row for row, _ in rows]
        return [row if row['kind'] == 'kept' else self._after(row, remove) for row, remove in rows]

    def _after(self, row: Dict[str, str], remove: Callable[[], None]) -> Dict[str, str]:
        """Removes it; the row, or what it is then. What can't be removed mustn't hide what was, nor keep the
        rest."""
        try:
            remove()
            return row
        except Exception as error:
            if self.box.is_dead(error):
                raise
            told = self.box.translate(error)
            log.warning('cleanup could not remove the %s %s: %s', row['kind'], row['name'], told)
            return {'kind': 'kept', 'name': row['name'], 'why': 'could not be removed: %s' % told}

    # VMs.

    def _left_vms(self, job: Job, named: List[str], making: List[str]) -> List[Tuple[Dict[str, str], Any]]:
        wanted = {self.box.find(vm).id for vm in named}
        rows = []  # type: List[Tuple[Dict[str, str], Any]]
        for machine in self.box.machines_now():
            why = self._why_left(job, machine, machine.id in wanted)
            if why and os.path.dirname(machine.settingsFilePath) not in making:
                rows.append(({'kind': 'vm', 'name': machine.name, 'why': why},
                             lambda machine=machine: self._remove_vm(job, machine)))
            elif machine.id in wanted:
                rows.append(({'kind': 'kept', 'name': machine.name, 'why': self._why_kept(machine, making)},
                             None))
        return rows

    def _why_kept(self, machine: Any, making: List[str]) -> str:
        """Of one that was named."""
        if os.path.dirname(machine.settingsFilePath) in making:
            return 'it is just being made'
        if has_mark(machine, KEEP):
            return '`keep` excludes it'
        if not has_mark(machine, MADE_BY_US):
            return '`create` did not make it'
        if self.box.state_of(machine) not in OFF:
            return 'it is %s, and not off' % self.box.state_of(machine)
        return 'somebody is at work with it'

    def _left_of(self, job: Job, named: List[str], owner: str) -> List[Tuple[Dict[str, str], Any]]:
        """The VMs of an owner, and nobody else's: those that are named, and those whose folder is gone."""
        rows = []  # type: List[Tuple[Dict[str, str], Any]]
        for machine in self.box.machines_now():
            if self._owner_of(machine) == owner and {machine.name, machine.id} & set(named) \
                    and self._may_go(job, machine, OFF + SAVED):
                rows.append(({'kind': 'vm', 'name': machine.name, 'why': 'named'},
                             lambda machine=machine: self._remove_vm(job, machine)))
        for machine in self.box.unreadable():
            if self._owner_of(machine) == owner and not os.path.exists(machine.settingsFilePath):
                rows.append(({'kind': 'vm', 'name': name_in_path(machine), 'why': 'its folder is gone'},
                             lambda machine=machine: self._forget_vm(machine)))
        return rows

    def _owner_of(self, machine: Any) -> str:
        return str(self.box.vbox.getExtraData(OWNER + machine.id))

    def _may_go(self, job: Job, machine: Any, states: Tuple[str, ...]) -> bool:
        """Whether it is ours, nobody uses it, and it isn't to be kept."""
        busy = {vm for _, vm in job.others} & {machine.name, machine.id, self.box.id_of(machine)}
        unlocked = machine.sessionState == self.box.const('SessionState_Unlocked')
        return not busy and unlocked and not has_mark(machine, KEEP) and has_mark(machine, MADE_BY_US) \
            and self.box.state_of(machine) in states \
            and os.path.dirname(machine.settingsFilePath) not in self._disks.in_the_making()

    def _forget_vm(self, machine: Any) -> None:
        """Of which nothing is there any more."""
        owner = OWNER + machine.id
        machine.unregister(self.box.const('CleanupMode_UnregisterOnly'))
        self.box.vbox.setExtraData(owner, '')

    def _why_left(self, job: Job, machine: Any, named: bool) -> str:
        """Why this VM may go, '' when it must not."""
        busy = {vm for _, vm in job.others} & {machine.name, machine.id, self.box.id_of(machine)}
        if has_mark(machine, KEEP) or busy or machine.sessionState != self.box.const('SessionState_Unlocked'):
            return ''
        if has_mark(machine, MAKING) or self._import_left(job, machine) or self._maker_died(machine):
            return 'half made'
        ours = has_mark(machine, MADE_BY_US) and self.box.state_of(machine) in OFF
        return 'named' if named and ours else ''

    def _maker_died(self, machine: Any) -> bool:
        """Whether a process was about to make this very VM, by its uuid, and died before it had its marks."""
        note = self.box.vbox.getExtraData(MAKES + machine.id)
        return bool(note) and not is_at_work(note)

    def _import_left(self, job: Job, machine: Any) -> bool:
        path = self.box.vbox.getExtraData(IMPORTING + machine.name)
        return bool(path) and path == machine.settingsFilePath

    def _remove_vm(self, job: Job, machine: Any) -> None:
        self._delete(job, machine, self._disks.is_made)

    # Disks.

    def _left_disks(self, job: Job, making: List[str]) -> List[Tuple[Dict[str, str], Any]]:
        """The disks that we made and that no VM has attached, nor a disk that lies on them.

        A VM that VirtualBox can't read may use any disk: then none that is whole goes; nor one of a VM that
        isn't listed, but has its settings beside it. Nothing unfinished is left while VirtualBox works.
        """
        known = {disk.id: disk for disk in self._disks.all()}
        unread = [name_in_path(machine) for machine in self.box.unreadable()]
        rows = []  # type: List[Tuple[Dict[str, str], Any]]
        for uuid, path in self._disks.made():
            disk = known.get(uuid)
            path = disk.location if disk is not None else path
            if os.path.dirname(path) in making or (disk is not None and self._is_used(disk)):
                continue
            another = disk is None and (path in [each.location for each in known.values()]
                                        or imagefiles.uuid_in_vdi(path) not in ('', uuid))
            if another or not os.path.exists(path):
                self.box.vbox.setExtraData(DISK_MADE + uuid, '')
                continue
            why = ('VirtualBox can\'t read %s, which may use it' % either(unread, 'and') if unread
                   else self._unlisted_user(uuid, path))
            if why:
                rows.append(({'kind': 'kept', 'name': path, 'why': why}, None))
            else:
                rows.append(({'kind': 'disk', 'name': path, 'why': 'no VM uses it'},
                             lambda uuid=uuid, path=path: self._remove_disk(job, path, uuid)))
        for path, begun in self._disks.expected():
            if os.path.dirname(path) in making:
                continue
            if self._disks.work_goes_on():
                if is_recent(path, begun) and not self._is_used_at(path):
                    why = 'VirtualBox is at work, perhaps at this one: cleanup takes it later'
                    rows.append(({'kind': 'kept', 'name': path, 'why': why}, None))
            elif not is_recent(path, begun):
                self._disks.forget_expected(path)
            elif not self._is_used_at(path):
                rows.append(({'kind': 'disk', 'name': path, 'why': 'half made'},
                             lambda path=path: self._remove_disk(job, path, '')))
        return rows

    def _left_settings(self, making: List[str]) -> List[Tuple[Dict[str, str], Any]]:
        """What was written of a VM whose maker died before VirtualBox listed it, or had its disk: nobody else
        could make one of that name."""
        return [({'kind': 'vm', 'name': path, 'why': 'half made'},
                 lambda folder=folder: remove_leavings(folder))  # type: ignore
                for folder in self._disks.makers_folders()
                if folder not in making and not self._is_folder_of_vm(folder)
                for path in leavings_in(folder)]

    def _left_of_removed(self, making: List[str]) -> List[Tuple[Dict[str, str], Any]]:
        """Settings of VMs whose removal was cut short, after their disks."""
        if self._disks.work_goes_on():
            return []
        return [({'kind': 'vm', 'name': path, 'why': 'half removed'},
                 lambda path=path: self._remove_settings(path))  # type: ignore
                for path in self._disks.half_removed(self._listed()) if os.path.dirname(path) not in making]

    def _remove_settings(self, path: str) -> None:
        for each in (path, path + PREVIOUS):
            with contextlib.suppress(FileNotFoundError):
                os.remove(each)
        self._disks.forget_removing(path)
        with contextlib.suppress(OSError):          # there is something else in it, such as the VM's log
            os.rmdir(os.path.dirname(path))

    def _listed(self) -> List[str]:
        """Where the settings are of the VMs that VirtualBox lists."""
        return [os.path.realpath(machine.settingsFilePath)
                for machine in self.box.array(self.box.vbox, 'machines')]

    def _unlisted_user(self, uuid: str, path: str) -> str:
        """Why a disk stays whose VM somebody took out of VirtualBox's list, and may bring back: its settings
        are beside the disk. '' where there are none."""
        folder = os.path.dirname(path)
        listed = self._listed()
        if not self._disks.work_goes_on():
            listed += [os.path.realpath(each) for each in self._disks.half_removed(listed)]
        for settings in settings_in(folder):
            use = '' if os.path.realpath(settings) in listed else use_of(settings, uuid)
            if use:
                return ('the VM of %s %s it, which VirtualBox doesn\'t list: `create` of that file brings '
                        'it back' % (settings, use))
        return ''

    def _is_used(self, disk: Any) -> bool:
        return bool(self.box.array(disk, 'machineIds') or self.box.array(disk, 'children'))

    def _is_used_at(self, path: str) -> bool:
        """Whether a VM has what lies there, in its drive, too, or had it when VirtualBox last listed the VM:
        an appliance brings ISO images as it does disks."""
        known = self._disks.all() + list(self.box.array(self.box.vbox, 'DVDImages'))
        name = saxutils.escape(os.path.basename(path))
        return any(self._is_used(each) for each in known if os.path.normpath(each.location) == path) or any(
            name in settings_text(each) for each in settings_in(os.path.dirname(path)))

    def _folders_in_the_making(self, job: Job) -> List[str]:
        """Where VMs are being made, by whomever, or changed by this host agent, at this moment."""
        busy = [vm for _, vm in job.others]
        machines = self.box.machines_now() if busy else []
        paths = [machine.settingsFilePath for machine in machines if {machine.name, machine.id} & set(busy)]
        paths += [self.box.vbox.composeMachineFilename(vm, '', '', '') for verb, vm in job.others
                  if verb == 'create_vm']
        return [os.path.dirname(path) for path in paths] + self._disks.in_the_making()

    def _remove_disk(self, job: Job, path: str, uuid: str) -> None:
        """uuid: the disk that was made there, '' where that was never finished."""
        try:
            medium = self._disks.open(path, 'ReadWrite')
        except Exception as error:
            if self.box.is_dead(error) or uuid:
                raise
            os.remove(path)                         # not even a disk yet, or still the twin of another
            self._disks.forget_expected(path)
        else:
            uuid = uuid or medium.id
            if medium.id != uuid:
                self.box.vbox.setExtraData(DISK_MADE + uuid, '')
                medium.close()                      # VirtualBox didn't know it before
                raise HypervisorError('%s is another disk than the one that was made there' % path)
            self.box.finish(job, medium.deleteStorage(), 'deleting a disk')
            self._disks.forget(uuid, path)
        if not self._is_folder_of_vm(os.path.dirname(path)):
            remove_leavings(os.path.dirname(path))

    def _is_folder_of_vm(self, folder: str) -> bool:
        """Whether a registered VM has its settings there; one that VirtualBox can't read is a VM, too."""
        return os.path.realpath(folder) in [
            os.path.realpath(os.path.dirname(machine.settingsFilePath))
            for machine in self.box.array(self.box.vbox, 'machines')]


def unfit(image: str, told: str) -> str:
    """What is said of an image that VirtualBox doesn't open; `told`: what it says, if that is anything."""
    return UNFIT % (image, '' if 'supplied arguments does not exist' in told else ' (%s)' % told)


def check_is_free(path: str) -> None:
    """The place of a new VM's disk. Raises AlreadyExists."""
    if os.path.lexists(path):
        raise AlreadyExists('%s lies where the new disk would be: move it away, or delete it' % path)


def check_still_there(path: str) -> None:
    """The new disk, before it is attached: where VirtualBox then can't write the VM's settings, it takes the
    disk for attached until it ends, and nobody can have it forget the disk."""
    if not os.path.exists(path):
        raise HypervisorError('%s is gone: somebody removed it while the VM was made' % path)


def files_of_unreadable(folder: str) -> List[List[str]]:
    """[path, why] of what is kept of a VM whose settings VirtualBox can't read, where there is anything."""
    return [[folder, 'VirtualBox can\'t read the VM: what is its own there, nobody can tell']] \
        if os.path.isdir(folder) else []


def check_name(name: str) -> None:
    """Raises InvalidParams where it is no name for one, HypervisorError where this Python writes none."""
    if not name.strip() or re.search(r'[/\\\x00-\x1f\x7f]', name) or name in ('.', '..'):
        raise InvalidParams('%r is no name for a VM, whose folder is called so: expected no /, no \\ and no '
                            'control characters' % name)
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise HypervisorError('%r is beyond ASCII, and in the locale C this Python writes no such name: run '
                              'the host agent with LC_ALL=C.UTF-8' % name) from None
    if len(name.encode('utf-8')) > LONGEST_NAME:
        raise InvalidParams('%.20s… is too long for the name of a VM, whose files are called so: '
                            '%d bytes, and %d at most' % (name, len(name.encode('utf-8')), LONGEST_NAME))
    check_is_no_id(name)


def check_is_no_id(name: str) -> None:
    """Whoever means a VM of that name would reach the one that has the id."""
    if is_mac(name) or UUID.match(name):
        raise InvalidParams('%r is an id, and no name for a VM' % name)


def wishes(options: Dict[str, Any], mode: str) -> Dict[str, Any]:
    """createVM's options, checked; None or '' where nothing was asked for. mode: that of [Network]."""
    wish = options_over({
        'memory': None, 'cpus': None, 'ostype': '', 'network': '', 'diskSize': None, 'keep': False,
        'acceptEula': False, 'linked': False, 'folder': '', 'owner': '', 'forwards': [], 'bridged': '',
    }, options, 'createVM')
    for name, least, most in (('memory', 4, LARGEST), ('cpus', 1, LARGEST), ('diskSize', 0, LARGEST_DISK)):
        if wish[name] is not None:
            wish[name] = option(name, wish[name], agent.integer(least, most))
    for name in ('folder', 'owner'):
        if not isinstance(wish[name], str) or not wish[name].isprintable():
            raise InvalidParams('%s: %.80r: expected text' % (name, wish[name]))
    if wish['folder'] and not os.path.isabs(wish['folder']):
        raise InvalidParams('folder: %.200s: expected an absolute path' % wish['folder'])
    for name in ('keep', 'acceptEula', 'linked'):
        wish[name] = option(name, wish[name], agent.yes_no)
    if wish['network'] not in ('', 'hostonly', 'nat', 'none'):
        raise InvalidParams('network is hostonly, nat or none, not %r' % wish['network'])
    wish['forwards'] = read_forwards(wish['forwards'])
    check_card(wish['forwards'], wish['network'] or mode)
    check_bridged(wish['bridged'], wish['network'] or mode)
    return wish


def names_its_own_mark(settings: str) -> bool:
    """has_mark of MADE_BY_US, from the text of a .vbox file."""
    uuid = re.search(r'<Machine\b[^>]*\suuid="{(.+?)}"', settings)
    return uuid is not None and 'name="%s" value="%s"' % (MADE_BY_US, uuid.group(1)) in settings


def use_of(settings: str, uuid: str) -> str:
    """How a VM has a disk, from its .vbox file, its snapshots included: 'uses', 'may use' where the file is
    torn or gone, '' for not at all."""
    text = settings_text(settings)
    if '</VirtualBox>' not in text:
        return 'may use'
    disk = re.escape(uuid.strip('{}'))
    used = re.search(r'<Image\b[^>]*\buuid="{%s}"|<HardDisk\b[^>]*\buuid="{%s}"[^>]*[^/>]>' % (disk, disk),
                     text, re.IGNORECASE)
    return 'uses' if used else ''


def settings_in(folder: str) -> List[str]:
    """The .vbox files in a folder, and those of which what they were before is left alone."""
    names = [name[:-len(PREVIOUS)] if name.endswith(PREVIOUS) else name for name in os.listdir(folder)]
    return [os.path.join(folder, name) for name in sorted(set(names)) if name.endswith('.vbox')]


def settings_text(path: str) -> str:
    """A .vbox file's text, '' where there is none."""
    try:
        with open(path, encoding='utf-8', errors='replace') as file:
            return file.read()
    except FileNotFoundError:
        return ''


def is_moved(known: str, path: str) -> bool:
    """Whether a .vbox file that VirtualBox knows there is no longer there, and now is at `path`."""
    return os.path.basename(known) == os.path.basename(path) and not os.path.exists(known)


def follow_move(before: str, path: str) -> None:
    """Rewrites a .vbox file that was moved with all around it, so that the paths in it are those of now:
    VirtualBox writes whole ones of what isn't below its folder, such as the image on which a disk lies.

    Raises OSError.
    """
    old, new = re.split(r'([/\\])', before), re.split(r'([/\\])', path)
    while old and new and old[-1] == new[-1]:
        old.pop(), new.pop()
    roots = [saxutils.escape(''.join(parts), {'"': '&quot;'}) for parts in (old, new)]
    with open(path, encoding='utf-8') as file:
        text = file.read()
    with open(path + '.moved', 'w', encoding='utf-8') as file:
        file.write(re.sub(r'="%s(?=[/\\"])' % re.escape(roots[0]), lambda found: '="' + roots[1], text))
    agent.replace(path + '.moved', path)


def check_fitting(options: Dict[str, Any], kind: str) -> None:
    """Options that would change nothing, since the image decides, are refused rather than forgotten."""
    if kind in ('', '.iso'):
        return
    decided = {'.vbox': tuple(options), '.ova': ('diskSize', 'ostype'), '.ovf': ('diskSize', 'ostype')}
    for name in decided.get(kind, ('diskSize',)):
        if options.get(name) not in (None, ''):
            raise InvalidParams('%s is no option where a VM is made from a %s file, which decides it'
                                % (name, kind))


def leavings_in(folder: str) -> List[str]:
    """The .vbox files of VMs of ours that have no disk, or none any more; whether registered or not."""
    return [path for path in (settings_in(folder) if os.path.isdir(folder) else ()) for text in [
        settings_text(path) or settings_text(path + PREVIOUS)]
        if names_its_own_mark(text) and not HAS_DISK.search(text)]


def remove_leavings(folder: str) -> None:
    """Settings of an unregistered VM of ours whose last disk has gone; and the folder, once empty."""
    for path in leavings_in(folder):
        for each in (path, path + PREVIOUS):
            with contextlib.suppress(FileNotFoundError):
                os.remove(each)
    if not os.listdir(folder):
        os.rmdir(folder)


def removal_of(path: str, uuid: str) -> str:
    """The note of a VM that is being removed: its uuid, and its .vbox file as it is; '' without one."""
    try:
        status = os.stat(path)
        return '%s %d %d' % (uuid, status.st_mtime_ns, status.st_size)
    except OSError:
        return ''


def note_of(pid: int) -> str:
    """A process, as `is_at_work` finds it: its number, and when it began where the system tells that.

    One that has ended has none, though nobody waited for it: the first process of many a container doesn't.
    """
    try:
        with open('/proc/%d/stat' % pid) as file:
            fields = file.read().rpartition(')')[2].split()
        return '%d %s' % (pid, fields[19]) if fields[0] not in 'ZX' else ''
    except OSError:
        return '%d ' % pid


def is_at_work(note: str) -> bool:
    """Whether the process of note_of is there, and no other one that got its number."""
    pid = note.partition(' ')[0]
    return pid.isdigit() and agent.is_alive(int(pid)) and note_of(int(pid)) == note


def begun_now() -> str:
    """For is_recent. Two seconds are what some file systems' clocks are off."""
    return '%d' % (time.time() - 2)


def is_recent(path: str, begun: str) -> bool:
    """Whether there is a file, and none that is older than `begun` says ('' for never)."""
    try:
        return bool(begun) and os.path.getmtime(path) >= int(begun)
    except OSError:
        return False
