"""What a verb shows: tables, JSON, progress and complaints, for a person at a terminal or for a program.

What it is not: anything that knows the host agent. Imports nothing of ours but agent. No threads, no locks.
"""

import binascii
import codecs
import contextlib
import errno
import functools
import io
import json
import os
import re
import sys
import time
import unicodedata
from typing import Any, Dict, Iterable, Iterator, List, Optional, Set, Tuple

import agent

COLOURS = {'alive': 32, 'Running': 32, 'running': 32, 'late': 33, 'Paused': 33, 'Saved': 33, 'suspended': 33,
           'queued': 33, 'sent': 33, 'lost': 31, 'failed': 31, 'timeout': 31, 'signaled': 31, 'Aborted': 31,
           'Stuck': 31, 'ok': 32, '--': 33, 'NO': 31}  # type: Dict[str, int]
RED = 31
WIDE = 100                     # columns from which on lists show whole dates
FAILED_END = re.compile('(exited|signaled) [1-9][0-9]*|timeout [0-9]+')
FIRST = 32                     # columns that are left of a name or id, at least; more where others have room
NARROWEST = 5                  # … of another cell, …
ELASTIC = 10                   # … and of one that may be cut before others are left out
PROGRESS_EVERY = 0.2           # seconds between two looks at a progress


class Screen:
    """Standard output and standard error: for a person, where they are a terminal."""

    def __init__(self) -> None:
        open_closed_streams()
        self.out = lenient(sys.stdout)
        self.err = lenient(sys.stderr)
        plain = 'NO_COLOR' in os.environ or os.environ.get('TERM') == 'dumb'
        self._colours = self.out.isatty() and not plain and obeys_colours()
        self.width = terminal_width() if self.out.isatty() else 0    # 0: any
        self.shows_progress = self.err.isatty()
        self._progress = 0             # columns of the progress line that stands on the terminal

    def say(self, text: str) -> None:
        """A line on standard output, at once."""
        with naming_output():
            self.out.write(text + '\n')
            self.out.flush()

    def write(self, data: bytes) -> None:
        """Bytes on standard output, at once."""
        try:
            self.out.buffer.write(data)
            self.out.buffer.flush()
        except OSError as error:
            raise of_output(error)

    def complain(self, text: str) -> None:
        """A line on standard error."""
        self._tell('vmhost: ' + agent.printable(text))

    def conclude(self, text: str) -> None:
        """The last line, on standard error."""
        self._tell(agent.printable(text))

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):     # the exit code tells as well
            self.progress('')
            self.err.write(line + '\n')
            self.err.flush()

    def json(self, value: Any, indent: Optional[int] = 2) -> None:
        """The value as JSON, in which nothing is left that a terminal would obey."""
        ascii_only = (self.out.encoding or '').lower().replace('-', '') != 'utf8'
        text = json.dumps(value, indent=indent, ensure_ascii=ascii_only, default=as_text)
        self.say('\n'.join([line if line.isprintable() else escaped(line) for line in text.split('\n')]))

    def table(self, headings: List[str], rows: Iterable[List[Any]], spare: Iterable[str] = (),
              elastic: Iterable[str] = ()) -> None:
        """Columns as wide as they need to be, and no wider together than the terminal.

        Where there is no room, those of ``elastic`` are cut, then those of ``spare`` left out, in that order.
        The first column is always shown, and whole but for cells of more than FIRST columns: those lose what
        is in their middle before anything else is left out.
        """
        lines = [[agent.printable(str(cell)) for cell in row] for row in [headings] + list(rows)]
        widths = dict(zip(headings, [max(map(cells, column)) for column in zip(*lines)]))
        if self.width:
            fit(widths, self.width, list(spare), set(elastic))
        for line in lines:
            shown = [(text, widths[name]) for name, text in zip(headings, line) if name in widths]
            padded = [self._cell(text, width, number == 0) for number, (text, width) in enumerate(shown)]
            self.say('  '.join(padded[:-1] + [padded[-1].rstrip()]))

    def _cell(self, text: str, width: int, keeps_end: bool) -> str:
        shown = text
        if cells(shown) > width:
            mark = '…' if (self.out.encoding or '').lower().startswith('utf') else '~'
            end = last_cells(text, (width - 1) // 2) if keeps_end else ''
            shown = first_cells(text, width - 1 - cells(end)) + mark + end
        padding = ' ' * (width - cells(shown))
        colour = RED if FAILED_END.fullmatch(text) else COLOURS.get(text, 0)
        return self.coloured(shown, colour) + padding

    def coloured(self, text: str, colour: int) -> str:
        """The text in one of the terminal's colours; 0: as it is."""
        return '\033[%dm%s\033[0m' % (colour, text) if self._colours and colour else text

    def progress(self, text: str) -> None:
        """Replaces the one line that tells how far it is; '' takes it away."""
        if self.shows_progress and (text or self._progress):
            text = text[:max(0, terminal_width() - 1)]
            self.err.write('\r' + text + ' ' * (self._progress - len(text)) + ('' if text else '\r'))
            self.err.flush()
            self._progress = len(text)


def fit(widths: Dict[str, int], room: int, spare: List[str], elastic: Set[str]) -> None:
    """Makes columns fit into so many, as ``Screen.table`` has it: narrows them, or takes them out."""
    def needed(least: Dict[str, int]) -> int:
        return sum(min(width, least.get(name, width)) for name, width in widths.items()) + 2 * len(widths) - 2
    first = next(iter(widths))
    cut = dict.fromkeys(elastic, ELASTIC)
    cut[first] = FIRST
    for name in spare:
        if needed(cut) <= room:
            break
        widths.pop(name, 0)
    others = [name for name in list(widths)[1:] if name not in elastic]
    for least, names in ((FIRST, {first}), (ELASTIC, elastic), (NARROWEST, others), (NARROWEST, {first})):
        while needed({}) > room:
            left = [name for name in names if name in widths]
            widest = max(left, key=lambda name: widths[name], default='')
            if not widest or widths[widest] <= least:
                break
            widths[widest] -= 1


def obeys_colours() -> bool:
    """Whether a terminal here obeys the sequences for colours: those of Windows are asked to."""
    if os.name != 'nt':
        return True
    import windows  # there alone
    return windows.switch_colours_on()


def open_closed_streams() -> None:
    """Opens the null device in place of standard streams that are closed.

    What is opened next would take their numbers, and get what was meant for a person. Who writes to standard
    output is told that it is closed.
    """
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            break
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    if sys.stdout is None:
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), 'w')
    if sys.stderr is None:
        sys.stderr = open(os.devnull, 'w')


