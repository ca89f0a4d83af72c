"""A folder that is served: paths are resolved within it, and nothing leads out.

What it is not: a judge of who may do what; the server asks its ACL. No threads of its own; any thread may use
it.
"""

import contextlib
import copy
import errno
import os
import stat
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from chirpwire import (
    OF_SERVERS,
    PATH,
    RESERVED,
    ChirpError,
    check_unmounted,
    inherited,
    is_part,
    is_zero,
    keep_attributes,
)

LINKS = 40                     # symbolic links that one path may lead through
DEEPEST = 200                  # levels that rmall goes down
UNSEEN = os.stat_result((0,) * 10, dict.fromkeys((
    'st_blksize', 'st_blocks', 'st_rdev', 'st_atime_ns', 'st_mtime_ns', 'st_ctime_ns'), 0))


class Root:
    """A folder as the peers see it. Every path is resolved name by name, from descriptor to descriptor,
    without the kernel following a link; links are resolved here, within the folder. So no ``..``, no
    link and no race leads out, whoever made it. Raises OSError. Any thread may use it.

    ``shown``: {name: folder} of what can be read under that name at the top, and never changed.
    """

    def __init__(self, path: str, shown: Optional[Dict[str, str]] = None) -> None:
        if os.open not in os.supports_dir_fd:
            raise ChirpError('this system can\'t open files relative to a folder: it can\'t serve')
        self.path = os.path.realpath(path)
        self.ours = False              # whether a program of ours looks at it
        self._reserved: Tuple[bytes, ...] = (RESERVED,)        # begins of names that aren't shown …
        self._kept: Tuple[bytes, ...] = (RESERVED,)    # … or not changed
        self._closed = False
        self._linkless: Optional[List[bytes]] = None   # names of a folder below which no link leads anywhere
        self._shown: Dict[bytes, Root] = {}
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name, folder in (shown or {}).items():
                self._shown[os.fsencode(name)] = Root(folder)
        except OSError:
            self.close()
            raise

    def for_ours(self) -> 'Root':
        """The same folder, not to be closed, as programs of ours see it: every name can be said, and all but
        those that servers make belong to the user, who may read those."""
        root = copy.copy(self)
        root.ours, root._reserved, root._kept = True, (), OF_SERVERS
        return root

    def lead_through_no_link(self, below: Optional[bytes]) -> None:
        """Of what lies below that folder, whose own path may hold links, each name is from now on what it is
        itself: so who shares the folder leads nobody out of it. None: links lead on everywhere."""
        self._linkless = None if below is None else split_path(below)

    def look_again(self) -> None:
        """Where another folder has its path by now, made anew or mounted there, that one is served, by all:
        programs on this machine see it, too."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(self.path), os.fstat(self._fd)):
                return
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.dup2(fd, self._fd, False)
            finally:
                os.close(fd)

    def close(self) -> None:
        """Closes its descriptor. A second call does nothing: the number may be another file's by then."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)
            for root in self._shown.values():
                root.close()

    @contextlib.contextmanager
    def parent(self, path: bytes, follow: bool = True,
               reserved: Tuple[bytes, ...] = ()) -> Iterator[Tuple[int, bytes]]:
        """The descriptor of the folder that a path's last name is in, and that name ('.': the root).
        With ``follow`` the name isn't a link, or wasn't a moment ago, but below a folder where none leads on:
        use it without following.

        ``reserved``: begins of names that it doesn't lead to, beside those that aren't shown.
        """
        root, fd, name = self._find(path, follow, reserved)
        try:
            yield fd, name
        finally:
            root._leave(fd)

    def _find(self, path: bytes, follow: bool, reserved: Tuple[bytes, ...]) -> Tuple['Root', int, bytes]:
        """What ``parent`` gives, and the root that is to leave that descriptor."""
        reserved += self._reserved
        names = split_path(path)       # which can't climb over the root
        check_names(names, reserved)
        root, below = self, self._linkless
        linkless = 0 if below is None or names[:len(below)] != below else len(names) - len(below)
        if names and names[0] in self._shown:
            root, names = self._shown[names[0]], names[1:]
        fd, name = root._walk(names, follow, reserved, linkless)
        return root, fd, name

    @contextlib.contextmanager
    def changing(self, path: bytes, follow: bool = True,
                 removes: bool = False) -> Iterator[Tuple[int, bytes]]:
        """``parent`` of what is going to be made, changed or removed. ``removes``: which programs of ours may
        do with what a server left of a file that it was receiving when it died."""
        names = split_path(path)
        if any(name in self._shown for name in names[:1]):
            raise PermissionError(errno.EROFS, 'to be read only')
        kept = () if removes and self.ours and names and is_part(names[-1]) else self._kept
        with self.parent(path, follow, kept) as found:
            yield found

    def free_bytes(self) -> int:
        return free_bytes(self._fd)

    def stat(self, path: bytes, follow: bool = True) -> os.stat_result:
        root, fd, name = self._find(path, follow, ())
        try:
            return os.stat(name, dir_fd=fd, follow_symlinks=False)
        finally:
            root._leave(fd)

    def open(self, path: bytes, flags: int = os.O_RDONLY) -> int:
        """A descriptor of a regular file or, to read, of a folder."""
        find = self.parent if flags & os.O_ACCMODE == os.O_RDONLY else self.changing
        with find(path) as (fd, name):
            return open_in(fd, name, flags)

    def list(self, path: bytes) -> Iterator[Tuple[bytes, os.stat_result]]:
        """What is in a folder, ``.`` and ``..`` too, one by one; not what can't be said. What may not be
        looked at is told with UNSEEN, as by the real server."""
        fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield b'.', os.fstat(fd)
            yield b'..', os.fstat(fd)
            for name in names_in(fd):
                if b'\n' in name and not self.ours or name.startswith(self._reserved):
                    continue
                try:
                    yield name, os.stat(name, dir_fd=fd, follow_symlinks=False)
                except FileNotFoundError:      # it has gone
                    continue
                except OSError:
                    yield name, UNSEEN
        finally:
            os.close(fd)

    def _walk(self, names: List[bytes], follow: bool, reserved: Tuple[bytes, ...],
              linkless: int) -> Tuple[int, bytes]:
        """``linkless``: so many names at the end lead through no link."""
        here, done, links = self._fd, [], 0    # type: int, List[bytes], int
        try:
            while names:
                name = names.pop(0)
                if name == b'..':              # in a link; what is done holds no links
                    names[:0] = done[:-1]
                    here, done = self._leave(here), []
                    continue
                target, leads_on = None, len(names) >= linkless
                if names:
                    there, target = self._step(here, name)
                    if target is None:
                        self._leave(here)
                        here = there
                        done.append(name)
                        continue
                    if not leads_on:
                        raise NotADirectoryError(errno.ENOTDIR, 'a link')
                elif follow and leads_on:
                    target = link_target(here, name)
                if target is None:
                    return here, name
                links += 1
                if links > LINKS:
                    raise OSError(errno.EINVAL, 'too many links')
                leads = [name for name in target.split(b'/') if name not in (b'', b'.')]
                check_names(leads, reserved)
                names[:0] = leads              # with their '..': what precedes may be a link, too
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
    """The names of a path, which can't climb over the root. Raises OSError."""
    if len(path) > PATH:
        raise OSError(errno.ENAMETOOLONG, 'path too long')
    names: List[bytes] = []
    for name in path.split(b'/'):
        if name == b'..':
            del names[-1:]
        elif name not in (b'', b'.'):
            names.append(name)
    return names


