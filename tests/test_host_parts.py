"""The host's parts by themselves: journal, guests, commands, trust, marshalling. No sockets."""

import math
import os
import sqlite3
import threading
import time
import types
import xmlrpc.client
from unittest import mock

import helpers
import pytest
from hypothesis import given
from hypothesis import strategies as st

import agent
import climachines
import faults
import hostapi
import hostcommands
import hostconfig
import hostcontrol
import hostguests
import hostjournal
import hostrequests
import hosttrust
import hostworkers
import protocol
import rpc
import vmhost
from protocol import Message


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def journal(tmp_path):
    journal = hostjournal.Journal(str(tmp_path / 'journal'))
    yield journal
    journal.close()


@pytest.fixture
def clock():
    return Clock()


REQUEST = {'cmd': 'true', 'args': [], 'env': {}, 'path': '', 'options': {}}


def results_of(cmd_id, **changes):
    results = dict(hostcommands.lost_results(cmd_id, ''), state='exited', finished=True, exitCodeOrSignal=0)
    return dict(results, **changes)


def new_command(commands, names=('a',), multicast=False, queued=False, **options):
    guests = [hostguests.Guest(name.upper(), name) for name in names]
    return commands.new(dict(REQUEST, options=options), names[0], multicast, guests, 'tester',
                        guests if queued else ())


# --- journal ---

def test_a_log_is_synced_once_for_what_was_committed(journal, monkeypatch):
    synced = []
    monkeypatch.setattr(agent, 'sync', lambda path: synced.append(path))

    def write(durable):
        with journal.writing(durable) as transaction:
            transaction.event('something')
    write(False)
    write(False)
    journal.sync()
    assert len(synced) == 1
    journal.sync()
    write(True)
    journal.sync()
    assert len(synced) == 1         # a durable commit brings those before it along
    write(False)
    with journal.writing() as transaction:
        transaction.execute('UPDATE executions SET fetched = 1')        # of no row: SQLite writes nothing
    journal.sync()
    assert len(synced) == 2


def test_a_log_that_could_not_be_synced_is_tried_again(journal, monkeypatch):
    with journal.writing(False) as transaction:
        transaction.event('something')
    with monkeypatch.context() as patch:
        patch.setattr(agent, 'sync', lambda path: os.stat('/nowhere'))
        with pytest.raises(hostjournal.JournalError):
            journal.sync()
    synced = []
    monkeypatch.setattr(agent, 'sync', lambda path: synced.append(path))
    journal.sync()
    assert synced == [journal.path + '-wal']


def test_a_transaction_is_all_or_nothing(journal):
    with pytest.raises(KeyError):
        with journal.writing() as transaction:
            transaction.event('lost-in-time')
            raise KeyError
    journal.event('kept')
    assert [event['type'] for event in journal.events_after(0, 0)['events']] == ['kept']


def test_waiting_for_an_event_ends_with_it(journal):
    found = []
    waiter = threading.Thread(target=lambda: found.append(journal.events_after(0, 30)))
    waiter.start()
    journal.event('news')
    waiter.join(10)
    assert found[0]['events'][0]['type'] == 'news'
    assert journal.events_after(found[0]['last'], 0) == {'last': found[0]['last'], 'events': []}


def test_closing_wakes_who_waits(tmp_path):
    journal = hostjournal.Journal(str(tmp_path / 'journal'))
    waiter = threading.Thread(target=journal.events_after, args=(0, 60))
    waiter.start()
    journal.close()
    waiter.join(10)
    assert not waiter.is_alive()


@pytest.mark.parametrize('damage', [b'no database at all' * 100, b''])
def test_a_damaged_journal_is_set_aside(tmp_path, damage, caplog):
    path = str(tmp_path / 'journal')
    journal = hostjournal.Journal(path)
    journal.event('before')
    journal.close()
    with open(path, 'r+b') as file:
        file.write(damage)
    journal = hostjournal.Journal(path)
    try:
        assert bool(journal.events_after(0, 0)['events']) == (not damage)
        aside = [name for name in os.listdir(str(tmp_path)) if 'corrupt' in name]
        assert bool(aside) == bool(damage)
        assert not damage or aside[0] in caplog.text
    finally:
        journal.close()


