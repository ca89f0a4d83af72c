"""The host side on Windows: what a volunteer types, what may go wrong, and how it ends."""

import glob
import io
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import tty
import zipfile

import pytest
from agents import TOP, Agent
from helpers import wait_until
from terminals import Terminal
from windows_host import WindowsHost
from wine import RIG, Program, path_there, python, start_of

GONE = 'no host agent runs here'


def write(path, data, mode=0o644):
    os.makedirs(os.path.dirname(str(path)), exist_ok=True)
    with open(str(path), 'wb') as file:
        file.write(data)
    os.chmod(str(path), mode)


def mode(path):
    return stat.S_IMODE(os.stat(str(path)).st_mode)


# --- the first commands ---

def test_a_command_runs_and_ends_with_its_code(verb, guest):
    code, said = verb('ls')
    assert code == 0 and 'alive' in said
    assert verb('run', 'g', '--', 'sh', '-c', 'echo hello; exit 3') == (3, 'hello\n')
    assert verb('ping', 'g')[0] == 0
    code, said = verb('events', '-n', '2')
    assert code == 0 and 'exited 3' in said


def test_the_bundle_of_the_guest_is_made_here_and_runs_there(tmp_path, windows):
    """Of sources as Git writes them on Windows."""
    (tmp_path / 'clone').mkdir()
    for name in os.listdir(TOP):
        if name.endswith('.py'):
            with open(os.path.join(TOP, name), 'rb') as file:
                write(tmp_path / 'clone' / name, file.read().replace(b'\n', b'\r\n'))
    assert python('vmguest.py', '--bundle', 'vmguest.pyz', folder=str(tmp_path / 'clone')) == (0, '')
    said = subprocess.check_output([sys.executable, 'vmguest.pyz', '--version'], cwd=str(tmp_path / 'clone'))
    assert said.startswith(b'vmguest ')
    assert python('vmguest.py', folder=str(tmp_path / 'clone'))[0] == 1


def test_check_names_a_drive_that_is_not_there(tmp_path, windows):
    """A disk that was pulled out."""
    write(tmp_path / 'host.ini', b'[Host]\nstate_dir = Q:\\gone\\vmhost\n[Hypervisor]\nhypervisor = none\n')
    code, said = python(path_there(TOP + '/vmhost.py'), 'host.ini', 'check', folder=str(tmp_path))
    assert code == 1 and said.count('Q:\\') > 1 and 'Traceback' not in said


def test_check_is_content_and_says_nothing_of_linux(verb, guest):
    code, said = verb('check')
    assert code == 0 and 'NO' not in said.split() and 'vboxdrv' not in said
    assert 'only you may change' in said or 'so may' in said
    code, said = verb('status')
    assert code == 0 and 'connected' in said


def test_a_bundle_made_there_is_the_one_made_here_and_runs(tmp_path, windows):
    subprocess.check_call([sys.executable, os.path.join(TOP, 'vmhost.py'), '--bundle', 'here.pyz'],
                          cwd=str(tmp_path))
    assert python(path_there(TOP + '/vmhost.py'), '--bundle', 'there.pyz', folder=str(tmp_path)) == (0, '')
    assert (tmp_path / 'here.pyz').read_bytes() == (tmp_path / 'there.pyz').read_bytes()
    (tmp_path / 'folder').mkdir()
    code, said = python(path_there(TOP + '/vmhost.py'), '--bundle', 'folder', folder=str(tmp_path))
    assert code == 1 and said == "vmhost: folder can't be written: Is a directory\n"
    host = WindowsHost(tmp_path / 'host')
    host.bundle = str(tmp_path / 'there.pyz')
    with host, Agent(tmp_path / 'guest', host, 'g'):
        assert host.run_there(str(tmp_path), 'run', 'g', 'echo', 'hello') == (0, 'hello\n')


