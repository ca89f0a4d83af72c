"""What a guest decides over its commands: their queue, their states, their cancelling; without a host."""

import collections
import errno
import os
import re
import shutil
import signal
import sys
import threading
import time

import pytest
from agents import TOP
from helpers import wait_until

import agent
import guestagent
import guestcommands
import guestconsole
import guestforks
import guestidentity
import guestreports
import guestspool
from protocol import Message

pytestmark = pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='needs /proc')


class Guest:
    """Commands of a guest whose words are kept in ``said``; its main thread looks after them."""

    def __init__(self, folder, **vm):
        self.state = os.path.join(str(folder), 'state')
        self.served = os.path.join(str(folder), 'served')
        os.makedirs(self.served, exist_ok=True)
        self.settings = agent.read_settings(None, guestagent.SETTINGS).VM
        vars(self.settings).update(vm)
        self.said = collections.defaultdict(list)
        self.restarts = []
        self.forks = guestforks.ForkServer()
        self.stopping = threading.Event()
        self.begin()

    def begin_anew(self):
        """As the next agent does."""
        self.stopping.set()
        self.thread.join()
        self.stopping.clear()
        self.spool.close()
        self.begin()

    def begin(self):
        self.spool = guestspool.Spool(self.state, 'g', 'boot')
        self.reports = guestreports.Reports(self.say, 65536, self.spool.chirp_path)
        self.consoles = guestconsole.Consoles(self.reports, lambda moment: None)
        self.commands = guestcommands.Commands(
            self.settings, self.served, 'boot', self.spool, self.forks, self.reports, self.consoles,
            lambda moment: None, self.restarts.append)
        self.commands.load()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()

    def say(self, message):
        self.said[message.text('cmd-id')].append(message)

    def look(self):
        while not self.stopping.wait(0.01):
            self.consoles.look(time.monotonic())
            self.commands.look(time.monotonic(), self.forks.reported())

    def stop(self):
        for cmd_id in self.commands.states():       # a test that failed leaves some
            self.signal(cmd_id, 'KILL')
        wait_until(lambda: not self.commands.count_unended(), 20)
        self.stopping.set()
        self.thread.join()
        self.consoles.close()
        self.forks.stop()
        self.spool.close()

    def run(self, cmd_id, cmd, *args, **options):
        self.commands.run(Message('', 'CMD_RUN', {'cmd-id': cmd_id}, dict(options, cmd=cmd, args=list(args))))

    def signal(self, cmd_id, name, **keys):
        self.commands.signal(Message('', 'CMD_SIGNAL', {'cmd-id': cmd_id, 'signal': name}, keys))

    def acknowledge(self, cmd_id, **keys):
        self.commands.acknowledge(Message('', 'CMD_ACK', {'cmd-id': cmd_id}, keys))

    def state_of(self, cmd_id):
        """As it was told last."""
        said = self.said[cmd_id]
        return said[-1].text('state') if said else ''

    def result(self, cmd_id, timeout=30):
        def results():
            return [message for message in self.said[cmd_id] if message.word == 'CMD_RESULTS']
        return wait_until(results, timeout)[-1].keys


@pytest.fixture
def guests(tmp_path):
    made = []

    def make(**vm):
        made.append(Guest(tmp_path, **vm))
        return made[-1]
    yield make
    for guest in made:
        guest.stop()


LOG = 'echo "+" >> log; sleep 0.01; echo "-" >> log'


def test_max_commands_is_never_exceeded(guests):
    """Words come on one thread, ends on the other: both look for the next one to begin."""
    guest = guests(max_commands=1)
    for n in range(100):
        guest.run('c%d' % n, 'sh', '-c', LOG)
    for n in range(100):
        assert guest.result('c%d' % n)['state'] == 'exited'
    with open(os.path.join(guest.served, 'log')) as file:
        assert file.read() == '+\n-\n' * 100


@pytest.mark.once
def test_a_kill_as_the_turn_comes_is_told_truly(guests):
    """Either it never ran, or the signal ended it; and its result is one of the two."""
    guest = guests(max_commands=1)
    cancelled = 0
    for n in range(100):
        guest.run('first%d' % n, 'true')
        guest.run('c%d' % n, 'sh', '-c', 'echo ran > ran%d; sleep 30' % n)
        if n % 4:                       # else the signal comes before the turn, or as it comes
            guest.result('first%d' % n)
        guest.signal('c%d' % n, 'KILL')
        result = guest.result('c%d' % n)
        ran = os.path.exists(os.path.join(guest.served, 'ran%d' % n))
        assert (result['state'], result['exitCodeOrSignal']) in (('cancelled', -1), ('signaled', 9)), result
        assert result['by'] == 'signalCmd' and not (ran and result['state'] == 'cancelled'), result
        cancelled += result['state'] == 'cancelled'
    assert cancelled                    # else this tests nothing


def test_a_look_at_what_is_just_being_cancelled_doesnt_take_it_for_lost(guests, monkeypatch):
    """The main thread looks at a command that is taken back, and has no result yet."""
    guest = guests(max_commands=1)
    guest.run('first', 'sleep', '60')
    guest.run('waits', 'touch', 'ran')
    real, looked = guestspool.Command.end, []

    def end(command, state, *words, **more):
        if state == 'cancelled' and not looked:
            looked.append(state)
            guest.commands.look(time.monotonic() + 2, [])
        real(command, state, *words, **more)
    monkeypatch.setattr(guestspool.Command, 'end', end)
    guest.signal('waits', 'KILL')
    assert looked and guest.result('waits')['state'] == 'cancelled'
    guest.signal('first', 'KILL')
    guest.result('first')
    told = [message.text('state') for message in guest.said['waits'] if message.word == 'CMD_RESULTS']
    assert set(told) == {'cancelled'} and not os.path.exists(guest.served + '/ran')


def test_what_is_cancelled_before_it_came_is_never_begun(guests, monkeypatch):
    """The main thread looks for the next one to begin, while the cancelled one is noted."""
    guest = guests()
    real = guest.commands._table.add

    def add(command):
        real(command)
        guest.commands._begin_waiting()
    monkeypatch.setattr(guest.commands._table, 'add', add)
    guest.signal('c', 'KILL', cancel=True)
    assert guest.result('c')['state'] == 'cancelled'


