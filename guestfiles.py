"""The files that a guest serves: its Chirp server, where the broker sees this machine.

What it is not: Chirp itself (chirpserver.py). Threads: ``serve`` and ``admit`` run on the link's thread,
``stop`` on the main one; the server has threads of its own. No locks.
"""

import logging
from typing import Any, Callable, Dict, List

import agent
import chirpserver
from chirpwire import ChirpError
from protocol import Message

LISTEN_PATIENCE = 3.0          # seconds that HELLO waits for chirp_server, so that it can tell of it
STOP_PATIENCE = 1.0            # seconds that the Chirp server has for its end

log = logging.getLogger('vmguest')


class Files:
    """The Chirp server of a guest, if there can be one: commands don't need it."""

    def __init__(self, root: str, settings: Any, on_port: Callable[[], None]) -> None:
        """``settings``: [Chirp]. ``on_port``: called on another thread, once a late server has a port.

        Raises AgentError where the certificate can't be used.
        """
        self._root = root
        self._settings = settings
        self._on_port = on_port
        self._identity = b'', ''
        self.tls = server_tls(settings) if settings.cert_file else None
        self._server = None            # type: Any
        self._address = ''             # at which it listens

    @property
    def port(self) -> int:
        """Where files are served; 0: nowhere, or not yet."""
        server = self._server              # read once: the main thread may stop it meanwhile
        return server.address[1] if server is not None else 0

    def serve(self, address: str, host: str, shown: Dict[str, str], secret: bytes, id: str) -> None:
        """Serves at that address of this machine, to whoever knows the secret of this id.

        ``host``: who is let in instead, with auth=address. ``shown``: {name: folder} of what can be read
        under that name, and never changed.
        """
        self._identity = secret, id
        if self._server is not None and self._address == address:
            self._allow([host])             # the host may have moved
            return
        self.stop()
        self._address = address
        port = self._free_port(address)
        try:
            self._start(address, port, [host], shown)
        except (OSError, ChirpError, agent.AgentError) as error:
            log.error('no Chirp server at %s:%d: %s', address, port, error)
            self._server = None

    def _free_port(self, address: str) -> int:
        port = self._settings.port
        try:
            chirpserver.listen(address, port).close()
            return int(port)
        except OSError as error:
            log.warning('[Chirp] port %d is not available (%s): files are served on another one. The host is '
                        'told, but can\'t reach it in NAT mode', port, error)
            return 0

    def _start(self, address: str, port: int, allowed: List[str], shown: Dict[str, str]) -> None:
        """Doesn't wait for chirp_server, which may never come up: this is the link's thread."""
        if self._settings.server == 'embedded':
            secret, id = self._identity
            by_secret = self._settings.auth == 'secret'
            if not by_secret:
                log.warning('[Chirp] auth=address: files are open to every user of %s and, behind NAT, to '
                            'every other guest there', allowed[0])
            self._server = chirpserver.ChirpServer(
                self._root, address, port, None if by_secret else allowed, auth=self._settings.auth,
                secret=secret, id=id, tls=self.tls, shown=shown).start()
            return
        log.warning('files are open to every user of %s: chirp_server lets in by address alone', allowed[0])
        import chirpreal  # what the embedded one doesn't need
        self._server = chirpreal.RealChirpServer(self._root, address, port, allowed,
                                                 user=self._settings.user)
        self._server.begin(self._on_port, LISTEN_PATIENCE)

    def admit(self, greeting: Message) -> None:
        """What the host's greeting says for files: where it is, if not at the broker."""
        if self._server is None:
            return
        addresses = [value for value in greeting.sequence('addresses') if isinstance(value, str)]
        if addresses:
            self._allow(addresses)

    def _allow(self, addresses: List[str]) -> None:
        if self._settings.auth == 'address' or self._settings.server != 'embedded':
            self._server.allow(addresses)

    def stop(self) -> None:
        """Ends the server, if there is one."""
        if self._server is not None:
            self._server.stop(STOP_PATIENCE)
            self._server = None


def server_tls(settings: Any) -> Any:
    """The ssl.SSLContext of the file server. Raises AgentError."""
    try:
        return agent.server_tls(settings.cert_file, settings.key_file)
    except agent.AgentError as error:
        raise agent.AgentError('[Chirp] cert_file, key_file: %s' % error)
