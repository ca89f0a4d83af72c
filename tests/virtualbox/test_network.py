"""The host-only network, made and mended; NAT and its port forwarding; what `check` says."""

import contextlib
import os
import re
import subprocess

import pytest
from rig import (
    cards_of,
    facts,
    forget_networks,
    forwards_are_served_and_move,
    manage,
    try_manage,
    uplinks,
)
from vms import VMHost, fault_of

import agent
import hostconfig
import hosthypervisor
import hostmachines

CONF = '/etc/vbox/networks.conf'


def ip(*words):
    return subprocess.run(('ip',) + words, stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout


@pytest.fixture
def no_network(home):
    """No host-only interface before and after, and no DHCP server."""
    forget_networks()
    yield
    forget_networks()


@contextlib.contextmanager
def allowed(*ranges):
    os.makedirs(os.path.dirname(CONF), exist_ok=True)
    with open(CONF, 'w') as file:
        file.writelines('* %s\n' % each for each in ranges)
    try:
        yield
    finally:
        os.remove(CONF)


HOST_ONLY = {'mode': 'hostonly'}
MADE = {'mode': 'hostonly', 'interface': 'vboxnet0', 'hostIp': '192.168.56.1', 'netmask': '255.255.255.0',
        'dhcp': {'server': '192.168.56.100', 'lower': '192.168.56.101', 'upper': '192.168.56.254',
                 'enabled': True}}


def test_the_network_is_made_once_and_mended(no_network, tmp_path):
    with VMHost(tmp_path, network=HOST_ONLY) as host, host.api as api:
        assert api.getNetwork()['hostIp'] == ''
        assert api.setupNetwork() == MADE == api.getNetwork()
        assert '192.168.56.1/24' in ip('addr', 'show', 'vboxnet0')
        server = manage('list', 'dhcpservers')
        assert re.search(r'(?m)^\s*3/legacy: +192\.168\.56\.1$', server) or '192.168.56.1\n' in server
        links = ip('-o', 'link')
        assert api.setupNetwork() == MADE
        assert ip('-o', 'link') == links and manage('list', 'dhcpservers') == server
        ip('addr', 'flush', 'dev', 'vboxnet0')
        assert api.setupNetwork() == MADE
        assert '192.168.56.1/24' in ip('addr', 'show', 'vboxnet0')
        manage('dhcpserver', 'modify', '--interface', 'vboxnet0', '--lowerip', '192.168.56.150', '--disable')
        assert api.getNetwork()['dhcp']['enabled'] is False
        assert api.setupNetwork() == MADE


def test_an_interface_that_somebody_else_gave_an_address_keeps_it(no_network, tmp_path):
    manage('hostonlyif', 'create')
    manage('hostonlyif', 'ipconfig', 'vboxnet0', '--ip', '192.168.60.1')
    with VMHost(tmp_path, network=dict(HOST_ONLY, manage='yes')) as host, host.api as api:
        assert api.getNetwork()['hostIp'] == '192.168.60.1'
        code, text = fault_of(api.setupNetwork)
        assert code == 5 and '192.168.60.1' in text and 'hostonlyif ipconfig' in text, text
        assert '192.168.60.1/24' in ip('addr', 'show', 'vboxnet0')
        manage('hostonlyif', 'ipconfig', 'vboxnet0', '--ip', '192.168.56.1')
        assert api.setupNetwork() == MADE


def test_what_else_somebody_gave_an_interface_stays(no_network, tmp_path):
    """Its netmask, its DHCP server; and who only found all as it should be has not chosen it."""
    manage('hostonlyif', 'create')
    manage('hostonlyif', 'ipconfig', 'vboxnet0', '--ip', '192.168.56.1', '--netmask', '255.255.255.128')
    with VMHost(tmp_path, network=dict(HOST_ONLY, manage='yes')) as host, host.api as api:
        code, text = fault_of(api.setupNetwork)
        assert code == 5 and '255.255.255.128' in text and '--netmask 255.255.255.0' in text, text
        assert '192.168.56.1/25' in ip('addr', 'show', 'vboxnet0')
        manage('hostonlyif', 'ipconfig', 'vboxnet0', '--ip', '192.168.56.1', '--netmask', '255.255.255.0')
        pool = ['--interface', 'vboxnet0', '--server-ip', '192.168.56.9', '--netmask', '255.255.255.0',
                '--lower-ip', '192.168.56.10', '--upper-ip', '192.168.56.20', '--enable']
        manage('dhcpserver', 'add', *pool)
        code, text = fault_of(api.setupNetwork)
        assert code == 5 and '192.168.56.10 to 192.168.56.20' in text and 'dhcpserver remove' in text, text
        assert api.getNetwork()['dhcp']['lower'] == '192.168.56.10'
    theirs = dict(dhcp_server='192.168.56.9', dhcp_lower='192.168.56.10', dhcp_upper='192.168.56.20')
    with VMHost(tmp_path, network=dict(HOST_ONLY, **theirs)) as host, host.api as api:
        assert api.setupNetwork()['dhcp']['lower'] == '192.168.56.10'
    with VMHost(tmp_path, network=dict(HOST_ONLY)) as host, host.api as api:
        assert fault_of(api.setupNetwork)[0] == 5
        manage('dhcpserver', 'remove', '--interface', 'vboxnet0')
        assert api.setupNetwork() == MADE


def test_what_somebody_made_anew_is_theirs(no_network, tmp_path):
    """Under the name of what was given here: VirtualBox has no other."""
    with VMHost(tmp_path, network=HOST_ONLY) as host, host.api as api:
        assert api.setupNetwork() == MADE
        manage('hostonlyif', 'remove', 'vboxnet0')
        manage('hostonlyif', 'create')
        manage('hostonlyif', 'ipconfig', 'vboxnet0', '--ip', '192.168.56.1', '--netmask', '255.255.255.0')
        for told, lower, more in (
                ('192.168.56.10 to 192.168.56.254', '192.168.56.10', ()),
                ('gateway 192.168.56.77', '192.168.56.101', ('--set-opt=3', '192.168.56.77'))):
            try_manage('dhcpserver', 'remove', '--interface', 'vboxnet0')
            manage('dhcpserver', 'add', '--interface', 'vboxnet0', '--server-ip', '192.168.56.100',
                   '--netmask', '255.255.255.0', '--lower-ip', lower, '--upper-ip', '192.168.56.254',
                   '--enable', *more)
            before = manage('list', 'dhcpservers')
            code, text = fault_of(api.setupNetwork)
            assert code == 5 and told in text and 'dhcpserver remove' in text, text
            assert manage('list', 'dhcpservers') == before
        manage('dhcpserver', 'remove', '--interface', 'vboxnet0')
        assert api.setupNetwork() == MADE


def test_an_address_that_was_given_here_is_changed_here(no_network, tmp_path):
    other = {'host_ip': '192.168.57.1', 'dhcp_server': '192.168.57.2', 'dhcp_lower': '192.168.57.3',
             'dhcp_upper': '192.168.57.4'}
    for network, made in ((other, '192.168.57.1'), ({}, '192.168.56.1')):
        with VMHost(tmp_path, network=dict(HOST_ONLY, **network)) as host, host.api as api:
            assert api.setupNetwork()['hostIp'] == made


def test_a_managed_network_is_there_at_the_start(no_network, tmp_path):
    with VMHost(tmp_path, network=dict(HOST_ONLY, manage='yes')) as host, host.api as api:
        assert api.getNetwork() == MADE
        assert api.agentInfo()['broker']['address'].startswith('192.168.56.1:')


def test_another_range_must_be_allowed(no_network, tmp_path):
    network = dict(HOST_ONLY, host_ip='10.77.0.1', dhcp_server='10.77.0.2', dhcp_lower='10.77.0.10',
                   dhcp_upper='10.77.0.20')
    with VMHost(tmp_path, network=network) as host, host.api as api:
        code, text = fault_of(api.setupNetwork)
        assert code == 5 and '10.77.0.1' in text and '192.168.56.0/21' in text and CONF in text
        assert 'vboxnet' not in ip('-o', 'link')
        with allowed('10.77.0.0/16'):
            assert api.setupNetwork()['hostIp'] == '10.77.0.1'
            assert '10.77.0.1/24' in ip('addr', 'show', 'vboxnet0')


@pytest.mark.parametrize('wrong, told', [
    ({'dhcp_lower': '192.168.57.101'}, 'dhcp_lower'), ({'dhcp_upper': '192.168.56.50'}, 'dhcp_lower'),
    ({'host_ip': '192.168.56.120'}, 'host_ip'), ({'interface': 'vboxnet7'}, 'vboxnet0')])
def test_wrong_networks_are_named(no_network, tmp_path, wrong, told):
    with VMHost(tmp_path, network=dict(HOST_ONLY, **wrong)) as host, host.api as api:
        code, text = fault_of(api.setupNetwork)
        assert code == 5 and told in text, text
        assert 'vboxnet' not in ip('-o', 'link')


def test_the_host_only_card_gives_the_id(no_network, remove_all, tmp_path):
    with VMHost(tmp_path, network=HOST_ONLY) as host, host.api as api:
        api.setupNetwork()
        api.createVM('carded', '', {'memory': 16, 'diskSize': 0})
        found = facts('carded')
        assert (found['nic1'], found['hostonlyadapter1']) == ('hostonly', 'vboxnet0')
        assert api.getVM('carded')['id'].replace(':', '') == found['macaddress1']
        manage('modifyvm', 'carded', '--nic1', 'nat', '--nic3', 'hostonly',
               '--host-only-adapter3', 'vboxnet0')
        assert api.getVM('carded')['id'].replace(':', '') == facts('carded')['macaddress3']


def test_a_vm_starts_though_no_network_was_set_up(no_network, remove_all, tmp_path):
    """By NAT; of one that wants a host-only card it is said what is missing. Once there is a network, the
    first one gets its card."""
    with VMHost(tmp_path, network=HOST_ONLY) as host, host.api as api:
        api.createVM('early', '', {'memory': 16, 'diskSize': 0})
        api.createVM('hasty', '', {'memory': 16, 'diskSize': 0, 'network': 'hostonly'})
        mac = api.getVM('early')['id']
        assert api.start('early') is True and facts('early')['nic1'] == 'nat'
        assert [value for key, value in facts('early').items() if value.startswith('vmhost-chirp,')]
        code, text = fault_of(api.start, 'hasty')
        assert (code, 'net --setup' in text) == (4, True), text
        api.powerOff('early')
        api.setupNetwork()
        fault_of(api.start, 'early')                # which the rig can't: it lacks the kernel's module
        found = facts('early')
        assert (found['nic1'], found['hostonlyadapter1']) == ('hostonly', 'vboxnet0')
        assert api.getVM('early')['id'] == mac == api.getVM(mac)['id']


def test_nat_mode_forwards_chirp_on_loopback(api, remove_all):
    rules = set()
    for name in ('one', 'two'):
        api.createVM(name, '', {'memory': 16, 'diskSize': 0})
        rule = facts(name)['Forwarding(0)'].split(',')
        assert (rule[0], rule[1], rule[2], rule[5]) == ('vmhost-chirp', 'tcp', '127.0.0.1', '9094')
        with open(facts(name)['CfgFile']) as file:
            assert 'localhost-reachable="true"' in file.read()
        rules.add(rule[3])
        api.start(name)
    assert len(rules) == 2


def test_ports_of_a_guest_are_reached_here(api, remove_all):
    """And a saved VM's moves, where another program took it meanwhile."""
    api.createVM('serves', '', {'memory': 16, 'diskSize': 0, 'forwards': [
        {'guestPort': 80}, {'guestPort': 22, 'isRemote': True}]})
    forwards_are_served_and_move(
        'serves', lambda: api.getVM('serves')['forwards'], lambda: api.start('serves'),
        lambda: api.saveState('serves'))


def test_a_card_in_the_network_of_this_machine(api, remove_all):
    """Beside the one by which the VM reaches its host. It follows the default route, or is where it was put.
    The rig's kernel lacks the module that carries what such a card sends: no VM with one starts here."""
    with uplinks() as route:
        assert api.createVM('named', '', {'memory': 16, 'diskSize': 0, 'bridged': 'eth8'}) == [True, 'named']
        assert api.createVM('follows', '', {'memory': 16, 'diskSize': 0, 'bridged': 'auto'})
        assert cards_of('named') == [('nat', ''), ('bridged', 'eth8')]
        assert cards_of('follows') == [('nat', ''), ('bridged', 'eth7')]
        for vm, interface in (('named', 'eth8'), ('follows', 'eth7')):
            found = api.getVM(vm)
            assert found['bridged'] == interface
            assert found['id'].replace(':', '') == facts(vm)['macaddress1'] != facts(vm)['macaddress2']
        code, text = fault_of(api.createVM, 'wrong', '', {'diskSize': 0, 'bridged': 'eth9'})
        assert code == -32602 and re.search('no interface eth9; there are: .*eth7', text)
        for interface in ('eth8', 'eth7', ''):
            route(interface)
            fault_of(api.start, 'follows')
            assert cards_of('follows') == [('nat', ''), ('bridged', interface or 'eth7')]
    code, text = fault_of(api.start, 'named')
    assert code == 4 and 'no interface eth8; there are: ' in text
    assert 'wrong' not in api.listVMs() and api.getState('named') == 'PoweredOff'


def test_a_foreign_vm_gets_what_it_needs_at_its_start(api, remove_all):
    manage('createvm', '--name', 'foreign', '--ostype', 'Linux_64', '--register')
    manage('modifyvm', 'foreign', '--nic1', 'nat', '--memory', '16', '--natpf1', 'ssh,tcp,,2222,,22')
    api.start('foreign')
    found = [value for key, value in facts('foreign').items() if key.startswith('Forwarding')]
    assert sorted(rule.split(',')[0] for rule in found) == ['ssh', 'vmhost-chirp']
    api.powerOff('foreign')
    before = facts('foreign')
    api.start('foreign')
    assert [value for key, value in facts('foreign').items() if key.startswith('Forwarding')] == [
        value for key, value in before.items() if key.startswith('Forwarding')]


@pytest.fixture
def check(home, tmp_path):
    """What the class says of this machine, by a network's settings."""
    def check(**network):
        settings = agent.read_settings(None, hostconfig.SETTINGS)
        vars(settings.Network).update(network)
        box = hosthypervisor.Hypervisor('VirtualBox', hostmachines.driver_settings(settings, str(tmp_path)))
        box.open()
        try:
            return {what: (ok, mend) for ok, what, mend, _ in box.check()}
        finally:
            assert box.close()
    return check


def test_check_says_what_is_wrong_and_how_to_mend_it(no_network, check):
    found = check()
    ok = {what: fine for what, (fine, _) in found.items()}
    assert all(bool(mend) != fine for fine, mend in found.values())
    assert [what for what in ok if what.startswith('VirtualBox 7.') and ok[what]]
    assert ok['kernel module vboxdrv'] is False and 'vboxconfig' in found['kernel module vboxdrv'][1]
    assert ok['addresses of the host-only network'] is True
    assert ok['interface vboxnet0 with address 192.168.56.1'] is False
    assert 'net --setup' in found['interface vboxnet0 with address 192.168.56.1'][1]
    assert [what for what in ok if 'VT-x' in what] and [what for what in ok if 'remote desktop' in what]
    wrong = check(host_ip='10.0.0.1')
    assert 'dhcp_server' in wrong['addresses of the host-only network'][1]
    assert not [what for what in check(mode='nat') if 'host-only' in what]
