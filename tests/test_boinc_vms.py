"""vmboinc with VMs: made on the project's image in the task's slot, paused, saved, and gone afterwards.

The hypervisor is the fake VirtualBox; what would be the VM's agent runs beside it.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import boinc as boinc_rig
import fake_server
import fake_virtualbox
import pytest
from agents import TOP, Agent
from fake_client import FakeClient
from helpers import wait_until
from vms import environment, kill

import agent
import boinchost
import boincslot
import boincwork
import hostclient
import vmboinc
from boincslot import GRAPHICS, Record

pytestmark = [pytest.mark.once, pytest.mark.slow, pytest.mark.ends,
              pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]
INI = """[Broker]
port = auto
[Host]
xmlrpc_port = auto
state_dir = state
[Hypervisor]
hypervisor = VirtualBox
[Network]
mode = nat
[Logging]
file = vmhost.log
"""
JOB = """<vbox_job>
<os_name>Linux_64</os_name><memory_size_mb>600</memory_size_mb>
<multiattach_vdi_file>image.vdi</multiattach_vdi_file>
<minimum_checkpoint_interval>0</minimum_checkpoint_interval><checkpoint>files</checkpoint>
<input>in</input><output>out</output>%s
</vbox_job>
"""
APP = """n=0
while ! [ -e finish ]; do n=$((n + 1)); echo 0.5 > $VM_PROGRESS_FILE; sleep 0.1; done
cat in > out
"""


class Project:
    """A project's folder with an image, its host agent's ini file, and tasks."""

    def __init__(self, folder, stack, name='project'):
        self.folder, self.name, self._stack = str(folder), name, stack
        self.environment = fake_virtualbox.install(os.path.join(self.folder, 'fake'))
        self.place = os.path.join(self.folder, 'projects', name)
        os.makedirs(os.path.join(self.place, 'vmhost'), mode=0o700)
        self.image = os.path.join(self.place, 'image.vdi')
        for path, text in ((self.image, fake_virtualbox.disk(len(name))),
                           (os.path.join(self.place, 'vmhost', 'host.ini'), INI)):
            with open(path, 'w') as file:
                file.write(text)
        self.client = hostclient.Client(os.path.join(self.place, 'vmhost', 'state'))
        stack.callback(self.end_host)

    def call(self, method, *args):
        return self.client.call(method, *args)

    def vms(self):
        """{name: state}, {} while no host agent answers."""
        with contextlib.suppress(hostclient.NoHost):
            return self.call('listVMsWithState')
        return {}

    def host_pids(self):
        """Those of all host agents that have started, the last one last."""
        with open(os.path.join(self.place, 'vmhost', 'vmhost.log')) as file:
            return list(map(int, re.findall('started, pid ([0-9]+)', file.read())))

    def host_pid(self):
        return self.host_pids()[-1]

    def end_host(self):
        with contextlib.suppress(OSError, IndexError):
            pid = self.host_pid()
            kill(pid)

    def task(self, name='t1', job='', app=APP):
        task = FakeClient(self.folder, name, self.name, self.environment)
        self._stack.callback(task.close)
        task.write('vbox_job.xml', JOB % job)
        task.link('boinc_app', app)
        task.link('in', 'what goes in\n')
        task.vm = '%s_%s' % (self.name, name)
        return task

    def agent(self, task):
        """What runs in a task's VM, once that does."""
        task.wait(lambda: self.vms().get(task.vm) == 'Running')
        port = int(self.call('agentInfo')['broker']['address'].rpartition(':')[2])
        host = types.SimpleNamespace(broker_port=port)
        with environment(self.environment):
            box = fake_server.VirtualBoxManager()              # which lives on while somebody talks to it
        self._stack.callback(box.line.connection.close)
        port = boinc_rig.chirp_port(box, task.vm)
        agent = Agent(os.path.join(self.folder, 'guest-' + task.name), host,
                      self.call('getVM', task.vm)['id'], chirp={'port': port})
        self._stack.callback(agent.end_programs)
        self._stack.callback(agent.stop)
        agent.start(wait=False)
        return agent

    def has(self, task, state):
        return task.wait(lambda: self.vms().get(task.vm) == state)


@pytest.fixture
def project(tmp_path):
    with contextlib.ExitStack() as stack:
        yield Project(tmp_path, stack)


def finish(agent):
    open(os.path.join(agent.files, 'finish'), 'w').close()


