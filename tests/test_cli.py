"""The command line, as a person and a script use it: real host, real guests, real terminals."""

import glob
import json
import os
import re
import shlex
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import types
import xmlrpc.client
import xmlrpc.server
import zipfile

import pytest
import wine
from agents import ON_WINDOWS, TOP, Agent, Host, posix_host
from helpers import wait_until
from terminals import Terminal

import agent
import clicommands
import clicomplete
import clifiles
import clifollow
import faults
import hostcheck
import hostcli
import hostclient
import hostcontrol

pytestmark = [pytest.mark.whole, pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]
SCRIPT = os.path.join(TOP, 'vmhost.py')


def verb(host, *words, code=0, **kwargs):
    """What a verb printed, as text; its exit code is checked."""
    done = host.verb(*words, **kwargs)
    assert done.returncode == code, (words, done)
    text = done.stdout.decode()
    return text.replace('\r\n', '\n') if ON_WINDOWS else text


def started(host, *words, **kwargs):
    """A verb that goes on, as a process."""
    return subprocess.Popen(host.command(*words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kwargs)


# --- run ---

@pytest.mark.windows
def test_run_keeps_the_outputs_apart_and_exits_with_the_code(host, guests):
    done = host.verb('run', 'one', '--', 'sh', '-c', 'echo out; echo err >&2; exit 7')
    assert (done.stdout, done.stderr, done.returncode) == (b'out\n', b'err\n', 7)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a device of Linux')
@pytest.mark.parametrize('closed', ['stdout', 'stderr'])
def test_output_that_has_no_room_here_is_not_the_commands_code(host, guests, closed):
    with open('/dev/full', 'w') as full:
        words = host.command('run', 'one', '--', 'sh', '-c', 'echo out; echo err >&2')
        outputs = dict(dict.fromkeys(['stdout', 'stderr'], subprocess.DEVNULL), **{closed: full})
        assert subprocess.call(words, timeout=60, **outputs) == 255


@pytest.mark.windows
def test_run_gives_the_exact_bytes(host, guests):
    exact = bytes(range(256)) * 2000
    done = host.verb('run', '-i', 'one', '--', 'sh', '-c', 'tee /dev/stderr', input=exact)
    assert done.stdout == exact and done.stderr == exact


def test_run_with_a_file_of_the_vm_as_standard_input(host, guests):
    with open(os.path.join(guests[0].files, 'input'), 'w') as file:
        file.write('from a file')
    assert verb(host, 'run', '-I', 'input', 'one', '--', 'cat') == 'from a file'
    done = host.verb('run', '-i', '-I', 'input', 'one', '--', 'cat', input=b'x')
    assert done.returncode == 255 and b'-i and -I: one of them' in done.stderr
    done = host.verb('run', '-i', 'one', '--', 'cat', input=bytes(2000000))
    assert done.returncode == 0 and done.stdout == bytes(2000000)


def test_run_shows_output_as_it_comes(host, guests):
    os.mkfifo(os.path.join(guests[0].files, 'go'))
    with started(host, 'run', 'one', '--', 'sh', '-c', 'echo first; read line < go; echo $line') as process:
        try:
            assert process.stdout.readline() == b'first\n'      # while the command waits
            with open(os.path.join(guests[0].files, 'go'), 'w') as go:
                go.write('second\n')
            assert process.stdout.read() == b'second\n'
        finally:
            os.remove(os.path.join(guests[0].files, 'go'))
        process.stderr.read()
    assert process.returncode == 0


@pytest.mark.windows
def test_run_passes_environment_folder_and_arguments(host, guests):
    os.makedirs(os.path.join(guests[0].files, 'sub'), exist_ok=True)
    out = verb(host, 'run', '-e', 'DAY=Dienstag ü=1', '-C', 'sub', 'one', '--', 'sh', '-c',
               'echo "$DAY" "$0" "$1"; basename "$PWD"', '-e', '--')
    assert out == 'Dienstag ü=1 -e --\nsub\n'


def test_run_knows_the_words_of_docker(host, guests, monkeypatch):
    monkeypatch.setenv('DAY', 'Dienstag ü')
    for option in ('-w', '--workdir'):
        assert verb(host, 'exec', '-e', 'DAY', option, '/', 'one', 'sh', '-c', 'echo $DAY in $PWD') == (
            'Dienstag ü in /\n')
    done = host.verb('run', '-e', 'NOT_SET_HERE', 'one', 'true')
    assert done.returncode == 255 and b'NOT_SET_HERE: expected NAME=VALUE' in done.stderr
    assert verb(host, 'exec', '--interactive', 'one', 'cat', input=b'typed') == 'typed'
    code, text = Terminal(host.command('exec', '--interactive', '--tty', 'one', 'tty')).wait()
    assert code == 0 and 'not a tty' not in text


@pytest.mark.parametrize('line, is_told', [
    ('ls -l', True), ('echo hi | cat', True), ('cd', True), ('no-such-program', False), ('no/such', False)])
def test_a_line_for_a_shell_is_told_how_it_gets_to_one(host, guests, line, is_told):
    done = host.verb('run', 'one', line)
    assert done.returncode == 127 and (b"`run VM -- sh -c '" in done.stderr) == is_told


def test_run_exits_with_128_and_the_signal(host, guests):
    assert host.verb('run', 'one', '--', 'sh', '-c', 'kill -USR1 $$').returncode == 128 + signal.SIGUSR1
    done = host.verb('run', '-T', '0.5', 'one', '--', 'sleep', '77')
    assert done.returncode == 128 + signal.SIGTERM and b'timeout' in done.stderr


@pytest.mark.windows
@pytest.mark.parametrize('program, code', [
    ('no-such-program', 127), ('/etc/passwd', 126), ('/etc', 126), ('/etc/passwd/x', 126),
    ('/' + 300 * 'n', 126)])
def test_what_can_not_start_exits_as_in_a_shell(host, guests, program, code):
    done = host.verb('run', 'one', '--', program)
    assert done.returncode == code and re.match(b'vmhost: E[A-Z]+: ', done.stderr)


def test_a_program_that_leads_to_itself_or_is_being_written_is_126(host, guests, tmp_path):
    loop, written = tmp_path / 'loop', tmp_path / 'written'
    loop.symlink_to(loop)
    shutil.copy('/bin/true', str(written))
    for path, name in ((loop, b'ELOOP'), (written, b'ETXTBSY')):
        with open(str(written), 'ab'):
            done = host.verb('run', 'one', '--', str(path))
        assert (done.returncode, done.stderr.partition(b': ')[2][:len(name)]) == (126, name)


@pytest.mark.parametrize('option', ['-I', '-C'])
def test_what_is_missing_beside_the_program_is_no_missing_program(host, guests, option):
    done = host.verb('run', option, 'no-such', 'one', '--', 'cat')
    assert done.returncode == 255 and b'ENOENT: ' in done.stderr and b'no-such' in done.stderr


def test_what_was_ended_for_a_limit_is_told_which(host, guests):
    done = host.verb('run', '-l', 'cpu=1', 'one', '--', 'sh', '-c', 'kill -XCPU $$')
    assert done.returncode == 128 + signal.SIGXCPU
    assert done.stderr == b'vmhost: ETIME: ended by signal 24: limits.cpu\n'


def test_an_option_of_zero_is_one(host, guests):
    stubborn = 'trap "" TERM; while :; do sleep 1; done'
    done = host.verb('run', '-T', '0.5', '-k', '0', 'one', '--', 'sh', '-c', stubborn)
    assert done.returncode == 128 + signal.SIGKILL
    done = host.verb('run', '--output-limit', '0', 'one', '--', 'echo', 'hi')
    assert done.returncode == 255 and not done.stdout and b'output_limit' in done.stderr


@posix_host
def test_any_bytes_are_words_of_a_command(host, guests):
    show = ['run', '-e', b'N=\xfe', 'one', '--', 'sh', '-c', 'printf "%s|" "$@" "$N"', 'sh']
    assert host.verb(*show, b'\xe4.txt', b'a\x1b\x01', 'ä').stdout == b'\xe4.txt|a\x1b\x01|\xc3\xa4|\xfe|'


def test_output_that_was_cut_is_no_success(host, tmp_path):
    with Agent(tmp_path, host, 'narrow', output_limit='10K'):
        done = host.verb('run', 'narrow', '--', 'sh', '-c', 'yes | head -c 100000')
        assert done.returncode == 255 and b'stdout was truncated' in done.stderr
    assert verb(host, 'forget', 'narrow') == 'narrow is forgotten\n'


def test_a_call_whose_answer_is_lost_is_made_again_under_the_same_id():
    calls = []

    class Cut:
        def call(self, *words):
            calls.append(words)
            if len(calls) == 1:
                raise hostclient.NoHost('cut')
            return 'an id'
    assert clicommands.submit(Cut(), None, 'runCmd', 'g', 'true', [], {}, '', '', {}) == 'an id'
    assert calls[0] == calls[1] and calls[0][-1]['id']


@pytest.mark.skipif(not hasattr(socket, 'AF_UNIX'), reason='no Unix sockets')
@pytest.mark.parametrize('is_there', [True, False])
def test_who_got_no_answer_is_told_the_id_of_what_may_run(tmp_path, is_there):
    """Else it is typed again, and runs twice."""
    state = tmp_path / 'state'
    state.mkdir(0o700)
    (tmp_path / 'host.ini').write_text('[Host]\nstate_dir = state\n')
    (state / 'xmlrpc.address').write_text('127.0.0.1:1')
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(str(state))            # a path may be too long for a socket
        try:
            listener.bind('xmlrpc.sock')
        finally:
            os.chdir(here)
        if is_there:
            listener.listen(5)

        def cut_all():
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    assert connection.recv(65536)
        thread = threading.Thread(target=cut_all)
        if is_there:
            thread.start()
        done = subprocess.run([sys.executable, SCRIPT, str(tmp_path / 'host.ini'), 'run', '--id', 'mine',
                               'one', '--', 'true'], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if is_there:
            thread.join(20)
    assert done.returncode == 255 and b'no host agent answers' in done.stderr
    assert (b'`run --id mine' in done.stderr) == is_there, done.stderr


def test_one_that_hangs_holds_up_a_list_once(host, guests, tmp_path):
    with Agent(tmp_path, host, 'hung') as hung, host.api as api:
        ids = [api.runCmd('hung', 'sleep', ['99']) for _ in range(6)]
        wait_until(lambda: all(api.getCmdStatus(cmd_id)['pid'] for cmd_id in ids))
        os.kill(hung.process.pid, signal.SIGSTOP)
        try:
            begin = time.monotonic()
            verb(host, 'ps', '-l', 'hung')
            assert time.monotonic() - begin < 3 * hostcontrol.REFRESH_TIMEOUT
        finally:
            os.kill(hung.process.pid, signal.SIGCONT)
        wait_until(lambda: all(api.getCmdStatus(cmd_id)['age'] < 1 for cmd_id in ids))     # it is asked again
        verb(host, 'kill', *ids)
    verb(host, 'forget', '--force', 'hung')


@pytest.mark.slow
def test_one_that_hangs_holds_up_nobody_and_ends_by_the_limit(host, guests, tmp_path):
    with Agent(tmp_path, host, 'hung') as hung:
        os.kill(hung.process.pid, signal.SIGSTOP)
        try:
            begin = time.monotonic()
            with started(host, 'run', '-T', '2', '*', '--', 'echo', 'done') as process:
                assert sorted(process.stdout.readline() for _ in range(2)) == [b'one: done\n', b'two: done\n']
                assert time.monotonic() - begin < 6
                assert process.wait(60) == 255
                told = process.stderr.read().decode().splitlines()
            assert 'hung: no answer within the time limit' in told[0] and told[-1] == '2 ok, hung absent'
        finally:
            os.kill(hung.process.pid, signal.SIGCONT)
    verb(host, 'forget', '--force', 'hung')


@pytest.mark.once
def test_who_is_absent_is_no_success_and_who_is_at_work_is_not_forgotten_by_mistake(host, guests, tmp_path):
    with Agent(tmp_path, host, 'away') as away:
        cmd_id = verb(host, 'run', '-d', 'away', '--', 'sleep', '99').strip()
        wait_until(lambda: 'running' in verb(host, 'ps', 'away'))
        done = host.verb('forget', 'away')
        assert done.returncode == 1 and b'at work' in done.stderr and b'--force' in done.stderr
        verb(host, 'kill', cmd_id)
        verb(host, 'wait', cmd_id, code=128 + 15)
        verb(host, 'run', 'away', '--', 'sh', '-c', 'echo x > x')
        os.mkfifo(str(tmp_path / 'fifo'))
        with host.api as api:                          # until somebody reads from it
            moving = api.startTransfer('get', 'away', 'x', str(tmp_path / 'fifo'))
        done = host.verb('forget', 'away')
        assert done.returncode == 1 and b'at work (`transfers away`)' in done.stderr
        verb(host, 'kill', moving)
        away.stop()
    wait_until(lambda: 'left' in verb(host, 'ls', 'away'))     # it said that it goes, and isn't missed
    assert re.search('^agent +left$', verb(host, 'info', 'away'), re.MULTILINE)
    vms = {vm['name']: (vm['agent'], vm['left']) for vm in json.loads(verb(host, 'ls', '--json'))}
    assert vms['away'] == ('lost', True) and vms['one'] == ('alive', False)
    done = host.verb('run', '*', '--', 'true')
    assert (done.returncode, done.stderr) == (255, b'2 ok, away absent\n')
    assert host.verb('run', '*', '--', 'sh', '-c', 'exit 4').returncode == 4
    assert verb(host, 'ls', '-q', 'away', 'one', '*o*') == 'away\none\ntwo\n'
    (tmp_path / 'file').write_text('content')
    for pattern in ('*', 'awa[y]'):    # who means all is told of those that got nothing
        for words in (('ping', pattern), ('put', pattern, str(tmp_path / 'file'), 'for-all')):
            done = host.verb(*words)
            assert (done.returncode, done.stderr) == (
                1, b'vmhost: the agent of away is not connected\n'), words
    for guest in guests:
        with open(os.path.join(guest.files, 'for-all')) as file:
            assert file.read() == 'content'
    verb(host, 'forget', 'away')


@pytest.mark.parametrize('words, said', [
    (('run', 'one', '-T', '5', 'true'), b'run: -T: options stand before VM, or before --'),
    (('exec', 'one', '-it', 'sh'), b'run: -it: options stand before VM'),
    (('shell', 'one', 'uname', '-a'), b'shell: a shell is told no command; `run -t VM CMD`'),
    (('shell', 'one', 'uname'), b'no command uname to come back to (`ps` lists them); to run it: `run -t ')])
def test_words_in_another_order_are_told_theirs(host, guests, words, said):
    done = host.verb(*words)
    assert done.returncode == 255 and said in done.stderr and done.stderr.count(b'\n') == 1


@pytest.mark.parametrize('words, code', [
    (('kill', 'one'), 1), (('out', '-f', 'one'), 1), (('logs', 'one'), 1), (('wait', 'one'), 1),
    (('rerun', 'one'), 255)])
def test_a_machine_in_the_place_of_a_command_is_told_to_be_one(host, guests, words, code):
    done = host.verb(*words)
    assert (done.returncode, done.stderr) == (
        code, b'vmhost: one is a VM, and no command: `ps one` lists those that ran there\n')


@pytest.mark.parametrize('words', [
    ('one', '-C', 'x', '--'), ('nobody', '--', 'true'), ('x*', '--', 'true'), ('one', '--'), ('one',),
    (), ('-T', 'soon', 'one', '--', 'true'), ('-e', 'X', 'one', '--', 'true')])
def test_what_is_not_the_commands_is_255(host, guests, words):
    done = host.verb('run', *words)
    assert done.returncode == 255
    assert done.stderr.startswith(b'vmhost: ') and done.stderr.count(b'\n') == 1


@pytest.mark.windows
def test_run_on_many_prefixes_each_line(host, guests):
    done = host.verb('run', '*', '--', 'sh', '-c', 'echo a; printf b; echo e >&2; [ $(basename $PWD) = 0 ]')
    assert sorted(done.stdout.decode().splitlines()) == ['one: a', 'one: b', 'two: a', 'two: b']
    *lines, summary = done.stderr.decode().splitlines()
    assert sorted(lines) == ['one: e', 'two: e'] and summary == 'one exited 1, two exited 1'
    assert done.returncode == 1
    done = host.verb('run', '*', '--', 'sh', '-c', 'exec sh -c "exit $1"', 'sh', '0')
    assert (done.returncode, done.stderr) == (0, b'2 ok\n')


def test_ctrl_c_ends_the_command(host, guests):
    terminal = Terminal([sys.executable, SCRIPT, host.ini, 'run', 'one', '--', 'sh', '-c',
                         'trap "echo caught; exit 9" INT; echo ready; while :; do sleep 0.1; done'])
    wait_until(lambda: b'ready' in terminal.written, 20)
    terminal.type(b'\x03')
    code, text = terminal.wait()
    assert code == 9 and 'caught' in text and 'press again to detach' in text


def test_a_second_ctrl_c_leaves(host, guests):
    process = started(host, 'run', 'one', '--', 'sh', '-c', 'trap "echo caught" INT; echo ready; sleep 88 &'
                      ' wait; wait; echo end')
    assert process.stdout.readline() == b'ready\n'
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b'caught\n'
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    cmd_id = re.search(r'continues as (\S+)', errors.decode()).group(1)
    assert json.loads(verb(host, 'call', 'getCmdStatus', cmd_id))['state'] == 'running'
    verb(host, 'kill', '-s', 'KILL', cmd_id)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_second_ctrl_c_leaves_whatever_it_meets():
    """In a finalizer Python reports an exception, and goes on."""
    class Met:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass
    with clicommands.Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.take() == [signal.SIGINT]
        met = Met()
        del met
        with pytest.raises(KeyboardInterrupt):
            interrupts.take()


@posix_host
def test_sigterm_is_handed_on(host, guests):
    process = started(host, 'run', 'one', '--', 'sh', '-c', 'echo ready; exec sleep 88')
    assert process.stdout.readline() == b'ready\n'
    process.terminate()
    assert process.communicate(timeout=20) == (b'', b'')
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.windows
def test_a_reader_that_leaves_ends_the_command(host, guests):
    process = started(host, 'run', 'one', '--', 'yes')
    assert process.stdout.readline() == b'y\n'
    process.stdout.close()
    assert process.stderr.read() == b''
    process.stderr.close()
    assert process.wait(20) == 128 + 13
    last = [row for row in json.loads(verb(host, 'ps', '--json')) if row['cmd'] == 'yes'][-1]
    wait_until(lambda: 'signaled' in verb(host, 'call', 'getCmdStatus', last['cmdId']), 20)
    rows = {row['cmdId']: row for row in json.loads(verb(host, 'ps', '--json'))}
    status = rows[last['cmdId']]['status']
    assert status['end'] == 'signaled 13' and 'ru_utime' in status['resources']


def test_who_follows_goes_on_after_a_restart_of_the_host_agent(tmp_path):
    """Nothing is told twice, and nothing left out."""
    with Host(tmp_path / 'host') as host, Agent(tmp_path / 'guest', host, 'g', name='g') as guest:
        os.mkfifo(os.path.join(guest.files, 'go'))
        script = 'echo begun; echo error >&2; read line < go; echo $line; exit 200'
        never_began = verb(host, 'run', '-d', 'g', '--', 'no-such-program').strip()
        followers = {'run': started(host, 'run', 'g', '--', 'sh', '-c', script)}
        assert followers['run'].stdout.readline() == b'begun\n'
        cmd_id = verb(host, 'ps', '-q', '-n', '0').strip()
        followers.update({'out': started(host, 'out', '-f', cmd_id),
                          'wait': started(host, 'wait', never_began, cmd_id),
                          'events': started(host, 'events', '-f', '--json', '-n', '1')})
        assert followers['out'].stdout.readline() == b'begun\n'
        assert [followers[name].stderr.readline() for name in ('run', 'out')] == 2 * [b'error\n']
        assert b'ENOENT' in followers['wait'].stderr.readline()        # it waits for the other one now
        seen = [json.loads(followers['events'].stdout.readline().decode())]
        host.stop()
        for name, process in followers.items():
            line = process.stderr.readline()
            assert line == b'vmhost: the host agent does not answer; waiting up to 60 s for it\n', name
        stay_on_port(host)
        host.start()
        wait_until(guest.has_joined, 60)
        for name in ('run', 'out', 'wait'):            # before there is more to tell
            assert followers[name].stderr.readline() == b'vmhost: the host agent is back\n', name
        with open(os.path.join(guest.files, 'go'), 'w') as go:
            go.write('goes on\n')
        for name in ('run', 'out', 'wait'):
            out, errors = followers[name].communicate(timeout=60)
            assert (out, errors, followers[name].returncode) == (
                b'' if name == 'wait' else b'goes on\n', b'', 200), name
        while seen[-1]['type'] != 'cmd-finished':
            seen.append(json.loads(followers['events'].stdout.readline().decode()))
        assert [event['seq'] for event in seen] == list(range(seen[0]['seq'], seen[0]['seq'] + len(seen)))
        followers['events'].send_signal(signal.SIGINT)
        followers['events'].communicate(timeout=20)


def stay_on_port(host):
    """Has a host agent that is started again listen where its guests know it."""
    ini = open(host.ini).read().replace('port = 0', 'port = %d' % host.broker_port, 1)
    with open(host.ini, 'w') as file:
        file.write(ini)


def test_who_waits_for_a_host_agent_that_hangs_is_told():
    # By its socket, whose path is short: by TCP it is told as one that hangs at once.
    with tempfile.TemporaryDirectory() as folder, Host(os.path.join(folder, 'host')) as host:
        os.kill(host.process.pid, signal.SIGSTOP)
        try:
            process = started(host, 'ls', '-q')
            assert process.stderr.readline() == b'vmhost: the host agent does not answer; still waiting\n'
        finally:
            os.kill(host.process.pid, signal.SIGCONT)
        assert process.communicate(timeout=60) == (b'', b'') and process.returncode == 0


def test_who_waits_for_a_host_agent_may_leave(tmp_path):
    with Host(tmp_path / 'host') as host, Agent(tmp_path / 'guest', host, 'g', name='g') as guest:
        process = started(host, 'run', 'g', '--', 'sh', '-c', 'echo begun; sleep 99')
        assert process.stdout.readline() == b'begun\n'
        host.stop()
        assert b'does not answer' in process.stderr.readline()
        interrupt_twice(process)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == -signal.SIGINT and b'detached; the command continues as ' in errors
        guest.end_programs()


def test_ctrl_c_ends_the_loop_of_a_shell_too(host, guests):
    ended = verb(host, 'run', '-d', 'one', '--', 'no-such-program').strip()
    cmd_id = verb(host, 'run', '-d', 'one', '--', 'sleep', '99').strip()
    wait = ' '.join(map(shlex.quote, host.command('wait', ended, cmd_id)))
    loop = 'for round in 1 2 3; do echo round $round; %s; done; echo went on' % wait
    shell = Terminal(['bash', '-c', loop])
    wait_until(lambda: b'ENOENT' in shell.written)     # it waits for the other one
    shell.type(b'\x03')
    code, text = shell.wait()
    assert code == 130 and 'round 2' not in text and 'went on' not in text
    verb(host, 'kill', cmd_id)


def interrupt_twice(process):
    """As by Ctrl-C; the second one once the first was noted."""
    process.send_signal(signal.SIGINT)
    with open('/proc/%d/status' % process.pid) as status:
        wait_until(lambda: status.seek(0) or 'ShdPnd:\t0000000000000000' in status.read())
    process.send_signal(signal.SIGINT)


def test_a_host_agent_that_stays_away_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(hostclient, 'RESTART', 0.1)
    told = []
    client = hostclient.Client(str(tmp_path)).patient(told.append)
    with pytest.raises(hostclient.NoHost, match='no host agent runs here'):
        client.call('getVMs')          # it never was there
    assert told == []
    assert client.reach(lambda: 5) == 5
    with pytest.raises(hostclient.NoHost, match='no host agent runs here'):
        client.call('getVMs')
    assert len(told) == 1 and 'waiting' in told[0]


@pytest.mark.skipif(not hasattr(socket, 'AF_UNIX'), reason='no Unix sockets')
def test_who_gets_no_answer_to_the_first_call_waits_for_a_restart_too(tmp_path, monkeypatch):
    monkeypatch.setattr(hostclient, 'RESTART', 0.1)
    here, there = socket.socketpair()
    there.close()                      # it was there, and went away before it answered
    told = []
    client = hostclient.Client(str(tmp_path)).patient(told.append)
    cut = [hostclient._Connection(here)]
    monkeypatch.setattr(client, '_connect', lambda: cut.pop() if cut else client._read('gone'))
    with pytest.raises(hostclient.NoHost):
        client.call('waitCmd', 'an-id', 60)
    assert len(told) == 1 and 'waiting' in told[0]


def test_a_host_that_stays_away_tells_how_to_go_on(tmp_path, monkeypatch):
    class Away:
        def __init__(self, *_):
            raise hostclient.NoHost('it is gone')
    monkeypatch.setattr(clicommands, 'Followed', Away)
    told = []
    screen = types.SimpleNamespace(complain=told.append)
    with pytest.raises(hostclient.NoHost):
        clicommands.follow(hostclient.Client(str(tmp_path)), screen, 'an-id', False, None, 0, True)
    assert told == ['the command continues, but gets no more input; follow it with `out -f an-id` when the '
                    'host agent is back']


class Answers:
    """Plays the host for one command: its status, and slices of its output or what is raised instead."""

    def __init__(self, state, size, output):
        self._state, self._size, self._output = state, size, output

    def call(self, method, *args):
        assert method == 'getCmdStatus'
        return {'ended': self._state == 'exited', 'outSize': self._size, 'errSize': 0}

    def output(self, key, stream, offset, length, timeout=0):
        if isinstance(self._output, Exception):
            raise self._output
        return hostclient.Slice(self._output[offset:], False)


@pytest.mark.parametrize('state, output, patience, raises', [
    ('exited', b'12345', 10, None), ('exited', b'123', 10, None),
    ('exited', b'123', 0, faults.DeadlineExceeded),
    ('running', faults.AgentNotConnected('away'), 10, None),
    ('running', faults.AgentNotConnected('away'), 0, faults.AgentNotConnected),
    ('exited', faults.AgentNotConnected('away'), 1e-9, faults.AgentNotConnected)])
def test_output_that_cannot_be_had_is_never_left_out_in_silence(state, output, patience, raises, tmp_path):
    with open(str(tmp_path / 'out'), 'w+') as out:
        tail = clifollow.Tail(Answers(state, 5, output), 'id', clifollow.Pipe(out, ''),
                                clifollow.Pipe(out, ''))
        if raises:
            with pytest.raises(raises):
                tail.look(patience)
        else:
            tail.look(patience)
        assert tail.is_over == (output == b'12345')


def test_no_machine_forges_the_line_of_another_on_a_terminal(host, guests):
    words = ['run', '*', '--', 'printf', r'a\rtwo: forged\033[1A\302\233\tb\r\n\303\274\377']
    code, text = Terminal(host.command(*words)).wait()
    assert code == 0 and '2 ok' in text
    lines = [line for line in text.replace('\r\n', '\n').split('\n') if line.startswith(('one: ', 'two: '))]
    assert len(lines) == 4 and all(line.replace('\t', '').isprintable() for line in lines), lines
    assert any(line.endswith('\tb') for line in lines), lines
    assert any(line.endswith('ü\\xff') for line in lines), lines
    assert b'a\rtwo: forged' in host.verb(*words).stdout     # for a program they are as they were


# --- the other verbs ---

def test_a_detached_command_is_listed_followed_and_killed(host, guests):
    cmd_id = verb(host, 'run', '-d', 'one', '--', 'sh', '-c', 'echo begun; exec sleep 99').strip()
    assert json.loads(verb(host, 'ps', 'one', '--json'))[-1]['cmdId'] == cmd_id
    assert cmd_id in verb(host, 'ps') and "'echo begun; exec sleep 99'" in verb(host, 'ps', '-l')
    wait_until(lambda: re.search(cmd_id + r'.* ([2-9]|\d\d) s ', verb(host, 'ps')))
    with started(host, 'out', '-f', cmd_id) as process:
        assert process.stdout.readline() == b'begun\n'
        assert json.loads(verb(host, 'info', cmd_id, '--json'))['status']['state'] == 'running'
        verb(host, 'kill', cmd_id)
        assert (process.stdout.read(), process.stderr.read(), process.wait(20)) == (b'', b'', 128 + 15)
    assert verb(host, 'out', cmd_id) == verb(host, 'logs', '--tail', 'all', cmd_id) == 'begun\n'
    assert 'signaled' in verb(host, 'info', cmd_id)
    missing = verb(host, 'run', '-d', 'one', '--', 'no-such-program').strip()
    host.verb('wait', missing)
    assert host.verb('kill', cmd_id, missing).stderr.decode() == (
        'vmhost: %s has already ended\nvmhost: %s has already ended\n' % (cmd_id, missing))
    assert host.verb('wait', cmd_id, missing).stderr.decode().startswith('vmhost: %s: ENOENT' % missing)
    verb(host, 'kill', cmd_id, code=1)


STUBBORN = "trap '' TERM; echo begun; while :; do sleep 0.1; done"


def stubborn(host, *options):
    """The id of a command that ignores TERM, once it does."""
    cmd_id = verb(host, 'run', '-d', *options, 'one', '--', 'sh', '-c', STUBBORN).strip()
    wait_until(lambda: 'begun' in verb(host, 'out', cmd_id))
    return cmd_id


def test_kill_tells_signals_and_whether_there_is_anybody(host, guests):
    names = verb(host, 'kill', '-l').split()
    assert {'HUP', 'KILL', 'TERM', 'USR1'} <= set(names)
    cmd_id = verb(host, 'run', '-d', 'one', '--', 'sleep', '99').strip()
    assert verb(host, 'kill', '-0', cmd_id) == ''
    verb(host, 'kill', '-9', cmd_id)
    verb(host, 'wait', cmd_id, code=128 + 9)
    assert b'has already ended' in host.verb('kill', '-0', cmd_id).stderr
    assert host.verb('kill', '-0', 'nosuch').returncode == 1


@pytest.mark.once
def test_who_kills_what_ignores_it_is_told_so(host, guests):
    cmd_id = stubborn(host)
    done = host.verb('kill', cmd_id)
    assert done.stderr.decode() == 'vmhost: %s goes on: `kill -9 %s` ends it\n' % (cmd_id, cmd_id)
    assert done.returncode == 1
    verb(host, 'kill', '-s', 'TERM', cmd_id)       # as kill(1): it was sent, and that is all
    verb(host, 'kill', '-k', '0.2', cmd_id)
    verb(host, 'wait', cmd_id, code=128 + 9)


def test_a_stopped_program_is_woken_to_be_killed(host, guests):
    cmd_id = verb(host, 'run', '-d', 'one', '--', 'sh', '-c', 'echo begun; kill -STOP $$; sleep 99').strip()
    wait_until(lambda: 'stopped' in verb(host, 'ps', '-n', '0'))
    verb(host, 'kill', cmd_id)
    verb(host, 'wait', cmd_id, code=128 + 15)


def test_a_shell_on_a_terminal_is_hung_up(host, guests):
    """It ignores TERM, and leaves as when its window is closed; what it runs, too."""
    terminal = {'terminal': {'rows': 24, 'columns': 80, 'term': 'xterm'}}
    with host.api as api:
        cmd_id = api.runCmd('one', 'bash', ['--norc', '-i'], {'PS1': 'READY> '}, '', '', terminal)
        wait_until(lambda: b'READY> ' in api.getCmdOutput(cmd_id)['data'].data)
        api.putCmdInput(cmd_id, b'sleep 4242\r')
        wait_until(lambda: b'4242' in api.getCmdOutput(cmd_id)['data'].data)
        assert verb(host, 'kill', cmd_id) == ''
        assert api.waitCmd(cmd_id, 20)
        ended = api.getCmdResults(cmd_id)
        assert (ended['state'], ended['exitCodeOrSignal'], ended['by']) == ('signaled', 1, 'signalCmd'), ended


def test_cut_output_is_told(host, guests):
    words = ['one', 'head', '["-c", "100000", "/dev/zero"]', '{}', '', '', '{"outputLimit": 1000}']
    cmd_id = json.loads(verb(host, 'call', 'runCmd', *words))
    done = host.verb('out', '-f', cmd_id)
    assert done.stdout == bytes(1000) and b'stdout was truncated' in done.stderr


def test_output_of_many_and_of_one_of_them(host, guests):
    cmd_id = verb(host, 'run', '-d', '*', '--', 'echo', 'x').strip()
    assert sorted(verb(host, 'out', '-f', cmd_id).splitlines()) == ['one: x', 'two: x']
    assert verb(host, 'out', cmd_id + '@two') == 'x\n'


def test_ls_info_and_ping(host, guests, tmp_path):
    lines = verb(host, 'ls').splitlines()
    assert lines[0].split() == ['NAME', 'STATE', 'AGENT', 'ADDRESS', 'COMMANDS']
    assert [line.split()[:4] for line in lines[1:]] == [
        ['one', 'Running', 'alive', '127.0.0.1'], ['two', 'Running', 'alive', '127.0.0.1']]
    assert 'MEMORY' in verb(host, 'ls', '-l')
    assert [vm['id'] for vm in json.loads(verb(host, 'ls', '--json'))] == ['one', 'two']
    assert json.loads(verb(host, 'info', 'one', '--json'))['agent'] == 'alive'
    assert re.search('^agent +alive$', verb(host, 'info', 'one'), re.MULTILINE)
    assert 'PONG from one' in verb(host, 'ping', 'one')
    assert len(verb(host, 'ping', '*').splitlines()) == 2
    for mistyped, meant in (('onee', 'one'), ('twoo', 'two'), ('node', '')):
        said = host.verb('ping', mistyped).stderr.decode()
        close = '; did you mean %s?' % meant if meant else ''
        assert said == "vmhost: no VM '%s'%s (`ls` lists them)\n" % (mistyped, close)
    with Agent(tmp_path, host, 'ONT'):
        assert b'did you mean one?' in host.verb('ping', 'ONE').stderr     # and not what is as near
    verb(host, 'forget', 'ONT')
    for missing in ('info', 'ping'):
        done = host.verb(missing, 'nobody')
        assert done.returncode == 1 and done.stderr.startswith(b'vmhost: ')


def test_events(host, guests):
    cmd_id = verb(host, 'run', '-d', 'one', '--', 'true').strip()
    assert 'cmd-submitted' in verb(host, 'events') and cmd_id in verb(host, 'events', '-n', '5')
    found = json.loads(verb(host, 'events', '--json', '-n', '3'))
    assert len(found) == 3 and found[0]['seq'] + 2 == found[2]['seq']
    with started(host, 'events', '-f', '--json', '-n', '1') as process:
        process.stdout.readline()
        another = verb(host, 'run', '-d', 'one', '--', 'true').strip()
        assert any(json.loads(line.decode())['cmdId'] == another for line in process.stdout)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT and process.stderr.read() == b''


def test_events_that_no_single_call_tells(tmp_path):
    def tell(after, timeout=0):
        begin = 2500 + after if after < 0 else after
        told = [{'seq': seq, 'time': 0.0, 'type': 'x', 'vm': '', 'cmdId': '', 'text': str(seq)}
                for seq in range(begin + 1, min(begin + 1000, 2500) + 1)]
        return {'last': told[-1]['seq'] if told else begin, 'events': told}
    with PlayedHost(tmp_path, {'getEvents': tell}) as host:
        for number in (2500, 1500, 2, 0):
            code, out, errors = host.verb('events', '--json', '-n', str(number))
            assert (code, errors, [event['seq'] for event in json.loads(out)]) == (
                0, '', list(range(2501 - number, 2501))), number
        assert [line.split()[-1] for line in host.verb('events', '-n', '1001')[1].splitlines()] == [
            str(number) for number in range(1500, 2501)]


@pytest.mark.parametrize('words', [['events', '-n', '-1'], ['ps', '-n', '-5'], ['out', '-n', '-3', 'x'],
                                   ['events', '-n', 'all']])
def test_how_many_is_no_number_below_0(tmp_path, words):
    with PlayedHost(tmp_path, {}) as host:
        code, _, errors = host.verb(*words)
        assert code == 2 and 'expected a whole number, from 0 on' in errors, errors


def test_call(host, guests):
    assert json.loads(verb(host, 'call', 'ping', 'one')) == 'PONG from one'
    assert verb(host, 'call', '-r', 'ping', '"one"', '5.5') == 'PONG from one\n'
    assert json.loads(verb(host, 'call', 'listCmds', '{"vm": "nobody"}')) == []
    assert json.loads(verb(host, 'call', 'listCmds', '{"since": 5000000000}')) == []
    assert verb(host, 'run', 'one', '--', 'printf', 'a\rb') == 'a\rb'
    assert b'is not valid JSON' in host.verb('call', 'listCmds', '{vm: 1}').stderr
    assert b'no method' in host.verb('call', '__init__').stderr


def test_check_of_a_running_host(host, guests):
    found = {line['what']: line for line in json.loads(verb(host, 'check', '--json'))}
    assert found['guest one, %s' % agent.VERSION]['ok']
    assert all(line['ok'] for line in found.values())
    assert '✓  guest two' in verb(host, 'check', env=dict(os.environ, PYTHONIOENCODING='utf-8'))
    assert 'ok guest two' in verb(host, 'check', env=dict(os.environ, PYTHONIOENCODING='ascii'))


def test_check_tells_what_keeps_the_agent_from_its_start(tmp_path):
    def problems(code, *sections):
        text = '[Hypervisor]\nhypervisor = none\n[Broker]\nport = 0\n' + '\n'.join(sections)
        (tmp_path / 'host.ini').write_text(text)
        done = subprocess.run([sys.executable, SCRIPT, str(tmp_path / 'host.ini'), 'check'],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.returncode == code, done
        return [line for line in (done.stdout + done.stderr).decode().splitlines()
                if not line.startswith(('✓', 'ok', '!  host agent', '-- host agent'))]
    host = '[Host]\nxmlrpc_port = 0\n'
    assert problems(0, host) == problems(0, host, '[Logging]\nfile = new.log') == []
    assert not (tmp_path / 'new.log').exists()
    assert 'none/a.log' in problems(1, host, '[Logging]\nfile = none/a.log')[0]
    assert 'none.ini' in problems(1, host, '[Logging]\nconfig = none.ini')[0]
    assert 'anybody on 0.0.0.0' in problems(1, host + 'xmlrpc_listen_on = 0.0.0.0\nxmlrpc_auth = no')[0]
    assert 'commands every VM' in problems(0, host + 'xmlrpc_listen_on = 0.0.0.0')[0]
    assert problems(1, host + 'state_dir =')[0].endswith('[Host] state_dir = : expected a path')


def test_what_check_says_of_who_is_lost_and_who_has_left():
    gone = {'name': 'g', 'agent': 'lost', 'left': False, 'lastSeen': time.time() - 60}
    assert re.match('lost: nothing was heard for 6. s. Is it switched off', hostcheck.check_absent(gone).mend)
    assert hostcheck.check_absent(dict(gone, left=True)).mend.startswith('left: ')


@pytest.mark.once
@pytest.mark.parametrize('folder', ['host', 'by-tcp-' + 'x' * 60])      # no Unix socket has such a path
def test_check_of_machines_that_are_lost_and_of_a_host_that_hangs(folder, tmp_path):
    with Host(tmp_path / folder) as host:
        with Agent(tmp_path / 'guest', host, 'gone'):
            verb(host, 'run', 'gone', 'true')
        wait_until(lambda: 'left' in verb(host, 'ls'), 60)
        assert re.search('^state +unknown$', verb(host, 'info', 'gone'), re.MULTILINE)
        assert b'`run --queue`' in host.verb('run', 'gone', 'true').stderr
        text = verb(host, 'check')
        assert re.search('guest gone: left: nothing was heard for .*agent to be started.*`forget gone`', text)
        os.kill(host.process.pid, signal.SIGSTOP)
        try:
            assert 'it hangs, or was stopped' in verb(host, 'check', code=1)
        finally:
            os.kill(host.process.pid, signal.SIGCONT)


# --- VMs and files: what the host does is played here, what the user sees is real ---

TOKEN = 'token/with:signs'


class Handler(xmlrpc.server.SimpleXMLRPCRequestHandler):
    """Proves that it knows the token, as the host does where there is no Unix socket."""

    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        address = '%s:%d' % self.server.server_address
        said = hostclient.proof(TOKEN, address, self.path.partition('/proof?nonce=')[2]).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def do_POST(self):
        assert self.headers['Authorization'] == 'Bearer ' + TOKEN
        super().do_POST()


class Server(socketserver.ThreadingMixIn, xmlrpc.server.SimpleXMLRPCServer):
    """A thread for each connection, as the host has."""
    daemon_threads = True


class PlayedHost:
    """An XML-RPC server that answers as the host would, and notes how it was called."""

    def __init__(self, folder, answers):
        self.calls = []
        self._answers = answers
        self._server = Server(('127.0.0.1', 0), Handler, logRequests=False, allow_none=True)
        self._server.register_multicall_functions()
        self._server.register_instance(self)
        state = folder / 'vmhost-state'
        state.mkdir()
        (state / 'xmlrpc.address').write_text('127.0.0.1:%d' % self._server.server_address[1])
        (state / 'xmlrpc.token').write_text(TOKEN)
        (folder / 'host.ini').write_text('')
        self.command = [sys.executable, SCRIPT, str(folder / 'host.ini')]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def _dispatch(self, method, params):
        self.calls.append((method,) + params)
        answer = self._answers[method]
        answer = answer(*params) if callable(answer) else answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def verb(self, *words):
        done = subprocess.run(self.command + list(words), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return done.returncode, done.stdout.decode(), done.stderr.decode()


VM_ANSWERS = {
    'listVMs': ['web 1', 'web 2', 'db'], 'listKnownVMs': ['web 1', 'web 2', 'db'],
    'listRegisteredVMs': [], 'getNamesToIdsMapping': {'web 1': 'a'},
    'start': True, 'shutdown': True, 'powerOff': True, 'pause': True, 'resume': True, 'saveState': True,
    'reset': lambda vm: True if vm != 'web 1' else xmlrpc.client.Fault(4, 'it is off'), 'removeVM': True,
    'takeSnapshot': True, 'restoreSnapshot': True, 'deleteSnapshot': True, 'listSnapshots': ['fresh'],
    'createVM': lambda name, image, options: [True, name],
    'remoteDesktop': {'address': '127.0.0.1', 'port': 5000, 'auth': 'external', 'security': 'TLS'},
    'getNetwork': {'mode': 'nat', 'dhcp': {'enabled': False}}, 'setupNetwork': {'mode': 'nat'},
    'cleanup': [{'kind': 'disk', 'name': 'x', 'why': 'unused'},
                {'kind': 'kept', 'name': 'y', 'why': 'unread'}],
    'getVM': lambda vm: {'name': vm}, 'discardState': True, 'keepVM': True,
    'agentInfo': {'trouble': 'told as it was before', 'jobs': [], 'broker': {'address': ''}},
    'getEvents': {'last': 5, 'events': [{'type': 'disk-kept', 'vm': 'db', 'text': '/d.vdi: needed by web'}]},
    'getStatusLink': 'http://127.0.0.1/status?key=k'}


@pytest.mark.parametrize('words, said, called', [
    (['start', 'db', '--gui'], 'db is running\n', ('start', 'db', True)),
    (['stop', 'db'], 'db is off\n', ('shutdown', 'db')),
    (['stop', '--force', 'web*'], 'web 1 is off\nweb 2 is off\n', ('powerOff', 'web 2')),
    (['pause', 'db'], 'db is paused\n', ('pause', 'db')),
    (['resume', 'db'], 'db is running\n', ('resume', 'db')),
    (['save', 'db'], 'db is saved\n', ('saveState', 'db')),
    (['rm', 'db', '--disks'], 'db removed\nkept /d.vdi: needed by web\n', ('getEvents', 5)),
    (['discard', 'db'], 'db is off\n', ('discardState', 'db')),
    (['keep', 'db', '--off'], 'db is not kept any more\n', ('keepVM', 'db', False)),
    (['snap', 'ls', 'db'], 'fresh\n', ('listSnapshots', 'db')),
    (['snap', 'ls', 'db', '--json'], '[\n  "fresh"\n]\n', ('listSnapshots', 'db')),
    (['snap', 'take', 'db', 'new'], 'snapshot taken\n', ('takeSnapshot', 'db', 'new')),
    (['snap', 'restore', 'db'], 'snapshot restored\n', ('restoreSnapshot', 'db', '')),
    (['snap', 'rm', 'db', 'new'], 'snapshot deleted\n', ('deleteSnapshot', 'db', 'new')),
    (['create', 'n', '/i.ova', '--memory', '512'], 'n\n', ('createVM', 'n', '/i.ova', {'memory': 512})),
    (['create', 'n', '/i.vdi', '--forward', '2222:22', '--forward', '80'], 'n\n',
     ('createVM', 'n', '/i.vdi', {'forwards': [{'guestPort': 22, 'hostPort': 2222},
                                               {'guestPort': 80, 'hostPort': 0}]})),
    (['create', '/v/n.vbox'], '/v/n.vbox\n', ('createVM', '/v/n.vbox', '', {})),
    (['rdp', 'db'], '127.0.0.1:5000 (authentication external, security TLS)\n',
     ('remoteDesktop', 'db', True)),
    (['rdp', 'db', '--off'], 'off\n', ('remoteDesktop', 'db', False)),
    (['net'], 'mode  nat\ndhcp\n    enabled  False\n', ('getNetwork',)),
    (['net', '--setup', '--json'], '{\n  "mode": "nat"\n}\n', ('setupNetwork',)),
    (['cleanup'], 'would remove disk x (unused)\nkept y (unread)\n', ('cleanup', True, [])),
    (['cleanup', '--yes', '--vms', 'a', 'b'], 'removed disk x (unused)\nkept y (unread)\n',
     ('cleanup', False, ['a', 'b'])),
    (['cleanup', '--vms', 'a', '--vms', 'b', 'c'], 'would remove disk x (unused)\nkept y (unread)\n',
     ('cleanup', True, ['a', 'b', 'c'])),
    (['status', '--open'], 'http://127.0.0.1/status?key=k\n', ('getStatusLink',))])
def test_verbs_of_vms(words, said, called, tmp_path, monkeypatch):
    monkeypatch.setenv('BROWSER', 'true')
    with PlayedHost(tmp_path, VM_ANSWERS) as host:
        code, out, err = host.verb(*words)
        assert (code, out) == (0, said), err
        assert [call for call in host.calls if call != ('agentInfo',)][-1] == called
        assert ('told as it was before' in err) is (words[0] == 'net' or words[:2] == ['snap', 'ls'])


@pytest.mark.once
@pytest.mark.parametrize('ports', ['', 'http', '1:2:3', ':80', '80:', '-1:80', '1234567'])
def test_ports_that_are_none_are_said_as_they_are_typed(ports, tmp_path):
    with PlayedHost(tmp_path, VM_ANSWERS) as host:
        code, _, err = host.verb('create', 'n', '/i.vdi', '--forward=' + ports)
        assert code == 2 and 'expected 8080:80, or 80' in err and host.calls == []


def test_ls_asks_as_often_for_many_vms_as_for_one(tmp_path):
    vms = [{'name': 'web%d' % number, 'id': '', 'state': 'PoweredOff', 'agent': 'never', 'ip': '',
            'lastSeen': 0, 'clockOffset': 0, 'facts': {}, 'commands': [],
            'trouble': 'its disk is missing' if number == 120 else ''} for number in range(121)]
    with PlayedHost(tmp_path, dict(VM_ANSWERS, getVMs=vms, agentInfo={'jobs': []})) as host:
        lines = host.verb('ls')[1].splitlines()
        assert len(lines) == 1 + 121 + 1 and lines[1].startswith('web120 ')
        assert lines[-1] == 'web120: its disk is missing'
        assert host.verb('ls', '--json', 'web1?')[1].count('"name"') == 10
        assert host.verb('ls', '-q', 'web7')[1] == 'web7\n'
        assert host.calls == 3 * [('getVMs',), ('agentInfo',)]     # nobody is asked for one of them alone


def test_names_are_in_the_order_in_which_people_count(tmp_path):
    names = ['lab10', 'lab2b', 'LAB3', 'lab4', '7', 'lab04', 'lab', '10', 'lab' + 5000 * '9', 'lab2', 'lab²']
    counted = ['7', '10', 'LAB3', 'lab', 'lab2', 'lab2b', 'lab04', 'lab4', 'lab10', names[8], 'lab²']
    assert sorted(names, key=agent.in_order) == counted
    vms = [{'name': name, 'trouble': '', 'agent': 'alive'} for name in names]
    answers = dict(VM_ANSWERS, getVMs=vms, agentInfo={'jobs': []}, listVMs=names)
    with PlayedHost(tmp_path, answers) as host:
        assert host.verb('ls', '-q')[1].split() == counted
        assert [line.split()[0] for line in host.verb('pause', '*')[1].splitlines()] == counted
    codes = {name: (1, 'exited 1') for name in ('lab10', 'lab9')}
    assert clicommands.summary(codes, []) == 'lab9 exited 1, lab10 exited 1'


def test_a_vm_that_refuses_does_not_hold_up_the_others(tmp_path):
    with PlayedHost(tmp_path, VM_ANSWERS) as host:
        assert host.verb('reset', 'web*') == (1, 'web 2 is reset\n', 'vmhost: web 1: it is off\n')
        assert host.verb('reset', 'nobody*')[0] == 1
        assert 'no snapshot named' in host.verb('snap', 'take', 'db')[2]


def moved(state, done):
    return {'state': state, 'bytes': done, 'total': 4 * 2 ** 20, 'rate': 2.0 ** 20,
            'error': 'torn' if state == 'failed' else ''}


AS_CP = {'links': 'keep', 'parents': False}


def test_put_and_get(tmp_path):
    steps = [moved('waiting', 0), moved('running', 2 ** 20), moved('done', 2 ** 22)]
    answers = dict(VM_ANSWERS, startTransfer='t', getTransfer=lambda id: steps.pop(0))
    with PlayedHost(tmp_path, answers) as host:
        assert host.verb('put', 'db', str(tmp_path / 'in')) == (0, '', '')
        assert host.calls[-4] == ('startTransfer', 'put', 'db', str(tmp_path / 'in'), 'in', AS_CP)
        steps[:] = [moved('failed', 0)]
        assert host.verb('get', 'db', 'a/b', str(tmp_path)) == (1, '', 'vmhost: db: torn\n')
        assert host.calls[-2] == ('startTransfer', 'get', 'db', 'a/b', str(tmp_path), AS_CP)
        lost = [{'path': '/tree/%d' % index, 'what': 'its mode'} for index in range(3)]
        steps[:] = [dict(moved('done', 9), unkept=lost)]
        code, out, errors = host.verb('get', 'db', 'tree', str(tmp_path))
        assert (code, out) == (0, '') and '/tree/0 came without its mode, and 2 more' in errors


def test_a_transfer_whose_host_agent_ends_is_told_to_have_been_cut():
    def call(method, *args):
        if method == 'startTransfer':
            return 't'
        raise hostclient.NoHost('no host agent answers')
    told = []
    screen = types.SimpleNamespace(complain=told.append, progress=lambda text: None)
    with pytest.raises(hostclient.NoHost):
        clifiles.transfer(types.SimpleNamespace(call=call), screen, types.SimpleNamespace(links='keep'),
                          'put', 'db', 'in', 'in')
    assert told == ['db: the host agent ended while the transfer went on; once it is back, the same again '
                    'goes on from where it was']


def test_a_transfer_shows_its_progress_and_ctrl_c_cancels_it(tmp_path):
    answers = dict(VM_ANSWERS, startTransfer='t', getTransfer=moved('running', 2 ** 20), cancelTransfer=True)
    with PlayedHost(tmp_path, answers) as host:
        terminal = Terminal(host.command + ['put', 'db', 'in'])
        wait_until(lambda: b'db: 1.0 MiB of 4.0 MiB, 1.0 MiB/s, 3 s left' in terminal.written, 20)
        terminal.type(b'\x03')
        code, text = terminal.wait()
        assert code == 130 and 'vmhost: db: cancelled at 1.0 MiB of 4.0 MiB; the same again goes on' in text
        assert ('cancelTransfer', 't') in host.calls


def test_the_content_of_a_file_has_standard_output_for_itself(tmp_path):
    with PlayedHost(tmp_path, dict(VM_ANSWERS)) as host:
        code, out, errors = host.verb('get', 'db', 'out', '-', '--json')
        assert (code, out) == (1, '') and 'standard output gets the file' in errors


@pytest.mark.skipif(os.name == 'nt', reason='Windows ends a process without a word')
@pytest.mark.parametrize('number', ['SIGTERM', 'SIGHUP'])
@pytest.mark.parametrize('words', [['put', 'db', 'in'], ['get', 'db', 'out', '.'], ['get', 'db', 'out', '-']])
def test_a_transfer_ends_with_who_asked_for_it(tmp_path, words, number):
    answers = dict(VM_ANSWERS, startTransfer='t', getTransfer=moved('running', 2 ** 20), cancelTransfer=True)
    with PlayedHost(tmp_path, answers) as host:
        process = subprocess.Popen(                    # also where the tests themselves run under nohup
            host.command + words, cwd=str(tmp_path), stdout=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
        wait_until(lambda: ('getTransfer', 't') in host.calls, 20)
        process.send_signal(getattr(signal, number))
        assert process.wait(20) == 128 + getattr(signal, number)
        assert ('cancelTransfer', 't') in host.calls


def test_a_long_call_shows_how_far_the_hypervisor_is(tmp_path):
    seen = threading.Event()

    def look():
        seen.set()
        return {'jobs': [{'verb': 'take_snapshot', 'vm': 'db', 'percent': 25, 'text': 'saving'}]}
    answers = dict(VM_ANSWERS, agentInfo=look, takeSnapshot=lambda *_: seen.wait(20))
    with PlayedHost(tmp_path, answers) as host:
        code, text = Terminal(host.command + ['snap', 'take', 'db', 'new']).wait()
        assert code == 0 and re.search('db: .* s, 25 %, .* s left saving', text) and 'snapshot taken' in text


def test_ctrl_c_leaves_the_hypervisor_to_its_work(tmp_path):
    over = threading.Event()
    answers = dict(VM_ANSWERS, agentInfo={'jobs': []}, saveState=lambda vm: over.wait(20))
    with PlayedHost(tmp_path, answers) as host:
        terminal = Terminal(host.command + ['save', 'db'])
        wait_until(lambda: b'db: ' in terminal.written, 20)
        terminal.type(b'\x03')
        code, text = terminal.wait()
        over.set()
    assert code == 130
    assert text.splitlines()[-1] == 'vmhost: db: the host agent continues; `ls` shows the progress'


# --- people and terminals ---

def test_help_tells_of_every_verb(capsys):
    done = subprocess.run([sys.executable, SCRIPT, '--help'], stdout=subprocess.PIPE)
    text = done.stdout.decode()
    for name in hostcli.VERBS:
        assert re.search('^  %s ' % name, text, re.MULTILINE)
        with pytest.raises(SystemExit) as ended:
            hostcli.main(['host.ini', name, '--help'])
        assert not ended.value.code and 'exit codes:' in capsys.readouterr().out
    assert 'exit codes:' in text and done.returncode == 0


@pytest.mark.parametrize('words, said', [
    (('no.such',), 'unknown verb'), (('host.ini', 'pss'), 'did you mean ps?'),
    (('--no',), '--no'),
    (('host.ini', 'ls', '--jason'), '--jason'), (('--completion', 'csh'), 'bash|zsh|fish')])
def test_wrong_usage_is_2(words, said, tmp_path):
    done = subprocess.run([sys.executable, SCRIPT] + list(words), stderr=subprocess.PIPE, cwd=str(tmp_path))
    assert done.returncode == 2 and said in done.stderr.decode()


def test_tables_fit_the_terminal_and_have_colours_there_alone(host, guests):
    verb(host, 'run', 'one', '--', 'echo', 'x' * 300)
    verb(host, 'run', 'one', '--', 'false', code=1)
    words = [sys.executable, SCRIPT, host.ini, 'ps']
    code, text = Terminal(words, 70).wait()
    plain = re.sub('\x1b\\[[0-9]*m', '', text)
    assert code == 0 and '\x1b[' in text and max(map(len, plain.splitlines())) <= 70
    assert '\x1b[' not in Terminal(words, 70, NO_COLOR='1').wait()[1]
    piped = verb(host, 'ps')
    assert '\x1b[' not in piped and 'x' * 300 in piped


def test_what_a_guest_says_cannot_drive_the_terminal(host, guests):
    verb(host, 'run', 'one', '--', 'echo', '\u202eevil\u2028')
    assert '\\u202eevil\\u2028' in verb(host, 'ps', env=dict(os.environ, PYTHONIOENCODING='utf-8'))


@posix_host
def test_names_in_any_locale(host, tmp_path):
    with Agent(tmp_path, host, 'id-3', name='Zwölf Äpfel'):
        for locale in ('C', 'C.UTF-8'):
            environment = dict(os.environ, LC_ALL=locale, PYTHONCOERCECLOCALE='0', PYTHONUTF8='0')
            assert verb(host, 'run', 'Zwölf Äpfel', '--', 'printf', 'ü', env=environment) == 'ü'
            assert json.loads(verb(host, 'info', 'Zwölf Äpfel', '--json', env=environment))['id'] == 'id-3'
            assert verb(host, 'ls', env=environment)


# --- hints ---

@pytest.mark.parametrize('program, words, on_windows, said', [
    ('vmhost.py', ['/root/.pyenv/versions/3.11.7/bin/python3', 'vmhost.py'], False, 'python3 vmhost.py'),
    ('vmhost.py', ['python3', 'vmhost.py', 'host.ini', 'ls'], False, 'python3 vmhost.py'),
    ('vmhost.py', [], False, 'python3 vmhost.py'),
    ('../vmhost.py', ['.venv/bin/python', '../vmhost.py'], False, '.venv/bin/python ../vmhost.py'),
    ('/opt/my vms/vmhost.pyz', ['python3.6', '/opt/my vms/vmhost.pyz'], False,
     'python3.6 "/opt/my vms/vmhost.pyz"'),
    ('/usr/bin/vmhost', ['/usr/bin/python3', '/usr/bin/vmhost', 'ls'], False, 'vmhost'),
    ('/no/path/vmhost', ['/usr/bin/python3', '/no/path/vmhost', 'ls'], False, '/no/path/vmhost'),
    ('/lib/vmhost.py', ['python3', '-m', 'vmhost', 'ls'], False, 'python3 -m vmhost'),
    ('vmhost.pyz', ['C:\\Python313\\python.exe', 'vmhost.pyz'], True, 'py vmhost.pyz'),
    ('vmhost.py', ['.venv\\Scripts\\python', 'vmhost.py'], True, '.venv\\Scripts\\python vmhost.py'),
    ('vmhost.py', [], True, 'py vmhost.py'),
    ('vmhost.exe', ['vmhost.exe', 'ls'], True, 'vmhost')])
def test_hints_name_the_program_as_it_was_called(program, words, on_windows, said, monkeypatch):
    monkeypatch.setenv('PATH', '/bin:/usr/bin')
    assert hostclient.called(program, words, on_windows, False) == said
    venv = ['/srv/.venv/bin/python', 'vmhost.py']
    assert hostclient.called('vmhost.py', venv, False, True) == '/srv/.venv/bin/python vmhost.py'


@pytest.mark.once
@pytest.mark.parametrize('before, start', [
    (['mine.ini'], ' mine.ini'), ([], ''), ([''], ' ""')])
def test_who_has_no_host_agent_is_told_how_to_start_it_as_they_called_it(before, start, tmp_path):
    for name in ('mine.ini', 'host.ini'):
        (tmp_path / name).write_text('[Host]\nstate_dir = state\n')
    script = os.path.relpath(SCRIPT, str(tmp_path))
    environment = dict(os.environ, HOME=str(tmp_path), XDG_STATE_HOME=str(tmp_path))
    done = subprocess.run([sys.executable, script] + before + ['ls'], cwd=str(tmp_path), env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    python = sys.executable if hasattr(sys, 'orig_argv') else 'python3'
    if sys.prefix == sys.base_prefix:
        python = os.path.basename(python)
    said = done.stderr.decode()
    assert done.returncode == 1 and 'start it with `%s %s%s`' % (python, script, start) in said, said
    done = subprocess.run([sys.executable, script] + before + ['lst'], cwd=str(tmp_path), env=environment,
                          stderr=subprocess.PIPE)
    assert '`%s %s --help` lists them' % (python, script) in done.stderr.decode()
    environment['VMHOST_CALLED'] = 'vmhost'
    done = subprocess.run([sys.executable, script] + before + ['ls'], cwd=str(tmp_path), env=environment,
                          stderr=subprocess.PIPE)
    assert 'start it with `vmhost`' in done.stderr.decode()


# --- completion ---

def test_candidates(host, guests, tmp_path, monkeypatch):
    def completed(*words):
        return clicomplete.candidates([host.ini] + list(words), hostcli.VERBS)
    assert completed('p') == ['pause', 'ping', 'ps', 'put']
    for typed, found in (('log', ['logs']), ('ins', ['inspect']), ('', list(hostcli.VERBS))):
        assert clicomplete.candidates([host.ini, typed], hostcli.VERBS, hostcli.ALIASES) == found
    assert completed('run', '') == ['one', 'two']
    assert completed('run', '-T', '5', 't') == ['two']
    assert completed('run', '-T', '') == []
    assert completed('run', 'one', '--', 'o') == []
    assert completed('run', '--ti') == ['--timeout']
    assert completed('snap', 't') == ['take']
    assert completed('snap', 'take', 'o') == ['one']
    assert completed('kill', '-s', 'KI') == ['KILL']
    assert completed('call', 'getCmdS') == ['getCmdStatus']
    assert completed('ls', '') == ['one', 'two'] == completed('ps', 'one', '')
    assert completed('put', '--links', '') == ['keep', 'skip', 'follow']
    assert completed('put', '--links', 'keep', 't') == ['two']
    assert clicomplete.candidates(['--completion', 'z'], hostcli.VERBS) == ['zsh']
    assert clicomplete.candidates(['/nowhere.ini', 'info', ''], hostcli.VERBS) == []
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'lab.ini').write_text('')
    assert clicomplete.candidates([''], hostcli.VERBS) == ['lab.ini'] + list(hostcli.VERBS)
    cmd_id = verb(host, 'run', '-d', 'one', '--', 'true').strip()
    verb(host, 'wait', cmd_id)
    assert cmd_id in completed('out', cmd_id[:9])
    assert cmd_id not in completed('kill', cmd_id[:9]) + completed('shell', 'one', '')
    for words in (['exec', 'o'], [host.ini, 'exec', 'o']):
        assert hostcli.by_own_name(words) == words[:-2] + ['run', 'o']


def test_paths_in_a_vm_are_completed_there(host, guests, tmp_path, monkeypatch):
    def completed(*words):
        return clicomplete.candidates([host.ini] + list(words), hostcli.VERBS)
    os.makedirs(os.path.join(guests[0].files, 'results', 'deep'))
    for name in ('results/one file', 'results/.hidden'):
        open(os.path.join(guests[0].files, name), 'w').close()
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'results.here').write_text('')
    assert completed('cp', 'one:res') == ['one:results/']
    assert completed('cp', 'a', 'one:results/') == ['one:results/deep/', 'one:results/one file']
    assert completed('get', 'one', 'results/.') == ['results/.hidden']
    assert completed('put', 'one', 'a', 'results/d') == ['results/deep/']
    assert completed('put', 'one', 'res') == completed('get', 'one', 'a', 'res') == []     # of this machine
    assert completed('cp', 'res') == completed('cp', 'nobody:res') == []
    assert completed('cp', 'one', ':', 'res') == ['results/']          # as bash has it
    assert completed('cp', 'one', ':', 'a', 'one', ':') == [
        name for name in completed('put', 'one', 'a', '') if not name.startswith('.')]


def test_a_shell_that_one_comes_back_to_is_of_its_machine(host, guests):
    ids = [verb(host, 'run', '-d', name, '--', 'sleep', '99').strip() for name in ('one', 'two')]
    try:
        for name, cmd_id in zip(('one', 'two'), ids):
            found = clicomplete.candidates([host.ini, 'shell', name, ''], hostcli.VERBS)
            assert [each for each in found if each in ids] == [cmd_id]
    finally:
        verb(host, 'kill', *ids)


def test_bash_completes(host, guests, tmp_path):
    script = subprocess.check_output([sys.executable, SCRIPT, '--completion', 'bash'])
    (tmp_path / 'completion').write_bytes(script)
    for before in ('python3 ./vmhost.py', 'vmhost.pyz'):
        words = before.split() + [host.ini, 'run', 't']
        asked = ('. ./completion; COMP_WORDS=(%s); COMP_CWORD=%d; _vmhost; printf "%%s\\n" "${COMPREPLY[@]}"'
                 % (' '.join(words), len(words) - 1))
        assert subprocess.check_output(['bash', '-c', asked], cwd=str(tmp_path)) == b'two\n'


def test_fish_completes(host, guests, tmp_path):
    if shutil.which('fish') is None:
        pytest.skip('no fish here')
    script = subprocess.check_output([sys.executable, SCRIPT, '--completion', 'fish'])
    (tmp_path / 'completion').write_bytes(script)
    for program in ('python3 ./vmhost.py', 'vmhost.pyz'):
        asked = 'source completion; complete -C "%s %s run t"' % (program, host.ini)
        done = subprocess.check_output(['fish', '--no-config', '-c', asked], cwd=str(tmp_path))
        assert done == b'two\n'


def test_zsh_completes(host, guests, tmp_path):
    if shutil.which('zsh') is None:
        pytest.skip('no zsh here')
    script = subprocess.check_output([sys.executable, SCRIPT, '--completion', 'zsh'])
    (tmp_path / 'completion').write_bytes(script)
    asked = ('compdef() { :; }; compadd() { print -l -- ${(P)2}; }; . ./completion; '
             'words=(vmhost.py %s run t); CURRENT=4; _vmhost' % host.ini)
    assert subprocess.check_output(['zsh', '-f', '-c', asked], cwd=str(tmp_path)) == b'two\n'


# --- logs ---

def test_a_commands_life_is_in_both_logs(host, guests):
    cmd_id = verb(host, 'run', '-d', 'one', '--', 'sleep', '66').strip()
    wait_until(lambda: cmd_id + ': running' in host.log(), 20)
    verb(host, 'kill', cmd_id)
    verb(host, 'call', 'waitCmd', cmd_id)
    verb(host, 'call', 'forgetCmd', cmd_id)

    def life(log):
        return re.findall('INFO vm[a-z]+: %s: (.*)' % cmd_id, log)
    who = 'vmhost@127.0.0.1' if ON_WINDOWS else 'uid %d' % os.getuid()     # by TCP, or by the Unix socket
    assert life(host.log()) == ['asked for on one by ' + who,
                                'running', 'signal TERM', 'on one signaled 15', 'forgotten']
    wait_until(lambda: len(life(guests[0].log())) == 5, 20)
    assert life(guests[0].log()) == ['asked for', 'signal 15', 'signaled', 'acknowledged',
                                     'its files are deleted']


def test_one_honest_line_at_start(host):
    pid, state = str(host.process.pid), host.state
    if ON_WINDOWS:             # which counts processes by itself
        pid, state = re.search(r'pid (\d+)', host.log()).group(1), wine.path_there(state)
    said = ('vmhost %s started, pid %s: XML-RPC on %s, broker on 127.0.0.1:%d, hypervisor none, '
            'state in %s') % (agent.VERSION, pid, host.address, host.broker_port, state)
    assert host.log().count('INFO vmhost: ' + said) == 1


LOGGING_INI = """
[loggers]\nkeys = root
[handlers]\nkeys = all
[formatters]\nkeys = own
[logger_root]\nlevel = INFO\nhandlers = all
[formatter_own]\nformat = OWN %(message)s
[handler_all]\nclass = FileHandler\nformatter = own\nargs = ('own.log',)
"""


@pytest.mark.parametrize('keys, log, said', [
    ('level = DEBUG\nfile = my.log', 'my.log', ' DEBUG '),
    ('config = logging.ini', 'own.log', 'OWN vmhost ')])
def test_the_log_is_where_and_what_the_ini_says(keys, log, said, tmp_path):
    (tmp_path / 'logging.ini').write_text(LOGGING_INI)
    ini, log = tmp_path / 'host.ini', tmp_path / log
    ini.write_text('[Broker]\nport = 0\n[Host]\nxmlrpc_port = 0\n[Hypervisor]\nhypervisor = none\n'
                   '[Logging]\n' + keys)
    process = subprocess.Popen([sys.executable, SCRIPT, str(ini)], cwd=str(tmp_path), stderr=subprocess.PIPE)
    wait_until(lambda: log.exists() and 'started, pid' in log.read_text(), 20)
    process.terminate()
    assert process.communicate(timeout=20) == (None, b'')
    assert said in log.read_text()


# --- one file ---

def other_pythons():
    """The oldest and the newest Python 3 that pyenv has here; else this one."""
    found = glob.glob(os.path.expanduser('~/.pyenv/versions/3.*/bin/python'))
    found.sort(key=lambda path: [int(part) for part in re.findall('[0-9]+', path)])
    return found[:1] + found[-1:] or [sys.executable]


@pytest.mark.once
@pytest.mark.parametrize('program', ['vmhost', 'vmguest'])
def test_the_bundle_makes_itself_again_on_every_python(program, tmp_path):
    first = tmp_path / 'any-name'
    subprocess.check_call([sys.executable, os.path.join(TOP, program + '.py'), '--bundle', str(first)])
    assert os.access(str(first), os.X_OK)
    for python in other_pythons():
        alone = [python, '-I', '-S', str(first)]
        said = subprocess.check_output(alone + ['--version']).decode()
        assert said == '%s %s\n' % (program, agent.VERSION)
        subprocess.check_call(alone + ['--bundle', 'again'], cwd=str(tmp_path))
        assert (tmp_path / 'again').read_bytes() == first.read_bytes()


COUNT_COMPILED = """
import builtins, collections, json, os, runpy, sys
compile, compiled = builtins.compile, collections.Counter()

def counting(source, filename, *rest, **options):
    if '.pyz' in str(filename):
        compiled[os.path.basename(filename)] += 1
    return compile(source, filename, *rest, **options)

builtins.compile = counting
sys.argv[1:] = ['--help']
try:
    runpy.run_path('bundle.pyz', run_name='__main__')
finally:
    os.chdir('/')                               # what is imported later is found from there, too
    import chirpwire
    print(json.dumps(compiled))
"""


@pytest.mark.parametrize('program', ['vmhost', 'vmguest'])
def test_a_bundle_compiles_each_module_once(program, tmp_path):
    """That is most of the time of its start, all the more in a guest that is emulated."""
    subprocess.check_call([sys.executable, os.path.join(TOP, program + '.py'), '--bundle',
                           str(tmp_path / 'bundle.pyz')])
    run = subprocess.run([sys.executable, '-I', '-S', '-c', COUNT_COMPILED], cwd=str(tmp_path),
                         stdout=subprocess.PIPE, check=True)
    compiled = json.loads(run.stdout.decode().splitlines()[-1])
    with zipfile.ZipFile(str(tmp_path / 'bundle.pyz')) as bundle:
        ours = {name: compiled[name] for name in bundle.namelist()
                if name in compiled and name != '__main__.py'}
    assert {'agent.py', program + '.py'} <= set(ours)
    assert set(ours.values()) == {1}, ours


@pytest.mark.once
def test_two_bundles_and_two_ini_files_are_enough(tmp_path):
    for program in ('vmhost', 'vmguest'):
        subprocess.check_call([sys.executable, os.path.join(TOP, program + '.py'), '--bundle',
                               str(tmp_path / program)])
    (tmp_path / 'host.ini').write_text('[Broker]\nport = 0\n[Host]\nxmlrpc_port = 0\n'
                                       '[Hypervisor]\nhypervisor = none\n')
    alone = [other_pythons()[0], '-I', '-S']
    environment = {'PATH': os.environ['PATH'], 'HOME': str(tmp_path)}

    def begin(*words):
        return subprocess.Popen(alone + list(words), cwd=str(tmp_path), env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    host, guest = begin('vmhost', 'host.ini'), None
    try:
        said = next(line.decode() for line in host.stdout if b'broker on' in line)
        port = re.search('broker on [^:]+:([0-9]+)', said).group(1)
        (tmp_path / 'guest.ini').write_text('[Broker]\nport = %s\nhost = 127.0.0.1\n[VM]\nid = g\n'
                                             'state_dir = state\n' % port)
        guest = begin('vmguest', 'guest.ini')
        assert any(b'joined the host' in line for line in guest.stdout)
        out = subprocess.check_output(alone + ['vmhost', 'host.ini', 'run', 'g', '--', 'echo', 'hello'],
                                      cwd=str(tmp_path), env=environment)
        assert out == b'hello\n'
    finally:
        for process in filter(None, (guest, host)):
            process.terminate()
            process.stdout.read()
            process.stdout.close()
            assert process.wait(20) == 0
