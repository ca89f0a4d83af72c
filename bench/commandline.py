"""What a verb of the command line costs: python bench/commandline.py [--quick]

In one run, in turns: ``python3 -c 'import argparse, json, http.client, configparser'``, then --version and
--help, and ls and ps against a running host, each a process of its own. Processor time (user and system) is
the child's own, from wait4; medians, and the ratio to the imports of the same turn.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [TOP, os.path.join(TOP, 'tests')]

from agents import Host  # noqa: E402

IMPORTS = [sys.executable, '-c', 'import argparse, json, http.client, configparser']
TARGET = 2.0                   # times what the imports take


def run(words):
    """(processor seconds, seconds) of a process."""
    begin = time.perf_counter()
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0, words
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - begin


def measure(commands, rounds):
    """{name: [(processor seconds, seconds)]}, each round taking all in turn."""
    times = {name: [] for name in commands}
    for words in commands.values():
        run(words)
    for _ in range(rounds):
        for name, words in commands.items():
            times[name].append(run(words))
    return times


def report(times):
    """Prints a line for each; whether all meet the target."""
    met = True
    for name, values in times.items():
        ratios = [ours / imports for (ours, _), (imports, _) in zip(values, times['imports'])]
        ratio = statistics.median(ratios)
        met = met and ratio <= TARGET
        print('%-10s processor %6.1f ms  waiting %6.1f ms  %.2f times the imports' % (
            name, 1000 * statistics.median(cpu for cpu, _ in values),
            1000 * statistics.median(wall for _, wall in values), ratio))
    print('%-7s processor time of a verb (target: at most %g times the imports)'
          % ('met' if met else 'MISSED', TARGET))
    return met


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='fewer rounds')
    rounds = 7 if parser.parse_args().quick else 40
    program = [sys.executable, os.path.join(TOP, 'vmhost.py')]
    folder = tempfile.mkdtemp()
    try:
        with Host(os.path.join(folder, 'host')) as host:
            met = report(measure({
                'imports': IMPORTS, '--version': program + ['--version'], '--help': program + ['--help'],
                'ls': program + [host.ini, 'ls'], 'ps': program + [host.ini, 'ps']}, rounds))
    finally:
        shutil.rmtree(folder)
    return 0 if met else 1


if __name__ == '__main__':
    sys.exit(main())
