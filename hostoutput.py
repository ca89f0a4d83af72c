"""The output of commands: what came with the results, what was fetched, and what is still in a guest.

What it is not: transfers of files (hosttransfers.py).

Threads: any thread may call; output is fetched on ``fetch-N``. ``Fetcher`` has one lock: it guards its
tables, and nothing is called while it is held.
"""

import collections
import contextlib
import hashlib
import logging
import os
import threading
import time
from typing import Any, Callable, Dict, Optional, Tuple

import agent
import chirplocal
import chirpwire
import protocol
from faults import AgentNotConnected, BadState, DeadlineExceeded, NoFiles, VMHostError
from hostcommands import Commands, inline_output
from hostcontrol import Control
from hostfollow import Followed, Follows, slice_in
from hostjournal import FINISHED, Execution
from hostmachines import Machines
from hoststate import StateFolder
from hostworkers import Workers

log = logging.getLogger('vmhost')

STREAMS = ('out', 'err')
QUERY_TIMEOUT = 5.0            # seconds in which a guest gives a slice of output
LONGEST_PAUSE = 0.25           # seconds until it is seen that a command is lost, or its agent back
OUTPUT_SLICE = 256 * 1024      # bytes that one CMD_QUERY asks for, at most
OUTPUT_READ = 4 * 1024 * 1024  # bytes that are read of fetched output at once
FETCHERS = 32                  # threads that fetch output of commands: some guests may take all their time
WAITING = 1000                 # commands of one guest whose output waits for its turn
FETCH_TIME = 30.0              # seconds for all output of a command, and …
SLOWEST = 256 * 1024           # … a second more for so many bytes of fetch_limit
FETCH_PATIENCE = 600.0         # seconds after the first failure in which a command's output is tried for


