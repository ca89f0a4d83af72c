"""Frames on the broker's wire: their shape, content-length, escapes, limits. Docstrings name the rules."""

import itertools
import time

import pytest
from stomp_client import Client, frame, running

from stompbroker import Broker

NUMBERS = itertools.count()


@pytest.fixture
def topic():
    """A topic that no other test uses."""
    return '/topic/frames-%d' % next(NUMBERS)


# --- the shape of frames ---

@pytest.mark.parametrize('between', [b'\n' * 7, b'\r\n' * 7, b'\n\r\n'])
def test_line_ends_between_frames(connect, topic, between):
    """STOMP Frames: extra LFs after the NUL of a frame are ignored
    STOMP Frames: extra CRLFs after the NUL of a frame are ignored"""
    client = connect('1.2')
    client.send(between + frame('SUBSCRIBE', 'id:0', 'destination:' + topic) + between
                + frame('SEND', 'destination:' + topic, body=b'a') + between
                + frame('SEND', 'destination:' + topic, body=b'b') + between)
    assert client.bodies() == [b'a', b'b']


def test_crlf_in_1_2(connect, topic):
    """STOMP Frames: CRLF line ends in SUBSCRIBE and SEND; CR is not part of the values"""
    client = connect('1.2')
    client.send(b'SUBSCRIBE\r\nid:0\r\ndestination:%b\r\n\r\n\0' % topic.encode())
    client.send(b'SEND\r\ndestination:%b\r\nuser:value\r\nreceipt:r\r\n\r\nbody\0' % topic.encode())
    found = {one.command: one for one in client.take_all(2)}
    message = found['MESSAGE']
    assert (message.get('destination'), message.get('user'), message.body) == (topic, 'value', b'body')
    assert message.get('subscription') == '0'
    assert found['RECEIPT'].get('receipt-id') == 'r'


@pytest.mark.parametrize('body', [b'\r\n', b'\n\n\r\n x \r\n\n', b'\r', b'\n', b' padded '])
@pytest.mark.parametrize('version', ['1.0', '1.1', '1.2'])
def test_line_ends_of_a_body_are_left_alone(connect, topic, body, version):
    """STOMP Frames: body that begins or ends with CR/LF is left alone"""
    client = connect(version)
    client.subscribe(topic)
    client.publish(topic, body)
    assert client.bodies() == [body]


def test_byte_by_byte(connect, topic):
    """STOMP Frames: frames that come byte by byte are understood"""
    client = connect(None)
    for byte in (frame('CONNECT', 'accept-version:1.2', 'host:x') + b'\r\n'
                 + frame('SUBSCRIBE', 'id:0', 'destination:' + topic)
                 + frame('SEND', 'destination:' + topic, 'content-length:3', body=b'a\0b')
                 + frame('SEND', 'destination:' + topic, body='ü'.encode())):
        client.send(bytes((byte,)))
    assert client.take().command == 'CONNECTED'
    assert client.bodies() == [b'a\0b', 'ü'.encode()]


@pytest.mark.parametrize('cut', [b'SE', b'SEND\ndest', b'SEND\ndestination:/topic/frames-', b'\n', b'\n\nbo'])
def test_a_frame_in_two_halves(connect, topic, cut):
    """STOMP Frames: a frame split inside header, blank line, body (with pauses) is understood"""
    client, other = connect('1.2'), connect('1.2')
    client.subscribe(topic)
    whole = frame('SEND', 'destination:' + topic, body=b'body\n')
    at = whole.rindex(cut) + len(cut) if cut != b'\n' else whole.index(b'\n\n') + 1
    client.send(whole[:at])
    other.before_now()                      # the broker has read the first half by now
    client.send(whole[at:])
    assert client.bodies() == [b'body\n']


def test_200_frames_in_one_segment(connect, topic):
    """STOMP Frames: 200 frames in one TCP segment are all processed, in order"""
    client = connect('1.2')
    client.subscribe(topic)
    bodies = [b'%d' % number for number in range(200)]
    client.send(b''.join(frame('SEND', 'destination:' + topic, body=body) for body in bodies))
    assert client.bodies() == bodies


@pytest.mark.parametrize('line', ['send', 'Send', 'SENDS', 'NOSUCH', 'CONNECTED', 'MESSAGE', ' SEND',
                                  'SEND '])
