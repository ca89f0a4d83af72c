"""docs/api.md is what the docstrings say, its examples do what stands there, and GET / shows the same."""

import ast
import base64
import doctest
import html
import http.client
import os
import re
import subprocess
import sys
import time
import types
import xmlrpc.client

import pytest
from agents import TOP, Agent
from fake_guest import CONNECTIONS, Guest
from helpers import wait_until

import faults
import hostapi
import hostreference

pytestmark = pytest.mark.whole

METHODS = [method for part, methods in hostreference.describe(hostapi.PARTS) for method in methods]


def test_the_page_is_what_the_docstrings_say():
    check = subprocess.run([sys.executable, os.path.join(TOP, 'docs', 'make_api.py'), '--check'],
                           stderr=subprocess.PIPE, timeout=60)
    assert check.returncode == 0, check.stderr.decode()


def test_all_methods_are_there_with_an_example_of_each():
    names = [name for part in hostapi.PARTS for name in hostapi.names_of(part)]
    assert [method.name for method in METHODS] == names
    for method in METHODS:
        assert method.text, method.name
        calls = [node for node in ast.walk(ast.parse(code_of(method)))
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                 and getattr(node.func.value, 'id', '') == 'host']
        assert method.name in [call.func.attr for call in calls], method.name
        assert {call.func.attr for call in calls} <= {method.name for method in METHODS}


def code_of(method):
    return ''.join(example.source for example in doctest.DocTestParser().get_examples(method.example))


@pytest.mark.skipif(os.name != 'posix', reason='guests are POSIX')
def test_each_example_does_what_stands_there(host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Agent(tmp_path, host, '08:00:27:00:00:01', name='node1'), host.api as api:
        browser = types.SimpleNamespace(open=lambda link: '/status?key=' in link)
        names = {'host': api, 'os': os, 'time': time, 'webbrowser': browser}
        for method in METHODS:
            examples = doctest.DocTestParser().get_examples(method.example)
            if needs_hypervisor(method):
                # What it answers is VirtualBox's: here, that it is asked with arguments that fit.
                with pytest.raises(xmlrpc.client.Fault) as caught:
                    exec(code_of(method), {'host': api})
                assert caught.value.faultCode == faults.NotSupported.fault, method.name
                continue
            if method.name == 'stopHost':
                continue                     # the others go on (test_other_systems.py)
            if method.name == 'forgetVM':
                with Guest(host.broker_port, 'lab12', bytes.fromhex(64 * '5')) as other:
                    other.hello(tell=False)    # by what pairVM told
                    other.hear('PING')
                    other.word('STILL_ALIVE', CONNECTIONS)
                    wait_until(lambda: 'lab12' in api.listRegisteredVMs())
            test = doctest.DocTest(examples, names, method.name, None, None, None)
            test.globs = names                   # the examples go on from one another
            said = []
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            assert runner.run(test, out=said.append, clear_globs=False).failed == 0, ''.join(said)


def needs_hypervisor(method):
    control = dict(hostreference.describe(hostapi.PARTS))['VM control']
    return method.name in ('version', 'states') or method.name in [other.name for other in control]


def page_at(host, headers):
    connection = http.client.HTTPConnection(*host.address.split(':'), timeout=30)
    connection.request('GET', '/', headers=headers)
    answer = connection.getresponse()
    page = answer.read().decode()
    connection.close()
    return answer.status, page


def test_the_host_shows_the_same_to_who_has_the_token(host):
    assert page_at(host, {})[0] == 401
    secret = base64.b64encode(('vmhost:' + host.token).encode()).decode()
    status, page = page_at(host, {'Authorization': 'Basic ' + secret})
    assert status == 200
    text = html.unescape(re.sub('<[^>]*>', '', re.sub('</?code>', '``', page.replace('</p>\n<p>', '\n\n'))))
    with open(os.path.join(TOP, 'docs', 'api.md'), encoding='utf-8') as file:
        written = file.read()
    for method in METHODS:
        for part in (method.name + method.signature, method.text, method.example):
            assert part in text and part in written, method.name
    for alias in hostapi.ALIASES:
        assert alias in text and alias in written
