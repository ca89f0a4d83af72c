"""The init of a Linux that test_guest_kernel.py boots: runs commands in control groups with all controllers.

Prints a line of JSON for each, [place, what, its result]. Needs /vmguest.pyz, whose modules it imports.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
import traceback

sys.path.insert(0, '/vmguest.pyz')
NEW_MOUNTS, NEW_GROUPS = 0x20000, 0x2000000        # of unshare
HOG = 'x = bytearray(%d)\nfor i in range(0, len(x), 4096): x[i] = 1'
SPIN = 'import time\nend = time.monotonic() + 2\nwhile time.monotonic() < end: pass'
TOP = '/sys/fs/cgroup'


class Commands:
    """A fork server, and commands in folders of their own."""

    def __init__(self, root):
        import guestforks
        self.root, self.count = root, 0
        os.makedirs(root + '/served')
        self.forks = guestforks.ForkServer()

    def run(self, *words, **options):
        """The result of a program, with what it wrote."""
        import guestrequests
        import guestspool
        from protocol import Message
        self.count += 1
        command = guestspool.Command('c', '%s/c%d' % (self.root, self.count))
        os.mkdir(command.folder)
        options.update(cmd=words[0], args=list(words[1:]))
        defaults = type('Defaults', (), {'kill_after': 1, 'output_limit': 10 ** 6, 'inline_output': 65536})
        request = guestrequests.read_request(Message('', 'CMD_RUN', None, options), defaults)
        request['root'] = self.root + '/served'
        with open(command.path('request.json'), 'w') as file:
            json.dump(request, file)
        self.forks.run(command.folder)
        while not command.has('result.json'):
            time.sleep(0.01)
        result = command.result()
        return dict(result, out=command.slice('out', 0, 10000).decode())


def try_limits(layout):
    """Tells what there is to be seen of groups."""
    def tell(what, value):
        print('told', json.dumps([layout, what, value]), flush=True)
    commands = Commands('/tmp/' + layout.replace(' ', '-'))
    python = [sys.executable, '-S', '-c']
    tell('place', commands.forks.place.describe())
    tell('own group', open('/proc/self/cgroup').read())
    tell('group', commands.run('cat', '/proc/self/cgroup'))
    tell('true', commands.run('true'))
    tell('peak', commands.run(*python, HOG % 40000000))
    limits = {'memory': 64000000}
    tell('too much', commands.run(*python, HOG % 200000000, limits=limits))
    tell('another user', commands.run(*python, HOG % 200000000, limits=limits, user='65534'))
    tell('child with too much', commands.run('sh', '-c', '"$0" -S -c "$1"; echo $?', sys.executable,
                                             HOG % 200000000, limits=limits))
    tell('a fifth of a core', commands.run(*python, SPIN, limits={'cpus': 0.2}))
    tell('too many', commands.run('sh', '-c', 'for i in 1 2 3 4 5 6 7 8; do sleep 1 & done; wait',
                                  limits={'pids': 4}))
    for name in 'memory', 'pids':
        for value in 0, 1:
            tell('no %s, %d' % (name, value), commands.run('echo', 'ran', limits={name: value}))
            tell('no %s of its user, %d' % (name, value),
                 commands.run('echo', 'ran', limits={name: value}, user='65534'))
    tell('escaped', commands.run('sh', '-c', 'setsid sleep 90 & setsid setsid sleep 91 & sleep 92',
                                 timeout=1))
    nest = commands.forks.place.nest(commands.root)
    commands.forks.stop()
    commands.forks.place.sweep(commands.root, lambda name: True)
    tell('left behind', os.path.exists(nest))


def go_into(path):
    """Moves this process into a new group."""
    os.makedirs(TOP + path)
    with open(TOP + path + '/cgroup.procs', 'w') as file:
        file.write('0')


def be_a_container():
    """A group that looks like the root of all."""
    go_into('/container')
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_MOUNTS | NEW_GROUPS):
        raise OSError(ctypes.get_errno(), 'unshare')
    subprocess.check_call(['umount', TOP])
    subprocess.check_call(['mount', '-t', 'cgroup2', 'none', TOP])


def be_a_service():
    """What systemd makes of Delegate=yes and DelegateSubgroup=agent."""
    go_into('/vmguest.service/agent')
    os.setxattr(TOP + '/vmguest.service', 'user.delegate', b'1')


def be_a_service_without_a_group_below():
    """What it makes of Delegate=yes alone."""
    go_into('/old.service')
    os.setxattr(TOP + '/old.service', 'user.delegate', b'1')


LAYOUTS = {'root': lambda: None, 'container': be_a_container, 'service': be_a_service,
           'older service': be_a_service_without_a_group_below}


def main():
    """Each layout in a process of its own. Modules are compiled here, once for all, which takes an emulated
    processor seconds."""
    import guestforks  # noqa: F401
    import guestrequests  # noqa: F401
    for layout, change in LAYOUTS.items():
        if os.fork() == 0:
            try:
                change()
                try_limits(layout)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.wait()


if __name__ == '__main__':
    main()
