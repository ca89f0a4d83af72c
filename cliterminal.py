"""What goes in while a verb lasts: standard input for commands, and the terminal that a person sits at.

What it is not: what comes out of commands without a terminal (clicommands.py), or the verbs.

Threads: where there is no terminal, ``input`` reads standard input, and has a connection of its own to the
host agent. No locks: it shares nothing.
"""

import contextlib
import os
import re
import select
import signal
import stat
import sys
import threading
import time
from typing import Any, Dict, Iterator, List, Set, Tuple

import agent
from cliscreen import Screen, shown_size
from faults import AgentNotConnected, BadState, DeadlineExceeded, NoSuchVM, VMHostError
from hostclient import ASK_AGAIN, END, RESTART, SILENCE, Client, Line, NoHost

TYPED = 64 * 1024              # bytes of what is typed, or pasted, that are read at once
READ = 1024 * 1024             # bytes of the input that are read, and handed over, at once
KEPT = 4 * 1024 * 1024         # bytes of the input that may have to be sent again: more than the host holds
RETRY = 0.5                    # seconds until a host or guest that is away is asked again
ESCAPE, DETACH, HELP = b'~.?'  # at the begin of a line, as in ssh
LINE_ENDS = b'\r\n'
FAREWELL = 2.0                 # seconds in which what was typed before that should be on its way
UNANSWERED = 2.0               # seconds between looks whether the guest is there, while nothing answers
INTERRUPTS = b'\x03\x1a\x1c'    # as they are typed: Ctrl-C, Ctrl-Z, Ctrl-\\
FLOOD = 256 * 1024             # bytes that may still be shown of what came before one of them
LAST_OF_FLOOD = 512            # … and of the end of that
LOOKED_BACK = 2 * 1024 * 1024  # bytes before those, in which it is looked for what it was switched to
PIECE = 256 * 1024             # bytes of them at a time
REPLAYED = 16 * 1024           # bytes of what a terminal showed that are shown again to who comes back


class Detached(Exception):
    """The person leaves; the command goes on."""


class Escapes:
    """Finds ``~.`` at the begin of a line among what is typed, and ``~?``; ``~~`` there is one of them."""

    def __init__(self) -> None:
        self.asks = False              # for what there is
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
                if byte == HELP:
                    self.asks = self._at_begin = True
                    continue
                if byte != ESCAPE:
                    passed.append(ESCAPE)
            elif self._at_begin and byte == ESCAPE:
                self._escaped = True
                self._at_begin = False
                continue
            passed.append(byte)
            self._at_begin = byte in LINE_ENDS
        return bytes(passed), False


class Kept:
    """What was read of standard input, the last of it: some may have to be sent again."""

    def __init__(self, begun: bytes = b'') -> None:
        self._data = bytearray(begun)
        self.begin = 0                 # where that begins in the whole

    @property
    def end(self) -> int:
        """Where the next byte comes."""
        return self.begin + len(self._data)

    def add(self, data: bytes) -> None:
        """The next of it."""
        self._data += data
        surplus = len(self._data) - KEPT - len(data)
        if surplus > KEPT:             # not each time: the rest is moved
            del self._data[:surplus]
            self.begin += surplus

    def since(self, offset: int) -> bytes:
        """From there on."""
        with memoryview(self._data) as data:
            return bytes(data[offset - self.begin:])