def test_input_goes_in_as_it_comes_byte_by_byte(host, guest, tmp_path):
    """What Windows' C library would take for the end, or for the end of a line, as well."""
    cat = host.begin(str(tmp_path), 'run', '-i', 'g', 'sh', '-c', 'head -c 6; cat | od -An -tx1',
                     stdin=subprocess.PIPE)
    with cat.process.stdin as into:
        into.write(b'first\n')
        into.flush()
        wait_until(lambda: cat.said() == 'first\n', 30)
        into.write(b'a\r\nb\x1ac\n\0\xff')
    assert cat.wait() == (0, 'first\n 61 0d 0a 62 1a 63 0a 00 ff\n')


def test_a_console_has_colours_and_what_is_typed_there_is_what_a_guest_reads(host, guest):
    """A program of Windows' on a terminal of ours has a console, of that code page and with those lines."""
    def console(*words):
        terminal = Terminal(start_of('python') + host.typed() + list(words))
        tty.setraw(terminal.fd)        # Return is a carriage return there
        return terminal
    code, shown = console('ls').wait()
    assert code == 0 and '\x1b[32malive' in shown
    terminal = console('run', '-i', 'g', 'sh', '-c', 'echo ready; od -An -tx1')
    wait_until(lambda: b'ready' in terminal.written, 30)
    terminal.type('\u00e4\r\x1a\r'.encode())
    code, shown = terminal.wait()
    assert code == 0 and ' c3 a4 0a\r\n' in shown


# --- files ---

def test_files_go_and_come_and_come_again(verb, guest, tmp_path):
    data = os.urandom(5 << 20)
    write(tmp_path / 'tree' / 'big', data)
    write(tmp_path / 'tree' / 'folder' / 'small', b'small')
    write(tmp_path / 'tree' / 'script', b'#!/bin/sh\n')
    os.utime(str(tmp_path / 'tree' / 'big'), (1500000000, 1500000000))
    for _ in 'new', 'again':
        assert verb('put', 'g', 'tree', 'tree/') == (0, '')
    there = os.path.join(guest.files, 'tree')
    assert [mode(os.path.join(there, name)) for name in ('big', 'folder', 'script', 'folder/small')] == [
        0o644, 0o755, 0o755, 0o644]
    assert int(os.stat(os.path.join(there, 'big')).st_mtime) == 1500000000
    for _ in 'new', 'again':
        assert verb('get', 'g', 'tree', 'back/') == (0, '') == verb('get', 'g', 'tree/big', 'one')
    assert (tmp_path / 'back' / 'big').read_bytes() == data == (tmp_path / 'one').read_bytes()
    assert int((tmp_path / 'back' / 'big').stat().st_mtime) == 1500000000
    assert (tmp_path / 'back' / 'folder' / 'small').read_bytes() == b'small'
    code, said = verb('cp', 'g:tree/big', 'two')
    assert code == 1 and 'a single letter is a drive' in said
    assert not [name for _, _, names in os.walk(str(tmp_path)) for name in names if 'vmhost-part' in name]


def test_what_is_there_keeps_its_mode_and_gets_new_content(verb, guest, tmp_path):
    write(os.path.join(guest.files, 'closed'), b'old', 0o400)
    write(tmp_path / 'closed', b'new content')
    assert verb('put', 'g', 'closed') == (0, '')
    assert mode(os.path.join(guest.files, 'closed')) == 0o400
    write(os.path.join(guest.files, 'closed'), b'newer')
    assert verb('get', 'g', 'closed') == (0, '') and (tmp_path / 'closed').read_bytes() == b'newer'


def test_names_that_are_one_or_none_are_told(verb, guest, tmp_path):
    for name in 'README', 'Readme', 'd/x', 'D/y', 'con.txt', 'a:b', 'back\\slash', 'dot.', 'good':
        write(os.path.join(guest.files, 'names', name), name.encode())
    code, said = verb('get', 'g', 'names', '--json')
    assert code == 1
    failed = [line.split('"')[3] for line in said.splitlines() if '"path"' in line]
    assert len(failed) == 6, said
    assert sorted(os.listdir(str(tmp_path / 'names'))) in [
        sorted([folder, readme, 'good']) for folder in 'dD' for readme in ('README', 'Readme')]
    for name in 'names/a:b', 'names/con.txt':
        code, said = verb('get', 'g', name)
        assert code == 1 and 'no file can have this name' in said
    code, said = verb('get', 'g', 'names/[Rr]*', 'names')
    assert code == 1 and 'would be the same file' in said


