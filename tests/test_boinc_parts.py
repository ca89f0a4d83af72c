"""vmboinc's parts by themselves: the memory shared with a client, the slot, the job file, a task's life."""

import ast
import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

import agent
import boinchost
import boincjob
import boincmachines
import boincslot
import boincwork
import hostclient
import vmboinc
from boinchost import Trouble
from boinclife import (
    AWAY_TRIES,
    FIRST_DELAY,
    LEAST_FRACTION,
    LONGEST_DELAY,
    LOOK_EVERY,
    QUIT_WITHIN,
    READY_WITHIN,
    SILENT_FOR,
    End,
    Life,
    delay_of,
)
from boincslot import CHANNEL, CHANNELS, Channels, InitData, Record, Slot
from boincwork import Look
from faults import (
    AgentNotConnected,
    Busy,
    DeadlineExceeded,
    HypervisorError,
    InvalidParams,
    NotSupported,
    TransferError,
)

# The shared memory.

CHARACTERS = st.characters(min_codepoint=1, max_codepoint=127)


@given(st.lists(st.tuples(st.integers(0, CHANNELS - 1), st.text(CHARACTERS, min_size=1, max_size=1022))))
def test_what_is_sent_is_received_once(messages):
    memory = bytearray(CHANNELS * CHANNEL)
    sender, receiver, waiting = Channels(memory), Channels(memory), {}
    for channel, text in messages:
        assert sender.send(channel, text) == (channel not in waiting)
        waiting.setdefault(channel, text)
        assert all(receiver.waits(each) for each in waiting)
    for channel in range(CHANNELS):
        assert receiver.receive(channel) == waiting.get(channel, '')
        assert receiver.receive(channel) == ''
    assert len(memory) == CHANNELS * CHANNEL


@given(st.binary(max_size=CHANNEL), st.integers(0, CHANNELS - 1))
def test_whatever_a_client_leaves_there_is_read(left, channel):
    memory = bytearray(b'\7' * (CHANNELS * CHANNEL))
    memory[channel * CHANNEL:channel * CHANNEL + len(left)] = left
    boincslot.words_of(Channels(memory).receive(channel))
    assert memory[channel * CHANNEL] == 0 and memory.count(0) <= 1 + left.count(0)
    assert len(memory) == CHANNELS * CHANNEL


def test_what_does_not_fit_is_refused():
    memory = bytearray(CHANNELS * CHANNEL)
    with pytest.raises(ValueError):
        Channels(memory).send(5, 'x' * 1023)
    assert not any(memory)


def test_the_bundle_is_what_a_client_and_a_server_want(tmp_path):
    path = str(tmp_path / 'vmboinc_100')
    top = os.path.dirname(os.path.abspath(boincslot.__file__))
    subprocess.run([sys.executable, os.path.join(top, 'vmboinc.py'), '--bundle', path], check=True)
    with open(path, 'rb') as file:
        content = file.read()
    assert content.startswith(b'#!/usr/bin/env python3\n') and b'\nAPI_VERSION_7.20.5\n' in content
    said = subprocess.run([sys.executable, '-I', '-S', path, '--help'], stdout=subprocess.PIPE, check=True)
    assert b'usage: ' in said.stdout
    said = subprocess.run([sys.executable, '-I', '-S', path, '--version'], stdout=subprocess.PIPE, check=True,
                          cwd=str(tmp_path))
    assert said.stdout.decode() == 'vmboinc %s\n' % agent.VERSION
    said = subprocess.run([sys.executable, '-I', '-S', path, '--host-agent', '--help'],
                          stdout=subprocess.PIPE, check=True)
    assert b'cleanup' in said.stdout


# The slot.

INIT = """<app_init_data>
<project_dir>/var/lib/a & b</project_dir>
<wu_cpu_time>12.500000</wu_cpu_time>
<project_preferences><odd <unclosed></project_preferences>
<result_name>task_1</result_name>
</app_init_data>
"""


def test_init_data_that_no_parser_takes():
    init = InitData(INIT)
    assert init.text('project_dir') == '/var/lib/a & b' and init.text('result_name') == 'task_1'
    assert init.number('wu_cpu_time') == 12.5 and init.number('client_pid', 7) == 7
    assert init.text('missing', 'so') == 'so' and init.number('result_name', 1) == 1
    assert [InitData('<ncpus>%s</ncpus>' % odd).number('ncpus', 2) for odd in ('nan', '-inf', '1e999', '')] \
        == [2, 2, 2, 2]


@pytest.mark.parametrize('place', ['before', 'after'])
def test_what_a_projects_preferences_say_is_not_the_clients_word(place):
    """They are what the project's site has; a client's own folder, say, would be theirs to name."""
    told = '<boinc_dir>/boinc</boinc_dir><result_name>t1</result_name>'
    theirs = ('<project_preferences>\n<boinc_dir>/evil</boinc_dir>\n<project_dir>/evil</project_dir>\n'
              '<result_name>x</result_name></project_preferences>')
    init = InitData(theirs + told if place == 'before' else told + theirs)
    assert [init.text(tag) for tag in ('boinc_dir', 'result_name', 'project_dir')] == ['/boinc', 't1', '']


def test_a_projects_preferences_are_no_words_of_the_clients():
    init = InitData('<project_preferences><project_dir>/theirs</project_dir>\n<ncpus>9</ncpus>\n'
                    '<odd <unclosed></project_preferences>\n<project_dir>/ours</project_dir>'
                    '</app_init_data>')
    assert init.text('project_dir') == '/ours' and init.number('ncpus', 2) == 2 and init.is_whole


@pytest.mark.parametrize('version, limit, minds', [
    ((7, 20), 25, True), ((8, 0), 1, True), ((8, 2), 25, False), ((9, 0), 25, False), ((7, 20), 0, False)])
def test_clients_that_mind_foreign_cpu(version, limit, minds):
    init = InitData('<major_version>%d</major_version><minor_version>%d</minor_version>'
                    '<global_preferences><suspend_cpu_usage>%.6f</suspend_cpu_usage></global_preferences>'
                    % (version + (limit,)))
    assert init.minds_foreign_cpu is minds


def test_logical_names(tmp_path):
    (tmp_path / 'projects').mkdir()
    slot_folder = tmp_path / 'slots' / '0'
    slot_folder.mkdir(parents=True)
    (tmp_path / 'projects' / 'real').write_text('what it holds')
    (slot_folder / 'by_file').write_text('<soft_link>../../projects/real</soft_link>\n')
    (slot_folder / 'by_link').symlink_to('../../projects/real')
    (slot_folder / 'copied').write_text('copied')
    (slot_folder / 'to_come').write_text('<soft_link>../../projects/output</soft_link>\n')
    slot = Slot(str(slot_folder))
    real = str(tmp_path / 'projects' / 'real')
    assert [slot.resolve(name) for name in ('by_file', 'by_link', 'copied', 'to_come', 'nothing')] == [
        real, real, str(slot_folder / 'copied'), str(tmp_path / 'projects' / 'output'),
        str(slot_folder / 'nothing')]


@pytest.mark.skipif(os.name != 'posix', reason='Windows locks otherwise')
def test_one_wrapper_for_a_slot(tmp_path):
    code = 'import boincslot; boincslot.Slot(%r).lock()' % str(tmp_path)
    slot = Slot(str(tmp_path))
    slot.lock()
    top = os.path.dirname(os.path.abspath(boincslot.__file__))
    other = subprocess.run([sys.executable, '-c', code], stderr=subprocess.PIPE, cwd=top)
    assert b'SlotTaken' in other.stderr
    slot.unlock()
    assert subprocess.run([sys.executable, '-c', code], cwd=top).returncode == 0


@pytest.mark.skipif(os.name != 'posix', reason='Windows locks otherwise')
def test_who_waits_for_a_slot_has_the_lock_that_the_next_one_finds(tmp_path, monkeypatch):
    """Not that of a file which the one before has removed meanwhile."""
    slot, path, opened = Slot(str(tmp_path)), str(tmp_path / boincslot.LOCK_FILE), open

    def removed_meanwhile(*args):
        file = opened(*args)
        if args[0] == path:
            monkeypatch.undo()
            os.remove(path)
        return file
    monkeypatch.setattr(boincslot, 'open', removed_meanwhile, raising=False)
    assert boincslot.wait_for_lock(slot, 5)
    assert subprocess.run([sys.executable, '-c', LOCKED, path]).returncode == 1
    slot.unlock()
    assert os.listdir(str(tmp_path)) == []


LOCKED = '''
import fcntl, sys
try:
    fcntl.lockf(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(1)
'''


def test_files_at_the_end(tmp_path):
    slot = Slot(str(tmp_path))
    assert slot.finished() is None
    slot.exit_for_a_while(60.4, 'no\nroom  here', True)
    assert (tmp_path / 'boinc_temporary_exit').read_text() == '60\nno room here\nnotice\n'
    slot.finish(3, 'so it is')
    assert (tmp_path / 'boinc_finish_called').read_text() == '3\nso it is\n' and slot.finished() == 3


# What ends an element of the client's own files.
MARKUP = ']]></stderr_out></result>'


