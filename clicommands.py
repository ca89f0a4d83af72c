"""The verbs for commands: run them, list and signal them, show what they have written.

What it is not: how output is brought as it comes (clifollow.py), or a terminal (cliterminal.py). No threads,
no locks; while `run` lasts, the signals that would end it are handed on to the command.
"""

import argparse
import contextlib
import fnmatch
import os
import re
import select
import signal
import stat
import sys
import time
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

import agent
from clifollow import PATIENCE, Followed, exit_code, tell_cut
from cliscreen import (
    FIRST,
    WIDE,
    Screen,
    cells,
    has_no_reader,
    naming_output,
    show_one,
    shown_offset,
    shown_size,
    shown_span,
    shown_time,
)
from cliverbs import (
    FAILED,
    ID,
    IDS,
    JSON,
    VMS,
    Verb,
    argument,
    as_in_ini,
    for_each,
    last_heard,
    life,
    read_count,
    read_seconds,
    show_list,
    switch,
)
from faults import AgentNotConnected, BadState, DeadlineExceeded, InvalidParams, NoSuchCommand, NoSuchVM
from hostclient import Client, NoHost, PatientClient
from rpc import Binary, carried, finite

LONGEST_WAIT = 60              # seconds that one call may wait
AWAY = 'lost', 'never'         # how agents are that can't be asked
STREAM = 'stream'              # the option stdin of a command whose input comes bit by bit
SMALL_INPUT = 64 * 1024        # bytes of input that go along with the command …
AT_ONCE = 0.05                 # … if they, and the end, are there within so many seconds
SHELL_OUTPUT = 1024 ** 3       # bytes of a shell's output that are kept
SEEN_TO_END = 2.0              # seconds in which a command that was asked to end should have
FINISHED_SHOWN = 20            # finished commands that `ps` lists, …
MOST_SHOWN = 100000            # … and with -a


TRANSFER = re.compile('transfer-[0-9a-f]{12}$')
ENDING = ('TERM', 'INT', 'HUP', 'KILL', 'SIGTERM', 'SIGINT', 'SIGHUP', 'SIGKILL', '15', '2', '1', '9')
SPARE = ['SUBMITTED', 'MEMORY', 'TIME', 'CPU', 'VM', 'PROGRESS', 'COMMAND', 'STATE']   # columns of `ps` that
ELASTIC = ['VM', 'COMMAND']    # a narrow terminal does without; and those that it may cut before


def do_ps(host: Client, screen: Screen, args: Any) -> int:
    """Commands: all unfinished ones, and the last that finished."""
    limit = MOST_SHOWN if args.all else args.number
    rows, unfinished = [], []          # type: List[Dict[str, Any]], List[Dict[str, Any]]
    for of_vm in [{'vm': name} for name in host.matching_each(args.vm)] if args.vm else [{}]:
        rows += host.call('listCmds', dict(of_vm, finished=True, limit=limit)) if limit else []
        unfinished += host.call('listCmds', dict(of_vm, finished=False))
    rows.sort(key=lambda row: row['submitted'])
    rows = sorted(rows[-limit:] + unfinished, key=lambda row: row['submitted'])
    ids = [row['cmdId'] for row in rows]
    if args.quiet and not args.json:
        return show_list(screen, False, ids, rows)
    statuses = dict(host.each('getCmdStatus', ids, args.long))     # with -l asked of the guests
    # Since the start of the host agent, or the guest's.
    untold = [row['cmdId'] for row in rows if row['state'] == 'running'
              and not statuses.get(row['cmdId'], {}).get('pid')]
    if untold and not args.long:
        statuses.update(host.each('getCmdStatus', untold, True))
    if args.json:
        return show_list(screen, True, ids, [dict(row, status=statuses.get(row['cmdId'], {}))
                                             for row in rows])
    headings = ['ID', 'VM', 'STATE', 'SUBMITTED', 'TIME']
    headings += ['CPU', 'MEMORY', 'PROGRESS', 'COMMAND'] if args.long else ['COMMAND']
    is_narrow = 0 < screen.width < WIDE
    # The VM has a column of its own.
    drops_vm = is_narrow or screen.width and any(cells(cmd_id) > FIRST for cmd_id in ids)
    shown = [dict(row, cmdId=row['cmdId'].partition('@')[0]) for row in rows] if drops_vm else rows
    screen.table(headings, [cmd_row(row, statuses.get(cmd_id, {}), args.long, is_narrow)
                            for row, cmd_id in zip(shown, ids)], SPARE, ELASTIC)
    tell_away(host, screen, {row['vm'] for row in unfinished})
    return 0


