"""The guest agent: joins a host's broker, runs commands in runners of their own, serves files.

Run it as ``python vmguest.py [guest.ini]``. Read from the top: configuration, where the broker and
the network card are, the spool (what is remembered of commands), runners (processes that feed it),
the agent itself (which words do what), the command line.

What it is not: the parent of the commands. A runner outlives the agent, and writes its result into
the spool; the next agent finds it there.

Threads: ``main`` sends beacons and results, and watches the spool; ``link`` is the STOMP connection,
where all words are heard; the Chirp server has its own. Runners are processes without threads,
forked from one (the fork server) that was forked before any thread began.
"""

# An older Python can't read this file: it stops at this line, and shows it.
__needs__: str = 'Python 3.6 or later, and this is an older one: try python3 instead of python'

import base64
import collections
import contextlib
import fcntl
import gc
import importlib
import itertools
import json
import logging
import os
import platform
import pwd
import re
import resource
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
from typing import Any, Dict, Iterator, List, Optional, Tuple

import agent
import protocol
from protocol import Message

log = logging.getLogger('vmguest')

SETTINGS = {
    'Broker': {
        'host': (agent.text, 'auto'), 'port': (agent.integer(1, 65535), '61613'),
        'username': (agent.text, ''), 'password': (agent.text, ''),
        'heartbeat': (agent.integer(0, 3600), '10'), 'tls': (agent.yes_no, 'no'),
        'ca_file': (agent.path, '')},
    'VM': {
        'id': (protocol.guest_id, 'auto'), 'name': (agent.text, ''),
        'network_interface': (agent.text, 'auto'), 'beacon_interval': (agent.duration, '10'),
        'dir_to_serve': (agent.path, '~'), 'max_commands': (agent.integer(0, 100000), '0'),
        'inline_output': (agent.size, '64K'), 'output_limit': (agent.size, '256M'),
        'kill_after': (agent.duration, '5'), 'dedupe_ttl': (agent.duration, '7d'),
        'keep_spool': (agent.duration, '1h')},
    'Chirp': {
        'server': (agent.choice('embedded', 'chirp_server'), 'embedded'),
        'port': (agent.integer(0, 65535), '9094'),
        'auth': (agent.choice('address'), 'address'), 'user': (agent.text, 'nobody')},
    'Logging': agent.LOGGING,
}  # type: Dict[str, Any]


class GuestError(agent.AgentError):
    """Base of this module's errors: one sentence for who started the agent."""


# --- network ---------------------------------------------------------------------------------

LOOPBACK = '127.0.0.1'
LEASES = ('/var/lib/dhcp', '/var/lib/dhclient', '/var/lib/NetworkManager', '/run/systemd/netif/leases')


class Network:
    """What this machine's network cards are, and where a host may be, read anew at each call.

    From /proc/net/route, /sys/class/net and ioctl on Linux, else by the package netifaces.
    """

    def candidates(self) -> List[str]:
        """Where a broker may be: gateways, DHCP routers, first addresses of private subnets, loopback."""
        found = self.gateways() + self._dhcp_routers() + self._first_addresses() + [LOOPBACK]
        return list(dict.fromkeys(found))

    def gateways(self) -> List[str]:
        """The default gateways."""
        if not self._has_proc():
            gateways = import_netifaces().gateways()
            return [gateway[0] for gateway in gateways.get(socket.AF_INET, [])]
        return [address for interface, target, address, mask in self._routes()
                if target == mask == '0.0.0.0' and address != '0.0.0.0']

    def _has_proc(self) -> bool:
        return os.path.exists('/proc/net/route')

    def _routes(self) -> List[Tuple[str, str, str, str]]:
        """(interface, target, gateway, mask) of each IPv4 route."""
        with open('/proc/net/route') as table:
            rows = [line.split() for line in table.readlines()[1:]]
        return [(row[0],) + tuple(socket.inet_ntoa(struct.pack('=I', int(row[n], 16)))
                                  for n in (1, 2, 7)) for row in rows]  # type: ignore[misc]

    def _dhcp_routers(self) -> List[str]:
        """Routers in the DHCP clients' lease files."""
        found = []
        for folder in LEASES:
            for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
                try:
                    with open(os.path.join(folder, name), errors='replace') as file:
                        text = file.read(65536)
                except OSError as error:
                    log.debug('no lease: %s', error)
                    continue
                found += re.findall(r'(?:option routers |^ROUTER=)([0-9.]+)', text, re.MULTILINE)
        return found[::-1]

    def _first_addresses(self) -> List[str]:
        """The first address of each private subnet that a card is in: often the host's."""
        import ipaddress
        found = []
        for interface in self.interfaces():
            address, mask = self.address_of(interface), self._mask_of(interface)
            if address and mask:
                network = ipaddress.ip_network('%s/%s' % (address, mask), strict=False)
                first = str(network.network_address + 1)
                if network.is_private and network.num_addresses > 2 and first != address:
                    found.append(first)
        return found

    def interfaces(self) -> List[str]:
        """The cards that aren't loopback, those that carry a default route first, then by name."""
        if not self._has_proc():
            return [name for name in import_netifaces().interfaces() if not name.startswith('lo')]
        names = [name for name in sorted(os.listdir('/sys/class/net')) if self.mac_of(name)]
        routed = [row[0] for row in self._routes() if row[1] == '0.0.0.0']
        return sorted(names, key=lambda name: name not in routed)

    def mac_of(self, interface: str) -> str:
        """The MAC of a card, upper case with colons; '' where it has none."""
        try:
            if self._has_proc():
                with open('/sys/class/net/%s/address' % interface) as file:
                    mac = file.read().strip()
            else:
                netifaces = import_netifaces()
                mac = netifaces.ifaddresses(interface)[netifaces.AF_LINK][0]['addr']
        except (OSError, ValueError, KeyError, IndexError):
            return ''
        return mac.upper() if mac.count(':') == 5 and set(mac) != set('0:') else ''

    def address_of(self, interface: str) -> str:
        """The IPv4 address of a card; '' where it has none."""
        return self._ioctl(interface, 0x8915, 'addr')         # SIOCGIFADDR

    def _mask_of(self, interface: str) -> str:
        return self._ioctl(interface, 0x891b, 'netmask')      # SIOCGIFNETMASK

    def _ioctl(self, interface: str, request: int, field: str) -> str:
        if not self._has_proc():
            netifaces = import_netifaces()
            rows = netifaces.ifaddresses(interface).get(netifaces.AF_INET, [{}])
            return rows[0].get(field, '')
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                packed = fcntl.ioctl(probe.fileno(), request,
                                     struct.pack('256s', interface.encode()[:15]))
            except OSError:
                return ''
        return socket.inet_ntoa(packed[20:24])

    def interface_with(self, address: str) -> str:
        """The card that has this address; over loopback the first real one; '' where there is none."""
        interfaces = self.interfaces()
        for interface in interfaces:
            if self.address_of(interface) == address:
                return interface
        return interfaces[0] if interfaces else ''


def import_netifaces() -> Any:
    """The module netifaces. Raises GuestError that names the package."""
    try:
        import netifaces
        return netifaces
    except ImportError:
        raise GuestError('this system has no /proc/net/route: install the package netifaces-plus '
                         '(python -m pip install netifaces-plus)')


def read_boot_id() -> str:
    """What changes with each boot of this machine."""
    try:
        with open('/proc/sys/kernel/random/boot_id') as file:
            return file.read().strip()
    except OSError:
        return 'booted-%d' % round((time.time() - time.monotonic()) / 60)


# --- spool -----------------------------------------------------------------------------------

SPOOL = '.vmguest-spool'       # within dir_to_serve, so that the host can fetch from it by Chirp
FORMAT = 1                     # of request.json and result.json; a newer one is left alone
FINISHED = ('exited', 'signaled', 'timeout', 'failed', 'lost')
SAFE_ID = re.compile('[A-Za-z0-9][A-Za-z0-9._@-]{0,127}')
PASSED = 0o711                 # mode of folders that another user may pass, to a file of its own
EMPTYING = 0o1700              # mode of a folder whose command is over, while its files are deleted
EMPTIED = 0o500                # … and from then on
RESERVED = 8192                # bytes that each command has on the disk from its begin, for its result
LONGEST_ERROR = 1000           # characters of an error, so that a result fits into that
SWEEP_SLICE = 200              # folders that one look for old ones goes through
SAVE_CLOCK_EVERY = 600.0       # seconds: so much more a boot may add to what is kept for a while


def folder_name(cmd_id: str) -> str:
    """A name for the folder of a cmd-id, whatever text that is."""
    if SAFE_ID.fullmatch(cmd_id):
        return cmd_id
    import hashlib  # rarely needed, and it weighs some MB
    return 'x-' + hashlib.sha256(cmd_id.encode('utf-8', 'surrogateescape')).hexdigest()


def unrun_result(state: str, error: str) -> Dict[str, Any]:
    """The results of what never ran, or of which nothing is known."""
    return {'format': FORMAT, 'state': state, 'error': error[:LONGEST_ERROR], 'finished': False,
            'exitCodeOrSignal': -1, 'resources': dict.fromkeys(protocol.RUSAGE_FIELDS, 0),
            'wall': 0.0, 'started': 0.0, 'ended': time.time(),
            'out-truncated': False, 'err-truncated': False}


def private(path: str, flags: int) -> int:
    """An opener of files that are the agent's alone: their folders may be passed by others."""
    return os.open(path, flags, 0o600)


def reserve(path: str) -> None:
    """Takes room on the disk, that ``write_file`` of that path uses later. Raises OSError."""
    with open(path + '.new', 'wb', opener=private) as file:
        file.write(b' ' * RESERVED)


def write_file(path: str, text: str, durable: bool = True) -> None:
    """Writes a small file so that it is either whole, or not there; ``durable``: on the disk, too.

    Where its room was reserved, a full disk can't prevent it.
    """
    new = path + '.new'
    with open(new, 'rb+' if os.path.exists(new) else 'wb', opener=private) as file:
        file.write(text.encode('utf-8'))
        file.truncate()
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.rename(new, path)


