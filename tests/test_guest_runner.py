"""Programs as the guest's runners start, watch, measure and end them: a fork server and folders, no host."""

import base64
import errno
import json
import os
import pwd
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
from agents import TOP
from helpers import let_others_in, others_take, wait_until

import guestcgroup
import guestforks
import guestprocesses
import guestrequests
import guestrunner
import guestspool
import gueststart
from protocol import Message

pytestmark = pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='needs /proc')
AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason='needs root')
DEFAULTS = type('Defaults', (), {'kill_after': 0.5, 'output_limit': 10 ** 6, 'inline_output': 65536})


class Runners:
    """A fork server with commands in folders below ``root``."""

    def __init__(self, root):
        self.root = str(root)
        self.served = os.path.join(self.root, 'served')
        os.mkdir(self.served)
        self.count = 0
        self.forks = guestforks.ForkServer()

    def begin(self, cmd, *args, **options):
        """A command that was given to a runner."""
        self.count += 1
        command = guestspool.Command('c', os.path.join(self.root, 'c%d' % self.count))
        os.mkdir(command.folder, 0o700)
        options.update(cmd=cmd, args=list(args))
        request = guestrequests.read_request(Message('', 'CMD_RUN', None, options), DEFAULTS)
        request['root'] = self.served
        if 'stdin' in request:
            with open(command.path('stdin'), 'wb') as file:
                file.write(request.pop('stdin'))
            request['stdin'] = True
        with open(command.path('request.json'), 'w') as file:
            json.dump(request, file)
        command.request = request
        assert self.forks.run(command.folder)
        return command

    def end(self, command, timeout=30):
        """Its result, with what it wrote."""
        wait_until(lambda: command.has('result.json'), timeout)
        result = command.result()
        result['out'] = command.slice('out', 0, 10 ** 6)
        return result

    def run(self, cmd, *args, **options):
        return self.end(self.begin(cmd, *args, **options))

    def close(self):
        """Leaves no control group behind, nor what lives in one."""
        self.forks.stop()
        end_groups(self.forks.place, self.root)


def end_groups(place, root):
    """Ends what is left of the commands in folders there, and their control groups."""
    def are_gone():
        nest = place.nest(root)
        for folder in guestcgroup.children_of(nest) if nest else ():
            guestcgroup.Group(folder).kill()
        place.sweep(root, lambda name: True)
        return not os.path.isdir(nest)
    wait_until(are_gone, 10)


@pytest.fixture
def runners(tmp_path):
    let_others_in(tmp_path)
    runners = Runners(tmp_path)
    yield runners
    runners.close()


def cpu(result):
    return result['resources']['ru_utime'] + result['resources']['ru_stime']


# --- accounting ---

SPIN = 'import os, time\nwhile sum(os.times()[:2]) < 0.3: pass\n'


@pytest.mark.once
@pytest.mark.skipif(not shutil.which('time'), reason='needs /usr/bin/time')
def test_memory_is_the_programs_own_and_not_the_forkers(runners):
    """This one, that the runners were forked from, has many times as much."""
    grown = 'x = bytearray(10 ** 7)'
    for words in (['true'], [sys.executable, '-S', '-c', grown]):
        results = [runners.run(*words) for _ in range(9)]
        assert not any(result['inexact'] for result in results)
        ours = statistics.median(result['resources']['ru_maxrss'] for result in results)
        theirs = statistics.median(
            int(subprocess.run(['/usr/bin/time', '-f', '%M'] + words, stderr=subprocess.PIPE).stderr)
            for _ in range(9))
        assert abs(ours - theirs) <= max(0.05 * theirs, 256)


@pytest.mark.once
def test_children_that_nobody_waited_for_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(guestrunner, 'DRAIN', 60.0)        # on a busy machine an orphan takes its time
    runners = Runners(tmp_path)
    spin = '%s -S -c "%s"' % (sys.executable, SPIN)
    try:
        for line in '%s', '(%s) & exit 0', '(%s; sleep 0.1) & sleep 1; exit 0':
            result = runners.run('sh', '-c', line % spin)
            assert cpu(result) >= 0.3 and result['left'] == 0, result
    finally:
        runners.close()


def test_what_is_left_behind_is_said_and_measured_no_further(runners):
    command = runners.begin('sh', '-c', 'sleep 60 > /dev/null 2>&1 & echo $!')
    result = runners.end(command)
    assert result['left'] == 1
    daemon = int(result['out'])
    assert guestprocesses.start_ticks(daemon)
    os.kill(daemon, signal.SIGKILL)
    assert cpu(runners.run('true')) < 0.1 and runners.run('true')['left'] == 0


