"""Twenty clients at once, while a large image is imported."""

import os
import threading
import time

import pytest
from helpers import wait_until
from vms import fault_of

FULL = os.environ.get('VMHOST_FULL')
CLIENTS = 20
LOOKING = ('listVMs', 'listRunningVMs', 'listVMsWithState', 'getNamesToIdsMapping', 'version', 'states',
           'getNetwork', 'listRegisteredVMs')
LOOKING_AT = ('getVM', 'getState', 'listSnapshots', 'getLog')


def looks(host, until, slowest, wrong, number):
    """A client that only looks, as fast as it can, and notes how long each call took."""
    with host.api as api:
        while not until.is_set():
            for method in LOOKING + LOOKING_AT:
                begun = time.monotonic()
                code, text = fault_of(getattr(api, method),
                                      *(['crowd-%d' % (number % 4)] if method in LOOKING_AT else []))
                if code:
                    wrong.append((method, code, text))
                slowest.append((time.monotonic() - begun, method))


def changes(host, until, wrong, vm):
    """A client that changes a VM of its own."""
    with host.api as api:
        while not until.is_set():
            for method, args in (('takeSnapshot', ('s',)), ('start', ()), ('pause', ()), ('resume', ()),
                                 ('powerOff', ()), ('restoreSnapshot', ('s',)), ('deleteSnapshot', ('s',))):
                code, text = fault_of(getattr(api, method), vm, *args)
                if code:
                    wrong.append((method, code, text))


@pytest.mark.slow
def test_twenty_clients_while_an_image_is_imported(host, api, remove_all, appliance):
    for number in range(4):
        api.createVM('crowd-%d' % number, '', {'memory': 16, 'diskSize': 4})
    after, stop, slowest, wrong, jobs = host.last_event(), threading.Event(), [], [], []
    threads = [threading.Thread(target=looks, args=(host, stop, slowest, wrong, number))
               for number in range(CLIENTS - 2)]
    threads += [threading.Thread(target=changes, args=(host, stop, wrong, 'crowd-%d' % number))
                for number in range(2)]
    imported = []
    with host.api as importing:
        importer = threading.Thread(target=lambda: imported.append(
            fault_of(importing.createVM, 'imported', appliance + '.ova', {'network': 'nat'})))
        try:
            for thread in threads + [importer]:
                thread.start()
            wait_until(lambda: is_half_done(api, jobs) or imported, 900, 0.05)
            listed = host.verb('ls').stdout.decode()
            wait_until(lambda: imported, 900, 0.2)
        finally:
            stop.set()
            for thread in threads + [importer]:
                thread.join(120)
    assert imported == [(0, [True, 'imported'])]
    assert wrong == []
    times = sorted(slowest)
    print('%d calls, median %.3f s, 99 %% within %.3f s, slowest %.3f s (%s)' % (
        len(times), times[len(times) // 2][0], times[len(times) * 99 // 100][0], *times[-1]))
    assert times[-1][0] < (1 if FULL else 5), times[-5:]
    told = [event['text'] for event in host.events(after)
            if (event['type'], event['vm']) == ('vm-progress', 'imported')]
    assert [text for text in told if 'importing' in text] and len(told) > 2, told
    assert [job for job in jobs if job['vm'] == 'imported' and (0 < job['percent'] < 100 or not FULL)], jobs
    assert not FULL or 'imported: importing, ' in listed, listed
    assert 'imported' in api.listVMs() and api.agentInfo()['jobs'] == []


def is_half_done(api, jobs):
    """Whether the import is somewhere in the middle; what VirtualBox is busy with is added to the list."""
    jobs.extend(api.agentInfo()['jobs'])
    return [job for job in jobs if job['vm'] == 'imported' and 0 < job['percent'] < 100]
