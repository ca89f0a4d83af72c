"""What a stranger's image or appliance may name, before any hypervisor is shown it.

Who made it would have any file of this user's in the guest, or written, or a disk of another VM's.
"""

import gzip
import os
import struct
import tarfile

import pytest
from appliance_files import appliance_at, description, vmdk_of
from hypothesis import given, settings
from hypothesis import strategies as some

import faults
import imagefiles
from appliances import check_appliance, read_elements

ELSEWHERE = 'is made of a file elsewhere, %r'
VISO = b' \n--iprt-iso-maker-file-marker-bourne-sh 1234 --volume-id=X /passwd=/etc/passwd\n'
CUE = b'FILE "/etc/passwd" BINARY\n  TRACK 01 MODE1/2048\n    INDEX 01 00:00:00\n'
TEXT = 'is a text, and no disk'


@pytest.fixture(params=['.ova', '.ovf'])
def put(request, tmp_path):
    """Makes an appliance of this description, with these disks; gives its path."""
    def put(text, files=(('disk.vmdk', b'KDMV' + bytes(600)),)):
        path = tmp_path / ('image' + request.param)
        if request.param == '.ova':
            return appliance_at(str(path), text, files)
        path.write_bytes(text.encode())
        for name, content in files:
            (tmp_path / name).write_bytes(content)
        return str(path)

    return put


def refused(image, why):
    with pytest.raises(faults.HypervisorError) as told:
        check_appliance(image)
    assert why in str(told.value) and os.path.dirname(image) in str(told.value)


def test_what_virtualbox_exports_is_taken(put):
    check_appliance(put(description()))
    check_appliance(put('<Envelope><References><File href=""/></References></Envelope>'))
    check_appliance(put('<ovf:Envelope xmlns:ovf="x"/>'))


@pytest.mark.parametrize('name', [
    '/etc/passwd', '../outside', 'sub/../../outside', '..\\outside', 'C:\\outside', 'http://x/outside',
    'file:///etc/passwd', '%2e%2e/outside', '%2Fetc/passwd'])
def test_names_lead_nowhere_else(put, name):
    refused(put(description('<File ovf:href="%s"/>' % name.replace('.', '&#46;'))), ELSEWHERE % name)


@pytest.mark.parametrize('name', ['../outside.iso', '/tmp/outside.iso', 'sub/../../outside.iso'])
def test_nor_do_those_of_an_archive(tmp_path, name):
    """VirtualBox would write that file."""
    image = str(tmp_path / 'image.ova')
    refused(appliance_at(image, files=[(name, b'')]), ELSEWHERE % name)
    refused(appliance_at(image, first=name + '.ovf'), ELSEWHERE % (name + '.ovf'))


def test_a_link_beside_an_appliance_leads_nowhere_else(tmp_path):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'outside').write_bytes(bytes(600))
    (tmp_path / 'images' / 'disk.vmdk').symlink_to(tmp_path / 'outside')
    image = tmp_path / 'images' / 'image.ovf'
    image.write_text(description())
    refused(str(image), ELSEWHERE % 'disk.vmdk')


@pytest.mark.parametrize('settings, named', [
    ('<MediaRegistry><HardDisks><HardDisk uuid="{1}" location="/dev/sda" format="RAW"/></HardDisks>'
     '</MediaRegistry>', '/dev/sda'),
    ('<MediaRegistry><DVDImages><Image uuid="{1}" location="/etc/passwd"/></DVDImages></MediaRegistry>',
     '/etc/passwd'),
    ('<x:MediaRegistry xmlns:x="y"><HardDisks><HardDisk location="127.0.0.1|iqn|0" format="iSCSI"/>'
     '</HardDisks></x:MediaRegistry>', '127.0.0.1|iqn|0')])
def test_no_medium_is_known_that_is_not_brought(put, settings, named):
    refused(put(description(settings=settings)), ELSEWHERE % named)


