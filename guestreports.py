"""What a guest tells of its commands: statuses, results, and slices of output that fit into a word.

What it is not: the decision when to tell it (guestcommands.py). No threads, no locks: any thread may tell.
"""

import base64
import binascii
import contextlib
import os
import re
import time
from typing import Any, Callable, Dict, Tuple

import protocol
from guestprocesses import live_usage
from guestspool import LARGEST_PROGRESS, Command
from protocol import Message

LARGEST_INLINE = 256 * 1024    # bytes of a stream that a word carries, at most
LARGEST_WORD = 900 * 1000      # bytes of a body, below what a broker takes (max_frame) …
SMALLEST_WORD = 2 * 1000       # whatever the host tells: a result without output fits
FRAME_RESERVE = 4 * 1000       # bytes of max_frame that are left for what is not output
SPARE = 64                     # bytes that a slice may take in JSON beside twice its own
LARGEST_OFFSET = 2 ** 62       # of a file's bytes, as far as systems can tell
# What results say of whom nobody ended, and who has written nothing.
NOTHING = {'by': '', 'spool': '', 'out': '', 'err': '', 'out-size': 0, 'err-size': 0, 'out-offset': 0,
           'err-offset': 0}            # type: Dict[str, Any]


class Reports:
    """Tells the host of commands, in words that its broker takes."""

    def __init__(self, say: Callable[[Message], Any], inline_output: int, chirp_path: str) -> None:
        """``inline_output``: bytes of a stream that go with results, where the request doesn't say.

        ``chirp_path``: of the spool, as the host sees it by Chirp; '' where it doesn't.
        """
        self._say = say
        self._inline_output = inline_output
        self._chirp_path = chirp_path
        self.largest_word = LARGEST_WORD

    def limit(self, max_frame: float) -> None:
        """The host told how large a frame its broker takes."""
        self.largest_word = int(min(LARGEST_WORD, max(SMALLEST_WORD, max_frame - FRAME_RESERVE)))

    @property
    def _room_for_output(self) -> int:
        """Bytes of a word that output may take, written as JSON."""
        return max(0, self.largest_word - 2 * LARGEST_PROGRESS)

    def status(self, command: Command, **slices: Any) -> None:
        """A CMD_STATUS."""
        command.told = time.monotonic()
        keys = {'out-size': command.size('out'), 'err-size': command.size('err'),
                'progress': command.progress()}  # type: Dict[str, Any]
        pid = command.process() if command.is_running() else 0
        if pid:
            processes, resources = live_usage(command.members())
            keys.update(pid=pid, processes=processes, resources=resources, wall=command.wall())
        keys.update(slices)
        self._say_status(command, keys)

    def news(self, command: Command, **keys: Any) -> None:
        """The same for somebody who waits: how much output there is, and these keys."""
        for stream in ('out', 'err'):
            if stream + '-size' not in keys:
                keys[stream + '-size'] = command.size(stream)
        self._say_status(command, keys)

    def _say_status(self, command: Command, keys: Dict[str, Any]) -> None:
        if command.taken is not None:
            keys['in-offset'] = command.taken
        self._say(protocol.CMD_STATUS.howToSay(command.cmd_id, command.told_state(), **keys))

    def unknown(self, cmd_id: str, **keys: Any) -> None:
        """A CMD_STATUS of a command that this guest doesn't know, or no longer."""
        self._say(protocol.CMD_STATUS.howToSay(cmd_id, 'unknown', error='not in the spool', **keys))

    def slices(self, command: Command, query: Message) -> Dict[str, Any]:
        """The slices of output that a CMD_QUERY asks for. Raises BadWord."""
        length = int(min(max(0, query.number('max', LARGEST_INLINE)), LARGEST_INLINE))
        return self.slices_from(command, offsets_in(query), length)[0]

    def slices_from(self, command: Command, offsets: Dict[str, int],
                    length: int = LARGEST_INLINE) -> Tuple[Dict[str, Any], Dict[str, int]]:
        """Slices of these streams, as keys of a CMD_STATUS, and where each ends."""
        found, ends = {}, {}  # type: Dict[str, Any], Dict[str, int]
        for stream, offset in offsets.items():
            keys, size = self._slice(command, stream, offset, length)
            found.update(keys)
            ends[stream] = offset + size
        return found, ends

    def _slice(self, command: Command, stream: str, offset: int, length: int) -> Tuple[Dict[str, Any], int]:
        """A slice of a stream, as long as two of them fit into a word, and its size."""
        data, there = command.read_part(stream, offset, length)
        while True:
            found = dict(written(stream, data), **{stream + '-offset': offset, stream + '-size': there})
            room = self._room_for_output // 2
            if 2 * (len(data) + SPARE) <= room or len(protocol.write_json(found)) <= room or not data:
                return found, len(data)
            data = data[:len(data) // 2]

    def results(self, command: Command, result: Dict[str, Any]) -> None:
        """A CMD_RESULTS with what the command's result.json says, and the tails of its output."""
        folder = self._chirp_path and self._chirp_path + '/' + os.path.basename(command.folder)
        told = dict(result, spool=folder)
        told.update(self._tails(command))
        self.bare_results(command.cmd_id, told)

    def bare_results(self, cmd_id: str, result: Dict[str, Any]) -> None:
        """A CMD_RESULTS of a command that may have no folder."""
        told = {key: value for key, value in dict(NOTHING, **result).items() if key != 'format'}
        self._say(protocol.CMD_RESULTS.howToSay(cmd_id, told))

    def _tails(self, command: Command) -> Dict[str, Any]:
        """The tails of both streams that go with the results, as large as the word may be."""
        room = int(min(command.request.get('inline-output', self._inline_output), LARGEST_INLINE))
        while True:
            found = {}  # type: Dict[str, Any]
            for stream in ('out', 'err'):
                put_tail(found, stream, command, room)
            if len(protocol.write_json(found)) <= self._room_for_output or not room:
                return found
            room //= 2


def offsets_in(query: Message) -> Dict[str, int]:
    """{stream: from where on} that a CMD_QUERY asks for. Raises BadWord."""
    return {stream: int(min(max(0, query.number(stream + '-offset')), LARGEST_OFFSET))
            for stream in ('out', 'err') if query.get(stream + '-offset') is not None}


def written(stream: str, data: bytes) -> Dict[str, Any]:
    """Bytes of a stream as text, where that is exact and no longer than text is; else in base64 alone."""
    with contextlib.suppress(UnicodeDecodeError):
        text = data.decode('utf-8')
        if len(protocol.write_json(text)) <= 2 * len(data) + SPARE:
            return {stream: text}
    return {stream + '64': protocol.Plain(binascii.b2a_base64(data, newline=False), 'ascii')}


def put_bytes(keys: Dict[str, Any], stream: str, data: bytes) -> None:
    """Bytes of a stream as text, or as base64 where they are not UTF-8."""
    try:
        keys[stream] = data.decode('utf-8')
    except UnicodeDecodeError:
        keys[stream] = data.decode('utf-8', 'replace')
        keys[stream + '64'] = base64.b64encode(data).decode('ascii')


def put_tail(keys: Dict[str, Any], stream: str, command: Command, room: int) -> None:
    """The last ``room`` bytes of a stream, from the begin of a character on, and where they begin."""
    size = command.size(stream)
    offset = max(0, size - room)
    data = command.slice(stream, offset, size - offset) if size else b''
    if offset:
        whole = re.sub(b'^[\x80-\xbf]{1,3}', b'', data)
        offset, data = offset + len(data) - len(whole), whole
    keys[stream + '-offset'], keys[stream + '-size'] = offset, size
    put_bytes(keys, stream, data)
