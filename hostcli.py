"""The command line: talks to a running host agent by XML-RPC, and shows what it answers.
"""

import argparse
import base64
import contextlib
import difflib
import fnmatch
import functools
import http.client
import http.server
import io
import json
import os
import posixpath
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.parse
import webbrowser
import xml.parsers.expat
import xmlrpc.client
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

import agent
import protocol
from faults import (
    AccessDenied,
    AgentNotConnected,
    BadState,
    DeadlineExceeded,
    InvalidParams,
    NoSuchCommand,
    NoSuchVM,
    VMHostError,
)
from hostapi import USER, FilePath, is_carried, xml_number
from hostconfig import SETTINGS
from hostjournal import FINISHED

# --- command line: the running host, and what is shown ----------------------------------------

class NoHost(VMHostError):
    """No host agent answers."""


class Client:
    """The running host agent, found by its state folder. One per thread.

    What the host raised comes out as the same VMHostError; NoHost where nobody answers.
    """

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.address = ''
        self._folder = settings.Host.state_dir
        self._transport = xmlrpc.client.Transport()

    def _find(self) -> None:
        host, _, port = self._read('xmlrpc.address', 'no host agent runs here').rpartition(':')
        token = self._read('xmlrpc.token', 'no token')
        host = {'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host)
        self.address = '%s:%s' % ('[%s]' % host if ':' in host else host, port)
        self._authority = '%s:%s@%s' % (USER, urllib.parse.quote(token, ''), self.address)

    def _read(self, name: str, absent: str) -> str:
        path = os.path.join(self._folder, name)
        try:
            with open(path, encoding='utf-8') as file:
                return file.read().strip()
        except FileNotFoundError:
            raise NoHost('%s (%s is missing): start it with `vmhost.py host.ini`, or name the ini file '
                         'that it was started with' % (absent, path))
        except (OSError, ValueError) as error:
            raise AccessDenied('%s: %s; only the user who runs the host agent can talk to it'
                               % (path, getattr(error, 'strerror', '') or error))

    def call(self, method: str, *args: Any) -> Any:
        """What a method of the API answers. Raises VMHostError."""
        body = xmlrpc.client.dumps(args, method, allow_none=True).replace('\r', '&#13;')
        if body.translate(agent.XML_UNSAFE) != body:
            raise InvalidParams('XML-RPC can\'t carry control characters: send them as a file, or as '
                                'standard input')
        if not self.address:
            self._find()
        try:
            answer, = self._transport.request(self._authority, '/', body.encode('utf-8'))
            return answer
        except xmlrpc.client.Fault as fault:
            raise raised_by(fault)
        except xmlrpc.client.ProtocolError as error:
            if error.errcode == 401:
                raise AccessDenied('the host agent at %s does not take the token in %s: restart it, or put '
                                   'back the token that it was started with'
                                   % (self.address, os.path.join(self._folder, 'xmlrpc.token')))
            raise NoHost('the host agent at %s: %s %s' % (self.address, error.errcode, error.errmsg))
        except OSError as error:
            raise NoHost('no host agent answers at %s (%s): start it again with `vmhost.py host.ini`'
                         % (self.address, error.strerror or error))
        except (http.client.HTTPException, xml.parsers.expat.ExpatError, ValueError) as error:
            raise NoHost('what answers at %s is no vmhost (%s): restart the host agent'
                         % (self.address, type(error).__name__))

    def each(self, method: str, names: Iterable[str]) -> List[Tuple[str, Any]]:
        """(name, answer) of a method for each name, without those for which it raised."""
        names = list(names)
        calls = [{'methodName': method, 'params': [name]} for name in names]
        answers = self.call('system.multicall', calls)
        return [(name, answer[0]) for name, answer in zip(names, answers) if isinstance(answer, list)]

    def vm_names(self) -> List[str]:
        """All VMs, and all machines whose agents are connected."""
        return sorted(set(self.call('listVMs')) | set(self.call('listRegisteredVMs')))

    def is_pattern(self, vm: str) -> bool:
        """Whether it is a glob, and not just the name of a VM that has such characters.

        A guest may call itself what it likes, ``*`` too: where a glob means others, it is one.
        """
        if not any(sign in vm for sign in '*?['):
            return False
        names = self.call('getNamesToIdsMapping')
        return vm not in names or any(fnmatch.fnmatchcase(name, vm) for name in names if name != vm)

    def matching(self, vm: str) -> List[str]:
        """The VMs that a glob means; what is no glob, unchanged. Raises NoSuchVM."""
        if not self.is_pattern(vm):
            return [vm]
        found = [name for name in self.vm_names() if fnmatch.fnmatchcase(name, vm)]
        if not found:
            raise NoSuchVM('no VM matches %s' % vm)
        return found


def raised_by(fault: xmlrpc.client.Fault) -> VMHostError:
    """A fault as the error that the host raised."""
    kinds = {kind.fault: kind for kind in VMHostError.__subclasses__() if 'fault' in vars(kind)}
    hint = ' (`ls` lists them)' if fault.faultCode == NoSuchVM.fault else ''
    return kinds.get(fault.faultCode, VMHostError)(fault.faultString + hint)


COLOURS = {'alive': 32, 'Running': 32, 'running': 32, 'late': 33, 'Paused': 33, 'Saved': 33, 'suspended': 33,
           'queued': 33, 'sent': 33, 'lost': 31, 'failed': 31, 'timeout': 31, 'signaled': 31, 'Aborted': 31,
           'Stuck': 31, 'ok': 32, '--': 33, 'NO': 31}  # type: Dict[str, int]
PROGRESS_EVERY = 0.2           # seconds between two looks at a progress


class Screen:
    """Standard output and standard error: for a person, where they are a terminal."""

    def __init__(self) -> None:
        self.out = lenient(sys.stdout)
        self.err = lenient(sys.stderr)
        plain = 'NO_COLOR' in os.environ or os.environ.get('TERM') == 'dumb'
        self._colours = self.out.isatty() and not plain
        self.width = shutil.get_terminal_size().columns if self.out.isatty() else 0    # 0: any
        self.shows_progress = self.err.isatty()
        self._progress = 0             # columns of the progress line that stands on the terminal

    def say(self, text: str) -> None:
        """A line on standard output, at once."""
        self.out.write(text + '\n')
        self.out.flush()

    def complain(self, text: str) -> None:
        """A line on standard error."""
        self.progress('')
        self.err.write('vmhost: %s\n' % agent.printable(text))
        self.err.flush()

    def json(self, value: Any, indent: Optional[int] = 2) -> None:
        """The value as JSON."""
        ascii_only = (self.out.encoding or '').lower().replace('-', '') != 'utf8'
        self.say(json.dumps(value, indent=indent, ensure_ascii=ascii_only, default=as_text))

    def table(self, headings: List[str], rows: Iterable[List[Any]]) -> None:
        """Columns as wide as they need to be, and cut to the terminal, but for the first one."""
        lines = [[agent.printable(str(cell)) for cell in row] for row in [headings] + list(rows)]
        widths = [max(map(cells, column)) for column in zip(*lines)]
        while self.width and sum(widths) + 2 * len(widths) - 2 > self.width:
            widest = max(range(len(widths)), key=lambda n: (n > 0, widths[n]))
            if widths[widest] <= 8:
                break
            widths[widest] -= 1
        for line in lines:
            padded = [self._cell(text, width) for text, width in zip(line, widths)]
            self.say('  '.join(padded[:-1] + [padded[-1].rstrip()]))

    def _cell(self, text: str, width: int) -> str:
        shown = text
        if cells(shown) > width:
            while cells(shown) > width - 1:
                shown = shown[:-1]
            shown += '…' if (self.out.encoding or '').lower().startswith('utf') else '~'
        padding = ' ' * (width - cells(shown))
        return self.coloured(shown, COLOURS.get(text, 0)) + padding

    def coloured(self, text: str, colour: int) -> str:
        """The text in one of the terminal's colours; 0: as it is."""
        return '\033[%dm%s\033[0m' % (colour, text) if self._colours and colour else text

    def progress(self, text: str) -> None:
        """Replaces the one line that tells how far it is; '' takes it away."""
        if self.shows_progress and (text or self._progress):
            text = text[:max(0, shutil.get_terminal_size().columns - 1)]
            self.err.write('\r' + text + ' ' * (self._progress - len(text)) + ('' if text else '\r'))
            self.err.flush()
            self._progress = len(text)


@functools.lru_cache(maxsize=None)      # a wrapper that is let go closes what it wraps
def lenient(stream: Any) -> Any:
    """The stream, so that no character is an error, whatever the locale."""
    if hasattr(stream, 'reconfigure'):
        stream.reconfigure(errors='backslashreplace')
    elif hasattr(stream, 'buffer'):         # Python 3.6
        return io.TextIOWrapper(stream.buffer, stream.encoding, 'backslashreplace', line_buffering=True)
    return stream


def as_text(value: Any) -> str:
    """What JSON doesn't know: XML-RPC's base64."""
    return base64.b64encode(value.data).decode('ascii')


def cells(text: str) -> int:
    """How many columns of a terminal it takes."""
    return sum(0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in 'WF' else 1
               for char in text)


def shown_size(size: float) -> str:
    """Bytes for a person."""
    for unit in ('B', 'KiB', 'MiB'):
        if size < 1024:
            return '%.*f %s' % (0 if unit == 'B' or size >= 100 else 1, size, unit)
        size /= 1024.0
    return '%.1f GiB' % size


def shown_span(seconds: float) -> str:
    """A duration for a person."""
    if seconds < 100:
        return '%.0f s' % seconds
    minutes = seconds / 60
    return '%.0f min' % minutes if minutes < 100 else '%.0f h' % (minutes / 60) if minutes < 6000 \
        else '%.0f d' % (minutes / 1440)


def shown_time(moment: float) -> str:
    """A time since 1970 for a person, in the local zone; '-' for 0."""
    return time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(moment)) if moment else '-'


