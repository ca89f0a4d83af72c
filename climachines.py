"""The verbs for VMs: what there is, and what the hypervisor does with them.

What it is not: anything that knows a hypervisor. No threads but a long call's (cliverbs.watch), no locks.
"""

import argparse
import os
import re
import time
from typing import Any, Dict, List

import agent
from cliscreen import Screen, show_pairs, shown_offset, shown_size
from cliverbs import (
    JSON,
    VM,
    VMS,
    Function,
    Verb,
    argument,
    for_each,
    last_heard,
    life,
    read_seconds,
    show_list,
    switch,
    watch,
)
from faults import BadState, InvalidParams, NotSupported
from hostclient import Client
from rpc import finite

SPARE = ['CLOCK', 'PYTHON', 'ID', 'CPUS', 'SYSTEM', 'MEMORY', 'ADDRESS', 'SEEN', 'COMMANDS', 'STATE',
         'AGENT']              # columns of `ls`: what a narrow terminal does without first


def do_ls(host: Client, screen: Screen, args: Any) -> int:
    """VMs, and whether their agents are connected: what is wrong comes first."""
    found = host.call('getVMs')
    if args.vm:
        known = [vm['name'] for vm in found]
        names = {name for pattern in args.vm for name in host.matching_of(pattern, known)}
        found = [vm for vm in found if vm['name'] in names]
    found.sort(key=lambda vm: (not vm['trouble'], life(vm) not in ('lost', 'late'),
                               agent.in_order(vm['name'])))
    info = host.call('agentInfo')
    warn_of_silence(screen, info)
    if args.quiet or args.json:
        return show_list(screen, args.json, [vm['name'] for vm in found], found)
    headings = ['NAME', 'STATE', 'AGENT', 'ADDRESS', 'COMMANDS']
    if args.long:
        headings += ['ID', 'SEEN', 'CPUS', 'MEMORY', 'PYTHON', 'CLOCK', 'SYSTEM']
    screen.table(headings, [vm_row(vm, args.long) for vm in found], spare=SPARE, elastic=['SYSTEM'])
    for vm in found:
        if vm['trouble']:
            screen.say(agent.printable('%s: %s' % (vm['name'], vm['trouble'])))
    for refused in info.get('refused', ()) if not args.vm else ():
        screen.say(agent.printable('%s is not let in: %s' % (refused['id'], refused['why'])))
    for job in info['jobs']:
        screen.say(agent.printable('%s: %s, %d %%' % (job['vm'], job['text'], job['percent'])))
    return 0


def warn_of_silence(screen: Screen, info: Dict[str, Any]) -> None:
    """Says that what is shown is not of now, where the hypervisor answers nobody."""
    if info.get('trouble'):
        screen.complain(info['trouble'])


def vm_row(vm: Dict[str, Any], long: bool) -> List[Any]:
    """A line of `ls`."""
    facts = vm['facts']
    state = 'unknown' if vm['state'] == 'Null' else vm['state']
    row = [vm['name'], state, life(vm), vm['ip'] or '-', len(vm['commands'])]
    if long and facts.get('unsigned'):
        row[2] += ' (unsigned)'
    if long:
        memory = shown_size(finite(facts['mem'])) if facts.get('mem') else '-'
        clock = shown_offset(vm['clockOffset'])
        row += [vm['id'], last_heard(vm), facts.get('cpus', '-'), memory, facts.get('python', '-'), clock,
                facts.get('os', '-')]
    return row


def hardware_of(args: Any) -> Dict[str, Any]:
    """createVM's options, as they were typed."""
    names = 'memory', 'cpus', 'ostype', 'network', 'diskSize', 'forwards', 'bridged', 'keep', 'acceptEula'
    typed = {name: getattr(args, name) for name in names}
    return {name: value for name, value in typed.items() if value is not None and value is not False}


