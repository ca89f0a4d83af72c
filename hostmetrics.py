"""What the host agent counts, as Prometheus reads it: ``GET /metrics``, with the token as a bearer.

What it is not: a counter of anything; it asks those who count. No threads, no state.
"""

import collections
import time
from typing import Any, Dict, Iterable, List, Tuple

import agent
from rpc import finite

CONTENT_TYPE = 'text/plain; version=0.0.4; charset=utf-8'
MOST = 1000000                 # unfinished commands that are counted
# What the embedded broker counts; of NOW what it has, of the others what came since its start.
COUNTED = {
    'connections_total': 'connections', 'connections': 'connections that are open',
    'frames_in': 'frames heard', 'frames_out': 'frames said',
    'bytes_in': 'bytes heard', 'bytes_out': 'bytes said',
    'held_bytes': 'bytes of unfinished frames, transactions and subscriptions',
    'held_up': 'times that a sender had to wait for the host agent',
    'slowed': 'times that a client was over its rate', 'cut_off': 'clients that did not read',
    'refused': 'connections and frames refused by login, limit or policy', 'errors': 'ERROR frames',
    'destinations': 'destinations', 'dropped': 'messages dropped', 'expired': 'messages that expired',
    'queued_bytes': 'bytes in queues', 'waiting_bytes': 'bytes that clients have not read'}
NOW = ('connections', 'destinations', 'held_bytes', 'queued_bytes', 'waiting_bytes')
Sample = Tuple[Dict[str, str], Any]        # labels, value


def metrics(host: Any) -> str:
    """All of it, in Prometheus's text format. From any thread. Raises JournalError."""
    now = time.monotonic()
    ends = host.journal.ends()
    lines = describe('info', 'gauge', 'Version of the host agent.', [({'version': agent.VERSION}, 1)])
    lines += describe('uptime_seconds', 'gauge', 'Seconds since the host agent started.',
                      [({}, now - host.started)])
    guests = sorted(host.guests.all(), key=lambda guest: agent.in_order(guest.name))
    lines += describe('agent_up', 'gauge', 'Whether the agent of a machine is there, alive or late.',
                      [({'vm': guest.name}, guest.agent != 'lost') for guest in guests])
    agents = by_label('state', ('left' if guest.agent == 'lost' and guest.has_left else guest.agent
                                for guest in guests), ('alive', 'late', 'left', 'lost'))
    lines += describe('agents', 'gauge', 'Guest agents ever seen, by their liveness.', agents)
    unfinished = host.commands.list({'finished': False, 'limit': MOST})
    states = by_label('state', map(host.control.shown_state, unfinished), ('queued', 'sent', 'running'))
    lines += describe('commands_unfinished', 'gauge', 'Commands that have not ended, by state.', states)
    lines += describe('commands_kept', 'gauge', 'Ended commands in the journal, by how they ended.',
                      [({'state': state}, count) for state, count, _ in ends])
    lines += describe('command_seconds', 'gauge', 'Seconds from submission to end of those, summed up.',
                      [({'state': state}, seconds) for state, _, seconds in ends])
    transfers = by_label('state', (one['state'] for one in host.transfers.list()), ('running', 'failed'))
    lines += describe('transfers', 'gauge', 'File transfers, by state.', transfers)
    lines += describe('unknown_words_total', 'counter', 'Messages from guests that were no words.',
                      [({}, host.words.unknown)])
    broker = host.connection.info()
    lines += describe('broker_connected', 'gauge', 'Whether the broker answers.', [({}, broker['connected'])])
    for name, value in sorted(broker.get('counters', {}).items()):
        kind = 'gauge' if name in NOW else 'counter'
        help = 'Of the embedded broker: %s.' % COUNTED[name]
        lines += describe('broker_' + name, kind, help, [({}, value)])
    return '\n'.join(lines) + '\n'


def by_label(label: str, found: Iterable[str], at_least: Iterable[str]) -> List[Sample]:
    """How often each value occurs; those that are always told, also where there is none."""
    counts = collections.Counter(found)
    return [({label: value}, counts[value]) for value in sorted(set(counts).union(at_least))]


def describe(name: str, kind: str, help: str, samples: Iterable[Sample]) -> List[str]:
    """The lines of one metric."""
    lines = ['# HELP vmhost_%s %s' % (name, help), '# TYPE vmhost_%s %s' % (name, kind)]
    for labels, value in samples:
        shown = ','.join('%s="%s"' % (label, escaped(text)) for label, text in labels.items())
        lines.append('vmhost_%s%s %s' % (name, '{%s}' % shown if shown else '', finite(value + 0)))
    return lines


def escaped(text: str) -> str:
    """A label's value."""
    return text.replace('\\', '\\\\').replace('"', '\\"').replace('\n', '\\n')
