"""The host agent: knows the guests, runs commands in them, keeps the journal, answers XML-RPC.

``python vmhost.py host.ini`` runs it; ``python vmhost.py host.ini VERB ...`` talks to the running one.
Read from the top: errors, configuration, the journal (what is remembered), guests (who is there),
commands (what runs where), trust (who may say what to the embedded broker), VirtualBox, transfers,
the host itself (which words do what), the API, its server, the command line.

What it is not: a broker (stompbroker.py), a file server (chirp.py), or an authority on what a guest
says: nothing that a guest sends is evaluated, or used as a path.

Threads: ``main`` ticks the clock; ``link`` is the STOMP connection, where all words are heard;
``vbox`` owns VirtualBox; ``xmlrpc`` accepts, with a thread per request; ``fetch-N`` fetch output;
the broker has its own. Signal handlers set an event, and nothing else.
"""

# An older Python can't read this file: it stops at this line, and shows it.
__needs__: str = 'Python 3.6 or later, and this is an older one: try python3 instead of python'

import argparse
import base64
import binascii
import collections
import contextlib
import difflib
import fnmatch
import functools
import hashlib
import hmac
import html
import http.client
import http.server
import inspect
import io
import ipaddress
import json
import logging
import math
import os
import platform
import posixpath
import queue
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import types
import unicodedata
import urllib.parse
import webbrowser
import xml.parsers.expat
import xmlrpc.client
from typing import (
    Any,
    Callable,
    Dict,
    Generator,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Tuple,
    Union,
)

import agent
import chirpclient
import chirplocal
import chirprequests
import chirpticket
import chirpwire
import protocol
import stompbroker
from protocol import Message

log = logging.getLogger('vmhost')


# --- errors ----------------------------------------------------------------------------------

class VMHostError(agent.AgentError):
    """Base of this module's errors; ``fault`` is the XML-RPC fault number (DESIGN, XML-RPC)."""
    fault = -32603


class InvalidParams(VMHostError):
    """The call's arguments are wrong."""
    fault = -32602


class NoSuchVM(VMHostError):
    """No VM of that name or id is known."""
    fault = 1


class AgentNotConnected(VMHostError):
    """The VM is known, but its agent isn't there."""
    fault = 2


class NoSuchCommand(VMHostError):
    """No command of that id is in the journal."""
    fault = 3


class BadState(VMHostError):
    """Not possible in the state that the VM, command or transfer is in."""
    fault = 4


class HypervisorError(VMHostError):
    """VirtualBox refused; the text is its own."""
    fault = 5


class TransferError(VMHostError):
    """A file couldn't be moved."""
    fault = 6


class DeadlineExceeded(VMHostError):
    """It took too long."""
    fault = 7


class AlreadyExists(VMHostError):
    """There is one of that name."""
    fault = 8


class NotSupported(VMHostError):
    """Not with this hypervisor."""
    fault = 9


class NoFiles(TransferError):
    """The guest serves none."""


class Busy(VMHostError):
    """Something else holds it; try again later."""
    fault = 10


class AccessDenied(VMHostError):
    """Not allowed."""
    fault = 11


class JournalError(VMHostError):
    """The journal can't be read or written (a full disk, say)."""


# --- journal ---------------------------------------------------------------------------------

JOURNAL_FORMAT = 2
UNFINISHED = ('queued', 'sent', 'running', 'suspended')
FINISHED = ('exited', 'signaled', 'timeout', 'failed', 'lost')
ROWS_AT_ONCE = 1000            # of a list, where the caller names no limit
ORPHANS_KEPT = 1000
EVENTS_KEPT = 2 * 1000 * 1000  # however young: a guest may make some thousand in a minute

SCHEMA = """
CREATE TABLE commands (
    cmd_id TEXT PRIMARY KEY, target TEXT NOT NULL, multicast INTEGER NOT NULL,
    request TEXT NOT NULL, submitted REAL NOT NULL, client TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE executions (
    number INTEGER PRIMARY KEY, cmd_id TEXT NOT NULL, vm_id TEXT NOT NULL, vm TEXT NOT NULL,
    multicast INTEGER NOT NULL, cmd TEXT NOT NULL, state TEXT NOT NULL, submitted REAL NOT NULL,
    ended REAL NOT NULL DEFAULT 0, results TEXT NOT NULL DEFAULT '',
    fetched INTEGER NOT NULL DEFAULT 1, UNIQUE (cmd_id, vm_id));
CREATE INDEX unfinished ON executions (number) WHERE ended = 0;
CREATE INDEX unfetched ON executions (number) WHERE fetched = 0;
CREATE INDEX of_vm ON executions (vm, number);
CREATE INDEX of_state ON executions (state, number);
CREATE INDEX by_end ON executions (ended) WHERE ended > 0;
CREATE INDEX of_cmd ON executions (cmd, number);
CREATE INDEX by_submission ON executions (submitted);
CREATE TABLE orphans (
    cmd_id TEXT NOT NULL, vm_id TEXT NOT NULL, received REAL NOT NULL, results TEXT NOT NULL,
    PRIMARY KEY (cmd_id, vm_id));
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, type TEXT NOT NULL,
    vm TEXT NOT NULL, cmd_id TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE guests (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, ip TEXT NOT NULL, boot TEXT NOT NULL,
    session TEXT NOT NULL, facts TEXT NOT NULL, last_seen REAL NOT NULL);
"""


UPGRADES = {                   # format: what makes the next one of it
    1: """CREATE INDEX of_cmd ON executions (cmd, number);
          CREATE INDEX by_submission ON executions (submitted);""",
}
RETENTION_SLICE = 5000         # rows that one transaction deletes


class Journal:
    """The host's memory and audit trail: a SQLite file. May be used from any thread.

    What ``writing`` has committed is on the disk: it survives the process and, unless told otherwise,
    the power.
    A file that is no database, or a torn one, is set aside with a log line, and a new one begun.
    """

    def __init__(self, path: str) -> None:
        """Raises JournalError where the file can't be made, or is of a newer format."""
        self.path = path
        # Guards the writing connection, from BEGIN to COMMIT; nothing but SQL happens while it is
        # held. Waiters for events sleep on it.
        self._lock = threading.Condition(threading.Lock())
        # Guards the reading connection: readers see the last commit, and never wait for a writer.
        self._read_lock = threading.Lock()
        self._closed = False
        self._hurrying = False
        self._durable = True
        self._commits = self._synced = 0       # how many there were, and how many of them are on the disk
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            if not os.path.exists(path) or isinstance(error, sqlite3.OperationalError):
                raise JournalError('%s: %s' % (path, error))
            self._set_aside(error)
            self._open()
        self.last_event = self._row('SELECT max(seq) FROM events')[0] or 0

    def _open(self) -> None:
        self._writer = self._connect()
        try:
            self._check_format()
            self._check_sound()
            self._reader = self._connect()
        except BaseException:
            self._writer.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False,
                                     timeout=10)
        connection.execute('PRAGMA journal_mode = WAL')
        connection.execute('PRAGMA synchronous = FULL')
        return connection

    def _check_format(self) -> None:
        found = self._writer.execute('PRAGMA user_version').fetchone()[0]
        if found == 0:
            self._writer.executescript('BEGIN;' + SCHEMA + 'PRAGMA user_version = %d; COMMIT;'
                                       % JOURNAL_FORMAT)
        elif found > JOURNAL_FORMAT:
            raise JournalError('%s was written by a newer vmhost (format %d, this one knows %d)'
                               % (self.path, found, JOURNAL_FORMAT))
        for older in range(found, JOURNAL_FORMAT) if found else ():
            log.info('%s: format %d becomes %d', self.path, older, older + 1)
            self._writer.executescript('BEGIN; %s; PRAGMA user_version = %d; COMMIT;'
                                       % (UPGRADES[older], older + 1))

    def _check_sound(self) -> None:
        """Raises sqlite3.DatabaseError where pages are torn. A second per 500 MB or so."""
        found = self._writer.execute('PRAGMA quick_check(1)').fetchone()[0]
        if found != 'ok':
            raise sqlite3.DatabaseError(found)

    def _set_aside(self, error: Exception) -> None:
        aside = '%s.corrupt-%d' % (self.path, time.time())
        for suffix in ('', '-wal', '-shm'):
            if os.path.exists(self.path + suffix):
                os.replace(self.path + suffix, aside + suffix)
        log.error('%s is damaged (%s): set aside as %s; a new journal begins',
                  self.path, error, aside)

    def close(self) -> None:
        """Wakes whoever waits for events, and closes the file."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
            self._writer.close()
        with self._read_lock:
            self._reader.close()

    @contextlib.contextmanager
    def writing(self, durable: bool = True) -> Iterator['Transaction']:
        """One transaction: all of it or nothing. Raises JournalError.

        Not ``durable``: it survives the process, and the power from the next ``sync`` on.
        """
        with self._lock:
            try:
                if durable != self._durable:
                    self._writer.execute('PRAGMA synchronous = ' + ('FULL' if durable else 'NORMAL'))
                    self._durable = durable
                self._writer.execute('BEGIN IMMEDIATE')
                transaction = Transaction(self._writer)
                try:
                    yield transaction
                    self._writer.execute('COMMIT')
                    self._commits += 1
                    # The log is one file: those before are there, too. A commit of nothing is not synced.
                    if durable and transaction.last_event:
                        self._synced = self._commits
                except BaseException:
                    if self._writer.in_transaction:
                        self._writer.execute('ROLLBACK')
                    raise
            except sqlite3.Error as error:
                raise JournalError('journal %s: %s' % (self.path, error))
            if transaction.last_event:
                self.last_event = transaction.last_event
                self._lock.notify_all()

    def sync(self) -> None:
        """Brings all that was committed to the disk, unless a later commit has. Raises JournalError."""
        with self._lock:
            commits = self._commits
            if self._synced == commits:
                return
        try:
            agent.sync(self.path + '-wal')
        except OSError as error:
            raise JournalError('journal %s: %s' % (self.path, error))
        with self._lock:
            self._synced = max(self._synced, commits)

    def event(self, type: str, vm: str = '', cmd_id: str = '', text: str = '') -> None:
        """Writes one event."""
        with self.writing() as transaction:
            transaction.event(type, vm, cmd_id, text)

    def rows(self, query: str, *values: Any) -> List[Tuple]:
        """What a SELECT gives. Raises JournalError."""
        with self._read_lock:
            try:
                return self._reader.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise JournalError('journal %s: %s' % (self.path, error))

    def _row(self, query: str, *values: Any) -> Tuple:
        rows = self.rows(query, *values)
        return rows[0] if rows else ()

    def events_after(self, after: int, timeout: float, limit: int = ROWS_AT_ONCE) -> Dict[str, Any]:
        """{last, events}: those with a number above ``after``; waits up to timeout for the first.

        Below 0: as many of the newest.
        """
        if after < 0:
            after = max(0, self.last_event + after)
        deadline = time.monotonic() + timeout
        with self._lock:
            after = min(after, self.last_event)     # it may be of an earlier journal, that was lost
            while self.last_event <= after and not self._closed and not self._hurrying:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._lock.wait(left)
            if self._closed:
                return {'last': after, 'events': []}
        found = self.rows('SELECT seq, time, type, vm, cmd_id, text FROM events WHERE seq > ? '
                          'ORDER BY seq LIMIT ?', after, limit)
        events = [{'seq': seq, 'time': when, 'type': type, 'vm': vm, 'cmdId': cmd_id, 'text': text}
                  for seq, when, type, vm, cmd_id, text in found]
        return {'last': events[-1]['seq'] if events else max(after, 0), 'events': events}

    def last_time(self) -> float:
        """When the newest event happened, in seconds since 1970; now where there is none."""
        row = self._row('SELECT time FROM events ORDER BY seq DESC LIMIT 1')
        return row[0] if row else time.time()

    def stop_waits(self) -> None:
        """From now on nobody waits for an event: the host is about to stop."""
        with self._lock:
            self._hurrying = True
            self._lock.notify_all()

    def command(self, cmd_id: str) -> Optional[Dict[str, Any]]:
        """What was asked for under that id."""
        row = self._row('SELECT target, multicast, request, submitted, client FROM commands '
                        'WHERE cmd_id = ?', cmd_id)
        return row and {'target': row[0], 'multicast': bool(row[1]), 'request': json.loads(row[2]),
                        'submitted': row[3], 'client': row[4]} or None

    def executions(self, where: str, *values: Any, limit: int = -1,
                   results: bool = True) -> List['Execution']:
        """The executions that a WHERE clause chooses, the newest last; their results on demand."""
        found = self.rows('SELECT cmd_id, vm_id, vm, multicast, cmd, state, submitted, ended, '
                          '%s, fetched FROM executions WHERE %s ORDER BY number DESC LIMIT ?'
                          % ('results' if results else "''", where), *(values + (limit,)))
        return [Execution(*row) for row in reversed(found)]

    def orphans(self, cmd_id: str) -> List['Execution']:
        """Results under that id which no command of this journal asked for."""
        found = self.rows('SELECT vm_id, results, received FROM orphans WHERE cmd_id = ?', cmd_id)
        return [Execution(cmd_id, vm_id, vm_id, len(found) > 1, '', json.loads(results)['state'],
                          received, received, results) for vm_id, results, received in found]

    def guests(self) -> List[Tuple]:
        """(id, name, ip, boot, session, facts, last_seen) of all that were ever seen, and kept."""
        return self.rows('SELECT id, name, ip, boot, session, facts, last_seen FROM guests')

    def forget_before(self, when: float) -> Tuple[int, bool]:
        """Deletes what ended before that time (seconds since 1970): a slice of it.

        How many executions, and whether that was all.
        """
        with self.writing() as transaction:
            run = transaction.execute
            old = run('SELECT number, cmd_id FROM executions WHERE ended > 0 AND ended < ? LIMIT ?',
                      when, RETENTION_SLICE).fetchall()
            for number, cmd_id in old:
                run('DELETE FROM executions WHERE number = ?', number)
                run('DELETE FROM commands WHERE cmd_id = ? AND NOT EXISTS '
                    '(SELECT * FROM executions WHERE cmd_id = ?)', cmd_id, cmd_id)
            # Events are in the order of their time, but for clocks that were put back.
            events = run('DELETE FROM events WHERE seq IN (SELECT seq FROM (SELECT seq, time FROM '
                         'events ORDER BY seq LIMIT ?) WHERE time < ?)', 4 * RETENTION_SLICE, when)
            run('DELETE FROM events WHERE seq <= (SELECT max(seq) FROM events) - ?', EVENTS_KEPT)
            run('DELETE FROM orphans WHERE received < ?', when)
            run('DELETE FROM guests WHERE last_seen < ? AND id NOT IN '
                '(SELECT vm_id FROM executions WHERE ended = 0)', when)
        return len(old), len(old) < RETENTION_SLICE and events.rowcount < 4 * RETENTION_SLICE


class Transaction:
    """What can be written within ``Journal.writing``."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.last_event = 0

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        """Runs one SQL statement."""
        return self._connection.execute(statement, values)

    def event(self, type: str, vm: str = '', cmd_id: str = '', text: str = '') -> None:
        """Adds a numbered event."""
        cursor = self.execute('INSERT INTO events (time, type, vm, cmd_id, text) '
                              'VALUES (?, ?, ?, ?, ?)', time.time(), type, vm, cmd_id, text[:2000])
        self.last_event = cursor.lastrowid or 0

    def add_execution(self, execution: 'Execution') -> None:
        """Adds one execution of a command."""
        self.execute('INSERT INTO executions (cmd_id, vm_id, vm, multicast, cmd, state, submitted) '
                     'VALUES (?, ?, ?, ?, ?, ?, ?)', execution.cmd_id, execution.vm_id,
                     execution.vm, int(execution.multicast), execution.cmd, execution.state,
                     execution.submitted)


# --- guests ----------------------------------------------------------------------------------

LOADS_KEPT = 120               # loads that are remembered of a guest, for the status page …
LOAD_EVERY = 5.0               # … and the seconds between two of them: ten minutes, or more
NOTE_EVERY = 1.0               # seconds between two notes of a guest in the journal
GUESTS_KEPT = 10000            # ids that may say HELLO


class Guest:
    """What is known of one agent. Times: ``heard`` is monotonic, ``last_seen`` since 1970."""

    def __init__(self, id: str, name: str) -> None:
        self.id = id
        self.name = name
        self.ip = ''
        self.boot = ''
        self.session = ''
        self.facts = {}                # type: Dict[str, Any]
        self.agent = 'lost'            # alive, late or lost
        self.heard = 0.0
        self.last_seen = 0.0
        self.clock_offset = 0.0
        self.noted = -1e9              # monotonic: when it was last journalled
        self.loaded = -1e9             # monotonic: when its load was last remembered
        self.loads = collections.deque(maxlen=LOADS_KEPT)  # type: collections.deque

    @property
    def chirp_port(self) -> int:
        """Where its Chirp server listens; 0: nowhere."""
        port = self.facts.get('chirp')
        port = port.get('port') if isinstance(port, dict) else port
        return port if isinstance(port, int) and 0 < port < 65536 else 0