def test_setting_the_clock_makes_no_time_of_a_result_wrong(tmp_path, monkeypatch):
    """The program does it while it runs, once by two hours ahead and once by two back."""
    class Clock:
        monotonic = staticmethod(time.monotonic)

        @staticmethod
        def time():
            with open(str(tmp_path / 'set')) as file:
                return time.time() + int(file.read())
    monkeypatch.setattr(guestrunner, 'time', Clock)
    runners = Runners(tmp_path)
    try:
        for hours in 2, -2, 0:
            (tmp_path / 'set').write_text('0')
            result = runners.run('sh', '-c', 'echo $1 > "$0"', str(tmp_path / 'set'), str(hours * 3600))
            assert abs(result['ended'] - result['started'] - result['wall']) < 0.001, result
            assert abs(result.get('clock-set', 0) - hours * 3600) < 1
    finally:
        runners.close()


@pytest.mark.parametrize('end', ['exit 3', 'kill -SEGV $$'])
def test_what_is_left_behind_ends_with_the_program_where_that_is_asked_for(runners, end):
    program = '(trap "" TERM; setsid sleep 60 & sleep 61) > /dev/null 2>&1 & setsid sleep 62 & %s'
    command = runners.begin('sh', '-c', 'sleep 1; ' + program % end, **{'end-left': True})
    wait_until(command.members, 10)
    result = runners.end(command)
    code = 3 if end == 'exit 3' else signal.SIGSEGV
    assert (result['left'], result['exitCodeOrSignal'], result['by']) == (0, code, 'itself')
    wait_until(lambda: not command.members(), 10)
    assert not guestprocesses.processes_with('VM_PROGRESS_FILE', command.path('progress'))


# --- the fork server and its runners ---

def names_of(reported):
    return [line.partition(' ')[0] for line in reported]


def test_one_runner_of_very_many_tells_of_the_end_as_well(runners, monkeypatch):
    """It isn't waited for, and ends after its command; whoever looks at the clock needn't find that out."""
    monkeypatch.setattr(guestforks, 'MOST_BUSY', 1)
    first = runners.begin('sh', '-c', 'while ! [ -e go ]; do sleep 0.01; done')
    second = runners.begin('sleep', '60')
    wait_until(second.process, 20)
    told = []
    wait_until(lambda: told.extend(names_of(runners.forks.reported()))
               or told.count('c1') == told.count('c2') == 1, 20)
    open(os.path.join(runners.served, 'go'), 'w').close()
    runners.end(first)
    wait_until(lambda: told.extend(names_of(runners.forks.reported())) or told.count('c1') == 2, 20)
    os.kill(second.process(), signal.SIGKILL)
    runners.end(second)


def test_a_child_whose_parent_ends_while_it_is_looked_for_is_found(monkeypatch):
    """It is the subreaper's then, whose children were read already."""
    child = subprocess.Popen(['sleep', '60'])
    looks = {-1: [[-2], [child.pid]], -2: [[]]}     # no such processes
    monkeypatch.setattr(guestprocesses, 'children_of', lambda pid: (looks.get(pid) or [[]]).pop(0))
    assert guestprocesses.descendants(-1) == [child.pid]
    child.kill()
    child.wait()


# --- what is observed can't end a command ---

@pytest.fixture
def odd_name(tmp_path):
    """A process whose name is no UTF-8."""
    path = os.path.join(os.fsencode(str(tmp_path)), b'\xff\xfe)( ')
    shutil.copy(shutil.which('sleep'), path)
    process = subprocess.Popen([path, '60'])
    yield process
    process.kill()
    process.wait()


def test_a_process_of_any_name_disturbs_nobody(runners, odd_name):
    path = os.path.join(runners.served, 'ж' * 8)
    shutil.copy(shutil.which('sleep'), path.encode('utf-8'))
    command = runners.begin('sh', '-c', '"$0" 50 & "$0" 51', path, timeout=0.5)
    wait_until(lambda: len(command.members()) == 3, 10)
    assert guestprocesses.live_usage(command.members())[0] == 3
    result = runners.end(command)
    assert (result['state'], result['by'], result['left']) == ('timeout', 'timeout', 0)


NEST = 'if [ $1 -gt 0 ]; then sh -c "$0" "$0" $(($1 - 1)); else sleep 60; fi; :'


@pytest.mark.once
@pytest.mark.ends
def test_processes_nested_by_hundreds(runners):
    command = runners.begin('sh', '-c', NEST, NEST, '1100', timeout=60)
    wait_until(lambda: len(command.members()) == 1102, 50)
    command.note_signal(signal.SIGKILL)
    guestprocesses.signal_all(command.members(), signal.SIGKILL)
    result = runners.end(command)
    assert (result['state'], result['exitCodeOrSignal'], result['by'], result['left']) == \
        ('signaled', 9, 'signalCmd', 0)


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir])
def test_standard_input_that_is_no_file_is_refused(runners, make):
    make(os.path.join(runners.served, 'input'))
    result = runners.run('cat', fileForStdin='input')
    assert result['state'] == 'failed'
    assert result['error'].startswith('EINVAL: standard input should be a file')


