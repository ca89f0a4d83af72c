"""The host agent: knows the guests, runs commands in them, keeps the journal, answers XML-RPC.

``python vmhost.py host.ini`` runs it; ``python vmhost.py host.ini VERB ...`` talks to the running one.
Read from the top: errors, configuration, the journal (what is remembered), guests (who is there),
commands (what runs where), trust (who may say what to the embedded broker), VirtualBox, transfers,
the host itself (which words do what), the API, its server, the command line.

What it is not: a broker (stompbroker.py), a file server (chirp.py), or an authority on what a guest
says: nothing that a guest sends is evaluated, or used as a path.

Threads: ``main`` ticks the clock; ``link`` is the STOMP connection, where all words are heard;
``vbox`` owns VirtualBox; ``xmlrpc`` accepts, with a thread per request; ``fetch-N`` fetch output;
the broker has its own. Signal handlers set an event, and nothing else.
"""

# An older Python can't read this file: it stops at this line, and shows it.
__needs__: str = 'Python 3.6 or later, and this is an older one: try python3 instead of python'

import argparse
import base64
import contextlib
import difflib
import fnmatch
import functools
import http.client
import http.server
import io
import json
import logging
import os
import posixpath
import queue
import secrets
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import sys
import threading
import time
import unicodedata
import urllib.parse
import webbrowser
import xml.parsers.expat
import xmlrpc.client
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Tuple,
)

import agent
import chirp
import protocol
import stompbroker
from faults import (
    AccessDenied,
    AgentNotConnected,
    BadState,
    Busy,
    DeadlineExceeded,
    InvalidParams,
    NoFiles,
    NoSuchCommand,
    NoSuchVM,
    TransferError,
    VMHostError,
)
from hostapi import USER, FilePath, XMLRPCServer, is_carried, shown_entry, xml_number
from hostcommands import (
    QUERY_TIMEOUT,
    SIGNALS_KEPT,
    Commands,
    has_more_output,
    inline_output,
    log_submitted,
    lost_results,
    read_results,
)
from hostconfig import SETTINGS
from hostguests import NOTE_EVERY, Guest, Guests
from hostjournal import FINISHED, Execution, Journal, JournalError
from hosttransfers import CHIRP_TIMEOUT, Acknowledger, Fetcher, NameLookup, Transfers
from hosttrust import HostPolicy, is_mac, neighbour_mac, read_id, read_name
from protocol import Message
from virtualbox import VirtualBox, module_line

log = logging.getLogger('vmhost')


# --- the host --------------------------------------------------------------------------------

TICK = 0.25                    # seconds between looks at the clock
SLEPT = 5.0                    # seconds that a tick may be late before the host is said to have slept,
                               # or half of vm_gc_grace, where that is less
RETENTION_EVERY = 60.0         # seconds between looks for what keep_results lets go
SUSPENDED = ('Paused', 'Saved', 'AbortedSaved', 'Saving', 'Restoring', 'LiveSnapshotting',
             'OnlineSnapshotting', 'TeleportingPausedVM')
RETENTION_PAUSE = 1.0          # seconds between the slices of what it lets go
DOUBT = 3600.0                 # seconds without retention after the clock jumped: it may be wrong
TROUBLE_EVERY = 60.0           # seconds between two log lines about a journal that can't be written
CHIRP_PORT = 9094              # where a guest's Chirp server listens, unless it says otherwise
MISSING_GRACE = 5.0            # seconds to answer for a command that a HELLO doesn't list
OUTPUT_SLICE = 256 * 1024      # bytes that one CMD_QUERY asks for, at most
FRAME_RESERVE = 16 * 1024      # bytes of a frame that are not the command's own


class StateFolder:
    """``state_dir``: journal, token, output of commands; one host at a time may use it."""

    def __init__(self, path: str) -> None:
        """Raises VMHostError with a sentence where the folder can't be used."""
        self.path = path
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)
            self._lock = sqlite3.connect(self.file('lock'), isolation_level=None, timeout=0,
                                         check_same_thread=False)
            # A lock of SQLite's works on every system, and ends with the process, however it ends.
            self._lock.execute('BEGIN EXCLUSIVE')
        except OSError as error:
            raise VMHostError('state_dir %s can\'t be used: %s; mend that, or name another folder in [Host]'
                              % (path, error.strerror or error))
        except sqlite3.OperationalError as error:
            if 'locked' in str(error):
                raise Busy('another vmhost runs on the state folder %s; stop it, or give this one '
                           'a state_dir of its own in [Host]' % path)
            raise VMHostError('state_dir %s can\'t be written: %s; %s, or name another folder in [Host]' % (
                path, error, 'make room' if 'full' in str(error) else 'change its owner or mode'))

    def file(self, name: str) -> str:
        """The path of a file in the folder."""
        return os.path.join(self.path, name)

    def secret(self, name: str, make: Callable[[], str] = lambda: secrets.token_urlsafe(24)) -> str:
        """The text of a file that only this user can read; made at the first call."""
        path = self.file(name)
        if not os.path.exists(path):
            temporary = path + '.new'
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, 'w') as file:
                file.write(make().strip() + '\n')
            os.replace(temporary, path)
        with open(path) as file:
            return file.read().strip()

    def close(self) -> None:
        """Lets another host use the folder."""
        self._lock.close()


