"""Connecting: versions, login, TLS, addresses, the command line. Docstrings name the rules."""

import errno
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys

import pytest
from agents import TOP
from brokers import make_certificate
from helpers import wait_until
from stomp_client import Client, Program, frame, running

import agent
import stompbroker
from stompbroker import Broker, BrokerError, Limits

# --- versions ---

@pytest.mark.parametrize('offered, chosen', [
    ('1.2', '1.2'), ('1.1', '1.1'), ('1.0', '1.0'), ('1.0,1.1,1.2', '1.2'), ('1.0,1.1', '1.1'),
    ('1.0,1.1,2.0', '1.1'), ('1.2,1.0,1.1', '1.2'), ('1.2 , 1.1', '1.2'), ('9,1.0', '1.0')])
def test_the_highest_common_version(connect, offered, chosen):
    """Connecting: CONNECT accept-version:1.2 is answered by CONNECTED
    CONNECTED Frame: CONNECTED has version:1.2
    Protocol Negotiation: highest common version of 1.0,1.1,1.2 is 1.2
    Protocol Negotiation: highest common version of 1.0,1.1 is 1.1
    Protocol Negotiation: unknown newer version is passed over: 1.0,1.1,2.0 gives 1.1
    Protocol Negotiation: order of accept-version does not matter: 1.2,1.0,1.1 gives 1.2
    Protocol Negotiation: accept-version:1.0 gives a 1.0 session
    """
    connected = connect(None).connect(offered)
    assert connected.get('version') == chosen
    assert len(connected.names()) == len(set(connected.names()))


def test_without_accept_version_it_is_1_0(connect):
    """Protocol Negotiation: missing accept-version gives a 1.0 session
    CONNECT: CONNECTED of a 1.0 session has a 'session' header"""
    client = connect(None)
    connected = client.connect(None, 'login: guest')
    assert connected.get('version', '1.0') == '1.0'
    assert connected.get('session')
    assert connected.get('heart-beat') is None
    client.ask('SUBSCRIBE', 'destination:/topic/a')         # only 1.0 does without an id
    client.ask('SEND', 'destination:/topic/a', 'text:a\\tb')    # nor knows escapes
    message, = client.before_now()
    assert message.get('text') == 'a\\tb'


@pytest.mark.parametrize('offered', ['2.0', '0.9', '', '1', '1.20', 'x,y'])
def test_no_common_version(connect, offered):
    """Protocol Negotiation: no common version: ERROR, then close
    Protocol Negotiation: no common version: ERROR has a 'version' header listing the server's"""
    client = connect(None)
    client.say('CONNECT', 'accept-version:' + offered, 'host:x')
    error = client.take_error()
    assert sorted(error.get('version').split(',')) == ['1.0', '1.1', '1.2']
    assert 'version' in error.get('message')


@pytest.mark.parametrize('version', ['1.1', '1.2'])
def test_stomp_is_another_name_of_connect(connect, version):
    """CONNECT or STOMP Frame: STOMP frame is handled as CONNECT (1.2)
    CONNECT or STOMP Frame: STOMP frame is handled as CONNECT (1.1)"""
    client = connect(None)
    client.say('STOMP', 'accept-version:' + version, 'host:x')
    assert client.take().get('version') == version


def test_connect_with_crlf(connect):
    """STOMP Frames: CONNECT with CRLF line ends is understood"""
    client = connect(None)
    client.send(b'CONNECT\r\naccept-version:1.2\r\nhost:x\r\nheart-beat:0,0\r\n\r\n\0\r\n')
    assert client.take().get('version') == '1.2'


def test_connect_twice(connect):
    client = connect('1.2')
    client.say('CONNECT', 'accept-version:1.2', 'host:x')
    client.take_error()


# --- CONNECTED ---

