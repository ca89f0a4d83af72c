"""bench/million.py, scaled down: the journal's calls stay fast, and memory stays flat."""

import os
import sys

import pytest
from faultrig import Agent, Host

sys.path.append(os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))),
                             'bench'))
import million  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.once,
              pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='needs Linux\'s /proc')]


def test_calls_are_as_fast_with_many_rows_as_with_some(tmp_path):
    """No call reads through the journal: with ten times the rows the host works no more. (How long they take:
    the bench.)"""
    took = []
    for rows in (3000, 30000):
        host = Host(tmp_path / str(rows))
        os.makedirs(host.state)
        last = million.fill(os.path.join(host.state, 'journal.sqlite'), rows)
        with host, host.api as api:
            took.append({name: work_of(host, call, api, last) for name, call in million.CALLS.items()})
    few, many = took
    assert all(many[name] < 2 * few[name] + 0.3 for name in few), (few, many)


def work_of(host, call, *args):
    """The seconds of a processor that a host spends on fifteen such calls."""
    before = processor_time(host.process.pid)
    for _ in range(15):
        call(*args)
    return processor_time(host.process.pid) - before


def processor_time(pid):
    with open('/proc/%d/stat' % pid) as file:
        fields = file.read().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def hasty(kind, **constants):
    """Makes agents that look every moment for what they may let go."""
    def make(*args, **kwargs):
        agent = kind(*args, **kwargs)
        agent.faults = {'set': constants}
        return agent
    return make


def test_memory_stays_flat_and_the_disk_bounded(tmp_path):
    steps = list(million.many(
        str(tmp_path), 800, 4, '0.5', hasty(Host, HOUSEKEEPING_EVERY=0.2, RETENTION_PAUSE=0.2),
        hasty(Agent, HOUSEKEEPING_EVERY=0.2)))
    assert [step.commands for step in steps] == [200, 400, 600, 800]
    half, end = steps[1], steps[-1]
    assert end.host_memory - half.host_memory < 5 and end.guest_memory - half.guest_memory < 5, steps
    # The last second's commands are there, each with 8 entries; if none were let go, it would be 800.
    assert end.journalled < 400 and end.entries < 3200 and end.disk < half.disk + 4, steps
