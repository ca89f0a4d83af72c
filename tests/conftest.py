"""What all tests share: the paths, and hypothesis without a clock (these machines are shared)."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
from hypothesis import HealthCheck, settings

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(TESTS), TESTS]

import agents  # noqa: E402
import forks  # noqa: E402
import helpers  # noqa: E402
import stomp_client  # noqa: E402
import wine  # noqa: E402

import stompbroker  # noqa: E402

# Files that take long, the longest first: workers (-n) begin with them; none is alone with one at the end.
LONG = ['test_%s.py' % name for name in (
    'boinc_client', 'boinc_vms', 'cli', 'status_page', 'virtualbox', 'files', 'kill_points', 'vboxmanage',
    'external_brokers', 'terminal', 'faults', 'spine', 'chirp_cuts', 'guest_commands', 'words', 'vm_methods')]
EXAMPLES = int(os.environ.get('VMHOST_EXAMPLES') or 50)        # fewer, where another Python has had as many

settings.register_profile('shared-machine', deadline=None, suppress_health_check=[HealthCheck.too_slow],
                          max_examples=100 if os.environ.get('VMHOST_FULL') else EXAMPLES)
settings.load_profile('shared-machine')

# They start hundreds of times; what had to be compiled each time would take twice the processor's time.
agents.compiled = True
pycache = None
if sys.version_info >= (3, 8) and os.environ.pop('PYTHONDONTWRITEBYTECODE', ''):
    pycache = os.environ['PYTHONPYCACHEPREFIX'] = tempfile.mkdtemp(prefix='pycache-')

# A shell has what it runs in the background ignore Ctrl-C, and that is inherited by what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def kill(pid, number, kill=os.kill):
    """As os.kill, to one process: what a test takes for a pid may be 0, where there is none yet, and that is
    whoever runs these tests, with all that runs beside them."""
    assert pid > 0, 'signal %d to %d' % (number, pid)
    kill(pid, number)


os.kill = kill


def pytest_configure(config):
    """Workers (-n) begin side by side, and each would compile all modules of tests, for 9 s of a processor:
    where these aren't there in compiled form, they are collected once before."""
    config.option.loadscopereorder = False             # pytest-xdist would begin with files of many tests
    has_workers = getattr(config.option, 'numprocesses', None) and not hasattr(config, 'workerinput')
    is_kept = pycache or not sys.dont_write_bytecode
    if has_workers and is_kept and not all(is_compiled(path, config) for path in modules_of_tests(config)):
        subprocess.call([sys.executable, '-m', 'pytest', '--collect-only', '-q', '-p', 'no:cacheprovider',
                         '-m', config.option.markexpr, '--assert', config.option.assertmode]
                        + config.args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def pytest_ignore_collect(collection_path, config):
    """A module of which no test is wanted isn't loaded: to compile them all takes a newer Python's suite as
    long as to run it."""
    path = str(collection_path)
    return True if path.endswith('.py') and not is_wanted(path, config.option.markexpr) else None


def is_wanted(path, marks):
    """Whether a module may have tests for such an expression of marks; not so where one that is for all of
    them is unwanted."""
    with open(path, encoding='utf-8') as file:
        source = file.read()
    if marks == 'soak':
        return 'pytest.mark.soak' in source
    of_all = re.search(r'^pytestmark = .*?\n(?=\S|\n)', source, re.MULTILINE | re.DOTALL)
    if not of_all or not re.match(r'not \w+( and not \w+)*$', marks):
        return True
    return set(re.findall(r'pytest\.mark\.(\w+)', of_all.group())).isdisjoint(re.findall(r'not (\w+)', marks))


def pytest_collection_modifyitems(config, items):
    """The house is the same on each Python; that module is a program, too, and imports no pytest."""
    for item in items:
        if file_of(item) == 'test_house.py':
            item.add_marker(pytest.mark.once)
    if hasattr(config, 'workerinput'):
        items.sort(key=lambda item: LONG.index(file_of(item)) if file_of(item) in LONG else len(LONG))


def file_of(item):
    return os.path.basename(str(item.fspath))


def modules_of_tests(config):
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(TESTS) for name in names
             if name.startswith('test_') and name.endswith('.py')]
    return [path for path in paths if is_wanted(path, config.option.markexpr)]


def is_compiled(path, config):
    """Whether Python, or pytest with what it makes of assertions, has its form of a module of tests."""
    name = importlib.util.cache_from_source(path)
    if config.option.assertmode == 'rewrite':
        name = name.replace('.pyc', '-pytest-%s.pyc' % pytest.__version__)
    return os.path.exists(name) and os.path.getmtime(name) >= os.path.getmtime(path)


def pytest_unconfigure():
    if pycache:
        shutil.rmtree(pycache, ignore_errors=True)


@pytest.fixture(autouse=True)
def null_device_stays():
    """A program run as root that sets the mode of what it writes to changes /dev/null for all others:
    chirp_get of cctools does, with /dev/null for a target, to the mode of the file that it fetches."""
    before = os.stat(os.devnull).st_mode
    yield
    assert os.stat(os.devnull).st_mode == before, 'the test changed the mode of ' + os.devnull


@pytest.fixture(scope='session', autouse=True)
def forks_end():
    yield
    forks.stop()


@pytest.fixture(scope='session', autouse=agents.ON_WINDOWS)
def host_on_windows():
    """What the host agents of all tests run on then."""
    wine.start()
    yield
    wine.stop()


@pytest.fixture(scope='module')
def broker():
    """A broker for the module's tests, with the limits that it has by itself."""
    with stomp_client.running(stompbroker.Broker(port=0)) as broker:
        yield broker


@pytest.fixture
def connect(broker):
    """``connect(version, *header lines)``: a client that is connected to ``broker``, ``None``: just the
    socket. At the end all of them are closed, and the broker must hold nothing on their behalf."""
    clients = []

    def connect_one(version='1.2', *lines, **options):
        clients.append(stomp_client.Client(broker.address, **options))
        if version is not None:
            clients[-1].connect(*((None if version == '1.0' else version,) + lines))
        return clients[-1]
    yield connect_one
    for client in clients:
        client.close()
    helpers.wait_until(lambda: not any(broker.counters()[name] for name in (
        'connections', 'waiting_bytes', 'held_bytes')), 30)
    left = {name: broker.counters()[name] for name in ('destinations', 'queued_bytes')}
    assert left == {'destinations': 0, 'queued_bytes': 0}, 'the test left messages in a queue'


@pytest.fixture(scope='module')
def host(tmp_path_factory):
    """A host agent without a hypervisor, for the module's tests; some modules have one of their own."""
    with agents.Host(tmp_path_factory.mktemp('host')) as host:
        yield host


@pytest.fixture(scope='module')
def guests(host, tmp_path_factory):
    """Two agents at the fixture ``host``, for the module's tests."""
    folder = tmp_path_factory.mktemp('guests')
    with agents.Agent(folder / 'one', host, 'one') as one, agents.Agent(folder / 'two', host, 'two') as two:
        yield one, two


@pytest.fixture
def api(host):
    """A proxy of the API of the fixture ``host``, whichever host that is."""
    with host.api as api:
        yield api
