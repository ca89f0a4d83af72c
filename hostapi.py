"""The methods of the XML-RPC API, by subject; what they take and answer is documented by their docstrings.

What it is not: XML (rpc.py), calling by name (hostdispatch.py), HTTP (hostserver.py) or the work itself,
which the host and its parts do. Threads: any thread may call any method, many at once. No locks; no state
but who is calling, which is kept per thread.
"""

import base64
import sys
import threading
import time
from typing import Any, Callable, Dict, List

import agent
import chirpwire
import protocol
from faults import DeadlineExceeded, InvalidParams, NoSuchMethod, NotSupported
from hostarguments import names_of
from hostcommands import LINE_SHOWN
from hostguests import Guest
from hostjournal import Execution
from hostrequests import (
    read_local,
    read_remote,
    read_request,
    read_seconds,
    read_signal,
    read_size,
    read_transfers_filter,
)
from hosttransfers import Transfer
from rpc import Binary, FilePath, is_carried

LAUNCH_PATIENCE = 600.0        # seconds that the agent of a new VM may take
LAUNCH_LOOK = 0.5              # seconds between two looks whether it is there
LONGEST_POLL = 60.0            # seconds that a call may wait
ALIASES = {'listAvailableVMs': 'listVMs', 'unpause': 'resume', 'saveSnapshot': 'takeSnapshot',
           'getPerformanceData': 'getStats'}      # names that older clients use


class Caller(threading.local):
    """Who is calling on this thread, for the journal."""
    name = 'vmhost'


def audited(method: Callable) -> Callable:
    """Marks a method that changes something, and leaves no event of its own: each call of it is one."""
    method.audited = True              # type: ignore[attr-defined]
    return method


class Methods:
    """Methods of one subject, ``part``: each public one can be called by its name."""
    part = ''

    def __init__(self, host: Any, caller: Caller) -> None:
        self._host = host
        self._caller = caller

    def _hypervisor(self) -> Any:
        if self._host.machines.hypervisor is None:
            raise NotSupported('no hypervisor here (%s): VMs can be neither made nor controlled'
                               % self._host.machines.no_hypervisor)
        return self._host.machines.hypervisor

    def _done(self, result: Any) -> bool:
        return True


class AgentMethods(Methods):
    """The host agent, and the hypervisor's own facts."""
    part = 'The agent'

    def help(self, method: str = '') -> str:
        """What a method does; of all methods, where none is named.

            >>> print(host.help('ping'))
            ping(vm, timeout_secs=5.0)
                Asks the agent of a VM whether it is there: 'PONG from NAME'...
        """
        import hostreference  # brings inspect along, that an agent can do without
        texts = [text for _, methods in hostreference.describe(PARTS) for text in methods]
        if method:
            name = ALIASES.get(method, method)
            texts = [text for text in texts if text.name == name]
            if not texts:
                raise NoSuchMethod.named(method)
        return '\n\n'.join(map(str, texts))

    def agentInfo(self) -> dict:
        """{version, proto, python, hypervisor, trouble, broker, xmlrpc, uptime, vms, cmds, aint, untrusted,
        refused, jobs}.

        trouble: a sentence, where the hypervisor answers nobody, or takes its time, so that VMs are told as
        they were seen before; else ''; vms: how many agents are connected; cmds: how many commands are
        unfinished; aint: how many words were dropped, since they weren't any, or not signed by whom they are
        said to be from; untrusted: the latter alone; refused: agents that were not let in lately, [{id,
        why}]; broker: where it is, and the embedded one's counters; jobs: what the hypervisor is busy with,
        [{verb, vm, percent, text}].

            >>> host.agentInfo()['hypervisor']
            'none'
        """
        host, hypervisor = self._host, self._host.machines.hypervisor
        return {'version': agent.VERSION, 'proto': protocol.PROTO,
                'python': sys.version.split()[0], 'hypervisor': host.machines.hypervisor_name,
                'trouble': hypervisor.trouble() if hypervisor is not None else '',
                'broker': host.connection.info(), 'xmlrpc': '%s:%s' % host.server.address,
                'uptime': time.monotonic() - host.started, 'vms': len(host.guests.on_list()),
                'cmds': host.commands.count(), 'aint': host.words.unknown,
                'untrusted': host.trust.untrusted,
                'refused': [{'id': id, 'why': why} for id, why in host.trust.refusals.lately()],
                'jobs': hypervisor.under_way() if hypervisor is not None else []}

    def getEvents(self, after: int = 0, timeout: float = 0) -> dict:
        """{last, events: [{seq, time, type, vm, cmdId, text}]} with numbers above ``after``.

        Waits up to ``timeout`` (60) seconds for the first; at most 1,000 at a time, oldest first.
        ``after`` below 0: so many of the newest (-100: the last hundred).

            >>> host.getEvents(0)['events'][0]['type']
            'host-start'
        """
        return self._host.journal.events_after(after, min(max(timeout, 0), LONGEST_POLL))

    def getStatusLink(self) -> str:
        """A link that opens the status page, once and within two minutes, without the token.

            >>> link = host.getStatusLink()
            >>> webbrowser.open(link)
            True
        """
        server = self._host.server
        assert server is not None
        return server.status.link(server.own_url())

    @audited
    def stopHost(self) -> bool:
        """Ends the host agent, as SIGTERM does: VMs, agents and commands go on.

            >>> host.stopHost()
            True
        """
        self._host.end('stopHost was called')
        return True

    def version(self) -> str:
        """The hypervisor's version.

            >>> host.version()
            '7.2.4'
        """
        return self._hypervisor().version()

    def states(self) -> dict:
        """{MachineState name: code} of the hypervisor.

            >>> host.states()['Running']         # 5 before VirtualBox 7
            6
        """
        return self._hypervisor().machine_states()


