"""The host agent: puts the parts together, runs its clock, starts and stops it all.

What it is not: a broker (stompbroker.py), the API (hostapi.py), or what any word does (hostwords.py).

Threads: ``main`` runs the clock. ``link`` is the STOMP connection, where all words are heard; ``xmlrpc``
accepts calls, with a thread per connection; ``transfers``, ``transfer-N``, ``fetch-N``, ``name-lookup-1`` and
``acknowledge-1`` work in the background; broker and hypervisor have their own. No locks.
"""

import contextlib
import logging
import os
import secrets
import select
import socket
import sys
import time
from typing import Any, Dict, Optional, Tuple

import agent
import protocol
import stompbroker
from hostcommands import Commands
from hostconfig import read_settings
from hostcontrol import Control
from hostguests import Guests
from hostinput import Inputs
from hostjournal import Journal, JournalError
from hostleases import Leases
from hostlink import Connection, server_tls
from hostmachines import Machines
from hostoutput import Fetcher, Output
from hostserver import Server, why_open_to_all
from hostshortcut import Feed
from hoststate import StateFolder
from hosttransfers import Transfers
from hosttrust import Secrets, Trust
from hostwords import Words
from hostworkers import Batch

log = logging.getLogger('vmhost')

LOG = 'vmhost.log'             # the file in the state folder for the log of an agent that nobody hears
BROKER_ADDRESS = 'broker.address'      # the file that tells where the broker is
TICK = 0.25                    # seconds between looks at the clock
SLEPT = 5.0                    # seconds that a tick may be late before the host is said to have slept,
                               # or half of vm_gc_grace, where that is less
RETENTION_PAUSE = 1.0          # seconds between two slices of a look for what keep_results no longer keeps
CLOCK_JUMPED = 60.0            # seconds by which a clock that is set right as ever doesn't jump
DOUBT = 3600.0                 # seconds without deletion after the clock jumped: it may be wrong
ACK_DELAY = 0.02               # seconds in which results gather that one sync serves


