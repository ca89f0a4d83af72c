"""What is asked of guests: run a command, stop it, tell how far it is; and who waits for the answer.

What it is not: the record of commands and their ends (hostcommands.py), or what guests say (hostwords.py).

Threads: any thread may call. ``Answers`` and ``Control`` have a lock each, for their own tables alone.
"""

import base64
import contextlib
import logging
import math
import secrets
import threading
import time
from fnmatch import fnmatchcase
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import protocol
from faults import AgentNotConnected, BadState, DeadlineExceeded, InvalidParams, NoSuchVM, VMHostError
from hostcommands import CALLED_OFF, Commands, describe_end, log_submitted, well_formed
from hostguests import Guest, Guests
from hostjournal import FINISHED, Execution
from hostmachines import Machines
from protocol import Message

log = logging.getLogger('vmhost')

MISSING_GRACE = 5.0            # seconds to answer for a command that a HELLO doesn't list
REFRESH_TIMEOUT = 2.0          # seconds in which guests tell how far their commands are
FRAME_RESERVE = 16 * 1024      # bytes of a frame that are not the command's own
SIGNALS_KEPT = 10              # of a command that its guest hasn't answered yet
SIGNAL_TIMEOUT = 2.0           # seconds in which a guest answers for a command that is signalled
# Signals that cancel a command that hasn't begun; all others wait for it to begin.
ENDING = frozenset(('TERM', 'KILL', 'INT', 'HUP', 'QUIT', 'ABRT', '15', '9', '2', '1', '3', '6'))
QUEUE = 'the option queue, `run --queue`, lets the command wait for it'


class _Answer:
    """A message that somebody waits for."""

    def __init__(self, matches: Callable[[Message], bool]) -> None:
        self.matches = matches
        self.message = None            # type: Optional[Message]
        self._arrived = threading.Event()

    def give(self, message: Message) -> None:
        self.message = message
        self._arrived.set()

    def wait(self, timeout: float) -> Optional[Message]:
        """The message; None where it is late."""
        self._arrived.wait(timeout)
        return self.message


def matching(pattern: str, guests: List[Guest]) -> List[Guest]:
    """Those whose name or id the glob matches."""
    wanted = pattern.upper() if ':' in pattern else pattern      # a MAC's: no other id or name has one
    return [guest for guest in guests
            if protocol.is_addressed(pattern, guest.id, guest.name) or fnmatchcase(guest.id, wanted)]


def answers_to(mark: str) -> Callable[[Message], bool]:
    """What is the answer to a CMD_QUERY with that mark, or the end of its command. A CMD_STATUS of before
    would seem to be one; '': then any is."""
    return lambda message: not mark or message.word == 'CMD_RESULTS' or message.get('mark') == mark


class Answers:
    """Who waits for which message of a guest. Safe from any thread."""

    def __init__(self) -> None:
        # Guards the table; nothing but ``matches`` is called while it is held.
        self._lock = threading.Lock()
        self._expected = {}            # type: Dict[Tuple[str, str], List[_Answer]]

    @contextlib.contextmanager
    def expected(self, key: Tuple[str, str],
                 matches: Callable[[Message], bool] = lambda message: True) -> Iterator[_Answer]:
        """Within the block, the first message of that key that matches is caught."""
        answer = _Answer(matches)
        with self._lock:
            self._expected.setdefault(key, []).append(answer)
        try:
            yield answer
        finally:
            with self._lock:
                waiting = self._expected[key]
                waiting.remove(answer)
                if not waiting:
                    del self._expected[key]

    def arrived(self, key: Tuple[str, str], message: Message) -> None:
        """Gives a message to those who wait for it."""
        with self._lock:
            answers = [answer for answer in self._expected.get(key, ()) if answer.matches(message)]
        for answer in answers:
            answer.give(message)


