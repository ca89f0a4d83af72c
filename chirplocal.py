"""Files and folders on this machine, as transfers need them: partial files, locks, names, links.

What it is not: anything that knows a server. No threads.
"""

import contextlib
import errno
import itertools
import os
import stat
from typing import Any, Callable, Dict, Iterable, Iterator, Optional, Tuple, Union

import agent
import localnames
from chirpwire import (
    SMALL,
    Busy,
    ChirpError,
    check_unmounted,
    inherited,
    is_trusted,
    is_zero,
    keep_attributes,
    lock_part,
    part_name,
    seconds,
    taking,
    to_bytes,
    unkept,
)

ON_WINDOWS = os.name == 'nt'
JUNCTION = getattr(stat, 'IO_REPARSE_TAG_MOUNT_POINT', None)     # on Windows, from Python 3.8 on
NESTED = 200                   # levels of a folder that are followed
NO_LINK = 'it was a link, and is none any more'


def to_remote(name: str) -> bytes:
    """The server's name of what is called so here."""
    return os.fsencode(name) if os.name == 'posix' else name.encode('utf-8', 'surrogatepass')


def to_local(name: str) -> str:
    """What an entry of the server is called here. Raises OSError where that can't be."""
    local = os.fsdecode(to_bytes(name)) if os.name == 'posix' else name
    localnames.check(local)
    return local


def local_part(path: str) -> str:
    """Under which name a file is here while it is not whole."""
    folder, name = os.path.split(path)
    return os.path.join(folder, os.fsdecode(part_name(os.fsencode(name))))


def open_regular(path: str, follow: bool = True) -> Any:
    """Opens a local file to read, unbuffered. ``follow``: through a link, where it is one. Raises OSError
    where it is something else."""
    return os.fdopen(open_regular_fd(path, follow)[0], 'rb', buffering=0)


def open_regular_fd(path: str, follow: bool = True) -> Tuple[int, os.stat_result]:
    """The same; its descriptor and its stat."""
    try:
        fd = os.open(path, READING if follow else READING | getattr(os, 'O_NOFOLLOW', 0))
    except OSError as error:
        if ON_WINDOWS and isinstance(error, PermissionError):  # of the same number, for whatever reason
            error.strerror = agent.NOT_TO_READ
        elif not follow and error.errno == errno.ELOOP:
            error.strerror = 'it became a link meanwhile'
        raise
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise OSError(errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL, 'not a regular file',
                      path)
    return fd, found


READING = (os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0)
           | getattr(os, 'O_NOCTTY', 0) | getattr(os, 'O_CLOEXEC', 0))


def read_small(path: str, follow: bool) -> Optional[Tuple[os.stat_result, bytes]]:
    """A file's stat and content; None of one that is larger than SMALL."""
    fd, found = open_regular_fd(path, follow)
    try:
        if found.st_size > SMALL:
            return None
        data = os.read(fd, SMALL + 1)
        while len(data) != found.st_size and len(data) <= SMALL:       # those of /proc say 0
            more = os.read(fd, SMALL + 1 - len(data))
            if not more:
                break
            data += more
        return (found, data) if len(data) <= SMALL else None
    finally:
        os.close(fd)


def is_link(entry: os.DirEntry) -> bool:
    """Whether it is a symbolic link, or a junction, which is a link to a folder by another name."""
    return entry.is_symlink() or JUNCTION is not None and \
        getattr(entry.stat(follow_symlinks=False), 'st_reparse_tag', None) == JUNCTION


