"""Files by Chirp: our client and server, and the programs of cctools, in every combination."""

import contextlib
import filecmp
import hashlib
import os
import random
import shutil
import socket
import stat
import struct
import subprocess
import threading
import time

import pytest
from helpers import let_others_in, wait_until

import chirpclient
import chirplanding
import chirplocal
import chirpserver
import chirpupload
import chirpwire

REAL = shutil.which('chirp_server')
needs_cctools = pytest.mark.skipif(REAL is None, reason='coop-computing-tools is not installed')

NAMES = ['plain', 'with blank', 'per%cent %41', 'quo"te\'s', 'umläut', 'tab\there', 'new\nline',
         'back\\slash', 'bra{ce}~|', os.fsdecode(b'not-\xff\xfe-utf8'), 'n' * 255, '-dash', '#', ';$(true)']


@contextlib.contextmanager
def real_server(folder, scratch):
    """The real chirp_server on a free port of 127.0.0.1; its address."""
    acl = folder / '.__acl'
    acl.write_text('address:127.0.0.1 rwlda\n')
    port_file = scratch / 'port'
    words = [REAL, '-r', str(folder), '-I', '127.0.0.1', '-Z', str(port_file), '-a', 'address',
             '--inherit-default-acl', '-u', '127.0.0.1', '-U', '1000d', '-n', 'test', '-y', str(scratch)]
    if os.getuid() == 0:
        words += ['-i', 'nobody']
        for path in (folder, acl, scratch):
            shutil.chown(str(path), 'nobody')
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: port_file.is_file() and port_file.read_text().endswith('\n'), 30)
        yield '127.0.0.1', int(port_file.read_text())
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def our_server(folder, **options):
    options.setdefault('allow', ['127.0.0.1'])
    before = set(threading.enumerate())
    server = chirpserver.ChirpServer(str(folder), **options).start()
    try:
        yield server
    finally:
        server.stop()
        assert not [thread for thread in threading.enumerate()
                    if thread not in before and thread.name.startswith('chirp')]


@pytest.fixture(params=['ours', pytest.param('real', marks=[needs_cctools, pytest.mark.once])])
def served(request, tmp_path):
    """(address, the folder that is served)."""
    let_others_in(tmp_path)
    folder, scratch = tmp_path / 'served', tmp_path / 'scratch'
    folder.mkdir()
    scratch.mkdir()
    if request.param == 'real':
        with real_server(folder, scratch) as address:
            yield address, folder
    else:
        with our_server(folder) as server:
            yield server.address, folder


@pytest.fixture
def client(served):
    with chirpclient.ChirpClient(*served[0], timeout=20) as client:
        yield client


def write(path, content, mode=0o644, mtime=1000000000):
    path.write_bytes(content)
    os.chmod(str(path), mode)
    os.utime(str(path), (mtime, mtime))
    return path


@pytest.mark.parametrize('size', [0, 1, 1023, 64 * 1024, 64 * 1024 + 1, 4 << 20, (13 << 20) + 7])
def test_a_file_goes_there_and_back(client, served, tmp_path, size):
    content = random.Random(size).getrandbits(8 * size + 8).to_bytes(size + 1, 'big')[:size]
    source = write(tmp_path / 'source', content, 0o754)
    told = []
    client.put(str(source), 'there', progress=lambda *numbers: told.append(numbers))
    there = served[1] / 'there'
    assert there.read_bytes() == content
    assert there.stat().st_mtime == 1000000000 and stat.S_IMODE(there.stat().st_mode) == 0o754
    client.get('/there', str(tmp_path / 'back'))
    back = tmp_path / 'back'
    assert back.read_bytes() == content
    assert back.stat().st_mtime == 1000000000 and stat.S_IMODE(back.stat().st_mode) == 0o754
    assert told[-1] == (size, size)
    assert [name for name in os.listdir(str(served[1])) if not name.startswith('.__')] == ['there']


