"""Control groups: where an agent may make them, and what they do for a command.

The latter where this machine lets its root make groups, be it without controllers. What those measure and
limit is seen in test_guest_kernel.py.
"""

import os
import signal
import subprocess
import sys

import pytest
from agents import TOP
from helpers import wait_until
from test_guest_runner import Runners, cpu, runners  # noqa: F401

import guestcgroup
import guestprocesses
from guestcgroup import Group, Place, find_place

pytestmark = pytest.mark.ends

# --- where ---

class Hierarchy:
    """Folders that look like a mounted cgroup v2, and /proc/self of a process in it."""

    def __init__(self, folder, path, root='/'):
        self.proc = str(folder / 'proc')
        self.top = str(folder / 'a mount')
        self.path = path
        os.mkdir(self.proc)
        (folder / 'proc' / 'cgroup').write_text('4:memory:/elsewhere\n0::%s\n' % path)
        (folder / 'proc' / 'mountinfo').write_text(
            '25 22 0:22 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n'
            '26 22 0:23 %s %s rw,relatime shared:10 - cgroup2 none rw\n'
            % (root, self.top.replace(' ', '\\040')))
        self.own = self.make(path[len(root.rstrip('/')):])

    def make(self, path, procs=''):
        """A group, and those above; ``procs``: the processes in it."""
        folder = self.top
        for name in [''] + [name for name in path.split('/') if name]:
            folder = os.path.join(folder, name) if name else folder
            if not os.path.isdir(folder):
                os.mkdir(folder)
                self.write(folder, 'cgroup.procs', procs)
                self.write(folder, 'cgroup.controllers', 'cpuset cpu io memory pids')
                self.write(folder, 'cgroup.subtree_control', '')
                if folder != self.top:
                    self.write(folder, 'cgroup.type', 'domain')
        return folder

    def write(self, folder, name, text):
        with open(os.path.join(folder, name), 'w') as file:
            file.write(text + '\n')

    def read(self, folder, name):
        with open(os.path.join(folder, name)) as file:
            return file.read().strip()

    def place(self):
        return find_place(self.proc)


@pytest.fixture
def delegated(monkeypatch):
    """The folders of which systemd says that they are delegated: a file system may not take attributes."""
    folders = set()
    monkeypatch.setattr(guestcgroup, 'is_delegated', folders.__contains__)
    return folders


def test_where_no_hierarchy_is_mounted(tmp_path):
    place = find_place(str(tmp_path))
    assert not place.folder and 'no cgroup v2' in place.describe()
    assert place.make_group(str(tmp_path)) is None
    place.settle()
    place.sweep(str(tmp_path), lambda name: True)


def test_the_group_of_another_service_is_left_alone(tmp_path, delegated):
    there = Hierarchy(tmp_path, '/user.slice/session-1.scope')
    place = there.place()
    assert not place.folder and '/user.slice/session-1.scope' in place.why and 'Delegate=yes' in place.why


def test_the_root_of_all_is_taken_as_it_is(tmp_path):
    there = Hierarchy(tmp_path, '/')
    place = there.place()
    assert place.folder == there.top and place.describe().startswith('below ')
    os.mkdir(os.path.join(there.top, 'system.slice'))
    there.write(there.top, 'cgroup.subtree_control', 'memory')
    place = there.place()
    place.settle()             # somebody else has groups there: what is handed on is theirs to say
    assert place.folder == there.top and place.controllers == ['memory']
    assert there.read(there.top, 'cgroup.subtree_control') == 'memory'


def test_a_delegated_group_keeps_its_controllers(tmp_path, delegated):
    """An agent in the group that systemd starts it in: the next one couldn't be started there."""
    there = Hierarchy(tmp_path, '/system.slice/vmguest.service')
    delegated.add(there.own)
    place = there.place()
    place.settle()
    assert place.folder == there.own and place.controllers == []
    assert there.read(there.own, 'cgroup.subtree_control') == ''


def test_a_delegated_group_with_the_agent_below_hands_on_its_controllers(tmp_path, delegated):
    there = Hierarchy(tmp_path, '/system.slice/vmguest.service/agent')
    above = os.path.dirname(there.own)
    delegated.add(above)
    place = there.place()
    place.settle()
    assert place.folder == above and there.read(above, 'cgroup.subtree_control') != ''
    there.make('/system.slice/vmguest.service/another')        # so it is somebody else's
    assert there.place().folder == ''


