"""A guest for tests of the host, on a plain STOMP connection: it signs as docs/protocol.md says.

It shares no code with protocol.py, so that a mistake there can't hide from its tests.
"""

import hashlib
import hmac
import json
import os
import time

from stomp_client import TIMEOUT, Client

CONNECTIONS, REQUESTS, RESPONSES = '/topic/connections', '/topic/cmd_requests', '/topic/cmd_responses'
UNSIGNED = {'seq', 'mac', 'destination', 'subscription', 'message-id', 'ack', 'content-length', 'receipt',
            'content-type', 'expires', 'priority', 'timestamp', 'redelivered', 'persistent'}
ESCAPES = ('\\r', '\r'), ('\\n', '\n'), ('\\c', ':'), ('\\\\', '\\')


def keyed(key, *lines):
    return hmac.new(key, '\n'.join(lines).encode(), hashlib.sha256)


def signature(key, direction, seq, topic, headers, body):
    own = ''.join('%s:%s\n' % item for item in sorted(headers.items()) if item[0] not in UNSIGNED)
    return keyed(key, direction, seq, topic, own + body).hexdigest()[:32]


def escaped(text):
    for sign, plain in reversed(ESCAPES):
        text = text.replace(plain, sign)
    return text


def unescaped(text):
    for sign, plain in ESCAPES:
        text = text.replace(sign, plain)
    return text


class Guest(Client):
    """``hello`` first, then ``say`` and ``hear`` signed words; ``pong`` answers the host's."""

    def __init__(self, port, id, secret=None, login=(), host='127.0.0.1'):
        super().__init__((host, port))
        self.id, self.port = id, port
        self.secret = secret or os.urandom(32)
        self.key, self.seq, self.nonce = None, 0, ''
        self.connect(None if login else '1.2', *login)
        self.subscribe(REQUESTS)

    def put(self, topic, headers, body):
        """A frame with exactly these headers, unsigned unless they sign it."""
        lines = ['%s:%s' % (name, escaped(str(value))) for name, value in headers.items()]
        body = body.encode() if isinstance(body, str) else body
        self.say('SEND', 'destination:' + topic, 'content-length:%d' % len(body), *lines, body=body)

    def hello(self, tell=True, **keys):
        """Says HELLO; gives the greeting, once it proved the host, or with which it refused."""
        self.nonce = os.urandom(16).hex()
        keys = dict({'nonce': self.nonce, 'name': self.id, 'boot': 'b', 'session': 's', 'cmds': {}}, **keys)
        if tell:
            keys['secret'] = self.secret.hex()
        body = 'HELLO ' + json.dumps(keys).replace('Infinity', '1e999')
        self.put(CONNECTIONS, {'id': self.id, 'ip': '10.9.8.7'}, body)
        deadline = time.monotonic() + TIMEOUT
        while True:
            headers, word, greeting = self.take_word(deadline)
            if word == 'HELLO' and headers['to'] == self.id and 'mac' not in headers:
                return greeting if 'refused' in greeting else self.enter(greeting)

    def secret_id(self):
        return keyed(self.secret, 'id', self.id).hexdigest()[:16]

    def enter(self, greeting):
        """Begins the session of a greeting, which must prove the host."""
        assert greeting['proof'] == self.proof(greeting)
        self.key, self.seq = keyed(self.secret, 'session', self.id, self.nonce, greeting['nonce']).digest(), 0
        return greeting

    def proof(self, greeting):
        """What proves the host that answers the last HELLO."""
        return keyed(self.secret, 'host', self.id, self.nonce, greeting['nonce']).hexdigest()

    def join(self, **keys):
        """Says HELLO, and proves itself by a signed word."""
        greeting = self.hello(**keys)
        assert 'refused' not in greeting, greeting
        self.word('STILL_ALIVE', CONNECTIONS)
        return self

    def signed(self, word, topic=RESPONSES, headers=(), seq=None, **keys):
        """Headers and body of a signed word."""
        self.seq += 1
        seq = str(seq or self.seq)
        body = '%s %s' % (word, json.dumps(keys).replace('Infinity', '1e999')) if keys else word
        headers = dict(headers, **{'from': self.id})
        return self.sign(topic, headers, body, seq), body

    def sign(self, topic, headers, body, seq):
        return dict(headers, seq=seq, mac=signature(self.key, 'guest', seq, topic, headers, body))

    def body(self, body, topic=RESPONSES):
        """Says whatever that is, signed."""
        self.seq += 1
        self.put(topic, self.sign(topic, {'from': self.id}, body, str(self.seq)), body)

    def word(self, word, topic=RESPONSES, headers=(), **keys):
        """Says a signed word."""
        self.put(topic, *self.signed(word, topic, headers, **keys))

    def take_word(self, deadline):
        """(headers, word, keys) of the next MESSAGE, signed or not."""
        while True:
            frame = self.take(max(0.1, deadline - time.monotonic()))
            if frame.command == 'MESSAGE':
                break
        headers = {}
        for line in frame.lines:
            name, _, value = line.partition(':')
            headers.setdefault(unescaped(name), unescaped(value))
        word, _, text = frame.body.decode().partition(' ')
        headers['body'] = frame.body.decode()
        return headers, word, json.loads(text) if text else {}

    def hear(self, wanted, timeout=TIMEOUT):
        """(headers, keys) of the next word of that name, rightly signed; PINGs meanwhile are answered."""
        deadline = time.monotonic() + timeout
        while True:
            headers, word, keys = self.take_word(deadline)
            body = headers.pop('body')
            if headers['to'] not in (self.id, '*'):
                continue                       # another broker sends everything to everybody
            if 'mac' in headers:
                mac = signature(self.key, 'host', headers['seq'], headers['destination'], headers, body)
                assert headers['mac'] == mac, (headers, body)
            if word == wanted:
                return headers, keys
            if word == 'PING':
                self.word('PONG', headers={'ping-id': headers['ping-id']})
