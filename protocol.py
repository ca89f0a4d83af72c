"""STOMP frames, the words that host and guests say to each other, and the link that carries them.

Three parts, each usable without the ones below it:

* the frame codec: bytes in, frames out, and back. STOMP 1.0, 1.1 and 1.2, no socket anywhere.
  The broker uses this part alone.
* the words: what a frame between our agents means. One class per word, one explicit table.
* ``Link``: an agent's STOMP connection. It connects, negotiates, beats, reconnects.

What it is not: a broker (stompbroker.py), or the knowledge of what to do about a word (the agents).

Threads: codec and words have none and keep no global state. A ``Link`` has one thread of its own,
named ``link``, on which all its callbacks run.

Sources: the STOMP specifications 1.0, 1.1 and 1.2 (sections are named where they matter), and
docs/protocol.md for the words.
"""

import collections
import errno
import fnmatch
import json
import logging
import math
import random
import re
import selectors
import socket
import threading
import time
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

VERSION = '1.0.0'      # of the project; all its files are released together
PROTO = 1              # of the words; HELLO carries it

log = logging.getLogger('vmhost.link')


class ProtocolError(Exception):
    """Base of this module's errors."""


class LocalError(ProtocolError):
    """We were asked to say something that can't be said."""


class RemoteError(ProtocolError):
    """The peer broke the rules; its connection can't go on."""


# --- frames ----------------------------------------------------------------------------------

CLIENT_COMMANDS = frozenset((
    'CONNECT', 'STOMP', 'SEND', 'SUBSCRIBE', 'UNSUBSCRIBE', 'ACK', 'NACK',
    'BEGIN', 'COMMIT', 'ABORT', 'DISCONNECT'))
SERVER_COMMANDS = frozenset(('CONNECTED', 'MESSAGE', 'RECEIPT', 'ERROR'))
# STOMP 1.2, Value Encoding: the frames that keep the rules of 1.0, so that both sides understand
# them before a version is agreed upon.
NEVER_ESCAPED = frozenset(('CONNECT', 'CONNECTED', 'STOMP'))

MAX_HEAD = 64 * 1024       # bytes of command and headers together
MAX_HEADERS = 1000         # header lines
MAX_BODY = 1024 * 1024     # bytes; Broker.max_frame overrides it
LONGEST_COMMAND = max(map(len, CLIENT_COMMANDS | SERVER_COMMANDS))


class WireFrame(NamedTuple):
    """A frame as it was on the wire: headers decoded, the first of repeated ones, body exact."""
    command: str
    headers: Dict[str, str]
    body: bytes


_UNESCAPED = {
    '1.1': {'\\n': '\n', '\\c': ':', '\\\\': '\\'},
    '1.2': {'\\n': '\n', '\\c': ':', '\\\\': '\\', '\\r': '\r'},
}
_ESCAPES = re.compile(r'\\.?', re.DOTALL)
_TO_ESCAPE = re.compile(r'[\\:\n\r]')
_ESCAPED = {
    # 1.0 knows no escapes: a line end would begin a new header, so it becomes a space.
    '1.0': {'\\': '\\', ':': ':', '\n': ' ', '\r': ' '},
    '1.1': {'\\': '\\\\', ':': '\\c', '\n': '\\n', '\r': '\r'},
    '1.2': {'\\': '\\\\', ':': '\\c', '\n': '\\n', '\r': '\\r'},
}


def escape(text: str, version: str) -> str:
    """The text as it stands in a header of that STOMP version (1.2, Value Encoding)."""
    if _TO_ESCAPE.search(text) is None:
        return text
    table = _ESCAPED[version]
    return _TO_ESCAPE.sub(lambda match: table[match.group()], text)


def unescape(text: str, version: str) -> str:
    """The inverse of escape. Raises RemoteError for an escape that the version doesn't define."""
    if version == '1.0' or '\\' not in text:
        return text
    table = _UNESCAPED[version]
    try:
        return _ESCAPES.sub(lambda match: table[match.group()], text)
    except KeyError as unknown:
        raise RemoteError('undefined escape %s in a header' % unknown)