class Control:
    """Runs, signals and queries commands. Safe from any thread."""

    def __init__(self, commands: Commands, guests: Guests, machines: Machines,
                 say: Callable[[Message], bool], max_frame: int) -> None:
        self.answers = Answers()
        self._commands = commands
        self._guests = guests
        self._machines = machines
        self._say = say
        self._largest = max_frame - FRAME_RESERVE
        # Guards the table of commands that a HELLO didn't list; nothing is called while it is held.
        self._lock = threading.Lock()
        self._missing = {}             # type: Dict[Tuple[str, str], float]
        self._unanswered = {}          # type: Dict[str, Execution]    # of a guest, what it was waited for last

    def ping(self, vm: str, timeout: float) -> str:
        """'PONG from NAME'. Raises NoSuchVM, AgentNotConnected, DeadlineExceeded."""
        guest = self._machines.connected(vm)
        ping_id = secrets.token_hex(8)
        with self.answers.expected((ping_id, guest.id)) as answer:
            self._say(protocol.PING.howToSay(guest.id, ping_id))
            if answer.wait(timeout) is None:
                raise DeadlineExceeded('%s gave no PONG within %g s' % (guest.name, timeout))
        return 'PONG from %s' % guest.name

    # Run.

    def run(self, vm: str, request: Dict[str, Any], client: str, queue: bool = False,
            cmd_id: str = '') -> str:
        """Journals a command, then sends it. Its cmd-id. Raises NoSuchVM, AgentNotConnected, AlreadyExists.

        queue     where its agent isn't connected, it waits for that
        cmd_id    the caller's own: repeated for the same command, it is answered as the first time
        """
        if cmd_id and self._commands.is_repeated(cmd_id, request, self._names_of(vm)):
            return cmd_id
        guest = self._machines.find(vm)
        if not guest.id:
            raise BadState('%s has no network card, by which its agent would be known' % guest.name)
        is_away = guest.agent == 'lost'
        if is_away and not queue:
            raise AgentNotConnected('the agent of %s is not connected (%s)' % (guest.name, QUEUE))
        self._check_size(request)
        return self._submit(request, guest.name, False, [guest], client, cmd_id, self._names_of(vm))

    def run_on_all(self, pattern: str, request: Dict[str, Any], client: str, queue: bool = False,
                   cmd_id: str = '') -> str:
        """The same on every connected VM whose name or id matches the glob; with ``queue`` on all known ones.

        Raises NoSuchVM, AgentNotConnected, AlreadyExists.
        """
        if cmd_id and self._commands.is_repeated(cmd_id, request, (pattern,)):
            return cmd_id
        guests = matching(pattern, self._machines.all() if queue else self._guests.on_list())
        away = [] if guests or queue else matching(pattern, self._machines.all())
        if away:
            raise AgentNotConnected('of those that match %.100r no agent is connected: %.300s (%s)'
                                    % (pattern, ', '.join(guest.name for guest in away), QUEUE))
        if not guests:
            raise NoSuchVM('no VM matches %.100r' % pattern)
        self._check_size(request)
        return self._submit(request, pattern, True, guests, client, cmd_id)

    def _names_of(self, vm: str) -> Tuple[str, ...]:
        """What a VM may have been called when a command was submitted for it."""
        guest = self._guests.find(vm)
        return (vm,) if guest is None else (vm, guest.name)

    def _submit(self, request: Dict[str, Any], target: str, multicast: bool, guests: List[Guest],
                client: str, cmd_id: str, targets: Tuple[str, ...] = ()) -> str:
        away = {guest for guest in guests if guest.agent == 'lost'}
        cmd_id, executions = self._commands.new(request, target, multicast, guests, client, away, cmd_id,
                                                  targets)
        for execution in executions:
            if execution.state != 'queued':
                self.publish(execution, request)
        log_submitted(cmd_id, target, client)
        return cmd_id

    def _check_size(self, request: Dict[str, Any]) -> None:
        size = len(cmd_run('', '', request).body()) + len(request['cmd']) + len(request['path'])
        if size > self._largest:
            raise InvalidParams('%d bytes of command, arguments, environment and stdin; at most %d '
                                'fit. Send the input as a file (put), and name it (fileForStdin, run -I)'
                                % (size, self._largest))

    def publish(self, execution: Execution, request: Optional[Dict[str, Any]] = None) -> None:
        """Sends a command to its VM, for the first time or again: the guest runs it once."""
        life = self._commands.time_left(execution)
        if life <= 0:
            return                     # give_up_expired ends it
        if request is None:
            request = self._commands.request(execution.cmd_id)['request']
        self._say_signals(execution, True)
        if self._say(cmd_run(execution.vm_id, execution.cmd_id, request, life)):
            log.log(logging.INFO if execution.attempts else logging.DEBUG, '%s: sent to %s%s', execution.key,
                    execution.vm, ' again' if execution.attempts else '')
        self._say_signals(execution, False)
        self._commands.published(execution)

    def _say_signals(self, execution: Execution, ends: bool) -> None:
        """Those again that the guest may never have got; what ``ends`` a command, before the command."""
        for name in execution.signals:
            if (name in ENDING) == ends:
                self._say(protocol.CMD_SIGNAL.howToSay(execution.vm_id, execution.cmd_id, name, ends))

    def publish_due(self) -> None:
        """Sends what is due, where its agent is there."""
        for execution in self._commands.due():
            guest = self._guests.by_id(execution.vm_id)
            if guest is not None and guest.agent != 'lost':
                self.publish(execution)

    def signal(self, executions: List[Execution], name: str) -> bool:
        """Sends a signal to the processes of commands; False where all have ended.

        One of ENDING cancels what hasn't begun, for good: at once where its agent isn't there, and after
        SIGNAL_TIMEOUT where that doesn't answer. Raises BadState or AgentNotConnected for those that it can't
        be sent to, once it was sent to the others; DeadlineExceeded where a guest doesn't answer.
        """
        unfinished = [execution for execution in executions if not execution.ended]
        errors, asked = [], []         # type: List[VMHostError], List[Tuple[Execution, _Answer]]
        with contextlib.ExitStack() as stack:
            for execution in unfinished:
                mark = self._mark_for(execution)
                answer = stack.enter_context(self.answers.expected(execution.index, answers_to(mark)))
                try:
                    if self._signal(execution, name, mark):
                        asked.append((execution, answer))
                except VMHostError as error:
                    errors.append(error)
            deadline = time.monotonic() + SIGNAL_TIMEOUT
            for execution, answer in asked:
                if answer.wait(max(0.0, deadline - time.monotonic())) is None and not execution.ended:
                    try:
                        self._without_answer(execution, name)
                    except VMHostError as error:
                        errors.append(error)
        if errors:
            raise errors[0]
        return not all(met_nobody(execution, name) for execution in unfinished)

    def _mark_for(self, execution: Execution) -> str:
        """A mark for a question, that its answer has, too; '' for a guest that doesn't do that."""
        guest = self._guests.by_id(execution.vm_id)
        return secrets.token_hex(4) if guest is not None and guest.repeats_marks else ''

    def _signal(self, execution: Execution, name: str, mark: str) -> bool:
        """Whether its guest is to answer."""
        is_there = self._machines.can_answer(execution.vm_id)
        begun, ends = has_begun(execution), name in ENDING
        if not is_there and (begun or not ends and execution.state == 'running'):
            raise AgentNotConnected('the agent of %s is not connected' % execution.vm)
        if execution.state == 'queued' and not ends:
            raise BadState('%s waits for the agent of %s, and has no processes yet; TERM or KILL cancel it'
                           % (execution.key, execution.vm))
        log.info('%s: signal %s', execution.key, name)
        if not begun and (name not in execution.signals if ends else len(execution.signals) < SIGNALS_KEPT):
            execution.signals += (name,)        # the guest may never have got the command, nor get this
        self._say(protocol.CMD_SIGNAL.howToSay(execution.vm_id, execution.cmd_id, name,
                                               cancel=ends and not begun))
        if ends and not begun and not (is_there and execution.state != 'queued'):
            self._cancel(execution, name)
        # What comes after the signal is answered after it.
        if execution.state == 'running' or mark and ends and is_there and execution.state == 'sent':
            self.query(execution, **{'mark': mark} if mark else {})
        return (ends or execution.state == 'running') and not execution.ended

    def _without_answer(self, execution: Execution, name: str) -> None:
        """Raises DeadlineExceeded where the signal may be lost."""
        if not has_begun(execution) and name in ENDING:
            self._cancel(execution, name)
            self.recall(execution)      # whoever is there by now
        elif execution.state == 'running':
            raise DeadlineExceeded('the agent of %s did not answer within %g s: whether signal %s came to %s '
                                   'isn\'t known' % (execution.vm, SIGNAL_TIMEOUT, name, execution.key))

    def _cancel(self, execution: Execution, name: str) -> None:
        self._commands.call_off(execution, 'cancelled', 'signal %s before it began' % name, 'signalCmd')

    def give_up_expired(self) -> None:
        """Ends as expired what hasn't begun in time, as far as anybody knows."""
        for execution in self._commands.expired():
            if execution.state == 'sent':
                self.recall(execution)
            self._commands.call_off(execution, 'expired', 'ETIME: it had not begun within %g s'
                                    % round(execution.expires - execution.submitted, 3))

    def recall(self, execution: Execution) -> None:
        """Has a guest end, or not begin, what was called off."""
        self._say(protocol.CMD_SIGNAL.howToSay(execution.vm_id, execution.cmd_id, 'KILL', cancel=True))

    def let_go(self, execution: Execution) -> None:
        """Has a guest delete what it keeps of a command that was forgotten here; who is away does so after
        its keep_spool."""
        self._say(protocol.CMD_ACK.howToSay(execution.vm_id, execution.cmd_id, forget=True))

    # How far it is.

    def query(self, execution: Execution, **keys: Any) -> None:
        """Asks its guest how far a command is."""
        if execution.asked <= execution.status_time:
            execution.asked = time.monotonic()
        self._say(protocol.CMD_QUERY.howToSay(execution.vm_id, execution.cmd_id, **keys))

    def query_running(self, executions: List[Execution]) -> List[Execution]:
        """Queries those that run where somebody can answer; which ones those are."""
        running = [execution for execution in executions
                   if execution.state == 'running' and self._machines.can_answer(execution.vm_id)]
        for execution in running:
            self.query(execution)
        return running

    def refresh(self, executions: List[Execution]) -> None:
        """The same, and waits for the answers: REFRESH_TIMEOUT at most, and only for those whose guests have
        answered before; one that hangs holds nobody up twice, whichever of its commands is asked about."""
        now = time.monotonic()
        waited_for = {execution.index for execution in executions
                      if not self._owes_answer(execution, now)
                      and not self._owes_answer(self._unanswered.get(execution.vm_id), now)}
        with contextlib.ExitStack() as stack:
            answers = {execution.index: stack.enter_context(self.answers.expected(execution.index))
                       for execution in executions}
            for execution in self.query_running(executions):
                if execution.index in waited_for and not answers[execution.index].wait(
                        max(0.0, now + REFRESH_TIMEOUT - time.monotonic())):
                    self._unanswered[execution.vm_id] = execution

    @staticmethod
    def _owes_answer(execution: Optional[Execution], now: float) -> bool:
        """Whether its guest was asked about it long ago, and hasn't answered since."""
        return (execution is not None and not execution.ended and execution.asked > execution.status_time
                and now >= execution.asked + REFRESH_TIMEOUT)

    def shown_state(self, execution: Execution) -> str:
        """The state as a user sees it."""
        if execution.state != 'running':
            return execution.state
        if self._machines.is_suspended(execution.vm):
            return 'suspended'
        # In the guest, behind max_commands others.
        told = execution.status.get('state')
        return told if told in ('queued', 'stopped') else 'running'

    def status(self, execution: Execution) -> Dict[str, Any]:
        """How far it is, as the guest told last; how it ended."""
        status = self._status(execution, execution.ended)
        if status['ended'] != execution.ended:         # meanwhile
            status = self._status(execution, execution.ended)
        return status

    def _status(self, execution: Execution, ended: float) -> Dict[str, Any]:
        """``ended``: when it did; 0: not yet, though it may have by now."""
        told = execution.answer() if ended else execution.status
        age = max(0, time.time() - ended) if ended else \
            time.monotonic() - execution.status_time if execution.status_time else -1
        return {'state': self.shown_state(execution),
                'pid': told.get('pid', 0), 'processes': told.get('processes', 0),
                'wall': told.get('wall', 0), 'resources': told.get('resources', {}),
                'outSize': told.get('out-size', 0), 'errSize': told.get('err-size', 0),
                'progress': execution.status.get('progress', ''), 'error': told.get('error', ''),
                'ended': ended, 'end': describe_end(told) if ended else '', 'age': age}

    # What guests know of it.

    def reconcile(self, guest: Guest, listed: Dict[str, Any]) -> None:
        """Compares the commands that a HELLO lists with ours: what was only sent is sent again, what is over
        here is recalled; and what waits there is told to be wanted."""
        for cmd_id, state in listed.items():
            execution = self._commands.find_open(cmd_id, guest.id)
            if execution is None:
                if state not in FINISHED:
                    self.recall_if_over(cmd_id, guest.id, state)
            elif state == 'queued':
                self._let_begin(execution)
        for execution in self._commands.open_of(guest.id):
            if execution.cmd_id in listed:
                self.found(execution)
            elif execution.state in ('queued', 'sent'):
                self.publish(execution)
            else:
                # Asked once more, since another broker may have turned the order of words round.
                with self._lock:
                    self._missing[execution.index] = time.monotonic() + MISSING_GRACE
                self.query(execution)

    def _let_begin(self, execution: Execution) -> None:
        """A guest has a command that it didn't begin, and that is wanted: it may; or it has begun it before,
        and forgotten that."""
        if execution.runs:
            self._commands.lose(execution, 'the guest has begun this command, and no longer knows that: its '
                                'disk was restored from an earlier state, or copied')
            self.recall(execution)
        else:
            self.query(execution)

    def recall_if_over(self, cmd_id: str, vm_id: str, state: str) -> None:
        """A guest has a command that isn't open here, in that state: its end was decided without it, or the
        guest has forgotten that it ran."""
        execution = self._commands.finished(cmd_id, vm_id)
        if execution is not None and (state == 'queued' or execution.state in CALLED_OFF):
            self.recall(execution)

    def found(self, execution: Execution) -> None:
        """Its guest still knows a command."""
        with self._lock:
            self._missing.pop(execution.index, None)

    def give_up_missing(self) -> None:
        """Ends as lost what a guest didn't list, nor answered for within MISSING_GRACE."""
        now = time.monotonic()
        with self._lock:
            late = [index for index, deadline in self._missing.items() if deadline < now]
        for index in late:
            execution = self._commands.find_open(*index)
            if execution is not None:
                self._commands.lose(execution, 'the guest came back without this command: it was '
                                    'rebooted, or its disk lost or restored from an earlier state')
            with self._lock:
                self._missing.pop(index, None)


