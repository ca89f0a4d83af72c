"""Hostile clients against our server, and hostile servers against our client."""

import contextlib
import hashlib
import itertools
import os
import random
import socket
import threading
import time

import pytest
from helpers import let_others_in, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chirp import our_server, write

import chirpclient
import chirpdownload
import chirplocal
import chirpmove
import chirprequests
import chirpserver
import chirpupload
import chirpwire
import localnames

pytestmark = pytest.mark.ends

HELLO = b'yes\nyes\nyes\naddress\n127.0.0.1\n'
WHOAMI = b'17\naddress:127.0.0.1'
BOUND = 10 * 1024 * 1024
STAT = b'1 2 %d 1 0 0 0 %d 4096 8 0 0 0\n'
FOLDER, FILE, LINK = 0o40755, 0o100644, 0o120777
LARGE = 64 << 20


@contextlib.contextmanager
def memory_bounded():
    """Fails if this process's peak of resident memory grows by more than BOUND."""
    if not os.path.exists('/proc/self/clear_refs'):
        yield
        return

    def of(name):
        with open('/proc/self/status') as file:
            return [int(line.split()[1]) * 1024 for line in file if line.startswith(name)][0]
    with open('/proc/self/clear_refs', 'w') as file:
        file.write('5')
    before = of('VmRSS')
    yield
    assert of('VmHWM') - before <= BOUND


# --- our client --------------------------------------------------------------------------------

