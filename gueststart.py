"""The start of a program: what happens between the fork of a runner and the exec of what was asked for.

All that the request names (user, limits, folder, standard input, the program itself) is looked at in the
child, with the rights of the user that the program will have, and never waited for: a pipe as standard input
is refused. What goes wrong there is told by its errno.

What it is not: the care for the program once it runs (guestrunner.py). No threads, no locks: a runner has no
threads.
"""

import contextlib
import errno
import fcntl
import grp
import json
import logging
import math
import os
import pwd
import re
import resource
import select
import signal
import stat
import struct
import sys
import termios
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from guestcgroup import LIMITS as OF_GROUPS
from guestcgroup import Group, Place
from guestidentity import PASSED
from guestprocesses import children_of, executable, has_proc, is_alive, is_stopped, signal_all, stat_fields
from guestspool import Command, private

LIMITS = {'as': resource.RLIMIT_AS, 'cpu': resource.RLIMIT_CPU, 'fsize': resource.RLIMIT_FSIZE,
          'nofile': resource.RLIMIT_NOFILE, 'nproc': getattr(resource, 'RLIMIT_NPROC', None)}
LONGEST_START = 30.0          # seconds that a start may take, on a file system that doesn't answer, say
LOOK_EVERY = 0.2               # seconds between looks whether the start was cancelled
OWN_PATH = '/usr/local/bin:/usr/bin:/bin'      # PATH of another user …
ROOTS_PATH = '/usr/local/sbin:/usr/sbin:/sbin:' + OWN_PATH     # … and of root
REPORT = 3                     # the descriptor on which the starter reports
CPU_GRACE = 5                  # seconds of a processor between XCPU and KILL, for who exceeds limits.cpu
ALL_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith('RLIMIT_')]
LEAST = {'nofile': REPORT + 1, 'cpu': 1, 'as': 128 * 1024}     # with less no program can begin (its stack)
# What a death by these signals speaks for, where such a limit was asked for.
DEATHS = {'cpu': (errno.ETIME, (signal.SIGXCPU,)), 'fsize': (errno.EFBIG, (signal.SIGXFSZ,)),
          'as': (errno.ENOMEM, (signal.SIGSEGV, signal.SIGBUS, signal.SIGKILL))}
# Signals that end a program which doesn't care for them, and so a command that hasn't begun.
ENDING = (signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGABRT)
BECOMES = b'SX'                # records by which a child tells what it becomes: the starter, the program
OF_FOLDER, OF_INPUT = 'its folder', 'standard input'       # whose errors aren't the program's
STARTERS_NAME = 'vmguest-starter'
MOST_TOLD = 300                # characters of what keeps a program from beginning: a pipe takes all at once
SPARE = 10                     # descriptors from here on are free to be moved to
SET_CHILD_SUBREAPER = 36       # of prctl

log = logging.getLogger('vmguest')


# --- exact accounting ------------------------------------------------------------------------

