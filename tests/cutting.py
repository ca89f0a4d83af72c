"""A proxy that cuts connections, or holds them up; and, as a program, a chirp_server behind one.

The program takes the words that chirp_server takes, and what to do from $CHIRP_FAULTS, JSON: ``cuts``, the
distances between them in bytes; ``hold``, the bytes of a connection after which it waits for ever;
``report``, a file that tells {up, down, cuts} so far.
"""

import argparse
import contextlib
import json
import os
import socket
import sys
import threading

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, TOP)

import chirpserver  # noqa: E402


class CuttingProxy:
    """Passes connections on to a server; counts what goes each way, and cuts where it is told to.
    ``hold``: after so many bytes of one way of a connection the rest waits for ``gate``.
    ``alter``: the byte that comes after so many of one way arrives as another one, once.
    ``most``: connections that are passed on; later ones are closed at once.
    ``stops``: (number of a connection, way, bytes): after so many that one ends; ``silently``: it waits for
    ``gate`` before."""

    def __init__(self, server):
        self._server = server
        self._listener = self._listen()
        self.address = self._listener.getsockname()
        self.up = self.down = 0
        self.cuts = 0
        self.left = None               # bytes until the next cut
        self.distances = iter(())      # and from that to those after it
        self.hold, self.gate = None, threading.Event()
        self.alter = self.most = self.stops = None
        self.silently = False
        self.connections = []          # (socket to the client, socket to the server)
        self._lock = threading.Lock()
        self._threads = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _listen(self):
        sock = socket.socket()
        sock.bind(('127.0.0.1', 0))
        sock.listen(16)
        return sock

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.gate.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(20)
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.most is not None and len(self.connections) >= self.most:
                near.close()
                continue
            try:
                far = socket.create_connection(self._server)
            except OSError:                            # it was killed
                near.close()
                continue
            self.connections.append((near, far))
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, target, way in ((near, far, 'up'), (far, near, 'down')):
                thread = threading.Thread(target=self._pass, args=(
                    source, target, way, len(self.connections) - 1))
                thread.start()
                self._threads.append(thread)

    def end(self, index):
        """Ends a connection, in the order in which they were made."""
        for sock in self.connections[index]:
            with contextlib.suppress(OSError):         # those who pass its bytes are quicker
                sock.shutdown(socket.SHUT_RDWR)

    def _pass(self, source, target, way, number):
        passed = 0
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                with self._lock:
                    data, cut = self._count(data, way)
                    data = self._altered(data, passed)
                    data, stops = self._up_to_stop(data, passed, (number, way))
                passed += len(data)
                if self.hold is not None and passed > self.hold:
                    self.gate.wait()
                target.sendall(data)
                if stops and self.silently:
                    self.gate.wait()
                if cut or stops or not data:
                    break
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        source.close()

    def _altered(self, data, passed):
        if self.alter is None or not 0 <= self.alter - passed < len(data):
            return data
        at, self.alter = self.alter - passed, None
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]

    def _up_to_stop(self, data, passed, which):
        if self.stops is None or self.stops[:2] != which or passed + len(data) <= self.stops[2]:
            return data, False
        return data[:self.stops[2] - passed], True

    def _count(self, data, way):
        cut = self.left is not None and len(data) >= self.left
        if cut:
            data, self.left = data[:self.left], next(self.distances, None)
            self.cuts += 1
        elif self.left is not None:
            self.left -= len(data)
        setattr(self, way, getattr(self, way) + len(data))
        return data, cut


def install(folder, monkeypatch, **faults):
    """From now on ``chirp_server`` is this one, for the processes that this one starts."""
    folder.mkdir()
    program = folder / 'chirp_server'
    program.write_text('#!/bin/sh\nexec "%s" "%s" "$@"\n' % (sys.executable, os.path.abspath(__file__)))
    program.chmod(0o755)
    monkeypatch.setenv('PATH', str(folder), prepend=os.pathsep)
    monkeypatch.setenv('CHIRP_FAULTS', json.dumps(faults))


def write_whole(path, text):
    with open(path + '.new', 'w') as file:
        file.write(text)
    os.replace(path + '.new', path)


def main():
    parser = argparse.ArgumentParser()
    for option in '-r', '-Z':
        parser.add_argument(option)
    words, _ = parser.parse_known_args()
    faults = json.loads(os.environ['CHIRP_FAULTS'])
    with chirpserver.ChirpServer(words.r, allow=['127.0.0.1']) as server, \
            CuttingProxy(server.address) as proxy:
        proxy.distances = iter(faults.get('cuts', ()))
        proxy.left, proxy.hold = next(proxy.distances, None), faults.get('hold')
        write_whole(words.Z, '%d\n' % proxy.address[1])
        report = None
        while True:
            now = json.dumps({'up': proxy.up, 'down': proxy.down, 'cuts': proxy.cuts})
            if 'report' in faults and now != report:
                write_whole(faults['report'], now)
                report = now
            proxy.gate.wait(0.05)


if __name__ == '__main__':
    main()
