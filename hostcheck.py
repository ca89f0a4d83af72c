"""What `check` looks at: every precondition of a host agent, and of the guests that it has.

What it is not: a part of the running host; it asks that one by XML-RPC, as the command line does. No threads.
"""

import logging
import os
import socket
import sys
import time
from typing import Any, Dict, Iterator, List

import agent
import checks
import drivers
import hosthypervisor
import hypervisor
from climachines import OUT_OF_REACH, is_out_of_reach
from cliscreen import Screen, shown_span
from cliverbs import life
from faults import DeadlineExceeded, VMHostError
from hostclient import Client, NoHost
from hostlink import server_tls
from hostmachines import driver_settings
from hostserver import why_open_to_all
from hosttrust import is_loopback

LEAST_DISK = 100 * 1024 * 1024     # bytes that the state folder's disk should have free
AWAITED = ('Running', 'Null')      # states in which a machine's agent should be there; Null: no hypervisor's
CLOCK_TOLERANCE = 60.0             # seconds that a guest's clock may be off, and nobody cares


def do_check(host: Client, screen: Screen, args: Any) -> int:
    """Looks at every precondition; the exit code is 0 when the host agent works, or would."""
    logging.getLogger('vmhost').addHandler(logging.NullHandler())     # what is found is told, and no more
    settings = args.settings
    findings = [checks.check_python(), checks.check_package('stomper'),
                checks.check_folder(settings.Host.state_dir, '[Host] state_dir'),
                checks.check_disk(settings.Host.state_dir, LEAST_DISK), checks.check_clock()]
    try:
        findings += check_running(host, host.call('agentInfo'), settings.Network)
    except NoHost as error:
        findings += [checks.Finding(False, 'host agent', str(error))] if error.hangs else (
            check_start(settings, error))
    except VMHostError as error:
        findings.append(checks.Finding(False, 'host agent', str(error)))
    findings += check_program() + check_hypervisor(settings)
    if settings.Host.unsigned_guests:
        findings.append(checks.Finding(
            False, '[Host] unsigned_guests=yes', 'whoever reaches the broker can be any guest that has no '
            'secret: set it to no once all agents sign', needed=False))
    if args.json:
        screen.json([finding._asdict() for finding in findings])
    else:
        for line in checks.describe_findings(findings, screen.out.encoding):
            screen.say(agent.printable(line))
    return 0 if all(finding.ok or not finding.needed for finding in findings) else 1


def check_program() -> List[checks.Finding]:
    """Whether others could change the program itself; on POSIX its folder's mode says so to who looks."""
    if os.name != 'nt':
        return []
    import windows  # there alone
    folder = os.path.dirname(os.path.abspath(sys.argv[0]))
    try:
        others = windows.who_may_change(
            windows.access_of(folder) if windows.has_access_lists(folder) else windows.NO_LIST)
    except OSError as error:
        return [checks.Finding(False, 'folder %s' % folder, agent.sentence(error), needed=False)]
    return [checks.Finding(
        not others, 'only you may change the program in %s' % folder,
        'so may %s, and with it what runs as you: move it to a folder of your own, below %%LOCALAPPDATA%%'
        % ', '.join(others), needed=False)]


def check_running(host: Client, info: Dict[str, Any], network: Any) -> Iterator[checks.Finding]:
    """What the running host agent tells about itself, its broker and its guests."""
    yield checks.Finding(info['version'] == agent.VERSION, 'host agent %s at %s' % (
        info['version'], host.address), 'restart it: the files here are of version ' + agent.VERSION)
    broker = info['broker']
    yield checks.Finding(bool(broker['connected']), 'broker at %s' % broker['address'],
                        'no connection: is it running, and are [Broker] host, port, username, password '
                        'and tls right?')
    if info['hypervisor'] != 'none' and is_out_of_reach(broker['address'], network.mode):
        unmade = '' if hypervisor.is_local(network.host_ip) else (
            'VMs made now get NAT; net --setup makes the host-only one; then: ')
        yield checks.Finding(False, 'network', unmade + OUT_OF_REACH % broker['address'], needed=False)
    vms = host.call('getVMs')
    guests = [vm for vm in vms if vm['agent'] in ('alive', 'late')]
    if not guests:
        yield checks.Finding(False, 'guests', 'none has joined: start vmguest.py in a VM, where it '
                            'reaches %s' % broker['address'], needed=False)
    for guest in guests:
        yield check_guest(guest)
    for vm in vms:
        if vm['agent'] == 'lost' and vm['state'] in AWAITED:
            yield check_absent(vm)
    for refused in info.get('refused', ()):
        yield checks.Finding(False, 'guest %s is not let in' % refused['id'], refused['why'], needed=False)


def check_absent(guest: Dict[str, Any]) -> checks.Finding:
    """What is to be done about one that was there."""
    silence = shown_span(max(0, time.time() - guest['lastSeen']))
    question = 'Is its agent to be started' if life(guest) == 'left' else \
        'Is it switched off, its agent stopped, its network down'
    mend = '%s: nothing was heard for %s. %s? `forget %s`, where it is gone for good' % (
        life(guest), silence, question, guest['name'])
    return checks.Finding(False, 'guest %s' % guest['name'], mend, needed=False)


