"""The verbs for files and folders: to VMs, and from them, with the habits of ``cp -r``.

What it is not: what moves them: the host agent does (hosttransfers.py). No threads; no lock but that of a
folder for what comes through a pipe, by which it is seen to be in use.
"""

import base64
import contextlib
import errno
import fnmatch
import os
import posixpath
import re
import select
import signal
import sys
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import agent
import localnames
from cliscreen import PROGRESS_EVERY, WIDE, Screen, input_is_closed, shown_size, shown_span, shown_time
from cliverbs import JSON, VM, VMS, Verb, argument, for_each, read_count, show_list, switch
from faults import InvalidParams, VMHostError
from hostclient import Client, NoHost
from rpc import carried

ENDED_SHOWN = 20               # transfers that have ended, unless more are asked for
WAIT_TOLD = 2.0                # seconds that a transfer waits for a VM before that is said
FIRST_LOOK = 0.005             # seconds until a transfer is looked at again: a small file is there by then
TOLD = 3                       # failures that are told one by one on the screen
GLOB = re.compile(r'[*?\[]')
STREAMS = {'/dev/stdin': 0, '/dev/stdout': 1, '/dev/stderr': 2}
DESCRIPTOR = re.compile(r'/(?:dev|proc/self)/fd/([0-9]{1,9})$')


class Ended(SystemExit):
    """A signal ended us."""


@contextlib.contextmanager
def heeding_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Ended meanwhile, so that a transfer ends with who asked for it; nohup's way to
    ignore one stays."""
    def leave(number: int, frame: Any) -> None:
        raise Ended(128 + number)
    numbers = [getattr(signal, name) for name in ('SIGTERM', 'SIGHUP') if hasattr(signal, name)]
    before = {number: signal.signal(number, leave) for number in numbers
              if signal.getsignal(number) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def do_put(host: Client, screen: Screen, args: Any) -> int:
    """Sends a file or folder to VMs; of -, what standard input has."""
    check_target(args)
    descriptor = own_descriptor('/dev/stdin' if args.source == '-' else args.source)
    if descriptor is None:
        return put(host, screen, args, here(args.source))
    if not args.target:
        raise VMHostError('name the target: what comes from %s has no name of its own' % args.source)
    if descriptor == 0 and input_is_closed():
        raise VMHostError('%s: standard input is closed' % args.source)
    with heeding_signals(), own_folder() as folder:
        name = 'stdin' if args.source == '-' else os.path.basename(args.source)
        source = os.path.join(folder, name)
        keep_input(descriptor, source, args.source)
        return put(host, screen, args, source)


FOLDER = 'vmhost-pipe-'        # begins the names of folders for what goes through a pipe
NEW = 60.0                     # seconds in which one may have nobody's lock yet


@contextlib.contextmanager
def own_folder() -> Iterator[str]:
    """A folder of our own for a moment; those of earlier ones that were killed are taken away."""
    import tempfile  # needed here alone
    if os.name == 'posix':
        sweep(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix=FOLDER) as folder, contextlib.ExitStack() as stack:
        if os.name == 'posix':
            stack.callback(os.close, lock(folder))
        yield folder


def lock(folder: str) -> int:
    """A descriptor that tells others that the folder is somebody's, while that lives. Raises OSError where
    it is already."""
    import fcntl  # POSIX alone
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def sweep(place: str) -> None:
    """Takes away folders that were this user's, and are nobody's any more."""
    import glob  # needed here alone
    import shutil
    for folder in glob.glob(os.path.join(glob.escape(place), FOLDER + '*')):
        with contextlib.suppress(OSError):     # another's, or in use
            status = os.lstat(folder)
            if status.st_uid == os.geteuid() and time.time() - status.st_mtime > NEW \
                    and len(os.listdir(folder)) <= 1:
                descriptor = lock(folder)
                shutil.rmtree(folder, ignore_errors=True)
                os.close(descriptor)


def keep_input(descriptor: int, path: str, name: str) -> None:
    """Writes what a descriptor has into a new file, to its end: the host agent sends files alone, whose
    content it can read again to verify it. Raises VMHostError."""
    if sys.platform == 'win32':
        import msvcrt
        msvcrt.setmode(descriptor, os.O_BINARY)
    try:
        with open(path, 'wb') as file:
            for data in iter(lambda: os.read(descriptor, 1 << 20), b''):
                file.write(data)
    except OSError as error:
        full = ' in %s' % os.path.dirname(path) if error.errno == errno.ENOSPC else ''
        raise VMHostError('%s: %s%s' % (name, error.strerror, full))


def check_target(args: Any) -> None:
    """Raises VMHostError for a target that was given and is empty, as a shell's variable may be."""
    if args.target == '':
        raise VMHostError('DST is empty: name it, or leave it out')
    args.target = args.target or ''