# --- command line: the verbs -------------------------------------------------------------------

OURS = 255                     # exit code of `run` for an error that isn't the command's
TIMED_OUT = 124                # … of a command that ran into its timeout, and ended with 0: timeout(1)'s
INTERRUPTED = 130              # exit code after Ctrl-C
SHORTEST_LOOK = 0.01           # seconds between looks at a command's output …
LONGEST_LOOK = 0.25            # … which grow while nothing comes
PATIENCE = 10.0                # seconds in which the output of an ended command should be had
FINISHED_SHOWN = 20            # finished commands that `ps` lists
EVENTS_SHOWN = 100


def do_ls(host: Client, screen: Screen, args: Any) -> int:
    """VMs, and whether their agents are there."""
    found = [vm for _, vm in host.each('getVM', host.vm_names())]
    if args.json:
        screen.json(found)
        return 0
    headings = ['NAME', 'STATE', 'AGENT', 'ADDRESS', 'COMMANDS']
    if args.long:
        headings += ['ID', 'SEEN', 'CPUS', 'MEMORY', 'PYTHON', 'CLOCK', 'SYSTEM']
    screen.table(headings, [vm_row(vm, args.long) for vm in found])
    for job in host.call('agentInfo')['jobs']:
        screen.say(agent.printable('%s: %s, %d %%' % (job['vm'], job['text'], job['percent'])))
    return 0


