"""VirtualBox's network: the host-only network, VMs' cards, and in NAT mode the way to a guest's Chirp port.

What it is not: it knows nothing of words or files. One thread, that of virtualbox.py; no locks.
"""

import ipaddress
import socket
import sys
from typing import Any, Callable, Dict, List, Optional, Tuple

from faults import BadState, HypervisorError
from hypervisor import Job, is_local, port_is_free
from vboxconnection import (
    MAKING,
    OFF,
    Connection,
    has_mark,
    progress_of,
)

CHIRP_RULE = 'vmhost-chirp'        # name of the NAT port forwarding
NAT_FOR_NOW = 'vmhost/nat-for-now'     # a mark: there was no host-only network yet when the VM was made


class Network:
    """The host-only network: its interface, address and DHCP server."""

    def __init__(self, box: Connection) -> None:
        self.box = box

    def get_network(self, job: Job) -> Dict[str, Any]:
        if networks_on_mac(self.box):
            return self._network_on_mac()
        found = self._interface()
        dhcp = self._dhcp_server()
        return {'mode': self.box.network['mode'], 'interface': self.box.network['interface'],
                'hostIp': found.IPAddress if found else '',
                'netmask': found.networkMask if found else '',
                'dhcp': self._dhcp_facts(dhcp)}

    def is_there(self) -> bool:
        """Whether there is a host-only network as [Network] names it."""
        return (self._mac_network() if networks_on_mac(self.box) else self._interface()) is not None

    def _dhcp_facts(self, dhcp: Any) -> Dict[str, Any]:
        if dhcp is None:
            return {'server': '', 'lower': '', 'upper': '', 'enabled': False}
        return {'server': dhcp.IPAddress, 'lower': dhcp.lowerIP, 'upper': dhcp.upperIP,
                'enabled': bool(dhcp.enabled)}

    def _interface(self) -> Any:
        kind = self.box.const('HostNetworkInterfaceType_HostOnly')
        for each in self.box.array(self.box.vbox.host, 'networkInterfaces'):
            if each.interfaceType == kind and each.name == self.box.network['interface']:
                return each
        return None

    def _dhcp_server(self) -> Any:
        name = 'HostInterfaceNetworking-' + self.box.network['interface']
        for dhcp in self.box.array(self.box.vbox, 'DHCPServers'):
            if dhcp.networkName == name:
                return dhcp
        return None

    def setup_network(self, job: Job) -> Any:
        """Changes only what differs, so that it can be called again at any time."""
        if self.box.network['mode'] == 'nat':
            return self.get_network(job)            # nothing to make: each VM has its own
        problem = self._problem()
        if problem:
            raise HypervisorError(problem)
        if networks_on_mac(self.box):
            self._setup_on_mac()
            return self.get_network(job)
        if self._interface() is None:
            self._make_interface(job)
        self._address_interface()
        self._setup_dhcp()
        return self.get_network(job)

    def _problem(self) -> str:
        """What keeps the network from being as [Network] says, '' for nothing."""
        wish = self.box.network
        others = [each.name for each in self.box.array(self.box.vbox.host, 'networkInterfaces')
                  if each.IPAddress == wish['host_ip'] and each.name != wish['interface']]
        taken = '[Network] host_ip %s is the address of %s already' % (wish['host_ip'], ', '.join(others))
        return address_problem(wish) or range_problem(wish['host_ip']) or (taken if others else '')

    def _make_interface(self, job: Job) -> Any:
        answer = self.box.vbox.host.createHostOnlyNetworkInterface()
        self.box.finish(job, progress_of(answer), 'making the interface')
        made = next(part for part in answer if not hasattr(part, 'completed'))
        if made.name == self.box.network['interface']:
            return
        name = made.name
        self.box.finish(job, self.box.vbox.host.removeHostOnlyNetworkInterface(made.id), '')
        raise HypervisorError('VirtualBox would call the new interface %s: write interface=%s in '
                              '[Network]' % (name, name))

    def _address_interface(self) -> None:
        wanted = self.box.network['host_ip'], self.box.network['netmask']
        found = self._interface()
        if (found.IPAddress, found.networkMask) != wanted or not is_local(wanted[0]):
            found.enableStaticIPConfig(*wanted)

    def _setup_dhcp(self) -> None:
        wish = self.box.network
        dhcp = self._dhcp_server()
        if dhcp is None:
            dhcp = self.box.vbox.createDHCPServer('HostInterfaceNetworking-' + wish['interface'])
        wanted = (wish['dhcp_server'], wish['netmask'], wish['dhcp_lower'], wish['dhcp_upper'])
        if (dhcp.IPAddress, dhcp.networkMask, dhcp.lowerIP, dhcp.upperIP) != wanted:
            dhcp.setConfiguration(*wanted)
        self._announce_router(dhcp)
        if not dhcp.enabled:
            dhcp.enabled = True

    def _announce_router(self, dhcp: Any) -> None:
        """The guest looks for the broker at its gateway, which is this host."""
        router = self.box.network['host_ip']
        if self.box.api() >= (6, 1):
            dhcp.globalConfig.setOption(self.box.const('DHCPOption_Routers'),
                                        self.box.const('DHCPOptionEncoding_Normal'), router)
        else:
            dhcp.addGlobalOption(self.box.const('DhcpOpt_Router'), router)

    def _mac_network(self) -> Any:
        for each in self.box.array(self.box.vbox, 'hostOnlyNetworks'):
            if each.networkName == self.box.network['interface']:
                return each
        return None

    def _network_on_mac(self) -> Dict[str, Any]:
        found = self._mac_network()
        return {'mode': self.box.network['mode'], 'interface': self.box.network['interface'],
                'hostIp': self.box.network['host_ip'] if found else '',
                'netmask': found.networkMask if found else '',
                'dhcp': {'server': '', 'lower': found.lowerIP if found else '',
                         'upper': found.upperIP if found else '',
                         'enabled': bool(found and found.enabled)}}

    def _setup_on_mac(self) -> None:
        network = self._mac_network()
        if network is None:
            network = self.box.vbox.createHostOnlyNetwork(self.box.network['interface'])
        network.networkMask = self.box.network['netmask']
        network.lowerIP, network.upperIP = self.box.network['host_ip'], self.box.network['dhcp_upper']
        network.enabled = True

    def check_lines(self, job: Job) -> List[Tuple[bool, str, str, bool]]:
        """As Driver.check's; none where there is no such network."""
        if self.box.network['mode'] != 'hostonly':
            return []
        name = self.box.network['interface']
        problem = self._problem()
        lines = [(not problem, 'addresses of the host-only network', problem, True)]
        now = self.get_network(job)
        there = now['hostIp'] == self.box.network['host_ip'] and is_local(now['hostIp'])
        mend = ('`net --setup` makes it (in the API setupNetwork), or manage=yes in [Network]; VMs that are '
                'made before get NAT')
        lines.append((there, 'interface %s with address %s' % (name, self.box.network['host_ip']),
                      '' if there else mend, True))
        lines.append((now['dhcp']['enabled'], 'DHCP server of ' + name,
                      '' if now['dhcp']['enabled'] else mend, True))
        return lines