class HostileServer:
    """Lets anyone in, and answers each request as ``answer(line)`` says: bytes, an iterator of bytes,
    or None, which ends the connection. ``greets``: that by which we see whether it is one of ours, too."""

    def __init__(self, answer, hello=HELLO, greets=False):
        self._answer, self._hello, self._greets = answer, hello, greets
        self.asked = 0                 # connections
        self._listener = socket.socket()
        self._listener.bind(('127.0.0.1', 0))
        self._listener.listen(16)
        self.address = self._listener.getsockname()
        self._socks, self._threads = [], []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for sock in [self._listener] + self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in [self._thread] + self._threads:
            thread.join(20)
            assert not thread.is_alive()
        for sock in [self._listener] + self._socks:
            sock.close()

    def _run(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._socks.append(sock)
            self.asked += 1
            self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
            self._threads[-1].start()

    def _serve(self, sock):
        with contextlib.suppress(OSError), sock.makefile('rb') as lines:
            lines.readline()
            sock.sendall(self._hello)
            for line in lines:
                answer = b'-8\n' if line.startswith(b'vmhost ') and not self._greets else \
                    WHOAMI if line.startswith(b'whoami ') else self._answer(line)
                if answer is None:
                    break
                for part in [answer] if isinstance(answer, bytes) else answer:
                    sock.sendall(part)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def endless(first, *parts):
    yield first
    while True:
        for part in parts:
            yield part * 500


REPLIES = {
    'nothing': None, 'no number': b'x\n', 'a long line': b'0' * 5000 + b'\n', 'a giant': b'9' * 30 + b'\n',
    'a large count': b'9999999999\n', 'an unknown error': b'-99\n', 'an error': b'-1\n',
    'bad stat': b'0\n1 2 3\n',
    'negative size': b'0\n' + STAT % (FILE, -5), 'binary': bytes(range(256)), 'zeros': b'\0' * 3000,
    'blank': b'\n', 'signs': b'--5\n', 'stat giants': b'0\n' + STAT % (FILE, 10 ** 19)}

CALLS = {
    'stat': lambda client, _: client.stat('/a'), 'hash': lambda client, _: client.hash('/a'),
    'getfile': lambda client, _: client.getfile('/a'), 'ls': lambda client, _: list(client.ls('/')),
    'readlink': lambda client, _: client.readlink('/a'), 'open': lambda client, _: client.open('/a'),
    'pread': lambda client, _: client.pread(0, 10, 0), 'statfs': lambda client, _: client.free_bytes(),
    'get': lambda client, folder: client.get('/a', str(folder / 'got')),
    'put': lambda client, folder: client.put(str(folder / 'source'), '/a'),
    'put a folder': lambda client, folder: client.put(str(folder / 'tree'), '/a')}


@pytest.mark.parametrize('call', sorted(CALLS))
def test_any_reply_is_an_error_of_ours(tmp_path, call):
    write(tmp_path / 'source', os.urandom(100000))
    (tmp_path / 'tree').mkdir()
    write(tmp_path / 'tree' / 'file', b'x')
    for reply, greets in itertools.product(REPLIES.values(), (False, True)):
        with HostileServer(lambda line, reply=reply: reply, greets=greets) as server, memory_bounded(), \
                chirpclient.ChirpClient(*server.address, timeout=0.3) as client:
            with contextlib.suppress(chirpwire.ChirpError):
                CALLS[call](client, tmp_path)
    assert set(os.listdir(str(tmp_path))) - {chirplocal.local_part('got')} == {'source', 'tree'}


@pytest.mark.parametrize('hello', [b'', b'no\n' * 100, b'yes\n', b'yes\n/etc/x\n', b'x' * 5000,
                                   b'yes\nyes\nno\n'])
def test_authentication_that_goes_wrong(hello):
    with HostileServer(lambda line: None, hello) as server, memory_bounded():
        with pytest.raises(chirpwire.ChirpError):
            chirpclient.ChirpClient(*server.address, timeout=0.5).stat('/')


@pytest.mark.once
@pytest.mark.parametrize('what', [
    lambda: endless(b'0\n', b'x' * 1000), lambda: endless(b'0\n', b'a name\n' + STAT % (FILE, 5)),
    lambda: endless(b'0\n', b'a\n'), lambda: endless(b'0\n', b'.\n' + STAT % (FILE, 5))])
def test_a_listing_without_an_end(monkeypatch, what):
    monkeypatch.setattr(chirpwire, 'SLOWEST', 10 * 1024 * 1024)
    monkeypatch.setattr(chirprequests, 'LISTING', 8 << 20)
    with HostileServer(lambda line: what()) as server, memory_bounded(), \
            chirpclient.ChirpClient(*server.address, timeout=2) as client:
        with pytest.raises(chirpwire.ChirpError):
            list(client.ls('/'))


@pytest.mark.once
@pytest.mark.parametrize('mode, error', [(FOLDER, chirpwire.ProtocolError), (0o10644, chirpwire.Incomplete)],
                         ids=['folders', 'pipes'])
def test_a_tree_without_an_end_is_bounded(tmp_path, mode, error, monkeypatch):
    """In each folder there are another one and 3,000 more."""
    monkeypatch.setattr(chirpdownload, 'ENTRIES', 9000 if mode == FOLDER else 30000)

    def listing():
        yield b'0\n0\n' + STAT % (FOLDER, 0)
        for number in range(30):
            yield b''.join(b'%0100d\n' % (100 * number + n + 1) + STAT % (mode, 0) for n in range(100))
        yield b'\n'

    def answer(line):
        if not line.startswith(b'getlongdir'):
            return b'0\n' + STAT % (FOLDER, 0)
        return listing() if line.count(b'/') < 8 and b'00' not in line else b'0\n\n'
    with HostileServer(answer) as server, memory_bounded(), \
            chirpclient.ChirpClient(*server.address, timeout=20) as client:
        with pytest.raises(error):
            client.get('/', str(tmp_path / 'got'))


def drip():
    while True:
        yield b'1'
        time.sleep(0.05)


@pytest.mark.parametrize('answer', [lambda line: b'', lambda line: drip()])
def test_silence_and_drops_have_their_time(answer):
    with HostileServer(answer) as server, chirpclient.ChirpClient(*server.address, timeout=0.5) as client:
        began = time.monotonic()
        with pytest.raises(chirpwire.TimedOut):
            client.stat('/')
        assert time.monotonic() - began < 10


@contextlib.contextmanager
def ends_soon():
    """Fails unless it ends by TimedOut, long before the bytes that were announced may take."""
    began = time.monotonic()
    with pytest.raises(chirpwire.TimedOut):
        yield
    assert time.monotonic() - began < 10


def falls_silent(word, reply, size=LARGE):
    """A server of one file of that size, that falls silent after this reply to a request of that word."""
    def answer(line):
        if line.split()[0] == word:
            return reply
        if line.startswith(b'close'):
            return b'0\n'
        return b'0\n' + STAT % (FILE, size) if line.split()[0] in (b'open', b'stat') else b'-3\n'
    return answer


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='Linux pins folders')
@pytest.mark.parametrize('there', [False, True])
def test_a_folder_that_becomes_a_link_while_it_is_fetched_leads_nowhere(tmp_path, monkeypatch, there):
    """Who shares the target, as a guest does its shared folder, leads no file out of it."""
    served, outside, target = [tmp_path / name for name in ('served', 'outside', 'target')]
    (served / 'tree' / 'sub').mkdir(parents=True)
    outside.mkdir(mode=0o711)
    for name, size in ('small', 10), ('large', 300000):
        (served / 'tree' / 'sub' / name).write_bytes(b'n' * size)
        (outside / name).write_bytes(b'precious')
    if there:
        (target / 'sub').mkdir(parents=True)
    get, swapped = chirpdownload.Download._get_entry, []

    def swap(self, entry, folder, *arguments):
        if folder.source.endswith(b'/sub') and not swapped:
            swapped.extend(tmp_path.glob('target/sub') if there else tmp_path.glob('.*.vmhost-part/sub'))
            swapped[0].rename(tmp_path / 'aside')
            swapped[0].symlink_to(outside)
        return get(self, entry, folder, *arguments)
    monkeypatch.setattr(chirpdownload.Download, '_get_entry', swap)
    with our_server(served) as server, \
            chirpclient.ChirpClient(*server.address) as client, \
            contextlib.suppress(chirpwire.ChirpError, OSError):
        client.get('/tree', str(target))
    assert swapped and {path.name: path.read_bytes() for path in outside.iterdir()} == {
        'small': b'precious', 'large': b'precious'}
    assert outside.stat().st_mode & 0o777 == 0o711


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='Linux pins folders')
@pytest.mark.parametrize('turn', range(1, 8))
def test_a_link_that_comes_while_a_folder_is_removed_leads_nowhere(tmp_path, monkeypatch, turn):
    """What an earlier attempt left is removed; who shares the target has nothing outside of it changed."""
    served, outside = tmp_path / 'served', tmp_path / 'outside'
    left = tmp_path / os.fsdecode(chirpwire.part_name(b'target')) / 'left'
    (served / 'tree').mkdir(parents=True)
    for folder in outside / 'b', left / 'a' / 'b':
        (folder / 'c').mkdir(parents=True)
        write(folder / 'c' / 'file', b'precious')
        (folder / 'c').chmod(0o711)
        folder.chmod(0o711)
    steps = []

    def swap_after(do):
        def step(*arguments, **keywords):
            done = do(*arguments, **keywords)
            steps.append(arguments)
            if len(steps) == turn:
                with contextlib.suppress(FileNotFoundError):
                    (left / 'a').rename(tmp_path / 'aside')
                    (left / 'a').symlink_to(outside)
            return done
        return step
    with our_server(served) as server, chirpclient.ChirpClient(*server.address) as client, \
            contextlib.suppress(chirpwire.ChirpError, OSError), monkeypatch.context() as patch:
        for name in 'chmod', 'fchmod', 'unlink', 'rmdir':
            patch.setattr(os, name, swap_after(getattr(os, name)))
        client.get('/tree', str(tmp_path / 'target'))
    assert len(steps) >= min(turn, 6) and (outside / 'b' / 'c' / 'file').read_bytes() == b'precious'
    assert {path.stat().st_mode & 0o777 for path in (outside / 'b', outside / 'b' / 'c')} == {0o711}


