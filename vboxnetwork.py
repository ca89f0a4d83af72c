"""VirtualBox's network: the host-only network, VMs' cards, one more that is bridged, and with NAT the ways to
ports of a guest: its Chirp port, and those that createVM's `forwards` names.

What it is not: it knows nothing of words or files. One thread, that of virtualbox.py; no locks.
"""

import contextlib
import ipaddress
import re
import socket
import sys
from typing import Any, Callable, Container, Dict, Iterable, List, Optional, Sequence, Set, Tuple

import agent
from faults import BadState, HypervisorError, InvalidParams
from hypervisor import Job, address_outwards, is_local, option
from vboxconnection import (
    MAKING,
    OBJECT_NOT_FOUND,
    OFF,
    Connection,
    has_mark,
    progress_of,
)

CHIRP_RULE = 'vmhost-chirp'        # name of the NAT port forwarding
FORWARD = 'vmhost-forward-'        # + a number, and for some ANY: names of those that createVM was asked for
ANY = '-any'                       # whose host port is any that is free at a start
AUTO = 'auto'                      # in createVM's `bridged`: the interface of the default route
BRIDGED = 'vmhost/bridged-auto'    # a mark: the VM's bridged card follows that
NAT_FOR_NOW = 'vmhost/nat-for-now'     # a mark: there was no host-only network yet when the VM was made
SET_UP = 'vmhost/network/'         # + an interface that was set up as [Network] says: what it was given
UNCLAIMED = ('', '192.168.56.1')       # an interface's address that nobody chose: a new one has it
LARGEST = 8                        # bits of a netmask, at least: 10.0.0.0/8 is the largest that is private
NEW_MASKS = ('', '255.255.255.0')      # the same of its netmask
NEW_POOL = '192.168.56.100', '255.255.255.0', '192.168.56.101', '192.168.56.254'      # and of its DHCP server
FOREIGN = '%s has the %s, not given to it here: name %s in [Network], or give it yours: '


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
        if self._address_interface() | self._setup_dhcp():         # else it may be somebody else's still
            given = [self.box.network['host_ip'], self.box.network['netmask']] + list(
                wished_pool(self.box.network))
            self.box.vbox.setExtraData(SET_UP + self.box.network['interface'], ' '.join(given))
        return self.get_network(job)

    def _problem(self) -> str:
        """What keeps the network from being as [Network] says, '' for nothing."""
        wish = self.box.network
        others = [each.name for each in self.box.array(self.box.vbox.host, 'networkInterfaces')
                  if each.IPAddress == wish['host_ip'] and each.name != wish['interface']]
        taken = '[Network] host_ip %s is the address of %s already' % (wish['host_ip'], ', '.join(others))
        return (address_problem(wish) or range_problem(wish['host_ip']) or (taken if others else '')
                or self._foreign())

    def _foreign(self) -> str:
        """What is wrong where the interface, or its DHCP server, is as somebody else chose, '' elsewhere:
        their VMs may be in that network."""
        found = None if networks_on_mac(self.box) else self._interface()
        if found is None:
            return ''
        wish, given = self.box.network, self.box.vbox.getExtraData(SET_UP + found.name).split(' ')
        if found.IPAddress not in UNCLAIMED + (wish['host_ip'], given[0]):
            return FOREIGN % (found.name, 'address ' + found.IPAddress, 'that one and its network') + (
                'VBoxManage hostonlyif ipconfig "%s" --ip %s' % (found.name, wish['host_ip']))
        if found.networkMask not in NEW_MASKS + (wish['netmask'],) + tuple(given[1:2]):
            return FOREIGN % (found.name, 'netmask ' + found.networkMask, 'that one') + (
                'VBoxManage hostonlyif ipconfig "%s" --ip %s --netmask %s'
                % (found.name, wish['host_ip'], wish['netmask']))
        return self._foreign_dhcp(found.name, given)

    def _foreign_dhcp(self, interface: str, given: List[str]) -> str:
        """The same of its DHCP server. given: what the interface was given here, if anything."""
        wish, dhcp = self.box.network, self._dhcp_server()
        if dhcp is None or not dhcp.enabled:
            return ''
        yours = 'VBoxManage dhcpserver remove --interface "%s"' % interface
        if pool_of(dhcp) not in (NEW_POOL, wished_pool(wish), tuple(given[2:])):
            return FOREIGN % (interface, 'DHCP server %s (netmask %s), which gives %s to %s' % pool_of(dhcp),
                              'these') + yours
        router = self._router_of(dhcp)
        if router not in ('', wish['host_ip'], given[0]):
            return ('%s has a DHCP server that tells guests the gateway %s, not given to it here, and they '
                    'look for their host there: %s' % (interface, router, yours))
        return ''

    def _router_of(self, dhcp: Any) -> str:
        """The gateway that it tells; '' for none."""
        if self.box.api() < (6, 1):
            return ''
        try:
            told = dhcp.globalConfig.getOption(self.box.const('DHCPOption_Routers'))
        except Exception as error:
            if self.box.code(error) != OBJECT_NOT_FOUND:
                raise
            return ''
        return next(part for part in told if isinstance(part, str))       # the encoding is a number

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

    def _address_interface(self) -> bool:
        """Whether there was something to do."""
        wanted = self.box.network['host_ip'], self.box.network['netmask']
        found = self._interface()
        if (found.IPAddress, found.networkMask) == wanted and is_local(wanted[0]):
            return False
        found.enableStaticIPConfig(*wanted)
        return True

    def _setup_dhcp(self) -> bool:
        """Whether there was something to do."""
        wish = self.box.network
        dhcp = self._dhcp_server()
        if dhcp is None:
            dhcp = self.box.vbox.createDHCPServer('HostInterfaceNetworking-' + wish['interface'])
        differs = pool_of(dhcp) != wished_pool(wish)
        if differs:
            dhcp.setConfiguration(*wished_pool(wish))
        self._announce_router(dhcp)
        if dhcp.enabled:
            return differs
        dhcp.enabled = True
        return True

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
    """Network cards: giving a new VM its card; with NAT, ports of the guest on this machine."""

    def __init__(self, box: Connection, network: Network) -> None:
        self.box = box
        self._network = network

    def give(self, machine: Any, network: str, forwards: Sequence[Dict[str, Any]] = ()) -> None:
        """The card over which the agent will speak: none, nat, hostonly, or '' for what [Network] says. An
        appliance keeps those it came with. forwards: as read_forwards gives them, where the card is NAT.

        While [Network] says hostonly, and nobody has set that network up, it is NAT: so the VM starts, and
        its agent reaches the host, which then listens on 127.0.0.1. `settle` makes it host-only.
        """
        cards = list(self.box.cards(machine))
        wanted = network or self.box.network['mode']
        if wanted == 'none':
            for card in cards:
                card.enabled = False
        elif wanted == 'nat':
            self._make_nat(self._card_for(machine, cards, ('NAT',)), machine, forwards)
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

    # One that is part of this machine's own network.

    def bridge(self, machine: Any, wish: str) -> None:
        """Gives the VM one more card, on the interface of createVM's `bridged`; '' for none. Raises
        InvalidParams."""
        if wish:
            card = self._unused_card(machine)
            self._lay_on(card, self.interface_of(wish))
            card.enabled = True
            if wish == AUTO:
                machine.setExtraData(BRIDGED, machine.id)

    def interface_of(self, wish: str) -> str:
        """The name of the one that createVM's `bridged` means, '' for none. Raises InvalidParams."""
        return wish and pick_interface(wish, self._bridgeable())

    def _lay_on(self, card: Any, interface: str) -> None:
        card.attachmentType = self.box.const('NetworkAttachmentType_Bridged')
        card.bridgedInterface = interface

    def _bridgeable(self) -> List[Tuple[str, str]]:
        """(name, IPv4 address) of each interface to which a card can be bridged."""
        kind = self.box.const('HostNetworkInterfaceType_Bridged')
        found = self.box.array(self.box.vbox.host, 'networkInterfaces')
        return [(each.name, each.IPAddress) for each in found if each.interfaceType == kind]

    def _bridged_card(self, machine: Any) -> Any:
        kinds = self.box.attachments('Bridged')
        return next((card for card in self.box.cards(machine) if card.attachmentType in kinds), None)

    def bridge_of(self, machine: Any) -> str:
        """The interface to which a card is bridged, '' for none."""
        card = self._bridged_card(machine)
        return card.bridgedInterface if card else ''

    def move_bridge(self, job: Job, machine: Any) -> None:
        """Before each start: to the interface of the default route, where the card follows that. Raises
        BadState where there is no such interface."""
        now = self.bridge_of(machine)
        if not now:
            return
        wanted = moved_bridge(machine.name, now, has_mark(machine, BRIDGED), self._bridgeable())
        if wanted != now:
            self.box.edit(job, machine, lambda mutable: self._lay_on(self._bridged_card(mutable), wanted))

    def _unused_card(self, machine: Any) -> Any:
        for slot in range(8):
            card = machine.getNetworkAdapter(slot)
            if not card.enabled:
                return card
        raise HypervisorError('%s has no network slot left' % machine.name)

    def _make_nat(self, card: Any, machine: Any, forwards: Sequence[Dict[str, Any]] = ()) -> None:
        card.attachmentType = self.box.const('NetworkAttachmentType_NAT')
        self._reach_localhost(card.NATEngine)
        for rule in new_forwards(forwards, self._taken_ports(card)) if forwards else ():
            self._add_rule(card, rule)
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
        for rule in self._rules(card):
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
        if rule:
            return
        if CHIRP_RULE in [each[0] for each in self._rules(card)]:
            engine.removeRedirect(CHIRP_RULE)
        port = free_port('127.0.0.1', self._taken_ports(card))
        self._add_rule(card, [CHIRP_RULE, '', '127.0.0.1', str(port), '', str(self.box.chirp_port)])

    def _reach_localhost(self, engine: Any) -> None:
        if self.box.api() >= (7, 0):                # before, it could always be reached
            engine.localhostReachable = True

    def _add_rule(self, card: Any, rule: List[str]) -> None:
        """As VirtualBox lists it; for TCP."""
        card.NATEngine.addRedirect(rule[0], self.box.const('NATProtocol_TCP'), rule[2], int(rule[3]), rule[4],
                                   int(rule[5]))

    def _rules(self, card: Any) -> List[List[str]]:
        return [row.split(',') for row in self.box.array(card.NATEngine, 'redirects')]

    def _taken_ports(self, *cards: Any) -> Set[int]:
        """Those that rules of any VM have; and those of these cards, whose settings aren't saved yet."""
        saved = [card for machine in self.box.machines_now() for card in self.box.cards(machine)]
        return {int(rule[3]) for card in list(cards) + saved for rule in self._rules(card)}

    # Other ports of the guest.

    def forwards_of(self, machine: Any) -> List[Dict[str, Any]]:
        """As forwards_in."""
        return forwards_in([rule for card in self.box.cards(machine) for rule in self._rules(card)])

    def move_forwards(self, job: Job, machine: Any) -> None:
        """Before each start, a saved VM's, too: away from ports that other programs have taken; the Chirp
        port's as well. Raises BadState as moved_forwards does."""
        rules = {slot: [rule for rule in self._rules(card) if rule[0].startswith((FORWARD, CHIRP_RULE))]
                 for slot, card in enumerate(map(machine.getNetworkAdapter, range(8))) if card.enabled}
        taken = self._taken_ports() if any(rules.values()) else set()
        moved = {slot: moved_forwards(machine.name, rules[slot], taken) for slot in rules}
        if any(moved.values()):
            self.box.edit(job, machine, lambda mutable: self._replace_rules(mutable, moved))

    def _replace_rules(self, machine: Any, rules: Dict[int, List[List[str]]]) -> None:
        """rules: by slot; `machine` is a session's mutable one."""
        for slot in rules:
            card = machine.getNetworkAdapter(slot)
            for rule in rules[slot]:
                card.NATEngine.removeRedirect(rule[0])
                self._add_rule(card, rule)


