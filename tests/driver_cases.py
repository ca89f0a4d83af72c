"""What every driver must do, whichever hypervisor it drives.

Imported by test_hypervisor.py and virtualbox/test_contract.py, which have the fixtures: ``driver_class``;
``box``, a Hypervisor that is open, and its ``happened``, the events so far as (type, vm, text).
"""

import errno
import inspect
import signal
import time

import pytest
from helpers import others_take, wait_until

import driverprocesses
import faults
import hosthypervisor
import hypervisor
import vmstates

VERBS = [name for name in vars(hypervisor.Driver) if hypervisor.kind_of(name)]


def test_each_verb_takes_what_the_contract_says(driver_class):
    driver = driver_class(dict(SETTINGS_OF_NOTHING))
    for name in VERBS:
        wanted = inspect.signature(getattr(hypervisor.Driver, name)).parameters
        found = inspect.signature(driver.find_verb(name)).parameters
        assert list(found) == list(wanted)[1:], name
        defaults = {key: each.default for key, each in wanted.items()}
        assert {key: each.default for key, each in found.items()} == {
            key: defaults[key] for key in found}, name


SETTINGS_OF_NOTHING = {'network': {'mode': 'nat', 'host_ip': ''}, 'remote_desktop': {'ports': ''},
                       'chirp_port': 9094, 'state_dir': '', 'command_timeout': 1}


def test_life(box):
    assert box.version()[0].isdigit() and 'Running' in box.machine_states()
    assert box.create_vm('life') == 'life'
    row, = [row for row in box.list_rows() if row['name'] == 'life']
    assert set(row) == {'name', 'id', 'uuid', 'state', 'native', 'trouble'}
    assert (row['state'], row['native'], row['trouble']) == (vmstates.OFF, 'PoweredOff', '')
    for verb, state, native in (('start', vmstates.RUNNING, 'Running'), ('pause', vmstates.PAUSED, 'Paused'),
                                ('resume', vmstates.RUNNING, 'Running'),
                                ('power_off', vmstates.OFF, 'PoweredOff')):
        assert getattr(box, verb)('life') is True
        # At once, but where others' work holds a look up for longer than whoever changed it waits for that.
        wait_until(lambda wanted=(state, native): (box.known_state('life'), box.state(row['uuid'])) == wanted)
        assert ('life' in box.list_running()) is (state != vmstates.OFF)
    wait_until(lambda: [event for event in box.happened if event[1] == 'life'][-1:] == [
        ('vm-state', 'life', 'PoweredOff')])
    assert box.remove_vm('life', True) == [] and 'life' not in box.list_vms()
    wait_until(lambda: ('vm-removed', 'life', '') in box.happened)


def test_what_does_not_fit(box):
    box.create_vm('fits')
    for error, verb, args in (
            (faults.NoSuchVM, 'start', ('nobody',)), (faults.NoSuchVM, 'describe', ('nobody',)),
            (faults.BadState, 'pause', ('fits',)), (faults.BadState, 'power_off', ('fits',)),
            (faults.AlreadyExists, 'create_vm', ('fits',)), (faults.InvalidParams, 'create_vm', ('',)),
            (faults.InvalidParams, 'create_vm', (' ',))):
        with pytest.raises(error):
            getattr(box, verb)(*args)
    box.start('fits')
    with pytest.raises(faults.BadState):
        box.remove_vm('fits', True)
    box.power_off('fits')
    box.remove_vm('fits', True)


def test_what_a_driver_does_not_have_is_not_supported(box):
    box.create_vm('lacks')
    for verb, args in (('screenshot', ('lacks',)), ('get_stats', ('lacks',)), ('snapshots', ('lacks',)),
                       ('set_limits', ('lacks', {})), ('save_state', ('lacks',)),
                       ('cleanup', ())):
        try:
            getattr(box, verb)(*args)
        except faults.NotSupported as error:
            assert box.name in str(error)
        except faults.BadState:
            pass                        # it is off, which a driver that has the verb may mind
    box.remove_vm('lacks', True)


def test_lists_answer_at_once_while_something_is_changed(box):
    box.create_vm('busy')
    begun = time.monotonic()
    assert 'busy' in box.list_vms() and box.vms_with_state()['busy'] == 'PoweredOff'
    assert time.monotonic() - begun < 2
    box.remove_vm('busy', True)


def test_what_was_seen_is_told_while_the_hypervisor_takes_its_time(box, monkeypatch):
    """Of one VM as of all: its state is known, and so is what was said of it then."""
    box.create_vm('slow')
    before = box.describe('slow')
    monkeypatch.setattr(hosthypervisor, 'FIRST_PATIENCE', 0.001)
    monkeypatch.setattr(driverprocesses, 'LIST_PATIENCE', 0.001)
    watcher = box._watcher._child.process
    watcher.send_signal(signal.SIGSTOP)
    try:
        told = box.describe('slow')
        assert box.name in told.pop('trouble') and dict(told, trouble='') == before
        assert (box.state('slow'), 'slow' in box.list_vms()) == ('PoweredOff', True)
    finally:
        watcher.send_signal(signal.SIGCONT)
    monkeypatch.undo()
    box.remove_vm('slow', True)


