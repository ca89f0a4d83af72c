"""What a hostile guest tries at the host, over real sockets, and what it gets; what proves an honest one."""

import contextlib
import json
import os
import signal
import threading
import time
import xmlrpc.client

import pytest
from agents import Agent, Host
from fake_guest import CONNECTIONS, RESPONSES, Guest
from helpers import fault_of, wait_until

pytestmark = [pytest.mark.ends, pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]


@pytest.fixture
def guest(host):
    """``guest(id, secret)``: a fake one, connected."""
    made = []

    def make(id, secret=None):
        made.append(Guest(host.broker_port, id, secret))
        return made[-1]
    yield make
    for one in made:
        one.close()


def dropped(host):
    with host.api as api:
        return api.agentInfo()['untrusted']


def test_first_use_pins_a_secret(host, guest, api):
    first = guest('first').join()
    wait_until(lambda: 'first' in api.listRegisteredVMs())
    cmd_id = api.runCmd('first', 'id')
    headers, _ = first.hear('CMD_RUN')
    assert headers['cmd-id'] == cmd_id
    first.word('CMD_RESULTS', headers={'cmd-id': cmd_id}, state='exited', finished=True, exitCodeOrSignal=0)
    first.hear('CMD_ACK')
    assert api.getCmdResults(cmd_id)['finished'] is True


@pytest.mark.parametrize('grace, interval', [(1, 1), (30, 10), ('5m', 100)])
def test_a_greeting_tells_how_often_a_beacon_is_wanted(tmp_path, grace, interval):
    """Whatever guest.ini says: one of 60 s was lost to its host, and found, again and again."""
    with Host(tmp_path, vm_gc_grace=grace) as host, contextlib.closing(Guest(host.broker_port, 'g')) as guest:
        assert guest.hello()['beacon_interval'] == interval


def test_it_is_told_once_and_proved_from_then_on(host, guest, api):
    secret = os.urandom(32)
    guest('again', secret).join()
    again = guest('again', secret)
    greeting = again.hello(tell=False)
    assert len(greeting['nonce']) == 32 and greeting['key']
    headers, _ = again.hear('PING')            # by this the host asks for a proof
    again.word('PONG', headers={'ping-id': headers['ping-id']})
    cmd_id = api.runCmd('again', 'id')
    assert again.hear('CMD_RUN')[0]['cmd-id'] == cmd_id


@pytest.mark.parametrize('is_known', [False, True], ids=['by first use', 'known'])
@pytest.mark.parametrize('kept', [0, 1])
def test_of_two_hellos_the_session_goes_on_in_which_the_guest_does(host, guest, api, is_known, kept):
    """It may have lost the nonce of the other one: by a new connection, or by too many."""
    name = 'twice-%s-%d' % (is_known, kept)
    twice = guest(name)
    if is_known:
        twice.join()
    nonces = [os.urandom(16).hex() for _ in range(2)]
    for nonce in nonces:
        twice.put(CONNECTIONS, {'id': name}, 'HELLO ' + json.dumps(
            {'nonce': nonce, 'name': name, 'boot': 'b', 'session': 's', 'secret': twice.secret.hex()}))
    greetings = []
    while len(greetings) < 2:                  # each HELLO is answered
        headers, word, keys = twice.take_word(time.monotonic() + 20)
        if word == 'HELLO' and headers['to'] == name and 'proof' in keys:
            greetings.append(keys)
    twice.nonce = nonces[kept]
    twice.enter(next(keys for keys in greetings if keys['proof'] == twice.proof(keys)))
    twice.word('HELLO', CONNECTIONS, name=name, boot='b', session='s', os='signed')
    wait_until(lambda: api.getVM(name)['facts'].get('os') == 'signed')
    cmd_id = api.runCmd(name, 'id')
    assert twice.hear('CMD_RUN')[0]['cmd-id'] == cmd_id