def test_a_target_that_windows_would_take_for_another_is_told(verb, guest, tmp_path):
    """By itself it writes the first to a device, and the second over what stands there as ``name``."""
    write(os.path.join(guest.files, 'file'), b'new')
    write(tmp_path / 'name', b'old')
    for target in 'aux.txt', 'name.', 'name:b', 'con', 'conout$':
        code, said = verb('get', 'g', 'file', target)
        assert code == 1 and 'no file can have the name ' + target in said, said
    assert (tmp_path / 'name').read_bytes() == b'old' and os.listdir(str(tmp_path)) == ['name']


def test_what_only_windows_minds_in_host_ini_is_told(tmp_path, windows):
    """A variable in a path, and a password that everybody may read."""
    ini = '[Host]\nstate_dir = %%%s%%\\none\n[Broker]\npassword = hunter2\n'
    for name, allowed, told in [('TEMP', 0o600, GONE), ('TEMP', 0o644, 'icacls'),
                                ('NOTEMP', 0o600, 'environment variable NOTEMP')]:
        write(tmp_path / 'host.ini', (ini % name).encode(), allowed)
        code, said = python(path_there(TOP + '/vmhost.py'), 'host.ini', 'ls', folder=str(tmp_path))
        assert code == 1 and told in said and 'hunter2' not in said, said
        assert '%' not in said.replace('%USERNAME%', '').replace('%NOTEMP%', ''), said
    for device in 'aux.ini', 'nul.ini':
        code, said = python(path_there(TOP + '/vmhost.py'), device, 'ls', folder=str(tmp_path))
        assert code == 1 and said == 'vmhost: %s: no file can have the name %s here\n' % (device, device)


SHORT = """if True:
    import ctypes, os
    name = ctypes.create_unicode_buffer(300)
    ctypes.windll.kernel32.GetShortPathNameW(os.path.abspath('long name.text'), name, 300)
    print(os.path.basename(name.value))
"""


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_what_is_called_as_another_is_for_short_is_told(verb, guest, tmp_path, kind):
    """As LONGNA~1.TEX, which Windows itself takes for the file of the long name."""
    write(tmp_path / 'tree' / 'long name.text', b'old')
    short = python('-c', SHORT, folder=str(tmp_path / 'tree'))[1].strip()
    assert '~' in short
    there = os.path.join(guest.files, 'short ' + kind, 'tree')
    write(os.path.join(there, short, *['file'] * (kind == 'folder')), b'new')
    write(os.path.join(there, 'good~1'), b'good')
    code, said = verb('get', 'g', 'short ' + kind + '/tree')
    assert code == 1 and short in said and 'short name' in said, said
    assert (tmp_path / 'tree' / 'long name.text').read_bytes() == b'old'
    assert (tmp_path / 'tree' / 'good~1').read_bytes() == b'good'


HOLD = """if True:
    import ctypes, sys, time
    name, share = sys.argv[1], int(sys.argv[2])        # 1: nobody may replace it; 0: nor read it
    ctypes.windll.kernel32.CreateFileW(name, 0x80000000, share, None, 3, 0, None)
    print('held', flush=True)
    time.sleep(60)
"""


def hold(folder, name, share):
    editor = Program('python', '-c', HOLD, name, str(share), folder=str(folder))
    wait_until(lambda: 'held' in editor.said(), 30)
    return editor