def test_what_was_seen_is_told_while_the_hypervisor_comes_up(box, monkeypatch):
    """It died, or somebody ended it: VirtualBox's server takes half a minute until it is there again."""
    box.create_vm('seen')

    def not_yet(watches):
        raise OSError(errno.EAGAIN, 'not yet')
    monkeypatch.setattr(box._watcher, '_launch', not_yet)
    box._watcher._child.kill()
    wait_until(lambda: box._watcher._child is None)
    assert 'seen' in box.list_vms() and box.name in box.trouble()
    told = box.describe('seen')
    assert (told['name'], told['native']) == ('seen', 'PoweredOff') and told['trouble']
    with pytest.raises(faults.HypervisorError):
        box.describe('nobody')
    monkeypatch.undo()
    box.remove_vm('seen', True)
    wait_until(lambda: not box.trouble())


def test_whoever_looks_has_an_answer_within_a_second_while_nothing_answers(box, monkeypatch):
    """What is known, and why it isn't what is now; or an error that says so."""
    box.create_vm('asked')
    known = {'version': box.version(), 'machine_states': box.machine_states()}
    monkeypatch.setattr(hosthypervisor, 'FIRST_PATIENCE', 0.8)
    watcher = box._watcher._child.process
    watcher.send_signal(signal.SIGSTOP)
    try:
        took = []
        for verb, args in (('list_vms', ()), ('describe', ('asked',)), ('state', ('asked',)),
                           ('describe', ('nobody',)), ('version', ()), ('machine_states', ()),
                           ('list_snapshots', ('asked',)), ('snapshots', ('asked',)), ('get_network', ()),
                           ('get_log', ('asked',)), ('get_stats', ('asked',)), ('screenshot', ('asked',)),
                           ('cleanup', ())):
            begun = time.monotonic()
            try:
                answer = getattr(box, verb)(*args)
                assert answer == known.get(verb) or verb in ('list_vms', 'describe', 'state')
            except faults.DeadlineExceeded as error:
                assert box.name + ' has not answered for' in str(error)
            took.append(time.monotonic() - begun)
        assert max(took) < 0.8 + 0.2 * others_take(), took     # 1 s, where it is alone
        assert box.trouble().startswith(box.name + ' has not answered for')
    finally:
        watcher.send_signal(signal.SIGCONT)
    wait_until(lambda: not box.trouble())
    box.remove_vm('asked', True)


def test_who_asks_again_waits_no_more_for_what_has_been_silent_for_long(box, monkeypatch):
    box.create_vm('asked')
    monkeypatch.setattr(hosthypervisor, 'FIRST_PATIENCE', 3)
    monkeypatch.setattr(driverprocesses, 'LIST_PATIENCE', 0.1)
    watcher = box._watcher._child.process
    watcher.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(faults.DeadlineExceeded):
            box.list_snapshots('asked')                     # waits for all of it
        begun = time.monotonic()
        for _ in range(3):
            assert box.describe('asked')['trouble'] and box.state('asked') == 'PoweredOff'
            with pytest.raises(faults.DeadlineExceeded):
                box.list_snapshots('asked')
        assert time.monotonic() - begun < 3
    finally:
        watcher.send_signal(signal.SIGCONT)
    monkeypatch.undo()
    box.remove_vm('asked', True)


def test_a_process_that_hangs_is_ended_however_little_patience_all_have_who_ask(box, monkeypatch):
    box.create_vm('lasts')
    wait_until(lambda: 'lasts' in box.list_vms())    # what comes up later than that patience tells nothing
    watcher = box._watcher._child.process
    monkeypatch.setattr(box._watcher, '_patience', 0.2)
    watcher.send_signal(signal.SIGSTOP)
    wait_until(lambda: 'lasts' in box.list_vms() and watcher.poll() is not None)
    monkeypatch.undo()
    wait_until(lambda: box.describe('lasts')['native'] == 'PoweredOff')
    box.remove_vm('lasts', True)


# In these no driver's process answers: what the host does then is the same whatever the driver.
UNANSWERED = (
    test_what_was_seen_is_told_while_the_hypervisor_takes_its_time,
    test_what_was_seen_is_told_while_the_hypervisor_comes_up,
    test_whoever_looks_has_an_answer_within_a_second_while_nothing_answers,
    test_who_asks_again_waits_no_more_for_what_has_been_silent_for_long,
    test_a_process_that_hangs_is_ended_however_little_patience_all_have_who_ask)
