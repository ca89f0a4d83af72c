"""Whether each VM's own process answers: VMs that run are asked, now and then, and where somebody lists them.

What it is not: what is seen of VMs (hostseen.py), which it tells; or who asks (hosthypervisor.py): that is
done where it can be given up, so that a VM that hangs holds up nobody.

Threads: `vm-pulse`, from `start` to `stop`.
"""

import logging
import threading
import time
from typing import Any, Callable, Dict, List, Optional

from driverprocesses import Unresponsive
from faults import BadState, NoSuchVM, NotSupported, VMHostError
from vmstates import PAUSED, RUNNING

log = logging.getLogger('vmhost.hypervisor')

ASK_EVERY = 15.0               # seconds between two questions to a VM where nobody lists VMs
ASK_AGAIN = 3.0                # seconds between two where somebody does


class Pulse:
    """Asks all VMs that run, one after the other.

    ask     asks the VM of this uuid; raises Unresponsive where its process doesn't answer, NotSupported where
            the driver finds that out by itself
    rows    gives what was seen of all VMs
    tell    is told (uuid, does it hang?)
    """

    def __init__(self, ask: Callable[[str], Any], rows: Callable[[], Optional[List[Dict[str, Any]]]],
                 tell: Callable[[str, bool], None]) -> None:
        self._ask = ask
        self._rows = rows
        self._tell = tell
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

    def _run(self) -> None:
        while not self._closing.wait(ASK_AGAIN):
            self._wanted.wait(ASK_EVERY - ASK_AGAIN)
            self._wanted.clear()
            try:
                for row in self._rows() or ():
                    if row['state'] in (RUNNING, PAUSED) and not self._closing.is_set():
                        self._ask_one(row['uuid'])
            except NotSupported as error:
                log.debug('VMs are asked by nobody else than the driver: %s', error)
                return
            except Exception:
                log.exception('VMs could not be asked whether they answer')

    def _ask_one(self, uuid: str) -> None:
        begun = time.monotonic()
        try:
            self._ask(uuid)
        except Unresponsive as error:
            log.debug('%s hangs: %s', uuid, error)
            self._tell(uuid, True)
        except (NoSuchVM, BadState):
            self._tell(uuid, False)
        except NotSupported:
            raise
        except VMHostError as error:                # of the hypervisor's, which says nothing of the VM
            log.debug('%s was asked in vain for %.1f s: %s', uuid, time.monotonic() - begun, error)
        else:
            self._tell(uuid, False)
