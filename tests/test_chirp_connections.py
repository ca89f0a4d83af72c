"""A folder's small files over more than one connection, to a server that isn't ours.

It is ours here, and says that it isn't.
"""

import os
import threading

import pytest
from cutting import CuttingProxy
from helpers import wait_until
from test_chirp import our_server, seen, write

import chirpclient
import chirpmove
import chirpserver
import chirpsmall
import chirpwire

pytestmark = pytest.mark.ends


@pytest.fixture
def tree(tmp_path):
    """Two folders with small files, of which each has a content of its own, and one with a large file."""
    source = tmp_path / 'source'
    for name in 'a', 'b':
        (source / name).mkdir(parents=True)
        for number in range(8):
            write(source / name / str(number), b'%s %d\n' % (name.encode(), number) * 20, 0o640 + number % 2)
    write(source / 'b' / 'large', os.urandom(chirpwire.SMALL * 2))
    os.symlink('a', str(source / 'link'))
    os.utime(str(source / 'a'), (1e9, 1e9))
    return source


@pytest.fixture
def other(tmp_path, monkeypatch):
    """(server, proxy before it): one that isn't ours, where a connection is worth it for two small files."""
    monkeypatch.delitem(chirpserver.COMMANDS, b'vmhost')
    monkeypatch.setattr(chirpsmall, 'FURTHER_WORTH', 2)
    monkeypatch.setattr(chirpmove.Meter, 'EVERY', 0)
    (tmp_path / 'served').mkdir()
    with our_server(tmp_path / 'served') as server, CuttingProxy(server.address) as proxy:
        yield server, proxy


def put(proxy, tree, target='/target', timeout=20, **options):
    with chirpclient.ChirpClient(*proxy.address, timeout=timeout) as moving:
        moving.put(str(tree), target, **options)


def test_small_files_go_over_two_connections(other, tree, tmp_path):
    server, proxy = other
    put(proxy, tree)
    assert seen(tmp_path / 'served' / 'target') == seen(tree)
    assert len(proxy.connections) == 2
    missing = tmp_path / 'served' / 'target' / 'a' / '3'
    missing.unlink()
    put(proxy, tree)
    assert missing.read_bytes() == (tree / 'a' / '3').read_bytes()
    assert len(proxy.connections) == 3         # there was not enough to send for another one
    wait_until(lambda: not server._sessions)


def test_each_failure_is_told_whatever_connection_it_is_on(other, tree, tmp_path, monkeypatch):
    real = chirpserver.WholeFiles.putfile

    def putfile(self, path, mode, length):
        if path.endswith((b'4', b'5')):
            raise chirpserver.Fault(chirpwire.NOT_AUTHORIZED)
        return real(self, path, mode, length)
    monkeypatch.setattr(chirpserver.WholeFiles, 'putfile', putfile)
    with pytest.raises(chirpwire.Incomplete) as info:
        put(other[1], tree)
    refused = ['a/4', 'a/5', 'b/4', 'b/5']
    assert sorted(os.path.relpath(path, str(tree)) for path, _ in info.value.failures) == refused
    for path in refused:
        (tree / path).unlink()
        os.utime(str(tree / path[0]), (1e9, 1e9))
    there, here = seen(tmp_path / 'served' / 'target'), seen(tree)
    assert {**there, b'b': None} == {**here, b'b': None} and len(other[1].connections) == 2


@pytest.mark.parametrize('way', ['refused', 'unserved'])
def test_a_second_connection_that_is_not_to_be_had_just_means_one(tmp_path, other, tree, way, monkeypatch):
    server, proxy = other
    monkeypatch.setattr(chirpsmall, 'FURTHER_SOON', 0.2)
    if way == 'refused':
        proxy.most = 1
    else:
        server._max_clients = 1
    put(proxy, tree)
    assert seen(tmp_path / 'served' / 'target') == seen(tree)
    assert len(proxy.connections) == (1 if way == 'refused' else 2)


@pytest.mark.parametrize('silently', [False, True])
@pytest.mark.parametrize('way', ['up', 'down'])
def test_a_second_connection_that_stops_anywhere_just_means_one(other, tree, tmp_path, way, silently):
    proxy = other[1]
    proxy.silently = silently
    for at in (9, 200) if silently else range(0, 3000, 61 if way == 'up' else 11):
        first, target, moved = len(proxy.connections), '/target%d' % at, []
        proxy.stops = first + 1, way, at
        put(proxy, tree, target, 1 if silently else 20, progress=lambda *now, moved=moved: moved.append(now))
        assert seen(tmp_path / 'served' / target[1:]) == seen(tree)
        assert moved[-1][0] == moved[-1][1]
        made = len(proxy.connections) - first
        assert made <= 3
        if made == 2 and at > 100:     # all went through, and before that it was there early enough
            return
    assert silently


def test_the_first_connection_stops_anywhere(other, tree, tmp_path):
    """And it is gone on with two."""
    proxy = other[1]
    for at in range(0, 8000, 397):
        first, target = len(proxy.connections), '/target%d' % at
        proxy.stops = first, 'up', at
        try:
            put(proxy, tree, target)
        except (chirpwire.AccessDenied, chirpwire.Disconnected):
            assert at < 100            # before it was let in
            continue
        assert seen(tmp_path / 'served' / target[1:]) == seen(tree)


def test_what_is_cancelled_ends_on_both(other, tree, tmp_path):
    server, proxy = other
    proxy.stops, proxy.silently, cancel = (1, 'up', 300), True, threading.Event()
    thread = threading.Thread(target=lambda: pytest.raises(
        chirpwire.Cancelled, put, proxy, tree, cancel=cancel))
    thread.start()
    wait_until(lambda: len(proxy.connections) == 2)
    cancel.set()
    thread.join(10)
    assert not thread.is_alive()
    assert not (tmp_path / 'served' / 'target').exists()
    proxy.stops = None
    proxy.gate.set()
    wait_until(lambda: not server._sessions)
    put(proxy, tree)
    assert seen(tmp_path / 'served' / 'target') == seen(tree)
    assert os.listdir(str(tmp_path / 'served')) == ['target']