def test_an_agent_that_ended_while_it_noted_a_cancelled_command_leaves_nothing_to_run(guests, monkeypatch):
    guest = guests()

    def die(*words, **more):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(guestspool.Command, 'end', die)
        with pytest.raises(KeyboardInterrupt):
            guest.signal('c', 'KILL', cancel=True)
    guest.begin_anew()
    assert guest.commands.states() == {} and not guest.spool.command('c').has('request.json')


def test_a_runner_that_the_agent_before_had_asked_may_take_a_command_late(guests):
    guest = guests(max_commands=1)
    guest.run('first', 'sleep', '60')
    wait_until(guest.spool.command('first').process, 20)
    guest.run('late', 'echo', 'hello')
    guest.forks.run(guest.spool.command('late').folder)
    wait_until(lambda: guest.spool.command('late').has('result.json'), 20)
    guest.run('late', 'echo', 'hello')      # the host asks again
    assert guest.result('late')['out'] == 'hello\n' and guest.commands.states()['late'] == 'exited'
    guest.signal('first', 'KILL')
    guest.result('first')


def test_a_kill_that_an_agent_noted_and_never_sent_is_sent_by_the_next_one(guests):
    guest = guests()
    guest.run('c', 'sleep', '60')
    wait_until(guest.spool.command('c').process, 20)
    guest.spool.command('c').note_signal(9)
    guest.begin_anew()
    result = guest.result('c')
    assert (result['state'], result['exitCodeOrSignal'], result['by']) == ('signaled', 9, 'signalCmd')


@pytest.mark.parametrize('name, number', [('TERM', 15), ('USR1', 10)])
def test_a_signal_that_waits_for_the_processes_outlives_its_agent(guests, monkeypatch, name, number):
    """The host was told that it is taken; the agent ends before it sees the processes."""
    guest = guests()
    guest.run('c', 'sleep', '60')
    wait_until(guest.spool.command('c').process, 20)
    with monkeypatch.context() as patched:
        patched.setattr(guestspool.Command, 'process', lambda self: 0)
        guest.signal('c', name)
        guest.stopping.set()            # nobody looks any more
        guest.thread.join()
    guest.begin_anew()
    result = guest.result('c')
    assert (result['state'], result['exitCodeOrSignal'], result['by']) == ('signaled', number, 'signalCmd')


@pytest.mark.parametrize('names', ['STOP CONT', 'CONT STOP', 'CONT STOP CONT STOP',
                                   'STOP WINCH CONT STOP CONT'])
def test_signals_that_wait_keep_their_order_over_a_restart(guests, monkeypatch, names):
    """Else a command that was let go on stands still for ever."""
    guest = guests(max_commands=1)
    guest.run('first', 'sleep', '60')
    guest.run('c', 'sleep', '60')
    command = guest.spool.command('c')
    for name in names.split():
        guest.signal('c', name)
    guest.begin_anew()
    guest.commands.query(Message('', 'CMD_QUERY', {'cmd-id': 'c'}, {}))    # as it is wanted
    real, sent = guestspool.Command.send_signal, []

    def send_signal(self, number):
        is_sent = real(self, number)
        if is_sent and self.cmd_id == 'c':
            sent.append(signal.Signals(number).name[3:])
        return is_sent
    monkeypatch.setattr(guestspool.Command, 'send_signal', send_signal)
    guest.signal('first', 'KILL')
    wait_until(lambda: len(sent) == len(names.split()), 20)
    assert ' '.join(sent) == names
    wait_until(lambda: not command.due_signals(), 20)
    guest.signal('c', 'KILL')
    assert guest.result('c')['state'] == 'signaled'


@pytest.mark.parametrize('name', ['TERM', 'KILL', 'STOP'])
def test_processes_that_refuse_a_signal_are_told_of(guests, monkeypatch, name):
    """As of a setuid program, where the agent isn't root. It isn't tried again, and holds up no other."""
    guest = guests()
    guest.run('c', 'sleep', '60')
    command = guest.spool.command('c')
    wait_until(lambda: command.process() and command.members() == [command.process()], 20)
    real, tried = os.kill, []

    def kill(pid, number):
        tried.append((pid, number))
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def refused():
        guest.said.clear()
        guest.commands.query(Message('', 'CMD_QUERY', {'cmd-id': 'c'}, {'mark': 'm'}))
        return guest.said['c'][-1].get('refused')
    monkeypatch.setattr(guestspool.Command, 'kill_group', lambda self: False)
    monkeypatch.setattr(os, 'kill', kill)
    guest.signal('c', name)
    count = len(tried)
    assert tried and refused() == 1 and refused() is None
    guest.signal('c', 'USR1')
    assert tried[count:] == [(command.process(), signal.SIGUSR1)]
    monkeypatch.setattr(os, 'kill', real)
    guest.signal('c', 'CONT')
    assert refused() is None
    monkeypatch.undo()
    guest.signal('c', 'KILL')
    assert guest.result('c')['state'] == 'signaled'


def test_signals_that_an_older_agent_noted_are_sent(guests):
    guest = guests()
    guest.run('c', 'sleep', '60')
    command = guest.spool.command('c')
    wait_until(command.process, 20)
    open(command.path('due-15'), 'w').close()
    assert command.due_signals() == [15]
    guest.begin_anew()
    assert guest.result('c')['exitCodeOrSignal'] == 15


def test_a_signal_never_reaches_the_next_command_of_a_runner(guests, monkeypatch):
    """The runner ends one command and begins another, while the processes of the first are looked up."""
    guest = guests()
    guest.run('first', 'true')
    guest.result('first')
    guest.run('second', 'sleep', '60')
    first, second = (guest.spool.find(cmd_id) for cmd_id in ('first', 'second'))
    wait_until(second.process, 20)
    assert first.read('process.json')['runner'] == second.read('process.json')['runner']
    real, order = guestspool.descendants, []

    def descendants(pid):
        order.append('listed')
        return real(pid)

    def runner_lives(command):
        order.append('asked')
        return len(order) < 2           # it lived when it was asked first
    monkeypatch.setattr(guestspool, 'descendants', descendants)
    monkeypatch.setattr(guestspool.Command, 'runner_lives', runner_lives)
    assert first.members() == []
    monkeypatch.undo()
    guest.signal('second', 'KILL')
    guest.result('second')