def vm_row(vm: Dict[str, Any], long: bool) -> List[str]:
    """A line of `ls`."""
    row = [vm['name'], vm['state'], vm['agent'], vm['ip'] or '-', len(vm['commands'])]
    facts = vm['facts']
    if long:
        seen = shown_span(max(0, time.time() - vm['lastSeen'])) + ' ago' if vm['lastSeen'] else 'never'
        row += [vm['id'], seen, facts.get('cpus', '-'), shown_size(facts['mem']) if facts.get('mem') else '-',
                facts.get('python', '-'), '%+.1f s' % vm['clockOffset'], facts.get('os', '-')]
    return row


def do_info(host: Client, screen: Screen, args: Any) -> int:
    """All that is known of a VM, or of a command."""
    try:
        found = host.call('getVM', args.vm)
    except NoSuchVM:
        try:
            found = dict(host.call('getCmdDetails', args.vm), status=host.call('getCmdStatus', args.vm),
                         results=host.call('getCmdResults', args.vm))
        except NoSuchCommand:
            raise NoSuchVM('%s is neither a VM (`ls` lists them) nor a command (`ps`)' % args.vm)
    show_pairs(screen, found, args.json)
    return 0


def show_pairs(screen: Screen, found: Dict[str, Any], as_json: bool) -> None:
    """What the API told of one thing: for a person, or as JSON."""
    if as_json:
        screen.json(found)
    else:
        screen_pairs(screen, found)


def screen_pairs(screen: Screen, found: Dict[str, Any], indent: str = '') -> None:
    """Names and values, one in a line; what is in a mapping stands indented below its name."""
    width = max([len(str(name)) for name in found] + [0])
    for name, value in found.items():
        if isinstance(value, dict) and value:
            screen.say('%s%s' % (indent, agent.printable(str(name))))
            screen_pairs(screen, value, indent + '    ')
            continue
        if name in ('submitted', 'started', 'ended', 'lastSeen') and isinstance(value, float):
            value = shown_time(value)
        elif isinstance(value, list):
            value = ', '.join(map(str, value))
        screen.say('%s%-*s  %s' % (indent, width, agent.printable(str(name)),
                                   agent.printable(str(value)) or '-'))


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
        raise InvalidParams('which command? It stands behind --: run VM -- CMD ARG…')
    options = {}  # type: Dict[str, Any]
    if args.timeout:
        options['timeout'] = args.timeout
    if args.stdin:
        options['stdin'] = xmlrpc.client.Binary(sys.stdin.buffer.read())
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
            screen.complain('left; the command goes on as %s' % cmd_id)
            raise
        except BrokenPipeError:
            host.call('signalCmd', cmd_id, 'PIPE')      # as if it had written there itself
            raise
        except OSError:
            screen.complain('left; the command goes on as %s' % cmd_id)
            raise
        except NoHost:
            screen.complain('the command goes on: once the host is back, `out -f %s` shows it' % cmd_id)
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
            screen.complain('%s sent to the command; once more leaves it running' % name)
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

        While the guest is away there is nothing. Raises VMHostError where output that there is can't be
        had, for so many seconds after the command's end; with no patience, also before.
        """
        status = self._host.call('getCmdStatus', self.key)
        ended = status['state'] in FINISHED
        if ended:
            self._ended = self._ended or time.monotonic()
        sizes = {stream: status[stream + 'Size'] for stream in self._pipes}
        try:
            moved = any([self._bring(stream, size) for stream, size in sizes.items()])
            missing = sum(max(0, size - self._offsets[stream]) for stream, size in sizes.items())
            if ended and missing:
                raise DeadlineExceeded('%d bytes of the output of %s can\'t be had' % (missing, self.key))
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
    tell_cut(screen, results, vm)
    if state not in ('exited', 'signaled'):
        screen.complain('%s%s' % (vm and vm + ': ', why))
    if state == 'timeout' and results['finished']:
        return number or TIMED_OUT      # it ended in peace at the TERM, and still isn't done
    if state == 'exited':
        return number
    return 128 + number if state in ('signaled', 'timeout') else OURS


def tell_cut(screen: Screen, results: Dict[str, Any], vm: str) -> None:
    """Complains where there was more output than the guest keeps."""
    for stream in ('out', 'err'):
        if results.get(stream + '-truncated'):
            screen.complain('%sstd%s was cut: more was written than output_limit allows'
                            % (vm and vm + ': ', stream))


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
    raise BadState('%s has ended already' % args.id)


def do_create(host: Client, screen: Screen, args: Any) -> int:
    """Makes a VM from an image, or registers a .vbox file."""
    options = {name: getattr(args, name) for name in ('memory', 'cpus', 'ostype', 'network', 'diskSize')
               if getattr(args, name) is not None}
    paths = [os.path.abspath(path) for path in (args.image,) if path]
    name = args.name
    if not paths and name.endswith('.vbox'):
        name = os.path.abspath(name)       # the host's working directory is not ours
    _, made = watch(host, screen, name, 'createVM', name, *(paths or ['']) + [options])
    screen.say(agent.printable(made))
    return 0


def do_rm(host: Client, screen: Screen, args: Any) -> int:
    """Takes a VM out of the hypervisor, with its disks where asked."""
    return change(host, screen, [args.vm], 'removed', 'removeVM', args.disks)


def do_start(host: Client, screen: Screen, args: Any) -> int:
    """Starts VMs, or lets saved ones go on."""
    return change(host, screen, host.matching(args.vm), 'runs', 'start', args.gui)


def do_stop(host: Client, screen: Screen, args: Any) -> int:
    """Asks the systems of VMs to power off, or cuts their power."""
    return change(host, screen, host.matching(args.vm), 'is off', 'powerOff' if args.force else 'shutdown')


def do_pause(host: Client, screen: Screen, args: Any) -> int:
    """Halts running VMs in memory."""
    return change(host, screen, host.matching(args.vm), 'is paused', 'pause')


def do_resume(host: Client, screen: Screen, args: Any) -> int:
    """Lets paused VMs go on."""
    return change(host, screen, host.matching(args.vm), 'runs', 'resume')


def do_save(host: Client, screen: Screen, args: Any) -> int:
    """Writes running VMs to disk, and stops them."""
    return change(host, screen, host.matching(args.vm), 'is saved', 'saveState')


def do_reset(host: Client, screen: Screen, args: Any) -> int:
    """Presses the reset button of VMs."""
    return change(host, screen, host.matching(args.vm), 'is reset', 'reset')


def change(host: Client, screen: Screen, vms: List[str], done: str, method: str, *args: Any) -> int:
    """Calls a method for each VM, and says when it is done; one that can't holds up no other."""
    code = 0
    for vm in vms:
        try:
            watch(host, screen, vm, method, vm, *args)
            screen.say('%s %s' % (agent.printable(vm), done))
        except NoHost:
            raise
        except VMHostError as error:
            screen.complain('%s: %s' % (vm, error) if len(vms) > 1 else str(error))
            code = 1
    return code