@AS_ROOT
def test_files_are_opened_by_the_commands_own_user(runners):
    """A link to what root alone may read, a folder that root alone may enter."""
    secret = os.path.join(runners.root, 'secret')
    with open(secret, 'w') as file:
        file.write('secret\n')
    os.chmod(secret, 0o600)
    os.symlink(secret, os.path.join(runners.served, 'link'))
    os.mkdir(os.path.join(runners.served, 'shut'), 0o700)
    assert runners.run('cat', fileForStdin='link')['out'] == b'secret\n'
    for options in ({'fileForStdin': 'link'}, {'path': 'shut'}):
        result = runners.run('cat', user='nobody', **options)
        assert result['state'] == 'failed' and result['error'].startswith('EACCES: '), result


# --- escapes and signals ---

@pytest.mark.parametrize('end', ['timeout', 'KILL'])
def test_sessions_of_their_own_escape_neither_timeout_nor_kill(runners, end):
    program = 'setsid sleep 60 & setsid setsid sleep 61 & trap "" TERM; sleep 62'
    command = runners.begin('sh', '-c', program, timeout=1 if end == 'timeout' else 60)
    wait_until(lambda: command.process() and len(command.members()) >= 4, 10)
    members = command.members()
    if end == 'KILL':
        command.note_signal(signal.SIGKILL)
        os.kill(command.process(), signal.SIGKILL)
    assert runners.end(command)['left'] == 0
    assert not any(map(guestprocesses.start_ticks, members))


def test_a_daemon_may_be_meant_to_stay(runners):
    program = 'setsid sleep 60 > /dev/null 2>&1 & echo $!; sleep 61'
    command = runners.begin('sh', '-c', program, timeout=1, leave=True)
    result = runners.end(command)
    daemon = int(result['out'])
    assert result['state'] == 'timeout' and result['left'] == 1 and guestprocesses.start_ticks(daemon)
    os.kill(daemon, signal.SIGKILL)


def test_signals_are_the_defaults_whatever_the_agent_inherited(tmp_path):
    signals = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGPIPE)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR2])
    try:
        runners = Runners(tmp_path)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
    try:
        for name in ('TERM', 'HUP', 'USR1', 'PIPE', 'USR2'):
            result = runners.run('sh', '-c', 'kill -%s $$; echo survived' % name)
            assert (result['state'], result['out']) == ('signaled', b''), name
        shown = runners.run('grep', '-E', '^Sig(Blk|Ign)', '/proc/self/status')['out'].split()
        assert set(shown[1::2]) == {b'0' * 16}      # the C library's own, 32 and 33, too
    finally:
        runners.close()


@pytest.mark.parametrize('stops', [
    'kill -STOP $$', '(while :; do kill -STOP $$; sleep 0.2; kill -CONT $$; done) & wait'])
def test_a_program_that_is_stopped_while_its_others_work_has_its_timeout(runners, stops):
    """Else it escapes it by ``kill -STOP $$``."""
    command = runners.begin('sh', '-c', 'while :; do sleep 0.01; done & ' + stops, timeout=1)
    pid = wait_until(command.process, 10)
    wait_until(lambda: guestprocesses.is_stopped(pid), 10)
    assert command.read_state() == 'running'
    result = runners.end(command)
    assert (result['state'], result['by'], result['left']) == ('timeout', 'timeout', 0)


def test_the_time_that_a_program_is_stopped_is_not_its_own(runners, tmp_path):
    gate, timeout = tmp_path / 'gate', others_take()       # which runs until the program is stopped
    program = 'touch %s.begun; while [ ! -e %s ]; do sleep 0.05; done; echo done' % (gate, gate)
    command = runners.begin('sh', '-c', program, timeout=timeout)
    wait_until((tmp_path / 'gate.begun').exists, 10)
    guestprocesses.signal_all(wait_until(command.members), signal.SIGSTOP)     # known a moment later
    wait_until(lambda: command.read_state() == 'stopped', 10)
    time.sleep(1.5 * timeout)
    assert not command.has('result.json')
    gate.touch()
    guestprocesses.signal_all(command.members(), signal.SIGCONT)
    result = runners.end(command)
    assert (result['state'], result['out'], result['by']) == ('exited', b'done\n', 'itself')


def test_a_timeout_tells_which_processes_got_no_signal(tmp_path, monkeypatch):
    """A setuid program goes on until it has done, where the agent isn't root."""
    def kill(pid, number):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    monkeypatch.setattr(guestcgroup.Group, 'kill', lambda self: False)
    monkeypatch.setattr(os, 'kill', kill)       # before the runners are forked
    runners = Runners(tmp_path)
    monkeypatch.undo()
    try:
        result = runners.run('sleep', '1.5', timeout=0.5)
        assert (result['state'], result['exitCodeOrSignal']) == ('timeout', 0)
        assert result['error'] == ('ETIME: ran longer than its timeout, 0.5 s; 1 of its processes got no '
                                   'signal: another user\'s (setuid, sudo)')
    finally:
        runners.close()


