"""The guests: which agents are there, what they said of themselves, and when they were heard last.

What it is not: the hypervisor's VMs (hostmachines.py brings the two together).

Threads: any thread may call. One lock guards the table and all guests in it.
"""

import collections
import json
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import agent
from faults import Busy
from protocol import is_mac

LOADS_KEPT = 120               # loads that are remembered of a guest, for the status page …
LOAD_EVERY = 5.0               # … and the seconds between two of them: ten minutes, or more
NOTES_AT_ONCE = 20             # of a guest in the journal, besides those of its commands, …
NOTE_EVERY = 10.0              # … and the seconds after which there may be one more
GUESTS_KEPT = 10000            # ids that may say HELLO, …
OF_ONE_ADDRESS = 2000          # … and new ones among them, from one address


class Guest:
    """What is known of one agent. Times: ``heard`` is monotonic, ``last_seen`` since 1970."""

    def __init__(self, id: str, name: str) -> None:
        self.id = id
        self.name = name
        self.ip = ''
        self.boot = ''
        self.session = ''
        self.facts = {}                # type: Dict[str, Any]
        self.agent = 'lost'            # alive, late or lost
        self.has_left = False          # whether it said BYE, and so isn't missed
        self.heard = 0.0
        self.last_seen = 0.0
        self.clock_offset = 0.0
        self.noted = -1e9              # monotonic: from when on all it may note could be noted again
        self.loaded = -1e9             # monotonic: when its load was last remembered
        self.loads = collections.deque(maxlen=LOADS_KEPT)  # type: collections.deque

    @property
    def chirp_port(self) -> int:
        """Where its Chirp server listens; 0: nowhere."""
        port = self.facts.get('chirp')
        port = port.get('port') if isinstance(port, dict) else port
        return port if isinstance(port, int) and 0 < port < 65536 else 0

    @property
    def chirp_tls(self) -> bool:
        """Whether that talks TLS."""
        chirp = self.facts.get('chirp')
        return isinstance(chirp, dict) and chirp.get('tls') is True

    @property
    def repeats_marks(self) -> bool:
        """Whether a CMD_STATUS has the mark of the CMD_QUERY that it answers."""
        return self.facts.get('marks') is True