def watch(host: Client, screen: Screen, vm: str, method: str, *args: Any) -> Any:
    """Calls a method that may take long; meanwhile a terminal shows how far the hypervisor is.

    Ctrl-C ends the waiting alone: a hypervisor stopped in the middle would leave worse behind.
    """
    try:
        return call_watched(host, screen, vm, method, *args)
    except KeyboardInterrupt:
        screen.complain('%s: the host agent goes on with it, `ls` shows how far it is' % vm)
        raise


def call_watched(host: Client, screen: Screen, vm: str, method: str, *args: Any) -> Any:
    """What the method answers; where there is a terminal, with a line of progress until it does."""
    if not screen.shows_progress:
        return host.call(method, *args)
    answers = queue.Queue()        # type: queue.Queue

    def work() -> None:
        try:
            answers.put((host.call(method, *args), None))
        except VMHostError as error:
            answers.put((None, error))
    threading.Thread(target=work, name='call', daemon=True).start()
    begin, looker = time.monotonic(), Client(host.settings)
    while True:
        try:
            answer, error = answers.get(timeout=PROGRESS_EVERY)
            break
        except queue.Empty:
            screen.progress(job_line(looker, vm, time.monotonic() - begin))
    screen.progress('')
    if error is not None:
        raise error
    return answer


def job_line(host: Client, vm: str, seconds: float) -> str:
    """How far the hypervisor is with a VM."""
    line = '%s: %s' % (agent.printable(vm), shown_span(seconds))
    for job in host.call('agentInfo')['jobs']:
        if job['vm'] == vm and job['percent']:
            line += ', %d %%, %s left %s' % (job['percent'], shown_span(
                seconds * (100 - job['percent']) / job['percent']), agent.printable(job['text']))
    return line


def do_snap(host: Client, screen: Screen, args: Any) -> int:
    """Lists, takes, restores and deletes snapshots."""
    if args.action == 'ls':
        names = host.call('listSnapshots', args.vm)
        if args.json:
            screen.json(names)
        else:
            for name in names:
                screen.say(agent.printable(name))
        return 0
    if args.action != 'restore' and not args.name:
        raise InvalidParams('which snapshot? snap %s VM NAME' % args.action)
    method, done = {'take': ('takeSnapshot', 'taken'), 'restore': ('restoreSnapshot', 'restored'),
                    'rm': ('deleteSnapshot', 'deleted')}[args.action]
    watch(host, screen, args.vm, method, args.vm, args.name)
    screen.say('snapshot %s' % done)
    return 0


def do_rdp(host: Client, screen: Screen, args: Any) -> int:
    """Switches the remote desktop of a VM, and says where it is."""
    desktop = host.call('remoteDesktop', args.vm, not args.off)
    if args.json:
        screen.json(desktop)
    elif args.off:
        screen.say('off')
    else:
        screen.say('%(address)s:%(port)s (authentication %(auth)s, security %(security)s)' % desktop)
    return 0


def do_net(host: Client, screen: Screen, args: Any) -> int:
    """The network of the VMs, as it is."""
    network = host.call('setupNetwork' if args.setup else 'getNetwork')
    show_pairs(screen, network, args.json)
    if args.setup and network['mode'] == 'hostonly':
        address = host.call('agentInfo')['broker']['address']
        if is_out_of_reach(address, network['mode']):
            screen.complain(OUT_OF_REACH % address)
    return 0


OUT_OF_REACH = 'the broker listens at %s, where no VM reaches it: start the host agent again'


def is_out_of_reach(broker: str, mode: str) -> bool:
    """Whether the broker's address is for this machine alone, in a host-only network: the host agent was
    started before there was one."""
    return mode == 'hostonly' and broker.startswith(('127.', 'localhost'))


def do_cleanup(host: Client, screen: Screen, args: Any) -> int:
    """What this tool made and nobody owns: shown, or removed."""
    found = host.call('cleanup', not args.yes)
    if args.json:
        screen.json(found)
        return 0
    for what in found:
        screen.say(agent.printable('%s %s %s (%s)' % ('removed' if args.yes else 'would remove', what['kind'],
                                                what['name'], what['why'])))
    if found and not args.yes:
        screen.complain('nothing was removed: cleanup --yes does')
    return 0


def do_put(host: Client, screen: Screen, args: Any) -> int:
    """Sends a file or folder to VMs."""
    source = os.path.abspath(args.source)      # the host's working directory is not ours
    target = args.target or os.path.basename(source)
    return max([transfer(host, screen, 'put', vm, source, target) for vm in host.matching(args.vm)])


