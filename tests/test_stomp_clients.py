"""Other people's clients on our broker, each with its own habits: stomper, stomp.py, stompest, stompman."""

import asyncio
import queue
import socket
import threading

import pytest
import stomper
import stomper.stomp_10
import stomper.stomp_11
import stomper.stompbuffer
from helpers import wait_until
from stomp_client import running

from stompbroker import Broker

pytestmark = pytest.mark.ends

TIMEOUT = 30
TEXT = 'Grüße: a\\b\n'


@pytest.fixture(scope='module')
def guarded():
    """A broker that wants to know who one is."""
    with running(Broker(port=0, login='me', passcode='secret')) as broker:
        yield broker
        wait_until(lambda: broker.counters()['connections'] == 0, TIMEOUT)
        assert broker.counters()['cut_off'] == 0 and broker.counters()['queued_bytes'] == 0


@pytest.fixture
def errors(guarded):
    """The number of ERROR frames that the test made the broker send; none is right."""
    before = guarded.counters()['errors']
    yield lambda: guarded.counters()['errors'] - before
    assert guarded.counters()['errors'] == before


# --- stomper: makes and takes apart text, on a socket of one's own ---

class Stomper:
    """A plain socket with stomper's buffer, as its examples use it."""

    def __init__(self, broker):
        self.socket = socket.create_connection(broker.address, TIMEOUT)
        self._buffer = stomper.stompbuffer.StompBuffer()

    def say(self, text):
        self.socket.sendall(text.encode('utf-8'))

    def take(self):
        while True:
            message = self._buffer.getOneMessage()
            if message is not None:
                return message
            data = self.socket.recv(4096)
            assert data
            self._buffer.appendData(data.decode('utf-8'))

    def take_end(self):
        assert self.socket.recv(1) == b''
        self.socket.close()


@pytest.mark.parametrize('version', ['1.0', '1.1'])
def test_stomper(guarded, errors, version):
    """stomper: every server frame ends with NUL LF (stomper.stompbuffer waits for it)
    stomper: frames of stomper 1.0 (padded header values) work end to end
    stomper: frames of stomper 1.1 work end to end
    stomper: DISCONNECT without the blank line is understood"""
    lib = stomper.stomp_10 if version == '1.0' else stomper.stomp_11
    old = version == '1.0'
    client = Stomper(guarded)
    client.say(lib.connect('me', 'secret') if old else lib.connect('me', 'secret', 'localhost'))
    connected = client.take()
    assert connected['cmd'] == 'CONNECTED' and connected['headers']['session']
    client.say(lib.subscribe('/queue/stomper', *(['client'] if old else ['7', 'client'])))
    client.say(lib.send('/queue/stomper', 'hello'))
    message = client.take()
    assert (message['cmd'], message['body']) == ('MESSAGE', 'hello')
    assert message['headers']['destination'] == '/queue/stomper'
    number = message['headers']['message-id']
    client.say(lib.begin('t'))
    client.say(lib.ack(number, 't') if old else lib.ack(number, '7', 't'))
    client.say(lib.commit('t'))
    client.say(lib.begin('u'))
    client.say(lib.send('/queue/stomper', 'never', 'u'))
    client.say(lib.abort('u'))
    frame = lib.Frame()
    frame.unpack(lib.send('/queue/stomper', 'from a Frame'))
    frame.headers['receipt'] = 'r'
    client.say(frame.pack())
    found = {one['cmd']: one for one in (client.take(), client.take())}
    assert found['RECEIPT']['headers']['receipt-id'] == 'r'
    assert found['MESSAGE']['body'] == 'from a Frame'
    number = found['MESSAGE']['headers']['message-id']
    client.say(lib.ack(number) if old else lib.ack(number, '7'))
    client.say(lib.unsubscribe('/queue/stomper' if old else '7'))
    client.say(lib.disconnect() if old else lib.disconnect('77'))
    if not old:
        assert client.take()['headers']['receipt-id'] == '77'
    client.take_end()


def test_stomper_engine(guarded, errors):
    """Its reaction table answers a MESSAGE with an ACK by itself."""
    client = Stomper(guarded)
    engine = stomper.stomp_11.Engine()
    client.say(stomper.stomp_11.connect('me', 'secret', 'localhost'))
    client.say(stomper.stomp_11.subscribe('/queue/engine', '1', 'client'))
    client.say(stomper.stomp_11.send('/queue/engine', 'react'))
    assert engine.react(client.take()) == ''
    assert engine.sessionId
    answer = engine.react(client.take())
    assert 'ACK' in answer
    client.say(answer)
    client.say(stomper.stomp_11.disconnect('bye'))
    assert client.take()['headers']['receipt-id'] == 'bye'
    client.take_end()