class Command:
    """One command: its spool folder, and what the agent knows of it.

    The folder holds request.json (what was asked for), runner (locked while its runner lives),
    process.json (the pid), out, err, stdin, progress, result.json, acked. It is empty, and not
    writable, once all that is over. Until there is a result, result.json.new keeps room for it.
    """

    def __init__(self, cmd_id: str, folder: str) -> None:
        self.cmd_id = cmd_id
        self.folder = folder
        self.sent = 0.0                # monotonic: when its results were last sent
        self.told = 0.0                # monotonic: when its status was last sent
        self.begun = 0.0               # monotonic: when the fork server was asked
        self.acked = False
        self.ended = False             # whether its result is there, as far as the agent has seen
        self.signals = []              # type: List[int]
        self.request = {}              # type: Dict[str, Any]

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def has(self, name: str) -> bool:
        return os.path.exists(self.path(name))

    def read(self, name: str) -> Dict[str, Any]:
        """A JSON file of the folder. Raises OSError, ValueError."""
        with open(self.path(name)) as file:
            value = json.load(file)
        if not isinstance(value, dict):
            raise ValueError('%s: no JSON object' % self.path(name))
        return value

    def size(self, name: str) -> int:
        try:
            return os.stat(self.path(name)).st_size
        except OSError:
            return 0

    def slice(self, name: str, offset: int, length: int) -> bytes:
        try:
            with open(self.path(name), 'rb') as file:
                file.seek(offset)
                return file.read(length)
        except OSError:
            return b''

    def runner_lives(self) -> bool:
        """Whether the runner has its lock."""
        try:
            with open(self.path('runner')) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        except OSError:
            return False

    def was_cut(self) -> bool:
        """Whether it was begun, and power was lost before the system wrote what it had been asked for."""
        return self.has('runner') and not self.slice('runner', 0, PAGE).strip(b'\0')

    def process(self) -> int:
        """The pid, which is the session, of the command; 0 where it hasn't begun."""
        try:
            return int(self.read('process.json')['pid'])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def wall(self) -> float:
        """Seconds since the program began; 0 where it hasn't."""
        try:
            return max(0.0, time.monotonic() - float(self.read('process.json')['begin']))
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    def progress(self) -> str:
        """What the program wrote into $VM_PROGRESS_FILE."""
        return self.slice('progress', 0, LARGEST_PROGRESS).decode('utf-8', 'replace').strip()

    def state(self) -> str:
        """queued, running, or how it ended."""
        if self.has('result.json'):
            try:
                return str(self.result()['state'])
            except (OSError, ValueError):
                return 'lost'
        return 'running' if self.begun or self.has('runner') else 'queued'

    def end(self, state: str, error: str, durable: bool = True, **more: Any) -> None:
        """Writes a result for what has none; not ``durable``: ``sync`` brings it to the disk."""
        text = json.dumps(dict(unrun_result(state, error), **more))
        write_file(self.path('result.json'), text, durable)

    def sync(self) -> None:
        """Brings request, output and result to the disk."""
        for name in ('request.json', 'out', 'err', 'result.json'):
            if self.has(name):
                agent.sync(self.path(name))
        agent.sync(self.folder)

    def result(self) -> Dict[str, Any]:
        """What result.json says. Raises OSError, ValueError where that is no result."""
        result = self.read('result.json')
        if result.get('state') not in FINISHED:
            raise ValueError('no state %.40r' % result.get('state'))
        return result

    def acknowledge(self, now: float) -> None:
        """Notes that the host has the results; ``now`` by the spool's clock. Raises OSError."""
        open(self.path('acked'), 'w', opener=private).close()
        os.utime(self.path('acked'), (now, now))
        self.acked = True

    def empty(self, now: float, aside: str = '') -> None:
        """Deletes the files, or moves them to the folder ``aside``; ``now`` by the spool's clock.

        The folder stays, so that the command isn't run again.
        """
        os.chmod(self.folder, EMPTYING)        # should this agent die here, the next one goes on
        for name in os.listdir(self.folder):
            if aside:
                os.rename(self.path(name), os.path.join(aside, name))
            else:
                os.remove(self.path(name))
        os.utime(self.folder, (now, now))
        os.chmod(self.folder, EMPTIED)

    def discard(self) -> None:
        """Deletes folder and files of what was never begun."""
        for name in os.listdir(self.folder):
            os.remove(self.path(name))
        os.rmdir(self.folder)

    def end_processes(self) -> int:
        """KILLs what a dead runner left of the command; how many processes there were.

        Only what is surely the command's: its session, while the leader is the process that was
        started, by pid and start time; and whatever has its VM_PROGRESS_FILE, which names the folder.
        """
        try:
            process = self.read('process.json')
            leader, ticks = int(process['pid']), process.get('ticks')
        except (OSError, ValueError, KeyError, TypeError):
            leader, ticks = 0, None
        count = 0
        if leader and ticks and start_ticks(leader) == ticks:
            count = signal_session(leader, signal.SIGKILL)
        for pid in processes_with('VM_PROGRESS_FILE', self.path('progress')):
            try:
                os.kill(pid, signal.SIGKILL)
                count += 1
            except ProcessLookupError:
                continue
        return count


class Clock:
    """Seconds that passed while agents used a spool: setting the machine's clock doesn't move it.

    What is kept for a while carries it as the time of change of its file or folder. It goes on over
    the agents of one boot, and over a boot from where it was saved last. So time may be missing (while
    the machine was off, or slept), and things are kept for longer; never for less.
    """

    def __init__(self, path: str, boot: str) -> None:
        self._path = path
        self._boot = boot
        self._begin = self._read() - time.monotonic()
        self.save()

    def _read(self) -> float:
        try:
            with open(self._path) as file:
                saved = json.load(file)
            here = saved['boot'] == self._boot
            return float(saved['seconds']) + max(0.0, time.monotonic() - saved['monotonic']) * here
        except FileNotFoundError:
            return 0.0
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning('%s is damaged (%s): what is in the spool is kept for longer', self._path, error)
            return 0.0

    def now(self) -> float:
        """Seconds since the first agent. From any thread."""
        return self._begin + time.monotonic()

    def age(self, path: str) -> float:
        """Seconds since a file or folder was stamped. One from the future is stamped now.

        It has its stamp from the machine's clock, or this clock began anew.
        """
        seconds = self.now() - os.stat(path).st_mtime
        if seconds < 0:
            os.utime(path, (self.now(), self.now()))
        return max(0.0, seconds)

    def save(self) -> None:
        """Has the next boot go on from here."""
        self._saved = time.monotonic()
        try:
            write_file(self._path, json.dumps({'format': FORMAT, 'boot': self._boot, 'seconds': self.now(),
                                               'monotonic': self._saved}))
        except OSError as error:
            log.warning('%s: %s', self._path, describe_error(error))

    def tick(self) -> None:
        """Saves it now and then."""
        if time.monotonic() - self._saved >= SAVE_CLOCK_EVERY:
            self.save()


class Spool:
    """The folders of all commands of one agent, named by its id. One agent at a time may use it."""

    def __init__(self, root: str, machine_id: str, boot: str) -> None:
        """``boot``: see read_boot_id. Raises GuestError where it can't be made, or another agent uses it."""
        self.chirp_path = '/%s/%s' % (SPOOL, folder_name(machine_id))
        self.folder = os.path.join(root, SPOOL, folder_name(machine_id))
        self._sweep = None             # type: Any    # how far let_go has come
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            for folder in (os.path.dirname(self.folder), self.folder):
                os.chmod(folder, PASSED)
            self._lock = open(os.path.join(self.folder, '.agent'), 'w')
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GuestError('another vmguest with the id %s runs on %s; give this one an id of its '
                             'own in [VM]' % (machine_id, root))
        except OSError as error:
            raise GuestError('the spool %s can\'t be used: %s' % (self.folder, error.strerror))
        self.clock = Clock(os.path.join(self.folder, '.clock'), boot)

    def close(self) -> None:
        """Lets another agent use it."""
        self.clock.save()
        self._lock.close()

    def command(self, cmd_id: str) -> Command:
        """A command by its id, whether its folder is there or not."""
        return Command(cmd_id, os.path.join(self.folder, folder_name(cmd_id)))

    def claim(self, cmd_id: str) -> Optional[Command]:
        """The folder of a new command; None where there is one. mkdir is the lock. Raises OSError."""
        command = self.command(cmd_id)
        try:
            os.mkdir(command.folder, 0o700)
        except FileExistsError:
            return None
        return command

    def names(self) -> Iterator[str]:
        """Names of all folders of commands; there may be a million."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not entry.name.startswith('.') and entry.is_dir(follow_symlinks=False):
                    yield entry.name

    def set_aside(self, name: str, why: Any) -> None:
        """Puts files out of the way that can't be understood; their command is never run again."""
        command = Command('', os.path.join(self.folder, name))
        aside = os.path.join(self.folder, '.corrupt-%s-%d' % (name, time.time()))
        log.error('%s is damaged (%s): set aside as %s', command.folder, why, aside)
        command.end_processes()
        try:
            os.makedirs(aside, 0o700, exist_ok=True)
            command.empty(self.clock.now(), aside)      # it may have run: its folder stays
        except OSError as error:        # a full disk, say
            log.error('%s stays as it is: %s', command.folder, describe_error(error))

    def load(self) -> List[Command]:
        """The commands that aren't over, in the order in which they were asked for.

        Raises GuestError where a newer agent wrote one of them.
        """
        found = []
        for name in self.names():
            try:
                command = self._load(os.path.join(self.folder, name))
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.set_aside(name, error)
                continue
            if command is not None:
                found.append(command)
        return sorted(found, key=lambda command: command.request.get('received', 0))

    def _load(self, folder: str) -> Optional[Command]:
        command = Command('', folder)
        mode = stat.S_IMODE(os.stat(folder).st_mode)
        if mode == EMPTYING:
            command.empty(self.clock.now())
        if mode in (EMPTYING, EMPTIED):
            return None
        try:
            command.request = command.read('request.json')
        except (FileNotFoundError, ValueError):
            if command.was_cut():
                command.request = {'cmd-id': os.path.basename(folder)}     # of no boot, so it is lost
            elif command.has('runner') or command.has('result.json'):
                raise
            else:
                command.discard()      # claimed, and never begun: the host asks again
                return None
        if command.request.get('format', FORMAT) > FORMAT:
            raise GuestError('the spool %s was written by a newer vmguest (format %s, this one knows '
                             '%d): update this one' % (self.folder, command.request['format'], FORMAT))
        command.cmd_id = str(command.request['cmd-id'])
        command.acked = command.has('acked')
        return command

    def let_go(self, keep_spool: float, dedupe_ttl: float) -> bool:
        """Empties what was acknowledged long ago, forgets what was emptied longer ago.

        Goes through the next folders only, so that a million of them hold nothing up; True at
        the end of a round.
        """
        if self._sweep is None:
            self._sweep = os.scandir(self.folder)
        entries = list(itertools.islice(self._sweep, SWEEP_SLICE))
        for entry in entries:
            try:
                self._let_go(Command('', entry.path), keep_spool, dedupe_ttl)
            except OSError as error:
                log.warning('%s: %s', entry.path, error)
        if len(entries) == SWEEP_SLICE:
            return False
        self._sweep = None
        self.clock.tick()
        return True

    def _let_go(self, command: Command, keep_spool: float, dedupe_ttl: float) -> None:
        name = os.path.basename(command.folder)
        if name.startswith('.'):
            if name.startswith('.corrupt-') and self.clock.age(command.folder) > dedupe_ttl:
                import shutil  # rarely needed, and it brings compressors along
                shutil.rmtree(command.folder)
        elif command.has('acked'):
            if self.clock.age(command.path('acked')) >= keep_spool:
                command.empty(self.clock.now())
                log.debug('%s: its files are let go', name)
        elif stat.S_IMODE(os.stat(command.folder).st_mode) == EMPTIED \
                and self.clock.age(command.folder) > dedupe_ttl:
            os.rmdir(command.folder)


