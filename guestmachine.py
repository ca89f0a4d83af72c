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
from typing import Any, Iterator, List, Tuple

import agent

log = logging.getLogger('vmguest')

LOOPBACK = '127.0.0.1'
LEASES = ('/var/lib/dhcp', '/var/lib/dhclient', '/var/lib/NetworkManager', '/run/systemd/netif/leases')


class Network:
    """What this machine's network cards are, and where a host may be, read anew at each call.

    From /proc/net/route and ioctl on Linux, else by the package netifaces. Not from /sys: a container may
    have none, or one that shows another network's cards.
    """

    def candidates(self, port: int) -> List[str]:
        """Where a host's broker may be, which has that port.

        Of a virtual machine: gateways, DHCP routers, first addresses of private subnets, and never this
        machine. Of another machine: this machine alone, where root or this user listens.
        """
        if is_virtual():
            found = self.gateways() + self._dhcp_routers() + self._first_addresses()
            return list(dict.fromkeys(found))
        return [LOOPBACK] if self._listener_is_trusted(port) else []

    def why_nowhere(self, port: int) -> str:
        """What a person is told who has no candidates."""
        where = 'this is no virtual machine, so it is only looked for on 127.0.0.1:%d, where neither root ' \
                'nor this user listens. Start the host agent' % port
        if is_virtual():
            where = 'in a virtual machine it is looked for on the network, and no card here is in one'
        return 'no broker to join: %s; or name the broker: --broker HOST, or [Broker] host' % where

    def _listener_is_trusted(self, port: int) -> bool:
        """Whether whoever listens on that port of the loopback interface is root or this user."""
        users = set(listeners(port))
        return bool(users) and users <= {0, os.getuid()}

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
                text = read_start(os.path.join(folder, name))
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
        names = [name for name in sorted(name for _, name in socket.if_nameindex()) if self.mac_of(name)]
        routed = [row[0] for row in self._routes() if row[1] == '0.0.0.0']
        return sorted(names, key=lambda name: name not in routed)

    def mac_of(self, interface: str) -> str:
        """The MAC of a card, upper case with colons; '' where it has none."""
        try:
            if self._has_proc():
                told = self._ask(interface, 0x8927)           # SIOCGIFHWADDR
                is_ethernet = told[16:18] == struct.pack('=H', 1)
                mac = ':'.join('%02x' % byte for byte in told[18:24]) if is_ethernet else ''
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
        try:
            return socket.inet_ntoa(self._ask(interface, request)[20:24])
        except OSError:
            return ''

    def _ask(self, interface: str, request: int) -> bytes:
        """What the kernel tells of a card. Raises OSError."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            return fcntl.ioctl(probe.fileno(), request, struct.pack('256s', os.fsencode(interface)[:15]))

    def interface_with(self, address: str) -> str:
        """The card that has this address; over loopback the first real one; '' where there is none."""
        interfaces = self.interfaces()
        for interface in interfaces:
            if self.address_of(interface) == address:
                return interface
        return interfaces[0] if interfaces else ''


LISTENING = '0A'               # a state in /proc/net/tcp


def listeners(port: int, folder: str = '/proc/net') -> Iterator[int]:
    """The uids of those who listen on that TCP port, on any address."""
    for name in ('tcp', 'tcp6'):
        try:
            with open(os.path.join(folder, name)) as table:
                rows = [line.split() for line in table.readlines()[1:]]
        except OSError as error:
            log.debug('%s', error)
            continue
        for row in rows:
            if row[3] == LISTENING and int(row[1].rpartition(':')[2], 16) == port:
                yield int(row[7])


# What DMI tables say of virtual machines, in lower case.
VIRTUAL = ('virtualbox', 'innotek', 'qemu', 'kvm', 'bochs', 'vmware', 'xen', 'parallels', 'bhyve',
           'virtual machine', 'openstack', 'google compute', 'amazon ec2', 'apple virtualization')


def is_virtual(dmi: str = '/sys/class/dmi/id', cpuinfo: str = '/proc/cpuinfo') -> bool:
    """Whether this machine is a virtual one, by its firmware tables or a flag of its processor."""
    for name in ('sys_vendor', 'product_name', 'bios_vendor'):
        text = read_start(os.path.join(dmi, name)).lower()
        if any(word in text for word in VIRTUAL):
            return True
    return re.search(r'^flags\s*:.*\bhypervisor\b', read_start(cpuinfo), re.MULTILINE) is not None


def read_start(path: str) -> str:
    """The first 64 KiB of a text file; '' where it can't be read."""
    try:
        with open(path, errors='replace') as file:
            return file.read(65536)
    except OSError as error:
        log.debug('%s', error)
        return ''


def import_netifaces() -> Any:
    """The module netifaces. Raises AgentError that names the package."""
    try:
        import netifaces
        return netifaces
    except ImportError:
        raise agent.AgentError('this system has no /proc/net/route: the package netifaces-plus is needed: '
                               + agent.how_to_get('netifaces-plus'))


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
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(field + ':')), 0)
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
