"""vmboinc on Windows: a client there starts it, and the science runs on a Linux guest."""

import contextlib
import os
import re
import subprocess
import types

import pytest
from agents import TOP, Agent
from fake_client import FakeClient
from helpers import wait_until
from wine import Program, path_there, python

MEMORY = 'shm_boinc_0'
INI = """[Broker]
port = auto
[Host]
xmlrpc_port = auto
state_dir = state
[Hypervisor]
hypervisor = none
"""
JOB = """<vbox_job><os_name>Linux_64</os_name><memory_size_mb>256</memory_size_mb>
<input>in</input><output>out</output><checkpoint>files</checkpoint></vbox_job>
"""
APP = """n=0
while ! [ -e finish ]; do n=$((n + 1)); echo $n > counted; echo 0.25 > $VM_PROGRESS_FILE; sleep 0.05; done
cat in > out
"""


class Task(FakeClient):
    """A task whose client is a program on Windows; its files are this machine's."""

    def init(self, cpu_limit=100, pid=None, rate=0):
        super().init(cpu_limit, pid, rate)
        text = re.sub('<client_pid>.*<', '<client_pid>0<', self.read('init_data.xml'))
        text = text.replace(self.project, path_there(self.project)).replace(
            '<slot>', '<comm_obj_name>%s</comm_obj_name>\n<slot>' % MEMORY[len('shm_'):])
        self.write('init_data.xml', text)

    def start(self, *words):
        self.client = Program('python', path_there(TOP + '/tests/windows/boinc_client.py'), MEMORY,
                              path_there(TOP + '/vmboinc.py'), folder=self.slot, stdin=subprocess.PIPE)
        self.process = self.client.process
        return self

    def says(self, word):
        self.process.stdin.write(word.encode() + b'\n')
        self.process.stdin.flush()

    def look(self):
        self.told = self.client.said().splitlines()

    def end_host(self):
        python(path_there(TOP + '/vmboinc.py'), '--host-agent', path_there(self.project + '/vmhost/host.ini'),
               'call', 'stopHost')


@pytest.fixture
def task(windows, tmp_path):
    task = Task(tmp_path)
    os.makedirs(os.path.join(task.project, 'vmhost'), mode=0o700)
    with open(os.path.join(task.project, 'vmhost', 'host.ini'), 'w') as file:
        file.write(INI)
    task.write('vbox_job.xml', JOB)
    task.link('boinc_app', APP)
    task.link('in', 'what goes in\n')
    yield task
    task.end_host()
    task.close()


@contextlib.contextmanager
def joined(task, folder):
    """A guest agent of the project's host agent, once that is there."""
    path = os.path.join(task.project, 'vmhost', 'state', 'broker.address')
    task.wait(lambda: os.path.exists(path), 60)
    with open(path) as file:
        port = int(file.read().rpartition(':')[2])
    guest = Agent(folder, types.SimpleNamespace(broker_port=port), 'science')
    guest.start(wait=False)
    try:
        yield guest
    finally:
        guest.stop()


def test_a_task_is_suspended_goes_on_and_ends_well(task, tmp_path):
    out = task.link('out')
    task.start()
    with joined(task, tmp_path / 'guest') as guest:
        task.wait(lambda: task.status('fraction_done') == 0.25, 60)
        counted = next(os.path.join(place, 'counted') for place, _, names in os.walk(guest.files)
                       if 'counted' in names)

        def count():
            with open(counted) as file:
                return file.read()
        task.says('suspend')
        stands = []
        wait_until(lambda: stands.append(count()) or len(stands) > 5 and len(set(stands[-5:])) == 1, 30, 0.2)
        task.says('resume')
        task.wait(lambda: count() != stands[-1])
        with open(os.path.join(os.path.dirname(counted), 'finish'), 'w'):
            pass
        wait_until(lambda: 'ended with 0' in task.client.said(), 60)
        assert open(out).read() == 'what goes in\n', task.read('stderr.txt')


PRIORITIES = """
import ctypes, subprocess, sys
sys.path.insert(0, sys.argv[1])
import boincmachines, windows
kernel = windows.library('kernel32')
kernel.GetCurrentProcess.restype = kernel.OpenProcess.restype = ctypes.c_void_p
def own(priority):
    assert kernel.SetPriorityClass(ctypes.c_void_p(kernel.GetCurrentProcess()), priority)
with subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE) as vm:
    vm_process = ctypes.c_void_p(kernel.OpenProcess(0x1000, False, vm.pid))
    for priority in (0x4000, 0x40, 0x20):
        own(priority)
        boincmachines.share_priority(vm.pid)
        print('%#x' % kernel.GetPriorityClass(vm_process))
    vm.stdin.write(b'end\\r\\n')
boincmachines.share_priority(vm.pid)
print('it has ended')
"""


def test_a_vm_is_computed_no_sooner_than_its_task(tmp_path):
    program = tmp_path / 'priorities.py'
    program.write_text(PRIORITIES)
    assert python(path_there(program), path_there(TOP))[1].split('\n')[:4] == [
        '0x4000', '0x40', '0x40', 'it has ended']
