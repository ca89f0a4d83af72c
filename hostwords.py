"""What the host does with each word that a guest says.

What it is not: an authority on what a guest says. Nothing that a guest sends is evaluated, or used as a
path; texts are bounded, numbers finite.

Threads: all runs on ``link``, one word at a time; but who is let in by first use joins on ``first-use-1``,
and news of terminals are heard on ``broker``. One lock, held for a word, or for one that joins, keeps these
apart.
"""

import logging
import threading
import time
from typing import Any, Callable, Dict, Optional

import protocol
from faults import Busy
from hostcommands import CALLED_OFF, UNFINISHED, Commands, has_more_output, read_results
from hostcontrol import Control
from hostfollow import Follows
from hostguests import Guests
from hostinput import Inputs
from hostjournal import Journal, JournalError
from hostlink import Connection
from hostmachines import Machines
from hostoutput import Fetcher
from hosttrust import FirstUses, Refusal, Session, Trust, read_name
from protocol import Message
from rpc import finite

log = logging.getLogger('vmhost')

SHOWN_UNKNOWN = 100            # unknown words that are logged at INFO: a guest may send thousands


class Words:
    """Hears words: ``hear`` takes a frame, a ``heard_`` method each word.

    acknowledge    has a CMD_ACK sent for (id of the guest, cmd-id), once its results are on the disk
    """
    side = 'host'

    def __init__(self, connection: Connection, trust: Trust, guests: Guests, machines: Machines,
                 journal: Journal, commands: Commands, control: Control, inputs: Inputs, follows: Follows,
                 fetcher: Fetcher, acknowledge: Callable[[Any], None]) -> None:
        self.unknown = 0                       # messages that were no word for a host
        self._connection = connection
        self._trust = trust
        self._guests = guests
        self._machines = machines
        self._journal = journal
        self._commands = commands
        self._control = control
        self._inputs = inputs
        self._follows = follows
        self._fetcher = fetcher
        self._acknowledge = acknowledge
        self.first_uses = FirstUses(trust, journal, self._join_newcomer, self._refuse)
        self._lock = threading.Lock()          # see above

    def hear(self, frame: Any) -> None:
        """One MESSAGE. What isn't a word, or isn't signed, is counted and dropped; ACKed all the same."""
        with self._lock:
            self._hear(frame)

    def hear_news(self, frame: Any) -> bool:
        """The same for a CMD_STATUS that somebody at the command's terminal waits for, on ``broker``.

        That is a change of threads less. False where nobody waits, or something else is being heard.
        """
        index = frame.headers.get('cmd-id', ''), frame.headers.get('from', '')     # as it claims
        if not self._follows.is_watched(index) or not self._lock.acquire(False):
            return False
        try:
            self._hear(frame)
            return True
        finally:
            self._lock.release()

    def _hear(self, frame: Any) -> None:
        connection, sender, address = '', frame.headers.get('from', ''), ''
        try:
            connection, sender, address = self._connection.origin(frame.headers)
            if frame.body.startswith('HELLO') and 'mac' not in frame.headers:
                self._hear_hello(frame, connection, sender, address)
            else:
                self._hear_signed(frame, connection, sender)
        except protocol.BadWord as error:
            self._drop(str(error), sender)
        except (protocol.Untrusted, JournalError, Busy) as error:
            self._trust.drop(sender, error)
            self.unknown += 1
            if self._trust.sessions.of(sender) is None:     # it may have one of this host's run before
                self._connection.call_the_roll(connection)

    def _hear_signed(self, frame: Any, connection: str, sender: str) -> None:
        topic, body = frame.headers.get('destination', ''), frame.body.encode('utf-8')
        headers, proved = self._trust.check(sender, connection, topic, frame.headers, body)
        if proved is not None:
            self._join(proved)
        headers['from'] = sender
        protocol.hear(self, protocol.interpret(headers, frame.body, topic))

    def _hear_hello(self, frame: Any, connection: str, sender: str, address: str) -> None:
        """Anybody can say HELLO: a guest that hasn't proved itself by it is greeted, and pinged."""
        if not self._trust.sessions.may_begin(sender, connection, time.monotonic()):
            raise protocol.Untrusted('too many HELLOs')
        hello = protocol.interpret(frame.headers, frame.body, frame.headers.get('destination', ''))
        if self._trust.is_vm_to_find(sender):
            self._machines.look_for(sender, connection)
            return
        try:
            session = self._trust.begin(sender, hello, len(frame.body), connection)
            self._guests.check_share(sender, address)
        except (Refusal, JournalError, Busy) as why:
            self._trust.refused(sender, why)
            self._connection.refuse(sender, connection, str(why))
            return
        session.address = address
        if session.proved:
            self._join(session)
        elif session.is_told:
            self.first_uses.add(session)
        else:
            self._machines.greet(session, self._machines.name_of(sender))
            self._connection.say_in(session, protocol.PING.howToSay(sender, 'session'))

    def _join_newcomer(self, session: Session) -> None:
        with self._lock:
            try:
                self._join(session)
            except (protocol.BadWord, JournalError, Busy) as error:    # the next one's turn
                self._trust.drop(session.id, error)

    def _refuse(self, session: Session, why: str) -> None:
        self._trust.refused(session.id, why)
        self._connection.refuse(session.id, session.connection, why)

    def heard_hello(self, message: Message) -> None:
        """The same once more, signed: what came before may have been said by somebody else on the broker."""
        session = self._trust.sessions.of(message.headers['from'])
        if session is not None:
            session.hello = message
            self._join(session)

    def _join(self, session: Session) -> None:
        """A guest has proved who it is: listed, and its commands compared with ours."""
        hello = session.hello
        self._connection.proved(session)
        name = read_name(hello.text('name')) or read_name(hello.text('host')) or session.id
        guest = self._machines.join(
            session.id, name, ip=session.address or hello.text('ip')[:64], boot=hello.text('boot')[:64],
            session=hello.text('session')[:64], clock_offset=clock_offset(hello),
            facts=dict(read_facts(hello), **({} if session.secret else {'unsigned': True})))
        if not session.name:               # another goes on; the guest may know this one's nonce alone
            self._machines.greet(session, guest.name)
        listed = hello.get('cmds')
        if isinstance(listed, dict):
            self._control.reconcile(guest, {cmd_id: str(state) for cmd_id, state in listed.items()})
        else:
            for execution in self._commands.open_of(guest.id):   # too many for a HELLO; the answers tell
                self._control.query(execution)
        self._inputs.joined(guest.id)
        self._follows.joined(guest.id)

    def heard_aint(self, message: Message) -> None:
        """An unknown word, or one that isn't for a host."""
        self._drop('%.40r' % message.word, message.headers.get('from', ''))

    def _drop(self, what: str, sender: str) -> None:
        self.unknown += 1
        log.log(logging.INFO if self.unknown <= SHOWN_UNKNOWN else logging.DEBUG,
                'AINT from %.80r: %s', sender, what)

    def _sender(self, message: Message, load: Optional[Dict[str, float]] = None) -> str:
        """The id of who said it, which counts as a beacon."""
        sender = message.headers['from']
        if not self._guests.heard(sender, load):
            self._connection.call_the_roll()
        return sender

    # Who is there.

    def heard_bye(self, message: Message) -> None:
        """A guest goes; its commands stay as they are."""
        guest = self._guests.gone(message.headers['from'])
        if guest is not None:
            reason = read_name(message.text('reason'))
            log.info('%s left: %s', guest.name, reason)
            if self._guests.should_note(guest):
                self._journal.note('guest-bye', guest.name, '', reason, durable=False)

    def heard_still_alive(self, message: Message) -> None:
        """A beacon, with the load."""
        sender = self._sender(message, {name: message.number(name) for name in (
            'load1', 'mem_free', 'disk_free', 'running', 'uptime') if message.get(name) is not None})
        if 'timestamp' in message.keys:        # a header of that name may be a broker's
            self._guests.set_clock_offset(sender, clock_offset(message))

    def heard_pong(self, message: Message) -> None:
        """An answer to PING, from whom it was sent to."""
        sender = self._sender(message)
        self._control.answers.arrived((message.text('ping-id'), sender), message)

    # Commands.

    def heard_cmd_status(self, message: Message) -> None:
        """How far a command is; ``unknown`` where the guest never heard of it, or no longer knows."""
        index = message.text('cmd-id'), self._sender(message)
        state = message.text('state')
        execution = self._commands.find_open(*index)
        if execution is not None:
            self._control.found(execution)
            was_running = execution.state == 'running'
            self._commands.heard_status(execution, state, message)
            if state == 'unknown' and was_running:
                self._commands.lose(execution, 'the guest no longer knows this command: '
                                    'its disk was lost, or restored from an earlier state')
            elif state == 'unknown':
                self._control.publish(execution)
        elif state in UNFINISHED:
            self._control.recall_if_over(*index, state=state)
        self._control.answers.arrived(index, message)
        if execution is not None:
            self._inputs.heard(execution, message)
            self._follows.heard(index, message)

    def heard_cmd_results(self, message: Message) -> None:
        """The end of a command: journalled, then acknowledged; once more where it came before."""
        sender = self._sender(message)
        results = read_results(message)
        cmd_id = results['cmd-id']
        fetched = not has_more_output(results)
        execution = self._commands.find_open(cmd_id, sender)
        if execution is not None:
            self._control.found(execution)
        if execution is None or not self._commands.finish(execution, results, fetched):
            execution = self._commands.finished(cmd_id, sender)
            if execution is None:
                self._keep_orphan(cmd_id, sender, results)
                return
            if execution.state in CALLED_OFF and results['state'] not in CALLED_OFF:
                self._commands.correct(execution, results, fetched)
        self._control.answers.arrived((cmd_id, sender), message)
        self._follows.heard((cmd_id, sender), message)
        if execution.fetched:
            self._acknowledge((sender, cmd_id))
        else:
            self._fetcher.begin(execution)

    def _keep_orphan(self, cmd_id: str, sender: str, results: Dict[str, Any]) -> None:
        """Nobody here asked for these results: perhaps an earlier journal's host did."""
        noted = self._guests.may_be_noted(sender)
        if self._commands.keep_orphan(cmd_id, sender, self._machines.name_of(sender), results, noted):
            self._acknowledge((sender, cmd_id))


def read_facts(message: Message) -> Dict[str, Any]:
    """What a guest says about itself, bounded."""
    facts = {name: finite(message.get(name)) for name in ('proto', 'cpus', 'mem')}     # type: Dict[str, Any]
    for name in ('host', 'os', 'python', 'version'):
        value = message.get(name)
        facts[name] = value[:200] if isinstance(value, str) else ''
    facts['marks'] = message.get('marks') is True
    chirp = message.get('chirp')
    port = finite(chirp.get('port') if isinstance(chirp, dict) else chirp)
    facts['chirp'] = {'port': port} if port else {}
    if port and isinstance(chirp, dict) and chirp.get('tls') is True:
        facts['chirp']['tls'] = True
    return {name: value for name, value in facts.items() if value}


def clock_offset(message: Message) -> float:
    """Guest's clock less ours, in seconds, as far as a message on its way can tell."""
    try:
        return round(message.number('timestamp', time.time()) - time.time(), 3)
    except protocol.BadWord:
        return 0.0
