"""The commands: the record of what was asked for, how far it is, and how it ended.

What it is not: what is said to guests to get there (hostcontrol.py).

Threads: any thread may call. One lock guards the tables of unfinished and recent executions; the journal is
never called while it is held.
"""

import base64
import binascii
import collections
import logging
import secrets
import shlex
import threading
import time
from typing import Any, Callable, Container, Dict, List, Optional, Tuple

import agent
import protocol
from faults import AlreadyExists, BadState, InvalidParams, NoSuchCommand
from hostguests import Guest
from hostjournal import FINISHED, ROWS_AT_ONCE, Execution, Journal, JournalError
from protocol import Message
from rpc import finite

log = logging.getLogger('vmhost')

RETRY_DELAYS = (5, 10, 20, 40, 60)     # seconds between publications of a CMD_RUN; the last repeats
ORPHANS_KEPT = 5000                    # results that nobody here asked for, …
ORPHANS_OF_ONE = 100                   # … of one guest, …
ORPHAN_LARGEST = 16 * 1024             # … with no more than that, written as JSON, else …
ORPHAN_TEXT = 500                      # … so many characters of each text
ORPHANS_AT_ONCE = 1000                 # that wait to be journalled
TRIM_ORPHANS = ('DELETE FROM orphans WHERE rowid IN (SELECT rowid FROM orphans WHERE %s '
                'ORDER BY received DESC LIMIT -1 OFFSET ?)')
LINE_SHOWN = 1000                      # characters of command and arguments that a list shows
FINISH_PATIENCE = 5.0                  # seconds for another thread to set what it has journalled
UNFINISHED = ('queued', 'running', 'stopped')  # states that a guest tells of a command before its end
CALLED_OFF = ('cancelled', 'expired')  # ends that the host may decide without the guest
LARGEST_CODE = 255                     # of an exit, or a signal: guests are POSIX systems
ENDED_BY = ('itself', 'timeout', 'signalCmd', 'oom', 'other')
LONGEST_STATUS = 1000                  # characters of a progress or an error of a running command
RECENT_KEPT = 100                      # executions that ended, and are remembered as they are …
RECENT_LARGEST = 16 * 1024             # … with no more than that of results, written as JSON


def log_submitted(cmd_id: str, target: str, client: str) -> None:
    """Says who asked for a command: once it was sent, for the log is no part of the way."""
    log.info('%s: asked for on %s by %s', cmd_id, agent.printable(target), client)


