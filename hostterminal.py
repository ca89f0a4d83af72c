"""A terminal's line: what is typed and what is shown, both on one connection, each as soon as it is there.

``POST /terminal/ID?output=N&visitor=WORD&input=N`` with ``Upgrade: vmhost-terminal`` is answered by 101, and
from then on both sides say pieces (hostclient.py): INPUT and LAST_INPUT to a command with a terminal, OUTPUT,
END or FAULT from it. Each has its offset in the whole, so that a line that breaks is begun anew without loss.
Of the input that is a visitor's own count: several may sit at one terminal, and all of them type.

What it is not: HTTP (hostserver.py), or where input and output are (hostinput.py, hostoutput.py).

Threads: the connection's own reads what is typed, and what comes by a shortcut (hostshortcut.py); ``line-…``
tells what is shown, but what fits is sent at once by the thread that hears it. One lock, held for sending.
"""

import contextlib
import select
import socket
import threading
import time
import urllib.parse
from typing import Any, Callable, Dict, Optional

import hoststreams
import shortcut
from faults import AgentNotConnected, BadState, DeadlineExceeded, InvalidParams, VMHostError
from hostclient import END, FAULT, INPUT, LAST_INPUT, OUTPUT, PIECE, Pieces
from hostinput import Visitor
from hostjournal import Execution
from hostshortcut import Way
from rpc import Fault

PATH = '/terminal/'            # and the command's id
PROTOCOL = 'vmhost-terminal'   # that a connection is upgraded to
SWITCHING = (b'HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %b\r\n\r\n'
             % PROTOCOL.encode('ascii'))
RECEIVE = 64 * 1024            # bytes that are taken from the person at once
SHOW = 64 * 1024               # bytes of output in one piece
RETRY = 0.5                    # seconds until a guest that is away is asked again
PATIENCE = 10.0                # seconds after a command's end, or its person's, for what is still on its way
ASKED_EVERY = 20.0             # seconds for which a guest is asked to tell output
LONGEST_VISITOR = 64           # characters of the word that tells one from others
LOOK_EVERY = 0.25              # seconds until it is seen that a command is lost, or its agent back
NOW = getattr(socket, 'MSG_DONTWAIT', 0)       # 0: this system can't send without waiting


def open_line(host: Any, connection: socket.socket, path: str, query: Dict[str, str],
              asked: Callable[[], None]) -> 'Line':
    """The line that a request is about; asked(): somebody is still there. Raises Fault."""
    offset, typed = hoststreams.number(query, 'output', 0), hoststreams.number(query, 'input', 0)
    try:
        if not (0 <= offset <= 2 ** 53 and 0 <= typed <= 2 ** 53):
            raise InvalidParams('output and input are numbers of bytes')
        execution = host.commands.find_one(urllib.parse.unquote(path[len(PATH):]))
        host.inputs.check_terminal(execution)
    except VMHostError as error:
        raise Fault(error.fault, str(error))
    visitor = Visitor(query['visitor'][:LONGEST_VISITOR], int(typed)) if query.get('visitor') else None
    return Line(host, connection, execution, int(offset), visitor, asked)


