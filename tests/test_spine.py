"""From runCmd to the result: real host, real guests, real programs."""

import base64
import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import xmlrpc.client

import pytest
from agents import Agent, Host, command
from brokers import free_port
from fake_guest import Guest
from helpers import fault_of, wait_until

import agent
import hostagent
import hostconfig
import hostserver
import hoststate
import hostworkers

pytestmark = [pytest.mark.whole, pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]
FULL = os.environ.get('VMHOST_FULL')


@pytest.fixture(scope='module')
def guest(host, tmp_path_factory):
    with Agent(tmp_path_factory.mktemp('guest'), host, 'one') as guest:
        yield guest


# --- results ---

@pytest.mark.windows
def test_the_result_of_a_program(host, guest):
    results = host.run('one', 'sh', '-c', 'echo out; echo err >&2; exit 3')
    assert (results['out'], results['err']) == ('out\n', 'err\n')
    assert (results['finished'], results['exitCodeOrSignal'], results['state']) == (True, 3, 'exited')
    assert len(results['resources']) == 16
    assert results['resources']['ru_maxrss'] > 0


@pytest.mark.windows
def test_a_signal_is_no_exit_code(host, guest):
    results = host.run('one', 'sh', '-c', 'kill -USR1 $$')
    assert (results['finished'], results['exitCodeOrSignal'], results['state']) == \
        (False, signal.SIGUSR1, 'signaled')
    results = host.run('one', 'sh', '-c', 'exit %d' % (128 + signal.SIGUSR1))
    assert (results['finished'], results['exitCodeOrSignal']) == (True, 128 + signal.SIGUSR1)


@pytest.fixture
def exit_codes():
    return list(range(200 if FULL else 100))


