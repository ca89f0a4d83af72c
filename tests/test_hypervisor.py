"""The contract of drivers, on the fake VirtualBox and on a driver of plain processes."""

import contextlib
import json
import os
import queue
import subprocess
import sys

import fake_virtualbox
import process_driver
import pytest
from driver_cases import *  # noqa: F403 (the tests, for pytest to find)
from helpers import wait_until
from vms import SETTINGS, environment

import driverprocesses
import driverserver
import faults
import hosthypervisor
import hostpulse
import hostseen
import hypervisor
import virtualbox

pytestmark = pytest.mark.skipif(not os.path.isdir('/proc'), reason='looks at /proc')


class OfProcesses(hosthypervisor.Hypervisor):
    """Whose driver is the tests' own."""

    def _command(self):
        return [sys.executable, process_driver.__file__]


@contextlib.contextmanager
def opened(kind, name, settings):
    happened = []
    box = kind(name, settings, lambda *event: happened.append(event))
    box.happened = happened
    box.open()
    try:
        yield box
    finally:
        assert box.close()


@pytest.fixture(params=['fake', 'processes'])
def box(request, tmp_path):
    settings = dict(SETTINGS, state_dir=str(tmp_path), command_timeout=5)
    if request.param == 'processes':
        with environment({'PYTHONPATH': os.pathsep.join(sys.path)}), opened(
                OfProcesses, 'Processes', settings) as box:
            yield box
        return
    with environment(fake_virtualbox.install(tmp_path)), opened(
            hosthypervisor.Hypervisor, 'VirtualBox', settings) as box:
        yield box


@pytest.fixture(params=[virtualbox.VirtualBox, process_driver.Processes])
def driver_class(request):
    return request.param


def test_no_part_of_a_driver_takes_anothers_verb():
    """VirtualBox's driver finds a verb in the first of its parts that has one of that name."""
    driver = virtualbox.VirtualBox(dict(SETTINGS))
    for verb in VERBS:      # noqa: F405
        assert len([part for part in driver._parts if hasattr(part, verb)]) <= 1, verb


def test_who_may_mean_two_vms_is_told_so_by_whatever_he_asks(monkeypatch):
    """Before any driver is asked: a word that is the name of two, or of one and the id of another."""
    def row(name, uuid, id='', state='off'):
        return {'name': name, 'uuid': uuid, 'id': id, 'state': state, 'native': 'PoweredOff', 'trouble': ''}
    box = hosthypervisor.Hypervisor('VirtualBox', dict(SETTINGS, state_dir=''))
    monkeypatch.setattr(box._watcher, 'ask', lambda call, *patience: dict(row(call.vm, call.vm)))
    assert box.refusal_of('u1') == ''
    box._watch.look([row('one', 'u1', '08:00:27:00:00:01'), row('u1', 'u2'), row('08:00:27:00:00:01', 'u3'),
                     row('twin', 'u4'), row('twin', 'u5'), row('whole', 'u6'),
                     row('whole', 'u7', '', 'inaccessible')])
    for word, why in (('u1', 'u1 is the name of a VM, and the uuid of one: use the name of that one, or u2'),
                      ('08:00:27:00:00:01', 'the id of one'), ('twin', 'the name of 2 VMs: .* u4 or u5')):
        for verb in ('describe', 'snapshots', 'get_log', 'state', 'start', 'remove_vm', 'screenshot',
                     'power_off'):
            with pytest.raises(faults.BadState, match=why):
                getattr(box, verb)(word)
    assert [box.refusal_of(word) for word in ('one', 'u2', 'u3', 'u4', 'whole', 'nobody')] == 6 * ['']
    assert box.describe('u4')['uuid'] == 'u4'


