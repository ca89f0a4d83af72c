"""What a folder may hold: odd names, modes, links, sizes, numbers; and attempts that stopped half way."""

import errno
import os
import shutil
import stat
import subprocess
import threading

import pytest
from test_chirp import client, our_server, seen, served, write  # noqa: F401

import chirpclient
import chirpdownload
import chirplocal
import chirpmove
import chirpwire

ODD = ['new\nline', 'Icon\r', '\r', '.__mine', '.__', 'x.vmhost-part', 'a\\b', '%0A', 'tab\t', 'é',
       os.fsdecode(b'\xff\xfe'), ' ', '-', '\x01\x02', '"', '~', 'n' * 200]


@pytest.fixture
def ours(tmp_path):
    """A client of a server of ours, and the folder that it serves."""
    (tmp_path / 'served').mkdir()
    with our_server(tmp_path / 'served') as server, chirpclient.ChirpClient(*server.address) as moving:
        yield moving, tmp_path / 'served'


@pytest.fixture(autouse=True)
def all_progress(monkeypatch):
    monkeypatch.setattr(chirpmove.Meter, 'EVERY', 0)


def make_odd(folder):
    for name in ODD:
        (folder / ('d' + name)[:255]).mkdir(parents=True)
        write(folder / name, name.encode('utf-8', 'surrogateescape') * 3)
        write(folder / ('d' + name)[:255] / name, b'inner')
        os.symlink(name, str(folder / ('l' + name)[:254]))
    return folder


def test_any_name_arrives_between_two_of_ours(ours, tmp_path):
    client, there = ours  # noqa: F811
    source = make_odd(tmp_path / 'source')
    for _ in 'new', 'again':
        client.put(str(source), '/tree')
        client.get('/tree', str(tmp_path / 'back'))
        assert seen(there / 'tree') == seen(tmp_path / 'back') == seen(source)


def test_what_a_peer_can_not_carry_is_told_by_name(client, served, tmp_path):  # noqa: F811
    """Each name arrives, or is among the failures."""
    source = make_odd(tmp_path / 'source')
    failed = []
    for move in (lambda: client.put(str(source), '/tree'),
                 lambda: client.get('/tree', str(tmp_path / 'back'))):
        try:
            move()
        except chirpwire.Incomplete as incomplete:
            failed += [path for path, _ in incomplete.failures]
    if client.is_ours:
        assert not failed
    missing = set(os.listdir(str(source))) - set(os.listdir(str(tmp_path / 'back')))
    assert all(any(path.endswith(chirpwire.shown(name)) for path in failed) for name in missing), \
        (missing, failed)


@pytest.mark.parametrize('name', ['\n', '\nx', 'x\n\ny', '\n0', '\n\n'])
def test_a_name_that_ends_a_list_too_early_is_no_end(client, served, tmp_path, name):  # noqa: F811
    """All of the folder arrives, or it is told; the folders beside it arrive."""
    there = tree_of(served[1] / 'tree', {'folder/' + name: b'x', 'folder/after': b'y', 'beside/file': b'z'})
    told = []
    try:
        client.get('/tree', str(tmp_path / 'back'))
    except chirpwire.Incomplete as incomplete:
        told = incomplete.failures
    assert (tmp_path / 'back' / 'beside' / 'file').read_bytes() == b'z'
    if client.is_ours or not told:
        assert not told and seen(tmp_path / 'back') == seen(there)
    else:
        assert [path for path, _ in told] == ['/tree/folder'] and 'line feed' in told[0][1]
        with pytest.raises(chirpwire.Unlistable, match='^/tree/folder: a name in it begins with a line feed'):
            list(client.ls('/tree/folder'))
    assert [entry.name for entry in client.ls('/tree/beside')] == ['file']


def test_what_a_transfer_left_is_told_of(ours, tmp_path):
    """In a folder that is moved; each failure has its path once, and none of a temporary folder."""
    client, there = ours  # noqa: F811
    left = '.0123456789abcdef.vmhost-part'
    source = tree_of(tmp_path / 'source', {left: b'half', 'x': b'x', 'd/' + left: b'half'})
    os.makedirs(str(source / 'e' / left))
    with pytest.raises(chirpwire.Incomplete) as incomplete:
        client.put(str(source), '/tree')
    begun = 'a transfer has begun it, and not ended: repeat that, or remove this'
    wanted = {left, 'd/' + left, 'e/' + left}
    assert dict(incomplete.value.failures) == {'%s/%s' % (source, path): begun for path in wanted}
    shutil.copytree(str(source), str(there / 'left'))
    with pytest.raises(chirpwire.Incomplete) as incomplete:
        client.get('/left', str(tmp_path / 'back'))
    assert dict(incomplete.value.failures) == {'/left/' + path: begun for path in wanted}
    assert sorted(os.listdir(str(tmp_path / 'back'))) == ['d', 'e', 'x']