# Linux keeps a process's peak memory over exec: whatever is forked by a Python of 10 MB has used 10 MB, even
# /bin/true. So the runner executes this program of a few hundred bytes, which forks the one that was asked
# for, and ends. The orphan becomes the child of the runner, its subreaper, and wait4 tells what it used, and
# no more. Its words: the folder to work in, the path to execute, then the words of the program. It writes P
# and the program's pid to descriptor 3; or D (the folder) or E (the program) and an errno. Where descriptor 4
# is the folder of a control group, the program begins within that (a move would hold up all that fork).
# Signals 32 and 33 are the C library's own: its posix_spawn leaves them ignored, and can't be told not to.
STARTERS = {'x86_64': bytes.fromhex(
    '488b1c24'                 # _start: mov rbx, [rsp]                 argc
    '488d6c2408'               #         lea rbp, [rsp+8]               argv
    '4c8d64dd08'               #         lea r12, [rbp+rbx*8+8]         envp
    '6a006a006a006a004889e631d26a08415a'       # 4 × push 0; mov rsi, rsp; xor edx, edx; push 8; pop r10
    '6a205f6a0d580f05'         #         rt_sigaction(32, default)
    '6a215f6a0d580f05'         #         rt_sigaction(33, default)
    '6a44415d'                 #         push 'D'; pop r13
    '6a5058488b7d000f05'       #         chdir(argv[0])
    '85c07864'                 #         test eax, eax; js failed
    '6a45415d'                 #         push 'E'; pop r13
    '6a0431c050505050506a11505050'     # push 4; xor eax, eax; 5 × push rax; push SIGCHLD; 3 × push rax
    '48b8004100000200000050'   #         mov rax, CLONE_VM | CLONE_VFORK | CLONE_INTO_CGROUP; push rax
    '4889e76a585eb8b30100000f05'       # clone3(rsp, 88)
    '85c079056a3a580f05'       #         test eax, eax; jns began; vfork()
    '85c0782d7533'             # began:  test eax, eax; js failed; jnz parent
    '6a70580f05'               #         setsid()
    '6a48586a035f6a025e6a015a0f05'     # fcntl(3, F_SETFD, FD_CLOEXEC)
    '6a48586a045f0f05'         #         fcntl(4, F_SETFD, FD_CLOEXEC)
    '6a3b58488b7d08488d75104c89e20f05'     # execve(argv[1], argv + 2, envp)
    'f7d86a7f4155eb04'         # failed: neg eax; push 127; push r13; jmp say
    '6a006a50'                 # parent: push 0; push 'P'
    '89442401'                 # say:    mov [rsp+1], eax
    '6a01586a035f4889e66a055a0f05'     # write(3, rsp, 5)
    '5f5f6a3c580f05')}         #         _exit(127 or 0)
ELF_START = 0x400000
ELF_HEADER = struct.Struct('<4s5B7xHHIQQQIHHHHHH')
ELF_SEGMENT = struct.Struct('<IIQQQQQQ')


def make_starter() -> int:
    """A descriptor of the starter, to be executed; -1 where this system has none."""
    code = STARTERS.get(os.uname().machine)
    if code is None or not sys.platform.startswith('linux') or sys.maxsize < 2 ** 32:
        return -1
    head = ELF_HEADER.size + ELF_SEGMENT.size
    header = ELF_HEADER.pack(b'\x7fELF', 2, 1, 1, 0, 0, 2, 62, 1, ELF_START + head, ELF_HEADER.size, 0, 0,
                             ELF_HEADER.size, ELF_SEGMENT.size, 1, 0, 0, 0)
    segment = ELF_SEGMENT.pack(1, 5, 0, ELF_START, ELF_START, head + len(code), head + len(code), 0x1000)
    try:
        import ctypes  # which a Python may have been built without
        libc = ctypes.CDLL(None)
        descriptor = libc.memfd_create(STARTERS_NAME.encode(), 1)      # MFD_CLOEXEC
        if descriptor < 0:
            return -1
        os.write(descriptor, header + segment + code)
        # Executed only where it can't be written any more, and where nobody has it open for that.
        starter = os.open('/proc/self/fd/%d' % descriptor, os.O_RDONLY | os.O_CLOEXEC)
        os.close(descriptor)
        return starter
    except (ImportError, OSError, AttributeError) as error:
        log.debug('no starter: %s', error)
        return -1


def become_subreaper() -> bool:
    """Whether descendants of this process, once they are orphans, become its children from now on."""
    try:
        import ctypes
        return ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    except (ImportError, OSError, AttributeError) as error:
        log.debug('no subreaper: %s', error)
        return False


def inheritance() -> Tuple[Any, ...]:
    """What a program takes over from the process that begins it, and that another process may change."""
    processors = os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else set()
    return os.getpriority(os.PRIO_PROCESS, 0), processors, [resource.getrlimit(which) for which in ALL_LIMITS]


# --- users -----------------------------------------------------------------------------------

