"""put, get and cp from the command line, through a real host and a real guest: the habits of ``cp -r``."""

import argparse
import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
from agents import Agent
from helpers import fault_of, halt, wait_until
from test_chirp import write

import clicomplete
import clifiles
import cliscreen
import hostcli

pytestmark = [pytest.mark.once, pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]


@pytest.fixture
def guest(host, tmp_path):
    # The host knows a guest by its secret, which stays while the guests of the tests come and go.
    with Agent(tmp_path / 'guest', host, 'g', state_dir=str(tmp_path.parent / 'state of g')) as guest:
        yield guest


def in_guest(guest, *names):
    return os.path.join(guest.files, *names)


def verb(host, *words):
    done = host.verb(*(str(word) for word in words))
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def good(host, *words):
    code, out, err = verb(host, *words)
    assert (code, err) == (0, ''), err
    return out


def names(folder):
    return sorted(name for name in os.listdir(str(folder)) if not name.startswith('.vmguest'))


def test_put_and_get_are_as_cp_is(host, guest, tmp_path):
    """A folder that is there takes things in; in both directions."""
    tree = tmp_path / 'tree'
    tree.mkdir()
    write(tree / 'x', b'x')
    good(host, 'put', 'g', tree)
    good(host, 'put', 'g', tree)                       # into what is served, as cp -r tree . does
    good(host, 'cp', tree, 'g:')
    assert names(in_guest(guest, 'tree')) == ['x']
    good(host, 'put', 'g', tree, 'tree')               # into that one
    good(host, 'put', 'g', tree / 'x', 'tree')
    good(host, 'put', 'g', tree, 'other/')
    assert names(guest.files) == ['other', 'tree'] and names(in_guest(guest, 'tree')) == ['tree', 'x']
    assert names(in_guest(guest, 'other')) == ['x']
    back = tmp_path / 'back'
    good(host, 'get', 'g', 'other', back)
    good(host, 'get', 'g', 'other/', back)
    here = tmp_path / 'here'
    here.mkdir()
    for words in ('get', 'g', 'other'), ('get', 'g', 'other'), ('put', 'g', '.', 'named'), ('put', 'g', '.'):
        done = host.verb(*words, cwd=str(here))
        assert (done.returncode, done.stderr) == (0, b'')
    assert names(here) == ['other'] and names(here / 'other') == ['x']
    assert names(in_guest(guest, 'here')) == names(in_guest(guest, 'named')) == ['other']
    for name in 'here', 'named':
        shutil.rmtree(in_guest(guest, name))
    assert names(back) == ['other', 'x'] and names(back / 'other') == ['x']
    good(host, 'cp', 'g:tree/x', back / 'copied')
    good(host, 'cp', back / 'copied', 'g:other')
    assert names(in_guest(guest, 'other')) == ['copied', 'x']
    for words in (('get', 'g', 'tree/x', str(tmp_path / 'new') + '/'), ('put', 'g', tree / 'x', 'new/')):
        code, _, err = verb(host, *words)
        assert code == 1 and 'is not a folder' in err
    assert not os.path.exists(str(tmp_path / 'new')) and 'new' not in names(guest.files)
    assert verb(host, 'cp', 'a', 'b')[0] == 1 and verb(host, 'cp', 'g:a', 'g:b')[0] == 1


def test_a_pattern_is_what_it_matches(host, guest, tmp_path):
    for name in '1.csv', '2.csv', '.hidden.csv', 'other', 'new\rline.csv':
        write(tmp_path / name, name.encode())
        good(host, 'put', 'g', tmp_path / name)
    results = tmp_path / 'results'
    results.mkdir()
    good(host, 'get', 'g', '*.csv', results)
    assert names(results) == ['1.csv', '2.csv', 'new\rline.csv']
    code, _, err = verb(host, 'get', 'g', '*.csv', tmp_path / 'other')
    assert code == 1 and 'not a folder' in err
    assert verb(host, 'get', 'g', '*.none', results)[0] == 1
    assert host.verb('get', 'g', '?.csv', '-').stdout == b'1.csv2.csv'
    os.symlink('nowhere', in_guest(guest, '3.csv'))
    code, _, err = verb(host, 'get', 'g', '?.csv', results)
    assert code == 1 and '3.csv is a link to nowhere, where nothing is' in err and 'does not exist' not in err