@pytest.mark.once
def test_exit_codes_from_16_clients(host, guest, exit_codes):
    codes = random.Random(16).sample(exit_codes, len(exit_codes))
    found = {}

    def client(mine):
        with host.api as api:
            ids = {api.runCmd('one', 'sh', ['-c', 'echo %d; exit %d' % (code, code)]): code
                   for code in mine}
            for cmd_id, code in ids.items():
                while not api.waitCmd(cmd_id, 30):
                    pass
                results = api.getCmdResults(cmd_id)
                found[code] = (results['exitCodeOrSignal'], results['out'], results['finished'])

    clients = [threading.Thread(target=client, args=(codes[n::16],)) for n in range(16)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(120)
    assert found == {code: (code, '%d\n' % code, True) for code in exit_codes}


@pytest.mark.parametrize('cmd, path, error', [
    ('no-such-program', '', 'ENOENT: '),
    ('/etc/passwd', '', 'EACCES: '),
    ('true', 'no/such/folder', 'ENOENT: ')])
def test_what_can_not_start_fails_at_once(host, guest, api, cmd, path, error):
    results = host.results(api.runCmd('one', cmd, [], {}, path), 10)
    assert (results['state'], results['finished'], results['exitCodeOrSignal']) == ('failed', False, -1)
    assert results['error'].startswith(error) and results['err'] == results['error']


def test_timeout_leaves_no_process(host, guest):
    """Whatever session it made for itself."""
    begin = time.monotonic()
    inside, left, last = sleeps(77), sleeps(78), sleeps(79)
    results = host.run('one', 'sh', '-c', 'trap "" TERM; %s & setsid %s & %s' % (inside, left, last),
                       timeout=1, killAfter=1)
    assert results['state'] == 'timeout'
    assert time.monotonic() - begin < 20
    assert not any(map(processes_called, (inside, left, last)))


def sleeps(seconds):
    """A command whose words no other run of the suite has at the same time."""
    return 'sleep %d.%d' % (seconds, os.getpid())


def end_processes(words):
    for number in processes_called(words):
        os.kill(number, signal.SIGKILL)


def processes_called(words):
    found = []
    for number in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open('/proc/%s/cmdline' % number, 'rb') as file:
                if file.read().replace(b'\0', b' ').decode('utf-8', 'replace').strip() == words:
                    found.append(int(number))
        except OSError:
            continue
    return found


# --- input ---

@pytest.mark.windows
def test_stdin_as_text_bytes_and_file(host, guest, api):
    assert host.run('one', 'cat', stdin='zwölf\n')['out'] == 'zwölf\n'
    exact = bytes(range(256))
    for option in ({'stdin': xmlrpc.client.Binary(exact)}, {'stdin64': xmlrpc.client.Binary(exact)},
                   {'stdin64': base64.encodebytes(exact).decode()}):
        results = host.run('one', 'cat', **option)
        assert base64.b64decode(results['out64']) == exact
        asked = api.getCmdDetails(results['cmd-id'])['options']      # may be asked for as it is told
        assert base64.b64decode(host.run('one', 'cat', **asked)['out64']) == exact
    with open(os.path.join(guest.files, 'input'), 'w') as file:
        file.write('from a file')
    results = host.results(api.runCmd('one', 'cat', [], {}, '', 'input'))
    assert results['out'] == 'from a file'
    results = host.results(api.runCmd('one', 'cat', [], {}, '', 'no-such-input'))
    assert results['state'] == 'failed' and 'no-such-input' in results['error']
    assert host.run('one', 'cat')['out'] == ''


def test_env_is_laid_over_the_guests_own(host, guest, api):
    out = host.results(api.runCmd('one', 'env', [], {'DAY': 'Dienstag ü'}))['out']
    assert 'DAY=Dienstag ü' in out.splitlines() and 'PATH=' in out
    assert 'PATH=' in host.results(api.runCmd('one', 'env', [], '{}'))['out']
    cleared = host.results(api.runCmd('one', '/usr/bin/env', [], {'A': '1'}, None, '', {'envClear': True}))
    assert 'A=1' in cleared['out'].splitlines()
    assert 'HOME=' not in cleared['out']


def test_path_is_relative_to_the_served_folder(host, guest, api):
    os.makedirs(os.path.join(guest.files, 'deep/er'), exist_ok=True)
    real = os.path.realpath(guest.files)
    assert host.results(api.runCmd('one', 'pwd', [], {}, 'deep/er'))['out'] == real + '/deep/er\n'
    for nothing in ('', None, 'None'):
        assert host.results(api.runCmd('one', 'pwd', [], {}, nothing))['out'] == real + '\n'


def test_nice_and_limits(host, guest):
    assert host.run('one', 'nice', nice=7)['out'] == '%d\n' % min(19, os.nice(0) + 7)
    assert host.run('one', 'sh', '-c', 'ulimit -n', limits={'nofile': 50})['out'] == '50\n'
    results = host.run('one', 'sh', '-c', 'while :; do :; done', limits={'cpu': 1})
    assert (results['state'], results['exitCodeOrSignal']) in (
        ('signaled', signal.SIGXCPU), ('signaled', signal.SIGKILL))


class StartedWithoutStreams(Agent):
    """As some services start theirs."""

    def words(self):
        return ['sh', '-c', 'exec "$@" <&- >&- 2>&-', 'sh'] + super().words()


def test_an_agent_without_standard_streams(host, tmp_path):
    with StartedWithoutStreams(tmp_path, host, 'bare'):
        results = host.run('bare', 'sh', '-c', 'echo out; echo err >&2; exit 3')
        assert (results['state'], results['exitCodeOrSignal']) == ('exited', 3), results
        assert (results['out'], results['err']) == ('out\n', 'err\n')


class WithoutProc(Agent):
    """As in a chroot into which nobody mounted it."""

    def words(self):
        script = 'mount -t tmpfs none /proc && exec "$@"'
        return ['unshare', '--mount', 'sh', '-c', script, 'sh'] + super().words()


@pytest.mark.skipif(os.name != 'posix' or os.getuid() != 0, reason='only root may mount')
@pytest.mark.skipif(not shutil.which('unshare'), reason='needs unshare')
def test_an_agent_without_proc(host, tmp_path):
    with WithoutProc(tmp_path, host, 'procless'):
        results = host.run('procless', 'sh', '-c', 'cat; exit 3', stdin='in')
        assert (results['state'], results['exitCodeOrSignal'], results['out']) == ('exited', 3, 'in'), results
        results = host.run('procless', 'sh', '-c', 'sleep 600 & sleep 600', timeout=0.3)
        assert (results['state'], results['exitCodeOrSignal']) == ('timeout', signal.SIGTERM), results


@pytest.mark.skipif(os.name != 'posix' or os.getuid() != 0, reason='only root may change the user')
def test_user(host, guest, api):
    cmd_id = api.runCmd('one', 'id', ['-un'], {}, '/', '', {'user': 'nobody'})
    assert host.results(cmd_id)['out'] == 'nobody\n'
    results = host.run('one', 'id', user='nobody-of-that-name')
    assert results['state'] == 'failed' and 'nobody-of-that-name' in results['error']


@pytest.mark.skipif(os.name != 'posix' or os.getuid() != 0, reason='only root may change the user')
def test_another_user_tells_its_progress(host, guest, api, monkeypatch):
    for folder in (guest.files, guest.folder):         # pytest's own are root's alone
        while folder != '/':
            if not os.stat(folder).st_mode & 1:
                os.chmod(folder, os.stat(folder).st_mode | 0o11)
            folder = os.path.dirname(folder)
    script = 'echo half > $VM_PROGRESS_FILE; cat $(dirname $VM_PROGRESS_FILE)/request.json'
    cmd_id = api.runCmd('one', 'sh', ['-c', script], {}, '/', '', {'user': 'nobody'})
    results = host.results(cmd_id)
    assert 'denied' in results['err'] and 'progress' not in results['err'], results
    with open(os.path.join(guest.state, 'spool', 'one', cmd_id, 'progress')) as file:
        assert file.read() == 'half\n'


def test_an_exit_code_after_a_timeout_is_no_signal(host, guest):
    obeys = 'trap "exit %d" TERM; while :; do sleep 0.05; done'
    results = host.run('one', 'sh', '-c', obeys % 3, timeout=0.3)
    assert (results['state'], results['finished'], results['exitCodeOrSignal']) == ('timeout', True, 3)
    for code, told in ((3, 3), (0, 124)):
        done = host.verb('run', '-T', '0.3', 'one', '--', 'sh', '-c', obeys % code)
        assert done.returncode == told and b'timeout' in done.stderr


def test_a_timeout_of_centuries(host, guest):
    script = 'import time; block = bytearray(60 << 20); time.sleep(1.5)'
    assert host.run('one', sys.executable, '-c', script, timeout=1e10)['state'] == 'exited'


# --- output ---

def read_output(api, cmd_id, stream):
    data, offset = b'', 0
    while True:
        part = api.getCmdOutput(cmd_id, stream, offset, 1024 * 1024)
        data += part['data'].data
        offset = part['next']
        if part['eof']:
            assert part['size'] == offset == len(data)
            return data


@pytest.mark.once
def test_100_mib_on_both_streams(host, guest, api):
    program = ('import os, sys\n'
               'block = bytes(range(256)) * 256\n'
               'for n in range(1600):\n'
               '    os.write(1, block); os.write(2, block[::-1])\n')
    cmd_id = api.runCmd('one', sys.executable, ['-c', program])
    results = host.results(cmd_id, 300)
    assert (results['out-size'], results['err-size']) == (1600 * 65536, 1600 * 65536)
    tail = base64.b64decode(results['out64'])
    assert (bytes(range(256)) * 256).endswith(tail[-256:]) and len(tail) <= 65536
    part = api.getCmdOutput(cmd_id, 'err', 50 * 2 ** 20 + 1, 1000)
    whole = (bytes(range(256)) * 256)[::-1]
    assert part['data'].data == (whole * 2)[(50 * 2 ** 20 + 1) % 65536:][:1000]


@pytest.mark.windows
def test_bytes_that_xml_can_not_carry(host, guest, api):
    exact = b'a\x1b[1mb\x00c\r\n\xff\xfe\xc3'
    cmd_id = api.runCmd('one', sys.executable, ['-c', 'import os; os.write(1, %r)' % exact])
    results = host.results(cmd_id)
    assert base64.b64decode(results['out64']) == exact
    assert read_output(api, cmd_id, 'out') == exact
    text = b'esc \x1b nul \x00 return \r end'
    cmd_id = api.runCmd('one', sys.executable, ['-c', 'import os; os.write(1, %r)' % text])
    assert base64.b64decode(host.results(cmd_id)['out64']) == text


def test_a_daemon_left_behind_does_not_hold_the_result(host, guest):
    begin = time.monotonic()
    daemon = sleeps(71)
    results = host.run('one', 'sh', '-c', 'echo early; %s & exit 5' % daemon)
    assert time.monotonic() - begin < 10
    assert (results['out'], results['exitCodeOrSignal']) == ('early\n', 5)
    end_processes(daemon)


def test_output_and_usage_of_a_running_command(host, guest, api):
    program = ('import os, sys, time\n'
               'print("begun", flush=True)\n'
               'open(os.environ["VM_PROGRESS_FILE"], "w").write("42 %")\n'
               'children = [os.fork() or time.sleep(60) for _ in range(2)]\n'
               'while True: pass\n')
    cmd_id = api.runCmd('one', sys.executable, ['-c', program])
    try:
        wait_until(lambda: api.getCmdStatus(cmd_id)['resources'].get('ru_utime', 0) > 0.3, 20)
        status = api.getCmdStatus(cmd_id)
        assert status['state'] == 'running' and status['age'] < 1
        assert status['progress'] == '42 %' and status['processes'] >= 3
        assert status['resources']['ru_maxrss'] > 1000
        part = api.getCmdOutput(cmd_id, 'out', 2)
        assert (part['data'].data, part['eof']) == (b'gun\n', False)
    finally:
        assert api.signalCmd(cmd_id, 'KILL') is True
    results = host.results(cmd_id)
    assert (results['state'], results['exitCodeOrSignal']) == ('signaled', 9)


# --- exact usage ---

@pytest.mark.slow
@pytest.mark.once
@pytest.mark.skipif(not os.path.exists('/usr/bin/time'), reason='needs /usr/bin/time (package time)')
def test_usage_agrees_with_time(host, tmp_path):
    """Three programs on three guests at once: the agents tell what /usr/bin/time tells of the same run."""
    together = run_together(host, tmp_path, ['/usr/bin/time', '-v', '-o'])
    for n, usage in enumerate(together):
        cpu, memory = read_time((tmp_path / ('time%d' % n)).read_text())
        assert cpu - 0.02 <= usage['ru_utime'] + usage['ru_stime'] <= 1.02 * cpu + 0.05
        # A tenth; but Linux counts pages in batches, for each processor: gzip's vary by some 250 KiB here.
        assert abs(usage['ru_maxrss'] - memory) <= max(0.1 * memory, 256)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.skipif(not os.path.exists('/usr/bin/time'), reason='needs /usr/bin/time (package time)')
@pytest.mark.skipif(not os.environ.get('VMHOST_FULL'), reason='depends on who else is there: VMHOST_FULL=1')
def test_usage_agrees_with_time_of_the_program_alone(host, tmp_path):
    """The least of some rounds: neighbours on a shared machine cost a program's time, too."""
    rounds = []
    for _ in range(5):
        together = [(usage['ru_utime'] + usage['ru_stime'], usage['ru_maxrss'])
                    for usage in run_together(host, tmp_path)]
        rounds.append(together + [time_of(program) for program in programs(tmp_path)])
        cpu, memory = ([min(each) for each in zip(*([one[n] for one in each] for each in rounds))]
                       for n in range(2))
        ratios = [ours / single for least in (cpu, memory) for ours, single in zip(least[:3], least[3:])]
        if all(0.9 <= ratio <= 1.1 for ratio in ratios):
            return
    raise AssertionError('CPU %s, memory %s' % (ratios[:3], ratios[3:]))


def programs(tmp_path):
    """gzip of 50 MB, Python that computes for some seconds, and one that forks four children."""
    data = tmp_path / 'data'
    if not data.exists():
        block = bytes(random.Random(1).getrandbits(8) for _ in range(65536))
        data.write_bytes((block + b'x' * 65536) * 400)
    forks = ('import os\n'
             'def work(): sum(i * i for i in range(4000000))\n'
             'for n in range(4):\n'
             '    if not os.fork(): work(); os._exit(0)\n'
             'for n in range(4): os.wait()\n')
    return [['gzip', '-9', '-c', str(data)],
            [sys.executable, '-c', 'sum(i * i for i in range(30000000))'],
            [sys.executable, '-c', forks]]


def run_together(host, tmp_path, before=()):
    """The usage of each program, of all at once; ``before``: words before it, and before a file's name."""
    with contextlib.ExitStack() as stack, host.api as api:
        for n in range(3):
            stack.enter_context(Agent(tmp_path / ('g%d' % n), host, 'usage%d' % n))
        words = [list(before) + [str(tmp_path / ('time%d' % n))] * bool(before) + program
                 for n, program in enumerate(programs(tmp_path))]
        ids = [api.runCmd('usage%d' % n, 'sh', ['-c', 'exec "$@" > /dev/null', 'sh'] + words[n])
               for n in range(3)]
        return [host.results(cmd_id, 300)['resources'] for cmd_id in ids]


def time_of(program):
    """CPU seconds and KiB, by /usr/bin/time -v."""
    run = subprocess.run(['/usr/bin/time', '-v'] + program, stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE, universal_newlines=True)
    return read_time(run.stderr)


def read_time(told):
    user, system = re.findall(r'(?:User|System) time \(seconds\): ([0-9.]+)', told)
    return float(user) + float(system), int(re.search(r'Maximum resident.*: (\d+)', told).group(1))


# --- many ---

@pytest.mark.slow
@pytest.mark.once
def test_multicast_to_many_guests(host, tmp_path):
    """Real agents; bench/guests.py has 300, and a test of the soak those that send much."""
    many = 20 if FULL else 8
    agents = [Agent(tmp_path / ('m%d' % n), host, 'many%d' % n) for n in range(many)]
    try:
        for agent in agents:
            agent.start(wait=False)
        with host.api as api:
            wait_until(lambda: len([name for name in api.listVMs() if name.startswith('many')]) == many, 90)
            cmd_id = api.runCmdOnAll('many*', 'sh', ['-c', 'echo $$'])
            wait_until(lambda: api.waitCmd(cmd_id, 10), 60)
            results = api.getCmdResults(cmd_id)
            assert sorted(results) == sorted('%s@many%d' % (cmd_id, n) for n in range(many))
            assert all(result['exitCodeOrSignal'] == 0 for result in results.values())
            assert len({result['out'] for result in results.values()}) == many
            assert len(api.listCmds({'cmdId': cmd_id})) == many
    finally:
        for agent in agents:
            agent.process.send_signal(signal.SIGTERM)
        for agent in agents:
            agent.stop()


# --- runners ---

def runners_of(guest):
    """Pids of the runners: the fork server's children."""
    found = []
    for pid in children_of(guest.process.pid):
        found += children_of(pid)
    return found


def children_of(pid):
    with open('/proc/%d/task/%d/children' % (pid, pid)) as file:
        return [int(word) for word in file.read().split()]


@pytest.mark.once
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='looks into /proc')
def test_a_runner_runs_one_command_after_the_other(host, guest):
    """And nothing of a command stays for the next one: priority, limits, folder, environment, descriptors."""
    show = ('ulimit -n; nice; pwd; echo $LEFT; '      # its parent was the starter, that goes within moments
            'until ls /proc/$(awk "/^PPid/ {print \\$2}" /proc/$$/status)/fd >list; do :; done; wc -l <list')
    *plain, descriptors = host.run('one', 'sh', '-c', show)['out'].splitlines()
    before = runners_of(guest)
    with host.api as api:
        for _ in range(20):
            changed = api.runCmd('one', 'sh', ['-c', show], {'LEFT': 'over'}, '', '',
                                 {'nice': 5, 'limits': {'nofile': 100}})
            failed = api.runCmd('one', 'no-such-program')
            assert api.waitCmd(changed, 20) and api.waitCmd(failed, 20)
            assert api.getCmdResults(changed)['out'].splitlines()[:2] == ['100', str(os.nice(0) + 5)]
    for _ in range(20):
        *shown, count = host.run('one', 'sh', '-c', show)['out'].splitlines()
        assert shown == plain
        assert int(count) < int(descriptors) + 30      # it may have just begun: one a command would be 40
    assert len(set(runners_of(guest)) - set(before)) <= 1       # for two commands at once


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='looks into /proc')
def test_a_killed_runner_is_replaced(host, guest):
    host.run('one', 'true')
    killed = runners_of(guest)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not set(killed) & set(runners_of(guest)))
    assert host.run('one', 'sh', '-c', 'exit 3')['exitCodeOrSignal'] == 3