AS_PROCESS_1 = '''
import os, signal, sys, time
sys.path[:0] = [%r, %r]
import guestprocesses, test_guest_runner
assert os.getpid() == 1
runners = test_guest_runner.Runners(sys.argv[1])
program = 'exec > /dev/null 2>&1; (setsid sleep 0.3 &); (setsid sleep 9 &)'
print(runners.run('sh', '-c', program)['left'])
os.kill(runners.forks.pid, signal.SIGKILL)
deadline = time.monotonic() + 10
while time.monotonic() < deadline:
    runners.forks.lives()
    pids = guestprocesses.all_pids()
    zombies = [pid for pid in pids if not guestprocesses.is_alive(guestprocesses.stat_fields(pid))]
    if not zombies and len(pids) == 2:          # this one, and the long sleep
        break
    time.sleep(0.05)
print(len(zombies), len(pids))
'''


@AS_ROOT
@pytest.mark.skipif(not shutil.which('unshare'), reason='needs unshare')
def test_process_1_of_a_container_leaves_no_zombies(tmp_path):
    program = AS_PROCESS_1 % (TOP, os.path.join(TOP, 'tests'))
    words = ['unshare', '--pid', '--fork', '--kill-child', '--mount-proc', sys.executable, '-c', program,
             str(tmp_path)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    if b'unshare failed' in done.stderr:
        pytest.skip('may not make namespaces')
    end_groups(guestcgroup.find_place(), str(tmp_path))
    assert done.stdout.split() == [b'2', b'0', b'2'], done


BENEATH_A_FOREIGN_PROC = '''
import os, sys, time
sys.path[:0] = [%r, %r]
import guestprocesses, test_guest_runner
assert os.getpid() == 1 and os.readlink('/proc/self') != '1'
runners = test_guest_runner.Runners(sys.argv[1])
command = runners.begin('sh', '-c', 'trap "" TERM; sleep 600 & sleep 601', timeout=1, **{'kill-after': 0})
result = runners.end(command)
print(result['state'], guestprocesses.all_pids(), guestprocesses.descendants(os.getppid()))
killed = runners.begin('sleep', '602')
test_guest_runner.wait_until(killed.process, 10)
killed.note_signal(9)
print(killed.send_signal(9), guestprocesses.start_ticks(os.getpid()))
print(runners.end(killed)['state'])
stopped = runners.begin('sh', '-c', 'kill -STOP $$', timeout=0.2, **{'kill-after': 0})
print(runners.end(stopped)['state'])
held = runners.begin('sh', '-c', 'kill -STOP $PPID; exit 7')
def goes_on():
    held.continue_runner()
    return held.has('result.json')
test_guest_runner.wait_until(goes_on, 20)
print(held.result()['exitCodeOrSignal'])
import guestrunner
guestrunner.Runner._make_group = lambda self: None      # as for who may make none
os.mkdir(sys.argv[1] + '/ungrouped')
ungrouped = test_guest_runner.Runners(sys.argv[1] + '/ungrouped')
result = ungrouped.run('sh', '-c', 'setsid sleep 603 > /dev/null 2>&1 & exit 8')
print(result['left'], result['exitCodeOrSignal'])
ungrouped.forks.stop()
runners.forks.stop()
'''


@AS_ROOT
@pytest.mark.skipif(not shutil.which('unshare'), reason='needs unshare')
def test_a_proc_of_other_processes_is_none(tmp_path):
    """Of another namespace: who believed its numbers would signal strangers, and end nothing."""
    program = BENEATH_A_FOREIGN_PROC % (TOP, os.path.join(TOP, 'tests'))
    words = ['unshare', '--pid', '--fork', '--kill-child', sys.executable, '-c', program, str(tmp_path)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    if b'unshare failed' in done.stderr:
        pytest.skip('may not make namespaces')
    end_groups(guestcgroup.find_place(), str(tmp_path))
    assert done.stdout.decode().split('\n') == [
        'timeout [] []', 'True 0', 'signaled', 'timeout', '7', '1 8', ''], done


def test_who_ended_it(runners):
    assert runners.run('sh', '-c', 'kill -SEGV $$')['by'] == 'itself'
    command = runners.begin('sleep', '60')
    wait_until(command.process, 10)
    os.kill(command.process(), signal.SIGTERM)      # somebody else on that machine
    assert runners.end(command)['by'] == 'other'


def test_whose_output_can_not_be_kept_was_ended_by_nobody_else(runners, monkeypatch):
    monkeypatch.setattr(DEFAULTS, 'output_limit', 10 ** 9)
    command = runners.begin('sh', '-c', 'ulimit -f; yes')
    wait_until(lambda: command.size('out') > 0, 10)
    runner = command.read('process.json')['runner']
    resource.prlimit(runner, resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6))
    result = runners.end(command)
    assert (result['state'], result['by']) == ('failed', ''), result
    assert result['error'].startswith('EFBIG: ')


# Instead of the starter: getpid(); kill(that, SIGKILL)
KILLED = bytes.fromhex('6a27580f05' '89c7' '6a095e' '6a3e58' '0f05')


def silent_starter():
    """The starter, which stands still for ever where it should say P."""
    say = bytes.fromhex('6a006a50')
    whole = gueststart.STARTERS['x86_64']
    assert whole.count(say) == 1
    return whole.replace(say, bytes.fromhex('ebfe') + say[2:])


@pytest.mark.skipif(os.uname().machine != 'x86_64', reason='has no starter')
@pytest.mark.parametrize('options', [{}, {'nice': 1}])
def test_a_program_whose_starter_is_killed_has_not_begun(tmp_path, monkeypatch, options):
    monkeypatch.setitem(gueststart.STARTERS, 'x86_64', KILLED)
    runners = Runners(tmp_path)
    try:
        result = runners.run('true', **options)
        assert (result['state'], result['exitCodeOrSignal']) == ('failed', -1), result
        assert result['error'] == 'ECANCELED: ended by signal 9 before it began: true'
    finally:
        runners.close()


@pytest.mark.skipif(os.uname().machine != 'x86_64', reason='has no starter')
@pytest.mark.parametrize('options', [{}, {'nice': 1}])
def test_a_program_that_killed_its_starter_goes_on(tmp_path, monkeypatch, options):
    """Before that had a turn to tell that there is one: it stands still instead of telling."""
    monkeypatch.setitem(gueststart.STARTERS, 'x86_64', silent_starter())
    runners = Runners(tmp_path)
    try:
        result = runners.run('sh', '-c', 'kill -KILL $PPID; echo ran; exit 3', **options)
        assert (result['state'], result['exitCodeOrSignal'], result['out']) == ('exited', 3, b'ran\n'), result
    finally:
        runners.close()


def test_a_runner_is_not_dead_for_want_of_descriptors(runners):
    """Else the agent would end its processes, and tell that somebody did."""
    command = runners.begin('sleep', '60')
    wait_until(command.process, 10)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as last:
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno(), before[1]))
        try:
            lives = command.runner_lives()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert lives
    runner = command.read('process.json')['runner']
    os.kill(runner, signal.SIGKILL)
    wait_until(lambda: not command.runner_lives(), 10)
    command.end_processes()


