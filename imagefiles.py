"""Images of disks, by what their files say of themselves: whether they are whole, and what else they name.
Strangers make them, and a hypervisor opens whatever they name with its user's rights.

What it is not: it reads no appliances (appliances.py), asks no hypervisor, and changes nothing. Any thread;
no state.
"""

import array
import contextlib
import os
import re
import struct
import sys
import uuid
from typing import Any, List, Tuple

from faults import HypervisorError, InvalidParams

VDI_HEAD, VDI_1_1 = 392, (0xbeda107f, 0x10001)        # bytes; signature and version of a .vdi file
PARTS = '.vmdk', '.img', '.raw', '.dd', '.bin'        # how the files end that a .vmdk may be made of
UNUSED_IN_VHD = 2 ** 32 - 1        # for the place of a block
STREAM_VMDK = 2 ** 64 - 1          # for the place of the tables
LONGEST_TEXT = 16 * 1024 * 1024    # bytes of what describes a disk
DESCRIPTOR = re.compile(br'#\s?Disk ?Descriptor ?File', re.IGNORECASE)        # how that of a .vmdk begins
EXTENT = re.compile(br'\s*(?:RW|RDONLY|NOACCESS)\s[^"]*"([^"]+)"', re.IGNORECASE)      # "the file of a part"
PARENT = re.compile(br'^\s*(?:parentCID|ddb\.uuid\.parent)\s*=\s*"?([\w-]+)', re.IGNORECASE | re.MULTILINE)
PARENT_HINT = re.compile(br'^\s*parentFileNameHint\s*=\s*"([^"]+)"', re.IGNORECASE | re.MULTILINE)
NO_PARENTS = b'ffffffff', b'00000000-0000-0000-0000-000000000000'       # in a .vmdk
CLUSTERS = range(9, 22)            # of a .qcow2: of which power of two they may be
PARALLELS, PARALLELS_EXT = b'WithoutFreeSpace', b'WithouFreSpacExt'
QCOW, QED, VMDK = b'QFI\xfb', b'QED\0', b'KDMV'
TEXT = re.compile(br'(?!<<< )[\t\r\n -~]{24}')      # longer than what disks begin with, but .vdi
LONGEST_LEAD = 64 * 1024           # bytes of white space before a text
MOST_BLOCKS = 2 ** 22              # of which the places are read: more are no disk's


def check_image(image: str) -> None:
    """Of a disk, hard or optical. Raises InvalidParams where there is no such file, HypervisorError where it
    is cut, of another kind than its name says, or made of files elsewhere; '' is none that has to be."""
    if not image:
        return
    check_is_file(image)
    check_is_whole(image)
    with contextlib.suppress(OSError), open(image, 'rb') as file:       # VirtualBox tells
        check_content(image, file, image)


def check_is_file(image: str) -> None:
    """Raises InvalidParams; '' is none that has to be."""
    if image and not os.path.isfile(image):
        raise InvalidParams('%s: %s' % ('this is no regular file' if os.path.exists(image)
                                        else 'no such image file', image))


def check_content(name: str, file: Any, image: str) -> None:
    """Raises HypervisorError where who made this disk could have another file of this user's in the guest,
    or where the guest would find zeros.

    file    of the disk, at any place
    image   beside which the files have to be that the disk may name
    """
    check_is_no_text(name, file)
    check_is_no_qed(name, file)
    check_description_of_vmdk(name, file)
    check_lies_on_nothing(name, file)
    check_tables(name, file)
    check_parallels(name, file)
    for named in named_in_disk(name, file):
        check_is_part(image, os.fsdecode(named))


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


def check_is_no_text(name: str, file: Any) -> None:
    """Raises HypervisorError for a text that isn't a .vmdk's. VirtualBox reads some as discs that are made of
    the files that they name, whatever name they have: VISO, CUE. What comes before their first word, it
    skips."""
    head = read_at(file, 0, LONGEST_LEAD).lstrip()
    if TEXT.match(head) and not DESCRIPTOR.match(head):
        raise HypervisorError('%s is a text, and no disk: use an image that holds its data itself' % name)


