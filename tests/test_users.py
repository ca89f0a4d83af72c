"""Host agent, guest agent and command line as users of their own on one machine: the job works, and what is
one's own stays that. The agents are bundles, which any of them can read."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import xmlrpc.client

import pytest
from agents import Agent, Host, command
from helpers import wait_until

import localsocket

HOST, GUEST, OTHER_GUEST, STRANGER = 1, 65534, 4321, 3         # user ids
PYTHONS = sys.executable, '/usr/bin/python3'


def as_user(uid, words):
    return ['setpriv', '--reuid', str(uid), '--regid', str(uid), '--clear-groups'] + words


def done(uid, *words):
    """Whether that user's program succeeds; without output."""
    return subprocess.call(as_user(uid, list(words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           cwd='/') == 0


def python_for_all():
    """A Python that every user can start."""
    found = [python for python in PYTHONS if os.path.exists(python) and done(GUEST, python, '-c', '')]
    return found[0] if found else ''


pytestmark = [pytest.mark.once, pytest.mark.skipif(
    os.name != 'posix' or os.geteuid() != 0 or not shutil.which('setpriv') or not python_for_all(),
    reason='needs root, setpriv, and a Python that others can start')]


@pytest.fixture(scope='module')
def folder():
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    for program in 'vmhost', 'vmguest':
        subprocess.check_call(command(program, '--bundle', os.path.join(folder, program + '.pyz')))
    yield folder
    shutil.rmtree(folder)


def owned(process, uid):
    """The same, as that user's."""
    os.chown(process.folder, uid, uid)
    for name in os.listdir(process.folder):
        os.chown(os.path.join(process.folder, name), uid, uid)
    program = os.path.join(os.path.dirname(process.folder), process.program + '.pyz')
    process.words = lambda: as_user(uid, [python_for_all(), program, process.ini])
    return process


@pytest.fixture(scope='module')
def host(folder):
    with owned(Host(os.path.join(folder, 'host')), HOST) as host:
        yield host


@pytest.fixture(scope='module')
def guests(folder, host):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(owned(Agent(os.path.join(folder, name), host, name), uid))
               for name, uid in (('one', GUEST), ('two', OTHER_GUEST))]


def verb(uid, host, *words):
    """A verb of the command line, by that user: (code, what it said)."""
    program = os.path.join(os.path.dirname(host.folder), 'vmhost.pyz')
    ran = subprocess.run(as_user(uid, [python_for_all(), program, host.ini] + list(words)), cwd='/',
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
    return ran.returncode, ran.stdout.decode()


@pytest.mark.parametrize('uid', [0, HOST])
def test_the_whole_job(uid, host, guests, folder):
    assert verb(uid, host, 'run', 'one', 'id', '-u') == (0, '%d\n' % GUEST)
    assert verb(uid, host, 'run', '*', 'true')[0] == 0
    code, told = verb(uid, host, 'run', 'two', 'sh', '-c', 'yes | head -c 300000')     # some of it by Chirp
    assert (code, len(told)) == (0, 300000)
    here = os.path.join(host.folder, 'here-%d' % uid)
    os.mkdir(here)
    os.chown(here, HOST, HOST)
    with open(os.path.join(here, 'source'), 'w') as file:
        file.write('content')
    assert verb(uid, host, 'put', 'one', os.path.join(here, 'source'), 'there')[0] == 0
    assert os.stat(os.path.join(guests[0].files, 'there')).st_uid == GUEST
    assert verb(uid, host, 'get', 'one', 'there', os.path.join(here, 'back'))[0] == 0
    with open(os.path.join(here, 'back')) as file:
        assert file.read() == 'content'
    assert verb(uid, host, 'ls')[1].split().count('alive') == 2


def test_nobody_reads_what_is_anothers(host, guests):
    cmd_id = host.api.runCmd('one', 'sh', ['-c', 'echo mine; sleep 60'])
    output = os.path.join(guests[0].state, 'spool', 'one', cmd_id, 'out')
    wait_until(lambda: os.path.exists(output))
    private = {HOST: [host.ini] + [os.path.join(host.state, name) for name in (
        'journal.sqlite', 'xmlrpc.token', 'xmlrpc.address', localsocket.NAME)]}
    for guest, uid in zip(guests, (GUEST, OTHER_GUEST)):
        private[uid] = [guest.ini, os.path.join(guest.state, guest.id + '.secret'),
                        os.path.join(guest.state, guest.id + '.host')]
    private[GUEST].append(output)
    for owner, paths in private.items():
        for path in paths:
            readers = [uid for uid in (HOST, GUEST, OTHER_GUEST, STRANGER) if done(uid, 'test', '-r', path)]
            assert readers == [owner], path
            assert not any(done(uid, 'test', '-w', path) or done(uid, 'test', '-w', os.path.dirname(path))
                           for uid in (HOST, GUEST, OTHER_GUEST, STRANGER) if uid != owner), path
    host.api.signalCmd(cmd_id, 'KILL')


def test_a_stranger_is_told_why_it_can_do_nothing(host, guests, folder):
    ini = os.path.join(folder, 'strangers.ini')
    with open(ini, 'w') as file:
        file.write('[Host]\nstate_dir = %s\n' % host.state)
    words = command(os.path.join(folder, 'vmhost.pyz'), ini, 'ls')
    ran = subprocess.run(as_user(STRANGER, [python_for_all()] + words[1:]), stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, cwd='/')
    assert ran.returncode and b'only the user who runs the host agent can talk to it' in ran.stdout
    assert b'Traceback' not in ran.stdout


def test_a_file_that_the_host_may_not_read_goes_nowhere(host, guests, folder):
    secret = os.path.join(folder, 'roots-own')
    with open(secret, 'w') as file:
        file.write('secret')
    os.chmod(secret, 0o600)
    code, told = verb(HOST, host, 'put', 'one', secret, 'taken')
    assert code and 'Permission denied' in told
    assert not os.path.exists(os.path.join(guests[0].files, 'taken'))


@pytest.mark.parametrize('name', ['TERM', 'KILL'])
def test_a_signal_that_root_s_program_does_not_get_is_not_told_as_sent(host, guests, folder, name):
    """As by sudo: an agent that isn't root may not signal it."""
    as_root = os.path.join(folder, 'as-root')
    shutil.copy(shutil.which('setpriv'), as_root)
    os.chmod(as_root, 0o4755)
    cmd_id = host.api.runCmd('one', as_root, ['--reuid', '0', 'sh', '-c', 'echo begun; exec sleep 600'])
    assert host.api.getCmdOutput(cmd_id, 'out', 0, 10, 30)['size']
    with pytest.raises(xmlrpc.client.Fault) as raised:
        host.api.signalCmd(cmd_id, name)
    assert raised.value.faultCode == 11
    code, told = verb(HOST, host, 'kill', '-s', name, cmd_id)
    assert code == 1 and '1 process of %s did not get signal %s' % (cmd_id, name) in told
    os.kill(host.api.getCmdStatus(cmd_id)['pid'], signal.SIGTERM)
    wait_until(lambda: host.api.getCmdResults(cmd_id))
    assert host.api.getCmdResults(cmd_id)['state'] == 'signaled'