class Host:
    """The agent: puts the parts together, and says what each word does. ``start``, ``run``, ``stop``.

    The heard_… methods run on the link's thread; ``tick`` on the main thread; all others may be
    called from any thread.
    """
    side = 'host'

    def __init__(self, settings: Any) -> None:
        """Raises VMHostError where state folder or journal can't be used."""
        self.settings = settings
        self.started = time.monotonic()
        self.session = secrets.token_hex(8)
        self.stopping = threading.Event()
        self.broker_address = '', 0            # as it is configured, or listens
        self.aint = 0                          # words that weren't any
        self.folder = StateFolder(settings.Host.state_dir)
        self.token = self.folder.secret('xmlrpc.token')
        self.journal = Journal(self.folder.file('journal.sqlite'))
        self.commands = Commands(self.journal)
        self.transfers = Transfers(self, settings.Host.max_transfers)
        self.fetcher = Fetcher(self)
        self.acknowledger = Acknowledger(self)
        self.name_lookup = NameLookup(self._rename, self.stopping)
        self.guests = Guests(settings.Host.vm_gc_grace)
        for known in self.journal.guests():
            self.guests.remember(*known)
        self.ticket = None                     # type: Optional[chirp.Ticket]
        self.hypervisor = None                 # type: Any
        self.broker = None                     # type: Optional[stompbroker.Broker]
        self.policy = None                     # type: Optional[HostPolicy]
        self.link = None                       # type: Optional[protocol.Link]
        self.server = None                     # type: Optional[XMLRPCServer]
        # Guards the two tables of who waits for an answer; nothing is called while it is held.
        self._lock = threading.Lock()
        self._pings = {}                       # type: Dict[str, threading.Event]
        self._missing = {}                     # type: Dict[Tuple[str, str], float]
        self._last_tick = time.monotonic()
        self._last_clock = time.time()
        self._next_retention = self._last_tick + self._first_retention()
        self._next_trouble = 0.0
        self._last_roll_call = 0.0

    def _first_retention(self) -> float:
        """Seconds until something may be let go: more where the clock may be wrong since the last run."""
        away = time.time() - self.journal.last_time()
        if away < DOUBT:
            return RETENTION_EVERY
        log.info('the journal ended %.0f s ago, or the clock is wrong: nothing is let go for %.0f s',
                 away, DOUBT)
        return DOUBT

    # Start and stop.

    def start(self) -> None:
        """Starts everything. Raises VMHostError, BrokerError or ProtocolError with a sentence."""
        self._start_hypervisor()
        address = self._start_broker()
        self._start_link(address)
        self.server = XMLRPCServer(self)
        self.server.start()
        threading.Thread(target=self._find_ticket, name='ticket', daemon=True).start()
        self.journal.event('host-start', text='vmhost %s, pid %d' % (agent.VERSION, os.getpid()))
        log.info('vmhost %s runs as pid %d: XML-RPC on %s:%s, broker on %s:%s, hypervisor %s, '
                 'state in %s', agent.VERSION, os.getpid(), *(self.server.address + address + (
                     self.hypervisor_name, os.path.abspath(self.folder.path))))

    def _find_ticket(self) -> None:
        """The key by which guests with auth=ticket know this host; it takes a second to make the first."""
        try:
            self.ticket = chirp.Ticket.from_pem(self.folder.secret(
                'chirp.key', lambda: chirp.Ticket.generate().pem()))
        except (OSError, chirp.ChirpError) as error:
            log.error('guests with auth=ticket serve no files: %s: %s', self.folder.file('chirp.key'), error)
            return
        for guest in self.guests.on_list():
            self._greet(guest)

    @property
    def hypervisor_name(self) -> str:
        return 'VirtualBox' if self.hypervisor is not None else 'none'

    def _start_hypervisor(self) -> None:
        """VirtualBox, where it answers; else the machines are those whose agents say HELLO."""
        wanted = self.settings.Hypervisor.hypervisor
        if wanted == 'none':
            return
        driver = VirtualBox(self.settings.Network, self.settings.RemoteDesktop, CHIRP_PORT,
                            os.path.abspath(self.folder.path),
                            self.settings.Hypervisor.command_timeout, self._vm_event)
        driver.start_thread()
        try:
            version = driver.version()
        except VMHostError as error:
            log.log(logging.ERROR if wanted == 'VirtualBox' else logging.INFO,
                    'VMs can\'t be controlled, all the rest works: %s', error)
            driver.close()
            return
        log.info('VirtualBox %s', version)
        loaded, _, mend = module_line()
        if not loaded:
            log.warning('VMs can\'t be started, all the rest works: %s', mend)
        if self.settings.Network.manage:
            self._set_up_network(driver)
        self.hypervisor = driver

    def _set_up_network(self, driver: VirtualBox) -> None:
        try:
            driver.setup_network()
        except VMHostError as error:
            log.error('the host-only network can\'t be set up ([Network] manage): %s', error)

    def _vm_event(self, type: str, vm: str, text: str) -> None:
        """What VirtualBox shows of a VM changed. On the driver's thread ``vbox-events``."""
        self.journal.event(type, vm, '', text)
        log.info('%s: %s %s', vm, type, text)
        guest = self.guests.find(vm)
        if self.hypervisor.known_state(vm) == 'AbortedSaved':
            log.info('%s: its saved state is still there, and so are its commands', vm)
        elif type in ('vm-aborted', 'vm-stuck') and guest is not None:
            for execution in self.commands.open_of(guest.id):
                if execution.state == 'running':
                    self.commands.lose(execution, 'the VM ended: %s' % text)
        elif type in ('vm-added', 'vm-renamed', 'vm-card'):
            for guest in self.guests.all():
                if self.hypervisor.known_name(guest.id) not in ('', guest.name):
                    self._rename(guest)

    def _rename(self, guest: Guest) -> None:
        """Gives a guest the name that the hypervisor has for it, where it has one."""
        try:
            name = self.hypervisor.name_of(guest.id)
        except VMHostError as error:
            log.warning('no name for %s: %s', guest.id, error)
            return
        if name and name != guest.name:
            log.info('%s is %s', guest.name, name)
            self.guests.rename(guest, name)
            if self.policy is not None:
                self.policy.named(guest.id, guest.name)
            self._note_guest(guest)
            self.take_over(guest)
            self._greet(guest)

    def _broker_host(self) -> str:
        """Broker.host=auto: the host-only interface's address, or loopback without one."""
        configured = self.settings.Broker.host
        if configured != 'auto':
            return configured
        if self.hypervisor is not None and self.settings.Network.mode == 'hostonly':
            return self.hypervisor.broker_address() or '127.0.0.1'
        return '127.0.0.1'

    def _start_broker(self) -> Tuple[str, int]:
        """The broker's address: of the embedded one, started here, or of another."""
        broker = self.settings.Broker
        host = self._broker_host()
        if not broker.embedded:
            return host, broker.port
        self._secret = secrets.token_urlsafe(24)
        self.policy = HostPolicy(self._secret, neighbour_mac)
        self.broker = stompbroker.Broker(
            host, broker.port, login=broker.username, passcode=broker.password, tls=server_tls(broker),
            policy=self.policy, heartbeat=broker.heartbeat, max_frame=broker.max_frame)
        try:
            self.broker.start()
        except stompbroker.BrokerError as error:
            cause = error.__context__
            why = agent.why_not_listening(cause) if isinstance(cause, OSError) else error
            raise VMHostError('the broker can\'t listen on %s:%s ([Broker] host, port): %s'
                              % (host, broker.port, why))
        return self.broker.address

    def _start_link(self, address: Tuple[str, int]) -> None:
        broker = self.settings.Broker
        embedded = self.broker is not None
        self.broker_address = address
        tls = agent.client_tls(broker.ca_file or (broker.cert_file if embedded else '')) \
            if broker.tls else None
        if tls is not None and embedded:
            tls.check_hostname = False      # our own certificate, on our own machine
        self.link = protocol.Link(
            lambda: [address], [(protocol.CONNECTIONS, 'client-individual'),
                                (protocol.CMD_RESPONSES, 'client-individual')],
            self._link_up, self._hear, self._link_down, broker.username, broker.password,
            broker.heartbeat, tls, {'vmhost-secret': self._secret} if embedded else {},
            broker.max_frame, first_delay=0.05 if embedded else protocol.FIRST_DELAY)
        self._link_is_up = threading.Event()
        self.link.start()
        if embedded and not self._link_is_up.wait(10):
            raise VMHostError('the embedded broker doesn\'t answer: %s' % self.link.last_error)

    def run(self, ended: socket.socket) -> None:
        """Ticks until ``ended`` can be read. On the main thread."""
        while not select.select([ended], [], [], TICK)[0]:
            try:
                self.tick()
            except Exception:       # the agent lives on, whatever one tick met
                log.exception('in the tick')

    def stop(self) -> None:
        """Stops in the order XML-RPC, link, broker, VirtualBox; then nothing of it is left."""
        self.stopping.set()
        self.journal.stop_waits()
        if self.server is not None:
            self.server.stop()
        self.transfers.stop(time.monotonic() + 1.0)
        self.fetcher.stop(time.monotonic() + 1.0)
        self.acknowledger.stop(time.monotonic() + 0.5)
        self.name_lookup.stop(time.monotonic() + 0.5)
        if self.link is not None:
            self.say(protocol.BYE.howToLeave('the host stops'))
            self.link.close()
        if self.broker is not None:
            self.broker.stop()
        if self.hypervisor is not None:
            self.hypervisor.close()
        with contextlib.suppress(JournalError):
            self.commands.write_states()
            self.journal.event('host-stop')
        self.journal.close()
        self.folder.close()

    # The link.

    def say(self, message: Message) -> bool:
        """Publishes a word. False where there is no connection to the broker."""
        if self.link is None:
            return False
        headers = dict(message.headers, timestamp=protocol.timestamp())
        headers['from'] = 'host'
        return self.link.send(message.topic, headers, message.body())

    def _link_up(self, link: protocol.Link) -> None:
        self.guests.forgive()
        self._link_is_up.set()
        self.call_the_roll()

    def _link_down(self, reason: str) -> None:
        if not self.stopping.is_set():
            log.warning('no connection to the broker: %s', reason)

    def call_the_roll(self) -> None:
        """Asks all to announce themselves, once in a while at most."""
        now = time.monotonic()
        if now - self._last_roll_call > 2 or not self._last_roll_call:
            self._last_roll_call = now
            self.say(protocol.HELLO.howToGreet('*', session=self.session))

    def _hear(self, frame: Any) -> None:
        """One MESSAGE. What isn't a word is counted and dropped; ACKed all the same."""
        try:
            message = protocol.interpret(frame.headers, frame.body,
                                         frame.headers.get('destination', ''))
            protocol.hear(self, message)
        except protocol.BadWord as error:
            self._drop('%s' % error, frame.headers.get('from', ''))

    def _drop(self, what: str, sender: str) -> None:
        self.aint += 1
        # A guest may send thousands: the first are enough to find it.
        log.log(logging.INFO if self.aint <= 100 else logging.DEBUG,
                'AINT from %.80r: %s', sender, what)

    def _sender(self, message: Message) -> str:
        """The id of who said it. With the embedded broker, the policy has written it."""
        sender = message.headers.get('from') or (
            '' if self.policy is not None else message.text('id'))
        return read_id(sender)

    # Words.

    def heard_aint(self, message: Message) -> None:
        """An unknown word, or one that isn't for a host."""
        self._drop('%.40r' % message.word, message.headers.get('from', ''))

    def heard_hello(self, message: Message) -> None:
        """A guest is there: into the list, greeted, and its commands compared with ours."""
        machine_id = read_id(message.text('id'))
        if self.policy is not None:
            machine_id = self._sender(message)
            ip = self.policy.address_of(machine_id)
        else:
            ip = message.text('ip')[:64]
        known = self.hypervisor.known_name(machine_id) if self.hypervisor is not None else ''
        guest, news = self.guests.add(
            machine_id, known or self._own_name(machine_id, message), ip, message.text('boot')[:64],
            message.text('session')[:64], self._facts(message), self._clock_offset(message))
        if known:
            self.guests.rename(guest, known)
        if self.policy is not None:
            self.policy.named(machine_id, guest.name)
        if news:
            self._note_guest(guest)
        if known:
            self.take_over(guest)
        self._greet(guest)
        if self.hypervisor is not None and is_mac(guest.id) and not known:
            self.name_lookup.look_up(guest)
        if isinstance(message.get('cmds'), dict):
            self._reconcile(guest, message.mapping('cmds'))
        else:
            for execution in self.commands.open_of(guest.id):
                self._query(execution)      # too many for a HELLO; each answer says what it would have

    def take_over(self, guest: Guest) -> None:
        """What waits for a VM under the id of a card that it no longer has is for its present agent. What
        was sent stays under the old one, as the guest has it in that agent's spool. From any thread."""
        with self.journal_permitting():
            for execution in self.commands.waiting_for(guest.name):
                if execution.vm_id != guest.id and not self.hypervisor.known_name(execution.vm_id):
                    self.commands.move(execution, guest.id)

    def _own_name(self, machine_id: str, message: Message) -> str:
        """What a machine calls itself, else its host name, else its id; none may be called like a VM."""
        name = read_name(message.text('name')) or read_name(message.text('host')) or machine_id
        if self.hypervisor is not None and self.hypervisor.known_state(name) and name != machine_id:
            return '%s-%s' % (name, machine_id)
        return name

    def _facts(self, message: Message) -> Dict[str, Any]:
        """What the guest says about itself, bounded."""
        facts = {}  # type: Dict[str, Any]
        for name in ('proto', 'host', 'os', 'python', 'version', 'cpus', 'mem', 'chirp'):
            value = message.get(name)
            if isinstance(value, (str, int, float)):
                facts[name] = value[:200] if isinstance(value, str) else value
            elif name == 'chirp' and isinstance(value, dict):
                facts[name] = {'port': value.get('port', 0)}
        return facts

    def _clock_offset(self, message: Message) -> float:
        """Guest's clock less ours, in seconds, as far as a message on its way can tell."""
        try:
            return round(message.number('timestamp', time.time()) - time.time(), 3)
        except protocol.BadWord:
            return 0.0

    def _note_guest(self, guest: Guest) -> None:
        now = time.monotonic()
        if now - guest.noted < NOTE_EVERY:
            return              # a guest that comes and goes all the time doesn't fill the journal
        guest.noted = now
        log.info('%s joined: %s at %s', guest.name, guest.id, guest.ip)
        with self.journal_permitting(), self.journal.writing() as journal:
            journal.execute('INSERT OR REPLACE INTO guests VALUES (?, ?, ?, ?, ?, ?, ?)',
                            guest.id, guest.name, guest.ip, guest.boot, guest.session,
                            json.dumps(guest.facts), guest.last_seen)
            journal.event('guest-hello', guest.name, '', '%s at %s' % (guest.id, guest.ip))

    @contextlib.contextmanager
    def journal_permitting(self) -> Iterator[None]:
        """For what is worth a note in the journal, but must not fail with it: a full disk, say."""
        try:
            yield
        except JournalError as error:
            now = time.monotonic()
            if now >= self._next_trouble:
                self._next_trouble = now + TROUBLE_EVERY
                log.error('%s; results stay in the guests until it can be written', error)

    def _greet(self, guest: Guest) -> None:
        keys = {'name': guest.name, 'session': self.session,
                'max_frame': self.settings.Broker.max_frame}  # type: Dict[str, Any]
        if self.settings.Host.vm_gc_grace < 30:
            keys['beacon_interval'] = max(1, self.settings.Host.vm_gc_grace / 3)
        if self.broker is None:
            keys['addresses'] = own_addresses(self.link)
        if self.ticket is not None:
            keys['chirp-ticket'] = self.ticket.public.pem
        self.say(protocol.HELLO.howToGreet(guest.id, **keys))

    def _reconcile(self, guest: Guest, listed: Dict[str, Any]) -> None:
        """What its HELLO doesn't list and was running is lost; what was only sent is sent again."""
        for execution in self.commands.open_of(guest.id):
            if execution.cmd_id in listed:
                with self._lock:
                    self._missing.pop(execution.index, None)
            elif execution.state in ('queued', 'sent'):
                self.publish(execution)
            else:
                # Asked once more, since another broker may have turned the order of words round.
                with self._lock:
                    self._missing[execution.index] = time.monotonic() + MISSING_GRACE
                self.say(protocol.CMD_QUERY.howToSay(guest.id, execution.cmd_id))

    def heard_bye(self, message: Message) -> None:
        """A guest goes; its commands stay as they are."""
        guest = self.guests.gone(self._sender(message))
        if guest is not None:
            reason = read_name(message.text('reason'))
            log.info('%s left: %s', guest.name, reason)
            with self.journal_permitting():
                self.journal.event('guest-bye', guest.name, '', reason)

    def heard_still_alive(self, message: Message) -> None:
        """A beacon, with the load."""
        load = {name: message.number(name) for name in
                ('load1', 'mem_free', 'disk_free', 'running', 'uptime') if message.get(name) is not None}
        self._heard_from(self._sender(message), load)

    def _heard_from(self, machine_id: str, load: Optional[Dict[str, float]] = None) -> None:
        if not self.guests.heard(machine_id, load):
            self.call_the_roll()

    def heard_pong(self, message: Message) -> None:
        """An answer to PING, from whom it was sent to."""
        sender = self._sender(message)
        self._heard_from(sender)
        with self._lock:
            waiting = self._pings.get(message.text('ping-id') + '@' + sender)
        if waiting is not None:
            waiting.set()

    def heard_cmd_status(self, message: Message) -> None:
        """How far a command is; ``unknown`` where the guest never heard of it, or no longer knows."""
        sender = self._sender(message)
        self._heard_from(sender)
        execution = self.commands.find_open(message.text('cmd-id'), sender)
        state = message.text('state')
        if execution is None:
            execution = self.commands.finished(message.text('cmd-id'), sender)
            if execution is not None:
                self.commands.heard_status(execution, state, message)
            return
        with self._lock:
            self._missing.pop(execution.index, None)
        was = execution.state
        self.commands.heard_status(execution, state, message)
        if state == 'unknown' and was in ('running', 'suspended'):
            self.commands.lose(execution, 'the guest no longer knows this command: '
                               'its disk was lost, or restored from an earlier state')
        elif state == 'unknown':
            self.publish(execution)

    def heard_cmd_results(self, message: Message) -> None:
        """The end of a command: journalled, then acknowledged; once more where it came before."""
        sender = self._sender(message)
        self._heard_from(sender)
        results = read_results(message)
        cmd_id = results['cmd-id']
        execution = self.commands.find_open(cmd_id, sender)
        if execution is not None:
            with self._lock:
                self._missing.pop(execution.index, None)
            self.commands.finish(execution, results, fetched=not has_more_output(results))
        else:
            execution = self.commands.finished(cmd_id, sender)
            if execution is None:
                self.commands.keep_orphan(cmd_id, sender, self.name_of(sender), results)
        if execution is None or execution.fetched:
            self.acknowledger.acknowledge(sender, cmd_id)
        else:
            self.fetcher.begin(execution)

    # The clock.

    def tick(self) -> None:
        """What time brings: liveness, publishing again, what is missing, what may be forgotten."""
        now = time.monotonic()
        if self._has_slept(now) or (self.link is not None and not self.link.up):
            self.guests.forgive()
        with self.journal_permitting():
            self.commands.write_states()
        for execution in self.commands.due():
            guest = self.guests.by_id(execution.vm_id)
            if guest is not None and guest.agent != 'lost':
                self.publish(execution)
        self._judge_liveness()
        with self.journal_permitting():
            self._give_up_missing(now)
            if now >= self._next_retention:
                self._next_retention = now + RETENTION_EVERY
                self._forget_old(now)

    def _has_slept(self, now: float) -> bool:
        """Whether this process, or its machine, was stopped since the last call."""
        clock, passed = time.time(), now - self._last_tick
        jump = clock - self._last_clock - passed
        self._last_tick, self._last_clock = now, clock
        if jump > RETENTION_EVERY:
            log.warning('the clock jumped ahead by %.0f s: nothing is let go for %.0f s', jump, DOUBT)
            self._next_retention = max(self._next_retention, now + DOUBT)
        return max(passed, jump) > min(SLEPT, self.settings.Host.vm_gc_grace / 2)

    def _judge_liveness(self) -> None:
        for guest, liveness in self.guests.tick(self.is_suspended):
            log.info('%s is %s', guest.name, liveness)
            with self.journal_permitting():
                self.journal.event('guest-' + liveness, guest.name, '',
                                   'nothing heard for %.0f s' % (time.time() - guest.last_seen))

    def _give_up_missing(self, now: float) -> None:
        with self._lock:
            late = [index for index, deadline in self._missing.items() if deadline < now]
        for index in late:
            execution = self.commands.find_open(*index)
            if execution is not None:
                self.commands.lose(execution, 'the guest came back without this command: it was '
                                   'rebooted, or its disk lost or restored from an earlier state')
            with self._lock:
                self._missing.pop(index, None)

    def _forget_old(self, now: float) -> None:
        count, all_gone = self.commands.forget_before(time.time() - self.settings.Host.keep_results)
        if count:
            log.info('%d results older than keep_results were let go', count)
            self.fetcher.sweep()
        if not all_gone:
            self._next_retention = now + RETENTION_PAUSE

    def is_suspended(self, vm: str) -> bool:
        """Whether the VM is paused or saved, so that nothing can be heard of it."""
        return self.hypervisor is not None and self.hypervisor.known_state(vm) in SUSPENDED

    # What the API asks for.

    def name_of(self, machine_id: str) -> str:
        """The name of a guest, or its id."""
        guest = self.guests.by_id(machine_id)
        return guest.name if guest is not None else machine_id

    def lose_all(self, guest: Guest, why: str) -> None:
        """Ends all commands of a VM that is no more."""
        for execution in self.commands.open_of(guest.id):
            self.commands.lose(execution, why)

    def machine(self, vm: str) -> Guest:
        """A known VM, by name or id. Raises NoSuchVM."""
        guest = self.guests.find(vm)
        if guest is None or guest.agent == 'lost':      # by now the VM may have another card
            guest = self.described(vm)[0] or guest
        if guest is None:
            raise NoSuchVM('no VM %.100r' % vm)
        return guest

    def described(self, vm: str) -> Tuple[Optional[Guest], Dict[str, Any]]:
        """A VM as its agent and as the hypervisor know it; (None, {}) where the hypervisor doesn't."""
        if self.hypervisor is None:
            return None, {}
        try:
            found = self.hypervisor.describe(vm)
        except NoSuchVM:
            return None, {}
        return self.guests.by_id(found['id']) or Guest(found['id'], found['name']), found

    def connected(self, vm: str) -> Guest:
        """A VM whose agent is there. Raises NoSuchVM, AgentNotConnected."""
        guest = self.machine(vm)
        if guest.agent == 'lost':
            raise AgentNotConnected('the agent of %s is not connected' % guest.name)
        return guest

    def chirp_client(self, guest: Guest) -> Any:
        """A client of a guest's Chirp server, for a ``with`` block. Raises TransferError."""
        endpoint = self.hypervisor.chirp_endpoint(guest.name) if self.hypervisor is not None else None
        address, port = endpoint or (guest.ip, guest.chirp_port)
        if not port:
            raise NoFiles('%s offers no files (it has no Chirp server)' % guest.name)
        return chirp.ChirpClient(address, port, CHIRP_TIMEOUT, self.ticket)

    def list_dir(self, vm: str, path: str) -> List[Dict[str, Any]]:
        """What is in a folder of a VM. Raises TransferError, NoSuchVM, AgentNotConnected."""
        try:
            with self.chirp_client(self.connected(vm)) as client:
                return [shown_entry(entry) for entry in client.ls(path)]
        except (chirp.ChirpError, OSError) as error:
            raise TransferError('%s on %s: %s' % (path, vm, error))

    def ping(self, vm: str, timeout: float) -> str:
        """'PONG from NAME'. Raises NoSuchVM, AgentNotConnected, DeadlineExceeded."""
        guest = self.connected(vm)
        ping_id = secrets.token_hex(8)
        answered = threading.Event()
        with self._lock:
            self._pings[ping_id + '@' + guest.id] = answered
        try:
            self.say(protocol.PING.howToSay(guest.id, ping_id))
            if not answered.wait(timeout):
                raise DeadlineExceeded('%s gave no PONG within %g s' % (guest.name, timeout))
        finally:
            with self._lock:
                del self._pings[ping_id + '@' + guest.id]
        return 'PONG from %s' % guest.name

    def run_cmd(self, vm: str, request: Dict[str, Any], queue: bool, client: str) -> str:
        """Journals a command, then sends it. Its cmd-id. Raises NoSuchVM, AgentNotConnected."""
        guest = self.machine(vm)
        if not guest.id:
            raise BadState('%s has no network card, by which its agent would be known' % guest.name)
        if guest.agent == 'lost' and not queue:
            raise AgentNotConnected('the agent of %s is not connected (queue lets the command wait '
                                    'for it)' % guest.name)
        self._check_size(request)
        cmd_id, executions = self.commands.new(request, guest.name, False, [guest],
                                               guest.agent == 'lost', client)
        if guest.agent != 'lost':
            self.publish(executions[0], request)
        log_submitted(cmd_id, guest.name, client)
        return cmd_id

    def run_cmd_on_all(self, pattern: str, request: Dict[str, Any], client: str) -> str:
        """The same on every connected VM whose name or id matches the glob. Raises NoSuchVM."""
        guests = [guest for guest in self.guests.on_list()
                  if protocol.is_addressed(pattern, guest.id, guest.name)]
        if not guests:
            raise NoSuchVM('no connected VM matches %.100r' % pattern)
        self._check_size(request)
        cmd_id, executions = self.commands.new(request, pattern, True, guests, False, client)
        self.say(self._cmd_run(pattern, cmd_id, request))
        for execution in executions:
            self.commands.published(execution)
        log_submitted(cmd_id, pattern, client)
        return cmd_id

    def _check_size(self, request: Dict[str, Any]) -> None:
        size = len(self._cmd_run('', '', request).body())
        size += sum(map(len, (request['cmd'], request['path'])))
        if size > self.settings.Broker.max_frame - FRAME_RESERVE:
            raise InvalidParams('%d bytes of command, arguments, environment and stdin; at most %d '
                                'fit. Send the input as a file (put), and name it (fileForStdin, run -I)'
                                % (size, self.settings.Broker.max_frame - FRAME_RESERVE))

    def _cmd_run(self, to: str, cmd_id: str, request: Dict[str, Any]) -> Message:
        return protocol.CMD_RUN.howToSay(to, cmd_id, request['cmd'], request['args'],
                                         request['env'], request['path'], **request['options'])

    def publish(self, execution: Execution, request: Optional[Dict[str, Any]] = None) -> None:
        """Sends a command to its VM, for the first time or again: the guest runs it once."""
        if request is None:
            request = self.commands.request(execution.cmd_id)['request']
        if self.say(self._cmd_run(execution.vm_id, execution.cmd_id, request)):
            log.log(logging.INFO if execution.attempts else logging.DEBUG, '%s: sent to %s%s', execution.key,
                    execution.vm, ' again' if execution.attempts else '')
        for name in execution.signals:
            self.say(protocol.CMD_SIGNAL.howToSay(execution.vm_id, execution.cmd_id, name))
        self.commands.published(execution)

    def refresh(self, executions: List[Execution]) -> None:
        """Asks the guests how far running commands are, and waits 2 s at most for their answers."""
        self.commands.ask_all(self._askable(executions), self._query, 2.0)

    def shown_state(self, execution: Execution) -> str:
        """The state as a user sees it."""
        if execution.state != 'running':
            return execution.state
        if self.is_suspended(execution.vm):
            return 'suspended'
        # In the guest, behind max_commands others.
        return 'queued' if execution.status.get('state') == 'queued' else 'running'

    def status(self, execution: Execution) -> Dict[str, Any]:
        """How far it is, as the guest told last."""
        if execution.ended:
            return self._final_status(execution)
        status = execution.status
        return {'state': self.shown_state(execution), 'pid': status.get('pid', 0),
                'wall': status.get('wall', 0), 'resources': status.get('resources', {}),
                'processes': status.get('processes', 0),
                'outSize': status.get('out-size', 0), 'errSize': status.get('err-size', 0),
                'progress': status.get('progress', ''), 'error': status.get('error', ''),
                'age': time.monotonic() - execution.status_time if execution.status_time else -1}

    def ask_for_news(self, executions: List[Execution]) -> None:
        """Asks the guests how far running commands are; what they answer is in the next status."""
        for execution in self._askable(executions):
            self._query(execution)

    def _askable(self, executions: List[Execution]) -> List[Execution]:
        return [execution for execution in executions
                if execution.state == 'running' and self._is_connected(execution)]

    def _final_status(self, execution: Execution) -> Dict[str, Any]:
        results = execution.answer()
        return {'state': execution.state, 'pid': 0, 'wall': results['wall'],
                'resources': results['resources'], 'processes': 0, 'outSize': results['out-size'],
                'errSize': results['err-size'], 'progress': execution.status.get('progress', ''),
                'error': results['error'], 'age': max(0, time.time() - execution.ended)}

    def _is_connected(self, execution: Execution) -> bool:
        guest = self.guests.by_id(execution.vm_id)
        return guest is not None and guest.agent != 'lost' and not self.is_suspended(guest.name)

    def _query(self, execution: Execution, **keys: Any) -> None:
        self.say(protocol.CMD_QUERY.howToSay(execution.vm_id, execution.cmd_id, **keys))

    def output(self, execution: Execution, stream: str, offset: int, length: int) -> Dict[str, Any]:
        """{data: bytes, offset, next, size, eof} of one stream; while it runs, too.

        From what came with the results, or is here as a file; else asked of the guest.
        Raises AgentNotConnected, DeadlineExceeded.
        """
        if execution.ended:
            results = execution.answer()
            size, begin = results[stream + '-size'], results[stream + '-offset']
            if offset >= size:
                return self._slice(b'', offset, size, True)
            if offset >= begin:
                data = inline_output(results, stream)[offset - begin:offset - begin + length]
                return self._slice(data, offset, size, True)
            data = self.fetcher.read(execution, stream, offset, length)
            if data:
                return self._slice(data, offset, size, True)
        elif execution.state in ('queued', 'sent'):
            return self._slice(b'', offset, 0, False)
        return self._ask_output(execution, stream, offset, length)

    def _slice(self, data: bytes, offset: int, size: int, ended: bool) -> Dict[str, Any]:
        end = offset + len(data)
        return {'data': data, 'offset': offset, 'next': end, 'size': max(size, end) if data else size,
                'eof': ended and end >= size}

    def _ask_output(self, execution: Execution, stream: str, offset: int,
                    length: int) -> Dict[str, Any]:
        """A slice by CMD_QUERY and CMD_STATUS."""
        if not self._is_connected(execution):
            raise AgentNotConnected('the output of %s is in %s, whose agent is not connected'
                                    % (execution.key, execution.vm))
        key = stream + '-offset'
        message = self.commands.ask(
            execution, lambda message: message.number(key, -1) == offset
            or message.text('state') == 'unknown',
            lambda: self._query(execution, **{key: offset, 'max': min(length, OUTPUT_SLICE)}))
        if message is None:
            if execution.done.is_set() and not execution.answer()[key]:
                return self.output(execution, stream, offset, length)    # it ended meanwhile
            raise DeadlineExceeded('%s gave no output of %s within %g s'
                                   % (execution.vm, execution.key, QUERY_TIMEOUT))
        if message.text('state') == 'unknown':
            raise BadState('the output of %s is no longer in %s: its spool was let go, or lost'
                           % (execution.key, execution.vm))
        exact = message.text(stream + '64')
        data = base64.b64decode(exact) if exact else message.text(stream).encode('utf-8')
        ended = message.text('state') in FINISHED and execution.done.is_set()
        return self._slice(data, offset, int(message.number(stream + '-size')), ended)

    def signal(self, execution: Execution, name: str) -> bool:
        """Sends a signal to all processes of a command. Raises BadState, AgentNotConnected."""
        if execution.ended:
            return False
        if execution.state == 'queued':
            self.commands.finish(execution, dict(
                lost_results(execution.cmd_id, 'signalled before it was sent'), state='failed'), True)
            return True
        if not self._is_connected(execution):
            raise AgentNotConnected('the agent of %s is not connected' % execution.vm)
        log.info('%s: signal %s', execution.key, name)
        if execution.state == 'sent' and len(execution.signals) < SIGNALS_KEPT:
            execution.signals += (name,)        # the guest may never have got the command, nor get this
        return self.say(protocol.CMD_SIGNAL.howToSay(execution.vm_id, execution.cmd_id, name))