def test_unknown_commands(connect, topic, line):
    """STOMP Frames: commands are case sensitive: "send" is no SEND
    Client Frames: an unknown command: ERROR and close (or ignored); ERROR without close is wrong"""
    listener, client = connect('1.2'), connect('1.2')
    listener.subscribe(topic)
    client.say(line, 'destination:' + topic, 'receipt:r7')
    assert client.take_error().get('receipt-id') == 'r7'
    assert listener.bodies() == []


def test_header_names_are_case_sensitive(connect):
    """STOMP Frames: header names are case sensitive: "Destination" is no destination"""
    client = connect('1.2')
    client.say('SEND', 'Destination:/topic/a')
    assert 'destination' in client.take_error().get('message')


@pytest.mark.parametrize('line', ['no colon', ':no name', '\\t:x', 'nul\0:x'])
def test_bad_header_lines(connect, topic, line):
    """STOMP Frames: a header line without a colon is refused"""
    listener, client = connect('1.2'), connect('1.2')
    listener.subscribe(topic)
    client.say('SEND', 'destination:' + topic, line, 'receipt:r')
    client.take_error()
    assert listener.bodies() == []


def test_headers_that_are_not_utf8(connect, topic):
    client = connect('1.2')
    client.send(b'SEND\ndestination:\xff\xfe\n\n\0')
    client.take_error()


@pytest.mark.parametrize('version', ['1.1', '1.2'])
def test_utf8(connect, topic, version):
    """Header content-type: UTF-8 in header values and bodies is carried unchanged"""
    client = connect(version)
    text = 'Grüße, 世界 \U0001F600'
    client.subscribe(topic + '/' + text.replace(' ', '-'), id=text)
    client.say('SEND', 'destination:%s/%s' % (topic, text.replace(' ', '-')), 'schlüssel:' + text,
               body=text.encode() + b'\xff')
    message, = client.before_now()
    assert message.get('schlüssel') == text and message.body == text.encode() + b'\xff'
    assert message.get('subscription') == text


# --- content-length ---

@pytest.mark.parametrize('version', ['1.0', '1.1', '1.2'])
def test_nuls_in_a_body(connect, topic, version):
    """Header content-length: a body with NULs is carried whole
    Header content-length: a MESSAGE whose body has NULs has content-length
    SEND: content-length and NULs also in a 1.0 session"""
    client = connect(version)
    client.subscribe(topic)
    for body in b'\0', b'a\0b\0', b'\0\n' * 100:
        client.say('SEND', 'destination:' + topic, 'content-length:%d' % len(body), body=body)
        message, = client.before_now()
        assert message.body == body and message.get('content-length') == str(len(body))


def test_without_content_length_the_body_ends_at_the_first_nul(connect, topic):
    """Header content-length: without content-length the body ends at the first NUL"""
    client = connect('1.2')
    client.subscribe(topic)
    second = frame('SEND', 'destination:' + topic, body=b'b')
    client.say('SEND', 'destination:' + topic, body=b'a\0' + second[:-1])
    assert client.bodies() == [b'a', b'b']


def test_content_length_counts_bytes(connect, topic):
    """Header content-length: content-length counts octets (UTF-8 body)"""
    client = connect('1.2')
    client.subscribe(topic)
    client.say('SEND', 'destination:' + topic, 'content-length:5', body='ü世'.encode())
    message, = client.before_now()
    assert message.body == 'ü世'.encode() and message.get('content-length') == '5'


def test_content_length_0(connect, topic):
    """Header content-length: content-length:0 and an empty body
    Header content-length: content-length:0 is accepted on frames without body (all frames MAY have it)"""
    client = connect(None)
    client.connect('1.2', 'content-length:0')
    client.ask('SUBSCRIBE', 'id:0', 'destination:' + topic, 'content-length:0')
    client.ask('BEGIN', 'transaction:t', 'content-length:0')
    client.ask('ABORT', 'transaction:t', 'content-length:0')
    client.say('SEND', 'destination:' + topic, 'content-length:0')
    client.say('SEND', 'destination:' + topic)
    assert client.bodies() == [b'', b'']
    client.ask('UNSUBSCRIBE', 'id:0', 'content-length:0')
    client.ask('DISCONNECT', 'content-length:0')