class Commands:
    """What was asked for, and how far it is. Safe from any thread.

    The unfinished executions are in memory, everything is in the journal; a change is journalled
    before anybody hears of it.
    """

    def __init__(self, journal: Journal, clock: Callable[[], float] = time.monotonic) -> None:
        self._journal = journal
        self._clock = clock
        # Guards the tables below. The journal is called with the lock released.
        self._lock = threading.Lock()
        self._open = {}                # type: Dict[Tuple[str, str], Execution]
        self._by_key = {}              # type: Dict[str, Execution]
        self._orphans = {}             # type: Dict[Tuple[str, str], Tuple]
        self._unwritten = {}           # type: Dict[Tuple[str, str], Execution]
        # Of what ended last: its results are asked for next.
        self._recent = collections.OrderedDict()  # type: collections.OrderedDict[str, Execution]
        for execution in journal.executions('ended = 0'):
            if execution.expires:
                execution.deadline = clock() + execution.expires - time.time()
            self._keep(execution)
            if execution.state in ('queued', 'sent'):
                execution.next_publish = clock()       # an earlier host may have died before it was

    def _keep(self, execution: Execution) -> None:
        self._open[execution.index] = execution
        self._by_key[execution.key] = execution

    def new(self, request: Dict[str, Any], target: str, multicast: bool, guests: List[Guest], client: str,
            away: Container[Guest] = (), cmd_id: str = '',
            targets: Container[str] = ()) -> Tuple[str, List[Execution]]:
        """Journals a command before anything else is done with it. Raises JournalError, AlreadyExists.

        away      those of the guests for which it waits, since their agents aren't connected
        cmd_id    the caller's own; where it is known already, there is nothing to execute
        targets   see is_repeated: another caller may have come with that id a moment ago
        """
        cmd_id = cmd_id or time.strftime('%Y%m%d-%H%M%S-', time.gmtime()) + secrets.token_hex(4)
        asked, submitted, life = self._clock(), time.time(), request['options'].get('expires', 0)
        expires = life and submitted + life
        cmd, line = well_formed(request['cmd']), command_line(request)
        executions = [Execution(cmd_id, guest.id, guest.name, multicast, cmd,
                                'queued' if guest in away else 'sent', submitted, expires=expires,
                                line=line) for guest in guests]
        with self._journal.writing() as journal:
            if not journal.execute('INSERT OR IGNORE INTO commands VALUES (?, ?, ?, ?, ?, ?)', cmd_id, target,
                                   int(multicast), protocol.write_json(request), submitted, client).rowcount:
                executions = []
            for execution in executions:
                journal.add_execution(execution)
            if executions:
                journal.event('cmd-submitted', target, cmd_id, 'by %s: %s' % (client, line))
        if not executions:
            self.is_repeated(cmd_id, request, targets or (target,))
        with self._lock:
            for execution in executions:
                execution.status = {'in-offset': 0}        # no earlier host has sent any input
                execution.deadline = asked + life if life else None
                self._keep(execution)
                if execution.state == 'queued':
                    execution.next_publish = self._clock()     # as soon as its agent is there
        return cmd_id, executions

    def is_repeated(self, cmd_id: str, request: Dict[str, Any], targets: Container[str]) -> bool:
        """Whether that very command was submitted under that id before. Raises AlreadyExists for another."""
        command = self._journal.command(cmd_id)
        if command is None:
            return False
        same = command['target'] in targets and command['request'] == \
            protocol.read_json(protocol.write_json(request))
        if not same:
            raise AlreadyExists('the id %s was given to another command, on %s' % (cmd_id, command['target']))
        return True

    def published(self, execution: Execution) -> None:
        """It was sent; when to send it again, should the guest not answer."""
        with self._lock:
            delay = RETRY_DELAYS[min(execution.attempts, len(RETRY_DELAYS) - 1)]
            execution.attempts += 1
            execution.next_publish = self._clock() + delay
            if execution.state == 'queued':
                execution.state = 'sent'
                self._unwritten[execution.index] = execution

    def due(self) -> List[Execution]:
        """What should be sent by now: for the first time, or again, since the guest didn't answer."""
        now = self._clock()
        with self._lock:
            return [execution for execution in self._open.values()
                    if execution.next_publish is not None and execution.next_publish <= now]

    def request(self, cmd_id: str) -> Dict[str, Any]:
        """What was asked for. Raises NoSuchCommand."""
        command = self._journal.command(cmd_id)
        if command is None:
            raise NoSuchCommand('no command %.100s' % cmd_id)
        return command

    def may_return(self, execution: Execution) -> bool:
        """Whether it may go on in a VM that died, once that is set back to a snapshot."""
        return bool(self.request(execution.cmd_id)['request']['options'].get('mayReturn'))

    def is_known(self, cmd_id: str) -> bool:
        """Whether the journal holds a command of that id."""
        return self._journal.command(cmd_id) is not None

    def expired(self) -> List[Execution]:
        """What should have begun by now, and may not have."""
        with self._lock:
            return [execution for execution in self._open.values()
                    if execution.state in ('queued', 'sent') and self.time_left(execution) <= 0]

    def time_left(self, execution: Execution) -> float:
        """Seconds within which it has to begin, whoever sets the machine's clock meanwhile; infinity: no
        limit."""
        return float('inf') if execution.deadline is None else execution.deadline - self._clock()

    def open_of(self, vm_id: str) -> List[Execution]:
        """The unfinished executions on that VM."""
        with self._lock:
            return [execution for execution in self._open.values() if execution.vm_id == vm_id]

    def open_ones(self) -> List[Execution]:
        """All unfinished executions."""
        with self._lock:
            return list(self._open.values())

    def waiting_for(self, vm: str) -> List[Execution]:
        """Those that were not sent yet to the VM of that name, whatever its id was when they came."""
        with self._lock:
            return [execution for execution in self._open.values()
                    if execution.vm == vm and execution.state == 'queued']

    def move(self, execution: Execution, vm_id: str) -> None:
        """Journals an execution under another id of its VM, unless it has ended. Raises JournalError."""
        before = execution.vm_id
        try:
            with self._journal.writing() as journal:       # ``finish`` waits, and takes the new id
                if not journal.execute('UPDATE OR IGNORE executions SET vm_id = ? WHERE cmd_id = ? '
                                       'AND vm_id = ? AND ended = 0', vm_id, *execution.index).rowcount:
                    return
                self._set_id(execution, vm_id)
        except JournalError:
            self._set_id(execution, before)
            raise
        log.info('%s: %s is %s now, it was %s', execution.key, execution.vm, vm_id, before)

    def _set_id(self, execution: Execution, vm_id: str) -> None:
        with self._lock:
            before, execution.vm_id = execution.index, vm_id
            for table in self._open, self._unwritten:
                if table.pop(before, None) is not None:
                    table[execution.index] = execution

    def find_open(self, cmd_id: str, vm_id: str) -> Optional[Execution]:
        """The unfinished execution of that command on that VM."""
        with self._lock:
            return self._open.get((cmd_id, vm_id))

    def find(self, key: str) -> List[Execution]:
        """One execution; of a multicast's own id, all of them. Raises NoSuchCommand."""
        with self._lock:
            execution = self._by_key.get(key) or self._recent.get(key)
        if execution is not None:
            return [execution]
        cmd_id, at, vm = key.partition('@')
        if at:
            found = self._journal.executions('cmd_id = ? AND vm = ? AND multicast = 1', cmd_id, vm) or [
                orphan for name in (cmd_id, key) for orphan in self._journal.orphans(name)
                if orphan.key == key]
        else:
            found = self._journal.executions('cmd_id = ?', cmd_id) or self._journal.orphans(cmd_id)
        if not found and not (self._journal.command(cmd_id) and not at):
            raise NoSuchCommand('no command %.100s' % key)
        return [self._now(execution) for execution in found]

    def _now(self, execution: Execution) -> Execution:
        """What was read from the journal, as it is now: the one object of it while it is unfinished.

        The journal knows an end a moment before the table does; it may come after the reading, too.
        """
        if execution.ended:
            return execution
        with self._lock:
            unfinished = self._open.get(execution.index)
        return unfinished or self.finished(*execution.index) or execution

    def find_one(self, key: str) -> Execution:
        """One execution. Raises NoSuchCommand, or InvalidParams for a multicast's own id."""
        executions = self.find(key)
        if len(executions) != 1 or executions[0].key != key:
            raise InvalidParams('%s ran on %d VMs; name one of them as %s@vmName'
                                % (key, len(executions), key))
        return executions[0]

    # What guests say.

    def heard_status(self, execution: Execution, state: str, message: Message) -> None:
        """A CMD_STATUS: remembered."""
        with self._lock:
            if execution.index not in self._open:
                return
            now = self._clock()
            # The results of what has ended come by themselves; unless an earlier state of this journal was
            # restored, and they were acknowledged before: then they are asked for.
            execution.next_publish = None if state not in FINISHED else now + RETRY_DELAYS[0]
            told = read_status(message)
            if execution.status.get('wall') and state == 'running':        # not each one tells it
                told.setdefault('wall', execution.status['wall'] + now - execution.status_time)
            execution.status = dict(execution.status, **told)
            execution.status_time = now
            if state in UNFINISHED and execution.state in ('sent', 'queued', 'running'):
                if state != 'queued' and not execution.runs:
                    execution.runs = True
                    self._unwritten[execution.index] = execution
                execution.state = 'running'    # last: who sees it reads the rest, without the lock

    def write_states(self) -> None:
        """Journals the states that changed since the last call; results don't wait for that."""
        with self._lock:
            changed, self._unwritten = self._unwritten, {}
        if not changed:
            return
        written = []
        try:
            with self._journal.writing() as journal:
                for execution in changed.values():
                    state = 'sent' if execution.state == 'running' and not execution.runs else execution.state
                    if journal.execute('UPDATE executions SET state = ? WHERE cmd_id = ? AND vm_id = ? '
                                       'AND ended = 0', state, *execution.index).rowcount:
                        journal.event('cmd-' + state, execution.vm, execution.key)
                        written.append((execution.key, state))
        except JournalError:
            with self._lock:
                changed.update(self._unwritten)
                self._unwritten = changed          # the next call tries again
            raise
        for key, state in written:
            log.info('%s: %s', key, state)

    def finish(self, execution: Execution, results: Dict[str, Any], fetched: bool) -> bool:
        """Journals the end of an execution, once, then wakes whoever waits. False: it has another end.

        It survives a loss of power from the journal's next ``sync`` on; the guest has it until CMD_ACK.
        """
        with self._lock:
            if self._open.get(execution.index) is not execution:
                return False
        ended, text = time.time(), protocol.write_json(results)
        with self._journal.writing(durable=False) as journal:
            changed = journal.execute(
                'UPDATE executions SET state = ?, ended = ?, results = ?, fetched = ? '
                'WHERE cmd_id = ? AND vm_id = ? AND ended = 0', results['state'], ended, text,
                int(fetched), *execution.index).rowcount
            if changed:
                journal.event('cmd-finished', execution.vm, execution.key, describe_end(results))
        if not changed:
            execution.done.wait(FINISH_PATIENCE)       # another thread was faster, and sets what follows
            return False
        with self._lock:
            execution.results, execution.fetched = text, fetched
            execution.state = results['state']
            execution.ended = ended                    # last: who sees it reads the rest, without the lock
            self._open.pop(execution.index, None)
            self._by_key.pop(execution.key, None)
            self._unwritten.pop(execution.index, None)
            if len(text) <= RECENT_LARGEST:
                self._recent[execution.key] = execution
                if len(self._recent) > RECENT_KEPT:
                    self._recent.popitem(last=False)
        execution.done.set()        # the log comes after it: somebody waits
        log.info('%s: on %s %s', execution.key, execution.vm, describe_end(results))
        return True

    def lose(self, execution: Execution, reason: str) -> None:
        """Ends an execution as lost."""
        self.finish(execution, lost_results(execution.cmd_id, reason), True)

    def call_off(self, execution: Execution, state: str, reason: str, by: str = '') -> None:
        """Ends an execution as cancelled or expired: it is never sent again."""
        self.finish(execution, lost_results(execution.cmd_id, reason, state, by), True)

    def correct(self, execution: Execution, results: Dict[str, Any], fetched: bool) -> None:
        """The truth about an execution that was called off here while its guest had it already."""
        text = protocol.write_json(results)
        with self._journal.writing(durable=False) as journal:
            journal.execute('UPDATE executions SET state = ?, results = ?, fetched = ? WHERE cmd_id = ? AND '
                            'vm_id = ?', results['state'], text, int(fetched), *execution.index)
            journal.event('cmd-corrected', execution.vm, execution.key, describe_end(results))
        execution.state, execution.results, execution.fetched = results['state'], text, fetched
        self._forget_recent()
        log.info('%s: on %s %s, it had begun before it was called off', execution.key, execution.vm,
                 describe_end(results))

    def finished(self, cmd_id: str, vm_id: str) -> Optional[Execution]:
        """The execution of that command on that VM, if it is in the journal and has ended."""
        found = self._journal.executions('cmd_id = ? AND vm_id = ? AND ended > 0', cmd_id, vm_id)
        return found[0] if found else None

    def fetched(self, execution: Execution) -> None:
        """All output is here that ever will be."""
        execution.fetched = True
        with self._journal.writing() as journal:
            journal.execute('UPDATE executions SET fetched = 1 WHERE cmd_id = ? AND vm_id = ?',
                            *execution.index)

    def keep_orphan(self, cmd_id: str, vm_id: str, vm: str, results: Dict[str, Any],
                    noted: bool = True) -> bool:
        """Results of a command that this host never asked for: kept, unless there are too many at once.

        In memory until ``write_orphans``. Of each guest the newest, with the begin of long texts. ``noted``:
        there is an event of it.
        """
        text = protocol.write_json(results)
        if len(text) > ORPHAN_LARGEST:
            text = protocol.write_json({name: value[:ORPHAN_TEXT] if isinstance(value, str) else value
                                        for name, value in results.items() if not name.endswith('64')})
        with self._lock:
            if len(self._orphans) >= ORPHANS_AT_ONCE:
                return False                   # the guest says it again
            row = cmd_id[:200], vm_id, time.time(), text
            self._orphans[row[:2]] = row, noted and (vm, cmd_id[:200], describe_end(results))
            return True

    def write_orphans(self) -> None:
        """Journals those of before. Raises JournalError."""
        with self._lock:
            orphans, self._orphans = self._orphans, {}
        if not orphans:
            return
        with self._journal.writing(durable=False) as journal:
            for row, event in orphans.values():
                journal.execute('INSERT OR REPLACE INTO orphans VALUES (?, ?, ?, ?)', *row)
                if event:
                    journal.event('orphan-result', *event)
            for vm_id in {vm_id for _, vm_id in orphans}:
                journal.execute(TRIM_ORPHANS % 'vm_id = ?', vm_id, ORPHANS_OF_ONE)
            journal.execute(TRIM_ORPHANS % '1', ORPHANS_KEPT)

    # What the API asks.

    def last_ended(self, limit: int) -> List[Execution]:
        """Those that ended last, the newest request last."""
        return self._journal.executions('number IN (SELECT number FROM executions WHERE ended > 0 '
                                        'ORDER BY ended DESC LIMIT ?)', limit)

    def list(self, filter: Dict[str, Any]) -> List[Execution]:
        """Executions, the newest ``limit`` (1000), by vm, state, cmdId and since."""
        columns = {'vm': 'vm = ?', 'state': 'state = ?', 'cmd': 'cmd = ?', 'cmdId': 'cmd_id = ?',
                   'since': 'number >= (SELECT number FROM executions WHERE submitted >= ? '
                            'ORDER BY submitted LIMIT 1)'}
        clauses, values = ['1'], []
        filter = read_filter(filter)
        for name, value in filter.items():
            if name == 'finished':
                # The +: by number, newest first, and not by an index that has to be sorted.
                clauses.append('+ended > 0' if value else 'ended = 0')
            elif name in columns:
                clauses.append(columns[name])
                values.append(value)
        found = self._journal.executions(' AND '.join(clauses), *values, results=False,
                                         limit=int(filter.get('limit', ROWS_AT_ONCE)))
        return [self._now(execution) for execution in found]

    def forget(self, executions: List[Execution]) -> None:
        """Deletes finished executions, and the command with its last one. Raises BadState."""
        for execution in executions:
            if not execution.ended:
                raise BadState('%s is %s; only a finished command can be forgotten'
                               % (execution.key, execution.state))
        with self._journal.writing() as journal:
            for execution in executions:
                journal.execute('DELETE FROM executions WHERE cmd_id = ? AND vm_id = ?',
                                *execution.index)
                journal.execute('DELETE FROM orphans WHERE cmd_id = ? AND vm_id = ?', *execution.index)
                journal.execute('DELETE FROM commands WHERE cmd_id = ? AND cmd_id NOT IN '
                                '(SELECT cmd_id FROM executions)', execution.cmd_id)
                journal.event('cmd-forgotten', execution.vm, execution.key)
                log.info('%s: forgotten', execution.key)
        self._forget_recent()

    def forget_before(self, when: float) -> Tuple[int, bool]:
        """The same for a slice of what ended before that time, as ``Journal.forget_before``."""
        count, all_gone = self._journal.forget_before(when)
        if count:
            self._forget_recent()
        return count, all_gone

    def _forget_recent(self) -> None:
        """From now on what has ended is looked up in the journal: something was deleted there."""
        with self._lock:
            self._recent.clear()

    def count(self) -> int:
        """How many are unfinished."""
        with self._lock:
            return len(self._open)