@pytest.mark.parametrize('device, named', [
    ('<Image uuid="{22222222-0000-4000-8000-000000000000}"/>', '{22222222-0000-4000-8000-000000000000}'),
    ('<HostDrive src="/dev/sr0"/>', '/dev/sr0')])
def test_no_medium_is_attached_that_is_not_brought(put, device, named):
    attached = '<AttachedDevice type="HardDisk">%s</AttachedDevice>' % device
    refused(put(description(attached=attached)), ELSEWHERE % named)


def test_what_was_in_a_drive_is_not_needed(put):
    """VirtualBox exports it only where it is asked to, but tells of it."""
    device = '<AttachedDevice %s><Image uuid="{22222222-0000-4000-8000-000000000000}"/></AttachedDevice>'
    for kind in 'DVD', 'Floppy':
        check_appliance(put(description(attached=device % ('type="%s"' % kind))))
    refused(put(description(attached=device % '')), 'is made of a file elsewhere')
    refused(put(description(attached=device % 'xmlns:a="b" a:type="DVD" type="HardDisk"')),
            '<AttachedDevice> has an attribute twice')


def test_disks_are_brought_as_ovf_0_9_says_it(put):
    text = description().replace('<Envelope', '<Envelope xmlns:xsi="x"')
    text = text.replace('</DiskSection>', '</Section>')
    check_appliance(put(text.replace('<DiskSection>', '<Section xsi:type="ovf:DiskSection_Type">')))
    refused(put(text.replace('<DiskSection>', '<Section xsi:type="ovf:OtherSection_Type">')),
            'is made of a file elsewhere')


def test_an_attribute_that_is_there_twice_hides_none(put):
    text = description().replace('ovf:href=', 'xmlns:a="b" a:href="../outside" ovf:href=')
    refused(put(text), '<File> has an attribute twice')


@pytest.mark.parametrize('text', [
    description(settings='<Snapshot uuid="{1}"/>'), description(attributes='stateFile="x.sav"')])
def test_a_saved_state_or_snapshots_are_told(put, text):
    refused(put(text), 'holds snapshots or a saved state, which can\'t be imported: export it anew')


def test_no_words_are_declared_that_hide_what_is_named(put):
    text = description().replace('<Envelope', '<!DOCTYPE a [<!ENTITY y "../outside">]><Envelope', 1)
    refused(put(text.replace('disk.vmdk', '&y;')), 'declares a document type of its own')


@pytest.mark.parametrize('kind', ['disk.vmdk', 'part'])
def test_a_pipe_is_no_file(tmp_path, kind):
    """VirtualBox would wait for who writes into it."""
    os.mkfifo(str(tmp_path / kind))
    (tmp_path / 'image.vmdk').write_text(vmdk_of('part'))
    (tmp_path / 'image.ovf').write_text(description())
    with pytest.raises(faults.HypervisorError, match='is made of what is no regular file: .*' + kind):
        if kind == 'part':
            imagefiles.check_image(str(tmp_path / 'image.vmdk'))
        check_appliance(str(tmp_path / 'image.ovf'))


@pytest.mark.parametrize('text, why', [
    ('<?xml version="1.0" encoding="utf-7"?><Envelope/>', 'it is written in utf-7'),
    ('<?xml version="1.0"?>\n<!-- <Envelope> -->\n<x/>', 'it is XML of another kind (<x>)'),
    ('<Envelope><File', 'is cut or damaged, or no appliance: get it anew'),
    ('', 'is cut or damaged, or no appliance: get it anew'),
    ('<Envelope>%s%s</Envelope>' % ('<a>' * 100000, '</a>' * 100000), 'or 100 in each other'),
    ('<Envelope>%s</Envelope>' % ('<a/>' * 100000), 'has more than 100000 elements'),
    ('<Envelope a="%s"/>' % ('x' * imagefiles.LONGEST_TEXT), 'its description has over 16777216 bytes')])
def test_what_is_no_appliance_is_told_to_be_none(put, text, why):
    """VirtualBox's server dies of XML of another kind, and with it whatever else is under way."""
    refused(put(text or ' '), why)