def test_headers_of_connected(connect):
    """Value Encoding: CONNECTED headers are not escaped
    CONNECTED Frame: 'server' header, if any, is name[/version] *(SP comment)
    CONNECTED Frame: 'session' header, if any, is unique
    Heart-beating: heart-beat header of CONNECTED, if any, is two integers
    Heart-beating: the server can send heart-beats (CONNECTED heart-beat sx > 0)
    stomper: server-made ids (session, message-id) have no colon nor space: clients that do not unescape
    can use them
    """
    connected = [connect(None).connect('1.2') for _ in range(20)]
    sessions = {one.get('session') for one in connected}
    assert len(sessions) == 20
    for one in connected:
        assert not any('\\' in line for line in one.lines)
        assert re.match(r'[^/\s]+(/[^/\s]+)?( .*)?\Z', one.get('server'))
        beats = re.match(r'(\d+),(\d+)\Z', one.get('heart-beat'))
        assert int(beats.group(1)) > 0
        assert not one.body
    assert not any(set(': \\') & set(session) for session in sessions)


def test_connect_headers_are_not_unescaped(connect):
    client = connect(None)
    client.connect('1.2', 'login:back\\slash', 'passcode:\\t\\')


@pytest.mark.parametrize('host', ['host:elsewhere.example', 'host:/', 'host:', 'no-host:x'])
def test_any_host_will_do(connect, host):
    """Connecting: vhost: an unknown host header gives CONNECTED, or ERROR and close"""
    client = connect(None)
    client.say('CONNECT', 'accept-version:1.2', host)
    assert client.take().command == 'CONNECTED'


def test_empty_login_and_passcode(connect):
    """old clients: empty login and passcode headers are taken like none"""
    connect('1.0', 'login:', 'passcode:')
    connect('1.0', 'login: ', 'passcode: ')
    connect('1.2', 'login:', 'passcode:')


# --- what comes instead of CONNECT ---

@pytest.mark.parametrize('command', ['SEND', 'SUBSCRIBE', 'ACK', 'BEGIN', 'DISCONNECT'])
def test_nothing_goes_before_connect(broker, connect, command):
    """Connecting: a SEND before CONNECT is refused, and not delivered"""
    listener = connect('1.2')
    listener.subscribe('/topic/early')
    client = connect(None)
    client.say(command, 'destination:/topic/early', 'id:1', 'receipt:r', body=b'early')
    error = client.take_error()
    assert error.get('receipt-id') == 'r'
    assert listener.bodies() == []


def test_frames_right_behind_connect(connect):
    """Connecting: frames sent right behind CONNECT, in the same segment, are processed"""
    client = connect(None)
    client.send(frame('CONNECT', 'accept-version:1.2', 'host:x')
                + frame('SUBSCRIBE', 'id:a\\cb', 'destination:/topic/a')
                + frame('SEND', 'destination:/topic/a', 'receipt:r', body=b'at once'))
    assert client.take().command == 'CONNECTED'
    found = {one.command: one for one in client.take_all(2)}
    assert found['MESSAGE'].body == b'at once'
    assert found['MESSAGE'].get('subscription') == 'a\\cb'
    assert found['RECEIPT'].get('receipt-id') == 'r'


@pytest.mark.parametrize('garbage', [
    b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n', b'\x16\x03\x01\x02\x00\x01\x00', bytes(range(1, 256)),
    b'CONNECT\nno colon here\n\n\0', b'CONNECT\n:no name\n\n\0', b'connect\n\n\0',
    b'CONNECT\naccept-version:1.2\0',
    b'\0', b'X', b'CONNECTED\n', b'CONNECT\n\xff:\xfe\n\n\0'])
def test_garbage_instead_of_connect(broker, connect, garbage):
    """robustness: binary garbage instead of CONNECT: refused, others are served
    robustness: an HTTP request: refused (or at least closed), others are served"""
    client = connect(None)
    client.send(garbage)
    client.take_error()
    connect('1.2')


def test_what_is_large_is_not_waited_for_before_connect(connect):
    client = connect(None)
    client.send(b'SEND\ndestination:/topic/a\ncontent-length:1000000\n\n')
    client.take_error()


def test_no_connect_in_time():
    with running(Broker(port=0, connect_time=0.2)) as broker:
        with Client(broker.address) as silent, Client(broker.address) as half:
            half.send(b'CONNECT\naccept-version:1.2\nho')
            assert 'CONNECT' in silent.take_error().get('message')
            half.take_error()
        with Client(broker.address) as good:
            good.connect('1.2')
            assert good.silent_for(0.5)