FILTERS = {'vm': str, 'state': str, 'cmd': str, 'cmdId': str, 'since': (int, float), 'finished': (bool, int),
           'limit': (int, float)}  # type: Dict[str, Any]


def read_filter(filter: Dict[str, Any]) -> Dict[str, Any]:
    """A filter of listCmds; a multicast's ``cmdId@vmName`` as both. Raises InvalidParams."""
    for name, value in filter.items():
        if name not in FILTERS:
            raise InvalidParams('listCmds: no filter %r; there are %s' % (name, ', '.join(FILTERS)))
        is_number = isinstance(value, (int, float))
        if not isinstance(value, FILTERS[name]) or is_number and not -1 <= value <= 2 ** 53:
            raise InvalidParams('listCmds: %s: %.40r' % (name, value))
    cmd_id, at, vm = filter.get('cmdId', '').partition('@')
    return dict(filter, cmdId=cmd_id, vm=vm) if at else filter


def command_line(request: Dict[str, Any]) -> str:
    """Command and arguments as a shell would take them, cut after LINE_SHOWN characters."""
    words = [shlex.quote(word[:LINE_SHOWN + 1]) for word in [request['cmd']] + request['args'][:LINE_SHOWN]]
    line = well_formed(' '.join(words))
    return line if len(line) <= LINE_SHOWN else line[:LINE_SHOWN] + '…'


