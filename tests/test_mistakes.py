"""Ten common mistakes: each ends in one sentence that says what to do, and never in a traceback."""

import contextlib
import glob
import os
import re
import socket
import stat
import subprocess
import sys

import pytest
import wine
from agents import ON_WINDOWS, TOP, Agent, Host, posix_host
from helpers import wait_until

import agent

pytestmark = [pytest.mark.once, pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]


def run(*words, program='vmhost.py', python=(), **kwargs):
    """The exit code, and what was said on both outputs."""
    on_windows = ON_WINDOWS and not program.endswith('vmguest.py')
    python = list(python) or (wine.start_of('python') if on_windows else [sys.executable])
    done = subprocess.run(python + [os.path.join(TOP, program)] + list(map(str, words)), timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)
    return done.returncode, done.stdout.decode().replace('\r\n', '\n')


def write(path, text):
    path.write_text(text)
    return path


def host_ini(folder, text=''):
    sections = {'Broker': 'port = 0', 'Host': 'xmlrpc_port = 0', 'Hypervisor': 'hypervisor = none'}
    ini = ''.join('[%s]\n%s\n' % item for item in sections.items() if '[%s]' % item[0] not in text)
    return write(folder / 'host.ini', ini + text)


def sentences(text, *said):
    """Checks that one line says all that, and none of them is a traceback's."""
    if ON_WINDOWS:             # a path is written as there, or as it was typed
        text = text.replace('Z:', '').replace('\\', '/')
    assert 'Traceback' not in text and 'Errno' not in text, text
    assert any(all(word in line for word in said) for line in text.splitlines()), text


@pytest.fixture
def taken():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen(1)
        yield listener.getsockname()[1]


# 1

@pytest.mark.parametrize('section, key', [('Host', 'xmlrpc_port'), ('Broker', 'port')])
def test_a_taken_port(section, key, tmp_path, taken):
    ini = host_ini(tmp_path, '[%s]\n%s = %d\n' % (section, key, taken))
    code, text = run(ini)
    assert code == 1
    sentences(text, str(taken), '[%s]' % section, key, 'another program', 'stop it')
    code, text = run(ini, 'check')
    assert code == 1
    sentences(text, str(taken), '[%s]' % section, key, 'another program', 'stop it')


@pytest.mark.parametrize('section', ['Host]\nxmlrpc_listen_on', 'Broker]\nhost'])
def test_an_address_of_another_machine(section, tmp_path):
    code, text = run(host_ini(tmp_path, '[%s = 203.0.113.7\n' % section))
    assert code == 1
    sentences(text, '203.0.113.7', 'no such address')


@pytest.mark.parametrize('line, told', [
    ('[Host]\nxmlrpc_listen_on =', 'expected something'), ('[Host]\nvm_gc_grace = 0', 'at least 1 s'),
    ('[Broker]\nmax_frame = 1', 'at least 24K'), ('[Logging]\nfile = /no/such', 'No such file'),
    ('[Host]\nxmlrpc_listen_on = 0.0.0.0\nxmlrpc_auth = no', '127.0.0.1')])
def test_a_value_that_the_host_could_not_live_with(line, told, tmp_path):
    broker = '' if '[Broker]' in line else '[Broker]\nport = 0\n'
    ini = write(tmp_path / 'bad.ini', '[Hypervisor]\nhypervisor = none\n%s%s\n' % (broker, line))
    code, text = run(ini)
    assert code == 1
    sentences(text, 'bad.ini', line.splitlines()[-1].partition(' =')[0], told)


@posix_host
@pytest.mark.parametrize('line, told', [
    ('[Host]\nxmlrpc_listen_on = 0.0.0.0\nxmlrpc_auth = no', '[Host] xmlrpc_auth = no'),
    ('[Broker]\ntls = yes', '[Broker] tls=yes needs cert_file'),
    ('[Broker]\ntls = yes\ncert_file = none.pem', '[Broker] cert_file'),
    ('[Broker]\ntls = yes\nembedded = no\nca_file = none.pem', '[Broker] ca_file'),
    ('[Network]\nnetmask = 255.0.255.0', '[Network] netmask = 255.0.255.0: expected a netmask')])