# --- login ---

@pytest.fixture(scope='module')
def guarded():
    with running(Broker(port=0, login='Anna', passcode='geheim:ü')) as broker:
        yield broker


@pytest.mark.parametrize('version', ['1.0', '1.1', '1.2'])
def test_the_right_login(guarded, version):
    with Client(guarded.address) as client:
        client.connect(version, 'login:Anna', 'passcode:geheim:ü')
        client.ask('SEND', 'destination:/topic/a')


@pytest.mark.parametrize('lines', [
    (), ('login:Anna',), ('passcode:geheim:ü',), ('login:Anna', 'passcode:geheim'),
    ('login:anna', 'passcode:geheim:ü'),
    ('login:Anna', 'passcode:'), ('login:', 'passcode:')])
def test_a_wrong_login(guarded, lines):
    """Connecting: rejected login: ERROR, then close"""
    refused = guarded.counters()['refused']
    with Client(guarded.address) as client:
        client.say('CONNECT', 'accept-version:1.2', 'host:x', *lines)
        error = client.take_error()
        assert 'geheim' not in error.get('message')
    assert guarded.counters()['refused'] == refused + 1


# --- many ---

def test_300_at_once(broker, connect):
    """Connecting: 300 simultaneous connections all get CONNECTED within 15 s
    Connecting: 100 connections opened in one burst (listen backlog): all served within 5 s"""
    clients = []
    for _ in range(300):               # on a slow machine the first has no time until the last is there
        clients.append(connect(None))
        clients[-1].say('CONNECT', 'accept-version:1.2', 'host:x')
    for client in clients:
        answer = client.take(15)
        assert answer.command == 'CONNECTED', answer


def test_100_that_connect_and_vanish(broker, connect):
    """Connection Lingering: 100 rapid connect + CONNECT + abrupt close, then service goes on"""
    for number in range(100):
        client = connect(None)
        client.say('CONNECT', 'accept-version:1.2', 'host:x')
        if number % 2:
            client.reset()
        else:
            client.close()
    connect('1.2').ask('SEND', 'destination:/topic/a')


def test_too_many_connections():
    with running(Broker(port=0, connections=2)) as broker:
        with Client(broker.address) as one, Client(broker.address) as two:
            one.connect('1.2')
            two.connect('1.2')
            with Client(broker.address) as three:
                three.take_end()
            assert broker.counters()['refused'] == 1
            one.close()
            wait_until(lambda: broker.counters()['connections'] == 1, 20)
            with Client(broker.address) as four:
                four.connect('1.2')


# --- addresses ---

needs_ipv6 = pytest.mark.skipif(not os.path.exists('/proc/net/if_inet6'), reason='no IPv6 here')


@needs_ipv6
def test_ipv6_alone():
    with running(Broker('::1', 0)) as broker:
        with Client(broker.address) as client:
            client.connect('1.2')
        with pytest.raises(OSError):
            Client(('127.0.0.1', broker.address[1]))


@needs_ipv6
def test_both_families():
    with running(Broker('::', 0)) as broker:
        for host in '127.0.0.1', '::1':
            with Client((host, broker.address[1])) as client:
                client.connect('1.2')


def test_an_address_that_can_not_be_had(broker):
    with pytest.raises(BrokerError, match=str(broker.address[1])):
        Broker(port=broker.address[1]).start()
    with pytest.raises(BrokerError, match='192.0.2.1'):
        Broker('192.0.2.1', 0).start()
    with pytest.raises(BrokerError, match='does not listen'):
        print(Broker(port=0).address)


def test_stop_closes_all_connections():
    with running(Broker(port=0)) as broker:
        client = Client(broker.address)
        client.connect('1.2')
        address = broker.address
    with client:
        client.take_end()
    with pytest.raises(OSError):
        Client(address)
    with running(Broker(*address)):      # the port is free at once
        pass


# --- TLS ---

