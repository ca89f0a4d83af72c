"""The embedded broker beside others, in one run: python bench/broker.py [--quick] [--only WORD…]

Ours (``python stompbroker.py``), CoilMQ (from PyPI, into an environment of its own),
and RabbitMQ and ActiveMQ where Debian's packages are installed: each a process of its own on a free
port of loopback, all brokers in turn for each measurement, several rounds after one that isn't counted.
Prints medians, and whether ours is where it should be, as ratios.

The load comes from this process: raw sockets, frames made beforehand, and frames that arrive are
counted by their NULs. ``load`` says how much of a core it took of the time of the streams: where that
is near 100 %, it and not the broker sets the pace.
"""

import argparse
import contextlib
import os
import re
import resource
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import venv

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [TOP, os.path.join(TOP, 'tests')]

import brokers  # noqa: E402
from helpers import wait_until  # noqa: E402

PATIENCE = 10.0                     # seconds without any progress, then a measurement has failed
IN_FLIGHT = 100000                  # deliveries; a stream is at most so far ahead of its subscribers
SMALL = b'x' * 64
LARGE = b'x' * (4 * 1024 * 1024)


# --- brokers -----------------------------------------------------------------------------------

def frame(command, headers, body=b''):
    lines = ''.join('%s:%s\n' % item for item in headers.items())
    return b'%b\n%b\n%b\0' % (command.encode(), lines.encode(), body)


class Ours(brokers.ExternalBroker):
    """stompbroker.py by itself."""
    name = 'ours'
    tree = TOP

    @classmethod
    def missing(cls):
        return ''

    def launch(self):
        self.process = self.spawn([sys.executable, os.path.join(self.tree, 'stompbroker.py'),
                                   '--port', str(self.port)], {})


class Before(Ours):
    """The same of another tree, which --before names."""
    name = 'before'
    tree = ''

    @classmethod
    def missing(cls):
        return '' if cls.tree else 'needs --before TREE'


