"""What nobody looks after any more ends: a VM whose lease is over is saved, an idle host agent goes."""

import os
import signal
import subprocess

import fake_server
import fake_virtualbox
import pytest
from agents import Agent, Host
from brokers import free_port
from helpers import fault_of, wait_until
from vms import VMHost, environment

import bundles
import faults

pytestmark = pytest.mark.whole


@pytest.fixture
def host(tmp_path):
    with VMHost(tmp_path / 'host', fake_virtualbox.install(tmp_path / 'fake')) as host:
        with host.api as api:
            api.createVM('science', '', {'diskSize': 4})
            api.start('science')
        yield host


def test_a_vm_whose_lease_is_over_is_saved(host, api):
    assert api.lease('science', 0.3)
    wait_until(lambda: api.getState('science') == 'Saved', 20)
    assert host.wait_for_event('lease-over', 'science')
    api.start('science')
    assert api.lease('science', 600) and api.lease('science', 0)       # nobody does, and that is all right
    assert api.getState('science') == 'Running'


@pytest.mark.once
def test_a_lease_outlives_the_host_agent(host, api):
    api.lease('science', 1)
    with environment(host.environment):
        keeper = fake_server.VirtualBoxManager()        # its VMs stay while a program is connected
    host.stop(signal.SIGKILL)
    host.start()
    with host.api as after:
        wait_until(lambda: after.getState('science') == 'Saved', 20)
    keeper.line.connection.close()


def test_who_can_have_none(host, api, tmp_path):
    assert fault_of(api.lease, 'nobody', 60).faultCode == faults.NoSuchVM.fault
    assert fault_of(api.lease, 'science', -1).faultCode == faults.InvalidParams.fault
    with Host(tmp_path / 'without') as other, other.api as its:
        assert fault_of(its.lease, 'science', 60).faultCode == faults.NotSupported.fault


def test_an_idle_host_agent_ends(tmp_path):
    host = Host(tmp_path, idle_end='0.5').start()
    assert host.process.wait(20) == 0
    assert 'idle_end' in host.log()


@pytest.mark.once
def test_a_host_agent_whose_bundle_is_gone_ends_where_it_is_started_again_when_needed(tmp_path):
    """A BOINC client removes an application's version once no task is of it: drivers couldn't be started."""
    bundle = str(tmp_path / 'vmhost.pyz')
    bundles.write_bundle(bundle, 'vmhost', ['status.html'])
    host = Host(tmp_path / 'host', idle_end='10m')
    host.program = bundle
    host.start()
    os.remove(bundle)
    assert host.process.wait(20) == 0
    assert bundle + ' was removed or replaced' in host.log()


@pytest.mark.once
def test_a_host_agent_whose_guest_works_is_not_idle(tmp_path):
    with Host(tmp_path / 'host', {'port': free_port()}, idle_end='5') as host, \
            Agent(tmp_path / 'guest', host, 'g1') as guest:
        with host.api as api:
            cmd_id = api.runCmd('g1', 'sh', ['-c', 'until [ -e over ]; do sleep 0.1; done'])
        wait_until(lambda: 'running' in host.log(), 20)
        with pytest.raises(subprocess.TimeoutExpired):
            host.process.wait(6)
        with host.api as api:
            api.signalCmd(cmd_id, 'STOP')        # until somebody has it go on
            wait_until(lambda: api.getCmdStatus(cmd_id)['state'] == 'stopped', 20)
        assert host.process.wait(20) == 0
        host.start()
        with host.api as api:
            wait_until(lambda: api.listRegisteredVMs(), 20)
            api.signalCmd(cmd_id, 'CONT')
        open(os.path.join(guest.files, 'over'), 'w').close()
        assert host.process.wait(20) == 0


def test_stop_host(tmp_path):
    with Host(tmp_path) as host:
        with host.api as api:
            assert api.stopHost()
        assert host.process.wait(10) == 0
        assert not os.path.exists(os.path.join(host.state, 'broker.address'))
