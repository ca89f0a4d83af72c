"""What Windows and macOS want of the host's parts, as far as Linux can imitate it (and tests/windows)."""

import errno
import gc
import os
import re
import resource
import shlex
import socket
import subprocess
import sys
import types

import pytest
from agents import Host
from helpers import wait_until

import agent
import checks
import chirplocal
import cliterminal
import driverprocesses
import hostcli
import hostclient
import hostconfig
import hostjournal
import hoststate
import hosttransfers
import localnames
import protocol
import stompbroker
import vboxconnection
import virtualbox
from agent import AgentError
from faults import Busy, HypervisorError, VMHostError

PRIVATE = 'D:PAI(A;OICI;FA;;;SY)(A;OICI;FA;;;S-1-5-21-1-2-3-1001)'
# What Windows gives a new folder below C:\, and one below a user's own.
BELOW_C = ('D:AI(A;ID;FA;;;BA)(A;OICIIOID;GA;;;BA)(A;ID;FA;;;SY)(A;OICIID;0x1200a9;;;BU)(A;ID;0x1301bf;;;AU)'
           '(A;OICIIOID;SDGXGWGR;;;AU)')
BELOW_HOME = 'D:AI(A;OICIID;FA;;;SY)(A;OICIID;FA;;;BA)(A;OICIID;FA;;;S-1-5-21-1-2-3-1001)'


@pytest.mark.skipif(sys.version_info < (3, 7), reason='ctypes.wintypes of Python 3.6 is for Windows alone')
def test_who_may_read_and_change_a_folder_is_read_from_its_access_list():
    import windows
    me = 'S-1-5-21-1-2-3-1001'
    assert windows.is_private(PRIVATE, me)
    for access in BELOW_C, BELOW_HOME, PRIVATE.replace('PAI', 'AI'), PRIVATE + '(A;OICI;FR;;;BU)', 'D:P', '':
        assert not windows.is_private(access, me)
    assert not windows.is_private(PRIVATE, 'S-1-5-21-1-2-3-1002')
    assert windows.who_may_change(BELOW_C) == ['Authenticated Users']
    assert windows.who_may_change(BELOW_HOME) == [] == windows.who_may_change(PRIVATE)
    assert windows.who_may_read(BELOW_C) == ['Users', 'Authenticated Users']
    assert windows.who_may_read(BELOW_HOME) == [] == windows.who_may_read(PRIVATE)
    for none in 'D:NO_ACCESS_CONTROL', '':                     # as on a FAT disk: everybody may do everything
        assert windows.who_may_change(none) == ['Everyone'] == windows.who_may_read(none)
    mixed = 'D:(A;;FR;;;WD)(A;;GRGX;;;BU)(D;;FA;;;AU)(A;;FA;;;WD)(A;;SDGXGWGR;;;BU)'
    assert windows.who_may_change(mixed) == ['Everyone', 'Users']


@pytest.mark.skipif(sys.version_info < (3, 7), reason='ctypes.wintypes of Python 3.6 is for Windows alone')
def test_what_lies_open_in_a_state_folder_is_closed_on_windows(tmp_path, monkeypatch):
    """As what was copied there with the access that it had."""
    import windows
    me = 'S-1-5-21-1-2-3-1001'
    (tmp_path / 'folder').mkdir()
    for name in 'token', 'own':
        (tmp_path / name).write_text('x')
    lists = {str(tmp_path): PRIVATE, str(tmp_path / 'own'): BELOW_HOME, str(tmp_path / 'token'): BELOW_C,
             str(tmp_path / 'folder'): BELOW_C}
    monkeypatch.setattr(windows, 'this_user', lambda: me)
    monkeypatch.setattr(windows, 'has_access_lists', lambda path: True)
    monkeypatch.setattr(windows, 'access_of', lists.__getitem__)
    monkeypatch.setattr(windows, 'set_access', lists.__setitem__)
    windows.make_private(str(tmp_path))
    assert (lists[str(tmp_path)], lists[str(tmp_path / 'own')]) == (PRIVATE, BELOW_HOME)
    for name in 'token', 'folder':
        assert windows.is_private(lists[str(tmp_path / name)], me)


