"""Tickets: keys and signatures as openssl and the programs of cctools have them."""

import hashlib
import os
import shutil
import socket
import subprocess

import pytest
from test_chirp import needs_cctools, our_server, run

import chirpclient
import chirpticket
import chirpwire

needs_openssl = pytest.mark.skipif(shutil.which('openssl') is None, reason='openssl is not installed')
TICKET = chirpticket.Ticket.generate()
OTHER = chirpticket.Ticket.generate(1024)


@needs_openssl
def test_openssl_reads_our_keys_and_we_read_its(tmp_path):
    (tmp_path / 'key').write_text(TICKET.pem())
    assert b'RSA key ok' in run('openssl', 'rsa', '-check', '-noout', '-in', tmp_path / 'key')
    public = subprocess.run(['openssl', 'rsa', '-pubout', '-in', str(tmp_path / 'key')],
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    assert public.decode() == TICKET.public.pem
    assert TICKET.public.digest == hashlib.md5(public).hexdigest()
    run('openssl', 'genrsa', '-traditional', '-out', tmp_path / 'theirs', '1024')
    theirs = chirpticket.Ticket.from_pem((tmp_path / 'theirs').read_text())
    assert theirs.pem() == (tmp_path / 'theirs').read_text()


@needs_openssl
def test_signatures_are_those_of_openssl(tmp_path):
    (tmp_path / 'key').write_text(TICKET.pem())
    challenge = os.urandom(64)
    (tmp_path / 'challenge').write_bytes(challenge)
    run('openssl', 'pkeyutl', '-sign', '-inkey', tmp_path / 'key', '-in', tmp_path / 'challenge',
        '-out', tmp_path / 'signature')
    assert (tmp_path / 'signature').read_bytes() == TICKET.sign(challenge)
    assert TICKET.public.verify(challenge, TICKET.sign(challenge))
    assert not TICKET.public.verify(challenge, TICKET.sign(os.urandom(64)))
    assert not TICKET.public.verify(challenge, b'')
    assert not OTHER.public.verify(challenge, TICKET.sign(challenge))


def test_a_key_is_its_text():
    assert chirpticket.Ticket.from_pem(TICKET.pem()).public.digest == TICKET.public.digest
    assert chirpticket.PublicKey(TICKET.public.pem).digest == TICKET.public.digest


@pytest.mark.parametrize('text', ['', 'x', '-----BEGIN PUBLIC KEY-----\nMAA=\n-----END PUBLIC KEY-----\n',
                                  TICKET.public.pem[:200], TICKET.public.pem.replace('M', 'N', 1),
                                  TICKET.pem()])
def test_what_is_no_key_is_refused(text):
    with pytest.raises(chirpwire.ChirpError):
        chirpticket.PublicKey(text)
    with pytest.raises(chirpwire.ChirpError):
        chirpticket.Ticket.from_pem(text.replace('RSA PRIVATE', 'OTHER'))


def test_only_the_ticket_opens(tmp_path):
    with our_server(tmp_path, auth='ticket') as server:
        with pytest.raises(chirpwire.AccessDenied):            # no key is known yet
            chirpclient.ChirpClient(*server.address, ticket=TICKET).stat('/')
        server.set_ticket(TICKET.public.pem)
        for wrong in (None, OTHER):
            with pytest.raises(chirpwire.AccessDenied):
                chirpclient.ChirpClient(*server.address, ticket=wrong).stat('/')
        with chirpclient.ChirpClient(*server.address, ticket=TICKET) as client:
            client.putfile('/a', b'b')
            assert client.whoami() == 'host:agent' and client.getacl() == [('host:agent', 'rwld')]
            server.set_ticket(OTHER.public.pem)
            with pytest.raises(chirpwire.ChirpError):
                client.stat('/')
        with chirpclient.ChirpClient(*server.address, ticket=OTHER) as client:
            assert client.getfile('/a') == b'b'


def test_a_client_with_a_ticket_gets_in_by_its_address_where_that_is_asked_for(tmp_path):
    with our_server(tmp_path) as server, chirpclient.ChirpClient(*server.address, ticket=TICKET) as client:
        assert client.whoami() == 'address:127.0.0.1'


def test_an_answer_can_not_be_used_again(tmp_path):
    def begin(sock):
        sock.sendall(b'ticket\n' + TICKET.public.digest.encode() + b'\n')
        assert sock.recv(4, socket.MSG_WAITALL) == b'yes\n' and sock.recv(3, socket.MSG_WAITALL) == b'64\n'
        return sock.recv(64, socket.MSG_WAITALL)
    with our_server(tmp_path, auth='ticket', ticket=TICKET.public.pem) as server:
        connect = socket.create_connection
        with connect(server.address) as first, connect(server.address) as second:
            answer = TICKET.sign(begin(first))
            assert begin(second) != answer
            first.sendall(b'256\n' + answer)
            assert first.recv(8, socket.MSG_WAITALL) == b'success\n'
            second.sendall(b'256\n' + answer)
            assert second.recv(8, socket.MSG_WAITALL) == b'failure\n'


@needs_cctools
@needs_openssl
def test_the_real_client_shows_our_ticket(tmp_path):
    (tmp_path / 'served').mkdir()
    (tmp_path / 'ticket').write_text(TICKET.pem())
    with our_server(tmp_path / 'served', auth='ticket', ticket=TICKET.public.pem) as server:
        assert b'host:agent' in run('chirp', '-a', 'ticket', '-i', tmp_path / 'ticket', '-t', '20',
                                    '%s:%d' % server.address, 'whoami')
