"""The API's reference, made of the methods' docstrings: as text, and as the page at ``GET /``.

docs/make_api.py makes docs/api.md of the same. Loaded when somebody asks for it. No threads, no state.
"""

import html
import inspect
import re
import textwrap
from typing import Any, Callable, Dict, Iterable, List, Tuple

import agent
from hostarguments import names_of, signature_of

PAGE_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 60em; margin: 0 auto; padding: 1em; font: 16px/1.5 system-ui, sans-serif; }
h3 { margin-bottom: 0; font: bold 1em ui-monospace, monospace; overflow-wrap: anywhere; }
p { margin: .3em 0; }
pre { overflow-x: auto; padding: .5em; border: 1px solid #8888; border-radius: 4px; }
"""


class MethodText:
    """What the reference says of one method. ``example``: lines as in an interactive session."""

    def __init__(self, name: str, method: Callable) -> None:
        self.whole = inspect.getdoc(method) or ''
        found = re.search(r'^ *>>> ', self.whole, re.M)
        begin = found.start() if found else len(self.whole)
        self.name = name
        self.signature = signature_of(method)
        self.text = self.whole[:begin].strip()
        self.example = textwrap.dedent(self.whole[begin:])

    def __str__(self) -> str:
        return '%s%s\n%s' % (self.name, self.signature, textwrap.indent(self.whole, '    '))


def describe(parts: Iterable[Any]) -> List[Tuple[str, List[MethodText]]]:
    """The reference of these classes of methods: [(part, its methods)], in the order of the definitions."""
    return [(part.part, [MethodText(name, getattr(part, name)) for name in names_of(part)])
            for part in parts]


def reference_page(about: str, parts: Iterable[Any], aliases: Dict[str, str]) -> str:
    """The API's reference as a page: what docs/api.md says, of this very program.

    about      what is said of all methods
    aliases    {name that older clients use: name}
    """
    escape = html.escape
    lines = ['<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">',
             '<meta name="viewport" content="width=device-width, initial-scale=1">',
             '<title>vmhost %s: methods</title>' % agent.VERSION,
             '<link rel="icon" href="data:,">', '<style>%s</style>' % PAGE_STYLE,
             '<main>\n<h1>Methods of vmhost %s</h1>' % agent.VERSION,
             paragraphs(inspect.cleandoc(about))]
    for part, methods in describe(parts):
        lines.append('<h2>%s</h2>' % escape(part))
        for method in methods:
            lines += ['<h3 id="%s">%s%s</h3>' % (method.name, method.name, escape(method.signature)),
                      paragraphs(method.text), '<pre tabindex="0">%s</pre>' % escape(method.example)]
    older = ['``%s`` is ``%s``' % item for item in aliases.items()]
    return '\n'.join(lines + ['<h2>Older names</h2>', paragraphs(', '.join(older)), '</main>\n</html>\n'])


def paragraphs(text: str) -> str:
    """A docstring's text as HTML."""
    marked = re.sub('``(.*?)``', r'<code>\1</code>', html.escape(text))
    return '\n'.join('<p>%s</p>' % part for part in marked.split('\n\n'))
