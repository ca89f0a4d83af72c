"""The broker's door for the program that it is part of."""

import contextlib
import socket
import threading
import time

import pytest
from door_client import Program
from helpers import wait_until
from stomp_client import Client, running

from protocol import LocalError
from stompbroker import Broker
from stompoutbox import SHARE

pytestmark = pytest.mark.ends


@pytest.fixture(params=['turns', 'no turns'])
def inside(request):
    """(a broker, the program), with a selector that another thread may change, and as on Windows."""
    broker = Broker(port=0)
    program = Program(broker, '/topic/in')
    with running(broker), program:
        broker._shares_turns = broker._shares_turns and request.param == 'turns'
        yield broker, program


@pytest.fixture
def client(inside):
    with Client(inside[0].address) as client:
        client.connect('1.2')
        yield client


def test_what_comes_in_and_goes_out(inside, client):
    broker, program = inside
    client.subscribe('/topic/out')
    client.ask('SEND', 'destination:/topic/in', 'a:1\\n2\\c', 'message-id:mine', body=b'a body')
    came, = program.before_now()
    assert (came.command, came.body, came.get('a')) == ('SEND', b'a body', '1\n2:')
    assert came.get('destination') == '/topic/in'
    program.say('/topic/out', b'\0 answer', b='1\n2:')
    said = client.take()
    assert (said.body, said.get('b'), said.get('destination')) == (b'\0 answer', '1\\n2\\c', '/topic/out')
    assert said.get('content-length') == '8' and said.get('message-id')
    program.say('/topic/nobody')
    assert broker.counters()['dropped'] == 1


def test_a_receiver_may_change_its_headers(inside, client):
    """Messages of the same head are of one envelope."""
    _, program = inside
    for _ in range(2):
        client.ask('SEND', 'destination:/topic/in', 'a:1')
        frame, = program.door_frames()
        assert frame.headers.pop('a') == '1'


def test_what_can_be_no_frame_is_refused(inside):
    _, program = inside
    for headers in {'a': '\0'}, {'\0': 'a'}:
        with pytest.raises(LocalError):
            program.door.send('/topic/out', headers, b'')


def test_each_of_many_threads_keeps_its_order(inside, client):
    _, program = inside
    client.subscribe('/topic/out')

    def say(name):
        for number in range(300):
            program.door.send('/topic/out', {'name': name}, b'%d' % number)
    threads = [threading.Thread(target=say, args=(name,)) for name in 'abcd']
    for thread in threads:
        thread.start()
    got = {name: [] for name in 'abcd'}
    for frame in client.take_all(1200):
        got[frame.get('name')].append(int(frame.body))
    for thread in threads:
        thread.join(30)
    assert got == {name: list(range(300)) for name in 'abcd'}


def test_a_client_that_reads_slowly_gets_all(inside):
    broker, program = inside
    with Client(broker.address, receive_buffer=4096) as slow:
        slow.connect('1.2')
        slow.subscribe('/topic/out')
        bodies = [b'%d ' % number + b'x' * 50000 for number in range(100)]
        for body in bodies:
            assert program.door.send('/topic/out', {}, body)
        assert [slow.take().body for _ in bodies] == bodies


def test_senders_wait_while_the_program_does_not_take(inside, client):
    """A flood in one lane, and what others say between; none is lost, and memory is bounded."""
    broker, program = inside
    program.pause()
    sent = []

    def flood():
        for number in range(200):
            client.say('SEND', 'destination:/topic/in', body=b'%d ' % number + b'x' * 100000)
            sent.append(number)
    thread = threading.Thread(target=flood)
    thread.start()
    wait_until(lambda: broker.counters()['held_up'], 30)
    assert broker.counters()['waiting_bytes'] < 2 * SHARE + 200000 and len(sent) < 200
    with Client(broker.address) as other:
        other.connect('1.2')
        other.ask('SEND', 'destination:/topic/in', body=b'between')
        program.read()
        thread.join(30)
        client.ask('SEND', 'destination:/topic/nobody')
        bodies = [frame.body for frame in program.before_now()]
    assert bodies.index(b'between') < 20
    bodies.remove(b'between')
    assert [int(body.split()[0]) for body in bodies] == list(range(200))


@contextlib.contextmanager
def flood(broker, program):
    """(a client that sends more than may wait, and is not read any more; its thread)."""
    program.pause()
    with Client(broker.address) as busy:
        busy.connect('1.2', 'heart-beat:300,0')
        busy.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)

        def send():
            with contextlib.suppress(OSError):
                for number in range(200):
                    busy.say('SEND', 'destination:/topic/in', body=b'%d ' % number + b'x' * 100000)
        thread = threading.Thread(target=send)
        thread.start()
        try:
            wait_until(lambda: broker.counters()['held_up'], 30)
            yield busy, thread
        finally:
            busy.socket.shutdown(socket.SHUT_RDWR)
            thread.join(30)


def test_who_has_to_wait_unheard_is_not_taken_for_dead(inside):
    broker, program = inside
    with flood(broker, program) as (busy, thread):
        thread.join(3)             # the time after which a silent client of that heart-beat is dead
        assert thread.is_alive() and broker.counters()['connections'] == 1
        program.read()
        thread.join(30)
        busy.ask('SEND', 'destination:/topic/nobody', body=b'I am still here')
        assert [int(frame.body.split()[0]) for frame in program.before_now()] == list(range(200))
        assert broker.counters()['cut_off'] == 0


def test_senders_go_on_when_the_door_is_closed(inside):
    broker, program = inside
    with flood(broker, program) as (busy, thread):
        program.door.close()
        thread.join(30)
        busy.ask('SEND', 'destination:/topic/nobody', body=b'I go on')
        assert not broker.is_held_up and broker.counters()['waiting_bytes'] == 0


def test_a_sender_that_left_is_heard_all_the_same(inside):
    broker, program = inside
    with Client(broker.address) as client:
        client.connect('1.2')
        program.pause()
        for number in range(100):
            client.say('SEND', 'destination:/topic/in', body=b'%d' % number)
        client.ask('SEND', 'destination:/topic/nobody')
    wait_until(lambda: not broker.counters()['connections'], 30)
    program.read()
    assert [int(frame.body) for frame in program.before_now()] == list(range(100))


def test_an_alarm_that_a_job_sets_wakes_the_broker(inside):
    broker, _ = inside
    rung = threading.Event()
    begin = time.monotonic()
    broker.do(lambda: broker.alarms.set(-1, time.monotonic() + 0.05, rung.set))
    assert rung.wait(30) and time.monotonic() - begin >= 0.05


def test_the_end_of_the_broker_is_that_of_the_door():
    broker = Broker(port=0)
    program = Program(broker, '/topic/in')
    with running(broker):
        assert program.door.send('/topic/out', {}, b'')
    program.close()
    assert not program.door.send('/topic/out', {}, b'')


def test_a_job_that_fails_ends_nothing(inside, client, caplog):
    broker, program = inside

    def fail():
        raise KeyError('a mistake')
    broker.do(fail)
    client.ask('SEND', 'destination:/topic/in')
    assert len(program.before_now()) == 1 and 'a mistake' in caplog.text
