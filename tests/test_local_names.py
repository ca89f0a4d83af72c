"""Names of files on this machine: what Windows and macOS make of them, as far as Linux can imitate it."""

import errno
import os
import shutil
import subprocess
import time
import types
import unicodedata

import pytest
from test_chirp import our_server
from test_chirp_names import ours  # noqa: F401

import agent
import chirpclient
import chirpfolder
import chirplocal
import chirpupload
import chirpwire
import hostconfig
import localnames

NO_NAMES = ['a:b', 'back\\slash', '..\\out', 'dot.', 'space ', 'con', 'CON.txt', 'Aux .txt', 'nul', 'COM1',
            'com\u00b9.log', 'LPT\u00b2', 'CONIN$', 'a*', 'a?', 'a"b', '<', '>', '|', 'tab\t', '\udcff']
NAMES = ['a', 'README', '.hidden', 'cone', 'console.txt', 'com', 'com10', 'null', 'a b', '\u00e9', 'x~1', '-']


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr(localnames, 'ON_WINDOWS', True)


def test_names_that_windows_can_not_have_are_refused(windows):
    for name in NO_NAMES:
        with pytest.raises(OSError, match='no file can have this name'):
            localnames.check(name)
    for name in NAMES:
        localnames.check(name)


def test_a_name_that_is_too_long_for_windows_is_told(windows):
    for name in 255 * '\u00fc', 127 * '\U0001f600':
        localnames.check(name)
        localnames.check_path('C:\\dir\\' + name)
    for name in 256 * 'a', 128 * '\U0001f600':
        with pytest.raises(OSError, match='a name of more than 255'):
            localnames.check(name)
        with pytest.raises(OSError, match='a name of more than 255') as refused:
            localnames.check_path('C:\\dir\\' + name)
        assert refused.value.filename == 'C:\\dir\\' + name


@pytest.mark.parametrize('path', ['C:\\dir\\aux.txt', 'C:\\con\\x', '/dir/name.', 'C:name ', 'C:\\a\\b:c',
                                  '\\\\server\\share\\nul'])
def test_a_target_that_windows_would_take_for_another_is_refused(windows, path):
    with pytest.raises(OSError, match='no file can have the name .* here') as refused:
        localnames.check_path(path)
    assert refused.value.filename == path


def test_a_target_that_windows_takes_as_it_is_written_is_one(windows):
    for path in ('C:\\dir\\file.txt', 'C:', 'C:file', '..\\.\\a\\', '\\\\server\\share\\a', '\\\\.\\NUL',
                 '\\\\?\\C:\\dir\\name.', '/a b/.c'):
        localnames.check_path(path)


def test_a_target_of_get_and_a_folder_of_host_ini_are_checked_so(ours, tmp_path, windows):  # noqa: F811
    client, there = ours
    (there / 'file').write_bytes(b'x')
    with pytest.raises(OSError, match='the name aux.txt here'):
        client.get('/file', str(tmp_path / 'aux.txt'))
    assert os.listdir(str(tmp_path)) == [there.name]
    ini = tmp_path / 'host.ini'
    ini.write_text('[Host]\nstate_dir = aux.state\n')
    with pytest.raises(agent.ConfigError, match=r'\[Host\] state_dir = .*aux.state: no file can have'):
        hostconfig.read_settings(str(ini))


def test_elsewhere_any_name_is_one():
    for name in NO_NAMES + NAMES:
        localnames.check(name)


@pytest.mark.parametrize('name', ['a:b', '..\\out', 'CON'])
def test_a_name_that_can_not_be_is_told_and_the_rest_arrives(ours, tmp_path, windows, monkeypatch,  # noqa: F811
                                                                  name):
    client, there = ours
    monkeypatch.setattr(localnames, 'long_path', lambda path: path)
    (there / 'tree' / name).mkdir(parents=True)
    (there / 'tree' / 'good').write_bytes(b'x')
    (there / name / 'sub').mkdir(parents=True)
    target = tmp_path / 'target'
    with pytest.raises(chirpwire.Incomplete) as incomplete:
        client.get('/tree', str(target))
    assert [(path, why) for path, why in incomplete.value.failures] == [
        (chirpwire.shown('/tree/' + name), 'no file can have this name here')]
    assert os.listdir(str(target)) == ['good']


@pytest.mark.parametrize('fold, names', [
    (localnames.upper, ('README', 'Readme')), (localnames.case_folded, ('stra\u00dfe', 'STRASSE')),
    (localnames.normal, ('\u00e9', unicodedata.normalize('NFD', '\u00e9')))])