def test_values_that_dont_go_together_stop_the_start_before_anything_is_made(line, told, tmp_path):
    ini = write(tmp_path / 'bad.ini', line + '\n')
    code, text = run(ini)
    assert (code, text.count('\n'), os.listdir(str(tmp_path))) == (1, 1, ['bad.ini']), text
    assert text.startswith('vmhost: %s: %s' % (ini, told))


@pytest.mark.parametrize('id', ['auto', 'g'])
@pytest.mark.parametrize('value, told', [
    ('abc', 'abc: No such file or directory; expected auto, 64 hexadecimal digits, or the path of a file'),
    ('loose', 'can be read by others: chmod 600'), ('short', 'should hold 64 hexadecimal digits')])
def test_a_secret_that_is_none_stops_the_start_of_a_guest(id, value, told, tmp_path):
    """Also of one that learns its id by its connection alone, which may take its time."""
    write(tmp_path / 'loose', '5' * 64).chmod(0o644)
    write(tmp_path / 'short', '5' * 63).chmod(0o600)
    ini = write(tmp_path / 'guest.ini', '[Broker]\nhost = 127.0.0.1\nport = 1\n[VM]\nid = %s\nsecret = %s\n'
                'state_dir = state\n' % (id, value))
    code, text = run(ini, program='vmguest.py')
    assert (code, text.count('\n')) == (1, 1) and not (tmp_path / 'state').exists(), text
    assert text.startswith('vmguest: %s: [VM] secret: ' % ini) and told in text


@pytest.mark.windows
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_an_ini_file_may_be_saved_in_any_unicode(encoding, tmp_path):
    text = '[Host]\r\nstate_dir = \u00e4\r\nxmlrpc_port = x\r\n'
    (tmp_path / 'host.ini').write_bytes(text.encode(encoding))
    code, text = run(tmp_path / 'host.ini')
    assert code == 1
    sentences(text, 'host.ini', '[Host] xmlrpc_port = x: expected')


@pytest.mark.windows
@pytest.mark.parametrize('data, told', [(b'[Host]\nstate_dir = \xe4\n', 'line 2: not in UTF-8'),
                                        (b'\xff\xfe[\0H', 'line 1: not in UTF-16')])
def test_an_ini_file_in_what_is_no_unicode(data, told, tmp_path):
    (tmp_path / 'host.ini').write_bytes(data)
    code, text = run(tmp_path / 'host.ini')
    assert code == 1
    sentences(text, 'host.ini: ' + told, 'save the file as UTF-8')


@pytest.mark.parametrize('id', ['', 'a b', '*', 'a/b', 'x' * 65])
def test_an_id_that_no_guest_may_have(id, tmp_path):
    ini = write(tmp_path / 'guest.ini', '[VM]\nid = %s\n' % id)
    code, text = run(ini, program='vmguest.py')
    assert code == 1
    sentences(text, 'guest.ini', '[VM] id', 'auto')


# 2

def test_a_wrong_token(tmp_path):
    with Host(tmp_path) as host:
        token = os.path.join(host.state, 'xmlrpc.token')
        with open(token, 'w') as file:
            file.write('wrong')
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(host.state, 'xmlrpc.sock'))      # as where there is none: by TCP
        for words, code in ((('ls',), 1), (('run', 'x', '--', 'true'), 255), (('check',), 1)):
            done = host.verb(*words)
            assert done.returncode == code
            sentences((done.stdout + done.stderr).decode(), token, 'does not know the token', 'restart')


@pytest.mark.windows
def test_no_host_or_one_that_is_gone(tmp_path):
    ini = host_ini(tmp_path)
    code, text = run(ini, 'ls')
    assert code == 1
    sentences(text, 'no host agent runs here', 'start it')
    (tmp_path / 'vmhost-state').mkdir()
    write(tmp_path / 'vmhost-state' / 'xmlrpc.token', 'x')
    write(tmp_path / 'vmhost-state' / 'xmlrpc.address', '127.0.0.1:1')
    code, text = run(ini, 'ls')
    assert code == 1
    sentences(text, '127.0.0.1:1', 'start it again')
    code, text = run(tmp_path / 'none.ini', 'ls')
    assert code == 1
    sentences(text, 'none.ini', 'No such file')


# 3

