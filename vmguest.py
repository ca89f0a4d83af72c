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

import base64
import errno
import fcntl
import hashlib
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
import struct
import sys
import threading
import time
from typing import Any, Dict, Iterator, List, Optional, Tuple

import protocol
from protocol import Message

log = logging.getLogger('vmguest')

SETTINGS = {
    'Broker': {
        'host': (protocol.text, 'auto'), 'port': (protocol.integer(1, 65535), '61613'),
        'username': (protocol.text, ''), 'password': (protocol.text, ''),
        'heartbeat': (protocol.integer(0, 3600), '10'), 'tls': (protocol.yes_no, 'no'),
        'ca_file': (protocol.path, '')},
    'VM': {
        'id': (protocol.text, 'auto'), 'name': (protocol.text, ''),
        'network_interface': (protocol.text, 'auto'), 'beacon_interval': (protocol.duration, '10'),
        'dir_to_serve': (protocol.path, '~'), 'max_commands': (protocol.integer(0, 100000), '0'),
        'inline_output': (protocol.size, '64K'), 'output_limit': (protocol.size, '256M'),
        'kill_after': (protocol.duration, '5'), 'dedupe_ttl': (protocol.duration, '7d'),
        'keep_spool': (protocol.duration, '1h')},
    'Chirp': {
        'server': (protocol.choice('embedded', 'chirp_server'), 'embedded'),
        'port': (protocol.integer(0, 65535), '9094'),
        'auth': (protocol.choice('address', 'ticket'), 'address'), 'user': (protocol.text, 'nobody')},
    'Logging': protocol.LOGGING,
}  # type: Dict[str, Any]


class GuestError(Exception):
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
            import_netifaces()
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
FORMAT = 1                     # of request.json and result.json
SAFE_ID = re.compile('[A-Za-z0-9][A-Za-z0-9._@-]{0,127}')
EMPTIED = 0o500                # mode of a folder whose command is over, and its files deleted


def folder_name(cmd_id: str) -> str:
    """A name for the folder of a cmd-id, whatever text that is."""
    if SAFE_ID.fullmatch(cmd_id):
        return cmd_id
    return 'x-' + hashlib.sha256(cmd_id.encode('utf-8', 'surrogateescape')).hexdigest()


def write_file(path: str, text: str) -> None:
    """Writes a small file so that it is either whole on the disk, or not there."""
    with open(path + '.new', 'w') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(path + '.new', path)


def sync_folder(path: str) -> None:
    """Brings a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Command:
    """One command: its spool folder, and what the agent knows of it.

    The folder holds request.json (what was asked for), runner (locked while its runner lives),
    process.json (the pid), out, err, stdin, progress, result.json, acked. It is empty, and not
    writable, once all that is over.
    """

    def __init__(self, cmd_id: str, folder: str) -> None:
        self.cmd_id = cmd_id
        self.folder = folder
        self.sent = 0.0                # monotonic: when its results were last sent
        self.told = 0.0                # monotonic: when its status was last sent
        self.begun = 0.0               # monotonic: when the fork server was asked
        self.acked = False
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

    def process(self) -> int:
        """The pid, which is the session, of the command; 0 where it hasn't begun."""
        try:
            return int(self.read('process.json')['pid'])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def state(self) -> str:
        """queued, running, or how it ended."""
        if self.has('result.json'):
            try:
                return str(self.read('result.json').get('state', 'lost'))
            except (OSError, ValueError):
                return 'lost'
        return 'running' if self.begun or self.has('runner') else 'queued'

    def end(self, state: str, error: str, **more: Any) -> None:
        """Writes a result for what has none."""
        result = {'format': FORMAT, 'state': state, 'error': error, 'finished': False,
                  'exitCodeOrSignal': -1, 'resources': dict.fromkeys(protocol.RUSAGE_FIELDS, 0),
                  'wall': 0.0, 'started': 0.0, 'ended': time.time(),
                  'out-truncated': False, 'err-truncated': False}
        write_file(self.path('result.json'), json.dumps(dict(result, **more)))

    def empty(self) -> None:
        """Deletes the files; the folder stays, so that the command isn't run again."""
        for name in os.listdir(self.folder):
            os.remove(self.path(name))
        os.chmod(self.folder, EMPTIED)