def test_the_second_of_two_names_that_are_one_is_told(ours, tmp_path, monkeypatch, fold, names):  # noqa: F811
    """A file and a folder alike, also where a target is there already; the first one is whole."""
    client, there = ours
    monkeypatch.setattr(localnames, 'folding', lambda folder: fold)
    for name in names:
        (there / 'tree' / 'files').mkdir(parents=True, exist_ok=True)
        (there / 'tree' / 'files' / name).write_bytes(name.encode('utf-8'))
        (there / 'tree' / 'folders' / name).mkdir(parents=True)
        (there / 'tree' / 'folders' / name / 'inner').write_bytes(name.encode('utf-8'))
    for _ in 'new', 'merged':
        with pytest.raises(chirpwire.Incomplete) as incomplete:
            client.get('/tree', str(tmp_path / 'target'))
        failures = incomplete.value.failures
        assert len(failures) == 2 and all('would be the same file as' in why for _, why in failures)
        (first,) = os.listdir(str(tmp_path / 'target' / 'files'))
        assert (tmp_path / 'target' / 'files' / first).read_bytes() == first.encode('utf-8')
        (first,) = os.listdir(str(tmp_path / 'target' / 'folders'))
        assert (tmp_path / 'target' / 'folders' / first / 'inner').read_bytes() == first.encode('utf-8')


def test_a_disk_that_tells_names_apart_is_known(tmp_path, monkeypatch):
    assert localnames.folding(str(tmp_path)) is None
    monkeypatch.setattr(localnames.sys, 'platform', 'darwin')
    assert localnames.folding(str(tmp_path)) is localnames.normal      # accents are one in any case
    assert os.listdir(str(tmp_path)) == []
    assert localnames.folding(str(tmp_path / 'missing')) is localnames.normal


@pytest.fixture
def ignores_case(tmp_path):
    """A folder that takes names which differ by case for one; it shows them in lower case."""
    if not shutil.which('lowntfs-3g') or os.getuid() or not os.path.exists('/dev/fuse'):
        pytest.skip('needs root, /dev/fuse and lowntfs-3g (package ntfs-3g)')
    disk, folder = str(tmp_path / 'disk'), tmp_path / 'ignores-case'
    with open(disk, 'wb') as file:
        file.truncate(16 << 20)
    subprocess.check_call(['mkntfs', '-q', '-F', '-f', '-s', '512', disk], stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL)
    folder.mkdir()
    subprocess.check_call(['lowntfs-3g', '-o', 'ignore_case', disk, str(folder)])
    yield folder
    subprocess.check_call(['umount', str(folder)])


def test_a_disk_that_ignores_case_loses_no_file(ours, ignores_case):  # noqa: F811
    client, there = ours
    tree = {'README': b'one', 'Readme': b'two', 'D/x': b'three', 'd/y': b'four', 'other': b'five'}
    for name, content in tree.items():
        (there / 'tree' / name).parent.mkdir(parents=True, exist_ok=True)
        (there / 'tree' / name).write_bytes(content)
    assert localnames.folding(str(ignores_case)) is localnames.case_folded
    for _ in 'new', 'again':
        with pytest.raises(chirpwire.Incomplete) as incomplete:
            client.get('/tree', str(ignores_case / 'target'))
        failed = [chirpwire.shown(path) for path, _ in incomplete.value.failures]
        assert len(failed) == 2 and all('would be the same file as' in why
                                        for _, why in incomplete.value.failures)
        arrived = {name: content for name, content in tree.items()
                   if not any(('/tree/' + name).startswith(path) for path in failed)}
        assert len(arrived) == 3
        for name, content in arrived.items():
            assert (ignores_case / 'target' / name).read_bytes() == content
        assert sorted(os.listdir(str(ignores_case / 'target'))) == ['d', 'other', 'readme']


def test_ntfs_compares_character_by_character():
    assert localnames.upper('stra\u00dfe') != localnames.upper('STRASSE')
    assert localnames.upper('\u00e9.TXT') == localnames.upper('\u00c9.txt')


def test_a_short_name_is_known_by_its_form():
    for name in 'LONGNA~1.TXT', 'A~1', 'longna~2', 'LONG~J3C.TXT':
        assert localnames.SHORT.match(name)
    for name in 'file.c~', '~lock', 'long name~1', 'a~1.html', 'a~', 'a.b~1.c':
        assert not localnames.SHORT.match(name)


def test_long_paths_are_written_as_windows_wants_them(windows, monkeypatch):
    monkeypatch.setattr(localnames.os.path, 'abspath', lambda path: path)
    assert localnames.long_path('C:\\a') == '\\\\?\\C:\\a' == localnames.long_path('\\\\?\\C:\\a')
    assert localnames.long_path('\\\\server\\share') == '\\\\?\\UNC\\server\\share'
    assert localnames.long_path('\\\\.\\NUL') == '\\\\.\\NUL'
    for path in 'C:\\a', '\\\\server\\share', '/posix':
        assert agent.short_path(localnames.long_path(path)) == path or path == '/posix'


