"""Bad peers: those who don't read, don't end, flood, lie or vanish. They harm themselves alone."""

import contextlib
import logging
import os
import random
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time

import pytest
from helpers import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from process_memory import MEMORY_IS_KNOWN, memory, most_memory
from stomp_client import TOP, Client, Program, frame, running

from stompbroker import Broker

pytestmark = pytest.mark.ends

MIB = 1024 * 1024


@contextlib.contextmanager
def connected(broker, number=1, *lines, **options):
    """So many clients, connected; closed at the end."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(broker.address, **options)) for _ in range(number)]
        for client in clients:
            client.say('CONNECT', 'accept-version:1.2', 'host:x', *lines)
        for client in clients:
            assert client.take().command == 'CONNECTED'
        yield clients


# --- who doesn't read ---

@pytest.mark.parametrize('habit', ['never reads', 'reads a byte at a time'])
def test_a_subscriber_that_does_not_read_delays_nobody(habit):
    """robustness: a subscriber that never reads does not stop the others (20 MiB past it, 15 s)"""
    with running(Broker(port=0)) as broker:
        with connected(broker, 2) as (sender, listener), connected(broker, receive_buffer=4096) as (lazy,):
            listener.subscribe('/topic/a')
            lazy.subscribe('/topic/a')
            body = os.urandom(MIB)
            begin = time.monotonic()
            for _ in range(20):
                sender.say('SEND', 'destination:/topic/a', 'content-length:%d' % MIB, body=body)
                assert listener.take().body == body
                assert broker.counters()['waiting_bytes'] <= 10 * MIB + 1000  # one more may wait
                if habit != 'never reads':
                    with contextlib.suppress(ConnectionError):
                        lazy.socket.recv(1)
            assert time.monotonic() - begin < 15
            wait_until(lambda: broker.counters()['cut_off'] == 1)
            assert broker.counters()['connections'] == 2
            assert broker.counters()['waiting_bytes'] == 0


def test_a_publisher_that_does_not_read_its_receipts(connect):
    """robustness: a publisher that does not read its RECEIPTs (5000) does not stop others"""
    listener, client = connect('1.2'), connect('1.2')
    listener.subscribe('/topic/a')
    client.send(frame('SEND', 'destination:/topic/a', 'receipt:' + 'x' * 100) * 5000)
    assert len(listener.take_all(5000)) == 5000
    assert {one.command for one in client.take_all(5000)} == {'RECEIPT'}


def test_what_waits_for_all_is_bounded():
    """Each may have 64 MiB, all together 8: those for whom most waits have to go."""
    with running(Broker(port=0, waiting=64 * MIB, waiting_in_all=8 * MIB)) as broker:
        with connected(broker, 2) as (sender, listener), connected(broker, 6, receive_buffer=4096) as lazy:
            for client in lazy + [listener]:
                client.subscribe('/topic/a')
            for number in range(12):
                body = b'%d' % (number % 10) * MIB
                sender.say('SEND', 'destination:/topic/a', body=body)
                assert listener.take().body == body
                listener.before_now()
                assert broker.counters()['waiting_bytes'] <= 8 * MIB
            assert broker.counters()['cut_off'] >= 4


def test_a_body_that_waits_for_many_is_there_once():
    """Ten don't read two bodies of 6 MiB: that is 12 MiB of the 16, and nobody is cut off."""
    with running(Broker(port=0, waiting_in_all=16 * MIB, max_frame=8 * MIB)) as broker:
        with connected(broker, 1) as (sender,), connected(broker, 10, receive_buffer=100000) as lazy:
            for client in lazy:
                client.subscribe('/topic/a')
            bodies = [os.urandom(6 * MIB) for _ in range(2)]
            for body in bodies:
                sender.ask('SEND', 'destination:/topic/a', 'content-length:%d' % len(body), body=body)
            sender.before_now()
            counters = broker.counters()
            assert counters['cut_off'] == 0 and 11 * MIB < counters['waiting_bytes'] < 12.1 * MIB
            for client in lazy[:5]:
                assert [message.body for message in client.take_all(2)] == bodies
            for client in lazy[5:7]:
                client.close()
            sender.before_now()
            assert 11 * MIB < broker.counters()['waiting_bytes'] < 12.1 * MIB
            for client in lazy[7:]:
                assert [message.body for message in client.take_all(2)] == bodies
            wait_until(lambda: broker.counters()['waiting_bytes'] == 0)


