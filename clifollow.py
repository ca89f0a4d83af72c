"""The output of commands as it comes, on our own standard output and error; and how commands ended.

What it is not: the verbs (clicommands.py), or a terminal (cliterminal.py). No threads, no locks.
"""

import contextlib
import re
import time
from typing import Any, Callable, Dict, Set, Tuple

import agent
from cliscreen import Screen, naming_output
from cliverbs import FAILED
from faults import AgentNotConnected, DeadlineExceeded
from hostclient import Client, PatientClient

TIMED_OUT = 124                # exit code of one that ran into its timeout, and ended with 0: timeout(1)'s
NOT_EXECUTED = ('EACCES', 'ENOEXEC', 'ENOTDIR', 'ELOOP', 'ENAMETOOLONG', 'ETXTBSY', 'E2BIG', 'ELIBBAD')
NOT_STARTED = dict(dict.fromkeys(NOT_EXECUTED, 126), ENOENT=127)   # as shells have it, …
NOT_THE_PROGRAM = ('its folder: ', 'standard input: ')     # … but for what isn't the program
# What no program is called, but who comes from ssh types: a line, or a word that shells alone know.
FOR_A_SHELL = re.compile(r'[\s;|&<>$`*"\']|^(cd|export|source|alias|ulimit|umask|exit|type|set|unset)$')
SHORTEST_LOOK = 0.01           # seconds between looks at a command's output …
LONGEST_LOOK = 0.25            # … which grow while nothing comes
PATIENCE = 10.0                # seconds after a command's end in which all of its output should have come
PIECE = 256 * 1024             # bytes of a command's output that are asked for at a time


class Followed:
    """A command whose output comes to standard output and standard error, apart, as it is written.

    One execution's bytes pass unchanged; where there are many, each line begins with its VM's name.
    """

    def __init__(self, host: PatientClient, screen: Screen, cmd_id: str, many: bool) -> None:
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

    def tail(self, lines: int) -> None:
        """Leaves out all but the last lines of what is there now."""
        for execution in self._open:
            execution.tail(lines)

    def to_the_end(self, between: Callable[[], None], limit: float = 0) -> None:
        """Looks until all have ended; calls ``between`` before each look.

        limit    monotonic: from then on, nobody is waited for who doesn't answer; 0: they are, which is told
        """
        pause = SHORTEST_LOOK
        while self._open:
            if len(self.names) > 1:
                self._host.call('waitCmd', self._open[0].key, pause)
            else:
                self._open[0].wait(pause)
            between()
            pause = SHORTEST_LOOK if self.look() else min(2 * pause, LONGEST_LOOK)
            self._open = [execution for execution in self._open if not execution.is_over]
            silent = [execution for execution in self._open if execution.is_silent(self._host.back_at)]
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
        waits = self._host.call('getCmdStatus', key, False)['state'] in ('queued', 'sent')
        self._screen.complain('%sno answer within the time limit; %s %s' % (
            name and name + ': ', 'once it answers, it may begin (`kill` cancels it):' if waits
            else 'the command continues as', key))
        return FAILED, 'absent'


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

    def wait(self, seconds: float) -> None:
        """Until there is standard output, or the end; at the latest after so many seconds."""
        with contextlib.suppress(AgentNotConnected, DeadlineExceeded):
            self._take('out', self._host.output(self.key, 'out', self._offsets['out'], PIECE, seconds).data)

    def _take(self, stream: str, data: bytes) -> None:
        if data:
            self._pipes[stream].write(data)
            self._offsets[stream] += len(data)

    def is_silent(self, since: float) -> bool:
        """Whether the guest hasn't answered for long; since: when it could at the earliest."""
        return time.monotonic() - max(self._answered, since) > PATIENCE

    def tail(self, lines: int) -> None:
        """Leaves out all but the last lines of what is there now. Raises VMHostError."""
        status = self._host.call('getCmdStatus', self.key)
        for stream in self._pipes:
            self._offsets[stream] = self._last_lines(stream, int(status[stream + 'Size']), lines)

    def _last_lines(self, stream: str, size: int, lines: int) -> int:
        """Where the last lines begin: read from the end, until there are as many."""
        begin, text = size, b''
        while begin > 0 and text.count(b'\n', 0, -1) < lines:
            length = min(begin, PIECE)
            begin -= length
            text = self._host.output(self.key, stream, begin, length).data + text
        found = text.splitlines(True)[-lines:] if lines else []
        return size - sum(map(len, found))

    def _bring(self, stream: str, size: float) -> bool:
        begin = self._offsets[stream]
        while self._offsets[stream] < size:
            data = self._host.output(self.key, stream, self._offsets[stream], PIECE).data
            if not data:
                break
            self._take(stream, data)
        return self._offsets[stream] > begin