def test_modes_there_are_made_up_where_windows_knows_none(tmp_path, monkeypatch):
    file, closed = tmp_path / 'file', tmp_path / 'closed'
    for path in file, closed:
        path.write_text('')
    os.chmod(str(file), 0o666)
    os.chmod(str(closed), 0o444)
    found = os.stat(str(file))
    assert chirplocal.mode_there(found) == 0o666
    modes = [os.stat(str(path)) for path in (file, closed, tmp_path)]
    monkeypatch.setattr(chirplocal, 'ON_WINDOWS', True)
    assert [chirplocal.mode_there(found) for found in modes] == [0o644, 0o444, 0o755]
    assert chirplocal.mode_there(modes[0], b'#!/b') == 0o755 == chirplocal.mode_there(modes[0], b'\x7fELF')


def test_a_name_that_is_held_for_a_moment_is_taken_a_moment_later(tmp_path, monkeypatch):
    """As where a virus scanner looks at what is new."""
    (tmp_path / 'new').write_text('x')
    tries, real = [], os.replace

    def held(source, target):
        tries.append(time.monotonic())
        if len(tries) < 3:
            raise PermissionError(errno.EACCES, 'held')
        real(source, target)
    monkeypatch.setattr(agent.os, 'replace', held)
    with pytest.raises(PermissionError):
        agent.replace(str(tmp_path / 'new'), str(tmp_path / 'name'))       # POSIX means what it says
    tries.clear()
    monkeypatch.setattr(agent, 'ON_WINDOWS', True)
    agent.replace(str(tmp_path / 'new'), str(tmp_path / 'name'))
    assert len(tries) == 3 and (tmp_path / 'name').read_text() == 'x'
    monkeypatch.setattr(agent, 'HELD', 0.1)

    def always_held(source, target):
        raise PermissionError(errno.EACCES, 'held', source, None, target)
    monkeypatch.setattr(agent.os, 'replace', always_held)
    with pytest.raises(PermissionError) as refused:
        agent.replace(str(tmp_path / 'new'), agent.LONG + 'C:\\name')
    assert agent.sentence(refused.value) == 'C:\\name: another program has it open, or it is read-only'
    monkeypatch.setattr(agent.os, 'replace', lambda *_: os.rename(str(tmp_path / 'none'), '/none/x'))
    with pytest.raises(FileNotFoundError):
        agent.replace('a', 'b')


def test_macos_is_asked_to_bring_bytes_to_the_disk_itself(tmp_path, monkeypatch):
    import fcntl
    asked = []
    monkeypatch.setattr(agent.sys, 'platform', 'darwin')
    monkeypatch.setattr(fcntl, 'F_FULLFSYNC', 51, raising=False)
    monkeypatch.setattr(fcntl, 'fcntl', lambda descriptor, what: asked.append(what))
    agent.sync(str(tmp_path))
    assert asked == [51]

    def refuse(descriptor, what):
        raise OSError(errno.ENOTSUP, 'not there')
    monkeypatch.setattr(fcntl, 'fcntl', refuse)
    synced = []
    monkeypatch.setattr(agent.os, 'fsync', synced.append)
    agent.sync(str(tmp_path))
    assert len(synced) == 1


# --- links, as Windows has them ---

@pytest.fixture
def links(monkeypatch):
    """What Windows is asked to make: [(where it leads, path, to a folder)]."""
    made = []
    monkeypatch.setattr(chirplocal, 'ON_WINDOWS', True)
    monkeypatch.setattr(chirplocal.os, 'symlink', lambda *words: made.append(words))
    return made


def missing():
    raise chirpwire.Refused(chirpwire.DOESNT_EXIST)


@pytest.mark.parametrize('tag, found', [(7, True), (9, False)])
def test_a_junction_is_a_link(tag, found, monkeypatch):
    monkeypatch.setattr(chirplocal, 'JUNCTION', 7)
    status = types.SimpleNamespace(st_reparse_tag=tag)
    entry = types.SimpleNamespace(is_symlink=lambda: False, stat=lambda follow_symlinks: status)
    assert chirplocal.is_link(entry) is found


@pytest.mark.parametrize('links', ['keep', 'skip', 'follow'])
def test_a_junction_is_moved_as_a_link_is(ours, tmp_path, monkeypatch, links):  # noqa: F811
    """A folder of that name plays one."""
    client, there = ours
    (tmp_path / 'tree' / 'junction').mkdir(parents=True)
    for name in 'file', 'junction/file':
        (tmp_path / 'tree' / name).write_text('text')
    for module in chirplocal, chirpupload:
        monkeypatch.setattr(module, 'is_link', lambda entry: entry.name == 'junction')
    try:
        client.put(str(tmp_path / 'tree'), '/tree', links=links)
        told = 0
    except chirpwire.Incomplete as incomplete:
        told = len(incomplete.failures)
    assert told == (links == 'keep')           # this one leads nowhere
    assert (there / 'tree' / 'file').exists()
    assert (there / 'tree' / 'junction' / 'file').exists() == (links == 'follow')