def test_damage_that_sqlite_has_no_words_for(tmp_path):
    """It names the table, in what is no UTF-8 then."""
    path = str(tmp_path / 'journal')
    hostjournal.Journal(path).close()
    with open(path, 'rb') as file:
        data = file.read()
    with open(path, 'wb') as file:
        file.write(data.replace(b'CREATE TABLE orphans', b'CREATE\xd6\xd6ABLE orphans')
                   .replace(b'orphans', b'orph\xd6ns'))
    hostjournal.Journal(path).close()
    assert [name for name in os.listdir(str(tmp_path)) if 'corrupt' in name]


@pytest.mark.parametrize('change', [
    "UPDATE guests SET facts = '{'", "UPDATE guests SET facts = '[1]'", "UPDATE secrets SET secret = 'x'",
    "UPDATE commands SET request = ''", "UPDATE executions SET results = '5', ended = 1",
    'PRAGMA user_version = -5'])
def test_rows_that_are_damaged_hold_up_no_start(tmp_path, change, caplog):
    """SQLite's own check doesn't look into texts."""
    path = str(tmp_path / 'journal')
    write_journal(path, hostjournal.JOURNAL_FORMAT)
    damaged = sqlite3.connect(path)
    damaged.execute(change)
    damaged.commit()
    damaged.close()
    journal = hostjournal.Journal(path)
    try:
        guests, trust = hostguests.Guests(30), hosttrust.Secrets(journal)
        for known in journal.guests():
            guests.remember(*known)
            assert guests.find('a').chirp_port == 0
        assert (trust.pinned('a') == bytes.fromhex('1' * 64)) is ('SET secret' not in change)
        assert trust.pinned('a') and ('forget' in caplog.text) is ('SET secret' in change)
        commands = hostcommands.Commands(journal)
        for call in (lambda: commands.request('c'), lambda: journal.executions('1')[0].answer()):
            try:
                call()
            except (hostjournal.JournalError, faults.NoSuchCommand, IndexError) as error:
                assert 'damaged' in str(error) or 'user_version' in change
    finally:
        journal.close()


def test_a_newer_journal_is_refused(tmp_path):
    path = str(tmp_path / 'journal')
    connection = sqlite3.connect(path)
    connection.execute('PRAGMA user_version = 99')
    connection.close()
    with pytest.raises(hostjournal.JournalError, match='newer'):
        hostjournal.Journal(path)


def write_journal(path, number):
    """As a host of that format wrote it."""
    old = sqlite3.connect(path)
    schema = '\n'.join(line for line in hostjournal.SCHEMA.splitlines() if not any(
        new in line for new in ('of_cmd ', 'by_submission', 'TABLE secrets', 'TABLE transfers')))
    old.executescript(schema.replace(" expires REAL NOT NULL DEFAULT 0, line TEXT NOT NULL DEFAULT '',", ''))
    for older in range(1, number):
        old.executescript(hostjournal.UPGRADES[older])
    old.execute("INSERT INTO commands VALUES ('c', 'a', 0, '{\"cmd\": \"true\"}', 1, 'x')")
    old.execute("INSERT INTO executions (cmd_id, vm_id, vm, multicast, cmd, state, submitted) "
                "VALUES ('c', 'a', 'a', 0, 'true', 'sent', 1)")
    old.execute("INSERT INTO guests VALUES ('a', 'a', '1.2.3.4', 'boot', 'session', '{\"cpus\": 2}', 1)")
    old.execute("INSERT INTO events VALUES (1, 1, 'guest-hello', 'a', '', 'x')")
    if number >= 3:
        old.execute("INSERT INTO secrets VALUES ('a', ?, 1)", ('1' * 64,))
    old.execute('PRAGMA user_version = %d' % number)
    old.commit()
    old.close()


@pytest.mark.parametrize('number', range(1, hostjournal.JOURNAL_FORMAT + 1))
def test_an_older_journal_is_brought_up_to_date(tmp_path, number):
    path = str(tmp_path / 'journal')
    write_journal(path, number)
    journal = hostjournal.Journal(path)
    try:
        assert journal.command('c')['client'] == 'x'
        assert journal.rows('PRAGMA user_version') == [(hostjournal.JOURNAL_FORMAT,)]
        made = journal.rows('SELECT name FROM sqlite_master')
        assert {('by_submission',), ('secrets',), ('transfers',)} <= set(made)
        assert len(journal.executions('expires = 0 AND line = ?', '')) == 1
    finally:
        journal.close()


