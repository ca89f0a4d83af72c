"""What many guests cost the host: python bench/guests.py [--guests 1000] [--seconds 40]

One real host agent with its own broker; the guests are connections of this process that say what real
agents say: HELLO, a beacon every 10 s, heart-beats, and for each command its results until they are
acknowledged. Prints what part of a core the host agent takes, whether every beacon was accounted for,
and how long one multicast takes until all have answered.
"""

import argparse
import collections
import contextlib
import heapq
import os
import resource
import selectors
import shutil
import socket
import sys
import tempfile
import threading
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [TOP, os.path.join(TOP, 'tests')]

from agents import Host  # noqa: E402
from helpers import wait_until  # noqa: E402

import agent  # noqa: E402
import protocol  # noqa: E402

BEACON = 10.0                 # seconds
HEARTBEAT = 10000             # ms, as guest.ini has it
RESULTS = {'state': 'exited', 'error': '', 'finished': True, 'exitCodeOrSignal': 0, 'wall': 0.01,
           'resources': dict.fromkeys(protocol.RUSAGE_FIELDS, 1), 'started': 1.0, 'ended': 1.01,
           'out': 'hello\n', 'err': '', 'out-size': 6, 'err-size': 0, 'out-offset': 0, 'err-offset': 0,
           'out-truncated': False, 'err-truncated': False}


