"""How fast commands are, and what the agents weigh: python bench/commands.py [--quick]

In one run: in turns vmhost's runCmd('true') to its result over XML-RPC; a bare XML-RPC server that
calls subprocess.run; then ``ssh`` to an sshd of its own (where OpenSSH is installed). Then commands per
second with 16 clients, a multicast to 200 guests, and resident memory.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import xmlrpc.client

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [TOP, os.path.join(TOP, 'tests')]

from agents import Agent, Host  # noqa: E402
from helpers import wait_until  # noqa: E402

BARE = """
import socketserver, subprocess, sys, xmlrpc.server
class Server(socketserver.ThreadingMixIn, xmlrpc.server.SimpleXMLRPCServer):
    daemon_threads = True
class Handler(xmlrpc.server.SimpleXMLRPCRequestHandler):
    protocol_version = 'HTTP/1.1'
def run(cmd):
    done = subprocess.run(cmd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return [done.returncode, xmlrpc.client.Binary(done.stdout), xmlrpc.client.Binary(done.stderr)]
server = Server(('127.0.0.1', 0), Handler, logRequests=False)
server.register_function(run)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def bare_server():
    process = subprocess.Popen([sys.executable, '-c', BARE], stdout=subprocess.PIPE)
    try:
        yield 'http://127.0.0.1:%d/' % int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def ssh_server(folder):
    """The words of an ssh command to a server of our own; None where there is no OpenSSH."""
    sshd = shutil.which('sshd') or '/usr/sbin/sshd'
    if not os.path.exists(sshd) or not shutil.which('ssh'):
        yield None
        return
    key, port = os.path.join(folder, 'key'), free_port()
    subprocess.check_call(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', key])
    os.makedirs('/run/sshd', exist_ok=True)
    options = ['ListenAddress=127.0.0.1', 'HostKey=' + key, 'AuthorizedKeysFile=' + key + '.pub',
               'StrictModes=no', 'PidFile=none', 'UsePAM=no', 'MaxStartups=100']
    process = subprocess.Popen([sshd, '-D', '-p', str(port), '-f', '/dev/null'] +
                               [word for option in options for word in ('-o', option)],
                               stderr=subprocess.DEVNULL)
    words = ['ssh', '-p', str(port), '-i', key, '-o', 'StrictHostKeyChecking=no',
             '-o', 'UserKnownHostsFile=/dev/null', '-o', 'LogLevel=ERROR', '-F', 'none', '127.0.0.1']
    try:
        wait_until(lambda: subprocess.call(words + ['true'], stderr=subprocess.DEVNULL) == 0, 10)
        yield words
    except AssertionError:
        yield None
    finally:
        process.terminate()
        process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def run_true(api):
    cmd_id = api.runCmd('bench', 'true')
    call = xmlrpc.client.MultiCall(api)        # waiting for the end, and the result, in one request
    call.waitCmd(cmd_id, 60)
    call.getCmdResults(cmd_id)
    _, results = call()
    assert results['exitCodeOrSignal'] == 0


def clock(call):
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1000


def round_trips(calls, rounds):
    """{name: milliseconds}, each round taking all in turn."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(clock(call))
    return times


def per_second(make_call, clients, each):
    def client():
        call = make_call()
        for _ in range(each):
            call()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clients * each / (time.perf_counter() - begin)


def memory(pid):
    """Resident MiB of a process, its children's own pages with it."""
    total = 0
    for number in [pid] + children(pid):
        with contextlib.suppress(OSError), open('/proc/%d/smaps_rollup' % number) as file:
            fields = dict(line.split(':') for line in file if ':' in line and not line[0].isdigit())
            total += int(fields['Rss' if number == pid else 'Private_Dirty'].split()[0])
    return total / 1024


def children(pid):
    with contextlib.suppress(OSError), open('/proc/%d/task/%d/children' % (pid, pid)) as file:
        return [int(word) for word in file.read().split()]
    return []


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='fewer rounds and guests')
    quick = parser.parse_args().quick
    rounds, guests = (50, 20) if quick else (400, 200)
    folder = tempfile.mkdtemp()
    try:
        bench(folder, rounds, guests)
    finally:
        shutil.rmtree(folder)


def bench(folder, rounds, guests):
    with Host(os.path.join(folder, 'host')) as host, bare_server() as bare, ssh_server(folder) as ssh:
        with Agent(os.path.join(folder, 'guest'), host, 'bench') as guest:
            latency(host, bare, ssh, rounds)
            throughput(host, bare, rounds // 4)
            wait_until(lambda: memory(guest.process.pid) > 0, 5)
            print('memory, idle guest agent          %6.1f MiB (target: at most 30)'
                  % memory(guest.process.pid))
        many(folder, host, guests)


def latency(host, bare, ssh, rounds):
    api, bare_api = host.api, xmlrpc.client.ServerProxy(bare)
    times = round_trips({'vmhost': lambda: run_true(api), 'bare': lambda: bare_api.run(['true'])}, rounds)
    if ssh:        # by itself: its third of a second of cryptography leaves the others' caches cold
        times.update(round_trips({
            'ssh': lambda: subprocess.check_call(ssh + ['true'], stdin=subprocess.DEVNULL)}, rounds // 10))
    p50 = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print('true, %-7s p50 %7.2f ms  p99 %7.2f ms  %.2f times bare' % (
            name, p50[name], sorted(values)[int(len(values) * 0.99)], p50[name] / p50['bare']))
    met = p50['vmhost'] <= 3 * p50['bare']
    print('target: vmhost at most 3 times bare: %s' % ('met' if met else 'MISSED'))


def throughput(host, bare, each):
    ours = per_second(lambda: (lambda api: lambda: run_true(api))(host.api), 16, each)
    theirs = per_second(lambda: (lambda api: lambda: api.run(['true']))(xmlrpc.client.ServerProxy(bare)),
                        16, each)
    print('16 clients: vmhost %.0f commands/s, bare %.0f, ratio %.2f' % (ours, theirs, ours / theirs))


def many(folder, host, count):
    agents = [Agent(os.path.join(folder, 'many%d' % n), host, 'many%d' % n) for n in range(count)]
    try:
        for agent in agents:
            agent.start(wait=False)
        with host.api as api:
            wait_until(lambda: len(api.listVMs()) >= count, 300)
            times = [clock(lambda: multicast(api)) for _ in range(5)]
        print('multicast, %d guests: median %.0f ms' % (count, statistics.median(times)))
        print('memory, host with %d guests       %6.1f MiB' % (count, memory(host.process.pid)))
    finally:
        for agent in agents:
            if agent.process is not None:
                agent.process.send_signal(signal.SIGTERM)
        for agent in agents:
            agent.stop(timeout=60)


def multicast(api):
    cmd_id = api.runCmdOnAll('many*', 'true')
    while not api.waitCmd(cmd_id, 60):
        pass


if __name__ == '__main__':
    main()
