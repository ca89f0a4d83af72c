"""Ids, proofs and signatures, as docs/protocol.md says them: the pure part of protocol.py."""

import hashlib
import hmac
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import protocol
from protocol import Signatures, Untrusted

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KEY = bytes(range(32))


# --- ids ---

@pytest.mark.parametrize('text, id', [
    ('0a:00:27:aa:bb:01', '0A:00:27:AA:BB:01'), ('0A:00:27:AA:BB:01', '0A:00:27:AA:BB:01'), ('web1', 'web1'),
    ('WEB1', 'WEB1'), ('a', 'a'), ('0', '0'), ('a.b_c-d', 'a.b_c-d'), ('x' * 64, 'x' * 64)])
def test_ids_have_one_form(text, id):
    assert protocol.read_id(text) == id == protocol.read_id(id)


@pytest.mark.parametrize('text', [
    '', ' ', 'x' * 65, '.a', '-a', '_a', 'a b', 'a\n', 'a:b', 'a*', 'a@b', 'a/b', 'gauß', 'ſtart',
    '08:00:27:AA:ﬀ:01', '08:00:27:AA:0:01', '08:00:27:AA:00:01:02', '٣', 'a\0', 'auto\r'])
def test_what_is_no_id(text):
    with pytest.raises(protocol.BadWord):
        protocol.read_id(text)
    with pytest.raises(ValueError):
        protocol.guest_id(text)


@given(st.text(max_size=70))
def test_an_id_is_ascii_and_one_form_of_itself(text):
    try:
        id = protocol.read_id(text)
    except protocol.BadWord:
        return
    assert id.isascii() if hasattr(id, 'isascii') else id.encode('ascii')
    assert protocol.read_id(id) == id and id in (text, text.upper())


def test_words_are_addressed_exactly():
    assert protocol.is_addressed('node1', 'node1', 'x') and not protocol.is_addressed('NODE1', 'node1', 'x')
    assert not protocol.is_addressed('', 'node1', '') and protocol.is_addressed('no*', 'node1', 'x')
    assert protocol.is_addressed('x', 'node1', 'x') and not protocol.is_addressed('N*', 'node1', 'x')


@pytest.mark.parametrize('headers, body', [
    ({}, 'CMD_QUERY {"cmd-id": "a\\nb"}'), ({}, 'PING {"ping-id": "\\u0000"}'),
    ({'cmd-id': 'a\nb'}, 'CMD_QUERY')])
def test_what_an_answer_repeats_can_be_a_header(headers, body):
    with pytest.raises(protocol.BadWord):
        protocol.interpret(headers, body)


# --- what the page shows ---

def test_the_worked_example_of_the_page():
    with open(os.path.join(TOP, 'docs', 'protocol.md'), encoding='utf-8') as page:
        block = re.search(r'^```text\nsecret .*?^```$', page.read(), re.DOTALL | re.MULTILINE).group()
    example = dict(line.split(None, 1) for line in block.splitlines()[1:-1])
    secret = bytes.fromhex(example['secret'])
    nonces = example['id'], example['guest-nonce'], example['host-nonce']

    def keyed(key, text):
        return hmac.new(key, text.encode(), hashlib.sha256)

    assert keyed(secret, '\n'.join(('host',) + nonces)).hexdigest() == example['proof']
    assert protocol.host_proof(secret, *nonces) == example['proof']
    key = keyed(secret, '\n'.join(('session',) + nonces)).digest()
    assert key.hex() == example['session-key'] == protocol.session_key(secret, *nonces).hex()
    signed = ('host\n1\n/topic/cmd_requests\n'
              'cmd-id:42\nfrom:host\nsignal:TERM\nto:%s\nCMD_SIGNAL' % nonces[0])
    assert keyed(key, signed).hexdigest()[:32] == example['mac']
    headers = {'from': 'host', 'to': nonces[0], 'cmd-id': '42', 'signal': 'TERM'}
    assert Signatures(key, 'host').sign('/topic/cmd_requests', headers, b'CMD_SIGNAL') == dict(
        headers, seq='1', mac=example['mac'])


def test_a_proof_is_for_one_secret_id_and_pair_of_nonces():
    parts = [KEY, 'web1', '0' * 32, '1' * 32]
    proof = protocol.host_proof(*parts)
    assert protocol.is_proof(proof, *parts)
    for n, other in enumerate((KEY[::-1], 'web2', '1' * 32, '0' * 32)):
        assert not protocol.is_proof(proof, *(parts[:n] + [other] + parts[n + 1:]))
    for wrong in ('', proof[:-1], proof.upper(), 'ü' * 64, '\udcff'):
        assert not protocol.is_proof(wrong, *parts)


@pytest.mark.parametrize('text', ['', '0' * 31, '0' * 33, 'g' * 32, 'A' * 32, '0' * 32 + '\n'])
def test_what_is_no_nonce(text):
    with pytest.raises(protocol.BadWord):
        protocol.read_nonce(text)


def test_a_secret_that_can_not_be_read_is_not_shown():
    with pytest.raises(protocol.BadWord) as caught:
        protocol.read_secret('ab' * 31 + 'x')
    assert 'abab' not in str(caught.value)
    assert protocol.read_secret('AB' * 32) == b'\xab' * 32