@pytest.mark.skipif(sys.version_info < (3, 7), reason='ctypes.wintypes of Python 3.6 is for Windows alone')
def test_a_password_in_a_file_that_others_may_read_is_told_on_windows(tmp_path, monkeypatch):
    import windows
    ini = tmp_path / 'host.ini'
    ini.write_text('[Broker]\npassword = x\n')
    ini.chmod(0o600)
    monkeypatch.setattr(agent, 'ON_WINDOWS', True)
    for access in BELOW_C, 'D:NO_ACCESS_CONTROL', None:
        monkeypatch.setattr(windows, 'access_of', lambda path, text=access: text or os.stat(path + '/none'))
        with pytest.raises(agent.ConfigError, match=r'\[Broker\] password: others can read it: icacls "'):
            hostconfig.read_settings(str(ini))
    monkeypatch.setattr(windows, 'access_of', lambda path: BELOW_HOME)
    assert hostconfig.read_settings(str(ini)).Broker.password == 'x'


def test_a_variable_in_a_path_of_host_ini_is_what_it_stands_for_on_windows(tmp_path, monkeypatch):
    ini = tmp_path / 'host.ini'
    ini.write_text('[Host]\nstate_dir = %STATE OF(1)%/vm%\n[Logging]\nfile = 100%/a%b\n')
    monkeypatch.setenv('STATE OF(1)', '/some/%HOME%')
    assert hostconfig.read_settings(str(ini)).Host.state_dir == str(tmp_path / '%STATE OF(1)%/vm%')
    monkeypatch.setattr(agent, 'ON_WINDOWS', True)
    settings = hostconfig.read_settings(str(ini))
    assert settings.Host.state_dir == '/some/%HOME%/vm%'
    assert settings.Logging.file == str(tmp_path / '100%/a%b')
    monkeypatch.delenv('STATE OF(1)')
    with pytest.raises(agent.ConfigError, match=r'\[Host\] state_dir = .*: there is no .* variable STATE'):
        hostconfig.read_settings(str(ini))


@pytest.mark.parametrize('typed', ['"/my state"', "'state'"])
def test_a_path_in_quotation_marks_is_told(tmp_path, typed):
    ini = tmp_path / 'host.ini'
    ini.write_text('[Host]\nstate_dir = %s\n' % typed)
    with pytest.raises(agent.ConfigError, match=r'\[Host\] state_dir = .*: expected a path without quot'):
        hostconfig.read_settings(str(ini))


@pytest.mark.parametrize('path, told', [('D:state', 'needs a backslash'), ('D:/aux', 'the name aux')])
def test_a_path_on_a_drive_that_nobody_means_is_told(monkeypatch, path, told):
    """As it is where the ini file is on another drive."""
    monkeypatch.setattr(agent, 'ON_WINDOWS', True)
    monkeypatch.setattr(localnames, 'ON_WINDOWS', True)
    with pytest.raises(agent.ConfigError, match=r'host\.ini: \[Host\] state_dir = .*: .*%s' % told):
        hostconfig._check_path('host.ini', 'Host', 'state_dir', path)


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_a_secret_is_read_as_any_editor_or_shell_wrote_it(tmp_path, encoding):
    import chirp
    path = tmp_path / 'secret'
    path.write_bytes(('ab' * 32 + '\r\n').encode(encoding))
    assert chirp.read_secret(str(path)) == b'\xab' * 32
    path.write_bytes(b'\xff\xfe\xff')
    with pytest.raises(chirp.ChirpError, match='expected 64 hex digits'):
        chirp.read_secret(str(path))


@pytest.mark.skipif(sys.version_info < (3, 7), reason='ctypes.wintypes of Python 3.6 is for Windows alone')
def test_ctrl_break_ends_the_host_in_order_where_no_signal_comes_of_it():
    import windows
    ended = []
    session = types.SimpleNamespace(_end=lambda: ended.append(1))
    assert windows.SessionEnd._console(session, windows.CTRL_BREAK) is True and ended == [1]
    assert windows.SessionEnd._console(session, 0) is False and ended == [1]       # Ctrl-C is a signal


def test_a_device_as_a_target_is_left_to_the_transfer_to_refuse(monkeypatch):
    """Of which Windows says, even when it is asked where that is, that the handle is invalid."""
    def realpath(path):
        raise OSError(errno.EBADF, 'Invalid handle', path)
    monkeypatch.setattr(hosttransfers.os.path, 'realpath', realpath)
    transfer = hosttransfers.Transfer('get', 'vm', '/file', '/folder/con', 'keep', False)
    assert transfer.asked == ('/folder/con',)