class Host:
    """The parts of a running host. ``start``, ``run``, ``stop``: on the main thread.

    The API finds here what it serves; a part gets what it needs as arguments.
    """

    def __init__(self, settings: Any) -> None:
        """Raises VMHostError where state folder or journal can't be used."""
        self.settings = settings
        self.started = time.monotonic()
        self.server: Optional[Server] = None
        self.is_ending = False                         # set by ``end``
        self.folder = StateFolder(settings.Host.state_dir)
        if self.folder.size('xmlrpc.token') and not self.folder.size('journal.sqlite'):
            log.warning('%s is gone, or empty: what it knew of commands, and the secrets of guests, is lost; '
                        'a new one begins', self.folder.file('journal.sqlite'))
        self.token = secrets.token_urlsafe(24)         # a new one at each start
        self.folder.write('xmlrpc.token', self.token)
        self.journal = Journal(self.folder.file('journal.sqlite'))
        self.folder.make_private()
        self.guests = Guests(settings.Host.vm_gc_grace)
        for known in self.journal.guests():
            self.guests.remember(*known)
        self.commands = Commands(self.journal)
        self.trust = Trust(Secrets(self.journal), self.guests, settings.Host)
        self.connection = Connection(settings, self.trust, lambda frame: self.words.hear(frame),
                                     self.guests.forgive, lambda frame: self.words.hear_news(frame))
        say = self.connection.say
        self.machines = Machines(self.guests, self.commands, self.journal, self.connection, self.trust)
        self.leases = Leases(self.folder, self.machines, self.journal)
        self.control = Control(self.commands, self.guests, self.machines, say, settings.Broker.max_frame)
        self.fetcher = Fetcher(self.commands, self.machines, say, self.folder, settings.Host.fetch_limit)
        self.output = Output(self.fetcher, self.control, self.machines)
        self.inputs = Inputs(self.commands, self.control, say, settings.Broker.max_frame,
                             lambda execution: Feed(self.connection, execution))
        self.transfers = Transfers(self.machines, self.journal, settings.Host.max_transfers)
        # A moment later: one sync serves all that came meanwhile, and who waits for results gets them first.
        self.acknowledgements = Batch('acknowledge', self._acknowledge, before=ACK_DELAY)
        self.words = Words(self.connection, self.trust, self.guests, self.machines, self.journal,
                           self.commands, self.control, self.inputs, self.output.follows, self.fetcher,
                           self.acknowledgements.add)
        self.clock = Clock(self)

    def start(self) -> None:
        """Starts everything. Raises VMHostError, ConfigError or ProtocolError with a sentence."""
        self.machines.start_hypervisor(self.settings, self.folder.path)
        host = self._broker_host()
        self.connection.start(host, self.folder.port('broker', host, self.settings.Broker.port))
        self.folder.write(BROKER_ADDRESS, '%s:%s' % self.connection.address)
        self.folder.keep_port('broker', self.connection.address[1])
        self.transfers.tell_of_lost()
        self.server = Server(self)
        self.server.start()
        self.journal.event('host-start', text='vmhost %s, pid %d' % (agent.VERSION, os.getpid()))
        log.info('vmhost %s started, pid %d: XML-RPC on %s:%s, broker on %s:%s, hypervisor %s, state in %s',
                 agent.VERSION, os.getpid(), *self.server.address, *self.connection.address,
                 self.machines.hypervisor_name, os.path.abspath(self.folder.path))

    def _broker_host(self) -> str:
        """Broker.host=auto: the host-only interface's address, or loopback without one."""
        configured, hypervisor = self.settings.Broker.host, self.machines.hypervisor
        if configured != 'auto':
            return configured
        if hypervisor is not None and self.settings.Network.mode == 'hostonly':
            return hypervisor.broker_address() or '127.0.0.1'
        return '127.0.0.1'

    def end(self, why: str, level: int = logging.INFO) -> None:
        """Has ``run`` return within a tick, and says so in the log. Any thread may call."""
        if not self.is_ending:
            log.log(level, 'vmhost ends: %s', why)
        self.is_ending = True

    def run(self, ended: socket.socket) -> None:
        """Ticks until ``ended`` can be read, or ``is_ending`` is set. Raises VMHostError when the embedded
        broker has failed: a host agent that guests can't reach had better be started again."""
        while not self.is_ending:
            if select.select([ended], [], [], TICK)[0]:
                return self.end(agent.signal_of(ended))
            self.connection.check_broker()
            try:
                self.clock.tick()
            except Exception:       # the agent lives on, whatever one tick met
                log.exception('in the tick')

    def stop(self) -> None:
        """Stops in the order XML-RPC, workers, link, broker, hypervisor; then nothing of it is left."""
        self.journal.stop_waits()
        if self.server is not None:
            self.server.stop()
        self.transfers.stop(time.monotonic() + 1.0)
        self.leases.stop(time.monotonic() + 1.0)
        self.fetcher.stop(time.monotonic() + 1.0)
        self.acknowledgements.stop(time.monotonic() + 0.5)
        self.words.first_uses.stop(time.monotonic() + 0.5)
        self.machines.stop(time.monotonic() + 0.5)
        self.connection.stop()
        if self.machines.hypervisor is not None:
            self.machines.hypervisor.close()
        with contextlib.suppress(JournalError):
            self.commands.write_states()
            self.journal.event('host-stop')
        self.journal.close()
        with contextlib.suppress(OSError):     # the last thing: who waits for our end looks for this file
            os.remove(self.folder.file(BROKER_ADDRESS))
        self.folder.close()

    def _acknowledge(self, journalled: Dict[Any, None]) -> None:
        """Says CMD_ACK for results, once they are on the disk. On ``acknowledge-1``."""
        try:
            self.commands.write_orphans()
            self.journal.sync()
        except JournalError as error:
            log.error('%d results are not acknowledged: %s', len(journalled), error)
            return                  # the guests send them again
        for vm_id, cmd_id in journalled:
            self.connection.say(protocol.CMD_ACK.howToSay(vm_id, cmd_id))


PROGRAM = os.path.dirname(os.path.abspath(__file__))       # the folder of this code, or the bundle


