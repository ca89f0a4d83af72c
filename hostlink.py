"""The host's connection to its broker, and the embedded broker itself.

What it is not: what the words mean (hostwords.py), or the STOMP protocol (protocol.py, stompbroker.py).

Threads: ``link`` (protocol.Link's, or InnerLink's) calls ``hear`` and ``on_up``; ``broker`` is the embedded
broker's. ``say`` may be called from any thread. No locks of its own.
"""

import contextlib
import logging
import secrets
import socket
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import agent
import protocol
import stompbroker
from faults import VMHostError
from hostpolicy import HostPolicy
from hosttrust import Session, Trust
from stompdoor import Door

log = logging.getLogger('vmhost')

STRANGERS = 64                 # connections of one address that have not said HELLO yet
SUBSCRIPTIONS = 10             # of a guest, which needs one; each is asked about for each word to guests
ROLL_CALL_EVERY = 2.0          # seconds between two requests to all guests to say HELLO


class InnerLink:
    """The host's way to its embedded broker: what protocol.Link is to another one, without a socket."""

    server = stompbroker.SERVER
    local_address = peer_address = ('', 0)
    last_error = ''

    def __init__(self, broker: stompbroker.Broker, on_up: Callable[[Any], None],
                 on_message: Callable[[Any], None], on_down: Callable[[str], None],
                 on_news: Callable[[Any], bool]) -> None:
        """on_news: whether it heard a CMD_STATUS, on the broker's thread; must not wait. The others are
        protocol.Link's callbacks, and called on the thread ``link``. Raises LocalError."""
        self._new_frame = protocol.import_stomper().Frame
        self._door = Door(broker, (protocol.CONNECTIONS, protocol.CMD_RESPONSES), self._hear_at_once)
        self._on_news = on_news
        self._on_up = on_up
        self._on_message = on_message
        self._on_down = on_down
        self.up = False
        self._thread = threading.Thread(target=self._run, name='link', daemon=True)

    def start(self) -> None:
        """Once the broker has been started."""
        log.debug('the host comes to its embedded broker by a door, without a connection')
        self.up = True
        self._thread.start()

    def close(self, timeout: float = 2.5) -> None:
        """Ends the thread."""
        self._door.close()
        if self._thread.ident is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                log.warning('thread %s still runs after %s s', self._thread.name, timeout)

    def send(self, destination: str, headers: Dict[str, str], body: bytes) -> bool:
        """As protocol.Link's; mostly it is with its receiver's system when this returns."""
        return self.up and self._door.send(destination, headers, body)

    def _run(self) -> None:
        self._call(self._on_up, self)
        for frames in iter(self._door.wait, None):
            for wire in frames:
                self._call(self._on_message, self._frame(wire))
            self._door.taken()
        self.up = False
        self._call(self._on_down, 'the embedded broker has ended')

    def _frame(self, wire: protocol.WireFrame) -> Any:
        frame = self._new_frame()
        frame.cmd, frame.headers = 'MESSAGE', wire.headers
        frame.body = wire.body.decode('utf-8', 'replace')
        return frame

    def _hear_at_once(self, wire: protocol.WireFrame) -> bool:
        return wire.body.startswith(b'CMD_STATUS ') and bool(self._call(self._on_news, self._frame(wire)))

    def _call(self, callback: Callable[[Any], Any], argument: Any) -> Any:
        """What it gave; what it raised is logged, and the link lives on."""
        try:
            return callback(argument)
        except Exception:
            log.exception('in a callback of the link')
            return True