def test_a_vm_whose_process_hangs_is_told_to_while_it_does(monkeypatch):
    """Whichever driver it has: beside it, and as an event. What the hypervisor lacks says nothing of it."""
    def row(name, state='running'):
        return {'name': name, 'uuid': name, 'id': '', 'state': state, 'native': 'Running', 'trouble': ''}
    told, answers, asked = [], {}, []
    watch = hostseen.Watch(lambda *event: told.append(event))

    def ask(uuid, patience):
        asked.append(uuid)
        if answers.get(uuid):
            raise answers[uuid]
    monkeypatch.setattr(hostpulse, 'ASK_AGAIN', 0.01)
    monkeypatch.setattr(hostpulse, 'ASK_EVERY', 0.02)
    pulse = hostpulse.Pulse(ask, watch.rows, watch.mark, bool)
    watch.look([row('one'), row('two'), row('off', 'off')])
    answers['one'] = driverprocesses.Unresponsive('no answer')
    pulse.start()
    wait_until(lambda: watch.row_of('one')['trouble'] == hypervisor.HANGS)
    assert watch.row_of('two')['trouble'] == '' and told == [('vm-trouble', 'one', hypervisor.HANGS)]
    watch.look([row('one'), row('two'), row('off', 'off')])
    answers['one'] = faults.DeadlineExceeded('of the hypervisor')
    seen = len(asked)
    wait_until(lambda: len(asked) > seen + 4)
    assert watch.marked([row('one')])[0]['trouble'] == hypervisor.HANGS == watch.rows()[0]['trouble']
    assert not pulse.still_hangs('one')         # nobody can say so
    answers['one'] = driverprocesses.Unresponsive('no answer')
    assert pulse.still_hangs('one')
    answers['one'] = None
    assert not pulse.still_hangs('one')
    wait_until(lambda: watch.row_of('one')['trouble'] == '')
    watch.mark('two', True)
    answers['two'] = faults.NotSupported('the driver knows')
    wait_until(lambda: not pulse._thread.is_alive())
    assert not pulse.still_hangs('two')
    watch.forget('one')
    watch.look([row('two', 'off')])
    watch.look([row('two')])
    assert [each['trouble'] for each in watch.rows()] == [''] and set(asked) == {'one', 'two'}
    pulse.stop()


def test_nobody_is_asked_to_end_a_vm_where_nobody_answers(monkeypatch):
    """That would be waited for as long again, until its process is ended at last."""
    box = hosthypervisor.Hypervisor('VirtualBox', dict(SETTINGS, state_dir=''))
    asked = []

    def call(verb, args=(), patience=None, at_most=0):
        asked.append(verb)
        if verb == 'power_off':
            raise driverprocesses.Unresponsive('no answer')
        return True
    monkeypatch.setattr(box, '_call', call)
    monkeypatch.setattr(box, '_answers', lambda: False)
    box._watch.look([{'name': 'one', 'uuid': 'u1', 'id': '', 'state': 'off', 'native': 'PoweredOff',
                      'trouble': ''}])
    assert box.power_off('one') and asked == ['power_off', 'kill_process']
    monkeypatch.setattr(box, '_answers', lambda: True)
    assert box.power_off('one') and asked[2:] == ['power_off', 'end_process']


def test_what_was_removed_is_on_no_list_though_nobody_has_looked_since():
    def row(name):
        return {'name': name, 'uuid': 'uuid of ' + name, 'id': '', 'state': 'off', 'native': 'PoweredOff',
                'trouble': ''}
    told = []
    watch = hostseen.Watch(lambda *event: told.append(event))
    watch.look([row('one'), row('other')])
    watch.forget('uuid of one')
    watch.forget('')                    # of a VM that was not known
    assert [each['name'] for each in watch.rows()] == ['other'] and watch.row_of('one') is None
    assert told == [('vm-removed', 'one', '')]


def row_of(name, native='PoweredOff', state='off', id=''):
    return {'name': name, 'uuid': 'uuid of ' + name, 'id': id, 'state': state, 'native': native,
            'trouble': ''}


def test_what_is_told_of_one_vm_is_seen_of_it():
    """So that nothing older is told of it; and a new one is there before anybody has looked at all."""
    told = []
    watch = hostseen.Watch(lambda *event: told.append(event))
    watch.describe(dict(row_of('one'), memory=16))
    assert watch.rows() is None         # else it would be taken for all of them
    watch.look([row_of('one'), row_of('other', id='08:00:27:00:00:01')])
    watch.describe(dict(row_of('one', 'Running', 'running'), memory=16, cpus=1))
    watch.describe(dict(row_of('new', id='08:00:27:00:00:01'), memory=16))
    assert watch.rows() == [row_of('one', 'Running', 'running'), row_of('other', id='08:00:27:00:00:01'),
                            row_of('new', id='08:00:27:00:00:01')]
    assert [event[:2] for event in told] == [
        ('vm-state', 'one'), ('vm-clash', 'other'), ('vm-clash', 'new'), ('vm-added', 'new')]


class LooksFor(hypervisor.Driver):
    """While it looks at all VMs, ``meanwhile`` is called."""

    def __init__(self):
        super().__init__({'command_timeout': 1})
        self.vms, self.looks, self.meanwhile = {}, 0, lambda: None

    def machines(self, job):
        self.looks += 1
        rows = [row_of(name, native) for name, native in self.vms.items()]
        self.meanwhile()
        self.rest(True)
        return rows

    def describe(self, job, vm):
        return dict(row_of(vm, self.vms[vm]), memory=16)

    def version(self, job):
        return '1'


