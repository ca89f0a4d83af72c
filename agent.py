"""What both agents and their programs share, and is no protocol.

Ini files, logging, signals, TLS, files that another program may hold, the base of errors.

What it is not: anything that knows a word, a frame or a guest. Imports nothing of ours. No threads, no state.
"""

import codecs
import configparser
import contextlib
import errno
import io
import os
import re
import signal
import socket
import sys
import time
import types
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

ON_WINDOWS = os.name == 'nt'
VERSION = '1.0.0'      # of the project; all its files are released together
# The signals of every system that guests run on; this one may have fewer.
SIGNALS = ('HUP', 'INT', 'QUIT', 'ILL', 'TRAP', 'ABRT', 'BUS', 'FPE', 'KILL', 'USR1', 'SEGV', 'USR2', 'PIPE',
           'ALRM', 'TERM', 'CHLD', 'CONT', 'STOP', 'TSTP', 'TTIN', 'TTOU', 'URG', 'XCPU', 'XFSZ', 'VTALRM',
           'PROF', 'WINCH', 'IO', 'POLL', 'PWR', 'SYS', 'EMT', 'INFO')
IS_HEARD = sys.stderr is not None      # whether anybody could hear this program when it began: not from pyw


# --- configuration ---------------------------------------------------------------------------

class AgentError(Exception):
    """Base of what both agents, and the programs beside them, tell their user."""


class ConfigError(AgentError):
    """A configuration that can't be used; one line that names file, section, key and what is wanted."""


def text(value: str) -> str:
    """Any text."""
    return value


def path(value: str) -> str:
    """A path; ``read_settings`` makes it relative to the ini file."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in '"\'':
        raise ValueError('a path without quotation marks')     # nobody means a folder of that name
    return value


def password(value: str) -> str:
    """Text that nobody else may read: ``read_settings`` looks at the mode of the ini file."""
    return value


class PathOr:
    """A kind: a path, unless all of it matches ``pattern``: then it is a word that means something else."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def __call__(self, value: str) -> str:
        return path(value)

    def is_path(self, value: str) -> bool:
        """Whether it is one."""
        return re.fullmatch(self.pattern, value) is None


def given(value: str) -> str:
    """Text that isn't empty."""
    if not value:
        raise ValueError('something')
    return value


def at_least(least: float, kind: Callable[[str], float], what: str) -> Callable[[str], float]:
    """A kind: such a size or duration, of no less."""
    def checked(value: str) -> float:
        found = kind(value)
        if found < least:
            raise ValueError('at least %s' % what)
        return found
    return checked


def yes_no(value: str) -> bool:
    """yes or no."""
    try:
        return configparser.ConfigParser.BOOLEAN_STATES[value.lower()]
    except KeyError:
        raise ValueError('yes or no')


def integer(low: int, high: int) -> Callable[[str], int]:
    """A kind: a whole number in that range."""
    def kind(value: str) -> int:
        if not re.fullmatch('-?[0-9]{1,12}', value) or not low <= int(value) <= high:
            raise ValueError('a whole number from %d to %d' % (low, high))
        return int(value)
    return kind


def choice(*names: str) -> Callable[[str], str]:
    """A kind: one of these, in upper or lower case."""
    def kind(value: str) -> str:
        for name in names:
            if name.lower() == value.lower():
                return name
        raise ValueError('one of ' + ', '.join(names))
    return kind


def _with_unit(value: str, units: Dict[str, int], expected: str) -> float:
    match = re.fullmatch(r'([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([a-zA-Z]?)', value)
    if match is None or match.group(2).lower() not in units:
        raise ValueError(expected)
    return float(match.group(1)) * units[match.group(2).lower()]


def size(value: str) -> int:
    """Bytes, such as 65536, 64K, 1M or 2G."""
    return int(_with_unit(value, {'': 1, 'k': 2 ** 10, 'm': 2 ** 20, 'g': 2 ** 30},
                          'a size such as 65536, 64K, 1M or 2G'))


