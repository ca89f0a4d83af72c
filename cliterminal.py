"""What goes in while a verb lasts: standard input for commands, and the terminal that a person sits at.

What it is not: what comes out of commands without a terminal (clicommands.py), or the verbs.

Threads: ``input`` reads standard input, and has a connection of its own to the host agent; main shows output.
No locks: what both use is a pipe.
"""

import contextlib
import os
import select
import signal
import stat
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Tuple

from cliscreen import Screen
from faults import AgentNotConnected, BadState, DeadlineExceeded, VMHostError
from hostclient import Client, NoHost

PIECE = 256 * 1024             # bytes that are shown at once
READ = 1024 * 1024             # bytes of the input that are read, and handed over, at once
KEPT = 4 * 1024 * 1024         # bytes of the input that may have to be sent again: more than the host holds
RETRY = 0.5                    # seconds until a host or guest that is away is asked again
OUTPUT_WAIT = 20.0             # seconds that one call waits for output
PATIENCE = 10.0                # seconds after a command's end in which all of its output should have come
ESCAPE, DETACH = ord('~'), ord('.')    # at the begin of a line, as in ssh
LINE_ENDS = b'\r\n'
REPLAYED = 16 * 1024           # bytes of what a terminal showed that are shown again to who comes back


class Detached(Exception):
    """The person leaves; the command goes on."""


class Escapes:
    """Finds ``~.`` at the begin of a line among what is typed; ``~~`` there is one of them."""

    def __init__(self) -> None:
        self._at_begin = True
        self._escaped = False

    def read(self, data: bytes) -> Tuple[bytes, bool]:
        """(what goes to the program, whether the person wants to leave)."""
        passed = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte == DETACH:
                    return bytes(passed), True
                if byte != ESCAPE:
                    passed.append(ESCAPE)
            elif self._at_begin and byte == ESCAPE:
                self._escaped = True
                self._at_begin = False
                continue
            passed.append(byte)
            self._at_begin = byte in LINE_ENDS
        return bytes(passed), False