def test_a_path_outside_is_an_error_that_says_so(host, guest, tmp_path):
    source = write(tmp_path / 'x', b'x')
    for path in '/tmp/x', '/etc/x', '../x', 'a/../../x', '~root/x', '/new':
        code, _, err = verb(host, 'put', 'g', source, path)
        assert code == 1 and ('outside' in err or '~' in err), (path, err)
    for path in '/etc/passwd', '../x':
        assert verb(host, 'get', 'g', path, tmp_path / 'got')[0] == 1
    assert names(guest.files) == [] and not (tmp_path / 'got').exists()
    good(host, 'put', 'g', source, '~/one')
    good(host, 'put', 'g', source, os.path.realpath(guest.files) + '/two')
    assert names(guest.files) == ['one', 'two']
    good(host, 'get', 'g', '/one', tmp_path / 'got')    # what is there may be named as the API lists it


def test_a_file_is_no_folder_that_a_path_ends_in(host, guest, tmp_path):
    for folder in tmp_path, pathlib.Path(guest.files):
        write(folder / 'file', b'x')
    for end in '/', '/.':
        for words in (('get', 'g', 'file' + end, tmp_path / 'new'),
                      ('put', 'g', str(tmp_path / 'file') + end, 'new')):
            code, _, err = verb(host, *words)
            assert code == 1 and 'not a directory' in err.lower(), err
    assert not (tmp_path / 'new').exists() and names(guest.files) == ['file']


def test_dots_after_a_link_lead_where_the_link_leads(host, guest, tmp_path):
    """As those of a path here, and those of cp; not to the folder that the link is in."""
    for folder in tmp_path / 'here', pathlib.Path(guest.files):
        (folder / 'real' / 'sub').mkdir(parents=True)
        os.symlink('real/sub', str(folder / 'link'))
        write(folder / 'real' / 'file', b'right')
        write(folder / 'file', b'wrong')
    good(host, 'get', 'g', 'link/../file', tmp_path / 'got')
    good(host, 'get', 'g', os.path.realpath(guest.files) + '/link/../file', tmp_path / 'again')
    assert (tmp_path / 'got').read_bytes() == (tmp_path / 'again').read_bytes() == b'right'
    good(host, 'put', 'g', tmp_path / 'here' / 'link' / '..' / 'file', 'link/../put')
    good(host, 'put', 'g', tmp_path / 'got', 'link/..')
    assert names(guest.files) == ['file', 'link', 'real'] and names(in_guest(guest, 'real')) == [
        'file', 'got', 'put', 'sub']
    good(host, 'get', 'g', 'link/..', tmp_path / 'all')
    assert names(tmp_path / 'all') == ['file', 'got', 'put', 'sub']
    for path in 'no/../file', 'file/../file':
        assert verb(host, 'get', 'g', path, tmp_path / 'none')[0] == 1


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_device_that_takes_nothing_is_named(host, guest):
    write(pathlib.Path(guest.files) / 'x', b'x')
    code, _, err = verb(host, 'get', 'g', 'x', '/dev/full')
    assert code == 1 and '/dev/full: No space left on device' in err


def test_a_file_goes_to_standard_output(host, guest, tmp_path):
    content = bytes(range(256)) * 3000
    write(tmp_path / 'x', content)
    good(host, 'put', 'g', tmp_path / 'x')
    before = os.lstat('/dev/stdout')
    for target in '-', '/dev/stdout':
        done = host.verb('get', 'g', 'x', target)
        assert (done.returncode, done.stdout) == (0, content), done.stderr
    assert os.path.samestat(before, os.lstat('/dev/stdout')) and stat.S_ISLNK(before.st_mode)
    done = host.verb('get', 'g', 'missing', '-')
    assert done.returncode == 1 and b'does not exist' in done.stderr and not done.stdout


