"""The frame codec, without a socket: bytes in, frames out, and back."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocol import (
    CLIENT_COMMANDS,
    MAX_HEAD,
    MAX_HEADERS,
    SERVER_COMMANDS,
    FrameReader,
    LocalError,
    RemoteError,
    encode,
    encode_head,
    escape,
    size_of,
    unescape,
)

ALL = CLIENT_COMMANDS | SERVER_COMMANDS
VERSIONS = ['1.0', '1.1', '1.2']


def read(data, version='1.2', cut=None, **limits):
    """The frames in these bytes, fed in pieces of that size."""
    reader = FrameReader(ALL, version, **limits)
    frames = []
    for begin in range(0, len(data), cut or max(1, len(data))):
        reader.feed(data[begin:begin + (cut or len(data))])
        frame = reader.next_frame()
        while frame is not None:
            frames.append(frame)
            frame = reader.next_frame()
    return frames


def refused(data, version='1.2', **limits):
    """The error that these bytes cause, whole and byte by byte, and the reader."""
    texts = []
    for cut in len(data), 1:
        reader = FrameReader(ALL, version, **limits)
        with pytest.raises(RemoteError) as caught:
            for begin in range(0, len(data), cut):
                reader.feed(data[begin:begin + cut])
                while reader.next_frame() is not None:
                    pass
        texts.append(str(caught.value))
    return texts[-1]


# --- escapes ---

@pytest.mark.parametrize('version, text, escaped', [
    ('1.2', 'a:b\\c\nd\re', 'a\\cb\\\\c\\nd\\re'), ('1.1', 'a:b\\c\nd\re', 'a\\cb\\\\c\\nd\re'),
    ('1.0', 'a:b\\c', 'a:b\\c'), ('1.0', 'a\nb\rc', 'a b c'), ('1.2', '', ''), ('1.2', 'plain ü', 'plain ü')])
def test_escape(version, text, escaped):
    assert escape(text, version) == escaped
    if '\n' not in text or version != '1.0':
        assert unescape(escaped, version) == text


@pytest.mark.parametrize('version, text', [
    ('1.2', '\\t'), ('1.2', '\\'), ('1.2', 'a\\\\\\'), ('1.2', '\\\n'), ('1.1', '\\r'), ('1.1', '\\')])
def test_undefined_escapes(version, text):
    with pytest.raises(RemoteError, match='undefined escape'):
        unescape(text, version)


@given(st.text(), st.sampled_from(['1.1', '1.2']))
def test_what_is_escaped_can_be_unescaped(text, version):
    escaped = escape(text, version)
    assert unescape(escaped, version) == text
    assert not set(escaped) & set(':\n' if version == '1.1' else ':\n\r')


# --- there and back ---

letters = st.characters(blacklist_characters='\0', blacklist_categories=['Cs'])
names = st.text(letters, min_size=1, max_size=10)
values = st.text(letters, max_size=20)


def survives(text, version):
    """Whether a text comes through in that version: 1.0 trims and has no escapes, 1.1 has none for CR."""
    if version == '1.0':
        return text == text.strip() and not set(text) & set('\r\n')
    return True


@given(st.sampled_from(VERSIONS), st.sampled_from(['SEND', 'MESSAGE', 'SUBSCRIBE', 'ERROR']),
       st.dictionaries(names, values, max_size=5), st.binary(max_size=100),
       st.sampled_from([1, 2, 3, 7, 1000]), st.sampled_from([b'', b'\n', b'\r\n\n']))
@example('1.1', 'SEND', {'cr': 'at the end\r'}, b'', 1, b'')
@example('1.2', 'SEND', {'\r': '\r'}, b'\0', 1, b'\n')
def test_encode_and_read(version, command, headers, body, cut, between):
    headers = {name: value for name, value in headers.items()
               if survives(name, version) and survives(value, version) and name != 'content-length'
               and not (version == '1.0' and ':' in name)}
    data = between + encode(command, headers, body, version)
    data += between + encode('ACK', {'id': '1'}, b'', version)
    frames = read(data, version, cut)
    assert [frame.command for frame in frames] == [command, 'ACK']
    assert frames[0].body == body
    found = dict(frames[0].headers)
    assert found.pop('content-length', str(len(body))) == str(len(body))
    assert found == headers


def test_encode():
    assert encode('SEND', {'a': 'b:c'}, b'x\0') == b'SEND\na:b\\cc\ncontent-length:2\n\nx\0\0\n'
    assert encode('SEND', {'a': 'b'}) == b'SEND\na:b\ncontent-length:0\n\n\0\n'
    assert encode('ACK', {'id': '1'}) == b'ACK\nid:1\n\n\0\n'
    assert encode('CONNECT', {'login': 'a:b\\c'}) == b'CONNECT\nlogin:a:b\\c\n\n\0\n'


@pytest.mark.parametrize('command, headers', [
    ('SEND', {'a': 'nul\0'}), ('SEND', {'nul\0': 'a'}), ('CONNECT', {'a': 'line\nend'}),
    ('CONNECTED', {'a:b': 'c'})])
def test_what_can_not_be_said(command, headers):
    with pytest.raises(LocalError):
        encode_head(command, headers.items(), '1.2')


def test_encoding_leaves_the_headers_alone():
    headers = {'a': 'b'}
    encode('SEND', headers, b'x')
    assert headers == {'a': 'b'}


# --- reading ---

SESSION = (b'CONNECT\r\naccept-version:1.2\r\n\r\n\0\n\n'
           b'SEND\ndestination:/a\ncontent-length:3\n\na\0b\0\r\n'
           b'SEND\ndestination:/a\nx:\\c\\n\\\\\\r\n\n\nbody\n\0' b'DISCONNECT\nreceipt:77\n\0\n')


@pytest.mark.parametrize('cut', list(range(1, 40)) + [None])
def test_however_it_is_cut(cut):
    frames = read(SESSION, '1.2', cut)
    assert [frame.command for frame in frames] == ['CONNECT', 'SEND', 'SEND', 'DISCONNECT']
    assert [frame.body for frame in frames] == [b'', b'a\0b', b'\nbody\n', b'']
    assert frames[2].headers == {'destination': '/a', 'x': ':\n\\\r'}
    assert frames[3].headers == {'receipt': '77'}


def test_version_and_size_may_change_between_frames():
    reader = FrameReader(CLIENT_COMMANDS, '1.0', max_body=2)
    reader.feed(b'CONNECT\n\n\0SEND\na:\\n\n\nlonger\0')
    assert reader.next_frame().command == 'CONNECT'
    reader.version, reader.max_body = '1.2', 6
    assert reader.next_frame() == ('SEND', {'a': '\n'}, b'longer')


def test_the_first_of_repeated_headers():
    assert read(b'SEND\na:1\na:2\na:3\n\n\0')[0].headers == {'a': '1'}
    assert read(b'SEND\n\\c:1\n\\c:2\n\n\0')[0].headers == {':': '1'}
    assert read(b'SEND\na: 1\n a:2\n\n\0', '1.0')[0].headers == {'a': '1'}


@pytest.mark.parametrize('version, line, value', [
    ('1.0', b'a : b\t', 'b'), ('1.1', b'a:b\r', 'b\r'), ('1.2', b'a:b\r', 'b'), ('1.2', b'a:b\r\r', 'b\r'),
    ('1.0', b'a:b\r', 'b'), ('1.2', b'a: b ', ' b '), ('1.0', b'a:\\n', '\\n'), ('1.2', b'a:b:c', 'b:c'),
    ('1.2', b'a:', '')])
def test_header_lines(version, line, value):
    assert read(b'SEND\n' + line + b'\n\n\0', version)[0].headers == {'a': value}


@pytest.mark.parametrize('command, lines, expected', [
    ('CONNECT', b'login: me ', {'login': 'me'}),
    ('CONNECT', b'accept-version:1.2\nlogin: me ', {'accept-version': '1.2', 'login': ' me '}),
    ('CONNECT', b'accept-version:1.2\nlogin:\\c\\', {'accept-version': '1.2', 'login': '\\c\\'}),
    ('CONNECTED', b'version:1.1\nserver: x', {'version': '1.1', 'server': ' x'}),
    ('CONNECTED', b'session: 1', {'session': '1'})])
def test_frames_of_the_beginning(command, lines, expected):
    assert read(command.encode() + b'\n' + lines + b'\n\n\0', '1.2')[0].headers == expected


@pytest.mark.parametrize('data, words', [
    (b'NOSUCH\n\n\0', 'unknown command'), (b'send\n\n\0', 'unknown command'),
    (b'GET / HTTP/1.1\r\n', 'unknown'),
    (b'\x16\x03\x01', 'unknown command'), (b'\0', 'unknown command'), (b'SEND \n', 'unknown command'),
    (b'SEND\nno colon\n\n\0', 'colon'), (b'SEND\n:empty name\n\n\0', 'name'),
    (b'SEND\na:\\x\n\n\0', 'escape'),
    (b'SEND\na:\xff\n\n\0', 'UTF-8'), (b'SEND\na:b\0\n\n', 'NUL'), (b'SEND\0\n', 'unknown'),
    (b'SEND\ncontent-length:-1\n\n', 'content-length'), (b'SEND\ncontent-length:x\n\n', 'content-length'),
    (b'SEND\ncontent-length:1\n\nab\0', 'longer')])
def test_what_is_refused(data, words):
    assert words in refused(data)


@pytest.mark.parametrize('data, receipt', [
    (b'SEND\na:\\x\nreceipt:r\\c\n\n\0', 'r:'), (b'SEND\nreceipt:r\r\nno colon\r\n\r\n\0', 'r'),
    (b'NOSUCH\nreceipt:r\n\n\0', 'r'), (b'SEND\nreceipt:r\ncontent-length:1\n\nab', 'r'),
    (b'SEND\nreceipt:r\ncontent-length:99\n\n', 'r'), (b'SEND\nreceipt:r\n\n' + b'x' * 99, 'r'),
    (b'SEND\nreceipt:\\x\n\n\0', None), (b'SEND\nreceipt:nul\0\n\n\0', None),
    (b'SEND\nx:\0\nreceipt:r\n\n\0', 'r'), (b'SEND\nx:receipt:r\nbad\n\n\0', None)])
def test_the_receipt_of_a_refused_frame(data, receipt):
    reader = FrameReader(CLIENT_COMMANDS, '1.2', max_body=50)
    reader.feed(b'SEND\nreceipt:earlier\n\n\0' + data)
    assert reader.next_frame().headers == {'receipt': 'earlier'}
    with pytest.raises(RemoteError):
        reader.next_frame()
    assert reader.refused.headers.get('receipt') == receipt


# --- limits ---

@pytest.mark.parametrize('data', [
    b'SEND\na:' + b'x' * MAX_HEAD, b'SEND\n' + b'a:b\n' * (MAX_HEADERS + 1) + b'\n\0',
    b'SEND\n\n' + b'x' * 2000000,
    b'SEND\ncontent-length:2000000\n\n', b'SEND\n' + b'a:b\n' * MAX_HEAD])
def test_nothing_larger_than_the_limits(data):
    reader = FrameReader(CLIENT_COMMANDS, '1.2')
    fed = 0
    with pytest.raises(RemoteError):
        while fed < len(data):
            reader.feed(data[fed:fed + 1000])
            fed += 1000
            reader.next_frame()
            assert reader.held <= 1024 * 1024 + 2000


def test_limits_are_exact():
    assert read(b'SEND\na:b\na:b\n\nxxx\0', max_head=12, max_headers=2, max_body=3)
    for limits in {'max_head': 11}, {'max_headers': 1}, {'max_body': 2}:
        refused(b'SEND\na:b\na:b\n\nxxx\0', **limits)
    assert read(b'SEND\ncontent-length:3\n\nxxx\0', max_body=3)
    refused(b'SEND\ncontent-length:3\n\nxxx\0', max_body=2)


def test_held():
    reader = FrameReader(CLIENT_COMMANDS, '1.2')
    assert reader.held == 0
    reader.feed(b'\n\r\n')
    assert reader.next_frame() is None and reader.held == 0
    reader.feed(b'SEND\nname:value\ncontent-length:5\n\nab')
    assert reader.next_frame() is None
    assert reader.held == size_of({'name': 'value', 'content-length': '5'}) + len('ab')
    reader.feed(b'cde\0')
    assert reader.next_frame().body == b'abcde' and reader.held == 0


@pytest.mark.once
@pytest.mark.parametrize('head', [
    b'SEND\ndestination:/a\n\n', b'SEND\ndestination:/a\ncontent-length:%d\n\n', b'SEND\ndestination:'])
def test_linear_time(head):
    """Small pieces of a large frame: ten times the size takes about ten times as long, not a hundred."""
    def seconds(size):
        reader = FrameReader(CLIENT_COMMANDS, '1.2', max_head=10 ** 8, max_body=10 ** 8)
        begin = time.process_time()
        reader.feed(head % size if b'%' in head else head)
        for _ in range(size // 20):
            reader.feed(b'x' * 20)
            assert reader.next_frame() is None
        reader.feed(b'\n\n\0' if head.endswith(b':') else b'\0')
        assert reader.next_frame() is not None
        return time.process_time() - begin
    small = min(seconds(100 * 1000) for _ in range(3))
    # A clock of 10 ms, as Windows has it, may tell nothing of the small one.
    assert min(seconds(1000 * 1000) for _ in range(3)) < 30 * max(small, 0.01) + 0.05


@given(st.binary(max_size=200), st.sampled_from(VERSIONS), st.integers(1, 9), st.sampled_from(
    [b'', b'SEND\n', b'SEND\na:b\n\n', b'SEND\ncontent-length:2\n\n', b'CONNECT\n']))
def test_noise_raises_nothing_else_and_cuts_do_not_matter(noise, version, cut, start):
    def outcome(size):
        reader, frames = FrameReader(ALL, version), []
        data = start + noise
        try:
            for begin in range(0, len(data), size):
                reader.feed(data[begin:begin + size])
                frame = reader.next_frame()
                while frame is not None:
                    frames.append(frame)
                    frame = reader.next_frame()
        except RemoteError:
            return frames, True
        return frames, False
    assert outcome(cut) == outcome(1000)
