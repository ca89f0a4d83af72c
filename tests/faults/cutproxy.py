"""A TCP proxy between a guest and the broker, or a caller and the API, that cuts, holds, slows, doubles."""

import contextlib
import socket
import threading
import time


class CuttingProxy:
    """``mode`` may be changed at any time; ``cut`` and ``half_open`` act on what is connected now.

    pass      all as it is
    split     each byte in a segment of its own
    throttle  100 bytes each 10 ms
    hole      nothing passes until the mode changes; then all that waited
    twice     what a new connection of the guest sends goes to the broker on two connections
    mute      what asks is passed on; where the answer would come, the connection is cut
    """

    def __init__(self, target):
        self.target = target
        self.mode = 'pass'
        self._stopping = False
        self._lock = threading.Lock()          # guards the list of open pairs
        self._pairs = []
        self._listener = socket.socket()
        self._listener.bind(('127.0.0.1', 0))
        self._listener.listen(50)
        self.port = self._listener.getsockname()[1]
        self._threads = []
        self._thread(self._accept)

    def _thread(self, target, *args):
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        self._threads = [old for old in self._threads if old.is_alive()] + [thread]

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                brokers = [socket.create_connection(('127.0.0.1', self.target), timeout=5)
                           for _ in range(2 if self.mode == 'twice' else 1)]
            except OSError:
                client.close()
                continue
            pair = Pair(client, brokers)
            with self._lock:
                self._pairs.append(pair)
            self._thread(self._pump, pair, client, brokers)
            self._thread(self._pump, pair, brokers[0], [client])
            for extra in brokers[1:]:
                self._thread(self._pump, pair, extra, [])

    def _pump(self, pair, source, targets):
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                while self.mode == 'hole' and not self._stopping:
                    time.sleep(0.02)
                if not data or self.mode == 'mute' and targets == [pair.client]:
                    break
                if not pair.is_half_open:
                    self._pass_on(data, targets)
        if not pair.is_half_open:
            pair.close()

    def _pass_on(self, data, targets):
        size = {'split': 1, 'throttle': 100}.get(self.mode, len(data))
        for begin in range(0, len(data), size):
            if self.mode == 'throttle':
                time.sleep(0.01)
            for target in targets:
                target.sendall(data[begin:begin + size])

    def cut(self):
        """Closes all connections."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            pair.close()

    def half_open(self):
        """The broker loses its connections; the guest isn't told, and what it sends goes nowhere."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            pair.is_half_open = True
            for broker in pair.brokers:
                with contextlib.suppress(OSError):
                    broker.shutdown(socket.SHUT_RDWR)

    def close(self):
        """Ends it, and all connections."""
        self._stopping = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)


class Pair:
    """A guest's connection, and those to the broker that carry it on."""

    def __init__(self, client, brokers):
        self.client = client
        self.brokers = brokers
        self.is_half_open = False
        for connection in [client] + brokers:
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self):
        for connection in [self.client] + self.brokers:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