def tell_away(host: Client, screen: Screen, names: Set[str]) -> None:
    """Says which of the VMs are away: what is shown of their unfinished commands is what was heard last."""
    for vm in host.call('getVMs') if names else ():
        if vm['name'] in names and vm['agent'] in AWAY:
            screen.complain('%s is away (%s, last heard %s): its commands are shown as they were then'
                            % (vm['name'], life(vm), last_heard(vm)))


def cmd_row(row: Dict[str, Any], status: Dict[str, Any], long: bool, is_narrow: bool) -> List[str]:
    """A line of `ps`."""
    end = status.get('end', '')
    state = end.partition(':')[0] or row['state']      # why, is told by `info`
    wall = wall_by_now(status, row['state'])
    shown = [row['cmdId'], row['vm'], state, shown_time(row['submitted'], is_narrow),
             shown_span(wall) if wall else '-']
    if long:
        usage = status.get('resources', {})
        cpu = finite(usage.get('ru_utime')) + finite(usage.get('ru_stime'))
        shown += ['%.1f s' % cpu, shown_size(finite(usage.get('ru_maxrss')) * 1024),
                  str(status.get('progress') or '-')]
    return shown + [row['line']]


def wall_by_now(status: Dict[str, Any], state: str) -> float:
    """Seconds since a command began: of one that runs, its guest told it some time ago."""
    wall = finite(status.get('wall'))
    return wall + max(0.0, finite(status.get('age'))) if wall and state == 'running' else wall


# --- run -------------------------------------------------------------------------------------

def do_run(host: Client, screen: Screen, args: Any) -> int:
    """Runs a command, brings its output as it comes, and exits with its code."""
    if not args.command:
        raise InvalidParams('no command given: run VM CMD ARG…')
    if args.input and (args.stdin or args.terminal):
        raise InvalidParams('%s and -I: one of them' % ('-t' if args.terminal else '-i'))
    if args.terminal:
        check_terminal(host, args)
    words = [carried(word) for word in args.command]
    env = {name: carried(value) for name, value in args.env}
    return run_request(host, screen, args, args.vm, words[0], words[1:], env, carried(args.folder or ''),
                       args.input or '', run_options(args))


def run_options(args: Any) -> Dict[str, Any]:
    """The options of runCmd that were given."""
    options = {name: getattr(args, name) for name in (
        'timeout', 'killAfter', 'expires', 'user', 'nice', 'envClear', 'outputLimit', 'queue', 'id')
        if getattr(args, name) is not None and getattr(args, name) is not False}       # 0 is one, too
    if args.limits:
        options['limits'] = dict(args.limits)
    if args.terminal:
        import cliterminal  # which most do without
        options['terminal'] = cliterminal.wanted()
    elif args.stdin:
        args.begun, is_over = read_at_once()
        options['stdin'] = Binary(args.begun) if is_over else STREAM
    return options


def check_terminal(host: Client, args: Any) -> None:
    """Raises InvalidParams where there can be none."""
    if host.is_pattern(args.vm):
        raise InvalidParams('-t is for one VM')
    need_posix()


def need_posix() -> None:
    """Raises InvalidParams on a system whose terminals are of another kind."""
    if os.name != 'posix':
        raise InvalidParams('a terminal can be shown on Linux, macOS and other POSIX systems alone; here, '
                            '`run -i` passes input')


def read_at_once() -> Tuple[bytes, bool]:
    """What is there of standard input, and whether that is all: then it is kept for `rerun`, too."""
    found, deadline = b'', time.monotonic() + AT_ONCE
    if os.isatty(0):
        return found, False
    is_file = stat.S_ISREG(os.fstat(0).st_mode)
    while len(found) <= SMALL_INPUT:
        if not is_file and not (os.name == 'posix' and can_be_read(0, deadline - time.monotonic())):
            return found, False
        piece = os.read(0, SMALL_INPUT + 1 - len(found))
        if not piece:
            return found, True
        found += piece
    return found, False