def test_torn_pages_are_found_at_the_start(tmp_path, caplog):
    path = str(tmp_path / 'journal')
    journal = hostjournal.Journal(path)
    secrets = hosttrust.Secrets(journal)
    secrets.pin('one', b'1' * 32)
    with journal.writing() as transaction:
        for _ in range(2000):
            transaction.event('filler', text='x' * 200)
    journal.close()
    with open(path, 'r+b') as file:
        file.seek(4096 * 30)
        file.write(os.urandom(4096 * 3))
    journal = hostjournal.Journal(path)
    try:
        assert 'set aside' in caplog.text
        assert hosttrust.Secrets(journal).pinned('one') == b'1' * 32       # these could still be read
    finally:
        journal.close()


def test_old_results_are_let_go(journal):
    commands = hostcommands.Commands(journal)
    old, executions = new_command(commands)
    commands.finish(executions[0], results_of(old), True)
    running, _ = new_command(commands)
    assert commands.forget_before(0) == (0, True)
    assert commands.find(old)
    assert commands.forget_before(executions[0].ended + 1) == (1, True)
    with pytest.raises(faults.NoSuchCommand):
        commands.find(old)
    assert commands.find(running)


# --- guests ---

def add(guests, id, name='n', session='s'):
    return guests.add(id, name, '10.0.0.1', 'boot', session, {}, 0.0)


def test_liveness(clock):
    guests = hostguests.Guests(30, clock)
    guest, news = add(guests, 'A')
    assert news and guest.agent == 'alive'
    clock.now += 30.5
    assert [(g.id, state) for g, state in guests.tick(lambda vm: False)] == [('A', 'late')]
    assert guests.heard('A') and guest.agent == 'alive'
    clock.now += 46
    assert [state for _, state in guests.tick(lambda vm: False)] == ['lost']
    assert guests.on_list() == [] and not guests.heard('A')
    assert guests.find('n') is guest
    assert add(guests, 'A')[1]


def test_a_name_stays_its_owners(clock):
    guests = hostguests.Guests(30, clock)
    owner = add(guests, 'A', 'second')[0]
    assert guests.find('second') is owner and guests.owner_of('second') == 'A'
    assert guests.find('SECOND') is None
    guests.gone('A')
    assert add(guests, 'B', 'second')[0].name == 'second-B' and guests.find('second') is owner
    assert add(guests, 'C', 'A')[0].name == 'A-C'           # nor is it called by another's id
    guests.forget('A')
    assert add(guests, 'B', 'second')[0].name == 'second'


def test_the_hypervisors_name_wins(clock):
    guests = hostguests.Guests(30, clock)
    guest, vm = add(guests, 'A', 'web')[0], add(guests, '0A:00:00:00:00:09', 'x')[0]
    guests.rename(vm, 'web')
    assert guests.find('web') is vm is guests.find('0a:00:00:00:00:09') and guest.name == 'web-A'


def test_a_mac_is_no_name():
    assert hosttrust.read_name('0a:00:00:00:00:09') == ''
    assert hosttrust.read_name('a@b\n*') == 'ab*'


@pytest.mark.parametrize('text, name', [
    ('\uff57\uff45\uff42\uff11', 'web1'), ('we\u200bb1\ufeff', 'web1'), ('ga\u0308st', 'g\xe4st'),
    ('0\uff21:00:00:00:00:09', ''), ('\uff20\uff20x', 'x'), ('\ufdfa' * 900, None)])
def test_a_name_that_looks_like_anothers_is_the_same(text, name):
    found = hosttrust.read_name(text)
    assert found == name if name is not None else len(found) <= 64


@pytest.fixture
def trust(journal):
    return hosttrust.Trust(hosttrust.Secrets(journal), hostguests.Guests(30),
                           types.SimpleNamespace(other_machines=True, unsigned_guests=False, first_use=True))


def first_hello(trust, id, secret='1' * 64):
    message = protocol.Message('', 'HELLO', {}, {'nonce': '0' * 32, 'secret': secret})
    return trust.begin(id, message, 100, '')


