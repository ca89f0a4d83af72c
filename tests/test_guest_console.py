"""Input that is streamed to commands, terminals, output that is followed: in the guest, without a host."""

import base64
import contextlib
import fcntl
import hashlib
import os
import resource
import socket
import types

import pytest
from helpers import wait_until
from test_guest_commands import guests  # noqa: F401

import guestconsole
import guestinput
from protocol import Message

pytestmark = pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='needs /proc')


def put(guest, cmd_id, offset, data=b'', **keys):
    """A CMD_INPUT."""
    if data:
        keys['data64'] = base64.b64encode(data).decode()
    guest.commands.input(Message('', 'CMD_INPUT', {'cmd-id': cmd_id, 'offset': str(offset)}, keys))


def taken(guest, cmd_id):
    """How much of the input was, as it was told last."""
    told = [message.get('in-offset', -1) for message in guest.said[cmd_id]]
    return max(told + [-1])


def test_input_comes_as_it_is_sent(guests):  # noqa: F811
    guest = guests()
    guest.run('c', 'cat', stdin='stream')
    put(guest, 'c', 0, b'one\n')
    wait_until(lambda: taken(guest, 'c') == 4)
    put(guest, 'c', 4, b'two\n', eof=True)
    result = guest.result('c')
    assert (result['out'], result['state']) == ('one\ntwo\n', 'exited')


def test_no_piece_is_taken_twice_or_before_its_turn(guests):  # noqa: F811
    guest = guests()
    guest.run('c', 'cat', stdin='stream')
    put(guest, 'c', 0, b'abcd')
    put(guest, 'c', 0, b'abcd')
    put(guest, 'c', 2, b'cdef')
    put(guest, 'c', 100, b'too early')
    wait_until(lambda: taken(guest, 'c') == 6)
    told = len(guest.said['c'])
    put(guest, 'c', 0, b'abcdef')
    wait_until(lambda: len(guest.said['c']) > told)         # it is told once more
    put(guest, 'c', 6, b'.', eof=True)
    assert guest.result('c')['out'] == 'abcdef.'


def test_a_megabyte_for_who_reads_slowly(guests):  # noqa: F811
    guest = guests()
    data = bytes(range(256)) * 4096
    guest.run('c', 'sh', '-c', 'sleep 0.2; sha1sum', stdin='stream')
    for offset in range(0, len(data), 65536):
        put(guest, 'c', offset, data[offset:offset + 65536])
    put(guest, 'c', len(data), eof=True)
    assert hashlib.sha1(data).hexdigest() in guest.result('c')['out']


def test_a_program_that_reads_no_more_holds_nobody_up(guests):  # noqa: F811
    guest = guests()
    guest.run('c', 'sh', '-c', 'exec <&-; while [ ! -e go ]; do sleep 0.05; done', stdin='stream')
    for offset in range(0, 2 ** 20, 65536):
        put(guest, 'c', offset, bytes(65536))
    wait_until(lambda: taken(guest, 'c') == 2 ** 20)
    open(os.path.join(guest.served, 'go'), 'w').close()
    assert guest.result('c')['state'] == 'exited'


def test_a_terminal(guests):  # noqa: F811
    guest = guests()
    guest.run('c', 'sh', '-c', 'tty; stty size; echo $TERM; read line; echo "<$line>"; cat',
              terminal={'rows': 33, 'columns': 99, 'term': 'vt100'})
    put(guest, 'c', 0, b'hello\n')
    put(guest, 'c', 6, eof=True)
    result = guest.result('c')
    shown = result['out'].replace('hello\r\n', '', 1)       # the terminal's echo, which may come at any time
    assert '/dev/' in shown and '33 99\r\nvt100\r\n' in shown
    assert '<hello>' in shown and result['state'] == 'exited'


def test_ctrl_c_and_the_size_of_a_terminal(guests):  # noqa: F811
    guest = guests()
    guest.run('c', 'sh', '-c', "trap 'stty size' WINCH; trap 'echo int; exit 3' INT; echo go; "
              'while :; do sleep 0.05; done', terminal={})
    command = guest.commands._find('c')
    wait_until(lambda: b'go' in command.slice('out', 0, 1000))
    put(guest, 'c', 0, rows=50, columns=120)
    wait_until(lambda: b'50 120' in command.slice('out', 0, 1000))
    put(guest, 'c', 0, b'\x03')
    result = guest.result('c')
    assert 'int' in result['out'] and result['exitCodeOrSignal'] == 3


