"""The running host agent, called from another process on its machine: by the command line, say.

It finds the agent by its state folder, and makes sure that it is the agent before it says anything: by the
Unix socket in that folder, whose other side must be the folder's owner; where there is none by TCP, where
the other side must first prove that it knows the token.

What it is not: a client for other machines (any XML-RPC client is one), or anything of the host's own code.
Threads: a Client belongs to one.
"""

import contextlib
import errno
import fnmatch
import os
import re
import select
import socket
import struct
import sys
import time
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import agent
import localsocket
import rpc
from faults import AccessDenied, DeadlineExceeded, InvalidParams, NoSuchCommand, NoSuchVM, VMHostError

USER = 'vmhost'                # of HTTP Basic, with the token as its password
CONNECT_TIMEOUT = 10.0         # seconds for a connection, and for the proof; an answer may take hours
LONGEST_LINE = 64 * 1024       # bytes of a line of an answer's head
UNHEARD = 5.0                  # seconds without an answer, after which it is asked whether anybody is there …
SILENCE = 15.0                 # … and again; and in which somebody who is there says so
LARGE = 64 * 1024              # bytes of a call that may find nobody who reads
RESTART = 60.0                 # seconds in which a host agent that is restarted should be back …
ASK_AGAIN = 0.2                # … and between two looks whether it is
LOOK_UP = 0.2 if os.name == 'nt' else SILENCE  # seconds between two looks; on Windows Ctrl-C waits for them
CALLED = 'VMHOST_CALLED'       # the environment's word for how this program is called: by vmhost.cmd, say
PROOF = '/proof?nonce=' + 32 * '0'     # what any host agent answers at once
EVERYWHERE = {'0.0.0.0': '127.0.0.1', '::': '::1', '': '127.0.0.1'}     # where it listens: where to connect


def proof(token: str, address: str, nonce: str) -> str:
    """What only who knows the token can answer to a nonce; good for the server at that address alone."""
    import hmac  # where there is a Unix socket, nobody needs it
    text = 'xmlrpc\n%s\n%s' % (address, nonce)
    return hmac.new(token.encode('utf-8'), text.encode('utf-8'), 'sha256').hexdigest()


def program_name() -> str:
    """How this program is called, for help."""
    return os.environ.get(CALLED) or os.path.basename(sys.argv[0]) or 'vmhost.py'


def program() -> str:
    """The same as it can be typed again, for hints."""
    return os.environ.get(CALLED) or called(sys.argv[0], getattr(sys, 'orig_argv', []), agent.ON_WINDOWS,
                                           sys.prefix != sys.base_prefix)


def called(program: str, words: List[str], on_windows: bool, in_venv: bool) -> str:
    """What that is, of what Python says: the program's file, and all that was typed (from Python 3.10 on);
    in_venv: it is that of a virtual environment, which only its path leads to."""
    if words[1:2] == ['-m']:
        return ' '.join(typed(word) for word in words[:3])
    name, extension = os.path.splitext(os.path.basename(program))
    if extension not in ('.py', '.pyz'):
        is_found = os.path.dirname(program) in os.environ.get('PATH', '').split(os.pathsep)
        return name if is_found or on_windows else typed(program) or 'vmhost'
    python = words[0] if words else 'python3'
    if on_windows and (not words or python[1:2] == ':' and not in_venv):
        python = 'py'                  # which the program of that long path was found by
    elif os.path.isabs(python) and not in_venv:
        python = os.path.basename(python)      # pyenv's python3 begins the real one by its path
    return '%s %s' % (typed(python), typed(program))


def how_to_start(words: Sequence[str] = ()) -> str:
    """What a person types to have the host agent; words: what was typed to name its ini file."""
    if os.environ.get(CALLED):         # it names the file itself
        return program()
    return ' '.join([program()] + [typed(word) or '""' for word in words])


def typed(word: str) -> str:
    """A word as it is typed in a shell."""
    return word if re.fullmatch(r'[\w./~:\\+-]*', word) else '"%s"' % word


def hung() -> OSError:
    """What those get who are connected, and are not answered."""
    return TimeoutError(errno.ETIMEDOUT, 'it is there, but answers nobody: it hangs, or was stopped')


