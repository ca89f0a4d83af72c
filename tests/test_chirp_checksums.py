"""Checksums of what is moved: what they are, which one is taken, and that they are of what is there."""

import os
import zlib

import pytest
from helpers import wait_until
from hypothesis import given
from hypothesis import strategies as st
from test_chirp import our_server, write

import chirpclient
import chirprequests
import chirpserver
import chirpwire


def openssl():
    """What there is of it, however fast."""
    try:
        return chirpwire.Libcrypto()
    except (ImportError, OSError, AttributeError) as error:
        pytest.skip("OpenSSL isn't at hand by way of hashlib: %s" % error)


@pytest.fixture(params=['crc32', 'gmac'])
def checksum(request, monkeypatch):
    """The one that two of ours verify large files with."""
    library = openssl() if request.param == 'gmac' else None
    monkeypatch.setattr(chirpwire, 'libcrypto', lambda: library)
    monkeypatch.setattr(chirprequests, 'LARGE', 1 << 20)
    return request.param


# --- what they are --------------------------------------------------------------------------------

HASH_KEY = 0x66e94bd4ef8a2c3b884cfa59ca342b2e          # zeros, encrypted by AES with a key of zeros
MASK = 0x58e2fccefa7e3061367f1d57a4e7455a              # and the first counter (GCM's test case 1)


def multiplied(x, y):
    """The product of two blocks (NIST SP 800-38D, 6.3)."""
    product = 0
    for bit in reversed(range(128)):
        if x >> bit & 1:
            product ^= y
        y = y >> 1 ^ (0xe1 << 120 if y & 1 else 0)
    return product


def gmac(content):
    """By the book (NIST SP 800-38D, 6.4 and 7.1)."""
    state = 0
    padded = content + bytes(-len(content) % 16) + (8 * len(content)).to_bytes(8, 'big') + bytes(8)
    for at in range(0, len(padded), 16):
        state = multiplied(state ^ int.from_bytes(padded[at:at + 16], 'big'), HASH_KEY)
    return (state ^ MASK).to_bytes(16, 'big')


@given(st.lists(st.binary(max_size=70)))
def test_gmac_is_by_the_book_in_any_pieces(pieces):
    library = openssl()
    found = chirpwire.Gmac(library, library.new())
    for index, piece in enumerate(pieces):
        found.update(piece if index % 2 else memoryview(bytearray(piece)))
        if index % 3 == 2:
            found.digest()                             # asked for on the way
            found = found.copy()
    assert found.digest() == gmac(b''.join(pieces))


def test_crc32_is_zlibs():
    found = chirpwire.new_hash('crc32', b'12345')
    found.update(b'6789')
    assert found.digest() == bytes.fromhex('cbf43926') == zlib.crc32(b'123456789').to_bytes(4, 'big')


# --- which one is taken ---------------------------------------------------------------------------

def test_gmac_is_for_large_files_where_both_have_it(tmp_path, monkeypatch):
    library = openssl()
    monkeypatch.setattr(chirpwire, 'libcrypto', lambda: library)
    with our_server(tmp_path) as server, chirpclient.ChirpClient(*server.address) as client:
        assert client.algorithm() == client.algorithm(chirprequests.LARGE - 1) == 'crc32'
        assert client.algorithm(chirprequests.LARGE) == 'gmac'
        monkeypatch.setattr(chirpwire, 'libcrypto', lambda: None)
        assert client.algorithm(chirprequests.LARGE) == 'crc32'
        with pytest.raises(chirpwire.Refused, match='invalid'):
            client.hash('/', 'gmac')
        write(tmp_path / 'file', b'x')
        number, _ = client.open('/file', 'r')
        for other in ('gmac', 'sha1', 'crc33'):
            with pytest.raises(chirpwire.Refused, match='invalid'):
                client.call('hashread', number, other)
        client.disconnect()
        monkeypatch.setattr(chirpwire, 'libcrypto', lambda: library)
        monkeypatch.delitem(chirpserver.COMMANDS, b'gmac')
        assert client.algorithm(chirprequests.LARGE) == 'crc32'
        client.disconnect()
        monkeypatch.delitem(chirpserver.COMMANDS, b'crc32')
        assert client.algorithm(chirprequests.LARGE) == 'sha1'


