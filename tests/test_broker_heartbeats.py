"""Heart-beats, both ways. Docstrings name the rules."""

import logging
import os
import re
import signal
import threading
import time

import pytest
from helpers import wait_until
from stomp_client import Client, Program, frame, running

from stompbroker import Broker

pytestmark = pytest.mark.ends


@pytest.mark.parametrize('lines', [(), ('heart-beat:0,0',)])
def test_none_are_sent_unasked(connect, lines):
    """Heart-beating: no heart-beat header: no EOLs are sent, an idle connection is kept (3 s)
    Heart-beating: heart-beat:0,0 : neither beats nor time-outs (3 s)"""
    client = connect('1.2', *lines)
    assert client.silent_for(1.5)               # the shortest interval is 0.2 s, given up after 1.2 s
    client.ask('SEND', 'destination:/topic/a')


def test_1_0_knows_none(connect):
    client = connect(None)
    client.say('CONNECT', 'heart-beat:what is this')
    assert client.take().command == 'CONNECTED'
    client = connect(None)
    client.say('CONNECT', 'heart-beat:10,10')
    assert client.take().get('heart-beat') is None
    assert client.silent_for(1.5)


@pytest.mark.parametrize('version', ['1.1', '1.2'])
def test_the_server_beats_in_time(connect, version):
    """Heart-beating: server heart-beats come in time (1.2; 0,500)
    Heart-beating: server heart-beats come in time (1.1; 0,500)"""
    client = connect(version, 'heart-beat:0,500')
    gaps = sorted(client.take_beats(1) for _ in range(5))
    assert gaps[2] < 0.5
    assert gaps[-1] < 1.5                       # on a busy machine, once


def test_the_larger_interval_holds():
    with running(Broker(port=0, heartbeat=1.0)) as broker, Client(broker.address) as client:
        assert client.connect('1.2', 'heart-beat:0,10').get('heart-beat') == '1000,1000'
        assert client.take_beats(2) > 1.0       # a beat every 0.6 s, not every 10 ms


def test_a_broker_without_heartbeats():
    with running(Broker(port=0, heartbeat=0)) as broker, Client(broker.address) as client:
        assert client.connect('1.2', 'heart-beat:100,100').get('heart-beat') == '0,0'
        assert client.silent_for(1.5)
        client.ask('SEND', 'destination:/topic/a')


@pytest.mark.parametrize('start', [b'', b'SEND\ndestination:/topic/a\n\nhalf'])
def test_a_silent_client_is_taken_for_dead(connect, start):
    """Heart-beating: a silent client (500,0) is taken for dead and closed within 6 s"""
    client = connect('1.2', 'heart-beat:500,0')
    client.send(start)
    begin = time.monotonic()
    client.take_end(6)
    assert time.monotonic() - begin > 0.9


@pytest.mark.parametrize('level', [logging.INFO, logging.DEBUG])
def test_the_log_says_who_is_taken_for_dead(caplog, level):
    caplog.set_level(level)
    with running(Broker(port=0, heartbeat=0.1)) as broker, Client(broker.address) as client:
        client.connect('1.2', 'heart-beat:100,0')
        client.take_end(10)
        told, = wait_until(lambda: [record.getMessage() for record in caplog.records
                                    if 'taken for dead' in record.msg], 10)
    assert re.search('is taken for dead: silent for [0-9]+[.][0-9] s$', told)


def test_whoever_says_anything_is_kept(connect):
    """Heart-beating: a client that sends its EOLs is kept
    Heart-beating: CRLF is a heart-beat, too (1.2)
    Heart-beating: any data counts: a client that sends frames instead of EOLs is kept
    Heart-beating: any data counts: a client in the middle of a slow frame is kept
    Heart-beating: error margin: a client whose beats come 30 % late is kept
    """
    send = frame('SEND', 'destination:/topic/a')
    said = [b'\n', b'\r\n', send, b'x']
    clients = [connect('1.2', 'heart-beat:500,0') for _ in said]
    clients[3].send(b'SEND\ndestination:/topic/a\n\n')
    for _ in range(5):                          # 0.65 s each: given up after 1.5 s of silence
        assert clients[0].silent_for(0.65)
        for client, data in zip(clients, said):
            client.send(data)
    clients[3].send(b'\0')
    for client in clients:
        client.ask('SEND', 'destination:/topic/a')


@pytest.mark.parametrize('value', ['x', '1', '1,2,3', '-1,0', '0,-1', '1.5,0', '', ',', '1,', 'a,b',
                                   '0x1,0', '١,0'])
def test_bad_heart_beat_headers(connect, value):
    """Heart-beating: a bad heart-beat header is refused"""
    client = connect(None)
    client.say('CONNECT', 'accept-version:1.2', 'host:x', 'heart-beat:' + value)
    client.take_error()


@pytest.mark.parametrize('value', ['2147483647,2147483647', '999999999999999999,0', ' 0 , 0 '])
def test_large_numbers_are_no_harm(connect, value):
    client, other = connect('1.2', 'heart-beat:' + value), connect('1.2', 'heart-beat:0,200')
    other.take_beats(2)
    client.ask('SEND', 'destination:/topic/a')


def test_beats_never_cut_into_a_message_that_is_read_slowly(connect):
    """Heart-beating: heart-beat EOLs never cut into a big MESSAGE that is read slowly"""
    client = connect(None, receive_buffer=4096)
    client.connect('1.2', 'heart-beat:0,200')
    client.subscribe('/topic/a')
    body = os.urandom(1000 * 1000).replace(b'\n', b'x')
    connect('1.2').say('SEND', 'destination:/topic/a', 'content-length:%d' % len(body), body=body)
    for _ in range(8):                          # more than a second, while much of it waits at the broker
        pause = threading.Event()
        pause.wait(0.2)
        client._receive(time.monotonic() + 30)
    assert client.take().body == body
    client.take_beats(2)


def test_one_clock_for_all(connect):
    before = threading.active_count()
    clients = [connect('1.2', 'heart-beat:10000,200') for _ in range(100)]
    assert threading.active_count() == before
    for client in clients:
        client.take_beats(3)


def test_clients_that_went_leave_no_alarms(broker):
    """Each had set one far away."""
    for _ in range(2000):
        with Client(broker.address) as client:
            client.say('CONNECT', 'accept-version:1.2', 'host:x', 'heart-beat:99999999,99999999')
    wait_until(lambda: broker.counters()['connections'] == 0)
    with Client(broker.address) as client:
        client.connect('1.2')
        assert len(broker.alarms) < 1010       # more than these are cleared away when the next one is set


@pytest.mark.skipif(os.name != 'posix', reason='signals of POSIX')
def test_a_broker_that_was_stopped_forgives_silence():
    """When the machine or the process slept, the clients were not silent for so long: it was deaf."""
    with Program() as program, Client(program.address) as client:
        client.connect('1.2', 'heart-beat:300,0')
        program.process.send_signal(signal.SIGSTOP)
        assert client.silent_for(3)
        program.process.send_signal(signal.SIGCONT)
        assert client.silent_for(0.2)
        client.ask('SEND', 'destination:/topic/a')
        client.take_end(6)                      # but not for ever
