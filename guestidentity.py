"""Who a guest is, and what it keeps of that: its folders, its id, its secret, the host that it trusts.

What it is not: the proof by that secret, which protocol.py makes, or the network cards (guestmachine.py). No
threads of its own; the main thread or the link's uses it, one at a time. No locks.
"""

import hmac
import logging
import os
import re
import socket
import stat
from typing import Any, List, Tuple

import agent
from guestmachine import Network

ROOTS_STATE = '/var/lib/vmguest'
STATE_NAME = 'vmguest-state'   # of the folder beside guest.ini
SERVED = 'vmguest-files'       # the folder that is served by default, in state_dir
BOARD_SERIAL = '/sys/class/dmi/id/board_serial'
CHASSIS_SERIAL = '/sys/class/dmi/id/chassis_serial'
PORT_OF_FIRMWARE = re.compile('vmhost-port:([0-9]{1,5})')
OF_FIRMWARE = re.compile('vmhost:([0-9a-f]{32})')
DIGITS = re.compile('[0-9a-fA-F]{64}')
PASSED = 0o711                 # mode of folders that another user may pass, to a file of its own

log = logging.getLogger('vmguest')


# --- folders ---------------------------------------------------------------------------------

def settle_folders(vm: Any, ini: str) -> None:
    """Puts real paths in place of the defaults of state_dir and dir_to_serve. Raises AgentError.

    ``vm``: the settings [VM]; ``ini``: guest.ini's path, or ''. Makes nothing.
    """
    served = '' if vm.dir_to_serve == SERVED else os.path.abspath(vm.dir_to_serve)
    if vm.state_dir == 'auto':
        vm.state_dir = next((folder for folder in state_folders(ini) if not is_within(folder, served)), '')
        if not vm.state_dir:
            raise agent.AgentError('[VM] state_dir: each folder that it could be lies within dir_to_serve '
                                   '%s; name another one' % served)
    vm.dir_to_serve = served or os.path.join(vm.state_dir, SERVED)
    for folder in (vm.state_dir, os.path.join(vm.state_dir, 'spool')):
        if is_within(folder, vm.dir_to_serve):
            raise agent.AgentError('[VM] state_dir %s lies within dir_to_serve %s, where commands could '
                                   'change it: name another one' % (vm.state_dir, vm.dir_to_serve))


def state_folders(ini: str) -> List[str]:
    """Where the agent's own things may be, the best one first."""
    if os.geteuid() == 0:
        return [ROOTS_STATE]
    home = os.environ.get('XDG_STATE_HOME') or os.path.expanduser('~/.local/state')
    folder = os.path.dirname(os.path.abspath(ini)) if ini else agent.current_folder()
    usable = os.path.isabs(home) and os.access(agent.existing(home), os.W_OK | os.X_OK)
    return [os.path.join(home, 'vmguest')] * usable + [os.path.join(folder, STATE_NAME)]


def is_within(path: str, folder: str) -> bool:
    """Whether a path is a folder, or in it, by whatever links."""
    if not folder:
        return False
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return path == folder or path.startswith(folder.rstrip('/') + '/')


def make_folder(path: str, mode: int = PASSED) -> None:
    """Makes a folder of the agent's own, or takes the one that is there, if it is this user's, and no link.

    Raises AgentError.
    """
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        try:
            os.mkdir(path, mode)
        except FileExistsError:
            log.debug('%s is there', path)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise agent.AgentError('the folder %s can\'t be used: %s' % (path, error.strerror))
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise agent.AgentError('the folder %s belongs to another user: chown it, or name another one'
                                   % path)
        os.fchmod(descriptor, mode)
    except OSError as error:           # read-only, say
        raise agent.AgentError('the folder %s can\'t be used: %s' % (path, error.strerror))
    finally:
        os.close(descriptor)


# --- id --------------------------------------------------------------------------------------

def identify(vm: Any, network: Network, address: str) -> Tuple[str, str]:
    """Id and network card of a machine that has that local address towards the broker.

    ``vm``: the settings [VM]. The id is the MAC of the card; the machine's name where it has none.
    """
    card = network.interface_with(address) if vm.network_interface == 'auto' else vm.network_interface
    if vm.id != 'auto':
        return read_id(vm.id), card
    by_name = re.sub('[^A-Za-z0-9._-]', '-', socket.gethostname()).strip('-._')[:64] or 'guest'
    return (network.mac_of(card) if card else '') or by_name, card


def read_id(text: str) -> str:
    """An id as the host knows it: MACs in upper case."""
    return text.upper() if re.fullmatch('(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}', text) else text


# --- secret ----------------------------------------------------------------------------------