@pytest.mark.parametrize('name', ['CONT', 'WINCH', 'USR1', 'STOP'])
def test_what_would_not_end_a_program_doesnt_cancel_it(guests, name):
    guest = guests(max_commands=1)
    guest.run('first', 'sleep', '0.5')
    guest.run('c', 'sh', '-c', 'trap "echo caught; exit 7" USR1; while :; do sleep 0.01; done')
    assert guest.state_of('c') == 'queued'
    guest.signal('c', name)
    wait_until(guest.spool.command('c').process, 20)
    if name == 'STOP':
        wait_until(lambda: guest.commands.states()['c'] == 'stopped', 20)
    guest.signal('c', 'KILL')
    assert guest.result('c')['state'] in ('signaled', 'exited')


@pytest.mark.parametrize('name, number', [('TERM', 15), ('KILL', 9)])
def test_a_signal_waits_until_the_processes_are_seen(guests, monkeypatch, name, number):
    real, looks = guestspool.Command.members, []

    def members(self):
        looks.append(self)
        return real(self) if len(looks) > 1 else []
    guest = guests()
    guest.run('c', 'sleep', '60')
    wait_until(guest.spool.command('c').process, 20)
    monkeypatch.setattr(guestspool.Command, 'kill_group', lambda self: False)
    monkeypatch.setattr(guestspool.Command, 'members', members)
    guest.signal('c', name)
    result = guest.result('c')
    assert (result['state'], result['exitCodeOrSignal'], result['by']) == ('signaled', number, 'signalCmd')


def test_signals_come_in_their_order_whoever_sends_them(guests, monkeypatch):
    """A STOP that is still being sent, by the look that found the processes, when the CONT comes: what came
    last is what is left."""
    guest = guests()
    guest.run('c', 'sleep', '60')
    wait_until(guest.spool.command('c').process, 20)
    real, order = guestspool.Command.send_signal, []
    is_sent, goes_on = threading.Event(), threading.Event()

    def send_signal(self, number):
        if number == signal.SIGSTOP:
            is_sent.set()
            goes_on.wait(30)
        order.append(number)
        return real(self, number)
    monkeypatch.setattr(guestspool.Command, 'send_signal', send_signal)
    senders = [threading.Thread(target=guest.signal, args=('c', name)) for name in ('STOP', 'CONT')]
    senders[0].start()
    assert is_sent.wait(30)
    senders[1].start()
    senders[1].join(0.5)                # it would be through by then, if it didn't wait
    goes_on.set()
    for sender in senders:
        sender.join()
    wait_until(lambda: len(order) > 1, 20)
    assert order == [signal.SIGSTOP, signal.SIGCONT]
    monkeypatch.undo()
    guest.signal('c', 'KILL')
    assert guest.result('c')['state'] == 'signaled'


def test_a_signal_for_processes_that_are_not_seen_yet_holds_up_the_next_one(guests, monkeypatch):
    guest = guests()
    guest.run('c', 'sleep', '60')
    command = guest.spool.command('c')
    wait_until(command.process, 20)
    real, sent, is_seen = guestspool.Command.send_signal, [], threading.Event()

    def send_signal(self, number):
        if number == signal.SIGSTOP and not is_seen.is_set():
            return False
        sent.append(number)
        return real(self, number)
    monkeypatch.setattr(guestspool.Command, 'send_signal', send_signal)
    guest.signal('c', 'STOP')
    guest.signal('c', 'CONT')
    assert sent == []
    is_seen.set()
    wait_until(lambda: len(sent) > 1, 20)
    assert sent == [signal.SIGSTOP, signal.SIGCONT]
    monkeypatch.undo()
    guest.signal('c', 'KILL')
    assert guest.result('c')['state'] == 'signaled'


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='no /proc')
def test_a_runner_that_was_stopped_goes_on(guests):
    """Its program can do that, and would have no timeout any more, and no end that is told."""
    guest = guests()
    guest.run('c', 'sleep', '60', timeout=1)
    command = guest.spool.command('c')
    wait_until(command.process, 20)
    os.kill(command.read('process.json')['runner'], signal.SIGSTOP)
    assert guest.result('c')['state'] == 'timeout'


HOLDS_ITS_RUNNER = '''
import ctypes, json, os, sys, time
path = os.path.join(os.path.dirname(os.environ['VM_PROGRESS_FILE']), 'process.json')
while not os.path.exists(path):         # its runner may be slower
    time.sleep(0.01)
with open(path) as file:
    runner = json.load(file)['runner']
if ctypes.CDLL(None).ptrace(16, runner, 0, 0) != 0:     # PTRACE_ATTACH
    sys.exit(77)
time.sleep(60)
'''


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='ptrace of Linux')
@pytest.mark.parametrize('words', [[sys.executable, '-c', HOLDS_ITS_RUNNER],
                                   ['sh', '-c', '"$@" & wait', 'sh', sys.executable, '-c', HOLDS_ITS_RUNNER]])
def test_a_program_that_traces_its_runner_has_its_timeout(guests, words):
    """Its runner stands still for it, and can't end it."""
    guest = guests()
    guest.run('c', *words, timeout=0.5, **{'kill-after': 0.5})
    result = guest.result('c')
    if result['exitCodeOrSignal'] == 77:
        pytest.skip('this system lets no process trace its parent')
    assert (result['state'], result['by'], result.get('left', 0)) == ('timeout', 'timeout', 0)