class Guests:
    """The agents that said HELLO, and whether they are still there. Safe from any thread.

    Alive; ``late`` when nothing was heard for ``grace`` seconds; ``lost``, and off the list, after
    1.5 times that. The clock is the host's monotonic one, and comes in as an argument.
    """

    def __init__(self, grace: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace = grace
        self._clock = clock
        # Guards the two tables and what is in them; nothing outside this class is called while
        # it is held.
        self._lock = threading.Lock()
        self._known = {}               # type: Dict[str, Guest]

    def remember(self, id: str, name: str, ip: str, boot: str, session: str, facts: str,
                 last_seen: float) -> None:
        """A guest of an earlier run of the host: known, and lost until it says HELLO."""
        guest = Guest(id, name)
        guest.ip, guest.boot, guest.session, guest.last_seen = ip, boot, session, last_seen
        guest.facts = json.loads(facts)
        with self._lock:
            self._known[id] = guest

    def add(self, id: str, name: str, ip: str, boot: str, session: str,
            facts: Dict[str, Any], clock_offset: float) -> Tuple[Guest, bool]:
        """A HELLO: the guest, and whether it is news (a new agent, or one that was away)."""
        with self._lock:
            guest = self._known.get(id)
            if guest is None:
                self._make_room()
                guest = self._known[id] = Guest(id, name)
            news = guest.agent == 'lost' or guest.session != session
            guest.name = self._free_name(id, name)
            self._make_way(guest, lambda taken: taken.upper() == id.upper())    # an id comes before a name
            guest.ip, guest.boot, guest.session = ip, boot, session
            guest.facts, guest.clock_offset = facts, clock_offset
            self._touch(guest)
            return guest, news

    def _make_room(self) -> None:
        if len(self._known) < GUESTS_KEPT:
            return
        lost = [guest for guest in self._known.values() if guest.agent == 'lost']
        if not lost:
            raise Busy('%d agents are known already' % len(self._known))
        del self._known[min(lost, key=lambda guest: guest.last_seen).id]

    def _make_way(self, guest: Guest, is_in_its_way: Callable[[str], bool]) -> None:
        """Appends the id to the names of others that stand in a guest's way."""
        for other in self._known.values():
            if other is not guest and is_in_its_way(other.name):
                other.name = '%s-%s' % (other.name, other.id)

    def _free_name(self, id: str, name: str) -> str:
        """The name, with the id appended where another one on the list has it, or it is another's id."""
        for other in self._known.values():
            if other.id != id and (name.upper() == other.id.upper()
                                   or other.agent != 'lost' and name == other.name):
                return '%s-%s' % (name, id)
        return name

    def _touch(self, guest: Guest) -> None:
        guest.agent = 'alive'
        guest.heard = self._clock()
        guest.last_seen = time.time()

    def heard(self, id: str, load: Optional[Dict[str, float]] = None) -> bool:
        """Any word counts as a beacon. Whether the guest is on the list."""
        with self._lock:
            guest = self._known.get(id)
            if guest is None or guest.agent == 'lost':
                return False
            self._touch(guest)
            if load and guest.heard - guest.loaded >= LOAD_EVERY:
                guest.loaded = guest.heard
                guest.loads.append(dict(load, time=guest.last_seen))
            return True

    def loads_of(self, guest: Guest) -> List[Dict[str, float]]:
        """What its beacons told of the last minutes, each with its ``time`` since 1970."""
        with self._lock:
            return list(guest.loads)

    def rename(self, guest: Guest, name: str) -> None:
        """The hypervisor's name for a guest; another that calls itself so has its id appended."""
        with self._lock:
            self._make_way(guest, lambda taken: taken == name)
            guest.name = name

    def gone(self, id: str) -> Optional[Guest]:
        """A BYE: off the list."""
        with self._lock:
            guest = self._known.get(id)
            if guest is None or guest.agent == 'lost':
                return None
            guest.agent = 'lost'
            return guest

    def forgive(self) -> None:
        """Nobody was late: it was the host, or the broker, that slept."""
        with self._lock:
            for guest in self._known.values():
                if guest.agent != 'lost':
                    self._touch(guest)

    def tick(self, excused: Callable[[str], bool]) -> List[Tuple[Guest, str]]:
        """Those whose liveness changed, with what it is now.

        ``excused`` ones are not judged, and have the whole grace from the moment on when they no
        longer are.
        """
        suspects = self.on_list()
        excused_ids = {guest.id for guest in suspects if excused(guest.name)}
        changed = []
        with self._lock:
            for guest in suspects:
                silence = self._clock() - guest.heard
                if guest.id in excused_ids:
                    guest.heard = self._clock()
                elif silence > 1.5 * self._grace and guest.agent != 'lost':
                    guest.agent = 'lost'
                    changed.append((guest, 'lost'))
                elif silence > self._grace and guest.agent == 'alive':
                    guest.agent = 'late'
                    changed.append((guest, 'late'))
        return changed

    def find(self, vm: str) -> Optional[Guest]:
        """By id or name, in this order; one on the list comes before one that is lost."""
        wanted = vm.upper()
        with self._lock:
            found = [guest for guest in self._known.values()
                     if vm == guest.name or wanted == guest.id.upper()]
        return min(found, key=lambda guest: (guest.agent == 'lost', wanted != guest.id.upper()), default=None)

    def by_id(self, id: str) -> Optional[Guest]:
        """The guest of exactly that id."""
        with self._lock:
            return self._known.get(id)

    def on_list(self) -> List[Guest]:
        """All that are alive or late, by name."""
        with self._lock:
            return sorted((guest for guest in self._known.values() if guest.agent != 'lost'),
                          key=lambda guest: guest.name)

    def all(self) -> List[Guest]:
        """All that are known, lost ones too."""
        with self._lock:
            return list(self._known.values())


# --- commands --------------------------------------------------------------------------------

RETRY_DELAYS = (5, 10, 20, 40, 60)     # seconds between publications of a CMD_RUN; the last repeats
QUERY_TIMEOUT = 5.0                    # seconds a guest has to answer CMD_QUERY
ENDED = threading.Event()              # of all that had ended before: there may be a thousand in a list
ENDED.set()
SIGNALS_KEPT = 10                      # of a command that its guest hasn't answered yet
RECENT_KEPT = 100                      # executions that ended, and are remembered as they are …
RECENT_LARGEST = 16 * 1024             # … with no more than that of results, written as JSON


class Execution:
    """One command on one VM. What a thread reads of it may be a moment old, and is never torn."""

    __slots__ = ('cmd_id', 'vm_id', 'vm', 'multicast', 'cmd', 'state', 'submitted', 'ended',
                 'results', 'fetched', 'status', 'status_time', 'attempts', 'next_publish', 'signals', 'runs',
                 'done')

    def __init__(self, cmd_id: str, vm_id: str, vm: str, multicast: Any, cmd: str, state: str,
                 submitted: float, ended: float = 0, results: str = '', fetched: Any = 1) -> None:
        self.cmd_id = cmd_id
        self.vm_id = vm_id
        self.vm = vm
        self.multicast = bool(multicast)
        self.cmd = cmd
        self.state = state
        self.submitted = submitted
        self.ended = ended
        self.results = results
        self.fetched = bool(fetched)       # whether all output is here, or never will be
        self.status = {}                   # type: Dict[str, Any]
        self.status_time = 0.0             # monotonic
        self.attempts = 0
        self.next_publish = None           # type: Optional[float]
        self.signals = ()                  # type: Tuple[str, ...]   # sent before the guest answered
        self.runs = state == 'running'     # else it may still wait for its turn in the guest
        self.done = ENDED if ended else threading.Event()

    @property
    def key(self) -> str:
        """The cmd-id as XML-RPC knows it: of a multicast, ``cmdId@vmName``."""
        return '%s@%s' % (self.cmd_id, self.vm) if self.multicast else self.cmd_id

    @property
    def index(self) -> Tuple[str, str]:
        return self.cmd_id, self.vm_id

    def answer(self) -> Dict[str, Any]:
        """The results, as journalled; {} while unfinished."""
        return json.loads(self.results) if self.results else {}


def log_submitted(cmd_id: str, target: str, client: str) -> None:
    """Says who asked for a command: once it was sent, for the log is no part of the way."""
    log.info('%s: asked for on %s by %s', cmd_id, printable(target), client)


class _Reply:
    """A CMD_STATUS that somebody waits for."""

    def __init__(self, matches: Callable[[Message], bool]) -> None:
        self.matches = matches
        self.message = None            # type: Optional[Message]
        self.arrived = threading.Event()


class Commands:
    """What was asked for, and how far it is. Safe from any thread.

    The unfinished executions are in memory, everything is in the journal; a change is journalled
    before anybody hears of it.
    """

    def __init__(self, journal: Journal, clock: Callable[[], float] = time.monotonic) -> None:
        self._journal = journal
        self._clock = clock
        # Guards the tables below. The journal is called with the lock released.
        self._lock = threading.Lock()
        self._open = {}                # type: Dict[Tuple[str, str], Execution]
        self._by_key = {}              # type: Dict[str, Execution]
        self._replies = {}             # type: Dict[Tuple[str, str], List[_Reply]]
        self._unwritten = {}           # type: Dict[Tuple[str, str], Execution]
        # Of what ended last: its results are asked for next.
        self._recent = collections.OrderedDict()  # type: collections.OrderedDict[str, Execution]
        for execution in journal.executions('ended = 0'):
            self._keep(execution)
            if execution.state in ('queued', 'sent'):
                execution.next_publish = clock()       # an earlier host may have died before it was

    def _keep(self, execution: Execution) -> None:
        self._open[execution.index] = execution
        self._by_key[execution.key] = execution

    def new(self, request: Dict[str, Any], target: str, multicast: bool, guests: List[Guest],
            queued: bool, client: str) -> Tuple[str, List[Execution]]:
        """Journals a command before anything else is done with it. Raises JournalError."""
        cmd_id = time.strftime('%Y%m%d-%H%M%S-', time.gmtime()) + secrets.token_hex(4)
        submitted = time.time()
        state = 'queued' if queued else 'sent'
        executions = [Execution(cmd_id, guest.id, guest.name, multicast, request['cmd'], state,
                                submitted) for guest in guests]
        with self._journal.writing() as journal:
            journal.execute('INSERT INTO commands VALUES (?, ?, ?, ?, ?, ?)', cmd_id, target,
                            int(multicast), protocol.write_json(request), submitted, client)
            for execution in executions:
                journal.add_execution(execution)
            journal.event('cmd-submitted', target, cmd_id, 'by %s: %s' % (
                client, ' '.join([request['cmd']] + request['args'])))
        with self._lock:
            for execution in executions:
                self._keep(execution)
                if queued:
                    execution.next_publish = self._clock()     # as soon as its agent is there
        return cmd_id, executions

    def published(self, execution: Execution) -> None:
        """It was sent; when to send it again, should the guest not answer."""
        with self._lock:
            delay = RETRY_DELAYS[min(execution.attempts, len(RETRY_DELAYS) - 1)]
            execution.attempts += 1
            execution.next_publish = self._clock() + delay
            if execution.state == 'queued':
                execution.state = 'sent'
                self._unwritten[execution.index] = execution

    def due(self) -> List[Execution]:
        """What should be sent by now: for the first time, or again, since the guest didn't answer."""
        now = self._clock()
        with self._lock:
            return [execution for execution in self._open.values()
                    if execution.next_publish is not None and execution.next_publish <= now]

    def request(self, cmd_id: str) -> Dict[str, Any]:
        """What was asked for. Raises NoSuchCommand."""
        command = self._journal.command(cmd_id)
        if command is None:
            raise NoSuchCommand('no command %.100s' % cmd_id)
        return command

    def open_of(self, vm_id: str) -> List[Execution]:
        """The unfinished executions on that VM."""
        with self._lock:
            return [execution for execution in self._open.values() if execution.vm_id == vm_id]

    def waiting_for(self, vm: str) -> List[Execution]:
        """Those that were not sent yet to the VM of that name, whatever its id was when they came."""
        with self._lock:
            return [execution for execution in self._open.values()
                    if execution.vm == vm and execution.state == 'queued']

    def move(self, execution: Execution, vm_id: str) -> None:
        """Journals an execution under another id of its VM, unless it has ended. Raises JournalError."""
        before = execution.vm_id
        try:
            with self._journal.writing() as journal:       # ``finish`` waits, and takes the new id
                if not journal.execute('UPDATE OR IGNORE executions SET vm_id = ? WHERE cmd_id = ? '
                                       'AND vm_id = ? AND ended = 0', vm_id, *execution.index).rowcount:
                    return
                self._set_id(execution, vm_id)
        except JournalError:
            self._set_id(execution, before)
            raise
        log.info('%s: %s is %s now, it was %s', execution.key, execution.vm, vm_id, before)

    def _set_id(self, execution: Execution, vm_id: str) -> None:
        with self._lock:
            before, execution.vm_id = execution.index, vm_id
            for table in self._open, self._unwritten:
                if table.pop(before, None) is not None:
                    table[execution.index] = execution

    def is_open(self, execution: Execution) -> bool:
        """Whether it is unfinished."""
        with self._lock:
            return self._open.get(execution.index) is execution

    def find_open(self, cmd_id: str, vm_id: str) -> Optional[Execution]:
        """The unfinished execution of that command on that VM."""
        with self._lock:
            return self._open.get((cmd_id, vm_id))

    def find(self, key: str) -> List[Execution]:
        """One execution; of a multicast's own id, all of them. Raises NoSuchCommand."""
        with self._lock:
            execution = self._by_key.get(key) or self._recent.get(key)
        if execution is not None:
            return [execution]
        cmd_id, at, vm = key.partition('@')
        if at:
            found = self._journal.executions('cmd_id = ? AND vm = ? AND multicast = 1', cmd_id, vm) or [
                orphan for name in (cmd_id, key) for orphan in self._journal.orphans(name)
                if orphan.key == key]
        else:
            found = self._journal.executions('cmd_id = ?', cmd_id) or self._journal.orphans(cmd_id)
        if not found and not (self._journal.command(cmd_id) and not at):
            raise NoSuchCommand('no command %.100s' % key)
        return [self._now(execution) for execution in found]

    def _now(self, execution: Execution) -> Execution:
        """What was read from the journal, as it is now: the one object of it while it is unfinished.

        The journal knows an end a moment before the table does; it may come after the reading, too.
        """
        if execution.ended:
            return execution
        with self._lock:
            unfinished = self._open.get(execution.index)
        return unfinished or self.finished(*execution.index) or execution

    def find_one(self, key: str) -> Execution:
        """One execution. Raises NoSuchCommand, or InvalidParams for a multicast's own id."""
        executions = self.find(key)
        if len(executions) != 1 or executions[0].key != key:
            raise InvalidParams('%s ran on %d VMs; name one of them as %s@vmName'
                                % (key, len(executions), key))
        return executions[0]

    # What guests say.

    def heard_status(self, execution: Execution, state: str, message: Message) -> None:
        """A CMD_STATUS: remembered, and given to whoever waits for it."""
        with self._lock:
            if execution.index in self._open:
                # The results of what has ended come by themselves; unless an earlier state of this
                # journal was restored, and they were acknowledged before: then they are asked for.
                execution.next_publish = None if state not in FINISHED \
                    else self._clock() + RETRY_DELAYS[0]
                execution.status = dict(message.keys)
                execution.status_time = self._clock()
                if state in ('running', 'queued') and execution.state in ('sent', 'queued', 'running'):
                    if state == 'running' and not execution.runs:
                        execution.runs = True
                        self._unwritten[execution.index] = execution
                    execution.state = 'running'
        self._give_reply(execution.index, message)

    def _give_reply(self, index: Tuple[str, str], message: Message) -> None:
        with self._lock:
            replies = [reply for reply in self._replies.get(index, ()) if reply.matches(message)]
        for reply in replies:
            reply.message = message
            reply.arrived.set()

    def write_states(self) -> None:
        """Journals the states that changed since the last call; results don't wait for that."""
        with self._lock:
            changed, self._unwritten = self._unwritten, {}
        if not changed:
            return
        try:
            with self._journal.writing() as journal:
                for execution in changed.values():
                    state = 'sent' if execution.state == 'running' and not execution.runs else execution.state
                    if journal.execute('UPDATE executions SET state = ? WHERE cmd_id = ? AND vm_id = ? '
                                       'AND ended = 0', state, *execution.index).rowcount:
                        journal.event('cmd-' + state, execution.vm, execution.key)
                log.info('%s: %s', execution.key, state)
        except JournalError:
            with self._lock:
                changed.update(self._unwritten)
                self._unwritten = changed          # the next call tries again
            raise

    def ask(self, execution: Execution, matches: Callable[[Message], bool],
            say: Callable[[], None], timeout: float = QUERY_TIMEOUT) -> Optional[Message]:
        """Says something, and waits for the CMD_STATUS that matches; None when it is late."""
        with self._reply(execution, matches) as reply:
            say()
            reply.arrived.wait(timeout)
            return reply.message

    @contextlib.contextmanager
    def _reply(self, execution: Execution, matches: Callable[[Message], bool]) -> Iterator[_Reply]:
        reply, index = _Reply(matches), execution.index
        with self._lock:
            self._replies.setdefault(index, []).append(reply)
        try:
            yield reply
        finally:
            with self._lock:
                waiting = self._replies[index]
                waiting.remove(reply)
                if not waiting:
                    del self._replies[index]

    def ask_all(self, executions: List[Execution], say: Callable[[Execution], None], timeout: float) -> None:
        """Says something of each, and waits until all guests have answered by a CMD_STATUS, or it is late."""
        deadline = self._clock() + timeout
        with contextlib.ExitStack() as stack:
            replies = [stack.enter_context(self._reply(execution, lambda message: True))
                       for execution in executions]
            for execution in executions:
                say(execution)
            for reply in replies:
                reply.arrived.wait(max(0.0, deadline - self._clock()))

    def finish(self, execution: Execution, results: Dict[str, Any], fetched: bool) -> bool:
        """Journals the end of an execution, once, then wakes whoever waits. False: it had ended.

        It survives a loss of power from the journal's next ``sync`` on; the guest has it until CMD_ACK.
        """
        with self._lock:
            if self._open.get(execution.index) is not execution:
                return False
        ended, text = time.time(), protocol.write_json(results)
        with self._journal.writing(durable=False) as journal:
            changed = journal.execute(
                'UPDATE executions SET state = ?, ended = ?, results = ?, fetched = ? '
                'WHERE cmd_id = ? AND vm_id = ? AND ended = 0', results['state'], ended, text,
                int(fetched), *execution.index).rowcount
            if changed:
                journal.event('cmd-finished', execution.vm, execution.key, describe_end(results))
        if not changed:
            return False            # another thread was faster, and sets what follows
        with self._lock:
            execution.state, execution.ended, execution.results = results['state'], ended, text
            execution.fetched = fetched
            self._open.pop(execution.index, None)
            self._by_key.pop(execution.key, None)
            self._unwritten.pop(execution.index, None)
            if len(text) <= RECENT_LARGEST:
                self._recent[execution.key] = execution
                if len(self._recent) > RECENT_KEPT:
                    self._recent.popitem(last=False)
        execution.done.set()        # the log comes after it: somebody waits
        log.info('%s: on %s %s', execution.key, execution.vm, describe_end(results))
        return True

    def lose(self, execution: Execution, reason: str) -> None:
        """Ends an execution as lost."""
        self.finish(execution, lost_results(execution.cmd_id, reason), True)

    def finished(self, cmd_id: str, vm_id: str) -> Optional[Execution]:
        """The execution of that command on that VM, if it is in the journal and has ended."""
        found = self._journal.executions('cmd_id = ? AND vm_id = ? AND ended > 0', cmd_id, vm_id)
        return found[0] if found else None

    def fetched(self, execution: Execution) -> None:
        """All output is here that ever will be."""
        execution.fetched = True
        with self._journal.writing() as journal:
            journal.execute('UPDATE executions SET fetched = 1 WHERE cmd_id = ? AND vm_id = ?',
                            *execution.index)

    def keep_orphan(self, cmd_id: str, vm_id: str, vm: str, results: Dict[str, Any]) -> None:
        """Results of a command that this host never asked for: kept, and never asked about."""
        with self._journal.writing() as journal:
            journal.execute('INSERT OR REPLACE INTO orphans VALUES (?, ?, ?, ?)', cmd_id[:200],
                            vm_id, time.time(), protocol.write_json(results))
            journal.execute('DELETE FROM orphans WHERE rowid IN (SELECT rowid FROM orphans '
                            'ORDER BY received DESC LIMIT -1 OFFSET ?)', ORPHANS_KEPT)
            journal.event('orphan-result', vm, cmd_id[:200], describe_end(results))

    # What the API asks.

    def last_ended(self, limit: int) -> List[Execution]:
        """Those that ended last, the newest request last."""
        return self._journal.executions('number IN (SELECT number FROM executions WHERE ended > 0 '
                                        'ORDER BY ended DESC LIMIT ?)', limit)

    def list(self, filter: Dict[str, Any]) -> List[Execution]:
        """Executions, the newest ``limit`` (1000), by vm, state, cmdId and since."""
        columns = {'vm': 'vm = ?', 'state': 'state = ?', 'cmd': 'cmd = ?', 'cmdId': 'cmd_id = ?',
                   'since': 'number >= (SELECT number FROM executions WHERE submitted >= ? '
                            'ORDER BY submitted LIMIT 1)'}
        clauses, values = ['1'], []
        filter = read_filter(filter)
        for name, value in filter.items():
            if name == 'finished':
                # The +: by number, newest first, and not by an index that has to be sorted.
                clauses.append('+ended > 0' if value else 'ended = 0')
            elif name in columns:
                clauses.append(columns[name])
                values.append(value)
        found = self._journal.executions(' AND '.join(clauses), *values, results=False,
                                         limit=int(filter.get('limit', ROWS_AT_ONCE)))
        return [self._now(execution) for execution in found]

    def forget(self, executions: List[Execution]) -> None:
        """Deletes finished executions, and the command with its last one. Raises BadState."""
        for execution in executions:
            if not execution.ended:
                raise BadState('%s is %s; only a finished command can be forgotten'
                               % (execution.key, execution.state))
        with self._journal.writing() as journal:
            for execution in executions:
                journal.execute('DELETE FROM executions WHERE cmd_id = ? AND vm_id = ?',
                                *execution.index)
                journal.execute('DELETE FROM orphans WHERE cmd_id = ? AND vm_id = ?', *execution.index)
                journal.execute('DELETE FROM commands WHERE cmd_id = ? AND cmd_id NOT IN '
                                '(SELECT cmd_id FROM executions)', execution.cmd_id)
                journal.event('cmd-forgotten', execution.vm, execution.key)
                log.info('%s: forgotten', execution.key)
        self._forget_recent()

    def forget_before(self, when: float) -> Tuple[int, bool]:
        """The same for a slice of what ended before that time, as ``Journal.forget_before``."""
        count, all_gone = self._journal.forget_before(when)
        if count:
            self._forget_recent()
        return count, all_gone

    def _forget_recent(self) -> None:
        """From now on what has ended is looked up in the journal: something was deleted there."""
        with self._lock:
            self._recent.clear()

    def count(self) -> int:
        """How many are unfinished."""
        with self._lock:
            return len(self._open)


FILTERS = {'vm': str, 'state': str, 'cmd': str, 'cmdId': str, 'since': (int, float), 'finished': (bool, int),
           'limit': (int, float)}  # type: Dict[str, Any]


def read_filter(filter: Dict[str, Any]) -> Dict[str, Any]:
    """A filter of listCmds; a multicast's ``cmdId@vmName`` as both. Raises InvalidParams."""
    for name, value in filter.items():
        if name not in FILTERS:
            raise InvalidParams('listCmds: no filter %r; there are %s' % (name, ', '.join(FILTERS)))
        is_number = isinstance(value, (int, float))
        if not isinstance(value, FILTERS[name]) or is_number and not -1 <= value <= 2 ** 53:
            raise InvalidParams('listCmds: %s: %.40r' % (name, value))
    cmd_id, at, vm = filter.get('cmdId', '').partition('@')
    return dict(filter, cmdId=cmd_id, vm=vm) if at else filter


def lost_results(cmd_id: str, reason: str) -> Dict[str, Any]:
    """The results of a command of which nothing will ever be heard."""
    return {'cmd-id': cmd_id, 'out': '', 'err': '', 'finished': False, 'exitCodeOrSignal': -1,
            'resources': dict.fromkeys(protocol.RUSAGE_FIELDS, 0), 'state': 'lost',
            'error': reason, 'wall': 0, 'started': 0, 'ended': time.time(), 'out-size': 0,
            'err-size': 0, 'out-offset': 0, 'err-offset': 0, 'out-truncated': False,
            'err-truncated': False, 'spool': ''}


def describe_end(results: Dict[str, Any]) -> str:
    """How it ended, in three words."""
    state = results['state']
    if state in ('exited', 'signaled', 'timeout'):
        return '%s %s' % (state, results['exitCodeOrSignal'])
    return '%s: %s' % (state, results.get('error', ''))


def read_results(message: Message) -> Dict[str, Any]:
    """The results in a CMD_RESULTS, of the right types, and nothing else. Raises BadWord."""
    state = message.text('state', 'exited' if message.flag('finished') else 'signaled')
    if state not in FINISHED:
        raise protocol.BadWord('CMD_RESULTS: state %.40r' % state)
    resources = message.mapping('resources')
    results = {'cmd-id': message.text('cmd-id'), 'state': state,
               'finished': message.flag('finished'),
               'exitCodeOrSignal': int(message.number('exitCodeOrSignal', -1)),
               'resources': {name: Message('', 'CMD_RESULTS', None, resources).number(name)
                             for name in protocol.RUSAGE_FIELDS}}
    for name in ('out', 'err', 'error', 'spool'):
        results[name] = message.text(name)
    for name in ('wall', 'started', 'ended'):
        results[name] = message.number(name)
    for stream in ('out', 'err'):
        _read_stream(message, stream, results)
    return results


def _read_stream(message: Message, stream: str, results: Dict[str, Any]) -> None:
    """What CMD_RESULTS says of one stream."""
    exact = message.text(stream + '64')
    if exact:
        try:
            inline = base64.b64decode(exact, validate=True)
        except (ValueError, binascii.Error):
            raise protocol.BadWord('CMD_RESULTS: %s64 is no base64' % stream)
        results[stream + '64'] = exact
    else:
        inline = results[stream].encode('utf-8')
    offset = max(0, int(message.number(stream + '-offset')))
    results[stream + '-offset'] = offset
    results[stream + '-size'] = max(offset + len(inline), int(message.number(stream + '-size')))
    results[stream + '-truncated'] = message.flag(stream + '-truncated')


def has_more_output(results: Dict[str, Any]) -> bool:
    """Whether more was written than came with the results."""
    return bool(results['spool'] and (results['out-offset'] or results['err-offset']))


def inline_output(results: Dict[str, Any], stream: str) -> bytes:
    """The exact bytes of a stream that came with the results."""
    exact = results.get(stream + '64')
    return base64.b64decode(exact) if exact else results[stream].encode('utf-8')


# --- trust -----------------------------------------------------------------------------------

class _Role:
    """Who a connection to the embedded broker is."""

    def __init__(self, is_host: bool) -> None:
        self.is_host = is_host
        self.id = ''
        self.name = ''
        self.session = ''
        self.boot = ''


class HostPolicy(stompbroker.Policy):
    """Roles on the embedded broker: the host's own connection, by a secret; all others are guests.

    A guest may SEND to connections and cmd_responses alone, SUBSCRIBE to cmd_requests alone, is
    bound to the id of its first HELLO, and is sent only what is addressed to it. The header
    ``from`` of all that a guest sends is written here, so that the host can lean on it. Guests wait while
    the host has much to read: they would say it all again if its connection were cut off.
    """

    def __init__(self, secret: str, mac_of: Callable[[str], str]) -> None:
        self._secret = secret
        self._mac_of = mac_of
        # Guards the table of bound sessions; nothing is called while it is held.
        self._lock = threading.Lock()
        self._sessions = {}            # type: Dict[str, Any]

    def connecting(self, session: Any, headers: Dict[str, str]) -> None:
        secret = headers.get('vmhost-secret', '')
        session.policy_data = _Role(hmac.compare_digest(secret.encode(), self._secret.encode()))
        session.essential = session.policy_data.is_host

    def subscribing(self, session: Any, destination: str, headers: Dict[str, str]) -> None:
        if not session.policy_data.is_host and destination != protocol.CMD_REQUESTS:
            raise stompbroker.Refused('a guest may subscribe to %s alone' % protocol.CMD_REQUESTS)

    def sending(self, session: Any, destination: str, frame: Any) -> bool:
        role = session.policy_data
        if role.is_host:
            return True
        if destination not in (protocol.CONNECTIONS, protocol.CMD_RESPONSES):
            raise stompbroker.Refused('a guest may not send to %.100s' % destination)
        if not role.id and not self._bind(session, role, frame):
            return False
        for name in ('from', 'id'):
            if frame.headers.get(name, role.id).upper() != role.id.upper():
                raise stompbroker.Refused('this connection is bound to the id %s' % role.id)
        frame.headers['from'] = role.id
        return True

    def _bind(self, session: Any, role: _Role, frame: Any) -> bool:
        """Gives the connection the id of its HELLO. False: it said something else before."""
        try:
            message = protocol.interpret(frame.headers, frame.body.decode('utf-8', 'replace'))
            if message.word != 'HELLO':
                return False
            machine_id = read_id(message.text('id'))
            role.session, role.boot = message.text('session'), message.text('boot')
        except protocol.BadWord as error:
            raise stompbroker.Refused(str(error))
        self._check_neighbour(session, machine_id)
        self._take_id(session, role, machine_id)
        return True

    def _check_neighbour(self, session: Any, machine_id: str) -> None:
        mac = self._mac_of(session.peer[0])
        if mac and is_mac(machine_id) and mac.upper() != machine_id.upper():
            raise stompbroker.Refused('id %s, but the network card at %s is %s'
                                      % (machine_id, session.peer[0], mac))

    def _take_id(self, session: Any, role: _Role, machine_id: str) -> None:
        """Binds, unless another living agent has that id.

        A reconnect (same session), and a machine that was reset (same address, another boot), take
        the place of their old connection, which may not have noticed yet that it is dead. Over
        loopback the second waits until the old one's heart-beats are missed.
        """
        with self._lock:
            other = self._sessions.get(machine_id)
            if other is not None and other is not session:
                data = other.policy_data
                same = data.session == role.session
                # Over loopback all guests have one address (NAT): there an address proves nothing.
                reset = other.peer[0] == session.peer[0] and data.boot != role.boot \
                    and not session.peer[0].startswith(('127.', '::1'))
                if not same and not reset:
                    raise stompbroker.Refused('id %s is taken by an agent at %s'
                                              % (machine_id, other.peer[0]))
            role.id = machine_id
            self._sessions[machine_id] = session
        if other is not None and other is not session:
            other.close('its agent came back on another connection')

    def named(self, machine_id: str, name: str) -> None:
        """The host's name for a guest; what is addressed to it by name reaches it from now on."""
        with self._lock:
            session = self._sessions.get(machine_id)
        if session is not None:
            session.policy_data.name = name

    def address_of(self, machine_id: str) -> str:
        """The address that a guest's connection comes from; '' where it has none."""
        with self._lock:
            session = self._sessions.get(machine_id)
        return session.peer[0] if session is not None else ''

    def audience(self, destination: str, frame: Any) -> Callable[[Any], bool]:
        to = frame.headers.get('to', '')
        asks_all = to == '*' and frame.body.startswith(b'HELLO')
        is_glob, wanted = any(sign in to for sign in '*?['), to.upper()
        with self._lock:               # a name that is another's id reaches nobody
            is_id = to in self._sessions or wanted in self._sessions

        def is_sent_to(session: Any) -> bool:
            role = session.policy_data
            if role.is_host or not role.id:
                return role.is_host or asks_all
            if is_glob:
                return protocol.is_addressed(to, role.id, role.name)
            # The same for what most words have, an id: with 1,000 guests it is asked 1,000 times.
            return bool(to) and (role.id.upper() == wanted or role.name == to and not is_id)
        return is_sent_to

    def closed(self, session: Any) -> None:
        role = session.policy_data
        with self._lock:
            if role is not None and self._sessions.get(role.id) is session:
                del self._sessions[role.id]


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches who listens there."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address.lower() == 'localhost'


def is_mac(text: str) -> bool:
    """Whether it is a MAC address with colons."""
    parts = text.split(':')
    return len(parts) == 6 and all(len(part) == 2 and set(part) <= set('0123456789abcdefABCDEF')
                                   for part in parts)


def read_id(text: str) -> str:
    """A guest's id, MACs in upper case. Raises BadWord for what can't be one."""
    if not protocol.is_id(text):
        raise protocol.BadWord('HELLO: id %.80r' % text)
    return text.upper() if is_mac(text) else text


def read_name(text: str) -> str:
    """A name that a machine gives itself, as it may be shown: printable, at most 64 characters, no '@';
    and no MAC, which is another's id."""
    name = ''.join(char for char in text if char.isprintable() and char != '@').strip()[:64]
    return '' if is_mac(name) else name


def neighbour_mac(address: str) -> str:
    """The MAC that the kernel knows for an address on a directly attached network, else ''.

    On Linux, from /proc/net/arp; elsewhere nothing is known.
    """
    try:
        with open('/proc/net/arp') as table:
            for line in table.readlines()[1:]:
                fields = line.split()
                if fields[0] == address and fields[3] != '00:00:00:00:00:00':
                    return fields[3].upper()
    except OSError as error:
        log.debug('no neighbour table: %s', error)
    return ''


# --- VirtualBox ------------------------------------------------------------------------------

# `Driver` owns the manager and every COM object; all of it runs on one thread, and each verb is a
# job: a generator that yields whenever it has to wait. `Watch` turns what the driver saw into
# events.
#
# The driver lives in a process of its own. Seen with 7.2: VBoxSVC is also the hub of XPCOM's
# messages, so once it has died a client process never finds the next one, whatever it drops or
# creates anew. A fresh process does. So a process that lost VBoxSVC answers what it can, exits,
# and is started again. It also keeps a crash or a hang inside vboxapi away from broker and journal.
# Where `connect` is given, the driver runs in the thread `vbox` instead.

vbox_log = logging.getLogger('vmhost.virtualbox')

# Extra-data keys of VMs. The value is the VM's uuid: VirtualBox copies extra data into clones, which aren't
# ours.
MADE_BY_US = 'vmhost/made'         # createVM made it
MAKING = 'vmhost/making'           # still being made; left behind by a host that died meanwhile
KEEP = 'vmhost/keep'               # cleanup leaves it alone
# Global extra-data keys.
IMPORTING = 'vmhost/importing/'    # + name: the .vbox that an import will register
DISK_MADE = 'vmhost/disk'          # + path of a disk that createVM made: its uuid, or `unfinished` and when
DISK_UNFINISHED = 'unfinished '
UUID = re.compile(r'^{?[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}}?$')
CHIRP_RULE = 'vmhost-chirp'        # name of the NAT port forwarding
BANDWIDTH_GROUP = 'vmhost'
DESKTOP_SECURITY = {'tls': 'TLS', 'rdp': 'RDP', 'negotiate': 'Negotiate'}

OFF = ('PoweredOff', 'Aborted', 'Teleported')
SAVED = ('Saved', 'AbortedSaved')
ONLINE = ('Running', 'Paused', 'Stuck')
ACCEPTABLE = {                     # the states in which a verb makes sense
    'start': OFF + SAVED,
    'shutdown': ('Running',),
    'reset': ('Running',),
    'power_off': ONLINE,
    'pause': ('Running',),
    'resume': ('Paused',),
    'save_state': ('Running', 'Paused'),
    'discard_state': SAVED,
    'take_snapshot': OFF + SAVED + ('Running', 'Paused'),
    'delete_snapshot': OFF + SAVED + ('Running', 'Paused'),
    'restore_snapshot': OFF + SAVED,
    'remove_vm': OFF + SAVED,
    'set_limits': OFF + ('Running',),
    'screenshot': ('Running', 'Paused'),
}
CHANGING = frozenset((             # verbs that are never begun twice; all others only look
    'create_vm', 'remove_vm', 'start', 'shutdown', 'reset', 'power_off', 'pause', 'resume',
    'save_state', 'discard_state', 'take_snapshot', 'restore_snapshot', 'delete_snapshot',
    'set_limits', 'remote_desktop', 'setup_network', 'cleanup'))
LOOKING = frozenset((
    'version', 'machine_states', 'machines', 'describe', 'state', 'list_snapshots', 'snapshots',
    'get_stats', 'get_log', 'screenshot', 'get_network', 'chirp_endpoint', 'check'))

# Status codes of the API (VirtualBox.xidl, "Result codes"; the last ones are COM's own).
OBJECT_NOT_FOUND = 0x80bb0001
INVALID_VM_STATE = 0x80bb0002
NOT_SUPPORTED = 0x80bb0009
INVALID_OBJECT_STATE = 0x80bb0007
INVALID_SESSION_STATE = 0x80bb000b
OBJECT_IN_USE = 0x80bb000c
ACCESS_DENIED = 0x80070005
NOT_IMPLEMENTED = 0x80004001
FAULT_OF_CODE = {
    INVALID_VM_STATE: BadState,
    NOT_SUPPORTED: NotSupported,
    NOT_IMPLEMENTED: NotSupported,
    INVALID_OBJECT_STATE: BadState,
    INVALID_SESSION_STATE: Busy,
    OBJECT_IN_USE: Busy,
    ACCESS_DENIED: AccessDenied,
}
DEAD = (0x80004004, 0x800706be, 0x800706ba, 0x80010108)   # abort, call failed, RPC down, gone

NO_DRIVER = ('VERR_VM_DRIVER', 'rc=-1908', 'VERR_SUPDRV', 'vboxdrv')
MEND_DRIVER = ('the kernel module vboxdrv is not loaded: install the kernel headers, then run '
               '/sbin/vboxconfig (Debian: dpkg-reconfigure virtualbox-dkms), and with Secure Boot '
               'enrol its key')
OLDEST = (6, 1)                    # of VirtualBox, whose API this code speaks
STALL = 600                        # seconds without any progress after which a job is given up
NOT_READY = 2                      # seconds that VirtualBox may take to make an object, or to end it
SILENCE = 20                       # seconds that the driver may be silent about a call
LARGEST = 2 ** 31 - 1              # of the numbers that options hold
PRINTED_KEPT = 1024 * 1024         # bytes of virtualbox.log, beyond which the next process begins anew
Steps = Generator[float, None, Any]    # a verb under way: yields how many seconds it waits


class ConnectionLost(Exception):
    """VBoxSVC died, or was never there. Stays inside the driver."""


class VirtualBox:
    """The hypervisor, for the rest of the host.

    Every method may be called from any thread, waits, and gives plain values. Errors are
    VMHostErrors: NoSuchVM, BadState, Busy (somebody else holds the VM's lock), DeadlineExceeded,
    NotSupported, AlreadyExists, or HypervisorError with VirtualBox's own text and code; InvalidParams
    where an argument makes no sense. A `vm` is a name, an id (MAC) or a uuid.

    `network` and `remote_desktop` have the attributes of the sections [Network] and
    [RemoteDesktop]. `command_timeout` is in seconds, and bounds each call but those whose length
    depends on the size of a disk or a memory: these report their progress. What VirtualBox prints is
    kept in `state_dir`, or nowhere where that is ''. `on_event(type, vm, text)` is called on the thread
    `vbox-events`. `connect` makes a VirtualBoxManager.
    """

    def __init__(self, network: Any, remote_desktop: Any, chirp_port: int, state_dir: str,
                 command_timeout: float = 45,
                 on_event: Callable[[str, str, str], None] = lambda type, vm, text: None,
                 connect: Optional[Callable[[], Any]] = None) -> None:
        self._settings = {
            'network': dict(vars(network)), 'remote_desktop': dict(vars(remote_desktop)),
            'chirp_port': chirp_port, 'state_dir': state_dir,
            'command_timeout': command_timeout}  # type: Dict[str, Any]
        self._mode = network.mode
        self._on_event = on_event
        self._connect = connect
        self._command_timeout = command_timeout
        # Guards the calls under way, their numbers and the inbox. Held for moments, never while
        # anything outside this class is called, nor while writing to the process.
        self._lock = threading.Lock()
        # Keeps two requests from mixing on the pipe. Held while writing to it.
        self._writing = threading.Lock()
        self._calls = collections.OrderedDict()  # type: Dict[int, Call]
        self._last_id = 0
        self._inbox = queue.Queue()  # type: queue.Queue
        self._events = queue.Queue()  # type: queue.Queue
        self._child = None  # type: Optional[subprocess.Popen]
        self._wanted = threading.Event()         # somebody calls: start the process now
        self._closing = False
        self._watch = Watch(self._happened)
        self._threads = []  # type: List[threading.Thread]

    # life of the thread

    def start_thread(self) -> None:
        """Start the threads `vbox` and `vbox-events`. Gives no error: the first call does."""
        main = self._run_here if self._connect else self._run_process
        for name, target in (('vbox', main), ('vbox-events', self._tell_events)):
            thread = threading.Thread(target=target, name=name)
            thread.daemon = True
            thread.start()
            self._threads.append(thread)

    def close(self, timeout: float = 10) -> bool:
        """End the threads; VMs go on. Whoever still waits gets an error. True when all ended."""
        self._closing = True
        self._wanted.set()
        self._inbox.put(None)
        deadline = time.monotonic() + timeout
        self._hang_up()
        self._end_process(timeout)
        for thread in self._threads:
            if thread.name == 'vbox-events':
                self._events.put(None)
            thread.join(max(0.1, deadline - time.monotonic()))
            if thread.is_alive():
                vbox_log.warning('the thread %s did not end in time', thread.name)
        self._fail_all('the host agent is stopping')
        return not any(thread.is_alive() for thread in self._threads)

    # what there is

    def version(self) -> str:
        """VirtualBox's version, such as 7.2.4."""
        return self._call('version')

    def machine_states(self) -> Dict[str, int]:
        """{name of a MachineState: its code in this VirtualBox}."""
        return self._call('machine_states')

    def list_vms(self) -> List[str]:
        """Names of all VMs that VirtualBox knows, sorted."""
        return sorted(row['name'] for row in self._machines())

    def list_running(self) -> List[str]:
        """Names of the VMs that have a process: running, paused or on their way."""
        return sorted(row['name'] for row in self._machines() if row['online'])

    def vms_with_state(self) -> Dict[str, str]:
        """{name: MachineState name}."""
        return {row['name']: row['state'] for row in self._machines()}

    def names_to_ids(self) -> Dict[str, str]:
        """{name: MAC}, of those VMs that have a card. Read from VirtualBox now."""
        return {row['name']: row['id'] for row in self._machines() if row['id']}

    def name_of(self, mac: str) -> str:
        """The name of the VM with this MAC, '' when there is none. An unknown one is looked up."""
        return self._watch.name_of(mac) or {
            row['id']: row['name'] for row in self._machines()}.get(mac.upper(), '')

    def known_name(self, mac: str) -> str:
        """Like name_of, but asks nobody: what was seen a second ago."""
        return self._watch.name_of(mac)

    def known_state(self, vm: str) -> str:
        """Like state, but asks nobody; '' for a VM that was not seen."""
        return self._watch.state_of(vm)

    def known_vms(self) -> List[Tuple[str, str, str]]:
        """(name, MachineState name, id) of all VMs, as they were seen a second ago; asks nobody."""
        return self._watch.rows()

    def broker_address(self) -> str:
        """This machine's address on the host-only network, '' while it has none."""
        wanted = self._settings['network']['host_ip']
        if self._mode == 'nat':
            return ''
        return wanted if is_local(wanted) else ''

    def describe(self, vm: str) -> Dict[str, Any]:
        """{name, id, uuid, state, memory, cpus, ostype, snapshot, tagged, rdp{…}}."""
        return self._call('describe', vm)

    def state(self, vm: str) -> str:
        """The MachineState name."""
        return self._call('state', vm)

    def under_way(self) -> List[Dict[str, Any]]:
        """Long jobs now: [{verb, vm, percent, text}]. Asks nobody."""
        with self._lock:
            calls = [call for call in self._calls.values() if call.text]
        return [{'verb': call.verb, 'vm': call.vm, 'percent': call.percent, 'text': call.text}
                for call in calls]

    # life of a VM

    def create_vm(self, name: str, image: str = '', options: Optional[Dict[str, Any]] = None,
                  progress: Optional[Callable[[int, str], None]] = None) -> str:
        """Make a VM, and give its name. Never touches the image.

        `image`: .ova or .ovf (imported), a disk such as .vdi or .vmdk (copied into the VM's
        folder), .iso (in the drive, with an empty disk beside it), or ''. A sole argument that
        ends in .vbox registers that machine. Options: memory (MB), cpus, ostype, network
        (hostonly, nat, none), diskSize (MB), keep (cleanup leaves it alone).
        """
        return self._call('create_vm', name, image, options or {}, progress=progress)

    def remove_vm(self, vm: str, delete_disks: bool = False) -> bool:
        """Unregister a VM that is off or saved; with delete_disks all its files go, too."""
        return self._call('remove_vm', vm, bool(delete_disks))

    def start(self, vm: str, gui_mode: bool = False) -> bool:
        """Start, or go on from the saved state. True once it runs."""
        return self._call('start', vm, bool(gui_mode))

    def shutdown(self, vm: str) -> bool:
        """Press the ACPI power button. True once it is off; DeadlineExceeded if the guest
        takes no notice."""
        return self._call('shutdown', vm)

    def reset(self, vm: str) -> bool:
        """Press the reset button."""
        return self._call('reset', vm)

    def power_off(self, vm: str) -> bool:
        """Pull the plug. True once it is off."""
        return self._call('power_off', vm)

    def pause(self, vm: str) -> bool:
        return self._call('pause', vm)

    def resume(self, vm: str) -> bool:
        return self._call('resume', vm)

    def save_state(self, vm: str) -> bool:
        """Write the memory to disk and stop. True once it is Saved."""
        return self._call('save_state', vm)

    def discard_state(self, vm: str) -> bool:
        """Forget the saved state: the VM is then PoweredOff."""
        return self._call('discard_state', vm)

    # snapshots

    def take_snapshot(self, vm: str, name: str, desc: str = '') -> bool:
        """Take one, live too. AlreadyExists when the VM has one of this name."""
        return self._call('take_snapshot', vm, name, desc)

    def restore_snapshot(self, vm: str, name: str = '') -> bool:
        """Go back to the snapshot, or to the current one. The VM must be off or saved."""
        return self._call('restore_snapshot', vm, name)

    def delete_snapshot(self, vm: str, name: str) -> bool:
        return self._call('delete_snapshot', vm, name)

    def list_snapshots(self, vm: str) -> List[str]:
        """Names, each parent before its children."""
        return [row['name'] for row in self.snapshots(vm)]

    def snapshots(self, vm: str) -> List[Dict[str, Any]]:
        """[{name, id, parent, depth, desc, taken (seconds since 1970), online, current}]."""
        return self._call('snapshots', vm)

    # looking in, and limits

    def get_stats(self, vm: str, key: str = '*') -> List[Dict[str, Any]]:
        """[{name, values, unit}] of the metrics that match; the last seconds, oldest first."""
        return self._call('get_stats', vm, key)

    def get_log(self, vm: str, tail: int = 65536) -> str:
        """The last `tail` bytes of VBox.log, as text."""
        return self._call('get_log', vm, int(tail))

    def screenshot(self, vm: str) -> bytes:
        """PNG."""
        return base64.b64decode(self._call('screenshot', vm))

    def set_limits(self, vm: str, limits: Dict[str, Any]) -> bool:
        """cpuPercent 1 to 100; netKBps, 0 for none; network: False, no or off unplugs the cable."""
        return self._call('set_limits', vm, dict(limits))

    def remote_desktop(self, vm: str, enable: bool = True,
                       options: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
        """Switch it, and give {enabled, address, port, auth, security}. Options: address, port,
        auth (external, guest, null), security (TLS, RDP, Negotiate)."""
        return self._call('remote_desktop', vm, bool(enable), options or {})

    # network, and the whole

    def get_network(self) -> Dict[str, Any]:
        """{mode, interface, hostIp, netmask, dhcp{server, lower, upper, enabled}}, as they are."""
        return self._call('get_network')

    def setup_network(self) -> Dict[str, Any]:
        """Make the host-only interface, its address and DHCP pool where they differ."""
        return self._call('setup_network')

    def chirp_endpoint(self, vm: str) -> Optional[Tuple[str, int]]:
        """(host, port) by which the guest's Chirp port is reached in NAT mode, else None."""
        if self._mode != 'nat':
            return None
        host, port = self._call('chirp_endpoint', vm)
        return host, port

    def cleanup(self, dry_run: bool = True) -> List[Dict[str, str]]:
        """[{kind: vm|disk, name, why}] of what create_vm made and nobody uses; removes it."""
        return self._call('cleanup', bool(dry_run))

    def check(self) -> List[Tuple[bool, str, str]]:
        """[(all right?, what, how to mend)]. Works without VirtualBox, too."""
        return [(bool(ok), what, mend) for ok, what, mend in self._call('check')]

    # calls and answers

    def _machines(self) -> List[Dict[str, Any]]:
        return self._call('machines')

    def _call(self, verb: str, *args: Any,
              progress: Optional[Callable[[int, str], None]] = None) -> Any:
        call = Call(verb, args, progress)
        with self._lock:
            if self._closing or not self._threads:
                raise HypervisorError('VirtualBox is not connected: the host agent is stopping')
            self._last_id += 1
            call.id = self._last_id
            self._calls[call.id] = call
        try:
            self._send(call)
            return self._answer(call)
        finally:
            with self._lock:
                self._calls.pop(call.id, None)

    def _answer(self, call: 'Call') -> Any:
        patience = self._command_timeout + SILENCE
        while not call.done.wait(1):
            child = call.sent_to        # read before the clock: it may be handed on meanwhile
            if time.monotonic() - call.heard > patience:
                self._give_up_on_process(child)
                raise DeadlineExceeded('VirtualBox did not answer %s for %d s'
                                       % (call.verb, patience))
        if call.error:
            raise call.error
        return call.value

    def _send(self, call: 'Call') -> None:
        if self._connect:
            self._inbox.put(call.message())
            return
        self._wanted.set()
        with self._lock:
            child = self._child
            if child is None or call.sent_to is child:
                return
            call.hand_to(child)
        self._write(child, call.message())

    def _write(self, child: Any, message: Dict[str, Any]) -> None:
        with self._writing:
            try:
                child.stdin.write(json.dumps(message).encode() + b'\n')
                child.stdin.flush()
            except (OSError, ValueError) as error:      # it ended: its successor is told instead
                vbox_log.debug('the VirtualBox process does not listen: %s', error)

    def _heard(self, message: Dict[str, Any]) -> None:
        if 'seen' in message:
            self._watch.look(message['seen'])
            return
        with self._lock:
            call = self._calls.get(message['id'])
        if call is None:
            return
        call.heard = time.monotonic()
        if 'begun' in message:
            call.begun = True
        elif 'percent' in message:
            self._progressed(call, message['percent'], message['text'])
        elif 'error' in message:
            call.fail(error_from(message['error']))
        elif 'again' in message:
            call.begun, call.why = False, message['again']
        else:
            call.succeed(message['value'])

    def _progressed(self, call: 'Call', percent: int, text: str) -> None:
        tenth = percent // 10
        news = text and (tenth != call.percent // 10 or not call.text)
        call.percent, call.text = percent, text
        if not text:
            return
        if call.progress:
            self._events.put(lambda: call.progress(percent, text))
        if news:
            self._happened('vm-progress', call.vm, '%s: %d%%, %s' % (call.verb, percent, text))

    def _fail_all(self, why: str, only_begun: bool = False) -> None:
        with self._lock:
            calls = [call for call in self._calls.values() if call.begun or not only_begun]
        for call in calls:
            call.fail(HypervisorError(why))

    # events

    def _happened(self, type: str, vm: str, text: str) -> None:
        self._events.put(lambda: self._on_event(type, vm, text))

    def _tell_events(self) -> None:
        while True:
            event = self._events.get()
            if event is None:
                return
            try:
                event()
            except Exception:
                vbox_log.exception('an event could not be delivered')

    # the driver in this thread

    def _run_here(self) -> None:
        assert self._connect is not None
        Driver(self._settings, self._connect, self._inbox, self._heard).run()

    # the driver in a process

    def _run_process(self) -> None:
        delay = 0.0
        while not self._closing:
            started = time.monotonic()
            self._wanted.clear()
            try:
                self._live_with(self._start_process())
            except OSError as error:
                self._fail_all('the VirtualBox process could not be started: %s' % error)
            lived = time.monotonic() - started
            delay = 0.0 if lived > 10 else min(max(0.2, 2 * delay), 30)
            if not self._closing and not self._has_calls():
                self._wanted.wait(delay)

    def _has_calls(self) -> bool:
        with self._lock:
            return bool(self._calls)

    def _live_with(self, child: Any) -> None:
        with self._lock:
            self._child = child
            calls = [call for call in self._calls.values()
                     if call.sent_to is not child and not call.done.is_set()]
            for call in calls:
                call.hand_to(child)
        for call in calls:
            self._hand_over(child, call)
        if self._closing:               # while it was being started
            self._hang_up()
        for line in child.stdout:
            message = read_message(line)
            if message is None:
                child.kill()
                break
            self._heard(message)
        with self._lock:
            self._child = None
        with self._writing:
            close_quietly(child.stdin)
        child.stdout.close()
        code = child.wait()
        if not self._closing:
            vbox_log.info('the VirtualBox process ended (%s)', code)
        self._fail_all('VirtualBox (VBoxSVC) died meanwhile; look what state the VM is in',
                       only_begun=True)

    def _hand_over(self, child: subprocess.Popen, call: 'Call') -> None:
        call.tries += 1
        if call.tries > 3:
            call.fail(HypervisorError(call.why or 'VirtualBox died %d times during %s'
                                      % (call.tries - 1, call.verb)))
        else:
            self._write(child, call.message())

    def _start_process(self) -> subprocess.Popen:
        here = os.path.abspath(__file__)
        code = ('import sys; sys.path.insert(0, sys.argv[1]); import %s as host; '
                'host.drive_virtualbox(sys.argv[2])'
                % os.path.splitext(os.path.basename(here))[0])
        with self._open_stderr() as stderr:
            return subprocess.Popen(
                [sys.executable, '-c', code, os.path.dirname(here), json.dumps(self._settings)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr)

    def _open_stderr(self) -> Any:
        """vboxapi prints its troubles; they are kept for who looks for a reason, and each process adds to
        what those before it left."""
        folder = self._settings['state_dir']
        if not folder or not os.path.isdir(folder):
            return open(os.devnull, 'wb')
        path = os.path.join(folder, 'virtualbox.log')
        full = os.path.exists(path) and os.path.getsize(path) > PRINTED_KEPT
        return open(path, 'wb' if full else 'ab')

    def _hang_up(self) -> None:
        with self._lock:
            child = self._child
        if child and self._writing.acquire(timeout=1):      # whoever writes to one that hangs, has it
            try:
                close_quietly(child.stdin)
            finally:
                self._writing.release()

    def _end_process(self, timeout: float) -> None:
        """Which ends by itself when nobody speaks to it any more, unless it hangs inside VirtualBox."""
        for way, patience in (('terminate', 0.7 * timeout), ('kill', 0.1 * timeout)):
            for thread in self._threads[:1]:        # ends with its process
                thread.join(patience)
            with self._lock:
                child = self._child
            if child is None:
                return
            vbox_log.warning('the VirtualBox process hangs: %s', way)
            getattr(child, way)()

    def _give_up_on_process(self, child: Any) -> None:
        """It hangs inside a call of VirtualBox: only a new process helps, unless there is one already."""
        with self._lock:
            present = self._child
        if present is not None and child is present:
            vbox_log.warning('the VirtualBox process hangs: starting another one')
            present.kill()


class Call:
    """One call that waits for its answer. `heard` is when the driver last said something of it."""

    def __init__(self, verb: str, args: tuple,
                 progress: Optional[Callable[[int, str], None]]) -> None:
        self.id = 0
        self.verb = verb
        self.args = args
        self.progress = progress
        self.vm = args[0] if args and isinstance(args[0], str) else ''
        self.sent_to = None  # type: Any        # the process that was told, guarded by the lock
        self.tries = 0
        self.why = ''                           # why the driver could not yet
        self.begun = False
        self.percent = 0
        self.text = ''
        self.heard = time.monotonic()
        self.done = threading.Event()
        self.value = None  # type: Any
        self.error = None  # type: Optional[Exception]

    def hand_to(self, child: Any) -> None:
        """A process that is told only now hasn't been silent for long."""
        self.heard = time.monotonic()
        self.sent_to = child

    def message(self) -> Dict[str, Any]:
        return {'id': self.id, 'verb': self.verb, 'args': self.args}

    def succeed(self, value: Any) -> None:
        self.value = value
        self.done.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done.set()


class Watch:
    """Compares what the driver saw with what it saw before, and tells the difference.

    The memory is here and not in the driver, so that a VM that died together with VBoxSVC is
    noticed by the driver's successor. `look` runs on one thread, `name_of` on any.
    """

    def __init__(self, happened: Callable[[str, str, str], None]) -> None:
        self._happened = happened
        # Replaced as a whole, never changed: so any thread may read them.
        self._seen = None  # type: Optional[Dict[str, List[str]]]
        self._names = {}  # type: Dict[str, str]
        self._states = {}  # type: Dict[str, str]

    def name_of(self, mac: str) -> str:
        return self._names.get(mac.upper(), '')

    def state_of(self, vm: str) -> str:
        return self._states.get(vm, '')

    def rows(self) -> List[Tuple[str, str, str]]:
        return [(row[0], row[1], row[2]) for row in (self._seen or {}).values()]

    def look(self, seen: Dict[str, List[str]]) -> None:
        """`seen`: {uuid: [name, state, id]}. The first look tells nothing."""
        before, self._seen = self._seen, seen
        self._names = {mac: name for name, state, mac in seen.values() if mac}
        self._states = {key: row[1] for uuid, row in seen.items()
                        for key in (uuid, row[2], row[0])}
        if before is None:
            return
        for uuid in before:
            if uuid not in seen:
                self._happened('vm-removed', before[uuid][0], '')
        for uuid, row in seen.items():
            if uuid not in before:
                self._happened('vm-added', row[0], row[1])
            elif row != before[uuid]:
                self._tell_change(before[uuid], row)

    def _tell_change(self, before: List[str], now: List[str]) -> None:
        name, state, mac = now
        if name != before[0]:
            self._happened('vm-renamed', name, 'was ' + before[0])
        if mac != before[2]:
            self._happened('vm-card', name, '%s, was %s' % (mac or 'none', before[2] or 'none'))
        if state != before[1]:
            self._happened('vm-state', name, state)
            if state in ('Aborted', 'AbortedSaved'):
                self._happened('vm-aborted', name, 'its process died; it was ' + before[1])
            elif state == 'Stuck':
                self._happened('vm-stuck', name, 'the guest stopped with an error')


def read_message(line: bytes) -> Any:
    """What the driver's process said; None for half a line, the last one of a process that died."""
    try:
        return json.loads(line.decode())
    except ValueError:
        vbox_log.warning('the VirtualBox process broke off in the middle of a line: %.80r', line)
        return None


def close_quietly(stream: Any) -> None:
    try:
        stream.close()
    except OSError as error:            # unsent bytes for a process that has gone
        vbox_log.debug('closing: %s', error)


def error_from(parts: List[str]) -> Exception:
    """The error that the driver's process reported as [class, text]."""
    known = {kind.__name__: kind for kind in (
        NoSuchVM, BadState, HypervisorError, DeadlineExceeded, AlreadyExists, NotSupported, Busy,
        AccessDenied, InvalidParams)}
    return known.get(parts[0], HypervisorError)(parts[1])


def drive_virtualbox(settings: str) -> None:
    """Main of the driver's process: requests on stdin, answers on stdout, a JSON object a line.

    VirtualBox starts processes that inherit descriptors 0 to 2 and outlive us, and vboxapi prints:
    so both ends of the conversation are moved out of their way.
    """
    if hasattr(signal, 'SIGINT'):
        signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is for the host agent
    requests, answers = os.fdopen(os.dup(0), 'rb'), os.fdopen(os.dup(1), 'wb')
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    inbox = queue.Queue()  # type: queue.Queue

    def read() -> None:
        for line in requests:
            inbox.put(json.loads(line.decode()))
        inbox.put(None)

    def tell(message: Dict[str, Any]) -> None:
        answers.write(json.dumps(message).encode() + b'\n')
        answers.flush()

    threading.Thread(target=read, name='requests', daemon=True).start()
    code = 0
    try:
        Driver(json.loads(settings), import_virtualbox, inbox, tell, in_process=True).run()
    except ConnectionLost:
        code = 3
    except BrokenPipeError:
        code = 1
    os._exit(code)                      # COM's own end can take half a minute after a loss


def import_virtualbox() -> Any:
    """A VirtualBoxManager from vboxapi, or HypervisorError that says what is missing."""
    try:
        import vboxapi
    except ImportError as error:
        raise HypervisorError(
            'vboxapi is not installed for Python %s (%s): %s. It comes with VirtualBox: on Debian '
            'the package virtualbox, elsewhere `python -m pip install .` in the folder '
            'sdk/installer/python of VirtualBox, or its SDK'
            % (platform.python_version(), sys.executable, error))
    except Exception as error:
        raise HypervisorError('vboxapi can not be imported: %s: %s'
                              % (type(error).__name__, error))
    try:
        return vboxapi.VirtualBoxManager()
    except Exception as error:
        raise HypervisorError('vboxapi does not work with this Python %s: %s: %s'
                              % (platform.python_version(), type(error).__name__, error))


class Job:
    """One verb being carried out: a generator that is resumed at `due`."""

    def __init__(self, message: Dict[str, Any], timeout: float,
                 tell: Callable[[Dict[str, Any]], None]) -> None:
        self.id = message['id']
        self.verb = message['verb']
        self.args = message['args']
        self.steps = None  # type: Optional[Steps]
        self.due = 0.0
        self.tries = 0
        self.begun = time.monotonic()
        self.deadline = self.begun + timeout
        self._timeout = timeout
        self._tell = tell
        self._told = 0.0
        self._last = (-1, '')

    def check_deadline(self, error: Exception) -> None:
        if time.monotonic() > self.deadline:
            raise error

    def renew_deadline(self) -> None:
        """Something long is done, which has a limit of its own; what comes after it has not begun late.

        Whoever waits hears of it, lest the driver be silent for longer than he has patience.
        """
        self.deadline = time.monotonic() + self._timeout
        self._tell({'id': self.id, 'percent': 100, 'text': ''})

    def break_off(self) -> None:
        """What it cleans up then may fail, and hinders nothing else."""
        try:
            if self.steps is not None:
                self.steps.close()
        except Exception as error:
            vbox_log.warning('breaking off %s: %s', self.verb, error)

    def report(self, percent: int, text: str) -> None:
        """Progress; told at once when it changed, else now and then as a sign of life."""
        now = time.monotonic()
        if (percent, text) != self._last and now - self._told > 0.2 or now - self._told > 2:
            self._last, self._told = (percent, text), now
            self._tell({'id': self.id, 'percent': percent, 'text': text})


class Driver:
    """Owns the manager and every COM object. All of it runs on the thread that calls `run`."""

    def __init__(self, settings: Dict[str, Any], connect: Callable[[], Any], inbox: queue.Queue,
                 tell: Callable[[Dict[str, Any]], None], in_process: bool = False) -> None:
        self.network = settings['network']
        self.desktop = settings['remote_desktop']
        self.chirp_port = settings['chirp_port']
        self.timeout = settings['command_timeout']
        self._connect = connect
        self._inbox = inbox
        self._tell = tell
        self._in_process = in_process
        self._jobs = []  # type: List[Job]
        self._owners = {}  # type: Dict[str, Job]       # uuid: the job that changes this VM
        self._measured = set()  # type: set             # uuids whose metrics are collected
        self._told = None  # type: Any
        self._next_look = 0.0
        self.manager = None  # type: Any
        self.vbox = None  # type: Any
        self.states = {}  # type: Dict[int, str]

    # the loop

    def run(self) -> None:
        """Carry out requests until None comes."""
        while self._take_requests():
            self._resume_jobs()
            self._pump_events()
            if time.monotonic() >= self._next_look:
                self._look()
        for job in self._jobs:
            job.break_off()
        self._jobs = []
        self._disconnect()

    def _take_requests(self) -> bool:
        message = self._wait_for_request()
        while message is not False:
            if message is None:
                return False
            self._begin(message)
            message = self._next_request()
        return True

    def _wait_for_request(self) -> Any:
        due = min([job.due for job in self._jobs] + [self._next_look])
        try:
            return self._inbox.get(timeout=max(0.001, due - time.monotonic()))
        except queue.Empty:
            return False

    def _next_request(self) -> Any:
        try:
            return self._inbox.get_nowait()
        except queue.Empty:
            return False

    def _begin(self, message: Dict[str, Any]) -> None:
        job = Job(message, self.timeout, self._tell)
        self._jobs.append(job)

    def _resume_jobs(self) -> None:
        for job in list(self._jobs):
            if job in self._jobs and job.due <= time.monotonic():
                self._resume(job)

    def _resume(self, job: Job) -> None:
        try:
            if job.steps is None:
                result = self._first_step(job)
                if not isinstance(result, types.GeneratorType):
                    for each in self._same_question(job):
                        self._end(each, {'id': each.id, 'value': result})
                    return
                job.steps = result
            job.due = time.monotonic() + next(job.steps)
        except StopIteration as result:
            self._end(job, {'id': job.id, 'value': result.value})
        except ConnectionLost as error:
            self._lost(job, str(error))
        except VMHostError as error:
            self._end(job, {'id': job.id, 'error': [type(error).__name__, str(error)]})
        except Exception as error:
            self._failed(job, error)

    def _same_question(self, job: Job) -> List[Job]:
        """The job, and those that came before it began and ask the same: a crowd of clients costs
        as much as one."""
        return [each for each in self._jobs if each is job or (
            job.verb in LOOKING and each.steps is None
            and (each.verb, each.args) == (job.verb, job.args))]

    def _first_step(self, job: Job) -> Any:
        """The verb's answer, or its generator where it has to wait for something."""
        if job.verb not in CHANGING and job.verb not in LOOKING:
            raise InvalidParams('no verb %s' % job.verb)
        if job.verb != 'check':
            self._ensure_connected()
        if job.verb in CHANGING:
            self._tell({'id': job.id, 'begun': True})
        return getattr(self, job.verb)(job, *job.args)

    def _failed(self, job: Job, error: Exception) -> None:
        if self._is_dead(error) and not self._answers():
            self._lost(job)
            return
        if self._is_not_ready(error) and job.verb in LOOKING and time.monotonic() < job.begun + NOT_READY:
            job.steps, job.due = None, time.monotonic() + 0.05
            return
        if not self._is_com_error(error) and not isinstance(error, OSError):
            vbox_log.exception('%s failed', job.verb)
        fault = self.translate(error)
        self._end(job, {'id': job.id, 'error': [type(fault).__name__, str(fault)]})

    def _end(self, job: Job, answer: Dict[str, Any]) -> None:
        self._jobs.remove(job)
        for uuid in [uuid for uuid, owner in self._owners.items() if owner is job]:
            del self._owners[uuid]
        job.break_off()
        if job.verb in CHANGING:
            self._look_at_once()
        self._tell(answer)

    # connection

    def _ensure_connected(self) -> None:
        if self.vbox is not None:
            if self._answers():
                return
            raise ConnectionLost()
        self._connect_anew()
        names = self.manager.constants.all_values('MachineState')
        self.states = {code: name for name, code in names.items()
                       if not name.startswith(('First', 'Last'))}
        self._next_look = 0.0
        self._forget_what_never_came()

    def _connect_anew(self) -> None:
        """A VBoxSVC that has just died can take 10 s to make room for the next one: the VMs'
        processes hold its socket until they notice."""
        self.manager = self._connect()
        why = ''
        try:
            self.vbox = self.manager.getVirtualBox()
        except Exception as error:
            why = str(error)
        if self.vbox is None:
            self.manager = None
            raise ConnectionLost('VirtualBox does not answer: VBoxSVC could not be started. ' + why)

    def _disconnect(self) -> None:
        self.vbox = self.manager = None
        self._measured = set()

    def _answers(self) -> bool:
        try:
            return self.vbox.revision is not None
        except Exception as error:
            vbox_log.debug('VBoxSVC does not answer: %s', error)
            return False

    def _lost(self, job: Job, why: str = '') -> None:
        """VBoxSVC died. What had begun to change something is told so, the rest begins again."""
        vbox_log.warning('lost VirtualBox (VBoxSVC died); connecting again')
        for each in list(self._jobs):
            if each.verb in CHANGING and each.steps is not None:
                self._end(each, {'id': each.id, 'error': [
                    'HypervisorError', 'VirtualBox (VBoxSVC) died during %s; look what state the '
                    'VM is in' % each.verb]})
            else:
                self._try_again(each, why)
        self._owners = {}
        self._disconnect()
        if self._in_process:
            raise ConnectionLost()

    def _try_again(self, job: Job, why: str) -> None:
        job.steps = None
        job.tries += 1
        job.due = time.monotonic() + min(0.2 * 2 ** job.tries, 5)
        if time.monotonic() > job.deadline:
            self._end(job, {'id': job.id, 'error': ['HypervisorError', why or 'VBoxSVC died']})
        else:
            self._tell({'id': job.id, 'again': why})

    def _pump_events(self) -> None:
        if self.manager is not None:
            self.manager.waitForEvents(0)

    # errors

    def _is_com_error(self, error: Exception) -> bool:
        return self._code(error) != 0

    def _code(self, error: Exception) -> int:
        """COM's status code, 0 for other errors: of an OSError, too, vboxapi's XPCOM would give the errno."""
        if self.manager is None or not self.manager.xcptIsOurXcptKind(error):
            return 0
        return int(self.manager.xcptGetStatus(error)) & 0xffffffff

    def _is_dead(self, error: Exception) -> bool:
        return self._is_com_error(error) and self._code(error) in DEAD or self.vbox is None

    def _is_not_ready(self, error: Exception) -> bool:
        """VirtualBox refuses access to an object that it is still making, or about to end ("The object is
        not ready"): seen of a VM that another call was importing."""
        return self._is_com_error(error) and self._code(error) == ACCESS_DENIED

    def translate(self, error: Exception) -> VMHostError:
        """VirtualBox's error as ours, with its text and code."""
        if isinstance(error, OSError):              # of ours: a file that can't be read, a full disk
            return HypervisorError(str(error))
        code = self._code(error)
        if not code:
            return HypervisorError('%s: %s' % (type(error).__name__, error))
        text = self.manager.xcptGetMessage(error) or str(error)
        return fault_of(code, text)

    def finish(self, job: Job, progress: Any, text: str) -> Steps:
        """Wait for a Progress of VirtualBox's, in slices, and raise what it failed with."""
        last, changed = -1, time.monotonic()
        while not progress.completed:
            percent = min(100, progress.percent)
            job.report(percent, text)
            if percent != last:
                last, changed = percent, time.monotonic()
            elif time.monotonic() - changed > max(STALL, self.timeout):
                raise DeadlineExceeded('%s: no progress for %d s, at %d%%; VirtualBox goes on '
                                       'with it' % (text, STALL, percent))
            yield 0.1
        job.renew_deadline()
        code = progress.resultCode & 0xffffffff
        if code:
            raise fault_of(code, error_text(progress.errorInfo))

    # finding

    def find(self, vm: str) -> Any:
        """The IMachine of this name, id or uuid."""
        wanted = str(vm)
        if is_mac(wanted):
            for machine in self.machines_now():
                if self.id_of(machine) == wanted.upper():
                    return machine
        try:
            return self.vbox.findMachine(wanted)
        except Exception as error:
            if self._code(error) != OBJECT_NOT_FOUND:
                raise
        raise NoSuchVM('no VM has the name, id or uuid %r' % wanted)

    def array(self, thing: Any, name: str) -> List[Any]:
        return list(self.manager.getArray(thing, name) or [])

    def machines_now(self) -> List[Any]:
        """All machines that are there, and whose settings VirtualBox can read."""
        return [machine for machine in self.array(self.vbox, 'machines') if self._if_there(
            lambda each: each.accessible and self.state_of(each), machine)]

    def _if_there(self, read: Callable[[Any], Any], machine: Any) -> Any:
        """What `read` gives; None of a machine that isn't ready: nobody could mean it yet, or any more."""
        try:
            return read(machine)
        except Exception as error:
            if not self._is_not_ready(error):
                raise
            return None

    def state_of(self, machine: Any) -> str:
        return self.states.get(machine.state, 'Unknown%s' % machine.state)

    def const(self, name: str) -> int:
        return getattr(self.manager.constants, name)

    def cards(self, machine: Any) -> Iterator[Any]:
        for slot in range(8):
            card = machine.getNetworkAdapter(slot)
            if card.enabled:
                yield card

    def card_of(self, machine: Any) -> Any:
        """The card whose MAC is the VM's id: host-only or NAT by the mode, else the first."""
        kinds = self._kinds_of_card()
        first = None
        for card in self.cards(machine):            # mostly the first one: each look takes its time
            if card.attachmentType in kinds:
                return card
            first = first or card
        return first

    def _kinds_of_card(self) -> List[int]:
        names = (('NAT', 'NATNetwork') if self.network['mode'] == 'nat'
                 else ('HostOnly', 'HostOnlyNetwork'))
        known = self.manager.constants.all_values('NetworkAttachmentType')
        return [known[name] for name in names if name in known]

    def id_of(self, machine: Any) -> str:
        card = self.card_of(machine)
        return colons(card.MACAddress) if card else ''

    def _look(self) -> None:
        """Tell the state of all VMs when it changed. Every second, VirtualBox willing."""
        self._next_look = time.monotonic() + 1
        try:
            self._ensure_connected()
            self._tell_seen()
        except ConnectionLost:
            self._lost_while_looking()
            return
        except Exception as error:
            self._look_failed(error)

    def _tell_seen(self) -> None:
        seen = {machine.id: [machine.name, self.state_of(machine), self.id_of(machine)]
                for machine in self.machines_now()}
        if seen != self._told:
            self._told = seen
            self._tell({'seen': seen})

    def _look_at_once(self) -> None:
        """After a change: whoever made it finds the new state known, and no state goes untold."""
        self._next_look = 0.0
        if self.vbox is not None:
            try:
                self._tell_seen()
            except Exception as error:              # the loop looks again, and knows what to do
                vbox_log.debug('looking at the VMs: %s', error)

    def _look_failed(self, error: Exception) -> None:
        if self.vbox is None:                       # not there: nothing to look at
            self._next_look = time.monotonic() + 5
            vbox_log.debug('no VirtualBox: %s', error)
        elif self._answers():                       # a VM that went meanwhile: look again
            vbox_log.debug('looking at the VMs: %s', error)
        else:
            self._lost_while_looking()

    def _lost_while_looking(self) -> None:
        self._told = None
        jobs = [job for job in self._jobs]
        if jobs:
            self._lost(jobs[0])
            return
        self._disconnect()
        if self._in_process:
            raise ConnectionLost()

    # waiting for a VM

    def own(self, job: Job, machine: Any) -> Steps:
        """Be the only job that changes this VM, until the job ends."""
        uuid = machine.id
        while self._owners.get(uuid, job) is not job:
            job.check_deadline(Busy('%s is busy: %s is under way'
                                    % (machine.name, self._owners[uuid].verb)))
            yield 0.05
        self._owners[uuid] = job

    def ready(self, job: Job, vm: str, verb: str) -> Steps:
        """Find, own and check the VM: it is in a state in which `verb` makes sense."""
        machine = self.find(vm)
        yield from self.own(job, machine)
        state = yield from self.settled(job, machine)
        if state not in ACCEPTABLE[verb]:
            raise BadState('%s is %s; %s needs it to be %s' % (
                machine.name, state, verb.replace('_', ' '),
                either([name for name in ACCEPTABLE[verb] if name in self.states.values()])))
        return machine

    def settled(self, job: Job, machine: Any) -> Steps:
        """Wait while the VM is on its way from one state to another."""
        first = self.const('MachineState_FirstTransient')
        while first <= machine.state or machine.sessionState in self._session_on_its_way():
            job.check_deadline(Busy('%s is still %s' % (machine.name, self.state_of(machine))))
            yield 0.05
        return self.state_of(machine)

    def _session_on_its_way(self) -> Tuple[int, int]:
        return self.const('SessionState_Spawning'), self.const('SessionState_Unlocking')

    def reached(self, job: Job, machine: Any, *states: str) -> Steps:
        """Wait until the VM is in one of these states and nobody is about to let it go."""
        while self.state_of(machine) not in states:
            job.check_deadline(DeadlineExceeded(
                '%s is %s, and not yet %s after %d s' % (
                    machine.name, self.state_of(machine), either(states), self.timeout)))
            yield 0.05
        yield from self.settled(job, machine)

    # sessions

    def lock(self, job: Job, machine: Any) -> Steps:
        """A session that holds the VM's lock: shared with its process where it runs.

        Somebody else may hold it for a moment: tried again, less and less often, until the
        deadline of the job.
        """
        pause = 0.05
        while True:
            online = self.state_of(machine) in ONLINE
            session = self.manager.getSessionObject()
            try:
                machine.lockMachine(session, self.const(
                    'LockType_Shared' if online else 'LockType_Write'))
                return session
            except Exception as error:
                if self._code(error) not in (INVALID_OBJECT_STATE, INVALID_SESSION_STATE,
                                             OBJECT_IN_USE):
                    raise
                job.check_deadline(Busy('%s is locked by another program: %s'
                                        % (machine.name, self.translate(error))))
            yield pause
            pause = min(2 * pause, 2)

    def unlock(self, session: Any) -> None:
        """Let go; a VM process that has ended has done so already."""
        try:
            if session.state == self.const('SessionState_Locked'):
                session.unlockMachine()
        except Exception as error:
            vbox_log.debug('unlocking: %s', error)

    def tell_console(self, job: Job, machine: Any, act: Callable[[Any], Any], text: str
                     ) -> Steps:
        """Do `act` with the VM's console, and wait for its Progress if it gives one."""
        session = yield from self.lock(job, machine)
        try:
            console = session.console
            if console is None:
                raise BadState('%s is %s' % (machine.name, self.state_of(machine)))
            progress = act(console)
            if progress is not None:
                yield from self.finish_in_process(job, progress, text)
        finally:
            self.unlock(session)

    def finish_in_process(self, job: Job, progress: Any, text: str) -> Steps:
        """Like finish, for a Progress that lives in the VM's process, and may end with it."""
        try:
            yield from self.finish(job, progress, text)
        except Exception as error:
            if not self._is_dead(error) or not self._answers():
                raise

    def edit(self, job: Job, machine: Any, change: Callable[[Any], None]) -> Steps:
        """Change settings through a session's mutable machine, and save them."""
        session = yield from self.lock(job, machine)
        try:
            change(session.machine)
            session.machine.saveSettings()
        finally:
            self.unlock(session)

    # verbs: what there is

    def version(self, job: Job) -> Any:
        return re.split(r'[^0-9.]', self.vbox.version)[0]

    def machine_states(self, job: Job) -> Any:
        return {name: code for code, name in self.states.items()}

    def machines(self, job: Job) -> Any:
        first, last = (self.const('MachineState_FirstOnline'),
                       self.const('MachineState_LastOnline'))
        return [{'name': machine.name, 'uuid': machine.id, 'id': self.id_of(machine),
                 'state': self.state_of(machine), 'online': first <= machine.state <= last}
                for machine in self.machines_now()]

    def state(self, job: Job, vm: str) -> Any:
        return self.state_of(self.find(vm))

    def describe(self, job: Job, vm: str) -> Any:
        machine = self.find(vm)
        snapshot = machine.currentSnapshot
        return {'name': machine.name, 'id': self.id_of(machine), 'uuid': machine.id,
                'state': self.state_of(machine), 'memory': machine.memorySize,
                'cpus': machine.CPUCount, 'ostype': machine.OSTypeId,
                'snapshot': snapshot.name if snapshot else '',
                'tagged': has_mark(machine, MADE_BY_US),
                'rdp': self._desktop_of(machine)}

    # verbs: life of a VM

    def start(self, job: Job, vm: str, gui_mode: bool) -> Steps:
        machine = yield from self.ready(job, vm, 'start')
        if self.network['mode'] == 'nat' and self.state_of(machine) in OFF:
            yield from self.edit(job, machine, self.forward_chirp)
        yield from self._launch(job, machine, 'gui' if gui_mode else 'headless')
        yield from self.reached(job, machine, *ONLINE + OFF + SAVED)
        state = self.state_of(machine)
        if state not in ('Running', 'Paused'):
            raise HypervisorError('%s came up, and is %s already: its log, getLog, should tell why'
                                  % (machine.name, state))
        return True

    def _launch(self, job: Job, machine: Any, kind: str) -> Steps:
        environment = [] if self.api() >= (6, 1) else ''
        pause = 0.05
        while True:
            session = self.manager.getSessionObject()
            try:
                progress = machine.launchVMProcess(session, kind, environment)
                break
            except Exception as error:
                if self._code(error) != INVALID_OBJECT_STATE:
                    raise
                job.check_deadline(Busy('%s is locked by another program: %s'
                                        % (machine.name, self.translate(error))))
            yield pause
            pause = min(2 * pause, 2)
        try:
            yield from self.finish(job, progress, 'starting')
        finally:
            self.unlock(session)

    def shutdown(self, job: Job, vm: str) -> Steps:
        machine = yield from self.ready(job, vm, 'shutdown')
        yield from self.tell_console(job, machine, lambda console: console.powerButton(), '')
        while self.state_of(machine) not in OFF:
            job.check_deadline(DeadlineExceeded(
                '%s took no notice of the ACPI power button for %d s; powerOff pulls the plug'
                % (machine.name, self.timeout)))
            yield 0.1
        yield from self.settled(job, machine)
        return True

    def reset(self, job: Job, vm: str) -> Steps:
        machine = yield from self.ready(job, vm, 'reset')
        yield from self.tell_console(job, machine, lambda console: console.reset(), '')
        yield from self.reached(job, machine, 'Running')
        return True

    def power_off(self, job: Job, vm: str) -> Steps:
        machine = yield from self.ready(job, vm, 'power_off')
        failure = None
        try:
            yield from self.tell_console(job, machine, lambda console: console.powerDown(),
                                         'powering off')
        except Exception as error:      # its process has died meanwhile, perhaps: it is off then, too
            failure = error
        if failure is not None:
            yield from self.settled(job, machine)
            if self.state_of(machine) not in OFF:
                raise failure
        yield from self.reached(job, machine, *OFF)
        return True

    def pause(self, job: Job, vm: str) -> Steps:
        machine = yield from self.ready(job, vm, 'pause')
        yield from self.tell_console(job, machine, lambda console: console.pause(), '')
        yield from self.reached(job, machine, 'Paused')
        return True

    def resume(self, job: Job, vm: str) -> Steps:
        machine = yield from self.ready(job, vm, 'resume')
        yield from self.tell_console(job, machine, lambda console: console.resume(), '')
        yield from self.reached(job, machine, 'Running')
        return True

    def save_state(self, job: Job, vm: str) -> Steps:
        machine = yield from self.ready(job, vm, 'save_state')
        session = yield from self.lock(job, machine)
        failure = None
        try:
            yield from self.finish_in_process(job, session.machine.saveState(), 'saving the state')
        except VMHostError as error:
            failure = error
        finally:
            self.unlock(session)
        if failure is not None:
            yield from self.settled(job, machine)
            if self.state_of(machine) != 'Saved':
                raise failure
            yield from self._write_settings(job, machine, failure)
        yield from self.reached(job, machine, 'Saved')
        return True

    def _write_settings(self, job: Job, machine: Any, failure: Exception) -> Steps:
        """Seen with 7.2, once in 60: the state is saved, but an assertion of VBoxSVC's fails while it
        writes the .vbox file, which then doesn't name the state. A change writes it again."""
        vbox_log.info('%s is saved, though VirtualBox says: %s', machine.name, failure)
        text = machine.description
        for each in (text + ' ', text):
            yield from self.edit(job, machine, lambda mutable, each=each: setattr(  # type: ignore
                mutable, 'description', each))

    def discard_state(self, job: Job, vm: str) -> Steps:
        machine = yield from self.ready(job, vm, 'discard_state')
        session = yield from self.lock(job, machine)
        try:
            session.machine.discardSavedState(True)
        finally:
            self.unlock(session)
        yield from self.reached(job, machine, *OFF)
        return True

    # verbs: snapshots

    def snapshots(self, job: Job, vm: str) -> Any:
        return self._snapshots_of(self.find(vm))

    def _snapshots_of(self, machine: Any) -> List[Dict[str, Any]]:
        """Without recursion: a chain of snapshots may be hundreds deep."""
        if not machine.snapshotCount:
            return []
        current = machine.currentSnapshot.id if machine.currentSnapshot else ''
        rows, todo = [], [(machine.findSnapshot(''), '', 0)]
        while todo:
            snapshot, parent, depth = todo.pop()
            rows.append({'name': snapshot.name, 'id': snapshot.id, 'parent': parent,
                         'depth': depth, 'desc': snapshot.description,
                         'taken': snapshot.timeStamp // 1000, 'online': bool(snapshot.online),
                         'current': snapshot.id == current})
            todo += [(child, snapshot.name, depth + 1)
                     for child in reversed(self.array(snapshot, 'children'))]
        return rows

    def list_snapshots(self, job: Job, vm: str) -> Any:
        return [row['name'] for row in self._snapshots_of(self.find(vm))]

    def _find_snapshot(self, machine: Any, name: str) -> Any:
        if not name:
            if machine.currentSnapshot is None:
                raise HypervisorError('%s has no snapshot' % machine.name)
            return machine.currentSnapshot
        same = [row for row in self._snapshots_of(machine) if name in (row['name'], row['id'])]
        if not same:
            raise HypervisorError('%s has no snapshot %r' % (machine.name, name))
        if len(same) > 1:
            raise HypervisorError('%s has %d snapshots named %r: use a uuid, one of %s' % (
                machine.name, len(same), name, ', '.join(row['id'] for row in same)))
        return machine.findSnapshot(same[0]['id'])

    def take_snapshot(self, job: Job, vm: str, name: str, desc: str) -> Steps:
        if not name:
            raise InvalidParams('a snapshot needs a name')
        machine = yield from self.ready(job, vm, 'take_snapshot')
        if any(row['name'] == name for row in self._snapshots_of(machine)):
            raise AlreadyExists('%s has a snapshot %r already' % (machine.name, name))
        before = self.state_of(machine)
        session = yield from self.lock(job, machine)
        try:
            progress = session.machine.takeSnapshot(name, desc, before != 'Running')
            yield from self.finish(job, progress_of(progress), 'taking the snapshot')
        finally:
            self.unlock(session)
        yield from self.reached(job, machine, before)
        return True

    def restore_snapshot(self, job: Job, vm: str, name: str) -> Steps:
        machine = yield from self.ready(job, vm, 'restore_snapshot')
        snapshot = self._find_snapshot(machine, name)
        session = yield from self.lock(job, machine)
        try:
            yield from self.finish(job, session.machine.restoreSnapshot(snapshot),
                                   'restoring the snapshot')
        finally:
            self.unlock(session)
        yield from self.settled(job, machine)
        return True

    def delete_snapshot(self, job: Job, vm: str, name: str) -> Steps:
        if not name:
            raise InvalidParams('which snapshot?')
        machine = yield from self.ready(job, vm, 'delete_snapshot')
        snapshot = self._find_snapshot(machine, name)
        session = yield from self.lock(job, machine)
        try:
            yield from self.finish(job, session.machine.deleteSnapshot(snapshot.id),
                                   'deleting the snapshot')
        finally:
            self.unlock(session)
        yield from self.settled(job, machine)
        return True

    # verbs: making and removing

    def create_vm(self, job: Job, name: str, image: str, options: Dict[str, Any]
                  ) -> Steps:
        wish = wishes(options)
        registers = not image and name.lower().endswith('.vbox')
        kind = os.path.splitext(name if registers else image)[1].lower()
        check_fitting(options, kind)
        if registers:
            return self._register(os.path.abspath(name))
        self._check_new_name(job, name)
        self._check_ostype(wish['ostype'])
        if image and not os.path.isfile(image):
            raise InvalidParams('no such image file: %s' % image)
        if kind in ('.ova', '.ovf'):
            yield from self._import(job, name, os.path.abspath(image), wish)
        elif kind in ('', '.iso', '.vdi', '.vmdk', '.vhd', '.vhdx', '.qcow', '.qcow2', '.hdd'):
            yield from self._build(job, name, image and os.path.abspath(image), kind, wish)
        else:
            raise NotSupported('an image is .ova, .ovf, .iso, .vdi, .vmdk, .vhd or .qcow, not %r'
                               % kind)
        return name

    def _check_new_name(self, job: Job, name: str) -> None:
        if not name or re.search(r'[/\\\x00-\x1f]', name) or name in ('.', '..'):
            raise InvalidParams('%r is no name for a VM' % name)
        self._check_is_no_id(name)
        if name in [machine.name for machine in self.machines_now()]:
            raise AlreadyExists('there is a VM %r already' % name)
        path = self.vbox.composeMachineFilename(name, '', '', '')
        if path in self._in_the_making(besides=job):
            raise AlreadyExists('a VM %r is being made already' % name)
        if os.path.exists(path):
            raise AlreadyExists('%s exists already, of a VM that is not registered' % path)

    def _check_is_no_id(self, name: str) -> None:
        """Whoever means a VM of that name would reach the one that has the id."""
        if is_mac(name) or UUID.match(name):
            raise InvalidParams('%r is an id, and no name for a VM' % name)

    def _check_ostype(self, ostype: str) -> None:
        known = [each.id for each in self.array(self.vbox, 'guestOSTypes')] if ostype else ['']
        if ostype not in known:
            raise InvalidParams('VirtualBox knows no ostype %r; `VBoxManage list ostypes` lists them'
                             % ostype)

    def _register(self, path: str) -> str:
        if not os.path.isfile(path):
            raise InvalidParams('no such file: %s' % path)
        for machine in self.array(self.vbox, 'machines'):       # those that can't be read, too
            if os.path.abspath(self._if_there(lambda each: each.settingsFilePath, machine) or '') == path:
                raise AlreadyExists('%s is registered already' % path)
        password = ('',) if self.api() >= (7, 0) else ()
        machine = self.vbox.openMachine(path, *password)
        self._check_is_no_id(machine.name)
        if machine.name in [each.name for each in self.machines_now()]:
            raise AlreadyExists('there is a VM %r already' % machine.name)
        self.vbox.registerMachine(machine)
        return machine.name

    def _build(self, job: Job, name: str, image: str, kind: str, wish: Dict[str, Any]
               ) -> Steps:
        machine = self._new_machine(name, wish['ostype'])
        disk = None
        try:
            yield from self.own(job, machine)
            disk = yield from self._new_disk(job, machine, image, kind, wish['diskSize'])
            yield from self.edit(job, machine, lambda mutable: self._fit_out(
                mutable, wish, disk, image if kind == '.iso' else ''))
        except BaseException:
            self._remove_half_made(machine, disk)
            raise

    def _new_machine(self, name: str, ostype: str) -> Any:
        """Registered at once, marked as half made: if we die now, cleanup will find it."""
        ostype = ostype or 'Linux_64'
        if self.api() >= (7, 1):
            arch = self.vbox.getGuestOSType(ostype).platformArchitecture
            arguments = ['', name, arch, [], ostype, '', '', '', '']
        elif self.api() >= (7, 0):
            arguments = ['', name, [], ostype, '', '', '', '']
        else:
            arguments = ['', name, [], ostype, '']
        machine = self.vbox.createMachine(*arguments)
        machine.applyDefaults('')
        machine.setExtraData(MADE_BY_US, machine.id)
        machine.setExtraData(MAKING, machine.id)
        machine.saveSettings()
        self.vbox.registerMachine(machine)
        return machine

    def _remove_half_made(self, machine: Any, disk: Any = None) -> None:
        """And the new disk, which it may not have attached yet."""
        try:
            note = IMPORTING + machine.name
            if disk is not None and not self.array(disk, 'machineIds'):
                location = disk.location
                disk.deleteStorage().waitForCompletion(10000)
                self.vbox.setExtraData(DISK_MADE + location, '')
            progress = self._delete(machine, only_ours=True)
            progress.waitForCompletion(10000)
            self.vbox.setExtraData(note, '')
        except Exception as error:
            vbox_log.warning('a half-made VM is left for cleanup: %s', self.translate(error))

    def _new_disk(self, job: Job, machine: Any, image: str, kind: str, size: Optional[int]
                  ) -> Steps:
        copied = image and kind != '.iso'
        if not copied and size == 0:
            return None
        folder = os.path.dirname(machine.settingsFilePath)
        disk = self.vbox.createMedium('VDI', os.path.join(folder, machine.name + '.vdi'),
                                      self.const('AccessMode_ReadWrite'),
                                      self.const('DeviceType_HardDisk'))
        self.vbox.setExtraData(DISK_MADE + disk.location, unfinished())
        variant = [self.const('MediumVariant_Standard')]
        if copied:
            yield from self._copy_disk(job, image, disk, variant)
        else:
            megabytes = self._default_size(machine) if size is None else size
            yield from self.finish(job, disk.createBaseStorage(megabytes << 20, variant),
                                   'making a disk')
        self.vbox.setExtraData(DISK_MADE + disk.location, disk.id)
        return disk

    def _default_size(self, machine: Any) -> int:
        return max(1024, self.vbox.getGuestOSType(machine.OSTypeId).recommendedHDD >> 20)

    def _copy_disk(self, job: Job, image: str, disk: Any, variant: List[int]) -> Steps:
        own_copy = False
        try:
            source = self._open_disk(image)
        except Exception as error:
            if self._code(error) != OBJECT_NOT_FOUND:
                raise
            own_copy = True
            source = yield from self._open_twin(job, image, os.path.dirname(disk.location))
        try:
            yield from self.finish(job, source.cloneTo(disk, variant, None), 'copying the disk')
        finally:
            self._let_go(source, own_copy)

    def _let_go(self, source: Any, own_copy: bool) -> None:
        """VirtualBox goes on with a copying that was broken off, and then refuses: cleanup finds our copy."""
        try:
            if own_copy:
                twin = source.location
                source.deleteStorage().waitForCompletion(10000)
                self.vbox.setExtraData(DISK_MADE + twin, '')
            elif not self.array(source, 'machineIds'):
                source.close()
        except Exception as error:
            vbox_log.info('an image stays open: %s', self.translate(error))

    def _open_disk(self, image: str, mode: str = 'ReadOnly', new_uuid: bool = False) -> Any:
        return self.vbox.openMedium(image, self.const('DeviceType_HardDisk'),
                                    self.const('AccessMode_' + mode), new_uuid)

    def _open_twin(self, job: Job, image: str, folder: str) -> Steps:
        """Of a copy of a disk that VirtualBox knows: both have the same uuid, so it opens neither
        the copy nor, without writing into it, gives it another. A copy of the copy gets one."""
        twin = os.path.join(folder, 'copy-of-' + os.path.basename(image))
        self.vbox.setExtraData(DISK_MADE + twin, unfinished())
        try:
            yield from self._copy_file(job, image, twin)
            return self._open_disk(twin, 'ReadWrite', True)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(twin)
            self.vbox.setExtraData(DISK_MADE + twin, '')
            raise

    def _copy_file(self, job: Job, image: str, target: str) -> Steps:
        total = os.path.getsize(image) or 1
        with open(image, 'rb') as source, open(target, 'wb') as copy:
            for block in iter(lambda: source.read(4 << 20), b''):
                copy.write(block)
                job.report(100 * source.tell() // total, 'copying the image')
                yield 0
        job.renew_deadline()

    def _fit_out(self, machine: Any, wish: Dict[str, Any], disk: Any, iso: str) -> None:
        if disk is not None:
            bus, port = self._free_place(machine, ('SATA', 'SCSI', 'VirtioSCSI', 'IDE'))
            machine.attachDevice(bus, port, 0, self.const('DeviceType_HardDisk'), disk)
        if iso:
            medium = self.vbox.openMedium(iso, self.const('DeviceType_DVD'),
                                          self.const('AccessMode_ReadOnly'), False)
            self._insert(machine, medium)
        self._apply(machine, wish)

    def _free_place(self, machine: Any, kinds: Tuple[str, ...]) -> Tuple[str, int]:
        buses = self.manager.constants.all_values('StorageBus')
        for kind in kinds:
            for controller in self.array(machine, 'storageControllers'):
                if controller.bus == buses.get(kind):
                    return controller.name, self._free_port_of(machine, controller)
        controller = machine.addStorageController('SATA', buses['SATA'])
        controller.portCount = 2
        return controller.name, 0

    def _free_port_of(self, machine: Any, controller: Any) -> int:
        used = {place.port for place in self.array(machine, 'mediumAttachments')
                if place.controller == controller.name}
        free = [port for port in range(controller.maxPortCount) if port not in used]
        if free[0] >= controller.portCount:
            controller.portCount = free[0] + 1
        return free[0]

    def _insert(self, machine: Any, medium: Any) -> None:
        """Into the drive that the machine has, else into a new one."""
        dvd = self.const('DeviceType_DVD')
        for place in self.array(machine, 'mediumAttachments'):
            if place.type == dvd:
                machine.mountMedium(place.controller, place.port, place.device, medium, True)
                return
        bus, port = self._free_place(machine, ('IDE', 'SATA'))
        machine.attachDevice(bus, port, 0, dvd, medium)

    def _apply(self, machine: Any, wish: Dict[str, Any]) -> None:
        if wish['memory']:
            machine.memorySize = wish['memory']
        if wish['cpus']:
            machine.CPUCount = wish['cpus']
        self._give_card(machine, wish['network'] or self.network['mode'])
        if wish['keep']:
            machine.setExtraData(KEEP, machine.id)
        machine.setExtraData(MADE_BY_US, machine.id)
        machine.setExtraData(MAKING, '')

    def _give_card(self, machine: Any, network: str) -> None:
        """The card over which the agent will speak. An appliance keeps those it came with."""
        cards = list(self.cards(machine))
        if network == 'none':
            for card in cards:
                card.enabled = False
        elif network == 'nat':
            self._nat_card(self._card_for(machine, cards, ('NAT',)), machine)
        else:
            self._host_only_card(self._card_for(machine, cards, ('HostOnly', 'HostOnlyNetwork')))

    def _card_for(self, machine: Any, cards: List[Any], kinds: Tuple[str, ...]) -> Any:
        known = self.manager.constants.all_values('NetworkAttachmentType')
        fitting = [card for card in cards if card.attachmentType in
                   [known.get(kind) for kind in kinds]]
        fresh = has_mark(machine, MAKING)        # its only card is what applyDefaults gave it
        card = (fitting or (cards if fresh else []) or [self._unused_card(machine)])[0]
        card.enabled = True
        return card

    def _unused_card(self, machine: Any) -> Any:
        for slot in range(8):
            card = machine.getNetworkAdapter(slot)
            if not card.enabled:
                return card
        raise HypervisorError('%s has no network slot left' % machine.name)

    def _nat_card(self, card: Any, machine: Any) -> None:
        card.attachmentType = self.const('NetworkAttachmentType_NAT')
        self._reach_localhost(card.NATEngine)
        if self.network['mode'] == 'nat':
            self.forward_chirp(machine)

    def _host_only_card(self, card: Any) -> None:
        if self.networks_on_mac():
            card.attachmentType = self.const('NetworkAttachmentType_HostOnlyNetwork')
            card.hostOnlyNetwork = self.network['interface']
            return
        card.attachmentType = self.const('NetworkAttachmentType_HostOnly')
        card.hostOnlyInterface = self.network['interface']

    def _import(self, job: Job, name: str, image: str, wish: Dict[str, Any]) -> Steps:
        """VirtualBox registers the VM when all its disks are there; until then a note of ours
        says whose it will be."""
        appliance = self.vbox.createAppliance()
        yield from self.finish(job, appliance.read(image), 'reading the appliance')
        appliance.interpret()
        systems = self.array(appliance, 'virtualSystemDescriptions')
        if len(systems) != 1:
            raise NotSupported('%s holds %d machines, not one' % (image, len(systems)))
        path = self.vbox.composeMachineFilename(name, '', '', '')
        self._rename_system(systems[0], name, path)
        note = IMPORTING + name
        self.vbox.setExtraData(note, path)
        self._expect_disks(systems[0], os.path.dirname(path))
        try:
            yield from self.finish(job, appliance.importMachines([]), 'importing')
        except Exception as error:                  # VirtualBox goes on, or died: what comes is ours
            if not isinstance(error, DeadlineExceeded) and not self._is_dead(error):
                self._forget(os.path.dirname(path))
            raise
        machine = self.vbox.findMachine(self.array(appliance, 'machines')[0])
        try:
            yield from self.own(job, machine)
            self._remember_disks(machine)
            yield from self.edit(job, machine, lambda mutable: self._apply(mutable, wish))
        except BaseException:
            self._remove_half_made(machine)
            raise
        self.vbox.setExtraData(note, '')

    def _rename_system(self, system: Any, name: str, path: str) -> None:
        kinds, _, _, values, extra = system.getDescription()
        renamed = {self.const('VirtualSystemDescriptionType_Name'): name,
                   self.const('VirtualSystemDescriptionType_SettingsFile'): path}
        values = [renamed.get(kind, value) for kind, value in zip(kinds, values)]
        system.setFinalValues([True] * len(kinds), values, extra)

    def _expect_disks(self, system: Any, folder: str) -> None:
        """Notes the disks that an import will make: the VM that has them is there at its end alone."""
        disk = self.const('VirtualSystemDescriptionType_HardDiskImage')
        kinds, _, _, values, _ = system.getDescription()
        for kind, value in zip(kinds, values):
            location = os.path.join(folder, value)
            if kind == disk and not os.path.exists(location):
                self.vbox.setExtraData(DISK_MADE + location, unfinished())

    def _forget(self, folder: str) -> None:
        """Drops the notes of what was to come in this folder and didn't: what lies there later isn't ours."""
        for key, path in self._begun():
            if os.path.dirname(path) == folder and not is_recent(path, self.vbox.getExtraData(key)):
                self.vbox.setExtraData(key, '')

    def _begun(self) -> Iterator[Tuple[str, str]]:
        """(key of the note, path) of unfinished disks, and of the .vbox files that imports make."""
        for key in self.vbox.getExtraDataKeys():
            note = self.vbox.getExtraData(key)
            if key.startswith(IMPORTING):
                yield key, note
            elif key.startswith(DISK_MADE) and note.startswith(DISK_UNFINISHED):
                yield key, key[len(DISK_MADE):]

    def _disks_of(self, machine: Any) -> List[Any]:
        disk = self.const('DeviceType_HardDisk')
        return [place.medium for place in self.array(machine, 'mediumAttachments')
                if place.type == disk and place.medium]

    def _remember_disks(self, machine: Any) -> None:
        for disk in self._disks_of(machine):
            self.vbox.setExtraData(DISK_MADE + disk.location, disk.id)

    def remove_vm(self, job: Job, vm: str, delete_disks: bool) -> Steps:
        machine = yield from self.ready(job, vm, 'remove_vm')
        if machine.sessionState != self.const('SessionState_Unlocked'):
            session = yield from self.lock(job, machine)       # waits, or says Busy
            self.unlock(session)
        if delete_disks:
            yield from self._finish_delete(job, machine, only_ours=False)
        else:
            machine.unregister(self.const('CleanupMode_UnregisterOnly'))
        return True

    def _finish_delete(self, job: Job, machine: Any, only_ours: bool) -> Steps:
        yield from self.finish(job, self._delete(machine, only_ours), 'deleting')

    def _delete(self, machine: Any, only_ours: bool) -> Any:
        """Unregister and delete the VM's files, and those of its disks that nothing else needs: all of
        them, or only what we made."""
        media = self._unused(machine.unregister(self.const('CleanupMode_DetachAllReturnHardDisksOnly')))
        if only_ours:
            media = [medium for medium in media if self._is_made(medium)]
        for medium in media:
            if not medium.parent:
                self.vbox.setExtraData(DISK_MADE + medium.location, '')
        return machine.deleteConfig(media)

    def _unused(self, media: List[Any]) -> List[Any]:
        """Of the disks that a VM had, and its snapshots: those that no other VM has attached, nor a disk
        that lies on them, such as a linked clone's."""
        had, needed = {medium.id for medium in media}, set()
        for medium in media:
            if self.array(medium, 'machineIds') or {
                    child.id for child in self.array(medium, 'children')} - had:
                while medium and medium.id not in needed:
                    needed.add(medium.id)
                    medium = medium.parent
        return [medium for medium in media if medium.id not in needed]

    def _is_made(self, medium: Any) -> bool:
        """Whether we made this disk, or the one that it lies on."""
        base = medium.base
        return is_noted(base, self.vbox.getExtraData(DISK_MADE + base.location))

    # verbs: what was left behind

    def cleanup(self, job: Job, dry_run: bool) -> Steps:
        removed = []  # type: List[Dict[str, str]]
        unread = [self._if_there(lambda each: each.settingsFilePath, machine) or 'a VM that comes or goes'
                  for machine in self.array(self.vbox, 'machines')
                  if not self._if_there(lambda each: each.accessible, machine)]
        if unread:                                  # which disks are theirs, VirtualBox doesn't know
            vbox_log.warning('cleanup removes nothing while VirtualBox can not read %s: any disk may be '
                             'in use there', ', '.join(unread))
            return removed
        self._forget_what_never_came()
        for machine in self.machines_now():
            why = self._why_left(machine)
            if why:
                row = {'kind': 'vm', 'name': machine.name, 'why': why}
                if dry_run or (yield from self._succeeds(row, self._remove_left_vm(job, machine))):
                    removed.append(row)
        for location, note in self._left_disks():
            row = {'kind': 'disk', 'name': location, 'why': 'no VM uses it'}
            if dry_run or (yield from self._succeeds(row, self._remove_disk(job, location, note))):
                removed.append(row)
        return removed

    def _succeeds(self, row: Dict[str, str], steps: Steps) -> Steps:
        """Removes it. What can't be removed mustn't hide what was, nor keep the rest."""
        try:
            yield from steps
            return True
        except Exception as error:
            if self._is_dead(error):
                raise
            vbox_log.warning('cleanup could not remove the %s %s: %s', row['kind'], row['name'],
                             error if isinstance(error, VMHostError) else self.translate(error))
            return False

    def _remove_left_vm(self, job: Job, machine: Any) -> Steps:
        yield from self.own(job, machine)
        yield from self._finish_delete(job, machine, only_ours=True)

    def _why_left(self, machine: Any) -> str:
        """Why this VM may go, '' when it must not."""
        if has_mark(machine, KEEP) or machine.id in self._owners:
            return ''
        if machine.sessionState != self.const('SessionState_Unlocked'):
            return ''
        if has_mark(machine, MAKING) or self._import_left(machine):
            return 'half made'
        state = self.state_of(machine)
        return state if has_mark(machine, MADE_BY_US) and state in OFF else ''

    def _import_left(self, machine: Any) -> bool:
        path = self.vbox.getExtraData(IMPORTING + machine.name)
        return bool(path) and path == machine.settingsFilePath and path not in self._in_the_making()

    def _in_the_making(self, besides: Optional[Job] = None) -> List[str]:
        """The .vbox files of the VMs that jobs are making: an imported one has no owner until it is whole."""
        return [self.vbox.composeMachineFilename(job.args[0], '', '', '') for job in self._jobs
                if job.verb == 'create_vm' and job.steps is not None and job is not besides]

    def _forget_what_never_came(self) -> None:
        """As _forget, for whatever a host began that has died. The sooner the better: a user may put files
        of his own there."""
        if not self._works():
            making = self._folders_in_the_making()
            for folder in {os.path.dirname(path) for _, path in self._begun()}.difference(making):
                self._forget(folder)

    def _works(self) -> bool:
        """Whether VirtualBox is at work: it goes on with what a host began that has died."""
        return bool(self.array(self.vbox, 'progressOperations'))

    def _left_disks(self) -> List[Tuple[str, str]]:
        """(path, note) of the disks that we made and that no VM has attached, nor a disk that lies on them.

        Nothing unfinished is left while VirtualBox works.
        """
        works = self._works()
        making = self._folders_in_the_making()
        known = {disk.location: disk for disk in self.array(self.vbox, 'hardDisks')}
        left = []
        for key in self.vbox.getExtraDataKeys():
            location, note = key[len(DISK_MADE):], self.vbox.getExtraData(key)
            if not key.startswith(DISK_MADE) or os.path.dirname(location) in making:
                continue
            if works and note.startswith(DISK_UNFINISHED):
                continue
            if not is_recent(location, note):
                self.vbox.setExtraData(key, '')
            elif location not in known or self._is_left(known[location], note):
                left.append((location, note))
        return left

    def _is_left(self, disk: Any, note: str) -> bool:
        return is_noted(disk, note) and not (
            self.array(disk, 'machineIds') or self.array(disk, 'children'))

    def _folders_in_the_making(self) -> List[str]:
        machines = self.machines_now() if self._owners else []
        owned = [machine.settingsFilePath for machine in machines if machine.id in self._owners]
        return [os.path.dirname(path) for path in owned + self._in_the_making()]

    def _remove_disk(self, job: Job, location: str, note: str) -> Steps:
        try:
            medium = self._open_disk(location, 'ReadWrite')
        except Exception as error:
            if self._is_dead(error) or not note.startswith(DISK_UNFINISHED):
                raise
            os.remove(location)                     # not even a disk yet, or still the twin of another
        else:
            if not is_noted(medium, note):
                medium.close()                      # VirtualBox didn't know it before
                raise HypervisorError('%s is another disk than the one that was made there'
                                      % location)
            yield from self.finish(job, medium.deleteStorage(), 'deleting a disk')
        self.vbox.setExtraData(DISK_MADE + location, '')
        if not self._is_folder_of_vm(os.path.dirname(location)):
            remove_leavings(os.path.dirname(location))

    def _is_folder_of_vm(self, folder: str) -> bool:
        """Whether a registered VM has its settings there; one that VirtualBox can't read is a VM, too."""
        return os.path.realpath(folder) in [
            os.path.realpath(os.path.dirname(machine.settingsFilePath))
            for machine in self.array(self.vbox, 'machines')]

    # verbs: the network

    def networks_on_mac(self) -> bool:
        """macOS has host-only networks in place of interfaces, from VirtualBox 7 on."""
        return sys.platform == 'darwin' and self.api() >= (7, 0)

    def get_network(self, job: Job) -> Dict[str, Any]:
        if self.networks_on_mac():
            return self._network_on_mac()
        found = self._interface()
        dhcp = self._dhcp_server()
        return {'mode': self.network['mode'], 'interface': self.network['interface'],
                'hostIp': found.IPAddress if found else '',
                'netmask': found.networkMask if found else '',
                'dhcp': self._dhcp_facts(dhcp)}

    def _dhcp_facts(self, dhcp: Any) -> Dict[str, Any]:
        if dhcp is None:
            return {'server': '', 'lower': '', 'upper': '', 'enabled': False}
        return {'server': dhcp.IPAddress, 'lower': dhcp.lowerIP, 'upper': dhcp.upperIP,
                'enabled': bool(dhcp.enabled)}

    def _interface(self) -> Any:
        kind = self.const('HostNetworkInterfaceType_HostOnly')
        for each in self.array(self.vbox.host, 'networkInterfaces'):
            if each.interfaceType == kind and each.name == self.network['interface']:
                return each
        return None

    def _dhcp_server(self) -> Any:
        name = 'HostInterfaceNetworking-' + self.network['interface']
        for dhcp in self.array(self.vbox, 'DHCPServers'):
            if dhcp.networkName == name:
                return dhcp
        return None

    def setup_network(self, job: Job) -> Steps:
        """Changes only what differs, so that it can be called again at any time."""
        if self.network['mode'] == 'nat':
            return self.get_network(job)            # nothing to make: each VM has its own
        problem = address_problem(self.network) or range_problem(self.network['host_ip'])
        if problem:
            raise HypervisorError(problem)
        if self.networks_on_mac():
            self._setup_on_mac()
            return self.get_network(job)
        if self._interface() is None:
            yield from self._make_interface(job)
        self._address_interface()
        self._setup_dhcp()
        return self.get_network(job)

    def _make_interface(self, job: Job) -> Steps:
        answer = self.vbox.host.createHostOnlyNetworkInterface()
        yield from self.finish(job, progress_of(answer), 'making the interface')
        made = next(part for part in answer if not hasattr(part, 'completed'))
        if made.name == self.network['interface']:
            return
        name = made.name
        yield from self.finish(job, self.vbox.host.removeHostOnlyNetworkInterface(made.id), '')
        raise HypervisorError('VirtualBox would call the new interface %s: write interface=%s in '
                              '[Network]' % (name, name))

    def _address_interface(self) -> None:
        wanted = self.network['host_ip'], self.network['netmask']
        found = self._interface()
        if (found.IPAddress, found.networkMask) != wanted or not is_local(wanted[0]):
            found.enableStaticIPConfig(*wanted)

    def _setup_dhcp(self) -> None:
        wish = self.network
        dhcp = self._dhcp_server()
        if dhcp is None:
            dhcp = self.vbox.createDHCPServer('HostInterfaceNetworking-' + wish['interface'])
        wanted = (wish['dhcp_server'], wish['netmask'], wish['dhcp_lower'], wish['dhcp_upper'])
        if (dhcp.IPAddress, dhcp.networkMask, dhcp.lowerIP, dhcp.upperIP) != wanted:
            dhcp.setConfiguration(*wanted)
        self._announce_router(dhcp)
        if not dhcp.enabled:
            dhcp.enabled = True

    def _announce_router(self, dhcp: Any) -> None:
        """The guest looks for the broker at its gateway, which is this host."""
        router = self.network['host_ip']
        if self.api() >= (6, 1):
            dhcp.globalConfig.setOption(self.const('DHCPOption_Routers'),
                                        self.const('DHCPOptionEncoding_Normal'), router)
        else:
            dhcp.addGlobalOption(self.const('DhcpOpt_Router'), router)

    def _mac_network(self) -> Any:
        for each in self.array(self.vbox, 'hostOnlyNetworks'):
            if each.networkName == self.network['interface']:
                return each
        return None

    def _network_on_mac(self) -> Dict[str, Any]:
        found = self._mac_network()
        return {'mode': self.network['mode'], 'interface': self.network['interface'],
                'hostIp': self.network['host_ip'] if found else '',
                'netmask': found.networkMask if found else '',
                'dhcp': {'server': '', 'lower': found.lowerIP if found else '',
                         'upper': found.upperIP if found else '',
                         'enabled': bool(found and found.enabled)}}

    def _setup_on_mac(self) -> None:
        network = self._mac_network()
        if network is None:
            network = self.vbox.createHostOnlyNetwork(self.network['interface'])
        network.networkMask = self.network['netmask']
        network.lowerIP, network.upperIP = self.network['host_ip'], self.network['dhcp_upper']
        network.enabled = True

    # verbs: is all well?

    def check(self, job: Job) -> List[Tuple[bool, str, str]]:
        try:
            self._ensure_connected()
        except VMHostError as error:
            return [(False, 'VirtualBox', str(error))] + [module_line()]
        lines = [version_line(self.vbox.version, self.api()), module_line(), self._vtx_line()]
        if self.network['mode'] == 'hostonly':
            lines += self._network_lines()
        lines.append(self._desktop_line())
        return lines

    def _vtx_line(self) -> Tuple[bool, str, str]:
        has = self.vbox.host.getProcessorFeature(self.const('ProcessorFeature_HWVirtEx'))
        return (bool(has), 'hardware virtualisation (VT-x, AMD-V)',
                '' if has else 'switch it on in the firmware (BIOS), and off in other hypervisors '
                '(KVM, Hyper-V); without it VMs do not start, or crawl')

    def _network_lines(self) -> List[Tuple[bool, str, str]]:
        name = self.network['interface']
        problem = address_problem(self.network) or range_problem(self.network['host_ip'])
        lines = [(not problem, 'addresses of the host-only network', problem)]
        now = self.get_network(Job({'id': 0, 'verb': 'get_network', 'args': []}, 1, self._tell))
        there = now['hostIp'] == self.network['host_ip'] and is_local(now['hostIp'])
        mend = '`vmhost.py host.ini call setupNetwork` makes it, or manage=yes in [Network]'
        lines.append((there, 'interface %s with address %s' % (name, self.network['host_ip']),
                      '' if there else mend))
        lines.append((now['dhcp']['enabled'], 'DHCP server of ' + name,
                      '' if now['dhcp']['enabled'] else mend))
        return lines

    def _desktop_line(self) -> Tuple[bool, str, str]:
        pack = self.vbox.systemProperties.defaultVRDEExtPack
        return (bool(pack), 'remote desktop server' + (' (%s)' % pack if pack else ''),
                '' if pack else 'install the extension pack of this version from virtualbox.org: '
                'VBoxManage extpack install FILE; all else works without it')

    # verbs: looking in

    def get_stats(self, job: Job, vm: str, key: str) -> Steps:
        """Collection begins with the first question, which therefore takes 2 s."""
        machine = self.find(vm)
        collector = self.vbox.performanceCollector
        if machine.id not in self._measured:
            collector.setupMetrics(['*'], [machine], 1, 10)
            self._measured.add(machine.id)
        wanted = time.monotonic() + 3
        rows = self._query(collector, machine, key)
        while not rows and time.monotonic() < wanted:
            yield 0.3
            rows = self._query(collector, machine, key)
        return rows

    def _query(self, collector: Any, machine: Any, key: str) -> List[Dict[str, Any]]:
        answer = self.manager.getPerfCollector(self.vbox).query(['*'], [machine])
        return [{'name': row['name'], 'unit': row['unit'],
                 'values': [value / float(row['scale'] or 1) for value in row['values']]}
                for row in answer if row['values'] and metric_matches(row['name'], key)]

    def get_log(self, job: Job, vm: str, tail: int) -> str:
        path = self.find(vm).queryLogFilename(0)
        try:
            with open(path, 'rb') as log_file:
                size = log_file.seek(0, os.SEEK_END)
                log_file.seek(max(0, size - max(0, tail)))
                return log_file.read(max(0, tail)).decode('utf-8', 'replace')
        except FileNotFoundError:
            return ''                               # it never ran

    def screenshot(self, job: Job, vm: str) -> Steps:
        machine = yield from self.ready(job, vm, 'screenshot')
        session = yield from self.lock(job, machine)
        try:
            while True:
                try:
                    return self._shoot(session.console.display)
                except Exception as error:          # none yet, just after the start
                    if self._code(error) != NOT_SUPPORTED:
                        raise
                    job.check_deadline(self.translate(error))
                yield 0.2
        finally:
            self.unlock(session)

    def _shoot(self, display: Any) -> str:
        width, height = display.getScreenResolution(0)[:2]
        png = display.takeScreenShotToArray(0, width or 640, height or 480,
                                            self.const('BitmapFormat_PNG'))
        return base64.b64encode(bytes(bytearray(png))).decode()

    # verbs: limits and remote desktop

    def set_limits(self, job: Job, vm: str, limits: Dict[str, Any]) -> Steps:
        wish = read_limits(limits)
        machine = yield from self.ready(job, vm, 'set_limits')
        yield from self.edit(job, machine, lambda mutable: self._limit(mutable, wish))
        return True

    def _limit(self, machine: Any, limits: Dict[str, Any]) -> None:
        if 'cpuPercent' in limits:
            machine.CPUExecutionCap = limits['cpuPercent']
        if 'netKBps' in limits:
            self._limit_rate(machine, limits['netKBps'] * 1024)
        if 'network' in limits:
            for card in self.cards(machine):
                card.cableConnected = limits['network']

    def _limit_rate(self, machine: Any, rate: int) -> None:
        """The rate can be altered while the VM runs; which cards it is of, can not."""
        control = machine.bandwidthControl
        groups = {group.name: group for group in self.array(control, 'allBandwidthGroups')}
        cards = [card for card in self.cards(machine) if rate and not self._is_limited(card)]
        if cards and self.state_of(machine) in ONLINE:
            raise BadState('the first netKBps of a VM, or of a new card, can only be set while it is off')
        if BANDWIDTH_GROUP in groups:
            groups[BANDWIDTH_GROUP].maxBytesPerSec = rate
        elif cards:
            control.createBandwidthGroup(BANDWIDTH_GROUP, self.const('BandwidthGroupType_Network'), rate)
        for card in cards:
            card.bandwidthGroup = control.getBandwidthGroup(BANDWIDTH_GROUP)

    def _is_limited(self, card: Any) -> bool:
        group = card.bandwidthGroup
        return group is not None and group.name == BANDWIDTH_GROUP

    def remote_desktop(self, job: Job, vm: str, enable: bool, options: Dict[str, Any]
                       ) -> Steps:
        wish = self._desktop_wish(options)
        machine = self.find(vm)
        if enable and not self.vbox.systemProperties.defaultVRDEExtPack:
            raise NotSupported('VirtualBox has no remote desktop server: install its extension '
                               'pack (VBoxManage extpack install …)')
        yield from self.own(job, machine)
        yield from self.settled(job, machine)
        if enable:
            check_desktop_address(wish['address'])
            wish['port'] = wish['port'] or self._free_desktop_port(machine, wish['address'])
        yield from self.edit(job, machine,
                             lambda mutable: self._switch_desktop(mutable, enable, wish))
        return self._desktop_of(machine)

    def _desktop_wish(self, options: Dict[str, Any]) -> Dict[str, Any]:
        """[RemoteDesktop], and the options over it, checked."""
        wish = dict(self.desktop, port=0)
        del wish['ports']
        unknown = set(options) - set(wish)
        if unknown:
            raise InvalidParams('remoteDesktop knows no option %s; it knows %s' % (
                ', '.join(sorted(unknown)), ', '.join(sorted(wish))))
        wish.update(options)
        wish['port'] = read_option('port', wish['port'], agent.integer(0, 65535))
        for key, known in (('auth', self._auth_types()), ('security', DESKTOP_SECURITY)):
            if str(wish[key]).lower() not in known:
                raise InvalidParams('%s is %s, not %r' % (key, either(sorted(known)), wish[key]))
        wish['security'] = DESKTOP_SECURITY[str(wish['security']).lower()]
        return wish

    def _switch_desktop(self, machine: Any, enable: bool, wish: Dict[str, Any]) -> None:
        server = machine.VRDEServer
        if enable:
            server.authType = self._auth_types()[str(wish['auth']).lower()]
            server.setVRDEProperty('TCP/Address', str(wish['address']))
            server.setVRDEProperty('TCP/Ports', str(wish['port']))
            server.setVRDEProperty('Security/Method', wish['security'])
        server.enabled = enable

    def _auth_types(self) -> Dict[str, int]:
        names = self.manager.constants.all_values('AuthType')
        return {name.lower(): code for name, code in names.items()}

    def _free_desktop_port(self, machine: Any, address: str) -> int:
        taken = {self._desktop_of(each)['port'] for each in self.machines_now()
                 if each.id != machine.id and each.VRDEServer.enabled}
        return self._free_port(self.desktop['ports'], address, taken)

    def _free_port(self, ports: str, address: str, taken: set) -> int:
        low, _, high = ports.partition('-')
        for port in range(int(low), int(high) + 1):
            if port not in taken and port_is_free(address, port):
                return port
        raise HypervisorError('no port of %s is free on %s' % (ports, address))

    def _desktop_of(self, machine: Any) -> Dict[str, Any]:
        server = machine.VRDEServer
        port = re.split(r'\D', server.getVRDEProperty('TCP/Ports') or '')[0]
        auth = {code: name for name, code in self._auth_types().items()}
        return {'enabled': bool(server.enabled), 'port': int(port or 0),
                'address': server.getVRDEProperty('TCP/Address') or '',
                'auth': auth.get(server.authType, ''),
                'security': server.getVRDEProperty('Security/Method') or ''}

    # NAT: the guest's Chirp port on our loopback

    def chirp_endpoint(self, job: Job, vm: str) -> Steps:
        machine = self.find(vm)
        rule = self._chirp_rule(self.card_of(machine))
        if not rule:
            yield from self.own(job, machine)
            yield from self.settled(job, machine)
            yield from self.edit(job, machine, self.forward_chirp)
            rule = self._chirp_rule(self.card_of(machine))
        if not rule:
            raise HypervisorError('%s has no NAT card: its Chirp port can not be reached'
                                  % machine.name)
        return [rule[2], int(rule[3])]

    def _chirp_rule(self, card: Any) -> Optional[List[str]]:
        """name, protocol, host address, host port, guest address, guest port."""
        if card is None or card.attachmentType != self.const('NetworkAttachmentType_NAT'):
            return None
        for row in self.array(card.NATEngine, 'redirects'):
            rule = row.split(',')
            if rule[0] == CHIRP_RULE and rule[5] == str(self.chirp_port):
                return rule
        return None

    def forward_chirp(self, machine: Any) -> None:
        """Give the VM what NAT mode needs; `machine` is a session's mutable one."""
        card = self.card_of(machine)
        if card is None or card.attachmentType != self.const('NetworkAttachmentType_NAT'):
            return
        engine = card.NATEngine
        rule = self._chirp_rule(card)
        if self.state_of(machine) in OFF:
            self._reach_localhost(engine)
            if rule and not port_is_free(rule[2], int(rule[3])):
                rule = None                         # meanwhile, another program listens there
        if rule:
            return
        names = [row.split(',')[0] for row in self.array(engine, 'redirects')]
        if CHIRP_RULE in names:
            engine.removeRedirect(CHIRP_RULE)
        engine.addRedirect(CHIRP_RULE, self.const('NATProtocol_TCP'), '127.0.0.1',
                           self._free_forward_port(), '', self.chirp_port)

    def _reach_localhost(self, engine: Any) -> None:
        if self.api() >= (7, 0):                    # before, it could always be reached
            engine.localhostReachable = True

    def _free_forward_port(self) -> int:
        taken = {int(row.split(',')[3]) for machine in self.machines_now()
                 for card in self.cards(machine)
                 for row in self.array(card.NATEngine, 'redirects')}
        while True:
            with socket.socket() as probe:
                probe.bind(('127.0.0.1', 0))
                port = probe.getsockname()[1]
            if port not in taken:
                return port

    def api(self) -> Tuple[int, int]:
        """Version of the API: some calls' arguments differ."""
        major, minor = self.vbox.APIVersion.split('_')[:2]
        return int(major), int(minor)


# Plain helpers.

def fault_of(code: int, text: str) -> VMHostError:
    """VirtualBox's code and text as an error of ours."""
    if any(word in text for word in NO_DRIVER) or (
            'unexpectedly during startup' in text and not module_line()[0]):
        text += ' -- ' + MEND_DRIVER
    return FAULT_OF_CODE.get(code, HypervisorError)('%s (VirtualBox 0x%08x)'
                                                    % (' '.join(text.split()), code))


def error_text(info: Any) -> str:
    """The text of an IVirtualBoxErrorInfo and of those chained to it."""
    texts = []
    while info is not None:
        if info.text:
            texts.append(info.text)
        info = info.next
    return '; '.join(texts) or 'no reason given'


def progress_of(answer: Any) -> Any:
    """Methods with a Progress and further results answer with a tuple, Progress first or last."""
    if not isinstance(answer, (tuple, list)):
        return answer
    return next(part for part in answer if hasattr(part, 'completed'))


def colons(mac: str) -> str:
    """080027AABBCC as 08:00:27:AA:BB:CC."""
    return ':'.join(mac[at:at + 2] for at in range(0, len(mac), 2)).upper()


def either(names: Any) -> str:
    names = list(names)
    return names[0] if len(names) == 1 else ', '.join(names[:-1]) + ' or ' + names[-1]


def metric_matches(name: str, key: str) -> bool:
    """`*` means all but the averages, minima and maxima, which have a colon in their name."""
    return fnmatch.fnmatchcase(name, key or '*') and (':' in key or ':' not in name)


def port_is_free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def wishes(options: Dict[str, Any]) -> Dict[str, Any]:
    """createVM's options, checked; None or '' where nothing was asked for."""
    wish = {'memory': None, 'cpus': None, 'ostype': '', 'network': '', 'diskSize': None,
            'keep': False}  # type: Dict[str, Any]
    unknown = set(options) - set(wish)
    if unknown:
        raise InvalidParams('createVM knows no option %s; it knows %s' % (
            ', '.join(sorted(unknown)), ', '.join(sorted(wish))))
    wish.update(options)
    for name, least in (('memory', 4), ('cpus', 1), ('diskSize', 0)):
        if wish[name] is not None:
            wish[name] = read_option(name, wish[name], agent.integer(least, LARGEST))
    wish['keep'] = read_option('keep', wish['keep'], agent.yes_no)
    if wish['network'] not in ('', 'hostonly', 'nat', 'none'):
        raise InvalidParams('network is hostonly, nat or none, not %r' % wish['network'])
    return wish


def unfinished() -> str:
    """The note of a disk that is about to be made. Two seconds are what some file systems' clocks are off."""
    return DISK_UNFINISHED + '%d' % (time.time() - 2)


def is_recent(location: str, note: str) -> bool:
    """Whether there is a file, and none that is older than what was noted as unfinished."""
    try:
        written = os.path.getmtime(location)
    except OSError:
        return False
    return not note.startswith(DISK_UNFINISHED) or written >= int(note[len(DISK_UNFINISHED):])


def is_noted(disk: Any, note: str) -> bool:
    """Whether the disk is the one that this note of ours is about."""
    if note.startswith(DISK_UNFINISHED):
        return is_recent(disk.location, note)
    return bool(disk.id == note)


def has_mark(machine: Any, key: str) -> bool:
    """Whether the VM itself has this mark of ours, and not just one that it was cloned from."""
    return bool(machine.getExtraData(key) == machine.id)


def names_its_own_mark(settings: str) -> bool:
    """has_mark of MADE_BY_US, from the text of a .vbox file."""
    uuid = re.search(r'<Machine\b[^>]*\suuid="{(.+?)}"', settings)
    return uuid is not None and 'name="%s" value="%s"' % (MADE_BY_US, uuid.group(1)) in settings


def check_fitting(options: Dict[str, Any], kind: str) -> None:
    """Options that would change nothing, since the image decides, are refused rather than forgotten."""
    if kind in ('', '.iso'):
        return
    decided = {'.vbox': tuple(options), '.ova': ('diskSize', 'ostype'), '.ovf': ('diskSize', 'ostype')}
    for name in decided.get(kind, ('diskSize',)):
        if options.get(name) not in (None, ''):
            raise InvalidParams('%s is no option where a VM is made from a %s file, which decides it'
                                % (name, kind))


def read_option(name: str, value: Any, kind: Callable[[str], Any]) -> Any:
    """An option's value, as a client sent it. Raises InvalidParams, which names it and says what it is."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)                          # as some clients send numbers
    try:
        return kind(str(value))
    except ValueError as error:
        raise InvalidParams('%s is %s, not %r' % (name, error, value))


def read_limits(limits: Dict[str, Any]) -> Dict[str, Any]:
    """setLimits' limits, checked."""
    kinds = {'cpuPercent': agent.integer(1, 100), 'netKBps': agent.integer(0, LARGEST),
             'network': agent.yes_no}  # type: Dict[str, Callable[[str], Any]]
    unknown = set(limits) - set(kinds)
    if unknown:
        raise InvalidParams('no limit is called ' + ', '.join(sorted(unknown)))
    return {name: read_option(name, value, kinds[name]) for name, value in limits.items()}


def check_desktop_address(address: Any) -> None:
    """VirtualBox takes any text, and then listens nowhere, or everywhere."""
    try:
        known = is_local(str(ipaddress.IPv4Address(str(address))))
    except ValueError:
        known = False
    if not known:
        raise InvalidParams('address is an IPv4 address of this machine, not %r' % address)


def remove_leavings(folder: str) -> None:
    """Settings of an unregistered VM of ours whose disk has gone; and the folder, once empty."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.endswith(('.vbox', '.vbox-prev')):
            with open(path, encoding='utf-8', errors='replace') as settings:
                ours = names_its_own_mark(settings.read())
            if ours:
                os.remove(path)
    if not os.listdir(folder):
        os.rmdir(folder)


def address_problem(network: Dict[str, Any]) -> str:
    """What is wrong with the addresses of [Network], '' when nothing is."""
    try:
        net = ipaddress.ip_network('%s/%s' % (network['host_ip'], network['netmask']), False)
        for key in ('dhcp_server', 'dhcp_lower', 'dhcp_upper'):
            if ipaddress.ip_address(network[key]) not in net:
                return '[Network] %s=%s is not in the network %s' % (key, network[key], net)
        lower, upper, host = (int(ipaddress.ip_address(network[key]))
                              for key in ('dhcp_lower', 'dhcp_upper', 'host_ip'))
    except ValueError as error:
        return '[Network]: %s' % error
    if lower > upper:
        return '[Network] dhcp_lower is above dhcp_upper'
    if lower <= host <= upper:
        return '[Network] host_ip is among the addresses that DHCP gives away'
    return ''


def range_problem(host_ip: str, path: str = '/etc/vbox/networks.conf') -> str:
    """On Linux, macOS and Solaris, VirtualBox allows host-only addresses in some ranges alone."""
    if sys.platform == 'win32':
        return ''
    ranges = allowed_ranges(path)
    if any(ipaddress.ip_address(host_ip) in each for each in ranges):
        return ''
    return ('VirtualBox does not allow the address %s for a host-only network, but %s: take one of '
            'these, or add a line `* RANGE/BITS` to %s'
            % (host_ip, ', '.join(str(each) for each in ranges) or 'none', path))


def allowed_ranges(path: str) -> List[Any]:
    try:
        with open(path) as conf:
            lines = [line.split() for line in conf]
    except OSError:
        return [ipaddress.ip_network('192.168.56.0/21')]
    words = [word for line in lines if line[:1] == ['*'] for word in line[1:]]
    return [ipaddress.ip_network(word, False) for word in words if ':' not in word]


def is_local(address: str) -> bool:
    """Has this machine the address?"""
    return port_is_free(address, 0)


def version_line(version: str, api: Tuple[int, int]) -> Tuple[bool, str, str]:
    recent = api >= OLDEST
    return (recent, 'VirtualBox ' + version,
            '' if recent else 'too old: %d.%d or later is needed' % OLDEST)


def module_line() -> Tuple[bool, str, str]:
    """Whether the kernel has VirtualBox's driver; known on Linux alone."""
    there = not sys.platform.startswith('linux') or os.path.exists('/dev/vboxdrv')
    return there, 'kernel module vboxdrv', '' if there else MEND_DRIVER


# --- transfers -------------------------------------------------------------------------------

TRANSFERS_KEPT = 1000          # ended ones that are remembered
TRANSFERS_WAITING = 10000
CHIRP_TIMEOUT = 30.0           # seconds of silence that a Chirp server may keep
OUTPUT_READ = 4 * 1024 * 1024  # bytes that are read of fetched output at once
ACK_DELAY = 0.02               # seconds in which results gather that one sync serves
LOOKUP_EVERY = 1.0             # seconds between two lookups of names that VirtualBox might have
NAMES_WAITING = 1000           # guests whose names are looked up at once
FETCHERS = 2                   # threads that fetch output of commands
FETCH_PATIENCE = 600.0         # seconds after a command's end in which its output is tried for


class Workers:
    """Threads that do what is asked of them, in the order of asking. Safe from any thread.

    Not concurrent.futures: its threads hold up the end of the process until the last job is done.
    """

    def __init__(self, name: str, count: int) -> None:
        self._name = name
        self._count = count
        self._jobs = queue.Queue()     # type: queue.Queue
        # Guards the list of threads; nothing but their start happens while it is held.
        self._lock = threading.Lock()
        self._threads = []             # type: List[threading.Thread]

    def do(self, job: Callable[[], None]) -> None:
        """Has it done on one of the threads; returns at once."""
        self._jobs.put(job)
        with self._lock:
            if len(self._threads) < self._count:
                name = '%s-%d' % (self._name, len(self._threads) + 1)
                thread = threading.Thread(target=self._run, name=name, daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:      # the job waits for another thread, or for the next job's
                    log.warning('thread %s can\'t be started: %s', name, error)
                    return
                self._threads.append(thread)

    def waiting(self) -> int:
        """How many jobs have not begun."""
        return self._jobs.qsize()

    def stop(self, deadline: float) -> None:
        """Lets what is being done end, until that monotonic time; drops what has not begun."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning('thread %s still runs', thread.name)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            try:
                job()
            except Exception:       # one job's end is not the worker's
                log.exception('in a job')


class Transfer:
    """A file or folder on its way. ``state``: waiting, running, done, failed or cancelled."""

    def __init__(self, direction: str, vm: str, source: str, target: str) -> None:
        self.id = 'transfer-' + secrets.token_hex(6)
        self.direction = direction
        self.vm = vm
        self.source = source
        self.target = target
        self.state = 'waiting'
        self.error = ''
        self.bytes = 0
        self.total = 0
        self.began = self.ended = 0.0          # monotonic
        self.cancelled = threading.Event()
        self.done = threading.Event()
        self.place = self._place()

    @property
    def is_under_way(self) -> bool:
        return self.state in ('waiting', 'running')

    def go_into_target(self) -> None:
        """What is sent goes into its target, a folder, under its own name."""
        self.target = posixpath.join(self.target, default_target(self.direction, self.source))
        self.place = self._place()

    def _place(self) -> Tuple[str, ...]:
        """Where it goes, however that is written."""
        if self.direction == 'put':
            return self.vm, posixpath.normpath('/' + self.target.lstrip('/'))
        return (os.path.realpath(self.target),)

    def progress(self, moved: int, total: int) -> None:
        """What the Chirp client tells from time to time."""
        self.bytes, self.total = moved, total

    def shown(self) -> Dict[str, Any]:
        """For the API; rate in bytes per second."""
        seconds = (self.ended or time.monotonic()) - self.began if self.began else 0
        return {'id': self.id, 'direction': self.direction, 'vm': self.vm, 'source': self.source,
                'target': self.target, 'state': self.state, 'error': self.error,
                'bytes': self.bytes, 'total': self.total,
                'rate': self.bytes / seconds if seconds > 0 else 0.0}


class Transfers:
    """Files to and from guests, by Chirp. ``max_transfers`` at once, the others wait their turn.

    Safe from any thread; the work is done on the threads ``transfer-N``.
    """

    def __init__(self, host: 'Host', count: int) -> None:
        self._host = host
        self._workers = Workers('transfer', count)
        # Guards the table, and the step from waiting to running or cancelled; nothing is called while it is
        # held.
        self._lock = threading.Lock()
        self._known = collections.OrderedDict()  # type: collections.OrderedDict

    def start(self, direction: str, vm: str, source: str, target: str) -> Transfer:
        """Puts a transfer, ``put`` or ``get``, into the queue. Raises InvalidParams, NoSuchVM, …"""
        if direction not in ('put', 'get'):
            raise InvalidParams('direction is put (to the VM) or get (from it), not %.40r' % direction)
        guest = self._host.connected(vm)
        if not source or '\0' in source + target:
            raise InvalidParams('source and target should be paths')
        if self._workers.waiting() >= TRANSFERS_WAITING:
            raise Busy('%d transfers wait already' % TRANSFERS_WAITING)
        transfer = Transfer(direction, guest.name, source, target or default_target(direction, source))
        if direction == 'put' and target.endswith('/') and not os.path.isdir(source):
            transfer.go_into_target()
        with self._lock:
            self._check_place(transfer)
            self._known[transfer.id] = transfer
            ended = [known for known in self._known.values() if known.done.is_set()]
            for known in ended[:max(0, len(self._known) - TRANSFERS_KEPT)]:
                del self._known[known.id]
        self._workers.do(lambda: self._run(transfer))
        return transfer

    def _check_place(self, transfer: Transfer) -> None:
        """Two that go to one place at once would write into each other's partial files. Raises Busy."""
        for known in self._known.values():
            if known is not transfer and known.place == transfer.place and known.is_under_way:
                raise Busy('%s goes to %.200s already' % (known.id, transfer.target))

    def get(self, id: str) -> Transfer:
        """Raises InvalidParams for an id that is unknown, or ended long ago."""
        with self._lock:
            if id not in self._known:
                raise InvalidParams('no transfer %.100s' % id)
            return self._known[id]

    def list(self) -> List[Dict[str, Any]]:
        """All that are remembered, for the status page."""
        with self._lock:
            known = list(self._known.values())
        return [transfer.shown() for transfer in known]

    def cancel(self, id: str) -> bool:
        """Has it end, at once where it waits. False where it has ended. Raises InvalidParams."""
        transfer = self.get(id)
        if transfer.done.is_set():
            return False
        transfer.cancelled.set()
        if self._leaves_queue(transfer, 'cancelled'):
            transfer.error = 'cancelled before it began'
            self._end(transfer)
        return True

    def _leaves_queue(self, transfer: Transfer, state: str) -> bool:
        """From waiting to another state; False where it doesn't wait any more."""
        with self._lock:
            if transfer.state != 'waiting':
                return False
            transfer.state = state
            return True

    def stop(self, deadline: float) -> None:
        """Cancels all, and waits for them until that monotonic time."""
        with self._lock:
            for transfer in self._known.values():
                transfer.cancelled.set()
        self._workers.stop(deadline)

    def _run(self, transfer: Transfer) -> None:
        if not self._leaves_queue(transfer, 'running'):
            return
        transfer.began = time.monotonic()
        try:
            if transfer.cancelled.is_set():
                raise chirpwire.Cancelled('cancelled before it began')
            with self._host.chirp_client(self._host.connected(transfer.vm)) as client:
                if transfer.direction == 'put':
                    self._aim(client, transfer)
                move = client.put if transfer.direction == 'put' else client.get
                move(transfer.source, transfer.target, progress=transfer.progress,
                     cancel=transfer.cancelled)
            transfer.state = 'done'
        except (VMHostError, chirpwire.ChirpError, OSError) as error:
            transfer.state = 'cancelled' if transfer.cancelled.is_set() else 'failed'
            transfer.error = str(error) or type(error).__name__
        except Exception as error:
            transfer.state, transfer.error = 'failed', '%s: %s' % (type(error).__name__, error)
            log.exception('in %s', transfer.id)
        finally:
            self._end(transfer)

    def _aim(self, client: chirpclient.ChirpClient, transfer: Transfer) -> None:
        """Has the folders that a file or folder is to be in. Raises Busy."""
        make_parents(client, transfer.target)
        if not os.path.isdir(transfer.source) and is_folder(client, transfer.target):
            with self._lock:
                transfer.go_into_target()
                self._check_place(transfer)

    def _end(self, transfer: Transfer) -> None:
        """Notes the end in the journal, and wakes who waits for it, whatever becomes of the note."""
        transfer.ended = time.monotonic()
        try:
            text = '%s %s to %s %s' % (transfer.direction, transfer.source, transfer.target, transfer.error)
            with self._host.journal_permitting():
                self._host.journal.event('transfer-' + transfer.state, transfer.vm, '',
                                         text.translate(XML_UNSAFE))
        finally:
            transfer.done.set()


def make_parents(client: chirpclient.ChirpClient, target: str) -> None:
    """Makes the folders in a guest that a target is to be in, where they are missing."""
    names = [name for name in target.split('/')[:-1] if name]
    for depth in range(1, len(names) + 1):
        with contextlib.suppress(chirpwire.Refused):        # it is there; or the put will say what is wrong
            client.mkdir('/' + '/'.join(names[:depth]))


def is_folder(client: chirpclient.ChirpClient, path: str) -> bool:
    """Whether that is a folder in a guest."""
    try:
        return client.stat(path).is_dir
    except chirpwire.Refused:
        return False


def default_target(direction: str, source: str) -> str:
    """The source's own name: at the root of what a guest serves, or in the working directory."""
    name = os.path.basename(source.rstrip('/' + (os.sep if direction == 'put' else '')))
    if not name or name in ('.', '..'):
        raise InvalidParams('name the target: %.100r has no name of its own' % source)
    return name


class Fetcher:
    """Fetches the output of commands beyond what came with the results, by Chirp.

    Into ``state_dir/output``, under names made here; no text of a guest is part of a path.
    """

    def __init__(self, host: 'Host') -> None:
        self._host = host
        self._workers = Workers('fetch', FETCHERS)
        # Guards what follows; nothing is called while it is held.
        self._lock = threading.Lock()
        self._under_way = {}           # type: Dict[Tuple[str, str], threading.Event]    # to cancel it
        self._sweeps = False

    def path(self, execution: Execution, stream: str) -> str:
        """Where the output of a command is, or would be."""
        vm = hashlib.sha256(execution.vm_id.encode('utf-8')).hexdigest()[:16]
        return os.path.join(self._host.folder.file('output'), '%s.%s.%s' % (
            execution.cmd_id, vm, stream))

    def begin(self, execution: Execution) -> None:
        """Fetches in the background; CMD_ACK is said at the end."""
        cancel = threading.Event()
        with self._lock:
            if self._under_way.setdefault(execution.index, cancel) is not cancel:
                return
        self._workers.do(lambda: self._fetch(execution, cancel))

    def stop(self, deadline: float) -> None:
        """Cancels what is being fetched, and waits for that until that monotonic time. The guest says its
        results again, and the next host goes on."""
        with self._lock:
            for cancel in self._under_way.values():
                cancel.set()
        self._workers.stop(deadline)

    def read(self, execution: Execution, stream: str, offset: int, length: int) -> bytes:
        """A slice of what was fetched; empty where it wasn't, or not so far."""
        try:
            with open(self.path(execution, stream), 'rb') as file:
                file.seek(offset)
                return file.read(min(length, OUTPUT_READ))
        except FileNotFoundError:
            return b''

    def sweep(self) -> None:
        """Deletes in the background what belongs to no command in the journal."""
        with self._lock:
            if self._sweeps:
                return
            self._sweeps = True
        self._workers.do(self._sweep)

    def _sweep(self) -> None:
        with self._lock:
            self._sweeps = False
        folder = self._host.folder.file('output')
        if not os.path.isdir(folder):
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if self._host.stopping.is_set():
                    return
                if self._host.journal.command(entry.name.split('.')[0]) is None:
                    remove_file(entry.path)

    def forget(self, execution: Execution) -> None:
        """Deletes what was fetched; what is being fetched is cancelled, and then deleted."""
        with self._lock:
            cancel = self._under_way.get(execution.index)
            if cancel is not None:
                cancel.set()
                return
        self._delete(execution)

    def _delete(self, execution: Execution) -> None:
        for stream in ('out', 'err'):
            path = self.path(execution, stream)
            remove_file(path)
            remove_file(chirplocal.local_part(path))

    def _fetch(self, execution: Execution, cancel: threading.Event) -> None:
        over = False
        try:
            over = self._try_to_fetch(execution, cancel)
        finally:
            with self._lock:
                del self._under_way[execution.index]
        if cancel.is_set() and self._host.commands.finished(*execution.index) is None:
            self._delete(execution)        # it was forgotten meanwhile
            over = True
        if over:
            self._host.say(protocol.CMD_ACK.howToSay(execution.vm_id, execution.cmd_id))

    def _try_to_fetch(self, execution: Execution, cancel: threading.Event) -> bool:
        """Whether all output is here that ever will be. If not, the guest sends its results again in
        30 s, and so we come back here."""
        try:
            if self._is_unfetched(execution):
                self._fetch_streams(execution, cancel)
        except (chirpwire.ChirpError, VMHostError, OSError) as error:
            return self._gives_up(execution, error)
        except Exception:
            log.exception('fetching the output of %s', execution.key)
            return False
        self._host.commands.fetched(execution)
        return True

    def _is_unfetched(self, execution: Execution) -> bool:
        """Whether the journal still says so: results that came again meanwhile are older than that."""
        now = self._host.commands.finished(*execution.index)
        return now is not None and not now.fetched

    def _gives_up(self, execution: Execution, error: Exception) -> bool:
        """Whether the rest of the output is left to the guest, which keeps it for keep_spool."""
        if isinstance(error, chirpwire.Cancelled):
            return False
        last = isinstance(error, (chirpwire.Refused, NoFiles)) or isinstance(error, chirpwire.ChirpError) \
            and time.time() - execution.ended > FETCH_PATIENCE     # not where this disk is full
        log.log(logging.WARNING if last else logging.INFO, 'output of %s can\'t be fetched%s: %s',
                execution.key, ', and stays in the guest for its keep_spool' if last else ' now', error)
        if last:
            self._host.commands.fetched(execution)
        return last

    def _fetch_streams(self, execution: Execution, cancel: threading.Event) -> None:
        """To the disk, not only to the system: the guest is told that it may delete its own."""
        results = execution.answer()
        guest = self._host.connected(execution.vm_id)
        folder = self._host.folder.file('output')
        if not os.path.isdir(folder):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            agent.sync(self._host.folder.path)
        with self._host.chirp_client(guest) as client:
            for stream in ('out', 'err'):
                if results[stream + '-offset']:
                    target = self.path(execution, stream)
                    limit = min(results[stream + '-size'], self._host.settings.Host.fetch_limit)
                    client.fetch(results['spool'] + '/' + stream, target, limit, cancel=cancel)
                    agent.sync(target)
        agent.sync(folder)


def remove_file(path: str) -> None:
    """Deletes a file, if it is there and can be."""
    with contextlib.suppress(OSError):
        os.remove(path)


class Acknowledger:
    """Says CMD_ACK for results that are journalled, once they are on the disk. Safe from any thread.

    On a thread of its own, a moment later: so one sync serves all that came meanwhile, and whoever
    waits for the results gets them first.
    """

    def __init__(self, host: 'Host') -> None:
        self._host = host
        self._workers = Workers('acknowledge', 1)
        # Guards the list; nothing is called while it is held.
        self._lock = threading.Lock()
        self._journalled = []          # type: List[Tuple[str, str]]

    def acknowledge(self, vm_id: str, cmd_id: str) -> None:
        """Has it said; returns at once."""
        with self._lock:
            self._journalled.append((vm_id, cmd_id))
            is_first = len(self._journalled) == 1
        if is_first:
            self._workers.do(self._acknowledge_all)

    def stop(self, deadline: float) -> None:
        """Lets it end, until that monotonic time; guests send again what nobody acknowledged."""
        self._workers.stop(deadline)

    def _acknowledge_all(self) -> None:
        self._host.stopping.wait(ACK_DELAY)
        with self._lock:
            journalled, self._journalled = self._journalled, []
        try:
            self._host.journal.sync()
        except JournalError as error:
            log.error('%d results are not acknowledged: %s', len(journalled), error)
            return                  # the guests send them again
        for vm_id, cmd_id in journalled:
            self._host.say(protocol.CMD_ACK.howToSay(vm_id, cmd_id))


class NameLookup:
    """Has guests renamed that VirtualBox wasn't seen to have. Safe from any thread.

    On a thread of its own, since VirtualBox may take its time; and once a second at most, however often
    a guest says HELLO: so a guest that says nothing else costs no more than one that is quiet.
    """

    def __init__(self, rename: Callable[[Guest], None], stopping: threading.Event) -> None:
        self._rename = rename
        self._stopping = stopping
        self._workers = Workers('name-lookup', 1)
        # Guards the guests that wait; nothing is called while it is held.
        self._lock = threading.Lock()
        self._waiting = {}             # type: Dict[str, Guest]

    def look_up(self, guest: Guest) -> None:
        """Has it done; returns at once. With too many waiting, not: it will say HELLO again."""
        with self._lock:
            is_first = not self._waiting
            if len(self._waiting) < NAMES_WAITING:
                self._waiting[guest.id] = guest
        if is_first:
            self._workers.do(self._look_up_all)

    def stop(self, deadline: float) -> None:
        """Lets it end, until that monotonic time."""
        self._workers.stop(deadline)

    def _look_up_all(self) -> None:
        with self._lock:
            guests, self._waiting = self._waiting, {}
        for guest in guests.values():
            if not self._stopping.is_set():
                self._rename(guest)
        self._stopping.wait(LOOKUP_EVERY)


# --- the host --------------------------------------------------------------------------------

TICK = 0.25                    # seconds between looks at the clock
SLEPT = 5.0                    # seconds that a tick may be late before the host is said to have slept,
                               # or half of vm_gc_grace, where that is less
RETENTION_EVERY = 60.0         # seconds between looks for what keep_results lets go
SUSPENDED = ('Paused', 'Saved', 'AbortedSaved', 'Saving', 'Restoring', 'LiveSnapshotting',
             'OnlineSnapshotting', 'TeleportingPausedVM')
RETENTION_PAUSE = 1.0          # seconds between the slices of what it lets go
DOUBT = 3600.0                 # seconds without retention after the clock jumped: it may be wrong
TROUBLE_EVERY = 60.0           # seconds between two log lines about a journal that can't be written
CHIRP_PORT = 9094              # where a guest's Chirp server listens, unless it says otherwise
MISSING_GRACE = 5.0            # seconds to answer for a command that a HELLO doesn't list
OUTPUT_SLICE = 256 * 1024      # bytes that one CMD_QUERY asks for, at most
FRAME_RESERVE = 16 * 1024      # bytes of a frame that are not the command's own


class StateFolder:
    """``state_dir``: journal, token, output of commands; one host at a time may use it."""

    def __init__(self, path: str) -> None:
        """Raises VMHostError with a sentence where the folder can't be used."""
        self.path = path
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)
            self._lock = sqlite3.connect(self.file('lock'), isolation_level=None, timeout=0,
                                         check_same_thread=False)
            # A lock of SQLite's works on every system, and ends with the process, however it ends.
            self._lock.execute('BEGIN EXCLUSIVE')
        except OSError as error:
            raise VMHostError('state_dir %s can\'t be used: %s; mend that, or name another folder in [Host]'
                              % (path, error.strerror or error))
        except sqlite3.OperationalError as error:
            if 'locked' in str(error):
                raise Busy('another vmhost runs on the state folder %s; stop it, or give this one '
                           'a state_dir of its own in [Host]' % path)
            raise VMHostError('state_dir %s can\'t be written: %s; %s, or name another folder in [Host]' % (
                path, error, 'make room' if 'full' in str(error) else 'change its owner or mode'))

    def file(self, name: str) -> str:
        """The path of a file in the folder."""
        return os.path.join(self.path, name)

    def secret(self, name: str, make: Callable[[], str] = lambda: secrets.token_urlsafe(24)) -> str:
        """The text of a file that only this user can read; made at the first call."""
        path = self.file(name)
        if not os.path.exists(path):
            temporary = path + '.new'
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, 'w') as file:
                file.write(make().strip() + '\n')
            os.replace(temporary, path)
        with open(path) as file:
            return file.read().strip()

    def close(self) -> None:
        """Lets another host use the folder."""
        self._lock.close()


class Host:
    """The agent: puts the parts together, and says what each word does. ``start``, ``run``, ``stop``.

    The heard_… methods run on the link's thread; ``tick`` on the main thread; all others may be
    called from any thread.
    """
    side = 'host'

    def __init__(self, settings: Any) -> None:
        """Raises VMHostError where state folder or journal can't be used."""
        self.settings = settings
        self.started = time.monotonic()
        self.session = secrets.token_hex(8)
        self.stopping = threading.Event()
        self.broker_address = '', 0            # as it is configured, or listens
        self.aint = 0                          # words that weren't any
        self.folder = StateFolder(settings.Host.state_dir)
        self.token = self.folder.secret('xmlrpc.token')
        self.journal = Journal(self.folder.file('journal.sqlite'))
        self.commands = Commands(self.journal)
        self.transfers = Transfers(self, settings.Host.max_transfers)
        self.fetcher = Fetcher(self)
        self.acknowledger = Acknowledger(self)
        self.name_lookup = NameLookup(self._rename, self.stopping)
        self.guests = Guests(settings.Host.vm_gc_grace)
        for known in self.journal.guests():
            self.guests.remember(*known)
        self.ticket = None                     # type: Optional[chirpticket.Ticket]
        self.hypervisor = None                 # type: Any
        self.broker = None                     # type: Optional[stompbroker.Broker]
        self.policy = None                     # type: Optional[HostPolicy]
        self.link = None                       # type: Optional[protocol.Link]
        self.server = None                     # type: Optional[XMLRPCServer]
        # Guards the two tables of who waits for an answer; nothing is called while it is held.
        self._lock = threading.Lock()
        self._pings = {}                       # type: Dict[str, threading.Event]
        self._missing = {}                     # type: Dict[Tuple[str, str], float]
        self._last_tick = time.monotonic()
        self._last_clock = time.time()
        self._next_retention = self._last_tick + self._first_retention()
        self._next_trouble = 0.0
        self._last_roll_call = 0.0

    def _first_retention(self) -> float:
        """Seconds until something may be let go: more where the clock may be wrong since the last run."""
        away = time.time() - self.journal.last_time()
        if away < DOUBT:
            return RETENTION_EVERY
        log.info('the journal ended %.0f s ago, or the clock is wrong: nothing is let go for %.0f s',
                 away, DOUBT)
        return DOUBT

    # Start and stop.

    def start(self) -> None:
        """Starts everything. Raises VMHostError, BrokerError or ProtocolError with a sentence."""
        self._start_hypervisor()
        address = self._start_broker()
        self._start_link(address)
        self.server = XMLRPCServer(self)
        self.server.start()
        threading.Thread(target=self._find_ticket, name='ticket', daemon=True).start()
        self.journal.event('host-start', text='vmhost %s, pid %d' % (agent.VERSION, os.getpid()))
        log.info('vmhost %s runs as pid %d: XML-RPC on %s:%s, broker on %s:%s, hypervisor %s, '
                 'state in %s', agent.VERSION, os.getpid(), *(self.server.address + address + (
                     self.hypervisor_name, os.path.abspath(self.folder.path))))

    def _find_ticket(self) -> None:
        """The key by which guests with auth=ticket know this host; it takes a second to make the first."""
        try:
            self.ticket = chirpticket.Ticket.from_pem(self.folder.secret(
                'chirp.key', lambda: chirpticket.Ticket.generate().pem()))
        except (OSError, chirpwire.ChirpError) as error:
            log.error('guests with auth=ticket serve no files: %s: %s', self.folder.file('chirp.key'), error)
            return
        for guest in self.guests.on_list():
            self._greet(guest)

    @property
    def hypervisor_name(self) -> str:
        return 'VirtualBox' if self.hypervisor is not None else 'none'

    def _start_hypervisor(self) -> None:
        """VirtualBox, where it answers; else the machines are those whose agents say HELLO."""
        wanted = self.settings.Hypervisor.hypervisor
        if wanted == 'none':
            return
        driver = VirtualBox(self.settings.Network, self.settings.RemoteDesktop, CHIRP_PORT,
                            os.path.abspath(self.folder.path),
                            self.settings.Hypervisor.command_timeout, self._vm_event)
        driver.start_thread()
        try:
            version = driver.version()
        except VMHostError as error:
            log.log(logging.ERROR if wanted == 'VirtualBox' else logging.INFO,
                    'VMs can\'t be controlled, all the rest works: %s', error)
            driver.close()
            return
        log.info('VirtualBox %s', version)
        loaded, _, mend = module_line()
        if not loaded:
            log.warning('VMs can\'t be started, all the rest works: %s', mend)
        if self.settings.Network.manage:
            self._set_up_network(driver)
        self.hypervisor = driver

    def _set_up_network(self, driver: VirtualBox) -> None:
        try:
            driver.setup_network()
        except VMHostError as error:
            log.error('the host-only network can\'t be set up ([Network] manage): %s', error)

    def _vm_event(self, type: str, vm: str, text: str) -> None:
        """What VirtualBox shows of a VM changed. On the driver's thread ``vbox-events``."""
        self.journal.event(type, vm, '', text)
        log.info('%s: %s %s', vm, type, text)
        guest = self.guests.find(vm)
        if self.hypervisor.known_state(vm) == 'AbortedSaved':
            log.info('%s: its saved state is still there, and so are its commands', vm)
        elif type in ('vm-aborted', 'vm-stuck') and guest is not None:
            for execution in self.commands.open_of(guest.id):
                if execution.state == 'running':
                    self.commands.lose(execution, 'the VM ended: %s' % text)
        elif type in ('vm-added', 'vm-renamed', 'vm-card'):
            for guest in self.guests.all():
                if self.hypervisor.known_name(guest.id) not in ('', guest.name):
                    self._rename(guest)

    def _rename(self, guest: Guest) -> None:
        """Gives a guest the name that the hypervisor has for it, where it has one."""
        try:
            name = self.hypervisor.name_of(guest.id)
        except VMHostError as error:
            log.warning('no name for %s: %s', guest.id, error)
            return
        if name and name != guest.name:
            log.info('%s is %s', guest.name, name)
            self.guests.rename(guest, name)
            if self.policy is not None:
                self.policy.named(guest.id, guest.name)
            self._note_guest(guest)
            self.take_over(guest)
            self._greet(guest)

    def _broker_host(self) -> str:
        """Broker.host=auto: the host-only interface's address, or loopback without one."""
        configured = self.settings.Broker.host
        if configured != 'auto':
            return configured
        if self.hypervisor is not None and self.settings.Network.mode == 'hostonly':
            return self.hypervisor.broker_address() or '127.0.0.1'
        return '127.0.0.1'

    def _start_broker(self) -> Tuple[str, int]:
        """The broker's address: of the embedded one, started here, or of another."""
        broker = self.settings.Broker
        host = self._broker_host()
        if not broker.embedded:
            return host, broker.port
        self._secret = secrets.token_urlsafe(24)
        self.policy = HostPolicy(self._secret, neighbour_mac)
        self.broker = stompbroker.Broker(
            host, broker.port, login=broker.username, passcode=broker.password, tls=server_tls(broker),
            policy=self.policy, heartbeat=broker.heartbeat, max_frame=broker.max_frame)
        try:
            self.broker.start()
        except stompbroker.BrokerError as error:
            cause = error.__context__
            why = agent.why_not_listening(cause) if isinstance(cause, OSError) else error
            raise VMHostError('the broker can\'t listen on %s:%s ([Broker] host, port): %s'
                              % (host, broker.port, why))
        return self.broker.address

    def _start_link(self, address: Tuple[str, int]) -> None:
        broker = self.settings.Broker
        embedded = self.broker is not None
        self.broker_address = address
        tls = agent.client_tls(broker.ca_file or (broker.cert_file if embedded else '')) \
            if broker.tls else None
        if tls is not None and embedded:
            tls.check_hostname = False      # our own certificate, on our own machine
        self.link = protocol.Link(
            lambda: [address], [(protocol.CONNECTIONS, 'client-individual'),
                                (protocol.CMD_RESPONSES, 'client-individual')],
            self._link_up, self._hear, self._link_down, broker.username, broker.password,
            broker.heartbeat, tls, {'vmhost-secret': self._secret} if embedded else {},
            broker.max_frame, first_delay=0.05 if embedded else protocol.FIRST_DELAY)
        self._link_is_up = threading.Event()
        self.link.start()
        if embedded and not self._link_is_up.wait(10):
            raise VMHostError('the embedded broker doesn\'t answer: %s' % self.link.last_error)

    def run(self, ended: socket.socket) -> None:
        """Ticks until ``ended`` can be read. On the main thread."""
        while not select.select([ended], [], [], TICK)[0]:
            try:
                self.tick()
            except Exception:       # the agent lives on, whatever one tick met
                log.exception('in the tick')

    def stop(self) -> None:
        """Stops in the order XML-RPC, link, broker, VirtualBox; then nothing of it is left."""
        self.stopping.set()
        self.journal.stop_waits()
        if self.server is not None:
            self.server.stop()
        self.transfers.stop(time.monotonic() + 1.0)
        self.fetcher.stop(time.monotonic() + 1.0)
        self.acknowledger.stop(time.monotonic() + 0.5)
        self.name_lookup.stop(time.monotonic() + 0.5)
        if self.link is not None:
            self.say(protocol.BYE.howToLeave('the host stops'))
            self.link.close()
        if self.broker is not None:
            self.broker.stop()
        if self.hypervisor is not None:
            self.hypervisor.close()
        with contextlib.suppress(JournalError):
            self.commands.write_states()
            self.journal.event('host-stop')
        self.journal.close()
        self.folder.close()

    # The link.

    def say(self, message: Message) -> bool:
        """Publishes a word. False where there is no connection to the broker."""
        if self.link is None:
            return False
        headers = dict(message.headers, timestamp=protocol.timestamp())
        headers['from'] = 'host'
        return self.link.send(message.topic, headers, message.body())

    def _link_up(self, link: protocol.Link) -> None:
        self.guests.forgive()
        self._link_is_up.set()
        self.call_the_roll()

    def _link_down(self, reason: str) -> None:
        if not self.stopping.is_set():
            log.warning('no connection to the broker: %s', reason)

    def call_the_roll(self) -> None:
        """Asks all to announce themselves, once in a while at most."""
        now = time.monotonic()
        if now - self._last_roll_call > 2 or not self._last_roll_call:
            self._last_roll_call = now
            self.say(protocol.HELLO.howToGreet('*', session=self.session))

    def _hear(self, frame: Any) -> None:
        """One MESSAGE. What isn't a word is counted and dropped; ACKed all the same."""
        try:
            message = protocol.interpret(frame.headers, frame.body,
                                         frame.headers.get('destination', ''))
            protocol.hear(self, message)
        except protocol.BadWord as error:
            self._drop('%s' % error, frame.headers.get('from', ''))

    def _drop(self, what: str, sender: str) -> None:
        self.aint += 1
        # A guest may send thousands: the first are enough to find it.
        log.log(logging.INFO if self.aint <= 100 else logging.DEBUG,
                'AINT from %.80r: %s', sender, what)

    def _sender(self, message: Message) -> str:
        """The id of who said it. With the embedded broker, the policy has written it."""
        sender = message.headers.get('from') or (
            '' if self.policy is not None else message.text('id'))
        return read_id(sender)

    # Words.

    def heard_aint(self, message: Message) -> None:
        """An unknown word, or one that isn't for a host."""
        self._drop('%.40r' % message.word, message.headers.get('from', ''))

    def heard_hello(self, message: Message) -> None:
        """A guest is there: into the list, greeted, and its commands compared with ours."""
        machine_id = read_id(message.text('id'))
        if self.policy is not None:
            machine_id = self._sender(message)
            ip = self.policy.address_of(machine_id)
        else:
            ip = message.text('ip')[:64]
        known = self.hypervisor.known_name(machine_id) if self.hypervisor is not None else ''
        guest, news = self.guests.add(
            machine_id, known or self._own_name(machine_id, message), ip, message.text('boot')[:64],
            message.text('session')[:64], self._facts(message), self._clock_offset(message))
        if known:
            self.guests.rename(guest, known)
        if self.policy is not None:
            self.policy.named(machine_id, guest.name)
        if news:
            self._note_guest(guest)
        if known:
            self.take_over(guest)
        self._greet(guest)
        if self.hypervisor is not None and is_mac(guest.id) and not known:
            self.name_lookup.look_up(guest)
        if isinstance(message.get('cmds'), dict):
            self._reconcile(guest, message.mapping('cmds'))
        else:
            for execution in self.commands.open_of(guest.id):
                self._query(execution)      # too many for a HELLO; each answer says what it would have

    def take_over(self, guest: Guest) -> None:
        """What waits for a VM under the id of a card that it no longer has is for its present agent. What
        was sent stays under the old one, as the guest has it in that agent's spool. From any thread."""
        with self.journal_permitting():
            for execution in self.commands.waiting_for(guest.name):
                if execution.vm_id != guest.id and not self.hypervisor.known_name(execution.vm_id):
                    self.commands.move(execution, guest.id)

    def _own_name(self, machine_id: str, message: Message) -> str:
        """What a machine calls itself, else its host name, else its id; none may be called like a VM."""
        name = read_name(message.text('name')) or read_name(message.text('host')) or machine_id
        if self.hypervisor is not None and self.hypervisor.known_state(name) and name != machine_id:
            return '%s-%s' % (name, machine_id)
        return name

    def _facts(self, message: Message) -> Dict[str, Any]:
        """What the guest says about itself, bounded."""
        facts = {}  # type: Dict[str, Any]
        for name in ('proto', 'host', 'os', 'python', 'version', 'cpus', 'mem', 'chirp'):
            value = message.get(name)
            if isinstance(value, (str, int, float)):
                facts[name] = value[:200] if isinstance(value, str) else value
            elif name == 'chirp' and isinstance(value, dict):
                facts[name] = {'port': value.get('port', 0)}
        return facts

    def _clock_offset(self, message: Message) -> float:
        """Guest's clock less ours, in seconds, as far as a message on its way can tell."""
        try:
            return round(message.number('timestamp', time.time()) - time.time(), 3)
        except protocol.BadWord:
            return 0.0

    def _note_guest(self, guest: Guest) -> None:
        now = time.monotonic()
        if now - guest.noted < NOTE_EVERY:
            return              # a guest that comes and goes all the time doesn't fill the journal
        guest.noted = now
        log.info('%s joined: %s at %s', guest.name, guest.id, guest.ip)
        with self.journal_permitting(), self.journal.writing() as journal:
            journal.execute('INSERT OR REPLACE INTO guests VALUES (?, ?, ?, ?, ?, ?, ?)',
                            guest.id, guest.name, guest.ip, guest.boot, guest.session,
                            json.dumps(guest.facts), guest.last_seen)
            journal.event('guest-hello', guest.name, '', '%s at %s' % (guest.id, guest.ip))

    @contextlib.contextmanager
    def journal_permitting(self) -> Iterator[None]:
        """For what is worth a note in the journal, but must not fail with it: a full disk, say."""
        try:
            yield
        except JournalError as error:
            now = time.monotonic()
            if now >= self._next_trouble:
                self._next_trouble = now + TROUBLE_EVERY
                log.error('%s; results stay in the guests until it can be written', error)

    def _greet(self, guest: Guest) -> None:
        keys = {'name': guest.name, 'session': self.session,
                'max_frame': self.settings.Broker.max_frame}  # type: Dict[str, Any]
        if self.settings.Host.vm_gc_grace < 30:
            keys['beacon_interval'] = max(1, self.settings.Host.vm_gc_grace / 3)
        if self.broker is None:
            keys['addresses'] = own_addresses(self.link)
        if self.ticket is not None:
            keys['chirp-ticket'] = self.ticket.public.pem
        self.say(protocol.HELLO.howToGreet(guest.id, **keys))

    def _reconcile(self, guest: Guest, listed: Dict[str, Any]) -> None:
        """What its HELLO doesn't list and was running is lost; what was only sent is sent again."""
        for execution in self.commands.open_of(guest.id):
            if execution.cmd_id in listed:
                with self._lock:
                    self._missing.pop(execution.index, None)
            elif execution.state in ('queued', 'sent'):
                self.publish(execution)
            else:
                # Asked once more, since another broker may have turned the order of words round.
                with self._lock:
                    self._missing[execution.index] = time.monotonic() + MISSING_GRACE
                self.say(protocol.CMD_QUERY.howToSay(guest.id, execution.cmd_id))

    def heard_bye(self, message: Message) -> None:
        """A guest goes; its commands stay as they are."""
        guest = self.guests.gone(self._sender(message))
        if guest is not None:
            reason = read_name(message.text('reason'))
            log.info('%s left: %s', guest.name, reason)
            with self.journal_permitting():
                self.journal.event('guest-bye', guest.name, '', reason)

    def heard_still_alive(self, message: Message) -> None:
        """A beacon, with the load."""
        load = {name: message.number(name) for name in
                ('load1', 'mem_free', 'disk_free', 'running', 'uptime') if message.get(name) is not None}
        self._heard_from(self._sender(message), load)

    def _heard_from(self, machine_id: str, load: Optional[Dict[str, float]] = None) -> None:
        if not self.guests.heard(machine_id, load):
            self.call_the_roll()

    def heard_pong(self, message: Message) -> None:
        """An answer to PING, from whom it was sent to."""
        sender = self._sender(message)
        self._heard_from(sender)
        with self._lock:
            waiting = self._pings.get(message.text('ping-id') + '@' + sender)
        if waiting is not None:
            waiting.set()

    def heard_cmd_status(self, message: Message) -> None:
        """How far a command is; ``unknown`` where the guest never heard of it, or no longer knows."""
        sender = self._sender(message)
        self._heard_from(sender)
        execution = self.commands.find_open(message.text('cmd-id'), sender)
        state = message.text('state')
        if execution is None:
            execution = self.commands.finished(message.text('cmd-id'), sender)
            if execution is not None:
                self.commands.heard_status(execution, state, message)
            return
        with self._lock:
            self._missing.pop(execution.index, None)
        was = execution.state
        self.commands.heard_status(execution, state, message)
        if state == 'unknown' and was in ('running', 'suspended'):
            self.commands.lose(execution, 'the guest no longer knows this command: '
                               'its disk was lost, or restored from an earlier state')
        elif state == 'unknown':
            self.publish(execution)

    def heard_cmd_results(self, message: Message) -> None:
        """The end of a command: journalled, then acknowledged; once more where it came before."""
        sender = self._sender(message)
        self._heard_from(sender)
        results = read_results(message)
        cmd_id = results['cmd-id']
        execution = self.commands.find_open(cmd_id, sender)
        if execution is not None:
            with self._lock:
                self._missing.pop(execution.index, None)
            self.commands.finish(execution, results, fetched=not has_more_output(results))
        else:
            execution = self.commands.finished(cmd_id, sender)
            if execution is None:
                self.commands.keep_orphan(cmd_id, sender, self.name_of(sender), results)
        if execution is None or execution.fetched:
            self.acknowledger.acknowledge(sender, cmd_id)
        else:
            self.fetcher.begin(execution)

    # The clock.

    def tick(self) -> None:
        """What time brings: liveness, publishing again, what is missing, what may be forgotten."""
        now = time.monotonic()
        if self._has_slept(now) or (self.link is not None and not self.link.up):
            self.guests.forgive()
        with self.journal_permitting():
            self.commands.write_states()
        for execution in self.commands.due():
            guest = self.guests.by_id(execution.vm_id)
            if guest is not None and guest.agent != 'lost':
                self.publish(execution)
        self._judge_liveness()
        with self.journal_permitting():
            self._give_up_missing(now)
            if now >= self._next_retention:
                self._next_retention = now + RETENTION_EVERY
                self._forget_old(now)

    def _has_slept(self, now: float) -> bool:
        """Whether this process, or its machine, was stopped since the last call."""
        clock, passed = time.time(), now - self._last_tick
        jump = clock - self._last_clock - passed
        self._last_tick, self._last_clock = now, clock
        if jump > RETENTION_EVERY:
            log.warning('the clock jumped ahead by %.0f s: nothing is let go for %.0f s', jump, DOUBT)
            self._next_retention = max(self._next_retention, now + DOUBT)
        return max(passed, jump) > min(SLEPT, self.settings.Host.vm_gc_grace / 2)

    def _judge_liveness(self) -> None:
        for guest, liveness in self.guests.tick(self.is_suspended):
            log.info('%s is %s', guest.name, liveness)
            with self.journal_permitting():
                self.journal.event('guest-' + liveness, guest.name, '',
                                   'nothing heard for %.0f s' % (time.time() - guest.last_seen))

    def _give_up_missing(self, now: float) -> None:
        with self._lock:
            late = [index for index, deadline in self._missing.items() if deadline < now]
        for index in late:
            execution = self.commands.find_open(*index)
            if execution is not None:
                self.commands.lose(execution, 'the guest came back without this command: it was '
                                   'rebooted, or its disk lost or restored from an earlier state')
            with self._lock:
                self._missing.pop(index, None)

    def _forget_old(self, now: float) -> None:
        count, all_gone = self.commands.forget_before(time.time() - self.settings.Host.keep_results)
        if count:
            log.info('%d results older than keep_results were let go', count)
            self.fetcher.sweep()
        if not all_gone:
            self._next_retention = now + RETENTION_PAUSE

    def is_suspended(self, vm: str) -> bool:
        """Whether the VM is paused or saved, so that nothing can be heard of it."""
        return self.hypervisor is not None and self.hypervisor.known_state(vm) in SUSPENDED

    # What the API asks for.

    def name_of(self, machine_id: str) -> str:
        """The name of a guest, or its id."""
        guest = self.guests.by_id(machine_id)
        return guest.name if guest is not None else machine_id

    def lose_all(self, guest: Guest, why: str) -> None:
        """Ends all commands of a VM that is no more."""
        for execution in self.commands.open_of(guest.id):
            self.commands.lose(execution, why)

    def machine(self, vm: str) -> Guest:
        """A known VM, by name or id. Raises NoSuchVM."""
        guest = self.guests.find(vm)
        if guest is None or guest.agent == 'lost':      # by now the VM may have another card
            guest = self.described(vm)[0] or guest
        if guest is None:
            raise NoSuchVM('no VM %.100r' % vm)
        return guest

    def described(self, vm: str) -> Tuple[Optional[Guest], Dict[str, Any]]:
        """A VM as its agent and as the hypervisor know it; (None, {}) where the hypervisor doesn't."""
        if self.hypervisor is None:
            return None, {}
        try:
            found = self.hypervisor.describe(vm)
        except NoSuchVM:
            return None, {}
        return self.guests.by_id(found['id']) or Guest(found['id'], found['name']), found

    def connected(self, vm: str) -> Guest:
        """A VM whose agent is there. Raises NoSuchVM, AgentNotConnected."""
        guest = self.machine(vm)
        if guest.agent == 'lost':
            raise AgentNotConnected('the agent of %s is not connected' % guest.name)
        return guest

    def chirp_client(self, guest: Guest) -> Any:
        """A client of a guest's Chirp server, for a ``with`` block. Raises TransferError."""
        endpoint = self.hypervisor.chirp_endpoint(guest.name) if self.hypervisor is not None else None
        address, port = endpoint or (guest.ip, guest.chirp_port)
        if not port:
            raise NoFiles('%s offers no files (it has no Chirp server)' % guest.name)
        return chirpclient.ChirpClient(address, port, CHIRP_TIMEOUT, self.ticket)

    def list_dir(self, vm: str, path: str) -> List[Dict[str, Any]]:
        """What is in a folder of a VM. Raises TransferError, NoSuchVM, AgentNotConnected."""
        try:
            with self.chirp_client(self.connected(vm)) as client:
                return [shown_entry(entry) for entry in client.ls(path)]
        except (chirpwire.ChirpError, OSError) as error:
            raise TransferError('%s on %s: %s' % (path, vm, error))

    def ping(self, vm: str, timeout: float) -> str:
        """'PONG from NAME'. Raises NoSuchVM, AgentNotConnected, DeadlineExceeded."""
        guest = self.connected(vm)
        ping_id = secrets.token_hex(8)
        answered = threading.Event()
        with self._lock:
            self._pings[ping_id + '@' + guest.id] = answered
        try:
            self.say(protocol.PING.howToSay(guest.id, ping_id))
            if not answered.wait(timeout):
                raise DeadlineExceeded('%s gave no PONG within %g s' % (guest.name, timeout))
        finally:
            with self._lock:
                del self._pings[ping_id + '@' + guest.id]
        return 'PONG from %s' % guest.name

    def run_cmd(self, vm: str, request: Dict[str, Any], queue: bool, client: str) -> str:
        """Journals a command, then sends it. Its cmd-id. Raises NoSuchVM, AgentNotConnected."""
        guest = self.machine(vm)
        if not guest.id:
            raise BadState('%s has no network card, by which its agent would be known' % guest.name)
        if guest.agent == 'lost' and not queue:
            raise AgentNotConnected('the agent of %s is not connected (queue lets the command wait '
                                    'for it)' % guest.name)
        self._check_size(request)
        cmd_id, executions = self.commands.new(request, guest.name, False, [guest],
                                               guest.agent == 'lost', client)
        if guest.agent != 'lost':
            self.publish(executions[0], request)
        log_submitted(cmd_id, guest.name, client)
        return cmd_id

    def run_cmd_on_all(self, pattern: str, request: Dict[str, Any], client: str) -> str:
        """The same on every connected VM whose name or id matches the glob. Raises NoSuchVM."""
        guests = [guest for guest in self.guests.on_list()
                  if protocol.is_addressed(pattern, guest.id, guest.name)]
        if not guests:
            raise NoSuchVM('no connected VM matches %.100r' % pattern)
        self._check_size(request)
        cmd_id, executions = self.commands.new(request, pattern, True, guests, False, client)
        self.say(self._cmd_run(pattern, cmd_id, request))
        for execution in executions:
            self.commands.published(execution)
        log_submitted(cmd_id, pattern, client)
        return cmd_id

    def _check_size(self, request: Dict[str, Any]) -> None:
        size = len(self._cmd_run('', '', request).body())
        size += sum(map(len, (request['cmd'], request['path'])))
        if size > self.settings.Broker.max_frame - FRAME_RESERVE:
            raise InvalidParams('%d bytes of command, arguments, environment and stdin; at most %d '
                                'fit. Send the input as a file (put), and name it (fileForStdin, run -I)'
                                % (size, self.settings.Broker.max_frame - FRAME_RESERVE))

    def _cmd_run(self, to: str, cmd_id: str, request: Dict[str, Any]) -> Message:
        return protocol.CMD_RUN.howToSay(to, cmd_id, request['cmd'], request['args'],
                                         request['env'], request['path'], **request['options'])

    def publish(self, execution: Execution, request: Optional[Dict[str, Any]] = None) -> None:
        """Sends a command to its VM, for the first time or again: the guest runs it once."""
        if request is None:
            request = self.commands.request(execution.cmd_id)['request']
        if self.say(self._cmd_run(execution.vm_id, execution.cmd_id, request)):
            log.log(logging.INFO if execution.attempts else logging.DEBUG, '%s: sent to %s%s', execution.key,
                    execution.vm, ' again' if execution.attempts else '')
        for name in execution.signals:
            self.say(protocol.CMD_SIGNAL.howToSay(execution.vm_id, execution.cmd_id, name))
        self.commands.published(execution)

    def refresh(self, executions: List[Execution]) -> None:
        """Asks the guests how far running commands are, and waits 2 s at most for their answers."""
        self.commands.ask_all(self._askable(executions), self._query, 2.0)

    def shown_state(self, execution: Execution) -> str:
        """The state as a user sees it."""
        if execution.state != 'running':
            return execution.state
        if self.is_suspended(execution.vm):
            return 'suspended'
        # In the guest, behind max_commands others.
        return 'queued' if execution.status.get('state') == 'queued' else 'running'

    def status(self, execution: Execution) -> Dict[str, Any]:
        """How far it is, as the guest told last."""
        if execution.ended:
            return self._final_status(execution)
        status = execution.status
        return {'state': self.shown_state(execution), 'pid': status.get('pid', 0),
                'wall': status.get('wall', 0), 'resources': status.get('resources', {}),
                'processes': status.get('processes', 0),
                'outSize': status.get('out-size', 0), 'errSize': status.get('err-size', 0),
                'progress': status.get('progress', ''), 'error': status.get('error', ''),
                'age': time.monotonic() - execution.status_time if execution.status_time else -1}

    def ask_for_news(self, executions: List[Execution]) -> None:
        """Asks the guests how far running commands are; what they answer is in the next status."""
        for execution in self._askable(executions):
            self._query(execution)

    def _askable(self, executions: List[Execution]) -> List[Execution]:
        return [execution for execution in executions
                if execution.state == 'running' and self._is_connected(execution)]

    def _final_status(self, execution: Execution) -> Dict[str, Any]:
        results = execution.answer()
        return {'state': execution.state, 'pid': 0, 'wall': results['wall'],
                'resources': results['resources'], 'processes': 0, 'outSize': results['out-size'],
                'errSize': results['err-size'], 'progress': execution.status.get('progress', ''),
                'error': results['error'], 'age': max(0, time.time() - execution.ended)}

    def _is_connected(self, execution: Execution) -> bool:
        guest = self.guests.by_id(execution.vm_id)
        return guest is not None and guest.agent != 'lost' and not self.is_suspended(guest.name)

    def _query(self, execution: Execution, **keys: Any) -> None:
        self.say(protocol.CMD_QUERY.howToSay(execution.vm_id, execution.cmd_id, **keys))

    def output(self, execution: Execution, stream: str, offset: int, length: int) -> Dict[str, Any]:
        """{data: bytes, offset, next, size, eof} of one stream; while it runs, too.

        From what came with the results, or is here as a file; else asked of the guest.
        Raises AgentNotConnected, DeadlineExceeded.
        """
        if execution.ended:
            results = execution.answer()
            size, begin = results[stream + '-size'], results[stream + '-offset']
            if offset >= size:
                return self._slice(b'', offset, size, True)
            if offset >= begin:
                data = inline_output(results, stream)[offset - begin:offset - begin + length]
                return self._slice(data, offset, size, True)
            data = self.fetcher.read(execution, stream, offset, length)
            if data:
                return self._slice(data, offset, size, True)
        elif execution.state in ('queued', 'sent'):
            return self._slice(b'', offset, 0, False)
        return self._ask_output(execution, stream, offset, length)

    def _slice(self, data: bytes, offset: int, size: int, ended: bool) -> Dict[str, Any]:
        end = offset + len(data)
        return {'data': data, 'offset': offset, 'next': end, 'size': max(size, end) if data else size,
                'eof': ended and end >= size}

    def _ask_output(self, execution: Execution, stream: str, offset: int,
                    length: int) -> Dict[str, Any]:
        """A slice by CMD_QUERY and CMD_STATUS."""
        if not self._is_connected(execution):
            raise AgentNotConnected('the output of %s is in %s, whose agent is not connected'
                                    % (execution.key, execution.vm))
        key = stream + '-offset'
        message = self.commands.ask(
            execution, lambda message: message.number(key, -1) == offset
            or message.text('state') == 'unknown',
            lambda: self._query(execution, **{key: offset, 'max': min(length, OUTPUT_SLICE)}))
        if message is None:
            if execution.done.is_set() and not execution.answer()[key]:
                return self.output(execution, stream, offset, length)    # it ended meanwhile
            raise DeadlineExceeded('%s gave no output of %s within %g s'
                                   % (execution.vm, execution.key, QUERY_TIMEOUT))
        if message.text('state') == 'unknown':
            raise BadState('the output of %s is no longer in %s: its spool was let go, or lost'
                           % (execution.key, execution.vm))
        exact = message.text(stream + '64')
        data = base64.b64decode(exact) if exact else message.text(stream).encode('utf-8')
        ended = message.text('state') in FINISHED and execution.done.is_set()
        return self._slice(data, offset, int(message.number(stream + '-size')), ended)

    def signal(self, execution: Execution, name: str) -> bool:
        """Sends a signal to all processes of a command. Raises BadState, AgentNotConnected."""
        if execution.ended:
            return False
        if execution.state == 'queued':
            self.commands.finish(execution, dict(
                lost_results(execution.cmd_id, 'signalled before it was sent'), state='failed'), True)
            return True
        if not self._is_connected(execution):
            raise AgentNotConnected('the agent of %s is not connected' % execution.vm)
        log.info('%s: signal %s', execution.key, name)
        if execution.state == 'sent' and len(execution.signals) < SIGNALS_KEPT:
            execution.signals += (name,)        # the guest may never have got the command, nor get this
        return self.say(protocol.CMD_SIGNAL.howToSay(execution.vm_id, execution.cmd_id, name))


def own_addresses(link: Any) -> List[str]:
    """This machine's addresses, as guests may see them: towards the broker, and by its name."""
    found = {link.local_address[0]}
    try:
        found.update(info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None))
    except OSError as error:
        log.debug('own name: %s', error)
    return sorted(str(address) for address in found if address)


def server_tls(broker: Any) -> Any:
    """The embedded broker's ssl.SSLContext, or None. Raises VMHostError that names the key."""
    if not broker.tls:
        return None
    import ssl
    if not broker.cert_file:
        raise VMHostError('[Broker] tls=yes needs cert_file, and key_file where the key is apart')
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if hasattr(ssl, 'PROTOCOL_TLS_SERVER')
                             else ssl.PROTOCOL_TLS)
    try:
        context.load_cert_chain(broker.cert_file, broker.key_file or None)
    except (OSError, ssl.SSLError) as error:
        raise VMHostError('[Broker] cert_file %s, key_file %s: %s'
                          % (broker.cert_file, broker.key_file, error))
    return context


# --- the API ---------------------------------------------------------------------------------

LONGEST_POLL = 60.0            # seconds that a call may wait
OPTIONS = {                    # of runCmd: what it is called here, on the wire, and its type
    'stdin': ('stdin', (str, xmlrpc.client.Binary)), 'timeout': ('timeout', (int, float)),
    'killAfter': ('kill-after', (int, float)), 'user': ('user', (str,)),
    'envClear': ('env-clear', (bool,)), 'nice': ('nice', (int,)), 'limits': ('limits', (dict,)),
    'statusInterval': ('status-interval', (int, float)), 'outputLimit': ('output-limit', (int, float)),
    'inlineOutput': ('inline-output', (int, float)), 'queue': ('queue', (bool, int)),
}
LIMITS = ('as', 'cpu', 'fsize', 'nofile', 'nproc')
# Of every system that guests run on; this one may have fewer.
SIGNALS = ('HUP', 'INT', 'QUIT', 'ILL', 'TRAP', 'ABRT', 'BUS', 'FPE', 'KILL', 'USR1', 'SEGV', 'USR2', 'PIPE',
           'ALRM', 'TERM', 'CHLD', 'CONT', 'STOP', 'TSTP', 'TTIN', 'TTOU', 'URG', 'XCPU', 'XFSZ', 'VTALRM',
           'PROF', 'WINCH', 'IO', 'POLL', 'PWR', 'SYS', 'EMT', 'INFO')
LARGEST_NUMBER = 1e18          # of seconds or bytes, so that no system's integer overflows
XML_UNSAFE = {code: '\ufffd' for code in list(range(32)) + [0xfffe, 0xffff] + list(range(0xd800, 0xe000))
              if code not in (9, 10, 13)}
FilePath = Union[str, xmlrpc.client.Binary]    # the latter: exact bytes, which need not be UTF-8


def is_carried(text: str) -> bool:
    """Whether XML-RPC leaves the text as it is."""
    return '\r' not in text and text.translate(XML_UNSAFE) == text


def shown_entry(entry: chirprequests.Entry) -> Dict[str, Any]:
    """An entry of a folder; the exact bytes of its name where XML-RPC would alter it."""
    shown = {'name': entry.name, 'size': entry.size, 'mode': entry.mode, 'mtime': entry.mtime,
             'isDir': entry.is_dir}    # type: Dict[str, Any]
    if not is_carried(entry.name):
        shown['name64'] = base64.b64encode(chirpwire.to_bytes(entry.name)).decode('ascii')
    return shown


def shown_param(param: Any) -> str:
    """An argument of a call for the journal."""
    if isinstance(param, xmlrpc.client.Binary):
        param = chirpwire.to_text(param.data[:80])
    return '%.80r' % param if isinstance(param, (str, int, float)) else '…'


class Api:
    """The methods of the XML-RPC interface; each public method is one. Any thread may call them.

    Times are seconds since 1970, durations seconds, sizes bytes. A VM is given by name or id.
    Faults: -32601 no such method, -32602 wrong arguments, -32603 internal; 1 NoSuchVM,
    2 AgentNotConnected, 3 NoSuchCommand, 4 BadState, 5 HypervisorError, 6 TransferError, 7 Timeout,
    8 AlreadyExists, 9 NotSupported, 10 Busy, 11 AccessDenied.
    """

    ALIASES = {'listAvailableVMs': 'listVMs', 'unpause': 'resume', 'saveSnapshot': 'takeSnapshot',
               'getPerformanceData': 'getStats'}
    # The parts of the reference, and the first method of each.
    PARTS = {'help': 'The agent', 'listVMs': 'VMs', 'createVM': 'VM control', 'ping': 'Commands',
             'cpFileToVM': 'Files'}

    def __init__(self, host: Host) -> None:
        self._host = host
        self._caller = threading.local()       # who is calling, per request's thread

    # About the agent.

    def help(self, method: str = '') -> str:
        """What a method does; of all methods, where none is named.

            >>> print(host.help('ping'))
            ping(vm, timeout_secs=5.0)
                Asks the agent of a VM whether it is there: 'PONG from NAME'...
        """
        if method:
            return self._describe(method)
        return '\n\n'.join(self._describe(name) for name in api_methods())

    def _describe(self, name: str) -> str:
        method = find_method(self, name)
        return '%s%s\n%s' % (name, describe_signature(method),
                             textwrap.indent(inspect.getdoc(method) or '', '    '))

    def agentInfo(self) -> dict:
        """{version, proto, python, hypervisor, broker, xmlrpc, uptime, vms, cmds, aint, jobs} of the host.

        vms: how many agents are connected; cmds: how many commands are unfinished; aint: how many
        words weren't any; broker: where it is, and the embedded one's counters; jobs: what VirtualBox
        is busy with, [{verb, vm, percent, text}].

            >>> host.agentInfo()['hypervisor']
            'none'
        """
        host = self._host
        link, server = host.link, host.server
        assert link is not None and server is not None     # the API is served by a started host
        address = link.peer_address if link.peer_address[0] else host.broker_address
        broker = {'address': '%s:%s' % address, 'connected': link.up,
                  'embedded': host.broker is not None, 'server': link.server}  # type: Dict[str, Any]
        if host.broker is not None:
            broker['counters'] = host.broker.counters()
        return {'version': agent.VERSION, 'proto': protocol.PROTO,
                'python': sys.version.split()[0], 'hypervisor': host.hypervisor_name,
                'broker': broker, 'xmlrpc': '%s:%s' % server.address,
                'uptime': time.monotonic() - host.started, 'vms': len(host.guests.on_list()),
                'cmds': host.commands.count(), 'aint': host.aint,
                'jobs': host.hypervisor.under_way() if host.hypervisor is not None else []}

    def getEvents(self, after: int = 0, timeout: float = 0) -> dict:
        """{last, events: [{seq, time, type, vm, cmdId, text}]} with numbers above ``after``.

        Waits up to ``timeout`` (60) seconds for the first; at most 1,000 at a time, oldest first.
        ``after`` below 0: so many of the newest (-100: the last hundred).

            >>> host.getEvents(0)['events'][0]['type']
            'host-start'
        """
        return self._host.journal.events_after(after, min(max(timeout, 0), LONGEST_POLL))

    def getStatusLink(self) -> str:
        """A link that opens the status page, once and within two minutes, without the token.

            >>> link = host.getStatusLink()
            >>> webbrowser.open(link)
            True
        """
        server = self._host.server
        assert server is not None
        return server.status.link(server.own_url())

    def version(self) -> str:
        """The hypervisor's version.

            >>> host.version()
            '7.2.4'
        """
        return self._hypervisor().version()

    def states(self) -> dict:
        """{MachineState name: code} of the hypervisor.

            >>> host.states()['Running']         # 5 before VirtualBox 7
            6
        """
        return self._hypervisor().machine_states()

    def _hypervisor(self) -> Any:
        if self._host.hypervisor is None:
            raise NotSupported('no VirtualBox here (hypervisor=%s): VMs can be neither made nor '
                               'controlled' % self._host.settings.Hypervisor.hypervisor)
        return self._host.hypervisor

    # VMs.

    def listVMs(self) -> list:
        """Names of all VMs; without a hypervisor, of the machines whose agents are connected.

            >>> host.listVMs()
            ['node1']
        """
        if self._host.hypervisor is not None:
            return self._host.hypervisor.list_vms()
        return self.listRegisteredVMs()

    def listRunningVMs(self) -> list:
        """Names of the VMs that run.

            >>> host.listRunningVMs()
            ['node1']
        """
        if self._host.hypervisor is not None:
            return self._host.hypervisor.list_running()
        return self.listRegisteredVMs()

    def listVMsWithState(self) -> dict:
        """{name: MachineState name} of all VMs.

            >>> host.listVMsWithState()
            {'node1': 'Running'}
        """
        if self._host.hypervisor is not None:
            return self._host.hypervisor.vms_with_state()
        return dict.fromkeys(self.listRegisteredVMs(), 'Running')

    def listRegisteredVMs(self) -> list:
        """Names of the VMs whose agents are connected.

            >>> host.listRegisteredVMs()
            ['node1']
        """
        return [guest.name for guest in self._host.guests.on_list()]

    def getVM(self, vm: str) -> dict:
        """{name, id, uuid, state, agent, ip, lastSeen, clockOffset, facts, rdp, commands} of a VM.

        state is the machine's, agent (alive, late, lost or never) the agent's; commands: the ids
        of those that are unfinished; clockOffset: guest's clock less the host's, roughly.

            >>> vm = host.getVM('node1')
            >>> vm['state'], vm['agent'], vm['ip']
            ('Running', 'alive', '127.0.0.1')
        """
        host = self._host
        known, described = host.described(vm)
        guest = known or host.machine(vm)
        described = described or {'uuid': '', 'state': self._state_of(guest), 'rdp': {}}
        return {'name': guest.name, 'id': guest.id, 'uuid': described['uuid'],
                'state': described['state'], 'rdp': described['rdp'],
                'agent': guest.agent if guest.last_seen else 'never', 'ip': guest.ip,
                'lastSeen': guest.last_seen, 'clockOffset': guest.clock_offset,
                'facts': dict(guest.facts, boot=guest.boot),
                'commands': [execution.key for execution in host.commands.open_of(guest.id)]}

    def _state_of(self, guest: Guest) -> str:
        return 'Null' if guest.agent == 'lost' else 'Running'

    def getState(self, vm: str) -> str:
        """The MachineState's name of a VM; without a hypervisor Running, or Null once it is lost.

            >>> host.getState('node1')
            'Running'
        """
        if self._host.hypervisor is not None:
            return self._host.hypervisor.state(vm)
        return self._state_of(self._host.machine(vm))

    def getNamesToIdsMapping(self) -> dict:
        """{name: MAC} of all VMs.

            >>> host.getNamesToIdsMapping()
            {'node1': '08:00:27:00:00:01'}
        """
        names = {}
        if self._host.hypervisor is not None:
            names.update(self._host.hypervisor.names_to_ids())
        names.update({guest.name: guest.id for guest in self._host.guests.on_list()})
        return names

    def getIdsToNamesMapping(self) -> dict:
        """{MAC: name} of all VMs.

            >>> host.getIdsToNamesMapping()
            {'08:00:27:00:00:01': 'node1'}
        """
        return {machine_id: name for name, machine_id in self.getNamesToIdsMapping().items()}

    def createVM(self, name: str, image: str = '', options: dict = {}) -> list:
        """Makes a VM from .ova, .ovf, .vdi, .vmdk or .iso; or registers a .vbox file. [True, name].

        Options: memory (MB), cpus, ostype, network (hostonly, nat or none), diskSize (MB) of the new, empty
        disk, 0 for none, and keep (cleanup leaves the VM alone). What an image decides itself is refused:
        diskSize beside a disk or an appliance, ostype beside an appliance, all beside a .vbox file.

            >>> host.createVM('node1', '/images/cernvm.ova', {'memory': 2048, 'cpus': 2})
            [True, 'node1']
        """
        return [True, self._hypervisor().create_vm(name, image, options)]

    def removeVM(self, vm: str, deleteDisks: bool = False) -> bool:
        """Takes a VM out of the hypervisor, with its disks where asked.

            >>> host.removeVM('node1', True)
            True
        """
        guest = self._host.described(vm)[0]
        self._hypervisor().remove_vm(vm, deleteDisks)
        if guest is not None and deleteDisks:
            self._host.take_over(guest)
            self._host.lose_all(guest, 'the VM and its disks were removed')
        return True

    def start(self, vm: str, guiMode: bool = False) -> bool:
        """Starts a VM, headless or with a window; True once it runs.

            >>> host.start('node1')
            True
        """
        return self._done(self._hypervisor().start(vm, guiMode))

    def shutdown(self, vm: str) -> bool:
        """Asks the guest's system to power off, by ACPI; True once it is off.

            >>> host.shutdown('node1')
            True
        """
        return self._done(self._hypervisor().shutdown(vm))

    def reset(self, vm: str) -> bool:
        """Presses the reset button of a VM.

            >>> host.reset('node1')
            True
        """
        return self._done(self._hypervisor().reset(vm))

    def powerOff(self, vm: str) -> bool:
        """Cuts a VM's power; True once it is off.

            >>> host.powerOff('node1')
            True
        """
        return self._done(self._hypervisor().power_off(vm))

    def pause(self, vm: str) -> bool:
        """Halts a running VM in memory; its commands are suspended.

            >>> host.pause('node1')
            True
        """
        return self._done(self._hypervisor().pause(vm))

    def resume(self, vm: str) -> bool:
        """Lets a paused VM go on.

            >>> host.resume('node1')
            True
        """
        return self._done(self._hypervisor().resume(vm))

    def saveState(self, vm: str) -> bool:
        """Writes a running VM to disk and stops it; ``start`` goes on from there.

            >>> host.saveState('node1')
            True
        """
        return self._done(self._hypervisor().save_state(vm))

    def discardState(self, vm: str) -> bool:
        """Throws a saved state away.

            >>> host.discardState('node1')
            True
        """
        return self._done(self._hypervisor().discard_state(vm))

    def takeSnapshot(self, vm: str, name: str, desc: str = '') -> bool:
        """Takes a snapshot, of a running VM too.

            >>> host.takeSnapshot('node1', 'fresh', 'as it was installed')
            True
        """
        return self._done(self._hypervisor().take_snapshot(vm, name, desc))

    def restoreSnapshot(self, vm: str, name: str = '') -> bool:
        """Sets a VM that is off back to a snapshot; to the current one, where none is named.

            >>> host.restoreSnapshot('node1', 'fresh')
            True
        """
        return self._done(self._hypervisor().restore_snapshot(vm, name))

    def deleteSnapshot(self, vm: str, name: str) -> bool:
        """Deletes a snapshot; what the VM is now stays as it is.

            >>> host.deleteSnapshot('node1', 'fresh')
            True
        """
        return self._done(self._hypervisor().delete_snapshot(vm, name))

    def listSnapshots(self, vm: str) -> list:
        """Names of a VM's snapshots, parents first.

            >>> host.listSnapshots('node1')
            ['fresh']
        """
        return self._hypervisor().list_snapshots(vm)

    def getStats(self, vm: str, key: str = '*') -> list:
        """[{name, values, unit}] of CPU, RAM, network and disk, from VirtualBox's collector.

            >>> host.getStats('node1', 'CPU/Load/User')
            [{'name': 'CPU/Load/User', 'values': [1520, 1470], 'unit': '%'}]
        """
        return self._hypervisor().get_stats(vm, key)

    def getLog(self, vm: str, tail: int = 65536) -> str:
        """The end of a VM's VBox.log.

            >>> print(host.getLog('node1', 200))
        """
        return self._hypervisor().get_log(vm, tail)

    def screenshot(self, vm: str) -> xmlrpc.client.Binary:
        """What a running VM's screen shows, as PNG.

            >>> png = host.screenshot('node1').data
            >>> png[:4]
            b'\\x89PNG'
        """
        return xmlrpc.client.Binary(self._hypervisor().screenshot(vm))

    def setLimits(self, vm: str, limits: dict) -> bool:
        """Limits of a VM: cpuPercent, netKBps, network (on or off).

            >>> host.setLimits('node1', {'cpuPercent': 50, 'netKBps': 1000})
            True
        """
        return self._done(self._hypervisor().set_limits(vm, limits))

    def remoteDesktop(self, vm: str, enable: bool = True, options: dict = {}) -> dict:
        """Switches a VM's remote desktop: {enabled, address, port, auth, security}.

            >>> host.remoteDesktop('node1', True)['port']
            5000
        """
        return self._hypervisor().remote_desktop(vm, enable, options)

    def getNetwork(self) -> dict:
        """{mode, interface, hostIp, netmask, dhcp: {server, lower, upper, enabled}}.

            >>> host.getNetwork()['hostIp']
            '192.168.56.1'
        """
        return self._hypervisor().get_network()

    def setupNetwork(self) -> dict:
        """Makes the host-only interface, its address and its DHCP pool, as host.ini says.

            >>> host.setupNetwork()['dhcp']['lower']
            '192.168.56.101'
        """
        return self._hypervisor().setup_network()

    def cleanup(self, dryRun: bool = True) -> list:
        """What is, or would be, removed: VMs and disks that this tool made and nobody owns.

            >>> host.cleanup(True)
            []
        """
        return self._hypervisor().cleanup(dryRun)

    def _done(self, result: Any) -> bool:
        return True

    # Commands.

    def ping(self, vm: str, timeout_secs: float = 5.0) -> str:
        """Asks the agent of a VM whether it is there: 'PONG from NAME'.

            >>> host.ping('node1')
            'PONG from node1'
        """
        return self._host.ping(vm, min(max(timeout_secs, 0), LONGEST_POLL))

    def runCmd(self, toVmName: str, cmd: str, args: list = [], env: Any = {}, path: Any = '',
               fileForStdin: str = '', options: dict = {}) -> str:
        """Runs a program in a VM, at most once; the cmd-id at once, as soon as it is journalled.

        args: a list of texts; env: laid over the guest's own; path: the folder it starts in,
        relative to dir_to_serve; fileForStdin: a file in the guest. Options: stdin (text, or base64
        for exact bytes), timeout, killAfter (s), user, envClear, nice, limits {as, cpu, fsize,
        nofile, nproc}, statusInterval (s), outputLimit, inlineOutput (bytes), queue (waits for an
        agent that isn't connected).

            >>> options = {'timeout': 60, 'limits': {'cpu': 30}}
            >>> script = ['-c', 'echo $DAY; exit 3']
            >>> cmd_id = host.runCmd('node1', 'sh', script, {'DAY': 'Monday'}, '', '', options)
            >>> host.waitCmd(cmd_id)
            True
        """
        request, queue = read_request(cmd, args, env, path, fileForStdin, options)
        return self._host.run_cmd(toVmName, request, queue, self._client())

    def runCmdOnAll(self, pattern: str, cmd: str, args: list = [], env: Any = {}, path: Any = '',
                    fileForStdin: str = '', options: dict = {}) -> str:
        """The same on every connected VM that matches the glob; each one's id is cmdId@vmName.

            >>> all_id = host.runCmdOnAll('node*', 'uname', ['-s'])
            >>> host.waitCmd(all_id)
            True
            >>> host.getCmdResults(all_id + '@node1')['out']
            'Linux\\n'
        """
        request, _ = read_request(cmd, args, env, path, fileForStdin, options)
        return self._host.run_cmd_on_all(pattern, request, self._client())

    def _client(self) -> str:
        return getattr(self._caller, 'name', 'vmhost')

    def called_by(self, client: str) -> None:
        """Notes who calls on this thread, for the journal."""
        self._caller.name = client

    called_by.hidden = True      # type: ignore[attr-defined]

    def note_call(self, type: str, name: str, params: List[Any], end: str = '') -> None:
        """Journals a call: by whom, which method, on what; no options, since a password may be in them."""
        shown = ', '.join(map(shown_param, params))
        first = str(params[0])[:200] if params else ''
        if name == 'startTransfer':
            first = str((params + ['', ''])[1])[:200]
        vm, cmd_id = ('', first) if name in ('signalCmd', 'forgetCmd') else (first, '')
        with self._host.journal_permitting():
            self._host.journal.event(type, vm, cmd_id, 'by %s: %s(%s)%s' % (
                self._client(), name, shown, end))

    note_call.hidden = True      # type: ignore[attr-defined]

    def listCmds(self, filter: dict = {}) -> list:
        """[{cmdId, vm, cmd, state, submitted, ended}], the newest 1,000, the newest last.

        filter: vm, state, cmd, cmdId, since, finished, limit.

            >>> host.listCmds({'vm': 'node1', 'cmd': 'sh', 'limit': 1})[0]['state']
            'exited'
        """
        return [{'cmdId': execution.key, 'vm': execution.vm, 'cmd': execution.cmd,
                 'state': self._host.shown_state(execution), 'submitted': execution.submitted,
                 'ended': execution.ended} for execution in self._host.commands.list(self._by_name(filter))]

    def _by_name(self, filter: Dict[str, Any]) -> Dict[str, Any]:
        """The filter with the name of a VM that it gives by its id."""
        vm = filter.get('vm')
        guest = self._host.guests.find(vm) if isinstance(vm, str) else None
        return dict(filter, vm=guest.name) if guest is not None else filter

    def listFinishedCmds(self) -> list:
        """Ids of finished commands, the newest 1,000; each stays until forgetCmd or keep_results.

            >>> cmd_id in host.listFinishedCmds()
            True
        """
        return [execution.key for execution in self._host.commands.list({'finished': True})]

    def getCmdDetails(self, id: str) -> dict:
        """What was asked for: {cmdId, vm, cmd, args, env, path, options, submitted, client, executions}.

            >>> host.getCmdDetails(cmd_id)['args']
            ['-c', 'echo $DAY; exit 3']
        """
        executions = self._host.commands.find(id)
        command = self._host.commands.request(id.partition('@')[0])
        request = command['request']
        vm = executions[0].vm if self._is_one(id, executions) else command['target']
        return dict(request, cmdId=id, vm=vm, submitted=command['submitted'],
                    client=command['client'], fileForStdin=request['options'].get('fileForStdin', ''),
                    executions=[execution.key for execution in executions])

    def getCmdStatus(self, id: str, refresh: bool = True) -> dict:
        """{state, pid, wall, resources, processes, outSize, errSize, progress, error, age}.

        refresh asks the guest; age is how many seconds ago it said so (-1: never). Of a multicast's
        own id: {cmdId@vmName: the same}.

            >>> status = host.getCmdStatus(cmd_id)
            >>> status['state'], status['outSize']
            ('exited', 7)
        """
        executions = self._host.commands.find(id)
        if self._is_one(id, executions):
            if refresh:
                self._host.refresh(executions)
            return self._host.status(executions[0])
        if refresh:
            self._host.refresh(executions)
        return {execution.key: self._host.status(execution) for execution in executions}

    def _is_one(self, id: str, executions: List[Execution]) -> bool:
        return len(executions) == 1 and executions[0].key == id

    def getCmdResults(self, id: str) -> Any:
        """The results, '' while unfinished. Of a multicast's own id: {cmdId@vmName: results}.

        {cmd-id, out, err, finished, exitCodeOrSignal, resources, state, error, wall, started, ended,
        out-size, err-size, …}: see docs/protocol.md. out64 and err64 hold the exact bytes where
        out and err can't.

            >>> results = host.getCmdResults(cmd_id)
            >>> results['out'], results['exitCodeOrSignal']
            ('Monday\\n', 3)
            >>> results['resources']['ru_utime'] < 1
            True
        """
        executions = self._host.commands.find(id)
        if self._is_one(id, executions):
            return shown_results(executions[0].answer()) if executions[0].ended else ''
        if not all(execution.ended for execution in executions):
            return ''
        return {execution.key: shown_results(execution.answer()) for execution in executions}

    def getCmdOutput(self, id: str, stream: str = 'out', offset: int = 0, length: int = 65536) -> dict:
        """{data: base64, offset, next, size, eof} of a stream, ``out`` or ``err``; while it runs, too.

            >>> part = host.getCmdOutput(cmd_id, 'out', 3, 100)
            >>> part['data'].data, part['next'], part['eof']
            (b'day\\n', 7, True)
        """
        if stream not in ('out', 'err'):
            raise InvalidParams('stream is out or err, not %.40r' % stream)
        if not (0 <= offset <= 2 ** 53 and 0 <= length <= 2 ** 53):
            raise InvalidParams('offset and length are bytes, from 0')
        found = self._host.output(self._host.commands.find_one(id), stream, int(offset), int(length))
        return dict(found, data=xmlrpc.client.Binary(found['data']))

    def signalCmd(self, id: str, signal: Any = 'TERM') -> bool:
        """Sends a signal, by its name or number, to all processes of a command; False where it has ended.

            >>> long_id = host.runCmd('node1', 'sleep', ['600'])
            >>> host.signalCmd(long_id, 'INT')
            True
        """
        name = read_signal(signal)
        return any([self._host.signal(execution, name) for execution in self._host.commands.find(id)])

    def waitCmd(self, id: str, timeout: float = 30) -> bool:
        """Waits up to ``timeout`` (60) seconds for the end, of a multicast for all; whether it came.

            >>> host.waitCmd(long_id, 10)
            True
        """
        deadline = time.monotonic() + min(max(timeout, 0), LONGEST_POLL)
        return all([execution.done.wait(max(0, deadline - time.monotonic()))
                    for execution in self._host.commands.find(id)])

    def forgetCmd(self, id: str) -> bool:
        """Deletes a finished command from the journal, and its output.

            >>> host.forgetCmd(cmd_id)
            True
        """
        executions = self._host.commands.find(id)
        self._host.commands.forget(executions)
        for execution in executions:
            self._host.fetcher.forget(execution)
        return True

    # Files.

    def cpFileToVM(self, vm: str, local: FilePath, remote: FilePath = '') -> list:
        """Sends a file or folder to a VM, verified; ``[out, err, status]``, status 0 when it is there.

        remote is relative to what the guest serves (its own name at the root, where none is given). A file
        goes into remote where that is a folder, or ends with '/'. A path that isn't UTF-8, or has control
        characters, is given as base64: its exact bytes.

            >>> with open('hello.txt', 'w') as file:
            ...     count = file.write('hello')
            >>> host.cpFileToVM('node1', os.path.abspath('hello.txt'), 'greetings/hello.txt')
            ['', '', 0]
        """
        return self._copy('put', vm, local, remote)

    def cpFileFromVM(self, vm: str, remote: FilePath, local: FilePath = '') -> list:
        """Fetches a file or folder from a VM, verified; ``[out, err, status]``.

            >>> host.cpFileFromVM('node1', 'greetings/hello.txt', os.path.abspath('again.txt'))
            ['', '', 0]
        """
        return self._copy('get', vm, remote, local)

    def _start(self, direction: str, vm: str, source: FilePath, target: FilePath) -> Transfer:
        here, there = read_local, read_remote
        from_, to = (here, there) if direction == 'put' else (there, here)
        return self._host.transfers.start(direction, vm, from_(source), to(target))

    def _copy(self, direction: str, vm: str, source: FilePath, target: FilePath) -> list:
        transfer = self._start(direction, vm, source, target)
        transfer.done.wait()
        return ['', transfer.error, 0 if transfer.state == 'done' else 1]

    def startTransfer(self, direction: str, vm: str, source: FilePath, target: FilePath,
                      options: dict = {}) -> str:
        """Begins to move a file or folder, ``put`` to the VM or ``get`` from it; its id at once.

        Fault 10 (Busy) while another one goes to the same place, whose id it names.

            >>> source = os.path.abspath('hello.txt')
            >>> transfer_id = host.startTransfer('put', 'node1', source, 'second.txt')
        """
        if options:
            raise InvalidParams('startTransfer: no option %r; there are none' % sorted(options)[0])
        return self._start(direction, vm, source, target).id

    def getTransfer(self, id: str) -> dict:
        """{state, bytes, total, rate, error, …}; state: waiting, running, done, failed, cancelled.

            >>> while host.getTransfer(transfer_id)['state'] in ('waiting', 'running'):
            ...     time.sleep(0.1)
            >>> host.getTransfer(transfer_id)['bytes']
            5
        """
        return self._host.transfers.get(id).shown()

    def cancelTransfer(self, id: str) -> bool:
        """Stops a transfer; what has arrived stays, to be gone on from. False where it has ended.

            >>> host.cancelTransfer(transfer_id)      # it has ended
            False
        """
        return self._host.transfers.cancel(id)

    def listDir(self, vm: str, path: FilePath = '/') -> list:
        """[{name, size, mode, mtime, isDir}] of a folder in a VM; name64 holds a name's exact bytes where
        XML-RPC can't carry it as text.

            >>> [entry['name'] for entry in host.listDir('node1', '/greetings')]
            ['hello.txt']
        """
        return self._host.list_dir(vm, read_remote(path))


def read_local(path: FilePath) -> str:
    """A path of this machine, as text whose surrogates stand for what isn't UTF-8."""
    return path if isinstance(path, str) else os.fsdecode(path.data)


def read_remote(path: FilePath) -> str:
    """The same for a path of a guest."""
    return path if isinstance(path, str) else chirpwire.to_text(path.data)


def read_request(cmd: str, args: List[Any], env: Any, path: Any, file_for_stdin: str,
                 options: Dict[str, Any]) -> Tuple[Dict[str, Any], bool]:
    """What runCmd was asked for, and whether it may wait. Raises InvalidParams that names the argument."""
    if not cmd:
        raise InvalidParams('cmd is empty')
    if not all(isinstance(arg, (str, int, float)) for arg in args):
        raise InvalidParams('args: each should be text')
    read = read_options(options)
    if file_for_stdin:
        if 'stdin' in read or 'stdin64' in read:
            raise InvalidParams('fileForStdin and stdin: one of them')
        read['fileForStdin'] = file_for_stdin
    queue = bool(read.pop('queue', False))
    texts = [str(arg) for arg in args]
    folder = '' if path in (None, '', 'None') else read_text('path', path)
    request = {'cmd': cmd, 'args': texts, 'env': read_env(env), 'path': folder,
               'options': read}
    for text in [cmd, folder] + texts:
        if '\0' in text:
            raise InvalidParams('NUL in %.40r' % text)
    return request, queue


def read_text(name: str, value: Any) -> str:
    """The value, which should be text. Raises InvalidParams."""
    if not isinstance(value, str):
        raise InvalidParams('%s should be text' % name)
    return value


def read_env(env: Any) -> Dict[str, str]:
    """An environment, given as {} or as the text of a JSON object. Raises InvalidParams."""
    if isinstance(env, str):
        try:
            env = protocol.read_json(env) if env not in ('', 'None') else {}
        except ValueError as error:
            raise InvalidParams('env: %s' % error)
    if env is None:
        return {}
    if not isinstance(env, dict):
        raise InvalidParams('env should be a mapping')
    for name, value in env.items():
        if not name or '=' in name or '\0' in name + str(value):
            raise InvalidParams('env: %.40r can\'t be a variable' % name)
    return {name: str(value) for name, value in env.items()}


def read_options(options: Dict[str, Any]) -> Dict[str, Any]:
    """The options of runCmd, by their names on the wire. Raises InvalidParams."""
    by_wire_name = {wire: name for name, (wire, _) in OPTIONS.items()}
    read = {}  # type: Dict[str, Any]
    for name, value in options.items():
        name = by_wire_name.get(name, name)
        if name not in OPTIONS:
            raise InvalidParams('no option %r; there are %s' % (name, ', '.join(sorted(OPTIONS))))
        wire, kinds = OPTIONS[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise InvalidParams('option %s: %r is of the wrong type' % (name, value))
        if isinstance(value, (int, float)) and not (-20 if name == 'nice' else 0) <= value <= LARGEST_NUMBER:
            raise InvalidParams('option %s: %r is out of range' % (name, value))
        read[wire] = value
    if isinstance(read.get('stdin'), xmlrpc.client.Binary):
        read['stdin64'] = base64.b64encode(read.pop('stdin').data).decode('ascii')
    for name, value in read.get('limits', {}).items():
        if name not in LIMITS or isinstance(value, bool) or not isinstance(value, (int, float)) \
                or not -1 <= value <= LARGEST_NUMBER:
            raise InvalidParams('limits: %r; there are %s, each a number' % (name, ', '.join(LIMITS)))
    return read


def read_signal(name: Any) -> str:
    """A signal as the guest understands it: a name without SIG, or a number. Raises InvalidParams."""
    text = str(name).upper()
    text = text[3:] if text.startswith('SIG') else text
    is_number = text.isdigit() and len(text) <= 2 and 0 < int(text) <= 64
    if isinstance(name, bool) or not (is_number or text in SIGNALS):
        raise InvalidParams('no signal %.40r; there are %s, and numbers from 1 to 64'
                            % (name, ', '.join(SIGNALS)))
    return text


def shown_results(results: Dict[str, Any]) -> Dict[str, Any]:
    """The results for XML-RPC, which alters some text: the exact bytes go beside it then."""
    shown = dict(results)
    for stream in ('out', 'err'):
        text = results[stream]
        if stream + '64' not in results and not is_carried(text):
            shown[stream + '64'] = base64.b64encode(text.encode('utf-8')).decode('ascii')
    return shown


@functools.lru_cache(maxsize=None)
def api_methods() -> List[str]:
    """The names of the API's own methods, in the order of their definition."""
    return [name for name, value in vars(Api).items()
            if inspect.isfunction(value) and not name.startswith('_') and not hasattr(value, 'hidden')]


def find_method(api: Api, name: str) -> Callable:
    """A method of the API by its name, or an older one of it. Raises xmlrpc.client.Fault."""
    name = Api.ALIASES.get(name, name)
    if name not in api_methods():
        raise xmlrpc.client.Fault(-32601, 'no method %.100r; system.listMethods lists them' % name)
    return getattr(api, name)


class MethodText:
    """What the reference says of one method. ``example``: lines as in an interactive session."""

    def __init__(self, name: str, method: Callable) -> None:
        text = inspect.getdoc(method) or ''
        found = re.search(r'^ *>>> ', text, re.M)
        begin = found.start() if found else len(text)
        self.name = name
        self.signature = describe_signature(method)
        self.text = text[:begin].strip()
        self.example = textwrap.dedent(text[begin:])


def describe_api() -> List[Tuple[str, List[MethodText]]]:
    """The reference: [(part, its methods)], in the order of the definitions."""
    parts = []                         # type: List[Tuple[str, List[MethodText]]]
    for name in api_methods():
        if name in Api.PARTS:
            parts.append((Api.PARTS[name], []))
        parts[-1][1].append(MethodText(name, getattr(Api, name)))
    return parts


def describe_signature(method: Callable) -> str:
    """Its parameters, with their defaults."""
    parameters = inspect.signature(method).parameters.values()
    return '(%s)' % ', '.join(
        parameter.name if parameter.default is parameter.empty
        else '%s=%r' % (parameter.name, parameter.default)
        for parameter in parameters if parameter.name != 'self')


# --- XML-RPC ---------------------------------------------------------------------------------

USER = 'vmhost'
CHALLENGE = {'WWW-Authenticate': 'Basic realm="vmhost"'}
LARGEST_CALL = 16 * 1024 * 1024        # bytes of a request
CALLS_AT_ONCE = 200
SOCKET_TIMEOUT = 75.0                  # seconds of silence on a connection
XMLRPC_NAMES = {str: 'string', int: 'int', float: 'double', bool: 'boolean', list: 'array',
                dict: 'struct', xmlrpc.client.Binary: 'base64', FilePath: 'string'}  # type: Dict[Any, str]
ACCEPTED = {float: (int, float), bool: (bool, int), int: (int, float),
            FilePath: (str, xmlrpc.client.Binary)}   # type: Dict[Any, Tuple[type, ...]]


RESPONSE = "<?xml version='1.0'?><methodResponse><params><param>%s</param></params></methodResponse>"
XML_ESCAPES = dict([(ord('&'), '&amp;'), (ord('<'), '&lt;'), (ord('>'), '&gt;')] + list(XML_UNSAFE.items()))
NOT_PLAIN = re.compile('[%s]' % re.escape(''.join(map(chr, XML_ESCAPES))))


class XML(str):
    """Text that is XML already."""


def to_xml(value: Any) -> XML:
    """The value as XML-RPC can carry it: no None, no control characters, no big integers.

    Takes a third of the time of xmlrpc.client.dumps, and has no line breaks between the tags, which
    would cost a client time: answers may have thousands of values. Raises TypeError.
    """
    return XML(_to_xml(value))


def _to_xml(value: Any) -> str:
    if type(value) is str:             # most are
        return '<value><string>%s</string></value>' % xml_text(value)
    if isinstance(value, dict):
        return '<value><struct>%s</struct></value>' % ''.join(
            ['<member><name>%s</name>%s</member>' % (xml_text(str(name)), _to_xml(item))
             for name, item in value.items()])
    if isinstance(value, (list, tuple)):
        return '<value><array><data>%s</data></array></value>' % ''.join([_to_xml(item) for item in value])
    if isinstance(value, bool):
        return '<value><boolean>%d</boolean></value>' % value
    if isinstance(value, (int, float)):
        number = xml_number(value)
        return ('<value><double>%r</double></value>' if isinstance(number, float) else
                '<value><int>%d</int></value>') % number
    if isinstance(value, XML):
        return value
    if isinstance(value, xmlrpc.client.Binary):
        return '<value><base64>%s</base64></value>' % base64.b64encode(value.data).decode('ascii')
    if value is None:
        return '<value><string></string></value>'
    raise TypeError('%s in an answer' % type(value).__name__)


def xml_text(text: str) -> str:
    """Text between tags; what XML can't carry is replaced."""
    is_plain = text.isalnum() or not NOT_PLAIN.search(text)
    return text if is_plain else text.translate(XML_ESCAPES)


def xml_number(value: Any) -> Any:
    """A number, as a double where XML-RPC has no integer for it."""
    return value if isinstance(value, float) or -2 ** 31 <= value < 2 ** 31 else float(value)


AUDITED = frozenset((          # methods that change something, and leave no event of their own
    'createVM', 'removeVM', 'start', 'shutdown', 'reset', 'powerOff', 'pause', 'resume', 'saveState',
    'discardState', 'takeSnapshot', 'restoreSnapshot', 'deleteSnapshot', 'setLimits', 'remoteDesktop',
    'setupNetwork', 'cleanup', 'cpFileToVM', 'cpFileFromVM', 'startTransfer', 'cancelTransfer',
    'signalCmd', 'forgetCmd'))


class Dispatcher:
    """Calls methods by name, and turns what they raise into faults."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._system = {'system.listMethods': self.list_methods,
                        'system.methodHelp': self.method_help,
                        'system.methodSignature': self.method_signature,
                        'system.multicall': self.multicall}  # type: Dict[str, Callable]

    def answer(self, body: bytes, client: str) -> bytes:
        """The XML that answers the XML of a call; whatever goes wrong is a fault in it."""
        try:
            params, method = xmlrpc.client.loads(body, use_builtin_types=False)
            if method is None:
                raise xmlrpc.client.Fault(-32600, 'no methodCall')
        except xmlrpc.client.Fault as fault:
            return self._refuse(fault)
        except Exception as error:      # expat, base64, int(): XML from outside may break any of them
            return self._refuse(xmlrpc.client.Fault(-32700, 'no XML-RPC: %s' % error))
        self._api.called_by(client)
        try:
            return (RESPONSE % self.call(method, list(params))).encode('utf-8')
        except xmlrpc.client.Fault as fault:
            return self._refuse(fault)

    def _refuse(self, fault: xmlrpc.client.Fault) -> bytes:
        return xmlrpc.client.dumps(fault, methodresponse=True).encode('utf-8')

    def call(self, name: str, params: List[Any]) -> XML:
        """The method's answer. Raises xmlrpc.client.Fault, and nothing else.

        Who asked for what changes something is in the journal, and whether it was refused.
        """
        if Api.ALIASES.get(name, name) not in AUDITED:
            return self._call(name, params)
        self._api.note_call('asked', name, params)
        try:
            return self._call(name, params)
        except xmlrpc.client.Fault as fault:
            self._api.note_call('refused', name, params, ': fault %d, %s' % (
                fault.faultCode, fault.faultString))
            raise

    def _call(self, name: str, params: List[Any]) -> XML:
        try:
            method = self._find(name)
            return to_xml(method(*check_arguments(method, params)))
        except xmlrpc.client.Fault as fault:
            code, text = fault.faultCode, fault.faultString
        except VMHostError as error:
            code, text = error.fault, str(error)
        except Exception as error:
            log.exception('in %s', name)
            code, text = -32603, '%s: %s' % (type(error).__name__, error)
        raise xmlrpc.client.Fault(code, text.translate(XML_UNSAFE))

    def list_methods(self) -> list:
        """Names of all methods."""
        return sorted(api_methods() + list(Api.ALIASES) + list(self._system))

    def _find(self, name: str) -> Callable:
        return self._system.get(name) or find_method(self._api, name)

    def method_help(self, name: str) -> str:
        """What a method does."""
        return inspect.getdoc(self._find(name)) or ''

    def method_signature(self, name: str) -> list:
        """The types of answer and parameters, once for each number of parameters."""
        signature = inspect.signature(self._find(name))
        kinds = [XMLRPC_NAMES.get(signature.return_annotation, 'undef')]
        found = []
        for parameter in signature.parameters.values():
            if parameter.default is not parameter.empty:
                found.append(list(kinds))
            kinds.append(XMLRPC_NAMES.get(parameter.annotation, 'undef'))
        return found + [kinds]

    def multicall(self, calls: list) -> list:
        """[{methodName, params}] -> [[answer] or {faultCode, faultString}]."""
        return [self._one_of_many(call) for call in calls]

    def _one_of_many(self, call: Any) -> Any:
        try:
            if not isinstance(call, dict) or not isinstance(call.get('params', []), list):
                raise xmlrpc.client.Fault(-32602, 'a call is {methodName, params}')
            if call.get('methodName') == 'system.multicall':
                raise xmlrpc.client.Fault(-32602, 'system.multicall within system.multicall')
            return [self.call(str(call.get('methodName')), call.get('params', []))]
        except xmlrpc.client.Fault as fault:
            return {'faultCode': fault.faultCode, 'faultString': fault.faultString}


signature_of = functools.lru_cache(maxsize=None)(inspect.signature)


def check_arguments(method: Callable, params: List[Any]) -> List[Any]:
    """The arguments, for a method that takes as many, of these types. Raises InvalidParams."""
    signature = signature_of(method)
    try:
        bound = signature.bind(*params)
    except TypeError as error:
        raise InvalidParams('%s%s: %s' % (method.__name__, describe_signature(method), error))
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].annotation
        accepted = ACCEPTED.get(kind, kind)
        if kind is not Any and not isinstance(value, accepted):
            raise InvalidParams('%s: %s should be %s' % (method.__name__, name,
                                                         XMLRPC_NAMES.get(kind, kind)))
    return list(bound.args)


# --- pages -----------------------------------------------------------------------------------

LINK_LIFE = 120.0              # seconds in which a link opens the status page
VISIT_LIFE = 12 * 3600.0       # seconds without a request, after which a visit ends
VISITS_KEPT = 100
LOOK_LIFE = 1.0                # seconds that one look at everything serves all pages
ASK_EVERY = 2.0                # seconds between two questions to a guest about a command
ASKED_AT_ONCE = 50
MACHINES_SHOWN = 500
COMMANDS_SHOWN = 100
ENDED_SHOWN = 20
TEXT_SHOWN = 300               # characters of an event's text: a command may have a megabyte of them
OUTPUT_SHOWN = 64 * 1024       # bytes of output at once
PAGE_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 60em; margin: 0 auto; padding: 1em; font: 16px/1.5 system-ui, sans-serif; }
h3 { margin-bottom: 0; font: bold 1em ui-monospace, monospace; overflow-wrap: anywhere; }
p { margin: .3em 0; }
pre { overflow-x: auto; padding: .5em; border: 1px solid #8888; border-radius: 4px; }
"""


def read_beside(name: str) -> bytes:
    """A file that lies beside this one, in a folder or in a bundle."""
    folder = os.path.dirname(__file__)
    return __loader__.get_data(os.path.join(folder, name))     # type: ignore[name-defined]


def page_headers(page: str) -> Dict[str, str]:
    """What a browser is told: nothing but what stands in this page is run, shown or fetched."""
    allowed = {}
    for tag in ('style', 'script'):
        parts = re.findall('<%s>(.*?)</%s>' % (tag, tag), page, re.S)
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        allowed[tag] = ' '.join("'sha256-%s'" % digest for digest in digests) or "'none'"
    return {'Content-Security-Policy':
            "default-src 'none'; style-src %(style)s; script-src %(script)s; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'" % allowed,
            'Referrer-Policy': 'no-referrer', 'Cross-Origin-Resource-Policy': 'same-origin',
            'Cross-Origin-Opener-Policy': 'same-origin'}


def reference_page() -> str:
    """The API's reference as a page: what docs/api.md says, of this very program."""
    escape = html.escape
    parts = ['<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">',
             '<meta name="viewport" content="width=device-width, initial-scale=1">',
             '<title>vmhost %s: methods</title>' % agent.VERSION,
             '<link rel="icon" href="data:,">', '<style>%s</style>' % PAGE_STYLE,
             '<main>\n<h1>Methods of vmhost %s</h1>' % agent.VERSION,
             paragraphs(inspect.getdoc(Api) or '')]
    for part, methods in describe_api():
        parts.append('<h2>%s</h2>' % escape(part))
        for method in methods:
            parts += ['<h3 id="%s">%s%s</h3>' % (method.name, method.name, escape(method.signature)),
                      paragraphs(method.text), '<pre tabindex="0">%s</pre>' % escape(method.example)]
    aliases = ['``%s`` is ``%s``' % item for item in Api.ALIASES.items()]
    parts += ['<h2>Older names</h2>', paragraphs(', '.join(aliases)), '</main>\n</html>\n']
    return '\n'.join(parts)


def paragraphs(text: str) -> str:
    """A docstring's text as HTML."""
    marked = re.sub('``(.*?)``', r'<code>\1</code>', html.escape(text))
    return '\n'.join('<p>%s</p>' % part for part in marked.split('\n\n'))


class Visits:
    """Who may see the status page without the token: a browser that came by a link. Any thread.

    A link holds a key, that is good once and for two minutes; it is exchanged for a cookie, so
    that nothing that lasts stands in an address. The cookie opens the status page alone.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Guards both tables: key or cookie -> when it ends. Nothing is called while it is held.
        self._lock = threading.Lock()
        self._keys = collections.OrderedDict()     # type: Dict[str, float]
        self._visits = collections.OrderedDict()   # type: Dict[str, float]

    def new_key(self) -> str:
        """A key for one link."""
        return self._add(self._keys, LINK_LIFE)

    def enter(self, key: str) -> str:
        """A visit's secret for a key; '' where the key is unknown, used or too old."""
        with self._lock:
            ends = self._keys.pop(key, 0.0)
        return self._add(self._visits, VISIT_LIFE) if ends > self._clock() else ''

    def is_known(self, secret: str) -> bool:
        """Whether that visit goes on; each time it is asked for, it is prolonged."""
        with self._lock:
            ends = self._visits.pop(secret, 0.0)
            if ends <= self._clock():
                return False
            self._visits[secret] = self._clock() + VISIT_LIFE
            return True

    def _add(self, table: Any, life: float) -> str:
        secret = secrets.token_urlsafe(24)
        with self._lock:
            table[secret] = self._clock() + life
            while len(table) > VISITS_KEPT:
                table.popitem(last=False)      # the oldest, or the one not used for longest
        return secret


def number_or_0(value: Any) -> float:
    """A number that a guest told, where it is one that JSON can carry."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else 0


class StatusPage:
    """The status page, and what it reads. It shows, and never acts. Any thread may ask.

    ``/status`` is the page; ``/status/snapshot?since=TIME`` all that goes on now, with loads since
    that time; ``/status/events?after=NUMBER&timeout=SECONDS`` and ``/status/output?id=ID&
    stream=STREAM&offset=BYTES`` (no offset: the end of it) are getEvents and getCmdOutput.
    """

    def __init__(self, host: Host, api: Api) -> None:
        self._host = host
        self._api = api
        self._visits = Visits()
        self.page = read_beside('status.html')
        self.headers = page_headers(self.page.decode('utf-8'))
        # Guards the last look, and lets one thread at a time look: other pages wait for what it saw.
        self._looking = threading.Lock()
        self._looked = -1e9
        self._seen = {}                # type: Dict[str, Any]

    def link(self, url: str) -> str:
        """The address of the page with a key that opens it once."""
        return '%sstatus?key=%s' % (url, self._visits.new_key())

    def enter(self, query: Dict[str, str]) -> str:
        """A new visit, for the key of a link; else ''."""
        return self._visits.enter(query.get('key', ''))

    def is_visitor(self, secret: str) -> bool:
        """Whether a cookie is that of a visit that goes on."""
        return self._visits.is_known(secret)

    def read(self, what: str, query: Dict[str, str]) -> Dict[str, Any]:
        """The answer to one of the page's questions. Raises VMHostError, ValueError, KeyError."""
        if what == 'snapshot':
            return self._snapshot(float(query.get('since', 0)))
        if what == 'events':
            return self._events(int(query.get('after', 0)), float(query.get('timeout', 0)))
        if what == 'output':
            return self._output(query['id'], query.get('stream', 'out'), query.get('offset', ''))
        raise KeyError(what)

    def _events(self, after: int, timeout: float) -> Dict[str, Any]:
        found = self._api.getEvents(after, timeout)
        return {'last': found['last'], 'events': [dict(event, text=event['text'][:TEXT_SHOWN])
                                                  for event in found['events']]}

    def _output(self, id: str, stream: str, offset: str) -> Dict[str, Any]:
        execution = self._host.commands.find_one(id)
        if not offset:
            self._host.refresh([execution])
        status = self._host.status(execution)
        size = status['errSize' if stream == 'err' else 'outSize']
        begin = int(offset) if offset else max(0, int(number_or_0(size)) - OUTPUT_SHOWN)
        found = self._api.getCmdOutput(id, stream, begin, OUTPUT_SHOWN)
        return dict(found, data=base64.b64encode(found['data'].data).decode('ascii'),
                    state=status['state'])

    def _snapshot(self, since: float) -> Dict[str, Any]:
        with self._looking:
            if time.monotonic() - self._looked > LOOK_LIFE:
                self._seen = self._look()
                self._looked = time.monotonic()
            seen = self._seen
        return dict(seen, vms=[dict(vm, loads=[load for load in vm['loads'] if load[0] > since])
                               for vm in seen['vms']])

    def _look(self) -> Dict[str, Any]:
        now = time.time()
        commands, unfinished = self._commands()
        vms = self._vms()
        return {'time': now, 'agent': self._api.agentInfo(), 'host': socket.gethostname(),
                'vms': vms[:MACHINES_SHOWN], 'vmsInAll': len(vms), 'commands': commands,
                'transfers': self._transfers(),
                'unfinished': unfinished, 'lastEvent': self._host.journal.last_event}

    def _transfers(self) -> List[Dict[str, Any]]:
        """Those under way, the oldest first, then those that ended last."""
        known = self._host.transfers.list()
        under_way = [transfer for transfer in known if transfer['state'] in ('waiting', 'running')]
        ended = [transfer for transfer in known if transfer not in under_way]
        return under_way + ended[:-ENDED_SHOWN - 1:-1]

    def _vms(self) -> List[Dict[str, Any]]:
        """All VMs, and all agents: those that are there before those that were."""
        rows = [self._of_guest(guest) for guest in self._host.guests.all()]
        if self._host.hypervisor is not None:
            known = {row['id'] for row in rows}
            rows += [self._of_vm(name, state, id)
                     for name, state, id in self._host.hypervisor.known_vms() if id not in known]
        return sorted(rows, key=lambda row: (row['agent'] == 'lost', row['name'], row['id']))

    def _of_guest(self, guest: Guest) -> Dict[str, Any]:
        loads = [[load['time'], load.get('load1'), load.get('mem_free')]
                 for load in self._host.guests.loads_of(guest)]
        state = 'Null' if guest.agent == 'lost' else 'Running'
        if self._host.hypervisor is not None:
            state = self._host.hypervisor.known_state(guest.id) or state
        return {'id': guest.id, 'name': guest.name, 'state': state, 'agent': guest.agent,
                'ip': guest.ip, 'lastSeen': guest.last_seen, 'os': str(guest.facts.get('os', '')),
                'cpus': number_or_0(guest.facts.get('cpus')),
                'mem': number_or_0(guest.facts.get('mem')), 'loads': loads}

    def _of_vm(self, name: str, state: str, id: str) -> Dict[str, Any]:
        """A VM of which no agent was ever heard."""
        return {'id': id, 'name': name, 'state': state, 'agent': 'never', 'ip': '', 'lastSeen': 0,
                'os': '', 'cpus': 0, 'mem': 0, 'loads': []}

    def _commands(self) -> Tuple[List[Dict[str, Any]], int]:
        """The unfinished commands, the oldest first, then those that ended last; how many are unfinished."""
        running = self._host.commands.list({'finished': False, 'limit': COMMANDS_SHOWN})
        now = time.monotonic()
        stale = [execution for execution in running if now - execution.status_time > ASK_EVERY]
        stale.sort(key=lambda execution: execution.status_time)
        self._host.ask_for_news(stale[:ASKED_AT_ONCE])
        ended = sorted(self._host.commands.last_ended(ENDED_SHOWN), key=lambda one: -one.ended)
        return [self._of_command(execution) for execution in running + ended], self._host.commands.count()

    def _of_command(self, execution: Execution) -> Dict[str, Any]:
        status = self._host.status(execution)
        usage = status['resources'] if isinstance(status['resources'], dict) else {}
        shown = {name: number_or_0(status[name])
                 for name in ('wall', 'processes', 'outSize', 'errSize', 'age')}    # type: Dict[str, Any]
        return dict(shown, cmdId=execution.key, vm=execution.vm, cmd=execution.cmd[:TEXT_SHOWN],
                    state=status['state'], ended=execution.ended,
                    progress=str(status['progress'])[:TEXT_SHOWN],
                    end=describe_end(execution.answer())[:TEXT_SHOWN] if execution.ended else '',
                    cpu=number_or_0(usage.get('ru_utime')) + number_or_0(usage.get('ru_stime')),
                    rss=number_or_0(usage.get('ru_maxrss')) * 1024)


# --- server ----------------------------------------------------------------------------------

class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection: POST calls the API, GET shows pages. On a thread of its own."""

    protocol_version = 'HTTP/1.1'
    server_version = 'vmhost/' + agent.VERSION
    sys_version = ''
    timeout = SOCKET_TIMEOUT
    wbufsize = -1                      # the answer leaves in one segment …
    disable_nagle_algorithm = True     # … and at once
    server = None                      # type: Any

    def do_POST(self) -> None:
        """A call of the API."""
        if not self._is_allowed():
            return
        if self.path not in ('/', '/RPC2'):
            return self._refuse(404, 'calls go to / or /RPC2')
        length = self.headers.get('Content-Length', '')
        if not length.isdigit():
            return self._refuse(411, 'Content-Length is missing')
        if int(length) > LARGEST_CALL:
            return self._refuse(413, 'at most %d bytes are taken' % LARGEST_CALL)
        body = self.rfile.read(int(length))
        if len(body) == int(length):
            answer = self.server.dispatcher.answer(body, 'vmhost@%s' % self.client_address[0])
            self.respond(200, 'text/xml; charset=utf-8', answer)

    def do_GET(self) -> None:
        """A page, or what the status page asks for."""
        if not self.is_from_here():
            return
        path, _, rest = self.path.partition('?')
        query = dict(urllib.parse.parse_qsl(rest))
        head, _, what = path[1:].partition('/')
        if head == 'status':
            return self._show_status(what, query)
        if not self._is_allowed():
            return
        if path != '/':
            return self._refuse(404, 'no page %.100s' % path)
        page = reference_page()
        self.respond(200, 'text/html; charset=utf-8', page.encode(), page_headers(page))

    def _show_status(self, what: str, query: Dict[str, str]) -> None:
        """The status page and its questions: for who has the token, a visit's cookie, or a key."""
        status = self.server.status
        name = 'vmhost-%d' % self.server.address[1]    # browsers share cookies between ports
        visit = '' if what else status.enter(query)
        if not (visit or status.is_visitor(self._cookie(name)) or self.has_token()):
            return self._refuse_visitor()
        if what:
            return self._answer_page(what, query)
        headers = dict(status.headers)
        if visit:
            headers['Set-Cookie'] = '%s=%s; Path=/status; HttpOnly; SameSite=Strict' % (name, visit)
        self.respond(200, 'text/html; charset=utf-8', status.page, headers)

    def _cookie(self, name: str) -> str:
        for part in self.headers.get('Cookie', '').split(';'):
            key, _, value = part.strip().partition('=')
            if key == name:
                return value
        return ''

    def _refuse_visitor(self) -> None:
        # The page itself says what to do; a browser's own dialogue would only be in its way.
        challenge = {} if self.headers.get('X-Requested-With') else CHALLENGE
        self._refuse(401, 'the status page opens by a link, good once and for two minutes: python '
                     'vmhost.py host.ini status --open; or for the user %s, with the token' % USER, challenge)

    def _answer_page(self, what: str, query: Dict[str, str]) -> None:
        """One of the page's questions, answered as JSON."""
        try:
            code, answer = 200, self.server.status.read(what, query)
        except (ValueError, OverflowError, KeyError, InvalidParams) as error:
            code, answer = 400, {'error': str(error)}
        except NoSuchCommand as error:
            code, answer = 404, {'error': str(error)}
        except VMHostError as error:
            code, answer = 503, {'error': str(error)}
        self.respond(code, 'application/json', json.dumps(answer).encode(),
                     {'Cross-Origin-Resource-Policy': 'same-origin'})

    def _is_allowed(self) -> bool:
        """Token, Host and Origin; else it has been refused."""
        if not self.is_from_here():
            return False
        if not self.has_token():
            self._refuse(401, 'user %s and the password in state_dir/xmlrpc.token are wanted' % USER,
                         CHALLENGE)
            return False
        return True

    def is_from_here(self) -> bool:
        """Refuses what another page in a browser can send: Origin, or the name of a foreign host."""
        by_a_page = self.headers.get('Sec-Fetch-Site') in ('cross-site', 'same-site') \
            and self.headers.get('Sec-Fetch-Mode') != 'navigate'
        if self.headers.get('Origin') is not None or by_a_page:
            self._refuse(403, 'requests from web pages are refused')
            return False
        if not self.server.is_own_name(self.headers.get('Host'), self.connection.getsockname()[0]):
            self._refuse(403, 'foreign Host')
            return False
        return True

    def has_token(self) -> bool:
        """Whether the request carries user and password, or needs none."""
        if not self.server.token:
            return True
        scheme, _, given = self.headers.get('Authorization', '').partition(' ')
        wanted = base64.b64encode(('%s:%s' % (USER, self.server.token)).encode())
        return scheme.lower() == 'basic' and hmac.compare_digest(
            given.strip().encode('utf-8', 'replace'), wanted)

    def _refuse(self, code: int, why: str, headers: Optional[Dict[str, str]] = None) -> None:
        # What the request still holds is not read; the connection can't be used for another one.
        self.close_connection = True
        log.debug('refused %s: %s', self.client_address, why)
        self.respond(code, 'text/plain; charset=utf-8', (why + '\n').encode(),
                     dict(headers or {}, Connection='close'))

    def respond(self, code: int, kind: str, body: bytes,
                headers: Optional[Dict[str, str]] = None) -> None:
        """Sends a whole answer."""
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(body)))
        self.send_header('X-Content-Type-Options', 'nosniff')
        self.send_header('Cache-Control', 'no-store')
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are for the log's eyes only when it looks closely."""
        log.debug('%s ' + format, self.client_address[0], *args)


class XMLRPCServer(socketserver.TCPServer):
    """HTTP on the XML-RPC port, a thread per connection, no call holding up another."""

    request_queue_size = 128
    # On Windows it would let another process take the port.
    allow_reuse_address = os.name == 'posix'

    def __init__(self, host: Host) -> None:
        """Binds. Raises VMHostError that names the port."""
        listen_on, port = host.settings.Host.xmlrpc_listen_on, host.settings.Host.xmlrpc_port
        self.address_family = socket.AF_INET6 if ':' in listen_on else socket.AF_INET
        self.token = host.token if host.settings.Host.xmlrpc_auth else ''
        if not (self.token or is_loopback(listen_on)):
            raise VMHostError('[Host] xmlrpc_auth = no: anybody on %s could run commands; expected '
                              'xmlrpc_listen_on = 127.0.0.1 with it' % listen_on)
        self.api = Api(host)
        self.dispatcher = Dispatcher(self.api)
        self.status = StatusPage(host, self.api)
        self._address_file = host.folder.file('xmlrpc.address')
        # Guards the table of connections; nothing but the start, or end, of one happens while it is held.
        self._lock = threading.Lock()
        self._connections = {}         # type: Dict[socket.socket, threading.Thread]
        try:
            super().__init__((listen_on, port), _Handler)
        except (OSError, OverflowError) as error:
            why = agent.why_not_listening(error) if isinstance(error, OSError) else error
            raise VMHostError('XML-RPC can\'t listen on %s:%s ([Host] xmlrpc_listen_on, xmlrpc_port): %s'
                              % (listen_on, port, why))
        self.address = self.server_address[:2]     # type: Any
        self._names = {'localhost', '127.0.0.1', '[::1]', listen_on.lower(), '[%s]' % listen_on,
                       socket.gethostname().lower()}
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), name='xmlrpc',
                                        daemon=True)

    def start(self) -> None:
        """Serves, on the thread ``xmlrpc``; the file xmlrpc.address tells the command line where."""
        self._thread.start()
        with open(self._address_file, 'w') as file:
            file.write('%s:%s\n' % self.address)

    def own_url(self) -> str:
        """Where a browser on this machine finds this server."""
        listen_on, port = self.address
        name = {'0.0.0.0': '127.0.0.1', '::': '::1', '': '127.0.0.1'}.get(listen_on, listen_on)
        return 'http://%s:%d/' % ('[%s]' % name if ':' in name else name, port)

    def is_own_name(self, host: Optional[str], address: str) -> bool:
        """Whether a Host header names this server, of which the client uses that address.

        No header: no browser sent it. A foreign name that leads here would be another site's.
        """
        if host is None:
            return True
        name = host.strip().lower()
        head, colon, port = name.rpartition(':')
        if colon and port.isdigit():
            name = head
        return name in self._names or name.strip('[]') == address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hands a connection to a thread of its own."""
        thread = threading.Thread(target=self._serve, args=(request, client_address),
                                  name='xmlrpc-%s:%s' % client_address[:2], daemon=True)
        with self._lock:
            if len(self._connections) >= CALLS_AT_ONCE:
                log.warning('more than %d connections: one is refused', CALLS_AT_ONCE)
                self.shutdown_request(request)
                return
            try:
                thread.start()
            except RuntimeError as error:      # no more threads, of this process or of its user
                log.warning('a connection can\'t be served: %s', error)
                self.shutdown_request(request)
                return
            self._connections[request] = thread

    def _serve(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except OSError as error:
            log.debug('connection from %s: %s', client_address, error)
        except Exception:       # one connection's end is not the server's
            log.exception('connection from %s', client_address)
        finally:
            self.shutdown_request(request)
            with self._lock:
                self._connections.pop(request, None)

    def stop(self, timeout: float = 1.0) -> None:
        """Ends all connections, and the threads with a deadline."""
        if self._thread.ident is not None:
            self.shutdown()
            self._thread.join(timeout)
        self.server_close()
        with self._lock:
            connections = dict(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + timeout
        for thread in connections.values():
            thread.join(max(0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning('thread %s still runs', thread.name)
        with contextlib.suppress(OSError):
            os.remove(self._address_file)


# --- configuration ---------------------------------------------------------------------------

def ip_address(value: str) -> str:
    """A kind: an IPv4 address or netmask."""
    try:
        return str(ipaddress.IPv4Address(value))
    except ValueError:
        raise ValueError('an IPv4 address')


def port_range(value: str) -> str:
    """A kind: ports such as 5000-5050, or a single one."""
    match = re.match(r'^(\d{1,5})(?:\s*-\s*(\d{1,5}))?$', value)
    low, high = (int(match.group(1)), int(match.group(2) or match.group(1))) if match else (0, 0)
    if not 0 < low <= high < 65536:
        raise ValueError('ports such as 5000-5050')
    return '%d-%d' % (low, high)


SETTINGS = {
    'Broker': {
        'embedded': (agent.yes_no, 'yes'), 'host': (agent.text, 'auto'),
        'port': (agent.integer(0, 65535), '61613'), 'username': (agent.text, ''),
        'password': (agent.text, ''), 'heartbeat': (agent.integer(0, 3600), '10'),
        'max_frame': (agent.at_least(24 << 10, agent.size, '24K'), '1M'),
        'tls': (agent.yes_no, 'no'), 'ca_file': (agent.path, ''), 'cert_file': (agent.path, ''),
        'key_file': (agent.path, '')},
    'Host': {
        'xmlrpc_listen_on': (agent.given, '127.0.0.1'),
        'xmlrpc_port': (agent.integer(0, 65535), '50505'),
        'xmlrpc_auth': (agent.yes_no, 'yes'), 'state_dir': (agent.path, 'vmhost-state'),
        'vm_gc_grace': (agent.at_least(1, agent.duration, '1 s'), '30'),
        'keep_results': (agent.duration, '7d'), 'fetch_limit': (agent.size, '64M'),
        'max_transfers': (agent.integer(1, 1000), '4')},
    'Hypervisor': {
        'hypervisor': (agent.choice('auto', 'VirtualBox', 'none'), 'auto'),
        'command_timeout': (agent.duration, '45')},
    'Network': {
        'mode': (agent.choice('hostonly', 'nat'), 'hostonly'),
        'interface': (agent.text, 'vboxnet0'), 'manage': (agent.yes_no, 'no'),
        'host_ip': (ip_address, '192.168.56.1'), 'netmask': (ip_address, '255.255.255.0'),
        'dhcp_server': (ip_address, '192.168.56.100'),
        'dhcp_lower': (ip_address, '192.168.56.101'),
        'dhcp_upper': (ip_address, '192.168.56.254')},
    'RemoteDesktop': {
        'address': (agent.text, '127.0.0.1'), 'ports': (port_range, '5000-5050'),
        'auth': (agent.choice('external', 'guest', 'null'), 'external'),
        'security': (agent.choice('TLS', 'RDP', 'Negotiate'), 'TLS')},
    'Logging': agent.LOGGING,
}  # type: Dict[str, Dict[str, Tuple[Callable, str]]]


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
        if body.translate(XML_UNSAFE) != body:
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
        self.err.write('vmhost: %s\n' % printable(text))
        self.err.flush()

    def json(self, value: Any, indent: Optional[int] = 2) -> None:
        """The value as JSON."""
        ascii_only = (self.out.encoding or '').lower().replace('-', '') != 'utf8'
        self.say(json.dumps(value, indent=indent, ensure_ascii=ascii_only, default=as_text))

    def table(self, headings: List[str], rows: Iterable[List[Any]]) -> None:
        """Columns as wide as they need to be, and cut to the terminal, but for the first one."""
        lines = [[printable(str(cell)) for cell in row] for row in [headings] + list(rows)]
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


def printable(text: str) -> str:
    """The text without anything that a terminal would obey: a guest may have written it."""
    return ''.join(char if char.isprintable() else char.encode('unicode_escape').decode('ascii')
                   for char in text)


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
        screen.say(printable('%s: %s, %d %%' % (job['vm'], job['text'], job['percent'])))
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
            screen.say('%s%s' % (indent, printable(str(name))))
            screen_pairs(screen, value, indent + '    ')
            continue
        if name in ('submitted', 'started', 'ended', 'lastSeen') and isinstance(value, float):
            value = shown_time(value)
        elif isinstance(value, list):
            value = ', '.join(map(str, value))
        screen.say('%s%-*s  %s' % (indent, width, printable(str(name)), printable(str(value)) or '-'))


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
            answer = self._host.call('getCmdOutput', self.key, stream, self._offsets[stream], OUTPUT_SLICE)
            if not answer['data'].data:
                break
            self._pipes[stream].write(answer['data'].data)
            self._offsets[stream] = answer['next']
        return self._offsets[stream] > begin


class Pipe:
    """Bytes to one of our own outputs; with a VM's name, each line begins with it."""

    def __init__(self, stream: Any, vm: str) -> None:
        self._to = stream.buffer
        self._prefix = (printable(vm) + ': ').encode('utf-8', 'replace') if vm else b''
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
    screen.say(printable(made))
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
            screen.say('%s %s' % (printable(vm), done))
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
    line = '%s: %s' % (printable(vm), shown_span(seconds))
    for job in host.call('agentInfo')['jobs']:
        if job['vm'] == vm and job['percent']:
            line += ', %d %%, %s left %s' % (job['percent'], shown_span(
                seconds * (100 - job['percent']) / job['percent']), printable(job['text']))
    return line