class User:
    """Whom a command runs as: ``NAME``, ``UID``, or either with ``:GROUP`` or ``:GID``. Raises OSError."""

    def __init__(self, text: str) -> None:
        name, _, group = text.partition(':')
        entry = find(name or text, pwd.getpwuid, pwd.getpwnam, 'user')
        self.uid = int(name) if entry is None else entry.pw_uid
        self.name = name if entry is None else entry.pw_name
        self.home = '/' if entry is None else entry.pw_dir
        self.shell = '/bin/sh' if entry is None else entry.pw_shell or '/bin/sh'
        self.gid = self.uid if entry is None else entry.pw_gid
        self._has_groups = entry is not None and not group
        if group:
            found = find(group, grp.getgrgid, grp.getgrnam, 'group')
            self.gid = int(group) if found is None else found.gr_gid

    def environment(self) -> Dict[str, str]:
        """What is the user's own, beside the languages and the time zone of the agent."""
        kept = {name: value for name, value in os.environ.items()
                if name in ('LANG', 'TZ') or name.startswith('LC_')}
        return dict(kept, HOME=self.home, USER=self.name, LOGNAME=self.name, SHELL=self.shell,
                    PATH=OWN_PATH if self.uid else ROOTS_PATH)

    def become(self) -> None:
        """Gives all rights of this process up but this user's."""
        if self.uid == os.getuid() and self.gid == os.getgid():
            return
        if self._has_groups:
            os.initgroups(self.name, self.gid)
        else:
            os.setgroups([])
        os.setgid(self.gid)
        os.setuid(self.uid)


def find(text: str, by_number: Callable[[int], Any], by_name: Callable[[str], Any], what: str) -> Any:
    """The entry of a user or group; None for a number that has none. Raises OSError."""
    try:
        return by_name(text)
    except KeyError:
        if not re.fullmatch('[0-9]{1,9}', text):
            raise OSError(errno.EINVAL, 'no such %s' % what, text)
    with contextlib.suppress(KeyError):
        return by_number(int(text))
    return None


# --- the start -------------------------------------------------------------------------------

class Origin:
    """What all programs of an agent begin with: found out once, since each start should take little."""

    def __init__(self, starter: int, place: Place) -> None:
        """``starter``: see make_starter; -1: a program is executed by the runner's own child.

        ``place``: where control groups are made.
        """
        self.starter = starter
        self.place = place
        self.environment = {encode(name): encode(value) for name, value in os.environ.items()}
        self.environment.pop(b'OLDPWD', None)
        self.ignored = [number for number in range(1, signal.NSIG) if is_ignored(number)]


def is_ignored(number: int) -> bool:
    """Whether a signal is ignored, by whoever began this process or by Python."""
    try:
        return signal.getsignal(number) == signal.SIG_IGN
    except ValueError:                 # one of the C library's own
        return False


