"""The verbs for commands: run them, follow their output, list and signal them.

No threads, no locks; while `run` lasts, the signals that would end it are handed on to the command.
"""

import argparse
import os
import signal
import sys
import time
from typing import Any, Callable, Dict, List, Set, Tuple

import agent
from cliscreen import Screen, shown_size, shown_time
from cliverbs import ID, JSON, VMS, Verb, argument, read_seconds, switch
from faults import AgentNotConnected, BadState, DeadlineExceeded, InvalidParams
from hostclient import Client, NoHost
from rpc import Binary, FilePath, is_xml

FAILED = 255                   # exit code of `run` for an error that isn't the command's
TIMED_OUT = 124                # … of a command that ran into its timeout, and ended with 0: timeout(1)'s
NOT_STARTED = {'ENOENT': 127, 'EACCES': 126, 'ENOEXEC': 126}       # as shells have it
SHORTEST_LOOK = 0.01           # seconds between looks at a command's output …
LONGEST_LOOK = 0.25            # … which grow while nothing comes
PATIENCE = 10.0                # seconds after a command's end in which all of its output should have come
FINISHED_SHOWN = 20            # finished commands that `ps` lists


def do_ps(host: Client, screen: Screen, args: Any) -> int:
    """Commands: all unfinished ones, and the last that finished."""
    of_vm = {'vm': host.call('getVM', args.vm)['name']} if args.vm else {}
    rows = host.call('listCmds', dict(of_vm, finished=True, limit=args.number)) if args.number else []
    rows += host.call('listCmds', dict(of_vm, finished=False))
    rows.sort(key=lambda row: row['submitted'])
    if args.json:
        screen.json(rows)
        return 0
    statuses = dict(host.each('getCmdStatus', [row['cmdId'] for row in rows])) if args.long else {}
    headings = ['ID', 'VM', 'STATE', 'SUBMITTED'] + (['CPU', 'MEMORY', 'PROGRESS'] if args.long else [])
    screen.table(headings + ['COMMAND'], [cmd_row(row, statuses) for row in rows])
    return 0


def cmd_row(row: Dict[str, Any], statuses: Dict[str, Any]) -> List[str]:
    """A line of `ps`."""
    shown = [row['cmdId'], row['vm'], row['state'], shown_time(row['submitted'])]
    status = statuses.get(row['cmdId'])
    if statuses:
        usage = status['resources'] if status else {}
        shown += ['%.1f s' % (usage.get('ru_utime', 0) + usage.get('ru_stime', 0)),
                  shown_size(usage.get('ru_maxrss', 0) * 1024), str(status and status['progress'] or '-')]
    return shown + [row['line']]


def do_run(host: Client, screen: Screen, args: Any) -> int:
    """Runs a command, brings its output as it comes, and exits with its code."""
    if not args.command:
        raise InvalidParams('no command given: run VM -- CMD ARG…')
    many = host.is_pattern(args.vm)
    with Interrupts() as interrupts:
        cmd_id = submit(host, args, many)
        if args.detach:
            screen.say(cmd_id)
            return 0
        limit = args.timeout and not args.queue and time.monotonic() + args.timeout + PATIENCE
        try:
            followed = Followed(host, screen, cmd_id, many)
            followed.to_the_end(lambda: forward(host, screen, cmd_id, interrupts), limit)
        except KeyboardInterrupt:
            screen.complain('detached; the command continues as %s' % cmd_id)
            raise
        except BrokenPipeError:
            host.call('signalCmd', cmd_id, 'PIPE')      # as if it had written there itself
            raise
        except OSError:
            screen.complain('detached; the command continues as %s' % cmd_id)
            raise
        except NoHost:
            screen.complain('the command continues; follow it with `out -f %s` when the host agent is back'
                            % cmd_id)
            raise
        codes = followed.exit_codes()
        if many:
            screen.conclude(summary(codes))
        return max(code for code, _ in codes.values())


def submit(host: Client, args: Any, many: bool) -> str:
    """Has the command run once, even where the connection breaks before the answer: its id names it."""
    options = {'id': time.strftime('%Y%m%d-%H%M%S-', time.gmtime()) + os.urandom(4).hex()}  # type: Dict[str, Any]
    if args.timeout:
        options['timeout'] = args.timeout
    if args.queue:
        options['queue'] = True
    if args.stdin:
        options['stdin'] = Binary(sys.stdin.buffer.read())
    call = ('runCmdOnAll' if many else 'runCmd', args.vm, exact(args.command[0]),
            [exact(word) for word in args.command[1:]], {name: exact(value) for name, value in args.env},
            exact(args.folder), args.input, options)
    try:
        return host.call(*call)
    except NoHost:
        return host.call(*call)


def exact(text: str) -> FilePath:
    """A word of ours: its bytes where they aren't UTF-8, or XML can't carry them."""
    return text if is_xml(text) else Binary(text.encode('utf-8', 'surrogateescape'))


