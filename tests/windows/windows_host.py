"""A host agent on the Windows rig, and its verbs there."""

import contextlib
import os
import sqlite3

from agents import TOP, Host
from wine import Program, path_there, start_of


class WindowsHost(Host):
    """A host agent there. Its folder is one of this machine."""

    on_windows = True
    bundle = ''                        # of which it runs, instead of the folder of sources

    def words(self):
        return start_of('python') + self.typed()

    def typed(self):
        """What a person types behind ``python``."""
        return [path_there(self.bundle or os.path.join(TOP, 'vmhost.py')), path_there(self.ini)]

    def log(self):
        return super().log().replace('\r\n', '\n')

    def has_stopped_in_order(self):
        """Whether its journal ends with that, once."""
        with contextlib.closing(sqlite3.connect(os.path.join(self.state, 'journal.sqlite'))) as journal:
            events = journal.execute("SELECT type FROM events WHERE type LIKE 'host-%' ORDER BY seq")
            return [row[0] for row in events] == ['host-start', 'host-stop']

    def begin(self, folder, *words, **options):
        """Begins a verb in a folder."""
        return Program('python', *(self.typed() + list(words)), folder=folder, **options)

    def run_there(self, folder, *words):
        """Runs a verb in a folder: (exit code, what it said)."""
        return self.begin(folder, *words).wait()