@contextlib.contextmanager
def as_nobody():
    """Meanwhile this process is another user, where it may be."""
    if os.name == 'nt' or os.getuid():
        pytest.skip('becomes another user')
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize('way', ['put', 'get'])
@pytest.mark.parametrize('what', ['file', 'folder'])
@pytest.mark.parametrize('held', [False, True])
def test_what_another_user_made_where_a_partial_file_is_to_be_is_not_gone_on_with(tmp_path, way, what, held):
    """In a folder that all may write to, such as /tmp: whose it is could read and change what comes."""
    let_others_in(tmp_path)
    source, shared = tmp_path / 'source', tmp_path / 'shared'
    shared.mkdir()
    shared.chmod(0o1777)
    (source / 'folder').mkdir(parents=True)
    for name in 'file', 'folder/file':
        write(source / name, b'for us alone', 0o600)
    part = chirplocal.local_part(str(shared / what))
    with as_nobody():
        os.mkdir(part) if what == 'folder' else open(part, 'wb').close()
        others = os.open(part, os.O_RDONLY)
        if held:
            chirpwire.lock_part(others)

    def move():
        with our_server(shared if way == 'put' else source) as server, \
                chirpclient.ChirpClient(*server.address) as client:
            client.put(str(source / what), '/' + what) if way == 'put' else \
                client.get('/' + what, str(shared / what))
    try:
        if held:                       # as by a transfer of that user's
            with pytest.raises((chirpwire.Busy, chirpwire.Refused)):
                move()
            assert os.path.samestat(os.stat(part), os.fstat(others))
            return
        move()
        assert (shared / what).stat().st_uid == 0 and not os.path.samestat(
            (shared / what).stat(), os.fstat(others))
        assert os.listdir(str(shared)) == [what]
    finally:
        os.close(others)


def test_a_partial_file_that_another_user_began_well_is_not_gone_on_with(tmp_path):
    let_others_in(tmp_path)
    shared, source = tmp_path / 'shared', write(tmp_path / 'source', os.urandom(3 << 20))
    shared.mkdir()
    shared.chmod(0o1777)
    part = chirplocal.local_part(str(shared / 'file'))
    with as_nobody(), open(part, 'wb') as file:
        file.write(source.read_bytes()[:1 << 20])
    with our_server(shared) as server, chirpclient.ChirpClient(*server.address) as client:
        try:
            client.put(str(source), '/file')
        except chirpwire.Refused:
            assert not (shared / 'file').exists()
        else:
            assert (shared / 'file').stat().st_uid == 0
            assert (shared / 'file').read_bytes() == source.read_bytes()


def test_what_another_user_made_and_nobody_else_may_remove_is_told(tmp_path):
    let_others_in(tmp_path)
    served, shared = tmp_path / 'served', tmp_path / 'shared'
    shared.mkdir()
    shared.chmod(0o1777)
    (served / 'folder').mkdir(parents=True)
    for name in 'file', 'folder/file':
        write(served / name, b'for all')
    for name in 'file', 'folder':
        part = chirplocal.local_part(str(shared / name))
        os.mkdir(part, 0o777) if name == 'folder' else write(shared / os.path.basename(part), b'', 0o666)
        os.chmod(part, 0o777)
        os.chown(part, 65533, 65533)
    with our_server(served) as server, chirpclient.ChirpClient(*server.address) as client, as_nobody():
        for name in 'file', 'folder':
            with pytest.raises(OSError, match='another user'):
                client.get('/' + name, str(shared / name))


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='Linux pins folders')
@pytest.mark.parametrize('there', [False, True])
def test_a_link_that_comes_while_a_disk_is_tried_leads_nowhere(tmp_path, monkeypatch, there):
    """Whether the target's disk takes names of one kind for one is tried there alone."""
    (tmp_path / 'served' / 'tree').mkdir(parents=True)
    outside, target = tmp_path / 'outside', tmp_path / 'target'
    (outside / 'x').mkdir(parents=True)
    if there:
        target.mkdir()
    folding, came = localnames.folding, []

    def swap(folder):
        place = target if there else next(tmp_path.glob('.*.vmhost-part'))
        place.rename(tmp_path / 'aside')
        place.symlink_to(outside)
        made = os.open

        def look(path, flags, *arguments, **keywords):
            fd = made(path, flags, *arguments, **keywords)
            came.extend(outside.glob('.vmhost-*'))
            return fd
        with monkeypatch.context() as patch:
            patch.setattr(os, 'open', look)
            return folding(folder)
    monkeypatch.setattr(localnames, 'folding', swap)
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as client, \
            contextlib.suppress(chirpwire.ChirpError, OSError):
        client.get('/tree', str(target))
    assert (tmp_path / 'aside').is_dir() and not came


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='Linux pins folders')
@pytest.mark.parametrize('hook, swapped, kept', [
    ('_put_folders', 'sub', ''), ('_put_regular', 'sub', 'small large'),
    ('_put_regular', 'sub/small', 'large'), ('_put_regular', 'sub/large', 'small')])