class Connection:
    """The host at the broker: signs and sends words, and passes on what arrives."""

    def __init__(self, settings: Any, trust: Trust, hear: Callable[[Any], None],
                 on_up: Callable[[], None], hear_news: Callable[[Any], bool]) -> None:
        """hear: gets each frame; on_up: called whenever a connection has been made. Both on ``link``.

        hear_news: gets a CMD_STATUS first, on the thread of an embedded broker; whether it took it. Must not
        wait.
        """
        self._trust = trust
        self.session = secrets.token_hex(8)
        self.address = '', 0                   # of the broker, as configured, or as it listens
        self._policy: Optional[HostPolicy] = None      # the embedded broker's
        self._broker: Optional[stompbroker.Broker] = None
        self._link: Any = None                 # a protocol.Link, or an InnerLink
        self._settings = settings.Broker
        self._beacon_interval = max(1, settings.Host.vm_gc_grace / 3)
        self._hear = hear
        self._hear_news = hear_news
        self._on_up = on_up
        self._closing = False
        self._last_roll_call = -ROLL_CALL_EVERY

    def start(self, host: str, port: int) -> None:
        """Starts the embedded broker on that address (port 0: any), or uses the one there; then connects.

        Raises VMHostError, ConfigError or ProtocolError with a sentence.
        """
        self.address = host, port
        self._link = self._make_link() if not self._settings.embedded else self._start_broker(host, port)
        self._link.start()

    def _start_broker(self, host: str, port: int) -> InnerLink:
        settings = self._settings
        self._policy = HostPolicy(self._trust.judge_first)
        self._trust.watch_connections(self._policy.is_there)
        self._broker = stompbroker.Broker(
            host, port, login=settings.username, passcode=settings.password,
            tls=server_tls(settings), policy=self._policy, heartbeat=settings.heartbeat,
            max_frame=settings.max_frame, unidentified=STRANGERS, subscriptions=SUBSCRIPTIONS)
        link = InnerLink(self._broker, self._link_up, self._hear, self._link_down, self._hear_news)
        try:
            self._broker.start()
        except stompbroker.BrokerError as error:
            cause = error.__context__
            why = agent.why_not_listening(cause) if isinstance(cause, OSError) else error
            raise VMHostError('the broker can\'t listen on %s:%s ([Broker] host, port): %s'
                              % (host, port, why))
        self.address = self._broker.address
        return link

    def _make_link(self) -> protocol.Link:
        settings = self._settings
        return protocol.Link(
            lambda: [self.address], [(protocol.CONNECTIONS, 'client-individual'),
                                     (protocol.CMD_RESPONSES, 'client-individual')],
            self._link_up, self._hear, self._link_down, settings.username, settings.password,
            settings.heartbeat, agent.client_tls(settings.ca_file) if settings.tls else None,
            max_body=settings.max_frame)

    def check_broker(self) -> None:
        """Raises VMHostError where the embedded broker has ended by itself."""
        if self._broker is not None and self._broker.failure is not None:
            raise VMHostError('the embedded broker has failed: %r' % self._broker.failure)

    def stop(self) -> None:
        """Says BYE, and stops link and broker."""
        self._closing = True
        if self._link is not None:
            for machine_id in self._trust.sessions.ids():
                self.say(protocol.BYE.howToLeave(machine_id, 'the host stops'))
            self._link.close()
        if self._broker is not None:
            self._broker.stop()

    def _link_up(self, link: Any) -> None:
        self._on_up()
        self.call_the_roll()

    def _link_down(self, reason: str) -> None:
        if not self._closing:
            log.warning('no connection to the broker: %s', reason)

    @property
    def is_down(self) -> bool:
        """Whether the connection is lost: nothing can be heard of anybody."""
        return self._link is not None and not self._link.up

    def say(self, message: protocol.Message) -> bool:
        """Says a word to the guest whose id is in ``to``, signed. From any thread.

        False where the guest has no session, or there is no connection to the broker.
        """
        session = self._trust.sessions.of(message.headers['to'])
        return session is not None and self.say_in(session, message)

    def say_in(self, session: Session, message: protocol.Message, signed: bool = True) -> bool:
        """The same in a session that the guest may not have proved yet."""
        return self._link is not None and session.say(message, self._link.send, signed)

    def expect_shortcut(self, machine_id: str, take: Callable[[socket.socket], None]) -> Tuple[str, bytes]:
        """The token with which that guest may connect once to the embedded broker, in whose turn take(socket)
        is called then, and the key for what it says; ('', b'') where there can't be a shortcut."""
        session = self._trust.sessions.of(machine_id)
        token = protocol.new_nonce()
        key = session.shortcut_key(token) if session is not None else b''
        if self._policy is None or self._settings.tls or not key:
            return '', b''
        self._policy.expect(token, take)
        return token, key

    def expect_no_shortcut(self, token: str) -> None:
        """Whoever comes with it now is refused."""
        if self._policy is not None:
            self._policy.expect_no_more(token)

    def call_the_roll(self, connection: str = '') -> None:
        """Asks all guests to say HELLO, or the one at that connection of the embedded broker.

        All of them again after ROLL_CALL_EVERY at the earliest.
        """
        now = time.monotonic()
        if not connection:
            if now - self._last_roll_call < ROLL_CALL_EVERY:
                return
            self._last_roll_call = now
        self._say_unsigned(protocol.HELLO.howToGreet('*', session=self.session), connection)

    def greet(self, session: Session, name: str) -> None:
        """Answers a guest's HELLO: what it is called, and what it needs to know of this host.

        For the first time with what proves this host, later as a word like all others.
        """
        keys = {'name': name, 'session': self.session, 'max_frame': self._settings.max_frame,
                'beacon_interval': self._beacon_interval}  # type: Dict[str, Any]
        if self._broker is None and self._link is not None:
            keys['addresses'] = own_addresses(self._link.local_address[0])
        is_first, session.name = not session.name, name
        if is_first:
            keys.update(session.greeting)
        self.say_in(session, protocol.HELLO.howToGreet(session.id, **keys), signed=not is_first)

    def refuse(self, machine_id: str, connection: str, why: str) -> None:
        """Answers a HELLO that is not let in."""
        self._say_unsigned(protocol.HELLO.howToGreet(machine_id, refused=why), connection)

    def _say_unsigned(self, message: protocol.Message, connection: str) -> None:
        headers = dict(message.headers, **{'from': 'host'})
        if connection:
            headers['connection'] = connection
        if self._link is not None:
            self._link.send(message.topic, headers, message.body())

    def origin(self, headers: Dict[str, str]) -> Tuple[str, str, str]:
        """Where a frame came from: the embedded broker's number of the connection, the id that it is bound
        to, its address. With another broker: '', the id that it claims, ''. Raises BadWord.
        """
        origin = headers.pop('connection', '')
        if self._policy is None:
            return '', protocol.read_id(headers.get('from') or headers.get('id', '')), ''
        connection, machine_id, address = origin.split(' ')
        return connection, machine_id, address

    def files_tls(self) -> Any:
        """The ssl.SSLContext for guests that serve their files by TLS. Raises ConfigError."""
        context = agent.client_tls(self._settings.ca_file or self._settings.cert_file)
        context.check_hostname = False         # guests are known by their secrets, and have many addresses
        return context

    def proved(self, session: Session) -> None:
        """From now on what is for that guest goes to the connection of this session."""
        if self._policy is not None:
            self._policy.prove(session.connection)

    def info(self) -> Dict[str, Any]:
        """What agentInfo shows of the broker: {address, connected, embedded, server, counters}."""
        link = self._link
        assert link is not None                # asked of a started host alone
        address = link.peer_address if link.peer_address[0] else self.address
        info = {'address': '%s:%s' % address, 'connected': link.up, 'embedded': self._broker is not None,
                'server': link.server}         # type: Dict[str, Any]
        if self._broker is not None:
            info['counters'] = self._broker.counters()
        return info


def own_addresses(towards_broker: str) -> List[str]:
    """This machine's addresses, as guests may see them: that one, and those of its own name."""
    found = {towards_broker}
    with contextlib.suppress(OSError):
        found.update(str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None))
    return sorted(filter(None, found))


def server_tls(settings: Any) -> Any:
    """The embedded broker's ssl.SSLContext, or None. Raises VMHostError that names the key."""
    if not settings.tls:
        return None
    if not settings.cert_file:
        raise VMHostError('[Broker] tls=yes needs cert_file, and key_file where the key is in another file')
    try:
        return agent.server_tls(settings.cert_file, settings.key_file)
    except agent.AgentError as error:
        raise VMHostError('[Broker] cert_file, key_file: %s' % error)