def test_a_file_to_send_that_another_program_holds_is_told_so(tmp_path, monkeypatch):
    def held(path, *_):
        raise PermissionError(errno.EACCES, 'Permission denied', path)
    monkeypatch.setattr(chirplocal.os, 'open', held)
    for on_windows, told in (False, 'Permission denied'), (True, 'another program has it open'):
        monkeypatch.setattr(chirplocal, 'ON_WINDOWS', on_windows)
        with pytest.raises(PermissionError, match=told):
            chirplocal.open_regular('file')


@pytest.mark.parametrize('times', [3, 1000000])
def test_a_file_that_another_program_holds_is_asked_for_again_on_windows(tmp_path, monkeypatch, times):
    """A small one that somebody must have: token, ini file, a port of last time, the journal."""
    left = []

    def held(function):
        def refusing(path, *args, **options):
            if str(path).startswith(str(tmp_path)) and left:
                left.pop()
                raise PermissionError(errno.EACCES, 'Permission denied', path)
            return function(path, *args, **options)
        return refusing
    folder = str(tmp_path)
    for name, text in ('xmlrpc.token', 'secret'), ('broker.port', '4000'), ('host.ini', '[Host]'), (
            'leases.json', '{}'):
        (tmp_path / name).write_text(text)
    state = hoststate.StateFolder(folder)
    monkeypatch.setattr(agent, 'ON_WINDOWS', True)
    monkeypatch.setattr(agent, 'HELD', 5.0 if times == 3 else 0.1)
    monkeypatch.setattr('builtins.open', held(open))
    monkeypatch.setattr(os, 'open', held(os.open))
    steps = [
        (lambda: hostclient.Client(folder)._read('xmlrpc.token'), 'secret', agent.NOT_TO_READ),
        (lambda: agent.read_settings(str(tmp_path / 'host.ini'), {'Host': {}}) and 'read', 'read',
         agent.NOT_TO_READ),
        (lambda: state.secret('xmlrpc.token'), 'secret', agent.NOT_TO_READ),
        (lambda: state.write('file', 'text'), None, agent.NOT_TO_WRITE),
        (lambda: hostjournal.Journal(str(tmp_path / 'journal')).close(), None, agent.NOT_TO_WRITE)]
    for step, wanted, told in steps:
        left[:] = times * [None]
        if times == 3:
            assert step() == wanted and not left
        else:
            with pytest.raises((OSError, AgentError, VMHostError), match=re.escape(told)):
                step()
    left.clear()
    state.close()


def test_examples_can_be_typed_in_the_command_prompt_of_windows(monkeypatch):
    monkeypatch.setattr(agent, 'ON_WINDOWS', True)
    lines = hostcli.overview().partition('\nexamples:\n')[2].partition('\n\n')[0].split('\n')
    assert len(lines) > 10 and not [line for line in lines if re.search("'| shell | -t ", line)]
    typed = [line.partition(' call listCmds ')[2] for line in lines if 'listCmds' in line]
    assert typed == [r'"{\"vm\": \"web1\", \"state\": \"running\"}"']
    of_run = hostcli.Parser(hostcli.VERBS['run']).format_help()
    of_run = of_run.partition('examples:\n')[2].partition('\n\n')[0]
    assert 'run "web*" uptime' in of_run and "'" not in of_run


def test_a_port_that_windows_keeps_for_itself_is_told_so():
    error = PermissionError(errno.EACCES, 'forbidden')
    assert '1023' in agent.why_not_listening(error)
    error.winerror = 10013
    assert 'reserved' in agent.why_not_listening(error) and 'auto' in agent.why_not_listening(error)


def test_a_folder_is_checked_by_writing_to_it(tmp_path):
    assert checks.check_folder(str(tmp_path / 'new' / 'one'), 'key').ok and os.listdir(str(tmp_path)) == []
    assert not checks.check_folder('/proc/self/new', 'key').ok
    with agent.momentary_file(str(tmp_path)) as path:
        assert [os.path.basename(path)] == os.listdir(str(tmp_path))
    with pytest.raises(OSError), agent.momentary_file(str(tmp_path / 'missing')):
        pass


