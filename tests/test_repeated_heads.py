"""Frames with the head of the one before, which the reader doesn't parse again."""

from hypothesis import given
from hypothesis import strategies as st

from protocol import CLIENT_COMMANDS, FrameReader


def frames_of(reader):
    found = []
    frame = reader.next_frame()
    while frame is not None:
        found.append(frame)
        frame = reader.next_frame()
    return found


HEADS = [b'SEND\ndestination:/topic/a\n\n', b'SEND\ndestination:/topic/a\ncontent-length:3\n\n',
         b'SEND\r\ndestination:/topic/a\r\ncontent-length:3\r\n\r\n',
         b'SEND\ndestination:/topic/a\\cb\nx:\n\n',
         b'ACK\nid:7\n\n', b'DISCONNECT\n']
ONE = st.tuples(st.sampled_from(HEADS), st.sampled_from([b'abc', b'a\nb', b'\n\n\n']),
                st.sampled_from([b'', b'\n', b'\r\n\n']))


@given(st.lists(ONE, max_size=12), st.integers(1, 60))
def test_they_are_read_as_if_each_were_the_first(parts, cut):
    whole, alone = b'', []
    for head, body, line_ends in parts:
        frame = head + (b'' if head.startswith(b'DISCONNECT') else body) + b'\0' + line_ends
        fresh = FrameReader(CLIENT_COMMANDS, '1.2')
        fresh.feed(frame)
        alone += frames_of(fresh)
        whole += frame
    reader, found = FrameReader(CLIENT_COMMANDS, '1.2'), []
    for begin in range(0, len(whole), cut):
        reader.feed(whole[begin:begin + cut])
        found += frames_of(reader)
    assert found == alone and len(found) == len(parts)
    assert not reader.held or whole.endswith((b'\n', b'\r'))


def test_what_is_done_to_the_headers_of_one_is_not_in_the_next():
    reader = FrameReader(CLIENT_COMMANDS, '1.2')
    for _ in range(3):
        reader.feed(HEADS[0] + b'body\0')
        frame = reader.next_frame()
        assert frame.headers == {'destination': '/topic/a'}
        frame.headers['from'] = 'somebody'


def test_another_version_reads_the_same_head_otherwise():
    reader = FrameReader(CLIENT_COMMANDS, '1.0')
    found = []
    for version in ('1.0', '1.2', '1.2'):
        reader.version = version
        reader.feed(HEADS[3] + b'\0')
        found.append(reader.next_frame().headers['destination'])
    assert found == ['/topic/a\\cb', '/topic/a:b', '/topic/a:b']