def check_is_no_qed(name: str, file: Any) -> None:
    """Raises HypervisorError. Seen with 7.2: of one with a backing file VirtualBox's server dies, and with
    it each VM that runs."""
    if read_at(file, 0, 4) == QED:
        raise HypervisorError('%s is a .qed image, of which VirtualBox can die, and all VMs with it: make '
                              'another one of it (qemu-img convert)' % name)


def check_description_of_vmdk(name: str, file: Any) -> None:
    """Raises HypervisorError for a .vmdk without the description that its head names. Seen with 7.2: of one
    in an appliance that has half a gigabyte of that by its own word VirtualBox's server dies."""
    head = read_at(file, 0, 512)
    if not head.startswith(VMDK) or len(head) < 512:
        return
    place, sectors = struct.unpack_from('<QQ', head, 28)
    if (place + sectors) * 512 > file.seek(0, os.SEEK_END):
        raise HypervisorError('%s is cut or damaged: its description is not in it, and VirtualBox can die of '
                              'that, and all VMs with it; get it anew' % name)


def check_tables(name: str, file: Any) -> None:
    """Raises HypervisorError for a .qcow or .qcow2 without the tables that its head names. Seen with 7.2: of
    a .qcow2 that is cut before one of them VirtualBox's server dies, as of a .qed."""
    head = read_at(file, 0, 104).ljust(104, b'\0')
    version, = struct.unpack_from('>I', head, 4)
    if not head.startswith(QCOW) or version not in (1, 2, 3):
        return
    size = file.seek(0, os.SEEK_END)
    ends = tables_of_qcow(head) if version == 1 else tables_of_qcow2(head)
    if not ends or max(ends) > size:
        raise HypervisorError('%s is cut or damaged: its tables are not in it, and VirtualBox can die of '
                              'that, and all VMs with it; get it anew' % name)
    unread = unread_in_qcow2(head) if version > 1 else ''
    if unread:
        raise HypervisorError('%s has %s, which VirtualBox doesn\'t read: make another one of it (qemu-img '
                              'convert)' % (name, unread))


def unread_in_qcow2(head: bytes) -> str:
    """What it has that VirtualBox refuses, without a word of why where it is asked by vboxapi."""
    version, cipher, snapshots = (struct.unpack_from('>I', head, place)[0] for place in (4, 32, 60))
    features, = struct.unpack_from('>Q', head, 72)
    return ('a cipher' if cipher else 'snapshots' if snapshots else
            'features that need a newer reader' if version > 2 and features else '')


def check_parallels(name: str, file: Any) -> None:
    """Raises HypervisorError for a .hdd that VirtualBox can't read. Seen with 7.2: of the newer kind, which
    qemu-img writes, it takes the file itself for the disk; by a track without sectors it divides, and
    dies."""
    head = read_at(file, 0, 32)
    if head.startswith(PARALLELS_EXT):
        raise HypervisorError('%s is a Parallels image of a kind that VirtualBox reads wrongly: make another '
                              'one of it (qemu-img convert)' % name)
    if head.startswith(PARALLELS) and not int.from_bytes(head[28:], 'little'):
        raise HypervisorError('%s is cut or damaged: a track of it has no sectors; get it anew' % name)


def tables_of_qcow(head: bytes) -> List[int]:
    """Where those end that a .qcow's head names; none where it makes no sense."""
    size, cluster_bits, table_bits, place = struct.unpack_from('>QBB6xQ', head, 24)
    if cluster_bits not in CLUSTERS or table_bits not in CLUSTERS:
        return []
    return [48, place + 8 * -(-size >> cluster_bits + table_bits)]


def tables_of_qcow2(head: bytes) -> List[int]:
    """The same of a .qcow2."""
    cluster_bits, = struct.unpack_from('>I', head, 20)
    entries, place, count_place, count_clusters = struct.unpack_from('>IQQI', head, 36)
    if cluster_bits not in CLUSTERS or not count_clusters:
        return []
    return [72, place + 8 * entries, count_place + (count_clusters << cluster_bits)]


def check_lies_on_nothing(name: str, file: Any) -> None:
    """Raises HypervisorError for a .qcow2 or .vmdk that holds only what differs from another file. Seen
    with 7.2: VirtualBox doesn't look at that one, and gives the guest zeros for what is there."""
    below = under_qcow(file) or under_vmdk(name, file)
    if below:
        raise HypervisorError('%s holds only what differs from another file, %r, which VirtualBox doesn\'t '
                              'read: make one file of both (qemu-img convert)' % (name, os.fsdecode(below)))