@pytest.mark.parametrize('others', ['', '\n77'])
def test_in_a_container_the_agent_goes_into_a_leaf_where_it_is_alone(tmp_path, others):
    there = Hierarchy(tmp_path, '/')
    there.write(there.own, 'cgroup.type', 'domain')
    there.write(there.own, 'cgroup.procs', '%d%s' % (os.getpid(), others))
    place = there.place()
    assert place.folder == there.own
    real = guestcgroup.make_folder
    guestcgroup.make_folder = lambda folder: there.make('/' + os.path.basename(folder))
    try:
        place.settle()
    finally:
        guestcgroup.make_folder = real
    leaf = os.path.join(there.own, guestcgroup.LEAF)
    assert os.path.isdir(leaf) == (not others)
    assert bool(place.controllers or there.read(there.own, 'cgroup.subtree_control')) == (not others)
    if not others:
        assert there.read(leaf, 'cgroup.procs') == '0'


def test_a_mount_that_shows_a_part_of_the_hierarchy(tmp_path):
    there = Hierarchy(tmp_path, '/docker/abc', root='/docker/abc')
    assert guestcgroup.folder_of('/docker/abc', there.proc) == there.top
    assert guestcgroup.folder_of('/docker/ab', there.proc) is None
    assert guestcgroup.folder_of('/', there.proc) is None


def test_files_that_say_something_else_end_nothing(tmp_path):
    group = Group(str(tmp_path))
    told = {'cpu.stat': 'user_usec x\nsystem_usec', 'memory.peak': 'max\n', 'cgroup.events': '',
            'memory.events': 'oom_kill -\n\xff', 'cgroup.procs': 'a\n-1\n0\n'}
    for name, text in told.items():
        (tmp_path / name).write_text(text, encoding='latin-1')
    assert (group.cpu(), group.memory_peak(), group.oom_kills(), group.pids()) == (None, None, 0, [])
    assert not group.is_populated() and not group.kill()
    nowhere = Group(str(tmp_path / 'gone'))
    assert nowhere.cpu() is None and nowhere.pids() == [] and nowhere.remove() and not nowhere.holds(1)


# --- what for ---

HERE = pytest.mark.skipif(not find_place().folder, reason=find_place().describe())
# Ends in moments: whoever forks it is gone before it is looked for.
BOMB = '''
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for _ in range(200):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            open('made', 'a').write('.')
            time.sleep(100)
        os._exit(0)
print('ready', flush=True)
time.sleep(100)
'''
# Two children that nobody waits for; the second one's parent ignores that it ends.
UNWAITED = '''
import os, signal, sys
def spin():
    while sum(os.times()[:2]) < 0.3: pass
    os._exit(0)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for _ in range(2):
    if os.fork() == 0: spin()
try:
    os.wait()
except ChildProcessError:
    pass
'''


@HERE
@pytest.mark.parametrize('options', [{}, {'user': 'nobody'}, {'nice': 1}, {'terminal': {}}])
def test_a_program_begins_within_its_group(runners, options):        # noqa: F811
    result = runners.run('cat', '/proc/self/cgroup', **options)
    assert result['out'].rstrip().endswith(b'/cmd-c1'), result
    wait_until(lambda: not os.path.exists(os.path.join(runners.forks.place.nest(runners.root), 'cmd-c1')), 10)


@pytest.mark.once
@HERE
@pytest.mark.parametrize('end', ['timeout', 'KILL', 'runner'])
def test_what_forks_by_hundreds_and_makes_sessions_is_ended(runners, end):       # noqa: F811
    made = os.path.join(runners.served, 'made')
    command = runners.begin(sys.executable, '-S', '-c', BOMB, timeout=60 if end != 'timeout' else 25)
    wait_until(lambda: command.size('out') and os.path.getsize(made) == 200, 24)
    members = command.members()
    assert len(members) >= 201
    if end == 'KILL':
        command.note_signal(signal.SIGKILL)
        command.kill_group()
    elif end == 'runner':
        runner = command.read('process.json')['runner']
        os.kill(runner, signal.SIGKILL)
        wait_until(lambda: not command.runner_lives(), 10)
        assert command.end_processes() > 0
    if end != 'runner':
        assert runners.end(command)['left'] == 0
    wait_until(lambda: not any(map(guestprocesses.start_ticks, members)), 10)
    runners.forks.place.sweep(runners.root, lambda name: True)      # as the next agent does
    assert not os.path.isdir(runners.forks.place.nest(runners.root))