def test_no_text_of_a_guest_is_markup_in_the_clients_own_files(tmp_path):
    """A client copies what a task says into its client_state.xml as it is, and reads that up to the end of
    the element: with one of these in it, it forgets all tasks of the project at its next start."""
    slot = Slot(str(tmp_path))
    slot.exit_for_a_while(60, 'no <room> ' + MARKUP)
    slot.finish(3, 'so <img src=x> is ' + MARKUP, True)
    assert (tmp_path / 'boinc_temporary_exit').read_text() == (
        '60\nno <room> ]] >< /stderr_out>< /result>\n')
    assert (tmp_path / 'boinc_finish_called').read_text() == (
        '3\nso < img src=x> is ]] >< /stderr_out>< /result>\nnotice\n')


def test_a_message_to_the_user_is_a_line_that_a_client_reads_as_one(tmp_path):
    """Into a kilobyte: of a longer one, the rest would be taken for the line that says whether it is an
    alert. And nothing in it that is no XML."""
    slot = Slot(str(tmp_path))
    slot.finish(5, '\x01two\nlines \x1b[1m ' + '\U0001f600' * 5000, True)
    slot.exit_for_a_while(60, '\x01two\nlines \x1b[1m ' + '\U0001f600' * 5000, True)
    for name in ('boinc_finish_called', 'boinc_temporary_exit'):
        _, message, notice = (tmp_path / name).read_bytes().splitlines()
        assert message.startswith(b'\\x01two lines \\x1b[1m ') and len(message) < 1024 and notice == b'notice'


def test_nor_in_what_the_client_copies_of_stderr(tmp_path):
    """Whatever says it: the program's last words, a fault's text, a traceback."""
    said = subprocess.run(
        [sys.executable, '-c', 'import logging, vmboinc; vmboinc.log_to_stderr(); from sys import argv\n'
         'logging.getLogger("vmboinc").info("%s", argv[1])\n'
         'try: raise OSError(argv[1])\n'
         'except OSError: logging.getLogger("vmboinc").exception("<it> broke")\n', MARKUP],
        cwd=os.path.dirname(os.path.abspath(vmboinc.__file__)), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=60).stdout.decode()
    assert said.count(']] >< /stderr_out>< /result>') == 2 and '<it> broke' in said
    assert ']]>' not in said and '</' not in said, said


@pytest.mark.parametrize('text', ['', '{', '[1]', '{"attempt": "two", "cpu": null, "unknown": 5}'])
def test_a_damaged_record_is_a_new_one(text, tmp_path):
    """But for a machine, which there may be: it isn't taken for one from before a reset, and removed."""
    path = str(tmp_path / 'record')
    with open(path, 'w') as file:
        file.write(text)
    record = Record(path, 7.0)
    assert (record.attempt, record.cpu, record.put) == (1, 7.0, False)
    assert record.made == (text[:2] != '{"') and not Record(str(tmp_path / 'none')).made
    record.attempt, record.elapsed = 2, 3.5
    record.save()
    assert Record(path).attempt == 2 and Record(path).elapsed == 3.5


# The job file.

def job_of(fields=''):
    return boincjob.Job('<vbox_job>%s</vbox_job>' % fields)


def test_a_job_file_of_vboxwrapper_is_read_as_it_is():
    job = job_of('''
        <os_name>Linux26_64</os_name><memory_size_mb>512</memory_size_mb><enable_network/>
        <job_duration>3600.5</job_duration><fraction_done_filename>done/fraction</fraction_done_filename>
        <copy_to_shared>a</copy_to_shared><copy_to_shared>b</copy_to_shared>
        <heartbeat_filename>heart</heartbeat_filename><vram_size_mb>16</vram_size_mb>
        <enable_shared_directory>1</enable_shared_directory><share_project_dir>0</share_project_dir>
        <frobnicate>9</frobnicate><!-- said -->''')
    assert (job.os_name, job.memory_size_mb) == ('Linux26_64', 512)
    assert (job.job_duration, job.fraction_done_filename) == (3600.5, 'done/fraction')
    assert job.copy_to_shared == ['a', 'b']
    assert job.warnings == ['vbox_job.xml: <frobnicate> is not known, and does nothing']
    assert job.run(['7', 'x y']) == ['sh', 'boinc_app', '7', 'x y']


def test_our_own_fields():
    job = job_of('''<command>python3 "the science.py" -v</command><checkpoint>none</checkpoint>
        <input>in</input><input><name>data</name><path>deep/data</path><optional/></input>
        <output>out</output>''')
    assert job.run(['5']) == ['python3', 'the science.py', '-v', '5'] and job.checkpoint == 'none'
    assert job.inputs == [('in', 'in', False), ('data', 'deep/data', True)]
    assert job.outputs == [('out', 'out', False)]


@pytest.mark.parametrize('fields, said', [
    ('<enable_floppyio>1</enable_floppyio>', 'enable_floppyio'),
    ('<share_project_dir/>', 'share_project_dir'),
    ('<job_duration>long</job_duration>', 'a number'),
    ('<job_duration>nan</job_duration>', 'a number'), ('<input>/etc/passwd</input>', 'a relative path'),
    ('<output>../../x</output>', 'a relative path'), ('<output>stderr.txt</output>', 'another name'),
    ('<output>vmboinc.bare/x</output>', 'another name'),
    ('<output><name>boinc_finish_called</name><path>out</path></output>', 'another name'),
    ('<intermediate_upload_file>INIT_DATA.xml</intermediate_upload_file>', 'another name'),
    ('<output><name>a</name><mode>7</mode></output>', 'mode'),
    ('<input><name>a</name><path>/etc/x</path></input>', 'a relative path without .., not <path>/etc/x$'),
    ('<output><name>../a</name></output>', 'a relative path without .., not <name>../a$'),
    ('<memory_size_mb>99999999999999</memory_size_mb>', 'a number from 0 to 1e12'),
    ('<command>"</command>', 'words'), ('<command/>', 'a command'),
    ('<checkpoint>often</checkpoint>', 'state, files, none'),
    ('<enable_remotedesktop>maybe</enable_remotedesktop>', '1 or 0'), ('<a>', 'no XML'),
    ('<command>%s</command>' % ('a ' * (1 << 19)), 'more than 1 MiB')], ids=lambda value: value[:60])
def test_what_a_job_file_must_not_say(fields, said):
    with pytest.raises(boincjob.JobError, match='vbox_job.xml.*' + said):
        job_of(fields)


def test_ports_that_are_forwarded():
    job = job_of('''<port_forward><host_port>8000</host_port><guest_port>22</guest_port><nports>3</nports>
        <is_remote>0</is_remote></port_forward><pf_guest_port> 80 </pf_guest_port>
        <port_forward><guest_port>81</guest_port></port_forward>''')
    assert job.forwards == [(80, 0), (22, 8000), (23, 8001), (24, 8002), (81, 0)] and job.warnings == []
    assert job_of('<pf_guest_port>80</pf_guest_port><pf_host_port>7</pf_host_port>').forwards == [(80, 7)]
    assert job_of('<pf_guest_port>0</pf_guest_port>').forwards == job_of().forwards == []
    lacking = job_of('<pf_host_port>7</pf_host_port>')
    assert lacking.forwards == [] and 'without <pf_guest_port>' in lacking.warnings[0]


@pytest.mark.parametrize('fields, said', [
    ('', 'expected guest_port: a whole number from 1 to 65535, not \'\''),
    ('<guest_port>0</guest_port>', 'guest_port'), ('<guest_port>65536</guest_port>', 'guest_port'),
    ('<guest_port>1_0</guest_port>', 'guest_port'),
    ('<guest_port>80</guest_port><host_port>-1</host_port>', 'host_port'),
    ('<guest_port>80</guest_port><nports>0</nports>', 'nports'),
    ('<guest_port>80</guest_port><nports>101</nports>', 'nports: .* to 100'),
    ('<guest_port>65500</guest_port><nports>50</nports>', 'no port above 65535'),
    ('<guest_port>80</guest_port><host_port>65500</host_port><nports>50</nports>', 'no port above 65535'),
    ('<guest_port>80</guest_port><protocol>udp</protocol>', 'not <protocol>'),
    ('<guest_port>80</guest_port><is_remote/>', '<is_remote>: refused')])
def test_ports_that_are_not(fields, said):
    with pytest.raises(boincjob.JobError, match='vbox_job.xml: <port_forward>.*' + said):
        job_of('<port_forward>%s</port_forward>' % fields)
    with pytest.raises(boincjob.JobError, match='<pf_guest_port>80x: expected a whole number from 0 to'):
        job_of('<pf_guest_port>80x</pf_guest_port>')


@given(st.text())
def test_any_text_is_a_job_file_or_an_error(text):
    for whole in (text, '<vbox_job>%s</vbox_job>' % text, '<vbox_job><input>%s</input></vbox_job>' % text):
        try:
            job = boincjob.Job(whole)
        except boincjob.JobError:
            continue
        for moved in job.inputs:
            assert not moved.path.startswith('/') and '..' not in moved.path.split('/')