def under_qcow(file: Any) -> bytes:
    """What a .qcow2 lies on, b'' for nothing. Its head: QEMU's docs/interop/qcow2.txt."""
    head = read_at(file, 0, 20)
    place, length = struct.unpack_from('>QI', head.ljust(20, b'\0'), 8)
    return read_at(file, place, min(length, 1023)) if head.startswith(QCOW) and place else b''


def under_vmdk(name: str, file: Any) -> bytes:
    """The same of a .vmdk."""
    text = description_of_disk(name, file)
    parents = [parent for parent in PARENT.findall(text) if parent.lower() not in NO_PARENTS]
    return (PARENT_HINT.findall(text) + parents)[0] if parents else b''


def named_in_disk(name: str, file: Any) -> List[bytes]:
    """The files that it is made of, beside itself. Raises HypervisorError."""
    if not DESCRIPTOR.match(read_at(file, 0, 64)):
        return []
    lines = re.split(b'[\r\n\0]+', description_of_disk(name, file))
    return [extent.group(1) for extent in map(EXTENT.match, lines) if extent]


def description_of_disk(name: str, file: Any) -> bytes:
    """The text of a .vmdk, which is all of it, or a part of it; b'' for another disk. Raises
    HypervisorError."""
    head = read_at(file, 0, 512)
    text = b''
    if DESCRIPTOR.match(head):
        text = read_at(file, 0, LONGEST_TEXT + 1)
    elif head.startswith(VMDK) and len(head) == 512:
        place, sectors = struct.unpack_from('<QQ', head, 28)
        text = read_at(file, place * 512, min(sectors * 512, LONGEST_TEXT + 1))
    if len(text) > LONGEST_TEXT:
        raise HypervisorError('%s is no disk: its description has over %d bytes' % (name, LONGEST_TEXT))
    return text


def check_is_beside(image: str, name: str) -> str:
    """The path of a file that an image names. Raises HypervisorError where it lies elsewhere."""
    folder = os.path.dirname(os.path.abspath(image))
    path = os.path.join(folder, name)
    there = os.path.realpath(path)
    if not any(there.startswith(os.path.join(beside, ''))
               for beside in (os.path.realpath(folder), os.path.dirname(os.path.realpath(image)))):
        raise is_elsewhere(image, name)
    if os.path.exists(there) and not os.path.isfile(there):
        raise HypervisorError('%s is made of what is no regular file: %s' % (image, path))
    return path


def check_is_part(image: str, name: str) -> None:
    """Raises HypervisorError where a file that a disk names isn't beside it, or is none of a disk's by what
    it is called: who made the image knows what lies in many a folder, a home folder above all."""
    path = check_is_beside(image, name)
    if not all(each.lower().endswith(PARTS) for each in (path, os.path.realpath(path))):
        raise HypervisorError('%s is made of %r, that the guest could read then, and that is no disk by its '
                              'name: what an image is made of ends in %s' % (image, name, ', '.join(PARTS)))


def is_elsewhere(image: str, name: str) -> HypervisorError:
    return HypervisorError('%s is made of a file elsewhere, %r, that the guest could read then: use an '
                           'image whose files are all in one folder' % (image, name))


def read_at(file: Any, place: int, length: int) -> bytes:
    """Fewer bytes where the file ends."""
    try:
        file.seek(min(place, 2 ** 62))
    except OSError:                                 # further than a file may be long
        return b''
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
    if len(head) < 512 or not head.startswith(VMDK):
        return 0, 0
    capacity, grain, _, _, count, _, tables_at = struct.unpack_from('<QQQQIQQ', head, 12)
    if tables_at == STREAM_VMDK or not grain * count:
        return 0, 0
    places = numbers_at(file, tables_at * 512, -(-capacity // (grain * count)), 'little')
    tables = [numbers_at(file, place * 512, count, 'little') for place in places if place]
    last = max([0] + [max(table) for table in tables if table])
    return (max([last] + list(places)) + grain) * 512, (grain - 1) * 512
