"""The status page: who may see it without the token, and what it reads.

What it is not: HTTP (hostserver.py), or the API's reference (hostreference.py). It shows, and never acts.
Threads: any thread may ask. Locks: Visits._lock guards its tables; StatusPage._looking lets one thread at a
time look at the host, while others wait for what it sees.
"""

import base64
import collections
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import agent
from hostapi import Api
from hostguests import Guest
from hostjournal import Execution
from rpc import finite

log = logging.getLogger('vmhost')

LINK_LIFE = 120.0              # seconds in which a link opens the status page
VISIT_LIFE = 12 * 3600.0       # seconds without a request, after which a visit ends
VISITS_KEPT = 100
SAVE_EVERY = 600.0             # seconds in which how long visits last may be forgotten by a crash
VISITS = 'status-visits'       # the file that keeps them
LOOK_LIFE = 1.0                # seconds that one look at everything serves all pages
ASK_EVERY = 2.0                # seconds between two questions to a guest about a command
ASKED_AT_ONCE = 50
MACHINES_SHOWN = 500
COMMANDS_SHOWN = 100
ENDED_SHOWN = 60               # a command on 30 machines is 30 of them
TEXT_SHOWN = 300               # characters of an event's text: a command may have a megabyte of them
OUTPUT_SHOWN = 64 * 1024       # bytes of output at once
WORDS_SHOWN = 1000             # arguments of a command
UNTOLD = {'stdin', 'stdin64'}  # options that may hold secrets
VISIT = b'<meta name="visit" content="%s">'    # in the page: what it shows with each question


def read_beside(name: str) -> bytes:
    """A file that lies beside this one, in a folder or in a bundle."""
    folder = os.path.dirname(__file__)
    return __loader__.get_data(os.path.join(folder, name))     # type: ignore[name-defined]


PAGE_HEADERS = {'Cross-Origin-Resource-Policy': 'same-origin'}


def page_headers(page: str) -> Dict[str, str]:
    """What a browser is told: nothing but what stands in this page is run, shown or fetched."""
    allowed = {}
    for tag in ('style', 'script'):
        parts = re.findall('<%s>(.*?)</%s>' % (tag, tag), page, re.S)
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        allowed[tag] = ' '.join("'sha256-%s'" % digest for digest in digests) or "'none'"
    return {'Content-Security-Policy':
            "default-src 'none'; style-src %(style)s; script-src %(script)s; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'" % allowed,
            'Referrer-Policy': 'no-referrer', 'Cross-Origin-Opener-Policy': 'same-origin', **PAGE_HEADERS}


class Visits:
    """Who may see the status page without the token: a browser that came by a link. Any thread.

    A link holds a key, that is good once and for two minutes; it is exchanged for a secret that the page
    holds in memory and shows with each question, so that nothing that lasts stands in an address, and no
    browser hands it to another port of this machine, as it would a cookie. It opens the status page alone.
    Visits outlive the host agent: a file has their secrets' digests, by which nobody can show one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, kept: str = '',
                 keep: Callable[[str], None] = lambda text: None) -> None:
        """kept: what another run gave to ``keep``, which brings it to a file, and may raise OSError."""
        self._clock = clock
        self._keep = keep
        # Guards both tables: key or secret's digest -> when it ends. The file is written while it is held.
        self._lock = threading.Lock()
        self._keys = collections.OrderedDict()     # type: Dict[str, float]
        self._visits = collections.OrderedDict(read_visits(kept, clock()))   # type: Dict[str, float]
        self._saved = clock()

    def new_key(self) -> str:
        """A key for one link."""
        return self._add(self._keys, LINK_LIFE)

    def enter(self, key: str) -> str:
        """A visit's secret for a key; '' where the key is unknown, used or too old."""
        with self._lock:
            ends = self._keys.pop(key, 0.0)
        return self._add(self._visits, VISIT_LIFE) if ends > self._clock() else ''

    def is_known(self, secret: str) -> bool:
        """Whether that visit goes on; each time it is asked for, it is prolonged."""
        with self._lock:
            ends = self._visits.pop(digest_of(secret), 0.0)
            if ends <= self._clock():
                return False
            self._visits[digest_of(secret)] = self._clock() + VISIT_LIFE
            if self._clock() - self._saved > SAVE_EVERY:
                self._save()
            return True

    def _add(self, table: Any, life: float) -> str:
        secret = secrets.token_urlsafe(24)
        with self._lock:
            table[secret if table is self._keys else digest_of(secret)] = self._clock() + life
            while len(table) > VISITS_KEPT:
                table.popitem(last=False)      # the oldest, or the one not used for longest
            if table is self._visits:
                self._save()
        return secret

    def _save(self) -> None:
        """With the lock held."""
        self._saved = self._clock()
        offset = time.time() - self._clock()
        try:
            self._keep(json.dumps({digest: ends + offset for digest, ends in self._visits.items()}))
        except OSError as error:
            log.warning('visits of the status page are not kept: %s', error)


