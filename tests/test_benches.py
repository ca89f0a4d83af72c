"""The short forms of what is measured at length by the commands in bench/."""

import os
import shutil
import subprocess
import sys

import pytest
from agents import TOP

pytestmark = [pytest.mark.slow, pytest.mark.once,
              pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='needs /proc')]


def bench(name, *words, codes=(0,)):
    """What a bench prints; fails with that where it ends with another code: 1 where one of its targets is
    missed."""
    done = subprocess.run([sys.executable, os.path.join(TOP, 'bench', name)] + list(words),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
    assert done.returncode in codes, done.stdout.decode()
    return done.stdout.decode()


@pytest.mark.soak
def test_mixed_load_and_faults_lose_nothing_and_leave_nothing():
    seconds = float(os.environ.get('SOAK_SECONDS', '50'))
    assert ' ended as they should' in bench('soak.py', '--minutes', '%.2f' % (seconds / 60), '--crowd', '30')


def test_many_guests_on_one_host():
    """Each beacon comes, and each answers; how fast is the bench's."""
    told = bench('guests.py', '--guests', '300', '--seconds', '5', codes=(0, 1))
    assert 'met     beacons' in told and 'multicast: 300 results' in told, told


def test_a_verb_costs_little_more_than_its_imports():
    assert 'met     processor time' in bench('commandline.py', '--quick')


def test_a_connection_of_the_broker_costs_little():
    printed = bench('broker.py', '--quick', '--brokers', 'ours', '--only', 'memory', 'thousand', 'topic')
    assert 'met     KiB per idle connection' in printed


@pytest.mark.soak
@pytest.mark.skipif(not shutil.which('time') or not shutil.which('bash'), reason='needs time and bash')
def test_usage_is_exact():
    assert 'true' in bench('accounting.py', '--runs', '50' if os.environ.get('VMHOST_FULL') else '8')


@pytest.mark.soak
def test_very_many_names_take_no_memory():
    names = os.environ.get('CHIRP_NAMES', '20000')
    assert 'back: %s of %s' % (names, names) in bench('names.py', '--names', names)


@pytest.mark.soak
def test_idle_agents_take_little():
    assert 'MISSED' not in bench('idle.py', '--seconds', '20')