def test_a_file_that_is_none_is_said(ours, tmp_path):
    client, there = ours  # noqa: F811
    os.mkfifo(str(there / 'pipe'))
    with pytest.raises(OSError, match='neither file, folder nor link'):
        client.get('/pipe', str(tmp_path / 'pipe'))


def test_a_target_that_is_a_link_is_written_through(client, served, tmp_path):  # noqa: F811
    """As cp does: what it leads to gets the content, by way of folders that are links, too."""
    here, there = tmp_path / 'here', served[1]
    for folder in here, there:
        (folder / 'deep' / 'er').mkdir(parents=True, exist_ok=True)
        write(folder / 'deep' / 'file', b'old')
        os.symlink('deep/er', str(folder / 'way'))
        for name, leads in ('way/back', '../file'), ('chain', 'way/back'), ('link', 'deep/file'):
            os.symlink(leads, str(folder / name))
    for name in 'deep', 'deep/er', 'deep/file':
        os.chmod(str(there / name), 0o777)             # the real server is another user
    for number, name in enumerate(('link', 'chain', 'way/back')):
        source = write(tmp_path / 'source', b'%d' % number * 100000 * number + b'.')
        client.put(str(source), '/' + name)
        assert (there / 'deep' / 'file').read_bytes() == source.read_bytes()
        client.get('/deep/file', str(here / name))
        assert (here / 'deep' / 'file').read_bytes() == source.read_bytes()
    for folder in here, there:
        assert os.readlink(str(folder / 'link')) == 'deep/file' and (folder / 'chain').is_symlink()
        assert set(os.listdir(str(folder / 'deep'))) - {'.__acl'} == {'er', 'file'}


@pytest.mark.parametrize('leads', ['nothing', '/etc/passwd', '../../x', 'link'])
def test_a_target_that_leads_out_or_nowhere_is_told_and_stays(client, served, tmp_path, leads):  # noqa: F811
    source = write(tmp_path / 'source', b'new')
    outside = write(tmp_path / 'x', b'untouched')
    for folder in tmp_path / 'here', served[1]:
        (folder / 'in').mkdir(parents=True)
        os.symlink(leads, str(folder / 'in' / 'link'))
    os.chmod(str(served[1] / 'in'), 0o777)             # the real server is another user
    with pytest.raises(chirpwire.ChirpError, match='in/link is a link to .*%s, where nothing is' % leads):
        client.put(str(source), '/in/link')
    with pytest.raises(chirpwire.ChirpError, match='in/link is a link to .*%s, where nothing is' % leads):
        client.get('/in/link', str(tmp_path / 'got'))
    client.put(str(source), '/in/source')
    if leads in ('nothing', 'link'):
        with pytest.raises(OSError, match='link'):
            client.get('/in/source', str(tmp_path / 'here' / 'in' / 'link'))
        with pytest.raises(OSError, match='link'):
            client.put(str(tmp_path / 'here' / 'in' / 'link'), '/in/new')
    for folder in tmp_path / 'here', served[1]:
        assert os.readlink(str(folder / 'in' / 'link')) == leads
    assert outside.read_bytes() == b'untouched'


def test_what_is_no_file_there_is_not_replaced_by_one(ours, tmp_path):
    client, there = ours  # noqa: F811
    source = tree_of(tmp_path / 'source', {'fifo': b'x', 'large': b'x' * 100000, 'other': b'x'})
    (there / 'tree').mkdir()
    for name in 'fifo', 'large':
        os.mkfifo(str(there / 'tree' / name))
        with pytest.raises(chirpwire.Refused, match='neither a file nor a folder'):
            client.put(str(source / name), '/tree/' + name)
    with pytest.raises(chirpwire.Incomplete, match='neither a file nor a folder') as incomplete:
        client.put(str(source), '/tree')
    assert all(reason.endswith('(at the target)') for _, reason in incomplete.value.failures)
    assert incomplete.value.count == 2 and (there / 'tree' / 'other').read_bytes() == b'x'
    assert all(stat.S_ISFIFO(os.lstat(str(there / 'tree' / name)).st_mode) for name in ('fifo', 'large'))


