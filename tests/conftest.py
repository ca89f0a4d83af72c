"""What all tests share: the paths, and hypothesis without a clock (these machines are shared)."""

import os
import sys

from hypothesis import HealthCheck, settings

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(TESTS), TESTS]

settings.register_profile('shared-machine', deadline=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('shared-machine')