def test_windows_is_told_whether_a_link_leads_to_a_folder(links):
    for is_folder in lambda: True, lambda: False, missing:
        chirplocal.make_link('leads', 'path', is_folder)
    assert links == [('leads', 'path', True), ('leads', 'path', False), ('leads', 'path', False)]


def test_a_right_that_the_user_has_not_is_told_with_the_remedy(links, monkeypatch):
    def refuse(*_):
        error = OSError(errno.EINVAL, 'a required privilege is not held by the client')
        error.winerror = 1314
        raise error
    monkeypatch.setattr(chirplocal.os, 'symlink', refuse)
    with pytest.raises(OSError, match='developer mode'):
        chirplocal.make_link('leads', 'path', lambda: False)


def test_links_of_windows_are_written_as_the_guest_reads_them(links, monkeypatch):
    for leads, there in ('folder\\file', b'folder/file'), ('..\\up', b'../up'), ('plain', b'plain'):
        monkeypatch.setattr(chirplocal.os, 'readlink', lambda path, leads=leads: leads)
        assert chirplocal.link_there('path') == there
    for leads in '\\\\?\\C:\\folder', 'D:\\file', '\\\\?\\UNC\\server\\share', '\\root':
        monkeypatch.setattr(chirplocal.os, 'readlink', lambda path, leads=leads: leads)
        with pytest.raises(OSError, match='which only this machine has'):
            chirplocal.link_there('path')


def test_a_server_whose_disk_ignores_case_is_sent_no_second_file_of_a_name(ignores_case, tmp_path):
    """The first of two stays as it came; the second is told, of files, folders, and one of each."""
    for name in 'README', 'Readme', 'D/x', 'd/y', 'Both', 'both/z', 'other':
        (tmp_path / 'tree' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'tree' / name).write_bytes(name.encode())
    for tree in 'new', 'merged', 'new':
        if tree == 'merged':
            (ignores_case / tree).mkdir(exist_ok=True)
        with our_server(ignores_case) as server, chirpclient.ChirpClient(*server.address) as moving, \
                pytest.raises(chirpwire.Incomplete) as incomplete:
            moving.put(str(tmp_path / 'tree'), '/' + tree)
        failed = dict(incomplete.value.failures)
        assert len(failed) == 3 and all('would be the same file as' in why for why in failed.values()), failed
        arrived = [name for name in ('README', 'Readme', 'D/x', 'd/y', 'Both', 'both/z', 'other')
                   if not any(str(tmp_path / 'tree' / name).startswith(path) for path in failed)]
        assert len(arrived) == 4
        for name in arrived:
            assert (ignores_case / tree / name).read_bytes() == name.encode()
        assert len(os.listdir(str(ignores_case / tree))) == 4


def test_more_names_than_can_be_held_go_to_a_disk_that_tells_them_apart(tmp_path, ignores_case, monkeypatch):
    monkeypatch.setattr(chirpfolder, 'KNOWN', 3)
    (tmp_path / 'tree').mkdir()
    for number in range(6):
        (tmp_path / 'tree' / ('f%d' % number)).write_bytes(b'x')
    (tmp_path / 'apart').mkdir()
    with our_server(tmp_path / 'apart') as server, chirpclient.ChirpClient(*server.address) as moving:
        moving.put(str(tmp_path / 'tree'), '/tree')
    with our_server(ignores_case) as server, chirpclient.ChirpClient(*server.address) as moving:
        with pytest.raises(chirpwire.Incomplete, match='too many names') as incomplete:
            moving.put(str(tmp_path / 'tree'), '/tree')
        assert incomplete.value.count == 3
    assert len(os.listdir(str(ignores_case / 'tree'))) == 3
    assert len(os.listdir(str(tmp_path / 'apart' / 'tree'))) == 6


def test_names_that_differ_by_case_are_sent_where_they_are_two(ours, tmp_path):  # noqa: F811
    client, there = ours
    for name in 'README', 'Readme', 'D/x', 'd/y':
        (tmp_path / 'tree' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'tree' / name).write_bytes(name.encode())
    for _ in 'new', 'again':
        client.put(str(tmp_path / 'tree'), '/tree')
        for name in 'README', 'Readme', 'D/x', 'd/y':
            assert (there / 'tree' / name).read_bytes() == name.encode()
