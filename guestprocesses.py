"""The processes of a command, as /proc shows them: who they are, what they use, and signals to them.

Nothing that stands there can fail what asks: a process may be gone, its name may be any bytes, its
descendants may be nested by thousands. Knows no spool and no words. No threads, no locks.
"""

import contextlib
import logging
import os
import re
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import protocol

TICKS = os.sysconf('SC_CLK_TCK')
PAGE = os.sysconf('SC_PAGE_SIZE')
LOOKS = 3                      # at children: who ends meanwhile hides its own, which are the subreaper's then
# Indexes into stat_fields: see proc(5), whose numbers begin with 1 and with the two fields that are left out.
STATE, PARENT, SESSION, MINOR, MAJOR, USER, SYSTEM, START, RESIDENT = 0, 1, 3, 7, 9, 11, 12, 19, 21

log = logging.getLogger('vmguest')


def has_proc() -> bool:
    """Whether this system shows its processes there; else sessions are all that is known of them.

    One that was mounted for another namespace (``unshare --pid``) has other numbers for the same processes,
    and ours for others: it is none.
    """
    try:
        return os.readlink('/proc/self') == str(os.getpid())
    except OSError:
        return False


def stat_fields(pid: int) -> List[bytes]:
    """The fields of /proc/PID/stat from the state on; [] where there is no such process."""
    try:
        with open('/proc/%d/stat' % pid, 'rb') as file:
            fields = file.read().rpartition(b')')[2].split()
    except (OSError, ValueError):
        return []
    return fields if len(fields) > RESIDENT and has_proc() else []


def is_alive(fields: List[bytes]) -> bool:
    """Whether what has these fields is there, and not dead and waited for only."""
    return bool(fields) and fields[STATE] not in (b'Z', b'X', b'x')


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal."""
    return stat_fields(pid)[STATE:PARENT] == [b'T']


def stands_still(pid: int) -> bool:
    """The same, also where it waits within ``vfork``, as shells do, for a child that was stopped with it."""
    state = stat_fields(pid)[STATE:PARENT]
    return state == [b'T'] or state == [b'D'] and any(is_stopped(child) for child in children_of(pid))


def all_stand_still(pids: Iterable[int]) -> bool:
    """Whether none of the processes does anything: each was stopped, or stands still for who traces it."""
    return all(stands_still(pid) or is_traced(pid) for pid in pids)


def is_traced(pid: int) -> bool:
    """Whether a process stands still for who traces it."""
    return stat_fields(pid)[STATE:PARENT] == [b't']


def executable(pid: int) -> str:
    """The path of what a process executes; '' where that can't be told, as it has ended."""
    try:
        return os.readlink('/proc/%d/exe' % pid) if has_proc() else ''
    except OSError:
        return ''


def start_ticks(pid: int) -> int:
    """When a living process began, in clock ticks since the boot: with the pid, its name for ever; else 0."""
    fields = stat_fields(pid)
    return int(fields[START]) if is_alive(fields) else 0


def all_pids() -> List[int]:
    """All processes of this machine."""
    return [int(name) for name in os.listdir('/proc') if name.isdigit()] if has_proc() else []


def descendants(pid: int) -> List[int]:
    """The living children of a process, and theirs, and so on, whatever sessions they are in."""
    is_told = os.path.exists('/proc/self/task/%d/children' % os.getpid())
    children = children_of if is_told else children_table()
    found = {}  # type: Dict[int, bool]
    for _ in range(LOOKS):
        todo = [pid]
        while todo:
            new = [child for child in children(todo.pop()) if child not in found]
            found.update((child, is_alive(stat_fields(child))) for child in new)
            todo += new
    return [child for child, alive in found.items() if alive]


def children_of(pid: int) -> List[int]:
    """The children of all threads of a process."""
    found = []  # type: List[int]
    try:
        for thread in os.listdir('/proc/%d/task' % pid) if has_proc() else []:
            with open('/proc/%d/task/%s/children' % (pid, thread), 'rb') as file:
                found += [int(word) for word in file.read().split()]
    except (OSError, ValueError):
        log.debug('%d has gone', pid)
    return found


def has_children() -> bool:
    """Whether this process has children, or such as have ended and weren't waited for; also without /proc."""
    if not hasattr(os, 'waitid'):      # macOS, before Python 3.13
        return bool(children_of(os.getpid()))
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return True
    except ChildProcessError:
        return False


