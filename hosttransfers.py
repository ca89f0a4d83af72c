"""Transfers: files between host and guests, and the output that results leave in a guest.
"""

import collections
import contextlib
import hashlib
import logging
import os
import posixpath
import queue
import secrets
import threading
import time
from typing import Any, Callable, Dict, List, Tuple

import agent
import chirpclient
import chirplocal
import chirpwire
import protocol
from faults import Busy, InvalidParams, NoFiles, VMHostError
from hostguests import Guest
from hostjournal import Execution, JournalError

log = logging.getLogger('vmhost')


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

    def __init__(self, host: Any, count: int) -> None:
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
                                         text.translate(agent.XML_UNSAFE))
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

    def __init__(self, host: Any) -> None:
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

    def __init__(self, host: Any) -> None:
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
