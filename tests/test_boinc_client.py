"""vmboinc as a real BOINC client runs it: what the client shows of tasks, however they end."""

import os
import re
import signal
import subprocess

import boinc as boinc_rig
import pytest
from helpers import wait_until
from vms import command_line

import boincwork

pytestmark = [pytest.mark.once, pytest.mark.slow, pytest.mark.ends,
              pytest.mark.skipif(bool(boinc_rig.why_not()), reason=boinc_rig.why_not() or 'never')]
LACKS = '<output><name>out</name><path>no/such/out</path></output>'


@pytest.fixture
def boinc(tmp_path):
    with boinc_rig.running(tmp_path) as found:
        yield found


class WatchedHere(boinc_rig.Watched):
    """One whose program runs on this machine."""

    def goes_on(self):
        """Waits until its program has got further, and the client has heard of that."""
        counted = wait_until(lambda: self.boinc.read(self.name, 'counted').strip())    # '' as it is written
        before = float('0.' + counted.zfill(4))
        self.wait(lambda task: task['process'] == 'running' and task['fraction'] > before)

    def program(self):
        """(the pid, the state) of its program, as this machine's kernel has them."""
        pid = int(self.boinc.read(self.name, 'starts').split()[-1])
        return pid, boinc_rig.status_of(pid)['State'][0]

    def is_stopped(self):
        return self.program()[1] == 'T'

    def used(self):
        """CPU seconds of its program, and of what this has started."""
        with open('/proc/%d/stat' % self.program()[0]) as file:
            ticks = file.read().rpartition(')')[2].split()[11:15]
        return sum(map(int, ticks)) / os.sysconf('SC_CLK_TCK')


def test_the_life_of_a_task(boinc):
    """Suspended, unloaded, its client quit and killed, its wrapper killed, its host agent killed: one program
    goes on through all of it. Its machine fails: it begins again with its files. And it ends well."""
    rig = boinc.rig
    boinc.add('t1', boinc_rig.COUNT, '<checkpoint>files</checkpoint>'
              '<input>in</input><input>more/in</input><output>out</output>',
              [('in', 'apples\n'), ('more/in', 'pears\n')], ['out'], 'and plums')
    rig.start()
    task = WatchedHere(boinc, 't1')
    task.wait(lambda now: now['fraction'] > 0.001)
    wait_until(lambda: '/status?key=' in rig.task('t1')['web'], 20)
    rig.operate('suspend', 't1')
    wait_until(task.is_stopped, 20)
    assert rig.task('t1')['process'] == 'suspended'
    rig.operate('resume', 't1')
    task.goes_on()

    task.wait(lambda now: now['checkpoint'] > 0)
    rig.change('global_prefs_override.xml', ['leave_apps_in_memory=0'])
    rig.operate('suspend', 't1')
    rig.wait('t1', 'process=none', 30)
    wait_until(task.is_stopped, 20)
    rig.operate('resume', 't1')
    task.goes_on()

    rig.stop()
    wait_until(task.is_stopped, 20)
    task.begins_at_a_checkpoint()      # a client that ends doesn't hear the last of it
    rig.start()
    task.goes_on()

    wrapper = task.wrapper()
    rig.kill()
    wait_until(lambda: not os.path.exists('/proc/%d' % wrapper), 20)
    wait_until(task.is_stopped, 20)
    rig.start()
    task.begins_at_a_checkpoint()
    task.goes_on()

    task.kill_wrapper()
    task.goes_on()

    hosts = boinc.host_pids()
    assert len(hosts) == 1
    os.kill(hosts[0], signal.SIGKILL)
    task.wait(lambda now: len(boinc.host_pids()) == 1 and boinc.host_pids() != hosts)
    task.goes_on()

    first, _ = task.program()
    os.kill(first, signal.SIGSTOP)             # until all that it did is in a checkpoint
    before = task.used()
    task.wait(lambda now: now['checkpoint'] > before - 0.05)
    boinc.reboot(first)
    wait_until(lambda: len(boinc.read('t1', 'starts').split()) == 2, 60)
    task.goes_on()

    open(os.path.join(boinc.task_folder('t1'), 'finish'), 'w').close()
    end = rig.wait('t1', 'done=true', 60)
    assert (end['state'], end['exit']) == ('uploaded', 0), rig.stderr('t1')
    with open(rig.file('t1', 'out')) as file:
        lines = file.read().split('\n')
    assert lines[:4] == ['apples', 'pears', 'and plums', '2']
    assert end['cpu'] == pytest.approx(before + boinc_rig.seconds_of(lines[4:6]), rel=0.05, abs=0.05)
    boinc_rig.assert_only_grow(boinc.told())
    wait_until(lambda: not os.path.exists(boinc.task_folder('t1')), 20)