class Start:
    """One program on its way from a request to its exec. ``wait`` tells whether it got there."""

    def __init__(self, command: Command, request: Dict[str, Any], origin: Origin,
                 group: Optional[Group]) -> None:
        """Does what can be done before the fork, after which each page that is touched is copied.

        ``group``: where the program is to be, if that can be.
        """
        self._command = command
        self._request = request
        self._origin = origin
        self._group = group
        self._user = User(request['user']) if request.get('user') else None
        self._folder = os.path.join(encode(request['root']), encode(request['path']))
        self._words = [encode(word) for word in [request['cmd']] + request['args']]
        self._environment = self._make_environment()
        self.child = 0                 # the process that was forked: the program, or the starter
        self._is_starter = False       # whether it is the latter, as far as it hasn't said
        self._report = -1

    def begin(self, out: int, err: int, stdin: int) -> None:
        """With these descriptors as the program's outputs and, unless a file is asked for, as its input.

        Raises OSError.
        """
        if self._user is not None:
            with blamed_on('user %s' % self._request['user']):
                self._open_progress(self._user)
            if self._request.get('terminal'):
                os.fchown(stdin, self._user.uid, -1)
        self._report, reporter = os.pipe()
        try:
            if not self._is_plain() or not self._spawn(reporter, out, err, stdin):
                self._fork(reporter, out, err, stdin)
        finally:
            os.close(reporter)

    def _is_plain(self) -> bool:
        """Whether the starter can do all that there is to be done."""
        asked = any(self._request.get(name)
                    for name in ('user', 'nice', 'limits', 'fileForStdin', 'terminal'))
        return self._origin.starter >= 0 and not asked and hasattr(os, 'posix_spawn')

    def _spawn(self, reporter: int, out: int, err: int, stdin: int) -> bool:
        """Begins by the starter alone, which no page has to be copied for. False where this system doesn't
        execute what is in memory alone. Raises OSError."""
        path = find_program(self._words[0], self._folder, self._environment)
        with contextlib.ExitStack() as stack:
            if 'stdin' in self._request:
                stdin = os.open(self._command.path('stdin'), os.O_RDONLY)
                stack.callback(os.close, stdin)
            places = [(os.POSIX_SPAWN_DUP2, fd, number)         # novm
                      for number, fd in enumerate((stdin, out, err, reporter, *self._open_group(stack)))]
            try:
                self.child = os.posix_spawn(                    # novm
                    '/proc/self/fd/%d' % self._origin.starter, [self._folder, path] + self._words,
                    self._environment, file_actions=places, setsigmask=[], setsigdef=self._origin.ignored)
            except OSError as error:
                if error.errno in (errno.E2BIG, errno.EAGAIN, errno.ENOMEM):
                    raise OSError(error.errno, error.strerror, self._words[0])
                return False
        self._is_starter = True
        return True

    def _open_group(self, stack: contextlib.ExitStack) -> List[int]:
        """The descriptor of the group, if there is one, until ``stack`` closes it."""
        if self._group is None:
            return []
        try:
            opened = self._group.open()
        except OSError as error:
            log.debug('%s: %s', self._group.folder, error)
            return []
        spare = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, SPARE)      # no place of another one
        os.close(opened)
        stack.callback(os.close, spare)
        return [spare]

    def _fork(self, reporter: int, out: int, err: int, stdin: int) -> None:
        """Raises OSError."""
        self.child = os.fork()
        if self.child == 0:
            try:
                self._become_program(reporter, out, err, stdin)
            except BaseException as error:
                number = getattr(error, 'errno', None) or (
                    errno.ENOMEM if isinstance(error, MemoryError) else errno.EINVAL)
                text = getattr(error, 'strerror', None) or '%s: %s' % (type(error).__name__, error)
                about = getattr(error, 'filename', None)
                about = os.fsdecode(about) if isinstance(about, (str, bytes)) else ''
                told = json.dumps([number, text[:MOST_TOLD], about[:MOST_TOLD]])
                os.write(reporter, told.encode())
            finally:
                os._exit(127)

    def wait(self) -> int:
        """The program's pid, once it was executed. Raises OSError for whatever prevented that."""
        data, deadline = b'', time.monotonic() + LONGEST_START
        try:
            while True:
                ready, _, _ = select.select([self._report], [], [], LOOK_EVERY)
                if ready:
                    piece = os.read(self._report, 8192)
                    if not piece:
                        return self._read_report(data)
                    data += piece
                elif set(ENDING) & set(self._command.sent_signals()) and not self._has_begun():
                    raise InterruptedError(errno.EINTR, 'a signal came before the program began')
                elif is_stopped(self.child) or not has_proc():     # by the program, its child
                    os.kill(self.child, signal.SIGCONT)
                elif time.monotonic() >= deadline and not self._has_begun():
                    raise OSError(errno.ETIMEDOUT, 'not started within %g s' % LONGEST_START)
        finally:
            os.close(self._report)

    def _has_begun(self) -> bool:
        """Whether the program runs, though who began it had no turn yet to say so. Else both are stopped, and
        the program won't do anything any more."""
        signal_all([self.child], signal.SIGSTOP)
        found = children_of(self.child)
        signal_all(found, signal.SIGSTOP)
        ready, _, _ = select.select([self._report], [], [], 0)
        starter = executable(self.child)       # which a child of it is until it executes the program
        if not ready and all(executable(pid) == starter for pid in found):
            return False
        signal_all([self.child] + found, signal.SIGCONT)
        return True

    def _read_report(self, data: bytes) -> int:
        """Records of a letter and a number; of this program's own child, the last one may be a JSON array."""
        pid = 0
        for at in range(0, len(data), 5):
            kind, number = data[at:at + 1], int.from_bytes(data[at + 1:at + 5], 'little')
            if kind == b'[':
                number, text, about = json.loads(data[at:].decode())
                raise OSError(number, text, *[about] if about else [])
            if kind not in BECOMES + b'P':
                raise not_the_program(number, OF_FOLDER, self._folder) if kind == b'D' else \
                    OSError(number, os.strerror(number), self._words[0])
            pid = {b'S': 0, b'X': self.child}.get(kind, number)
        return pid or self._begun_in_silence()

    def _begun_in_silence(self) -> int:
        """The program of who was killed before it could tell. Raises OSError where it hasn't begun, and
        ChildProcessError where that can't be known."""
        _, status = os.waitpid(self.child, 0)
        try:           # a program is the only child of the runner now, with what it has left
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            raise self._not_begun(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
        found = children_of(os.getpid())
        if len(found) == 1 and is_program(found[0]):
            return found[0]
        raise ChildProcessError(errno.ECHILD, 'its starter was killed: it may have begun')

    def _not_begun(self, number: int) -> OSError:
        """What a command fails with whose program was to be begun by a process that this signal ended."""
        if number in self._command.sent_signals():
            return InterruptedError(errno.EINTR, 'a signal came before the program began')
        name, code = blame(self._request.get('limits', {}), number, self._group)
        return OSError(code or errno.ECANCELED, 'ended by signal %d before it began' % number,
                       name or self._words[0])

    # In the child.

    def _become_program(self, reporter: int, out: int, err: int, stdin: int) -> None:
        """Doesn't come back, but by what it raises."""
        for number in self._origin.ignored:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        request = self._request
        out, err, stdin, reporter = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, SPARE)
                                     for fd in (out, err, stdin, reporter))
        entrance = self._open_entrance()
        if request.get('nice'):
            with blamed_on('nice %d' % request['nice']):
                os.nice(int(request['nice']))
        if 'stdin' in request:
            stdin = os.open(self._command.path('stdin'), os.O_RDONLY)
        if self._user is not None:
            with blamed_on('user %s' % request['user']):
                self._user.become()
        self._enter_folder()
        if request.get('fileForStdin'):
            stdin = self._open_stdin(request['fileForStdin'])
        words, env = self._words, self._environment
        path = find_program(words[0], self._folder, env)
        for fd, number in ((stdin, 0), (out, 1), (err, 2)):
            os.dup2(fd, number)
        limits = request.get('limits', {})
        for name in sorted(set(limits).difference(OF_GROUPS), reverse=True):   # ``as`` last: this takes room
            set_limit(name, int(limits[name]))
        if entrance >= 0:      # so late, since what this process uses isn't the program's
            with contextlib.suppress(OSError):
                os.write(entrance, b'0')
        if request.get('terminal'):
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            os.write(reporter, b'X\0\0\0\0')
            os.execve(path, words, env)
        if self._origin.starter >= 0 and min(limits.get('nproc', 2), limits.get('pids', 2)) > 1:
            os.dup2(reporter, REPORT)
            os.write(REPORT, b'S\0\0\0\0')
            try:
                os.execve(self._origin.starter, [b'.', path] + words, env)
            except OSError as error:
                if error.errno == errno.E2BIG:
                    raise OSError(error.errno, error.strerror, words[0])
            os.set_inheritable(REPORT, False)      # a system that executes nothing that is in memory alone
        os.setsid()
        os.write(reporter, b'X\0\0\0\0')
        os.execve(path, words, env)

    def _enter_folder(self) -> None:
        try:
            os.chdir(self._folder)
        except OSError as error:
            raise not_the_program(error.errno, OF_FOLDER, self._folder)

    def _open_entrance(self) -> int:
        """A descriptor of the group's entrance, which another user couldn't open; -1 where there is none."""
        if self._group is not None:
            with contextlib.suppress(OSError):
                return fcntl.fcntl(self._group.open_entrance(), fcntl.F_DUPFD_CLOEXEC, SPARE)
        return -1

    def _open_stdin(self, name: str) -> int:
        """A descriptor of fileForStdin. Never waits for a peer: pipes are refused."""
        path = os.path.join(encode(self._request['root']), encode(name))
        try:
            opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            raise not_the_program(error.errno, OF_INPUT, path)
        mode = os.fstat(opened).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISCHR(mode):
            raise OSError(errno.EINVAL, 'standard input should be a file, not a pipe, socket or folder', path)
        os.set_blocking(opened, True)
        return opened

    # In the runner.

    def _make_environment(self) -> Dict[bytes, bytes]:
        """What the program finds in its environment: the agent's or the user's, and what was asked for."""
        found = {}  # type: Dict[bytes, bytes]
        if not self._request.get('env-clear'):
            found = dict(self._origin.environment) if self._user is None else \
                {encode(name): encode(value) for name, value in self._user.environment().items()}
        found[b'PWD'] = os.path.abspath(self._folder)
        if self._request.get('terminal'):
            found[b'TERM'] = encode(self._request['terminal']['term'])
            found.setdefault(b'SHELL', encode(own_shell()))
        found[b'VM_PROGRESS_FILE'] = encode(self._command.path('progress'))
        found[b'VM_NAME'] = encode(self._request.get('name', ''))
        found[b'VM_CMD_ID'] = encode(self._request.get('cmd-id', ''))
        found.update({encode(name): encode(value) for name, value in self._request['env'].items()})
        return found

    def _open_progress(self, user: User) -> None:
        """Another user can write the progress file, though not look into the spool."""
        path = self._command.path('progress')
        os.close(private(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW))
        os.chown(path, user.uid, user.gid)
        os.chmod(self._command.folder, PASSED)