def test_first_use_ends_where_as_many_are_known_as_may_be(trust, monkeypatch):
    monkeypatch.setattr(hostguests, 'GUESTS_KEPT', 2)
    guests = trust._guests
    for id in 'ab':
        assert trust.pin_told([first_hello(trust, id)])[0][0].proved
        guests.add(id, id, '', '', '', {}, 0)
    with pytest.raises(hosttrust.Refusal, match='forget'):
        first_hello(trust, 'c')
    assert first_hello(trust, 'a').proved and not trust.secrets.pinned('c')


def test_a_crowd_of_newcomers_is_one_durable_write(journal, trust):
    assert trust.secrets.host_key       # made when it is first asked for
    before = journal._commits
    crowd = [first_hello(trust, 'g%d' % number) for number in range(100)]
    assert journal._commits == before and not any(session.proved for session in crowd)
    assert [why for _, why in trust.pin_told(crowd)] == [''] * 100
    assert journal._commits == before + 1 and all(session.proved for session in crowd)
    assert hosttrust.Secrets(journal).pinned('g99')


def test_of_those_who_come_at_once_under_one_id_the_first_is_let_in(trust):
    first, other, again = [first_hello(trust, 'a', digit * 64) for digit in '121']
    assert [(session, bool(why)) for session, why in trust.pin_told([first, other, again])] \
        == [(first, False), (other, True), (again, False)]
    late = first_hello(trust, 'b')
    trust.secrets.pin('b', b'x' * 32)   # meanwhile, by hand
    assert 'forget b' in trust.pin_told([late])[0][1] and not late.proved
    assert trust.secrets.pinned('a') == bytes.fromhex('1' * 64) and trust.secrets.pinned('b') == b'x' * 32


def test_one_address_does_not_take_all_the_room(clock, monkeypatch):
    monkeypatch.setattr(hostguests, 'OF_ONE_ADDRESS', 2)
    guests = hostguests.Guests(30, clock)
    for id in 'ab':
        guests.check_share(id, '10.0.0.1')
        guests.add(id, id, '10.0.0.1', '', '', {}, 0)
    with pytest.raises(faults.Busy, match='10.0.0.1'):
        guests.check_share('c', '10.0.0.1')
    for id, ip in (('a', '10.0.0.1'), ('c', '10.0.0.2'), ('c', '')):
        guests.check_share(id, ip)


def test_the_suspended_and_the_forgiven_are_not_judged(clock):
    guests = hostguests.Guests(30, clock)
    add(guests, 'A')
    clock.now += 1000
    assert guests.tick(lambda vm: True) == []
    clock.now += 29
    assert guests.tick(lambda vm: True) == []
    clock.now += 29
    assert guests.tick(lambda vm: False) == []
    clock.now += 1000
    guests.forgive()
    assert guests.tick(lambda vm: False) == []


def test_the_second_of_a_name_gets_its_id(clock):
    guests = hostguests.Guests(30, clock)
    assert add(guests, 'A')[0].name == 'n'
    assert add(guests, 'B')[0].name == 'n-B'
    assert add(guests, 'A', session='again')[0].name == 'n'
    assert guests.find('n').id == 'A' and guests.find('n-B').id == 'B'


# --- commands ---

def test_a_command_ends_once(journal):
    commands = hostcommands.Commands(journal)
    cmd_id, [execution] = new_command(commands)
    assert commands.finish(execution, results_of(cmd_id), True)
    assert not commands.finish(execution, results_of(cmd_id, exitCodeOrSignal=5), True)
    assert commands.find(cmd_id)[0].answer()['exitCodeOrSignal'] == 0


def test_a_status_is_whole_though_the_command_ends_while_it_is_told(journal):
    commands = hostcommands.Commands(journal)
    cmd_id, [execution] = new_command(commands)
    commands.heard_status(execution, 'running', Message('', 'CMD_STATUS', {}, {'wall': 1}))
    machines = types.SimpleNamespace(
        is_suspended=lambda vm: not commands.finish(execution, results_of(cmd_id), True))
    status = hostcontrol.Control(commands, None, machines, None, 10 ** 6).status(execution)
    assert (status['state'], status['end'], status['ended'] > 0, status['wall']) == (
        'exited', 'exited 0', True, 0)