class Spool:
    """The folders of all commands of one agent, named by its id. One agent at a time may use it."""

    def __init__(self, root: str, machine_id: str) -> None:
        """Raises GuestError where it can't be made, or another agent uses it."""
        self.chirp_path = '/%s/%s' % (SPOOL, folder_name(machine_id))
        self.folder = os.path.join(root, SPOOL, folder_name(machine_id))
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            os.chmod(os.path.dirname(self.folder), 0o700)
            self._lock = open(os.path.join(self.folder, '.agent'), 'w')
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GuestError('another vmguest with the id %s runs on %s; give this one an id of its '
                             'own in [VM]' % (machine_id, root))
        except OSError as error:
            raise GuestError('the spool %s can\'t be used: %s' % (self.folder, error.strerror))

    def close(self) -> None:
        """Lets another agent use it."""
        self._lock.close()

    def claim(self, cmd_id: str) -> Optional[Command]:
        """The folder of a new command; None where there is one. mkdir is the lock. Raises OSError."""
        command = Command(cmd_id, os.path.join(self.folder, folder_name(cmd_id)))
        try:
            os.mkdir(command.folder, 0o700)
        except FileExistsError:
            return None
        sync_folder(self.folder)
        return command

    def names(self) -> List[str]:
        """Names of all folders of commands."""
        return [name for name in os.listdir(self.folder)
                if not name.startswith('.') and os.path.isdir(os.path.join(self.folder, name))]

    def set_aside(self, name: str, why: Any) -> None:
        """Puts a folder out of the way that can't be understood."""
        aside = os.path.join(self.folder, '.corrupt-%s-%d' % (name, time.time()))
        log.error('%s is damaged (%s): set aside as %s', os.path.join(self.folder, name), why, aside)
        os.rename(os.path.join(self.folder, name), aside)

    def load(self) -> List[Command]:
        """The commands that aren't over, in the order in which they were asked for."""
        found = []
        for name in self.names():
            folder = os.path.join(self.folder, name)
            try:
                command = self._load(folder)
            except (OSError, ValueError, KeyError) as error:
                self.set_aside(name, error)
                continue
            if command is not None:
                found.append(command)
        return sorted(found, key=lambda command: command.request.get('received', 0))

    def _load(self, folder: str) -> Optional[Command]:
        if not os.listdir(folder):
            if os.stat(folder).st_mode & 0o200:
                os.rmdir(folder)       # claimed, and never begun: the host asks again
            return None
        command = Command('', folder)
        if not command.has('request.json'):
            for name in os.listdir(folder):
                os.remove(command.path(name))
            os.rmdir(folder)           # the same, a moment later
            return None
        command.request = command.read('request.json')
        command.cmd_id = str(command.request['cmd-id'])
        command.acked = command.has('acked')
        return command

    def let_go(self, keep_spool: float, dedupe_ttl: float) -> List[str]:
        """Empties what was acknowledged long ago, forgets what was emptied longer ago; whose ids."""
        now, emptied = time.time(), []
        for name in self.names():
            command = Command('', os.path.join(self.folder, name))
            try:
                if command.has('acked'):
                    if now - os.stat(command.path('acked')).st_mtime >= keep_spool:
                        emptied.append(str(command.read('request.json')['cmd-id']))
                        command.empty()
                elif now - os.stat(command.folder).st_mtime > dedupe_ttl \
                        and not os.listdir(command.folder):
                    os.rmdir(command.folder)
            except (OSError, ValueError, KeyError) as error:
                self.set_aside(name, error)
        return emptied


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
        peak = max(peak, peak_memory(pid, fields))
    if not count:
        return 0, {}
    usage = dict.fromkeys(protocol.RUSAGE_FIELDS, 0)  # type: Dict[str, float]
    usage.update(ru_utime=user / TICKS, ru_stime=system / TICKS, ru_maxrss=peak, ru_minflt=minor,
                 ru_majflt=major)
    return count, usage


def peak_memory(pid: int, fields: List[str]) -> int:
    """KiB that were resident at most."""
    try:
        with open('/proc/%d/status' % pid) as file:
            for line in file:
                if line.startswith('VmHWM:'):
                    return int(line.split()[1])
    except (OSError, ValueError) as error:
        log.debug('no VmHWM of %d: %s', pid, error)
    return int(fields[21]) * PAGE // 1024


