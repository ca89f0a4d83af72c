"""docs/boinc.md names tests that there are, and the example project is one that the wrapper takes."""

import glob
import os
import re
import subprocess
import xml.etree.ElementTree

import pytest
from agents import TOP

import boincjob

EXAMPLE = os.path.join(TOP, 'examples', 'boinc')


def read(*names):
    with open(os.path.join(TOP, *names), encoding='utf-8') as file:
        return file.read()


def test_the_tests_that_the_page_names_are_there():
    named = set(re.findall(r'`(test_\w+)`', read('docs', 'boinc.md')))
    there = set(re.findall(r'^def (test_\w+)', ''.join(map(read, glob.glob(os.path.join(
        TOP, 'tests', 'test_*.py')))), re.MULTILINE))
    assert len(named) > 15 and named <= there


def test_each_event_and_each_complaint_has_a_test():
    page = read('docs', 'boinc.md').split('## What happens when')[1]
    rows = [line for line in page.splitlines() if re.match(r'\| (?!event|complaint)', line)]
    assert len(rows) > 30 and not [row for row in rows if not re.search(r'`test_\w+` \|$', row)]


def test_each_field_of_the_job_file_is_on_the_page():
    page = read('docs', 'boinc.md')
    ours = list(boincjob.FIELDS) + list(boincjob.REFUSED) + list(boincjob.LISTS + boincjob.FILES)
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
