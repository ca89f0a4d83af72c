"""A host agent on Windows (the rig that VMHOST_WINDOWS_RIG names), with a Linux guest beside it."""

import os

import pytest
import wine
from agents import Agent
from windows_host import WindowsHost
from wine import RIG

HERE = os.path.dirname(os.path.abspath(__file__))


def pytest_collection_modifyitems(items):
    for item in items:
        if str(item.fspath).startswith(HERE + os.sep):
            item.add_marker(pytest.mark.rig)
            if not RIG:
                item.add_marker(pytest.mark.skip(
                    reason='needs the Windows rig: tests/rigs/run-windows-tests'))


@pytest.fixture(scope='session')
def windows():
    """Wine, whose services run; ended at the end of the tests."""
    wine.start()
    yield
    wine.stop()


@pytest.fixture(scope='module')
def host(windows, tmp_path_factory):
    with WindowsHost(tmp_path_factory.mktemp('host')) as host:
        yield host


@pytest.fixture(scope='module')
def guest(host, tmp_path_factory):
    with Agent(tmp_path_factory.mktemp('guest'), host, 'g') as guest:
        yield guest


@pytest.fixture
def verb(host, tmp_path):
    """Runs a verb in a folder of the test; gives (exit code, its output)."""
    return lambda *words: host.run_there(str(tmp_path), *words)
