"""A folder that is served: paths are resolved within it, and nothing leads out.

No threads of its own; any thread may use it.
"""

import contextlib
import errno
import os
import stat
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from chirpwire import BLOCK, PATH, RESERVED, ChirpError, is_zero, new_hash

TEMPORARY = b'.__put.'         # files that are still being received
LINKS = 40                     # symbolic links that one path may lead through
DEEPEST = 200                  # levels that rmall goes down


class Root:
    """A folder as the peers see it. Every path is resolved name by name, from descriptor to descriptor,
    without the kernel following a link; links are resolved here, within the folder. So no ``..``, no
    link and no race leads out, whoever made it. Raises OSError. Any thread may use it."""

    def __init__(self, path: str, shown: Optional[Dict[str, str]] = None) -> None:
        """``shown``: {name: folder} of what can be read under that name at the top, and never changed."""
        if os.open not in os.supports_dir_fd:
            raise ChirpError('this system can\'t open files relative to a folder: it can\'t serve')
        self.path = os.path.realpath(path)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        self._shown = {os.fsencode(name): os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                       for name, folder in (shown or {}).items()}
        self._closed = False

    def close(self) -> None:
        """Closes its descriptor. A second call does nothing: the number may be another file's by then."""
        if not self._closed:
            self._closed = True
            for fd in (self._fd, *self._shown.values()):
                os.close(fd)

    @contextlib.contextmanager
    def parent(self, path: bytes, follow: bool = True, write: bool = True) -> Iterator[Tuple[int, bytes]]:
        """The descriptor of the folder that a path's last name is in, and that name ('.': the root).
        With ``follow`` the name isn't a link, or wasn't a moment ago: use it without following.
        ``write``: something will be changed by it."""
        names = split_path(path)
        if write and names and names[0] in self._shown:
            raise OSError(errno.EROFS, 'to be read only')
        fd, name = self._walk(names, follow)
        try:
            yield fd, name
        finally:
            self._leave(fd)

    def free_bytes(self) -> int:
        return free_bytes(self._fd)

    def stat(self, path: bytes, follow: bool = True) -> os.stat_result:
        with self.parent(path, follow, write=False) as (fd, name):
            return os.stat(name, dir_fd=fd, follow_symlinks=False)

    def open(self, path: bytes, flags: int = os.O_RDONLY, mode: int = 0o600, write: bool = False) -> int:
        """A descriptor of a regular file or, to read, of a folder."""
        with self.parent(path, write=write) as (fd, name):
            return open_in(fd, name, flags, mode)

    def list(self, path: bytes) -> Iterator[Tuple[bytes, os.stat_result]]:
        """What is in a folder, ``.`` and ``..`` too; not what can't be said in a line."""
        fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield b'.', os.fstat(fd)
            yield b'..', os.fstat(fd)
            for name in map(os.fsencode, os.listdir(fd)):
                if b'\n' in name or name.startswith(RESERVED):
                    continue
                try:
                    yield name, os.stat(name, dir_fd=fd, follow_symlinks=False)
                except OSError:                # it has gone, or may not be looked at
                    continue
        finally:
            os.close(fd)

    def _walk(self, names: List[bytes], follow: bool) -> Tuple[int, bytes]:
        here, done, links = self._fd, [], 0    # type: int, List[bytes], int
        if names and names[0] in self._shown:
            here = os.dup(self._shown[names.pop(0)])
        try:
            while names:
                name = names.pop(0)
                if name == b'..':              # in a link; what is done holds no links
                    names[:0] = done[:-1]
                    here, done = self._leave(here), []
                    continue
                target = None
                if names:
                    there, target = self._step(here, name)
                    if target is None:
                        self._leave(here)
                        here = there
                        done.append(name)
                        continue
                elif follow:
                    target = link_target(here, name)
                if target is None:
                    return here, name
                links += 1
                if links > LINKS:
                    raise OSError(errno.EINVAL, 'too many links')
                names[:0] = link_names(target)
                if target.startswith(b'/'):
                    here, done = self._leave(here), []
            return here, b'.'
        except BaseException:
            self._leave(here)
            raise

    def _step(self, here: int, name: bytes) -> Tuple[int, Optional[bytes]]:
        """The descriptor of a folder in a folder, or where the link of that name leads."""
        try:
            return os.open(name, WALK, dir_fd=here), None
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP, errno.EMLINK):
                raise
            target = link_target(here, name)
            if target is None:
                raise NotADirectoryError(errno.ENOTDIR, 'not a directory')
            return -1, target

    def _leave(self, fd: int) -> int:
        """Closes a descriptor of the walk; the root's, which stays."""
        if fd != self._fd:
            os.close(fd)
        return self._fd


