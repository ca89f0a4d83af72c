"""What a verb of the command line is made of: its name, its arguments, what it does, and what is said of it.

What it is not: the verbs (climachines.py, clicommands.py, clifiles.py, cliagent.py), or the program
(hostcli.py). Threads: ``call``, which waits for an answer while progress is shown. No locks.
"""

import argparse
import re
import time
from typing import Any, Callable, Dict, List, NamedTuple, Tuple, TypeVar

import agent
from cliscreen import PROGRESS_EVERY, Screen, shown_span
from faults import VMHostError
from hostclient import Client, NoHost

Function = Callable[[Client, Screen, Any], int]     # what a verb does; gives the exit code
Argument = Tuple[Tuple[str, ...], Dict[str, Any]]

FAILED = 255                   # exit code of `run` for an error that isn't the command's


class Verb(NamedTuple):
    """A verb: its name, what does it, what is said of it, its arguments, and some examples.

    An argument is what argparse's add_argument takes. Its metavar tells the completion what it is.
    """
    name: str
    function: Function
    help: str
    arguments: List[Argument]
    examples: Tuple[str, ...] = ()


def argument(*names: str, **options: Any) -> Argument:
    """One argument of a verb."""
    return names, options


def switch(*names: str, **options: Any) -> Argument:
    """An option that is there or not."""
    return names, dict(options, action='store_true')


Value = TypeVar('Value')


def as_in_ini(text: str, kind: Callable[[str], Value]) -> Value:
    """A value as the ini files have it. Raises ArgumentTypeError."""
    try:
        return kind(text)
    except ValueError as expected:
        raise argparse.ArgumentTypeError('%s: expected %s' % (text, expected))


def read_seconds(text: str) -> float:
    """A duration. Raises ArgumentTypeError."""
    return as_in_ini(text, agent.duration)


def read_count(text: str) -> int:
    """How many. Raises ArgumentTypeError."""
    if not re.fullmatch('[0-9]{1,9}', text):
        raise argparse.ArgumentTypeError('%s: expected a whole number, from 0 on' % text)
    return int(text)


JSON = switch('--json', help='print JSON')
VM = argument('vm', metavar='VM', help='name or id')
VMS = argument('vm', metavar='VM', help='name, id, or a pattern such as \'web*\'')
ID = argument('id', metavar='ID', help='a command\'s id, as printed by `run -d` and `ps`')
IDS = argument('ids', metavar='ID', nargs='+', help='ids of commands, as printed by `run -d` and `ps`')


def show_list(screen: Screen, as_json: bool, lines: List[str], found: Any) -> int:
    """Prints what was found as JSON, or as these lines; gives the exit code."""
    if as_json:
        screen.json(found)
    else:
        for line in lines:
            screen.say(agent.printable(line))
    return 0


def life(vm: Dict[str, Any]) -> str:
    """Of a VM's agent, in a word: who said that it goes has left, and isn't missed."""
    return 'left' if vm.get('left') else str(vm['agent'])


def last_heard(vm: Dict[str, Any]) -> str:
    """How long ago its agent was, in words."""
    return shown_span(max(0, time.time() - vm['lastSeen'])) + ' ago' if vm['lastSeen'] else 'never'


def for_each(screen: Screen, names: List[str], do: Callable[[str], Any]) -> int:
    """Does it for each name; one that fails holds up no other. The exit code: 1 where one did."""
    code = 0
    for name in names:
        try:
            do(name)
        except NoHost:
            raise
        except VMHostError as error:
            is_named = len(names) == 1 or name in str(error)
            screen.complain(str(error) if is_named else '%s: %s' % (name, error))
            code = 1
    return code


# --- calls that take long --------------------------------------------------------------------

def watch(host: Client, screen: Screen, vm: str, method: str, *args: Any) -> Any:
    """Calls a method that may take long; meanwhile a terminal shows how far the hypervisor is.

    Ctrl-C ends the waiting alone: a hypervisor stopped in the middle would leave worse behind.
    """
    try:
        return call_watched(host, screen, vm, method, *args)
    except KeyboardInterrupt:
        screen.complain('%s: the host agent continues; `ls` shows the progress' % vm)
        raise


def call_watched(host: Client, screen: Screen, vm: str, method: str, *args: Any) -> Any:
    """What the method answers; where there is a terminal, with a line of progress until it does."""
    if not screen.shows_progress:
        return host.call(method, *args)
    import queue  # needed here alone
    import threading
    answers: queue.Queue = queue.Queue()

    def work() -> None:
        try:
            answers.put((host.call(method, *args), None))
        except VMHostError as error:
            answers.put((None, error))
    threading.Thread(target=work, name='call', daemon=True).start()
    begin, looker = time.monotonic(), host.another()
    while True:
        try:
            answer, error = answers.get(timeout=PROGRESS_EVERY)
            break
        except queue.Empty:
            screen.progress(job_line(looker, vm, time.monotonic() - begin))
    screen.progress('')
    if error is not None:
        raise error
    return answer


def job_line(host: Client, vm: str, seconds: float) -> str:
    """How far the hypervisor is with a VM."""
    line = '%s: %s' % (agent.printable(vm), shown_span(seconds))
    for job in host.call('agentInfo')['jobs']:
        if job['vm'] == vm and job['percent']:
            line += ', %d %%, %s left %s' % (job['percent'], shown_span(
                seconds * (100 - job['percent']) / job['percent']), agent.printable(job['text']))
    return line