def own_shell() -> str:
    """The shell of this process's user, which services aren't told by their environment."""
    try:
        return pwd.getpwuid(os.getuid()).pw_shell or '/bin/sh'
    except KeyError:
        return '/bin/sh'


def encode(text: Any) -> bytes:
    """The bytes that the host sent: text in UTF-8 whatever the locale, bytes as they were."""
    return text if isinstance(text, bytes) else text.encode('utf-8', 'surrogateescape')


def find_program(name: bytes, folder: bytes, env: Dict[bytes, bytes]) -> bytes:
    """The path of a program for who works in that folder, by the environment's PATH. Raises OSError."""
    if not name or b'\0' in name:
        raise OSError(errno.EINVAL, 'no name of a program')
    if b'/' in name:
        return name
    denied = False
    for place in env.get(b'PATH', os.defpath.encode()).split(b':'):
        path = os.path.join(folder, place, name)
        if os.path.isfile(path):
            if os.access(path, os.X_OK):
                return path
            denied = True
    number = errno.EACCES if denied else errno.ENOENT
    raise OSError(number, os.strerror(number), name)


def not_the_program(number: Optional[int], what: str, path: bytes) -> OSError:
    """An error that no shell's 126 or 127 is about: the program itself may be there."""
    number = number or errno.EINVAL
    return OSError(number, '%s: %s' % (what, os.strerror(number)), path)


