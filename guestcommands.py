"""The commands of a guest: what is done about each.

The one place that decides whether a command begins, is cancelled, signalled, lost or acknowledged. What it is
not: the table of commands with their states (guesttable.py), who runs one (guestrunner.py), what its folder
holds (guestspool.py), how it is told to the host (guestreports.py).

Threads: the link's thread brings what the host asks for, the main thread what time and the runners bring.
They meet in the table, which has a lock; one here guards when the next look is due, and one the refusals.
"""

import collections
import contextlib
import logging
import signal
import threading
import time
from typing import Any, Callable, Dict, Iterable, Optional

import agent
from guestconsole import Consoles
from guestforks import ForkServer
from guestreports import Reports
from guestrequests import read_request, signal_number
from guestspool import Command, Spool, describe_error, is_want, unrun_result
from gueststart import ENDING
from guesttable import Table, is_held
from protocol import BadWord, Message

RESEND_EVERY = 30.0            # seconds between two sendings of results that nobody acknowledged
START_PATIENCE = 10.0          # seconds after which a runner that shows nothing is asked for again
POLL = 1.0                     # seconds between looks at commands that runners can't report
HOLD = 5.0                     # seconds for the host to say what it still wants of an earlier agent's queue
REFUSALS_KEPT = 10000
DELETED = 'its spool folder was deleted before it was seen to begin'

log = logging.getLogger('vmguest')


