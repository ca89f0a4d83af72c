"""Control groups with all controllers, in a Linux of its own under QEMU: memory measured and limited, who was
killed for it, processor and processes limited; in each place where an agent may make groups.

Takes one to two minutes of a processor: in CI with the soak tests. Needs qemu-system-x86_64 and an image:
tests/rigs/guest-image DIR, and VMHOST_GUEST_IMAGE=DIR.
"""

import gzip
import json
import os
import shutil
import subprocess

import pytest
from agents import TOP

import bundles

IMAGE = os.environ.get('VMHOST_GUEST_IMAGE', '')
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not os.path.exists(os.path.join(IMAGE, 'initrd.gz')),
                       reason='no guest image: tests/rigs/guest-image, VMHOST_GUEST_IMAGE'),
    pytest.mark.skipif(not shutil.which('qemu-system-x86_64'), reason='no qemu-system-x86_64')]
INIT = '''#!/bin/sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin:/sbin HOME=/root LANG=C.UTF-8
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
mount -t cgroup2 none /sys/fs/cgroup
python3 /kernel_guest.py
poweroff -f
'''
LONGEST = 900                  # seconds: every instruction is emulated


def cpio(files):
    """An archive as the kernel takes it, of {name: bytes}, all executable."""
    archive = b''
    for number, (name, data) in enumerate(list(files.items()) + [('TRAILER!!!', b'')]):
        fields = (number, 0o100755, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b'070701' + b''.join(b'%08X' % field for field in fields) + name.encode() + b'\0'
        for part in (head, data):
            archive += part + b'\0' * (-len(part) % 4)
    return archive


@pytest.fixture(scope='module')
def told(tmp_path_factory):
    """{layout: {what: result}} as the guest says it."""
    folder = tmp_path_factory.mktemp('kernel')
    assert bundles.bundle(str(folder / 'vmguest.pyz'), 'vmguest') == 0
    with open(os.path.join(TOP, 'tests', 'kernel_guest.py'), 'rb') as program:
        files = {'test-init': INIT.encode(), 'kernel_guest.py': program.read(),
                 'vmguest.pyz': (folder / 'vmguest.pyz').read_bytes()}
    with open(os.path.join(IMAGE, 'initrd.gz'), 'rb') as image:
        (folder / 'initrd.gz').write_bytes(image.read() + gzip.compress(cpio(files), 1))
    done = subprocess.run(
        ['qemu-system-x86_64', '-accel', 'tcg', '-m', '512', '-display', 'none', '-no-reboot', '-nic', 'none',
         '-kernel', os.path.join(IMAGE, 'vmlinuz'), '-initrd', str(folder / 'initrd.gz'), '-serial', 'stdio',
         '-append', 'console=ttyS0 quiet rdinit=/test-init'],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LONGEST)
    found = {}
    for line in done.stdout.decode('utf-8', 'replace').splitlines():
        if line.startswith('told '):
            layout, what, value = json.loads(line[len('told '):])
            found.setdefault(layout, {})[what] = value
    print(done.stdout.decode('utf-8', 'replace')[-20000:])
    return found


@pytest.mark.parametrize('layout', ['root', 'container', 'service'])
def test_a_group_measures_and_limits(told, layout):
    results = told[layout]
    assert 'memory, cpu, pids' in results['place'] or 'cpu, memory, pids' in results['place']
    assert results['group']['out'].rstrip().endswith('/cmd-c1')
    assert results['own group'].rstrip().endswith({'root': ':/', 'container': ':/vmguest-agent',
                                                   'service': ':/vmguest.service/agent'}[layout])
    assert 40000000 < results['peak']['memory-peak'] < 60000000
    assert results['true']['memory-peak'] < 5000000 and 'oom-kills' not in results['true']
    for name in ('too much', 'another user'):
        result = results[name]
        assert (result['state'], result['exitCodeOrSignal'], result['by']) == ('signaled', 9, 'oom'), result
        assert result['error'].startswith('ENOMEM: ') and result['oom-kills'] == 1
        assert result['memory-peak'] <= 64000000
    result = results['child with too much']
    assert (result['state'], result['by'], result['out']) == ('exited', 'itself', '137\n')
    assert result['oom-kills'] == 1
    used = results['a fifth of a core']['resources']
    assert used['ru_utime'] + used['ru_stime'] < 0.3 * results['a fifth of a core']['wall']
    assert results['too many']['wall'] < 60 and results['too many']['exitCodeOrSignal'] != 0
    for value in '0', '1', 'of its user, 0', 'of its user, 1':
        result = results['no memory, ' + value if value in '01' else 'no memory ' + value]
        assert (result['state'], result['exitCodeOrSignal'], result['out']) == ('failed', -1, ''), result
        assert result['error'] == 'ENOMEM: ended by signal 9 before it began: limits.memory'
        assert result['by'] == 'oom'
        result = results['no pids, ' + value if value in '01' else 'no pids ' + value]
        assert (result['state'], result['exitCodeOrSignal'], result['out']) == ('exited', 0, 'ran\n'), result
    assert (results['escaped']['state'], results['escaped']['left']) == ('timeout', 0)
    assert results['left behind'] is False


def test_without_controllers_what_asks_for_a_limit_is_refused(told):
    """Where systemd couldn't start the next agent in a group that hands on its controllers."""
    results = told['older service']
    assert results['group']['out'].rstrip().endswith('/cmd-c1') and 'no controllers' in results['place']
    assert results['own group'].endswith(':/old.service\n') and 'memory-peak' not in results['peak']
    assert results['too much']['error'].startswith('ENOTSUP: limits.memory ')
    assert (results['escaped']['state'], results['escaped']['left']) == ('timeout', 0)
    assert results['left behind'] is False
