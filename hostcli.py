"""The command line: reads what a person typed, and lets a verb talk to the running host agent.

What it is not: the host agent; no verb imports any of its code. The verbs stand in climachines.py,
clicommands.py, clifiles.py and cliagent.py. Threads: main alone; no locks.
"""

import argparse
import contextlib
import os
import re
import shlex
import signal
import sys
from typing import Any, Callable, List, Optional, Sequence, Set, Tuple

import agent
import cliagent
import clicommands
import clifiles
import climachines
import localnames
from cliscreen import Screen, has_no_reader, lenient, naming_output, terminal_width
from cliverbs import FAILED, Function, Verb
from faults import InvalidParams, NoSuchCommand, NoSuchVM
from hostclient import Client, how_to_start, program, program_name
from hostconfig import ini_here, read_settings

TYPING_ERROR = 0.76            # how like a verb a word must be to be meant as it: others mean something else
INTERRUPTED = 128 + signal.SIGINT      # exit code after Ctrl-C

SUBJECTS = [('virtual machines', climachines.VERBS), ('commands', clicommands.VERBS),
            ('files', clifiles.VERBS), ('host agent', cliagent.VERBS)]
VERBS = {verb.name: verb for _, verbs in SUBJECTS for verb in verbs}

ALIASES = {'exec': 'run', 'logs': 'out', 'top': 'ps -l -n 0', 'list': 'ls', 'inspect': 'info',
           'version': '--version', 'help': '--help', '-v': '--version', '-V': '--version'}
MEANT = {                      # what hands type that know other tools, and what it is here
    'attach': 'shell VM ID, or out -f', 'tail': 'out -f', 'log': 'out', 'output': 'out',
    'delete': 'rm', 'remove': 'rm',
    'destroy': 'stop --force, or rm', 'undefine': 'rm', 'suspend': 'pause',
    'restart': 'stop, and start; reset pulls the plug', 'reboot': 'stop, and start; reset pulls the plug',
    'freeze': 'pause', 'unpause': 'resume', 'continue': 'resume', 'up': 'start', 'boot': 'start',
    'down': 'stop', 'halt': 'stop', 'poweroff': 'stop --force', 'snapshot': 'snap', 'upload': 'put',
    'push': 'put', 'download': 'get', 'pull': 'get', 'fetch': 'get', 'transfer': 'cp', 'scp': 'cp',
    'copy': 'cp', 'show': 'info', 'describe': 'info', 'stats': 'ps -l', 'jobs': 'ps', 'cancel': 'kill',
    'terminate': 'kill', 'signal': 'kill', 'retry': 'rerun', 'repeat': 'rerun', 'prune': 'cleanup',
    'gc': 'cleanup', 'vnc': 'rdp', 'console': 'shell, or rdp', 'network': 'net', 'doctor': 'check',
    'history': 'events', 'ssh': 'shell, or run', 'execute': 'run', 'purge': 'cleanup', 'sftp': 'cp',
    'rsync': 'cp', 'uploads': 'transfers', 'downloads': 'transfers', 'copies': 'transfers',
    'cat': 'get VM FILE -', 'login': 'shell', 'enter': 'shell', 'connect': 'shell', 'fg': 'shell VM ID',
    'screen': 'shell', 'tmux': 'shell', 'terminal': 'shell', 'bash': 'shell', 'build': 'create',
    'register': 'create', 'find': 'ls', 'who': 'ls', 'vms': 'ls', 'machines': 'ls', 'nodes': 'ls',
    'hosts': 'ls', 'rollback': 'snap restore', 'revert': 'snap restore', 'recover': 'snap restore',
    'monitor': 'status --open', 'web': 'status --open', 'ip': 'info', 'port': 'net',
    'dashboard': 'status --open', 'new': 'create', 'import': 'create', 'stat': 'status', 'uptime': 'status',
    'killall': 'kill', 'less': 'out', 'new-session': 'shell', 'list-sessions': 'ps', 'kill-session': 'kill',
    'quit': 'shutdown', 'exit': 'shutdown', 'pid': 'info', 'df': 'info',
    'reload': 'shutdown, and start the host agent again', 'journalctl': 'events -f', 'maintail': 'events -f',
    'attach-session': 'shell VM ID', 'a': 'shell VM ID', 'has-session': 'ps', 'ls-sessions': 'ps',
    'sessions': 'ps', 'queue': 'ps', 'job': 'ps', 'squeue': 'ps', 'scancel': 'kill', 'sbatch': 'run -d',
    'bg': 'run -d', 'restore': 'snap restore', 'networks': 'net', 'mkdir': 'run VM mkdir', 'mv': 'run VM mv',
    'is-active': 'ping'}