def test_what_is_replaced_keeps_its_mode_and_its_owner(client, served, tmp_path):
    """A file alone, and one in a folder."""
    (tmp_path / 'tree').mkdir()
    (tmp_path / 'back').mkdir()
    client.mkdir('/tree')
    source, back, there = tmp_path / 'tree' / 'x', tmp_path / 'back' / 'x', served[1] / 'tree' / 'x'
    moves = ((lambda: client.put(str(source), '/tree/x'), lambda: client.get('/tree/x', str(back))),
             (lambda: client.put(str(tmp_path / 'tree'), '/tree'),
              lambda: client.get('/tree', str(tmp_path / 'back'))))
    for content, (put, get) in zip((b'1', b'2'), moves):
        write(source, content, 0o755)
        for path in there, back:
            write(path, b'old', 0o640)
            if os.getuid() == 0:
                shutil.chown(str(path), 'nobody' if client.is_ours else served[1].stat().st_uid)
        owner = there.stat().st_uid
        put()
        get()
        for path in there, back:
            assert path.read_bytes() == content and stat.S_IMODE(path.stat().st_mode) == 0o640
            assert path.stat().st_uid == owner


NOBODY = 2 ** 32 - 1
ACCESS_LIST = struct.pack('<I' + 'HHI' * 5, 2, 1, 6, NOBODY, 2, 6, 1, 4, 0, NOBODY, 16, 6, NOBODY,
                          32, 0, NOBODY)
# u::rw, u:1:rw, g::-, m::rw, o::-: the mode shows 0660


@pytest.mark.skipif(not hasattr(os, 'setxattr'), reason='Linux knows access lists')
@pytest.mark.parametrize('size', [4, 300000])
def test_what_is_replaced_keeps_its_access_list(tmp_path, size):
    """Without it its group might read what the list keeps from it; the folder's default is not the file's."""
    (tmp_path / 'served').mkdir()
    source, back, there = tmp_path / 'x', tmp_path / 'back', tmp_path / 'served' / 'x'
    write(source, b'n' * size, 0o644)
    with our_server(there.parent) as server, chirpclient.ChirpClient(*server.address) as client:
        for listed in True, False:
            for path in back, there:
                write(path, b'old', 0o660)
                if listed:
                    os.setxattr(str(path), 'system.posix_acl_access', ACCESS_LIST)
                    os.setxattr(str(path), 'user.tag', b'mine')
                else:
                    path.unlink()
                    write(path, b'old', 0o660)
                    os.setxattr(str(path.parent), 'system.posix_acl_default', ACCESS_LIST)
            client.put(str(source), '/x')
            client.get('/x', str(back))
            for path in back, there:
                assert path.stat().st_size == size and stat.S_IMODE(path.stat().st_mode) == 0o660
                kept = {name: os.getxattr(str(path), name) for name in os.listxattr(str(path))}
                wanted = {'system.posix_acl_access': ACCESS_LIST, 'user.tag': b'mine'}
                assert kept == (wanted if listed else {})


def test_a_part_is_as_private_as_what_it_will_replace(tmp_path, monkeypatch):
    (tmp_path / 'served').mkdir()
    source, there, modes = tmp_path / 'x', tmp_path / 'served' / 'x', []
    write(source, b'n' * 300000, 0o644)
    write(there, b'old', 0o600)
    send = chirpupload.Upload._send_pieces

    def look(*arguments):
        modes.extend(stat.S_IMODE(path.stat().st_mode) for path in there.parent.glob('.*.vmhost-part'))
        return send(*arguments)
    monkeypatch.setattr(chirpupload.Upload, '_send_pieces', look)
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as client:
        client.put(str(source), '/x')
    assert modes == [0o600] and stat.S_IMODE(there.stat().st_mode) == 0o600


def test_a_folder_that_is_there_keeps_its_mode_and_its_time(client, served, tmp_path):
    source = tmp_path / 'source'
    (source / 'new').mkdir(parents=True)
    write(source / 'new' / 'x', b'x')
    os.chmod(str(source / 'new'), 0o750)
    there, here = served[1] / 'there', tmp_path / 'here'
    client.mkdir('/there')
    here.mkdir()
    for folder in there, here:
        os.chmod(str(folder), 0o1777)
    os.chmod(str(source), 0o700)
    client.put(str(source), '/there')
    client.get('/there', str(here))
    for folder in there, here:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o1777
        assert stat.S_IMODE((folder / 'new').stat().st_mode) == 0o750
    client.put(str(source), '/')
    assert (served[1] / 'new' / 'x').read_bytes() == b'x'
    assert stat.S_IMODE(served[1].stat().st_mode) != 0o700