@given(st.lists(st.text()), st.floats(0, 100))
def test_any_command_line_is_sorted_or_an_error(words, ncpus):
    try:
        read = boincjob.read_words(words, ncpus)
    except boincjob.JobError:
        return
    assert 1 <= read.cpus <= 32 and len(read.rest) <= len(words)


def test_the_words_of_vboxwrapper_are_not_the_sciences():
    words = '--nthreads 4 -n 5 --memory_size_mb 2048 in --trickle 60 --vmimage 2 --sporadic -- --nthreads 7'
    read = boincjob.read_words(words.split(), 1)
    assert read == (4, 2048, 'vm_image_2.vdi', ['-n', '5', 'in', '--nthreads', '7'],
                    ['--trickle', '--sporadic'])
    assert boincjob.read_words([], 1.5) == (2, 0, 'vm_image.vdi', [], [])


@pytest.mark.parametrize('text, fraction', [
    ('0.25', 0.25), ('0.1\n0.2\n', 0.2), ('12 %', None), ('done: 12%', 0.12), ('', None), ('nan', None),
    ('2', None), ('-1', None), ('x', None)])
def test_fractions(text, fraction):
    assert boincjob.fraction_of(text) == fraction


@given(st.text())
def test_any_text_is_a_trigger(text):
    assert isinstance(boincjob.read_trigger(text).number, int)


def test_triggers():
    assert boincjob.read_trigger('3\n1\nall is\nwell\n') == (3, True, 'all is well')
    assert boincjob.read_trigger('') == (0, False, '')
    for text, number in (('3.7', 3), ('-1 x', -1), ('7\r\n1\r\n', 7), ('done', 0), (' +5 x', 5), ('-3', -3),
                         ('9' * 30, (1 << 31) - 1), ('-' + '9' * 30, -1 << 31)):
        assert boincjob.read_trigger(text).number == number


@pytest.mark.skipif(os.name != 'posix', reason='Windows has exit codes of 32 bits')
@pytest.mark.parametrize('code, exits', [(0, 0), (3, 3), (256, 255), (512, 255), (300, 44), (-1, 255)])
def test_no_code_but_0_is_a_success(code, exits, tmp_path, monkeypatch):
    """Of which a client on POSIX sees the low 8 bits; also where the finish file alone tells it."""
    slot = Slot(str(tmp_path))
    assert vmboinc.leave(slot, End(code, True)) == exits and slot.finished() == code
    monkeypatch.chdir(str(tmp_path))
    assert vmboinc.run_task([]) == exits


@pytest.mark.skipif(os.name != 'posix', reason='Windows has no signals')
@pytest.mark.parametrize('number, dies', [
    (11, 11), (40, 40), (9, 0), (1, 0), (0, 0), (-9, 0), (32, None), (4711, 0)])
