"""Tickets: RSA as Chirp has it.
"""

import base64
import os
import re
from typing import List, Tuple

from chirpwire import ChirpError, new_hash

# --- tickets: RSA as Chirp has it ------------------------------------------------------------

KEY_BITS = 2048
CHALLENGE = 64                 # bytes that a server wants signed
SIGNATURE = 2048               # bytes of a signature at most: a key of 16,384 bits
PUBLIC_EXPONENT = 65537
RSA_ALGORITHM = bytes.fromhex('300d06092a864886f70d0101010500')    # AlgorithmIdentifier rsaEncryption, NULL
SMALL_PRIMES = [n for n in range(3, 2000) if all(n % d for d in range(2, int(n ** 0.5) + 1))]
HOST_SUBJECT = 'host:agent'    # whom the ticket acts for


class PublicKey:
    """What a server needs of a ticket. Raises ChirpError for a text that is none."""

    def __init__(self, pem: str) -> None:
        found = re.search(r'-----BEGIN PUBLIC KEY-----([A-Za-z0-9+/=\s]{1,8192})-----END', pem)
        try:
            der = base64.b64decode(''.join(found.group(1).split())) if found else b''
            self.modulus, self.exponent = self._read(der)
        except (ValueError, IndexError):
            raise ChirpError('not a public RSA key (PEM, "BEGIN PUBLIC KEY")')
        if not 600 <= self.modulus.bit_length() <= 8 * SIGNATURE or not 3 <= self.exponent < self.modulus:
            raise ChirpError('a public RSA key of a size that is not accepted')
        self.pem = public_pem(self.modulus, self.exponent)
        self.digest = new_hash('md5', self.pem.encode('ascii')).hexdigest()

    def _read(self, der: bytes) -> Tuple[int, int]:
        algorithm, bits = der_parts(der_content(der, 0x30))
        if algorithm != RSA_ALGORITHM:
            raise ValueError('not RSA')
        modulus, exponent = der_parts(der_content(der_content(bits, 0x03)[1:], 0x30))
        return (int.from_bytes(der_content(modulus, 0x02), 'big'),
                int.from_bytes(der_content(exponent, 0x02), 'big'))

    def verify(self, challenge: bytes, signature: bytes) -> bool:
        """Whether the owner of the private key signed the challenge."""
        size = (self.modulus.bit_length() + 7) // 8
        number_ = int.from_bytes(signature, 'big')
        if len(signature) != size or number_ >= self.modulus:
            return False
        signed = pow(number_, self.exponent, self.modulus).to_bytes(size, 'big')
        return signed == padded(challenge, size)


