"""How soon many commands run that are asked for at once: python bench/many.py [--commands 1200]

One host, one guest. Each command appends a byte to a file as it begins, and then sleeps, so that all of them
run at once in the end. Exits with 1 where they haven't all begun within the target of 30 s per 1,200.
"""

import argparse
import os
import sys
import tempfile
import threading
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [TOP, os.path.join(TOP, 'tests')]

from agents import Agent, Host  # noqa: E402

TARGET = 30.0 / 1200           # seconds for each
PROGRAM = ['-c', 'printf . >> begun; exec sleep 600']


def ask(host, count):
    """runCmd, as often as that."""
    with host.api as api:
        for _ in range(count):
            api.runCmd('many', 'sh', PROGRAM)


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument('--commands', type=int, default=1200)
    words.add_argument('--clients', type=int, default=16, help='that ask at once')
    wish = words.parse_args()
    with tempfile.TemporaryDirectory(prefix='vmhost-many-') as folder:
        place = os.path.join(folder, 'guest')
        with Host(os.path.join(folder, 'host')) as host, Agent(place, host, 'many') as guest:
            asked, all_begun = measure(host, os.path.join(guest.files, 'begun'), wish)
            print('%d commands: asked for within %.1f s, all had begun after %.1f s, %.1f ms each'
                  % (wish.commands, asked, all_begun, all_begun / wish.commands * 1000), flush=True)
            end_all(host)
    return 0 if all_begun <= TARGET * wish.commands else 1


def measure(host, begun, wish):
    """Seconds until all were asked for, and until the last one had begun."""
    clients = [threading.Thread(target=ask, args=(host, wish.commands // wish.clients))
               for _ in range(wish.clients)]
    start = time.monotonic()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    asked = time.monotonic() - start
    expected = wish.commands // wish.clients * wish.clients
    while not os.path.exists(begun) or os.path.getsize(begun) < expected:
        time.sleep(0.05)
    return asked, time.monotonic() - start


def end_all(host):
    """KILLs all that run."""
    with host.api as api:
        ids = [command['cmdId'] for command in api.listCmds({'finished': False, 'limit': 10000})]
        for cmd_id in ids:
            api.signalCmd(cmd_id, 'KILL')
        for cmd_id in ids:
            api.waitCmd(cmd_id, 60)


if __name__ == '__main__':
    sys.exit(main())
