"""Names and MACs, both ways, while VMs come, go, and change under the host."""

import pytest
from agents import Agent
from helpers import wait_until
from rig import manage

SMALL = {'memory': 16, 'diskSize': 0}


def mac(api, vm):
    return api.getNamesToIdsMapping()[vm]


def test_an_agent_meets_its_vm(host, api, remove_all, tmp_path):
    api.createVM('met', '', SMALL)
    api.start('met')
    with Agent(tmp_path, host, mac(api, 'met'), name='whatever-it-says'):
        wait_until(lambda: api.getVM('met')['agent'] == 'alive')
        found = api.getVM('met')
        assert (found['name'], found['state']) == ('met', 'Running')
        assert api.listRegisteredVMs() == ['met']
        assert api.ping('met') == 'PONG from met'
        results = host.run('met', 'echo', 'here')
        assert (results['out'], results['exitCodeOrSignal']) == ('here\n', 0)
    wait_until(lambda: api.getVM('met')['agent'] == 'lost')


def test_a_vm_made_while_the_host_runs(host, api, remove_all, tmp_path):
    manage('createvm', '--name', 'foreign', '--ostype', 'Linux_64', '--register')
    manage('modifyvm', 'foreign', '--nic1', 'nat', '--macaddress1', '080027ABCDEF')
    api.start('foreign')
    with Agent(tmp_path, host, '08:00:27:AB:CD:EF', name='foreign-guest'):
        wait_until(lambda: api.listRegisteredVMs() == ['foreign'])
        assert api.getIdsToNamesMapping()['08:00:27:AB:CD:EF'] == 'foreign'


def test_a_vm_renamed_while_the_host_runs(host, api, remove_all, tmp_path):
    api.createVM('before', '', SMALL)
    host.wait_for_event('vm-added', 'before')
    api.start('before')
    with Agent(tmp_path, host, mac(api, 'before')):
        wait_until(lambda: api.listRegisteredVMs() == ['before'])
        api.powerOff('before')
        manage('modifyvm', 'before', '--name', 'after')
        api.start('after')
        wait_until(lambda: api.listRegisteredVMs() == ['after'], 60)
        assert host.wait_for_event('vm-renamed', 'after')['text'] == 'was before'
        assert 'before' not in api.getNamesToIdsMapping()
        assert host.run('after', 'true')['exitCodeOrSignal'] == 0


def test_a_new_card_while_the_host_runs(host, api, remove_all, tmp_path):
    api.createVM('carded', '', SMALL)
    host.wait_for_event('vm-added', 'carded')
    old = mac(api, 'carded')
    api.start('carded')
    with Agent(tmp_path / 'old', host, old):
        wait_until(lambda: api.listRegisteredVMs() == ['carded'])
    api.powerOff('carded')
    waits = api.runCmd('carded', 'echo', ['waited'], {}, '', '', {'queue': True})
    manage('modifyvm', 'carded', '--macaddress1', '08002700C0DE')
    wait_until(lambda: mac(api, 'carded') == '08:00:27:00:C0:DE', 90)     # where its agent's BYE was lost
    assert old not in api.getIdsToNamesMapping()
    event = host.wait_for_event('vm-card', 'carded')
    assert event['text'] == '08:00:27:00:C0:DE, was ' + old
    found = api.getVM('carded')
    assert (found['id'], found['agent']) == ('08:00:27:00:C0:DE', 'never')
    queued = api.runCmd('carded', 'echo', ['new'], {}, '', '', {'queue': True})
    api.start('carded')
    with Agent(tmp_path / 'new', host, '08:00:27:00:C0:DE', name='unknown'):
        assert host.results(queued)['out'] == 'new\n'
        assert host.results(waits)['out'] == 'waited\n'
        wait_until(lambda: api.listRegisteredVMs() == ['carded'])


def test_an_agent_that_was_there_before_its_vm(host, api, remove_all, tmp_path):
    early = Agent(tmp_path, host, '08:00:27:00:BE:EF', name='early').start(wait=False)
    try:
        wait_until(lambda: 'no VM has the network card' in early.log(), 30)
        manage('createvm', '--name', 'late', '--ostype', 'Linux_64', '--register')
        manage('modifyvm', 'late', '--nic1', 'nat', '--macaddress1', '08002700BEEF')
        api.start('late')
        wait_until(lambda: api.listRegisteredVMs() == ['late'], 60)
    finally:
        early.stop()


@pytest.mark.parametrize('words, told', [
    (['--nic1', 'none'], ''), (['--nic1', 'null', '--nic2', 'nat', '--macaddress2', '080027000002'],
                               '08:00:27:00:00:02')])
def test_which_card_gives_the_id(api, remove_all, words, told):
    """The NAT card in NAT mode; a VM without a card has a name and no id."""
    api.createVM('odd', '', SMALL)
    manage('modifyvm', 'odd', *words)
    assert 'odd' in api.listVMs()
    assert api.getNamesToIdsMapping().get('odd', '') == told
    assert api.getVM('odd')['id'] == told


def test_two_vms_with_one_mac(api, host, remove_all):
    """VirtualBox allows it; nothing breaks, and both keep their names."""
    for name in ('one', 'two'):
        manage('createvm', '--name', name, '--ostype', 'Linux_64', '--register')
        manage('modifyvm', name, '--nic1', 'nat', '--macaddress1', '080027000042')
    assert {'one', 'two'} <= set(api.listVMs())
    assert api.getVM('one')['name'] == 'one'
    assert api.getVM('two')['name'] == 'two'
