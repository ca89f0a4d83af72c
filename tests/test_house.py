"""The house: its rooms, which imports which, and how large they are.

CONTRIBUTING.md lists the rooms from the roof to the cellar, each with what it imports; here that list is
held against the code. ``python tests/test_house.py`` brings it up to date.
"""

import ast
import functools
import glob
import os
import re

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MOST_LINES = 2500              # of a module
MOST_OF_A_CLASS = 450          # lines
CELLAR = {'agent', 'faults', 'protocol', 'rpc'}        # that any room may import: the list leaves them out
ROOMS = {os.path.basename(path)[:-len('.py')]: path for path in glob.glob(os.path.join(TOP, '*.py'))}
A_ROOM = re.compile(r'^    (\w+)\.py +(\S.*?)(?: +→ (.+))?$', re.MULTILINE)


@functools.lru_cache(None)
def tree_of(room):
    with open(ROOMS[room], encoding='utf-8') as file:
        return ast.parse(file.read())


@functools.lru_cache(None)
def imports_of(room, everything=False, at_once=False):
    """The rooms that a room imports, anywhere in it; ``at_once``: as soon as it is imported itself;
    ``everything``: all modules, not rooms alone."""
    names = set()
    for node in tree_of(room).body if at_once else ast.walk(tree_of(room)):
        if isinstance(node, ast.Import):
            names.update(alias.name.split('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split('.')[0])
    return frozenset(names if everything else names & set(ROOMS))


def listed():
    """[(room, what it is for, the rooms that it may import)] as CONTRIBUTING.md has them, from the top."""
    with open(os.path.join(TOP, 'CONTRIBUTING.md'), encoding='utf-8') as file:
        return [(room, job, set(re.findall(r'\w+', arrows)))
                for room, job, arrows in A_ROOM.findall(file.read())]


def test_every_room_is_listed_with_its_arrows():
    assert {room: arrows for room, _, arrows in listed()} == {
        room: imports_of(room) - CELLAR for room in ROOMS}


def test_arrows_run_down_only():
    order = [room for room, _, _ in listed()]
    up = [(room, other) for place, room in enumerate(order) for other in imports_of(room)
          if other in order[:place + 1]]
    assert not up


def test_what_no_room_may_import():
    assert not imports_of('protocol') and not imports_of('agent')
    assert reachable('stompbroker') <= {'stompbroker', 'stompsession', 'stompoutbox', 'stompqueues',
                                        'protocol', 'agent'}
    host = {'vmhost'} | {room for room in ROOMS if room.startswith('host')
                         and room not in ('hostcli', 'hostclient', 'hostconfig')}
    for room in reachable('hostcli') | reachable('vmguest'):
        assert not imports_of(room, at_once=True) & (host | {'stompbroker', 'hypervisor'}), room
    assert not imports_of('vmboinc') & host            # it speaks XML-RPC to a host agent, anywhere in it
    assert {room for room in ROOMS if 'vboxapi' in imports_of(room, everything=True)} == {'virtualbox'}


def reachable(room):
    """The room, and all that is loaded with it."""
    found, to_look_at = {room}, [room]
    while to_look_at:
        for other in imports_of(to_look_at.pop(), at_once=True) - found:
            found.add(other)
            to_look_at.append(other)
    return found


def test_no_room_is_too_large():
    sizes = {}
    for room, path in ROOMS.items():
        with open(path, encoding='utf-8') as file:
            sizes[room] = sum(1 for _ in file)
    assert {room: size for room, size in sizes.items() if size > MOST_LINES} == {}


def test_no_class_is_too_large():
    large = {}
    for room in ROOMS:
        for node in ast.walk(tree_of(room)):
            if isinstance(node, ast.ClassDef):
                last = max(child.lineno for child in ast.walk(node) if hasattr(child, 'lineno'))
                if last - node.lineno >= MOST_OF_A_CLASS:
                    large['%s.%s' % (room, node.name)] = last - node.lineno + 1
    assert large == {}


def bring_up_to_date():
    """Writes each room's arrows into CONTRIBUTING.md, each room once; new ones come last, to be moved up."""
    path, seen = os.path.join(TOP, 'CONTRIBUTING.md'), set()

    def line(room, job):
        arrows = ', '.join(sorted(imports_of(room) - CELLAR))
        return '    %-18s %s%s' % (room + '.py', job, arrows and ' → ' + arrows)

    def replaced(found):
        room, job = found.group(1), found.group(2)
        if room in seen or room not in ROOMS:
            return ''
        seen.add(room)
        return line(room, job) + '\n'
    with open(path, encoding='utf-8') as file:
        text = re.sub(A_ROOM.pattern + r'\n', replaced, file.read(), flags=re.MULTILINE)
    new = ''.join(line(room, '?') + '\n' for room in sorted(set(ROOMS) - seen))
    with open(path, 'w', encoding='utf-8') as file:
        file.write(text.replace('\n<!-- /rooms -->', new + '\n<!-- /rooms -->'))


if __name__ == '__main__':
    bring_up_to_date()
