"""The XML-RPC API: its methods, their server, and the pages.
"""

import base64
import collections
import contextlib
import functools
import hashlib
import hmac
import html
import http.client
import http.server
import inspect
import json
import logging
import math
import os
import re
import secrets
import socket
import socketserver
import sys
import textwrap
import threading
import time
import urllib.parse
import xmlrpc.client
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import agent
import chirpwire
import protocol
from faults import InvalidParams, NoSuchCommand, NotSupported, VMHostError
from hostcommands import describe_end
from hostguests import Guest
from hostjournal import Execution
from hosttransfers import Transfer
from hosttrust import is_loopback

log = logging.getLogger('vmhost')


# --- the API ---------------------------------------------------------------------------------

LONGEST_POLL = 60.0            # seconds that a call may wait
OPTIONS = {                    # of runCmd: what it is called here, on the wire, and its type
    'stdin': ('stdin', (str, xmlrpc.client.Binary)), 'timeout': ('timeout', (int, float)),
    'killAfter': ('kill-after', (int, float)), 'user': ('user', (str,)),
    'envClear': ('env-clear', (bool,)), 'nice': ('nice', (int,)), 'limits': ('limits', (dict,)),
    'statusInterval': ('status-interval', (int, float)), 'outputLimit': ('output-limit', (int, float)),
    'inlineOutput': ('inline-output', (int, float)), 'queue': ('queue', (bool, int)),
}
LIMITS = ('as', 'cpu', 'fsize', 'nofile', 'nproc')
# Of every system that guests run on; this one may have fewer.
SIGNALS = ('HUP', 'INT', 'QUIT', 'ILL', 'TRAP', 'ABRT', 'BUS', 'FPE', 'KILL', 'USR1', 'SEGV', 'USR2', 'PIPE',
           'ALRM', 'TERM', 'CHLD', 'CONT', 'STOP', 'TSTP', 'TTIN', 'TTOU', 'URG', 'XCPU', 'XFSZ', 'VTALRM',
           'PROF', 'WINCH', 'IO', 'POLL', 'PWR', 'SYS', 'EMT', 'INFO')
LARGEST_NUMBER = 1e18          # of seconds or bytes, so that no system's integer overflows
FilePath = Union[str, xmlrpc.client.Binary]    # the latter: exact bytes, which need not be UTF-8


def is_carried(text: str) -> bool:
    """Whether XML-RPC leaves the text as it is."""
    return '\r' not in text and text.translate(agent.XML_UNSAFE) == text


def shown_entry(entry: chirpwire.Stat) -> Dict[str, Any]:
    """An entry of a folder; the exact bytes of its name where XML-RPC would alter it."""
    shown = {'name': entry.name, 'size': entry.size, 'mode': entry.mode, 'mtime': entry.mtime,
             'isDir': entry.is_dir}    # type: Dict[str, Any]
    if not is_carried(entry.name):
        shown['name64'] = base64.b64encode(chirpwire.to_bytes(entry.name)).decode('ascii')
    return shown


def shown_param(param: Any) -> str:
    """An argument of a call for the journal."""
    if isinstance(param, xmlrpc.client.Binary):
        param = chirpwire.to_text(param.data[:80])
    return '%.80r' % param if isinstance(param, (str, int, float)) else '…'


