"""A BOINC task's slot: the folder in which the client starts it, and the memory through which both talk.

The client's application protocol as a program without libboinc speaks it: init_data.xml, logical names, the
lock, eight mailboxes of a kilobyte, the files that tell how a task ended. `Channels` is bytes in, messages
out: it takes any writable buffer.

What it is not: what the task does (boinclife.py), or the job file (boincjob.py). Imports nothing of ours.
Threads: one. No locks of threads; the lock of a slot is between processes.
"""

import contextlib
import json
import logging
import math
import mmap
import os
import re
import time
from typing import Any, Dict, List, Optional

import agent

log = logging.getLogger('vmboinc')

CHANNEL = 1024                 # bytes of a mailbox: a flag, then text that ends with NUL
CONTROL, GRAPHICS, HEARTBEAT, STATUS, TRICKLE_UP, TRICKLE_DOWN = 0, 3, 4, 5, 6, 7      # their numbers
CHANNELS = 8

LOCK_FILE = 'boinc_lockfile'
MEMORY_FILE = 'boinc_mmap_file'
FINISH_FILE = 'boinc_finish_called'
TEMPORARY_FILE = 'boinc_temporary_exit'
LINK = re.compile(r'<soft_link>(.*?)</soft_link>')
LINK_WITHIN = 512              # bytes at the begin of a file in which it may say that it is a link
LONGEST_LINE = 250             # characters of a message to the user
TAG = re.compile(r'<(?=[A-Za-z])')
MARKUP = re.compile(r'<(?=[/!?])|]](?=>)')     # what ends an element or a section of XML, or begins one


def without_markup(text: str) -> str:
    """A text for the client, that can't end what the client puts it into: it copies stderr.txt and reasons
    into its client_state.xml and its answers as they are, and a guest may have said it. With `</stderr_out>`
    there, it would forget all tasks of the project at its next start."""
    return MARKUP.sub(lambda found: found.group() + ' ', text)


def line_of(message: str, notice: bool) -> str:
    """A message as the one line of a file, of which a client reads a kilobyte at most. As a notice it is
    HTML: a guest that says it loads no image there, and shows no link."""
    line = without_markup(agent.printable(' '.join(message.split())))
    return (TAG.sub('< ', line) if notice else line)[:LONGEST_LINE]


class Channels:
    """The mailboxes in the memory that a client shares with its task.

    No queue and no lock: a sender writes where the flag is 0, text first; the receiver takes the text, then
    clears the flag.
    """

    def __init__(self, memory: Any) -> None:
        self._memory = memory

    def waits(self, channel: int) -> bool:
        """Whether a message is there that nobody has taken yet."""
        return bytes(self._memory[channel * CHANNEL:channel * CHANNEL + 1]) != b'\0'

    def receive(self, channel: int) -> str:
        """The message that waits, '' for none; its sender may put the next one there."""
        at = channel * CHANNEL
        if not self.waits(channel):
            return ''
        text = bytes(self._memory[at + 1:at + CHANNEL]).split(b'\0')[0].decode('utf-8', 'replace')
        self._memory[at:at + 1] = b'\0'
        return text

    def send(self, channel: int, text: str) -> bool:
        """Leaves a message. False, and nothing done, where the last one hasn't been read.

        Raises ValueError for one that doesn't fit.
        """
        at, message = channel * CHANNEL, text.encode('ascii', 'replace') + b'\0'
        if len(message) > CHANNEL - 1:
            raise ValueError('%d bytes don\'t fit into a channel' % len(message))
        if self.waits(channel):
            return False
        self._memory[at + 1:at + 1 + len(message)] = message
        self._memory[at:at + 1] = b'\1'
        return True


def words_of(message: str) -> List[str]:
    """The empty elements of a message, which are its words: <suspend/> is suspend."""
    return re.findall(r'<(\w+)/>', message)


class InitData:
    """init_data.xml. It is no XML that a parser takes, since paths and preferences stand in it as they are:
    tags are searched for; not within the project's preferences, which are the word of its site."""

    def __init__(self, text: str = '') -> None:
        # A project's own preferences may have any tags; they come before the client's.
        self._text = re.sub('<project_preferences>.*</project_preferences>', '', text, flags=re.DOTALL)

    @property
    def is_whole(self) -> bool:
        """Whether it is there to its end: a client that writes it anew empties it first."""
        return '</app_init_data>' in self._text

    def text(self, tag: str, default: str = '') -> str:
        """What a tag holds; the default where it is missing."""
        found = re.search(r'<%s>(.*?)</%s>' % (tag, tag), self._text, re.DOTALL)
        return found.group(1).strip() if found else default

    def number(self, tag: str, default: float = 0.0) -> float:
        """The same as a number; the default where it is none, or an endless one."""
        try:
            value = float(self.text(tag))
        except ValueError:
            return default
        return value if math.isfinite(value) else default

    @property
    def takes_memory(self) -> bool:
        """Whether the client takes a task's word for the memory that it needs."""
        return self.number('major_version') >= 8

    @property
    def minds_foreign_cpu(self) -> bool:
        """Whether the client halts its tasks while programs of others use the processor, and takes a VM's
        process for one: clients before 8.2, as long as their user has that preference."""
        version = self.number('major_version'), self.number('minor_version')
        return version < (8, 2) and self.number('suspend_cpu_usage') > 0


