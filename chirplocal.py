"""Files and folders on this machine, as transfers need them: partial files, locks, names, links.

No threads.
"""

import contextlib
import errno
import itertools
import logging
import os
import re
import stat
from typing import Any, Iterator, Tuple

from chirprequests import PART
from chirpwire import BLOCK, TO_QUOTE, Busy, is_zero, new_buffer, new_hash, to_bytes

try:
    import fcntl
except ImportError:                    # Windows
    fcntl = None               # type: ignore

log = logging.getLogger('vmhost.chirp')
NESTED = 200                   # levels of a folder that are followed
PLAIN_NAME = 200               # bytes of a quoted name that a part's begins with; both share a line


def part_name(name: bytes) -> bytes:
    """Under which name a file is while it is not whole."""
    if len(TO_QUOTE.sub(b'%00', name)) <= PLAIN_NAME:
        return name + PART
    return new_hash('sha1', name).hexdigest()[:16].encode('ascii') + PART


def part_path(path: bytes) -> bytes:
    """The same for a path of the server."""
    folder, slash, name = path.rstrip(b'/').rpartition(b'/')
    return folder + slash + part_name(name)


def to_remote(name: str) -> bytes:
    """The server's name of what is called so here."""
    return os.fsencode(name) if os.name == 'posix' else name.encode('utf-8', 'surrogatepass')


def to_local(name: str) -> str:
    """What an entry of the server is called here. Raises OSError where that can't be."""
    if os.name == 'posix':
        return os.fsdecode(to_bytes(name))
    if NOT_ON_WINDOWS.search(name):
        raise OSError(errno.EINVAL, 'no file can have this name here')
    return name


NOT_ON_WINDOWS = re.compile(r'[\x00-\x1f<>:"/\\|?*\ud800-\udfff]|[ .]$'
                            r'|^(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)', re.IGNORECASE)


def local_part(path: str) -> str:
    """Under which name a file is here while it is not whole."""
    folder, name = os.path.split(path)
    return os.path.join(folder, os.fsdecode(part_name(os.fsencode(name))))


def hash_part(file: Any, checksum: Any, start: int, end: int) -> None:
    """Takes a part of a local file into a checksum."""
    view = new_buffer()
    file.seek(start)
    while start < end:
        count = file.readinto(view[:min(BLOCK, end - start)])
        if not count:
            return
        checksum.update(view[:count])
        start += count


def open_regular(path: str) -> Any:
    """Opens a local file to read, unbuffered. Raises OSError where it is something else."""
    fd = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0)
                 | getattr(os, 'O_NOCTTY', 0) | getattr(os, 'O_CLOEXEC', 0))
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, 'not a regular file', path)
    return os.fdopen(fd, 'rb', buffering=0)


def changed(before: os.stat_result, after: os.stat_result) -> bool:
    return (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)


def hash_local(path: str, size: int, algorithm: str) -> Any:
    """The checksum object of the first bytes of a local file."""
    checksum = new_hash(algorithm)
    with open_regular(path) as file:
        hash_part(file, checksum, 0, size)
    return checksum


def tree_size(path: str) -> int:
    """Bytes of the files in a folder that will be sent, for the progress only."""
    size = 0
    deepest = path.count(os.sep) + NESTED
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders
                      if not to_remote(name).endswith(PART) and folder.count(os.sep) <= deepest]
        for name in names:
            if to_remote(name).endswith(PART):
                continue
            with contextlib.suppress(OSError):
                found = os.lstat(os.path.join(folder, name))
                size += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return size


def join(folder: bytes, name: bytes) -> bytes:
    return folder.rstrip(b'/') + b'/' + name


def check_target(path: str) -> None:
    """Raises OSError for what no file may replace: a folder, or a device, FIFO or socket."""
    try:
        mode = os.stat(path).st_mode
    except OSError:                    # nothing, or a link to it
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, 'neither a file nor a folder', path)