def test_who_sees_that_a_command_has_ended_sees_its_results(journal, monkeypatch):
    commands, seen = hostcommands.Commands(journal), []
    cmd_id, [execution] = new_command(commands)

    def watch(self, name, value):
        object.__setattr__(self, name, value)
        if self.ended:
            seen.append((self.answer().get('exitCodeOrSignal'), self.state, self.fetched))
    monkeypatch.setattr(hostjournal.Execution, '__setattr__', watch, raising=False)
    commands.finish(execution, results_of(cmd_id), False)
    assert set(seen) == {(0, 'exited', False)}


def test_what_is_not_answered_is_published_again(journal, clock):
    commands = hostcommands.Commands(journal, clock)
    cmd_id, [execution] = new_command(commands)
    begin = clock.now
    published = []
    commands.published(execution)
    while clock.now < begin + 200:
        clock.now += 1
        for due in commands.due():
            published.append(clock.now - begin)
            commands.published(due)
    assert published == [5, 15, 35, 75, 135, 195]
    commands.heard_status(execution, 'running', Message('', 'CMD_STATUS', {}, {'state': 'running'}))
    clock.now += 1000
    assert commands.due() == []


def test_setting_the_clock_makes_nothing_expire(journal, clock, monkeypatch):
    monkeypatch.setattr(hostcommands, 'time', mock.Mock(wraps=time, **{'time.return_value': 10 ** 9}))
    commands = hostcommands.Commands(journal, clock)
    _, [execution] = new_command(commands, expires=100)
    for now in 10 ** 9 + 7200, 10 ** 9 - 7200:
        hostcommands.time.time.return_value = now
        assert commands.expired() == [] and commands.time_left(execution) == 100
    clock.now += 99
    assert commands.expired() == []
    hostcommands.time.time.return_value = 10 ** 9 + 99      # the next host has that clock alone
    again = hostcommands.Commands(journal, clock)
    assert again.expired() == [] and again.time_left(again.open_ones()[0]) == 1
    clock.now += 1
    assert commands.expired() == [execution]
    assert hostcommands.Commands(journal, clock).time_left(new_command(commands)[1][0]) == float('inf')


def test_a_status_that_tells_no_time_does_not_stop_the_clock(journal, clock):
    commands = hostcommands.Commands(journal, clock)
    cmd_id, [execution] = new_command(commands)
    for told, wall in (({}, None), ({'wall': 2}, 2), ({}, 12), ({}, 22), ({'wall': 21}, 21)):
        commands.heard_status(execution, 'running', Message('', 'CMD_STATUS', {}, told))
        assert execution.status.get('wall') == wall
        clock.now += 10
    commands.heard_status(execution, 'stopped', Message('', 'CMD_STATUS', {}, {'state': 'stopped'}))
    assert execution.status['wall'] == 21


def test_a_state_that_can_not_be_journalled_is_not_logged_again_and_again(journal, monkeypatch, caplog):
    commands = hostcommands.Commands(journal)
    ids = []
    for _ in range(2):
        cmd_id, [execution] = new_command(commands)
        ids.append(cmd_id)
        commands.heard_status(execution, 'running', Message('', 'CMD_STATUS', {}, {}))
    caplog.set_level('INFO', 'vmhost')

    class ReadOnly:
        def __enter__(self):
            return mock.Mock()

        def __exit__(self, *exc):
            raise hostjournal.JournalError('read-only')
    with monkeypatch.context() as patched:
        patched.setattr(journal, 'writing', ReadOnly)
        for _ in range(3):
            with pytest.raises(hostjournal.JournalError):
                commands.write_states()
    assert 'running' not in caplog.text
    commands.write_states()
    commands.write_states()
    assert [record.getMessage() for record in caplog.records] == ['%s: running' % cmd_id for cmd_id in ids]


def test_a_host_that_restarts_knows_its_commands(tmp_path):
    path = str(tmp_path / 'journal')
    journal = hostjournal.Journal(path)
    commands = hostcommands.Commands(journal)
    sent, _ = new_command(commands)
    running, [execution] = new_command(commands)
    commands.heard_status(execution, 'running', Message('', 'CMD_STATUS', {}, {}))
    commands.write_states()
    journal.close()
    journal = hostjournal.Journal(path)
    again = hostcommands.Commands(journal)
    assert [again.find(cmd_id)[0].state for cmd_id in (sent, running)] == ['sent', 'running']
    assert again.count() == 2
    journal.close()


