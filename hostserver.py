"""HTTP for the API and its pages: who may ask, and what is asked, on a TCP port and on a Unix socket.

What it is not: XML-RPC (hostdispatch.py calls the methods), or what the pages show (hostpages.py). It speaks
just the HTTP that is needed: http.server would bring e-mail, TLS and compressors along.

Threads: ``xmlrpc`` accepts; each connection has one of its own, ``xmlrpc-…``, so that no call holds up
another. Locks: Server._lock guards the table of connections, and whose they are; nothing is called while it
is held.
"""

import base64
import contextlib
import hmac
import json
import logging
import os
import selectors
import socket
import threading
import time
import urllib.parse
from typing import Any, Dict, List, Optional, Tuple

import agent
import hoststreams
import hostterminal
import localsocket
from faults import InvalidParams, NoSuchCommand, VMHostError
from hostapi import ALIASES, PARTS, Api
from hostclient import EVERYWHERE, USER, proof
from hostdispatch import Dispatcher
from hostpages import PAGE_HEADERS, StatusPage, page_headers, visits_in
from hosttrust import is_loopback
from rpc import Fault

log = logging.getLogger('vmhost')

ADDRESS = 'xmlrpc.address'     # the file that tells clients where it listens
STRANGERS = 16                 # connections that have shown no token; one more, and the oldest of them ends
CALLS_AT_ONCE = 200            # connections that have
HEAD_TIMEOUT = 5.0             # seconds in which a stranger's request has to be whole
SOCKET_TIMEOUT = 75.0          # seconds of silence on a connection of who has shown the token
BACKLOG = 128
ACCEPT_PAUSE = 0.05            # seconds after a connection that couldn't be served
LARGEST_HEAD = 32 * 1024       # bytes of a request's line and headers
LARGEST_CALL = 16 * 1024 * 1024        # bytes of a call
CHALLENGE = {'WWW-Authenticate': 'Basic realm="vmhost"'}
HOW_TO_OPEN = ('the status page opens by a link, valid once and for two minutes, which '
               '`status --open` makes; or for the user %s, with the token' % USER)
REASONS = {200: 'OK', 400: 'Bad Request', 401: 'Unauthorized', 403: 'Forbidden', 404: 'Not Found',
           405: 'Method Not Allowed', 409: 'Conflict', 411: 'Length Required', 413: 'Payload Too Large',
           431: 'Request Header Fields Too Large', 500: 'Internal Server Error', 503: 'Service Unavailable'}


class Refused(Exception):
    """A request that isn't carried out: the status, and why."""

    def __init__(self, code: int, why: str, headers: Optional[Dict[str, str]] = None) -> None:
        super().__init__(code, why)
        self.code = code
        self.why = why
        self.headers = headers or {}


ONCE = ('content-length', 'host', 'authorization')     # headers of which a second one could be a trick


class Request:
    """The head of one request."""

    def __init__(self, head: bytes) -> None:
        """Raises Refused for what is no HTTP."""
        lines = head.decode('latin-1').split('\r\n')
        words = lines[0].split(' ')
        if len(words) != 3 or not words[2].startswith('HTTP/1.'):
            raise Refused(400, 'no HTTP/1.1')
        self.method, target, version = words
        self.path, _, query = target.partition('?')
        self.query = dict(urllib.parse.parse_qsl(query)) if query else {}
        self.headers = {}              # type: Dict[str, str]
        for line in lines[1:]:
            name, colon, value = line.partition(':')
            name = name.lower()
            if not colon or name != name.strip() or name in self.headers and name in ONCE:
                raise Refused(400, 'a bad or repeated header: %.100r' % line)
            self.headers[name] = value.strip()
        connection = self.headers.get('connection', '').lower()
        self.goes_on = connection != 'close' and (version != 'HTTP/1.0' or connection == 'keep-alive')

    def length(self) -> int:
        """How many bytes of body follow. Raises Refused."""
        length = self.headers.get('content-length', '')
        if 'transfer-encoding' in self.headers:    # by which somebody in between may see another end than we
            raise Refused(411, 'Transfer-Encoding is not supported: send Content-Length')
        if not (length.isdigit() and len(length) < 20):
            raise Refused(411, 'Content-Length is missing')
        if int(length) > LARGEST_CALL:
            raise Refused(413, 'a call has at most %d bytes' % LARGEST_CALL)
        return int(length)

    def authorization(self) -> Tuple[str, str]:
        """(scheme in lower case, what is shown) of the header."""
        scheme, _, shown = self.headers.get('authorization', '').partition(' ')
        return scheme.lower(), shown.strip()


