"""Programs that somebody talks to: input, terminals, output as it is written. Real host, real guests."""

import contextlib
import fcntl
import hashlib
import os
import pty
import re
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import threading
import time
import xmlrpc.client

import pytest
from agents import Agent, Host
from brokers import free_port
from helpers import fault_of, wait_until
from terminals import Terminal

import cliterminal

pytestmark = [pytest.mark.whole, pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]


@pytest.fixture(scope='module')
def guest(host, tmp_path_factory):
    with Agent(tmp_path_factory.mktemp('guest'), host, 'one') as guest:
        yield guest


@pytest.fixture
def api(host, guest):
    with host.api as api:
        yield api


def begin(api, *words, **options):
    return api.runCmd('one', words[0], list(words[1:]), {}, '', '', options)


def begin_cat(api):
    """A program that says what it reads, and has said what came before something happens."""
    cmd_id = begin(api, 'cat', stdin='stream')
    assert api.putCmdInput(cmd_id, b'before ') == 7
    wait_until(lambda: api.getCmdOutput(cmd_id)['size'] == 7)
    return cmd_id


def put_all(api, cmd_id, data, eof=True):
    """Puts all of it, as fast as it is taken."""
    at = 0
    while at < len(data) or eof:
        piece = data[at:at + 512 * 1024]
        is_last = at + len(piece) == len(data)
        taken = api.putCmdInput(cmd_id, piece, eof and is_last)
        at += taken
        if is_last and taken == len(piece):
            return


def output(api, cmd_id, until, timeout=10):
    """What a command wrote, as it is followed, until that is in it."""
    text, deadline = b'', time.monotonic() + timeout
    while until not in text:
        assert time.monotonic() < deadline, text
        part = api.getCmdOutput(cmd_id, 'out', len(text), 65536, 2)
        text += part['data'].data
        assert not part['eof'] or until in text, text
    return text


# --- input ---

def test_input_that_comes_bit_by_bit(api):
    cmd_id = begin(api, 'cat', stdin='stream')
    for n in range(3):
        assert api.putCmdInput(cmd_id, b'line %d\n' % n) == 7
        output(api, cmd_id, b'line %d\n' % n)
    assert api.putCmdInput(cmd_id, b'', True) == 0
    assert api.waitCmd(cmd_id, 10)
    assert api.getCmdResults(cmd_id)['out'] == 'line 0\nline 1\nline 2\n'


@pytest.mark.once
def test_input_is_whole_in_bounded_memory(host, api):
    data = os.urandom(2 ** 20) * 40
    cmd_id = begin(api, 'sha256sum', stdin='stream')
    put_all(api, cmd_id, data)
    assert api.waitCmd(cmd_id, 30)
    assert api.getCmdResults(cmd_id)['out'].split()[0] == hashlib.sha256(data).hexdigest()


def test_a_program_that_does_not_read_takes_no_more_than_fits(api):
    cmd_id = begin(api, 'sleep', '600', stdin='stream')
    total = 0
    while total < 16 * 2 ** 20:
        taken = api.putCmdInput(cmd_id, bytes(2 ** 20))
        total += taken
        if not taken:
            break
    assert 2 ** 16 < total < 4 * 2 ** 20
    api.signalCmd(cmd_id, 'KILL')
    assert api.waitCmd(cmd_id, 10)
    assert fault_of(api.putCmdInput, cmd_id, b'x').faultCode == 4


def test_what_was_put_before_is_not_taken_twice(api):
    program = 'trap "exit 0" USR1; cat; while :; do sleep 0.1; done'       # its input ends, and it goes on
    cmd_id = begin(api, 'sh', '-c', program, stdin='stream')
    for _ in range(2):
        assert api.putCmdInput(cmd_id, b'abc', False, 0) == 3
    assert api.putCmdInput(cmd_id, b'bcdef', False, 1) == 5
    assert fault_of(api.putCmdInput, cmd_id, b'x', False, 100).faultCode == 4
    assert api.getCmdStatus(cmd_id, False)['inOffset'] == 6
    assert fault_of(api.putCmdInput, cmd_id, b'', True, 3).faultCode == 4      # more than that was put
    for _ in range(2):
        assert api.putCmdInput(cmd_id, b'f!', True, 5) == 2
    wait_until(lambda: api.getCmdOutput(cmd_id)['size'] == 7, 20)
    assert api.signalCmd(cmd_id, 'USR1') and api.waitCmd(cmd_id, 20)
    assert api.getCmdResults(cmd_id)['out'] == 'abcdef!'
    assert fault_of(api.putCmdInput, cmd_id, b'x').faultCode == 4


