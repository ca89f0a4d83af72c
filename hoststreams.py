"""The bytes of commands by HTTP as they are, without XML and base64: for the command line, and curl.

``POST /input/ID?offset=N&eof=1`` is putCmdInput, ``GET /output/ID?stream=out&offset=N&length=N&timeout=S`` is
getCmdOutput: what is a Binary there is the body here, what else is answered is in headers.

What it is not: HTTP (hostserver.py), or the methods (hostapi.py). No threads, no state.
"""

import urllib.parse
from typing import Any, Callable, Dict, NamedTuple, Tuple

from faults import (
    AccessDenied,
    AgentNotConnected,
    BadState,
    DeadlineExceeded,
    InvalidParams,
    NoSuchCommand,
    NoSuchVM,
)
from rpc import Binary, Fault

FAULT, SIZE, EOF = 'Vmhost-Fault', 'Vmhost-Size', 'Vmhost-Eof'     # headers of answers
STATUS = {InvalidParams.fault: 400, AccessDenied.fault: 403, NoSuchVM.fault: 404, NoSuchCommand.fault: 404,
          BadState.fault: 409, AgentNotConnected.fault: 503, DeadlineExceeded.fault: 503}
PATHS = {'input': 'POST', 'output': 'GET'}


class Answer(NamedTuple):
    """What is sent back: the status, the headers, the body."""
    code: int
    headers: Dict[str, str]
    body: bytes


def split(path: str) -> Tuple[str, str]:
    """(input or output, the command's id) of a path; '' where it is none of these."""
    kind, _, cmd_id = path[1:].partition('/')
    return (kind, urllib.parse.unquote(cmd_id)) if kind in PATHS else ('', '')


def answer(call: Callable[[str, list], Any], path: str, query: Dict[str, str], body: bytes) -> Answer:
    """To one request. call(method, arguments) raises Fault."""
    kind, cmd_id = split(path)
    try:
        if kind == 'input':
            arguments = [cmd_id, Binary(body), query.get('eof', '0') == '1', number(query, 'offset', -1)]
            return Answer(200, {}, b'%d\n' % call('putCmdInput', arguments))
        found = call('getCmdOutput', [cmd_id, query.get('stream', 'out'), number(query, 'offset', 0),
                                      number(query, 'length', 65536), number(query, 'timeout', 0)])
        return Answer(200, {SIZE: '%d' % found['size'], EOF: '%d' % found['eof']}, found['data'].data)
    except Fault as fault:
        return refusal(fault)


def refusal(fault: Fault) -> Answer:
    """The answer to what raised it."""
    return Answer(STATUS.get(fault.code, 500), {FAULT: '%d' % fault.code}, (fault.text + '\n').encode())


def number(query: Dict[str, str], name: str, default: float) -> float:
    """A number that is asked with. Raises Fault."""
    try:
        return float(query[name]) if name in query else default
    except ValueError:
        raise Fault(InvalidParams.fault, '%s is a number' % name)