def test_who_takes_most_of_the_memory_goes():
    """Ten share a body of 6 MiB; three take 5 MiB each, for themselves alone."""
    with running(Broker(port=0, waiting_in_all=17 * MIB, max_frame=8 * MIB)) as broker:
        with connected(broker, 1) as (sender,), connected(broker, 13, receive_buffer=500000) as lazy:
            for number, client in enumerate(lazy):
                client.subscribe('/topic/%d' % max(0, number - 9))
            for number, size in enumerate((6, 5, 5, 5)):
                sender.publish('/topic/%d' % number, b'%d' % number * (size * MIB))
                sender.before_now()
            assert broker.counters()['cut_off'] == 1 and broker.counters()['waiting_bytes'] < 17 * MIB
            assert [client.take().body for client in lazy[:10]] == [b'0' * (6 * MIB)] * 10


@pytest.mark.skipif(not MEMORY_IS_KNOWN, reason='nobody tells how much memory a process has')
@pytest.mark.once
def test_what_one_read_brings_times_all_subscriptions_is_bounded():
    """60 KiB of small frames, for 60 clients with 25 subscriptions each: 200 MB, where 16 MiB may wait."""
    with Program('--waiting-in-all', str(16 * MIB)) as program, connected(program, 61) as (sender, *clients):
        for number, client in enumerate(clients):
            client.send(b''.join(frame('SUBSCRIBE', 'id:%d' % (25 * number + each), 'destination:/t')
                                 for each in range(25)))
            client.before_now()
        before = most_memory(program.process)
        sender.send(frame('SEND', 'destination:/t') * 1500)
        sender.before_now()
        assert most_memory(program.process) - before < (1.1 * 16 + 10) * MIB


@pytest.mark.skipif(not MEMORY_IS_KNOWN, reason='nobody tells how much memory a process has')
@pytest.mark.once
def test_what_one_round_reads_is_bounded():
    """300 clients have said 60 KiB of small frames each, when the broker looks: 180 MB of messages."""
    with Program() as program, connected(program, 301) as (listener, *clients):
        listener.subscribe('/t')
        before = most_memory(program.process)
        program.process.send_signal(signal.SIGSTOP)
        for client in clients:
            client.send(frame('SEND', 'destination:/t') * 500)
        program.process.send_signal(signal.SIGCONT)
        for client in clients:
            client.before_now()
        assert len(listener.bodies()) == 500 * 300
        assert most_memory(program.process) - before < 40 * MIB


@pytest.mark.skipif(not MEMORY_IS_KNOWN, reason='nobody tells how much memory a process has')
@pytest.mark.once
def test_small_frames_that_wait_take_no_more_than_their_bytes():
    """RECEIPTs that nobody reads."""
    with Program('--waiting-in-all', str(4 * MIB)) as program, connected(program, 1) as (good,):
        with connected(program, 1, receive_buffer=4096) as (lazy,):
            good.before_now()
            before = most_memory(program.process)
            with contextlib.suppress(OSError):
                for _ in range(45):
                    lazy.send(frame('SEND', 'destination:/t', 'receipt:') * 10000)
            good.before_now()
            assert most_memory(program.process) - before < (1.1 * 4 + 1) * MIB


