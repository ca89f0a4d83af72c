"""What the host asks of a command: the requests in CMD_RUN and CMD_SIGNAL, checked and of the right types.

What it is not: the doing of it (guestcommands.py). No threads, no locks, no state.
"""

import base64
import math
import re
import signal
from typing import Any, Dict, List

from protocol import STREAM, BadWord, Message

LIMITS = ('as', 'cpu', 'fsize', 'nofile', 'nproc', 'memory', 'cpus', 'pids')


def read_request(message: Message, defaults: Any) -> Dict[str, Any]:
    """What a CMD_RUN asks for, with this guest's defaults ([VM]) where it says nothing. Raises BadWord.

    ``stdin``, where there is one, is bytes; all else can be written as JSON. Bytes that are no UTF-8 stand
    in the texts as half surrogates (surrogateescape).
    """
    request = {'cmd': exact_text(message, 'cmd'), 'path': exact_text(message, 'path'),
               'args': exact_args(message), 'env': exact_env(message),
               'env-clear': message.flag('env-clear'), 'user': message.text('user'),
               'fileForStdin': exact_text(message, 'fileForStdin'), 'nice': int(message.number('nice')),
               'leave': message.flag('leave'), 'end-left': message.flag('end-left'),
               'expires': message.number('expires'), 'timeout': message.number('timeout'),
               'kill-after': message.number('kill-after', defaults.kill_after),
               'status-interval': message.number('status-interval'),
               'output-limit': int(message.number('output-limit', defaults.output_limit)),
               'inline-output': int(message.number('inline-output', defaults.inline_output)),
               'limits': {name: as_limit(name, value)
                          for name, value in message.mapping('limits').items()}}  # type: Dict[str, Any]
    if not request['cmd']:
        raise BadWord('CMD_RUN: no cmd')
    for name in ('timeout', 'kill-after', 'status-interval', 'output-limit', 'inline-output', 'expires'):
        if request[name] < 0:
            raise BadWord('CMD_RUN: %s should not be negative' % name)
    for name, value in request['limits'].items():
        if name not in LIMITS or value < 0:
            raise BadWord('CMD_RUN: limits: %.40s = %g: there are %s, none below 0'
                          % (name, value, ', '.join(LIMITS)))
    env = request['env']
    if any('\0' in text for text in [request['cmd'], request['path'], *request['args'], *env, *env.values()]):
        raise BadWord('CMD_RUN: a NUL in cmd, path, args or env')
    read_input(message, request)
    return request


def read_input(message: Message, request: Dict[str, Any]) -> None:
    """Puts into the request where its standard input is from. Raises BadWord.

    ``stdin``: these bytes. ``stream``: CMD_INPUT brings it. ``terminal``: it has one, {rows, columns, term}.
    """
    if message.get('terminal') is not None:
        request['terminal'] = read_terminal(message.mapping('terminal'))
    is_given = message.get('stdin64') is not None or bool(request['fileForStdin'])
    if message.get('stdin64') is None and message.get('stdin') == STREAM or request.get('terminal'):
        if is_given:
            raise BadWord('CMD_RUN: a streamed input, and another one')
        request['stream'] = True
        return
    stdin = read_stdin(message)
    if stdin is not None:
        request['stdin'] = stdin


def read_terminal(asked: Dict[str, Any]) -> Dict[str, Any]:
    """A terminal as it is asked for, with the usual one's values where it doesn't say. Raises BadWord."""
    told = Message('', 'CMD_RUN', None, asked)
    return {'rows': screen_size(told, 'rows', 24), 'columns': screen_size(told, 'columns', 80),
            'term': told.text('term', 'xterm')}


def screen_size(message: Message, name: str, default: int = 0) -> int:
    """The rows or columns of a terminal; 0: unknown. Raises BadWord."""
    number = message.number(name, default)
    if not 0 <= number <= 65535:
        raise BadWord('%s: %s should be from 0 to 65535' % (message.word, name))
    return int(number)


def exact_text(message: Message, name: str) -> str:
    """A text, or the bytes of NAME64, in base64, that it can't carry. Raises BadWord."""
    if message.get(name + '64') is None:
        return message.text(name)
    return from_base64(name + '64', message.get(name + '64'))


def exact_args(message: Message) -> List[str]:
    """The arguments: of ``args``, or in base64 of ``args64``. Raises BadWord."""
    if message.get('args64') is not None:
        return [from_base64('args64', value) for value in message.sequence('args64')]
    return [as_text('args', value) for value in message.sequence('args')]


def exact_env(message: Message) -> Dict[str, str]:
    """The variables: of ``env``, and with values in base64 of ``env64``. Raises BadWord."""
    env = {name: as_text('env', value) for name, value in message.mapping('env').items()}
    env.update({name: from_base64('env64', value) for name, value in message.mapping('env64').items()})
    for name in env:
        if not name or '=' in name:
            raise BadWord('CMD_RUN: env: %.40r is no name of a variable' % name)
    return env


def from_base64(name: str, value: Any) -> str:
    """Bytes, as text with half surrogates. Raises BadWord."""
    try:
        return base64.b64decode(value, validate=True).decode('utf-8', 'surrogateescape')
    except (TypeError, ValueError):
        raise BadWord('CMD_RUN: %s is no base64' % name)


def read_stdin(message: Message) -> Any:
    """The bytes for the program's standard input; None where the word carries none. Raises BadWord."""
    if message.get('stdin64') is not None:
        try:
            return base64.b64decode(message.text('stdin64'), validate=True)
        except ValueError:
            raise BadWord('CMD_RUN: stdin64 is no base64')
    return message.text('stdin').encode('utf-8') if message.get('stdin') is not None else None


def as_text(name: str, value: Any) -> str:
    """An argument or the value of a variable; numbers are written out. Raises BadWord."""
    return Message('', 'CMD_RUN', None, {name: value}).text(name)


def as_limit(name: str, value: Any) -> float:
    """A limit: a whole number, the next larger one for a part (0.5 s would be none), but of processor cores.
    Raises BadWord."""
    number = Message('', 'CMD_RUN', None, {'limits': value}).number('limits')
    return number if name == 'cpus' else math.ceil(number)


def signal_number(name: str) -> int:
    """The number of TERM, SIGTERM, 15 or RTMIN+3. Raises BadWord."""
    known = re.fullmatch('(?:SIG)?([A-Z0-9]+)(?:([+-])([0-9]{1,2}))?', name.upper(), re.ASCII)
    if known is not None:
        base, sign, offset = known.groups()
        number = int(base) if base.isdigit() else int(getattr(signal, 'SIG' + base, 0))
        number += int((sign or '+') + (offset or '0'))
        if 0 < number < signal.NSIG and not (sign and base not in ('RTMIN', 'RTMAX')):
            return number
    raise BadWord('CMD_SIGNAL: no signal %.40r' % name)
