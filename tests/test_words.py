"""The words that hands know from ssh, docker and supervisor do here what they do there."""

import json
import os
import re
import signal
import subprocess
import sys
import types

import pytest
from agents import TOP, Agent, Host
from helpers import wait_until
from test_cli import SCRIPT
from test_cli import verb as said

import clicommands
import hostcli

pytestmark = [pytest.mark.once, pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]


def test_run_needs_no_dashes(host, guests):
    assert said(host, 'exec', 'one', 'echo', '-n', 'a', '--', 'b') == 'a -- b'
    assert said(host, 'run', '-e', 'A=1', 'one', 'sh', '-c', 'echo $A; exit 4', code=4) == '1\n'
    assert said(host, 'run', 'one', '-e', 'A=2', '--', 'sh', '-c', 'echo $A') == '2\n'
    assert said(host, 'run', 'one', '--', 'echo', '-d') == '-d\n'


def test_run_takes_what_the_api_takes(host, guests):
    told = said(host, 'run', '-n', '7', '-l', 'nofile=50', '--clear-env', '-e', 'PATH=/usr/bin:/bin', 'one',
                'sh', '-c', 'nice; ulimit -n; env | grep -c HOME; true')
    assert told.split() == [str(os.nice(0) + 7), '50', '0']
    first = said(host, 'run', '-d', '--id', 'mine-1', 'one', 'true').strip()
    assert first == 'mine-1' == said(host, 'run', '-d', '--id', 'mine-1', 'one', 'true').strip()
    done = host.verb('run', '-T', '0.3', '-k', '0.2', 'one', 'sh', '-c',
                     'trap "" TERM; sleep 60 & wait; wait')
    assert done.returncode == 128 + signal.SIGKILL
    if os.geteuid() == 0:
        assert said(host, 'run', '-u', 'root', 'one', 'id', '-un') == 'root\n'
        assert host.verb('run', '-u', 'no-such', 'one', 'id').returncode == 255
    assert host.verb('run', '-l', 'nothing=1', 'one', 'true').returncode == 255


def test_bytes_that_are_no_text_are_arguments(host, guests):
    done = subprocess.run([os.fsencode(word) for word in host.command('run', 'one', 'printf', '%s')]
                          + [b'\xff\x01\r'], stdout=subprocess.PIPE, timeout=60)
    assert done.stdout == b'\xff\x01\r'


