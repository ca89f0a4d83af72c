"""Control groups of Linux (cgroup v2): one for each command, where this agent may make them.

A group holds all processes of a command, whatever sessions they make and however fast they fork: it ends them
all at once, tells what they have used together, and limits that. Groups are made below a group that is this
agent's own, and nowhere else: groups of other services, and processes that aren't the agent's, stay there.

What it is not: needed. Where there are no groups, a command is what descends from its runner
(guestprocesses.py); what fails here is told by None or False, and never ends a command. Knows no spool and no
words. No threads, no locks: the kernel's own keep folders and processes apart.
"""

import contextlib
import errno
import logging
import os
import re
import signal
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

log = logging.getLogger('vmguest')

LEAF = 'vmguest-agent'         # the group of agents themselves, where theirs has to be an inner one
NEST = 'vmguest-'              # begin of the name of an agent's group of groups
CONTROLLERS = ('memory', 'cpu', 'pids')
DELEGATED = ('user.delegate', 'trusted.delegate')      # attributes by which systemd says Delegate=yes
LIMITS = ('memory', 'cpus', 'pids')                    # for all processes of a command together
CPU_PERIOD = 100000            # microseconds, of which cpu.max grants a part


# --- where groups may be made ----------------------------------------------------------------

class Place:
    """The group below which an agent makes its own; ``why`` there is none, where ``folder`` is ''.

    ``controllers``: what groups there measure and limit, once the agent has settled.
    """

    def __init__(self, folder: str, why: str = '', may_hand_on: bool = False, leaf: str = '') -> None:
        """``may_hand_on``: whether the controllers are the agent's to pass to its groups, for which it goes
        into the group ``leaf`` first."""
        self.folder = folder
        self.why = why
        self.controllers = []          # type: List[str]
        self._may_hand_on = may_hand_on
        self._leaf = leaf

    def settle(self) -> None:
        """Has groups here be measured and limited, if they may. Before the agent forks anything."""
        if self.folder and self._may_hand_on:
            if self._leaf:
                make_folder(self._leaf)
                if not write(self._leaf, 'cgroup.procs', '0'):
                    return
            hand_on(self.folder)
        self.controllers = words_of(self.folder, 'cgroup.subtree_control', CONTROLLERS) if self.folder else []

    def settled_controllers(self) -> List[str]:
        """What ``controllers`` would be, had the agent settled. Changes nothing."""
        name = 'cgroup.controllers' if self._may_hand_on else 'cgroup.subtree_control'
        return words_of(self.folder, name, CONTROLLERS) if self.folder else []

    def describe(self) -> str:
        """What a log or ``check`` says of it."""
        if not self.folder:
            return self.why
        return 'below %s, with %s' % (self.folder, 'the controllers ' + ', '.join(self.controllers)
                                      if self.controllers else 'no controllers: memory isn\'t measured')

    def nest(self, spool: str) -> str:
        """The group of all groups of the agent with that spool, which needn't be there; '' for nowhere."""
        if not self.folder:
            return ''
        status = os.stat(spool)
        return os.path.join(self.folder, '%s%x-%x' % (NEST, status.st_dev, status.st_ino))

    def make_group(self, command: str) -> Optional['Group']:
        """A new group for the command with that spool folder; None where none can be made."""
        try:
            nest = self.nest(os.path.dirname(command))
            if not nest:
                return None
            folder = os.path.join(nest, group_name(command))
            with contextlib.suppress(FileExistsError):
                try:
                    os.mkdir(folder)
                except FileNotFoundError:
                    make_folder(nest)
                    os.mkdir(folder)
            if not all(os.path.exists(os.path.join(folder, name + '.max')) for name in self.controllers):
                hand_on(nest)
            return Group(folder)
        except OSError as error:
            log.debug('no control group for %s: %s', command, error)
            return None

    def sweep(self, spool: str, is_over: Callable[[str], bool]) -> None:
        """Removes what ended commands have left of groups, and empty nests of agents that are gone.

        is_over(name)       whether the command whose spool folder has that name has ended
        """
        try:
            own = self.nest(spool)
        except OSError:
            return
        if own:
            for group in children_of(own):
                if is_over(os.path.basename(group)[len('cmd-'):]):
                    Group(group).remove()
        self.tidy()

    def tidy(self) -> None:
        """Removes nests without groups; whoever needs one makes it anew."""
        for nest in children_of(self.folder) if self.folder else []:
            if os.path.basename(nest).startswith(NEST):
                with contextlib.suppress(OSError):
                    os.rmdir(nest)