def test_a_file_that_another_program_has_open_stays_and_is_told(verb, guest, tmp_path):
    write(os.path.join(guest.files, 'file'), b'new')
    write(tmp_path / 'name', b'old')
    for share in 1, 0:
        os.utime(os.path.join(guest.files, 'file'), (1500000000, 1500000000))
        os.utime(str(tmp_path / 'name'), (1500000000, 1500000000))     # as if it were the same
        editor = hold(tmp_path, 'name', share)
        code, said = verb('get', 'g', 'file', 'name')
        editor.kill()
        assert code == 1 and said.endswith('\\name: another program has it open, or it is read-only\n'), said
        assert '?' not in said and (tmp_path / 'name').read_bytes() == b'old'
    assert verb('get', 'g', 'file', 'name') == (0, '') and (tmp_path / 'name').read_bytes() == b'new'


def test_a_token_that_another_program_has_open_is_told(host, verb):
    editor = hold(host.state, 'xmlrpc.token', 0)
    code, said = verb('ls')
    editor.kill()
    assert code == 1 and 'xmlrpc.token: another program has it open, or you may not read it' in said
    assert verb('ls')[0] == 0


def test_two_that_go_to_one_place_at_once_do_not_mix(host, windows):
    """Locks are Windows' own: a byte far behind the file's end, and a file beside a folder."""
    code, said = python('-c', '''if True:
        import os, sys, tempfile, types
        sys.path.insert(0, %r)
        import chirplocal, chirpwire
        from hosttransfers import Transfer
        with tempfile.TemporaryDirectory() as folder:
            target = os.path.join(folder, 'target')
            with chirplocal.open_part(target) as file:
                file.write(b'x' * 100)
                try:
                    chirplocal.open_part(target)
                except chirpwire.Busy:
                    print('busy')
                chirplocal.finish_part(file, target, (1, 1), 0o400)
            chirplocal.open_part(target).close()
            part = target + '.part'
            with chirplocal.locked_folder(part, target):
                try:
                    with chirplocal.locked_folder(part, target):
                        pass
                except chirpwire.Busy:
                    print('busy')
            with chirplocal.locked_folder(part, target):
                print(sorted(os.listdir(folder))[0] != '', os.stat(target).st_size)
            os.mkdir(chirplocal.local_part(part))      # of a folder, where now a file is to come
            chirplocal.open_part(part).close()
            print(os.path.isfile(chirplocal.local_part(part)))
            get = types.SimpleNamespace(direction='get')
            print(len({Transfer.place_of(get, os.path.join(folder, name)) for name in ('Name', 'NAME')}))
        ''' % path_there(TOP))
    assert (code, said) == (0, 'busy\nbusy\nTrue 100\nTrue\n1\n')


# --- Ctrl-C ---

@pytest.mark.parametrize('words, seen', [(('events', '-f'), 'cmd-submitted'), (('out', '-f', '%s'), 'here'),
                                         (('run', 'g', 'sh', '-c', 'echo here; sleep 60'), 'here')])
def test_ctrl_c_ends_what_waits(host, guest, tmp_path, words, seen):
    with host.api as api:
        cmd_id = api.runCmd('g', 'sh', ['-c', 'echo here; sleep 60'])
        waiting = host.begin(str(tmp_path), *[word.replace('%s', cmd_id) for word in words])
        wait_until(lambda: seen in waiting.said(), 30)
        begin = time.monotonic()
        waiting.interrupt()
        code, said = waiting.wait(10)
        assert time.monotonic() - begin < 3 and code == 130, (code, said)
        for row in api.listCmds({'finished': False}):
            api.signalCmd(row['cmdId'], 'KILL')


# --- the folder for volunteers, and VirtualBox ---

