"""The host agent of a BOINC project's folder: its ini file, its start, and calls to it.

One of the project's tasks starts it, and it serves them all; a BOINC client, which ends a task's descendants,
finds it to be nobody's child.

What it is not: what it is asked for (boincmachines.py, boincwork.py). Threads: all of it belongs to one.
"""

import contextlib
import glob
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from typing import Any, Iterator, List, Optional

import agent
import hostconfig
from hostclient import Client, NoHost

log = logging.getLogger('vmboinc')

START_PATIENCE = 60.0          # seconds that a host agent may take to answer
START_AGAIN = 10.0             # seconds after which another one is started: the first may have met
                               # one that was about to end
BROKER_PORT = 61613            # of a guest's agent that isn't told another one
STARTING = 'starting'          # there while a host agent was started by one of the tasks
PRINTED = 'printed.log'        # what a host agent prints, which doesn't go into its log
INI = """\
# The host agent that serves this project's tasks. Written once, by vmboinc: what you change here stays.
[Broker]
# It stays the same, so that VMs that were saved find it again.
port = %d

[Host]
xmlrpc_port = auto
state_dir = state
idle_end = 10m

[Hypervisor]
machine_folder = machines

[Network]
mode = nat

[Logging]
file = vmhost.log
"""


class Trouble(Exception):
    """Not the science's fault: the task is to be tried again in a while. The text says
    why, and what to do."""


class NotStarted(Trouble):
    """No host agent answers, though one was started."""


class HostAgent:
    """The host agent of a project's folder, which one of its tasks starts, and which serves them all."""

    def __init__(self, folder: str, command: List[str]) -> None:
        """
        folder     where its ini file, state and log are
        command    what starts a host agent, but for its ini file
        """
        self.folder = folder
        self.ini = os.path.join(folder, 'host.ini')
        self._command = command
        self._client: Optional[Client] = None
        self._settings = None          # type: Any
        self._started = self._deadline = 0.0

    def call(self, method: str, *args: Any) -> Any:
        """What a method of its API answers. Raises VMHostError."""
        if self._client is None:
            raise NoHost('no host agent was started yet')
        return self._client.call(method, *args)

    @property
    def drives_vms(self) -> bool:
        """Whether tasks get VMs; not where the volunteer's host.ini says hypervisor=none."""
        with self._usable():
            return bool(self._read_settings().Hypervisor.hypervisor != 'none')

    def how_to(self, verb: str) -> str:
        """What a person types to ask it."""
        return ' '.join(map(shlex.quote, self._command + [self.ini, verb]))

    def connect(self) -> bool:
        """Whether it answers; starts one where none does. Raises Trouble."""
        with self._usable():
            try:
                settings = self._read_settings()
                self._client = Client(settings.Host.state_dir)
                version = self._client.call('agentInfo')['version']
                if is_older(version):
                    return self._end_older(version)
                if self._started:
                    with contextlib.suppress(OSError):
                        os.remove(os.path.join(self.folder, STARTING))
                self._started = self._deadline = 0.0
                return True
            except NoHost:
                self._start()
                return False

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except (agent.AgentError, OSError) as error:
            raise Trouble('the host agent in %s can\'t be used: %s' % (self.folder, agent.sentence(error)))

    def _end_older(self, version: str) -> bool:
        """Ends one of an application version before this one, which may lack what this one asks of it: its
        commands and VMs go on, and its tasks get along with a newer one."""
        log.warning('the host agent is of version %s: it ends, one of version %s takes its place', version,
                    agent.VERSION)
        self.call('stopHost')
        self._started = 0.0
        return False

    def _read_settings(self) -> Any:
        if self._settings is None:
            if not os.path.exists(self.ini):
                os.makedirs(self.folder, mode=0o700, exist_ok=True)
                write_new(self.ini, INI % self._free_port())
            self._settings = hostconfig.read_settings(self.ini)
        return self._settings

    def _start(self) -> None:
        now = time.monotonic()
        self._deadline = self._deadline or now + START_PATIENCE
        if now > self._deadline:
            self._deadline = 0.0
            raise NotStarted('the host agent doesn\'t start: %s' % self._last_words())
        if (now - self._started > START_AGAIN or not self._started) and self._is_first():
            self._started = now
            start_orphaned(self._command + [self.ini], self.folder)

    def _is_first(self) -> bool:
        """Whether no other task has started one just now: a client starts many tasks at once."""
        path = os.path.join(self.folder, STARTING)
        with contextlib.suppress(OSError):
            if not 0 <= time.time() - os.stat(path).st_mtime < START_AGAIN:
                os.remove(path)
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return False
        except OSError:                # the start itself tells why nothing can be written there
            pass
        return True

    def _free_port(self) -> int:
        """The port that guests' agents try by themselves, where it is free now, and no other project of the
        client has it; else any that is free."""
        projects = os.path.dirname(os.path.dirname(os.path.abspath(self.folder)))
        taken = []
        for path in glob.glob(os.path.join(glob.escape(projects), '*', 'vmhost', 'host.ini')):
            with contextlib.suppress(OSError), open(path, encoding='utf-8', errors='replace') as file:
                taken += re.findall(r'^port *= *(\d+)', file.read(), re.MULTILINE)
        if str(BROKER_PORT) not in taken and agent.port_is_free('127.0.0.1', BROKER_PORT):
            return BROKER_PORT
        with socket.socket() as listener:
            listener.bind(('127.0.0.1', 0))
            return int(listener.getsockname()[1])

    def take_another_port(self) -> bool:
        """Has its broker listen on a free port from now on, where another program has taken its own; not
        where the ini file isn't as it was written here. Whether that was done. Raises OSError."""
        port = self._read_settings().Broker.port
        with open(self.ini, encoding='utf-8') as file:
            text = file.read()
        if agent.port_is_free('127.0.0.1', port) or text != INI % port:
            return False
        with open(self.ini + '.new', 'w', encoding='utf-8') as file:
            file.write(INI % self._free_port())
        agent.replace(self.ini + '.new', self.ini)
        self._settings = None
        return True

    def _last_words(self) -> str:
        """The last line of what it printed."""
        with contextlib.suppress(OSError, IndexError):
            with open(os.path.join(self.folder, PRINTED), encoding='utf-8', errors='replace') as file:
                return file.read().strip().splitlines()[-1]
        return 'its log is in %s' % self.folder