def met_nobody(execution: Execution, name: str) -> bool:
    """Whether a KILL came too late: who gets one doesn't exit. Of other signals that can't be told."""
    return name in ('KILL', '9') and bool(execution.ended) and execution.answer()['by'] == 'itself'


def has_begun(execution: Execution) -> bool:
    """Whether its guest has said so: it may still wait there for its turn."""
    return execution.runs or execution.state not in ('queued', 'sent', 'running')


def cmd_run(to: str, cmd_id: str, request: Dict[str, Any], life: float = math.inf) -> Message:
    """The CMD_RUN of a request, which has so many seconds to begin. Bytes that aren't UTF-8 go along in
    base64."""
    options = dict(request['options'])
    options.pop('mayReturn', None)     # this host's business
    if life < math.inf:
        options['expires'] = max(0.001, round(life, 3))
    for name in ('cmd', 'path'):
        if not is_utf8(request[name]):
            options[name + '64'] = to_base64(request[name])
    if not all(map(is_utf8, request['args'])):
        options['args64'] = [to_base64(arg) for arg in request['args']]
    exact = {name: to_base64(value) for name, value in request['env'].items() if not is_utf8(value)}
    if exact:
        options['env64'] = exact
    return protocol.CMD_RUN.howToSay(
        to, cmd_id, well_formed(request['cmd']), [] if 'args64' in options else request['args'],
        {name: value for name, value in request['env'].items() if name not in exact},
        well_formed(request['path']), **options)


def is_utf8(text: str) -> bool:
    """Whether the text stands for itself, and not for bytes that aren't UTF-8."""
    return well_formed(text) == text


def to_base64(text: str) -> str:
    """The bytes that a text stands for (surrogateescape), in base64."""
    return base64.b64encode(text.encode('utf-8', 'surrogateescape')).decode('ascii')