def test_what_the_kernel_killed_for_memory(tmp_path):
    log = tmp_path / 'kmsg'
    log.write_text('6,339,5140900,-;NET: Registered\n'
                   '3,340,9000000,-;Out of memory: Killed process 77 (old) total-vm:1kB\n'
                   '3,341,90000000,-;Memory cgroup out of memory: Killed process 4711 (python) total\n')
    assert guestprocesses.was_killed_for_memory(4711, 80.0, str(log))
    for pid, since in ((4711, 100.0), (471, 80.0), (77, 80.0)):
        assert not guestprocesses.was_killed_for_memory(pid, since, str(log))
    assert not guestprocesses.was_killed_for_memory(4711, 80.0, str(tmp_path / 'none'))


@pytest.mark.parametrize('name, number', [('TERM', 15), ('SIGKILL', 9), ('2', 2), ('int', 2), ('64', 64),
                                          ('RTMIN', int(signal.SIGRTMIN)), ('RTMIN+3', signal.SIGRTMIN + 3),
                                          ('SIGRTMAX-1', signal.SIGRTMAX - 1)])
def test_all_signals_of_the_system(name, number):
    assert guestrequests.signal_number(name) == number


# --- words, users, errors ---

def test_any_bytes_reach_the_program(runners):
    words = [b'\xe4.txt', b'\x01\x1b\x7f', 'ж'.encode()]
    program = [b'-c', b'printf "%s|" "$@" "$VALUE"; pwd', b'sh']
    encoded = [base64.b64encode(word).decode() for word in program + words]
    folder = os.path.join(os.fsencode(runners.served), b'\xfc')
    os.mkdir(folder)
    result = runners.run('sh', args64=encoded, env64={'VALUE': base64.b64encode(b'\xff\x02').decode()},
                         path64=base64.b64encode(b'\xfc').decode())
    assert result['out'] == b'|'.join(words + [b'\xff\x02', folder + b'\n'])


def environment(result):
    return dict(line.split('=', 1) for line in result['out'].decode().splitlines() if '=' in line)


@AS_ROOT
def test_another_user_gets_an_environment_of_its_own(runners, monkeypatch):
    runners.close()
    for name in ('XDG_RUNTIME_DIR', 'MAIL', 'SECRET'):
        monkeypatch.setenv(name, 'of root')
    runners.forks = guestforks.ForkServer()
    nobody = pwd.getpwnam('nobody')
    found = environment(runners.run('env', user='nobody', env={'MINE': '1'}))
    assert (found['HOME'], found['USER'], found['LOGNAME'], found['SHELL'], found['MINE']) == \
        (nobody.pw_dir, 'nobody', 'nobody', nobody.pw_shell, '1')
    assert found['PWD'] == runners.served and found['PATH'].startswith('/usr/local/bin')
    assert not {'XDG_RUNTIME_DIR', 'MAIL', 'SECRET'} & set(found)
    assert environment(runners.run('env'))['SECRET'] == 'of root'