USAGE = '''usage: {me} [host.ini]             run the host agent until Ctrl-C or TERM
       {me} [host.ini] VERB …      talk to the running one
       {me} VERB --help            show the arguments of a verb
       {me} --bundle FILE.pyz      write the program as one file for Python
       {me} --completion bash|zsh|fish
       {me} --version

without host.ini: the one in this folder, else the defaults; "": the defaults
'''
EXIT_CODES = '''exit codes: 0 success; 1 the host agent refused or can't be reached; 2 usage;
     130 Ctrl-C.
run: the command's own (of many VMs the highest); 128 and the signal's number
     if a signal ended it; 124 if it exited with 0 after its timeout; 127 if
     the program wasn't found, 126 if it can't be executed; 255 if the error
     isn't the command's: no such VM, one that is absent, output that was cut,
     a lost command.
All: 255 if standard output can't be written.
'''


def overview() -> str:
    """What --help says."""
    lines = ['Manages virtual machines and the programs in them.\n', USAGE.format(me=program_name())]
    width = max(map(len, VERBS))
    for subject, verbs in SUBJECTS:
        lines += ['%s:' % subject] + ['  %-*s %s' % (width, verb.name, verb.help) for verb in verbs] + ['']
    examples = [example for verb in VERBS.values() for example in examples_of(verb)]
    return '\n'.join(lines + ['examples:'] + examples + ['', EXIT_CODES.rstrip()])


def examples_of(verb: Verb) -> List[str]:
    """Lines that a person can type on this system: Windows has no terminal for a guest's programs, and its
    command prompt takes '…' for no quotation."""
    examples = list(verb.examples)
    if agent.ON_WINDOWS:
        examples = [re.sub("'([^']*)'", lambda found: '"%s"' % found.group(1).replace('"', '\\"'), example)
                    for example in examples if not example.startswith(('shell ', 'run -t '))]
    return ['  %s %s' % (program_name(), example) for example in examples]


AS_JSON, ALL_SHOWN = '--json tells all, for jq to choose', 'leave it out: all are shown'
OFF_FIRST = '`stop --force` does that before it'
ELSEWHERE = {                  # options that hands know from other tools, and what does that here
    'out --since': 'output has no times: -n N shows its last lines',
    'out -t': 'output has no times: `events` has', 'out --timestamps': 'output has no times: `events` has',
    'run --rm': 'leave it out: a command leaves nothing that is to be removed',
    'run --name': '--id gives a command an id of your own',
    'ps --filter': AS_JSON, 'ps --format': AS_JSON, 'ps -o': AS_JSON,
    'ls --format': AS_JSON, 'ls -o': AS_JSON, 'ls -a': ALL_SHOWN, 'ls --all': ALL_SHOWN,
    'info --format': AS_JSON, 'info -f': AS_JSON,
    'rm -f': OFF_FIRST, 'rm --force': OFF_FIRST}


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal. Of its own accord argparse would load compressors to find that out."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=terminal_width() - 2)


