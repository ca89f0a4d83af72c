"""Trust: which guest is who it says it is, by a secret that it and this host alone know.

What it is not: the arithmetic of proofs and signatures (protocol.py), or the roles of connections to the
embedded broker (hostpolicy.py).

Threads: any thread may call. Each class has one lock, for its own tables; under a session's lock a word is
signed and given to the link, so that its number and its place in the stream agree.
"""

import collections
import ipaddress
import logging
import re
import secrets as random
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import protocol
import vmstates
from agent import Seldom, printable
from faults import Busy
from hostguests import Guests
from hostjournal import Journal, JournalError
from hostworkers import Batch
from protocol import Message, Signatures, Untrusted

log = logging.getLogger('vmhost')

LONGEST_HELLO = 64 * 1024      # bytes: of anything more a guest is asked
TEXTS = 'name', 'host', 'boot', 'session', 'ip'     # of a HELLO; read once it has proved itself
HELLOS = 5.0                   # a second, of one guest on one connection, …
HELLOS_AT_ONCE = 20            # … and so many at once; what is more is dropped unread
PENDING_AT_ONCE = 4            # sessions of one guest that it has not proved yet, on one connection …
PENDING_BYTES = 32 * 1024 * 1024   # … and what all of them together may take
REFUSED_SHOWN = 20             # refusals that are shown, …
REFUSED_FOR = 120.0            # … and for so many seconds: a guest tries again within 30
HELLOS_OF = 1000               # … of so many guests and connections of which that is known
DIGITS = re.compile('(?:[0-9a-f]{32}){1,2}')
UNKNOWN = ('this host knows no secret of %s: it was forgotten, or the journal was lost. Delete the .host '
           'file in the guest\'s state_dir, and it tells its secret anew; a VM gets one at its next start; '
           'one that stands in guest.ini is told by pairVM')
FORGET = 'if it is this machine from now on, `forget %s` on the host lets it in'
OTHER_SECRET = '%s is known by another secret: %s'


class Refusal(Exception):
    """A guest is not let in. The text is for its log, and for ours."""


# --- secrets ---------------------------------------------------------------------------------

class Secrets:
    """What guests and this host share: by id, once pinned; by the VM's uuid, of what its firmware holds.

    In the journal and in memory. Nobody is shown one, but the driver that writes it into a VM.
    """

    def __init__(self, journal: Journal) -> None:
        """Raises JournalError."""
        self._journal = journal
        # Guards the table, and that a secret is made once. The journal is written while it is held.
        self._lock = threading.Lock()
        self._known = {}               # type: Dict[str, str]
        for holder, digits in journal.secrets():
            if not DIGITS.fullmatch(digits):       # nobody knows another one, so that nobody takes its place
                digits = random.token_hex(16)
                log.error('the journal is damaged, the secret of %s lost: until it is forgotten '
                          '(`forget VM`), it is not let in', holder)
            self._known[holder] = digits

    @property
    def host_key(self) -> str:
        """What names this host to guests, for as long as its journal lasts. No secret."""
        return self._made('host/key')

    def firmware_digits(self, uuid: str) -> str:
        """The 32 digits for the firmware of a VM; made at the first call. Raises JournalError."""
        return self._made('vm/' + uuid)

    def _made(self, holder: str) -> str:
        with self._lock:
            if holder not in self._known:
                self._write(holder, random.token_hex(16))
            return self._known[holder]

    def _write(self, holder: str, digits: str) -> None:
        self._write_all({holder: digits})

    def _write_all(self, digits_of: Dict[str, str]) -> None:
        now = time.time()
        with self._journal.writing() as journal:
            for holder, digits in digits_of.items():
                journal.execute('INSERT OR REPLACE INTO secrets VALUES (?, ?, ?)', holder, digits, now)
        self._known.update(digits_of)

    def of_firmware(self, uuid: str) -> bytes:
        """What was written into the firmware of a VM; b'' where nothing was."""
        return self._value('vm/' + uuid)

    def pinned(self, machine_id: str) -> bytes:
        """The secret of a guest; b'' where it has none yet."""
        return self._value(machine_id)

    def _value(self, holder: str) -> bytes:
        with self._lock:
            return bytes.fromhex(self._known.get(holder, ''))

    def pin(self, machine_id: str, secret: bytes) -> None:
        """From now on this is the guest's only one. Raises JournalError."""
        self.pin_all({machine_id: secret})

    def pin_all(self, secret_of: Dict[str, bytes]) -> None:
        """The same for many guests, in one durable write. Raises JournalError."""
        with self._lock:
            news = {machine_id: secret.hex() for machine_id, secret in secret_of.items()
                    if self._known.get(machine_id) != secret.hex()}
            if news:
                self._write_all(news)

    def forget(self, machine_id: str, uuid: str) -> None:
        """Deletes a guest's secret, and what its VM's firmware holds. Raises JournalError."""
        with self._lock:
            holders = [holder for holder in (machine_id, 'vm/' + uuid) if holder in self._known]
            if not holders:
                return
            with self._journal.writing() as journal:
                for holder in holders:
                    journal.execute('DELETE FROM secrets WHERE holder = ?', holder)
            for holder in holders:
                del self._known[holder]