def test_a_body_longer_than_its_content_length(connect, topic):
    """Header content-length: body longer than content-length (no NUL there) is refused"""
    listener, client = connect('1.2'), connect('1.2')
    listener.subscribe(topic)
    client.say('SEND', 'destination:' + topic, 'content-length:2', 'receipt:r', body=b'long')
    assert client.take_error().get('receipt-id') == 'r'
    assert listener.bodies() == []


@pytest.mark.parametrize('length', ['x', '-1', '+1', '1.0', '', '0x10', '1 2', '1_0', '١', '9' * 30])
def test_a_content_length_that_is_none(connect, topic, length):
    """Header content-length: content-length that is no number is refused
    Header content-length: negative content-length is refused"""
    listener, client = connect('1.2'), connect('1.2')
    listener.subscribe(topic)
    client.say('SEND', 'destination:' + topic, 'content-length:' + length, 'receipt:r', body=b'a')
    assert client.take_error().get('receipt-id') == 'r'
    assert listener.bodies() == []


# --- sizes ---

@pytest.mark.parametrize('lines', [(), ('content-length:1048576',)])
def test_a_body_of_1_mib(connect, topic, lines):
    """Size Limits: a body of 1 MiB is carried
    Size Limits: a body of 1 MiB without content-length is carried"""
    client = connect('1.2')
    client.subscribe(topic)
    body = bytes(range(1, 257 - 1)) * 5000
    body = body[:1048576].ljust(1048576, b'x')
    client.say('SEND', 'destination:' + topic, *lines, body=body)
    assert client.take().body == body


def test_many_headers_and_a_long_one(connect, topic):
    """Size Limits: 40 user headers and a 4 KiB header value are carried"""
    client = connect('1.2')
    client.subscribe(topic)
    lines = ['user-%d:%d' % (number, number) for number in range(40)] + ['long:' + 'x' * 4096]
    client.say('SEND', 'destination:' + topic, *lines)
    message, = client.before_now()
    assert set(lines) <= set(message.lines)


def flood(client, head, piece, most):
    """Sends a piece again and again, until the broker ends it; gives the bytes that it took."""
    sent = 0
    try:
        client.send(head)
        while sent < most:
            client.send(piece)
            sent += len(piece)
    except OSError:
        return sent
    return sent


@pytest.mark.parametrize('head, piece', [
    (b'SEND\ndestination:/topic/a\nendless:', b'x' * 65536), (b'SEND\n', b'a:b\n' * 10000),
    (b'', b'x' * 65536), (b'SEND', b'\r' * 65536)])
def test_an_endless_head_is_cut(connect, head, piece):
    """Size Limits: limits: an endless header line (32 MiB) is cut by ERROR or close, others are served
    Size Limits: limits: 200 000 header lines are cut by ERROR or close"""
    client, other = connect('1.2'), connect('1.2')
    # What is on its way in the sockets' buffers is thrown away by the broker for a while.
    flood(client, head, piece, 32 * 1024 * 1024)
    other.ask('SEND', 'destination:/topic/a')
    client.take_end_or_error()


@pytest.mark.parametrize('length', [10 ** 12, 10 ** 17, 1048577])
def test_a_body_that_is_too_large_is_refused_by_its_head(connect, length):
    """Size Limits: limits: content-length:10^12 is refused or at least does not hurt others"""
    client = connect('1.2')
    client.send(b'SEND\ndestination:/topic/a\nreceipt:r\ncontent-length:%d\n\n' % length)
    error = client.take_error()
    assert error.get('receipt-id') == 'r' and str(length) in error.get('message')


def test_limits_of_one_frame(connect, topic):
    client = connect('1.2')
    client.subscribe(topic)
    client.say('SEND', 'destination:' + topic, 'a:' + 'x' * 60000)
    assert len(client.before_now()) == 1
    for lines in (['a:' + 'x' * 70000], ['a:b'] * 1001):
        client = connect('1.2')
        client.say('SEND', 'destination:' + topic, *lines)
        client.take_error()


def test_a_body_without_length_is_limited_too(connect, topic):
    client, listener = connect('1.2'), connect('1.2')
    listener.subscribe(topic)
    client.send(b'SEND\ndestination:%b\nreceipt:big\n\n' % topic.encode() + b'x' * 1048577)
    error = client.take_error()
    assert error.get('receipt-id') == 'big'
    assert listener.bodies() == []