def own_addresses(link: Any) -> List[str]:
    """This machine's addresses, as guests may see them: towards the broker, and by its name."""
    found = {link.local_address[0]}
    try:
        found.update(info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None))
    except OSError as error:
        log.debug('own name: %s', error)
    return sorted(str(address) for address in found if address)


def server_tls(broker: Any) -> Any:
    """The embedded broker's ssl.SSLContext, or None. Raises VMHostError that names the key."""
    if not broker.tls:
        return None
    import ssl
    if not broker.cert_file:
        raise VMHostError('[Broker] tls=yes needs cert_file, and key_file where the key is apart')
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if hasattr(ssl, 'PROTOCOL_TLS_SERVER')
                             else ssl.PROTOCOL_TLS)
    try:
        context.load_cert_chain(broker.cert_file, broker.key_file or None)
    except (OSError, ssl.SSLError) as error:
        raise VMHostError('[Broker] cert_file %s, key_file %s: %s'
                          % (broker.cert_file, broker.key_file, error))
    return context


# --- command line: the running host, and what is shown ----------------------------------------

class NoHost(VMHostError):
    """No host agent answers."""


class Client:
    """The running host agent, found by its state folder. One per thread.

    What the host raised comes out as the same VMHostError; NoHost where nobody answers.
    """

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.address = ''
        self._folder = settings.Host.state_dir
        self._transport = xmlrpc.client.Transport()

    def _find(self) -> None:
        host, _, port = self._read('xmlrpc.address', 'no host agent runs here').rpartition(':')
        token = self._read('xmlrpc.token', 'no token')
        host = {'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host)
        self.address = '%s:%s' % ('[%s]' % host if ':' in host else host, port)
        self._authority = '%s:%s@%s' % (USER, urllib.parse.quote(token, ''), self.address)

    def _read(self, name: str, absent: str) -> str:
        path = os.path.join(self._folder, name)
        try:
            with open(path, encoding='utf-8') as file:
                return file.read().strip()
        except FileNotFoundError:
            raise NoHost('%s (%s is missing): start it with `vmhost.py host.ini`, or name the ini file '
                         'that it was started with' % (absent, path))
        except (OSError, ValueError) as error:
            raise AccessDenied('%s: %s; only the user who runs the host agent can talk to it'
                               % (path, getattr(error, 'strerror', '') or error))

    def call(self, method: str, *args: Any) -> Any:
        """What a method of the API answers. Raises VMHostError."""
        body = xmlrpc.client.dumps(args, method, allow_none=True).replace('\r', '&#13;')
        if body.translate(agent.XML_UNSAFE) != body:
            raise InvalidParams('XML-RPC can\'t carry control characters: send them as a file, or as '
                                'standard input')
        if not self.address:
            self._find()
        try:
            answer, = self._transport.request(self._authority, '/', body.encode('utf-8'))
            return answer
        except xmlrpc.client.Fault as fault:
            raise raised_by(fault)
        except xmlrpc.client.ProtocolError as error:
            if error.errcode == 401:
                raise AccessDenied('the host agent at %s does not take the token in %s: restart it, or put '
                                   'back the token that it was started with'
                                   % (self.address, os.path.join(self._folder, 'xmlrpc.token')))
            raise NoHost('the host agent at %s: %s %s' % (self.address, error.errcode, error.errmsg))
        except OSError as error:
            raise NoHost('no host agent answers at %s (%s): start it again with `vmhost.py host.ini`'
                         % (self.address, error.strerror or error))
        except (http.client.HTTPException, xml.parsers.expat.ExpatError, ValueError) as error:
            raise NoHost('what answers at %s is no vmhost (%s): restart the host agent'
                         % (self.address, type(error).__name__))

    def each(self, method: str, names: Iterable[str]) -> List[Tuple[str, Any]]:
        """(name, answer) of a method for each name, without those for which it raised."""
        names = list(names)
        calls = [{'methodName': method, 'params': [name]} for name in names]
        answers = self.call('system.multicall', calls)
        return [(name, answer[0]) for name, answer in zip(names, answers) if isinstance(answer, list)]

    def vm_names(self) -> List[str]:
        """All VMs, and all machines whose agents are connected."""
        return sorted(set(self.call('listVMs')) | set(self.call('listRegisteredVMs')))

    def is_pattern(self, vm: str) -> bool:
        """Whether it is a glob, and not just the name of a VM that has such characters.

        A guest may call itself what it likes, ``*`` too: where a glob means others, it is one.
        """
        if not any(sign in vm for sign in '*?['):
            return False
        names = self.call('getNamesToIdsMapping')
        return vm not in names or any(fnmatch.fnmatchcase(name, vm) for name in names if name != vm)

    def matching(self, vm: str) -> List[str]:
        """The VMs that a glob means; what is no glob, unchanged. Raises NoSuchVM."""
        if not self.is_pattern(vm):
            return [vm]
        found = [name for name in self.vm_names() if fnmatch.fnmatchcase(name, vm)]
        if not found:
            raise NoSuchVM('no VM matches %s' % vm)
        return found


def raised_by(fault: xmlrpc.client.Fault) -> VMHostError:
    """A fault as the error that the host raised."""
    kinds = {kind.fault: kind for kind in VMHostError.__subclasses__() if 'fault' in vars(kind)}
    hint = ' (`ls` lists them)' if fault.faultCode == NoSuchVM.fault else ''
    return kinds.get(fault.faultCode, VMHostError)(fault.faultString + hint)


COLOURS = {'alive': 32, 'Running': 32, 'running': 32, 'late': 33, 'Paused': 33, 'Saved': 33, 'suspended': 33,
           'queued': 33, 'sent': 33, 'lost': 31, 'failed': 31, 'timeout': 31, 'signaled': 31, 'Aborted': 31,
           'Stuck': 31, 'ok': 32, '--': 33, 'NO': 31}  # type: Dict[str, int]
PROGRESS_EVERY = 0.2           # seconds between two looks at a progress


class Screen:
    """Standard output and standard error: for a person, where they are a terminal."""

    def __init__(self) -> None:
        self.out = lenient(sys.stdout)
        self.err = lenient(sys.stderr)
        plain = 'NO_COLOR' in os.environ or os.environ.get('TERM') == 'dumb'
        self._colours = self.out.isatty() and not plain
        self.width = shutil.get_terminal_size().columns if self.out.isatty() else 0    # 0: any
        self.shows_progress = self.err.isatty()
        self._progress = 0             # columns of the progress line that stands on the terminal

    def say(self, text: str) -> None:
        """A line on standard output, at once."""
        self.out.write(text + '\n')
        self.out.flush()

    def complain(self, text: str) -> None:
        """A line on standard error."""
        self.progress('')
        self.err.write('vmhost: %s\n' % agent.printable(text))
        self.err.flush()

    def json(self, value: Any, indent: Optional[int] = 2) -> None:
        """The value as JSON."""
        ascii_only = (self.out.encoding or '').lower().replace('-', '') != 'utf8'
        self.say(json.dumps(value, indent=indent, ensure_ascii=ascii_only, default=as_text))

    def table(self, headings: List[str], rows: Iterable[List[Any]]) -> None:
        """Columns as wide as they need to be, and cut to the terminal, but for the first one."""
        lines = [[agent.printable(str(cell)) for cell in row] for row in [headings] + list(rows)]
        widths = [max(map(cells, column)) for column in zip(*lines)]
        while self.width and sum(widths) + 2 * len(widths) - 2 > self.width:
            widest = max(range(len(widths)), key=lambda n: (n > 0, widths[n]))
            if widths[widest] <= 8:
                break
            widths[widest] -= 1
        for line in lines:
            padded = [self._cell(text, width) for text, width in zip(line, widths)]
            self.say('  '.join(padded[:-1] + [padded[-1].rstrip()]))

    def _cell(self, text: str, width: int) -> str:
        shown = text
        if cells(shown) > width:
            while cells(shown) > width - 1:
                shown = shown[:-1]
            shown += '…' if (self.out.encoding or '').lower().startswith('utf') else '~'
        padding = ' ' * (width - cells(shown))
        return self.coloured(shown, COLOURS.get(text, 0)) + padding

    def coloured(self, text: str, colour: int) -> str:
        """The text in one of the terminal's colours; 0: as it is."""
        return '\033[%dm%s\033[0m' % (colour, text) if self._colours and colour else text

    def progress(self, text: str) -> None:
        """Replaces the one line that tells how far it is; '' takes it away."""
        if self.shows_progress and (text or self._progress):
            text = text[:max(0, shutil.get_terminal_size().columns - 1)]
            self.err.write('\r' + text + ' ' * (self._progress - len(text)) + ('' if text else '\r'))
            self.err.flush()
            self._progress = len(text)


@functools.lru_cache(maxsize=None)      # a wrapper that is let go closes what it wraps
def lenient(stream: Any) -> Any:
    """The stream, so that no character is an error, whatever the locale."""
    if hasattr(stream, 'reconfigure'):
        stream.reconfigure(errors='backslashreplace')
    elif hasattr(stream, 'buffer'):         # Python 3.6
        return io.TextIOWrapper(stream.buffer, stream.encoding, 'backslashreplace', line_buffering=True)
    return stream


def as_text(value: Any) -> str:
    """What JSON doesn't know: XML-RPC's base64."""
    return base64.b64encode(value.data).decode('ascii')


def cells(text: str) -> int:
    """How many columns of a terminal it takes."""
    return sum(0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in 'WF' else 1
               for char in text)


def shown_size(size: float) -> str:
    """Bytes for a person."""
    for unit in ('B', 'KiB', 'MiB'):
        if size < 1024:
            return '%.*f %s' % (0 if unit == 'B' or size >= 100 else 1, size, unit)
        size /= 1024.0
    return '%.1f GiB' % size


def shown_span(seconds: float) -> str:
    """A duration for a person."""
    if seconds < 100:
        return '%.0f s' % seconds
    minutes = seconds / 60
    return '%.0f min' % minutes if minutes < 100 else '%.0f h' % (minutes / 60) if minutes < 6000 \
        else '%.0f d' % (minutes / 1440)


def shown_time(moment: float) -> str:
    """A time since 1970 for a person, in the local zone; '-' for 0."""
    return time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(moment)) if moment else '-'


