"""Programs on the Windows rig (tests/rigs/windows).

A Windows program's standard output must be a pipe, and what it starts may keep that open: it is read by a
thread or a process of its own, and nobody waits for its end.
"""

import os
import signal
import subprocess
import threading

RIG = os.environ.get('VMHOST_WINDOWS_RIG', '')
WINE = '/usr/lib/wine/wine64'
TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENVIRONMENT = {'WINEPREFIX': os.path.join(RIG, 'prefix'), 'WINEDEBUG': '-all', 'WINEARCH': 'win64',
               'LANG': 'C.UTF-8', 'WINEDLLOVERRIDES': 'mscoree,mshtml=;winemenubuilder.exe=d'}
INTO_FILE = ['bash', '-c', 'exec "$@" > >(exec cat >> "$0") 2>&1']     # then the file, and the program


def path_there(path):
    """A path of Linux as Windows has it."""
    return 'Z:' + os.path.abspath(str(path)).replace('/', '\\')


def start_of(program):
    """What starts a Windows program; ``python`` and ``pythonw`` are the rig's."""
    if program in ('python', 'pythonw'):
        program = os.path.join(RIG, 'python', program + '.exe')
    return in_rig(WINE, program)


def in_rig(*words):
    """What starts a program of this machine's that finds the rig."""
    return ['env'] + ['%s=%s' % item for item in ENVIRONMENT.items()] + list(words)


class Program:
    """A Windows program that runs, with what it has said so far."""

    def __init__(self, program, *words, folder=None, stdin=subprocess.DEVNULL):
        self._said = []
        self.process = subprocess.Popen(
            start_of(program) + list(words), stdin=stdin, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, cwd=folder)
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


def start():
    """Has that Windows run until ``stop``: a program starts in a second then, and starts no services, which
    would hold its output open."""
    subprocess.call(in_rig('/usr/lib/wine/wineserver64', '-p'))
    python('-c', '')


def stop():
    """Ends all that runs there, unless it stays for other tests: then whoever runs them ends it."""
    if 'VMHOST_WINDOWS_STAYS' not in os.environ:
        subprocess.call([os.path.join(TOP, 'tests', 'rigs', 'windows'), 'stop', RIG])