def test_a_guest_that_cannot_reach_the_broker(tmp_path):
    with socket.socket() as closed:
        closed.bind(('127.0.0.1', 0))       # and doesn't listen
        port = closed.getsockname()[1]
        ini = write(tmp_path / 'guest.ini', '[Broker]\nhost = 127.0.0.1\nport = %d\n[VM]\nstate_dir = state\n'
                    % port)
        code, text = run('--check', ini, program='vmguest.py')
        assert code == 1
        sentences(text, '127.0.0.1:%d' % port, 'is it running', '[Broker]')
        with open(str(tmp_path / 'log'), 'wb') as log:
            agent = subprocess.Popen([sys.executable, os.path.join(TOP, 'vmguest.py'), str(ini)],
                                     stdout=log, stderr=log)
        try:
            said = wait_until(lambda: re.search('.*no connection.*', (tmp_path / 'log').read_text()), 20)
            sentences(said.group(), '127.0.0.1:%d' % port, 'is it running', '--check')
        finally:
            agent.terminate()
            assert agent.wait(10) == 0
        sentences((tmp_path / 'log').read_text(), 'no connection')


# 4

def test_a_clock_that_is_a_day_off(tmp_path):
    """Also one that was set after the agent had joined."""
    is_set = tmp_path / 'set'
    with Host(tmp_path / 'host') as host:
        guest = Agent(tmp_path / 'guest', host, 'yesterday', beacon_interval=0.5)
        late = ('import os, sys, time; now = time.time; '
                'time.time = lambda: now() - 86400 * os.path.exists(%r); '
                'sys.path.insert(0, %r); import vmguest; sys.exit(vmguest.main([%r]))'
                % (str(is_set), TOP, guest.ini))
        with open(guest.log_path, 'wb') as log:
            guest.process = subprocess.Popen([sys.executable, '-c', late], stdout=log, stderr=log)
        try:
            wait_until(guest.has_joined, 20)
            assert host.run('yesterday', 'echo', 'works')['out'] == 'works\n'
            assert b'behind' not in host.verb('check').stdout
            is_set.touch()
            wait_until(lambda: host.api.getVM('yesterday')['clockOffset'] < -86000, 20)
            assert host.run('yesterday', 'echo', 'works')['out'] == 'works\n'
            done = host.verb('check')
            assert done.returncode == 0         # no two clocks are ever compared: all works
            sentences(done.stdout.decode(), 'yesterday', '24 h behind', 'set it')
        finally:
            guest.stop()


# 5

@pytest.fixture
def full(tmp_path):
    """A folder on a disk that has no room left."""
    folder = tmp_path / 'full'
    folder.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'none', str(folder)],
                             stderr=subprocess.DEVNULL)
    if mounted.returncode:
        pytest.skip('no disk can be mounted here')
    with pytest.raises(OSError):
        with open(str(folder / 'filler'), 'wb', 0) as file:
            while True:
                file.write(bytes(4096))
    yield folder
    subprocess.check_call(['umount', str(folder)])


@posix_host                    # Wine takes no mounted folder for a disk
def test_a_full_disk(full, tmp_path):
    ini = host_ini(tmp_path, '[Host]\nxmlrpc_port = 0\nstate_dir = %s\n' % (full / 'state'))
    code, text = run(ini)
    assert code == 1
    sentences(text, str(full), 'full', 'make room')
    code, text = run(ini, 'check')
    assert code == 1
    sentences(text, str(full), 'make room')
    guest = write(tmp_path / 'guest.ini', '[VM]\nstate_dir = %s\n' % (full / 'state'))
    code, text = run('--check', guest, program='vmguest.py')
    assert code == 1
    sentences(text, str(full), 'make room')
    code, text = run('--bundle', full / 'x.pyz')
    assert code == 1
    sentences(text, str(full), 'No space left')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_an_output_that_is_full_and_machines_that_no_hypervisor_has(tmp_path):
    with Host(tmp_path / 'host') as host, Agent(tmp_path / 'guest', host, 'lab07'), \
            open('/dev/full', 'w') as full:
        done = subprocess.run(host.command('ls', '--json'), stdout=full, stderr=subprocess.PIPE, timeout=60)
        assert done.returncode == 255
        sentences(done.stderr.decode(), 'standard output', 'No space left')
        done = host.verb('rm', 'lab07')
        assert done.returncode == 1
        sentences(done.stderr.decode(), 'no hypervisor here', '`forget lab07`')


