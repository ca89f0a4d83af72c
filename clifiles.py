"""The verbs for files and folders: to VMs, and from them.

No threads, no locks.
"""

import os
import posixpath
import time
from typing import Any, Dict, Tuple

import agent
from cliscreen import PROGRESS_EVERY, Screen, shown_size, shown_span
from cliverbs import VM, VMS, Verb, argument
from faults import InvalidParams
from hostclient import Client
from rpc import carried


def do_put(host: Client, screen: Screen, args: Any) -> int:
    """Sends a file or folder to VMs."""
    source = os.path.abspath(args.source)      # the host's working directory is not ours
    target = args.target or os.path.basename(source)
    return max([transfer(host, screen, 'put', vm, source, target) for vm in host.matching(args.vm)])


def do_get(host: Client, screen: Screen, args: Any) -> int:
    """Fetches a file or folder from a VM."""
    name = posixpath.basename(args.source.rstrip('/'))
    target = os.path.abspath(args.target or name)
    if os.path.isdir(target) and args.target and name not in ('', '.', '..'):
        target = os.path.join(target, name)
    return transfer(host, screen, 'get', args.vm, args.source, target)


def transfer(host: Client, screen: Screen, direction: str, vm: str, source: str, target: str) -> int:
    """Moves a file or folder, verified; a terminal shows how far it is. Ctrl-C cancels it."""
    moving = host.call('startTransfer', direction, vm, carried(source), carried(target))
    try:
        while True:
            now = host.call('getTransfer', moving)
            if now['state'] not in ('waiting', 'running'):
                break
            screen.progress('%s: %s' % (agent.printable(vm), transfer_line(now)))
            time.sleep(PROGRESS_EVERY)
    except KeyboardInterrupt:
        host.call('cancelTransfer', moving)
        raise
    finally:
        screen.progress('')
    if now['state'] != 'done':
        screen.complain('%s: %s' % (vm, now['error'] or now['state']))
        return 1
    return 0


def transfer_line(now: Dict[str, Any]) -> str:
    """Bytes, rate and time left of a transfer."""
    line = '%s of %s, %s/s' % (shown_size(now['bytes']), shown_size(now['total']), shown_size(now['rate']))
    if now['rate'] and now['total']:
        line += ', %s left' % shown_span((now['total'] - now['bytes']) / now['rate'])
    return line


def do_cp(host: Client, screen: Screen, args: Any) -> int:
    """Copies from this machine to VMs, or from a VM to this machine."""
    from_vm, source = split_place(args.source)
    to_vm, target = split_place(args.target)
    if bool(from_vm) == bool(to_vm):
        raise InvalidParams('one of SRC and DST is VM:PATH, and the other one is on this machine')
    args.vm, args.source, args.target = from_vm or to_vm, source, target
    return do_get(host, screen, args) if from_vm else do_put(host, screen, args)


def split_place(place: str) -> Tuple[str, str]:
    """(VM, path) of VM:PATH; ('', path) of a path on this machine: one with a slash before the colon, too."""
    vm, colon, path = place.partition(':')
    is_drive = os.name == 'nt' and len(vm) == 1
    return (vm, path) if colon and vm and '/' not in vm and not is_drive else ('', place)


VERBS = [
    Verb('put', do_put, 'copy a file or folder to a VM', [
        VMS, argument('source', metavar='SRC', help='on this machine'),
        argument('target', metavar='DST', nargs='?', default='', help='in the VM; default: the same name')], (
            'put web1 data/ input',)),
    Verb('cp', do_cp, 'copy a file or folder, to or from a VM', [
        argument('source', metavar='SRC', help='a path on this machine, or VM:PATH'),
        argument('target', metavar='DST', help='the other one of them')], (
            'cp data/ web1:input', 'cp web1:result.tar .')),
    Verb('get', do_get, 'copy a file or folder from a VM', [
        VM, argument('source', metavar='SRC', help='in the VM'),
        argument('target', metavar='DST', nargs='?', default='',
                 help='on this machine; default: the same name')], ('get web1 result.tar .',)),
]