# --- what the API refuses ---

def post(host, body, **headers):
    address, port = host.address.rsplit(':', 1)
    connection = http.client.HTTPConnection(address, int(port), timeout=20)
    token = base64.b64encode(('vmhost:' + host.token).encode()).decode()
    headers = {name.replace('_', '-'): value for name, value in headers.items()}
    if 'Authorization' not in headers:
        headers['Authorization'] = 'Basic ' + token
    connection.request('POST', '/RPC2', body, {k: v for k, v in headers.items() if v is not None})
    response = connection.getresponse()
    answer = response.status, response.read()
    connection.close()
    return answer


CALL = xmlrpc.client.dumps((), 'agentInfo').encode()


def test_who_may_call(host):
    assert post(host, CALL)[0] == 200
    assert post(host, CALL, Authorization=None)[0] == 401
    assert post(host, CALL, Authorization='Basic ' + base64.b64encode(b'vmhost:no').decode())[0] == 401
    assert post(host, CALL, Authorization='Basic \xff')[0] == 401
    assert post(host, CALL, Origin='http://127.0.0.1')[0] == 403
    assert post(host, CALL, Host='evil.example')[0] == 403
    assert post(host, CALL, Host='evil.example:50505')[0] == 403
    assert post(host, CALL, Host='localhost:50505')[0] == 200


