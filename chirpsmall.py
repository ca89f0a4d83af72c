"""Small files of a folder on their way to a server: each one's request with the content of the last, over two
connections where each file costs a round trip.

What it is not: who says which files (chirpupload.py); large ones. No threads; an object belongs to one thread
at a time.
"""

import logging
import os
from typing import Any, Callable, List, Optional, Union

from chirplocal import times_of
from chirpmove import Failures, Meter, Options, altered, concerns_all, part_path, reads_same
from chirprequests import Connection, Pipeline, unkept_by
from chirpwire import (
    MODE_UNKEPT,
    TIME_UNKEPT,
    AccessDenied,
    Disconnected,
    Refused,
    Wire,
    new_hash,
    quote,
    shown,
)

log = logging.getLogger('vmhost.chirp')

FURTHER = 1                    # connections beside the first, for small files to a server that isn't ours
FURTHER_WORTH = 50             # small files that are worth one more
FURTHER_SOON = 2.0             # seconds in which it must be there


class SmallFile:
    """A small file on its way to the server."""
    __slots__ = ('source', 'target', 'name', 'mode', 'first_mode', 'replaces', 'found', 'data', 'error',
                 'unkept')

    def __init__(self, source: str, target: bytes, merge: bool, mode: int, replaces: bool,
                 found: os.stat_result, data: bytes) -> None:
        self.source = source
        self.target = target
        self.name = part_path(target) if merge else target     # by which it is sent
        self.mode = self.first_mode = mode
        self.replaces = replaces       # a file, whose mode that is
        self.found = found
        self.data = data
        self.error: Optional[Exception] = None
        self.unkept = 0                # bits of chirpwire.UNKEPT

    def mode_set(self, _: Optional[Wire], result: Union[int, Refused]) -> None:
        self._set(result, MODE_UNKEPT)

    def times_set(self, _: Optional[Wire], result: Union[int, Refused]) -> None:
        self._set(result, TIME_UNKEPT)

    def _set(self, result: Union[int, Refused], what: int) -> None:
        try:
            self.unkept |= unkept_by(result, what)
        except Refused:
            self.check(None, result)

    def check(self, _: Optional[Wire], result: Union[int, Refused]) -> None:
        """Notes a refusal."""
        if isinstance(result, Refused) and self.error is None:
            self.error = result


class Further:
    """Connections beside a client's own, for the small files of a folder that goes to a server which isn't
    ours: there each file costs a round trip. One that is refused or lost just means that there are none."""

    def __init__(self, client: Connection) -> None:
        self.client = client
        self._others: List[Connection] = []
        self._wanted = True

    def another(self) -> Optional[Connection]:
        """One more, where there may be one. It is made now."""
        if not self._wanted or self.client.is_ours or len(self._others) >= FURTHER:
            return None
        try:
            self._others.append(self.client.another(FURTHER_SOON))
        except (Disconnected, AccessDenied) as error:
            log.debug('%s; one connection will do', error)
            self._wanted = False
            return None
        return self._others[-1]

    def lose(self, connection: Connection, error: Exception) -> Exception:
        """What to raise where a connection broke. Where it isn't the client's own, all begins again with that
        alone, whatever the error was."""
        if connection is self.client:
            return error
        self._wanted = False
        return Disconnected('a further connection: %s' % error)

    def close(self) -> None:
        """Ends those that there are. More can be made."""
        while self._others:
            self._others.pop().disconnect()


class SmallFiles:
    """Small files of a folder, one after the other; by turns over what connections there are."""

    def __init__(self, further: Further, new_lane: Callable[[Connection], 'Lane']) -> None:
        self._further = further
        self._new_lane = new_lane
        self._lanes = [new_lane(further.client)]
        self._count = 0

    def put(self, file: SmallFile) -> None:
        """Begins to send it."""
        self._count += 1
        if self._count % FURTHER_WORTH == 0:
            self._widen()
        lane = self._lanes[self._count % len(self._lanes)]
        try:
            lane.put(file)
        except (Disconnected, AccessDenied) as error:
            raise self._further.lose(lane.connection, error)

    def _widen(self) -> None:
        connection = self._further.another()
        if connection is not None:
            self._lanes.append(self._new_lane(connection))

    def asking(self, do: Callable[[], Any]) -> Any:
        """Does what asks the server by itself, once all are in place."""
        self.finish()
        return do()

    def begin_afresh(self) -> None:
        """Forgets those that are under way, with the connections that they are on."""
        self._further.client.disconnect()
        self._further.close()
        self._lanes = [self._new_lane(self._further.client)]

    def finish(self) -> None:
        """Waits until all are in place."""
        for lane in self._lanes:
            try:
                lane.finish()
            except (Disconnected, AccessDenied) as error:
                raise self._further.lose(lane.connection, error)