class Gate:
    """Who may ask: who shows the token, and no web page of another site."""

    def __init__(self, listen_on: str, token: str) -> None:
        """token    '': anybody may ask"""
        self.token = token
        self._names = {'localhost', '127.0.0.1', '[::1]', listen_on.lower(), '[%s]' % listen_on,
                       socket.gethostname().lower()}
        self._basic = base64.b64encode(('%s:%s' % (USER, token)).encode('utf-8'))

    def has_token(self, request: Request) -> bool:
        """Whether the request carries the token, as HTTP Basic's password or as a bearer, or needs none."""
        scheme, shown = request.authorization()
        wanted = {'basic': self._basic, 'bearer': self.token.encode('utf-8')}.get(scheme, b'')
        if not self.token:
            return True
        return bool(wanted) and hmac.compare_digest(shown.encode('utf-8', 'replace'), wanted)

    def check_origin(self, request: Request, address: str) -> None:
        """Raises Refused for what a page of another site in a browser can send: Origin, or a foreign Host."""
        headers = request.headers
        by_a_page = headers.get('sec-fetch-site') in ('cross-site', 'same-site') \
            and headers.get('sec-fetch-mode') != 'navigate'
        if 'origin' in headers or by_a_page:
            raise Refused(403, 'requests from web pages are refused')
        if not self._is_own_name(headers.get('host'), address):
            raise Refused(403, 'foreign Host')

    def _is_own_name(self, host: Optional[str], address: str) -> bool:
        """Whether a Host header names this server, of which the client uses that address.

        No header: no browser sent it. A foreign name that leads here would be another site's.
        """
        if host is None:
            return True
        name = host.lower()
        head, colon, port = name.rpartition(':')
        if colon and port.isdigit():
            name = head
        return name in self._names or name.strip('[]') == address