def test_a_command_that_was_cancelled_before_it_came_never_runs(guests):
    guest = guests()
    guest.signal('c', 'KILL', cancel=True)
    assert guest.result('c')['state'] == 'cancelled'
    guest.run('c', 'touch', 'ran')
    guest.acknowledge('c')
    guest.run('c', 'touch', 'ran')
    assert guest.said['c'][-1].text('state') == 'cancelled' and not os.path.exists(guest.served + '/ran')
    guest.signal('other', 'KILL')       # of what the host knows to have run
    assert not guest.said['other']


def test_what_is_too_late_when_its_turn_comes_doesnt_begin(guests):
    guest = guests(max_commands=1)
    guest.run('c', 'touch', 'ran', expires=1e-9)
    assert guest.result('c')['state'] == 'expired'
    assert not os.path.exists(os.path.join(guest.served, 'ran'))


def test_a_command_expires_where_it_waits(guests):
    guest = guests(max_commands=1)
    guest.run('first', 'sleep', '2.5')
    guest.run('c', 'touch', 'ran', expires=0.2)
    guest.run('later', 'true', expires=100)
    result = guest.result('c')
    assert (result['state'], result['exitCodeOrSignal']) == ('expired', -1)
    assert guest.result('first')['state'] == guest.result('later')['state'] == 'exited'
    assert not os.path.exists(guest.served + '/ran')


@pytest.mark.once
def test_each_queued_command_costs_the_same(guests):
    guest = guests(max_commands=1)
    guest.run('first', 'sleep', '60')
    times = []
    for batch in range(3):
        begin = time.thread_time() if hasattr(time, 'thread_time') else time.process_time()
        for n in range(250):
            guest.run('c%d' % (250 * batch + n), 'true')
        times.append((time.thread_time() if hasattr(time, 'thread_time') else time.process_time()) - begin)
    assert times[2] < 2 * max(times[:2]) + 0.3, times
    guest.signal('first', 'KILL')
    assert guest.result('c749', 300)['state'] == 'exited'


def test_a_fork_server_that_was_stopped_goes_on(guests):
    """Else the guest is there, and begins nothing any more, without a word."""
    guest = guests()
    guest.run('first', 'sleep', '60')   # has the runner that was free
    os.kill(guest.forks.pid, signal.SIGSTOP)
    guest.run('c', 'true')
    assert guest.result('c')['state'] == 'exited'
    assert not guest.restarts
    guest.signal('first', 'KILL')


def test_want_of_descriptors_is_no_death_of_the_fork_server(guests, monkeypatch):
    guest = guests()
    guest.run('first', 'sleep', '60')           # takes the runner that is free
    real, failing = guest.forks._new_runner, [True]

    def scarce():
        if failing:
            raise OSError(24, 'Too many open files')
        return real()
    monkeypatch.setattr(guest.forks, '_new_runner', scarce)
    guest.run('c', 'echo', 'hello')
    assert not guest.said['c'] or guest.state_of('c') == 'queued'
    failing.clear()
    assert guest.result('c')['out'] == 'hello\n' and not guest.restarts
    guest.signal('first', 'KILL')
    guest.result('first')


@pytest.mark.parametrize('is_acknowledged', [True, False])
def test_what_the_host_has_forgotten_takes_no_room_and_never_runs_again(guests, is_acknowledged):
    guest = guests()
    folder = guest.spool.command('a').folder
    guest.run('a', 'sh', '-c', 'echo ran >> log; until [ -e go ]; do sleep 0.01; done')
    wait_until(lambda: guest.state_of('a') == 'running')
    guest.acknowledge('a', forget=True)        # of one that runs: somebody is mistaken
    assert os.path.exists(os.path.join(folder, 'request.json')) and guest.commands.count_unended() == 1
    open(os.path.join(guest.served, 'go'), 'w').close()
    assert guest.result('a')['state'] == 'exited'
    if is_acknowledged:
        guest.acknowledge('a')
        assert os.listdir(folder)
    guest.acknowledge('a', forget=True)
    assert os.listdir(folder) == [] and guest.commands.states() == {}
    guest.acknowledge('a', forget=True)        # the word came twice
    guest.run('a', 'sh', '-c', 'echo ran >> log')
    assert guest.result('a')['state'] == 'lost'
    with open(os.path.join(guest.served, 'log')) as file:
        assert file.read() == 'ran\n'
    guest.acknowledge('no-such', forget=True)


def test_what_there_is_no_room_for_says_where(guests, monkeypatch):
    def fail(self, request, now):
        raise OSError(28, 'No space left on device')
    guest = guests()
    monkeypatch.setattr(guestspool.Command, 'write_request', fail)
    guest.run('c', 'true')
    result = guest.result('c')
    assert (result['state'], result['error']) == (
        'failed', 'ENOSPC: No space left on device: ' + guest.spool.folder)


@pytest.mark.parametrize('is_grouped', [True, False])
def test_no_more_is_said_of_a_dead_runners_processes_than_is_known(guests, monkeypatch, is_grouped):
    """Without a control group, one that cleared its environment and made a session isn't found."""
    guest = guests()
    guest.run('c', 'sleep', '60')
    command = guest.spool.command('c')
    wait_until(command.process, 20)
    if is_grouped and command.group() is None:
        pytest.skip('no control groups here')
    if not is_grouped:
        monkeypatch.setattr(guestspool.Command, 'group', lambda self: None)
    os.kill(command.read('process.json')['runner'], signal.SIGKILL)
    assert guest.result('c')['error'] == 'its runner was killed; ' + (
        'its processes were, too' if is_grouped else 'and so were its processes, as far as they were found')


def test_what_goes_wrong_at_each_look_is_logged_once_a_minute(guests, monkeypatch, caplog):
    guest = guests()
    monkeypatch.setattr(guestcommands, 'POLL', 0.01)
    looks = []

    def fail(self, now):
        looks.append(now)
        raise OSError(28, 'No space left on device')
    for cmd_id in 'a', 'b':
        guest.run(cmd_id, 'sleep', '60')
        wait_until(lambda cmd_id=cmd_id: guest.state_of(cmd_id) == 'running')
    with monkeypatch.context() as patched:
        patched.setattr(guestcommands.Commands, '_look_at', lambda self, command, now: fail(command, now))
        wait_until(lambda: len(looks) > 20, 20)
    assert caplog.text.count('ENOSPC') == 1