def test_a_descriptor_is_that_of_who_types(host, guest, tmp_path):
    """As of the shell's >() and <(); the host agent has other files under these numbers."""
    write(tmp_path / 'x', b'content')
    good(host, 'put', 'g', tmp_path / 'x')
    for line, out, err in (('/dev/fd/1', b'content', b''), ('/proc/self/fd/5 5>&1', b'content', b''),
                           ('/dev/stderr', b'', b'content'),
                           ('/dev/fd/77', b'', b'vmhost: /dev/fd/77: Bad file descriptor\n')):
        done = subprocess.run(['/bin/sh', '-c', 'exec "$@" ' + line, 'sh'] + host.command('get', 'g', 'x'),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (int(line == '/dev/fd/77'), out, err), line
    for source in '-', '/dev/stdin', '/dev/fd/0':
        send_input(host, source.encode(), 'put', 'g', source, 'y')
        with open(in_guest(guest, 'y'), 'rb') as file:
            assert file.read() == source.encode()
    assert names(guest.files) == ['x', 'y']


def send_input(host, content, *words):
    folder = os.path.join(str(host.folder), 'input')
    os.makedirs(folder, exist_ok=True)
    done = subprocess.run(host.command(*words), input=content, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=60, env=dict(os.environ, TMPDIR=folder))
    assert (done.returncode, done.stdout, done.stderr) == (0, b'', b'')
    assert os.listdir(folder) == []


def test_standard_input_becomes_a_file(host, guest, tmp_path):
    """Named by its target; in a folder, as cp /dev/stdin names it. What goes wrong is said."""
    content = os.urandom(3 * 2 ** 20)
    os.mkdir(in_guest(guest, 'folder'))
    for words, path in ((['put', 'g', '-', 'dump'], 'dump'), (['cp', '-', 'g:copy'], 'copy'),
                        (['put', 'g', '-', 'folder'], 'folder/stdin')):
        send_input(host, content, *words)
        with open(in_guest(guest, path), 'rb') as file:
            assert file.read() == content
    send_input(host, b'', 'put', 'g', '-', 'dump')
    assert os.path.getsize(in_guest(guest, 'dump')) == 0
    for words, why in ((['-'], 'name the target: what comes from - has no name of its own'),
                       (['-', 'none/x'], 'g: the folder none does not exist'),
                       (['/dev/fd/77', 'y'], '/dev/fd/77: Bad file descriptor')):
        assert verb(host, 'put', 'g', *words) == (1, '', 'vmhost: %s\n' % why)
    assert names(guest.files) == ['copy', 'dump', 'folder']


def test_an_empty_source_is_refused(host, guest, tmp_path):
    """As of a variable that isn't set; not the folder that the command line is in, or all that is served."""
    for words in ('put', 'g', ''), ('put', 'g', '', 'x'), ('cp', '', 'g:'), ('cp', 'g:', tmp_path / 'got'), \
            ('get', 'g', '', tmp_path / 'got'), ('get', 'g', '/'), ('get', 'g', '.'), ('put', 'g', '/'):
        code, out, err = verb(host, *words)
        assert (code, out) == (1, '') and err, words
    assert names(guest.files) == [] and not (tmp_path / 'got').exists()


def test_a_folder_is_not_streamed(host, guest, tmp_path):
    os.mkdir(in_guest(guest, 'tree'))
    code, out, err = verb(host, 'get', 'g', 'tree', '-')
    assert (code, out) == (1, '') and 'directory' in err and '/stream' not in err


def test_no_error_names_a_temporary_file(host, guest, tmp_path):
    """Where what should be a folder is a file, or isn't there."""
    write(tmp_path / 'file', b'x')
    (tmp_path / 'tree').mkdir()
    for name in 'file', 'tree':
        good(host, 'put', 'g', tmp_path / name)
        for words in ('put', 'g', tmp_path / name, 'file/y'), ('get', 'g', name, tmp_path / 'file' / 'y'), \
                ('get', 'g', name, tmp_path / 'missing' / 'y'):
            code, _, err = verb(host, *words)
            assert code == 1 and 'vmhost-part' not in err, err
            assert 'file' in err or 'missing' in err


def test_the_options_of_cp_and_scp_are_taken(host, guest, tmp_path):
    tree = tmp_path / 'tree'
    tree.mkdir()
    write(tree / 'x', b'x')
    good(host, 'cp', '-r', tree, 'g:there')
    good(host, 'put', '-a', 'g', tree, 'too')
    good(host, 'get', '-rp', 'g', 'there', tmp_path / 'back')
    assert names(tmp_path / 'back') == ['x'] and names(guest.files) == ['there', 'too']


def test_many_go_into_one_folder_at_once(host, guest, tmp_path):
    """Before it is known where each will be in there, too."""
    os.mkdir(in_guest(guest, 'into'))
    files = [write(tmp_path / ('file%d' % n), b'x') for n in range(16)]
    back = tmp_path / 'back'
    back.mkdir()
    with host.api as api:
        for direction, sources, target in (('put', map(str, files[:8]), 'into/'),
                                           ('put', map(str, files[8:]), 'into'),
                                           ('get', ['into/' + file.name for file in files], str(back))):
            for one in [api.startTransfer(direction, 'g', source, target) for source in sources]:
                while api.getTransfer(one)['state'] in ('waiting', 'running'):
                    time.sleep(0.01)
                assert api.getTransfer(one)['state'] == 'done', api.getTransfer(one)
    assert names(in_guest(guest, 'into')) == names(back) == sorted(file.name for file in files)


def test_two_that_go_to_one_name_go_one_after_the_other(host, guest, tmp_path):
    """Whether two meet is known once the VM was asked what there is: as by two cp, the last one wins."""
    contents = [bytes([number]) * (8 << 20) for number in range(4)]
    sources = [str(write(tmp_path / str(number), content)) for number, content in enumerate(contents)]
    with host.api as api:
        halt(guest.process.pid)        # or some would have ended by now
        try:
            moving = [api.startTransfer('put', 'g', source, 'one') for source in sources]
            assert fault_of(api.startTransfer, 'put', 'g', sources[0], './one').faultCode == 10
        finally:
            guest.process.send_signal(signal.SIGCONT)
        for one in moving:
            wait_until(lambda one=one: api.getTransfer(one)['state'] not in ('waiting', 'running'), 30)
            assert api.getTransfer(one)['state'] == 'done', api.getTransfer(one)
    assert names(guest.files) == ['one']
    with open(in_guest(guest, 'one'), 'rb') as file:
        assert file.read() in contents


def test_a_folder_that_is_missing_is_named(host, guest, tmp_path):
    """By verbs, as cp does, in both directions alike; a program has it made in the VM, which has no mkdir."""
    write(tmp_path / 'x', b'x')
    (tmp_path / 'tree').mkdir()
    good(host, 'put', 'g', tmp_path / 'x')
    good(host, 'put', 'g', tmp_path / 'tree', '.')
    for words, folder in ((('put', 'g', tmp_path / 'x', 'no/y'), 'no'),
                          (('put', 'g', tmp_path / 'tree', 'no/y/'), 'no'),
                          (('put', 'g', tmp_path / 'x', 'no/way/y'), 'no/way'),
                          (('get', 'g', 'x', tmp_path / 'no' / 'y'), tmp_path / 'no'),
                          (('get', 'g', 'tree', tmp_path / 'no' / 'y'), tmp_path / 'no')):
        assert verb(host, *words) == (1, '', 'vmhost: g: the folder %s does not exist\n' % folder)
    for words, folder in ((('put', 'g', tmp_path / 'x', 'x/y'), 'x'),
                          (('get', 'g', 'x', tmp_path / 'x' / 'y'), tmp_path / 'x')):
        assert verb(host, *words) == (1, '', 'vmhost: g: %s is not a folder\n' % folder)
    assert names(guest.files) == ['tree', 'x'] and not (tmp_path / 'no').exists()
    with host.api as api:
        assert api.cpFileToVM('g', str(tmp_path / 'x'), 'made/for/y')[2] == 0
        assert api.cpFileToVM('g', str(tmp_path / 'none'), 'for/nothing/y')[2] == 1
        moving = api.startTransfer('get', 'g', 'none', str(tmp_path / 'for' / 'y'), {'parents': True})
        wait_until(lambda: api.getTransfer(moving)['state'] == 'failed', 20)
        assert not (tmp_path / 'for').exists() and names(guest.files) == ['made', 'tree', 'x']
        assert api.cpFileFromVM('g', 'x', str(tmp_path / 'no' / 'y'))[2] == 1
        moving = api.startTransfer('get', 'g', 'x', str(tmp_path / 'made' / 'y'), {'parents': True})
        wait_until(lambda: api.getTransfer(moving)['state'] == 'done', 20)
        assert fault_of(api.startTransfer, 'get', 'g', 'x', 'y', {'parents': 'no'}).faultCode == -32602
    assert names(in_guest(guest, 'made', 'for')) == names(tmp_path / 'made') == ['y']


def test_what_the_system_says_is_told_without_its_number(host, guest, tmp_path):
    """Path and reason, to who types and to who calls."""
    missing = str(tmp_path / 'missing')
    assert verb(host, 'put', 'g', missing) == (1, '', 'vmhost: g: %s: No such file or directory\n' % missing)
    with host.api as api:
        assert api.cpFileToVM('g', missing, 'x') == ['', missing + ': No such file or directory', 1]
        assert api.cpFileFromVM('g', 'x', '/proc/self/x')[1].endswith(': does not exist')


@pytest.mark.parametrize('stdout, why', [('>&-', 'Bad file descriptor'), ('>/dev/full', 'No space left')])
def test_an_output_that_takes_nothing_is_said(host, guest, tmp_path, stdout, why):
    if 'full' in stdout and not os.path.exists('/dev/full'):
        pytest.skip('needs /dev/full')
    write(tmp_path / 'x', b'x')
    good(host, 'put', 'g', tmp_path / 'x')
    with host.api as api:
        cmd_id = api.runCmd('g', 'echo', ['hello'])
        assert api.waitCmd(cmd_id, 20)
    for words in ('get', 'g', 'x', '-'), ('ls', '--json'), ('out', cmd_id), ('ps', '--help'):
        done = subprocess.run(['/bin/sh', '-c', 'exec "$@" ' + stdout, 'sh'] + host.command(*words),
                              stderr=subprocess.PIPE, timeout=60)
        told = done.stderr.decode()
        assert done.returncode == 255 and told.startswith('vmhost: standard output: ' + why), (words, told)
        assert told.count('\n') == 1
    done = subprocess.run(['/bin/sh', '-c', 'exec "$@" ' + stdout, 'sh'] + host.command('put', 'g', str(
        tmp_path / 'x')), stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (0, b'')          # which says nothing


def test_each_failure_is_told(host, guest, tmp_path):
    tree = tmp_path / 'tree'
    tree.mkdir()
    for index in range(5):
        os.symlink('/etc/passwd', str(tree / ('out%d' % index)))
    write(tree / 'x', b'x')
    good(host, 'put', 'g', tree)
    code, _, err = verb(host, 'get', 'g', 'tree', tmp_path / 'back')
    assert code == 1 and err.count('leads out') == 3 and 'and 2 more' in err
    assert 'vmhost-part' not in err
    assert names(tmp_path / 'back') == ['x']
    code, out, _ = verb(host, 'get', 'g', 'tree', tmp_path / 'b2', '--json')
    assert code == 1 and len(json.loads(out)['failures']) == 5
    good(host, 'get', 'g', 'tree', tmp_path / 'c', '--links', 'skip')
    with host.api as api:
        fault = fault_of(api.startTransfer, 'get', 'g', 'tree', str(tmp_path / 'd'), {'links': 'all'})
        assert fault.faultCode == -32602


def test_a_transfer_goes_on_when_the_agent_is_back(host, guest, tmp_path):
    content = os.urandom(1 << 20) * 512
    write(tmp_path / 'big', content)
    with host.api as api:
        moving = api.startTransfer('put', 'g', str(tmp_path / 'big'), 'big')
        wait_until(lambda: api.getTransfer(moving)['bytes'] > 1 << 20, 30, 0.005)
        guest.stop(signal.SIGKILL)
        assert api.getTransfer(moving)['state'] in ('running', 'waiting')
        guest.start()
        wait_until(lambda: api.getTransfer(moving)['state'] not in ('running', 'waiting'), 60)
        assert api.getTransfer(moving)['state'] == 'done', api.getTransfer(moving)
        with open(in_guest(guest, 'big'), 'rb') as file:
            assert file.read() == content


def test_transfers_are_listed_and_cancelled(host, guest, api, tmp_path):
    """By a verb, as commands are; what ended is kept, with what it moved."""
    with open(str(tmp_path / 'large'), 'wb') as file:
        file.truncate(2 ** 40)
    write(tmp_path / 'small', b'small')
    large = api.startTransfer('put', 'g', str(tmp_path / 'large'), 'large')
    good(host, 'put', 'g', tmp_path / 'small')
    try:
        lines = good(host, 'transfers').splitlines()
        assert lines[0].split()[:3] == ['ID', 'VM', 'STATE']
        assert [line.split()[2] for line in lines if large in line] == ['running']
        assert lines[-1].startswith(large) and str(tmp_path / 'large') in lines[-1]
        small = good(host, 'transfers', '-q').split()[-2]
        rows = {row['id']: row for row in json.loads(good(host, 'transfers', '--json', 'g'))}
        assert (rows[small]['state'], rows[small]['bytes']) == ('done', 5)
        assert rows[small]['submitted'] <= rows[small]['ended'] and rows[large]['ended'] == 0
        assert clicomplete.candidates([host.ini, 'kill', 'transfer-'], hostcli.VERBS) == [large]
        assert api.listTransfers({'finished': True, 'limit': 1}) == [rows[small]]
        assert [row['id'] for row in api.listTransfers({'vm': 'g', 'finished': False})] == [large]
        assert api.listTransfers({'vm': 'other'}) == []
        assert fault_of(api.listTransfers, {'state': 'done'}).faultCode == -32602
        assert verb(host, 'kill', '-s', 'STOP', large)[0] == 1
        assert api.getTransfer(large)['state'] == 'running'
        good(host, 'kill', large)
    finally:
        api.cancelTransfer(large)
    wait_until(lambda: api.getTransfer(large)['state'] == 'cancelled', 30)
    assert verb(host, 'kill', large)[2] == 'vmhost: %s has already ended\n' % large
    assert verb(host, 'kill', 'transfer-0123456789ab')[0] == 1


def test_a_verb_says_what_its_transfer_waits_for(host, guest, tmp_path):
    """Once, also where there is no terminal; Ctrl-C tells how far it came before that."""
    with open(str(tmp_path / 'large'), 'wb') as file:
        file.truncate(2 ** 40)
    write(tmp_path / 'small', b'small')
    words = host.command('put', 'g', str(tmp_path / 'large'))
    with host.api as api, subprocess.Popen(words, stdin=subprocess.DEVNULL,
                                           stderr=subprocess.PIPE) as process:
        try:
            mine = wait_until(lambda: api.listTransfers({'finished': False}), 30)[0]['id']
            wait_until(lambda: api.getTransfer(mine)['bytes'], 30)
            guest.stop(signal.SIGKILL)
            assert process.stderr.readline().endswith(b' goes on once it can (Ctrl-C ends it)\n')
            shown = api.getTransfer(mine)
            assert shown['bytes'] and shown['error'] and shown['state'] in ('waiting', 'running')
        finally:
            process.send_signal(signal.SIGINT)
        said = process.stderr.read().decode()
        assert 'cancelled at 0 B' not in said and 'the same again goes on from there' in said
        assert process.wait(30) == -signal.SIGINT
        guest.start()
        assert api.cpFileToVM('g', str(tmp_path / 'small')) == ['', '', 0]    # the host has it again


def test_a_path_means_the_same_to_a_listing(guest, api):
    tree = in_guest(guest, 'tree')
    os.mkdir(tree)
    write(pathlib.Path(tree) / 'x', b'x')
    for path in 'tree', '/tree', '~/tree', tree, './tree/':
        assert [row['name'] for row in api.listDir('g', path)] == ['x'], path
    for path in '~', '/', guest.files, '':
        assert 'tree' in [row['name'] for row in api.listDir('g', path)], path
    for path in '../..', 'tree/../..', '/no/such', '~other':
        assert fault_of(api.listDir, 'g', path).faultCode == 6, path


def test_what_was_hardly_meant_changes_nothing(host, guest, tmp_path):
    """A target of no characters, which a shell's variable may have; a standard input that is closed."""
    write(tmp_path / 'x', b'new')
    with open(in_guest(guest, 'there'), 'wb') as file:
        file.write(b'old')
    for words in ['put', 'g', tmp_path / 'x', ''], ['get', 'g', 'there', '']:
        assert verb(host, *words) == (1, '', 'vmhost: DST is empty: name it, or leave it out\n')
    command = [sys.executable, os.path.abspath('vmhost.py'), host.ini, 'put', 'g', '-', 'there']
    done = subprocess.run(['sh', '-c', 'exec "$@" <&-', 'sh'] + command, stderr=subprocess.PIPE)
    assert done.returncode == 1 and b'standard input is closed' in done.stderr
    assert names(in_guest(guest)) == ['there']
    with open(in_guest(guest, 'there'), 'rb') as file:
        assert file.read() == b'old'


def test_a_small_file_is_not_waited_for_long(monkeypatch):
    """A pattern may mean thousands, one after the other; what takes long is asked about less often."""
    states = ['waiting'] + 20 * ['running'] + ['done']
    monkeypatch.setattr(clifiles.time, 'sleep', lambda seconds: slept.append(seconds))
    slept = []

    class FakeHost:
        def call(self, method, *_):
            return 'transfer-1' if method == 'startTransfer' else {
                'state': states.pop(0), 'error': '', 'bytes': 0, 'total': 0, 'rate': 0}
    args = argparse.Namespace(links='keep', json=False)
    assert clifiles.transfer(FakeHost(), cliscreen.Screen(), args, 'get', 'g', 'a', '/b') == 0
    assert slept[0] < 0.01 and slept[-1] == cliscreen.PROGRESS_EVERY and slept == sorted(slept)


# --- folders for a moment ---

def test_what_killed_ones_left_is_taken_away(tmp_path, monkeypatch):
    """What a killed `put -` had read stayed for ever. What goes on, or is no such folder, stays."""
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    monkeypatch.setattr(clifiles, 'NEW', -1)
    left, others = tmp_path / (clifiles.FOLDER + 'left'), tmp_path / (clifiles.FOLDER + 'mine')
    for folder, names in (left, ['stdin']), (others, ['a', 'b']):
        folder.mkdir()
        for name in names:
            (folder / name).write_text('')
    with clifiles.own_folder() as first:
        assert not left.exists() and others.exists()
        with clifiles.own_folder() as second:
            assert os.path.isdir(first) and os.path.isdir(second)
    assert os.listdir(str(tmp_path)) == [others.name]


def test_what_is_new_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    (tmp_path / (clifiles.FOLDER + 'new')).mkdir()
    with clifiles.own_folder():
        assert len(os.listdir(str(tmp_path))) == 2