def can_be_read(descriptor: int, seconds: float) -> bool:
    """Whether there is something, or the end, within that time."""
    return bool(select.select([descriptor], [], [], max(0.0, seconds))[0])


def do_rerun(host: Client, screen: Screen, args: Any) -> int:
    """Runs what a command ran, once more, on the same VMs."""
    with no_vm(host, args.id):
        was, args.begun = host.call('getCmdDetails', args.id), b''
    options = dict(was['options'])
    options.pop('fileForStdin', '')
    if options.pop('terminal', None) or options.get('stdin') == STREAM:
        options.pop('stdin', None)
        screen.complain('%s had input as it came, which is not kept: it gets none now' % args.id)
    return run_request(host, screen, args, was['vm'], was['cmd'], was['args'], was['env'], was['path'],
                       was['fileForStdin'], options)


def run_request(host: Client, screen: Screen, args: Any, vm: str, *request: Any) -> int:
    """Runs a request of runCmd on one VM or many, and follows it; gives the exit code."""
    many = host.is_pattern(vm)
    known = host.call('listKnownVMs') if many else []
    options = request[-1]
    with Interrupts() as interrupts:
        cmd_id = submit(host, screen, 'runCmdOnAll' if many else 'runCmd', vm, *request)
        if args.detach:
            screen.say(cmd_id)
        if options.get('stdin') == STREAM:
            pass_input(host, cmd_id, many, args.begun, args.detach)
        if args.detach:
            return 0
        if 'terminal' in options:
            return visit(host, screen, vm, cmd_id)
        if options.get('queue') and not many and host.call('getVM', vm)['agent'] in AWAY:
            screen.complain('%s is away: the command begins once it is back (Ctrl-C cancels it)' % vm)
        waits = options.get('queue') or not options.get('timeout')
        limit = 0 if waits else time.monotonic() + options['timeout'] + PATIENCE
        followed = follow(host, screen, cmd_id, many, interrupts, limit, options.get('stdin') == STREAM)
        codes = followed.exit_codes()
    worst = max(code for code, _ in codes.values())
    if many:
        absent = [name for name in sorted(set(known) - set(codes), key=agent.in_order)
                  if fnmatch.fnmatchcase(name, vm)]
        screen.conclude(summary(codes, absent))
        return worst or (FAILED if absent else 0)
    return worst


def pass_input(host: Client, cmd_id: str, many: bool, begun: bytes, to_the_end: bool) -> None:
    """Passes standard input on to the command, of which so much was read; ``to_the_end``: before anything
    else is done."""
    import cliterminal  # which most do without
    keys = host.call('getCmdDetails', cmd_id)['executions'] if many else [cmd_id]
    passed = cliterminal.Input(host.folder, keys, begun)
    if to_the_end:
        passed.run()
    else:
        passed.start()


def visit(host: Client, screen: Screen, vm: str, cmd_id: str, is_back: bool = False) -> int:
    """Sits at the terminal of a command until that ends, or the person leaves; gives the exit code.

    is_back    somebody was there before
    """
    import cliterminal  # which most do without
    try:
        cliterminal.Visit(host, screen, vm, cmd_id).stay(is_back)
        return exit_code(screen, host.call('getCmdResults', cmd_id))
    except (cliterminal.Detached, NoHost) as left:
        screen.complain('%sthe command continues; come back with `shell %s %s`'
                        % ('%s; ' % left if isinstance(left, NoHost) else '', vm, cmd_id))
        return FAILED


SHELL = 'exec "${SHELL:-sh}" -l'        # in the guest, to a terminal, it is the user's own