@pytest.fixture(scope='module')
def certificate(tmp_path_factory):
    """Certificate and key for localhost."""
    if shutil.which('openssl') is None:
        pytest.skip('needs the openssl program')
    folder = tmp_path_factory.mktemp('tls')
    cert, key, config = (str(folder / name) for name in ('cert.pem', 'key.pem', 'config'))
    with open(config, 'w') as file:
        file.write('[req]\ndistinguished_name=dn\n[dn]\n[ext]\nsubjectAltName=IP:127.0.0.1,DNS:localhost\n')
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2',
                    '-subj', '/CN=localhost', '-keyout', key, '-out', cert, '-config', config,
                    '-extensions', 'ext'],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return cert, key


@pytest.fixture
def secured(certificate):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    with running(Broker(port=0, tls=context, connect_time=1.0)) as broker:
        yield broker


def trusting(certificate):
    return ssl.create_default_context(cafile=certificate[0])


def test_tls(secured, certificate):
    with Client(secured.address, tls=trusting(certificate)) as client:
        client.connect('1.2')
        client.subscribe('/topic/a')
        bodies = [b'x' * size for size in (0, 1, 16 * 1024, 100 * 1000, 1024 * 1024)] + [b'y'] * 1000
        client.say('SEND', 'destination:/topic/a', body=bodies[0])
        for body in bodies[1:]:
            client.say('SEND', 'destination:/topic/a', body=body)
        assert [one.body for one in client.take_all(len(bodies))] == bodies


def test_tls_ends_with_a_goodbye(secured, certificate):
    """So that a client can tell the end from an attacker's cut."""
    context = trusting(certificate)
    with socket.create_connection(secured.address, 20) as plain:
        with context.wrap_socket(plain, server_hostname='localhost', suppress_ragged_eofs=False) as tls:
            tls.sendall(frame('CONNECT', 'accept-version:1.2', 'host:x') + frame('DISCONNECT', 'receipt:bye'))
            data = b''
            while True:
                more = tls.recv(4096)        # raises SSLEOFError where close_notify is missing
                if not more:
                    break
                data += more
    assert data.endswith(b'RECEIPT\nreceipt-id:bye\n\n\0\n')


def test_a_slow_tls_reader_gets_every_byte(secured, certificate):
    with Client(secured.address, tls=trusting(certificate), receive_buffer=4096) as reader, \
            Client(secured.address, tls=trusting(certificate)) as writer:
        reader.connect('1.2')
        writer.connect('1.2')
        reader.subscribe('/topic/a')
        sizes = [300] * 500 + [200 * 1000] * 5 + [3000] * 300
        bodies = [os.urandom(size).replace(b'\0', b'0') for size in sizes]
        writer.publish('/topic/a', *bodies)
        assert reader.take_all(len(bodies))[-1].body == bodies[-1]


def test_no_tls_where_tls_is_spoken(secured, certificate):
    with Client(secured.address) as plain, Client(secured.address) as silent:
        plain.say('CONNECT', 'accept-version:1.2', 'host:x')
        plain._receive(1e9)                 # perhaps a TLS alert
        plain._buffer.clear()
        plain.take_end()
        silent.take_end()                   # no handshake in time
    with Client(secured.address, tls=trusting(certificate)) as client:
        client.connect('1.2')


# --- the command line ---

@pytest.mark.skipif(os.name != 'posix', reason='signals of POSIX')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_the_program_ends_by_a_signal(number):
    with Program() as program, Client(program.address) as client:
        client.connect('1.2')
        client.subscribe('/topic/a')
        assert program.end(number) == (0, b'', b'')
        client.take_end()


def test_the_program_with_login_and_tls(certificate):
    cert, key = certificate
    with Program('--login', 'me', '--passcode', 'pass', '--tls-cert', cert, '--tls-key', key) as program:
        for passcode, answer in ('pass', 'CONNECTED'), ('wrong', 'ERROR'):
            with Client(program.address, tls=trusting(certificate)) as client:
                client.say('CONNECT', 'accept-version:1.2', 'host:x', 'login:me', 'passcode:' + passcode)
                assert client.take().command == answer


