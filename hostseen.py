"""What was seen of the VMs: the last look at all of them, or at one since; what differs from before; and what
was told of each beside.

What it is not: it asks nobody; who looks brings the rows (hosthypervisor.py). From any thread; one lock.
"""

import collections
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Set, Tuple  # noqa: F401

from hypervisor import HANGS, either, meant_twice, row_of
from vmstates import INACCESSIBLE, PAUSED, RUNNING, STUCK

NEVER = object()               # in place of what was never told
REMEMBERED = 'version', 'machine_states', 'find_chirp', 'snapshots', 'get_network', 'describe'
# Changes of a VM after which its ports are where they were; and those after which its snapshots are others.
MOVE_NO_PORT = 'pause', 'resume', 'take_snapshot', 'delete_snapshot', 'keep', 'set_limits', 'remote_desktop'
CHANGE_SNAPSHOTS = 'take_snapshot', 'restore_snapshot', 'delete_snapshot', 'remove_vm'


class Told:
    """What verbs that only look told last, of what hardly changes: to be told again where nobody answers.
    From any thread: each step is one of a dict's."""

    def __init__(self) -> None:
        self._last = {}  # type: Dict[Tuple[str, str], Any]          # by verb, and uuid of a VM or ''

    def last(self, verb: str, vm: str) -> Any:
        """What was told, or NEVER."""
        return self._last.get((verb, vm), NEVER)

    def keep(self, verb: str, vm: str, found: Any) -> None:
        if verb in REMEMBERED:
            self._last[verb, vm] = found

    def forget(self, change: str, vms: Set[str]) -> None:
        """What a change of a VM, by whichever of these words, or of the network, may have made untrue."""
        stays = {'find_chirp': change in MOVE_NO_PORT, 'snapshots': change not in CHANGE_SNAPSHOTS}
        for verb, vm in list(self._last):
            if vm and vm in vms and not stays.get(verb):
                self._last.pop((verb, vm), None)
        if change == 'setup_network':
            self._last.pop(('get_network', ''), None)


