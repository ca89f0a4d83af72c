"""Results whose fields are anything: told rightly typed, or refused; no screen or log says what they want."""

import json
import math

import pytest
from fake_guest import REQUESTS, Guest

pytestmark = pytest.mark.once
EVIL = 'x\n2026-01-01 00:00:00,000 INFO vmhost: forged\x1b[2J\r\x9b\u202e'
NUMBERS = ['NaN', 'Infinity', '-1e999', '1' * 400, '-' + '1' * 400, '1e300', '-5', '3.7', '"7"', '"x"',
           'true', 'null', '[]', '{"a": 1}']
TEXTS = [json.dumps(EVIL), '"\\u0000\\ud800"', '5', 'null', 'false', '["x"]', json.dumps('y' * 500000)]
FIELDS = {
    'a whole number': (['exitCodeOrSignal', 'left', 'memory-peak', 'oom-kills', 'out-size', 'err-offset'],
                       NUMBERS),
    'a time': (['wall', 'started', 'ended', 'clock-set'], NUMBERS),
    'text': (['out', 'err', 'error', 'spool', 'by'], TEXTS),
    'base64': (['out64', 'err64'], ['"AA=="', '"%"', '"A"', '5', 'null', json.dumps(EVIL)]),
    'a flag': (['finished', 'out-truncated', 'err-truncated'], ['2', '"maybe"', 'null', '[]', '"yes"']),
    'a list': (['inexact'], ['"x"', '{}', '[[], null, "ru_utime"]', '5', '[' * 50000]),
    'an object': (['resources'], ['[]', '5', 'null', '{"ru_utime": NaN}', '{"ru_maxrss": 1e400}',
                                  '{"ru_stime": "x", "more": {}}', '{"ru_utime": %s}' % ('9' * 400)]),
    'a state': (['state'], [json.dumps(EVIL), '"running"', '5', 'null', '[]'])}
WELL = {'state': 'exited', 'finished': True, 'exitCodeOrSignal': 0, 'out': 'well\n', 'err': '', 'error': '',
        'by': 'itself', 'wall': 1.0, 'started': 1700000000.0, 'ended': 1700000001.0, 'inexact': [],
        'resources': {}}
NUMBER = (int, float)
TYPES = {'exitCodeOrSignal': int, 'left': NUMBER, 'memory-peak': NUMBER, 'oom-kills': NUMBER, 'wall': NUMBER,
         'clock-set': NUMBER,
         'out-size': NUMBER, 'out-offset': NUMBER, 'started': NUMBER, 'ended': NUMBER, 'state': str,
         'out': str, 'err': str, 'error': str, 'spool': str, 'by': str,
         'finished': bool, 'out-truncated': bool, 'inexact': list, 'resources': dict}


@pytest.fixture(scope='module')
def liar(host):
    with Guest(host.broker_port, 'liar') as guest:
        yield guest.join()


def result_body(cmd_id, field, text):
    """A CMD_RESULTS, one of whose fields is this text instead of JSON."""
    told = {name: json.dumps(value) for name, value in dict(WELL, **{'cmd-id': cmd_id}).items()}
    told[field] = text
    return 'CMD_RESULTS {%s}' % ', '.join('"%s": %s' % pair for pair in told.items())


@pytest.mark.parametrize('kind', sorted(FIELDS))
def test_results_are_told_rightly_typed_or_refused(host, api, liar, kind):
    fields, texts = FIELDS[kind]
    ids = []
    for field in fields:
        for text in texts:
            cmd_id = api.runCmd('liar', 'true')
            liar.body(result_body(cmd_id, field, text))
            liar.body(result_body(cmd_id, 'state', '"exited"'))        # which comes too late, or is the one
            ids.append((cmd_id, field, text))
    for cmd_id, field, text in ids:
        assert api.waitCmd(cmd_id, 20), (field, text)
        results = api.getCmdResults(cmd_id)
        for name, types in TYPES.items():
            assert isinstance(results[name], types), (field, text[:60], name, results[name])
        numbers = [value for value in list(results.values()) + list(results['resources'].values())
                   if isinstance(value, NUMBER)]
        assert all(map(math.isfinite, numbers)), (field, text[:60])
        assert -1 <= results['exitCodeOrSignal'] <= 255 and results['state'] in ('exited', 'failed')
        assert results['by'] in ('', 'itself', 'timeout', 'signalCmd', 'oom', 'other')
    last = ids[-1][0]
    shown = host.verb('ps', '-a').stdout + host.verb('events').stdout + host.verb('wait', last).stderr
    assert not set(shown) & set(b'\x1b\r') and b'\n2026-01-01' not in shown
    assert host.verb('status').returncode == 0
    log = host.log()
    assert '\x1b' not in log and '\n2026-01-01 00:00:00' not in log


@pytest.mark.parametrize('state', ['failed', 'lost', 'timeout', 'signaled', 'exited'])
def test_no_error_draws_on_a_screen(host, api, liar, state):
    cmd_id = api.runCmd('liar', 'true')
    liar.body(result_body(cmd_id, 'error', json.dumps(EVIL)).replace('"exited"', '"%s"' % state))
    assert api.waitCmd(cmd_id, 20)
    for words in (['wait', cmd_id], ['ps', '-a'], ['events'], ['out', cmd_id]):
        done = host.verb(*words)
        shown = (done.stdout + done.stderr).decode()
        assert not set(shown) & set('\x1b\r\x9b\u202e') and '\n2026-01-01' not in shown, (words, shown)


def test_a_guest_subscribes_a_few_times_at_most(host):
    """The host asks, of each subscription, about each word that it says to anybody."""
    with Guest(host.broker_port, 'collector') as guest:
        for number in range(1, 10):
            guest.subscribe(REQUESTS, id=str(number))
        guest.say('SUBSCRIBE', 'id:10', 'destination:' + REQUESTS)
        assert guest.take_error().get('message') == 'more than 10 subscriptions'