class Parser(argparse.ArgumentParser):
    """The arguments of one verb; what is wrong with them ends with that verb's exit code."""

    def __init__(self, verb: Verb, words: Sequence[str] = ()) -> None:
        super().__init__(prog='%s %s' % (program_name(), verb.name), description=verb.help,
                         epilog=self._epilog(verb), allow_abbrev=False, formatter_class=Formatter,
                         usage='%(prog)s [OPTION …] VM [--] CMD [ARG …]' if verb.name == 'run' else None)
        self._words = words
        self._code = code_of_errors(verb)
        self._verb = verb.name
        self._takes_one = any(options.get('metavar') == 'SRC' for _, options in verb.arguments)
        for names, options in verb.arguments:
            self.add_argument(*names, **options)

    def _epilog(self, verb: Verb) -> str:
        lines = examples_of(verb)
        return '\n'.join((['examples:'] + lines if lines else []) + ['', EXIT_CODES])

    def print_help(self, file: Any = None) -> None:
        """Raises OSError where it can't be written, which argparse would keep to itself."""
        with naming_output():
            out = lenient(sys.stdout)
            out.write(self.format_help())
            out.flush()

    def error(self, message: str) -> Any:
        """One sentence, and where there is more."""
        if self._takes_one and re.match('unrecognized arguments: [^-]', message):
            message = 'one SRC at a time: call it for each, or put them into a folder'
        taken = self._taken_for_an_option()
        if taken and message.startswith('the following arguments are required'):
            message = '%s is no option here; a name that begins with - comes after --: `%s -- %s`' % (
                taken, self._verb, shlex.quote(taken))
        option = message.partition('unrecognized arguments: ')[2].partition(' ')[0]
        elsewhere = ELSEWHERE.get('%s %s' % (self._verb, option.partition('=')[0]))
        if elsewhere:
            message = '%s: %s' % (option, elsewhere)
        if self._verb == 'status' and option and not option.startswith('-'):
            message = '`info %s` shows a VM or a command' % option
        if self._verb == 'shell' and message.startswith('unrecognized arguments'):
            message = 'a shell is told no command; `run -t VM CMD` runs one on a terminal'
        self.exit(self._code, 'vmhost: %s: %s (%s %s --help)\n'
                  % (self._verb, message, program(), self._verb))


    def _taken_for_an_option(self) -> str:
        """The first word that looks like an option, and isn't one; '' for none."""
        words = self._words[:self._words.index('--')] if '--' in self._words else self._words
        known = self._option_string_actions
        return next((word for word in words if re.match('--?[^-]', word)
                     and word.partition('=')[0] not in known and word[:2] not in known), '')


def code_of_errors(verb: Verb, code: int = 2) -> int:
    """The exit code for errors of ours: `run` leaves all others to the command."""
    return FAILED if verb.name in ('run', 'rerun', 'shell') else code


def read_arguments(verb: Verb, words: List[str]) -> Any:
    """The arguments of a verb. Exits where they are wrong, or --help is among them."""
    command: List[str] = []
    if verb.name == 'run':
        words, command = split_command(verb, words)
    elif verb.name == 'kill':
        words = [word for each in words for word in signal_option(each)]
    args = Parser(verb, words).parse_args([part for word in words for part in short_options(verb, word)])
    for names, options in verb.arguments:
        if 'nargs' not in options and getattr(args, names[0], None) == []:
            setattr(args, names[0], '--')      # argparse leaves out a second one before Python 3.13
    args.command = command
    return args


def split_command(verb: Verb, words: List[str]) -> Tuple[List[str], List[str]]:
    """(our own words, the command) of `run`: it begins behind the VM, or behind --."""
    takes_value = {name for names, options in verb.arguments for name in names if 'metavar' in options}
    at = skip_options(words, 0, takes_value)
    behind = skip_options(words, at + 1, takes_value)      # options may stand behind the VM, too, before --
    if words[behind:behind + 1] == ['--']:
        return words[:behind], words[behind + 1:]
    if behind > at + 1:
        Parser(verb).error('%s: options stand before VM, or before --' % words[at + 1])
    return words[:at + 1], words[at + 1:]