class Input:
    """Standard input on its way to commands, as fast as the slowest of them reads.

    It has the offsets of what was taken, so that nothing is lost or taken twice where the host agent is
    restarted meanwhile.
    """

    def __init__(self, folder: str, keys: List[str], begun: bytes = b'') -> None:
        """folder: the host's; begun: what was read already."""
        self._host = Client(folder)
        self._offsets: Dict[str, int] = dict.fromkeys(keys, 0)
        self._kept = Kept(begun)
        self._is_over = False

    def start(self) -> None:
        """Reads on a thread of its own, which ends with this process."""
        threading.Thread(target=self.run, name='input', daemon=True).start()

    def run(self) -> None:
        """To the end of the input, or of the last command."""
        widen_pipe(0)
        try:
            if self._kept.end:
                self._bring_to_all()
            while self._offsets and not self._is_over:
                data = read_input(READ)
                self._is_over = not data
                self._kept.add(data)
                self._bring_to_all()
        except VMHostError as error:   # main meets it, too, and tells it
            sys.stderr.write('vmhost: standard input: %s\n' % error)

    def _bring_to_all(self) -> None:
        for key in list(self._offsets):
            self._bring(key)

    def _bring(self, key: str) -> None:
        """To one command, all that is there. Raises VMHostError."""
        while key in self._offsets:
            offset = self._offsets[key]
            data = self._kept.since(offset)
            try:
                taken = self._host.put_input(key, data, self._is_over, offset)
            except (NoHost, AgentNotConnected, DeadlineExceeded):
                time.sleep(RETRY)
                continue
            except BadState:
                self._find_place(key)
                continue
            self._offsets[key] = offset + taken
            if offset + taken == self._kept.end:
                return

    def _find_place(self, key: str) -> None:
        """Another run of the host agent knows what the guest has taken. Raises VMHostError."""
        status = self._host.call('getCmdStatus', key, False)
        offset = int(status['inOffset'])
        if status['ended']:
            del self._offsets[key]
        elif offset == self._offsets[key] or not self._kept.begin <= offset <= self._kept.end:
            raise BadState('%s takes no more input' % key)
        else:
            self._offsets[key] = offset


def read_input(most: int) -> bytes:
    """What comes next of standard input; b'' at the end, and where the terminal is gone.

    What is typed on a console of Windows comes in that console's code page, and each line with a CR: here it
    is UTF-8, with the lines of a guest.
    """
    try:
        if os.name == 'nt' and os.isatty(0):
            typed: Any = sys.stdin.buffer
            return typed.raw.read(most).replace(b'\r\n', b'\n')
        return os.read(0, most)
    except OSError:
        return b''


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


# What programs switch a terminal to: private modes, the keypad, a region that scrolls; and the reset of all.
SWITCH = re.compile(rb'\033(?:\[\?([0-9;]{1,40})([hl])|([=>])|\[([0-9;]*)r|(c|\[!p))')
LONGEST_SWITCH = 48            # bytes of one
# Off in a terminal that nobody changed: cursor keys for programs, reverse video, origin, what the mouse does,
# the focus' news, the other screen, marked pastes, held pictures. On: wrapping, the cursor.
USUALLY_OFF = {1, 5, 6, 9, 47, 1000, 1001, 1002, 1003, 1004, 1005, 1006, 1015, 1016, 1047, 1049, 2004, 2026}
USUALLY_ON = {7, 25}
OTHER_SCREEN = {47, 1047, 1049}
SCREEN_CHANGE = re.compile(rb'\033\[\?(?:[0-9]+;)*(?:47|1047|1049)[hl;]')
SCROLLS, KEYPAD = -1, -2       # that region, and the keypad, among the modes


class Modes:
    """What a terminal was switched to by what was shown on it, so that it can be switched back."""

    def __init__(self) -> None:
        self._changed: Set[int] = set()
        self._rest = b''               # that may be the begin of a switch
        self._is_at_begin = True       # of a line

    def read(self, data: bytes) -> None:
        """What is shown next."""
        self._is_at_begin = data.endswith(b'\n') if data else self._is_at_begin
        data = self._rest + data
        for modes, sign, keypad, region, reset in SWITCH.findall(data):
            for mode in map(int, filter(None, modes.split(b';'))):
                self._note(mode, mode in (USUALLY_OFF if sign == b'h' else USUALLY_ON))
            if keypad:
                self._note(KEYPAD, keypad == b'=')
            elif reset:
                self._changed.clear()
            elif not modes:
                self._note(SCROLLS, bool(region))
        begin = data.rfind(b'\033', -LONGEST_SWITCH)
        self._rest = data[begin:] if begin >= 0 else b''

    def _note(self, mode: int, is_changed: bool) -> None:
        if is_changed:
            self._changed.add(mode)
        else:
            self._changed.discard(mode)

    def done(self) -> bytes:
        """What switches another terminal to the same, but for the region: who draws anew sets that."""
        modes = sorted((mode for mode in self._changed if mode > 0), reverse=True)     # that screen first
        found = [b'\033[?%d%c' % (mode, b'h' if mode in USUALLY_OFF else b'l') for mode in modes]
        return b''.join(found + [b'\033='] * (KEYPAD in self._changed))

    def undone(self, on_new_line: bool) -> bytes:
        """What switches it all back; the cursor is at the begin of a line then, if wanted."""
        found = [b'\033[m'] * bool(self._changed)
        if SCROLLS in self._changed:
            found.append(b'\0337\033[r\0338')
        if KEYPAD in self._changed:
            found.append(b'\033>')
        modes = sorted(mode for mode in self._changed if mode > 0)
        found += [b'\033[?%d%c' % (mode, b'l' if mode in USUALLY_OFF else b'h') for mode in modes]
        if on_new_line and not self._is_at_begin and not OTHER_SCREEN & self._changed:
            found.append(b'\n')         # which the terminal's driver makes a CR and an LF
        self._changed.clear()
        return b''.join(found)


