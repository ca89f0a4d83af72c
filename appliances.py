"""Appliances, by what their files say of themselves: an .ovf, or an .ova, an archive that begins with one.

Strangers make them. What VirtualBox imports it opens, attaches and copies with its user's rights, by the
names that stand there: any file of the host's, or a disk of another VM's, could be the guest's. So an
appliance brings all that it names, under names that lead nowhere else.

What it is not: it asks no hypervisor, and changes nothing; what is closed once a VM was imported is in
vboxdoors.py. Any thread; no state. Sources: DMTF DSP0243 (OVF 1.1), sections 5 to 8; what VirtualBox's own
exports hold (vbox:Machine).
"""

import gzip
import io
import os
import tarfile
import urllib.parse
import xml.parsers.expat
from typing import Any, Dict, Iterator, List, Optional, Tuple

import agent
from faults import HypervisorError
from imagefiles import (
    LONGEST_TEXT,
    check_content,
    check_is_beside,
    check_is_file,
    check_is_whole,
    is_elsewhere,
    read_at,
)

APPLIANCES = '.ova', '.ovf'
DESCRIBING = '.mf', '.cert'               # which of an appliance's files are no disks
ENCODINGS = 'utf-8', 'utf-16', 'us-ascii', 'iso-8859-1', 'windows-1252'        # of a description
GUARDED = 'File', 'Disk', 'Image', 'HardDisk', 'AttachedDevice', 'Section'         # they tell of media
DRIVES = 'DVD', 'Floppy'                  # types of devices whose medium close_doors takes out
OLD_DISKS = 'ovf:DiskSection_Type'        # of a Section: how OVF 0.9 calls its list of disks
GZIPPED = b'\x1f\x8b'
DEEPEST, MOST = 100, 100000               # elements: in each other, and in all; an export has 10, and 200
PLAIN = tarfile.REGTYPE, tarfile.AREGTYPE
TIMES = {'mtime', 'atime', 'ctime'}
BLOCK = 512                               # bytes of an archive's header

Element = Tuple[Tuple[str, ...], Dict[str, str]]      # its name after those of all around it; its attributes


def check_appliance(image: str) -> None:
    """Raises InvalidParams where there is no such file, HypervisorError where it is no appliance, names what
    it doesn't bring, or has a disk that could have a file of this user's in the guest."""
    check_is_file(image)
    try:
        if image.lower().endswith('.ova'):
            check_archive(image)
        else:
            check_folder(image)
    except tarfile.TarError as error:
        raise is_damaged(image, error)
    except OSError as error:
        raise HypervisorError(agent.sentence(error))


def check_folder(image: str) -> None:
    with open(image, 'rb') as file:
        names = check_description(image, file.read(LONGEST_TEXT + 1))
    for path in [check_is_beside(image, name) for name in names]:
        if os.path.isfile(path):                    # VirtualBox tells
            check_is_whole(path)
            with open(path, 'rb') as file:
                check_content(path, unpacked(file), path)


def check_archive(image: str) -> None:
    with tarfile.open(image, 'r:') as archive:
        members = list(plain_files(image, archive))
        if not members or not members[0].name.lower().endswith('.ovf'):
            raise HypervisorError('%s is no appliance: its first file is no .ovf' % image)
        text = archive.extractfile(members[0]).read(LONGEST_TEXT + 1)  # type: ignore
        disks = {name.lower() for name in check_description(image, text)}
        for member in members:
            check_name(image, member.name)
        for member in members[1:]:
            if member.name.lower() in disks or not member.name.lower().endswith(DESCRIBING):
                content = unpacked(archive.extractfile(member))
                check_content('%s in %s' % (member.name, image), content, image)


