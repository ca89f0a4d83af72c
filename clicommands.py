"""The verbs for commands: run them, follow their output, list and signal them.

No threads, no locks; while `run` lasts, the signals that would end it are handed on to the command.
"""

import argparse
import shlex
import signal
import sys
import time
from typing import Any, Callable, Dict, List, Tuple

import agent
from cliscreen import Screen, shown_size, shown_time
from cliverbs import ID, JSON, VMS, Verb, argument, read_seconds, switch
from faults import AgentNotConnected, BadState, DeadlineExceeded, InvalidParams
from hostclient import Client, NoHost
from rpc import Binary

FAILED = 255                   # exit code of `run` for an error that isn't the command's
# … of a command that couldn't begin, by errno's name: a shell's.
NOT_STARTED = {'ENOENT': 127, 'EACCES': 126, 'ENOEXEC': 126}
TIMED_OUT = 124                # … of a command that ran into its timeout, and ended with 0: timeout(1)'s
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
    details = dict(host.each('getCmdDetails', {row['cmdId'] for row in rows}))
    statuses = dict(host.each('getCmdStatus', [row['cmdId'] for row in rows])) if args.long else {}
    headings = ['ID', 'VM', 'STATE', 'SUBMITTED'] + (['CPU', 'MEMORY', 'PROGRESS'] if args.long else [])
    screen.table(headings + ['COMMAND'], [cmd_row(row, details, statuses) for row in rows])
    return 0


def cmd_row(row: Dict[str, Any], details: Dict[str, Any], statuses: Dict[str, Any]) -> List[str]:
    """A line of `ps`."""
    shown = [row['cmdId'], row['vm'], row['state'], shown_time(row['submitted'])]
    status = statuses.get(row['cmdId'])
    if statuses:
        usage = status['resources'] if status else {}
        shown += ['%.1f s' % (usage.get('ru_utime', 0) + usage.get('ru_stime', 0)),
                  shown_size(usage.get('ru_maxrss', 0) * 1024), str(status and status['progress'] or '-')]
    words = [row['cmd']] + details.get(row['cmdId'], {}).get('args', [])
    return shown + [' '.join(shlex.quote(word) for word in words)]


def do_run(host: Client, screen: Screen, args: Any) -> int:
    """Runs a command, brings its output as it comes, and exits with its code."""
    if not args.command:
        raise InvalidParams('no command given: run VM -- CMD ARG…')
    options = {}  # type: Dict[str, Any]
    if args.timeout:
        options['timeout'] = args.timeout
    if args.stdin:
        options['stdin'] = Binary(sys.stdin.buffer.read())
    many = host.is_pattern(args.vm)
    with Interrupts() as interrupts:
        cmd_id = host.call('runCmdOnAll' if many else 'runCmd', args.vm, args.command[0], args.command[1:],
                           dict(args.env), args.folder, args.input, options)
        if args.detach:
            screen.say(cmd_id)
            return 0
        try:
            followed = Followed(host, screen, cmd_id, many)
            followed.to_the_end(lambda: forward(host, screen, cmd_id, interrupts))
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
        return max(exit_code(screen, host.call('getCmdResults', key), name)
                   for key, name in followed.names.items())


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
        keys = host.call('getCmdDetails', cmd_id)['executions'] if many else [cmd_id]
        self.names = {key: key.partition('@')[2] for key in keys} if many else {cmd_id: ''}
        self._open = [Tail(host, key, Pipe(screen.out, name), Pipe(screen.err, name))
                      for key, name in self.names.items()]

    def look(self, patience: float = PATIENCE) -> bool:
        """Brings what is there now; whether that was anything. Raises as ``Tail.look``."""
        return any([execution.look(patience) for execution in self._open])

    def to_the_end(self, between: Callable[[], None]) -> None:
        """Looks until all have ended; calls ``between`` before each look."""
        pause = SHORTEST_LOOK
        while self._open:
            self._host.call('waitCmd', self._open[0].key, pause)
            between()
            pause = SHORTEST_LOOK if self.look() else min(2 * pause, LONGEST_LOOK)
            self._open = [execution for execution in self._open if not execution.is_over]


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

    def look(self, patience: float = PATIENCE) -> bool:
        """Brings what is there now; whether that was anything.

        While the guest is away there is nothing. Raises VMHostError where output that there is
        can't be read for so many seconds after the command's end; with no patience, also before.
        """
        status = self._host.call('getCmdStatus', self.key)
        ended = status['ended'] > 0
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
    was_cut = tell_cut(screen, results, vm)
    if state not in ('exited', 'signaled'):
        screen.complain('%s%s' % (vm and vm + ': ', why))
    if state == 'timeout' and results['finished']:
        return number or TIMED_OUT      # it ended in peace at the TERM, and still isn't done
    if state == 'exited':
        return number or (FAILED if was_cut else 0)     # who reads the output should know that it isn't all
    if state == 'failed':
        return NOT_STARTED.get(why.partition(':')[0], FAILED)
    return 128 + number if state in ('signaled', 'timeout') else FAILED


def tell_cut(screen: Screen, results: Dict[str, Any], vm: str) -> bool:
    """Complains where there was more output than the guest keeps; whether there was."""
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
