"""The drivers there are: a table.

A new driver is a file of its own, whose class derives from `Driver` in hypervisor.py, and a line here.

What it is not: loaded code. A driver is imported in the process that runs it, and nowhere else. No threads.
"""

import collections
from typing import Any, Dict, List


def virtualbox(settings: Dict[str, Any]) -> Any:
    """VirtualBox's driver."""
    import virtualbox
    return virtualbox.VirtualBox(settings)


def vboxmanage(settings: Dict[str, Any]) -> Any:
    """VirtualBox's driver for where vboxapi can't be had."""
    import vboxmanage
    return vboxmanage.VBoxManage(settings)


DRIVERS = collections.OrderedDict([                 # `auto` tries them in this order
    ('VirtualBox', virtualbox), ('VBoxManage', vboxmanage)])


def names_of(wanted: str) -> List[str]:
    """The drivers to try, one after the other, where [Hypervisor] says `auto`, `none`, or a name."""
    lists = {'auto': list(DRIVERS), 'none': [], 'VirtualBox': ['VirtualBox', 'VBoxManage']}
    return lists.get(wanted, [wanted])


def run(name: str) -> None:
    """Main of a driver's process."""
    import driverserver
    driverserver.run_driver(DRIVERS[name])