class Secret:
    """What this guest and its host share and nobody else knows, and which host that is.

    ``value`` is the key as bytes: 32, or the firmware's 16. ``source`` says where it is from:
    guest.ini, firmware, or made (by this guest, at its first start).

    One that was made is told at the first use. Where the host is looked for at several addresses, each is
    told another value, made of it: who listens at one doesn't learn what another is told.
    """

    def __init__(self, vm: Any, name: str, serial: str = BOARD_SERIAL) -> None:
        """``vm``: the settings [VM]. ``name``: of the files in state_dir. Raises AgentError."""
        self._pin_path = os.path.join(vm.state_dir, name + '.host')
        self._made_path = os.path.join(vm.state_dir, name + '.secret')
        if vm.secret != 'auto':
            self.source, digits = 'guest.ini', read_configured(vm.secret)
        else:
            digits = read_firmware(serial)
            self.source = 'firmware' if digits else 'made'
        self._made = self.value = bytes.fromhex(digits or self._read_or_make())
        self._place = self._pinned()[1] if self.source == 'made' else ''       # where it was told
        if self._place:
            self.value = of_place(self._made, self._place)

    def _read_or_make(self) -> str:
        try:
            if not os.path.lexists(self._made_path):
                write_private(self._made_path, os.urandom(32).hex() + '\n')
                log.info('made a secret: %s', self._made_path)
            return read_digits(self._made_path)
        except OSError as error:
            raise agent.AgentError('the secret %s can\'t be used: %s' % (self._made_path, error.strerror))
        except agent.AgentError as error:
            raise agent.AgentError('the secret %s' % error)

    @property
    def host_key(self) -> str:
        """The key id of the host that this guest trusts; '' before the first one."""
        return self._pinned()[0]

    def _pinned(self) -> Tuple[str, str]:
        """(key id, place) of the host that this guest trusts."""
        try:
            with open(self._pin_path) as file:
                key, _, place = file.read().strip().partition('\n')
                return key, place
        except FileNotFoundError:
            return '', ''

    def pin(self, host_key: str) -> None:
        """From now on no other host is trusted. Raises OSError."""
        write_private(self._pin_path, '%s\n%s' % (host_key, self._place + '\n' if self._place else ''))

    def arrive(self, place: str) -> None:
        """The address where it may be told next; '' where that is the only one there is."""
        if self.may_be_told:
            self._place = place
            self.value = of_place(self._made, place) if place else self._made

    @property
    def may_be_told(self) -> bool:
        """Whether HELLO may tell it: one that was made here, as long as no host is trusted."""
        return self.source == 'made' and not self.host_key


def of_place(secret: bytes, place: str) -> bytes:
    """What is told at one of several addresses."""
    return hmac.new(secret, ('place\n' + place).encode('utf-8'), 'sha256').digest()


def read_configured(value: str) -> str:
    """The digits of [VM] secret, which holds them, or the path of a file that does. Raises AgentError."""
    if DIGITS.fullmatch(value):
        return value
    try:
        return read_digits(value)
    except OSError as error:
        raise agent.AgentError('[VM] secret: %s: %s; expected auto, 64 hexadecimal digits, or the path of a '
                               'file that holds them' % (value, error.strerror))
    except agent.AgentError as error:
        raise agent.AgentError('[VM] secret: %s' % error)


def check_configured(vm: Any) -> None:
    """That [VM] secret is one, before the agent has an id to use it for. Raises AgentError."""
    if vm.secret != 'auto':
        read_configured(vm.secret)


def warn_of_readers(vm: Any, ini: str) -> None:
    """Says so in the log where others can read the secret in guest.ini."""
    if DIGITS.fullmatch(vm.secret) and agent.is_open_to_others(ini):
        log.warning('others can read [VM] secret: chmod 600 %s', ini)


def read_digits(path: str) -> str:
    """The digits in a file that only its owner may read. Raises AgentError, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, encoding='ascii', errors='replace') as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise agent.AgentError('%s is no file' % path)
        if found.st_mode & 0o077 or found.st_uid not in (0, os.geteuid()):
            raise agent.AgentError('%s can be read by others: chmod 600 it, and chown it to the agent\'s user'
                                   % path)
        text = file.read(200).strip()
    if not DIGITS.fullmatch(text):
        raise agent.AgentError('%s should hold 64 hexadecimal digits' % path)
    return text


def read_firmware(path: str, pattern: Any = OF_FIRMWARE) -> str:
    """The digits that the hypervisor wrote as the board's serial number; '' where there are none."""
    try:
        with open(path, encoding='ascii', errors='replace') as file:
            found = pattern.fullmatch(file.read(200).strip())
    except OSError as error:
        log.debug('the firmware tells nothing: %s', error)
        return ''
    return found.group(1) if found else ''


def find_broker_port(broker: Any, path: str = CHASSIS_SERIAL) -> int:
    """The port of the settings [Broker]; where the host is looked for, the one that the VM's firmware tells,
    if it does."""
    told = read_firmware(path, PORT_OF_FIRMWARE) if broker.host == 'auto' else ''
    return int(told) if told and 0 < int(told) < 65536 else int(broker.port)


def write_private(path: str, text: str) -> None:
    """Writes a file that only its owner may read, whole or not at all, also after a loss of power."""
    new = path + '.new'
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, 'w') as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    os.rename(new, path)
    agent.sync(os.path.dirname(path))