# --- command line: the verbs -------------------------------------------------------------------

OURS = 255                     # exit code of `run` for an error that isn't the command's
TIMED_OUT = 124                # … of a command that ran into its timeout, and ended with 0: timeout(1)'s
INTERRUPTED = 130              # exit code after Ctrl-C
SHORTEST_LOOK = 0.01           # seconds between looks at a command's output …
LONGEST_LOOK = 0.25            # … which grow while nothing comes
PATIENCE = 10.0                # seconds in which the output of an ended command should be had
FINISHED_SHOWN = 20            # finished commands that `ps` lists
EVENTS_SHOWN = 100


def do_ls(host: Client, screen: Screen, args: Any) -> int:
    """VMs, and whether their agents are there."""
    found = [vm for _, vm in host.each('getVM', host.vm_names())]
    if args.json:
        screen.json(found)
        return 0
    headings = ['NAME', 'STATE', 'AGENT', 'ADDRESS', 'COMMANDS']
    if args.long:
        headings += ['ID', 'SEEN', 'CPUS', 'MEMORY', 'PYTHON', 'CLOCK', 'SYSTEM']
    screen.table(headings, [vm_row(vm, args.long) for vm in found])
    for job in host.call('agentInfo')['jobs']:
        screen.say(agent.printable('%s: %s, %d %%' % (job['vm'], job['text'], job['percent'])))
    return 0