def check_names(names: Sequence[bytes], reserved: Tuple[bytes, ...]) -> None:
    """Raises PermissionError for a name that is the server's own."""
    for name in names:
        if name.startswith(reserved):
            raise PermissionError(errno.EACCES, 'a name of the server\'s own')


def names_in(fd: int) -> Iterator[bytes]:
    """The names in an open folder, one by one, however many there are."""
    if os.scandir in os.supports_fd:
        with os.scandir(fd) as entries:
            for entry in entries:
                yield os.fsencode(entry.name)
    else:                              # Python 3.6
        yield from map(os.fsencode, os.listdir(fd))


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


def check_tree_unmounted(fd: int, name: bytes, depth: int = 0) -> None:
    """Raises OSError where something is mounted at a folder, or in it. What can't be looked at is passed
    over: who removes it is told."""
    with contextlib.ExitStack() as stack:
        try:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        except OSError:                # a file, mostly
            return
        stack.callback(os.close, inner)
        check_unmounted(inner, fd)
        if depth < DEEPEST:
            for entry in names_in(inner):
                check_tree_unmounted(inner, entry, depth + 1)


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
        check_unmounted(inner, fd)
        with contextlib.suppress(OSError):     # one that may not be written; or what follows says so
            os.fchmod(inner, 0o700)
        for entry in names_in(inner):
            remove_tree(inner, entry, depth + 1)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=fd)


