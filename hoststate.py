"""The state folder: the directory that holds everything a host agent keeps on disk.

What it is not: the journal, which is one of the files in it. No threads. One host agent at a time may
use a folder; a lock file in it says so.
"""

import contextlib
import os
import secrets
import sqlite3
from typing import Callable

from faults import Busy, VMHostError


class StateFolder:
    """``state_dir``: journal, token, output of commands."""

    def __init__(self, path: str) -> None:
        """Creates and locks it. Raises VMHostError where it can't be used, Busy where another host does."""
        self.path = path
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)
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

    def secret(self, name: str, make: Callable[[], str] = lambda: secrets.token_urlsafe(24)) -> str:
        """The text of a file that only this user can read; made at the first call."""
        path = self.file(name)
        if not os.path.exists(path):
            temporary = path + '.new'
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, 'w') as file:
                file.write(make().strip() + '\n')
            os.replace(temporary, path)
        with open(path) as file:
            return file.read().strip()

    def close(self) -> None:
        """Lets another host use the folder."""
        self._lock.close()