class Guest:
    """One connection, and what an agent behind it would say."""

    def __init__(self, crowd, number):
        self.crowd = crowd
        self.id = '02:00:00:00:%02X:%02X' % divmod(number, 256)
        self.name = 'guest%d' % number
        self.reader = protocol.FrameReader(protocol.SERVER_COMMANDS, '1.2')
        self.beacons = 0
        self.said = 0.0                     # when the last beacon was
        self.unacknowledged = {}
        self.secret = os.urandom(32)
        self.nonce = protocol.new_nonce()
        self.session = None                 # what signs, once the host has greeted
        self.socket = socket.create_connection(('127.0.0.1', crowd.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.put('CONNECT', {'accept-version': '1.2', 'host': '/',
                             'heart-beat': '%d,%d' % (HEARTBEAT, HEARTBEAT)})
        self.put('SUBSCRIBE', {'id': '0', 'destination': protocol.CMD_REQUESTS, 'ack': 'auto',
                               'receipt': 'subscribed'})

    def put(self, command, headers, body=b''):
        self.crowd.frames += command == 'SEND'
        self.socket.sendall(protocol.encode(command, headers, body, '1.2'))

    def say(self, message):
        headers, body = dict(message.headers, **{'from': self.id}), message.body()
        if message.word != 'HELLO':
            headers = self.session.sign(message.topic, headers, body)
        self.put('SEND', dict(headers, destination=message.topic), body)

    def hello(self):
        self.say(protocol.HELLO.howToSay(
            self.id, '127.0.0.1', name=self.name, host=self.name, boot='boot', session=self.id,
            os='load script', python='3', version=agent.VERSION, cpus=1, mem=2 ** 30, cmds={},
            nonce=self.nonce, secret=self.secret.hex()))

    def beacon(self):
        self.beacons += 1
        self.said = time.time() - 0.001       # lastSeen is rounded
        self.say(protocol.STILL_ALIVE.howToSay(self.id, '127.0.0.1', load1=0.1, mem_free=2 ** 29,
                                               disk_free=2 ** 33, running=0, uptime=self.beacons))

    def read(self):
        self.reader.feed(self.socket.recv(262144))
        frame = self.reader.next_frame()
        while frame is not None:
            self.react(frame)
            frame = self.reader.next_frame()

    def react(self, frame):
        if frame.command == 'RECEIPT':
            self.hello()
        elif frame.command == 'MESSAGE':
            if 'mac' in frame.headers:
                self.session.check(frame.headers['destination'], frame.headers, frame.body)
            word = protocol.interpret(frame.headers, frame.body.decode())
            self.crowd.heard[word.word] += 1
            cmd_id = word.text('cmd-id')
            if word.word == 'HELLO' and word.headers['to'] == '*':
                self.hello()
            elif word.word == 'HELLO' and word.get('proof'):
                parts = self.secret, self.id, self.nonce, word.text('nonce')
                assert protocol.is_proof(word.text('proof'), *parts)
                self.session = protocol.Signatures(protocol.session_key(*parts), 'guest')
            elif word.word == 'CMD_RUN':
                self.unacknowledged[cmd_id] = True
                self.say(protocol.CMD_RESULTS.howToSay(cmd_id, RESULTS))
            elif word.word == 'CMD_ACK':
                self.unacknowledged.pop(cmd_id, None)
        elif frame.command == 'ERROR':
            raise RuntimeError('the broker says: %r' % (frame,))


class Crowd:
    """Guests on one thread, until ``stop``; they say beacons from ``begin_beacons`` on."""

    def __init__(self, port, count):
        self.port = port
        self.frames = 0                     # SENDs
        self.heard = collections.Counter()  # words, by name
        self.selector = selectors.DefaultSelector()
        self.guests = []
        self.due = []                       # when which guest says what
        self.beaconing = False
        self.first_beacons = []             # as ``due``, of those who are to begin
        self.stopping = False
        now = time.monotonic()
        for number in range(count):
            guest = Guest(self, number)
            while guest.session is None:        # an address may have few connections that say nothing yet
                guest.read()
            self.guests.append(guest)
            self.selector.register(guest.socket, selectors.EVENT_READ, guest)
            heapq.heappush(self.due, (now + 5.0 * number / count, number, 'beat'))
        self.thread = threading.Thread(target=self.run, name='crowd')
        self.thread.start()

    def begin_beacons(self, seconds):
        """Each says its first one within that time."""
        now = time.monotonic()
        self.beaconing = True
        self.first_beacons = [(now + seconds * number / len(self.guests), number, 'beacon')
                              for number in range(len(self.guests))]

    def run(self):
        while not self.stopping:
            for key, _ in self.selector.select(0.05):
                key.data.read()
            begun, self.first_beacons = self.first_beacons, []
            for entry in begun:
                heapq.heappush(self.due, entry)
            now = time.monotonic()
            while self.due[0][0] <= now:
                when, number, what = heapq.heappop(self.due)
                guest = self.guests[number]
                if what == 'beat':
                    guest.socket.sendall(b'\n')
                elif self.beaconing:
                    guest.beacon()
                heapq.heappush(self.due, (when + (5.0 if what == 'beat' else BEACON), number, what))

    def stop(self):
        self.stopping = True
        self.thread.join()
        for guest in self.guests:
            guest.socket.close()
        self.selector.close()


def cpu_seconds(pid):
    with open('/proc/%d/stat' % pid) as file:
        fields = file.read().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def resident(pid):
    with open('/proc/%d/statm' % pid) as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2 ** 20


def measure(folder, count, seconds):
    """{what: number}: see ``report``."""
    found = {'guests': count}
    with Host(folder) as host, host.api as api:
        begin = time.monotonic()
        crowd = Crowd(host.broker_port, count)
        try:
            wait_until(lambda: api.agentInfo()['vms'] == count, 120)
            found['joined'] = time.monotonic() - begin
            found.update(beacons(host, api, crowd, seconds))
            found.update(multicast(api, crowd))
            found['memory'] = resident(host.process.pid)
        finally:
            crowd.stop()
    return found


def beacons(host, api, crowd, seconds):
    """What beacons cost; whether each came to the host agent, and it knows when the last one was."""
    def passed_on():
        return api.agentInfo()['broker']['counters']['frames_out']

    def said():
        return sum(guest.beacons for guest in crowd.guests)

    def heard():
        return sum(api.getVM(guest.name)['lastSeen'] >= guest.said for guest in crowd.guests)
    quiet(api)
    before, pid, begin = passed_on(), host.process.pid, time.monotonic()
    cpu = cpu_seconds(pid)
    crowd.begin_beacons(min(BEACON, seconds))
    while time.monotonic() - begin < seconds:      # measured over time: there is no event to wait for
        time.sleep(1)
    load = (cpu_seconds(pid) - cpu) / (time.monotonic() - begin)
    wait_until(lambda: all(guest.beacons for guest in crowd.guests), 60)
    crowd.beaconing = False
    with contextlib.suppress(AssertionError):      # then they are fewer, and that is told
        wait_until(lambda: passed_on() - before >= said() and heard() == len(crowd.guests), 20, 0.2)
    return {'load': load, 'said': said(), 'came': passed_on() - before, 'heard': heard(),
            'aint': api.agentInfo()['aint']}


def quiet(api):
    """Waits until no frame comes for a while."""
    seen = [0, 1]

    def still():
        seen.append(api.agentInfo()['broker']['counters']['frames_in'])
        time.sleep(0.05)
        return seen[-1] == seen[-2] == seen[-3]
    wait_until(still, 60)


def multicast(api, crowd):
    begin = time.monotonic()
    cmd_id = api.runCmdOnAll('guest*', 'echo', ['hello'])
    while not api.waitCmd(cmd_id, 60):
        assert time.monotonic() - begin < 120, 'not all answered'
    answered = time.monotonic() - begin
    wait_until(lambda: not any(guest.unacknowledged for guest in crowd.guests), 60)
    results = api.getCmdResults(cmd_id)
    return {'answered': answered, 'acked': time.monotonic() - begin,
            'results': sum(result['out'] == 'hello\n' for result in results.values())}


def report(found):
    """Prints what was measured; gives how many targets were missed."""
    count, missed = found['guests'], 0
    print('%d guests joined in %.1f s; the host takes %.0f MiB then' % (
        count, found['joined'], found['memory']))
    for text, met in (
            ('host agent: %.1f %% of a core (target: under 10)' % (100 * found['load']), found['load'] < 0.1),
            ('beacons: %d said, %d came to the host agent; lastSeen is the last of %d guests' % (
                found['said'], found['came'], found['heard']),
             count <= found['said'] == found['came'] and found['heard'] == count and not found['aint']),
            ('multicast: %d results in %.2f s, all acknowledged in %.2f s (target: 5)' % (
                found['results'], found['answered'], found['acked']),
             found['results'] == count and found['acked'] <= 5)):
        print('%-7s %s' % ('met' if met else 'MISSED', text))
        missed += not met
    return missed


def main():
    """Exits with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--guests', type=int, default=1000)
    parser.add_argument('--seconds', type=float, default=40.0, help='of beacons')
    chosen = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    folder = tempfile.mkdtemp()
    try:
        return min(1, report(measure(os.path.join(folder, 'host'), chosen.guests, chosen.seconds)))
    finally:
        shutil.rmtree(folder)


if __name__ == '__main__':
    sys.exit(main())