def read_forward(text: str) -> Dict[str, int]:
    """[HOST:]GUEST as one of createVM's forwards. Raises ArgumentTypeError."""
    ports = text.split(':')
    if len(ports) > 2 or not all(re.fullmatch('[0-9]{1,5}', port) for port in ports):
        raise argparse.ArgumentTypeError('%s: expected 8080:80, or 80 for any free port of this machine'
                                         % text)
    host, guest = ports if len(ports) == 2 else ('0', text)
    return {'guestPort': int(guest), 'hostPort': int(host)}


def do_launch(host: Client, screen: Screen, args: Any) -> int:
    """Makes a VM from an image, starts it, and waits for its agent."""
    options = dict(hardware_of(args), timeout=args.timeout)
    make(host, screen, args.name, 'launchVM', args.name, path_here(args.image), options)
    screen.say(agent.printable(args.name))
    return 0


def do_create(host: Client, screen: Screen, args: Any) -> int:
    """Makes a VM from an image, or registers a .vbox file."""
    options = hardware_of(args)
    image = args.image and path_here(args.image)
    name = os.path.abspath(args.name) if not image and args.name.endswith('.vbox') else args.name
    _, made = make(host, screen, name, 'createVM', name, image, options)
    screen.say(agent.printable(made))
    return 0


def path_here(path: str) -> str:
    """From the root, as the host's working directory is not ours; a slash at its end stays, as no file has
    one."""
    found = os.path.abspath(path)
    return os.path.join(found, '') if path[-1] in (os.sep, os.altsep) else found


def make(host: Client, screen: Screen, *args: Any) -> Any:
    """As watch; the licence that an appliance comes under is shown as it is written."""
    try:
        return watch(host, screen, *args)
    except BadState as error:
        sentence, _, licence = str(error).partition(':\n')
        for line in licence.splitlines():
            screen.say(agent.printable(line))
        raise BadState(sentence)


def do_rm(host: Client, screen: Screen, args: Any) -> int:
    """Removes a VM, with its disks if asked; says which disks are kept nevertheless, and why."""
    name, after = host.call('getVM', args.vm)['name'], host.call('getEvents', -1)['last']
    try:
        watch(host, screen, args.vm, 'removeVM', args.vm, args.disks, args.all_disks)
    except NotSupported as error:
        raise NotSupported('%s; `forget %s` takes a machine off the list' % (error, args.vm))
    screen.say('%s removed' % agent.printable(args.vm))
    for event in host.call('getEvents', after)['events']:
        if (event['type'], event['vm']) == ('disk-kept', name):
            screen.say('kept %s' % agent.printable(event['text']))
    return 0


def do_start(host: Client, screen: Screen, args: Any) -> int:
    """Starts VMs, or resumes saved ones."""
    return change(host, screen, host.matching(args.vm), 'is running', 'start', args.gui)


def do_stop(host: Client, screen: Screen, args: Any) -> int:
    """Shuts VMs down, or powers them off."""
    return change(host, screen, host.matching(args.vm), 'is off', 'powerOff' if args.force else 'shutdown')


def changing(method: str, done: str) -> Function:
    """What a verb does that calls one method for each VM."""
    def do(host: Client, screen: Screen, args: Any) -> int:
        return change(host, screen, host.matching(args.vm), done, method)
    return do


def change(host: Client, screen: Screen, vms: List[str], done: str, method: str, *args: Any) -> int:
    """Calls a method for each VM, and says when it is done."""
    def change_one(vm: str) -> None:
        watch(host, screen, vm, method, vm, *args)
        screen.say('%s %s' % (agent.printable(vm), done))
    return for_each(screen, vms, change_one)


def do_forget(host: Client, screen: Screen, args: Any) -> int:
    """Forgets a machine; one that is at work only if asked twice, as that would be lost."""
    found = host.call('getVM', args.vm)
    if found['agent'] == 'alive' and not args.force:
        moves = not found['commands'] and host.call('listTransfers', {'vm': args.vm, 'finished': False})
        if found['commands'] or moves:
            raise BadState('%s is there, and at work (`%s %s`): what comes of it would be lost; wait for it, '
                           'or forget it with --force' % (found['name'], 'transfers' if moves else 'ps',
                                                       found['name']))
    host.call('forgetVM', args.vm)
    screen.say('%s is forgotten' % agent.printable(args.vm))
    return 0


