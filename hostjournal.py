"""The journal: the host's SQLite file, its memory and its audit trail.

What it holds: commands and their executions, results that nobody here asked for, guests, events,
and transfers that are under way.
What it is not: the state of what goes on; Commands and Guests keep that, and write it here.

Threads: any thread may call; one at a time is inside, by the journal's lock. A transaction holds it from its
begin to its commit, so nothing that waits for somebody else may happen in one.
"""

import contextlib
import json
import logging
import os
import sqlite3
import threading
import time
from typing import Any, Dict, Iterator, List, Optional, Tuple

import agent
from faults import VMHostError

log = logging.getLogger('vmhost')


class JournalError(VMHostError):
    """The journal can't be read or written (a full disk, say)."""


JOURNAL_FORMAT = 5
FINISHED = ('exited', 'signaled', 'timeout', 'failed', 'lost', 'cancelled', 'expired')
TROUBLE_EVERY = 60.0           # seconds between two log lines about a journal that can't be written
ROWS_AT_ONCE = 1000            # of a list, where the caller names no limit
EVENTS_KEPT = 2 * 1000 * 1000  # however young: a guest may make some thousand in a minute

SCHEMA = """
CREATE TABLE commands (
    cmd_id TEXT PRIMARY KEY, target TEXT NOT NULL, multicast INTEGER NOT NULL,
    request TEXT NOT NULL, submitted REAL NOT NULL, client TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE executions (
    number INTEGER PRIMARY KEY, cmd_id TEXT NOT NULL, vm_id TEXT NOT NULL, vm TEXT NOT NULL,
    multicast INTEGER NOT NULL, cmd TEXT NOT NULL, state TEXT NOT NULL, submitted REAL NOT NULL,
    ended REAL NOT NULL DEFAULT 0, results TEXT NOT NULL DEFAULT '',
    fetched INTEGER NOT NULL DEFAULT 1, expires REAL NOT NULL DEFAULT 0, line TEXT NOT NULL DEFAULT '',
    UNIQUE (cmd_id, vm_id));
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
CREATE TABLE secrets (holder TEXT PRIMARY KEY, secret TEXT NOT NULL, since REAL NOT NULL);
CREATE TABLE transfers (id TEXT PRIMARY KEY, facts TEXT NOT NULL);
"""


