"""Files and folders to and from a Chirp server: verified, resumed, in place all at once.

What it is not: the way there (chirpupload.py) and back (chirpdownload.py); a synchroniser: what a folder
holds beside what is moved into it stays. No threads; an object belongs to one thread at a time.
"""

import contextlib
import os
import threading
import time
from typing import Any, Callable, Iterator, Optional

import localnames
from chirpdownload import Download, Given
from chirplanding import SEPARATORS
from chirpmove import Failures, Meter, Options, Progress, options
from chirprequests import Connection
from chirpupload import Upload
from chirpwire import ChirpError, Path, to_bytes


class ChirpClient(Connection):
    """Puts and gets files and folders. What isn't whole yet has a name of ``part_name``, beside its own.

    ``unkept``: whose modes and times the disk didn't keep where the last put or get came to: its content is
    there all the same. Of a put to chirp_server, it is what that refused.
    """

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        self.unkept = Failures()

    def put(self, source: str, target: Path, progress: Optional[Progress] = None,
            cancel: Optional[threading.Event] = None, verify: bool = True, keep: bool = True,
            links: str = 'keep', within: Optional[float] = None) -> None:
        """Sends a file or folder, to be called ``target`` there. A folder goes into one that is there, whose
        mode, owner and time stay; a file that is replaced leaves its owner and mode to the new one. Where
        ``target`` is a link, what it leads to is: of a folder only where a slash ends it. Within a folder, a
        link is replaced itself.

        ``progress`` gets (bytes moved, bytes in all) from time to time; ``verify``: compare checksums;
        ``keep``: modes and times. Of a folder's symbolic links, ``keep`` makes the same, ``follow`` moves
        what they lead to, ``skip`` leaves them out. ``within``: seconds that all of it may take. Raises
        ChirpError, Incomplete where only some entries of a folder failed, and OSError for what is read here;
        Busy where this process puts something else there at the same time.
        """
        with self._moving(progress, cancel, within) as meter:
            Upload(self, meter, self.unkept, options(verify, keep, links)).run(
                localnames.long_path(os.fspath(source)), to_bytes(target))

    def get(self, source: Path, target: str, progress: Optional[Progress] = None,
            cancel: Optional[threading.Event] = None, verify: bool = True, keep: bool = True,
            links: str = 'keep', within: Optional[float] = None, given: Optional[Given] = None) -> None:
        """Fetches a file or folder; as ``put``, and raises OSError for what is written here; Busy where
        any process on this machine fetches something else to there at the same time. A device or FIFO is
        written to; ``given``: what it got by earlier calls, and by this one.

        Of a folder's symbolic links, ``keep`` makes those that stay within it, with no ``..`` after a
        name; the others are told of in Incomplete. Through a link nothing is written, but where ``target``
        itself is one.
        """
        if not source:
            raise ChirpError('an empty path is no source')
        with self._moving(progress, cancel, within) as meter:
            target = os.fspath(target)
            localnames.check_path(target)
            Download(self, meter, self.unkept, options(verify, keep, links)).run(
                to_bytes(source), localnames.long_path(target.rstrip(SEPARATORS) or target), given or Given(),
                target[-1:] in tuple(SEPARATORS))

    def fetch(self, source: Path, target: str, limit: int, progress: Optional[Progress] = None,
              cancel: Optional[threading.Event] = None, within: Optional[float] = None) -> int:
        """Fetches a file, or its first ``limit`` bytes; says how many there are."""
        with self._moving(progress, cancel, within) as meter:
            download = Download(self, meter, self.unkept, Options(True, False, 'skip'))
            return download.fetch(to_bytes(source), os.fspath(target), limit)

    def read(self, source: Path, write: Callable[[memoryview], Any], progress: Optional[Progress] = None,
             cancel: Optional[threading.Event] = None) -> None:
        """Gives the content of a file to ``write``, piece by piece, each once."""
        with self._moving(progress, cancel, None) as meter:
            download = Download(self, meter, self.unkept, Options(True, False, 'skip'))
            download.stream(to_bytes(source), write, Given())

    @contextlib.contextmanager
    def _moving(self, progress: Optional[Progress], cancel: Optional[threading.Event],
                within: Optional[float]) -> Iterator[Meter]:
        meter, self.unkept = Meter(progress, cancel), Failures()
        self.cancel = cancel
        self.until = None if within is None else time.monotonic() + within
        try:
            meter.add(0)
            yield meter
            meter.tell()
        except BaseException:
            self.disconnect()          # replies may still be under way
            raise
        finally:
            self.cancel = self.until = None
