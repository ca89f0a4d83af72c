"""What one guest's noise costs another: python bench/noise.py [--seconds 60] [WORD …]

A host agent, an honest guest, which is a real agent, and a noisy one, which says one word as fast as its
connection takes it. Prints for each word what a ping and a run of `true` of the honest guest take meanwhile,
beside what they take in silence, and by how much the host's memory and journal grew.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [TOP, os.path.join(TOP, 'tests')]

from agents import Agent, Host  # noqa: E402
from fake_guest import CONNECTIONS, RESPONSES, Guest  # noqa: E402

MEGABYTE = 10 ** 6
PING_TARGET, RUN_TARGET = 0.050, 0.100         # seconds more than in silence, in the median
MEMORY_TARGET, JOURNAL_TARGET = 64, 64         # MB more


def hello(guest, number):
    """A HELLO of nearly 64 KiB, each of a session of its own."""
    keys = {'nonce': os.urandom(16).hex(), 'chirp': {'port': 1}, 'os': 'x' * 60000, 'cmds': {}}
    return CONNECTIONS, {'id': guest.id}, 'HELLO ' + json.dumps(keys)


def signed(word, topic=RESPONSES, **keys):
    def make(guest, number):
        return (topic,) + guest.signed(word, topic, headers={'cmd-id': 'c%d' % number}, **keys)
    return make


def unsigned(guest, number):
    return RESPONSES, {'cmd-id': 'c%d' % number, 'seq': '1', 'mac': '0' * 32}, 'CMD_RESULTS {}'


def newcomer(guest, number):
    """HELLO of a machine that nobody has seen before, on a connection of its own."""
    with Guest(guest.port, 'new-%d' % number) as new:
        new.put(CONNECTIONS, {'id': new.id}, 'HELLO ' + json.dumps(
            {'nonce': os.urandom(16).hex(), 'secret': new.secret.hex()}))
    return signed('STILL_ALIVE', CONNECTIONS)(guest, number)


RESULT = {'state': 'exited', 'finished': True, 'exitCodeOrSignal': 0}
WORDS = {
    'HELLO': hello, 'unsigned': unsigned, 'STILL_ALIVE': signed('STILL_ALIVE', CONNECTIONS, load1=1.0),
    'CMD_STATUS': signed('CMD_STATUS', state='running'), 'CMD_RESULTS': signed('CMD_RESULTS', **RESULT),
    'large': signed('CMD_RESULTS', out='x' * 900000, **RESULT), 'PONG': signed('PONG'),
    'AINT': signed('NONSENSE'), 'newcomer': newcomer,
    'BYE': signed('BYE', CONNECTIONS, reason='x' * 1000)}


class Noise(threading.Thread):
    """Says one word until ``stop``; ``said`` counts. A connection that is ended is made anew."""

    def __init__(self, port, word):
        super().__init__(name='noise')
        self.port, self.word = port, word
        self.said = 0
        self.secret = os.urandom(32)
        self.stopping = False

    def run(self):
        while not self.stopping:
            try:
                with Guest(self.port, 'noisy-' + self.word, self.secret) as guest:
                    guest.socket.settimeout(5)
                    guest.join()
                    while not self.stopping:
                        guest.put(*WORDS[self.word](guest, self.said))
                        self.said += 1
            except (OSError, AssertionError):
                time.sleep(0.1)

    def stop(self):
        self.stopping = True
        self.join(30)


def resident(pid):
    with open('/proc/%d/statm' % pid) as file:
        return int(file.read().split()[1]) * resource.getpagesize() / MEGABYTE


def journal_size(host):
    return sum(os.stat(os.path.join(host.state, name)).st_size for name in os.listdir(host.state)
               if name.startswith('journal')) / MEGABYTE


def times(host, seconds):
    """(median, worst) seconds of a ping, the same of a run of ``true``."""
    pings, runs = [], []
    end = time.monotonic() + seconds
    with host.api as api:
        while time.monotonic() < end:
            for _ in range(5):
                begin = time.perf_counter()
                api.ping('honest', 30)
                pings.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            cmd_id = api.runCmd('honest', 'true')
            while not api.waitCmd(cmd_id, 30):
                pass
            runs.append(time.perf_counter() - begin)
    return statistics.median(pings), max(pings), statistics.median(runs), max(runs)


def measure(host, word, seconds):
    """{what: number} of one word."""
    ping, _, run, _ = times(host, min(seconds, 5.0))
    memory, journal = resident(host.process.pid), journal_size(host)
    noise = Noise(host.broker_port, word)
    noise.start()
    try:
        loud = times(host, seconds)
    finally:
        noise.stop()
    return {'word': word, 'said': noise.said / seconds, 'ping': ping, 'run': run, 'loud_ping': loud[0],
            'worst_ping': loud[1], 'loud_run': loud[2], 'worst_run': loud[3],
            'memory': resident(host.process.pid) - memory, 'journal': journal_size(host) - journal}


def is_met(found):
    return (found['loud_ping'] - found['ping'] < PING_TARGET and found['loud_run'] - found['run'] < RUN_TARGET
            and found['memory'] < MEMORY_TARGET and found['journal'] < JOURNAL_TARGET)


def describe(found):
    names = 'ping', 'loud_ping', 'worst_ping', 'run', 'loud_run', 'worst_run'
    milli = [1000 * found[name] for name in names]
    return '%-12s %8.0f  %5.1f > %5.1f (%4.0f) %5.1f > %5.1f (%4.0f)  %9.1f  %9.1f  %s' % tuple(
        [found['word'], found['said']] + milli + [found['memory'], found['journal'],
                                                  'met' if is_met(found) else 'MISSED'])


def main():
    """Exits with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seconds', type=float, default=60.0, help='of each word')
    parser.add_argument('words', nargs='*', metavar='WORD', help='of ' + ', '.join(WORDS))
    chosen = parser.parse_args()
    folder, missed = tempfile.mkdtemp(), 0
    print('%-12s %8s  %18s  %18s  %9s  %9s' % (
        'word', 'said/s', 'ping ms (worst)', 'run ms (worst)', 'memory MB', 'journal MB'))
    try:
        with Host(os.path.join(folder, 'host')) as host:
            state = os.path.join(folder, 'state')
            with Agent(os.path.join(folder, 'guest'), host, 'honest', state_dir=state):
                for word in chosen.words or WORDS:
                    found = measure(host, word, chosen.seconds)
                    missed += not is_met(found)
                    print(describe(found), flush=True)
    finally:
        shutil.rmtree(folder)
    return min(1, missed)


if __name__ == '__main__':
    sys.exit(main())