@pytest.mark.skipif(not MEMORY_IS_KNOWN, reason='nobody tells how much memory a process has')
def test_one_round_can_not_bring_more_than_may_wait():
    """60 KiB of small frames, times 1,000 subscriptions of their sender: 180 MB, if nothing stopped it."""
    with Program() as program, connected(program, 1) as (good,):
        with connected(program, 1, receive_buffer=4096) as (greedy,):
            good.subscribe('/t')
            greedy.send(b''.join(frame('SUBSCRIBE', 'id:%d' % number, 'destination:/t')
                                 for number in range(1000)))
            greedy.before_now()
            with contextlib.suppress(ConnectionError):
                greedy.send(frame('SEND', 'destination:/t') * 2500)
                while greedy.socket.recv(MIB):
                    pass
            assert len(good.bodies()) > 1000
            assert most_memory(program.process) < 100 * MIB


def test_a_queue_waits_for_a_slow_consumer():
    """It gives as much as the consumer takes, and keeps the rest; nobody is cut off."""
    with running(Broker(port=0)) as broker, connected(broker, 1) as (sender,):
        with connected(broker, 1, receive_buffer=4096) as (slow,):
            slow.subscribe('/queue/a')
            bodies = [b'%d' % (number % 10) * 500000 for number in range(40)]
            for body in bodies:
                sender.publish('/queue/a', body)
                assert broker.counters()['waiting_bytes'] < 2 * MIB
            assert broker.counters()['queued_bytes'] > 5 * MIB
            assert [message.body for message in slow.take_all(40)] == bodies
            assert broker.counters()['cut_off'] == 0 and broker.counters()['queued_bytes'] == 0


def test_a_slow_reader_of_the_end_gets_all_of_it():
    """Who says DISCONNECT, and then reads slowly, gets what it is owed, as long as it goes on."""
    with running(Broker(port=0)) as broker, connected(broker, 1) as (sender,):
        with connected(broker, 1, receive_buffer=4096) as (client,):
            client.subscribe('/queue/a')
            sender.publish('/queue/a', *[b'x' * MIB] * 7)
            client.say('DISCONNECT', 'receipt:bye')
            begin, pause = time.monotonic(), threading.Event()
            while time.monotonic() < begin + 2.5:            # longer than without progress
                pause.wait(0.02)
                assert client.socket.recv(4096)
            data = bytearray()
            while True:
                more = client.socket.recv(MIB)
                if not more:
                    break
                data += more
            assert data.endswith(b'RECEIPT\nreceipt-id:bye\n\n\0\n')


# --- who doesn't end ---

def test_half_a_frame_for_ever(connect):
    listener = connect('1.2')
    listener.subscribe('/topic/a')
    halves = []
    for start in (b'SE', b'SEND\n', b'SEND\ndestination:/topic/a', b'SEND\ndestination:/topic/a\n\n',
                  b'SEND\ndestination:/topic/a\ncontent-length:1000\n\nhalf'):
        halves.append(connect('1.2'))
        halves[-1].send(start)
    listener.publish('/topic/a', b'whole')
    assert listener.bodies() == [b'whole']


@pytest.mark.parametrize('vanish', ['close', 'reset'])
def test_a_frame_that_never_ends_is_never_delivered(connect, vanish):
    """robustness: a client that dies in the middle of a frame hurts nobody, nothing is delivered"""
    listener = connect('1.2')
    listener.subscribe('/topic/a')
    for start in (b'SEND\ndestination:/topic/a\n\nhalf',
                  b'SEND\ndestination:/topic/a\ncontent-length:9\n\nha\0lf',
                  b'SEND\ndestination:/topic/a\n'):
        client = connect('1.2')
        client.send(start)
        client.close() if vanish == 'close' else client.reset()
    assert listener.bodies() == []