@AS_ROOT
@pytest.mark.parametrize('user, told', [('nobody', '65534:65534'), ('65534', '65534:65534'),
                                        ('4321', '4321:4321'), ('nobody:daemon', '65534:1'),
                                        ('4321:1234', '4321:1234')])
def test_users_and_groups_by_name_and_number(runners, user, told):
    out = runners.run('sh', '-c', 'echo $(id -u):$(id -g) $(id -G)', user=user)['out'].decode().split()
    assert out[0] == told and '0' not in out[1:]


@pytest.mark.parametrize('user, error', [('no-such', 'EINVAL: no such user: no-such'),
                                         ('nobody:no-such', 'EINVAL: no such group: no-such'),
                                         (':daemon', 'EINVAL: no such user: :daemon')])
def test_users_that_are_not_there(runners, user, error):
    assert runners.run('true', user=user)['error'] == error


@pytest.mark.parametrize('cmd, options, error', [
    ('no-such-program', {}, 'ENOENT: '), ('/no/such', {}, 'ENOENT: '), ('/etc/passwd', {}, 'EACCES: '),
    ('./text', {}, 'ENOEXEC: '), ('true', {'path': 'no-such'}, 'ENOENT: '), ('/', {}, 'EACCES: ')])
def test_what_can_not_begin_says_so_by_errno(runners, cmd, options, error):
    path = os.path.join(runners.served, 'text')
    with open(path, 'w') as file:
        file.write('no program\n')
    os.chmod(path, 0o755)
    result = runners.run(cmd, **options)
    assert (result['state'], result['finished'], result['exitCodeOrSignal']) == ('failed', False, -1)
    assert result['error'].startswith(error) and 'Error' not in result['error']


@pytest.mark.parametrize('options', [{}, {'nice': 1}])
def test_arguments_that_are_too_long_are_the_programs(runners, options):
    assert runners.run('echo', 'a' * 500000, **options)['error'] == 'E2BIG: Argument list too long: echo'


CHANGES_ITS_RUNNER = '''
import json, os, resource
with open(os.path.join(os.path.dirname(os.environ['VM_PROGRESS_FILE']), 'process.json')) as file:
    runner = json.load(file)['runner']
os.setpriority(os.PRIO_PROCESS, runner, 7)
if hasattr(resource, 'prlimit'):
    resource.prlimit(runner, resource.RLIMIT_CORE, (0, 0))
    resource.prlimit(runner, resource.RLIMIT_NOFILE, (200, 200))
    os.sched_setaffinity(runner, [min(os.sched_getaffinity(0))])
'''


def test_what_a_program_does_to_its_runner_meets_no_other_command(runners):
    """As by ``renice -p $PPID``, or taskset, or prlimit."""
    told = ['sh', '-c', 'nice; ulimit -n; ulimit -H -c; grep -s Cpus_allowed_list /proc/self/status']
    before = runners.run(*told)['out']
    assert runners.run(sys.executable, '-c', CHANGES_ITS_RUNNER)['exitCodeOrSignal'] == 0
    for _ in range(3):
        assert runners.run(*told)['out'] == before


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_output_that_there_is_no_room_for_is_named(tmp_path, monkeypatch):
    """So that it is no error of what never began."""
    real = guestrunner.private

    def private(path, flags):
        is_out = path.endswith('/out')
        return os.open('/dev/full', os.O_WRONLY | os.O_CLOEXEC) if is_out else real(path, flags)
    monkeypatch.setattr(guestrunner, 'private', private)
    runners = Runners(tmp_path)
    try:
        command = runners.begin('sh', '-c', 'echo hello; sleep 60')
        result = runners.end(command)
        assert (result['state'], result['error']) == (
            'failed', 'ENOSPC: No space left on device: ' + command.path('out'))
    finally:
        runners.close()


@pytest.mark.parametrize('name', ['out', 'err'])
def test_what_has_no_file_for_its_output_never_begins(tmp_path, monkeypatch, name):
    """Else it would be told as what never ran, and be run again."""
    real = guestrunner.private

    def private(path, flags):
        if path.endswith('/' + name):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return real(path, flags)
    monkeypatch.setattr(guestrunner, 'private', private)
    runners = Runners(tmp_path)
    try:
        result = runners.run('sh', '-c', 'echo it ran > began')
        assert (result['state'], result['exitCodeOrSignal']) == ('failed', -1)
        assert result['error'].startswith('EMFILE')
        assert not os.path.exists(os.path.join(runners.served, 'began'))
    finally:
        runners.close()


@pytest.mark.parametrize('method, script, told', [
    ('_note_stop', 'echo it ran > began; sleep 60', (False, 9, '')),
    ('_of_the_group', 'echo it ran > began; exit 3', (True, 3, 'itself')),
    ('_wait_for_orphans', 'kill -TERM $$', (False, 15, ''))])
