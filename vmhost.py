"""The host agent's program: the door through which a person comes in.

``python vmhost.py [host.ini]`` runs the host agent (hostagent.py) in the foreground; ``python vmhost.py
[host.ini] VERB ...`` talks to the running one (hostcli.py), and loads nothing of it.

Threads: main alone, here; those of a host agent are listed in hostagent.py.
"""

# An older Python can't read this file: it stops at this line, and shows it.
__needs__: str = 'Python 3.6 or later, and this is an older one: try python3 instead of python'

import sys
from typing import Any, List, Optional

try:
    import hostcli
except KeyboardInterrupt:      # Ctrl-C before the command line is there to hear it
    sys.exit(130)


def run_host(ini: Optional[str]) -> int:
    """Runs the host agent of that ini file, or on the defaults, until SIGTERM; gives the exit code."""
    import hostagent  # verbs do without it
    return hostagent.run_host(ini)


def check(client: Any, screen: Any, args: Any) -> int:
    """The verb check: looks at every precondition; gives the exit code."""
    import hostcheck  # the other verbs do without it
    return hostcheck.do_check(client, screen, args)


def main(argv: Optional[List[str]] = None) -> int:
    """The command line; gives the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return hostcli.main(argv, run_host, check)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
