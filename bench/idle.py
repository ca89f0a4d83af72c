"""What idle agents take: python bench/idle.py [--seconds 30]

Starts a host agent without a hypervisor and a guest agent that joins it, leaves them alone, and prints beside
a bare Python (one that waits for its standard input) what each has resident, and what part of a core it
takes. Resident is the process that runs the agent; those that wait beside it (the guest's fork server and
free runners) are printed with what is theirs alone, since the rest is shared with the agent. Exits with 1
where a target is missed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [TOP, os.path.join(TOP, 'tests')]

from agents import Agent, Host  # noqa: E402

TARGETS = {'host': (38.0, 0.4), 'guest': (22.0, 0.1)}      # MiB resident, percent of a core
SETTLE = 5.0                  # seconds after the join, in which what a start needs is done and freed


def resident(pid):
    """MiB of a process that are in memory, and of them those that no other process has."""
    shared, private = 0, 0
    with open('/proc/%d/smaps_rollup' % pid) as file:
        for line in file:
            name, _, rest = line.partition(':')
            if name == 'Rss':
                shared = int(rest.split()[0])
            elif name.startswith('Private_'):
                private += int(rest.split()[0])
    return shared / 1024, private / 1024


def processor_time(pid):
    """{thread: seconds that it has run}; to the nanosecond, since clock ticks overrate many short runs."""
    found = {}
    for thread in os.listdir('/proc/%d/task' % pid):
        with open('/proc/%d/task/%s/schedstat' % (pid, thread)) as file:
            found[thread] = int(file.read().split()[0]) / 1e9
    return found


def children(pid):
    """The descendants of a process."""
    with open('/proc/%d/task/%d/children' % (pid, pid)) as file:
        direct = [int(word) for word in file.read().split()]
    return direct + [one for child in direct for one in children(child)]


def measure(processes, seconds):
    """Prints a line for each; True where no target is missed."""
    before = {name: processor_time(pid) for name, pid in processes}
    time.sleep(seconds)
    met = True
    print('%-8s %14s %12s %12s' % ('', 'resident MiB', 'own MiB', '% of a core'))
    for name, pid in processes:
        (memory, own), after = resident(pid), processor_time(pid)
        percent = 100 * sum(after[thread] - before[name].get(thread, 0) for thread in after) / seconds
        most_memory, most_percent = TARGETS.get(name, (memory, 100.0))
        is_met = memory <= most_memory and percent <= most_percent
        met = met and is_met
        verdict = '%s at most %g MiB, %g %%' % ('met:' if is_met else 'MISSED:', most_memory, most_percent)
        print('%-8s %14.1f %12.1f %12.2f  %s'
              % (name, memory, own, percent, verdict if name in TARGETS else ''))
        for child in children(pid):
            print('%-8s %14.1f %12.1f' % ('', resident(child)[0], resident(child)[1]))
    return met


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument('--seconds', type=float, default=30.0, help='how long they are watched')
    seconds = words.parse_args().seconds
    folder = tempfile.mkdtemp(prefix='vmhost-idle-')
    bare = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE,
                            stdout=subprocess.DEVNULL)
    try:
        with Host(os.path.join(folder, 'host')) as host, \
                Agent(os.path.join(folder, 'guest'), host, 'g') as guest:
            time.sleep(SETTLE)
            processes = [('python', bare.pid), ('host', host.process.pid), ('guest', guest.process.pid)]
            return 0 if measure(processes, seconds) else 1
    finally:
        bare.communicate(b'\n')
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == '__main__':
    sys.exit(main())
