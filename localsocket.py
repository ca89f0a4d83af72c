"""The Unix socket in the state folder: host agent and command line know one another there without a secret.

The folder is its owner's alone, and each side asks the system which user the other one is. Where there is
none (Windows, a path that is too long for a socket's address) both use TCP, and the token (hostclient.py).

What it is not: HTTP, or XML-RPC. Imports nothing of ours. No threads, no state.
"""

import contextlib
import os
import socket
import struct
from typing import Any, Optional

NAME = 'xmlrpc.sock'
SO_PEERCRED = getattr(socket, 'SO_PEERCRED', None)             # Linux
LOCAL_PEERCRED = getattr(socket, 'LOCAL_PEERCRED', None)       # macOS, BSD
LONGEST_PATH = 100             # bytes: an address holds 104 of them on some systems, with the NUL


def path_in(folder: str) -> str:
    """Where the socket of a state folder is; '' where there can be none."""
    path = os.path.join(folder, NAME)
    can = hasattr(socket, 'AF_UNIX') and (SO_PEERCRED or LOCAL_PEERCRED)
    return path if can and len(os.fsencode(path)) <= LONGEST_PATH else ''


def listen(folder: str, backlog: int) -> Optional[socket.socket]:
    """A listening socket in the folder, for its owner alone; None where there can be none. Raises OSError.

    The caller holds the folder's lock: what lies there is a dead agent's.
    """
    path = path_in(folder)
    if not path:
        return None
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(path: str, timeout: float) -> socket.socket:
    """A connection to who listens there. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


def peer_uid(connection: Any) -> int:
    """The user id of the other side's process, as the system knows it. Raises OSError."""
    if SO_PEERCRED is not None:
        found = connection.getsockopt(socket.SOL_SOCKET, SO_PEERCRED, struct.calcsize('3i'))
        return struct.unpack('3i', found)[1]
    found = connection.getsockopt(0, LOCAL_PEERCRED, struct.calcsize('2I'))      # a version, then the uid
    return struct.unpack('2I', found)[1]