def test_a_result_that_is_sent_again_is_logged_once(guests, monkeypatch, caplog):
    guest = guests()
    caplog.set_level('INFO', 'vmguest')
    monkeypatch.setattr(guestcommands, 'RESEND_EVERY', 0.01)
    monkeypatch.setattr(guestcommands, 'POLL', 0.01)
    guest.run('a', 'true')
    wait_until(lambda: sum(message.word == 'CMD_RESULTS' for message in guest.said['a']) > 3, 20)
    assert caplog.text.count('a: exited') == 1


def scarce_for(monkeypatch, wanted):
    """No descriptor for what ``wanted(path)`` says, as long as the list that is returned isn't empty."""
    real, failing = guestspool.private, [True]

    def private(path, flags):
        if failing and wanted(path):
            raise OSError(24, 'Too many open files', path)
        return real(path, flags)
    monkeypatch.setattr(guestspool, 'private', private)
    return failing


def test_want_of_descriptors_is_no_damage_of_a_result(guests, monkeypatch):
    guest = guests()
    tried = []
    failing = scarce_for(monkeypatch, lambda path: path.endswith('/result.json') and not tried.append(path))
    guest.run('c', 'sh', '-c', 'exit 3')
    wait_until(lambda: len(tried) > 1, 20)
    assert 'c' not in [name for name, state in guest.commands.states().items() if state == 'lost']
    failing.clear()
    result = guest.result('c')
    assert (result['state'], result['exitCodeOrSignal']) == ('exited', 3)
    assert not [name for name in os.listdir(guest.commands._find('c').folder) if 'corrupt' in name]


def test_want_of_descriptors_is_no_damage_of_what_an_earlier_agent_left(guests, monkeypatch):
    guest = guests()
    guest.run('c', 'sh', '-c', 'exit 3')
    guest.result('c')
    failing = scarce_for(monkeypatch, lambda path: path.endswith('/request.json'))
    with pytest.raises(agent.AgentError, match='Too many open files'):
        guest.spool.load()
    failing.clear()
    guest.begin_anew()
    assert guest.commands.states() == {'c': 'exited'}


def test_what_there_are_no_descriptors_for_is_taken_when_it_comes_again(guests, monkeypatch):
    guest = guests()
    failing = scarce_for(monkeypatch, lambda path: path.endswith('/request.json'))
    monkeypatch.setattr(os, 'listdir', lambda path: pytest.fail('which needs a descriptor'))
    guest.run('c', 'echo', 'hello')
    assert not guest.said['c']
    monkeypatch.undo()
    failing.clear()
    guest.run('c', 'echo', 'hello')
    assert guest.result('c')['out'] == 'hello\n'


@pytest.mark.parametrize('again', [
    {'args': ['-c', 'exit 4']}, {'cmd': 'dash'}, {'env': {'A': 'b'}}, {'stdin': 'x'}, {'timeout': 5}])
def test_an_id_that_another_command_had_gets_nothing_of_that(guests, again):
    guest = guests()
    asked = dict({'cmd': 'sh', 'args': ['-c', 'exit 3']})
    for keys in (asked, asked, dict(asked, **again), asked):
        guest.commands.run(Message('', 'CMD_RUN', {'cmd-id': 'c'}, keys))
        state = guest.result('c')['state']
        guest.acknowledge('c')
        if keys in (asked,):
            assert (state, guest.result('c')['exitCodeOrSignal']) == ('exited', 3)
        else:
            assert state == 'failed' and guest.result('c')['error'].startswith('EEXIST: '), state


ALWAYS = ('out err finished exitCodeOrSignal resources state by error wall started ended out-size err-size '
          'out-offset err-offset out-truncated err-truncated spool').split()


def test_results_have_all_their_keys_whatever_the_end(guests):
    """Who reads them needn't know which ends have no output."""
    guest = guests()
    guest.run('exited', 'true')
    guest.run('failed', 'no-such-program')
    guest.run('refused', 'sleep', '1', timeout='soon')
    guest.signal('cancelled', 'TERM', cancel=True)
    guest.run('timeout', 'sleep', '9', timeout=0.1)
    for ended, error in (('exited', ''), ('failed', 'ENOENT'), ('refused', 'EINVAL'),
                         ('cancelled', 'ECANCELED'), ('timeout', 'ETIME')):
        result = guest.result(ended)
        assert not set(ALWAYS) - set(result) and result['error'].partition(':')[0] == error, ended
    guest.said.clear()
    guest.run('exited', 'false')               # another command: EEXIST
    assert not set(ALWAYS) - set(guest.result('exited'))
    guest.acknowledge('failed', forget=True)
    guest.said.clear()
    guest.run('failed', 'no-such-program')     # emptied: lost
    assert guest.result('failed')['state'] == 'lost' and not set(ALWAYS) - set(guest.result('failed'))


def test_the_same_input_is_the_same_command(guests):
    guest = guests()
    for stdin, state in (('same', 'exited'), ('same', 'exited'), ('other', 'failed'), ('same+', 'failed')):
        guest.run('c', 'cat', stdin=stdin)
        result = guest.result('c')
        assert (result['state'], result['out']) == (state, 'same' if state == 'exited' else '')


def test_the_place_of_what_was_deleted_while_it_waited_is_free_for_others(guests):
    guest = guests(max_commands=1)
    guest.run('first', 'sh', '-c', 'while [ ! -e go ]; do sleep 0.02; done')
    for cmd_id in ('second', 'third'):
        guest.run(cmd_id, 'touch', cmd_id)
        shutil.rmtree(guest.commands._find(cmd_id).folder)
    guest.run('last', 'true')
    for cmd_id in ('second', 'third'):
        result = guest.result(cmd_id)
        assert result['state'] == 'lost' and 'was deleted before' in result['error'], result
        guest.acknowledge(cmd_id)
    assert set(guest.commands.states()) == {'first', 'last'}
    open(os.path.join(guest.served, 'go'), 'w').close()
    assert guest.result('last')['state'] == 'exited'