def test_the_life_of_a_vm(project):
    task = project.task()
    out = task.link('out')
    task.start()
    agent = project.agent(task)
    task.wait(lambda: task.status('fraction_done') == 0.5)
    assert os.path.exists(os.path.join(task.slot, task.vm, task.vm + '.vbox'))
    with open(os.path.join(project.place, 'vmhost', 'state', 'leases.json')) as file:
        assert json.load(file) == {task.vm: 60}
    task.says('suspend')
    project.has(task, 'Paused')
    task.says('resume')
    project.has(task, 'Running')
    task.says('quit')
    assert task.wait_for_end() == 0 and project.vms() == {task.vm: 'Saved'}
    assert not task.read('boinc_finish_called') and task.status('checkpoint_cpu_time') >= 0
    task.start()
    project.has(task, 'Running')
    task.wait(lambda: task.status('fraction_done') == 0.5)
    kill(project.host_pid())
    finish(agent)                              # whose host's broker has another port by now
    assert task.process.poll() is None
    task.says('abort')
    assert task.wait_for_end(60) == 194 and project.vms() == {}
    assert not os.path.exists(out) and not os.path.exists(os.path.join(task.slot, task.vm))
    assert open(project.image).read() == fake_virtualbox.disk(len(project.name))


def test_a_finished_task_leaves_nothing(project):
    task = project.task(app='cat in > out; exit $1')
    out = task.link('out')
    task.start('0')
    project.agent(task)
    assert task.wait_for_end() == 0 and task.read('boinc_finish_called') == '0\n'
    assert open(out).read() == 'what goes in\n' and project.vms() == {}
    assert not os.path.exists(os.path.join(task.slot, task.vm))
    assert not os.path.exists(os.path.join(task.slot, 'boinc_lockfile'))


def test_a_client_that_died_gets_its_vm_saved(project):
    task = project.task()
    task.link('out')
    stands_in = subprocess.Popen(['sleep', '600'])
    task.init(pid=stands_in.pid)
    task.start()
    project.agent(task)
    task.wait(lambda: task.status('fraction_done') == 0.5)
    with open(os.path.join(project.environment['FAKE_VIRTUALBOX'], 'slow-' + task.vm), 'w') as file:
        file.write('2')
    stands_in.kill()
    stands_in.wait()
    task.wait(lambda: 'the client says quit' in task.read('stderr.txt'))
    task.says('suspend')                       # the next client, to the wrapper that waits for this one
    assert task.wait_for_end() == 0 and project.vms() == {task.vm: 'Saved'}
    assert task.channels.waits(boincslot.CONTROL)


def test_a_killed_wrapper_goes_on_with_the_same_vm(project):
    task = project.task()
    out = task.link('out')
    task.start()
    agent = project.agent(task)
    task.wait(lambda: task.status('fraction_done') == 0.5)
    uuid = project.call('getVM', task.vm)['uuid']
    task.process.send_signal(signal.SIGKILL)
    task.process.wait()
    task.told = []
    task.start()
    task.wait(lambda: task.status('fraction_done') == 0.5)
    assert project.call('getVM', task.vm)['uuid'] == uuid
    assert [command['state'] for command in project.call('listCmds')] == ['running']
    finish(agent)
    assert task.wait_for_end() == 0 and open(out).read() == 'what goes in\n'


def test_a_vm_that_died_boots_again_and_the_program_begins_with_its_files(project):
    task = project.task(app='echo begun >> begun; until [ -e finish ]; do sleep 0.1; done; cat begun > out')
    out = task.link('out')
    task.start()
    agent = project.agent(task)
    task.wait(lambda: os.path.exists(os.path.join(agent.files, 'begun')))
    task.wait(lambda: [row['state'] for row in project.call('listCmds')] == ['running'])
    open(os.path.join(project.environment['FAKE_VIRTUALBOX'], 'abort-' + task.vm), 'w').close()
    task.wait(lambda: 'begins again' in task.read('stderr.txt'))
    agent.stop()
    agent = project.agent(task)                # its VM has another port for files by now
    task.wait(lambda: len(project.call('listCmds')) == 2)
    finish(agent)
    assert task.wait_for_end(60) == 0, task.read('stderr.txt')
    assert open(out).read() == 'begun\nbegun\n' and 'begins again' in task.read('stderr.txt')