@pytest.mark.parametrize('content, why', [
    (VISO, TEXT), (CUE, TEXT), (b'QED\0' + bytes(600), 'is a .qed image'), (gzip.compress(VISO), TEXT),
    (vmdk_of('/etc/passwd').encode(), ELSEWHERE % '/etc/passwd'),
    (vmdk_of('x', parent='12345678').encode(), 'holds only what differs')],
    ids=['VISO', 'CUE', 'QED', 'packed VISO', 'VMDK', 'differences'])
def test_what_its_disks_name_is_looked_at(put, content, why):
    refused(put(description(), [('disk.vmdk', content)]), why)


def test_what_a_disk_says_to_lie_further_than_a_file_may_be_long_is_told_of_that_disk(put):
    far = b'QFI\xfb\0\0\0\3' + b'\xff' * 100 + bytes(600)
    refused(put(description(), [('disk.vmdk', far)]), 'its tables are not in it')


def test_a_disk_is_looked_at_whatever_its_name(put):
    refused(put(description().replace('disk.vmdk', 'disk.mf'), [('disk.mf', VISO)]), TEXT)


def archive_of(tmp_path, change):
    """An appliance whose disk's entry was changed."""
    entry = tarfile.TarInfo('disk.vmdk')
    change(entry)
    return appliance_at(str(tmp_path / 'image.ova'), files=[(entry, bytes(100))], format=tarfile.PAX_FORMAT)


@pytest.mark.parametrize('changes', [
    {'type': tarfile.LNKTYPE, 'linkname': '/etc/passwd'}, {'type': tarfile.SYMTYPE, 'linkname': 'x'},
    {'type': tarfile.GNUTYPE_SPARSE}, {'type': tarfile.CHRTYPE}, {'pax_headers': {'path': 'x'}},
    {'pax_headers': {'size': '5'}}, {'name': 'x' * 200}])
def test_an_archive_holds_plain_files(tmp_path, changes):
    def change(entry):
        for name, value in changes.items():
            setattr(entry, name, value)

    refused(archive_of(tmp_path, change), 'is no plain file (tar --format=ustar)')


def test_an_archive_may_hold_times(tmp_path):
    check_appliance(archive_of(tmp_path, lambda entry: setattr(entry, 'mtime', 1.5)))


def test_nothing_follows_an_archive(tmp_path):
    image = tmp_path / 'image.ova'
    appliance_at(str(image))
    whole = image.read_bytes()
    image.write_bytes(whole + whole)
    refused(str(image), 'what follows its last whole file is none')
    for length in 2000, 100, 0:
        image.write_bytes(whole[:length])
        refused(str(image), 'is cut or damaged')


def test_an_archive_begins_with_its_description(tmp_path):
    image = tmp_path / 'image.ova'
    with tarfile.open(str(image), 'w', format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo('disk.vmdk'))
    refused(str(image), 'its first file is no .ovf')


@settings(max_examples=200, deadline=None)
@given(some.binary(max_size=200))
def test_any_bytes_are_read_or_told(text):
    for each in (text, b'<Envelope>' + text + b'</Envelope>', b'<Envelope ' + text + b'/>'):
        try:
            read_elements('image.ovf', each)
        except faults.HypervisorError as error:
            assert str(error).startswith('image.ovf ')


# --- disks ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('content', [VISO, CUE, VISO.lstrip(), b'\n' * 5000 + VISO],
                         ids=['VISO', 'CUE', 'VISO at once', 'VISO late'])