def vm_row(vm: Dict[str, Any], long: bool) -> List[str]:
    """A line of `ls`."""
    row = [vm['name'], vm['state'], vm['agent'], vm['ip'] or '-', len(vm['commands'])]
    facts = vm['facts']
    if long:
        seen = shown_span(max(0, time.time() - vm['lastSeen'])) + ' ago' if vm['lastSeen'] else 'never'
        row += [vm['id'], seen, facts.get('cpus', '-'), shown_size(facts['mem']) if facts.get('mem') else '-',
                facts.get('python', '-'), '%+.1f s' % vm['clockOffset'], facts.get('os', '-')]
    return row


def do_info(host: Client, screen: Screen, args: Any) -> int:
    """All that is known of a VM, or of a command."""
    try:
        found = host.call('getVM', args.vm)
    except NoSuchVM:
        try:
            found = dict(host.call('getCmdDetails', args.vm), status=host.call('getCmdStatus', args.vm),
                         results=host.call('getCmdResults', args.vm))
        except NoSuchCommand:
            raise NoSuchVM('%s is neither a VM (`ls` lists them) nor a command (`ps`)' % args.vm)
    show_pairs(screen, found, args.json)
    return 0


def show_pairs(screen: Screen, found: Dict[str, Any], as_json: bool) -> None:
    """What the API told of one thing: for a person, or as JSON."""
    if as_json:
        screen.json(found)
    else:
        screen_pairs(screen, found)


def screen_pairs(screen: Screen, found: Dict[str, Any], indent: str = '') -> None:
    """Names and values, one in a line; what is in a mapping stands indented below its name."""
    width = max([len(str(name)) for name in found] + [0])
    for name, value in found.items():
        if isinstance(value, dict) and value:
            screen.say('%s%s' % (indent, agent.printable(str(name))))
            screen_pairs(screen, value, indent + '    ')
            continue
        if name in ('submitted', 'started', 'ended', 'lastSeen') and isinstance(value, float):
            value = shown_time(value)
        elif isinstance(value, list):
            value = ', '.join(map(str, value))
        screen.say('%s%-*s  %s' % (indent, width, agent.printable(str(name)),
                                   agent.printable(str(value)) or '-'))


def do_ps(host: Client, screen: Screen, args: Any) -> int:
    """Commands: all unfinished ones, and the last that finished."""
    of_vm = {'vm': host.call('getVM', args.vm)['name']} if args.vm else {}
    rows = host.call('listCmds', dict(of_vm, finished=True, limit=args.number)) if args.number else []
    rows += host.call('listCmds', dict(of_vm, finished=False))
    rows.sort(key=lambda row: row['submitted'])
    if args.json:
        screen.json(rows)
        return 0
    details = dict(host.each('getCmdDetails', {row['cmdId'] for row in rows}))
    statuses = dict(host.each('getCmdStatus', [row['cmdId'] for row in rows])) if args.long else {}
    headings = ['ID', 'VM', 'STATE', 'SUBMITTED'] + (['CPU', 'MEMORY', 'PROGRESS'] if args.long else [])
    screen.table(headings + ['COMMAND'], [cmd_row(row, details, statuses) for row in rows])
    return 0


def cmd_row(row: Dict[str, Any], details: Dict[str, Any], statuses: Dict[str, Any]) -> List[str]:
    """A line of `ps`."""
    shown = [row['cmdId'], row['vm'], row['state'], shown_time(row['submitted'])]
    status = statuses.get(row['cmdId'])
    if statuses:
        usage = status['resources'] if status else {}
        shown += ['%.1f s' % (usage.get('ru_utime', 0) + usage.get('ru_stime', 0)),
                  shown_size(usage.get('ru_maxrss', 0) * 1024), str(status and status['progress'] or '-')]
    words = [row['cmd']] + details.get(row['cmdId'], {}).get('args', [])
    return shown + [' '.join(shlex.quote(word) for word in words)]


def do_run(host: Client, screen: Screen, args: Any) -> int:
    """Runs a command, brings its output as it comes, and exits with its code."""
    if not args.command:
        raise InvalidParams('which command? It stands behind --: run VM -- CMD ARG…')
    options = {}  # type: Dict[str, Any]
    if args.timeout:
        options['timeout'] = args.timeout
    if args.stdin:
        options['stdin'] = xmlrpc.client.Binary(sys.stdin.buffer.read())
    many = host.is_pattern(args.vm)
    with Interrupts() as interrupts:
        cmd_id = host.call('runCmdOnAll' if many else 'runCmd', args.vm, args.command[0], args.command[1:],
                           dict(args.env), args.folder, args.input, options)
        if args.detach:
            screen.say(cmd_id)
            return 0
        try:
            followed = Followed(host, screen, cmd_id, many)
            followed.to_the_end(lambda: forward(host, screen, cmd_id, interrupts))
        except KeyboardInterrupt:
            screen.complain('left; the command goes on as %s' % cmd_id)
            raise
        except BrokenPipeError:
            host.call('signalCmd', cmd_id, 'PIPE')      # as if it had written there itself
            raise
        except OSError:
            screen.complain('left; the command goes on as %s' % cmd_id)
            raise
        except NoHost:
            screen.complain('the command goes on: once the host is back, `out -f %s` shows it' % cmd_id)
            raise
        return max(exit_code(screen, host.call('getCmdResults', key), name)
                   for key, name in followed.names.items())


class Interrupts:
    """While it lasts, the first Ctrl-C or SIGTERM is noted; the second raises KeyboardInterrupt, and does so
    again in ``take``: of what a finalizer meets Python takes no further notice."""

    def __init__(self) -> None:
        self._noted = []               # type: List[int]
        self._seen = self._leaving = False
        self._before = {}              # type: Dict[int, Any]

    def __enter__(self) -> 'Interrupts':
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self._seen:
            self._leaving = True
            raise KeyboardInterrupt
        self._seen = True
        self._noted.append(number)

    def take(self) -> List[int]:
        """The signals that were noted since the last call. Raises KeyboardInterrupt."""
        if self._leaving:
            raise KeyboardInterrupt
        noted, self._noted = self._noted, []
        return noted


def forward(host: Client, screen: Screen, cmd_id: str, interrupts: Interrupts) -> None:
    """Hands what interrupted us on to the command."""
    for number in interrupts.take():
        name = signal.Signals(number).name[3:]
        if screen.shows_progress:
            screen.complain('%s sent to the command; once more leaves it running' % name)
        host.call('signalCmd', cmd_id, name)


class Followed:
    """A command whose output comes to standard output and standard error, apart, as it is written.

    One execution's bytes pass unchanged; where there are many, each line begins with its VM's name.
    """

    def __init__(self, host: Client, screen: Screen, cmd_id: str, many: bool) -> None:
        self._host = host
        keys = host.call('getCmdDetails', cmd_id)['executions'] if many else [cmd_id]
        self.names = {key: key.partition('@')[2] for key in keys} if many else {cmd_id: ''}
        self._open = [Tail(host, key, Pipe(screen.out, name), Pipe(screen.err, name))
                      for key, name in self.names.items()]

    def look(self, patience: float = PATIENCE) -> bool:
        """Brings what is there now; whether that was anything. Raises as ``Tail.look``."""
        return any([execution.look(patience) for execution in self._open])

    def to_the_end(self, between: Callable[[], None]) -> None:
        """Looks until all have ended; calls ``between`` before each look."""
        pause = SHORTEST_LOOK
        while self._open:
            self._host.call('waitCmd', self._open[0].key, pause)
            between()
            pause = SHORTEST_LOOK if self.look() else min(2 * pause, LONGEST_LOOK)
            self._open = [execution for execution in self._open if not execution.is_over]


PIECE = 256 * 1024      # bytes of a command's output that are asked for at a time


class Tail:
    """Brings the output of one execution from where it was left."""

    def __init__(self, host: Client, key: str, out: 'Pipe', err: 'Pipe') -> None:
        self._host = host
        self.key = key
        self.is_over = False
        self._pipes = {'out': out, 'err': err}
        self._offsets = {'out': 0, 'err': 0}
        self._ended = 0.0              # monotonic: when it was first seen to have ended

    def look(self, patience: float = PATIENCE) -> bool:
        """Brings what is there now; whether that was anything.

        While the guest is away there is nothing. Raises VMHostError where output that there is can't be
        had, for so many seconds after the command's end; with no patience, also before.
        """
        status = self._host.call('getCmdStatus', self.key)
        ended = status['state'] in FINISHED
        if ended:
            self._ended = self._ended or time.monotonic()
        sizes = {stream: status[stream + 'Size'] for stream in self._pipes}
        try:
            moved = any([self._bring(stream, size) for stream, size in sizes.items()])
            missing = sum(max(0, size - self._offsets[stream]) for stream, size in sizes.items())
            if ended and missing:
                raise DeadlineExceeded('%d bytes of the output of %s can\'t be had' % (missing, self.key))
        except (AgentNotConnected, DeadlineExceeded):
            if not patience or ended and time.monotonic() - self._ended > patience:
                raise
            return False
        if ended:
            self.is_over = True
            for pipe in self._pipes.values():
                pipe.end()
        return moved

    def _bring(self, stream: str, size: float) -> bool:
        begin = self._offsets[stream]
        while self._offsets[stream] < size:
            answer = self._host.call('getCmdOutput', self.key, stream, self._offsets[stream], PIECE)
            if not answer['data'].data:
                break
            self._pipes[stream].write(answer['data'].data)
            self._offsets[stream] = answer['next']
        return self._offsets[stream] > begin


class Pipe:
    """Bytes to one of our own outputs; with a VM's name, each line begins with it."""

    def __init__(self, stream: Any, vm: str) -> None:
        self._to = stream.buffer
        self._prefix = (agent.printable(vm) + ': ').encode('utf-8', 'replace') if vm else b''
        self._begun = b''              # a line whose end hasn't come

    def write(self, data: bytes) -> None:
        """Writes them, but for a line that isn't whole yet where lines are prefixed."""
        if self._prefix:
            lines = (self._begun + data).split(b'\n')
            self._begun = lines.pop()
            data = b''.join(self._prefix + line + b'\n' for line in lines)
        self._to.write(data)
        self._to.flush()

    def end(self) -> None:
        """Nothing more comes."""
        if self._begun:
            self.write(b'\n')


def exit_code(screen: Screen, results: Dict[str, Any], vm: str = '') -> int:
    """What a shell would say of a command that ended so; tells why, where the program itself can't."""
    number, state = results['exitCodeOrSignal'], results['state']
    why = results['error'] or state
    tell_cut(screen, results, vm)
    if state not in ('exited', 'signaled'):
        screen.complain('%s%s' % (vm and vm + ': ', why))
    if state == 'timeout' and results['finished']:
        return number or TIMED_OUT      # it ended in peace at the TERM, and still isn't done
    if state == 'exited':
        return number
    return 128 + number if state in ('signaled', 'timeout') else OURS