@pytest.mark.parametrize('fault', ['missing', 'wrong', 'slow'])
def test_an_openssl_that_is_of_no_use_is_left_alone(monkeypatch, fault):
    openssl()

    def missing():
        raise AttributeError('EVP_EncryptUpdate')
    if fault == 'missing':
        monkeypatch.setattr(chirpwire, 'Libcrypto', missing)
    elif fault == 'wrong':
        monkeypatch.setattr(chirpwire, 'GMAC_OF_BYTES', bytes(16))
    seconds = {zlib.crc32: 0.4 if fault == 'slow' else 0.6}
    monkeypatch.setattr(chirpwire, 'quickest', lambda do, content: seconds.get(do, 0.5))
    assert chirpwire.libcrypto.__wrapped__() is None
    monkeypatch.undo()
    monkeypatch.setattr(chirpwire, 'quickest', lambda do, content: 0.6 if do is zlib.crc32 else 0.5)
    assert chirpwire.libcrypto.__wrapped__() is not None


# --- that they are of what is there -----------------------------------------------------------------

def test_what_passes_is_not_read_again_for_its_checksum(tmp_path, monkeypatch, checksum):
    """Between two of ours. What the file became after it was read has another checksum."""
    (tmp_path / 'served').mkdir()
    content = os.urandom(chirpclient.BESIDE + 1000)
    source = write(tmp_path / 'source', content)

    def no_reading(fd, algorithm):
        assert os.fstat(fd).st_size == 0, 'it is read again'
        return chirpwire.new_hash(algorithm)
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as moving:
        assert moving.algorithm(len(content)) == checksum
        with monkeypatch.context() as patch:
            patch.setattr(chirpserver, 'hash_file', no_reading)
            moving.put(str(source), '/there')
            server.checksums = chirpserver.Checksums()       # what the upload left
            moving.get('/there', str(tmp_path / 'back'))
        assert (tmp_path / 'back').read_bytes() == content
        write(tmp_path / 'served' / 'there', b'another')
        assert moving.hash('/there', checksum) == chirpwire.new_hash(checksum, b'another').digest()


@pytest.mark.parametrize('begin', ['hash', 'read'])
def test_a_checksum_is_of_what_is_there_whatever_its_times_say(tmp_path, begin, checksum):
    with our_server(tmp_path) as server, chirpclient.ChirpClient(*server.address) as client:
        path = write(tmp_path / 'file', b'before')
        if begin == 'hash':
            assert client.hash('/file', checksum) == chirpwire.new_hash(checksum, b'before').digest()
        else:
            number, _ = client.open('/file', 'r')
            assert client.call('hashread', number, checksum) == 0
            assert client.pread(number, 100, 0) == b'before'
        changed = path.stat().st_ctime_ns

        def write_again():
            write(path, b'after.')
            return path.stat().st_ctime_ns != changed       # the clock of files ticks every few ms
        wait_until(write_again)
        if begin == 'read':
            client.close(number)
        assert client.hash('/file', checksum) == chirpwire.new_hash(checksum, b'after.').digest()


@pytest.mark.parametrize('meddle', ['write', 'write and close', 'truncate', 'ftruncate', 'a program'])
def test_a_checksum_is_of_what_is_there_whoever_wrote_it(tmp_path, meddle, checksum):
    """Two clients write to one file, as those do that put to one place at the same time."""
    with our_server(tmp_path) as server, chirpclient.ChirpClient(*server.address) as client, \
            chirpclient.ChirpClient(*server.address) as other:
        number, _ = client.open('/file', 'wc')
        client.hash('/file', checksum)
        client.pwrite(number, b'a' * 1000, 0)
        if meddle.startswith('write'):
            second, _ = other.open('/file', 'w')
            other.pwrite(second, b'b' * 500, 0)
            if meddle == 'write and close':
                other.close(second)
        elif meddle == 'a program':
            with open(str(tmp_path / 'file'), 'r+b') as file:
                wait_until(lambda: replace_start(file) != os.fstat(file.fileno()).st_mtime_ns)
        else:
            truncate = {'truncate': lambda size: other.truncate('/file', size),
                        'ftruncate': lambda size: client.ftruncate(number, size)}[meddle]
            truncate(500)
            truncate(1000)
        client.pwrite(number, b'a' * 1000, 1000)
        client.close(number)
        content = (tmp_path / 'file').read_bytes()
        assert len(content) == 2000 and content != b'a' * 2000
        assert client.hash('/file', checksum) == chirpwire.new_hash(checksum, content).digest()


def replace_start(file):
    """The time of change before it."""
    before = os.fstat(file.fileno()).st_mtime_ns
    file.seek(0)
    file.write(b'b')
    file.flush()
    return before
