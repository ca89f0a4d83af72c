"""A terminal with a program on it: what a person types, and sees."""

import os
import pty
import threading


class Terminal:
    """A pseudo-terminal with a process on it, and what that wrote."""

    def __init__(self, words, columns=80, **environment):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            environment = dict(os.environ, COLUMNS=str(columns), TERM='xterm', **environment)
            os.execvpe(words[0], words, environment)
        self.written = b''
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        try:
            while True:
                data = os.read(self.fd, 65536)
                if not data:
                    return
                self.written += data
        except OSError:         # Linux's way to say that the other side has been closed
            return

    def type(self, data):
        os.write(self.fd, data)

    def wait(self):
        """The exit code, as a shell has it, and the text."""
        _, status = os.waitpid(self.pid, 0)
        self._reader.join(20)
        os.close(self.fd)
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
        return code, self.written.decode()
