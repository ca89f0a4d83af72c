"""A Linux guest that VirtualBox boots from nothing, in a VM that the host agent made: its agent reads what
the host wrote into the firmware, and proves by that who it is, with nothing configured in it. In the rig,
whose VirtualBox interprets, that takes 43 minutes with a processor of its own: by hand, with
VMHOST_COLD_BOOT=1 and a guest.iso (tests/rigs/guest-image RIG/opt/guest-image iso). What its console says is
in vms/serial.log of VirtualBox's home."""

import os

import pytest
from guests import agent_on_offer
from helpers import wait_until
from rig import manage
from vms import VMHost

SERIAL = 'VBoxInternal/Devices/pcbios/0/Config/DmiBoardSerial'
IMAGE = '/opt/guest-image/guest.iso'


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get('VMHOST_COLD_BOOT'), reason='takes long: VMHOST_COLD_BOOT=1')
@pytest.mark.skipif(not os.path.exists(IMAGE), reason='no guest.iso: tests/rigs/guest-image')
def test_a_guest_that_boots_from_nothing_proves_itself(home, tmp_path):
    with VMHost(tmp_path / 'host', broker={'port': 61613}) as host, host.api as api:
        api.createVM('cold', IMAGE, {'memory': 512, 'network': 'nat'})
        mac = api.getVM('cold')['id']
        # As tests/rigs/boot-guest has it: what a kernel needs least of where each instruction is interpreted.
        manage('modifyvm', 'cold', '--paravirtprovider', 'none', '--x2apic', 'on', '--uart1', '0x3f8', '4',
               '--uartmode1', 'file', os.path.join(home, 'vms', 'serial.log'))
        with agent_on_offer('127.0.0.1', '', tmp_path):
            try:
                api.start('cold')
                wait_until(lambda: api.listRegisteredVMs() == ['cold'], 3600, 1)
                told = manage('getextradata', 'cold', SERIAL).split('string:')[1].strip()
                assert host.run('cold', 'cat', '/sys/class/dmi/id/board_serial')['out'].strip() == told
                assert api.getVM('cold')['id'] == mac and api.agentInfo()['untrusted'] == 0
            finally:
                api.powerOff('cold')
                api.removeVM('cold', True)
