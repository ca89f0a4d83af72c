"""The host agent: puts the parts together, and says what each word does.

What it is not: a broker (stompbroker.py), a file server (chirp.py), or an authority on what a guest
says: nothing that a guest sends is evaluated, or used as a path.

Threads: ``main`` ticks the clock; ``link`` is the STOMP connection, where all words are heard;
``vbox`` owns VirtualBox; ``xmlrpc`` accepts, with a thread per request; ``fetch-N`` fetch output;
the broker has its own. Signal handlers set an event, and nothing else.
"""

import base64
import contextlib
import json
import logging
import os
import secrets
import select
import socket
import sqlite3
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import agent
import chirpclient
import chirpwire
import protocol
import stompbroker
from faults import (
    AgentNotConnected,
    BadState,
    Busy,
    DeadlineExceeded,
    InvalidParams,
    NoFiles,
    NoSuchVM,
    TransferError,
    VMHostError,
)
from hostapi import XMLRPCServer, shown_entry
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
        self.journal.event('host-start', text='vmhost %s, pid %d' % (agent.VERSION, os.getpid()))
        log.info('vmhost %s runs as pid %d: XML-RPC on %s:%s, broker on %s:%s, hypervisor %s, '
                 'state in %s', agent.VERSION, os.getpid(), *(self.server.address + address + (
                     self.hypervisor_name, os.path.abspath(self.folder.path))))

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
        return chirpclient.ChirpClient(address, port, CHIRP_TIMEOUT)

    def list_dir(self, vm: str, path: str) -> List[Dict[str, Any]]:
        """What is in a folder of a VM. Raises TransferError, NoSuchVM, AgentNotConnected."""
        try:
            with self.chirp_client(self.connected(vm)) as client:
                return [shown_entry(entry) for entry in sorted(client.ls(path))]
        except (chirpwire.ChirpError, OSError) as error:
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