@pytest.mark.windows
def test_malformed_calls_get_their_fault(host, api):
    for body in (b'', b'<', b'<methodCall/>', b'\xff\xfe', CALL[:-20], b'<a>' * 20000):
        status, answer = post(host, body)
        assert status == 200
        with pytest.raises(xmlrpc.client.Fault):
            xmlrpc.client.loads(answer)
    assert fault_of(api.getCmdOutput, 'x', 'out', float('nan')).faultCode == -32602
    assert fault_of(api.noSuchMethod).faultCode == -32601
    assert fault_of(api.getVM).faultCode == -32602
    assert fault_of(api.runCmd, 'one', 'true', 'not a list').faultCode == -32602
    assert fault_of(api.runCmd, 'one', 'true', [], {}, '', '', {'typo': 1}).faultCode == -32602
    assert fault_of(api.runCmd, 'nobody', 'true').faultCode == 1
    assert fault_of(api.getCmdResults, 'no-such-id').faultCode == 3
    assert fault_of(api.start, 'one').faultCode == 9
    assert 'fileForStdin' in fault_of(api.runCmd, 'one', 'cat', [], {}, '', '',
                                      {'stdin': 'x' * 2000000}).faultString


@pytest.mark.windows
def test_system_methods(host, api):
    names = api.system.listMethods()
    assert {'runCmd', 'listAvailableVMs', 'unpause', 'system.multicall'} <= set(names)
    for name in names:
        assert api.system.methodHelp(name)
        assert api.system.methodSignature(name)
    multi = xmlrpc.client.MultiCall(api)
    multi.listVMs()
    multi.noSuchMethod()
    answers = multi()
    assert isinstance(answers[0], list)
    with pytest.raises(xmlrpc.client.Fault):
        answers[1]


