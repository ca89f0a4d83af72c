"""Leases: VMs that somebody looks after. Where he is silent for longer than he said, the VM is saved.

So a VM doesn't run on for ever where the program that had it started was killed. Which VMs have a lease is
kept in the state folder: after a start of the host agent each has as long again as it had at last.

What it is not: the hypervisor, which saves (hosthypervisor.py).
Threads: any thread may take a lease; ``tick`` is for main; VMs are saved on ``lease-1``. One lock guards the
table; nothing is called while it is held.
"""

import json
import logging
import threading
import time
from typing import Any, Callable, Dict, List, Tuple

import agent
import vmstates
from faults import NotSupported, VMHostError
from hostjournal import Journal
from hostmachines import Machines
from hoststate import StateFolder
from hostworkers import Workers

log = logging.getLogger('vmhost')

FILE = 'leases.json'           # {VM's name: seconds}
AGAIN = 10.0                   # seconds after which a VM that couldn't be saved is tried again


class Leases:
    """The table of leases. Safe from any thread."""

    def __init__(self, folder: StateFolder, machines: Machines, journal: Journal,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._machines = machines
        self._journal = journal
        self._clock = clock
        self._workers = Workers('lease', 1)
        self._lock = threading.Lock()
        self._table: Dict[str, Tuple[float, float]] = {
            name: (seconds, clock() + seconds) for name, seconds in self._read().items()}

    def _read(self) -> Dict[str, float]:
        try:
            table = json.loads(agent.read_bytes(self._folder.file(FILE)).decode('utf-8'))
            return {str(name): float(seconds) for name, seconds in table.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            log.warning('%s: %s; no VM has a lease', self._folder.file(FILE), error)
            return {}

    def take(self, vm: str, seconds: float) -> None:
        """The VM is looked after for so many seconds from now; 0: no longer, and it is left as it is.

        Raises NoSuchVM; NotSupported without a hypervisor.
        """
        if self._machines.hypervisor is None:
            raise NotSupported('no hypervisor here that could save %s' % vm)
        name = self._machines.find(vm).name
        with self._lock:
            before = self._table.pop(name, (0.0, 0.0))[0]
            if seconds > 0:
                self._table[name] = (seconds, self._clock() + seconds)
        if before != max(seconds, 0):
            self._write()

    def _write(self) -> None:
        with self._lock:
            seconds = {name: lease[0] for name, lease in self._table.items()}
        try:
            self._folder.write(FILE, json.dumps(seconds))
        except OSError as error:       # it holds as long as this host agent lives
            log.warning('%s: %s', self._folder.file(FILE), error)

    def count(self) -> int:
        """How many there are."""
        with self._lock:
            return len(self._table)

    def tick(self) -> None:
        """Has VMs saved whose leases ran out. Returns at once."""
        for name in self._run_out(self._clock()):
            self._workers.do(lambda name=name: self._save(name))     # type: ignore[misc]

    def forgive(self) -> None:
        """The host slept: nobody could renew a lease. Each begins anew."""
        now = self._clock()
        with self._lock:
            self._table = {name: (seconds, now + seconds) for name, (seconds, _) in self._table.items()}

    def _run_out(self, now: float) -> List[str]:
        with self._lock:
            found = [name for name, (_, end) in self._table.items() if now > end]
            for name in found:         # not again while it is being saved
                self._table[name] = (self._table[name][0], now + AGAIN + self._table[name][0])
            return found

    def _save(self, name: str) -> None:
        hypervisor: Any = self._machines.hypervisor
        try:
            if hypervisor.known_state(name) in (vmstates.RUNNING, vmstates.PAUSED):
                hypervisor.save_state(name)
                self._journal.note('lease-over', name, '', 'nobody looked after it: it was saved')
                log.info('%s: its lease is over: saved', name)
        except VMHostError as error:
            log.warning('%s: its lease is over, and it can\'t be saved: %s', name, error)
            return
        with self._lock:
            self._table.pop(name, None)
        self._write()

    def stop(self, deadline: float) -> None:
        """Lets a VM that is being saved be saved, until that monotonic time."""
        self._workers.stop(deadline)
