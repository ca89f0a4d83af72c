"""What callers of the API give: read into what the host's parts work with, or refused by the argument's name.

What it is not: a check of types (hostdispatch.py has done that), or of what a VM can do. No threads, no
state.
"""

import base64
import binascii
import os
import re
from typing import Any, Dict, List, Tuple

import agent
import chirpwire
import localnames
import protocol
from faults import InvalidParams
from rpc import Binary, FilePath

FLAG, NUMBER = (bool, int), (int, float)
OPTIONS = {                    # of runCmd: what it is called here, on the wire, and its type
    'stdin': ('stdin', (str, Binary)), 'stdin64': ('stdin64', (str, Binary)),
    'timeout': ('timeout', NUMBER), 'killAfter': ('kill-after', NUMBER),
    'user': ('user', (str,)), 'envClear': ('env-clear', FLAG), 'nice': ('nice', (int,)),
    'limits': ('limits', (dict,)), 'statusInterval': ('status-interval', NUMBER),
    'outputLimit': ('output-limit', NUMBER), 'inlineOutput': ('inline-output', NUMBER),
    'expires': ('expires', NUMBER), 'terminal': ('terminal', (dict,)), 'leave': ('leave', FLAG),
    'endLeft': ('end-left', FLAG), 'queue': ('queue', FLAG), 'id': ('id', (str,)),
    'mayReturn': ('mayReturn', FLAG),
}
TYPES = {(str,): 'text', (str, Binary): 'text, or base64', (int,): 'a whole number', NUMBER: 'a number',
         FLAG: 'true or false', (dict,): 'a struct'}   # type: Dict[Tuple[type, ...], str]
LIMITS = ('as', 'cpu', 'fsize', 'nofile', 'nproc', 'memory', 'cpus', 'pids')
MOST_ROWS = 65535              # of a terminal, and columns
LARGEST_NUMBER = 1e18          # of seconds or bytes, so that no system's integer overflows


def read_local(path: FilePath) -> str:
    """A path of this machine, as text whose surrogates stand for what isn't UTF-8."""
    return localnames.native(path) if isinstance(path, str) else os.fsdecode(path.data)


def read_remote(path: FilePath) -> str:
    """The same for a path of a guest."""
    return path if isinstance(path, str) else chirpwire.to_text(path.data)


