"""Preconditions that `check` looks at, on host and guest alike: each a ``Finding``, with what mends it.

What it is not: which of them are looked at (hostcheck.py, guestcheck.py). An agent that runs does without.
No threads but a link's (protocol.py), no locks, no state.
"""

import importlib.util
import sys
import time
from typing import Any, Iterable, List, NamedTuple, Optional, Tuple

from agent import client_tls, existing, how_to_get, momentary_file, sentence
from protocol import try_broker


class Finding(NamedTuple):
    """One precondition: whether it holds, what it is, how to mend it; not ``needed``: all else works."""
    ok: bool
    what: str
    mend: str = ''
    needed: bool = True


def describe_findings(findings: Iterable[Finding], encoding: Optional[str]) -> List[str]:
    """A line for each: a tick, or what is wrong and how to mend it."""
    marks = '✓!✗' if (encoding or '').lower().replace('-', '') == 'utf8' else ('ok', '--', 'NO')
    return ['%-2s %s' % (marks[0 if found.ok else 2 if found.needed else 1],
                         found.what if found.ok else '%s: %s' % (found.what, found.mend))
            for found in findings]


def check_python() -> Finding:
    """The Python that runs this."""
    return Finding(sys.version_info >= (3, 6), 'Python ' + sys.version.split()[0],
                   'Python 3.6 or later is needed')


def check_package(name: str) -> Finding:
    """Whether a package can be imported."""
    return Finding(importlib.util.find_spec(name) is not None, 'package ' + name,
                   'missing for %s: %s, or use the bundle (--bundle)' % (sys.executable, how_to_get(name)))


def check_folder(folder: str, key: str) -> Finding:
    """Whether files can be made in the folder, or the folder in the nearest one that exists."""
    place, writable = existing(folder), True
    try:
        with momentary_file(place):    # what modes say isn't all, on Windows least of all
            pass
    except OSError:
        writable = False
    return Finding(writable, 'folder %s' % folder, '%s can\'t be written by this user: change its owner '
                   'or mode, or name another folder as %s' % (place, key))


def check_disk(folder: str, least: int) -> Finding:
    """Whether there is room on the folder's disk, in bytes."""
    import shutil  # brings compressors along, that an agent doesn't need
    try:
        free = shutil.disk_usage(existing(folder)).free
    except OSError as error:           # Windows: a drive that isn't there
        return Finding(False, 'disk of %s' % folder, sentence(error))
    return Finding(free >= least, '%d MB free for %s' % (free // 1000000, folder),
                   'less than %d MB: make room, or move it to another disk' % (least // 1000000))


RELEASED = 1735689600      # 2025-01-01: no clock that is right shows an earlier time


def check_clock() -> Finding:
    """Whether this machine's clock can be right."""
    return Finding(time.time() > RELEASED, 'clock: %s' % time.strftime('%Y-%m-%d %H:%M:%S %z'),
                   'this was years ago: set it (date, ntpdate, chronyd); TLS fails until then')


def check_broker(hosts: Iterable[str], settings: Any) -> Tuple[Finding, str]:
    """Whether the broker of [Broker] answers at one of the hosts; then our own address towards it."""
    tls = client_tls(settings.ca_file) if settings.tls else None
    tried = []
    for host in hosts:
        link = try_broker(host, settings, tls)
        if link.server:
            return Finding(True, 'broker at %s:%d (%s)' % (host, settings.port, link.server)), \
                str(link.local_address[0])
        tried.append(link.last_error or '%s:%d: no answer' % (host, settings.port))
    return Finding(False, 'broker', 'none answers (%s); is it running, does it listen where this machine can '
                   'reach it, and are [Broker] host, port, username, password and tls right?'
                   % '; '.join(tried)), ''
