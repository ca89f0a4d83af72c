"""Folders of a source that other programs change while they are moved."""

import os

import pytest
from test_chirp import client, seen, served, write  # noqa: F401

import chirpdownload
import chirpupload
import chirpwire


def make_two(folder):
    for name in 'one', 'two':
        for count in range(3):
            (folder / name).mkdir(parents=True, exist_ok=True)
            write(folder / name / ('file%d' % count), b'content %d' % count)
    return folder


def before_each_folder(monkeypatch, act):
    """``act`` with the names of the folders that were begun, before the next one is."""
    begun = []

    def watched(begin):
        def begin_watched(self, *words, **options):
            begun.append(os.path.basename(os.fsdecode(words[0])))
            act(begun)
            return begin(self, *words, **options)
        return begin_watched
    for moves, method in (chirpupload.Upload, '_put_folder'), (chirpdownload.Download, '_get_folder'):
        monkeypatch.setattr(moves, method, watched(getattr(moves, method)))


@pytest.fixture(params=['put', 'get'])
def way(request, client, served, tmp_path):  # noqa: F811
    """The source, the target, and what moves the one to the other, where ``there`` is a folder."""
    here, there = tmp_path / 'here', served[1]
    here.mkdir()
    if request.param == 'put':
        return here / 'tree', there / 'tree', lambda: client.put(str(here / 'tree'), '/tree')
    return there / 'tree', here / 'tree', lambda: client.get('/tree', str(here / 'tree'))


@pytest.mark.parametrize('exists', [False, True])
def test_what_a_program_moves_meanwhile_arrives(way, monkeypatch, exists):
    """From a folder that comes later into one that has been, as programs do with what is ready."""
    source, target, move = way
    make_two(source)
    if exists:
        target.mkdir()
        os.chmod(str(target), 0o777)           # the real server may be another user
        write(target / 'own', b'own')

    def act(begun):
        if len(begun) == 3:
            os.rename(str(source / begun[2] / 'file1'), str(source / begun[1] / 'came'))
            (source / begun[1] / 'new').mkdir()
            os.rename(str(source / begun[2] / 'file2'), str(source / begun[1] / 'new' / 'came'))
    before_each_folder(monkeypatch, act)
    move()
    arrived = seen(target)
    arrived.pop(b'own', None)
    assert arrived == seen(source)


def test_a_folder_that_goes_on_changing_is_told(way, monkeypatch):
    source, target, move = way
    make_two(source)

    def act(begun):
        os.mkdir(str(source / ('more%d' % len(begun))))
        os.utime(str(source), (len(begun), len(begun)))
    before_each_folder(monkeypatch, act)
    with pytest.raises(chirpwire.Incomplete) as told:
        move()
    assert [reason for _, reason in told.value.failures] == [
        'it went on changing: what came into it last may be missing']


def test_what_failed_is_told_once(way, monkeypatch):
    source, target, move = way
    make_two(source)
    os.mkfifo(str(source / 'one' / 'fifo'))

    def act(begun):
        if len(begun) == 3:
            for name in begun[1:]:
                write(source / name / 'late', b'late')
    before_each_folder(monkeypatch, act)
    with pytest.raises(chirpwire.Incomplete) as told:
        move()
    assert [path[-8:] for path, _ in told.value.failures] == ['one/fifo'] and told.value.count == 1
    assert all((target / name / 'late').read_bytes() == b'late' for name in ('one', 'two'))