class SlotTaken(Exception):
    """Another process runs in this slot."""


class Slot:
    """The folder in which the client started this process. Without a client (a person tries a job out in a
    folder of its own) there is no shared memory, and nobody to watch."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.init = InitData()
        self._lock = None              # type: Any
        self.read_init()

    def path(self, name: str) -> str:
        """The path of a file in the slot."""
        return os.path.join(self.folder, name)

    def read_init(self) -> None:
        """Reads init_data.xml, at the start and when the client has changed it. Half of it is left."""
        with contextlib.suppress(OSError):
            with open(self.path('init_data.xml'), encoding='utf-8', errors='replace') as file:
                read = InitData(file.read())
            if read.is_whole or not self.init.is_whole:
                self.init = read

    @property
    def has_client(self) -> bool:
        """Whether a client started this."""
        return os.path.exists(self.path('init_data.xml'))

    @property
    def project_dir(self) -> str:
        """The project's folder, that all its tasks share."""
        return self.init.text('project_dir') or os.path.abspath(self.folder)

    @property
    def client_dir(self) -> str:
        """The client's own folder, where no task's files are; without a client, this one."""
        return self.init.text('boinc_dir') or ('' if self.has_client else os.path.abspath(self.folder))

    def resolve(self, logical: str) -> str:
        """The path of the file that a logical name stands for: where a link leads, or the file itself."""
        path, found = self.path(logical), None
        if os.path.isfile(path):        # a named pipe would wait for a writer
            with contextlib.suppress(OSError), open(path, 'rb') as file:
                found = LINK.search(file.read(LINK_WITHIN).decode('utf-8', 'replace'))
        if found:
            return os.path.abspath(os.path.join(self.folder, found.group(1)))
        return os.path.realpath(path)

    def is_within(self, path: str) -> bool:
        """Whether a path is in one of the task's folders: the slot, and the project's. Without a client, all
        paths are."""
        real = os.path.realpath(path)
        folders = [os.path.join(os.path.realpath(each), '') for each in (self.folder, self.project_dir)]
        return not self.has_client or real.startswith(tuple(folders))

    def names_in(self, folder: str) -> List[str]:
        """Logical names, with slashes, of all files in one of the slot's folders and those in it."""
        names = []
        for place, _, files in os.walk(self.path(folder)):
            names += [os.path.relpath(os.path.join(place, name), self.folder).replace(os.sep, '/')
                      for name in files]
        return sorted(names)

    # The lock.

    def lock(self) -> None:
        """Takes the slot. Raises SlotTaken, and OSError where nobody can."""
        self._lock = (_lock_windows if os.name == 'nt' else _lock_posix)(self.path(LOCK_FILE))

    def unlock(self) -> None:
        """Lets the slot go."""
        if self._lock is not None:
            if os.name == 'nt':                # which removes no file that is open
                self._lock.close()
            with contextlib.suppress(OSError):
                os.remove(self.path(LOCK_FILE))
            self._lock.close()                 # else the next one would lock it, and then it would go
            self._lock = None

    # The client.

    def memory(self) -> Any:
        """The memory that is shared with the client; some of our own where it offers none."""
        size = CHANNELS * CHANNEL
        if os.name == 'nt':
            import windows  # there alone
            name = 'shm_' + self.init.text('comm_obj_name')        # global where the client is a service
            shared = windows.shared_memory(('Global\\' + name, name), size)
            return bytearray(size) if shared is None else shared
        try:
            with open(self.path(MEMORY_FILE), 'r+b') as file:
                return mmap.mmap(file.fileno(), size)
        except (OSError, ValueError):
            return bytearray(size)

    # The end.

    def finish(self, code: int, message: str = '', notice: bool = False) -> None:
        """Tells the client that the task is over; with a message to the user, an alert where ``notice``."""
        message = line_of(message, notice)
        lines = ['%d' % code] + ([message] if message else []) + (['notice'] if message and notice else [])
        self._write(FINISH_FILE, lines)

    def finished(self) -> Optional[int]:
        """The code of a finish file that an earlier run left, which died before it could exit; else None."""
        try:
            with open(self.path(FINISH_FILE), encoding='utf-8', errors='replace') as file:
                return int(file.readline())
        except (OSError, ValueError):
            return None

    def exit_for_a_while(self, seconds: float, reason: str, notice: bool = False) -> None:
        """Asks the client to start the task again in a while, and to show why."""
        lines = ['%d' % seconds, line_of(reason, notice)] + (['notice'] if notice else [])
        self._write(TEMPORARY_FILE, lines)

    def _write(self, name: str, lines: List[str]) -> None:
        with open(self.path(name + '.new'), 'w', encoding='utf-8') as file:
            file.write('\n'.join(lines) + '\n')
        agent.replace(self.path(name + '.new'), self.path(name))