def test_what_is_deleted_as_its_turn_comes_frees_its_place(guests, monkeypatch):
    monkeypatch.setattr(guestcommands, 'START_PATIENCE', 0.1)
    guest = guests(max_commands=1)
    order = guest.forks.run

    def run(folder):
        shutil.rmtree(folder, ignore_errors=True)       # it may be asked for a second time
        return order(folder)
    monkeypatch.setattr(guest.forks, 'run', run)
    guest.run('c', 'true')
    assert 'was deleted before' in guest.result('c')['error']
    monkeypatch.undo()
    guest.run('last', 'true')
    assert guest.result('last')['state'] == 'exited'


def test_progress_that_is_written_anew_stays_as_it_was(tmp_path):
    """A shell empties the file before it writes."""
    command = guestspool.Command('c', str(tmp_path))
    told = []
    for text in ('', '0.5\n', '', '0.6'):
        (tmp_path / 'progress').write_text(text)
        told.append(command.progress())
    assert told == ['', '0.5', '0.5', '0.6']


def test_a_signal_that_waits_comes_at_the_begin(guests):
    guest = guests(max_commands=1)
    guest.run('first', 'sleep', '60')
    guest.run('c', 'sh', '-c', 'trap "exit 5" USR1; sleep 0.4; exit 0')
    guest.signal('c', 'USR1')
    guest.signal('first', 'KILL')
    result = guest.result('c')
    assert (result['state'], result['exitCodeOrSignal']) in (('exited', 5), ('signaled', 10)), result


def test_an_earlier_agents_queue_waits_for_its_host(guests, monkeypatch):
    """The spool may be a restored one: what waits there may have run since, and then its host says so."""
    monkeypatch.setattr(guestcommands, 'HOLD', 0.1)
    guest = guests(max_commands=1)
    guest.run('first', 'sleep', '60')
    for cmd_id in 'bcd':
        guest.run(cmd_id, 'sh', '-c', 'echo %s >> log' % cmd_id)
    wait_until(lambda: guest.commands.states()['first'] == 'running', 20)
    guest.begin_anew()
    guest.signal('first', 'KILL')
    assert guest.result('first')['state'] == 'signaled'
    guest.signal('b', 'KILL', cancel=True)             # as it is over there
    assert guest.result('b')['state'] == 'cancelled'
    guest.commands.query(Message('', 'CMD_QUERY', {'cmd-id': 'c'}, {}))    # as it is wanted
    assert guest.result('c')['state'] == 'exited'
    assert guest.commands.states()['d'] == 'queued'
    guest.commands.joined(True)                        # nothing is said of it
    assert guest.result('d')['state'] == 'exited'
    with open(os.path.join(guest.served, 'log')) as file:
        assert file.read() == 'c\nd\n'


@pytest.mark.parametrize('is_listed', [True, False])
def test_a_host_that_was_told_of_no_commands_is_told_what_waits(guests, is_listed):
    guest = guests(max_commands=1)
    guest.run('first', 'sleep', '60')
    guest.run('last', 'true')
    wait_until(lambda: guest.commands.states()['first'] == 'running', 20)
    guest.begin_anew()
    guest.said.clear()
    guest.commands.joined(is_listed)
    assert [message.text('state') for message in guest.said['last']] == ([] if is_listed else ['queued'])


def test_what_was_stopped_within_vfork_is_told_as_stopped(guests):
    """A parent in vfork can't be stopped itself: it waits for its child, which was."""
    guest = guests()
    guest.run('c', sys.executable, '-c', 'import ctypes, os, signal; libc = ctypes.CDLL(None); '
              'None if libc.vfork() else os.kill(os.getpid(), signal.SIGSTOP)')
    wait_until(lambda: guest.commands.states()['c'] == 'stopped', 20)
    guest.signal('c', 'KILL')
    assert guest.result('c')['exitCodeOrSignal'] == 9


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='no /proc')
def test_the_time_for_which_it_is_stopped_within_vfork_is_not_its_own(guests):
    """A shell, say, that is stopped just as it begins a program: nothing tells its runner of that."""
    guest = guests()
    guest.run('c', sys.executable, '-c', 'import ctypes, os, signal; libc = ctypes.CDLL(None); '
              'None if libc.vfork() else os.kill(os.getpid(), signal.SIGSTOP)',
              timeout=2, **{'kill-after': 0})
    wait_until(lambda: guest.commands.states()['c'] == 'stopped', 20)
    guest.signal('c', 'STOP')
    time.sleep(2.5)                     # longer than its timeout
    assert not guest.spool.command('c').has_result()
    guest.signal('c', 'KILL')
    result = guest.result('c')
    assert (result['state'], result['by']) == ('signaled', 'signalCmd')


def test_what_is_put_back_while_it_is_looked_at_is_not_lost(guests, monkeypatch):
    guest = guests()
    guest.run('first', 'sleep', '60')           # takes the runner that is free
    guest.stopping.set()                        # nobody else looks
    guest.thread.join()
    monkeypatch.setattr(guest.forks, 'run', lambda folder: True)
    guest.run('c', 'echo', 'hello')
    command = guest.commands._find('c')
    assert command.state == 'starting'
    has = guestspool.Command.has

    def put_back(self, name):
        guest.commands._table.put_back(command)
        return has(self, name)
    monkeypatch.setattr(guestspool.Command, 'has', put_back)
    guest.commands._look_at(command, time.monotonic())
    assert command.state == 'queued' and not command.has_result()
    monkeypatch.undo()
    guest.thread = threading.Thread(target=guest.look)
    guest.stopping.clear()
    guest.thread.start()
    assert guest.result('c')['out'] == 'hello\n'
    guest.signal('first', 'KILL')
    guest.result('first')