def test_a_folder_in_a_folder_of_a_group_is_of_that_group(tmp_path):
    """As by cp -r: what is made in it later, too. Also where an attempt has stopped half way."""
    group = 33 if os.geteuid() == 0 else os.getegid()
    for folder in tmp_path / 'here', tmp_path / 'there':
        (folder / 'tree' / 'sub').mkdir(parents=True)
        os.chmod(str(folder / 'tree'), 0o750)
        target = folder / 'target'
        target.mkdir()
        os.chown(str(target), -1, group)
        os.chmod(str(target), 0o2775)
        os.mkdir(chirplocal.local_part(str(target / 'half')))
    with our_server(tmp_path / 'there') as server, chirpclient.ChirpClient(*server.address) as moving:
        for name in 'new', 'half':
            moving.put(str(tmp_path / 'here' / 'tree'), '/target/' + name)
            moving.get('/tree', str(tmp_path / 'here' / 'target' / name))
            for folder in tmp_path / 'here' / 'target' / name, tmp_path / 'there' / 'target' / name:
                for made, mode in (folder, 0o2750), (folder / 'sub', 0o2755):
                    found = os.stat(str(made))
                    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (mode, group), made


def make_tree(folder):
    """A folder with what folders hold."""
    folder.mkdir()
    for name in NAMES:
        write(folder / name, name.encode('utf-8', 'surrogateescape') * 3, 0o600, 1234567890)
    write(folder / 'large', os.urandom(300000), 0o640)
    (folder / 'empty').mkdir()
    deep = folder
    for level in range(50):
        deep = deep / ('d%d' % level)
        deep.mkdir()
        write(deep / 'file', b'%d' % level)
    os.symlink('plain', str(folder / 'link'))
    os.symlink('nowhere-at-all', str(folder / 'dangling'))
    os.utime(str(folder / 'empty'), (1111111111, 1111111111))
    return folder


def seen(folder):
    """{path: (what, content, mode, mtime)} of a folder."""
    found = {}
    for path, names, files in os.walk(os.fsencode(str(folder))):
        for name in names + files:
            entry = os.path.join(path, name)
            key = os.path.relpath(entry, os.fsencode(str(folder)))
            if name.startswith(b'.__'):
                continue
            if os.path.islink(entry):
                found[key] = ('link', os.readlink(entry))
            elif os.path.isdir(entry):
                found[key] = ('folder', None, int(os.stat(entry).st_mtime))
            else:
                with open(entry, 'rb') as file:
                    found[key] = ('file', file.read(), os.stat(entry).st_mode, int(os.stat(entry).st_mtime))
    return found


def test_a_folder_goes_there_and_back(client, served, tmp_path):
    source = make_tree(tmp_path / 'source')
    client.put(str(source), '/tree')
    assert seen(served[1] / 'tree') == seen(source)
    if any(b'\n' in name for name in seen(source)) and client.subject.startswith('address'):
        os.unlink(str(source / 'new\nline'))       # a server of ours doesn't list such a name
        client.unlink('/tree/new\nline')
    client.utime('/tree', 5, 5)
    client.get('tree', str(tmp_path / 'back'))
    assert seen(tmp_path / 'back') == seen(source)
    assert os.stat(str(tmp_path / 'back')).st_mtime == 5
    client.put(str(source), '/tree')               # into the folder that is there
    assert seen(served[1] / 'tree') == seen(source)


def test_the_calls_of_the_protocol(client, served):
    client.mkdir('/d')
    client.putfile('/d/f', b'0123456789')
    assert client.getfile('/d/f') == b'0123456789'
    assert client.stat('d/f').size == 10 and client.stat('d/f').is_file
    assert [(entry.name, entry.size, entry.is_dir) for entry in client.ls('/d')] == [('f', 10, False)]
    number, found = client.open('/d/f', 'rw')
    assert found.size == 10
    assert client.pwrite(number, b'abc', 3) == 3
    assert client.pread(number, 100, 2) == b'2abc6789'
    client.call('ftruncate', number, 5)
    assert client.fstat(number).size == 5
    client.call('fsync', number)
    client.close(number)
    client.symlink('f', '/d/l')
    assert client.readlink('/d/l') == 'f' and client.lstat('/d/l').is_link
    assert client.hash('/d/l') == hashlib.sha1(b'012ab').digest()
    assert client.hash('/d/f', 'md5') == hashlib.md5(b'012ab').digest()
    client.call('link', b'/d/f', b'/d/hard')
    client.call('truncate', b'/d/hard', 2)
    assert client.getfile('/d/f') == b'01'
    client.chmod('/d/f', 0o640)
    client.utime('/d/f', 1, 2)
    assert client.stat('/d/f').mtime == 2 and client.stat('/d/f').mode & 0o777 == 0o640
    client.call('access', b'/d/f', os.R_OK)
    client.rename('/d/f', '/g')
    client.unlink('/g')
    assert client.subject == 'address:127.0.0.1'
    assert client.free_bytes() > 0
    client.rmall('/d')
    assert not list(client.ls())
    client.mkdir('/e')
    client.rmdir('/e')