def test_links_lead_where_they_should_or_are_told(client, served, tmp_path):  # noqa: F811
    source = tree_of(tmp_path / 'source', {'file': b'x'})
    leads = ['a b', 'a\nb', 'a%0Ab', '%41', 'a\\~"<>', os.fsdecode(b'\xff')]
    for number, lead in enumerate(leads):
        os.symlink(lead, str(source / ('link%d' % number)))
    told = []
    try:
        client.put(str(source), '/tree')
    except chirpwire.Incomplete as incomplete:
        told = [path[-5:] for path, reason in incomplete.failures if 'white space' in reason]
    assert sorted(told) == ([] if client.is_ours else ['link0', 'link1'])
    there = {path: entry for path, entry in seen(source).items() if os.fsdecode(path) not in told}
    assert seen(served[1] / 'tree') == there


@pytest.mark.parametrize('name', ['.__acl', '.__put.x'])
def test_a_name_that_servers_keep_is_told_and_leaves_nothing(client, served, tmp_path, name):  # noqa: F811
    write(tmp_path / 'file', b'x')
    before = sorted(os.listdir(str(served[1])))
    with pytest.raises(OSError, match='Chirp servers keep|chirp_server shows nobody'):
        client.put(str(tmp_path / 'file'), '/' + name)
    assert sorted(os.listdir(str(served[1]))) == before


def test_what_servers_keep_in_a_folder_is_fetched_and_never_written(ours, tmp_path):
    """A program may have made what has such a name, or chirp_server, which goes by its ACLs."""
    client, there = ours  # noqa: F811
    source = tree_of(tmp_path / 'source', {'.__acl': b'address:* rwlda', 'x': b'x', 'd/.__uuid': b'1'})
    with pytest.raises(chirpwire.Incomplete) as incomplete:
        client.put(str(source), '/tree')
    assert sorted(path.rpartition('/')[2] for path, _ in incomplete.value.failures) == ['.__acl', '.__uuid']
    os.symlink('.__acl', str(source / 'link'))
    for name in '.__acl', 'd/.__uuid', 'link':
        os.rename(str(source / name), str(there / 'tree' / name))
    client.get('/tree', str(tmp_path / 'back'))
    assert seen(tmp_path / 'back') == seen(there / 'tree')
    for change in (lambda: client.putfile('/tree/.__acl', b''), lambda: client.putfile('/tree/link', b''),
                   lambda: client.unlink('/tree/.__acl'), lambda: client.rename('/tree/x', '/tree/.__acl'),
                   lambda: client.open('/tree/link', 'w')):
        with pytest.raises(chirpwire.Refused, match='not authorized'):
            change()
    assert (there / 'tree' / '.__acl').read_bytes() == b'address:* rwlda'


def test_what_a_server_that_died_was_receiving_is_told_of_or_removed(ours, tmp_path):
    client, there = ours  # noqa: F811
    left = '.__put.' + '0123456789abcdef'
    source = tree_of(tmp_path / 'source', {'x': b'x', 'd/y': b'y'})
    tree_of(there / chirpwire.part_name(b'new').decode(), {left: b'half', 'd/' + left: b'half'})
    client.put(str(source), '/new')
    assert seen(there / 'new') == seen(source)
    write(there / 'new' / left, b'half')
    write(there / 'new' / '.__put.1', b'mine')         # which no server of ours makes
    with pytest.raises(chirpwire.Incomplete) as incomplete:
        client.get('/new', str(tmp_path / 'back'))
    assert [path for path, _ in incomplete.value.failures] == ['/new/' + left]
    assert sorted(os.listdir(str(tmp_path / 'back'))) == ['.__put.1', 'd', 'x']