def test_names_and_ids(host, guest, api):
    assert api.getNamesToIdsMapping()['one'] == 'one'
    assert api.getVM('one')['agent'] == 'alive'
    assert api.getState('one') == 'Running'
    assert api.ping('one') == 'PONG from one'
    info = api.agentInfo()
    assert info['hypervisor'] == 'none' and info['vms'] >= 1


@pytest.mark.windows
def test_the_journal_tells_the_story(host, guest, api):
    last = api.getEvents(0, 0)['last']
    while True:
        more = api.getEvents(last, 0)
        if not more['events']:
            break
        last = more['last']
    cmd_id = api.runCmd('one', 'true')
    host.results(cmd_id)
    seen = []
    wait_until(lambda: seen.extend(api.getEvents(seen[-1]['seq'] if seen else last, 5)['events'])
               or any(event['type'] == 'cmd-finished' for event in seen), 20)
    story = [event for event in seen if event['cmdId'] == cmd_id]
    assert [story[0]['type'], story[-1]['type']] == ['cmd-submitted', 'cmd-finished']
    assert 'vmhost@127.0.0.1' in story[0]['text'] and 'true' in story[0]['text']
    assert api.getCmdDetails(cmd_id)['cmd'] == 'true'
    assert cmd_id in api.listFinishedCmds()
    assert api.forgetCmd(cmd_id) is True
    assert fault_of(api.getCmdResults, cmd_id).faultCode == 3