@HERE
def test_children_whose_end_is_ignored_are_counted(runners):        # noqa: F811
    result = runners.run(sys.executable, '-S', '-c', UNWAITED)
    assert 0.5 < cpu(result) < 0.9
    assert {'ru_maxrss', 'ru_minflt', 'ru_nivcsw'} <= set(result['inexact'])      # of these nobody knows
    assert not {'ru_utime', 'ru_stime'} & set(result['inexact'])


@pytest.mark.once
@HERE
def test_what_is_waited_for_or_goes_on_is_exact(runners):        # noqa: F811
    spin = UNWAITED.replace('signal.SIG_IGN', 'signal.SIG_DFL')
    assert runners.run('sh', '-c', '"$@"; "$@"', 'sh', sys.executable, '-S', '-c', spin)['inexact'] == []
    daemon = 'exec > /dev/null 2>&1; setsid "$@" & sleep 0.3'
    result = runners.run('sh', '-c', daemon, 'sh', sys.executable, '-S', '-c', spin.replace('0.3', '30'))
    assert (result['left'] > 0, result['inexact']) == (True, [])


@HERE
def test_the_group_of_a_daemon_goes_once_that_has_ended(runners):        # noqa: F811
    command = runners.begin('sh', '-c', 'setsid sleep 60 > /dev/null 2>&1 & echo $!')
    result = runners.end(command)
    daemon, place = int(result['out']), runners.forks.place
    group = Group(os.path.join(place.nest(runners.root), guestcgroup.group_name(command.folder)))
    assert result['left'] == 1 and group.pids() == [daemon]
    place.sweep(runners.root, lambda name: True)
    assert group.pids() == [daemon]
    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: not group.is_populated(), 10)
    place.sweep(runners.root, lambda name: name != 'c1')
    assert os.path.isdir(group.folder)
    place.sweep(runners.root, lambda name: True)
    assert not os.path.isdir(os.path.dirname(group.folder))


@HERE
def test_limits_of_a_group_are_kept_or_refused(runners):        # noqa: F811
    for name in set(guestcgroup.LIMITS) - set(runners.forks.place.controllers) - {'cpus'}:
        result = runners.run('true', limits={name: 10 ** 9})
        assert result['state'] == 'failed' and result['error'].startswith('ENOTSUP: limits.%s ' % name)


def test_without_groups_a_limit_of_them_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr('guestforks.find_place', lambda: Place('', 'none'))
    runners = Runners(tmp_path)         # noqa: F811
    try:
        assert runners.run('true')['state'] == 'exited'
        assert runners.run('true', limits={'memory': 10 ** 9})['error'].startswith('ENOTSUP: ')
    finally:
        runners.close()


@HERE
def test_a_kernel_that_cannot_fork_into_a_group(tmp_path, monkeypatch):
    """The starter then forks as ever, and the program isn't in its group."""
    monkeypatch.setattr(Group, 'open', lambda self: os.open(os.devnull, os.O_RDONLY))
    monkeypatch.setattr(Group, 'open_entrance', lambda self: os.open(os.devnull, os.O_WRONLY))
    runners = Runners(tmp_path)         # noqa: F811
    try:
        result = runners.run('cat', '/proc/self/cgroup')
        assert result['state'] == 'exited' and b'cmd-' not in result['out']
    finally:
        runners.close()


@HERE
def test_check_and_the_log_tell_which_means_is_in_use(tmp_path):
    ini = tmp_path / 'guest.ini'
    ini.write_text('[VM]\nstate_dir = %s\n' % tmp_path)
    done = subprocess.run([sys.executable, os.path.join(TOP, 'vmguest.py'), '--check', str(ini)],
                          stdout=subprocess.PIPE, timeout=300)
    assert b'control group of its own, below ' + find_place().folder.encode() in done.stdout, done.stdout