def do_get(host: Client, screen: Screen, args: Any) -> int:
    """Fetches a file or folder from a VM."""
    name = posixpath.basename(args.source.rstrip('/'))
    target = os.path.abspath(args.target or name)
    if os.path.isdir(target) and args.target and name not in ('', '.', '..'):
        target = os.path.join(target, name)
    return transfer(host, screen, 'get', args.vm, args.source, target)


def carried(path: str) -> FilePath:
    """A path for XML-RPC: as text, or its exact bytes where text can't have them."""
    return path if is_carried(path) else xmlrpc.client.Binary(path.encode('utf-8', 'surrogateescape'))


def transfer(host: Client, screen: Screen, direction: str, vm: str, source: str, target: str) -> int:
    """Moves a file or folder, verified; a terminal shows how far it is. Ctrl-C cancels it."""
    moving = host.call('startTransfer', direction, vm, carried(source), carried(target))
    try:
        while True:
            now = host.call('getTransfer', moving)
            if now['state'] not in ('waiting', 'running'):
                break
            screen.progress('%s: %s' % (agent.printable(vm), transfer_line(now)))
            time.sleep(PROGRESS_EVERY)
    except KeyboardInterrupt:
        host.call('cancelTransfer', moving)
        raise
    finally:
        screen.progress('')
    if now['state'] != 'done':
        screen.complain('%s: %s' % (vm, now['error'] or now['state']))
        return 1
    return 0


def transfer_line(now: Dict[str, Any]) -> str:
    """Bytes, rate and time left of a transfer."""
    line = '%s of %s, %s/s' % (shown_size(now['bytes']), shown_size(now['total']), shown_size(now['rate']))
    if now['rate'] and now['total']:
        line += ', %s left' % shown_span((now['total'] - now['bytes']) / now['rate'])
    return line


def do_status(host: Client, screen: Screen, args: Any) -> int:
    """The host agent's own state; or a link to its page in the browser, which opens it once."""
    if args.open:
        link = host.call('getStatusLink')
        screen.say(link)
        webbrowser.open(link)
        return 0
    info = host.call('agentInfo')
    show_pairs(screen, info, args.json)
    return 0


def do_ping(host: Client, screen: Screen, args: Any) -> int:
    """Asks agents whether they are there."""
    code = 0
    for name in host.matching(args.vm):
        begin = time.monotonic()
        try:
            screen.say('%s in %.1f ms' % (agent.printable(host.call('ping', name, args.timeout)),
                                          1000 * (time.monotonic() - begin)))
        except (AgentNotConnected, DeadlineExceeded) as error:
            screen.complain(str(error))
            code = 1
    return code


def do_events(host: Client, screen: Screen, args: Any) -> int:
    """What happened: the last events, and what comes."""
    last, timeout = -args.number, 0
    shown = []  # type: List[Dict[str, Any]]
    while True:
        answer = host.call('getEvents', last, timeout)
        for event in answer['events']:
            if not args.json:
                screen.say(event_line(screen, event))
            elif args.follow:
                screen.json(event, None)
        shown += answer['events']
        last, timeout = answer['last'], 60
        if not args.follow:
            break
        shown = []
    if args.json:
        screen.json(shown)
    return 0


def event_line(screen: Screen, event: Dict[str, Any]) -> str:
    """An event as a line of text."""
    words = [shown_time(event['time']), '%-14s' % event['type'], event['vm'], event['cmdId'], event['text']]
    return ' '.join(agent.printable(word) for word in words if word)


def do_call(host: Client, screen: Screen, args: Any) -> int:
    """Calls a method of the API; what it answers, as JSON."""
    answer = host.call(args.method, *[read_argument(text) for text in args.arguments])
    if args.raw and isinstance(answer, xmlrpc.client.Binary):
        screen.out.buffer.write(answer.data)
    elif args.raw and isinstance(answer, str):
        screen.say(answer)
    else:
        screen.json(answer)
    return 0


def read_argument(text: str) -> Any:
    """An argument of `call`: JSON, or else text. Raises InvalidParams where it begins like JSON."""
    try:
        # Numbers that XML-RPC's integers can't hold go as doubles, as in the host's answers.
        return json.loads(text, parse_int=lambda digits: xml_number(int(digits)))
    except ValueError as error:
        if text[:1] in ('{', '[', '"'):
            raise InvalidParams('%s is no JSON: %s' % (text, error))
        return text


# --- command line: what there is to say --------------------------------------------------------

Function = Callable[[Client, Screen, Any], int]     # what a verb does; gives the exit code


class Verb(NamedTuple):
    """A verb: its name, what does it, what is said of it, its arguments and some examples.

    An argument is what argparse's add_argument takes. Its metavar tells the completion what it is.
    """
    name: str
    function: Function
    help: str
    arguments: List[Tuple[Tuple[str, ...], Dict[str, Any]]]
    examples: List[str] = []


def argument(*names: str, **options: Any) -> Tuple[Tuple[str, ...], Dict[str, Any]]:
    """One argument of a verb."""
    return names, options


def switch(*names: str, **options: Any) -> Tuple[Tuple[str, ...], Dict[str, Any]]:
    """An option that is there or not."""
    return names, dict(options, action='store_true')


def read_variable(text: str) -> Tuple[str, str]:
    """K=V. Raises ArgumentTypeError."""
    name, sign, value = text.partition('=')
    if not name or not sign:
        raise argparse.ArgumentTypeError('%s: expected NAME=VALUE' % text)
    return name, value


def read_seconds(text: str) -> float:
    """A duration as in the ini files. Raises ArgumentTypeError."""
    try:
        return agent.duration(text)
    except ValueError as expected:
        raise argparse.ArgumentTypeError('%s: expected %s' % (text, expected))


