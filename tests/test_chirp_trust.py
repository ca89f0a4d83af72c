"""Who is let in by a server of ours, what of the spool is seen, and TLS."""

import contextlib
import hashlib
import hmac
import os
import shutil
import socket
import ssl
import subprocess
import time

import pytest
from agents import Agent, Host
from test_chirp import our_server, write
from test_chirp_hostile import HostileServer, all_of

import chirpclient
import chirpserver
import chirpwire

SECRET = bytes(range(32))


def guarded(folder, **options):
    """A server that lets in who knows SECRET."""
    return our_server(folder, auth='secret', secret=SECRET, id='g', allow=None, **options)


def knows(server, secret=SECRET, id='g', **options):
    return chirpclient.ChirpClient(*server.address, secret=secret, id=id, **options)


def test_who_knows_the_secret_is_let_in_and_nobody_else(tmp_path):
    with guarded(tmp_path) as server:
        with knows(server) as client:
            client.putfile('/file', b'x')
            assert client.subject == 'secret:g'
        for stranger in (knows(server, bytes(32)), knows(server, id='other'), knows(server, b'')):
            with stranger, pytest.raises(chirpwire.AccessDenied):
                stranger.stat('/file')


def say(sock, line):
    sock.sendall(line + b'\n')


def test_the_exchange_is_as_documented(tmp_path):
    """Each challenge is another one, so no answer serves twice; nor for another guest."""
    challenges = []
    with guarded(tmp_path) as server:
        for answered_for, good in ((b'g', True), (b'other', False), (b'g', True)):
            with socket.create_connection(server.address, 20) as sock, sock.makefile('rb') as lines:
                say(sock, b'address')
                assert lines.readline() == b'no\n'
                say(sock, b'secret')
                assert lines.readline() == b'yes\n'
                challenge = lines.readline().strip()
                assert len(bytes.fromhex(challenge.decode())) == 32
                challenges.append(challenge)
                said = hmac.new(SECRET, b'chirp\n' + answered_for + b'\n' + challenge, hashlib.sha256)
                say(sock, said.hexdigest().encode())
                assert lines.readline() == (b'yes\n' if good else b'no\n')
                if good:
                    assert [lines.readline() for _ in range(3)] == [b'yes\n', b'secret\n', b'g\n']
                    replayed = said.hexdigest().encode()
                    say(sock, b'whoami 100')
                    assert lines.readline() + lines.read(8) == b'8\nsecret:g'
        with socket.create_connection(server.address, 20) as sock, sock.makefile('rb') as lines:
            say(sock, b'secret')
            lines.readline()
            challenges.append(lines.readline().strip())
            say(sock, replayed)
            assert lines.readline() == b'no\n'
    assert len(set(challenges)) == 4


@pytest.mark.parametrize('challenge', [b'', b'00' * 31, b'zz' * 32, b'00' * 400, b'00' * 2000])
def test_a_challenge_that_is_none_is_not_answered(challenge):
    with HostileServer(lambda line: None, b'yes\n' + challenge + b'\n') as server:
        with pytest.raises(chirpwire.ChirpError):
            chirpclient.ChirpClient(*server.address, timeout=2, secret=SECRET, id='g').stat('/')


@pytest.mark.parametrize('options', [{'auth': 'secret'}, {'auth': 'secret', 'secret': SECRET},
                                     {'auth': 'ticket'}, {'auth': 'unix'}])
def test_a_server_that_nobody_could_prove_anything_to_is_not_made(tmp_path, options):
    with pytest.raises(chirpwire.ChirpError):
        chirpserver.ChirpServer(str(tmp_path), **options)


def test_an_address_alone_over_loopback_is_warned_of(tmp_path, caplog):
    with our_server(tmp_path):
        assert 'open to every user of this machine' in caplog.text
    caplog.clear()
    with guarded(tmp_path):
        assert 'open to every user' not in caplog.text


def test_what_is_shown_can_be_read_and_never_changed(tmp_path):
    """As a guest's spool is."""
    spool = tmp_path / 'spool' / 'cmd-1'
    spool.mkdir(parents=True)
    (tmp_path / 'served').mkdir()
    write(spool / 'out', b'output')
    os.symlink('/etc/passwd', str(spool / 'link'))
    shown = {'.spool': str(tmp_path / 'spool')}
    with guarded(tmp_path / 'served', shown=shown) as server, knows(server) as client:
        write(tmp_path / 'served' / 'mine', b'x')
        assert client.getfile('/.spool/cmd-1/out') == b'output'
        assert client.fetch('/.spool/cmd-1/out', str(tmp_path / 'got'), 3) == 3
        assert sorted(entry.name for entry in client.ls('/.spool/cmd-1')) == ['link', 'out']
        assert [entry.name for entry in client.ls('/')] == ['mine']
        inside = b'/.spool/cmd-1/out'
        for change in (
                lambda: client.putfile(inside, b'forged'), lambda: client.unlink(inside),
                lambda: client.open(inside, 'w'), lambda: client.rename('/mine', inside),
                lambda: client.rename(inside, '/mine'), lambda: client.call('link', inside, b'/hard'),
                lambda: client.call('link', b'/mine', inside + b'2'), lambda: client.chmod(inside, 0o777),
                lambda: client.utime(inside, 1, 1), lambda: client.call('truncate', inside, 0),
                lambda: client.mkdir(inside + b'd'), lambda: client.rmall('/.spool'),
                lambda: client.rmall('//x/../.spool'), lambda: client.symlink('x', inside + b'3'),
                lambda: client.rmdir('/.spool'),
                lambda: client.getfile('/.spool/cmd-1/link')):
            with pytest.raises(chirpwire.Refused):
                change()
    assert (spool / 'out').read_bytes() == b'output' and sorted(os.listdir(str(spool))) == ['link', 'out']