@pytest.mark.parametrize('has_run', [True, False])
def test_a_vm_that_was_taken_out_of_the_list_is_registered_again(has_run, project):
    """As in VirtualBox's window: removed, its files kept. Where nothing has run in it, it is made anew."""
    task = project.task(app='echo begun >> begun; until [ -e finish ]; do sleep 0.1; done; cat begun > out')
    out = task.link('out')
    task.start()
    if has_run:
        agent = project.agent(task)
        task.wait(lambda: [row['state'] for row in project.call('listCmds')] == ['running'])
    else:
        project.has(task, 'Running')
    id = project.call('getVM', task.vm)['id']
    task.says('quit')
    assert task.wait_for_end() == 0
    project.call('discardState', task.vm)
    project.call('removeVM', task.vm)
    if has_run:
        agent.stop()                   # its program stays, as in memory
    task.start()
    agent = project.agent(task)
    assert ('registered again' in task.read('stderr.txt')) is has_run
    assert not has_run or project.call('getVM', task.vm)['id'] == id
    task.wait(lambda: os.path.exists(os.path.join(agent.files, 'begun')))
    finish(agent)
    assert task.wait_for_end(60) == 0, task.read('stderr.txt')
    assert open(out).read() == 'begun\n' and project.vms() == {}
    assert not os.path.exists(os.path.join(task.slot, task.vm))


@pytest.mark.parametrize('how', ['abort-', 'stick-'])
def test_a_vm_that_died_goes_on_from_its_last_checkpoint(how, project):
    task = project.task(job='<checkpoint>state</checkpoint>',
                        app='echo begun >> begun; until [ -e finish ]; do sleep 0.1; done; cat begun > out')
    out = task.link('out')
    task.start()
    agent = project.agent(task)
    task.wait(lambda: os.path.exists(os.path.join(agent.files, 'begun')))
    first = task.wait(lambda: project.call('listSnapshots', task.vm))
    task.wait(lambda: project.call('listSnapshots', task.vm) not in ([], first))
    assert len(project.call('listSnapshots', task.vm)) <= 2
    open(os.path.join(project.environment['FAKE_VIRTUALBOX'], how + task.vm), 'w').close()
    task.wait(lambda: 'from its last checkpoint' in task.read('stderr.txt'))
    project.has(task, 'Running')
    agent.stop()
    agent = project.agent(task)                # its VM has another port for files by now: this one is in use
    finish(agent)
    assert task.wait_for_end(60) == 0, task.read('stderr.txt')
    assert open(out).read() == 'begun\n' and project.vms() == {}


JUMPING = '''
import time
real, path = time.time, %r
def jumping():
    with open(path) as file:
        return real() + float(file.read() or 0)
time.time = jumping
'''


def test_a_clock_that_jumps_by_hours_changes_nothing(project, tmp_path):
    """Of wrapper and host agent, back and forth: checkpoints are made, the VM runs on, and ends well."""
    clock = tmp_path / 'clock'
    clock.write_text('')
    (tmp_path / 'jumping').mkdir()
    (tmp_path / 'jumping' / 'sitecustomize.py').write_text(JUMPING % str(clock))
    task = project.task(job='<checkpoint>state</checkpoint>')
    task.environment = dict(project.environment, PYTHONPATH=os.pathsep.join(
        [str(tmp_path / 'jumping'), project.environment['PYTHONPATH']]))
    out = task.link('out')
    task.start()
    agent = project.agent(task)
    task.wait(lambda: task.status('fraction_done') == 0.5)
    begun = project.host_pids()

    def is_checkpointed():
        """By the clock of now."""
        offsets = [int(name.split()[-1]) - time.time() for name in project.call('listSnapshots', task.vm)]
        return offsets and all(abs(offset - float(clock.read_text())) < 1000 for offset in offsets)
    for hours in (5, -7, 0, -1, 30):
        clock.write_text('%d' % (3600 * hours))
        task.wait(is_checkpointed)
        task.told = []
        task.wait(lambda: len(task.told) > 1)
        told = project.call('getVM', task.vm)
        assert (told['state'], told['agent'], project.host_pids()) == ('Running', 'alive', begun)
    assert [command['state'] for command in project.call('listCmds')] == ['running']
    finish(agent)
    assert task.wait_for_end(60) == 0 and open(out).read() == 'what goes in\n' and project.vms() == {}