class Input:
    """Standard input on its way to commands, as fast as the slowest of them reads.

    It has the offsets of what was taken, so that nothing is lost or taken twice where the host agent is
    restarted meanwhile.
    """

    def __init__(self, folder: str, keys: List[str], begun: bytes = b'', is_terminal: bool = False,
                 resized: Callable[[Client], None] = lambda host: None) -> None:
        """folder: the host's; begun: what was read already; resized(host): the terminal has another size,
        after ``resize``."""
        self._host = Client(folder)
        self._escapes = Escapes() if is_terminal else None
        self._resized = resized
        self._offsets: Dict[str, int] = dict.fromkeys(keys, 0)
        self._kept = bytearray(begun)
        self._begin = 0                # where that begins in the whole
        self._is_over = False
        self._wakeup, self._waker = os.pipe()
        if os.name == 'posix':
            os.set_blocking(self._waker, False)

    def start(self) -> None:
        """Reads on a thread of its own, which ends with this process."""
        threading.Thread(target=self.run, name='input', daemon=True).start()

    def go_on_from(self, key: str, offset: int) -> None:
        """What is read from now on comes there."""
        self._offsets[key] = self._begin = offset

    def resize(self) -> None:
        """Has the thread tell the terminal's new size. A signal's handler may call it."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._waker, b'r')

    def run(self) -> None:
        """To the end of the input, or of the last command."""
        widen_pipe(0)
        try:
            if self._kept:
                self._bring_to_all()
            while self._offsets and not self._is_over:
                data = self._read()
                self._is_over = not data
                self._take(data)
                self._bring_to_all()
        except VMHostError as error:   # main meets it, too, and tells it
            if self._escapes is None:
                sys.stderr.write('vmhost: standard input: %s\n' % error)
        except Detached:
            os.kill(os.getpid(), signal.SIGHUP)

    def _read(self) -> bytes:
        """What comes next; b'' at the end. Raises Detached."""
        while True:
            if os.name == 'posix':         # elsewhere select takes sockets alone, and no terminal is resized
                ready, _, _ = select.select([0, self._wakeup], [], [])
                if self._wakeup in ready:
                    os.read(self._wakeup, 4096)
                    with contextlib.suppress(VMHostError):
                        self._resized(self._host)
                if 0 not in ready:
                    continue
            try:
                data = read_input()
            except OSError:                # the terminal is gone
                data = b''
            if self._escapes is None:
                return data
            if not data:
                raise Detached
            data, leaves = self._escapes.read(data)
            if leaves:
                raise Detached
            if data:
                return data

    def _take(self, data: bytes) -> None:
        self._kept += data
        surplus = len(self._kept) - KEPT - len(data)
        if surplus > KEPT:             # not each time: the rest is moved
            del self._kept[:surplus]
            self._begin += surplus

    def _bring_to_all(self) -> None:
        for key in list(self._offsets):
            self._bring(key)

    def _bring(self, key: str) -> None:
        """To one command, all that is there. Raises VMHostError."""
        end = self._begin + len(self._kept)
        while key in self._offsets:
            offset = self._offsets[key]
            with memoryview(self._kept) as kept:
                data = bytes(kept[offset - self._begin:])
            try:
                taken = self._host.put_input(key, data, self._is_over, offset)
            except (NoHost, AgentNotConnected, DeadlineExceeded):
                time.sleep(RETRY)
                continue
            except BadState:
                self._find_place(key)
                continue
            self._offsets[key] = offset + taken
            if offset + taken == end:
                return

    def _find_place(self, key: str) -> None:
        """Another run of the host agent knows what the guest has taken. Raises VMHostError."""
        status = self._host.call('getCmdStatus', key, False)
        offset = int(status['inOffset'])
        if status['ended']:
            del self._offsets[key]
        elif offset == self._offsets[key] or not self._begin <= offset <= self._begin + len(self._kept):
            raise BadState('%s takes no more input' % key)
        else:
            self._offsets[key] = offset


def read_input() -> bytes:
    """What comes next on standard input; b'' at its end. Raises OSError.

    What is typed on a console of Windows comes in that console's code page, and each line with a CR: here it
    is UTF-8, with the lines of a guest.
    """
    if os.name == 'nt' and os.isatty(0):
        typed: Any = sys.stdin.buffer
        return typed.raw.read(READ).replace(b'\r\n', b'\n')
    return os.read(0, READ)


SET_PIPE_SIZE = 1031           # fcntl's F_SETPIPE_SZ, which Python has from 3.10 on


def widen_pipe(descriptor: int) -> None:
    """Has a pipe on Linux hold as much as is read at once: it holds 64 KiB else, and each costs a call."""
    if sys.platform.startswith('linux') and stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        import fcntl
        with contextlib.suppress(OSError):     # more than the system allows
            fcntl.fcntl(descriptor, SET_PIPE_SIZE, READ)


# --- a terminal ------------------------------------------------------------------------------

def terminal_size() -> Dict[str, int]:
    """{rows, columns} of the terminal here; what is usual where there is none."""
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(descriptor)
            if size.lines and size.columns:
                return {'rows': size.lines, 'columns': size.columns}
    return {'rows': 24, 'columns': 80}


def wanted() -> Dict[str, Any]:
    """The option ``terminal`` for a program that is to be shown on this one."""
    return dict(terminal_size(), term=os.environ.get('TERM') or 'xterm')


@contextlib.contextmanager
def raw_mode() -> Iterator[None]:
    """Each key comes as it is pressed, Ctrl-C too, and nothing is shown but what is written."""
    if not os.isatty(0):
        yield
        return
    import termios
    import tty
    before = termios.tcgetattr(0)
    tty.setraw(0, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


class Visit:
    """A person at a command's terminal: keys go to it, what it writes is shown, until one of them ends."""

    def __init__(self, host: Client, screen: Screen, cmd_id: str) -> None:
        self._host = host
        self._screen = screen
        self._id = cmd_id
        self._offset = 0               # of the output
        self._ended = 0.0              # monotonic: when the command was first seen to have ended
        self._input = Input(host.folder, [cmd_id], b'', os.isatty(0), self._resize)

    def come_back(self) -> None:
        """Has the last of what the terminal showed shown again, and its programs draw anew."""
        status = self._host.call('getCmdStatus', self._id)
        begin = max(0, int(status['outSize']) - REPLAYED)
        shown = self._host.output(self._id, 'out', begin, REPLAYED).data
        self._show(shown[shown.find(b'\n') + 1 if begin else 0:])
        self._offset = begin + len(shown)
        self._input.go_on_from(self._id, int(status['inOffset']))
        size = terminal_size()
        self._host.call('resizeCmd', self._id, size['rows'], max(1, size['columns'] - 1))
        self._resize(self._host)

    def stay(self) -> None:
        """Until the command has ended. Raises Detached, or VMHostError."""
        before = {number: signal.signal(number, leave)
                  for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
        before[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda *_: self._input.resize())
        try:
            with raw_mode():
                self._input.start()
                while self._look():
                    pass
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _look(self) -> bool:
        """Shows what comes next; False at the end."""
        try:
            part = self._host.output(self._id, 'out', self._offset, PIECE, OUTPUT_WAIT)
        except (AgentNotConnected, DeadlineExceeded):
            if self._has_ended_long_ago():
                raise
            time.sleep(RETRY)
            return True
        self._show(part.data)
        self._offset += len(part.data)
        return not part.eof

    def _has_ended_long_ago(self) -> bool:
        if self._host.call('getCmdStatus', self._id, False)['ended']:
            self._ended = self._ended or time.monotonic()
        return bool(self._ended) and time.monotonic() - self._ended > PATIENCE

    def _show(self, data: bytes) -> None:
        self._screen.write(data)

    def _resize(self, host: Client) -> None:
        size = terminal_size()
        host.call('resizeCmd', self._id, size['rows'], size['columns'])


def leave(*_: Any) -> None:
    """A signal's handler. Raises Detached."""
    raise Detached