def test_unfinished_frames_are_bounded_in_all():
    with running(Broker(port=0, held=MIB)) as broker:
        with connected(broker, 1) as (good,), connected(broker, 30) as bad:
            good.subscribe('/topic/a')
            for number, client in enumerate(bad):
                client.send(b'SEND\ndestination:/topic/a\n\n' + b'x' * (90000 + number))
                good.publish('/topic/a', b'%d' % number)     # a small frame always finds room
                assert good.bodies() == [b'%d' % number]
                assert broker.counters()['held_bytes'] <= MIB
            wait_until(lambda: broker.counters()['errors'] >= 18)
            good.say('SEND', 'destination:/topic/a', body=b'y' * 50000)
            assert good.bodies() == [b'y' * 50000]
        wait_until(lambda: broker.counters()['connections'] == 0)
        assert broker.counters()['held_bytes'] == 0


def test_heads_of_unfinished_frames_count_too():
    with running(Broker(port=0, held=MIB)) as broker, connected(broker, 40) as bad:
        for client in bad:
            client.send(b'SEND\ndestination:/topic/a\nlong:%b\ncontent-length:9\n\n' % (b'x' * 60000))
        wait_until(lambda: broker.counters()['errors'] >= 20 and broker.counters()['held_bytes'] <= MIB)


# --- who floods ---

@pytest.mark.once
def test_a_flood_delays_others_little():
    """One sends as fast as it can; between a request of another and its answer the broker takes no more of
    that than in 0.2 s on a machine with nothing else to do: on a busy one all take longer."""
    with Program() as program, connected(program, 3) as (flooder, asker, answerer):
        answerer.subscribe('/topic/question')
        asker.subscribe('/topic/answer')
        stop, sent = threading.Event(), [0]

        def flood():
            burst = frame('SEND', 'destination:/topic/nobody', body=b'x' * 50) * 100
            while not stop.is_set():
                flooder.send(burst)
                sent[0] += 100
        thread = threading.Thread(target=flood)
        thread.start()
        try:
            between = []
            for number in range(100):
                before = sent[0]
                asker.say('SEND', 'destination:/topic/question', body=b'%d' % number)
                assert answerer.take().body == b'%d' % number
                answerer.say('SEND', 'destination:/topic/answer', body=b'%d' % number)
                assert asker.take().body == b'%d' % number
                between.append(sent[0] - before)
        finally:
            stop.set()
            thread.join(60)
        assert statistics.median(between) < 20000 < sent[0], between


def test_many_that_come_and_go(broker, connect):
    monitor = connect('1.2')
    for _ in range(5):
        with connected(broker, 100, 'heart-beat:10000,10000') as clients:
            for number, client in enumerate(clients):
                client.say('SUBSCRIBE', 'id:0', 'destination:/topic/%d' % number)
                client.send(b'SEND\ndestination:/topic/%d\n\nhalf' % number)
        monitor.before_now()
    wait_until(lambda: broker.counters()['connections'] == 1)
    assert broker.counters()['destinations'] == 0 and broker.counters()['held_bytes'] == 0


def allow_descriptors(number):
    resource = pytest.importorskip('resource')     # which Windows doesn't have, nor a limit
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < number:
        pytest.skip('at most %d descriptors here' % hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number), hard))


def test_2000_that_connect_at_once():
    """None waits for the one before it; who doesn't fit into the listener's queue tries again."""
    allow_descriptors(2200)
    with Program() as program, contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        begin = time.monotonic()
        for _ in range(2000):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(program.address)
            selector.register(client, selectors.EVENT_WRITE)
        while selector.get_map():
            for key, events in selector.select(30):
                if events & selectors.EVENT_WRITE:
                    key.fileobj.send(frame('CONNECT', 'accept-version:1.2', 'host:x'))
                    selector.modify(key.fileobj, selectors.EVENT_READ)
                else:
                    assert key.fileobj.recv(4096).startswith(b'CONNECTED\n')
                    selector.unregister(key.fileobj)
            assert time.monotonic() - begin < 15


