"""A VirtualBox without VirtualBox: as much of vboxapi as the host agent uses, for the unit tests.

``install(folder)`` puts a module vboxapi there, for the PYTHONPATH of a host agent. What the fake does is
checked by running vm_cases.py on it and on the real one. All programs see the same VMs (fake_server.py); a
test that imports this has some of its own. Files in the folder FAKE_VIRTUALBOX steer it from outside:
``abort-NAME`` kills the VM's process, ``abort-saved-NAME`` over its saved state, ``die-NAME`` as it next
comes up, or is powered off; ``stick-NAME`` lets the guest stop with an error, ``lock-NAME`` is another
program that holds the VM's lock, ``dead`` is a VBoxSVC that died; ``card-NAME`` holds a new MAC for the
VM's first card; as many looks as ``anew-NAME`` has characters find a VM that VirtualBox is still making;
``slow-NAME`` holds how many seconds all Progress of a VM takes, after which its session is unlocking for a
moment.
"""

import itertools
import os
import time
import uuid

NOT_FOUND, BAD_STATE, OBJECT_STATE, IN_USE = 0x80bb0001, 0x80bb0002, 0x80bb0007, 0x80bb000c
FILE_ERROR, INVALID_ARGUMENT = 0x80bb0004, 0x80070057
CALL_FAILED, NOT_READY = 0x800706be, 0x80070005
VALUES = {
    'MachineState': {
        'Null': 0, 'PoweredOff': 1, 'Saved': 2, 'Teleported': 3, 'Aborted': 4, 'AbortedSaved': 5,
        'Running': 6, 'Paused': 7, 'Stuck': 8, 'FirstOnline': 6,
        'LastOnline': 20, 'FirstTransient': 9, 'Starting': 11, 'LiveSnapshotting': 15,
        'DeletingSnapshot': 22},
    'SessionState': {'Null': 0, 'Unlocked': 1, 'Locked': 2, 'Spawning': 3, 'Unlocking': 4},
    'LockType': {'Shared': 1, 'Write': 2},
    'NetworkAttachmentType': {'Null': 0, 'NAT': 1, 'Bridged': 2, 'HostOnly': 4},
    'NATProtocol': {'UDP': 0, 'TCP': 1},
    'AuthType': {'Null': 0, 'External': 1, 'Guest': 2},
    'DeviceType': {'DVD': 2, 'HardDisk': 3}, 'AccessMode': {'ReadOnly': 1, 'ReadWrite': 2},
    'MediumVariant': {'Standard': 0}, 'StorageBus': {'IDE': 1, 'SATA': 2},
    'BitmapFormat': {'PNG': 0x20474e50},
    'CleanupMode': {'UnregisterOnly': 1, 'DetachAllReturnHardDisksOnly': 3, 'Full': 4},
    'VirtualSystemDescriptionType': {'License': 7, 'Name': 3, 'SettingsFile': 41, 'HardDiskImage': 16},
    'BandwidthGroupType': {'Network': 2}, 'HostNetworkInterfaceType': {'Bridged': 1, 'HostOnly': 2},
    'ProcessorFeature': {'HWVirtEx': 0},
    'FirmwareType': {'BIOS': 1, 'EFI': 2}, 'VBoxEventType': {'Any': 1},
    'ClipboardMode': {'Disabled': 0}, 'DnDMode': {'Disabled': 0}, 'PortMode': {'Disconnected': 0},
    'NetworkAdapterPromiscModePolicy': {'Deny': 1},
    'DHCPOption': {'Routers': 3}, 'DHCPOptionEncoding': {'Normal': 0},
}
PNG = b'\x89PNG\r\n\x1a\n' + bytes(100)
MACS = itertools.count(0x080027000001)