# --- ports of a guest --------------------------------------------------------------------------
# A rule is as VirtualBox lists it: [name, protocol, host address ('' for all), host port, guest address,
# guest port].

def read_forwards(forwards: Any) -> List[Dict[str, Any]]:
    """createVM's option `forwards`, checked and whole: [{guestPort, hostPort (0: a free one), isRemote}].
    Raises InvalidParams."""
    if not isinstance(forwards, list) or not all(isinstance(each, dict) for each in forwards):
        raise InvalidParams('forwards: expected a list of {guestPort, hostPort, isRemote}, not %.80r'
                            % (forwards,))
    found = [_read_forward(each) for each in forwards]
    ports = [each['hostPort'] for each in found if each['hostPort']]
    twice = [port for port in ports if ports.count(port) > 1]
    if twice:
        raise InvalidParams('forwards: hostPort %d is there twice' % twice[0])
    return found


def _read_forward(forward: Dict[str, Any]) -> Dict[str, Any]:
    kinds = {'guestPort': agent.integer(1, 65535), 'hostPort': agent.integer(0, 65535),
             'isRemote': agent.yes_no}  # type: Dict[str, Callable[[str], Any]]
    unknown = set(forward) - set(kinds)
    if unknown:
        raise InvalidParams('forwards: expected guestPort, hostPort and isRemote, not %s'
                            % ', '.join(sorted(map(str, unknown))))
    whole = dict({'guestPort': '', 'hostPort': 0, 'isRemote': False}, **forward)
    return {name: option('forwards: ' + name, whole[name], kinds[name]) for name in kinds}


