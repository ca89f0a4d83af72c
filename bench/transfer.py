"""How fast files go over Chirp: python bench/transfer.py [--quick] [--rounds N]

In one run, in turns, medians: our client and server in each combination with the real ones (cctools),
scp, and as the limit a bare socket loop with sendfile. A large file, and a folder of small ones, put
and get; the time of a stat and of a new connection, where the limit is a program that answers whatever comes
with the same bytes. Then the ratios that are promised: each is the median of its rounds' own, for what is
measured minutes apart met other weather. Beside some stands the limit's own against the same rival: where
the limit misses it, too, this machine and its Python can't have it.
"""

import argparse
import contextlib
import os
import pathlib
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

from commands import ssh_server  # noqa: E402
from test_chirp import real_server  # noqa: E402

import chirp  # noqa: E402

SERVE = """
import sys, chirp
with chirp.ChirpServer(sys.argv[1], allow=['127.0.0.1']) as server:
    print(server.address[1], flush=True)
    sys.stdin.read()
"""

# The least that a server in Python does for a request.
ANSWER = """
import socket, sys, threading
reply = b'0\\n64768 1234567 16877 12 0 0 0 4096 4096 8 1700000000 1700000000 1700000000\\n'
def accept():
    while True:
        threading.Thread(target=answer, args=listener.accept()[:1], daemon=True).start()
def answer(sock):
    with sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while sock.recv(65536):
            sock.send(reply)
listener = socket.socket()
listener.bind(('127.0.0.1', 0))
listener.listen(64)
threading.Thread(target=accept, daemon=True).start()
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def a_server(program, *words):
    """Where it listens, in a process of its own, as a guest has it."""
    process = subprocess.Popen([sys.executable, '-c', program] + list(words), stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=TOP))
    try:
        yield '127.0.0.1', int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def call(*words):
    subprocess.check_call([str(word) for word in words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def remove(path):
    shutil.rmtree(str(path), ignore_errors=True)
    with contextlib.suppress(OSError):
        os.unlink(str(path))


def our_way(address, verify):
    """(put, get) by our client."""
    def put(source, target):
        with chirp.ChirpClient(*address) as client:
            client.put(str(source), target, verify=verify, keep=verify)

    def get(source, target):
        with chirp.ChirpClient(*address) as client:
            client.get(source, str(target), verify=verify, keep=verify)
    return put, get


def real_way(address):
    """(put, get) by the real client."""
    at = ['chirp', '-a', 'address', '%s:%d' % address]
    return (lambda source, target: call(*(at + ['put', source, target])),
            lambda source, target: call(*(at + ['get', source, target])))


def scp_way(words, folder):
    """(put, get) by scp, to and from the folder."""
    options = ['scp', '-O', '-q', '-r', '-P'] + words[2:-1]        # -O: that sshd has no sftp
    return (lambda source, target: call(*(options + [source, '127.0.0.1:%s%s' % (folder, target)])),
            lambda source, target: call(*(options + ['127.0.0.1:%s%s' % (folder, source), target])))


def limit_way(folder):
    """(put, get) of a file over a bare socket: sendfile here, recv_into and write there."""
    def move(source, target):
        near, far = socket.socketpair()

        def send():
            with open(str(source), 'rb') as file, near:
                near.sendfile(file)
        thread = threading.Thread(target=send)
        thread.start()
        view = memoryview(bytearray(512 * 1024))
        with open(str(target), 'wb', buffering=0) as file, far:
            for count in iter(lambda: far.recv_into(view), 0):
                file.write(view[:count])
        thread.join()
    return (lambda source, target: move(source, str(folder) + target),
            lambda source, target: move(str(folder) + source, target))


def have_memory_at_hand(folder, size):
    """Lets a virtual machine have the memory that the next move fills: where its host takes free pages away,
    and gives them again one by one, that takes longer than the move, now and then, and chance decides."""
    block, path = bytes(1 << 20), str(folder / 'memory')
    with open(path, 'wb', buffering=0) as file:
        for _ in range(size >> 20):
            file.write(block)
    os.unlink(path)


def timed(do, *words):
    began = time.perf_counter()
    do(*words)
    return time.perf_counter() - began


def measure_moves(ways, sources, scratch, rounds):
    """{(way, row): [seconds of each round]}; the ways in turn, so that all meet the same weather, and each
    round begins with another one: what comes first meets an empty cache."""
    times, order = {}, list(ways.items())
    for _ in range(rounds):
        order = order[3:] + order[:3]
        for what, source in sources.items():
            for way, ((put, get), served) in order:
                if way == 'limit' and what == 'folder':
                    continue
                there, back = '/bench-' + what, scratch / 'back'
                remove(str(served) + there)
                for call, do, words in ('put ', put, (source, there)), ('get ', get, (there, back)):
                    if what == 'file':
                        have_memory_at_hand(scratch, source.stat().st_size * 9 // 8)
                    times.setdefault((way, call + what), []).append(timed(do, *words))
                remove(back)
                remove(str(served) + there)
    return times


@contextlib.contextmanager
def our_asking(address):
    """(what asks for a stat, what makes a new connection with its first answer), by our client."""
    def connect():
        with chirp.ChirpClient(*address) as client:
            client.connect()
    with chirp.ChirpClient(*address) as client:
        yield lambda: client.stat('/'), connect


@contextlib.contextmanager
def bare_asking(address):
    """The same by a bare socket."""
    def dial():
        sock = socket.create_connection(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def ask(sock):
        sock.send(b'stat /\n')
        sock.recv(65536)

    def connect():
        with dial() as sock:
            ask(sock)
    with dial() as sock:
        yield lambda: ask(sock), connect


def measure_latency(ways, rounds=10):
    """{(way, row): [seconds of each round]} of stats and of connecting; the ways in turn."""
    times = {}
    with contextlib.ExitStack() as stack:
        ways = {name: stack.enter_context(asking) for name, asking in ways.items()}
        for _ in range(rounds):
            for name, (ask, connect) in ways.items():
                ask()
                for row, do, count in ('stat', ask, 200), ('connecting', connect, 10):
                    times.setdefault((name, row), []).append(statistics.median(
                        timed(do) for _ in range(count)))
    return times


def promises(times):
    """(what, ratio, at least, the limit's ratio)."""
    def ratio(slow, fast, row):
        if (slow, row) in times and (fast, row) in times:
            return statistics.median(a / b for a, b in zip(times[slow, row], times[fast, row]))

    def promise(row, what, slow, fast, least):
        return row + ': ' + what, ratio(slow, fast, row), least, ratio(slow, 'limit', row)
    for row in ('put file', 'get file'):
        yield promise(row, 'ours, against the real pair', 'real/real', 'ours/ours', 0.9)
        yield promise(row, 'our client, real server', 'real/real', 'ours/real', 0.9)
        yield promise(row, 'ours, against scp', 'scp', 'ours/ours', 4)
        yield row + ': verified, against bare', ratio('ours/ours', 'ours/ours verified', row), 0.6, None
    for row in ('put folder', 'get folder'):
        yield promise(row, 'ours, against the real pair', 'real/real', 'ours/ours',
                      2 if row == 'put folder' else 4)
        yield promise(row, 'our client, real server', 'real/real', 'ours/real', 1)
    for row, least in ('stat', 3), ('connecting', 10):
        yield promise(row, 'ours, against the real server', 'real', 'ours', least)


def verdict(found, least, limit):
    if found >= least:
        return 'at least'
    return 'OUT OF REACH' if limit is not None and limit < least else 'MISSED'


def report(times, latency, size):
    for way, row in sorted(times, key=lambda key: (key[1], key[0])):
        seconds = statistics.median(times[way, row])
        print('%-12s %-22s %8.3f s%s' % (
            row, way, seconds, '  %6.0f MB/s' % (size / seconds / 1e6) if 'file' in row else ''))
    for name in sorted({name for name, _ in latency}):
        print('%-12s %-22s %8.0f us, connecting %8.0f us' % (
            'stat', name if name == 'limit' else 'our client/' + name,
            statistics.median(latency[name, 'stat']) * 1e6,
            statistics.median(latency[name, 'connecting']) * 1e6))
    print()
    for what, found, least, limit in promises({**times, **latency}):
        if found is not None:
            print('%-48s %6.2f  (%s %.2f)%s' % (what, found, verdict(found, least, limit), least,
                                                '' if limit is None else '  limit %6.2f' % limit))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='a tenth of the size')
    parser.add_argument('--rounds', type=int, default=3)
    words = parser.parse_args()
    size, count = (100 << 20, 500) if words.quick else (1 << 30, 5000)
    memory = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as top, contextlib.ExitStack() as stack:
        scratch = pathlib.Path(top)
        os.chmod(top, 0o755)
        for name in ('ours', 'real', 'transient', 'plain', 'key'):
            (scratch / name).mkdir()
        sources = make_sources(scratch, size, count)
        at = stack.enter_context(a_server(SERVE, str(scratch / 'ours')))
        ways = {'ours/ours': (our_way(at, False), scratch / 'ours'),
                'ours/ours verified': (our_way(at, True), scratch / 'ours'),
                'limit': (limit_way(scratch / 'plain'), scratch / 'plain')}
        asking = {'ours': our_asking(at), 'limit': bare_asking(stack.enter_context(a_server(ANSWER)))}
        if shutil.which('chirp_server'):
            real = stack.enter_context(real_server(scratch / 'real', scratch / 'transient'))
            asking['real'] = our_asking(real)
            ways.update({'ours/real': (our_way(real, False), scratch / 'real'),
                         'real/ours': (real_way(at), scratch / 'ours'),
                         'real/real': (real_way(real), scratch / 'real')})
        ssh = stack.enter_context(ssh_server(str(scratch / 'key')))
        if ssh:
            ways['scp'] = (scp_way(ssh, scratch / 'plain'), scratch / 'plain')
        times = measure_moves(ways, sources, scratch, words.rounds)
        report(times, measure_latency(asking), size)


def make_sources(scratch, size, count):
    large, folder = scratch / 'large', scratch / 'small'
    block = os.urandom(1 << 20)
    with open(str(large), 'wb') as file:
        for _ in range(size >> 20):
            file.write(block)
    folder.mkdir()
    for index in range(count):
        (folder / ('f%05d' % index)).write_bytes(block[index:index + 1024])
    return {'file': large, 'folder': folder}


if __name__ == '__main__':
    main()