# --- stomp.py: a thread of its own that calls listeners ---

@pytest.fixture
def stomp_py():
    return pytest.importorskip('stomp')


def listener_of(stomp_py):
    class Listener(stomp_py.ConnectionListener):
        """Puts what comes into queues."""
        def __init__(self):
            self.messages, self.receipts = queue.Queue(), queue.Queue()
            self.errors, self.heart_failures = [], 0

        def on_message(self, *args):
            # Since stomp.py 7 (or so) a frame; before, headers and body.
            headers, body = (args[0].headers, args[0].body) if len(args) == 1 else args
            self.messages.put((headers, body))

        def on_receipt(self, *args):
            headers = args[0].headers if len(args) == 1 else args[0]
            self.receipts.put(headers['receipt-id'])

        def on_error(self, *args):
            self.errors.append(args)

        def on_heartbeat_timeout(self):
            self.heart_failures += 1
    return Listener()


def key_for_stomp_py(headers, version):
    """What ``ack`` wants to know."""
    if version == '1.2':
        return [headers['ack']]
    return [headers['message-id']] + (['1'] if version == '1.1' else [])


@pytest.mark.once
@pytest.mark.parametrize('version', ['1.0', '1.1', '1.2'])
def test_stomp_py(guarded, errors, stomp_py, version):
    kind = {'1.0': stomp_py.Connection10, '1.1': stomp_py.Connection11, '1.2': stomp_py.Connection12}[version]
    connection, listener = kind([guarded.address]), listener_of(stomp_py)
    connection.set_listener('', listener)
    connection.connect('me', 'secret', wait=True)
    individually = 'client' if version == '1.0' else 'client-individual'
    connection.subscribe('/queue/stomp.py', id='1', ack=individually)
    special = {'special': 'c:d\\e\nf'} if version != '1.0' else {'special': 'plain'}
    connection.send('/queue/stomp.py', TEXT, content_type='text/plain', headers=special, receipt='r1')
    headers, body = listener.messages.get(timeout=TIMEOUT)
    assert body == TEXT and headers['special'] == special['special']
    assert listener.receipts.get(timeout=TIMEOUT) == 'r1'
    connection.ack(*key_for_stomp_py(headers, version))
    transaction = connection.begin()
    for number in range(3):
        connection.send('/queue/stomp.py', str(number), transaction=transaction)
    connection.commit(transaction)
    for number in range(3):
        headers, body = listener.messages.get(timeout=TIMEOUT)
        assert body == str(number)
        connection.ack(*key_for_stomp_py(headers, version))
    transaction = connection.begin()
    connection.send('/queue/stomp.py', 'never', transaction=transaction)
    connection.abort(transaction)
    connection.unsubscribe(id='1')
    connection.disconnect(receipt='bye')
    wait_until(lambda: 'bye' in list(listener.receipts.queue), TIMEOUT)
    assert listener.errors == [] and listener.messages.empty()


@pytest.mark.once
def test_stomp_py_heart_beats(guarded, errors, stomp_py):
    """Both sides beat for many intervals, and neither takes the other for dead."""
    connection = stomp_py.Connection12([guarded.address], heartbeats=(250, 250))
    listener = listener_of(stomp_py)
    connection.set_listener('', listener)
    connection.connect('me', 'secret', wait=True)
    pause = threading.Event()
    pause.wait(2.5)
    assert connection.is_connected() and listener.heart_failures == 0
    connection.subscribe('/topic/stomp.py', id='1')
    connection.send('/topic/stomp.py', 'alive')
    assert listener.messages.get(timeout=TIMEOUT)[1] == 'alive'
    connection.disconnect(receipt='bye')
    wait_until(lambda: not connection.is_connected(), TIMEOUT)
    assert listener.errors == []


@pytest.mark.once
def test_stomp_py_with_a_wrong_passcode(guarded, stomp_py):
    connection, listener = stomp_py.Connection12([guarded.address]), listener_of(stomp_py)
    connection.set_listener('', listener)
    with pytest.raises(stomp_py.exception.ConnectFailedException):
        connection.connect('me', 'wrong', wait=True)
    assert len(listener.errors) == 1


# --- stompest: a synchronous client ---