def tell_cut(screen: Screen, results: Dict[str, Any], vm: str) -> None:
    """Complains where there was more output than the guest keeps."""
    for stream in ('out', 'err'):
        if results.get(stream + '-truncated'):
            screen.complain('%sstd%s was cut: more was written than output_limit allows'
                            % (vm and vm + ': ', stream))


def do_out(host: Client, screen: Screen, args: Any) -> int:
    """The output of a command, now, or until it ends."""
    details = host.call('getCmdDetails', args.id)
    followed = Followed(host, screen, args.id, details['executions'] != [args.id])
    if args.follow:
        followed.to_the_end(lambda: None)
    else:
        followed.look(patience=0)
    for key, name in followed.names.items():
        results = host.call('getCmdResults', key)
        if results:
            tell_cut(screen, results, name)
    return 0


def do_kill(host: Client, screen: Screen, args: Any) -> int:
    """Sends a signal to all processes of a command."""
    if host.call('signalCmd', args.id, args.signal):
        return 0
    raise BadState('%s has ended already' % args.id)


def do_create(host: Client, screen: Screen, args: Any) -> int:
    """Makes a VM from an image, or registers a .vbox file."""
    options = {name: getattr(args, name) for name in ('memory', 'cpus', 'ostype', 'network', 'diskSize')
               if getattr(args, name) is not None}
    paths = [os.path.abspath(path) for path in (args.image,) if path]
    name = args.name
    if not paths and name.endswith('.vbox'):
        name = os.path.abspath(name)       # the host's working directory is not ours
    _, made = watch(host, screen, name, 'createVM', name, *(paths or ['']) + [options])
    screen.say(agent.printable(made))
    return 0


def do_rm(host: Client, screen: Screen, args: Any) -> int:
    """Takes a VM out of the hypervisor, with its disks where asked."""
    return change(host, screen, [args.vm], 'removed', 'removeVM', args.disks)


def do_start(host: Client, screen: Screen, args: Any) -> int:
    """Starts VMs, or lets saved ones go on."""
    return change(host, screen, host.matching(args.vm), 'runs', 'start', args.gui)


def do_stop(host: Client, screen: Screen, args: Any) -> int:
    """Asks the systems of VMs to power off, or cuts their power."""
    return change(host, screen, host.matching(args.vm), 'is off', 'powerOff' if args.force else 'shutdown')


def do_pause(host: Client, screen: Screen, args: Any) -> int:
    """Halts running VMs in memory."""
    return change(host, screen, host.matching(args.vm), 'is paused', 'pause')


def do_resume(host: Client, screen: Screen, args: Any) -> int:
    """Lets paused VMs go on."""
    return change(host, screen, host.matching(args.vm), 'runs', 'resume')


def do_save(host: Client, screen: Screen, args: Any) -> int:
    """Writes running VMs to disk, and stops them."""
    return change(host, screen, host.matching(args.vm), 'is saved', 'saveState')


def do_reset(host: Client, screen: Screen, args: Any) -> int:
    """Presses the reset button of VMs."""
    return change(host, screen, host.matching(args.vm), 'is reset', 'reset')


def change(host: Client, screen: Screen, vms: List[str], done: str, method: str, *args: Any) -> int:
    """Calls a method for each VM, and says when it is done; one that can't holds up no other."""
    code = 0
    for vm in vms:
        try:
            watch(host, screen, vm, method, vm, *args)
            screen.say('%s %s' % (agent.printable(vm), done))
        except NoHost:
            raise
        except VMHostError as error:
            screen.complain('%s: %s' % (vm, error) if len(vms) > 1 else str(error))
            code = 1
    return code


def watch(host: Client, screen: Screen, vm: str, method: str, *args: Any) -> Any:
    """Calls a method that may take long; meanwhile a terminal shows how far the hypervisor is.

    Ctrl-C ends the waiting alone: a hypervisor stopped in the middle would leave worse behind.
    """
    try:
        return call_watched(host, screen, vm, method, *args)
    except KeyboardInterrupt:
        screen.complain('%s: the host agent goes on with it, `ls` shows how far it is' % vm)
        raise


def call_watched(host: Client, screen: Screen, vm: str, method: str, *args: Any) -> Any:
    """What the method answers; where there is a terminal, with a line of progress until it does."""
    if not screen.shows_progress:
        return host.call(method, *args)
    answers = queue.Queue()        # type: queue.Queue

    def work() -> None:
        try:
            answers.put((host.call(method, *args), None))
        except VMHostError as error:
            answers.put((None, error))
    threading.Thread(target=work, name='call', daemon=True).start()
    begin, looker = time.monotonic(), Client(host.settings)
    while True:
        try:
            answer, error = answers.get(timeout=PROGRESS_EVERY)
            break
        except queue.Empty:
            screen.progress(job_line(looker, vm, time.monotonic() - begin))
    screen.progress('')
    if error is not None:
        raise error
    return answer


def job_line(host: Client, vm: str, seconds: float) -> str:
    """How far the hypervisor is with a VM."""
    line = '%s: %s' % (agent.printable(vm), shown_span(seconds))
    for job in host.call('agentInfo')['jobs']:
        if job['vm'] == vm and job['percent']:
            line += ', %d %%, %s left %s' % (job['percent'], shown_span(
                seconds * (100 - job['percent']) / job['percent']), agent.printable(job['text']))
    return line


def do_snap(host: Client, screen: Screen, args: Any) -> int:
    """Lists, takes, restores and deletes snapshots."""
    if args.action == 'ls':
        names = host.call('listSnapshots', args.vm)
        if args.json:
            screen.json(names)
        else:
            for name in names:
                screen.say(agent.printable(name))
        return 0
    if args.action != 'restore' and not args.name:
        raise InvalidParams('which snapshot? snap %s VM NAME' % args.action)
    method, done = {'take': ('takeSnapshot', 'taken'), 'restore': ('restoreSnapshot', 'restored'),
                    'rm': ('deleteSnapshot', 'deleted')}[args.action]
    watch(host, screen, args.vm, method, args.vm, args.name)
    screen.say('snapshot %s' % done)
    return 0


def do_rdp(host: Client, screen: Screen, args: Any) -> int:
    """Switches the remote desktop of a VM, and says where it is."""
    desktop = host.call('remoteDesktop', args.vm, not args.off)
    if args.json:
        screen.json(desktop)
    elif args.off:
        screen.say('off')
    else:
        screen.say('%(address)s:%(port)s (authentication %(auth)s, security %(security)s)' % desktop)
    return 0


def do_net(host: Client, screen: Screen, args: Any) -> int:
    """The network of the VMs, as it is."""
    network = host.call('setupNetwork' if args.setup else 'getNetwork')
    show_pairs(screen, network, args.json)
    if args.setup and network['mode'] == 'hostonly':
        address = host.call('agentInfo')['broker']['address']
        if is_out_of_reach(address, network['mode']):
            screen.complain(OUT_OF_REACH % address)
    return 0


OUT_OF_REACH = 'the broker listens at %s, where no VM reaches it: start the host agent again'


def is_out_of_reach(broker: str, mode: str) -> bool:
    """Whether the broker's address is for this machine alone, in a host-only network: the host agent was
    started before there was one."""
    return mode == 'hostonly' and broker.startswith(('127.', 'localhost'))


def do_cleanup(host: Client, screen: Screen, args: Any) -> int:
    """What this tool made and nobody owns: shown, or removed."""
    found = host.call('cleanup', not args.yes)
    if args.json:
        screen.json(found)
        return 0
    for what in found:
        screen.say(agent.printable('%s %s %s (%s)' % ('removed' if args.yes else 'would remove', what['kind'],
                                                what['name'], what['why'])))
    if found and not args.yes:
        screen.complain('nothing was removed: cleanup --yes does')
    return 0


def do_put(host: Client, screen: Screen, args: Any) -> int:
    """Sends a file or folder to VMs."""
    source = os.path.abspath(args.source)      # the host's working directory is not ours
    target = args.target or os.path.basename(source)
    return max([transfer(host, screen, 'put', vm, source, target) for vm in host.matching(args.vm)])


def do_get(host: Client, screen: Screen, args: Any) -> int:
    """Fetches a file or folder from a VM."""
    name = posixpath.basename(args.source.rstrip('/'))
    target = os.path.abspath(args.target or name)
    if os.path.isdir(target) and args.target and name not in ('', '.', '..'):
        target = os.path.join(target, name)
    return transfer(host, screen, 'get', args.vm, args.source, target)


def carried(path: str) -> FilePath:
    """A path for XML-RPC: as text, or its exact bytes where text can't have them."""
    return path if is_carried(path) else xmlrpc.client.Binary(path.encode('utf-8', 'surrogateescape'))


def transfer(host: Client, screen: Screen, direction: str, vm: str, source: str, target: str) -> int:
    """Moves a file or folder, verified; a terminal shows how far it is. Ctrl-C cancels it."""
    moving = host.call('startTransfer', direction, vm, carried(source), carried(target))
    try:
        while True:
            now = host.call('getTransfer', moving)
            if now['state'] not in ('waiting', 'running'):
                break
            screen.progress('%s: %s' % (agent.printable(vm), transfer_line(now)))
            time.sleep(PROGRESS_EVERY)
    except KeyboardInterrupt:
        host.call('cancelTransfer', moving)
        raise
    finally:
        screen.progress('')
    if now['state'] != 'done':
        screen.complain('%s: %s' % (vm, now['error'] or now['state']))
        return 1
    return 0


def transfer_line(now: Dict[str, Any]) -> str:
    """Bytes, rate and time left of a transfer."""
    line = '%s of %s, %s/s' % (shown_size(now['bytes']), shown_size(now['total']), shown_size(now['rate']))
    if now['rate'] and now['total']:
        line += ', %s left' % shown_span((now['total'] - now['bytes']) / now['rate'])
    return line


def do_status(host: Client, screen: Screen, args: Any) -> int:
    """The host agent's own state; or a link to its page in the browser, which opens it once."""
    if args.open:
        link = host.call('getStatusLink')
        screen.say(link)
        webbrowser.open(link)
        return 0
    info = host.call('agentInfo')
    show_pairs(screen, info, args.json)
    return 0


def do_ping(host: Client, screen: Screen, args: Any) -> int:
    """Asks agents whether they are there."""
    code = 0
    for name in host.matching(args.vm):
        begin = time.monotonic()
        try:
            screen.say('%s in %.1f ms' % (agent.printable(host.call('ping', name, args.timeout)),
                                          1000 * (time.monotonic() - begin)))
        except (AgentNotConnected, DeadlineExceeded) as error:
            screen.complain(str(error))
            code = 1
    return code


def do_events(host: Client, screen: Screen, args: Any) -> int:
    """What happened: the last events, and what comes."""
    last, timeout = -args.number, 0
    shown = []  # type: List[Dict[str, Any]]
    while True:
        answer = host.call('getEvents', last, timeout)
        for event in answer['events']:
            if not args.json:
                screen.say(event_line(screen, event))
            elif args.follow:
                screen.json(event, None)
        shown += answer['events']
        last, timeout = answer['last'], 60
        if not args.follow:
            break
        shown = []
    if args.json:
        screen.json(shown)
    return 0


def event_line(screen: Screen, event: Dict[str, Any]) -> str:
    """An event as a line of text."""
    words = [shown_time(event['time']), '%-14s' % event['type'], event['vm'], event['cmdId'], event['text']]
    return ' '.join(agent.printable(word) for word in words if word)


def do_call(host: Client, screen: Screen, args: Any) -> int:
    """Calls a method of the API; what it answers, as JSON."""
    answer = host.call(args.method, *[read_argument(text) for text in args.arguments])
    if args.raw and isinstance(answer, xmlrpc.client.Binary):
        screen.out.buffer.write(answer.data)
    elif args.raw and isinstance(answer, str):
        screen.say(answer)
    else:
        screen.json(answer)
    return 0