# --- hostile guests ---

def hostile(host, *frames):
    """A connection that says these frames; gives what came back until the end, or 2 s of silence."""
    with socket.create_connection(('127.0.0.1', host.broker_port), timeout=10) as connection:
        connection.sendall(b'CONNECT\naccept-version:1.2\nhost:x\n\n\0')
        answer = connection.recv(65536)
        assert answer.startswith(b'CONNECTED')
        connection.settimeout(2)
        answer = b''
        try:
            for frame in frames:
                connection.sendall(frame)
            while True:
                data = connection.recv(65536)
                if not data:
                    break
                answer += data
        except (socket.timeout, ConnectionError):
            pass
        return answer


def send(destination, body, **headers):
    head = ''.join('%s:%s\n' % (k.replace('_', '-'), v) for k, v in headers.items())
    return ('SEND\ndestination:%s\n%s\n%s\0' % (destination, head, body)).encode()


def test_a_name_that_is_a_glob_means_itself_alone_where_no_other_matches(host, guest, tmp_path):
    with Agent(tmp_path, host, 'star', name='*'):
        done = host.verb('run', '*', '--', 'echo', 'all')
        assert b'one: all\n' in done.stdout and b'*: all\n' in done.stdout


def test_a_results_orphan_can_be_read_and_forgotten(host, guest, api):
    with Guest(host.broker_port, 'orphans') as other:
        other.join().word('CMD_RESULTS', **{'cmd-id': 'or@phan', 'finished': True, 'out': 'x'})
        other.hear('CMD_ACK')
    wait_until(lambda: [event for event in api.getEvents(-20)['events'] if event['cmdId'] == 'or@phan'], 10)
    assert api.getCmdResults('or@phan')['out'] == 'x'
    assert api.forgetCmd('or@phan') is True
    assert fault_of(api.getCmdResults, 'or@phan').faultCode == 3


@pytest.mark.windows
def test_hostile_words_harm_nobody(host, guest, api):
    before = api.agentInfo()['aint']
    with Guest(host.broker_port, 'evil') as evil:
        evil.join()
        for body in ('NONSENSE', 'CMD_RESULTS {', 'CMD_RESULTS []', '', 'CMD_STATUS ' + '[' * 100000,
                     'CMD_RUN {}', '__import__', 'CMD_STATUS {"state": NaN}',
                     'CMD_RESULTS {"cmd-id": "x", "exitCodeOrSignal": 1e999}', 'PONG {"ping-id": {}}',
                     'CMD_RESULTS {"cmd-id": 5, "state": "x"}'):
            evil.body(body)
        wait_until(lambda: api.agentInfo()['aint'] >= before + 8, 10)
        assert api.agentInfo()['untrusted'] == 0
    assert host.run('one', 'echo', 'well')['out'] == 'well\n'


def test_a_guest_can_not_forge_or_listen(host, guest, api):
    cmd_id = api.runCmd('one', 'sleep', ['2'])
    forged = json.dumps({'cmd-id': cmd_id, 'state': 'exited', 'finished': True, 'exitCodeOrSignal': 66,
                         'from': 'one', 'id': 'one'})
    with Guest(host.broker_port, 'forger') as forger:
        forger.join().body('CMD_RESULTS ' + forged)
        forger.hear('CMD_ACK')                 # an orphan of its own
        forger.put('/topic/cmd_responses', {'from': 'one'}, 'CMD_RESULTS ' + forged)
        forger.take_error()
    assert b'ERROR' in hostile(host, send('/topic/cmd_requests', 'CMD_RUN', to='one', cmd='true'))
    for topic in ('/topic/cmd_responses', '/topic/connections', '/queue/x'):
        assert b'ERROR' in hostile(host, ('SUBSCRIBE\nid:0\ndestination:%s\n\n\0' % topic).encode())
    with Guest(host.broker_port, 'spy') as spy, Guest(host.broker_port, 'one') as thief:
        spy.join()
        thief.put('/topic/connections', {'id': 'one'}, 'HELLO {"nonce": "%s"}' % ('0' * 32))
        assert host.run('one', 'echo', 'a-secret')['out'] == 'a-secret\n'
        heard = [frame.body for listener in (spy, thief) for frame in listener.before_now_as_guest()]
    assert not [body for body in heard if b'a-secret' in body]
    assert host.results(cmd_id)['exitCodeOrSignal'] == 0