def check_guest(guest: Dict[str, Any]) -> checks.Finding:
    """Whether a guest is there, of this version, and knows the time."""
    what = 'guest %s, %s' % (guest['name'], guest['facts'].get('version', 'of an unknown version'))
    if guest['agent'] != 'alive':
        return checks.Finding(False, what, 'nothing was heard for %s: is the VM paused, or its network '
                             'down?' % shown_span(max(0, time.time() - guest['lastSeen'])), needed=False)
    if abs(guest['clockOffset']) > CLOCK_TOLERANCE:
        return checks.Finding(False, what, 'its clock is %s %s: set it (ntpdate, chronyd, or VirtualBox\'s '
                             'Guest Additions); commands work, the times of their files are wrong'
                             % (shown_span(abs(guest['clockOffset'])),
                                   'ahead' if guest['clockOffset'] > 0 else 'behind'), needed=False)
    return checks.Finding(guest['facts'].get('version') == agent.VERSION, what,
                         'this host is %s: put the same version into the VM' % agent.VERSION,
                         needed=False)


def check_start(settings: Any, why: NoHost) -> Iterator[checks.Finding]:
    """Whether the host agent could start: nobody in its place, and its ports free."""
    broker = settings.Broker
    yield checks.Finding(False, 'host agent', str(why), needed=False)
    yield from check_log(settings.Logging)
    listens = '[Host] xmlrpc_listen_on = %s' % settings.Host.xmlrpc_listen_on
    if why_open_to_all(settings.Host):
        yield checks.Finding(False, listens, why_open_to_all(settings.Host))
    elif not is_loopback(settings.Host.xmlrpc_listen_on):
        yield checks.Finding(False, listens, 'who reaches it, and reads the token on its way, commands every '
                            'VM: keep it on 127.0.0.1, and come by ssh', needed=False)
    yield check_port('XML-RPC', settings.Host.xmlrpc_listen_on, settings.Host.xmlrpc_port,
                     '[Host] xmlrpc_listen_on, xmlrpc_port')
    host = '127.0.0.1' if broker.host == 'auto' else broker.host
    if broker.embedded:
        yield check_port('broker', host, broker.port, '[Broker] host, port')
        try:
            server_tls(broker)
        except VMHostError as error:
            yield checks.Finding(False, 'certificate', str(error))
    else:
        yield checks.check_broker([host], broker)[0]


def check_log(settings: Any) -> Iterator[checks.Finding]:
    """Whether the section [Logging] names what can be used, without a trace of it."""
    for key, path, mode in (('config', settings.config, 'rb'), ('file', settings.file, 'ab')):
        if not path or key == 'file' and settings.config:
            continue
        try:
            if os.path.exists(path) or mode == 'rb':
                with open(path, mode):
                    pass
            else:
                with agent.momentary_file(os.path.dirname(path)):
                    pass
        except OSError as error:
            yield checks.Finding(False, '[Logging] %s = %s' % (key, path), agent.sentence(error))


def check_port(what: str, host: str, port: int, keys: str) -> checks.Finding:
    """Whether this machine lets us listen there."""
    problem = listen_problem(host, port)
    named = 'port %d' % port if port else 'a port'
    return checks.Finding(not problem, '%s of %s for %s' % (named, host, what), '%s (%s)' % (problem, keys))


def listen_problem(host: str, port: int) -> str:
    """Why nobody can listen there, as a sentence; '' where it's possible."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            if os.name == 'posix':
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
        return ''
    except OSError as error:
        return agent.why_not_listening(error)


def check_hypervisor(settings: Any) -> List[checks.Finding]:
    """The drivers that are wanted, up to the first one that works; with `auto` the rest works without one."""
    wanted = settings.Hypervisor.hypervisor
    if wanted == 'none':
        return [checks.Finding(True, 'no hypervisor wanted')]
    lacking = []  # type: List[checks.Finding]       # why not those before it
    for name in drivers.names_of(wanted):
        driver = hosthypervisor.Hypervisor(name, driver_settings(settings, ''))     # no file of a host's
        driver.open()
        lines, hangs = [], False  # type: List[Any], bool
        try:
            lines = driver.check()
            lines += [(False, row['name'], clash, True) for row in driver.list_rows()
                      for clash in [driver.clash_of(row['name'])] if clash]
            works = True
        except VMHostError as error:
            lines, works = lines or [(False, name, str(error), True)], False
            hangs = isinstance(error, DeadlineExceeded)
        finally:
            driver.close(2 if hangs else 10)
        findings = [checks.Finding(ok, what, mend, needed and wanted != 'auto')
                    for ok, what, mend, needed in lines]
        if works:
            return [finding._replace(needed=False) for finding in lacking] + findings
        lacking += findings
        if hangs:                                   # so does the next one, which asks the same VirtualBox
            break
    return lacking