def install(folder):
    """A module vboxapi in the folder; gives the environment in which a host agent's Python finds it."""
    import agents  # the tests' alone
    os.makedirs(str(folder), exist_ok=True)
    with open(os.path.join(str(folder), 'vboxapi.py'), 'w') as file:
        file.write('from fake_server import VirtualBoxManager    # noqa: F401\n')
    paths = [str(folder), os.path.dirname(os.path.abspath(__file__)), os.environ.get('PYTHONPATH', '')]
    between = ';' if agents.ON_WINDOWS else os.pathsep
    return {'PYTHONPATH': between.join(path for path in paths if path), 'FAKE_VIRTUALBOX': str(folder)}


def disk(number=1):
    """What the file of a disk holds that VirtualBox doesn't know yet."""
    return SIGNATURE + '5d7d8d0a-0000-4000-8000-%012d' % number


def steering(name):
    """The path of a file that steers the fake."""
    return os.path.join(os.environ['FAKE_VIRTUALBOX'], name)


SIGNATURE = '<<< Fake VM VirtualBox Disk Image >>>\n'    # as a .vdi file begins


class FakeError(Exception):
    """An error of COM's, with the attributes of an xpcom.Exception."""

    def __init__(self, code, text):
        super().__init__(text)
        self.errno, self.msg = code, text


class Constants:
    """What vboxapi calls constants: Enumeration_Value, and the values of an enumeration."""

    def __getattr__(self, name):
        kind, _, value = name.partition('_')
        return VALUES[kind][value]

    def all_values(self, kind):
        return dict(VALUES[kind])


class VirtualBoxManager:
    """What vboxapi gives."""

    def __init__(self):
        self.constants = Constants()

    def getVirtualBox(self):
        return VirtualBox()

    def getSessionObject(self):
        return Session()

    def getArray(self, thing, name):
        return getattr(thing, name)

    def waitForEvents(self, timeout):
        return 0

    def xcptIsOurXcptKind(self, error):
        return isinstance(error, FakeError)

    def xcptGetStatus(self, error):
        return error.errno                      # which other kinds of errors have, too

    def xcptGetMessage(self, error):
        return error.msg if hasattr(error, 'msg') else 'status %x' % int(error)

    def getPerfCollector(self, vbox):
        return Collector()


class Collector:
    def setupMetrics(self, names, things, period, count):
        pass

    def query(self, names, machines):
        rows = [('CPU/Load/User', '%', 1000), ('CPU/Load/Kernel', '%', 1000), ('RAM/Usage/Used', 'kB', 1),
                ('Disk/Usage/Used', 'MB', 1), ('Net/Rate/Rx', 'B/s', 1), ('Net/Rate/Tx', 'B/s', 1)]
        return [{'name': name + suffix, 'unit': unit, 'scale': scale, 'values': [50000]}
                for name, unit, scale in rows for suffix in ('', ':avg')]


class Progress:
    """One that is done."""
    completed, percent, resultCode, errorInfo = True, 100, 0, None

    def waitForCompletion(self, timeout):
        pass


class Slow(Progress):
    """One that takes its time."""

    def __init__(self, seconds):
        self.begun, self.seconds = time.monotonic(), seconds

    @property
    def completed(self):
        return time.monotonic() - self.begun > self.seconds

    @property
    def percent(self):
        return min(99, int(100 * (time.monotonic() - self.begun) / self.seconds))


def progress_of(name):
    """The Progress of something that a VM does."""
    try:
        with open(steering('slow-' + name)) as file:
            return Slow(float(file.read()))
    except FileNotFoundError:
        return Progress()


class Failed(Progress):
    """One that ended with the VM's process, or with another error."""
    resultCode = 0x80004005

    def __init__(self, text='The VM session was aborted'):
        self.errorInfo = Named(text=text, next=None)


class Named:
    """Something with the attributes that it is made with."""

    def __init__(self, **values):
        self.__dict__.update(values)


class WithExtraData:
    def __init__(self):
        self.extra = {}

    def getExtraData(self, key):
        return self.extra.get(key, '')

    def setExtraData(self, key, value):
        self.extra[key] = value
        if not value:
            del self.extra[key]

    def getExtraDataKeys(self):
        return sorted(self.extra)