class Api:
    """The methods of the XML-RPC interface; each public method is one. Any thread may call them.

    Times are seconds since 1970, durations seconds, sizes bytes. A VM is given by name or id.
    Faults: -32601 no such method, -32602 wrong arguments, -32603 internal; 1 NoSuchVM,
    2 AgentNotConnected, 3 NoSuchCommand, 4 BadState, 5 HypervisorError, 6 TransferError, 7 Timeout,
    8 AlreadyExists, 9 NotSupported, 10 Busy, 11 AccessDenied.
    """

    ALIASES = {'listAvailableVMs': 'listVMs', 'unpause': 'resume', 'saveSnapshot': 'takeSnapshot',
               'getPerformanceData': 'getStats'}
    # The parts of the reference, and the first method of each.
    PARTS = {'help': 'The agent', 'listVMs': 'VMs', 'createVM': 'VM control', 'ping': 'Commands',
             'cpFileToVM': 'Files'}

    def __init__(self, host: Any) -> None:
        self._host = host
        self._caller = threading.local()       # who is calling, per request's thread

    # About the agent.

    def help(self, method: str = '') -> str:
        """What a method does; of all methods, where none is named.

            >>> print(host.help('ping'))
            ping(vm, timeout_secs=5.0)
                Asks the agent of a VM whether it is there: 'PONG from NAME'...
        """
        if method:
            return self._describe(method)
        return '\n\n'.join(self._describe(name) for name in api_methods())

    def _describe(self, name: str) -> str:
        method = find_method(self, name)
        return '%s%s\n%s' % (name, describe_signature(method),
                             textwrap.indent(inspect.getdoc(method) or '', '    '))

    def agentInfo(self) -> dict:
        """{version, proto, python, hypervisor, broker, xmlrpc, uptime, vms, cmds, aint, jobs} of the host.

        vms: how many agents are connected; cmds: how many commands are unfinished; aint: how many
        words weren't any; broker: where it is, and the embedded one's counters; jobs: what VirtualBox
        is busy with, [{verb, vm, percent, text}].

            >>> host.agentInfo()['hypervisor']
            'none'
        """
        host = self._host
        link, server = host.link, host.server
        assert link is not None and server is not None     # the API is served by a started host
        address = link.peer_address if link.peer_address[0] else host.broker_address
        broker = {'address': '%s:%s' % address, 'connected': link.up,
                  'embedded': host.broker is not None, 'server': link.server}  # type: Dict[str, Any]
        if host.broker is not None:
            broker['counters'] = host.broker.counters()
        return {'version': agent.VERSION, 'proto': protocol.PROTO,
                'python': sys.version.split()[0], 'hypervisor': host.hypervisor_name,
                'broker': broker, 'xmlrpc': '%s:%s' % server.address,
                'uptime': time.monotonic() - host.started, 'vms': len(host.guests.on_list()),
                'cmds': host.commands.count(), 'aint': host.aint,
                'jobs': host.hypervisor.under_way() if host.hypervisor is not None else []}

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

    def _hypervisor(self) -> Any:
        if self._host.hypervisor is None:
            raise NotSupported('no VirtualBox here (hypervisor=%s): VMs can be neither made nor '
                               'controlled' % self._host.settings.Hypervisor.hypervisor)
        return self._host.hypervisor

    # VMs.

    def listVMs(self) -> list:
        """Names of all VMs; without a hypervisor, of the machines whose agents are connected.

            >>> host.listVMs()
            ['node1']
        """
        if self._host.hypervisor is not None:
            return self._host.hypervisor.list_vms()
        return self.listRegisteredVMs()

    def listRunningVMs(self) -> list:
        """Names of the VMs that run.

            >>> host.listRunningVMs()
            ['node1']
        """
        if self._host.hypervisor is not None:
            return self._host.hypervisor.list_running()
        return self.listRegisteredVMs()

    def listVMsWithState(self) -> dict:
        """{name: MachineState name} of all VMs.

            >>> host.listVMsWithState()
            {'node1': 'Running'}
        """
        if self._host.hypervisor is not None:
            return self._host.hypervisor.vms_with_state()
        return dict.fromkeys(self.listRegisteredVMs(), 'Running')

    def listRegisteredVMs(self) -> list:
        """Names of the VMs whose agents are connected.

            >>> host.listRegisteredVMs()
            ['node1']
        """
        return [guest.name for guest in self._host.guests.on_list()]

    def getVM(self, vm: str) -> dict:
        """{name, id, uuid, state, agent, ip, lastSeen, clockOffset, facts, rdp, commands} of a VM.

        state is the machine's, agent (alive, late, lost or never) the agent's; commands: the ids
        of those that are unfinished; clockOffset: guest's clock less the host's, roughly.

            >>> vm = host.getVM('node1')
            >>> vm['state'], vm['agent'], vm['ip']
            ('Running', 'alive', '127.0.0.1')
        """
        host = self._host
        known, described = host.described(vm)
        guest = known or host.machine(vm)
        described = described or {'uuid': '', 'state': self._state_of(guest), 'rdp': {}}
        return {'name': guest.name, 'id': guest.id, 'uuid': described['uuid'],
                'state': described['state'], 'rdp': described['rdp'],
                'agent': guest.agent if guest.last_seen else 'never', 'ip': guest.ip,
                'lastSeen': guest.last_seen, 'clockOffset': guest.clock_offset,
                'facts': dict(guest.facts, boot=guest.boot),
                'commands': [execution.key for execution in host.commands.open_of(guest.id)]}

    def _state_of(self, guest: Guest) -> str:
        return 'Null' if guest.agent == 'lost' else 'Running'

    def getState(self, vm: str) -> str:
        """The MachineState's name of a VM; without a hypervisor Running, or Null once it is lost.

            >>> host.getState('node1')
            'Running'
        """
        if self._host.hypervisor is not None:
            return self._host.hypervisor.state(vm)
        return self._state_of(self._host.machine(vm))

    def getNamesToIdsMapping(self) -> dict:
        """{name: MAC} of all VMs.

            >>> host.getNamesToIdsMapping()
            {'node1': '08:00:27:00:00:01'}
        """
        names = {}
        if self._host.hypervisor is not None:
            names.update(self._host.hypervisor.names_to_ids())
        names.update({guest.name: guest.id for guest in self._host.guests.on_list()})
        return names

    def getIdsToNamesMapping(self) -> dict:
        """{MAC: name} of all VMs.

            >>> host.getIdsToNamesMapping()
            {'08:00:27:00:00:01': 'node1'}
        """
        return {machine_id: name for name, machine_id in self.getNamesToIdsMapping().items()}

    def createVM(self, name: str, image: str = '', options: dict = {}) -> list:
        """Makes a VM from .ova, .ovf, .vdi, .vmdk or .iso; or registers a .vbox file. [True, name].

        Options: memory (MB), cpus, ostype, network (hostonly, nat or none), diskSize (MB) of the new, empty
        disk, 0 for none, and keep (cleanup leaves the VM alone). What an image decides itself is refused:
        diskSize beside a disk or an appliance, ostype beside an appliance, all beside a .vbox file.

            >>> host.createVM('node1', '/images/cernvm.ova', {'memory': 2048, 'cpus': 2})
            [True, 'node1']
        """
        return [True, self._hypervisor().create_vm(name, image, options)]

    def removeVM(self, vm: str, deleteDisks: bool = False) -> bool:
        """Takes a VM out of the hypervisor, with its disks where asked.

            >>> host.removeVM('node1', True)
            True
        """
        guest = self._host.described(vm)[0]
        self._hypervisor().remove_vm(vm, deleteDisks)
        if guest is not None and deleteDisks:
            self._host.take_over(guest)
            self._host.lose_all(guest, 'the VM and its disks were removed')
        return True

    def start(self, vm: str, guiMode: bool = False) -> bool:
        """Starts a VM, headless or with a window; True once it runs.

            >>> host.start('node1')
            True
        """
        return self._done(self._hypervisor().start(vm, guiMode))

    def shutdown(self, vm: str) -> bool:
        """Asks the guest's system to power off, by ACPI; True once it is off.

            >>> host.shutdown('node1')
            True
        """
        return self._done(self._hypervisor().shutdown(vm))

    def reset(self, vm: str) -> bool:
        """Presses the reset button of a VM.

            >>> host.reset('node1')
            True
        """
        return self._done(self._hypervisor().reset(vm))

    def powerOff(self, vm: str) -> bool:
        """Cuts a VM's power; True once it is off.

            >>> host.powerOff('node1')
            True
        """
        return self._done(self._hypervisor().power_off(vm))

    def pause(self, vm: str) -> bool:
        """Halts a running VM in memory; its commands are suspended.

            >>> host.pause('node1')
            True
        """
        return self._done(self._hypervisor().pause(vm))

    def resume(self, vm: str) -> bool:
        """Lets a paused VM go on.

            >>> host.resume('node1')
            True
        """
        return self._done(self._hypervisor().resume(vm))

    def saveState(self, vm: str) -> bool:
        """Writes a running VM to disk and stops it; ``start`` goes on from there.

            >>> host.saveState('node1')
            True
        """
        return self._done(self._hypervisor().save_state(vm))

    def discardState(self, vm: str) -> bool:
        """Throws a saved state away.

            >>> host.discardState('node1')
            True
        """
        return self._done(self._hypervisor().discard_state(vm))

    def takeSnapshot(self, vm: str, name: str, desc: str = '') -> bool:
        """Takes a snapshot, of a running VM too.

            >>> host.takeSnapshot('node1', 'fresh', 'as it was installed')
            True
        """
        return self._done(self._hypervisor().take_snapshot(vm, name, desc))

    def restoreSnapshot(self, vm: str, name: str = '') -> bool:
        """Sets a VM that is off back to a snapshot; to the current one, where none is named.

            >>> host.restoreSnapshot('node1', 'fresh')
            True
        """
        return self._done(self._hypervisor().restore_snapshot(vm, name))

    def deleteSnapshot(self, vm: str, name: str) -> bool:
        """Deletes a snapshot; what the VM is now stays as it is.

            >>> host.deleteSnapshot('node1', 'fresh')
            True
        """
        return self._done(self._hypervisor().delete_snapshot(vm, name))

    def listSnapshots(self, vm: str) -> list:
        """Names of a VM's snapshots, parents first.

            >>> host.listSnapshots('node1')
            ['fresh']
        """
        return self._hypervisor().list_snapshots(vm)

    def getStats(self, vm: str, key: str = '*') -> list:
        """[{name, values, unit}] of CPU, RAM, network and disk, from VirtualBox's collector.

            >>> host.getStats('node1', 'CPU/Load/User')
            [{'name': 'CPU/Load/User', 'values': [1520, 1470], 'unit': '%'}]
        """
        return self._hypervisor().get_stats(vm, key)

    def getLog(self, vm: str, tail: int = 65536) -> str:
        """The end of a VM's VBox.log.

            >>> print(host.getLog('node1', 200))
        """
        return self._hypervisor().get_log(vm, tail)

    def screenshot(self, vm: str) -> xmlrpc.client.Binary:
        """What a running VM's screen shows, as PNG.

            >>> png = host.screenshot('node1').data
            >>> png[:4]
            b'\\x89PNG'
        """
        return xmlrpc.client.Binary(self._hypervisor().screenshot(vm))

    def setLimits(self, vm: str, limits: dict) -> bool:
        """Limits of a VM: cpuPercent, netKBps, network (on or off).

            >>> host.setLimits('node1', {'cpuPercent': 50, 'netKBps': 1000})
            True
        """
        return self._done(self._hypervisor().set_limits(vm, limits))

    def remoteDesktop(self, vm: str, enable: bool = True, options: dict = {}) -> dict:
        """Switches a VM's remote desktop: {enabled, address, port, auth, security}.

            >>> host.remoteDesktop('node1', True)['port']
            5000
        """
        return self._hypervisor().remote_desktop(vm, enable, options)

    def getNetwork(self) -> dict:
        """{mode, interface, hostIp, netmask, dhcp: {server, lower, upper, enabled}}.

            >>> host.getNetwork()['hostIp']
            '192.168.56.1'
        """
        return self._hypervisor().get_network()

    def setupNetwork(self) -> dict:
        """Makes the host-only interface, its address and its DHCP pool, as host.ini says.

            >>> host.setupNetwork()['dhcp']['lower']
            '192.168.56.101'
        """
        return self._hypervisor().setup_network()

    def cleanup(self, dryRun: bool = True) -> list:
        """What is, or would be, removed: VMs and disks that this tool made and nobody owns.

            >>> host.cleanup(True)
            []
        """
        return self._hypervisor().cleanup(dryRun)

    def _done(self, result: Any) -> bool:
        return True

    # Commands.

    def ping(self, vm: str, timeout_secs: float = 5.0) -> str:
        """Asks the agent of a VM whether it is there: 'PONG from NAME'.

            >>> host.ping('node1')
            'PONG from node1'
        """
        return self._host.ping(vm, min(max(timeout_secs, 0), LONGEST_POLL))

    def runCmd(self, toVmName: str, cmd: str, args: list = [], env: Any = {}, path: Any = '',
               fileForStdin: str = '', options: dict = {}) -> str:
        """Runs a program in a VM, at most once; the cmd-id at once, as soon as it is journalled.

        args: a list of texts; env: laid over the guest's own; path: the folder it starts in,
        relative to dir_to_serve; fileForStdin: a file in the guest. Options: stdin (text, or base64
        for exact bytes), timeout, killAfter (s), user, envClear, nice, limits {as, cpu, fsize,
        nofile, nproc}, statusInterval (s), outputLimit, inlineOutput (bytes), queue (waits for an
        agent that isn't connected).

            >>> options = {'timeout': 60, 'limits': {'cpu': 30}}
            >>> script = ['-c', 'echo $DAY; exit 3']
            >>> cmd_id = host.runCmd('node1', 'sh', script, {'DAY': 'Monday'}, '', '', options)
            >>> host.waitCmd(cmd_id)
            True
        """
        request, queue = read_request(cmd, args, env, path, fileForStdin, options)
        return self._host.run_cmd(toVmName, request, queue, self._client())

    def runCmdOnAll(self, pattern: str, cmd: str, args: list = [], env: Any = {}, path: Any = '',
                    fileForStdin: str = '', options: dict = {}) -> str:
        """The same on every connected VM that matches the glob; each one's id is cmdId@vmName.

            >>> all_id = host.runCmdOnAll('node*', 'uname', ['-s'])
            >>> host.waitCmd(all_id)
            True
            >>> host.getCmdResults(all_id + '@node1')['out']
            'Linux\\n'
        """
        request, _ = read_request(cmd, args, env, path, fileForStdin, options)
        return self._host.run_cmd_on_all(pattern, request, self._client())

    def _client(self) -> str:
        return getattr(self._caller, 'name', 'vmhost')

    def called_by(self, client: str) -> None:
        """Notes who calls on this thread, for the journal."""
        self._caller.name = client

    called_by.hidden = True      # type: ignore[attr-defined]

    def note_call(self, type: str, name: str, params: List[Any], end: str = '') -> None:
        """Journals a call: by whom, which method, on what; no options, since a password may be in them."""
        shown = ', '.join(map(shown_param, params))
        first = str(params[0])[:200] if params else ''
        if name == 'startTransfer':
            first = str((params + ['', ''])[1])[:200]
        vm, cmd_id = ('', first) if name in ('signalCmd', 'forgetCmd') else (first, '')
        with self._host.journal_permitting():
            self._host.journal.event(type, vm, cmd_id, 'by %s: %s(%s)%s' % (
                self._client(), name, shown, end))

    note_call.hidden = True      # type: ignore[attr-defined]

    def listCmds(self, filter: dict = {}) -> list:
        """[{cmdId, vm, cmd, state, submitted, ended}], the newest 1,000, the newest last.

        filter: vm, state, cmd, cmdId, since, finished, limit.

            >>> host.listCmds({'vm': 'node1', 'cmd': 'sh', 'limit': 1})[0]['state']
            'exited'
        """
        return [{'cmdId': execution.key, 'vm': execution.vm, 'cmd': execution.cmd,
                 'state': self._host.shown_state(execution), 'submitted': execution.submitted,
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

            >>> host.getCmdDetails(cmd_id)['args']
            ['-c', 'echo $DAY; exit 3']
        """
        executions = self._host.commands.find(id)
        command = self._host.commands.request(id.partition('@')[0])
        request = command['request']
        vm = executions[0].vm if self._is_one(id, executions) else command['target']
        return dict(request, cmdId=id, vm=vm, submitted=command['submitted'],
                    client=command['client'], fileForStdin=request['options'].get('fileForStdin', ''),
                    executions=[execution.key for execution in executions])

    def getCmdStatus(self, id: str, refresh: bool = True) -> dict:
        """{state, pid, wall, resources, processes, outSize, errSize, progress, error, age}.

        refresh asks the guest; age is how many seconds ago it said so (-1: never). Of a multicast's
        own id: {cmdId@vmName: the same}.

            >>> status = host.getCmdStatus(cmd_id)
            >>> status['state'], status['outSize']
            ('exited', 7)
        """
        executions = self._host.commands.find(id)
        if self._is_one(id, executions):
            if refresh:
                self._host.refresh(executions)
            return self._host.status(executions[0])
        if refresh:
            self._host.refresh(executions)
        return {execution.key: self._host.status(execution) for execution in executions}

    def _is_one(self, id: str, executions: List[Execution]) -> bool:
        return len(executions) == 1 and executions[0].key == id

    def getCmdResults(self, id: str) -> Any:
        """The results, '' while unfinished. Of a multicast's own id: {cmdId@vmName: results}.

        {cmd-id, out, err, finished, exitCodeOrSignal, resources, state, error, wall, started, ended,
        out-size, err-size, …}: see docs/protocol.md. out64 and err64 hold the exact bytes where
        out and err can't.

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

    def getCmdOutput(self, id: str, stream: str = 'out', offset: int = 0, length: int = 65536) -> dict:
        """{data: base64, offset, next, size, eof} of a stream, ``out`` or ``err``; while it runs, too.

            >>> part = host.getCmdOutput(cmd_id, 'out', 3, 100)
            >>> part['data'].data, part['next'], part['eof']
            (b'day\\n', 7, True)
        """
        if stream not in ('out', 'err'):
            raise InvalidParams('stream is out or err, not %.40r' % stream)
        if not (0 <= offset <= 2 ** 53 and 0 <= length <= 2 ** 53):
            raise InvalidParams('offset and length are bytes, from 0')
        found = self._host.output(self._host.commands.find_one(id), stream, int(offset), int(length))
        return dict(found, data=xmlrpc.client.Binary(found['data']))

    def signalCmd(self, id: str, signal: Any = 'TERM') -> bool:
        """Sends a signal, by its name or number, to all processes of a command; False where it has ended.

            >>> long_id = host.runCmd('node1', 'sleep', ['600'])
            >>> host.signalCmd(long_id, 'INT')
            True
        """
        name = read_signal(signal)
        return any([self._host.signal(execution, name) for execution in self._host.commands.find(id)])

    def waitCmd(self, id: str, timeout: float = 30) -> bool:
        """Waits up to ``timeout`` (60) seconds for the end, of a multicast for all; whether it came.

            >>> host.waitCmd(long_id, 10)
            True
        """
        deadline = time.monotonic() + min(max(timeout, 0), LONGEST_POLL)
        return all([execution.done.wait(max(0, deadline - time.monotonic()))
                    for execution in self._host.commands.find(id)])

    def forgetCmd(self, id: str) -> bool:
        """Deletes a finished command from the journal, and its output.

            >>> host.forgetCmd(cmd_id)
            True
        """
        executions = self._host.commands.find(id)
        self._host.commands.forget(executions)
        for execution in executions:
            self._host.fetcher.forget(execution)
        return True

    # Files.

    def cpFileToVM(self, vm: str, local: FilePath, remote: FilePath = '') -> list:
        """Sends a file or folder to a VM, verified; ``[out, err, status]``, status 0 when it is there.

        remote is relative to what the guest serves (its own name at the root, where none is given). A file
        goes into remote where that is a folder, or ends with '/'. A path that isn't UTF-8, or has control
        characters, is given as base64: its exact bytes.

            >>> with open('hello.txt', 'w') as file:
            ...     count = file.write('hello')
            >>> host.cpFileToVM('node1', os.path.abspath('hello.txt'), 'greetings/hello.txt')
            ['', '', 0]
        """
        return self._copy('put', vm, local, remote)

    def cpFileFromVM(self, vm: str, remote: FilePath, local: FilePath = '') -> list:
        """Fetches a file or folder from a VM, verified; ``[out, err, status]``.

            >>> host.cpFileFromVM('node1', 'greetings/hello.txt', os.path.abspath('again.txt'))
            ['', '', 0]
        """
        return self._copy('get', vm, remote, local)

    def _start(self, direction: str, vm: str, source: FilePath, target: FilePath) -> Transfer:
        here, there = read_local, read_remote
        from_, to = (here, there) if direction == 'put' else (there, here)
        return self._host.transfers.start(direction, vm, from_(source), to(target))

    def _copy(self, direction: str, vm: str, source: FilePath, target: FilePath) -> list:
        transfer = self._start(direction, vm, source, target)
        transfer.done.wait()
        return ['', transfer.error, 0 if transfer.state == 'done' else 1]

    def startTransfer(self, direction: str, vm: str, source: FilePath, target: FilePath,
                      options: dict = {}) -> str:
        """Begins to move a file or folder, ``put`` to the VM or ``get`` from it; its id at once.

        Fault 10 (Busy) while another one goes to the same place, whose id it names.

            >>> source = os.path.abspath('hello.txt')
            >>> transfer_id = host.startTransfer('put', 'node1', source, 'second.txt')
        """
        if options:
            raise InvalidParams('startTransfer: no option %r; there are none' % sorted(options)[0])
        return self._start(direction, vm, source, target).id

    def getTransfer(self, id: str) -> dict:
        """{state, bytes, total, rate, error, …}; state: waiting, running, done, failed, cancelled.

            >>> while host.getTransfer(transfer_id)['state'] in ('waiting', 'running'):
            ...     time.sleep(0.1)
            >>> host.getTransfer(transfer_id)['bytes']
            5
        """
        return self._host.transfers.get(id).shown()

    def cancelTransfer(self, id: str) -> bool:
        """Stops a transfer; what has arrived stays, to be gone on from. False where it has ended.

            >>> host.cancelTransfer(transfer_id)      # it has ended
            False
        """
        return self._host.transfers.cancel(id)

    def listDir(self, vm: str, path: FilePath = '/') -> list:
        """[{name, size, mode, mtime, isDir}] of a folder in a VM; name64 holds a name's exact bytes where
        XML-RPC can't carry it as text.

            >>> [entry['name'] for entry in host.listDir('node1', '/greetings')]
            ['hello.txt']
        """
        return self._host.list_dir(vm, read_remote(path))


def read_local(path: FilePath) -> str:
    """A path of this machine, as text whose surrogates stand for what isn't UTF-8."""
    return path if isinstance(path, str) else os.fsdecode(path.data)


def read_remote(path: FilePath) -> str:
    """The same for a path of a guest."""
    return path if isinstance(path, str) else chirpwire.to_text(path.data)


def read_request(cmd: str, args: List[Any], env: Any, path: Any, file_for_stdin: str,
                 options: Dict[str, Any]) -> Tuple[Dict[str, Any], bool]:
    """What runCmd was asked for, and whether it may wait. Raises InvalidParams that names the argument."""
    if not cmd:
        raise InvalidParams('cmd is empty')
    if not all(isinstance(arg, (str, int, float)) for arg in args):
        raise InvalidParams('args: each should be text')
    read = read_options(options)
    if file_for_stdin:
        if 'stdin' in read or 'stdin64' in read:
            raise InvalidParams('fileForStdin and stdin: one of them')
        read['fileForStdin'] = file_for_stdin
    queue = bool(read.pop('queue', False))
    texts = [str(arg) for arg in args]
    folder = '' if path in (None, '', 'None') else read_text('path', path)
    request = {'cmd': cmd, 'args': texts, 'env': read_env(env), 'path': folder,
               'options': read}
    for text in [cmd, folder] + texts:
        if '\0' in text:
            raise InvalidParams('NUL in %.40r' % text)
    return request, queue


def read_text(name: str, value: Any) -> str:
    """The value, which should be text. Raises InvalidParams."""
    if not isinstance(value, str):
        raise InvalidParams('%s should be text' % name)
    return value


def read_env(env: Any) -> Dict[str, str]:
    """An environment, given as {} or as the text of a JSON object. Raises InvalidParams."""
    if isinstance(env, str):
        try:
            env = protocol.read_json(env) if env not in ('', 'None') else {}
        except ValueError as error:
            raise InvalidParams('env: %s' % error)
    if env is None:
        return {}
    if not isinstance(env, dict):
        raise InvalidParams('env should be a mapping')
    for name, value in env.items():
        if not name or '=' in name or '\0' in name + str(value):
            raise InvalidParams('env: %.40r can\'t be a variable' % name)
    return {name: str(value) for name, value in env.items()}


def read_options(options: Dict[str, Any]) -> Dict[str, Any]:
    """The options of runCmd, by their names on the wire. Raises InvalidParams."""
    by_wire_name = {wire: name for name, (wire, _) in OPTIONS.items()}
    read = {}  # type: Dict[str, Any]
    for name, value in options.items():
        name = by_wire_name.get(name, name)
        if name not in OPTIONS:
            raise InvalidParams('no option %r; there are %s' % (name, ', '.join(sorted(OPTIONS))))
        wire, kinds = OPTIONS[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise InvalidParams('option %s: %r is of the wrong type' % (name, value))
        if isinstance(value, (int, float)) and not (-20 if name == 'nice' else 0) <= value <= LARGEST_NUMBER:
            raise InvalidParams('option %s: %r is out of range' % (name, value))
        read[wire] = value
    if isinstance(read.get('stdin'), xmlrpc.client.Binary):
        read['stdin64'] = base64.b64encode(read.pop('stdin').data).decode('ascii')
    for name, value in read.get('limits', {}).items():
        if name not in LIMITS or isinstance(value, bool) or not isinstance(value, (int, float)) \
                or not -1 <= value <= LARGEST_NUMBER:
            raise InvalidParams('limits: %r; there are %s, each a number' % (name, ', '.join(LIMITS)))
    return read


def read_signal(name: Any) -> str:
    """A signal as the guest understands it: a name without SIG, or a number. Raises InvalidParams."""
    text = str(name).upper()
    text = text[3:] if text.startswith('SIG') else text
    is_number = text.isdigit() and len(text) <= 2 and 0 < int(text) <= 64
    if isinstance(name, bool) or not (is_number or text in SIGNALS):
        raise InvalidParams('no signal %.40r; there are %s, and numbers from 1 to 64'
                            % (name, ', '.join(SIGNALS)))
    return text


def shown_results(results: Dict[str, Any]) -> Dict[str, Any]:
    """The results for XML-RPC, which alters some text: the exact bytes go beside it then."""
    shown = dict(results)
    for stream in ('out', 'err'):
        text = results[stream]
        if stream + '64' not in results and not is_carried(text):
            shown[stream + '64'] = base64.b64encode(text.encode('utf-8')).decode('ascii')
    return shown


@functools.lru_cache(maxsize=None)
def api_methods() -> List[str]:
    """The names of the API's own methods, in the order of their definition."""
    return [name for name, value in vars(Api).items()
            if inspect.isfunction(value) and not name.startswith('_') and not hasattr(value, 'hidden')]


def find_method(api: Api, name: str) -> Callable:
    """A method of the API by its name, or an older one of it. Raises xmlrpc.client.Fault."""
    name = Api.ALIASES.get(name, name)
    if name not in api_methods():
        raise xmlrpc.client.Fault(-32601, 'no method %.100r; system.listMethods lists them' % name)
    return getattr(api, name)


class MethodText:
    """What the reference says of one method. ``example``: lines as in an interactive session."""

    def __init__(self, name: str, method: Callable) -> None:
        text = inspect.getdoc(method) or ''
        found = re.search(r'^ *>>> ', text, re.M)
        begin = found.start() if found else len(text)
        self.name = name
        self.signature = describe_signature(method)
        self.text = text[:begin].strip()
        self.example = textwrap.dedent(text[begin:])


def describe_api() -> List[Tuple[str, List[MethodText]]]:
    """The reference: [(part, its methods)], in the order of the definitions."""
    parts = []                         # type: List[Tuple[str, List[MethodText]]]
    for name in api_methods():
        if name in Api.PARTS:
            parts.append((Api.PARTS[name], []))
        parts[-1][1].append(MethodText(name, getattr(Api, name)))
    return parts


def describe_signature(method: Callable) -> str:
    """Its parameters, with their defaults."""
    parameters = inspect.signature(method).parameters.values()
    return '(%s)' % ', '.join(
        parameter.name if parameter.default is parameter.empty
        else '%s=%r' % (parameter.name, parameter.default)
        for parameter in parameters if parameter.name != 'self')


# --- XML-RPC ---------------------------------------------------------------------------------

USER = 'vmhost'
CHALLENGE = {'WWW-Authenticate': 'Basic realm="vmhost"'}
LARGEST_CALL = 16 * 1024 * 1024        # bytes of a request
CALLS_AT_ONCE = 200
SOCKET_TIMEOUT = 75.0                  # seconds of silence on a connection
XMLRPC_NAMES = {str: 'string', int: 'int', float: 'double', bool: 'boolean', list: 'array',
                dict: 'struct', xmlrpc.client.Binary: 'base64', FilePath: 'string'}  # type: Dict[Any, str]
ACCEPTED = {float: (int, float), bool: (bool, int), int: (int, float),
            FilePath: (str, xmlrpc.client.Binary)}   # type: Dict[Any, Tuple[type, ...]]


RESPONSE = "<?xml version='1.0'?><methodResponse><params><param>%s</param></params></methodResponse>"
XML_ESCAPES = {**agent.XML_UNSAFE, ord('&'): '&amp;', ord('<'): '&lt;', ord('>'): '&gt;'}
NOT_PLAIN = re.compile('[%s]' % re.escape(''.join(map(chr, XML_ESCAPES))))


class XML(str):
    """Text that is XML already."""


def to_xml(value: Any) -> XML:
    """The value as XML-RPC can carry it: no None, no control characters, no big integers.

    Takes a third of the time of xmlrpc.client.dumps, and has no line breaks between the tags, which
    would cost a client time: answers may have thousands of values. Raises TypeError.
    """
    return XML(_to_xml(value))


def _to_xml(value: Any) -> str:
    if type(value) is str:             # most are
        return '<value><string>%s</string></value>' % xml_text(value)
    if isinstance(value, dict):
        return '<value><struct>%s</struct></value>' % ''.join(
            ['<member><name>%s</name>%s</member>' % (xml_text(str(name)), _to_xml(item))
             for name, item in value.items()])
    if isinstance(value, (list, tuple)):
        return '<value><array><data>%s</data></array></value>' % ''.join([_to_xml(item) for item in value])
    if isinstance(value, bool):
        return '<value><boolean>%d</boolean></value>' % value
    if isinstance(value, (int, float)):
        number = xml_number(value)
        return ('<value><double>%r</double></value>' if isinstance(number, float) else
                '<value><int>%d</int></value>') % number
    if isinstance(value, XML):
        return value
    if isinstance(value, xmlrpc.client.Binary):
        return '<value><base64>%s</base64></value>' % base64.b64encode(value.data).decode('ascii')
    if value is None:
        return '<value><string></string></value>'
    raise TypeError('%s in an answer' % type(value).__name__)


def xml_text(text: str) -> str:
    """Text between tags; what XML can't carry is replaced."""
    is_plain = text.isalnum() or not NOT_PLAIN.search(text)
    return text if is_plain else text.translate(XML_ESCAPES)


def xml_number(value: Any) -> Any:
    """A number, as a double where XML-RPC has no integer for it."""
    return value if isinstance(value, float) or -2 ** 31 <= value < 2 ** 31 else float(value)


AUDITED = frozenset((          # methods that change something, and leave no event of their own
    'createVM', 'removeVM', 'start', 'shutdown', 'reset', 'powerOff', 'pause', 'resume', 'saveState',
    'discardState', 'takeSnapshot', 'restoreSnapshot', 'deleteSnapshot', 'setLimits', 'remoteDesktop',
    'setupNetwork', 'cleanup', 'cpFileToVM', 'cpFileFromVM', 'startTransfer', 'cancelTransfer',
    'signalCmd', 'forgetCmd'))


class Dispatcher:
    """Calls methods by name, and turns what they raise into faults."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._system = {'system.listMethods': self.list_methods,
                        'system.methodHelp': self.method_help,
                        'system.methodSignature': self.method_signature,
                        'system.multicall': self.multicall}  # type: Dict[str, Callable]

    def answer(self, body: bytes, client: str) -> bytes:
        """The XML that answers the XML of a call; whatever goes wrong is a fault in it."""
        try:
            params, method = xmlrpc.client.loads(body, use_builtin_types=False)
            if method is None:
                raise xmlrpc.client.Fault(-32600, 'no methodCall')
        except xmlrpc.client.Fault as fault:
            return self._refuse(fault)
        except Exception as error:      # expat, base64, int(): XML from outside may break any of them
            return self._refuse(xmlrpc.client.Fault(-32700, 'no XML-RPC: %s' % error))
        self._api.called_by(client)
        try:
            return (RESPONSE % self.call(method, list(params))).encode('utf-8')
        except xmlrpc.client.Fault as fault:
            return self._refuse(fault)

    def _refuse(self, fault: xmlrpc.client.Fault) -> bytes:
        return xmlrpc.client.dumps(fault, methodresponse=True).encode('utf-8')

    def call(self, name: str, params: List[Any]) -> XML:
        """The method's answer. Raises xmlrpc.client.Fault, and nothing else.

        Who asked for what changes something is in the journal, and whether it was refused.
        """
        if Api.ALIASES.get(name, name) not in AUDITED:
            return self._call(name, params)
        self._api.note_call('asked', name, params)
        try:
            return self._call(name, params)
        except xmlrpc.client.Fault as fault:
            self._api.note_call('refused', name, params, ': fault %d, %s' % (
                fault.faultCode, fault.faultString))
            raise

    def _call(self, name: str, params: List[Any]) -> XML:
        try:
            method = self._find(name)
            return to_xml(method(*check_arguments(method, params)))
        except xmlrpc.client.Fault as fault:
            code, text = fault.faultCode, fault.faultString
        except VMHostError as error:
            code, text = error.fault, str(error)
        except Exception as error:
            log.exception('in %s', name)
            code, text = -32603, '%s: %s' % (type(error).__name__, error)
        raise xmlrpc.client.Fault(code, text.translate(agent.XML_UNSAFE))

    def list_methods(self) -> list:
        """Names of all methods."""
        return sorted(api_methods() + list(Api.ALIASES) + list(self._system))

    def _find(self, name: str) -> Callable:
        return self._system.get(name) or find_method(self._api, name)

    def method_help(self, name: str) -> str:
        """What a method does."""
        return inspect.getdoc(self._find(name)) or ''

    def method_signature(self, name: str) -> list:
        """The types of answer and parameters, once for each number of parameters."""
        signature = inspect.signature(self._find(name))
        kinds = [XMLRPC_NAMES.get(signature.return_annotation, 'undef')]
        found = []
        for parameter in signature.parameters.values():
            if parameter.default is not parameter.empty:
                found.append(list(kinds))
            kinds.append(XMLRPC_NAMES.get(parameter.annotation, 'undef'))
        return found + [kinds]

    def multicall(self, calls: list) -> list:
        """[{methodName, params}] -> [[answer] or {faultCode, faultString}]."""
        return [self._one_of_many(call) for call in calls]

    def _one_of_many(self, call: Any) -> Any:
        try:
            if not isinstance(call, dict) or not isinstance(call.get('params', []), list):
                raise xmlrpc.client.Fault(-32602, 'a call is {methodName, params}')
            if call.get('methodName') == 'system.multicall':
                raise xmlrpc.client.Fault(-32602, 'system.multicall within system.multicall')
            return [self.call(str(call.get('methodName')), call.get('params', []))]
        except xmlrpc.client.Fault as fault:
            return {'faultCode': fault.faultCode, 'faultString': fault.faultString}


signature_of = functools.lru_cache(maxsize=None)(inspect.signature)


def check_arguments(method: Callable, params: List[Any]) -> List[Any]:
    """The arguments, for a method that takes as many, of these types. Raises InvalidParams."""
    signature = signature_of(method)
    try:
        bound = signature.bind(*params)
    except TypeError as error:
        raise InvalidParams('%s%s: %s' % (method.__name__, describe_signature(method), error))
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].annotation
        accepted = ACCEPTED.get(kind, kind)
        if kind is not Any and not isinstance(value, accepted):
            raise InvalidParams('%s: %s should be %s' % (method.__name__, name,
                                                         XMLRPC_NAMES.get(kind, kind)))
    return list(bound.args)


# --- pages -----------------------------------------------------------------------------------

LINK_LIFE = 120.0              # seconds in which a link opens the status page
VISIT_LIFE = 12 * 3600.0       # seconds without a request, after which a visit ends
VISITS_KEPT = 100
LOOK_LIFE = 1.0                # seconds that one look at everything serves all pages
ASK_EVERY = 2.0                # seconds between two questions to a guest about a command
ASKED_AT_ONCE = 50
MACHINES_SHOWN = 500
COMMANDS_SHOWN = 100
ENDED_SHOWN = 20
TEXT_SHOWN = 300               # characters of an event's text: a command may have a megabyte of them
OUTPUT_SHOWN = 64 * 1024       # bytes of output at once
PAGE_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 60em; margin: 0 auto; padding: 1em; font: 16px/1.5 system-ui, sans-serif; }
h3 { margin-bottom: 0; font: bold 1em ui-monospace, monospace; overflow-wrap: anywhere; }
p { margin: .3em 0; }
pre { overflow-x: auto; padding: .5em; border: 1px solid #8888; border-radius: 4px; }
"""


def read_beside(name: str) -> bytes:
    """A file that lies beside this one, in a folder or in a bundle."""
    folder = os.path.dirname(__file__)
    return __loader__.get_data(os.path.join(folder, name))     # type: ignore[name-defined]


def page_headers(page: str) -> Dict[str, str]:
    """What a browser is told: nothing but what stands in this page is run, shown or fetched."""
    allowed = {}
    for tag in ('style', 'script'):
        parts = re.findall('<%s>(.*?)</%s>' % (tag, tag), page, re.S)
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        allowed[tag] = ' '.join("'sha256-%s'" % digest for digest in digests) or "'none'"
    return {'Content-Security-Policy':
            "default-src 'none'; style-src %(style)s; script-src %(script)s; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'" % allowed,
            'Referrer-Policy': 'no-referrer', 'Cross-Origin-Resource-Policy': 'same-origin',
            'Cross-Origin-Opener-Policy': 'same-origin'}


def reference_page() -> str:
    """The API's reference as a page: what docs/api.md says, of this very program."""
    escape = html.escape
    parts = ['<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">',
             '<meta name="viewport" content="width=device-width, initial-scale=1">',
             '<title>vmhost %s: methods</title>' % agent.VERSION,
             '<link rel="icon" href="data:,">', '<style>%s</style>' % PAGE_STYLE,
             '<main>\n<h1>Methods of vmhost %s</h1>' % agent.VERSION,
             paragraphs(inspect.getdoc(Api) or '')]
    for part, methods in describe_api():
        parts.append('<h2>%s</h2>' % escape(part))
        for method in methods:
            parts += ['<h3 id="%s">%s%s</h3>' % (method.name, method.name, escape(method.signature)),
                      paragraphs(method.text), '<pre tabindex="0">%s</pre>' % escape(method.example)]
    aliases = ['``%s`` is ``%s``' % item for item in Api.ALIASES.items()]
    parts += ['<h2>Older names</h2>', paragraphs(', '.join(aliases)), '</main>\n</html>\n']
    return '\n'.join(parts)


def paragraphs(text: str) -> str:
    """A docstring's text as HTML."""
    marked = re.sub('``(.*?)``', r'<code>\1</code>', html.escape(text))
    return '\n'.join('<p>%s</p>' % part for part in marked.split('\n\n'))


class Visits:
    """Who may see the status page without the token: a browser that came by a link. Any thread.

    A link holds a key, that is good once and for two minutes; it is exchanged for a cookie, so
    that nothing that lasts stands in an address. The cookie opens the status page alone.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Guards both tables: key or cookie -> when it ends. Nothing is called while it is held.
        self._lock = threading.Lock()
        self._keys = collections.OrderedDict()     # type: Dict[str, float]
        self._visits = collections.OrderedDict()   # type: Dict[str, float]

    def new_key(self) -> str:
        """A key for one link."""
        return self._add(self._keys, LINK_LIFE)

    def enter(self, key: str) -> str:
        """A visit's secret for a key; '' where the key is unknown, used or too old."""
        with self._lock:
            ends = self._keys.pop(key, 0.0)
        return self._add(self._visits, VISIT_LIFE) if ends > self._clock() else ''

    def is_known(self, secret: str) -> bool:
        """Whether that visit goes on; each time it is asked for, it is prolonged."""
        with self._lock:
            ends = self._visits.pop(secret, 0.0)
            if ends <= self._clock():
                return False
            self._visits[secret] = self._clock() + VISIT_LIFE
            return True

    def _add(self, table: Any, life: float) -> str:
        secret = secrets.token_urlsafe(24)
        with self._lock:
            table[secret] = self._clock() + life
            while len(table) > VISITS_KEPT:
                table.popitem(last=False)      # the oldest, or the one not used for longest
        return secret


def number_or_0(value: Any) -> float:
    """A number that a guest told, where it is one that JSON can carry."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else 0


class StatusPage:
    """The status page, and what it reads. It shows, and never acts. Any thread may ask.

    ``/status`` is the page; ``/status/snapshot?since=TIME`` all that goes on now, with loads since
    that time; ``/status/events?after=NUMBER&timeout=SECONDS`` and ``/status/output?id=ID&
    stream=STREAM&offset=BYTES`` (no offset: the end of it) are getEvents and getCmdOutput.
    """

    def __init__(self, host: Any, api: Api) -> None:
        self._host = host
        self._api = api
        self._visits = Visits()
        self.page = read_beside('status.html')
        self.headers = page_headers(self.page.decode('utf-8'))
        # Guards the last look, and lets one thread at a time look: other pages wait for what it saw.
        self._looking = threading.Lock()
        self._looked = -1e9
        self._seen = {}                # type: Dict[str, Any]

    def link(self, url: str) -> str:
        """The address of the page with a key that opens it once."""
        return '%sstatus?key=%s' % (url, self._visits.new_key())

    def enter(self, query: Dict[str, str]) -> str:
        """A new visit, for the key of a link; else ''."""
        return self._visits.enter(query.get('key', ''))

    def is_visitor(self, secret: str) -> bool:
        """Whether a cookie is that of a visit that goes on."""
        return self._visits.is_known(secret)

    def read(self, what: str, query: Dict[str, str]) -> Dict[str, Any]:
        """The answer to one of the page's questions. Raises VMHostError, ValueError, KeyError."""
        if what == 'snapshot':
            return self._snapshot(float(query.get('since', 0)))
        if what == 'events':
            return self._events(int(query.get('after', 0)), float(query.get('timeout', 0)))
        if what == 'output':
            return self._output(query['id'], query.get('stream', 'out'), query.get('offset', ''))
        raise KeyError(what)

    def _events(self, after: int, timeout: float) -> Dict[str, Any]:
        found = self._api.getEvents(after, timeout)
        return {'last': found['last'], 'events': [dict(event, text=event['text'][:TEXT_SHOWN])
                                                  for event in found['events']]}

    def _output(self, id: str, stream: str, offset: str) -> Dict[str, Any]:
        execution = self._host.commands.find_one(id)
        if not offset:
            self._host.refresh([execution])
        status = self._host.status(execution)
        size = status['errSize' if stream == 'err' else 'outSize']
        begin = int(offset) if offset else max(0, int(number_or_0(size)) - OUTPUT_SHOWN)
        found = self._api.getCmdOutput(id, stream, begin, OUTPUT_SHOWN)
        return dict(found, data=base64.b64encode(found['data'].data).decode('ascii'),
                    state=status['state'])

    def _snapshot(self, since: float) -> Dict[str, Any]:
        with self._looking:
            if time.monotonic() - self._looked > LOOK_LIFE:
                self._seen = self._look()
                self._looked = time.monotonic()
            seen = self._seen
        return dict(seen, vms=[dict(vm, loads=[load for load in vm['loads'] if load[0] > since])
                               for vm in seen['vms']])

    def _look(self) -> Dict[str, Any]:
        now = time.time()
        commands, unfinished = self._commands()
        vms = self._vms()
        return {'time': now, 'agent': self._api.agentInfo(), 'host': socket.gethostname(),
                'vms': vms[:MACHINES_SHOWN], 'vmsInAll': len(vms), 'commands': commands,
                'transfers': self._transfers(),
                'unfinished': unfinished, 'lastEvent': self._host.journal.last_event}

    def _transfers(self) -> List[Dict[str, Any]]:
        """Those under way, the oldest first, then those that ended last."""
        known = self._host.transfers.list()
        under_way = [transfer for transfer in known if transfer['state'] in ('waiting', 'running')]
        ended = [transfer for transfer in known if transfer not in under_way]
        return under_way + ended[:-ENDED_SHOWN - 1:-1]

    def _vms(self) -> List[Dict[str, Any]]:
        """All VMs, and all agents: those that are there before those that were."""
        rows = [self._of_guest(guest) for guest in self._host.guests.all()]
        if self._host.hypervisor is not None:
            known = {row['id'] for row in rows}
            rows += [self._of_vm(name, state, id)
                     for name, state, id in self._host.hypervisor.known_vms() if id not in known]
        return sorted(rows, key=lambda row: (row['agent'] == 'lost', row['name'], row['id']))

    def _of_guest(self, guest: Guest) -> Dict[str, Any]:
        loads = [[load['time'], load.get('load1'), load.get('mem_free')]
                 for load in self._host.guests.loads_of(guest)]
        state = 'Null' if guest.agent == 'lost' else 'Running'
        if self._host.hypervisor is not None:
            state = self._host.hypervisor.known_state(guest.id) or state
        return {'id': guest.id, 'name': guest.name, 'state': state, 'agent': guest.agent,
                'ip': guest.ip, 'lastSeen': guest.last_seen, 'os': str(guest.facts.get('os', '')),
                'cpus': number_or_0(guest.facts.get('cpus')),
                'mem': number_or_0(guest.facts.get('mem')), 'loads': loads}

    def _of_vm(self, name: str, state: str, id: str) -> Dict[str, Any]:
        """A VM of which no agent was ever heard."""
        return {'id': id, 'name': name, 'state': state, 'agent': 'never', 'ip': '', 'lastSeen': 0,
                'os': '', 'cpus': 0, 'mem': 0, 'loads': []}

    def _commands(self) -> Tuple[List[Dict[str, Any]], int]:
        """The unfinished commands, the oldest first, then those that ended last; how many are unfinished."""
        running = self._host.commands.list({'finished': False, 'limit': COMMANDS_SHOWN})
        now = time.monotonic()
        stale = [execution for execution in running if now - execution.status_time > ASK_EVERY]
        stale.sort(key=lambda execution: execution.status_time)
        self._host.ask_for_news(stale[:ASKED_AT_ONCE])
        ended = sorted(self._host.commands.last_ended(ENDED_SHOWN), key=lambda one: -one.ended)
        return [self._of_command(execution) for execution in running + ended], self._host.commands.count()

    def _of_command(self, execution: Execution) -> Dict[str, Any]:
        status = self._host.status(execution)
        usage = status['resources'] if isinstance(status['resources'], dict) else {}
        shown = {name: number_or_0(status[name])
                 for name in ('wall', 'processes', 'outSize', 'errSize', 'age')}    # type: Dict[str, Any]
        return dict(shown, cmdId=execution.key, vm=execution.vm, cmd=execution.cmd[:TEXT_SHOWN],
                    state=status['state'], ended=execution.ended,
                    progress=str(status['progress'])[:TEXT_SHOWN],
                    end=describe_end(execution.answer())[:TEXT_SHOWN] if execution.ended else '',
                    cpu=number_or_0(usage.get('ru_utime')) + number_or_0(usage.get('ru_stime')),
                    rss=number_or_0(usage.get('ru_maxrss')) * 1024)


# --- server ----------------------------------------------------------------------------------

class _Handler(http.server.BaseHTTPRequestHandler):
    """One connection: POST calls the API, GET shows pages. On a thread of its own."""

    protocol_version = 'HTTP/1.1'
    server_version = 'vmhost/' + agent.VERSION
    sys_version = ''
    timeout = SOCKET_TIMEOUT
    wbufsize = -1                      # the answer leaves in one segment …
    disable_nagle_algorithm = True     # … and at once
    server = None                      # type: Any

    def do_POST(self) -> None:
        """A call of the API."""
        if not self._is_allowed():
            return
        if self.path not in ('/', '/RPC2'):
            return self._refuse(404, 'calls go to / or /RPC2')
        length = self.headers.get('Content-Length', '')
        if not length.isdigit():
            return self._refuse(411, 'Content-Length is missing')
        if int(length) > LARGEST_CALL:
            return self._refuse(413, 'at most %d bytes are taken' % LARGEST_CALL)
        body = self.rfile.read(int(length))
        if len(body) == int(length):
            answer = self.server.dispatcher.answer(body, 'vmhost@%s' % self.client_address[0])
            self.respond(200, 'text/xml; charset=utf-8', answer)

    def do_GET(self) -> None:
        """A page, or what the status page asks for."""
        if not self.is_from_here():
            return
        path, _, rest = self.path.partition('?')
        query = dict(urllib.parse.parse_qsl(rest))
        head, _, what = path[1:].partition('/')
        if head == 'status':
            return self._show_status(what, query)
        if not self._is_allowed():
            return
        if path != '/':
            return self._refuse(404, 'no page %.100s' % path)
        page = reference_page()
        self.respond(200, 'text/html; charset=utf-8', page.encode(), page_headers(page))

    def _show_status(self, what: str, query: Dict[str, str]) -> None:
        """The status page and its questions: for who has the token, a visit's cookie, or a key."""
        status = self.server.status
        name = 'vmhost-%d' % self.server.address[1]    # browsers share cookies between ports
        visit = '' if what else status.enter(query)
        if not (visit or status.is_visitor(self._cookie(name)) or self.has_token()):
            return self._refuse_visitor()
        if what:
            return self._answer_page(what, query)
        headers = dict(status.headers)
        if visit:
            headers['Set-Cookie'] = '%s=%s; Path=/status; HttpOnly; SameSite=Strict' % (name, visit)
        self.respond(200, 'text/html; charset=utf-8', status.page, headers)

    def _cookie(self, name: str) -> str:
        for part in self.headers.get('Cookie', '').split(';'):
            key, _, value = part.strip().partition('=')
            if key == name:
                return value
        return ''

    def _refuse_visitor(self) -> None:
        # The page itself says what to do; a browser's own dialogue would only be in its way.
        challenge = {} if self.headers.get('X-Requested-With') else CHALLENGE
        self._refuse(401, 'the status page opens by a link, good once and for two minutes: python '
                     'vmhost.py host.ini status --open; or for the user %s, with the token' % USER, challenge)

    def _answer_page(self, what: str, query: Dict[str, str]) -> None:
        """One of the page's questions, answered as JSON."""
        try:
            code, answer = 200, self.server.status.read(what, query)
        except (ValueError, OverflowError, KeyError, InvalidParams) as error:
            code, answer = 400, {'error': str(error)}
        except NoSuchCommand as error:
            code, answer = 404, {'error': str(error)}
        except VMHostError as error:
            code, answer = 503, {'error': str(error)}
        self.respond(code, 'application/json', json.dumps(answer).encode(),
                     {'Cross-Origin-Resource-Policy': 'same-origin'})

    def _is_allowed(self) -> bool:
        """Token, Host and Origin; else it has been refused."""
        if not self.is_from_here():
            return False
        if not self.has_token():
            self._refuse(401, 'user %s and the password in state_dir/xmlrpc.token are wanted' % USER,
                         CHALLENGE)
            return False
        return True

    def is_from_here(self) -> bool:
        """Refuses what another page in a browser can send: Origin, or the name of a foreign host."""
        by_a_page = self.headers.get('Sec-Fetch-Site') in ('cross-site', 'same-site') \
            and self.headers.get('Sec-Fetch-Mode') != 'navigate'
        if self.headers.get('Origin') is not None or by_a_page:
            self._refuse(403, 'requests from web pages are refused')
            return False
        if not self.server.is_own_name(self.headers.get('Host'), self.connection.getsockname()[0]):
            self._refuse(403, 'foreign Host')
            return False
        return True

    def has_token(self) -> bool:
        """Whether the request carries user and password, or needs none."""
        if not self.server.token:
            return True
        scheme, _, given = self.headers.get('Authorization', '').partition(' ')
        wanted = base64.b64encode(('%s:%s' % (USER, self.server.token)).encode())
        return scheme.lower() == 'basic' and hmac.compare_digest(
            given.strip().encode('utf-8', 'replace'), wanted)

    def _refuse(self, code: int, why: str, headers: Optional[Dict[str, str]] = None) -> None:
        # What the request still holds is not read; the connection can't be used for another one.
        self.close_connection = True
        log.debug('refused %s: %s', self.client_address, why)
        self.respond(code, 'text/plain; charset=utf-8', (why + '\n').encode(),
                     dict(headers or {}, Connection='close'))

    def respond(self, code: int, kind: str, body: bytes,
                headers: Optional[Dict[str, str]] = None) -> None:
        """Sends a whole answer."""
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(body)))
        self.send_header('X-Content-Type-Options', 'nosniff')
        self.send_header('Cache-Control', 'no-store')
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are for the log's eyes only when it looks closely."""
        log.debug('%s ' + format, self.client_address[0], *args)


class XMLRPCServer(socketserver.TCPServer):
    """HTTP on the XML-RPC port, a thread per connection, no call holding up another."""

    request_queue_size = 128
    # On Windows it would let another process take the port.
    allow_reuse_address = os.name == 'posix'

    def __init__(self, host: Any) -> None:
        """Binds. Raises VMHostError that names the port."""
        listen_on, port = host.settings.Host.xmlrpc_listen_on, host.settings.Host.xmlrpc_port
        self.address_family = socket.AF_INET6 if ':' in listen_on else socket.AF_INET
        self.token = host.token if host.settings.Host.xmlrpc_auth else ''
        if not (self.token or is_loopback(listen_on)):
            raise VMHostError('[Host] xmlrpc_auth = no: anybody on %s could run commands; expected '
                              'xmlrpc_listen_on = 127.0.0.1 with it' % listen_on)
        self.api = Api(host)
        self.dispatcher = Dispatcher(self.api)
        self.status = StatusPage(host, self.api)
        self._address_file = host.folder.file('xmlrpc.address')
        # Guards the table of connections; nothing but the start, or end, of one happens while it is held.
        self._lock = threading.Lock()
        self._connections = {}         # type: Dict[socket.socket, threading.Thread]
        try:
            super().__init__((listen_on, port), _Handler)
        except (OSError, OverflowError) as error:
            why = agent.why_not_listening(error) if isinstance(error, OSError) else error
            raise VMHostError('XML-RPC can\'t listen on %s:%s ([Host] xmlrpc_listen_on, xmlrpc_port): %s'
                              % (listen_on, port, why))
        self.address = self.server_address[:2]     # type: Any
        self._names = {'localhost', '127.0.0.1', '[::1]', listen_on.lower(), '[%s]' % listen_on,
                       socket.gethostname().lower()}
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), name='xmlrpc',
                                        daemon=True)

    def start(self) -> None:
        """Serves, on the thread ``xmlrpc``; the file xmlrpc.address tells the command line where."""
        self._thread.start()
        with open(self._address_file, 'w') as file:
            file.write('%s:%s\n' % self.address)

    def own_url(self) -> str:
        """Where a browser on this machine finds this server."""
        listen_on, port = self.address
        name = {'0.0.0.0': '127.0.0.1', '::': '::1', '': '127.0.0.1'}.get(listen_on, listen_on)
        return 'http://%s:%d/' % ('[%s]' % name if ':' in name else name, port)

    def is_own_name(self, host: Optional[str], address: str) -> bool:
        """Whether a Host header names this server, of which the client uses that address.

        No header: no browser sent it. A foreign name that leads here would be another site's.
        """
        if host is None:
            return True
        name = host.strip().lower()
        head, colon, port = name.rpartition(':')
        if colon and port.isdigit():
            name = head
        return name in self._names or name.strip('[]') == address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hands a connection to a thread of its own."""
        thread = threading.Thread(target=self._serve, args=(request, client_address),
                                  name='xmlrpc-%s:%s' % client_address[:2], daemon=True)
        with self._lock:
            if len(self._connections) >= CALLS_AT_ONCE:
                log.warning('more than %d connections: one is refused', CALLS_AT_ONCE)
                self.shutdown_request(request)
                return
            try:
                thread.start()
            except RuntimeError as error:      # no more threads, of this process or of its user
                log.warning('a connection can\'t be served: %s', error)
                self.shutdown_request(request)
                return
            self._connections[request] = thread

    def _serve(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except OSError as error:
            log.debug('connection from %s: %s', client_address, error)
        except Exception:       # one connection's end is not the server's
            log.exception('connection from %s', client_address)
        finally:
            self.shutdown_request(request)
            with self._lock:
                self._connections.pop(request, None)

    def stop(self, timeout: float = 1.0) -> None:
        """Ends all connections, and the threads with a deadline."""
        if self._thread.ident is not None:
            self.shutdown()
            self._thread.join(timeout)
        self.server_close()
        with self._lock:
            connections = dict(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + timeout
        for thread in connections.values():
            thread.join(max(0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning('thread %s still runs', thread.name)
        with contextlib.suppress(OSError):
            os.remove(self._address_file)