def check_card(forwards: List[Dict[str, Any]], kind: str) -> None:
    """Raises InvalidParams where there are any, and the card is not to be nat."""
    if forwards and kind != 'nat':
        raise InvalidParams('forwards: expected network=nat, as the host forwards ports to a NAT card alone; '
                            'this VM\'s is to be %s' % kind)


def new_forwards(forwards: Sequence[Dict[str, Any]], taken: Iterable[int] = ()) -> List[List[str]]:
    """Their rules. taken: host ports that are not to be chosen."""
    rules = []
    taken = set(taken).union(each['hostPort'] for each in forwards)
    for number, each in enumerate(forwards):
        name, address = '%s%d' % (FORWARD, number), '' if each['isRemote'] else '127.0.0.1'
        port = each['hostPort'] or free_port(address, taken)
        taken.add(port)
        rules.append([name if each['hostPort'] else name + ANY, 'tcp', address, str(port), '',
                      str(each['guestPort'])])
    return rules


def moved_forwards(vm: str, rules: List[List[str]], taken: Iterable[int] = ()) -> List[List[str]]:
    """Those of a VM's rules, of ours alone, that need another host port, since another program listens there
    meanwhile; with that. Raises BadState where the port was asked for."""
    moved = []
    taken = set(taken).union(int(rule[3]) for rule in rules)
    for name, protocol, address, port, guest_address, guest_port in rules:
        if not name.startswith((FORWARD, CHIRP_RULE)) or agent.port_is_free(address, int(port)):
            continue
        if not name.endswith((ANY, CHIRP_RULE)):
            raise BadState('%s can\'t start: another program listens on port %s of this machine, from which '
                           'the VM\'s `forwards` lead to its port %s' % (vm, port, guest_port))
        free = free_port(address, taken)
        taken.add(free)
        moved.append([name, protocol, address, str(free), guest_address, guest_port])
    return moved