def test_modes_are_what_they_are(ours, tmp_path):
    client, there = ours  # noqa: F811
    source = tmp_path / 'source'
    (source / 'closed').mkdir(parents=True)
    for mode in 0o444, 0o400, 0o755, 0o600, 0o640:
        write(source / 'closed' / oct(mode), b'x' * mode * 200, mode)
        write(source / 'closed' / ('small' + oct(mode)), b'x', mode)
    os.chmod(str(source / 'closed'), 0o555)
    os.chmod(str(source), 0o500)
    client.put(str(source), '/tree')
    client.get('/tree', str(tmp_path / 'back'))
    assert seen(there / 'tree') == seen(tmp_path / 'back') == seen(source)
    assert stat.S_IMODE((there / 'tree' / 'closed').stat().st_mode) == 0o555
    assert stat.S_IMODE((there / 'tree').stat().st_mode) == 0o500


def tree_of(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, content)
    return folder


@pytest.mark.once
@pytest.mark.parametrize('way', ['put', 'get'])
@pytest.mark.parametrize('disk', ['takes all', 'takes none', 'keeps no modes'])
def test_what_a_disk_does_not_keep_is_told_and_is_no_failure(tmp_path, monkeypatch, way, disk):
    """As of ntfs-3g, which takes any mode, and of vfat, which refuses many."""
    there, here = tmp_path / 'there', tmp_path / 'here'
    for folder in there, here:
        folder.mkdir()
    source, target = (here, there) if way == 'put' else (there, here)
    (source / 'tree' / 'sub').mkdir(parents=True)
    contents = {'tree/small': b'1', 'tree/sub/secret': b'2', 'tree/large': os.urandom(100000)}
    for name, content in contents.items():
        write(source / name, content, 0o440)
    for name in 'tree/sub', 'tree':
        (source / name).chmod(0o555)
        os.utime(str(source / name), (1e9, 1e9))

    def take(*_, **options):
        if disk == 'takes none':
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    for name in ('chmod', 'fchmod') + (('utime',) if disk != 'keeps no modes' else ()):
        monkeypatch.setattr(os, name, take)
    what = 'its mode' if disk == 'keeps no modes' else 'its mode and time'
    with our_server(there) as server, chirpclient.ChirpClient(*server.address) as moving:
        for name, those in ('tree', {'tree', 'tree/sub'} | set(contents)), ('tree/large', {'tree/large'}):
            target_name = name.replace('/', ' ')
            if way == 'put':
                moving.put(str(source / name), '/' + target_name)
            else:
                moving.get('/' + name, str(target / target_name))
            told = {path[path.index('tree'):]: why for path, why in moving.unkept.some}
            assert told == dict.fromkeys(those, what)
            assert moving.unkept.count == len(those)
        for name, content in contents.items():
            assert (target / name).read_bytes() == content
        monkeypatch.undo()
        if way == 'put':
            moving.put(str(source / 'tree'), '/again')
            assert not moving.unkept.count and seen(target / 'again') == seen(source / 'tree')


@pytest.mark.parametrize('way', ['put', 'get'])
def test_what_does_not_arrive_is_not_told_to_have_come_without_its_mode(tmp_path, monkeypatch, way):
    here, there = tmp_path / 'here', tmp_path / 'there'
    for folder in here / 'tree', there / 'tree':
        folder.mkdir(parents=True)
    source = here if way == 'put' else there
    for name in 'bad', 'good':
        write(source / 'tree' / name, b'content', 0o440)
    replace = os.replace

    def rename(old, new, **options):
        if os.path.basename(os.fsencode(new)) == b'bad':
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), new)
        replace(old, new, **options)
    for name in 'rename', 'replace':
        monkeypatch.setattr(os, name, rename)
    for name in 'chmod', 'fchmod':
        monkeypatch.setattr(os, name, lambda *_, **options: None)
    with our_server(there) as server, chirpclient.ChirpClient(*server.address) as moving:
        with pytest.raises(chirpwire.Incomplete) as failed:
            move = moving.put if way == 'put' else moving.get
            move(*(str(here / 'tree'), '/tree')[::1 if way == 'put' else -1])
        assert [os.path.basename(path) for path, _ in failed.value.failures] == ['bad']
        assert [os.path.basename(path) for path, _ in moving.unkept.some] == ['good']


