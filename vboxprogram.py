"""The program VBoxManage: finding it, running it, reading what it prints.

VirtualBox's own tool, of which vboxmanage.py makes a driver. It prints for programs (`--machinereadable`);
errors come as lines of their own, with VirtualBox's status code; and how far it is, in percent.

What it is not: it knows no verb of a driver. No threads. One lock, of a file that all processes of this
user's share: who looks at a VM takes turns (`in_turn`).
"""

import contextlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from faults import DeadlineExceeded, HypervisorError
from hypervisor import NOT_READY, Job
from vboxconnection import STALL

log = logging.getLogger('vmhost.virtualbox')
STATES = (                         # the API's names, in the order of its codes
    'Null', 'PoweredOff', 'Saved', 'Teleported', 'Aborted', 'AbortedSaved', 'Running', 'Paused', 'Stuck',
    'Teleporting', 'LiveSnapshotting', 'Starting', 'Stopping', 'Saving', 'Restoring', 'TeleportingPausedVM',
    'TeleportingIn', 'DeletingSnapshotOnline', 'DeletingSnapshotPaused', 'OnlineSnapshotting',
    'RestoringSnapshot', 'DeletingSnapshot', 'SettingUp', 'Snapshotting')
NATIVE = dict({name.lower(): name for name in STATES}, **{      # VBoxManage's word: the API's
    'poweroff': 'PoweredOff', 'aborted-saved': 'AbortedSaved', 'gurumeditation': 'Stuck',
    'deletingsnapshotlive': 'DeletingSnapshotOnline', 'deletingsnapshotlivepaused': 'DeletingSnapshotPaused'})
NO_SERVER = 'Failed to create the VirtualBox object'
LEAST_TRIES = 3                # of what passes, however long each takes on a busy machine
PASSING = {                        # what VirtualBox says for a moment: how many seconds it is asked again
    'not ready': NOT_READY,        # it is still making the object, or ending it
    'lock request pending': NOT_READY,      # another VBoxManage, such as one that looks at the VM, is quicker
    'Failed to assign the machine to the session': NOT_READY,       # a session of another one just ends
    'The session is not locked': NOT_READY,     # its server took it away meanwhile: nothing was changed
    'was unlocked unexpectedly while attempting to share': NOT_READY,       # the same, a moment later
    NO_SERVER: 10}       # its server just ends, as it does while nobody asks
UNREADABLE = 'VERR_(EOF|VD|NOT_SUPPORTED)'     # its words for a disk that is cut, damaged, or unknown
OPENS_IN = 60                  # seconds until it is left to VirtualBox's server
LOOKS = 'list', 'showvminfo', 'showmediuminfo', 'getextradata'      # what changes nothing
VMS = 2 ** 30                  # bytes that stand for VMs
LONGEST_TURN = 3.0             # seconds that who looks at a VM waits for another one that does
CRASHED = r'VBoxManage ended with (-|\d{9})'        # seen with 7.2, where a VM comes or goes in that moment
INFO_LINE = re.compile(
    r'^(?:(?P<named>SnapshotName(?P<place>(?:-\d+)*))="(?P<name>.*?)"'
    r'(?=\r?\nSnapshotUUID(?P=place)="[^"\n]+"\r?$)|'
    r'(\w*Snapshot\w+(?:-\d+)*)="(.*?)"|("?[^="\n]+"?)=(?:"((?:[^"\\]|\\.)*)"|([^"\n]*)))$',
    re.MULTILINE | re.DOTALL)


class Refused(Exception):
    """VBoxManage said no. Stays in the driver's process, whose `translate` makes one of our errors of it.

    code    VirtualBox's status code, 0 where VBoxManage told none
    told    what it printed nevertheless
    """

    def __init__(self, text: str, code: int, told: str = '') -> None:
        super().__init__(text)
        self.code = code
        self.told = told