@pytest.mark.slow
@pytest.mark.skipif(not MEMORY_IS_KNOWN, reason='nobody tells how much memory a process has')
def test_2000_at_once_and_memory_returns():
    number = 2000
    allow_descriptors(number + 200)
    with Program() as program:
        after = []
        for _ in range(4):
            with connected(program, number, 'heart-beat:30000,30000') as clients:
                for client in clients:
                    client.say('SUBSCRIBE', 'id:0', 'destination:/topic/all', 'receipt:r')
                for client in clients:
                    assert client.take().command == 'RECEIPT'
                clients[0].say('SEND', 'destination:/topic/all', body=b'x' * 10000)
                for client in clients:
                    assert len(client.take().body) == 10000
                full = memory(program.process)
            with connected(program, 1) as (last,):
                last.before_now()
            after.append(memory(program.process))
        assert full < 80 * MIB                           # under 40 KiB each, with Python itself
        # What Python keeps from its first use for the next is no leak, but must not grow.
        assert after[-1] < after[1] + 2 * MIB, after


FEW = ['sh', '-c', 'ulimit -n 30; exec "$@"', 'sh']
TAKES_ALL = ['sh', '-c', 'ulimit -n 30; python=$1; shift 2; exec "$python" -c "$0" "$@"',
             'import sys; sys.path.insert(0, %r); import stompbroker; stompbroker.LEFT_FREE = 0; '
             'sys.exit(stompbroker.main())' % TOP]


@pytest.mark.skipif(not hasattr(signal, 'SIGUSR1'), reason='signals of POSIX')
@pytest.mark.parametrize('before', [FEW, TAKES_ALL])
def test_who_asks_what_it_holds_when_descriptors_are_few(before):
    """A stranger's connections took the last one: what was imported just then made the broker end."""
    with Program(before=before) as program, contextlib.ExitStack() as stack:
        (client,) = stack.enter_context(connected(program))
        client.publish('/queue/\u00e4\\n', b'1')
        client.before_now()
        for _ in range(40):
            stack.enter_context(Client(program.address))
        client.before_now()
        program.process.send_signal(signal.SIGUSR1)
        for line in iter(program.process.stderr.readline, b''):
            if line.startswith(b'/queue/\\xe4\\n  '):
                break
        else:
            raise AssertionError('no line for the queue')
        client.before_now()
        assert program.process.poll() is None


@pytest.mark.skipif(os.name != 'posix', reason='descriptors of POSIX')
def test_some_descriptors_are_left_for_the_rest_of_the_process():
    """A host agent has files and programs of its own; strangers took all, and it stood still."""
    with Program(before=FEW) as program, contextlib.ExitStack() as stack:
        clients = stack.enter_context(connected(program, 15))
        with Client(program.address) as another:
            another.take_end_or_error()
        for client in clients:
            client.before_now()
        clients[0].close()
        with Client(program.address) as another:
            another.connect('1.2')
        _, _, errors = program.end(signal.SIGTERM)
        assert b'no more than 15 connections, since the process may open 30 files' in errors


def test_descriptors_run_out():
    """Who comes when there are none left waits until there are; the others don't notice."""
    with Program(before=TAKES_ALL) as program:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Client(program.address)) for _ in range(40)]
            for client in clients:
                client.say('CONNECT', 'accept-version:1.2', 'host:x')
            for client in clients[:15]:
                assert client.take().command == 'CONNECTED'
            clients[0].before_now()
            for client in clients[:15]:
                client.close()
            for client in clients[15:]:
                assert client.take().command == 'CONNECTED'
                client.close()
        assert program.process.poll() is None


@pytest.mark.skipif(not os.path.exists('/proc/self/fd'), reason='descriptors are counted in /proc')
def test_nothing_is_left_after_stop():
    def descriptors():
        return len(os.listdir('/proc/self/fd'))
    before, threads = descriptors(), threading.active_count()
    for _ in range(3):
        with running(Broker(port=0)) as broker, connected(broker, 20) as clients:
            for client in clients:
                client.subscribe('/topic/a')
            clients[0].say('SEND', 'destination:/topic/a', body=b'x' * MIB)
            clients[1].send(b'SEND\nhalf')
    assert (descriptors(), threading.active_count()) == (before, threads)


