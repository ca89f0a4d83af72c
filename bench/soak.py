"""Mixed load and faults for a long time: python bench/soak.py [--minutes 60] [--seed N]

A real host, real guests with real commands, a crowd of load-script guests with beacons, multicasts, and
all the while faults: agents killed and stopped, in the first quarter the host, too; clients of the broker
that send garbage, stop in the middle of a frame, never read, or come by the hundred and vanish. At the
end each command that was accepted must have ended exactly as it should, and have run once; and what the
host held at the end of the first quarter it must hold at the end: memory, threads, descriptors.
"""

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import xmlrpc.client

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [TOP, os.path.join(TOP, 'tests'), os.path.join(TOP, 'bench')]

from agents import Agent, Host  # noqa: E402
from brokers import free_port  # noqa: E402
from guests import Crowd, resident  # noqa: E402
from helpers import wait_until  # noqa: E402

NAMES = ('steady', 'alpha', 'beta', 'gamma')     # all but the first are killed now and then
UNREACHABLE = (OSError, xmlrpc.client.ProtocolError, xmlrpc.client.Fault)


class Soak:
    """The whole: ``run``, then ``problems`` says what was wrong."""

    def __init__(self, folder, seconds, seed, crowd):
        self.folder, self.seconds, self.crowd_size = folder, seconds, crowd
        self.random = random.Random(seed)
        self.marks = os.path.join(folder, 'marks')
        os.makedirs(self.marks)
        self.host = Host(os.path.join(folder, 'host'), {'port': free_port()})
        self.agents = {}
        self.stopping = threading.Event()
        # Guards the three below.
        self.lock = threading.Lock()
        self.tokens = 0
        self.accepted = self.finished = 0
        self.problems = []
        self.samples = []                  # resident MiB of host and steady agent, while both live on
        self.faults = 0

    def problem(self, text, *values):
        with self.lock:
            self.problems.append(text % values)

    # The load.

    def client(self, number):
        """Commands one after another, each checked to the last byte."""
        chance = random.Random(number)
        while not self.stopping.is_set():
            with self.lock:
                self.tokens += 1
                token = 'token%d' % self.tokens
            code, name = chance.randrange(256), chance.choice(NAMES)
            script = 'echo run >> %s/%s; sleep %.2f; head -c %d /dev/zero | tr "\\0" x; exit %d' % (
                self.marks, token, chance.choice((0, 0, 0.1, 2)), chance.choice((0, 10, 5000)), code)
            try:
                with self.host.api as api:
                    cmd_id = api.runCmd(name, 'sh', ['-c', script], {}, '', '', {'queue': True})
            except UNREACHABLE:
                self.stopping.wait(0.2)        # the host is being restarted; was it taken? at most once
                continue
            with self.lock:
                self.accepted += 1
            self.check(cmd_id, token, code, script)

    def check(self, cmd_id, token, code, script):
        results = self.await_results(cmd_id)
        if results is None:
            return self.problem('%s has no end', cmd_id)
        with self.lock:
            self.finished += 1
        size = int(script.partition('head -c ')[2].split()[0])
        if (results['state'], results['exitCodeOrSignal'], results['out']) != ('exited', code, 'x' * size):
            self.problem('%s should exit with %d: %.300s', cmd_id, code, results)
        with open(os.path.join(self.marks, token)) as file:
            if file.read() != 'run\n':
                self.problem('%s ran more than once', cmd_id)
        os.remove(os.path.join(self.marks, token))
        with contextlib.suppress(*UNREACHABLE), self.host.api as api:
            api.forgetCmd(cmd_id)

    def await_results(self, cmd_id):
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            try:
                with self.host.api as api:
                    if api.waitCmd(cmd_id, 10):
                        return api.getCmdResults(cmd_id)
            except UNREACHABLE:
                self.stopping.wait(0.2)
        return None

    def multicasts(self):
        """To the crowd: all of it answers."""
        while not self.stopping.wait(3):
            try:
                with self.host.api as api:
                    cmd_id = api.runCmdOnAll('guest*', 'echo', ['hello'])
                    results = self.await_results(cmd_id) or {}
                    if len(results) != self.crowd_size:
                        self.problem('%d of %d answered a multicast', len(results), self.crowd_size)
                    for key in results:
                        api.forgetCmd(key)
            except UNREACHABLE as error:
                self.problem('a multicast failed: %s', error)

    # The faults.

    def kill_agent(self):
        agent = self.agents[self.random.choice(NAMES[1:])]
        agent.stop(signal.SIGKILL)
        self.stopping.wait(self.random.choice((0, 1)))
        agent.start(wait=False)

    def stop_agent_a_while(self):
        agent = self.agents[self.random.choice(NAMES[1:])]
        agent.process.send_signal(signal.SIGSTOP)
        self.stopping.wait(2)
        agent.process.send_signal(signal.SIGCONT)

    def restart_host(self):
        self.host.stop(self.random.choice((signal.SIGTERM, signal.SIGKILL)), 20)
        self.host.start()

    def client_of_broker(self, *data, **kwargs):
        with socket.create_connection(('127.0.0.1', self.host.broker_port), 5) as client:
            for part in data:
                client.sendall(part)
            self.stopping.wait(kwargs.get('wait', 0))

    def garbage(self):
        with contextlib.suppress(OSError):     # it may close before all is sent
            self.client_of_broker(bytes(self.random.randrange(256) for _ in range(5000)))

    def half_a_frame(self):
        self.client_of_broker(b'CONNECT\naccept-version:1.2\nhost:/\n\n\0SEND\ndestination:/top', wait=1)

    def never_reads(self):
        self.client_of_broker(b'CONNECT\naccept-version:1.2\nhost:/\n\n\0'
                              b'SUBSCRIBE\nid:0\ndestination:/topic/cmd_requests\n\n\0', wait=5)

    def many_that_vanish(self):
        for _ in range(100):
            self.client_of_broker(b'CONNECT\naccept-version:1.2\nhost:/\n\n\0')

    def disturb(self, faults, until, pause):
        while time.monotonic() < until:
            fault = self.random.choice(faults)
            try:
                fault()
            except OSError as error:
                self.problem('%s: %s', fault.__name__, error)
            self.faults += 1
            self.stopping.wait(min(pause, max(0, until - time.monotonic())))
            if self.crowd_size and len(faults) > 1 and self.restart_host not in faults:
                self.samples.append((resident(self.host.process.pid),
                                     resident(self.agents['steady'].process.pid)))

    # The course of it.

    def run(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.host)
            for name in NAMES:
                agent = Agent(os.path.join(self.folder, name), self.host, name)
                self.agents[name] = stack.enter_context(agent)
            clients = [threading.Thread(target=self.client, args=(number,)) for number in range(4)]
            stack.callback(self.end, clients)
            for thread in clients:
                thread.start()
            gentle = [self.kill_agent, self.stop_agent_a_while, self.garbage, self.half_a_frame,
                      self.never_reads, self.many_that_vanish]
            begin, pause = time.monotonic(), min(10.0, self.seconds / 60)
            self.disturb(gentle + [self.restart_host] * 3, begin + self.seconds / 4, pause)
            self.live_on(clients, gentle, begin + self.seconds, pause)

    def live_on(self, clients, gentle, until, pause):
        """The host isn't restarted from here on: what it holds is compared."""
        crowd = Crowd(self.host.broker_port, self.crowd_size)
        try:
            with self.host.api as api:
                wait_until(lambda: api.agentInfo()['vms'] == self.crowd_size + len(NAMES), 120)
            before = self.holdings()
            multicasts = threading.Thread(target=self.multicasts)
            multicasts.start()
            self.disturb(gentle, until, pause)
            self.end(clients + [multicasts])
            self.compare(before)
        finally:
            self.stopping.set()
            crowd.stop()

    def end(self, threads):
        self.stopping.set()
        for thread in threads:
            thread.join(300)
            if thread.is_alive():
                self.problem('%s does not end', thread.name)

    def holdings(self):
        """Threads and descriptors of the host, once nothing of the faults is left."""
        pid, known = self.host.process.pid, self.crowd_size + len(NAMES)
        with self.host.api as api:
            wait_until(lambda: api.agentInfo()['broker']['counters']['connections'] == known, 60)
            found = []

            def same_twice():
                found.append((len(os.listdir('/proc/%d/task' % pid)), len(os.listdir('/proc/%d/fd' % pid))))
                time.sleep(0.3)            # a request of a moment ago may still have its thread
                return len(found) > 1 and found[-1] == found[-2]
            wait_until(same_twice, 60)
        return found[-1]

    def compare(self, before):
        try:
            with self.host.api as api:
                wait_until(lambda: api.agentInfo()['cmds'] == 0, 120)
            wait_until(lambda: all(now <= then for now, then in zip(self.holdings(), before)), 60)
        except AssertionError:
            self.problem('threads and descriptors: %s, now %s', before, self.holdings())
        if self.accepted != self.finished:
            self.problem('%d commands accepted, %d finished', self.accepted, self.finished)
        quarter = max(1, len(self.samples) // 4)
        for which, name in enumerate(('host', 'agent')):
            early = statistics.median(sample[which] for sample in self.samples[:quarter])
            late = statistics.median(sample[which] for sample in self.samples[-quarter:])
            print('%s: %.1f MiB in the first quarter of its steady time, %.1f in the last'
                  % (name, early, late))
            if late > early * 1.1 + 3:
                self.problem('memory of the %s grew from %.1f to %.1f MiB', name, early, late)
        print('threads and descriptors: %s, at the end %s' % (before, self.holdings()))


def main(arguments=None):
    """Exits with 1 where anything was lost or kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=float, default=60.0)
    parser.add_argument('--crowd', type=int, default=100, help='load-script guests')
    parser.add_argument('--seed', type=int, default=random.randrange(10 ** 6))
    chosen = parser.parse_args(arguments)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    folder = tempfile.mkdtemp()
    try:
        soak = Soak(folder, chosen.minutes * 60, chosen.seed, chosen.crowd)
        soak.run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print('seed %d: %d commands accepted, %d ended as they should, %d faults' % (
        chosen.seed, soak.accepted, soak.finished, soak.faults))
    for text in soak.problems[:50]:
        print('PROBLEM ' + text)
    return 1 if soak.problems else 0


if __name__ == '__main__':
    sys.exit(main())
