"""Random faults over many commands: python tests/faults/run.py --seed N --faults 500 --commands 2000

Real processes of a host, three guests (each behind a cutting proxy), and now and then a broker apart,
are killed, stopped, cut off, rolled back, filled up and put out of time, one fault after the other,
while commands are asked for: some twice by the same id, some through a proxy that cuts the answer, by
callers who then repeat the call; some are cancelled or signalled, some expire where they wait. One guest runs
two at a time, so that others wait there for their turn. Each command appends a line to a file of its own,
outside of the guests' disks, as it begins, and makes another file as it ends: the only proof of that. When
the dust has settled: each ran at most once (per state of its guest's disk), each has exactly one end, and
what the host reports equals the proof: what is cancelled or expired never began, what ended by a signal got
it from here, what exited came to its end. ``lost`` and ``failed`` are right only where a fault that a command
was under allows them.

The same seed gives the same sequence of faults and of commands (--plan prints it); how they fall
together in time differs. Ends with one line of counts, and 0 when nothing was lost, double or wrong.
"""

import argparse
import collections
import contextlib
import hashlib
import http.client
import json
import os
import queue
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import xmlrpc.client

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [TOP, os.path.join(TOP, 'tests'), HERE]

from cutproxy import CuttingProxy  # noqa: E402
from faultrig import Agent, Host, free_port  # noqa: E402
from helpers import wait_until  # noqa: E402

import guestprocesses  # noqa: E402
import guestspool  # noqa: E402

GUESTS = 3
SETTLE = 240           # seconds for everything to come to its end after the last fault
KINDS = {              # fault: weight, (shortest, longest) duration in seconds
    'agent-kill': (6, (0, 1)), 'agent-term': (3, (0, 1)), 'agent-stop': (4, (0.1, 4)),
    'fork-server-kill': (3, (0, 0)), 'runner-kill': (4, (0, 0)), 'reboot': (3, (0, 1)),
    'disk-rollback': (3, (0, 1)), 'disk-lost': (1, (0, 1)), 'guest-clock': (3, (0, 0)),
    'host-kill': (6, (0, 2)), 'host-term': (3, (0, 2)), 'host-stop': (4, (0.1, 7)),
    'journal-rollback': (2, (0.5, 3)), 'journal-lost': (1, (0, 0)), 'host-clock': (3, (0, 0)),
    'all-kill': (2, (0, 1)), 'cut': (6, (0, 0)), 'half-open': (4, (0, 0)), 'hole': (4, (0.5, 6)),
    'throttle': (3, (0.5, 2)), 'split': (3, (0.5, 2)), 'twice': (3, (0.5, 2)),
    'broker-exchange': (3, (0, 0)), 'broker-kill': (3, (0, 1)), 'twin': (2, (0, 0)),
    'guest-full': (3, (0.5, 2)), 'host-full': (3, (0.5, 2)),
}

DEEDS = ('',) * 8 + ('repeat', 'cut', 'cut', 'KILL', 'TERM', 'expire')
SENT = {'KILL': 9, 'TERM': 15, 'expire': 9}    # by what is done to a command: the signal that may end it

Fault = collections.namedtuple('Fault', 'kind guest seconds')


def plan_of(seed, faults, commands):
    """(the faults, the commands) of a seed.

    A command is (guest, seconds, exit code, bytes of output, what is done to it): ``repeat``: it is asked
    for twice; ``cut``: the same, and the first answer is cut; ``KILL``, ``TERM``: it gets that signal;
    ``expire``: it has to begin within 2 s.
    """
    choose = random.Random(seed)
    kinds, weights = list(KINDS), [weight for weight, _ in KINDS.values()]
    planned = []
    for kind in choose.choices(kinds, weights, k=faults):
        planned.append(Fault(kind, choose.randrange(GUESTS), round(choose.uniform(*KINDS[kind][1]), 2)))
    asked = [(choose.randrange(GUESTS), choose.choice((0, 0, 0, 0.1, 0.3, 1, 2, 5)), choose.randrange(100),
              choose.choice((0, 0, 0, 100000)), choose.choice(DEEDS)) for _ in range(commands)]
    return planned, asked