def read_argument(text: str) -> Any:
    """An argument of `call`: JSON, or else text. Raises InvalidParams where it begins like JSON."""
    try:
        # Numbers that XML-RPC's integers can't hold go as doubles, as in the host's answers.
        return json.loads(text, parse_int=lambda digits: xml_number(int(digits)))
    except ValueError as error:
        if text[:1] in ('{', '[', '"'):
            raise InvalidParams('%s is no JSON: %s' % (text, error))
        return text


# --- command line: is all well? ----------------------------------------------------------------

LEAST_DISK = 100 * 1024 * 1024     # bytes that the state folder's disk should have free
CLOCK_TOLERANCE = 60.0             # seconds that a guest's clock may be off, and nobody cares


def do_check(host: Client, screen: Screen, args: Any) -> int:
    """Looks at every precondition; the exit code is 0 when the host agent works, or would."""
    settings = host.settings
    findings = [agent.check_python(), agent.check_package('stomper', needed=True),
                agent.check_folder(settings.Host.state_dir, '[Host] state_dir'),
                agent.check_disk(settings.Host.state_dir, LEAST_DISK), agent.check_clock()]
    try:
        findings += check_running(host, host.call('agentInfo'), settings.Network.mode)
    except NoHost as error:
        findings += check_start(settings, error)
    except VMHostError as error:
        findings.append(agent.Finding(False, 'host agent', str(error)))
    findings += check_hypervisor(settings)
    if args.json:
        screen.json([finding._asdict() for finding in findings])
    else:
        for line in agent.describe_findings(findings, screen.out.encoding):
            screen.say(agent.printable(line))
    return 0 if all(finding.ok or not finding.needed for finding in findings) else 1


def check_running(host: Client, info: Dict[str, Any], mode: str) -> Iterator[agent.Finding]:
    """What the running host agent tells about itself, its broker and its guests."""
    yield agent.Finding(info['version'] == agent.VERSION, 'host agent %s at %s' % (
        info['version'], host.address), 'restart it: the files here are of version ' + agent.VERSION)
    broker = info['broker']
    yield agent.Finding(bool(broker['connected']), 'broker at %s' % broker['address'],
                        'no connection: is it running, and are [Broker] host, port, username, password '
                        'and tls right?')
    if info['hypervisor'] != 'none' and is_out_of_reach(broker['address'], mode):
        yield agent.Finding(False, 'network', 'net --setup makes it; then: '
                            + OUT_OF_REACH % broker['address'], needed=False)
    guests = [guest for _, guest in host.each('getVM', host.call('listRegisteredVMs'))]
    if not guests:
        yield agent.Finding(False, 'guests', 'none has joined: start vmguest.py in a VM, where it '
                            'reaches %s' % broker['address'], needed=False)
    for guest in guests:
        yield check_guest(guest)


def check_guest(guest: Dict[str, Any]) -> agent.Finding:
    """Whether a guest is there, of this version, and knows the time."""
    what = 'guest %s, %s' % (guest['name'], guest['facts'].get('version', 'of an unknown version'))
    if guest['agent'] != 'alive':
        return agent.Finding(False, what, 'nothing was heard for %s: is the VM paused, or its network '
                             'down?' % shown_span(time.time() - guest['lastSeen']), needed=False)
    if abs(guest['clockOffset']) > CLOCK_TOLERANCE:
        return agent.Finding(False, what, 'its clock is %s %s: set it (ntpdate, chronyd, or VirtualBox\'s '
                             'Guest Additions); commands work, the times of their files are wrong'
                             % (shown_span(abs(guest['clockOffset'])),
                                   'ahead' if guest['clockOffset'] > 0 else 'behind'), needed=False)
    return agent.Finding(guest['facts'].get('version') == agent.VERSION, what,
                         'this host is %s: put the same version into the VM' % agent.VERSION,
                         needed=False)


def check_start(settings: Any, why: NoHost) -> Iterator[agent.Finding]:
    """Whether the host agent could start: nobody in its place, and its ports free."""
    broker = settings.Broker
    yield agent.Finding(False, 'host agent', str(why), needed=False)
    yield check_port('XML-RPC', settings.Host.xmlrpc_listen_on, settings.Host.xmlrpc_port,
                     '[Host] xmlrpc_listen_on, xmlrpc_port')
    host = '127.0.0.1' if broker.host == 'auto' else broker.host
    if broker.embedded:
        yield check_port('broker', host, broker.port, '[Broker] host, port')
        try:
            server_tls(broker)
        except VMHostError as error:
            yield agent.Finding(False, 'certificate', str(error))
    else:
        yield agent.check_broker([host], broker, protocol.try_broker)[0]


def check_port(what: str, host: str, port: int, keys: str) -> agent.Finding:
    """Whether this machine lets us listen there."""
    problem = listen_problem(host, port)
    return agent.Finding(not problem, 'port %d of %s for %s' % (port, host, what),
                         '%s (%s)' % (problem, keys))


