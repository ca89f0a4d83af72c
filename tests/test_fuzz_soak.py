"""Nonsense for every parser, as long as one likes: SOAK_SECONDS=600 SOAK_SEED=… python -m pytest -m soak

Each target of the table takes one stroke after the other, made from what is right by a few random changes. At
its end it still does its work, no log has a traceback, no thread is dead, and memory is what it was after the
first quarter.
"""

import base64
import contextlib
import gc
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import socket
import threading
import time
import types

import pytest
from agents import Agent, Host
from fake_guest import CONNECTIONS, REQUESTS, RESPONSES, Guest, escaped, keyed, signature
from helpers import wait_until
from stomp_client import frame
from test_chirp import our_server, write
from test_chirp_hostile import CALLS, FILE, STAT, HostileServer, all_of
from test_host_parts import write_journal
from test_trust_guests import At, Stranger

import chirpclient
import chirpwire
import faults
import hostcommands
import hostguests
import hostjournal
import hosttrust
import protocol

pytestmark = [pytest.mark.soak,
              pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='needs /proc')]
SECONDS = float(os.environ.get('SOAK_SECONDS', '60'))
SEED = int(os.environ.get('SOAK_SEED', time.time()))
MEGABYTE = 10 ** 6
GROWTH = 24                    # MB that a process may have more at the end

NASTY = [b'', b'\0', b'\n', b'\r\n', b'\n\n', b':', b'\\', b'\\q', b'\xff\xfe', b'\xed\xa0\x80', b'-1',
         b'1e999', b'NaN', b'9' * 30, b'[' * 2000, b'{"a":' * 500, b'null', b'true', b'[]', b'{}', b'"', b'%',
         b'%00', b'../', b'x' * 5000, '٣ß\u2028'.encode(), b'content-length:7\n', b'2147483648', b'0x10',
         b'1.5', b' ']


def mutated(chance, data, most=4):
    """The bytes with up to so many things wrong."""
    data = bytearray(data)
    for _ in range(chance.randrange(most + 1)):
        at = chance.randrange(len(data) + 1)
        end = at + chance.choice([0, 1, 1, 5, 40])
        tokens = [match.span() for match in re.finditer(rb'[\w.-]+|"[^"]*"', data)]
        if tokens and chance.random() < 0.5:
            at, end = chance.choice(tokens)
        data[at:end] = chance.choice([chance.choice(NASTY), bytes(data[at:end]) * 2,
                                      bytes(chance.randrange(256) for _ in range(chance.randrange(8)))])
    return bytes(data)


def some_of(chance, parts, most=8):
    return b''.join(chance.choice(parts) for _ in range(chance.randrange(1, most)))


def exchange(address, data):
    """Says that, and no more; hears all of the answer."""
    with socket.create_connection(address, 20) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(data)
        all_of(sock)


# --- the broker, the link -------------------------------------------------------------------------

HELLO_BODY = b'HELLO {"nonce": "%s", "secret": "%s", "chirp": {"port": 1}, "cmds": {"a": "running"}}' % (
    b'0' * 32, b'1' * 64)
CLIENT_FRAMES = [
    frame('CONNECT', 'accept-version:1.2', 'host:x', 'heart-beat:0,1000'), b'\n',
    frame('SUBSCRIBE', 'id:0', 'destination:' + REQUESTS, 'ack:client-individual'),
    frame('SEND', 'destination:' + CONNECTIONS, 'id:fuzz', body=HELLO_BODY),
    frame('SEND', 'destination:' + RESPONSES, 'from:fuzz', 'seq:1', 'mac:' + '0' * 32, body=b'CMD_STATUS {}'),
    frame('BEGIN', 'transaction:t'), frame('COMMIT', 'transaction:t'), frame('ACK', 'id:0'),
    frame('NACK', 'id:1'), frame('UNSUBSCRIBE', 'id:0'), frame('DISCONNECT', 'receipt:r')]