def test_what_has_no_such_input_says_so(api):
    cmd_id = begin(api, 'sleep', '600')
    assert fault_of(api.putCmdInput, cmd_id, b'x').faultCode == 4
    assert fault_of(api.resizeCmd, cmd_id, 10, 10).faultCode == 4
    api.signalCmd(cmd_id, 'KILL')
    streamed = begin(api, 'cat', stdin='stream')
    assert fault_of(api.resizeCmd, streamed, 10, 10).faultCode == 4
    assert fault_of(api.putCmdInput, streamed, b'x', False, -2).faultCode == -32602
    api.putCmdInput(streamed, b'', True)
    for options in ({'terminal': {'rows': 0}}, {'terminal': {'colour': 1}}, {'terminal': {}, 'stdin': 'x'},
                    {'terminal': {'term': 1}}):
        assert fault_of(api.runCmd, 'one', 'cat', [], {}, '', '', options).faultCode == -32602
    assert fault_of(api.runCmd, 'one', 'cat', [], {}, '', 'file', {'stdin': 'stream'}).faultCode == -32602
    exact = begin(api, 'cat', stdin=xmlrpc.client.Binary(b'stream'))
    assert api.waitCmd(exact, 10) and api.getCmdResults(exact)['out'] == 'stream'


def test_input_for_a_guest_that_is_away_waits_for_it(host, tmp_path):
    with host.api as api:
        agent = Agent(tmp_path, host, 'away').start()
        cmd_id = api.runCmd('away', 'cat', [], {}, '', '', {'stdin': 'stream'})
        assert api.putCmdInput(cmd_id, b'before ') == 7
        wait_until(lambda: api.getCmdStatus(cmd_id)['state'] == 'running')
        wait_until(lambda: api.getCmdOutput(cmd_id)['size'] == 7)
        agent.stop()
        assert api.putCmdInput(cmd_id, b'between ') == 8
        with agent:
            wait_until(agent.has_joined)
            assert api.putCmdInput(cmd_id, b'after', True) == 5
            assert api.waitCmd(cmd_id, 20)
            assert api.getCmdResults(cmd_id)['out'] == 'before between after'


def test_input_goes_on_after_a_restart_of_the_host(tmp_path):
    with Host(tmp_path / 'host', broker={'port': free_port()}) as host, \
            Agent(tmp_path / 'guest', host, 'one') as agent:
        with host.api as api:
            cmd_id = begin_cat(api)
        host.stop()
        host.start()
        wait_until(agent.has_joined, 20)
        listed = host.verb('ps').stdout.decode()       # for how long it runs is asked, if nobody told
        assert re.search(cmd_id + r' .*\d s +cat', listed), listed
        with host.api as api:
            wait_until(lambda: api.getCmdStatus(cmd_id)['inOffset'] == 7)
            assert api.putCmdInput(cmd_id, b're after', True, 4) == 8
            assert api.waitCmd(cmd_id, 20)
            assert api.getCmdResults(cmd_id)['out'] == 'before after'


def test_what_an_earlier_host_had_sent_is_known_again(tmp_path):
    """It died before it had journalled that the command runs, and nobody has asked for its status since."""
    with Host(tmp_path / 'host', broker={'port': free_port()}) as host, \
            Agent(tmp_path / 'guest', host, 'one') as agent:
        with host.api as api:
            cmd_id = begin_cat(api)
        host.stop()
        path = os.path.join(host.state, 'journal.sqlite')
        with contextlib.closing(sqlite3.connect(path)) as journal, journal:
            journal.execute("UPDATE executions SET state = 'sent'")
        host.start()
        wait_until(agent.has_joined, 20)
        with host.api as api:
            assert api.getCmdStatus(cmd_id)['inOffset'] == 7
            assert api.putCmdInput(cmd_id, b'after', True) == 5
            assert api.waitCmd(cmd_id, 20)
            assert api.getCmdResults(cmd_id)['out'] == 'before after'