def test_a_link_that_comes_while_a_folder_is_sent_leads_nowhere(tmp_path, monkeypatch, hook, swapped, kept):
    """Who shares the source, as a guest does its shared folder, has nothing sent from outside of it."""
    served, tree, outside = [tmp_path / name for name in ('served', 'tree', 'outside')]
    for folder in served, tree / 'sub', outside:
        folder.mkdir(parents=True)
    for name, size in ('small', 10), ('large', 300000):
        (tree / 'sub' / name).write_bytes(b'n' * size)
        (outside / name).write_bytes(b's' * size)
    put, aside, failures = getattr(chirpupload.Upload, hook), tmp_path / 'aside', []

    def swap(self, *arguments):
        if not aside.exists() and (hook == '_put_folders' or arguments[1].path.endswith(b'/sub')):
            (tree / swapped).rename(aside)
            (tree / swapped).symlink_to(outside / swapped[4:])
        return put(self, *arguments)
    monkeypatch.setattr(chirpupload.Upload, hook, swap)
    with our_server(served) as server, chirpclient.ChirpClient(*server.address) as client:
        try:
            client.put(str(tree), '/tree')
        except chirpwire.Incomplete as incomplete:
            failures = [path for path, _ in incomplete.failures]
    assert aside.exists() and {path.name: path.read_bytes()[:1] for path in served.glob('tree/sub/*')} == \
        dict.fromkeys(kept.split(), b'n')
    assert failures == ([] if 'small large' == kept else [str(tree / swapped)])


@pytest.mark.parametrize('swapped', ['sub', 'sub/small', 'sub/large'])
@pytest.mark.parametrize('there', [False, True])
def test_a_link_that_comes_where_a_folder_is_put_leads_nowhere(tmp_path, monkeypatch, there, swapped):
    """Who shares the target with the guest's agent leads no file to another folder of what is served."""
    served, tree = tmp_path / 'served', tmp_path / 'tree'
    outside, target = served / 'outside', served / 'target'
    for folder in (tree / 'sub', outside) + ((target / 'sub',) if there else ()):
        folder.mkdir(parents=True)
    for name, size in ('small', 10), ('large', 300000):
        (tree / 'sub' / name).write_bytes(b'n' * size)
        (outside / name).write_bytes(b'precious')
        os.utime(str(outside / name), (1, 1))
    (outside / 'else').write_bytes(b'precious')
    put, came = chirpupload.Upload._put_entry, []

    def swap(self, entry, folder, *arguments):
        sent = put(self, entry, folder, *arguments)
        if folder.path.endswith(b'/sub') and (swapped == 'sub' or entry.name == swapped[4:]) and not came:
            self._small.finish()       # a small file is there, under its own name or another
            place = (target if there else next(served.glob('.*.vmhost-part'))) / swapped
            place.rename(served / 'aside')
            place.symlink_to(os.path.join('..', '..'[:len(swapped) - 3], 'outside', swapped[4:]))
            came.append(place)
        return sent
    monkeypatch.setattr(chirpupload.Upload, '_put_entry', swap)
    with our_server(served) as server, chirpclient.ChirpClient(*server.address) as client, \
            contextlib.suppress(chirpwire.ChirpError, OSError):
        client.put(str(tree), '/target')
    assert came and {path.name: path.read_bytes() for path in outside.iterdir()} == dict.fromkeys(
        ('small', 'large', 'else'), b'precious')
    assert {(outside / name).stat().st_mtime for name in ('small', 'large')} == {1}


@pytest.mark.parametrize('swapped', ['sub', 'sub/small', 'sub/large'])
def test_a_link_that_comes_where_a_folder_is_fetched_from_leads_nowhere(tmp_path, monkeypatch, swapped):
    """Who shares the source with the guest's agent has nothing read that is not in that folder."""
    served, target = tmp_path / 'served', tmp_path / 'target'
    for folder in served / 'tree' / 'sub', served / 'outside':
        folder.mkdir(parents=True)
    for name, size in ('small', 10), ('large', 300000):
        (served / 'tree' / 'sub' / name).write_bytes(b'n' * size)
        (served / 'outside' / name).write_bytes(b's' * size)
    get, came = chirpdownload.Download._get_entry, []

    def swap(self, entry, folder, *arguments):
        if folder.source.endswith(b'/sub') and not came:
            came.append(served / 'tree' / swapped)
            came[0].rename(served / 'aside')
            came[0].symlink_to(os.path.join('..', '..'[:len(swapped) - 3], 'outside', swapped[4:]))
        return get(self, entry, folder, *arguments)
    monkeypatch.setattr(chirpdownload.Download, '_get_entry', swap)
    with our_server(served) as server, chirpclient.ChirpClient(*server.address) as client, \
            pytest.raises(chirpwire.Incomplete) as caught:
        client.get('/tree', str(target))
    assert came and {path for path, _ in caught.value.failures} <= {
        '/tree/sub', '/tree/sub/small', '/tree/sub/large'}
    assert b's' not in {path.read_bytes()[:1] for path in target.glob('sub/*')}


def test_silence_in_the_middle_has_its_time(tmp_path):
    with HostileServer(falls_silent(b'pread', b'%d\n1234' % chirpmove.PIECE)) as server, ends_soon(), \
            chirpclient.ChirpClient(*server.address, timeout=0.5) as client:
        client.get('/a', str(tmp_path / 'got'))
    with HostileServer(falls_silent(b'getfile', b'16000000\n1234')) as server, ends_soon(), \
            chirpclient.ChirpClient(*server.address, timeout=0.5) as client:
        client.getfile('/a')


