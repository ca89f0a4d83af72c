"""What many tests need."""

import time


def wait_until(predicate, timeout=10, interval=0.02):
    """Waits until the predicate holds; gives what it gave. Fails after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        found = predicate()
        if found:
            return found
        assert time.monotonic() < deadline, 'not within %s s' % timeout
        time.sleep(interval)