@needs_ipv6
def test_the_program_on_ipv6():
    with Program('--host', '::1') as program, Client(program.address) as client:
        client.connect('1.2')


def test_the_program_takes_large_bodies():
    with Program() as program, Client(program.address) as client:
        client.connect('1.2')
        client.subscribe('/topic/a')
        body = os.urandom(4 * 1024 * 1024)
        client.say('SEND', 'destination:/topic/a', 'content-length:%d' % len(body), body=body)
        assert client.take().body == body


@pytest.mark.parametrize('arguments, words', [
    (['--host', '192.0.2.1'], '192.0.2.1'), (['--port', '99999'], '99999'),
    (['--tls-cert', 'no/such/file'], 'no/such'), (['--passcode-file', 'no/such/file'], 'no/such'),
    (['--passcode-file', '/dev/null'], 'empty'), (['--passcode-file', 'f', '--passcode', 'x'], 'exclude'),
    (['--tls-key', 'key.pem'], '--tls-cert'), (['--connections', '-1'], 'less than 1'),
    (['--queued', '-1'], 'less than 0'), (['--unidentified', '0'], 'less than 1'),
    (['--unacknowledged', '0'], 'less than 1'), (['--passcode-file', ''], 'nothing in it'),
    (['--passcode', ''], 'nothing in it'), (['--tls-cert', ''], 'nothing in it'),
    (['--host', ''], 'nothing in it'),
    (['--connect-time', 'nan'], 'less than 0'), (['--queued', 'much'], 'much'),
    (['--port', 'x'], 'usage')])
def test_the_program_says_what_is_wrong(arguments, words):
    done = subprocess.run([sys.executable, os.path.join(TOP, 'stompbroker.py')] + arguments,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30)
    assert done.returncode != 0 and not done.stdout
    assert words in done.stderr.decode() and 'Traceback' not in done.stderr.decode()


def test_the_passcode_comes_from_a_file(tmp_path):
    """So that nobody reads it in the list of processes."""
    path = tmp_path / 'passcode'
    path.write_bytes('geheim:ü\n'.encode('utf-8'))
    path.chmod(0o600)
    with Program('--login', 'me', '--passcode-file', str(path)) as program:
        for passcode, answer in ('geheim:ü', 'CONNECTED'), ('geheim', 'ERROR'), ('', 'ERROR'):
            with Client(program.address) as client:
                client.say('CONNECT', 'accept-version:1.2', 'host:x', 'login:me', 'passcode:' + passcode)
                assert client.take().command == answer
        path.write_bytes(b'\xef\xbb\xbfgeheim\r\n')       # Notepad's
        with Program('--passcode-file', str(path)) as program, Client(program.address) as client:
            client.connect('1.2', 'passcode:geheim')
        if os.name == 'posix':         # Windows knows no such modes
            path.chmod(0o644)
            with Program('--passcode-file', str(path)) as open_one:
                assert b'chmod 600' in open_one.end(signal.SIGTERM)[2]


@needs_ipv6
def test_a_name_means_all_its_addresses(monkeypatch):
    """localhost is 127.0.0.1 and ::1, whichever of them is the first."""
    found = [(socket.AF_INET6, socket.SOCK_STREAM, 6, '', ('::1', 0, 0, 0)),
             (socket.AF_INET, socket.SOCK_STREAM, 6, '', ('127.0.0.1', 0)),
             (socket.AF_INET, socket.SOCK_STREAM, 6, '', ('192.0.2.1', 0))]
    for order in found, found[::-1]:
        monkeypatch.setattr(socket, 'getaddrinfo', lambda *_, order=order: order)
        with running(Broker('localhost', 0)) as broker:
            assert len({port for _, port in broker.addresses}) == 1
            assert {host for host, _ in broker.addresses} == {'127.0.0.1', '::1'}
            monkeypatch.undo()
            for address in broker.addresses:
                with Client(address) as client:
                    client.connect('1.2')


