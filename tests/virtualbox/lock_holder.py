"""Another program, for the tests: holds a VM's lock until its standard input ends. lock_holder.py VM"""

import sys

import vboxapi

manager = vboxapi.VirtualBoxManager()
session = manager.getSessionObject()
manager.getVirtualBox().findMachine(sys.argv[1]).lockMachine(session, manager.constants.LockType_Write)
print('locked', flush=True)
sys.stdin.read()
session.unlockMachine()