class MachineMethods(Methods):
    """VMs as they are."""
    part = 'VMs'

    def listVMs(self) -> list:
        """Names of all VMs; without a hypervisor, of the machines whose agents are connected.

            >>> host.listVMs()
            ['node1']
        """
        if self._host.machines.hypervisor is not None:
            return self._host.machines.hypervisor.list_vms()
        return self.listRegisteredVMs()

    def listRunningVMs(self) -> list:
        """Names of the VMs that run.

            >>> host.listRunningVMs()
            ['node1']
        """
        if self._host.machines.hypervisor is not None:
            return self._host.machines.hypervisor.list_running()
        return self.listRegisteredVMs()

    def listVMsWithState(self) -> dict:
        """{name: MachineState name} of all VMs.

            >>> host.listVMsWithState()
            {'node1': 'Running'}
        """
        if self._host.machines.hypervisor is not None:
            return self._host.machines.hypervisor.vms_with_state()
        return dict.fromkeys(self.listRegisteredVMs(), 'Running')

    def listRegisteredVMs(self) -> list:
        """Names of the VMs whose agents are connected.

            >>> host.listRegisteredVMs()
            ['node1']
        """
        return [guest.name for guest in self._host.guests.on_list()]

    def listKnownVMs(self) -> list:
        """Names of all VMs, and of all machines whose agents were ever seen: lost and absent ones, too.

            >>> host.listKnownVMs()
            ['node1']
        """
        names = {guest.name for guest in self._host.guests.all()}
        return sorted(names.union(row['name'] for row in self._host.machines.rows()), key=agent.in_order)

    def getVM(self, vm: str) -> dict:
        """{name, id, uuid, state, trouble, agent, left, ip, lastSeen, clockOffset, facts, rdp, pid, forwards,
        bridged, commands} of a VM.

        state is the machine's, trouble what is wrong with it, '' for nothing; agent (alive, late, lost or
        never) is the agent's, left whether it said that it goes, and so isn't missed; commands: the ids of
        those that are unfinished; clockOffset: guest's clock less the host's, roughly; pid: of the process in
        which it runs, 0 for none; forwards: createVM's, with the ports of this machine that they have now;
        bridged: the interface of this machine to which a card of the VM is, '' for none. Where the hypervisor
        takes longer than a moment, of a VM that was seen, what was told last, and its `trouble` says so; 5 s,
        then fault 7, for a name that nobody has seen.

            >>> vm = host.getVM('node1')
            >>> vm['state'], vm['agent'], vm['ip']
            ('Running', 'alive', '127.0.0.1')
        """
        known, described = self._host.machines.describe(vm)
        guest = known or self._host.machines.find(vm)
        open_here = [execution.key for execution in self._host.commands.open_of(guest.id)]
        return dict(self._line(guest, described, open_here), rdp=described.get('rdp', {}),
                    pid=described.get('pid', 0), forwards=described.get('forwards', []),
                    bridged=described.get('bridged', ''))

    def getVMs(self) -> list:
        """All VMs, and all machines whose agents were ever seen: as getVM, less rdp, pid, forwards, bridged.

        One look at the hypervisor for all of them; where that takes longer than a moment, what was seen last,
        and machines of agents alone where that is nothing: agentInfo's `trouble` tells it.

            >>> [vm['name'] for vm in host.getVMs() if vm['agent'] == 'alive']
            ['node1']
        """
        keys = {}  # type: Dict[str, List[str]]
        for execution in self._host.commands.open_ones():
            keys.setdefault(execution.vm_id, []).append(execution.key)
        lines = [self._line(guest, row, keys.get(guest.id, []))
                 for guest, row in self._host.machines.all_described()]
        return sorted(lines, key=lambda vm: agent.in_order(vm['name']))

    def _line(self, guest: Guest, described: Dict[str, Any], open_here: List[str]) -> Dict[str, Any]:
        """A machine as its agent and the hypervisor tell of it; described: {} where the latter doesn't."""
        return {'name': guest.name, 'id': guest.id, 'uuid': described.get('uuid', ''),
                'state': described.get('native', self._state_of(guest)),
                'trouble': self._trouble(guest, described),
                'agent': guest.agent if guest.last_seen else 'never',
                'left': guest.agent == 'lost' and guest.has_left, 'ip': guest.ip,
                'lastSeen': guest.last_seen, 'clockOffset': guest.clock_offset,
                'facts': dict(guest.facts, boot=guest.boot), 'commands': open_here}

    def _trouble(self, guest: Guest, described: Dict[str, Any]) -> str:
        hypervisor = self._host.machines.hypervisor
        clash = hypervisor.clash_of(guest.id) if hypervisor is not None else ''
        return '; '.join(filter(None, (described.get('trouble', ''), clash)))

    def _state_of(self, guest: Guest) -> str:
        return 'Null' if guest.agent == 'lost' else 'Running'

    def getState(self, vm: str) -> str:
        """The MachineState's name of a VM; without a hypervisor Running, or Null once it is lost.

            >>> host.getState('node1')
            'Running'
        """
        if self._host.machines.hypervisor is not None:
            return self._host.machines.hypervisor.state(vm)
        return self._state_of(self._host.machines.find(vm))

    def getNamesToIdsMapping(self) -> dict:
        """{name: MAC} of all VMs.

            >>> host.getNamesToIdsMapping()
            {'node1': '08:00:27:00:00:01'}
        """
        names = {row['name']: row['id'] for row in self._host.machines.rows() if row['id']}
        names.update({guest.name: guest.id for guest in self._host.guests.on_list()})
        return names

    def getIdsToNamesMapping(self) -> dict:
        """{MAC: name} of all VMs.

            >>> host.getIdsToNamesMapping()
            {'08:00:27:00:00:01': 'node1'}
        """
        return {machine_id: name for name, machine_id in self.getNamesToIdsMapping().items()}

    @audited
    def pairVM(self, id: str, file: str) -> bool:
        """Tells the host a secret that stands in a guest.ini: a file with the 64 hexadecimal digits.

        A guest whose secret the host knows already has to be forgotten first.

            >>> open('lab12.secret', 'w').write(64 * '5')
            64
            >>> host.pairVM('lab12', os.path.abspath('lab12.secret'))
            True
        """
        self._host.machines.pair(id, file)
        return True

    @audited
    def forgetVM(self, vm: str) -> bool:
        """Forgets a machine that said HELLO: its name, its id and its secret are free for another one.

        What ran there is lost, and its agent, if it is still there, no longer trusted. A VM stays in the
        hypervisor, and gets a new secret at its next start.

            >>> host.forgetVM('lab12')
            True
        """
        self._host.machines.forget(self._host.machines.find(vm))
        return True