def test_the_life_of_a_task_in_a_vm(tmp_path):
    """The same, as far as a VM goes without a hypervisor: one VM, one program, and checkpoints."""
    with boinc_rig.running(tmp_path, boinc_rig.WithFakeVMs) as boinc:
        rig = boinc.rig
        boinc.add_counting('t1')
        boinc.start()
        guest = boinc.boot('t1')
        task = boinc_rig.Watched(boinc, 't1')
        task.wait(lambda now: now['cpu'] > 0 and now['checkpoint'] > 0)
        uuid = boinc.client.call('getVM', boinc.vm('t1'))['uuid']
        rig.operate('suspend', 't1')
        boinc.has('t1', 'Paused')
        rig.operate('resume', 't1')
        boinc.has('t1', 'Running')

        rig.change('global_prefs_override.xml', ['leave_apps_in_memory=0'])
        rig.operate('suspend', 't1')
        rig.wait('t1', 'process=none', 30)
        assert boinc.vms() == {boinc.vm('t1'): 'Saved'}
        rig.operate('resume', 't1')
        boinc.has('t1', 'Running')

        rig.stop()
        assert boinc.vms() == {boinc.vm('t1'): 'Saved'}
        task.begins_at_a_checkpoint()
        boinc.start()
        boinc.has('t1', 'Running')
        rig.kill()
        boinc.has('t1', 'Saved')
        task.begins_at_a_checkpoint()
        boinc.start()
        boinc.has('t1', 'Running')

        task.kill_wrapper()
        hosts = boinc.host_pids()
        os.kill(hosts[0], signal.SIGKILL)
        task.wait(lambda now: len(boinc.host_pids()) == 1 and boinc.host_pids() != hosts)
        task.gets_further()
        assert boinc.client.call('getVM', boinc.vm('t1'))['uuid'] == uuid

        open(os.path.join(boinc.environment['FAKE_VIRTUALBOX'], 'abort-' + boinc.vm('t1')), 'w').close()
        boinc.stderr_says('t1', 'goes on from its last checkpoint')
        boinc.has('t1', 'Running')
        guest.stop()
        guest = boinc.boot('t1')       # its VM has another port for files by now: this one is in use
        end, lines = finished(boinc, 't1', guest)
        assert lines[:4] == ['apples', 'pears', 'and plums', '1']
        assert end['cpu'] == pytest.approx(boinc_rig.seconds_of(lines[4:6]), rel=0.05, abs=0.05)
        boinc_rig.assert_only_grow(boinc.told())
        assert boinc.vms() == {}


def finished(boinc, name, guest):
    """A task that counts ends well: what its client shows of it, and the lines of its output."""
    open(os.path.join(guest.files, 'finish'), 'w').close()
    end = boinc.rig.wait(name, 'done=true', boinc_rig.PATIENCE)
    assert (end['state'], end['exit']) == ('uploaded', 0), boinc.rig.stderr(name)
    with open(boinc.rig.file(name, 'out')) as file:
        return end, file.read().split('\n')