def test_what_is_appended_goes_to_the_end(client, served):
    number, _ = client.open('/log', 'wca')
    for content in (bytes(65536), b'x', bytes(65536)):
        assert client.pwrite(number, content, 1000000) == len(content)
    client.close(number)
    assert (served[1] / 'log').read_bytes() == bytes(65536) + b'x' + bytes(65536)


def test_a_folder_is_not_put_through_a_link_in_its_place(client, served, tmp_path):
    """As by cp -r: what the link leads to isn't the target's."""
    for folder in 'sub', 'beside':
        (tmp_path / 'source' / folder).mkdir(parents=True)
        write(tmp_path / 'source' / folder / 'file', b'new')
    client.mkdir('/target')
    client.mkdir('/other')
    client.putfile('/other/file', b'precious')
    client.symlink('../other', '/target/sub')
    with pytest.raises(chirpwire.Incomplete) as caught:
        client.put(str(tmp_path / 'source'), '/target')
    assert [path for path, _ in caught.value.failures] == [str(tmp_path / 'source' / 'sub')]
    assert client.getfile('/other/file') == b'precious' and client.getfile('/target/beside/file') == b'new'


def test_a_folder_that_lands_where_a_link_is_is_refused(client, served, tmp_path):
    """As by cp -r; one whose content goes to a link that the user names goes through it."""
    here = tmp_path / 'here'
    for folder in tmp_path / 'source', here / 'other', here / 'into':
        folder.mkdir(parents=True)
    write(tmp_path / 'source' / 'file', b'new')
    for path in '/source', '/other', '/into':
        client.mkdir(path)
    client.putfile('/source/file', b'new')
    client.symlink('../other', '/into/source')
    (here / 'into' / 'source').symlink_to('../other')
    with pytest.raises(chirpwire.ChirpError, match='into/source: .*link'):
        client.put(str(tmp_path / 'source'),
                   chirplanding.landing_there(client, str(tmp_path / 'source'), '/into'))
    with pytest.raises(chirpwire.ChirpError, match='into/source: .*link'):
        client.get('/source', chirplanding.landing_here(client, '/source', str(here / 'into')))
    assert list(client.ls('/other')) == [] == os.listdir(str(here / 'other'))
    client.put(str(tmp_path / 'source'),
               chirplanding.landing_there(client, str(tmp_path / 'source') + '/.', '/into/source'))
    client.get('/source', chirplanding.landing_here(client, '/source/.', str(here / 'into' / 'source')))
    assert client.getfile('/other/file') == b'new' == (here / 'other' / 'file').read_bytes()


@pytest.mark.parametrize('what, code', [
    (lambda client: client.stat('/missing'), -3), (lambda client: client.getfile('/folder'), -13),
    (lambda client: client.mkdir('/folder'), -4), (lambda client: client.stat('/file/below'), -14),
    (lambda client: client.rmdir('/file'), -14), (lambda client: client.unlink('/folder'), -13),
    (lambda client: client.rmdir('/folder'), -15), (lambda client: client.putfile('/folder', b'x'), -13),
    (lambda client: client.stat('/' + 'n' * 256), -24), (lambda client: client.readlink('/file'), -8),
    (lambda client: client.close(7), -12), (lambda client: client.open('/new', 'w'), -3),
    (lambda client: client.call('job_begin', 1), -8), (lambda client: client.putfile('/no/where', b'x'), -3),
    (lambda client: client.open('/file', 'wcx'), -4)])
def test_errors_have_the_codes_of_the_real_server(client, what, code):
    client.mkdir('/folder')
    client.putfile('/folder/inner', b'')
    client.putfile('/file', b'')
    with pytest.raises(chirpwire.Refused) as caught:
        what(client)
    assert caught.value.code == code
    assert client.getfile('/file') == b''          # and the connection is still good


# --- much of it -------------------------------------------------------------------------------

GIB = 1 << 30