def input_is_closed() -> bool:
    """Whether standard input was closed when the program began."""
    return sys.stdin is None or getattr(sys.stdin, 'name', None) == os.devnull


@contextlib.contextmanager
def naming_output() -> Iterator[None]:
    """Has an OSError of what is written to standard output say that it is that."""
    try:
        yield
    except OSError as error:
        raise of_output(error)


def of_output(error: OSError) -> OSError:
    """The same error, which says that it is standard output's."""
    error.filename = 'standard output'
    return error


def has_no_reader(error: OSError) -> bool:
    """Whether a write failed since who read our output has gone; Windows' C library calls that EINVAL."""
    is_invalid = error.errno == errno.EINVAL and getattr(error, 'winerror', None) is None
    return isinstance(error, BrokenPipeError) or os.name == 'nt' and is_invalid


def escaped(text: str) -> str:
    """JSON with escapes for all characters that aren't printable."""
    return ''.join([char if char.isprintable() else json.dumps(char)[1:-1] for char in text])


def in_place_of(error: UnicodeError) -> Tuple[str, int]:
    """What stands for characters that an encoding doesn't have: escapes, and for the ellipsis three dots."""
    assert isinstance(error, UnicodeEncodeError)
    missing = error.object[error.start:error.end]
    return ''.join(['...' if char == '…' else char.encode('ascii', 'backslashreplace').decode('ascii')
                    for char in missing]), error.end


LENIENT = 'vmhost-lenient'     # the name of that, as an error handler of codecs
codecs.register_error(LENIENT, in_place_of)


@functools.lru_cache(maxsize=None)      # a wrapper that is let go closes what it wraps
def lenient(stream: Any) -> Any:
    """The stream, so that no character is an error, whatever the locale."""
    if hasattr(stream, 'reconfigure'):
        stream.reconfigure(errors=LENIENT)
    elif hasattr(stream, 'buffer'):         # Python 3.6
        return io.TextIOWrapper(stream.buffer, stream.encoding, LENIENT, line_buffering=True)
    return stream


def as_text(value: Any) -> str:
    """What JSON doesn't know: exact bytes, as base64."""
    return binascii.b2a_base64(value.data, newline=False).decode('ascii')


def terminal_width() -> int:
    """Columns of the terminal that standard output is; what COLUMNS says goes before."""
    columns = os.environ.get('COLUMNS', '')
    if columns.isdigit() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


def cells(text: str) -> int:
    """How many columns of a terminal it takes."""
    return sum(0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in 'WF' else 1
               for char in text)


def first_cells(text: str, room: int) -> str:
    """So much of its begin as has room in so many columns."""
    while cells(text) > room:
        text = text[:-1]
    return text


def last_cells(text: str, room: int) -> str:
    """The same of its end."""
    while cells(text) > room:
        text = text[1:]
    return text


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


def shown_offset(seconds: float) -> str:
    """How far a clock is off; no -0.0."""
    return '%+.1f s' % (round(seconds, 1) or 0.0)


def shown_time(moment: float, is_short: bool = False) -> str:
    """A time since 1970 for a person, in the local zone; '-' for 0. Short: today's time, or the day."""
    if not moment:
        return '-'
    then = time.localtime(moment)
    is_today = then[:3] == time.localtime()[:3]
    return time.strftime('%H:%M:%S' if is_today else '%Y-%m-%d', then) if is_short \
        else time.strftime('%Y-%m-%d %H:%M:%S', then)


SHOWN_AS = dict(dict.fromkeys(('submitted', 'started', 'ended', 'last heard'), shown_time),
                memory=shown_size, uptime=shown_span, time=shown_span)  # type: Dict[str, Any]


def show_pairs(screen: Screen, found: Dict[str, Any], indent: str = '') -> None:
    """Names and values, one per line; what is in a mapping stands indented below its name."""
    width = max([len(str(name)) for name in found] + [0])
    for name, value in found.items():
        if isinstance(value, dict) and value:
            screen.say('%s%s' % (indent, agent.printable(str(name))))
            show_pairs(screen, value, indent + '    ')
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name in SHOWN_AS:
            value = SHOWN_AS[name](value)
        elif isinstance(value, float):
            value = '%.3g' % value if abs(value) < 1000 else '%.0f' % value
        elif isinstance(value, dict):
            value = ''
        elif isinstance(value, list):
            value = ', '.join(map(str, value))
        screen.say('%s%-*s  %s' % (indent, width, agent.printable(str(name)),
                                   agent.printable(str(value)) or '-'))


def show_one(screen: Screen, found: Dict[str, Any], as_json: bool) -> int:
    """What is known of one thing, as JSON or for a person; gives the exit code."""
    if as_json:
        screen.json(found)
    else:
        show_pairs(screen, found)
    return 0
