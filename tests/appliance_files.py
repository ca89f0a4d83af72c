"""Files of appliances and disks, as their makers write them, or as a stranger would."""

import io
import tarfile

DISK_UUID = 'aaaaaaaa-2222-4333-8444-000000000001'
DESCRIPTION = '''<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:vbox="http://www.virtualbox.org/ovf/machine">
  <References><File ovf:id="file1" ovf:href="disk.vmdk"/>{files}</References>
  <DiskSection><Disk ovf:diskId="vmdisk1" ovf:fileRef="file1" vbox:uuid="{uuid}"/></DiskSection>
  <VirtualSystem ovf:id="web">
    <vbox:Machine uuid="{{11111111-2222-4333-8444-555555555555}}" name="web" {attributes}>
      <Hardware/>{settings}
      <StorageControllers><StorageController name="SATA"><AttachedDevice type="HardDisk" port="0">
        <Image uuid="{{{uuid}}}"/></AttachedDevice>{attached}</StorageController></StorageControllers>
    </vbox:Machine>
  </VirtualSystem>
</Envelope>
'''


def description(files='', attributes='', settings='', attached=''):
    """That of a VM with one disk, as VirtualBox exports it, and more."""
    return DESCRIPTION.format(files=files, attributes=attributes, settings=settings, attached=attached,
                              uuid=DISK_UUID)


def appliance_at(path, text=None, files=(('disk.vmdk', b'KDMV' + bytes(600)),), format=tarfile.USTAR_FORMAT,
                 first='image.ovf'):
    """An .ova file of this description, called `first`, with these files. Gives its path."""
    with tarfile.open(path, 'w', format=format) as archive:
        for name, content in [(first, (text or description()).encode())] + list(files):
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def vmdk_of(*names, parent='ffffffff', more=()):
    """A disk that is a text, and names the files of its parts."""
    return '\n'.join(['# Disk DescriptorFile', 'version=1', 'parentCID=' + parent,
                      'createType="twoGbMaxExtentFlat"']
                     + ['RW 8192 FLAT "%s" 0' % name for name in names]
                     + ['ddb.adapterType = "ide"'] + list(more) + [''])
