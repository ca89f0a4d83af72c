"""What the tests of the real VirtualBox share: a view of it past the host agent."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import xml.etree.ElementTree

from helpers import beside, wait_until
from vms import command_line, kill, processes

import vboxprogram

AS_VBOXMANAGE_SAYS = {'PoweredOff': 'poweroff', 'Running': 'running', 'Paused': 'paused', 'Saved': 'saved',
                      'Aborted': 'aborted', 'AbortedSaved': 'aborted-saved'}


class Refused(Exception):
    """VBoxManage said no."""


COMES_UP_IN = 60.0             # seconds that a VirtualBox that just goes may take to come up anew
NOT_UP = 'the VirtualBox COM server is not running or failed to start'
# Of showvminfo, beside another one.
LOOKED_AT = 'The object is not ready', 'The session is not locked', 'already has a lock request pending'


def manage(*words, patience=900):
    """What VBoxManage says; fails where it fails, but for want of a server that just goes, as its last client
    did: it says so within a second, and has done nothing."""
    deadline = time.monotonic() + COMES_UP_IN
    while True:
        done = subprocess.run(('VBoxManage',) + words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              universal_newlines=True, timeout=patience)
        if not done.returncode or NOT_UP not in done.stdout or time.monotonic() > deadline:
            break
        time.sleep(0.5)                # there is nothing to wait for but the server that goes
    if done.returncode:
        raise Refused('VBoxManage %s: %s' % (' '.join(words), done.stdout))
    return done.stdout


def try_manage(*words):
    """Whether VBoxManage does it: not while the VM's process is on its way, say."""
    with contextlib.suppress(Refused):
        manage(*words)
        return True
    return False


def facts(vm):
    """{key: value} of `VBoxManage showvminfo --machinereadable`; the host may just look at the VM, too, by
    VirtualBox's API."""
    deadline = time.monotonic() + 20
    while True:
        try:
            with vboxprogram.in_turn(('list', 'vms', '--long'), lambda moved: None):    # whichever VM it is
                lines = manage('showvminfo', vm, '--machinereadable', patience=120).splitlines()
            break
        except Refused as error:
            if time.monotonic() > deadline or not any(words in str(error) for words in LOOKED_AT):
                raise
        time.sleep(0.3)                # until the other one has looked, which nobody tells
    pairs = (line.partition('=') for line in lines if '=' in line)
    return {key.strip('"'): value.strip('"') for key, _, value in pairs}


@contextlib.contextmanager
def uplinks():
    """Two interfaces, in the rig's own network: eth7, which has the default route, and eth8; gives what moves
    the route to one of them, or takes it away ('')."""
    def ip(words, **how):
        return subprocess.run(['ip'] + words.split(), **dict({'check': True}, **how))

    def route(interface):
        ip('route flush exact 0.0.0.0/0')
        if interface:
            ip('route add default dev ' + interface)
    try:
        for number in '78':
            ip('link add eth%s type veth peer name far%s' % (number, number))
            ip('addr add 192.0.%s.1/24 dev eth%s' % (number, number))
            ip('link set eth%s up' % number)
            ip('link set far%s up' % number)
        route('eth7')
        yield route
    finally:
        for number in '78':
            ip('link del eth' + number, check=False)


def a_vm_is_moved(box, images, tmp_path):
    """Its folder, and the image on which its disk lies, are elsewhere; VirtualBox has noticed, or not."""
    places = [tmp_path / ('a place & %d' % number) for number in range(3)]
    (places[0] / 'slot').mkdir(parents=True)
    shutil.copy(str(images / 'disk.vdi'), str(places[0] / 'image.vdi'))
    box.create_vm('task', str(places[0] / 'image.vdi'), {
        'memory': 16, 'linked': True, 'owner': 'me', 'folder': str(places[0] / 'slot')})
    before = (places[0] / 'image.vdi').read_bytes(), box.describe('task')['id']
    for here, there, notices in ((places[0], places[1], False), (places[1], places[2], True)):
        assert box.start('task') and box.save_state('task')
        os.rename(str(here), str(there))
        if notices:
            kill(vboxsvc())
        assert box.register_vm('task', str(there / 'slot'), 'me') is True
        assert (box.state('task'), box.describe('task')['id']) == ('Saved', before[1])
    assert box.start('task') and box.power_off('task') and box.remove_vm('task', True) == []
    assert (places[2] / 'image.vdi').read_bytes() == before[0] and not (places[2] / 'slot' / 'task').exists()


def cards_of(vm):
    """(kind, interface to which it is bridged or '') of each card of a VM in use, as VirtualBox says."""
    said = facts(vm)
    return [(said[key], said.get('bridgeadapter' + key[3:], '')) for key in sorted(said)
            if re.match('nic[1-8]$', key) and said[key] != 'none']


