"""Calls the API's methods by name: arguments checked, who asked noted, what is raised turned into faults.

What it is not: the methods (hostapi.py), XML (rpc.py) or HTTP (hostserver.py).
Threads: any thread may call, many at once; nothing is locked.
"""

import logging
from typing import Any, Callable, Dict, List

import hoststreams
import rpc
from faults import NoSuchMethod, VMHostError
from hostapi import ALIASES, Api
from hostarguments import REQUIRED, XMLRPC_NAMES, check_arguments, parameters_of

log = logging.getLogger('vmhost')


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

    def pass_bytes(self, path: str, query: Dict[str, str], body: bytes, client: str) -> hoststreams.Answer:
        """To a request for input or output of a command, as it is."""
        self._api.caller.name = client
        return hoststreams.answer(self.value, path, query, body)

    def call(self, name: str, params: List[Any]) -> rpc.XML:
        """The method's answer as XML. Raises Fault, and nothing else."""
        answer = self.value(name, params)
        try:
            return rpc.to_xml(answer)
        except TypeError as error:
            log.exception('in %.100r', name)
            raise rpc.Fault(-32603, 'TypeError: %s' % error)

    def value(self, name: str, params: List[Any]) -> Any:
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
        found = self._system.get(name) or self._api.methods.get(name) or self._api.older.get(name)
        if found is None:
            raise NoSuchMethod.named(name)
        return found

    def _call(self, name: str, method: Callable, params: List[Any]) -> Any:
        try:
            check_arguments(name, method, params)
            return method(*params)
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