def summary(codes: Dict[str, Tuple[int, str]]) -> str:
    """How a command ended on many VMs: ``29 ok, lab12 exited 4, lab07 absent``."""
    bad = ['%s %s' % (name, end) for name, (code, end) in sorted(codes.items()) if code]
    good = len(codes) - len(bad)
    return ', '.join(['%d ok' % good] * bool(good) + bad)


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
        host.call('signalCmd', cmd_id, name)


class Followed:
    """A command whose output comes to standard output and standard error, apart, as it is written.

    One execution's bytes pass unchanged; where there are many, each line begins with its VM's name.
    """

    def __init__(self, host: Client, screen: Screen, cmd_id: str, many: bool) -> None:
        self._host = host
        self._screen = screen
        self._told: Set[str] = set()
        keys = host.call('getCmdDetails', cmd_id)['executions'] if many else [cmd_id]
        self.names = {key: key.partition('@')[2] for key in keys} if many else {cmd_id: ''}
        self._open = [Tail(host, key, Pipe(screen.out, name), Pipe(screen.err, name))
                      for key, name in self.names.items()]

    def look(self, patience: float = PATIENCE) -> bool:
        """Brings what is there now; whether that was anything. Raises as ``Tail.look``."""
        return any([execution.look(patience) for execution in self._open])

    def to_the_end(self, between: Callable[[], None], limit: float = 0) -> None:
        """Looks until all have ended; calls ``between`` before each look.

        limit    monotonic: from then on, nobody is waited for who doesn't answer; 0: they are, which is told
        """
        pause = SHORTEST_LOOK
        while self._open:
            self._host.call('waitCmd', self._open[0].key, pause)
            between()
            pause = SHORTEST_LOOK if self.look() else min(2 * pause, LONGEST_LOOK)
            self._open = [execution for execution in self._open if not execution.is_over]
            silent = [execution for execution in self._open if execution.is_silent()]
            if limit and time.monotonic() > limit:
                self._open = [execution for execution in self._open if execution not in silent]
            for execution in silent if not limit else ():
                self._tell_silent(execution)

    def _tell_silent(self, execution: 'Tail') -> None:
        if execution.key not in self._told:
            self._told.add(execution.key)
            name = self.names[execution.key] or 'the VM'
            self._screen.complain('%s does not answer; still waiting' % name)

    def exit_codes(self) -> Dict[str, Tuple[int, str]]:
        """{VM: (exit code, how it ended)}; tells why, where the program itself can't."""
        return {name: self._exit_code(key, name) for key, name in self.names.items()}

    def _exit_code(self, key: str, name: str) -> Tuple[int, str]:
        results = self._host.call('getCmdResults', key)
        if results:
            return exit_code(self._screen, results, name), end_of(results)
        self._screen.complain('%sno answer within the time limit; the command continues as %s'
                              % (name and name + ': ', key))
        return FAILED, 'absent'


PIECE = 256 * 1024      # bytes of a command's output that are asked for at a time


class Tail:
    """Brings the output of one execution from where it was left."""

    def __init__(self, host: Client, key: str, out: 'Pipe', err: 'Pipe') -> None:
        self._host = host
        self.key = key
        self.is_over = False
        self._pipes = {'out': out, 'err': err}
        self._offsets = {'out': 0, 'err': 0}
        self._ended = 0.0              # monotonic: when it was first seen to have ended
        self._answered = time.monotonic()      # when the guest told last how far it is

    def look(self, patience: float = PATIENCE) -> bool:
        """Brings what is there now; whether that was anything.

        While the guest is away there is nothing. Raises VMHostError where output that there is
        can't be read for so many seconds after the command's end; with no patience, also before.
        """
        status = self._host.call('getCmdStatus', self.key)
        ended = status['ended'] > 0
        if 0 <= status.get('age', -1) < PATIENCE:
            self._answered = time.monotonic()
        if ended:
            self._ended = self._ended or time.monotonic()
        sizes = {stream: status[stream + 'Size'] for stream in self._pipes}
        try:
            moved = any([self._bring(stream, size) for stream, size in sizes.items()])
            missing = sum(max(0, size - self._offsets[stream]) for stream, size in sizes.items())
            if ended and missing:
                raise DeadlineExceeded('%d bytes of the output of %s are not available' % (missing, self.key))
        except (AgentNotConnected, DeadlineExceeded):
            if not patience or ended and time.monotonic() - self._ended > patience:
                raise
            return False
        if ended:
            self.is_over = True
            for pipe in self._pipes.values():
                pipe.end()
        return moved

    def is_silent(self) -> bool:
        """Whether the guest hasn't answered for long."""
        return time.monotonic() - self._answered > PATIENCE

    def _bring(self, stream: str, size: float) -> bool:
        begin = self._offsets[stream]
        while self._offsets[stream] < size:
            answer = self._host.call('getCmdOutput', self.key, stream, self._offsets[stream], PIECE)
            if not answer['data'].data:
                break
            self._pipes[stream].write(answer['data'].data)
            self._offsets[stream] = answer['next']
        return self._offsets[stream] > begin