# --- signatures ---

def pair():
    return Signatures(KEY, 'host'), Signatures(KEY, 'guest')


TOPIC = protocol.CMD_REQUESTS
WORD = {'from': 'host', 'to': 'web1', 'cmd-id': '7', 'cmd': 'id'}
BODY = b'CMD_RUN {"stdin":"x"}'


def test_words_pass_both_ways():
    host, guest = pair()
    for n in range(1, 4):
        signed = host.sign(TOPIC, WORD, BODY)
        assert signed['seq'] == str(n) and re.fullmatch('[0-9a-f]{32}', signed['mac'])
        assert guest.check(TOPIC, signed, BODY) == WORD
    host.check(protocol.CMD_RESPONSES, guest.sign(protocol.CMD_RESPONSES, {'from': 'web1'}, b'PONG'), b'PONG')


def test_what_brokers_add_is_not_signed_and_not_given():
    host, guest = pair()
    signed = dict(host.sign(TOPIC, WORD, BODY), **{
        'destination': TOPIC, 'subscription': '0', 'message-id': 'ID:x-1', 'ack': '3', 'content-length': '21',
        'content-type': 'text/plain', 'expires': '0', 'priority': '4', 'timestamp': '1'})
    assert guest.check(TOPIC, signed, BODY) == WORD


def test_what_is_signed_of_those_is_given():
    """A sender may sign a timestamp, where the broker leaves it as it is."""
    headers = dict(WORD, timestamp='5')
    lines = ['host', '1', TOPIC] + ['%s:%s' % item for item in sorted(headers.items())] + [BODY.decode()]
    text = '\n'.join(lines)
    mac = hmac.new(KEY, text.encode(), hashlib.sha256).hexdigest()[:32]
    assert pair()[1].check(TOPIC, dict(headers, seq='1', mac=mac), BODY) == headers


@pytest.mark.parametrize('change', [
    dict(cmd='rm'), {'cmd-id': '8'}, dict(to='*'), dict(seq='2'), dict(seq='01'), dict(seq=''),
    dict(seq='1\n'), dict(mac=''), dict(mac='0' * 32), dict(mac='ü'), dict(user='root'),
    {'cmd-id': '7\nuser:root'}, {'x:y': 'z'}, {'x\ny': 'z'}])
def test_a_changed_word_is_refused(change):
    host, guest = pair()
    signed = dict(host.sign(TOPIC, WORD, BODY), **change)
    with pytest.raises(Untrusted):
        guest.check(TOPIC, signed, BODY)


def test_a_missing_header_another_body_topic_side_or_key_is_refused():
    host, guest = pair()
    signed = host.sign(TOPIC, WORD, BODY)
    less = {name: value for name, value in signed.items() if name != 'cmd'}
    for topic, headers, body, ear in (
            (TOPIC, less, BODY, guest), (TOPIC, signed, BODY + b' ', guest),
            (protocol.CONNECTIONS, signed, BODY, guest), (TOPIC, signed, BODY, host),
            (TOPIC, signed, BODY, Signatures(KEY[::-1], 'guest'))):
        with pytest.raises(Untrusted):
            ear.check(topic, headers, body)
    assert guest.check(TOPIC, signed, BODY) == WORD


def test_a_line_end_can_not_be_signed():
    host, guest = pair()
    for headers in ({'path': 'a\nuser:root'}, {'a:b': 'c'}, {'a\nb': 'c'}):
        with pytest.raises(protocol.LocalError):
            host.sign(TOPIC, headers, BODY)
    message = protocol.CMD_RUN.howToSay('web1', '7', 'a\nb', [], {}, ' path ')
    guest.check(TOPIC, host.sign(TOPIC, message.headers, message.body()), message.body())
    assert (message.text('cmd'), message.text('path')) == ('a\nb', ' path ')


def text_without(characters, **size):
    return st.text(st.characters(blacklist_categories=('Cs',), blacklist_characters=characters), **size)


@given(st.dictionaries(text_without(':\n\0', min_size=1), text_without('\n\0')), st.binary(max_size=100))
def test_any_headers_and_body_pass(headers, body):
    host, guest = pair()
    signed = host.sign(TOPIC, headers, body)
    assert guest.check(TOPIC, signed, body) == protocol.own_headers(headers)


@given(st.lists(st.integers(1, 200), max_size=150))
def test_each_word_is_heard_once_within_the_window(order):
    host, guest = pair()
    words = {n: host.sign(TOPIC, WORD, BODY) for n in range(1, 201)}
    heard, highest = set(), 0
    for n in order:
        if n in heard or n <= highest - protocol.WINDOW:
            with pytest.raises(Untrusted):
                guest.check(TOPIC, words[n], BODY)
        else:
            guest.check(TOPIC, words[n], BODY)
            heard.add(n)
            highest = max(highest, n)


def test_a_forged_number_moves_no_window():
    host, guest = pair()
    signed = host.sign(TOPIC, WORD, BODY)
    with pytest.raises(Untrusted):
        guest.check(TOPIC, dict(signed, seq='999999999999999999'), BODY)
    guest.check(TOPIC, signed, BODY)