# --- processes of a session ------------------------------------------------------------------

TICKS = os.sysconf('SC_CLK_TCK')
PAGE = os.sysconf('SC_PAGE_SIZE')


def processes_of(session: int) -> Iterator[Tuple[int, List[str]]]:
    """(pid, fields of /proc/PID/stat from the state on) of each living process of a session."""
    for name in os.listdir('/proc') if os.path.isdir('/proc') else []:
        if not name.isdigit():
            continue
        try:
            with open('/proc/%s/stat' % name) as file:
                fields = file.read().rpartition(')')[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in 'ZX':
            yield int(name), fields


def start_ticks(pid: int) -> int:
    """When a living process began, in clock ticks since the boot: with the pid, its name for ever."""
    try:
        with open('/proc/%d/stat' % pid) as file:
            fields = file.read().rpartition(')')[2].split()
    except OSError:
        return 0
    return int(fields[19]) if fields[0] not in 'ZX' else 0


def processes_with(variable: str, value: str) -> List[int]:
    """The pids of living processes that began with this variable in their environment."""
    wanted, found = os.fsencode('%s=%s' % (variable, value)), []
    for name in os.listdir('/proc') if os.path.isdir('/proc') else []:
        try:
            with open('/proc/%d/environ' % int(name), 'rb') as file:
                if wanted in file.read().split(b'\0'):
                    found.append(int(name))
        except (OSError, ValueError):
            continue
    return found


def signal_session(session: int, number: int) -> int:
    """Sends a signal to each process of a session; how many there were."""
    count = 0
    for pid, _ in processes_of(session):
        try:
            os.kill(pid, number)
            count += 1
        except ProcessLookupError:
            continue
        except PermissionError as error:
            log.warning('signal %d to %d: %s', number, pid, error)
    if not os.path.isdir('/proc/self'):
        try:
            os.killpg(session, number)
            count += 1
        except (ProcessLookupError, PermissionError) as error:
            log.debug('signal %d to group %d: %s', number, session, error)
    return count


def live_usage(session: int) -> Tuple[int, Dict[str, float]]:
    """How many processes a session has, and what they, and children they waited for, have used."""
    count, user, system, minor, major, peak = 0, 0, 0, 0, 0, 0
    for pid, fields in processes_of(session):
        count += 1
        minor += int(fields[7]) + int(fields[8])
        major += int(fields[9]) + int(fields[10])
        user += int(fields[11]) + int(fields[13])
        system += int(fields[12]) + int(fields[14])
        peak = max(peak, peak_memory(pid) or int(fields[21]) * PAGE // 1024)
    if not count:
        return 0, {}
    usage = dict.fromkeys(protocol.RUSAGE_FIELDS, 0)  # type: Dict[str, float]
    usage.update(ru_utime=user / TICKS, ru_stime=system / TICKS, ru_maxrss=peak, ru_minflt=minor,
                 ru_majflt=major)
    return count, usage


def peak_memory(pid: int) -> int:
    """KiB that were resident at most, of a living process; else 0."""
    try:
        with open('/proc/%d/status' % pid) as file:
            for line in file:
                if line.startswith('VmHWM:'):
                    return int(line.split()[1])
    except (OSError, ValueError) as error:
        log.debug('no VmHWM of %d: %s', pid, error)
    return 0


def family(pid: int) -> List[int]:
    """A process, and its descendants where this kernel tells them."""
    try:
        with open('/proc/%d/task/%d/children' % (pid, pid)) as file:
            children = [int(word) for word in file.read().split()]
    except (OSError, ValueError) as error:
        log.debug('no children of %d: %s', pid, error)
        return [pid]
    return [pid] + [member for child in children for member in family(child)]


# --- runner ----------------------------------------------------------------------------------

FREE_RUNNERS = 2               # that are kept for the next commands
ACK_PATIENCE = 0.05            # seconds after which results that nobody has yet are brought to the disk
DRAIN = 2.0                    # seconds for the pipes to be emptied after the end of the process
FIRST_LOOK = 0.002             # seconds between the first two looks at a program's memory
LONGEST_LOOK = 1.0
EXEC_NEEDS = 1024              # KiB that a child may still touch on its way into exec
PUMP = 256 * 1024              # bytes read from a pipe at a time
LIMITS = {'as': resource.RLIMIT_AS, 'cpu': resource.RLIMIT_CPU, 'fsize': resource.RLIMIT_FSIZE,
          'nofile': resource.RLIMIT_NOFILE, 'nproc': getattr(resource, 'RLIMIT_NPROC', None)}


class Runner:
    """Runs one command to its end, and leaves result.json; in a process without threads, in its own session.

    It is the parent of the command, feeds the spool from its pipes, and waits for it with wait4, which
    tells the exact usage of this command and the children that it waited for.
    """

    def __init__(self, folder: str, wakeup: int, reports: int, unsynced: 'Unsynced') -> None:
        """``wakeup``: a descriptor that can be read once a child ended. ``reports``: the agent's, for the
        folder's name. ``unsynced``: what earlier commands of this process left."""
        self.command = Command('', folder)
        self.pid = 0
        self.pipes = {}                # type: Dict[int, Tuple[str, int]]
        self.truncated = {'out': False, 'err': False}
        self.failure = ''              # why writing the spool failed
        self.timed_out = False
        self.ended = False             # whether the program was waited for
        self.kill_at = None            # type: Optional[float]
        self.floor = 0                 # KiB below which wait4 can't tell the program's peak memory
        self.peak = 0                  # KiB that the program was seen to have, as long as below that
        self.next_look = None          # type: Optional[float]
        self.look_every = FIRST_LOOK
        self.report_at = None          # type: Optional[float]
        self._lock = None              # type: Any
        self._wakeup = wakeup
        self._reports = reports
        self.unsynced = unsynced

    def claim(self) -> bool:
        """Takes the lock of the command; False where another runner has it, or had it before.

        ``runner`` is another name of request.json, which is locked before it has that name.
        """
        path = self.command.path('request.json')
        try:
            self._lock = open(path, 'r+b')
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.link(path, self.command.path('runner'))
            return True
        except (BlockingIOError, FileExistsError, FileNotFoundError) as error:
            log.debug('%s is not for this runner: %s', path, error)   # emptied, while this one slept, say
            return False

    def run(self) -> None:
        """The whole life of the command."""
        try:
            self._start()
        except Exception as error:      # of Python, subprocess or the system: it is the command's
            self.abandon()
            return self._finish('failed', describe_error(error))
        deadline = self._deadline()
        while not self._has_ended():
            self._pump(self._patience(deadline))
            self._enforce(deadline)
            self._look_at_memory()
            self._report_that_it_runs()
            self.unsynced.sync_due()
        status, usage = self.status
        ended = time.monotonic()
        while self.pipes and time.monotonic() < ended + DRAIN and not self.failure:
            self._pump(ended + DRAIN - time.monotonic())
        if self.timed_out:
            self._end_session()
        self._finish_exited(status, usage, ended)

    def close(self) -> None:
        """Lets go of pipes, files and the lock."""
        for reader, (_, target) in self.pipes.items():
            os.close(reader)
            if target >= 0:
                os.close(target)
        self.pipes = {}
        if self._lock is not None:
            self._lock.close()

    def _deadline(self) -> Optional[float]:
        timeout = self.request.get('timeout')
        return self.begin + float(timeout) if timeout else None

    def _start(self) -> None:
        """Begins the program. Raises whatever prevents that."""
        self.request = json.loads(self._lock.read().decode('utf-8'))
        limit = int(self.request['output-limit'])
        self.room = {'out': limit, 'err': limit}
        # What was never begun may be begun again after a loss of power; nothing else may. The names tell
        # that it was begun: what request.json says can wait until it matters.
        for folder in (self.command.folder, os.path.dirname(self.command.folder)):
            agent.sync(folder)
        self.floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + EXEC_NEEDS
        self._spawn()
        self.next_look = time.monotonic()
        self._write_process()
        self._open_outputs()
        self.report_at = self.begin + FIRST_STATUS

    def _write_process(self) -> None:
        # Torn, it is as good as none: what a dead runner left is found by its environment, too.
        with open(self.command.path('process.json'), 'w', opener=private) as file:
            file.write(json.dumps({'pid': self.pid, 'started': self.started, 'begin': self.begin,
                                   'ticks': start_ticks(self.pid)}))

    def abandon(self) -> None:
        """Ends a program that can't be accounted for, since a file of it couldn't be written, say."""
        if self.pid and not self.ended:
            os.kill(self.pid, signal.SIGKILL)
            signal_session(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.ended = True

    def _spawn(self) -> None:
        """Starts the program, in a session of its own. Raises what that raised, in the child too."""
        import subprocess  # the fork server has it already; the agent never needs it
        request, user = self.request, self._find_user(self.request.get('user'))
        settles = user is not None or request.get('nice') or request.get('limits')
        with contextlib.ExitStack() as stack:
            report, reporter = os.pipe()
            stack.callback(os.close, report)
            stack.callback(os.close, reporter)
            out, err = self._open_pipe('out', stack), self._open_pipe('err', stack)
            self.begin, self.started = time.monotonic(), time.time()
            try:
                process = subprocess.Popen(
                    [request['cmd']] + request['args'], env=self._environment(user),
                    stdin=stack.enter_context(self._open_stdin()), stdout=out, stderr=err,
                    start_new_session=True, cwd=None if settles else self._work_folder(),
                    preexec_fn=(lambda: self._settle(user, reporter)) if settles else None)
            except subprocess.SubprocessError:
                raise StartError(*json.loads(os.read(report, 4096).decode()))
        self.pid, process.returncode = process.pid, 0      # it is waited for here, and not by Popen

    def _open_pipe(self, name: str, stack: contextlib.ExitStack) -> int:
        """The program's end of the pipe of a stream, closed here by ``stack``."""
        reader, writer = os.pipe()
        stack.callback(os.close, writer)
        os.set_blocking(reader, False)
        self.pipes[reader] = (name, -1)
        return writer

    def _open_outputs(self) -> None:
        """Makes the files of both streams, while the program comes to life."""
        for reader, (name, _) in self.pipes.items():
            self.pipes[reader] = (name, os.open(self.command.path(name),
                                                os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))

    def _work_folder(self) -> str:
        return os.path.join(self.request['root'], self.request['path'])

    def _environment(self, user: Any) -> Dict[str, Any]:
        """What the program finds in its environment: the agent's, the user's, what was asked for."""
        env = {} if self.request.get('env-clear') else dict(os.environ)  # type: Dict[str, Any]
        if user is not None:
            env.update(HOME=user.pw_dir, USER=user.pw_name, LOGNAME=user.pw_name)
        env['VM_PROGRESS_FILE'] = self.command.path('progress')
        env.update({name: os.fsencode(value) and value for name, value in self.request['env'].items()})
        return env

    def _settle(self, user: Any, reporter: int) -> None:
        """In the child, just before the program: priority, limits, user, folder."""
        try:
            if self.request.get('nice'):
                os.nice(int(self.request['nice']))
            for name, value in self.request.get('limits', {}).items():
                self._limit(name, int(value))
            if user is not None and user.pw_uid != os.getuid():
                self._open_progress(user)
                os.initgroups(user.pw_name, user.pw_gid)
                os.setgid(user.pw_gid)
                os.setuid(user.pw_uid)
            os.chdir(self._work_folder())
        except Exception as error:
            os.write(reporter, json.dumps([type(error).__name__, str(error)]).encode()[:4096])
            raise

    def _open_stdin(self) -> Any:
        name = self.request.get('fileForStdin')
        if 'stdin' in self.request:
            return open(self.command.path('stdin'), 'rb')
        return open(os.path.join(self.request['root'], name) if name else os.devnull, 'rb')

    def _find_user(self, name: Optional[str]) -> Any:
        if not name:
            return None
        try:
            return pwd.getpwnam(name)
        except KeyError:
            raise LookupError('no user %s' % name)

    def _open_progress(self, user: Any) -> None:
        """Another user can write the progress file, though not look into the spool."""
        path = self.command.path('progress')
        os.close(private(path, os.O_WRONLY | os.O_CREAT))
        os.chown(path, user.pw_uid, user.pw_gid)
        os.chmod(self.command.folder, PASSED)

    def _limit(self, name: str, value: int) -> None:
        which = LIMITS.get(name)
        if which is None:
            raise ValueError('no limit %s on this system' % name)
        resource.setrlimit(which, (value, value + 5 if name == 'cpu' else value))

    def _has_ended(self) -> bool:
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        self.status = status, usage
        self.ended = pid != 0
        return self.ended

    def _patience(self, deadline: Optional[float]) -> float:
        due = [moment for moment in (None if self.timed_out else deadline, self.kill_at, self.next_look,
                                     self.report_at, self.unsynced.due)
               if moment is not None]
        # A timeout of centuries is more than select takes.
        return max(0.0, min(60.0, min(due) - time.monotonic())) if due else 60.0

    def _pump(self, timeout: float) -> None:
        """Waits for output, the end of a child, or the time; writes what came into the spool."""
        ready, _, _ = select.select(list(self.pipes) + [self._wakeup], [], [], timeout)
        for descriptor in ready:
            if descriptor == self._wakeup:
                drain(descriptor)
            else:
                self._read_pipe(descriptor)

    def _read_pipe(self, descriptor: int) -> None:
        name, target = self.pipes[descriptor]
        try:
            data = os.read(descriptor, PUMP)
        except BlockingIOError:
            return
        if not data:
            del self.pipes[descriptor]
            os.close(descriptor)
            os.close(target)
            return
        kept = data[:self.room[name]]
        self.room[name] -= len(kept)
        self.truncated[name] |= len(kept) < len(data)
        try:
            while kept and not self.failure:
                kept = kept[os.write(target, kept):]
        except OSError as error:
            # A full disk: the command can't be accounted for, and is ended.
            self.failure = describe_error(error)
            signal_session(self.pid, signal.SIGKILL)

    def _enforce(self, deadline: Optional[float]) -> None:
        """TERM at the timeout, KILL kill-after seconds later."""
        now = time.monotonic()
        if deadline is not None and now >= deadline and not self.timed_out:
            self.timed_out = True
            self.kill_at = now + float(self.request['kill-after'])
            signal_session(self.pid, signal.SIGTERM)
        elif self.kill_at is not None and now >= self.kill_at:
            self.kill_at = now + 1
            signal_session(self.pid, signal.SIGKILL)

    def _look_at_memory(self) -> None:
        """Looks at the peak memory of a program that needs less than the process it was forked from.

        Linux keeps the peak across exec, so that wait4 can't tell less than ``floor``. Above it
        wait4 is exact, and nobody needs to look any more.
        """
        now = time.monotonic()
        if self.next_look is None or now < self.next_look:
            return
        self.peak = max([self.peak] + [peak_memory(pid) for pid in family(self.pid)])
        self.look_every = min(LONGEST_LOOK, 2 * self.look_every)
        self.next_look = now + self.look_every if self.peak < self.floor else None

    def _report_that_it_runs(self) -> None:
        """Once, of a command that isn't over in a moment: the agent tells its status."""
        if self.report_at is not None and time.monotonic() >= self.report_at:
            self.report_at = None
            self.report()

    def report(self) -> None:
        """Has the agent, if it still lives, look at the command's folder."""
        try:
            os.write(self._reports, (os.path.basename(self.command.folder) + '\n').encode())
        except OSError as error:
            log.debug('the agent is gone: %s', error)

    def _memory(self, usage: Any) -> int:
        if usage.ru_maxrss > self.floor or not self.peak:
            return usage.ru_maxrss
        return min(self.peak, usage.ru_maxrss)

    def _end_session(self) -> None:
        """After a timeout: no process of the session stays."""
        while signal_session(self.pid, 0):
            now = time.monotonic()
            if self.kill_at is None or now >= self.kill_at:
                signal_session(self.pid, signal.SIGKILL)
            time.sleep(0.02)

    def _finish_exited(self, status: int, usage: Any, ended: float) -> None:
        exited = os.WIFEXITED(status)
        code = os.WEXITSTATUS(status) if exited else os.WTERMSIG(status)
        state = 'timeout' if self.timed_out else 'exited' if exited else 'signaled'
        error = ''
        if self.timed_out:
            error = 'ran longer than its timeout of %g s' % float(self.request['timeout'])
        if self.failure:
            state, error = 'failed', self.failure
        resources = {name: getattr(usage, name) for name in protocol.RUSAGE_FIELDS}
        resources['ru_maxrss'] = self._memory(usage)
        self._finish(state, error, finished=exited, exitCodeOrSignal=code,
                     resources=resources, wall=ended - self.begin, started=self.started,
                     **{'out-truncated': self.truncated['out'], 'err-truncated': self.truncated['err']})

    def _finish(self, state: str, error: str, **more: Any) -> None:
        """result.json, by rename. On a full disk, without reserved room, it takes the output's."""
        try:
            self.command.end(state, error, durable=False, **more)
        except OSError as failed:
            for name in filter(self.command.has, ('out', 'err')):
                os.truncate(self.command.path(name), 0)
            more.update({'out-truncated': True, 'err-truncated': True})
            self.command.end('failed', describe_error(failed), **more)


class StartError(OSError):
    """What the child met before the program began."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def describe_error(error: Exception) -> str:
    """The error's name and its text."""
    return '%s: %s' % (getattr(error, 'kind', type(error).__name__), error)


class Unsynced:
    """Results that may not be on the disk yet, in the process that left them.

    Most are acknowledged within milliseconds, and need never be: the host has them safe then.
    """

    def __init__(self) -> None:
        self._waiting = collections.deque()    # type: collections.deque     # (when it is due, Command)

    @property
    def due(self) -> Optional[float]:
        """When ``sync_due`` has something to do, by the monotonic clock."""
        return self._waiting[0][0] if self._waiting else None

    def add(self, command: Command) -> None:
        self._waiting.append((time.monotonic() + ACK_PATIENCE, command))

    def sync_due(self) -> None:
        """Brings to the disk what the host hasn't acknowledged in time."""
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            self._sync(self._waiting.popleft()[1])

    def sync_all(self) -> None:
        """The same, without waiting for anybody."""
        while self._waiting:
            self._sync(self._waiting.popleft()[1])

    def _sync(self, command: Command) -> None:
        try:
            if not command.has('acked'):
                command.sync()
        except OSError as error:       # its folder may be gone by now, or the disk
            log.warning('%s: not brought to the disk: %s', command.folder, describe_error(error))


def be_runner(orders: socket.socket, reports: int) -> None:
    """A runner's main: runs the commands of the spool folders that come, one after the other.

    Says by a byte that it is free again. It ends once the agent is gone, after the command that it has.
    """
    os.setsid()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    wakeup, waker = os.pipe()
    for descriptor in (wakeup, waker):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(waker)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    gc.enable()
    unsynced = Unsynced()
    try:
        for folder in folders_to_run(orders, unsynced):
            runner = Runner(folder, wakeup, reports, unsynced)
            try:
                run_command(runner)
            except Exception:       # the agent sees that the command has no runner any more
                log.exception('runner of %s', folder)
            orders.send(b'.')       # before the report: the next command may follow at once
            runner.report()
    finally:
        unsynced.sync_all()


def folders_to_run(orders: socket.socket, unsynced: Unsynced) -> Iterator[str]:
    """The spool folders that the agent names, until it is gone."""
    line = b''
    while True:
        due = unsynced.due
        ready, _, _ = select.select([orders], [], [], due and max(0.0, due - time.monotonic()))
        unsynced.sync_due()
        if not ready:
            continue
        data = orders.recv(65536)
        if not data:
            return
        line += data
        if line.endswith(b'\n'):    # no other order comes before this one is done
            yield os.fsdecode(line[:-1])
            line = b''


def run_command(runner: Runner) -> None:
    """Runs one command, whatever happens to an end that can be told."""
    try:
        if not runner.claim():
            return
        runner.run()
    except Exception as error:      # whatever it is: a command has a result
        log.exception('runner of %s', runner.command.folder)
        runner.abandon()
        if not runner.command.has('result.json'):
            runner.command.end('failed', describe_error(error))
    finally:
        runner.close()
    runner.unsynced.add(runner.command)


DESCRIPTOR = struct.Struct('i')        # as SCM_RIGHTS carries it


class ForkServer:
    """Runners, and the process without threads that forks them; forked itself before any thread exists.

    Raw fork of an agent with threads would copy locks in whatever state they are. It ends when the
    agent does; its runners go on until their commands are over. The agent has a socket to each runner,
    to give it one command after the other: a fork costs milliseconds. ``run`` may be called by any
    thread, the other methods by the main thread.
    """

    def __init__(self) -> None:
        self.reports, self._reporter = os.pipe()       # runners write the names of folders to look at
        os.set_blocking(self.reports, False)
        # Guards the two lists; nothing that blocks happens while it is held.
        self._lock = threading.Lock()
        self._free = []                # type: List[socket.socket]
        self._busy = []                # type: List[socket.socket]
        self._start()
        self._free.append(self._new_runner())

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            try:
                self._serve(theirs)
            finally:
                os._exit(0)
        theirs.close()
        self._socket = ours

    def _serve(self, requests: socket.socket) -> None:
        """Forks a runner for each socket that comes."""
        import subprocess  # noqa: F401  for all runners at once
        os.close(self.reports)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)      # runners are reaped by the kernel
        gc.disable()                # a collection would copy the pages that all these share
        getattr(gc, 'freeze', lambda: None)()      # since 3.7
        while True:
            data, rights, _, _ = requests.recvmsg(1, socket.CMSG_SPACE(DESCRIPTOR.size))
            if not data:
                return
            for _, _, passed in rights:
                self._fork_runner(requests, DESCRIPTOR.unpack(passed)[0])

    def _fork_runner(self, requests: socket.socket, orders: int) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            log.error('no runner: %s', describe_error(error))      # the agent asks again
            pid = -1
        if pid == 0:
            try:
                requests.close()
                be_runner(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=orders),
                          self._reporter)
            except ConnectionError:
                log.debug('the agent is gone')
            except Exception:
                log.exception('in a runner')
            finally:
                os._exit(0)
        os.close(orders)

    def run(self, folder: str) -> bool:
        """Has a runner started for a spool folder. False where the fork server is dead."""
        with self._lock:
            self._collect()
            try:
                while self._free:
                    if self._order(self._free.pop(), folder):
                        return True
                    log.error('a free runner was killed')
                self._order(self._new_runner(), folder)    # where none can be forked, the agent asks again
                return True
            except OSError as error:
                log.error('the fork server died: %s', error)
                return False

    def _order(self, runner: socket.socket, folder: str) -> bool:
        try:
            runner.sendall(os.fsencode(folder) + b'\n')
        except OSError:
            runner.close()
            return False
        self._busy.append(runner)
        return True

    def _new_runner(self) -> socket.socket:
        """A new runner's socket. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._socket.sendmsg([b'r'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS,
                                           DESCRIPTOR.pack(theirs.fileno()))])
        return ours

    def _collect(self) -> None:
        """Finds out which runners are free again, and which are dead."""
        for runner in list(self._busy):
            try:
                is_free = runner.recv(1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                is_free = b''
            self._busy.remove(runner)
            if is_free:
                self._free.append(runner)
            else:
                runner.close()

    def trim(self) -> None:
        """Ends free runners beyond the few that the next commands will want."""
        with self._lock:
            self._collect()
            while len(self._free) > FREE_RUNNERS:
                self._free.pop(0).close()

    def lives(self) -> bool:
        """Whether it can still start runners."""
        try:
            return os.waitpid(self.pid, os.WNOHANG)[0] == 0
        except ChildProcessError:
            return False

    def reported(self) -> List[str]:
        """Names of the folders whose commands ended, or turned out to last, since the last call."""
        try:
            return os.read(self.reports, 65536).decode(errors='replace').split()
        except BlockingIOError:
            return []

    def stop(self) -> None:
        """Ends it, and the runners that have no command; the others go on."""
        for runner in self._free + self._busy:
            runner.close()
        self._socket.close()
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            log.debug('the fork server was waited for already')
        for descriptor in (self.reports, self._reporter):
            os.close(descriptor)


# --- the agent -------------------------------------------------------------------------------

FILES_PATIENCE = 3.0           # seconds that HELLO waits for chirp_server, so that it can tell of it
FILES_STOP = 1.0               # seconds that the Chirp server has for its end
RESEND_EVERY = 30.0            # seconds between two sendings of results that nobody acknowledged
FIRST_STATUS = 0.05            # seconds after which a command that still runs is reported
START_PATIENCE = 10.0          # seconds after which a runner that shows nothing is asked for again
POLL = 1.0                     # seconds between looks at commands that runners can't report
HOUSEKEEPING_EVERY = 60.0
SWEEP_PAUSE = 0.05             # seconds between two slices of a look for old folders
LARGEST_INLINE = 256 * 1024    # bytes of a stream that a word carries, at most
LARGEST_WORD = 900 * 1000      # bytes of a body, below what a broker takes (max_frame) …
FIRST_WORD = 8 * 1000          # … and of a HELLO before the host has told what its broker takes
SMALLEST_WORD = 2 * 1000       # whatever the host tells: a result without output fits
FRAME_RESERVE = 4 * 1000       # bytes of max_frame that are left for what is not output
GREETING_PATIENCE = 5.0        # seconds that results wait for the host's greeting on a new connection
LARGEST_PROGRESS = 4096        # bytes of a progress file
LARGEST_OFFSET = 2 ** 62       # of a file's bytes, as far as systems can tell
REFUSALS_KEPT = 10000


class Agent:
    """The guest agent: ``start``, ``run``, ``stop``.

    The heard_… methods run on the link's thread; ``run`` and ``tick`` on the main thread.
    """
    side = 'guest'

    def __init__(self, settings: Any, fork_server: ForkServer, network: Optional[Network] = None) -> None:
        """``fork_server``: made before any thread was."""
        self.settings = settings
        self.fork_server = fork_server
        self.network = network or Network()
        self.root = os.path.abspath(settings.VM.dir_to_serve)
        self.id = read_id(settings.VM.id) if settings.VM.id != 'auto' else ''
        self.name = settings.VM.name or socket.gethostname()
        self.boot = read_boot_id()
        self.session = os.urandom(8).hex()
        self.beacon_interval = max(0.5, settings.VM.beacon_interval)
        self.spool = None              # type: Optional[Spool]
        self.files = None              # type: Any
        self._served_at = ''           # the address at which ``files``, the Chirp server, listens
        self._told_port = 0            # of it, in the last HELLO
        self.aint = 0
        self.stopping = False
        self.restart = ''              # why the agent should begin anew, as another process image
        self.largest_word = 0          # bytes of a body that the host takes; 0: it hasn't told
        # Guards the two tables below, and _awake_at. Held for moments; never while something is said, or run.
        self._lock = threading.Lock()
        self._commands = {}            # type: Dict[str, Command]
        self._refused = {}             # type: Dict[str, Dict[str, Any]]
        self._wakeup, self._waker = os.pipe()
        os.set_blocking(self._wakeup, False)
        os.set_blocking(self._waker, False)
        now = time.monotonic()
        self._awake_at = now           # when the main thread's next look is due at the latest
        self._next_beacon = self._next_poll = now
        self._next_housekeeping = now + HOUSEKEEPING_EVERY
        broker = settings.Broker
        self.link = protocol.Link(
            self._brokers, [(protocol.CMD_REQUESTS, 'auto')], self._link_up, self._hear,
            self._link_down, broker.username, broker.password, broker.heartbeat,
            agent.client_tls(broker.ca_file) if broker.tls else None)

    # Start and stop.

    def start(self) -> None:
        """Begins to look for the broker. Raises GuestError where the served folder can't be used."""
        if not os.path.isdir(self.root):
            raise GuestError('[VM] dir_to_serve %s is no folder' % self.root)
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise GuestError('[VM] dir_to_serve %s can\'t be written by this user: change its owner or mode, '
                             'or name another folder' % self.root)
        if self.id:
            self._open_spool()
        # After the fork: runners needn't carry it. Before the link: its heart-beats would wait meanwhile.
        importlib.import_module('chirpserver')
        self.link.start()
        log.info('vmguest %s runs as pid %d: broker %s:%d, serves %s', agent.VERSION, os.getpid(),
                 self.settings.Broker.host, self.settings.Broker.port, self.root)

    def run(self) -> None:
        """Works until it is told to stop. On the main thread."""
        signal.set_wakeup_fd(self._waker)
        while not self.stopping and not self.restart:
            select.select([self._wakeup, self.fork_server.reports], [], [], self._patience())
            drain(self._wakeup)
            try:
                self.tick()
            except Exception:       # the agent lives on, whatever one tick met
                log.exception('in the tick')

    def wake(self) -> None:
        """Has the main thread look at its clock and the spool now. From any thread."""
        try:
            os.write(self._waker, b'w')
        except BlockingIOError:
            log.debug('the main thread is awake already')

    def stop(self) -> None:
        """Says BYE, and leaves; the runners go on."""
        self.stopping = True
        if self.files is not None:
            self.files.stop(FILES_STOP)
        self.say(protocol.BYE.howToSay(self.id, self.ip, self.restart or 'the agent stops'))
        self.link.close()
        self.fork_server.stop()
        if self.spool is not None:
            self.spool.close()
        signal.set_wakeup_fd(-1)
        for descriptor in (self._wakeup, self._waker):
            os.close(descriptor)

    # The link.

    @property
    def ip(self) -> str:
        """The address by which the broker sees this machine."""
        return self.link.local_address[0]

    def _brokers(self) -> List[Tuple[str, int]]:
        host, port = self.settings.Broker.host, self.settings.Broker.port
        if host != 'auto':
            return [(host, port)]
        known = [self.link.peer_address[0]] if self.link.peer_address[0] else []
        return [(candidate, port) for candidate in dict.fromkeys(known + self.network.candidates())]

    def _link_up(self, link: protocol.Link) -> None:
        if not self._settle_id():
            return
        self._serve_files()
        self._say_hello()
        now = time.monotonic()
        self._send_all_again(now - RESEND_EVERY + GREETING_PATIENCE)
        self._next_beacon = now + self.beacon_interval
        self.wake()

    def _send_all_again(self, sent: float) -> None:
        """Lets the next look at the clock believe that the results were last sent at ``sent``."""
        with self._lock:
            for command in self._commands.values():
                command.sent = sent
            for result in self._refused.values():
                result['sent'] = sent

    def _link_down(self, reason: str) -> None:
        if not self.stopping:
            log.warning('no connection to the broker: %s', reason)

    def _settle_id(self) -> bool:
        """Finds the id at the first connection. False: the agent has to begin anew."""
        if self.settings.VM.id != 'auto':
            return True
        cards = {self.network.mac_of(name) for name in self.network.interfaces()}
        if self.id and (self.id in cards or not cards):
            return True             # whichever card carries this connection: the machine is the same
        found = self.find_id()
        if self.id and found != self.id:
            self._begin_anew('the network card %s was exchanged for %s' % (self.id, found))
            return False
        self.id = found
        try:
            self._open_spool()
        except GuestError as error:
            self.id = ''
            self._begin_anew(str(error))
            return False
        return True

    def find_id(self) -> str:
        """The MAC of the card that carries the connection; the machine's name where there is none."""
        machine_id, card = identify(self.settings.VM, self.network, self.ip)
        if card and not self.network.mac_of(card) and self.settings.VM.network_interface != 'auto':
            log.error('[VM] network_interface %s has no MAC address', card)
        return machine_id

    def _begin_anew(self, why: str) -> None:
        self.restart = why
        self.wake()

    def say(self, message: Message) -> bool:
        """Publishes a word. False where there is no connection to the broker."""
        if not self.id:
            return False
        headers = dict(message.headers, timestamp=protocol.timestamp())
        headers['from'] = self.id
        return self.link.send(message.topic, headers, message.body())

    def _hear(self, frame: Any) -> None:
        """One MESSAGE. What isn't a word for this guest is dropped, the former counted."""
        if not self.id or not protocol.is_addressed(frame.headers.get('to', ''), self.id, self.name):
            return
        try:
            protocol.hear(self, protocol.interpret(frame.headers, frame.body))
        except protocol.BadWord as error:
            self.aint += 1
            log.info('AINT: %s', error)

    # Words.

    def heard_aint(self, message: Message) -> None:
        """An unknown word, or one that isn't for a guest."""
        self.aint += 1
        log.info('AINT: %.40r', message.word)

    def heard_bye(self, message: Message) -> None:
        """The host goes; it will be back."""
        log.info('the host says BYE: %.200s', message.text('reason'))

    def heard_hello(self, message: Message) -> None:
        """To all: announce yourselves. To this guest: the host's name for it, and its wishes."""
        if message.headers.get('to') == '*':
            self._say_hello()
            return
        self.name = message.text('name', self.name)
        self._admit(message)
        interval = message.number('beacon_interval', self.beacon_interval)
        self.beacon_interval = min(max(0.5, interval), 3600.0)
        limit = message.number('max_frame', LARGEST_WORD + FRAME_RESERVE) - FRAME_RESERVE
        self.largest_word = int(min(LARGEST_WORD, max(SMALLEST_WORD, limit)))
        log.info('joined the host at %s as %s, id %s', self.link.peer_address[0], self.name, self.id)
        self._send_all_again(0.0)
        self._next_poll = 0.0
        self.wake()

    def _say_hello(self) -> None:
        facts = self.facts()
        with self._lock:
            commands = dict(self._commands)
        states = {cmd_id: command.state() for cmd_id, command in commands.items()}
        if len(protocol.write_json(states)) <= (self.largest_word or FIRST_WORD):
            facts['cmds'] = states      # else the host asks for each
        self._told_port = facts.get('chirp', {}).get('port', 0)
        self.say(protocol.HELLO.howToSay(self.id, self.ip, **facts))

    def facts(self) -> Dict[str, Any]:
        """What a HELLO tells of this machine; mem in bytes."""
        facts = {'host': socket.gethostname(), 'boot': self.boot, 'session': self.session,
                 'os': platform.platform(), 'python': platform.python_version(),
                 'version': agent.VERSION, 'cpus': os.cpu_count() or 0,
                 'mem': memory('MemTotal')}  # type: Dict[str, Any]
        if self.settings.VM.name:
            facts['name'] = self.settings.VM.name
        if self._files_port():
            facts['chirp'] = {'port': self._files_port()}
        return facts

    def heard_cmd_run(self, message: Message) -> None:
        """Claims the spool folder, and has it run; or answers for what was claimed before."""
        cmd_id = message.text('cmd-id')
        if not cmd_id:
            raise protocol.BadWord('CMD_RUN: no cmd-id')
        with self._lock:
            refused = self._refused.get(cmd_id)
        if refused is not None:
            self._tell_results(cmd_id, refused)
            return
        try:
            command = self._spool.claim(cmd_id)
        except OSError as error:
            self._refuse(cmd_id, error)
            return
        if command is None:
            self._answer_again(cmd_id)
            return
        try:
            self._accept(command, message)
        except OSError as error:
            command.discard()
            self._refuse(cmd_id, error)
            return
        with self._lock:
            self._commands[cmd_id] = command
        if command.has('result.json'):
            self._send_results(command)
        else:
            self._start_waiting()
            if not command.begun or self._awake_at > time.monotonic() + POLL:
                self.wake()             # it waits for its turn, or nobody would look at it for long
        log.info('%s: asked for', cmd_id)       # after it has begun: somebody waits

    @property
    def _spool(self) -> Spool:
        assert self.spool is not None      # words are heard once the id, and so the spool, is known
        return self.spool

    def _accept(self, command: Command, message: Message) -> None:
        """Writes down what was asked for. Raises OSError."""
        try:
            request = read_request(message, self.settings.VM)
            failure = ''
        except protocol.BadWord as error:
            request, failure = {}, 'BadWord: %s' % error
        reserve(command.path('result.json'))
        stdin = request.pop('stdin', None)
        if stdin is not None:
            with open(command.path('stdin'), 'wb', opener=private) as file:
                file.write(stdin)
            request['stdin'] = True
        request.update({'cmd-id': command.cmd_id, 'format': FORMAT, 'boot': self.boot,
                        'root': self.root, 'received': time.time()})
        command.request = request
        # Not by rename: whether a torn one was begun is seen by its other name, runner. The runner brings
        # both names to the disk, before the program begins.
        with open(command.path('request.json'), 'w', opener=private) as file:
            file.write(json.dumps(request))
        if failure:
            command.end('failed', failure)

    def _refuse(self, cmd_id: str, error: OSError) -> None:
        """A command that can't be written down (a full disk) never runs, and fails with that error."""
        log.error('%s can\'t be taken: %s', cmd_id, error)
        result = unrun_result('failed', describe_error(error))
        with self._lock:
            if len(self._refused) >= REFUSALS_KEPT:
                del self._refused[next(iter(self._refused))]
            self._refused[cmd_id] = result
        self._tell_results(cmd_id, result)

    def _answer_again(self, cmd_id: str) -> None:
        """For a command whose folder is there: status or results, once more; it isn't run."""
        with self._lock:
            command = self._commands.get(cmd_id)
        if command is None:
            command = self._spool.command(cmd_id)
            if not command.has('result.json'):
                self._tell_results(cmd_id, unrun_result(
                    'lost', 'it was begun before, and isn\'t run again; its results were acknowledged and '
                    'let go, or its spool folder was damaged'))
                return
            command.request = command.read('request.json')
        if command.has('result.json'):
            self._send_results(command)
        else:
            self._tell_status(command)

    def heard_cmd_query(self, message: Message) -> None:
        """How far it is, with slices of its output where they are asked for."""
        cmd_id = message.text('cmd-id')
        command = self._find(cmd_id)
        if command is None:
            self.say(protocol.CMD_STATUS.howToSay(cmd_id, 'unknown', error='not in the spool'))
            return
        length = int(min(max(0, message.number('max', LARGEST_INLINE)), LARGEST_INLINE))
        slices = {}  # type: Dict[str, Any]
        for stream in ('out', 'err'):
            if message.get(stream + '-offset') is not None:
                offset = int(min(max(0, message.number(stream + '-offset')), LARGEST_OFFSET))
                self._put_slice(slices, stream, command, offset, length)
        self._tell_status(command, **slices)

    def _put_slice(self, slices: Dict[str, Any], stream: str, command: Command, offset: int,
                   length: int) -> None:
        """A slice of a stream, as long as two of them fit into a word."""
        data = command.slice(stream, offset, length)
        found = {stream + '-offset': offset}  # type: Dict[str, Any]
        put_bytes(found, stream, data)
        while len(protocol.write_json(found)) > self._room_for_output // 2 and data:
            data = data[:len(data) // 2]
            put_bytes(found, stream, data)
        slices.update(found)

    @property
    def _room_for_output(self) -> int:
        """Bytes of a word that output may take, written as JSON."""
        return max(0, (self.largest_word or LARGEST_WORD) - 2 * LARGEST_PROGRESS)

    def _find(self, cmd_id: str) -> Optional[Command]:
        """A command that has files in the spool, acknowledged or not."""
        with self._lock:
            command = self._commands.get(cmd_id)
        if command is None:
            command = self._spool.command(cmd_id)
        return command if command.has('request.json') else None

    def heard_cmd_signal(self, message: Message) -> None:
        """Signals all processes of a command; one that waits for its turn fails instead."""
        with self._lock:
            command = self._commands.get(message.text('cmd-id'))
        if command is None or command.has('result.json'):
            return
        number = signal_number(message.text('signal', 'TERM'))
        log.info('%s: signal %d', command.cmd_id, number)
        if not command.begun and not command.has('runner'):
            command.end('failed', 'signal %d before it began' % number)
            self._send_results(command)
        elif not command.process():
            command.signals.append(number)
        else:
            signal_session(command.process(), number)

    def heard_cmd_ack(self, message: Message) -> None:
        """The host has the results; they stay for keep_spool, and then go."""
        cmd_id = message.text('cmd-id')
        with self._lock:
            command = self._commands.get(cmd_id)
            refused = self._refused.get(cmd_id)
        if refused is not None:
            refused['acked'] = True
        if command is None or not command.has('result.json'):
            return
        try:
            command.acknowledge(self._spool.clock.now())
        except OSError as error:
            log.warning('%s: acknowledged, but %s', cmd_id, describe_error(error))
            return              # it is sent again, and acknowledged again
        with self._lock:
            self._commands.pop(cmd_id, None)
        log.info('%s: acknowledged', cmd_id)

    # Files.

    def _serve_files(self) -> None:
        """Serves files where the broker sees this machine, to whoever is at the broker's address."""
        if self.files is not None and self._served_at == self.ip:
            self.files.allow([self.link.peer_address[0]])      # the host may have moved
            return
        if self.files is not None:
            self.files.stop(FILES_STOP)
        import chirpserver
        port = self.settings.Chirp.port
        try:
            chirpserver.listen(self.ip, port).close()
        except OSError as error:
            log.warning('[Chirp] port %d can\'t be had (%s): files are served on another one, which the host '
                        'is told, but can\'t reach in NAT mode', port, error)
            port = 0
        try:
            self._start_files(port)
        except Exception as error:      # no files, then; commands don't need them
            log.error('no Chirp server at %s:%d: %s', self.ip, port, error)
            self.files = None

    def _start_files(self, port: int) -> None:
        """Not waiting for chirp_server, which may never come up: this is the link's thread."""
        settings, allowed = self.settings.Chirp, [self.link.peer_address[0]]
        self._served_at = self.ip
        if settings.server == 'embedded':
            import chirpserver
            self.files = chirpserver.ChirpServer(self.root, self.ip, port, allowed,
                                                 auth=settings.auth).start()
            return
        import chirpreal
        self.files = chirpreal.RealChirpServer(self.root, self.ip, port, allowed, user=settings.user)
        self.files.begin(self._files_listen, FILES_PATIENCE)

    def _files_port(self) -> int:
        """Where files are served; 0: nowhere, or not yet."""
        return self.files.address[1] if self.files is not None else 0

    def _files_listen(self) -> None:
        """The host should know. On the thread ``chirp-watch``."""
        if self.link.up and self._told_port != self._files_port():
            self._say_hello()

    def _admit(self, message: Message) -> None:
        """The greeting's part for files: where the host is, if not at the broker."""
        if self.files is None:
            return
        addresses = [as_text('addresses', value) for value in message.sequence('addresses')]
        if addresses:
            self.files.allow(addresses)

    # Running.

    def _open_spool(self) -> None:
        """Finds what earlier agents left. Raises GuestError."""
        self.spool = Spool(self.root, self.id, self.boot)
        for command in self.spool.load():
            if command.acked:
                continue
            with self._lock:
                self._commands[command.cmd_id] = command
            if not command.has('result.json'):
                self._take_up(command)
        self._start_waiting()

    def _take_up(self, command: Command) -> None:
        """What an earlier agent left unfinished goes on, or is lost."""
        if command.request.get('boot') != self.boot:
            self._lose(command, 'the guest was rebooted')
        elif command.has('runner') and not command.runner_lives():
            self._lose_unless_ended(command)
        else:
            log.info('%s: goes on', command.cmd_id)

    def _lose_unless_ended(self, command: Command) -> None:
        """For a runner that is gone: its result may have been its last deed."""
        if not command.has('result.json'):
            left = command.end_processes()
            self._lose(command, 'its runner was killed%s'
                       % ('; its processes were, too' if left else ''))

    def _lose(self, command: Command, why: str) -> None:
        log.warning('%s: lost: %s', command.cmd_id, why)
        try:
            command.end('lost', why)
        except OSError as error:
            log.error('%s: %s', command.cmd_id, describe_error(error))      # the next look tries again

    def _start_waiting(self) -> None:
        """Has those begun that wait for their turn, in the order in which they came."""
        limit = self.settings.VM.max_commands
        with self._lock:
            unended = [command for command in self._commands.values() if not command.ended]
        running = [command for command in unended if command.begun or command.has('runner')]
        room = limit - len(running) if limit else len(unended)
        for command in unended:
            if room > 0 and not command.begun and not command.has('runner') \
                    and not command.has('result.json'):
                room -= 1
                self._begin(command)

    def _begin(self, command: Command) -> None:
        command.begun = time.monotonic()
        log.debug('%s: begins', command.cmd_id)
        if not self.fork_server.run(command.folder):
            command.begun = 0.0
            self._begin_anew('the fork server died')

    # The clock.

    def _patience(self) -> float:
        """Seconds until something is due. Of a command that lasts, or ended, its runner reports."""
        now = time.monotonic()
        with self._lock:
            due = [self._next_beacon, self._next_housekeeping]
            if self._commands or self._refused:
                due.append(self._next_poll)
            self._awake_at = min(due)
        return max(0.0, self._awake_at - now)

    def tick(self) -> None:
        """What time and the runners bring."""
        now = time.monotonic()
        for name in self.fork_server.reported():
            self._runner_reported(name)
        self._tell_first_statuses(now)
        if now >= self._next_poll:
            self._next_poll = now + POLL
            self._poll(now)
        if now >= self._next_beacon:
            self._next_beacon = now + self.beacon_interval
            self._say_still_alive()
        if now >= self._next_housekeeping:
            self._next_housekeeping = now + HOUSEKEEPING_EVERY
            self._keep_house()

    def _runner_reported(self, name: str) -> None:
        with self._lock:
            ended = [command for command in self._commands.values()
                     if os.path.basename(command.folder) == name]
        for command in ended:
            if command.has('result.json'):
                self._send_results(command)
        self._start_waiting()

    def _tell_first_statuses(self, now: float) -> None:
        """A short command is reported once, by its results; a longer one by its status, too."""
        with self._lock:
            commands = list(self._commands.values())
        for command in commands:
            if not command.told and not command.ended and \
                    (not command.begun or now >= command.begun + FIRST_STATUS):
                self._tell_status(command)

    def _poll(self, now: float) -> None:
        """Looks at each command that isn't over; sends again what nobody acknowledged."""
        with self._lock:
            commands = list(self._commands.values())
            refused = [(cmd_id, result) for cmd_id, result in self._refused.items()
                       if not result.get('acked')]
        for command in commands:
            try:
                self._look_at(command, now)
            except OSError as error:        # a full disk, say: the others' turn comes all the same
                log.error('%s: %s', command.cmd_id, describe_error(error))
        for cmd_id, result in refused:
            if now - result['sent'] >= RESEND_EVERY:
                self._tell_results(cmd_id, result)
        if not self.fork_server.lives():
            self._begin_anew('the fork server died')
        else:
            self._start_waiting()

    def _look_at(self, command: Command, now: float) -> None:
        """Sends its result, or sees to it that there will be one. Raises OSError."""
        if command.has('result.json'):
            if now - command.sent >= RESEND_EVERY or not command.sent:
                self._send_results(command)
        elif command.request.get('boot') != self.boot:
            self._lose(command, 'the guest was rebooted')
        elif command.has('runner'):
            self._look_after(command, now)
        elif command.begun and now - command.begun > START_PATIENCE:
            self._begin(command)

    def _look_after(self, command: Command, now: float) -> None:
        """A command that runs: its runner may have been killed, its status or a signal be due."""
        if not command.runner_lives():
            self._lose_unless_ended(command)
            return
        if command.signals and command.process():
            signal_session(command.process(), command.signals.pop(0))
        interval = command.request.get('status-interval', 0)
        if interval and now - command.told >= interval:
            self._tell_status(command)

    def _say_still_alive(self) -> None:
        with self._lock:
            running = sum(not command.ended for command in self._commands.values())
        load = {'running': running, 'mem_free': memory('MemAvailable'), 'uptime': uptime()}
        try:
            load['load1'] = os.getloadavg()[0]
            disk = os.statvfs(self.root)
            load['disk_free'] = disk.f_bavail * disk.f_frsize
        except OSError as error:
            log.debug('load: %s', error)
        self.say(protocol.STILL_ALIVE.howToSay(self.id, self.ip, **load))

    def _keep_house(self) -> None:
        if self.spool is not None:
            vm = self.settings.VM
            self.fork_server.trim()
            if not self.spool.let_go(vm.keep_spool, vm.dedupe_ttl):
                self._next_housekeeping = time.monotonic() + SWEEP_PAUSE

    # What is told of a command.

    def _tell_status(self, command: Command, **slices: Any) -> None:
        command.told = time.monotonic()
        keys = {'out-size': command.size('out'), 'err-size': command.size('err'),
                'progress': command.progress()}  # type: Dict[str, Any]
        state, pid = command.state(), command.process()
        if state == 'running' and pid:
            processes, resources = live_usage(pid)
            keys.update(pid=pid, processes=processes, resources=resources, wall=command.wall())
        self.say(protocol.CMD_STATUS.howToSay(command.cmd_id, state, **dict(keys, **slices)))

    def _send_results(self, command: Command) -> None:
        command.ended = True
        command.sent = time.monotonic()
        try:
            result = command.result()
        except (OSError, ValueError) as error:
            result = self._mend_result(command, error)
        result.update(self._streams(command))
        result['spool'] = self._spool.chirp_path + '/' + os.path.basename(command.folder)
        self._tell_results(command.cmd_id, result)
        log.info('%s: %s', command.cmd_id, result.get('state'))

    def _mend_result(self, command: Command, error: Exception) -> Dict[str, Any]:
        """A torn result.json is set aside, and the command is lost."""
        aside = command.path('result.json.corrupt-%d' % time.time())
        log.error('%s is damaged (%s): set aside as %s', command.path('result.json'), error, aside)
        os.rename(command.path('result.json'), aside)
        command.end('lost', 'its result was damaged: %s' % error)
        return command.result()

    def _streams(self, command: Command) -> Dict[str, Any]:
        """The tails of both streams that go with the results, as large as the word may be."""
        room = int(min(command.request.get('inline-output', self.settings.VM.inline_output),
                       LARGEST_INLINE))
        while True:
            found = {}  # type: Dict[str, Any]
            for stream in ('out', 'err'):
                put_tail(found, stream, command, room)
            if len(protocol.write_json(found)) <= self._room_for_output or not room:
                return found
            room //= 2

    def _tell_results(self, cmd_id: str, result: Dict[str, Any]) -> None:
        result['sent'] = time.monotonic()
        told = {key: value for key, value in result.items() if key not in ('format', 'sent', 'acked')}
        self.say(protocol.CMD_RESULTS.howToSay(cmd_id, told))


def identify(vm: Any, network: Network, address: str) -> Tuple[str, str]:
    """Id and network card of a machine that has that local address towards the broker.

    ``vm``: the settings [VM]. The id is the MAC of the card; the machine's name where it has none.
    """
    card = network.interface_with(address) if vm.network_interface == 'auto' else vm.network_interface
    if vm.id != 'auto':
        return read_id(vm.id), card
    return (network.mac_of(card) if card else '') or folder_name(socket.gethostname()), card


def read_id(text: str) -> str:
    """An id as the host knows it: MACs in upper case."""
    return text.upper() if re.fullmatch('(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}', text) else text


def read_request(message: Message, defaults: Any) -> Dict[str, Any]:
    """What a CMD_RUN asks for, of the right types, with this guest's defaults. Raises BadWord."""
    request = {'cmd': message.text('cmd'), 'path': message.text('path'),
               'args': [as_text('args', value) for value in message.sequence('args')],
               'env': {name: as_text('env', value) for name, value in message.mapping('env').items()},
               'env-clear': message.flag('env-clear'), 'user': message.text('user'),
               'fileForStdin': message.text('fileForStdin'), 'nice': int(message.number('nice')),
               'timeout': message.number('timeout'),
               'kill-after': message.number('kill-after', defaults.kill_after),
               'status-interval': message.number('status-interval'),
               'output-limit': int(message.number('output-limit', defaults.output_limit)),
               'inline-output': int(message.number('inline-output', defaults.inline_output)),
               'limits': {name: int(message_number(value))
                          for name, value in message.mapping('limits').items()}}  # type: Dict[str, Any]
    if not request['cmd']:
        raise protocol.BadWord('CMD_RUN: no cmd')
    for name in ('timeout', 'kill-after', 'status-interval', 'output-limit', 'inline-output'):
        if request[name] < 0:
            raise protocol.BadWord('CMD_RUN: %s should not be negative' % name)
    if message.get('stdin64') is not None:
        try:
            request['stdin'] = base64.b64decode(message.text('stdin64'), validate=True)
        except ValueError:
            raise protocol.BadWord('CMD_RUN: stdin64 is no base64')
    elif message.get('stdin') is not None:
        request['stdin'] = message.text('stdin').encode('utf-8')
    return request


def as_text(name: str, value: Any) -> str:
    """An argument or the value of a variable; numbers are written out. Raises BadWord."""
    return Message('', 'CMD_RUN', None, {name: value}).text(name)


def message_number(value: Any) -> float:
    """A limit. Raises BadWord."""
    return Message('', 'CMD_RUN', None, {'limits': value}).number('limits')


def put_bytes(keys: Dict[str, Any], stream: str, data: bytes) -> None:
    """Bytes of a stream as text, or as base64 where they are not UTF-8."""
    try:
        keys[stream] = data.decode('utf-8')
    except UnicodeDecodeError:
        keys[stream] = data.decode('utf-8', 'replace')
        keys[stream + '64'] = base64.b64encode(data).decode('ascii')


def put_tail(keys: Dict[str, Any], stream: str, command: Command, room: int) -> None:
    """The last ``room`` bytes of a stream, from the begin of a character on, and where they begin."""
    size = command.size(stream)
    offset = max(0, size - room)
    data = command.slice(stream, offset, size - offset) if size else b''
    if offset:
        whole = re.sub(b'^[\x80-\xbf]{1,3}', b'', data)
        offset, data = offset + len(data) - len(whole), whole
    keys[stream + '-offset'], keys[stream + '-size'] = offset, size
    put_bytes(keys, stream, data)


def signal_number(name: str) -> int:
    """The number of TERM, SIGTERM or 15. Raises BadWord."""
    try:
        if re.fullmatch('[0-9]{1,4}', name):
            return int(signal.Signals(int(name)))
        return int(signal.Signals['SIG' + name.upper().replace('SIG', '', 1)])
    except (KeyError, ValueError):
        raise protocol.BadWord('CMD_SIGNAL: no signal %.40r' % name)


def memory(field: str) -> int:
    """Bytes, by a field of /proc/meminfo; 0 where there is none."""
    try:
        with open('/proc/meminfo') as file:
            for line in file:
                if line.startswith(field + ':'):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError) as error:
        log.debug('no %s: %s', field, error)
    return 0


def uptime() -> float:
    """Seconds since this machine booted; 0 where that can't be known."""
    try:
        with open('/proc/uptime') as file:
            return float(file.read().split()[0])
    except (OSError, ValueError) as error:
        log.debug('no uptime: %s', error)
        return 0.0


def drain(descriptor: int) -> None:
    """Reads away what a wake-up pipe holds."""
    try:
        while len(os.read(descriptor, 4096)) == 4096:
            continue
    except BlockingIOError:
        return


# --- command line ----------------------------------------------------------------------------

USAGE = """usage: vmguest.py [guest.ini]              run the agent until SIGTERM or Ctrl-C
       vmguest.py --check [guest.ini]      which broker, id and network card it would use
       vmguest.py --bundle FILE.pyz        write the agent as one file for a guest image
       vmguest.py --help | --version
"""


LEAST_DISK = 50 * 1000 * 1000      # bytes that should be free for the output of commands


def check(settings: Any) -> int:
    """Looks at every precondition, and tells what the agent would use; 0 when it would work."""
    root = os.path.expanduser(settings.VM.dir_to_serve)
    findings = [agent.check_python(), agent.check_package('stomper', needed=True),
                agent.check_folder(root, '[VM] dir_to_serve'), agent.check_disk(root, LEAST_DISK),
                agent.check_clock()]
    if settings.Chirp.server == 'chirp_server':
        import shutil  # brings compressors along
        findings.append(agent.Finding(
            shutil.which('chirp_server') is not None, 'program chirp_server', 'it is not in PATH: install '
            'cctools, or take [Chirp] server=embedded; commands work without it', needed=False))
    network = Network()
    configured = settings.Broker.host
    try:
        hosts = network.candidates() if configured == 'auto' else [configured]
        found, address = agent.check_broker(hosts, settings.Broker, protocol.try_broker)
        findings.append(found)
        if found.ok:
            findings += check_identity(settings, network, address)
    except GuestError as error:
        findings.append(agent.Finding(False, 'network', str(error)))
    return report(findings)


def report(findings: List[agent.Finding]) -> int:
    """Prints them; 0 when all that is needed is there."""
    encoding = sys.stdout.encoding or 'ascii'
    for line in agent.describe_findings(findings, encoding):
        print(line.encode(encoding, 'backslashreplace').decode(encoding))
    return 0 if all(found.ok or not found.needed for found in findings) else 1


def check_identity(settings: Any, network: Network, address: str) -> List[agent.Finding]:
    """Id and network card, as the agent would find them for that local address."""
    machine_id, card = identify(settings.VM, network, address)
    there = settings.VM.network_interface in ('auto',) + tuple(network.interfaces())
    return [agent.Finding(there, 'interface %s (%s)' % (card or 'none', address),
                          'this machine has no such card, but %s: correct [VM] network_interface'
                          % (', '.join(network.interfaces()) or 'none')),
            agent.Finding(True, 'id %s' % machine_id)]


def run_agent(settings: Any) -> int:
    """Runs the agent; gives the exit code."""
    fork_server = ForkServer()
    guest = Agent(settings, fork_server)
    told = []                       # type: List[int]    # signals: guest.stopping is set by stop(), too

    def end(number: int, *_: Any) -> None:
        told.append(number)
        guest.stopping = True
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    try:
        guest.start()
        guest.run()
    finally:
        guest.stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)       # from here on nothing is left to be tidied up
    if told:
        return 0
    if guest.restart and guest.id:
        begin_anew(guest.restart)
    if guest.restart:
        raise GuestError(guest.restart)
    return 0


