"""XML-RPC as text: calls, answers and faults as XML, and what XML can carry.

It stands in for xmlrpc.client, which brings HTTP, TLS and e-mail along: some megabytes of every host agent,
and most of the time that a verb takes.

What it is not: a transport (hostserver.py listens, hostclient.py calls), or a judge of what is called
(hostdispatch.py). Imports nothing of ours. No threads, no state.
"""

import binascii
import re
from typing import Any, Callable, Dict, List, Tuple, Union
from xml.parsers import expat


class Fault(Exception):
    """What a call is answered with where it fails."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text


class Malformed(ValueError):
    """A text that is no XML-RPC."""


class Binary:
    """Exact bytes, ``data``: a value of their own in XML-RPC, as base64."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Binary) and self.data == other.data

    def __hash__(self) -> int:
        return hash(self.data)

    def __str__(self) -> str:
        return self.data.decode('utf-8', 'backslashreplace')


FilePath = Union[str, Binary]      # the latter: exact bytes, which need not be UTF-8

XML_UNSAFE = re.compile('[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]')      # what XML 1.0 can't carry
XML_ESCAPES = {ord('&'): '&amp;', ord('<'): '&lt;', ord('>'): '&gt;'}

LARGEST = 1.7976931348623157e308        # of a double


def is_carried(text: str) -> bool:
    """Whether XML-RPC leaves the text as it is."""
    return '\r' not in text and is_xml(text)


def carried(text: str) -> FilePath:
    """A text for a call: itself, or its exact bytes where XML can't hold it; half surrogates are bytes."""
    return text if is_xml(text) else Binary(text.encode('utf-8', 'surrogateescape'))


def is_xml(text: str) -> bool:
    """Whether XML can hold the text."""
    return XML_UNSAFE.search(text) is None


def xml_safe(text: str) -> str:
    """The text as XML can hold it, U+FFFD for what it can't."""
    return XML_UNSAFE.sub('\ufffd', text)


def xml_number(value: Any) -> Any:
    """A number, as a double where XML-RPC has no integer for it; what is infinite or not a number is 0.0."""
    if isinstance(value, int) and -2 ** 31 <= value < 2 ** 31:
        return value
    return float(finite(value))


def finite(value: Any) -> Any:
    """The value, if it is a number that a double can hold; else 0. What a guest tells may be anything."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and -LARGEST <= value <= LARGEST else 0


# --- values to XML ---------------------------------------------------------------------------

class XML(str):
    """Text that is XML already."""


def to_xml(value: Any) -> XML:
    """The value as XML-RPC can carry it: no None, no control characters, no big integers.

    Has no line breaks between the tags, which would cost a client time: answers may have thousands of values.
    Raises TypeError.
    """
    return XML(_to_xml(value))


def _to_xml(value: Any) -> str:
    if type(value) is str:             # most are
        return '<value><string>%s</string></value>' % xml_text(value)
    if isinstance(value, dict):
        return '<value><struct>%s</struct></value>' % ''.join(
            ['<member><name>%s</name>%s</member>' % (xml_text(str(name)), _to_xml(item))
             for name, item in value.items()])
    if isinstance(value, (list, tuple)):
        return '<value><array><data>%s</data></array></value>' % ''.join([_to_xml(item) for item in value])
    if isinstance(value, bool):
        return '<value><boolean>%d</boolean></value>' % value
    if isinstance(value, (int, float)):
        number = xml_number(value)
        return ('<value><double>%r</double></value>' if isinstance(number, float) else
                '<value><int>%d</int></value>') % number
    if isinstance(value, XML):
        return value
    if isinstance(value, Binary):
        data = binascii.b2a_base64(value.data, newline=False)
        return '<value><base64>%s</base64></value>' % data.decode('ascii')
    if value is None:
        return '<value><string></string></value>'
    raise TypeError('%s in an answer' % type(value).__name__)


def xml_text(text: str) -> str:
    """Text between tags; what XML can't carry is replaced."""
    return text if text.isalnum() else xml_safe(text).translate(XML_ESCAPES)


def write_call(method: str, params: Tuple[Any, ...]) -> bytes:
    """The XML of a call, in which carriage returns survive. Raises TypeError."""
    body = ''.join(['<param>%s</param>' % to_xml(param) for param in params]).replace('\r', '&#13;')
    return ("<?xml version='1.0'?><methodCall><methodName>%s</methodName><params>%s</params></methodCall>"
            % (xml_text(method), body)).encode('utf-8')


def write_answer(value: XML) -> bytes:
    """The XML of what a call is answered with."""
    return ("<?xml version='1.0'?><methodResponse><params><param>%s</param></params></methodResponse>"
            % value).encode('utf-8')


