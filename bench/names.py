"""A folder of very many names through a host and a guest: python bench/names.py [--names N] [--folder DIR]

N empty files (a million) in one folder go to a guest, and back, as `put` and `get` move them: the seconds of
each way, and the memory of host and guest at its highest, beside what they took before. The promise: no more
than 30 MiB on top, on either side.
"""

import argparse
import os
import sys
import tempfile
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [TOP, os.path.join(TOP, 'tests')]

from agents import Agent, Host  # noqa: E402

MOST = 30 * 1024               # KiB on top


def fill(folder, count):
    """So many empty files, with names of some length."""
    os.mkdir(folder)
    for number in range(count):
        os.close(os.open(os.path.join(folder, 'a name as they are, more or less: %d' % number),
                         os.O_WRONLY | os.O_CREAT, 0o644))


def highest(process):
    """KiB that the process had at most."""
    with open('/proc/%d/status' % process.process.pid) as status:
        return next(int(line.split()[1]) for line in status if line.startswith('VmHWM'))


def move(api, *words):
    """Seconds that a transfer took."""
    begin = time.monotonic()
    moving = api.startTransfer(*words)
    while api.getTransfer(moving)['state'] in ('waiting', 'running'):
        time.sleep(0.2)
    ended = api.getTransfer(moving)
    assert ended['state'] == 'done', ended['error']
    return time.monotonic() - begin


def measure(folder, count):
    """Whether what is promised was kept."""
    source, small, back = (os.path.join(folder, name) for name in ('source', 'small', 'back'))
    fill(source, count)
    fill(small, 10)
    with Host(os.path.join(folder, 'host')) as host, \
            Agent(os.path.join(folder, 'guest'), host, 'g') as guest, host.api as api:
        move(api, 'put', 'g', small, 'small')          # what each takes once it has moved anything
        move(api, 'get', 'g', 'small', back + '.small')
        before = [highest(process) for process in (host, guest)]
        for words in ('put', 'g', source, 'tree'), ('get', 'g', 'tree', back):
            seconds = move(api, *words)
            after = [highest(process) for process in (host, guest)]
            grown = [now - then for now, then in zip(after, before)]
            print('%s: %7.1f s, %6.0f names/s; KiB at most: host %d (%+d), guest %d (%+d)' % (
                words[0], seconds, count / seconds, after[0], grown[0], after[1], grown[1]), flush=True)
        found = sum(1 for _ in os.scandir(back))
    print('names that are back: %d of %d' % (found, count))
    return found == count and max(grown) <= MOST


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--names', type=int, default=1000000)
    parser.add_argument('--folder', help='where the files are (default: the system\'s for temporary ones)')
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix='names-', dir=words.folder) as folder:
        return 0 if measure(folder, words.names) else 1


if __name__ == '__main__':
    sys.exit(main())