def test_who_takes_nothing_in_has_its_time(tmp_path):
    with open(str(tmp_path / 'source'), 'wb') as file:
        file.truncate(LARGE)
    ended, asked = threading.Event(), []

    def takes_nothing():
        yield b'0\n'
        ended.wait()

    def answer(line):
        asked.append(line.split()[0])
        if line.startswith(b'statfs'):
            return b'0\n0 4096 9 9 99999999 9 9\n'
        return takes_nothing() if line.startswith(b'pwrite') else falls_silent(b'', b'')(line)
    with HostileServer(answer) as server:
        try:
            with ends_soon(), chirpclient.ChirpClient(*server.address, timeout=0.5) as client:
                client.put(str(tmp_path / 'source'), '/a', verify=False)
        finally:
            ended.set()
    assert b'pwrite' in asked


@pytest.mark.parametrize('pace', [0, 0.01])
def test_who_takes_in_little_has_its_time(tmp_path, monkeypatch, pace):
    """Of memory, and of a file."""
    if pace:
        monkeypatch.setattr(chirpwire, 'SLOWEST', 10 << 20)
    with open(str(tmp_path / 'file'), 'w+b') as file:
        file.truncate(20 << 20)
        for send in (lambda wire: wire.send(bytes(20 << 20)),
                     lambda wire: wire.send_file(file.fileno(), 0, 20 << 20)):
            near, far = socket.socketpair()
            ended = threading.Event()

            def take(far=far, ended=ended):
                while not ended.wait(pace or None):
                    far.recv(1000)
            thread = threading.Thread(target=take)
            thread.start()
            try:
                with ends_soon():
                    send(chirpwire.Wire(near, 0.5))
            finally:
                ended.set()
                thread.join()
                near.close()
                far.close()


@pytest.mark.parametrize('size', [3 << 20, 9 << 20])
def test_a_checksum_has_the_time_that_a_file_of_that_size_takes(tmp_path, size):
    """Asked for at the end, or beside, on a connection of its own."""
    late = threading.Event()

    def answer(line):
        words = line.split()
        if words[0] == b'pread':
            return words[2] + b'\n' + bytes(int(words[2]))
        if words[0] == b'hash':
            late.wait(1)
            return b'20\n' + hashlib.sha1(bytes(size)).digest()
        return b'0\n' + STAT % (FILE, size) if words[0] in (b'open', b'stat', b'fstat') else b'0\n'
    with HostileServer(answer) as server, chirpclient.ChirpClient(*server.address, timeout=0.4) as client:
        client.get('/a', str(tmp_path / 'got'))
        assert (tmp_path / 'got').stat().st_size == size
        with pytest.raises(chirpwire.TimedOut):
            client.hash('/a')


def test_a_small_file_of_another_size_than_listed(tmp_path):
    def answer(line):
        return b'100000000000000000\n' if line.startswith(b'getfile') else serves_tree([(b'a', FILE)])(line)
    with HostileServer(answer) as server, chirpclient.ChirpClient(*server.address, timeout=20) as client:
        with pytest.raises(chirpwire.Disconnected, match='larger than it was'):
            client.get('/', str(tmp_path / 'got'))


def serves_tree(entries, content=b'pwned', target=b'/etc'):
    """A server whose every folder holds these (name, mode)."""
    def answer(line):
        word = line.split()[0]
        path = line.split()[-1]
        if word in (b'stat', b'lstat'):
            return b'0\n' + STAT % (FOLDER, 0)
        if word == b'getlongdir':
            if path.count(b'/') > 3:
                return b'0\n\n'
            return b'0\n%s\n' % b''.join(name + b'\n' + STAT % (mode, len(content)) for name, mode in entries)
        if word == b'readlink':
            return b'%d\n' % len(target) + target
        if word == b'getfile':
            return b'%d\n' % len(content) + content
        if word == b'open':
            return b'0\n' + STAT % (FILE, len(content))
        if word == b'pread':
            return b'%d\n' % len(content) + content
        if word == b'hash':
            return b'20\n' + __import__('hashlib').sha1(content).digest()
        return b'0\n'
    return answer


@pytest.mark.parametrize('name', [b'..', b'../escaped', b'/escaped', b'a/../../escaped', b'',
                                  b'x\0y', b'.__acl', b'n' * 300])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    inside = tmp_path / 'inside'
    inside.mkdir()
    with HostileServer(serves_tree([(name, FILE), (b'z', FILE)])) as server, \
            chirpclient.ChirpClient(*server.address, timeout=2) as client:
        with contextlib.suppress(chirpwire.ChirpError):
            client.get('/', str(inside / 'got'))
    assert os.listdir(str(tmp_path)) == ['inside']
    assert set(os.listdir(str(inside))) <= {'got', chirplocal.local_part('got')}


@pytest.mark.parametrize('links', ['keep', 'follow'])
@pytest.mark.parametrize('entries', [[(b'a', LINK), (b'a', FOLDER)], [(b'a', LINK), (b'a', FILE)],
                                     [(b'a', LINK), (chirpwire.part_name(b'a'), LINK),
                                      (b'a', FILE), (b'a', FOLDER)]])
def test_nothing_is_written_through_a_link(tmp_path, entries, links):
    outside = tmp_path / 'outside'
    outside.mkdir()
    victim = write(outside / 'victim', b'untouched')
    for target in (outside, victim):
        answer = serves_tree(entries, target=os.fsencode(str(target)))
        for _ in ('first', 'again'):
            with HostileServer(answer) as server, \
                    chirpclient.ChirpClient(*server.address, timeout=2) as client:
                with contextlib.suppress(chirpwire.ChirpError, OSError):
                    client.get('/', str(tmp_path / 'got'), links=links)
    assert os.listdir(str(outside)) == ['victim'] and victim.read_bytes() == b'untouched'