@pytest.mark.parametrize('length', [5000, 100000])
def test_a_long_name_of_a_program_or_folder_ends_nobodys_connection(host, guests, length):
    name, odd = 'x' * length, 'é:' * (length // 2)
    for cmd, path in ((name, ''), ('true', name), (odd, odd)):
        cmd_id = host.api.runCmd('one', cmd, ['é:' * 600], {}, path)
        assert host.api.waitCmd(cmd_id, 20)
        assert host.api.getCmdResults(cmd_id)['error'].startswith('EN')      # ENOENT, ENAMETOOLONG
    assert said(host, 'run', 'one', 'echo', 'on') == 'on\n'


def test_logs_tail_and_wait_exit_with_the_code(host, guests):
    cmd_id = said(host, 'run', '-d', 'one', 'sh', '-c', 'seq 1 200000; echo e >&2; exit 3').strip()
    assert host.verb('wait', cmd_id).returncode == 3
    assert host.verb('logs', '-f', cmd_id).returncode == 3
    assert said(host, 'logs', '--tail', '2', cmd_id) == '199999\n200000\n'
    assert said(host, 'out', '--tail', '0', cmd_id) == ''
    assert len(said(host, 'out', '-n', '100000', cmd_id).splitlines()) == 100000
    another = said(host, 'run', '-d', 'two', 'echo', 'x').strip()
    assert host.verb('wait', another, cmd_id).returncode == 3
    assert said(host, 'out', another, another) == 'x\nx\n'


def test_what_programs_are_told_of_themselves(host, guests):
    cmd_id = said(host, 'run', '-d', 'one', 'sh', '-c', 'echo $VM_NAME $VM_CMD_ID').strip()
    assert host.verb('wait', cmd_id).returncode == 0
    assert said(host, 'out', cmd_id) == 'one %s\n' % cmd_id
    assert cmd_id in said(host, 'ps', '-aq', 'one')


def test_ps_of_ids_ends_and_times(host, guests):
    cmd_id = said(host, 'run', '-d', 'one', 'sh', '-c', 'exit 9').strip()
    host.verb('wait', cmd_id)
    ids = said(host, 'ps', '-q').splitlines()
    assert cmd_id in ids and all(re.match(r'[\w-]+(@\w+)?$', line) for line in ids)
    line, = [line for line in said(host, 'ps').splitlines() if cmd_id in line]
    assert ' exited 9 ' in line and ' 0 s ' in line
    shown = said(host, 'top')          # what runs, as everywhere
    assert 'MEMORY' in shown.splitlines()[0] and cmd_id not in shown


@pytest.mark.parametrize('option', [('-9',), ('-KILL',), ('-SIGKILL',), ('-s', '9'), ('-s', 'KILL')])
def test_kill_as_hands_know_it(option, host, guests):
    ids = [said(host, 'run', '-d', name, 'sleep', '60').strip() for name in ('one', 'two')]
    assert host.verb('kill', *(option + tuple(ids))).returncode == 0
    assert [host.results(cmd_id)['exitCodeOrSignal'] for cmd_id in ids] == [9, 9]
    assert host.verb('kill', 'no-such', ids[0]).returncode == 1


def test_short_options_that_are_written_together():
    def read(verb, *words):
        return hostcli.read_arguments(hostcli.VERBS[verb], list(words))
    args = read('run', '-itT5', 'one', 'ls', '-la')
    assert (args.stdin, args.terminal, args.timeout, args.command) == (True, True, 5, ['ls', '-la'])
    args = read('ps', '-aqn3', 'one')
    assert (args.all, args.quiet, args.number, args.vm) == (True, True, 3, ['one'])
    assert read('kill', '-9', 'id').signal == '9' and read('out', '-n1', 'id').tail == 1
    with pytest.raises(SystemExit):
        read('ps', '-qx')


@pytest.mark.parametrize('line, taken', [
    ('start -all', '-all'), ('stop --force -all', '-all'), ('info --x=1', '--x=1'), ('stop --force', '')])
def test_a_name_that_looks_like_an_option_is_told_how_it_is_none(capsys, line, taken):
    verb, *words = line.split()
    with pytest.raises(SystemExit):
        hostcli.read_arguments(hostcli.VERBS[verb], words)
    told = capsys.readouterr().err
    wanted = '%s is no option here; a name that begins with - comes after --: `%s -- %s`'
    assert (wanted % (taken, verb, taken) if taken else 'the following arguments are required: VM') in told


def test_rerun(host, guests):
    cmd_id = said(host, 'run', '-d', '-e', 'A=5', 'one', 'sh', '-c', 'echo $A $PWD; exit 2').strip()
    assert host.verb('wait', cmd_id).returncode == 2
    again = host.verb('rerun', cmd_id)
    assert again.returncode == 2 and again.stdout == host.verb('out', cmd_id).stdout
    assert said(host, 'rerun', '-d', cmd_id).strip() != cmd_id
    done = host.verb('run', '-i', 'one', 'cat', input=b'\xff\x00')
    ids = said(host, 'ps', '-q').split()
    assert done.stdout == b'\xff\x00' == host.verb('rerun', ids[-1]).stdout
    assert host.verb('rerun', 'no-such').returncode == 255
    assert b'`ps one` lists those' in host.verb('logs', 'one').stderr     # docker's would be a machine's


def test_cp_both_ways(host, guests, tmp_path):
    (tmp_path / 'here').write_text('text')
    assert said(host, 'cp', str(tmp_path / 'here'), 'one:there') == ''
    assert said(host, 'cp', 'one:there', str(tmp_path / 'back')) == ''
    assert (tmp_path / 'back').read_text() == 'text'
    for words in (('a', 'b'), ('one:a', 'two:b')):
        done = host.verb('cp', *words)
        assert done.returncode == 1 and b'VM:PATH' in done.stderr
    (tmp_path / 'a:b').write_text('colon')
    assert said(host, 'cp', './a:b', 'one:colon', cwd=str(tmp_path)) == ''


def test_ls_of_one_and_inspect(host, guests):
    assert [line.split()[0] for line in said(host, 'ls', 'two').splitlines()] == ['NAME', 'two']
    assert [vm['name'] for vm in json.loads(said(host, 'list', 't*', '--json'))] == ['two']
    assert host.verb('ls', 'nobody').returncode == 1
    assert json.loads(said(host, 'inspect', 'one', '--json'))['name'] == 'one'


@pytest.mark.parametrize('words, source', [
    ('put one -- -- there', '--'), ('put -- one -- there', '--'), ('get one -- there', 'there'),
    ('get -- one -x', '-x')])
def test_a_name_may_be_two_dashes(words, source):
    verb, *words = words.split()
    args = hostcli.read_arguments(hostcli.VERBS[verb], words)
    assert (args.vm, args.source) == ('one', source)


def test_help_and_version():
    def run(*words):
        done = subprocess.run([sys.executable, SCRIPT] + list(words), stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)
        return done.returncode, done.stdout.decode(), done.stderr.decode()
    assert run('version') == run('--version')
    assert run('help') == run('--help') == run('host.ini', '--help')
    assert run('-v') == run('--version')
    for typed in ('mount', 'rename', 'images', 'edit'):      # none of these is what a verb does
        assert 'did you mean' not in run(typed, 'x')[2]
    code, text, _ = run('help', 'run')
    assert code == 0 and 'VM [--] CMD' in text and '--kill-after' in text
    assert run('help', 'exec') == run('help', 'run') and '--tail' in run('help', 'logs')[1]
    code, _, text = run('help', 'restart')
    assert code == 2 and '(did you mean stop, and start; reset pulls the plug?)' in text
    for words in ('put', 'one', 'a', 'b', 'there/'), ('cp', 'a', 'b', 'one:'), ('get', 'one', 'a', 'b', '.'):
        code, _, text = run(*words)
        assert code == 2 and 'one SRC at a time' in text, text
    assert '--nonsense' in run('put', 'one', 'a', 'b', '--nonsense')[2]
    for typed, meant in (('delete', 'rm'), ('ssh', 'shell, or run'), ('download', 'get'),
                         ('journalctl', 'events -f'), ('scancel', 'kill'), ('purge', 'cleanup'),
                         ('sftp', 'cp'),
                         ('shel', 'shell'), ('creat', 'create'), ('lgs', 'logs'), ('lgos', 'logs'),
                         ('sl', 'ls'), ('Run', 'run'), ('SSH', 'shell, or run'),
                         ('attach', 'shell VM ID, or out -f')):
        code, _, text = run(typed, 'x')
        assert code == 2 and '(did you mean %s?)' % meant in text


@pytest.mark.parametrize('words', [['run', '--help'], ['kill', '--help'], ['--help'], ['ü.ini', 'ls']])
def test_words_beyond_ascii_where_the_locale_has_none(words, tmp_path):
    """A Python 3.6 takes LC_ALL=C at its word."""
    environment = dict(os.environ, LC_ALL='C', PYTHONCOERCECLOCALE='0', PYTHONUTF8='0')
    environment.pop('PYTHONIOENCODING', None)
    done = subprocess.run([sys.executable.encode(), SCRIPT.encode()] + [word.encode() for word in words],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=str(tmp_path))
    text = (done.stdout + done.stderr).decode('ascii')
    assert done.returncode == (0 if '--help' in words else 1) and 'Traceback' not in text, text
    assert '...' in text if words[0] in ('run', '--help') else '\\u2026' not in text


@pytest.mark.parametrize('option', ['-u', '-C', '-I', '--user'])
def test_an_option_that_is_empty_is_not_taken_for_none(option):
    done = subprocess.run([sys.executable, SCRIPT, 'run', option, '', 'one', 'id'], stderr=subprocess.PIPE)
    assert done.returncode == 255 and b'it is empty' in done.stderr


def test_closed_standard_streams(host, guests):
    for closed in ('>&-', '2>&-', '<&-', '>&- 2>&- <&-'):
        for words in ('ls', 'run one -- echo x', 'run -i one -- cat', 'nonsense'):
            done = subprocess.run(['sh', '-c', 'exec "$@" ' + closed, 'sh'] + host.command(*words.split()),
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
            assert b'Traceback' not in done.stderr and b'Exception' not in done.stderr, done
            is_lost = closed.startswith('>') and words in ('ls', 'run one -- echo x')      # what they write
            wanted = 2 if words == 'nonsense' else 255 if is_lost else 0
            assert done.returncode == wanted, done


def test_ctrl_c_while_the_program_loads_is_no_traceback():
    """Fingers are quick: here it comes with the import of one of its files."""
    code = ('import runpy, sys\n'
            'class Finder:\n'
            '    def find_spec(self, name, path, target=None):\n'
            '        if name == "cliagent":\n'
            '            raise KeyboardInterrupt\n'
            'sys.meta_path.insert(0, Finder())\n'
            'sys.path.insert(0, sys.argv[1])\n'
            'runpy.run_path(sys.argv[1] + "/vmhost.py", run_name="__main__")\n')
    done = subprocess.run([sys.executable, '-c', code, TOP], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (130, b'', b'')


def test_an_ini_file_is_optional(tmp_path):
    environment = dict(os.environ, XDG_STATE_HOME=str(tmp_path / 'xdg'), HOME=str(tmp_path))
    folder = tmp_path / 'work'
    folder.mkdir()
    done = subprocess.run([sys.executable, SCRIPT, 'ls'], cwd=str(folder), env=environment,
                          stderr=subprocess.PIPE)
    assert done.returncode == 1 and b'no host agent runs here' in done.stderr
    with Host(folder) as host:
        os.rename(host.ini, str(folder / 'host.ini'))
        done = subprocess.run([sys.executable, SCRIPT, 'status', '--json'], cwd=str(folder), env=environment,
                              stdout=subprocess.PIPE)
        assert json.loads(done.stdout.decode())['hypervisor'] == 'none'


def test_many_end_with_a_line_that_tells_who_is_missing(tmp_path):
    with Host(tmp_path / 'host', vm_gc_grace=2) as host:
        with Agent(tmp_path / 'a', host, 'lab1'), Agent(tmp_path / 'b', host, 'lab2') as second, \
                Agent(tmp_path / 'c', host, 'lab3') as third:
            third.stop()
            with host.api as api:
                wait_until(lambda: api.listRegisteredVMs() == ['lab1', 'lab2'], 20)
            done = host.verb('run', 'lab*', 'sh', '-c', 'case "$PWD" in */a/*) exit 0;; esac; exit 4')
            assert done.stderr.decode().splitlines()[-1] == '1 ok, lab2 exited 4, lab3 absent'
            assert done.returncode == 4
            second.process.send_signal(signal.SIGSTOP)         # it hangs
            try:
                done = host.verb('run', '-T', '1', '-k', '1', 'lab*', 'true')
                assert done.stderr.decode().splitlines()[-1] == '1 ok, lab2 absent, lab3 absent'
                assert done.returncode == 255
            finally:
                second.process.send_signal(signal.SIGCONT)
            lives = {line.split()[0]: line.split()[2] for line in said(host, 'ls').splitlines()[1:]}
            assert set(lives) == {'lab1', 'lab2', 'lab3'} and lives['lab3'] == 'left'


def test_who_waits_for_a_machine_that_is_away_is_told():
    """`wait` said nothing for as long as it took."""
    told, answers = [], iter([False, False, True])
    status = {'c@one': {'ended': 0, 'age': -1}, 'c@two': {'ended': 5.0, 'age': 99},
              'c@three': {'ended': 0, 'age': 1}}

    class AwayHost:
        def call(self, method, key, *_):
            return {'waitCmd': lambda: next(answers), 'getCmdStatus': lambda: status[key]}[method]()

    class Told:
        complain = told.append
    clicommands.wait_for_end(AwayHost(), Told, 'c', list(status))
    assert told == ['one does not answer; still waiting'] and list(answers) == []


@pytest.mark.parametrize('words, told', [
    ('run root@one id', '`run -u root one`'), ('shell root@one', '`shell -u root one`'),
    ('cp root@one:a .', 'the user of its agent'), ('put root@one a', 'the user of its agent'),
    ('cp a@b root@one:b', 'the user of its agent'),
    ('out --since 5m ID', '-n N shows its last lines'), ('ps --filter=a', '--json'),
    ('ls -a', 'all are shown'),
    ('status one', '`info one`'), ('stop {id}', 'is a command, and no VM: `kill {id}`'),
    ('rm {id}', 'is a command'), ('start {id}', '`rerun {id}`')])
def test_what_other_tools_have_is_told_as_it_is_here(host, guests, words, told):
    cmd_id = said(host, 'run', '-d', 'one', 'true').strip() if '{id}' in words else ''
    done = host.verb(*words.format(id=cmd_id).split())
    assert done.returncode in (1, 2, 255) and told.format(id=cmd_id) in done.stderr.decode(), done


def test_ps_and_events_of_some_machines(host, guests):
    ids = {name: said(host, 'run', '-d', name, 'true').strip() for name in ('one', 'two')}
    both = ['one', 'two']
    for words, expected in (['o?e'], ['one']), (both, both), (['t*', 'one'], both):
        listed = said(host, 'ps', '-q', '-a', *words).split()
        assert [name for name in both if ids[name] in listed] == expected
        told = said(host, 'events', *words)
        assert [name for name in both if ids[name] in told] == expected
    assert len(said(host, 'ps', '-q', '-n', '1', 'one', 'two').split()) == 1
    assert len(said(host, 'events', '-n', '2', 'one').splitlines()) == 2
    assert ids['one'] in said(host, 'events', '--since', '1h') and said(host, 'events', '--since', '0') == ''
    for verb in 'ps', 'events':
        assert b'no VM matches' in host.verb(verb, 'no*').stderr and host.verb(verb, 'no').returncode == 1


def test_info_has_words_for_a_person(host, guests):
    told = said(host, 'info', 'one')
    assert 'last heard' in told and 'lastSeen' not in told and re.search('clock +[+-]0[.][0-9] s', told), told
    cmd_id = said(host, 'run', '-d', 'one', 'true').strip()
    host.verb('wait', cmd_id)
    told = said(host, 'info', cmd_id)
    assert re.search('peak memory +[0-9.]+ [KM]iB', told) and re.search('(?m)^time +0 s', told), told
    assert 'ru_' not in told and 'wall' not in told, told


def test_ps_tells_times_after_a_guest_agent_was_started_anew(host, tmp_path):
    with Agent(tmp_path, host, 'anew') as guest:
        cmd_id = said(host, 'run', '-d', 'anew', 'sleep', '60').strip()
        wait_until(lambda: ' running ' in said(host, 'ps', 'anew'))
        guest.process.kill()
        guest.process.wait()
        guest.start()
        line = said(host, 'ps', 'anew').splitlines()[-1]
        assert cmd_id in line and re.search(' [0-9]+ s +sleep 60', line), line


def test_who_is_away_is_told_beside_what_was_heard_last():
    vms = [{'name': name, 'agent': life, 'left': False, 'lastSeen': 0}
           for name, life in (('one', 'lost'), ('two', 'alive'), ('three', 'lost'))]
    told = []
    host, screen = types.SimpleNamespace(call=lambda _: vms), types.SimpleNamespace(complain=told.append)
    clicommands.tell_away(host, screen, {'one', 'two'})
    assert told == ['one is away (lost, last heard never): its commands are shown as they were then']