class Attempt:
    """One runCmd: what it should give, and which faults it was under."""

    def __init__(self, world, number, command):
        self.number = number
        self.guest, self.seconds, self.code, self.output, self.deed = command
        self.nonce = '%06d' % number
        self.proof = os.path.join(world.proofs, self.nonce)
        self.cmd_id = ''
        self.refused = False           # a fault said so: it must never run
        self.unanswered = False        # an earlier call was perhaps taken: then a fault doesn't say that
        self.excuses = set()
        self.results = None            # as recorded before a journal was lost
        self.ends = 1

    def words(self):
        """The arguments of sh."""
        return ['-c', 'echo "$GENERATION" >> "$1"; sleep "$2"; head -c "$4" /dev/zero | tr "\\\\0" x; '
                'echo "$5"; echo > "$1.ended"; exit "$3"', 'sh', self.proof, str(self.seconds),
                str(self.code), str(self.output), self.nonce]

    def options(self):
        """Of runCmd."""
        found = {'queue': True}
        if self.deed in ('repeat', 'cut'):
            found['id'] = 'of-the-caller-' + self.nonce
        if self.deed == 'expire':
            found['expires'] = 2
        return found

    def has_ended(self):
        """Whether it came to its own end, as it wrote itself."""
        return os.path.exists(self.proof + '.ended')

    def runs(self):
        """The generation of the guest's disk at each run."""
        try:
            with open(self.proof) as file:
                return file.read().split()
        except FileNotFoundError:
            return []


class Guest:
    """A guest with its disk, its boots and its clock; ``generation`` counts lives of its disk."""

    def __init__(self, world, number):
        self.world = world
        self.id = 'g%d' % number
        self.folder = os.path.join(world.folder, self.id)
        self.proxy = CuttingProxy(world.port)
        self.clock = Clock(self.folder)
        self.generation = self.boot = 0
        self.disk = os.path.join(self.folder, 'state', 'spool')
        self.copy = None
        self.has_small_disk = mount_small_disk(self.disk, '48M')
        host = world.host
        host.broker_port = self.proxy.port
        self.agent = Agent(self.folder, host, self.id, broker={'heartbeat': 2}, beacon_interval=1,
                           kill_after=1, keep_spool=10, max_commands=0 if number else 2)

    def start(self):
        self.agent.faults = {
            'first_delay': 1.0, 'clock': self.clock.path, 'boot': 'boot-%d' % self.boot,
            'set': {'HOUSEKEEPING_EVERY': 2.0, 'START_PATIENCE': 3.0, 'RESEND_EVERY': 10.0},
            'env': {'GENERATION': '%s.%d' % (self.id, self.generation), 'FAULTS_GUEST': self.folder}}
        self.agent.start(wait=False)

    def pids(self):
        """Agent, fork server, runners and commands."""
        found = set(guestprocesses.processes_with('FAULTS_GUEST', self.folder))
        for pid in filter(str.isdigit, os.listdir('/proc')):
            with contextlib.suppress(OSError), open('/proc/%s/cmdline' % pid, 'rb') as file:
                if self.agent.ini.encode() in file.read().split(b'\0'):
                    found.add(int(pid))
        return found

    def commands(self):
        """What lies in its spool."""
        spool = self.agent.spool
        return [guestspool.Command(name, os.path.join(spool, name))
                for name in (sorted(os.listdir(spool)) if os.path.isdir(spool) else [])]

    def signal_all(self, number):
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop_all(self):
        """SIGSTOP, until nothing new is seen."""
        seen = set()
        while self.pids() - seen:
            seen |= self.pids()
            self.signal_all(signal.SIGSTOP)

    def power_off(self):
        self.stop_all()
        self.signal_all(signal.SIGKILL)
        self.agent.process.wait()
        wait_until(lambda: not self.pids(), 30)
        self.proxy.cut()

    def take_copy(self):
        """A snapshot of its disk."""
        self.stop_all()
        target = os.path.join(self.folder, 'copy')
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.disk, target, symlinks=True)
        self.signal_all(signal.SIGCONT)
        self.copy = target

    def empty_disk(self):
        for name in os.listdir(self.disk):
            shutil.rmtree(os.path.join(self.disk, name), ignore_errors=True)

    def close(self):
        self.power_off()
        self.proxy.close()
        if self.has_small_disk:
            subprocess.call(['umount', '-l', self.disk])


