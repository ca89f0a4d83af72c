"""Verbs and agents as forks of a process that has loaded their modules: to start a Python and load them takes
0.1 to 0.3 s of a processor, which is three quarters of what most verbs take, and half of what most agents do.

A fork is a process of its own, with its own arguments, environment, folder and files, and it ends as Python
does. Where the start of a program is what is tested, or who sees it, none will do: in ``/proc`` it has the
arguments and the environment of the process that was forked.
"""

import array
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
AT_THE_START = ('PYTHON', 'LC_', 'LANG')       # variables that Python reads as it starts
PATHS = 'PYTHONPATH'                           # is obeyed by a fork, too
COMPILED = ('PYTHONPYCACHEPREFIX', 'PYTHONDONTWRITEBYTECODE')      # are nothing to it
SIZE = 65536                                   # bytes that a request may have
ARE_HERE = sys.platform == 'linux'             # elsewhere no socket keeps requests apart and tells its end

MODULES = {                    # what a process has loaded whose forks run a program
    'verb': ['vmhost'],
    'vmhost': ['vmhost', 'hostagent'],
    'vmguest': ['vmguest'],
    'wrapped vmhost': ['vmhost', 'hostagent', 'chirp'],
    'wrapped vmguest': ['vmguest', 'chirp'],
}
PROGRAMS = {'verb': 'vmhost', 'wrapped vmhost': 'wrapped', 'wrapped vmguest': 'wrapped'}


def start_of(environment):
    """What of it only a Python that starts would obey; so it does a sitecustomize.py among its paths."""
    found = {name: value for name, value in environment.items()
             if name.startswith(AT_THE_START) and name not in (PATHS,) + COMPILED}
    found['customized by'] = [path for path in environment.get(PATHS, '').split(os.pathsep)
                              if path and os.path.exists(os.path.join(path, 'sitecustomize.py'))]
    return found


USUAL = start_of(os.environ)
_lock = threading.Lock()               # guards the rest, and is held while a process is started
_servers = {}                          # kind of program: what forks it


class Unfit(Exception):
    """This needs a start of its own; nothing has begun."""


def run(words, cwd=None, timeout=120):
    """vmhost with these words, as subprocess.run does it, with bytes. May be called by any thread. Raises
    Unfit, and TimeoutExpired."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        fork = Fork('verb', words, cwd, (0, out.fileno(), errors.fileno()))
        try:
            code = fork.wait(timeout)
        except subprocess.TimeoutExpired:
            fork.kill()
            fork.wait()
            raise
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(words, code, out.read(), errors.read())


def start(kind, words, cwd, log):
    """A program of MODULES with these words; what it says goes to a file. Gives the fork. May be called by
    any thread. Raises Unfit."""
    with open(os.devnull) as nothing:
        return Fork(kind, words, cwd, (nothing.fileno(), log.fileno(), log.fileno()))


class Fork:
    """A program that runs as a fork, with what tests ask of a subprocess.Popen. Any thread may."""

    def __init__(self, kind, words, cwd, files):
        request = json.dumps([list(map(os.fsdecode, words)), str(cwd or os.getcwd()),
                              dict(os.environ)]).encode()
        if not ARE_HERE or len(request) > SIZE:
            raise Unfit
        self.args = words
        self.returncode = None
        self._lock = threading.Lock()          # guards the code, and the pipe that tells it
        line = _line_to(kind)
        told, tells = os.pipe()
        try:
            descriptors = array.array('i', files + (tells,))
            line.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        finally:
            os.close(tells)
        self._told = open(told)                # its pid and, at its end, its status, a line each
        self.pid = int(self._told.readline())

    def poll(self):
        return self._code_within(0)

    def wait(self, timeout=None):
        code = self._code_within(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def _code_within(self, timeout):
        """Its exit code as Popen has it, None where it still runs after so many seconds."""
        if self.returncode is None:
            waiting = select.poll()            # of any descriptor, where select knows the first thousand
            waiting.register(self._told, select.POLLIN)
            if waiting.poll(None if timeout is None else max(0, timeout) * 1000):
                with self._lock:
                    if self.returncode is None:
                        status = int(self._told.readline())
                        is_killed = os.WIFSIGNALED(status)
                        self.returncode = -os.WTERMSIG(status) if is_killed else os.WEXITSTATUS(status)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def __del__(self):
        if hasattr(self, '_told'):
            self._told.close()


class Server:
    """A process that forks programs of a kind, and the line to it."""

    def __init__(self, kind):
        self.line, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(there.fileno()), kind], pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def stop(self):
        self.line.close()
        self.process.wait(20)


def _line_to(kind):
    """The line to what forks it, which is started where it isn't there."""
    if start_of(os.environ) != USUAL:
        raise Unfit
    with _lock:
        server = _servers.get(kind)
        if server is None or server.process.poll() is not None:    # a test may have ended it, as a left-over
            server = _servers[kind] = Server(kind)
        return server.line


def stop():
    """Ends the processes that fork."""
    with _lock:
        while _servers:
            _servers.popitem()[1].stop()


def fork_for_each(line):
    """Forks for each request, and returns there: as that program, but for its modules. Ends where there will
    be no more requests."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)      # ignored, nothing can be waited for
    waiting = 0                        # forks, of which each waits for a program
    room = socket.CMSG_SPACE(4 * array.array('i').itemsize)
    while True:
        request, extra, _, _ = line.recvmsg(SIZE, room)
        if not request:
            sys.exit()
        while waiting and os.waitpid(-1, os.WNOHANG)[0]:
            waiting -= 1
        descriptors = array.array('i', extra[0][2])
        if os.fork() == 0:
            break
        waiting += 1
        for each in descriptors:
            os.close(each)
    line.close()
    tells = descriptors.pop()
    child = os.fork()
    if child:
        os.write(tells, b'%d\n' % child)
        os.write(tells, b'%d\n' % os.waitpid(child, 0)[1])
        os._exit(0)
    os.close(tells)
    for number, each in enumerate(descriptors):
        os.dup2(each, number)
        os.close(each)
    sys.argv[1:], folder, environment = json.loads(request.decode())
    before, paths = (each.get(PATHS, '').split(os.pathsep) for each in (os.environ, environment))
    sys.path[1:] = [path for path in paths if path] + [path for path in sys.path[1:] if path not in before]
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)


def main(descriptor, kind):
    sys.path[0] = TOP
    if kind.startswith('wrapped'):
        sys.path.insert(1, os.path.join(TOP, 'tests', 'faults'))
    for module in MODULES[kind]:
        __import__(module)
    fork_for_each(socket.socket(fileno=int(descriptor)))
    runpy.run_module(PROGRAMS.get(kind, kind), None, '__main__', True)


if __name__ == '__main__':
    main(*sys.argv[1:])