def test_lines_about_strangers_are_few(caplog):
    """Who says nonsense, or guesses passcodes, as fast as it can, fills no disk; but it is told of."""
    with running(Broker(port=0, passcode='x')) as broker, caplog.at_level(logging.INFO, 'vmhost.broker'):
        for words in (b'NONSENSE\n\n\0', frame('CONNECT', 'accept-version:1.2', 'host:x')) * 30:
            with Client(broker.address) as client:
                client.send(words)
                client.take_error()
        lines = [record.getMessage() for record in caplog.records]
        assert [line.split(': ')[1] for line in lines] == ["unknown command 'NONSENSE'",
                                                           'login or passcode is wrong']
    assert [record.levelname for record in caplog.records] == ['INFO', 'WARNING']


# --- noise ---

CONVERSATION = [
    frame('SUBSCRIBE', 'id:0', 'destination:/topic/a', 'ack:client'),
    frame('SEND', 'destination:/topic/a', body=b'a'),
    frame('SEND', 'destination:/queue/fuzz', 'content-length:3', 'receipt:r', body=b'a\0b'), b'\n', b'\r\n',
    frame('SUBSCRIBE', 'id:1', 'destination:/queue/fuzz', 'ack:client-individual'),
    frame('BEGIN', 'transaction:t'),
    frame('SEND', 'destination:/topic/a', 'transaction:t', 'h\\c:\\n'), frame('COMMIT', 'transaction:t'),
    frame('ACK', 'id:2-x'), frame('NACK', 'id:1'), frame('ABORT', 'transaction:t'),
    frame('UNSUBSCRIBE', 'id:0'), frame('DISCONNECT', 'receipt:bye')]


SPLINTERS = [b'\0', b'\n', b'\r', b':', b'\\', b'\n\n', b'\xff', b'content-length:7\n']


def listens_to_noise(broker, caplog, noise, first):
    """After noise the broker serves others, and was not surprised."""
    with Client(broker.address) as client:
        if first:
            client.connect(first)
        with contextlib.suppress(ConnectionError):
            client.send(noise)
            client.socket.shutdown(1)
        with contextlib.suppress(ConnectionError):
            client.take_end_of_frames()
    with connected(broker, 1) as (good,):
        good.ask('SEND', 'destination:/topic/a')
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def mutated(chance):
    """A conversation in which something is wrong."""
    parts = [bytearray(chance.choice(CONVERSATION)) for _ in range(chance.randrange(1, 12))]
    for _ in range(chance.randrange(4)):
        part = chance.choice(parts)
        at = chance.randrange(len(part))
        what = chance.randrange(4)
        if what == 0:
            part[at] = chance.randrange(256)
        elif what == 1:
            del part[at:at + chance.randrange(1, 9)]
        elif what == 2:
            part[at:at] = chance.choice(SPLINTERS)
        else:
            part[at:at] = part[:at]
        part += b'' if part else b'\n'
    return b''.join(map(bytes, parts))


FUZZ_ROUNDS = int(os.environ.get('FUZZ_ROUNDS', '300'))


@pytest.mark.parametrize('seed', [1, 2])
def test_mutated_conversations(caplog, seed):
    chance = random.Random(seed)
    with running(Broker(port=0)) as broker:
        for _ in range(FUZZ_ROUNDS):
            listens_to_noise(broker, caplog, mutated(chance), chance.choice(['1.0', '1.1', '1.2', None]))
        assert broker.counters()['held_bytes'] == 0


