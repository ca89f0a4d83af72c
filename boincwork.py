"""What is done for a BOINC task: its files, its command, what it leaves. One step at a time.

Each step of `Work` is short, can be asked for again at any time, and gives True once what it is for is so;
what it has to wait for it looks at, and says False. So a step that a dead agent or a killed wrapper cut
short is simply taken again.

What it is not: what is done next, or told to the client (boinclife.py); the machine (boincmachines.py), or
the host agent (boinchost.py). Threads: all of it belongs to one.
"""

import contextlib
import hashlib
import logging
import os
import posixpath
import re
import stat
import time
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import agent
from boinchost import HostAgent, NotStarted, Trouble
from boincjob import COMMAND, FILE, LEAST_MEMORY, RESET, Job, Moved, Trigger, Words, fraction_of, read_trigger
from boincmachines import COMMAND_ID, NO_SUCH_FOLDER, GivenMachine, VirtualMachine, commands_of
from boincslot import InitData, Record, Slot
from faults import Busy, InvalidParams, NotSupported, TransferError, VMHostError

log = logging.getLogger('vmboinc')

LINK_EVERY = 60.0              # seconds between two links to the status page; one is good for two minutes
LONGEST_NAME = 150             # characters of a machine's name
NO_OUTPUT = NO_SUCH_FOLDER + (         # … of what is no file, or none that the guest's agent may read
    'neither file, folder nor link', 'is a directory', 'not authorized')
LAST_WORDS = 8192              # characters of the program's standard error that the task's keeps
MOST_TRICKLES = 100            # messages that wait for the client to take them
LOOK_AT_FILES = 2.0            # seconds between two looks for trigger files
OWNER = 'boinc '               # + the project's folder: owner of a task's VM
LEAVE = 'vmboinc.ini'          # in the client's folder; the volunteer's alone: no project's files are there
LEAVES = {'Bridged': {'projects': (agent.text, ''), 'interface': (agent.given, 'auto')}}


class Look(NamedTuple):
    """What was seen of the science."""
    ended: bool = False
    state: str = 'running'             # as getCmdStatus has it; away: its machine doesn't run
    cpu: float = 0.0                   # seconds, of this attempt
    fraction: Optional[float] = None
    code: int = 0                      # once it ended: exit code or signal
    why: str = ''
    done: Optional[Trigger] = None     # the completion trigger file
    pause: Optional[Trigger] = None    # the temporary exit trigger file
    messages: Tuple[str, ...] = ()     # to the client: there is a trickle message, or a file to upload