@pytest.mark.parametrize('keys', [{'name': {}}, {'name': '', 'host': []}, {'boot': {}}, {'session': [1]}])
def test_a_hello_that_is_none_is_refused_before_it_is_anybodys(host, guest, keys):
    """Else it was pinned, and what it broke held up all others that joined at that moment."""
    one = guest('nonsense')
    one.put(CONNECTIONS, {'id': 'nonsense'}, 'HELLO ' + json.dumps(
        dict({'nonce': '0' * 32, 'secret': '0' * 64}, **keys)))
    assert one.take_error().body.decode() == 'HELLO: %s should be text\n' % list(keys)[-1]
    assert 'Traceback' not in host.log()


@pytest.mark.parametrize('cmds', [5, [1], {'x': []}, {'x': {}}, {'x': 5}, {'x' * 9000: 'running'}])
def test_a_hello_that_lists_nonsense_is_a_hello(host, guest, api, cmds):
    one = guest('lists').join(cmds=cmds)
    one.word('HELLO', CONNECTIONS, name='lists', cmds=cmds)
    cmd_id = api.runCmd('lists', 'id')
    assert one.hear('CMD_RUN')[0]['cmd-id'] == cmd_id
    api.forgetVM('lists')
    assert 'Traceback' not in host.log()


def test_another_secret_is_refused_by_a_sentence_that_names_forget(host, guest, api):
    honest = guest('honest').join()
    teller = guest('honest')
    teller.put(CONNECTIONS, {'id': 'honest'}, 'HELLO ' + json.dumps({'nonce': '0' * 32, 'secret': '0' * 64}))
    assert 'forget honest' in teller.take_error().get('message')
    silent = guest('honest')                   # greeted, but it can't prove anything
    silent.put(CONNECTIONS, {'id': 'honest'}, 'HELLO ' + json.dumps({'nonce': '0' * 32}))
    _, word, greeting = silent.take_word(time.monotonic() + 20)
    assert word == 'HELLO' and 'proof' in greeting
    silent.key = os.urandom(32)
    before = dropped(host)
    silent.word('STILL_ALIVE', CONNECTIONS)
    wait_until(lambda: dropped(host) == before + 1)
    cmd_id = api.runCmd('honest', 'id')
    assert honest.hear('CMD_RUN')[0]['cmd-id'] == cmd_id


def test_forget_lets_name_id_and_secret_go(host, guest, api):
    old = guest('leaver').join(name='left')
    cmd_id = api.runCmd('left', 'id')
    assert api.forgetVM('left') is True
    assert api.getCmdStatus(cmd_id, False)['state'] == 'lost'
    assert fault_of(api.runCmd, 'left', 'id').faultCode == 1 and fault_of(api.forgetVM, 'left').faultCode == 1
    before = dropped(host)
    old.word('STILL_ALIVE', CONNECTIONS)
    wait_until(lambda: dropped(host) > before)
    new = guest('leaver').join(name='left')
    assert api.getNamesToIdsMapping()['left'] == 'leaver'
    api.runCmd('left', 'id')
    new.hear('CMD_RUN')


@pytest.mark.parametrize('present', [True, False])
def test_anothers_name_is_no_id(host, guest, api, present):
    name = 'web-%s' % present
    victim = guest('id-of-' + name).join(name=name)
    if not present:
        victim.word('BYE', CONNECTIONS)
        wait_until(lambda: name not in api.listRegisteredVMs())
    thief = guest(name)
    thief.put(CONNECTIONS, {'id': name}, 'HELLO ' + json.dumps({'nonce': '0' * 32, 'secret': '0' * 64}))
    assert 'another machine\'s name' in thief.take_error().get('message')
    assert api.getVM(name)['id'] == 'id-of-' + name


def test_a_name_stays_its_owners_after_bye(host, guest, api):
    owner = guest('owner').join(name='mine')
    owner.word('BYE', CONNECTIONS)
    wait_until(lambda: 'mine' not in api.listRegisteredVMs())
    guest('thief').join(name='mine')
    assert api.getVM('mine')['id'] == 'owner'
    assert api.getIdsToNamesMapping()['thief'] == 'mine-thief'
    assert fault_of(api.runCmd, 'mine', 'id').faultCode == 2


