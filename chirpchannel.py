"""A connection to a Chirp server: made when it is needed, with our identity shown, and made again.

What it is not: the requests of the protocol (chirprequests.py), nor what goes over the line (chirpwire.py).
No threads; an object belongs to one thread at a time.
"""

import contextlib
import errno
import os
import re
import socket
import threading
import time
from typing import Any, Callable, Iterator, Optional, Tuple, TypeVar

import agent
from chirpwire import (
    BUSY,
    CHALLENGE,
    CODES,
    LINE,
    PORT,
    SECRET,
    AccessDenied,
    Busy,
    Cancelled,
    Disconnected,
    EndOfStream,
    Path,
    ProtocolError,
    Refused,
    TimedOut,
    TurnedAway,
    Wire,
    quote,
    secret_answer,
    shown,
    to_bytes,
    to_text,
)

REPLY_LINE = re.compile(br'-?[0-9]{1,18} *$')
NAMED_LINE = re.compile(br'(-[0-9]{1,18}) (E[A-Z0-9]{1,20})$')         # an error of ours, with its errno
HELD_ON = 3.0                  # seconds that a place may be held still, whose connection has just ended
HELD_LOOK = 0.05               # and between looks

Client = TypeVar('Client', bound='Channel')


class Channel:
    """Requests and their replies, one by one, on a connection that is made when it is needed, and again,
    once, where it has ended between two requests (servers end idle ones). All of them raise Refused for an
    error reply, and Disconnected, TimedOut, AccessDenied, Cancelled.

    ``secret``: what this and the guest of that ``id`` share: proved to a server that asks for it (bytes).
    ``tls``: an ssl.SSLContext, to talk TLS alone; its check of names is for ``address``.
    ``timeout``: seconds that the server may be silent. ``cancel``, an event, and ``until``, a monotonic time,
    end whatever is under way.
    """

    def __init__(self, address: str, port: int = PORT, timeout: float = 30.0, secret: bytes = b'',
                 id: str = '', tls: Any = None) -> None:
        self.address = address
        self.port = port
        self.timeout = timeout
        self.secret = secret
        self.id = id
        self.tls = tls
        self.cancel: Optional[threading.Event] = None
        self.until: Optional[float] = None
        self.subject = ''              # who the server says that we are
        self.root: Optional[str] = None        # where what it serves is on its machine, if it is one of ours
        self._wire: Optional[Wire] = None
        self._used = False             # whether this connection has answered a request
        self._held: Optional[Tuple[Path, str]] = None          # what is put, with our mark
        self._linkless: Optional[Path] = None          # below which folder of the server no link leads on

    def __enter__(self: 'Client') -> 'Client':
        return self

    def __exit__(self, *exception: Any) -> None:
        self.disconnect()

    # The connection.

    def connect(self) -> Wire:
        """The connection, authenticated; made now, unless it is there."""
        if self._wire is None:
            wire = Wire(self._dial(), self.timeout)
            wire.cancel, wire.until = self.cancel, self.until
            try:
                self.subject = self._authenticate(wire)
                self.root = self._greet(wire)
                self._hold(wire)
                self._say_linkless(wire)
            except BaseException:
                wire.close()
                raise
            self._wire, self._used = wire, False
        self._wire.cancel, self._wire.until = self.cancel, self.until
        return self._wire

    def disconnect(self) -> None:
        """Ends the connection, if there is one. The next request makes another."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    @property
    def is_ours(self) -> bool:
        """Whether the server is one of ours; connects, if need be. No request may be under way then."""
        self.connect()
        return self.root is not None

    @contextlib.contextmanager
    def moving_content(self) -> Iterator[None]:
        """Where a file fails, here or there, the connection ends: more of it is under way, and won't be sent,
        or taken."""
        try:
            yield
        except (OSError, Refused):
            self.disconnect()
            raise

    def drop_if_ended(self) -> None:
        """Notices that the server has ended the connection, before requests are sent ahead on it. No request
        may be under way."""
        if self._wire is not None and self._wire.has_ended():
            self.disconnect()

    def _dial(self) -> socket.socket:
        seconds = self.timeout if self.until is None else min(self.timeout, self.until - time.monotonic())
        try:
            sock = socket.create_connection((self.address, self.port), max(seconds, 0.001))
        except socket.timeout:
            raise TimedOut('%s:%d doesn\'t answer' % (self.address, self.port))
        except OSError as error:
            raise Disconnected('%s:%d can\'t be reached: %s' % (
                self.address, self.port, agent.sentence(error)))
        if self.tls is None:
            return sock
        try:
            return self.tls.wrap_socket(sock, server_hostname=self.address)
        except (OSError, ValueError) as error:
            sock.close()
            raise AccessDenied('%s:%d: no TLS: %s' % (self.address, self.port, agent.sentence(error)))

    def _authenticate(self, wire: Wire) -> str:
        """By the secret, if there is one, else by address; never ``unix``, where the server names a file
        that the client makes."""
        try:
            if self.secret and self._show_secret(wire):
                return self._subject_of(wire)
            wire.put(b'address\n')
            if wire.line() == b'yes' and wire.line() == b'yes':
                return self._subject_of(wire)
        except EndOfStream:
            raise TurnedAway('%s:%d turns us away' % (self.address, self.port))
        raise AccessDenied('%s:%d doesn\'t let us in' % (self.address, self.port))

    def _show_secret(self, wire: Wire) -> bool:
        wire.put(SECRET.encode('ascii') + b'\n')
        if wire.line() != b'yes':
            return False
        challenge = wire.line()
        if not re.match(b'[0-9a-f]{%d}$' % (2 * CHALLENGE), challenge):
            raise ProtocolError('not a challenge: %.80r' % challenge)
        wire.put(secret_answer(self.secret, self.id, challenge) + b'\n')
        if wire.line() != b'yes':
            raise AccessDenied('%s:%d has another secret than %s' % (self.address, self.port, self.id))
        return True

    def _subject_of(self, wire: Wire) -> str:
        if wire.line() != b'yes':
            raise ProtocolError('authentication went wrong')
        return to_text(wire.line() + b':' + wire.line())

    def _greet(self, wire: Wire) -> Optional[str]:
        """Says that this is one of ours, and learns whether the server is, and what it serves."""
        wire.put(b'vmhost 2\n')
        try:
            count = self._number(wire, '')
        except Refused:
            return None
        if count > 4096:
            raise ProtocolError('a path of %d bytes' % count)
        return to_text(wire.read(count)) or None

    @contextlib.contextmanager
    def holding(self, path: Optional[Path], linkless: Optional[Path] = None) -> Iterator[None]:
        """Meanwhile nobody else may put something there, and below the folder ``linkless`` no link leads on,
        where the server is one of ours; also on connections that follow this one. Raises Busy."""
        self._held = None if path is None else (path, os.urandom(8).hex())
        self._linkless = linkless
        try:
            was_there = self._wire is not None
            wire = self.connect()
            if was_there:              # a new one has been told
                self._hold(wire)
                self._say_linkless(wire)
            yield
            if self.root is not None:
                with contextlib.suppress(Refused, Disconnected):       # an older one has no such request
                    self.call('letgo', again=False)
        except BaseException:
            self.disconnect()          # replies may still be under way
            raise
        finally:
            self._held = self._linkless = None

    def _say_linkless(self, wire: Wire) -> None:
        if self._linkless is not None and self.root is not None:
            wire.put(self.ask('nolinks', quote(to_bytes(self._linkless))))
            with contextlib.suppress(Refused):         # by an older server
                self._number(wire, '')

    def _hold(self, wire: Wire) -> None:
        """A connection that has just ended may hold it for a moment more."""
        if self._held is None or self.root is None:
            return
        path, mark = self._held
        patience = time.monotonic() + HELD_ON
        while True:
            wire.put(self.ask('hold', quote(to_bytes(path)), mark))
            try:
                self._number(wire, '')
                return
            except Refused as refused:
                if refused.code != BUSY:       # an older server; or the put will say what is wrong
                    return
            if time.monotonic() > patience:
                raise Busy(path)
            if self.cancel is not None and self.cancel.wait(HELD_LOOK):
                raise Cancelled('cancelled')
            time.sleep(HELD_LOOK)

    # Requests and replies.

    def ask(self, what: str, *words: Any) -> bytes:
        """A request line: text and numbers as they are; bytes are quoted already."""
        line = b' '.join([what.encode('ascii')] + [
            word if isinstance(word, bytes) else str(word).encode('ascii') for word in words])
        if len(line) > LINE:
            raise Refused(CODES[errno.ENAMETOOLONG], shown(words[0]))
        return line + b'\n'

    def result(self, wire: Wire, what: Path = '', patience: float = 0) -> int:
        """The number of a reply. Raises Refused where it is negative. ``patience``: seconds that it may take
        longer, without a sign of life."""
        wire.timeout += patience
        try:
            number = self._number(wire, what)
        except ProtocolError:
            self.disconnect()
            raise
        finally:
            wire.timeout -= patience
            self._used = True
        return number

    def _number(self, wire: Wire, what: Path) -> int:
        line = wire.line()
        if not REPLY_LINE.match(line):
            named = NAMED_LINE.match(line)
            if named is None:
                raise ProtocolError('not a reply: %.80r' % line)
            raise Refused(int(named.group(1)), shown(what), named.group(2).decode('ascii'))
        if line.startswith(b'-'):
            raise Refused(int(line), shown(what))
        return int(line)

    def broken(self, why: str) -> ProtocolError:
        """Gives the connection up; an error to raise."""
        self.disconnect()
        return ProtocolError(why)

    def call(self, what: str, *words: Any, about: Path = '', data: bytes = b'', again: bool = True,
             read: Optional[Callable[[Wire, int], Any]] = None, patience: float = 0) -> Any:
        """A request and its reply: the number, or what ``read`` makes of it. ``again``: may be repeated
        where the connection had ended before. ``patience``: seconds that the reply may take longer."""
        line = self.ask(what, *words)
        while True:
            wire = self.connect()
            fresh = not self._used
            try:
                wire.put(line + data)
                result = self.result(wire, about, patience)
                return result if read is None else read(wire, result)
            except Refused:
                raise
            except EndOfStream:
                self.disconnect()
                if fresh or not again:
                    raise
            except BaseException:
                self.disconnect()
                raise