def skip_options(words: List[str], at: int, takes_value: Set[str]) -> int:
    """Where the first word stands that is neither an option nor the value of one, or --."""
    while at < len(words) and words[at].startswith('-') and words[at] not in ('-', '--'):
        at += 2 if words[at] in takes_value else 1
    return at


def short_options(verb: Verb, word: str) -> List[str]:
    """-it as -i and -t, -n5 as -n and 5: before 3.8, argparse takes neither without abbreviations."""
    takes_value = {name: 'metavar' in options for names, options in verb.arguments for name in names}
    found: List[str] = []
    for at in range(1, len(word) if word[:1] == '-' and word[1:2] not in ('-', '') else 0):
        option = '-' + word[at]
        if option not in takes_value:
            return [word]
        found.append(option)
        if takes_value[option]:
            return found + [word[at + 1:]] * (at + 1 < len(word))
    return found or [word]


def signal_option(word: str) -> List[str]:
    """-9, -KILL and -SIGKILL of `kill` as its option -s."""
    is_signal = word[:1] == '-' and word[1:].isalnum() and (word[1:].isdigit() or word[1:].isupper())
    return ['-s', word[1:]] if is_signal else [word]


def verb_meant(word: str) -> str:
    """What a word that is no verb was probably to be, or ''."""
    import difflib  # needed here alone
    word, names = word.lower(), list(VERBS) + list(ALIASES)
    if word in MEANT:
        return MEANT[word]
    swapped = [name for name in names if sorted(name) == sorted(word)]
    return (swapped + difflib.get_close_matches(word, names, 1, TYPING_ERROR) + [''])[0]


def run_verb(ini: Optional[str], words: List[str], screen: Screen, check: Function, start: str) -> int:
    """Does what the words say with the host agent of that ini file; gives the exit code.

    start    what a person types to have it
    """
    verb = VERBS.get(words[0])
    if verb is None:
        meant = verb_meant(words[0])
        screen.complain('unknown verb %s%s; `%s --help` lists them' % (
            words[0], meant and ' (did you mean %s?)' % meant, program()))
        return 2
    args = read_arguments(verb, words[1:])
    args.ini = ini
    try:
        args.settings = read_settings(ini)
        function = check if verb.name == 'check' else verb.function
        host = Client(args.settings.Host.state_dir, start, screen.complain)
        for name in ('source', 'target') if verb.name == 'cp' else ('vm',):
            if isinstance(getattr(args, name, None), str):
                check_vm(host, verb, getattr(args, name))
        return function(host, screen, args)
    except agent.AgentError as error:
        screen.complain(str(error))
        return code_of_errors(verb, 1)


COMMAND = re.compile('[0-9]{8}-[0-9]{6}-[0-9a-f]{8}(@.+)?')        # an id that the host agent gave
USER_AT = re.compile('([a-z_][a-z0-9_-]*)@([^@:/]+)(:.*)?')


def check_vm(host: Client, verb: Verb, word: str) -> None:
    """Raises InvalidParams for a word that is to be a VM's, and is a command's, or has a user before it."""
    meant = COMMAND.fullmatch(word) if verb in climachines.VERBS else None
    if meant and not is_vm(host, word):
        with contextlib.suppress(NoSuchCommand):
            host.call('getCmdDetails', word)
            raise InvalidParams('%s is a command, and no VM: `kill %s` ends it, `rerun %s` runs it again'
                                % (word, word, word))
    meant = USER_AT.fullmatch(word) if verb.name in ('run', 'shell', 'put', 'get', 'cp') else None
    if meant and bool(meant.group(3)) == (verb.name == 'cp') and is_vm(host, meant.group(2)) \
            and not is_vm(host, word.partition(':')[0]):
        raise InvalidParams('%s: no user stands before a VM: %s' % (word, '`%s -u %s %s`' % (
            verb.name, meant.group(1), meant.group(2)) if verb.name in ('run', 'shell')
            else 'files are copied as the user of its agent'))