def test_ids_are_compared_exactly(host, guest, api):
    lower, upper = guest('node1').join(), guest('NODE1').join()
    cmd_id = api.runCmd('node1', 'id')
    assert lower.hear('CMD_RUN')[0]['cmd-id'] == cmd_id
    api.runCmd('NODE1', 'true')
    assert upper.hear('CMD_RUN')[0]['cmd'] == 'true'       # and not the one for node1 before


@pytest.mark.parametrize('id', ['gauß', '08:00:27:AA:ﬀ:01', 'a b', '*', '', 'x' * 65, 'a\nb'])
def test_what_is_no_id(host, guest, id):
    thief = guest(id)
    thief.put(CONNECTIONS, {'id': id}, 'HELLO ' + json.dumps({'nonce': '0' * 32, 'secret': '0' * 64}))
    thief.take_error()


def test_a_hello_with_a_living_guests_id_ends_nothing(host, guest, api):
    """From the same address, with another boot id: that was enough before."""
    honest = guest('living').join()
    running = api.runCmd('living', 'sleep')
    honest.hear('CMD_RUN')
    honest.word('CMD_STATUS', headers={'cmd-id': running}, state='running')
    wait_until(lambda: api.getCmdStatus(running, False)['state'] == 'running')
    thief = guest('living')
    for _ in range(20):
        keys = {'nonce': os.urandom(16).hex(), 'boot': 'x', 'session': 'y', 'cmds': {}}
        thief.put(CONNECTIONS, {'id': 'living'}, 'HELLO ' + json.dumps(keys))
    cmd_id = api.runCmd('living', 'id')
    assert honest.hear('CMD_RUN')[0]['cmd-id'] == cmd_id
    honest.word('CMD_STATUS', headers={'cmd-id': running}, state='running', processes=7)
    wait_until(lambda: api.getCmdStatus(running, False)['processes'] == 7)
    assert not [word for word in heard_by(thief) if word not in ('HELLO', 'PING')]


@pytest.mark.parametrize('begun', [False, True])
def test_a_signal_is_answered_by_what_was_asked_for_after_it(host, guest, api, begun):
    """A CMD_STATUS that was said before the signal came tells nothing of it: the agent may die between."""
    honest = guest('marks-%s' % begun).join(marks=True)
    cmd_id = api.runCmd(honest.id, 'sleep')
    honest.hear('CMD_RUN')
    if begun:
        honest.word('CMD_STATUS', headers={'cmd-id': cmd_id}, state='running')
        wait_until(lambda: api.getCmdStatus(cmd_id, False)['state'] == 'running')
    with signalling(host, cmd_id) as told:
        honest.hear('CMD_SIGNAL')
        honest.word('CMD_STATUS', headers={'cmd-id': cmd_id}, state='running', pid=5)
    assert told == [7] and api.getCmdStatus(cmd_id, False)['pid'] == 5
    with signalling(host, cmd_id) as told:
        honest.hear('CMD_SIGNAL')
        mark = honest.hear('CMD_QUERY')[1]['mark']
        honest.word('CMD_STATUS', headers={'cmd-id': cmd_id}, state='running', mark=mark)
    assert told == [True]


@contextlib.contextmanager
def signalling(host, cmd_id):
    """Sends TERM meanwhile; what that answers, or with which fault it ends, is there afterwards."""
    told = []

    def send():
        with host.api as api:
            try:
                told.append(api.signalCmd(cmd_id, 'TERM'))
            except xmlrpc.client.Fault as fault:
                told.append(fault.faultCode)
    thread = threading.Thread(target=send)
    thread.start()
    yield told
    thread.join(20)


def heard_by(guest):
    """The words that came so far."""
    return [frame.body.split(b' ')[0].decode() for frame in guest.before_now_as_guest()
            if frame.command == 'MESSAGE']