def _lock_posix(path: str) -> Any:
    import fcntl  # not on Windows
    file = open(path, 'w')
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
    except OSError as error:
        log.debug('%s', error)
    file.close()                       # another one's, or removed meanwhile by whose it was
    raise SlotTaken()


def _lock_windows(path: str) -> Any:
    """As libboinc does: the file is opened for this process alone."""
    import msvcrt  # Windows
    try:
        file = open(path, 'w')
    except PermissionError:            # as where libboinc has it: for that process alone
        raise SlotTaken()
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)      # type: ignore[attr-defined]
    except OSError:
        file.close()
        raise SlotTaken()
    return file


class Client:
    """What the wrapper hears of the client, and whether it is still there."""

    LOOK_EVERY = 2.0           # seconds between two looks for its process
    SILENCE = 30.0             # seconds without a heartbeat, where the client doesn't tell its pid

    def __init__(self, pid: int, watched: bool, now: float) -> None:
        self._pid = pid if 0 < pid < 1 << 31 else 0
        self._watched = watched
        self._looked = self._heard = now

    def hear(self, heartbeat: str, now: float) -> None:
        """Takes what came in the channel of heartbeats, '' for nothing."""
        if heartbeat:
            self._heard = now

    def is_gone(self, now: float) -> bool:
        """Whether it died, or was killed."""
        if not self._watched:
            return False
        if not self._pid:
            return now - self._heard > self.SILENCE
        if now - self._looked < self.LOOK_EVERY:
            return False
        self._looked = now
        return not agent.is_alive(self._pid)


def wait_for_lock(slot: Slot, patience: float) -> bool:
    """Takes the slot; waits so many seconds for an earlier wrapper, which notices that its client died.

    Raises OSError where nobody can take it.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            slot.lock()
            return True
        except SlotTaken:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)


class Record:
    """What the wrapper remembers over its own restarts: a file in the slot, which goes when the task goes.

    attempt     how often the science was begun anew
    before      CPU seconds of earlier attempts, as far as they count
    cpu         CPU seconds told last; never fewer are told
    checkpoint  CPU seconds at the last checkpoint
    elapsed     seconds in which it ran
    fraction    of it that was done at the last checkpoint
    put         whether the guest has its files
    emptied     whether the task's folder on a given machine was without any before
    taken       {logical name: the file's time and size} of trigger files that were acted upon
    machine     the one on which it runs, where all tasks share some
    digest      what names its commands: made anew for each slot, and it stays when that is moved
    folder      where the folder of its VM is, as far as the hypervisor knows
    made        whether there may be a machine, or a command, of this task
    collected   whether its outputs are where the client looks for them
    troubles    temporary exits in a row
    """
    FILE = 'vmboinc.json'

    def __init__(self, path: str, cpu: float = 0.0) -> None:
        self._path = path
        self.attempt, self.troubles = 1, 0
        self.before = self.cpu = self.checkpoint = cpu
        self.elapsed = self.fraction = 0.0
        self.put = self.made = self.collected = self.emptied = False
        self.taken: Dict[str, str] = {}
        self.machine = self.digest = self.folder = ''
        with contextlib.suppress(OSError):                     # there is none yet
            with open(path, encoding='utf-8', errors='replace') as file:
                self._read(file.read())

    def _read(self, text: str) -> None:
        """Takes what is sound. A damaged one doesn't tell that there is no machine: there may be."""
        try:
            for name, value in json.loads(text).items():
                if type(value) is type(getattr(self, name, None)):
                    setattr(self, name, value)
        except (ValueError, AttributeError):
            self.made = True

    def save(self) -> None:
        """Writes it; who reads it sees the old text or the new one. Raises OSError."""
        values = {name: value for name, value in vars(self).items() if not name.startswith('_')}
        with open(self._path + '.new', 'w', encoding='utf-8') as file:
            json.dump(values, file)
            file.flush()
            agent.sync_descriptor(file.fileno())       # after a power cut it says where the machine goes on
        agent.replace(self._path + '.new', self._path)