@pytest.mark.once
@pytest.mark.parametrize('version', ['1.0', '1.1', '1.2'])
def test_stompest(guarded, errors, version):
    config = pytest.importorskip('stompest.config')
    sync = pytest.importorskip('stompest.sync')
    client = sync.Stomp(config.StompConfig('tcp://%s:%d' % guarded.address, login='me', passcode='secret',
                                           version=version))
    client.connect(heartBeats=None if version == '1.0' else (10000, 10000), connectTimeout=TIMEOUT)
    assert client.session.version == version and client.session.id
    assert client.session.server is None if version == '1.0' else 'vmhost' in client.session.server
    mode = 'client' if version == '1.0' else 'client-individual'
    ids = {} if version == '1.0' else {'id': 'a:b\\c'}
    token = client.subscribe('/queue/stompest', dict(ids, ack=mode))
    special = 'x' if version == '1.0' else 'c:d\\e\nf'
    client.send('/queue/stompest', TEXT.encode('utf-8'), {'special': special})
    assert client.canRead(TIMEOUT)
    frame = client.receiveFrame()
    assert frame.command == 'MESSAGE' and frame.body == TEXT.encode('utf-8')
    assert frame.headers['special'] == special
    assert client.message(frame) == token
    client.ack(frame, receipt='acked')
    assert client.receiveFrame().headers['receipt-id'] == 'acked'
    with client.transaction(receipt='done') as name:
        assert client.receiveFrame().headers['receipt-id'] == 'done-begin'
        client.send('/queue/stompest', b'in it', {'transaction': name})
        assert not client.canRead(0)
    found = {one.command: one for one in (client.receiveFrame(), client.receiveFrame())}
    assert found['MESSAGE'].body == b'in it' and found['RECEIPT'].headers['receipt-id'] == 'done-commit'
    client.ack(found['MESSAGE'])
    if version != '1.0':
        client.beat()
        client.send('/queue/stompest', b'refused')
        client.nack(client.receiveFrame(), receipt='nacked')
        assert client.receiveFrame().headers['receipt-id'] == 'nacked'
        again = client.receiveFrame()
        assert again.body == b'refused' and again.headers['redelivered'] == 'true'
        client.ack(again)
    client.unsubscribe(token)
    client.disconnect(receipt='bye')
    assert client.receiveFrame().headers['receipt-id'] == 'bye'
    client.close()


# --- stompman: asynchronous, version 1.2 alone ---

@pytest.mark.once
def test_stompman(guarded, errors):
    stompman = pytest.importorskip('stompman', reason='needs a newer Python')
    host, port = guarded.address
    server = stompman.ConnectionParameters(host=host, port=port, login='me', passcode='secret')

    async def converse():
        got, failures = asyncio.Queue(), []
        async with stompman.Client([server], heartbeat=stompman.Heartbeat(300, 300)) as client:
            async def handle(frame):
                await got.put(frame)
                if frame.body == b'fail':
                    raise ValueError('on purpose')          # it answers with NACK
            subscription = await client.subscribe(
                '/queue/stompman', handle, on_suppressed_exception=lambda *args: failures.append(args))
            await client.send(TEXT.encode('utf-8'), '/queue/stompman', headers={'special': 'c:d\\e\nf'},
                              receipt_timeout=TIMEOUT)
            frame = await asyncio.wait_for(got.get(), TIMEOUT)
            assert frame.body == TEXT.encode('utf-8') and frame.headers['special'] == 'c:d\\e\nf'
            async with client.begin() as transaction:
                await transaction.send(b'in it', '/queue/stompman')
            assert (await asyncio.wait_for(got.get(), TIMEOUT)).body == b'in it'
            await client.send(b'fail', '/queue/stompman')
            assert (await asyncio.wait_for(got.get(), TIMEOUT)).body == b'fail'
            await asyncio.sleep(2)                          # several heart-beats of both sides
            assert client.is_alive() and len(failures) == 5      # as often as it is offered
            await subscription.unsubscribe()
    asyncio.run(converse())

    async def take_what_was_refused():
        got = asyncio.Queue()
        async with stompman.Client([server]) as client:
            subscription = await client.subscribe('/queue/DLQ', got.put, ack='auto',
                                                  on_suppressed_exception=lambda *args: None)
            assert (await asyncio.wait_for(got.get(), TIMEOUT)).body == b'fail'
            assert got.empty()
            await subscription.unsubscribe()
    asyncio.run(take_what_was_refused())
