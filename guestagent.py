"""The guest agent: joins a host's broker, hears and says the words, beats its beacon.

Here are the keys of guest.ini, the agent, its command line (the program is vmguest.py). CONTRIBUTING.md lists
the rooms behind it.

What it is not: what decides over commands (guestcommands.py), or their parent. A runner outlives the agent,
and writes its result into the spool; the next agent finds it there.

Threads: ``main`` sends beacons and looks after commands; ``link`` is the STOMP connection, where all words
are heard; the Chirp server has its own. Runners are processes without threads, forked from one (the fork
server) that was forked before any thread began. One lock guards the moment when the main thread wakes, one
the pipe that wakes it; the rooms behind have their own.
"""

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from typing import Any, Dict, List, Optional, Set, Tuple  # noqa: F401

import agent
import protocol
import shortcut
from guestcommands import RESEND_EVERY, Commands
from guestconsole import Consoles
from guestforks import ForkServer
from guestidentity import (
    SERVED,
    Secret,
    check_configured,
    find_broker_port,
    identify,
    make_folder,
    read_id,
    settle_folders,
    warn_of_readers,
)
from guestinput import wait_until_ready
from guestmachine import Network, memory, read_boot_id, uptime
from guestreports import Reports
from guestrunner import drain
from guestspool import SHOWN_AS, Spool, folder_name
from guesttrust import HostTrust
from protocol import Message

log = logging.getLogger('vmguest')

SETTINGS = {
    'Broker': {
        'host': (agent.text, 'auto'), 'port': (agent.integer(1, 65535), '61613'),
        'username': (agent.text, ''), 'password': (agent.password, ''),
        'heartbeat': (agent.integer(0, 3600), '10'), 'tls': (agent.yes_no, 'no'),
        'ca_file': (agent.path, '')},
    'VM': {
        'id': (protocol.guest_id, 'auto'), 'name': (agent.text, ''),
        'secret': (agent.PathOr('auto|[0-9a-fA-F]{64}'), 'auto'), 'state_dir': (agent.PathOr('auto'), 'auto'),
        'network_interface': (agent.text, 'auto'), 'beacon_interval': (agent.duration, '10'),
        'dir_to_serve': (agent.PathOr(SERVED), SERVED), 'max_commands': (agent.integer(0, 100000), '0'),
        'inline_output': (agent.size, '64K'), 'output_limit': (agent.size, '256M'),
        'kill_after': (agent.duration, '5'), 'dedupe_ttl': (agent.duration, '7d'),
        'keep_spool': (agent.duration, '1h')},
    'Chirp': {
        'server': (agent.choice('embedded', 'chirp_server'), 'embedded'),
        'port': (agent.integer(0, 65535), '9094'),
        'auth': (agent.choice('secret', 'address'), 'secret'), 'user': (agent.text, 'nobody'),
        'cert_file': (agent.path, ''), 'key_file': (agent.path, '')},
    'Logging': agent.LOGGING,
}  # type: Dict[str, Any]


# --- the agent -------------------------------------------------------------------------------

SWEEP_PAUSE = 0.05             # seconds between two slices of a look for old folders
GREETING_PATIENCE = 5.0        # seconds that results wait for the host's greeting on a new connection
FAREWELL_PATIENCE = 1.0        # … and that the BYE of an agent waits for it that ends as it joins
HELLO_LIMIT = 8 * 1000         # bytes of the commands in a HELLO, which may be the first word
SHORTEST_BEACON = 0.5          # seconds between two beacons, whatever is asked for
HELLO_EVERY = 1.0              # seconds between two of them, whoever asks


