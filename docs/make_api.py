"""Writes docs/api.md from the docstrings of hostapi.py: ``python docs/make_api.py``.

``--check`` writes nothing, and ends with 1 where the page is no longer what the docstrings say.
"""

import os
import sys

import made

HERE = os.path.dirname(os.path.abspath(__file__))
PAGE = os.path.join(HERE, 'api.md')
sys.path.insert(0, os.path.dirname(HERE))

import inspect  # noqa: E402

import hostapi  # noqa: E402
import hostreference  # noqa: E402

HEAD = """# The XML-RPC interface

Made from the docstrings of `hostapi.py` by `python docs/make_api.py`; what stands here is also shown by
the running host agent at `GET /`, and by its method `help`.

%s

The examples go on from one another, and from here:

```python
import os, time, webbrowser, xmlrpc.client
token = open('vmhost-state/xmlrpc.token').read().strip()
host = xmlrpc.client.ServerProxy('http://vmhost:%%s@127.0.0.1:50505/' %% token)
```
"""


def link_of(heading):
    """The anchor that a heading gets where Markdown is shown."""
    return ''.join(c for c in heading.lower().replace(' ', '-') if c.isalnum() or c in '-_')


def make_page():
    """The whole text of docs/api.md."""
    parts = hostreference.describe(hostapi.PARTS)
    lines = [HEAD % inspect.getdoc(hostapi.Api)]
    for part, methods in parts:
        names = ' · '.join('[%s](#%s)' % (method.name, link_of(method.name + method.signature))
                           for method in methods)
        lines.append('**%s**: %s\n' % (part, names))
    for part, methods in parts:
        lines.append('## %s\n' % part)
        for method in methods:
            lines.append('### %s%s\n\n%s\n\n```python\n%s\n```\n' % (
                method.name, method.signature, method.text, method.example))
    aliases = ', '.join('`%s` is `%s`' % item for item in hostapi.ALIASES.items())
    lines.append('## Names that older clients use\n\n%s.' % aliases)
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    sys.exit(made.write_or_check(sys.argv[1:], PAGE, make_page(), 'docs/make_api.py'))
