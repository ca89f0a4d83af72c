"""Transfers: files and folders between host and guests, by Chirp.

What it is not: the output of commands (hostoutput.py).

Threads: any thread may call; the files move on ``transfer-N``, of which each transfer has one while it runs;
``transfers`` hands the places out. ``Transfers`` has one lock: it guards the table, and the steps between
waiting, running and cancelled. ``Line`` has one, for who waits and who has a place; while it is held threads
are started, and nothing is called.
"""

import collections
import itertools
import logging
import os
import posixpath
import secrets
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import agent
import chirpclient
import chirpdownload
import chirplanding
import chirplocal
import chirpwire
import localnames
import rpc
from faults import AgentNotConnected, Busy, InvalidParams, NoFiles, TransferError, VMHostError
from hostjournal import Journal
from hostmachines import Machines

log = logging.getLogger('vmhost')

TRANSFERS_KEPT = 1000          # ended ones that are remembered
TRANSFERS_WAITING = 10000
GUEST_PATIENCE = 600.0         # seconds without progress that a transfer waits for an agent that went away
ENDED_MEANWHILE = 'the host agent was ended meanwhile; the same again goes on from where it was'
FILES_PATIENCE = 10.0          # … for one that is there, and offers no files: chirp_server may be starting
GUEST_LOOK = 0.5               # and between looks at whether it is back


class Waits(Exception):
    """A transfer can't go on now. ``of_vm``: nor can another one of its VM."""

    def __init__(self, why: Exception, of_vm: bool) -> None:
        super().__init__(str(why))
        self.of_vm = of_vm


class Transfer:
    """A file or folder on its way. ``state``: waiting, running, done, failed or cancelled."""

    def __init__(self, direction: str, vm: str, source: str, target: str, links: str, parents: bool,
                 vm_id: str = '') -> None:
        self.id = 'transfer-' + secrets.token_hex(6)
        self.direction = direction
        self.vm = vm
        self.vm_id = vm_id or vm       # which stays, whatever it is called
        self.source = source
        self.target = target
        self.links = links             # keep, skip or follow
        self.given = chirpdownload.Given()     # where it goes to a device or FIFO
        self.parents = parents         # whether the folders that the target is to be in are made
        self.state = 'waiting'
        self.error = ''                # or, while it waits, what for
        self.failures = []             # type: List[Tuple[str, str]]   # (path, reason), of a folder
        self.unkept = []               # type: List[Tuple[str, str]]   # (path, what), whose disk keeps no such
        self.bytes = 0
        self.total = 0
        self.submitted = time.time()           # since 1970
        self.ended_at = 0.0                    # … or 0
        self.began = self.ended = 0.0          # monotonic
        self.due = 0.0                         # … before which it doesn't go on
        self.furthest = -1                     # bytes that it had when its guest was last waited for
        self.since = {}        # type: Dict[float, float]   # patience: when its first reason was
        self.notes = agent.Seldom(log)
        self.cancelled = threading.Event()
        self.is_left = False                   # under way when the host agent ends
        self.done = threading.Event()
        self.asked = self._place_asked_for()
        self.place = ()        # type: Tuple[str, ...]   # where it goes, once that is known

    @property
    def is_under_way(self) -> bool:
        return self.state in ('waiting', 'running')

    def aim(self, target: str) -> None:
        """What is moved is to be called so, where it goes."""
        self.target = target
        self.place = self.place_of(target)

    @property
    def own_name(self) -> str:
        """What it is called where it is; '' for ``/``, ``.`` and ``..``."""
        return chirplanding.own_name(self.source, chirplanding.SEPARATORS if self.direction == 'put' else '/')

    def place_of(self, target: str) -> Tuple[str, ...]:
        """Where that is, however it is written."""
        if self.direction == 'put':
            return self.vm, posixpath.normpath('/' + target.lstrip('/'))
        target = localnames.native(target)
        try:
            return (os.path.normcase(os.path.realpath(target)),)
        except OSError:                # a device of Windows', as `con`: the transfer itself says why not
            return (os.path.normcase(os.path.abspath(target)),)

    def _place_asked_for(self) -> Tuple[str, ...]:
        """Where it goes, as far as that can be said before the VM is asked: in a target that is a folder, it
        has its own name."""
        is_put = self.direction == 'put'
        if (not chirplanding.own_name(self.target, '/' if is_put else chirplanding.SEPARATORS)
                or self.target[-1] == '/' or not is_put and os.path.isdir(self.target)):
            return self.place_of(posixpath.join(self.target, self.own_name))
        return self.place_of(self.target) + ((self.own_name,) if is_put else ())

    def facts(self) -> Dict[str, Any]:
        """What a later host agent wants to know of it, as JSON has it."""
        return {'id': self.id, 'direction': self.direction, 'vm': self.vm, 'vm_id': self.vm_id,
                'source': self.source, 'target': self.target, 'links': self.links, 'parents': self.parents,
                'submitted': self.submitted}

    @classmethod
    def of_facts(cls, facts: Dict[str, Any]) -> 'Transfer':
        transfer = cls(*[facts[name] for name in ('direction', 'vm', 'source', 'target', 'links', 'parents',
                                                  'vm_id')])
        transfer.id, transfer.submitted = facts['id'], facts['submitted']
        return transfer

    def progress(self, moved: int, total: int) -> None:
        """What the Chirp client tells from time to time. A new attempt counts once it knows something."""
        if total or not self.total:
            self.bytes, self.total = moved, total
        if total:
            self.error = ''

    def shown(self) -> Dict[str, Any]:
        """For the API; rate in bytes per second."""
        seconds = (self.ended or time.monotonic()) - self.began if self.began else 0
        return {'id': self.id, 'direction': self.direction, 'vm': self.vm, 'source': self.source,
                'target': self.target, 'state': self.state, 'error': self.error,
                'submitted': self.submitted, 'ended': self.ended_at, 'bytes': self.bytes, 'total': self.total,
                'rate': self.bytes / seconds if seconds > 0 else 0.0}

    def details(self) -> Dict[str, Any]:
        """``shown``, and every entry of a folder that failed, or lost its mode or time."""
        return dict(self.shown(), failures=[{'path': rpc.xml_safe(path), 'reason': rpc.xml_safe(reason)}
                                            for path, reason in self.failures],
                    unkept=[{'path': rpc.xml_safe(path), 'what': what} for path, what in self.unkept])