def test_preferences_reach_the_vm(project, monkeypatch):
    monkeypatch.setenv('FAKE_VIRTUALBOX', project.environment['FAKE_VIRTUALBOX'])
    task = project.task()
    task.link('out')
    task.init(cpu_limit=40)
    task.start()
    project.agent(task)
    machine = fake_server.VirtualBoxManager().getVirtualBox().findMachine(task.vm)
    task.wait(lambda: machine.CPUExecutionCap == 40)
    assert machine.memorySize == 600
    task.init(cpu_limit=50, rate=20480)        # whose first rate can't be set while it runs
    task.says('reread_app_info')
    task.wait(lambda: machine.CPUExecutionCap == 50)
    task.wait(lambda: 'netKBps' in task.read('stderr.txt'))


def test_a_client_that_halts_tasks_for_foreign_programs_is_told_that_the_vm_is_none(project):
    """As long as the VM runs; then it is the wrapper itself, for a client kills what was named last."""
    task = project.task()
    task.link('out')
    task.init(foreign_cpu=25)
    task.start()
    project.agent(task)
    task.wait(lambda: task.status('other_pid') == project.call('getVM', task.vm)['pid'] > 0)
    task.says('quit')
    assert task.wait_for_end() == 0 and task.status('other_pid') == task.process.pid
    task.init(foreign_cpu=0)
    task.told = []
    task.start()
    project.has(task, 'Running')
    task.wait(lambda: len(task.told) > 2)
    assert not any('other_pid' in text for text in task.told)


def test_its_memory_and_its_screen_are_told(project):
    """The memory to a client that takes that, of version 8; of the screen the address, and the password to
    this user alone."""
    task = project.task(job='<enable_remotedesktop/>')
    task.link('out')
    task.start()
    project.agent(task)
    task.wait(lambda: '<remote_desktop_addr>127.0.0.1:' in task.channels.receive(GRAPHICS))
    path = os.path.join(task.slot, 'remote_desktop_password')
    assert os.stat(path).st_mode & 0o777 == 0o600 and len(task.read(path).strip()) == 8
    assert not any('<wss>' in told for told in task.told)
    task.says('quit')
    assert task.wait_for_end() == 0
    task.write('init_data.xml', task.read('init_data.xml').replace('<major_version>7', '<major_version>8'))
    task.start()
    task.wait(lambda: task.status('wss') == 600 << 20)


def test_what_its_program_serves_is_shown_in_place_of_the_status_page(project, monkeypatch):
    """On a port that another program takes while the VM is saved."""
    monkeypatch.setenv('FAKE_VIRTUALBOX', project.environment['FAKE_VIRTUALBOX'])
    task = project.task(job='<pf_guest_port>8080</pf_guest_port><port_forward><guest_port>22</guest_port>'
                            '<nports>2</nports></port_forward>')
    task.link('out')
    task.start()
    project.agent(task)
    forwards = project.call('getVM', task.vm)['forwards']
    assert [(each['guestPort'], each['isRemote']) for each in forwards] == [
        (8080, False), (22, False), (23, False)]
    task.wait(lambda: '<web_graphics_url>http://localhost:%d</web_graphics_url>' % forwards[0]['hostPort']
              in task.channels.receive(GRAPHICS))
    task.says('quit')
    assert task.wait_for_end() == 0 and project.vms() == {task.vm: 'Saved'}
    with socket.socket() as other:
        other.bind(('127.0.0.1', forwards[0]['hostPort']))
        other.listen(1)
        task.start()
        project.has(task, 'Running')
    moved = project.call('getVM', task.vm)['forwards']
    assert moved[0]['hostPort'] != forwards[0]['hostPort'] and moved[1:] == forwards[1:]
    task.wait(lambda: '<web_graphics_url>http://localhost:%d</web_graphics_url>' % moved[0]['hostPort']
              in task.channels.receive(GRAPHICS))


def test_a_card_is_bridged_where_the_volunteer_allows_it(project, monkeypatch):
    """Without that leave, or the interface, the task is tried again later: with the reason."""
    monkeypatch.setenv('FAKE_VIRTUALBOX', project.environment['FAKE_VIRTUALBOX'])
    task = project.task(job='<network_bridged_mode/>')
    task.link('out')
    task.start()
    assert task.wait_for_end(60) == 0 and project.vms() == {}
    reason = task.read('boinc_temporary_exit')
    assert 'network_bridged_mode: refused' in reason and '[Bridged] and projects = project' in reason
    leave = os.path.join(project.folder, boincwork.LEAVE)
    assert leave in task.read('stderr.txt')
    for interface, told in (('eth7', 'no interface eth7; there are: eth0, eth1'), ('eth1', '')):
        with open(leave, 'w') as file:
            file.write('[Bridged]\nprojects = project\ninterface = %s\n' % interface)
        task.start()
        if told:
            assert task.wait_for_end(60) == 0 and told in task.read('boinc_temporary_exit')
    agent = project.agent(task)
    assert project.call('getVM', task.vm)['bridged'] == 'eth1'
    finish(agent)
    assert task.wait_for_end(60) == 0 and task.read('boinc_finish_called') == '0\n'


