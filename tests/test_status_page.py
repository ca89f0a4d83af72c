"""The status page: who may see it, what it shows, and that it never acts. In a real Chromium."""

import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
import urllib.parse

import pytest
from agents import ON_WINDOWS, TOP, Agent, Host
from chromium import CHROMIUM, Browser
from fake_guest import Guest
from helpers import wait_until
from vms import SETTINGS

import hostguests
import hosthypervisor
import hostjournal
import hostpages

pytestmark = [pytest.mark.whole, pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')]
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason='no chromium here')
HOSTILE = '<img src=x onerror="document.title=\'owned\'">'


@pytest.fixture(scope='module')
def guest(host, tmp_path_factory):
    with Agent(tmp_path_factory.mktemp('guest'), host, 'node1', beacon_interval=1) as guest:
        yield guest


@pytest.fixture(scope='module')
def evil_host(tmp_path_factory):
    with Host(tmp_path_factory.mktemp('evil-host')) as host:
        yield host


def get(host, path, method='GET', body=None, basic=True, **headers):
    """(code, headers, body) of a request, with the token unless told otherwise."""
    if basic:
        secret = base64.b64encode(('vmhost:' + host.token).encode()).decode()
        headers['Authorization'] = 'Basic ' + secret
    connection = http.client.HTTPConnection(*host.address.split(':'), timeout=30)
    try:
        connection.request(method, path, body, {name.replace('_', '-'): value
                                                for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def read(host, path, **headers):
    """The JSON of an answer."""
    code, _, body = get(host, path, **headers)
    assert code == 200, body
    return json.loads(body.decode())


def fresh(host, is_it=lambda told: True):
    """A snapshot that was taken after this call, and is as wanted."""
    begin, found = time.time(), []
    wait_until(lambda: found.append(read(host, '/status/snapshot')) or (
        found[-1]['time'] > begin and is_it(found[-1])), 20, 0.2)
    return found[-1]


def path_of(link):
    parts = urllib.parse.urlsplit(link)
    return parts.path + '?' + parts.query


class FakeGuest:
    """A guest without an agent, that says what it is told to. For a ``with`` block."""

    def __init__(self, host, id, **facts):
        self.guest = Guest(host.broker_port, id)
        self.guest.hello(**facts)

    def say(self, destination, word, **keys):
        self.guest.word(word, destination, **keys)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.guest.close()


# --- who may see it ---

@pytest.mark.parametrize('path', ['/', '/status', '/status/snapshot', '/status/events', '/status/output',
                                  '/status?key=', '/status?key=guess', '/favicon.ico', '//[x', '*'])
def test_nobody_sees_anything_without_token_or_link(host, path):
    code, headers, body = get(host, path, basic=False)
    assert (code, headers['WWW-Authenticate']) == (401, 'Basic realm="vmhost"')
    code, headers, body = get(host, path, basic=False, X_Requested_With='status.html')
    if path.startswith('/status'):
        assert (code, headers['WWW-Authenticate']) == (401, None)
        assert b'status --open' in body


@pytest.mark.windows
def test_the_token_shows_all(host):
    assert get(host, '/status')[0] == get(host, '/')[0] == 200
    assert read(host, '/status/snapshot')['agent']['hypervisor'] == 'none'
    assert get(host, '/nothing')[0] == 404


@pytest.mark.windows
def test_a_link_is_good_once_and_its_visit_for_the_status_page_alone(host, api):
    link = api.getStatusLink()
    assert link.startswith('http://%s/status?key=' % host.address)
    code, headers, page = get(host, path_of(link), basic=False)
    assert code == 200 and page.startswith(b'<!DOCTYPE html>')
    assert 'Set-Cookie' not in headers         # browsers show a cookie to each port of an address
    visit = re.search(b'<meta name="visit" content="([^"]{20,})">', page).group(1).decode()
    key = urllib.parse.parse_qs(urllib.parse.urlsplit(link).query)['key'][0]
    assert key != visit and key.encode() not in page
    assert get(host, path_of(link), basic=False)[0] == 401
    mine = {'Authorization': 'Bearer ' + visit, 'basic': False}
    assert get(host, '/status', **mine)[0] == 200
    assert read(host, '/status/snapshot', **mine)['vms'] is not None
    assert get(host, '/status/snapshot', Cookie='visit=' + visit, basic=False)[0] == 401
    assert get(host, '/', **mine)[0] == 401
    call = b'<methodCall><methodName>listVMs</methodName></methodCall>'
    assert get(host, '/', 'POST', call, **mine)[0] == 401
    assert get(host, '/status', 'POST', call, **mine)[0] == 401
    assert get(host, '/status', 'POST', call)[0] == 404


def test_keys_and_visits_end():
    now = [1000.0]
    visits = hostpages.Visits(lambda: now[0])
    key, other = visits.new_key(), visits.new_key()
    visit = visits.enter(key)
    assert visit and not visits.enter(key) and not visits.enter('') and not visits.enter('guess')
    now[0] += hostpages.LINK_LIFE
    assert not visits.enter(other)
    now[0] += hostpages.VISIT_LIFE - hostpages.LINK_LIFE - 1
    assert visits.is_known(visit) and not visits.is_known('') and not visits.is_known(other)
    now[0] += hostpages.VISIT_LIFE - 1
    assert visits.is_known(visit)
    now[0] += hostpages.VISIT_LIFE
    assert not visits.is_known(visit) and not visits.is_known(visit)
    kept = [visits.enter(visits.new_key()) for _ in range(hostpages.VISITS_KEPT + 1)]
    assert not visits.is_known(kept[0]) and visits.is_known(kept[1])


@pytest.mark.parametrize('headers', [
    {'Origin': 'http://evil.example'}, {'Origin': 'null'}, {'Host': 'evil.example'},
    {'Host': 'evil.example:50505'}, {'Sec_Fetch_Site': 'cross-site', 'Sec_Fetch_Mode': 'no-cors'},
    {'Sec_Fetch_Site': 'same-site', 'Sec_Fetch_Mode': 'cors'}])
@pytest.mark.parametrize('path', ['/', '/status', '/status/snapshot', '/status/events'])
def test_other_web_pages_are_refused(host, path, headers):
    assert get(host, path, **headers)[0] == 403


def test_a_client_may_use_each_address_that_leads_here(tmp_path):
    with Host(tmp_path, xmlrpc_listen_on='0.0.0.0') as host, host.api as api:
        port = host.address.rpartition(':')[2]
        assert api.getStatusLink().startswith('http://127.0.0.1:%s/status?key=' % port)
        connection = http.client.HTTPConnection('127.0.0.2', int(port), timeout=30)
        for name, code in (('127.0.0.2:' + port, 401), ('127.0.0.3:' + port, 403), ('evil.example', 403)):
            connection.request('GET', '/status', headers={'Host': name})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == code, name
        connection.close()


def test_a_browser_is_told_to_trust_the_page_alone(host):
    code, headers, page = get(host, '/status')
    policy = dict(part.strip().split(' ', 1) for part in headers['Content-Security-Policy'].split(';'))
    assert policy['default-src'] == policy['base-uri'] == policy['form-action'] == "'none'"
    assert policy['frame-ancestors'] == "'none'" and policy['connect-src'] == "'self'"
    assert 'unsafe' not in headers['Content-Security-Policy']
    for tag in ('script', 'style'):
        text, = re.findall('<%s>(.*?)</%s>' % (tag, tag), page.decode(), re.S)
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy[tag + '-src']
    assert headers['Referrer-Policy'] == 'no-referrer' and headers['Cache-Control'] == 'no-store'
    assert headers['X-Content-Type-Options'] == 'nosniff'


def test_the_page_needs_nothing_from_elsewhere_and_sets_text_alone():
    page = hostpages.read_beside('status.html').decode()
    assert not re.search(r'(src|href|url|import|from)\s*[=(]?\s*["\']?(https?:)?//', page)
    assert not re.search(r'<[^>]+\s(on\w+|style|src)=', page)
    for way in ('innerHTML', 'outerHTML', 'insertAdjacentHTML', 'document.write', 'eval(', 'javascript:'):
        assert way not in page


def test_the_page_is_in_the_bundle(tmp_path):
    bundle = str(tmp_path / 'vmhost.pyz')
    subprocess.check_call([sys.executable, os.path.join(TOP, 'vmhost.py'), '--bundle', bundle])
    host = Host(tmp_path / 'host')
    host.program = bundle
    with host:
        assert get(host, '/status')[2] == hostpages.read_beside('status.html')


# --- what it reads ---

def test_the_page_can_only_ask(host, guest, api):
    cmd_id = api.runCmd('node1', 'sh', ['-c', 'seq 1 30000; exit 4'])
    host.results(cmd_id)
    for path in ('/status/forgetCmd?id=' + cmd_id, '/status/output', '/status/events?after=x',
                 '/status/nothing',
                 '/status/output?stream=err', '/status/output?id=%s&offset=-1' % cmd_id,
                 '/status/output?stream=x&id=' + cmd_id):
        assert get(host, path)[0] == 400
    assert get(host, '/status/output?id=no-such-id')[0] == 404
    whole = ''.join('%d\n' % n for n in range(1, 30001))
    tail = read(host, '/status/output?id=' + cmd_id)
    assert tail['offset'] == len(whole) - 65536 and tail['eof'] and tail['state'] == 'exited'
    assert base64.b64decode(tail['data']).decode() == whole[-65536:]
    part = read(host, '/status/output?id=%s&offset=3' % cmd_id)
    assert base64.b64decode(part['data']).decode() == whole[3:65539] and part['next'] == 65539
    all_id = api.runCmdOnAll('node*', 'true')
    host.results(all_id)
    read(host, '/status/output?id=%s@node1' % all_id)


@pytest.mark.windows
def test_the_snapshot_tells_what_goes_on(host, guest, api):
    cmd_id = api.runCmd('node1', 'sh', ['-c', 'echo "half: 50 %" > $VM_PROGRESS_FILE; echo said; sleep 60'])
    try:
        def running():
            found = [command for command in read(host, '/status/snapshot')['commands']
                     if command['cmdId'] == cmd_id and command['progress']]
            return found and found[0]
        command = wait_until(running, 20, 0.5)       # nobody but the page asks for its status
        assert (command['state'], command['progress'].strip(), command['outSize']) == \
            ('running', 'half: 50 %', 5)
        assert command['rss'] > 0 and command['wall'] > 0 and command['processes'] >= 2
    finally:
        api.signalCmd(cmd_id, 'KILL')
    host.results(cmd_id)
    told = fresh(host, lambda told: told['vms'][0]['loads'])
    vm, = [vm for vm in told['vms'] if vm['id'] == 'node1']
    assert (vm['name'], vm['agent'], vm['state'], vm['ip']) == ('node1', 'alive', 'Running', '127.0.0.1')
    assert vm['cpus'] >= 1 and vm['mem'] > 0 and 0 <= told['time'] - vm['lastSeen'] < 20
    assert all(len(load) == 4 and 0 < load[2] < vm['mem'] for load in vm['loads'])
    since = vm['loads'][-1][0]
    again = read(host, '/status/snapshot?since=%r' % since)['vms'][0]['loads']
    assert all(load[0] > since for load in again)
    ended, = [command for command in told['commands'] if command['cmdId'] == cmd_id]
    assert ended['end'] == 'signaled 9' and ended['ended'] > 0


def test_vms_of_the_hypervisor_are_there_with_and_without_an_agent():
    guests = hostguests.Guests(30)
    guests.add('A', 'with-agent', '10.0.0.1', '', '', {}, 0)
    guests.add('B', 'no-vm', '10.0.0.2', '', '', {}, 0)
    guests.gone('B')
    driver = hosthypervisor.Hypervisor('VirtualBox', SETTINGS)
    machines = types.SimpleNamespace(hypervisor=driver)
    api = types.SimpleNamespace(methods={})
    page = hostpages.StatusPage(types.SimpleNamespace(guests=guests, machines=machines), api)
    driver._watch.look([
        {'name': name, 'id': id, 'uuid': name, 'state': state, 'native': native, 'trouble': ''}
        for name, id, state, native in (
            ('with-agent', 'A', 'paused', 'Paused'), ('off', 'C', 'off', 'PoweredOff'),
            ('no-card', '', 'saved', 'Saved'))])
    assert [(vm['name'], vm['state'], vm['agent']) for vm in page._vms()] == [
        ('no-card', 'Saved', 'never'), ('off', 'PoweredOff', 'never'), ('with-agent', 'Paused', 'alive'),
        ('no-vm', 'Null', 'lost')]


def test_loads_cover_ten_minutes_however_often_beacons_come():
    now = [1000.0]
    guests = hostguests.Guests(30, lambda: now[0])
    guest, _ = guests.add('A', 'a', '', '', '', {}, 0)
    for _ in range(20 * 60):
        now[0] += 1
        guests.heard('A', {'load1': now[0]})
        guests.heard('A')
    loads = [load['load1'] for load in guests.loads_of(guest)]
    assert loads[-1] - loads[0] >= 590 and len(loads) == hostguests.LOADS_KEPT


def test_a_hostile_guest_does_not_break_the_page(evil_host):
    with evil_host.api as api, FakeGuest(evil_host, 'evil', name='evil', os=HOSTILE, cpus='many',
                                         mem=-1e308) as evil:
        wait_until(lambda: 'evil' in api.listVMs())
        evil.say('/topic/connections', 'STILL_ALIVE', load1=1e308, mem_free=-5)
        cmd_ids = []
        for odd in (HOSTILE, ['x'], {'a': 1}, None, float('inf'), -1, 10 ** 20, True):
            cmd_ids.append(api.runCmd('evil', 'true'))
            evil.say('/topic/cmd_responses', 'CMD_STATUS', state='running', resources=odd, wall=odd,
                     processes=odd, progress=odd, pid=odd, error='said',
                     **{'cmd-id': cmd_ids[-1], 'out-size': odd})
        for cmd_id in cmd_ids:
            wait_until(lambda cmd_id=cmd_id: api.getCmdStatus(cmd_id, False)['error'] == 'said')
        told = fresh(evil_host)
        assert [command['cmdId'] for command in told['commands']] == cmd_ids
        for shown in told['commands']:
            assert isinstance(shown['progress'], str)
            assert all(isinstance(shown[name], (int, float)) for name in
                       ('wall', 'cpu', 'rss', 'processes', 'outSize')), shown
        shown, = told['vms']
        assert (shown['cpus'], shown['os']) == (0, HOSTILE)


def test_a_page_that_waits_does_not_hold_up_the_end(tmp_path):
    with Host(tmp_path / 'host') as host:
        secret = base64.b64encode(('vmhost:' + host.token).encode()).decode()
        connection = http.client.HTTPConnection(*host.address.split(':'), timeout=30)
        with contextlib.closing(connection):
            connection.request('GET', '/status/snapshot', headers={'Authorization': 'Basic ' + secret})
            last = json.loads(connection.getresponse().read().decode())['lastEvent']
            connection.request('GET', '/status/events?after=%d&timeout=50' % last,
                               headers={'Authorization': 'Basic ' + secret})
            assert host.stop(timeout=3) == 0
        assert 'still runs' not in host.log()


def test_nobody_waits_for_events_once_the_host_stops(tmp_path):
    journal = hostjournal.Journal(str(tmp_path / 'journal'))
    waiter = threading.Thread(target=journal.events_after, args=(0, 60))
    waiter.start()
    journal.stop_waits()
    waiter.join(20)
    assert not waiter.is_alive()
    journal.event('kept', text='events are still written')
    assert journal.events_after(0, 60)['last'] == 1
    journal.close()


# --- in a browser ---

@pytest.fixture(scope='module')
def browser():
    with Browser() as browser:
        yield browser


def keep_shots(page, name):
    """Screenshots for a person to look at, where VMHOST_SCREENSHOTS names a folder."""
    folder = os.environ.get('VMHOST_SCREENSHOTS')
    for width in (360, 820, 1280, 1920) if folder else ():
        for dark in (False, True):
            page.resize(width, 900)
            page.scheme(dark)
            page.js('new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))')
            page.screenshot(os.path.join(folder, '%s-%d-%s.png' % (name, width, 'dark' if dark else 'light')))


def text_of(selector):
    return '(document.querySelector(%s) || {innerText: ""}).innerText' % json.dumps(selector)


OUTPUT = ('import os, time\n'
          'os.write(1, %r)\n'
          'os.write(2, b"to stderr\\n")\n'
          'for n in range(1, 1000):\n'
          '    open(os.environ["VM_PROGRESS_FILE"], "w").write("%%d %%%%" %% (n %% 100))\n'
          '    os.write(1, b"line %%d\\n" %% n)\n'
          '    time.sleep(0.1)\n')


@in_chromium
@pytest.mark.once
def test_a_click_through(host, guest, api, browser):
    page = browser.open(api.getStatusLink())
    page.wait(text_of('#live') + ' == "●live"')
    assert page.js('location.href') == 'http://%s/status' % host.address     # the key is gone
    assert page.js('document.cookie') == ''
    page.wait(text_of('#machines tbody') + '.includes("node1")')
    page.wait('document.querySelector("#machines svg path").getAttribute("d").length > 20')
    assert page.js(text_of('#glance')).startswith('1 alive of 1 machine')
    hostile = HOSTILE.encode() + b' \x1b[1m \x00 \xff \xe2\x80\xae ende\r\nnext\n'
    cmd_id = api.runCmd('node1', sys.executable, ['-c', OUTPUT % hostile])
    row = '#commands tbody tr:first-child'
    page.wait('%s.includes("%s")' % (text_of('#commands'), cmd_id))          # no reload
    page.wait('document.querySelector("#commands progress").value > 0')
    page.wait('%s.includes("running")' % text_of(row))
    assert 'time↵os.write(1, ' in page.js(text_of(row))                       # its lines, in one
    page.click(row + ' button')
    page.wait(text_of('#text') + '.includes("line 5")')
    assert page.js('document.activeElement.id') == 'output-title'
    text = page.js(text_of('#text'))
    assert text.startswith(HOSTILE + ' ␛[1m ␀ \ufffd \ufffd ende\nnext\nline 1\n')
    lines = page.js('document.querySelector("#text").textContent.length')
    page.wait('document.querySelector("#text").textContent.length > %d' % lines)    # it follows
    assert page.js('output.atEnd()')
    keep_shots(page, 'output')
    page.click('input[value=err]')
    page.wait(text_of('#text') + ' == "to stderr\\n"')
    page.js('document.querySelector("#text").focus()')
    page.key('Escape')
    assert page.js('document.querySelector("#output").hidden')
    assert page.js('document.activeElement.textContent').startswith('Output of')
    api.signalCmd(cmd_id, 'TERM')
    page.wait('%s.includes("signaled 15")' % text_of('#commands'))
    page.wait('%s.includes("cmd-finished")' % text_of('#events'))
    assert page.js('document.title').startswith('vmhost ')
    assert page.problems == []


@in_chromium
@pytest.mark.once
@pytest.mark.skipif(ON_WINDOWS, reason='what Wine starts for a browser keeps the verb\'s output open')
def test_the_file_that_status_open_opens_leads_to_the_page(host, guest, browser):
    assert host.verb('status', '--open', env=dict(os.environ, BROWSER='true')).returncode == 0
    page = browser.open('file://' + os.path.join(host.state, 'open-status.html'))
    page.wait('document.querySelector("#live") && %s == "●live"' % text_of('#live'))
    assert page.js('location.href') == 'http://%s/status' % host.address and page.problems == []


@in_chromium
@pytest.mark.once
def test_progress_as_programs_write_it_and_why_a_command_failed(host, guest, api, browser):
    page = browser.open(api.getStatusLink())
    wrote = {'0.5': 50, '21/42': 50, '50 % of it': 50, '1/5': 20, 'half': -1}
    cmd_ids = []
    for text, percents in wrote.items():
        cmd_id = api.runCmd('node1', 'sh', ['-c', 'printf %s "$0" > $VM_PROGRESS_FILE; echo why >&2; '
                                            'while [ ! -e stop ]; do sleep 0.1; done; exit 3', text])
        cmd_ids.append(cmd_id)
        row = ('[...document.querySelectorAll("#commands tbody tr")].find(r => r.innerText.includes("%s"))'
               % cmd_id)
        page.wait(row + ' && %s.innerText.includes(%s)' % (row, json.dumps(text)))
        progress = row + '.querySelector("progress")'
        shown = page.js('%s.hidden ? -1 : %s.value' % (progress, progress))
        assert shown == percents, text
        assert page.js(row + '.innerText.includes(" left")') == (percents > 0), text
    with open(os.path.join(guest.files, 'stop'), 'w'):
        for one in cmd_ids:
            host.results(one)
    os.remove(os.path.join(guest.files, 'stop'))
    page.wait(row + '.innerText.includes("exited 3")')
    page.js('%s.querySelector("button").click(); 1' % row)
    page.wait(text_of('#text') + ' == "why\\n"')
    assert page.js('document.querySelector("input[value=err]").checked') and page.problems == []


@in_chromium
@pytest.mark.once
def test_the_page_of_a_command(host, guest, api, browser):
    script = 'echo to stdout; echo "$0 to stderr" >&2; exit 3'
    cmd_id = api.runCmd('node1', 'sh', ['-c', script, HOSTILE], {'SECRET': 'hidden', 'A': '1'}, '', '',
                        {'timeout': 60, 'stdin': 'hidden'})
    host.results(cmd_id)
    told = read(host, '/status/command?id=' + cmd_id)
    assert told['variables'] == ['A', 'SECRET'] and 'hidden' not in json.dumps(told)
    page = browser.open(api.getStatusLink())
    page.wait('%s.includes("%s")' % (text_of('#commands'), cmd_id))
    page.js('[...document.querySelectorAll("#commands a")].find(a => a.href.includes("%s")).click(); 1'
            % cmd_id)
    page.wait('%s.includes("to stderr")' % text_of('#command-err pre'))
    page.wait('%s == "to stdout\\n"' % text_of('#command-out pre'))
    assert page.js('document.activeElement.id') == 'command-title'
    assert page.js('document.querySelector("#command-err").open')
    facts = page.js(text_of('#command-facts'))
    for text in ('exited 3', 'A, SECRET', 'timeout 60', 'submitted', HOSTILE.replace("'", "'\\''")):
        assert text in facts, text
    assert 'hidden' not in facts
    assert page.js('getComputedStyle(document.querySelector("#machines")).display') == 'none' or \
        page.js('document.querySelector("#machines").offsetParent === null')
    keep_shots(page, 'command')
    page.js('document.querySelector("#command a").click(); 1')
    page.wait('document.querySelector("#command").hidden && document.querySelector("#machines").offsetParent')
    page.js('location.hash = "#no-such"; 1')
    page.wait('%s.includes("no command no-such")' % text_of('#command-facts'))
    assert [problem for problem in page.problems if '404' not in problem] == []


@in_chromium
@pytest.mark.once
def test_filter_and_sort(host, guest, api, browser):
    host.run('node1', 'sh', '-c', ': aaa; sleep 0.3')
    host.run('node1', 'sh', '-c', ': zzz; exit 1')
    page = browser.open(api.getStatusLink())
    rows = '[...document.querySelectorAll("#commands tbody tr")].map(r => r.innerText)'
    page.wait('%s.join().includes("zzz") && %s.join().includes("aaa")' % (rows, rows))

    def filtered(text):
        page.js('(() => { const f = document.querySelector("#filter"); f.value = %s; '
                'f.dispatchEvent(new Event("input")); })()' % json.dumps(text))
        return page.js(rows)
    assert all('zzz' in row for row in filtered('EXITED zzz'))
    assert filtered('nothing of the kind') == [] == page.js(
        '[...document.querySelectorAll("#machines tbody tr")]')
    filtered('')
    page.js('(() => { const s = document.querySelector("#commands-sort"); s.value = "4"; '
            's.dispatchEvent(new Event("change")); })()')
    times = page.js('commands.chosen().map(wall)')
    assert times == sorted(times, reverse=True)
    assert page.js('document.querySelector("#commands th[aria-sort]").innerText') == 'Time'
    page.js('document.querySelector("#commands th.sorts").click(); 1')       # the first column's name
    shown = page.js('commands.chosen().map(c => c.line)')
    assert shown == sorted(shown) and page.problems == []


@in_chromium
@pytest.mark.once
def test_what_guests_say_is_text(evil_host, browser):
    with evil_host.api as api, FakeGuest(evil_host, 'evil2', name='\u202eevil2', os=HOSTILE,
                                         cpus='many', mem=-1e308) as evil:
        wait_until(lambda: 'evil2' in api.getNamesToIdsMapping().values())
        cmd_id = api.runCmd('evil2', HOSTILE, ['</script>'])
        evil.say('/topic/cmd_responses', 'CMD_STATUS', state='running', progress=HOSTILE + ' 1e999 %',
                 wall=-1e300, **{'cmd-id': cmd_id})
        page = browser.open(api.getStatusLink())
        page.wait(text_of('#machines') + '.includes(%s)' % json.dumps(HOSTILE))
        page.wait(text_of('#commands') + '.includes(%s)' % json.dumps(HOSTILE + ' 1e999 %'))
        page.wait(text_of('#events') + '.includes("</script>")')
        assert '\u202e' not in page.js('document.body.textContent')
        assert page.js('document.images.length') == 0
        assert page.js('document.title') != 'owned' and page.problems == []


@in_chromium
@pytest.mark.once
def test_by_keyboard_and_screen_reader(host, guest, api, browser):
    host.run('node1', 'true')
    page = browser.open(api.getStatusLink())
    page.wait('document.querySelector("#commands tbody button")')
    page.key('Tab')
    assert page.js('document.activeElement.innerText') == 'Skip to the machines'
    page.key('Enter')
    page.wait('document.activeElement.id == "machines-title"')
    page.key('Tab')
    assert page.js('document.activeElement.closest("#commands") != null')
    page.js('window.was = document.activeElement; 1')
    first = page.js('document.querySelector("#commands tbody tr").innerText')
    host.run('node1', 'true')                    # a new row comes before the one that has the focus
    page.wait('document.querySelector("#commands tbody tr").innerText != %s' % json.dumps(first))
    assert page.js('document.activeElement === window.was && window.was.isConnected')
    page.key('Enter')
    page.wait('document.activeElement.id == "output-title"')
    page.wait('/^(exited|signaled), /.test(%s)' % text_of('#output-state'))
    tree = page.tree()
    roles = {role for role, name in tree}
    assert {'banner', 'main', 'heading', 'table', 'columnheader', 'rowheader', 'log', 'status'} <= roles
    regions = {name for role, name in tree if role == 'region'}
    assert {'Machines', 'Commands', 'Transfers', 'Broker', 'Events'} <= regions
    assert all(name for role, name in tree if role in (
        'button', 'checkbox', 'radio', 'image', 'table', 'region', 'log', 'progressbar'))
    page.resize(400, 800)                        # as cards, it is a table all the same
    narrow = page.tree()
    assert [name for role, name in narrow if role == 'columnheader'] == \
        [name for role, name in tree if role == 'columnheader']
    assert page.problems == []


CONTRAST = """
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = colour => [...rgba(colour)].slice(0, 3).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, n) => sum + v * [.2126, .7152, .0722][n], 0);
  const ground = node => {
    const colour = getComputedStyle(node).backgroundColor;
    return rgba(colour)[3] == 255 ? colour : ground(node.parentElement);
  };
  const bad = [];
  for (const node of document.querySelectorAll('body *')) {
    if (!node.offsetParent || ![...node.childNodes].some(n => n.nodeType == 3 && n.data.trim())) continue;
    if (node.closest('script, .unseen')) continue;
    const pair = [light(getComputedStyle(node).color), light(ground(node))].sort((a, b) => b - a);
    const ratio = (pair[0] + .05) / (pair[1] + .05);
    if (ratio < 4.5) bad.push(ratio.toFixed(2) + ' ' + node.outerHTML.slice(0, 80));
  }
  return bad;
})()
"""


@in_chromium
@pytest.mark.once
def test_from_a_phone_to_a_wide_screen_light_and_dark(host, guest, api, browser):
    host.run('node1', 'a-program-with-a-long-name-' * 5)
    host.results(api.runCmd('node1', 'cat', ['and', 'some', 'words'], {}, '', '/no/such/folder' * 9))
    page = browser.open(api.getStatusLink())
    page.wait('document.querySelector("#commands tbody button")')
    page.wait('document.querySelector("#events tbody button")')
    for width in (320, 412, 700, 760, 820, 1100, 1400, 2560):
        page.resize(width, 800)
        assert page.js('document.documentElement.scrollWidth') <= width
        assert page.js('[...document.querySelectorAll("section")].filter('
                       's => s.scrollWidth > s.clientWidth + 1).length') == 0, width
        assert page.js('getComputedStyle(document.querySelector("#commands tbody tr")).display') == (
            'table-row' if width >= 760 else 'grid'), width
        assert width < 760 or page.js('document.querySelector("#commands th").offsetWidth >= 110'), width
    for dark in (False, True):
        page.scheme(dark)
        assert page.js(CONTRAST) == []
    keep_shots(page, 'page')
    assert page.problems == []


@in_chromium
@pytest.mark.once
def test_a_guest_that_goes_and_a_host_that_restarts(tmp_path, browser):
    with Host(tmp_path / 'host', vm_gc_grace=3) as host:
        guest = Agent(tmp_path / 'guest', host, 'node1').start()
        try:
            with host.api as api:
                page = browser.open(api.getStatusLink())
            page.wait(text_of('#machines') + '.includes("alive")')
            guest.stop(signal.SIGKILL)
            page.wait(text_of('#machines') + '.includes("lost")')
            page.wait(text_of('#say') + ' == "node1 is lost"')
            page.wait(text_of('#glance') + '.startsWith("1 lost, ")')
            assert page.js(text_of('#machines-count')) == '0 agents connected'
            page.wait('document.title.startsWith("1 lost, vmhost ")')
            with Agent(tmp_path / 'other', host, 'node2') as other:
                host.run('node2', 'true')
                other.stop()
            page.wait(text_of('#machines') + '.includes("left")')
            page.wait(text_of('#glance') + ' == "1 lost, 0 alive, 1 left of 2 machines"')
        finally:
            guest.stop(signal.SIGKILL)
        port = host.address.split(':')[1]
        host.stop()
        page.wait('!document.querySelector("#trouble").hidden')
        assert 'does not answer' in page.js(text_of('#trouble'))
        with open(host.ini) as file:
            ini = file.read().replace('xmlrpc_port = 0', 'xmlrpc_port = ' + port)
        with open(host.ini, 'w') as file:
            file.write(ini)
        host.start()
        page.wait('document.querySelector("#trouble").hidden')      # the visit goes on
        page.wait(text_of('#events') + '.includes("host-stop")')
        assert page.js(text_of('#glance')).startswith('1 lost, ')   # who said BYE isn't missed now, either
        host.stop()
        os.remove(os.path.join(host.state, hostpages.VISITS))
        host.start()
        page.wait(text_of('#trouble') + '.includes("status --open")')