class Connection:
    """One connection: its requests, one after the other. On a thread of its own.

    ``is_trusted`` once it has shown the token, or because the system says that it is this user's.
    """

    def __init__(self, server: 'Server', connection: socket.socket, client: str, is_trusted: bool) -> None:
        self.is_trusted = is_trusted
        self.thread = threading.Thread(target=self._run, name='xmlrpc-' + client, daemon=True)
        self._is_local = is_trusted            # by the Unix socket
        self._server = server
        self._socket = connection
        self._client = client
        self._received = b''

    def end(self) -> None:
        """Ends it, from any thread, whatever its own waits for."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if agent.ON_WINDOWS:           # where only that wakes who waits to read
            self._socket.close()

    def close(self) -> None:
        """Ends it, and gives the descriptor back. When its thread has ended, or never began."""
        self.end()
        self._socket.close()

    def _run(self) -> None:
        try:
            while self._serve_one():
                pass
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            log.debug('connection from %s: %s', self._client, error)
        except Exception:       # one connection's end is not the server's
            log.exception('connection from %s', self._client)
        finally:
            self._server.ended(self)

    def _serve_one(self) -> bool:
        """Answers one request; whether there may be another."""
        try:
            head = self._read_head()
            if head is None:
                return False
            request = Request(head)
            log.debug('%s %s %.200s', self._client, request.method, request.path)
            if request.path.startswith(hostterminal.PATH):
                return self._show_terminal(request)
            if hoststreams.split(request.path)[0]:
                self._pass_bytes(request)
            elif request.method == 'POST':
                self._call(request)
            elif request.method == 'GET':
                self._show(request)
            else:
                raise Refused(405, 'only GET and POST are supported', {'Allow': 'GET, POST'})
            return request.goes_on
        except Refused as refused:
            # What the request still holds is not read; the connection can't be used for another one.
            log.debug('refused %s: %s', self._client, refused.why)
            self._respond(refused.code, 'text/plain; charset=utf-8', (refused.why + '\n').encode(),
                          dict(refused.headers, Connection='close'))
            return False

    # Reading and writing.

    def _read_head(self) -> Optional[bytes]:
        """The next request's line and headers; None where the client has left. Raises OSError, Refused."""
        deadline = time.monotonic() + (SOCKET_TIMEOUT if self.is_trusted else HEAD_TIMEOUT)
        while b'\r\n\r\n' not in self._received:
            if len(self._received) > LARGEST_HEAD:
                raise Refused(431, 'a request has at most %d bytes of headers' % LARGEST_HEAD)
            left = deadline - time.monotonic()
            if left <= 0:
                raise socket.timeout('no whole request in time')
            self._socket.settimeout(left)
            data = self._socket.recv(LARGEST_HEAD)
            if not data:
                return None
            self._received += data
        head, _, self._received = self._received.partition(b'\r\n\r\n')
        return head

    def _read_body(self, request: Request) -> bytes:
        """The request's body; shorter where the other side leaves. Raises OSError, Refused."""
        length = request.length()
        self._socket.settimeout(SOCKET_TIMEOUT)
        if request.headers.get('expect', '').lower() == '100-continue':
            self._socket.sendall(b'HTTP/1.1 100 Continue\r\n\r\n')
        parts, missing = [self._received], length - len(self._received)
        while missing > 0:
            parts.append(self._socket.recv(min(missing, 2 ** 20)))
            if not parts[-1]:
                break
            missing -= len(parts[-1])
        body = b''.join(parts)
        self._received = body[length:]
        return body[:length]

    def _respond(self, code: int, kind: str, body: bytes, headers: Optional[Dict[str, str]] = None) -> None:
        """Sends a whole answer, in one piece."""
        lines = ['HTTP/1.1 %d %s' % (code, REASONS[code]), 'Server: vmhost/' + agent.VERSION]
        lines += ['%s: %s' % item for item in (headers or {}).items()]
        lines += ['Content-Type: ' + kind, 'Content-Length: %d' % len(body),
                  'X-Content-Type-Options: nosniff', 'Cache-Control: no-store', '', '']
        self._socket.settimeout(SOCKET_TIMEOUT)
        self._socket.sendall('\r\n'.join(lines).encode('latin-1') + body)

    # What is asked.

    def _admit(self, request: Request, is_visitor: bool = False, why: str = '') -> None:
        """Raises Refused unless the request comes from who may ask."""
        if not (self._is_local or is_visitor or self._server.gate.has_token(request)):
            # To the page itself a browser's own dialogue would only be in the way.
            challenge = {} if request.headers.get('x-requested-with') else CHALLENGE
            needed = 'user %s and the password in state_dir/xmlrpc.token are required' % USER
            raise Refused(401, why or needed, challenge)
        if not self.is_trusted:
            self._server.trust(self)

    def _check_origin(self, request: Request) -> None:
        self._server.gate.check_origin(request, '' if self._is_local else self._socket.getsockname()[0])

    def _call(self, request: Request) -> None:
        """A call of the API."""
        self._check_origin(request)
        self._admit(request)
        if request.path not in ('/', '/RPC2'):
            raise Refused(404, 'calls go to / or /RPC2')
        body = self._read_body(request)
        if len(body) == request.length():
            self._server.note_asked()
            answer = self._server.dispatcher.answer(body, self._client)
            self._server.note_asked()      # the call may have taken long
            self._respond(200, 'text/xml; charset=utf-8', answer)

    def _pass_bytes(self, request: Request) -> None:
        """Input or output of a command."""
        self._check_origin(request)
        self._admit(request)
        kind, _ = hoststreams.split(request.path)
        if request.method != hoststreams.PATHS[kind]:
            raise Refused(405, '/%s takes %s' % (kind, hoststreams.PATHS[kind]))
        body = self._read_body(request) if request.method == 'POST' else b''
        if request.method == 'POST' and len(body) < request.length():
            return
        self._server.note_asked()
        answer = self._server.dispatcher.pass_bytes(request.path, request.query, body, self._client)
        self._server.note_asked()
        self._respond(answer.code, 'application/octet-stream', answer.body, answer.headers)

    def _show_terminal(self, request: Request) -> bool:
        """Gives this connection to a command's terminal, to its end; True where that can't be."""
        self._check_origin(request)
        self._admit(request)
        if request.method != 'POST' or request.headers.get('upgrade') != hostterminal.PROTOCOL:
            raise Refused(405, '%sID takes POST, with Upgrade: %s'
                          % (hostterminal.PATH, hostterminal.PROTOCOL))
        try:
            line = hostterminal.open_line(self._server.host, self._socket, request.path, request.query,
                                          self._server.note_asked)
        except Fault as fault:
            answer = hoststreams.refusal(fault)
            self._respond(answer.code, 'application/octet-stream', answer.body, answer.headers)
            return True
        self._socket.sendall(hostterminal.SWITCHING)
        line.serve(self._received)
        return False

    def _show(self, request: Request) -> None:
        """A page, what the status page asks for, or the proof that this is the host agent."""
        self._check_origin(request)
        head, _, what = request.path[1:].partition('/')
        if head == 'status':
            return self._show_status(what, request)
        if request.path == '/proof':
            answer = self._server.prove(request.query.get('nonce', ''))
            return self._respond(200, 'text/plain', answer.encode('ascii'))
        self._admit(request)
        if request.path == '/metrics':
            import hostmetrics  # for those who have something that reads it
            text = hostmetrics.metrics(self._server.host)
            return self._respond(200, hostmetrics.CONTENT_TYPE, text.encode('utf-8'))
        if request.path != '/':
            raise Refused(404, 'no page %.100s' % request.path)
        import hostreference  # an agent whose reference nobody reads does without its memory
        page = hostreference.reference_page(Api.__doc__ or '', PARTS, ALIASES)
        self._respond(200, 'text/html; charset=utf-8', page.encode(), page_headers(page))

    def _show_status(self, what: str, request: Request) -> None:
        """The status page and its questions: for who has the token, a visit's secret, or a key."""
        status = self._server.status
        scheme, shown = request.authorization()
        visit = '' if what else status.enter(request.query)
        self._admit(request, bool(visit) or scheme == 'bearer' and status.is_visitor(shown), HOW_TO_OPEN)
        if what:
            code, answer = answer_page(status, what, request.query)
            self._respond(code, 'application/json', json.dumps(answer).encode(), PAGE_HEADERS)
        else:
            self._respond(200, 'text/html; charset=utf-8', status.page(visit), status.headers)