def test_a_multicast_has_an_execution_per_vm(journal):
    commands = hostcommands.Commands(journal)
    cmd_id, executions = new_command(commands, ('a', 'b'), multicast=True)
    assert [execution.key for execution in executions] == [cmd_id + '@a', cmd_id + '@b']
    assert commands.find(cmd_id + '@b') == [executions[1]]
    commands.finish(executions[1], results_of(cmd_id), True)
    assert [execution.key for execution in commands.find(cmd_id)] == [cmd_id + '@a', cmd_id + '@b']
    assert commands.find(cmd_id + '@b')[0].ended
    with pytest.raises(faults.NoSuchCommand):
        commands.find(cmd_id + '@c')
    with pytest.raises(faults.BadState):
        commands.forget(commands.find(cmd_id))


def test_orphans_are_bounded(journal, monkeypatch):
    monkeypatch.setattr(hostcommands, 'ORPHANS_KEPT', 3)
    commands = hostcommands.Commands(journal)
    for number in range(10):
        assert commands.keep_orphan('unknown-%d' % number, 'A', 'a', results_of('x'))
    commands.write_orphans()
    assert journal.rows('SELECT cmd_id FROM orphans ORDER BY cmd_id') == [
        ('unknown-7',), ('unknown-8',), ('unknown-9',)]


def test_one_guests_orphans_push_out_no_others(journal, monkeypatch):
    monkeypatch.setattr(hostcommands, 'ORPHANS_AT_ONCE', 150)
    commands = hostcommands.Commands(journal)
    commands.keep_orphan('honest', 'H', 'h', results_of('honest', out='kept'))
    large = results_of('x', out='x' * 10 ** 6)
    kept = [commands.keep_orphan('noise-%d' % number, 'N', 'n', large, noted=False)
            for number in range(200)]
    assert kept == [True] * 149 + [False] * 51
    commands.write_orphans()
    assert journal.orphans('honest')[0].answer()['out'] == 'kept'
    found = journal.rows("SELECT count(*), max(length(results)) < 20000 FROM orphans WHERE vm_id = 'N'")
    assert found == [(100, 1)]
    assert [event['cmdId'] for event in journal.events_after(0, 0)['events']] == ['honest']


def test_a_guest_that_comes_and_goes_does_not_fill_the_journal(clock):
    guests = hostguests.Guests(30, clock)
    guest = add(guests, 'A')[0]
    assert [guests.should_note(guest) for _ in range(25)] == [True] * 20 + [False] * 5
    clock.now += 30
    assert [guests.may_be_noted('A') for _ in range(5)] == [True] * 3 + [False] * 2


def test_what_ends_while_it_is_looked_at_is_shown_as_ended(journal):
    """Its end is in the journal a moment before the table of unfinished ones forgets it."""
    commands = hostcommands.Commands(journal)
    new_command(commands)
    with journal.writing() as transaction:
        transaction.execute('UPDATE executions SET state = ?, ended = 5', 'exited')
    assert [found.state for found in commands.list({'finished': True})] == ['exited']


@pytest.mark.parametrize('look', ['find', 'list'])
def test_what_ends_after_it_was_read_is_known_to_have_ended(journal, monkeypatch, look):
    commands = hostcommands.Commands(journal)
    cmd_id, executions = new_command(commands, ['a', 'b'], multicast=True)
    read = journal.executions

    def read_before_the_end(*args, **kwargs):
        found = read(*args, **kwargs)
        for execution in executions:
            commands.finish(execution, results_of(cmd_id), True)
        return found
    monkeypatch.setattr(journal, 'executions', read_before_the_end)
    found = commands.find(cmd_id) if look == 'find' else commands.list({})
    assert [(one.state, one.done.is_set()) for one in found] == [('exited', True)] * 2


@given(st.dictionaries(st.sampled_from([
    'cmd-id', 'state', 'finished', 'exitCodeOrSignal', 'resources', 'out', 'err64', 'out-offset',
    'out-size', 'wall', 'spool', 'error']), st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=3)))
