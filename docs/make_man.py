"""Writes docs/vmhost.1, a man page, from what --help says: ``python docs/make_man.py``.

``--check`` writes nothing, and ends with 1 where the page is no longer what the verbs say.
"""

import os
import sys

import made

HERE = os.path.dirname(os.path.abspath(__file__))
PAGE = os.path.join(HERE, 'vmhost.1')
sys.path.insert(0, os.path.dirname(HERE))

import agent  # noqa: E402
import hostcli  # noqa: E402


def roff(text):
    """A text as it stands in the page, line by line."""
    text = text.replace('\\', '\\e').replace('-', '\\-').replace('…', '\\[u2026]')
    return '\n'.join('\\&' + line if line.startswith(('.', "'")) else line for line in text.split('\n'))


def shown(names, options):
    """An argument as a person writes it."""
    if not names[0].startswith('-'):
        word = options.get('metavar') or '|'.join(options.get('choices', names))
        many = {'+': word + ' …', '?': '[%s]' % word, '*': '[%s …]' % word}
        return many.get(options.get('nargs'), word)
    value = ' ' + (options.get('metavar') or '|'.join(options.get('choices', [names[-1].strip('-').upper()])))
    return ', '.join(name + value * (options.get('action') != 'store_true') for name in names)


def describe(verb):
    """The lines of one verb."""
    positional = [shown(*one) for one in verb.arguments if not one[0][0].startswith('-')]
    words = ['VM', '[--]', 'CMD', '[ARG …]'] if verb.name == 'run' else positional
    lines = ['.SS ' + roff(' '.join([verb.name] + words)), roff(verb.help[:1].upper() + verb.help[1:] + '.')]
    for names, options in verb.arguments:
        is_option = names[0].startswith('-')
        if is_option or options.get('help') and verb.name != 'run':
            lines += ['.TP', '.B ' + roff(shown(names, options))]
            lines += [roff(options['help'].replace('%%', '%'))] if options.get('help') else []
    if verb.examples:
        lines += ['.PP', '.nf'] + ['    vmhost ' + roff(example) for example in verb.examples] + ['.fi']
    return lines


def make_page():
    """The whole text of docs/vmhost.1."""
    lines = ['.TH VMHOST 1 "" "vmhost %s"' % agent.VERSION,
             '.SH NAME', roff('vmhost - manages virtual machines and the programs in them'),
             '.SH SYNOPSIS', '.nf', roff(hostcli.USAGE.format(me='vmhost').rstrip()), '.fi']
    for subject, verbs in hostcli.SUBJECTS:
        lines.append('.SH ' + subject.upper())
        for verb in verbs:
            lines += describe(verb)
    aliases = ['%s is %s' % item for item in sorted(hostcli.ALIASES.items())]
    lines += ['.SH OTHER NAMES', roff(', '.join(aliases) + '.'),
              '.SH EXIT STATUS', '.nf', roff(hostcli.EXIT_CODES.rstrip()), '.fi',
              '.SH SEE ALSO', roff('host.ini and guest.ini, where each key is explained; docs/api.md, the '
                                   'methods of the XML-RPC interface; vmhost status --open, the page.')]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    sys.exit(made.write_or_check(sys.argv[1:], PAGE, make_page(), 'docs/make_man.py'))