def test_a_terminal_belongs_to_the_user(guests):  # noqa: F811
    if os.getuid():
        pytest.skip('needs root')
    guest = guests()
    guest.run('c', 'sh', '-c', 'echo typed > /dev/tty; stat -c %U "$(tty)"', terminal={}, user='nobody',
              path='/')
    assert guest.result('c')['out'] == 'typed\r\nnobody\r\n'


@pytest.mark.parametrize('options', [{}, {'terminal': {}}])
def test_followed_output_is_told_as_it_is_written(guests, options):  # noqa: F811
    guest = guests()
    guest.run('c', 'sh', '-c', 'for i in 1 2 3; do echo line$i; sleep 0.2; done; sleep 1', **options)
    guest.commands.query(Message('', 'CMD_QUERY', {'cmd-id': 'c', 'out-offset': '0'}, {'follow': 10}))

    def told():
        return [message for message in guest.said['c'] if message.word == 'CMD_STATUS' and message.get('out')]
    wait_until(lambda: len(told()) == 3)
    text = b''
    for message in told():
        assert message.get('out-offset') == len(text)
        text += message.get('out').encode()
    assert text.replace(b'\r', b'') == b'line1\nline2\nline3\n'


def test_what_follows_is_no_longer_told_after_a_while(guests):  # noqa: F811
    guest = guests()
    guest.run('c', 'sh', '-c', 'while :; do echo x; sleep 0.05; done')
    guest.commands.query(Message('', 'CMD_QUERY', {'cmd-id': 'c', 'out-offset': '0'}, {'follow': 2}))
    wait_until(lambda: len(guest.said['c']) > 2)
    counts = []
    wait_until(lambda: counts.append(len(guest.said['c'])) or len(counts) > 10
               and len(set(counts[-10:])) == 1, 20, 0.05)
    guest.signal('c', 'KILL')
    guest.result('c')


def test_another_agent_goes_on_with_the_input(guests):  # noqa: F811
    guest = guests()
    guest.run('c', 'cat', stdin='stream')
    put(guest, 'c', 0, b'before ')
    wait_until(lambda: taken(guest, 'c') == 7)
    guest.stopping.set()
    guest.thread.join()
    guest.consoles.close()
    guest.spool.close()
    guest.said.clear()
    guest.stopping.clear()
    guest.begin()
    guest.commands.query(Message('', 'CMD_QUERY', {'cmd-id': 'c'}))
    wait_until(lambda: taken(guest, 'c') == 7)
    put(guest, 'c', 0, b'before after', eof=True)
    assert guest.result('c')['out'] == 'before after'


def test_a_folder_of_a_long_name(tmp_path):
    folder = os.path.join(str(tmp_path), 'x' * 120)
    os.mkdir(folder)
    reader, writer = os.pipe()
    inlet = guestinput.Inlet(folder, writer, False)
    connection = guestinput.connect(folder)
    connection.sendall(guestinput.Piece(0, b'hello', True).packed())
    for _ in range(2):
        inlet.react(inlet.readable())
    assert os.read(reader, 100) == b'hello' and os.read(reader, 100) == b''
    inlet.close()
    connection.close()
    os.close(reader)


def test_a_connection_that_breaks_is_closed_by_who_waits_for_it():
    """The link's thread meets its end while the main thread waits for it, or is about to."""
    here, there = socket.socketpair()
    console = guestconsole.Console(types.SimpleNamespace(cmd_id='c', taken=None))
    console.connection = here
    there.close()
    console.unsent += b'a piece'
    console.send()                      # as the link's thread does
    assert guestinput.wait_until_ready([here], [here], 5) == [here] and not console.unsent
    assert not console.receive()        # as the main thread does
    assert console.connection is None and here.fileno() < 0


def test_any_number_of_descriptors_is_waited_for():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip('needs a limit of 2,048 descriptors')
    near, far = socket.socketpair()
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    try:
        with near, far, contextlib.ExitStack() as stack:
            high = fcntl.fcntl(near, fcntl.F_DUPFD_CLOEXEC, 2000)
            stack.callback(os.close, high)
            assert guestinput.wait_until_ready([high], [], 0) == []
            far.send(b'x')
            assert guestinput.wait_until_ready([high, far], [far], 5) == [high, far]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
