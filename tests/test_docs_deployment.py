"""docs/deployment.md: what can run here is read from the page, and run."""

import configparser
import os
import plistlib
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree

import pytest
from agents import TOP, Agent, Host
from helpers import wait_until

import agent
import guestagent
import hostconfig

pytestmark = [pytest.mark.once, pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]


def read_blocks():
    """{title: text} of the fenced blocks that have one."""
    with open(os.path.join(TOP, 'docs', 'deployment.md'), encoding='utf-8') as file:
        page = file.read()
    return dict(re.findall(r'^```\w+ ([^\n]+)\n(.*?)^```$', page, re.S | re.M))


BLOCKS = read_blocks()
UNITS = [title for title in BLOCKS if title.endswith('.service')]


def run(words, **kwargs):
    """Runs a program to its end; gives it, with its output as text."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, **kwargs)
    done.stdout = done.stdout.decode('utf-8', 'replace')
    return done


def settings_of(block, spec, folder):
    """What the agent reads from a block that is an ini file."""
    path = os.path.join(str(folder), 'an.ini')
    with open(path, 'w') as file:
        file.write(BLOCKS[block])
    os.chmod(path, 0o600)
    return agent.read_settings(path, spec)


def with_files_of_tests(text, folder):
    """A block whose paths lead into a folder of the test, and whose Python is this one."""
    for theirs in ('/etc/', '/opt/', '/var/'):
        text = text.replace(theirs, str(folder) + theirs)
    return text.replace('python3 ', sys.executable + ' ')


# --- files that are copied ---

def test_every_ini_file_is_one_that_the_agents_take(tmp_path):
    host = settings_of('host.ini with TLS', hostconfig.SETTINGS, tmp_path)
    assert host.Broker.tls and host.Broker.embedded and host.Broker.host == '192.168.56.1'
    host = settings_of('host.ini with another broker', hostconfig.SETTINGS, tmp_path)
    assert not host.Broker.embedded and host.Broker.port == 61613
    for block in ('guest.ini with TLS', 'guest.ini with another broker', '/etc/vmguest/guest.ini'):
        settings_of(block, guestagent.SETTINGS, tmp_path)


@pytest.mark.parametrize('title', UNITS)
def test_units_are_what_systemd_takes(tmp_path, title):
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str
    unit.read_string(BLOCKS[title])
    assert unit['Service']['KillMode'] == 'process'        # VMs and commands outlive the agent
    if not shutil.which('systemd-analyze') or not os.path.exists('/usr/bin/python3'):
        pytest.skip('no systemd-analyze, or no /usr/bin/python3, here')
    path = str(tmp_path / os.path.basename(title))
    with open(path, 'w') as file:
        file.write(BLOCKS[title])
    scope = ['--user'] if '/user/' in title else []
    done = run(['systemd-analyze', 'verify', '--man=no'] + scope + [path],
               env=dict(os.environ, XDG_RUNTIME_DIR=str(tmp_path), SYSTEMD_UNIT_PATH=str(tmp_path) + ':'))
    unknown = "Unknown key 'DelegateSubgroup'"      # before systemd 254, which goes on without it
    mine = [line for line in done.stdout.splitlines()
            if os.path.basename(title) in line and unknown not in line]
    assert not mine, done.stdout


def test_the_launch_agent_is_a_plist():
    with open(os.path.join(TOP, 'examples', 'macos', 'vmhost.plist'), 'rb') as file:
        plist = plistlib.load(file)
    assert plist['Label'] == 'vmhost' and plist['RunAtLoad'] is True
    assert [os.path.basename(word) for word in plist['ProgramArguments']] == \
        ['python3', 'vmhost.pyz', 'host.ini']
    assert plist['AbandonProcessGroup'] is True and plist['SoftResourceLimits']['NumberOfFiles'] > 256


def test_the_task_of_windows_goes_on_for_ever():
    root = xml.etree.ElementTree.parse(os.path.join(TOP, 'examples', 'windows', 'vmhost-task.xml')).getroot()
    found = {element.tag.rpartition('}')[2]: element.text for element in root.iter()}
    assert found['ExecutionTimeLimit'] == 'PT0S' and found['Priority'] == '5'
    for name in 'DisallowStartIfOnBatteries', 'StopIfGoingOnBatteries', 'StopOnIdleEnd':
        assert found[name] == 'false'
    assert found['Command'].startswith('FOLDER') and found['UserId'] == 'USER'     # at-logon.cmd knows these


def test_the_task_of_windows_takes_any_folder():
    """As at-logon.cmd fills it in: two dashes would end a comment."""
    with open(os.path.join(TOP, 'examples', 'windows', 'vmhost-task.xml')) as file:
        text = file.read().replace('USER', 'home\\J\u00f6rg').replace('FOLDER', 'C:\\vm--host &amp; more')
    root = xml.etree.ElementTree.fromstring(text)
    found = {element.tag.rpartition('}')[2]: element.text for element in root.iter()}
    assert found['WorkingDirectory'] == 'C:\\vm--host & more' and found['UserId'] == 'home\\J\u00f6rg'


def test_user_data_holds_the_unit_and_the_ini_file_of_this_page():
    yaml = pytest.importorskip('yaml', reason='PyYAML is not installed')
    assert BLOCKS['user-data'].startswith('#cloud-config\n')
    data = yaml.safe_load(BLOCKS['user-data'])
    files = {entry['path']: entry['content'] for entry in data['write_files']}
    for path in ('/etc/vmguest/guest.ini', '/etc/systemd/system/vmguest.service'):
        page = re.sub(r'^#.*\n', '', BLOCKS[path], flags=re.M)
        assert files[path] == page
    assert all(isinstance(word, str) for command in data['runcmd'] for word in command)
    downloaded = [word for command in data['runcmd'] for word in command if word.endswith('.pyz')]
    assert downloaded[0] in files['/etc/systemd/system/vmguest.service']


# --- bundles ---

def test_host_and_guest_from_the_bundles_alone(tmp_path):
    done = run(['sh', '-e', '-c', re.sub(r'(\w+\.pyz)', str(tmp_path) + r'/\1',
                                         with_files_of_tests(BLOCKS['bundles'], tmp_path))], cwd=TOP)
    assert done.returncode == 0, done.stdout
    host, program = Host(tmp_path / 'host'), str(tmp_path / 'vmhost.pyz')
    host.program = program
    with host:
        guest = Agent(tmp_path / 'guest', host, 'g')
        guest.program = str(tmp_path / 'vmguest.pyz')
        with guest:
            assert host.run('g', 'echo', 'from bundles')['out'] == 'from bundles\n'
            check = run([sys.executable, program, host.ini, 'check'])
            assert check.returncode == 0, check.stdout


# --- TLS ---

@pytest.mark.skipif(not shutil.which('openssl'), reason='no openssl here')
def test_host_and_guest_over_tls_with_the_five_commands(tmp_path):
    commands = BLOCKS['tls'].strip().splitlines()
    assert len(commands) == 5
    for command in commands:
        done = run(['sh', '-e', '-c', command.replace('192.168.56.1', '127.0.0.2')], cwd=str(tmp_path))
        assert done.returncode == 0, done.stdout
    assert 'broker.pem: OK' in done.stdout
    broker, joining = (section_of(block) for block in ('host.ini with TLS', 'guest.ini with TLS'))
    for name in ('ca_file', 'cert_file', 'key_file'):
        broker[name] = str(tmp_path / broker[name])
    joining['ca_file'] = str(tmp_path / joining['ca_file'])
    broker['host'] = joining['host'] = '127.0.0.1'
    with Host(tmp_path / 'host', broker) as host:
        with Agent(tmp_path / 'guest', host, 'g', joining):
            assert host.run('g', 'echo', 'in secret')['out'] == 'in secret\n'
        stranger = Agent(tmp_path / 'stranger', host, 'h', dict(joining, ca_file=''))
        try:
            stranger.start(wait=False)
            wait_until(lambda: 'certificate verify failed' in stranger.log(), 20)
        finally:
            stranger.stop()


def section_of(block):
    """[Broker] of a block."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(BLOCKS[block])
    return dict(parser['Broker'])