class Fetcher:
    """Fetches the output of commands beyond what came with the results, by Chirp.

    Into ``state_dir/output``, under names made here; no text of a guest is part of a path.
    """

    def __init__(self, commands: Commands, machines: Machines, say: Callable[[protocol.Message], bool],
                 state: StateFolder, limit: int) -> None:
        """limit: bytes of each stream that are fetched."""
        self._commands = commands
        self._machines = machines
        self._say = say
        self._folder = state.file('output')
        self._limit = limit
        self._workers = Workers('fetch', FETCHERS)
        self._lock = threading.Lock()
        self._under_way: Dict[Tuple[str, str], threading.Event] = {}       # what is set cancels it
        self._waiting = {}     # type: Dict[str, collections.deque]    # behind the one of each guest
        self._failing = {}     # type: Dict[Tuple[str, str], float]    # since when, monotonic
        self._sweeps = False

    def path(self, execution: Execution, stream: str) -> str:
        """Where the output of a command is, or would be."""
        return self._path(execution.index, stream)

    def _path(self, index: Tuple[str, str], stream: str) -> str:
        """The hash comes first, and is of both: ids that callers chose may differ by case alone, or be a
        device of Windows'."""
        mark = hashlib.sha256(' '.join(index).encode('utf-8')).hexdigest()[:16]
        return os.path.join(self._folder, '%s.%s.%s' % (mark, index[0], stream))

    def begin(self, execution: Execution) -> None:
        """Fetches in the background; CMD_ACK is said at the end."""
        cancel = threading.Event()
        with self._lock:
            if self._under_way.setdefault(execution.index, cancel) is not cancel:
                return
            waiting = self._waiting.get(execution.vm_id)
            if waiting is None:
                self._waiting[execution.vm_id] = collections.deque()
            elif len(waiting) < WAITING:
                waiting.append((execution, cancel))
                return
            else:
                del self._under_way[execution.index]       # the guest says it again
                return
        self._workers.do(lambda: self._fetch(execution, cancel))

    def _begin_next(self, vm_id: str) -> None:
        """A guest may take its time: it has one worker at most."""
        with self._lock:
            if not self._waiting[vm_id]:
                del self._waiting[vm_id]
                return
            execution, cancel = self._waiting[vm_id].popleft()
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
        if not os.path.isdir(self._folder):
            return
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if self._workers.stopping.is_set():
                    return
                if not self._is_needed(entry.name):
                    remove_file(entry.path)

    def _is_needed(self, name: str) -> bool:
        """Whether a file in the folder belongs to a command, or to a fetch that is not over."""
        if not chirpwire.is_part(os.fsencode(name)):
            return self._commands.is_known(name.partition('.')[2].rpartition('.')[0])
        with self._lock:
            under_way = list(self._under_way)
        return any(name == os.path.basename(chirplocal.local_part(self._path(index, stream)))
                   for index in under_way for stream in STREAMS)

    def forget(self, execution: Execution) -> None:
        """Deletes what was fetched; what is being fetched is cancelled, and then deleted."""
        with self._lock:
            cancel = self._under_way.get(execution.index)
            if cancel is not None:
                cancel.set()
                return
        self._delete(execution)

    def _delete(self, execution: Execution) -> None:
        with self._lock:
            self._failing.pop(execution.index, None)
        for stream in STREAMS:
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
            self._begin_next(execution.vm_id)
        if cancel.is_set() and self._commands.finished(*execution.index) is None:
            self._delete(execution)        # it was forgotten meanwhile
            over = True
        if over:
            self._say(protocol.CMD_ACK.howToSay(execution.vm_id, execution.cmd_id))

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
        self._is_fetched(execution)
        return True

    def _is_unfetched(self, execution: Execution) -> bool:
        """Whether the journal still says so: results that came again meanwhile are older than that."""
        now = self._commands.finished(*execution.index)
        return now is not None and not now.fetched

    def _gives_up(self, execution: Execution, error: Exception) -> bool:
        """Whether the rest of the output is left to the guest, which keeps it for keep_spool."""
        if isinstance(error, chirpwire.Cancelled):
            return False
        with self._lock:       # not by the end of the command: the clock may have been set, this host away
            since = self._failing.setdefault(execution.index, time.monotonic())
        last = isinstance(error, (chirpwire.Refused, NoFiles)) or isinstance(error, chirpwire.ChirpError) \
            and time.monotonic() - since > FETCH_PATIENCE          # not where this disk is full
        log.log(logging.WARNING if last else logging.INFO, 'output of %s can\'t be fetched%s: %s',
                execution.key, ', and stays in the guest for its keep_spool' if last else ' now',
                agent.sentence(error))
        if last:
            self._is_fetched(execution)
        return last

    def _is_fetched(self, execution: Execution) -> None:
        self._commands.fetched(execution)
        with self._lock:
            self._failing.pop(execution.index, None)

    def _fetch_streams(self, execution: Execution, cancel: threading.Event) -> None:
        """To the disk, not only to the system: the guest is told that it may delete its own."""
        results = execution.answer()
        guest = self._machines.connected(execution.vm_id)
        if not os.path.isdir(self._folder):
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            agent.sync(os.path.dirname(self._folder))
        limits = {stream: min(results[stream + '-size'], self._limit)
                  for stream in STREAMS if results[stream + '-offset']}
        deadline = time.monotonic() + FETCH_TIME + sum(limits.values()) / SLOWEST
        with self._machines.chirp_client(guest) as client:
            for stream, limit in limits.items():
                target = self.path(execution, stream)
                client.fetch(results['spool'] + '/' + stream, target, limit, cancel=cancel,
                             within=deadline - time.monotonic())
                agent.sync(target)
        agent.sync(self._folder)


def remove_file(path: str) -> None:
    """Deletes a file, if it is there and can be."""
    with contextlib.suppress(OSError):
        os.remove(path)