class ControlMethods(Methods):
    """VMs as they should be: what the hypervisor does."""
    part = 'VM control'

    @audited
    def createVM(self, name: str, image: str = '', options: dict = {}) -> list:
        """Makes a VM from .ova, .ovf, .vdi, .vmdk or .iso; or registers a .vbox file. [True, name].

        Options: memory (MB), cpus, ostype, network (hostonly, nat or none), diskSize (MB) of the new, empty
        disk, 0 for none, 2097152 (2 TB) at most, keep (cleanup leaves the VM alone), acceptEula (an
        appliance's licence), linked (the VM's disk lies on the image, which is only read and must stay; no
        copy), folder (where the folder of the VM's files is made; an absolute path), owner (any text, that
        cleanup can look for), forwards and bridged. What an image decides itself is refused: diskSize beside
        a disk or an appliance, ostype beside an appliance, all beside a .vbox file.

        forwards: [{guestPort, hostPort, isRemote}], TCP ports of a guest with NAT that are reached on this
        machine: on 127.0.0.1, or with isRemote on all its addresses. hostPort 0, as where it isn't given, is
        a free one, and another one where that is taken at a later start; `getVM` tells which. A VM whose own
        hostPort is taken doesn't start.

        bridged: the name of an interface of this machine, or auto: that of its default route, anew at each
        start. The VM gets one more card, by which it is a machine of its own in that interface's network, and
        reached from there; its agent goes on speaking by the other one.

            >>> host.createVM('node1', '/images/cernvm.ova', {'memory': 2048, 'cpus': 2})
            [True, 'node1']
        """
        return [True, self._hypervisor().create_vm(name, image, options)]

    @audited
    def registerVM(self, vm: str, folder: str, owner: str = '') -> bool:
        """Has the hypervisor know a VM again that somebody took out of its list: its files are still there.

        folder and owner as createVM had them; or, where it was moved since, with all on which the VM's disk
        lies, that folder now. False where there are no files of such a VM. Fault 8 for one that is known.

            >>> host.registerVM('node1', '/srv/slots/0')
            False
        """
        return self._hypervisor().register_vm(vm, folder, owner)

    @audited
    def launchVM(self, name: str, image: str, options: dict = {}) -> bool:
        """Makes a VM from an image, starts it, and waits for its agent; True once that is there.

        Options: createVM's, and timeout: how many seconds the agent may take (600). Where it takes longer,
        fault 7: the VM is there, and goes on.

            >>> host.launchVM('node1', '/images/cernvm.ova', {'memory': 2048, 'timeout': 300})
            True
        """
        options = dict(options)
        patience = read_seconds('timeout', options.pop('timeout', LAUNCH_PATIENCE))
        self._hypervisor().create_vm(name, image, options)
        self._hypervisor().start(name, False)
        deadline = time.monotonic() + patience
        while not self._has_agent(name):
            if time.monotonic() > deadline:
                raise DeadlineExceeded('%s runs, and its agent isn\'t there after %g s: does the image start '
                                       'vmguest? What it shows tells `screenshot`' % (name, patience))
            time.sleep(LAUNCH_LOOK)
        return True

    def _has_agent(self, vm: str) -> bool:
        guest = self._host.machines.describe(vm)[0]
        return guest is not None and guest.agent == 'alive' and bool(guest.last_seen)

    @audited
    def removeVM(self, vm: str, deleteDisks: bool = False, allDisks: bool = False) -> bool:
        """Takes a VM out of the hypervisor; with its files and disks where asked.

        Disks that were attached from elsewhere stay; with allDisks they go, too. What stays, though disks
        were to go, is an event `disk-kept`: its path, and why.

            >>> host.removeVM('node1', True)
            True
        """
        guest = self._host.machines.describe(vm)[0]
        for path, why in self._hypervisor().remove_vm(vm, deleteDisks, allDisks):
            self._host.journal.event('disk-kept', guest.name if guest is not None else vm, '',
                                     '%s: %s' % (path, why))
        if guest is not None and (deleteDisks or allDisks):
            self._host.machines.removed(guest)
        return True

    @audited
    def start(self, vm: str, guiMode: bool = False) -> bool:
        """Starts a VM, headless or with a window; True once it runs.

            >>> host.start('node1')
            True
        """
        return self._done(self._hypervisor().start(vm, guiMode))

    @audited
    def shutdown(self, vm: str) -> bool:
        """Asks the guest's system to power off, by ACPI; True once it is off.

            >>> host.shutdown('node1')
            True
        """
        return self._done(self._hypervisor().shutdown(vm))

    @audited
    def reset(self, vm: str) -> bool:
        """Presses the reset button of a VM.

            >>> host.reset('node1')
            True
        """
        return self._done(self._hypervisor().reset(vm))

    @audited
    def powerOff(self, vm: str) -> bool:
        """Cuts a VM's power; True once it is off.

            >>> host.powerOff('node1')
            True
        """
        return self._done(self._hypervisor().power_off(vm))

    @audited
    def pause(self, vm: str) -> bool:
        """Halts a running VM in memory; its commands are suspended.

            >>> host.pause('node1')
            True
        """
        return self._done(self._hypervisor().pause(vm))

    @audited
    def resume(self, vm: str) -> bool:
        """Lets a paused VM go on.

            >>> host.resume('node1')
            True
        """
        return self._done(self._hypervisor().resume(vm))

    @audited
    def saveState(self, vm: str) -> bool:
        """Writes a running VM to disk and stops it; ``start`` goes on from there.

            >>> host.saveState('node1')
            True
        """
        return self._done(self._hypervisor().save_state(vm))

    @audited
    def discardState(self, vm: str) -> bool:
        """Throws a saved state away.

            >>> host.discardState('node1')
            True
        """
        return self._done(self._hypervisor().discard_state(vm))

    @audited
    def takeSnapshot(self, vm: str, name: str, desc: str = '') -> bool:
        """Takes a snapshot, of a running VM too.

            >>> host.takeSnapshot('node1', 'fresh', 'as it was installed')
            True
        """
        return self._done(self._hypervisor().take_snapshot(vm, name, desc))

    @audited
    def restoreSnapshot(self, vm: str, name: str = '') -> bool:
        """Sets a VM that is off back to a snapshot; to the current one, where none is named.

            >>> host.restoreSnapshot('node1', 'fresh')
            True
        """
        return self._done(self._hypervisor().restore_snapshot(vm, name))

    @audited
    def deleteSnapshot(self, vm: str, name: str) -> bool:
        """Deletes a snapshot; what the VM is now stays as it is.

            >>> host.deleteSnapshot('node1', 'fresh')
            True
        """
        return self._done(self._hypervisor().delete_snapshot(vm, name))

    def listSnapshots(self, vm: str) -> list:
        """Names of a VM's snapshots, parents first.

        Where the hypervisor takes longer than a moment, those that were told last: agentInfo's `trouble`
        tells it; 5 s, then fault 7, where none were.

            >>> host.listSnapshots('node1')
            ['fresh']
        """
        return self._hypervisor().list_snapshots(vm)

    def getStats(self, vm: str, key: str = '*') -> list:
        """[{name, values, unit}] of CPU, RAM, network and disk, as the hypervisor measures them.

            >>> host.getStats('node1', 'CPU/Load/User')
            [{'name': 'CPU/Load/User', 'values': [1520, 1470], 'unit': '%'}]
        """
        return self._hypervisor().get_stats(vm, key)

    def getLog(self, vm: str, tail: int = 65536) -> str:
        """The end of a VM's VBox.log. Fault 7 after 5 s in which the hypervisor answers nothing.

            >>> print(host.getLog('node1', 200))
        """
        return self._hypervisor().get_log(vm, tail)

    def screenshot(self, vm: str) -> Binary:
        """What a running VM's screen shows, as PNG.

            >>> png = host.screenshot('node1').data
            >>> png[:4]
            b'\\x89PNG'
        """
        return Binary(self._hypervisor().screenshot(vm))

    @audited
    def setLimits(self, vm: str, limits: dict) -> bool:
        """Limits of a VM: cpuPercent, netKBps, network (on or off).

            >>> host.setLimits('node1', {'cpuPercent': 50, 'netKBps': 1000})
            True
        """
        return self._done(self._hypervisor().set_limits(vm, limits))

    @audited
    def remoteDesktop(self, vm: str, enable: bool = True, options: dict = {}) -> dict:
        """Switches a VM's remote desktop: {enabled, address, port, auth, security}.

            >>> host.remoteDesktop('node1', True)['port']
            5000
        """
        return self._hypervisor().remote_desktop(vm, enable, options)

    def lease(self, vm: str, seconds: float) -> bool:
        """Says that somebody looks after a VM: where it isn't said again within so many seconds, the VM is
        saved. 0: nobody does any more, and it is left as it is.

            >>> host.lease('node1', 60)
            True
        """
        self._host.leases.take(vm, read_seconds('seconds', seconds))
        return True

    def getNetwork(self) -> dict:
        """{mode, interface, hostIp, netmask, dhcp: {server, lower, upper, enabled}}.

        Where the hypervisor takes longer than a moment, as listSnapshots.

            >>> host.getNetwork()['hostIp']
            '192.168.56.1'
        """
        return self._hypervisor().get_network()

    @audited
    def setupNetwork(self) -> dict:
        """Makes the host-only interface, its address and its DHCP pool, as host.ini says.

            >>> host.setupNetwork()['dhcp']['lower']
            '192.168.56.101'
        """
        return self._hypervisor().setup_network()

    @audited
    def cleanup(self, dryRun: bool = True, vms: list = [], owner: str = '') -> list:
        """What is, or would be, removed: [{kind, name, why}] of VMs and disks that this tool made.

        What is half made, disks of its own that no VM uses, and those of its VMs that are named in `vms` and
        off. Rows of kind `kept` tell what was passed over. With `owner` (of createVM) only VMs of that owner:
        those that are named and off or saved, and those whose folder is gone.

            >>> host.cleanup(True)
            []
        """
        return self._hypervisor().cleanup(dryRun, vms, owner)

    @audited
    def keepVM(self, vm: str, keep: bool = True) -> bool:
        """Whether cleanup leaves this VM alone, even where it is named.

            >>> host.keepVM('node1')
            True
        """
        return self._done(self._hypervisor().keep(vm, keep))

    @audited
    def _save_snapshot(self, vm: str, name: Any = '', desc: Any = '') -> bool:
        """takeSnapshot by its older name, whose callers number snapshots, name none, or two the same."""
        name = str(name) or time.strftime('%Y-%m-%d %H:%M:%S')
        return self._done(self._hypervisor().take_snapshot(vm, name, str(desc), True))


