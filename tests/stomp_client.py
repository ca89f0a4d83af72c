"""A STOMP client for tests of the broker: it sends exact bytes, and shows exactly what came.

It shares no code with protocol.py, so that a mistake there can't hide from its tests.
"""

import contextlib
import os
import re
import socket
import struct
import subprocess
import sys
import time
from typing import NamedTuple

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TIMEOUT = 30        # seconds; the machine may be busy


class Frame(NamedTuple):
    """A frame of the server; the header lines as they were, not decoded."""
    command: str
    lines: list
    body: bytes

    def get(self, name, default=None):
        """The value of the first header line of that name, as it stood on the wire."""
        for line in self.lines:
            if line.startswith(name + ':'):
                return line[len(name) + 1:]
        return default

    def names(self):
        return [line.partition(':')[0] for line in self.lines]


class Client:
    """One connection. ``close`` it, or use it in a ``with`` block."""

    def __init__(self, address, tls=None, receive_buffer=None, source=None):
        family = socket.AF_INET6 if ':' in address[0] else socket.AF_INET
        self.socket = socket.socket(family)
        try:
            if receive_buffer:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self.socket.settimeout(TIMEOUT)
            if source:
                self.socket.bind((source, 0))
            self.socket.connect(address)
            if tls is not None:
                self.socket = tls.wrap_socket(self.socket, server_hostname=address[0])
        except BaseException:
            self.socket.close()
            raise
        self.received = 0           # bytes
        self.beats = 0              # line ends that came between frames
        self._buffer = bytearray()
        self._early = []
        self._fences = 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        self.socket.close()

    def reset(self):
        """Vanishes: the broker gets a reset instead of an orderly end."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.socket.close()

    # -- what the client says

    def send(self, data):
        """Exactly these bytes."""
        self.socket.sendall(data)

    def say(self, command, *lines, body=b''):
        """A frame with these header lines."""
        self.send(frame(command, *lines, body=body))

    def connect(self, version, *lines):
        """CONNECT, and the CONNECTED that must follow."""
        if version is not None:
            lines = ('accept-version:' + version, 'host:localhost') + lines
        self.say('CONNECT', *lines)
        connected = self.take()
        assert connected.command == 'CONNECTED', connected
        return connected

    def ask(self, command, *lines, body=b'', receipt='receipt-1'):
        """A frame with a receipt, which must come; MESSAGEs before it are there for ``take``."""
        self.say(command, *(lines + ('receipt:' + receipt,)), body=body)
        early, self._early = self._early, []
        answer = self.take()
        while answer.command == 'MESSAGE':
            early.append(answer)
            answer = self.take()
        assert answer == Frame('RECEIPT', ['receipt-id:' + receipt], b'')
        self._early = early

    def subscribe(self, destination, *lines, id='0'):
        """SUBSCRIBE; the subscription is active when this returns."""
        self.ask('SUBSCRIBE', 'id:' + id, 'destination:' + destination, *lines)

    def publish(self, destination, *bodies):
        """SENDs, the last one with a receipt: all were taken when this returns."""
        for body in bodies[:-1]:
            self.say('SEND', 'destination:' + destination, body=body)
        self.ask('SEND', 'destination:' + destination, body=bodies[-1])

    # -- what the server says

    def take(self, timeout=TIMEOUT):
        """The next frame. Fails where none comes in time, or the connection ends."""
        deadline = time.monotonic() + timeout
        while True:
            found = self._early.pop(0) if self._early else self._parse()
            if found is not None:
                return found
            assert self._receive(deadline), 'the connection ended; left over: %r' % bytes(self._buffer[:200])

    def take_all(self, number):
        return [self.take() for _ in range(number)]

    def take_error(self):
        """ERROR, and then the end of the connection; gives the frame."""
        error = self.take()
        assert error.command == 'ERROR', error
        assert error.get('message'), error
        if error.body:
            assert error.get('content-length') == str(len(error.body))
            assert error.get('content-type') == 'text/plain'
        self.take_end()
        return error

    def take_end(self, timeout=TIMEOUT):
        """The server closes, and says nothing more but line ends."""
        deadline = time.monotonic() + timeout
        while self._receive(deadline):
            pass
        assert not self._buffer.strip(b'\r\n'), bytes(self._buffer[:200])

    def take_end_or_error(self):
        """The end of the connection; an ERROR before it may have been lost with a reset."""
        try:
            self.socket.settimeout(TIMEOUT)
            while True:
                data = self.socket.recv(65536)
                if not data:
                    break
                self._buffer += data
        except ConnectionError:
            pass
        found = self._parse()
        assert found is None or found.command == 'ERROR', found

    def take_end_of_frames(self):
        """All frames up to the end of the connection; what comes must be whole frames."""
        found = []
        while self._receive(time.monotonic() + TIMEOUT):
            one = self._parse()
            while one is not None:
                found.append(one)
                one = self._parse()
        assert not self._buffer, bytes(self._buffer[:200])
        return found

    def before_now(self):
        """The frames that were on their way already: the server answers after them."""
        self._fences += 1
        receipt = 'fence-%d' % self._fences
        self.say('SEND', 'destination:/topic/nobody-listens', 'receipt:' + receipt)
        found = []
        while True:
            one = self.take()
            if one.command == 'RECEIPT' and one.get('receipt-id') == receipt:
                return found
            found.append(one)

    def before_now_as_guest(self):
        """The same for a guest under the host's policy, whose frames are refused or go to the host."""
        self._fences += 1
        name = 'fence-%d' % self._fences
        self.say('BEGIN', 'transaction:' + name)
        self.ask('ABORT', 'transaction:' + name, receipt=name)
        found, self._early = self._early, []
        return found

    def bodies(self):
        """The bodies of the MESSAGEs that were on their way already."""
        found = self.before_now()
        assert {one.command for one in found} <= {'MESSAGE'}, found
        return [one.body for one in found]

    def take_beats(self, number, timeout=TIMEOUT):
        """Seconds until so many line ends came, and nothing else."""
        begin = time.monotonic()
        before = self.beats
        while self.beats < before + number:
            assert self._receive(begin + timeout), 'the connection ended'
            assert self._parse() is None
        return time.monotonic() - begin

    def silent_for(self, seconds):
        """Whether nothing comes, and the connection lasts, for so long."""
        assert not self._buffer, bytes(self._buffer[:200])
        self.socket.settimeout(seconds)
        try:
            data = self.socket.recv(1)
        except socket.timeout:
            return True
        self._buffer += data
        return False

    def _receive(self, deadline):
        """More bytes into the buffer; False at the end."""
        left = deadline - time.monotonic()
        assert left > 0, 'nothing came in time; so far %r' % bytes(self._buffer[:200])
        self.socket.settimeout(left)
        try:
            data = self.socket.recv(65536)
        except ConnectionError:
            return False
        except socket.timeout:
            raise AssertionError('nothing came in time; so far %r' % bytes(self._buffer[:200]))
        self._buffer += data
        self.received += len(data)
        return bool(data)

    def _parse(self):
        buffer = self._buffer
        beats = len(buffer) - len(buffer.lstrip(b'\n'))
        self.beats += beats
        del buffer[:beats]
        end = buffer.find(b'\n\n')
        if end < 0:
            return None
        command, *lines = bytes(buffer[:end]).decode('utf-8').split('\n')
        head = Frame(command, lines, b'')
        length = head.get('content-length')
        stop = buffer.find(b'\0', end + 2) if length is None else end + 2 + int(length)
        if stop < 0 or len(buffer) < stop + 2:
            return None
        # The newline behind the NUL is what line-wise clients wait for (stomper.stompbuffer).
        assert buffer[stop:stop + 2] == b'\0\n', bytes(buffer[:stop + 20])
        body = bytes(buffer[end + 2:stop])
        del buffer[:stop + 2]
        return head._replace(body=body)


def frame(command, *lines, body=b''):
    """The bytes of a frame with exactly these header lines."""
    return '\n'.join((command,) + lines).encode('utf-8') + b'\n\n' + body + b'\0'


@contextlib.contextmanager
def running(broker):
    """Starts a broker, and stops it; its thread must be gone then."""
    broker.start()
    try:
        yield broker
    finally:
        thread = broker._thread
        broker.stop()
        assert not thread.is_alive()


class Program:
    """``python stompbroker.py --port 0 …``; its address as it printed it."""

    def __init__(self, *arguments, before=()):
        self.process = subprocess.Popen(
            list(before) + [sys.executable, os.path.join(TOP, 'stompbroker.py'), '--port', '0']
            + list(arguments),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        line = self.process.stdout.readline().decode()
        found = re.match(r'listening on \[?([^\]]+)\]?:(\d+)\r?\n\Z', line)
        assert found, (line, self.process.stderr.read())
        self.address = found.group(1), int(found.group(2))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()

    def end(self, number):
        self.process.send_signal(number)
        out, errors = self.process.communicate(timeout=20)
        return self.process.returncode, out, errors