def begin_anew(why: str) -> None:
    """Replaces this process by a new agent; runners go on, and the new one finds them."""
    log.warning('begins anew: %s', why)
    flags = ['-I'] * bool(sys.flags.isolated) + ['-S'] * bool(sys.flags.no_site)
    os.execv(sys.executable, [sys.executable] + flags + sys.argv)


def main(argv: List[str]) -> int:
    """The command line; gives the exit code."""
    words = [word for word in argv if word not in ('--check',)]
    if '--help' in words or '-h' in words:
        print(__doc__.splitlines()[0] + '\n\n' + USAGE)
        return 0
    if '--version' in words:
        print('vmguest %s' % agent.VERSION)
        return 0
    if words[:1] == ['--bundle'] and len(words) == 2:
        agent.write_bundle(words[1], 'vmguest')
        return 0
    if len(words) > 1 or words and words[0].startswith('-'):
        print('vmguest: %s\n%s' % (' '.join(words), USAGE), file=sys.stderr)
        return 2
    try:
        settings = agent.read_settings(words[0] if words else None, SETTINGS)
        if '--check' in argv:
            return check(settings)
        agent.set_up_logging(settings.Logging)
        sys.setswitchinterval(agent.SWITCH_INTERVAL)
        return run_agent(settings)
    except (protocol.ProtocolError, agent.AgentError) as error:
        print('vmguest: %s' % agent.naming_file(words[0] if words else None, error), file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
