"""host.ini: its sections and keys, each with its kind and default.
"""

import errno
import ipaddress
import ntpath
import os
import re
import sys
from typing import Any, Callable, Dict, Optional, Tuple

import agent
import drivers
import localnames


def port(value: str) -> int:
    """A kind: a port; 0, or auto, is a free one, which the state folder tells."""
    if value.lower() == 'auto':
        return 0
    try:
        return agent.integer(0, 65535)(value)
    except ValueError:
        raise ValueError('auto, or a whole number from 0 to 65535')


def ip_address(value: str) -> str:
    """A kind: an IPv4 address."""
    try:
        return str(ipaddress.IPv4Address(value))
    except ValueError:
        raise ValueError('an IPv4 address')


def netmask(value: str) -> str:
    """A kind: an IPv4 netmask."""
    bits = 2 ** 32 - 1 - int(ipaddress.IPv4Address(ip_address(value)))
    if bits & bits + 1:                # what is left for hosts is the end of an address
        raise ValueError('a netmask such as 255.255.255.0')
    return value


def port_range(value: str) -> str:
    """A kind: ports such as 5000-5050, or a single one."""
    match = re.match(r'^(\d{1,5})(?:\s*-\s*(\d{1,5}))?$', value)
    low, high = (int(match.group(1)), int(match.group(2) or match.group(1))) if match else (0, 0)
    if not 0 < low <= high < 65536:
        raise ValueError('ports such as 5000-5050')
    return '%d-%d' % (low, high)


def own_state_dir() -> str:
    """Where a program of this user keeps its state, on this system."""
    home = os.path.expanduser('~')
    if os.name == 'nt':
        base = os.environ.get('LOCALAPPDATA') or home
    elif sys.platform == 'darwin':
        base = os.path.join(home, 'Library', 'Application Support')
    elif os.geteuid() == 0:
        base = '/var/lib'
    else:
        base = os.environ.get('XDG_STATE_HOME') or os.path.join(home, '.local', 'state')
    return os.path.join(base, 'vmhost')


def ini_here() -> Optional[str]:
    """The ini file that is meant where none is named: host.ini, if it is in this folder."""
    return 'host.ini' if os.path.isfile('host.ini') else None


def read_settings(ini: Optional[str]) -> Any:
    """The settings in host.ini; None: the defaults, state in the system's place. Raises ConfigError."""
    try:
        localnames.check_path(ini or '')       # Windows would read the device from aux.ini, and wait
    except OSError as error:
        raise agent.ConfigError('%s: %s' % (ini, error.strerror))
    settings = agent.read_settings(ini, SETTINGS)
    for section, keys in SETTINGS.items():
        for key, (kind, _) in keys.items():
            value = getattr(getattr(settings, section), key)
            if kind is agent.path:
                _check_path(ini, section, key, value)
            if kind is agent.password and value and ini and agent.ON_WINDOWS and is_open_on_windows(ini):
                raise agent.ConfigError(
                    '%s: [%s] %s: others can read it: icacls "%s" /inheritance:r /grant:r "%%USERNAME%%:F"'
                    % (ini, section, key, ini))
    if ini is None:
        settings.Host.state_dir = own_state_dir()
        settings.Hypervisor.machine_folder = os.path.join(own_state_dir(), 'machines')
    return settings


def is_open_on_windows(file: str) -> bool:
    """Whether everybody, or such a group, may read or write a file; whoever else was let in by intent."""
    import windows  # there alone
    try:
        access = windows.access_of(file)
    except OSError:                    # a disk without access lists
        return True
    return bool(windows.who_may_read(access) or windows.who_may_change(access))


def _check_path(ini: Optional[str], section: str, key: str, path: str) -> None:
    try:
        localnames.check_path(path)
        drive, rest = ntpath.splitdrive(path)
        if agent.ON_WINDOWS and drive.endswith(':') and rest[:1] not in ('/', '\\'):
            raise OSError(errno.EINVAL, 'on a drive it needs a backslash behind the colon')
    except OSError as error:
        raise agent.ConfigError('%s: [%s] %s = %s: %s' % (ini, section, key, path, error.strerror))


SETTINGS: Dict[str, Dict[str, Tuple[Callable, str]]] = {
    'Broker': {
        'embedded': (agent.yes_no, 'yes'), 'host': (agent.text, 'auto'),
        'port': (port, '61613'), 'username': (agent.text, ''),
        'password': (agent.password, ''), 'heartbeat': (agent.integer(0, 3600), '10'),
        'max_frame': (agent.at_least(24 << 10, agent.size, '24K'), '1M'),
        'tls': (agent.yes_no, 'no'), 'ca_file': (agent.path, ''), 'cert_file': (agent.path, ''),
        'key_file': (agent.path, '')},
    'Host': {
        'xmlrpc_listen_on': (agent.given, '127.0.0.1'),
        'xmlrpc_port': (port, '50505'),
        'xmlrpc_auth': (agent.yes_no, 'yes'), 'state_dir': (agent.path, 'vmhost-state'),
        'vm_gc_grace': (agent.at_least(1, agent.duration, '1 s'), '30'),
        'keep_results': (agent.duration, '7d'), 'fetch_limit': (agent.size, '64M'),
        'max_transfers': (agent.integer(1, 1000), '4'),
        'other_machines': (agent.yes_no, 'no'), 'unsigned_guests': (agent.yes_no, 'no'),
        'first_use': (agent.yes_no, 'yes'), 'idle_end': (agent.duration, '0')},
    'Hypervisor': {
        'hypervisor': (agent.choice('auto', *(list(drivers.DRIVERS) + ['none'])), 'auto'),
        'command_timeout': (agent.duration, '45'), 'machine_folder': (agent.path, 'vmhost-machines')},
    'Network': {
        'mode': (agent.choice('hostonly', 'nat'), 'hostonly'),
        'interface': (agent.text, 'vboxnet0'), 'manage': (agent.yes_no, 'no'),
        'host_ip': (ip_address, '192.168.56.1'), 'netmask': (netmask, '255.255.255.0'),
        'dhcp_server': (ip_address, '192.168.56.100'),
        'dhcp_lower': (ip_address, '192.168.56.101'),
        'dhcp_upper': (ip_address, '192.168.56.254')},
    'RemoteDesktop': {
        'address': (agent.text, '127.0.0.1'), 'ports': (port_range, '5000-5050'),
        'auth': (agent.choice('external', 'guest', 'null'), 'external'),
        'security': (agent.choice('TLS', 'RDP', 'Negotiate'), 'TLS')},
    'Logging': agent.LOGGING,
}