@pytest.mark.parametrize('name, number', [('TERM', 15), ('KILL', 9)])
def test_the_program_itself_gets_a_signal_where_no_processes_are_seen(guests, monkeypatch, name, number):
    """As in a folder without /proc, and while it is handed from who began it to its runner."""
    guest = guests()
    guest.run('c', 'sleep', '60')
    wait_until(guest.spool.command('c').process, 20)
    monkeypatch.setattr(guestspool.Command, 'group', lambda self: None)
    monkeypatch.setattr(guestspool, 'descendants', lambda pid: [])
    guest.signal('c', name)
    result = guest.result('c')
    assert (result['state'], result['exitCodeOrSignal'], result['by']) == ('signaled', number, 'signalCmd')


@pytest.mark.parametrize('name', ['PIPE', 'SEGV'])
def test_a_signal_that_was_sent_is_not_the_programs_own(guests, name):
    guest = guests()
    guest.run('c', 'sleep', '60')
    wait_until(guest.spool.command('c').process, 20)
    guest.signal('c', name)
    assert guest.result('c')['by'] == 'signalCmd'


def test_the_loss_of_the_spool_is_noticed(guests, tmp_path):
    guest = guests()
    guest.run('first', 'true')
    guest.result('first')
    os.rename(guest.spool.folder, str(tmp_path / 'gone'))
    wait_until(lambda: any('was deleted' in why for why in guest.restarts), 20)


def test_a_program_that_deletes_its_own_spool_folder_is_told_as_ended(guests):
    guest = guests()
    guest.run('c', 'sh', '-c', 'cd "${VM_PROGRESS_FILE%/*}"; while [ ! -s process.json ]; do sleep .1; done; '
              'rm -r "$PWD"; exit 3')
    result = guest.result('c')
    assert result['state'] == 'failed' and result['error'].startswith('ENOENT: '), result
    assert not guest.restarts


@pytest.mark.parametrize('deed', ['rm -r "$PWD"', 'rm process.json', 'echo "{}" > process.json',
                                  'sed -i s/[0-9]/1/g process.json'])
def test_a_program_that_hides_who_runs_it_runs_and_gets_signals(guests, deed):
    guest = guests()
    guest.run('c', 'sh', '-c', 'begun=$PWD/begun; cd "${VM_PROGRESS_FILE%/*}"; ' + deed
              + '; touch "$begun"; exec sleep 60')
    wait_until(lambda: os.path.exists(os.path.join(guest.served, 'begun')), 20)
    wait_until(lambda: guest.commands.states()['c'] == 'running', 20)
    guest.signal('c', 'KILL')
    result = guest.result('c')
    assert (result['exitCodeOrSignal'], result['by']) == (9, 'signalCmd'), result


def test_what_can_not_be_claimed_gets_its_signal(guests, monkeypatch):
    """Whoever made its folder unreadable: that isn't cancelled, and nothing falls over."""
    guest = guests(max_commands=1)
    guest.run('first', 'sleep', '60')
    guest.run('c', 'sleep', '60')

    def claim(command):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), command.folder)
    monkeypatch.setattr(guestspool.Command, 'claim', claim)
    guest.signal('c', 'TERM')
    assert guest.commands.states()['c'] == 'queued'
    monkeypatch.undo()
    guest.signal('first', 'KILL')
    result = guest.result('c')
    assert result['exitCodeOrSignal'] in (15, -1) and result['by'] == 'signalCmd'      # -1: as its turn came


def test_a_look_at_what_is_just_put_back_into_the_queue_loses_nothing(guests, monkeypatch):
    """The link's thread puts it back while the main thread looks at it."""
    guest = guests(max_commands=1)
    guest.run('first', 'sh', '-c', 'until [ -e go ]; do sleep 0.01; done')
    guest.run('a', 'echo', 'hi')
    command = guest.commands._table.find('a')

    class PutBack(guestspool.Command):
        reads = 0

        @property
        def state(self):
            self.reads += 1
            return 'starting' if self.reads == 2 else 'queued'     # the first is the look's own

        @state.setter
        def state(self, value):
            self.reads = -10 ** 6
    seen = PutBack('a', command.folder)
    seen.request, seen.begun, seen.reads = command.request, time.monotonic(), 1
    guest.commands._look_at(seen, time.monotonic())
    assert seen.reads >= 2 and not command.has_result()
    open(os.path.join(guest.served, 'go'), 'w').close()
    assert guest.result('a')['out'] == 'hi\n'


def test_one_whose_runner_is_killed_after_that_is_told_as_lost(guests):
    guest = guests()
    guest.run('c', 'sh', '-c', 'while [ ! -e go ]; do sleep 0.02; done; '
              'rm -r "${VM_PROGRESS_FILE%/*}"; touch gone; sleep 60')
    command = guest.commands._find('c')
    wait_until(lambda: command.state == 'running')
    runner = command.read('process.json')['runner']
    open(os.path.join(guest.served, 'go'), 'w').close()
    wait_until(lambda: os.path.exists(os.path.join(guest.served, 'gone')))
    os.kill(runner, signal.SIGKILL)
    result = guest.result('c')
    assert result['state'] == 'lost' and 'its spool folder was deleted' in result['error'], result


def test_a_word_that_can_not_be_followed_fails_with_a_sentence(guests):
    guest = guests()
    for number, options in enumerate(({'limits': {'as': -1}}, {'limits': {'stack': 5}}, {'timeout': -1},
                                      {'args64': ['%']}, {'env': {'A=B': 'c'}})):
        guest.run('c%d' % number, 'true', **options)
        result = guest.result('c%d' % number)
        assert result['state'] == 'failed' and result['error'].startswith('EINVAL: CMD_RUN: '), result


def test_the_way_of_a_command_is_the_documented_one():
    with open(os.path.join(TOP, 'docs', 'protocol.md'), encoding='utf-8') as file:
        rows = re.findall(r'^\| `(\w+)` \| ([^|]*) \|[^|]*\|$', file.read(), re.MULTILINE)
    told = {state: tuple(re.findall('`([a-z]+)`', following)) for state, following in rows}
    assert told == guestspool.WAY


# --- file systems without hard links ---

def test_a_folder_without_hard_links(guests, monkeypatch):
    def link(*_):
        raise OSError(1, 'Operation not permitted')
    monkeypatch.setattr(os, 'link', link)       # before the runners are forked
    guest = guests()
    guest.run('c', 'echo', 'hello')
    assert guest.result('c')['out'] == 'hello\n'
    assert not guest.spool.command('c').runner_lives() and guest.spool.command('c').claim() is None


