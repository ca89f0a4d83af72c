"""A folder of the server while one is put into it: what is there already, which names are one file there, and
whether what has arrived is still what is there.

What it is not: who puts it (chirpupload.py), nor a folder here (chirplocal.py). No threads; an object belongs
to one thread at a time. What is held of a folder is bounded.
"""

import contextlib
import errno
import os
from typing import Any, Callable, Dict, Iterable, List, Optional, Set, Tuple

import localnames
from chirplocal import join, to_local, to_remote
from chirpmove import KNOWN
from chirprequests import Connection
from chirpwire import Changed, Stat, Unlistable, is_part, part_name, seconds, to_bytes

Asking = Callable[[Callable[[], Any]], Any]
Sent = Dict[bytes, Optional[Tuple[int, int]]]  # names in a folder, of files with size and time, where known


class Folder:
    """One that is filled. ``asking``: see ``SmallFiles``; ``merge``: others may read what is there."""

    def __init__(self, client: Connection, asking: Asking, path: bytes, merge: bool) -> None:
        self.path = path
        self.merge = merge
        self.known = Known(client, path)
        self.twins = Twins(client, asking, path)
        self.sent: Sent = {}
        self.waiting: List[str] = []           # folders in it, until its files have been moved
        self.unmoved: Set[bytes] = set()       # partial files that a later attempt goes on from

    def note(self, name: bytes, found: Optional[os.stat_result]) -> None:
        """What was sent, to be looked at, as far as memory allows. ``found``: of a file that keeps its time;
        those of /proc tell no size."""
        if len(self.sent) < KNOWN:
            self.sent[name] = None if found is None or not found.st_size else (
                found.st_size, seconds(found.st_mtime_ns))


class Known:
    """What is in a folder of the server, as far as memory allows; of more names it asks."""

    def __init__(self, client: Connection, folder: bytes) -> None:
        self._client = client
        self._folder = folder
        self._entries: Dict[bytes, Stat] = {}
        self._parts: List[bytes] = []
        self.must_ask = False

    def fill(self, source: Optional[str]) -> None:
        """Reads the folder. ``source``: what isn't in that folder here is removed there."""
        for entry in self._client.ls(self._folder):
            name = to_bytes(entry.name)
            if is_part(name):
                self._parts.append(name)
            elif source is not None and not os.path.lexists(os.path.join(source, to_local(entry.name))):
                self._client.rmall(join(self._folder, name))
            elif len(self._entries) < KNOWN:
                self._entries[name] = entry
            else:
                self.must_ask = True

    def find(self, name: bytes) -> Optional[Stat]:
        if name in self._entries:
            return self._entries[name]
        return self._client.find(join(self._folder, name), False) if self.must_ask else None

    def has_part(self, name: bytes) -> bool:
        return bool(self._parts) and part_name(name) in self._parts

    def remove_parts(self, unmoved: Set[bytes]) -> None:
        """Of files that the source doesn't have; those of the others have their names by now, but for
        ``unmoved``."""
        for name in self._parts:
            if name not in unmoved and self._client.find(join(self._folder, name), False) is not None:
                self._client.rmall(join(self._folder, name))


class Arrived:
    """What has been put to a server that isn't ours, which keeps nobody out of a partial folder: whether that
    is still what is there when the folder gets its name."""

    def __init__(self, client: Connection) -> None:
        self._client = client
        self._folders: Dict[bytes, int] = {}           # with a sum of what was in them
        self.latest = b''              # of them, which has just been looked at

    def check_folder(self, folder: bytes, sent: Sent) -> None:
        """Raises Changed."""
        def look(entry: Stat) -> Stat:
            name = to_bytes(entry.name)
            expected = sent.pop(name, None)
            if expected is not None and not (
                    entry.size == expected[0] and is_about(entry.mtime, expected[1])):
                raise self._changed(join(folder, name))
            return entry
        with contextlib.suppress(Unlistable):
            self._folders[folder], self.latest = sum_of(map(look, self._client.ls(folder))), folder
            if sent:
                raise self._changed(join(folder, next(iter(sent))))

    def check(self, but: Optional[bytes] = None) -> None:
        """Of all folders ``but`` one. Raises Changed."""
        for folder, expected in self._folders.items():
            if folder != but and sum_of(self._client.ls(folder)) != expected:
                raise self._changed(folder)

    def _changed(self, path: bytes) -> Changed:
        return Changed(path, 'it changed while the folder was sent: does another transfer go there?')


def is_about(there: int, sent: int) -> bool:
    """Whether a time may be what a server's disk has made of another one."""
    return abs(there - sent) <= 2 or not DOS_BEGIN < sent < DOS_END


DOS_BEGIN, DOS_END = 315619200, 4354732800     # 1980 and 2108: FAT knows the time between


def sum_of(entries: Iterable[Stat]) -> int:
    """One number for a listing, in whatever order it comes."""
    result = 0
    for entry in entries:
        about = (0, 0) if entry.is_dir else (entry.size, entry.mtime)
        result ^= hash((entry.name, entry.ino) + about)
    return result


class Twins:
    """Names of one folder that differ by case or accents alone, which the server's disk may take for one."""

    def __init__(self, client: Connection, asking: Asking, folder: bytes) -> None:
        self._client = client
        self._asking = asking
        self._folder = folder
        self._first: Dict[str, str] = {}
        self._folds: Optional[bool] = None     # whether the disk ignores case, once there are too many names

    def check(self, name: str) -> None:
        """What comes next. Raises OSError where it would replace another one that came before it."""
        if len(self._first) >= KNOWN:
            return self._check_disk()
        first = self._first.setdefault(localnames.case_folded(name), name)
        if first != name and self._are_one(first, name):
            raise OSError(errno.EEXIST, 'there it would be the same file as %s, which came before it' % first)

    def _check_disk(self) -> None:
        """More names can't be held: raises OSError, where the disk ignores case."""
        if self._folds is None:
            name = next((name for name in self._first.values() if name.swapcase() != name), '')
            self._folds = bool(name) and self._are_one(name, name.swapcase())
        if self._folds:
            raise OSError(errno.EINVAL, 'a folder of too many names for a disk that ignores case')

    def _are_one(self, *names: str) -> bool:
        one, other = self._asking(lambda: [
            self._client.find(join(self._folder, to_remote(name)), False) for name in names])
        return one is not None and other is not None and (one.dev, one.ino) == (other.dev, other.ino)