def duration(value: str) -> float:
    """Seconds, such as 45, 30s, 10m, 12h or 7d."""
    return _with_unit(value, {'': 1, 's': 1, 'm': 60, 'h': 3600, 'd': 86400},
                      'a duration such as 45, 30s, 10m, 12h or 7d')


HOUSEKEEPING_EVERY = 60.0      # seconds, …
HOUSEKEEPING_PAUSE = 5.0       # … and at the least


def look_every(*spans: float) -> float:
    """Seconds between two looks for what is kept no longer than these spans, be it days or seconds."""
    return min(HOUSEKEEPING_EVERY, max(HOUSEKEEPING_PAUSE, min(spans)))


def naming_file(file: Optional[str], error: Exception) -> str:
    """What an error says, with the file's name before a section's."""
    return '%s: %s' % (file, error) if file and str(error).startswith('[') else str(error)


LOGGING = {'level': (choice('DEBUG', 'INFO', 'WARNING', 'ERROR'), 'INFO'), 'file': (path, ''),
           'config': (path, '')}  # type: Dict[str, Tuple[Callable[[str], Any], str]]


def read_settings(file: Optional[str], spec: Dict[str, Dict[str, Tuple[Callable, str]]]) -> Any:
    """The settings in an ini file: one attribute per section, each with one per key.

    spec    {section: {key: (kind, default)}}; a kind turns the text into the value, or raises
            ValueError with what it expects
    file    None: the defaults, relative to the working directory

    Raises ConfigError for a file that can't be read, an unknown section or key, a bad value, or a password
    in a file that others can read.
    """
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    if file is not None:
        try:
            parser.read_file(io.StringIO(_read_text(file), newline=None), file)
        except OSError as error:
            raise ConfigError('%s: %s' % (file, error.strerror or error))
        except configparser.Error as error:
            raise ConfigError('%s: %s' % (file, _mistake(error)))
    _refuse_unknown(file, parser, spec)
    folder = os.path.dirname(os.path.abspath(file)) if file is not None else current_folder()
    sections = {section: _read_section(file, parser, section, keys, folder)
                for section, keys in spec.items()}
    return types.SimpleNamespace(**sections)