SERVER_FRAMES = [
    frame('MESSAGE', 'subscription:0', 'message-id:1', 'ack:1', 'destination:' + REQUESTS, 'to:one',
          body=b'PING {"ping-id": 7}'),
    frame('RECEIPT', 'receipt-id:7'), b'\n', frame('ERROR', 'message:no', body=b'why')]


@contextlib.contextmanager
def frames_at_the_broker(place):
    yield lambda chance: exchange(('127.0.0.1', place.host.broker_port), mutated(
        chance, CLIENT_FRAMES[0] * (chance.random() < 0.8) + some_of(chance, CLIENT_FRAMES)))


@contextlib.contextmanager
def frames_at_the_link(place):
    def hear(message):
        with contextlib.suppress(protocol.BadWord):
            protocol.interpret(message.headers, message.body, message.headers.get('destination', ''))

    def stroke(chance):
        link = protocol.Link(listener.getsockname, [(REQUESTS, 'auto'), (RESPONSES, 'client-individual')],
                             lambda link: None, hear)
        link._candidates = lambda: [listener.getsockname()]
        link.start()
        try:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(ConnectionError):
                sock.settimeout(20)
                sock.recv(65536)
                version = frame('CONNECTED', 'version:1.2', 'heart-beat:0,0')
                sock.sendall(mutated(chance, version + some_of(chance, SERVER_FRAMES)))
                all_of(sock)
        finally:
            link.close()
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen(1)
        listener.settimeout(20)
        yield stroke


# --- words ----------------------------------------------------------------------------------------

FROM_GUESTS = [
    b'STILL_ALIVE {"load1": 0.5, "mem_free": 1, "running": 0, "uptime": 5}',
    b'PONG {"ping-id": "1", "time": 1}', b'BYE {"reason": "x"}', b'NONSENSE {}',
    b'CMD_STATUS {"cmd-id": "c", "state": "running", "pid": 7, "wall": 1.5, "resources": {"ru_utime": 1.5}, '
    b'"out-size": 3, "out": "abc", "out-offset": 0, "in-offset": 0, "processes": 2, "progress": "0.5"}',
    b'CMD_RESULTS {"cmd-id": "c", "out": "x", "err": "", "finished": true, "exitCodeOrSignal": 0, '
    b'"wall": 1.0, "resources": {"ru_maxrss": 1}, "state": "exited", "out-size": 1, "err-size": 0, '
    b'"out-offset": 0, "out64": "eA==", "started": 1.0, "ended": 2.0, "spool": "/x"}',
    b'HELLO {"name": "n", "boot": "b", "session": "s", "chirp": {"port": 9094}, "mem": 5, '
    b'"cmds": {"c": "running"}}']
FROM_HOSTS = [
    b'CMD_RUN {"cmd-id": "c", "cmd": "true", "args": ["a"], "env": {"A": "b"}, "path": "", "stdin": "x", '
    b'"timeout": 5, "kill-after": 1, "nice": 1, "limits": {"nofile": 99}, "output-limit": 99, '
    b'"inline-output": 9}',
    b'CMD_RUN {"cmd-id": "c", "cmd": "cat", "args": [], "stdin": "stream", "timeout": 5, '
    b'"status-interval": 1}',
    b'CMD_RUN {"cmd-id": "c", "cmd": "cat", "args": [], "timeout": 5, "env-clear": true, '
    b'"terminal": {"rows": 24, "columns": 80, "term": "xterm"}}',
    b'CMD_QUERY {"cmd-id": "c", "out-offset": 0, "err-offset": 0, "max": 100, "follow": 2}',
    b'CMD_SIGNAL {"cmd-id": "c", "signal": "TERM"}', b'CMD_ACK {"cmd-id": "c"}', b'PING {"ping-id": "p"}',
    b'CMD_INPUT {"cmd-id": "c", "offset": 0, "data64": "eA==", "eof": true, "rows": 25, "columns": 90}',
    b'BYE {"reason": "x"}',
    b'HELLO {"name": "one", "beacon_interval": 1, "session": "s", "max_frame": 1000000, "addresses": ["1"]}']


