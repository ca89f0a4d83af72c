"""Names of files on this machine: which there can be, which two are one, and how a long path is written.

A guest's names are bytes in which all but NUL and a slash may stand. Here some of them may be no name at all,
a device, a way out of the folder, or the name of what is there already.

What it is not: anything that opens a file of a user's. No threads, no state.
"""

import errno
import ntpath
import os
import re
import sys
from typing import Callable, Dict, Optional

import agent
from agent import LONG

NOT_ON_WINDOWS = re.compile(
    r'[\x00-\x1f<>:"/\\|?*\ud800-\udfff]|[ .]$'
    r'|^(con|prn|aux|nul|conin\$|conout\$|com[0-9\u00b9\u00b2\u00b3]|lpt[0-9\u00b9\u00b2\u00b3]) *(\.|$)',
    re.IGNORECASE)
ON_WINDOWS = os.name == 'nt'
LONGEST = 255                  # of a name on Windows, in what UTF-16 counts
DEVICES = '\\\\.\\'            # begins what is meant to be a device of Windows'
SHORT = re.compile(r'(?=[^.]{3,8}(\.|$))[^.~]+~[^.]+(\.[^.]{1,3})?$')      # what Windows may call a file, too
MOST_NAMES = 1000 * 1000       # of one folder that are held


def check(name: str) -> None:
    """Raises OSError where no file or folder of this machine can have that name."""
    check_length(name)
    if ON_WINDOWS and NOT_ON_WINDOWS.search(name):
        raise OSError(errno.EINVAL, 'no file can have this name here')


def check_length(name: str, path: Optional[str] = None) -> None:
    """Raises OSError, of the path, for a name of which Windows would say that it finds no such file."""
    if ON_WINDOWS and len(name.encode('utf-16-le', 'surrogatepass')) > 2 * LONGEST:
        raise OSError(errno.ENAMETOOLONG, 'a name of more than %d characters' % LONGEST, path)


def check_path(path: str) -> None:
    """Raises OSError where a name in the path can be none here. Windows itself would take ``aux.txt`` for a
    device, and ``name.`` for ``name``."""
    if not ON_WINDOWS or path.startswith((LONG, DEVICES)):
        return
    for name in re.split(r'[/\\]', ntpath.splitdrive(path)[1]):
        check_length(name, path)
        if name not in ('', '.', '..') and NOT_ON_WINDOWS.search(name):
            raise OSError(errno.EINVAL, 'no file can have the name %s here' % name, path)


def check_own(path: str) -> None:
    """Raises OSError where the path leads to a file of another name: Windows gives those with long ones a
    short one as well, such as ``LONGNA~1.TXT``."""
    folder, name = os.path.split(path)
    if ON_WINDOWS and SHORT.match(name) and os.path.lexists(path):
        if upper(name) not in map(upper, os.listdir(folder or '.')):
            raise OSError(errno.EEXIST, 'here it is another file\'s short name', path)


def long_path(path: str) -> str:
    """The path so that it, and what comes below it, may be of any length."""
    if not ON_WINDOWS or path.startswith(LONG):
        return path
    path = os.path.abspath(path)
    if path.startswith(DEVICES):
        return path
    return LONG + ('UNC' + path[1:] if path.startswith('\\\\') else path)


def native(path: str) -> str:
    """A path, of which half surrogates are bytes that are no UTF-8, as this Python has paths: without a
    locale, 3.6 knows ASCII alone."""
    return os.fsdecode(path.encode('utf-8', 'surrogateescape')) if os.name == 'posix' else path


Fold = Callable[[str], str]


def folding(folder: str) -> Optional[Fold]:
    """What makes one name of all those that the folder's disk takes for the same; None: it takes none so.

    It makes a file in the folder for a moment.
    """
    if is_apart(folder):
        return normal if sys.platform == 'darwin' else None
    return upper if ON_WINDOWS else case_folded


def is_apart(folder: str) -> bool:
    """Whether two names that differ by case alone are two in that folder, as far as can be seen."""
    try:
        with agent.momentary_file(folder) as path:
            return not os.path.lexists(os.path.join(folder, os.path.basename(path).upper()))
    except OSError:                    # what is written there next will say why
        return True


def normal(name: str) -> str:
    """The name with accents as characters of their own, as macOS compares names."""
    import unicodedata  # needed here alone
    return unicodedata.normalize('NFD', name)


def case_folded(name: str) -> str:
    """The name as disks of macOS and Linux that ignore case compare names."""
    return normal(normal(name).casefold())


def upper(name: str) -> str:
    """The name as NTFS compares names: character by character."""
    return ''.join([char if len(char.upper()) > 1 else char.upper() for char in name])


class Names:
    """The names that come into one folder, of which no two may be one."""

    def __init__(self, fold: Optional[Fold]) -> None:
        self._fold = fold
        self._known: Dict[str, str] = {}

    def add(self, name: str) -> None:
        """Raises OSError where another one that came before is the same here."""
        if self._fold is None:
            return
        other = self._known.setdefault(self._fold(name), name)
        if other != name:
            raise OSError(errno.EEXIST, 'here it would be the same file as %s, which came before it' % other)
        if len(self._known) > MOST_NAMES:
            raise OSError(errno.EINVAL, 'a folder of too many names')
