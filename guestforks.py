"""The fork server: a process without threads, forked before any thread exists, that forks the runners.

What it is not: the runners' work (guestrunner.py). Threads: the link's and the main one ask it; a lock guards
the lists of runners.
"""

import errno
import gc
import logging
import os
import signal
import socket
import struct
import threading
from typing import List

import agent
from guestcgroup import find_place
from guestprocesses import has_proc, is_stopped, signal_all
from guestrunner import RunnerProcess
from guestspool import describe_error
from gueststart import Origin, become_subreaper, make_starter

log = logging.getLogger('vmguest')


# --- runner ----------------------------------------------------------------------------------

MOST_BUSY = 100                # runners that are waited for, of those that have a command
SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN)
FREE_RUNNERS = 2               # that are kept for the next commands


DESCRIPTOR = struct.Struct('i')        # as SCM_RIGHTS carries it


class ForkServer:
    """Runners, and the process without threads that forks them; forked itself before any thread exists.

    Raw fork of an agent with threads would copy locks in whatever state they are. It ends when the
    agent does; its runners go on until their commands are over. The agent has a socket to each runner,
    to give it one command after the other: a fork costs milliseconds. ``run`` may be called by any
    thread, the other methods by the main thread.
    """

    def __init__(self) -> None:
        self.reports, self._reporter = os.pipe()       # runners write the names of folders to look at
        os.set_blocking(self.reports, False)
        self._torn = b''               # the begin of a line there
        # Guards the two lists; nothing that blocks happens while it is held.
        self._lock = threading.Lock()
        self._free = []                # type: List[socket.socket]
        self._busy = []                # type: List[socket.socket]
        self._troubles = agent.Seldom(log)     # each that waits is tried again every second
        self.place = find_place()
        self.place.settle()            # before there is a process that would have to be moved
        agent.release_memory()         # rather than have each runner share what nobody uses
        self._start()
        self._free.append(self._new_runner())

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            try:
                self._serve(theirs)
            finally:
                os._exit(0)
        theirs.close()
        self._socket = ours

    def _serve(self, requests: socket.socket) -> None:
        """Forks a runner for each socket that comes."""
        os.close(self.reports)
        self._origin = Origin(make_starter(), self.place)
        become_subreaper()         # of what ended runners leave
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)      # runners are reaped by the kernel
        gc.disable()                # a collection would copy the pages that all these share
        getattr(gc, 'freeze', lambda: None)()      # since 3.7
        while True:
            data, rights, _, _ = requests.recvmsg(1, socket.CMSG_SPACE(DESCRIPTOR.size))
            if not data:
                return
            for _, _, passed in rights:
                orders, = DESCRIPTOR.unpack(passed)
                os.set_inheritable(orders, False)      # it came without: no program may have it
                self._fork_runner(requests, orders)

    def _fork_runner(self, requests: socket.socket, orders: int) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            log.error('no runner: %s', describe_error(error))      # the agent asks again
            pid = -1
        if pid == 0:
            try:
                requests.close()
                agents_end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=orders)
                RunnerProcess(agents_end, self._reporter, self._origin).run()
            except ConnectionError:
                log.debug('the agent is gone')
            except Exception:
                log.exception('in a runner')
            finally:
                os._exit(0)
        os.close(orders)

    def run(self, folder: str) -> bool:
        """Has a runner started for a spool folder. False where there is no room for one now.

        Raises ConnectionError where the fork server is dead.
        """
        with self._lock:
            self._collect()
            while self._free:
                if self._order(self._free.pop(), folder):
                    return True
                log.error('a free runner was killed')
            try:
                self._order(self._new_runner(), folder)    # where none can be forked, the agent asks again
            except OSError as error:
                if error.errno not in SCARCE:
                    raise ConnectionError('the fork server died: %s' % error)
                self._troubles.warn('run', 'no runner for %s now: %s', folder, error.strerror)
                return False
            return True

    def _order(self, runner: socket.socket, folder: str) -> bool:
        try:
            runner.sendall(os.fsencode(folder) + b'\n')
        except OSError:
            runner.close()
            return False
        self._busy.append(runner)
        if len(self._busy) > MOST_BUSY:
            self._busy.pop(0).close()      # it ends after its command, instead of waiting for the next one
        return True

    def _new_runner(self) -> socket.socket:
        """A new runner's socket. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._socket.sendmsg([b'r'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS,
                                           DESCRIPTOR.pack(theirs.fileno()))])
        return ours

    def _collect(self) -> None:
        """Finds out which runners are free again, and which are dead."""
        for runner in list(self._busy):
            try:
                is_free = runner.recv(1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                is_free = b''
            self._busy.remove(runner)
            if is_free:
                self._free.append(runner)
            else:
                runner.close()

    def trim(self) -> None:
        """Ends free runners beyond the few that the next commands will want."""
        with self._lock:
            self._collect()
            while len(self._free) > FREE_RUNNERS:
                self._free.pop(0).close()

    def lives(self) -> bool:
        """Whether it can still start runners. One that somebody stopped goes on."""
        if is_stopped(self.pid) or not has_proc():     # to one that goes on, it is nothing
            signal_all([self.pid], signal.SIGCONT)
        try:
            while True:
                # As process 1 of a container, the agent is who waits for all orphans of that.
                ended = os.waitpid(-1 if os.getpid() == 1 else self.pid, os.WNOHANG)[0]
                if ended in (0, self.pid):
                    return ended == 0
        except ChildProcessError:
            return False

    def reported(self) -> List[str]:
        """Names of the folders whose commands ended, or turned out to last, since the last call; after a name
        and a space what Command.remember takes."""
        try:
            lines = (self._torn + os.read(self.reports, 65536)).split(b'\n')
        except BlockingIOError:
            return []
        self._torn = lines.pop()
        return [line.decode(errors='replace') for line in lines]

    def stop(self) -> None:
        """Ends it, and the runners that have no command; the others go on."""
        for runner in self._free + self._busy:
            runner.close()
        self._socket.close()
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            log.debug('the fork server was waited for already')
        for descriptor in (self.reports, self._reporter):
            os.close(descriptor)
        self.place.tidy()