# --- who the guest is ---

def settle(folder, ini='', **vm):
    found = agent.read_settings(None, guestagent.SETTINGS).VM
    vars(found).update(vm)
    guestidentity.settle_folders(found, ini)
    return found


def test_where_the_agents_own_things_are(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'geteuid', lambda: 0)
    found = settle(tmp_path)
    assert (found.state_dir, found.dir_to_serve) == ('/var/lib/vmguest', '/var/lib/vmguest/vmguest-files')
    monkeypatch.setattr(os, 'geteuid', lambda: 1000)
    monkeypatch.setenv('XDG_STATE_HOME', str(tmp_path / 'xdg'))
    assert settle(tmp_path).state_dir == str(tmp_path / 'xdg' / 'vmguest')
    ini = str(tmp_path / 'etc' / 'guest.ini')
    monkeypatch.setenv('XDG_STATE_HOME', '/dev/null/nowhere')
    assert settle(tmp_path, ini).state_dir == str(tmp_path / 'etc' / 'vmguest-state')
    served = str(tmp_path / 'served')
    found = settle(tmp_path, os.path.join(served, '..', 'etc', 'guest.ini'), dir_to_serve=served)
    assert found.dir_to_serve == served and not found.state_dir.startswith(served)


@pytest.mark.parametrize('state', ['served', 'served/deep', 'link'])
def test_state_never_lies_in_what_is_served(tmp_path, state):
    (tmp_path / 'served').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'served')
    with pytest.raises(agent.AgentError, match='lies within dir_to_serve'):
        settle(tmp_path, dir_to_serve=str(tmp_path / 'served'), state_dir=str(tmp_path / state))


def test_folders_of_others_and_links_are_refused(tmp_path):
    (tmp_path / 'real').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'real')
    with pytest.raises(agent.AgentError, match='link'):
        guestspool.Spool(str(tmp_path / 'link'), 'g', 'boot')
    if os.getuid() == 0:
        os.chown(str(tmp_path / 'real'), 65534, 65534)
        with pytest.raises(agent.AgentError, match='belongs to another user'):
            guestspool.Spool(str(tmp_path / 'real'), 'g', 'boot')


def secret(tmp_path, serial='/nowhere', **vm):
    found = agent.read_settings(None, guestagent.SETTINGS).VM
    vars(found).update(dict({'state_dir': str(tmp_path)}, **vm))
    return guestidentity.Secret(found, 'g', serial=str(serial))


DIGITS = '0123456789abcdef' * 4


def test_a_secret_is_made_once_and_told_until_a_host_is_trusted(tmp_path):
    made = secret(tmp_path)
    assert (made.source, len(made.value), made.may_be_told, made.host_key) == ('made', 32, True, '')
    assert os.stat(str(tmp_path / 'g.secret')).st_mode & 0o777 == 0o600
    made.pin('host-1')
    again = secret(tmp_path)
    assert (again.value, again.may_be_told, again.host_key) == (made.value, False, 'host-1')


def test_who_listens_at_one_address_learns_nothing_of_what_another_is_told(tmp_path):
    made = secret(tmp_path)
    alone = made.value
    told = []
    for place in ('10.0.2.2:61613', '192.168.56.1:61613', '10.0.2.2:61613'):
        made.arrive(place)
        told.append(made.value)
    assert told[0] == told[2] and len({alone, told[0], told[1]}) == 3 and len(told[0]) == 32
    made.arrive('192.168.56.1:61613')
    made.pin('host-1')
    made.arrive('10.0.2.2:61613')           # it is known by that one from now on, wherever its host is
    again = secret(tmp_path)
    assert made.value == again.value == told[1] and again.host_key == 'host-1' and not again.may_be_told
    again.arrive('')
    assert again.value == told[1]
    os.remove(str(tmp_path / 'g.host'))
    again.arrive('')
    assert again.value == alone and again.may_be_told
    configured = secret(tmp_path, secret=DIGITS)
    configured.arrive('10.0.2.2:61613')
    assert configured.value.hex() == DIGITS


def test_a_configured_secret_and_one_of_the_firmware(tmp_path):
    path = tmp_path / 'key'
    path.write_text(DIGITS + '\n')
    path.chmod(0o600)
    for value in (DIGITS, str(path)):
        found = secret(tmp_path, secret=value)
        assert (found.source, found.value.hex(), found.may_be_told) == ('guest.ini', DIGITS, False)
    serial = tmp_path / 'serial'
    serial.write_text('vmhost:%s\n' % DIGITS[:32])
    found = secret(tmp_path, serial=serial)
    assert (found.source, found.value.hex(), found.may_be_told) == ('firmware', DIGITS[:32], False)
    serial.write_text('VirtualBox-1234\n')
    assert secret(tmp_path, serial=serial).source == 'made'


@pytest.mark.parametrize('mode, is_told', [(0o644, True), (0o600, False)])
def test_a_secret_in_an_ini_that_others_can_read_is_warned_of(tmp_path, caplog, mode, is_told):
    ini = tmp_path / 'guest.ini'
    ini.write_text('[VM]\nsecret = %s\n' % DIGITS)
    ini.chmod(mode)
    guestidentity.warn_of_readers(agent.read_settings(str(ini), guestagent.SETTINGS).VM, str(ini))
    assert ('chmod 600 %s' % ini in caplog.text) is is_told and DIGITS not in caplog.text


@pytest.mark.parametrize('mode, text, why', [
    (0o644, DIGITS, 'chmod 600'), (0o600, DIGITS[:40], '64 hexadecimal digits'), (None, '', 'No such file')])
def test_what_is_no_secret_is_refused(tmp_path, mode, text, why):
    path = tmp_path / 'key'
    if mode is not None:
        path.write_text(text)
        path.chmod(mode)
    with pytest.raises(agent.AgentError, match=why):
        secret(tmp_path, secret=str(path))