def well_formed(text: str) -> str:
    """The text as it can be shown: what stands for bytes that aren't UTF-8 is replaced."""
    return text.encode('utf-8', 'replace').decode('utf-8')


def lost_results(cmd_id: str, reason: str, state: str = 'lost', by: str = '') -> Dict[str, Any]:
    """The results of a command of which nothing will ever be heard."""
    return {'cmd-id': cmd_id, 'out': '', 'err': '', 'finished': False, 'exitCodeOrSignal': -1,
            'resources': dict.fromkeys(protocol.RUSAGE_FIELDS, 0), 'state': state,
            'error': reason, 'wall': 0, 'started': 0, 'ended': time.time(), 'out-size': 0,
            'err-size': 0, 'out-offset': 0, 'err-offset': 0, 'out-truncated': False,
            'err-truncated': False, 'spool': '', 'by': by, 'inexact': [], 'left': 0, 'memory-peak': 0,
            'oom-kills': 0, 'clock-set': 0}


def describe_end(results: Dict[str, Any]) -> str:
    """How it ended, in three words."""
    state = results['state']
    if state in ('exited', 'signaled', 'timeout'):
        return '%s %s' % (state, results['exitCodeOrSignal'])
    return '%s: %s' % (state, results.get('error', ''))


def read_status(message: Message) -> Dict[str, Any]:
    """What a CMD_STATUS says of a running command, of the right types, and nothing else."""
    status = {}                        # type: Dict[str, Any]
    for name in ('pid', 'processes', 'wall', 'out-size', 'err-size', 'in-offset'):
        told = message.get(name)
        if told is not None:
            status[name] = finite(told)
    for name in ('state', 'progress', 'error'):
        told = message.get(name)
        if told is not None:
            status[name] = str(told)[:LONGEST_STATUS] if isinstance(told, (str, int, float)) else ''
    usage = message.get('resources')
    if isinstance(usage, dict):
        status['resources'] = {name: finite(usage.get(name)) for name in protocol.RUSAGE_FIELDS
                               if name in usage}
    return status