class Ticket:
    """A key pair: the private part signs what a server asks for. Any thread may use it."""

    def __init__(self, p: int, q: int) -> None:
        self._p, self._q = p, q
        self._exponent = modular_inverse(PUBLIC_EXPONENT, (p - 1) * (q - 1))
        self.public = PublicKey(public_pem(p * q, PUBLIC_EXPONENT))

    @classmethod
    def generate(cls, bits: int = KEY_BITS) -> 'Ticket':
        """A new one; takes about a second."""
        p = q = new_prime(bits // 2)
        while q == p:
            q = new_prime(bits // 2)
        return cls(p, q)

    @classmethod
    def from_pem(cls, pem: str) -> 'Ticket':
        """The one that ``pem`` described. Raises ChirpError."""
        found = re.search(r'-----BEGIN RSA PRIVATE KEY-----([A-Za-z0-9+/=\s]{1,32768})-----END', pem)
        try:
            der = base64.b64decode(''.join(found.group(1).split())) if found else b''
            numbers = [int.from_bytes(der_content(part, 0x02), 'big')
                       for part in der_parts(der_content(der, 0x30))]
            p, q = numbers[4:6]
            if numbers[2] != PUBLIC_EXPONENT or p * q != numbers[1]:
                raise ValueError('not one of ours')
            return cls(p, q)
        except (ValueError, IndexError):
            raise ChirpError('not a private RSA key (PEM, "BEGIN RSA PRIVATE KEY")')

    def pem(self) -> str:
        """The whole of it, as openssl and the real clients (``-i FILE``) read it. A secret."""
        p, q, d = self._p, self._q, self._exponent
        numbers = (0, p * q, PUBLIC_EXPONENT, d, p, q, d % (p - 1), d % (q - 1), modular_inverse(q, p))
        return pem_text('RSA PRIVATE KEY', der_value(0x30, b''.join(map(der_number, numbers))))

    def sign(self, challenge: bytes) -> bytes:
        modulus = self.public.modulus
        size = (modulus.bit_length() + 7) // 8
        number_ = int.from_bytes(padded(challenge, size), 'big')
        return pow(number_, self._exponent, modulus).to_bytes(size, 'big')


def padded(challenge: bytes, size: int) -> bytes:
    """PKCS#1 v1.5, type 1, round the challenge itself: Chirp puts neither hash nor DigestInfo there."""
    return b'\x00\x01' + b'\xff' * (size - 3 - len(challenge)) + b'\x00' + challenge


def new_prime(bits: int) -> int:
    """A prime of exactly so many bits, the two highest set, fit for PUBLIC_EXPONENT."""
    while True:
        candidate = int.from_bytes(os.urandom(bits // 8), 'big') | 3 << (bits - 2) | 1
        if all(candidate % prime for prime in SMALL_PRIMES) and candidate % PUBLIC_EXPONENT != 1 \
                and is_prime(candidate):
            return candidate


def is_prime(candidate: int) -> bool:
    """Miller-Rabin with random bases; wrong once in 2^80 at most."""
    odd, twos = candidate - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(40):
        base = int.from_bytes(os.urandom(2 * candidate.bit_length() // 8), 'big') % (candidate - 3) + 2
        power = pow(base, odd, candidate)
        if power in (1, candidate - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % candidate
            if power == candidate - 1:
                break
        else:
            return False
    return True


def modular_inverse(number_: int, modulus: int) -> int:
    """``pow(number_, -1, modulus)``, which Python knows from 3.8 on."""
    a, b, x, y = number_, modulus, 1, 0
    while b:
        a, b, x, y = b, a % b, y, x - a // b * y
    return x % modulus


def public_pem(modulus: int, exponent: int) -> str:
    """As ``openssl rsa -pubout`` prints it."""
    key = der_value(0x30, der_number(modulus) + der_number(exponent))
    return pem_text('PUBLIC KEY', der_value(0x30, RSA_ALGORITHM + der_value(0x03, b'\x00' + key)))


def pem_text(what: str, der: bytes) -> str:
    text = base64.b64encode(der).decode('ascii')
    lines = [text[at:at + 64] for at in range(0, len(text), 64)]
    return '\n'.join(['-----BEGIN %s-----' % what] + lines + ['-----END %s-----' % what, ''])


def der_value(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, 'big')
    return bytes([tag, 0x80 | len(length)]) + length + content


def der_number(number_: int) -> bytes:
    return der_value(0x02, number_.to_bytes(number_.bit_length() // 8 + 1, 'big'))


def der_parts(data: bytes) -> List[bytes]:
    """The values that follow each other, each with its head. Raises ValueError, IndexError."""
    parts: List[bytes] = []
    while data:
        size, at = data[1], 2
        if size & 0x80:
            at += size & 0x7f
            size = int.from_bytes(data[2:at], 'big')
        if at + size > len(data):
            raise ValueError('cut off')
        parts.append(data[:at + size])
        data = data[at + size:]
    return parts


def der_content(value: bytes, tag: int) -> bytes:
    """What is in a value of that kind. Raises ValueError, IndexError."""
    if value[0] != tag or len(der_parts(value)) != 1:
        raise ValueError('another kind of value')
    return value[2 + (value[1] & 0x7f if value[1] & 0x80 else 0):]