def current_folder() -> str:
    """The folder that this program runs in. Raises AgentError where that has been removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise AgentError('the current folder is gone')


def decoded(data: bytes) -> str:
    """What was saved as UTF-8, or, as some editors and PowerShell's ``>`` do, as UTF-16. Raises
    UnicodeDecodeError."""
    is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode('utf-16' if is_wide else 'utf-8-sig')


def _read_text(file: str) -> str:
    """A text file, whichever way it was saved. Raises ConfigError, OSError."""
    data = read_bytes(file)
    try:
        return decoded(data)
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b'\n') + 1
        raise ConfigError('%s: line %d: not in %s: save the file as UTF-8'
                          % (file, line, error.encoding.upper().replace('-SIG', '')))


def _mistake(error: configparser.Error) -> str:
    """What is wrong in an ini file, and where, in a line."""
    if isinstance(error, configparser.MissingSectionHeaderError):
        return 'line %d: %s stands before any [Section]' % (error.lineno, error.line.strip())
    if isinstance(error, configparser.ParsingError) and error.errors:
        number, line = error.errors[0]         # the line as Python writes it
        return 'line %d: %s is no KEY = VALUE' % (number, line.strip('\'"').replace('\\n', '').strip())
    return ' '.join(str(error).split())


def _refuse_unknown(file: Optional[str], parser: configparser.ConfigParser,
                    spec: Dict[str, Dict[str, Any]]) -> None:
    if parser.defaults():
        raise ConfigError('%s: section [DEFAULT] is unknown; there are %s'
                          % (file, ', '.join('[%s]' % name for name in spec)))
    for section in parser.sections():
        if section not in spec:
            raise ConfigError('%s: section [%s] is unknown; there are %s'
                              % (file, section, ', '.join('[%s]' % name for name in spec)))
        for key in parser[section]:
            if key not in spec[section]:
                raise ConfigError('%s: [%s] %s: unknown key; there are %s'
                                  % (file, section, key, ', '.join(spec[section])))


def _read_section(file: Optional[str], parser: configparser.ConfigParser, section: str,
                  keys: Dict[str, Tuple[Callable, str]], folder: str) -> Any:
    values = {}
    for key, (kind, default) in keys.items():
        given = parser.get(section, key, fallback=default).strip()
        try:
            value = kind(given)
        except ValueError as expected:
            raise ConfigError('%s: [%s] %s = %.80s: expected %s'
                              % (file, section, key, given, expected))
        is_path = kind is path or isinstance(kind, PathOr) and kind.is_path(value)
        if is_path and default and not value:      # joined, it would be the whole folder
            raise ConfigError('%s: [%s] %s = : expected a path' % (file, section, key))
        if value and is_path:
            try:
                value = os.path.join(folder, expanded(value))
            except ValueError as error:
                raise ConfigError('%s: [%s] %s = %.80s: %s' % (file, section, key, given, error))
        if value and kind is password and file is not None and is_open_to_others(file):
            raise ConfigError('%s: [%s] %s: others can read it: chmod 600 %s' % (file, section, key, file))
        values[key] = value
    return types.SimpleNamespace(**values)


def expanded(value: str) -> str:
    """A path as it was typed, with ``~``, and on Windows ``%NAME%``, replaced by what they stand for.

    Raises ValueError for a name that the environment lacks: nobody means a folder that is called so.
    """
    def known(found: Any) -> str:
        try:
            return os.environ[found.group(1)]
        except KeyError:
            raise ValueError('there is no environment variable %s' % found.group(1))
    return os.path.expanduser(VARIABLE.sub(known, value) if ON_WINDOWS else value)


VARIABLE = re.compile(r'%([^%=:/\\]+)%')


def is_open_to_others(file: str) -> bool:
    """Whether anybody but its owner may read or write a file; False on Windows, where hostconfig looks."""
    return os.name == 'posix' and bool(os.stat(file).st_mode & 0o077)


def catch_signals() -> socket.socket:
    """A socket that can be read once SIGTERM, Ctrl-C or Ctrl-Break came, or the terminal went; to be kept. On
    the main thread.

    No Python code runs at that moment: if it set an event, say, it would wait for a lock that the
    interrupted code may hold, for ever.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach())
    for name in ENDING:
        if hasattr(signal, name) and not is_left_alone(getattr(signal, name)):
            signal.signal(getattr(signal, name), lambda *_: None)
    return reader


ENDING = 'SIGTERM', 'SIGINT', 'SIGBREAK', 'SIGHUP'     # signals that end an agent


def is_left_alone(number: int) -> bool:
    """Whether a signal was meant to pass by: nohup has SIGHUP do so."""
    return number == getattr(signal, 'SIGHUP', 0) and signal.getsignal(number) == signal.SIG_IGN


def signal_of(heard: socket.socket) -> str:
    """The name of the signal that came, by what ``catch_signals`` gave, which can be read."""
    try:
        return signal.Signals(heard.recv(1)[0]).name
    except (OSError, IndexError, ValueError):
        return 'a signal'


def release_memory() -> None:
    """Gives memory back to the system that isn't used any more, where the C library can: after a start.

    What compiles a module leaves the heap full of holes: 8 of 28 MB in a guest that runs from a bundle.
    """
    try:
        import ctypes
        ctypes.CDLL(None).malloc_trim(0)
    except (ImportError, OSError, AttributeError, TypeError) as error:      # not glibc
        import logging  # a program that only asks an agent does without
        logging.getLogger('vmhost').debug('no malloc_trim: %s', error)


# Seconds that a thread computes while another one waits. Python's own, 5 ms, is most of what a short command
# takes from its call to its results, and an agent's threads hand it on a dozen times.
SWITCH_INTERVAL = 0.0002

LOG_FORMAT = '%(asctime)s %(levelname)s %(name)s: %(message)s'
LOG_SIZE = 10 * 1000 * 1000    # bytes, after which the file is rotated
LOG_FILES = 5                  # rotated ones that are kept
TOLD_EVERY = 60.0              # seconds between two warnings about the same sender …
WARNED_OF = 1000               # … of so many of which that is known


