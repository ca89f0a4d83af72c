"""How exact the usage of commands is: python bench/accounting.py [--runs 50]

Runs each program by a guest's runners and without them, in turns, and prints the medians of processor time
and peak memory of both: memory by /usr/bin/time -v (package time), processor time by a spawn and wait4 of
our own, since the former tells hundredths of a second only. Exits with 1 where they differ by more than 5 %
or 0.1 ms, or 5 % or 256 KiB, in the median of the pairs of a turn. On a busy machine the programs themselves
differ by more: what misses is run on, up to five times as often. No host is needed; Python 3.8 or later is.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, TOP)

import guestforks  # noqa: E402
import guestspool  # noqa: E402

MOST = 5                       # times as often
SPIN = 'import os\nwhile sum(os.times()[:2]) < %g: pass'
PYTHON = [sys.executable, '-I', '-S', '-c']
PROGRAMS = {
    'true': ['true'],
    'sh -c :': ['sh', '-c', ':'],
    '10 MB at once': PYTHON + ['x = bytearray(10 * 1000 * 1000)'],
    '100 MB at once': PYTHON + ['x = bytearray(100 * 1000 * 1000)'],
    '0.2 s of a core': PYTHON + [SPIN % 0.2],
    'a child, waited for': ['sh', '-c', '"$@"; :', 'sh'] + PYTHON + [SPIN % 0.1],
}


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument('--runs', type=int, default=50, help='of each program, by each of both')
    runs = words.parse_args().runs
    if not shutil.which('time'):
        sys.exit('needs /usr/bin/time (package time)')
    folder = tempfile.mkdtemp(prefix='vmhost-accounting-')
    forks = guestforks.ForkServer()
    met = True
    print('%-22s %10s %10s %8s   %10s %10s'
          % ('medians of %d' % runs, 'CPU ms', 'wait4', '', 'peak KiB', 'time'))
    try:
        for name, program in PROGRAMS.items():
            ours, theirs, misses = [], [], (True, True)
            while any(misses) and len(ours) < MOST * runs:
                for _ in range(runs):
                    place = os.path.join(folder, '%s-%d' % (name.replace(' ', '-'), len(ours)))
                    ours.append(by_runner(forks, place, program))
                    theirs.append(by_time(program))
                misses = missed(ours, theirs)
            show(name, ours, theirs, misses)
            met = met and not any(misses)
    finally:
        forks.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if met else 1


def by_runner(forks, folder, program):
    """(seconds of processor time, KiB) as a command's result tells them."""
    os.mkdir(folder)
    command = guestspool.Command('c', folder)
    request = {'cmd': program[0], 'args': program[1:], 'env': {}, 'path': '', 'root': folder,
               'output-limit': 1000}
    with open(command.path('request.json'), 'w') as file:
        json.dump(request, file)
    forks.run(folder)
    while not command.has('result.json'):
        time.sleep(0.001)
    result = command.result()
    assert result['state'] == 'exited', result
    usage = result['resources']
    return usage['ru_utime'] + usage['ru_stime'], usage['ru_maxrss']


def by_time(program):
    """The same, as wait4 and /usr/bin/time tell them."""
    done = subprocess.run(['/usr/bin/time', '-v'] + program, stderr=subprocess.PIPE, universal_newlines=True)
    told = dict(line.strip().rsplit(': ', 1) for line in done.stderr.splitlines() if ': ' in line)
    return by_wait4(program), int(told['Maximum resident set size (kbytes)'])


def by_wait4(program):
    """Seconds of processor time."""
    usage = os.wait4(os.posix_spawnp(program[0], program, os.environ), 0)[2]        # novm
    return usage.ru_utime + usage.ru_stime


def median(those, index):
    return statistics.median(one[index] for one in those)


def missed(ours, theirs):
    """Whether processor time and peak memory differ by more than they may."""
    return tuple(
        abs(statistics.median(one[index] - other[index] for one, other in zip(ours, theirs)))
        > max(0.05 * median(theirs, index), least) for index, least in ((0, 0.0001), (1, 256)))


def show(name, ours, theirs, misses):
    """Prints a line."""
    cpu, memory = ('MISSED' if miss else 'met' for miss in misses)
    print('%-22s %10.2f %10.2f %8s   %10d %10d %8s' % (
        name, 1000 * median(ours, 0), 1000 * median(theirs, 0), cpu,
        median(ours, 1), median(theirs, 1), memory))


if __name__ == '__main__':
    sys.exit(main())
