"""Where a file or folder lands that is moved: in a folder that is there, or under the target's own name.

What it is not: a mover (chirpclient.py): nothing is made or changed. No threads, no state.
"""

import os
import posixpath
from typing import Any, Callable, Optional

from chirplocal import to_local
from chirprequests import Connection
from chirpwire import NOT_DIR, ChirpError, Path, Refused, shown


def own_name(source: str, separators: str = '/') -> str:
    """The last name of a path; '' for ``/``, ``.`` and ``..``."""
    for separator in separators:
        source = source.replace(separator, '/')
    name = source.rstrip('/').rpartition('/')[2]
    return '' if name in ('.', '..') else name


IsFolder = Callable[[str], Optional[bool]]     # None: there is nothing of that name


def landing(name: str, target: str, is_folder: IsFolder, of_folder: Callable[[], bool], paths: Any) -> str:
    """Where ``cp -r`` would put something of that name: in a folder that is there, else under the target's
    own name. A separator ends a folder that gets a content without a name of its own, through a link, too.
    ``paths``: the module that knows the target's system. Raises ChirpError where there is no such place."""
    if not target:
        if not name:
            raise ChirpError('name the target: the source has no name of its own')
        return name
    there = is_folder(target)
    separators = separators_of(paths)
    if there:                          # of what has no name, the content: through the user's own link, too
        return target.rstrip(separators) + paths.sep + name
    if there is None:
        check_folder(paths.dirname(target.rstrip(separators)), is_folder)
    if target[-1] in separators and not of_folder():
        raise ChirpError('%s is not a folder' % target)
    return target


def check_no_link(target: Path, is_link: bool) -> None:
    """Raises ChirpError where a folder would go through a link that has its name, as cp -r has it."""
    if is_link:
        raise ChirpError('%s: there is a link, and a folder goes through none: name what it leads to' % (
            shown(target)))


def check_folder(path: str, is_folder: IsFolder) -> None:
    """Raises ChirpError where no folder is that something could be made in."""
    there = is_folder(path) if path else True
    if there is None:
        raise ChirpError('the folder %s does not exist' % path)
    if not there:
        raise ChirpError('%s is not a folder' % path)


def separators_of(paths: Any) -> str:
    return paths.sep + (paths.altsep or '')


def landing_there(client: Connection, source: str, target: str) -> str:
    """What a file or folder from here is to be called at the server, as by ``cp -r``. Raises ChirpError."""
    def is_folder(path: str) -> Optional[bool]:
        found = client.find(path)
        return None if found is None else found.is_dir
    return landing(own_name(source, SEPARATORS), target, is_folder, lambda: os.path.isdir(source), posixpath)


def landing_here(client: Connection, source: str, target: str) -> str:
    """What a file or folder of the server is to be called here, as by ``cp -r``. Raises ChirpError,
    OSError."""
    def is_folder(path: str) -> Optional[bool]:
        return os.path.isdir(path) if os.path.exists(path) else None
    name = own_name(source)
    if (source[-1] == '/' or not name) and not client.stat(source).is_dir:     # as file/ and file/.
        raise Refused(NOT_DIR, source)
    if name and (not target or os.path.isdir(target)):
        name = to_local(name)          # raises where that can't be a name here
    return landing(name, target, is_folder, lambda: client.stat(source).is_dir, os.path)


SEPARATORS = separators_of(os.path)