def children_table() -> Callable[[int], List[int]]:
    """The same for kernels that don't tell children: of all processes at once, by their parents."""
    table = {}  # type: Dict[int, List[int]]
    for pid in all_pids():
        fields = stat_fields(pid)
        if fields:
            table.setdefault(int(fields[PARENT]), []).append(pid)
    return lambda pid: table.get(pid, [])


def in_session(pids: Iterable[int], session: int) -> List[int]:
    """Those of the processes that are in that session."""
    return [pid for pid in pids if stat_fields(pid)[SESSION:SESSION + 1] == [b'%d' % session]]


def processes_with(variable: str, value: str) -> List[int]:
    """The living processes that began with this variable in their environment."""
    wanted, found = os.fsencode('%s=%s' % (variable, value)), []
    for pid in all_pids():
        with contextlib.suppress(OSError), open('/proc/%d/environ' % pid, 'rb') as file:
            if wanted in file.read().split(b'\0') and is_alive(stat_fields(pid)):
                found.append(pid)
    return found


def signal_all(pids: Iterable[int], number: int, refused: Optional[List[int]] = None) -> int:
    """Sends a signal to each of the processes; how many got it. Those that this user may not signal are added
    to ``refused``."""
    count = 0
    for pid in pids:
        try:
            os.kill(pid, number)
            count += 1
        except ProcessLookupError:
            continue
        except OSError as error:
            log.warning('signal %d to %d: %s', number, pid, error)
            if refused is not None:
                refused.append(pid)
    return count


def signal_session(session: int, number: int) -> int:
    """Sends a signal to each process of a session, or to its first group where sessions can't be seen."""
    if has_proc():
        return signal_all(in_session(all_pids(), session), number)
    try:
        os.killpg(session, number)
        return 1
    except OSError as error:
        log.debug('signal %d to group %d: %s', number, session, error)
        return 0


def live_usage(pids: Iterable[int]) -> Tuple[int, Dict[str, float]]:
    """How many of the processes live, and what they, and children they waited for, have used."""
    count, usage = 0, dict.fromkeys(protocol.RUSAGE_FIELDS, 0)  # type: int, Dict[str, float]
    for pid in pids:
        fields = stat_fields(pid)
        if not is_alive(fields):
            continue
        count += 1
        for name, index, unit in (('ru_utime', USER, TICKS), ('ru_stime', SYSTEM, TICKS),
                                  ('ru_minflt', MINOR, 1), ('ru_majflt', MAJOR, 1)):
            own, of_children = int(fields[index]), int(fields[index + (2 if unit == TICKS else 1)])
            usage[name] += (own + of_children) / unit if unit == TICKS else own + of_children
        peak = peak_memory(pid) or int(fields[RESIDENT]) * PAGE // 1024
        usage['ru_maxrss'] = max(usage['ru_maxrss'], peak)
    return (count, usage) if count else (0, {})


def peak_memory(pid: int) -> int:
    """KiB that were resident at most, of a living process; else 0."""
    return status_number(pid, b'VmHWM:')


def tracer_of(pid: int) -> int:
    """The process that traces it (ptrace); 0 for none."""
    return status_number(status_number(pid, b'TracerPid:'), b'Tgid:')     # it may be a thread that does


def status_number(pid: int, name: bytes) -> int:
    """A number of /proc/PID/status; 0 where there is none."""
    try:
        with open('/proc/%d/status' % pid, 'rb') as file:
            for line in file:
                if line.startswith(name):
                    return int(line.split()[1])
    except (OSError, ValueError, IndexError) as error:
        log.debug('no %s of %d: %s', name.decode(), pid, error)
    return 0


def was_killed_for_memory(pid: int, since: float, path: str = '/dev/kmsg') -> bool:
    """Whether the kernel says that it killed that process for want of memory; where this user may read that.

    ``since``: by the monotonic clock.
    """
    killed = re.compile(rb'\d+,\d+,(\d+),[^;]*;.*Killed process %d[ ,]' % pid)
    return any(found is not None and int(found.group(1)) / 1000000 >= since - 1
               for found in map(killed.match, kernel_log(path)))


def kernel_log(path: str) -> Iterator[bytes]:
    """The lines of the kernel's log, as far as this user may read it."""
    with contextlib.suppress(OSError):      # BlockingIOError at the end; else an old Linux, or not root
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            for lines in iter(lambda: os.read(descriptor, 8192), b''):
                yield from lines.splitlines()
        finally:
            os.close(descriptor)
