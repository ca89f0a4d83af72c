"""Images of disks and appliances, by what their files say of themselves: whether they are whole, and what
else they name. Strangers make them, and a hypervisor opens whatever they name with its user's rights.

What it is not: it asks no hypervisor, and changes nothing. Any thread; no state.
"""

import array
import html
import os
import re
import struct
import sys
import tarfile
import uuid
from typing import Any, List, Tuple

from faults import HypervisorError, InvalidParams

VDI_HEAD, VDI_1_1 = 392, (0xbeda107f, 0x10001)        # bytes; signature and version of a .vdi file
UNUSED_IN_VHD = 2 ** 32 - 1        # for the place of a block
STREAM_VMDK = 2 ** 64 - 1          # for the place of the tables
LONGEST_TEXT = 16 * 1024 * 1024    # bytes of what describes an appliance or a disk
DESCRIPTOR = re.compile(br'#\s?Disk ?Descriptor ?File', re.IGNORECASE)        # how that of a .vmdk begins
EXTENT = re.compile(br'\s*(?:RW|RDONLY|NOACCESS)\s[^"]*"([^"]+)"', re.IGNORECASE)      # "the file of a part"
REFERENCE = re.compile(r'<(?:[\w.-]+:)?File\b[^>]*?\bhref\s*=\s*["\']([^"\']+)', re.IGNORECASE)   # in an .ovf
QCOW = b'QFI\xfb'
MOST_BLOCKS = 2 ** 22              # of which the places are read: more are no disk's


def check_image(image: str) -> None:
    """Raises InvalidParams where there is no such file, HypervisorError where it is cut, of another kind than
    its name says, or made of files elsewhere; '' is none that has to be."""
    if image and not os.path.isfile(image):
        raise InvalidParams('%s: %s' % ('this is no regular file' if os.path.exists(image)
                                        else 'no such image file', image))
    if image:
        check_is_whole(image)
        description = description_of(image)
        check_is_appliance(image, description)
        check_is_all_there_is(image, description)


def check_is_whole(image: str) -> None:
    """Raises HypervisorError where a disk's file is shorter than it says itself, by more than a block.

    VirtualBox lays another disk on half an image, and says nothing; copies half a .vhd, and says nothing; or
    finds out at the end of a long copying.
    """
    try:
        with open(image, 'rb') as file:
            size = os.fstat(file.fileno()).st_size
            least, slack = max(measure(file) for measure in (length_of_vdi, length_of_vhd, length_of_vmdk))
    except OSError:                                 # VirtualBox tells
        return
    if size < least - slack:
        raise HypervisorError('%s is cut: it has %d bytes, and %d by what it says itself; get it anew'
                              % (image, size, least))