def test_a_link_that_no_disk_could_hold_is_an_error_of_ours(tmp_path):
    with HostileServer(serves_tree([(b'.', FOLDER), (b'a', LINK)], target=b'x\0y')) as server, \
            chirpclient.ChirpClient(*server.address, timeout=2) as client, \
            pytest.raises(chirpwire.ProtocolError, match='a link'):
        client.get('/', str(tmp_path / 'got'))


def test_links_that_lead_out_are_told_and_not_made(tmp_path):
    (tmp_path / 'served' / 'tree' / 'below').mkdir(parents=True)
    for name, target in (('out', '/etc/passwd'), ('up', '../x'), ('in', 'below'), ('below/up', '../in'),
                         ('below/out', '../../x'), ('none', 'missing')):
        os.symlink(target, str(tmp_path / 'served' / 'tree' / name))
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as client:
        with pytest.raises(chirpwire.Incomplete, match='3 of the entries .*leads out'):
            client.get('/tree', str(tmp_path / 'a'))
        assert sorted(os.listdir(str(tmp_path / 'a'))) == ['below', 'in', 'none']
        client.get('/tree', str(tmp_path / 'c'), links='skip')
        assert os.listdir(str(tmp_path / 'c')) == ['below']


def test_no_chain_of_links_leads_out(tmp_path):
    """Each link may go through those before it, whose ``..`` counts from where they lead."""
    tree = tmp_path / 'served' / 'tree'
    (tree / 'below' / 'deep').mkdir(parents=True)
    write(tree / 'inner', b'inner')
    write(tmp_path / 'secret', b'secret')
    links = {'here': '.', 'innocent': 'here/here/../../secret', 'below/up': '..', 'below/x': 'up/up/secret',
             'below/y': 'up/../secret', 'below/deep/top': '../..', 'below/deep/z': 'top/../secret',
             'a': 'below/deep/top/inner', 'b': 'here/below/up/inner', 'c': './/below/deep/../../inner',
             'd': 'below/deep/top/below/x'}
    for name, target in links.items():
        os.symlink(target, str(tree / name))
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as client:
        for _ in 'new', 'again':
            with pytest.raises(chirpwire.Incomplete, match='4 of the entries .*leads out'):
                client.get('/tree', str(tmp_path / 'got'))
    top = os.path.realpath(str(tmp_path / 'got'))
    for folder, folders, names in os.walk(top):
        for name in folders + names:
            assert (os.path.realpath(os.path.join(folder, name)) + os.sep).startswith(top + os.sep), name
    made = [name for name in links if os.path.lexists(os.path.join(top, name))]
    assert sorted(made) == ['a', 'b', 'below/deep/top', 'below/up', 'below/x', 'd', 'here']
    assert (tmp_path / 'got' / 'b').read_bytes() == (tmp_path / 'got' / 'a').read_bytes() == b'inner'


# --- our server --------------------------------------------------------------------------------

@pytest.fixture
def rooted(tmp_path):
    """(server, the folder that is served, beside which lies ``secret``)."""
    folder = tmp_path / 'served'
    folder.mkdir()
    write(tmp_path / 'secret', b'top secret')
    (tmp_path / 'elsewhere').mkdir()
    write(tmp_path / 'elsewhere' / 'secret', b'top secret')
    with our_server(folder) as server:
        yield server, folder
        with chirpclient.ChirpClient(*server.address) as client:         # it still serves others
            assert client.stat('/').is_dir
    assert (tmp_path / 'secret').read_bytes() == b'top secret'
    assert sorted(os.listdir(str(tmp_path))) == ['elsewhere', 'secret', 'served']
    assert os.listdir(str(tmp_path / 'elsewhere')) == ['secret']


def admitted(server):
    sock = socket.create_connection(server.address, 20)
    sock.sendall(b'address\n')
    assert sock.recv(len(HELLO), socket.MSG_WAITALL) == HELLO
    return sock


def all_of(sock):
    """What the server says until it ends the connection; ours ends it here."""
    sock.shutdown(socket.SHUT_WR)
    data = b''
    with contextlib.suppress(ConnectionError):
        while len(data) < 1 << 20:
            part = sock.recv(65536)
            if not part:
                break
            data += part
    return data


@pytest.mark.parametrize('path', ['/../secret', '../../../../secret', 'a/../../secret', '/%2e%2e/secret',
                                  '..%2fsecret',
                                  '/out', '/folder/secret', '/up/secret', '/up/up/secret', '/abs', '/.__acl',
                                  '/x/../.__acl', '/to-reserved', '/.__put.x', '/loop', '/loop/x'])
def test_nothing_outside_the_root_is_reached(rooted, tmp_path, path):
    server, folder = rooted
    (folder / 'a').mkdir()
    write(folder / '.__acl', b'reserved')
    for name, target in (('out', '../secret'), ('folder', '../elsewhere'), ('up', '..'), ('loop', 'loop'),
                         ('abs', str(tmp_path / 'secret')), ('to-reserved', '.__acl')):
        os.symlink(target, str(folder / name))
    requests = ['getfile %s', 'stat %s', 'open %s r 0', 'hash sha1 %s', 'md5 %s', 'getlongdir %s',
                'getdir %s',
                'truncate %s 0', 'chmod %s 511', 'utime %s 0 0', 'access %s 0',
                'getstream %s']
    if path not in ('/out', '/abs', '/to-reserved', '/loop'):       # which are links that may be looked at
        requests += ['lstat %s', 'readlink %s 100', 'unlink %s', 'rmdir %s', 'rmall %s', 'link %s /b',
                     'rename %s /b']
    for request in requests:
        with admitted(server) as sock:
            sock.sendall((request % path).encode() + b'\n')
            reply = all_of(sock)
            assert reply.startswith(b'-'), (request, reply)
    assert (folder / '.__acl').read_bytes() == b'reserved'