class Line:
    """Who waits for a place, and who has one: ``count`` go on at once. So that no VM holds up another one's,
    each of ``count`` VMs is sure of one place, though others may have all. Safe from any thread.

    ``run`` moves a transfer, on a thread of its own; it raises Waits where that can't go on yet.
    """

    def __init__(self, count: int, run: Callable[[Transfer], None]) -> None:
        self._count = count
        self._run = run
        # Guards all below; nothing but the start of threads happens while it is held.
        self._changed = threading.Condition(threading.Lock())
        self._waiting = []             # type: List[Transfer]   # in the order in which they came
        self._going = []               # type: List[str]        # whose VMs, by id
        self._away = {}                # type: Dict[str, float]   # VM's id: when it is looked for again
        self._threads = []             # type: List[threading.Thread]
        self._names = itertools.count(1)
        self._stopping = False

    def waiting(self) -> int:
        """How many have no place."""
        return len(self._waiting)

    def join(self, transfer: Transfer) -> None:
        """It waits for a place; returns at once."""
        with self._changed:
            self._waiting.append(transfer)
            if not self._threads:
                self._start('transfers', self._hand_out)
            self._changed.notify_all()

    def stop(self, deadline: float) -> None:
        """Gives no more places, and waits for those that have one until that monotonic time."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning('thread %s still runs', thread.name)

    def _start(self, name: str, target: Callable, *args: Any) -> bool:
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:              # the next look, or the next one that joins, may have one
            log.warning('thread %s can\'t be started: %s', name, error)
            return False
        self._threads.append(thread)
        return True

    def _hand_out(self) -> None:
        with self._changed:
            while not self._stopping:
                transfer = self._next()
                if transfer is None:
                    self._changed.wait(self._until_due())
                    continue
                self._waiting.remove(transfer)
                if self._start('transfer-%d' % next(self._names), self._go, transfer):
                    self._going.append(transfer.vm_id)
                else:
                    self._give_back(transfer)

    def _next(self) -> Optional[Transfer]:
        """The first that may begin."""
        going, now = collections.Counter(self._going), time.monotonic()
        if len(self._going) >= self._count and len(going) >= self._count:
            return None
        for transfer in self._waiting:
            of_vm = going[transfer.vm_id]
            if now >= max(transfer.due, self._away.get(transfer.vm_id, 0.0)) and of_vm < self._count and (
                    not of_vm or len(self._going) < self._count):
                return transfer
        return None

    def _until_due(self) -> Optional[float]:
        """Seconds until one may begin that can't now, if time alone brings that."""
        now = time.monotonic()
        dues = [max(transfer.due, self._away.get(transfer.vm_id, 0.0)) for transfer in self._waiting]
        return min([due - now for due in dues if due > now], default=None)

    def _go(self, transfer: Transfer) -> None:
        waits = None                   # type: Optional[Waits]
        try:
            self._run(transfer)
        except Waits as error:
            waits = error
        finally:
            with self._changed:
                self._going.remove(transfer.vm_id)
                self._threads.remove(threading.current_thread())
                self._away.pop(transfer.vm_id, None)
                if waits is not None:
                    self._give_back(transfer)
                    if waits.of_vm:
                        self._away[transfer.vm_id] = transfer.due
                self._changed.notify_all()

    def _give_back(self, transfer: Transfer) -> None:
        """It waits again, as the last. Holds the lock."""
        transfer.due = time.monotonic() + GUEST_LOOK
        self._waiting.append(transfer)


