"""What an appliance brings that leads out of its VM: files of the host, ports, networks, a person's desktop.

VirtualBox imports a VM's settings as whoever made the appliance wrote them, less shared folders, serial ports
and extra data: a card's trace is written over any file of the user's, TFTP gives the guest each of them.

What it is not: it reads no images (imagefiles.py), and gives no VM its card (vboxnetwork.py). One thread,
that of virtualbox.py.
"""

import contextlib
import os
from typing import Any

from vboxconnection import Connection

NETWORKS = 'NAT', 'Null'           # in which a card may stay: no other VM is there


def close_doors(box: Connection, machine: Any) -> None:
    """Of a VM that was just imported, whose session's mutable machine this is. Cards that are bridged, or in
    a network that other VMs may have, stay without a network."""
    _put(machine, snapshotFolder='', teleporterEnabled=False,
         clipboardMode=box.const('ClipboardMode_Disabled'), dnDMode=box.const('DnDMode_Disabled'))
    _put(machine.VRDEServer, enabled=False)
    for slot in range(8):
        _close_card(box, machine.getNetworkAdapter(slot))
    for slot in range(2):
        _put(machine.getParallelPort(slot), path='', enabled=False)
    for slot in range(4):
        _put(machine.getSerialPort(slot), hostMode=box.const('PortMode_Disconnected'), path='')
    _close_recording(box, machine)
    sound = getattr(machine, 'audioSettings', None)                     # since 7.0
    _put(sound.adapter if sound else getattr(machine, 'audioAdapter', None), enabledIn=False)
    _put(getattr(machine, 'guestDebugControl', None), debugProvider=0)  # None; since 7.1
    for _ in box.array(machine.USBDeviceFilters, 'deviceFilters'):
        machine.USBDeviceFilters.removeDeviceFilter(0)
    _close_machine(box, machine)


def _close_machine(box: Connection, machine: Any) -> None:
    """The picture that its firmware shows, the host's devices, and what VirtualBox does of itself."""
    _put(getattr(machine, 'firmwareSettings', None) or machine.BIOSSettings, logoImagePath='')      # 7.1
    _put(machine, tracingEnabled=False, tracingConfig='', allowTracingToAccessVM=False,
         emulatedUSBCardReaderEnabled=False, paravirtDebug='')
    _close_chip(box, getattr(machine, 'trustedPlatformModule', None))
    with contextlib.suppress(Exception):            # refused where the host starts none of its own accord
        _put(machine, autostartEnabled=False)
    for device in box.array(machine, 'PCIDeviceAssignments'):
        machine.detachHostPCIDevice(device.hostAddress)
    for place in box.array(machine, 'mediumAttachments'):
        if place.passthrough:
            machine.passthroughDevice(place.controller, place.port, place.device, False)
        if place.type != box.const('DeviceType_HardDisk') and place.medium is not None:
            _empty_drive(machine, place)


def _empty_drive(machine: Any, place: Any) -> None:
    """Where the appliance hasn't brought what is in it: VirtualBox found one of the host's, by its uuid."""
    if os.path.dirname(place.medium.location) != os.path.dirname(machine.settingsFilePath):
        machine.unmountMedium(place.controller, place.port, place.device, True)


def _close_chip(box: Connection, chip: Any) -> None:
    """A TPM (since 7.0) that is the host's own, or a server's somewhere: the VM stays without one."""
    if chip is not None and chip.type in (box.const('TpmType_Host'), box.const('TpmType_Swtpm')):
        _put(chip, location='')
        chip.type = box.const('TpmType_None')


def _close_recording(box: Connection, machine: Any) -> None:
    recording = machine.recordingSettings
    _put(recording, enabled=False)
    for screen in box.array(recording, 'screens'):
        _put(screen, enabled=False, filename='')


def _close_card(box: Connection, card: Any) -> None:
    if card.attachmentType not in box.attachments(*NETWORKS):
        card.attachmentType = box.const('NetworkAttachmentType_Null')
    _put(card, traceEnabled=False, traceFile='',
         promiscModePolicy=box.const('NetworkAdapterPromiscModePolicy_Deny'))
    engine = card.NATEngine
    _put(engine, hostIP='', network='', TFTPPrefix='', TFTPBootFile='', TFTPNextServer='',
         localhostReachable=False)
    for rule in box.array(engine, 'redirects'):
        engine.removeRedirect(rule.split(',')[0])


def _put(thing: Any, **values: Any) -> None:
    """Sets those that this VirtualBox knows, where they differ: it refuses some even as they are."""
    for name, value in values.items():
        if getattr(thing, name, value) != value:
            setattr(thing, name, value)
