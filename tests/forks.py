"""Verbs as forks of a process that has loaded their modules: to start a Python and load them takes 0.1 s of a
processor, which is three quarters of what most verbs take.

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
SIZE = 65536                                   # bytes that a request may have
ARE_HERE = sys.platform == 'linux'             # elsewhere no socket keeps requests apart and tells its end

_lock = threading.Lock()               # guards the rest, and is held while the process is started
_server = _line = None
_started_with = {}


class Unfit(Exception):
    """This needs a start of its own; nothing has begun."""


def run(words, cwd=None, timeout=120):
    """vmhost with these words, as subprocess.run does it, with bytes. May be called by any thread. Raises
    Unfit, and TimeoutExpired."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        code = _end_of(_begun(words, cwd, (0, out.fileno(), errors.fileno())), words, timeout)
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(words, code, out.read(), errors.read())


def _begun(words, cwd, files):
    """Begins it; gives a descriptor that tells its pid and, at its end, its status, a line each."""
    request = json.dumps([list(map(os.fsdecode, words)), str(cwd or os.getcwd()), dict(os.environ)]).encode()
    if not ARE_HERE or len(request) > SIZE:
        raise Unfit
    line = _line_to_server()
    told, tells = os.pipe()
    descriptors = array.array('i', list(files) + [tells])
    try:
        line.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
    finally:
        os.close(tells)
    return told


def _line_to_server():
    global _server, _line, _started_with
    with _lock:
        start = {name: value for name, value in os.environ.items() if name.startswith(AT_THE_START)}
        if _line is None or _server.poll() is not None:        # a test may have ended it, as it was left over
            _line, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with there:
                _server = subprocess.Popen(
                    [sys.executable, __file__, str(there.fileno())], pass_fds=[there.fileno()],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            _started_with = start
        if _started_with != start:
            raise Unfit
        return _line


def stop():
    """Ends the process that forks, if there is one."""
    global _line
    with _lock:
        if _line is not None:
            _line.close()
            _server.wait(20)
            _line = None


def _end_of(told, words, timeout):
    """Waits for the end; gives the exit code as Popen has it."""
    with os.fdopen(told) as lines:
        pid = int(lines.readline())
        is_late = not select.select([told], [], [], timeout)[0]
        if is_late:
            os.kill(pid, signal.SIGKILL)
        status = int(lines.readline())
    if is_late:
        raise subprocess.TimeoutExpired(words, timeout)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


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
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)


if __name__ == '__main__':
    sys.path[0] = TOP
    import vmhost  # noqa: F401 - for all forks
    fork_for_each(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module('vmhost', None, '__main__', True)