def test_a_guest_that_lets_in_by_address_says_so(tmp_path):
    source = str(write(tmp_path / 'source', b'x'))
    with Host(tmp_path / 'host') as host, \
            Agent(tmp_path / 'guest', host, 'one', chirp={'auth': 'address'}) as guest:
        assert 'open to every user of 127.0.0.1' in guest.log()
        with host.api as api:
            assert api.cpFileToVM('one', source, 'there') == ['', '', 0]


# --- time --------------------------------------------------------------------------------------------

def trickle():
    yield b'3000000\n'
    while True:
        yield b'x' * 2000
        time.sleep(0.05)


@pytest.mark.parametrize('call', ['fetch', 'get'])
def test_a_server_that_trickles_has_its_time_for_the_whole(tmp_path, call):
    """Faster than what is given up for its pace."""
    def answer(line):
        if line.startswith(b'pread'):
            return trickle()
        return b'0\n1 2 33188 1 0 0 0 3000000 4096 8 0 0 0\n'
    with HostileServer(answer) as server, chirpclient.ChirpClient(*server.address, timeout=20) as client:
        began = time.monotonic()
        with pytest.raises(chirpwire.TimedOut, match='longer than it may'):
            if call == 'fetch':
                client.fetch('/a', str(tmp_path / 'a'), 1 << 30, within=1)
            else:
                client.get('/a', str(tmp_path / 'a'), within=1)
        assert time.monotonic() - began < 15


# --- TLS ---------------------------------------------------------------------------------------------

@pytest.fixture
def certificate(tmp_path):
    """(certificate, key) for 127.0.0.1."""
    if not shutil.which('openssl'):
        pytest.skip('openssl is not installed')
    return make_certificate(tmp_path, 'one')


def make_certificate(folder, name):
    paths = str(folder / (name + '.cert')), str(folder / (name + '.key'))
    subprocess.check_call(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2',
                           '-subj', '/CN=guest', '-addext', 'subjectAltName=IP:127.0.0.1',
                           '-out', paths[0], '-keyout', paths[1]], stderr=subprocess.DEVNULL)
    return paths


def test_files_go_over_tls_and_over_nothing_else(tmp_path, certificate):
    (tmp_path / 'served').mkdir()
    content = os.urandom(3 << 20)
    source = write(tmp_path / 'source', content)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(*certificate)
    checks = ssl.create_default_context(cafile=certificate[0])
    with guarded(tmp_path / 'served', tls=tls) as server:
        with knows(server, tls=checks) as client:
            client.put(str(source), '/there')
            client.get('/there', str(tmp_path / 'back'))
            assert client.getfile('/there', 1 << 30) == (tmp_path / 'back').read_bytes() == content
        with knows(server, tls=ssl.create_default_context()) as wrong, \
                pytest.raises(chirpwire.AccessDenied, match='TLS'):
            wrong.stat('/')
        with knows(server, timeout=5) as plain, pytest.raises(chirpwire.ChirpError):
            plain.stat('/')
        with socket.create_connection(server.address, 20) as sock:     # which is no TLS either
            with contextlib.suppress(OSError):
                sock.sendall(b'address\n' * 1000)
                assert b'yes' not in all_of(sock)
        with knows(server, tls=checks) as client:
            assert client.stat('/there').size == len(content)


def test_files_go_over_tls_as_the_ini_files_say(tmp_path, certificate):
    """Also output beyond the inline part; and never to who has a certificate of somebody else's."""
    cert, key = certificate
    others_cert, others_key = make_certificate(tmp_path, 'other')
    source = str(write(tmp_path / 'source', os.urandom(300000)))
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(Host(tmp_path / 'host', {
            'tls': 'yes', 'cert_file': cert, 'key_file': key, 'ca_file': cert}))
        for name, chirp in ('one', (cert, key)), ('other', (others_cert, others_key)):
            stack.enter_context(Agent(
                tmp_path / name, host, name, {'tls': 'yes', 'ca_file': cert},
                {'cert_file': chirp[0], 'key_file': chirp[1]}))
        api = stack.enter_context(host.api)
        facts = api.getVM('one')['facts']['chirp']
        assert facts['tls'] is True
        assert api.cpFileToVM('one', source, 'there') == ['', '', 0]
        assert api.cpFileFromVM('one', 'there', str(tmp_path / 'back')) == ['', '', 0]
        assert (tmp_path / 'back').read_bytes() == (tmp_path / 'source').read_bytes()
        assert len(host.verb('run', 'one', 'sh', '-c', 'yes | head -c 300000').stdout) == 300000
        out, err, status = api.cpFileToVM('other', source, 'there')
        assert status and 'certificate' in err.lower(), err
        with socket.create_connection(('127.0.0.1', facts['port']), 20) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(b'secret\n' * 100)
                assert b'yes' not in all_of(sock)
