"""Looks at the folders of a source again, once all in them has been moved: what another program has brought
into one that had been listed by then, by a rename, may be nowhere else.

What it is not: who lists and moves (chirpupload.py, chirpdownload.py). No threads; an object belongs to one
thread at a time. What is held is bounded: of more folders, the first ones are looked at.
"""

import errno
import functools
import os
import time
from typing import Any, Dict, List, NamedTuple, Tuple, Union

from chirplocal import stat_of
from chirpmove import KNOWN, Move
from chirprequests import Connection, Pipeline, read_stat
from chirpwire import Refused, Stat, Wire, may_have_changed, quote

LOOKS = 3                      # at folders that go on changing
SAME_TIME = 1                  # seconds: by a server's times, two changes in them may be one
CLOCKS_DIFFER = 86400          # seconds, at most, or that isn't seen

Key = Tuple[int, int]          # device and inode


class Listed(NamedTuple):
    """A folder of the source. ``target``: while it is moved, where to; ``names``: those that lead to it from
    the one that is moved; ``merge``: whether the target was somebody's; ``kept``: whether the target has the
    source's mode and time; ``around``: see Move; ``found``, ``seen``: its stat, and when that was, before it
    was listed."""
    source: Any
    target: Any
    names: Tuple[str, ...]
    merge: bool
    kept: bool
    around: List[Key]
    found: Any
    seen: float


class Again(Move):
    """A Move that does."""

    def _forget_listed(self) -> None:
        self._listed: Dict[Key, Listed] = {}
        self._again = False            # whether only what has come meanwhile is moved

    def _note_listed(self, listed: Listed) -> None:
        """Before it is listed."""
        key = key_of(listed.found)
        if key in self._listed or len(self._listed) < KNOWN:
            self._listed[key] = listed

    def _is_listed(self, found: Any) -> bool:
        return key_of(found) in self._listed

    def _look_again(self) -> None:
        """Raises as moving a folder does."""
        for look in range(LOOKS):
            changed = self._changed(not look)
            if not changed:
                return
            self._again = True
            self._failures.tell_once()
            self._unkept.tell_once()
            for listed in changed:
                if self._is_failed(listed):
                    continue
                with self._failing(listed.source):
                    self._around[:] = listed.around
                    self._fill_again(listed)
            self._around.clear()
        for listed in self._changed(False):
            self._failures.add(listed.source, OSError(
                errno.EBUSY, 'it went on changing: what came into it last may be missing'))

    def _is_failed(self, listed: Listed) -> bool:
        """Whether the folder, or one that it is in, has been told of."""
        path = listed.source
        for _ in range(len(listed.names) + 1):
            if self._failures.is_told(path):
                return True
            path = os.path.dirname(path)
        return False

    def _changed(self, first: bool) -> List[Listed]:
        """Folders that may have changed since they were listed. ``first``: also those whose time may not
        tell."""
        raise NotImplementedError

    def _fill_again(self, listed: Listed) -> None:
        """Moves what has come into it."""
        raise NotImplementedError


def key_of(found: Any) -> Key:
    """Of a stat of this machine, or a server's."""
    return (found.dev, found.ino) if isinstance(found, Stat) else (found.st_dev, found.st_ino)


def changed_here(folders: List[Listed], first: bool, follow: bool) -> List[Listed]:
    """Of this machine. One that is gone, or replaced, hasn't changed: it has been moved as it was."""
    changed = []
    for listed in folders:
        found = stat_of(listed.source, follow or not listed.names)
        if found is not None and key_of(found) == key_of(listed.found) and may_have_changed(
                listed.found, listed.seen if first else float('inf'), found):
            changed.append(listed)
    return changed


def changed_there(client: Connection, folders: List[Listed], first: bool, links: str) -> List[Listed]:
    """Of a server, whose times are whole seconds."""
    times: Dict[int, int] = {}

    def note(at: int, wire: Wire, result: Union[int, Refused]) -> None:
        if not isinstance(result, Refused):
            found = read_stat(wire, result)
            if key_of(found) == key_of(folders[at].found):
                times[at] = found.mtime

    pipeline = Pipeline(client)
    for at, listed in enumerate(folders):
        word = 'stat' if links == 'follow' or not listed.names else 'lstat'
        pipeline.add(client.ask(word, quote(listed.source)), functools.partial(note, at))
    pipeline.drain()
    latest = max(max(times.values(), default=0) - SAME_TIME, time.time() - CLOCKS_DIFFER)
    return [folders[at] for at, changed in times.items()
            if changed != folders[at].found.mtime or first and changed >= latest]