def test_random_bytes(caplog):
    with running(Broker(port=0)) as broker:
        @settings(max_examples=FUZZ_ROUNDS)
        @given(st.binary(max_size=300), st.sampled_from(['1.0', '1.2', None]), st.sampled_from(
            [b'', b'SEND\n', b'SEND\ndestination:/topic/a\n', b'CONNECT\n']))
        def check(noise, first, start):
            caplog.clear()
            listens_to_noise(broker, caplog, start + noise, first)
        check()
        wait_until(lambda: broker.counters()['connections'] == 0)
        assert broker.counters()['held_bytes'] == 0


# --- who vanishes without a word ---

CLIENT = """
import socket, sys
client = socket.create_connection((sys.argv[1], int(sys.argv[2])), 20)
client.sendall(b'CONNECT\\naccept-version:1.2\\nhost:x\\n%s\\n\\n\\0SUBSCRIBE\\nid:0\\ndestination:/topic/a\\nreceipt:r\\n\\n\\0'
               % sys.argv[3].encode())
data = b''
while b'receipt-id:r' not in data:
    data += client.recv(4096)
print('subscribed', flush=True)
sys.stdin.read()
"""


class Machine:
    """Another machine, as far as the network goes: a namespace at the other end of a cable."""

    def __init__(self):
        self.name = 'vmhost-test-%d' % os.getpid()
        self.ours, self.theirs = '198.18.%d.1' % (os.getpid() % 250), '198.18.%d.2' % (os.getpid() % 250)
        self.cable = 'vt%d' % os.getpid()

    def __enter__(self):
        self._ip('netns', 'add', self.name)
        try:
            self._ip('link', 'add', self.cable, 'type', 'veth', 'peer', 'name', 'eth0', 'netns', self.name)
            self._ip('addr', 'add', self.ours + '/30', 'dev', self.cable)
            self._ip('link', 'set', self.cable, 'up')
            self._ip('-n', self.name, 'addr', 'add', self.theirs + '/30', 'dev', 'eth0')
            self._ip('-n', self.name, 'link', 'set', 'eth0', 'up')
        except BaseException:
            self._ip('netns', 'del', self.name)
            raise
        return self

    def __exit__(self, *exc):
        # The kernel clears away a namespace when it likes; the cable's name must be free at once.
        self._ip('link', 'del', self.cable)
        self._ip('netns', 'del', self.name)

    def _ip(self, *words):
        subprocess.run(('ip',) + words, check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def start(self, *words):
        return subprocess.Popen(['ip', 'netns', 'exec', self.name, sys.executable] + list(words),
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def pull_the_cable(self):
        """From now on nothing that is sent arrives, and nobody is told so."""
        self._ip('-n', self.name, 'link', 'set', 'eth0', 'down')


def may_make_machines():
    if shutil.which('ip') is None or not hasattr(os, 'geteuid') or os.geteuid() != 0:
        return False
    try:
        with Machine():
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def test_subscribers_that_vanish_without_a_word():
    if not may_make_machines():
        pytest.skip('network namespaces need root, and the program ip')
    with Machine() as machine, running(Broker(machine.ours, 0)) as broker:
        lost = [machine.start('-c', CLIENT, machine.ours, str(broker.address[1]), line)
                for line in ('heart-beat:0,0', 'heart-beat:500,0')]
        try:
            for process in lost:
                assert process.stdout.readline() == b'subscribed\n'
            with connected(broker, 2) as (sender, listener):
                listener.subscribe('/topic/a')
                machine.pull_the_cable()
                begin = time.monotonic()
                wait_until(lambda: broker.counters()['connections'] == 3, 10)      # by its heart-beat
                body = os.urandom(MIB)
                for _ in range(20):
                    sender.say('SEND', 'destination:/topic/a', 'content-length:%d' % MIB, body=body)
                    assert listener.take().body == body
                wait_until(lambda: broker.counters()['connections'] == 2, 10)      # by what waits for it
                assert broker.counters()['cut_off'] == 1
                assert time.monotonic() - begin < 15
        finally:
            for process in lost:
                process.communicate(b'')