# --- sessions --------------------------------------------------------------------------------

class Session:
    """What follows one HELLO of a guest: its signatures, or None for a guest of another make."""

    __slots__ = ('id', 'connection', 'secret', 'greeting', 'name', 'hello', 'address', 'proved', 'is_told',
                 'lock', '_signatures')

    def __init__(self, hello: Message, machine_id: str, connection: str, secret: bytes = b'',
                 host_key: str = '') -> None:
        self.id = machine_id
        self.connection = connection       # the embedded broker's number of it; '' with another broker
        self.secret = secret
        self.hello = hello
        self.address = ''                  # where the guest is, as the embedded broker sees it
        self.proved = False
        self.is_told = False               # whether its HELLO told the secret, for which it is to be pinned
        self.greeting = {}                 # type: Dict[str, str]   # by what the host proves itself, once
        self.name = ''                     # that the guest was told
        self.lock = threading.Lock()       # see above
        self._signatures = None            # type: Optional[Signatures]
        if secret:
            nonces = machine_id, hello.text('nonce'), protocol.new_nonce()
            self._signatures = Signatures(protocol.session_key(secret, *nonces), 'host')
            self.greeting = {'nonce': nonces[2], 'key': host_key,
                             'proof': protocol.host_proof(secret, *nonces)}

    def say(self, message: Message, send: Callable[[str, Dict[str, str], bytes], bool],
            signed: bool = True) -> bool:
        """Signs a word, and sends it. Raises LocalError."""
        headers, body = dict(message.headers, **{'from': 'host'}), message.body()
        with self.lock:
            if signed and self._signatures is not None:
                headers = self._signatures.sign(message.topic, headers, body)
            if self.connection:
                headers['connection'] = self.connection
            return send(message.topic, headers, body)

    def shortcut_key(self, token: str) -> bytes:
        """By which the pieces of a shortcut are signed; b'' for a guest that signs nothing."""
        return self._signatures.shortcut_key(token) if self._signatures is not None else b''

    def check(self, topic: str, headers: Dict[str, str], body: bytes) -> Dict[str, str]:
        """The headers of a word, as far as the guest signed them. Raises Untrusted."""
        if self._signatures is None:
            return headers
        with self.lock:
            return self._signatures.check(topic, headers, body)


class Sessions:
    """The sessions of all guests. Safe from any thread.

    Of each guest the one that goes on, the one before, whose last words may still arrive, and those
    that it has not proved yet: anybody can say HELLO, and none of that ends what goes on.
    """

    def __init__(self) -> None:
        # Guards the tables; nothing is called while it is held.
        self._lock = threading.Lock()
        self._current = {}             # type: Dict[str, Session]
        self._before = {}              # type: Dict[str, Session]
        self._pending = collections.OrderedDict()  # type: collections.OrderedDict[Session, int]
        self._hellos = {}              # type: Dict[Tuple[str, str], float]     # until when they are paid for

    def of(self, machine_id: str) -> Optional[Session]:
        """The session that goes on."""
        with self._lock:
            return self._current.get(machine_id)

    def ids(self) -> List[str]:
        """Who has a session."""
        with self._lock:
            return list(self._current)

    def may_begin(self, machine_id: str, connection: str, now: float) -> bool:
        """Whether a HELLO of that guest on that connection may be looked at: a few at once, some a second."""
        with self._lock:
            if len(self._hellos) > HELLOS_OF:
                self._hellos.clear()
            paid = max(now, self._hellos.get((machine_id, connection), now))
            if paid > now + HELLOS_AT_ONCE / HELLOS:
                return False
            self._hellos[machine_id, connection] = paid + 1 / HELLOS
            return True

    def add(self, session: Session, size: int) -> None:
        """One that is still to be proved, whose HELLO had so many bytes."""
        with self._lock:
            mine = [other for other in self._pending
                    if (other.id, other.connection) == (session.id, session.connection)]
            for other in mine[:max(0, len(mine) + 1 - PENDING_AT_ONCE)]:
                del self._pending[other]
            self._pending[session] = size
            while sum(self._pending.values()) > PENDING_BYTES:
                self._pending.popitem(last=False)

    def candidates(self, machine_id: str, connection: str) -> List[Session]:
        """Those that a word of that guest, on that connection, may be of; the likeliest first."""
        with self._lock:
            found = [table[machine_id] for table in (self._current, self._before) if machine_id in table]
            return found + [session for session in self._pending
                            if session.id == machine_id and session.connection == connection]

    def begin(self, session: Session) -> bool:
        """It is proved. Whether that is news."""
        with self._lock:
            if session.proved:
                return False
            session.proved = True
            self._pending.pop(session, None)
            self._go_on(session)
            return True

    def confirm(self, session: Session) -> None:
        """The guest said a signed HELLO in it: this is the one that goes on, whichever began last. A guest
        may have lost the nonce of another one, whose greeting tells it nothing, then."""
        with self._lock:
            if session.id in self._current:
                self._go_on(session)

    def _go_on(self, session: Session) -> None:
        current = self._current.get(session.id)
        if current is not None and current is not session:
            self._before[session.id] = current
        self._current[session.id] = session

    def end(self, machine_id: str) -> None:
        """Ends all sessions of a guest."""
        with self._lock:
            self._current.pop(machine_id, None)
            self._before.pop(machine_id, None)
            for session in [session for session in self._pending if session.id == machine_id]:
                del self._pending[session]