JSON = switch('--json', help='as JSON, for programs')
VM = argument('vm', metavar='VM', help='name or id')
VMS = argument('vm', metavar='VM', help='name, id, or a pattern such as \'web*\'')
ID = argument('id', metavar='ID', help='of the command, as `run -d` printed it, and `ps` lists it')


def check_by_program(host: Client, screen: Screen, args: Any) -> int:
    """Lets the host agent's program look, which alone knows what it needs."""
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'vmhost.py')
    words = [sys.executable, program, args.ini, 'check'] + ['--json'] * args.json
    return subprocess.call(words)


VERBS = {verb.name: verb for verb in [
    Verb('check', check_by_program, 'is everything there that the host agent needs, and how is it mended?',
         [JSON]),
    Verb('ls', do_ls, 'VMs, and whether their agents are there', [
        JSON, switch('-l', '--long', help='more columns')]),
    Verb('info', do_info, 'all that is known of a VM, or of a command', [
        argument('vm', metavar='VM|ID', help='of a VM or a command'), JSON]),
    Verb('create', do_create, 'make a VM from an image, or register a .vbox file', [
        argument('name', metavar='NAME', help='of the VM, or a .vbox file'),
        argument('image', metavar='IMAGE', nargs='?', default='', help='.ova, .ovf, .vdi, .vmdk or .iso'),
        argument('--memory', metavar='MB', type=int), argument('--cpus', metavar='N', type=int),
        argument('--ostype', metavar='TYPE', help='VirtualBox\'s name of the guest\'s system'),
        argument('--network', choices=['hostonly', 'nat', 'none'], help='else as in host.ini'),
        argument('--disk', metavar='MB', type=int, dest='diskSize', help='of the disk beside an .iso')], [
            'create web1 cernvm.ova --memory 2048 --cpus 2']),
    Verb('rm', do_rm, 'take a VM out of the hypervisor', [
        VM, switch('--disks', help='and delete its disks')]),
    Verb('start', do_start, 'start VMs', [VMS, switch('--gui', help='with a window')]),
    Verb('stop', do_stop, 'ask the systems of VMs to power off', [
        VMS, switch('--force', help='cut their power')]),
    Verb('pause', do_pause, 'halt VMs in memory', [VMS]),
    Verb('resume', do_resume, 'let paused VMs go on', [VMS]),
    Verb('save', do_save, 'write VMs to disk and stop them; start goes on from there', [VMS]),
    Verb('reset', do_reset, 'press the reset button of VMs', [VMS]),
    Verb('snap', do_snap, 'snapshots of a VM', [
        argument('action', choices=['ls', 'take', 'restore', 'rm']), VM,
        argument('name', metavar='SNAPSHOT', nargs='?', default='', help='restore: else the current one'),
        JSON], ['snap take web1 fresh', 'snap restore web1 fresh']),
    Verb('run', do_run, 'run a program in a VM; its output comes as it is written', [
        switch('-i', '--stdin', help='pass standard input, read to its end first'),
        switch('-d', '--detach', help='print the command\'s id, and leave it to itself'),
        argument('-t', '--timeout', metavar='SEC', type=read_seconds, default=0.0,
                 help='end it after that time (90, 5m, 2h)'),
        argument('-e', '--env', metavar='K=V', type=read_variable, action='append', default=[],
                 help='a variable of its environment; may be repeated'),
        argument('-I', '--input', metavar='FILE', default='', help='standard input from a file in the VM'),
        argument('-C', '--folder', metavar='DIR', default='',
                 help='where it starts, within what the VM serves'),
        VMS], [
            'run web1 -- uname -a',
            'run -t 5m -e LEVEL=9 web1 -- sh -c \'gzip -$LEVEL < in > out\'',
            'run -i web1 -- tar xf - < tree.tar',
            'run \'web*\' -- uptime']),
    Verb('ps', do_ps, 'commands: all unfinished ones, and the last finished', [
        argument('vm', metavar='VM', nargs='?', help='only those of this VM'), JSON,
        switch('-l', '--long', help='their CPU time, memory and progress'),
        argument('-n', '--number', metavar='N', type=int, default=FINISHED_SHOWN,
                 help='how many finished ones (%d)' % FINISHED_SHOWN)]),
    Verb('out', do_out, 'the output of a command, so far', [
        switch('-f', '--follow', help='and what comes, until it ends'), ID]),
    Verb('kill', do_kill, 'send a signal to all processes of a command', [
        argument('-s', '--signal', metavar='SIG', default='TERM', help='TERM, KILL, INT, HUP, 9, …'), ID]),
    Verb('put', do_put, 'send a file or folder to a VM', [
        VMS, argument('source', metavar='SRC', help='here'),
        argument('target', metavar='DST', nargs='?', default='', help='there; else by its name')], [
            'put web1 data/ input']),
    Verb('get', do_get, 'fetch a file or folder from a VM', [
        VM, argument('source', metavar='SRC', help='there'),
        argument('target', metavar='DST', nargs='?', default='', help='here; else by its name')], [
            'get web1 result.tar .']),
    Verb('ping', do_ping, 'is the agent of a VM there?', [
        VMS, argument('-t', '--timeout', metavar='SEC', type=read_seconds, default=5.0, help='5 s')]),
    Verb('rdp', do_rdp, 'switch the remote desktop of a VM on, and say where it is', [
        VM, switch('--off', help='switch it off'), JSON]),
    Verb('net', do_net, 'the network of the VMs', [
        switch('--setup', help='make or mend it, as host.ini says'), JSON]),
    Verb('cleanup', do_cleanup, 'what this tool made and nobody owns: show it', [
        switch('--yes', help='remove it'), JSON]),
    Verb('status', do_status, 'the host agent itself', [
        switch('--open', help='print a link to the status page, and open it'), JSON]),
    Verb('events', do_events, 'what happened', [
        switch('-f', '--follow', help='and what happens, until Ctrl-C'), JSON,
        argument('-n', '--number', metavar='N', type=int, default=EVENTS_SHOWN,
                 help='how many of the past (%d)' % EVENTS_SHOWN)]),
    Verb('call', do_call, 'call a method of the API, and print what it answers as JSON', [
        argument('method', metavar='METHOD', help='`call -r help` describes them'),
        argument('arguments', metavar='JSON', nargs='*', help='each as JSON; what is none is text'),
        switch('-r', '--raw', help='a text or a picture as it is')], [
            'call listCmds \'{"vm": "web1", "state": "running"}\'', 'call -r help runCmd',
            'call -r screenshot web1 > web1.png']),
]}