def stat_here(path: str) -> os.stat_result:
    """Of what a path leads to. Raises OSError, which says so of a link that leads nowhere."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise OSError(errno.ENOENT, 'a link to %s, where nothing is' % os.readlink(path), path)
        raise


def stat_of(path: str, follow: bool) -> Optional[os.stat_result]:
    """None of what isn't there, or can't be looked at."""
    try:
        return os.stat(path, follow_symlinks=follow)
    except OSError:
        return None


def through_links(path: str) -> str:
    """Where what is written to a path goes: what a link leads to. Raises OSError where that is nothing."""
    if not os.path.islink(path):
        return path
    stat_here(path)
    return os.path.realpath(path)


def tree_size(path: str, depth: int = 0) -> Tuple[int, int]:
    """Bytes of the files in a folder that will be sent, and those that they need on disk."""
    size = space = 0
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if is_link(entry):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    inner = tree_size(entry.path, depth + 1) if depth < NESTED else (0, 0)
                    size, space = size + inner[0], space + inner[1]
                elif entry.is_file(follow_symlinks=False):
                    found = entry.stat(follow_symlinks=False)
                    size, space = size + found.st_size, space + space_of(found)
    return size, space


@contextlib.contextmanager
def pinned(path: str, follow: bool = False) -> Iterator[str]:
    """A folder, by a path that leads to it whatever other programs put in its place meanwhile. Of Linux;
    elsewhere the path as it is. Raises OSError for a link, unless ``follow``."""
    if not hasattr(os, 'O_PATH') or not os.path.isdir(PINS):    # a Windows' own disk may have that folder
        yield path
        return
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    PINNED[str(fd)] = unpinned(path)
    try:
        yield PINS + str(fd)
    except OSError as error:
        if isinstance(error.filename, str):
            error.filename = unpinned(error.filename)
        raise
    finally:
        del PINNED[str(fd)]
        os.close(fd)


@contextlib.contextmanager
def pinned_below(top: str, names: Iterable[str], follow: bool = False) -> Iterator[str]:
    """A folder in another one, ``pinned`` step by step: the first one may be the user's own link."""
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(pinned(top, True))
        for name in names:
            here = stack.enter_context(pinned(os.path.join(here, name), follow))
        yield here


def unpinned(path: str) -> str:
    """How a person knows a pinned folder, or what is in it."""
    fd, _, name = path[len(PINS):].partition('/')
    if not path.startswith(PINS) or fd not in PINNED:
        return path
    return os.path.join(PINNED[fd], name) if name else PINNED[fd]


PINS = '/proc/self/fd/'
PINNED: Dict[str, str] = {}    # what a person calls each; of all threads, each has descriptors of its own


def join(folder: bytes, name: bytes) -> bytes:
    return folder.rstrip(b'/') + b'/' + name


def is_device(path: str) -> bool:
    """Whether what is written there goes to a device, FIFO or the like, which no file may replace."""
    try:
        mode = os.stat(path).st_mode
    except OSError:                    # nothing, or a link to it
        return False
    path = os.path.abspath(path)
    return (not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
            or path.startswith('/proc/') and unpinned(path) == path
            or path.startswith('/dev/') and os.path.islink(path))      # as /dev/stdout


def open_device(path: str) -> Any:
    """Opens a device or FIFO to write to; of a file, as /dev/stdout may lead to, the end. Raises OSError
    where nobody reads from it, yet."""
    at_end = os.O_APPEND if stat.S_ISREG(os.stat(path).st_mode) else 0     # a disk is written from its start
    try:
        fd = os.open(path, os.O_WRONLY | at_end | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_NOCTTY', 0)
                     | getattr(os, 'O_CLOEXEC', 0))
    except OSError as error:
        if error.errno == errno.ENXIO:
            error.strerror = 'nobody reads from it'
        raise
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
    free = free_here(folder)
    if count > free and hasattr(os, 'sync'):
        os.sync()                      # before that, Btrfs counts what was just deleted
        free = free_here(folder)
    if count > free:
        check_writable(folder)
        raise OSError(errno.ENOSPC, '%d bytes are needed, %d are free' % (count, free), folder)


def check_writable(folder: str) -> None:
    """Raises OSError where its disk is read only, which has no room either."""
    if hasattr(os, 'statvfs') and os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), folder)


def free_here(folder: str) -> int:
    """Bytes that the disk of a folder has room for."""
    if hasattr(os, 'statvfs'):
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize
    import shutil
    return shutil.disk_usage(folder).free