class NoHost(VMHostError):
    """No host agent answers. ``was_asked``: one was there, and may have done what it was asked for.
    ``hangs``: one is there."""
    was_asked = hangs = False


class Slice(NamedTuple):
    """A part of a command's output, and whether that is its end."""
    data: bytes
    eof: bool


class Client:
    """The running host agent of a state folder.

    What the host raised comes out as the same VMHostError; NoHost where nobody answers.
    """

    def __init__(self, folder: str, start: str = '', tell: Optional[Callable[[str], None]] = None) -> None:
        """start: what a person types to have that host agent; tell(sentence): that it doesn't answer."""
        self._tell = tell or (lambda sentence: None)
        self.folder = folder
        self.start = start or how_to_start()
        self.address = ''              # where it listens; known once it was called
        self._connection: Optional[_Connection] = None

    def another(self) -> 'Client':
        """For another thread, say."""
        return Client(self.folder, self.start)

    def patient(self, tell: Callable[[str], None]) -> 'PatientClient':
        """One that outlives a restart of the host agent."""
        return PatientClient(self.folder, self.start, tell)

    def call(self, method: str, *args: Any) -> Any:
        """What a method of the API answers. Raises VMHostError."""
        if not _is_carried(args):
            raise InvalidParams('XML-RPC can\'t carry control characters: send them as a file, or as '
                                'standard input')
        return self._ask('POST', '/', rpc.write_call(method, args), lambda _, answer: rpc.read_answer(answer))

    def put_input(self, cmd_id: str, data: bytes, eof: bool, offset: int) -> int:
        """putCmdInput, without what XML costs. Raises VMHostError."""
        path = '/input/%s?eof=%d&offset=%d' % (quoted(cmd_id), eof, offset)
        return self._ask('POST', path, data, lambda _, answer: int(answer))

    def output(self, cmd_id: str, stream: str, offset: int, length: int, timeout: float = 0) -> Slice:
        """getCmdOutput, likewise. Raises VMHostError."""
        path = '/output/%s?stream=%s&offset=%d&length=%d&timeout=%g' % (
            quoted(cmd_id), stream, offset, length, timeout)
        return self._ask('GET', path, b'',
                         lambda headers, answer: Slice(answer, headers['vmhost-eof'] == '1'))

    def terminal(self, cmd_id: str, output: int, visitor: str = '', typed: int = 0) -> 'Line':
        """The line to a command's terminal, whose output is shown from there on. Raises VMHostError.

        visitor    tells this person from others there; the same when a line is begun anew; '': there are none
        typed      where what this person types next begins, as they count it; said again is what came before
        """
        path = '/terminal/%s?output=%d&visitor=%s&input=%d' % (quoted(cmd_id), output, visitor, typed)
        return Line(self, self.reach(lambda: self._upgrade(path)))

    def _upgrade(self, path: str) -> '_Connection':
        connection = self._connect()   # one of its own: calls go on
        code, headers, answer = connection.request('POST', path, b'', UPGRADE)
        if code != 101:
            connection.close()
            self._check(code, headers, answer)
        return connection

    def _ask(self, method: str, path: str, body: bytes, read: Callable[[Dict[str, str], bytes], Any]) -> Any:
        """What an answer says; read(headers, body) tells it. Raises VMHostError."""
        return self.reach(lambda: read(*self._request(method, path, body)))

    def reach(self, ask: Callable[[], Any]) -> Any:
        """What ``ask`` gives; what it raises as VMHostError."""
        try:
            return ask()
        except rpc.Fault as fault:
            raise raised_by(fault)
        except OSError as error:
            was_asked = self._connection is not None
            self._leave()
            hangs = error.errno == errno.ETIMEDOUT
            failed = NoHost('no host agent answers at %s (%s): %sstart it again with `%s`' % (
                self.address, error.strerror or error, 'kill it, and ' * hangs, self.start))
            failed.was_asked, failed.hangs = was_asked, hangs
            raise failed
        except (ValueError, KeyError) as error:        # no HTTP, no XML-RPC
            self._leave()
            raise NoHost('what answers at %s is no vmhost (%s): restart the host agent'
                         % (self.address, error))
        except BaseException:          # Ctrl-C in the middle of an answer: it would be the next call's
            self._leave()
            raise

    def _request(self, method: str, path: str, body: bytes) -> Tuple[Dict[str, str], bytes]:
        """(headers, body) of the answer. Raises VMHostError, Fault, OSError, ValueError."""
        if self._connection is None or self._connection.is_over():
            self._leave()
            self._connection = self._connect()
        code, headers, answer = self._connection.request(method, path, body)
        self._check(code, headers, answer)
        return headers, answer

    def _check(self, code: int, headers: Dict[str, str], answer: bytes) -> None:
        """Raises Fault, NoHost."""
        if 'vmhost-fault' in headers:
            raise rpc.Fault(int(headers['vmhost-fault']), answer.decode('utf-8', 'replace').strip())
        if code != 200:
            self._leave()
            raise NoHost('the host agent at %s refuses: %d %s'
                         % (self.address, code, answer.decode('utf-8', 'replace').strip()))

    def _leave(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> '_Connection':
        """A connection to who has proved to be the host agent. Raises VMHostError, OSError, ValueError."""
        self.address = self._read('xmlrpc.address')
        path = localsocket.path_in(self.folder)
        if path and os.path.exists(path):
            return self._connect_here(path)
        return self._connect_by_tcp()

    def _connect_here(self, path: str) -> '_Connection':
        connection = localsocket.connect(path, CONNECT_TIMEOUT)
        owner = os.stat(self.folder).st_uid
        if localsocket.peer_uid(connection) not in (0, owner):
            connection.close()
            raise AccessDenied('another user\'s program answers at %s: restart the host agent' % path)
        return _Connection(connection).trusted(self.check_alive)

    def _connect_by_tcp(self) -> '_Connection':
        host, _, port = self.address.rpartition(':')
        token = self._read('xmlrpc.token')
        nonce = os.urandom(16).hex()
        connection = _Connection(
            socket.create_connection((EVERYWHERE.get(host, host), int(port)), CONNECT_TIMEOUT))
        try:
            code, _, answer = connection.request('GET', '/proof?nonce=' + nonce)
        except socket.timeout:
            connection.close()
            raise hung()
        wanted = proof(token, self.address, nonce).encode('ascii')
        if code != 200 or answer.strip() != wanted:
            connection.close()
            raise AccessDenied('what answers at %s does not know the token in %s: restart the host agent'
                               % (self.address, os.path.join(self.folder, 'xmlrpc.token')))
        return connection.trusted(self.check_alive, 'Bearer ' + token)

    def check_alive(self) -> None:
        """An answer may take hours, and comes from a host agent that answers others. Raises OSError."""
        if not self.answers(UNHEARD):
            self._tell('the host agent does not answer; still waiting')
            if not self.answers(SILENCE):
                raise hung()

    def answers(self, seconds: float) -> bool:
        """Whether somebody does within that time, or leaves at once. Raises VMHostError."""
        other = self.another()
        try:
            other._connection = other._connect()
            other._connection.request('GET', PROOF, patience=seconds)
        except (socket.timeout, TimeoutError):         # two of them, before Python 3.10
            return False
        except OSError:
            pass                       # it has its hands full
        finally:
            other._leave()
        return True

    def _read(self, name: str) -> str:
        path = os.path.join(self.folder, name)
        try:
            return agent.read_bytes(path).decode('utf-8').strip()
        except FileNotFoundError:
            raise NoHost('no host agent runs here (%s is missing): start it with `%s`, or name the ini file '
                         'that it was started with' % (path, self.start))
        except (OSError, ValueError) as error:
            raise AccessDenied('%s: %s; only the user who runs the host agent can talk to it'
                               % (path, getattr(error, 'strerror', '') or error))

    # What several methods of the API say together.

    def each(self, method: str, names: Iterable[str], *args: Any) -> List[Tuple[str, Any]]:
        """(name, answer) of a method for each name, without those for which it raised."""
        names = list(names)
        calls = [{'methodName': method, 'params': [name] + list(args)} for name in names]
        answers = self.call('system.multicall', calls)
        return [(name, answer[0]) for name, answer in zip(names, answers) if isinstance(answer, list)]

    def vm_names(self) -> List[str]:
        """All VMs, and all machines whose agents are connected; these alone where the hypervisor has never
        answered."""
        agents = set(self.call('listRegisteredVMs'))
        try:
            return sorted(agents.union(self.call('listVMs')), key=agent.in_order)
        except DeadlineExceeded:
            if not agents:
                raise
            return sorted(agents, key=agent.in_order)

    def is_pattern(self, vm: str) -> bool:
        """Whether it is a glob, and not just the name of a VM that has such characters.

        A guest may call itself what it likes, ``*`` too: where a glob means others, it is one.
        """
        if not any(sign in vm for sign in '*?['):
            return False
        names = self.call('getNamesToIdsMapping')
        return vm not in names or any(fnmatch.fnmatchcase(name, vm) for name in names if name != vm)

    def matching(self, vm: str) -> List[str]:
        """The VMs that a glob means; what is no glob, unchanged. Raises NoSuchVM."""
        if not self.is_pattern(vm):
            return [vm]
        return self.matching_of(vm, self.vm_names())

    def matching_known(self, vm: str) -> List[str]:
        """The same, with the machines that are away: who means all of them is told of these, too."""
        if not self.is_pattern(vm):
            return [vm]
        return self.matching_of(vm, sorted(self.call('listKnownVMs'), key=agent.in_order))

    def matching_each(self, patterns: Iterable[str]) -> List[str]:
        """The machines, also those that are away, that names, ids and globs mean, each once. Raises
        NoSuchVM."""
        found = []                     # type: List[str]
        for pattern in patterns:
            names = self.matching_known(pattern)
            names = [self.call('getVM', pattern)['name']] if names == [pattern] else names
            found += [name for name in names if name not in found]
        return found

    def matching_of(self, pattern: str, names: Iterable[str]) -> List[str]:
        """Those of the names that a glob, or a name or id, means. Raises NoSuchVM where there is none."""
        if not any(sign in pattern for sign in '*?['):
            names = [name for name in names if name == pattern]
            return names if len(names) == 1 else [self.call('getVM', pattern)['name']]
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise NoSuchVM('no VM matches %s' % pattern)
        return found


class PatientClient(Client):
    """The same for who follows something: where the host agent goes away, it is waited for, and asked again.

    For what may be asked twice alone.
    """

    def __init__(self, folder: str, start: str, tell: Callable[[str], None]) -> None:
        """tell(sentence): that it is gone, and that it is back."""
        super().__init__(folder, start, tell)
        self._was_there = False        # else it is no restart, but a mistake
        self._is_missed = False        # which was told
        self.back_at = 0.0             # monotonic: when it was back last

    def reach(self, ask: Callable[[], Any]) -> Any:
        """What ``ask`` gives; what it raises as VMHostError, NoHost after RESTART seconds of silence."""
        gone_at = 0.0
        while True:
            try:
                if self._is_missed:    # what is asked may take long to answer
                    super().reach(lambda: self._request('GET', PROOF, b''))
                    self._note_answer()
                answer = super().reach(ask)
                break
            except NoHost as error:
                self._was_there = self._was_there or error.was_asked
                if not self._was_there or gone_at and time.monotonic() > gone_at + RESTART:
                    raise
                gone_at = gone_at or time.monotonic()
                if not self._is_missed:
                    self._is_missed = True
                    self._tell('the host agent does not answer; waiting up to %.0f s for it' % RESTART)
            except VMHostError:        # of a host that is there
                self._note_answer()
                raise
            time.sleep(ASK_AGAIN)
        self._note_answer()
        return answer

    def _note_answer(self) -> None:
        self._was_there = True
        if self._is_missed:
            self._is_missed = False
            self.back_at = time.monotonic()
            self._tell('the host agent is back')


class _Connection:
    """HTTP, as far as the host agent speaks it: one request after the other, each answer with its length."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._file = connection.makefile('rb')
        self._authorization = ''
        self._check_alive: Callable[[], None] = lambda: None

    def trusted(self, check_alive: Callable[[], None], authorization: str = '') -> '_Connection':
        """Itself, which from now on shows that it may ask, and waits as long as an answer takes.

        check_alive raises OSError where there will be none.
        """
        self._authorization = authorization
        self._check_alive = check_alive
        self._socket.settimeout(None)
        return self

    def request(self, method: str, path: str, body: bytes = b'', further: Optional[Dict[str, str]] = None,
                patience: Optional[float] = None) -> Tuple[int, Dict[str, str], bytes]:
        """(status, headers, body) of the answer, within so many seconds. Raises OSError, ValueError."""
        lines = ['%s %s HTTP/1.1' % (method, path), 'Host: localhost', 'Content-Length: %d' % len(body)]
        lines += ['%s: %s' % item for item in (further or {}).items()]
        if self._authorization:
            lines.append('Authorization: ' + self._authorization)
        self._send('\r\n'.join(lines + ['', '']).encode('latin-1') + body)
        self._wait_for_answer(self._socket.gettimeout() if patience is None else patience)
        status = self._line().split(' ', 2)
        if len(status) < 2 or not status[0].startswith('HTTP/1.') or not status[1].isdigit():
            raise ValueError('no HTTP')
        headers = {}
        for line in iter(self._line, ''):
            name, _, value = line.partition(':')
            headers[name.lower()] = value.strip()
        if status[1] == '101':         # what follows is no HTTP
            return 101, headers, b''
        length = int(headers.get('content-length', -1))
        if length < 0:
            raise ValueError('no Content-Length')
        answer = self._file.read(length)
        if len(answer) < length:
            raise ConnectionResetError('it went away in the middle of an answer')
        return int(status[1]), headers, answer

    def _send(self, data: bytes) -> None:
        """What is large may find no room, where nobody reads any more. Raises OSError."""
        before = self._socket.gettimeout()
        if before is None and len(data) > LARGE:
            self._socket.settimeout(SILENCE)
            try:
                self._socket.sendall(data)
            finally:
                self._socket.settimeout(before)
        else:
            self._socket.sendall(data)

    def _wait_for_answer(self, timeout: Optional[float]) -> None:
        """None: as long as somebody is there. Raises OSError."""
        patience = UNHEARD if timeout is None else timeout
        deadline = time.monotonic() + patience
        while not select.select([self._socket], [], [], min(LOOK_UP, patience))[0]:
            patience = deadline - time.monotonic()
            if patience > 0:
                continue
            if timeout is not None:
                raise socket.timeout('no answer within %g s' % timeout)
            self._check_alive()
            patience, deadline = SILENCE, time.monotonic() + SILENCE

    def _line(self) -> str:
        line = self._file.readline(LONGEST_LINE)
        if not line.endswith(b'\n'):
            raise ConnectionResetError('it went away before it answered')
        return line.decode('latin-1').strip()

    def detach(self) -> Tuple[socket.socket, bytes]:
        """The socket, which no longer blocks, and what it has brought already."""
        self._socket.setblocking(False)
        return self._socket, self._file.peek()

    def is_over(self) -> bool:
        """Whether the other side has left, or says what nobody asked for."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def close(self) -> None:
        """Ends the connection."""
        with contextlib.suppress(OSError):
            self._file.close()
            self._socket.close()


# --- a terminal's line -----------------------------------------------------------------------

UPGRADE = {'Connection': 'Upgrade', 'Upgrade': 'vmhost-terminal'}
PIECE = struct.Struct('!cQI')          # kind, offset in the whole, length; then so many bytes
INPUT, LAST_INPUT, OUTPUT, END, FAULT = b'i', b'l', b'o', b'e', b'f'    # kinds
LONGEST_PIECE = 1024 * 1024            # bytes
UNSENT = 256 * 1024                    # bytes that wait for the host agent; no more should be read then


class Pieces:
    """Takes bytes as they come, gives the whole pieces."""

    def __init__(self) -> None:
        self._received = bytearray()

    def take(self, data: bytes) -> Iterator[Tuple[bytes, int, bytes]]:
        """(kind, offset, bytes) of each that is whole now. Raises ValueError."""
        self._received += data
        while len(self._received) >= PIECE.size:
            kind, offset, length = PIECE.unpack_from(self._received)
            if length > LONGEST_PIECE:
                raise ValueError('a piece of %d bytes' % length)
            end = PIECE.size + length
            if len(self._received) < end:
                return
            content = bytes(self._received[PIECE.size:end])
            del self._received[:end]
            yield kind, offset, content


class Line:
    """A command's terminal: what is typed goes there, what it shows comes, both as it happens.

    But for ``finish`` its methods never wait; ``fileno`` is for select.
    """

    def __init__(self, client: Client, connection: _Connection) -> None:
        self._client = client
        self._connection = connection
        self._socket, self._begun = connection.detach()
        self._pieces = Pieces()
        self._fault: Optional[rpc.Fault] = None
        self.unsent = bytearray()      # that the host agent has no room for

    def fileno(self) -> int:
        """Of its connection."""
        return self._socket.fileno()

    @property
    def has_room(self) -> bool:
        """Whether more may be put now."""
        return len(self.unsent) < UNSENT

    def put(self, offset: int, data: bytes, is_last: bool = False) -> None:
        """The next of the input, and where that begins. Raises VMHostError."""
        self.unsent += PIECE.pack(LAST_INPUT if is_last else INPUT, offset, len(data)) + data
        self.flush()

    def flush(self) -> None:
        """Sends what there is room for. Raises VMHostError."""
        self._client.reach(self._flush)

    def _flush(self) -> None:
        try:
            del self.unsent[:self._socket.send(self.unsent)]
        except BlockingIOError:
            return                     # it waits for room

    def check_alive(self) -> None:
        """Nothing has come for SILENCE seconds. Raises NoHost where that is since nobody is there."""
        self._client.reach(self._client.check_alive)

    def finish(self, timeout: float) -> None:
        """Sends the rest of what was put, if there is room within so many seconds. Raises VMHostError."""
        deadline = time.monotonic() + timeout
        while self.unsent and select.select([], [self], [], max(0.0, deadline - time.monotonic()))[1]:
            self.flush()

    def take(self) -> List[Tuple[bytes, int, bytes]]:
        """(OUTPUT or END, offset, bytes) of what has come. Raises VMHostError."""
        return self._client.reach(self._take)      # type: ignore[no-any-return]

    def _take(self) -> List[Tuple[bytes, int, bytes]]:
        data, self._begun = self._begun, b''
        if self._fault is not None:
            raise self._fault
        if not data:
            try:
                data = self._socket.recv(LARGE)
            except BlockingIOError:
                return []
            if not data:
                raise ConnectionResetError('it went away')
        taken = list(self._pieces.take(data))
        if taken and taken[-1][0] == FAULT:    # nothing follows
            code, _, text = taken.pop()[2].decode('utf-8', 'replace').partition(' ')
            self._fault = rpc.Fault(int(code), text)
        return taken

    def close(self) -> None:
        """Leaves; the command goes on."""
        self._connection.close()


def quoted(text: str) -> str:
    """As a part of a path. (urllib.parse would cost each verb some milliseconds.)"""
    return ''.join(chr(byte) if chr(byte).isalnum() and byte < 128 or byte in b'-._@' else '%%%02X' % byte
                   for byte in text.encode('utf-8', 'surrogateescape'))


def _is_carried(value: Any) -> bool:
    """Whether XML can hold all texts of it."""
    if isinstance(value, str):
        return rpc.is_xml(value)
    if isinstance(value, dict):
        return all(_is_carried(name) and _is_carried(item) for name, item in value.items())
    return not isinstance(value, (list, tuple)) or all(map(_is_carried, value))


def raised_by(fault: rpc.Fault) -> VMHostError:
    """A fault as the error that the host raised."""
    kinds = {kind.fault: kind for kind in VMHostError.__subclasses__() if 'fault' in vars(kind)}
    lists = {NoSuchVM.fault: ' (`ls` lists them)', NoSuchCommand.fault: ' (`ps` lists them)'}
    return kinds.get(fault.code, VMHostError)(fault.text + lists.get(fault.code, ''))