class CommandMethods(Methods):
    """Commands in VMs."""
    part = 'Commands'

    def ping(self, vm: str, timeout_secs: float = 5.0) -> str:
        """Asks the agent of a VM whether it is there: 'PONG from NAME'.

            >>> host.ping('node1')
            'PONG from node1'
        """
        return self._host.control.ping(vm, min(max(timeout_secs, 0), LONGEST_POLL))

    def runCmd(self, toVmName: str, cmd: FilePath, args: list = [], env: Any = {}, path: Any = '',
               fileForStdin: str = '', options: dict = {}) -> str:
        """Runs a program in a VM, at most once; the cmd-id at once, as soon as it is journalled.

        args: a list of texts; env: laid over the guest's own; path: the folder it starts in, relative to
        dir_to_serve; each as base64 where its bytes aren't UTF-8, or XML can't carry them. fileForStdin: a
        file in the guest. Options: stdin (text, or 'stream': putCmdInput brings it), stdin64 (exact bytes),
        terminal ({rows, columns, term}: one of its own, its input streamed), timeout, killAfter (s), user,
        envClear, nice, limits {as, cpu, fsize, nofile, nproc: of each process; memory (bytes), cpus (cores:
        0.5, say), pids: of all together, where the guest can make control groups}, leave (daemons go on after
        a timeout or KILL), endLeft (what the program leaves ends with it), statusInterval (s),
        outputLimit, inlineOutput (bytes), queue (waits for an agent that isn't connected), expires (s: not
        begun by then, it never will be), mayReturn (where the VM dies,
        it is lost only if the agent comes back without it: for VMs that are then set back to a snapshot), id
        (the caller's own id for it: the same call again is answered as the first time, and runs nothing;
        fault 8 for another command).

            >>> options = {'timeout': 60, 'limits': {'cpu': 30}}
            >>> script = ['-c', 'echo $DAY; exit 3']
            >>> cmd_id = host.runCmd('node1', 'sh', script, {'DAY': 'Monday'}, '', '', options)
            >>> host.waitCmd(cmd_id)
            True
        """
        request, how = read_request(cmd, args, env, path, fileForStdin, options)
        return self._host.control.run(toVmName, request, self._caller.name, **how)

    def runCmdOnAll(self, pattern: str, cmd: FilePath, args: list = [], env: Any = {}, path: Any = '',
                    fileForStdin: str = '', options: dict = {}) -> str:
        """The same on every connected VM that matches the glob, with the option queue on every known one.

        Each one's id is cmdId@vmName.

            >>> all_id = host.runCmdOnAll('node*', 'uname', ['-s'])
            >>> host.waitCmd(all_id)
            True
            >>> host.getCmdResults(all_id + '@node1')['out']
            'Linux\\n'
        """
        request, how = read_request(cmd, args, env, path, fileForStdin, options)
        return self._host.control.run_on_all(pattern, request, self._caller.name, **how)

    def listCmds(self, filter: dict = {}) -> list:
        """[{cmdId, vm, cmd, line, state, submitted, ended}], the newest 1,000, the newest last.

        line: cmd and args as a shell takes them, cut after 1,000 characters, as cmd is. filter: vm, state,
        cmd, cmdId, since, finished, limit.

            >>> host.listCmds({'vm': 'node1', 'cmd': 'sh', 'limit': 1})[0]['state']
            'exited'
        """
        return [{'cmdId': execution.key, 'vm': execution.vm, 'cmd': execution.cmd[:LINE_SHOWN],
                 'line': execution.line or execution.cmd[:LINE_SHOWN],
                 'state': self._host.control.shown_state(execution), 'submitted': execution.submitted,
                 'ended': execution.ended} for execution in self._host.commands.list(self._by_name(filter))]

    def _by_name(self, filter: Dict[str, Any]) -> Dict[str, Any]:
        """The filter with the name of a VM that it gives by its id."""
        vm = filter.get('vm')
        guest = self._host.guests.find(vm) if isinstance(vm, str) else None
        return dict(filter, vm=guest.name) if guest is not None else filter

    def listFinishedCmds(self) -> list:
        """Ids of finished commands, the newest 1,000; each stays until forgetCmd or keep_results.

            >>> cmd_id in host.listFinishedCmds()
            True
        """
        return [execution.key for execution in self._host.commands.list({'finished': True})]

    def getCmdDetails(self, id: str) -> dict:
        """What was asked for: {cmdId, vm, cmd, args, env, path, options, submitted, client, executions}.

        Texts that XML can't carry are given as base64.

            >>> host.getCmdDetails(cmd_id)['args']
            ['-c', 'echo $DAY; exit 3']
        """
        executions = self._host.commands.find(id)
        command = self._host.commands.request(id.partition('@')[0])
        request = command['request']
        vm = executions[0].vm if self._is_one(id, executions) else command['target']
        return dict(request, cmd=shown_text(request['cmd']), path=shown_text(request['path']),
                    args=[shown_text(arg) for arg in request['args']],
                    env={name: shown_text(value) for name, value in request['env'].items()},
                    cmdId=id, vm=vm, submitted=command['submitted'],
                    client=command['client'], fileForStdin=request['options'].get('fileForStdin', ''),
                    executions=[execution.key for execution in executions])

    def getCmdStatus(self, id: str, refresh: bool = True) -> dict:
        """{state, pid, wall, resources, processes, outSize, errSize, inOffset, progress, error, ended, end,
        age}.

        refresh asks the guest; age is how many seconds ago it said so (-1: never); ended and end (how it
        ended, as in 'exited 3'): 0 and '' while it is unfinished. Of a multicast's own id: {cmdId@vmName: the
        same}.

            >>> status = host.getCmdStatus(cmd_id)
            >>> status['state'], status['outSize']
            ('exited', 7)
        """
        executions = self._host.commands.find(id)
        if self._is_one(id, executions):
            if refresh:
                self._host.control.refresh(executions)
            return self._status(executions[0], refresh)
        if refresh:
            self._host.control.refresh(executions)
        return {execution.key: self._status(execution) for execution in executions}

    def _status(self, execution: Execution, refresh: bool = False) -> Dict[str, Any]:
        taken = self._host.inputs.next_offset(execution, refresh)
        return dict(self._host.control.status(execution), inOffset=taken)

    def _is_one(self, id: str, executions: List[Execution]) -> bool:
        return len(executions) == 1 and executions[0].key == id

    def getCmdResults(self, id: str) -> Any:
        """The results, '' while unfinished. Of a multicast's own id: {cmdId@vmName: results}.

        {cmd-id, out, err, finished, exitCodeOrSignal, resources, state, error, wall, started, ended,
        out-size, err-size, …}: see docs/protocol.md. out64 and err64 hold the exact bytes where
        out and err can't; an err of size 0 holds error, for clients that don't know that.

            >>> results = host.getCmdResults(cmd_id)
            >>> results['out'], results['exitCodeOrSignal']
            ('Monday\\n', 3)
            >>> results['resources']['ru_utime'] < 1
            True
        """
        executions = self._host.commands.find(id)
        if self._is_one(id, executions):
            return shown_results(executions[0].answer()) if executions[0].ended else ''
        if not all(execution.ended for execution in executions):
            return ''
        return {execution.key: shown_results(execution.answer()) for execution in executions}

    def getCmdOutput(self, id: str, stream: str = 'out', offset: int = 0, length: int = 65536,
                     timeout: float = 0) -> dict:
        """{data: base64, offset, next, size, eof} of a stream, ``out`` or ``err``; while it runs, too.

        With ``timeout`` (up to 60) it waits so many seconds for the first byte, or the end. A terminal's
        output is all ``out``.

            >>> part = host.getCmdOutput(cmd_id, 'out', 3, 100)
            >>> part['data'].data, part['next'], part['eof']
            (b'day\\n', 7, True)
        """
        if stream not in ('out', 'err'):
            raise InvalidParams('stream is out or err, not %.40r' % stream)
        if not (0 <= offset <= 2 ** 53 and 0 <= length <= 2 ** 53):
            raise InvalidParams('offset and length are bytes, from 0')
        execution = self._host.commands.find_one(id)
        place = execution, stream, int(offset), int(length)
        wait = min(timeout, LONGEST_POLL)
        found = self._host.output.wait(*place, wait) if wait > 0 else self._host.output.read(*place)
        return dict(found, data=Binary(found['data']))

    def putCmdInput(self, id: str, data: Binary, eof: bool = False, offset: int = -1) -> int:
        """Hands a command the next bytes of its input; how many were taken: less than given, 0 too, while the
        program doesn't read. ``eof``: with the last of them its input ends.

        For commands begun with stdin='stream', or a terminal. ``offset``: where the bytes begin in the whole
        input (getCmdStatus tells what comes next: inOffset); what was taken before is not taken twice. What
        hasn't reached the guest yet is lost where the host agent is killed: then go on from inOffset, or say
        ``eof`` once more. Fault 4 where the command or its input has ended.

            >>> sort_id = host.runCmd('node1', 'sort', [], {}, '', '', {'stdin': 'stream'})
            >>> host.putCmdInput(sort_id, b'pear\\napple\\n', True)
            11
            >>> host.waitCmd(sort_id), host.getCmdResults(sort_id)['out']
            (True, 'apple\\npear\\n')
        """
        if not -1 <= offset <= 2 ** 53:
            raise InvalidParams('offset is a number of bytes')
        execution = self._host.commands.find_one(id)
        return self._host.inputs.put(execution, data.data, bool(eof), int(offset))

    def resizeCmd(self, id: str, rows: int, columns: int) -> bool:
        """Tells a command's terminal how large it is.

            >>> terminal = {'terminal': {'rows': 24, 'columns': 80}}
            >>> top_id = host.runCmd('node1', 'sleep', ['600'], {}, '', '', terminal)
            >>> host.resizeCmd(top_id, 50, 132), host.signalCmd(top_id, 'KILL')
            (True, True)
        """
        execution = self._host.commands.find_one(id)
        self._host.inputs.resize(execution, read_size('rows', rows), read_size('columns', columns))
        return True

    @audited
    def signalCmd(self, id: str, signal: Any = 'TERM') -> bool:
        """Sends a signal, by its name or number, to all processes of a command; False where it has ended.

        What hasn't begun is cancelled by TERM, KILL, INT, HUP, QUIT and ABRT, for good, whether its agent is
        there or not. Fault 7 where a guest doesn't answer: whether the signal came there isn't known. Fault
        11 where processes didn't get it, which are another user's (setuid, sudo) than an agent's that isn't
        root.

            >>> long_id = host.runCmd('node1', 'sleep', ['600'])
            >>> host.signalCmd(long_id, 'INT')
            True
        """
        name = read_signal(signal)
        return self._host.control.signal(self._host.commands.find(id), name)

    def waitCmd(self, id: str, timeout: float = 30) -> bool:
        """Waits up to ``timeout`` (60) seconds for the end, of a multicast for all; whether it came.

            >>> host.waitCmd(long_id, 10)
            True
        """
        deadline = time.monotonic() + min(max(timeout, 0), LONGEST_POLL)
        return all([execution.done.wait(max(0, deadline - time.monotonic()))
                    for execution in self._host.commands.find(id)])

    @audited
    def forgetCmd(self, id: str) -> bool:
        """Deletes a finished command from the journal, and its output, here and in its guest.

            >>> host.forgetCmd(cmd_id)
            True
        """
        executions = self._host.commands.find(id)
        self._host.commands.forget(executions)
        for execution in executions:
            self._host.fetcher.forget(execution)
            self._host.control.let_go(execution)
        return True