class Transfers:
    """Files to and from guests, by Chirp; ``count`` at once, the others wait. Safe from any thread."""

    def __init__(self, machines: Machines, journal: Journal, count: int) -> None:
        self._machines = machines
        self._journal = journal
        self._line = Line(count, self._run)
        self._lock = threading.Lock()
        self._known = collections.OrderedDict()  # type: collections.OrderedDict

    def start(self, direction: str, vm: str, source: str, target: str, links: str = 'keep',
              parents: Optional[bool] = None) -> Transfer:
        """Puts a transfer, ``put`` or ``get``, into the queue. ``parents``: whether missing folders that the
        target is to be in are made; None: in a VM they are. Raises InvalidParams, NoSuchVM, …"""
        if direction not in ('put', 'get'):
            raise InvalidParams('direction is put (to the VM) or get (from it), not %.40r' % direction)
        guest = self._machines.connected(vm)
        if not source or '\0' in source + target:
            raise InvalidParams('source and target should be paths')
        if self._line.waiting() >= TRANSFERS_WAITING:
            raise Busy('%d transfers wait already' % TRANSFERS_WAITING)
        if links not in ('keep', 'skip', 'follow'):
            raise InvalidParams('links is keep, skip or follow, not %.40r' % links)
        if parents not in (None, True, False):
            raise InvalidParams('parents is true or false, not %.40r' % parents)
        transfer = Transfer(direction, guest.name, source, target, links,
                            direction == 'put' if parents is None else parents, guest.id)
        if not target and not transfer.own_name:
            raise InvalidParams('name the target: %.100r has no name of its own' % source)
        with self._lock:
            self._check_place(transfer.asked, lambda known: (known.asked, known.place))
            self._known[transfer.id] = transfer
            ended = [known for known in self._known.values() if known.done.is_set()]
            for known in ended[:max(0, len(self._known) - TRANSFERS_KEPT)]:
                del self._known[known.id]
        with self._journal.best_effort(), self._journal.writing(durable=False) as journal:
            journal.add_transfer(transfer.id, transfer.facts())
        self._line.join(transfer)
        return transfer

    def tell_of_lost(self) -> None:
        """Those that were under way when an earlier host agent ended, or was killed, have failed."""
        with self._journal.best_effort():
            for facts in self._journal.transfers():
                transfer = Transfer.of_facts(facts)
                transfer.state, transfer.error = 'failed', ENDED_MEANWHILE
                with self._lock:
                    self._known[transfer.id] = transfer
                log.warning('%s: %s', transfer.id, transfer.error)
                self._end(transfer)

    def _check_place(self, place: Tuple[str, ...], places_of: Callable[[Transfer], Tuple]) -> None:
        """Two that go to one place at once would write into each other's partial files. Raises Busy."""
        for known in self._known.values():
            if known.is_under_way and place in places_of(known):
                raise Busy('%s goes to %.200s already' % (known.id, known.target or known.own_name))

    def get(self, id: str) -> Transfer:
        """Raises InvalidParams for an id that is unknown, or ended long ago."""
        with self._lock:
            if id not in self._known:
                raise InvalidParams('no transfer %.100s (a host agent that ends forgets what had ended)' % id)
            return self._known[id]

    def list(self, vm: str = '', finished: Optional[bool] = None,
             limit: Optional[int] = None) -> List[Dict[str, Any]]:
        """All that are remembered, the newest last, or so many of the newest; of that VM, by name or id;
        ``finished`` or not."""
        with self._lock:
            known = [transfer for transfer in self._known.values() if vm in ('', transfer.vm, transfer.vm_id)
                     and finished in (None, transfer.done.is_set())]
        first = 0 if limit is None else max(0, len(known) - limit)
        return [transfer.shown() for transfer in known[first:]]

    def list_dir(self, vm: str, path: str) -> List[chirpwire.Stat]:
        """What is in a folder of a VM, whose path is as for a transfer. Raises TransferError, NoSuchVM,
        AgentNotConnected."""
        try:
            with self._machines.chirp_client(self._machines.connected(vm)) as client:
                return sorted(client.ls(GuestPaths(client, vm).listed(path)))
        except (chirpwire.ChirpError, OSError) as error:
            raise TransferError('%s on %s: %s' % (
                path, vm, getattr(error, 'reason', '') or agent.sentence(error)))

    def are_under_way(self) -> bool:
        """Whether one waits or runs."""
        with self._lock:
            return any(transfer.is_under_way for transfer in self._known.values())

    def cancel(self, id: str) -> bool:
        """Has it end as cancelled, at once where it waits. False where it has ended. Raises InvalidParams."""
        transfer = self.get(id)
        with self._lock:
            if not transfer.is_under_way:
                return False
            transfer.cancelled.set()
        if self._leaves_queue(transfer, 'cancelled'):
            transfer.error = 'cancelled' if transfer.began else 'cancelled before it began'
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
        """Cancels all, and waits for them until that monotonic time. The next host agent tells of them."""
        with self._lock:
            under_way = [transfer for transfer in self._known.values() if transfer.is_under_way]
            for transfer in under_way:
                transfer.is_left = not transfer.cancelled.is_set()
        for transfer in under_way:
            self.cancel(transfer.id)
        self._line.stop(deadline)

    def _run(self, transfer: Transfer) -> None:
        """Moves it, or a part of it. Raises Waits where it can't go on now."""
        if not self._leaves_queue(transfer, 'running'):
            return
        transfer.began = transfer.began or time.monotonic()
        try:
            self._move(transfer)
            self._settle(transfer, 'done', '')
        except Waits as waits:
            if self._waits(transfer, str(waits)):
                raise
            self._settle(transfer, 'failed', 'cancelled')
        except (VMHostError, chirpwire.ChirpError, OSError) as error:
            transfer.failures = getattr(error, 'failures', [])
            self._settle(transfer, 'failed', agent.sentence(error))
        except Exception as error:
            log.exception('in %s', transfer.id)
            self._settle(transfer, 'failed', '%s: %s' % (type(error).__name__, error))
        self._end(transfer)

    def _settle(self, transfer: Transfer, state: str, error: str) -> None:
        """What has become of it: cancelled, once somebody was told so."""
        with self._lock:
            if transfer.cancelled.is_set():
                error = 'cancelled, when all of it was there' if state == 'done' else error
                state = 'cancelled'
            transfer.error, transfer.state = error, state

    def _waits(self, transfer: Transfer, why: str) -> bool:
        """From running back to waiting; False where it was cancelled."""
        with self._lock:
            if transfer.cancelled.is_set():
                return False
            transfer.state, transfer.error = 'waiting', why
            return True

    def _move(self, transfer: Transfer) -> None:
        """Raises Waits where the agent went away, and may come back, as for a command; and where another one
        goes to the same place."""
        try:
            with self._machines.chirp_client(self._machines.connected(transfer.vm_id)) as client:
                try:
                    self._move_with(client, transfer)
                finally:
                    transfer.unkept = client.unkept.some
        except chirpwire.ProtocolError:
            raise
        except Busy as busy:
            log.debug('%s: %s; it waits for that', transfer.id, busy)
            raise Waits(busy, False)
        except chirpwire.Busy as busy:
            if not self._others_put(transfer):
                raise
            raise Waits(busy, False)
        except (AgentNotConnected, NoFiles, chirpwire.Disconnected, chirpwire.TurnedAway) as error:
            patience = GUEST_PATIENCE if isinstance(
                error, (AgentNotConnected, chirpwire.Disconnected)) else FILES_PATIENCE
            if transfer.bytes > transfer.furthest:
                transfer.furthest = transfer.bytes
                transfer.since.clear()
            if time.monotonic() > transfer.since.setdefault(patience, time.monotonic()) + patience:
                raise
            transfer.notes.info(str(error), '%s: %s; it waits for the agent', transfer.id, error)
            raise Waits(error, True)

    def _others_put(self, transfer: Transfer) -> bool:
        """Whether something else goes to its VM, which may have another path to the same place."""
        with self._lock:
            return transfer.direction == 'put' and any(
                known.state == 'running' and known.direction == 'put' and known.vm_id == transfer.vm_id
                for known in self._known.values() if known is not transfer)

    def _move_with(self, client: chirpclient.ChirpClient, transfer: Transfer) -> None:
        there = GuestPaths(client, transfer.vm)
        if transfer.direction == 'put':
            if not transfer.place:
                target = there.inside(transfer.target) if transfer.target else ''
                if transfer.parents:
                    chirplocal.stat_here(transfer.source)          # raises where there is nothing to put
                    make_parents(client, target)
                self._aim(transfer, chirplanding.landing_there(client, transfer.source, target))
            client.put(transfer.source, transfer.target, transfer.progress, transfer.cancelled,
                       links=transfer.links)
        else:
            source = there.inside(transfer.source)
            if not transfer.place:
                if transfer.parents and client.find(source) is not None:
                    os.makedirs(os.path.dirname(os.path.abspath(transfer.target)), exist_ok=True)
                self._aim(transfer, chirplanding.landing_here(client, source, transfer.target))
            client.get(source, transfer.target, transfer.progress, transfer.cancelled, links=transfer.links,
                       given=transfer.given)

    def _aim(self, transfer: Transfer, target: str) -> None:
        """From now on it goes there, and no other one. Raises Busy, where another one does."""
        with self._lock:
            self._check_place(transfer.place_of(target), lambda known: (known.place,))
            transfer.aim(target)

    def _end(self, transfer: Transfer) -> None:
        """Notes the end in the journal, and wakes who waits for it, whatever becomes of the note."""
        transfer.ended, transfer.ended_at = time.monotonic(), max(transfer.submitted, time.time())
        try:
            if transfer.is_left and transfer.state == 'cancelled':
                return
            text = '%s %s to %s %s' % (transfer.direction, transfer.source, transfer.target, transfer.error)
            with self._journal.best_effort(), self._journal.writing() as journal:
                journal.event('transfer-' + transfer.state, transfer.vm, '', rpc.xml_safe(text))
                journal.end_transfer(transfer.id)
        finally:
            transfer.done.set()


