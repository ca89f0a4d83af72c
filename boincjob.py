"""The job file of a BOINC task, vbox_job.xml: what kind of machine it needs, and what runs there.

The fields are vboxwrapper's, read as it reads them, and four of our own that it passes over: <command>,
<input>, <output>, <checkpoint>. What isn't known is a warning; what is known and can't be done here, or is
not to be done, is refused by its name.

What it is not: a look at files (boincwork.py). No threads, no state.
"""

import math
import re
import shlex
import xml.etree.ElementTree
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import agent

FILE = 'vbox_job.xml'
LARGEST = 1 << 20              # characters of it: splitting words takes its time
RESET = 'reset the project; if it stays so, '           # what a volunteer can do where a file is missing
CHECKPOINTS = ('state', 'files', 'none')
MOST_CPUS = 32
LEAST_MEMORY = 512             # MB
LAST_PORT = 65535
MOST_PORTS = 100               # of one <port_forward>
COMMAND = ['sh', 'boinc_app']  # what runs where the job file doesn't say


class JobError(Exception):
    """A job file that can't be used; one line that names file, field and what is wanted."""


class Moved(NamedTuple):
    """A file that is put into the guest, or fetched from it."""
    logical: str               # its name in the slot
    path: str                  # where it is in the guest, relative to what the guest serves
    optional: bool = False     # it may be missing


class Forward(NamedTuple):
    """A port of the guest that is reached on this machine's 127.0.0.1."""
    guest: int
    host: int                  # 0: a free one


def _flag(text: str) -> bool:
    if text.lower() in ('', '1', 'true', 'yes'):
        return True
    if text.lower() in ('0', 'false', 'no'):
        return False
    raise ValueError('1 or 0')


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError('a number')
    if not 0 <= value < 1e12:
        raise ValueError('a number from 0 to 1e12')
    return value


def _path(text: str) -> str:
    """A path in the guest, or a logical name: relative, and it leads nowhere else."""
    parts = text.split('/')
    if not text or text.startswith('/') or '..' in parts or '\\' in text or '\0' in text:
        raise ValueError('a relative path without ..')
    return text


def _output(name: str) -> str:
    """The logical name of a file that is written in the slot."""
    if SLOTS_OWN.fullmatch(name.split('/')[0]):
        raise ValueError('another name: that file of a slot is the client\'s or the wrapper\'s')
    return name