class VirtualBox(WithExtraData):
    version, APIVersion = '7.2.0_Fake', '7_2'
    guestOSTypes = [Named(id=name, platformArchitecture=1, recommendedHDD=8 << 30)
                    for name in ('Linux_64', 'Debian_64', 'Other')]

    def __init__(self):
        super().__init__()
        self.reading, self.importing = Progress(), Progress()       # what an Appliance's work comes to
        self.machines, self.hardDisks, self.DHCPServers, self.progressOperations = [], [], [], []
        self.DVDImages = []
        self.unregistered = {}                                      # {settings file: machine}
        self.systemProperties = Named(defaultVRDEExtPack='VNC')
        self.performanceCollector = Collector()
        self.eventSource = Events(self)
        self.host = Named(networkInterfaces=[
            Named(name=name, IPAddress=address, interfaceType=VALUES['HostNetworkInterfaceType']['Bridged'])
            for name, address in (('eth0', '192.0.2.7'), ('eth1', '198.51.100.7'))],
            getProcessorFeature=lambda feature: True)

    def signature(self):
        """What changes whenever there is an event to tell."""
        return (sorted(os.listdir(os.environ['FAKE_VIRTUALBOX'])),
                [(machine.name, machine._state, machine.cards[0].MACAddress) for machine in self.machines])

    @property
    def revision(self):
        if os.path.exists(steering('dead')):
            raise FakeError(CALL_FAILED, 'the call failed')
        return 1

    def findMachine(self, wanted):
        uuid = wanted.strip('{}').lower()           # which VirtualBox looks for first, as this does
        for machine in [each for each in self.machines if each.id == uuid] + self.machines:
            if wanted == machine.name or machine.id == uuid:
                return machine
        raise FakeError(NOT_FOUND, 'Could not find a registered machine named %r' % wanted)

    def composeMachineFilename(self, name, group, flags, folder):
        if not name:
            raise FakeError(INVALID_ARGUMENT, 'Machine name is invalid, must not be empty')
        return os.path.join(folder or os.environ['FAKE_VIRTUALBOX'], name, name + '.vbox')

    def getGuestOSType(self, name):
        return next(each for each in self.guestOSTypes if each.id == name)

    def createMachine(self, file, name, architecture, groups, ostype, *more):
        return Machine(self, name, ostype, file or self.composeMachineFilename(name, '', '', ''))

    def createAppliance(self):
        return Appliance(self)

    def openMachine(self, file, password):
        if file in self.unregistered and os.path.exists(file):
            machine = self.unregistered.pop(file)
            machine.mediumAttachments = machine.saved_attachments[:]
            return machine
        raise FakeError(FILE_ERROR, 'Could not read the settings file %r' % file)

    def registerMachine(self, machine):
        self.machines.append(machine)

    def clone(self, machine, name):
        """What the user's own clone is: a VM with the extra data of the first one, and without a disk."""
        clone = self.createMachine('', name, 0, [], machine.OSTypeId)
        clone.extra = dict(machine.extra)
        clone.saveSettings()
        self.registerMachine(clone)
        return clone

    def createMedium(self, kind, location, mode, device):
        return Medium(self, location)

    def openMedium(self, location, device, mode, new_uuid):
        for medium in self.hardDisks:
            if medium.location == location:
                return medium
        if not os.path.exists(location):
            raise FakeError(NOT_FOUND, 'Could not find the disk %s' % location)
        return self._open_file(location)

    def _open_file(self, location):
        """A disk that VirtualBox doesn't know yet: its file holds its uuid."""
        medium = Medium(self, location)
        with open(location) as file:
            medium.id = file.read().replace(SIGNATURE, '')
        if not medium.id:
            raise FakeError(FILE_ERROR, 'Could not get the storage format of the medium %r' % location)
        if medium.id in [each.id for each in self.hardDisks]:
            raise FakeError(INVALID_ARGUMENT, 'Cannot register the disk %r: its UUID is known' % location)
        self.hardDisks.append(medium)
        return medium


