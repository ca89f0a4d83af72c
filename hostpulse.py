"""Whether each VM's own process answers: VMs that run are asked, now and then, where somebody lists them, or
wants something of one that didn't; and whether the driver's process does that looks at them.

What it is not: what is seen of VMs (hostseen.py), which it tells; or who asks (hosthypervisor.py): that is
done where it can be given up, so that a VM that hangs holds up nobody.

Threads: `vm-pulse`, from `start` to `stop`.
"""

import contextlib
import logging
import threading
import time
from typing import Any, Callable, Dict, List, Optional

from driverprocesses import Unresponsive
from faults import BadState, NoSuchVM, NotSupported, VMHostError
from hypervisor import ANSWERS_IN
from vmstates import PAUSED, RUNNING

log = logging.getLogger('vmhost.hypervisor')

ASK_EVERY = 15.0               # seconds between two questions to a VM where nobody lists VMs
ASK_AGAIN = 3.0                # seconds between two where somebody does
ASKED_AGAIN = 5.0              # seconds that one which did not answer has then where somebody wants something


class Pulse:
    """Asks all VMs that run, one after the other.

    ask     asks the VM of this uuid; raises Unresponsive where its process doesn't answer for so many
            seconds, NotSupported where the driver finds that out by itself
    rows    gives what was seen of all VMs
    tell    is told (uuid, does it hang?)
    look    asks the driver's process that looks: one that hangs is found, though nobody else asks
    """

    def __init__(self, ask: Callable[[str, float], Any], rows: Callable[[], Optional[List[Dict[str, Any]]]],
                 tell: Callable[[str, bool], None], look: Callable[[], Any]) -> None:
        self._ask = ask
        self._look = look
        self._rows = rows
        self._tell = tell
        self._driver_asks = False
        self._wanted = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name='vm-pulse', daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Asks no more; what is just asked is the caller's to end."""
        self._closing.set()
        self._wanted.set()

    def want(self) -> None:
        """Somebody lists VMs. From any thread."""
        self._wanted.set()

    def still_hangs(self, uuid: str) -> bool:
        """Whether a VM that is told to hang is asked in vain once more, which takes ASKED_AGAIN: one that
        only was slow answers, and is told to. False where the driver finds out by itself. From any thread."""
        try:
            return not self._driver_asks and self._hangs(uuid, ASKED_AGAIN)
        except NotSupported:
            self._driver_asks = True
            return False

    def _run(self) -> None:
        """Until it is stopped, or the driver is one that finds out by itself what hangs."""
        while not self._closing.wait(ASK_AGAIN):
            self._wanted.wait(ASK_EVERY - ASK_AGAIN)
            self._wanted.clear()
            try:
                with contextlib.suppress(VMHostError):
                    self._look()
                for row in self._rows() or ():
                    if row['state'] in (RUNNING, PAUSED) and not self._closing.is_set():
                        self._hangs(row['uuid'], ANSWERS_IN)
            except NotSupported as error:
                log.debug('VMs are asked by nobody else than the driver: %s', error)
                self._driver_asks = True
                return
            except Exception:
                log.exception('VMs could not be asked whether they answer')

    def _hangs(self, uuid: str, patience: float) -> bool:
        """Asks it, and tells whether it hangs, where that can be known."""
        begun = time.monotonic()
        try:
            self._ask(uuid, patience)
        except Unresponsive as error:
            log.debug('%s hangs: %s', uuid, error)
            self._tell(uuid, True)
            return True
        except (NoSuchVM, BadState):
            self._tell(uuid, False)
        except NotSupported:
            raise
        except VMHostError as error:                # of the hypervisor's, which says nothing of the VM
            log.debug('%s was asked in vain for %.1f s: %s', uuid, time.monotonic() - begun, error)
        else:
            self._tell(uuid, False)
        return False