def put(host: Client, screen: Screen, args: Any, source: str) -> int:
    """Sends what the host agent can read under that path."""
    target = args.target
    if not target:
        source = os.path.abspath(source)
        # A folder goes into what the VM serves, as by cp -r: one of its name there takes in what it holds.
        target = '' if os.path.isdir(source) else os.path.basename(source)
    codes = []

    def send(vm: str) -> None:
        codes.append(transfer(host, screen, args, 'put', vm, source, target))
    return max([for_each(screen, host.matching_known(args.vm), send)] + codes)


def do_get(host: Client, screen: Screen, args: Any) -> int:
    """Fetches files and folders from a VM."""
    check_target(args)
    descriptor = own_descriptor('/dev/stdout' if args.target == '-' else args.target)
    sources = matching(host, args.vm, args.source)
    if descriptor is not None:
        if args.json and descriptor == 1:
            raise InvalidParams('standard output gets the file: --json goes with a DST that is a file')
        return max([stream(host, screen, args, source, descriptor) for source in sources])
    target = here(args.target) if args.target else ''
    if len(sources) > 1 and target and not os.path.isdir(target):
        raise VMHostError('%s is not a folder, and %d files match' % (args.target, len(sources)))
    folds = localnames.folding(target or agent.current_folder()) if len(sources) > 1 else None
    names = localnames.Names(folds)
    return max([fetch(host, screen, args, source, target, names) for source in sources])


def fetch(host: Client, screen: Screen, args: Any, source: str, target: str, names: localnames.Names) -> int:
    """Fetches one of a VM's files or folders; gives the exit code. names: those that came before."""
    name = posixpath.basename(source.rstrip('/'))
    if not target and name in ('', '.', '..'):
        raise VMHostError('name the target: %s has no name of its own' % (source or "''"))
    try:
        if not target or os.path.isdir(target):
            localnames.check(name)
            names.add(name)
    except OSError as error:
        screen.complain('%s: %s: %s' % (args.vm, source, error.strerror))
        return 1
    return transfer(host, screen, args, 'get', args.vm, source, target or here('.'))


def do_cp(host: Client, screen: Screen, args: Any) -> int:
    """Copies a file or folder to a VM, or from one: VM:PATH says where it is, or is to be."""
    (there, source), (back, target) = vm_and_path(args.source), vm_and_path(args.target)
    if bool(there) == bool(back):
        raise VMHostError('one of the two should be VM:PATH, the other one a path of this machine%s' % (
            ': a single letter is a drive; put and get take such a VM' if os.name == 'nt' else
            ', as ./%s is' % args.source if there and os.path.lexists(args.source) else ''))
    args.vm, args.source, args.target = there or back, source, target or (None if back else '')
    return do_put(host, screen, args) if back else do_get(host, screen, args)


def vm_and_path(text: str) -> List[str]:
    """[VM, path]; VM is '' for a path of this machine: one with a slash before the colon, or with a drive."""
    found = re.match(r'([^/:]+(?::[0-9A-Fa-f]{2}){5}|[^/:]+):(.*)$', text, re.DOTALL)
    if found is None or os.name == 'nt' and len(found.group(1)) == 1:
        return ['', text]
    return [found.group(1), found.group(2)]


def here(path: str) -> str:
    """A path of this machine for the host agent, whose working directory is not ours; ends as it did.

    Raises VMHostError for an empty one: joined, it would be the whole working directory; AgentError where
    that is gone.
    """
    if not path:
        raise VMHostError('a path is empty: name a file or folder (. is the one you are in)')
    return os.path.join(agent.current_folder(), localnames.native(path))


def own_descriptor(path: str) -> Optional[int]:
    """The descriptor of this process that a path means, as /dev/stdout, or of the shell's >(); else None."""
    found = DESCRIPTOR.match(path)
    return int(found.group(1)) if found else STREAMS.get(path)


def matching(host: Client, vm: str, source: str) -> List[str]:
    """The paths of a VM that a pattern means; a path that is none, itself."""
    folder, name = posixpath.split(source)
    if not GLOB.search(name):
        return [source]
    listed = host.call('listDir', vm, carried(folder or '/'))
    names = [base64.b64decode(entry['name64']).decode('utf-8', 'surrogateescape') if 'name64' in entry
             else entry['name'] for entry in listed]
    found = [each for each in sorted(names) if each == name or fnmatch.fnmatchcase(each, name)
             and (name.startswith('.') or not each.startswith('.'))]
    if not found:
        raise VMHostError('%s: no file of that name, and none that matches' % source)
    return [posixpath.join(folder, each) for each in found]


