"""Checksums of what is moved: what they are, and that they are of what is there."""

import hashlib
import os
import zlib

import pytest
from test_chirp import our_server, write

import chirpclient
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
def test_what_differs_in_one_byte_is_not_the_same(tmp_path, size, monkeypatch):
    """Wherever that is, in one window or in several."""
    monkeypatch.setattr(chirpclient, 'WINDOW', 1 << 20)
    content = os.urandom(size)
    meter = chirpclient.Meter(None, None)
    with our_server(tmp_path) as server, chirpclient.ChirpClient(*server.address) as client:
        there = write(tmp_path / 'there', content)
        write(tmp_path / 'here', content)
        with open(str(tmp_path / 'here'), 'r+b', buffering=0) as here:
            assert client.has_same(b'/there', here, size, meter)
            for at in 0, size // 2, size - 1:
                there.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
                assert not client.has_same(b'/there', here, size, meter)
            assert not client.has_same(b'/missing', here, size, meter)