class Pipe:
    """Bytes to one of our own outputs; with a VM's name, each line begins with it."""

    def __init__(self, stream: Any, vm: str) -> None:
        self._to = stream.buffer
        self._is_shown = stream.isatty()
        self._prefix = (agent.printable(vm) + ': ').encode('utf-8', 'replace') if vm else b''
        self._begun = b''              # a line whose end hasn't come

    def write(self, data: bytes) -> None:
        """Writes them, but for a line that isn't whole yet where lines are prefixed."""
        if self._prefix:
            lines = (self._begun + data).split(b'\n')
            self._begun = lines.pop()
            if self._is_shown:         # else one machine's line could be made to look like another's
                lines = list(map(without_controls, lines))
            data = b''.join(self._prefix + line + b'\n' for line in lines)
        with naming_output():
            self._to.write(data)
            self._to.flush()

    def end(self) -> None:
        """Nothing more comes."""
        if self._begun:
            self.write(b'\n')


def without_controls(line: bytes) -> bytes:
    """A line for a terminal that obeys nothing in it, but tabs."""
    text = line.decode('utf-8', 'backslashreplace')
    return '\t'.join(map(agent.printable, text.rstrip('\r').split('\t'))).encode('utf-8', 'replace')


def exit_code(screen: Screen, results: Dict[str, Any], vm: str = '') -> int:
    """What a shell would say of a command that ended so; tells why, where the program itself can't."""
    number, state = results['exitCodeOrSignal'], results['state']
    why = results['error'] or state
    is_cut = tell_cut(screen, results, vm)
    if state not in ('exited', 'signaled') or results['error']:
        screen.complain('%s%s' % (vm and vm + ': ', why))
    if state == 'timeout' and results['finished']:
        return number or TIMED_OUT      # it ended in peace at the TERM, and still isn't done
    if state == 'exited':
        return number or (FAILED if is_cut else 0)
    if state == 'failed' and not results['finished']:
        name, _, about = why.partition(': ')
        code = FAILED if about.startswith(NOT_THE_PROGRAM) else NOT_STARTED.get(name, FAILED)
        if code == NOT_STARTED['ENOENT'] and FOR_A_SHELL.search(about.rpartition(': ')[2]):
            screen.complain('commands are not run by a shell: for such a line, `run VM -- sh -c \'…\'`')
        return code
    return 128 + number if state in ('signaled', 'timeout') else FAILED


def end_of(results: Dict[str, Any]) -> str:
    """How it ended, in a word or two."""
    if results['state'] in ('exited', 'signaled'):
        return '%s %d' % (results['state'], results['exitCodeOrSignal'])
    return results['state']


def tell_cut(screen: Screen, results: Dict[str, Any], vm: str) -> bool:
    """Whether output is missing, which is complained about. Why somebody else's deed or a full disk took it
    is told by the error."""
    cut = [stream for stream in ('out', 'err') if results.get(stream + '-truncated')]
    is_harm = results['state'] == 'failed' or ': what it wrote ' in results['error']
    for stream in cut:
        screen.complain('%sstd%s was truncated%s' % (
            vm and vm + ': ', stream, '' if is_harm else ': the command wrote more than output_limit'))
    return bool(cut)
