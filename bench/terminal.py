"""What a person at a terminal waits for: python bench/terminal.py [--keys N] [--megabytes N] [--sshd FILE]

The echo of a key, from the write to a pseudo-terminal here until it can be read there again: with ``shell``
on it, with ``ssh localhost`` where there is an sshd (a server of its own, on a free port, with keys made for
it), and over a bare TCP connection with a pseudo-terminal behind it, some lines of Python. Keys go in turn,
one to each. Then how fast ``run -i`` passes input, whole and exact.
"""

import argparse
import contextlib
import hashlib
import os
import pty
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [TOP, os.path.join(TOP, 'tests')]

from agents import Agent, Host  # noqa: E402

TARGET = 3.0                   # times what a key takes over ssh
FASTEST = 50.0                 # megabytes a second that run -i should pass
SHELL = "stty -icanon; echo beg''un; exec cat > /dev/null\r"       # whose terminal echoes each key


class Terminal:
    """A pseudo-terminal with a program on it."""

    def __init__(self, words):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvp(words[0], words)
        self.wait_for(b'$', b'#', b'%', b'>')
        os.write(self.fd, SHELL.encode())
        self.wait_for(b'begun')
        time.sleep(0.3)
        self.drain()

    def wait_for(self, *texts):
        seen = b''
        while not any(text in seen for text in texts):
            assert select.select([self.fd], [], [], 20)[0], seen
            seen += os.read(self.fd, 65536)

    def drain(self):
        while select.select([self.fd], [], [], 0)[0]:
            os.read(self.fd, 65536)

    def echo(self):
        """Seconds until a key is shown."""
        begin = time.perf_counter()
        os.write(self.fd, b'x')
        data = b''
        while b'x' not in data:
            data += os.read(self.fd, 65536)
        return time.perf_counter() - begin

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)
        os.close(self.fd)


class Bare:
    """A terminal behind a TCP connection, and the program that relays it here."""

    RELAY = ('import os, select, socket, sys, tty\ntty.setraw(0)\n'
             's = socket.create_connection(("127.0.0.1", %d))\n'
             's.setsockopt(6, 1, 1)\n'
             'while True:\n'
             '    ready = select.select([0, s], [], [])[0]\n'
             '    if 0 in ready: s.sendall(os.read(0, 65536))\n'
             '    if s in ready:\n'
             '        data = s.recv(65536)\n'
             '        if not data: break\n'
             '        os.write(1, data)\n')

    def __init__(self):
        self._listener = socket.create_server(('127.0.0.1', 0)) if hasattr(socket, 'create_server') else None
        self.words = [sys.executable, '-c', self.RELAY % self._listener.getsockname()[1]]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        connection, _ = self._listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pid, terminal = pty.fork()
        if pid == 0:
            os.execvp('sh', ['sh', '-i'])
        with contextlib.suppress(OSError):
            while True:
                ready = select.select([terminal, connection], [], [])[0]
                if connection in ready:
                    data = connection.recv(65536)
                    if not data:
                        break
                    os.write(terminal, data)
                if terminal in ready:
                    connection.sendall(os.read(terminal, 65536))
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def start_sshd(program, folder):
    """(the server, the words that log in there)."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    ours, theirs = os.path.join(folder, 'key'), os.path.join(folder, 'key-of-sshd')
    for path in ours, theirs:
        subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', path], check=True)
    os.makedirs('/run/sshd', exist_ok=True)
    server = subprocess.Popen([
        program, '-D', '-e', '-f', '/dev/null', '-p', str(port), '-h', theirs] + [
        '-o' + option for option in (
            'ListenAddress=127.0.0.1', 'StrictModes=no', 'UsePAM=no', 'PermitRootLogin=yes', 'PidFile=none',
            'AuthorizedKeysFile=%s.pub' % ours)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port)):
            break
        time.sleep(0.05)
    options = ['-oStrictHostKeyChecking=no', '-oUserKnownHostsFile=/dev/null', '-oLogLevel=ERROR']
    return server, ['ssh', '-tt', '-p', str(port), '-i', ours, '-F', '/dev/null'] + options + [
        '127.0.0.1', 'sh -i']


def measure_keys(terminals, count):
    """{name: [seconds]}: a key to each in turn, as far apart as a fast typist's."""
    times = {name: [] for name in terminals}
    for _ in range(count):
        for name, terminal in terminals.items():
            times[name].append(terminal.echo())
            time.sleep(0.02)
    return times


def report_keys(times):
    """Prints a line for each; whether the target is met."""
    for name, values in times.items():
        print('%-6s echo of a key: p50 %5.2f ms, p95 %5.2f ms' % (
            name, 1000 * statistics.median(values), 1000 * sorted(values)[int(0.95 * len(values))]))
    peer = 'ssh' if 'ssh' in times else 'bare'
    ratio = statistics.median(times['shell']) / statistics.median(times[peer])
    met = ratio <= TARGET
    print('%-7s %.1f times that over %s (target: at most %g, over ssh)' % (
        'met' if met else 'MISSED', ratio, peer, TARGET))
    return met


def measure_input(host, megabytes):
    """Prints how fast run -i passes that much; whether the target is met."""
    piece = os.urandom(2 ** 20)
    best = 0.0
    for _ in range(3):
        begin = time.perf_counter()
        process = subprocess.Popen(host.command('run', '-i', 'one', 'sha1sum'), stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE)
        wanted = hashlib.sha1()
        for _ in range(megabytes):
            process.stdin.write(piece)
            wanted.update(piece)
        process.stdin.close()
        assert process.stdout.read().split()[0].decode() == wanted.hexdigest()
        process.wait()
        process.stdout.close()
        best = max(best, megabytes * 2 ** 20 / 1e6 / (time.perf_counter() - begin))
    print('%-7s run -i: %.0f MB/s (target: %.0f)' % ('met' if best >= FASTEST else 'MISSED', best, FASTEST))
    return best >= FASTEST


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--keys', type=int, default=300)
    parser.add_argument('--megabytes', type=int, default=200)
    parser.add_argument('--sshd', default=shutil.which('sshd') or '/usr/sbin/sshd')
    args = parser.parse_args()
    folder = tempfile.mkdtemp()
    server = None
    terminals = {}
    try:
        with Host(os.path.join(folder, 'host')) as host, \
                Agent(os.path.join(folder, 'guest'), host, 'one') as guest:
            terminals = {'bare': Terminal(Bare().words), 'shell': Terminal(host.command('shell', 'one'))}
            if os.path.exists(args.sshd):
                server, words = start_sshd(args.sshd, folder)
                terminals['ssh'] = Terminal(words)
            met = report_keys(measure_keys(terminals, args.keys))
            for terminal in terminals.values():
                terminal.close()
            terminals = {}
            guest.end_programs()       # the shell would go on
            return 0 if measure_input(host, args.megabytes) and met else 1
    finally:
        for terminal in terminals.values():
            terminal.close()
        if server is not None:
            server.terminate()
            server.wait()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == '__main__':
    sys.exit(main())
