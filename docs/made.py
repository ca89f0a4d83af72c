"""Pages that are made from the code: what their makers share."""

import sys


def write_or_check(words, page, text, maker):
    """Writes the page, or with ``--check`` only compares it; gives the exit code. ``maker``: its program."""
    if '--check' in words:
        with open(page, encoding='utf-8') as file:
            if file.read() == text:
                return 0
        print('%s is not what the code says: python %s' % (page, maker), file=sys.stderr)
        return 1
    with open(page, 'w', encoding='utf-8', newline='\n') as file:
        file.write(text)
    return 0
