"""Worker threads: jobs done in the background, in the order in which they were submitted.

What it is not: concurrent.futures, whose threads hold up the end of the process until the last job is done.

Threads: those it starts, at the first job. Each class has one lock, held for its own tables alone.
"""

import contextlib
import logging
import queue
import threading
import time
from typing import Any, Callable, Dict, List

log = logging.getLogger('vmhost')

BATCH_LIMIT = 10000            # entries that wait in a batch; more are dropped


class Workers:
    """Up to ``count`` threads. Safe from any thread."""

    def __init__(self, name: str, count: int) -> None:
        self.stopping = threading.Event()
        self._name = name
        self._count = count
        self._jobs = queue.Queue()     # type: queue.Queue
        # Guards the list of threads; nothing but their start happens while it is held.
        self._lock = threading.Lock()
        self._threads: List[threading.Thread] = []

    def do(self, job: Callable[[], None]) -> None:
        """Submits a job; returns at once."""
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
        """Lets running jobs end, until that monotonic time; drops those that have not begun."""
        self.stopping.set()
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


class Batch:
    """Collects entries, and hands all that came in to ``work`` at once, on one thread. Safe from any thread.

    before, after    seconds to wait before and after a batch: they bound how often ``work`` is called
    """

    def __init__(self, name: str, work: Callable[[Dict], None], before: float = 0, after: float = 0) -> None:
        self._workers = Workers(name, 1)
        self._work = work
        self._before = before
        self._after = after
        # Guards the entries that wait; nothing is called while it is held.
        self._lock = threading.Lock()
        self._entries = {}             # type: Dict[Any, Any]

    def add(self, key: Any, value: Any = None) -> None:
        """Adds an entry, or replaces the one of that key; returns at once."""
        with self._lock:
            is_first = not self._entries
            if len(self._entries) < BATCH_LIMIT:
                self._entries[key] = value
        if is_first:
            self._workers.do(self._run)

    @property
    def is_stopping(self) -> bool:
        """Whether ``work`` should end soon."""
        return self._workers.stopping.is_set()

    def stop(self, deadline: float) -> None:
        """Lets the batch at work end, until that monotonic time."""
        self._workers.stop(deadline)

    def _run(self) -> None:
        self._workers.stopping.wait(self._before)
        with self._lock:
            entries, self._entries = self._entries, {}
        self._work(entries)
        self._workers.stopping.wait(self._after)