# --- runner ----------------------------------------------------------------------------------

DRAIN = 2.0                    # seconds for the pipes to be emptied after the end of the process
PUMP = 256 * 1024              # bytes read from a pipe at a time
LIMITS = {'as': resource.RLIMIT_AS, 'cpu': resource.RLIMIT_CPU, 'fsize': resource.RLIMIT_FSIZE,
          'nofile': resource.RLIMIT_NOFILE, 'nproc': getattr(resource, 'RLIMIT_NPROC', None)}


class Runner:
    """Runs one command to its end: a process of its own, without threads, in its own session.

    It is the parent of the command, feeds the spool from its pipes, waits for it with wait4, which
    tells the exact usage of this command and the children that it waited for, and leaves
    result.json.
    """

    def __init__(self, folder: str) -> None:
        self.command = Command('', folder)
        self.request = self.command.read('request.json')
        self.pid = 0
        self.begin = 0.0
        self.pipes = {}                # type: Dict[int, Tuple[str, int]]
        self.room = {'out': int(self.request['output-limit']), 'err': int(self.request['output-limit'])}
        self.truncated = {'out': False, 'err': False}
        self.failure = ''              # why writing the spool failed
        self.timed_out = False
        self.kill_at = None            # type: Optional[float]

    def claim(self) -> bool:
        """Takes the lock of the command; False where a runner had it before."""
        temporary = self.command.path('runner.%d' % os.getpid())
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)     # open, and so locked, until this process ends
        try:
            os.link(temporary, self.command.path('runner'))
            return True
        except FileExistsError:
            return False
        finally:
            os.remove(temporary)

    def run(self) -> None:
        """The whole life of the command."""
        wakeup = self._watch_children()
        try:
            self._start()
        except OSError as error:
            return self._finish('failed', describe_error(error))
        deadline = self._deadline()
        while not self._has_ended():
            self._pump(wakeup, self._patience(deadline))
            self._enforce(deadline)
        status, usage = self.status
        ended = time.monotonic()
        while self.pipes and time.monotonic() < ended + DRAIN and not self.failure:
            self._pump(wakeup, ended + DRAIN - time.monotonic())
        if self.timed_out:
            self._end_session()
        self._finish_exited(status, usage, ended)

    def _watch_children(self) -> int:
        """A descriptor that can be read once a child ended."""
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(writer)
        return reader

    def _deadline(self) -> Optional[float]:
        timeout = self.request.get('timeout')
        return self.begin + float(timeout) if timeout else None

    def _start(self) -> None:
        """Forks and executes. Raises OSError with what went wrong in the child."""
        stdin = self._open_stdin()
        outs = {'out': os.pipe(), 'err': os.pipe()}
        failure, report = os.pipe()
        self.begin, self.started = time.monotonic(), time.time()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._become_command(stdin, outs['out'][1], outs['err'][1])
            except BaseException as error:      # nothing of the runner may run twice
                os.write(report, json.dumps([type(error).__name__, str(error)]).encode()[:4096])
            finally:
                os._exit(127)
        os.close(report)
        os.close(stdin)
        for name, (reader, writer) in outs.items():
            os.close(writer)
            os.set_blocking(reader, False)
            target = os.open(self.command.path(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            self.pipes[reader] = (name, target)
        told = os.read(failure, 8192)
        os.close(failure)
        if told:
            os.waitpid(self.pid, 0)
            kind, text = json.loads(told.decode())
            raise StartError(kind, text)
        self._write_process()

    def _write_process(self) -> None:
        with open(self.command.path('process.json.new'), 'w') as file:
            file.write(json.dumps({'pid': self.pid, 'started': self.started, 'begin': self.begin}))
        os.rename(self.command.path('process.json.new'), self.command.path('process.json'))

    def _open_stdin(self) -> int:
        if 'stdin' in self.request:
            return os.open(self.command.path('stdin'), os.O_RDONLY)
        name = self.request.get('fileForStdin')
        path = os.path.join(self.request['root'], name) if name else os.devnull
        return os.open(path, os.O_RDONLY)

    def _become_command(self, stdin: int, out: int, err: int) -> None:
        """In the child: session, descriptors, user, limits, folder; then the program. Never returns."""
        os.setsid()
        for source, target in ((stdin, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        request = self.request
        env = {} if request.get('env-clear') else dict(os.environ)
        user = self._find_user(request.get('user'))
        if user is not None:
            env.update(HOME=user.pw_dir, USER=user.pw_name, LOGNAME=user.pw_name)
        env['VM_PROGRESS_FILE'] = self.command.path('progress')
        env.update({name: os.fsencode(value) and value for name, value in request['env'].items()})
        if request.get('nice'):
            os.nice(int(request['nice']))
        for name, value in request.get('limits', {}).items():
            self._limit(name, int(value))
        if user is not None and user.pw_uid != os.getuid():
            self._open_progress(user)
            os.initgroups(user.pw_name, user.pw_gid)
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
        os.chdir(os.path.join(request['root'], request['path']))
        for number in (signal.SIGPIPE, signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.execvpe(request['cmd'], [request['cmd']] + request['args'], env)

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
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        os.chown(path, user.pw_uid, user.pw_gid)

    def _limit(self, name: str, value: int) -> None:
        which = LIMITS.get(name)
        if which is None:
            raise ValueError('no limit %s on this system' % name)
        resource.setrlimit(which, (value, value + 5 if name == 'cpu' else value))

    def _has_ended(self) -> bool:
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        self.status = status, usage
        return pid != 0

    def _patience(self, deadline: Optional[float]) -> float:
        due = [moment for moment in (None if self.timed_out else deadline, self.kill_at)
               if moment is not None]
        return max(0.0, min(due) - time.monotonic()) if due else 60.0

    def _pump(self, wakeup: int, timeout: float) -> None:
        """Waits for output, the end of a child, or the time; writes what came into the spool."""
        ready, _, _ = select.select(list(self.pipes) + [wakeup], [], [], timeout)
        for descriptor in ready:
            if descriptor == wakeup:
                os.read(wakeup, 4096)
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
        self._finish(state, error, finished=exited and state == 'exited', exitCodeOrSignal=code,
                     resources=resources, wall=ended - self.begin, started=self.started,
                     **{'out-truncated': self.truncated['out'], 'err-truncated': self.truncated['err']})

    def _finish(self, state: str, error: str, **more: Any) -> None:
        """result.json, by rename. On a full disk it takes the room of the output."""
        try:
            self.command.end(state, error, **more)
        except OSError as failed:
            for name in ('out', 'err'):
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


def run_command(folder: str, done: int) -> None:
    """A runner's main: runs the command of a spool folder, then tells the agent, if it still lives."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    runner = Runner(folder)
    if not runner.claim():
        return
    try:
        runner.run()
    except Exception as error:      # whatever it is: a command has a result
        log.exception('runner of %s', folder)
        if not runner.command.has('result.json'):
            runner.command.end('failed', describe_error(error))
    try:
        os.write(done, (os.path.basename(folder) + '\n').encode())
    except OSError as error:
        log.debug('the agent is gone: %s', error)


class ForkServer:
    """A process without threads that forks the runners; forked itself before any thread exists.

    Raw fork of an agent with threads would copy locks in whatever state they are. It ends when the
    agent does; its runners go on.
    """

    def __init__(self) -> None:
        self.done, self._done_writer = os.pipe()       # runners write the folder's name at their end
        os.set_blocking(self.done, False)
        self._start()

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
        os.close(self.done)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)      # runners are reaped by the kernel
        with requests.makefile('rb') as lines:
            for line in lines:
                if os.fork() == 0:
                    requests.close()
                    try:
                        run_command(os.fsdecode(line.rstrip(b'\n')), self._done_writer)
                    finally:
                        os._exit(0)

    def run(self, folder: str) -> bool:
        """Has a runner started for a spool folder. False where the fork server is dead."""
        try:
            self._socket.sendall(os.fsencode(folder) + b'\n')
            return True
        except OSError as error:
            log.error('the fork server died: %s', error)
            return False

    def finished(self) -> List[str]:
        """Names of the folders whose runners ended since the last call."""
        try:
            return os.read(self.done, 65536).decode(errors='replace').split()
        except BlockingIOError:
            return []

    def stop(self) -> None:
        """Ends it; the runners go on."""
        self._socket.close()
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            log.debug('the fork server was waited for already')
        for descriptor in (self.done, self._done_writer):
            os.close(descriptor)
