"""The state folder: the directory that holds everything a host agent keeps on disk, for its user alone.

What it is not: the journal, which is one of the files in it. No threads. One host agent at a time may
use a folder; a lock file in it says so.
"""

import contextlib
import os
import secrets
import shlex
import sqlite3
import stat
from typing import Callable

import agent
from faults import Busy, VMHostError

PORT = '.port'                 # how the name of a file ends that holds a port of last time

class StateFolder:
    """``state_dir``: journal, token, output of commands."""

    def __init__(self, path: str) -> None:
        """Creates and locks it. Raises VMHostError where it can't be used, Busy where another host does."""
        self.path = path
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)
            self.make_private()
            self._lock = sqlite3.connect(self.file('lock'), isolation_level=None, timeout=0,
                                         check_same_thread=False)
            # SQLite's locks work on every system, and end with the process, however it ends.
            self._lock.execute('BEGIN EXCLUSIVE')
        except OSError as error:
            raise VMHostError('state_dir %s can\'t be used: %s; fix that, or set another folder in [Host]'
                              % (path, error.strerror or error))
        except sqlite3.OperationalError as error:
            if 'locked' in str(error):
                raise Busy('another vmhost runs on the state folder %s; stop it, or give this one '
                           'a state_dir of its own in [Host]' % path)
            raise VMHostError('state_dir %s can\'t be written: %s; %s, or set another folder in [Host]' % (
                path, error, 'make room' if 'full' in str(error) else 'change its owner or mode'))

    def file(self, name: str) -> str:
        """The path of a file in the folder."""
        return os.path.join(self.path, name)

    def make_private(self) -> None:
        """Takes the folder, and the files in it, from everybody but this user. Raises VMHostError where that
        isn't enough: another user owns one, or could have put it there."""
        if os.name == 'nt':
            return self._make_private_on_windows()
        mode = self._check_owner(self.path)
        if mode & 0o022:
            raise VMHostError('state_dir %s: other users may have written into it; check what is there, '
                              'then: chmod 700 %s' % (self.path, shlex.quote(self.path)))
        make_mode(self.path, 0o700)
        for name in os.listdir(self.path):
            path = self.file(name)
            mode = self._check_owner(path)
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                make_mode(path, 0o600 if stat.S_ISREG(mode) else 0o700)

    def _make_private_on_windows(self) -> None:
        """By the folder's access list: what is made in it has the same."""
        import windows  # there alone
        try:
            owners = (windows.this_user(), windows.SYSTEM, windows.ADMINISTRATORS)
            for path in [self.path] + [self.file(name) for name in os.listdir(self.path)]:
                owner = windows.owner_of(path)
                if owner not in owners:            # who may change its access list at any time
                    raise OSError('%s belongs to another user (%s)' % (
                        'it' if path == self.path else os.path.basename(path), owner))
            windows.make_private(self.path)
        except OSError as error:
            raise VMHostError('state_dir %s: others may read it, which can\'t be changed: %s; set a folder '
                              'of your own, on an NTFS disk, in [Host]'
                              % (self.path, error.strerror or error))

    def _check_owner(self, path: str) -> int:
        """The mode of what this user owns. Raises VMHostError, OSError."""
        found = os.stat(path) if path == self.path else os.lstat(path)
        if found.st_uid != os.geteuid():
            raise VMHostError('state_dir: %s belongs to another user (uid %d); run the host agent as that '
                              'user, or: chown -R %d %s' % (path, found.st_uid, os.geteuid(),
                                                            shlex.quote(self.path)))
        return found.st_mode

    def write(self, name: str, text: str) -> None:
        """Writes a file that only this user can read; who reads it sees the old text or the new one.

        Raises OSError, which names the file also where the disk is full.
        """
        temporary = self.file(name) + '.new'
        descriptor = agent.while_held(lambda: make_anew(temporary), agent.NOT_TO_WRITE, temporary)
        try:
            with os.fdopen(descriptor, 'w') as file:
                file.write(text + '\n')
            agent.replace(temporary, self.file(name))
        except OSError as error:
            error.filename = error.filename or self.file(name)
            raise

    def secret(self, name: str, make: Callable[[], str] = lambda: secrets.token_urlsafe(24)) -> str:
        """The text of a file that only this user can read; made at the first call."""
        path = self.file(name)
        if not os.path.exists(path):
            self.write(name, make().strip())
        return agent.read_bytes(path).decode('ascii').strip()

    def port(self, name: str, address: str, configured: int) -> int:
        """The port that is configured; where any will do (0), the one that ``keep_port`` noted under that
        name, if nobody listens there now: who knows the agent by it finds it again."""
        try:
            last = int(agent.read_bytes(self.file(name + PORT)))
        except (OSError, ValueError):      # the first start, or somebody wrote into it
            return configured
        usable = 0 < last < 65536 and agent.port_is_free(address, last)
        return last if usable and not configured else configured

    def keep_port(self, name: str, port: int) -> None:
        """Notes a port for the next start. Raises OSError."""
        self.write(name + PORT, str(port))

    def size(self, name: str) -> int:
        """Of a file, in bytes; 0 where there is none."""
        try:
            return os.path.getsize(self.file(name))
        except OSError:
            return 0

    def close(self) -> None:
        """Lets another host use the folder."""
        self._lock.close()


def make_anew(path: str) -> int:
    """A new file in the place of what had that name, that only this user can read: open to write. Raises
    OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def make_mode(path: str, mode: int) -> None:
    """Changes the mode of a file or folder, unless it is that. Raises OSError."""
    if stat.S_IMODE(os.lstat(path).st_mode) != mode:
        os.chmod(path, mode)
