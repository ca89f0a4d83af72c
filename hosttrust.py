"""Trust: who may say what to the embedded broker, and what a guest may call itself.
"""

import hmac
import ipaddress
import logging
import threading
from typing import Any, Callable, Dict

import protocol
import stompbroker

log = logging.getLogger('vmhost')


class _Role:
    """Who a connection to the embedded broker is."""

    def __init__(self, is_host: bool) -> None:
        self.is_host = is_host
        self.id = ''
        self.name = ''
        self.session = ''
        self.boot = ''


class HostPolicy(stompbroker.Policy):
    """Roles on the embedded broker: the host's own connection, by a secret; all others are guests.

    A guest may SEND to connections and cmd_responses alone, SUBSCRIBE to cmd_requests alone, is
    bound to the id of its first HELLO, and is sent only what is addressed to it. The header
    ``from`` of all that a guest sends is written here, so that the host can lean on it. Guests wait while
    the host has much to read: they would say it all again if its connection were cut off.
    """

    def __init__(self, secret: str, mac_of: Callable[[str], str]) -> None:
        self._secret = secret
        self._mac_of = mac_of
        # Guards the table of bound sessions; nothing is called while it is held.
        self._lock = threading.Lock()
        self._sessions = {}            # type: Dict[str, Any]

    def connecting(self, session: Any, headers: Dict[str, str]) -> None:
        secret = headers.get('vmhost-secret', '')
        session.policy_data = _Role(hmac.compare_digest(secret.encode(), self._secret.encode()))
        session.essential = session.policy_data.is_host

    def subscribing(self, session: Any, destination: str, headers: Dict[str, str]) -> None:
        if not session.policy_data.is_host and destination != protocol.CMD_REQUESTS:
            raise stompbroker.Refused('a guest may subscribe to %s alone' % protocol.CMD_REQUESTS)

    def sending(self, session: Any, destination: str, frame: Any) -> bool:
        role = session.policy_data
        if role.is_host:
            return True
        if destination not in (protocol.CONNECTIONS, protocol.CMD_RESPONSES):
            raise stompbroker.Refused('a guest may not send to %.100s' % destination)
        if not role.id and not self._bind(session, role, frame):
            return False
        for name in ('from', 'id'):
            if frame.headers.get(name, role.id).upper() != role.id.upper():
                raise stompbroker.Refused('this connection is bound to the id %s' % role.id)
        frame.headers['from'] = role.id
        return True

    def _bind(self, session: Any, role: _Role, frame: Any) -> bool:
        """Gives the connection the id of its HELLO. False: it said something else before."""
        try:
            message = protocol.interpret(frame.headers, frame.body.decode('utf-8', 'replace'))
            if message.word != 'HELLO':
                return False
            machine_id = read_id(message.text('id'))
            role.session, role.boot = message.text('session'), message.text('boot')
        except protocol.BadWord as error:
            raise stompbroker.Refused(str(error))
        self._check_neighbour(session, machine_id)
        self._take_id(session, role, machine_id)
        return True

    def _check_neighbour(self, session: Any, machine_id: str) -> None:
        mac = self._mac_of(session.peer[0])
        if mac and is_mac(machine_id) and mac.upper() != machine_id.upper():
            raise stompbroker.Refused('id %s, but the network card at %s is %s'
                                      % (machine_id, session.peer[0], mac))

    def _take_id(self, session: Any, role: _Role, machine_id: str) -> None:
        """Binds, unless another living agent has that id.

        A reconnect (same session), and a machine that was reset (same address, another boot), take
        the place of their old connection, which may not have noticed yet that it is dead. Over
        loopback the second waits until the old one's heart-beats are missed.
        """
        with self._lock:
            other = self._sessions.get(machine_id)
            if other is not None and other is not session:
                data = other.policy_data
                same = data.session == role.session
                # Over loopback all guests have one address (NAT): there an address proves nothing.
                reset = other.peer[0] == session.peer[0] and data.boot != role.boot \
                    and not session.peer[0].startswith(('127.', '::1'))
                if not same and not reset:
                    raise stompbroker.Refused('id %s is taken by an agent at %s'
                                              % (machine_id, other.peer[0]))
            role.id = machine_id
            self._sessions[machine_id] = session
        if other is not None and other is not session:
            other.close('its agent came back on another connection')

    def named(self, machine_id: str, name: str) -> None:
        """The host's name for a guest; what is addressed to it by name reaches it from now on."""
        with self._lock:
            session = self._sessions.get(machine_id)
        if session is not None:
            session.policy_data.name = name

    def address_of(self, machine_id: str) -> str:
        """The address that a guest's connection comes from; '' where it has none."""
        with self._lock:
            session = self._sessions.get(machine_id)
        return session.peer[0] if session is not None else ''

    def audience(self, destination: str, frame: Any) -> Callable[[Any], bool]:
        to = frame.headers.get('to', '')
        asks_all = to == '*' and frame.body.startswith(b'HELLO')
        is_glob, wanted = any(sign in to for sign in '*?['), to.upper()
        with self._lock:               # a name that is another's id reaches nobody
            is_id = to in self._sessions or wanted in self._sessions

        def is_sent_to(session: Any) -> bool:
            role = session.policy_data
            if role.is_host or not role.id:
                return role.is_host or asks_all
            if is_glob:
                return protocol.is_addressed(to, role.id, role.name)
            # The same for what most words have, an id: with 1,000 guests it is asked 1,000 times.
            return bool(to) and (role.id.upper() == wanted or role.name == to and not is_id)
        return is_sent_to

    def closed(self, session: Any) -> None:
        role = session.policy_data
        with self._lock:
            if role is not None and self._sessions.get(role.id) is session:
                del self._sessions[role.id]


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches who listens there."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address.lower() == 'localhost'


def is_mac(text: str) -> bool:
    """Whether it is a MAC address with colons."""
    parts = text.split(':')
    return len(parts) == 6 and all(len(part) == 2 and set(part) <= set('0123456789abcdefABCDEF')
                                   for part in parts)


def read_id(text: str) -> str:
    """A guest's id, MACs in upper case. Raises BadWord for what can't be one."""
    if not protocol.is_id(text):
        raise protocol.BadWord('HELLO: id %.80r' % text)
    return text.upper() if is_mac(text) else text


def read_name(text: str) -> str:
    """A name that a machine gives itself, as it may be shown: printable, at most 64 characters, no '@';
    and no MAC, which is another's id."""
    name = ''.join(char for char in text if char.isprintable() and char != '@').strip()[:64]
    return '' if is_mac(name) else name


def neighbour_mac(address: str) -> str:
    """The MAC that the kernel knows for an address on a directly attached network, else ''.

    On Linux, from /proc/net/arp; elsewhere nothing is known.
    """
    try:
        with open('/proc/net/arp') as table:
            for line in table.readlines()[1:]:
                fields = line.split()
                if fields[0] == address and fields[3] != '00:00:00:00:00:00':
                    return fields[3].upper()
    except OSError as error:
        log.debug('no neighbour table: %s', error)
    return ''
