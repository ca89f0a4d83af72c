"""The end of the session on Windows. By itself: it ends whatever runs there."""

import os

from windows_host import WindowsHost
from wine import Program


def test_the_host_ends_in_order_when_the_user_logs_off(tmp_path, windows):
    with WindowsHost(tmp_path) as host:
        Program('wineboot', '--end-session').wait()
        host.process.wait(20)
        assert not os.path.exists(os.path.join(host.state, 'broker.address'))
    assert host.has_stopped_in_order()