def test_results_are_read_or_refused(keys):
    try:
        results = hostcommands.read_results(Message('', 'CMD_RESULTS', {'cmd-id': 'x'}, keys))
    except protocol.BadWord:
        return
    assert set(hostcommands.lost_results('x', '')) <= set(results)
    protocol.read_json(protocol.write_json(results))
    rpc.to_xml(hostapi.shown_results(results))


# --- what the API is asked ---

@pytest.mark.parametrize('options', [
    {'timeout': float('inf')}, {'timeout': float('nan')}, {'killAfter': -1}, {'inlineOutput': 1e19},
    {'nice': 10 ** 400}, {'limits': {'as': float('nan')}}, {'limits': {'cpu': 10 ** 400}},
    {'limits': {'nothing': 1}}, {'stdin': 5}, {'stdin64': '!'}, {'stdin64': 'zwölf'},
    {'stdin64': '', 'stdin': ''}, {'typo': 1}, {'endLeft': 2}, {'queue': -1}])
def test_options_that_no_guest_could_follow(options):
    with pytest.raises(faults.InvalidParams):
        hostrequests.read_options(options)


def test_what_an_option_should_be_is_said():
    for option, value, should in (
            ('timeout', '5m', 'a number'), ('user', 3, 'text'), ('nice', 1.5, 'a whole number'),
            ('endLeft', 2, 'true or false'), ('limits', [], 'a struct'), ('queue', 'no', 'true or false')):
        with pytest.raises(faults.InvalidParams, match='option %s: .* should be %s' % (option, should)):
            hostrequests.read_options({option: value})
    assert hostrequests.read_options({'leave': 1, 'envClear': 0}) == {'leave': True, 'env-clear': False}


def test_signals_by_their_names_and_numbers():
    read = [hostrequests.read_signal(name) for name in ('TERM', 'sigusr1', 9, '15', 'SIGRTMIN+3', 'rtmax',
                                                         '09', 'RTMAX-30')]
    assert read == ['TERM', 'USR1', '9', '15', 'RTMIN+3', 'RTMAX', '9', 'RTMAX-30']
    # A guest would drop the last ones.
    for name in ('FOO', '', '0', 0, 999, -1, True, 'TERM2', '\u0669', '\xb2', 'RTMIN+31', 'RTMAX-31'):
        with pytest.raises(faults.InvalidParams):
            hostrequests.read_signal(name)


@pytest.mark.parametrize('filter', [
    {'limit': 'x'}, {'limit': float('nan')}, {'limit': 1e30}, {'vm': ['g']}, {'vm': {}}, {'since': 'x'},
    {'finished': 'yes'}, {'typo': 1}])
def test_filters_that_mean_nothing(filter):
    with pytest.raises(faults.InvalidParams, match='listCmds'):
        hostcommands.read_filter(filter)


def test_null_is_as_good_as_nothing():
    message = Message('', 'HELLO', {'ip': '1.2.3.4'}, {'name': None, 'ip': None})
    assert message.text('name', 'none') == 'none' and message.text('ip') == '1.2.3.4'


def test_a_vm_without_a_disk():
    """0 isn't nothing: it asks for none."""
    typed = types.SimpleNamespace(memory=None, cpus=None, ostype='', network=None, diskSize=0, keep=False,
                                  acceptEula=True, forwards=None, bridged=None)
    assert climachines.hardware_of(typed) == {'diskSize': 0, 'ostype': '', 'acceptEula': True}


def test_where_vms_reach_the_broker():
    assert climachines.is_out_of_reach('127.0.0.1:61613', 'hostonly')
    assert not climachines.is_out_of_reach('127.0.0.1:61613', 'nat')
    assert not climachines.is_out_of_reach('192.168.56.1:61613', 'hostonly')


def test_a_slash_behind_an_image_stays():
    """As a file has none: else another one than was typed would be taken."""
    assert climachines.path_here('small.vdi') == os.path.abspath('small.vdi')
    assert climachines.path_here('small.vdi/') == os.path.join(os.path.abspath('small.vdi'), '')


# --- what XML-RPC can carry ---

values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                      lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


