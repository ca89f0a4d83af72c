"""Files and folders on this machine, as transfers need them: partial files, locks, names, links.

What it is not: anything that knows a server. No threads.
"""

import contextlib
import errno
import itertools
import logging
import os
import re
import stat
from typing import Any, Iterator, Optional, Tuple

from chirpwire import Busy, is_zero, part_name, to_bytes

try:
    import fcntl
except ImportError:                    # Windows
    fcntl = None               # type: ignore

log = logging.getLogger('vmhost.chirp')

NESTED = 200                   # levels of a folder that are followed


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


def open_regular(path: str) -> Any:
    """Opens a local file to read, unbuffered. Raises OSError where it is something else."""
    fd = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0)
                 | getattr(os, 'O_NOCTTY', 0) | getattr(os, 'O_CLOEXEC', 0))
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, 'not a regular file', path)
    return os.fdopen(fd, 'rb', buffering=0)


def tree_size(path: str, depth: int = 0) -> int:
    """Bytes of the files in a folder that will be sent."""
    size = 0
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    size += tree_size(entry.path, depth + 1) if depth < NESTED else 0
                elif entry.is_file(follow_symlinks=False):
                    size += entry.stat(follow_symlinks=False).st_size
    return size


def join(folder: bytes, name: bytes) -> bytes:
    return folder.rstrip(b'/') + b'/' + name


def is_device(path: str) -> bool:
    """Whether what is written there goes to a device, FIFO or the like, which no file may replace."""
    try:
        mode = os.stat(path).st_mode
    except OSError:                    # nothing, or a link to it
        return False
    path = os.path.abspath(path)
    return (not stat.S_ISREG(mode) and not stat.S_ISDIR(mode) or path.startswith('/proc/')
            or path.startswith('/dev/') and os.path.islink(path))      # as /dev/stdout


def open_device(path: str) -> Any:
    """Opens a device or FIFO to write to. Raises OSError where nobody reads from it."""
    fd = os.open(path, os.O_WRONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_NOCTTY', 0)
                 | getattr(os, 'O_CLOEXEC', 0))
    if hasattr(os, 'set_blocking'):
        os.set_blocking(fd, True)
    return os.fdopen(fd, 'wb', buffering=0)


def check_target(path: str) -> None:
    """Raises OSError for what no file may replace: a folder, or a device, FIFO or socket."""
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if is_device(path):
        raise OSError(errno.EINVAL, 'neither a file nor a folder', path)


def check_room(folder: str, count: int) -> None:
    """Raises OSError where the disk of a folder has no room for so many bytes more."""
    if hasattr(os, 'statvfs'):
        found = os.statvfs(folder)
        free = found.f_bavail * found.f_frsize
    else:
        import shutil
        free = shutil.disk_usage(folder).free
    if count > free:
        raise OSError(errno.ENOSPC, '%d bytes are needed, %d are free' % (count, free), folder)


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
    """Removes a partial folder, or a link, where a partial file is to be. Raises Busy."""
    if os.path.islink(path):
        os.unlink(path)
    else:
        with locked_folder(path, target):
            remove_tree(path)


def remove_tree(path: str) -> None:
    """Removes a file, or a folder and all in it. shutil is imported here alone: a guest that waits does
    without its memory."""
    if os.path.isdir(path) and not os.path.islink(path):
        import shutil
        for folder, _, _ in os.walk(path):
            os.chmod(folder, 0o700)
        shutil.rmtree(path)
    else:
        os.unlink(path)


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
def locked_folder(path: str, target: str) -> Iterator[bool]:
    """Makes the partial folder of a target, unless it is there, and locks it; says whether it was made.
    Raises Busy."""
    if os.path.lexists(path) and (os.path.islink(path) or not os.path.isdir(path)):
        with open_part(target) as file:
            give_up_part(file, target)
    made = make_folder(path)
    if fcntl is None:
        yield made
        return
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        lock(fd, target)
        if not is_still(fd, path):
            raise Busy(to_remote(target))
        yield made
    finally:
        os.close(fd)


def is_still(fd: int, path: str) -> bool:
    """Whether what is open has this name: who had it locked before may have given it another one."""
    try:
        return fcntl is None or os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def finish_part(file: Any, target: str) -> None:
    """Gives a partial file its name, and the owner of the file that it replaces, where we may."""
    keep_owner(file, target)
    close_where_needed(file)
    os.replace(local_part(target), target)


def give_up_part(file: Any, target: str) -> None:
    """Removes a partial file that is of no more use."""
    close_where_needed(file)
    os.unlink(local_part(target))


def close_where_needed(file: Any) -> None:
    """Closes a file that is to be renamed or removed, where no system does that with an open one; elsewhere
    it stays locked meanwhile."""
    if fcntl is None:
        file.close()


def mode_of_file(path: str) -> Optional[int]:
    """The mode of the regular file that is there, if there is one."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return None
    return stat.S_IMODE(mode) if stat.S_ISREG(mode) else None


def keep_owner(file: Any, target: str) -> None:
    with contextlib.suppress(OSError, AttributeError):
        found = os.lstat(target)
        if stat.S_ISREG(found.st_mode):
            os.fchown(file.fileno(), found.st_uid, found.st_gid)


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
    if hasattr(os, 'fchmod'):
        os.fchmod(file.fileno(), mode & 0o777)


def make_folder(path: str) -> bool:
    """Makes a folder, or takes the one that is there; says whether it was made. Raises OSError for what is
    no folder."""
    try:
        os.mkdir(path, 0o700)
        return True
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return False


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