def is_vm(host: Client, word: str) -> bool:
    """Whether a VM has that name or id."""
    try:
        return bool(host.call('getVM', word))
    except NoSuchVM:
        return False


def run_option(words: List[str], screen: Screen) -> int:
    """What needs no ini file; gives the exit code."""
    if words[0] in ('-h', '--help'):
        screen.say(overview())
    elif words == ['--version']:
        screen.say('vmhost %s' % agent.VERSION)
    elif words[0] == '--bundle' and len(words) == 2:
        import bundles  # verbs do without it
        bundles.write_bundle(words[1], 'vmhost', ['status.html'])
    elif words[0] == '--completion' and words[1:] in (['bash'], ['zsh'], ['fish']):
        import clicomplete  # verbs do without it
        screen.say(clicomplete.completion(words[1]))
    elif words[0] == '--complete':
        import clicomplete  # verbs do without it
        for candidate in clicomplete.candidates(by_own_name(words[1:]), VERBS, ALIASES):
            screen.say(candidate)
    else:
        screen.complain('%s: expected a verb, host.ini, --help, --bundle FILE.pyz, '
                        '--completion bash|zsh|fish or --version' % ' '.join(words))
        return 2
    return 0


def by_own_name(words: List[str]) -> List[str]:
    """The words, up to one that is still typed, with the verb by its own name."""
    own = [ALIASES.get(word, word).split(' ')[0] for word in words[:-1][:2]]
    return [mine if mine in VERBS else word for word, mine in zip(words, own)] + words[len(own):]


Start = Callable[[Optional[str]], int]


def split_ini(words: List[str]) -> Tuple[Optional[str], List[str]]:
    """(the ini file, the other words); None: the defaults."""
    first = localnames.native(words[0]) if words else '-'
    if not first:
        return None, words[1:]
    is_verb = first in VERBS or first in ALIASES
    if os.path.isfile(first) if is_verb else first.endswith('.ini') or os.path.exists(first):
        return first, words[1:]
    return ini_here(), words


def run(words: List[str], screen: Screen, start: Optional[Start], check: Function) -> int:
    """Does what the words say; gives the exit code."""
    ini, others = split_ini(words)
    how = how_to_start(words[:len(words) - len(others)])
    words = others
    if words[:1] and words[0] in ALIASES:
        words = ALIASES[words[0]].split() + words[1:]
    if words[:1] == ['--help'] and words[1:]:
        verb = ALIASES.get(words[1], words[1]).split(' ')[0]
        words = ['--help'] if verb.startswith('-') else [verb, '--help']
    if words and words[0].startswith('-'):
        return run_option(words, screen)
    if words:
        return run_verb(ini, words, screen, check, how)
    if start is None:
        screen.err.write(USAGE.format(me=program_name()))
        return 2
    return start(ini)


def end_interrupted() -> int:
    """Ends by the SIGINT itself, where there are such: a shell's loop goes on after a program that exits,
    whatever its code. A shell's $? is INTERRUPTED either way."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if os.name == 'posix':
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return INTERRUPTED


def main(argv: List[str], start: Optional[Start] = None,
         check: Function = cliagent.do_check) -> int:
    """The command line; gives the exit code.

    start    runs the host agent of an ini file (None: on the defaults)
    check    what the verb of that name does
    """
    screen = Screen()
    try:
        # Python reads arguments by the locale; here they are UTF-8, as in XML-RPC, or any bytes.
        words = [os.fsencode(word).decode('utf-8', 'surrogateescape') for word in argv]
        return run(words, screen, start, check)
    except KeyboardInterrupt:
        return end_interrupted()
    except agent.AgentError as error:
        screen.complain(str(error))
        return 1
    except OSError as error:           # what is still in the buffer has no reader, or no room, either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if has_no_reader(error):
            return 128 + 13
        screen.complain(('' if error.filename else 'standard output: ') + agent.sentence(error))
        return FAILED


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