# Flags that a walk opens folders with: without O_PATH a folder that may be entered but not read is shut.
WALK = (getattr(os, 'O_PATH', 0) | getattr(os, 'O_DIRECTORY', 0) | getattr(os, 'O_NOFOLLOW', 0)
        | getattr(os, 'O_CLOEXEC', 0))


def split_path(path: bytes) -> List[bytes]:
    """The names of a path of a request, which can't climb over the root. Raises OSError for ours."""
    if len(path) > PATH:
        raise OSError(errno.ENAMETOOLONG, 'path too long')
    names: List[bytes] = []
    for name in path.split(b'/'):
        if name == b'..':
            del names[-1:]
        elif name not in (b'', b'.'):
            names.append(name)
    check_reserved(names)
    return names


def link_names(target: bytes) -> List[bytes]:
    """The names of a link's target; ``..`` stay, since what precedes may be a link, too."""
    names = [name for name in target.split(b'/') if name not in (b'', b'.')]
    check_reserved(names)
    return names


def check_reserved(names: Sequence[bytes]) -> None:
    """Raises PermissionError for a name that is the server's own."""
    if any(name.startswith(RESERVED) for name in names):
        raise PermissionError(errno.EACCES, 'a name of the server\'s own')


def link_target(fd: int, name: bytes) -> Optional[bytes]:
    """Where a link leads; None where it is none, or nothing."""
    try:
        return os.readlink(name, dir_fd=fd)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return None
        raise


def open_in(fd: int, name: bytes, flags: int, mode: int = 0o600) -> int:
    """Opens a regular file or, to read, a folder; never waits, as a pipe would have it."""
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        opened = os.open(name, flags, mode, dir_fd=fd)
    except OSError as error:
        if error.errno == errno.ELOOP:         # it became a link since it was looked at
            raise OSError(errno.EINVAL, 'a link')
        raise
    found = os.fstat(opened)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        os.close(opened)
        raise OSError(errno.EINVAL, 'neither file nor folder')
    return opened


def remove_tree(fd: int, name: bytes, depth: int = 0) -> None:
    """Removes a file, or a folder and all in it, the server's own files too; follows no link."""
    try:
        os.unlink(name, dir_fd=fd)
        return
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
        if not stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
            raise
    if depth >= DEEPEST:
        raise OSError(errno.EMFILE, 'too deep')
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
    try:
        for entry in os.listdir(inner):
            remove_tree(inner, os.fsencode(entry), depth + 1)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=fd)


def remove_folder(fd: int, name: bytes) -> None:
    """rmdir; a folder that holds nothing but the server's own files is empty."""
    try:
        os.rmdir(name, dir_fd=fd)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
    try:
        names = [os.fsencode(entry) for entry in os.listdir(inner)]
        if all(entry.startswith(RESERVED) for entry in names):
            for entry in names:
                os.unlink(entry, dir_fd=inner)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=fd)


def write_all(fd: int, view: memoryview, offset: int, holes: bool = True) -> None:
    """Writes all of it at an offset; zeros beyond the file's end become a hole. No holes in a file that is
    open to append: what is written there goes to its end, wherever that is by then."""
    if holes and is_zero(view) and os.fstat(fd).st_size <= offset:
        os.ftruncate(fd, offset + len(view))
        return
    while view:
        count = os.pwrite(fd, view, offset)
        offset += count
        view = view[count:]


def change_mode(fd: int, mode: int) -> None:
    """chmod; the owner's own rights stay, setuid and its like don't come."""
    keep = 0o700 if stat.S_ISDIR(os.fstat(fd).st_mode) else 0o600
    os.fchmod(fd, mode & 0o777 | keep)


def statfs_line(fd: int) -> bytes:
    found = os.fstatvfs(fd)
    return b'0\n%d %d %d %d %d %d %d\n' % (0, found.f_frsize, found.f_blocks, found.f_bfree, found.f_bavail,
                                           found.f_files, found.f_ffree)


def free_bytes(fd: int) -> int:
    """What the disk of a file or folder has room for."""
    found = os.fstatvfs(fd)
    return found.f_bavail * found.f_frsize


def hash_file(fd: int, algorithm: str, checksum: Any = None, count: Optional[int] = None) -> Any:
    """The checksum of a file, or its first bytes, read from the start, not moving where it stands."""
    checksum = checksum or new_hash(algorithm)
    at = 0
    while count is None or at < count:
        data = os.pread(fd, BLOCK if count is None else min(BLOCK, count - at), at)
        if not data:
            break
        checksum.update(data)
        at += len(data)
    return checksum