class Cards:
    """Network cards: giving a new VM its card; in NAT mode, the guest's Chirp port on our loopback."""

    def __init__(self, box: Connection, network: Network) -> None:
        self.box = box
        self._network = network

    def give(self, machine: Any, network: str) -> None:
        """The card over which the agent will speak: none, nat, hostonly, or '' for what [Network] says. An
        appliance keeps those it came with.

        While [Network] says hostonly, and nobody has set that network up, it is NAT: so the VM starts, and
        its agent reaches the host, which then listens on 127.0.0.1. `settle` makes it host-only.
        """
        cards = list(self.box.cards(machine))
        wanted = network or self.box.network['mode']
        if wanted == 'none':
            for card in cards:
                card.enabled = False
        elif wanted == 'nat':
            self._make_nat(self._card_for(machine, cards, ('NAT',)), machine)
        elif network or self._network.is_there():
            self._make_host_only(self._card_for(machine, cards, ('HostOnly', 'HostOnlyNetwork')))
        else:
            machine.setExtraData(NAT_FOR_NOW, machine.id)
            self._make_nat(self._card_for(machine, cards, ('NAT', 'HostOnly', 'HostOnlyNetwork')), machine)

    def settle(self, machine: Any) -> None:
        """Before a cold start: the card and its rule as they are to be. `machine` is a session's mutable
        one."""
        if has_mark(machine, NAT_FOR_NOW) and self.box.network['mode'] == 'hostonly' \
                and self._network.is_there():
            card = self.box.card_of(machine)
            if self._chirp_rule(card):
                card.NATEngine.removeRedirect(CHIRP_RULE)
            self._make_host_only(card)
            machine.setExtraData(NAT_FOR_NOW, '')
        elif self._forwards(machine):
            self.add_chirp_rule(machine)

    def _forwards(self, machine: Any) -> bool:
        return bool(self.box.network['mode'] == 'nat' or has_mark(machine, NAT_FOR_NOW))

    def check_interfaces(self, machine: Any) -> None:
        kinds = self.box.attachments('HostOnly')
        wanted = [card.hostOnlyInterface for card in self.box.cards(machine) if card.attachmentType in kinds]
        check_interfaces(machine.name, wanted, lambda: [
            each.name for each in self.box.array(self.box.vbox.host, 'networkInterfaces')])

    def _card_for(self, machine: Any, cards: List[Any], kinds: Tuple[str, ...]) -> Any:
        fitting = [card for card in cards if card.attachmentType in self.box.attachments(*kinds)]
        fresh = has_mark(machine, MAKING)        # its only card is what applyDefaults gave it
        card = (fitting or (cards if fresh else []) or [self._unused_card(machine)])[0]
        card.enabled = True
        return card

    def _unused_card(self, machine: Any) -> Any:
        for slot in range(8):
            card = machine.getNetworkAdapter(slot)
            if not card.enabled:
                return card
        raise HypervisorError('%s has no network slot left' % machine.name)

    def _make_nat(self, card: Any, machine: Any) -> None:
        card.attachmentType = self.box.const('NetworkAttachmentType_NAT')
        self._reach_localhost(card.NATEngine)
        if self._forwards(machine):
            self.add_chirp_rule(machine)

    def _make_host_only(self, card: Any) -> None:
        if networks_on_mac(self.box):
            card.attachmentType = self.box.const('NetworkAttachmentType_HostOnlyNetwork')
            card.hostOnlyNetwork = self.box.network['interface']
            return
        card.attachmentType = self.box.const('NetworkAttachmentType_HostOnly')
        card.hostOnlyInterface = self.box.network['interface']

    # The guest's Chirp port.

    def find_chirp(self, job: Job, vm: str) -> Optional[List[Any]]:
        rule = self._chirp_rule(self.box.card_of(self.box.find(vm)))
        return [rule[2], int(rule[3])] if rule else None

    def forward_chirp(self, job: Job, vm: str) -> List[Any]:
        machine = self.box.find(vm)
        self.box.settled(job, machine)
        self.box.edit(job, machine, self.add_chirp_rule)
        found = self.find_chirp(job, vm)
        if not found:
            raise HypervisorError('%s has no NAT card: its Chirp port can not be reached'
                                  % machine.name)
        return found

    def _chirp_rule(self, card: Any) -> Optional[List[str]]:
        """name, protocol, host address, host port, guest address, guest port."""
        if card is None or card.attachmentType != self.box.const('NetworkAttachmentType_NAT'):
            return None
        for row in self.box.array(card.NATEngine, 'redirects'):
            rule = row.split(',')
            if rule[0] == CHIRP_RULE and rule[5] == str(self.box.chirp_port):
                return rule
        return None

    def add_chirp_rule(self, machine: Any) -> None:
        """Gives the VM what NAT mode needs; `machine` is a session's mutable one."""
        card = self.box.card_of(machine)
        if card is None or card.attachmentType != self.box.const('NetworkAttachmentType_NAT'):
            return
        engine = card.NATEngine
        rule = self._chirp_rule(card)
        if self.box.state_of(machine) in OFF:
            self._reach_localhost(engine)
            if rule and not port_is_free(rule[2], int(rule[3])):
                rule = None                         # meanwhile, another program listens there
        if rule:
            return
        names = [row.split(',')[0] for row in self.box.array(engine, 'redirects')]
        if CHIRP_RULE in names:
            engine.removeRedirect(CHIRP_RULE)
        engine.addRedirect(CHIRP_RULE, self.box.const('NATProtocol_TCP'), '127.0.0.1',
                           self._free_forward_port(), '', self.box.chirp_port)

    def _reach_localhost(self, engine: Any) -> None:
        if self.box.api() >= (7, 0):                # before, it could always be reached
            engine.localhostReachable = True

    def _free_forward_port(self) -> int:
        taken = {int(row.split(',')[3]) for machine in self.box.machines_now()
                 for card in self.box.cards(machine)
                 for row in self.box.array(card.NATEngine, 'redirects')}
        while True:
            with socket.socket() as probe:
                probe.bind(('127.0.0.1', 0))
                port = probe.getsockname()[1]
            if port not in taken:
                return port