def group_name(command: str) -> str:
    """The name of the group of the command with that spool folder: none that the kernel uses itself."""
    return 'cmd-' + os.path.basename(command)


def find_place(proc: str = '/proc/self') -> Place:
    """Where this process may make groups. Changes nothing."""
    path, mounted = own_path(proc), None
    if path is not None:
        mounted = folder_of(path, proc)
    if path is None or mounted is None:
        return Place('', 'no cgroup v2 is mounted here')
    place = judge(path, mounted)
    if place.folder and not os.access(place.folder, os.W_OK):
        return Place('', 'this user can\'t write to %s' % place.folder)
    return place


def judge(path: str, own: str) -> Place:
    """What may be done around the agent's own group, a path in the hierarchy and a folder."""
    above, is_leaf = os.path.dirname(own), os.path.basename(own) == LEAF
    if is_leaf:                # an agent that executed itself anew
        return Place(above, may_hand_on=is_alone(above, own))
    if not os.path.exists(os.path.join(own, 'cgroup.type')):
        # The root of all groups, which may have processes and controllers. Services have groups of their own
        # where there is a service manager.
        return Place(own, may_hand_on=is_alone(own))
    if is_delegated(above) and is_alone(above, own) and not words_of(above, 'cgroup.procs'):
        return Place(above, may_hand_on=True)           # systemd's DelegateSubgroup
    if is_delegated(own):
        # The controllers stay: systemd couldn't start the next agent in a group that hands them on while
        # commands of this one are left there.
        return Place(own)
    if path == '/':            # the root of a container
        is_ours = is_alone(own) and words_of(own, 'cgroup.procs') == [str(os.getpid())]
        return Place(own, may_hand_on=is_ours, leaf=os.path.join(own, LEAF) if is_ours else '')
    return Place('', 'the control group %s isn\'t this agent\'s own: let systemd delegate it (Delegate=yes, '
                 'DelegateSubgroup=agent)' % path)


def own_path(proc: str) -> Optional[str]:
    """The path of this process's group in the hierarchy; None where there is no cgroup v2."""
    with contextlib.suppress(OSError), open(os.path.join(proc, 'cgroup'), 'rb') as file:
        for line in file:
            if line.startswith(b'0::/'):
                return os.fsdecode(line[len(b'0::'):].rstrip(b'\n'))
    return None


def folder_of(path: str, proc: str) -> Optional[str]:
    """The folder of a group, wherever the hierarchy is mounted; None where that isn't, or without it."""
    for root, point in mounts(proc):
        inside = path if root == '/' else path[len(root):] if (path + '/').startswith(root + '/') else None
        if inside is not None:
            folder = os.path.normpath(os.path.join(point, inside.lstrip('/')))
            if os.path.exists(os.path.join(folder, 'cgroup.procs')):
                return folder
    return None


def mounts(proc: str) -> Iterator[Tuple[str, str]]:
    """What of the hierarchy is mounted, and where: see proc(5) on mountinfo."""
    with contextlib.suppress(OSError), open(os.path.join(proc, 'mountinfo'), 'rb') as file:
        for line in file:
            fields, _, kind = line.partition(b' - ')
            words = fields.split(b' ')
            if kind.startswith(b'cgroup2 ') and len(words) > 4:
                yield unescape(words[3]), unescape(words[4])


def unescape(word: bytes) -> str:
    """A path of mountinfo, where blanks and the like stand as \\040."""
    return os.fsdecode(re.sub(rb'\\([0-7]{3})', lambda found: bytes([int(found.group(1), 8) & 255]), word))


def is_delegated(folder: str) -> bool:
    """Whether systemd says that whoever runs there may divide the group."""
    for name in DELEGATED:
        with contextlib.suppress(OSError, AttributeError):
            if os.getxattr(folder, name) == b'1':
                return True
    return False


def is_alone(folder: str, own: str = '') -> bool:
    """Whether a group has no groups below but agents'."""
    return all(group == own or os.path.basename(group).startswith((NEST, '.control'))
               for group in children_of(folder))


# --- files of a group ------------------------------------------------------------------------

def make_folder(folder: str) -> None:
    """Raises OSError."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)


def children_of(folder: str) -> List[str]:
    """The groups within a group."""
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def hand_on(folder: str) -> None:
    """Has the groups within one be measured and limited, by as many controllers as there are."""
    for name in words_of(folder, 'cgroup.controllers', CONTROLLERS):
        write(folder, 'cgroup.subtree_control', '+' + name)


def read(folder: str, name: str) -> Optional[str]:
    """What a file of a group says; None where it has none, or can't say."""
    try:
        with open(os.path.join(folder, name), 'rb') as file:
            return file.read().decode('ascii', 'replace')
    except OSError:
        return None


