"""The cases of vm_cases.py on the fake VirtualBox: each method, in each state."""

import pytest
from test_virtualbox import abort, fake, host, remove_all, vm  # noqa: F401 (fixtures)
from vm_cases import *  # noqa: F403 (the tests, for pytest to find)

pytestmark = pytest.mark.ends
