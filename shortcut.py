"""A shortcut to a command in a guest: what is typed and shown, or much input, without being a word.

A word is parsed, routed, read as JSON, and passes two threads on each side: most of what a key's echo takes.
A large piece of input in it is base64, too, which takes longer than all the rest.
A shortcut is a connection of its own, which the guest makes to the host's embedded broker. On it both say
pieces, signed by a key of this shortcut alone. All that it carries are offsets and bytes of CMD_INPUT and of
CMD_STATUS: when it breaks, words go on where it ended.

What it is not: who may have one (hostlink.py, guestconsole.py), or what becomes of the bytes. No threads, no
locks: for one thread at a time.
"""

import hmac
import socket
import struct
from typing import Any, List, Tuple

import protocol

HEADER = 'shortcut'            # of the guest's CONNECT: the token
BEGIN, INPUT, LAST_INPUT, OUTPUT = b'b', b'i', b'l', b'o'      # kinds
HEAD = struct.Struct('!cQI')   # kind, offset in the whole, length; then so many bytes, and the signature
RECEIVE = 64 * 1024            # bytes that are received at once; for more, memory would be mapped each time
LONGEST = 2 * 1024 * 1024      # bytes of a piece

Piece = Tuple[bytes, int, bytes]       # kind, offset, bytes


class Shortcut:
    """One end. Nothing in it waits; ``fileno`` is for poll: for room, too, while something is ``unsent``.

    Pieces are numbered, so that none is taken twice, left out, or taken before another.
    """

    def __init__(self, connection: socket.socket, key: bytes, side: str, opening: bytes = b'') -> None:
        """side: 'host' or 'guest', the one that says here; opening: what is sent before all pieces."""
        self._socket = connection
        connection.setblocking(False)
        self._says, self._hears = protocol.Keyed(key, side), \
            protocol.Keyed(key, 'guest' if side == 'host' else 'host')
        self._said = self._heard = 0           # pieces
        self._received = bytearray()           # of a piece that isn't whole yet
        self.unsent = bytearray(opening)

    def fileno(self) -> int:
        """Of its connection."""
        return self._socket.fileno()

    def say(self, kind: bytes, offset: int, data: bytes = b'') -> None:
        """A piece; what finds no room is sent later by ``flush``. Raises OSError."""
        self._said += 1
        head = HEAD.pack(kind, offset, len(data))
        piece = b''.join((head, data, self._signature(self._says, self._said, head, data)))
        if self.unsent:
            self.unsent += piece
        else:
            self._send(piece)

    @staticmethod
    def _signature(keyed: Any, number: int, *piece: bytes) -> bytes:
        return keyed.digits(b'%d\n' % number, *piece)[:protocol.MAC_DIGITS].encode('ascii')       # type: ignore

    def flush(self) -> None:
        """Sends what there is room for. Raises OSError."""
        if self.unsent:
            data, self.unsent = bytes(self.unsent), bytearray()
            self._send(data)

    def _send(self, data: bytes) -> None:
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            with memoryview(data) as view:
                self.unsent += view[sent:]

    def hear(self) -> List[Piece]:
        """What has come. Raises OSError at the end, and for what the other side can't have said."""
        try:
            data = self._socket.recv(RECEIVE)
        except BlockingIOError:
            return []
        if not data:
            raise ConnectionResetError('the other side has left')
        self._received += data
        pieces = []
        while len(self._received) >= HEAD.size:
            kind, offset, length = HEAD.unpack_from(self._received)
            if length > LONGEST:
                raise ConnectionAbortedError('a piece of %d bytes' % length)
            end = HEAD.size + length
            if len(self._received) < end + protocol.MAC_DIGITS:
                break
            with memoryview(self._received) as received:
                piece = bytes(received[:end])
            signature = bytes(self._received[end:end + protocol.MAC_DIGITS])
            del self._received[:end + protocol.MAC_DIGITS]
            self._heard += 1
            if not hmac.compare_digest(signature, self._signature(self._hears, self._heard, piece)):
                raise ConnectionAbortedError('a piece that is not signed')
            pieces.append((kind, offset, piece[HEAD.size:]))
        return pieces

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()


def dial(address: Tuple[str, int], token: str, key: bytes, login: str, passcode: str) -> Shortcut:
    """The guest's end, on its way to the host's broker. Raises OSError."""
    family = socket.AF_INET6 if ':' in address[0] else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = connection.connect_ex(address)
        if code and not protocol.is_under_way(code):
            raise protocol.socket_error(code)
        headers = {'accept-version': '1.2', 'host': '/', HEADER: token}
        if login:
            headers.update(login=login, passcode=passcode)
        return Shortcut(connection, key, 'guest', protocol.encode('CONNECT', headers))
    except BaseException:
        connection.close()
        raise