class FileMethods(Methods):
    """Files and folders, to and from VMs."""
    part = 'Files'

    @audited
    def cpFileToVM(self, vm: str, local: FilePath, remote: FilePath = '') -> list:
        """Sends a file or folder to a VM, verified; ``[out, err, status]``, status 0 when it is there.

        remote is relative to what the guest serves (its own name at the root, where none is given). A file
        goes into remote where that is a folder; folders that remote is to be in are made. A path that isn't
        UTF-8, or has control characters, is given as base64: its exact bytes.

            >>> with open('hello.txt', 'w') as file:
            ...     count = file.write('hello')
            >>> host.cpFileToVM('node1', os.path.abspath('hello.txt'), 'greetings/hello.txt')
            ['', '', 0]
        """
        return self._copy('put', vm, local, remote)

    @audited
    def cpFileFromVM(self, vm: str, remote: FilePath, local: FilePath = '') -> list:
        """Fetches a file or folder from a VM, verified; ``[out, err, status]``.

            >>> host.cpFileFromVM('node1', 'greetings/hello.txt', os.path.abspath('again.txt'))
            ['', '', 0]
        """
        return self._copy('get', vm, remote, local)

    def _start(self, direction: str, vm: str, source: FilePath, target: FilePath, **options: Any) -> Transfer:
        here, there = read_local, read_remote
        from_, to = (here, there) if direction == 'put' else (there, here)
        return self._host.transfers.start(direction, vm, from_(source), to(target), **options)

    def _copy(self, direction: str, vm: str, source: FilePath, target: FilePath) -> list:
        transfer = self._start(direction, vm, source, target)
        transfer.done.wait()
        return ['', transfer.error, 0 if transfer.state == 'done' else 1]

    @audited
    def startTransfer(self, direction: str, vm: str, source: FilePath, target: FilePath,
                      options: dict = {}) -> str:
        """Begins to move a file or folder, ``put`` to the VM or ``get`` from it, as ``cp -r`` does; its id at
        once. Option ``links``: of a folder's symbolic links, ``keep`` makes the same where they stay inside,
        ``skip`` leaves them out, ``follow`` moves what they lead to. Option ``parents``: whether folders that
        the target is to be in are made where they are missing; as a rule in a VM, and not here. Names,
        content, modes (but for setuid and its like), times and links arrive, or each that doesn't is told. A
        file that is replaced leaves its mode and owner to the new one, as by ``cp``.

        Fault 10 (Busy) while another one goes to the same place, whose id it names.

            >>> source = os.path.abspath('hello.txt')
            >>> transfer_id = host.startTransfer('put', 'node1', source, 'second.txt')
        """
        unknown = set(options) - {'links', 'parents'}
        if unknown:
            raise InvalidParams('startTransfer: no option %r, but links and parents' % sorted(unknown)[0])
        return self._start(direction, vm, source, target, **options).id

    def listTransfers(self, filter: dict = {}) -> list:
        """What getTransfer tells, but for failures and unkept, of all transfers that are remembered, the
        newest last: those under way, and up to 1,000 that have ended, until the host agent ends. Those that
        were under way when it ended, or was killed, have failed once it is back, as error and an event say.
        submitted and ended: seconds since 1970, or 0. filter: vm, finished, limit (so many of the newest).

            >>> host.listTransfers({'vm': 'node1', 'limit': 1})[0]['id'] == transfer_id
            True
        """
        return self._host.transfers.list(**read_transfers_filter(filter))

    def getTransfer(self, id: str) -> dict:
        """{state, bytes, total, rate, error, failures: [{path, reason}], unkept: [{path, what}], …}; state:
        waiting, running, done, failed, cancelled. error: also what one waits for that has begun, as for its
        VM's agent. failures: what of a folder was not moved, by its path at the source, 10,000 of them at
        most (error tells how many there are); the reason ends with "(at the target)" where it failed there.
        All else was moved. unkept: what was, but for its mode, its time, or both, which the disk there
        doesn't keep.

            >>> while host.getTransfer(transfer_id)['state'] in ('waiting', 'running'):
            ...     time.sleep(0.1)
            >>> host.getTransfer(transfer_id)['bytes']
            5
        """
        return self._host.transfers.get(id).details()

    @audited
    def cancelTransfer(self, id: str) -> bool:
        """Stops a transfer, which then ends as `cancelled`; what has arrived stays, to be gone on from: all
        of it, where that was there just then. False where it has ended.

            >>> host.cancelTransfer(transfer_id)      # it has ended
            False
        """
        return self._host.transfers.cancel(id)

    def listDir(self, vm: str, path: FilePath = '/') -> list:
        """[{name, size, mode, mtime, isDir}] of a folder in a VM, whose path is as for cpFileFromVM; name64
        holds a name's exact bytes where XML-RPC can't carry it as text.

            >>> [entry['name'] for entry in host.listDir('node1', '/greetings')]
            ['hello.txt']
        """
        return [shown_entry(entry) for entry in self._host.transfers.list_dir(vm, read_remote(path))]