class CoilMQ(brokers.ExternalBroker):
    """CoilMQ of PyPI, with its queues in memory."""
    name = 'CoilMQ'
    connect = frame('CONNECT', {})     # it knows no names of hosts, so STOMP 1.0
    python = sys.executable

    @classmethod
    def missing(cls):
        """Installs it where it isn't; gives why that failed, or ''."""
        if subprocess.call([sys.executable, '-c', 'import coilmq'], stderr=subprocess.DEVNULL) == 0:
            return ''
        cls.home = tempfile.mkdtemp()
        venv.create(cls.home, with_pip=True)
        cls.python = os.path.join(cls.home, 'bin', 'python')
        done = subprocess.call([cls.python, '-m', 'pip', 'install', '-q', 'coilmq', 'setuptools<81'],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return 'could not be installed from PyPI' if done else ''

    @classmethod
    def clean_up(cls):
        if cls.python != sys.executable:
            shutil.rmtree(cls.home)

    def launch(self):
        self.process = self.spawn([self.python, '-c', 'from coilmq.start import main; main()',
                                   '-b', '127.0.0.1', '-p', str(self.port)], {})


class OpenRabbitMQ(brokers.RabbitMQ):
    """With a user who may do everything, so that no rights are looked up."""

    def definitions(self):
        return super().definitions().replace('stomp-.*|amq\\\\.topic', '.*').replace('stomp-.*', '.*')


class OpenActiveMQ(brokers.ActiveMQ):
    """Without users and their rights, which cost it time; with the memory that Debian gives it."""
    options = ['-Xms512M', '-Xmx512M']

    def configuration(self):
        return re.sub('<plugins>.*</plugins>', '', super().configuration(), flags=re.DOTALL)


CANDIDATES = (Ours, Before, CoilMQ, OpenRabbitMQ, OpenActiveMQ)


def pages_of(broker):
    """Resident KiB of a broker's process and its children."""
    total = 0
    for number in family(broker.process.pid):
        with contextlib.suppress(OSError), open('/proc/%d/statm' % number) as file:
            total += int(file.read().split()[1]) * resource.getpagesize() // 1024
    return total


def family(number):
    with contextlib.suppress(OSError), open('/proc/%d/task/%d/children' % (number, number)) as file:
        return [number] + [each for child in file.read().split() for each in family(int(child))]
    return [number]


# --- clients -----------------------------------------------------------------------------------

class Failed(Exception):
    """A broker didn't do what was measured."""


def send_frame(destination, body=SMALL, **headers):
    return frame('SEND', dict({'destination': destination, 'content-length': len(body)}, **headers), body)


def subscribe_frame(destination):
    return frame('SUBSCRIBE', {'id': '0', 'destination': destination, 'ack': 'auto', 'receipt': 'r'})


class Client:
    """A connection with blocking calls that wait for a number of frames."""

    def __init__(self, broker, destination=''):
        self.socket = socket.create_connection(('127.0.0.1', broker.port), PATIENCE)
        self.socket.settimeout(PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(broker.connect)
        self.expect(1, b'CONNECTED')
        if destination:
            self.socket.sendall(subscribe_frame(destination))
            self.expect(1, b'RECEIPT')

    def expect(self, frames, begin=b''):
        """Reads until so many frames have come."""
        head = b''
        while frames > 0:
            try:
                data = self.socket.recv(262144)
            except socket.timeout:
                raise Failed('no answer for %g s' % PATIENCE)
            if not data:
                raise Failed('the connection was closed')
            head = head or data.lstrip()
            frames -= data.count(b'\0')
        if not head.startswith(begin):
            raise Failed('%r instead of %r' % (head[:100], begin))

    def close(self):
        self.socket.close()


@contextlib.contextmanager
def clients(broker, count, destination=''):
    opened = []
    try:
        for _ in range(count):
            opened.append(Client(broker, destination))
        yield opened
    except OSError as error:
        raise Failed(str(error))
    finally:
        for client in opened:
            client.close()


class Stream:
    """One publisher, many subscribers, as fast as they can for a while."""
    load = []                         # what part of a core each stream took of this process

    def __init__(self, publisher, subscribers, data, per_chunk, window):
        self.publisher = publisher.socket
        self.data, self.per_chunk, self.window = data, per_chunk, window
        self.sent = self.received = 0
        self.count = len(subscribers)
        self.rest = memoryview(b'')
        self.buffer = bytearray(1024 * 1024)
        self.poll = select.epoll()
        self.readers = {}
        self.publisher.setblocking(False)
        for subscriber in subscribers:
            subscriber.socket.setblocking(False)
            self.readers[subscriber.socket.fileno()] = subscriber.socket
            self.poll.register(subscriber.socket, select.EPOLLIN)
        self.poll.register(self.publisher, select.EPOLLIN)

    def run(self, seconds):
        """Deliveries per second. Raises Failed."""
        begin = self.progress = time.perf_counter()
        cpu = time.process_time()
        blocked = False
        try:
            while True:
                now = time.perf_counter()
                if not self.rest and now - begin < seconds and self.has_room():
                    self.rest = memoryview(self.data)
                    self.sent += self.per_chunk
                if self.rest and not blocked:
                    blocked = self.write()
                if not self.rest and self.received >= self.sent * self.count and now - begin >= seconds:
                    break
                blocked = self.turn(0 if self.rest and not blocked or self.has_room() else 0.2, blocked)
                if now - self.progress > PATIENCE:
                    raise Failed('%d of %d messages came' % (self.received, self.sent * self.count))
        except OSError as error:
            raise Failed(str(error))
        finally:
            self.poll.close()
        elapsed = time.perf_counter() - begin
        self.load.append((time.process_time() - cpu) / elapsed)
        return self.received / elapsed

    def has_room(self):
        return self.sent * self.count - self.received < self.window * self.count

    def write(self):
        """Whether the socket takes no more now."""
        try:
            self.rest = self.rest[self.publisher.send(self.rest):]
            return False
        except BlockingIOError:
            self.poll.modify(self.publisher, select.EPOLLIN | select.EPOLLOUT)
            return True

    def turn(self, timeout, blocked):
        """Reads what there is; gives whether the publisher is blocked still."""
        buffer = self.buffer
        for number, events in self.poll.poll(timeout):
            reader = self.readers.get(number)
            if reader is not None:
                size = reader.recv_into(buffer)
                if not size:
                    raise Failed('a subscriber was cut off')
                self.received += buffer.count(b'\0', 0, size)
                self.progress = time.perf_counter()
            elif events & select.EPOLLOUT:
                self.poll.modify(self.publisher, select.EPOLLIN)
                blocked = False
            else:
                raise Failed('the publisher was told %r' % self.publisher.recv(200))
        return blocked


# --- measurements: each takes a broker and seconds, gives a number -------------------------------

def connect_ms(broker, seconds):
    """p50 of TCP connection to CONNECTED."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        client = Client(broker)
        times.append(time.perf_counter() - begin)
        client.close()
    return statistics.median(times) * 1000


def round_trips(broker, seconds):
    """p50 and p99 of request and reply over topics, in ms."""
    with clients(broker, 1, '/topic/requests') as (server,), \
            clients(broker, 1, '/topic/replies') as (client,):
        request, reply = send_frame('/topic/requests'), send_frame('/topic/replies')
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            client.socket.sendall(request)
            server.expect(1)
            server.socket.sendall(reply)
            client.expect(1)
            times.append((time.perf_counter() - begin) * 1000)
    times.sort()
    return times[len(times) // 2], times[int(len(times) * 0.99)]


def streamed(destination, subscribers):
    def measure(broker, seconds):
        window = min(20000, IN_FLIGHT // subscribers)
        with clients(broker, 1) as (publisher,), clients(broker, subscribers, destination) as readers:
            data = send_frame(destination) * (window // 10)
            return Stream(publisher, readers, data, window // 10, window).run(seconds)
    return measure


def confirmed(destination, subscribers):
    """Deliveries per second when the publisher waits for a receipt, and for all to have the message."""
    def measure(broker, seconds):
        with clients(broker, 1) as (publisher,), clients(broker, subscribers, destination) as readers:
            data, count = send_frame(destination, receipt='r'), 0
            begin = time.perf_counter()
            while time.perf_counter() - begin < seconds:
                publisher.socket.sendall(data)
                publisher.expect(1)
                for reader in readers:
                    reader.expect(1)
                count += subscribers
            return count / (time.perf_counter() - begin)
    return measure


def large_bodies(broker, seconds):
    """MB/s of 4 MiB bodies, two on their way at a time."""
    with clients(broker, 1) as (publisher,), clients(broker, 1, '/topic/large') as readers:
        data = send_frame('/topic/large', LARGE)
        return Stream(publisher, readers, data, 1, 2).run(seconds) * len(LARGE) / 1e6


def with_and_without_stalled(broker, seconds):
    """How much of their throughput nine subscribers keep beside one that never reads."""
    rates = []
    for stalled in (0, 1):
        with clients(broker, 1) as (publisher,), clients(broker, 9, '/topic/stall') as readers, \
                clients(broker, stalled, '/topic/stall'):
            data = send_frame('/topic/stall', b'x' * 1024) * 100
            rates.append(Stream(publisher, readers, data, 100, 1000).run(2 * seconds))
    return rates[1] / rates[0]


def thousand(broker, seconds):
    """1,000 at once: seconds to connect and subscribe, and ms to reach all."""
    begin = time.perf_counter()
    with crowd(broker, 1000) as readers, clients(broker, 1) as (publisher,):
        connected = time.perf_counter() - begin
        begin = time.perf_counter()
        publisher.socket.sendall(send_frame('/topic/all'))
        await_frames(readers, 1)
        return connected, (time.perf_counter() - begin) * 1000


def memory(broker, seconds):
    """KiB that each of 1,000 connections costs a broker that was just started."""
    with tempfile.TemporaryDirectory() as folder, type(broker)(folder) as fresh:
        with clients(fresh, 10, '/topic/all') as readers:
            with clients(fresh, 1) as (publisher,):
                publisher.socket.sendall(send_frame('/topic/all') * 100)
                for reader in readers:
                    reader.expect(100)
        before = settled_pages(fresh)
        with crowd(fresh, 1000) as readers:
            return (settled_pages(fresh) - before) / len(readers)


def settled_pages(broker):
    """A broker's memory once it has been the same for a moment."""
    seen = [pages_of(broker)]

    def settled():
        time.sleep(0.3)                # the interval of this measurement, not a wait for an event
        seen.append(pages_of(broker))
        return abs(seen[-1] - seen[-2]) < 256

    with contextlib.suppress(AssertionError):
        wait_until(settled, 5)
    return seen[-1]


@contextlib.contextmanager
def crowd(broker, count):
    """Connections that were opened all at once, connected and subscribed."""
    readers = []
    try:
        for _ in range(count):
            reader = socket.socket()
            readers.append(reader)
            reader.setblocking(False)
            reader.connect_ex(('127.0.0.1', broker.port))
        for reader in readers:
            waiting = select.poll()
            waiting.register(reader, select.POLLOUT)
            waiting.poll(PATIENCE * 1000)
            reader.send(broker.connect + subscribe_frame('/topic/all'))
        await_frames(readers, 2)
        yield readers
    finally:
        for reader in readers:
            reader.close()


def await_frames(readers, count):
    """Reads until each has got so many frames."""
    with contextlib.closing(select.epoll()) as poll:
        missing = {}
        for reader in readers:
            poll.register(reader, select.EPOLLIN)
            missing[reader.fileno()] = [reader, count]
        while missing:
            ready = poll.poll(PATIENCE)
            if not ready:
                raise Failed('%d of %d got nothing for %g s' % (len(missing), len(readers), PATIENCE))
            for number, _ in ready:
                data = missing[number][0].recv(65536)
                if not data:
                    raise Failed('a connection was closed')
                missing[number][1] -= data.count(b'\0')
                if missing[number][1] <= 0:
                    poll.unregister(number)
                    del missing[number]


# What is measured: name, function, what its numbers are called, and how they are written.
MEASUREMENTS = (
    ('connect', connect_ms, (('connect p50, ms', '%.2f'),)),
    ('reply', round_trips, (('request and reply p50, ms', '%.3f'), ('request and reply p99, ms', '%.3f'))),
    ('topic', streamed('/topic/one', 1), (('one to one, topic, streamed, /s', '%.0f'),)),
    ('queue', streamed('/queue/one', 1), (('one to one, queue, streamed, /s', '%.0f'),)),
    ('100', streamed('/topic/hundred', 100), (('one to 100, streamed, /s', '%.0f'),)),
    ('500', streamed('/topic/many', 500), (('one to 500, streamed, /s', '%.0f'),)),
    ('topic-receipts', confirmed('/topic/one', 1), (('one to one, topic, receipts, /s', '%.0f'),)),
    ('queue-receipts', confirmed('/queue/one', 1), (('one to one, queue, receipts, /s', '%.0f'),)),
    ('100-receipts', confirmed('/topic/hundred', 100), (('one to 100, receipts, /s', '%.0f'),)),
    ('500-receipts', confirmed('/topic/many', 500), (('one to 500, receipts, /s', '%.0f'),)),
    ('large', large_bodies, (('4 MiB bodies, MB/s', '%.0f'),)),
    ('stalled', with_and_without_stalled, (('kept beside a stalled one', '%.2f'),)),
    ('thousand', thousand, (('1,000 connect and subscribe, s', '%.2f'), ('1,000 reached, ms', '%.0f'))),
    ('memory', memory, (('KiB per idle connection', '%.1f'),)),
)

# Ours against another: what, whom (None: the number itself), and the ratio that ours must reach at least
# (negative: stay at most at).
TARGETS = (
    ('one to one, topic, streamed, /s', 'ActiveMQ', 1.5), ('one to one, topic, streamed, /s', 'RabbitMQ', 6),
    ('one to 100, streamed, /s', 'ActiveMQ', 4), ('one to 100, streamed, /s', 'RabbitMQ', 10),
    ('one to 500, streamed, /s', 'ActiveMQ', 4), ('one to 500, streamed, /s', 'RabbitMQ', 10),
    ('one to one, topic, receipts, /s', 'CoilMQ', 1), ('one to one, topic, receipts, /s', 'RabbitMQ', 1),
    ('one to one, queue, receipts, /s', 'CoilMQ', 1), ('one to one, queue, receipts, /s', 'RabbitMQ', 1),
    ('one to 100, receipts, /s', 'CoilMQ', 1), ('one to 100, receipts, /s', 'RabbitMQ', 1),
    ('one to 500, receipts, /s', 'CoilMQ', 1), ('one to 500, receipts, /s', 'RabbitMQ', 1),
    ('request and reply p50, ms', 'ActiveMQ', -1), ('4 MiB bodies, MB/s', 'RabbitMQ', 0.5),
    ('1,000 connect and subscribe, s', 'RabbitMQ', -1 / 3), ('KiB per idle connection', None, -25),
    ('kept beside a stalled one', None, 0.9),
)


# --- the run -----------------------------------------------------------------------------------

def measure_all(running, only, rounds, seconds):
    """{what: {broker's name: [numbers]}}; a broker that failed has none for that."""
    results = {}
    for number in range(rounds + 1):
        for name, measure, figures in MEASUREMENTS:
            if only and name not in only:
                continue
            for broker in running:
                values = attempt(measure, broker, seconds)
                for (what, _), value in zip(figures, values):
                    if number:
                        results.setdefault(what, {}).setdefault(broker.name, []).append(value)
        print('round %d of %d' % (number, rounds), file=sys.stderr)
    return results


def attempt(measure, broker, seconds):
    """The numbers of one measurement, of one broker; None for each where it failed."""
    try:
        values = measure(broker, seconds)
        return values if isinstance(values, tuple) else (values,)
    except (Failed, OSError) as error:
        print('%s, %s: %s' % (broker.name, getattr(measure, '__qualname__', ''), error), file=sys.stderr)
        broker.stop(signal.SIGKILL)        # what it still carries would be in the way of the next
        broker.start()
        return (None, None, None)


def median(numbers):
    """The median of what was measured; None where more than half of the rounds failed."""
    good = [number for number in numbers if number is not None]
    return statistics.median(good) if len(good) * 2 > len(numbers) else None


def report(results, names):
    medians = {what: {name: median(numbers) for name, numbers in of.items()}
               for what, of in results.items()}
    print('%-34s' % 'medians' + ''.join('%11s' % name for name in names))
    for _, _, figures in MEASUREMENTS:
        for what, form in figures:
            if what in medians:
                print('%-34s' % what + ''.join('%11s' % (
                    'fails' if medians[what][name] is None else form % medians[what][name])
                    for name in names))
    if Stream.load:
        print('load: %.0f %% of a core, median of the streams' % (100 * statistics.median(Stream.load)))
    print()
    return sum([judge(medians, *target) for target in TARGETS])


def judge(medians, what, whom, target):
    """Prints one target; gives 1 where it was missed."""
    ours = medians.get(what, {}).get('ours')
    if what not in medians or whom and whom not in medians[what]:
        return 0
    theirs = medians[what][whom] if whom else 1
    if theirs is None:
        print('met     %-34s %s fails' % (what, whom))
        return 0
    ratio = None if ours is None else ours / theirs
    met = ratio is not None and (ratio >= target if target > 0 else ratio <= -target)
    print('%-7s %-34s %s %s  (at %s %.2f)' % (
        'met' if met else 'MISSED', what, 'fails' if ratio is None else '%.2f' % ratio,
        'times ' + whom if whom else '', 'least' if target > 0 else 'most', abs(target)))
    return 0 if met else 1


def main():
    """Exits with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='short measurements, one round')
    parser.add_argument('--rounds', type=int, help='counted rounds')
    parser.add_argument('--only', nargs='+', choices=[each[0] for each in MEASUREMENTS], metavar='WORD',
                        help='these measurements: ' + ', '.join(each[0] for each in MEASUREMENTS))
    parser.add_argument('--brokers', nargs='+',
                        default=[each.name for each in CANDIDATES if each is not Before],
                        choices=[each.name for each in CANDIDATES], help='these brokers')
    parser.add_argument('--before', metavar='TREE', help='the broker of another checkout as well, for ratios')
    chosen = parser.parse_args()
    Before.tree = chosen.before and os.path.abspath(chosen.before)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    folder = tempfile.mkdtemp()
    try:
        with contextlib.ExitStack() as stack:
            running = start_brokers(chosen.brokers, folder, stack)
            results = measure_all(running, chosen.only, chosen.rounds or (1 if chosen.quick else 5),
                                  0.3 if chosen.quick else 1.0)
            return min(1, report(results, [broker.name for broker in running]))
    finally:
        CoilMQ.clean_up()
        shutil.rmtree(folder)


def start_brokers(names, folder, stack):
    running = []
    for kind in CANDIDATES:
        if kind.name not in names and not (kind is Before and kind.tree):
            continue
        missing = kind.missing()
        if missing:
            print('%s is left out: %s' % (kind.name, missing))
        else:
            broker = kind(os.path.join(folder, kind.name.lower()))
            stack.callback(broker.stop)
            running.append(broker.start())
    return running


if __name__ == '__main__':
    sys.exit(main())
