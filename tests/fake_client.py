"""A BOINC client for one task, in the test's process: a slot, shared memory, and what the client reads there.

It starts vmboinc as a client does, and does what a test says. Whether a real one does the same shows
test_boinc_client.py.
"""

import contextlib
import mmap
import os
import signal
import subprocess
import sys

import agents
from helpers import wait_until

from boincslot import CHANNEL, CHANNELS, CONTROL, STATUS, Channels

INIT = """<app_init_data>
<major_version>7</major_version>
<minor_version>20</minor_version>
<result_name>%s</result_name>
<project_dir>%s</project_dir>
<boinc_dir>%s</boinc_dir>
<slot>0</slot>
<client_pid>%d</client_pid>
<wu_cpu_time>0.0</wu_cpu_time>
<checkpoint_period>1.0</checkpoint_period>
<fraction_done_start>0.0</fraction_done_start>
<fraction_done_end>1.0</fraction_done_end>
<ncpus>1.0</ncpus>
<global_preferences><cpu_usage_limit>%g</cpu_usage_limit>
<max_bytes_sec_up>%g</max_bytes_sec_up>
<suspend_cpu_usage>%g</suspend_cpu_usage></global_preferences>
</app_init_data>
"""


class FakeClient:
    """A client's folder with one task; ``environment`` is laid over that of the tests."""

    def __init__(self, folder, name='t1', project='project', environment=None):
        self.folder, self.name = str(folder), name
        self.project = os.path.join(self.folder, 'projects', project)
        self.slot = os.path.join(self.folder, 'slots', name)
        self.environment = environment or {}
        self.process = self._memory = self.channels = None
        self.told = []                 # all status messages
        for path in (self.project, self.slot):
            os.makedirs(path, exist_ok=True)
        self.init()
        with open(os.path.join(self.slot, 'boinc_mmap_file'), 'wb') as file:
            file.write(bytes(CHANNELS * CHANNEL))

    def init(self, cpu_limit=100, pid=None, rate=0, foreign_cpu=0):
        """Writes init_data.xml."""
        self.write('init_data.xml', INIT % (self.name, self.project, self.folder, pid or os.getpid(),
                                            cpu_limit, rate, foreign_cpu))

    def write(self, name, text):
        """A file in the slot."""
        with open(os.path.join(self.slot, name), 'w') as file:
            file.write(text)

    def read(self, name):
        """The text of a file in the slot, '' while there is none."""
        with contextlib.suppress(FileNotFoundError):
            with open(os.path.join(self.slot, name)) as file:
                return file.read()
        return ''

    def link(self, logical, text=None):
        """A file of the project under a logical name; with a text, it is there."""
        path = os.path.join(self.project, '%s_%s' % (self.name, logical))
        if text is not None:
            with open(path, 'w') as file:
                file.write(text)
        self.write(logical, '<soft_link>%s</soft_link>\n' % os.path.relpath(path, self.slot))
        return path

    def start(self, *words):
        """Starts the task's program."""
        with open(os.path.join(self.slot, 'boinc_mmap_file'), 'r+b') as file:
            self._memory = mmap.mmap(file.fileno(), CHANNELS * CHANNEL)
        self._memory[:] = bytes(len(self._memory))
        self.channels = Channels(self._memory)
        for name in ('boinc_temporary_exit', 'boinc_finish_called'):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.slot, name))
        with open(os.path.join(self.slot, 'stderr.txt'), 'ab') as stderr:
            self.process = subprocess.Popen(
                [sys.executable, os.path.join(agents.TOP, 'vmboinc.py')] + list(words), cwd=self.slot,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
                env=dict(os.environ, **self.environment))
        return self

    def says(self, word):
        """Tells the task a word of the client's."""
        wait_until(lambda: self.channels.send(CONTROL, '<%s/>' % word))

    def status(self, tag):
        """A number that the task told last; 0 where it told none."""
        self.look()
        parts = (self.told[-1] if self.told else '').split('<%s>' % tag)
        return float(parts[1].split('<')[0]) if len(parts) > 1 else 0.0

    def look(self):
        """Reads what the task tells. Fails where it has ended, unless that is waited for."""
        text = self.channels.receive(STATUS)
        if text:
            self.told.append(text)

    def wait(self, predicate, timeout=30):
        """Waits for something while the task runs."""
        def held():
            self.look()
            assert self.process.poll() is None, 'the task ended:\n' + self.read('stderr.txt')
            return predicate()
        return wait_until(held, timeout, 0.1)

    def wait_for_end(self, timeout=30):
        """The exit code."""
        def ended():
            self.look()
            return self.process.poll() is not None
        try:
            wait_until(ended, timeout, 0.1)
        except AssertionError:
            raise AssertionError('the task goes on:\n' + self.read('stderr.txt'))
        return self.process.returncode

    def close(self):
        """Ends what is left of the task."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
