"""A host agent with VirtualBox, the real one or the fake, and what the tests of VMs share."""

import contextlib
import os
import signal
import xmlrpc.client

from agents import Host, Process
from helpers import wait_until

TESTS = os.path.dirname(os.path.abspath(__file__))


class VMHost(Host):
    """A host agent that drives VirtualBox; ``environment`` is laid over that of the tests."""

    def __init__(self, folder, environment=None, hypervisor=None, network=None, desktop=None, broker=None,
                 **host):
        ini = {'Broker': dict({'port': 0}, **(broker or {})),
               'Host': dict({'xmlrpc_port': 0}, **host),
               'Hypervisor': dict({'hypervisor': 'VirtualBox'}, **(hypervisor or {})),
               'Network': dict({'mode': 'nat'}, **(network or {})),
               'RemoteDesktop': desktop or {}}
        Process.__init__(self, folder, 'vmhost', ini)
        self.state = os.path.join(self.folder, 'vmhost-state')
        self.environment = environment or {}

    def start(self):
        with environment(self.environment):
            return super().start()

    def events(self, after=0):
        """All events with a number above ``after``, however many answers they come in."""
        found = []
        with self.api as api:
            while True:
                told = api.getEvents(after)
                if not told['events']:
                    return found
                found += told['events']
                after = told['last']

    def wait_for_event(self, type, vm, after=0, timeout=20, text=None):
        """The first such event above ``after``, of any text or of that one."""
        return wait_until(lambda: next((
            event for event in self.events(after)
            if (event['type'], event['vm']) == (type, vm) and text in (None, event['text'])), None), timeout)

    def last_event(self):
        events = self.events()
        return events[-1]['seq'] if events else 0

    def driver_pid(self):
        """The process in which VirtualBox's API is used."""
        for pid in processes():
            if parent_of(pid) == self.process.pid:
                return pid
        return None


@contextlib.contextmanager
def environment(changes):
    """The environment with these changes, for a moment."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def fault_of(call, *args):
    """(code, text) of the fault that a call ends with; (0, answer) where it doesn't."""
    try:
        return 0, call(*args)
    except xmlrpc.client.Fault as fault:
        return fault.faultCode, fault.faultString


def processes():
    """The numbers of all processes."""
    return [int(name) for name in os.listdir('/proc') if name.isdigit()]


def parent_of(pid):
    with contextlib.suppress(OSError):
        with open('/proc/%d/stat' % pid) as file:
            return int(file.read().rpartition(')')[2].split()[1])
    return 0


def command_line(pid):
    """A process's words; [] where it has ended."""
    with contextlib.suppress(OSError):
        with open('/proc/%d/cmdline' % pid, 'rb') as file:
            return [word.decode('utf-8', 'replace') for word in file.read().split(b'\0')[:-1]]
    return []


def kill(pid):
    """KILLs a process that may have ended, and waits for its end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not command_line(pid), 20)