def test_a_file_for_a_moment_goes_though_its_disk_fails(tmp_path, monkeypatch):
    """As one in a network may, which is full, as late as that."""
    close = os.close

    def fail(descriptor):
        close(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError), agent.momentary_file(str(tmp_path)):
        monkeypatch.setattr(os, 'close', fail)
    monkeypatch.undo()
    assert os.listdir(str(tmp_path)) == []


def test_the_kernel_module_is_a_thing_of_linux(monkeypatch):
    monkeypatch.setattr(vboxconnection.sys, 'platform', 'win32')
    assert vboxconnection.system_lines() == []
    monkeypatch.setattr(vboxconnection.sys, 'platform', 'linux')
    assert 'vboxdrv' in vboxconnection.system_lines()[0][1]


@pytest.mark.parametrize('has, arm, fine, told', [
    ('1', '', True, ''), ('1', '1', True, ''), ('0', '', False, 'hv_support'), ('', '', False, 'hv_support')])
def test_macos_is_asked_whether_vms_may_have_the_processor(has, arm, fine, told, tmp_path, monkeypatch):
    a_sysctl(tmp_path, monkeypatch, '[ "$1" = -n ] || exit 2; case $2 in\n'
             'kern.hv_support) echo %s;; hw.optional.arm64) [ "%s" ] && echo %s || exit 1;;\n'
             '*) exit 3;; esac' % (has, arm, arm))
    [(ok, what, mend, needed)] = vboxconnection.system_lines()
    assert (ok, needed) == (fine, True) and 'hardware virtualisation' in what and ('ARM' in what) == bool(arm)
    assert bool(mend) != ok and told in mend
    assert [told in line for line in vboxconnection.system_warnings()] == [True] * (not fine)


def test_a_macos_that_cannot_be_asked_is_no_reason_against_vms(tmp_path, monkeypatch):
    a_sysctl(tmp_path, monkeypatch, '').chmod(0o600)
    monkeypatch.setattr(vboxconnection.shutil, 'which', lambda name: str(tmp_path / name))
    [(ok, _, mend, needed)] = vboxconnection.system_lines()
    assert (ok, needed) == (False, False) and 'nobody can say' in mend
    assert vboxconnection.system_warnings() == []


def a_sysctl(tmp_path, monkeypatch, text):
    """macOS, whose sysctl this script is, first on the PATH."""
    path = tmp_path / 'sysctl'
    path.write_text('#!/bin/sh\n%s\n' % text)
    path.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(vboxconnection.sys, 'platform', 'darwin')
    return path


@pytest.mark.parametrize('soft, most, got', [(256, 10240, 10240), (256, 5000, 4096), (256, 300, None),
                                             (8192, 9000, None)])