def test_the_last_moment_of_a_second_is_in_that_second(client, served, tmp_path):  # noqa: F811
    """A copy is never newer than what it was made of."""
    times = {'late': 1600000000999999999, 'before 1970': -1, 'whole': 1600000000 * 10 ** 9}
    (tmp_path / 'tree').mkdir()
    for name, moment in times.items():
        os.utime(str(write(tmp_path / 'tree' / name, b'content')), ns=(moment, moment))
    client.put(str(tmp_path / 'tree'), '/tree')
    client.get('/tree', str(tmp_path / 'again'))
    for folder in served[1] / 'tree', tmp_path / 'again':
        assert {name: (folder / name).stat().st_mtime_ns for name in times} == {
            name: moment // 10 ** 9 * 10 ** 9 for name, moment in times.items()}
    os.utime(str(served[1] / 'tree' / 'late'), ns=(times['late'], times['late']))
    assert client.stat('/tree/late').mtime == 1600000000


@pytest.mark.skipif(os.name == 'nt', reason='Windows tells the whole path itself')
def test_what_can_not_be_removed_is_told_by_its_path(tmp_path, monkeypatch):
    def rmdir(name, **options):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), name)
    monkeypatch.setattr(os, 'rmdir', rmdir)
    (tmp_path / 'left' / 'inner').mkdir(parents=True)
    with pytest.raises(OSError) as failed:
        chirplocal.remove_tree(str(tmp_path / 'left'))
    assert failed.value.filename == str(tmp_path / 'left')


@pytest.mark.skipif(os.name != 'posix', reason='a link that becomes a folder')
def test_a_link_that_becomes_something_else_is_told_to_be_none(client, served, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(OSError, match='none any more'):
        chirplocal.link_there(str(tmp_path))
    (served[1] / 'tree').mkdir()
    link = served[1] / 'tree' / 'link'
    link.symlink_to('nowhere')
    get = chirpdownload.Download._get_link

    def become(self, *arguments):
        link.unlink()
        link.mkdir()
        get(self, *arguments)
    monkeypatch.setattr(chirpdownload.Download, '_get_link', become)
    with pytest.raises(chirpwire.Incomplete, match='/tree/link: it was a link, and is none any more'):
        client.get('/tree', str(tmp_path / 'here'))


@pytest.mark.parametrize('way', ['put', 'get'])
def test_what_another_source_left_is_not_there(client, served, tmp_path, way):  # noqa: F811
    """A transfer is cancelled; something else is moved to the same target."""
    first = {'f%d' % n: b'%d' % n * 1000 for n in range(60)}
    first.update({'deep/x': b'1', 'big': os.urandom(9 << 20), 'is a file': b'1', 'a folder/x': b'1',
                  'same': b'1'})
    second = {'same': b'2', 'is a file/now': b'2', 'a folder': b'2', 'f1': b'2', 'big2': os.urandom(100000)}
    sources = tmp_path / 'here' if way == 'put' else served[1]
    first.update({'mode': b'', 'larger mode': b'm' * 100000})
    second.update({'mode': b'', 'larger mode': b'm' * 100000})
    trees = tree_of(sources / 'first', first), tree_of(sources / 'second', second)
    for name in 'mode', 'larger mode':
        os.chmod(str(trees[0] / name), 0o640)
        os.chmod(str(trees[1] / name), 0o755)
    for stops in 5000, 100000, 3 << 20:
        cancel = threading.Event()
        with pytest.raises(chirpwire.Cancelled):
            def stop(moved, total, cancel=cancel, stops=stops):
                if moved >= stops:
                    cancel.set()
            if way == 'put':
                client.put(str(trees[0]), '/target', progress=stop, cancel=cancel)
            else:
                client.get('/first', str(tmp_path / 'target'), progress=stop, cancel=cancel)
        if way == 'put':
            client.put(str(trees[1]), '/target')
            assert seen(served[1] / 'target') == seen(trees[1])
            client.rmall('/target')
        else:
            client.get('/second', str(tmp_path / 'target'))
            assert seen(tmp_path / 'target') == seen(trees[1])
            subprocess.check_call(['rm', '-rf', str(tmp_path / 'target')])


def test_links_are_kept_skipped_or_followed(ours, tmp_path):
    client, there = ours  # noqa: F811
    source = tree_of(tmp_path / 'source', {'file': b'x', 'folder/inner': b'y', 'big': os.urandom(200000)})
    for name, target in (('to file', 'file'), ('to folder', 'folder'), ('to big', 'big'),
                         ('folder/up', '..'), ('none', 'missing')):
        os.symlink(target, str(source / name))
    client.put(str(source), '/kept')
    client.get('/kept', str(tmp_path / 'kept'))
    assert seen(there / 'kept') == seen(tmp_path / 'kept') == seen(source)
    client.put(str(source), '/skipped', links='skip')
    client.get('/kept', str(tmp_path / 'skipped'), links='skip')
    for folder in there / 'skipped', tmp_path / 'skipped':
        assert sorted(os.listdir(str(folder))) == ['big', 'file', 'folder']
    for move, folder in ((lambda: client.put(str(source), '/followed', links='follow'), there / 'followed'),
                         (lambda: client.get('/kept', str(tmp_path / 'followed'), links='follow'),
                          tmp_path / 'followed')):
        with pytest.raises(chirpwire.Incomplete) as incomplete:
            move()
        told = [path.rpartition('/')[2] for path, _ in incomplete.value.failures]
        assert set(told) == {'none', 'up'}     # 'up' leads back to where we are
        assert os.listdir(str(folder / 'folder')) == ['inner']
        assert (folder / 'to file').read_bytes() == b'x' and not (folder / 'to file').is_symlink()
        assert (folder / 'to folder' / 'inner').read_bytes() == b'y'
        assert (folder / 'to big').read_bytes() == (source / 'big').read_bytes()


def test_a_file_that_does_not_say_its_size_is_read_to_its_end(ours, tmp_path):
    """As those of /proc."""
    with our_server('/proc/self') as server, chirpclient.ChirpClient(*server.address) as proc:
        proc.get('/status', str(tmp_path / 'status'))
        assert b'Name:' in (tmp_path / 'status').read_bytes()
    client, there = ours  # noqa: F811
    client.put('/proc/self/status', '/status')
    assert b'Name:' in (there / 'status').read_bytes()


def test_a_disk_without_room_is_seen_before(tmp_path):
    """And leaves nothing half, on either side."""
    small, source = tmp_path / 'small', tmp_path / 'source'
    small.mkdir()
    source.mkdir()
    if subprocess.call(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'none', str(small)],
                       stderr=subprocess.DEVNULL):
        pytest.skip('a tmpfs can not be mounted here')
    try:
        write(source / 'big', os.urandom(3 << 20))
        moved = []
        with our_server(small) as server, chirpclient.ChirpClient(*server.address) as client:  # noqa: F811
            for name, target in (source / 'big', '/big'), (source, '/tree'):
                with pytest.raises(chirpwire.Refused, match='no space'):
                    client.put(str(name), target, progress=lambda moved_, _: moved.append(moved_))
            assert not any(moved) and os.listdir(str(small)) == []
        with our_server(source) as server, chirpclient.ChirpClient(*server.address) as client:  # noqa: F811
            with pytest.raises(OSError, match='are free'):
                client.get('/big', str(small / 'big'))
            assert os.listdir(str(small)) == []
    finally:
        subprocess.check_call(['umount', str(small)])


