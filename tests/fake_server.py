"""The fake VirtualBox as a process that many programs talk to, as VBoxSVC is: its VMs are one and the same
for all.

``VirtualBoxManager`` is what vboxapi gives: it starts the process where there is none. That ends some
seconds after the last program has hung up. Whatever isn't plain crosses the socket as a reference; an error
of the fake's as such.
"""

import contextlib
import hashlib
import os
import sqlite3
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Client, Listener

import fake_virtualbox

PLAIN = (str, bytes, int, float, bool, type(None))
LINGERS = 3.0                  # seconds that the process stays without a client


def address_in(folder):
    """Where the process listens that the folder steers."""
    if os.name == 'nt':
        return r'\\.\pipe\vboxsvc-' + hashlib.sha1(folder.encode()).hexdigest()
    return os.path.join(folder, 'socket')


class VirtualBoxManager(fake_virtualbox.VirtualBoxManager):
    """The program's side."""

    def __init__(self):
        super().__init__()
        self.folder = os.environ['FAKE_VIRTUALBOX']
        self.line = Line(self.connected())

    def connected(self):
        address = address_in(self.folder)
        lock = sqlite3.connect(os.path.join(self.folder, 'socket.lock'), 60, isolation_level=None)
        with contextlib.closing(lock):
            lock.execute('BEGIN EXCLUSIVE')
            with contextlib.suppress(OSError):
                return Client(address)
            with contextlib.suppress(OSError):
                os.remove(address)
            subprocess.Popen([sys.executable, os.path.abspath(__file__), self.folder],
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
            while True:
                with contextlib.suppress(OSError):
                    return Client(address)
                time.sleep(0.02)

    def getVirtualBox(self):
        return self.line.ask('root', 0, '', ())

    def getSessionObject(self):
        return self.line.ask('session', 0, '', ())


class Line:
    """The connection of a program, which is one thread."""

    def __init__(self, connection):
        self.connection = connection

    def ask(self, what, number, name, args):
        try:
            self.connection.send((what, number, name, pack(args, lambda thing: thing.number)))
            kind, answer = self.connection.recv()
        except (EOFError, OSError):
            raise fake_virtualbox.FakeError(fake_virtualbox.CALL_FAILED, 'the call failed')
        if kind == 'fault':
            raise fake_virtualbox.FakeError(*answer)
        if kind == 'missing':
            raise AttributeError(answer)
        if kind == 'method':
            return lambda *more: self.ask('call', number, name, more)
        return unpack(answer, lambda other: Remote(self, other))


class Remote:
    """A thing of the fake's, as a program has it."""

    def __init__(self, line, number):
        self.__dict__.update(line=line, number=number)

    def __getattr__(self, name):
        return self.line.ask('get', self.number, name, ())

    def __setattr__(self, name, value):
        self.line.ask('set', self.number, name, (value,))


def pack(value, number_of):
    """The same, with each thing that isn't plain as its number."""
    if isinstance(value, (list, tuple)):
        return ('row', [pack(each, number_of) for each in value])
    return ('plain', value) if isinstance(value, PLAIN) else ('thing', number_of(value))


def unpack(packed, thing_of):
    kind, value = packed
    if kind == 'row':
        return [unpack(each, thing_of) for each in value]
    return thing_of(value) if kind == 'thing' else value


class Server:
    """The process's side: a thread for each program."""

    def __init__(self, folder):
        self.root = fake_virtualbox.VirtualBox()
        self.things = {}
        self.listener = Listener(address_in(folder), backlog=64)
        self.clients = 0
        self.alone_since = time.monotonic()

    def run(self):
        threading.Thread(target=self.accept, daemon=True).start()
        while self.clients or time.monotonic() - self.alone_since < LINGERS:
            time.sleep(0.1)
        os._exit(0)

    def accept(self):
        while True:
            connection = self.listener.accept()
            self.clients += 1
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        sessions = []
        with contextlib.suppress(EOFError, OSError):
            while True:
                what, number, name, args = connection.recv()
                connection.send(self.answer(sessions, what, number, name, args))
        for session in sessions:                    # who held a lock has died, perhaps
            with contextlib.suppress(AttributeError):
                session.unlockMachine()
        self.clients -= 1
        self.alone_since = time.monotonic()

    def answer(self, sessions, what, number, name, packed):
        try:
            return self.done(sessions, what, number, name, unpack(packed, self.things.get))
        except fake_virtualbox.FakeError as error:
            return 'fault', (error.errno, error.msg)
        except AttributeError as error:
            return 'missing', str(error)
        except Exception as error:
            return 'fault', (fake_virtualbox.FILE_ERROR, '%s: %s' % (type(error).__name__, error))

    def done(self, sessions, what, number, name, args):
        if what == 'root':
            return 'value', self.packed(self.root)
        if what == 'session':
            sessions.append(fake_virtualbox.Session())
            return 'value', self.packed(sessions[-1])
        thing = self.things[number]
        if what == 'set':
            return 'value', self.packed(setattr(thing, name, args[0]))
        found = getattr(thing, name)
        if what == 'get' and callable(found) and not isinstance(found, fake_virtualbox.Named):
            return 'method', None
        return 'value', self.packed(found(*args) if what == 'call' else found)

    def packed(self, value):
        return pack(value, self.number_of)

    def number_of(self, thing):
        self.things[id(thing)] = thing
        return id(thing)


if __name__ == '__main__':
    Server(sys.argv[1]).run()
