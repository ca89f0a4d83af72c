"""The pages for tasks, the man page, the examples, and what pip installs: as they stand there, they work."""

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from agents import TOP, Agent, Host
from helpers import wait_until
from test_docs_deployment import BLOCKS

import hostcli
import hostconfig
import hostmetrics

pytestmark = [pytest.mark.once, pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]


def text_of(*names):
    with open(os.path.join(TOP, *names), encoding='utf-8') as file:
        return file.read()


def block(page, title):
    wanted = re.compile(r'^```\w+ %s\n(.*?)^```$' % re.escape(title), re.S | re.M)
    return wanted.search(text_of('docs', page)).group(1)


def test_the_client_of_the_page(tmp_path):
    client = block('client.md', 'client.py')
    assert len([line for line in client.splitlines() if line.strip()]) <= 42
    path = tmp_path / 'client.py'
    path.write_text(client)
    script = ('echo 21/42 > $VM_PROGRESS_FILE; echo begun; while [ ! -e go ]; do sleep 0.05; done; '
              'echo over; exit 7')
    with Host(tmp_path / 'host') as host, Agent(tmp_path / 'guest', host, 'one') as guest, host.api as api:
        process = subprocess.Popen(
            [sys.executable, str(path), host.state, 'one', 'sh', '-c', script], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout.readline() == b'begun\n'
        assert b'[running 21/42, ' in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        command, = api.listCmds({'vm': 'one'})
        wait_until(lambda: api.getCmdStatus(command['cmdId'])['state'] == 'stopped')
        process.stdin.write(b'\n')
        process.stdin.flush()
        wait_until(lambda: api.getCmdStatus(command['cmdId'])['state'] == 'running')
        open(os.path.join(guest.files, 'go'), 'w').close()
        out, err = process.communicate(timeout=20)
        assert process.returncode == 7 and out.endswith(b'over\n') and b'exited 7' in err


def test_the_ini_file_of_the_lab(tmp_path):
    path = tmp_path / 'host.ini'
    path.write_text(block('lab.md', 'host.ini'))
    settings = hostconfig.read_settings(str(path))
    assert settings.Host.other_machines and settings.Hypervisor.hypervisor == 'none'


def test_all_that_was_lost_is_run_again_as_the_page_says(tmp_path):
    again = re.search(r'^```sh\n(vmhost ps.*?)^```$', text_of('docs', 'power-cut.md'), re.S | re.M).group(1)
    with Host(tmp_path / 'host') as host, Agent(tmp_path / 'guest', host, 'one') as guest, host.api as api:
        cmd_id = api.runCmd('one', 'sh', ['-c', '[ -e cut ] || sleep 600'])
        pid = wait_until(lambda: api.getCmdStatus(cmd_id)['pid'])
        runner = int(subprocess.check_output(['ps', '-o', 'ppid=', '-p', str(pid)]))
        os.kill(runner, signal.SIGKILL)
        assert host.results(cmd_id)['state'] == 'lost'
        open(os.path.join(guest.files, 'cut'), 'w').close()
        words = ' '.join(map(shlex.quote, host.command()))
        (tmp_path / 'vmhost').write_text('#!/bin/sh\nexec %s "$@"\n' % words)
        (tmp_path / 'vmhost').chmod(0o755)
        subprocess.check_call(['sh', '-c', again], env=dict(
            os.environ, PATH='%s:%s:%s' % (tmp_path, os.path.dirname(sys.executable), os.environ['PATH'])))
        wait_until(lambda: [row['state'] for row in api.listCmds()] == ['lost', 'exited'])


def test_the_man_page_is_what_the_verbs_say():
    with open(os.path.join(TOP, 'docs', 'vmhost.1'), encoding='utf-8') as page:
        parts = page.read().replace('\\-', '-').split('\n.SS ')[1:]
    named = {part.split()[0]: re.findall('[^ ,|\n]+', part.partition('\n')[0] + '\n' + '\n'.join(
        re.findall(r'^\.B (.*)$', part, re.M))) for part in parts}
    for name, verb in hostcli.VERBS.items():
        for names, options in verb.arguments:
            words = [word for word in names if word.startswith('-')] + list(options.get('choices', ()))
            assert not [word for word in words if word not in named[name]], (name, names)
    done = subprocess.run([sys.executable, os.path.join(TOP, 'docs', 'make_man.py'), '--check'])
    assert done.returncode == 0
    if shutil.which('groff'):
        shown = subprocess.run(['groff', '-man', '-Tutf8', '-ww', os.path.join(TOP, 'docs', 'vmhost.1')],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert not shown.stderr and 'come back to this one' in shown.stdout.decode()


def test_the_examples_are_those_of_the_documentation():
    assert text_of('examples', 'systemd', 'vmhost.service') == BLOCKS['~/.config/systemd/user/vmhost.service']
    assert text_of('examples', 'systemd', 'vmguest.service') == BLOCKS['/etc/systemd/system/vmguest.service']


def test_the_dashboard_shows_what_is_told(tmp_path):
    dashboard = json.loads(text_of('examples', 'grafana', 'vmhost.json'))
    asked = {name for panel in dashboard['panels'] for target in panel['targets']
             for name in re.findall(r'vmhost_\w+', target['expr'])}
    source = text_of('hostmetrics.py')
    for name in asked - {'vmhost_broker_bytes_in', 'vmhost_broker_bytes_out'}:
        assert "describe('%s'" % name[len('vmhost_'):] in source, name
    assert hostmetrics and 'bytes_in' in text_of('stompbroker.py')


def test_pip_installs_the_commands_and_nothing_else(tmp_path):
    settings = text_of('pyproject.toml')
    scripts = configparser.ConfigParser()
    scripts.read_string('[x]' + settings.partition('[project.scripts]')[2].partition('\n[')[0])
    names = set(scripts['x'])
    there = str(tmp_path / 'there')
    done = subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', there, TOP],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    if done.returncode and b'hatchling' in done.stdout:
        pytest.skip('hatchling, which builds it, can\'t be had here')
    assert done.returncode == 0, done.stdout
    found = set(os.listdir(there))
    modules = {name for name in os.listdir(TOP) if name.endswith('.py')}
    assert modules | {'status.html'} <= found
    assert {name for name in found - modules if not name.endswith('.dist-info')} <= {
        'status.html', 'bin', 'share', '__pycache__'}
    assert names == {'vmhost', 'vmguest', 'vmboinc'}
    for name in names:
        bundle = str(tmp_path / name)
        subprocess.check_call([os.path.join(there, 'bin', name), '--bundle', bundle], timeout=60, env=dict(
            os.environ, PYTHONPATH=os.pathsep.join([there] + sys.path)))
        assert os.path.getsize(bundle) > 10000, name
