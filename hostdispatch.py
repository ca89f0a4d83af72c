"""Calls the API's methods by name: arguments checked, who asked noted, what is raised turned into faults.

What it is not: the methods (hostapi.py), XML (rpc.py) or HTTP (hostserver.py).
Threads: any thread may call, many at once; nothing is locked.
"""

import functools
import logging
import math
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import rpc
from faults import InvalidParams, NoSuchMethod, VMHostError
from hostapi import ALIASES, Api

log = logging.getLogger('vmhost')

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


def check_arguments(method: Callable, params: List[Any]) -> None:
    """Raises InvalidParams unless the method takes as many, of these types."""
    parameters = parameters_of(method)
    required = sum(parameter.default is REQUIRED for parameter in parameters)
    if not required <= len(params) <= len(parameters):
        raise InvalidParams('%s%s: %d arguments were given' % (method.__name__, signature_of(method),
                                                               len(params)))
    for (name, kind, _), value in zip(parameters, params):
        if kind is not Any and not isinstance(value, ACCEPTED.get(kind, kind)):
            raise InvalidParams('%s: %s should be %s' % (method.__name__, name, XMLRPC_NAMES.get(kind, kind)))
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidParams('%s: %s is no number' % (method.__name__, name))


class Dispatcher:
    """Calls methods by name, and turns what they raise into faults."""

    def __init__(self, host: Any, api: Api) -> None:
        self._host = host
        self._api = api
        self._system: Dict[str, Callable] = {
            'system.listMethods': self.list_methods,
            'system.methodHelp': self.method_help,
            'system.methodSignature': self.method_signature,
            'system.multicall': self.multicall}

    def answer(self, body: bytes, client: str) -> bytes:
        """The XML that answers the XML of a call; whatever goes wrong is a fault in it."""
        self._api.caller.name = client
        try:
            method, params = rpc.read_call(body)
            return rpc.write_answer(self.call(method, params))
        except rpc.Malformed as error:
            return rpc.write_fault(rpc.Fault(-32700, 'no XML-RPC: %s' % error))
        except rpc.Fault as fault:
            return rpc.write_fault(fault)

    def call(self, name: str, params: List[Any]) -> rpc.XML:
        """The method's answer. Raises Fault, and nothing else.

        Who asked for what changes something is in the journal, and whether it was refused.
        """
        try:
            method = self._find(name)
        except NoSuchMethod as error:
            raise rpc.Fault(error.fault, str(error))
        if not hasattr(method, 'audited'):
            return self._call(name, method, params)
        self._note('asked', method, name, params)
        try:
            return self._call(name, method, params)
        except rpc.Fault as fault:
            self._note('refused', method, name, params, ': fault %d, %s' % (fault.code, fault.text))
            raise

    def _find(self, name: str) -> Callable:
        found = self._system.get(name) or self._api.methods.get(ALIASES.get(name, name))
        if found is None:
            raise NoSuchMethod(name)
        return found

    def _call(self, name: str, method: Callable, params: List[Any]) -> rpc.XML:
        try:
            check_arguments(method, params)
            return rpc.to_xml(method(*params))
        except rpc.Fault:
            raise
        except VMHostError as error:
            raise rpc.Fault(error.fault, str(error))
        except Exception as error:
            log.exception('in %.100r', name)
            raise rpc.Fault(-32603, '%s: %s' % (type(error).__name__, error))

    def _note(self, type: str, method: Callable, name: str, params: List[Any], end: str = '') -> None:
        """Journals a call: by whom, which method, on what; no options, since a password may be in them."""
        named = dict(zip([parameter.name for parameter in parameters_of(method)], params))
        vm, cmd_id = named.get('vm', named.get('name', '')), named.get('id', '')
        shown = ', '.join(map(shown_param, params))
        self._host.journal.note(type, str(vm)[:200], str(cmd_id)[:200], 'by %s: %s(%s)%s' % (
            self._api.caller.name, name, shown, end))

    def list_methods(self) -> list:
        """Names of all methods."""
        return sorted(list(self._api.methods) + list(ALIASES) + list(self._system))

    def method_help(self, name: str) -> str:
        """What a method does."""
        import inspect  # needed here alone
        return inspect.getdoc(self._find(name)) or ''

    def method_signature(self, name: str) -> list:
        """The types of answer and parameters, once for each number of parameters."""
        method = self._find(name)
        kinds = [XMLRPC_NAMES.get(method.__annotations__.get('return'), 'undef')]
        found = []
        for parameter in parameters_of(method):
            if parameter.default is not REQUIRED:
                found.append(list(kinds))
            kinds.append(XMLRPC_NAMES.get(parameter.kind, 'undef'))
        return found + [kinds]

    def multicall(self, calls: list) -> list:
        """[{methodName, params}] -> [[answer] or {faultCode, faultString}]."""
        return [self._one_of_many(call) for call in calls]

    def _one_of_many(self, call: Any) -> Any:
        try:
            if not isinstance(call, dict) or not isinstance(call.get('params', []), list):
                raise rpc.Fault(-32602, 'a call is {methodName, params}')
            if call.get('methodName') == 'system.multicall':
                raise rpc.Fault(-32602, 'system.multicall within system.multicall')
            return [self.call(str(call.get('methodName')), call.get('params', []))]
        except rpc.Fault as fault:
            return {'faultCode': fault.code, 'faultString': fault.text}


def shown_param(param: Any) -> str:
    """An argument of a call for the journal."""
    if isinstance(param, rpc.Binary):
        param = param.data[:80].decode('utf-8', 'backslashreplace')
    return '%.80r' % param if isinstance(param, (str, int, float)) else '…'