SNAPSHOTS = {'take': ('takeSnapshot', 'taken'), 'restore': ('restoreSnapshot', 'restored'),
             'rm': ('deleteSnapshot', 'deleted')}


def do_snap(host: Client, screen: Screen, args: Any) -> int:
    """Lists, takes, restores and deletes snapshots."""
    if args.action == 'ls':
        names = host.call('listSnapshots', args.vm)
        warn_of_silence(screen, host.call('agentInfo'))
        return show_list(screen, args.json, names, names)
    if args.action != 'restore' and not args.name:
        raise InvalidParams('no snapshot named: snap %s VM NAME' % args.action)
    method, done = SNAPSHOTS[args.action]
    watch(host, screen, args.vm, method, args.vm, args.name)
    screen.say('snapshot %s' % done)
    return 0


def do_ping(host: Client, screen: Screen, args: Any) -> int:
    """Asks agents for an answer."""
    def ping(vm: str) -> None:
        begin = time.monotonic()
        answer = host.call('ping', vm, args.timeout)
        screen.say('%s in %.1f ms' % (agent.printable(answer), 1000 * (time.monotonic() - begin)))
    return for_each(screen, host.matching_known(args.vm), ping)


def do_rdp(host: Client, screen: Screen, args: Any) -> int:
    """Switches the remote desktop of a VM, and says where it is."""
    desktop = host.call('remoteDesktop', args.vm, not args.off)
    on = ['%(address)s:%(port)s (authentication %(auth)s, security %(security)s)' % desktop]
    if 'password' in desktop:
        on.append('password: %s (shown once)' % desktop['password'])
    return show_list(screen, args.json, ['off'] if args.off else on, desktop)


OUT_OF_REACH = 'the broker listens on %s, where no VM can reach it: restart the host agent'


def do_net(host: Client, screen: Screen, args: Any) -> int:
    """The network of the VMs, as it is."""
    network = host.call('setupNetwork' if args.setup else 'getNetwork')
    warn_of_silence(screen, host.call('agentInfo'))
    if args.json:
        screen.json(network)
    else:
        show_pairs(screen, network)
    if args.setup and network['mode'] == 'hostonly':
        address = host.call('agentInfo')['broker']['address']
        if is_out_of_reach(address, network['mode']):
            screen.complain(OUT_OF_REACH % address)
    return 0


def is_out_of_reach(broker: str, mode: str) -> bool:
    """Whether the broker's address is for this machine alone, in a host-only network: the host agent was
    started before there was one."""
    return mode == 'hostonly' and broker.startswith(('127.', 'localhost'))


def do_cleanup(host: Client, screen: Screen, args: Any) -> int:
    """Unfinished VMs and unused disks that this tool created: listed, or removed."""
    vms = [vm for group in args.vms for vm in group]
    named = [host.call('getVM', vm)['name'] for vm in vms]
    found = host.call('cleanup', not args.yes, vms)
    verb = 'removed ' if args.yes else 'would remove '
    lines = ['%s %s (%s)' % (what['kind'] if what['kind'] == 'kept' else verb + what['kind'], what['name'],
                             what['why']) for what in found]
    show_list(screen, args.json, lines, found)
    if [what for what in found if what['kind'] != 'kept'] and not args.yes and not args.json:
        screen.complain('nothing was removed; use cleanup --yes')
    return 1 if [what for what in found if what['kind'] == 'kept' and what['name'] in named] else 0


def do_keep(host: Client, screen: Screen, args: Any) -> int:
    """Marks VMs that cleanup never removes."""
    done = 'is not kept any more' if args.off else 'is kept'
    return change(host, screen, host.matching(args.vm), done, 'keepVM', not args.off)