def visits_in(folder: Any) -> Visits:
    """Those of a state folder, which keeps them. Raises OSError."""
    return Visits(kept=folder.secret(VISITS, lambda: '{}'), keep=lambda text: folder.write(VISITS, text))


def digest_of(secret: str) -> str:
    """What is remembered of a visit's secret."""
    return hashlib.sha256(secret.encode('utf-8', 'replace')).hexdigest()


def read_visits(kept: str, now: float) -> List[Tuple[str, float]]:
    """The visits of another run that go on, with their ends by this one's clock."""
    try:
        offset = now - time.time()
        found = [(str(digest), min(float(ends) + offset, now + VISIT_LIFE))
                 for digest, ends in json.loads(kept or '{}').items()]
    except (ValueError, TypeError, AttributeError) as error:
        log.warning('the visits of the status page that were kept can\'t be read: %s', error)
        return []
    return [(digest, ends) for digest, ends in found if ends > now]


class StatusPage:
    """The status page, and what it reads. It shows, and never acts. Any thread may ask.

    ``/status`` is the page; ``/status/snapshot?since=TIME`` all that goes on now, with loads since
    that time; ``/status/command?id=ID`` what is to be known of one; ``/status/events?after=NUMBER&
    timeout=SECONDS`` and ``/status/output?id=ID&stream=STREAM&offset=BYTES`` (no offset: the end of it) are
    getEvents and getCmdOutput.
    """

    def __init__(self, host: Any, api: Api, visits: Optional[Visits] = None) -> None:
        self._host = host
        self._api = api.methods
        self._visits = visits or Visits()
        self._page = read_beside('status.html')
        self.headers = page_headers(self._page.decode('utf-8'))
        # Guards the last look, and lets one thread at a time look: other pages wait for what it saw.
        self._looking = threading.Lock()
        self._looked = -1e9
        self._seen = {}                # type: Dict[str, Any]

    def link(self, url: str) -> str:
        """The address of the page with a key that opens it once."""
        return '%sstatus?key=%s' % (url, self._visits.new_key())

    def enter(self, query: Dict[str, str]) -> str:
        """A new visit, for the key of a link; else ''."""
        return self._visits.enter(query.get('key', ''))

    def page(self, visit: str) -> bytes:
        """The page, with the secret of its visit; '' where the browser itself has the token."""
        return self._page.replace(VISIT % b'', VISIT % visit.encode('ascii'), 1)

    def is_visitor(self, secret: str) -> bool:
        """Whether it is the secret of a visit that goes on."""
        return self._visits.is_known(secret)

    def read(self, what: str, query: Dict[str, str]) -> Dict[str, Any]:
        """The answer to one of the page's questions. Raises VMHostError, ValueError, KeyError."""
        if what == 'snapshot':
            return self._snapshot(float(query.get('since', 0)))
        if what == 'events':
            return self._events(int(query.get('after', 0)), float(query.get('timeout', 0)))
        if what == 'command':
            return self._command(query['id'])
        if what == 'output':
            return self._output(query['id'], query.get('stream', 'out'), query.get('offset', ''))
        raise KeyError(what)

    def _events(self, after: int, timeout: float) -> Dict[str, Any]:
        found = self._api['getEvents'](after, timeout)
        return {'last': found['last'], 'events': [dict(event, text=event['text'][:TEXT_SHOWN])
                                                  for event in found['events']]}

    def _output(self, id: str, stream: str, offset: str) -> Dict[str, Any]:
        execution = self._host.commands.find_one(id)
        if not offset:
            self._host.control.refresh([execution])
        status = self._host.control.status(execution)
        size = status['errSize' if stream == 'err' else 'outSize']
        begin = int(offset) if offset else max(0, int(finite(size)) - OUTPUT_SHOWN)
        found = self._api['getCmdOutput'](id, stream, begin, OUTPUT_SHOWN)
        return dict(found, data=base64.b64encode(found['data'].data).decode('ascii'),
                    state=status['state'])

    def _command(self, id: str) -> Dict[str, Any]:
        """One command: what was asked for, but for the values of variables and its input, and how it is."""
        execution = self._host.commands.find_one(id)
        self._host.control.refresh([execution])
        asked = self._api['getCmdDetails'](id)
        told = execution.answer() if execution.ended else {}
        status = self._host.control.status(execution)
        options = {name: value for name, value in asked['options'].items() if name not in UNTOLD}
        words = [str(word)[:OUTPUT_SHOWN] for word in [asked['cmd']] + asked['args'][:WORDS_SHOWN]]
        return dict(self._of_command(execution), words=words, path=str(asked['path']),
                    variables=sorted(asked['env']), options=options, client=asked['client'],
                    hasInput=not UNTOLD.isdisjoint(asked['options']), submitted=asked['submitted'],
                    started=finite(told.get('started')), pid=finite(status['pid']), by=told.get('by', ''),
                    error=str(status['error'])[:OUTPUT_SHOWN], resources=status['resources'],
                    truncated=[stream for stream in ('out', 'err') if told.get(stream + '-truncated')])

    def _snapshot(self, since: float) -> Dict[str, Any]:
        with self._looking:
            if time.monotonic() - self._looked > LOOK_LIFE:
                self._seen = self._look()
                self._looked = time.monotonic()
            seen = self._seen
        return dict(seen, vms=[dict(vm, loads=[load for load in vm['loads'] if load[0] > since])
                               for vm in seen['vms']])

    def _look(self) -> Dict[str, Any]:
        now = time.time()
        commands, unfinished = self._commands()
        vms = self._vms()
        return {'time': now, 'agent': self._api['agentInfo'](), 'host': socket.gethostname(),
                'vms': vms[:MACHINES_SHOWN], 'vmsInAll': len(vms), 'commands': commands,
                'transfers': self._transfers(),
                'unfinished': unfinished, 'lastEvent': self._host.journal.last_event}

    def _transfers(self) -> List[Dict[str, Any]]:
        """Those under way, the oldest first, then those that ended last."""
        known = self._host.transfers.list()
        under_way = [transfer for transfer in known if transfer['state'] in ('waiting', 'running')]
        ended = [transfer for transfer in known if transfer not in under_way]
        return under_way + ended[:-ENDED_SHOWN - 1:-1]

    def _vms(self) -> List[Dict[str, Any]]:
        """All VMs, and all agents: those that are there before those that were."""
        rows = [self._of_guest(guest) for guest in self._host.guests.all()]
        if self._host.machines.hypervisor is not None:
            known = {row['id'] for row in rows}
            rows += [self._of_vm(row['name'], row['native'], row['id'])
                     for row in self._host.machines.hypervisor.known_vms()
                     if row['id'] not in known or not row['id']]
        return sorted(rows, key=lambda row: (row['agent'] == 'lost', agent.in_order(row['name']), row['id']))

    def _of_guest(self, guest: Guest) -> Dict[str, Any]:
        loads = [[load['time'], finite(load.get('load1')), finite(load.get('mem_free')),
                  finite(load.get('disk_free'))]
                 for load in self._host.guests.loads_of(guest)]
        state = 'Null' if guest.agent == 'lost' else 'Running'
        if self._host.machines.hypervisor is not None:
            state = self._host.machines.hypervisor.known_native(guest.id) or state
        return {'id': guest.id, 'name': guest.name, 'state': state, 'agent': guest.agent,
                'left': guest.has_left, 'ip': guest.ip, 'lastSeen': guest.last_seen,
                'os': str(guest.facts.get('os', '')),
                'cpus': finite(guest.facts.get('cpus')),
                'mem': finite(guest.facts.get('mem')), 'loads': loads}

    def _of_vm(self, name: str, state: str, id: str) -> Dict[str, Any]:
        """A VM of which no agent was ever heard."""
        return {'id': id, 'name': name, 'state': state, 'agent': 'never', 'left': False, 'ip': '',
                'lastSeen': 0, 'os': '', 'cpus': 0, 'mem': 0, 'loads': []}

    def _commands(self) -> Tuple[List[Dict[str, Any]], int]:
        """The unfinished commands, the oldest first, then those that ended last; how many are unfinished."""
        running = self._host.commands.list({'finished': False, 'limit': COMMANDS_SHOWN})
        now = time.monotonic()
        stale = [execution for execution in running if now - execution.status_time > ASK_EVERY]
        stale.sort(key=lambda execution: execution.status_time)
        self._host.control.query_running(stale[:ASKED_AT_ONCE])
        ended = sorted(self._host.commands.last_ended(ENDED_SHOWN), key=lambda one: -one.ended)
        return [self._of_command(execution) for execution in running + ended], self._host.commands.count()

    def _of_command(self, execution: Execution) -> Dict[str, Any]:
        status = self._host.control.status(execution)
        usage = status['resources'] if isinstance(status['resources'], dict) else {}
        shown = {name: finite(status[name])
                 for name in ('wall', 'processes', 'outSize', 'errSize', 'age')}    # type: Dict[str, Any]
        return dict(shown, cmdId=execution.key, vm=execution.vm, cmd=execution.cmd[:TEXT_SHOWN],
                    line=(execution.line or execution.cmd)[:TEXT_SHOWN],
                    state=status['state'], ended=status['ended'],
                    progress=str(status['progress'])[:TEXT_SHOWN],
                    end=status['end'][:TEXT_SHOWN],
                    cpu=finite(usage.get('ru_utime')) + finite(usage.get('ru_stime')),
                    rss=finite(usage.get('ru_maxrss')) * 1024)
