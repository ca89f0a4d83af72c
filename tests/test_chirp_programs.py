"""chirp.py as a program, and the wrapper round the real chirp_server."""

import os
import signal
import socket
import subprocess
import sys

import pytest
from helpers import let_others_in, wait_until
from test_chirp import make_tree, needs_cctools, seen, write

import chirp
import chirpclient
import chirpreal
import chirpserver
import chirpwire

PROGRAM = chirp.__file__


def chirp_py(*words, code=0):
    done = subprocess.run([sys.executable, PROGRAM] + [str(word) for word in words], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=60)
    assert done.returncode == code, done.stdout
    return done.stdout.decode()


@pytest.fixture
def serving(tmp_path):
    """HOST:PORT of a ``chirp.py serve``."""
    (tmp_path / 'served').mkdir()
    process = subprocess.Popen([sys.executable, PROGRAM, 'serve', str(tmp_path / 'served'), '--port', '0'],
                               stdout=subprocess.PIPE, universal_newlines=True)
    line = process.stdout.readline()
    assert line.startswith('serving %s on 127.0.0.1:' % (tmp_path / 'served'))
    yield line.split()[-1]
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    process.stdout.close()


def test_serve_put_get_ls(serving, tmp_path):
    source = make_tree(tmp_path / 'source')
    os.unlink(str(source / 'new\nline'))
    chirp_py('put', serving, source)
    assert seen(tmp_path / 'served' / 'source') == seen(source)
    chirp_py('get', serving, '/source', tmp_path / 'back')
    assert seen(tmp_path / 'back') == seen(source)
    listed = chirp_py('ls', serving, 'source').splitlines()
    assert 'with blank' in listed and 'd0/' in listed and 'umläut' in listed
    assert any(line.startswith('-rw-------') and line.endswith('plain')
               for line in chirp_py('ls', '-l', serving, '/source').splitlines())


def test_an_empty_path_is_none(serving, tmp_path):
    """As of a variable that isn't set."""
    source = write(tmp_path / 'x', b'x')
    for words in ('put', serving, source, ''), ('put', serving, '', 'y'), ('get', serving, 'x', ''):
        assert 'a path is empty' in chirp_py(*words, code=1)
    assert os.listdir(str(tmp_path / 'served')) == []


def test_who_has_read_enough_is_no_error(serving, tmp_path):
    write(tmp_path / 'served' / 'x', b'x' * 1000000)
    for words in ('ls', serving), ('get', serving, 'x', '-'):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([sys.executable, PROGRAM] + list(words), stdout=writer, stderr=subprocess.PIPE,
                              timeout=60)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, b'')


@pytest.mark.skipif(not os.path.exists('/dev/stdout'), reason='needs /dev/stdout')
def test_what_stands_in_standard_output_stays(serving, tmp_path):
    """Where that is a file, which /dev/stdout opens anew."""
    write(tmp_path / 'served' / 'x', b'content')
    with open(str(tmp_path / 'out'), 'wb') as out:
        out.write(b'a header, ')
        out.flush()
        subprocess.run([sys.executable, PROGRAM, 'get', serving, 'x', '/dev/stdout'], stdout=out, check=True,
                       timeout=60)
    assert (tmp_path / 'out').read_bytes() == b'a header, content'


def test_what_is_outside_is_refused(serving, tmp_path):
    """And not put somewhere else."""
    write(tmp_path / 'x', b'x')
    for words in ('put', serving, tmp_path / 'x', 'd/../../y'), ('get', serving, '../x', tmp_path / 'got'), \
            ('ls', serving, '..'):
        assert 'outside of what is served' in chirp_py(*words, code=1)
    assert not os.listdir(str(tmp_path / 'served')) and not (tmp_path / 'got').exists()


def test_a_file_is_no_folder_by_a_slash(serving, tmp_path):
    write(tmp_path / 'served' / 'x', b'x')
    assert 'x/: not a directory' in chirp_py('get', serving, 'x/', tmp_path / 'got', code=1)
    assert not (tmp_path / 'got').exists()


def test_errors_are_one_line(serving, tmp_path):
    assert 'does not exist' in chirp_py('get', serving, '/missing', tmp_path / 'x', code=1)
    assert chirp_py('put', serving, tmp_path / 'missing', code=1).count('\n') == 1
    assert 'HOST:PORT' in chirp_py('ls', '127.0.0.1:99999999', code=2)
    assert not os.path.exists(str(tmp_path / 'x')) and not os.path.exists(str(tmp_path / 'x.vmhost-part'))


def test_each_failure_is_one_line(serving, tmp_path):
    (tmp_path / 'served' / 'tree').mkdir()
    for index in range(5):
        os.symlink('/etc/passwd', str(tmp_path / 'served' / 'tree' / ('out%d' % index)))
    told = chirp_py('get', serving, 'tree', tmp_path / 'got', code=1)
    assert sorted(line.split(': ')[1] for line in told.splitlines()) == ['tree/out%d' % n for n in range(5)]