@pytest.fixture
def server():
    """A driver's process without one; ``answers``: what it told, by the request's number."""
    inbox, told, driver = queue.Queue(), [], LooksFor()
    server = driverserver.Server(driver, inbox, told.append, True)

    def ask(number, verb, *args):
        inbox.put({'id': number, 'verb': verb, 'args': list(args)})
    server.ask, server.driver, server.told = ask, driver, told

    def serve():
        """All that is asked."""
        server._take_messages(0.001)
        while server._waiting:
            server._serve(server._waiting.pop(0))
        return {each['id']: each['value'] for each in told if 'id' in each}
    server.serve = serve
    return server


def test_no_look_at_all_overtakes_what_was_told_of_one_vm_meanwhile(server):
    """It may have seen that VM before it changed, or before it was there."""
    def change():
        server.driver.vms.update(one='Running', new='PoweredOff')
        server.ask(2, 'describe', 'one')
        server.ask(3, 'describe', 'new')
    server.driver.vms['one'] = 'PoweredOff'
    server.driver.meanwhile = change
    server.ask(1, 'machines')
    answers = server.serve()
    assert [each['id'] for each in server.told if 'id' in each] == [2, 3, 1]
    assert answers[2]['native'] == 'Running' and answers[1] == [row_of('one', 'Running'), row_of('new')]
    server.driver.meanwhile = lambda: None
    server.driver.vms['one'] = 'Paused'
    server.ask(4, 'machines')           # which nobody was told anything of meanwhile
    assert server.serve()[4][0]['native'] == 'Paused'


def test_who_asks_while_all_are_looked_at_has_a_look_of_his_own(server):
    """Else he would be told what was so before he asked: of a VM that he has just started, say. A crowd that
    waits has one for all."""
    def change():
        server.driver.vms['one'] = 'Running'
        server.driver.meanwhile = lambda: None
        server.ask(3, 'machines')
        server.ask(4, 'machines')
    server.driver.vms['one'] = 'PoweredOff'
    server.driver.meanwhile = change
    server.ask(1, 'machines')
    server.ask(2, 'machines')
    answers = server.serve()
    assert [answers[number][0]['native'] for number in (1, 2, 3, 4)] == 2 * ['PoweredOff'] + 2 * ['Running']
    assert server.driver.looks == 2


BUSY = """
import os, sys, time
sys.path[:0] = sys.argv[1:3]
import driverserver, process_driver
class Busy(process_driver.Processes):
    def version(self, job):
        os.mkdir(sys.argv[3])
        while not os.path.exists(sys.argv[4]):
            time.sleep(0.01)
        return '2.0'
driverserver.run_driver(Busy)
"""


@pytest.mark.skipif(os.name != 'posix', reason='elsewhere its next word ends it')
@pytest.mark.parametrize('is_killed', [True, False])
def test_a_busy_process_ends_with_a_host_that_was_killed_alone(tmp_path, is_killed):
    """What it does would be somebody else's by then; one that hung up has its answer."""
    begun, go = tmp_path / 'begun', tmp_path / 'go'
    words = [sys.executable, '-c', BUSY, os.path.dirname(process_driver.__file__),
             os.path.dirname(driverserver.__file__), str(begun), str(go)]
    driver = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        for line in ({'settings': dict(SETTINGS, state_dir=str(tmp_path)), 'watches': False},
                     {'id': 7, 'verb': 'version', 'args': []}):
            driver.stdin.write(json.dumps(line).encode() + b'\n')
        driver.stdin.flush()
        wait_until(begun.exists, 20)
        driver.stdin.close()
        if is_killed:
            driver.stdout.close()
            assert driver.wait(20) == 1
        else:
            go.touch()
            assert json.loads(driver.stdout.readline().decode())['value'] == '2.0'
            assert driver.wait(20) == 0
    finally:
        go.touch()
        driver.wait(20)
        driver.stdout.close()


def test_an_option_that_a_method_does_not_know_is_told_with_those_that_it_does():
    assert hypervisor.options_over({'a': 1, 'b': 2}, {'b': 3}, 'someMethod') == {'a': 1, 'b': 3}
    with pytest.raises(faults.InvalidParams, match='^someMethod knows no option c, d; it knows a, b$'):
        hypervisor.options_over({'a': 1, 'b': 2}, {'d': 1, 'c': 2, 'a': 3}, 'someMethod')
