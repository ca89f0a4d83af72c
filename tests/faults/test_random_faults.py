"""The short form of run.py: random faults for SOAK_SECONDS. The long one is run by hand."""

import os

import pytest
import run

pytestmark = pytest.mark.skipif(not os.path.isdir('/proc/self/task'), reason='needs Linux\'s /proc')


def test_a_seed_repeats():
    assert run.plan_of(5, 100, 100) == run.plan_of(5, 100, 100)
    assert run.plan_of(5, 100, 100) != run.plan_of(6, 100, 100)
    assert {fault.kind for fault in run.plan_of(5, 1000, 1)[0]} == set(run.KINDS)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.once
def test_random_faults():
    seed, seconds = int(os.environ.get('FAULTS_SEED', '11')), float(os.environ.get('SOAK_SECONDS', '100'))
    assert run.run(seed, 60, 240, seconds=seconds) == 0