def open_part(target: str) -> Any:
    """Opens the partial file of a target here, to go on with it; never through a link. Raises Busy where
    somebody else has it open so, until it has its name or is closed."""
    path = local_part(target)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_NONBLOCK', 0)
    try:
        fd = os.open(path, flags | getattr(os, 'O_BINARY', 0) | getattr(os, 'O_CLOEXEC', 0), 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR):
            raise
        remove_part(path, target)
        return open_part(target)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        os.unlink(path)
        return open_part(target)
    file = os.fdopen(fd, 'r+b', buffering=0)
    try:
        lock(fd, target)
        if is_still(fd, path):
            return file
    except BaseException:
        file.close()
        raise
    file.close()
    return open_part(target)


def remove_part(path: str, target: str) -> None:
    """Removes a partial folder, or a link, where a partial file is to be. Raises Busy. shutil is imported
    here alone: a guest that waits does without its memory."""
    if os.path.islink(path):
        os.unlink(path)
    else:
        import shutil
        with locked_folder(path, target):
            shutil.rmtree(path)


def lock(fd: int, target: str) -> None:
    """Locks what is made for a target, until it is closed. Raises Busy."""
    if fcntl is None:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy(to_remote(target))
    except OSError as error:           # a file system that has none
        log.debug('%s: no lock: %s', target, error)


@contextlib.contextmanager
def locked_folder(path: str, target: str) -> Iterator[None]:
    """Makes the partial folder of a target, and locks it. Raises Busy."""
    if os.path.lexists(path) and (os.path.islink(path) or not os.path.isdir(path)):
        with open_part(target) as file:
            let_go(file)
            os.unlink(path)
    make_folder(path)
    if fcntl is None:
        yield
        return
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        lock(fd, target)
        if not is_still(fd, path):
            raise Busy(to_remote(target))
        yield
    finally:
        os.close(fd)


def is_still(fd: int, path: str) -> bool:
    """Whether what is open has this name: who had it locked before may have given it another one."""
    try:
        return fcntl is None or os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def let_go(file: Any) -> None:
    """Closes a file that is to be renamed or removed, where no system does that with an open one; elsewhere
    it stays locked meanwhile."""
    if fcntl is None:
        file.close()


def write_here(file: Any, view: memoryview) -> None:
    """Writes all of it, zeros as a hole: the file ends here."""
    if is_zero(view):
        file.seek(len(view), os.SEEK_CUR)
        return
    while view:
        view = view[file.write(view):]


def set_times(file: Any, atime: int, mtime: int) -> None:
    with contextlib.suppress(OverflowError):           # a server may say any number
        os.utime(file.fileno() if os.utime in os.supports_fd else file.name, (atime, mtime))


def set_mode(file: Any, mode: int) -> None:
    """The owner may always read and write."""
    if hasattr(os, 'fchmod'):
        os.fchmod(file.fileno(), mode | 0o600)


def make_folder(path: str) -> None:
    """Makes a folder, or takes the one that is there. Raises OSError for a link or file."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)


def may_leave(target: str, inside: Tuple[str, ...]) -> bool:
    """Whether a link in that folder, below the top, could lead out of the top.

    After a name no ``..`` may come: the name may be a link that we made, to elsewhere in the top, and
    from there fewer steps lead out. Up from a real folder, then through names alone, each of them real or
    a link of this kind: that stays inside, whatever the links.
    """
    if target.startswith('/') or '\\' in target and os.name == 'nt' or ':' in target and os.name == 'nt':
        return True
    names = [name for name in target.split('/') if name not in ('', '.')]
    ups = len(list(itertools.takewhile(lambda name: name == '..', names)))
    return ups > len(inside) or '..' in names[ups:]


def to_local_link(target: str) -> str:
    """Where a link leads, for this system. Raises OSError where that can't be said here."""
    if os.name == 'posix':
        return os.fsdecode(to_bytes(target))
    return os.sep.join(name if name in ('', '.', '..') else to_local(name) for name in target.split('/'))