def test_the_folder_that_is_copied_works(tmp_path, windows):
    """On a package like that of python.org: the rig's Python, zipped as it is there."""
    make_package(str(tmp_path / 'python-embed-amd64.zip'))
    subprocess.check_call([sys.executable, TOP + '/vmhost.py', '--bundle', 'vmhost.pyz'], cwd=str(tmp_path))
    make = [sys.executable, TOP + '/examples/windows/make_folder.py', 'python-embed-amd64.zip', 'vmhost.pyz',
            'vm host']
    subprocess.check_call(make, cwd=str(tmp_path))
    write(tmp_path / 'vm host' / 'host.ini', b'[Broker]\nport = auto\n[Host]\nxmlrpc_port = auto\n')
    state = tmp_path / 'vm host' / 'vmhost-state'
    command = path_there(tmp_path / 'vm host' / 'vmhost.cmd')
    host = Program('cmd', '/c', command, folder=str(tmp_path))
    wait_until(lambda: 'started' in host.said() or host.process.poll() is not None, 60)
    assert (state / 'xmlrpc.address').exists(), host.said()
    code, said = Program('cmd', '/c', command, 'status', folder=str(tmp_path)).wait()
    assert code == 0 and 'hypervisor' in said
    assert Program('cmd', '/c', command, 'shutdown', folder=str(tmp_path)).wait() == (0, '')
    assert host.wait()[0] == 0
    # Without an ini file of its own it takes none that happens to be where it is typed.
    os.rename(str(tmp_path / 'vm host' / 'host.ini'), str(tmp_path / 'host.ini'))
    code, said = Program('cmd', '/c', command, 'ls', folder=str(tmp_path)).wait()
    assert code == 1 and str(tmp_path.name) not in said and 'start it with `vmhost`' in said, said
    code, said = Program('cmd', '/c', command, '--help', folder=str(tmp_path)).wait()
    assert code == 0 and '\n  vmhost run web1 uname -a\n' in said
    again = subprocess.run(make, cwd=str(tmp_path), stderr=subprocess.PIPE)
    assert again.returncode == 1 and b'vm host is there already' in again.stderr


@pytest.mark.parametrize('word, code, tasks', [
    ('REMOVE', 0, ['Delete']), ('remove', 0, ['Delete']), ('', 0, ['Create']), ('delete', 2, [])])
def test_at_logon_makes_a_task_for_no_word_that_it_does_not_know(tmp_path, windows, word, code, tasks):
    """With programs of these names that write down what they are asked for."""
    shutil.copy(TOP + '/examples/windows/at-logon.cmd', str(tmp_path))
    for name in 'schtasks', 'powershell':
        write(tmp_path / (name + '.py'), b'import sys\nprint(*sys.argv[1:])\n')
    text = (tmp_path / 'at-logon.cmd').read_text()
    for name in 'schtasks', 'powershell':
        program = path_there(os.path.join(RIG, 'python', 'python.exe'))
        text = text.replace(name + ' ', '"%s" %s.py ' % (program, name))
    write(tmp_path / 'at-logon.cmd', text.replace('\n', '\r\n').encode())
    words = [word] if word else []
    found, said = Program('cmd', '/c', 'at-logon.cmd', *words, folder=str(tmp_path)).wait()
    assert found == code and re.findall('^/(Create|Delete)', said, re.M) == tasks, said


def make_package(path):
    """Modules are compiled there, as far as they are here."""
    there = os.path.join(RIG, 'python')
    library = io.BytesIO()
    with zipfile.ZipFile(library, 'w') as package:
        for folder, folders, names in os.walk(os.path.join(there, 'Lib')):
            folders[:] = [name for name in folders if name not in ('site-packages', '__pycache__')]
            for name in names:
                source = os.path.join(folder, name)
                compiled = glob.glob('%s/__pycache__/%s.cpython-3*[0-9].pyc' % (folder, name[:-len('.py')]))
                package.write((compiled or [source])[0],
                              os.path.relpath(source + 'c' * bool(compiled), os.path.join(there, 'Lib')))
    (dll,) = [name for name in os.listdir(there) if re.fullmatch(r'python3\d+\.dll', name)]
    with zipfile.ZipFile(path, 'w') as package:
        for folder in there, os.path.join(there, 'DLLs'):
            for name in os.listdir(folder):
                if name.endswith(('.exe', '.dll', '.pyd')):
                    package.write(os.path.join(folder, name), name)
        package.writestr(dll.replace('.dll', '.zip'), library.getvalue())
        package.writestr(dll.replace('.dll', '._pth'), dll.replace('.dll', '.zip') + '\n.\n\n#import site\n')


