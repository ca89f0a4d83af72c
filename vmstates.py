"""The states of a VM, whatever hypervisor has it; a driver tells its own word for one beside it.

What it is not: a driver, or the machinery of one (driverserver.py). No threads, no state of its own.
"""

OFF, RUNNING, PAUSED, SAVED, STUCK, CHANGING = 'off', 'running', 'paused', 'saved', 'stuck', 'changing'
INACCESSIBLE = 'inaccessible'      # the hypervisor knows the VM, and can't read what it is
STATES = (OFF, RUNNING, PAUSED, SAVED, STUCK, CHANGING, INACCESSIBLE)
SUSPENDED = (PAUSED, SAVED, CHANGING)      # states in which nobody expects a sign of life from the guest
