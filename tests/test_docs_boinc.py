"""docs/boinc.md names tests that there are, and the example project is one that the wrapper takes."""

import glob
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree

import boinc as boinc_rig
import pytest
from agents import TOP
from brokers import free_port

import boincjob

EXAMPLE = os.path.join(TOP, 'examples', 'boinc')


def read(*names):
    with open(os.path.join(TOP, *names), encoding='utf-8') as file:
        return file.read()


def test_the_tests_that_the_page_names_are_there():
    named = set(re.findall(r'`(test_\w+)`', read('docs', 'boinc.md')))
    files = glob.glob(os.path.join(TOP, 'tests', 'test_*.py')) + [
        os.path.join(TOP, 'tests', 'virtualbox', 'test_boinc.py')]
    there = set(re.findall(r'^def (test_\w+)', ''.join(map(read, files)), re.MULTILINE))
    assert len(named) > 15 and named <= there


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.ends
@pytest.mark.skipif(bool(boinc_rig.why_not()), reason=boinc_rig.why_not() or 'never')
def test_what_an_admin_types(tmp_path):
    """One command after the other, in a clone: from the bundles to the result of a real client's task, on a
    machine without VirtualBox."""
    clone, port = str(tmp_path / 'clone'), str(free_port())
    shutil.copytree(os.path.join(TOP, 'examples'), os.path.join(clone, 'examples'))
    for path in glob.glob(os.path.join(TOP, '*.py')) + [os.path.join(TOP, 'status.html')]:
        shutil.copy(path, clone)
    os.makedirs(os.path.join(clone, 'tests', 'rigs'))
    shutil.copy(boinc_rig.PATH, os.path.join(clone, 'tests', 'rigs'))
    boinc_rig.set_up(boinc_rig.load_rig().Rig(os.path.join(clone, 'b')))
    typed = {title: text.replace('61613', port) for title, text in re.findall(
        r'^ *```sh (\w+)\n(.*?)^ *```$', read('docs', 'boinc.md'), re.DOTALL | re.MULTILINE)}
    client = typed['client'].replace('setup b\n', 'setup b %d\n%s' % (free_port(), typed['here']))
    script = '\n'.join(['set -ex', typed['bundles'], 'touch science_image_1.vdi', typed['version'],
                        'trap "tests/rigs/boinc-rig clean b; kill %1; wait" EXIT', client])
    done = subprocess.run(['bash', '-c', script], cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=dict(os.environ, PATH=boinc_rig.path_with_python()), timeout=300)
    said = done.stdout.decode('utf-8', 'replace')
    assert done.returncode == 0, said
    assert '\nthe sum of 1000 squares is 333833500\n' in said, said


def test_each_event_and_each_complaint_has_a_test():
    page = read('docs', 'boinc.md').split('## What happens when')[1]
    rows = [line for line in page.splitlines() if re.match(r'\| (?!event|complaint)', line)]
    assert len(rows) > 30 and not [row for row in rows if not re.search(r'`test_\w+` \|$', row)]


def test_each_field_of_the_job_file_is_on_the_page():
    page = read('docs', 'boinc.md')
    ours = list(boincjob.FIELDS) + list(boincjob.REFUSED) + [
        'input', 'output', 'copy_to_shared', 'intermediate_upload_file']
    assert not [name for name in ours if '`%s`' % name not in page and '`<%s>`' % name not in page]


def test_the_example_is_one():
    job = boincjob.Job(read('examples', 'boinc', 'vbox_job.xml'))
    assert not job.warnings and job.run([]) == ['sh', 'boinc_app']
    for name in ('version.xml', 'plan_class_spec.xml'):
        xml.etree.ElementTree.parse(os.path.join(EXAMPLE, name))
    files = re.findall('<physical_name>(.*?)</', read('examples', 'boinc', 'version.xml'))
    assert job.multiattach_vdi_file in files
    logical = re.findall('<logical_name>(.*?)</', read('examples', 'boinc', 'version.xml'))
    assert set(logical) <= {boincjob.FILE} | {moved.logical for moved in job.inputs}


@pytest.mark.skipif(os.name != 'posix', reason='a shell script')
def test_its_program_does_what_it_says(tmp_path):
    (tmp_path / 'parameters').write_text('10\n')
    subprocess.run(['sh', os.path.join(EXAMPLE, 'boinc_app')], cwd=str(tmp_path), check=True,
                   env=dict(os.environ, VM_PROGRESS_FILE=str(tmp_path / 'progress')))
    assert (tmp_path / 'result').read_text() == 'the sum of 10 squares is 385\n'
    assert boincjob.fraction_of((tmp_path / 'progress').read_text()) == 1.0