def test_as_many_descriptors_are_asked_for_as_there_may_be(monkeypatch, soft, most, got):
    """macOS names no limit, and refuses what is above one."""
    limits = []

    def set_limit(which, pair):
        if pair[0] > most:
            raise ValueError('not allowed')
        limits.append(pair[0])
    monkeypatch.setattr(resource, 'getrlimit', lambda which: (soft, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, 'setrlimit', set_limit)
    stompbroker._allow_many_sockets()
    assert limits == ([got] if got else [])


def test_a_host_that_may_open_few_files_asks_for_more(tmp_path):
    """As on macOS, where a program begins with 256."""
    class Narrow(Host):
        def words(self):
            return ['sh', '-c', 'ulimit -Sn 256; exec "$@"', 'sh'] + super().words()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Narrow(tmp_path) as host:
        with open('/proc/%d/limits' % host.process.pid) as file:
            soft = re.search(r'^Max open files +(\d+)', file.read(), re.M).group(1)
        assert int(soft) == (min(most, 65536) if most != resource.RLIM_INFINITY else 65536)


def test_a_refused_connection_is_told_in_the_words_of_the_system():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        settings = types.SimpleNamespace(port=free.getsockname()[1], username='', password='')
        link = protocol.try_broker('127.0.0.1', settings, None)
    assert 'refused' in link.last_error


def test_the_journal_goes_through_the_disks_own_memory(tmp_path):
    """What SQLite obeys on macOS alone."""
    journal = hostjournal.Journal(str(tmp_path / 'journal'))
    try:
        for name in 'fullfsync', 'checkpoint_fullfsync':
            assert journal._writer.execute('PRAGMA ' + name).fetchone() == (1,)
    finally:
        journal.close()


def test_a_damaged_journal_is_closed_before_it_is_set_aside(tmp_path, monkeypatch):
    path = tmp_path / 'journal'
    path.write_bytes(b'no database at all' * 1000)
    real = agent.replace

    def replace(source, target):
        open_here = [os.readlink('/proc/self/fd/' + fd) for fd in os.listdir('/proc/self/fd')
                     if os.path.lexists('/proc/self/fd/' + fd)]
        assert str(path) not in open_here
        real(source, target)
    monkeypatch.setattr(hostjournal.agent, 'replace', replace)
    hostjournal.Journal(str(path)).close()
    assert len([name for name in os.listdir(str(tmp_path)) if 'corrupt' in name]) == 1


def test_waiting_for_an_answer_is_done_in_looks(tmp_path, monkeypatch):
    """As on Windows, where Ctrl-C comes only between them."""
    monkeypatch.setattr(hostclient, 'LOOK_UP', 0.01)
    with Host(tmp_path) as host:
        monkeypatch.setattr(hostclient.localsocket, 'path_in', lambda folder: '')
        client = hostclient.Client(host.state)
        last = client.call('getEvents', 0)['last']
        assert client.call('getEvents', last, 0.2)['events'] == []
        client._leave()


def test_what_is_typed_on_a_console_of_windows_goes_on_as_a_guest_reads_it(monkeypatch):
    typed = types.SimpleNamespace(read=lambda most: '\u00e4\r\n'.encode())
    monkeypatch.setattr(cliterminal, 'os', types.SimpleNamespace(name='nt', isatty=lambda descriptor: True))
    monkeypatch.setattr(sys, 'stdin', types.SimpleNamespace(buffer=types.SimpleNamespace(raw=typed)))
    assert cliterminal.read_input(100) == b'\xc3\xa4\n'


# --- a host that nobody hears, and its end ---

def test_a_driver_that_is_started_on_windows_opens_no_console(monkeypatch):
    """A host agent of BOINC's has none: what it starts would get one, in the middle of the screen."""
    flags = []

    def begin(words, creationflags=0, **options):
        flags.append(creationflags)
        return real(words, **options)
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, 'CREATE_NO_WINDOW', 0x8000000, raising=False)
    monkeypatch.setattr(subprocess, 'Popen', begin)
    child = driverprocesses.Child(['cat'], {}, None)
    child.kill()
    assert list(child.messages()) in ([], [{}]) and flags == [0x8000000]

def test_shutdown_waits_until_the_host_has_ended(tmp_path):
    with Host(tmp_path) as host:
        done = host.verb('shutdown')
        assert (done.returncode, done.stdout, done.stderr) == (0, b'', b'')
        assert host.process.wait(10) == 0
        assert 'vmhost ends: stopHost was called' in host.log()
        host.start()                   # nothing of the old one is in the way
        with host.api as api:
            assert api.stopHost() is True      # who asked gets the answer
        assert host.process.wait(10) == 0
        assert host.verb('shutdown').returncode == 1


@pytest.mark.parametrize('wrong', ['', 'ini', 'state'])
def test_a_host_that_nobody_hears_logs_into_its_state_folder(tmp_path, wrong):
    """As one that pyw runs: it has no standard streams at all."""
    host = Host(tmp_path)
    if wrong == 'ini':
        with open(host.ini, 'a') as ini:
            ini.write('\n[Nonsense]\n')
    if wrong == 'state':               # what can't be written there is any file, as on a full disk
        os.makedirs(os.path.join(host.state, 'xmlrpc.token', 'in the way'), 0o700)
        os.chmod(host.state, 0o700)
    words = ' '.join(map(shlex.quote, host.words()))
    process = subprocess.Popen(['sh', '-c', 'exec %s <&- >&- 2>&-' % words], cwd=host.folder)
    try:
        log = os.path.join(host.folder if wrong == 'ini' else host.state, 'vmhost.log')
        if not wrong:
            wait_until(lambda: os.path.exists(log) and 'started' in open(log).read(), 20)
            assert host.verb('shutdown').returncode == 0 and process.wait(10) == 0
            assert os.stat(log).st_mode & 0o077 == 0 or os.stat(host.state).st_mode & 0o077 == 0
        else:
            assert process.wait(20) == 1
            with open(log) as file:
                assert {'ini': 'Nonsense', 'state': 'xmlrpc.token'}[wrong] in file.read()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_a_state_file_that_cannot_be_written_ends_the_start_with_1(tmp_path):
    host = Host(tmp_path)
    os.makedirs(os.path.join(host.state, 'xmlrpc.token', 'in the way'), 0o700)
    os.chmod(host.state, 0o700)
    done = subprocess.run(host.words(), cwd=host.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=20)
    told = re.search(rb'^vmhost: .*xmlrpc\.token: .*\n$', done.stdout, re.M)
    assert done.returncode == 1 and told, done.stdout