def test_it_dies_of_any_signal_that_is_the_sciences_own_end(number, dies, tmp_path):
    """Of real-time signals, too, for which Python has no names; what no signal is ends it as one that a
    client would take for its machine's fault. (32 and 33 are the C library's.)"""
    process = subprocess.run(
        [sys.executable, '-c', 'import sys, vmboinc; from boinclife import End; from boincslot import Slot\n'
         'sys.exit(vmboinc.leave(Slot(sys.argv[1]), End(193, True, signal=int(sys.argv[2]))))',
         str(tmp_path), str(number)], cwd=os.path.dirname(os.path.abspath(vmboinc.__file__)),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    assert b'Traceback' not in process.stdout, process.stdout.decode()
    assert process.returncode in ((-number, 193) if dies is None else (-dies or 193,))


@pytest.mark.parametrize('words', [['--bundle'], ['--bundle', 'a', 'b'], ['--host-agent']])
def test_a_word_of_its_own_without_what_it_needs_is_no_task(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert vmboinc.main(words) == 2
    assert capsys.readouterr().err.startswith('usage: ') and os.listdir(str(tmp_path)) == []


# The steps.

class OneAnswer:
    """A host agent that answers each call with the same, or raises it."""

    def __init__(self, answer):
        self.answer = answer

    def call(self, method, *args):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize('why, is_missing', [
    ('/out on vm: /out: does not exist', True), ('/a on vm: not a directory', True),
    ('/out on vm: timed out', False), ('/does not exist on vm: disconnected', False)])
def test_an_output_that_cannot_be_looked_at_is_not_a_missing_one(why, is_missing):
    work = types.SimpleNamespace(host=OneAnswer(TransferError(why)), machine=types.SimpleNamespace(name='vm'))
    files = boincwork.GuestFiles(work, None)
    if is_missing:
        assert files.exists('out') is False
    else:
        with pytest.raises(TransferError):
            files.exists('out')


def fetching(tmp_path, told):
    """Work whose only output is fetched, and what the host agent tells of that."""
    answers = {'startTransfer': '7', 'getTransfer': told, 'listDir': [
        {'name': 'out', 'mtime': 1, 'size': 2, 'isDir': False}]}
    work = boincwork.Work(Slot(str(tmp_path)), job_of('<output>out</output>'), boincjob.read_words([], 1),
                          Record(str(tmp_path / 'record')),
                          types.SimpleNamespace(call=lambda method, *_: answers[method]))
    work.machine = types.SimpleNamespace(name='vm', files='task', lease=lambda: None)
    assert not work.collect()
    return work


@pytest.mark.parametrize('why', ['does not exist', 'neither file, folder nor link', 'is a directory',
                                 'not authorized'])
def test_an_output_that_is_no_file_or_leads_out_of_what_is_served_is_a_missing_one(why, tmp_path):
    assert fetching(tmp_path, {'state': 'failed', 'error': 'task/out: ' + why}).collect()


def test_outputs_that_are_there_are_not_missed_in_a_guest_that_has_none_any_more(tmp_path, caplog):
    assert fetching(tmp_path, {'state': 'done'}).collect()
    after = boincwork.Work(Slot(str(tmp_path)), job_of('<output>out</output>'), boincjob.read_words([], 1),
                           Record(str(tmp_path / 'record')),
                           OneAnswer(TransferError('/task on vm: /task: does not exist')))
    after.machine = types.SimpleNamespace(name='vm', files='task', lease=lambda: None)
    assert after.collect() and not caplog.records


def test_a_file_in_a_folder_is_not_uploaded_before_the_end(tmp_path):
    assert not fetching(tmp_path, {}).upload('folder/out')


def test_an_output_that_is_a_link_to_a_place_that_is_not_served_is_a_missing_one(tmp_path):
    assert fetching(tmp_path, {'state': 'failed', 'error': 'task/out is a link to /etc/passwd, where '
                                                           'nothing is that is served'}).collect()


@pytest.mark.skipif(os.name != 'posix', reason='modes are POSIX')
def test_an_output_is_in_its_folder_and_its_client_can_read_it(tmp_path):
    """Its folder may be missing, and its mode be none, as in the guest."""
    def call(method, *args):
        if method == 'startTransfer':
            open(args[3], 'w').close()
            os.chmod(args[3], 0)
        return {'startTransfer': '7', 'getTransfer': {'state': 'done', 'error': ''}, 'listDir': [
            {'name': 'out', 'mtime': 1, 'size': 2, 'isDir': False}]}[method]
    work = task_in(tmp_path, '<output>sub/out</output>', types.SimpleNamespace(call=call))
    work.machine = types.SimpleNamespace(name='vm', files='', lease=lambda: None)
    assert not work.collect() and work.collect()
    assert os.stat(str(tmp_path / 'slots' / '0' / 'sub' / 'out')).st_mode & 0o777 == 0o600


@pytest.mark.parametrize('why', ['task/out: timed out', '/here/out: does not exist'])
def test_an_output_that_cannot_be_fetched_now_is_fetched_later(why, tmp_path):
    with pytest.raises(Trouble, match='out: '):
        fetching(tmp_path, {'state': 'failed', 'error': why}).collect()


def task_in(folder, job='', host=None):
    """Work of a task of the project 127.0.0.1_p, in slot 0 of a client in that folder."""
    project, slot = folder / 'projects' / '127.0.0.1_p', folder / 'slots' / '0'
    for place in (project, slot):
        place.mkdir(parents=True, exist_ok=True)
    (slot / 'init_data.xml').write_text(
        '<app_init_data><project_dir>%s</project_dir><boinc_dir>%s</boinc_dir><result_name>t1</result_name>'
        '</app_init_data>' % (project, folder))
    return boincwork.Work(Slot(str(slot)), job_of(job), boincjob.read_words([], 1), Record(
        str(slot / Record.FILE)), host or types.SimpleNamespace(drives_vms=True, connect=lambda: True))


def bridge_of(work):
    """What createVM would be asked for."""
    assert work.connect()
    return work.machine._options.get('bridged')


BRIDGED = '<network_bridged_mode/>'


@pytest.mark.parametrize('leave, bridge', [
    ('projects = 127.0.0.1_p', 'auto'), ('projects = x, 127.0.0.1_p\ninterface = en0: Wi-Fi', 'en0: Wi-Fi'),
    ('projects = *\ninterface=eth1', 'eth1'), ('', None), ('projects = x', None), ('projects =', None),
    ('interface = eth0', None)])
def test_a_card_is_bridged_where_the_volunteer_allows_it(leave, bridge, tmp_path):
    (tmp_path / boincwork.LEAVE).write_text('[Bridged]\n' + leave)
    work = task_in(tmp_path, BRIDGED)
    if bridge:
        assert bridge_of(work) == bridge
        return
    with pytest.raises(Trouble, match='network_bridged_mode: refused: .* projects = 127.0.0.1_p, in %s' % (
            tmp_path / boincwork.LEAVE)):
        work.connect()


def test_no_leave_makes_a_project_a_card_that_it_does_not_ask_for(tmp_path):
    (tmp_path / boincwork.LEAVE).write_text('[Bridged]\nprojects = *')
    assert bridge_of(task_in(tmp_path)) is None
    assert bridge_of(task_in(tmp_path, '<network_bridged_mode>0</network_bridged_mode>')) is None


def test_a_leave_that_cannot_be_read_is_none(tmp_path):
    (tmp_path / boincwork.LEAVE).write_text('[Bridged]\nproject = *')
    with pytest.raises(Trouble, match='%s: .Bridged. project: unknown key' % boincwork.LEAVE):
        task_in(tmp_path, BRIDGED).connect()


@pytest.mark.parametrize('folder', ['slots/0', 'projects', 'projects/127.0.0.1_p',
                                    'projects/127.0.0.1_p/vmhost'])
def test_a_project_cannot_give_itself_leave(folder, tmp_path, monkeypatch):
    """By files of its own; also where the client doesn't tell its folder."""
    work = task_in(tmp_path, BRIDGED)
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / boincwork.LEAVE).write_text('[Bridged]\nprojects = *')
    monkeypatch.chdir(str(tmp_path / folder))
    for told in (work, task_in(tmp_path, BRIDGED)):
        with pytest.raises(Trouble, match='refused'):
            told.connect()
        init = tmp_path / 'slots' / '0' / 'init_data.xml'
        init.write_text(init.read_text().replace('boinc_dir', 'other_dir'))
        told._slot.init = boincslot.InitData(init.read_text())


def test_a_machine_that_somebody_stopped_is_said_to_go_on(tmp_path, caplog):
    """Also before its agent has come."""
    states, machine = {'vm': 'Running'}, {'pid': 0, 'forwards': [], 'agent': 'never'}
    answers = {'agentInfo': {'hypervisor': 'any'}, 'listVMsWithState': states, 'getVM': machine}
    image = tmp_path / 'image'
    image.write_text('')
    host = types.SimpleNamespace(call=lambda method, *_: answers.get(method))
    vm = boincmachines.VirtualMachine(host, 'vm', str(image), {'folder': '', 'owner': ''}, dict,
                                  Record(str(tmp_path / 'record')))
    for state in ('Saved', 'Running', 'Running', 'Saved', 'Saved'):
        states['vm'] = state
        assert not vm.ready()
    assert [record.getMessage() for record in caplog.records] == [
        'the machine is Saved, by somebody else or since its lease was over: it goes on']


def test_files_that_are_missing_are_named_with_what_to_do(tmp_path):
    """An image as well as an input; also where a VM is there that was saved: to detach it is no help."""
    (tmp_path / 'projects' / '127.0.0.1_p').mkdir(parents=True)
    states = {}
    answers = {'agentInfo': {'hypervisor': 'any'}, 'listVMsWithState': states}
    host = types.SimpleNamespace(drives_vms=True, connect=lambda: True,
                                 call=lambda method, *_: answers.get(method))
    work = task_in(tmp_path, '<multiattach_vdi_file>image.vdi</multiattach_vdi_file><input>in</input>', host)
    assert work.connect()
    what_to_do = ' is missing%s: reset the project; if it stays so, %s'
    for _ in range(2):
        with pytest.raises(Trouble, match='image.vdi' + what_to_do % ('', 'the application\'s version')):
            work.ready()
        states['127.0.0.1_p_t1'] = 'Saved'
    with pytest.raises(Trouble, match='in' + what_to_do % (' in the slot', 'vbox_job.xml names a file')):
        work.put()


def test_a_task_whose_clients_folder_was_moved_goes_on_with_its_command(tmp_path):
    """To another disk, say, with a link in its place or none: else its program would run a second time."""
    work = task_in(tmp_path / 'here')
    command, machine = work.command, work._name
    work.machine = types.SimpleNamespace(ready=lambda: True)
    assert work.ready()
    os.rename(str(tmp_path / 'here'), str(tmp_path / 'there'))
    moved = task_in(tmp_path / 'there')
    assert (moved.command, moved._name) == (command, machine)
    (tmp_path / 'there' / 'slots' / '0' / Record.FILE).unlink()
    assert task_in(tmp_path / 'there').command != command      # another task's may be called so


def test_a_vm_whose_folder_was_moved_is_registered_there(tmp_path):
    """Once; before anything else is done with it, since its hypervisor may not have noticed yet."""
    asked = []

    def call(method, *args):
        asked.append((method,) + args[:2])
        return {'agentInfo': {'hypervisor': 'some'}, 'listVMsWithState': {'127.0.0.1_p_t1': 'Saved'},
                'registerVM': True}.get(method)
    for place, moved in (('here', False), ('here', False), ('there', True), ('there', False)):
        if moved:
            os.rename(str(tmp_path / 'here'), str(tmp_path / 'there'))
        work = task_in(tmp_path / place, '', types.SimpleNamespace(
            drives_vms=True, connect=lambda: True, call=call))
        del asked[:]
        (tmp_path / place / 'slots' / '0' / 'vm_image.vdi').write_text('')
        assert work.connect() and not work.ready()
        told = [each for each in asked if each[0] == 'registerVM']
        slot = str(tmp_path / place / 'slots' / '0')
        assert told == ([('registerVM', '127.0.0.1_p_t1', slot)] if moved else [])
        assert not moved or asked.index(told[0]) < asked.index(('listVMsWithState',))


@pytest.mark.parametrize('target, stays', [
    ('../../vmboinc.ini', False), ('../../slots/1/out', False), ('../../projects/other/out', False),
    ('../../projects/127.0.0.1_p/out', True), ('out.new', True)])
def test_an_output_that_leads_out_of_the_tasks_folders_is_not_written(target, stays, tmp_path, caplog):
    """Its link may be a file that the project has sent. A volunteer's leave is out of reach."""
    answers = {'startTransfer': '7', 'listDir': [{'name': 'out', 'mtime': 1, 'size': 2, 'isDir': False}]}
    asked = []
    work = task_in(tmp_path, '<output>out</output>', types.SimpleNamespace(
        call=lambda method, *args: asked.append((method,) + args) or answers[method]))
    work.machine = types.SimpleNamespace(name='vm', files='', lease=lambda: None)
    (tmp_path / 'slots' / '0' / 'out').write_text('<soft_link>%s</soft_link>' % target)
    assert work.collect() is not stays
    moved = [each for each in asked if each[0] == 'startTransfer']
    assert moved == ([('startTransfer', 'get', 'vm', 'out', os.path.normpath(
        str(tmp_path / 'slots' / '0' / target)))] if stays else [])
    assert ('out leads out of the task\'s folders' in caplog.text) is not stays
    if not stays:
        assert not work.upload('out') and asked == []


def test_without_a_vm_no_card_is_bridged_and_no_leave_is_needed(tmp_path, caplog):
    assert task_in(tmp_path, BRIDGED, types.SimpleNamespace(drives_vms=False, connect=lambda: True)).connect()
    assert 'no card is bridged' in caplog.text


def test_tasks_whose_long_names_differ_at_their_ends_have_machines_of_their_own(tmp_path):
    names = set()
    for result in ('x' * 240 + '_1', 'x' * 240 + '_2', 'short'):
        (tmp_path / 'init_data.xml').write_text(
            '<project_dir>/p/project</project_dir><result_name>%s</result_name>' % result)
        work = boincwork.Work(Slot(str(tmp_path)), job_of(), boincjob.read_words([], 1), Record(
            str(tmp_path / 'record')), types.SimpleNamespace(drives_vms=False, connect=lambda: True))
        assert work.connect()
        names.add(work.machine.files)
    assert len(names) == 3 and 'project_short' in names and max(map(len, names)) <= boincwork.LONGEST_NAME


class Guest:
    """A host agent with files in a guest: {name: text, or None where it can't be read}."""

    def __init__(self, tmp_path, **files):
        self.folder, self.files = tmp_path, files
        self.machine, self.host = types.SimpleNamespace(name='vm'), self

    def call(self, method, *args):
        if method == 'listDir':
            return [{'name': name, 'mtime': 1, 'size': len(text or ''), 'isDir': False}
                    for name, text in self.files.items()]
        text = self.files[args[1]]
        with open(args[2], 'w') as file:
            file.write(text or '')
        return '', 'timed out' if text is None else '', text is None

    def there(self, name):
        return name

    def in_slot(self, name):
        return str(self.folder / name)

    upload = there

    def look(self, job):
        """What a wrapper sees that has just started."""
        self.wrapper = boincwork.GuestFiles(self, Record(str(self.folder / 'record')))
        return self.again(job)

    def again(self, job):
        return self.wrapper.look(job_of(job), Look(), True)


def test_a_completion_file_that_cannot_be_read_now_is_no_success(tmp_path):
    guest, job = Guest(tmp_path, done=None), '<completion_trigger_file>done</completion_trigger_file>'
    assert guest.look(job).done is None
    guest.files['done'] = '7\n0\nso it is\n'
    assert guest.again(job).done == boincjob.Trigger(7, False, 'so it is')
    assert guest.look(job).done.number == 7            # it ended before it could say so
    guest.files['done'] = 'x' * (boincwork.GuestFiles.LARGEST + 1)
    assert guest.look(job).done is None


def test_what_a_trigger_file_asked_for_is_done_once_whoever_comes_next(tmp_path):
    guest = Guest(tmp_path, later='60\n', up='text', out='so far')
    job = ('<temporary_exit_trigger_file>later</temporary_exit_trigger_file>'
           '<trickle_trigger_file>up</trickle_trigger_file>'
           '<intermediate_upload_file>out</intermediate_upload_file>')
    first = guest.look(job)
    assert first.pause.number == 60
    assert first.messages == ('<have_new_trickle_up/>', '<have_new_upload_file/>')
    os.remove(guest.in_slot('trickle_up.xml'))         # as the client does
    assert guest.again(job) == guest.look(job) == Look()
    guest.files['later'] = '120\n'
    assert guest.look(job).pause.number == 120


def test_tasks_that_begin_at_once_write_one_ini_file(tmp_path):
    folder = str(tmp_path / 'vmhost')
    agents = [boinchost.HostAgent(folder, []) for _ in range(8)]
    threads = [threading.Thread(target=lambda each=each: each.drives_vms) for each in agents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.listdir(folder) == ['host.ini'] and all(each.drives_vms for each in agents)
    with open(os.path.join(folder, 'host.ini')) as file:
        before = file.read()
    boinchost.write_new(os.path.join(folder, 'host.ini'), 'another')
    with open(os.path.join(folder, 'host.ini')) as file:
        assert file.read() == before and os.listdir(folder) == ['host.ini']


def port_of(host):
    assert host.drives_vms
    with open(host.ini) as file:
        return int(file.read().partition('port = ')[2].split()[0])


def test_each_project_has_a_port_of_its_own_and_leaves_one_that_another_program_has_taken(tmp_path):
    hosts = [boinchost.HostAgent(str(tmp_path / name / 'vmhost'), []) for name in 'abc']
    ports = [port_of(host) for host in hosts]
    assert len(set(ports)) == 3
    assert not hosts[0].take_another_port()
    with socket.socket() as other:
        other.bind(('127.0.0.1', ports[1]))
        other.listen(1)
        assert hosts[1].take_another_port() and port_of(hosts[1]) not in ports
        with open(hosts[1].ini, 'w') as file:          # a person's own words
            file.write('[Broker]\nport = %d\n' % ports[1])
        assert not boinchost.HostAgent(hosts[1].folder, []).take_another_port()


@pytest.mark.parametrize('made', [False, True])
def test_the_port_stays_where_a_vm_that_was_saved_will_look_for_it(made, tmp_path):
    slot = tmp_path / 'slots' / '0'
    slot.mkdir(parents=True)
    (slot / 'init_data.xml').write_text('<project_dir>/p/project</project_dir><result_name>t</result_name>'
                                            '</app_init_data>')
    if made:
        (slot / 'project_t').mkdir()
    moved = []

    def connect():
        raise boinchost.NotStarted('it doesn\'t start')
    host = types.SimpleNamespace(connect=connect, take_another_port=lambda: moved.append(1) or True,
                                 drives_vms=True)
    work = boincwork.Work(Slot(str(slot)), job_of(), boincjob.read_words([], 1), Record(
        str(tmp_path / 'record')), host)
    with pytest.raises(Trouble, match='start$' if made else 'another port'):
        work.connect()
    assert bool(moved) is not made


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs named pipes')
def test_an_input_without_an_end_is_refused(tmp_path):
    (tmp_path / 'boinc_app').write_text('')
    os.mkfifo(str(tmp_path / 'data'))
    job = job_of('<input>data</input>')
    work = boincwork.Work(Slot(str(tmp_path)), job, boincjob.read_words([], 1), Record(
        str(tmp_path / 'record')), types.SimpleNamespace())
    work.machine = types.SimpleNamespace(name='vm', files='', lease=lambda: None)
    with pytest.raises(Trouble, match='data is neither file nor folder'):
        work.put()


def test_what_the_wrapper_before_was_moving_is_waited_for(tmp_path):
    told = {'state': 'running'}

    def call(method, *args):
        if method == 'startTransfer':
            raise Busy('transfer-5b330ce503a3 goes to boinc_app already')
        assert args == ('transfer-5b330ce503a3',)
        return told
    work = boincwork.Work(Slot(str(tmp_path)), job_of(), boincjob.read_words([], 1), Record(
        str(tmp_path / 'record')), types.SimpleNamespace(call=call))
    work.machine = types.SimpleNamespace(name='vm', files='', lease=lambda: None)
    (tmp_path / 'boinc_app').write_text('')
    assert not work.put() and not work.put()
    told['state'] = 'done'
    assert work.put()


def test_of_many_tasks_at_once_one_starts_the_host_agent(tmp_path, monkeypatch):
    """And another one, where that doesn't come to anything; a clock that was set back holds up nobody."""
    started = []
    monkeypatch.setattr(boinchost, 'start_orphaned', lambda command, folder: started.append(folder))
    hosts = [boinchost.HostAgent(str(tmp_path), ['vmhost']) for _ in range(4)]
    for count, when in ((1, None), (2, 1e9), (3, 4e9)):
        if when:
            os.utime(str(tmp_path / boinchost.STARTING), (when, when))
        for host in hosts:
            assert not host.connect()
        assert started == [str(tmp_path)] * count


@pytest.mark.skipif(os.name != 'posix', reason='Windows tells otherwise')
def test_a_folder_in_which_no_host_agent_can_be_started_is_named(tmp_path):
    """A project's folder that is read-only, say."""
    host = boinchost.HostAgent(str(tmp_path), [sys.executable, '-c', ''])
    (tmp_path / boinchost.PRINTED).mkdir()
    with pytest.raises(Trouble, match='can\'t be used: .*%s: Is a directory$' % boinchost.PRINTED):
        host.connect()


def test_by_hand_what_lies_beside_its_folder_is_nobodys_slot(tmp_path):
    folder = tmp_path / 'alone'
    folder.mkdir()
    (tmp_path / 'a file').write_text('')
    asked = []
    work = boincwork.Work(Slot(str(folder)), job_of(), boincjob.read_words([], 1), Record(
        str(tmp_path / 'record')), types.SimpleNamespace(
            call=lambda *words: asked.append(words) or []))
    assert work.clean() and asked == [('cleanup', False, ['alone_'], boincwork.OWNER + str(folder))]
    (folder / 'init_data.xml').write_text(INIT)            # and what is no folder there is no slot
    assert work.clean() and [words[0] for words in asked] == ['cleanup', 'cleanup', 'listVMs', 'cleanup']


def test_while_the_client_writes_whose_a_slot_is_no_vm_is_removed(tmp_path):
    """It empties init_data.xml first: a task's VM must not be taken for one of a forgotten task."""
    for number in '01':
        (tmp_path / number).mkdir()
        (tmp_path / number / 'init_data.xml').write_text(INIT)
    asked = []
    work = boincwork.Work(Slot(str(tmp_path / '0')), job_of(), boincjob.read_words([], 1), Record(
        str(tmp_path / 'record')), types.SimpleNamespace(call=lambda *words: asked.append(words[0]) or []))
    work._record.made = True
    for half in ('', INIT[:-20]):
        (tmp_path / '1' / 'init_data.xml').write_text(half)
        assert work.clean() and asked == []
    (tmp_path / '1' / 'init_data.xml').write_text(INIT)
    assert work.clean() and asked == ['listVMs', 'cleanup']


def test_half_a_file_of_the_clients_changes_nothing(tmp_path):
    (tmp_path / 'init_data.xml').write_text(INIT)
    slot = Slot(str(tmp_path))
    (tmp_path / 'init_data.xml').write_text(INIT[:30])
    slot.read_init()
    assert slot.init.number('wu_cpu_time') == 12.5
    (tmp_path / 'init_data.xml').write_text(INIT.replace('12.5', '13.5'))
    slot.read_init()
    assert slot.init.number('wu_cpu_time') == 13.5


def test_a_vm_keeps_its_lease_while_large_files_move(tmp_path):
    leases = []
    work = boincwork.Work(Slot(str(tmp_path)), job_of(), boincjob.read_words([], 1), Record(
        str(tmp_path / 'record')), types.SimpleNamespace(
            call=lambda method, *_: {'state': 'running'} if method == 'getTransfer' else 'id'))
    work.machine = types.SimpleNamespace(name='vm', files='', lease=lambda: leases.append(1))
    (tmp_path / 'boinc_app').write_text('')
    assert not work.put() and not work.put() and len(leases) == 2


def test_a_new_host_agent_moves_what_the_one_before_was_moving(tmp_path):
    started, known = [], {}

    def call(method, *args):
        if method == 'startTransfer':
            started.append(args[2])
            known[str(len(started))] = {'state': 'running'}
            return str(len(started))
        if args[0] not in known:
            raise InvalidParams('no transfer %s' % args[0])
        return known[args[0]]
    work = boincwork.Work(Slot(str(tmp_path)), job_of(), boincjob.read_words([], 1), Record(
        str(tmp_path / 'record')), types.SimpleNamespace(call=call))
    work.machine = types.SimpleNamespace(name='vm', files='', lease=lambda: None)
    (tmp_path / 'boinc_app').write_text('')
    assert not work.put()
    known.clear()                          # killed, and another one came
    assert not work.put() and len(started) == 2 and started[0] == started[1]
    known['2']['state'] = 'done'
    assert work.put() and len(started) == 2


@pytest.mark.skipif(not os.path.isdir('/proc/self/task'), reason='looks at threads as Linux has them')
def test_a_vm_is_computed_no_sooner_than_its_task():
    code = 'import os, boincmachines; os.nice(%d); boincmachines.share_priority(%d)'
    threads = ('import sys, threading\n'
               'threading.Thread(target=sys.stdin.read).start()\n'
               'print(flush=True)')
    now = os.getpriority(os.PRIO_PROCESS, 0)
    with subprocess.Popen([sys.executable, '-c', threads], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as vm:
        vm.stdout.readline()
        ids = list(map(int, os.listdir('/proc/%d/task' % vm.pid)))
        for lower, after in ((3, 3), (0, 3), (5, 5)):      # it is never raised
            subprocess.run([sys.executable, '-c', code % (lower, vm.pid)], check=True,
                           cwd=os.path.dirname(os.path.abspath(boincmachines.__file__)))
            assert {os.getpriority(os.PRIO_PROCESS, id) for id in ids} == {min(now + after, 19)}
        vm.stdin.close()
    assert len(ids) == 2


def test_given_machines_share_the_tasks_and_a_task_stays_where_it_is(tmp_path):
    machines = {'busy': ['a', 'b'], 'idle': [], 'other': []}

    def call(method, *args):
        if method == 'listDir':
            raise TransferError('/task on %s: /task: does not exist' % args[0])
        return {'listRegisteredVMs': sorted(machines), 'listCmds': []}.get(method) \
            if method.startswith('list') else {'commands': machines[args[0]]}
    host = types.SimpleNamespace(ini='host.ini', call=call)
    record = Record(str(tmp_path / 'record'))
    assert boincmachines.GivenMachine(host, 'task', record).ready() and record.machine == 'idle'
    machines.pop('idle')
    again = boincmachines.GivenMachine(host, 'task', Record(str(tmp_path / 'record')))
    assert not again.ready() and again.name == 'idle'
    machines['idle'] = ['a', 'b', 'c']
    assert again.ready()
    nobody = types.SimpleNamespace(ini='host.ini', call=lambda *_: [])
    assert not boincmachines.GivenMachine(nobody, 'task', Record(str(tmp_path / 'none'))).ready()


def test_commands_of_tasks_that_the_client_forgot_are_ended_on_given_machines(tmp_path):
    """Those of tasks that it knows go on, and so does what is no task's."""
    ended = []
    commands = {'boinc-1-1': '127.0.0.1_p_t1', 'boinc-2-1': '127.0.0.1_p_t2', 'boinc-3-2': '127.0.0.1_p_t3',
                'by-hand': '127.0.0.1_p_t4'}

    def call(method, *args):
        if method == 'listCmds':
            assert args == ({'finished': False},)
            return [{'cmdId': id, 'vm': 'here'} for id in sorted(commands)]
        if method == 'getCmdDetails':
            return {'path': commands[args[0]]}
        if method == 'listVMs':
            raise NotSupported('no hypervisor')
        ended.append((method,) + args[:3])
        return True
    other = tmp_path / 'slots' / '1'
    other.mkdir(parents=True)
    work = task_in(tmp_path, '', types.SimpleNamespace(drives_vms=False, connect=lambda: True, call=call))
    (other / 'init_data.xml').write_text(
        (tmp_path / 'slots' / '0' / 'init_data.xml').read_text().replace('>t1<', '>t2<'))
    assert work.connect() and work.clean()
    assert ended == [('signalCmd', 'boinc-3-2', 'KILL'), ('runCmd', 'here', 'rm', ['-rf', '127.0.0.1_p_t3'])]


def test_a_client_is_gone(tmp_path):
    """Its process ends, or, where it doesn't tell which that is, its heart-beats stop."""
    with subprocess.Popen(['sleep', '600']) as process:
        client = boincslot.Client(process.pid, True, 0)
        assert not client.is_gone(100)
        process.kill()
        process.wait()
        assert not client.is_gone(100.1) and client.is_gone(103)       # looked at now and then
    for nobody in (0, -1, 10 ** 20):
        old = boincslot.Client(nobody, True, 0)
        old.hear('<heartbeat/><network_suspended/>', 20)
        assert not old.is_gone(49) and old.is_gone(51)
    assert not boincslot.Client(0, False, 0).is_gone(1e9)              # by hand there is none


# The life of a task.

class Alive:
    """A Life whose clock the test has; steps succeed at once unless the test says otherwise."""

    def __init__(self, tmp_path, job='', **how):
        self.now = 1000.0
        self.record = Record(str(tmp_path / 'record'))
        self.life = Life(job_of(job), self.record, self.now, **how)
        self.steps = []

    def step(self):
        """The next step that it wants, waiting for that up to a minute of its clock."""
        for _ in range(600):
            step = self.life.next(self.now)
            if step or self.life.end:
                self.steps += [step] if step else []
                return step
            self.now += 0.1
        return ''

    def go(self, *results):
        """Takes as many steps, each with its result; gives their names."""
        taken = []
        for result in results:
            taken.append(self.step())
            if isinstance(result, Exception):
                self.life.failed(result, self.now)
            else:
                self.life.succeeded(result, self.now)
        return taken

    def says(self, word):
        self.life.hear(word, self.now)

    def runs(self, look=None):
        """Brings it to where the science runs."""
        self.record.made = True
        assert self.go(True, True, True, True, True, True, True, look or Look()) == [
            'connect', 'clean', 'ready', 'put', 'begin', 'limit', 'show_desktop', 'look']
        return self


def seen(ended=False, **how):
    return Look(ended=ended, **how)


def test_the_end_is_a_checkpoint(tmp_path):
    """Else a client that ends, or that unloads the task, in that moment would show what it had stored before;
    and so a wrapper that does it once more, since the one before it was killed."""
    task = Alive(tmp_path).runs(seen(cpu=5))
    task.go(seen(True, state='exited', cpu=9, fraction=1.0), True, True)
    assert '<checkpoint_cpu_time>9.0' in task.life.status() and '<fraction_done>1.0' in task.life.status()
    again = Record(str(tmp_path / 'record'))
    assert (again.cpu, again.checkpoint, again.fraction) == (9.0, 9.0, 1.0)


def test_a_program_that_failed_for_want_of_space_was_not_done(tmp_path):
    """Its progress doesn't go back from 100 % then."""
    task = Alive(tmp_path).runs(seen(fraction=0.25, cpu=5))
    task.record.checkpoint = 4.0
    task.go(seen(True, state='failed', why='ENOSPC: disk full', fraction=1.0, cpu=6))
    assert '<fraction_done>2.5' in task.life.status() and '<current_cpu_time>6.0' in task.life.status()
    assert task.record.before == 4.0


@pytest.mark.parametrize('is_slow', [False, True])
def test_quit_while_outputs_are_on_their_way_is_no_end_of_the_task(is_slow, tmp_path):
    """A client finds outputs missing in a task that is over, which is an error then. The next wrapper fetches
    them."""
    task = Alive(tmp_path).runs()
    task.go(seen(True, state='exited', cpu=9, fraction=1.0), False)
    task.says('quit')
    assert task.step() == 'save'
    if is_slow:
        task.now += QUIT_WITHIN + 1
        assert task.step() == ''
    else:
        task.life.succeeded(True, task.now)
    assert task.life.end == End()


def test_quit_once_they_are_there_ends_the_task(tmp_path):
    task = Alive(tmp_path).runs()
    task.go(seen(True, state='exited', code=3), True)
    task.says('quit')
    assert task.go(True) == ['remove'] and task.life.end == End(3, True)


def test_from_nothing_to_a_finished_task(tmp_path):
    task = Alive(tmp_path)
    assert task.go(False, True, True, False, True, True, True, True, True) == [
        'connect', 'connect', 'clean', 'ready', 'ready', 'put', 'begin', 'limit', 'show_desktop']
    task.go(seen(cpu=1, fraction=0.5))
    assert '<current_cpu_time>1.0' in task.life.status() and '<fraction_done>5.0' in task.life.status()
    assert task.go(seen(True, state='exited', cpu=2), False, True, True) == [
        'look', 'collect', 'collect', 'remove']
    assert task.life.end == End(0, True) and '<fraction_done>1.0' in task.life.status()
    assert '<fraction_done>7.5' in task.life.status(0.5, 0.75)


def test_two_looks_are_a_second_apart(tmp_path):
    task = Alive(tmp_path).runs()
    begin = task.now
    assert task.step() == 'look' and task.now - begin >= LOOK_EVERY - 0.11


def test_suspended_and_resumed(tmp_path):
    task = Alive(tmp_path).runs()
    task.says('suspend')
    assert task.go(True, True, True) == ['pause', 'stay', 'stay'] and not task.life.is_told()
    task.says('resume')
    task.says('resume')
    assert task.go(True, seen()) == ['resume', 'look'] and task.life.is_told()


def test_a_client_that_throttles_fills_no_log(tmp_path, caplog):
    """Where the application's version lacks <dont_throttle/>: suspend and resume, each second or two."""
    caplog.set_level(logging.INFO)
    task = Alive(tmp_path).runs()
    for _ in range(1000):
        task.says('suspend')
        task.go(True)
        task.says('resume')
        task.go(True)
    assert 10 < len(caplog.records) < 100
    assert 'isn\'t noted any more' in caplog.records[-1].getMessage()
    task.says('quit')
    assert caplog.records[-1].getMessage() == 'the client says quit'


def test_a_program_that_waits_for_its_turn_has_not_run_long_enough(tmp_path, caplog):
    """On a machine that runs only so many commands at once: its time begins when it does."""
    caplog.set_level(logging.INFO)
    task = Alive(tmp_path, '<job_duration>10</job_duration>').runs(seen(state='queued'))
    for _ in range(30):
        assert task.go(seen(state='queued')) == ['look']
    assert not task.record.elapsed
    assert [record.getMessage() for record in caplog.records if 'its turn' in record.getMessage()] == [
        'the program waits for its turn: its machine runs no more commands at once']
    while not task.go(seen())[-1:] == ['collect']:
        assert task.record.elapsed < 13
    assert 9 < task.record.elapsed < 13


def test_what_a_task_waits_for_is_said(tmp_path, caplog, monkeypatch):
    """Long before it gives up; once."""
    caplog.set_level(logging.INFO)
    task = Alive(tmp_path)
    task.go(True, True)
    task.go(*[False] * 300)
    assert [record.getMessage() for record in caplog.records] == ['the machine\'s agent isn\'t there yet']
    caplog.clear()
    names = []
    host = types.SimpleNamespace(ini='host.ini', call=lambda *_: names)
    machine = boincmachines.GivenMachine(host, 'task', Record(str(tmp_path / 'other')))
    assert not machine.ready() and not caplog.records
    now = time.monotonic() + boincmachines.TELL_AFTER
    monkeypatch.setattr(boincmachines, 'time', types.SimpleNamespace(monotonic=lambda: now))
    assert not machine.ready() and not machine.ready()
    assert ['no machine has joined' in record.getMessage() for record in caplog.records] == [True]


def test_a_resume_out_of_nothing_changes_nothing(tmp_path):
    task = Alive(tmp_path).runs()
    task.says('resume')
    assert task.go(seen()) == ['look']


def test_suspended_before_it_begins_it_does_not_begin(tmp_path):
    task = Alive(tmp_path)
    task.says('suspend')
    assert task.go(True, True) == ['connect', 'clean'] and task.step() == ''
    task.says('resume')
    assert task.step() == 'ready'


def test_suspended_while_its_machine_boots_that_is_paused(tmp_path):
    task = Alive(tmp_path)
    task.record.made = True
    task.go(True, True, False)
    task.says('suspend')
    assert task.go(True, True) == ['pause', 'stay']
    task.now += READY_WITHIN
    task.says('resume')
    assert task.go(True, False, True) == ['resume', 'ready', 'ready'] and task.life.end is None


def test_a_client_need_not_guess_how_far_a_task_is(tmp_path):
    """Its guess would be more than what the program tells at first."""
    def told():
        return float(task.life.status().split('<fraction_done>')[1].split('<')[0])
    task = Alive(tmp_path)
    assert told() == LEAST_FRACTION
    task.runs()
    task.go(seen())
    assert told() == LEAST_FRACTION
    for _ in range(int(SILENT_FOR) + 2):
        task.go(seen())
    assert told() < 0
    task.go(seen(fraction=0.25))
    assert told() == 0.25


@pytest.mark.parametrize('suspended', [False, True])
def test_quit_saves(suspended, tmp_path):
    task = Alive(tmp_path).runs(seen(cpu=5, fraction=0.1))
    if suspended:
        task.says('suspend')
        task.go(True)
    task.says('quit')
    assert task.go(True) == ['save']
    assert task.life.end == End() and task.record.checkpoint == 5 and task.record.fraction == 0.1


def test_a_checkpoint_that_can_not_be_recorded_ends_nothing(tmp_path, caplog):
    """It isn't told, and why is said once; the next one is as good."""
    task = Alive(tmp_path, '<checkpoint>files</checkpoint>')
    task.runs(seen(cpu=1))
    (tmp_path / 'record.new').mkdir()
    for cpu in (5, 6, 7):
        task.now += 700
        task.go(seen(cpu=cpu))
    assert task.life.end is None and task.record.checkpoint < 5 and caplog.text.count('no checkpoint') == 1
    (tmp_path / 'record.new').rmdir()
    task.now += 700
    task.go(seen(cpu=8))
    assert task.record.checkpoint == 8


@pytest.mark.parametrize('word, code', [('abort', 194), ('', 0)])
def test_that_a_machine_is_removed_need_not_be_recorded(word, code, tmp_path):
    """On a full disk, say: else it would be made, and the science begin, again."""
    task = Alive(tmp_path).runs(None if word else seen(True, state='exited'))
    (tmp_path / 'record.new').mkdir()
    if word:
        task.says(word)
    task.go(*[True] * (1 if word else 2))
    assert task.life.end == End(code, not word)


def test_quit_and_abort_wait_for_no_step_longer_than_the_client_does(tmp_path):
    for word, code in (('quit', 0), ('abort', 194)):
        task = Alive(tmp_path)
        assert task.step() == 'connect'
        task.says(word)
        assert task.step() == ''           # the step never ends
        task.now += QUIT_WITHIN
        task.step()
        assert task.life.end == End(code)


def test_quit_before_anything_was_made_is_at_once(tmp_path):
    task = Alive(tmp_path)
    task.says('quit')
    assert task.step() == '' and task.life.end == End() and task.now == 1000.0


@pytest.mark.parametrize('connected', [False, True])
def test_abort_removes(connected, tmp_path):
    task = Alive(tmp_path)
    task.record.made = True
    if connected:
        task.runs()
    task.says('abort')
    task.says('quit')
    assert task.go(*[True] * (1 if connected else 2))[-1] == 'remove'
    assert task.life.end == End(194) and not task.record.made


def test_abort_while_suspended(tmp_path):
    task = Alive(tmp_path).runs()
    task.says('suspend')
    task.go(True)
    task.says('abort')
    assert task.go(HypervisorError('no')) == ['remove'] and task.life.end == End(194)


@pytest.mark.parametrize('look, end', [
    (seen(True, state='exited', code=1), End(1, True)),
    (seen(True, state='exited', code=255), End(255, True)),
    (seen(True, state='signaled', code=11),
     End(193, True, signal=11, message='the program was ended by signal 11')),
    (seen(True, state='failed', why='ENOENT: no such file'),
     End(206, True, message='the program can\'t be started: ENOENT: no such file')),
    (seen(done=boincjob.Trigger(4, True, 'so')), End(4, True, message='so', notice=True)),
    (seen(True, state='exited', done=boincjob.Trigger(4, True, 'so')),
     End(4, True, message='so', notice=True))])
def test_ends_of_the_science(look, end, tmp_path):
    task = Alive(tmp_path).runs()
    assert task.go(look, True, True) == ['look', 'collect', 'remove'] and task.life.end == end


@pytest.mark.parametrize('state, why', [('failed', 'ENOSPC: disk full'), ('cancelled', ''), ('expired', '')])
def test_what_is_not_the_sciences_fault_is_tried_again(state, why, tmp_path):
    task = Alive(tmp_path).runs()
    task.go(seen(True, state=state, why=why))
    assert task.life.end.delay == FIRST_DELAY and not task.life.end.finish and task.record.attempt == 2
    assert (why or state) in task.life.end.message


def test_it_asks_for_a_pause(tmp_path):
    task = Alive(tmp_path).runs()
    assert task.go(seen(pause=boincjob.Trigger(1800, False, 'the moon is up')), True) == ['look', 'save']
    assert task.life.end == End(delay=1800, message='the moon is up')


@pytest.mark.parametrize('number', [-5, 0, 100000])
def test_a_pause_of_no_length_that_a_client_takes_is_a_minute(number, tmp_path):
    task = Alive(tmp_path).runs()
    task.go(seen(pause=boincjob.Trigger(number, False, '')), True)
    assert task.life.end.delay == FIRST_DELAY


def test_job_duration(tmp_path):
    task = Alive(tmp_path, '<job_duration>10</job_duration>').runs()
    for _ in range(5):
        task.go(seen(cpu=1))
    assert 0.3 < float(task.life.status().split('<fraction_done>')[1].split('<')[0]) < 0.7
    for _ in range(10):
        if task.step() == 'look':
            task.life.succeeded(seen(cpu=1), task.now)
    task.life.succeeded(True, task.now)
    assert task.go(True) == ['remove']
    assert task.life.end == End(0, True) and 10 <= task.record.elapsed < 12


def test_suspended_time_is_not_running_time(tmp_path):
    task = Alive(tmp_path).runs()
    before = task.record.elapsed
    task.says('suspend')
    task.go(True)
    for _ in range(50):
        task.go(True)
    assert task.record.elapsed - before < 1


def test_checkpoints(tmp_path):
    for job, told in (('<minimum_checkpoint_interval>3</minimum_checkpoint_interval>', True),
                      ('<minimum_checkpoint_interval>600</minimum_checkpoint_interval>', False),
                      ('<checkpoint>none</checkpoint>', False)):
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / 'record').unlink()
        task = Alive(tmp_path, '<checkpoint>files</checkpoint>' + job, period=2).runs()
        for second in range(10):
            task.go(seen(cpu=second))
        assert ('<checkpoint_cpu_time>0.0' not in task.life.status()) == told


def test_a_checkpoint_of_the_state_is_told_once_it_is_there(tmp_path):
    every = '<minimum_checkpoint_interval>3</minimum_checkpoint_interval>'
    task = Alive(tmp_path, every, period=2).runs(seen(cpu=1))
    while task.step() == 'look':
        task.life.succeeded(seen(cpu=7, fraction=0.5), task.now)
    assert task.steps[-1] == 'checkpoint' and '<checkpoint_cpu_time>0.0' in task.life.status()
    task.says('quit')
    task.life.failed(HypervisorError('no room'), task.now)
    assert '<checkpoint_cpu_time>0.0' in task.life.status() and task.step() == 'save'

    task = Alive(tmp_path, every, period=2).runs(seen(cpu=1))
    while task.step() == 'look':
        task.life.succeeded(seen(cpu=7, fraction=0.5), task.now)
    task.life.succeeded(True, task.now)
    assert '<checkpoint_cpu_time>7.0' in task.life.status() and task.record.fraction == 0.5
    assert task.step() == 'look'


def test_what_a_checkpoint_is():
    for fields, kind in (('', 'state'), ('<disable_automatic_checkpoints/>', 'files'),
                         ('<disable_automatic_checkpoints/><checkpoint>state</checkpoint>', 'state')):
        assert job_of(fields).checkpoint == kind


def test_a_host_agent_that_went_away_is_started_again(tmp_path):
    task = Alive(tmp_path).runs()
    assert task.go(hostclient.NoHost('gone'), False, True, True, True, True, True, True, True, seen()) == [
        'look', 'connect', 'connect', 'clean', 'ready', 'put', 'begin', 'limit', 'show_desktop', 'look']
    assert task.life.end is None


def test_and_when_the_results_are_fetched_nothing_begins_again(tmp_path):
    task = Alive(tmp_path).runs()
    task.go(seen(True, state='exited'))
    assert task.go(hostclient.NoHost('gone'), True, True, seen(True, state='exited'), True, True) == [
        'collect', 'connect', 'ready', 'look', 'collect', 'remove']


@pytest.mark.parametrize('word, step, code', [('quit', 'save', 0), ('abort', 'remove', 194)])
def test_nor_is_a_machine_left_running_where_it_went_away_at_the_end(word, step, code, tmp_path):
    task = Alive(tmp_path).runs()
    task.says(word)
    assert task.go(hostclient.NoHost('gone'), False, True, True) == [step, 'connect', 'connect', step]
    assert task.life.end == End(code)


@pytest.mark.parametrize('word, step, code', [('quit', 'save', 0), ('abort', 'remove', 194)])
@pytest.mark.parametrize('error', [AgentNotConnected('it is away'), DeadlineExceeded('no answer')])
def test_nor_where_its_agent_is_away_for_a_while(error, word, step, code, tmp_path, caplog):
    """As after a host agent that was killed: it comes back within seconds. What it isn't told in the time
    that a client leaves isn't done."""
    task = Alive(tmp_path).runs()
    task.says(word)
    assert task.go(error, error, error, True) == [step] * 4 and task.life.end == End(code)
    assert caplog.text.count(str(error)) == 1
    task = Alive(tmp_path).runs()
    task.says(word)
    asked = task.now
    while task.life.end is None:
        task.go(error)
    assert QUIT_WITHIN <= task.now - asked < QUIT_WITHIN + 5 and task.life.end == End(code)


def test_a_suspended_task_whose_agent_is_away_is_paused_once_that_is_back(tmp_path, caplog):
    """The wrapper doesn't leave meanwhile: no client starts a task again that is suspended."""
    task = Alive(tmp_path).runs()
    task.says('suspend')
    away = [AgentNotConnected('it is away')] * 100
    assert task.go(*away) == ['pause'] * 100 and task.life.end is None
    assert task.go(True, True) == ['pause', 'stay'] and caplog.text.count('it is away') == 1
    task.says('resume')
    assert task.go(True, seen()) == ['resume', 'look']


def test_a_finished_task_is_removed_by_the_next_host_agent(tmp_path):
    task = Alive(tmp_path).runs()
    assert task.go(seen(True, state='exited'), True, hostclient.NoHost('gone'), True, True)[2:] == [
        'remove', 'connect', 'remove']
    assert task.life.end == End(0, True)


def test_a_lost_program_begins_anew_with_a_name_of_its_own(tmp_path):
    task = Alive(tmp_path).runs(seen(cpu=5, fraction=0.4))
    task.record.checkpoint, task.record.put = 3.0, True
    task.go(seen(True, state='lost'))
    assert (task.record.attempt, task.record.before, task.record.put) == (2, 3.0, False)
    assert task.go(True, True, True, True, True, True, True, seen(cpu=1, fraction=0.1))[4] == 'begin'
    assert '<current_cpu_time>5.0' in task.life.status() and '<fraction_done>4.0' in task.life.status()


def test_a_wrapper_that_was_killed_tells_nothing_before_it_knows_how_far_it_is(tmp_path):
    """What it told last may be more than it kept: that is of its last checkpoint."""
    task = Alive(tmp_path)
    assert task.life.is_told()
    task.record.fraction = 0.3
    task.record.save()
    again = Alive(tmp_path)
    assert not again.life.is_told()
    again.runs(seen(fraction=0.4))
    assert again.life.is_told() and '<fraction_done>4.0' in again.life.status()


def test_what_goes_wrong_again_and_again_is_a_temporary_exit(tmp_path):
    task = Alive(tmp_path).runs()
    for _ in range(AWAY_TRIES + 1):
        if task.step() == 'look':
            task.life.failed(HypervisorError('VT-x is off'), task.now)
        while not task.life.end and task.step() != 'look':
            task.life.succeeded(True, task.now)
        if not task.life.end:
            task.life.failed(HypervisorError('VT-x is off'), task.now)
    assert task.life.end.delay == FIRST_DELAY and 'VT-x is off' in task.life.end.message


def test_delays_double_up_to_an_hour(tmp_path):
    assert [delay_of(count) for count in (1, 2, 3, 7, 100)] == [60, 120, 240, LONGEST_DELAY, LONGEST_DELAY]
    for count in (1, 2, 3):
        task = Alive(tmp_path)
        task.go(Trouble('no room'))
        assert task.life.end == End(delay=60 * 2 ** (count - 1), message='no room')
    task = Alive(tmp_path).runs()
    while task.record.troubles:
        task.go(seen())
    assert task.now < 1000 + 90


def test_a_machine_whose_agent_never_comes(tmp_path):
    task = Alive(tmp_path)
    task.go(True, True)
    while not task.life.end:
        task.go(False)
    assert READY_WITHIN < task.now - 1000 < READY_WITHIN + 5 and 'vmguest' in task.life.end.message


def test_preferences_are_read_again(tmp_path):
    task = Alive(tmp_path).runs()
    task.says('reread_app_info')
    assert task.go(True, seen()) == ['limit', 'look']


@given(st.lists(st.sampled_from(['suspend', 'resume', 'quit', 'abort', 'reread_app_info', 'fail', 'nothing',
                                 'lose', 'end', 'look', 'no host'])))
def test_whatever_comes_it_ends_or_goes_on(tmp_path_factory, events):
    task = Alive(tmp_path_factory.mktemp('life'))
    last = 0.0
    for event in events:
        step = task.step()
        if event in ('fail', 'no host') and step:
            task.life.failed({'fail': HypervisorError, 'no host': hostclient.NoHost}[event]('x'), task.now)
        elif step == 'look':
            task.life.succeeded({'lose': seen(True, state='lost'), 'end': seen(True, state='exited')}.get(
                event, seen(cpu=last + 1)), task.now)
        elif step:
            task.life.succeeded(event != 'nothing', task.now)
        task.says(event)
        cpu = ast.literal_eval(task.life.status().split('<current_cpu_time>')[1].split('<')[0])
        assert cpu >= last
        last = cpu
    if not task.life.end and task.life.wish != 'suspend':
        assert task.step() or task.life.end