def shown_entry(entry: chirpwire.Stat) -> Dict[str, Any]:
    """An entry of a folder; the exact bytes of its name where XML-RPC would alter it."""
    shown = {'name': entry.name, 'size': entry.size, 'mode': entry.mode, 'mtime': entry.mtime,
             'isDir': entry.is_dir}    # type: Dict[str, Any]
    if not is_carried(entry.name):
        shown['name64'] = base64.b64encode(chirpwire.to_bytes(entry.name)).decode('ascii')
    return shown


def shown_text(text: str) -> FilePath:
    """A text of a request: the bytes that it stands for where XML-RPC would alter it."""
    return text if is_carried(text) else Binary(chirpwire.to_bytes(text))


def shown_results(results: Dict[str, Any]) -> Dict[str, Any]:
    """The results for XML-RPC, which alters some text: the exact bytes go beside it then. Who doesn't know
    ``error`` finds it in an ``err`` that would be empty."""
    shown = dict(results)
    for stream in ('out', 'err'):
        text = results[stream]
        if stream + '64' not in results and not is_carried(text):
            shown[stream + '64'] = base64.b64encode(text.encode('utf-8')).decode('ascii')
    if not results.get('err-size'):
        shown['err'] = results['err'] or results['error']
    return shown


PARTS = (AgentMethods, MachineMethods, ControlMethods, CommandMethods, FileMethods)


