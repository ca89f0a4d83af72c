"""Which host a guest obeys: the one that proves it knows the guest's secret, by words that it signs.

What it is not: where the secret comes from (guestidentity.py), or the arithmetic (protocol.py).

Threads: the link's thread hears, any thread says, the main thread asks for the verdict. One lock guards all
of it; under it a word is signed and given to the link, so that its number and its place in the stream agree.
"""

import collections
import logging
import threading
import time
from typing import Any, Callable, Dict, List, Tuple  # noqa: F401

import protocol
from agent import Seldom, printable
from protocol import Message, Signatures, Untrusted

log = logging.getLogger('vmguest')

NONCES = 4                     # HELLOs of one connection whose greetings may still come
GREETING_TIMEOUT = 10.0        # seconds in which a host has to greet, where there is another address to try
COMPLAINT_TIMEOUT = 3.0        # … and after a greeting without proof, which may have been a third party's


class HostTrust:
    """This guest's trust in the host at the other end of the connection that is up."""

    def __init__(self, machine_id: str, secret: Any, clock: Callable[[], float] = time.monotonic) -> None:
        """``secret``: a guestidentity.Secret."""
        self.untrusted = 0             # words that were dropped
        self._id = machine_id
        self._secret = secret
        self._clock = clock
        self._lock = threading.Lock()
        self._nonces = collections.deque(maxlen=NONCES)  # type: collections.deque
        self._sessions = []            # type: List[Signatures]     # the one that goes on, and the one before
        self._judged = threading.Event()    # whether a greeting was heard, whatever it proved
        self._since = 0.0              # when the connection came up
        self._complaint = '', 0.0      # what is wrong with who answers there, and since when
        self._drops = Seldom(log, clock)

    def connected(self) -> None:
        """A connection came up: who is there has to prove itself anew."""
        with self._lock:
            self._nonces.clear()
            self._sessions = []
            self._judged.clear()
            self._since = self._clock()
            self._complaint = '', 0.0

    @property
    def is_proved(self) -> bool:
        """Whether the host has proved itself."""
        return bool(self._sessions)

    def hello(self) -> Dict[str, str]:
        """What a HELLO carries for that."""
        nonce = protocol.new_nonce()
        with self._lock:
            self._nonces.append(nonce)
        keys = {'nonce': nonce, 'secret-id': protocol.secret_id(self._secret.value, self._id)}
        if self._secret.may_be_told:
            keys['secret'] = self._secret.value.hex()
        return keys

    def greeted(self, greeting: Message) -> bool:
        """Whether that greeting proves the host: a new session begins with it. Raises BadWord."""
        if greeting.text('refused'):
            self._complain('it refuses this guest: %s' % printable(greeting.text('refused')[:500]))
            return False
        proof, host_nonce = greeting.text('proof'), greeting.text('nonce')
        with self._lock:
            nonces = list(self._nonces)
        for nonce in nonces if host_nonce else ():
            parts = self._secret.value, self._id, nonce, protocol.read_nonce(host_nonce)
            if protocol.is_proof(proof, *parts):
                self._begin(nonce, protocol.session_key(*parts), greeting.text('key')[:64])
                return True
        self._complain('its greeting proves nothing' if proof else
                       'its greeting has no proof (vmhost 1.0 gives none: update it)')
        return False

    def _begin(self, nonce: str, session_key: bytes, key: str) -> None:
        """The nonce is used up: said again, its greeting would have this session's words count anew."""
        known = self._secret.host_key
        if key != known:
            if known:
                log.warning('the host that knows the secret has the key %s; it was %s', printable(key), known)
            self._secret.pin(printable(key))
        with self._lock:
            if nonce in self._nonces:
                self._nonces.remove(nonce)
            self._sessions = [Signatures(session_key, 'guest')] + self._sessions[:1]
        self._judged.set()

    def _complain(self, why: str) -> None:
        with self._lock:
            if not self._complaint[0]:
                self._complaint = why, self._clock()
        self._judged.set()

    def wait_for_greeting(self, timeout: float) -> None:
        """Until who is there has greeted, or for so many seconds; not on the thread that hears."""
        self._judged.wait(timeout)

    def say(self, message: Message, send: Callable[[str, Dict[str, str], bytes], bool]) -> bool:
        """Signs a word, and sends it. False before the host has proved itself. Raises LocalError."""
        body = message.body()
        with self._lock:
            if not self._sessions:
                return False
            headers = dict(message.headers, **{'from': self._id})
            return send(message.topic, self._sessions[0].sign(message.topic, headers, body), body)

    def shortcut_key(self, token: str) -> bytes:
        """By which the pieces of a shortcut are signed; b'' before the host has proved itself."""
        with self._lock:
            return self._sessions[0].shortcut_key(token) if self._sessions else b''

    def check(self, topic: str, headers: Dict[str, str], body: bytes) -> Dict[str, str]:
        """The headers of a word, as far as the host signed them. Raises Untrusted."""
        why = Untrusted('the host has not proved itself')
        with self._lock:
            for session in self._sessions:
                try:
                    return session.check(topic, headers, body)
                except Untrusted as error:
                    why = error
        if not self.is_proved:
            self._complain('it gives orders without having proved itself')
        raise why

    def drop(self, why: Any) -> None:
        """Counts an untrusted word, and says so now and then."""
        self.untrusted += 1
        self._drops.warn('', 'dropped a word that is said to be the host\'s: %s', why)

    def verdict(self, is_only: bool) -> Tuple[str, float]:
        """Why to leave the connection, '' for no reason; and when to ask again.

        ``is_only``: there is no other address, so that a silent one may wait for its host.
        """
        with self._lock:
            why, since = self._complaint
            if self._sessions:
                return '', float('inf')
            due = float('inf') if is_only else self._since + GREETING_TIMEOUT
            if why:
                due = since + COMPLAINT_TIMEOUT
            if self._clock() < due:
                return '', due
            return why or 'no host greets within %g s' % GREETING_TIMEOUT, due
