"""Programs on the Windows rig (tests/rigs/windows): its Python, and a host agent that runs there.

A Windows program's standard output must be a pipe, and what it starts may keep that open: it is read by a
thread, and nobody waits for its end.
"""

import contextlib
import os
import signal
import sqlite3
import subprocess
import threading

from agents import TOP, Host
from helpers import wait_until

RIG = os.environ.get('VMHOST_WINDOWS_RIG', '')
WINE = '/usr/lib/wine/wine64'
ENVIRONMENT = {'WINEPREFIX': os.path.join(RIG, 'prefix'), 'WINEDEBUG': '-all', 'WINEARCH': 'win64',
               'LANG': 'C.UTF-8', 'WINEDLLOVERRIDES': 'mscoree,mshtml=;winemenubuilder.exe=d'}


def environment():
    kept = {name: value for name, value in os.environ.items()
            if name not in ('DISPLAY', 'PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV')}
    return dict(kept, **ENVIRONMENT)


def path_there(path):
    """A path of Linux as Windows has it."""
    return 'Z:' + os.path.abspath(str(path)).replace('/', '\\')


class Program:
    """A Windows program that runs, with what it has said so far."""

    def __init__(self, program, *words, folder=None, stdin=subprocess.DEVNULL):
        if program in ('python', 'pythonw'):
            program = os.path.join(RIG, 'python', program + '.exe')
        self._said = []
        self.process = subprocess.Popen(
            [WINE, program] + list(words), stdin=stdin, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, cwd=folder, env=environment())
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with self.process.stdout as pipe:
            for data in iter(lambda: os.read(pipe.fileno(), 65536), b''):
                self._said.append(data)

    def said(self):
        return b''.join(self._said).decode('utf-8', 'replace').replace('\r\n', '\n')

    def wait(self, timeout=60):
        """(exit code, what it said)."""
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code, self.said()

    def interrupt(self):
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def kill(self):
        self.process.kill()
        self.process.wait()


def python(*words, **options):
    """Runs Python there to its end: (exit code, what it said)."""
    return Program('python', *words, **options).wait()


def stop():
    """Ends all that runs there."""
    subprocess.call([os.path.join(TOP, 'tests', 'rigs', 'windows'), 'stop', RIG])


class WindowsHost(Host):
    """A host agent there. Its folder is one of this machine."""

    bundle = ''                        # of which it runs, instead of the folder of sources

    def start(self, wait=True):
        for name in ('xmlrpc.address', 'broker.address'):
            if os.path.exists(os.path.join(self.state, name)):
                os.remove(os.path.join(self.state, name))
        self.program_there = Program('python', *self.words(), folder=self.folder)
        self.process = self.program_there.process
        try:
            wait_until(lambda: self.process.poll() is not None or self.answers(), 60)
            assert self.process.poll() is None, 'the host ended:\n' + self.log()
        except BaseException:
            self.program_there.kill()
            raise
        return self

    def words(self):
        return [path_there(self.bundle or os.path.join(TOP, 'vmhost.py')), path_there(self.ini)]

    def log(self):
        return self.program_there.said()

    def stop(self, number=signal.SIGINT, timeout=20):
        return super().stop(number, timeout)

    def has_stopped_in_order(self):
        """Whether its journal ends with that, once."""
        with contextlib.closing(sqlite3.connect(os.path.join(self.state, 'journal.sqlite'))) as journal:
            events = journal.execute("SELECT type FROM events WHERE type LIKE 'host-%' ORDER BY seq")
            return [row[0] for row in events] == ['host-start', 'host-stop']

    def begin(self, folder, *words, **options):
        """Begins a verb in a folder."""
        return Program('python', *(self.words() + list(words)), folder=folder, **options)

    def run_there(self, folder, *words):
        """Runs a verb in a folder: (exit code, what it said)."""
        return self.begin(folder, *words).wait()