UPGRADES = {                   # format: what makes the next one of it
    1: """CREATE INDEX of_cmd ON executions (cmd, number);
          CREATE INDEX by_submission ON executions (submitted);""",
    2: 'CREATE TABLE secrets (holder TEXT PRIMARY KEY, secret TEXT NOT NULL, since REAL NOT NULL);',
    3: """ALTER TABLE executions ADD COLUMN expires REAL NOT NULL DEFAULT 0;
          ALTER TABLE executions ADD COLUMN line TEXT NOT NULL DEFAULT '';""",
    4: 'CREATE TABLE transfers (id TEXT PRIMARY KEY, facts TEXT NOT NULL);',
}
# Of a damaged file, SQLite's own words may be no UTF-8.
DAMAGED = sqlite3.DatabaseError, UnicodeDecodeError
FAILED = sqlite3.Error, UnicodeDecodeError
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
        self._next_trouble = 0.0
        self._durable = True
        self._commits = self._synced = 0       # how many there were, and how many of them are on the disk
        try:
            self._open()
        except DAMAGED as error:
            if not os.path.exists(path) or isinstance(error, sqlite3.OperationalError):
                raise JournalError('%s: %s' % (path, error))
            aside = self._set_aside(error)
            self._open()
            self._salvage(aside)
        self.last_event = self._row('SELECT max(seq) FROM events')[0] or 0

    def _make_private(self) -> None:
        """It holds secrets; SQLite gives the files beside it the same mode. Before the first connection: to
        close a file of SQLite's lets go of all its locks on it."""
        try:
            os.close(agent.while_held(lambda: os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600),
                                      agent.NOT_TO_WRITE, self.path))
            for path in (self.path, self.path + '-wal', self.path + '-shm'):
                if os.path.exists(path):
                    os.chmod(path, 0o600)
        except OSError as error:
            raise JournalError('%s: %s' % (self.path, error.strerror))

    def _open(self) -> None:
        self._make_private()
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
        try:
            connection.execute('PRAGMA journal_mode = WAL')
            connection.execute('PRAGMA synchronous = FULL')
            # On macOS alone: otherwise the disk may still have it in its own memory when the power goes.
            connection.execute('PRAGMA fullfsync = 1')
            connection.execute('PRAGMA checkpoint_fullfsync = 1')
        except BaseException:
            connection.close()         # no system but POSIX' sets a file aside that is open
            raise
        return connection

    def _check_format(self) -> None:
        found = self._writer.execute('PRAGMA user_version').fetchone()[0]
        if found == 0:
            self._writer.executescript('BEGIN;' + SCHEMA + 'PRAGMA user_version = %d; COMMIT;'
                                       % JOURNAL_FORMAT)
        elif found < 0:
            raise sqlite3.DatabaseError('format %d' % found)
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

    def _set_aside(self, error: Exception) -> str:
        aside = '%s.corrupt-%d' % (self.path, time.time())
        for suffix in ('', '-wal', '-shm'):
            if os.path.exists(self.path + suffix):
                agent.replace(self.path + suffix, aside + suffix)
        log.error('%s is damaged (%s): set aside as %s; a new journal begins',
                  self.path, error, aside)
        return aside

    def _salvage(self, aside: str) -> None:
        """Takes over the secrets of a damaged journal, as far as they can be read: without them every guest
        would have to be let in anew."""
        found = []                     # type: List[Tuple]
        try:
            with contextlib.closing(sqlite3.connect(aside)) as damaged:
                found.extend(damaged.execute('SELECT holder, secret, since FROM secrets'))
        except FAILED as error:
            log.warning('%s: not all secrets of guests could be read: %s', aside, error)
        with self.writing() as journal:
            for row in found:
                journal.execute('INSERT OR REPLACE INTO secrets VALUES (?, ?, ?)', *row)

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
            except FAILED as error:
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
            raise JournalError('journal %s: %s' % (self.path, agent.sentence(error)))
        with self._lock:
            self._synced = max(self._synced, commits)

    def event(self, type: str, vm: str = '', cmd_id: str = '', text: str = '', durable: bool = True) -> None:
        """Writes one event. Raises JournalError."""
        with self.writing(durable) as transaction:
            transaction.event(type, vm, cmd_id, text)

    def note(self, type: str, vm: str = '', cmd_id: str = '', text: str = '', durable: bool = True) -> None:
        """Writes one event, if it can. Not ``durable``: what a guest can have happen as often as it likes."""
        with self.best_effort():
            self.event(type, vm, cmd_id, text, durable)

    @contextlib.contextmanager
    def best_effort(self) -> Iterator[None]:
        """For what must not fail because the journal can't be written (a full disk, say): logs that, at
        most every TROUBLE_EVERY seconds."""
        try:
            yield
        except JournalError as error:
            now = time.monotonic()
            if now >= self._next_trouble:
                self._next_trouble = now + TROUBLE_EVERY
                log.error('%s; results stay in the guests until it can be written', error)

    def rows(self, query: str, *values: Any) -> List[Tuple]:
        """What a SELECT gives. Raises JournalError."""
        with self._read_lock:
            try:
                return self._reader.execute(query, values).fetchall()
            except FAILED as error:
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
        """What was asked for under that id. Raises JournalError, also where that is damaged."""
        row = self._row('SELECT target, multicast, request, submitted, client FROM commands '
                        'WHERE cmd_id = ?', cmd_id)
        return row and {'target': row[0], 'multicast': bool(row[1]), 'request': read_object(row[2]),
                        'submitted': row[3], 'client': row[4]} or None

    def executions(self, where: str, *values: Any, limit: int = -1,
                   results: bool = True) -> List['Execution']:
        """The executions that a WHERE clause chooses, the newest last; their results on demand."""
        found = self.rows('SELECT cmd_id, vm_id, vm, multicast, cmd, state, submitted, ended, '
                          '%s, fetched, expires, line FROM executions WHERE %s ORDER BY number DESC LIMIT ?'
                          % ('results' if results else "''", where), *(values + (limit,)))
        return [Execution(*row) for row in reversed(found)]

    def ends(self) -> List[Tuple]:
        """(state, how many executions that ended so are kept, the sum of their seconds to the end)."""
        return self.rows('SELECT state, count(*), sum(max(0, ended - submitted)) FROM executions '
                         'WHERE ended > 0 GROUP BY state ORDER BY state')

    def orphans(self, cmd_id: str) -> List['Execution']:
        """Results under that id which no command of this journal asked for."""
        found = self.rows('SELECT vm_id, results, received FROM orphans WHERE cmd_id = ?', cmd_id)
        return [Execution(cmd_id, vm_id, vm_id, len(found) > 1, '', read_object(results).get('state', 'lost'),
                          received, received, results) for vm_id, results, received in found]

    def guests(self) -> List[Tuple]:
        """(id, name, ip, boot, session, facts, last_seen, has_left) of all that were seen, and not forgotten.

        has_left: whether its last word was BYE, as far as events are kept.
        """
        return self.rows('SELECT id, name, ip, boot, session, facts, last_seen, '
                         'coalesce(type = \'guest-bye\', 0) FROM guests LEFT JOIN '
                         '(SELECT vm, type, max(seq) FROM events '
                         'WHERE type IN (\'guest-hello\', \'guest-bye\') GROUP BY vm) ON vm = name')

    def transfers(self) -> List[Dict[str, Any]]:
        """The facts of all transfers that were under way, in the order in which they came."""
        return [read_object(facts) for facts, in self.rows('SELECT facts FROM transfers ORDER BY rowid')]

    def secrets(self) -> List[Tuple[str, str]]:
        """(holder, hexadecimal digits) of all secrets: for hosttrust.Secrets alone."""
        return self.rows('SELECT holder, secret FROM secrets')

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
        return len(old), len(old) < RETENTION_SLICE and events.rowcount < 4 * RETENTION_SLICE