class Watch:
    """Compares the VMs with what was seen before, and tells the difference.

    The memory is here and not in the driver, so that a VM that died together with its hypervisor is noticed
    by the driver's successor. From any thread.
    """

    def __init__(self, happened: Callable[[str, str, str], None]) -> None:
        self._happened = happened
        # Only one look at a time; guards what was seen. Events are only queued while it is held.
        self._lock = threading.Lock()
        self.looked_at = 0.0                # monotonic: when somebody last did
        # Replaced as a whole, never changed: so any thread may read them.
        self._seen = None  # type: Optional[Dict[str, Dict[str, Any]]]       # by uuid
        self._by_word = {}  # type: Dict[str, Dict[str, Any]]                # by name, id and uuid
        self._told = []  # type: List[Dict[str, Any]]            # the rows, as they were told last
        self._hung = set()  # type: Set[str]                     # uuids of VMs whose process answers nobody
        self._clashes = {}  # type: Dict[str, List[str]]                     # id: the names that share it

    def rows(self) -> Optional[List[Dict[str, Any]]]:
        """All of them; None before the first look."""
        seen = self._seen
        return None if seen is None else list(seen.values())

    def row_of(self, vm: str) -> Optional[Dict[str, Any]]:
        return self._by_word.get(vm) or (self._by_word.get(vm.upper()) if ':' in vm else None)

    def called(self, vm: str) -> str:
        """The VM's name; what it was called by, where it was not seen."""
        row = self.row_of(vm)
        return row['name'] if row is not None else vm

    def hangs(self, vm: str) -> bool:
        """Whether it is told to."""
        row = self.row_of(vm)
        return row is not None and row['trouble'] == HANGS

    def uuid_of(self, vm: str) -> str:
        row = self.row_of(vm)
        return row['uuid'] if row is not None else ''

    def name_of(self, mac: str) -> str:
        row = self._by_word.get(mac.upper())
        return row['name'] if row is not None and row['id'] == mac.upper() else ''

    def clash_of(self, vm: str) -> str:
        row = self._by_word.get(vm)
        names = self._clashes.get(row['id'] if row is not None else vm.upper(), [])
        if not names or (row is not None and vm == row['uuid']):
            return ''
        return clash_text(row['id'] if row is not None else vm.upper(), names)

    def meant_twice(self, vm: str) -> str:
        """A sentence, where this word means more than one VM; else ''."""
        return meant_twice(vm, self.rows() or [])

    def look(self, rows: List[Dict[str, Any]]) -> None:
        """`rows`: as Driver.machines gives them. The first look tells clashes and trouble alone."""
        self.looked_at = time.monotonic()
        self._take(lambda told: rows)

    def describe(self, told: Dict[str, Any]) -> None:
        """One VM was looked at, alone, since: `told` as Driver.describe gives it. Before the first look at
        all of them it says nothing of the others, so that it isn't kept."""
        def put(rows: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
            at = next((at for at, row in enumerate(rows) if row['uuid'] == told['uuid']), len(rows))
            return rows[:at] + [row_of(told)] + rows[at + 1:]
        if self._seen is not None:
            self._take(put)

    def mark(self, uuid: str, hangs: bool) -> None:
        """Whether that VM's own process answers nobody: it is told beside the VM, and where it is news."""
        with self._lock:
            is_news = hangs != (uuid in self._hung)
            (self._hung.add if hangs else self._hung.discard)(uuid)
        if is_news:
            self._take(lambda rows: rows)

    def marked(self, rows: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        """The rows, of a driver's or longer ones, with that trouble."""
        return [dict(row, trouble=HANGS) if row['uuid'] in self._hung and not row['trouble']
                and row['state'] in (RUNNING, PAUSED) else row for row in rows]

    def _take(self, change: Callable[[List[Dict[str, Any]]], List[Dict[str, Any]]]) -> None:
        """change: makes the rows as they are told now of those that were told last."""
        with self._lock:
            self._told = change(self._told)
            rows = self.marked(self._told)
            self._hung.intersection_update(row['uuid'] for row in rows if row['state'] in (RUNNING, PAUSED))
            before, self._seen = self._seen, {row['uuid']: row for row in rows}
            names = collections.OrderedDict()  # type: Dict[str, List[str]]
            for row in rows:
                if row['id']:
                    names.setdefault(row['id'], []).append(row['name'])
            clashed = self._clashes
            self._clashes = {mac: each for mac, each in names.items() if len(each) > 1}
            self._by_word = {row[key]: row for key in ('name', 'id', 'uuid') for row in rows
                             if row[key] and not (key == 'id' and row['id'] in self._clashes)}
            for mac in self._clashes:
                if mac not in clashed:
                    for name in self._clashes[mac]:
                        self._happened('vm-clash', name, clash_text(mac, self._clashes[mac]))
            self._tell_difference(before)

    def forget(self, uuid: str) -> None:
        """That VM was removed; nobody may have looked since."""
        if uuid in (self._seen or {}):
            self._take(lambda rows: [row for row in rows if row['uuid'] != uuid])

    def _tell_difference(self, before: Optional[Dict[str, Dict[str, Any]]]) -> None:
        seen = self._seen or {}
        for uuid, row in seen.items():
            known = (before or {}).get(uuid)
            if row['trouble'] and row['trouble'] != (known or {}).get('trouble'):
                self._happened('vm-inaccessible' if row['state'] == INACCESSIBLE else 'vm-trouble',
                               row['name'], row['trouble'])
            if before is not None and known is None:
                self._happened('vm-added', row['name'], row['native'])
            elif known is not None and row != known:
                self._tell_change(known, row)
        for uuid, row in (before or {}).items():
            if uuid not in seen:
                self._happened('vm-removed', row['name'], '')

    def _tell_change(self, before: Dict[str, Any], now: Dict[str, Any]) -> None:
        name = now['name']
        if name != before['name']:
            self._happened('vm-renamed', name, 'was ' + before['name'])
        if now['id'] != before['id']:
            self._happened('vm-card', name, '%s, was %s' % (now['id'] or 'none', before['id'] or 'none'))
        if now['native'] != before['native']:
            self._happened('vm-state', name, now['native'])
            if now['native'].startswith('Aborted'):
                self._happened('vm-aborted', name, 'its process died; it was ' + before['native'])
            elif now['state'] == STUCK:
                self._happened('vm-stuck', name, 'the guest stopped with an error')


def clash_text(mac: str, names: List[str]) -> str:
    """What is wrong where VMs share a MAC, and how to fix it."""
    return ('%s have the same MAC address, %s, so nobody can tell their guests apart: give one of them '
            'another while it is off (VBoxManage modifyvm NAME --macaddress1 auto)'
            % (either(sorted(names), 'and'), mac))