def make_parents(client: chirpclient.ChirpClient, target: str) -> None:
    """Makes the folders in a guest that a target is to be in, where they are missing. Raises Refused
    where one of them is a file."""
    names = [name for name in target.split('/') if name][:-1]
    for depth in range(1, len(names) + 1):
        folder = '/' + '/'.join(names[:depth])
        try:
            client.mkdir(folder)
        except chirpwire.Refused:          # it is there; or the put will say what is wrong
            found = client.find(folder)
            if found is not None and not found.is_dir:
                raise chirpwire.Refused(chirpwire.NOT_DIR, folder[1:])


class GuestPaths:
    """Paths in a guest, as people write them: relative to what it serves, ``~`` the same; an absolute one
    must be in there."""

    def __init__(self, client: chirpclient.ChirpClient, vm: str) -> None:
        self._client = client
        self._vm = vm

    def inside(self, path: str) -> str:
        """The path as the guest's server has it. Raises TransferError for one that is outside."""
        if path == '~' or path.startswith('~/'):
            path = path[2:] or '/'
        elif path.startswith('~'):
            raise TransferError('%.200s: only ~ itself is known there' % path)
        if path.startswith('/'):
            path = self._of_absolute(path)
        elif posixpath.normpath(path).split('/')[0] == '..':
            raise self._outside(path)
        return self._client.without_climbing(path)

    def listed(self, path: str) -> str:
        """The same of a folder that is only looked at: what isn't there, the guest's server says."""
        try:
            return self.inside(path)
        except TransferError:
            if not path.startswith('/'):
                raise
            return path

    def _of_absolute(self, path: str) -> str:
        """Of the guest's own file system, or, of what is there already, of what is served."""
        self._client.connect()
        root = self._client.root
        normal = posixpath.normpath('/' + path.lstrip('/'))
        if root and root != '/' and (normal + '/').startswith(root + '/'):
            rest = path[len(root):]
            if path.startswith(root + '/') and posixpath.normpath(rest.lstrip('/')).split('/')[0] != '..':
                return rest
            return normal[len(root):] + '/' * (path.endswith('/') and normal != root) or '/'
        if normal == '/' or root == '/' or self._client.find(path, False) is not None:
            return path
        raise self._outside(path)

    def _outside(self, path: str) -> TransferError:
        return TransferError('%.200s is outside of what %s serves%s: name a path in there' % (
            path, self._vm, ', ' + self._client.root if self._client.root else ''))