@contextlib.contextmanager
def blamed_on(option: str) -> Iterator[None]:
    """What the system refuses there is told by what was asked for, and not by a file of the agent's."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, option)


def set_limit(name: str, value: int) -> None:
    """Raises OSError, ValueError."""
    which = LIMITS.get(name)
    if which is None:
        raise ValueError('no limit %s on this system' % name)
    if value < LEAST.get(name, 0):
        raise OSError(errno.EINVAL, 'no program can begin with %d' % value, 'limits.%s' % name)
    try:
        resource.setrlimit(which, (value, value + CPU_GRACE if name == 'cpu' else value))
    except ValueError as error:        # what the system refuses with EPERM
        raise OSError(errno.EPERM, str(error), 'limits.%s' % name)
    except OverflowError:
        raise OSError(errno.EINVAL, 'larger than any limit: %d' % value, 'limits.%s' % name)


def blame(limits: Dict[str, Any], number: int, group: Optional[Group], cpu: float = 0) -> Tuple[str, int]:
    """The limit that a death by this signal speaks for, of what used so many seconds of CPU, and its errno;
    '' and 0 for none."""
    if 'memory' in limits and number == signal.SIGKILL and group is not None and group.oom_kills():
        return 'limits.memory', errno.ENOMEM
    if number == signal.SIGKILL and cpu >= limits.get('cpu', math.inf):     # it didn't heed XCPU
        return 'limits.cpu', errno.ETIME
    for name, (code, signals) in DEATHS.items():
        if name in limits and number in signals:
            return 'limits.%s' % name, code
    return '', 0


def is_program(pid: int) -> bool:
    """Whether a child whose starter was killed has become the program: it runs as that, or has ended by
    itself, of which only what has begun is able."""
    if is_alive(stat_fields(pid)):
        return STARTERS_NAME not in executable(pid)
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return ended is not None and ended.si_code == os.CLD_EXITED
