"""A terminal's line: keys and output on one connection of the command line with the host agent."""

import contextlib
import hashlib
import os
import select
import time

import pytest
from agents import Agent

import hostclient
from faults import BadState, NoSuchCommand
from hostclient import END, OUTPUT

pytestmark = [pytest.mark.whole, pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]
RAW = 'stty raw -echo; echo ready; '


@pytest.fixture(scope='module')
def guest(host, tmp_path_factory):
    with Agent(tmp_path_factory.mktemp('guest'), host, 'one') as guest:
        yield guest


@pytest.fixture(params=['here', 'by TCP'])
def client(host, guest, request, monkeypatch):
    if request.param == 'by TCP':
        monkeypatch.setattr(hostclient.localsocket, 'path_in', lambda folder: '')
    return hostclient.Client(host.state)


def begin(client, script):
    return client.call('runCmd', 'one', 'sh', ['-c', RAW + script], {}, '', '',
                       {'terminal': {'rows': 24, 'columns': 80}})


@contextlib.contextmanager
def line_to(client, cmd_id, output=0):
    with contextlib.closing(client.terminal(cmd_id, output)) as line:
        yield line


def read(line, *, upto=None, length=None):
    """What is shown until that text, so many bytes, or the end; each piece where the one before ended."""
    shown, at, deadline = b'', None, time.monotonic() + 60
    pieces = line.take()
    while True:
        for kind, offset, data in pieces:
            assert at in (None, offset)
            at = offset + len(data)
            shown += data
            assert kind in (OUTPUT, END)
            if kind == END:
                assert upto is None and length is None, shown[-1000:]
                return shown
        if upto is not None and upto in shown or length is not None and len(shown) >= length:
            return shown
        assert select.select([line], [], [], deadline - time.monotonic())[0], shown[-1000:]
        pieces = line.take()


def test_keys_go_and_what_they_show_comes(client):
    cmd_id = begin(client, 'dd bs=1 count=5 2>/dev/null; exit 3')
    with line_to(client, cmd_id) as line:
        assert read(line, upto=b'ready') == b'ready\n'
        line.put(0, b'\0\xff')
        assert read(line, length=2) == b'\0\xff'
        line.put(2, b'abc')
        assert read(line) == b'abc'
    assert client.call('getCmdResults', cmd_id)['exitCodeOrSignal'] == 3


def test_a_line_that_breaks_is_begun_anew_without_loss(client):
    cmd_id = begin(client, 'cat')
    with line_to(client, cmd_id) as line:
        read(line, upto=b'ready\n')
        line.put(0, b'first ')
        read(line, length=6)
    with line_to(client, cmd_id, 8) as line:
        line.put(2, b'rst second')             # some of it once more, which is not taken twice
        assert read(line, length=len('rst second')) == b'rst second'
    with line_to(client, cmd_id) as line, line_to(client, cmd_id, 12) as other:
        line.put(12, b' third')
        assert read(line, upto=b'third') == b'ready\nfirst second third'
        assert read(other, upto=b'third') == b'second third'
    client.call('signalCmd', cmd_id, 'KILL')


@pytest.mark.once
def test_who_does_not_read_holds_nobody_up_and_loses_nothing(client):
    cmd_id = begin(client, 'head -c 3000000 /dev/zero | tr "\\0" x; echo; cat')
    with line_to(client, cmd_id) as line, line_to(client, cmd_id) as other:
        shown = read(other, length=3000007)
        assert client.call('ping', 'one', 20)
        other.put(0, b'typed')
        assert read(other, upto=b'typed') == b'typed'
        assert read(line, upto=b'typed') == shown + b'typed'
    client.call('signalCmd', cmd_id, 'KILL')


def test_much_is_typed_before_it_is_read(client, tmp_path):
    cmd_id = begin(client, 'while [ ! -e %s ]; do sleep 0.05; done; head -c 5000000 | sha1sum'
                   % (tmp_path / 'go'))
    data = bytes(range(256)) * 20000
    with line_to(client, cmd_id) as line:
        read(line, upto=b'ready\n')
        at = 0
        while at < 5000000:
            if not line.has_room and not select.select([], [line], [], 1)[1]:
                (tmp_path / 'go').touch()      # nothing is taken any more: it waits for the program
            line.flush()
            if line.has_room:
                line.put(at, data[at:at + 50000])
                at += 50000
        (tmp_path / 'go').touch()
        line.finish(60)
        assert read(line).split()[0].decode() == hashlib.sha1(data[:5000000]).hexdigest()


def test_what_was_typed_before_the_person_left_arrives(client):
    cmd_id = begin(client, 'sleep 0.5; head -c 200000 | wc -c')
    with line_to(client, cmd_id) as line:
        read(line, upto=b'ready\n')
        line.put(0, bytes(200000))
        line.finish(20)
    assert client.call('waitCmd', cmd_id, 30)
    assert client.call('getCmdResults', cmd_id)['out'].split() == ['ready', '200000']


def test_what_has_no_line_says_so(client):
    with pytest.raises(NoSuchCommand):
        client.terminal('nothing', 0)
    cmd_id = client.call('runCmd', 'one', 'cat', [], {}, '', '', {'stdin': 'stream'})
    with pytest.raises(BadState, match='has no terminal'):
        client.terminal(cmd_id, 0)
    client.call('signalCmd', cmd_id, 'KILL')


def test_input_behind_a_gap_ends_the_line(client):
    cmd_id = begin(client, 'cat')
    with line_to(client, cmd_id) as line:
        read(line, upto=b'ready\n')
        line.put(5, b'lost')
        with pytest.raises(BadState, match='has had 0 bytes of input'):
            read(line, upto=b'never')
    client.call('signalCmd', cmd_id, 'KILL')


def test_a_command_that_has_ended_shows_all_of_it(client):
    cmd_id = begin(client, 'seq 1000')
    assert client.call('waitCmd', cmd_id, 30)
    with line_to(client, cmd_id, 6) as line:
        assert read(line).split() == [b'%d' % number for number in range(1, 1001)]
