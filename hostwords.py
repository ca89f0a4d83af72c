"""What the host does with each word that a guest says.

What it is not: an authority on what a guest says. Nothing that a guest sends is evaluated, or used as a
path; texts are bounded, numbers finite.

Threads: all runs on ``link``, one word at a time. No locks.
"""

import logging
import time
from typing import Any, Callable, Dict, Optional

import protocol
from hostcommands import CALLED_OFF, Commands, has_more_output, read_results
from hostcontrol import Control
from hostguests import Guests
from hostjournal import Journal
from hostlink import Connection
from hostmachines import Machines
from hostoutput import Fetcher
from hosttrust import read_id, read_name
from protocol import Message

log = logging.getLogger('vmhost')

SHOWN_UNKNOWN = 100            # unknown words that are logged at INFO: a guest may send thousands


class Words:
    """Hears words: ``hear`` takes a frame, a ``heard_`` method each word.

    acknowledge    has a CMD_ACK sent for (id of the guest, cmd-id), once its results are on the disk
    """
    side = 'host'

    def __init__(self, connection: Connection, guests: Guests, machines: Machines, journal: Journal,
                 commands: Commands, control: Control, fetcher: Fetcher,
                 acknowledge: Callable[[Any], None]) -> None:
        self.unknown = 0                       # messages that were no word for a host
        self._connection = connection
        self._guests = guests
        self._machines = machines
        self._journal = journal
        self._commands = commands
        self._control = control
        self._fetcher = fetcher
        self._acknowledge = acknowledge

    def hear(self, frame: Any) -> None:
        """One MESSAGE. What isn't a word is counted and dropped; ACKed all the same."""
        try:
            message = protocol.interpret(frame.headers, frame.body, frame.headers.get('destination', ''))
            protocol.hear(self, message)
        except protocol.BadWord as error:
            self._drop(str(error), frame.headers.get('from', ''))

    def heard_aint(self, message: Message) -> None:
        """An unknown word, or one that isn't for a host."""
        self._drop('%.40r' % message.word, message.headers.get('from', ''))

    def _drop(self, what: str, sender: str) -> None:
        self.unknown += 1
        log.log(logging.INFO if self.unknown <= SHOWN_UNKNOWN else logging.DEBUG,
                'AINT from %.80r: %s', sender, what)

    def _sender(self, message: Message, load: Optional[Dict[str, float]] = None) -> str:
        """The id of who said it, which counts as a beacon. With the embedded broker, the policy wrote it."""
        sender = self._sender_id(message)
        if not self._guests.heard(sender, load):
            self._connection.call_the_roll()
        return sender

    def _sender_id(self, message: Message) -> str:
        sender = message.headers.get('from') or (
            '' if self._connection.policy is not None else message.text('id'))
        return read_id(sender)

    # Who is there.

    def heard_hello(self, message: Message) -> None:
        """A guest is there: listed, greeted, and its commands compared with ours."""
        machine_id, ip = read_id(message.text('id')), message.text('ip')[:64]
        if self._connection.policy is not None:
            machine_id = self._sender_id(message)
            ip = self._connection.policy.address_of(machine_id)
        name = read_name(message.text('name')) or read_name(message.text('host')) or machine_id
        guest = self._machines.join(
            machine_id, name, ip=ip, boot=message.text('boot')[:64], session=message.text('session')[:64],
            facts=read_facts(message), clock_offset=clock_offset(message))
        if isinstance(message.get('cmds'), dict):
            self._control.reconcile(guest, message.mapping('cmds'))
        else:
            for execution in self._commands.open_of(guest.id):   # too many for a HELLO; the answers tell
                self._control.query(execution)

    def heard_bye(self, message: Message) -> None:
        """A guest goes; its commands stay as they are."""
        guest = self._guests.gone(self._sender_id(message))
        if guest is not None:
            reason = read_name(message.text('reason'))
            log.info('%s left: %s', guest.name, reason)
            self._journal.note('guest-bye', guest.name, '', reason)

    def heard_still_alive(self, message: Message) -> None:
        """A beacon, with the load."""
        self._sender(message, {name: message.number(name) for name in (
            'load1', 'mem_free', 'disk_free', 'running', 'uptime') if message.get(name) is not None})

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
        elif state in ('queued', 'running', 'stopped'):
            self._control.recall_if_called_off(*index)
        self._control.answers.arrived(index, message)

    def heard_cmd_results(self, message: Message) -> None:
        """The end of a command: journalled, then acknowledged; once more where it came before."""
        sender = self._sender(message)
        results = read_results(message)
        cmd_id = results['cmd-id']
        execution = self._commands.find_open(cmd_id, sender)
        if execution is not None:
            self._control.found(execution)
            self._commands.finish(execution, results, fetched=not has_more_output(results))
        else:
            execution = self._commands.finished(cmd_id, sender)
            if execution is None:
                self._commands.keep_orphan(cmd_id, sender, self._machines.name_of(sender), results)
            elif execution.state in CALLED_OFF and results['state'] not in CALLED_OFF:
                self._commands.correct(execution, results, fetched=not has_more_output(results))
        self._control.answers.arrived((cmd_id, sender), message)
        if execution is None or execution.fetched:
            self._acknowledge((sender, cmd_id))
        else:
            self._fetcher.begin(execution)


def read_facts(message: Message) -> Dict[str, Any]:
    """What a guest says about itself, bounded."""
    facts = {}  # type: Dict[str, Any]
    for name in ('proto', 'host', 'os', 'python', 'version', 'cpus', 'mem', 'chirp'):
        value = message.get(name)
        if isinstance(value, (str, int, float)):
            facts[name] = value[:200] if isinstance(value, str) else value
        elif name == 'chirp' and isinstance(value, dict):
            facts[name] = {'port': value.get('port', 0)}
    return facts


def clock_offset(message: Message) -> float:
    """Guest's clock less ours, in seconds, as far as a message on its way can tell."""
    try:
        return round(message.number('timestamp', time.time()) - time.time(), 3)
    except protocol.BadWord:
        return 0.0