class Commands:
    """All commands of one agent that aren't acknowledged yet."""

    def __init__(self, settings: Any, root: str, boot: str, spool: Spool, fork_server: ForkServer,
                 reports: Reports, consoles: Consoles, look_by: Callable[[float], None],
                 restart: Callable[[str], None]) -> None:
        """``settings``: [VM]. ``root``: where commands start. ``boot``: see read_boot_id.

        look_by(moment)     has the main thread call ``look`` by then
        restart(why)        has the agent begin anew, as another process image
        """
        self._settings = settings
        self._root = root
        self._boot = boot
        self._spool = spool
        self._fork_server = fork_server
        self._reports = reports
        self._consoles = consoles
        self._look_by = look_by
        self._restart = restart
        self._refusals = Refusals(reports, spool.folder)
        self.name = ''                 # of this guest, as programs are told it
        self._table = Table(settings.max_commands)
        self._lock = threading.Lock()  # guards the next line
        self._next_look = time.monotonic()
        self._troubles = agent.Seldom(log)     # a disk that is full stays so for many looks

    # What was there before.

    def load(self) -> None:
        """Finds what earlier agents left; what is unfinished goes on, or is lost. Raises AgentError."""
        for command in self._spool.load():
            if command.state != 'acknowledged':
                self._table.add(command)
                if not command.has_ended():
                    self._take_up(command)
        self._begin_waiting()
        self.tidy_groups()

    def tidy_groups(self) -> None:
        """Removes control groups whose commands have ended, once the processes have that these left."""
        self._fork_server.place.sweep(self._spool.folder, self._is_over)

    def _is_over(self, name: str) -> bool:
        """Whether the command with a folder of that name has no runner any more."""
        command = self._table.of_folder(name)
        return command is None or command.has_ended()

    def _take_up(self, command: Command) -> None:
        if command.request.get('boot') != self._boot:
            self._lose(command, why_of_boot(command))
        elif command.is_running() and not command.runner_lives():
            self._lose_unless_ended(command)
        else:
            log.info('%s: goes on', command.cmd_id)
            command.signals += command.due_signals()
            if signal.SIGKILL in command.sent_signals():       # noted; perhaps it wasn't sent any more
                command.signals.append(signal.SIGKILL)

    # What the host asks for, on the link's thread.

    def run(self, message: Message) -> None:
        """CMD_RUN: claims the spool folder, and has it run; or answers for what was claimed before."""
        cmd_id = message.text('cmd-id')
        if not cmd_id:
            raise BadWord('CMD_RUN: no cmd-id')
        if self._refusals.answer_again(cmd_id):
            return
        try:
            command = self._accept(cmd_id, message)
        except OSError as error:
            if is_want(error):              # the host sends it again, as nobody answers
                log.warning('%s can\'t be taken now: %s', cmd_id, describe_error(error))
                return
            self._refusals.refuse(cmd_id, error)
            self._look_by(time.monotonic() + POLL)
            return
        if command is None:
            try:
                self._answer_again(cmd_id, message)
            except OSError as error:        # then the host asks once more
                log.error('%s: %s', cmd_id, describe_error(error))
            return
        self._table.add(command)
        if command.has_ended():
            self._send_results(command)
            return
        self._begin_waiting()
        if command.state == 'queued':
            self._reports.status(command)
        self._look_by(time.monotonic() + POLL)
        log.info('%s: asked for', cmd_id)       # after it has begun: somebody waits

    def _accept(self, cmd_id: str, message: Message) -> Optional[Command]:
        """The command, its request written down; None where there is such a folder. Raises OSError."""
        try:
            request, failure = read_request(message, self._settings), ''
        except BadWord as error:
            request, failure = {}, 'EINVAL: %s' % error
        command = self._claim(cmd_id, request)
        if command is not None and failure:
            command.end('failed', failure)
            command.state = 'failed'
        return command

    def _claim(self, cmd_id: str, request: Dict[str, Any]) -> Optional[Command]:
        """The same for a request that was read; nothing is left where it can't be written. Raises OSError."""
        command = self._spool.claim(cmd_id)
        if command is None:
            return None
        try:
            request.update({'boot': self._boot, 'root': self._root, 'name': self.name})
            command.write_request(request, self._spool.clock.now())
        except OSError:
            command.discard()
            raise
        return command

    def _answer_again(self, cmd_id: str, message: Message) -> None:
        """For a command whose folder is there: status or results, once more; it isn't run.

        Where it was another command, as its host has forgotten that, nobody gets the other one's results.
        """
        command = self._find(cmd_id)
        if command is not None and command.is_another(message, self._settings):
            self._reports.bare_results(cmd_id, unrun_result(
                'failed', 'EEXIST: another command had this id here, and has not been forgotten yet'))
            return
        if command is None:
            self._reports.bare_results(cmd_id, unrun_result(
                'lost', 'it was begun before, and isn\'t run again; its results were acknowledged and '
                'deleted, or its spool folder was damaged'))
        elif command.has_result():
            self._send_results(command)
        else:
            self._reports.status(command)

    def _find(self, cmd_id: str) -> Optional[Command]:
        """A command that has files in the spool, acknowledged or not, and that the host asks for."""
        command = self._table.find(cmd_id)
        if command is not None and is_held(command):
            command.held_until = 0.0
            self._begin_waiting()
        return command or self._spool.find(cmd_id)

    def joined(self, is_listed: bool) -> None:
        """The host is there, and says what it wants of what is_held; ``is_listed``: it was told of that."""
        for command in filter(is_held, self._table.all()):
            command.held_until = time.monotonic() + HOLD
            if not is_listed:
                self._reports.status(command)

    def query(self, message: Message) -> None:
        """CMD_QUERY: how far it is, with slices of its output where they are asked for."""
        cmd_id, mark = message.text('cmd-id'), message.text('mark')
        marked = {'mark': mark} if mark else {}        # what the answer is known by
        command = self._find(cmd_id)
        if command is None:
            self._reports.unknown(cmd_id, **marked)
        else:
            self._notice_begin(command)
            tell_end(command, self._send_results, bool(mark))
            if not self._consoles.query(command, message):
                self._reports.status(command, **marked, **self._reports.slices(command, message))

    def input(self, message: Message) -> None:
        """CMD_INPUT: the next piece of a streamed input, or the size of a terminal."""
        self._consoles.input(self._find(message.text('cmd-id')), message)

    def signal(self, message: Message) -> None:
        """CMD_SIGNAL: to all processes of a command, as soon as it has any.

        One that would end it cancels what hasn't begun. With ``cancel``, what this guest was never asked for
        is cancelled, too: it won't run any more, should that word still be on its way.
        """
        number = signal_number(message.text('signal', 'TERM'))
        cmd_id = message.text('cmd-id')
        command = self._table.find(cmd_id)
        why = 'ECANCELED: signal %d before it began' % number
        if command is None and message.flag('cancel'):
            self._cancel_before_it_comes(cmd_id, why)
        if command is None or command.has_ended():
            return
        log.info('%s: signal %d', cmd_id, number)
        try:
            if number in ENDING and self._take_back(command, 'cancelled', why, by='signalCmd'):
                return
        except OSError as error:                # somebody made its folder unreadable: it gets the signal
            log.error('%s can\'t be cancelled: %s', cmd_id, describe_error(error))
        with contextlib.suppress(OSError):      # of a full disk: then the result doesn't tell who sent it
            command.note_signal(number)
        command.signals.append(number)
        command.deliver()
        command.note_due()

    def _cancel_before_it_comes(self, cmd_id: str, why: str) -> None:
        """Notes the end of a command of which nothing but the id is known, unless there was one."""
        try:
            command = self._claim(cmd_id, {})
            if command is not None:
                command.end('cancelled', why, by='signalCmd')
                command.state = 'cancelled'
                self._table.add(command)
                self._send_results(command)
        except OSError as error:
            log.error('%s can\'t be cancelled: %s', cmd_id, describe_error(error))

    def _take_back(self, command: Command, state: str, error: str, **more: Any) -> bool:
        """Ends a command that hasn't begun, so that no runner will take it; False where one has it.

        Whoever claims it first decides. Raises OSError where it can't be claimed.
        """
        claim = self._table.take_back(command, state)
        if claim is None:
            return False
        with claim:             # until there is a result: else its runner would seem to have been killed
            command.end_anyhow(state, error, **more)
        self._send_results(command)
        return True

    def acknowledge(self, message: Message) -> None:
        """CMD_ACK: the host has the results; they stay for keep_spool, and then go: with ``forget`` now."""
        cmd_id, forget = message.text('cmd-id'), message.flag('forget')
        command = self._table.find(cmd_id)
        self._refusals.acknowledge(cmd_id)
        if command is None:
            if forget:
                self._spool.let_go(cmd_id)
            return
        if not command.has_ended():
            return
        try:
            command.acknowledge(self._spool.clock.now())
        except OSError as error:
            self._troubles.warn('acknowledge', '%s: acknowledged, but %s', cmd_id, describe_error(error))
            return              # it is sent again, and acknowledged again
        self._table.remove(command)
        log.info('%s: acknowledged', cmd_id)
        if forget:
            self._spool.let_go(cmd_id)

    # What the agent asks.

    def states(self) -> Dict[str, str]:
        """{cmd-id: state} of all that aren't acknowledged. From any thread."""
        return self._table.states()

    def count_unended(self) -> int:
        """How many haven't ended. From any thread."""
        return sum(not command.has_ended() for command in self._table.all())

    def resend(self, sent: float) -> None:
        """Has the next look believe that the results were last sent at ``sent``. From any thread."""
        for command in self._table.all():
            command.sent = sent
        with self._lock:
            self._next_look = 0.0
        self._refusals.resend(sent)
        self._look_by(0.0)

    # What the clock and the runners bring, on the main thread.

    def due(self) -> Optional[float]:
        """When ``look`` is due, by the monotonic clock; None: not before something happens."""
        if not self._table.all() and not self._refusals.are_unacknowledged():
            return None
        with self._lock:
            return self._next_look

    def look(self, now: float, reported: Iterable[str]) -> None:
        """``reported``: folders whose runners say that something happened; see ForkServer.reported."""
        for line in reported:
            try:
                self._look_at_reported(line)
            except OSError as error:        # the next look at all tries again
                log.error('%s: %s', line.partition(' ')[0], describe_error(error))
        with self._lock:
            is_due = now >= self._next_look
            if is_due:
                self._next_look = now + POLL
        if is_due:
            self._look_at_all(now)
            self._begin_waiting()

    def _look_at_reported(self, line: str) -> None:
        name, _, told = line.partition(' ')
        command = self._table.of_folder(name)
        if command is None:
            return
        command.remember(told)
        if command.has_result():
            self._send_results(command)
            self._begin_waiting()
        else:
            self._notice_begin(command)
            command.deliver()
            self._reports.status(command)

    def _look_at_all(self, now: float) -> None:
        """Looks at each command that isn't over; sends again what nobody acknowledged."""
        for command in self._table.all():
            try:
                self._look_at(command, now)
            except OSError as error:        # a full disk, say: the others' turn comes all the same
                self._troubles.warn('look', '%s: %s', command.cmd_id, describe_error(error))
        self._refusals.look(now)
        if not self._spool.is_there():
            self._restart('the spool %s was deleted: what ran is lost' % self._spool.folder)
        if not self._fork_server.lives():
            self._restart('the fork server died')

    def _look_at(self, command: Command, now: float) -> None:
        """Sends its result, or sees to it that there will be one. Raises OSError."""
        state = command.state           # as it was: another thread may put it back into the queue meanwhile
        if state == 'queued':
            if not self._expire(command) and command.was_deleted():
                self._lose(command, DELETED)
        elif command.has_result():
            if now - command.sent >= RESEND_EVERY or not command.sent:
                self._send_results(command)
        elif command.request.get('boot') != self._boot:
            self._lose(command, why_of_boot(command))
        elif command.has('runner'):
            self._look_after(command, now)
        elif state != 'starting':       # its program deleted its spool folder, say
            if command.end_what_is_left():
                self._lose(command, 'its spool folder was deleted, and its runner was killed')
        elif now - command.begun > START_PATIENCE:
            if command.was_deleted():
                self._lose(command, DELETED)
            else:
                self._order_runner(command)     # not put back: the first one may just be slow

    def _expire(self, command: Command) -> bool:
        """Whether it is too late for a command that hasn't begun. Raises OSError."""
        expires = command.request.get('expires-at')
        return bool(expires and self._spool.clock.now() >= expires) and self._take_back(
            command, 'expired', 'ETIME: it had not begun within %.3g s' % command.request['expires'])

    def _look_after(self, command: Command, now: float) -> None:
        """A command that runs: its runner may have been killed, its status or a signal be due."""
        if not command.runner_lives():
            self._lose_unless_ended(command)
            return
        command.continue_runner()
        self._notice_begin(command)
        command.deliver()
        interval = command.request.get('status-interval', 0)
        if interval and now - command.told >= interval and command.is_running():
            self._reports.status(command)

    # The way of a command.

    def _begin_waiting(self) -> None:
        """Has those begun whose turn it is. From any thread."""
        for command in self._table.take_turns():
            self._start(command)

    def _start(self, command: Command) -> None:
        log.debug('%s: begins', command.cmd_id)
        if not self._expire(command) and not self._order_runner(command):
            self._table.put_back(command)      # the next look tries again

    def _order_runner(self, command: Command) -> bool:
        """False where there is no room for one more runner now."""
        command.begun = time.monotonic()
        try:
            return self._fork_server.run(command.folder)
        except ConnectionError:
            self._restart('the fork server died')
            return True

    def _notice_begin(self, command: Command) -> None:
        """Sees whether a command that a runner has runs, or is stopped."""
        if command.is_running() and command.process():
            command.note_runner()
            self._table.note_begin(command, command.read_state())

    def _lose_unless_ended(self, command: Command) -> None:
        """For a runner that is gone: its result may have been its last deed. Raises OSError."""
        if not command.has_result():
            and_all = '; its processes were, too' if command.group() is not None else \
                '; and so were its processes, as far as they were found'
            self._lose(command, 'its runner was killed' + (and_all if command.end_processes() else ''))

    def _lose(self, command: Command, why: str) -> None:
        """Its result is sent by the next look."""
        log.warning('%s: lost: %s', command.cmd_id, why)
        command.end_anyhow('lost', why)
        self._table.end(command, 'lost')

    def _send_results(self, command: Command) -> None:
        """Of a command that has a result.json. Raises OSError; then the next look tries again."""
        is_first = not command.has_ended() or not command.sent
        result = command.sound_result()
        command.sent = time.monotonic()
        self._table.end(command, result['state'])
        self._reports.results(command, result)
        log.log(logging.INFO if is_first else logging.DEBUG, '%s: %s', command.cmd_id, result['state'])


