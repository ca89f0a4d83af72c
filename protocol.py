"""STOMP frames, the words that host and guests say to each other, and the link that carries them.

Four parts, each usable without the ones below it:

* the frame codec: bytes in, frames out, and back. STOMP 1.0, 1.1 and 1.2, no socket anywhere.
  The broker uses this part alone.
* the words: what a frame between our agents means. One class per word, one explicit table.
* trust: ids, the proof that a host gives a guest, the signatures of words. Pure: bytes in, bytes out.
* ``Link``: an agent's STOMP connection. It connects, negotiates, beats, reconnects.

What it is not: a broker (stompbroker.py), or the knowledge of what to do about a word (the agents).

Threads: codec, words and trust have none and keep no global state. A ``Link`` has one thread of its own,
named ``link``, on which all its callbacks run.

Sources: the STOMP specifications 1.0, 1.1 and 1.2 (sections are named where they matter), and
docs/protocol.md for the words and their signatures.
"""

import binascii
import contextlib
import errno
import fnmatch
import hashlib
import hmac
import json
import logging
import math
import os
import re
import selectors
import socket
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

PROTO = 2              # of the words; HELLO carries it

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
MAX_KNOWN = 2048           # bytes of a head that is kept, since the next one may be the same
MOST_KNOWN = 20            # its headers
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
_NAMES_VERSION = re.compile(r'\s*(?:accept-)?version\s*:')
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


def header_lines(headers: List[Tuple[str, str]], version: str) -> List[str]:
    """``name:value`` of each, escaped as that STOMP version has it."""
    text = '\0'.join(map(''.join, headers))       # one look at all of them, as a rule
    if not ('\\' in text or ':' in text or '\n' in text or '\r' in text):
        return [name + ':' + value for name, value in headers]
    return [escape(name, version) + ':' + escape(value, version) for name, value in headers]


def encode_head(command: str, headers: Iterable[Tuple[str, str]], version: str) -> bytes:
    """Command, headers and the blank line as bytes.

    Raises LocalError where a NUL or, in a frame without escapes, a line end stands in a header.
    """
    headers = list(headers)
    if command in NEVER_ESCAPED:
        for name, value in headers:
            if '\n' in name or '\n' in value or ':' in name:
                raise LocalError('line end or colon in header %r of %s' % (name, command))
        lines = [name + ':' + value for name, value in headers]
    else:
        lines = header_lines(headers, version)
    head = '\n'.join([command] + lines + ['\n'])
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


def size_of(headers: Dict[str, str]) -> int:
    """Bytes of memory that they take: a thousand short ones take thirty times their texts. Each text is
    rounded up, by some 8 bytes, to what Python's allocator gives."""
    texts = sum(map(sys.getsizeof, headers)) + sum(map(sys.getsizeof, headers.values()))
    return sys.getsizeof(headers) + 16 * len(headers) + texts