def listen_problem(host: str, port: int) -> str:
    """Why nobody can listen there, as a sentence; '' where it's possible."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            if os.name == 'posix':
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
        return ''
    except OSError as error:
        return agent.why_not_listening(error)


def check_hypervisor(settings: Any) -> List[agent.Finding]:
    """VirtualBox, where it is wanted; with `auto` the rest works without it."""
    wanted = settings.Hypervisor.hypervisor
    if wanted == 'none':
        return [agent.Finding(True, 'no hypervisor wanted')]
    driver = VirtualBox(settings.Network, settings.RemoteDesktop, CHIRP_PORT,
                        '', settings.Hypervisor.command_timeout, lambda *_: None)   # no file of a host's
    driver.start_thread()
    try:
        lines = driver.check()
    except VMHostError as error:
        lines = [(False, 'VirtualBox', str(error))]
    finally:
        driver.close()
    return [agent.Finding(ok, what, mend, wanted == 'VirtualBox' and 'remote desktop' not in what)
            for ok, what, mend in lines]


# --- command line: what there is to say --------------------------------------------------------

class Verb(NamedTuple):
    """A verb: its name, what does it, what is said of it, its arguments and some examples.

    An argument is what argparse's add_argument takes. Its metavar tells the completion what it is.
    """
    name: str
    function: Callable[[Client, Screen, Any], int]
    help: str
    arguments: List[Tuple[Tuple[str, ...], Dict[str, Any]]]
    examples: List[str] = []


def argument(*names: str, **options: Any) -> Tuple[Tuple[str, ...], Dict[str, Any]]:
    """One argument of a verb."""
    return names, options


def switch(*names: str, **options: Any) -> Tuple[Tuple[str, ...], Dict[str, Any]]:
    """An option that is there or not."""
    return names, dict(options, action='store_true')


def read_variable(text: str) -> Tuple[str, str]:
    """K=V. Raises ArgumentTypeError."""
    name, sign, value = text.partition('=')
    if not name or not sign:
        raise argparse.ArgumentTypeError('%s: expected NAME=VALUE' % text)
    return name, value


def read_seconds(text: str) -> float:
    """A duration as in the ini files. Raises ArgumentTypeError."""
    try:
        return agent.duration(text)
    except ValueError as expected:
        raise argparse.ArgumentTypeError('%s: expected %s' % (text, expected))


JSON = switch('--json', help='as JSON, for programs')
VM = argument('vm', metavar='VM', help='name or id')
VMS = argument('vm', metavar='VM', help='name, id, or a pattern such as \'web*\'')
ID = argument('id', metavar='ID', help='of the command, as `run -d` printed it, and `ps` lists it')

VERBS = {verb.name: verb for verb in [
    Verb('check', do_check, 'is everything there that the host agent needs, and how is it mended?', [JSON]),
    Verb('ls', do_ls, 'VMs, and whether their agents are there', [
        JSON, switch('-l', '--long', help='more columns')]),
    Verb('info', do_info, 'all that is known of a VM, or of a command', [
        argument('vm', metavar='VM|ID', help='of a VM or a command'), JSON]),
    Verb('create', do_create, 'make a VM from an image, or register a .vbox file', [
        argument('name', metavar='NAME', help='of the VM, or a .vbox file'),
        argument('image', metavar='IMAGE', nargs='?', default='', help='.ova, .ovf, .vdi, .vmdk or .iso'),
        argument('--memory', metavar='MB', type=int), argument('--cpus', metavar='N', type=int),
        argument('--ostype', metavar='TYPE', help='VirtualBox\'s name of the guest\'s system'),
        argument('--network', choices=['hostonly', 'nat', 'none'], help='else as in host.ini'),
        argument('--disk', metavar='MB', type=int, dest='diskSize', help='of the disk beside an .iso')], [
            'create web1 cernvm.ova --memory 2048 --cpus 2']),
    Verb('rm', do_rm, 'take a VM out of the hypervisor', [
        VM, switch('--disks', help='and delete its disks')]),
    Verb('start', do_start, 'start VMs', [VMS, switch('--gui', help='with a window')]),
    Verb('stop', do_stop, 'ask the systems of VMs to power off', [
        VMS, switch('--force', help='cut their power')]),
    Verb('pause', do_pause, 'halt VMs in memory', [VMS]),
    Verb('resume', do_resume, 'let paused VMs go on', [VMS]),
    Verb('save', do_save, 'write VMs to disk and stop them; start goes on from there', [VMS]),
    Verb('reset', do_reset, 'press the reset button of VMs', [VMS]),
    Verb('snap', do_snap, 'snapshots of a VM', [
        argument('action', choices=['ls', 'take', 'restore', 'rm']), VM,
        argument('name', metavar='SNAPSHOT', nargs='?', default='', help='restore: else the current one'),
        JSON], ['snap take web1 fresh', 'snap restore web1 fresh']),
    Verb('run', do_run, 'run a program in a VM; its output comes as it is written', [
        switch('-i', '--stdin', help='pass standard input, read to its end first'),
        switch('-d', '--detach', help='print the command\'s id, and leave it to itself'),
        argument('-t', '--timeout', metavar='SEC', type=read_seconds, default=0.0,
                 help='end it after that time (90, 5m, 2h)'),
        argument('-e', '--env', metavar='K=V', type=read_variable, action='append', default=[],
                 help='a variable of its environment; may be repeated'),
        argument('-I', '--input', metavar='FILE', default='', help='standard input from a file in the VM'),
        argument('-C', '--folder', metavar='DIR', default='',
                 help='where it starts, within what the VM serves'),
        VMS], [
            'run web1 -- uname -a',
            'run -t 5m -e LEVEL=9 web1 -- sh -c \'gzip -$LEVEL < in > out\'',
            'run -i web1 -- tar xf - < tree.tar',
            'run \'web*\' -- uptime']),
    Verb('ps', do_ps, 'commands: all unfinished ones, and the last finished', [
        argument('vm', metavar='VM', nargs='?', help='only those of this VM'), JSON,
        switch('-l', '--long', help='their CPU time, memory and progress'),
        argument('-n', '--number', metavar='N', type=int, default=FINISHED_SHOWN,
                 help='how many finished ones (%d)' % FINISHED_SHOWN)]),
    Verb('out', do_out, 'the output of a command, so far', [
        switch('-f', '--follow', help='and what comes, until it ends'), ID]),
    Verb('kill', do_kill, 'send a signal to all processes of a command', [
        argument('-s', '--signal', metavar='SIG', default='TERM', help='TERM, KILL, INT, HUP, 9, …'), ID]),
    Verb('put', do_put, 'send a file or folder to a VM', [
        VMS, argument('source', metavar='SRC', help='here'),
        argument('target', metavar='DST', nargs='?', default='', help='there; else by its name')], [
            'put web1 data/ input']),
    Verb('get', do_get, 'fetch a file or folder from a VM', [
        VM, argument('source', metavar='SRC', help='there'),
        argument('target', metavar='DST', nargs='?', default='', help='here; else by its name')], [
            'get web1 result.tar .']),
    Verb('ping', do_ping, 'is the agent of a VM there?', [
        VMS, argument('-t', '--timeout', metavar='SEC', type=read_seconds, default=5.0, help='5 s')]),
    Verb('rdp', do_rdp, 'switch the remote desktop of a VM on, and say where it is', [
        VM, switch('--off', help='switch it off'), JSON]),
    Verb('net', do_net, 'the network of the VMs', [
        switch('--setup', help='make or mend it, as host.ini says'), JSON]),
    Verb('cleanup', do_cleanup, 'what this tool made and nobody owns: show it', [
        switch('--yes', help='remove it'), JSON]),
    Verb('status', do_status, 'the host agent itself', [
        switch('--open', help='print a link to the status page, and open it'), JSON]),
    Verb('events', do_events, 'what happened', [
        switch('-f', '--follow', help='and what happens, until Ctrl-C'), JSON,
        argument('-n', '--number', metavar='N', type=int, default=EVENTS_SHOWN,
                 help='how many of the past (%d)' % EVENTS_SHOWN)]),
    Verb('call', do_call, 'call a method of the API, and print what it answers as JSON', [
        argument('method', metavar='METHOD', help='`call -r help` describes them'),
        argument('arguments', metavar='JSON', nargs='*', help='each as JSON; what is none is text'),
        switch('-r', '--raw', help='a text or a picture as it is')], [
            'call listCmds \'{"vm": "web1", "state": "running"}\'', 'call -r help runCmd',
            'call -r screenshot web1 > web1.png']),
]}

USAGE = '''usage: {me} host.ini                 run the host agent until SIGTERM or Ctrl-C
       {me} host.ini VERB …          talk to the one that runs
       {me} host.ini VERB --help     what a verb takes
       {me} --bundle FILE.pyz        write all of it as one file that Python runs
       {me} --completion bash|zsh|fish
       {me} --version
'''
EXIT_CODES = '''exit codes: 0 done; 1 the host said no, or can't be reached; 2 wrong usage; 130 Ctrl-C.
run: the command's own (of many VMs the highest); 128 and the signal's number where one ended it;
     124 where it took its timeout for a reason to end with 0; 255 where it isn't the command's: no such
     VM, the program can't be started, it was lost. Any: 255 where standard output can't be written.
'''


def program_name() -> str:
    """How this program was called, for help and hints."""
    return os.path.basename(sys.argv[0]) or 'vmhost.py'


def overview() -> str:
    """What --help says."""
    verbs = ['  %-8s %s' % (verb.name, verb.help) for verb in VERBS.values()]
    examples = ['  %s host.ini %s' % (program_name(), example)
                for verb in VERBS.values() for example in verb.examples]
    return '\n'.join(['Drives virtual machines and the programs in them.\n', USAGE.format(me=program_name()),
                      'verbs:'] + verbs + ['', 'examples:'] + examples + ['', EXIT_CODES.rstrip()])


class Parser(argparse.ArgumentParser):
    """The arguments of one verb; what is wrong with them ends with that verb's exit code."""

    def __init__(self, verb: Verb) -> None:
        super().__init__(prog='%s host.ini %s' % (program_name(), verb.name), description=verb.help,
                         epilog=self._epilog(verb), allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self._code = OURS if verb.name == 'run' else 2
        for names, options in verb.arguments:
            self.add_argument(*names, **options)

    def _epilog(self, verb: Verb) -> str:
        lines = ['  %s host.ini %s' % (program_name(), example) for example in verb.examples]
        return '\n'.join((['examples:'] + lines if lines else []) + ['', EXIT_CODES])

    def error(self, message: str) -> Any:
        """One sentence, and where there is more."""
        self.exit(self._code, 'vmhost: %s: %s (%s --help)\n' % (self.prog.split()[-1], message, self.prog))


def read_arguments(verb: Verb, words: List[str]) -> Any:
    """The arguments of a verb. Exits where they are wrong, or --help is among them."""
    command = []  # type: List[str]
    if verb.name == 'run' and '--' in words:
        at = words.index('--')
        words, command = words[:at], words[at + 1:]
    args = Parser(verb).parse_args(words)
    args.command = command
    return args


def run_verb(ini: str, words: List[str], screen: Screen) -> int:
    """Does what the words say with the host agent of that ini file; gives the exit code."""
    name = words[0]
    if name not in VERBS:
        close = difflib.get_close_matches(name, VERBS, 1)
        screen.complain('no verb %s%s; `%s --help` lists them' % (
            name, close and ' (%s?)' % close[0] or '', program_name()))
        return 2
    args = read_arguments(VERBS[name], words[1:])
    try:
        return VERBS[name].function(Client(agent.read_settings(ini, SETTINGS)), screen, args)
    except (agent.AgentError, protocol.ProtocolError) as error:
        screen.complain(str(error))
        return OURS if name == 'run' else 1


def run_host(ini: str) -> int:
    """Runs the host agent in the foreground until SIGTERM or Ctrl-C; gives the exit code."""
    host = None
    try:
        settings = agent.read_settings(ini, SETTINGS)
        agent.set_up_logging(settings.Logging)
        sys.setswitchinterval(agent.SWITCH_INTERVAL)
        host = Host(settings)
        ended = agent.catch_signals()
        host.start()
        host.run(ended)
        return 0
    except (agent.AgentError, stompbroker.BrokerError, protocol.ProtocolError) as error:
        print('vmhost: %s' % agent.naming_file(ini, error), file=sys.stderr)
        return 1
    finally:
        if host is not None:
            host.stop()


# --- command line: completion ------------------------------------------------------------------

# Each asks this program for what could stand where the cursor is: {me} --complete WORD…, without the
# name of the program, up to the cursor. Nothing: a file.
COMPLETION = {
    'bash': """\
# vmhost: eval "$(python3 vmhost.py --completion bash)" in ~/.bashrc
_vmhost() {{
    local at=0 cur=${{COMP_WORDS[COMP_CWORD]}} found
    while ((at <= COMP_CWORD)) && [[ ${{COMP_WORDS[at++]}} != @(*vmhost.py|*vmhost.pyz|vmhost) ]]; do :; done
    ((at <= COMP_CWORD)) || return 0
    COMPREPLY=()
    while IFS= read -r found; do
        [[ $cur == [\\"\\']* ]] || printf -v found %q "$found"
        COMPREPLY+=("$found")
    done < <({me} --complete "${{COMP_WORDS[@]:at:COMP_CWORD-at+1}}" 2> /dev/null)
}}
complete -o default -F _vmhost vmhost.py vmhost.pyz vmhost python python3
""",
    'zsh': """\
# vmhost: eval "$(python3 vmhost.py --completion zsh)" in ~/.zshrc, behind compinit
_vmhost() {{
    local -a found
    found=("${{(@f)$({me} --complete "${{(@Q)words[2,CURRENT]}}" 2> /dev/null)}}")
    if [[ -n $found ]]; then compadd -a found; else _files; fi
}}
compdef _vmhost vmhost.py vmhost.pyz vmhost
""",
    'fish': """\
# vmhost: python3 vmhost.py --completion fish | source, in ~/.config/fish/config.fish
function __vmhost_candidates
    set -l words (commandline -opc) (commandline -ct)
    while set -q words[1]; and not string match -qr '(vmhost\\.pyz?|^vmhost)$' -- $words[1]
        set -e words[1]
    end
    set -q words[2]; and {me} --complete $words[2..-1] 2> /dev/null
end
for program in vmhost.py vmhost.pyz vmhost python python3
    complete -c $program -a '(__vmhost_candidates)'
end
""",
}


def completion(shell: str) -> str:
    """A script for that shell, which completes verbs, options, VMs and commands."""
    me = '%s %s' % (shlex.quote(sys.executable), shlex.quote(os.path.abspath(sys.argv[0])))
    return COMPLETION[shell].format(me=me).rstrip()


def candidates(words: List[str]) -> List[str]:
    """What could stand for the last word, behind the others: an ini file, a verb, its arguments."""
    words = [unquoted(word) for word in words]
    if len(words) < 2:
        found = ['--help', '--bundle', '--completion', '--version'] if words[-1:] != [''] else []
    elif len(words) == 2:
        found = list(VERBS)
    elif words[1] in VERBS and '--' not in words[:-1]:
        found = candidates_of(VERBS[words[1]], words)
    else:
        found = []
    return [candidate for candidate in found if words and candidate.startswith(words[-1])]


def unquoted(word: str) -> str:
    """A word as the shell will read it, when it is whole."""
    for end in ('', '"', "'"):
        with contextlib.suppress(ValueError):
            return ''.join(shlex.split(word + end))
    return word


def candidates_of(verb: Verb, words: List[str]) -> List[str]:
    """What could stand for the last word among the arguments of a verb."""
    options = {name: settings for names, settings in verb.arguments for name in names if name[0] == '-'}
    if words[-1].startswith('-'):
        return sorted(options) + ['--help']
    before = options.get(words[-2], {})
    if 'metavar' in before:
        wanted = before
    else:
        positional = [settings for names, settings in verb.arguments if names[0][0] != '-']
        given = [word for n, word in enumerate(words[2:-1], 2) if not word.startswith('-')
                 and 'metavar' not in options.get(words[n - 1], {})]
        wanted = positional[len(given)] if len(given) < len(positional) else {}
    try:
        return meant(Client(agent.read_settings(words[0], SETTINGS)), wanted, words[-2])
    except (agent.AgentError, protocol.ProtocolError):
        return []           # no host, no names; a shell in the middle of a line wants no complaint


def meant(host: Client, wanted: Dict[str, Any], vm: str) -> List[str]:
    """All that an argument could be, by its metavar. Raises VMHostError."""
    metavar = wanted.get('metavar')
    if 'choices' in wanted:
        return list(wanted['choices'])
    if metavar == 'SIG':
        return [number.name[3:] for number in signal.Signals if number.name.startswith('SIG')]
    if metavar == 'METHOD':
        return host.call('system.listMethods')
    if metavar == 'SNAPSHOT':
        return host.call('listSnapshots', vm)
    found = []  # type: List[str]
    if metavar in ('VM', 'VM|ID'):
        found += host.vm_names()
    if metavar in ('ID', 'VM|ID'):
        found += [row['cmdId'] for row in host.call('listCmds', {'limit': FINISHED_SHOWN})]
    return found


def run_option(words: List[str], screen: Screen) -> int:
    """What needs no ini file; gives the exit code."""
    if words[0] in ('-h', '--help'):
        screen.say(overview())
    elif words == ['--version']:
        screen.say('vmhost %s' % agent.VERSION)
    elif words[0] == '--bundle' and len(words) == 2:
        agent.write_bundle(words[1], 'vmhost', ['status.html'])
    elif words[0] == '--completion' and words[1:] in (['bash'], ['zsh'], ['fish']):
        screen.say(completion(words[1]))
    elif words[0] == '--complete':
        for candidate in candidates(words[1:]):
            screen.say(candidate)
    else:
        screen.complain('%s: expected host.ini, --help, --bundle FILE.pyz, --completion bash|zsh|fish '
                        'or --version' % ' '.join(words))
        return 2
    return 0


def run(words: List[str], screen: Screen) -> int:
    """Does what the words say; gives the exit code."""
    if not words:
        screen.err.write(USAGE.format(me=program_name()))
        return 2
    if words[0].startswith('-'):
        return run_option(words, screen)
    if words[0] in VERBS and not os.path.exists(words[0]):
        screen.complain('the ini file comes first: %s host.ini %s' % (program_name(), ' '.join(words)))
        return 2
    if words[1:2] in (['-h'], ['--help']):
        return run_option(words[1:], screen)
    return run_verb(words[0], words[1:], screen) if words[1:] else run_host(words[0])


def main(argv: List[str]) -> int:
    """The command line; gives the exit code."""
    screen = Screen()
    try:
        # Python reads arguments by the locale; here they are UTF-8, as in XML-RPC. Names of files may be
        # any bytes.
        errors = 'surrogateescape' if argv[1:2] in (['put'], ['get']) else 'replace'
        return run([os.fsencode(word).decode('utf-8', errors) for word in argv], screen)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (agent.AgentError, protocol.ProtocolError) as error:
        screen.complain(str(error))
        return 1
    except BrokenPipeError:
        # Who reads us has gone; what is still in the buffer has no reader either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except OSError as error:           # a full disk behind standard output, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        screen.complain('%s' % error)
        return OURS


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