def tell_end(command: Command, send: Callable[[Command], None], is_about_signal: bool) -> None:
    """Sends the results of what has just ended before who asks is answered; where that may be about a signal
    also what another thread is sending now."""
    is_known = command.has_ended() and not (is_about_signal and command.state != 'acknowledged')
    with contextlib.suppress(OSError):      # the next look tries again
        if command.has_result() and not is_known:
            send(command)


def why_of_boot(command: Command) -> str:
    """Why a command of no boot, or of another one, is lost."""
    return 'the guest was rebooted' if 'boot' in command.request else \
        'the guest was rebooted, or its disk has lost what was written of it'


class Refusals:
    """Commands that can't be written down, as the disk is full: they never run, and fail with that error.
    From any thread."""

    def __init__(self, reports: Reports, folder: str) -> None:
        """``folder``: the spool's, where there is no room."""
        self._reports = reports
        self._folder = folder
        self._lock = threading.Lock()          # guards what follows
        self._refusals = collections.OrderedDict()     # type: Any     # {cmd-id: Refusal}

    def refuse(self, cmd_id: str, error: OSError) -> None:
        """Has a command fail."""
        if error.filename is None:
            error = OSError(error.errno, error.strerror, self._folder)
        log.error('%s can\'t be taken: %s', cmd_id, error)
        refusal = Refusal(cmd_id, unrun_result('failed', describe_error(error)))
        with self._lock:
            self._refusals[cmd_id] = refusal
            if len(self._refusals) > REFUSALS_KEPT:
                del self._refusals[next(iter(self._refusals))]
        self._send(refusal)

    def answer_again(self, cmd_id: str) -> bool:
        """Sends the result of a command that was refused once more; False where it wasn't."""
        with self._lock:
            refusal = self._refusals.get(cmd_id)
        if refusal is not None:
            self._send(refusal)
        return refusal is not None

    def acknowledge(self, cmd_id: str) -> None:
        """The host has the result, if there is one; the refusal stays, for words that come again."""
        with self._lock:
            if cmd_id in self._refusals:
                self._refusals[cmd_id].acked = True

    def are_unacknowledged(self) -> bool:
        """Whether the host still lacks a result."""
        with self._lock:
            return any(not refusal.acked for refusal in self._refusals.values())

    def resend(self, sent: float) -> None:
        """Has ``look`` believe that the results were last sent at this monotonic time."""
        with self._lock:
            for refusal in self._refusals.values():
                refusal.sent = sent

    def look(self, now: float) -> None:
        """Sends again what nobody acknowledged for a while."""
        with self._lock:
            due = [refusal for refusal in self._refusals.values()
                   if not refusal.acked and now - refusal.sent >= RESEND_EVERY]
        for refusal in due:
            self._send(refusal)

    def _send(self, refusal: 'Refusal') -> None:
        refusal.sent = time.monotonic()
        self._reports.bare_results(refusal.cmd_id, refusal.result)


class Refusal:
    """The result of a command that couldn't be written down."""

    def __init__(self, cmd_id: str, result: Dict[str, Any]) -> None:
        self.cmd_id = cmd_id
        self.result = result
        self.sent = 0.0                # monotonic: when it was last sent
        self.acked = False
