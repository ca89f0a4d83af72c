"""A million commands: python bench/million.py [--rows N] [--commands N] [--steps N]

First the journal is filled with that many finished commands, and listCmds and getEvents are timed over
XML-RPC; then so many short commands go through one host and one guest, with keep_results and keep_spool
of seconds, and resident memory and disk are shown as they go. --commands 1000000 takes some hours.
"""

import argparse
import collections
import contextlib
import json
import os
import sqlite3
import statistics
import sys
import tempfile
import threading
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [TOP, os.path.join(TOP, 'tests')]

from agents import Agent, Host  # noqa: E402

import hostcommands  # noqa: E402
import hostjournal  # noqa: E402

CLIENTS = 8
CALLS = {
    'listCmds()': lambda api, last: api.listCmds(),
    'listCmds(limit 10)': lambda api, last: api.listCmds({'limit': 10}),
    'listCmds(vm)': lambda api, last: api.listCmds({'vm': 'vm-3', 'limit': 100}),
    'listCmds(state)': lambda api, last: api.listCmds({'state': 'failed', 'limit': 100}),
    'listCmds(unfinished)': lambda api, last: api.listCmds({'finished': False}),
    'listCmds(finished)': lambda api, last: api.listCmds({'finished': True, 'limit': 100}),
    'listCmds(cmd)': lambda api, last: api.listCmds({'cmd': 'no-such', 'limit': 100}),
    'listCmds(since)': lambda api, last: api.listCmds({'since': time.time()}),
    'listFinishedCmds()': lambda api, last: api.listFinishedCmds(),
    'getEvents(first)': lambda api, last: api.getEvents(0, 0),
    'getEvents(last)': lambda api, last: api.getEvents(last - 100, 0),
}


def fill(path, rows):
    """Writes finished commands straight into a journal; the number of the last event."""
    journal = hostjournal.Journal(path)
    now, request = time.time(), json.dumps({'cmd': 'true', 'args': [], 'env': {}, 'path': '', 'options': {}})
    for begin in range(0, rows, 10000):
        with journal.writing(durable=False) as transaction:
            for number in range(begin, min(begin + 10000, rows)):
                cmd_id, vm = 'filled-%07d' % number, 'vm-%d' % (number % 50)
                state = 'failed' if number % 1000 == 7 else 'exited'
                results = json.dumps(dict(hostcommands.lost_results(cmd_id, ''), state=state))
                when = now - (rows - number) * 0.1
                transaction.execute('INSERT INTO commands VALUES (?, ?, 0, ?, ?, ?)', cmd_id, vm, request,
                                    when, 'bench')
                transaction.execute(
                    'INSERT INTO executions (cmd_id, vm_id, vm, multicast, cmd, state, submitted, ended, '
                    'results) VALUES (?, ?, ?, 0, ?, ?, ?, ?, ?)', cmd_id, vm, vm, 'true', state, when,
                    when + 1, results)
                transaction.event('cmd-finished', vm, cmd_id, state)
    last = journal.last_event
    journal.close()
    return last


def time_calls(api, last, of=statistics.median, times=15):
    """{call: milliseconds, the median ``of`` some}."""
    found = {}
    for name, call in CALLS.items():
        spent = []
        for _ in range(times):
            begin = time.perf_counter()
            call(api, last)
            spent.append(1000 * (time.perf_counter() - begin))
        found[name] = of(spent)
    return found


def memory_of(pid):
    """Resident MiB."""
    with open('/proc/%d/statm' % pid) as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2 ** 20


def disk_of(folder):
    """(MiB, files and folders) of a folder, without the agents' logs."""
    size, count = 0, 0
    for path, folders, files in os.walk(folder):
        files = [name for name in files if name != 'log']
        count += len(folders) + len(files)
        for name in files:
            try:
                size += os.stat(os.path.join(path, name)).st_blocks * 512
            except OSError:
                continue
    return size / 2 ** 20, count


Step = collections.namedtuple('Step', 'commands host_memory guest_memory disk entries journalled')


def many(folder, commands, steps=10, keep='5s', make_host=Host, make_agent=Agent):
    """Runs that many short commands; gives Steps (memory and disk in MiB) as they go."""
    with make_host(os.path.join(folder, 'many'), keep_results=keep) as host, \
            make_agent(os.path.join(folder, 'guest'), host, 'g', keep_spool=keep, dedupe_ttl=keep) as guest:
        for step in range(steps):
            threads = [threading.Thread(target=run_some, args=(host, commands // steps // CLIENTS))
                       for _ in range(CLIENTS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            yield Step((step + 1) * (commands // steps // CLIENTS) * CLIENTS,
                       memory_of(host.process.pid), memory_of(guest.process.pid), *disk_of(folder),
                       journalled=executions_of(host))


def executions_of(host):
    """How many executions the journal knows."""
    with contextlib.closing(sqlite3.connect(os.path.join(host.state, 'journal.sqlite'))) as journal:
        return journal.execute('SELECT count(*) FROM executions').fetchone()[0]


def run_some(host, count):
    with host.api as api:
        for _ in range(count):
            cmd_id = api.runCmd('g', 'true')
            while not api.waitCmd(cmd_id, 60):
                continue


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rows', type=int, default=1000000)
    parser.add_argument('--commands', type=int, default=20000)
    parser.add_argument('--steps', type=int, default=10, help='how often to look while they run')
    wish = parser.parse_args()
    if wish.rows:
        time_rows(wish.rows)
    if wish.commands:
        run_many(wish.commands, wish.steps)


def time_rows(rows):
    """The calls that list, over a journal of so many commands."""
    with tempfile.TemporaryDirectory() as folder:
        host = Host(os.path.join(folder, 'rows'))
        os.makedirs(host.state)
        begin = time.monotonic()
        last = fill(os.path.join(host.state, 'journal.sqlite'), rows)
        print('journal of %d commands: %.0f MiB, filled in %.0f s' % (
            rows, disk_of(host.state)[0], time.monotonic() - begin))
        begin = time.monotonic()
        with host, host.api as api:
            print('the host starts on it in %.1f s, and has %.0f MiB' % (
                time.monotonic() - begin, memory_of(host.process.pid)))
            for name, spent in time_calls(api, last).items():
                print('%-24s %7.1f ms' % (name, spent))


def run_many(commands, steps):
    """Short commands, through one host and one guest."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        for step in many(folder, commands, steps):
            print('%8d commands, %5.0f s: host %5.1f MiB, guest %5.1f MiB, disk %6.1f MiB in %d entries, '
                  '%d commands in the journal' % ((step[0], time.monotonic() - begin) + step[1:]), flush=True)


if __name__ == '__main__':
    main()
