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
import importlib
import json
import logging
import os
import platform
import re
import select
import signal
import socket
import sys
import threading
import time
from typing import Any, Dict, List, Optional, Tuple

import agent
import protocol
from guestforks import ForkServer
from guestmachine import Network, memory, read_boot_id, uptime
from guestprocesses import live_usage, signal_session
from guestrunner import FIRST_STATUS, drain
from guestspool import (
    FORMAT,
    LARGEST_PROGRESS,
    Command,
    Spool,
    describe_error,
    folder_name,
    private,
    reserve,
    unrun_result,
)
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
        'auth': (agent.choice('address', 'ticket'), 'address'), 'user': (agent.text, 'nobody')},
    'Logging': agent.LOGGING,
}  # type: Dict[str, Any]


# --- the agent -------------------------------------------------------------------------------

FILES_PATIENCE = 3.0           # seconds that HELLO waits for chirp_server, so that it can tell of it
FILES_STOP = 1.0               # seconds that the Chirp server has for its end
RESEND_EVERY = 30.0            # seconds between two sendings of results that nobody acknowledged
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
        """Begins to look for the broker. Raises AgentError where the served folder can't be used."""
        if not os.path.isdir(self.root):
            raise agent.AgentError('[VM] dir_to_serve %s is no folder' % self.root)
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise agent.AgentError('[VM] dir_to_serve %s can\'t be written by this user: change its owner or '
                                   'mode, or name another folder' % self.root)
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
        except agent.AgentError as error:
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
        self.files = chirpreal.RealChirpServer(self.root, self.ip, port, allowed, auth=settings.auth,
                                               user=settings.user)
        self.files.begin(self._files_listen, FILES_PATIENCE)

    def _files_port(self) -> int:
        """Where files are served; 0: nowhere, or not yet."""
        return self.files.address[1] if self.files is not None else 0

    def _files_listen(self) -> None:
        """The host should know. On the thread ``chirp-watch``."""
        if self.link.up and self._told_port != self._files_port():
            self._say_hello()

    def _admit(self, message: Message) -> None:
        """The greeting's part for files: where the host is, if not at the broker, and its key."""
        import chirpwire
        if self.files is None:
            return
        addresses = [as_text('addresses', value) for value in message.sequence('addresses')]
        if addresses:
            self.files.allow(addresses)
        ticket = message.text('chirp-ticket')
        if ticket and self.settings.Chirp.auth == 'ticket':
            try:
                self.files.set_ticket(ticket)
            except chirpwire.ChirpError as error:
                raise protocol.BadWord('HELLO: chirp-ticket: %s' % error)

    # Running.

    def _open_spool(self) -> None:
        """Finds what earlier agents left. Raises AgentError."""
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
    except agent.AgentError as error:
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
        raise agent.AgentError(guest.restart)
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