class FrameReader:
    """Takes bytes as they come, gives frames: ``feed``, then ``next_frame`` until it gives None.

    Linear in the bytes however they are cut: each search resumes where the last one stopped.
    Nothing is kept beyond the limits; a peer that passes one gets a RemoteError, after which the
    reader is of no more use. ``version`` and ``max_body`` may be set between two frames, since the
    frames right behind a CONNECT can stand in the same segment. Not safe for several threads at once.

    >>> reader = FrameReader(CLIENT_COMMANDS, '1.2')
    >>> reader.feed(b'SEND\\ndestination:/topic/a\\n\\nhello\\0')
    >>> reader.next_frame().body
    b'hello'
    """

    # The end of a head: a blank line; or NUL where a header line would begin, for stomper's
    # DISCONNECT (the specification's own example) has no blank line.
    _head_end = re.compile(b'\n(?:\r?\n|\0)')
    _line_ends = re.compile(b'[\r\n]*')
    _receipt = re.compile('\nreceipt:([^\n\0]*)(?=\n|$)')
    _length = re.compile('[0-9]{1,18}')

    def __init__(self, commands: Iterable[str], version: str = '1.0', max_head: int = MAX_HEAD,
                 max_headers: int = MAX_HEADERS, max_body: int = MAX_BODY) -> None:
        self._known = None                 # type: Optional[Tuple[bytes, str, str, Dict[str, str], Optional[int]]]
        self.version = version
        self.max_body = max_body
        self.refused = None                # type: Optional[WireFrame]
        self._commands = frozenset(commands)
        self._max_head = max_head
        self._max_headers = max_headers
        self._buffer = bytearray()
        self._searched = 0                 # the buffer holds no end of what is looked for up to here
        self._head = None                  # type: Optional[Tuple[str, Dict[str, str]]]
        self._body_length = None           # type: Optional[int]

    @property
    def held(self) -> int:
        """Bytes that wait for the rest of their frame."""
        if self._head is None:
            return len(self._buffer)
        return len(self._buffer) + size_of(self._head[1])

    def feed(self, data: bytes) -> None:
        """Takes bytes from the peer; ``next_frame`` looks at them."""
        self._buffer += data

    def next_frame(self) -> Optional[WireFrame]:
        """The next whole frame, or None.

        Raises RemoteError. ``refused`` is the frame that caused it, then, as far as it was understood.
        """
        if self._head is None and not self._read_head():
            return None
        return self._read_body()

    def _read_head(self) -> bool:
        """Whether a head was found; ``_head`` is set then."""
        buffer = self._buffer
        if not self._searched:
            if buffer and buffer[0] < 32:
                self._skip_line_ends()
            if self._is_known():
                return True
            if not buffer:
                return False
        resumed = max(0, self._searched - 2)
        end, after = self._find_head_end(resumed)
        if end < 0:
            self._searched = len(buffer)
            self._check_unfinished_head(resumed)
            return False
        if end > self._max_head:
            raise RemoteError('head of more than %d bytes' % self._max_head)
        raw = bytes(buffer[:after])
        # A NUL that stands for the blank line is the end of the body, too: it stays.
        del buffer[:after - (raw[-1] == 0)]
        self._searched = 0
        self._parse_head(raw[:end])
        self._remember(raw)
        return True

    def _find_head_end(self, resumed: int) -> Tuple[int, int]:
        """Where the head ends, and what follows it begins; -1 where its end isn't there yet."""
        buffer = self._buffer
        end = buffer.find(b'\n\n', resumed, self._max_head + 2)
        # Mostly that is it; else there may be another one before it.
        if end >= 0 and buffer.find(b'\n\r', resumed, end) < 0 and buffer.find(b'\0', resumed, end) < 0:
            return end, end + 2
        match = self._head_end.search(buffer, resumed)
        return (-1, -1) if match is None else match.span()

    def _remember(self, raw: bytes) -> None:
        """A client often sends the same head again: it is parsed once."""
        assert self._head is not None
        command, headers = self._head
        if raw[-1] and len(raw) <= MAX_KNOWN and len(headers) <= MOST_KNOWN:
            self._known = raw, self.version, command, headers.copy(), self._body_length

    def _is_known(self) -> bool:
        """Whether the buffer begins with the head of the last frame; ``_head`` is set then."""
        if self._known is None or not self._buffer.startswith(self._known[0]):
            return False
        raw, version, command, headers, self._body_length = self._known
        if version != self.version:
            return False
        del self._buffer[:len(raw)]
        self._head = command, headers.copy()     # whoever gets a frame may change its headers
        return True

    def _skip_line_ends(self) -> None:
        """Drops heart-beats and the line ends that may follow a frame."""
        if self._buffer[0] == 10 and len(self._buffer) > 1 and self._buffer[1] >= 32:      # just one, mostly
            del self._buffer[:1]
            return
        del self._buffer[:self._line_ends.match(self._buffer).end()]  # type: ignore[union-attr]

    def _check_unfinished_head(self, resumed: int) -> None:
        """What can't become a head is refused at once: its rest may never come."""
        buffer = self._buffer
        if len(buffer) > self._max_head:
            raise RemoteError('head of more than %d bytes' % self._max_head)
        command, line_end, _ = bytes(buffer[:LONGEST_COMMAND + 3]).partition(b'\n')
        text = command.decode('utf-8', 'replace').rstrip('\r')
        if line_end or not any(known.startswith(text) for known in self._commands):
            self._check_command(text)
        if buffer.find(b'\0', resumed) >= 0:
            raise RemoteError('NUL in the headers of %s' % text)

    def _check_command(self, command: str) -> None:
        if command not in self._commands:
            raise RemoteError('unknown command %.40r' % command)

    def _parse_head(self, head: bytes) -> None:
        try:
            text = head.decode('utf-8')
        except UnicodeDecodeError:
            raise RemoteError('headers are not UTF-8')
        lines = text.split('\n')
        command = lines[0].rstrip('\r')
        try:
            self._check_command(command)
            if len(lines) - 1 > self._max_headers:
                raise RemoteError('more than %d headers' % self._max_headers)
            if '\0' in text:
                raise RemoteError('NUL in the headers of %s' % command)
            headers = self._parse_headers(command, lines[1:])
            self._body_length = self._parse_length(headers.get('content-length'))
        except RemoteError:
            self._remember_refused(command, text)
            raise
        self._head = command, headers

    def _remember_refused(self, command: str, text: str) -> None:
        """An answer to a frame that can't be parsed names its receipt all the same."""
        headers = {}  # type: Dict[str, str]
        found = self._receipt.search(text)
        if found is not None:
            with contextlib.suppress(RemoteError):
                receipt = unescape(found.group(1).rstrip('\r'), self.version)
                headers['receipt'] = receipt.strip() if self.version == '1.0' else receipt
        self.refused = WireFrame(command, headers, b'')

    def _parse_headers(self, command: str, lines: List[str]) -> Dict[str, str]:
        """Name and value of each line; of a repeated name the first (1.2, Repeated Headers)."""
        version = self.version
        plain = version == '1.0' or command in NEVER_ESCAPED
        strip_cr = version == '1.2' or plain
        # The examples of STOMP 1.0 pad; 1.1 and 1.2 forbid to trim, and CONNECT may be theirs.
        padded = plain and (command not in NEVER_ESCAPED or not any(map(_NAMES_VERSION.match, lines)))
        headers = {}  # type: Dict[str, str]
        for line in lines:
            if strip_cr and line.endswith('\r'):
                line = line[:-1]
            name, colon, value = line.partition(':')
            if not colon or not name:
                raise RemoteError('header line without name and colon: %.80r' % line)
            if not plain and '\\' in line:
                name, value = unescape(name, version), unescape(value, version)
            elif padded:
                name, value = name.strip(), value.strip()
            if name not in headers:
                headers[name] = value
        return headers

    def _parse_length(self, text: Optional[str]) -> Optional[int]:
        if text is None:
            return None
        # isdigit alone takes figures of other scripts as well.
        if not (text.isdigit() and text.encode('utf-8').isdigit() and len(text) <= 18) \
                and self._length.fullmatch(text.strip()) is None:
            raise RemoteError('content-length is no number: %.40r' % text)
        length = int(text)
        if length > self.max_body:
            raise RemoteError('body of %d bytes; at most %d are taken' % (length, self.max_body))
        return length

    def _read_body(self) -> Optional[WireFrame]:
        buffer = self._buffer
        length = self._body_length
        assert self._head is not None
        command, headers = self._head
        if length is None:
            length = buffer.find(b'\0', self._searched)
            if (length if length >= 0 else len(buffer)) > self.max_body:
                self._refuse_body('body of more than %d bytes' % self.max_body)
            if length < 0:
                self._searched = len(buffer)
                return None
        elif len(buffer) <= length:
            return None
        elif buffer[length]:
            self._refuse_body('body is longer than its content-length of %d' % length)
        body = bytes(memoryview(buffer)[:length]) if length else b''
        del buffer[:length + 1]
        self._head = None
        self._searched = 0
        return WireFrame(command, headers, body)

    def _refuse_body(self, why: str) -> None:
        assert self._head is not None
        command, headers = self._head
        self.refused = WireFrame(command, headers, b'')
        raise RemoteError(why)


# --- words -----------------------------------------------------------------------------------

CONNECTIONS = '/topic/connections'       # guest -> host: HELLO BYE STILL_ALIVE
CMD_REQUESTS = '/topic/cmd_requests'     # host -> guests
CMD_RESPONSES = '/topic/cmd_responses'   # guest -> host

HEADERS_LIMIT = 8 * 1024   # bytes of args and env that may stand in headers, a quarter of it of cmd and path
                           # each; more goes into JSON
LONGEST_INTEGER = 24       # digits; int() of a megabyte of digits would take a guest's minute
STREAM = 'stream'      # as CMD_RUN's stdin: CMD_INPUT brings it
RUSAGE_FIELDS = (
    'ru_utime', 'ru_stime', 'ru_maxrss', 'ru_ixrss', 'ru_idrss', 'ru_isrss', 'ru_minflt',
    'ru_majflt', 'ru_nswap', 'ru_inblock', 'ru_oublock', 'ru_msgsnd', 'ru_msgrcv', 'ru_nsignals',
    'ru_nvcsw', 'ru_nivcsw')


class BadWord(RemoteError):
    """A body that is no word, or a word whose headers or keys can't be used."""


def _refuse_constant(text: str) -> None:
    raise ValueError('%s is no JSON' % text)


def _read_integer(text: str) -> Any:
    return int(text) if len(text) <= LONGEST_INTEGER else float(text)


# Made once: json.loads and json.dumps would make new ones for each word.
_DECODER = json.JSONDecoder(parse_int=_read_integer, parse_constant=_refuse_constant)
_ENCODER = json.JSONEncoder(separators=(',', ':'), sort_keys=True)


