"""Checksums of what is moved: what they are, and that they are of what is there."""

import hashlib
import os
import zlib

import pytest
from test_chirp import our_server, write

import chirpclient
import chirpdownload
import chirpmove
import chirpupload
import chirpwire


@pytest.mark.parametrize('algorithm', ['crc32', 'sha1', 'md5'])
def test_a_checksum_is_of_all_that_came(algorithm):
    content = os.urandom(100000)
    checksum = chirpwire.new_hash(algorithm, content[:777])
    checksum.update(memoryview(content)[777:])
    assert checksum.digest() == (zlib.crc32(content).to_bytes(4, 'big') if algorithm == 'crc32'
                                 else hashlib.new(algorithm, content).digest())


def test_a_server_of_ours_has_the_checksum_of_any_part(tmp_path):
    content = os.urandom(200000)
    with our_server(tmp_path) as server, chirpclient.ChirpClient(*server.address) as client:
        write(tmp_path / 'with blank', content)
        for start, count in (0, 200000), (0, 1 << 60), (777, 150000), (200000, 5), (1 << 62, 1), (0, 0):
            algorithm, request = client.asking_for_digest('/with blank', start, count)
            wire = client.connect()
            wire.put(request)
            assert algorithm == 'crc32' and client.result(wire) == 4
            assert wire.read(4) == zlib.crc32(content[start:start + count]).to_bytes(4, 'big')
        for words in (b'/missing', 0, 1), (b'/', 0, 1), (b'/with%20blank', -1, 1), (b'/with%20blank', 0, -1):
            with pytest.raises(chirpwire.Refused):
                client.call('crc32', *words)


@pytest.mark.parametrize('size', [1, 100000, 3 << 20])
def test_content_goes_with_its_checksum(tmp_path, size):
    content = os.urandom(size)
    checksum = zlib.crc32(content).to_bytes(4, 'big')
    with our_server(tmp_path) as server, chirpclient.ChirpClient(*server.address) as client:
        number, _ = client.open('/f', 'wc')
        wire = client.connect()
        wire.put(client.ask('pwritecrc32', number, size, 0) + content)
        assert client.result(wire) == size and wire.read(4) == checksum
        client.close(number)
        assert (tmp_path / 'f').read_bytes() == content
        number, _ = client.open('/f')
        wire.put(client.ask('preadcrc32', number, size + 5, 0))
        assert client.result(wire) == size
        assert wire.read(size) == content and wire.read(4) == checksum
        wire.put(client.ask('preadcrc32', number, 5, size))
        assert client.result(wire) == 0 and wire.read(4) == bytes(4)


def move_of(client):
    options = chirpmove.Options(True, False, 'skip')
    return chirpmove.Move(client, chirpmove.Meter(None, None), client.unkept, options)


@pytest.mark.parametrize('size', [1, 100000, 3 << 20])
def test_what_differs_in_one_byte_is_not_the_same(tmp_path, size, monkeypatch):
    """Wherever that is, in one window or in several."""
    monkeypatch.setattr(chirpmove, 'WINDOW', 1 << 20)
    content = os.urandom(size)
    with our_server(tmp_path) as server, chirpclient.ChirpClient(*server.address) as client:
        there = write(tmp_path / 'there', content)
        write(tmp_path / 'here', content)
        has_same = move_of(client)._has_same
        with open(str(tmp_path / 'here'), 'r+b', buffering=0) as here:
            assert has_same(b'/there', here, size)
            for at in 0, size // 2, size - 1:
                there.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
                assert not has_same(b'/there', here, size)
            assert not has_same(b'/missing', here, size)


# --- along with the content ---

def of_pieces(monkeypatch, folder):
    """Pieces of 64 KiB; and an old file of many of them."""
    for module in chirpupload, chirpdownload:
        monkeypatch.setattr(module, 'CHECKED', 65536)
    source = write(folder / 'source', os.urandom(1 << 20))
    os.utime(str(source), (1e9, 1e9))
    return source


def no_second_reading(*words):
    raise AssertionError('all of it is read again')


@pytest.mark.parametrize('way', ['put', 'get'])
def test_what_holds_still_is_read_once(tmp_path, monkeypatch, way):
    source = of_pieces(monkeypatch, tmp_path)
    monkeypatch.setattr(chirpmove.Move, '_has_same', no_second_reading)
    with our_server(tmp_path) as server, chirpclient.ChirpClient(*server.address) as client:
        if way == 'put':
            client.put(str(source), '/target')
        else:
            client.get('/source', str(tmp_path / 'target'))
    assert (tmp_path / 'target').read_bytes() == source.read_bytes()


@pytest.mark.parametrize('way', ['put', 'get'])
def test_a_change_of_what_has_passed_already_is_noticed(tmp_path, monkeypatch, way):
    """Its piece was right, and what arrives would be no state that the file was ever in."""
    source, changed = of_pieces(monkeypatch, tmp_path), []

    def change(moved, total):
        if 200000 < moved < 900000 and not changed:
            changed.append(moved)
            with open(str(source), 'r+b') as file:
                file.write(b'changed')
            os.utime(str(source), (1e9, 1e9))      # what can't be set is the time of that
    monkeypatch.setattr(chirpmove.Meter, 'EVERY', 0)
    with our_server(tmp_path) as server, chirpclient.ChirpClient(*server.address) as client:
        if way == 'put':
            client.put(str(source), '/target', progress=change)
        else:
            client.get('/source', str(tmp_path / 'target'), progress=change)
    assert changed and (tmp_path / 'target').read_bytes() == source.read_bytes()
    assert source.read_bytes().startswith(b'changed')


def test_a_file_may_have_changed_where_its_time_can_not_tell(tmp_path):
    path = write(tmp_path / 'f', b'content')
    os.utime(str(path), (2e9, 2e9))            # as one that is being written
    with our_server(tmp_path) as server, chirpclient.ChirpClient(*server.address) as client:
        number, _ = client.open('/f')
        assert client.has_changed(number)
        os.utime(str(path), (1e9, 1e9))
        number, _ = client.open('/f')
        assert not client.has_changed(number)
        path.write_bytes(b'another')
        os.utime(str(path), (1e9, 1e9))
        assert client.has_changed(number)