def test_writing_stays_inside(rooted, tmp_path):
    server, folder = rooted
    os.symlink('../elsewhere', str(folder / 'folder'))
    os.symlink(str(tmp_path / 'elsewhere' / 'new'), str(folder / 'dangling'))
    with chirpclient.ChirpClient(*server.address) as client:
        for write_it in (lambda: client.putfile('/folder/new', b'x'), lambda: client.mkdir('/folder/new'),
                         lambda: client.open('/folder/new', 'wc'), lambda: client.symlink('x', '/folder/new'),
                         lambda: client.putfile('/dangling', b'x'), lambda: client.open('/dangling', 'wc'),
                         lambda: client.putfile('/.__acl', b'x'), lambda: client.mkdir('/.__put.x'),
                         lambda: client.symlink('x', '/a/.__acl')):
            with pytest.raises(chirpwire.Refused):
                write_it()
        client.putfile('/../../climbed', b'x')
        assert client.getfile('/climbed') == b'x' == (folder / 'climbed').read_bytes()
        os.mkdir(str(folder / 'etc'))
        write(folder / 'etc' / 'passwd', b'inside')
        os.symlink('/etc/passwd', str(folder / 'passwd'))
        assert client.getfile('/passwd') == b'inside'              # links are resolved within the root


@pytest.mark.once
def test_a_link_that_is_swapped_in_reaches_nothing(rooted, tmp_path):
    server, folder = rooted
    stop = threading.Event()

    def swap():
        real, link, name = (str(folder / each) for each in ('real', 'link', 'name'))
        os.mkdir(real)
        write(folder / 'real' / 'secret', b'harmless')
        os.symlink(str(tmp_path / 'elsewhere'), link)
        while not stop.is_set():
            os.rename(real, name)
            os.rename(name, real)
            os.rename(link, name)
            os.rename(name, link)
    thread = threading.Thread(target=swap)
    thread.start()
    try:
        seen = set()
        with chirpclient.ChirpClient(*server.address) as client:
            for _ in range(2000):
                with contextlib.suppress(chirpwire.Refused):
                    seen.add(client.getfile('/name/secret'))
                with contextlib.suppress(chirpwire.Refused):
                    client.putfile('/name/new', b'x')
                with contextlib.suppress(chirpwire.Refused):
                    client.rmall('/name/new')
    finally:
        stop.set()
        thread.join()
    assert seen <= {b'harmless'}


def test_giants_cost_nothing(rooted):
    server, folder = rooted
    write(folder / 'file', b'x' * 100000)
    with memory_bounded():
        for request in (b'putfile /x 420 9223372036854775807', b'pread 0 9223372036854775807 0',
                        b'whoami 999999999999', b'pwrite 0 -5 0',
                        b'readlink /file 99999999999', b'open /file r 99999999999999999999999',
                        b'getfile ' + b'/' * 1000, b'stat ' + b'a/' * 500, b'truncate /file -1', b'whoami -1',
                        b'utime /file 9999999999999999 9999999999999999', b'hash sha1 ' + b'%41' * 300):
            with admitted(server) as sock:
                sock.sendall(b'open /file rw 0\n' + request + b'\n')
                assert all_of(sock).count(b'\n') >= 3
        with admitted(server) as sock:
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    sock.sendall(b'x' * 100000)            # a line without an end: the server hangs up
            with contextlib.suppress(ConnectionError):
                assert sock.recv(100) == b''


@pytest.mark.parametrize('request_line', [b'pwrite 0 %d 0', b'pwrite 7 %d 0', b'swrite 0 %d',
                                          b'setxattr /file name %d 0'])
def test_data_that_no_disk_could_hold_is_not_waited_for(rooted, request_line):
    server, folder = rooted
    write(folder / 'file', b'x')
    with admitted(server) as sock:
        sock.sendall(b'open /file rw 0\n' + request_line % (9 * 10 ** 18) + b'\n')
        sock.settimeout(10)
        while sock.recv(1000):
            pass


@pytest.mark.parametrize('request_line', [
    b'pread 0 10 %d', b'pread 0 %d 0', b'ftruncate 0 %d', b'truncate /file %d', b'utime /file %d 0',
    b'utime /file 0 %d', b'open /file r %d', b'close %d', b'whoami %d', b'mkdir /folder %d'])
def test_a_number_of_more_than_64_bits_is_a_bad_argument(rooted, caplog, request_line):
    server, folder = rooted
    write(folder / 'file', b'x')
    for number in (1 << 63, 9999999999999999999, -(1 << 63) - 1):
        with admitted(server) as sock:
            sock.sendall(b'open /file rw 0\n' + request_line % number + b'\n')
            assert all_of(sock).endswith(b'\n-8\n')
    for number in ((1 << 63) - 1, -(1 << 63)):         # whatever comes of these, they are answered
        with admitted(server) as sock:
            sock.sendall(b'open /file rw 0\n' + request_line % number + b'\nwhoami 1\n')
            assert all_of(sock).endswith(b'1\na')
    assert 'Traceback' not in caplog.text


