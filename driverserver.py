"""What runs in a driver's process: it carries out requests by the driver's verbs, and watches the VMs.

Its other end, in the host's process, is driverprocesses.py; between them go JSON objects, a line each.

What it is not: a driver, which it is given. It knows no hypervisor.

Threads: the main one has the driver, all of it; `requests` reads what the host asks.
"""

import gc
import json
import logging
import os
import queue
import select
import signal
import threading
import time
from typing import Any, Callable, Dict, List, Optional  # noqa: F401

from faults import InvalidParams, VMHostError
from hypervisor import ALONE, NOT_READY, ConnectionLost, Driver, Job, NotReady, kind_of, row_of

log = logging.getLogger('vmhost.hypervisor')

LOOK_EVERY = 1.0               # seconds between two looks where no news come, and something has just happened
LOOK_AT_LEAST = 20.0           # seconds after which is looked in any case
NEWS_EVERY = 0.25              # seconds between two questions for news
ALIVE_EVERY = 0.2              # seconds between two signs of life of a process that looks at many VMs
REST_EVERY = 0.1               # seconds after which it looks whether something else is asked
NESTED = 3                     # questions at most that are answered within each other


class Server:
    """Carries out requests, one after the other; the watcher's looks at all VMs as well. In the driver's
    process."""

    def __init__(self, driver: Driver, inbox: queue.Queue, tell: Callable[[Dict[str, Any]], None],
                 watches: bool) -> None:
        self._driver = driver
        self._inbox = inbox                        # messages; None: the host hung up
        self._tell = tell
        self._watches = watches
        self._waiting = []  # type: List[Dict[str, Any]]
        self._seen = None  # type: Any
        self._described = {}  # type: Dict[str, Dict[str, Any]]     # by uuid: since a look at all began
        self._is_doubtful = False                  # whether that look may have seen one of them later
        self._next_news = 0.0
        self._next_look = 0.0                      # when to look without news
        self._pause = LOOK_EVERY
        self._nested = 0
        self._alive_at = self._rested_at = 0.0
        if watches:
            driver.rest = self._rest

    def run(self) -> None:
        """Until the host hangs up. Raises ConnectionLost when the hypervisor is gone."""
        try:
            while self._take_messages():
                if self._waiting:
                    self._serve(self._waiting.pop(0))
                if self._watches and time.monotonic() >= self._next_news:
                    self._watch()
                if not gc.isenabled():             # by a driver whose objects may end on this thread alone
                    gc.collect()
        finally:
            self._driver.disconnect()

    def _rest(self, moved: bool) -> None:
        """Within something long: a sign of life, and answers for who asks for something else than all VMs."""
        now = time.monotonic()
        if moved and now - self._alive_at > ALIVE_EVERY:
            self._alive_at = now
            self._tell({'alive': True})
        if now - self._rested_at < REST_EVERY or self._nested >= NESTED:
            return
        self._rested_at = now
        if not self._take_messages(0.001):
            self._inbox.put(None)                   # for who is at it
        asked = [each for each in self._waiting if kind_of(each['verb']) == 'quick'
                 and each['verb'] != 'machines' and now >= each.get('due', 0)]
        self._nested += 1
        try:
            while asked:
                self._waiting.remove(asked[0])
                self._serve(asked[0])
                asked = [each for each in asked[1:] if each in self._waiting]
        finally:
            self._nested -= 1

    def _take_messages(self, wait: Optional[float] = None) -> bool:
        if wait is None and self._watches:
            wait = max(0.001, self._next_news - time.monotonic())
        try:
            message = self._inbox.get(timeout=0.001 if self._waiting else wait)
            while message is not None:
                self._waiting.append(message)
                message = self._inbox.get_nowait()
            return False
        except queue.Empty:
            return True

    def _serve(self, message: Dict[str, Any]) -> None:
        """Answers a request; and all that wait for the same, where it only looks: a crowd costs as much as
        one. Not those that come meanwhile: what they ask for may have changed since it was looked at."""
        if time.monotonic() < message.get('due', 0):
            self._waiting.append(message)
            return
        job = Job(message, self._driver.settings['command_timeout'], self._tell)
        crowd = [each for each in self._waiting if kind_of(job.verb) == 'quick'
                 and (each['verb'], each['args']) == (job.verb, job.args)]
        answer = self._answer(job, message)
        if answer is None:                          # not ready: looked at again in a moment
            message['due'] = time.monotonic() + 0.05
            message.setdefault('until', time.monotonic() + NOT_READY)
            self._waiting.append(message)
            return
        crowd = [each for each in crowd if each in self._waiting]       # who has no answer yet
        for each in [message] + crowd:
            self._tell(dict(answer, id=each['id']))
        self._waiting = [each for each in self._waiting if each not in crowd]

    def _answer(self, job: Job, message: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        try:
            return {'value': self._carry_out(job)}
        except VMHostError as error:
            return {'error': [type(error).__name__, str(error)]}
        except ConnectionLost:
            raise
        except Exception as error:
            if self._driver.is_lost(error):
                raise ConnectionLost('the hypervisor died meanwhile')
            fault = self._driver.translate(error)
            if isinstance(fault, NotReady) and kind_of(job.verb) != 'changing' \
                    and time.monotonic() < message.get('until', float('inf')):
                return None
            kind = 'Busy' if isinstance(fault, NotReady) else type(fault).__name__
            return {'error': [kind, str(fault)]}

    def _carry_out(self, job: Job) -> Any:
        if not kind_of(job.verb):
            raise InvalidParams('no verb %s' % job.verb)
        if job.verb not in ALONE:
            self._driver.connect()
        if kind_of(job.verb) in ('changing', 'looking'):
            if job.verb not in ALONE:               # it answers now: nothing has begun where it doesn't
                self._driver.find_verb('version')(job)
            self._tell({'id': job.id, 'begun': True})
        if job.verb == 'machines':
            return self._machines(job)
        found = self._driver.find_verb(job.verb)(job, *job.args)
        if job.verb in ('describe', 'describe_changed'):
            self._described[found['uuid']] = found
        return found

    def _machines(self, job: Job) -> List[Dict[str, Any]]:
        """All VMs. Of one that somebody asked for meanwhile, what he was told, which may be newer."""
        self._described.clear()
        rows = self._driver.find_verb('machines')(job)
        told = {uuid: row_of(found) for uuid, found in self._described.items()}
        newer = [told.pop(row['uuid'], row) for row in rows]
        self._is_doubtful = newer != rows
        return newer + list(told.values())

    # Watching.

    def _watch(self) -> None:
        now = time.monotonic()
        self._next_news = now + NEWS_EVERY
        try:
            self._driver.connect()
            news = self._driver.has_news()
            if news or self._is_doubtful or now >= self._next_look:
                changed = self._look()
                quiet = news is not None or not changed
                self._pause = min(self._pause * 1.5, LOOK_AT_LEAST) if quiet else LOOK_EVERY
                self._next_look = time.monotonic() + (LOOK_AT_LEAST if news is not None else self._pause)
        except (ConnectionLost, VMHostError):
            if self._seen is not None:
                raise ConnectionLost('the hypervisor is gone')
            self._next_news = now + 5               # it isn't there: whoever calls is told why
        except Exception as error:
            if self._driver.is_lost(error):
                raise ConnectionLost('the hypervisor died')
            log.debug('looking at the VMs: %s', error)
            self._next_look = now + LOOK_EVERY      # a VM that went meanwhile: looked at again

    def _look(self) -> bool:
        """Tells all VMs where they differ from what was told last. Whether they do."""
        rows = self._machines(Job({'verb': 'machines'}, 0, self._tell))
        changed = bool(rows != self._seen)
        if changed:
            self._seen = rows
            self._tell({'seen': rows})
        return changed


def run_driver(make: Callable[[Dict[str, Any]], Driver]) -> None:
    """Main of a driver's process: requests on stdin, answers on stdout, a JSON object a line.

    The first line holds the settings. A hypervisor starts processes that inherit descriptors 0 to 2 and
    outlive us, and its library prints: so both ends of the conversation are moved out of their way.
    """
    for name in ('SIGINT', 'SIGBREAK'):             # Ctrl-C, and Windows' Ctrl-Break, are for the host agent
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    requests, answers = os.fdopen(os.dup(0), 'rb'), os.fdopen(os.dup(1), 'wb')
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    inbox = queue.Queue()  # type: queue.Queue
    setup = json.loads(requests.readline().decode())

    def read() -> None:
        for line in requests:
            inbox.put(json.loads(line.decode()))
        inbox.put(None)
        leave_with_reader(answers.fileno())

    def tell(message: Dict[str, Any]) -> None:
        try:
            answers.write(json.dumps(message).encode() + b'\n')
            answers.flush()
        except OSError:                 # the host died: its successor finds what is half made, and decides
            os._exit(1)

    threading.Thread(target=read, name='requests', daemon=True).start()
    code = 0
    try:
        Server(make(setup['settings']), inbox, tell, setup['watches']).run()
    except ConnectionLost as error:
        tell({'lost': str(error)})
        code = 3
    os._exit(code)                      # a hypervisor's library may take half a minute to end


def leave_with_reader(pipe: int) -> None:
    """Ends this process once nobody can read that pipe any more: the host agent was killed, and what is being
    done is its successor's. Who only hangs up reads to the end. Without poll the next word ends it."""
    if hasattr(select, 'poll'):
        poll = select.poll()
        poll.register(pipe, 0)
        poll.poll()
        os._exit(1)