class Agent:
    """The guest agent: ``start``, ``run``, ``stop``.

    All words are heard in ``_hear`` and said in ``say``. The heard_… methods run on the link's thread;
    ``run`` and ``tick`` on the main thread.
    """
    side = 'guest'

    def __init__(self, settings: Any, fork_server: ForkServer, network: Optional[Network] = None) -> None:
        """``fork_server``: made before any thread was."""
        self.settings = settings
        self.network = network or Network()
        self.root = os.path.abspath(settings.VM.dir_to_serve)
        self.id = read_id(settings.VM.id) if settings.VM.id != 'auto' else ''
        self.name = settings.VM.name or socket.gethostname()
        self.boot = read_boot_id()
        self.session = os.urandom(8).hex()
        self.beacon_interval = max(SHORTEST_BEACON, settings.VM.beacon_interval)
        self._aints = agent.Seldom(log)        # a stranger's broker says them as fast as it likes
        self.stopping = False
        self.restart = ''              # why the agent should begin anew, as another process image
        self._fork_server = fork_server
        self._spool = None             # type: Any    # this and …
        self._commands = None          # type: Any    # … these are there once the id is known
        self._consoles = None          # type: Any
        self._trust = None             # type: Any
        self._is_only_address = True   # whether there is no other one to try
        self._left = set()             # type: Set[str]   # what was told of brokers that were left
        self._hello_due = float('inf')
        self._said_hello = -HELLO_EVERY
        self.files = None              # type: Any    # from ``start`` on
        self._host_address = ''        # where the host was that proved itself last
        self._told_where = False       # that no broker is looked for anywhere
        self._told_port = 0            # of the Chirp server, in the last HELLO
        self._wakeup, self._waker = os.pipe()
        os.set_blocking(self._wakeup, False)
        os.set_blocking(self._waker, False)
        # Guards _waker, which is -1 once it is closed: the link's thread may outlive that on a busy machine.
        self._waker_lock = threading.Lock()
        # Guards _awake_at, and what it is computed from meanwhile; Commands takes its own lock within it.
        self._clock_lock = threading.Lock()
        now = time.monotonic()
        self._awake_at = now           # when the main thread's next look is due at the latest
        self._next_beacon = now
        self._housekeeping_every = agent.look_every(settings.VM.keep_spool, settings.VM.dedupe_ttl)
        self._next_housekeeping = now + self._housekeeping_every
        broker = settings.Broker
        broker.port = find_broker_port(broker)
        self.link = protocol.Link(
            self._brokers, [(protocol.CMD_REQUESTS, 'auto')], self._link_up, self._hear,
            self._link_down, broker.username, broker.password, broker.heartbeat,
            agent.client_tls(broker.ca_file) if broker.tls else None)

    # Start and stop.

    def start(self) -> None:
        """Begins to look for the broker. Raises AgentError where the served folder can't be used."""
        if self.root == os.path.join(self.settings.VM.state_dir, SERVED):
            make_folder(self.settings.VM.state_dir)
            make_folder(self.root, 0o755)
        if not os.path.isdir(self.root):
            raise agent.AgentError('[VM] dir_to_serve %s is no folder' % self.root)
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise agent.AgentError('[VM] dir_to_serve %s can\'t be written by this user: change its owner or '
                                   'mode, or name another folder' % self.root)
        if self.id:
            self._open_spool()
        # After the fork: runners needn't carry it. Before the link: its heart-beats would wait meanwhile.
        from guestfiles import Files
        self.files = Files(self.root, self.settings.Chirp, self._tell_port)
        self.link.start()
        agent.release_memory()
        log.info('control groups: %s', self._fork_server.place.describe())
        log.info('vmguest %s runs as pid %d: broker %s:%d, serves %s', agent.VERSION, os.getpid(),
                 self.settings.Broker.host, self.settings.Broker.port, self.root)

    def _open_spool(self) -> None:
        """Finds what earlier agents left. Raises AgentError."""
        vm = self.settings.VM
        spool = Spool(vm.state_dir, self.id, self.boot)
        self.secret = Secret(vm, folder_name(self.id))
        self._trust = HostTrust(self.id, self.secret)
        is_shown = self.settings.Chirp.server == 'embedded'    # else the host reads output by words alone
        self.reports = Reports(self.say, vm.inline_output, spool.chirp_path if is_shown else '')
        self._consoles = Consoles(self.reports, self._wake_by, self._dial)
        commands = Commands(vm, self.root, self.boot, spool, self._fork_server, self.reports, self._consoles,
                            self._wake_by, self._restart)
        commands.name = self.name
        commands.load()
        self._spool, self._commands = spool, commands

    def run(self) -> None:
        """Works until it is told to stop. On the main thread."""
        signal.set_wakeup_fd(self._waker)
        while not self.stopping and not self.restart:
            consoles = self._consoles
            reading, writing = consoles.watched() if consoles is not None else ([], [])
            reading = [self._wakeup, self._fork_server.reports] + reading
            ready = wait_until_ready(reading, writing, self._patience())
            try:
                if consoles is not None and not writing:
                    ready = self._pass_on(consoles, ready, reading)
                if self._wakeup in ready:
                    drain(self._wakeup)
                self.tick()
            except Exception:       # the agent lives on, whatever one tick met
                log.exception('in the tick')

    def _pass_on(self, consoles: Consoles, ready: List[Any], reading: List[Any]) -> List[Any]:
        """Keys and what they show pass before anything else is looked at, until more than that is ready, or
        the time has come."""
        while ready and time.monotonic() < self._awake_at:
            due = consoles.pass_on(ready)
            if due is None:
                break
            with self._clock_lock:
                self._awake_at = min(self._awake_at, due)
            ready = wait_until_ready(reading, [], self._awake_at - time.monotonic())
        return ready

    def wake(self) -> None:
        """Has the main thread look at its clock and the commands now. From any thread."""
        with self._waker_lock, contextlib.suppress(BlockingIOError):       # then it is awake already
            if self._waker >= 0:
                os.write(self._waker, b'w')

    def _wake_by(self, moment: float) -> None:
        """The same by then, by the monotonic clock: mostly it will be awake anyway."""
        with self._clock_lock:
            is_late = self._awake_at > moment
        if is_late:
            self.wake()

    def stop(self) -> None:
        """Says BYE, and leaves; the runners go on."""
        self.stopping = True
        if self.files is not None:
            self.files.stop()
        self._say_bye()
        self.link.close()
        self._fork_server.stop()
        if self._consoles is not None:
            self._consoles.close()
        if self._spool is not None:
            self._spool.close()
        signal.set_wakeup_fd(-1)
        with self._waker_lock:
            os.close(self._waker)
            self._waker = -1
        os.close(self._wakeup)

    def _say_bye(self) -> None:
        """To a host that has heard a HELLO, and whose greeting is on its way, once that is there: the host
        knows this guest from the HELLO on, and would miss it."""
        if self.link.up and self._trust is not None:
            self._trust.wait_for_greeting(FAREWELL_PATIENCE)
        self.say(protocol.BYE.howToSay(self.id, self.ip, self.restart or 'the agent stops'))

    def _restart(self, why: str) -> None:
        self.restart = why
        self.wake()

    # The link.

    @property
    def ip(self) -> str:
        """The address by which the broker sees this machine."""
        return self.link.local_address[0]

    def _brokers(self) -> List[Tuple[str, int]]:
        host, port = self.settings.Broker.host, self.settings.Broker.port
        if host != 'auto':
            return [(host, port)]
        known = [self._host_address] if self._host_address else []
        found = list(dict.fromkeys(known + self.network.candidates(port)))
        self._is_only_address = len(found) < 2
        if not found and not self._told_where:
            log.warning(self.network.why_nowhere(port))
        self._told_where = not found
        return [(candidate, port) for candidate in found]

    def _link_up(self, link: protocol.Link) -> None:
        if not self._settle_id():
            return
        is_found = self.settings.Broker.host == 'auto'
        self.secret.arrive('%s:%d' % link.peer_address if is_found else '')
        self._trust.connected()            # before the file server, which says HELLO once it has a port
        self.files.serve(self.ip, link.peer_address[0], {SHOWN_AS: self._spool.shown}, self.secret.value,
                         self.id)
        self._say_hello()
        now = time.monotonic()
        self._commands.resend(now - RESEND_EVERY + GREETING_PATIENCE)
        self._next_beacon = now + self.beacon_interval
        self.wake()

    def _link_down(self, reason: str) -> None:
        if not self.stopping and self._trust.is_proved:
            log.warning('no connection to the broker: %s', reason)

    def _settle_id(self) -> bool:
        """Finds the id at the first connection. False: the agent has to begin anew."""
        if self.settings.VM.id != 'auto':
            return True
        cards = {self.network.mac_of(name) for name in self.network.interfaces()}
        if self.id and (self.id in cards or not cards):
            return True             # whichever card carries this connection: the machine is the same
        found, card = identify(self.settings.VM, self.network, self.ip)
        if self.id and found != self.id:
            self._restart('the network card %s was exchanged for %s' % (self.id, found))
            return False
        if card and not self.network.mac_of(card) and self.settings.VM.network_interface != 'auto':
            log.error('[VM] network_interface %s has no MAC address', card)
        self.id = found
        try:
            self._open_spool()
        except agent.AgentError as error:
            self.id = ''
            self._restart(str(error))
            return False
        return True

    # Words: the one place where they are said, and the one where they are heard.

    def say(self, message: Message) -> bool:
        """Says a word to the host. False where none has proved itself. From any thread."""
        return self._trust is not None and self._trust.say(message, self.link.send)

    def _dial(self, token: str) -> Optional[shortcut.Shortcut]:
        """A connection that the host expects, for one terminal; None where there can't be one."""
        broker, key = self.settings.Broker, self._trust.shortcut_key(token)
        if broker.tls or not key:
            return None
        try:
            return shortcut.dial(self.link.peer_address, token, key, broker.username, broker.password)
        except OSError as error:
            log.debug('no shortcut to the host: %s', error)
            return None

    def _hear(self, frame: Any) -> None:
        """One MESSAGE. What isn't a word of the host for this guest is dropped, and said now and then."""
        headers, body = frame.headers, frame.body
        if not self.id or not protocol.is_addressed(headers.get('to', ''), self.id, self.name):
            return
        try:
            if body.startswith('HELLO') and 'mac' not in headers:
                self._hear_greeting(protocol.interpret(headers, body))
            elif not self.stopping:    # what words are handed to is closed by then
                headers = self._trust.check(headers.get('destination', ''), headers, body.encode('utf-8'))
                protocol.hear(self, protocol.interpret(headers, body))
        except protocol.BadWord as error:
            self._aints.warn('', 'AINT: %s', error)
        except protocol.Untrusted as error:
            self._trust.drop(error)

    def _hear_greeting(self, hello: Message) -> None:
        """To all: announce yourselves. To this guest: the proof of its host, or another's try."""
        if hello.headers.get('to') == '*':
            self._hello_due = self._said_hello + HELLO_EVERY
            self._wake_by(self._hello_due)
        elif self._trust.greeted(hello) and not self.stopping:
            self._host_address = self.link.peer_address[0]
            self._left.clear()
            self.heard_hello(hello)
            self.say(self._hello())        # what it said before, anybody may have said
        self._wake_by(self._trust.verdict(self._is_only_address)[1])

    def heard_aint(self, message: Message) -> None:
        """An unknown word, or one that isn't for a guest."""
        self._aints.warn('', 'AINT: %.40r', message.word)

    def heard_bye(self, message: Message) -> None:
        """The host goes; it will be back."""
        log.info('the host says BYE: %.200r', message.text('reason'))

    def heard_hello(self, message: Message) -> None:
        """The host's name for this guest, and its wishes."""
        self.name = self._commands.name = message.text('name', self.name)
        self.files.admit(message)
        wanted = message.number('beacon_interval', self.settings.VM.beacon_interval)
        self.beacon_interval = max(SHORTEST_BEACON, min(wanted, self.settings.VM.beacon_interval))
        if message.get('max_frame') is not None:
            self.reports.limit(message.number('max_frame'))
        log.info('joined the host at %s as %s, id %s', self.link.peer_address[0], self.name, self.id)
        self._commands.resend(0.0)
        self._commands.joined('cmds' in self._hello().keys)
        self._next_beacon = time.monotonic()
        self.wake()

    def heard_cmd_run(self, message: Message) -> None:
        """The host wants a command to be run."""
        self._commands.run(message)

    def heard_cmd_query(self, message: Message) -> None:
        """The host asks how far a command is."""
        self._commands.query(message)

    def heard_cmd_input(self, message: Message) -> None:
        """The host hands a command its input."""
        self._commands.input(message)

    def heard_cmd_signal(self, message: Message) -> None:
        """The host signals a command."""
        self._commands.signal(message)

    def heard_cmd_ack(self, message: Message) -> None:
        """The host has a command's results."""
        self._commands.acknowledge(message)

    def _say_hello(self) -> None:
        """Asks whoever is there to prove that it is this guest's host."""
        self._said_hello, self._hello_due = time.monotonic(), float('inf')
        message = self._hello()
        message.keys.update(self._trust.hello())
        self.link.send(message.topic, dict(message.headers, **{'from': self.id}), message.body())

    def _hello(self) -> Message:
        facts = self.facts()
        states = self._commands.states()
        if len(protocol.write_json(states)) <= HELLO_LIMIT:
            facts['cmds'] = states      # else the host asks for each
        self._told_port = self.files.port
        return protocol.HELLO.howToSay(self.id, self.ip, **facts)

    def _tell_port(self) -> None:
        """The host should know where files are served by now. On a thread of the Chirp server."""
        if self.link.up and self._told_port != self.files.port:
            self._say_hello()

    def facts(self) -> Dict[str, Any]:
        """What a HELLO tells of this machine; mem in bytes."""
        system = os.uname()
        facts = {'host': socket.gethostname(), 'boot': self.boot, 'session': self.session,
                 'os': '%s %s, %s' % (system.sysname, system.release, system.machine),
                 'python': sys.version.split()[0],
                 'version': agent.VERSION, 'cpus': os.cpu_count() or 0,
                 'mem': memory('MemTotal'), 'marks': True}  # type: Dict[str, Any]
        if self.settings.VM.name:
            facts['name'] = self.settings.VM.name
        if self.files.port:
            facts['chirp'] = dict({'port': self.files.port}, **({'tls': True} if self.files.tls else {}))
        return facts

    def _say_still_alive(self) -> None:
        load = {'running': self._commands.count_unended() if self._commands is not None else 0,
                'mem_free': memory('MemAvailable'), 'uptime': uptime()}
        try:
            load['load1'] = os.getloadavg()[0]
            disk = os.statvfs(self.root)
            load['disk_free'] = disk.f_bavail * disk.f_frsize
        except OSError as error:
            log.debug('load: %s', error)
        self.say(protocol.STILL_ALIVE.howToSay(self.id, self.ip, **load))

    # The clock.

    def _patience(self) -> float:
        """Seconds until something is due. Of a command that lasts, or ended, its runner reports."""
        with self._clock_lock:
            due = [self._next_beacon, self._next_housekeeping, self._hello_due]
            if self.link.up and self._trust is not None:
                due.append(self._trust.verdict(self._is_only_address)[1])
            if self._commands is not None:
                looks = self._commands.due(), self._consoles.due()
                due += [moment for moment in looks if moment is not None]
            self._awake_at = min(due)
        return max(0.0, self._awake_at - time.monotonic())

    def tick(self) -> None:
        """What time and the runners bring."""
        now = time.monotonic()
        if self._consoles is not None:
            self._consoles.look(now)
        reported = self._fork_server.reported()
        if self._commands is not None:
            self._commands.look(now, reported)
        if now >= self._hello_due and self.link.up:
            self._say_hello()
        self._judge_host()
        if now >= self._next_beacon:
            self._next_beacon = now + self.beacon_interval
            self._say_still_alive()
        if now >= self._next_housekeeping:
            self._next_housekeeping = now + self._housekeeping_every
            self._keep_house()

    def _judge_host(self) -> None:
        """Leaves who doesn't prove to be this guest's host."""
        if not self.link.up or self._trust is None:
            return
        why, _ = self._trust.verdict(self._is_only_address)
        if why:
            told = '%s:%s: %s' % (self.link.peer_address + (why,))
            if told not in self._left and len(self._left) < 100:
                self._left.add(told)
                log.warning('not this guest\'s host, and not obeyed: %s', told)
            self.link.abandon(why)

    def _keep_house(self) -> None:
        self._fork_server.trim()
        if self._commands is not None:
            self._commands.tidy_groups()
        vm = self.settings.VM
        if self._spool is not None and not self._spool.sweep(vm.keep_spool, vm.dedupe_ttl):
            self._next_housekeeping = time.monotonic() + SWEEP_PAUSE