class Visit:
    """A person at a command's terminal: keys go to it, what it writes is shown, until one of them ends."""

    def __init__(self, host: Client, screen: Screen, vm: str, cmd_id: str) -> None:
        self._host = host.another()    # which says nothing on a raw terminal
        self._screen = screen
        self._vm = vm
        self._id = cmd_id
        self._modes = Modes()
        self._awaits_answer = True     # to what was typed, or to its begin
        self._told = False             # that the guest isn't there
        self._interrupted = -1         # offset of the output up to which it was shown when it was interrupted
        self._is_behind = False        # and so far that what comes next is left out
        self._kept = Kept()            # the last of what was typed: a host that is restarted may not have it
        self._offset = 0               # of the output
        self._visitor = os.urandom(8).hex()    # others may type there, too
        self._escapes = Escapes() if os.isatty(0) else None
        self._is_over = False          # the input
        self._resized, self._resize = os.pipe()
        os.set_blocking(self._resize, False)

    def _come_back(self) -> None:
        """Has the last of what the terminal showed shown again, and its programs draw anew. Raises
        VMHostError."""
        status = self._host.call('getCmdStatus', self._id)
        begin = max(0, int(status['outSize']) - REPLAYED)
        shown = self._host.output(self._id, 'out', begin, REPLAYED).data
        self._find_modes(begin)
        self._draw(shown[shown.find(b'\n') + 1 if begin else 0:])
        self._offset = begin + len(shown)
        self._kept.begin = int(status['inOffset'])
        size = terminal_size()
        self._host.call('resizeCmd', self._id, size['rows'], max(1, size['columns'] - 1))
        self._tell_size()

    def _find_modes(self, end: int) -> None:
        """Switches the terminal to what a program switched it to long ago, as far as that is found. Raises
        VMHostError."""
        begin, before = end, b''
        while 0 < begin and end - begin < LOOKED_BACK and not SCREEN_CHANGE.search(before):
            length = min(PIECE, begin)
            begin -= length
            before = self._host.output(self._id, 'out', begin, length).data + before
        self._modes.read(before)
        self._screen.write(self._modes.done())

    def stay(self, is_back: bool) -> None:
        """Until the command has ended. Raises Detached, or VMHostError.

        is_back    somebody was there before
        """
        before = {number: signal.signal(number, leave)
                  for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
        before[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, self._note_size)
        goes_on = True
        try:
            with raw_mode():
                if is_back:            # in here: who sees it may press Ctrl-C, which is for the program
                    self._come_back()
                while goes_on:
                    try:
                        goes_on = self._stay_on_a_line()
                    except NoHost as gone:
                        self._await_host(gone)
        finally:
            if self._screen.out.isatty():
                with contextlib.suppress(OSError):     # it may be gone
                    self._screen.write(self._modes.undone(on_new_line=goes_on))
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stay_on_a_line(self) -> bool:
        """Until the command has ended, or the line is to be begun anew: whether it is. Raises Detached,
        VMHostError."""
        self._is_behind = False
        with contextlib.closing(self._host.terminal(self._id, self._offset, self._visitor,
                                                    self._kept.end)) as line:
            for begin in range(self._kept.begin, self._kept.end, TYPED):   # what has come is not taken twice
                is_last = self._is_over and begin + TYPED >= self._kept.end
                line.put(begin, self._kept.since(begin)[:TYPED], is_last)
            goes_on = self._show(line)
            while goes_on and not self._is_behind:
                goes_on = self._turn(line)
        return goes_on

    def _await_host(self, gone: NoHost) -> None:
        """Until the host agent is back, if it is restarted; what is typed meanwhile is kept. Raises Detached,
        and NoHost where it stays away, or hangs."""
        deadline = time.monotonic() + RESTART
        if not gone.hangs:
            self._tell('the host agent does not answer; waiting up to %.0f s for it (Enter and ~. leaves)'
                       % RESTART)
        while True:
            if gone.hangs or time.monotonic() > deadline:
                raise gone
            if select.select([] if self._is_over else [0], [], [], ASK_AGAIN)[0] and self._read_typed()[1]:
                raise Detached
            try:
                self._host.call('getCmdStatus', self._id, False)
                return self._tell('the host agent is back')
            except NoHost as still:
                gone = still

    def _note_size(self, *_: Any) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._resize, b'r')

    def _turn(self, line: Line) -> bool:
        """Waits for what is typed or shown next, and passes it on; False at the end of the command."""
        reading: List[Any] = [line, self._resized]
        if line.has_room and not self._is_over:
            reading.append(0)
        is_awaiting = self._awaits_answer and not self._told
        ready, room, _ = select.select(reading, [line] if line.unsent else [], [],
                                       UNANSWERED if is_awaiting else SILENCE)
        if not (ready or room):
            line.check_alive() if self._told else self._tell_absence(is_awaiting)
        if 0 in ready:
            self._pass_on(line)
        if room:
            line.flush()
        if self._resized in ready:
            os.read(self._resized, 4096)
            self._tell_size()
        return line not in ready or self._show(line)

    def _pass_on(self, line: Line) -> None:
        """What was typed. Raises Detached."""
        begin = self._kept.end
        data, leaves = self._read_typed()
        if data or self._is_over:
            line.put(begin, data, self._is_over)
            self._awaits_answer = True
        if any(key in data for key in INTERRUPTS):
            self._interrupted = self._offset
        if leaves:
            line.finish(FAREWELL)
            raise Detached

    def _read_typed(self) -> Tuple[bytes, bool]:
        """(what was typed for the program, whether the person wants to leave)."""
        data, leaves = read_input(TYPED), False
        if self._escapes is None:
            self._is_over = not data
        elif data:
            data, leaves = self._escapes.read(data)
            if self._escapes.asks:
                self._escapes.asks = False
                self._tell('at the begin of a line ~. leaves (the command continues), ~~ is a ~')
        else:
            leaves = True              # the terminal is gone
        self._kept.add(data)
        return data, leaves

    def _show(self, line: Line) -> bool:
        for kind, offset, data in line.take():
            if kind == END:
                return False
            self._draw(data)
            self._offset = offset + len(data)
            self._awaits_answer = self._told = False
            if 0 <= self._interrupted < self._offset - FLOOD:
                self._catch_up()
            if self._is_behind:
                break
        return True

    def _catch_up(self) -> None:
        """Leaves out what a program wrote long before it was interrupted, and a person would have to see to
        its end: a program isn't held up by a terminal. Raises VMHostError."""
        status = self._host.call('getCmdStatus', self._id)
        if not status['ended'] and status['inOffset'] < self._kept.end:
            self._interrupted = self._offset           # it hasn't heard so yet
            return
        self._interrupted = -1
        behind = int(status['outSize']) - LAST_OF_FLOOD - self._offset
        self._is_behind = behind > FLOOD
        if self._is_behind:
            self._offset += behind
            self._draw(b'\r\n[%s are not shown here; `out %s` has them]\r\n' % (
                shown_size(behind).encode('ascii'), self._id.encode('utf-8')))

    def _draw(self, data: bytes) -> None:
        self._modes.read(data)
        self._screen.write(data)

    def _tell_absence(self, is_awaiting: bool) -> None:
        """Nothing comes: whether that is since the host isn't there, or, where an answer should, the guest.
        Raises VMHostError."""
        away = ''
        if not self._host.answers(UNANSWERED):
            away = 'the host agent'
        elif is_awaiting:
            with contextlib.suppress(NoSuchVM):
                away = '' if self._host.call('getVM', self._vm)['agent'] == 'alive' else self._vm
        if away:
            self._told = True
            self._tell('%s does not answer; still waiting (Enter and ~. leaves)' % away)

    def _tell(self, sentence: str) -> None:
        """On a line of its own, though the terminal is raw."""
        self._draw(b'\r\nvmhost: %s\r\n' % agent.printable(sentence).encode('utf-8'))

    def _tell_size(self) -> None:
        size = terminal_size()
        self._host.call('resizeCmd', self._id, size['rows'], size['columns'])


def leave(*_: Any) -> None:
    """A signal's handler. Raises Detached."""
    raise Detached