def test_giant_and_half_frames(host, guest, api):
    giant = b'SEND\ndestination:/topic/connections\ncontent-length:104857600\n\n'
    assert b'ERROR' in hostile(host, giant + b'x' * 1000)
    assert b'ERROR' in hostile(host, b'SEND\ndestination:/topic/connections\n\n', b'x' * (2 * 2 ** 20))
    hostile(host, b'SEND\ndestination:/top')
    assert api.ping('one') == 'PONG from one'


def test_automatic_ports_stay_the_same_over_restarts(tmp_path):
    """Guests know the broker by its port, and programs the API: neither would find the host again."""
    host = Host(tmp_path / 'host', broker={'port': 'auto'}, xmlrpc_port='auto')
    with host, Agent(tmp_path / 'guest', host, '02:00:00:00:00:01') as guest:
        address, port = host.address, host.broker_port
        host.stop()
        host.start()
        assert (host.address, host.broker_port) == (address, port)
        wait_until(guest.has_joined, 40)
        host.stop()
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(('127.0.0.1', port))
            other.listen(1)
            host.start()
        assert host.address == address and host.broker_port != port


@pytest.mark.parametrize('text', ['', '99999', '-1', 'abc'])
def test_a_noted_port_that_is_none_is_passed_over(tmp_path, text):
    folder = hoststate.StateFolder(str(tmp_path / 'state'))
    try:
        folder.write('broker.port', text)
        assert folder.port('broker', '127.0.0.1', 0) == 0
        assert folder.port('broker', '127.0.0.1', 61613) == 61613
    finally:
        folder.close()


def test_a_broker_that_cannot_be_reached_is_named(tmp_path):
    port = free_port()
    with Host(tmp_path / 'host', broker={'embedded': 'no', 'host': '127.0.0.1', 'port': port}) as host:
        with host.api as api:
            broker = api.agentInfo()['broker']
        assert (broker['address'], broker['connected']) == ('127.0.0.1:%d' % port, False)
        shown = host.verb('check').stdout.decode()
        assert 'broker at 127.0.0.1:%d' % port in shown and 'no connection: is it running' in shown


@contextlib.contextmanager
def no_longer_ignored(number):
    """By what is started within: under nohup, say, an agent leaves it so."""
    before = signal.getsignal(number)
    if before == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, before)



# --- start and stop ---

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, getattr(signal, 'SIGHUP', None)])
def test_stops_within_three_seconds_and_leaves_nothing(tmp_path, number):
    with no_longer_ignored(number):
        host = Host(tmp_path / 'host').start()
        guest = Agent(tmp_path / 'guest', host, 'g').start()
    address, port = host.address.split(':')
    begin = time.monotonic()
    assert guest.stop(number, 3) == 0
    with host.api as api:
        wait_until(lambda: api.getVM('g')['left'])
    assert host.stop(number, 3) == 0, host.log()
    assert time.monotonic() - begin < 6
    assert 'Traceback' not in host.log() + guest.log()
    assert 'vmhost ends: %s' % signal.Signals(number).name in host.log() or host.on_windows
    with socket.socket() as again:
        if os.name == 'posix':
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((address, int(port)))
    # Its idle runners, too.
    wait_until(lambda: not processes_called(' '.join(command('vmguest', guest.ini))), 3)
    assert 'xmlrpc.address' not in os.listdir(host.state)


SLOW_WAITS = """
import threading, time
wait = threading.Condition.wait
def slow(self, timeout=None):
    if timeout is not None and threading.current_thread() is threading.main_thread():
        time.sleep(1)
    return wait(self, timeout)
threading.Condition.wait = slow
"""


def test_stops_whatever_it_is_doing(tmp_path, monkeypatch):
    """Also while the main thread holds a lock, as it does for a moment whenever it waits."""
    (tmp_path / 'sitecustomize.py').write_text(SLOW_WAITS)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    for _ in range(3):
        assert Host(tmp_path / 'host').start().stop(signal.SIGTERM, 10) == 0


def test_a_command_outlives_host_and_agent(tmp_path):
    with Host(tmp_path / 'host') as host:
        guest = Agent(tmp_path / 'guest', host, 'g').start()
        try:
            with host.api as api:
                cmd_id = api.runCmd('g', 'sh', ['-c', 'echo $$ >> runs; sleep 3; echo done'])
                wait_until(lambda: api.getCmdStatus(cmd_id)['state'] == 'running', 10)
            guest.stop(signal.SIGKILL)
            host.stop(signal.SIGKILL)
            port = host.broker_port
            host.start()
            assert port != 0
            guest.stop()
            guest = Agent(tmp_path / 'guest', host, 'g').start()
            results = host.results(cmd_id)
            assert (results['out'], results['state']) == ('done\n', 'exited')
            with open(os.path.join(guest.files, 'runs')) as runs:
                assert len(runs.readlines()) == 1
        finally:
            guest.stop()