def open_standard_streams() -> None:
    """Has the descriptors 0, 1 and 2 lead nowhere, as far as who started this program closed them.

    Else files and sockets of its own get these numbers, and are lost where a program gets its streams there.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def hand_on_no_descriptors() -> None:
    """What this program was started with beside its streams, a lock's or a pipe's say, is for nobody that it
    starts: what goes on for days would hold it as long."""
    open_ones: Iterable[int] = range(65536)    # where there is no list of them
    for folder in ('/dev/fd', '/proc/self/fd'):
        with contextlib.suppress(OSError):
            open_ones = map(int, os.listdir(folder))
    for descriptor in open_ones:
        if descriptor > 2:
            with contextlib.suppress(OSError):     # the one of this list itself is closed by now
                os.set_inheritable(descriptor, False)


def set_up_logging(settings: Any, unheard: str = '') -> None:
    """Logging as the section [Logging] wants it, a line for each message. Raises ConfigError.

    unheard    the file for it where none is named, and nobody hears this program; made with the first message
    """
    import logging  # a program that only asks an agent does without

    class OneLine(logging.LogRecord):
        """A message of which no part, whoever wrote it, begins a line or is obeyed by a terminal."""

        def getMessage(self) -> str:
            return printable(super().getMessage())
    logging.setLogRecordFactory(OneLine)
    try:
        # Imported where they are needed: a guest without a log file does without their memory.
        if settings.config:
            from logging import config
            config.fileConfig(settings.config, disable_existing_loggers=False)
            return
        handler = logging.StreamHandler()  # type: logging.Handler
        if settings.file or unheard and not IS_HEARD:
            from logging import handlers

            class Rotating(handlers.RotatingFileHandler):
                """Later, where Windows lets nobody rename the file, since another program reads it: until
                then it grows."""

                def doRollover(self) -> None:
                    if self.stream is not None:
                        self.stream.close()
                        self.stream = None         # the next line opens it again
                    with contextlib.suppress(PermissionError):
                        os.rename(self.baseFilename, self.baseFilename)
                        super().doRollover()
            handler = Rotating(
                settings.file or unheard, maxBytes=LOG_SIZE, backupCount=LOG_FILES, encoding='utf-8',
                delay=not settings.file)
    except Exception as error:      # fileConfig raises whatever its file makes it meet
        why = getattr(error, 'strerror', '') or '%s: %s' % (type(error).__name__, error)
        raise ConfigError('[Logging] %s = %s: %s' % ('config' if settings.config else 'file',
                                                     settings.config or settings.file, why))
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(settings.level)


def client_tls(ca_file: str) -> Any:
    """An ssl.SSLContext that trusts that CA, or the system's where none is named. Raises ConfigError."""
    import ssl
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError('[Broker] ca_file %s: %s' % (ca_file, error))


def server_tls(certificate: str, key: str = '') -> Any:
    """The ssl.SSLContext of a server that has this certificate and key, files in PEM; no key: it is in the
    first one. Nobody is asked for an encrypted key's password: a service would wait. Raises AgentError,
    which names the files."""
    import ssl
    asked = []

    def password() -> str:
        asked.append(True)
        return ''
    try:
        for path in filter(None, (certificate, key)):
            open(path, 'rb').close()           # which of them it is, OpenSSL doesn't tell
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key or None, password=password)
    except ssl.SSLError as error:
        if asked:
            why = 'the key is encrypted'
        elif error.reason == 'KEY_VALUES_MISMATCH':
            why = 'the key is not this certificate\'s'
        else:
            why = 'no certificate and its private key in PEM: %s' % error
    except OSError as error:
        why = 'the key is encrypted' if asked else sentence(error)
    else:
        return context
    raise AgentError('certificate %s, key %s: %s' % (certificate, key or certificate, why))