class Lane:
    """Small files over one connection, the next one's request with the content of the last."""

    def __init__(self, connection: Connection, meter: Meter, failures: Failures, unkept: Failures,
                 options: Options) -> None:
        self.connection = connection
        self._meter = meter
        self._failures = failures
        self._unkept = unkept
        self._options = options
        self._pipeline = Pipeline(connection)
        self._asked: Optional[SmallFile] = None        # the one whose content waits for the server's consent
        self._last: Optional[SmallFile] = None         # the one that has no name yet

    def put(self, file: SmallFile) -> None:
        """Asks for it, in one packet with the content of the last one, which the server has agreed to
        meanwhile: it takes as many bytes as that has, and then reads on. This one's content can't go along:
        after a refusal, it would be taken for requests."""
        if self._pipeline.is_idle():
            self.connection.drop_if_ended()
        if file.name != file.target:
            self.connection.replacing(file.name, file.target)     # raises where that is too long
        file.first_mode = self._first_mode(file)
        line = self.connection.ask('putfile', quote(file.name), file.first_mode, len(file.data))
        self._send_asked()
        self._asked = file
        self._pipeline.add(line, lambda wire, result: self._agreed(file, result))
        self.connection.connect().flush()         # the server works on it while the next file is read here

    def finish(self) -> None:
        """Waits until all are in place."""
        self._send_asked()
        self._pipeline.drain()
        self._complete_last()
        self._pipeline.drain()

    def _send_asked(self) -> None:
        """Sends the content of the one that was asked for, once the server has agreed; and what follows."""
        self._pipeline.drain()
        file, self._asked = self._asked, None
        if file is not None:
            self.connection.connect().put(file.data)
            self._follow(file)

    def _agreed(self, file: SmallFile, result: Union[int, Refused]) -> None:
        if isinstance(result, Refused):
            self._asked = None
            if concerns_all(result):
                raise result.about(shown(file.target))
            self._failures.add(file.source, result)

    def _follow(self, file: SmallFile) -> None:
        """What comes after the content, without waiting; its name last, once all replies were good."""
        add, ask, name = self._pipeline.add, self.connection.ask, quote(file.name)
        add(b'', lambda wire, result: self._arrived(file, result))
        self._complete_last()
        if self._options.verify:
            algorithm, request = self.connection.asking_for_digest(file.name, 0, len(file.data))
            add(request, lambda wire, result: self._compare(file, algorithm, wire, result))
        if file.first_mode != file.mode and (self._options.keep or file.replaces):
            add(ask('chmod', name, file.mode), file.mode_set)
        if self._options.keep:
            # The time comes last: by it a later attempt knows what is complete.
            add(ask('utime', name, *times_of(file.found), *self.connection.mode_to_tell(file.mode)),
                file.times_set)
        self._last = file

    def _first_mode(self, file: SmallFile) -> int:
        """What it has first: a server of ours has to read it for its checksum; the real one has a umask."""
        return file.mode | 0o400 if self.connection.is_ours else file.mode & ~0o077

    def _arrived(self, file: SmallFile, result: Union[int, Refused]) -> None:
        file.check(None, result)
        if isinstance(result, Refused):
            if concerns_all(result):
                raise result.about(shown(file.target))
        elif result != len(file.data):
            raise self.connection.broken('putfile: a wrong count')
        else:
            self._meter.add(result)

    def _compare(self, file: SmallFile, algorithm: str, wire: Wire, result: Union[int, Refused]) -> None:
        file.check(wire, result)
        if not isinstance(result, Refused) and not reads_same(wire, result, new_hash(algorithm, file.data)):
            file.error = altered(file.target)

    def _complete_last(self) -> None:
        """Gives the last one its name, now that all replies are known."""
        file, self._last = self._last, None
        if file is not None and file.error is not None:
            self._failures.add(file.source, file.error)
            return
        if file is not None and file.name != file.target:
            named = file
            self._pipeline.add(self.connection.replacing(file.name, file.target),
                               lambda wire, result: self._named(named, result))
        elif file is not None:
            self._unkept.add_unkept(file.source, file.unkept)

    def _named(self, file: SmallFile, result: Union[int, Refused]) -> None:
        if isinstance(result, Refused):
            self._failures.add(file.source, result)
        else:
            self._unkept.add_unkept(file.source, file.unkept)
