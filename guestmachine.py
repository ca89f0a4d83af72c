"""What the machine of a guest is: its network cards and its boot, its memory and its load.

Reads the system anew at each call, and keeps nothing. No threads, no locks.
"""

import fcntl
import logging
import os
import re
import socket
import struct
import time
from typing import Any, List, Tuple

import agent

log = logging.getLogger('vmguest')

LOOPBACK = '127.0.0.1'
LEASES = ('/var/lib/dhcp', '/var/lib/dhclient', '/var/lib/NetworkManager', '/run/systemd/netif/leases')


class Network:
    """What this machine's network cards are, and where a host may be, read anew at each call.

    From /proc/net/route, /sys/class/net and ioctl on Linux, else by the package netifaces.
    """

    def candidates(self) -> List[str]:
        """Where a broker may be: gateways, DHCP routers, first addresses of private subnets, loopback."""
        found = self.gateways() + self._dhcp_routers() + self._first_addresses() + [LOOPBACK]
        return list(dict.fromkeys(found))

    def gateways(self) -> List[str]:
        """The default gateways."""
        if not self._has_proc():
            gateways = import_netifaces().gateways()
            return [gateway[0] for gateway in gateways.get(socket.AF_INET, [])]
        return [address for interface, target, address, mask in self._routes()
                if target == mask == '0.0.0.0' and address != '0.0.0.0']

    def _has_proc(self) -> bool:
        return os.path.exists('/proc/net/route')

    def _routes(self) -> List[Tuple[str, str, str, str]]:
        """(interface, target, gateway, mask) of each IPv4 route."""
        with open('/proc/net/route') as table:
            rows = [line.split() for line in table.readlines()[1:]]
        return [(row[0],) + tuple(socket.inet_ntoa(struct.pack('=I', int(row[n], 16)))
                                  for n in (1, 2, 7)) for row in rows]  # type: ignore[misc]

    def _dhcp_routers(self) -> List[str]:
        """Routers in the DHCP clients' lease files."""
        found = []
        for folder in LEASES:
            for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
                try:
                    with open(os.path.join(folder, name), errors='replace') as file:
                        text = file.read(65536)
                except OSError as error:
                    log.debug('no lease: %s', error)
                    continue
                found += re.findall(r'(?:option routers |^ROUTER=)([0-9.]+)', text, re.MULTILINE)
        return found[::-1]

    def _first_addresses(self) -> List[str]:
        """The first address of each private subnet that a card is in: often the host's."""
        import ipaddress
        found = []
        for interface in self.interfaces():
            address, mask = self.address_of(interface), self._mask_of(interface)
            if address and mask:
                network = ipaddress.ip_network('%s/%s' % (address, mask), strict=False)
                first = str(network.network_address + 1)
                if network.is_private and network.num_addresses > 2 and first != address:
                    found.append(first)
        return found

    def interfaces(self) -> List[str]:
        """The cards that aren't loopback, those that carry a default route first, then by name."""
        if not self._has_proc():
            return [name for name in import_netifaces().interfaces() if not name.startswith('lo')]
        names = [name for name in sorted(os.listdir('/sys/class/net')) if self.mac_of(name)]
        routed = [row[0] for row in self._routes() if row[1] == '0.0.0.0']
        return sorted(names, key=lambda name: name not in routed)

    def mac_of(self, interface: str) -> str:
        """The MAC of a card, upper case with colons; '' where it has none."""
        try:
            if self._has_proc():
                with open('/sys/class/net/%s/address' % interface) as file:
                    mac = file.read().strip()
            else:
                netifaces = import_netifaces()
                mac = netifaces.ifaddresses(interface)[netifaces.AF_LINK][0]['addr']
        except (OSError, ValueError, KeyError, IndexError):
            return ''
        return mac.upper() if mac.count(':') == 5 and set(mac) != set('0:') else ''

    def address_of(self, interface: str) -> str:
        """The IPv4 address of a card; '' where it has none."""
        return self._ioctl(interface, 0x8915, 'addr')         # SIOCGIFADDR

    def _mask_of(self, interface: str) -> str:
        return self._ioctl(interface, 0x891b, 'netmask')      # SIOCGIFNETMASK

    def _ioctl(self, interface: str, request: int, field: str) -> str:
        if not self._has_proc():
            netifaces = import_netifaces()
            rows = netifaces.ifaddresses(interface).get(netifaces.AF_INET, [{}])
            return rows[0].get(field, '')
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                packed = fcntl.ioctl(probe.fileno(), request,
                                     struct.pack('256s', interface.encode()[:15]))
            except OSError:
                return ''
        return socket.inet_ntoa(packed[20:24])

    def interface_with(self, address: str) -> str:
        """The card that has this address; over loopback the first real one; '' where there is none."""
        interfaces = self.interfaces()
        for interface in interfaces:
            if self.address_of(interface) == address:
                return interface
        return interfaces[0] if interfaces else ''


def import_netifaces() -> Any:
    """The module netifaces. Raises AgentError that names the package."""
    try:
        import netifaces
        return netifaces
    except ImportError:
        raise agent.AgentError('this system has no /proc/net/route: install the package netifaces-plus '
                               '(python -m pip install netifaces-plus)')


def read_boot_id() -> str:
    """What changes with each boot of this machine."""
    try:
        with open('/proc/sys/kernel/random/boot_id') as file:
            return file.read().strip()
    except OSError:
        return 'booted-%d' % round((time.time() - time.monotonic()) / 60)


def memory(field: str) -> int:
    """Bytes, by a field of /proc/meminfo; 0 where there is none."""
    try:
        with open('/proc/meminfo') as file:
            for line in file:
                if line.startswith(field + ':'):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError) as error:
        log.debug('no %s: %s', field, error)
    return 0


def uptime() -> float:
    """Seconds since this machine booted; 0 where that can't be known."""
    try:
        with open('/proc/uptime') as file:
            return float(file.read().split()[0])
    except (OSError, ValueError) as error:
        log.debug('no uptime: %s', error)
        return 0.0


def identify(vm: Any, network: Network, address: str) -> Tuple[str, str]:
    """Id and network card of a machine that has that local address towards the broker.

    ``vm``: the settings [VM]. The id is the MAC of the card; the machine's name where it has none.
    """
    card = network.interface_with(address) if vm.network_interface == 'auto' else vm.network_interface
    if vm.id != 'auto':
        return read_id(vm.id), card
    by_name = re.sub('[^A-Za-z0-9._-]', '-', socket.gethostname()).strip('-._')[:64] or 'guest'
    return (network.mac_of(card) if card else '') or by_name, card


def read_id(text: str) -> str:
    """An id as the host knows it: MACs in upper case."""
    return text.upper() if re.fullmatch('(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}', text) else text