# --- the end, and what comes after it ---

def test_a_host_killed_in_the_middle_loses_nothing(tmp_path, windows):
    with WindowsHost(tmp_path / 'host', broker={'port': free_port()}) as host, \
            Agent(tmp_path / 'guest', host, 'g') as guest:
        with host.api as api:
            ids = [api.runCmd('g', 'sh', ['-c', 'echo %d >> runs; sleep 0.%d' % (number, number)])
                   for number in range(1, 10)]
        host.stop(signal.SIGKILL)      # as taskkill /F does
        host.start()
        assert {host.results(cmd_id)['state'] for cmd_id in ids} == {'exited'}
        with open(os.path.join(guest.files, 'runs')) as file:
            assert sorted(file.read().split()) == sorted('123456789')
        assert host.run_there(str(tmp_path), 'shutdown') == (0, '')
        assert host.process.wait(10) == 0
        host.start()
        with host.api as api:
            assert len(api.listFinishedCmds()) == 9


def free_port():
    import socket
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize('how', ['interrupt', 'close'])
def test_the_host_ends_in_order(tmp_path, windows, how):
    """By Ctrl-C, and by taskkill without /F, which asks its window."""
    with WindowsHost(tmp_path) as host:
        if how == 'interrupt':
            host.process.send_signal(signal.SIGINT)
        else:
            wait_until(lambda: 'started, pid' in host.log())
            pid = re.search(r'started, pid (\d+)', host.log()).group(1)
            assert Program('taskkill', '/PID', pid).wait()[0] == 0
        host.process.wait(20)
        assert not os.path.exists(os.path.join(host.state, 'broker.address'))
    assert host.has_stopped_in_order()
    assert 'vmhost ends: ' + {'interrupt': 'SIGINT', 'close': 'Windows asked for that'}[how] in host.log()


# What a console does to its programs: each of them runs a function of Windows' that calls their handlers.
TELL = """
import ctypes, sys
from ctypes import c_size_t, c_void_p, wintypes
kernel = ctypes.WinDLL('kernel32', use_last_error=True)
for name in 'OpenProcess', 'CreateRemoteThread', 'GetModuleHandleW':
    getattr(kernel, name).restype = wintypes.HANDLE
find = kernel.GetProcAddress
find.restype, find.argtypes = c_void_p, [wintypes.HANDLE, ctypes.c_char_p]
routine = find(kernel.GetModuleHandleW('kernelbase.dll'), b'CtrlRoutine')
process = wintypes.HANDLE(kernel.OpenProcess(0x1fffff, False, int(sys.argv[1])))
event = c_void_p(int(sys.argv[2]))
thread = kernel.CreateRemoteThread(process, None, c_size_t(0), c_void_p(routine), event, 0, None)
sys.exit(0 if routine and thread else 1)
"""


@pytest.mark.parametrize('event', [1, 2, 6], ids=['break', 'closed', 'shutdown'])
def test_the_host_ends_in_order_when_its_console_says_so(tmp_path, windows, event):
    with WindowsHost(tmp_path) as host:
        wait_until(lambda: 'started, pid' in host.log())
        pid = re.search(r'started, pid (\d+)', host.log()).group(1)
        write(tmp_path / 'tell.py', TELL.encode())
        assert Program('python', 'tell.py', pid, str(event), folder=str(tmp_path)).wait()[0] == 0
        assert host.process.wait(20) == 0
    assert host.has_stopped_in_order()