def test_two_projects_at_once(tmp_path):
    """Two tasks of one, one of the other, of one client: each project has a host agent, and the end, and the
    cleanup, of the one's VMs is nothing to the other's. No VM, disk, process or lock is left."""
    with boinc_rig.running(tmp_path, boinc_rig.WithFakeVMs) as one:
        for name in 'ab':
            one.add_counting(name)
        other = one.beside('other')
        other.add_counting('c')
        one.start()
        project_of = {'a': one, 'b': one, 'c': other}
        guests = {name: project.boot(name) for name, project in project_of.items()}
        wait_until(lambda: all(one.rig.task(name)['cpu'] > 0 for name in guests), boinc_rig.PATIENCE, 0.2)
        assert one.vms() == {project.vm(name): 'Running' for name, project in project_of.items()}
        hosts = one.host_pids(), other.host_pids()
        assert [len(pids) for pids in hosts] == [1, 1]
        for name in 'ab':
            assert finished(one, name, guests[name])[1][:4] == ['apples', 'pears', 'and plums', '1']
        theirs = [other.vm('c')]
        assert one.client.call('cleanup', False, theirs, boincwork.OWNER + one.project) == []
        assert one.vms() == dict.fromkeys(theirs, 'Running')
        assert finished(other, 'c', guests['c'])[1][:4] == ['apples', 'pears', 'and plums', '1']
        assert one.vms() == {} == other.vms()
        wait_until(lambda: not files_in(one.rig.path('data', 'slots')), 30)
        assert [path for path in files_in(one.rig.data) if path.endswith('.vdi')] == sorted(
            os.path.join(project.project, os.path.basename(project.image)) for project in (one, other))
        for project in (one, other):
            project.client.call('stopHost')
        wait_until(lambda: set(map(command_name, one.rig.leftovers())) <= {'fake_server.py', ''}, 30)


def command_name(pid):
    """What a process of Python's runs; '' once it has ended."""
    return os.path.basename((command_line(pid) + ['', ''])[1])


def files_in(folder):
    return sorted(os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)


def test_ends(boinc):
    """Thirteen tasks at once, and each shows what became of its program."""
    rig = boinc.rig
    for name, program in (('one', 'exit 1'), ('most', 'exit 255'), ('segv', 'kill -SEGV $$'),
                          ('killed', 'kill -KILL $$'), ('lacks', 'exit 0'), ('endless', 'sleep 600'),
                          ('leaves', 'setsid sleep 600 > /dev/null 2>&1 & echo left $! >&2')):
        boinc.add(name, program + '\n', LACKS if name == 'lacks' else '',
                  outputs=['out'] if name == 'lacks' else [])
    boinc.add('completed', 'printf "3\\n1\\nall that was to be done\\n" > over; sleep 600\n',
              '<completion_trigger_file>over</completion_trigger_file>')
    boinc.add('tired', 'printf "1800\\n0\\nthe moon is up\\n" > rest; sleep 600\n',
              '<temporary_exit_trigger_file>rest</temporary_exit_trigger_file>')
    boinc.add('odd', 'exit 0\n', '<enable_floppyio>1</enable_floppyio><frobnicate/>')
    boinc.add('absent', '', '<command>no/such/program</command>')
    boinc.add('bare', '', '<command>sh -c "ls -A > out"</command><output>out</output>', outputs=['out'])
    boinc.add('timed', 'sleep 600\n', '<job_duration>2</job_duration>')
    rig.start()
    wait_until(lambda: rig.task('endless')['process'] == 'running'
               and os.path.exists(boinc.task_folder('endless')), 60, 0.2)
    rig.operate('abort', 'endless')
    ends = {name: rig.wait(name, 'done=true', 60) for name in (
        'one', 'most', 'segv', 'killed', 'lacks', 'endless', 'completed', 'absent',
        'timed', 'leaves', 'bare')}
    assert {name: (end['state'], end['exit']) for name, end in ends.items()} == {
        'one': ('error', 1), 'most': ('error', 255), 'segv': ('error', 11), 'killed': ('error', 193),
        'lacks': ('error', 0), 'endless': ('aborted', 203), 'completed': ('error', 3),
        'absent': ('error', 206), 'timed': ('uploaded', 0), 'leaves': ('uploaded', 0),
        'bare': ('uploaded', 0)}
    assert 'ENOENT: No such file or directory: no/such/program' in rig.stderr('absent')
    daemon = re.search('left ([0-9]+)', rig.stderr('leaves')).group(1)
    wait_until(lambda: not os.path.exists('/proc/' + daemon), 20)
    assert re.search('Output file lacks_out.* absent', rig.read('client.log'))
    assert 'the program left no file no/such/out' in rig.stderr('lacks')
    assert rig.wait('tired', 'waiting=the moon is up')['process'] == 'none'
    task = rig.wait('odd', 'process=none')
    assert 'enable_floppyio' in wait_until(lambda: rig.task('odd')['waiting'], 20), task
    wait_until(lambda: os.listdir(boinc.guest.files) == ['%s_tired' % os.path.basename(boinc.project)], 20)


