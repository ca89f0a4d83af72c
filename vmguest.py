"""The guest agent's program: the door through which a person comes in.

``python vmguest.py [guest.ini]`` runs the guest agent (guestagent.py) in the foreground. It is short, since a
script is compiled at each start, and what compiles it takes memory that the agent keeps.

Threads: main alone, here; those of an agent are listed in guestagent.py.
"""

# An older Python can't read this file: it stops at this line, and shows it.
__needs__: str = 'Python 3.6 or later, and this is an older one: try python3 instead of python'

import os
import sys
from typing import List, Optional

if os.name != 'posix':
    if sys.argv[1:2] == ['--bundle'] and len(sys.argv) == 3:           # which goes to a guest
        import bundles
        sys.exit(bundles.bundle(sys.argv[2], 'vmguest'))
    sys.exit('vmguest: guests are Linux, macOS and other POSIX systems; here the host agent runs (vmhost.py)')

import guestagent


def main(argv: Optional[List[str]] = None) -> int:
    """The command line; gives the exit code."""
    return guestagent.main(argv)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