@pytest.mark.parametrize('name', ['disc.iso', 'disk.vdi'])
def test_a_text_is_no_disk(tmp_path, name, content):
    """VirtualBox makes discs of the files that it names."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(faults.HypervisorError, match='%s %s' % (name, TEXT)):
        imagefiles.check_image(str(tmp_path / name))


@pytest.mark.parametrize('head', [
    b'<<< Oracle VM VirtualBox Disk Image >>>\n', b'WithoutFreeSpace' + 4 * b'\2\0\0\0', b'conectix\0\0\0\2',
    b'QFI\xfb', b'vhdxfileM\0i\0', b'KDMV', b'\xeb\x63\x90', bytes(16), b'', b'short text'])
def test_a_disk_of_any_kind_is_no_text(tmp_path, head):
    image = tmp_path / 'image.vdi'
    for content in (head, head + bytes(4096)):
        image.write_bytes(content)
        imagefiles.check_image(str(image))


@pytest.mark.parametrize('name', ['/etc/passwd', '../outside', 'sub/../../outside', 'link'])
def test_a_disk_that_names_a_file_elsewhere(tmp_path, name):
    folder = tmp_path / 'images'
    (folder / 'sub').mkdir(parents=True)
    (tmp_path / 'outside').write_bytes(b'x' * 512)
    (folder / 'link').symlink_to(tmp_path / 'outside')
    image = folder / 'image.vmdk'
    image.write_text(vmdk_of('part.vmdk', name).replace('\n', '\r\n'))
    with pytest.raises(faults.HypervisorError, match=ELSEWHERE % name):
        imagefiles.check_image(str(image))


@pytest.mark.parametrize('name', ['.netrc', 'tax.pdf', 'id_rsa', 'called.vmdk'])
def test_a_disk_is_made_of_disks(tmp_path, name):
    """Who made it knows what lies in a home folder, into which somebody may have put it."""
    (tmp_path / '.pgpass').write_bytes(b'x' * 512)
    (tmp_path / 'called.vmdk').symlink_to(tmp_path / '.pgpass')
    (tmp_path / 'image.vmdk').write_text(vmdk_of('image-flat.vmdk', name))
    (tmp_path / 'image.ovf').write_text(description().replace('disk.vmdk', 'image.vmdk'))
    for check, image in (imagefiles.check_image, 'image.vmdk'), (check_appliance, 'image.ovf'):
        with pytest.raises(faults.HypervisorError, match='made of %r, .* no disk by its name' % name):
            check(str(tmp_path / image))


def embedded(text):
    """A .vmdk in one file, which describes itself in its second sector."""
    head = struct.pack('<4sIIQQQQ', b'KDMV', 1, 3, 0, 0, 1, 1)
    return head.ljust(512, b'\0') + text.encode().ljust(512, b'\0')


LIES_ON = {
    'qcow2': struct.pack('>4sIQI', b'QFI\xfb', 3, 512, 6).ljust(512, b'\0') + b'beside',
    'text.vmdk': vmdk_of('part', parent='1234abcd', more=['parentFileNameHint="beside"']).encode(),
    'vmdk': embedded('parentCID=1234abcd\nparentFileNameHint = "beside"\n'),
    'box.vmdk': embedded('parentCID=ffffffff\nparentFileNameHint="beside"\nddb.uuid.parent="b8e5"\n')}


@pytest.mark.parametrize('kind', sorted(LIES_ON))
def test_a_disk_that_holds_only_differences_makes_none_of_zeros(tmp_path, kind):
    image = tmp_path / ('image.' + kind)
    image.write_bytes(LIES_ON[kind])
    with pytest.raises(faults.HypervisorError, match='differs from another file, \'beside\''):
        imagefiles.check_image(str(image))


@pytest.mark.parametrize('content', [
    b'QFI\xfb', embedded(''),
    embedded('parentCID=FFFFFFFF\nddb.uuid.parent="00000000-0000-0000-0000-000000000000"\n'), b''])
def test_a_disk_that_holds_all_is_taken(tmp_path, content):
    (tmp_path / 'image.vmdk').write_bytes(content)
    imagefiles.check_image(str(tmp_path / 'image.vmdk'))


@pytest.mark.parametrize('place, sectors', [(1, 2 ** 64 - 1), (1, 2 ** 20), (2 ** 63, 1), (3, 1)])
def test_the_description_of_a_disk_is_in_it(put, place, sectors):
    """Seen with 7.2: VirtualBox's server dies of one in an appliance that isn't, and all VMs with it."""
    content = bytearray(embedded('parentCID=ffffffff\n'))
    struct.pack_into('<QQ', content, 28, place, sectors)
    refused(put(description(), [('disk.vmdk', bytes(content))]), 'its description is not in it')


def qcow2(cluster_bits=9, entries=8, place=512, counts=1024, clusters=1):
    head = struct.pack('>4sIQIIQIIQQI', b'QFI\xfb', 3, 0, 0, cluster_bits, 1 << 20, 0, entries, place, counts,
                       clusters)
    return head.ljust(1536, b'\0')


def qcow(cluster_bits=12, table_bits=9, place=48):
    return struct.pack('>4sIQIIQBBHIQ', b'QFI\xfb', 1, 0, 0, 0, 1 << 23, cluster_bits, table_bits, 0, 0,
                       place).ljust(48 + 32, b'\0')


@pytest.mark.parametrize('content, is_whole', [
    (qcow2(), True), (qcow2()[:-1], False), (qcow2()[:600], False), (qcow2()[:70], False),
    (qcow2(entries=200), False), (qcow2(place=2 ** 63), False), (qcow2(counts=2 ** 63), False),
    (qcow2(clusters=2 ** 31), False), (qcow2(clusters=0), False), (qcow2(cluster_bits=63), False),
    (qcow(), True), (qcow()[:-1], False), (qcow(place=512), False), (qcow(cluster_bits=255), False)])
def test_the_tables_of_a_disk_are_in_it(tmp_path, content, is_whole):
    """Seen with 7.2: VirtualBox's server dies of some without, and all VMs with it."""
    image = tmp_path / 'image.qcow2'
    image.write_bytes(content)
    if is_whole:
        imagefiles.check_image(str(image))
    else:
        with pytest.raises(faults.HypervisorError, match='its tables are not in it'):
            imagefiles.check_image(str(image))


