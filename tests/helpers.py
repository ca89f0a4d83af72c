"""What many tests need."""

import contextlib
import os
import signal
import threading
import time
import xmlrpc.client


def wait_until(predicate, timeout=10, interval=0.02):
    """Waits until the predicate holds; gives what it gave. Fails after ``timeout`` seconds, up to four times
    as many where others' work takes the processors. Looks after each ``interval``, and as it takes longer up
    to five times as seldom: who is asked needs the processor, too."""
    begin = time.monotonic()
    while True:
        found = predicate()
        if found:
            return found
        waited = time.monotonic() - begin
        assert waited < timeout or waited < timeout * min(4, others_take()), 'not within %.0f s' % waited
        time.sleep(max(interval, min(waited / 10, 5 * interval, 0.5)))


@contextlib.contextmanager
def beside(act, pause=0):
    """Meanwhile ``act`` is called again and again, on a thread of its own, ``pause`` seconds after it
    returned. What it raises, which ends it, is raised at the end."""
    ending, failures = threading.Event(), []

    def run():
        try:
            while not ending.is_set():
                act()
                ending.wait(pause)
        except Exception as failure:
            failures.append(failure)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()
    if failures:
        raise failures[0]


def others_take():
    """How many times as long all takes, for what else the machine does, where it tells; VMHOST_FULL: it does
    nothing."""
    is_told = hasattr(os, 'getloadavg') and not os.environ.get('VMHOST_FULL')
    return max(1, max(os.getloadavg()) / os.cpu_count()) if is_told else 1


def let_others_in(folder):
    """Opens a test's folder to other users: pytest makes it, and what it is in, for its owner alone."""
    for path in [folder] + list(folder.parents)[:3]:       # the third is there where tests run side by side
        if path.stat().st_mode & 0o777 == 0o700:
            path.chmod(0o755)


def fault_of(call, *args):
    """The fault that a call of the API ends with. Fails where it doesn't."""
    try:
        answer = call(*args)
    except xmlrpc.client.Fault as fault:
        return fault
    raise AssertionError('no fault, but %r' % (answer,))


def halt(pid):
    """SIGSTOP, which a program's threads on another processor meet a moment later: now all of them have."""
    def is_halted():
        tasks = '/proc/%d/task' % pid
        for task in os.listdir(tasks):
            with open(os.path.join(tasks, task, 'stat')) as file:
                if file.read().rpartition(')')[2].split()[0] != 'T':
                    return False
        return True
    os.kill(pid, signal.SIGSTOP)
    wait_until(is_halted)