@posix_host
def test_a_current_folder_that_is_gone(tmp_path):
    """A build folder that was removed and made again under a shell."""
    gone = ['sh', '-c', 'rmdir "$PWD" && exec "$@"', 'sh', sys.executable]
    ini, folder = host_ini(tmp_path), tmp_path / 'gone'
    for program, words in (('vmhost.py', ['ls']), ('vmhost.py', [ini, 'put', 'lab07', 'a', 'b']),
                           ('vmhost.py', []), ('vmguest.py', [])):
        folder.mkdir()
        code, text = run(*words, program=program, python=gone, cwd=str(folder))
        assert code == 1 and text.endswith(': the current folder is gone\n'), (words, text)
        assert text.count('\n') == 1


def test_a_bundle_that_cant_be_written_is_a_sentence(tmp_path):
    for program, place in (('vmhost.py', tmp_path), ('vmguest.py', tmp_path / 'missing' / 'x.pyz'),
                           ('vmboinc.py', tmp_path)):
        code, text = run('--bundle', place, program=program)
        assert code == 1
        sentences(text, str(place), 'can\'t be written')
    assert not os.path.exists(str(tmp_path) + '.new')


def test_a_bundle_goes_into_a_pipe_or_where_a_link_leads_and_replaces_neither(tmp_path):
    link, pipe, target = tmp_path / 'link', tmp_path / 'pipe', tmp_path / 'target'
    link.symlink_to(target)
    assert run('--bundle', link, program='vmguest.py')[0] == 0
    assert link.is_symlink() and os.access(str(target), os.X_OK)
    os.mkfifo(str(pipe))
    reader = subprocess.Popen(['cmp', str(pipe), str(target)])
    assert run('--bundle', pipe, program='vmguest.py')[0] == 0
    assert reader.wait(20) == 0
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ['link', 'pipe', 'target']


# 6

@pytest.fixture
def readonly(tmp_path):
    """A folder in which nothing can be made, not even by root."""
    folder = tmp_path / 'readonly'
    folder.mkdir(mode=0o555)
    if os.getuid():
        yield folder
    elif subprocess.call(['mount', '-t', 'tmpfs', '-o', 'ro', 'none', str(folder)]):
        pytest.skip('root may write everywhere, and no disk can be mounted here')
    else:
        yield folder
        subprocess.check_call(['umount', str(folder)])


@pytest.mark.windows
def test_a_read_only_folder(readonly, tmp_path):
    ini = host_ini(tmp_path, '[Host]\nxmlrpc_port = 0\nstate_dir = %s\n' % (readonly / 'state'))
    for words in ((ini,), (ini, 'check')):
        code, text = run(*words)
        assert code == 1
        sentences(text, str(readonly), 'state_dir')
    guest = write(tmp_path / 'guest.ini', '[VM]\nstate_dir = state\ndir_to_serve = %s\n' % readonly)
    for words in ((guest,), ('--check', guest)):
        code, text = run(*words, program='vmguest.py')
        assert code == 1
        sentences(text, str(readonly), 'dir_to_serve')


# 7

@pytest.mark.parametrize('program, text, said', [
    ('vmhost.py', '[Host]\nxmlrpc_prot = 1\n', 'xmlrpc_prot'), ('vmhost.py', '[Hots]\n', 'Hots'),
    ('vmhost.py', '[Broker]\nport = many\n', 'many'), ('vmhost.py', 'port = 1\n', '[Section]'),
    ('vmhost.py', '[Logging]\nlevel = LOUD\n', 'LOUD'),
    ('vmhost.py', '[Logging]\nfile = /no/such/log\n', '/no/such/log'),
    ('vmguest.py', '[VM]\nbeacon = 1\n', 'beacon'), ('vmguest.py', '[VM]\nmax_commands = few\n', 'few')])
def test_a_typo_in_an_ini(program, text, said, tmp_path):
    ini = write(tmp_path / 'a.ini', text)
    code, printed = run(ini, program=program)
    assert code == 1 and len(printed.splitlines()) == 1
    sentences(printed, str(ini) if 'Logging]\nfile' not in text else '[Logging]', said)