def words_of(folder: str, name: str, known: Tuple[str, ...] = ()) -> List[str]:
    """The words of a file of a group; ``known``: only those among them."""
    return [word for word in (read(folder, name) or '').split() if not known or word in known]


def table_of(folder: str, name: str) -> Dict[str, int]:
    """A file of a group whose lines are a name and a number; {} where there is none."""
    lines = [line.split() for line in (read(folder, name) or '').splitlines()]
    return {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdigit()}


def write(folder: str, name: str, text: str) -> bool:
    """Writes to a file of a group; False where that can't be."""
    try:
        descriptor = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CLOEXEC)
        try:
            return os.write(descriptor, text.encode('ascii')) > 0
        finally:
            os.close(descriptor)
    except OSError as error:
        log.debug('%s/%s: %s', folder, name, error)
        return False


# --- a group ---------------------------------------------------------------------------------

class Group:
    """The group of one command, which may have made others within it. Only ``limit`` and ``open`` raise."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def limit(self, limits: Dict[str, Any]) -> None:
        """Sets those of LIMITS that are asked for. Raises OSError where one can't be."""
        for name in LIMITS:
            if name not in limits:
                continue
            value = limits[name]
            if name == 'cpus':
                done = write(self.folder, 'cpu.max', '%d %d' % (max(1000, value * CPU_PERIOD), CPU_PERIOD))
            else:
                done = write(self.folder, name + '.max', '%d' % value)
            if not done:
                raise no_limit(name)
        if 'memory' in limits:
            write(self.folder, 'memory.swap.max', '0')      # else it would be swapped out, for hours

    def open(self) -> int:
        """A descriptor of its folder, by which a process can be made within it. Raises OSError."""
        return os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def open_entrance(self) -> int:
        """A descriptor by which a process goes into it: whoever writes 0. Raises OSError."""
        return os.open(os.path.join(self.folder, 'cgroup.procs'), os.O_WRONLY | os.O_CLOEXEC)

    def holds(self, pid: int) -> bool:
        """Whether a process, or what is left of it until it is waited for, is in this group itself."""
        path = own_path('/proc/%d' % pid)
        return path is not None and os.path.basename(path.partition(' (deleted)')[0]) == \
            os.path.basename(self.folder)

    def _folders(self) -> Iterator[str]:
        """This group and those within it, the innermost first."""
        for folder, _, _ in os.walk(self.folder, topdown=False):
            yield folder

    def pids(self) -> List[int]:
        """Its processes."""
        return [int(word) for folder in self._folders() for word in words_of(folder, 'cgroup.procs')
                if word.isdigit() and word != '0']

    def is_populated(self) -> bool:
        """Whether it has living processes."""
        return table_of(self.folder, 'cgroup.events').get('populated', 0) > 0

    def kill(self) -> bool:
        """Ends all its processes, also those that are forked meanwhile; whether there were any."""
        if not self.is_populated():
            return False
        if not write(self.folder, 'cgroup.kill', '1'):      # before Linux 5.14
            write(self.folder, 'cgroup.freeze', '1')
            for pid in self.pids():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        write(self.folder, 'cgroup.freeze', '0')
        return True

    def cpu(self) -> Optional[Tuple[float, float]]:
        """Seconds that all its processes, living and dead, were busy in user and in system mode."""
        table = table_of(self.folder, 'cpu.stat')
        if 'user_usec' not in table or 'system_usec' not in table:
            return None
        return table['user_usec'] / 1000000, table['system_usec'] / 1000000

    def memory_peak(self) -> Optional[int]:
        """Bytes that it had at most: all processes together, with files that they read and wrote."""
        text = (read(self.folder, 'memory.peak') or '').strip()
        return int(text) if text.isdigit() else None

    def oom_kills(self) -> int:
        """How many of its processes the kernel has killed for want of memory, as far as is known."""
        return table_of(self.folder, 'memory.events').get('oom_kill', 0)

    def remove(self) -> bool:
        """Removes it, and those within it; False while processes are left there."""
        if self.is_populated():
            return False
        try:
            for folder in self._folders():
                os.rmdir(folder)
        except FileNotFoundError:
            return True
        except OSError as error:
            log.debug('%s: %s', self.folder, error)
            return False
        return True


def no_limit(name: str) -> OSError:
    """What a command fails with whose limit can't be kept."""
    return OSError(errno.EOPNOTSUPP, 'limits.%s needs a control group that this agent may limit (cgroup v2): '
                   'vmguest --check says what there is' % name)