class Events:
    """An event source: one event for all that happened since a listener asked last."""

    def __init__(self, vbox):
        self.vbox = vbox

    def createListener(self):
        return Named(told=None)

    def registerListener(self, listener, kinds, active):
        listener.told = self.vbox.signature()

    def getEvent(self, listener, timeout):
        before, listener.told = listener.told, self.vbox.signature()
        return Named(type=1) if listener.told != before else None

    def eventProcessed(self, listener, event):
        pass


class Appliance:
    """One VM with one disk, whatever the file is."""

    def __init__(self, vbox):
        self.vbox, self.machines, self.virtualSystemDescriptions = vbox, [], []

    def read(self, path):
        return self.vbox.reading

    def interpret(self):
        self.virtualSystemDescriptions = [Description()]

    def importMachines(self, options):
        if not self.vbox.importing.resultCode:
            name, path, disk = self.virtualSystemDescriptions[0].values[:3]
            machine = Machine(self.vbox, name, 'Linux_64', path)
            medium = Medium(self.vbox, os.path.join(os.path.dirname(path), disk))
            medium.createBaseStorage(4, [])
            machine.attachDevice('SATA', 0, 0, medium.deviceType, medium)
            machine.saveSettings()
            self.vbox.registerMachine(machine)
            self.machines.append(machine.id)
        return self.vbox.importing


class Description:
    kinds, values = [3, 41, 16], ['its name', '', 'disk.vmdk']

    def getDescription(self):
        return self.kinds, [], [], self.values, ['', '', '']

    def setFinalValues(self, enabled, values, extra):
        self.values = values


class Medium:
    deviceType = VALUES['DeviceType']['HardDisk']

    def __init__(self, vbox, location, parent=None):
        self.vbox, self.location, self.id = vbox, location, str(uuid.uuid4())
        self.parent, self.children, self.base = parent, [], parent.base if parent else self
        self.use = Progress()

    @property
    def machineIds(self):
        return [machine.id for machine in self.vbox.machines
                if any(place.medium is self for place in machine.mediumAttachments)]

    def createBaseStorage(self, size, variant):
        os.makedirs(os.path.dirname(self.location), exist_ok=True)
        with open(self.location, 'w') as file:
            file.write(SIGNATURE + self.id)
        self.vbox.hardDisks.append(self)
        return Progress()

    def cloneTo(self, target, variant, parent):
        target.createBaseStorage(0, variant)
        self.use = progress_of(os.path.splitext(os.path.basename(target.location))[0])
        return self.use

    def createDiffStorage(self, target, variant):
        target.parent, target.base = self, self.base
        with open(target.location, 'w') as file:
            file.write(SIGNATURE + target.id)
        self.children.append(target)
        return Progress()

    def _check_use(self):
        if not self.use.completed:
            raise FakeError(OBJECT_STATE, 'Medium %r is locked for reading by another task' % self.location)

    def close(self):
        self._check_use()
        self.vbox.hardDisks.remove(self)

    def make_child(self, location):
        """A differencing disk, as a snapshot or a linked clone makes one."""
        child = Medium(self.vbox, location, self)
        with open(location, 'w'):
            self.children.append(child)
        return child

    def deleteStorage(self):
        self._check_use()
        if self.children:
            raise FakeError(IN_USE, 'Cannot delete the disk %r: it has %d children'
                            % (self.location, len(self.children)))
        os.remove(self.location)
        (self.parent.children if self.parent else self.vbox.hardDisks).remove(self)
        return Progress()