def times_of(found: os.stat_result) -> Tuple[int, int]:
    """When a file or folder was accessed and changed last, in seconds."""
    return seconds(found.st_atime_ns), seconds(found.st_mtime_ns)


def space_of(found: Any) -> int:
    """Bytes on disk that a file of that stat needs: one with holes needs less than its size."""
    return min(found.st_size, found.st_blocks * 512) if hasattr(found, 'st_blocks') else found.st_size


def open_part(target: str) -> Any:
    """Opens the partial file of a target here, to go on with it; never through a link. Raises Busy where
    somebody else has it open so, until it has its name or is closed."""
    path = local_part(target)
    try:
        fd, made = open_or_make(path)
    except OSError as error:
        is_folder = ON_WINDOWS and os.path.isdir(path)     # of which it says that access is denied
        if error.errno == errno.ENXIO:         # a socket
            os.unlink(path)
            return open_part(target)
        if error.errno not in (errno.ELOOP, errno.EISDIR) and not is_folder:
            error.filename = unpinned(target)      # a person knows no other name
            raise
        remove_part(path, target)
        return open_part(target)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:          # another file's name as well
        os.close(fd)
        os.unlink(path)
        return open_part(target)
    file = os.fdopen(fd, 'r+b', buffering=0)
    try:
        if found.st_size:
            check_own_place(path)
        lock(fd, target)
        if is_still(fd, path):
            if made or is_trusted(found, os.stat(os.path.dirname(path) or '.')):
                return file
            remove_anothers(path, target)
    except BaseException:
        file.close()
        raise
    file.close()
    return open_part(target)


def open_or_make(path: str) -> Tuple[int, bool]:
    """The descriptor of a partial file, and whether it was made."""
    flags = (os.O_RDWR | getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_NONBLOCK', 0)
             | getattr(os, 'O_BINARY', 0) | getattr(os, 'O_CLOEXEC', 0))
    while True:
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), True
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):       # it has gone meanwhile
                return os.open(path, flags), False


def remove_anothers(path: str, target: str) -> None:
    """Removes what isn't trusted, and is locked."""
    try:
        remove_tree(path)
    except PermissionError as error:
        raise OSError(error.errno, '%s is in the way, which another user has made there' %
                      os.path.basename(path), unpinned(target))


def remove_part(path: str, target: str) -> None:
    """Removes a partial folder, or a link, where a partial file is to be. Raises Busy."""
    if os.path.islink(path):
        os.unlink(path)
    else:
        with locked_folder(path, target):
            remove_tree(path)


def check_own_place(path: str) -> None:
    """Raises OSError where something is mounted there."""
    if not hasattr(os, 'O_PATH'):
        if os.path.ismount(path):
            raise OSError(errno.EBUSY, 'something is mounted there', path)
        return
    with contextlib.ExitStack() as stack:
        fds = []
        for each in path, os.path.dirname(path):
            fds.append(os.open(each or '.', os.O_PATH | os.O_CLOEXEC))
            stack.callback(os.close, fds[-1])
        check_unmounted(*fds)