USAGE = '''usage: {me} host.ini                 run the host agent until SIGTERM or Ctrl-C
       {me} host.ini VERB …          talk to the one that runs
       {me} host.ini VERB --help     what a verb takes
       {me} --bundle FILE.pyz        write all of it as one file that Python runs
       {me} --completion bash|zsh|fish
       {me} --version
'''
EXIT_CODES = '''exit codes: 0 done; 1 the host said no, or can't be reached; 2 wrong usage; 130 Ctrl-C.
run: the command's own (of many VMs the highest); 128 and the signal's number where one ended it;
     124 where it took its timeout for a reason to end with 0; 255 where it isn't the command's: no such
     VM, the program can't be started, it was lost. Any: 255 where standard output can't be written.
'''


def program_name() -> str:
    """How this program was called, for help and hints."""
    return os.path.basename(sys.argv[0]) or 'vmhost.py'


def overview() -> str:
    """What --help says."""
    verbs = ['  %-8s %s' % (verb.name, verb.help) for verb in VERBS.values()]
    examples = ['  %s host.ini %s' % (program_name(), example)
                for verb in VERBS.values() for example in verb.examples]
    return '\n'.join(['Drives virtual machines and the programs in them.\n', USAGE.format(me=program_name()),
                      'verbs:'] + verbs + ['', 'examples:'] + examples + ['', EXIT_CODES.rstrip()])