def forwards_in(rules: List[List[str]]) -> List[Dict[str, Any]]:
    """[{guestPort, hostPort, isRemote}] of those rules that createVM's option made, in its order."""
    ours = [rule for rule in rules if re.match(FORWARD + '[0-9]+', rule[0])]
    return [{'guestPort': int(rule[5]), 'hostPort': int(rule[3]), 'isRemote': not rule[2]}
            for rule in sorted(ours, key=lambda rule: int(rule[0].split('-')[2]))]


def free_port(address: str, taken: Container[int] = ()) -> int:
    """A TCP port of this machine's address ('' for all) on which nobody listens; none of those taken."""
    while True:
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = int(probe.getsockname()[1])
        if port not in taken:
            return port


# --- a card in this machine's network ----------------------------------------------------------

def check_bridged(wish: str, kind: str) -> None:
    """createVM's option `bridged`: raises InvalidParams where the VM has no other card, as is to be."""
    if not isinstance(wish, str) or not wish.isprintable():
        raise InvalidParams('bridged: %.80r: expected the name of an interface, or auto' % (wish,))
    if wish and kind == 'none':
        raise InvalidParams('bridged: expected network=nat or hostonly, for the card by which a VM reaches '
                            'its host; this VM\'s is to be none')


def pick_interface(wish: str, there: List[Tuple[str, str]]) -> str:
    """The name of the interface that createVM's option `bridged` means. there: (name, IPv4 address) of each
    that can be used. Raises InvalidParams."""
    outwards = address_outwards() if wish == AUTO else ''
    for name, address in there:
        if address == outwards != '' if wish == AUTO else name == wish:
            return name
    raise InvalidParams('bridged: %s; there are: %s' % (
        'the default route has no interface to which a VM\'s card can be bridged' if wish == AUTO
        else 'no interface %s' % wish, ', '.join(name for name, _ in there) or 'none'))


