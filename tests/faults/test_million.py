"""bench/million.py, scaled down: the journal's calls stay fast, and memory stays flat."""

import os
import sys

import pytest
from faultrig import Host

sys.path.append(os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))),
                             'bench'))
import million  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.once,
              pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='needs Linux\'s /proc')]


def test_calls_are_as_fast_with_many_rows_as_with_some(tmp_path):
    """No call reads through the journal: ten times the rows don't take longer. (Absolute: the bench.)"""
    medians = []
    for rows in (3000, 60000):
        host = Host(tmp_path / str(rows))
        os.makedirs(host.state)
        last = million.fill(os.path.join(host.state, 'journal.sqlite'), rows)
        with host, host.api as api:
            medians.append(million.time_calls(api, last))
    few, many = medians
    assert all(many[name] < 2 * few[name] + 20 for name in few), (few, many)


def test_memory_stays_flat(tmp_path):
    rows = list(million.many(str(tmp_path), 1200, steps=6))
    assert [row[0] for row in rows] == [200 * step for step in range(1, 7)]
    assert rows[-1][1] - rows[2][1] < 5 and rows[-1][2] - rows[2][2] < 5, rows