class Parser(argparse.ArgumentParser):
    """The arguments of one verb; what is wrong with them ends with that verb's exit code."""

    def __init__(self, verb: Verb) -> None:
        super().__init__(prog='%s host.ini %s' % (program_name(), verb.name), description=verb.help,
                         epilog=self._epilog(verb), allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self._code = OURS if verb.name == 'run' else 2
        for names, options in verb.arguments:
            self.add_argument(*names, **options)

    def _epilog(self, verb: Verb) -> str:
        lines = ['  %s host.ini %s' % (program_name(), example) for example in verb.examples]
        return '\n'.join((['examples:'] + lines if lines else []) + ['', EXIT_CODES])

    def error(self, message: str) -> Any:
        """One sentence, and where there is more."""
        self.exit(self._code, 'vmhost: %s: %s (%s --help)\n' % (self.prog.split()[-1], message, self.prog))


def read_arguments(verb: Verb, words: List[str]) -> Any:
    """The arguments of a verb. Exits where they are wrong, or --help is among them."""
    command = []  # type: List[str]
    if verb.name == 'run' and '--' in words:
        at = words.index('--')
        words, command = words[:at], words[at + 1:]
    args = Parser(verb).parse_args(words)
    args.command = command
    return args


def run_verb(ini: str, words: List[str], screen: Screen, check: Function) -> int:
    """Does what the words say with the host agent of that ini file; gives the exit code."""
    name = words[0]
    if name not in VERBS:
        close = difflib.get_close_matches(name, VERBS, 1)
        screen.complain('no verb %s%s; `%s --help` lists them' % (
            name, close and ' (%s?)' % close[0] or '', program_name()))
        return 2
    args = read_arguments(VERBS[name], words[1:])
    args.ini = ini
    try:
        function = check if name == 'check' else VERBS[name].function
        return function(Client(agent.read_settings(ini, SETTINGS)), screen, args)
    except (agent.AgentError, protocol.ProtocolError) as error:
        screen.complain(str(error))
        return OURS if name == 'run' else 1


# --- command line: completion ------------------------------------------------------------------

# Each asks this program for what could stand where the cursor is: {me} --complete WORD…, without the
# name of the program, up to the cursor. Nothing: a file.
COMPLETION = {
    'bash': """\
# vmhost: eval "$(python3 vmhost.py --completion bash)" in ~/.bashrc
_vmhost() {{
    local at=0 cur=${{COMP_WORDS[COMP_CWORD]}} found
    while ((at <= COMP_CWORD)) && [[ ${{COMP_WORDS[at++]}} != @(*vmhost.py|*vmhost.pyz|vmhost) ]]; do :; done
    ((at <= COMP_CWORD)) || return 0
    COMPREPLY=()
    while IFS= read -r found; do
        [[ $cur == [\\"\\']* ]] || printf -v found %q "$found"
        COMPREPLY+=("$found")
    done < <({me} --complete "${{COMP_WORDS[@]:at:COMP_CWORD-at+1}}" 2> /dev/null)
}}
complete -o default -F _vmhost vmhost.py vmhost.pyz vmhost python python3
""",
    'zsh': """\
# vmhost: eval "$(python3 vmhost.py --completion zsh)" in ~/.zshrc, behind compinit
_vmhost() {{
    local -a found
    found=("${{(@f)$({me} --complete "${{(@Q)words[2,CURRENT]}}" 2> /dev/null)}}")
    if [[ -n $found ]]; then compadd -a found; else _files; fi
}}
compdef _vmhost vmhost.py vmhost.pyz vmhost
""",
    'fish': """\
# vmhost: python3 vmhost.py --completion fish | source, in ~/.config/fish/config.fish
function __vmhost_candidates
    set -l words (commandline -opc) (commandline -ct)
    while set -q words[1]; and not string match -qr '(vmhost\\.pyz?|^vmhost)$' -- $words[1]
        set -e words[1]
    end
    set -q words[2]; and {me} --complete $words[2..-1] 2> /dev/null
end
for program in vmhost.py vmhost.pyz vmhost python python3
    complete -c $program -a '(__vmhost_candidates)'
end
""",
}


def completion(shell: str) -> str:
    """A script for that shell, which completes verbs, options, VMs and commands."""
    me = '%s %s' % (shlex.quote(sys.executable), shlex.quote(os.path.abspath(sys.argv[0])))
    return COMPLETION[shell].format(me=me).rstrip()


def candidates(words: List[str]) -> List[str]:
    """What could stand for the last word, behind the others: an ini file, a verb, its arguments."""
    words = [unquoted(word) for word in words]
    if len(words) < 2:
        found = ['--help', '--bundle', '--completion', '--version'] if words[-1:] != [''] else []
    elif len(words) == 2:
        found = list(VERBS)
    elif words[1] in VERBS and '--' not in words[:-1]:
        found = candidates_of(VERBS[words[1]], words)
    else:
        found = []
    return [candidate for candidate in found if words and candidate.startswith(words[-1])]


def unquoted(word: str) -> str:
    """A word as the shell will read it, when it is whole."""
    for end in ('', '"', "'"):
        with contextlib.suppress(ValueError):
            return ''.join(shlex.split(word + end))
    return word


def candidates_of(verb: Verb, words: List[str]) -> List[str]:
    """What could stand for the last word among the arguments of a verb."""
    options = {name: settings for names, settings in verb.arguments for name in names if name[0] == '-'}
    if words[-1].startswith('-'):
        return sorted(options) + ['--help']
    before = options.get(words[-2], {})
    if 'metavar' in before:
        wanted = before
    else:
        positional = [settings for names, settings in verb.arguments if names[0][0] != '-']
        given = [word for n, word in enumerate(words[2:-1], 2) if not word.startswith('-')
                 and 'metavar' not in options.get(words[n - 1], {})]
        wanted = positional[len(given)] if len(given) < len(positional) else {}
    try:
        return meant(Client(agent.read_settings(words[0], SETTINGS)), wanted, words[-2])
    except (agent.AgentError, protocol.ProtocolError):
        return []           # no host, no names; a shell in the middle of a line wants no complaint


def meant(host: Client, wanted: Dict[str, Any], vm: str) -> List[str]:
    """All that an argument could be, by its metavar. Raises VMHostError."""
    metavar = wanted.get('metavar')
    if 'choices' in wanted:
        return list(wanted['choices'])
    if metavar == 'SIG':
        return [number.name[3:] for number in signal.Signals if number.name.startswith('SIG')]
    if metavar == 'METHOD':
        return host.call('system.listMethods')
    if metavar == 'SNAPSHOT':
        return host.call('listSnapshots', vm)
    found = []  # type: List[str]
    if metavar in ('VM', 'VM|ID'):
        found += host.vm_names()
    if metavar in ('ID', 'VM|ID'):
        found += [row['cmdId'] for row in host.call('listCmds', {'limit': FINISHED_SHOWN})]
    return found


def run_option(words: List[str], screen: Screen) -> int:
    """What needs no ini file; gives the exit code."""
    if words[0] in ('-h', '--help'):
        screen.say(overview())
    elif words == ['--version']:
        screen.say('vmhost %s' % agent.VERSION)
    elif words[0] == '--bundle' and len(words) == 2:
        agent.write_bundle(words[1], 'vmhost', ['status.html'])
    elif words[0] == '--completion' and words[1:] in (['bash'], ['zsh'], ['fish']):
        screen.say(completion(words[1]))
    elif words[0] == '--complete':
        for candidate in candidates(words[1:]):
            screen.say(candidate)
    else:
        screen.complain('%s: expected host.ini, --help, --bundle FILE.pyz, --completion bash|zsh|fish '
                        'or --version' % ' '.join(words))
        return 2
    return 0


def run(words: List[str], screen: Screen, start: Optional[Callable[[str], int]], check: Function) -> int:
    """Does what the words say; gives the exit code."""
    if not words:
        screen.err.write(USAGE.format(me=program_name()))
        return 2
    if words[0].startswith('-'):
        return run_option(words, screen)
    if words[0] in VERBS and not os.path.exists(words[0]):
        screen.complain('the ini file comes first: %s host.ini %s' % (program_name(), ' '.join(words)))
        return 2
    if words[1:2] in (['-h'], ['--help']):
        return run_option(words[1:], screen)
    if words[1:]:
        return run_verb(words[0], words[1:], screen, check)
    if start is None:
        screen.err.write(USAGE.format(me=program_name()))
        return 2
    return start(words[0])


def main(argv: List[str], start: Optional[Callable[[str], int]] = None,
         check: Function = check_by_program) -> int:
    """The command line; gives the exit code.

    start    runs the host agent of an ini file; None: this program has no such part
    check    what the verb of that name does
    """
    screen = Screen()
    try:
        # Python reads arguments by the locale; here they are UTF-8, as in XML-RPC. Names of files may be
        # any bytes.
        errors = 'surrogateescape' if argv[1:2] in (['put'], ['get']) else 'replace'
        return run([os.fsencode(word).decode('utf-8', errors) for word in argv], screen, start, check)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (agent.AgentError, protocol.ProtocolError) as error:
        screen.complain(str(error))
        return 1
    except BrokenPipeError:
        # Who reads us has gone; what is still in the buffer has no reader either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except OSError as error:           # a full disk behind standard output, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        screen.complain('%s' % error)
        return OURS


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
