"""A driver of plain processes, for the tests of what every driver must do: a VM is a process that sleeps."""

import json
import os
import signal
import subprocess
import sys

import driverserver
import hypervisor
import vmstates
from faults import AlreadyExists, BadState, InvalidParams, NoSuchVM

NATIVE = {vmstates.OFF: 'PoweredOff', vmstates.RUNNING: 'Running', vmstates.PAUSED: 'Paused'}


class Processes(hypervisor.Driver):
    """Its VMs are in a file of ``state_dir``: {name: [uuid, pid or 0, is it paused]}."""
    name = 'Processes'

    def _read(self):
        try:
            with open(os.path.join(self.settings['state_dir'], 'vms')) as file:
                return json.load(file)
        except FileNotFoundError:
            return {}

    def _write(self, vms):
        path = os.path.join(self.settings['state_dir'], 'vms')
        with open(path + '.new', 'w') as file:
            json.dump(vms, file)
        os.replace(path + '.new', path)

    def _find(self, vms, vm):
        for name, (uuid, _, _) in vms.items():
            if vm in (name, uuid):
                return name
        raise NoSuchVM('no VM has the name, id or uuid %r' % vm)

    def _row(self, name, uuid, pid, paused):
        alive = pid and os.path.exists('/proc/%d' % pid)
        state = vmstates.OFF if not alive else vmstates.PAUSED if paused else vmstates.RUNNING
        return {'name': name, 'id': '', 'uuid': uuid, 'state': state, 'native': NATIVE[state],
                'trouble': ''}

    def _ready(self, vm, *states):
        vms = self._read()
        name = self._find(vms, vm)
        state = self._row(name, *vms[name])['state']
        if state not in states:
            raise BadState('%s is %s; it needs to be %s' % (name, NATIVE[state], hypervisor.either(states)))
        return vms, name

    def version(self, job):
        return '1.0.0'

    def machine_states(self, job):
        return {name: number for number, name in enumerate(sorted(NATIVE.values()))}

    def machines(self, job):
        return [self._row(name, *vm) for name, vm in self._read().items()]

    def describe(self, job, vm, anew=False):
        vms = self._read()
        name = self._find(vms, vm)
        row = self._row(name, *vms[name])
        return dict(row, memory=0, cpus=1, ostype='', snapshot='', tagged=True, rdp={},
                    pid=vms[name][1] if row['state'] != vmstates.OFF else 0)

    def create_vm(self, job, name, image='', options={}):     # noqa: B006
        vms = self._read()
        if not name.strip():
            raise InvalidParams('a VM needs a name')
        if name in vms:
            raise AlreadyExists('there is a VM %r already' % name)
        self._write(dict(vms, **{name: ['uuid-of-' + name, 0, False]}))
        return name

    def remove_vm(self, job, vm, delete_disks=False, all_disks=False):
        vms, name = self._ready(vm, vmstates.OFF)
        del vms[name]
        self._write(vms)
        return []

    def start(self, job, vm, gui_mode=False, board_serial=''):
        vms, name = self._ready(vm, vmstates.OFF)
        sleeper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'],
                                   start_new_session=True)
        return self._become(vms, name, sleeper.pid, False)

    def _become(self, vms, name, pid, paused):
        vms[name][1:] = [pid, paused]
        self._write(vms)
        return True

    def power_off(self, job, vm):
        vms, name = self._ready(vm, vmstates.RUNNING, vmstates.PAUSED)
        os.kill(vms[name][1], signal.SIGKILL)
        return self._become(vms, name, 0, False)

    def pause(self, job, vm):
        vms, name = self._ready(vm, vmstates.RUNNING)
        os.kill(vms[name][1], signal.SIGSTOP)
        return self._become(vms, name, vms[name][1], True)

    def resume(self, job, vm):
        vms, name = self._ready(vm, vmstates.PAUSED)
        os.kill(vms[name][1], signal.SIGCONT)
        return self._become(vms, name, vms[name][1], False)


if __name__ == '__main__':
    driverserver.run_driver(Processes)