def test_max_frame():
    with running(Broker(port=0, max_frame=10)) as broker:
        with Client(broker.address) as client:
            client.connect('1.2')
            client.ask('SEND', 'destination:/topic/a', body=b'x' * 10)
            client.say('SEND', 'destination:/topic/a', body=b'x' * 11)
            client.take_error()


# --- escapes ---

def carried(connect, topic, sender, receiver, *lines):
    """The header lines as they reach a receiver of that version."""
    publisher, listener = connect(sender), connect(receiver)
    listener.subscribe(topic)
    publisher.ask('SEND', 'destination:' + topic, *lines)
    message, = listener.before_now()
    return [line for line in message.lines if line.partition(':')[0] not in (
        'destination', 'message-id', 'subscription', 'content-length')]


@pytest.mark.parametrize('sender, receiver, sent, received', [
    ('1.2', '1.2', 'a:1\\r2\\n3\\c4\\\\5', 'a:1\\r2\\n3\\c4\\\\5'),
    ('1.1', '1.1', 'a:2\\n3\\c4\\\\5', 'a:2\\n3\\c4\\\\5'),
    ('1.2', '1.2', 'a:\\\\c', 'a:\\\\c'),
    ('1.2', '1.0', 'a:\\\\c', 'a:\\c'),
    ('1.2', '1.0', 'a:1\\c2', 'a:1:2'),
    ('1.0', '1.2', 'a:1:2\\n', 'a:1\\c2\\\\n'),
    ('1.0', '1.1', 'a:1:2', 'a:1\\c2'),
    ('1.0', '1.0', 'a:\\r\\n\\c\\\\\\t', 'a:\\r\\n\\c\\\\\\t'),
    ('1.2', '1.1', 'a:1\\r2', 'a:1\r2'),
    ('1.2', '1.0', 'a:1\\n2\\r3', 'a:1 2 3'),
    ('1.2', '1.2', 'n\\cam\\ne:v', 'n\\cam\\ne:v'),
    ('1.1', '1.2', 'n\\\\:v', 'n\\\\:v'),
    ('1.2', '1.2', 'a:not:escaped', 'a:not\\cescaped'),
    ('1.2', '1.2', 'a: padded ', 'a: padded '),
    ('1.1', '1.1', 'a: padded ', 'a: padded '),
    ('1.1', '1.2', ' a : padded\t', ' a : padded\t'),
    ('1.2', '1.2', 'a:', 'a:'),
    ('1.1', '1.1', 'a:', 'a:'),
    ('1.1', '1.2', 'a:cr\r', 'a:cr\\r'),
    ('1.0', '1.0', 'a: padded ', 'a:padded'),
    ('1.0', '1.0', 'version: 3', 'version:3')])
def test_header_values_from_version_to_version(connect, topic, sender, receiver, sent, received):
    """Value Encoding: 1.2: \\r \\n \\c \\\\ are decoded and encoded again
    Value Encoding: 1.1: \\n \\c \\\\ are decoded and encoded again
    Value Encoding: the order of decoding is right: \\\\c is backslash + c, not colon
    Frames: 1.0 has no escaping: backslashes come through untouched
    Value Encoding: 1.2 sender, 1.0 receiver: \\c becomes a plain colon
    Value Encoding: 1.0 sender, 1.2 receiver: a plain colon becomes \\c
    Value Encoding: 1.2 sender of \\r, 1.1 receiver: no undefined \\r escape is sent
    Value Encoding: header names are escaped, too
    Value Encoding: 1.2: header values are never trimmed nor padded
    Value Encoding: 1.1: header values are never trimmed nor padded
    Augmented BNF: an empty header value is allowed and carried
    """
    assert carried(connect, topic, sender, receiver, sent) == [received]


@pytest.mark.parametrize('version, value', [
    ('1.2', '\\t'), ('1.2', 'a\\'), ('1.2', '\\\\\\'), ('1.2', '\\C'), ('1.2', '\\ '),
    ('1.1', '\\r'), ('1.1', '\\t'), ('1.1', '\\')])
def test_undefined_escapes(connect, topic, version, value):
    """Value Encoding: undefined escape \\t is a fatal error: (ERROR and) close
    Value Encoding: undefined escape \\r (in 1.1) is a fatal error: (ERROR and) close
    Value Encoding: a single backslash at the end of a value is a fatal error"""
    listener, client = connect('1.2'), connect(version)
    listener.subscribe(topic)
    client.say('SEND', 'destination:' + topic, 'a:' + value, 'receipt:r')
    assert client.take_error().get('receipt-id') == 'r'
    assert listener.bodies() == []