def read_object(text: str) -> Dict[str, Any]:
    """The JSON object in a row. Raises JournalError: the checks of SQLite don't look into a text."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise JournalError('a row of the journal is damaged: %.80s' % text)
    return found


ENDED = threading.Event()              # of all that had ended before: there may be a thousand in a list
ENDED.set()


class Execution:
    """One command on one VM. What a thread reads of it may be a moment old, and is never torn."""

    __slots__ = ('cmd_id', 'vm_id', 'vm', 'multicast', 'cmd', 'state', 'submitted', 'ended', 'results',
                 'fetched', 'expires', 'deadline', 'line', 'status', 'status_time', 'asked', 'attempts',
                 'next_publish', 'signals', 'runs', 'done')

    def __init__(self, cmd_id: str, vm_id: str, vm: str, multicast: Any, cmd: str, state: str,
                 submitted: float, ended: float = 0, results: str = '', fetched: Any = 1, expires: float = 0,
                 line: str = '') -> None:
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
        self.expires = expires             # since 1970: from then on it isn't begun; 0: it never expires
        self.deadline = None               # type: Optional[float]   # the same, monotonic, while unfinished
        self.line = line                   # command and arguments, as a list shows them
        self.status = {}                   # type: Dict[str, Any]
        self.status_time = 0.0             # monotonic
        self.asked = 0.0                   # monotonic: when its guest was asked last how far it is
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
        """The results, as journalled; {} while unfinished. Raises JournalError where they are damaged."""
        return read_object(self.results) if self.results else {}


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

    def add_guest(self, guest: Any) -> None:
        """Adds a guest (hostguests.Guest), or what is known of it now."""
        self.execute('INSERT OR REPLACE INTO guests VALUES (?, ?, ?, ?, ?, ?, ?)', guest.id, guest.name,
                     guest.ip, guest.boot, guest.session, json.dumps(guest.facts), guest.last_seen)

    def add_transfer(self, id: str, facts: Dict[str, Any]) -> None:
        """Notes that a transfer is under way."""
        self.execute('INSERT INTO transfers VALUES (?, ?)', id, json.dumps(facts))

    def end_transfer(self, id: str) -> None:
        self.execute('DELETE FROM transfers WHERE id = ?', id)

    def add_execution(self, execution: 'Execution') -> None:
        """Adds one execution of a command."""
        self.execute('INSERT INTO executions (cmd_id, vm_id, vm, multicast, cmd, state, submitted, expires, '
                     'line) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)', execution.cmd_id, execution.vm_id,
                     execution.vm, int(execution.multicast), execution.cmd, execution.state,
                     execution.submitted, execution.expires, execution.line)
