"""The host's own door: who may read its state, who is told its token, and who may hold up whom."""

import contextlib
import http.client
import http.server
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import xmlrpc.client

import pytest
from agents import TOP, Host
from helpers import let_others_in, wait_until
from terminals import Terminal
from test_mistakes import sentences
from test_status_page import FakeGuest

import faults
import hostclient
import hoststate
import localsocket
import rpc

pytestmark = [pytest.mark.ends,
              pytest.mark.skipif(os.name != 'posix', reason='modes, users and Unix sockets')]
as_root = pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='needs root')
NOBODY = 65534


def mode_of(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def refusal(folder):
    """What a host says that doesn't start on a state folder."""
    with pytest.raises(faults.VMHostError) as refused:
        hoststate.StateFolder(str(folder))
    return str(refused.value)


# --- the state folder ---

def test_what_others_could_read_is_made_private(tmp_path):
    state = tmp_path / 'vmhost-state'
    state.mkdir(mode=0o755)
    (state / 'old-notes').write_text('x')
    os.chmod(str(state), 0o755)
    os.chmod(str(state / 'old-notes'), 0o644)
    with Host(tmp_path) as host:
        assert mode_of(host.state) == 0o700
        modes = {name: mode_of(os.path.join(host.state, name)) for name in os.listdir(host.state)}
        assert {'journal.sqlite', 'lock', 'xmlrpc.token', 'xmlrpc.address', 'old-notes'} <= set(modes)
        assert set(modes.values()) == {0o600}, modes


@pytest.mark.parametrize('mode', [0o777, 0o1777, 0o770])
def test_what_others_could_write_is_refused_with_the_command_that_mends_it(mode, tmp_path):
    state = tmp_path / 'a state'
    state.mkdir()
    os.chmod(str(state), mode)
    said = refusal(state)
    assert "chmod 700 '%s'" % state in said
    assert mode_of(str(state)) == mode
    assert subprocess.call(said.rpartition(': ')[2], shell=True) == 0
    hoststate.StateFolder(str(state)).close()


@as_root
@pytest.mark.parametrize('name', ['', 'journal.sqlite'])
def test_what_belongs_to_another_user_is_refused(name, tmp_path):
    state = tmp_path / 'state'
    state.mkdir(mode=0o700)
    if name:
        (state / name).write_text('')
    os.chown(str(state / name), NOBODY, NOBODY)
    said = refusal(state)
    assert 'chown -R 0 %s' % state in said
    assert subprocess.call(said.rpartition(': ')[2], shell=True) == 0
    hoststate.StateFolder(str(state)).close()


# --- the token ---

def test_each_start_has_a_new_token(tmp_path):
    host = Host(tmp_path)
    with host:
        first, before = host.token, host.address
        assert host.verb('ls').returncode == 0
    with host:
        assert host.token != first
        url = 'http://vmhost:%s@%s/' % (first, host.address)
        with pytest.raises(xmlrpc.client.ProtocolError, match='401'), xmlrpc.client.ServerProxy(url) as api:
            api.listVMs()
        assert host.verb('ls').returncode == 0
    assert before


class Squatter:
    """Takes the port of a host that is gone, and keeps what it is sent."""

    def __init__(self, address):
        squatter = self
        self.heard = []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def answer(self):
                squatter.heard.append('%s %s' % (self.requestline, self.headers))
                body = b'0' * 64
                self.send_response(200)
                self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            do_GET = do_POST = answer

            def log_message(self, *args):
                pass
        host, _, port = address.rpartition(':')
        self._server = http.server.HTTPServer((host, int(port)), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.mark.parametrize('by_tcp', [False, True])
def test_who_squats_on_the_port_after_a_crash_is_told_nothing(by_tcp, tmp_path):
    with Host(tmp_path) as host:
        address, token = host.address, host.token
        host.stop(signal.SIGKILL)
        if by_tcp:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(host.state, localsocket.NAME))
        with Squatter(address) as squatter:
            done = host.verb('ls')
            assert done.returncode == 1
            sentences(done.stderr.decode(), 'start' if not by_tcp else 'does not know the token')
            assert token not in ''.join(squatter.heard)
            assert 'POST' not in ''.join(squatter.heard)
            assert len(squatter.heard) == by_tcp


def test_the_proof_is_good_for_one_address_and_one_nonce(tmp_path):
    with Host(tmp_path) as host:
        connection = http.client.HTTPConnection(*host.address.split(':'), timeout=20)
        with contextlib.closing(connection):
            connection.request('GET', '/proof?nonce=abc')
            said = connection.getresponse().read().decode()
        assert said == hostclient.proof(host.token, host.address, 'abc')
        assert said not in (hostclient.proof(host.token, host.address, 'abd'),
                            hostclient.proof(host.token, '127.0.0.1:1', 'abc'))
        assert host.token not in said


LISTEN = """
import os, socket, sys
os.setuid(%d)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o777)
listener.listen(5)
print('listening', flush=True)
connection, _ = listener.accept()
print(connection.recv(1000), flush=True)
"""


@as_root
def test_a_socket_of_another_user_is_told_nothing(tmp_path):
    state = tmp_path / 's'
    path = localsocket.path_in(str(state))
    if not path:
        pytest.skip('this path is too long for a socket')
    state.mkdir()
    (state / 'xmlrpc.address').write_text('127.0.0.1:1')
    (state / 'xmlrpc.token').write_text('token')
    let_others_in(tmp_path)
    os.chmod(str(state), 0o777)
    other = subprocess.Popen([sys.executable, '-c', LISTEN % NOBODY, path], stdout=subprocess.PIPE, cwd='/')
    try:
        assert other.stdout.readline() == b'listening\n'
        os.chmod(str(state), 0o700)
        with pytest.raises(faults.AccessDenied, match='another user'):
            hostclient.Client(str(state)).call('listVMs')
        assert other.stdout.read() == b"b''\n"
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


# --- connections ---

def connect(host):
    address, port = host.address.split(':')
    return socket.create_connection((address, int(port)), 20)


def test_silent_connections_lock_nobody_out(host):
    with contextlib.ExitStack() as silent, host.api as kept:
        kept.listVMs()
        for _ in range(200):
            silent.enter_context(connect(host))
        begin = time.monotonic()
        with host.api as api:
            api.listVMs()              # by TCP, on a connection that is new
        kept.listVMs()                 # and on one that has shown the token
        assert time.monotonic() - begin < 4
        assert host.verb('ls').returncode == 0


def test_who_has_shown_the_token_is_counted_apart(host):
    with contextlib.ExitStack() as stack:
        apis = [stack.enter_context(host.api) for _ in range(40)]
        for api in apis:
            api.listVMs()
        for _ in range(40):
            stack.enter_context(connect(host))
        for api in apis:
            same = api._ServerProxy__transport._connection[1]       # the connection from before, or it raises
            same.request('POST', '/', xmlrpc.client.dumps((), 'listVMs'),
                         {'Authorization': 'Bearer ' + host.token})
            assert same.getresponse().read()


def test_a_request_has_to_be_there_within_five_seconds(host):
    begin = time.monotonic()
    with connect(host) as silent, connect(host) as slow:
        slow.settimeout(0.3)
        said = b''
        while True:
            assert time.monotonic() - begin < 9, 'still there'
            try:
                slow.sendall(b'POST / HTTP/1.1\r\n' if not said else b'X')
                said = b'x'
                if not slow.recv(100):
                    break
            except socket.timeout:
                continue
            except OSError:
                break
        assert time.monotonic() - begin > 4
        silent.settimeout(5)
        assert silent.recv(1) == b''


@pytest.mark.parametrize('head, code', [
    (b'\r\n\r\n', 400), (b'GET /\r\n\r\n', 400), (b'BREW / HTTP/1.1\r\n\r\n', 405),
    (b'GET / HTTP/1.1\r\nno header\r\n\r\n', 400), (b'GET / HTTP/1.1\r\nX: ' + b'a' * 40000, 431),
    (b'POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n', 400),
    (b'POST / HTTP/1.1\r\nContent-Length: 99999999\r\n%s\r\n\r\n', 413),
    (b'POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n%s\r\n\r\n', 411),
    (b'POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n%s\r\n\r\nhello', 411),
    (b'GET /\xff\x80 HTTP/1.1\r\n\r\n', 401), (bytes(range(256)) + b'\r\n\r\n', 400)])
def test_what_is_no_request_is_refused(head, code, host):
    with connect(host) as sock:
        sock.sendall(head.replace(b'%s', b'Authorization: Bearer ' + host.token.encode()))
        said = sock.recv(1000)
    assert said.startswith(b'HTTP/1.1 %d ' % code), said
    assert 'Traceback' not in host.log()


def test_requests_that_come_in_pieces_or_together(host):
    call = xmlrpc.client.dumps((), 'listVMs').encode()
    request = (b'POST /RPC2 HTTP/1.1\r\nAuthorization: bearer %s\r\nContent-Length: %d\r\n\r\n' % (
        host.token.encode(), len(call))) + call
    with connect(host) as sock:
        for n in range(len(request)):
            sock.sendall(request[n:n + 1])
        sock.sendall(request * 3)
        said = b''
        while said.count(b'</methodResponse>') < 4:
            said += sock.recv(65536)
        assert said.count(b'HTTP/1.1 200 OK') == 4


# --- the status page's key ---

def test_the_key_of_the_status_page_is_on_no_command_line(host, tmp_path):
    browser = tmp_path / 'browser'
    browser.write_text('#!/bin/sh\necho "$@" > %s/opened\n' % tmp_path)
    browser.chmod(0o755)
    done = host.verb('status', '--open', env=dict(os.environ, BROWSER=str(browser)))
    assert done.returncode == 0
    opened = wait_until(lambda: (tmp_path / 'opened').exists() and (tmp_path / 'opened').read_text().strip())
    assert opened.startswith('file:///') and 'key=' not in opened
    path = opened[len('file://'):]
    assert mode_of(path) == 0o600 and os.path.dirname(path) == host.state
    with open(path) as file:
        link = re.search(r'http://[^"]*/status\?key=[\w-]+', file.read()).group()
    connection = http.client.HTTPConnection(*host.address.split(':'), timeout=20)
    with contextlib.closing(connection):
        connection.request('GET', link[link.index('/status'):])
        answer = connection.getresponse()
        assert answer.status == 200 and 'Set-Cookie' not in answer.headers and b'visit' in answer.read()
        connection.request('GET', link[link.index('/status'):])
        assert connection.getresponse().status == 401


# --- what guests say, as a person sees it ---

EVIL = 'evil \x1b[31m\u202e $(touch pwned)'


@pytest.fixture(scope='module')
def told(tmp_path_factory):
    """A host whose one guest says nothing but nonsense."""
    with Host(tmp_path_factory.mktemp('told')) as host, FakeGuest(
            host, 'evil', name='evil', mem='abc', cpus=float('inf'), os=EVIL, python=['x'],
            proto=10 ** 400) as evil, host.api as api:
        evil.say('/topic/connections', 'STILL_ALIVE', load1=1)
        wait_until(lambda: 'evil' in api.listRegisteredVMs())
        evil.say('/topic/connections', 'STILL_ALIVE', load1=float('inf'))
        evil.say('/topic/connections', 'STILL_ALIVE', load1=10 ** 400)
        evil.cmd_ids = [api.runCmd('evil', 'true') for _ in range(5)]
        for cmd_id, odd in zip(evil.cmd_ids, ([1], float('inf'), {'ru_utime': float('inf'), 'ru_maxrss': 'x'},
                                              {'ru_utime': 10 ** 400}, EVIL)):
            evil.say('/topic/cmd_responses', 'CMD_STATUS', state='running', resources=odd, wall=odd, pid=odd,
                     processes=odd, progress=odd if odd == EVIL else [odd], error='said',
                     **{'cmd-id': cmd_id, 'out-size': odd})
        for cmd_id in evil.cmd_ids:
            wait_until(lambda cmd_id=cmd_id: api.getCmdStatus(cmd_id, False)['error'] == 'said')
        yield host, api, evil


@pytest.mark.parametrize('words', [
    ('ls', '-l'), ('ls', '--json'), ('ps', '-l'), ('ps', '-l', '--json'), ('info', 'evil'), ('events',),
    ('status',), ('check',), ('events', '--json')])
def test_nonsense_of_a_guest_breaks_no_list(words, told):
    host, api, evil = told
    code, text = Terminal(host.command(*words), 300).wait()
    plain = re.sub('\x1b\\[[0-9]*m', '', text) if words[-1] not in ('-l', 'check') else text
    assert code == 0, text
    assert 'Traceback' not in text and '\u202e' not in text
    assert '\x1b[31m\u202e' not in plain and 'evil \x1b' not in plain


def test_numbers_of_a_guest_are_finite(told):
    host, api, evil = told
    for cmd_id in evil.cmd_ids:
        status = api.getCmdStatus(cmd_id, False)
        for name in ('wall', 'pid', 'processes', 'outSize', 'errSize'):
            assert isinstance(status[name], (int, float)) and abs(status[name]) < 1e300, status
        assert isinstance(status['progress'], str) and isinstance(status['resources'], dict)
        assert all(isinstance(value, (int, float)) for value in status['resources'].values())
    facts = api.getVM('evil')['facts']
    assert 'mem' not in facts and 'cpus' not in facts and 'proto' not in facts
    connection = http.client.HTTPConnection(*host.address.split(':'), timeout=20)
    with contextlib.closing(connection):
        connection.request('GET', '/status/snapshot', headers={'Authorization': 'Bearer ' + host.token})
        answer = connection.getresponse()

        def refuse(constant):
            raise AssertionError(constant)
        assert json.loads(answer.read().decode(), parse_constant=refuse)['vms']


def test_a_guest_writes_no_line_of_the_log(told):
    host, api, evil = told
    with FakeGuest(host, 'liar', name='liar') as liar:
        liar.say('/topic/connections', 'STILL_ALIVE', load1=1)
        wait_until(lambda: 'liar' in api.listRegisteredVMs())
        liar.say('/topic/connections', 'NOT A WORD\nINFO vmhost: forged \x1b[2J')
        liar.say('/topic/connections', 'BYE', reason='so\nINFO vmhost: forged \x1b[2J')
        wait_until(lambda: 'liar left' in host.log())
    with contextlib.suppress(xmlrpc.client.Fault):
        api.call('x')
    with connect(host) as sock:
        sock.sendall(b'GET /\x1b[2J\x0bforged HTTP/1.1\r\n\r\n')
        sock.recv(100)
    for line in host.log().splitlines():
        assert re.match(r'[0-9]{4}-[0-9]{2}-[0-9]{2} ', line), line
    assert '\x1b' not in host.log()


LOGS = '''
import logging, sys, types
sys.path.insert(0, %r)
import agent
agent.set_up_logging(types.SimpleNamespace(level='INFO', file=sys.argv[1], config=''))
logging.getLogger('vmhost').info('it says %%s', %r)
'''


def test_whatever_is_logged_is_one_line(tmp_path):
    """Wherever it comes from, and whether or not who logs it thought of that."""
    path = tmp_path / 'log'
    said = 'x\r\n2026-01-01 INFO vmhost: forged\x1b[2J\u2028\x85y'
    subprocess.check_call([sys.executable, '-c', LOGS % (TOP, said), str(path)])
    text = path.read_bytes().decode('utf-8')
    assert len(text.splitlines()) == 1 and text.rstrip('\n').isprintable() and 'forged' in text


NAMES = ['a$(touch pwned)', 'b`touch pwned`', 'c"; touch pwned; "x', "d'; touch pwned; 'x",
         'e\\\\\\"$(touch pwned)', 'f!!', 'g & touch pwned']


@pytest.mark.parametrize('quote', ['', '"', "'"])
def test_completing_a_name_runs_nothing_of_it(quote, tmp_path):
    """The shell reads what was completed as the name, whatever is in it, and whichever quote was open."""
    script = subprocess.check_output([sys.executable, os.path.join(TOP, 'vmhost.py'), '--completion', 'bash'])
    (tmp_path / 'completion').write_bytes(script)
    (tmp_path / 'names').write_text(''.join(name + '\n' for name in NAMES))
    asks = re.search(r'< <\((.*) --complete', script.decode()).group(1)
    (tmp_path / 'completion').write_text(script.decode().replace(asks + ' --complete', './ask --complete'))
    (tmp_path / 'ask').write_text(
        '#!%s\nimport sys, shlex\nfor name in open("names").read().splitlines():\n'
        '    if name.startswith(sys.argv[-1].lstrip(chr(34) + chr(39))): print(name)\n' % sys.executable)
    (tmp_path / 'ask').chmod(0o755)
    terminal = Terminal(['bash', '--norc', '--noprofile', '-i'], 200, PS1='> ', HOME=str(tmp_path))
    terminal.type(b'cd %s; . ./completion; vmhost() { printf "<%%s>\\n" "$3"; }; echo rea""dy\n'
                  % str(tmp_path).encode())
    wait_until(lambda: b'ready\r' in terminal.written, 20)
    for name in NAMES:
        if '!' in name and quote == '"':
            continue                   # within double quotes no escape of ! would be part of the name
        before = len(terminal.written)
        terminal.type(b'vmhost x.ini ping ' + quote.encode() + name[:1].encode() + b'\t\n')
        wait_until(lambda before=before: b'<' in terminal.written[before:]
                   and b'>\r' in terminal.written[before:], 20)
        assert ('<%s>\r' % name).encode() in terminal.written[before:], terminal.written[before:]
    terminal.type(b'exit\n')
    terminal.wait()
    assert not (tmp_path / 'pwned').exists()


# --- faults, there and back ---

def test_a_fault_says_at_the_caller_what_it_said_at_the_host():
    """Once, that is: its class is made of the text that came."""
    for kind in faults.VMHostError.__subclasses__():
        if 'fault' in vars(kind):
            error = hostclient.raised_by(rpc.Fault(kind.fault, 'the text'))
            assert str(error).startswith('the text') and str(error).count('the text') == 1, str(error)
            assert str(error) in ('the text', 'the text (`ls` lists them)', 'the text (`ps` lists them)')