# --- output ---

def test_output_is_here_as_it_is_written(host, api):
    """The program goes on only once its line was read here. How fast that is: bench/terminal.py."""
    program = 'for line in range(10): print("%d\\n" % line, end="", flush=True); input()'
    cmd_id = begin(api, 'python3', '-c', program, stdin='stream')
    text = b''
    for line in range(10):
        part = api.getCmdOutput(cmd_id, 'out', len(text), 65536, 20)
        assert part['data'].data == b'%d\n' % line
        text += part['data'].data
        api.putCmdInput(cmd_id, b'\n')
    assert api.getCmdOutput(cmd_id, 'out', len(text), 65536, 20)['eof']


def test_nothing_comes_and_that_takes_as_long_as_it_was_to_wait(host, api):
    cmd_id = begin(api, 'sleep', '600')
    begun = time.monotonic()
    part = api.getCmdOutput(cmd_id, 'out', 0, 100, 0.4)
    assert part['data'].data == b'' and not part['eof']
    assert 0.35 < time.monotonic() - begun < 3
    kill = threading.Thread(target=lambda: host.api.signalCmd(cmd_id, 'KILL'))     # on another connection
    kill.start()
    assert api.getCmdOutput(cmd_id, 'err', 0, 100, 20)['eof']
    kill.join()


# --- terminals ---

def test_a_shell_on_a_terminal(api):
    cmd_id = begin(api, 'sh', '-i', terminal={'rows': 40, 'columns': 132, 'term': 'xterm-256color'})
    api.putCmdInput(cmd_id, b'PS1="> "; stty size; echo $TERM\n')
    assert b'40 132' in output(api, cmd_id, b'\nxterm-256color')
    assert api.resizeCmd(cmd_id, 50, 100)
    api.putCmdInput(cmd_id, b'stty size\n')
    output(api, cmd_id, b'50 100')
    for number, key in ((1, b'\x03'), (2, b'\x1a')):
        api.putCmdInput(cmd_id, b"sh -c 'echo wait$((%d + 10)); exec sleep 600'\n" % number)
        output(api, cmd_id, b'wait1%d' % number)
        api.putCmdInput(cmd_id, key)
        api.putCmdInput(cmd_id, b'echo back$((%d + 10))\n' % number)
        output(api, cmd_id, b'back1%d' % number)
    assert b'Stopped' in output(api, cmd_id, b'back12')
    api.putCmdInput(cmd_id, b'exit 7\nexit 7\n')
    assert api.waitCmd(cmd_id, 10)
    assert api.getCmdResults(cmd_id)['exitCodeOrSignal'] == 7


# --- the command line ---

@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='no /proc')
@pytest.mark.parametrize('options', [{}, {'nice': 1}, {'stdin': 'stream'}, {'terminal': {}}])
def test_a_program_has_nothing_open_that_is_not_its_own(api, options):
    """Least of all the socket by which its runner is told what to run next."""
    cmd_id = begin(api, 'sh', '-c', 'exec ls /proc/self/fd', **options)
    assert api.waitCmd(cmd_id, 10)
    assert api.getCmdResults(cmd_id)['out'].split() == ['0', '1', '2', '3']      # 3: the folder that ls reads


def test_a_program_may_leave_its_terminal_and_come_back(api):
    script = 'exec <&- >&- 2>&-; sleep 0.3; echo back > /dev/tty; exit 9'
    cmd_id = begin(api, 'sh', '-c', script, terminal={})
    assert api.waitCmd(cmd_id, 10)
    results = api.getCmdResults(cmd_id)
    assert (results['state'], results['exitCodeOrSignal'], results['out'].strip()) == ('exited', 9, 'back')