def is_older(version: str) -> bool:
    """Whether a version is before ours."""
    theirs, ours = [[int(number) for number in re.findall('[0-9]+', each)]
                    for each in (version, agent.VERSION)]
    return theirs < ours


def write_new(path: str, text: str) -> None:
    """Writes a file, whole or not at all, unless there is one: another task may be doing the same. Raises
    OSError."""
    # Not by tempfile: see agent.momentary_file.
    temporary = '%s.%s' % (path, os.urandom(8).hex())
    with open(temporary, 'x', encoding='utf-8') as file:
        file.write(text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:                    # a file system without links
        agent.replace(temporary, path)
        return
    os.remove(temporary)


def start_orphaned(command: List[str], folder: str) -> None:
    """Starts a program that is nobody's child: a BOINC client ends a task's descendants at its end.

    It lives in ``folder``, and what it prints is kept there. Raises OSError.
    """
    starter = ('import subprocess, sys\n'
               'with open(sys.argv[1], "ab") as out:\n'
               '    subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, stdout=out, stderr=out, '
               '**({"creationflags": 0x8} if sys.platform == "win32" else {"start_new_session": True}))')
    with open(os.path.join(folder, PRINTED), 'ab'):    # here, where it is told why it can't be
        pass
    environment = {name: value for name, value in os.environ.items() if name != 'LD_LIBRARY_PATH'}
    subprocess.run([sys.executable, '-c', starter, PRINTED] + command, cwd=folder, env=environment,
                   check=True, stdin=subprocess.DEVNULL)