def do_shell(host: Client, screen: Screen, args: Any) -> int:
    """A shell on a terminal of its own, which lasts when the person leaves; or one that does so already."""
    try:
        found = host.call('getVM', args.vm)
    except NoSuchVM:
        if args.id or not is_terminal(host, args.vm):
            raise
        args.vm, args.id = host.call('getCmdDetails', args.vm)['vm'], args.vm
        found = host.call('getVM', args.vm)
    vm = found['name']
    if args.id:
        need_posix()
        try:
            details = host.call('getCmdDetails', args.id)
        except NoSuchCommand:
            raise NoSuchCommand('no command %s to come back to (`ps` lists them); to run it: `run -t %s %s`'
                                % (args.id, args.vm, args.id))
        if details['vm'] != vm or 'terminal' not in details['options']:
            raise InvalidParams('%s is no command with a terminal on %s' % (args.id, vm))
        return visit(host, screen, vm, args.id, True)
    if found['agent'] in AWAY:
        raise AgentNotConnected('%s is away (%s, last heard %s)' % (vm, life(found), last_heard(found)))
    options: Dict[str, Any] = {'user': args.user} if args.user else {}
    args.detach, args.begun = False, b''
    if os.isatty(0):
        import cliterminal  # which most do without
        need_posix()
        options.update(terminal=cliterminal.wanted(), outputLimit=SHELL_OUTPUT)
    else:
        options['stdin'] = STREAM
    return run_request(host, screen, args, vm, 'sh', ['-c', SHELL], {}, '', '', options)


def submit(host: Client, screen: Screen, method: str, vm: str, *request: Any) -> str:
    """Has the command run once, even where the connection breaks before the answer: its id names it.

    Where it breaks again, who typed it is told that id.
    """
    options = dict(request[-1])
    options.setdefault('id', time.strftime('%Y%m%d-%H%M%S-', time.gmtime()) + os.urandom(4).hex())
    call = (method, vm) + request[:-1] + (options,)
    try:
        return host.call(*call)
    except NoHost as error:
        was_asked = error.was_asked
    try:
        return host.call(*call)
    except NoHost as error:
        if was_asked or error.was_asked:
            screen.complain('the command may have begun: once the host agent answers, `info %s` tells, and '
                            '`run --id %s …` runs nothing twice' % (options['id'], options['id']))
        raise


def follow(host: Client, screen: Screen, cmd_id: str, many: bool, interrupts: 'Interrupts',
           limit: float, is_fed: bool = False) -> 'Followed':
    """Brings a command's output until it ends, or should have; hands on to it what interrupts.

    is_fed    its input comes from here
    """
    try:
        followed = Followed(host.patient(screen.complain), screen, cmd_id, many)
        followed.to_the_end(lambda: forward(host, screen, cmd_id, interrupts), limit)
        return followed
    except KeyboardInterrupt:
        screen.complain('detached; the command continues as %s' % cmd_id)
        raise
    except OSError as error:
        if has_no_reader(error):
            host.call('signalCmd', cmd_id, 'PIPE')      # as if it had written there itself
        else:
            screen.complain('detached; the command continues as %s' % cmd_id)
        raise
    except NoHost:
        screen.complain('the command continues%s; follow it with `out -f %s` when the host agent is back'
                        % (', but gets no more input' if is_fed else '', cmd_id))
        raise


def summary(codes: Dict[str, Tuple[int, str]], absent: List[str]) -> str:
    """How a command ended on many VMs: ``29 ok, lab12 exited 4, lab07 absent``."""
    bad = ['%s %s' % (name, end) for name, (code, end)
           in sorted(codes.items(), key=lambda item: agent.in_order(item[0])) if code]
    good = len(codes) - len(bad)
    return ', '.join(['%d ok' % good] * bool(good) + bad + [name + ' absent' for name in absent])


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
            screen.complain('%s sent to the command; press again to detach from it' % name)
        try:
            host.call('signalCmd', cmd_id, name)
        except (AgentNotConnected, DeadlineExceeded, NoHost) as error:     # one more detaches
            screen.complain(str(error))


# --- info ------------------------------------------------------------------------------------