def check_interfaces(vm: str, wanted: List[str], there: Callable[[], List[str]]) -> None:
    """Raises BadState where a host-only interface that a VM's card wants is missing, of which VirtualBox says
    VERR_INTERNAL_ERROR. there: gives those that there are."""
    missing = set(wanted).difference(there()) if wanted else set()
    if missing:
        raise BadState('%s can\'t start: there is no host-only interface %s, which its network card uses; '
                       'net --setup makes the one of [Network]' % (vm, min(missing) or '(none is named)'))


def address_problem(network: Dict[str, Any]) -> str:
    """What is wrong with the addresses of [Network], '' when nothing is."""
    try:
        net = ipaddress.ip_network('%s/%s' % (network['host_ip'], network['netmask']), False)
        for key in ('dhcp_server', 'dhcp_lower', 'dhcp_upper'):
            if ipaddress.ip_address(network[key]) not in net:
                return '[Network] %s=%s is not in the network %s' % (key, network[key], net)
        lower, upper, host = (int(ipaddress.ip_address(network[key]))
                              for key in ('dhcp_lower', 'dhcp_upper', 'host_ip'))
    except ValueError as error:
        return '[Network]: %s' % error
    if lower > upper:
        return '[Network] dhcp_lower is above dhcp_upper'
    server = int(ipaddress.ip_address(network['dhcp_server']))
    if server == host or lower <= server <= upper:
        return '[Network] dhcp_server is %s' % (
            'host_ip itself' if server == host else 'among the addresses that it gives away')
    if lower <= host <= upper:
        return '[Network] host_ip is among the addresses that DHCP gives away'
    return ''


def range_problem(host_ip: str, path: str = '/etc/vbox/networks.conf') -> str:
    """On Linux, macOS and Solaris, VirtualBox allows host-only addresses in some ranges alone."""
    if sys.platform == 'win32':
        return ''
    ranges = allowed_ranges(path)
    if any(ipaddress.ip_address(host_ip) in each for each in ranges):
        return ''
    return ('VirtualBox does not allow the address %s for a host-only network, but %s: take one of '
            'these, or add a line `* RANGE/BITS` to %s'
            % (host_ip, ', '.join(str(each) for each in ranges) or 'none', path))


def allowed_ranges(path: str) -> List[Any]:
    try:
        with open(path) as conf:
            lines = [line.split() for line in conf]
    except OSError:
        return [ipaddress.ip_network('192.168.56.0/21')]
    words = [word for line in lines if line[:1] == ['*'] for word in line[1:]]
    return [ipaddress.ip_network(word, False) for word in words if ':' not in word]


def networks_on_mac(box: Connection) -> bool:
    """macOS has host-only networks in place of interfaces, from VirtualBox 7 on."""
    return sys.platform == 'darwin' and box.api() >= (7, 0)
