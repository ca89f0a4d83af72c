"""Real host and guest processes for the tests, each in a folder of its own.

``Host`` and ``Agent`` start what a user would start: ``python vmhost.py host.ini`` and
``python vmguest.py guest.ini``, on free ports; both end with the ``with`` block. pytest starts the same from
their compiled form: Python keeps that of modules, and compiles a script anew each time, which takes as long
as all the rest of a start.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import xmlrpc.client

import forks
import pytest
import wine
from helpers import wait_until

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


ON_WINDOWS = bool(os.environ.get('VMHOST_HOST_ON_WINDOWS'))
posix_host = pytest.mark.skipif(ON_WINDOWS, reason='what the host has on POSIX alone')
compiled = False               # conftest.py sets it
COMPILED = 'import runpy, sys; sys.path[0] = %r; runpy.run_module(%r, None, "__main__", True)'


def command(program, *words, on_windows=False):
    """What starts vmhost, vmguest, or a bundle, with these words."""
    python = wine.start_of('python') if on_windows else [sys.executable]
    top = wine.path_there(TOP) if on_windows else TOP
    if program.endswith('.pyz'):
        start = [wine.path_there(program) if on_windows else program]
    else:
        start = ['-c', COMPILED % (top, program)] if compiled else [os.path.join(top, program + '.py')]
    return python + start + list(words)


class Process:
    """One agent's process; what it logs goes into a file."""

    on_windows = False

    def __init__(self, folder, program, ini):
        self.folder = str(folder)
        os.makedirs(self.folder, exist_ok=True)
        self.program = program
        self.ini = os.path.join(self.folder, 'agent.ini')
        with open(self.ini, 'w') as file:
            for section, keys in ini.items():
                file.write('[%s]\n' % section)
                file.writelines('%s = %s\n' % item for item in keys.items())
        os.chmod(self.ini, 0o600)      # as long as a password stands there
        self.log_path = os.path.join(self.folder, 'log')
        self.process = None

    def start(self):
        with open(self.log_path, 'ab') as log:
            self.process = self._begin(log)
        return self

    def _begin(self, log):
        kind = self.kind_of_fork()
        if kind:
            with contextlib.suppress(forks.Unfit):
                return forks.start(kind, [self.ini], self.folder, log)
        words = wine.INTO_FILE + [self.log_path] + self.words() if self.on_windows else self.words()
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder)

    def kind_of_fork(self):
        """What forks it, of forks.MODULES; '' where none will do: it is started with other words."""
        is_plain = compiled and self.words() == command(self.program, self.ini)
        return self.program if is_plain and self.program in forks.MODULES else ''

    def words(self):
        """What starts it."""
        return command(self.program, self.ini, on_windows=self.on_windows)

    def log(self):
        with open(self.log_path, errors='replace') as file:
            return file.read()

    def stop(self, number=signal.SIGTERM, timeout=20):
        """Ends it; gives the exit code. KILLs it, and fails, when it takes too long."""
        if self.process is None:
            return None
        if self.on_windows:            # which has Ctrl-C alone
            number, timeout = signal.SIGINT if number == signal.SIGTERM else number, timeout + 20
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError('%s took more than %s s to stop:\n%s'
                                 % (self.program, timeout, self.log()))

    def __enter__(self):
        return self.start()

    def __exit__(self, *exc):
        self.stop()