ODD = [None, True, -1, 0, 2 ** 31, 10 ** 30, 10 ** 400, 1e308, '', 'x' * 5000,
       '\0\n', 'ß\u2028', 'c', '7', [], [1], [['a']], {}, {'a': 1}, {'port': []}]


def word_of(chance, words):
    """A word as text: with values of other kinds, or as no word at all."""
    word = chance.choice(words)
    if chance.random() < 0.4:
        return mutated(chance, word).decode('utf-8', 'replace').replace('\0', '')
    name, _, text = word.partition(b' ')
    keys = json.loads(text.decode())
    if 'cmd-id' in keys:
        keys['cmd-id'] += str(chance.randrange(100))
    for key in chance.sample(sorted(keys), chance.randrange(min(len(keys), 3) + 1)):
        keys[key] = chance.choice(ODD)
    return name.decode() + ' ' + json.dumps(keys)


@contextlib.contextmanager
def words_at_the_host(place):
    """Of a guest that has proved itself; some unsigned, as anybody may say them."""
    guests = []

    def stroke(chance):
        if not guests:
            guests.append(Guest(place.host.broker_port, 'speaker', b'1' * 32).join())
        body = word_of(chance, FROM_GUESTS)
        topic = chance.choice([CONNECTIONS, RESPONSES])
        try:
            if chance.random() < 0.8:
                guests[0].body(body, topic)
            else:
                guests[0].put(topic, {'from': 'speaker'}, mutated(chance, HELLO_BODY))
        except OSError:
            guests.pop().close()
    yield stroke
    for guest in guests:
        guest.close()


class HostByHand(Stranger):
    """Proves itself to a guest, and says what it likes, signed."""

    def greet(self, secret):
        _, told = self.hear('HELLO')
        nonces = 'one', told['nonce'], 'a' * 32
        self.say('HELLO ' + json.dumps({'nonce': 'a' * 32, 'key': 'k', 'name': 'one', 'proof': keyed(
            secret, 'host', *nonces).hexdigest()}), 'one')
        self.key, self.seq = keyed(secret, 'session', *nonces).digest(), 0

    def word(self, body, **headers):
        self.seq += 1
        headers = dict(headers, **{'from': 'host', 'to': 'one'})
        headers.update(mac=signature(self.key, 'host', str(self.seq), REQUESTS, headers, body), seq=self.seq)
        lines = ['%s:%s' % (name, escaped(str(value))) for name, value in headers.items()]
        self.host.say('SEND', 'destination:' + REQUESTS, 'content-length:%d' % len(body.encode()), *lines,
                      body=body.encode())


@contextlib.contextmanager
def words_at_the_guest(place):
    secret = os.urandom(32)
    with HostByHand() as host:
        guest = Agent(place.folder / 'guest', At(host.broker.address[1]), 'one', secret=secret.hex(),
                      max_commands=4)
        guest.start(wait=False)
        place.watch(guest)
        try:
            host.greet(secret)

            def stroke(chance):
                host.word(word_of(chance, FROM_HOSTS))
                if host.seq % 20 == 0:         # so that it isn't far behind
                    number = str(host.seq)
                    host.word('PING', **{'ping-id': number})
                    while host.hear('PONG')[0].get('ping-id') != number:
                        continue
            yield stroke
        finally:
            guest.stop()
            kill_those_in(guest.files)


def kill_those_in(folder):
    """Programs outlive their agent, and some were asked for without a time limit."""
    for pid in filter(str.isdigit, os.listdir('/proc')):
        with contextlib.suppress(OSError):
            if os.path.realpath('/proc/%s/cwd' % pid) == os.path.realpath(folder):
                os.kill(int(pid), signal.SIGKILL)


# --- files ----------------------------------------------------------------------------------------

CHIRP_LINES = [
    b'address\n', b'secret\n', b'vmhost 1\n', b'vmhost 2\n',
    b'stat /file\n', b'getfile /file\n', b'open /file rwc 420\n',
    b'pread 0 100 0\n', b'pwrite 0 3 0\nabc', b'putfile /new 420 5\nhello', b'getlongdir /\n', b'close 0\n',
    b'mkdir /d 493\n', b'rename /new /d/new\n', b'rmall /d\n', b'hash sha1 /file\n', b'symlink a /l\n',
    b'readlink /l\n', b'whoami 100\n', b'statfs /\n', b'utime /file 1 2\n', b'truncate /file 5\n']