def write_fault(fault: Fault) -> bytes:
    """The XML of a call's failure."""
    return ("<?xml version='1.0'?><methodResponse><fault>%s</fault></methodResponse>"
            % to_xml({'faultCode': fault.code, 'faultString': fault.text})).encode('utf-8')


# --- XML to values ---------------------------------------------------------------------------

LARGEST_TEXT = 1024 * 1024     # bytes that come as one
LONGEST_NUMBER = 400           # digits: what an int takes grows with their square


def read_call(body: bytes) -> Tuple[str, List[Any]]:
    """(method, arguments) of a call. Raises Malformed, or Fault where it is another XML."""
    document = _Document(body)
    if document.root != 'methodCall' or not document.method:
        raise Fault(-32600, 'no methodCall')
    return document.method, document.values


def read_answer(body: bytes) -> Any:
    """What a call was answered with. Raises Malformed, or the Fault that it is."""
    document = _Document(body)
    if document.root != 'methodResponse' or len(document.values) != 1:
        raise Malformed('no methodResponse')
    answer = document.values[0]
    if not document.is_fault:
        return answer
    try:
        raise Fault(int(answer['faultCode']), str(answer['faultString']))
    except (TypeError, KeyError):
        raise Malformed('a fault without code or text')


def _number(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if len(text) > LONGEST_NUMBER:
            raise ValueError('a number of %d digits' % len(text))
        return kind(text)
    return read


def _boolean(text: str) -> bool:
    if text.strip() not in ('0', '1'):
        raise ValueError('a boolean is 0 or 1')
    return text.strip() == '1'


SCALARS = {'string': str, 'boolean': _boolean, 'double': _number(float), 'float': _number(float),
           'base64': lambda text: Binary(binascii.a2b_base64(text.encode('ascii'))), 'nil': lambda text: None,
           }                           # type: Dict[str, Callable[[str], Any]]
SCALARS.update(dict.fromkeys(('int', 'i1', 'i2', 'i4', 'i8', 'biginteger'), _number(int)))


class _Document:
    """One text, taken apart: ``root``, ``method``, ``values`` and ``is_fault``. Values may be nested deeply.

    Raises Malformed, also for one that declares a document type: with it come entities, which can make
    gigabytes of a line.
    """

    def __init__(self, body: bytes) -> None:
        self.root = self.method = ''
        self.values = []               # type: List[Any]    # whole ones, and those of what is still open
        self.is_fault = False
        self._begun = []               # type: List[int]    # where the values of each open struct or array begin
        self._text = []                # type: List[str]
        self._is_typed = False         # whether the open <value> has got its value
        parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.buffer_size = min(max(8192, len(body)), LARGEST_TEXT)
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text.append
        parser.StartDoctypeDeclHandler = self._refuse
        try:
            parser.Parse(body, True)
        except (expat.ExpatError, ValueError, TypeError, LookupError) as error:
            raise Malformed('%s' % error)

    def _refuse(self, *_: Any) -> None:
        raise Malformed('a document type is declared')

    def _start(self, tag: str, attributes: Dict[str, str]) -> None:
        self.root = self.root or tag
        self._text.clear()
        if tag == 'value':
            self._is_typed = False
        elif tag in ('struct', 'array'):
            self._begun.append(len(self.values))

    def _end(self, tag: str) -> None:
        read = SCALARS.get(tag.rpartition(':')[2])
        if read is not None:
            self._take(read(''.join(self._text)))
        elif tag == 'value' and not self._is_typed:
            self._take(''.join(self._text))
        elif tag == 'name':
            self.values.append(''.join(self._text))
        elif tag == 'methodName':
            self.method = ''.join(self._text).strip()
        elif tag == 'array':
            self._gather(list)
        elif tag == 'struct':
            self._gather(_members)
        elif tag == 'fault':
            self.is_fault = True
        elif tag not in KNOWN_TAGS:
            raise Malformed('<%.40s> is no value' % tag)

    def _take(self, value: Any) -> None:
        self.values.append(value)
        self._is_typed = True
        self._text.clear()

    def _gather(self, kind: Callable[[List[Any]], Any]) -> None:
        begin = self._begun.pop()
        self.values[begin:] = [kind(self.values[begin:])]
        self._is_typed = True


KNOWN_TAGS = ('value', 'member', 'data', 'param', 'params', 'methodCall', 'methodResponse')


def _members(values: List[Any]) -> Dict[str, Any]:
    """The mapping of names and values in turn."""
    if len(values) % 2 or not all(isinstance(name, str) for name in values[::2]):
        raise Malformed('a struct whose members have no name or no value')
    return dict(zip(values[::2], values[1::2]))