class Person(Terminal):
    """Who types at a terminal with a verb on it."""

    def __init__(self, host, *words):
        super().__init__(host.command(*words))
        self.mark = 0

    def sees(self, text, timeout=20):
        """Waits until that is shown, after what was seen last."""
        wait_until(lambda: self.written.find(text, self.mark) >= 0, timeout)
        self.mark = self.written.find(text, self.mark) + len(text)

    def has(self, rows, columns):
        """A window of that size, from now on."""
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack('HHHH', rows, columns, 0, 0))


def at_prompt(person):
    """A shell whose prompt is PROMPT."""
    person.type(b"PS1=PRO'MPT> '; set +o history\r")
    person.sees(b'PROMPT> ')


def test_run_passes_input_as_it_comes(host, guest):
    process = subprocess.Popen(host.command('run', '-i', 'one', 'cat'), stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, bufsize=0)
    for n in range(3):
        process.stdin.write(b'%d\n' % n)
        assert process.stdout.readline() == b'%d\n' % n
    process.stdin.close()
    assert process.wait(10) == 0
    process.stdout.close()


@pytest.mark.once
def test_run_passes_much_in_bounded_memory(host, guest, tmp_path):
    """No process that it goes through holds more than a part of it."""
    size, piece = 96 * 2 ** 20, os.urandom(2 ** 20)
    process = subprocess.Popen(host.command('run', '-i', 'one', 'sha256sum'), stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, bufsize=0)
    wanted = hashlib.sha256()
    for _ in range(0, size, len(piece)):
        process.stdin.write(piece)
        wanted.update(piece)
    peaks = [peak(pid) for pid in (process.pid, host.process.pid, guest.process.pid)]
    process.stdin.close()
    assert process.stdout.read().split()[0].decode() == wanted.hexdigest()
    assert process.wait(10) == 0
    process.stdout.close()
    assert max(peaks) < 80 * 1024, peaks


@pytest.mark.once
def test_much_input_is_exact_though_the_guest_agent_is_restarted(host, tmp_path):
    with Agent(tmp_path, host, 'killed') as agent:
        process = subprocess.Popen(host.command('run', '-i', 'killed', 'sha256sum'), stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, bufsize=0)
        wanted = hashlib.sha256()
        for number in range(48):
            piece = os.urandom(2 ** 20)
            process.stdin.write(piece)
            wanted.update(piece)
            if number == 16:
                agent.stop(signal.SIGKILL)
                agent.start()
            if number == 32:
                agent.stop()
                agent.start()
        process.stdin.close()
        assert process.stdout.read().split()[0].decode() == wanted.hexdigest()
        assert process.wait(30) == 0
        process.stdout.close()


def peak(pid):
    """KiB that a process had at most."""
    with open('/proc/%d/status' % pid) as file:
        return int(re.search(r'VmHWM:\s+(\d+)', file.read()).group(1))


def test_run_on_a_terminal_exits_with_the_code(host, guest):
    person = Person(host, 'run', '-t', 'one', 'sh', '-c', 'tty && stty size && read x && exit $x')
    person.sees(b'24 80')
    person.type(b'9\r')
    assert person.wait()[0] == 9
    person = Person(host, 'run', '-it', 'one', 'sh', '-c', 'echo begun; exec sleep 600')
    person.sees(b'begun')
    person.type(b'\x03')
    assert person.wait()[0] == 130


def test_a_shell(host, guest):
    person = Person(host, 'shell', 'one')
    at_prompt(person)
    person.type(b'tty; echo $TERM $((6 * 7))\r')
    person.sees(b'xterm 42')
    person.has(33, 101)                    # told by a signal, which what is typed may overtake
    person.type(b'until stty size | grep "33 1[0]1"; do sleep 0.1; done\r')
    person.sees(b'33 101')
    person.type(b"sh -c 'echo wait$((20 + 1)); exec sleep 600'\r")
    person.sees(b'wait21')
    person.type(b'\x03')
    person.sees(b'PROMPT> ')
    person.type(b'exit 5\r')
    assert person.wait()[0] == 5