def read_json(text: str) -> Any:
    """The value of a JSON text from a peer. Raises ValueError for whatever is wrong with it."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError('JSON nested too deeply')


def write_json(value: Any) -> str:
    """One line of JSON in ASCII, so that neither line ends nor odd characters can stand in it."""
    return _ENCODER.encode(value)


class Plain(str):
    """Text in which JSON escapes nothing, base64 say: it isn't searched for what it can't hold."""


def write_object(keys: Dict[str, Any]) -> str:
    """The same for an object; as fast as can be where it holds much Plain text."""
    plain = {name: value for name, value in keys.items() if isinstance(value, Plain)}
    if not plain:
        return write_json(keys)
    rest = {name: value for name, value in keys.items() if name not in plain}
    text = write_json(rest) if rest else '{}'
    members = ','.join(['"%s":"%s"' % item for item in plain.items()])
    return '%s%s%s}' % (text[:-1], ',' if len(keys) > len(plain) else '', members)


class Message:
    """A word with what it says: ``headers`` (text) and ``keys`` (the JSON object's values).

    The accessors never fail on what a peer sent but by BadWord, which names the header or key.
    """

    __slots__ = ('topic', 'word', 'headers', 'keys')

    def __init__(self, topic: str, word: str, headers: Optional[Dict[str, str]] = None,
                 keys: Optional[Dict[str, Any]] = None) -> None:
        self.topic = topic
        self.word = word
        self.headers = headers or {}
        self.keys = keys or {}

    def body(self) -> bytes:
        """``WORD``, or ``WORD`` space one-line JSON object."""
        text = self.word + ' ' + write_object(self.keys) if self.keys else self.word
        return text.encode('utf-8')

    def get(self, name: str, default: Any = None) -> Any:
        """What the word says under that name; a JSON key overrides the header, null is as good as none."""
        value = self.keys.get(name)
        return self.headers.get(name, default) if value is None else value

    def text(self, name: str, default: str = '') -> str:
        """The same, as text. Raises BadWord where it is neither text nor a number."""
        value = self.get(name, default)
        if isinstance(value, str):
            # Half of a surrogate pair can be written in JSON, and breaks whatever encodes it later.
            return value.encode('utf-8', 'replace').decode('utf-8')
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        raise BadWord('%s: %s should be text' % (self.word, name))

    def number(self, name: str, default: float = 0) -> float:
        """The same, as a finite number. Raises BadWord."""
        value = self.get(name, default)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise BadWord('%s: %s should be a number' % (self.word, name))
        if isinstance(value, bool) or not isinstance(value, (int, float)) \
                or not math.isfinite(value):
            raise BadWord('%s: %s should be a number' % (self.word, name))
        return value

    def flag(self, name: str) -> bool:
        """The same, as true or false; false where there is none. Raises BadWord."""
        value = self.get(name, False)
        if value in (True, False):
            return bool(value)
        if isinstance(value, str) and value.lower() in ('true', 'yes', '1', 'false', 'no', '0', ''):
            return value.lower() in ('true', 'yes', '1')
        raise BadWord('%s: %s should be true or false' % (self.word, name))

    def mapping(self, name: str) -> Dict[str, Any]:
        """A JSON object, from a key or from a header's text; {} where there is none."""
        return self._structure(name, dict, 'object')

    def sequence(self, name: str) -> List[Any]:
        """A JSON array, from a key or from a header's text; [] where there is none."""
        return self._structure(name, list, 'array')

    def _structure(self, name: str, kind: Any, noun: str) -> Any:
        value = self.get(name)
        if value is None or value == '':
            return kind()
        if isinstance(value, str):
            try:
                value = read_json(value)
            except ValueError:
                value = None
        if not isinstance(value, kind):
            raise BadWord('%s: %s should be a JSON %s' % (self.word, name, noun))
        return value


REPEATED = 'cmd-id', 'ping-id'             # what an answer repeats as a header


def interpret(headers: Dict[str, str], body: str, topic: str = '') -> Message:
    """The message in a frame. Raises BadWord where the body is no word with a JSON object, or where
    an answer couldn't repeat what it has to."""
    message = _interpret(headers, body, topic)
    for name in REPEATED:
        value = message.get(name)
        if isinstance(value, str) and ('\n' in value or '\0' in value):
            raise BadWord('%s: a line end or NUL in %s' % (message.word, name))
    return message


def _interpret(headers: Dict[str, str], body: str, topic: str) -> Message:
    word, _, text = body.partition(' ')
    if not word or len(word) > 64:
        raise BadWord('no word: %.40r' % body)
    text = text.strip()
    if not text:
        return Message(topic, word, headers)
    try:
        keys = read_json(text)
    except ValueError as error:
        raise BadWord('%.64s: broken JSON: %s' % (word, error))
    if not isinstance(keys, dict):
        raise BadWord('%.64s: JSON, but no object' % word)
    return Message(topic, word, headers, keys)


def is_addressed(to: str, machine_id: str, name: str) -> bool:
    """Whether a header ``to`` means that machine: its id, its name, a glob of either, or ``*``."""
    if to in ('*', machine_id, name):
        return bool(to)
    return fnmatch.fnmatchcase(name, to) or fnmatch.fnmatchcase(machine_id, to)


class HELLO:
    """A guest tells that it is there, and its facts; a host greets it, or asks who is there."""
    listeners = ('host', 'guest')

    @staticmethod
    def howToSay(id: str, ip: str, **facts: Any) -> Message:
        """By a guest. Facts: nonce secret proto host name boot session chirp os python cpus mem cmds."""
        # What the host shows as clockOffset.
        facts.update(proto=PROTO, timestamp=round(time.time(), 3))
        return Message(CONNECTIONS, 'HELLO', {'id': id, 'ip': ip}, facts)

    @staticmethod
    def howToGreet(to: str, **keys: Any) -> Message:
        """By the host. Keys: nonce, key, proof, name, beacon_interval, session, addresses; or refused."""
        return Message(CMD_REQUESTS, 'HELLO', {'to': to}, keys)

    @staticmethod
    def listenAndAct(agent: Any, message: Message) -> None:
        agent.heard_hello(message)


class BYE:
    """A guest goes, or the host does."""
    listeners = ('host', 'guest')

    @staticmethod
    def howToSay(id: str, ip: str, reason: str = '') -> Message:
        return Message(CONNECTIONS, 'BYE', {'id': id, 'ip': ip}, {'reason': reason})

    @staticmethod
    def howToLeave(to: str, reason: str = '') -> Message:
        """By the host, to each guest."""
        return Message(CMD_REQUESTS, 'BYE', {'to': to, 'id': 'host', 'ip': ''}, {'reason': reason})

    @staticmethod
    def listenAndAct(agent: Any, message: Message) -> None:
        agent.heard_bye(message)


class STILL_ALIVE:
    """A guest's beacon."""
    listeners = ('host',)

    @staticmethod
    def howToSay(id: str, ip: str, **load: Any) -> Message:
        """Load: load1, mem_free and disk_free in bytes, running, uptime in seconds."""
        load['timestamp'] = round(time.time(), 3)      # its clock may be set after its HELLO
        return Message(CONNECTIONS, 'STILL_ALIVE', {'id': id, 'ip': ip}, load)

    @staticmethod
    def listenAndAct(agent: Any, message: Message) -> None:
        agent.heard_still_alive(message)


class PING:
    """The host asks whether a guest answers."""
    listeners = ('guest',)

    @staticmethod
    def howToSay(to: str, ping_id: str) -> Message:
        return Message(CMD_REQUESTS, 'PING', {'to': to, 'ping-id': ping_id})

    @staticmethod
    def listenAndAct(agent: Any, message: Message) -> None:
        agent.say(PONG.howToSay(message.text('ping-id')))


class PONG:
    """A guest answers PING."""
    listeners = ('host',)

    @staticmethod
    def howToSay(ping_id: str) -> Message:
        return Message(CMD_RESPONSES, 'PONG', {'ping-id': ping_id}, {'time': time.time()})

    @staticmethod
    def listenAndAct(agent: Any, message: Message) -> None:
        agent.heard_pong(message)


class CMD_RUN:
    """The host asks for a command to be run, at most once per cmd-id."""
    listeners = ('guest',)

    @staticmethod
    def howToSay(to: str, cmd_id: str, cmd: str, args: List[str], env: Dict[str, str],
                 path: str = '', **options: Any) -> Message:
        """Options: the JSON keys of docs/protocol.md, such as stdin, timeout and limits."""
        headers = {'to': to, 'cmd-id': cmd_id}
        keys = dict(options)
        for name, text in (('cmd', cmd), ('path', path)):
            # A header with a line end can't be signed, brokers don't agree on spaces at the ends, and a head
            # that is too long ends the connection of who gets it, each time it comes.
            odd = text != text.strip() or '\n' in text or len(text) > HEADERS_LIMIT // 4
            (keys if odd else headers)[name] = text
        texts = {'args': write_json(args), 'env': write_json(env)}
        if sum(map(len, texts.values())) > HEADERS_LIMIT:
            keys.update(args=args, env=env)
        else:
            headers.update(texts)
        return Message(CMD_REQUESTS, 'CMD_RUN', headers, keys)

    @staticmethod
    def listenAndAct(agent: Any, message: Message) -> None:
        agent.heard_cmd_run(message)


class CMD_STATUS:
    """A guest tells how far a command is."""
    listeners = ('host',)

    @staticmethod
    def howToSay(cmd_id: str, state: str, **keys: Any) -> Message:
        return Message(CMD_RESPONSES, 'CMD_STATUS', {'cmd-id': cmd_id}, dict(keys, state=state))

    @staticmethod
    def listenAndAct(agent: Any, message: Message) -> None:
        agent.heard_cmd_status(message)


class CMD_QUERY:
    """The host asks how far a command is, and for a slice of its output."""
    listeners = ('guest',)

    @staticmethod
    def howToSay(to: str, cmd_id: str, **keys: Any) -> Message:
        """Keys: out-offset, err-offset, max (bytes of each), follow (seconds in which new output is told)."""
        return Message(CMD_REQUESTS, 'CMD_QUERY', {'to': to, 'cmd-id': cmd_id}, keys)

    @staticmethod
    def listenAndAct(agent: Any, message: Message) -> None:
        agent.heard_cmd_query(message)


class CMD_SIGNAL:
    """The host sends a signal to all processes of a command."""
    listeners = ('guest',)

    @staticmethod
    def howToSay(to: str, cmd_id: str, signal: str, cancel: bool = False) -> Message:
        """cancel: should the guest not know the command, it must not run when its CMD_RUN still comes."""
        return Message(CMD_REQUESTS, 'CMD_SIGNAL', {'to': to, 'cmd-id': cmd_id, 'signal': signal},
                       {'cancel': True} if cancel else {})

    @staticmethod
    def listenAndAct(agent: Any, message: Message) -> None:
        agent.heard_cmd_signal(message)


class CMD_INPUT:
    """The host hands a command the next piece of its input, the end of it, or the size of its terminal."""
    listeners = ('guest',)

    @staticmethod
    def howToSay(to: str, cmd_id: str, offset: int, data: bytes = b'', **keys: Any) -> Message:
        """offset: of the data in the whole input, so that none is taken twice. Keys: eof, rows, columns."""
        if data:
            keys['data64'] = Plain(binascii.b2a_base64(data, newline=False), 'ascii')
        return Message(CMD_REQUESTS, 'CMD_INPUT', {'to': to, 'cmd-id': cmd_id, 'offset': str(offset)}, keys)

    @staticmethod
    def listenAndAct(agent: Any, message: Message) -> None:
        agent.heard_cmd_input(message)


class CMD_RESULTS:
    """A guest tells the end of a command, until CMD_ACK."""
    listeners = ('host',)

    @staticmethod
    def howToSay(cmd_id: str, results: Dict[str, Any]) -> Message:
        return Message(CMD_RESPONSES, 'CMD_RESULTS', {'cmd-id': cmd_id}, results)

    @staticmethod
    def listenAndAct(agent: Any, message: Message) -> None:
        agent.heard_cmd_results(message)


class CMD_ACK:
    """The host has the results safe; or nobody will ask for them any more."""
    listeners = ('guest',)

    @staticmethod
    def howToSay(to: str, cmd_id: str, forget: bool = False) -> Message:
        return Message(CMD_REQUESTS, 'CMD_ACK', {'to': to, 'cmd-id': cmd_id},
                       {'forget': True} if forget else {})

    @staticmethod
    def listenAndAct(agent: Any, message: Message) -> None:
        agent.heard_cmd_ack(message)


# The one table: a peer can name a word in it, and nothing else.
WORDS = {
    'HELLO': HELLO,
    'BYE': BYE,
    'STILL_ALIVE': STILL_ALIVE,
    'PING': PING,
    'PONG': PONG,
    'CMD_RUN': CMD_RUN,
    'CMD_STATUS': CMD_STATUS,
    'CMD_QUERY': CMD_QUERY,
    'CMD_SIGNAL': CMD_SIGNAL,
    'CMD_INPUT': CMD_INPUT,
    'CMD_RESULTS': CMD_RESULTS,
    'CMD_RESULT': CMD_RESULTS,     # an older guest's spelling
    'CMD_ACK': CMD_ACK,
}  # type: Dict[str, Any]


def hear(agent: Any, message: Message) -> None:
    """Lets the word act on the agent (``agent.side`` is 'host' or 'guest').

    A word that isn't in the table, or isn't for this side, is AINT: ``agent.heard_aint``.
    """
    word = WORDS.get(message.word)
    if word is None or agent.side not in word.listeners:
        agent.heard_aint(message)
    else:
        word.listenAndAct(agent, message)


# --- trust -----------------------------------------------------------------------------------

NONCE_SIZE = 16            # bytes; 32 hexadecimal digits, which enter proof and key as they are written
MAC_DIGITS = 32
WINDOW = 64                # words by which one may be overtaken by others
# Headers that are not signed: those of STOMP and of the signature itself, …
UNSIGNED = frozenset(('seq', 'mac', 'destination', 'subscription', 'message-id', 'ack', 'content-length',
                      'content-type', 'receipt'))
# … and those that some brokers write or write over. Nothing acts on any of them.
BROKERS_OWN = UNSIGNED | {
    'timestamp', 'expires', 'expiration', 'priority', 'persistent', 'redelivered', 'reply-to', 'type',
    'correlation-id', 'user-id', 'app-id', 'cluster-id', 'content-encoding', 'original-destination',
    'transaction'}

_MAC_ADDRESS = re.compile('(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}')
_PLAIN_ID = re.compile('[A-Za-z0-9][A-Za-z0-9._-]{0,63}')
_NONCE = re.compile('[0-9a-f]{32}')
_SECRET = re.compile('[0-9A-Fa-f]{64}')
_SEQ = re.compile('[1-9][0-9]{0,17}')


class Untrusted(ProtocolError):
    """A word without the signature of whom it is said to be from, or one that was heard before."""


def is_mac(text: str) -> bool:
    """Whether it is a MAC address with colons."""
    return _MAC_ADDRESS.fullmatch(text) is not None


def read_id(text: str) -> str:
    """A guest's id in its one form: a MAC in upper case, or a name as it is. Raises BadWord for all else."""
    if is_mac(text):
        return text.upper()
    if _PLAIN_ID.fullmatch(text) is None:
        raise BadWord('no id: %.80r' % text)
    return text


def guest_id(value: str) -> str:
    """A guest's id as it is configured, or auto. Raises ValueError."""
    try:
        return read_id(value)
    except BadWord:
        raise ValueError('auto, a MAC address, or 1 to 64 of the characters A-Z a-z 0-9 . _ - with a '
                         'letter or digit first')


def new_nonce() -> str:
    """A fresh nonce, as HELLO carries it."""
    return os.urandom(NONCE_SIZE).hex()


def read_nonce(text: str) -> str:
    """A nonce from a peer. Raises BadWord."""
    if _NONCE.fullmatch(text) is None:
        raise BadWord('HELLO: nonce should be %d hexadecimal digits in lower case' % (2 * NONCE_SIZE))
    return text


def read_secret(text: str) -> bytes:
    """A secret that a guest tells. Raises BadWord, which doesn't show it."""
    if _SECRET.fullmatch(text) is None:
        raise BadWord('a secret should be 64 hexadecimal digits')
    return bytes.fromhex(text)


def _keyed(key: bytes, *lines: str) -> Any:
    return hmac.new(key, '\n'.join(lines).encode('utf-8'), hashlib.sha256)


def secret_id(secret: bytes, machine_id: str) -> str:
    """What names a secret of that guest, and tells nothing of it: 16 hexadecimal digits."""
    return str(_keyed(secret, 'id', machine_id).hexdigest()[:16])


def host_proof(secret: bytes, machine_id: str, guest_nonce: str, host_nonce: str) -> str:
    """By what a host shows a guest that it knows the guest's secret: 64 hexadecimal digits."""
    return _keyed(secret, 'host', machine_id, guest_nonce, host_nonce).hexdigest()


def is_proof(proof: str, secret: bytes, machine_id: str, guest_nonce: str, host_nonce: str) -> bool:
    """Whether that is the proof, compared in constant time."""
    expected = host_proof(secret, machine_id, guest_nonce, host_nonce)
    return hmac.compare_digest(proof.encode('utf-8', 'replace'), expected.encode('ascii'))


def session_key(secret: bytes, machine_id: str, guest_nonce: str, host_nonce: str) -> bytes:
    """The key by which the words of one session are signed; the two nonces name the session."""
    return _keyed(secret, 'session', machine_id, guest_nonce, host_nonce).digest()


class Signatures:
    """Signs what one side of a session says, and checks what it hears. Pure; for one thread at a time.

    ``side``: 'host' or 'guest', the one that says here.
    """

    __slots__ = ('_key', '_says', '_hears', '_seq', '_highest', '_seen')

    def __init__(self, key: bytes, side: str) -> None:
        self._key = key
        other = 'guest' if side == 'host' else 'host'
        self._says = Keyed(key, side)
        self._hears = Keyed(key, other)
        self._seq = 0                      # of the last word that was said
        self._highest = 0                  # … and of the newest that was heard
        self._seen = 0                     # bit n: the word of _highest - n was heard

    def sign(self, topic: str, headers: Dict[str, str], body: bytes) -> Dict[str, str]:
        """The headers with ``seq`` and ``mac``. Raises LocalError for what can't be signed."""
        self._seq += 1
        seq = str(self._seq)
        try:
            mac = self._says.mac(seq, topic, own_headers(headers), headers, body)
        except Untrusted as error:
            raise LocalError(str(error))
        return dict(headers, seq=seq, mac=mac)

    def check(self, topic: str, headers: Dict[str, str], body: bytes) -> Dict[str, str]:
        """The headers of a word that was heard, as far as they are signed: nothing else may be acted on.

        Raises Untrusted where the word has no right signature, or was heard before.
        """
        seq, mac = headers.get('seq', ''), headers.get('mac', '')
        if _SEQ.fullmatch(seq) is None or not mac:
            raise Untrusted('it is not signed')
        # A sender may sign what only some brokers write over.
        for unsigned in (BROKERS_OWN, UNSIGNED):
            own = own_headers(headers, unsigned)
            expected = self._hears.mac(seq, topic, own, headers, body)
            if hmac.compare_digest(mac.encode('utf-8', 'replace'), expected.encode('ascii')):
                self._take(int(seq))
                return own
        raise Untrusted('its signature is wrong')

    def shortcut_key(self, token: str) -> bytes:
        """By which the pieces of a shortcut are signed."""
        return bytes(_keyed(self._key, 'shortcut', token).digest())

    def _take(self, seq: int) -> None:
        """Raises Untrusted for a number that was heard, or may have been."""
        ahead = seq - self._highest
        if ahead > 0:
            # Beyond the window nothing is left of the bits; and a number may be of any size.
            self._seen = (self._seen << ahead | 1) & (1 << WINDOW) - 1 if ahead < WINDOW else 1
            self._highest = seq
        elif ahead <= -WINDOW or self._seen >> -ahead & 1:
            raise Untrusted('it was heard before')
        else:
            self._seen |= 1 << -ahead


def own_headers(headers: Dict[str, str], unsigned: Any = BROKERS_OWN) -> Dict[str, str]:
    """A word's own headers, without those of STOMP and of brokers."""
    return {name: value for name, value in headers.items() if name not in unsigned}


class Keyed:
    """HMAC-SHA256 with a key, of what one side says: begun once, and gone on with for each word.

    Of short texts it is made from two plain hashes of Python's own: of a word that comes after a pause, a key
    that somebody types, OpenSSL's costs twice as much. Of long ones that is five times as fast.
    """
    __slots__ = ('_inner', '_outer', '_openssl')

    SHORT = 4096                       # bytes

    def __init__(self, key: bytes, side: str) -> None:
        block = (key if len(key) <= 64 else hashlib.sha256(key).digest()).ljust(64, b'\0')
        self._inner = _light_sha256(bytes([byte ^ 0x36 for byte in block]) + side.encode('ascii') + b'\n')
        self._outer = _light_sha256(bytes([byte ^ 0x5c for byte in block]))
        self._openssl = _keyed(key, side, '')

    def mac(self, seq: str, topic: str, own: Dict[str, str], headers: Dict[str, str], body: bytes) -> str:
        """The signature of a word with these headers, of which the word's own count.

        Raises Untrusted where a name or value could be read as two headers.
        """
        lines = [name + ':' + own[name] for name in sorted(own)]
        lines.append('')
        text = '%s\n%s\n%s' % (seq, topic, '\n'.join(lines))
        if text.count('\n') > len(lines) + 1 or ':' in ''.join(headers):
            raise Untrusted('a line end or a colon in its headers')
        return self.digits(text.encode('utf-8', 'replace') + body)[:MAC_DIGITS]

    def digits(self, *signed: bytes) -> str:
        """Of what that side says, in parts: 64 hexadecimal digits."""
        if sum(map(len, signed)) > self.SHORT:
            keyed = self._openssl.copy()
            for part in signed:
                keyed.update(part)
            return str(keyed.hexdigest())
        inner, outer = self._inner.copy(), self._outer.copy()
        for part in signed:
            inner.update(part)
        outer.update(inner.digest())
        return str(outer.hexdigest())


def _find_light_sha256() -> Any:
    """Python's own, where this one has it."""
    for name in ('_sha2', '_sha256'):      # since 3.12, and before
        with contextlib.suppress(ImportError, AttributeError):
            return __import__(name).sha256
    return hashlib.sha256


_light_sha256 = _find_light_sha256()


# --- the link --------------------------------------------------------------------------------

CONNECT_TIMEOUT = 5.0      # seconds for TCP, TLS and CONNECTED, each
FIRST_DELAY = 1.0          # seconds before the first reconnect
LONGEST_DELAY = 30.0
OUTBOX_LIMIT = 8 * 1024 * 1024     # bytes that wait for a broker that doesn't read
RECV_SIZE = 64 * 1024
ACK_DELAY = 0.02           # seconds in which ACKs gather, up to …
ACKS_AT_ONCE = 100
FAREWELL = 1.0             # seconds for DISCONNECT to be answered

Address = Tuple[str, int]


class _Stopped(Exception):
    """The link was told to close while it waited."""


class Link:
    """An agent's connection to the broker, kept up until ``close``.

    candidates      gives the (host, port) pairs to try in turn, anew for each attempt
    subscriptions   [(destination, ack mode)]; MESSAGEs of the modes other than ``auto`` are ACKed
                    when on_message returns, and NACKed when it raises
    on_up(link)     connected, and every subscription confirmed by its RECEIPT
    on_message(frame)   a ``stomper.Frame``; its body is text
    on_down(reason) the connection is gone; another is being made
    heartbeat       seconds, both ways; 0: none
    tls             an ssl.SSLContext, or None
    max_body        bytes of the largest body that is taken

    Callbacks run on the link's thread, and must not block for long, or heart-beats stop. ``send``
    and the attributes may be used from any thread, callbacks included; ``close`` from any but the
    link's own.
    """

    def __init__(self, candidates: Callable[[], List[Address]],
                 subscriptions: List[Tuple[str, str]],
                 on_up: Callable[['Link'], None], on_message: Callable[[Any], None],
                 on_down: Callable[[str], None] = lambda reason: None,
                 login: str = '', passcode: str = '', heartbeat: float = 10, tls: Any = None,
                 max_body: int = MAX_BODY, first_delay: float = FIRST_DELAY) -> None:
        self._candidates = candidates
        self._subscriptions = subscriptions
        self._on_up = on_up
        self._on_message = on_message
        self._on_down = on_down
        self._login = login
        self._passcode = passcode
        self._heartbeat = heartbeat
        self._tls = tls
        self.max_body = max_body
        self._first_delay = first_delay
        self.up = False
        self.version = ''
        self.server = ''                              # what the broker calls itself
        self.local_address = ('', 0)                  # type: Address
        self.peer_address = ('', 0)                   # type: Address
        self.last_error = ''
        self._told = []                               # type: List[str]
        # Guards the socket's reads and writes (a TLS socket can't do both at once) and the outbox.
        # All of these are non-blocking; nothing else happens while it is held.
        self._lock = threading.Lock()
        self._socket = None                           # type: Any
        self._outbox = bytearray()
        self._refused = False
        self._broken = ''                             # why this connection can't go on
        self._abandoned = ''                          # why the agent left the last one
        self._stopping = threading.Event()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._engine = self._make_engine()
        self._thread = threading.Thread(target=self._run, name='link', daemon=True)

    def _make_engine(self) -> Any:
        stomper = import_stomper()
        self._new_frame = stomper.Frame
        engine = stomper.Engine()
        engine.states = {'CONNECTED': self._on_connected, 'MESSAGE': self._on_stomp_message,
                         'RECEIPT': self._on_receipt, 'ERROR': self._on_error}
        return engine

    # What others call.

    def start(self) -> None:
        """Begins to connect; returns at once."""
        self._thread.start()

    def close(self, timeout: float = 2.5) -> None:
        """Sends what waits, DISCONNECTs, and ends the thread. Safe to call twice."""
        self._stopping.set()
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                log.warning('thread %s still runs after %s s', self._thread.name, timeout)
                return
        self._wake_receiver.close()
        self._wake_sender.close()

    def abandon(self, reason: str) -> None:
        """Drops the connection that is up, since nobody there can be trusted, for the next candidate."""
        if self.up:
            self._abandoned = reason
            self._broken = self._broken or reason
            self._wake()

    def send(self, destination: str, headers: Dict[str, str], body: bytes) -> bool:
        """Sends a SEND frame, or leaves it to the link's thread; never waits.

        False when there is no connection, or when the broker hasn't read for so long that no more
        may wait. Raises LocalError for what can't be a frame. True doesn't mean that it arrived.
        """
        if not self.up:
            return False
        return self._send_frame('SEND', dict(headers, destination=destination), body)

    def _send_frame(self, command: str, headers: Dict[str, str], body: bytes = b'') -> bool:
        return self._send_bytes(encode(command, headers, body, self.version or '1.0'))

    def _send_bytes(self, data: bytes) -> bool:
        with self._lock:
            if self._socket is None or len(self._outbox) > OUTBOX_LIMIT:
                return False
            was_empty = not self._outbox
            self._outbox += data
            if was_empty:
                self._flush()
            waits = bool(self._outbox)
        if waits and was_empty:
            self._wake()
        return True

    def _flush(self) -> None:
        """Sends what the socket takes now. With the lock held. An error is left to the reader."""
        try:
            while self._outbox:
                sent = self._socket.send(self._outbox[:RECV_SIZE] if self._tls else self._outbox)
                del self._outbox[:sent]
                self._last_sent = time.monotonic()
        except OSError as error:
            if not would_block(error):
                self._broken = str(error)

    def _wake(self) -> None:
        try:
            self._wake_sender.send(b'w')
        except OSError as error:
            if not would_block(error) and not self._stopping.is_set():
                log.warning('wake-up of the link failed: %s', error)

    # The thread.

    def _run(self) -> None:
        delay = self._first_delay
        while not self._stopping.is_set():
            if self._try_candidates() and not self._refused:
                delay = self._first_delay
            self._stopping.wait(min(LONGEST_DELAY, delay * (1 + os.urandom(1)[0] / 512)))      # with jitter
            delay = min(LONGEST_DELAY, delay * 2)

    def _try_candidates(self) -> bool:
        """One round over the candidates, until one of them served. Whether one did."""
        try:
            addresses = self._candidates()
        except Exception as error:      # whatever looks for a broker must not end the link
            log.exception('looking for the broker')
            self.last_error = str(error)
            return False
        for address in addresses:
            if self._stopping.is_set():
                return True
            if self._session(address):
                return True
        return False

    def _session(self, address: Address) -> bool:
        """One connection from start to end. Whether the broker answered CONNECTED, and was not abandoned."""
        reason = 'closed'
        self._begin_session()
        try:
            self._connect(address)
            self._handshake()
            self._serve()
        except _Stopped:
            log.debug('told to stop')
        except (OSError, ProtocolError) as error:
            why = getattr(error, 'strerror', '') or str(error) or type(error).__name__
            reason = '%s:%s: %s' % (address[0], address[1], why)
            self.last_error = reason
            log.log(logging.INFO if self._is_news(reason) else logging.DEBUG, (
                'left the broker at %s' if self._abandoned else 'no connection to a broker at %s; is it '
                'running, and reachable? It is tried again; --check tells more'), reason)
        finally:
            self._end_session()
        if self._was_up:
            self._call(self._on_down, reason)
        return self._connected and not self._abandoned

    def _is_news(self, reason: str) -> bool:
        """Whether that wasn't why since the last connection: attempts may repeat for days."""
        if reason in self._told or len(self._told) >= 100:
            return False
        self._told.append(reason)
        return True

    def _begin_session(self) -> None:
        self.version = ''
        self._broken = ''
        self._was_abandoned, self._abandoned = bool(self._abandoned), ''
        self._connected = self._was_up = self._refused = False
        self._farewell_confirmed = False
        self._unconfirmed = {'subscribed-%d' % n for n in range(len(self._subscriptions))}
        self._reader = FrameReader(SERVER_COMMANDS, '1.0', max_body=self.max_body)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._send_every = self._give_up_after = self._acks_due = 0.0
        self._acks = []  # type: List[bytes]
        self._last_sent = self._last_received = time.monotonic()

    def _end_session(self) -> None:
        self.up = False
        with self._lock:
            connection, self._socket = self._socket, None
            self._outbox.clear()
        self._selector.close()
        if connection is not None:
            connection.close()

    def _connect(self, address: Address) -> None:
        self._socket = _dial(address, self._tls, self._wait_for)
        self.local_address = self._socket.getsockname()[:2]
        self.peer_address = self._socket.getpeername()[:2]
        self._selector.register(self._socket, selectors.EVENT_READ)

    def _wait_for(self, connection: Any, event: int) -> None:
        """Waits until the socket can be read or written. Raises _Stopped, or OSError when late."""
        self._selector.register(connection, event)
        deadline = time.monotonic() + CONNECT_TIMEOUT
        try:
            while True:
                self._check_stopped()
                ready = self._selector.select(max(0, deadline - time.monotonic()))
                if any(key.fileobj is connection for key, _ in ready):
                    return
                self._drain_wakes()
                if time.monotonic() >= deadline:
                    raise OSError(errno.ETIMEDOUT, 'no answer within %g s' % CONNECT_TIMEOUT)
        finally:
            self._selector.unregister(connection)

    def _check_stopped(self) -> None:
        if self._stopping.is_set():
            raise _Stopped()

    def _drain_wakes(self) -> None:
        try:
            while self._wake_receiver.recv(4096):
                pass
        except OSError as error:
            if not would_block(error):
                raise

    def _handshake(self) -> None:
        """CONNECT, CONNECTED, and the subscriptions. Raises RemoteError, OSError, _Stopped."""
        beat = int(self._heartbeat * 1000)
        # The virtual host: any name (1.2, CONNECT), but RabbitMQ knows none that isn't configured
        # except '/'.
        headers = {'accept-version': '1.0,1.1,1.2', 'host': '/',
                   'heart-beat': '%d,%d' % (beat, beat)}
        if self._login:
            headers.update(login=self._login, passcode=self._passcode)
        self._send_frame('CONNECT', headers)
        deadline = time.monotonic() + CONNECT_TIMEOUT
        while not self._connected:
            self._check_stopped()
            if time.monotonic() >= deadline:
                raise RemoteError('no CONNECTED within %g s' % CONNECT_TIMEOUT)
            self._turn(deadline - time.monotonic())

    def _serve(self) -> None:
        while not self._stopping.is_set():
            self._turn(self._beat())
        self._say_goodbye()

    def _say_goodbye(self) -> None:
        self.up = False
        self._send_acks()
        self._send_frame('DISCONNECT', {'receipt': 'bye'})
        deadline = time.monotonic() + FAREWELL
        while not self._farewell_confirmed and time.monotonic() < deadline:
            self._turn(deadline - time.monotonic())

    def _beat(self) -> float:
        """Sends ACKs and a heart-beat where they are due; gives the seconds to the next look at the clock.

        Raises RemoteError when the peer has been silent, or hasn't read, for too long.
        """
        now = time.monotonic()
        if self._acks and now >= self._acks_due:
            self._send_acks()
        if self._give_up_after and now - self._last_received > self._give_up_after:
            raise RemoteError('nothing heard for %.1f s' % (now - self._last_received))
        if self._broken:
            raise OSError(self._broken)
        if self._outbox and now - self._last_sent > max(30, self._give_up_after):
            raise RemoteError('broker reads nothing for %.0f s' % (now - self._last_sent))
        if self._send_every and now - self._last_sent >= self._send_every and not self._outbox:
            self._send_bytes(b'\n')
        waits = [self._acks_due - now if self._acks else 60.0]
        if self._send_every:
            waits.append(self._last_sent + self._send_every - now)
        if self._give_up_after:
            waits.append(self._last_received + self._give_up_after - now)
        return max(0.01, min(waits))

    def _turn(self, timeout: float) -> None:
        """Waits for the socket, the wake-up or the time; reads and writes what can be."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outbox else 0)
        if self._selector.get_key(self._socket).events != events:
            self._selector.modify(self._socket, events)
        for key, ready in self._selector.select(max(0, timeout)):
            if key.fileobj is self._wake_receiver:
                self._drain_wakes()
                continue
            if ready & selectors.EVENT_WRITE:
                with self._lock:
                    self._flush()
            if ready & selectors.EVENT_READ:
                self._receive()
        if self._broken:
            raise OSError(self._broken)

    def _receive(self) -> None:
        while True:
            try:
                with self._lock:
                    data = self._socket.recv(RECV_SIZE)
            except OSError as error:
                if would_block(error):
                    return
                raise
            if not data:
                raise RemoteError('the broker closed the connection')
            self._last_received = time.monotonic()
            self._reader.feed(data)
            self._react_to_frames()
            if self._tls is None and len(data) < RECV_SIZE:
                return

    def _react_to_frames(self) -> None:
        while True:
            frame = self._reader.next_frame()
            if frame is None:
                return
            log.debug('%s %s', frame.command, frame.headers)
            self._engine.react({'cmd': frame.command, 'headers': frame.headers,
                                'body': frame.body.decode('utf-8', 'replace')})

    # Reactions: what stomper's Engine calls for each command.

    def _on_connected(self, message: Dict[str, Any]) -> str:
        headers = message['headers']
        self.version = headers.get('version', '1.0')
        if self.version not in ('1.0', '1.1', '1.2'):
            raise RemoteError('broker chose STOMP version %.20r' % self.version)
        self._reader.version = self.version
        self._engine.sessionId = headers.get('session', '')
        self.server = headers.get('server', '')
        self._agree_on_heartbeats(headers.get('heart-beat', '0,0'))
        self._connected = True
        self._subscribe()
        return ''

    def _agree_on_heartbeats(self, text: str) -> None:
        """STOMP 1.2, Heart-beating: each way, the slower of what one can and the other wants."""
        try:
            can, wants = (int(part) for part in text.split(','))
        except ValueError:
            raise RemoteError('bad heart-beat header %.40r' % text)
        if self._heartbeat and wants > 0:
            self._send_every = 0.5 * max(self._heartbeat, wants / 1000)
        if self._heartbeat and can > 0:
            self._give_up_after = 2.0 * max(self._heartbeat, can / 1000)

    def _subscribe(self) -> None:
        for number, (destination, ack) in enumerate(self._subscriptions):
            if self.version == '1.0' and ack == 'client-individual':
                ack = 'client'
            self._send_frame('SUBSCRIBE', {'id': str(number), 'destination': destination,
                                           'ack': ack, 'receipt': 'subscribed-%d' % number})
        if not self._subscriptions:
            self._came_up()

    def _on_receipt(self, message: Dict[str, Any]) -> str:
        receipt = message['headers'].get('receipt-id', '')
        if receipt == 'bye':
            self._farewell_confirmed = True
        elif receipt in self._unconfirmed:
            self._unconfirmed.discard(receipt)
            if not self._unconfirmed:
                self._came_up()
        return ''

    def _came_up(self) -> None:
        self.up = self._was_up = True
        self.last_error = ''
        if not self._was_abandoned:         # else it may be the same one, all night
            del self._told[:]
        log.log(logging.DEBUG if self._was_abandoned else logging.INFO, 'connected to %s:%s, STOMP %s, %s',
                self.peer_address[0], self.peer_address[1], self.version, self.server)
        self._call(self._on_up, self)

    def _on_error(self, message: Dict[str, Any]) -> str:
        self._refused = True       # what a broker refuses once, it refuses again a second later
        text, body = message['headers'].get('message', '')[:500], message['body'].strip()[:500]
        raise RemoteError('broker says: ' + (text if body == text else '%s %s' % (text, body)))

    def _on_stomp_message(self, message: Dict[str, Any]) -> str:
        frame = self._new_frame()
        frame.cmd = 'MESSAGE'
        frame.headers = message['headers']
        frame.body = message['body']
        accepted = self._call(self._on_message, frame)
        self._acknowledge(frame.headers, 'ACK' if accepted else 'NACK')
        return ''

    def _acknowledge(self, headers: Dict[str, str], command: str) -> None:
        number = headers.get('subscription', '0')
        if number.isdigit() and int(number) < len(self._subscriptions) \
                and self._subscriptions[int(number)][1] == 'auto':
            return
        if not self._acks:
            self._acks_due = time.monotonic() + ACK_DELAY
        self._acks.append(_encode_ack(command, headers, self.version))
        if len(self._acks) >= ACKS_AT_ONCE:
            self._send_acks()

    def _send_acks(self) -> None:
        """In one write, a moment later than what the frames asked for: that is waited for."""
        acks, self._acks = self._acks, []
        self._send_bytes(b''.join(acks))

    def _call(self, callback: Callable[[Any], None], argument: Any) -> bool:
        """Whether the callback returned; what it raised is logged, and the link lives on."""
        try:
            callback(argument)
            return True
        except Exception:
            log.exception('in a callback of the link')
            return False


def import_stomper() -> Any:
    """The package. Not imported above, since the broker uses the codec of this file with nothing installed.

    Raises LocalError.
    """
    try:
        import stomper
    except ImportError:
        raise LocalError('the package stomper is missing for this Python: start it by .venv/bin/python, that '
                         '`python3 -m venv .venv && .venv/bin/python -m pip install stomper` makes, or use '
                         'the bundle (--bundle)')
    return stomper


def _encode_ack(command: str, headers: Dict[str, str], version: str) -> bytes:
    """ACK or NACK of a MESSAGE, by the version's key (where the versions differ: STOMP 1.2, ACK)."""
    if version == '1.2':
        return encode(command, {'id': headers.get('ack', '')}, b'', version)
    key = {'message-id': headers.get('message-id', '')}
    if version == '1.1':
        key['subscription'] = headers.get('subscription', '0')
    return encode('ACK' if version == '1.0' else command, key, b'', version)


WaitFor = Callable[[Any, int], None]       # until the socket can be read or written


def _dial(address: Address, tls: Any, wait_for: WaitFor) -> Any:
    """A connected socket, with TLS where asked: never blocks, so that whoever waits can be told to stop.

    Raises OSError, and what wait_for raises.
    """
    error = None  # type: Optional[OSError]
    host = address[0]  # type: Any
    with contextlib.suppress(UnicodeEncodeError):
        host = host.encode('ascii')    # as text, Python would load its tables for names of all languages
    for family, kind, proto, _, target in socket.getaddrinfo(host, address[1], 0, socket.SOCK_STREAM):
        connection = socket.socket(family, kind, proto)
        try:
            _connect_tcp(connection, target, wait_for)
            return connection if tls is None else _wrap(connection, address[0], tls, wait_for)
        except OSError as failed:
            connection.close()
            error = failed
        except BaseException:
            connection.close()
            raise
    raise error or OSError('no address of %s' % address[0])


def _connect_tcp(connection: socket.socket, target: Any, wait_for: WaitFor) -> None:
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    code = connection.connect_ex(target)
    if code and not is_under_way(code):
        raise socket_error(code)
    if code:
        wait_for(connection, selectors.EVENT_WRITE)
    code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise socket_error(code)


def is_under_way(code: int) -> bool:
    """Whether that is what connect_ex tells of a connection that is being made."""
    return code in (errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, 'WSAEWOULDBLOCK', 0))


