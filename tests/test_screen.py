"""What verbs show: tables in terminals of any width."""

import io

import pytest

import clicommands
import clifollow
import climachines
import hostcli
from cliscreen import Screen, cells

LS = ['NAME', 'STATE', 'AGENT', 'ADDRESS', 'COMMANDS', 'ID', 'SEEN', 'CPUS', 'MEMORY', 'PYTHON', 'CLOCK',
      'SYSTEM']
PS = ['ID', 'VM', 'STATE', 'SUBMITTED', 'TIME', 'CPU', 'MEMORY', 'PROGRESS', 'COMMAND']
MACHINE = ['lab01', 'Running', 'alive', '192.168.56.101', '12', '08:00:27:AA:BB:CC', '12 s ago', '64',
           '23.5 GiB', '3.11.7', '-0.0 s', 'Linux 6.18.44-generic, x86_64']
COMMAND = ['20261129-051224-d7b9e3a3', 'node.example.org', 'signaled 15', '05:12:24', '2 min', '12.5 s',
           '110 MiB', '42 %', 'sh -c \'sleep 1000; a long line that goes on\'']


class Paper(io.StringIO):
    encoding = 'utf-8'


def shown(headings, row, width, **options):
    screen = Screen()
    screen.out, screen.width = Paper(), width
    screen.table(headings, [row, row], **options)
    return screen.out.getvalue().splitlines()


LISTS = [(LS, MACHINE, {'spare': climachines.SPARE, 'elastic': ['SYSTEM']}),
         (PS, COMMAND, {'spare': clicommands.SPARE, 'elastic': clicommands.ELASTIC})]


@pytest.mark.parametrize('headings, row, options', LISTS)
def test_no_line_is_wider_than_the_terminal(headings, row, options):
    for width in list(range(24, 200)):
        lines = shown(headings, row, width, **options)
        assert max(map(cells, lines)) <= width
        assert lines[1].split()[0] == row[0]


@pytest.mark.parametrize('headings, row, options', LISTS)
def test_what_is_shown_is_whole(headings, row, options):
    for width in (80, 100, 160):
        names = [name for name in headings if name in shown(headings, row, width, **options)[0].split()]
        line = shown(headings, row, width, **options)[1]
        for name in names:
            if name not in options['elastic']:
                assert row[headings.index(name)] in line


def test_what_matters_has_room_at_80_columns():
    names = shown(LS, MACHINE, 80, **LISTS[0][2])[0].split()
    assert names == ['NAME', 'STATE', 'AGENT', 'ADDRESS', 'COMMANDS', 'SEEN', 'MEMORY', 'SYSTEM']
    names = shown(PS, COMMAND, 80, **LISTS[1][2])[0].split()
    assert names == ['ID', 'VM', 'STATE', 'CPU', 'PROGRESS', 'COMMAND']


LONG = 'a-machine-whose-name-has-exactly-sixty-four-characters-all-told1'


@pytest.mark.parametrize('headings, row, options', LISTS)
def test_a_long_name_leaves_the_others_their_room(headings, row, options):
    """It is cut in its middle: its end may be all that tells it from another's."""
    for width in (80, 100, 160):
        usual = shown(headings, row, width, **options)
        lines = shown(headings, [LONG] + row[1:], width, **options)
        assert max(map(cells, lines)) <= width
        name = lines[1].split()[0]
        assert name == LONG or len(name) >= 32 and '…' in name and LONG.startswith(name.split('…')[0])
        assert LONG.endswith(name.split('…')[-1][-15:])
        if width == 80:
            assert set(lines[0].split()) >= {'STATE', 'COMMAND' if 'COMMAND' in headings else 'AGENT'}
        if width == 160:
            assert lines[0].split() == usual[0].split()


def test_the_one_long_name_is_cut_and_the_others_are_whole():
    screen = Screen()
    screen.out, screen.width = Paper(), 80
    names = ['NAME', 'STATE', 'AGENT', 'ADDRESS', 'COMMANDS']
    rows = [[name, 'Running', 'alive', '192.168.56.101', '0'] for name in (LONG, 'lab01', 34 * 'x')]
    screen.table(names, rows, climachines.SPARE)
    lines = screen.out.getvalue().splitlines()
    assert [line.split()[1:] for line in lines] == [names[1:]] + [row[1:] for row in rows]
    assert '…' in lines[1] and lines[2].startswith('lab01 ') and lines[3].startswith(34 * 'x' + ' ')


def test_to_no_terminal_all_is_shown_whole():
    assert shown(LS, MACHINE, 0, **LISTS[0][2])[1].split() == ' '.join(MACHINE).split()


def test_info_of_a_command_is_one_screen():
    usage = dict({'ru_%d' % n: 0 for n in range(14)}, ru_utime=1.5, ru_maxrss=1828)
    status = {'state': 'exited', 'end': 'exited 4', 'pid': 0, 'processes': 0, 'progress': '', 'error': '',
              'wall': 0, 'outSize': 2000, 'errSize': 0, 'resources': {}}
    results = {'started': 1.0, 'ended': 3.5, 'wall': 2.5, 'resources': usage}
    found = {'cmdId': 'c', 'vm': 'one', 'cmd': 'sh', 'args': ['-c', 'exit 4'], 'path': '', 'env': {},
             'options': {}, 'submitted': 1.0, 'client': 'uid 0', 'executions': ['c'], 'status': status,
             'results': results}
    info = clicommands.described(found)
    assert info['command'] == "sh -c 'exit 4'" and info['state'] == 'exited 4'
    assert info['resources'] == {'user time': '1.50 s', 'peak memory': '1.8 MiB'}
    assert info['output'] == '2.0 KiB'
    assert 'environment' not in info and len(info) < 20
    many = dict(found, executions=['c@a', 'c@b'], results='',
                status={'c@a': status, 'c@b': dict(status, state='running', end='')})
    assert clicommands.described(many)['executions'] == {'a': 'exited 4', 'b': 'running'}


def test_help_fits_into_80_columns(monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    monkeypatch.setattr('sys.argv', ['vmhost.py'])
    texts = [hostcli.overview()] + [hostcli.Parser(verb).format_help() for verb in hostcli.VERBS.values()]
    assert [line for text in texts for line in text.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize('state, error, reason', [
    ('exited', '', ': the command wrote more than output_limit'),
    ('timeout', 'ETIME: ran longer than its timeout, 1 s', ': the command wrote more than output_limit'),
    ('exited', 'ENOENT: what it wrote is lost, as somebody deleted /spool/c/out', ''),
    ('failed', 'ENOSPC: No space left on device: /spool/c/out', '')])
def test_output_that_is_missing_is_not_blamed_on_a_limit(monkeypatch, state, error, reason):
    told = []
    monkeypatch.setattr(Screen, 'complain', lambda self, text: told.append(text))
    assert clifollow.tell_cut(Screen(), {'state': state, 'error': error, 'out-truncated': True}, 'node1')
    assert told == ['node1: stdout was truncated' + reason]