def encode_head(command: str, headers: Iterable[Tuple[str, str]], version: str) -> bytes:
    """Command, headers and the blank line as bytes.

    Raises LocalError where a NUL or, in a frame without escapes, a line end stands in a header.
    """
    plain = command in NEVER_ESCAPED
    lines = [command]
    for name, value in headers:
        if plain:
            if '\n' in name or '\n' in value or ':' in name:
                raise LocalError('line end or colon in header %r of %s' % (name, command))
        else:
            name, value = escape(name, version), escape(value, version)
        lines.append(name + ':' + value)
    lines.append('\n')
    head = '\n'.join(lines)
    if '\0' in head:
        raise LocalError('NUL in a header of %s' % command)
    return head.encode('utf-8', 'replace')


def encode(command: str, headers: Dict[str, str], body: bytes = b'', version: str = '1.2') -> bytes:
    """A whole frame as bytes, with content-length where it has a body.

    The newline behind the NUL is for clients that read by lines (stomper waits for it).
    """
    if body or command in ('SEND', 'MESSAGE', 'ERROR'):
        headers = dict(headers)
        headers['content-length'] = str(len(body))
    return b'%b%b\0\n' % (encode_head(command, headers.items(), version), body)


class FrameReader:
    """Takes bytes as they come, gives frames: ``feed``, then ``next_frame`` until it gives None.

    Linear in the bytes however they are cut: each search resumes where the last one stopped.
    Nothing is kept beyond the limits; a peer that passes one gets a RemoteError, after which the
    reader is of no more use. ``version`` may be set between two frames, since the frames right
    behind a CONNECT can stand in the same segment. Not safe for several threads at once.

    >>> reader = FrameReader(CLIENT_COMMANDS, '1.2')
    >>> reader.feed(b'SEND\\ndestination:/topic/a\\n\\nhello\\0')
    >>> reader.next_frame().body
    b'hello'
    """

    # The end of a head: a blank line; or NUL where a header line would begin, for stomper's
    # DISCONNECT (the specification's own example) has no blank line.
    _head_end = re.compile(b'\n(?:\r?\n|\0)')
    _line_ends = re.compile(b'[\r\n]*')
    _length = re.compile('[0-9]{1,18}')

    def __init__(self, commands: Iterable[str], version: str = '1.0', max_head: int = MAX_HEAD,
                 max_headers: int = MAX_HEADERS, max_body: int = MAX_BODY) -> None:
        self.version = version
        self._commands = frozenset(commands)
        self._max_head = max_head
        self._max_headers = max_headers
        self._max_body = max_body
        self._buffer = bytearray()
        self._searched = 0                 # the buffer holds no end of what is looked for up to here
        self._head = None                  # type: Optional[Tuple[str, Dict[str, str]]]
        self._body_length = None           # type: Optional[int]

    @property
    def in_frame(self) -> bool:
        """Whether a frame has begun and not ended."""
        return self._head is not None or bool(self._buffer)

    def feed(self, data: bytes) -> None:
        """Takes bytes from the peer; ``next_frame`` looks at them."""
        self._buffer += data

    def next_frame(self) -> Optional[WireFrame]:
        """The next whole frame, or None. Raises RemoteError."""
        if self._head is None and not self._read_head():
            return None
        if self._head is None:
            return None
        return self._read_body()

    def _read_head(self) -> bool:
        """Whether a head was found; ``_head`` is set then."""
        buffer = self._buffer
        if not self._searched:
            self._skip_line_ends()
        match = self._head_end.search(buffer, max(0, self._searched - 2))
        if match is None:
            self._searched = len(buffer)
            self._check_unfinished_head()
            return False
        end = match.start()
        if end > self._max_head:
            raise RemoteError('head of more than %d bytes' % self._max_head)
        head = bytes(buffer[:end])
        # A NUL that stands for the blank line is the end of the body, too: it stays.
        del buffer[:match.end() - (buffer[match.end() - 1] == 0)]
        self._searched = 0
        self._parse_head(head)
        return True

    def _skip_line_ends(self) -> None:
        """Drops heart-beats and the line ends that may follow a frame."""
        del self._buffer[:self._line_ends.match(self._buffer).end()]  # type: ignore[union-attr]

    def _check_unfinished_head(self) -> None:
        buffer = self._buffer
        if len(buffer) > self._max_head:
            raise RemoteError('head of more than %d bytes' % self._max_head)
        if len(buffer) > LONGEST_COMMAND + 2 or b'\n' in buffer:
            command = bytes(buffer[:LONGEST_COMMAND + 3]).partition(b'\n')[0].rstrip(b'\r')
            self._check_command(command.decode('utf-8', 'replace'))

    def _check_command(self, command: str) -> None:
        if command not in self._commands:
            raise RemoteError('unknown command %.40r' % command)

    def _parse_head(self, head: bytes) -> None:
        try:
            lines = head.decode('utf-8').split('\n')
        except UnicodeDecodeError:
            raise RemoteError('headers are not UTF-8')
        command = lines[0].rstrip('\r')
        self._check_command(command)
        if len(lines) - 1 > self._max_headers:
            raise RemoteError('more than %d headers' % self._max_headers)
        if '\0' in lines[-1] or b'\0' in head:
            raise RemoteError('NUL in the headers of %s' % command)
        self._head = command, self._parse_headers(command, lines[1:])
        self._body_length = self._parse_length(self._head[1].get('content-length'))

    def _parse_headers(self, command: str, lines: List[str]) -> Dict[str, str]:
        """Name and value of each line; of a repeated name the first (1.2, Repeated Headers)."""
        version = self.version
        plain = version == '1.0' or command in NEVER_ESCAPED
        strip_cr = version == '1.2' or plain
        headers = {}  # type: Dict[str, str]
        for line in lines:
            if strip_cr and line.endswith('\r'):
                line = line[:-1]
            name, colon, value = line.partition(':')
            if not colon or not name:
                raise RemoteError('header line without name and colon: %.80r' % line)
            if not plain and '\\' in line:
                name, value = unescape(name, version), unescape(value, version)
            if name not in headers:
                headers[name] = value
        if plain and 'accept-version' not in headers and 'version' not in headers:
            # The examples of STOMP 1.0 pad; 1.1 and 1.2 forbid to trim.
            headers = {name.strip(): value.strip() for name, value in headers.items()}
        return headers

    def _parse_length(self, text: Optional[str]) -> Optional[int]:
        if text is None:
            return None
        if self._length.fullmatch(text.strip()) is None:
            raise RemoteError('content-length is no number: %.40r' % text)
        length = int(text)
        if length > self._max_body:
            raise RemoteError('body of %d bytes; at most %d are taken' % (length, self._max_body))
        return length

    def _read_body(self) -> Optional[WireFrame]:
        buffer = self._buffer
        length = self._body_length
        if length is None:
            length = buffer.find(b'\0', self._searched)
            if length < 0:
                self._searched = len(buffer)
                length = len(buffer)
                self._check_body(length)
                return None
            self._check_body(length)
        elif len(buffer) <= length:
            return None
        elif buffer[length]:
            raise RemoteError('body is longer than its content-length of %d' % length)
        body = bytes(memoryview(buffer)[:length]) if length else b''
        del buffer[:length + 1]
        assert self._head is not None
        command, headers = self._head
        self._head = None
        self._searched = 0
        return WireFrame(command, headers, body)

    def _check_body(self, length: int) -> None:
        if length > self._max_body:
            raise RemoteError('body of more than %d bytes' % self._max_body)