def make_large(path, size=GIB):
    """A file of that size, of which most is a hole; something at the ends, and across the middle."""
    with open(str(path), 'wb') as file:
        for at in (0, size // 2 - 1000, size - 65537):
            file.seek(at)
            file.write(os.urandom(65537))
    return path


def same(one, other):
    """Whether two files are; in larger pieces than filecmp's, which take seconds for a GiB."""
    with open(str(one), 'rb', buffering=0) as first, open(str(other), 'rb', buffering=0) as second:
        while True:
            piece = first.read(1 << 20)
            if piece != second.read(1 << 20):
                return False
            if not piece:
                return True


@pytest.mark.slow
@pytest.mark.once
def test_a_large_file_goes_there_and_back(client, served, tmp_path):
    """A GiB with VMHOST_FULL=1."""
    source = make_large(tmp_path / 'source', GIB if os.environ.get('VMHOST_FULL') else GIB // 16)
    client.put(str(source), '/there')
    assert same(source, served[1] / 'there')
    client.get('/there', str(tmp_path / 'back'))
    assert same(source, tmp_path / 'back')
    remove(served[1] / 'there', tmp_path / 'back')


def remove(*paths):
    """Before the system writes all of it to the disk."""
    for path in paths:
        os.unlink(str(path))


def make_many(folder, count):
    """Files of up to a KiB, no two the same."""
    folder.mkdir()
    for n in range(count):
        (folder / ('f%04d' % n)).write_bytes(b'%d\n' % n * (n % 200))
    return folder


def same_folder(one, other):
    names = os.listdir(str(one))
    return sorted(names) == sorted(os.listdir(str(other))) and \
        filecmp.cmpfiles(str(one), str(other), names, shallow=False)[0] == names


@pytest.mark.slow
@pytest.mark.once
def test_a_folder_of_many_goes_there_and_back(tmp_path):
    source = make_many(tmp_path / 'source', 5000 if os.environ.get('VMHOST_FULL') else 1500)
    (tmp_path / 'served').mkdir()
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as client:
        client.put(str(source), '/there')
        assert same_folder(source, tmp_path / 'served' / 'there')
        client.get('/there', str(tmp_path / 'back'))
        assert same_folder(source, tmp_path / 'back')


# --- the real clients and our server -----------------------------------------------------------

def run(*words, input=None):
    done = subprocess.run([str(word) for word in words], input=input, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=60)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def ours(tmp_path):
    (tmp_path / 'served').mkdir()
    with our_server(tmp_path / 'served') as server:
        yield '%s:%d' % server.address


def tool(address, *words):
    return run('chirp', '-a', 'address', '-t', '20', address, *words)


@needs_cctools
@pytest.mark.parametrize('size', [0, 1, 300000])
def test_chirp_put_and_chirp_get(ours, tmp_path, size):
    content = os.urandom(size)
    write(tmp_path / 'a', content, 0o600)
    run('chirp_put', '-a', 'address', '-t', '20', tmp_path / 'a', ours, '/b c')
    assert (tmp_path / 'served' / 'b c').read_bytes() == content
    run('chirp_get', '-a', 'address', '-t', '20', ours, '/b c', tmp_path / 'd')
    assert (tmp_path / 'd').read_bytes() == content
    run('chirp_put', '-a', 'address', '-t', '20', '-', ours, '/piped', input=content)
    assert (tmp_path / 'served' / 'piped').read_bytes() == content


@needs_cctools
@pytest.mark.slow
@pytest.mark.once
def test_a_large_file_from_the_real_clients(ours, tmp_path):
    source = make_large(tmp_path / 'a', GIB // 4)
    run('chirp_put', '-a', 'address', '-t', '20', source, ours, '/b')
    assert same(source, tmp_path / 'served' / 'b')
    run('chirp_get', '-a', 'address', '-t', '20', ours, '/b', tmp_path / 'd')
    assert same(source, tmp_path / 'd')
    remove(tmp_path / 'served' / 'b', tmp_path / 'd')


@needs_cctools
def test_the_chirp_tool(ours, tmp_path, monkeypatch):
    source = tmp_path / 'tree'
    source.mkdir()
    for name in ('plain', 'with blank', 'per%cent', 'quo"te', 'n' * 255):
        write(source / name, name.encode(), 0o600)
    (source / 'below').mkdir()
    write(source / 'below' / 'file', b'inner', 0o600)
    os.symlink('plain', str(source / 'link'))
    tool(ours, 'put', source, '/tree')
    monkeypatch.chdir(str(tmp_path))
    tool(ours, 'get', '/tree', 'back')
    for name, what in seen(source).items():
        assert what[:2] == seen(tmp_path / 'back')[name][:2] == seen(tmp_path / 'served' / 'tree')[name][:2]
    listed = tool(ours, 'ls', '/tree')
    assert b'with blank' in listed and b'per%cent' in listed
    assert hashlib.md5(b'plain').hexdigest().encode() in tool(ours, 'md5', '/tree/plain').lower()
    assert b'address:127.0.0.1 rwld' in tool(ours, 'getacl', '/')
    tool(ours, 'setacl', '/', 'hostname:*.example.org', 'rl')          # told back, and opens nothing
    assert b'hostname:*.example.org rl' in tool(ours, 'getacl', '/')
    tool(ours, 'resetacl', '/', 'rl')
    assert tool(ours, 'getacl', '/').split() == [b'address:127.0.0.1', b'rla']
    assert b'address:127.0.0.1' in tool(ours, 'whoami')
    tool(ours, 'mkdir', '-p', '/a/b/c')
    tool(ours, 'mv', '/tree/plain', '/a/b/c/moved')
    tool(ours, 'chmod', '755', '/a/b/c/moved')
    assert tool(ours, 'cat', '/a/b/c/moved') == b'plain'
    tool(ours, 'df')
    tool(ours, 'stat', '/a')
    tool(ours, 'rm', '/tree')
    assert os.listdir(str(tmp_path / 'served')) == ['a']


@pytest.mark.once
@needs_cctools
def test_chirp_stream_files_and_chirp_benchmark(ours, tmp_path):
    write(tmp_path / 'a', b'lines of text\n' * 20000)       # it knows no other files
    run('chirp_stream_files', '-a', 'address', 'copy', tmp_path / 'a', ours, '/streamed')
    wait_until(lambda: (tmp_path / 'served' / 'streamed').exists(), 10)
    assert (tmp_path / 'served' / 'streamed').read_bytes() == (tmp_path / 'a').read_bytes()
    assert b'read' in run('chirp_benchmark', ours, '/bench', 1, 1, 1)


# --- who may connect ----------------------------------------------------------------------------

def test_a_stranger_is_dropped_before_a_byte_is_read(tmp_path):
    with our_server(tmp_path, allow=['127.0.0.9']) as server:
        with socket.create_connection(server.address) as sock:
            sock.settimeout(10)
            assert sock.recv(1) == b''
        with pytest.raises(chirpwire.ChirpError):
            chirpclient.ChirpClient(*server.address, timeout=5).stat('/')
        server.allow(['127.0.0.1', '127.0.0.9'])
        with chirpclient.ChirpClient(*server.address) as client:
            client.stat('/')
            server.allow([])
            with pytest.raises(chirpwire.ChirpError):
                client.stat('/')


def test_one_client_more_than_the_most_waits(tmp_path):
    """For one that is busy; one that is silent is let go for it."""
    write(tmp_path / 'file', b'x')
    with our_server(tmp_path, max_clients=2) as server, \
            chirpclient.ChirpClient(*server.address) as first, \
            chirpclient.ChirpClient(*server.address) as second:
        first.open('/file')
        second.open('/file')
        seen = []
        third = chirpclient.ChirpClient(*server.address)
        thread = threading.Thread(target=lambda: seen.append(third.stat('/file').size))
        thread.start()
        time.sleep(0.3)                # as long as it takes a server to turn one away
        assert not seen
        first.disconnect()
        thread.join(20)
        assert seen == [1]
        assert chirpclient.ChirpClient(*server.address).stat('/file').size == 1        # in the third's place
        assert second.stat('/file').size == 1
        third.disconnect()


def test_a_client_that_no_thread_is_left_for_is_turned_away(tmp_path, monkeypatch, caplog):
    start = threading.Thread.start

    def start_none(thread):
        if thread.name.startswith('chirp-'):
            raise RuntimeError('can\'t start new thread')
        start(thread)
    with our_server(tmp_path) as server:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, 'start', start_none)
            with socket.create_connection(server.address, 20) as sock:
                assert sock.recv(1) == b''
        assert 'can\'t start new thread' in caplog.text
        with chirpclient.ChirpClient(*server.address) as client:
            client.stat('/')


def test_who_one_is_is_told_as_the_real_server_tells_it(served):  # noqa: F811
    expected = b'yes\nyes\nyes\naddress\n127.0.0.1\n-8\n0\n3\nadd17\naddress:127.0.0.117\naddress:127.0.0.1'
    with socket.create_connection(served[0], 20) as sock, sock.makefile('rb') as answers:
        sock.sendall(b'address\n' + b''.join(b'whoami %d\n' % length for length in (-1, 0, 3, 17, 100000)))
        assert answers.read(len(expected)) == expected