def answer_page(status: StatusPage, what: str, query: Dict[str, str]) -> Tuple[int, Dict[str, Any]]:
    """(status, answer) to one of the page's questions."""
    try:
        return 200, status.read(what, query)
    except (ValueError, OverflowError, KeyError, InvalidParams) as error:
        return 400, {'error': str(error)}
    except NoSuchCommand as error:
        return 404, {'error': str(error)}
    except VMHostError as error:
        return 503, {'error': str(error)}


def why_open_to_all(settings: Any) -> str:
    """Why nobody may listen as the section [Host] has it; '' where that is well."""
    if settings.xmlrpc_auth or is_loopback(settings.xmlrpc_listen_on):
        return ''
    return ('[Host] xmlrpc_auth = no: anybody on %s could run commands; expected '
            'xmlrpc_listen_on = 127.0.0.1 with it' % settings.xmlrpc_listen_on)


class Server:
    """Listens on the XML-RPC port and on the state folder's socket, a thread per connection.

    ``start`` and ``stop`` are for the main thread; ``trust``, ``ended`` and ``prove`` for connections.
    """

    def __init__(self, host: Any) -> None:
        """Listens. Raises VMHostError that names the port."""
        settings = host.settings.Host
        api = Api(host)
        self.gate = Gate(settings.xmlrpc_listen_on, host.token if settings.xmlrpc_auth else '')
        self.dispatcher = Dispatcher(host, api)
        self.status = StatusPage(host, api, visits_in(host.folder))
        self.host = host
        self.asked = time.monotonic()                  # when the API was called last
        self._token = host.token
        self._folder = host.folder
        self._lock = threading.Lock()
        self._connections: List[Connection] = []       # the oldest first
        self._stopping, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._accept_all, name='xmlrpc', daemon=True)
        listen_on = settings.xmlrpc_listen_on
        self._listener = listen_by_tcp(listen_on, host.folder.port('xmlrpc', listen_on, settings.xmlrpc_port))
        self.address = self._listener.getsockname()[:2]
        self._local = self._listen_here(host.folder.path)
        self._local_path = localsocket.path_in(host.folder.path)

    def _listen_here(self, folder: str) -> Optional[socket.socket]:
        try:
            return localsocket.listen(folder, BACKLOG)
        except OSError as error:       # a file system without sockets
            log.warning('%s: %s; clients use TCP', localsocket.path_in(folder), error)
            return None

    def start(self) -> None:
        """Serves, on the thread ``xmlrpc``; the file xmlrpc.address tells clients where."""
        self._thread.start()
        self._folder.write(ADDRESS, '%s:%s' % self.address)
        self._folder.keep_port('xmlrpc', self.address[1])

    def note_asked(self) -> None:
        """Somebody is there."""
        self.asked = time.monotonic()

    def own_url(self) -> str:
        """Where a browser on this machine finds this server."""
        listen_on, port = self.address
        name = EVERYWHERE.get(listen_on, listen_on)
        return 'http://%s:%d/' % ('[%s]' % name if ':' in name else name, port)

    def prove(self, nonce: str) -> str:
        """What shows a client that this server knows the token, and is no other's."""
        return proof(self._token, '%s:%s' % self.address, nonce)

    # Connections.

    def _accept_all(self) -> None:
        with selectors.DefaultSelector() as selector:
            for listener in filter(None, (self._listener, self._local, self._stopping)):
                selector.register(listener, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]      # type: List[Any]
                if self._stopping in ready:
                    return
                for listener in ready:
                    self._accept_one(listener)

    def _accept_one(self, listener: Any) -> None:
        """The next connection, if there is room for it."""
        try:
            self._accept(listener)
        except (OSError, RuntimeError) as error:       # no more descriptors, or threads
            log.warning('a connection can\'t be served: %s', error)
            time.sleep(ACCEPT_PAUSE)

    def _accept(self, listener: Any) -> None:
        """Hands the next connection to a thread of its own. Raises OSError, RuntimeError."""
        accepted, address = listener.accept()
        try:
            if listener is self._local:
                connection = self._from_here(accepted)
            else:
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = Connection(self, accepted, 'vmhost@%s' % address[0], False)
            self._make_room(connection.is_trusted)
            with self._lock:
                self._connections.append(connection)
            try:
                connection.thread.start()
            except RuntimeError:
                self._forget(connection)
                raise
        except BaseException:
            accepted.close()
            raise

    def _from_here(self, accepted: socket.socket) -> Connection:
        uid = localsocket.peer_uid(accepted)
        if uid not in (0, os.getuid()):
            raise PermissionError('user %d is neither root nor the agent\'s own' % uid)
        return Connection(self, accepted, 'uid %d' % uid, True)

    def _make_room(self, is_trusted: bool) -> None:
        """Ends the oldest stranger where there are as many as may be. Raises OSError where none has to go."""
        with self._lock:
            same = [connection for connection in self._connections if connection.is_trusted == is_trusted]
        if is_trusted and len(same) >= CALLS_AT_ONCE:
            raise OSError('more than %d connections' % CALLS_AT_ONCE)
        if not is_trusted and len(same) >= STRANGERS:
            self._forget(same[0])
            same[0].end()

    def trust(self, connection: Connection) -> None:
        """Counts a connection among those that have shown the token. Raises Refused where it was ended."""
        with self._lock:
            count = sum(one.is_trusted for one in self._connections)
            if count >= CALLS_AT_ONCE or connection not in self._connections:
                raise Refused(503, 'more than %d connections' % CALLS_AT_ONCE)
            connection.is_trusted = True

    def ended(self, connection: Connection) -> None:
        """A connection's thread is about to end."""
        self._forget(connection)
        connection.close()

    def _forget(self, connection: Connection) -> None:
        with self._lock:
            if connection in self._connections:
                self._connections.remove(connection)

    def stop(self, timeout: float = 1.0) -> None:
        """Ends all connections, and the threads with a deadline."""
        self._waker.send(b'\0')
        if self._thread.ident is not None:
            self._thread.join(timeout)
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.end()
        deadline = time.monotonic() + timeout
        for connection in connections:
            connection.thread.join(max(0, deadline - time.monotonic()))
            if connection.thread.is_alive():
                log.warning('thread %s still runs', connection.thread.name)
        for listener in filter(None, (self._listener, self._local, self._stopping, self._waker)):
            listener.close()
        for path in filter(None, (self._folder.file(ADDRESS), self._local_path)):
            with contextlib.suppress(OSError):
                os.remove(path)


def listen_by_tcp(listen_on: str, port: int) -> socket.socket:
    """A listening socket. Raises VMHostError that names the keys."""
    listener = socket.socket(socket.AF_INET6 if ':' in listen_on else socket.AF_INET)
    try:
        if os.name == 'posix':         # on Windows it would let another process take the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((listen_on, port))
        listener.listen(BACKLOG)
        return listener
    except (OSError, OverflowError) as error:
        listener.close()
        why = agent.why_not_listening(error) if isinstance(error, OSError) else error
        raise VMHostError('XML-RPC can\'t listen on %s:%s ([Host] xmlrpc_listen_on, xmlrpc_port): %s'
                          % (listen_on, port, why))