def printable(text: str) -> str:
    """The text without anything that a terminal would obey: a guest may have written it."""
    if text.isprintable():
        return text
    # Not the codec unicode_escape: it is a file, and there may be no descriptor left to open one.
    return ''.join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def in_order(name: str) -> List[Any]:
    """A key by which names are sorted as people count: lab4 before lab10."""
    parts = re.split('([0-9]+)', name)
    numbers = [part.lstrip('0') for part in parts[1::2]]   # as text: there may be thousands of digits
    parts[1::2] = numbers
    return [[(len(part), part) if place % 2 else part for place, part in enumerate(parts)], name]


def sentence(error: BaseException) -> str:
    """What went wrong, for a person: of what the system says, the path and the reason, and no number."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or type(error).__name__
    names = [short_path(os.fsdecode(name)) for name in (error.filename, error.filename2)
             if isinstance(name, (str, bytes))]
    return ': '.join([' -> '.join(names), error.strerror] if names else [error.strerror])


LONG = '\\\\?\\'               # begins a path of Windows that may be longer than 260 characters


def short_path(path: str) -> str:
    """A path as a person writes it."""
    if not path.startswith(LONG):
        return path
    path = path[len(LONG):]
    return '\\' + path[3:] if path.startswith('UNC\\') else path


class Seldom:
    """Lines that may come by the thousand: of each sender one in TOLD_EVERY seconds is logged.

    From any thread: two at the same moment may both be logged.
    """

    def __init__(self, log: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._told = {}                # type: Dict[str, Tuple[float, int]]  # sender: when, and how many since

    def warn(self, sender: str, text: str, *values: Any) -> None:
        """Logs it, or counts it for the next time."""
        self._tell(self._log.warning, sender, text, values)

    def info(self, sender: str, text: str, *values: Any) -> None:
        """The same, where nobody has to do anything about it."""
        self._tell(self._log.info, sender, text, values)

    def _tell(self, say: Callable[..., None], sender: str, text: str, values: Tuple[Any, ...]) -> None:
        now = self._clock()
        when, count = self._told.get(sender, (now - TOLD_EVERY, 0))
        is_due = now - when >= TOLD_EVERY
        if len(self._told) > WARNED_OF:            # whoever they are
            self._told.clear()
        self._told[sender] = (now, 0) if is_due else (when, count + 1)
        if is_due:
            say(text + ' (and %d times since the last line)' * bool(count),
                *[shown(value) for value in values] + [count] * bool(count))


def shown(value: Any) -> Any:
    """A value of a line for the log: a number as it is, since the line may say how; all else as a terminal
    may show it."""
    return value if isinstance(value, (int, float)) else printable(str(value))


def how_to_get(package: str) -> str:
    """What to type for a package that this Python lacks: a system's own mostly takes none from pip."""
    if sys.prefix != sys.base_prefix:
        return '%s -m pip install %s' % (sys.executable, package)
    python = os.path.join('.venv', 'Scripts' if os.name == 'nt' else 'bin', 'python')
    there = os.path.join(os.path.dirname(os.path.abspath(__file__)), python)
    if os.path.exists(there) or os.path.exists(there + '.exe'):
        return 'start it by %s' % there
    return '%s -m venv .venv && %s -m pip install %s, and start it by %s' % (
        sys.executable, python, package, python)


@contextlib.contextmanager
def momentary_file(folder: str) -> Iterator[str]:
    """Makes a file in the folder for a moment; gives its path. Raises OSError where that can't be.

    Not by tempfile: where this user may make no file, Python on Windows takes that for a name that is
    taken, and tries the next one, two thousand million times.
    """
    path = os.path.join(folder, '.vmhost-' + os.urandom(8).hex())
    delete_on_close = getattr(os, 'O_TEMPORARY', 0)    # on Windows
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | delete_on_close, 0o600)
    try:
        yield path
    finally:
        try:
            os.close(descriptor)       # may fail, as of a full disk in a network
        finally:
            if not delete_on_close:
                os.remove(path)


