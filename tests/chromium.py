"""A real Chromium for the tests, driven by the DevTools protocol over a pair of pipes.

    with Browser() as browser:
        page = browser.open('http://127.0.0.1:1234/', width=400)
        page.click('#button')
        page.wait('document.title == "done"')
        assert page.problems == []
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
# Chromium reads commands from descriptor 3, and writes answers to 4.
EXEC = ('import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); '
        'os.execv(sys.argv[3], sys.argv[3:])')
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-component-update', '--disable-sync',
         '--disable-dev-shm-usage', '--remote-debugging-pipe', 'about:blank']
KEYS = {'Tab': 9, 'Enter': 13, 'Escape': 27, ' ': 32}


class Browser:
    """One Chromium with an empty profile; it and the profile end with the ``with`` block."""

    def __init__(self, timeout=60):
        self._timeout = timeout
        self._number = 0
        self._unread = b''
        self._pages = {}
        self._folder = tempfile.mkdtemp(prefix='chromium-')
        there, ours = os.pipe(), os.pipe()
        read_by_it, write_by_it = (fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (there[0], ours[1]))
        os.close(there[0])
        os.close(ours[1])
        self._input, self._output = there[1], ours[0]
        with open(os.path.join(self._folder, 'log'), 'wb') as log:
            self._process = subprocess.Popen(
                [sys.executable, '-c', EXEC, str(read_by_it), str(write_by_it), CHROMIUM,
                 '--user-data-dir=' + os.path.join(self._folder, 'profile')] + FLAGS,
                pass_fds=(read_by_it, write_by_it), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)
        os.close(read_by_it)
        os.close(write_by_it)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        try:
            self.call('Browser.close')
            self._process.wait(10)
        except (OSError, AssertionError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._input)
        os.close(self._output)
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, url, width=1280, height=900, dark=False):
        """A new page of that size, loaded."""
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        page = self._pages[session] = Page(self, session)
        for domain in ('Page', 'Runtime', 'Log'):
            page.call(domain + '.enable')
        page.call('Emulation.setFocusEmulationEnabled', enabled=True)
        page.resize(width, height)
        page.scheme(dark)
        page.go(url)
        return page

    def call(self, method, session=None, **params):
        """One command; gives its answer. What happens meanwhile goes to the pages."""
        self._number += 1
        message = {'id': self._number, 'method': method, 'params': params}
        if session:
            message['sessionId'] = session
        os.write(self._input, json.dumps(message).encode() + b'\0')
        return self.hear(self._number)

    def hear(self, number=None, timeout=None):
        """Reads until the answer with that number; without one, until nothing more is there."""
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        while True:
            while b'\0' in self._unread:
                line, _, self._unread = self._unread.partition(b'\0')
                message = json.loads(line.decode())
                if 'id' not in message:
                    page = self._pages.get(message.get('sessionId'))
                    if page is not None:
                        page.happened(message['method'], message['params'])
                elif message['id'] == number:
                    assert 'error' not in message, message['error']
                    return message['result']
            ready, _, _ = select.select([self._output], [], [], max(0, deadline - time.monotonic()))
            if not ready and number is None:
                return None
            assert ready, 'Chromium does not answer: ' + self.log()
            data = os.read(self._output, 1 << 20)
            assert data, 'Chromium ended: ' + self.log()
            self._unread += data

    def log(self):
        """The end of what Chromium said."""
        with open(os.path.join(self._folder, 'log'), errors='replace') as file:
            return file.read()[-2000:]


class Page:
    """One tab. ``problems``: what the console complained of, exceptions and CSP violations too."""

    def __init__(self, browser, session):
        self._browser = browser
        self._session = session
        self._loaded = False
        self.problems = []

    def call(self, method, **params):
        return self._browser.call(method, self._session, **params)

    def happened(self, method, params):
        if method == 'Page.loadEventFired':
            self._loaded = True
        elif method == 'Runtime.exceptionThrown':
            self.problems.append(str(params['exceptionDetails']))
        elif method == 'Log.entryAdded' and params['entry']['level'] in ('error', 'warning') \
                and 'ERR_NETWORK_CHANGED' not in params['entry']['text']:      # other tests make interfaces
            self.problems.append(params['entry']['text'] + ' ' + params['entry'].get('url', ''))
        elif method == 'Runtime.consoleAPICalled' and params['type'] in ('error', 'warning', 'assert'):
            self.problems.append(str(params['args']))

    def go(self, url, timeout=60):
        """Loads a page."""
        self._loaded = False
        answer = self.call('Page.navigate', url=url)
        assert 'errorText' not in answer, answer
        deadline = time.monotonic() + timeout
        while not self._loaded:
            assert time.monotonic() < deadline, 'not loaded: ' + url
            self._browser.hear(timeout=0.05)

    def resize(self, width, height):
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)

    def scheme(self, dark):
        """Light or dark, as the user's system says."""
        self.call('Emulation.setEmulatedMedia', features=[
            {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}])

    def js(self, expression):
        """The value of an expression, as JSON can carry it."""
        answer = self.call('Runtime.evaluate', expression=expression, returnByValue=True,
                           awaitPromise=True)
        assert 'exceptionDetails' not in answer, answer
        return answer['result'].get('value')

    def wait(self, expression, timeout=30):
        """Waits until the expression is true."""
        deadline = time.monotonic() + timeout
        while not self.js('!!(%s)' % expression):
            assert time.monotonic() < deadline, 'never true: %s\n%s\n%s' % (
                expression, self.problems, self.js('document.body.innerText'))
            self._browser.hear(timeout=0.05)

    def click(self, selector):
        """A click of the mouse on the middle of an element."""
        place = self.js('(() => { const e = document.querySelector(%s); '
                        'e.scrollIntoView({block: "center"}); const r = e.getBoundingClientRect(); '
                        'return [r.x + r.width / 2, r.y + r.height / 2]; })()' % json.dumps(selector))
        for kind in ('mousePressed', 'mouseReleased'):
            self.call('Input.dispatchMouseEvent', type=kind, x=place[0], y=place[1], button='left',
                      clickCount=1)

    def key(self, name, shift=False):
        """Presses a key."""
        more = {'text': '\r'} if name == 'Enter' else {}
        for kind in ('keyDown', 'keyUp'):
            self.call('Input.dispatchKeyEvent', type=kind, key=name, code=name,
                      windowsVirtualKeyCode=KEYS[name], modifiers=8 if shift else 0, **more)

    def screenshot(self, path, whole=True):
        """Writes a PNG of the whole page."""
        shot = self.call('Page.captureScreenshot', captureBeyondViewport=whole)
        with open(path, 'wb') as file:
            file.write(base64.b64decode(shot['data']))

    def tree(self):
        """What a screen reader is told: [(role, name)]."""
        nodes = self.call('Accessibility.getFullAXTree')['nodes']
        return [(node['role']['value'], node.get('name', {}).get('value', ''))
                for node in nodes if not node.get('ignored')]