def test_a_port_that_is_free_on_one_address_alone(monkeypatch):
    """With port 0 one is looked for that all addresses have."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, '', (host, 0)) for host in ('127.0.0.1', '127.0.0.2')]
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *_: found)
    taken = []

    class Thief(stompbroker.Listener):
        """After the first listener, somebody else has its port on the other address."""

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            if len(taken) < 2:
                taken.append(socket.socket())
                taken[-1].bind(('127.0.0.2', self.address[1]))
                taken[-1].listen(1)
    monkeypatch.setattr(stompbroker, 'Listener', Thief)
    try:
        with running(Broker('somebody', 0)) as broker:
            assert [host for host, _ in broker.addresses] == ['127.0.0.1', '127.0.0.2'] and len(taken) == 2
            assert len({port for _, port in broker.addresses}) == 1
    finally:
        for sock in taken:
            sock.close()


def test_a_system_without_ipv6(monkeypatch):
    """localhost is ::1 as well, in /etc/hosts; a kernel without IPv6 has no such sockets."""
    found = [(family, socket.SOCK_STREAM, 6, '', address) for family, address in (
        (socket.AF_INET6, ('::1', 0, 0, 0)), (socket.AF_INET, ('127.0.0.1', 0)))]
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *_: found)

    class Listener(stompbroker.Listener):
        def __init__(self, broker, family, *arguments, **options):
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, 'Address family not supported by protocol')
            super().__init__(broker, family, *arguments, **options)
    monkeypatch.setattr(stompbroker, 'Listener', Listener)
    with running(Broker('localhost', 0)) as broker:
        assert [host for host, _ in broker.addresses] == ['127.0.0.1']


def test_an_encrypted_key_is_not_asked_for(certificate, tmp_path):
    cert, key = certificate
    encrypted = str(tmp_path / 'encrypted.pem')
    subprocess.run(['openssl', 'rsa', '-aes256', '-passout', 'pass:x', '-in', key, '-out', encrypted],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    program = [sys.executable, os.path.join(TOP, 'stompbroker.py')]
    done = subprocess.run(program + ['--port', '0', '--tls-cert', cert, '--tls-key', encrypted],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30)
    assert done.returncode == 1 and b'encrypted' in done.stderr and b'Traceback' not in done.stderr


@pytest.mark.parametrize('files, words', [
    ((0,), 'no certificate and its private key in PEM'), ((0, 'none'), 'none: No such file'),
    ((0, 2), "the key is not this certificate's"), ((1, 0), 'no certificate and its private key in PEM')])
def test_a_certificate_without_its_key(certificate, tmp_path, files, words):
    paths = dict(enumerate(tuple(certificate) + make_certificate(str(tmp_path))[1:]))
    with pytest.raises(agent.AgentError) as raised:
        agent.server_tls(*[paths.get(file, file) for file in files])
    assert words in str(raised.value) and str(paths[files[0]]) in str(raised.value)


def test_each_limit_is_an_option():
    arguments = [word for name in Limits._fields for word in ('--' + name.replace('_', '-'), '100000')]
    with Program(*(arguments + ['--subscriptions', '2'])) as program, Client(program.address) as client:
        client.connect('1.2')
        for number in range(3):
            client.say('SUBSCRIBE', 'id:%d' % number, 'destination:/topic/a')
        assert 'more than 2 subscriptions' in client.take_error().get('message')
        assert os.name != 'posix' or program.end(signal.SIGTERM)[0] == 0       # Windows knows no SIGTERM


@pytest.mark.skipif(not hasattr(signal, 'SIGUSR1'), reason='signals of POSIX')
def test_the_program_shows_what_it_holds():
    with Program() as program, Client(program.address) as client:
        client.connect('1.2')
        client.publish('/queue/a\\nb', b'1', b'2', b'3')
        client.subscribe('/topic/t')
        client.publish('/topic/t', b'1')
        for _ in range(2):
            program.process.send_signal(signal.SIGUSR1)
            counters, head, queue, topic = [program.process.stderr.readline().decode() for _ in range(4)]
            assert 'connections 1 ' in counters and ' queued_bytes 0 ' not in counters
            assert head.split() == ['destination', 'waiting', 'consumers', 'in', 'out', 'oldest']
            assert queue.split()[:5] == ['/queue/a\\nb', '3', '0', '3', '0'] and queue.endswith(' s\n')
            assert topic.split()[:5] == ['/topic/t', '0', '1', '1', '1']
        assert program.end(signal.SIGTERM)[0] == 0


@pytest.mark.skipif(not hasattr(signal, 'SIGUSR1'), reason='signals of POSIX')
def test_nobody_has_to_read_what_the_program_prints():
    """Neither where it listens, nor what it holds."""
    with Program() as program, Client(program.address) as client:
        program.process.stdout.close()
        program.process.stderr.close()
        client.connect('1.2')
        for _ in range(3):
            program.process.send_signal(signal.SIGUSR1)
            client.before_now()
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(30) == 0


def test_a_busy_broker_survives_a_question(monkeypatch, capsys):
    """It is asked what it holds, and doesn't answer in time; then by SIGTERM it ends."""
    def status():
        raise BrokerError('the broker does not answer')
    signals, other = socket.socketpair()
    broker = Broker(port=0)
    broker.start()
    with signals, other:
        monkeypatch.setattr(broker, 'status', status)
        other.send(bytes((stompbroker.SIGNAL_OF_STATUS, signal.SIGTERM)))
        stompbroker._serve(broker, signals)          # stops it, too
    assert 'does not answer' in capsys.readouterr().err