def do_info(host: Client, screen: Screen, args: Any) -> int:
    """All that is known of a VM, or of a command."""
    try:
        found = host.call('getVM', args.vm)
        if not args.json:              # as `ls` has it
            found['state'] = 'unknown' if found['state'] == 'Null' else found['state']
            found['agent'] = life(found)
            found.pop('left', None)
            found = in_words(found)
    except NoSuchVM:
        try:
            found = dict(host.call('getCmdDetails', args.vm), status=host.call('getCmdStatus', args.vm),
                         results=host.call('getCmdResults', args.vm))
        except NoSuchCommand:
            raise NoSuchVM('%s is neither a VM (`ls` lists them) nor a command (`ps`)' % args.vm)
        if not args.json:
            tell_away(host, screen, set() if found['results'] else {found['vm']})
            found = described(found)
    return show_one(screen, found, args.json)


# What getVM calls shorter than a person would, also among what its agent tells of the machine.
WORDS = {'ip': 'address', 'lastSeen': 'last heard', 'clockOffset': 'clock', 'facts': 'machine',
         'rdp': 'remote desktop', 'proto': 'protocol', 'mem': 'memory', 'host': 'host name', 'os': 'system',
         'boot': 'boot id', 'version': 'agent version', 'chirp': 'files'}


def in_words(found: Dict[str, Any]) -> Dict[str, Any]:
    """The same with names, and numbers, for a person."""
    shown = {}                         # type: Dict[str, Any]
    for name, value in found.items():
        if name == 'clockOffset' and isinstance(value, (int, float)):
            value = shown_offset(value)
        elif name == 'facts' and isinstance(value, dict):
            value = in_words(value)
        shown[WORDS.get(name, name)] = value
    return shown


def described(found: Dict[str, Any]) -> Dict[str, Any]:
    """What `info` shows of a command: what is told twice, or is nothing, left out."""
    import shlex  # needed here alone
    status, is_one = found['status'], found['executions'] == [found['cmdId']]
    shown = {'id': found['cmdId'], 'vm': found['vm'],
             'command': ' '.join([shlex.quote(str(word)) for word in [found['cmd']] + found['args']]),
             'folder': found['path'], 'environment': found['env'], 'options': found['options'],
             'submitted': found['submitted'], 'by': found['client']}
    if not is_one:
        shown['executions'] = {key.partition('@')[2]: one['end'] or one['state']
                               for key, one in status.items()}
    else:
        results = found['results'] or {}
        usage = results.get('resources') or status['resources']
        shown['state'] = status['end'] or status['state']
        shown.update({name: status[name] for name in ('pid', 'processes', 'progress', 'error')})
        if shown['error'] and str(shown['state']).endswith(str(shown['error'])):
            del shown['error']
        shown['input'] = shown_size(finite(status['inOffset'])) if status.get('inOffset') else ''
        shown.update({name: results.get(name) for name in ('started', 'ended')})
        wall = wall_by_now(status, shown['state'])
        shown.update(time=results.get('wall', wall), output=shown_size(finite(status['outSize'])),
                     errors=shown_size(finite(status['errSize'])),
                     resources=dict(map(shown_use, *zip(*[use for use in usage.items() if use[1]])))
                     if any(usage.values()) else {})
    return {name: value for name, value in shown.items() if value not in ('', {}, None, 0)}


# What the names of resources mean, as getrusage(2) has them.
USES = {'ru_utime': 'user time', 'ru_stime': 'system time', 'ru_maxrss': 'peak memory',
        'ru_minflt': 'minor page faults', 'ru_majflt': 'major page faults', 'ru_inblock': 'blocks read',
        'ru_oublock': 'blocks written', 'ru_nvcsw': 'switches it waited at',
        'ru_nivcsw': 'switches that took its turn'}


def shown_use(name: str, value: Any) -> Tuple[str, str]:
    """What was used of one resource, for a person."""
    number = finite(value)
    shown = '%.2f s' % number if name in ('ru_utime', 'ru_stime') else \
        shown_size(number * 1024) if name == 'ru_maxrss' else '%.0f' % number
    return USES.get(name, name), shown


# --- the others ------------------------------------------------------------------------------

@contextlib.contextmanager
def no_vm(host: Client, cmd_id: str) -> Iterator[None]:
    """Has a NoSuchCommand say so where that is a VM's name: other tools take those there."""
    try:
        yield
    except NoSuchCommand:
        with contextlib.suppress(NoSuchVM):
            host.call('getVM', cmd_id)
            raise NoSuchCommand('%s is a VM, and no command: `ps %s` lists those that ran there'
                                % (cmd_id, cmd_id))
        raise