# --- command line ----------------------------------------------------------------------------

USAGE = """usage: vmguest.py [--broker HOST] [guest.ini]            run the agent until SIGTERM or Ctrl-C
       vmguest.py --check [--broker HOST] [guest.ini]    which broker, id and network card it would use
       vmguest.py --bundle FILE.pyz                      write the agent as one file for a guest image
       vmguest.py --help | --version

  --broker HOST   where the host's broker is, instead of [Broker] host; HOST:PORT, instead of port as well
"""


def run_agent(settings: Any) -> int:
    """Runs the agent; gives the exit code."""
    fork_server = ForkServer()
    guest = Agent(settings, fork_server)
    told = []                       # type: List[int]    # signals: guest.stopping is set by stop(), too

    def end(number: int, *_: Any) -> None:
        told.append(number)
        guest.stopping = True
    ending = [getattr(signal, name) for name in agent.ENDING if hasattr(signal, name)]
    for number in ending:
        if not agent.is_left_alone(number):
            signal.signal(number, end)
    try:
        guest.start()
        guest.run()
    finally:
        guest.stop()
    for number in ending:
        if not agent.is_left_alone(number):
            signal.signal(number, signal.SIG_DFL)       # from here on nothing is left to be tidied up
    if told:
        return 0
    if guest.restart and guest.id:
        execute_anew(guest.restart)
    if guest.restart:
        raise agent.AgentError(guest.restart)
    return 0


