"""The verbs for the host agent itself: its state, its events, its API, and its preconditions.

What it is not: what `check` looks at (hostcheck.py). No threads, no locks.
"""

import collections
import contextlib
import json
import os
import sys
import time
from typing import Any, Callable, Deque, Dict, Iterator

import agent
from cliscreen import Screen, show_one, shown_time
from cliverbs import JSON, Verb, argument, read_count, read_seconds, switch
from faults import DeadlineExceeded, InvalidParams
from hostclient import Client
from rpc import Binary, xml_number

EVENTS_SHOWN = 100
MOST_EVENTS = 100000           # of those since a time


def do_check(host: Client, screen: Screen, args: Any) -> int:
    """Lets the host agent's program look, which alone knows what it needs."""
    import subprocess  # needed here alone
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'vmhost.py')
    ini = [args.ini] if args.ini else []
    return subprocess.call([sys.executable, program] + ini + ['check'] + ['--json'] * args.json)


# What agentInfo calls shorter than a person would.
LABELS = {'proto': 'protocol', 'vms': 'agents', 'cmds': 'unfinished commands', 'aint': 'unknown words',
          'untrusted': 'untrusted words'}


def do_status(host: Client, screen: Screen, args: Any) -> int:
    """The host agent's own state; or a link to its page in the browser, which opens it once."""
    if args.open:
        link = host.call('getStatusLink')
        screen.say(link)
        open_in_browser(host.folder, link)
        return 0
    info = host.call('agentInfo')
    if args.json:
        return show_one(screen, info, True)
    return show_one(screen, {LABELS.get(name, name): value for name, value in info.items()}, False)


STOPPING = 30.0                # seconds in which a host agent that was told to end should have done so
STOP_LOOK = 0.05               # seconds between two looks whether it has


def do_shutdown(host: Client, screen: Screen, args: Any) -> int:
    """Ends the host agent, and waits until it has ended: it takes the files that tell where it is along."""
    host.call('stopHost')
    deadline = time.monotonic() + STOPPING
    told = [os.path.join(host.folder, name) for name in ('xmlrpc.address', 'broker.address')]
    while any(map(os.path.exists, told)):
        if time.monotonic() > deadline:
            raise DeadlineExceeded('the host agent was told to end, and has not within %.0f s' % STOPPING)
        time.sleep(STOP_LOOK)
    return 0


REDIRECT = """<!DOCTYPE html>
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url=%s">
<title>vmhost</title>
<p><a href="%s">The status page</a>
"""


def open_in_browser(folder: str, link: str) -> None:
    """Opens the link, by a file that leads there and that only the folder's owner can read.

    The link holds a key, and everybody can see what a browser was started with.
    """
    import pathlib  # needed here alone
    import webbrowser
    path = os.path.join(folder, 'open-status.html')
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'w') as file:
        file.write(REDIRECT % (link, link))
        if os.name == 'posix' and os.geteuid() == 0:       # root, at another user's host agent
            os.fchown(file.fileno(), os.stat(folder).st_uid, -1)
    webbrowser.open(pathlib.Path(os.path.abspath(path)).as_uri())


def do_events(host: Client, screen: Screen, args: Any) -> int:
    """What happened: the last events, and what comes."""
    host, shown = host.patient(screen.complain) if args.follow else host, []
    names, since = set(host.matching_each(args.vm)), 0.0
    if args.since is not None:
        since = time.time() - args.since
    number = args.number if args.number is not None else MOST_EVENTS if since else EVENTS_SHOWN
    found = events(host, number, args.follow) if not (names or since) else meant_events(
        host, number, args.follow, lambda event: event['time'] >= since and (
            not names or event['vm'] in names))
    for event in found:
        if not args.json:
            screen.say(event_line(screen, event))
        elif args.follow:
            screen.json(event, None)
        else:
            shown.append(event)
    if args.json:
        screen.json(shown)
    return 0


def events(host: Client, number: int, follow: bool) -> Iterator[Dict[str, Any]]:
    """So many of the last, however few one call tells; then, to follow, what comes. Raises VMHostError."""
    answer = host.call('getEvents', -number or -1)
    told = answer['events'] if number else []
    while told or follow:
        yield from told
        number -= len(told)
        if number <= 0 and not follow:
            break
        answer = host.call('getEvents', answer['last'], 60 if follow else 0)
        told = answer['events']


def meant_events(host: Client, number: int, follow: bool, is_meant: Callable[[Dict[str, Any]], bool]
                 ) -> Iterator[Dict[str, Any]]:
    """The same of those that are meant. Raises VMHostError."""
    past: Deque[Dict[str, Any]] = collections.deque(maxlen=number)
    answer = host.call('getEvents', 0)
    while answer['events']:
        past.extend(filter(is_meant, answer['events']))
        answer = host.call('getEvents', answer['last'])
    yield from past
    while follow:
        answer = host.call('getEvents', answer['last'], 60)
        yield from filter(is_meant, answer['events'])


def event_line(screen: Screen, event: Dict[str, Any]) -> str:
    """An event as a line of text."""
    words = [shown_time(event['time']), '%-15s' % event['type'], event['vm'], event['cmdId'], event['text']]
    return ' '.join(agent.printable(word) for word in words if word)


def do_call(host: Client, screen: Screen, args: Any) -> int:
    """Calls a method of the API; what it answers, as JSON."""
    answer = host.call(args.method, *[read_argument(text) for text in args.arguments])
    if args.raw and isinstance(answer, Binary):
        screen.out.buffer.write(answer.data)
    elif args.raw and isinstance(answer, str):
        screen.say(answer)
    else:
        screen.json(answer)
    return 0


def read_argument(text: str) -> Any:
    """An argument of `call`: JSON, or else text. Raises InvalidParams where it begins like JSON."""
    try:
        # Numbers that XML-RPC's integers can't hold go as doubles, as in the host's answers.
        return json.loads(text, parse_int=lambda digits: xml_number(int(digits)))
    except ValueError as error:
        if text[:1] in ('{', '[', '"'):
            raise InvalidParams('%s is not valid JSON: %s' % (text, error))
        return text


VERBS = [
    Verb('status', do_status, 'show the state of the host agent', [
        switch('--open', help='open the status page in a browser'), JSON]),
    Verb('check', do_check, 'check the prerequisites, and say how to fix what is missing', [JSON]),
    Verb('events', do_events, 'show the event log', [
        argument('vm', metavar='VM', nargs='*', help='only those of these, or of those that match a pattern'),
        switch('-f', '--follow', help='wait for new events, until Ctrl-C'), JSON,
        argument('-n', '--number', metavar='N', type=read_count,
                 help='how many past ones (default: %d; with --since, all)' % EVENTS_SHOWN),
        argument('--since', metavar='SEC', type=read_seconds, help='those of so long (90, 5m, 2h)')]),
    Verb('shutdown', do_shutdown, 'end the host agent; commands and VMs go on', []),
    Verb('call', do_call, 'call a method of the API, and print its answer as JSON', [
        argument('method', metavar='METHOD', help='`call -r help` describes them'),
        argument('arguments', metavar='JSON', nargs='*', help='JSON values; anything else is taken as text'),
        switch('-r', '--raw', help='print text or binary data as it is')], (
            'call listCmds \'{"vm": "web1", "state": "running"}\'', 'call -r help runCmd',
            'call -r screenshot web1 > web1.png')),
]