def test_a_terminal_whose_output_has_no_more_room_says_so(host, guest):
    person = Person(host, 'run', '-t', '--output-limit', '20000', 'one', '--', 'sh', '-c',
                    'seq 9999; read x; exit 6')
    person.sees(b'the output limit of 20000 bytes is reached: nothing more is shown')
    person.type(b'\r')
    code, text = person.wait()
    assert code == 6 and text.count('nothing more is shown') == 1 and 'truncated' in text


@pytest.mark.parametrize('how', ['keys', 'signal', 'hangup'])
def test_a_shell_lasts_and_one_comes_back_to_it(host, guest, how):
    person = Person(host, 'shell', 'one')
    at_prompt(person)
    person.type(b'cd /tmp; here=$((40 + 2)); echo mark$here\r')
    person.sees(b'mark42')
    if how == 'keys':
        person.type(b'\r~.')
    elif how == 'signal':
        os.kill(person.pid, signal.SIGTERM)
    else:
        os.kill(person.pid, signal.SIGKILL)
    code, text = person.wait()
    cmd_id = host.verb('ps', '-q', 'one').stdout.split()[-1].decode()
    assert how == 'hangup' or code == 255 and 'shell one ' + cmd_id in text
    person = Person(host, 'shell', 'one', cmd_id)
    person.sees(b'mark42')
    person.type(b'echo again$here in $PWD\r')
    person.sees(b'again42 in /tmp')
    person.type(b'exit 0\r')
    assert person.wait()[0] == 0


def test_all_who_sit_at_a_terminal_type_there(host, guest):
    """What one types is not taken for what another has typed already."""
    first = Person(host, 'shell', 'one')
    at_prompt(first)
    cmd_id = host.verb('ps', '-q', 'one').stdout.split()[-1].decode()
    second = Person(host, 'shell', cmd_id)     # its VM need not be named
    second.sees(b'PROMPT> ')
    for number in range(3):
        for person, other in ((second, first), (first, second)):
            person.type(b'echo m$((40 + %d))by%d\r' % (number, person is first))
            for each in person, other:
                each.sees(b'm%dby%d' % (40 + number, person is first))
    second.type(b'\r~.')
    assert second.wait()[0] == 255
    first.type(b'echo a"lon"e; exit 3\r')
    first.sees(b'alone')
    assert first.wait()[0] == 3


def test_a_shell_goes_on_while_the_agent_is_restarted(host, tmp_path):
    with Agent(tmp_path, host, 'shaky') as agent:
        person = Person(host, 'shell', 'shaky')
        at_prompt(person)
        agent.stop()
        agent.start()
        person.type(b'echo still$((20 + 2))\r')
        person.sees(b'still22')
        person.type(b'exit 0\r')
        assert person.wait()[0] == 0


def test_a_shell_goes_on_while_the_host_agent_is_restarted(tmp_path):
    with Host(tmp_path / 'host', broker={'port': free_port()}) as host, \
            Agent(tmp_path / 'guest', host, 'one'):
        person = Person(host, 'shell', 'one')
        at_prompt(person)
        person.type(b'here=$((40 + 2))\r')
        person.sees(b'PROMPT> ')
        host.stop(signal.SIGKILL)
        person.type(b'echo typed$here meanwhile\r')
        person.sees(b'the host agent does not answer; waiting up to 60 s for it (Enter and ~. leaves)')
        host.start()
        person.sees(b'vmhost: the host agent is back')
        person.sees(b'typed42 meanwhile', 60)
        person.type(b'echo again$here\r')
        person.sees(b'again42')
        host.stop()
        person.sees(b'does not answer')
        person.type(b'\r~.')
        code, text = person.wait()
        assert code == 255 and text.count('typed42') == 1 and 'come back with `shell one ' in text
        host.start()
        cmd_id = host.verb('ps', '-q', '-n', '0').stdout.decode().strip()
        wait_until(lambda: host.verb('kill', '-9', cmd_id).returncode == 0, 30)