def execute_anew(why: str) -> None:
    """Replaces this process by a new agent; runners go on, and the new one finds them."""
    log.warning('restarts itself: %s', why)
    flags = ['-I'] * bool(sys.flags.isolated) + ['-S'] * bool(sys.flags.no_site)
    os.execv(sys.executable, [sys.executable] + flags + sys.argv)


def main(argv: Optional[List[str]] = None) -> int:
    """The command line; gives the exit code."""
    agent.open_standard_streams()
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(__doc__.splitlines()[0] + '\n\n' + USAGE)
        return 0
    if '--version' in argv:
        print('vmguest %s' % agent.VERSION)
        return 0
    if argv[:1] == ['--bundle'] and len(argv) == 2:
        import bundles  # an agent that runs does without
        return bundles.bundle(argv[1], 'vmguest')
    words, options = split_options(argv)
    if len(words) > 1 or any(word.startswith('-') for word in words):
        print('vmguest: %s: %s\n%s' % (' '.join(argv), '--broker needs HOST' if words[-1] == '--broker' else
                                       'expected options as below, and one guest.ini at most', USAGE),
              file=sys.stderr)
        return 2
    ini = words[0] if words else None
    try:
        settings = agent.read_settings(ini, SETTINGS)
        if '--broker' in options:
            settings.Broker.host, settings.Broker.port = read_broker(options['--broker'],
                                                                     settings.Broker.port)
        settle_folders(settings.VM, ini or '')
        check_configured(settings.VM)
        if '--check' in options:
            import guestcheck  # an agent that runs does without
            return guestcheck.check(settings)
        agent.hand_on_no_descriptors()
        agent.set_up_logging(settings.Logging)
        warn_of_readers(settings.VM, ini or '')
        sys.setswitchinterval(agent.SWITCH_INTERVAL)
        return run_agent(settings)
    except (protocol.ProtocolError, agent.AgentError) as error:
        print('vmguest: %s' % agent.naming_file(ini, error), file=sys.stderr)
        return 1