class Refusals:
    """Why guests were not let in lately, one sentence of each. Safe from any thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # Guards the table; nothing is called while it is held.
        self._lock = threading.Lock()
        self._latest = collections.OrderedDict()   # type: collections.OrderedDict[str, Tuple[float, str]]

    def add(self, machine_id: str, why: str) -> None:
        """Keeps it instead of the one before."""
        with self._lock:
            self._latest.pop(machine_id, None)
            self._latest[machine_id] = self._clock(), why
            if len(self._latest) > REFUSED_SHOWN:
                self._latest.popitem(last=False)

    def remove(self, machine_id: str) -> None:
        """By now it is let in."""
        with self._lock:
            self._latest.pop(machine_id, None)

    def lately(self) -> List[Tuple[str, str]]:
        """(id, why) of each, the newest last."""
        with self._lock:
            return [(machine_id, why) for machine_id, (when, why) in self._latest.items()
                    if self._clock() - when < REFUSED_FOR]


# --- who is let in ---------------------------------------------------------------------------

class Trust:
    """Judges HELLOs, and checks and signs all other words. Safe from any thread."""

    def __init__(self, secrets: Secrets, guests: Guests, settings: Any,
                 clock: Callable[[], float] = time.monotonic) -> None:
        """``settings``: those of [Host]."""
        self.hypervisor = None         # type: Any     # a driver, once one has been started
        self.secrets = secrets
        self.sessions = Sessions()
        self.untrusted = 0             # words that were dropped
        self._guests = guests
        self._settings = settings
        if settings.unsigned_guests:
            log.warning('[Host] unsigned_guests=yes: whoever reaches the broker can be any guest that has no '
                        'secret')
        self.refusals = Refusals(clock)
        self._drops, self._refusals = Seldom(log, clock), Seldom(log, clock)
        self._is_there = lambda connection: False      # type: Callable[[str], bool]

    # HELLO.

    def judge_first(self, machine_id: str, hello: Message) -> None:
        """For the embedded broker, which tells the guest: as ``judge``, and says so here, too."""
        try:
            self.judge(machine_id, hello)
        except Refusal as why:
            self.refused(machine_id, why)
            raise

    def judge(self, machine_id: str, hello: Message) -> None:
        """Raises Refusal or BadWord where a HELLO can't be let in, whatever it may prove. Asks nobody."""
        for name in TEXTS:
            hello.text(name)
        owner = self._guests.owner_of(machine_id)
        if owner not in (None, machine_id):
            raise Refusal('the id %s is another machine\'s name' % machine_id)
        self._check_place(machine_id)
        try:
            self._guests.check_room(machine_id)
        except Busy as error:
            raise Refusal(str(error))
        if not hello.text('nonce'):
            return self._judge_unsigned(machine_id, hello)
        protocol.read_nonce(hello.text('nonce'))
        self._choose_secret(machine_id, hello)

    def _check_place(self, machine_id: str) -> None:
        """With a hypervisor, an id is one of its VMs'; of other machines where that is configured."""
        is_outside = self.hypervisor is not None and not protocol.is_mac(machine_id)
        if is_outside and self.hypervisor.known_state(machine_id):
            raise Refusal('the id %s is a VM\'s name' % machine_id)
        if is_outside and not self._settings.other_machines:
            raise Refusal('%s is the id of no VM: machines outside of the hypervisor are let in with '
                          '[Host] other_machines=yes' % machine_id)

    def is_vm_to_find(self, machine_id: str) -> bool:
        """Whether that id is one of a VM's, if it is any, which the driver has not seen so far."""
        return self.hypervisor is not None and protocol.is_mac(machine_id) \
            and not self.hypervisor.known_name(machine_id)

    def _judge_unsigned(self, machine_id: str, hello: Message) -> None:
        if not self._settings.unsigned_guests:
            raise Refusal('the agent of %s (vmguest %s) proves nothing: update it. Agents of other makes are '
                          'let in with [Host] unsigned_guests=yes'
                          % (machine_id, printable(hello.text('version')[:40])))
        if self.secrets.pinned(machine_id):
            raise Refusal('%s has a secret, and now an agent that knows none: %s'
                          % (machine_id, FORGET % machine_id))

    def watch_connections(self, is_there: Callable[[str], bool]) -> None:
        """``is_there``: whether the embedded broker still has a connection."""
        self._is_there = is_there

    def board_serial(self, machine_id: str, uuid: str) -> str:
        """What a VM's firmware is to tell as its board's serial number: its secret. Raises JournalError."""
        return 'vmhost:' + self.secrets.firmware_digits(uuid)

    def _firmware(self, machine_id: str) -> bytes:
        uuid = self.hypervisor.known_uuid(machine_id) if self.hypervisor is not None else ''
        return self.secrets.of_firmware(uuid) if uuid else b''

    def _choose_secret(self, machine_id: str, hello: Message) -> Tuple[bytes, bool]:
        """The secret by which that guest is to prove itself, and whether it just told it. Raises Refusal."""
        known = [secret for secret in (self.secrets.pinned(machine_id), self._firmware(machine_id)) if secret]
        told = hello.text('secret')
        if told:
            secret = protocol.read_secret(told)
            if secret in known or not self.secrets.pinned(machine_id) and self._may_be_first(machine_id):
                return secret, True
            raise Refusal(OTHER_SECRET % (machine_id, FORGET % machine_id))
        if not known:
            raise Refusal(UNKNOWN % machine_id)
        wanted = hello.text('secret-id')
        for secret in known:
            if not wanted or wanted == protocol.secret_id(secret, machine_id):
                return secret, False
        raise Refusal(OTHER_SECRET % (machine_id, FORGET % machine_id))

    def _may_be_first(self, machine_id: str) -> bool:
        """Whether that id may be pinned by first use. Raises Refusal."""
        if not self._settings.first_use:
            raise Refusal('nobody is let in by first use here ([Host] first_use=no), and this host knows no '
                          'secret of %s: pairVM tells it one; to a VM it gives one at its next start, which '
                          'its agent reads as root' % machine_id)
        state = self.hypervisor.known_state(machine_id) if self.hypervisor is not None else ''
        if state in (vmstates.OFF, vmstates.SAVED):
            raise Refusal('the VM with the id %s is %s' % (machine_id, state))
        return True

    def begin(self, machine_id: str, hello: Message, size: int, connection: str) -> Session:
        """The session of a HELLO of that many bytes; ``proved`` if that is all it takes, ``is_told`` if
        that is pinned first (``pin_told``).

        Raises Refusal, JournalError.
        """
        if size > LONGEST_HELLO:
            raise Refusal('a HELLO of %d bytes; at most %d are taken' % (size, LONGEST_HELLO))
        self.judge(machine_id, hello)
        if not hello.text('nonce'):
            return self._begin_unsigned(machine_id, hello, connection)
        secret, is_told = self._choose_secret(machine_id, hello)
        session = Session(hello, machine_id, connection, secret, self.secrets.host_key)
        if is_told and secret == self.secrets.pinned(machine_id):
            self._prove(session)
        elif is_told:
            session.is_told = True
        else:
            self.sessions.add(session, size)
        return session

    def pin_told(self, sessions: List[Session]) -> List[Tuple[Session, str]]:
        """Pins what guests have told for the first time, of each id what was told first, in one durable
        write. Gives each session, and why it is refused, or ''. Raises JournalError."""
        judged, secret_of = [], {}     # type: List[Tuple[Session, str]], Dict[str, bytes]
        for session in sessions:
            why = ''
            try:
                self._choose_secret(session.id, session.hello)     # it may have been pinned meanwhile
            except Refusal as refusal:
                why = str(refusal)
            else:
                if secret_of.setdefault(session.id, session.secret) != session.secret:
                    why = OTHER_SECRET % (session.id, FORGET % session.id)
            judged.append((session, why))
        self.secrets.pin_all(secret_of)
        for session, why in judged:
            if not why:
                self._prove(session)
        return judged

    def _begin_unsigned(self, machine_id: str, hello: Message, connection: str) -> Session:
        """Of guests that prove nothing, who is there first stays."""
        other = self.sessions.of(machine_id)
        if other is not None and other.connection != connection and self._is_there(other.connection):
            raise Refusal('the id %s is taken by another agent' % machine_id)
        session = Session(hello, machine_id, connection)
        self.sessions.begin(session)
        return session

    def _prove(self, session: Session) -> bool:
        if session.secret:
            if self.secrets.pinned(session.id) not in (b'', session.secret):
                log.warning('%s proved itself by its firmware: from now on, who was let in under that id by '
                            'first use is not. What ran there until now may have been another\'s', session.id)
            self.secrets.pin(session.id, session.secret)
        self.refusals.remove(session.id)
        return self.sessions.begin(session)

    def secret_of(self, machine_id: str) -> bytes:
        """By what this host proves itself to a guest's file server; b'' where the guest has none."""
        session = self.sessions.of(machine_id)
        return session.secret if session is not None else self.secrets.pinned(machine_id)

    # All other words.

    def check(self, machine_id: str, connection: str, topic: str, headers: Dict[str, str],
              body: bytes) -> Tuple[Dict[str, str], Optional[Session]]:
        """The signed headers of a guest's word, and its session where this word has proved it.

        Raises Untrusted, JournalError.
        """
        why = Untrusted('it has no session')
        for session in self.sessions.candidates(machine_id, connection):
            try:
                signed = session.check(topic, headers, body)
            except Untrusted as error:
                why = error
                continue
            is_new = not session.proved and self._prove(session)
            if body.startswith(b'HELLO'):
                self.sessions.confirm(session)
            return signed, session if is_new else None
        raise why

    def drop(self, machine_id: str, why: Any) -> None:
        """Counts an untrusted word, and says so now and then."""
        self.untrusted += 1
        self._drops.warn(machine_id, 'dropped a word of %s: %s', machine_id, why)

    def refused(self, machine_id: str, why: Any) -> None:
        """Says now and then that a guest is not let in, and keeps why."""
        self.refusals.add(machine_id, printable(str(why)))
        self._refusals.warn(machine_id, '%s is not let in: %s', machine_id, why)

    def forget(self, machine_id: str) -> None:
        """Lets go of a guest's secrets and sessions. Raises JournalError."""
        uuid = self.hypervisor.known_uuid(machine_id) if self.hypervisor is not None else ''
        self.secrets.forget(machine_id, uuid)
        self.sessions.end(machine_id)


