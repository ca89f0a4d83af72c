"""Runs cctools' chirp_server, with the rights that our own server would have.

What it is not: a server, or a judge of who may do what (its ACL files). Thread ``chirp-watch`` starts the
process and waits for it. No locks.
"""

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from typing import Any, Callable, Iterable, List, Optional, Tuple

from chirpserver import CLIENTS, IDLE
from chirpwire import ChirpError

log = logging.getLogger('vmhost.chirp')

START_TIME = 20.0              # seconds until the real server listens
RESTART_MOST = 30.0            # seconds before it is started again, at most


class RealChirpServer:
    """Runs cctools' chirp_server with the same rights as ours, and starts it again should it end.

    What its ACL files say it reads at every request, so what may come in can change while it runs. It
    takes any connection and then refuses it, its clients can reach ``.__acl``, it knows addresses alone, no
    secret, no TLS, no spool: ours is tighter. Raises ChirpError where its folder or its user is no good.
    """

    def __init__(self, root: str, host: str = '127.0.0.1', port: int = 0,
                 allow: Optional[Iterable[str]] = None, rights: str = 'rwld',
                 max_clients: int = CLIENTS, idle_timeout: float = IDLE,
                 user: str = 'nobody', program: str = 'chirp_server') -> None:
        self.root = os.path.realpath(root)
        self._host, self._port = host, port
        self._rights = rights
        self._limits = (max_clients, idle_timeout)
        self._user = user if os.getuid() == 0 else ''
        self._program = program
        self._allowed = sorted(allow or ())
        self._folder = ''              # what the server keeps beside
        self._process: Optional[subprocess.Popen] = None
        self._listens = False
        self._trouble = ''             # why it didn't start, the last time that it didn't
        self._tried = threading.Event()        # it has listened, or failed to
        self._stopping = threading.Event()
        self._thread: Optional[threading.Thread] = None

    @property
    def address(self) -> Tuple[str, int]:
        """Host and port that it listens on; port 0 while it doesn't."""
        if self._thread is None:
            raise ChirpError('the server is not started')
        return self._host, self._port if self._listens else 0

    def allow(self, addresses: Iterable[str]) -> None:
        """From now on these addresses may do something, and no other."""
        self._allowed = sorted(addresses)
        if self._thread is not None:
            self._write_rights()

    def start(self) -> 'RealChirpServer':
        """Returns once it listens. Raises ChirpError where it doesn't at the first try."""
        self.begin(lambda: None, 2 * START_TIME)
        if not self._listens:
            self.stop(0)
            raise ChirpError('%s: %s' % (self._program, self._trouble))
        return self

    def begin(self, listens: Callable[[], None], patience: float) -> None:
        """Waits at most so many seconds until it listens, or has failed to; tries on in the background.
        ``listens`` is called on the thread ``chirp-watch`` each time that it has come up."""
        import tempfile
        self._folder = tempfile.mkdtemp(prefix='chirp-')
        try:
            self._give(self._folder)
            self._write_rights()
        except (OSError, ChirpError) as error:
            self._clean()
            raise ChirpError('%s: %s' % (self._program, error))
        self._thread = threading.Thread(target=self._watch, args=(listens,), name='chirp-watch', daemon=True)
        self._thread.start()
        self._tried.wait(patience)

    def stop(self, timeout: float = 5.0) -> None:
        """Ends it and its connections."""
        self._stopping.set()
        self._end_process(timeout)
        if self._thread is not None:
            self._thread.join(timeout)
        self._end_process(0)           # one that the watcher had just started
        self._clean()

    def __enter__(self) -> 'RealChirpServer':
        return self.start()

    def __exit__(self, *exception: Any) -> None:
        self.stop()

    def _words(self) -> List[str]:
        clients, idle = self._limits
        words = [self._program, '-r', self.root, '-I', self._host,
                 '-Z', self._file('port'), '-p', str(self._port),       # in this order: -Z asks for any port
                 '-a', 'address', '--inherit-default-acl',
                 '-u', '127.0.0.1', '-U', '1000d',      # else it tells a public catalog of itself
                 '-n', 'guest', '-y', self._folder, '-t', str(int(idle)), '-M', str(clients), '-E']
        return words + (['-i', self._user] if self._user else [])

    def _file(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def _give(self, path: str) -> None:
        """Lets the server's user have it."""
        if self._user:
            import shutil  # it and tempfile are megabytes that the embedded server doesn't need
            try:
                shutil.chown(path, self._user)
            except LookupError:
                raise ChirpError('no user %s' % self._user)

    def _write_rights(self) -> None:
        self._write('.__acl', ''.join('address:%s %s\n' % (address, self._rights)
                                      for address in self._allowed))

    def _write(self, name: str, text: str) -> None:
        """All at once, and not through a link that lies there."""
        temporary = os.path.join(self.root, '.__' + os.urandom(8).hex())
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, 'w') as file:
            file.write(text)
        self._give(temporary)
        os.rename(temporary, os.path.join(self.root, name))

    def _launch(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._file('port'))
        with open(self._file('log'), 'wb') as output:
            self._process = subprocess.Popen(self._words(), stdin=subprocess.DEVNULL, stdout=output,
                                             stderr=output, cwd=self._folder)
        end = time.monotonic() + START_TIME
        while not self._read('port').endswith('\n'):
            if self._process.poll() is not None or time.monotonic() > end or self._stopping.wait(0.02):
                self._end_process(0)
                raise ChirpError('it did not start: %s' % self._read('log').strip()[-300:])
        self._port = int(self._read('port'))

    def _read(self, name: str) -> str:
        try:
            with open(self._file(name), errors='replace') as file:
                return file.read()
        except OSError:
            return ''

    def _watch(self, listens: Callable[[], None]) -> None:
        pause = 1.0
        while not self._stopping.is_set():
            began = time.monotonic()
            why = self._run(listens)
            self._tried.set()
            if time.monotonic() - began > RESTART_MOST:
                pause = 1.0
            if why != self._trouble and not self._stopping.is_set():
                log.warning('%s: %s; it is started again in %g s', self._program, why, pause)
            self._trouble = why
            self._stopping.wait(pause)
            pause = min(2 * pause, RESTART_MOST)

    def _run(self, listens: Callable[[], None]) -> str:
        """Starts it, and waits for its end; what became of it."""
        try:
            self._launch()
        except (OSError, ChirpError) as error:
            return str(error)
        assert self._process is not None
        self._trouble, self._listens = '', True
        log.info('%s serves %s on %s:%d', self._program, self.root, *self.address)
        self._tried.set()
        listens()
        code = self._process.wait()
        self._listens = False
        return 'it ended with %d' % code

    def _end_process(self, timeout: float) -> None:
        """Politely, then with force; the processes that serve its clients, too: they are its group."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if process.poll() is None:
                process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
        with contextlib.suppress(OSError):
            if os.getpgid(0) != process.pid:
                os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            process.kill()
        process.wait()

    def _clean(self) -> None:
        import shutil
        self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)