def do_out(host: Client, screen: Screen, args: Any) -> int:
    """The output of commands, now, or until they end; then the exit code is the highest of theirs."""
    return max(show_output(host, screen, cmd_id, args.follow, args.tail) for cmd_id in args.ids)


def show_output(host: Client, screen: Screen, cmd_id: str, to_the_end: bool, lines: Optional[int]) -> int:
    """The output of one command, or of one on many VMs; gives the exit code."""
    host = host.patient(screen.complain)
    with no_vm(host, cmd_id):
        details = host.call('getCmdDetails', cmd_id)
    followed = Followed(host, screen, cmd_id, details['executions'] != [cmd_id])
    if lines is not None:
        followed.tail(lines)
    if to_the_end:
        followed.to_the_end(lambda: None)
        return max(code for code, _ in followed.exit_codes().values())
    followed.look(patience=0)
    for key, name in followed.names.items():
        results = host.call('getCmdResults', key)
        if results:
            tell_cut(screen, results, name)
    return 0


def do_wait(host: Client, screen: Screen, args: Any) -> int:
    """Waits until commands have ended; the exit code is the highest of theirs."""
    host, codes = host.patient(screen.complain), []
    for cmd_id in args.ids:
        with no_vm(host, cmd_id):
            executions = host.call('getCmdDetails', cmd_id)['executions']
        wait_for_end(host, screen, cmd_id, executions)
        for key in executions:
            name = key if len(args.ids) > 1 else key.partition('@')[2]
            codes.append(exit_code(screen, host.call('getCmdResults', key), name))
    return max(codes)


def wait_for_end(host: PatientClient, screen: Screen, cmd_id: str, executions: List[str]) -> None:
    """Until a command has ended; says, once, which VMs don't answer meanwhile."""
    if host.call('waitCmd', cmd_id, PATIENCE):
        return
    silent: Set[str] = set()
    while True:
        for key in set(executions) - silent:
            status = host.call('getCmdStatus', key)
            if not status['ended'] and not 0 <= status['age'] < PATIENCE:
                silent.add(key)
                name = key.partition('@')[2] or host.call('getCmdDetails', key)['vm']
                screen.complain('%s does not answer; still waiting' % name)
        if host.call('waitCmd', cmd_id, LONGEST_WAIT):
            return


def do_kill(host: Client, screen: Screen, args: Any) -> int:
    """Sends a signal to all processes of commands, and looks whether they end where none is named; cancels
    transfers of files."""
    signalled = []

    def kill(id: str) -> None:
        if not (cancel(id) if TRANSFER.match(id) else signal(id)):
            raise BadState('%s has already ended' % id)

    def signal(cmd_id: str) -> bool:
        with no_vm(host, cmd_id):
            if args.signal == '0':     # as kill(2) has it
                return not host.call('waitCmd', cmd_id, 0)
            is_sent = host.call('signalCmd', cmd_id, args.signal or 'TERM')
        signalled.extend([cmd_id] * is_sent)
        return is_sent

    def cancel(id: str) -> bool:
        try:
            host.call('getTransfer', id)
        except InvalidParams:          # a command's id may look so, too
            return signal(id)
        if (args.signal or 'TERM').upper() not in ENDING:
            raise BadState('%s is a transfer of files: it can only be cancelled' % id)
        return host.call('cancelTransfer', id)
    code = for_each(screen, args.ids, kill)
    try:
        if args.signal is None or args.killAfter is not None:
            code = max(code, see_them_end(host, screen, signalled, args.signal is None, args.killAfter))
    except NoHost:
        if args.killAfter is not None:         # which is counted here
            screen.complain('nothing was sent KILL: once the host agent answers, `kill -9` does it')
        raise
    return code