def test_unsigned_forged_and_repeated_words_are_dropped(host, guest, api):
    honest = guest('forged').join()
    cmd_id = api.runCmd('forged', 'id')
    honest.hear('CMD_RUN')
    result = {'state': 'exited', 'finished': True, 'exitCodeOrSignal': 0, 'out': 'forged'}
    body = 'CMD_RESULTS ' + json.dumps(result)
    thief = guest('forged')
    thief.put(CONNECTIONS, {'id': 'forged'}, 'HELLO ' + json.dumps({'nonce': '0' * 32}))
    before = dropped(host)
    for headers in ({}, {'seq': '9'}, {'seq': '9', 'mac': '0' * 32}, {'seq': '-1', 'mac': 'x'}):
        thief.put(RESPONSES, dict(headers, **{'from': 'forged', 'cmd-id': cmd_id}), body)
    wait_until(lambda: dropped(host) == before + 4)
    assert api.getCmdResults(cmd_id) == ''
    headers, body = honest.signed('CMD_STATUS', headers={'cmd-id': cmd_id}, state='running', pid=5)
    honest.put(RESPONSES, headers, body)
    wait_until(lambda: api.getCmdStatus(cmd_id, False)['pid'] == 5)
    honest.word('CMD_STATUS', headers={'cmd-id': cmd_id}, state='running', pid=6)
    wait_until(lambda: api.getCmdStatus(cmd_id, False)['pid'] == 6)
    for replayer in honest, thief:
        replayer.put(RESPONSES, headers, body)
    wait_until(lambda: dropped(host) == before + 6)
    assert api.getCmdStatus(cmd_id, False)['pid'] == 6


def test_words_may_overtake_each_other_within_the_window(host, guest, api):
    honest = guest('overtaken').join()
    cmd_id = api.runCmd('overtaken', 'id')
    honest.hear('CMD_RUN')
    frames = [honest.signed('CMD_STATUS', headers={'cmd-id': cmd_id}, state='running', pid=n + 1)
              for n in range(70)]
    before = dropped(host)
    for headers, body in reversed(frames):
        honest.put(RESPONSES, headers, body)
    wait_until(lambda: dropped(host) == before + 6)            # those 64 and more behind
    assert api.getCmdStatus(cmd_id, False)['pid'] == 7


def test_what_is_dropped_is_logged_once_a_minute(host, guest):
    noisy = guest('noisy').join()
    before = dropped(host)
    for _ in range(50):
        noisy.put(RESPONSES, {'from': 'noisy'}, 'PONG')
    wait_until(lambda: dropped(host) == before + 50)
    assert host.log().count('dropped a word of noisy') == 1


def test_an_agent_of_before_is_told_to_update(host, guest):
    old = guest('old')
    old.put(CONNECTIONS, {'id': 'old'}, 'HELLO {"version": "1.0.0", "proto": 1}')
    message = old.take_error().get('message')
    assert 'update' in message and '1.0.0' in message
    assert 'unsigned_guests' in message


def test_unsigned_guests_where_they_are_let_in(tmp_path):
    with Host(tmp_path / 'host', unsigned_guests='yes') as host, host.api as api:
        with Guest(host.broker_port, 'foreign') as foreign, Guest(host.broker_port, 'foreign') as second:
            foreign.put(CONNECTIONS, {'id': 'foreign'}, 'HELLO {"name": "foreign"}')
            wait_until(lambda: 'foreign' in api.listRegisteredVMs())
            second.put(CONNECTIONS, {'id': 'foreign'}, 'HELLO {"name": "foreign"}')
            assert 'alive (unsigned)' in host.verb('ls', '-l').stdout.decode()
            assert 'unsigned_guests' in host.verb('check').stdout.decode() and 'unsigned_guests' in host.log()
            cmd_id = api.runCmd('foreign', 'id')
            headers, _ = foreign.hear('CMD_RUN')
            assert 'mac' not in headers and 'CMD_RUN' not in heard_by(second)
            foreign.put(RESPONSES, {'cmd-id': cmd_id, 'from': 'foreign'}, 'CMD_RESULTS {"state": "exited"}')
            wait_until(lambda: api.getCmdResults(cmd_id))
        with Guest(host.broker_port, 'signed') as signed, Guest(host.broker_port, 'signed') as downgrade:
            signed.join()
            downgrade.put(CONNECTIONS, {'id': 'signed'}, 'HELLO {}')
            assert 'forget signed' in downgrade.take_error().get('message')