def test_all_of_a_multicast_tell_how_far_they_are(host, guest, api, tmp_path):
    with Agent(tmp_path, host, 'two', max_commands=1):
        blocks = api.runCmd('two', 'sleep', ['60'])
        multicast = api.runCmdOnAll('[ot]??', 'sleep', ['60'])
        keys = {multicast + '@one': 'running', multicast + '@two': 'queued'}
        wait_until(lambda: {key: status['state'] for key, status in
                            api.getCmdStatus(multicast).items() if key in keys} == keys, 10)
        assert all(0 <= status['age'] < 2 for status in api.getCmdStatus(multicast).values())
        assert api.getCmdDetails(multicast + '@two')['vm'] == 'two'
        shown = api.listCmds({'cmdId': multicast + '@two'})
        assert [(row['cmdId'], row['state']) for row in shown] == [(multicast + '@two', 'queued')]
        assert not any(event['type'] == 'cmd-running' and event['cmdId'] == multicast + '@two'
                       for event in api.getEvents(0)['events'])
        for cmd_id in (blocks, multicast):
            api.signalCmd(cmd_id, 9)
        wait_until(lambda: api.waitCmd(blocks, 20) and api.waitCmd(multicast, 20), 60)


def test_a_kill_is_for_good_though_nobody_answers(host, tmp_path, api):
    agent = Agent(tmp_path, host, 'deaf').start()
    agent.stop(signal.SIGKILL)
    cmd_id = api.runCmd('deaf', 'sleep', ['60'])
    assert api.signalCmd(cmd_id, 'TERM') is True
    with agent:
        assert host.run('deaf', 'true')['state'] == 'exited'
        results = host.results(cmd_id, 60)
        assert (results['state'], results['by']) == ('cancelled', 'signalCmd')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_full_disk_behind_standard_output(host, guest, api):
    with open('/dev/full', 'wb') as full:
        done = subprocess.run(host.command('run', 'one', '--', 'sh', '-c', 'echo hi; sleep 0.2'), stdout=full,
                              stderr=subprocess.PIPE, timeout=60)
        assert done.returncode == 255 and b'No space' in done.stderr and b'Traceback' not in done.stderr
        cmd_id = re.search('continues as ([0-9a-f-]+)', done.stderr.decode()).group(1)
        assert host.results(cmd_id)['out'] == 'hi\n'
        done = subprocess.run(host.command('ls'), stdout=full, stderr=subprocess.PIPE, timeout=60)
        assert done.returncode == 255 and b'Traceback' not in done.stderr


def test_a_command_waits_for_its_guest(tmp_path):
    with Host(tmp_path / 'host', vm_gc_grace=2) as host:
        with Agent(tmp_path / 'guest', host, 'g'):
            pass
        with host.api as api:
            wait_until(lambda: not api.listVMs(), 10)
            assert fault_of(api.runCmd, 'g', 'true').faultCode == 2
            cmd_id = api.runCmd('g', 'true', [], {}, '', '', {'queue': True})
            assert api.getCmdStatus(cmd_id)['state'] == 'queued'
        with Agent(tmp_path / 'guest', host, 'g'):
            assert host.results(cmd_id)['exitCodeOrSignal'] == 0


def test_a_caller_that_no_thread_is_left_for_is_turned_away(tmp_path, monkeypatch):
    (tmp_path / 'ini').write_text('[Host]\nxmlrpc_port = 0\nxmlrpc_auth = no\n')
    host = hostagent.Host(agent.read_settings(str(tmp_path / 'ini'), hostconfig.SETTINGS))
    start = threading.Thread.start

    def start_none(thread):
        if thread.name.startswith(('xmlrpc-', 'transfer-')):
            raise RuntimeError('can\'t start new thread')
        start(thread)
    try:
        host.server = hostserver.Server(host)
        host.server.start()
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, 'start', start_none)
            with socket.create_connection(host.server.address, 20) as sock:
                assert sock.recv(1) == b''
            workers, done = hostworkers.Workers('transfer', 1), threading.Event()
            workers.do(done.set)
        workers.do(lambda: None)
        assert done.wait(20)               # what could not begin begins with the next
        workers.stop(time.monotonic() + 20)
        with xmlrpc.client.ServerProxy('http://%s:%d/' % host.server.address) as api:
            assert api.listVMs() == []
    finally:
        host.stop()


def test_ports_that_the_host_finds_by_itself_are_told_by_its_folder(tmp_path):
    with Host(tmp_path / 'host', broker={'port': 'auto'}, xmlrpc_port='auto') as host, host.api as api:
        with open(os.path.join(host.state, 'broker.address')) as file:
            assert file.read().strip() == api.agentInfo()['broker']['address']
    assert 'broker.address' not in os.listdir(host.state)