def plain_files(image: str, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """What an archive holds. Raises HypervisorError for all but plain files, whose header holds all that is
    said of them but times: another program could read it in another way."""
    end = 0
    for member in archive:
        is_plain = set(member.pax_headers) <= TIMES if member.pax_headers else (
            member.offset_data - member.offset == BLOCK)
        if member.type not in PLAIN or not is_plain or member.offset != end:
            raise HypervisorError('%s is no appliance: %r in it is no plain file (tar --format=ustar)' % (
                image, member.name))
        end = member.offset_data + -(-member.size // BLOCK) * BLOCK
        yield member
    with open(image, 'rb') as file:
        if read_at(file, end, LONGEST_TEXT).strip(b'\0'):
            raise HypervisorError('%s is cut or damaged: what follows its last whole file is none' % image)


def unpacked(file: Any) -> Any:
    """A disk's file, of which no more than its begin is looked at where it is packed."""
    if read_at(file, 0, 2) != GZIPPED:
        return file
    file.seek(0)
    try:
        with gzip.GzipFile(fileobj=file) as unzipped:
            return io.BytesIO(unzipped.read(LONGEST_TEXT))
    except (OSError, EOFError):                     # VirtualBox tells
        return io.BytesIO()


def check_description(image: str, text: bytes) -> List[str]:
    """Gives the names of the files that it says it is made of. Raises HypervisorError."""
    if len(text) > LONGEST_TEXT:
        raise HypervisorError('%s is no appliance: its description has over %d bytes' % (image, LONGEST_TEXT))
    elements = read_elements(image, text)
    names = [attributes.get('href', '') for path, attributes in elements if path[-1] == 'File']
    for name in names:
        check_name(image, name)
    check_media(image, elements)
    return [name for name in names if name]


def check_name(image: str, name: str) -> None:
    """Raises HypervisorError where a file's name leads out of the folder that it is in, here or where it is
    copied to."""
    for read in (name, urllib.parse.unquote(name)):
        read = read.replace('\\', '/')
        if read.startswith('/') or '..' in read.split('/') or ':' in read:
            raise is_elsewhere(image, name)


def is_damaged(image: str, error: Exception) -> HypervisorError:
    return HypervisorError('%s is cut or damaged, or no appliance: get it anew (%s)' % (image, error))


def check_media(image: str, elements: List[Element]) -> None:
    """Raises HypervisorError where the VM's settings, as VirtualBox writes them (vbox:Machine), know or
    attach a disk that isn't brought. VirtualBox writes none there; but what was in a drive, which is emptied
    once the VM was imported (vboxdoors.py)."""
    brought = {attributes.get('uuid', '').strip('{}').lower() for path, attributes in elements
               if path[-2:] == ('DiskSection', 'Disk')}
    device = ''
    for path, attributes in elements:
        device = attributes.get('type', '') if path[-1] == 'AttachedDevice' else device
        if 'Machine' not in path:
            continue
        if path[-1] == 'Snapshot' or attributes.get('stateFile'):
            raise HypervisorError('%s holds snapshots or a saved state, which can\'t be imported: export it '
                                  'anew from a VM that is off' % image)
        if 'MediaRegistry' in path and ('location' in attributes or 'uuid' in attributes):
            raise is_elsewhere(image, attributes.get('location', attributes.get('uuid', '')))
        if path[-2:] == ('AttachedDevice', 'HostDrive'):
            raise is_elsewhere(image, attributes.get('src', path[-1]))
        if 'AttachedDevice' in path and path[-1] == 'Image' and device not in DRIVES:
            if attributes.get('uuid', '').strip('{}').lower() not in brought:
                raise is_elsewhere(image, attributes.get('uuid', ''))


def read_elements(image: str, text: bytes) -> List[Element]:
    """All of a description, in its order, without what says whose names these are, as VirtualBox reads it.

    Raises HypervisorError where it is no XML, is XML of another kind (VirtualBox's server dies of such a one,
    and with it whatever else is under way), or is written so that other names could be read in it: with
    entities, or in an encoding of few.
    """
    elements, path = [], []  # type: List[Element], List[str]

    def begin(name: str, attributes: Dict[str, str]) -> None:
        path.append(plain(name))
        if len(path) > DEEPEST or len(elements) >= MOST:
            raise HypervisorError('%s is no appliance: its description has more than %d elements, or %d in '
                                  'each other' % (image, MOST, DEEPEST))
        if path[0] != 'Envelope':
            raise HypervisorError('%s is no appliance: it is XML of another kind (<%s>)' % (image, path[0]))
        known = {plain(key): value for key, value in attributes.items()}
        if len(known) != len(attributes) and path[-1] in GUARDED:
            raise HypervisorError('%s is no appliance: <%s> has an attribute twice' % (image, path[-1]))
        if path[-1] == 'Section' and known.get('type') == OLD_DISKS:
            path[-1] = 'DiskSection'
        elements.append((tuple(path), known))

    def declare(version: str, encoding: Optional[str], standalone: int) -> None:
        if (encoding or 'utf-8').lower() not in ENCODINGS:
            raise HypervisorError('%s is no appliance: it is written in %s' % (image, encoding))

    def refuse(*declared: Any) -> None:
        raise HypervisorError('%s is no appliance: it declares a document type of its own' % image)

    parser = xml.parsers.expat.ParserCreate()
    parser.XmlDeclHandler = declare
    parser.StartElementHandler = begin
    parser.EndElementHandler = lambda name: path.pop()
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(text, True)
    except (xml.parsers.expat.ExpatError, LookupError, ValueError) as error:
        raise is_damaged(image, error)
    return elements


def plain(name: str) -> str:
    """A name without its prefix."""
    return name.rpartition(':')[2]