def state_of(vm):
    """The VM's state, as VBoxManage says; '' while it can't be read."""
    with contextlib.suppress(Refused):
        return facts(vm)['VMState']
    return ''


def is_locked(vm):
    """Whether somebody, such as its process, has the VM, as VBoxManage says."""
    with contextlib.suppress(Refused):
        return 'SessionName' in facts(vm)
    return False


def vm_process(vm):
    """The process that runs a VM, None where there is none."""
    for pid in processes():
        words = command_line(pid)
        if words and words[0].endswith('VBoxHeadless') and vm in words:
            return pid
    return None


def vboxsvc():
    """The process VBoxSVC."""
    for pid in processes():
        if (command_line(pid) or [''])[0].endswith('VBoxSVC'):
            return pid
    return None


def slowed(pid):
    """A process gets a tenth of its time, so that what it does can be looked at while it does it."""
    def hold_up():
        with stopped(pid):
            time.sleep(0.2)
    return beside(hold_up, 0.02)


@contextlib.contextmanager
def stopped(pid):
    """The process hangs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def settings_files():
    """{uuid: its .vbox file} of all VMs, from where VirtualBox writes them down: each time that a test asked
    VBoxManage instead, that would take 0.05 s of a processor."""
    home = os.environ['VBOX_USER_HOME']

    def elements():
        with contextlib.suppress(FileNotFoundError, xml.etree.ElementTree.ParseError):     # it is replaced
            return list(xml.etree.ElementTree.parse(os.path.join(home, 'VirtualBox.xml')).getroot().iter())
    return {each.get('uuid').strip('{}'): os.path.join(home, each.get('src'))
            for each in wait_until(elements, 20) if each.tag.endswith('MachineEntry')}


def remove(uuid):
    """A VM, whatever its state; its files too, also those that VirtualBox leaves, where it takes a disk for
    locked: they would be in the way of the next one of its name."""
    folder = os.path.dirname(settings_files().get(uuid, ''))
    unregister(uuid)
    place = os.path.join(os.environ['VBOX_USER_HOME'], 'vms')
    if folder.startswith(place + os.sep) and os.path.isdir(folder):
        disks = re.findall(r'^Location: +(.*)$', manage('list', 'hdds'), re.MULTILINE)
        for disk in reversed(disks):                   # what lies on another one comes after it
            if disk.startswith(folder + os.sep):       # which others look at meanwhile
                wait_until(lambda: try_manage('closemedium', 'disk', disk), 20, 0.3)  # noqa: B023
        shutil.rmtree(folder)


def unregister(uuid):
    """Takes a VM out of VirtualBox's list, with its files as far as it likes."""
    pid = vm_process(uuid)
    if pid:
        kill(pid)
        # Until VirtualBox has noticed, it would unregister the VM, and leave disks that it takes for locked.
        wait_until(lambda: not is_locked(uuid), 20, 0.3)
    # While its process ends the VM is locked; files that stay would be in the next one's way.
    wait_until(lambda: try_manage('unregistervm', uuid, '--delete') or uuid not in manage('list', 'vms'),
               20, 0.3)


def chirp_port(vm):
    """The port of this machine by which a guest's Chirp server is reached."""
    return int(next(value for value in facts(vm).values() if value.startswith('vmhost-chirp,')).split(',')[3])


def forwards_are_served_and_move(vm, forwards, start, save):
    """Of a new VM that was made with ports 80, and 22 for all addresses, forwarded to free ones; and of its
    Chirp port.

    forwards    gives them as they are now
    """
    first, second = forwards()
    assert (first['guestPort'], first['isRemote'], second['guestPort'], second['isRemote']) == (
        80, False, 22, True)
    start()
    for each, address in ((first, '127.0.0.1'), (second, '127.0.0.1'), (second, '127.0.0.2')):
        socket.create_connection((address, each['hostPort'])).close()
    save()
    chirp = chirp_port(vm)
    with socket.socket() as other, socket.socket() as another:
        for taker, port in ((other, first['hostPort']), (another, chirp)):
            taker.bind(('127.0.0.1', port))
            taker.listen(1)
        start()
    moved, stayed = forwards()
    assert chirp_port(vm) not in (chirp, moved['hostPort'], stayed['hostPort'])
    socket.create_connection(('127.0.0.1', chirp_port(vm))).close()
    assert moved == dict(first, hostPort=moved['hostPort']) != first and stayed == second
    for each in moved, stayed:
        socket.create_connection(('127.0.0.1', each['hostPort'])).close()


def forget_networks():
    """Removes all host-only interfaces and DHCP servers."""
    for name in re.findall(r'^Name: +(vboxnet\d+)$', manage('list', 'hostonlyifs'), re.MULTILINE):
        manage('hostonlyif', 'remove', name)
    for name in re.findall(r'^NetworkName: +(.*)$', manage('list', 'dhcpservers'), re.MULTILINE):
        manage('dhcpserver', 'remove', '--network', name)
