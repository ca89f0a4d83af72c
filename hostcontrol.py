"""What is asked of guests: run a command, stop it, tell how far it is; and who waits for the answer.

What it is not: the record of commands and their ends (hostcommands.py), or what guests say (hostwords.py).

Threads: any thread may call. ``Answers`` and ``Control`` have a lock each, for their own tables alone.
"""

import contextlib
import logging
import secrets
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import protocol
from faults import AgentNotConnected, BadState, DeadlineExceeded, InvalidParams, NoSuchVM
from hostcommands import Commands, log_submitted, lost_results
from hostguests import Guest, Guests
from hostjournal import Execution
from hostmachines import Machines
from protocol import Message

log = logging.getLogger('vmhost')

MISSING_GRACE = 5.0            # seconds to answer for a command that a HELLO doesn't list
REFRESH_TIMEOUT = 2.0          # seconds in which guests tell how far their commands are
FRAME_RESERVE = 16 * 1024      # bytes of a frame that are not the command's own
SIGNALS_KEPT = 10              # of a command that its guest hasn't answered yet


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

    def run(self, vm: str, request: Dict[str, Any], queue: bool, client: str) -> str:
        """Journals a command, then sends it. Its cmd-id. Raises NoSuchVM, AgentNotConnected."""
        guest = self._machines.find(vm)
        if not guest.id:
            raise BadState('%s has no network card, by which its agent would be known' % guest.name)
        is_away = guest.agent == 'lost'
        if is_away and not queue:
            raise AgentNotConnected('the agent of %s is not connected (queue lets the command wait '
                                    'for it)' % guest.name)
        self._check_size(request)
        cmd_id, executions = self._commands.new(request, guest.name, False, [guest], is_away, client)
        if not is_away:
            self.publish(executions[0], request)
        log_submitted(cmd_id, guest.name, client)
        return cmd_id

    def run_on_all(self, pattern: str, request: Dict[str, Any], client: str) -> str:
        """The same on every connected VM whose name or id matches the glob. Raises NoSuchVM."""
        guests = [guest for guest in self._guests.on_list()
                  if protocol.is_addressed(pattern, guest.id, guest.name)]
        if not guests:
            raise NoSuchVM('no connected VM matches %.100r' % pattern)
        self._check_size(request)
        cmd_id, executions = self._commands.new(request, pattern, True, guests, False, client)
        self._say(cmd_run(pattern, cmd_id, request))
        for execution in executions:
            self._commands.published(execution)
        log_submitted(cmd_id, pattern, client)
        return cmd_id

    def _check_size(self, request: Dict[str, Any]) -> None:
        size = len(cmd_run('', '', request).body()) + len(request['cmd']) + len(request['path'])
        if size > self._largest:
            raise InvalidParams('%d bytes of command, arguments, environment and stdin; at most %d '
                                'fit. Send the input as a file (put), and name it (fileForStdin, run -I)'
                                % (size, self._largest))

    def publish(self, execution: Execution, request: Optional[Dict[str, Any]] = None) -> None:
        """Sends a command to its VM, for the first time or again: the guest runs it once."""
        if request is None:
            request = self._commands.request(execution.cmd_id)['request']
        if self._say(cmd_run(execution.vm_id, execution.cmd_id, request)):
            log.log(logging.INFO if execution.attempts else logging.DEBUG, '%s: sent to %s%s', execution.key,
                    execution.vm, ' again' if execution.attempts else '')
        for name in execution.signals:
            self._say(protocol.CMD_SIGNAL.howToSay(execution.vm_id, execution.cmd_id, name))
        self._commands.published(execution)

    def publish_due(self) -> None:
        """Sends what is due, where its agent is there."""
        for execution in self._commands.due():
            guest = self._guests.by_id(execution.vm_id)
            if guest is not None and guest.agent != 'lost':
                self.publish(execution)

    def signal(self, execution: Execution, name: str) -> bool:
        """Sends a signal to a command's processes; False where it has ended. Raises AgentNotConnected."""
        if execution.ended:
            return False
        if execution.state == 'queued':
            self._commands.finish(execution, dict(
                lost_results(execution.cmd_id, 'signalled before it was sent'), state='failed'), True)
            return True
        if not self._machines.can_answer(execution.vm_id):
            raise AgentNotConnected('the agent of %s is not connected' % execution.vm)
        log.info('%s: signal %s', execution.key, name)
        if execution.state == 'sent' and len(execution.signals) < SIGNALS_KEPT:
            execution.signals += (name,)        # the guest may never have got the command, nor get this
        return self._say(protocol.CMD_SIGNAL.howToSay(execution.vm_id, execution.cmd_id, name))

    # How far it is.

    def query(self, execution: Execution, **keys: Any) -> None:
        """Asks its guest how far a command is."""
        self._say(protocol.CMD_QUERY.howToSay(execution.vm_id, execution.cmd_id, **keys))

    def query_running(self, executions: List[Execution]) -> List[Execution]:
        """Queries those that run where somebody can answer; which ones those are."""
        running = [execution for execution in executions
                   if execution.state == 'running' and self._machines.can_answer(execution.vm_id)]
        for execution in running:
            self.query(execution)
        return running

    def refresh(self, executions: List[Execution]) -> None:
        """The same, and waits for the answers: REFRESH_TIMEOUT at most."""
        deadline = time.monotonic() + REFRESH_TIMEOUT
        with contextlib.ExitStack() as stack:
            answers = {execution.index: stack.enter_context(self.answers.expected(execution.index))
                       for execution in executions}
            for execution in self.query_running(executions):
                answers[execution.index].wait(max(0.0, deadline - time.monotonic()))

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
        told = execution.answer() if execution.ended else execution.status
        age = max(0, time.time() - execution.ended) if execution.ended else \
            time.monotonic() - execution.status_time if execution.status_time else -1
        return {'state': self.shown_state(execution),
                'pid': told.get('pid', 0), 'processes': told.get('processes', 0),
                'wall': told.get('wall', 0), 'resources': told.get('resources', {}),
                'outSize': told.get('out-size', 0), 'errSize': told.get('err-size', 0),
                'progress': execution.status.get('progress', ''), 'error': told.get('error', ''),
                'ended': execution.ended, 'age': age}

    # What guests know of it.

    def reconcile(self, guest: Guest, listed: Dict[str, Any]) -> None:
        """Compares the commands that a HELLO lists with ours: what was only sent is sent again."""
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


def cmd_run(to: str, cmd_id: str, request: Dict[str, Any]) -> Message:
    """The CMD_RUN of a request."""
    return protocol.CMD_RUN.howToSay(to, cmd_id, request['cmd'], request['args'],
                                     request['env'], request['path'], **request['options'])