def do_snap(host: Client, screen: Screen, args: Any) -> int:
    """Lists, takes, restores and deletes snapshots."""
    if args.action == 'ls':
        names = host.call('listSnapshots', args.vm)
        if args.json:
            screen.json(names)
        else:
            for name in names:
                screen.say(printable(name))
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
        screen.say(printable('%s %s %s (%s)' % ('removed' if args.yes else 'would remove', what['kind'],
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
            screen.progress('%s: %s' % (printable(vm), transfer_line(now)))
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
            screen.say('%s in %.1f ms' % (printable(host.call('ping', name, args.timeout)),
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
    return ' '.join(printable(word) for word in words if word)


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


# --- command line: is all well? ----------------------------------------------------------------

LEAST_DISK = 100 * 1024 * 1024     # bytes that the state folder's disk should have free
CLOCK_TOLERANCE = 60.0             # seconds that a guest's clock may be off, and nobody cares


def do_check(host: Client, screen: Screen, args: Any) -> int:
    """Looks at every precondition; the exit code is 0 when the host agent works, or would."""
    settings = host.settings
    findings = [agent.check_python(), agent.check_package('stomper', needed=True),
                agent.check_folder(settings.Host.state_dir, '[Host] state_dir'),
                agent.check_disk(settings.Host.state_dir, LEAST_DISK), agent.check_clock()]
    try:
        findings += check_running(host, host.call('agentInfo'), settings.Network.mode)
    except NoHost as error:
        findings += check_start(settings, error)
    except VMHostError as error:
        findings.append(agent.Finding(False, 'host agent', str(error)))
    findings += check_hypervisor(settings)
    if args.json:
        screen.json([finding._asdict() for finding in findings])
    else:
        for line in agent.describe_findings(findings, screen.out.encoding):
            screen.say(printable(line))
    return 0 if all(finding.ok or not finding.needed for finding in findings) else 1


def check_running(host: Client, info: Dict[str, Any], mode: str) -> Iterator[agent.Finding]:
    """What the running host agent tells about itself, its broker and its guests."""
    yield agent.Finding(info['version'] == agent.VERSION, 'host agent %s at %s' % (
        info['version'], host.address), 'restart it: the files here are of version ' + agent.VERSION)
    broker = info['broker']
    yield agent.Finding(bool(broker['connected']), 'broker at %s' % broker['address'],
                        'no connection: is it running, and are [Broker] host, port, username, password '
                        'and tls right?')
    if info['hypervisor'] != 'none' and is_out_of_reach(broker['address'], mode):
        yield agent.Finding(False, 'network', 'net --setup makes it; then: '
                            + OUT_OF_REACH % broker['address'], needed=False)
    guests = [guest for _, guest in host.each('getVM', host.call('listRegisteredVMs'))]
    if not guests:
        yield agent.Finding(False, 'guests', 'none has joined: start vmguest.py in a VM, where it '
                            'reaches %s' % broker['address'], needed=False)
    for guest in guests:
        yield check_guest(guest)


def check_guest(guest: Dict[str, Any]) -> agent.Finding:
    """Whether a guest is there, of this version, and knows the time."""
    what = 'guest %s, %s' % (guest['name'], guest['facts'].get('version', 'of an unknown version'))
    if guest['agent'] != 'alive':
        return agent.Finding(False, what, 'nothing was heard for %s: is the VM paused, or its network '
                             'down?' % shown_span(time.time() - guest['lastSeen']), needed=False)
    if abs(guest['clockOffset']) > CLOCK_TOLERANCE:
        return agent.Finding(False, what, 'its clock is %s %s: set it (ntpdate, chronyd, or VirtualBox\'s '
                             'Guest Additions); commands work, the times of their files are wrong'
                             % (shown_span(abs(guest['clockOffset'])),
                                   'ahead' if guest['clockOffset'] > 0 else 'behind'), needed=False)
    return agent.Finding(guest['facts'].get('version') == agent.VERSION, what,
                         'this host is %s: put the same version into the VM' % agent.VERSION,
                         needed=False)


def check_start(settings: Any, why: NoHost) -> Iterator[agent.Finding]:
    """Whether the host agent could start: nobody in its place, and its ports free."""
    broker = settings.Broker
    yield agent.Finding(False, 'host agent', str(why), needed=False)
    yield check_port('XML-RPC', settings.Host.xmlrpc_listen_on, settings.Host.xmlrpc_port,
                     '[Host] xmlrpc_listen_on, xmlrpc_port')
    host = '127.0.0.1' if broker.host == 'auto' else broker.host
    if broker.embedded:
        yield check_port('broker', host, broker.port, '[Broker] host, port')
        try:
            server_tls(broker)
        except VMHostError as error:
            yield agent.Finding(False, 'certificate', str(error))
    else:
        yield agent.check_broker([host], broker, protocol.try_broker)[0]


def check_port(what: str, host: str, port: int, keys: str) -> agent.Finding:
    """Whether this machine lets us listen there."""
    problem = listen_problem(host, port)
    return agent.Finding(not problem, 'port %d of %s for %s' % (port, host, what),
                         '%s (%s)' % (problem, keys))


def listen_problem(host: str, port: int) -> str:
    """Why nobody can listen there, as a sentence; '' where it's possible."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            if os.name == 'posix':
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
        return ''
    except OSError as error:
        return agent.why_not_listening(error)


def check_hypervisor(settings: Any) -> List[agent.Finding]:
    """VirtualBox, where it is wanted; with `auto` the rest works without it."""
    wanted = settings.Hypervisor.hypervisor
    if wanted == 'none':
        return [agent.Finding(True, 'no hypervisor wanted')]
    driver = VirtualBox(settings.Network, settings.RemoteDesktop, CHIRP_PORT,
                        '', settings.Hypervisor.command_timeout, lambda *_: None)   # no file of a host's
    driver.start_thread()
    try:
        lines = driver.check()
    except VMHostError as error:
        lines = [(False, 'VirtualBox', str(error))]
    finally:
        driver.close()
    return [agent.Finding(ok, what, mend, wanted == 'VirtualBox' and 'remote desktop' not in what)
            for ok, what, mend in lines]


# --- command line: what there is to say --------------------------------------------------------

class Verb(NamedTuple):
    """A verb: its name, what does it, what is said of it, its arguments and some examples.

    An argument is what argparse's add_argument takes. Its metavar tells the completion what it is.
    """
    name: str
    function: Callable[[Client, Screen, Any], int]
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

VERBS = {verb.name: verb for verb in [
    Verb('check', do_check, 'is everything there that the host agent needs, and how is it mended?', [JSON]),
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


def run_verb(ini: str, words: List[str], screen: Screen) -> int:
    """Does what the words say with the host agent of that ini file; gives the exit code."""
    name = words[0]
    if name not in VERBS:
        close = difflib.get_close_matches(name, VERBS, 1)
        screen.complain('no verb %s%s; `%s --help` lists them' % (
            name, close and ' (%s?)' % close[0] or '', program_name()))
        return 2
    args = read_arguments(VERBS[name], words[1:])
    try:
        return VERBS[name].function(Client(agent.read_settings(ini, SETTINGS)), screen, args)
    except (agent.AgentError, protocol.ProtocolError) as error:
        screen.complain(str(error))
        return OURS if name == 'run' else 1


def run_host(ini: str) -> int:
    """Runs the host agent in the foreground until SIGTERM or Ctrl-C; gives the exit code."""
    host = None
    try:
        settings = agent.read_settings(ini, SETTINGS)
        agent.set_up_logging(settings.Logging)
        sys.setswitchinterval(agent.SWITCH_INTERVAL)
        host = Host(settings)
        ended = agent.catch_signals()
        host.start()
        host.run(ended)
        return 0
    except (agent.AgentError, stompbroker.BrokerError, protocol.ProtocolError) as error:
        print('vmhost: %s' % agent.naming_file(ini, error), file=sys.stderr)
        return 1
    finally:
        if host is not None:
            host.stop()


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


BUNDLED = ['vmhost', 'stompbroker', 'protocol', 'agent', 'stomper',        # modules
           'chirp', 'chirpclient', 'chirplocal', 'chirprequests', 'chirpreal',
           'chirpserver', 'chirproot', 'chirpticket', 'chirpwire']


def run_option(words: List[str], screen: Screen) -> int:
    """What needs no ini file; gives the exit code."""
    if words[0] in ('-h', '--help'):
        screen.say(overview())
    elif words == ['--version']:
        screen.say('vmhost %s' % agent.VERSION)
    elif words[0] == '--bundle' and len(words) == 2:
        agent.write_bundle(words[1], 'vmhost', BUNDLED, ['status.html'])
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


def run(words: List[str], screen: Screen) -> int:
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
    return run_verb(words[0], words[1:], screen) if words[1:] else run_host(words[0])


def main(argv: List[str]) -> int:
    """The command line; gives the exit code."""
    screen = Screen()
    try:
        # Python reads arguments by the locale; here they are UTF-8, as in XML-RPC. Names of files may be
        # any bytes.
        errors = 'surrogateescape' if argv[1:2] in (['put'], ['get']) else 'replace'
        return run([os.fsencode(word).decode('utf-8', errors) for word in argv], screen)
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