class Clock:
    """What is added to a process's wall clock and to its monotonic one."""

    def __init__(self, folder):
        os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(folder, 'clock')
        self.slept = 0.0
        self.set(0.0)

    def set(self, wall, sleep=0.0):
        self.slept += sleep
        with open(self.path, 'r+' if os.path.exists(self.path) else 'w') as file:
            file.write('%-20.1f %-20.1f\n' % (wall, self.slept))


def mount_small_disk(folder, size):
    """Whether a tmpfs of that size could be mounted there: as root."""
    os.makedirs(folder, exist_ok=True)
    return subprocess.call(['mount', '-t', 'tmpfs', '-o', 'mode=700,size=' + size, 'faults', folder],
                           stderr=subprocess.DEVNULL) == 0


@contextlib.contextmanager
def full(folder):
    """No byte is free there."""
    path = os.path.join(folder, 'ballast')
    with open(path, 'wb', buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b'\0' * 65536)
    with open(path, 'ab', buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b'\0' * 512)
    try:
        yield
    finally:
        os.remove(path)


class World:
    """Host, guests and broker; and what was asked of them."""

    def __init__(self, folder, seed, say):
        self.folder = folder
        self.say = say
        self.choose = random.Random(seed)      # for faults alone, which come one after the other
        self.proofs = os.path.join(folder, 'proofs')
        os.makedirs(self.proofs)
        self.port = free_port()
        self.host_folder = os.path.join(folder, 'host')
        self.clock = Clock(self.host_folder)
        self.host = Host(self.host_folder, broker={'port': self.port, 'heartbeat': 2, 'embedded': 'yes',
                                                   'host': '127.0.0.1'}, vm_gc_grace=10)
        self.has_small_disk = mount_small_disk(self.host.state, '96M')
        self.host.faults = {'first_delay': 1.0, 'clock': self.clock.path}
        self.broker = None             # an external one
        self.lock = threading.Lock()   # guards the attempts
        self.attempts = []
        self.ended = {}                # cmd-id: the state in which it was seen to end
        self.changed = []              # cmd-ids that had two ends
        self.to_ask = queue.Queue()
        self.effects = collections.Counter()
        self.stopping = False
        self.threads = []
        self.host.start()
        self.guests = [Guest(self, number) for number in range(GUESTS)]
        for guest in self.guests:
            guest.start()
        for guest in self.guests:          # so a journal that goes back knows the secrets of all
            wait_until(guest.agent.has_joined, 60)
        for target in [self.ask_on] * 4 + [self.look_on]:
            self.threads.append(threading.Thread(target=target, daemon=True))
            self.threads[-1].start()

    # What is asked, on threads of its own.

    def ask_on(self):
        while not self.stopping:
            try:
                command = self.to_ask.get(timeout=0.2)
            except queue.Empty:
                continue
            self.ask(command)
            self.to_ask.task_done()

    def ask(self, command):
        """Until the host has taken it: a new attempt where it isn't known whether it did."""
        while not self.stopping:
            with self.lock:
                attempt = Attempt(self, len(self.attempts), command)
                self.attempts.append(attempt)
            try:
                self.submit(attempt)
                return
            except xmlrpc.client.Fault:
                attempt.refused = not attempt.unanswered
            except (OSError, ValueError, xmlrpc.client.Error):
                pass
            time.sleep(0.3)

    def submit(self, attempt):
        """runCmd, and what is done to the command. Raises what that raised."""
        def call(api):
            return api.runCmd('g%d' % attempt.guest, 'sh', attempt.words(), {}, '', '', attempt.options())
        if attempt.deed == 'cut':
            with contextlib.closing(CuttingProxy(int(self.host.address.rpartition(':')[2]))) as proxy:
                proxy.mode = 'mute'
                attempt.unanswered = True
                with self.host.api_at('127.0.0.1:%d' % proxy.port) as api:
                    with contextlib.suppress(OSError, http.client.HTTPException):
                        call(api)      # which Python's own client sends again at once
        with self.host.api as api:
            attempt.cmd_id = call(api)
            with contextlib.suppress(OSError, xmlrpc.client.Error):
                if attempt.deed == 'repeat':
                    assert call(api) == attempt.cmd_id
                elif attempt.deed in ('KILL', 'TERM'):
                    time.sleep(attempt.seconds / 10)
                    api.signalCmd(attempt.cmd_id, attempt.deed)

    def look_on(self):
        """Notes each end, so that one that changes is found."""
        while not self.stopping:
            time.sleep(0.5)
            ended = self.ended
            with contextlib.suppress(OSError, ValueError, xmlrpc.client.Error), self.host.api as api:
                listed = api.listCmds({'finished': True, 'limit': 300})
                with self.lock:
                    if ended is self.ended:        # else this is what an earlier journal knew
                        self.note_ends(listed)

    def note_ends(self, listed):
        for command in listed:
            cmd_id, state = command['cmdId'], command['state']
            was, self.ended[cmd_id] = self.ended.get(cmd_id, state), state
            # What the host called off may turn out to have begun: then that is told instead.
            if was not in (state, 'cancelled', 'expired'):
                self.changed.append(cmd_id)

    def excuse(self, why, guest=None, since=None):
        """Commands that haven't ended yet may now end otherwise, for that reason; nor have those that the
        host called off, as long as their guest may tell that they had begun.

        So may those that have, and were asked for when there were ``since`` attempts or more.
        """
        with self.lock:
            for number, attempt in enumerate(self.attempts):
                open_still = self.ended.get(attempt.cmd_id, 'cancelled') in ('cancelled', 'expired') \
                    or since is not None and number >= since
                if guest in (None, attempt.guest) and open_still:
                    attempt.excuses.add(why)

    # Faults.

    def do(self, fault):
        guest = self.guests[fault.guest]
        self.effects[fault.kind] += bool(
            getattr(self, 'do_' + fault.kind.replace('-', '_'))(guest, fault.seconds))

    def do_agent_kill(self, guest, seconds):
        guest.agent.stop(signal.SIGKILL)
        time.sleep(seconds)
        guest.start()
        return True

    def do_agent_term(self, guest, seconds):
        guest.agent.stop(timeout=30)
        time.sleep(seconds)
        guest.start()
        return True

    def do_agent_stop(self, guest, seconds):
        guest.agent.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        guest.agent.process.send_signal(signal.SIGCONT)
        return True

    def children(self, pid):
        with contextlib.suppress(OSError), open('/proc/%d/task/%d/children' % (pid, pid)) as file:
            return [int(word) for word in file.read().split()]
        return []

    def do_fork_server_kill(self, guest, seconds):
        return self.before_long(lambda: self.kill_fork_server(guest))

    def before_long(self, act, seconds=20):
        """Tries it until it takes effect; whether it did."""
        try:
            return wait_until(act, seconds)
        except AssertionError:
            return False

    def kill_fork_server(self, guest):
        for pid in self.children(guest.agent.process.pid)[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    def do_runner_kill(self, guest, seconds):
        others = [other for other in self.guests if other is not guest]
        return self.before_long(lambda: any(map(self.kill_runner, [guest] + others)), 3)

    def kill_runner(self, guest):
        """Of a command that runs there now."""
        for command in guest.commands():
            program = command.process()
            if not program or command.has('result.json'):
                continue
            with contextlib.suppress(OSError, ValueError, KeyError), open('/proc/%d/stat' % program) as file:
                runner = int(file.read().rpartition(')')[2].split()[1])
                if runner in guest.pids():
                    os.kill(runner, signal.SIGSTOP)    # by now it may be at the next command
                    self.excuse_commands_of(runner, guest)
                    os.kill(runner, signal.SIGKILL)
                    return True
        return False

    def excuse_commands_of(self, runner, guest):
        """Those that a stopped runner has, or, where nobody has written yet whose they are, may have."""
        for command in guest.commands():
            if not command.has('runner') or command.has('result.json'):
                continue
            owner = runner
            with contextlib.suppress(OSError, ValueError, KeyError):
                owner = command.read('process.json')['runner']
            with contextlib.suppress(OSError, ValueError), self.lock:
                proof = command.read('request.json')['args'][3]
                for attempt in self.attempts:
                    if owner == runner and attempt.proof == proof:
                        attempt.excuses.add('runner-kill')

    def do_reboot(self, guest, seconds):
        self.excuse('reboot', self.guests.index(guest))
        guest.power_off()
        guest.boot += 1
        time.sleep(seconds)
        guest.start()
        self.excuse('reboot', self.guests.index(guest))
        return True

    def do_disk_rollback(self, guest, seconds):
        self.excuse('disk', self.guests.index(guest))
        if guest.copy is None:
            guest.take_copy()
            time.sleep(1)
        guest.power_off()
        guest.empty_disk()
        shutil.rmtree(guest.disk, ignore_errors=True)      # a mounted one stays, and is empty
        os.makedirs(guest.disk, exist_ok=True)
        for name in os.listdir(guest.copy):
            shutil.copytree(os.path.join(guest.copy, name), os.path.join(guest.disk, name), symlinks=True)
        guest.boot += 1
        guest.generation += 1
        guest.start()
        self.excuse('disk', self.guests.index(guest))
        guest.copy = None
        return True

    def do_disk_lost(self, guest, seconds):
        self.excuse('disk', self.guests.index(guest))
        guest.power_off()
        guest.empty_disk()
        guest.boot += 1
        guest.generation += 1
        guest.start()
        self.excuse('disk', self.guests.index(guest))
        return True

    def do_guest_clock(self, guest, seconds):
        guest.clock.set(self.choose.choice((-30e6, -3600.0, 0.0, 90000.0, 30e6)),
                        self.choose.choice((0.0, 0.0, 5.0)))
        return True

    def do_host_kill(self, guest, seconds):
        self.host.stop(signal.SIGKILL)
        time.sleep(seconds)
        self.host.start()
        return True

    def do_host_term(self, guest, seconds):
        self.host.stop(timeout=30)
        time.sleep(seconds)
        self.host.start()
        return True

    def do_host_stop(self, guest, seconds):
        self.host.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.host.process.send_signal(signal.SIGCONT)
        return True

    def journal_files(self, folder):
        return [os.path.join(folder, 'journal.sqlite' + suffix) for suffix in ('', '-wal', '-shm')]

    def do_journal_rollback(self, guest, seconds):
        """To what it was some seconds ago."""
        path = os.path.join(self.host.state, 'journal.sqlite')
        copy = os.path.join(self.folder, 'journal-copy')
        with contextlib.closing(sqlite3.connect(path)) as live, \
                contextlib.closing(sqlite3.connect(copy)) as target:
            live.backup(target)
        time.sleep(seconds)
        self.host.stop(signal.SIGKILL)
        with contextlib.closing(sqlite3.connect(copy)) as journal:
            ends = journal.execute('SELECT cmd_id, state FROM executions WHERE ended > 0').fetchall()
        self.forget_journal(dict(ends))
        shutil.move(copy, path)
        self.host.start()
        self.excuse('journal')
        return True

    def forget_journal(self, ends):
        """Deletes it; but for what had ended in the copy that comes instead, anything may come of it."""
        for path in filter(os.path.exists, self.journal_files(self.host.state)):
            os.remove(path)
        with self.lock:
            self.ended = ends          # a new object: see look_on
            for attempt in self.attempts:
                if attempt.cmd_id not in ends:
                    attempt.excuses.add('journal')

    def do_journal_lost(self, guest, seconds):
        """With the secrets of all guests; so their owner lets them tell those anew."""
        self.record()
        self.host.stop(signal.SIGKILL)
        self.forget_journal({})
        self.host.start()
        for guest in self.guests:
            guest.agent.stop(timeout=30)
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(guest.agent.state, guest.id + '.host'))
            guest.start()
        self.excuse('journal')
        return True

    def do_host_clock(self, guest, seconds):
        self.clock.set(self.choose.choice((-3600.0, 0.0, 3600.0, 90000.0)), self.choose.choice((0.0, 20.0)))
        return True

    def do_all_kill(self, guest, seconds):
        for guest in self.guests:
            guest.agent.stop(signal.SIGKILL)
        self.host.stop(signal.SIGKILL)
        time.sleep(seconds)
        self.host.start()
        for guest in self.guests:
            guest.start()
        return True

    def do_cut(self, guest, seconds):
        guest.proxy.cut()
        return True

    def do_half_open(self, guest, seconds):
        guest.proxy.half_open()
        return True

    def pass_as(self, guest, mode, seconds):
        guest.proxy.mode = mode
        if mode == 'twice':
            guest.proxy.cut()
        time.sleep(seconds)
        guest.proxy.mode = 'pass'
        return True

    def do_hole(self, guest, seconds):
        return self.pass_as(guest, 'hole', seconds)

    def do_throttle(self, guest, seconds):
        return self.pass_as(guest, 'throttle', seconds)

    def do_split(self, guest, seconds):
        return self.pass_as(guest, 'split', seconds)

    def do_twice(self, guest, seconds):
        return self.pass_as(guest, 'twice', seconds + 2)

    def do_broker_exchange(self, guest, seconds):
        """The embedded broker for one apart, or back."""
        self.host.stop(self.choose.choice((signal.SIGKILL, signal.SIGTERM)), 30)
        embedded = self.broker is not None
        self.stop_broker()
        with open(self.host.ini) as file:
            text = file.read()
        with open(self.host.ini, 'w') as file:
            file.write(text.replace('embedded = %s' % ('no' if embedded else 'yes'),
                                    'embedded = %s' % ('yes' if embedded else 'no')))
        if not embedded:
            self.start_broker()
        self.host.start()
        return True

    def start_broker(self):
        self.broker = subprocess.Popen(
            [sys.executable, os.path.join(TOP, 'stompbroker.py'), '--host', '127.0.0.1', '--port',
             str(self.port)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        assert b'listening' in self.broker.stdout.readline()

    def stop_broker(self):
        if self.broker is not None:
            self.broker.kill()
            self.broker.wait()
            self.broker.stdout.close()
            self.broker = None

    def do_broker_kill(self, guest, seconds):
        if self.broker is None:
            return self.do_host_kill(guest, seconds)
        self.stop_broker()
        time.sleep(seconds)
        self.start_broker()
        return True

    def do_twin(self, guest, seconds):
        """Another agent with the id of one that is there: it is turned away.

        By the broker; where that one is apart, and knows nothing of ids, by the lock of the spool.
        """
        if not self.before_long(lambda: self.answers(guest)):
            return False
        folder = os.path.join(guest.folder, 'twin')
        shutil.rmtree(folder, ignore_errors=True)
        shared = {'state_dir': os.path.dirname(guest.disk)} if self.broker is not None else {}
        twin = Agent(folder, guest.agent.host, guest.id, broker={'port': self.port}, **shared)
        twin.faults = {'env': {'GENERATION': 'twin'}}
        twin.start(wait=False)
        try:
            return self.before_long(lambda: ('another vmguest' if shared else 'is taken') in twin.log())
        finally:
            twin.stop(signal.SIGKILL)

    def answers(self, guest):
        with contextlib.suppress(OSError, xmlrpc.client.Error), self.host.api as api:
            return api.ping(guest.id, 1.0)

    def do_guest_full(self, guest, seconds):
        if not guest.has_small_disk:
            return False
        before = len(self.attempts)
        self.excuse('full', self.guests.index(guest))
        with full(guest.disk):
            time.sleep(seconds)
        self.excuse('full', self.guests.index(guest), before)
        return True

    def do_host_full(self, guest, seconds):
        if not self.has_small_disk:
            return False
        with full(self.host.state):
            time.sleep(seconds)
        return True

    # The end.

    def settle(self):
        """Waits until no command is unfinished; gives the ids of those that are all the same."""
        deadline = time.monotonic() + SETTLE
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError, xmlrpc.client.Error), self.host.api as api:
                unfinished = [command['cmdId'] for command in api.listCmds({'finished': False})]
                if not unfinished and self.to_ask.empty():
                    return []
            time.sleep(0.5)
        return unfinished

    def record(self):
        """Notes the results of all that the journal has."""
        try:
            with self.host.api as api:
                listed = api.listCmds({'limit': 10 ** 6})
                attempts = {attempt.proof: attempt for attempt in list(self.attempts)}
                for command in listed:
                    cmd_id = command['cmdId']
                    attempt = attempts[api.getCmdDetails(cmd_id)['args'][3]]
                    attempt.cmd_id, attempt.results = cmd_id, api.getCmdResults(cmd_id)
                    attempts[cmd_id] = attempt
                ends = self.count_ends(api)         # last: some end while this looks
                for command in listed:
                    attempts[command['cmdId']].ends = ends[command['cmdId']]
        except (OSError, xmlrpc.client.Error) as error:
            self.say('not recorded: %s' % error)

    def judge(self):
        """(counts, the complaints)."""
        counts, complaints = collections.Counter(), []
        self.record()
        for attempt in self.attempts:
            verdict, wrong = judge(attempt)
            counts[verdict] += 1
            if wrong:
                complaints.append('%s %s (%s) of g%d: %s; runs %s, excuses %s, results %.300s' % (
                    verdict, attempt.nonce, attempt.cmd_id, attempt.guest, wrong,
                    attempt.runs(), sorted(attempt.excuses), attempt.results))
        for cmd_id in self.changed:
            complaints.append('wrong: %s had two ends' % cmd_id)
            counts['wrong'] += 1
        return counts, complaints

    def count_ends(self, api):
        ends, last = collections.Counter(), 0
        while True:
            found = api.getEvents(last, 0)
            if not found['events']:
                return ends
            ends.update(event['cmdId'] for event in found['events'] if event['type'] == 'cmd-finished')
            last = found['last']

    def close(self):
        self.stopping = True
        for thread in self.threads:
            thread.join(30)
        for guest in self.guests:
            guest.close()
        self.host.stop(signal.SIGKILL)
        self.stop_broker()
        if self.has_small_disk:
            subprocess.call(['umount', '-l', self.host.state])


def judge(attempt):
    """(how it ended: exited, lost, failed, …, double or wrong; why that is wrong, or '')."""
    runs, results = attempt.runs(), attempt.results
    if any(count > 1 for count in collections.Counter(runs).values()):
        return 'double', 'it ran twice'
    if len(runs) > 1 and 'disk' not in attempt.excuses:
        return 'double', 'it ran twice, and its disk never went back'
    if attempt.refused and (runs or results):
        return 'wrong', 'it was refused, and yet ran'
    if results is None:
        if attempt.cmd_id and 'journal' not in attempt.excuses:
            return 'lost', 'the host doesn\'t know it'
        if runs and 'journal' not in attempt.excuses:
            return 'wrong', 'it ran, and the host doesn\'t know it'
        return 'refused' if attempt.refused else 'forgotten' if attempt.cmd_id else 'not asked', ''
    if results == '':
        return ('forgotten', '') if 'journal' in attempt.excuses else ('lost', 'it has no end')
    if attempt.ends != 1:
        return 'wrong', 'it has %d ends' % attempt.ends
    state = results['state']
    if state == 'exited':
        size = attempt.output + len(attempt.nonce) + 1
        right = results['exitCodeOrSignal'] == attempt.code and results['out-size'] == size \
            and attempt.has_ended() and results['out'].endswith(attempt.nonce + '\n') and len(runs) >= 1
        return ('exited', '') if right else ('wrong', 'its results are not those of its run')
    if state in ('cancelled', 'expired'):
        # A journal that went back to when it waited doesn't know that it began; nor does such a disk.
        right = attempt.deed in {'cancelled': ('KILL', 'TERM'), 'expired': ('expire',)}[state] \
            and (not runs or bool(attempt.excuses & {'disk', 'journal'}))
        return (state, '') if right else ('wrong', 'it is %s, and ran, or nobody wanted that' % state)
    if state == 'signaled':
        # What the host called off, and had begun in the guest at that moment, is ended by KILL.
        right = attempt.deed in SENT and results['exitCodeOrSignal'] in (SENT[attempt.deed], signal.SIGKILL) \
            and results['by'] == 'signalCmd' and not attempt.has_ended()
        return (state, '') if right else ('wrong', 'nobody sent that signal, or it had ended')
    if state == 'lost':
        excused = attempt.excuses & {'reboot', 'disk', 'runner-kill', 'journal'} and results['error']
        return ('excused', '') if excused else ('lost', 'nothing excuses it')
    if state == 'failed' and 'full' in attempt.excuses and 'space' in results['error']:
        return 'disk full', ''
    return 'wrong', 'it is %s' % state


def run(seed, faults, commands, seconds=0, say=print, keep=False):
    """Does it all; the exit code. ``seconds``: so long at most, then what is left isn't done."""
    planned, asked = plan_of(seed, faults, commands)
    digest = hashlib.sha256(json.dumps([planned, asked]).encode()).hexdigest()[:12]
    say('seed %d: %d faults, %d commands, plan %s' % (seed, faults, commands, digest))
    folder = tempfile.mkdtemp(prefix='faults-')
    begin, world, done = time.monotonic(), World(folder, seed, say), 0
    try:
        for number, fault in enumerate(planned):
            if seconds and time.monotonic() - begin > seconds:
                break
            for command in asked[number * commands // faults:(number + 1) * commands // faults]:
                world.to_ask.put(command)
            say('%4d %5.0f s  %s' % (number, time.monotonic() - begin, fault))
            world.do(fault)
            done += 1
        unfinished = world.settle()
        counts, complaints = world.judge()
        for complaint in complaints:
            say(complaint)
        bad = {name: sum(complaint.startswith(name) for complaint in complaints)
               for name in ('lost', 'double', 'wrong')}
        say('took effect: ' + ', '.join('%s %d' % item for item in sorted(world.effects.items())))
        say('ends: ' + ', '.join('%s %d' % item for item in sorted(counts.items())))
        say('seed %d: %d faults, %d commands (%d attempts), %d unfinished; %d lost, %d double, %d wrong '
            'in %.0f s' % (seed, done, commands * done // faults, len(world.attempts), len(unfinished),
                           bad['lost'], bad['double'], bad['wrong'], time.monotonic() - begin))
    finally:
        world.close()
    if complaints or keep:
        say('kept: ' + folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if complaints or unfinished else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seed', type=int, default=int(time.time()) % 100000)
    parser.add_argument('--faults', type=int, default=500)
    parser.add_argument('--commands', type=int, default=2000)
    parser.add_argument('--seconds', type=float, default=0, help='so long at most; 0: to the end')
    parser.add_argument('--keep', action='store_true', help='keep the folder with logs and proofs')
    parser.add_argument('--plan', action='store_true', help='print the faults, and do nothing')
    wish = parser.parse_args()
    if wish.plan:
        for fault in plan_of(wish.seed, wish.faults, wish.commands)[0]:
            print('%s g%d %.2f' % fault)
        return 0
    return run(wish.seed, wish.faults, wish.commands, wish.seconds, lambda text: print(text, flush=True),
               wish.keep)


if __name__ == '__main__':
    sys.exit(main())
