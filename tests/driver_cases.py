"""What every driver must do, whichever hypervisor it drives.

Imported by test_hypervisor.py and virtualbox/test_contract.py, which have the fixtures: ``driver_class``;
``box``, a Hypervisor that is open, and its ``happened``, the events so far as (type, vm, text).
"""

import inspect
import time

import pytest
from helpers import wait_until

import faults
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
        assert box.known_state('life') == state and box.state(row['uuid']) == native
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
            (faults.AlreadyExists, 'create_vm', ('fits',)), (faults.InvalidParams, 'create_vm', ('',))):
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