def test_who_sits_before_a_host_agent_that_hangs_may_leave(tmp_path):
    with Host(tmp_path / 'host') as host, Agent(tmp_path / 'guest', host, 'one') as guest:
        person = Person(host, 'run', '-t', 'one', 'sh', '-c', 'stty -echo; echo ready; exec cat')
        person.sees(b'ready\r\n')
        os.kill(host.process.pid, signal.SIGSTOP)
        try:
            person.type(b'nobody hears\r')
            person.sees(b'vmhost: the host agent does not answer; still waiting (Enter and ~. leaves)')
            person.type(b'\r~.')
            code, text = person.wait()
        finally:
            os.kill(host.process.pid, signal.SIGCONT)
        assert code == 255 and 'come back with' in text
        guest.end_programs()


def test_a_paste_of_a_megabyte(host, guest, tmp_path):
    """Into a program that reads key by key, as editors and shells do."""
    target = tmp_path / 'pasted'
    person = Person(host, 'run', '-t', 'one', 'sh', '-c', 'stty raw -echo; echo ready; head -c 1000000 > %s'
                    % target)
    person.sees(b'ready')
    text = b'0123456789abcde\r' * 62500
    paste = threading.Thread(target=lambda: [person.type(text[at:at + 1000])
                                             for at in range(0, len(text), 1000)])
    paste.start()
    assert person.wait()[0] == 0
    paste.join()
    assert target.read_bytes() == text


def test_what_a_terminal_is_not_for(host, guest):
    for words in (['run', '-t', '*', 'true'], ['run', '-t', '-I', 'x', 'one', 'true'],
                  ['shell', 'one', 'none']):
        assert host.verb(*words).returncode == 255


def test_a_shell_reads_a_script(host, guest):
    done = host.verb('shell', 'one', input=b'echo from $0; exit 4\n')
    assert done.returncode == 4 and done.stdout.startswith(b'from ')


def test_who_leaves_a_full_screen_has_their_own_terminal_back(host, guest):
    person = Person(host, 'run', '-t', '--id', 'screen', 'one', '--', 'sh', '-c',
                    r"printf '\033[?1049h\033[?1;1000;1006h\033[?25l\033=here'; exec cat")
    person.sees(b'here')
    person.type(b'\r~.')
    code, text = person.wait()
    left = text.partition('here')[2]
    assert code == 255 and all('\033[?%s' % mode in left for mode in ('1049l', '1l', '1000l', '1006l', '25h'))
    assert '\033>' in left and left.index('1049l') < left.index('the command continues')
    assert host.verb('kill', '-9', 'screen').returncode == 0


def test_what_is_said_to_who_leaves_has_a_line_of_its_own(host, guest):
    person = Person(host, 'run', '-t', '--id', 'prompt', 'one', '--', 'sh', '-c',
                    'printf "a prompt> "; exec sleep 600')
    person.sees(b'a prompt> ')
    os.kill(person.pid, signal.SIGTERM)
    assert 'a prompt> \r\nvmhost: the command continues' in person.wait()[1]
    assert host.verb('kill', '-9', 'prompt').returncode == 0


def test_who_comes_back_to_a_full_screen_has_its_modes(host, guest):
    person = Person(host, 'run', '-t', '--id', 'full', 'one', '--', 'sh', '-c',
                    r"printf '\033[?1049h\033[?1;1000h\033[?25l\033=begun\n'; seq 99999; echo here; exec cat")
    person.sees(b'here')
    os.kill(person.pid, signal.SIGTERM)
    person.wait()
    person = Person(host, 'shell', 'one', 'full')
    person.sees(b'here')
    back = person.written.partition(b'99999')[0]
    assert b'begun' not in back and back.index(b'\033[?1049h') < back.index(b'\033[?1h')
    assert all(switch in back for switch in (b'\033[?1000h', b'\033[?25l', b'\033='))
    person.type(b'\r\x03')
    assert '\033[?1049l' in person.wait()[1].partition('99999')[2]