@pytest.mark.once
@pytest.mark.parametrize('words', [
    ['ls', '127.0.0.1:1', '--timeout', seconds] for seconds in ('-1', '0', 'nan', 'inf', '1e300', 'x')
] + [['serve', '.', '--port', port] for port in ('70000', '-1', 'x')])
def test_numbers_that_are_none(words):
    assert 'expected' in chirp_py(*words, code=2)


def test_a_closed_output_is_said(serving):
    done = subprocess.run(['/bin/sh', '-c', 'exec "$0" "$1" ls "$2" >&-', sys.executable, PROGRAM, serving],
                          stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1 and b'output is closed' in done.stderr and done.stderr.count(b'\n') == 1


def test_a_target_may_end_with_a_slash(serving, tmp_path):
    """As with cp -r: it is made, or what is there takes the folder in."""
    (tmp_path / 'served' / 'tree').mkdir()
    write(tmp_path / 'served' / 'tree' / 'x', b'x')
    for _ in 'new', 'again':
        chirp_py('get', serving, '/tree/', str(tmp_path / 'new') + '/')
    assert sorted(os.listdir(str(tmp_path / 'new'))) == ['tree', 'x']
    assert os.listdir(str(tmp_path / 'new' / 'tree')) == ['x']


@pytest.mark.once
def test_a_folder_that_is_too_deep_is_said(serving, tmp_path):
    """More levels than Python's calls may be nested."""
    folders = [str(tmp_path / 'deep')]
    while len(folders) < 1100:
        folders.append(folders[-1] + '/d')
    for folder in folders:
        os.mkdir(folder)
    try:
        said = chirp_py('put', serving, folders[0], code=1)
        assert 'too deep' in said and said.count('\n') == 1
    finally:
        for folder in reversed(folders):
            os.rmdir(folder)


@pytest.fixture
def real(tmp_path):
    let_others_in(tmp_path)
    folder = tmp_path / 'served'
    folder.mkdir()
    os.chmod(str(folder), 0o777)
    return str(folder)


@needs_cctools
def test_the_wrapper_serves_and_stops(real, tmp_path):
    write(tmp_path / 'a', b'content')
    server = chirpreal.RealChirpServer(real, allow=['127.0.0.1']).start()
    pid = server._process.pid
    try:
        with chirpclient.ChirpClient(*server.address) as client:
            client.put(str(tmp_path / 'a'), '/a')
            assert client.getfile('/a') == b'content'
            server.allow(['127.0.0.9'])
            with pytest.raises(chirpwire.Refused):
                client.getfile('/a')
            server.allow(['127.0.0.1'])
            assert client.getfile('/a') == b'content'
    finally:
        server.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(chirpwire.ChirpError):
        chirpclient.ChirpClient('127.0.0.1', 1, timeout=5).stat('/')


@needs_cctools
def test_the_wrapper_serves_on_the_port_that_was_asked_for(real):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    with chirpreal.RealChirpServer(real, port=port, allow=['127.0.0.1']) as server:
        assert server.address == ('127.0.0.1', port)
        with chirpclient.ChirpClient('127.0.0.1', port) as client:
            assert client.stat('/').is_dir


@needs_cctools
def test_the_wrapper_starts_a_server_again_that_died(real):
    with chirpreal.RealChirpServer(real, allow=['127.0.0.1']) as server:
        address, pid = server.address, server._process.pid
        os.kill(pid, signal.SIGKILL)

        def serves():
            try:
                with chirpclient.ChirpClient(*address, timeout=5) as client:
                    return server._process.pid != pid and client.stat('/')
            except chirpwire.ChirpError:
                return None
        wait_until(serves, 30)


def test_a_wrapper_that_can_not_start_says_why(real):
    with pytest.raises(chirpwire.ChirpError, match='no-such-program'):
        chirpreal.RealChirpServer(real, program='no-such-program').start()


def test_a_server_that_can_not_listen_leaves_nothing_open(tmp_path):
    with socket.socket() as other:
        other.bind(('127.0.0.1', 0))
        other.listen(1)
        before = sorted(os.listdir('/proc/self/fd'))
        with pytest.raises(OSError):
            chirpserver.ChirpServer(str(tmp_path), port=other.getsockname()[1]).start()
        assert sorted(os.listdir('/proc/self/fd')) == before


def test_a_stopped_server_still_tells_where_it_was(tmp_path):
    """A guest's link may ask while the main thread stops the server: no error of a closed socket."""
    with chirpserver.ChirpServer(str(tmp_path), port=0) as server:
        address = server.address
    assert server.address == address