def test_vms_of_tasks_that_the_client_forgot_go(project):
    first = project.task('first')
    first.link('out')
    first.start()
    project.has(first, 'Running')
    first.says('quit')
    assert first.wait_for_end() == 0
    os.remove(os.path.join(first.slot, 'init_data.xml'))               # as a reset does
    project.call('createVM', 'project_other', '', {'diskSize': 4, 'owner': 'somebody else'})
    second = project.task('second')
    second.link('out')
    second.start()
    project.has(second, 'Running')
    assert sorted(project.vms()) == ['project_other', second.vm]


@pytest.mark.parametrize('had', ['ended', 'been saved'])
def test_a_task_that_is_sent_again_after_a_reset_gets_another_vm(had, project):
    """Under its old name, which its host agent remembers, with what ran there."""
    task = project.task(app=APP + 'echo $1 >> out\n')
    out = task.link('out')
    task.start('first')
    agent = project.agent(task)
    uuid = project.call('getVM', task.vm)['uuid']
    task.wait(lambda: task.status('fraction_done') == 0.5)
    if had == 'ended':
        finish(agent)
    else:
        task.says('quit')
    assert task.wait_for_end() == 0
    agent.stop()
    for name in (Record.FILE, 'boinc_finish_called'):                  # as a reset does
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(task.slot, name))
    shutil.rmtree(os.path.join(task.slot, task.vm), ignore_errors=True)
    shutil.rmtree(os.path.join(project.folder, 'guest-' + task.name))
    task.start('again')
    agent = project.agent(task)
    assert project.call('getVM', task.vm)['uuid'] != uuid
    finish(agent)
    assert task.wait_for_end() == 0 and open(out).read() == 'what goes in\nagain\n', task.read('stderr.txt')


def test_a_host_agent_of_an_older_version_gives_way_to_a_new_one(project, monkeypatch):
    host = boinchost.HostAgent(os.path.join(project.place, 'vmhost'),
                               [sys.executable, os.path.join(TOP, 'vmboinc.py'), '--host-agent'])
    monkeypatch.setattr(os, 'environ', dict(os.environ, **project.environment))
    wait_until(host.connect, 30)
    pid = wait_until(project.host_pids)[-1]
    with monkeypatch.context() as patched:
        patched.setattr(agent, 'VERSION', '1.10')
        assert not host.connect()
    wait_until(lambda: not agent.is_alive(pid))
    with monkeypatch.context() as patched:
        patched.setattr(agent, 'VERSION', '0.9')       # an older task gets along with a newer agent
        wait_until(host.connect, 30)
    wait_until(lambda: project.host_pid() != pid)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_a_full_disk_is_no_error(project):
    task = project.task()
    os.symlink('/dev/full', os.path.join(task.slot, 'vmboinc.json.new'))
    task.start()
    assert task.wait_for_end() == 0
    assert 'No space left on device' in task.read('boinc_temporary_exit')
    os.symlink('/dev/full', os.path.join(task.slot, 'boinc_temporary_exit.new'))
    task.start()                       # not even the reason can be written: it waits until it can
    task.wait(lambda: 'it is tried again' in task.read('stderr.txt'))
    os.remove(os.path.join(task.slot, 'boinc_temporary_exit.new'))
    assert task.wait_for_end() == 0
    assert 'No space left on device' in task.read('boinc_temporary_exit')
    os.symlink('/dev/full', os.path.join(task.slot, 'boinc_temporary_exit.new'))
    open(os.path.join(task.slot, 'stderr.txt'), 'w').close()
    task.start()
    task.wait(lambda: 'it is tried again' in task.read('stderr.txt'))
    task.says('quit')
    assert task.wait_for_end() == 0


def test_a_slot_that_cannot_be_written_is_no_error(project):
    task = project.task()
    os.symlink('/nowhere/lock', os.path.join(task.slot, 'boinc_lockfile'))
    os.symlink('/nowhere/reason', os.path.join(task.slot, 'boinc_temporary_exit.new'))
    task.start()
    task.wait(lambda: 'it is tried again' in task.read('stderr.txt'))
    os.remove(os.path.join(task.slot, 'boinc_temporary_exit.new'))
    assert task.wait_for_end() == 0
    assert task.read('boinc_temporary_exit').startswith('60\nthe slot can\'t be used: ')
    assert 'Traceback' not in task.read('stderr.txt')