@pytest.mark.once
def test_who_interrupts_a_flood_does_not_see_it_to_its_end(host, guest):
    pid, fd = pty.fork()
    if pid == 0:
        script = 'trap "echo caught; exit 5" INT; yes flooding'
        os.execv(sys.executable, host.command('run', '-t', '--id', 'flood', 'one', '--', 'sh', '-c', script))
    with host.api as api:
        wait_until(lambda: any(row['cmdId'] == 'flood' for row in api.listCmds()), 20)
        wait_until(lambda: api.getCmdStatus('flood')['outSize'] > 20000000, 120)
    os.write(fd, b'\x03')
    shown = b''
    with contextlib.suppress(OSError):     # Linux's way to say that the other side has been closed
        while True:
            shown += os.read(fd, 65536)
    os.close(fd)
    assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 5
    assert b'MiB are not shown here; `out flood` has them]\r\n' in shown and shown.endswith(b'caught\r\n')
    assert len(shown) < 5000000, len(shown)


@pytest.mark.parametrize('shown, undone', [
    ([b'\033[1mtext\033[m\n'], b''), ([b'text'], b'\n'), ([b'\033[?2004h> ', b'\033[?2004l\n'], b''),
    ([b'\033[?104', b'9h'], b'\033[m\033[?1049l'), ([b'\033[?25l', b'\033[?7l', b'\033c\n'], b''),
    ([b'\033[2;9r', b'\n'], b'\033[m\0337\033[r\0338'), ([b'\033[2;9r', b'\033[r', b'\n'], b''),
    ([b'\033[?25l\033[?25h\033=\033>\n'], b''), ([b'\033[?47;25l'], b'\033[m\033[?25h\n')])
def test_what_switches_a_terminal_back(shown, undone):
    modes = cliterminal.Modes()
    for data in shown:
        modes.read(data)
    assert modes.undone(on_new_line=True) == undone and modes.undone(on_new_line=False) == b''


def test_a_terminal_on_a_machine_that_is_away_says_so(host, tmp_path):
    with Agent(tmp_path / 'guest', host, 'leaver'):
        assert host.verb('run', 'leaver', 'true').returncode == 0
    wait_until(lambda: b'left' in host.verb('ls', 'leaver').stdout, 60)
    person = Person(host, 'run', '-t', '--queue', 'leaver', 'true')
    person.sees(b'vmhost: leaver does not answer; still waiting (Enter and ~. leaves)')
    person.type(b'x\r~.')
    code, text = person.wait()
    assert code == 255 and text.count('does not answer') == 1
    cmd_id = text.split()[-1].strip('`')
    assert host.verb('kill', cmd_id).returncode == 0


def test_who_wants_a_shell_where_nobody_is_is_told_since_when(host, tmp_path):
    with Agent(tmp_path / 'guest', host, 'goer'):
        assert host.verb('run', 'goer', 'true').returncode == 0
    wait_until(lambda: b'left' in host.verb('ls', 'goer').stdout, 60)
    done = host.verb('shell', 'goer')
    assert done.returncode == 255
    assert re.fullmatch(rb'vmhost: goer is away \(left, last heard \d+ s ago\)\n', done.stderr), done.stderr
    words = host.command('run', '--queue', 'goer', 'true')
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr.readline() == (
            b'vmhost: goer is away: the command begins once it is back (Ctrl-C cancels it)\n')
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 255 and b'before it began' in process.stderr.read()


def test_escapes():
    escapes = cliterminal.Escapes()
    assert escapes.read(b'~~a~.b\r~x\r') == (b'~a~.b\r~x\r', False)
    assert escapes.read(b'~') == (b'', False)
    assert escapes.read(b'.more') == (b'', True)
    escapes = cliterminal.Escapes()
    assert escapes.read(b'a~?\r') == (b'a~?\r', False) and not escapes.asks
    assert escapes.read(b'~?~.') == (b'', True) and escapes.asks


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='a system call of Linux')
def test_a_pipe_is_widened_and_a_file_left_alone(tmp_path):
    reader, writer = os.pipe()
    try:
        cliterminal.widen_pipe(reader)
        assert fcntl.fcntl(reader, cliterminal.SET_PIPE_SIZE + 1) == cliterminal.READ
    finally:
        os.close(reader)
        os.close(writer)
    with open(str(tmp_path / 'file'), 'wb') as file:
        cliterminal.widen_pipe(file.fileno())
