"""Random trees, and what may happen to them on their way: nothing is silently lost, nothing else is there.

Client and server are cut off, cancelled, killed and started again, and their disks get full (as root, who may
mount small ones). CHIRP_SOAK gives the seconds that it runs, CHIRP_SEED where it begins, CHIRP_NAMES how many
names the folder of very many has; the counts are printed at the end.
"""

import os
import random
import shutil
import stat
import subprocess
import sys
import threading
import time
import zlib

import pytest
from cutting import CuttingProxy

import chirp
import chirpclient
import chirpmove
import chirpwire

NAMES = ['plain', 'with blank', 'new\nline', 'Icon\r', '\r', '.__mine', 'x.vmhost-part', 'é', '%41', 'a\\b',
         os.fsdecode(b'\xff'), '-', '~', '*', 'n' * 120, 'N' * 254, '.0123456789abcdef.vmhost-par']
MODES = [0o644, 0o600, 0o755, 0o444, 0o400]


def grow(rng, folder, is_whole, depth=0):
    """Fills a folder with a random tree; unless that is to be whole, with what can't be moved, too."""
    made = []
    for _ in range(rng.randrange(1, 12)):
        path = os.path.join(folder, rng.choice(NAMES) + str(rng.randrange(4)))
        if os.path.lexists(path):
            continue
        made.append(path)
        kind = rng.random()
        if kind < 0.2 and depth < 4:
            os.mkdir(path)
            grow(rng, path, is_whole, depth + 1)
            os.chmod(path, rng.choice([0o755, 0o700, 0o555]))
            os.utime(path, (rng.randrange(10 ** 9),) * 2)
        elif kind < 0.3:
            leads = ['plain0', 'missing', '.'] + ['../../out', '/etc/passwd'] * (not is_whole)
            os.symlink(rng.choice(leads), path)
        elif kind < 0.33 and not is_whole:
            os.mkfifo(path)
        elif kind < 0.37 and os.path.isfile(made[0]) and not os.path.islink(made[0]):
            os.link(made[0], path)
        else:
            write(rng, path)


def write(rng, path):
    size = rng.choice([0, 1, 1000, 65536, 65537, rng.randrange(300000), rng.randrange(12 << 20)])
    with open(path, 'wb') as file:
        kind = rng.random()
        if kind < 0.2:
            file.truncate(size)                # one hole
        elif kind < 0.22:
            size = rng.randrange(1 << 30)      # holes, and something between them
            for _ in range(rng.randrange(5)):
                file.seek(rng.randrange(size + 1))
                file.write(b'between' * rng.randrange(10000))
            file.truncate(size)
        else:
            file.write(bytes(rng.getrandbits(8) for _ in range(min(size, 64))) * (size // 64 + 1))
            file.truncate(size)
    os.chmod(path, rng.choice(MODES))
    os.utime(path, (rng.randrange(10 ** 9),) * 2)


def content(path):
    """(size, checksum) of a file."""
    checksum, size = 0, 0
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return size, checksum


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
            elif not stat.S_ISREG(mode):
                what = ('neither',)
            else:
                what = ('file', stat.S_IMODE(mode), int(os.lstat(path).st_mtime), content(path))
            found[os.path.relpath(path, os.fsencode(top))] = what
    return found


def remove(path):
    for folder, _, _ in os.walk(path):
        os.chmod(folder, 0o700)
    shutil.rmtree(path, ignore_errors=True)


class Server:
    """chirp.py serving a folder, as a process that can be killed, and comes back on its port."""

    def __init__(self, folder):
        self.folder = folder
        self.address = ('127.0.0.1', 0)
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, chirp.__file__, 'serve', self.folder, '--port', str(self.address[1])],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True)
        self.address = ('127.0.0.1', int(self.process.stdout.readline().rpartition(':')[2]))

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Disk:
    """A folder on a file system of its own, where that can be mounted."""

    def __init__(self, folder):
        self.folder = folder
        os.makedirs(folder, exist_ok=True)
        self.is_mounted = not self._mount('size=8g,mode=755')

    def _mount(self, options):
        return subprocess.call(['mount', '-t', 'tmpfs', '-o', options, 'none', self.folder],
                               stderr=subprocess.DEVNULL)

    def have_room(self, count=None):
        """So many bytes from now on; None: more than it needs. Whether it could be told."""
        if not self.is_mounted:
            return False
        found = os.statvfs(self.folder)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        return not self._mount('remount,size=%d' % (8 << 30 if count is None else used + count))

    def empty(self):
        for name in os.listdir(self.folder):
            remove(os.path.join(self.folder, name))

    def close(self):
        if self.is_mounted:
            subprocess.check_call(['umount', '-l', self.folder])


