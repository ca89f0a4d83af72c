"""What the host asks of a command: the requests in CMD_RUN and CMD_SIGNAL, checked and of the right types.

What it is not: the doing of it (guestcommands.py). No threads, no locks, no state.
"""

import base64
import re
import signal
from typing import Any, Dict

from protocol import BadWord, Message


def read_request(message: Message, defaults: Any) -> Dict[str, Any]:
    """What a CMD_RUN asks for, with this guest's defaults ([VM]) where it says nothing. Raises BadWord.

    ``stdin``, where there is one, is bytes; all else can be written as JSON.
    """
    request = {'cmd': message.text('cmd'), 'path': message.text('path'),
               'args': [as_text('args', value) for value in message.sequence('args')],
               'env': {name: as_text('env', value) for name, value in message.mapping('env').items()},
               'env-clear': message.flag('env-clear'), 'user': message.text('user'),
               'fileForStdin': message.text('fileForStdin'), 'nice': int(message.number('nice')),
               'timeout': message.number('timeout'),
               'kill-after': message.number('kill-after', defaults.kill_after),
               'status-interval': message.number('status-interval'),
               'output-limit': int(message.number('output-limit', defaults.output_limit)),
               'inline-output': int(message.number('inline-output', defaults.inline_output)),
               'limits': {name: int(as_number('limits', value))
                          for name, value in message.mapping('limits').items()}}  # type: Dict[str, Any]
    if not request['cmd']:
        raise BadWord('CMD_RUN: no cmd')
    for name in ('timeout', 'kill-after', 'status-interval', 'output-limit', 'inline-output'):
        if request[name] < 0:
            raise BadWord('CMD_RUN: %s should not be negative' % name)
    stdin = read_stdin(message)
    if stdin is not None:
        request['stdin'] = stdin
    return request


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


def as_number(name: str, value: Any) -> float:
    """A limit. Raises BadWord."""
    return Message('', 'CMD_RUN', None, {name: value}).number(name)


def signal_number(name: str) -> int:
    """The number of TERM, SIGTERM or 15. Raises BadWord."""
    try:
        if re.fullmatch('[0-9]{1,4}', name):
            return int(signal.Signals(int(name)))
        return int(signal.Signals['SIG' + name.upper().replace('SIG', '', 1)])
    except (KeyError, ValueError):
        raise BadWord('CMD_SIGNAL: no signal %.40r' % name)