def carried(value):
    """What of a value arrives: neither control characters, nor None, big integers and infinity."""
    if value is None:
        return ''
    if isinstance(value, str):
        text = ''.join(char if char in '\t\n\r' or char >= ' ' and char not in '\ufffe\uffff'
                       and not '\ud800' <= char <= '\udfff' else '\ufffd' for char in value)
        return text.replace('\r\n', '\n').replace('\r', '\n')
    if isinstance(value, list):
        return [carried(item) for item in value]
    if isinstance(value, dict):
        return {carried(name): carried(item) for name, item in value.items()}
    if isinstance(value, int) and not isinstance(value, bool) and not -2 ** 31 <= value < 2 ** 31:
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return 0.0
    return value


@given(values)
def test_every_answer_can_be_carried(value):
    xml = rpc.write_answer(rpc.to_xml(value))
    (answer,), _ = xmlrpc.client.loads(xml)
    assert answer == carried(value) and repr(answer) == repr(carried(value))


def test_bytes_are_carried_and_what_no_answer_holds_is_refused():
    data = bytes(range(256)) * 10
    xml = rpc.to_xml(['a & b', rpc.Binary(data), rpc.to_xml(True)])
    (answer,), _ = xmlrpc.client.loads(rpc.write_answer(xml))
    assert answer == ['a & b', xmlrpc.client.Binary(data), True]
    with pytest.raises(TypeError, match='set in an answer'):
        rpc.to_xml([{1}])


def test_the_arrows_between_the_files():
    top = os.path.dirname(os.path.abspath(vmhost.__file__))
    ours = {'protocol', 'stompbroker', 'chirp', 'vmguest', 'vmhost'}
    allowed = {'protocol': set(), 'chirp': set(), 'stompbroker': {'protocol'},
               'vmguest': {'protocol', 'chirp'}, 'vmhost': {'protocol', 'chirp', 'stompbroker'}}
    import ast
    for name in ours:
        with open(os.path.join(top, name + '.py'), encoding='utf-8') as file:
            tree = ast.parse(file.read())
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split('.')[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or '').split('.')[0])
        assert imported & ours <= allowed[name], name


# --- workers ---

class Gate:
    """A batch whose work is recorded, and waits for ``go``."""

    def __init__(self, after=0.0):
        self.seen, self.go = [], threading.Event()
        self.batch = hostworkers.Batch('batch', self.work, after=after)

    def work(self, entries):
        self.seen.append(sorted(entries))
        assert self.go.wait(20)


def test_what_comes_meanwhile_is_one_batch():
    gate = Gate(after=0.01)
    before = threading.active_count()
    gate.batch.add('first')
    helpers.wait_until(lambda: gate.seen == [['first']])
    for entry in ['first', 'other'] * 1000:
        gate.batch.add(entry)
    assert threading.active_count() == before + 1
    gate.go.set()
    helpers.wait_until(lambda: len(gate.seen) == 2)
    assert gate.seen == [['first'], ['first', 'other']]
    gate.batch.add('other')                         # later ones are worked on, too
    helpers.wait_until(lambda: len(gate.seen) == 3)
    gate.batch.stop(time.monotonic() + 20)
    assert threading.active_count() == before


def test_a_batch_is_bounded(monkeypatch):
    monkeypatch.setattr(hostworkers, 'BATCH_LIMIT', 10)
    gate = Gate()
    gate.batch.add('first')
    helpers.wait_until(lambda: gate.seen)
    for number in range(1000):
        gate.batch.add(number)
    gate.go.set()
    helpers.wait_until(lambda: len(gate.seen) == 2)
    gate.batch.stop(time.monotonic() + 20)
    assert gate.seen[1] == list(range(10))


@pytest.mark.parametrize('text, told', [
    ('[Host\n', 'line 1: [Host stands before any [Section]'), ('a = 1\n', 'line 1: a = 1 stands before any'),
    ('[Host]\nxmlrpc_port\n', 'line 2: xmlrpc_port is no KEY = VALUE'),
    ('[Host]\n[Host]\n', 'section \'Host\' already exists')])
def test_what_is_wrong_in_an_ini_file_is_told_in_a_line(tmp_path, text, told):
    (tmp_path / 'host.ini').write_text(text)
    with pytest.raises(agent.ConfigError) as raised:
        hostconfig.read_settings(str(tmp_path / 'host.ini'))
    assert told in str(raised.value) and '\n' not in str(raised.value), raised.value