class Round:
    """A tree, a server behind a proxy, and a transfer either way, until it is done or has told why not."""

    def __init__(self, rng, served, here, counts):
        self.rng = rng
        self.counts = counts
        self.served, self.here = served.folder, here.folder
        self.disks = {'put': served, 'get': here}      # by the way that fills them
        served.empty()
        here.empty()
        self.server = Server(self.served)

    def restart(self):
        self.server.stop()
        self.server.start()
        self.counts['restarts'] += 1

    def run(self):
        way = self.rng.choice(['put', 'get'])
        sources, targets = (self.here, self.served) if way == 'put' else (self.served, self.here)
        with CuttingProxy(self.server.address) as proxy:
            for name in self.rng.choice([['a'], ['a', 'b']]):      # b goes where a was going
                source = os.path.join(sources, name)
                os.mkdir(source)
                grow(self.rng, source, self.rng.random() < 0.6)
                last = name
                self.attempts(proxy, way, source, self.rng.randrange(3))
            source, target = os.path.join(sources, last), os.path.join(targets, 'target')
            told = self.attempt(proxy, way, source, None)
            for _ in range(20):
                if told is None or isinstance(told, chirpwire.Incomplete):
                    break
                told = self.attempt(proxy, way, source, None)
            self.judge(told, source if way == 'put' else '/' + last, seen(source), seen(target))

    def attempts(self, proxy, way, source, count):
        """Some that are disturbed."""
        for _ in range(count):
            proxy.distances = iter([self.rng.randrange(1 << self.rng.randrange(8, 24))])
            proxy.left = next(proxy.distances)
            if self.rng.random() < 0.3 and self.disks[way].have_room(self.rng.randrange(1 << 22)):
                self.counts['full'] += 1
            if self.rng.random() < 0.3:
                self.be_killed(proxy, way, source)
            else:
                self.attempt(proxy, way, source, self.rng.choice(['cancel', 'restart', None]))
            self.disks[way].have_room()
            target = os.path.join(self.disks[way].folder, 'target')
            if os.path.lexists(target):
                remove(target)
        proxy.left = None

    def words(self, way, source):
        """What is moved, and to where."""
        return (source, '/target') if way == 'put' else (
            '/' + os.path.basename(source), os.path.join(self.here, 'target'))

    def be_killed(self, proxy, way, source):
        """A client of which that becomes."""
        process = subprocess.Popen([sys.executable, chirp.__file__, way, '%s:%d' % proxy.address[:2]]
                                   + list(self.words(way, source)),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(0.2 + self.rng.random())
        except subprocess.TimeoutExpired:
            self.counts['kills'] += 1
        process.kill()
        process.wait()

    def attempt(self, proxy, way, source, disturbance):
        """What it tells; None: it is done."""
        stop, cancel, left = self.rng.randrange(1 << 22), threading.Event(), [disturbance]

        def progress(moved, total):
            if moved < stop or not left:
                return
            deed = left.pop()
            if deed == 'cancel':
                cancel.set()
            elif deed == 'restart':
                self.restart()
        try:
            with chirpclient.ChirpClient(*proxy.address[:2], timeout=20) as client:
                getattr(client, way)(*self.words(way, source), progress=progress, cancel=cancel)
        except chirpwire.Cancelled as error:
            self.counts['cancels'] += 1
            return error
        except (chirpwire.ChirpError, OSError) as error:
            self.counts['errors'] += 1
            return error
        return None

    def judge(self, told, source, wanted, found):
        """Raises AssertionError for a difference that nobody told of. ``source``: as it is named then."""
        differences = {path for path in set(wanted) | set(found) if wanted.get(path) != found.get(path)}
        self.counts['entries'] += len(wanted)
        if told is None:
            self.counts['done'] += 1
            assert not differences, differences
        else:
            assert isinstance(told, chirpwire.Incomplete), told
            self.counts['told'] += 1
            named = {path for path, _ in told.failures}
            silent = {path for path in differences if named.isdisjoint(ways_to(os.fsencode(source), path))}
            assert not silent, (silent, named)


def ways_to(top, path):
    """What a failure may name that keeps that path from arriving: itself, or a folder that it is in."""
    while path:
        yield chirpwire.shown_whole(top + b'/' + path)
        path = os.path.dirname(path)


@pytest.mark.soak
def test_nothing_is_silently_lost(tmp_path, monkeypatch):
    seconds, seed = float(os.environ.get('CHIRP_SOAK', 600)), int(os.environ.get('CHIRP_SEED', 0))
    monkeypatch.setattr(chirpmove.Meter, 'EVERY', 0)
    counts = dict.fromkeys(('rounds', 'done', 'told', 'entries', 'errors', 'cancels', 'restarts', 'kills',
                            'full'), 0)
    disks = [Disk(str(tmp_path / name)) for name in ('served', 'here')]
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            moving = Round(random.Random(seed), *disks, counts=counts)
            try:
                moving.run()
            except AssertionError as error:
                raise AssertionError('seed %d: %s' % (seed, error))
            finally:
                moving.server.stop()
            seed += 1
            counts['rounds'] += 1
    finally:
        for disk in disks:
            disk.close()
    print(counts, 'silent differences: 0')
    assert counts['done'] > 0


MOVE = """
import sys, chirp
with chirp.ChirpClient('127.0.0.1', int(sys.argv[1])) as client:
    getattr(client, sys.argv[2])(*sys.argv[3:])
print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])
"""


@pytest.mark.soak
@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs /proc')
def test_a_folder_of_very_many_names_takes_no_memory(tmp_path):
    """Neither here nor there, as against a folder of a few."""
    peaks = []
    for count in 10, int(os.environ.get('CHIRP_NAMES', 20000)):
        served, source = tmp_path / ('served %d' % count), tmp_path / ('source %d' % count)
        served.mkdir()
        source.mkdir()
        for number in range(count):
            (source / ('a name as they are, more or less: %d' % number)).touch()
        server = Server(str(served))
        try:
            for words in ('put', str(source), '/tree'), ('get', '/tree', str(tmp_path / ('back %d' % count))):
                peaks.append(int(subprocess.check_output(
                    [sys.executable, '-c', MOVE, str(server.address[1])] + list(words),
                    env=dict(os.environ, PYTHONPATH=os.path.dirname(chirp.__file__)))))
            with open('/proc/%d/status' % server.process.pid) as status:
                peaks += [int(line.split()[1]) for line in status if line.startswith('VmHWM')]
        finally:
            server.stop()
        assert len(os.listdir(str(tmp_path / ('back %d' % count)))) == count
    print('KiB at most, of put, get and the server:', peaks[:3], peaks[3:])
    # Up to 50,000 names are held, of a million as of these.
    assert all(many - few < 15000 for few, many in zip(peaks[:3], peaks[3:]))