class Program:
    """The program VBoxManage.

    rest        a driver's: called again and again while it runs
    """

    def __init__(self, timeout: float) -> None:
        self.path = find_program()
        self.rest = lambda moved: None  # type: Any
        self._timeout = timeout
        self._looking = []  # type: List[Tuple[Optional[str], Any]]      # of what runs: (looked_at, process)
        # In UTF-8, so that no name is lost; and English, which is what `translate` knows.
        self._environment = dict(os.environ) if sys.platform == 'win32' else dict(
            os.environ, LC_ALL='en_US.UTF-8' if sys.platform == 'darwin' else 'C.UTF-8')

    def run(self, *words: str, job: Optional[Job] = None, text: str = '', patience: float = 0,
            secret: bool = False) -> str:
        """What it prints; asked again where VirtualBox says one of PASSING. Raises Refused, and
        DeadlineExceeded where it makes no progress for `patience` seconds; it is ended then. job, text: whom
        to tell how far it is, of something long. secret: nobody sees the words in the list of processes."""
        refused = 0.0                  # when it was for the first time, which itself may take long
        tries = 0
        while True:
            tries += 1
            try:
                self._let_end(words)
                with in_turn(words, self.rest):
                    return self._run_once(words, job, text, patience, secret)
            except Refused as error:
                if refused and was_attached(words, str(error)):
                    return ''
                passes_in = max([PASSING[word] for word in PASSING if word in str(error)] or [0.0])
                if words[0] in LOOKS and re.search(CRASHED, str(error)):
                    passes_in = NOT_READY
                refused = refused or time.monotonic()
                if not passes_in or tries >= LEAST_TRIES and time.monotonic() - refused > passes_in:
                    raise
            time.sleep(0.1)

    def _let_end(self, words: Sequence[str]) -> None:
        """What this process itself asked before, and somebody else's question came in between: no lock keeps
        it waiting, and nobody else is served meanwhile."""
        vm, until = looked_at(words), time.monotonic() + LONGEST_TURN
        before = [process for other, process in self._looking if other == vm or '' in (vm, other)]
        while vm is not None and time.monotonic() < until and any(each.poll() is None for each in before):
            time.sleep(0.02)

    def _run_once(self, words: Sequence[str], job: Optional[Job], text: str, patience: float,
                  secret: bool) -> str:
        with tempfile.TemporaryDirectory(prefix='vmhost-') as folder:
            told = [hide(folder, words)] if secret else list(words)
            out, errors = os.path.join(folder, 'out'), os.path.join(folder, 'errors')
            # Files, not pipes: VBoxSVC, which it starts, inherits them, and would hold a pipe open.
            with open(out, 'wb') as stdout, open(errors, 'wb') as stderr:
                process = subprocess.Popen(
                    [self.path] + told, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                    env=self._environment, creationflags=getattr(subprocess, 'CREATE_NO_WINDOW', 0))
            looking = looked_at(words), process
            self._looking.append(looking)
            try:
                self._wait(process, errors, job, text, patience or (STALL if text else self._timeout))
            finally:
                self._looking.remove(looking)
                if process.poll() is None:
                    process.kill()
                    process.wait()
            return answer_of(process.returncode, content_of(out), content_of(errors))

    def _wait(self, process: Any, errors: str, job: Optional[Job], text: str, patience: float) -> None:
        percent, changed = -1, time.monotonic()
        while True:
            try:
                process.wait(0.05)
                self.rest(True)
                return
            except subprocess.TimeoutExpired:
                now = percent_in(content_of(errors)) if text else -1
            self.rest(False)
            if now != percent:
                percent, changed = now, time.monotonic()
            if job is not None and text:
                job.report(max(0, percent), text)
            if time.monotonic() - changed > patience:
                raise DeadlineExceeded('VBoxManage did not answer for %d s' % patience)


# --- plain helpers -----------------------------------------------------------------------------

@contextlib.contextmanager
def in_turn(words: Sequence[str], rest: Callable[[bool], None]) -> Iterator[None]:
    """Seen with 7.2: where two look at one VM that is off, VirtualBox's server dies, and with it each VM that
    runs: the first one's session ends while the other reads its controllers. So they do it one after the
    other. One that takes its time looks at a VM that runs, and hangs: it isn't waited for, as there two may.
    """
    vm, until = looked_at(words), time.monotonic() + LONGEST_TURN
    file = None if vm is None else open_turns()
    try:
        while file is not None and not take_turn(file, vm or '') and time.monotonic() < until:
            rest(False)
            time.sleep(0.02)
        yield
    finally:
        if file is not None:
            os.close(file)             # which ends the turn