class Api:
    """The methods of the XML-RPC interface, by name. Any thread may call them.

    Times are seconds since 1970, durations seconds, sizes bytes. A VM is given by name or id. A file on
    the host is best given by its whole path: another one is relative to the folder that the host agent was
    started in. Faults: -32601 no such method, -32602 wrong arguments, -32603 internal; 1 NoSuchVM,
    2 AgentNotConnected, 3 NoSuchCommand, 4 BadState, 5 HypervisorError, 6 TransferError, 7 Timeout,
    8 AlreadyExists, 9 NotSupported, 10 Busy, 11 AccessDenied.

    Much input and output goes faster as it is, without XML and base64. ``POST /input/ID?offset=N&eof=1`` is
    putCmdInput: it answers how many bytes were taken. ``GET /output/ID?stream=out&offset=N&length=N`` (and
    ``&timeout=S``) is getCmdOutput, with size and eof in the headers Vmhost-Size and Vmhost-Eof. An answer
    that is a fault has its number in Vmhost-Fault. What the command line says to terminals it says on one
    connection, by ``POST /terminal/ID`` with ``Upgrade: vmhost-terminal`` (hostterminal.py).
    """

    def __init__(self, host: Any) -> None:
        self.caller = Caller()
        parts = [part(host, self.caller) for part in PARTS]
        self.methods = {name: getattr(part, name) for part in parts
                        for name in names_of(type(part))}     # type: Dict[str, Callable]
        self.older = {older: self.methods[name] for older, name in ALIASES.items()}
        self.older['saveSnapshot'] = next(
            part._save_snapshot for part in parts if isinstance(part, ControlMethods))