class Card:
    def __init__(self, enabled):
        self.enabled, self.attachmentType, self.cableConnected = enabled, 1, True
        self.MACAddress = '%012X' % next(MACS)
        self.bandwidthGroup, self.bridgedInterface = None, ''
        self.NATEngine = Named(localhostReachable=False, redirects=[])
        self.NATEngine.addRedirect = self._add
        self.NATEngine.removeRedirect = self._remove

    def _add(self, name, kind, host, port, guest, guest_port):
        if name in [row.split(',')[0] for row in self.NATEngine.redirects]:
            raise FakeError(INVALID_ARGUMENT, 'A NAT rule of this name already exists')
        self.NATEngine.redirects.append('%s,%d,%s,%d,%s,%d' % (name, kind, host, port, guest, guest_port))

    def _remove(self, name):
        self.NATEngine.redirects = [row for row in self.NATEngine.redirects if row.split(',')[0] != name]


class Desktop:
    """A VRDEServer."""

    def __init__(self):
        self.enabled, self.authType, self.properties = False, 0, {'TCP/Ports': '3389'}

    def getVRDEProperty(self, name):
        return self.properties.get(name, '')

    def setVRDEProperty(self, name, value):
        self.properties[name] = value


class Bandwidth:
    def __init__(self):
        self.allBandwidthGroups = []

    def createBandwidthGroup(self, name, kind, rate):
        self.allBandwidthGroups.append(Named(name=name, maxBytesPerSec=rate))

    def getBandwidthGroup(self, name):
        return next(group for group in self.allBandwidthGroups if group.name == name)


class Snapshot:
    def __init__(self, name, text, parent, online):
        self.id, self.name, self.description, self.parent, self.online = (
            str(uuid.uuid4()), name, text, parent, online)
        self.timeStamp, self.children = int(time.time() * 1000), []
        self.machine = Named(mediumAttachments=[])


