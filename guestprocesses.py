"""The processes of a command, as /proc shows them: who they are, what they use, and signals to them.

Knows no spool and no words. No threads, no locks.
"""

import logging
import os
from typing import Dict, Iterator, List, Tuple

import protocol

log = logging.getLogger('vmguest')


# --- processes of a session ------------------------------------------------------------------

TICKS = os.sysconf('SC_CLK_TCK')
PAGE = os.sysconf('SC_PAGE_SIZE')


def processes_of(session: int) -> Iterator[Tuple[int, List[str]]]:
    """(pid, fields of /proc/PID/stat from the state on) of each living process of a session."""
    for name in os.listdir('/proc') if os.path.isdir('/proc') else []:
        if not name.isdigit():
            continue
        try:
            with open('/proc/%s/stat' % name) as file:
                fields = file.read().rpartition(')')[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in 'ZX':
            yield int(name), fields


def start_ticks(pid: int) -> int:
    """When a living process began, in clock ticks since the boot: with the pid, its name for ever."""
    try:
        with open('/proc/%d/stat' % pid) as file:
            fields = file.read().rpartition(')')[2].split()
    except OSError:
        return 0
    return int(fields[19]) if fields[0] not in 'ZX' else 0


def processes_with(variable: str, value: str) -> List[int]:
    """The pids of living processes that began with this variable in their environment."""
    wanted, found = os.fsencode('%s=%s' % (variable, value)), []
    for name in os.listdir('/proc') if os.path.isdir('/proc') else []:
        try:
            with open('/proc/%d/environ' % int(name), 'rb') as file:
                if wanted in file.read().split(b'\0'):
                    found.append(int(name))
        except (OSError, ValueError):
            continue
    return found


def signal_session(session: int, number: int) -> int:
    """Sends a signal to each process of a session; how many there were."""
    count = 0
    for pid, _ in processes_of(session):
        try:
            os.kill(pid, number)
            count += 1
        except ProcessLookupError:
            continue
        except PermissionError as error:
            log.warning('signal %d to %d: %s', number, pid, error)
    if not os.path.isdir('/proc/self'):
        try:
            os.killpg(session, number)
            count += 1
        except (ProcessLookupError, PermissionError) as error:
            log.debug('signal %d to group %d: %s', number, session, error)
    return count


def live_usage(session: int) -> Tuple[int, Dict[str, float]]:
    """How many processes a session has, and what they, and children they waited for, have used."""
    count, user, system, minor, major, peak = 0, 0, 0, 0, 0, 0
    for pid, fields in processes_of(session):
        count += 1
        minor += int(fields[7]) + int(fields[8])
        major += int(fields[9]) + int(fields[10])
        user += int(fields[11]) + int(fields[13])
        system += int(fields[12]) + int(fields[14])
        peak = max(peak, peak_memory(pid) or int(fields[21]) * PAGE // 1024)
    if not count:
        return 0, {}
    usage = dict.fromkeys(protocol.RUSAGE_FIELDS, 0)  # type: Dict[str, float]
    usage.update(ru_utime=user / TICKS, ru_stime=system / TICKS, ru_maxrss=peak, ru_minflt=minor,
                 ru_majflt=major)
    return count, usage


def peak_memory(pid: int) -> int:
    """KiB that were resident at most, of a living process; else 0."""
    try:
        with open('/proc/%d/status' % pid) as file:
            for line in file:
                if line.startswith('VmHWM:'):
                    return int(line.split()[1])
    except (OSError, ValueError) as error:
        log.debug('no VmHWM of %d: %s', pid, error)
    return 0


def family(pid: int) -> List[int]:
    """A process, and its descendants where this kernel tells them."""
    try:
        with open('/proc/%d/task/%d/children' % (pid, pid)) as file:
            children = [int(word) for word in file.read().split()]
    except (OSError, ValueError) as error:
        log.debug('no children of %d: %s', pid, error)
        return [pid]
    return [pid] + [member for child in children for member in family(child)]