def _words(text: str) -> List[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError('words as a shell splits them (%s)' % error)
    if not words:
        raise ValueError('a command')
    return words


def _checkpoint(text: str) -> str:
    if text not in CHECKPOINTS:
        raise ValueError('one of ' + ', '.join(CHECKPOINTS))
    return text


# Those that count once: what reads them, and the default.
FIELDS: Dict[str, Tuple[Callable[[str], Any], Any]] = {
    'os_name': (str, ''), 'memory_size_mb': (_number, 0.0),
    'enable_remotedesktop': (_flag, False), 'network_bridged_mode': (_flag, False),
    'job_duration': (_number, 0.0),
    'fraction_done_filename': (_path, ''), 'completion_trigger_file': (_path, ''),
    'temporary_exit_trigger_file': (_path, ''), 'trickle_trigger_file': (_path, ''),
    'copy_cmdline_to_shared': (_flag, False), 'minimum_checkpoint_interval': (_number, 600.0),
    'multiattach_vdi_file': (_path, ''), 'disable_automatic_checkpoints': (_flag, False),
    'pf_guest_port': (agent.integer(0, LAST_PORT), 0), 'pf_host_port': (agent.integer(0, LAST_PORT), 0),
    'command': (_words, []), 'checkpoint': (_checkpoint, ''),
}
# Files of a slot that are its client's and its wrapper's: no output may be written over them.
SLOTS_OWN = re.compile(r'(stderr|stdout)\.txt|init_data\.xml|%s|vmboinc\.(json|told|bare)|'
                       r'boinc_(lockfile|mmap_file|finish_called|temporary_exit|task_state\.xml|ufr_.*)'
                       % re.escape(FILE), re.IGNORECASE)
NEEDLESS = {                   # that ask for what is done anyway, or otherwise; nobody need be warned
    'heartbeat_filename', 'minimum_heartbeat_interval',                # the guest's agent tells that it lives
    'enable_network',                          # the VM has its network in any case: its agent speaks over it
    'enable_shared_directory', 'enable_vm_savestate_usage', 'vram_size_mb', 'vm_disk_controller_type',
    'vm_disk_controller_model', 'enable_graphics_support', 'enable_screenshots_on_error',
    'enable_nat_dns_host_resolver', 'vm_network_driver', 'boot_iso', 'enable_scratch_directory',
}
REFUSED = {
    'enable_floppyio': 'data goes into the VM as files (<input>), there is no floppy',
    'share_project_dir': 'a VM must not reach the files of other tasks',
    'share_slot_dir': 'a VM must not reach the files of the wrapper: name them as <input> and <output>',
    'enable_isocontextualization': 'contextualization by an ISO image isn\'t done here',
    'enable_cache_disk': 'a second disk isn\'t attached here',
}


class Job:
    """The job file, read. Each field of FIELDS is an attribute; ``warnings``: lines for stderr."""

    def __init__(self, text: str) -> None:
        """Raises JobError."""
        self.warnings = []             # type: List[str]
        self.inputs = []               # type: List[Moved]
        self.outputs = []              # type: List[Moved]
        self.forwards = []             # type: List[Forward]       # that of pf_guest_port first
        self.copy_to_shared = []       # type: List[str]
        self.intermediate_upload_file = []     # type: List[str]
        self._fields = {name: default for name, (_, default) in FIELDS.items()}
        for element in _root_of(text):
            self._read(element)
        if self.pf_guest_port:
            self.forwards.insert(0, Forward(self.pf_guest_port, self.pf_host_port))
        elif self.pf_host_port:
            self.warnings.append('%s: <pf_host_port> without <pf_guest_port> does nothing' % FILE)
        if not self.checkpoint:
            self._fields['checkpoint'] = 'files' if self.disable_automatic_checkpoints else 'state'

    def _read(self, element: Any) -> None:
        name, text = element.tag, (element.text or '').strip()
        try:
            if name == 'input':
                self.inputs.append(_moved(element, text))
            elif name == 'output':
                moved = _moved(element, text)
                self.outputs.append(moved._replace(logical=_output(moved.logical)))
            elif name == 'intermediate_upload_file':
                self.intermediate_upload_file.append(_output(_path(text)))
            elif name == 'port_forward':
                self.forwards += _forwards(element)
            elif name == 'copy_to_shared':
                self.copy_to_shared.append(_path(text))
            elif name in FIELDS:
                self._fields[name] = FIELDS[name][0](text)
            elif name in REFUSED:
                if _flag(text):
                    raise JobError('%s: <%s>: refused: %s' % (FILE, name, REFUSED[name]))
            elif name not in NEEDLESS:
                self.warnings.append('%s: <%s> is not known, and does nothing' % (FILE, name))
        except ValueError as expected:
            raise JobError('%s: <%s>%.80s: expected %s' % (FILE, name, text, expected))

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__['_fields'][name]
        except KeyError:
            raise AttributeError(name)

    def run(self, words: List[str]) -> List[str]:
        """What runs in the guest: the command and its words, then those of the task."""
        return (self.command or COMMAND) + words


def _root_of(text: str) -> Any:
    if len(text) > LARGEST:
        raise JobError('%s: refused: it has more than 1 MiB' % FILE)
    try:
        root = xml.etree.ElementTree.fromstring(text)
    except xml.etree.ElementTree.ParseError as error:
        raise JobError('%s: no XML: %s' % (FILE, error))
    if root.tag != 'vbox_job':
        raise JobError('%s: <%.40s>: expected <vbox_job>' % (FILE, root.tag))
    return [element for element in root if isinstance(element.tag, str)]


def _moved(element: Any, text: str) -> Moved:
    """<input>NAME</input>, or <input><name>NAME</name><path>WHERE</path><optional/></input>."""
    fields = {child.tag: (child.text or '').strip() for child in element}
    unknown = set(fields) - {'name', 'path', 'optional'}
    if unknown:
        raise ValueError('name, path or optional, not <%s>' % sorted(unknown)[0])
    found = {'name': text}
    for tag in ('name', 'path'):
        try:
            found[tag] = _path(fields.get(tag, found['name']))
        except ValueError as expected:
            where = ', not <%s>%.80s' % (tag, fields[tag]) if tag in fields else ''
            raise ValueError('%s%s' % (expected, where))
    return Moved(found['name'], found['path'], 'optional' in fields and _flag(fields['optional']))


def _forwards(element: Any) -> List[Forward]:
    """<port_forward>: <guest_port> and <host_port> (0: free ones), and with <nports> those that follow."""
    fields = {child.tag: (child.text or '').strip() for child in element}
    unknown = set(fields) - {'guest_port', 'host_port', 'nports', 'is_remote'}
    if unknown:
        raise ValueError('guest_port, host_port, nports or is_remote, not <%s>' % sorted(unknown)[0])
    if _flag(fields.get('is_remote', '0')):
        raise JobError('%s: <port_forward>: <is_remote>: refused: other machines must not reach a '
                       'volunteer\'s VM' % FILE)
    numbers = []
    for name, default, low, high in (('guest_port', '', 1, LAST_PORT), ('host_port', '0', 0, LAST_PORT),
                                     ('nports', '1', 1, MOST_PORTS)):
        try:
            numbers.append(agent.integer(low, high)(fields.get(name, default)))
        except ValueError as expected:
            raise ValueError('%s: %s, not %.40r' % (name, expected, fields.get(name, default)))
    guest, host, count = numbers
    if max(guest, host) + count - 1 > LAST_PORT:
        raise ValueError('no port above %d' % LAST_PORT)
    return [Forward(guest + number, host and host + number) for number in range(count)]


NEEDLESS_WORDS = ('--trickle', '--register_only', '--sporadic')


class Words(NamedTuple):
    """The wrapper's own options, as vboxwrapper has them, and the words that are left for the science."""
    cpus: int
    memory: int                # MB, 0: as the job file says
    image: str                 # its logical name
    rest: List[str]
    passed_over: List[str]     # vboxwrapper's options that do nothing here


def read_words(words: List[str], ncpus: float) -> Words:
    """Sorts a task's command line. Raises JobError.

    ncpus    CPUs that the client gives the task
    """
    values = {'--nthreads': '', '--memory_size_mb': '', '--vmimage': '', '--trickle': ''}
    rest: List[str] = []
    passed_over: List[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word == '--':
            rest += left
            break
        if word in values:
            if not left:
                raise JobError('%s: expected a value' % word)
            values[word] = left.pop(0)
        if word in NEEDLESS_WORDS:
            passed_over.append(word)
        elif word not in values:
            rest.append(word)
    cpus = _whole('--nthreads', values['--nthreads']) or math.ceil(ncpus) or 1
    image = 'vm_image_%s.vdi' % values['--vmimage'] if values['--vmimage'] else 'vm_image.vdi'
    return Words(min(int(cpus), MOST_CPUS), _whole('--memory_size_mb', values['--memory_size_mb']),
                 image, rest, passed_over)


def _whole(name: str, text: str) -> int:
    try:
        return int(_number(text)) if text else 0
    except ValueError as expected:
        raise JobError('%s %.40s: expected %s' % (name, text, expected))


def fraction_of(text: str) -> Optional[float]:
    """What a program wrote of its progress: its last word is a number from 0 to 1, or a percentage."""
    words = text.split()
    try:
        value = float(words[-1].rstrip('%')) / (100 if words[-1].endswith('%') else 1)
    except (IndexError, ValueError):
        return None
    return value if 0 <= value <= 1 else None


LARGEST_NUMBER = (1 << 31) - 1         # that a system takes for an exit code


class Trigger(NamedTuple):
    """A trigger file: a number (an exit code, or a delay in seconds), whether it is a notice, and why."""
    number: int
    notice: bool
    message: str


def read_trigger(text: str) -> Trigger:
    """What such a file says; empty: 0, and nothing else."""
    lines = text.splitlines() + ['', '']
    begins = re.match(r'\s*([+-]?[0-9]+)', lines[0])  # and no more of it: "3.7" is 3, as for C's atoi
    number = max(-LARGEST_NUMBER - 1, min(int(begins.group(1)[:20]), LARGEST_NUMBER)) if begins else 0
    message = ' '.join(' '.join(lines[2:]).split())
    return Trigger(number, lines[1].strip() == '1', ''.join(filter(str.isprintable, message)))
