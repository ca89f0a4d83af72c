"""Transfers that are cut, and files that change, vanish, or don't fit."""

import contextlib
import errno
import hashlib
import os
import random
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading

import pytest
from cutting import CuttingProxy
from helpers import beside, let_others_in, wait_until
from test_chirp import (  # noqa: F401  (fixtures)
    REAL,
    client,
    make_many,
    make_tree,
    our_server,
    real_server,
    seen,
    served,
    write,
)

import agent
import chirp
import chirpclient
import chirpdownload
import chirplocal
import chirpmove
import chirprequests
import chirpserver
import chirpupload
import chirpwire

pytestmark = pytest.mark.ends

SIZE = 24 * 1024 * 1024
CUTS = 20


def try_until_done(proxy, cuts, furthest, seed, move):
    """Moves with cuts at random places, tried again until it is done; says how many cuts there were."""
    rng = random.Random(seed)
    before = proxy.cuts
    proxy.distances = iter([rng.randrange(1, furthest) for _ in range(cuts - 1)])
    proxy.left = rng.randrange(1, furthest)
    while True:
        with contextlib.suppress(chirpwire.Disconnected, chirpwire.AccessDenied):
            move()
            break
    proxy.left = None
    return proxy.cuts - before


def watched(path, contents):
    """Fails if a reader of the path ever sees something else than one of the contents."""
    digests = {hashlib.sha1(content).digest() for content in contents}

    def watch():
        assert hashlib.sha1(path.read_bytes()).digest() in digests
    return beside(watch, 0.01)


@pytest.fixture(autouse=True)
def all_progress(monkeypatch):
    monkeypatch.setattr(chirpmove.Meter, 'EVERY', 0)