def see_them_end(host: Client, screen: Screen, ids: List[str], hangs_up: bool,
                 patience: Optional[float]) -> int:
    """Waits for the end of commands that were signalled, and says which go on.

    hangs_up    shells ignore TERM, as their terminals' ends tell them to leave: theirs are hung up
    patience    seconds after which they are killed; None: never
    """
    def send(ids: List[str], name: str) -> None:
        for_each(screen, ids, lambda cmd_id: host.call('signalCmd', cmd_id, name))
    begin = time.monotonic()
    left = still_there(host, ids, AT_ONCE)
    send(left, 'CONT')                 # a program that is stopped gets no other signal
    left = still_there(host, left, SEEN_TO_END if patience is None else min(SEEN_TO_END, patience))
    shells = [cmd_id for cmd_id in left if hangs_up and has_terminal(host, cmd_id)]
    send(shells, 'HUP')
    if patience is not None:
        left = still_there(host, left, begin + patience - time.monotonic())
        send(left, 'KILL')
    left = still_there(host, left, SEEN_TO_END) if shells or patience is not None else left

    def complain(cmd_id: str) -> None:
        raise BadState('%s goes on: %s' % (cmd_id, '`kill -9 %s` ends it' % cmd_id if patience is None
                                           else 'it was sent KILL, and its end is not told yet'))
    return for_each(screen, left, complain)


def has_terminal(host: Client, cmd_id: str) -> bool:
    """Whether a command was begun with one."""
    return 'terminal' in host.call('getCmdDetails', cmd_id)['options']


def is_terminal(host: Client, word: str) -> bool:
    """Whether it is the id of a command with one."""
    try:
        return has_terminal(host, word)
    except (NoSuchCommand, InvalidParams):
        return False


def still_there(host: Client, ids: List[str], seconds: float) -> List[str]:
    """Those that have not ended after so many seconds."""
    deadline = time.monotonic() + seconds
    return [cmd_id for cmd_id in ids
            if not host.call('waitCmd', cmd_id, max(0.0, deadline - time.monotonic()))]


def read_word(text: str) -> str:
    """What is not empty, as a shell's variable may be: that would be as if the option weren't there. Raises
    ArgumentTypeError."""
    if not text:
        raise argparse.ArgumentTypeError('it is empty: name it, or leave the option out')
    return text


def read_variable(text: str) -> Tuple[str, str]:
    """K=V, or K as it is here. Raises ArgumentTypeError."""
    name, sign, value = text.partition('=')
    if name and not sign and name in os.environ:
        return name, os.fsencode(os.environ[name]).decode('utf-8', 'surrogateescape')
    if not name or not sign:
        raise argparse.ArgumentTypeError('%s: expected NAME=VALUE, or NAME alone of what is set here' % text)
    return name, value


def read_lines(text: str) -> Optional[int]:
    """How many lines; None for all. Raises ArgumentTypeError."""
    return None if text == 'all' else read_count(text)


def read_limit(text: str) -> Tuple[str, float]:
    """NAME=NUMBER, the number with a unit of size or without. Raises ArgumentTypeError."""
    name, sign, value = text.partition('=')
    if not sign:
        raise argparse.ArgumentTypeError('%s: expected memory=2G, cpus=1.5, pids=, cpu=30, as=, fsize=, '
                                         'nofile= or nproc=' % text)
    return name, read_cores(value) if name == 'cpus' else read_bytes(value)


def read_cores(text: str) -> float:
    """A number of processor cores, or a part of one. Raises ArgumentTypeError."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError('cpus=%s: expected a number of cores, such as 0.5' % text)


def read_bytes(text: str) -> int:
    """A size as in the ini files. Raises ArgumentTypeError."""
    return as_in_ini(text, agent.size)


class SignalNames(argparse.Action):
    """Prints the names of the signals, as --help does its text."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        with naming_output():
            sys.stdout.write(' '.join(agent.SIGNALS) + '\n')
            sys.stdout.flush()
        parser.exit()


