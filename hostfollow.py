"""Output that guests tell as it is written, for those who wait for it: the last of it, in memory.

What it is not: the output (hostoutput.py), which is in the guests and in files.

Threads: any thread may wait; ``link`` and ``broker`` bring what guests tell. One lock for the table, one for
each command.
"""

import base64
import threading
import time
from typing import Callable, Dict, List, Optional, Tuple

from hostjournal import Execution
from protocol import BadWord, Message

KEPT = 1024 * 1024             # bytes of a stream
FOLLOWED_ON = 5.0              # seconds that a guest goes on telling, so that the next call needn't ask
ASK_AGAIN = 256 * 1024         # bytes after which it is asked for more, …
IDLE = 60.0                    # seconds after which nobody waits any more


class _Stream:
    """The last of one stream, as far as it was told without a gap."""

    def __init__(self) -> None:
        self.begin = 0
        self.data = bytearray()
        self.until = 0.0               # monotonic: how long the guest tells what comes next
        self.asked_at = 0              # offset from which it was asked to

    @property
    def end(self) -> int:
        return self.begin + len(self.data)

    def take(self, offset: int, data: bytes) -> None:
        """What was told: joined where it fits, else all that there is."""
        if self.begin <= offset <= self.end:
            self.data += data[self.end - offset:]
        else:
            self.begin, self.data = offset, bytearray(data)
        surplus = len(self.data) - KEPT
        if surplus > 0:
            del self.data[:surplus]
            self.begin += surplus

    def read(self, offset: int, length: int) -> bytes:
        """What is here from that offset on."""
        at = offset - self.begin
        return bytes(self.data[at:at + length]) if 0 <= at < len(self.data) else b''


class Followed:
    """What is known of one command's output. Within ``changed`` alone."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.Lock())
        self.used = time.monotonic()   # when somebody waited last
        self._sinks: List[Callable[[], None]] = []
        self._streams = {'out': _Stream(), 'err': _Stream()}

    def read(self, stream: str, offset: int, length: int) -> bytes:
        """What is here from that offset on."""
        self.used = time.monotonic()
        return self._streams[stream].read(offset, length)

    def peek(self, stream: str, offset: int, length: int) -> bytes:
        """The same, for a sink."""
        return self._streams[stream].read(offset, length)

    def add_sink(self, sink: Callable[[], None]) -> None:
        """Has it called whenever something new was heard, within ``changed``; it must not wait."""
        with self.changed:
            self._sinks.append(sink)

    def remove_sink(self, sink: Callable[[], None]) -> None:
        """It is called no more."""
        with self.changed:
            self._sinks.remove(sink)

    @property
    def has_sinks(self) -> bool:
        """Whether there is one."""
        return bool(self._sinks)

    def is_idle(self, now: float) -> bool:
        """Whether nobody waits any more."""
        return not self._sinks and now - self.used > IDLE

    def tell(self) -> None:
        """Those who wait."""
        for sink in self._sinks:
            sink()
        self.changed.notify_all()

    def take(self, stream: str, offset: int, data: bytes) -> None:
        """What a shortcut told of it."""
        self._streams[stream].take(offset, data)
        self.tell()

    def must_ask(self, stream: str, offset: int, timeout: float) -> float:
        """For how many seconds the guest should be asked to tell what comes from there on; 0: it does so."""
        known, now = self._streams[stream], time.monotonic()
        is_told = known.end == offset and known.until >= now + min(timeout, 1.0)
        if is_told and offset - known.asked_at < ASK_AGAIN:
            return 0
        known.asked_at, known.until = offset, now + timeout + FOLLOWED_ON
        return timeout + FOLLOWED_ON

    def hear(self, status: Message) -> None:
        """Takes the slices of a CMD_STATUS. Raises BadWord."""
        for stream, known in self._streams.items():
            if status.get(stream + '-offset') is not None:
                known.take(max(0, int(status.number(stream + '-offset'))), slice_in(status, stream))

    def doubt(self) -> None:
        """The guest may tell nothing any more: who waits should ask it again."""
        for known in self._streams.values():
            known.until = 0.0


def slice_in(status: Message, stream: str) -> bytes:
    """The slice of a stream that a CMD_STATUS holds. Raises BadWord."""
    exact = status.text(stream + '64')
    if not exact:
        return status.text(stream).encode('utf-8')
    try:
        return base64.b64decode(exact, validate=True)
    except ValueError:
        raise BadWord('CMD_STATUS: %s64 is no base64' % stream)


class Follows:
    """The output of all commands that somebody waits for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._followed: Dict[Tuple[str, str], Followed] = {}

    def of(self, execution: Execution) -> Followed:
        """Of a command, from now on."""
        with self._lock:
            now = time.monotonic()
            for index in [index for index, one in self._followed.items() if one.is_idle(now)]:
                del self._followed[index]
            return self._followed.setdefault(execution.index, Followed())

    def is_watched(self, index: Tuple[str, str]) -> bool:
        """Whether somebody is at that command's terminal."""
        followed = self._find(index)
        return followed is not None and followed.has_sinks

    def _find(self, index: Tuple[str, str]) -> Optional[Followed]:
        with self._lock:
            return self._followed.get(index)

    def heard(self, index: Tuple[str, str], message: Message) -> None:
        """A CMD_STATUS, or the end. Raises BadWord."""
        followed = self._find(index)
        if followed is not None:
            with followed.changed:
                if message.word == 'CMD_STATUS':
                    followed.hear(message)
                followed.tell()

    def joined(self, vm_id: str) -> None:
        """A guest is there, perhaps again: it may have forgotten who waits."""
        with self._lock:
            found = [one for index, one in self._followed.items() if index[1] == vm_id]
        for followed in found:
            with followed.changed:
                followed.doubt()
                followed.tell()