class FirstUses:
    """Guests that tell their secret for the first time: all that came meanwhile are pinned by one durable
    write, on ``first-use-1``, so that a crowd of them holds up nobody else's words.

    ``join`` is called there with each that is let in, ``refuse`` with (session, why) for each other one.
    """

    def __init__(self, trust: Trust, journal: Journal, join: Callable[[Session], None],
                 refuse: Callable[[Session, str], None]) -> None:
        self._trust = trust
        self._journal = journal
        self._join = join
        self._refuse = refuse
        self._batch = Batch('first-use', self._pin)

    def add(self, session: Session) -> None:
        """Pins it soon; returns at once."""
        self._batch.add(session)

    def stop(self, deadline: float) -> None:
        """Lets the batch at work end, until that monotonic time."""
        self._batch.stop(deadline)

    def _pin(self, sessions: Dict[Session, None]) -> None:
        try:
            judged = self._trust.pin_told(list(sessions))
        except JournalError as error:
            judged = [(session, str(error)) for session in sessions]
        for session, why in judged:
            if self._batch.is_stopping:
                return
            if why:
                self._refuse(session, why)
            else:
                self._join(session)
        with self._journal.best_effort():
            self._journal.sync()           # what their joining wrote


def read_name(text: str) -> str:
    """A name that a machine gives itself, as it may be shown: printable, at most 64 characters, no '@';
    and no MAC, which is another's id. Characters that Unicode takes for the same (in full width, say) are
    the same, so that none looks like another's name and is told from it by that alone."""
    if any(char > '\x7f' for char in text):
        import unicodedata  # rarely needed
        text = unicodedata.normalize('NFKC', text[:1000])
    name = ''.join(char for char in text if char.isprintable() and char != '@').strip()[:64]
    return '' if protocol.is_mac(name) else name


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches who listens there."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address.lower() == 'localhost'