DETACH = switch('-d', '--detach', help='print the command\'s id, and return at once')
USER = argument('-u', '--user', metavar='USER', type=read_word, help='run it as this user')
RUN_ARGUMENTS = [
    switch('-i', '--stdin', '--interactive', help='pass standard input, as it comes'),
    switch('-t', '--tty', dest='terminal',
           help='with a terminal of its own; ~. at the begin of a line leaves it'),
    DETACH,
    argument('-T', '--timeout', metavar='SEC', type=read_seconds,
             help='terminate it after that time (90, 5m, 2h; 0: never)'),
    argument('-k', '--kill-after', metavar='SEC', type=read_seconds, dest='killAfter',
             help='and kill it, if it goes on for so long after that'),
    argument('-e', '--env', metavar='K=V', type=read_variable, action='append', default=[],
             help='set an environment variable; K alone: as it is here; may be repeated'),
    switch('--clear-env', dest='envClear', help='nothing of the guest\'s own environment'),
    argument('-I', '--input', metavar='FILE', type=read_word, help='standard input from a file in the VM'),
    argument('-C', '-w', '--folder', '--workdir', metavar='DIR', type=read_word,
             help='working directory, relative to the folder that the VM serves'),
    USER,
    argument('-n', '--nice', metavar='N', type=int, help='its niceness'),
    argument('-l', '--limit', metavar='NAME=N', type=read_limit, action='append', default=[], dest='limits',
             help='memory, cpus or pids: of all its processes together; as, cpu, fsize, nofile or nproc: of '
                  'each, as with ulimit; may be repeated'),
    argument('--output-limit', metavar='SIZE', type=read_bytes, dest='outputLimit',
             help='how much output is kept (64K, 1G)'),
    switch('--queue', help='if the VM is away, wait for it'),
    argument('--expires', metavar='SEC', type=read_seconds, help='don\'t begin it later than that'),
    argument('--id', metavar='ID', help='an id of your own: the same again runs nothing'),
    VMS]

VERBS = [
    Verb('run', do_run, 'run a program in a VM, and show its output as it is written', RUN_ARGUMENTS, (
        'run web1 uname -a',
        'run -T 5m -e LEVEL=9 web1 -- sh -c \'gzip -$LEVEL < in > out\'',
        'run -i web1 -- tar xf - < tree.tar',
        'run -t web1 top',
        'run \'web*\' uptime')),
    Verb('shell', do_shell, 'a shell in a VM, which lasts when you leave (type ~. to)', [
        USER,
        argument('vm', metavar='VM', help='name or id'),
        argument('id', metavar='ID', nargs='?', help='come back to this one, as told when you left')],
        ('shell web1', 'shell web1 ID')),
    Verb('rerun', do_rerun, 'run a command once more, as it was', [DETACH, ID]),
    Verb('ps', do_ps, 'list commands: unfinished ones, and the last finished', [
        argument('vm', metavar='VM', nargs='*', help='only those of these, or of those that match a pattern'),
        JSON, switch('-l', '--long', help='with CPU time, memory and progress'),
        switch('-q', '--quiet', help='their ids alone'),
        switch('-a', '--all', help='all that are kept, and not the last finished alone'),
        argument('-n', '--number', metavar='N', type=read_count, default=FINISHED_SHOWN,
                 help='how many finished ones (default: %d)' % FINISHED_SHOWN)]),
    Verb('info', do_info, 'show details of a VM or a command', [
        argument('vm', metavar='VM|ID', help='of a VM or a command'), JSON]),
    Verb('out', do_out, 'print the output of commands', [
        switch('-f', '--follow', help='until they end; exit with the command\'s code'),
        argument('-n', '--tail', metavar='N', type=read_lines, help='the last N lines, or all'), IDS],
        ('out -f --tail 20 ID',)),
    Verb('wait', do_wait, 'wait until commands have ended, and exit with the highest code', [IDS]),
    Verb('kill', do_kill, 'send a signal to all processes of commands, or cancel transfers', [
        argument('-s', '--signal', metavar='SIG',
                 help='KILL, INT, HUP, 9, …; 0: only whether it goes on; without it TERM, to a shell on a '
                      'terminal HUP, too, and it is told what goes on'),
        argument('-k', '--kill-after', metavar='SEC', type=read_seconds, dest='killAfter',
                 help='and kill what goes on for so long after that, which is waited for here'),
        argument('-l', '--list', action=SignalNames, nargs=0, help='print the names of the signals'),
        argument('ids', metavar='ID', nargs='+', help='as printed by `run -d`, `ps` and `transfers`')],
        ('kill -9 ID', 'kill -k 10 ID')),
]