def stream(host: Client, screen: Screen, args: Any, source: str, descriptor: int) -> int:
    """Fetches a file to a descriptor of ours, as standard output: the host agent writes it into a FIFO."""
    if not hasattr(os, 'mkfifo'):
        raise VMHostError('this system has no FIFO: name a file instead of -')

    def write(data: bytes) -> None:
        try:
            while data:
                data = data[os.write(descriptor, data):]
        except OSError as error:
            raise VMHostError('%s: %s' % (args.target, error.strerror))
    out = screen.write if descriptor == 1 else write
    with heeding_signals(), own_folder() as folder, contextlib.ExitStack() as stack:
        path = os.path.join(folder, 'stream')
        os.mkfifo(path, 0o600)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        stack.callback(os.close, fd)
        moving = host.call('startTransfer', 'get', args.vm, carried(source), path)
        try:
            while True:
                now = host.call('getTransfer', moving)
                if not copy_on(fd, out) and now['state'] not in ('waiting', 'running'):
                    return tell_end(screen, args, args.vm, now)
        except BaseException:
            host.call('cancelTransfer', moving)
            raise


def copy_on(fd: int, write: Callable[[bytes], None]) -> bool:
    """Writes what a FIFO has, once it has something; whether that was so."""
    select.select([fd], [], [], PROGRESS_EVERY)
    copied = False
    while True:
        try:
            data = os.read(fd, 1 << 20)
        except BlockingIOError:
            return copied
        if not data:
            if not copied:
                time.sleep(PROGRESS_EVERY / 10)        # nobody writes, yet or any more: select doesn't wait
            return copied
        write(data)
        copied = True


def transfer(host: Client, screen: Screen, args: Any, direction: str, vm: str, source: str,
             target: str) -> int:
    """Moves a file or folder, verified; a terminal shows how far it is. Ctrl-C cancels it, as SIGTERM and
    SIGHUP do."""
    with heeding_signals():
        moving = host.call('startTransfer', direction, vm, carried(source), carried(target),
                           {'links': args.links, 'parents': False})
        now = {'bytes': 0, 'total': 0}
        waits, pause = Waiting(screen, vm), FIRST_LOOK
        try:
            while True:
                now = host.call('getTransfer', moving)
                if now['state'] not in ('waiting', 'running'):
                    break
                waits.see(now['error'])
                screen.progress('%s: %s' % (agent.printable(vm), transfer_line(now)))
                time.sleep(pause)
                pause = min(2 * pause, PROGRESS_EVERY)
        except (KeyboardInterrupt, Ended):
            if host.call('cancelTransfer', moving):
                now = host.call('getTransfer', moving)
                screen.complain('%s: cancelled at %s of %s; the same again goes on from there' % (
                    vm, shown_size(now['bytes']), shown_size(now['total'])))
            raise
        except NoHost:
            screen.complain('%s: the host agent ended while the transfer went on; once it is back, the same '
                            'again goes on from where it was' % vm)
            raise
        finally:
            screen.progress('')
    return tell_end(screen, args, vm, now)


class Waiting:
    """Says that a transfer waits, and what for, once it has done so for a while."""

    def __init__(self, screen: Screen, vm: str) -> None:
        self._screen = screen
        self._vm = vm
        self._since = self._said = 0.0

    def see(self, why: str) -> None:
        """What it waits for now; '': nothing."""
        now = time.monotonic()
        self._since = (self._since or now) if why else 0.0
        if why and now - self._since >= WAIT_TOLD and self._said != self._since:
            self._said = self._since
            self._screen.complain('%s: %s; it goes on once it can (Ctrl-C ends it)' % (
                self._vm, why))


def tell_end(screen: Screen, args: Any, vm: str, now: Dict[str, Any]) -> int:
    """Says how a transfer ended; gives the exit code."""
    if args.json:
        screen.json(now)
    elif now['state'] != 'done':
        failures = now.get('failures', ())
        for failure in failures[:TOLD]:
            screen.complain('%s: %s: %s' % (vm, failure['path'], failure['reason']))
        if len(failures) > TOLD:
            screen.complain('%s: and %d more; --json tells all' % (vm, len(failures) - TOLD))
        elif not failures:
            screen.complain('%s: %s' % (vm, now['error'] or now['state']))
    if not args.json:
        tell_unkept(screen, vm, now.get('unkept', ()))
    return 0 if now['state'] == 'done' else 1