def looked_at(words: Sequence[str]) -> Optional[str]:
    """The VM that these words of VBoxManage look at, '' for all of them, None for none."""
    if words[0] == 'showvminfo':
        return words[1]
    return '' if words[0] == 'list' and '--long' in words else None


def open_turns() -> Optional[int]:
    """An empty file of this user's; None where there can be none."""
    path = os.path.join(tempfile.gettempdir(), 'vmhost-looks-%s' % getattr(os, 'getuid', str)())
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0), 0o600)
    except OSError as error:
        log.debug('who looks at a VM takes no turns: %s', error)
        return None


def take_turn(file: int, vm: str) -> bool:
    """Locks the byte that stands for a VM, by its uuid; all of them for ''. None has to be there."""
    os.lseek(file, zlib.crc32(vm.encode()) % VMS if vm else 0, os.SEEK_SET)
    length = 1 if vm else VMS
    try:
        if sys.platform == 'win32':
            import msvcrt
            msvcrt.locking(file, msvcrt.LK_NBLCK, length)
        else:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, 0, os.SEEK_CUR)
    except OSError:
        return False
    return True


def find_program() -> str:
    """The path of VBoxManage. Raises HypervisorError."""
    if sys.platform == 'win32':        # never the working folder, where shutil.which looks first
        folders = [os.environ.get(name, '') for name in ('VBOX_MSI_INSTALL_PATH', 'VBOX_INSTALL_PATH')]
        folders += [os.path.join(os.environ.get('ProgramFiles', 'C:\\Program Files'), 'Oracle', 'VirtualBox')]
        places = [os.path.join(folder, 'VBoxManage.exe') for folder in folders if folder]
    else:
        places = [shutil.which('VBoxManage') or '', '/usr/local/bin/VBoxManage', '/usr/bin/VBoxManage',
                  '/Applications/VirtualBox.app/Contents/MacOS/VBoxManage']
    for path in places:
        if path and os.path.isfile(path):
            return path
    raise HypervisorError('there is no program VBoxManage: install VirtualBox')


def was_attached(words: Sequence[str], told: str) -> bool:
    """Whether a disk is attached already, to the VM that it was to be attached to: so the refusal before this
    one came too late."""
    return words[0] == 'storageattach' and \
        'already associated with the current state of machine uuid {%s}' % words[1] in told


def hide(folder: str, words: Sequence[str]) -> str:
    """What makes VBoxManage read these words from a file in a folder that nobody else can read."""
    path = os.path.join(folder, 'words')
    with open(path, 'w', encoding='utf-8') as file:
        file.write(' '.join(shlex.quote(word) for word in words))
    return '@' + path


def check_opens(image: str) -> None:
    """Has a process of its own open a disk before VirtualBox's server does: that one can die of what is
    damaged, and all VMs with it (seen with 7.2). Raises HypervisorError where it can't be opened for what is
    in it; tells nothing where that can't be found out."""
    try:
        Program(OPENS_IN).run('internalcommands', 'dumphdinfo', os.path.abspath(image))
    except Refused as error:
        if re.search(UNREADABLE + '|' + CRASHED, str(error)):
            raise HypervisorError('%s is cut or damaged, or a disk that VirtualBox can\'t read (%s)' % (
                image, error))
        log.debug('%s: %s', image, error)
    except (DeadlineExceeded, HypervisorError) as error:
        log.debug('%s is not looked at: %s', image, error)


def content_of(path: str) -> str:
    """All that is in a file, so far."""
    with open(path, encoding='utf-8', errors='replace') as file:
        return file.read()


def answer_of(code: int, out: str, errors: str) -> str:
    """What VBoxManage printed. Raises Refused; some of its errors come with an exit code of 0."""
    lines = re.findall(r'^VBoxManage(?:\.exe)?: error: (.*)$', errors, re.MULTILINE)
    if not lines and not code:
        return out
    status = re.search(r'Details: code \S+ \(0x([0-9a-f]{8})\)', errors)
    texts = [line for line in lines if not line.startswith(('Details: ', 'Context: '))]
    raise Refused('; '.join(texts) or errors.strip()[-1000:] or 'VBoxManage ended with %d' % code,
                  int(status.group(1), 16) if status is not None else 0, out)