def description_of(image: str) -> str:
    """The text of an .ovf, which is an .ova's first file; '' for a disk. Raises HypervisorError for what is
    too long to be one."""
    try:
        text = read_description(image)
    except (OSError, tarfile.TarError):             # VirtualBox tells
        return ''
    if len(text) > LONGEST_TEXT:
        raise HypervisorError('%s is no appliance: its description has over %d bytes' % (image, LONGEST_TEXT))
    return text.decode('utf-16' if text[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8', 'replace')


def read_description(image: str) -> bytes:
    kind = os.path.splitext(image)[1].lower()
    if kind == '.ovf':
        with open(image, 'rb') as file:
            return file.read(LONGEST_TEXT + 1)
    if kind != '.ova':
        return b''
    with tarfile.open(image, 'r:') as archive:
        first = archive.next()
        if first is None or not first.isfile() or not first.name.lower().endswith('.ovf'):
            return b''
        return archive.extractfile(first).read(LONGEST_TEXT + 1)  # type: ignore


def check_is_appliance(image: str, description: str) -> None:
    """Raises HypervisorError where an .ova or .ovf is XML, and of another kind: VirtualBox's server dies of
    such a one, and with it whatever else is under way."""
    first = re.search(r'<(?:[\w.-]+:)?([A-Za-z_][\w.-]*)',
                      re.sub(r'<!--.*?-->', '', description, flags=re.DOTALL))
    if first is not None and first.group(1) != 'Envelope':
        raise HypervisorError('%s is no appliance: it is XML of another kind (<%s>)' % (
            image, first.group(1)))


def check_is_all_there_is(image: str, description: str) -> None:
    """Raises HypervisorError where an image is made of files that don't lie beside it: who made it could
    have any file of this user's in the guest, by its name.

    A .vmdk may be a text that names the files of its parts, or a device; an .ovf names its disks. A .qcow2
    that names the disk below it is no whole disk, wherever that lies.
    """
    disks = [image]
    if image.lower().endswith('.ovf'):
        for name in REFERENCE.findall(description):
            disks.append(check_is_beside(image, html.unescape(name)))
    for disk in disks:
        check_lies_on_nothing(disk)
        for name in named_in_disk(disk):
            check_is_beside(disk, os.fsdecode(name))


def check_lies_on_nothing(disk: str) -> None:
    """Raises HypervisorError for a .qcow2 that holds only what differs from another file. Seen with 7.2:
    VirtualBox doesn't look at that one, and gives the guest zeros for what is there. Its head: QEMU's
    docs/interop/qcow2.txt."""
    try:
        with open(disk, 'rb') as file:
            head = read_at(file, 0, 20)
            place, length = struct.unpack_from('>QI', head.ljust(20, b'\0'), 8)
            name = read_at(file, place, min(length, 1023)) if head.startswith(QCOW) and place else b''
    except OSError:                                 # VirtualBox tells
        return
    if name:
        raise HypervisorError('%s holds only what differs from another file, %r, which VirtualBox doesn\'t '
                              'read: make one file of both (qemu-img convert)' % (disk, os.fsdecode(name)))


def named_in_disk(disk: str) -> List[bytes]:
    """The files that it is made of, beside itself. Raises HypervisorError."""
    try:
        with open(disk, 'rb') as file:
            head = file.read(64)
            if not DESCRIPTOR.match(head):
                return []
            text = head + file.read(LONGEST_TEXT)
    except OSError:                                 # VirtualBox tells
        return []
    if len(text) > LONGEST_TEXT:
        raise HypervisorError('%s is no disk: its description has over %d bytes' % (disk, LONGEST_TEXT))
    return [extent.group(1) for extent in map(EXTENT.match, re.split(b'[\r\n\0]+', text)) if extent]


def check_is_beside(image: str, name: str) -> str:
    """The path of a file that an image names. Raises HypervisorError where it lies elsewhere."""
    folder = os.path.dirname(os.path.abspath(image))
    path = os.path.join(folder, name)
    there = os.path.realpath(path)
    if not any(there.startswith(os.path.join(beside, ''))
               for beside in (os.path.realpath(folder), os.path.dirname(os.path.realpath(image)))):
        raise HypervisorError('%s is made of a file elsewhere, %r, that the guest could read then: use an '
                              'image whose files are all in one folder' % (image, name))
    return path


def read_at(file: Any, place: int, length: int) -> bytes:
    """Fewer bytes where the file ends."""
    file.seek(min(place, 2 ** 62))
    return bytes(file.read(length))


def numbers_at(file: Any, place: int, count: int, order: str) -> Any:
    """So many numbers of 32 bits; fewer where the file ends. order: of their bytes, as in sys.byteorder."""
    data = read_at(file, place, 4 * min(count, MOST_BLOCKS))
    numbers = array.array('I', data[:len(data) // 4 * 4])
    if sys.byteorder != order:
        numbers.byteswap()
    return numbers


def length_of_vdi(file: Any) -> Tuple[int, int]:
    """How long a .vdi has to be, and how much of that may be missing; 0 for another file. Its head:
    VirtualBox's VDICore.h."""
    head = read_at(file, 0, VDI_HEAD)
    if len(head) < VDI_HEAD or struct.unpack_from('<II', head, 64) != VDI_1_1:
        return 0, 0
    data_at, block, extra, _, blocks = struct.unpack_from('<I28xIIII', head, 344)
    return data_at + blocks * (block + extra), block


def uuid_in_vdi(path: str) -> str:
    """Which disk a .vdi file says that it is; '' for another file, or none."""
    try:
        with open(path, 'rb') as file:
            head = read_at(file, 0, VDI_HEAD + 16)
    except OSError:
        return ''
    if len(head) < VDI_HEAD + 16 or struct.unpack_from('<II', head, 64) != VDI_1_1:
        return ''
    return str(uuid.UUID(bytes_le=head[VDI_HEAD:]))


def length_of_vhd(file: Any) -> Tuple[int, int]:
    """The same of a .vhd that grows: it begins with what ends it, and tells where its blocks are."""
    head = read_at(file, 0, 512)
    if len(head) < 512 or not head.startswith(b'conectix'):
        return 0, 0
    table = read_at(file, struct.unpack_from('>Q', head, 16)[0], 1024)
    if len(table) < 1024 or not table.startswith(b'cxsparse'):
        return 0, 0
    table_at, _, count, block = struct.unpack_from('>QIII', table, 16)
    used = [at for at in numbers_at(file, table_at, count, 'big') if at != UNUSED_IN_VHD]
    return (max(used) * 512 + 512 + block, 0) if used else (0, 0)


def length_of_vmdk(file: Any) -> Tuple[int, int]:
    """The same of a .vmdk in one file that grows: it tells where tables of tables of its blocks are. One for
    a stream tells that at its end."""
    head = read_at(file, 0, 512)
    if len(head) < 512 or not head.startswith(b'KDMV'):
        return 0, 0
    capacity, grain, _, _, count, _, tables_at = struct.unpack_from('<QQQQIQQ', head, 12)
    if tables_at == STREAM_VMDK or not grain * count:
        return 0, 0
    places = numbers_at(file, tables_at * 512, -(-capacity // (grain * count)), 'little')
    tables = [numbers_at(file, place * 512, count, 'little') for place in places if place]
    last = max([0] + [max(table) for table in tables if table])
    return (max([last] + list(places)) + grain) * 512, (grain - 1) * 512