# --- the init script, and upgrading with it ---

@pytest.fixture
def machine(tmp_path):
    """A folder with the page's init script and bundles, as a guest has them."""
    for folder in ('etc/init.d', 'etc/default', 'etc/vmguest', 'opt/vmguest', 'var/run', 'var/log',
                   'var/lib'):
        os.makedirs(str(tmp_path / folder))
    script = str(tmp_path / 'etc/init.d/vmguest')
    with open(script, 'w') as file:
        file.write(with_files_of_tests(BLOCKS['/etc/init.d/vmguest'], tmp_path))
    os.chmod(script, 0o755)
    with open(str(tmp_path / 'etc/default/vmguest'), 'w') as file:
        file.write('PYTHON=%s\n' % sys.executable)
    yield tmp_path
    assert run([script, 'stop']).returncode == 0


def upgrade(machine):
    """The page's steps, in a clone of the repository."""
    steps = with_files_of_tests(BLOCKS['upgrade a guest'], machine)
    done = run(['sh', '-e', '-c', steps], cwd=TOP)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='the init script asks /proc')
def test_a_command_outlives_an_upgrade_with_the_init_script(machine):
    script = str(machine / 'etc/init.d/vmguest')
    with Host(machine / 'host') as host:
        with open(str(machine / 'etc/vmguest/guest.ini'), 'w') as file:
            file.write('[Broker]\nhost=127.0.0.1\nport=%d\n[Chirp]\nport=0\n[VM]\nid=g\nname=g\n'
                       'dir_to_serve=%s\nstate_dir=%s\n'
                       % (host.broker_port, machine / 'var/lib', machine / 'state'))
        assert run([script, 'status']).returncode == 3
        upgrade(machine)                     # from nothing
        with host.api as api:
            try:
                wait_until(lambda: 'g' in api.listVMs(), 20)
                assert run([script, 'status']).stdout == 'vmguest runs\n'
                assert run([script, 'start']).returncode == 0
                flag = machine / 'go'
                cmd_id = api.runCmd('g', 'sh', ['-c', 'while [ ! -e "$0" ]; do sleep 0.1; done; echo done',
                                                str(flag)])
                wait_until(lambda: api.getCmdStatus(cmd_id)['state'] == 'running', 20)
                before = pid_of(machine)
                upgrade(machine)
                assert pid_of(machine) != before
                wait_until(lambda: api.getVM('g')['agent'] == 'alive', 20)
                flag.write_bytes(b'')
                assert host.results(cmd_id)['out'] == 'done\n'
                assert run([script, 'stop']).returncode == 0
                assert run([script, 'status']).stdout == 'vmguest does not run\n'
                assert run([script, 'nonsense']).returncode == 2
            except BaseException:
                with open(str(machine / 'var/log/vmguest.log')) as log:
                    print(log.read())
                raise


def pid_of(machine):
    with open(str(machine / 'var/run/vmguest.pid')) as file:
        return int(file.read())
