"""A guest on the host-only network that VirtualBox made, with the MAC that VirtualBox gave its VM, and what
the host put into that VM's firmware: its agent finds broker, id and interface by itself, and proves who it is
with nothing configured. It is a QEMU, since the rig's VirtualBox can't send there."""


import os
import re
import xmlrpc.client

import pytest
from guests import DHCPServer, agent_on_offer, qemu
from helpers import wait_until
from rig import forget_networks, manage
from vms import VMHost

SERIAL = 'VBoxInternal/Devices/pcbios/0/Config/DmiBoardSerial'
IMAGE = os.environ.get('VMHOST_RIG_DIR', '') + '/opt/guest-image'


@pytest.fixture
def host_only(home, tmp_path):
    """A host agent on a host-only network."""
    forget_networks()
    network = {'mode': 'hostonly', 'manage': 'yes'}
    with VMHost(tmp_path / 'host', network=network, broker={'port': 61613}) as host:
        yield host
    forget_networks()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/opt/guest-image/initrd.gz'), reason='no guest image')
@pytest.mark.skipif(not os.path.exists('/machine/usr/bin/qemu-system-x86_64'), reason='QEMU is not installed')
def test_the_agent_finds_everything_by_itself(host_only, remove_all, tmp_path):
    with host_only.api as api:
        api.createVM('plugged', '', {'memory': 16, 'diskSize': 0, 'network': 'hostonly'})
        mac = api.getVM('plugged')['id']
        with pytest.raises(xmlrpc.client.Fault):        # not in this rig; its firmware is written by then
            api.start('plugged')
        told = manage('getextradata', 'plugged', SERIAL).split('string:')[1].strip()
        assert re.match('vmhost:[0-9a-f]{32}$', told)
        network = api.getNetwork()
        router = manage('list', 'dhcpservers').partition('3/legacy:')[2].split()[0]
        assert router == network['hostIp'] == '192.168.56.1'
        pool = dict(network['dhcp'], netmask=network['netmask'], router=router)
        log = open(str(tmp_path / 'serial'), 'wb')
        with log, DHCPServer('vboxnet0', pool) as dhcp, agent_on_offer(router, '', tmp_path), \
                qemu(IMAGE, 'vboxnet0', mac.lower(), log, told):
            try:
                wait_until(lambda: api.listRegisteredVMs() == ['plugged'], 200, 0.2)
            except AssertionError:
                raise AssertionError((tmp_path / 'serial').read_text()[-3000:] + host_only.log())
            found = api.getVM('plugged')
            assert (found['id'], found['agent'], found['ip']) == (mac, 'alive', pool['lower'])
            assert dhcp.asked and set(dhcp.asked) == {mac}
            assert api.ping('plugged') == 'PONG from plugged'
            results = host_only.run('plugged', 'sh', '-c', 'uname -s; cat /sys/class/net/eth0/address')
            assert results['out'] == 'Linux\n%s\n' % mac.lower()
            assert results['exitCodeOrSignal'] == 0 and results['resources']['ru_maxrss'] > 0
            shown = host_only.run('plugged', 'cat', '/sys/class/dmi/id/board_serial')['out']
            assert shown.strip() == told and api.agentInfo()['untrusted'] == 0