def read_request(cmd: FilePath, args: List[Any], env: Any, path: Any, file_for_stdin: str,
                 options: Dict[str, Any]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """What runCmd was asked for, and how to submit it: {queue, cmd_id}. Raises InvalidParams that names the
    argument. Bytes that aren't UTF-8 stand in texts as half surrogates."""
    if not cmd or isinstance(cmd, Binary) and not cmd.data:
        raise InvalidParams('cmd is empty')
    read = read_options(options)
    if 'terminal' in read:
        read['terminal'] = read_terminal(read['terminal'])
    sources = [name for name in ('fileForStdin',) if file_for_stdin]
    sources += [name for name in ('stdin', 'stdin64') if name in read]
    if len(sources) > 1:
        raise InvalidParams('%s and %s: one of them' % (sources[0], sources[1]))
    if 'terminal' in read and sources and read.get('stdin') != protocol.STREAM:
        raise InvalidParams('terminal and %s: one of them' % sources[0])
    if file_for_stdin:
        read['fileForStdin'] = file_for_stdin
    how = {'queue': bool(read.pop('queue', False)), 'cmd_id': read_id(read.pop('id')) if 'id' in read else ''}
    request = {'cmd': read_text('cmd', cmd), 'args': [read_text('args', arg) for arg in args],
               'env': read_env(env), 'options': read,
               'path': '' if path in (None, '', 'None') else read_text('path', path)}
    return request, how


def read_terminal(asked: Dict[str, Any]) -> Dict[str, Any]:
    """{rows, columns, term}, as far as they are given. Raises InvalidParams that names what is wrong."""
    unknown = set(asked) - {'rows', 'columns', 'term'}
    if unknown:
        raise InvalidParams('option terminal: no %r; there are rows, columns and term' % sorted(unknown)[0])
    if not isinstance(asked.get('term', ''), str):
        raise InvalidParams('option terminal: term is the name of its kind, as in $TERM')
    sizes = {name: read_size(name, asked[name]) for name in ('rows', 'columns') if name in asked}
    return dict(asked, **sizes)


def read_size(name: str, value: Any) -> int:
    """Rows or columns of a terminal. Raises InvalidParams."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MOST_ROWS:
        raise InvalidParams('%s: %.40r: expected a number from 1 to %d' % (name, value, MOST_ROWS))
    return int(value)


def read_text(name: str, value: Any) -> str:
    """The value, which should be text, a number, or bytes (base64). Raises InvalidParams."""
    if not isinstance(value, (str, int, float, Binary)):
        raise InvalidParams('%s: %.40r should be text, or base64' % (name, value))
    text = read_remote(value) if isinstance(value, Binary) else str(value)
    if '\0' in text:
        raise InvalidParams('%s: NUL in %.40r' % (name, text))
    return text


def read_id(text: str) -> str:
    """An id that the caller gives a command. Raises InvalidParams: an empty one, too, which names nothing."""
    if not re.fullmatch('[A-Za-z0-9][A-Za-z0-9._-]{0,63}', text, re.ASCII):
        raise InvalidParams('option id: %.80r: expected 1 to 64 letters, digits, dots, - and _' % text)
    return text


def read_env(env: Any) -> Dict[str, str]:
    """An environment, given as {} or as the text of a JSON object. Raises InvalidParams."""
    if isinstance(env, str):
        try:
            env = protocol.read_json(env) if env not in ('', 'None') else {}
        except ValueError as error:
            raise InvalidParams('env: %s' % error)
    if env is None:
        return {}
    if not isinstance(env, dict):
        raise InvalidParams('env should be a mapping')
    for name in env:
        if not name or '=' in name or '\0' in name:
            raise InvalidParams('env: %.40r can\'t be a variable' % name)
    return {name: read_text('env: ' + name, value) for name, value in env.items()}


def read_options(options: Dict[str, Any]) -> Dict[str, Any]:
    """The options of runCmd, by their names on the wire. Raises InvalidParams."""
    by_wire_name = {wire: name for name, (wire, _) in OPTIONS.items()}
    read = {}  # type: Dict[str, Any]
    for name, value in options.items():
        name = by_wire_name.get(name, name)
        if name not in OPTIONS:
            raise InvalidParams('no option %r; there are %s' % (name, ', '.join(sorted(OPTIONS))))
        wire, kinds = OPTIONS[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds) \
                or kinds == FLAG and value not in (0, 1):
            raise InvalidParams('option %s: %.80r should be %s' % (name, value, TYPES[kinds]))
        value = bool(value) if kinds == FLAG else value
        if isinstance(value, (int, float)) and not (-20 if name == 'nice' else 0) <= value <= LARGEST_NUMBER:
            raise InvalidParams('option %s: %r is out of range' % (name, value))
        read[wire] = value
    read_exact_stdin(read)
    for name, value in read.get('limits', {}).items():
        if name not in LIMITS or isinstance(value, bool) or not isinstance(value, (int, float)) \
                or not 0 <= value <= LARGEST_NUMBER:
            raise InvalidParams('limits: %r: %r; there are %s, each a number, none below 0'
                                % (name, value, ', '.join(LIMITS)))
    return read


def read_exact_stdin(read: Dict[str, Any]) -> None:
    """Brings exact bytes of an input, however they are given, into ``stdin64``, as the text that is said.
    Raises InvalidParams."""
    if 'stdin' in read and 'stdin64' in read:
        raise InvalidParams('stdin and stdin64: one of them')
    if isinstance(read.get('stdin'), Binary):
        read['stdin64'] = read.pop('stdin')
    if 'stdin64' not in read:
        return
    exact = read['stdin64']
    try:
        if isinstance(exact, str):     # which may have lines, as many programs write it
            exact = Binary(base64.b64decode(''.join(exact.split()).encode('utf-8'), validate=True))
    except binascii.Error:
        raise InvalidParams('option stdin64: %.40r: expected base64' % exact)
    read['stdin64'] = base64.b64encode(exact.data).decode('ascii')


def read_seconds(name: str, value: Any) -> float:
    """An option that is a span of time. Raises InvalidParams."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LARGEST_NUMBER:
        raise InvalidParams('option %s: %.40r: expected seconds' % (name, value))
    return float(value)


def read_signal(name: Any) -> str:
    """A signal as the guest understands it: a name without SIG, a number, RTMIN+n or RTMAX-n. Raises
    InvalidParams."""
    text = str(name).upper()
    text = text[3:] if text.startswith('SIG') else text
    is_number = re.fullmatch('[0-9]{1,2}', text) and 0 < int(text) <= 64
    is_realtime = re.fullmatch(r'RTMIN(\+(30|[12]?[0-9]))?|RTMAX(-(30|[12]?[0-9]))?', text)
    if isinstance(name, bool) or not (is_number or is_realtime or text in agent.SIGNALS):
        raise InvalidParams('no signal %.40r; there are %s, RTMIN+n, RTMAX-n, and numbers from 1 to 64'
                            % (name, ', '.join(agent.SIGNALS)))
    return str(int(text)) if is_number else text


def read_transfers_filter(asked: Dict[str, Any]) -> Dict[str, Any]:
    """Which transfers are asked for. Raises InvalidParams."""
    wanted = {'vm': (str,), 'finished': FLAG, 'limit': (int,)}  # type: Dict[str, Tuple[type, ...]]
    for name, value in asked.items():
        if name not in wanted:
            raise InvalidParams('filter: no %.40r, but vm, finished and limit' % name)
        if not isinstance(value, wanted[name]) or isinstance(value, int) and value < 0:
            raise InvalidParams('filter: %s: expected %s' % (name, TYPES[wanted[name]]))
    return asked
