"""What the fault tests share: agents that can be told to die, proofs that a command ran, free ports."""

import json
import os
import signal
import socket
import sys
import xmlrpc.client

import agents
from helpers import wait_until

HERE = os.path.dirname(os.path.abspath(__file__))
WRAPPED = os.path.join(HERE, 'wrapped.py')


def free_port():
    """A port that is free now; a broker that is restarted has to come back on it."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


class Wrapped:
    """A process of agents.py that runs in wrapped.py; ``faults`` are its next start's."""

    def start(self, *args, **kwargs):
        with open(os.path.join(self.folder, 'fault.json'), 'w') as file:
            json.dump(dict(self.faults, program=self.program), file)
        return super().start(*args, **kwargs)

    def words(self):
        return [sys.executable, WRAPPED, self.ini]

    def kind_of_fork(self):
        """'' where it has a clock of its own, which its modules must have from the first."""
        return '' if 'clock' in self.faults else 'wrapped ' + self.program

    def wait_for_death(self, timeout=60):
        """Until it has killed itself."""
        assert wait_until(lambda: self.process.poll(), timeout) == -signal.SIGKILL, self.log()

    def has_died(self):
        """Whether it, or one of its runners, has killed itself where it was told to."""
        return os.path.exists(os.path.join(self.folder, 'died'))


class Host(Wrapped, agents.Host):
    """A host on a port of its own, to which it comes back."""

    def __init__(self, folder, broker=None, **host):
        self.faults = {}
        super().__init__(folder, dict({'port': free_port()}, **(broker or {})), **host)


class Agent(Wrapped, agents.Agent):
    """A guest agent."""

    def __init__(self, folder, host, id, **vm):
        self.faults = {}
        super().__init__(folder, host, id, **vm)
        self.spool = os.path.join(self.state, 'spool', id)


class Proof:
    """A command that appends a line to a file of its own: the only proof that it ran."""

    def __init__(self, folder, seconds=0.0, code=7):
        self.path = os.path.join(str(folder), 'proof')
        self.code = code
        self.args = ['-c', 'echo ran >> "$1"; sleep "$2"; echo done; exit "$3"', 'sh', self.path,
                     str(seconds), str(code)]

    def ask(self, host, vm, **options):
        """runCmd; the cmd-id, or '' where the host died over it."""
        with host.api as api:
            try:
                return api.runCmd(vm, 'sh', self.args, {}, '', '', options)
            except (OSError, xmlrpc.client.ProtocolError):
                return ''

    def runs(self):
        """How often it ran."""
        try:
            with open(self.path) as file:
                return len(file.readlines())
        except FileNotFoundError:
            return 0

    def check(self, results):
        """The results are those of one run."""
        assert (results['state'], results['exitCodeOrSignal'], results['out']) == \
            ('exited', self.code, 'done\n'), results
        assert self.runs() == 1


def events(host, cmd_id, type):
    """The events of that type which the journal has for a command."""
    found, last = [], 0
    with host.api as api:
        while True:
            some = api.getEvents(last, 0)
            if not some['events']:
                return found
            found += [event for event in some['events'] if (event['cmdId'], event['type']) == (cmd_id, type)]
            last = some['last']
