"""What the methods of the API take: told to a person, and held against what a caller gave.

What it is not: the methods (hostapi.py), or the reading of one value (hostrequests.py). No threads, no state.
"""

import functools
import math
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import rpc
from faults import InvalidParams

XMLRPC_NAMES: Dict[Any, str] = {str: 'string', int: 'int', float: 'double', bool: 'boolean', list: 'array',
                dict: 'struct', rpc.Binary: 'base64', rpc.FilePath: 'string'}
ACCEPTED: Dict[Any, Tuple[type, ...]] = {
    float: (int, float), bool: (bool, int), int: (int, float),
    rpc.FilePath: (str, rpc.Binary)}


class Parameter(NamedTuple):
    """One parameter of a method: its name, its type, its default (REQUIRED: none)."""
    name: str
    kind: Any
    default: Any


REQUIRED = object()


@functools.lru_cache(maxsize=None)
def parameters_of(function: Callable) -> Tuple[Parameter, ...]:
    """The parameters of a method, without self. What inspect would tell, without its megabyte."""
    function = getattr(function, '__func__', function)
    code = function.__code__
    names = [name for name in code.co_varnames[:code.co_argcount] if name != 'self']
    defaults = function.__defaults__ or ()                # type: ignore[attr-defined]
    given = (REQUIRED,) * (len(names) - len(defaults)) + defaults
    return tuple(Parameter(name, function.__annotations__.get(name, Any), default)
                 for name, default in zip(names, given))


def signature_of(function: Callable) -> str:
    """Its parameters, with their defaults, as a person writes them."""
    return '(%s)' % ', '.join(name if default is REQUIRED else '%s=%r' % (name, default)
                              for name, _, default in parameters_of(function))


def check_arguments(called: str, method: Callable, params: List[Any]) -> None:
    """Raises InvalidParams unless the method takes as many, of these types. called: as the caller did."""
    parameters = parameters_of(method)
    required = sum(parameter.default is REQUIRED for parameter in parameters)
    if not required <= len(params) <= len(parameters):
        raise InvalidParams('%s%s: %d arguments were given' % (called, signature_of(method), len(params)))
    for (name, kind, _), value in zip(parameters, params):
        if kind is not Any and not isinstance(value, ACCEPTED.get(kind, kind)):
            raise InvalidParams('%s: %s should be %s' % (called, name, XMLRPC_NAMES.get(kind, kind)))
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidParams('%s: %s is no number' % (called, name))


def names_of(part: Any) -> List[str]:
    """The names of a subject's methods, in the order of their definition."""
    return [name for name, value in vars(part).items() if callable(value) and not name.startswith('_')]