def test_what_began_is_never_told_as_what_did_not(tmp_path, monkeypatch, method, script, told):
    """Whatever its runner fails at: how it ended is told, with what it used until then."""
    def fails(self, *values):
        if method != '_note_stop' or os.path.exists(os.path.join(str(tmp_path), 'served', 'began')):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(guestrunner.Runner, method, fails)
    runners = Runners(tmp_path)
    try:
        result = runners.run('sh', '-c', script)
        assert (result['state'], result['error']) == ('failed', 'EIO: Input/output error')
        assert (result['finished'], result['exitCodeOrSignal'], result['by']) == told
        assert result['wall'] > 0 and result['started'] > 0 and result['resources']['ru_minflt'] > 0
    finally:
        runners.close()


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_full_disk_is_told_with_the_path(tmp_path, monkeypatch):
    def private(path, flags):
        is_full = os.path.basename(path) in ('process.json', 'new.json.new')
        return os.open('/dev/full', os.O_WRONLY | os.O_CLOEXEC) if is_full else real(path, flags)
    real = guestspool.private
    monkeypatch.setattr(guestspool, 'private', private)
    monkeypatch.setattr(guestrunner, 'private', private)
    with pytest.raises(OSError) as raised:
        guestspool.write_file(str(tmp_path / 'new.json'), 'text')
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / 'new.json.new'))
    runners = Runners(tmp_path)
    try:
        command = runners.begin('true')
        error = runners.end(command)['error']
        assert error == 'ENOSPC: No space left on device: ' + command.path('process.json')
    finally:
        runners.close()


def forge(path):
    """Another file in the place of one."""
    with open(path + '.forged', 'w') as file:
        file.write('begun\ndone\n')
    os.rename(path + '.forged', path)


DELETED = 'ENOENT: what it wrote is lost, as somebody deleted '
CHANGED = 'EINVAL: what it wrote isn\'t what is there, as somebody changed '


@pytest.mark.parametrize('after', ['', '; exec >&- 2>&-; sleep 0.2'])
@pytest.mark.parametrize('harm, said', [
    (os.remove, DELETED), (lambda path: os.rename(path, path + '.moved'), DELETED), (forge, DELETED),
    (lambda path: (os.remove(path), os.mkdir(path)), DELETED), (lambda path: os.truncate(path, 0), CHANGED),
    (lambda path: os.truncate(path, 99), CHANGED)])
def test_output_that_somebody_deletes_or_changes_is_told_so(runners, harm, said, after):
    program = 'echo begun; while [ ! -e go ]; do sleep 0.05; done; echo done' + after
    command = runners.begin('sh', '-c', program)
    wait_until(lambda: command.has('out') and command.size('out') == 6, 10)
    harm(command.path('out'))
    open(os.path.join(runners.served, 'go'), 'w').close()
    result = runners.end(command)
    assert (result['state'], result['exitCodeOrSignal'], result['out-truncated']) == ('exited', 0, True)
    assert result['error'] == said + command.path('out')
    assert said is CHANGED or result['out'] == b''     # and nothing that it didn't write


DEAF = 'import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass'


@pytest.mark.once
def test_a_program_that_does_not_heed_its_limit_of_cpu_is_told_as_ended_for_it(monkeypatch, request):
    """The kernel KILLs it some seconds of CPU later: that is nobody else's deed."""
    monkeypatch.setattr(gueststart, 'CPU_GRACE', 1)        # before runners are forked from here
    runners = request.getfixturevalue('runners')
    result = runners.end(runners.begin(sys.executable, '-S', '-c', DEAF, limits={'cpu': 1}), 120)
    assert (result['state'], result['exitCodeOrSignal'], result['by']) == ('signaled', 9, 'itself')
    assert result['error'] == 'ETIME: ended by signal 9: limits.cpu'


@pytest.mark.once
def test_a_kill_that_was_sent_speaks_for_no_limit(runners):
    command = runners.begin(sys.executable, '-S', '-c', DEAF, limits={'cpu': 1, 'as': 10 ** 9})
    pid = wait_until(command.process, 10)
    wait_until(lambda: guestprocesses.live_usage([pid])[1].get('ru_utime', 0) > 1.2, 60)
    command.note_signal(signal.SIGKILL)
    command.send_signal(signal.SIGKILL)
    result = runners.end(command)
    assert (result['state'], result['by'], result['error']) == ('signaled', 'signalCmd', '')