def moved_bridge(vm: str, now: str, follows: bool, there: List[Tuple[str, str]]) -> str:
    """The interface for a VM's bridged card, which has been `now`. follows: whether the card follows the
    default route: where that has no such interface, it stays where it is. Raises BadState where that is
    gone."""
    if follows:
        with contextlib.suppress(InvalidParams):
            return pick_interface(AUTO, there)
    try:
        return pick_interface(now, there)
    except InvalidParams as error:
        raise BadState('%s can\'t start: %s' % (vm, error))


# --- plain helpers -----------------------------------------------------------------------------

def check_interfaces(vm: str, wanted: List[str], there: Callable[[], List[str]]) -> None:
    """Raises BadState where a host-only interface that a VM's card wants is missing, of which VirtualBox says
    VERR_INTERNAL_ERROR. there: gives those that there are."""
    missing = set(wanted).difference(there()) if wanted else set()
    if missing:
        raise BadState('%s can\'t start: there is no host-only interface %s, which its network card uses; '
                       'net --setup makes the one of [Network]' % (vm, min(missing) or '(none is named)'))


def pool_of(dhcp: Any) -> Tuple[str, str, str, str]:
    """A DHCP server's address, netmask, first and last address that it gives."""
    return dhcp.IPAddress, dhcp.networkMask, dhcp.lowerIP, dhcp.upperIP


def wished_pool(network: Dict[str, Any]) -> Tuple[str, str, str, str]:
    """The same, as [Network] has it."""
    return network['dhcp_server'], network['netmask'], network['dhcp_lower'], network['dhcp_upper']


def address_problem(network: Dict[str, Any]) -> str:
    """What is wrong with the addresses of [Network], '' when nothing is."""
    try:
        net = ipaddress.ip_network('%s/%s' % (network['host_ip'], network['netmask']), False)
        if net.prefixlen < LARGEST:
            return '[Network] netmask=%s: this machine would reach nothing else by its other networks' % (
                network['netmask'])
        for key in ('host_ip', 'dhcp_server', 'dhcp_lower', 'dhcp_upper'):
            address = ipaddress.ip_address(network[key])
            if address not in net:
                return '[Network] %s=%s is not in the network %s' % (key, address, net)
            if address in (net.network_address, net.broadcast_address):
                return '[Network] %s=%s is no machine\'s, but that of the network %s, or of all in it' % (
                    key, address, net)
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