def test_the_status_of_each_destination():
    with running(Broker(port=0)) as broker, Client(broker.address) as client:
        client.connect('1.2')
        client.publish('/queue/a', b'1', b'2', b'3')
        client.subscribe('/queue/a', 'ack:client', 'prefetch-count:2')
        client.subscribe('/queue/b', id='b')
        a, b = broker.status()
        assert a[:5] == ('/queue/a', 1, 1, 3, 2) and 0 <= a.oldest < 30
        assert b == ('/queue/b', 0, 1, 0, 0, 0.0)


def test_a_broker_whose_thread_fails_ends():
    """It doesn't go on listening with nobody there, and says why."""
    code = ('import selectors, sys, stompbroker\n'
            'class Broken(selectors.DefaultSelector):\n'
            '    def select(self, timeout=None):\n'
            '        if len(self.get_map()) > 2: raise KeyError("on purpose")\n'
            '        return super().select(timeout)\n'
            'selectors.DefaultSelector = Broken\n'
            'sys.exit(stompbroker.main(["--port", "0"]))\n')
    process = subprocess.Popen([sys.executable, '-c', code], cwd=TOP, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    port = int(process.stdout.readline().rsplit(b':', 1)[1])
    with Client(('127.0.0.1', port)) as client:
        client.take_end_or_error()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stompbroker: the broker has failed: KeyError('on purpose'" in errors.decode()


def test_a_host_agent_whose_broker_fails_ends(tmp_path):
    """A supervisor starts it again; without a broker it would serve nobody."""
    code = ('import stompbroker, sys, vmhost\n'
            'def admit(broker, sock, peer): raise KeyError("on purpose")\n'
            'stompbroker.Broker.admit = admit\n'
            'sys.exit(vmhost.main(sys.argv[1:]))\n')
    ini, address = tmp_path / 'host.ini', tmp_path / 'state' / 'broker.address'
    ini.write_text('[Broker]\nport = 0\n[Host]\nxmlrpc_port = 0\nstate_dir = %s\n[Hypervisor]\n'
                   'hypervisor = none\n' % (tmp_path / 'state'))
    with open(str(tmp_path / 'errors'), 'wb') as errors:       # Wine's desktop would keep a pipe open
        process = subprocess.Popen([sys.executable, '-c', code, str(ini)], cwd=TOP, stderr=errors)
    try:
        wait_until(lambda: address.exists() and address.read_text(), 60)
        host, port = address.read_text().rsplit(':', 1)
        with Client((host, int(port))) as client:
            client.take_end_or_error()
        assert process.wait(60) == 1
    finally:
        process.kill()
    assert "the embedded broker has failed: KeyError('on purpose'" in (tmp_path / 'errors').read_text()