def test_destinations_with_escapes(connect, topic):
    """Value Encoding: destination with an escaped colon: same in SUBSCRIBE, SEND, MESSAGE
    MESSAGE: destination of MESSAGE is identical to that of SEND"""
    client, old = connect('1.2'), connect('1.0')
    client.subscribe(topic + '\\cx\\\\')
    old.subscribe(topic + ':x\\')
    client.ask('SEND', 'destination:' + topic + '\\cx\\\\')
    for one, line in (client, topic + '\\cx\\\\'), (old, topic + ':x\\'):
        message, = one.before_now()
        assert message.get('destination') == line


@pytest.mark.parametrize('version', ['1.1', '1.2'])
def test_ids_with_escapes(connect, topic, version):
    """Value Encoding: receipt and subscription ids with escapes are escaped in RECEIPT and MESSAGE"""
    client = connect(version)
    client.ask('SUBSCRIBE', 'id:\\c\\\\\\n', 'destination:' + topic, receipt='r\\c\\\\\\n')
    client.say('SEND', 'destination:' + topic)
    message, = client.before_now()
    assert message.get('subscription') == '\\c\\\\\\n'
    client.ask('UNSUBSCRIBE', 'id:\\c\\\\\\n', receipt='\\n')
    client.say('SEND', 'receipt:\\n\\c')
    assert client.take_error().get('receipt-id') == '\\n\\c'


def test_padded_headers_of_1_0(connect, topic):
    """Frames: 1.0: padded headers as in the examples of the spec ("destination: /topic/x") work
    stomper: frames of stomper 1.0 (padded header values) work end to end"""
    client = connect(None)
    client.send(b'CONNECT\nlogin: me\npasscode: x\n\n\0\n')
    assert client.take().command == 'CONNECTED'
    client.send(b'SUBSCRIBE\ndestination: %b\nack: client\nreceipt: r\n\n\0\n' % topic.encode())
    assert client.take().get('receipt-id') == 'r'
    client.send(b'SEND\ndestination: %b\ncontent-length: 3\nversion: 1\n\na\0b\0\n' % topic.encode())
    message, = client.before_now()
    assert (message.get('destination'), message.body) == (topic, b'a\0b')


def test_repeated_headers(connect, topic):
    """Repeated Header Entries: of a repeated user header the first one is the value
    Repeated Header Entries: of a repeated destination the first one is used"""
    client = connect('1.2')
    client.subscribe(topic)
    client.say('SEND', 'destination:' + topic, 'user:first', 'user:second', 'destination:' + topic + '/other',
               'user:third')
    message, = client.before_now()
    assert message.get('user') == 'first'
    assert message.get('destination') == topic
    assert len(message.names()) == len(set(message.names()))


def test_disconnect_without_a_blank_line(connect):
    """stomper: DISCONNECT without the blank line ('DISCONNECT LF receipt:77 LF NUL', the spec's own
    example) is understood"""
    for version in '1.0', '1.1', '1.2':
        client = connect(version)
        client.send(b'DISCONNECT\nreceipt:77\n\0')
        assert client.take().get('receipt-id') == '77'
        client.take_end()


def test_a_nul_that_no_blank_line_can_follow(connect):
    """What can't become a frame is refused at once, instead of waiting for its end for ever."""
    for data in b'SEND\ndestination:/topic/a\0', b'SEND\nuser\0name:x', b'SEND\0':
        client = connect('1.2')
        client.send(data)
        client.take_error()


@pytest.mark.once
def test_a_long_frame_in_small_pieces_takes_linear_time(connect, topic):
    """A body without content-length is searched for its end; each piece must not begin anew."""
    client = connect('1.2')
    client.subscribe(topic)

    def seconds(size):
        begin = time.monotonic()
        client.send(b'SEND\ndestination:%b\n\n' % topic.encode())
        for _ in range(size // 1000):
            client.send(b'x' * 1000)
        client.send(b'\0')
        assert len(client.take().body) == size
        return time.monotonic() - begin
    small = min(seconds(100 * 1000) for _ in range(3))
    assert min(seconds(1000 * 1000) for _ in range(3)) < 30 * small + 0.5