def socket_error(code: int) -> OSError:
    """An error of a socket by its number, with the system's own text."""
    if os.name == 'nt':                # whose C library knows none of the socket's
        import ctypes
        return ctypes.WinError(code)   # type: ignore
    return OSError(code, os.strerror(code))


def _wrap(connection: socket.socket, host: str, tls: Any, wait_for: WaitFor) -> Any:
    import ssl
    wrapped = tls.wrap_socket(connection, server_hostname=host, do_handshake_on_connect=False)
    try:
        while True:
            try:
                wrapped.do_handshake()
                return wrapped
            except ssl.SSLWantReadError:
                wait_for(wrapped, selectors.EVENT_READ)
            except ssl.SSLWantWriteError:
                wait_for(wrapped, selectors.EVENT_WRITE)
    except BaseException:
        wrapped.close()
        raise


def would_block(error: OSError) -> bool:
    """Whether that is what a socket raises that doesn't block, and has nothing now, or no room."""
    if isinstance(error, (BlockingIOError, InterruptedError)):
        return True
    # ssl.SSLWantReadError and SSLWantWriteError, without importing ssl where there is no TLS.
    return type(error).__name__ in ('SSLWantReadError', 'SSLWantWriteError')


def try_broker(host: str, settings: Any, tls: Any) -> Link:
    """A link, closed again, that tried [Broker] at that host: its ``server`` is set where it answered."""
    answered = threading.Event()
    link = Link(lambda: [(host, settings.port)], [], lambda _: answered.set(), lambda _: None,
                login=settings.username, passcode=settings.password,
                tls=tls)
    link.start()
    deadline = time.monotonic() + 2 * CONNECT_TIMEOUT
    while not link.last_error and time.monotonic() < deadline and not answered.wait(0.05):
        continue
    link.close()
    return link