def read_results(message: Message) -> Dict[str, Any]:
    """The results in a CMD_RESULTS, of the right types, and nothing else. Raises BadWord."""
    state = message.text('state', 'exited' if message.flag('finished') else 'signaled')
    if state not in FINISHED:
        raise protocol.BadWord('CMD_RESULTS: state %.40r' % state)
    number = int(message.number('exitCodeOrSignal', -1))
    if not -1 <= number <= LARGEST_CODE:
        raise protocol.BadWord('CMD_RESULTS: exitCodeOrSignal should be from -1 to %d' % LARGEST_CODE)
    resources = message.mapping('resources')
    results = {'cmd-id': message.text('cmd-id'), 'state': state,
               'finished': message.flag('finished'),
               'exitCodeOrSignal': number,
               'resources': {name: Message('', 'CMD_RESULTS', None, resources).number(name)
                             for name in protocol.RUSAGE_FIELDS}}
    for name in ('out', 'err', 'error', 'spool', 'by'):
        results[name] = message.text(name)
    results['by'] = results['by'] if results['by'] in ENDED_BY else ''
    results['inexact'] = [name for name in message.sequence('inexact') if name in protocol.RUSAGE_FIELDS]
    for name in ('left', 'memory-peak', 'oom-kills'):
        results[name] = int(message.number(name))
    for name in ('wall', 'started', 'ended', 'clock-set'):
        results[name] = message.number(name)
    for stream in ('out', 'err'):
        _read_stream(message, stream, results)
    return results


def _read_stream(message: Message, stream: str, results: Dict[str, Any]) -> None:
    """What CMD_RESULTS says of one stream."""
    exact = message.text(stream + '64')
    if exact:
        try:
            inline = base64.b64decode(exact, validate=True)
        except (ValueError, binascii.Error):
            raise protocol.BadWord('CMD_RESULTS: %s64 is no base64' % stream)
        results[stream + '64'] = exact
    else:
        inline = results[stream].encode('utf-8')
    offset = max(0, int(message.number(stream + '-offset')))
    results[stream + '-offset'] = offset
    results[stream + '-size'] = max(offset + len(inline), int(message.number(stream + '-size')))
    results[stream + '-truncated'] = message.flag(stream + '-truncated')


def has_more_output(results: Dict[str, Any]) -> bool:
    """Whether more was written than came with the results."""
    return bool(results['spool'] and (results['out-offset'] or results['err-offset']))


def inline_output(results: Dict[str, Any], stream: str) -> bytes:
    """The exact bytes of a stream that came with the results."""
    exact = results.get(stream + '64')
    return base64.b64decode(exact) if exact else results[stream].encode('utf-8')