def read_broker(text: str, port: Any) -> Tuple[str, Any]:
    """(host, port) of HOST, HOST:PORT, an IPv6 address, or one in brackets and :PORT; that port where none is
    named. Raises ConfigError."""
    found = re.fullmatch(r'\[([^]]+)\](?::(.*))?|([^:]*):([^:]*)', text)
    if found is None:
        return text, port
    host, named = found.group(1) or found.group(3), found.group(2) if found.group(1) else found.group(4)
    if named is None:
        return host, port
    if not host or not re.fullmatch('[0-9]{1,5}', named) or not 0 < int(named) < 65536:
        raise agent.ConfigError('--broker %s: expected HOST, or HOST:PORT' % text)
    return host, int(named)


def split_options(argv: List[str]) -> Tuple[List[str], Dict[str, str]]:
    """The words that are no options, or no whole ones, and {option: its value}."""
    words, options, rest = [], {}, list(argv)  # type: List[str], Dict[str, str], List[str]
    while rest:
        word = rest.pop(0)
        if word == '--check':
            options[word] = 'yes'
        elif word == '--broker' and rest:
            options[word] = rest.pop(0)
        elif word.startswith('--broker=') and word != '--broker=':
            options['--broker'] = word.partition('=')[2]
        else:
            words.append(word)
    return words, options