def test_a_transfer_is_cancelled_while_checksums_are_computed(ours, tmp_path, monkeypatch):
    client, there = ours  # noqa: F811
    source = write(tmp_path / 'source', os.urandom(1 << 20))
    client.put(str(source), '/target')
    cancel = threading.Event()
    computing = chirpwire.hash_file

    def slow(file, algorithm, start, count, look_up):
        cancel.set()
        return computing(file, algorithm, start, count, look_up)
    monkeypatch.setattr(chirpmove, 'hash_file', slow)
    with pytest.raises(chirpwire.Cancelled):           # it looks whether that is there already
        client.put(str(source), '/target', cancel=cancel)
    assert os.listdir(str(there)) == ['target']


def test_forty_at_once_wait_for_their_turn(tmp_path):
    (tmp_path / 'served').mkdir()
    source = write(tmp_path / 'source', os.urandom(300000))
    failed = []

    def move(number):
        try:
            with chirpclient.ChirpClient(*server.address) as client:  # noqa: F811
                client.put(str(source), '/f%d' % number)
        except chirpwire.ChirpError as error:
            failed.append(error)
    with our_server(tmp_path / 'served', max_clients=4) as server:
        threads = [threading.Thread(target=move, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
    assert not failed and len(os.listdir(str(tmp_path / 'served'))) == 40


def test_a_source_that_is_empty_is_refused(ours, tmp_path):
    client, _ = ours  # noqa: F811
    for move in (lambda: client.put('', '/x'), lambda: client.get('', str(tmp_path / 'x'))):
        with pytest.raises((chirpwire.ChirpError, OSError)):
            move()
    assert not (tmp_path / 'x').exists()