class Output:
    """Reads the output of commands, wherever it is. Safe from any thread."""

    def __init__(self, fetcher: Fetcher, control: Control, machines: Machines) -> None:
        self.follows = Follows()
        self._fetcher = fetcher
        self._control = control
        self._machines = machines

    def read(self, execution: Execution, stream: str, offset: int, length: int) -> Dict[str, Any]:
        """{data: bytes, offset, next, size, eof} of one stream; while it runs, too.

        From what came with the results, or is here as a file; else asked of the guest.
        Raises AgentNotConnected, DeadlineExceeded, BadState.
        """
        if execution.ended:
            results = execution.answer()
            size, begin = results[stream + '-size'], results[stream + '-offset']
            if offset >= size:
                return output_slice(b'', offset, size, True)
            if offset >= begin:
                data = inline_output(results, stream)[offset - begin:offset - begin + length]
                return output_slice(data, offset, size, True)
            data = self._fetcher.read(execution, stream, offset, length) \
                or self._read_there(execution, results['spool'], stream, offset, length)
            if data:
                return output_slice(data, offset, size, True)
        elif execution.state in ('queued', 'sent'):
            return output_slice(b'', offset, 0, False)
        return self._ask(execution, stream, offset, length)

    def wait(self, execution: Execution, stream: str, offset: int, length: int,
             timeout: float) -> Dict[str, Any]:
        """The same, as soon as there is a byte, or the end; at the latest after so many seconds.

        The guest tells what is written by itself meanwhile. Raises as ``read``.
        """
        deadline = time.monotonic() + timeout
        followed = self.follows.of(execution)
        while not execution.done.is_set() and time.monotonic() < deadline:
            found = self._look(followed, execution, stream, offset, length, timeout)
            if found is not None:
                return found
            with followed.changed:
                if not followed.read(stream, offset, length) and not execution.done.is_set():
                    followed.changed.wait(max(0.0, min(LONGEST_PAUSE, deadline - time.monotonic())))
        if execution.done.is_set() or not self._machines.can_answer(execution.vm_id):
            return self.read(execution, stream, offset, length)
        return output_slice(b'', offset, execution.status.get(stream + '-size', 0), False)

    def look(self, execution: Execution, stream: str, offset: int, length: int,
             timeout: float) -> Optional[Dict[str, Any]]:
        """What there is by now, or None; its guest tells by itself for so many seconds what comes. Raises as
        ``read``."""
        if execution.done.is_set() or not self._machines.can_answer(execution.vm_id):
            return self.read(execution, stream, offset, length)
        return self._look(self.follows.of(execution), execution, stream, offset, length, timeout)

    def _look(self, followed: Followed, execution: Execution, stream: str, offset: int, length: int,
              timeout: float) -> Optional[Dict[str, Any]]:
        is_there = self._machines.can_answer(execution.vm_id) and execution.state == 'running'
        with followed.changed:
            data = followed.read(stream, offset, length)
            seconds = followed.must_ask(stream, offset, timeout) if is_there and not data else 0
        if data:
            return output_slice(data, offset, execution.status.get(stream + '-size', 0), False)
        if seconds:
            self._control.query(execution, **{stream + '-offset': offset, 'follow': seconds,
                                              'max': min(length, OUTPUT_SLICE)})
        return None

    def _read_there(self, execution: Execution, spool: str, stream: str, offset: int, length: int) -> bytes:
        """A slice of what is in the guest alone, beyond ``fetch_limit``, by Chirp: words are much slower.

        Empty where that can't be had so.
        """
        if not spool or not self._machines.can_answer(execution.vm_id):
            return b''
        try:
            with self._machines.chirp_client(self._machines.connected(execution.vm_id)) as client:
                client.until = time.monotonic() + QUERY_TIMEOUT
                file, _ = client.open(spool + '/' + stream)
                return client.pread(file, min(length, OUTPUT_READ), offset)
        except (chirpwire.ChirpError, VMHostError, OSError) as error:
            log.debug('output of %s is asked for by words: %s', execution.key, error)
            return b''

    def _ask(self, execution: Execution, stream: str, offset: int, length: int) -> Dict[str, Any]:
        """A slice by CMD_QUERY and CMD_STATUS."""
        if not self._machines.can_answer(execution.vm_id):
            raise AgentNotConnected('the output of %s is in %s, whose agent is not connected'
                                    % (execution.key, execution.vm))
        key = stream + '-offset'
        with self._control.answers.expected(
                execution.index, lambda message: message.number(key, -1) == offset
                or message.text('state') == 'unknown') as answer:
            self._control.query(execution, **{key: offset, 'max': min(length, OUTPUT_SLICE)})
            message = answer.wait(QUERY_TIMEOUT)
        if message is None:
            if execution.done.is_set() and not execution.answer()[key]:
                return self.read(execution, stream, offset, length)    # it ended meanwhile
            raise DeadlineExceeded('%s gave no output of %s within %g s'
                                   % (execution.vm, execution.key, QUERY_TIMEOUT))
        if message.text('state') == 'unknown':
            raise BadState('the output of %s is no longer in %s: its spool was deleted, or lost'
                           % (execution.key, execution.vm))
        data = slice_in(message, stream)
        if not data and execution.done.is_set() and offset < execution.answer()[stream + '-size']:
            raise BadState('the output of %s is no longer in %s: somebody deleted it there'
                           % (execution.key, execution.vm))
        ended = message.text('state') in FINISHED and execution.done.is_set()
        return output_slice(data, offset, int(message.number(stream + '-size')), ended)


def output_slice(data: bytes, offset: int, size: int, ended: bool) -> Dict[str, Any]:
    """The answer of ``Output.read``."""
    end = offset + len(data)
    return {'data': data, 'offset': offset, 'next': end, 'size': max(size, end) if data else size,
            'eof': ended and end >= size}