class Work:
    """The steps. Each raises Trouble, or a VMHostError; NoHost where the host agent went away meanwhile."""

    def __init__(self, slot: Slot, job: Job, words: Words, record: Record, host: HostAgent) -> None:
        self.host = host
        self.machine = None            # type: Any
        self._slot = slot
        self._job = job
        self._words = words
        self._record = record
        self.shown = []                # type: List[str]       # for the client's channel of graphics
        self._linked = 0.0             # when the status page's link was made
        self._guest = GuestFiles(self, record)
        self._transfer = ''
        self._waiting = []             # type: List[Tuple[str, str, str]]
        self._collected = False
        self._place = slot.project_dir
        # Not made of the task's name: host and guest remember what they ran under it, before a reset.
        record.digest = record.digest or os.urandom(8).hex()
        self._name = self._name_of(slot.init)
        self._owner = OWNER + self._place

    @property
    def vm_pid(self) -> int:
        """The process in which the task's VM runs; 0 where none does. For any thread."""
        return self.machine.pid if self.machine is not None else 0

    @property
    def vm_memory(self) -> int:
        """Bytes that the task's VM takes; 0 where there is none. For any thread."""
        return int(self.machine.memory) if self.machine is not None else 0

    @property
    def command(self) -> str:
        """The id of the science's command."""
        return '%s%s-%d' % (COMMAND_ID, self._record.digest, self._record.attempt)

    # Before it runs.

    def connect(self) -> bool:
        """The host agent answers."""
        self.machine = self.machine or self._choose_machine()
        try:
            if not self.host.connect():
                return False
        except NotStarted as error:
            if self._has_no_machine() and self.host.take_another_port():
                raise Trouble('%s; it takes another port from now on' % error)
            raise
        return True

    def _bridge(self) -> str:
        """The interface to which the VM gets one more card, '' for none. Raises Trouble where the
        project wants one, and the volunteer hasn't allowed that."""
        if not self._job.network_bridged_mode:
            return ''
        project, folder = os.path.basename(self._place), self._slot.client_dir
        path = os.path.join(folder or 'BOINC\'s data folder', LEAVE)
        try:
            leave = agent.read_settings(path if folder and os.path.exists(path) else None, LEAVES).Bridged
        except (agent.AgentError, OSError) as error:
            raise Trouble(agent.sentence(error))
        if not {project, '*'} & set(leave.projects.replace(',', ' ').split()):
            raise Trouble('network_bridged_mode: refused: the project\'s VM would be a machine of its own in '
                          'your network. You can allow it: two lines, [Bridged] and projects = %s, in %s'
                          % (project, path))
        return str(leave.interface)

    def _choose_machine(self) -> Any:
        if not self.host.drives_vms:
            for what, wanted in (('port is forwarded', self._job.forwards),
                                 ('card is bridged', self._job.network_bridged_mode)):
                if wanted:
                    log.warning('no %s: the science runs on a machine that has joined, in no VM', what)
            return GivenMachine(self.host, self._name, self._record)
        wish = {'cpus': self._words.cpus}      # type: Dict[str, Any]
        memory = self._words.memory or int(self._job.memory_size_mb)
        wish['memory'] = max(memory, LEAST_MEMORY)
        if self._job.os_name:
            wish['ostype'] = self._job.os_name
        bridge = self._bridge()
        if bridge:
            wish['bridged'] = bridge
        if self._job.forwards:
            wish['forwards'] = [{'guestPort': guest, 'hostPort': host} for guest, host in self._job.forwards]
        parent = self._job.multiattach_vdi_file
        image = os.path.join(self._slot.project_dir, parent) if parent else \
            self._slot.resolve(self._words.image)
        wish.update(folder=os.path.abspath(self._slot.folder), owner=self._owner)
        return VirtualMachine(self.host, self._name, image, wish, self._limits, self._record)

    def clean(self) -> bool:
        """No VM is left of tasks of this project that the client has forgotten (a reset, say); nor one of
        this name, where this slot has had none: a server sends tasks again that were reset."""
        if not self._record.made and not isinstance(self.machine, GivenMachine):
            self._remove([self._name])
        slots = self._slots()
        if not all(slot.has_client and slot.init.is_whole for slot in slots):
            return True                # by hand; or one is written just now: whose it is tells the next start
        known = [self._name_of(slot.init) for slot in slots]
        if isinstance(self.machine, GivenMachine):
            self._end_forgotten(known)
        with contextlib.suppress(NotSupported):
            self._remove([name for name in self.host.call('listVMs')
                          if name.startswith(self._name_of(InitData())) and name not in known + [self._name]])
        return True

    def _remove(self, names: List[str]) -> None:
        """Removes VMs of the project's, by their names."""
        with contextlib.suppress(NotSupported):
            for row in self.host.call('cleanup', False, names, self._owner):
                log.info('removed what an earlier task left: %s (%s)', row['name'], row['why'])

    def _end_forgotten(self, known: List[str]) -> None:
        """Ends, on given machines, commands of tasks whose names aren't known, and removes their files."""
        begin = self._name_of(InitData())
        for row in commands_of(self.host, lambda task: task.startswith(begin) and task not in known):
            log.info('ended what an earlier task left: %s', row['task'])
            GivenMachine(self.host, row['task'], self._record).take_away(row['vm'], row['cmdId'])

    def _slots(self) -> List[Slot]:
        """Those of the project's tasks that the client knows, or may know; without one, this one's alone."""
        if not self._slot.has_client:
            return [self._slot]
        place = os.path.dirname(os.path.abspath(self._slot.folder))
        slots = [slot for slot in [Slot(os.path.join(place, name)) for name in os.listdir(place)]
                 if slot.has_client]
        return [slot for slot in slots
                if not slot.init.is_whole or slot.init.text('project_dir') == self._place]

    def _has_no_machine(self) -> bool:
        """Whether no task of the project has a VM, whose agent knows the broker's port."""
        slots = self._slots()
        return all(slot.init.is_whole for slot in slots if slot.has_client) and \
            not any(os.path.exists(slot.path(self._name_of(slot.init))) for slot in slots)

    def _name_of(self, init: InitData) -> str:
        """What a task's machine is called, after its project and its name; without one, how all begin."""
        result = init.text('result_name')
        name = '%s_%s' % (os.path.basename(self._place), re.sub(r'[^A-Za-z0-9._-]', '_', result))
        if len(name) <= LONGEST_NAME:
            return name
        # Names of tasks often differ at their ends alone.
        digest = hashlib.md5(result.encode()).hexdigest()[:16]
        return '%s-%s' % (name[:LONGEST_NAME - len(digest) - 1], digest)

    def ready(self) -> bool:
        """The machine runs, and its agent is there."""
        if not self._record.made:
            self._record.made = True
            self._record.save()
        return bool(self.machine.ready())

    def put(self) -> bool:
        """The guest has the task's files."""
        if self._record.put:
            return True
        if not self._waiting:
            self._waiting = [('put', self._slot.resolve(moved.logical), self.there(moved.path))
                             for moved in self._inputs()] or self._bare_folder()
        if not self._move_all():
            return False
        self._record.put = True
        self._record.save()
        return True

    def _bare_folder(self) -> List[Tuple[str, str, str]]:
        """What makes the task's folder in the guest, where that is missing and no file does."""
        if not self.machine.files or self.machine.has_folder():
            return []
        bare = self.in_slot('vmboinc.bare')
        os.makedirs(bare, exist_ok=True)
        return [('put', bare, self.machine.files)]

    def _inputs(self) -> List[Moved]:
        found = list(self._job.inputs) + [Moved(name, posixpath.basename(name))
                                          for name in self._job.copy_to_shared]
        if not self._job.command and not any(moved.path == COMMAND[1] for moved in found):
            found.append(Moved(COMMAND[1], COMMAND[1]))
        found += [moved for moved in self._shared() if os.path.exists(self._slot.resolve(moved.logical))]
        if self._job.copy_cmdline_to_shared:
            with open(self._slot.path('cmdline'), 'w', encoding='utf-8') as file:
                file.write(' '.join(self._words.rest))
            found.append(Moved('cmdline', 'cmdline'))
        missing = [moved.logical for moved in found
                   if not moved.optional and not os.path.exists(self._slot.resolve(moved.logical))]
        if missing:
            raise Trouble('the file %s is missing in the slot: %s%s names a file that the task doesn\'t have'
                          % (missing[0], RESET, FILE))
        found = [moved for moved in found if os.path.exists(self._slot.resolve(moved.logical))]
        for path in [self._slot.resolve(moved.logical) for moved in found]:
            if not os.path.isfile(path) and not os.path.isdir(path):       # a pipe has no end
                raise Trouble('%s is neither file nor folder: reset the project' % path)
        return found

    def _shared(self) -> List[Moved]:
        """The files in the slot's folder shared/, which is what the guest serves."""
        return [Moved(name, name[len('shared/'):]) for name in self._slot.names_in('shared')]

    def there(self, path: str) -> str:
        """A path in the guest, of a file of the task's."""
        return posixpath.join(self.machine.files, path)

    def in_slot(self, name: str) -> str:
        """The path of a file in the slot, for other processes too."""
        return os.path.abspath(self._slot.path(name))

    def _may_write(self, logical: str) -> bool:
        """Whether the file of that name is the task's: its link may be one that the project has sent."""
        if self._slot.is_within(self._slot.resolve(logical)):
            return True
        log.error('%s leads out of the task\'s folders, to %s: it isn\'t written', logical,
                  self._slot.resolve(logical))
        return False

    def upload(self, name: str) -> bool:
        """Fetches an output before the end, and asks the client to upload it. Whether that was possible."""
        if not self._may_write(name):
            return False
        error, status = 'a client uploads none in a folder before the end', True
        if '/' not in name:
            _, error, status = self.host.call('cpFileFromVM', self.machine.name, self.there(name),
                                              self._slot.resolve(name))
        if status:
            log.warning('%s isn\'t uploaded: %s', name, error)
            return False
        let_read(self._slot.resolve(name))
        open(self._slot.path('boinc_ufr_' + name), 'w').close()
        return True

    def _move_all(self) -> bool:
        """Moves the files that wait, one after the other. Whether all are where they should be."""
        self.machine.lease()
        told = self._transfer_told()
        if told.get('state') in ('waiting', 'running'):
            return False
        self._transfer = ''
        if told.get('state') == 'done':
            direction, _, target = self._waiting.pop(0)
            if direction == 'get':
                let_read(target)
        elif told and self._is_no_output(told['error']):
            log.error('what the program left can\'t be fetched, as if it were missing: %s', told['error'])
            self._waiting.pop(0)
        elif told:
            raise Trouble('%s: %s' % (os.path.basename(self._waiting[0][1]), told['error']))
        if self._waiting:
            direction, source, target = self._waiting[0]
            if direction == 'get':             # a client makes no folders of outputs that it copies
                os.makedirs(os.path.dirname(target), exist_ok=True)
            self._transfer = self._start_transfer(direction, self.machine.name, source, target)
        return not self._waiting

    def _start_transfer(self, *how: str) -> str:
        """The id of a transfer that was begun; or of the same one, which a wrapper before this one began."""
        try:
            return str(self.host.call('startTransfer', *how))
        except Busy as error:
            found = re.search('transfer-[0-9a-f]+', str(error))
            if not found:
                raise
            return found.group()

    def _is_no_output(self, error: str) -> bool:
        """Whether it tells that what is to be fetched is no file, nor leads to one: that never passes."""
        direction, source, _ = self._waiting[0]
        return direction == 'get' and (error in ['%s: %s' % (source, how) for how in NO_OUTPUT]
                                       or error.startswith(source + ' is a link to '))

    def _transfer_told(self) -> Dict[str, Any]:
        """What getTransfer tells of the one that was begun; {} where there is none, or no longer: a host
        agent that goes away forgets what it was moving."""
        try:
            return self.host.call('getTransfer', self._transfer) if self._transfer else {}
        except InvalidParams:
            return {}

    # While it runs.

    def begin(self) -> bool:
        """The command has been begun, and isn't halted; where it runs already, this changes nothing."""
        run = self._job.run(self._words.rest)
        self.host.call('runCmd', self.machine.name, run[0], run[1:], {}, self.machine.files, '',
                       {'id': self.command, 'endLeft': True, 'mayReturn': self._job.checkpoint == 'state'})
        return self.resume()

    def look(self) -> Look:
        """How far it is."""
        status = self.host.call('getCmdStatus', self.command)
        if status['ended']:
            seen = self._end(status)           # its last words may be in files
            return self._guest.look(self._job, seen, True) if seen.state in ('exited', 'signaled') else seen
        if not self.machine.runs():
            return Look(state='away')
        self._show_page()
        seen = Look(state=status['state'], cpu=cpu_of(status), fraction=fraction_of(status['progress']))
        return self._guest.look(self._job, seen)

    def _show_page(self) -> None:
        """The client's button opens the page that the VM serves, where the job file forwards its port; else
        the host agent's status page: by a link that opens it once, and soon."""
        now = time.monotonic()
        if not self._linked or now - self._linked > LINK_EVERY:
            self._linked = now
            port = self.machine.port_to(self._job.pf_guest_port)
            page = 'http://localhost:%d' % port if port else self.host.call('getStatusLink')
            self.shown.append('<web_graphics_url>%s</web_graphics_url>' % page)

    def show_desktop(self) -> bool:
        """The VM's screen can be looked at, where the job file wants that and the hypervisor can. Where there
        is a password, it is in a file of the slot that only this user can read."""
        if self._job.enable_remotedesktop:
            try:
                desktop = self.host.call('remoteDesktop', self.machine.name, True)
            except VMHostError as error:
                log.warning('no remote desktop: %s', error)
                return True
            self.shown.append('<remote_desktop_addr>%s:%s</remote_desktop_addr>'
                              % (desktop['address'], desktop['port']))
            path = self.in_slot('remote_desktop_password')
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 'w') as file:
                file.write(desktop.get('password', '') + '\n')
        return True

    def _end(self, status: Dict[str, Any]) -> Look:
        results = self.host.call('getCmdResults', self.command)
        if results['err']:
            log.info('the end of the program\'s standard error:')
            for line in results['err'][-LAST_WORDS:].splitlines():
                log.info('  %s', agent.printable(line))
        return Look(True, results['state'], cpu_of(results), 1.0, int(results['exitCodeOrSignal']),
                    results['error'] or status['end'])

    def pause(self) -> bool:
        """It doesn't compute."""
        self.machine.pause(self.command)
        return True

    def resume(self) -> bool:
        """It does again."""
        self.machine.resume(self.command)
        return True

    def checkpoint(self) -> bool:
        """It can go on from here where its machine dies."""
        self.machine.checkpoint()
        return True

    def save(self) -> bool:
        """It takes neither processor nor memory, and can go on."""
        self.machine.save(self.command)
        return True

    def stay(self) -> bool:
        """The machine stays paused: its lease goes on."""
        self.machine.lease()
        return True

    def limit(self) -> bool:
        """The VM keeps within the preferences of now."""
        self.machine.limit()
        return True

    def _limits(self) -> Dict[str, Any]:
        """setLimits' limits, as the user's preferences have them."""
        init = self._slot.init
        percent = init.number('cpu_usage_limit')
        rates = [rate for rate in (init.number('max_bytes_sec_up'), init.number('max_bytes_sec_down'))
                 if rate > 0]
        return {'cpuPercent': max(1, int(percent)) if 0 < percent < 100 else 100,
                'netKBps': max(1, int(min(rates) / 1024)) if rates else 0}

    # After it ended.

    def collect(self) -> bool:
        """What it made is where the client looks for it; what is missing there isn't made up."""
        if self._record.collected:     # by a wrapper before this one; they may be gone in the guest by now
            return True
        if not self._collected:
            self._waiting = [('get', self.there(moved.path), self._slot.resolve(moved.logical))
                             for moved in self._outputs() if self._guest.exists(self.there(moved.path))]
            self._collected = True
        if not self._move_all():
            return False
        self._record.collected = True
        with contextlib.suppress(OSError):             # without it they are fetched again
            self._record.save()
        return True

    def _outputs(self) -> List[Moved]:
        found = self._job.outputs or [moved for moved in self._shared()
                                      if not os.path.exists(self._slot.resolve(moved.logical))]
        found = [moved for moved in found if self._may_write(moved.logical)]
        for moved in found:
            if not moved.optional and not self._guest.exists(self.there(moved.path)):
                log.error('the program left no file %s', moved.path)
        return found

    def remove(self) -> bool:
        """Nothing of the task is left on this machine."""
        self.machine.remove(self.command)
        return True


