"""The contract of drivers, on the fake VirtualBox and on a driver of plain processes."""

import contextlib
import os
import sys

import fake_virtualbox
import process_driver
import pytest
from driver_cases import *  # noqa: F403 (the tests, for pytest to find)
from vms import SETTINGS, environment

import hosthypervisor
import hostseen
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
