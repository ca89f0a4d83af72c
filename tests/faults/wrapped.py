"""Runs an agent as ``python vmguest.py INI`` does, with the faults that ``fault.json`` beside INI asks for.

So that the product has no hooks for tests. Keys of fault.json:

program     vmguest or vmhost
die         [what, 'before' or 'after', n]: SIGKILLs itself at the n-th call of that function of the
            a module of ours; once only: a file ``died`` beside INI remembers it
signal      the number of another signal than SIGKILL
set         {name: value} of constants of our modules
boot        what read_boot_id gives
clock       a file with two numbers: seconds that are added to time.time and time.monotonic
first_delay seconds before the first reconnect, 0.1 where it isn't named; the product's is 1
env         further environment
vm_state    of the host: a file with the state that a hypervisor would show for each VM
"""

import json
import os
import signal
import sys
import time

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, TOP)


def rooms():
    """The modules of ours that are loaded, and os: what they share by name is changed in each."""
    import chirp  # noqa: F401      an agent loads it later
    return [module for module in list(sys.modules.values())
            if os.path.dirname(getattr(module, '__file__', None) or '') == TOP] + [os]


def patch_death(folder, number, what, when, count):
    *owners, name = what.split('.')
    places = [place for place in rooms() if hasattr(place, (owners + [name])[0])]
    if owners:
        places = [places[0]]
        for part in owners:
            places = [getattr(places[0], part)]
    original, calls = getattr(places[0], name), []

    def die():
        calls.append(1)
        if len(calls) < count:
            return
        try:
            os.close(os.open(os.path.join(folder, 'died'), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), number)

    def replacement(*args, **kwargs):
        if when == 'before':
            die()
        answer = original(*args, **kwargs)
        if when == 'after':
            die()
        return answer
    for place in places:
        is_static = isinstance(vars(place).get(name), staticmethod)
        setattr(place, name, staticmethod(replacement) if is_static else replacement)


def patch_clock(path):
    descriptor = os.open(path, os.O_RDONLY)
    real = time.time, time.monotonic
    time.time = lambda: real[0]() + float(os.pread(descriptor, 100, 0).split()[0])
    time.monotonic = lambda: real[1]() + float(os.pread(descriptor, 100, 0).split()[1])


def patch_reconnects(first_delay):
    import protocol

    class Link(protocol.Link):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **dict(kwargs, first_delay=first_delay))
    protocol.Link = Link


class FakeHypervisor:
    """Shows one state for all VMs, which stands in a file; has nothing to say about anything else."""
    name = 'fake'

    def __init__(self, path):
        self.path = path

    def known_state(self, vm):
        with open(self.path) as file:
            return file.read()

    def known_name(self, vm):
        return vm

    def list_rows(self):
        return []

    def __getattr__(self, name):
        return lambda *args, **kwargs: ''


def patch_hypervisor(path):
    import hostmachines
    hostmachines.start_driver = lambda *_: (FakeHypervisor(path), [])


def main(ini):
    folder = os.path.dirname(os.path.abspath(ini))
    with open(os.path.join(folder, 'fault.json')) as file:
        fault = json.load(file)
    os.environ.update(fault.get('env', {}))
    if 'clock' in fault:
        patch_clock(fault['clock'])
    patch_reconnects(fault.get('first_delay', 0.1))
    module = __import__(fault['program'])
    if fault['program'] == 'vmhost':
        import hostagent  # noqa: F401      the door loads it later
    for name, value in fault.get('set', {}).items():
        places = [place for place in rooms() if hasattr(place, name)]
        assert places, name
        for place in places:
            setattr(place, name, value)
    if 'boot' in fault:
        import guestagent
        guestagent.read_boot_id = lambda: fault['boot']
    if 'vm_state' in fault:
        patch_hypervisor(fault['vm_state'])
    if 'die' in fault:
        patch_death(folder, fault.get('signal', signal.SIGKILL), *fault['die'])
    sys.argv = [os.path.abspath(__file__), ini]      # an agent that begins anew stays wrapped
    sys.exit(module.main([ini]))


if __name__ == '__main__':
    main(sys.argv[1])
