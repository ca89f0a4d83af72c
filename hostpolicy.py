"""Who may do what at the embedded broker: the host, and guests.

What it is not: the proof of who a guest is (hosttrust.py). It keeps guests' words from each other's eyes, and
tells the host which connection a word came by.

Threads: the broker's calls the methods of Policy, the host's ``link`` the others. One lock, for the table.
"""

import threading
from typing import Any, Callable, Dict, List, Optional

import protocol
import shortcut
import stompbroker

RATE = 100, 500                # frames of a guest a second, and at once
BYTE_RATE = 10e6, 8e6          # bytes of a guest a second, and at once: files don't go this way
CLAIMS = 8                     # connections that claim one id; the oldest that doesn't prove it makes room


class _Role:
    """Which guest a connection to the embedded broker is."""

    def __init__(self) -> None:
        self.id = ''                   # that it claims
        self.proved = False            # whether it has proved that


class HostPolicy(stompbroker.Policy):
    """All connections are guests': the host itself has a door.

    A guest may SEND to connections and cmd_responses alone, SUBSCRIBE to cmd_requests alone, and is bound to
    the id of its first HELLO. It is sent what is for that id, once it has proved it; before that, what is for
    this connection. The header ``connection`` stands between host and broker alone. On what the host gets it
    is the broker's number of the connection, the id that it is bound to, and its address; on what the host
    says, the number.
    """

    def __init__(self, judge: Callable[[str, protocol.Message], None]) -> None:
        """``judge``: raises an exception with a sentence for a HELLO that is refused; must not block."""
        self._judge = judge
        # Guards the tables; nothing is called while it is held.
        self._lock = threading.Lock()
        self._connections = {}         # type: Dict[str, Any]
        self._proved = {}              # type: Dict[str, Any]
        self._claims = {}              # type: Dict[str, List[Any]]    # by id, the oldest first
        self._expected = {}            # type: Dict[str, Callable[[Any], None]]    # shortcuts, by token

    # The broker's questions.

    def connecting(self, session: Any, headers: Dict[str, str]) -> None:
        session.policy_data = _Role()
        session.identified = False
        session.rate, session.byte_rate = RATE, BYTE_RATE
        with self._lock:
            self._connections[session.id] = session

    def taking(self, headers: Dict[str, str]) -> Optional[Callable[[Any], None]]:
        with self._lock:
            return self._expected.pop(headers.get(shortcut.HEADER, ''), None)

    def subscribing(self, session: Any, destination: str, headers: Dict[str, str]) -> None:
        if destination != protocol.CMD_REQUESTS:
            raise stompbroker.Refused('a guest may subscribe to %s alone' % protocol.CMD_REQUESTS)

    def sending(self, session: Any, destination: str, frame: Any) -> bool:
        role = session.policy_data
        if destination not in (protocol.CONNECTIONS, protocol.CMD_RESPONSES):
            raise stompbroker.Refused('a guest may not send to %.100s' % destination)
        if not role.id:
            self._claim(session, role, frame)
        for name in ('from', 'id'):
            text = frame.headers.get(name, role.id)
            if text != role.id and not (protocol.is_mac(text) and text.upper() == role.id):
                raise stompbroker.Refused('this connection is bound to the id %s' % role.id)
        frame.headers['connection'] = '%s %s %s' % (session.id, role.id, session.peer[0])
        return True

    def _claim(self, session: Any, role: _Role, frame: Any) -> None:
        """Binds the connection to the id of its HELLO."""
        try:
            hello = protocol.interpret(frame.headers, frame.body.decode('utf-8', 'replace'))
            if hello.word != 'HELLO':
                raise stompbroker.Refused('a guest says HELLO first')
            machine_id = protocol.read_id(hello.text('id'))
            self._judge(machine_id, hello)
        except stompbroker.Refused:
            raise
        except Exception as error:
            raise stompbroker.Refused(str(error))
        role.id = machine_id
        session.identified = True
        for other in self._surplus(session):
            other.close('too many claim to be %s' % machine_id)

    def _surplus(self, session: Any) -> List[Any]:
        """Those that make room for one that claims an id. In NAT mode all guests have one address, and share
        its connections."""
        machine_id = session.policy_data.id
        with self._lock:
            claims = self._claims.setdefault(machine_id, [])
            keeps = session, self._proved.get(machine_id)
            others = [other for other in claims if other not in keeps]
            claims.append(session)
            return others[:max(0, len(claims) - CLAIMS)]

    def audience(self, destination: str, frame: Any) -> Optional[Callable[[Any], bool]]:
        connection, to = frame.headers.pop('connection', ''), frame.headers.get('to', '')
        if destination != protocol.CMD_REQUESTS:
            return is_nobody           # the host's own are at its door
        with self._lock:
            target = self._connections.get(connection) if connection else self._proved.get(to)
        if to == '*' and not connection:
            return is_anybody
        return lambda session: session is target

    def closed(self, session: Any) -> None:
        role = session.policy_data
        with self._lock:
            self._connections.pop(session.id, None)
            if role is None or not role.id:
                return
            if self._proved.get(role.id) is session:
                del self._proved[role.id]
            self._claims[role.id].remove(session)
            if not self._claims[role.id]:
                del self._claims[role.id]

    # The host's.

    def expect(self, token: str, take: Callable[[Any], None]) -> None:
        """Who connects with that token is no client; take(socket) in the broker's turn."""
        with self._lock:
            self._expected[token] = take

    def expect_no_more(self, token: str) -> None:
        """Nobody takes it any more."""
        with self._lock:
            self._expected.pop(token, None)

    def is_there(self, connection: str) -> bool:
        """Whether there is such a connection."""
        with self._lock:
            return connection in self._connections

    def prove(self, connection: str) -> None:
        """The guest at that connection is who it says; it takes the place of the one that was before."""
        with self._lock:
            session = self._connections.get(connection)
            if session is not None:
                session.policy_data.proved = True
                self._proved[session.policy_data.id] = session


def is_nobody(session: Any) -> bool:
    """What is for no client."""
    return False


def is_anybody(session: Any) -> bool:
    """What is for everybody."""
    return True