def servers_alone(fd: int) -> bool:
    """Whether a folder holds nothing but files of servers."""
    return all(name.startswith(OF_SERVERS) for name in names_in(fd))


def remove_folder(fd: int, name: bytes) -> None:
    """rmdir; a folder that holds nothing but files of servers is empty."""
    try:
        os.rmdir(name, dir_fd=fd)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
    try:
        names = list(names_in(inner)) if servers_alone(inner) else []
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


def check_access(fd: int, name: bytes, bits: int) -> None:
    """Raises OSError, which says why, for what may not be read, written or entered."""
    if os.access(name, bits, dir_fd=fd):
        return
    if bits & os.W_OK:
        here = os.open(name, WALK & ~getattr(os, 'O_DIRECTORY', 0), dir_fd=fd)
        try:
            if os.fstatvfs(here).f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        finally:
            os.close(here)
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def change_mode(fd: int, mode: int, least: int) -> None:
    """chmod; setuid and its like don't come. ``least``: the rights of the owner that stay, of a folder's."""
    os.fchmod(fd, mode & 0o777 | least_of(os.fstat(fd).st_mode, least))


def change_mode_of_shut(fd: int, name: bytes, mode: int, least: int) -> None:
    """``change_mode`` of what its owner may not open; never of what a link leads to. Raises OSError, also
    where the system has no such way."""
    shut = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    try:
        found = os.fstat(shut).st_mode
        if stat.S_ISLNK(found):
            raise OSError(errno.EINVAL, 'a link')
        os.chmod('/proc/self/fd/%d' % shut, mode & 0o777 | least_of(found, least))
    finally:
        os.close(shut)


def least_of(found: int, least: int) -> int:
    """Bits that stay of that mode, whatever is asked for."""
    return least | inherited(found) if stat.S_ISDIR(found) else least & 0o600


def keep_owner(part: Tuple[int, bytes], old: Tuple[int, bytes], found: os.stat_result) -> None:
    """Gives a file the owner of the old one, where we may, and its access list; each is its folder
    and its name there."""
    with contextlib.suppress(OSError):
        os.chown(part[1], found.st_uid, found.st_gid, dir_fd=part[0], follow_symlinks=False)
    keep_attributes(b'/proc/self/fd/%d/%s' % part, b'/proc/self/fd/%d/%s' % old)


def statfs_line(fd: int) -> bytes:
    found = os.fstatvfs(fd)
    return b'0\n%d %d %d %d %d %d %d\n' % (0, found.f_frsize, found.f_blocks, found.f_bfree, found.f_bavail,
                                           found.f_files, found.f_ffree)


def free_bytes(fd: int) -> int:
    """What the disk of a file or folder has room for."""
    found = os.fstatvfs(fd)
    return found.f_bavail * found.f_frsize
