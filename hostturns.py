"""Who may change a VM now: one change at a time for each; and none is made while cleanup looks for what is
half made.

What it is not: it changes nothing, and asks no driver (hosthypervisor.py). From any thread; one lock.
"""

import collections
import contextlib
import logging
import threading
import time
from typing import Callable, Dict, Iterator, List  # noqa: F401

from driverprocesses import Call
from faults import Busy
from hypervisor import kind_of, spoken

log = logging.getLogger('vmhost.hypervisor')

TURN_OF_THE_PLUG = 2.0         # seconds that a power_off waits until it looks whether what is there hangs
TURNS = dict.fromkeys(('power_off', 'end_process'), TURN_OF_THE_PLUG)


class Turns:
    """The calls under way, and which of them has which VM. A VM is known by its uuid, here its `key`.

    patience        seconds that a call waits for another one's end
    check_begins    called for a call that waits for one that hasn't begun; raises where neither will
    """

    def __init__(self, patience: float, check_begins: Callable[[Call], None]) -> None:
        self._patience = patience
        self._check_begins = check_begins
        # Guards all that is below; a condition, so that who waits for a VM wakes up. Held for moments.
        self._free = threading.Condition()
        self._under_way = collections.OrderedDict()  # type: Dict[str, Call]     # by key
        self._calls = []  # type: List[Call]
        self._plugs = []  # type: List[str]         # keys of VMs whose plug is just being pulled
        self._closing = False

    def calls(self) -> List[Call]:
        """Those under way."""
        with self._free:
            return list(self._calls)

    def close(self) -> None:
        """Nobody waits any longer."""
        self._closing = True

    @contextlib.contextmanager
    def of(self, call: Call, key: str) -> Iterator[None]:
        """For so long nobody else changes this VM, where the call changes it; and `others` of the call are
        the changes that were under way. Raises Busy where another one's end takes too long."""
        deadline = call.asked + TURNS.get(call.verb, self._patience)
        with self._free:
            while kind_of(call.verb) == 'changing' and self._in_the_way(call, key):
                if time.monotonic() > deadline or self._closing:
                    other = self._in_the_way(call, key)
                    raise Busy('%s is busy: %s is under way' % (call.vm or 'the hypervisor', other))
                if key in self._under_way and not self._under_way[key].begun:
                    self._check_begins(call)
                self._free.wait(0.5)
            call.others = [[each.verb, each.vm] for each in self._calls if kind_of(each.verb) == 'changing']
            self._calls.append(call)
            if kind_of(call.verb) == 'changing':
                self._under_way[key] = call
        try:
            yield
        finally:
            with self._free:
                self._calls.remove(call)
                if self._under_way.get(key) is call:
                    del self._under_way[key]
                self._free.notify_all()

    def _in_the_way(self, call: Call, key: str) -> str:
        """The verb for which this call has to wait, '' for none."""
        if key in self._under_way:
            return spoken(self._under_way[key].verb)
        if key in self._plugs and call.verb not in TURNS:       # between two steps of that
            return spoken('power_off')
        cleans = any(each.verb == 'cleanup' for each in self._calls)
        return 'cleanup' if call.verb == 'create_vm' and cleans else ''

    @contextlib.contextmanager
    def pulling(self, key: str) -> Iterator[None]:
        """For so long whatever else is to change this VM waits, and then finds it off."""
        with self._free:
            self._plugs.append(key)
        try:
            yield
        finally:
            with self._free:
                self._plugs.remove(key)
                self._free.notify_all()

    def give_up(self, key: str, silence: float) -> bool:
        """Ends the change of this VM that is under way, where it hangs, by its silence for so many seconds.
        Waits until that is known; True where the VM's process is to be ended, then; False where nothing was
        under way, had begun, or it does something."""
        until = time.monotonic() + silence + 5     # it may be about to be sent just now
        with self._free:
            while key in self._under_way and time.monotonic() < until:
                other = self._under_way[key]
                if other.sent_to is not None and time.monotonic() - other.heard > silence:
                    log.warning('%s hangs in %s, which is given up', other.vm, other.verb)
                    other.given_up = True
                    other.sent_to.kill()
                    return other.begun
                self._free.wait(0.5)
        return False