@pytest.mark.parametrize('place, value, why', [
    (32, 1, 'a cipher'), (60, 1, 'snapshots'), (76, 8, 'features that need a newer reader'), (84, 1, '')])
def test_what_virtualbox_does_not_read_in_a_qcow2_is_told(tmp_path, place, value, why):
    image, content = tmp_path / 'image.qcow2', bytearray(qcow2())
    content[place:place + 4] = struct.pack('>I', value)
    image.write_bytes(bytes(content))
    if not why:
        imagefiles.check_image(str(image))
    else:
        with pytest.raises(faults.HypervisorError, match='has %s, which VirtualBox doesn\'t read' % why):
            imagefiles.check_image(str(image))


@pytest.mark.parametrize('head, why', [
    (b'WithouFreSpacExt', 'is a Parallels image of a kind that VirtualBox reads wrongly'),
    (struct.pack('<16sIIII', b'WithoutFreeSpace', 2, 16, 32, 0), 'a track of it has no sectors'),
    (b'WithoutFreeSpace', 'a track of it has no sectors'),
    (struct.pack('<16sIIII', b'WithoutFreeSpace', 2, 16, 32, 2048), '')])
def test_a_parallels_image_is_one_that_virtualbox_can_read(tmp_path, head, why):
    image = tmp_path / 'image.hdd'
    image.write_bytes(head.ljust(64, b'\0'))
    if not why:
        imagefiles.check_image(str(image))
    else:
        with pytest.raises(faults.HypervisorError, match=why):
            imagefiles.check_image(str(image))


def test_an_image_of_several_files_beside_it_is_as_good_as_any(tmp_path):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'else.vmdk').symlink_to(tmp_path / 'sub' / 'disk.vmdk')
    names = 'part-1.vmdk', 'sub/part-2.IMG', str(tmp_path / 'sub' / 'part-3.raw')
    (tmp_path / 'sub' / 'disk.vmdk').write_text(vmdk_of(*names))
    for image in 'sub/disk.vmdk', 'else.vmdk':
        imagefiles.check_image(str(tmp_path / image))
    (tmp_path / 'image.ovf').write_text(description().replace('disk.vmdk', 'sub/disk.vmdk'))
    check_appliance(str(tmp_path / 'image.ovf'))