def test_a_task_that_is_sent_again_after_a_reset_runs_again(boinc):
    """Under its old name, on a machine that remembers what ran under that, and what it had halted."""
    rig = boinc.rig
    for name, program in (('over', 'echo $$ >> result\n'), ('halted', 'echo $$ >> result; sleep 600\n')):
        boinc.add(name, program, '<output>result</output>', outputs=['result'])
    rig.start()
    rig.wait('over', 'done=true', 60)
    halted = int(wait_until(lambda: boinc.read('halted', 'result').strip(), 60))
    with open(rig.file('over', 'result')) as file:
        first = file.read()
    rig.stop()
    wait_until(lambda: boinc_rig.status_of(halted)['State'][0] == 'T', 20)
    boinc.forget()
    for name in ('over', 'halted'):
        boinc.add(name, 'echo $$ >> result\n', '<output>result</output>', outputs=['result'])
    rig.start()
    for name, before in (('over', first), ('halted', '%d\n' % halted)):
        end = rig.wait(name, 'done=true', 60)
        assert (end['state'], end['exit']) == ('uploaded', 0), rig.stderr(name)
        with open(rig.file(name, 'result')) as file:
            again = file.read()
        assert again.count('\n') == 1 and again != before
    assert not os.path.exists('/proc/%d' % halted)
    wait_until(lambda: not os.listdir(boinc.guest.files), 20)


def test_by_hand_a_task_runs_as_often_as_its_folder_is_told_to(boinc, tmp_path):
    """With what stands there by then, on a machine that remembers the run before; and it says which file is
    in the way."""
    alone = tmp_path / 'alone'
    alone.mkdir()
    os.rename(os.path.join(boinc.project, 'vmhost'), str(alone / 'vmhost'))
    (alone / 'vbox_job.xml').write_text('<vbox_job><input>in</input><output>out</output></vbox_job>')
    (alone / 'boinc_app').write_text('cat in >> out\n')
    boinc.project, finish_file = str(alone), alone / 'boinc_finish_called'

    def run():
        done = subprocess.run([boinc.program], cwd=str(alone), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=60)
        assert done.returncode == 0, done.stdout
        return done.stdout.decode()
    try:
        for number in range(3):
            (alone / 'in').write_text('%d\n' % number)
            run()
            assert (alone / 'out').read_text() == '%d\n' % number and finish_file.exists()
            assert 'was over already, as boinc_finish_called says: without that file, it begins anew' in run()
            finish_file.unlink()
        assert sorted(os.listdir(str(alone))) == ['boinc_app', 'in', 'out', 'vbox_job.xml', 'vmhost']
    finally:
        for pid in boinc_rig.hosts_in(alone / 'vmhost'):
            os.kill(pid, signal.SIGTERM)
