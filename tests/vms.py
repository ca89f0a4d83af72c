"""A host agent with VirtualBox, the real one or the fake, and what the tests of VMs share."""

import contextlib
import os
import signal
import xmlrpc.client

import fake_virtualbox
from agents import Host, Process
from helpers import wait_until

import hypervisor
import virtualbox

SETTINGS = {                   # of a driver, as the host agent gives them
    'network': {'mode': 'nat', 'host_ip': ''}, 'remote_desktop': {'ports': '5000-5050'},
    'chirp_port': 9094, 'state_dir': '', 'command_timeout': 1}
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
        """The process that looks at the VMs."""
        return next(iter(self.driver_pids('watcher')), None)

    def driver_pids(self, kind):
        """The processes in which VirtualBox's API is used: watcher or worker."""
        return [pid for pid in processes()
                if parent_of(pid) == self.process.pid and command_line(pid)[-1:] == [kind]]


class Here:
    """VirtualBox's driver in this process, on a fake of its own, ``fake``. Each verb is a method;
    ``others``: what else is under way, as [verb, VM]."""

    def __init__(self, settings, fake=None):
        self.fake = fake or fake_virtualbox.VirtualBox()
        self.told, self.others = [], []
        manager = fake_virtualbox.VirtualBoxManager()
        manager.getVirtualBox = lambda: self.fake
        self.driver = virtualbox.VirtualBox(settings, lambda: manager)

    def __getattr__(self, verb):
        def call(*args):
            self.driver.connect()
            message = {'verb': verb, 'args': args, 'others': self.others}
            job = hypervisor.Job(message, self.driver.settings['command_timeout'], self.told.append)
            try:
                return self.driver.find_verb(verb)(job, *args)
            except fake_virtualbox.FakeError as error:
                raise self.driver.translate(error)
        return call


@contextlib.contextmanager
def here(settings, fake=None):
    driver = Here(settings, fake)
    yield driver
    driver.driver.disconnect()


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


def listed(api):
    """The VMs, before and after a test: there a hypervisor that others' work holds up has a minute."""
    return wait_until(lambda: [found for code, found in [fault_of(api.listVMs)] if not code], 60, 0.2)[0]


@contextlib.contextmanager
def removing_new_vms(api):
    """Whatever VM is made meanwhile goes at the end."""
    before = set(listed(api))
    yield
    for name in set(listed(api)) - before:
        fault_of(api.powerOff, name)
        api.removeVM(name, True)


def command_line(pid):
    """A process's words; [] where it has ended."""
    with contextlib.suppress(OSError):
        with open('/proc/%d/cmdline' % pid, 'rb') as file:
            return [word.decode('utf-8', 'replace') for word in file.read().split(b'\0')[:-1]]
    return []


def kill(pid):
    """KILLs a process that may have ended, and waits for its end."""
    assert pid > 0, pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not command_line(pid), 20)