class Line:
    """One person's, to one command. ``serve`` on the connection's thread."""

    def __init__(self, host: Any, connection: socket.socket, execution: Execution, offset: int,
                 visitor: Optional[Visitor], asked: Callable[[], None]) -> None:
        """offset: where the output goes on; visitor: None if nobody else types there."""
        self._inputs = host.inputs
        self._output = host.output
        self._connection = connection
        self._execution = execution
        self._visitor = visitor
        self._asked = asked
        self._followed = self._output.follows.of(execution)
        self._offset = offset
        self._rest = b''               # of a piece of which the connection took a part
        self._is_over = False
        self._sending = threading.Lock()
        self._way = Way(host, execution, self._hear_output, self._lose_way)
        self._news = threading.Event()         # there is something that ``_push`` has not sent
        self._thread = threading.Thread(target=self._tell, name='line-' + execution.key, daemon=True)

    def serve(self, begun: bytes) -> None:
        """Until one of both leaves; begun: what the person has said already. Raises OSError."""
        self._connection.settimeout(None)
        # A person may think for hours, and a machine vanish.
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._followed.add_sink(self._push)
        self._thread.start()
        try:
            self._hear(begun)
        finally:
            self._followed.remove_sink(self._push)
            self._is_over = True
            self._news.set()
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            self._thread.join()
            self._way.close()

    # What is typed.

    def _hear(self, data: bytes) -> None:
        pieces = Pieces()
        while True:
            for kind, offset, typed in pieces.take(data):
                if kind in (INPUT, LAST_INPUT):
                    self._put(offset, typed, kind == LAST_INPUT)
            if not self._is_over:
                self._way.wait(self._connection)
            data = b'' if self._is_over else self._connection.recv(RECEIVE)
            if not data:
                return
            self._asked()

    def _put(self, offset: int, data: bytes, is_last: bool) -> None:
        """To the command, as fast as that reads: until then the connection isn't read. Who has left is not
        waited for any longer than that reads."""
        moved = time.monotonic()
        while not self._is_over and not self._execution.ended:
            try:
                taken = self._inputs.put(self._execution, data, is_last, offset, self._pass_on,
                                         self._visitor)
            except (AgentNotConnected, DeadlineExceeded):
                taken = 0
                time.sleep(RETRY)
            except BadState as error:
                if not self._execution.ended:
                    self._tell_fault(error)
                    self._is_over = True
                return
            offset, data = offset + taken, data[taken:]
            if data:
                self._way.give_up()    # the program doesn't read, and what it shows would not be heard
            moved = time.monotonic() if taken else moved
            if not data or time.monotonic() > moved + PATIENCE and has_left(self._connection):
                return

    def _pass_on(self, offset: int, data: bytes, is_last: bool) -> bool:
        return self._way.put(shortcut.LAST_INPUT if is_last else shortcut.INPUT, offset, data)

    def _lose_way(self) -> None:
        """What went by the shortcut may not have arrived, and what the guest told there."""
        self._inputs.say_again(self._execution)
        with self._followed.changed:
            self._followed.doubt()
        self._news.set()

    # What is shown.

    def _hear_output(self, offset: int, data: bytes) -> None:
        """By the shortcut; whoever else follows it has it, too."""
        with self._followed.changed:
            self._followed.take('out', offset, data)

    def _push(self) -> None:
        """Sends what came by now, if nothing else is being sent. On the thread that hears; never waits."""
        if NOW and not self._rest and self._sending.acquire(False):
            try:
                data = self._followed.peek('out', self._offset, SHOW)
                if not data:
                    return self._news.set()
                piece = PIECE.pack(OUTPUT, self._offset, len(data)) + data
                self._offset += len(data)
                try:
                    self._rest = piece[self._connection.send(piece, NOW):]
                except OSError:            # it is full, or broken: the other thread will find out
                    self._rest = piece
                if not self._rest:
                    return
            finally:
                self._sending.release()
        self._news.set()

    def _tell(self) -> None:
        """Sends all that ``_push`` does not, up to the end."""
        late = 0.0                     # monotonic: since when it has ended, and its output can't be had
        with contextlib.suppress(OSError):
            while not self._is_over:
                self._news.clear()
                try:
                    if self._tell_next():
                        return
                except (AgentNotConnected, DeadlineExceeded) as error:
                    late = late or (time.monotonic() if self._execution.ended else 0.0)
                    if late and time.monotonic() - late > PATIENCE:
                        return self._tell_fault(error)
                    self._news.wait(RETRY)
                except VMHostError as error:
                    return self._tell_fault(error)

    def _tell_next(self) -> bool:
        """Sends what there is, or waits for it; whether that was all. Raises OSError, VMHostError."""
        self._asked()
        offset = self._offset
        part = self._output.look(self._execution, 'out', offset, SHOW, ASKED_EVERY)
        with self._sending:
            rest, self._rest = self._rest, b''
            self._connection.sendall(rest)
            data = part['data'][self._offset - offset:] if part is not None else b''
            if data:
                self._offset += len(data)
                self._connection.sendall(PIECE.pack(OUTPUT, self._offset - len(data), len(data)) + data)
        if part is not None and part['eof']:
            self._say(END, self._offset)
            return True
        if part is None or not part['data']:
            self._news.wait(LOOK_EVERY)
        return False

    def _tell_fault(self, error: VMHostError) -> None:
        """Nothing follows. Raises OSError."""
        self._say(FAULT, 0, b'%d %s' % (error.fault, str(error).encode('utf-8', 'replace')))
        self._connection.shutdown(socket.SHUT_WR)

    def _say(self, kind: bytes, offset: int, data: bytes = b'') -> None:
        with self._sending:
            self._connection.sendall(PIECE.pack(kind, offset, len(data)) + data)


def has_left(connection: socket.socket) -> bool:
    """Whether the other side has, though what it said is not all read; as far as this system can tell."""
    if not hasattr(select, 'poll'):
        return False
    poll = select.poll()
    poll.register(connection, getattr(select, 'POLLRDHUP', 0))     # POLLHUP and POLLERR are told anyway
    return bool(poll.poll(0))
