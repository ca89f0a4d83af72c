"""What a program may do to the files of its own command, and to its runner: nobody hangs, nothing is lost."""

import os
import signal
import sys

import pytest
from helpers import wait_until
from test_guest_runner import Runners, runners  # noqa: F401

from guestprocesses import is_stopped

pytestmark = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs /proc')

FILES = ('out', 'err', 'progress', 'process.json', 'result.json', 'result.json.new', 'acked', 'signal-15')
REPLACE = '''
import os, shutil, sys, time
name = os.path.join(os.path.dirname(os.environ['VM_PROGRESS_FILE']), sys.argv[1])
os.write(1, b'x')
wait_for = time.monotonic() + 5
is_made = sys.argv[1] in ('out', 'err', 'process.json')
while is_made and not os.path.exists(name) and time.monotonic() < wait_for:
    time.sleep(0.01)
if os.path.lexists(name):
    os.unlink(name)
if sys.argv[2] == 'fifo':
    os.mkfifo(name)
elif sys.argv[2] == 'folder':
    os.mkdir(name)
else:
    os.symlink('/dev/zero', name)
sys.exit(9)
'''


@pytest.mark.once
@pytest.mark.parametrize('kind', ['fifo', 'folder', 'link'])
@pytest.mark.parametrize('name', FILES)
def test_a_program_that_replaces_a_file_of_its_command_hangs_nobody(runners, name, kind):  # noqa: F811
    command = runners.begin(sys.executable, '-c', REPLACE, name, kind)
    wait_until(command.has_result, 20)
    wait_until(lambda: not command.runner_lives(), 20)
    assert (command.result()['state'], command.result()['exitCodeOrSignal']) == ('exited', 9)
    assert command.progress() == ''
    assert command.size('out') in (0, 1)
    assert command.sent_signals() in ([], [15])
    command.acknowledge(1.0)
    assert command.has('acked')
    command.sync()
    command.empty(1.0)
    assert os.listdir(command.folder) == []


@pytest.mark.parametrize('name', ['TERM', 'INT', 'HUP', 'QUIT', 'USR1'])
def test_a_program_that_signals_its_parent_has_its_result(runners, name):  # noqa: F811
    # Not before the starter, which is its parent at first, has ended.
    result = runners.run('sh', '-c', 'cd "${VM_PROGRESS_FILE%%/*}"; '
                         'while grep -q \'"pid": 0\' process.json; do :; done; '
                         'kill -%s $(cut -d" " -f4 /proc/$$/stat); sleep 0.2; echo after; exit 5' % name)
    assert (result['state'], result['exitCodeOrSignal'], result['out']) == ('exited', 5, b'after\n')


def ended(command):
    """The result of one whose runner is continued, as an agent does."""
    wait_until(lambda: command.continue_runner() or command.has_result(), 20)
    return command.result()


def test_a_program_that_stops_its_starter_has_begun(runners):  # noqa: F811
    for _ in range(5):
        result = ended(runners.begin('sh', '-c', 'kill -STOP $PPID; exit 3'))
        assert (result['state'], result['exitCodeOrSignal']) == ('exited', 3)


def test_a_runner_is_known_before_its_program_begins(runners):  # noqa: F811
    command = runners.begin('sh', '-c', 'sleep 60')
    wait_until(lambda: command.process(), 10)
    process = command.read('process.json')
    os.kill(process['runner'], signal.SIGSTOP)
    wait_until(lambda: is_stopped(process['runner']), 10)
    command.continue_runner()
    assert command.send_signal(signal.SIGKILL)
    assert runners.end(command)['state'] == 'signaled'


def test_a_program_that_is_traced_by_its_parent_has_its_timeout(runners):  # noqa: F811
    traced = 'import ctypes, os; ctypes.CDLL(None).ptrace(0, 0, 0, 0); os.kill(os.getpid(), 10)'
    result = runners.run(sys.executable, '-c', traced, timeout=1)
    assert (result['state'], result['by']) == ('timeout', 'timeout')


def test_a_result_that_can_not_be_written_is_told(runners, monkeypatch):  # noqa: F811
    """Of a file system that turned read-only: here, of a folder that can't be made either."""
    command = runners.begin('sh', '-c', 'read line < go; cd "${VM_PROGRESS_FILE%/*}"; rm -rf "$PWD"; '
                            ': > "$PWD"; exit 4', stdin='')
    os.mkfifo(os.path.join(runners.served, 'go'))
    wait_until(lambda: command.process(), 10)
    with open(os.path.join(runners.served, 'go'), 'w') as file:
        file.write('\n')
    told = []
    wait_until(lambda: told.extend(line for line in runners.forks.reported() if '"state"' in line) or told,
               20)
    command.remember(told[0].partition(' ')[2])
    assert command.has_result()
    assert command.result()['state'] in ('exited', 'failed')
    assert command.result()['exitCodeOrSignal'] == 4