class Pipe:
    """Bytes to one of our own outputs; with a VM's name, each line begins with it."""

    def __init__(self, stream: Any, vm: str) -> None:
        self._to = stream.buffer
        self._prefix = (agent.printable(vm) + ': ').encode('utf-8', 'replace') if vm else b''
        self._begun = b''              # a line whose end hasn't come

    def write(self, data: bytes) -> None:
        """Writes them, but for a line that isn't whole yet where lines are prefixed."""
        if self._prefix:
            lines = (self._begun + data).split(b'\n')
            self._begun = lines.pop()
            data = b''.join(self._prefix + line + b'\n' for line in lines)
        self._to.write(data)
        self._to.flush()

    def end(self) -> None:
        """Nothing more comes."""
        if self._begun:
            self.write(b'\n')


def exit_code(screen: Screen, results: Dict[str, Any], vm: str = '') -> int:
    """What a shell would say of a command that ended so; tells why, where the program itself can't."""
    number, state = results['exitCodeOrSignal'], results['state']
    why = results['error'] or state
    is_cut = tell_cut(screen, results, vm)
    if state not in ('exited', 'signaled'):
        screen.complain('%s%s' % (vm and vm + ': ', why))
    if state == 'timeout' and results['finished']:
        return number or TIMED_OUT      # it ended in peace at the TERM, and still isn't done
    if state == 'exited':
        return number or (FAILED if is_cut else 0)
    if state == 'failed':
        return NOT_STARTED.get(why.partition(':')[0], FAILED)
    return 128 + number if state in ('signaled', 'timeout') else FAILED


def end_of(results: Dict[str, Any]) -> str:
    """How it ended, in a word or two."""
    if results['state'] in ('exited', 'signaled'):
        return '%s %d' % (results['state'], results['exitCodeOrSignal'])
    return results['state']


def tell_cut(screen: Screen, results: Dict[str, Any], vm: str) -> bool:
    """Whether there was more output than the guest keeps, which is complained about."""
    cut = [stream for stream in ('out', 'err') if results.get(stream + '-truncated')]
    for stream in cut:
        screen.complain('%sstd%s was truncated: the command wrote more than output_limit'
                        % (vm and vm + ': ', stream))
    return bool(cut)


def do_out(host: Client, screen: Screen, args: Any) -> int:
    """The output of a command, now, or until it ends."""
    details = host.call('getCmdDetails', args.id)
    followed = Followed(host, screen, args.id, details['executions'] != [args.id])
    if args.follow:
        followed.to_the_end(lambda: None)
    else:
        followed.look(patience=0)
    for key, name in followed.names.items():
        results = host.call('getCmdResults', key)
        if results:
            tell_cut(screen, results, name)
    return 0


def do_kill(host: Client, screen: Screen, args: Any) -> int:
    """Sends a signal to all processes of a command."""
    if host.call('signalCmd', args.id, args.signal):
        return 0
    raise BadState('%s has already ended' % args.id)


def read_variable(text: str) -> Tuple[str, str]:
    """K=V. Raises ArgumentTypeError."""
    name, sign, value = text.partition('=')
    if not name or not sign:
        raise argparse.ArgumentTypeError('%s: expected NAME=VALUE' % text)
    return name, value


VERBS = [
    Verb('run', do_run, 'run a program in a VM, and show its output as it is written', [
        switch('-i', '--stdin', help='pass standard input'),
        switch('-d', '--detach', help='print the command\'s id, and return at once'),
        switch('--queue', help='wait for VMs whose agents aren\'t connected'),
        argument('-t', '--timeout', metavar='SEC', type=read_seconds, default=0.0,
                 help='terminate it after that time (90, 5m, 2h)'),
        argument('-e', '--env', metavar='K=V', type=read_variable, action='append', default=[],
                 help='set an environment variable; may be repeated'),
        argument('-I', '--input', metavar='FILE', default='', help='standard input from a file in the VM'),
        argument('-C', '--folder', metavar='DIR', default='',
                 help='working directory, within what the VM serves'),
        VMS], (
            'run web1 -- uname -a',
            'run -t 5m -e LEVEL=9 web1 -- sh -c \'gzip -$LEVEL < in > out\'',
            'run -i web1 -- tar xf - < tree.tar',
            'run \'web*\' -- uptime')),
    Verb('ps', do_ps, 'list commands: unfinished ones, and the last finished', [
        argument('vm', metavar='VM', nargs='?', help='only those of this VM'), JSON,
        switch('-l', '--long', help='with CPU time, memory and progress'),
        argument('-n', '--number', metavar='N', type=int, default=FINISHED_SHOWN,
                 help='how many finished ones (default: %d)' % FINISHED_SHOWN)]),
    Verb('out', do_out, 'print the output of a command', [
        switch('-f', '--follow', help='until it ends'), ID]),
    Verb('kill', do_kill, 'send a signal to all processes of a command', [
        argument('-s', '--signal', metavar='SIG', default='TERM', help='TERM, KILL, INT, HUP, 9, …'), ID]),
]