def test_a_log_that_another_program_reads_is_rotated_later(tmp_path):
    """In a process of its own, whose logging it is; Windows renames no file that is open, says the test."""
    code = """if True:
        import logging, os, sys, types
        sys.path.insert(0, sys.argv[1])
        import agent
        agent.LOG_SIZE, real = 100, os.rename
        agent.set_up_logging(types.SimpleNamespace(level='INFO', file='log', config=''))

        def refuse(source, target):
            raise PermissionError(13, 'in use')
        for number in range(9):
            os.rename = refuse if number < 6 else real
            logging.info('%d: %s', number, 20 * 'x')
        """
    done = subprocess.run([sys.executable, '-c', code, os.path.dirname(os.path.abspath(agent.__file__))],
                          cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (done.returncode, done.stdout) == (0, b'')
    lines = [(tmp_path / name).read_text() for name in sorted(os.listdir(str(tmp_path)), reverse=True)]
    assert re.findall(r'(\d): x', ''.join(lines)) == list('012345678')
    assert len(lines) > 2 and lines[-1].count('\n') == 1, lines


def test_ctrl_break_ends_as_ctrl_c_does():
    """SIGBREAK is Windows' own; any other number does here."""
    code = ('import os, signal, select, sys; sys.path.insert(0, %r); signal.SIGBREAK = signal.SIGUSR1;'
            'import agent; ended = agent.catch_signals(); os.kill(os.getpid(), signal.SIGUSR1);'
            'assert select.select([ended], [], [], 10)[0]' % os.path.dirname(os.path.abspath(agent.__file__)))
    subprocess.check_call([sys.executable, '-c', code])


# --- VirtualBox's COM on Windows ---

@pytest.fixture
def com(tmp_path, monkeypatch):
    """pywin32, as far as it is asked, in a process of Windows; gives the folder for temporary files."""
    win32com = types.ModuleType('win32com')
    win32com.gen_py = types.ModuleType('win32com.gen_py')
    monkeypatch.setitem(sys.modules, 'win32com', win32com)
    monkeypatch.setattr(virtualbox.sys, 'platform', 'win32')
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    monkeypatch.setattr(virtualbox, 'HELD', [])
    yield win32com
    gc.enable()
    for file in virtualbox.HELD:
        file.close()


def test_each_process_has_generated_modules_of_its_own(com, tmp_path, monkeypatch):
    top = tmp_path / virtualbox.GENERATED
    (top / 'ended').mkdir(parents=True)
    (top / 'running').mkdir()
    real = os.rename

    def rename(source, target):
        if 'running' in source:        # a file in it is open
            raise PermissionError(errno.EACCES, 'in use')
        real(source, target)
    monkeypatch.setattr(virtualbox.os, 'rename', rename)
    monkeypatch.setitem(sys.modules, 'vboxapi', types.SimpleNamespace(VirtualBoxManager=lambda: 'manager'))
    assert virtualbox.import_virtualbox() == 'manager'
    own = str(top / str(os.getpid()))
    assert com.__gen_path__ == own and com.gen_py.__path__ == [own]
    assert sorted(os.listdir(str(top))) == sorted([str(os.getpid()), 'running'])
    assert not gc.isenabled()


def test_a_missing_pywin32_is_named(com, monkeypatch):
    monkeypatch.setitem(sys.modules, 'vboxapi', types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, 'win32com', None)
    with pytest.raises(HypervisorError, match='pip install pywin32'):
        virtualbox.import_virtualbox()


@pytest.mark.parametrize('code', vboxconnection.CALL_AGAIN)
def test_a_server_that_asks_to_call_again_is_busy(code):
    assert vboxconnection.FAULT_OF_CODE[code] is Busy
