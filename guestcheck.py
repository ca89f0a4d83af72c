"""What `vmguest.py --check` looks at: every precondition of a guest agent, and what one would use.

What it is not: loaded by an agent that runs (guestagent.py). No threads but a link's (protocol.py), no locks.
"""

import sys
from typing import Any, Iterator

import agent
import checks
from checks import Finding
from guestcgroup import find_place
from guestidentity import find_broker_port, identify
from guestmachine import Network
from guestprocesses import has_proc
from gueststart import become_subreaper, make_starter

LEAST_DISK = 50 * 1000 * 1000      # bytes that should be free for the output of commands


def check(settings: Any) -> int:
    """Looks at every precondition, and prints what the agent would use; 0 when it would work."""
    findings = list(check_machine(settings.VM)) + list(check_commands(settings.Chirp))
    try:
        findings += check_broker(settings)
    except agent.AgentError as error:
        findings.append(Finding(False, 'network', str(error)))
    encoding = sys.stdout.encoding or 'ascii'
    for line in checks.describe_findings(findings, encoding):
        print(line.encode(encoding, 'backslashreplace').decode(encoding))
    return 0 if all(found.ok or not found.needed for found in findings) else 1


def check_machine(vm: Any) -> Iterator[Finding]:
    """What any agent needs. ``vm``: [VM]."""
    yield checks.check_python()
    yield checks.check_package('stomper')
    yield checks.check_folder(vm.dir_to_serve, '[VM] dir_to_serve')
    yield checks.check_folder(vm.state_dir, '[VM] state_dir')
    yield checks.check_disk(vm.state_dir, LEAST_DISK)
    yield checks.check_clock()


def check_commands(chirp: Any) -> Iterator[Finding]:
    """How exactly commands are accounted for and ended, and whether their files are served. ``chirp``:
    [Chirp]."""
    yield Finding(
        make_starter() >= 0, 'peak memory of commands is told exactly', 'it is only known to be no more than '
        'what is told: exact on Linux on x86-64', needed=False)
    yield Finding(
        has_proc() and become_subreaper(),
        'processes of a command are followed into sessions of their own (subreaper)',
        'those that make a session of their own escape timeout and KILL: this needs Linux, and a /proc of '
        'this PID namespace (unshare --mount-proc)', needed=False)
    place = find_place()
    place.controllers = place.settled_controllers()
    yield Finding(
        bool(place.folder), 'each command has a control group of its own, %s' % place.describe()
        if place.folder else 'control groups', 'commands have none of their own, so their memory together '
        'can\'t be limited: %s' % place.describe(), needed=False)
    if chirp.server == 'chirp_server':
        import shutil  # brings compressors along
        yield Finding(
            shutil.which('chirp_server') is not None, 'program chirp_server', 'it is not in PATH: install '
            'cctools, or take [Chirp] server=embedded; commands work without it', needed=False)


def check_broker(settings: Any) -> Iterator[Finding]:
    """Where the broker is, and who this guest is there. Raises AgentError."""
    network, broker = Network(), settings.Broker
    broker.port = find_broker_port(broker)
    hosts = network.candidates(broker.port) if broker.host == 'auto' else [broker.host]
    if not hosts:
        yield Finding(False, 'broker', network.why_nowhere(broker.port))
        return
    found, address = checks.check_broker(hosts, broker)
    yield found
    if found.ok:
        yield from check_identity(settings.VM, network, address)


def check_identity(vm: Any, network: Network, address: str) -> Iterator[Finding]:
    """Network card and id, as the agent would find them for that local address. Raises AgentError."""
    machine_id, card = identify(vm, network, address)
    there = vm.network_interface in ('auto',) + tuple(network.interfaces())
    yield Finding(there, 'interface %s (%s)' % (card or 'none', address),
                  'this machine has no such card, but %s: correct [VM] network_interface'
                  % (', '.join(network.interfaces()) or 'none'))
    yield Finding(True, 'id %s' % machine_id)