def percent_in(text: str) -> int:
    """The last of 0%...10%...; -1 where there is none yet."""
    found = re.findall(r'(\d+)%', text[-200:])
    return int(found[-1]) if found else -1


def read_info(text: str) -> Dict[str, str]:
    """{key: value} of `showvminfo --machinereadable`.

    Within a value, a quote has a backslash before it, but not where snapshots are told, which come last: so
    the first value of a key holds, and no text that somebody gave a VM can say what VirtualBox doesn't. Of
    what a snapshot's text says of others the last holds, which VirtualBox tells itself.
    """
    info = {}  # type: Dict[str, str]
    for found in INFO_LINE.finditer(text):
        snapshot, raw, key, quoted, plain = found.groups()[3:]
        snapshot, raw = (snapshot, raw) if snapshot else (found.group('named'), found.group('name'))
        value = raw if snapshot else re.sub(r'\\(["\\])', r'\1', quoted or '') or plain or ''
        if snapshot:
            info[snapshot] = value
        else:
            info.setdefault(key.strip('"'), value)
    return info


def native_of(info: Dict[str, str]) -> str:
    """The state, as the API calls it."""
    return NATIVE.get(info['VMState'], 'Unknown')


def slots_of(info: Dict[str, str], *kinds: str) -> List[int]:
    """The slots, from 1, of the network cards in use, or of those of some kinds."""
    cards = [(slot, info.get('nic%d' % slot, 'none')) for slot in range(1, 9)]
    return [slot for slot, kind in cards if kind != 'none' and (not kinds or kind in kinds)]


def attached_in(info: Dict[str, str]) -> List[Tuple[str, str, str, str, str]]:
    """(controller, port, device, path, uuid) of what lies in the VM's drives."""
    places = [re.match(r'(.+)-ImageUUID-(\d+)-(\d+)$', key) for key in info]
    return [(place.group(1), place.group(2), place.group(3), info['%s-%s-%s' % place.groups()],
             info[place.group(0)]) for place in places if place is not None]


def disk_path(info: Dict[str, str]) -> str:
    """Of the disk that a VM is made with."""
    return os.path.splitext(info['CfgFile'])[0] + '.vdi'


def read_snapshots(info: Dict[str, str]) -> List[Dict[str, Any]]:
    """As Driver.snapshots; VBoxManage doesn't tell when one was taken, nor whether the VM ran.

    Names and descriptions come as they are, quotes and ends of lines, too: a description may look like
    another snapshot. Where the settings can be read, they tell what is one.
    """
    rows = []
    known = re.findall(r'<Snapshot\b[^>]*\suuid="{(.+?)}"', content_of(info['CfgFile'])) \
        if os.access(info.get('CfgFile', ''), os.R_OK) else None
    for key, name in info.items():
        if re.match(r'SnapshotName(-\d+)*$', key):
            place = key[len('SnapshotName'):]
            parent = info.get('SnapshotName' + place.rpartition('-')[0], '') if place else ''
            uuid = info.get('SnapshotUUID' + place, '')
            if not uuid or (known is not None and uuid not in known):
                continue
            rows.append({'name': name, 'id': uuid, 'parent': parent, 'depth': place.count('-'),
                         'desc': info.get('SnapshotDescription' + place, ''), 'taken': 0, 'online': False,
                         'current': uuid == info.get('CurrentSnapshotUUID')})
    return rows


def log_in(info: Dict[str, str]) -> str:
    """The path of a VM's log."""
    return os.path.join(info['LogFldr'], 'VBox.log')


def rules_in(info: Dict[str, str]) -> List[List[str]]:
    """A VM's rules of NAT, as vboxnetwork has them."""
    rules = [value.split(',') for key, value in info.items() if key.startswith('Forwarding(')]
    return [rule for rule in rules if len(rule) == 6]       # another tool may give them names of any kind


def stamp_of(path: str) -> Optional[Tuple[int, int]]:
    """What changes with a file; None where there is none."""
    try:
        status = os.stat(path)
        return status.st_mtime_ns, status.st_size
    except OSError:
        return None
