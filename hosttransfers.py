"""Transfers: files and folders between host and guests, by Chirp.

What it is not: the output of commands (hostoutput.py).

Threads: any thread may call; the files move on ``transfer-N``. ``Transfers`` has one lock: it guards the
table, and the step from waiting to running or cancelled; nothing is called while it is held.
"""

import collections
import contextlib
import logging
import os
import posixpath
import secrets
import threading
import time
from typing import Any, Dict, List, Tuple

import chirpclient
import chirpwire
import rpc
from faults import Busy, InvalidParams, VMHostError
from hostjournal import Journal
from hostmachines import Machines
from hostworkers import Workers

log = logging.getLogger('vmhost')

TRANSFERS_KEPT = 1000          # ended ones that are remembered
TRANSFERS_WAITING = 10000


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

    def __init__(self, machines: Machines, journal: Journal, count: int) -> None:
        self._machines = machines
        self._journal = journal
        self._workers = Workers('transfer', count)
        self._lock = threading.Lock()
        self._known = collections.OrderedDict()  # type: collections.OrderedDict

    def start(self, direction: str, vm: str, source: str, target: str) -> Transfer:
        """Puts a transfer, ``put`` or ``get``, into the queue. Raises InvalidParams, NoSuchVM, …"""
        if direction not in ('put', 'get'):
            raise InvalidParams('direction is put (to the VM) or get (from it), not %.40r' % direction)
        guest = self._machines.connected(vm)
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
            with self._machines.chirp_client(self._machines.connected(transfer.vm)) as client:
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
            self._journal.note('transfer-' + transfer.state, transfer.vm, '',
                               rpc.xml_safe(text))
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