HARDWARE = [
    argument('--memory', metavar='MB', type=int, help='what it has of it'),
    argument('--cpus', metavar='N', type=int, help='how many it has'),
    argument('--ostype', metavar='TYPE', help='VirtualBox\'s name for the guest\'s system'),
    argument('--network', choices=['hostonly', 'nat', 'none'], help='default: as in host.ini'),
    argument('--disk', metavar='MB', type=int, dest='diskSize',
             help='of its new disk, without an image or beside an .iso; 0: none'),
    argument('--forward', metavar='[HOST:]GUEST', type=read_forward, action='append', dest='forwards',
             help='have a port of this machine, any free one by default, lead to one of a guest with NAT'),
    argument('--bridged', metavar='IF',
             help='one more card, in the network of that interface of this machine; auto: of its uplink'),
    switch('--keep', help='cleanup never removes it'),
    switch('--accept-eula', dest='acceptEula', help='accept the licence of an appliance')]
VERBS = [
    Verb('ls', do_ls, 'list VMs, and whether their agents are connected', [
        argument('vm', metavar='VM', nargs='*', help='only these, or those that match a pattern'), JSON,
        switch('-l', '--long', help='more columns'), switch('-q', '--quiet', help='their names alone')]),
    Verb('create', do_create, 'create a VM from an image, or register a .vbox file', [
        argument('name', metavar='NAME', help='of the VM, or a .vbox file'),
        argument('image', metavar='IMAGE', nargs='?', default='', help='.ova, .ovf, .vdi, .vmdk or .iso'),
        *HARDWARE], ('create web1 cernvm.ova --memory 2048 --cpus 2',)),
    Verb('launch', do_launch, 'create a VM from an image, start it, wait for its agent', [
        argument('name', metavar='NAME', help='of the VM'),
        argument('image', metavar='IMAGE', help='.ova, .ovf, .vdi, .vmdk or .iso'),
        argument('--timeout', metavar='SEC', type=float, default=600.0, help='for its agent (default: 600)'),
        *HARDWARE], ('launch web1 cernvm.ova --memory 2048',)),
    Verb('rm', do_rm, 'remove a VM', [
        VM, switch('--disks', help='delete its files and disks as well'),
        switch('--all-disks', help='and disks that were attached from elsewhere')]),
    Verb('forget', do_forget, 'forget a machine: its name, id and secret are free for another one', [
        VM, switch('--force', help='also one that is at work: that is lost')]),
    Verb('start', do_start, 'start VMs', [VMS, switch('--gui', help='with a window')]),
    Verb('stop', do_stop, 'shut VMs down', [VMS, switch('--force', help='power them off')]),
    Verb('pause', changing('pause', 'is paused'), 'pause VMs', [VMS]),
    Verb('resume', changing('resume', 'is running'), 'resume paused VMs', [VMS]),
    Verb('save', changing('saveState', 'is saved'), 'save VMs to disk; start resumes them', [VMS]),
    Verb('discard', changing('discardState', 'is off'), 'discard the saved state of VMs', [VMS]),
    Verb('reset', changing('reset', 'is reset'), 'reset VMs', [VMS]),
    Verb('snap', do_snap, 'list, take, restore and remove snapshots of a VM', [
        argument('action', choices=['ls', 'take', 'restore', 'rm'], metavar='ls|take|restore|rm',
                 help='what is done'), VM,
        argument('name', metavar='SNAPSHOT', nargs='?', default='',
                 help='default of restore: the current one'),
        JSON], ('snap take web1 fresh', 'snap restore web1 fresh')),
    Verb('ping', do_ping, 'check that the agent of a VM answers', [
        VMS, argument('-t', '--timeout', metavar='SEC', type=read_seconds, default=5.0,
                      help='default: 5 s')]),
    Verb('rdp', do_rdp, 'enable the remote desktop of a VM, and print its address', [
        VM, switch('--off', help='disable it'), JSON]),
    Verb('net', do_net, 'show the network of the VMs', [
        switch('--setup', help='create or repair it, as configured in host.ini'), JSON]),
    Verb('cleanup', do_cleanup, 'list unfinished VMs and unused disks that this tool created', [
        switch('--yes', help='remove them'),
        argument('--vms', metavar='NAME', nargs='+', action='append', default=[],
                 help='and these VMs, if they are off'),
        JSON]),
    Verb('keep', do_keep, 'keep VMs from cleanup', [VMS, switch('--off', help='no longer')]),
]
