"""Random trees, and what may happen to them on their way: nothing is silently lost, nothing else is there.

CHIRP_SOAK gives the seconds that it runs, CHIRP_SEED where it begins; the counts are printed at the end.
"""

import contextlib
import os
import random
import shutil
import stat
import threading
import time

import pytest
from cutting import CuttingProxy

import chirpclient
import chirpserver
import chirpwire

NAMES = ['plain', 'with blank', 'new\nline', 'Icon\r', '\r', '.__mine', 'x.vmhost-part', 'é', '%41', 'a\\b',
         os.fsdecode(b'\xff'), '-', '~', 'n' * 120]
MODES = [0o644, 0o600, 0o755, 0o444, 0o400]


def grow(rng, folder, depth=0):
    """Fills a folder with a random tree."""
    for _ in range(rng.randrange(1, 12)):
        path = os.path.join(folder, rng.choice(NAMES) + str(rng.randrange(4)))
        if os.path.lexists(path):
            continue
        kind = rng.random()
        if kind < 0.2 and depth < 4:
            os.mkdir(path)
            grow(rng, path, depth + 1)
            os.chmod(path, rng.choice([0o755, 0o700, 0o555]))
            os.utime(path, (rng.randrange(10 ** 9),) * 2)
        elif kind < 0.3:
            os.symlink(rng.choice(['plain0', 'missing', '.']), path)
        else:
            write(rng, path)


def write(rng, path):
    size = rng.choice([0, 1, 1000, 65536, 65537, rng.randrange(300000), rng.randrange(12 << 20)])
    with open(path, 'wb') as file:
        if rng.random() < 0.2:
            file.truncate(size)                # one hole
        else:
            file.write(bytes(rng.getrandbits(8) for _ in range(min(size, 64))) * (size // 64 + 1))
            file.truncate(size)
    os.chmod(path, rng.choice(MODES))
    os.utime(path, (rng.randrange(10 ** 9),) * 2)


def seen(top):
    """{path: what is there} of a tree: kind, mode, time, content or target."""
    found = {}
    for folder, folders, names in os.walk(os.fsencode(top)):
        for name in folders + names:
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                what = ('link', os.readlink(path))
            elif stat.S_ISDIR(mode):
                what = ('folder', stat.S_IMODE(mode))
            else:
                with open(path, 'rb') as file:
                    what = ('file', stat.S_IMODE(mode), int(os.lstat(path).st_mtime), file.read())
            found[os.path.relpath(path, os.fsencode(top))] = what
    return found


def remove(path):
    for folder, _, _ in os.walk(path):
        os.chmod(folder, 0o700)
    shutil.rmtree(path, ignore_errors=True)


class Round:
    """A tree, a server behind a proxy, and a transfer either way, until it is done or has told why not."""

    def __init__(self, rng, top, counts):
        self.rng = rng
        self.counts = counts
        self.served, self.here = os.path.join(top, 'served'), os.path.join(top, 'here')
        for folder in self.served, self.here:
            remove(folder)
            os.mkdir(folder)
        self.server = chirpserver.ChirpServer(self.served, allow=['127.0.0.1']).start()

    def restart(self):
        address = self.server.address
        self.server.stop()
        self.server = chirpserver.ChirpServer(self.served, *address, allow=['127.0.0.1']).start()
        self.counts['restarts'] += 1

    def run(self):
        way = self.rng.choice(['put', 'get'])
        sources, targets = (self.here, self.served) if way == 'put' else (self.served, self.here)
        with CuttingProxy(self.server.address) as proxy:
            for name in self.rng.choice([['a'], ['a', 'b']]):      # b goes where a was going
                source = os.path.join(sources, name)
                os.mkdir(source)
                grow(self.rng, source)
                last = name
                self.attempts(proxy, way, source, self.rng.randrange(3))
            source, target = os.path.join(sources, last), os.path.join(targets, 'target')
            told = self.attempt(proxy, way, source, None)
            for _ in range(20):
                if told is None or isinstance(told, chirpwire.Incomplete):
                    break
                told = self.attempt(proxy, way, source, None)
            self.judge(told, seen(source), seen(target))

    def attempts(self, proxy, way, source, count):
        """Some that are disturbed."""
        for _ in range(count):
            proxy.distances = iter([self.rng.randrange(1 << self.rng.randrange(8, 24))])
            proxy.left = next(proxy.distances)
            cancel = threading.Event() if self.rng.random() < 0.5 else None
            self.attempt(proxy, way, source, cancel)
            if self.rng.random() < 0.2:
                self.restart()
            if os.path.lexists(os.path.join(self.served if way == 'put' else self.here, 'target')):
                remove(os.path.join(self.served if way == 'put' else self.here, 'target'))
        proxy.left = None

    def attempt(self, proxy, way, source, cancel):
        """What it tells; None: it is done."""
        stop = self.rng.randrange(1 << 22)

        def progress(moved, total):
            if cancel is not None and moved >= stop:
                cancel.set()
        try:
            with chirpclient.ChirpClient(*proxy.address[:2], timeout=20) as client:
                if way == 'put':
                    client.put(source, '/target', progress, cancel)
                else:
                    client.get('/' + os.path.basename(source), os.path.join(self.here, 'target'),
                               progress, cancel)
        except chirpwire.Cancelled as error:
            self.counts['cancels'] += 1
            return error
        except (chirpwire.ChirpError, OSError) as error:
            self.counts['errors'] += 1
            return error
        return None

    def judge(self, told, wanted, found):
        """Raises AssertionError for a difference that nobody told of."""
        differences = {path for path in set(wanted) | set(found) if wanted.get(path) != found.get(path)}
        self.counts['entries'] += len(wanted)
        if told is None:
            self.counts['done'] += 1
            assert not differences, differences
        else:
            assert isinstance(told, chirpwire.Incomplete), told
            self.counts['told'] += 1
            named = [path for path, _ in told.failures]
            silent = {path for path in differences
                      if not any(path_is_under(path, failed) for failed in named)}
            assert not silent, (silent, named)


def path_is_under(path, failed):
    return chirpwire.shown(path).split('/')[0] in failed


@pytest.mark.soak
def test_nothing_is_silently_lost(tmp_path, monkeypatch):
    seconds, seed = float(os.environ.get('CHIRP_SOAK', 600)), int(os.environ.get('CHIRP_SEED', 0))
    monkeypatch.setattr(chirpclient.Meter, 'EVERY', 0)
    counts = dict.fromkeys(('rounds', 'done', 'told', 'entries', 'errors', 'cancels', 'restarts'), 0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        moving = Round(random.Random(seed), str(tmp_path), counts)
        try:
            moving.run()
        except AssertionError as error:
            raise AssertionError('seed %d: %s' % (seed, error))
        finally:
            with contextlib.suppress(chirpwire.ChirpError):
                moving.server.stop()
        seed += 1
        counts['rounds'] += 1
    print(counts, 'silent differences: 0')
    assert counts['done'] > 0