@pytest.mark.once
def test_an_upload_that_is_cut_goes_on(served, tmp_path):  # noqa: F811
    content = os.urandom(SIZE)
    source, target = write(tmp_path / 'source', content), served[1] / 'target'
    target.write_bytes(b'the old content')
    shutil.chown(str(target), served[1].stat().st_uid)
    with CuttingProxy(served[0]) as proxy, watched(target, [content, b'the old content']):
        def move():
            with chirpclient.ChirpClient(*proxy.address[:2], timeout=20) as moving:
                moving.put(str(source), '/target')
        cuts = try_until_done(proxy, CUTS, 2 * SIZE // CUTS, 1, move)
        assert target.read_bytes() == content
        assert cuts >= CUTS // 2
        assert proxy.up <= SIZE + cuts * (chirpmove.PIECE + 65536)
    assert [name for name in os.listdir(str(served[1])) if not name.startswith('.__')] == ['target']


@pytest.mark.once
def test_a_download_that_is_cut_goes_on(served, tmp_path):  # noqa: F811
    content = os.urandom(SIZE)
    write(served[1] / 'source', content)
    target = write(tmp_path / 'target', b'the old content')
    with CuttingProxy(served[0]) as proxy, watched(target, [content, b'the old content']):
        def move():
            with chirpclient.ChirpClient(*proxy.address[:2], timeout=20) as moving:
                moving.get('/source', str(target))
        cuts = try_until_done(proxy, CUTS, 2 * SIZE // CUTS, 2, move)
        assert target.read_bytes() == content
        assert cuts >= CUTS // 2
        assert proxy.down <= SIZE + cuts * (chirpwire.BLOCK + chirpdownload.OVERLAP)
    assert not os.path.exists(chirplocal.local_part(str(target)))


@pytest.mark.once
def test_a_folder_that_is_cut_goes_on(served, tmp_path):  # noqa: F811
    source = make_tree(tmp_path / 'source')
    os.unlink(str(source / 'new\nline'))
    for index in range(100):
        write(source / ('f%d' % index), os.urandom(20000))
    size = tree_bytes(source)
    with CuttingProxy(served[0]) as proxy:
        def put():
            with chirpclient.ChirpClient(*proxy.address[:2], timeout=20) as moving:
                moving.put(str(source), '/tree')

        def get():
            with chirpclient.ChirpClient(*proxy.address[:2], timeout=20) as moving:
                moving.get('/tree', str(tmp_path / 'back'))
        for move, way in ((put, 'up'), (get, 'down')):
            before = getattr(proxy, way)
            cuts = try_until_done(proxy, 6, size // 3, 3, move)
            assert cuts >= 3
            # what is under way in a pipeline; and names, listings and checksums, again for each attempt
            again = chirprequests.DEPTH * chirpwire.SMALL // 4 + 100 * 1024
            assert getattr(proxy, way) - before <= size + (cuts + 1) * again
    assert seen(tmp_path / 'back') == seen(source)


@pytest.mark.parametrize('size', [3 << 20, None], ids=['a file', 'a folder'])
@pytest.mark.parametrize('way', ['up', 'down'])
def test_a_second_transfer_to_a_target_is_refused(tmp_path, way, size):
    """While the first is held up half way; which is then completed."""
    (tmp_path / 'served').mkdir()
    (tmp_path / 'here').mkdir()
    sources, targets = ('here', 'served') if way == 'up' else ('served', 'here')
    contents = [bytes([which]) * (size or 3 << 20) for which in (1, 2)]
    for which in 0, 1:
        source = tmp_path / sources / str(which)
        if size is None:
            source.mkdir()
        write(source if size else source / 'file', contents[which])
    with our_server(tmp_path / 'served') as server, CuttingProxy(server.address) as proxy:
        def move(which):
            with chirpclient.ChirpClient(*proxy.address, timeout=20) as moving:
                if way == 'up':
                    moving.put(str(tmp_path / 'here' / str(which)), '/target')
                else:
                    moving.get('/%d' % which, str(tmp_path / 'here' / 'target'))
        proxy.hold = 1 << 20
        first = threading.Thread(target=move, args=(0,))
        first.start()
        wait_until(lambda: getattr(proxy, way) > proxy.hold)
        with pytest.raises(chirpwire.Busy, match='another transfer to .*target is under way'):
            move(1)
        proxy.gate.set()
        first.join()
        target = tmp_path / targets / 'target'
        assert (target if size else target / 'file').read_bytes() == contents[0]
        if size:
            move(1)
            assert target.read_bytes() == contents[1]
    assert sorted(os.listdir(str(tmp_path / targets))) == ['target']


def test_what_is_no_file_is_not_replaced_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(chirpdownload, 'READER', 0)
    (tmp_path / 'served' / 'tree').mkdir(parents=True)
    write(tmp_path / 'served' / 'tree' / 'x', b'x')
    (tmp_path / 'here').mkdir()
    fifo, link = str(tmp_path / 'here' / 'x'), str(tmp_path / 'link')
    os.mkfifo(fifo)
    os.symlink(fifo, link)
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as client:  # noqa: F811
        for target in fifo, link:
            with pytest.raises(OSError, match='nobody reads from it'):
                client.get('/tree/x', target)
            reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
            client.get('/tree/x', target)
            assert os.read(reader, 10) == b'x'
            os.close(reader)
        with pytest.raises(chirpwire.Incomplete, match='neither a file nor a folder'):
            client.get('/tree', str(tmp_path / 'here'))
    assert stat.S_ISFIFO(os.lstat(fifo).st_mode) and os.path.islink(link)
    assert os.listdir(str(tmp_path / 'here')) == ['x']


def test_names_like_ours_are_not_harmed(client, served, tmp_path):  # noqa: F811
    """Of the user's, which end in ``.part``, beside what is moved."""
    for folder in tmp_path / 'here', served[1]:
        folder.mkdir(exist_ok=True)
        write(folder / 'file.part', b'mine')
        (folder / 'tree.part').mkdir()
        write(folder / 'tree.part' / 'mine', b'mine')
    write(tmp_path / 'file', b'1')
    (tmp_path / 'tree').mkdir()
    for name in 'x', 'x.part', 'x.vmhost-part':
        write(tmp_path / 'tree' / name, name.encode())
    for name in 'file', 'tree':
        client.put(str(tmp_path / name), '/' + name)
        client.get('/' + name, str(tmp_path / 'here' / name))
    client.put(str(tmp_path / 'tree'), '/tree')
    for folder in tmp_path / 'here', served[1]:
        assert (folder / 'file.part').read_bytes() == (folder / 'tree.part' / 'mine').read_bytes() == b'mine'
        assert set(os.listdir(str(folder / 'tree'))) - {'.__acl'} == {'x', 'x.part', 'x.vmhost-part'}
        for name in 'x', 'x.part', 'x.vmhost-part':
            assert (folder / 'tree' / name).read_bytes() == name.encode()


def test_a_part_of_another_kind_makes_way(client, served, tmp_path):  # noqa: F811
    """A folder's, where a file has the name now, and a file's, where a folder has."""
    (tmp_path / 'here').mkdir()
    (tmp_path / 'merged').mkdir()
    client.mkdir('/merged')
    for folder in tmp_path / 'here', served[1]:
        for name in 'file', 'merged/file':
            if folder == served[1]:
                client.mkdir('/' + chirplocal.local_part(name))
                client.putfile('/%s/old' % chirplocal.local_part(name), b'old')
        write(folder / chirplocal.local_part('tree'), b'old')
    (tmp_path / 'here' / chirplocal.local_part('file')).mkdir()
    write(tmp_path / 'here' / chirplocal.local_part('file') / 'old', b'old')
    os.chmod(str(served[1] / chirplocal.local_part('tree')), 0o666)
    write(tmp_path / 'file', b'new')
    write(tmp_path / 'merged' / 'file', b'new')
    (tmp_path / 'tree').mkdir()
    for name in 'file', 'tree', 'merged':
        client.put(str(tmp_path / name), '/' + name)
        client.get('/' + name, str(tmp_path / 'here' / name))
    for folder in tmp_path / 'here', served[1]:
        assert set(os.listdir(str(folder))) - {'.__acl', '.__uuid'} == {'file', 'tree', 'merged'}
        assert (folder / 'file').read_bytes() == (folder / 'merged' / 'file').read_bytes() == b'new'


def test_a_long_name_goes_there_and_back_or_is_refused_at_once(client, served, tmp_path):  # noqa: F811
    """Two paths share a line, each blank three bytes in it."""
    for name in ' ' * 170, 'n' * 255, ' ' * 250:
        source = write(tmp_path / 'source', b'x' * 100000)
        client.put(str(source), '/' + name)
        client.get('/' + name, str(tmp_path / 'back'))
        assert (tmp_path / 'back').read_bytes() == b'x' * 100000
        client.unlink('/' + name)
    deep = ' ' * 120 + '/' + ' ' * 120
    client.mkdir('/' + ' ' * 120)
    client.mkdir('/' + deep)
    write(source, b'y')
    (tmp_path / 'folder').mkdir()
    for path in str(source), str(tmp_path / 'folder'):
        with pytest.raises(chirpwire.Refused, match='name too long'):
            client.put(path, '/%s/%s' % (deep, 'n' * 30))
    assert set(os.listdir(str(served[1] / deep))) <= {'.__acl'}


def once(do):
    """A progress callback that does something the first time."""
    done = []

    def progress(moved, total):
        if not done and moved:
            done.append(moved)
            do()
    return progress


def test_a_folder_whose_connection_ends_between_two_requests_goes_on(served, tmp_path):  # noqa: F811
    source = tmp_path / 'source'
    (source / 'folder').mkdir(parents=True)
    write(source / 'first', b'1')
    write(source / 'folder' / 'second', b'2')
    with CuttingProxy(served[0]) as proxy, chirpclient.ChirpClient(*proxy.address[:2], timeout=20) as moving:
        def cut():
            proxy.left = 1
        moving.put(str(source), '/tree', progress=once(cut))
        moving.get('/tree', str(tmp_path / 'back'), progress=once(cut))
        assert proxy.cuts == 2
    assert seen(served[1] / 'tree') == seen(tmp_path / 'back') == seen(source)


def tree_bytes(folder):
    return sum(len(what[1]) for what in seen(folder).values() if what[0] == 'file')


def test_a_file_that_keeps_changing_leaves_the_others_of_its_folder_alone(served, tmp_path):  # noqa: F811
    """Those after it, too, which are sent, and asked for, without waiting."""
    source = tmp_path / 'source'
    source.mkdir()
    contents = {'a': b'a' * 100, 'b': os.urandom(chirpwire.SMALL + 1), 'c': b'c' * 200, 'd': b'd'}
    for name, content in contents.items():
        write(source / name, content)

    def change(moved, total):
        write(source / 'b', os.urandom(chirpwire.SMALL + 1))
    with chirpclient.ChirpClient(*served[0][:2], timeout=20) as moving:
        with pytest.raises(chirpwire.Incomplete, match='source/b: .*changed') as incomplete:
            moving.put(str(source), '/tree', progress=change)
        assert len(incomplete.value.failures) == 1
        assert sorted(path.name for path in (served[1] / 'tree').glob('?')) == ['a', 'c', 'd']


def test_a_source_that_grows_is_moved_as_it_was(client, served, tmp_path):  # noqa: F811
    """Either way; as a log does, all the time."""
    content = os.urandom(9 << 20)
    for source, move in (
            (tmp_path / 'source',
             lambda grow: client.put(str(tmp_path / 'source'), '/target', progress=grow)),
            (served[1] / 'source',
             lambda grow: client.get('/source', str(tmp_path / 'back'), progress=grow))):
        write(source, content)

        def grow(moved, total, source=source):
            with open(str(source), 'ab') as file:
                file.write(b'one more line\n')
        move(grow)
        moved = (served[1] / 'target' if source.parent == tmp_path else tmp_path / 'back').read_bytes()
        assert source.read_bytes().startswith(moved) and moved.startswith(content)


def test_a_small_file_that_grows_costs_the_others_nothing(served, tmp_path):  # noqa: F811
    """Since it was listed."""
    tree = make_many(served[1] / 'tree', 40)
    os.chmod(str(tree), 0o755)
    with CuttingProxy(served[0]) as proxy, chirpclient.ChirpClient(*proxy.address[:2], timeout=20) as moving:
        grown = []

        def grow(moved, total):
            if not grown and moved:
                grown.extend(path for path in tree.iterdir() if not path.name.startswith('.__'))
                for path in grown:
                    with open(str(path), 'ab') as file:
                        file.write(bytes(200000))
        moving.get('/tree', str(tmp_path / 'back'), progress=grow)
        assert len(proxy.connections) == 1
    for path in grown:
        there, back = path.read_bytes(), (tmp_path / 'back' / path.name).read_bytes()
        # It may be met while it grows.
        assert there.startswith(back) and len(back) >= len(there) - 200000, path.name


def test_a_source_that_changes_is_sent_as_it_is_then(client, served, tmp_path):  # noqa: F811
    source = write(tmp_path / 'source', os.urandom(9 << 20))
    client.put(str(source), '/target', progress=once(lambda: write(source, b'new' * 3000000, mtime=5)))
    assert (served[1] / 'target').read_bytes() == b'new' * 3000000


def test_a_source_that_shrinks_is_sent_as_it_is_then(client, served, tmp_path):  # noqa: F811
    source = write(tmp_path / 'source', os.urandom(40 << 20))
    client.put(str(source), '/target', progress=once(lambda: os.truncate(str(source), 100)))
    assert (served[1] / 'target').read_bytes() == source.read_bytes()


def test_a_source_there_that_changes_is_fetched_as_it_is_then(client, served, tmp_path):  # noqa: F811
    source = write(served[1] / 'source', os.urandom(20 << 20))
    client.timeout = 5             # the real one falls silent where the file was short for a moment
    client.get('/source', str(tmp_path / 'a'),
               progress=once(lambda: write(source, b'new' * 7000000, mtime=5)))
    assert (tmp_path / 'a').read_bytes() == b'new' * 7000000
    client.get('/source', str(tmp_path / 'b'), progress=once(lambda: os.truncate(str(source), 100)))
    assert (tmp_path / 'b').read_bytes() == source.read_bytes()


def test_a_source_there_that_is_replaced_is_fetched_as_it_is_then(served, tmp_path):  # noqa: F811
    """By a file of the same size and time, before its content is asked for."""
    size = 3 << 20
    source = write(served[1] / 'source', b'a' * size, mtime=5)
    other = write(served[1] / 'other', b'b' * size, mtime=5)
    with chirpclient.ChirpClient(*served[0], timeout=20) as moving:
        moving.get('/source', str(tmp_path / 'back'), verify=False,
                   progress=once(lambda: other.exists() and os.replace(str(other), str(source))))
    assert len(set((tmp_path / 'back').read_bytes())) == 1


def test_a_source_that_never_holds_still_is_an_error(client, served, tmp_path):  # noqa: F811
    source = write(served[1] / 'source', os.urandom(9 << 20))

    def progress(moved, total):
        with open(str(source), 'r+b') as file:
            file.write(os.urandom(1000))
    with pytest.raises(chirpwire.Changed):
        client.get('/source', str(tmp_path / 'target'), progress=progress)
    assert not (tmp_path / 'target').exists()
    assert client.stat('/source').size == 9 << 20      # the client goes on


def test_a_source_that_vanishes_comes_whole_or_not_at_all(client, served, tmp_path):  # noqa: F811
    content = os.urandom(9 << 20)
    source = write(served[1] / 'source', content)
    with contextlib.suppress(chirpwire.Refused, chirpwire.Changed):
        client.get('/source', str(tmp_path / 'target'), progress=once(lambda: os.unlink(str(source))))
    assert not (tmp_path / 'target').exists() or (tmp_path / 'target').read_bytes() == content
    with pytest.raises(chirpwire.Refused, match='does not exist'):
        client.get('/source', str(tmp_path / 'other'))


class Failing:
    """A file of which the disk loses a part."""

    def __init__(self, file, after):
        self._file = file
        self._left = after

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def _pass(self, count):
        self._left -= count
        if self._left < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def readinto(self, view):
        self._pass(len(view))
        return self._file.readinto(view)

    def write(self, data):
        self._pass(len(data))
        return self._file.write(data)


@pytest.mark.once
@pytest.mark.parametrize('call', ['put', 'get'])
def test_a_file_that_the_disk_loses_leaves_the_others_of_its_folder_alone(client, served, tmp_path,  # noqa: F811
                                                                          monkeypatch, call):
    """In the middle, where more of it is under way."""
    source, target = tmp_path / 'source', tmp_path / 'target'
    source.mkdir()
    for name in 'abc':
        write(source / name, os.urandom(9 << 20))
    module, how = (chirpupload, 'open_regular') if call == 'put' else (chirpdownload, 'open_part')
    real = getattr(module, how)
    if call == 'get':
        client.put(str(source), '/tree')
    monkeypatch.setattr(module, how, lambda path, *more: Failing(real(path, *more), 2 << 20)
                        if path.endswith('b') else real(path, *more))
    with pytest.raises(chirpwire.Incomplete) as info:
        if call == 'put':
            client.put(str(source), '/tree')
        else:
            client.get('/tree', str(target))
    assert [(os.path.basename(path), why) for path, why in info.value.failures] == [
        ('b', os.strerror(errno.EIO))]
    os.unlink(str(source / 'b'))
    there = seen(target if call == 'get' else served[1] / 'tree')
    assert {name: what for name, what in there.items() if not chirpwire.is_part(name)} == seen(source)


@pytest.mark.parametrize('call', ['put', 'get'])
def test_a_file_that_the_servers_disk_loses_leaves_the_others_alone(tmp_path, monkeypatch, call):
    """The server refuses a piece in the middle, while more are under way."""
    name = chirpwire.PWRITE_CRC32 if call == 'put' else chirpwire.PREAD_CRC32
    real, refused = getattr(chirpserver.OpenFiles, name), []

    def refuse(self, word, length, offset):
        if int(offset) and not refused:
            refused.append(word)
            self._wire.skip(int(length) if call == 'put' else 0)
            return b'-8\n'
        return real(self, word, length, offset)
    monkeypatch.setattr(chirpserver.OpenFiles, name, refuse)
    source = tmp_path / 'source'
    source.mkdir()
    for each in 'abc':
        write(source / each, os.urandom(11 << 20))
    with our_server(tmp_path) as server, chirpclient.ChirpClient(*server.address) as moving:
        with pytest.raises(chirpwire.Incomplete) as info:
            if call == 'put':
                moving.put(str(source), '/target')
            else:
                moving.get('/source', str(tmp_path / 'target'))
    lost = os.path.basename(info.value.failures[0][0])
    assert len(info.value.failures) == 1 and lost in 'abc'
    os.unlink(str(source / lost))
    there = seen(tmp_path / 'target')
    assert {name: what for name, what in there.items() if not chirpwire.is_part(name)} == seen(source)


def test_what_vanishes_from_a_folder_is_told_and_the_rest_is_moved(client, served, tmp_path, monkeypatch):  # noqa: F811
    (served[1] / 'tree').mkdir()
    for name in ('a', 'b', 'c'):
        write(served[1] / 'tree' / name, name.encode())
    listed = client.ls

    def list_and_remove(*words):
        entries = listed(*words)
        with contextlib.suppress(OSError):
            os.unlink(str(served[1] / 'tree' / 'b'))
        return entries
    monkeypatch.setattr(client, 'ls', list_and_remove)
    with pytest.raises(chirpwire.Incomplete, match='/tree/b: .*does not exist'):
        client.get('/tree', str(tmp_path / 'back'))
    assert sorted(os.listdir(str(tmp_path / 'back'))) == ['a', 'c']


@pytest.mark.parametrize('call', ['put', 'get'])
def test_what_fails_at_the_target_is_told_so(client, served, tmp_path, call):  # noqa: F811
    """The path is the source's, where the file is as it was."""
    source, target = tmp_path / 'tree', served[1] / 'there'
    if call == 'get':
        source, target = served[1] / 'tree', tmp_path / 'there'
    for folder in source / 'sub', target:
        folder.mkdir(parents=True)
    write(source / 'sub' / 'x', b'x')
    write(target / 'sub', b'no folder')
    with pytest.raises(chirpwire.Incomplete) as info:
        client.put(str(source), '/there') if call == 'put' else client.get('/tree', str(target))
    ((path, why),) = info.value.failures
    assert path == (str(source / 'sub') if call == 'put' else '/tree/sub')
    assert why.lower() == 'not a directory (at the target)'


def test_pipes_and_sockets_are_told_and_not_waited_for(client, served, tmp_path):  # noqa: F811
    source = tmp_path / 'source'
    source.mkdir()
    write(source / 'file', b'x')
    os.mkfifo(str(source / 'pipe'))
    with pytest.raises(chirpwire.Incomplete, match='pipe'):
        client.put(str(source), '/tree')
    assert (served[1] / 'tree' / 'file').read_bytes() == b'x'
    with pytest.raises(OSError):
        client.put(str(source / 'pipe'), '/pipe')


def test_a_folder_in_the_place_of_a_file_stays(client, served, tmp_path):  # noqa: F811
    source = write(tmp_path / 'source', b'x' * 100000)
    client.mkdir('/target')
    with pytest.raises(chirpwire.Refused, match='is a directory'):
        client.put(str(source), '/target')
    (tmp_path / 'here').mkdir()
    client.putfile('/file', b'y')
    with pytest.raises(IsADirectoryError):
        client.get('/file', str(tmp_path / 'here'))
    with pytest.raises(chirpwire.Refused, match='not a directory'):
        client.put(str(tmp_path / 'here'), '/file')
    with pytest.raises(OSError):
        client.get('/target', str(source))
    assert source.read_bytes() == b'x' * 100000 and client.getfile('/file') == b'y'


def test_a_folder_needs_no_room_for_holes(tmp_path, monkeypatch):
    """As its files don't, one by one: a disk may have room for what is in them alone."""
    (tmp_path / 'served').mkdir()
    (tmp_path / 'tree').mkdir()
    with open(str(tmp_path / 'tree' / 'sparse'), 'wb') as file:
        file.truncate(8 << 20)
    if os.stat(str(tmp_path / 'tree' / 'sparse')).st_blocks:
        pytest.skip('this disk knows no holes')
    monkeypatch.setattr(chirpclient.ChirpClient, 'free_bytes', lambda *_: 1 << 20)
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as moving:
        moving.put(str(tmp_path / 'tree'), '/new')
        write(tmp_path / 'tree' / 'full', b'x' * (2 << 20))
        with pytest.raises(chirpwire.Refused, match='no space'):
            moving.put(str(tmp_path / 'tree'), '/other')
    assert seen(tmp_path / 'served' / 'new')[b'sparse'][1] == bytes(8 << 20)


@pytest.mark.once
def test_a_sparse_file_stays_sparse(client, served, tmp_path):  # noqa: F811
    size = int(os.environ.get('CHIRP_SPARSE', 64 << 20))
    source = tmp_path / 'source'
    with open(str(source), 'wb') as file:
        file.write(b'begin')
        file.seek(size // 2)
        file.write(b'middle')
        file.truncate(size)
    client.put(str(source), '/target', verify=False)
    client.get('/target', str(tmp_path / 'back'))
    found = os.stat(str(tmp_path / 'back'))
    assert found.st_size == size and found.st_blocks * 512 < 16 << 20
    with open(str(tmp_path / 'back'), 'rb') as file:
        assert file.read(6) == b'begin\0'
        file.seek(size // 2)
        assert file.read(7) == b'middle\0'


def test_what_arrives_altered_is_moved_again(served, tmp_path):  # noqa: F811
    """One bit of a large file, each way; by the checksum of the server, whichever it has."""
    content = os.urandom(9 << 20)
    source, back = write(tmp_path / 'source', content), tmp_path / 'back'
    with CuttingProxy(served[0]) as proxy, chirpclient.ChirpClient(*proxy.address[:2], timeout=20) as moving:
        proxy.alter = 5 << 20
        moving.put(str(source), '/target')
        assert proxy.alter is None and proxy.up > 2 * len(content)
        assert moving.getfile('/target') == content
        moving.disconnect()
        before, proxy.alter = proxy.down, 5 << 20
        moving.get('/target', str(back))
        assert proxy.alter is None and proxy.down - before > 2 * len(content)
    assert back.read_bytes() == content


def test_a_transfer_can_be_cancelled(client, served, tmp_path):  # noqa: F811
    source = write(tmp_path / 'source', os.urandom(64 << 20))
    cancel = threading.Event()

    def progress(moved, total):
        if moved:
            cancel.set()
    with pytest.raises(chirpwire.Cancelled):
        client.put(str(source), '/target', progress=progress, cancel=cancel)
    assert not (served[1] / 'target').exists()
    client.put(str(source), '/target')             # goes on
    cancel.clear()
    with pytest.raises(chirpwire.Cancelled):
        client.get('/target', str(tmp_path / 'a'), progress=progress, cancel=cancel)
    assert not (tmp_path / 'a').exists()


def test_fetch_takes_the_first_bytes(client, served, tmp_path):  # noqa: F811
    write(served[1] / 'out', b'0123456789' * 100000)
    assert client.fetch('/out', str(tmp_path / 'a'), 777777) == 777777
    assert (tmp_path / 'a').read_bytes() == (b'0123456789' * 100000)[:777777]
    assert client.fetch('/out', str(tmp_path / 'b'), 1 << 30) == 1000000
    assert (tmp_path / 'b').read_bytes() == b'0123456789' * 100000


# --- servers that have no room, or no rights ------------------------------------------------------

@contextlib.contextmanager
def server_process(folder, prepare):
    """``chirp.py serve`` in a process of its own, that ``prepare`` has narrowed."""
    process = subprocess.Popen([sys.executable, chirp.__file__, 'serve', str(folder), '--port', '0'],
                               stdout=subprocess.PIPE, universal_newlines=True, preexec_fn=prepare)
    try:
        yield '127.0.0.1', int(process.stdout.readline().rpartition(':')[2])
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        process.stdout.close()


def fill_up(address, folder, source, pattern):
    """Sends what doesn't fit: it is said, nothing half stays under the name, the connection is good."""
    with chirpclient.ChirpClient(*address) as full:
        full.putfile('/old', b'old')
        with pytest.raises(chirpwire.Refused, match=pattern):
            full.put(str(source), '/old')
        with pytest.raises(chirpwire.Refused, match=pattern):
            full.putfile('/old', source.read_bytes())
        assert full.getfile('/old') == b'old'
        assert fits(full)
    assert sorted(os.listdir(str(folder))) == ['old', 'small']


def fits(full):
    try:
        full.putfile('/small', b'fits')
        return True
    except chirpwire.Refused:
        return False


def test_a_file_that_is_too_big(tmp_path):
    (tmp_path / 'served').mkdir()
    source = write(tmp_path / 'source', os.urandom(3 << 20))

    def prepare():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    with server_process(tmp_path / 'served', prepare) as address:
        fill_up(address, tmp_path / 'served', source, 'too big')


def test_a_disk_that_is_full(tmp_path):
    folder = tmp_path / 'served'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'none', str(folder)]
    if subprocess.call(mount, stderr=subprocess.DEVNULL):
        pytest.skip('a tmpfs can not be mounted here')
    try:
        with our_server(folder) as server:
            fill_up(server.address, folder, write(tmp_path / 'source', os.urandom(3 << 20)), 'no space')
    finally:
        subprocess.check_call(['umount', str(folder)])


def test_a_disk_that_is_read_only_is_called_so(tmp_path, monkeypatch):
    """Either end's: of a new file, one that is there, a large one, a new folder, and what is in one that is
    there."""
    disk, here = tmp_path / 'disk', tmp_path / 'here'
    disk.mkdir()
    (here / 'tree').mkdir(parents=True)
    for name in 'new', 'there', 'tree/new', 'tree/there':
        write(here / name, b'content')
    write(here / 'large', os.urandom(3 << 20))
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'none', str(disk)]
    if subprocess.call(mount, stderr=subprocess.DEVNULL):
        pytest.skip('a tmpfs can not be mounted here')
    try:
        (disk / 'tree').mkdir()
        for name in 'there', 'tree/there':
            write(disk / name, b'old')
        subprocess.check_call(['mount', '-o', 'remount,ro', str(disk)])
        said = os.strerror(errno.EROFS)
        for served, locally in (disk, here), (here, disk):
            with our_server(served) as server, chirpclient.ChirpClient(*server.address) as moving:
                for name, target in (('new', 'new'), ('there', 'there'), ('large', 'large'), ('tree', 'tree'),
                                     ('tree', 'other')):
                    told = (chirpwire.Incomplete,) if target == 'tree' else (chirpwire.Refused, OSError)
                    with pytest.raises(told, match='(?i)' + said):     # one folder in it may be mounted so
                        if served == disk:
                            moving.put(str(locally / name), '/' + target)
                        else:
                            moving.get('/' + name, str(locally / target))
                if served == disk:             # an older client
                    moving.disconnect()
                    monkeypatch.setattr(moving, '_greet', lambda wire: wire.put(b'vmhost 1\n') or wire.read(
                        moving._number(wire, '')).decode())
                    with pytest.raises(chirpwire.Refused, match='not authorized'):
                        moving.put(str(locally / 'new'), '/new')
    finally:
        subprocess.check_call(['umount', '-l', str(disk)])


def test_what_has_no_code_of_chirps_is_told_by_its_errno(tmp_path, monkeypatch):
    real = os.rename

    def rename(old, new, **options):
        if new == b'target':
            raise OSError(errno.EIO, 'the disk')
        real(old, new, **options)
    monkeypatch.setattr(os, 'rename', rename)
    write(tmp_path / 'source', b'content')
    with our_server(tmp_path) as server, chirpclient.ChirpClient(*server.address) as moving:
        with pytest.raises(chirpwire.Refused, match='(?i)target: %s$' % os.strerror(errno.EIO)):
            moving.put(str(tmp_path / 'source'), '/target')


@pytest.mark.parametrize('way', ['put', 'get'])
def test_a_folder_that_finds_no_room_tells_of_what_has_arrived_alone(tmp_path, way):
    small, source = tmp_path / 'small', tmp_path / 'source'
    small.mkdir()
    (source / 'tree').mkdir(parents=True)
    write(source / 'tree' / 'big', os.urandom(3 << 20))
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'none', str(small)]
    if subprocess.call(mount, stderr=subprocess.DEVNULL):
        pytest.skip('a tmpfs can not be mounted here')
    try:
        with our_server(small if way == 'put' else source) as server, \
                chirpclient.ChirpClient(*server.address) as client:
            def move():
                with pytest.raises((OSError, chirpwire.Refused)) as failed:
                    client.put(str(source / 'tree'), '/new') if way == 'put' else \
                        client.get('/tree', str(small / 'new'))
                return agent.sentence(failed.value)
            said = move()
            assert 'new' in said and 'has arrived' not in said and os.listdir(str(small)) == []
            write(source / 'tree' / 'first', b'first')
            part = chirplocal.local_part(str(small / 'new'))
            os.mkdir(part)
            write(small / os.path.basename(part) / 'first', b'first')
            said = move()
            assert 'what has arrived is in' in said and os.path.basename(part) in said
            assert os.listdir(part) == ['first']
    finally:
        subprocess.check_call(['umount', str(small)])


@pytest.mark.parametrize('way', ['put', 'get'])
@pytest.mark.parametrize('real', [False, pytest.param(True, marks=pytest.mark.skipif(
    not REAL, reason='needs chirp_server of cctools'))])
def test_a_full_disk_of_one_folder_is_that_folders_failure(tmp_path, way, real):
    """As by cp -r: what has room elsewhere arrives."""
    source, target = tmp_path / 'source' / 'tree', tmp_path / 'target' / 'tree'
    for folder in 'a', 'b', 'c', 'b/sub':
        (source / folder).mkdir(parents=True)
        (target / folder).mkdir(parents=True)
        for number in range(60):
            write(source / folder / ('small%d' % number), b'small' * 2000)
    for folder in 'b', 'b/sub':
        write(source / folder / 'big', os.urandom(3 << 20))
    if subprocess.call(['mount', '-t', 'tmpfs', '-o', 'size=300k', 'none', str(target / 'b')],
                       stderr=subprocess.DEVNULL):
        pytest.skip('a tmpfs can not be mounted here')
    try:
        if real:
            let_others_in(tmp_path)
            (tmp_path / 'scratch').mkdir()
            subprocess.check_call(['chown', '-R', 'nobody', str(tmp_path)])
        with contextlib.ExitStack() as stack:
            served = (target if way == 'put' else source).parent
            address = stack.enter_context(real_server(served, tmp_path / 'scratch')) if real else \
                stack.enter_context(our_server(served)).address
            client = stack.enter_context(chirpclient.ChirpClient(*address))
            failed = stack.enter_context(pytest.raises(chirpwire.Incomplete))
            client.put(str(source), '/tree') if way == 'put' else client.get('/tree', str(target))
        path = str(source / 'b') if way == 'put' else '/tree/b'
        assert [told for told, _ in failed.value.failures] == [path]
        for folder in 'a', 'c':
            assert sorted(name for name in os.listdir(str(target / folder)) if name != '.__acl') == sorted(
                os.listdir(str(source / folder)))
    finally:
        subprocess.check_call(['umount', str(target / 'b')])


@contextlib.contextmanager
def forked_server(folder, user):
    """A server in a process of another user; that one may not be able to run a program of ours."""
    near, far = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setuid(user)
            server = chirpserver.ChirpServer(str(folder), allow=['127.0.0.1']).start()
            os.write(far, b'%d\n' % server.address[1])
            signal.pause()
        finally:
            os._exit(1)
    os.close(far)                       # so that its end is told, where it can't begin
    try:
        yield '127.0.0.1', int(os.read(near, 20))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(near)


@pytest.mark.skipif(os.getuid() != 0, reason='reads what nobody may read')
def test_what_its_owner_may_not_read_arrives_all_the_same(tmp_path):
    let_others_in(tmp_path)
    folder, source = tmp_path / 'served', tmp_path / 'tree'
    for path in folder, source, folder / 'there':
        path.mkdir()
        os.chown(str(path), 65534, 65534)
    for mode in 0, 0o200, 0o111:
        write(source / ('small%o' % mode), b'x', mode)
        write(source / ('large%o' % mode), b'x' * 100000, mode)
    with forked_server(folder, 65534) as address, chirpclient.ChirpClient(*address) as narrow:
        for target in '/new', '/there', '/there':
            narrow.put(str(source), target)
            assert seen(folder / target[1:]) == seen(source)


def test_a_folder_that_can_not_be_read_leaves_nothing_behind(tmp_path):
    let_others_in(tmp_path)
    (tmp_path / 'served' / 'closed').mkdir(parents=True)
    os.chmod(str(tmp_path / 'served' / 'closed'), 0)
    with forked_server(tmp_path / 'served', 65534 if os.getuid() == 0 else os.getuid()) as address, \
            chirpclient.ChirpClient(*address) as narrow:
        with pytest.raises(chirpwire.Refused, match='not authorized'):
            narrow.get('/closed', str(tmp_path / 'got'))
    os.chmod(str(tmp_path / 'served' / 'closed'), 0o755)
    assert os.listdir(str(tmp_path)) == ['served']


def test_no_permission(tmp_path):
    let_others_in(tmp_path)
    folder = tmp_path / 'served'
    folder.mkdir()
    write(folder / 'secret', b'x', 0)
    write(folder / 'fixed', b'x', 0o444)
    os.chmod(str(folder), 0o555)
    source = write(tmp_path / 'source', b'y')
    with forked_server(folder, 65534 if os.getuid() == 0 else os.getuid()) as address, \
            chirpclient.ChirpClient(*address) as narrow:
        for move in (lambda: narrow.put(str(source), '/new'), lambda: narrow.put(str(source), '/fixed'),
                     lambda: narrow.getfile('/secret'), lambda: narrow.get('/secret', str(tmp_path / 'a')),
                     lambda: narrow.unlink('/fixed'), lambda: narrow.mkdir('/d')):
            with pytest.raises(chirpwire.Refused, match='not authorized'):
                move()
        (tmp_path / 'tree').mkdir()
        for path in source, tmp_path / 'tree':         # whose temporary name nobody knows
            with pytest.raises(chirpwire.Refused, match='^/new: not authorized'):
                narrow.put(str(path), '/new')
    os.chmod(str(folder), 0o755)


def test_who_reads_from_a_fifo_is_waited_for(tmp_path, monkeypatch):
    (tmp_path / 'served').mkdir()
    write(tmp_path / 'served' / 'file', b'x' * 1000)
    os.mkfifo(str(tmp_path / 'fifo'))
    tried, got = threading.Event(), []
    wait = chirpmove.Meter.wait

    def note(meter, seconds):
        tried.set()
        wait(meter, seconds)
    monkeypatch.setattr(chirpmove.Meter, 'wait', note)

    def read():
        tried.wait(20)
        with open(str(tmp_path / 'fifo'), 'rb') as file:
            got.append(file.read())
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as moving:
        moving.get('/file', str(tmp_path / 'fifo'))
    reader.join(20)
    assert got == [b'x' * 1000]


def test_what_goes_to_a_fifo_goes_there_once(tmp_path):
    """By several calls, too, as where an agent was started anew meanwhile."""
    (tmp_path / 'served').mkdir()
    content = os.urandom(9 << 20)
    write(tmp_path / 'served' / 'file', content)
    given, got = chirpdownload.Given(), []
    os.mkfifo(str(tmp_path / 'fifo'))

    def read():
        with open(str(tmp_path / 'fifo'), 'rb') as file:
            got.append(file.read())
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with our_server(tmp_path / 'served') as server, CuttingProxy(server.address) as proxy:
        keeper = open(str(tmp_path / 'fifo'), 'wb')
        try:
            proxy.left, proxy.most = 3 << 20, 1
            with chirpclient.ChirpClient(*proxy.address) as client, \
                    pytest.raises((chirpwire.Disconnected, chirpwire.TurnedAway)):
                client.get('/file', str(tmp_path / 'fifo'), given=given)
            assert 0 < given.count < len(content)
            with chirpclient.ChirpClient(*server.address) as client:
                client.get('/file', str(tmp_path / 'fifo'), given=given)
        finally:
            keeper.close()
            reader.join(20)
    assert got == [content]


@pytest.mark.parametrize('way', ['in place', 'another file', 'between two calls'])
def test_a_file_that_changes_while_it_is_given_is_told(tmp_path, way):
    (tmp_path / 'served').mkdir()
    path, pieces, given = tmp_path / 'served' / 'file', [], chirpdownload.Given()
    write(path, b'a' * (20 << 20))

    def change(_):
        pieces.append(1)
        if len(pieces) == 1:
            if way == 'another file':
                os.rename(str(write(tmp_path / 'served' / 'other', b'b' * (20 << 20))), str(path))
            else:
                with open(str(path), 'r+b') as file:
                    file.write(b'b')
                    file.seek(19 << 20)
                    file.write(b'b')
        if len(pieces) == 2 and way != 'in place':
            raise chirpwire.Disconnected('cut')
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as getting, \
            pytest.raises(chirpwire.Changed):
        with getting._moving(None, None, None) as meter:
            options = chirpmove.Options(True, False, 'skip')
            move = chirpdownload.Download(getting, meter, getting.unkept, options)
            move.stream(b'/file', change, given)


@pytest.mark.skipif(os.name != 'posix', reason='modes')
def test_what_may_not_be_looked_at_is_told(tmp_path):
    """In a folder that may be read but not entered: each of its names."""
    let_others_in(tmp_path)
    closed = tmp_path / 'served' / 'tree' / 'closed'
    (closed / 'folder').mkdir(parents=True)
    write(closed / 'file', b'x')
    os.chmod(str(closed), 0o444)
    try:
        with forked_server(tmp_path / 'served', 65534 if os.getuid() == 0 else os.getuid()) as address, \
                chirpclient.ChirpClient(*address) as narrow:
            assert {'file', 'folder'} <= {entry.name for entry in narrow.ls('/tree/closed')}
            with pytest.raises(chirpwire.Incomplete) as failed:
                narrow.get('/tree', str(tmp_path / 'got'))
    finally:
        os.chmod(str(closed), 0o755)
    assert sorted(failed.value.failures) == [('/tree/closed/file', 'not authorized'),
                                             ('/tree/closed/folder', 'not authorized')]


@pytest.mark.skipif(os.getuid() != 0, reason='reads what nobody may read')
def test_what_its_owner_may_not_read_is_gone_on_from(tmp_path):
    """Files and folders of an earlier attempt; also those that have changed since."""
    let_others_in(tmp_path)
    folder, source = tmp_path / 'served', tmp_path / 'tree'
    part = folder / os.path.basename(chirplocal.local_part(str(folder / 'new')))
    for top in part, source:
        for mode in 0, 0o200, 0o111, 0o444:
            inner = top / ('folder%o' % mode)
            inner.mkdir(parents=True)
            for name, size in ('small', 1), ('large', 100000):
                write(inner / name, b'x' * size, mode)
                write(inner / ('other ' + name), top.name[:1].encode() * size, mode)
            os.chmod(str(inner), mode)
    subprocess.check_call(['chown', '-R', '65534:65534', str(folder)])
    with forked_server(folder, 65534) as address, chirpclient.ChirpClient(*address) as narrow:
        narrow.put(str(source), '/new')
    assert seen(folder / 'new') == seen(source) and os.listdir(str(folder)) == ['new']


def make_two_sources(folder):
    """`one` and `two`, each with a `file` and a `tree` of its own, and `served`, an empty folder."""
    for name in 'one', 'two':
        (folder / name / 'tree').mkdir(parents=True)
        write(folder / name / 'file', name.encode() * 2000000)
        for number in range(100):
            write(folder / name / 'tree' / ('%s %d' % (name, number)), b'x' * 30000)
    (folder / 'served').mkdir()


@pytest.mark.parametrize('what', ['file', 'tree'])
def test_two_that_are_put_to_one_place_are_not_mixed(tmp_path, what):
    """By two processes, which know nothing of each other, and by another path; the first one's connection
    breaks meanwhile."""
    make_two_sources(tmp_path)
    (tmp_path / 'served' / 'link').symlink_to('.')
    with our_server(tmp_path / 'served') as server, CuttingProxy(server.address) as proxy, \
            CuttingProxy(server.address) as other:             # of another address: another server, to us
        proxy.hold = 1 << 20

        def move():
            with chirpclient.ChirpClient(*proxy.address, timeout=20) as moving:
                moving.put(str(tmp_path / 'one' / what), '/target')
        first = threading.Thread(target=move)
        first.start()
        wait_until(lambda: proxy.up > proxy.hold)
        with chirpclient.ChirpClient(*other.address) as second:
            with pytest.raises(chirpwire.Busy, match='another transfer to .*target is under way'):
                second.put(str(tmp_path / 'two' / what), '/link/target')
            proxy.end(0)
            proxy.gate.set()
            first.join()
            assert seen(tmp_path / 'served' / 'target') == seen(tmp_path / 'one' / what)
            second.put(str(tmp_path / 'two' / what), '/link/./target')
    assert sorted(os.listdir(str(tmp_path / 'served'))) == ['link', 'target']


def test_a_place_is_a_new_connections_once_the_old_one_writes_no_more(tmp_path, monkeypatch):
    """What it had taken in already would land in what the new one writes."""
    write_all, writes, go_on = chirpserver.write_all, threading.Event(), threading.Event()

    def slow(*words):
        writes.set()
        assert go_on.wait(20)
        write_all(*words)
    monkeypatch.setattr(chirpserver, 'write_all', slow)

    def hold(connection):
        wire = connection.connect()
        wire.put(connection.ask('hold', b'/a', 'the mark of both'))
        try:
            return connection.result(wire) == 0
        except chirpwire.Refused as refused:
            assert refused.code == chirpwire.BUSY
    with our_server(tmp_path) as server, chirpclient.ChirpClient(*server.address) as old, \
            chirpclient.ChirpClient(*server.address) as new:
        assert hold(old)
        number, _ = old.open('/a', 'wct')
        wire = old.connect()
        wire.put(old.ask('pwrite', number, 100000, 0) + b'o' * 100000)
        wire.flush()
        assert writes.wait(20)
        old.disconnect()
        for _ in range(3):
            assert not hold(new)
        go_on.set()
        wait_until(lambda: hold(new))
        new.unlink('/a')
        new.putfile('/a', b'new')
        assert (tmp_path / 'a').read_bytes() == b'new'


def test_a_file_that_is_begun_anew_is_another_one(client, served, tmp_path):  # noqa: F811
    """A connection that has just ended may still write to the old one."""
    part = served[1] / chirpwire.part_name(b'target').decode()
    source = write(tmp_path / 'source', b'new' * 1000000)
    client.putfile('/' + part.name, b'of an earlier attempt')
    with open(str(part), 'r+b') as earlier:
        client.put(str(source), '/target')
        earlier.write(b'late' * 1000000)
    assert (served[1] / 'target').read_bytes() == source.read_bytes()


@pytest.mark.parametrize('what', ['file', 'tree'])
@pytest.mark.parametrize('ways', ['put put', 'put get', 'get put'])
def test_servers_of_one_folder_and_who_fetches_to_it_are_kept_apart(tmp_path, what, ways):
    """As guests that share a home: the second of two moves to a place is refused; none ends with half."""
    make_two_sources(tmp_path)
    with our_server(tmp_path / 'served') as one, our_server(tmp_path / 'served') as other, \
            our_server(tmp_path) as all_of_it, CuttingProxy(one.address) as putting, \
            CuttingProxy(all_of_it.address) as getting:
        def move(way, folder, address):
            with chirpclient.ChirpClient(*address, timeout=20) as moving:
                if way == 'put':
                    moving.put(str(tmp_path / folder / what), '/target')
                else:
                    moving.get('/%s/%s' % (folder, what), str(tmp_path / 'served' / 'target'))
        first, second = ways.split()
        proxy = putting if first == 'put' else getting
        proxy.hold = 1 << 20
        thread = threading.Thread(target=move, args=(first, 'one', proxy.address))
        thread.start()
        wait_until(lambda: max(proxy.up, proxy.down) > proxy.hold)
        address = other.address if second == 'put' else all_of_it.address
        with pytest.raises(chirpwire.Busy, match='another transfer to .*target is under way'):
            move(second, 'two', address)
        proxy.gate.set()
        thread.join()
        assert seen(tmp_path / 'served' / 'target') == seen(tmp_path / 'one' / what)
        if what == 'file':
            move(second, 'two', address)
            assert seen(tmp_path / 'served' / 'target') == seen(tmp_path / 'two' / what)
        # Each server looks, as it ends, whether threads are left; those of another one's connections, too.
        wait_until(lambda: not [one for one in threading.enumerate() if one.name.startswith('chirp-')])
    assert sorted(os.listdir(str(tmp_path / 'served'))) == ['target']


@pytest.mark.skipif(not REAL, reason='needs chirp_server of cctools')
@pytest.mark.parametrize('loses', ['file', 'content', 'large', 'folder', 'more'])
def test_what_another_client_does_to_what_goes_to_chirp_server_is_told(tmp_path, loses, monkeypatch):
    """It keeps nobody out: two programs may put to one target, and each removes what the other brought."""
    for name in 'a', 'b':
        (tmp_path / 'tree' / name).mkdir(parents=True)
        for number in range(5):
            os.utime(str(write(tmp_path / 'tree' / name / str(number), b'x' * 1000)), (1e9, 1e9))
        write(tmp_path / 'tree' / name / 'large', b'x' * 1000000)
    for name in 'scratch', 'served':
        (tmp_path / name).mkdir()
    let_others_in(tmp_path / 'served')
    put_folder = chirpupload.Upload._put_folder
    part = chirplocal.local_part(str(tmp_path / 'served' / 'target'))

    def and_another(upload, source, target, merge):
        put_folder(upload, source, target, merge)
        name = os.path.basename(source)
        if name in 'ab' and sorted(os.listdir(part)) == ['.__acl', 'a', 'b']:
            folder = os.path.join(part, 'a' if name == 'b' else 'b')
            if loses == 'folder':
                shutil.rmtree(folder)
            elif loses in ('file', 'large'):
                os.unlink(os.path.join(folder, '1' if loses == 'file' else 'large'))
            else:
                with open(os.path.join(folder, '1' if loses == 'content' else 'new'), 'w') as file:
                    file.write('y' * 1000)
    monkeypatch.setattr(chirpupload.Upload, '_put_folder', and_another)
    with real_server(tmp_path / 'served', tmp_path / 'scratch') as address, \
            chirpclient.ChirpClient(*address) as moving:
        with pytest.raises(chirpwire.Changed, match='does another transfer go there'):
            moving.put(str(tmp_path / 'tree'), '/target')
        assert not os.path.exists(str(tmp_path / 'served' / 'target'))
        monkeypatch.undo()
        moving.put(str(tmp_path / 'tree'), '/target')
        moving.get('/target', str(tmp_path / 'again'))
        assert seen(tmp_path / 'again') == seen(tmp_path / 'tree')
        write(tmp_path / 'tree' / '\nnot to be listed', b'x')
        moving.put(str(tmp_path / 'tree'), '/other')
        assert (tmp_path / 'served' / 'other' / '\nnot to be listed').read_bytes() == b'x'


@pytest.mark.parametrize('how', ['made anew', 'mounted', 'a link'])
def test_the_folder_that_has_the_path_now_is_served(tmp_path, how):
    """But for a link: whoever may make one there doesn't choose what is served."""
    served, other = tmp_path / 'served', tmp_path / 'other'  # noqa: F811
    for folder in served, other:
        folder.mkdir()
    source = write(tmp_path / 'source', b'x')
    with our_server(served) as server:
        if how == 'mounted':
            if subprocess.call(['mount', '-t', 'tmpfs', 'none', str(served)], stderr=subprocess.DEVNULL):
                pytest.skip('a tmpfs can not be mounted here')
        else:
            os.rename(str(served), str(tmp_path / 'old'))
            os.rename(str(other), str(served)) if how == 'made anew' else os.symlink(str(other), str(served))
        try:
            with chirpclient.ChirpClient(*server.address) as moving:
                moving.put(str(source), '/target')
            assert os.listdir(str(tmp_path / 'old' if how == 'a link' else served)) == ['target']
        finally:
            if how == 'mounted':
                subprocess.check_call(['umount', '-l', str(served)])


@pytest.mark.parametrize('way', ['put', 'get'])
def test_a_part_that_is_another_file_too_is_left_alone(tmp_path, way):
    source, target = tmp_path / 'here', tmp_path / 'served'
    if way == 'get':
        source, target = target, source
    for folder in source, target:
        folder.mkdir()
    write(source / 'new', b'n' * 100000)
    other = write(target / 'other', b'n' * 50000)
    os.link(str(other), chirplocal.local_part(str(target / 'new')))
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as moving:
        moving.put(str(source / 'new'), '/new') if way == 'put' else moving.get('/new', str(target / 'new'))
    assert (target / 'new').read_bytes() == b'n' * 100000 and other.read_bytes() == b'n' * 50000
    assert sorted(os.listdir(str(target))) == ['new', 'other']


@pytest.mark.parametrize('way', ['put', 'get'])
def test_what_is_mounted_where_a_part_is_to_be_keeps_its_content(tmp_path, way):
    """A folder, one in a partial folder, and a file; of the same disk, too."""
    mine = tmp_path / 'mine'
    for folder in mine, tmp_path / 'here' / 'tree' / 'sub', tmp_path / 'served':
        folder.mkdir(parents=True)
    for path in mine / 'kept', tmp_path / 'here' / 'file', tmp_path / 'here' / 'tree' / 'sub' / 'file':
        write(path, b'content')
    sources, targets = (tmp_path / name for name in (
        ('here', 'served') if way == 'put' else ('served', 'here')))
    if way == 'get':
        sources.rmdir()
        targets.rename(sources)
        targets.mkdir()
    tree, file = (chirplocal.local_part(str(targets / name)) for name in ('tree', 'file'))
    os.makedirs(tree + '/sub')
    write(targets / os.path.basename(file), b'')
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as moving:
        for what, place, name in (
                (mine, tree, 'tree'), (mine / 'kept', file, 'file'), (mine, tree + '/sub', 'tree')):
            if subprocess.call(['mount', '--bind', str(what), place], stderr=subprocess.DEVNULL):
                pytest.skip('nothing can be mounted here')
            try:
                with pytest.raises((chirpwire.ChirpError, OSError), match='mounted|busy'):
                    if way == 'put':
                        moving.put(str(sources / name), '/' + name)
                    else:
                        moving.get('/' + name, str(targets / name))
            finally:
                if place.endswith('sub'):      # the others of its folder have their place by now
                    place = str(targets / name / 'sub')
                subprocess.check_call(['umount', '-l', place])
            assert (mine / 'kept').read_bytes() == b'content'


@pytest.mark.parametrize('what', ['file', 'tree'])
@pytest.mark.parametrize('way', ['put', 'get'])
def test_a_socket_that_has_a_parts_name_goes(tmp_path, way, what):
    source, target = tmp_path / 'here', tmp_path / 'served'
    if way == 'get':
        source, target = target, source
    (source / 'tree').mkdir(parents=True)
    target.mkdir()
    write(source / 'file', b'x')
    with socket.socket(socket.AF_UNIX) as made, working_in(target):
        made.bind(os.path.basename(chirplocal.local_part('new')))
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as moving:
        moving.put(str(source / what), '/new') if way == 'put' else \
            moving.get('/' + what, str(target / 'new'))
    assert os.listdir(str(target)) == ['new']


@contextlib.contextmanager
def working_in(folder):
    """Works in a folder: a socket's path must be short."""
    before = os.getcwd()
    os.chdir(str(folder))
    try:
        yield
    finally:
        os.chdir(before)


def test_a_folder_that_can_not_be_made_has_not_arrived_in_part(tmp_path):
    """Where the disk has no inodes: nothing is there to be gone on from."""
    (tmp_path / 'served').mkdir()
    (tmp_path / 'tree').mkdir()
    if subprocess.call(['mount', '-t', 'tmpfs', '-o', 'nr_inodes=1', 'none', str(tmp_path / 'served')],
                       stderr=subprocess.DEVNULL):
        pytest.skip('a tmpfs can not be mounted here')
    try:
        with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as moving, \
                pytest.raises(chirpwire.Refused, match='^/tree: no space left$'):
            moving.put(str(tmp_path / 'tree'), '/tree')
    finally:
        subprocess.check_call(['umount', '-l', str(tmp_path / 'served')])


@pytest.mark.parametrize('way, mover', [('put', chirpupload.Upload), ('get', chirpdownload.Download)])
@pytest.mark.parametrize('what', ['file', 'folder'])
def test_what_is_in_a_folders_way_at_the_end_is_named(tmp_path, monkeypatch, way, mover, what):
    """Not its partial folder alone, of which a person knows nothing; and what was made meanwhile stays."""
    for name in 'here', 'served':
        (tmp_path / name).mkdir()
    source, target = tmp_path / 'here', tmp_path / 'served'
    if way == 'get':
        source, target = target, source
    (source / 'tree').mkdir()
    write(source / 'tree' / 'x', b'x')
    move_folder, made = getattr(mover, '_%s_folder' % way), target / 'new'

    def and_make(*args):
        move_folder(*args)
        if what == 'folder':
            made.mkdir()
        write(made / 'theirs' if what == 'folder' else made, b'theirs')
    monkeypatch.setattr(mover, '_%s_folder' % way, and_make)
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as moving:
        with pytest.raises((OSError, chirpwire.Refused), match='made meanwhile; what has arrived') as told:
            moving.put(str(source / 'tree'), '/new') if way == 'put' else \
                moving.get('/tree', str(target / 'new'))
        assert 'new' in agent.sentence(told.value)
    assert (made / 'theirs' if what == 'folder' else made).read_bytes() == b'theirs'


def test_where_links_lead_that_can_not_be_followed_is_told(tmp_path):
    (tmp_path / 'served' / 'tree').mkdir(parents=True)
    links = {'loop': 'loop', 'dangling': 'missing', 'outside': '/etc/passwd'}
    for name, leads in links.items():
        os.symlink(leads, str(tmp_path / 'served' / 'tree' / name))
    write(tmp_path / 'served' / 'tree' / 'x', b'x')
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as moving, \
            pytest.raises(chirpwire.Incomplete) as incomplete:
        moving.get('/tree', str(tmp_path / 'here'), links='follow')
    assert dict(incomplete.value.failures) == {
        '/tree/' + name: 'a link to %s, where nothing is that is served' % leads
        for name, leads in links.items()}
    assert os.listdir(str(tmp_path / 'here')) == ['x']


def test_a_failures_path_is_told_whole(tmp_path, monkeypatch):
    """A program needs it so; what a person reads is short, and so are the many that a guest may make up."""
    (tmp_path / 'served').mkdir()
    folder = tmp_path / 'tree' / ('x' * 200) / ('y' * 200)
    folder.mkdir(parents=True)
    os.mkfifo(str(folder / 'fifo'))
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as moving:
        with pytest.raises(chirpwire.Incomplete) as incomplete:
            moving.put(str(tmp_path / 'tree'), '/tree')
        assert [path for path, _ in incomplete.value.failures] == [str(folder / 'fifo')]
        assert len(str(incomplete.value)) < 400
        monkeypatch.setattr(chirpmove, 'LONG_PATHS', 0)
        with pytest.raises(chirpwire.Incomplete) as incomplete:
            moving.put(str(tmp_path / 'tree'), '/tree')
        assert len(incomplete.value.failures[0][0]) < 300


def test_room_that_was_just_made_counts(tmp_path, monkeypatch):
    """As on Btrfs, which tells it once it has written down what was deleted."""
    free = [1000]
    monkeypatch.setattr(chirplocal, 'free_here', lambda _: free[0])
    monkeypatch.setattr(os, 'sync', lambda: free.append(free.pop() + 1000))
    chirplocal.check_room(str(tmp_path), 2000)
    with pytest.raises(OSError, match='4000 bytes are needed, 3000 are free'):
        chirplocal.check_room(str(tmp_path), 4000)


def test_parts_of_what_the_source_has_no_more_go_though_something_failed(tmp_path):
    """And that of a file that failed stays, to be gone on from."""
    (tmp_path / 'served').mkdir()
    (tmp_path / 'tree' / 'folder').mkdir(parents=True)
    os.mkfifo(str(tmp_path / 'tree' / 'folder' / 'fifo'))
    os.mkfifo(str(tmp_path / 'tree' / 'failed'))
    part = tmp_path / 'served' / os.path.basename(chirplocal.local_part('tree'))
    part.mkdir()
    for name in 'failed', 'gone':
        write(part / os.path.basename(chirplocal.local_part(name)), b'x' * 100000)
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as moving, \
            pytest.raises(chirpwire.Incomplete):
        moving.put(str(tmp_path / 'tree'), '/tree')
    assert sorted(os.listdir(str(tmp_path / 'served' / 'tree'))) == [
        os.path.basename(chirplocal.local_part('failed')), 'folder']


@pytest.mark.parametrize('way', ['put', 'get'])
def test_a_large_file_in_a_folder_is_gone_on_with(tmp_path, way):
    """The rest of it comes, and not all of it again; what was begun of others goes."""
    source, target = tmp_path / 'here', tmp_path / 'served'
    if way == 'get':
        source, target = target, source
    (source / 'tree').mkdir(parents=True)
    content = os.urandom(4 << 20)
    write(source / 'tree' / 'large', content)
    part = target / os.path.basename(chirplocal.local_part('tree'))
    part.mkdir(parents=True)
    write(part / os.path.basename(chirplocal.local_part('large')), content[:3 << 20])
    write(part / os.path.basename(chirplocal.local_part('gone')), content[:1000])
    with our_server(tmp_path / 'served') as server, CuttingProxy(server.address) as proxy, \
            chirpclient.ChirpClient(*proxy.address) as moving:
        moving.put(str(source / 'tree'), '/tree') if way == 'put' else \
            moving.get('/tree', str(target / 'tree'))
        assert 1 << 20 <= max(proxy.up, proxy.down) < 2 << 20
    assert seen(target / 'tree') == seen(source / 'tree')


def test_a_folder_is_not_copied_into_itself(tmp_path):
    """As cp has it, where what is served is on this machine; what begins with its name is another one."""
    tree = tmp_path / 'served' / 'tree'
    (tree / 'inner').mkdir(parents=True)
    write(tree / 'x', b'x')
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as moving:
        for move in (lambda: moving.put(str(tree), '/tree'), lambda: moving.put(str(tree), '/tree/tree'),
                     lambda: moving.put(str(tree), '/tree/inner/new'),
                     lambda: moving.get('/tree', str(tree / 'inner' / 'new')),
                     lambda: moving.get('/', str(tree / 'new'))):
            with pytest.raises(OSError, match='into itself'):
                move()
        (tmp_path / 'served' / 'link').symlink_to('/tree')     # within what is served
        with pytest.raises(OSError, match='into itself'):
            moving.get('/link', str(tree / 'inner' / 'new'))
        assert sorted(os.listdir(str(tree))) == ['inner', 'x'] and os.listdir(str(tree / 'inner')) == []
        (tmp_path / 'served' / 'top').symlink_to('/')
        moving.get('/top', str(tmp_path / 'copy'), links='skip')
        assert os.listdir(str(tmp_path / 'copy')) == ['tree']
        moving.put(str(tree), '/tree2')
        moving.get('/tree/inner', str(tree / 'inner2'))
        moving.put(str(tree / 'inner'), '/tree/inner3')