def test_a_host_that_nobody_hears_works_and_logs(tmp_path, windows):
    """pyw has no standard streams: it is started so by a Python that is detached from any console."""
    host = WindowsHost(tmp_path)
    code, said = python('-c', 'import subprocess, sys; subprocess.Popen(sys.argv[1:], creationflags=8)',
                        path_there(os.path.join(RIG, 'python', 'pythonw.exe')), *host.typed(),
                        folder=host.folder)
    assert code == 0, said
    log = os.path.join(host.state, 'vmhost.log')
    wait_until(lambda: os.path.exists(log) and 'started' in open(log).read(), 60)
    assert host.answers()
    assert host.run_there(host.folder, 'shutdown') == (0, '')
    assert GONE in host.run_there(host.folder, 'ls')[1]
    wait_until(host.has_stopped_in_order, 20)
    with open(log) as file:
        assert 'WARNING' not in file.read()


def test_a_damaged_journal_is_set_aside(tmp_path, windows):
    host = WindowsHost(tmp_path)
    os.makedirs(host.state)
    write(os.path.join(host.state, 'journal.sqlite'), b'no database ' * 1000)
    with host:
        assert [name for name in os.listdir(host.state) if '.corrupt-' in name]
        assert 'is damaged' in host.log()


def test_a_state_folder_is_cut_to_its_user_or_refused(tmp_path, windows):
    """Wine keeps no access list: which ones are there, and which is asked for, the test says and sees."""
    code, said = python('-c', '''if True:
        import sys
        sys.path.insert(0, %r)
        import faults, hoststate, windows
        asked, lists = [], ['D:AI(A;OICIID;FA;;;BU)']
        windows.access_of = lambda path: lists[-1] if path.endswith('state') else 'D:AI(A;ID;FA;;;SY)'
        windows.set_access = lambda path, access: asked.append(access)
        windows.has_access_lists = lambda path: True

        def try_it():
            try:
                hoststate.StateFolder('state').close()
            except faults.VMHostError as error:
                print(error)
        try_it()
        lists += asked                 # what it made so is left as it is
        try_it()
        print(asked == ['D:P(A;OICI;FA;;;SY)(A;OICI;FA;;;%%s)' %% windows.this_user()])
        windows.has_access_lists = lambda path: False
        try_it()
        windows.owner_of = lambda path: 'S-1-5-21-9-9-9-1001'
        try_it()
        open('state/planted', 'w').close()
        windows.owner_of = lambda path: stranger if 'planted' in path else windows.this_user()
        stranger = 'S-1-5-21-9-9-9-1002'
        try_it()
        ''' % path_there(TOP), folder=str(tmp_path))
    right, fat, strangers, planted = said.splitlines()
    assert 'planted belongs to another user (S-1-5-21-9-9-9-1002)' in planted
    assert code == 0 and right == 'True'
    assert 'state_dir' in fat and 'FAT' in fat and 'NTFS' in fat
    assert 'state_dir' in strangers and 'belongs to another user (S-1-5-21-9-9-9-1001)' in strangers


def test_what_keeps_it_from_starting_is_told(host, tmp_path):
    code, said = python(*host.typed(), folder=str(tmp_path))
    assert code == 1 and 'another vmhost runs on the state folder' in said
    (tmp_path / 'taken.ini').write_text('[Broker]\nport = %d\n[Host]\nxmlrpc_port = 0\n[Hypervisor]\n'
                                        'hypervisor = none\n' % host.broker_port)
    code, said = python(path_there(TOP + '/vmhost.py'), 'taken.ini', folder=str(tmp_path))
    assert code == 1 and 'port %d' % host.broker_port in said.replace(':', ' port ') and 'port' in said
    (tmp_path / 'other.ini').write_text('[Broker]\nembedded = no\nhost = 127.0.0.1\nport = %d\n[Hypervisor]\n'
                                        'hypervisor = none\n' % free_port())
    code, said = python(path_there(TOP + '/vmhost.py'), 'other.ini', 'check', folder=str(tmp_path))
    assert code == 1 and 'Unknown error' not in said and 'refused' in said