@pytest.mark.parametrize('at', [(1 << 63) - 40000, (1 << 63) - 1, 1 << 63])
def test_content_beyond_64_bits_is_a_bad_argument(rooted, caplog, at):
    server, folder = rooted
    write(folder / 'file', b'x')
    for content in (b'x' * 40001, bytes(40001)):
        with admitted(server) as sock:
            sock.sendall(b'open /file rw 0\npwrite 0 40001 %d\n' % at + content + b'whoami 1\n')
            assert all_of(sock).endswith(b'\n-8\n1\na')
    assert 'Traceback' not in caplog.text


@pytest.mark.parametrize('end', [b'\x04\n', b'x' * 2000 + b'\n', b'pwrite 0 %d 0\n' % (9 * 10 ** 18)])
def test_what_was_answered_is_said_before_the_connection_ends(rooted, end):
    server, _ = rooted
    with admitted(server) as sock:
        sock.sendall(b'whoami 7\nmkdir /new 511\n' + end)
        assert all_of(sock) == b'7\naddress0\n'


def test_who_vanishes_without_a_word_is_noticed(tmp_path):
    with our_server(tmp_path) as server, admitted(server):
        session, = wait_until(lambda: list(server._sessions.values()))
        assert session.wire._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_many_files_open_at_once_are_bounded(rooted):
    server, folder = rooted
    write(folder / 'file', b'x')
    with chirpclient.ChirpClient(*server.address) as client:
        numbers = []
        with pytest.raises(chirpwire.Refused, match='too many open'):
            for _ in range(5000):
                numbers.append(client.open('/file')[0])
        assert numbers == list(range(chirpserver.OPEN_FILES))
        client.close(7)
        assert client.open('/file')[0] == 7


def test_who_says_nothing_is_let_go(tmp_path, monkeypatch):
    monkeypatch.setattr(chirpserver, 'AUTHENTICATION_TIME', 0.5)
    with our_server(tmp_path, idle_timeout=0.5) as server:
        with socket.create_connection(server.address, 20) as silent, admitted(server) as idle:
            assert silent.recv(1) == b''
            assert idle.recv(1) == b''
        with socket.create_connection(server.address, 20) as sock:      # nor does a drip of methods help
            with contextlib.suppress(ConnectionError):
                for _ in range(200):
                    sock.sendall(b'unix\n')
                    if not sock.recv(3):
                        break
                    time.sleep(0.02)
                else:
                    pytest.fail('never let go')


def test_one_that_does_not_read_holds_up_nobody(rooted):
    server, folder = rooted
    with open(str(folder / 'large'), 'wb') as file:
        file.truncate(1 << 30)
    socks = [admitted(server) for _ in range(8)]
    with memory_bounded():
        for sock in socks:
            sock.sendall(b'getfile /large\n')
        began = time.monotonic()
        with chirpclient.ChirpClient(*server.address) as client:
            for _ in range(100):
                client.stat('/large')
        assert time.monotonic() - began < 5
    for sock in socks:
        sock.close()


WORDS = st.sampled_from([word.decode() for word in sorted(chirpserver.COMMANDS)] + ['unix', 'x', ''])
PATHS = st.sampled_from(['/', '/file', '..', '/../secret', '/link', '%', '%2e%2e', '/new', '/.__acl',
                         '\x01', '-1', '0',
                         '5', '99999999999', 'sha1', 'rwc', 'a' * 300, '/folder/x', 'é'])
LINES = st.lists(st.one_of(
    st.tuples(WORDS, st.lists(PATHS, max_size=4)).map(
        lambda made: ' '.join([made[0]] + made[1]).encode() + b'\n'),
    st.binary(max_size=200)), max_size=12)


@settings(max_examples=int(os.environ.get('CHIRP_FUZZ', 150)))
@given(lines=LINES)
def test_fuzzed_lines(fuzzed, lines):
    server, folder = fuzzed
    with admitted(server) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(b''.join(lines))
            all_of(sock)
    with chirpclient.ChirpClient(*server.address) as client:
        assert client.stat('/').is_dir
    assert (folder.parent / 'secret').read_bytes() == b'top secret'
    assert sorted(os.listdir(str(folder.parent))) == ['secret', 'served']


@pytest.fixture(scope='module')
def fuzzed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('fuzz') / 'served'
    folder.mkdir()
    write(folder / 'file', b'x' * 1000)
    write(folder.parent / 'secret', b'top secret')
    os.symlink('../secret', str(folder / 'link'))
    with our_server(folder, max_clients=100, idle_timeout=5) as server:
        yield server, folder


def test_random_bytes_instead_of_authentication(tmp_path):
    rng = random.Random(5)
    with our_server(tmp_path) as server, memory_bounded():
        for _ in range(50):
            with socket.create_connection(server.address, 20) as sock:
                with contextlib.suppress(ConnectionError):
                    sock.sendall(bytes(rng.randrange(256) for _ in range(2000)))
                    assert b'yes' not in all_of(sock)


def test_many_checksums_at_once(tmp_path):
    """Of files that are written, and read, in turns."""
    with our_server(tmp_path) as server, chirpclient.ChirpClient(*server.address) as client:
        written = [client.open('/f%d' % n, 'wc')[0] for n in range(20)]
        for at in (0, 1000):
            for n, file in enumerate(written):
                client.hash('/f%d' % n)
                client.pwrite(file, b'%d' % (n % 10) * 1000, at)
        for n, file in enumerate(written):
            client.close(file)
            assert client.hash('/f%d' % n) == hashlib.sha1(b'%d' % (n % 10) * 2000).digest()