def remove_tree(path: str) -> None:
    """Removes a file, or a folder and all in it, unless something is mounted in there; goes through no link,
    nor through one that comes meanwhile, where the system opens files relative to a folder. What does it is
    imported here alone: a guest that waits does without its memory."""
    if os.open not in os.supports_dir_fd:
        return remove_tree_by_path(path)
    import chirproot
    folder, name = os.path.split(path)
    fd = os.open(folder or '.', getattr(os, 'O_PATH', os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        chirproot.check_tree_unmounted(fd, os.fsencode(name))
        chirproot.remove_tree(fd, os.fsencode(name))
    except OSError as error:
        error.filename = unpinned(path)        # of what is in there it has the last name alone
        raise
    finally:
        os.close(fd)


def remove_tree_by_path(path: str) -> None:
    """The same on Windows."""
    if os.path.isdir(path) and not os.path.islink(path):
        import shutil
        for folder, _, _ in os.walk(path):
            check_own_place(folder)
        for folder, _, _ in os.walk(path):
            os.chmod(folder, 0o700)
        shutil.rmtree(path)
    else:
        os.unlink(path)


def lock(fd: int, target: str) -> None:
    """Locks what is made for a target, until it is closed. Raises Busy."""
    if ON_WINDOWS:
        return lock_on_windows(fd, target)
    if not lock_part(fd):
        raise Busy(to_remote(unpinned(target)))


LOCKED_BYTE = 2 ** 31 - 2      # of a partial file on Windows, where no other program can read what is locked


def lock_on_windows(fd: int, target: str) -> None:
    """As ``lock``, of a file that is open at its begin."""
    import msvcrt  # of Windows' Python alone
    os.lseek(fd, LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)         # type: ignore
    except OSError:
        raise Busy(to_remote(unpinned(target)))
    finally:
        os.lseek(fd, 0, os.SEEK_SET)


@contextlib.contextmanager
def locked_folder(path: str, target: str) -> Iterator[bool]:
    """Makes the partial folder of a target, unless it is there, and locks it; says whether it was made.
    Raises Busy."""
    if os.path.lexists(path) and (os.path.islink(path) or not os.path.isdir(path)):
        with open_part(target) as file:
            give_up_part(file, target)
    try:
        made = make_folder(path)
    except OSError as error:
        error.filename = unpinned(target)      # a person knows no other name
        raise
    if ON_WINDOWS:
        with locked_beside(path, target):
            yield made
        return
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        lock(fd, target)
        if not is_still(fd, path):
            raise Busy(to_remote(unpinned(target)))
        if made or is_trusted(os.fstat(fd), os.stat(os.path.dirname(path) or '.')):
            yield made
            return
        remove_anothers(path, target)
    finally:
        os.close(fd)
    with locked_folder(path, target) as made:
        yield made


@contextlib.contextmanager
def locked_beside(path: str, target: str) -> Iterator[None]:
    """Locks a partial folder where the system opens no folders: by a file that goes with who made it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    try:
        fd = os.open(local_part(path), flags | os.O_TEMPORARY)         # type: ignore
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.EACCES):
            raise
        raise Busy(to_remote(unpinned(target)))
    try:
        yield
    finally:
        os.close(fd)


def is_still(fd: int, path: str) -> bool:
    """Whether what is open has this name: who had it locked before may have given it another one."""
    try:
        return ON_WINDOWS or os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def finish_part(file: Any, target: str, times: Optional[Tuple[int, int]] = None,
                mode: Optional[int] = None) -> int:
    """Gives a partial file its times (accessed, changed), its mode and its name, and the owner, where we may,
    and the access list of the file that it replaces. Gives what of it wasn't kept, as ``keep``."""
    localnames.check_own(target)
    keep_owner(file, target)
    close_where_needed(file)
    part = local_part(target) if file.closed else file.fileno()        # type: Union[int, str]
    bits = keep(part, times, mode) if times is not None or mode is not None else 0
    agent.replace(local_part(target), target)
    return bits


def give_up_part(file: Any, target: str) -> None:
    """Removes a partial file that is of no more use."""
    close_where_needed(file)
    os.unlink(local_part(target))


def close_where_needed(file: Any) -> None:
    """Closes a file that is to be renamed or removed, where no system does that with an open one; elsewhere
    it stays locked meanwhile."""
    if ON_WINDOWS:
        file.close()


def mode_of_file(path: str) -> Optional[int]:
    """The mode of the regular file that is there, if there is one."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return None
    return stat.S_IMODE(mode) if stat.S_ISREG(mode) else None


def keep_owner(file: Any, target: str) -> None:
    """Gives a partial file the owner of the file that it replaces, where we may, and its access list."""
    try:
        found = os.lstat(target)
    except FileNotFoundError:
        return
    if stat.S_ISREG(found.st_mode) and not ON_WINDOWS:
        with contextlib.suppress(OSError):
            os.fchown(file.fileno(), found.st_uid, found.st_gid)
        keep_attributes(file.fileno(), target)


def write_here(file: Any, view: memoryview) -> None:
    """Writes all of it, zeros as a hole: the file ends here."""
    if is_zero(view):
        file.seek(len(view), os.SEEK_CUR)
        return
    while view:
        view = view[file.write(view):]


def write_whole(file: Any, view: memoryview) -> None:
    while view:
        view = view[file.write(view):]


def keep(where: Union[int, str], times: Optional[Tuple[int, int]], mode: Optional[int]) -> int:
    """Sets when the file or folder of that descriptor, or path, was accessed and changed last, and its mode;
    gives what the disk didn't keep, bits of chirpwire.UNKEPT. No mode on Windows, which of all its bits knows
    that nobody may write: no later transfer could replace such a file."""
    mode = None if mode is None or ON_WINDOWS else mode & 0o777
    if times is not None:
        with taking(), contextlib.suppress(OverflowError):     # a server may say any number
            os.utime(where, times)
    if mode is not None:
        with taking():
            os.chmod(where, mode | inherited(os.stat(where).st_mode))
    return unkept(os.stat(where), mode, None if times is None else times[1])


def mode_there(found: os.stat_result, begin: bytes = b'') -> int:
    """The mode that a file or folder of this machine has at the server. ``begin``: the file's first bytes, by
    which one is known that can be executed, where the system doesn't know."""
    if not ON_WINDOWS:
        return found.st_mode & 0o777
    mode = 0o755 if stat.S_ISDIR(found.st_mode) or begin.startswith((b'#!', b'\x7fELF')) else 0o644
    return mode if found.st_mode & stat.S_IWUSR else mode & ~0o222


def beginning(file: Any) -> bytes:
    """What ``mode_there`` wants to know of a file that is open to read, at its begin."""
    if not ON_WINDOWS:
        return b''
    begin = file.read(4)
    file.seek(0)
    return begin


def make_folder(path: str) -> bool:
    """Makes a folder, or takes the one that is there; says whether it was made. Raises OSError for what is
    no folder, or one of another name."""
    localnames.check_own(path)
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


def make_link(leads: str, path: str, is_folder: Callable[[], bool]) -> None:
    """Makes a symbolic link. ``is_folder``: whether it leads to one, which Windows wants to know. Raises
    OSError."""
    if not ON_WINDOWS:
        return os.symlink(leads, path)
    try:
        to_folder = is_folder()
    except ChirpError:                 # it leads nowhere
        to_folder = False
    try:
        os.symlink(leads, path, to_folder)
    except OSError as error:
        if getattr(error, 'winerror', 0) != NO_PRIVILEGE:
            raise
        raise OSError(errno.EPERM, 'Windows lets this user make no symbolic links: switch its developer mode '
                      'on, or take --links follow, or skip')


NO_PRIVILEGE = 1314            # Windows' number for a right that a user hasn't


def link_there(path: str) -> bytes:
    """Where a link of this machine leads, for the server. Raises OSError where that can't be said there."""
    try:
        leads = os.readlink(path)
    except OSError as error:
        if error.errno == errno.EINVAL:
            error.strerror = NO_LINK
        raise
    if not ON_WINDOWS:
        return to_remote(leads)
    leads = agent.short_path(leads).replace('\\', '/')
    if leads.startswith('/') or ':' in leads:
        raise OSError(errno.EINVAL, 'a link to %s, which only this machine has' % leads)
    return to_remote(leads)


def to_local_link(target: str) -> str:
    """Where a link leads, for this system. Raises OSError where that can't be said here."""
    if os.name == 'posix':
        return os.fsdecode(to_bytes(target))
    return os.sep.join(name if name in ('', '.', '..') else to_local(name) for name in target.split('/'))