@posix_host
@pytest.mark.parametrize('program', ['vmhost.py', 'vmguest.py'])
def test_a_password_that_others_can_read(program, tmp_path):
    ini = write(tmp_path / 'a.ini', '[Broker]\npassword = hunter2\nheartbeat = none\n')
    for mode in (0o644, 0o640, 0o604):
        ini.chmod(mode)
        code, printed = run(ini, program=program)
        assert code == 1 and len(printed.splitlines()) == 1 and 'hunter2' not in printed
        sentences(printed, '[Broker] password', 'chmod 600 %s' % ini)
    ini.chmod(0o600)
    assert 'heartbeat' in run(ini, program=program)[1]              # the next mistake


# 8

@pytest.mark.parametrize('program', ['vmhost.py', 'vmguest.py'])
def test_a_wrong_python(program, tmp_path):
    old = glob.glob(os.path.expanduser('~/.pyenv/versions/2.7.*/bin/python'))
    if not old:
        pytest.skip('no Python 2.7 here')
    code, text = run('a.ini', program=program, python=old[:1])
    assert code == 1
    sentences(text, 'Python 3.6 or later', 'try python3')
    bundle = tmp_path / 'bundle'
    assert run('--bundle', bundle, program=program)[0] == 0
    code, text = run(program=str(bundle), python=old[:1])
    assert code == 1 and len(text.splitlines()) == 1
    sentences(text, 'Python 3.6 or later', 'try python3')


def test_a_missing_package(tmp_path):
    for program in ('vmhost.py', 'vmguest.py'):
        code, text = run(host_ini(tmp_path) if program == 'vmhost.py' else write(tmp_path / 'g.ini', ''),
                         program=program, python=(sys.executable, '-S'), cwd=str(tmp_path))
        assert code == 1
        sentences(text, 'stomper is missing', 'or use the bundle')


@pytest.mark.skipif(os.name != 'posix', reason='venvs look different there')
def test_a_missing_package_is_had_as_this_python_takes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(agent, '__file__', str(tmp_path / 'agent.py'))
    monkeypatch.setattr(sys, 'base_prefix', '/other')
    assert agent.how_to_get('stomper') == sys.executable + ' -m pip install stomper'
    monkeypatch.setattr(sys, 'base_prefix', sys.prefix)
    assert agent.how_to_get('stomper') == (
        sys.executable + ' -m venv .venv && .venv/bin/python -m pip install stomper, '
        'and start it by .venv/bin/python')
    (tmp_path / '.venv' / 'bin').mkdir(parents=True)
    (tmp_path / '.venv' / 'bin' / 'python').write_bytes(b'')
    assert agent.how_to_get('stomper') == 'start it by %s/.venv/bin/python' % tmp_path


# 9

def test_a_name_with_spaces_and_umlauts(tmp_path):
    name = 'Müllers [alter] Rechner'
    with Host(tmp_path / 'host') as host, Agent(tmp_path / 'guest', host, 'i', name=name):
        done = host.verb('run', 'Müllers [alter] Rechner', '--', 'echo', 'ja')
        assert (done.stdout, done.returncode) == (b'ja\n', 0)
        done = host.verb('run', 'Müllers', '[alter]', 'Rechner', '--', 'echo', 'nein')
        assert done.returncode == 255
        sentences(done.stderr.decode(), 'Müllers', 'ls')
        done = host.verb('run', 'Müllers', '--', 'echo', 'nein')
        assert done.returncode == 255
        sentences(done.stderr.decode(), 'Müllers', 'ls')


# 10

def test_two_hosts_on_one_state_folder(tmp_path):
    with Host(tmp_path) as host:
        code, text = run(host.ini)
        assert code == 1
        sentences(text, 'another vmhost runs on the state folder', 'stop it')
        assert host.answers()


def test_two_guests_of_one_id(tmp_path):
    with Host(tmp_path / 'host') as host, Agent(tmp_path / 'guest', host, 'i') as guest:
        code, text = run(guest.ini, program='vmguest.py')
        assert code == 1
        sentences(text, 'another vmguest', 'an id of its own')