def tell_unkept(screen: Screen, vm: str, unkept: Sequence[Dict[str, str]]) -> None:
    """Says how many came without their mode or time; their content is there, so that is no failure."""
    if unkept:
        more = len(unkept) - 1
        screen.complain('%s: %s came without %s%s: the disk there doesn\'t keep that' % (
            vm, unkept[0]['path'], unkept[0]['what'],
            ', and %d more without theirs (--json tells all)' % more if more else ''))


def transfer_line(now: Dict[str, Any]) -> str:
    """Bytes, rate and time left of a transfer."""
    if now.get('state') == 'waiting' and not now['total']:
        return 'waits for its turn'
    if not now['total'] and not now['bytes']:
        return 'begins'
    line = '%s of %s, %s/s' % (shown_size(now['bytes']), shown_size(now['total']), shown_size(now['rate']))
    if now['rate'] and now['total']:
        line += ', %s left' % shown_span((now['total'] - now['bytes']) / now['rate'])
    return line


def do_transfers(host: Client, screen: Screen, args: Any) -> int:
    """Files on their way: all transfers under way, and the last that ended."""
    found = host.call('getVM', args.vm) if args.vm else {}
    of_vm = {'vm': found['id'] or found['name']} if found else {}
    rows = host.call('listTransfers', dict(of_vm, finished=True, limit=args.number))
    rows += host.call('listTransfers', dict(of_vm, finished=False))
    if args.json or args.quiet:
        return show_list(screen, args.json, [row['id'] for row in rows], rows)
    is_narrow = 0 < screen.width < WIDE
    screen.table(['ID', 'VM', 'STATE', 'SUBMITTED', 'MOVED', 'RATE', 'FILE'],
                 [transfer_row(row, is_narrow) for row in rows],
                 ['SUBMITTED', 'RATE', 'VM', 'MOVED', 'FILE', 'STATE'], ['VM', 'FILE'])
    return 0


def transfer_row(row: Dict[str, Any], is_narrow: bool) -> List[str]:
    """A line of `transfers`."""
    moved = shown_size(row['bytes'])
    if row['total'] > row['bytes']:
        moved += ' of ' + shown_size(row['total'])
    there = '%s:%s' % (row['vm'], row['target'] if row['direction'] == 'put' else row['source'])
    ways = [row['source'], there] if row['direction'] == 'put' else [there, row['target']]
    return [row['id'], row['vm'], row['state'], shown_time(row['submitted'], is_narrow), moved,
            shown_size(row['rate']) + '/s', ' to '.join(ways) + (': ' + row['error'] if row['error'] else '')]


AS_CP = switch('-r', '-R', '-a', '-p', '--recursive',
               help='as for cp and scp; folders, modes and times are copied without it, too')
LINKS = argument('--links', choices=('keep', 'skip', 'follow'), default='keep',
                 help='symbolic links in a folder: the same there, left out, or what they lead to')
VERBS = [
    Verb('transfers', do_transfers, 'list transfers of files: those under way, and the last that ended', [
        argument('vm', metavar='VM', nargs='?', help='only those of this VM'), JSON,
        switch('-q', '--quiet', help='their ids alone, as `kill` takes them to cancel one'),
        argument('-n', '--number', metavar='N', type=read_count, default=ENDED_SHOWN,
                 help='how many ended ones (default: %d)' % ENDED_SHOWN)], ('transfers web1', 'kill ID')),
    Verb('put', do_put, 'copy a file or folder to a VM', [
        VMS, argument('source', metavar='SRC', help='on this machine; -: standard input'),
        argument('target', metavar='DST', nargs='?',
                 help='in the VM; default: under its name where commands start'),
        AS_CP, LINKS, JSON], ('put web1 data/ input', 'put web1 - dump.sql < dump.sql')),
    Verb('get', do_get, 'copy files or a folder from a VM', [
        VM, argument('source', metavar='SRC', help='in the VM; * and ? in its last part match names'),
        argument('target', metavar='DST', nargs='?',
                 help='on this machine; default: under its name in this folder; -: standard output'),
        AS_CP, LINKS, JSON], ('get web1 result.tar .', 'get web1 \'*.csv\' results/')),
    Verb('cp', do_cp, 'copy a file or folder to a VM or from one', [
        argument('source', metavar='SRC', help='a path, or VM:PATH'),
        argument('target', metavar='DST', help='VM:PATH, or a path'),
        AS_CP, LINKS, JSON], ('cp web1:result.tar .', 'cp data/ web1:input')),
]