class GuestFiles:
    """Small files in the guest by which a program tells something."""

    LARGEST = 64 * 1024        # bytes of one that is read

    def __init__(self, work: Work, record: Record) -> None:
        self._work = work
        self._record = record
        self._looked = 0.0
        self._seen = {}                # type: Dict[str, str]  # {name: the file's time and size}
        self._complained = {}          # type: Dict[str, str]  # {name: why it can't be read}
        self._fraction = None          # type: Optional[float]
        self._trickles = []            # type: List[Tuple[str, str, str]]     # name, text, time and size

    def exists(self, path: str) -> bool:
        """Whether there is such a file in the guest."""
        return posixpath.basename(path) in self._list(posixpath.dirname(path))

    def look(self, job: Job, seen: Look, is_last: bool = False) -> Look:
        """What was seen, and what files tell; as a rule, only every two seconds."""
        now = time.monotonic()
        names = [job.fraction_done_filename, job.completion_trigger_file, job.temporary_exit_trigger_file,
                 job.trickle_trigger_file] + job.intermediate_upload_file
        if not any(names) or now - self._looked < LOOK_AT_FILES and not is_last:
            return seen._replace(fraction=first_of(seen.fraction, self._fraction))
        self._looked = now
        news = self._news({name: self._work.there(name) for name in names if name})
        texts = {}                     # type: Dict[str, str]
        for name in news:
            text = None if name in job.intermediate_upload_file else self._read(name)
            if text is not None:
                texts[name] = text
        if job.fraction_done_filename in texts:
            self._fraction = fraction_of(texts[job.fraction_done_filename] or '0')
        done, pause = [read_trigger(texts[name]) if name in texts else None
                       for name in (job.completion_trigger_file, job.temporary_exit_trigger_file)]
        if pause is not None and not done:     # the file is still there when the task goes on
            self._take(job.temporary_exit_trigger_file, self._seen[job.temporary_exit_trigger_file])
        if job.trickle_trigger_file in texts and len(self._trickles) < MOST_TRICKLES:
            self._trickles.append((job.trickle_trigger_file, texts[job.trickle_trigger_file],
                                   self._seen[job.trickle_trigger_file]))
        uploads = [name for name in job.intermediate_upload_file if name in news and self._work.upload(name)]
        for name in uploads:
            self._take(name, self._seen[name])
        messages = self._trickle() + ['<have_new_upload_file/>'] * bool(uploads)
        return seen._replace(fraction=first_of(seen.fraction, self._fraction), done=done, pause=pause,
                             messages=tuple(messages))

    def _trickle(self) -> List[str]:
        """Hands the next trickle message to the client, which takes one at a time."""
        path = self._work.in_slot('trickle_up.xml')
        if not self._trickles or os.path.exists(path):
            return []
        variety, text, mark = self._trickles.pop(0)
        with open(path, 'w', encoding='utf-8') as file:
            file.write('<variety>%s</variety>\n%s' % (variety, text))
        self._take(variety, mark)
        return ['<have_new_trickle_up/>']

    def _take(self, name: str, mark: str) -> None:
        """Remembers that this was acted upon: the wrapper that comes next doesn't do it again."""
        self._record.taken[name] = mark
        self._record.save()

    def _news(self, wanted: Dict[str, str]) -> List[str]:
        """Those of the names whose files have come, or changed, since the last look. wanted: {name: path}"""
        folders = {folder: self._list(folder) for folder in {posixpath.dirname(each)
                                                             for each in wanted.values()}}
        news = []
        for name, path in wanted.items():
            mark = folders[posixpath.dirname(path)].get(posixpath.basename(path))
            if mark is not None and mark not in (self._seen.get(name), self._record.taken.get(name)):
                self._seen[name] = mark
                news.append(name)
        return news

    def _list(self, folder: str) -> Dict[str, str]:
        """{name: 'when it was changed, size'} of what is in a folder of the guest; {} where there is none."""
        try:
            rows = self._work.host.call('listDir', self._work.machine.name, '/' + folder)
        except TransferError as error:
            if str(error).endswith(NO_SUCH_FOLDER):
                return {}
            raise
        return {row['name']: '%d %d' % (row['mtime'], row['size']) for row in rows if not row['isDir']}

    def _read(self, name: str) -> Optional[str]:
        """The text of a file that was just seen; None for one that is too large, or can't be read now: the
        next look tries that again."""
        if int(self._seen[name].split()[1]) > self.LARGEST:
            log.warning('%s in the guest is larger than %d bytes, and not read', name, self.LARGEST)
            return None
        local = self._work.in_slot('vmboinc.told')
        _, error, status = self._work.host.call('cpFileFromVM', self._work.machine.name,
                                                self._work.there(name), local)
        if status:
            if self._complained.get(name) != error:
                log.warning('%s in the guest can\'t be read: %s', name, error)
            self._complained[name] = error
            del self._seen[name]
            return None
        with open(local, encoding='utf-8', errors='replace') as file:
            return file.read(self.LARGEST)


def let_read(path: str) -> None:
    """Has this user's programs, such as the client, read a file that came with its mode in the guest."""
    with contextlib.suppress(OSError):         # it is another user's
        os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) | stat.S_IRUSR | stat.S_IWUSR)


def first_of(*values: Optional[float]) -> Optional[float]:
    """The first that isn't None."""
    return next((value for value in values if value is not None), None)


def cpu_of(told: Dict[str, Any]) -> float:
    """CPU seconds, by the guest's accounting."""
    used = told['resources']
    return float(used.get('ru_utime', 0)) + float(used.get('ru_stime', 0))