def existing(path: str) -> str:
    """The path, or the nearest one above it that exists; the root of a drive that isn't there, on Windows."""
    path = os.path.abspath(path)
    while not os.path.exists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def sync(path: str) -> None:
    """Brings a file's bytes, or a folder's entries, to the disk. Raises OSError."""
    is_posix = os.name == 'posix'
    if is_posix or not os.path.isdir(path):        # Windows brings names to the disk by itself
        descriptor = os.open(path, os.O_RDONLY if is_posix else os.O_RDWR)
        try:
            sync_descriptor(descriptor)
        finally:
            os.close(descriptor)


def sync_descriptor(descriptor: int) -> None:
    """Brings to the disk what is open. Raises OSError."""
    if sys.platform == 'darwin':       # whose fsync leaves it in the disk's own memory
        import fcntl
        with contextlib.suppress(OSError):         # a file system that has no more than fsync
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


HELD = 2.0                     # seconds that a virus scanner may hold a new file
HELD_PAUSE = 0.05              # seconds between two tries
NOT_TO_READ = 'another program has it open, or you may not read it'     # why, after that
NOT_TO_WRITE = 'another program has it open, or it is read-only'


def while_held(do: Callable[[], Any], why: str, path: str) -> Any:
    """What ``do`` gives. Raises what it raises.

    Windows refuses much while any other program has the file open, as virus scanners have what is new: there
    it is done again, for HELD seconds; then the error says ``why``, and names the path.
    """
    deadline = time.monotonic() + HELD
    while True:
        try:
            return do()
        except PermissionError as error:
            if not ON_WINDOWS:
                raise
            if time.monotonic() > deadline:
                raise PermissionError(error.errno, why, path)
        time.sleep(HELD_PAUSE)


def read_bytes(path: str) -> bytes:
    """A small file, which another program may hold for a moment. Raises OSError."""
    def read() -> bytes:
        if ON_WINDOWS and os.path.isdir(path):     # of which it says no more than that access is denied
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        with open(path, 'rb') as file:
            return file.read()
    return while_held(read, NOT_TO_READ, path)      # type: ignore[no-any-return]


def replace(source: str, target: str) -> None:
    """Gives a file or folder a name, and ends what had it, as os.replace does. Raises OSError."""
    while_held(lambda: os.replace(source, target), NOT_TO_WRITE, target)


WSAEACCES = 10013              # Windows' number


def is_alive(pid: int) -> bool:
    """Whether there is a process of that number; one that has ended unwaited for counts."""
    if os.name == 'nt':
        return _is_alive_on_windows(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:                    # another user's
        pass
    return True


def _is_alive_on_windows(pid: int) -> bool:
    import ctypes  # needed there alone
    synchronize, timed_out, denied = 0x100000, 0x102, 5
    kernel = ctypes.windll.kernel32    # type: ignore[attr-defined]
    handle = kernel.OpenProcess(synchronize, False, pid)
    if not handle:
        return bool(kernel.GetLastError() == denied)
    try:
        return bool(kernel.WaitForSingleObject(handle, 0) == timed_out)
    finally:
        kernel.CloseHandle(handle)


def port_is_free(address: str, port: int) -> bool:
    """Whether this machine has the address ('' for all), and nobody listens there."""
    with socket.socket() as probe:
        if os.name == 'posix':             # where connections that have just ended would keep it; on Windows
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)     # it would share a port in use
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def why_not_listening(error: OSError) -> str:
    """Why nobody can listen on an address, and what to do about it."""
    if error.errno in (errno.EADDRINUSE, getattr(errno, 'WSAEADDRINUSE', 0)):
        return 'another program listens there: stop it, or take another port'
    if error.errno in (errno.EADDRNOTAVAIL, getattr(errno, 'WSAEADDRNOTAVAIL', 0)):
        return 'this machine has no such address: take one of its own'
    if getattr(error, 'winerror', 0) == WSAEACCES:
        return ('another program holds the port, or Windows has reserved it, for Hyper-V, say (`netsh '
                'interface ipv4 show excludedportrange tcp` lists those): take another one, or auto')
    if error.errno in (errno.EACCES, errno.EPERM):
        return 'this user may not: take a port above 1023'
    return sentence(error)