CHIRP_REPLIES = [
    b'0\n', b'5\nhello', b'-3\n', b'10\n%s' % (b'x' * 10), b'0\n' + STAT % (FILE, 5), STAT % (FILE, 5),
    b'file\n' + STAT % (FILE, 3) + b'\n', b'40\n' + b'a' * 40]


@contextlib.contextmanager
def no_file_above(size):
    """What this process writes: a file of gigabytes is soon made, by `truncate`, and takes long to hash."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def chirp_server(place):
    folder = place.folder / 'served'
    folder.mkdir()
    write(folder / 'file', b'x' * 1000)
    with no_file_above(10 * MEGABYTE), our_server(folder, max_clients=100, idle_timeout=5) as server:
        yield lambda chance: exchange(server.address, mutated(
            chance, CHIRP_LINES[0] + some_of(chance, CHIRP_LINES)))
        with chirpclient.ChirpClient(*server.address) as client:
            assert client.stat('/').is_dir


@contextlib.contextmanager
def chirp_client(place):
    folder = place.folder / 'here'
    (folder / 'tree').mkdir(parents=True)
    for name in 'source', 'tree/file':
        write(folder / name, b'x' * 1000)

    def stroke(chance):
        with HostileServer(lambda line: mutated(chance, some_of(chance, CHIRP_REPLIES, 4)),
                           greets=chance.random() < 0.5) as server, \
                chirpclient.ChirpClient(*server.address, timeout=0.2) as client:
            with contextlib.suppress(chirpwire.ChirpError, FileExistsError):
                CALLS[chance.choice(sorted(CALLS))](client, folder)
    yield stroke


# --- the door, the journal ------------------------------------------------------------------------

CALL = b'<?xml version="1.0"?><methodCall><methodName>%s</methodName><params>%s</params></methodCall>'
VALUES = [b'<param><value>%s</value></param>' % value for value in (
    b'<string>one</string>', b'<int>5</int>', b'<double>1.5</double>', b'<boolean>1</boolean>', b'<nil/>',
    b'<array><data><value>a</value></data></array>', b'<base64>eA==</base64>',
    b'<struct><member><name>vm</name><value>one</value></member></struct>')]
METHODS = [b'ping', b'runCmd', b'getVM', b'listCmds', b'getCmdOutput', b'getEvents', b'system.multicall',
           b'help', b'cpFileToVM', b'signalCmd', b'startTransfer', b'pairVM', b'createVM']


@contextlib.contextmanager
def calls_at_the_door(place):
    address, _, port = place.host.address.rpartition(':')
    token = base64.b64encode(b'vmhost:' + place.host.token.encode())

    def stroke(chance):
        body = mutated(chance, CALL % (chance.choice(METHODS), some_of(chance, VALUES, 5)))
        head = (b'POST /RPC2 HTTP/1.1\r\nHost: 127.0.0.1:%s\r\nAuthorization: Basic %s\r\n'
                b'Content-Type: text/xml\r\nContent-Length: %d\r\n\r\n' % (port.encode(), token, len(body)))
        page = b'GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n' % chance.choice(
            [b'/', b'/status', b'/metrics', b'/output/x?offset=-1'])
        exchange((address, int(port)), chance.choice([head + body, mutated(chance, head) + body,
                                                      mutated(chance, page)]))
    yield stroke


@contextlib.contextmanager
def journals(place):
    """Of each format that there was, with damage: it is read, set aside, or refused by a sentence."""
    folder, olds = place.folder / 'state', []
    for number in range(1, hostjournal.JOURNAL_FORMAT + 1):
        write_journal(str(place.folder / 'old'), number)
        olds.append((place.folder / 'old').read_bytes())
        (place.folder / 'old').unlink()
    settings = types.SimpleNamespace(other_machines=True, unsigned_guests=False, first_use=True)

    def stroke(chance):
        folder.mkdir()
        data = bytearray(chance.choice(olds))
        for _ in range(chance.randrange(6)):
            at = chance.choice([chance.randrange(len(data)), chance.choice(written(data))])
            data[at:at + 8] = mutated(chance, data[at:at + 8])[:8].ljust(8, b'\0')
        path = folder / 'journal.sqlite'
        path.write_bytes(data[:chance.choice([len(data)] * 3 + [chance.randrange(len(data))])])
        with contextlib.suppress(faults.VMHostError):
            use_journal(str(path), settings)
        shutil.rmtree(str(folder))
    yield stroke


def written(data):
    """Where something is written."""
    return [at for at in range(0, len(data), 8) if any(data[at:at + 8])]


def use_journal(path, settings):
    """What a host does with it at its start."""
    journal = hostjournal.Journal(path)
    try:
        guests = hostguests.Guests(30)
        for known in journal.guests():
            guests.remember(*known)
        commands = hostcommands.Commands(journal)
        trust = hosttrust.Trust(hosttrust.Secrets(journal), guests, settings)
        trust.secret_of('a')
        assert len(trust.secrets.host_key) == 32
        for execution in commands.open_of('a'):
            commands.request(execution.cmd_id)
        journal.events_after(0, 0)
    finally:
        journal.close()


# --- the table ------------------------------------------------------------------------------------

TARGETS = [frames_at_the_broker, frames_at_the_link, words_at_the_host, words_at_the_guest, chirp_server,
           chirp_client, calls_at_the_door, journals]


class Place:
    """Where it happens: a host with a guest that must go on working; ``watch`` looks after more processes."""

    def __init__(self, folder, host, guest):
        self.folder, self.host, self.guest = folder, host, guest
        self.processes = [host, guest]

    def watch(self, process):
        self.processes.append(process)

    def memory(self):
        """MB of each process, this one first."""
        found = []
        gc.collect()
        for pid in ['self'] + [process.process.pid for process in self.processes]:
            with open('/proc/%s/statm' % pid) as file:
                found.append(int(file.read().split()[1]) * 4096 / MEGABYTE)
        return found

    def tracebacks(self):
        return [process.log()[at:at + 3000] for process in self.processes
                for at in [process.log().find('Traceback')] if at >= 0]


@pytest.fixture(scope='module')
def agents_at_work(tmp_path_factory):
    with Host(tmp_path_factory.mktemp('host')) as host:
        with Agent(tmp_path_factory.mktemp('steady'), host, 'steady') as guest:
            yield host, guest


class Tracebacks(logging.Handler):
    """Keeps what is logged with a traceback here, and nothing else: pytest would keep all of it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        if record.exc_info:
            self.found.append(self.format(record))

    def __enter__(self):
        self._others, logging.root.handlers = logging.root.handlers, [self]
        return self

    def __exit__(self, *exc):
        logging.root.handlers = self._others


@pytest.mark.parametrize('target', TARGETS, ids=lambda target: target.__name__)
def test_nonsense(target, agents_at_work, tmp_path):
    place, chance, threads = Place(tmp_path, *agents_at_work), random.Random(SEED), set(threading.enumerate())
    seconds, strokes, early = SECONDS / len(TARGETS), 0, None
    begin = time.monotonic()
    with Tracebacks() as here, target(place) as stroke:
        while time.monotonic() < begin + seconds:
            stroke(chance)
            strokes += 1
            if early is None and time.monotonic() > begin + seconds / 4:
                early = place.memory()
        late = place.memory()
        assert place.host.run('steady', 'echo', 'still there')['out'] == 'still there\n'
        tracebacks = place.tracebacks() + here.found
    print('\nseed %d: %s, %d strokes, memory %s MB, then %s' % (
        SEED, target.__name__, strokes, [round(one) for one in early or late], [round(one) for one in late]))
    assert not tracebacks, tracebacks[0]
    assert all(after < before + GROWTH for before, after in zip(early or late, late))
    wait_until(lambda: not set(threading.enumerate()) - threads, 20)