class Guests:
    """The agents that said HELLO, and whether they are still there. Safe from any thread.

    Alive; ``late`` when nothing was heard for ``grace`` seconds; ``lost``, and off the list, after
    1.5 times that. The clock is the host's monotonic one, and comes in as an argument.
    """

    def __init__(self, grace: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace = grace
        self._clock = clock
        # Guards the two tables and what is in them; nothing outside this class is called while
        # it is held.
        self._lock = threading.Lock()
        self._known = {}               # type: Dict[str, Guest]

    def remember(self, id: str, name: str, ip: str, boot: str, session: str, facts: str,
                 last_seen: float, has_left: bool) -> None:
        """A guest of an earlier run of the host: known, and lost until it says HELLO."""
        guest = Guest(id, name)
        guest.ip, guest.boot, guest.session, guest.last_seen = ip, boot, session, last_seen
        guest.has_left = bool(has_left)
        try:
            guest.facts = dict(json.loads(facts))
        except (TypeError, ValueError):
            guest.facts = {}               # a damaged row; it tells them again
        with self._lock:
            self._known[id] = guest

    def add(self, id: str, name: str, ip: str, boot: str, session: str,
            facts: Dict[str, Any], clock_offset: float) -> Tuple[Guest, bool]:
        """A HELLO: the guest, and whether it is news (a new agent, or one that was away). Raises Busy."""
        with self._lock:
            self._check_room(id)
            guest = self._known.get(id)
            if guest is None:
                guest = self._known[id] = Guest(id, name)
            news = guest.agent == 'lost' or guest.session != session
            guest.name = self._free_name(id, name)
            guest.ip, guest.boot, guest.session = ip, boot, session
            guest.facts, guest.clock_offset = facts, clock_offset
            self._touch(guest)
            return guest, news

    def check_room(self, id: str) -> None:
        """Raises Busy where that would be one too many: an absent one stays until it is forgotten."""
        with self._lock:
            self._check_room(id)

    def check_share(self, id: str, ip: str) -> None:
        """Raises Busy where one address has brought as many machines as it may: under ever new ids, one guest
        would take all the room. '': an address that nobody has seen."""
        with self._lock:
            if not ip or id in self._known:
                return
            count = sum(guest.ip == ip for guest in self._known.values())
        if count >= OF_ONE_ADDRESS:
            raise Busy('%d agents of %s are known already: forget some (`forget VM`)' % (count, ip))

    def _check_room(self, id: str) -> None:
        if id not in self._known and len(self._known) >= GUESTS_KEPT:
            raise Busy('%d agents are known already: forget some (`forget VM`)' % len(self._known))

    def _free_name(self, id: str, name: str) -> str:
        """The name, with the id appended where it is another's name or id."""
        while any(other.id != id and name in (other.name, other.id) for other in self._known.values()):
            name = '%s-%s' % (name, id)
        return name

    def _touch(self, guest: Guest) -> None:
        guest.agent, guest.has_left = 'alive', False
        guest.heard = self._clock()
        guest.last_seen = time.time()

    def heard(self, id: str, load: Optional[Dict[str, float]] = None) -> bool:
        """Any word counts as a beacon. Whether the guest is on the list."""
        with self._lock:
            guest = self._known.get(id)
            if guest is None or guest.agent == 'lost':
                return False
            self._touch(guest)
            if load and guest.heard - guest.loaded >= LOAD_EVERY:
                guest.loaded = guest.heard
                guest.loads.append(dict(load, time=guest.last_seen))
            return True

    def set_clock_offset(self, id: str, offset: float) -> None:
        """A guest has told what its clock says by now."""
        with self._lock:
            if id in self._known:
                self._known[id].clock_offset = offset

    def loads_of(self, guest: Guest) -> List[Dict[str, float]]:
        """What its beacons told of the last minutes, each with its ``time`` since 1970."""
        with self._lock:
            return list(guest.loads)

    def rename(self, guest: Guest, name: str) -> None:
        """The hypervisor's name for a guest; another that calls itself so has its id appended."""
        with self._lock:
            guest.name = name
            for other in self._known.values():
                if other is not guest and other.name == name:
                    other.name = self._free_name(other.id, '%s-%s' % (name, other.id))

    def owner_of(self, name: str) -> Optional[str]:
        """The id of who has that name, present or not."""
        with self._lock:
            return next((guest.id for guest in self._known.values() if guest.name == name), None)

    def forget(self, id: str) -> None:
        """Lets go of a guest, and its name."""
        with self._lock:
            self._known.pop(id, None)

    def gone(self, id: str) -> Optional[Guest]:
        """A BYE: off the list."""
        with self._lock:
            guest = self._known.get(id)
            if guest is None or guest.agent == 'lost':
                return None
            guest.agent, guest.has_left = 'lost', True
            return guest

    def should_note(self, guest: Guest) -> bool:
        """Whether its coming should be journalled: a guest that comes and goes all the time doesn't fill the
        journal."""
        with self._lock:
            now = self._clock()
            if guest.noted > now + (NOTES_AT_ONCE - 1) * NOTE_EVERY:
                return False
            guest.noted = max(now, guest.noted) + NOTE_EVERY
            return True

    def may_be_noted(self, id: str) -> bool:
        """The same for whatever else a guest has the host write into the journal."""
        guest = self.by_id(id)
        return guest is not None and self.should_note(guest)

    def forgive(self) -> None:
        """Nobody was late: it was the host, or the broker, that slept."""
        with self._lock:
            for guest in self._known.values():
                if guest.agent != 'lost':
                    self._touch(guest)

    def tick(self, excused: Callable[[str], bool]) -> List[Tuple[Guest, str]]:
        """Those whose liveness changed, with what it is now.

        ``excused`` ones are not judged, and have the whole grace from the moment on when they no
        longer are.
        """
        suspects = self.on_list()
        excused_ids = {guest.id for guest in suspects if excused(guest.name)}
        changed = []
        with self._lock:
            for guest in suspects:
                silence = self._clock() - guest.heard
                if guest.id in excused_ids:
                    guest.heard = self._clock()
                elif silence > 1.5 * self._grace and guest.agent != 'lost':
                    guest.agent = 'lost'
                    changed.append((guest, 'lost'))
                elif silence > self._grace and guest.agent == 'alive':
                    guest.agent = 'late'
                    changed.append((guest, 'late'))
        return changed

    def find(self, vm: str) -> Optional[Guest]:
        """By id, or name."""
        id = vm.upper() if is_mac(vm) else vm
        with self._lock:
            return self._known.get(id) or next(
                (guest for guest in self._known.values() if guest.name == vm), None)

    def by_id(self, id: str) -> Optional[Guest]:
        """The guest of exactly that id."""
        with self._lock:
            return self._known.get(id)

    def on_list(self) -> List[Guest]:
        """All that are alive or late, by name."""
        with self._lock:
            return sorted((guest for guest in self._known.values() if guest.agent != 'lost'),
                          key=lambda guest: agent.in_order(guest.name))

    def all(self) -> List[Guest]:
        """All that are known, lost ones too."""
        with self._lock:
            return list(self._known.values())