class Host(Process):
    """A host agent on free ports, with its API as ``api``."""

    on_windows = ON_WINDOWS

    def __init__(self, folder, broker=None, hypervisor='none', **host):
        ini = {'Broker': dict({'port': 0}, **(broker or {})),
               'Host': dict({'xmlrpc_port': 0}, **host), 'Hypervisor': {'hypervisor': hypervisor}}
        super().__init__(folder, 'vmhost', ini)
        self.state = os.path.join(self.folder, host.get('state_dir', 'vmhost-state'))

    def start(self, wait=True):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(self.state, 'xmlrpc.address'))
        super().start()
        if not wait:
            return self
        try:
            wait_until(lambda: self.process.poll() is not None or self.answers(), 60)
            assert self.process.poll() is None, 'the host ended:\n' + self.log()
        except BaseException:
            self.stop(signal.SIGKILL)
            raise
        return self

    @property
    def address(self):
        with open(os.path.join(self.state, 'xmlrpc.address')) as file:
            return file.read().strip()

    @property
    def token(self):
        with open(os.path.join(self.state, 'xmlrpc.token')) as file:
            return file.read().strip()

    @property
    def url(self):
        return self.url_at(self.address)

    def url_at(self, address):
        return 'http://vmhost:%s@%s/' % (self.token, address)

    @property
    def api(self):
        """A new proxy: one per thread."""
        return self.api_at(self.address)

    def api_at(self, address):
        """The same by another address, which leads there."""
        return xmlrpc.client.ServerProxy(self.url_at(address), allow_none=True)

    def answers(self):
        try:
            with self.api as api:
                self.broker_port = int(api.agentInfo()['broker']['address'].rpartition(':')[2])
            return True
        except (OSError, ValueError):
            return False

    def run(self, vm, cmd, *args, **options):
        """Runs a command to its end; gives its results."""
        with self.api as api:
            return self.results(api.runCmd(vm, cmd, list(args), {}, '', '', options))

    def results(self, cmd_id, timeout=60):
        deadline = time.monotonic() + timeout
        with self.api as api:
            while not api.waitCmd(cmd_id, 20):
                assert time.monotonic() < deadline, 'no end of %s:\n%s' % (cmd_id, self.log())
            return api.getCmdResults(cmd_id)

    def command(self, *words):
        """What runs a verb of the command line."""
        return command('vmhost', self.ini, *words, on_windows=self.on_windows)

    def verb(self, *words, **kwargs):
        """Runs a verb of the command line; gives the finished process, with bytes; what it says of itself is
        UTF-8, and its errors have lines as here. Where nothing is told but where, and how long, it is a
        fork."""
        if set(kwargs) <= {'cwd', 'timeout'} and not self.on_windows and self.program == 'vmhost':
            with contextlib.suppress(forks.Unfit):
                return forks.run((self.ini,) + words, **kwargs)
        if self.on_windows:
            kwargs['env'] = dict({'PYTHONIOENCODING': 'utf-8'}, **kwargs.get('env', os.environ))
        done = subprocess.run(self.command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              timeout=kwargs.pop('timeout', 120), **kwargs)
        if self.on_windows:
            done.stderr = done.stderr.replace(b'\r\n', b'\n')
        return done


class Agent(Process):
    """A guest agent with an explicit id, that joins a host."""

    def __init__(self, folder, host, id, broker=None, chirp=None, **vm):
        self.host = host
        self.id = id
        self.files = os.path.join(str(folder), 'files')
        os.makedirs(self.files, exist_ok=True)
        self.state = os.path.join(str(folder), 'state')
        vm = dict({'id': id, 'name': id, 'dir_to_serve': self.files, 'state_dir': self.state}, **vm)
        ini = {'Broker': dict({'host': '127.0.0.1', 'port': host.broker_port}, **(broker or {})),
               'VM': vm, 'Chirp': dict({'port': 0}, **(chirp or {}))}
        super().__init__(folder, 'vmguest', ini)

    def start(self, wait=True):
        super().start()
        if wait:
            try:
                wait_until(self.has_joined, 20)
            except BaseException:
                self.stop(signal.SIGKILL)
                raise AssertionError('%s did not join:\n%s' % (self.id, self.log()))
        return self

    def has_joined(self):
        with self.host.api as api:
            return self.id in api.getNamesToIdsMapping().values()

    def end_programs(self):
        """Ends what the agent's commands run, which would outlive it; their runners end then, too."""
        mark = ('VM_PROGRESS_FILE=' + self.state).encode()
        for pid in filter(str.isdigit, os.listdir('/proc')):
            with contextlib.suppress(OSError):
                with open('/proc/%s/environ' % pid, 'rb') as file:
                    ours = any(line.startswith(mark) for line in file.read().split(b'\0'))
                if ours:
                    os.kill(int(pid), signal.SIGKILL)