def identity_of(path: str) -> Tuple[int, ...]:
    """What is another one where a file was replaced, () where it is gone; a folder stays itself."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return (found.st_ino, found.st_size, found.st_mtime_ns) if os.path.isfile(path) else (found.st_ino,)


class Clock:
    """What time brings: liveness, publishing again, giving up what is missing, retention. On ``main``."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._last_tick = time.monotonic()
        self._last_clock = time.time()
        self._retention_every = agent.look_every(host.settings.Host.keep_results)
        self._next_retention = self._last_tick + self._first_retention()
        self._program = identity_of(PROGRAM)

    def _first_retention(self) -> float:
        """Seconds until something may be deleted: more where the clock may be wrong since the last run."""
        away = time.time() - self._host.journal.last_time()
        if away < DOUBT:
            return self._retention_every
        log.info('the journal ended %.0f s ago, or the clock is wrong: nothing is deleted for %.0f s',
                 away, DOUBT)
        return DOUBT

    def tick(self) -> None:
        """Called every TICK seconds."""
        host, now = self._host, time.monotonic()
        if self._has_slept(now):
            host.leases.forgive()
            host.guests.forgive()
        elif host.connection.is_down:
            host.guests.forgive()
        host.leases.tick()
        if self._is_idle(now):
            host.end('nothing to do for %.0f s ([Host] idle_end)' % host.settings.Host.idle_end)
        elif host.settings.Host.idle_end and self._program != identity_of(PROGRAM):
            host.end('%s was removed or replaced; whoever needs one starts it' % PROGRAM, logging.WARNING)
        with host.journal.best_effort():
            host.commands.write_states()
        host.control.publish_due()
        host.inputs.tick()
        self._judge_liveness()
        with host.journal.best_effort():
            host.control.give_up_missing()
            host.control.give_up_expired()
            if now >= self._next_retention:
                self._delete_old(now)

    def _has_slept(self, now: float) -> bool:
        """Whether this process, or its machine, was stopped since the last call."""
        clock, passed = time.time(), now - self._last_tick
        jump = clock - self._last_clock - passed
        self._last_tick, self._last_clock = now, clock
        if jump > CLOCK_JUMPED:
            log.warning('the clock jumped ahead by %.0f s: nothing is deleted for %.0f s', jump, DOUBT)
            self._next_retention = max(self._next_retention, now + DOUBT)
        return max(passed, jump) > min(SLEPT, self._host.settings.Host.vm_gc_grace / 2)

    def _is_idle(self, now: float) -> bool:
        """Whether nobody asked for anything for idle_end, and nothing that was asked for goes on."""
        host, limit = self._host, self._host.settings.Host.idle_end
        if not limit or host.server is None or now - host.server.asked < limit:
            return False
        hypervisor = host.machines.hypervisor
        return not (host.leases.count() or host.transfers.are_under_way()
                    or hypervisor is not None and hypervisor.under_way()
                    or any(host.control.shown_state(execution) != 'stopped' for guest in host.guests.on_list()
                           if host.machines.can_answer(guest.id)
                           for execution in host.commands.open_of(guest.id)))

    def _judge_liveness(self) -> None:
        for guest, liveness in self._host.guests.tick(self._host.machines.is_suspended):
            log.info('%s is %s', guest.name, liveness)
            self._host.journal.note('guest-' + liveness, guest.name, '',
                                    'nothing heard for %.0f s' % (time.monotonic() - guest.heard),
                                    durable=False)

    def _delete_old(self, now: float) -> None:
        """Deletes a slice of what keep_results no longer keeps."""
        self._next_retention = now + self._retention_every
        keep = self._host.settings.Host.keep_results
        count, all_gone = self._host.commands.forget_before(time.time() - keep)
        if count:
            log.info('%d results older than keep_results deleted', count)
            self._host.fetcher.sweep()
        if not all_gone:
            self._next_retention = now + RETENTION_PAUSE


def run_host(ini: Optional[str]) -> int:
    """Runs the host agent in the foreground until it is told to end; gives the exit code.

    It ends by SIGTERM, Ctrl-C, Ctrl-Break, the method stopHost, and the end of the session on Windows.
    ini    None: on the defaults
    """
    host = session = None
    try:
        settings = read_settings(ini)
        check_settings(settings)
        agent.set_up_logging(settings.Logging, os.path.join(settings.Host.state_dir, LOG))
        sys.setswitchinterval(agent.SWITCH_INTERVAL)
        host = Host(settings)
        ended = agent.catch_signals()
        if os.name == 'nt':
            import windows  # there alone
            session = windows.SessionEnd(lambda: host.end('Windows asked for that'))
        host.start()
        host.run(ended)
        return 0
    except (agent.AgentError, stompbroker.BrokerError, protocol.ProtocolError) as error:
        complain(agent.naming_file(ini, error), ini)
        return 1
    except OSError as error:           # the state folder's disk is full, say
        complain(agent.sentence(error), ini)
        return 1
    finally:
        if host is not None:
            host.stop()
        if session is not None:
            session.close()


def check_settings(settings: Any) -> None:
    """That the values go together, and their files are there, before anything is made. Raises VMHostError or
    ConfigError."""
    refusal = why_open_to_all(settings.Host)
    if refusal:
        raise agent.ConfigError(refusal)
    if settings.Broker.embedded:
        server_tls(settings.Broker)
    elif settings.Broker.tls:
        agent.client_tls(settings.Broker.ca_file)


def complain(why: str, ini: Optional[str]) -> None:
    """Tells why there is no host agent, also where nobody hears it."""
    print('vmhost: %s' % why, file=sys.stderr)
    if not agent.IS_HEARD:
        if not logging.getLogger().handlers:   # not known where it would be logged
            beside = os.path.join(os.path.dirname(os.path.abspath(ini or LOG)), LOG)
            agent.set_up_logging(agent.read_settings(None, {'Logging': agent.LOGGING}).Logging, beside)
        log.error('%s', why)