def test_a_multicast_is_signed_for_each(host, guest, api):
    guests = [guest('many%d' % number).join() for number in range(5)]
    cmd_id = api.runCmdOnAll('many?', 'id')
    for one in guests:
        headers, _ = one.hear('CMD_RUN')
        assert (headers['cmd-id'], headers['to']) == (cmd_id, one.id)


def test_nobody_is_shown_a_secret(host, guest, api):
    secret = os.urandom(32)
    guest('shy', secret).join()
    shown = json.dumps([api.getVM('shy'), api.getEvents(-1000), api.agentInfo()], default=str) + host.log()
    assert secret.hex() not in shown
    for folder, _, names in os.walk(host.state):
        for name in filter(lambda name: os.path.isfile(os.path.join(folder, name)), names):
            path = os.path.join(folder, name)
            with open(path, 'rb') as file:
                if secret.hex().encode() in file.read():
                    assert name.startswith('journal') and os.stat(path).st_mode & 0o77 == 0


def test_facts_are_those_that_are_known_and_bounded(host, guest, api):
    guest('braggart').join(os='x' * 20000, cpus=[1], mem='abc', python={'a': 1}, host=7,
                           own={'a': 'x' * 9000}, chirp={'port': 'x' * 9000, 'more': 'y' * 9000})
    wait_until(lambda: 'braggart' in api.listRegisteredVMs())
    facts = api.getVM('braggart')['facts']
    assert set(facts) <= {'proto', 'cpus', 'mem', 'host', 'os', 'python', 'version', 'chirp', 'boot',
                          'session'}
    assert len(json.dumps(facts)) < 1000 and not facts.get('chirp')


def stay_at(host):
    """Has the next agent of that folder listen where this one does."""
    with open(host.ini) as file:
        text = file.read().replace('port = 0', 'port = %d' % host.broker_port, 1)
    with open(host.ini, 'w') as file:
        file.write(text)


def test_a_host_that_restarts_is_known_again(tmp_path):
    with Host(tmp_path / 'host') as host:
        with Agent(tmp_path / 'guest', host, 'one') as agent:
            host.process.send_signal(signal.SIGKILL)
            host.process.wait()
            stay_at(host)
            host.start()
            wait_until(agent.has_joined, 40)
            assert host.run('one', 'echo', 'again')['out'] == 'again\n'
            assert 'not obeyed' not in agent.log()


@pytest.mark.slow
def test_a_host_that_lost_its_journal_says_what_to_do(tmp_path):
    """In both logs, by ls and by check; and that helps."""
    with Host(tmp_path / 'host') as host, Agent(tmp_path / 'guest', host, 'one') as agent:
        stay_at(host)
        host.stop()
        assert 'a new one begins' not in host.log()
        for name in os.listdir(host.state):
            if name.startswith('journal'):
                os.remove(os.path.join(host.state, name))
        host.start()
        told = 'Delete the .host file in the guest\'s state_dir'
        wait_until(lambda: told in host.log() and told in agent.log(), 40)
        assert 'one is not let in: this host knows no secret of one' in host.log()
        assert 'journal.sqlite is gone, or empty' in host.log()
        for words in ('ls',), ('check',):
            assert told in host.verb(*words).stdout.decode(), words
        os.remove(os.path.join(agent.state, 'one.host'))
        wait_until(agent.has_joined, 60)
        assert host.run('one', 'echo', 'again')['out'] == 'again\n'
        assert 'not let in' not in host.verb('ls').stdout.decode()