@pytest.mark.skipif(os.getuid() != 0, reason='becomes another user')
def test_what_a_user_may_not_is_told_by_its_option(tmp_path):
    """Of an agent that isn't root: neither without a word, nor by a file of the agent's."""
    program = '''
import ctypes, os, sys
sys.path[:0] = [%r, %r]
import test_guest_runner
open(os.devnull, 'w').close()          # loads what text is encoded by, which a user may not read
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
runners = test_guest_runner.Runners(sys.argv[1])
for options in ({'nice': -5}, {'user': 'root'}, {'user': '65534:0'}):
    print(runners.run('true', **options)['error'])
runners.close()
''' % (TOP, os.path.join(TOP, 'tests'))
    let_others_in(tmp_path)
    os.chmod(str(tmp_path), 0o777)
    told = subprocess.run([sys.executable, '-c', program, str(tmp_path)], stdout=subprocess.PIPE, check=True)
    assert told.stdout.decode().splitlines() == [
        'EPERM: Operation not permitted: ' + option for option in ('nice -5', 'user root', 'user 65534:0')]


def test_a_limit_that_the_system_refuses_is_named(runners):
    error = runners.run('true', limits={'nofile': 99999999999})['error']
    assert error.startswith('EPERM: ') and error.endswith(': limits.nofile'), error


def test_a_limit_under_which_no_program_can_begin_is_named(runners):
    for name, value in ('nofile', 2), ('nofile', 0), ('cpu', 0), ('as', 0), ('as', 1), ('as', 100000):
        for options in {}, {'terminal': {}}:
            result = runners.run('true', limits={name: value}, **options)
            assert (result['state'], result['exitCodeOrSignal']) == ('failed', -1), result
            assert result['error'] == 'EINVAL: no program can begin with %d: limits.%s' % (value, name)
    assert runners.run('sh', '-c', 'ulimit -t', limits={'cpu': 0.5})['out'] == b'1\n'
    assert runners.run('true', limits={'as': 2 ** 64})['error'].startswith('EINVAL: larger than any ')


def test_what_a_limit_ended_while_it_was_begun_has_not_begun(tmp_path, monkeypatch):
    """The starter itself, or the child that is to become it, is killed by the system."""
    monkeypatch.setattr(gueststart, 'LEAST', {})
    runners = Runners(tmp_path)
    try:
        for value in 0, 1, 4096, 100000:
            result = runners.run('true', limits={'as': value})
            assert (result['state'], result['exitCodeOrSignal']) == ('failed', -1), result
            assert re.fullmatch('ENOMEM: ended by signal (11|9) before it began: limits.as', result['error'])
    finally:
        runners.close()


@pytest.mark.once
def test_which_limit_a_program_was_ended_for_is_told(runners):
    result = runners.run('sh', '-c', 'while :; do :; done', limits={'cpu': 1})
    assert (result['state'], result['exitCodeOrSignal']) == ('signaled', signal.SIGXCPU)
    assert result['error'] == 'ETIME: ended by signal 24: limits.cpu'
    result = runners.run('sh', '-c', 'exec dd if=/dev/zero of=f bs=2000 count=1', limits={'fsize': 1000})
    if result['state'] == 'signaled':  # dd goes on with what it could write
        assert result['error'] == 'EFBIG: ended by signal 25: limits.fsize'
    result = runners.run('sh', '-c', 'kill -XFSZ $$', limits={'fsize': 1000})
    assert result['error'] == 'EFBIG: ended by signal 25: limits.fsize'
    result = runners.run('sh', '-c', 'kill -SEGV $$', limits={'as': 10 ** 9})
    assert (result['state'], result['by']) == ('signaled', 'itself')
    assert result['error'] == 'ENOMEM: ended by signal 11, perhaps for want of room: limits.as'
    assert runners.run('sh', '-c', 'kill -SEGV $$')['error'] == ''


@AS_ROOT
@pytest.mark.parametrize('value', [0, 1])
def test_who_may_have_no_more_processes_is_told_so(runners, value):
    """What begins a program takes no place of the user's."""
    result = runners.run('sh', '-c', 'echo $$; exec sh -c "echo again; true | true"', user='65533:65533',
                         limits={'nproc': value})
    assert result['state'] == 'exited' and b'again' in result['out'], result


def test_what_has_begun_is_not_cancelled_though_its_starter_had_no_turn(runners):
    """The starter is stopped by its program at once, before it can tell that there is one."""
    command = runners.begin('sh', '-c', 'kill -STOP $PPID; echo ran; : > "${VM_PROGRESS_FILE%/*}/signal-15"; '
                            'sleep 1; exit 3')
    wait_until(lambda: command.continue_runner() or command.has_result(), 20)
    result = runners.end(command)
    assert (result['state'], result['exitCodeOrSignal'], result['out']) == ('exited', 3, b'ran\n')


def test_without_a_starter_all_works_and_what_is_inexact_is_said(tmp_path, monkeypatch):
    """Another processor than those that it is written for."""
    monkeypatch.setattr(guestforks, 'make_starter', lambda: -1)
    runners = Runners(tmp_path)
    try:
        result = runners.run('echo', 'hello')
        assert result['out'] == b'hello\n' and result['inexact'] == ['ru_maxrss']
        assert runners.run('no-such-program')['error'].startswith('ENOENT: ')
        assert runners.run('sleep', '60', timeout=0.3)['state'] == 'timeout'
    finally:
        runners.close()
