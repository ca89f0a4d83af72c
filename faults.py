"""The faults of the API: what can't be done, each with its number and its name.

Raised wherever a request of a caller is carried out, turned into an XML-RPC fault at the server
(hostdispatch.py) and back into the same class at whoever called (hostclient.py). No threads, no state.
"""

import agent


class VMHostError(agent.AgentError):
    """Base of this module's errors; ``fault`` is the XML-RPC fault number (DESIGN, XML-RPC)."""
    fault = -32603


class InvalidParams(VMHostError):
    """The call's arguments are wrong."""
    fault = -32602


class NoSuchMethod(VMHostError):
    """The API has no such method."""
    fault = -32601

    @classmethod
    def named(cls, name: str) -> 'NoSuchMethod':
        """The fault for that name. (At the caller it is made of its text, as the others are.)"""
        return cls('no method %.100r; system.listMethods lists them' % name)


class NoSuchVM(VMHostError):
    """No VM of that name or id is known."""
    fault = 1


class AgentNotConnected(VMHostError):
    """The VM is known, but its agent isn't there."""
    fault = 2


class NoSuchCommand(VMHostError):
    """No command of that id is in the journal."""
    fault = 3


class BadState(VMHostError):
    """Not possible in the state that the VM, command or transfer is in."""
    fault = 4


class HypervisorError(VMHostError):
    """The hypervisor refused; the text is its own."""
    fault = 5


class TransferError(VMHostError):
    """A file couldn't be moved."""
    fault = 6


class DeadlineExceeded(VMHostError):
    """It took too long."""
    fault = 7


class AlreadyExists(VMHostError):
    """There is one of that name."""
    fault = 8


class NotSupported(VMHostError):
    """Not with this hypervisor."""
    fault = 9


class NoFiles(TransferError):
    """The guest serves none."""


class Busy(VMHostError):
    """Something else holds it; try again later."""
    fault = 10


class AccessDenied(VMHostError):
    """Not allowed."""
    fault = 11
