"""The table of a guest's commands that aren't acknowledged yet: their states, and whose turn it is.

The one place where a command's state changes. What it is not: what brings the change, and what follows from
it (guestcommands.py); what a command's folder holds (guestspool.py).

Threads: any. One lock guards the table and every change of a state; nothing is said, or waited for, while it
is held.
"""

import collections
import os
import threading
import time
from typing import Any, Dict, List, Optional

from guestspool import WAY, Command


class Table:
    """All commands of one agent that aren't acknowledged yet."""

    def __init__(self, limit: int) -> None:
        """``limit``: how many may run at the same time; 0: any number."""
        self._limit = limit
        # Guards what follows, and the state of each command.
        self._lock = threading.Lock()
        self._commands = {}            # type: Dict[str, Command]
        self._folders = {}             # type: Dict[str, Command]       # by the name of the folder
        self._waiting = collections.deque()    # type: Any     # for their turn
        self._active = 0               # commands that begin or run

    def add(self, command: Command) -> None:
        """Takes one in, whatever its state."""
        with self._lock:
            self._commands[command.cmd_id] = command
            self._folders[os.path.basename(command.folder)] = command
            self._active += command.is_running()
            if command.state == 'queued':
                self._waiting.append(command)

    def remove(self, command: Command) -> None:
        """Lets go of one that has ended, and is acknowledged now."""
        with self._lock:
            self._set_state(command, 'acknowledged')
            self._commands.pop(command.cmd_id, None)
            self._folders.pop(os.path.basename(command.folder), None)

    # What is there.

    def find(self, cmd_id: str) -> Optional[Command]:
        """The command with that id, if there is one."""
        with self._lock:
            return self._commands.get(cmd_id)

    def of_folder(self, name: str) -> Optional[Command]:
        """The command with a folder of that name, if there is one."""
        with self._lock:
            return self._folders.get(name)

    def all(self) -> List[Command]:
        """Every command of the table, as it is now."""
        with self._lock:
            return list(self._commands.values())

    def states(self) -> Dict[str, str]:
        """{cmd-id: state}, as the host is told it."""
        with self._lock:
            return {cmd_id: command.told_state() for cmd_id, command in self._commands.items()}

    # How it changes.

    def take_turns(self) -> List[Command]:
        """Those whose turn it is, in the order in which they came: they start from now on."""
        chosen = []
        with self._lock:
            while self._waiting and self._has_room() and not is_held(self._waiting[0]):
                command = self._waiting.popleft()
                if command.state == 'queued':       # and was not cancelled
                    self._set_state(command, 'starting')
                    chosen.append(command)
        return chosen

    def _has_room(self) -> bool:
        return not self._limit or self._active < self._limit

    def put_back(self, command: Command) -> None:
        """Has one that was about to start wait for its turn again, as the last."""
        with self._lock:
            if command.state == 'starting':
                self._set_state(command, 'queued')
                self._waiting.append(command)

    def take_back(self, command: Command, state: str) -> Any:
        """Ends one that hasn't begun: gives the claim on its folder, None where a runner has that. Raises
        OSError where it can't be claimed."""
        with self._lock:
            claim = command.claim() if command.state in ('queued', 'starting') else None
            if claim is not None:
                self._set_state(command, state)
            return claim

    def note_begin(self, command: Command, state: str) -> None:
        """One that hasn't ended is seen to run, or to be stopped; another state changes nothing."""
        with self._lock:
            if command.is_running() and state in ('running', 'stopped'):
                self._set_state(command, state)

    def end(self, command: Command, state: str) -> None:
        """One has ended, so far as it wasn't known to have."""
        with self._lock:
            if not command.has_ended():
                self._set_state(command, state)

    def _set_state(self, command: Command, state: str) -> None:
        """The only place where it changes, with the lock held. Raises ValueError for what is not in WAY."""
        if state == command.state:
            return
        if state not in WAY[command.state]:
            raise ValueError('%s: no way from %s to %s' % (command.cmd_id, command.state, state))
        self._active -= command.is_running()
        command.state = state
        self._active += command.is_running()


def is_held(command: Command) -> bool:
    """Whether it waits for its host to say that it still wants it, as all in an earlier agent's queue does.

    The spool may be an earlier state of itself, restored or copied: what waits there may have run since. Of
    what nothing is said for a while (by a host whose journal is lost, say), it is believed.
    """
    return command.state == 'queued' and time.monotonic() < command.held_until