class Machine(WithExtraData):
    def __init__(self, vbox, name, ostype, path):
        super().__init__()
        self.vbox, self.name, self.OSTypeId, self.settingsFilePath = vbox, name, ostype, path
        self.id, self.description = str(uuid.uuid4()), ''
        self.memorySize, self.CPUCount, self.CPUExecutionCap = 128, 1, 100
        self.cards = [Card(slot == 0) for slot in range(8)]
        self.VRDEServer, self.bandwidthControl = Desktop(), Bandwidth()
        self.recordingSettings = Named(enabled=False, screens=[])
        self.USBDeviceFilters = Named(deviceFilters=[])
        self.firmwareSettings = Named(firmwareType=VALUES['FirmwareType']['BIOS'])
        self.storageControllers = [Named(name='SATA', bus=2, portCount=1, maxPortCount=30)]
        self.mediumAttachments, self.PCIDeviceAssignments = [], []
        self.snapshots, self.currentSnapshot = [], None
        self.session = None
        self.readable = True
        self.unlocked = 0.0             # until when the session is unlocking
        self.go_to('PoweredOff')

    # State and locks.

    @property
    def accessible(self):
        self._check_ready()
        return self.readable and not os.path.exists(steering('unread-' + self.name))

    @property
    def accessError(self):
        with open(steering('unread-' + self.name)) as file:
            return Named(text=file.read(), next=None)

    @property
    def state(self):
        self._check_ready()
        for word, state in (('abort-', 'Aborted'), ('abort-saved-', 'AbortedSaved'), ('stick-', 'Stuck')):
            if os.path.exists(steering(word + self.name)):
                os.remove(steering(word + self.name))
                self.go_to(state)
        if os.path.exists(steering('card-' + self.name)):
            with open(steering('card-' + self.name)) as file:
                self.cards[0].MACAddress = file.read()
            os.remove(steering('card-' + self.name))
        if os.path.exists(steering('pause-' + self.name)) and self._state == 'Running':
            with open(steering('pause-' + self.name)) as file, open(self.queryLogFilename(0), 'a') as log:
                log.write(file.read())
            self.go_to('Paused')
        if os.path.exists(steering('stuck-in-' + self.name)):
            with open(steering('stuck-in-' + self.name)) as file:
                return VALUES['MachineState'][file.read()]
        return VALUES['MachineState'][self._state]

    def _check_ready(self):
        anew = steering('anew-' + self.name)
        if os.path.exists(anew):
            os.truncate(anew, os.path.getsize(anew) - 1)
            if not os.path.getsize(anew):
                os.remove(anew)
            raise FakeError(NOT_READY, 'The object is not ready')

    def dies(self):
        try:
            os.remove(steering('die-' + self.name))
            return True
        except FileNotFoundError:
            return False

    def go_to(self, state):
        self._state = state

    @property
    def runs(self):
        return self._state in ('Running', 'Paused', 'Stuck')

    @property
    def sessionState(self):
        if time.monotonic() < self.unlocked:
            return VALUES['SessionState']['Unlocking']
        locked = self.session or self.runs or os.path.exists(steering('lock-' + self.name))
        return VALUES['SessionState']['Locked' if locked else 'Unlocked']

    def lockMachine(self, session, kind):
        if os.path.exists(steering('lock-' + self.name)) or self.session:
            raise FakeError(OBJECT_STATE, 'The machine %r is already locked by a session' % self.name)
        self.session, self.saved_attachments = session, self.mediumAttachments[:]
        session.hold(self)

    def getGuestPropertyValue(self, name):
        if self.runs:
            self.hang()
        return ''

    def hang(self):
        """What talks to the VM's process waits for as long as that hangs."""
        while os.path.exists(steering('hang-' + self.name)):
            time.sleep(0.02)
        if not self.runs:
            raise FakeError(0x80004005, 'The VM session was aborted')

    def discardSettings(self):
        pass

    def launchVMProcess(self, session, kind, environment):
        if kind == 'emergencystop':
            while os.path.exists(steering('ends-late-' + self.name)):
                time.sleep(0.02)
            for name in ('hang-', 'stuck-in-'):
                if os.path.exists(steering(name + self.name)):
                    os.remove(steering(name + self.name))
            self.session = None
            self.go_to('Aborted')
            return None
        for key in self.extra:
            if key.startswith('VBoxInternal/Devices/efi') and self.firmwareSettings.firmwareType == 1:
                raise FakeError(0x80004005, 'Configuration error: unknown device efi')
        self.lockMachine(session, 1)
        self.go_to('Running' if not self.dies() else 'Aborted')
        with open(self.queryLogFilename(0), 'w') as log:
            log.write('Process ID: %d\n' % os.getpid() + 'fake log\n' * 100)
        return Progress()

    # Settings.

    def applyDefaults(self, flags):
        pass

    def saveSettings(self):
        self.saved_attachments = self.mediumAttachments[:]
        os.makedirs(os.path.dirname(self.settingsFilePath), exist_ok=True)
        with open(self.settingsFilePath, 'w') as file:
            file.write('<Machine uuid="{%s}" name="%s">\n' % (self.id, self.name))
            for item in sorted(self.extra.items()):
                file.write('<ExtraDataItem name="%s" value="%s"/>\n' % item)
            for place in self.mediumAttachments:
                if place.medium is not None:
                    file.write('<AttachedDevice type="HardDisk"><Image uuid="{%s}"/></AttachedDevice>\n'
                               % place.medium.id)
            file.write('</Machine></VirtualBox>\n')

    def getNetworkAdapter(self, slot):
        return self.cards[slot]

    def getParallelPort(self, slot):
        return Named(enabled=False, path='')

    def getSerialPort(self, slot):
        return Named(hostMode=0, path='')

    @property
    def memorySize(self):
        return self._memory

    @memorySize.setter
    def memorySize(self, megabytes):
        if megabytes > 2 << 20:
            raise FakeError(INVALID_ARGUMENT, 'Invalid RAM size: %d MB (must be in range [4, 2097152] MB)'
                            % megabytes)
        self._memory = megabytes

    def attachDevice(self, controller, port, device, kind, medium):
        self.mediumAttachments.append(Named(controller=controller, port=port, device=device, type=kind,
                                            passthrough=False, medium=medium))

    def queryLogFilename(self, number):
        return os.path.join(os.path.dirname(self.settingsFilePath), 'VBox.log')

    def unregister(self, mode):
        if self.session or self.runs:
            raise FakeError(OBJECT_STATE, 'Cannot unregister the machine %r while it is locked' % self.name)
        self.vbox.machines.remove(self)
        self.vbox.unregistered[self.settingsFilePath] = self
        media, self.mediumAttachments = [place.medium for place in self.mediumAttachments], []
        for medium in media:
            if medium.parent and medium.parent not in media and not medium.parent.machineIds:
                media.append(medium.parent)         # a snapshot's
        return media if mode > 1 else []

    def deleteConfig(self, media):
        for medium in media:
            medium.deleteStorage()
        for path in (self.settingsFilePath, self.queryLogFilename(0)):
            if os.path.exists(path):
                os.remove(path)
        if not os.listdir(os.path.dirname(self.settingsFilePath)):
            os.rmdir(os.path.dirname(self.settingsFilePath))
        return Progress()

    # Saved states and snapshots.

    def saveState(self):
        self.go_to('Saved')
        return progress_of(self.name)

    def discardSavedState(self, remove):
        self.go_to('PoweredOff')

    @property
    def snapshotCount(self):
        return len(self.snapshots)

    def findSnapshot(self, wanted):
        return next(each for each in self.snapshots if wanted in ('', each.name, each.id))

    def takeSnapshot(self, name, text, pause):
        snapshot = Snapshot(name, text, self.currentSnapshot, self._state in ('Running', 'Paused', 'Saved'))
        if snapshot.parent:
            snapshot.parent.children.append(snapshot)
        self.snapshots.append(snapshot)
        self.currentSnapshot = snapshot
        return (progress_of(self.name), snapshot.id)

    def restoreSnapshot(self, snapshot):
        self.currentSnapshot = snapshot
        self.go_to('Saved' if snapshot.online else 'PoweredOff')
        return progress_of(self.name)

    def deleteSnapshot(self, wanted):
        snapshot = self.findSnapshot(wanted)
        if len(snapshot.children) > 1 or snapshot.children and snapshot is self.currentSnapshot:
            raise FakeError(OBJECT_STATE, 'Snapshot %r cannot be deleted, because it has %d child snapshots'
                            % (snapshot.name, len(snapshot.children)))
        for child in snapshot.children:
            child.parent = snapshot.parent
        if snapshot.parent:
            snapshot.parent.children.remove(snapshot)
            snapshot.parent.children += snapshot.children
        if self.currentSnapshot is snapshot:
            self.currentSnapshot = snapshot.parent
        self.snapshots.remove(snapshot)
        return progress_of(self.name)