@pytest.mark.parametrize('cut, said', [
    (lambda text: '', 'is cut off'), (lambda text: text[:text.index('</project_dir>')], 'is cut off'),
    (lambda text: text.replace('result_name', 'other'), 'lacks <result_name>')])
def test_init_data_of_a_client_whose_disk_is_full_begins_nothing(cut, said, project):
    task = project.task()
    task.write('init_data.xml', cut(task.read('init_data.xml')))
    task.start()
    assert task.wait_for_end() == 0
    assert 'init_data.xml %s in slot' % said in task.read('boinc_temporary_exit')
    assert not os.path.exists(os.path.join(task.slot, 'vmhost')) and not project.vms()


def test_a_signal_from_a_keyboard_ends_it_without_a_traceback(project):
    task = project.task()
    task.start()
    project.has(task, 'Running')
    task.process.send_signal(signal.SIGINT)
    assert task.wait_for_end() == -signal.SIGINT
    assert 'Traceback' not in task.read('stderr.txt')


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_a_job_file_as_windows_programs_write_it_is_read(encoding, project):
    task = project.task(job='<enable_floppyio/>')
    with open(os.path.join(task.slot, 'vbox_job.xml'), encoding='utf-8') as file:
        text = file.read()
    with open(os.path.join(task.slot, 'vbox_job.xml'), 'w', encoding=encoding) as file:
        file.write(text)
    task.start()
    assert task.wait_for_end() == 0
    assert 'enable_floppyio' in task.read('boinc_temporary_exit')


def test_a_job_file_that_is_missing_is_said_with_what_to_do(project):
    task = project.task()
    os.remove(os.path.join(task.slot, 'vbox_job.xml'))
    task.start()
    assert task.wait_for_end() == 0
    assert 'vbox_job.xml is missing in the slot: reset the project' in task.read('boinc_temporary_exit')


def test_a_task_that_ended_while_its_next_wrapper_waited_is_over(project, monkeypatch):
    """As where the client was killed, and another one started, while a wrapper brought the outputs home."""
    task = project.task(app='exit 0')

    def ends_meanwhile(slot, patience):
        task.write('boinc_finish_called', '7\n')
        return True
    monkeypatch.setattr(boincslot, 'wait_for_lock', ends_meanwhile)
    monkeypatch.setattr(vmboinc, 'live', lambda slot, words: pytest.fail('it runs a second time'))
    monkeypatch.chdir(task.slot)
    assert vmboinc.run_task([]) == 7 and not os.path.exists('boinc_temporary_exit')


def test_a_slot_that_can_not_be_used_is_no_error(project, monkeypatch):
    """Nor can the reason be told there, while that is so."""
    task = project.task()
    os.mkdir(os.path.join(task.slot, boincslot.LOCK_FILE))
    task.start()
    assert task.wait_for_end() == 0
    assert 'the slot can\'t be used: ' in task.read('boinc_temporary_exit')
    assert 'boinc_lockfile: Is a directory' in task.read('boinc_temporary_exit')
    os.mkdir(os.path.join(task.slot, 'boinc_temporary_exit.new'))
    task.start()
    task.wait(lambda: 'it is tried again' in task.read('stderr.txt'))
    os.rmdir(os.path.join(task.slot, 'boinc_temporary_exit.new'))
    assert task.wait_for_end() == 0 and 'Traceback' not in task.read('stderr.txt')


def test_no_image_and_no_hypervisor_are_no_errors(project, tmp_path):
    os.remove(project.image)
    task = project.task()
    task.start()
    assert task.wait_for_end() == 0
    assert task.read('boinc_temporary_exit').startswith('60\n') and 'image.vdi is missing' in task.read(
        'boinc_temporary_exit')
    task.start()
    assert task.wait_for_end() == 0 and task.read('boinc_temporary_exit').startswith('120\n')
    project.end_host()
    with open(os.path.join(project.place, 'vmhost', 'host.ini'), 'w') as file:
        file.write(INI.replace('VirtualBox', 'auto'))
    task.environment = {}
    task.start()
    assert task.wait_for_end(60) == 0
    wait_until(lambda: 'install VirtualBox' in task.read('boinc_temporary_exit'))