class Session:
    """A session, and the console of the VM that it holds."""

    def __init__(self):
        self.state, self.machine, self.console = VALUES['SessionState']['Unlocked'], None, None

    def hold(self, machine):
        self.state, self.machine = VALUES['SessionState']['Locked'], machine
        self.console = Console(machine) if machine.runs else None

    def unlockMachine(self):
        if self.machine is None:
            return
        self.machine.session, self.machine.mediumAttachments = None, self.machine.saved_attachments
        if os.path.exists(steering('slow-' + self.machine.name)):
            self.machine.unlocked = time.monotonic() + 0.1
        self.state, self.machine, self.console = VALUES['SessionState']['Unlocked'], None, None


class Console:
    def __init__(self, machine):
        self.machine = machine
        self.display = self

    def powerDown(self):
        self.machine.hang()
        if self.machine.dies():
            self.machine.go_to('Aborted')
            return Failed()
        self.machine.go_to('PoweredOff')
        return Progress()

    def pause(self):
        self.machine.hang()
        self.machine.go_to('Paused')

    def resume(self):
        self.machine.hang()
        self.machine.go_to('Running')

    def reset(self):
        self.machine.hang()
        self.machine.go_to('Running')

    def powerButton(self):
        self.machine.hang()
        self.machine.go_to('PoweredOff')

    def getScreenResolution(self, screen):
        return 720, 400, 32

    def takeScreenShotToArray(self, screen, width, height, kind):
        return PNG
