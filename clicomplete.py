"""Completion: scripts for shells, and what they ask this program for.

What it is not: a list of verbs, which it is given. No threads, no locks.
"""

import contextlib
import glob
import os
import posixpath
import shlex
import sys
from typing import Any, Dict, Iterable, List, Tuple

import agent
from clicommands import FINISHED_SHOWN
from clifiles import vm_and_path
from cliverbs import Verb
from hostclient import Client
from hostconfig import ini_here, read_settings
from rpc import carried

# Each asks this program for what could stand where the cursor is: {me} --complete WORD…, without the
# name of the program, up to the cursor. Nothing: a file.
COMPLETION = {
    'bash': """\
# vmhost: eval "$(python3 vmhost.py --completion bash)" in ~/.bashrc
_vmhost() {{
    local at=0 cur=${{COMP_WORDS[COMP_CWORD]}} found
    while ((at <= COMP_CWORD)) && [[ ${{COMP_WORDS[at++]}} != @(*vmhost.py|*vmhost.pyz|vmhost) ]]; do :; done
    ((at <= COMP_CWORD)) || return 0
    COMPREPLY=()
    while IFS= read -r found; do
        case $cur in
            \\"*)
                [[ $found != *!* ]] || continue         # within these quotes nothing keeps it from history
                found=${{found//\\\\/\\\\\\\\}} found=${{found//\\"/\\\\\\"}}
                found=${{found//\\$/\\\\\\$}} found=${{found//\\`/\\\\\\`}} ;;
            \\'*) found=${{found//\\'/\\'\\\\\\'\\'}} ;;
            *) printf -v found %q "$found" ;;
        esac
        COMPREPLY+=("$found")
    done < <({me} --complete "${{COMP_WORDS[@]:at:COMP_CWORD-at+1}}" 2> /dev/null)
    [[ ${{COMPREPLY[*]}} != */ ]] || compopt -o nospace 2> /dev/null
    case ,$cur,${{COMP_WORDS[COMP_CWORD-1]}}, in *,:,*) compopt +o default 2> /dev/null ;; esac   # of a VM
}}
complete -o default -F _vmhost vmhost.py vmhost.pyz vmhost python python3
""",
    'zsh': """\
# vmhost: eval "$(python3 vmhost.py --completion zsh)" in ~/.zshrc, behind compinit
_vmhost() {{
    local -a found
    found=("${{(@f)$({me} --complete "${{(@Q)words[2,CURRENT]}}" 2> /dev/null)}}")
    local -a open=(${{(M)found:#*/}})
    found=(${{found:#*/}})
    if [[ -z $found$open ]]; then
        [[ $words[CURRENT] == *:* ]] || _files
        return
    fi
    [[ -z $open ]] || compadd -S '' -a open
    [[ -z $found ]] || compadd -a found
}}
compdef _vmhost vmhost.py vmhost.pyz vmhost
""",
    'fish': """\
# vmhost: python3 vmhost.py --completion fish | source, in ~/.config/fish/config.fish
function __vmhost_candidates
    set -l words (commandline -opc) (commandline -ct)
    while set -q words[1]; and not string match -qr '(vmhost\\.pyz?|^vmhost)$' -- $words[1]
        set -e words[1]
    end
    set -q words[2]; and {me} --complete $words[2..-1] 2> /dev/null
end
for program in vmhost.py vmhost.pyz vmhost python python3
    complete -c $program -a '(__vmhost_candidates)'
end
""",
}


def completion(shell: str) -> str:
    """A script for that shell, which completes verbs, options, VMs and commands."""
    me = '%s %s' % (shlex.quote(sys.executable), shlex.quote(os.path.abspath(sys.argv[0])))
    return COMPLETION[shell].format(me=me).rstrip()


def candidates(words: List[str], verbs: Dict[str, Verb], aliases: Iterable[str] = ()) -> List[str]:
    """What could stand for the last word, behind the others: an ini file, a verb, its arguments."""
    words, cut = rejoined([unquoted(word) for word in words])
    if len(words) > 1 and words[0] in verbs and not os.path.isfile(words[0]):
        words.insert(0, ini_here() or '')
    known = list(verbs) + [alias for alias in aliases if words[-1:] != [''] and alias[0] != '-']
    if words[-2:-1] == ['--completion']:
        found = list(COMPLETION)
    elif len(words) < 2:
        options = ['--help', '--bundle', '--completion', '--version']
        found = options + known if words[-1:] != [''] else sorted(glob.glob('*.ini')) + known
    elif len(words) == 2:
        found = known
    elif words[1] in verbs and '--' not in words[:-1]:
        found = candidates_of(verbs[words[1]], words)
    else:
        found = []
    # What isn't printable would be more than one word, or obeyed by the terminal.
    return [candidate[cut:] for candidate in found
            if words and candidate.startswith(words[-1]) and candidate.isprintable()]


def rejoined(words: List[str]) -> Tuple[List[str], int]:
    """(the words as they were typed, how much of the last one is not to be told again): bash breaks them at
    colons, and completes what is behind the last one."""
    found: List[str] = []
    cut, is_open = 0, False
    for at, word in enumerate(words):
        if found and (word == ':' and at > 1 or is_open):
            found[-1] += word
            cut = len(found[-1]) - (0 if word == ':' else len(word))
        else:
            found.append(word)
            cut = 0
        is_open = word == ':'
    return found, cut


def unquoted(word: str) -> str:
    """A word as the shell will read it, when it is whole."""
    for end in ('', '"', "'"):
        with contextlib.suppress(ValueError):
            return ''.join(shlex.split(word + end))
    return word


def candidates_of(verb: Verb, words: List[str]) -> List[str]:
    """What could stand for the last word among the arguments of a verb."""
    options = {name: settings for names, settings in verb.arguments for name in names if name[0] == '-'}
    if words[-1].startswith('-'):
        return sorted(options) + ['--help']
    before, given = options.get(words[-2], {}), []  # type: Any, List[str]
    if 'metavar' in before or 'choices' in before:
        wanted = before
    else:
        positional = [settings for names, settings in verb.arguments if names[0][0] != '-']
        given = [word for n, word in enumerate(words[2:-1], 2) if not word.startswith('-')
                 and not {'metavar', 'choices'} & set(options.get(words[n - 1], {}))]
        takes_more = positional[-1:] if positional and positional[-1].get('nargs') in ('*', '+') else []
        wanted = (positional[len(given):] + takes_more + [{}])[0]
    try:
        host = Client(read_settings(words[0] or None).Host.state_dir)
        if wanted.get('metavar') in ('SRC', 'DST'):
            return paths_meant(host, verb.name, wanted['metavar'], given, words[-1])
        return meant(host, wanted, words[-2], verb.name)
    except agent.AgentError:
        return []           # no host, no names; a shell in the middle of a line wants no complaint


def paths_meant(host: Client, verb: str, metavar: str, given: List[str], word: str) -> List[str]:
    """The paths in a VM that a word could be, if it is one there; a folder's ends with a slash. Raises
    VMHostError."""
    vm, path = vm_and_path(word) if verb == 'cp' else [given[0], word]
    if not vm or (verb, metavar) in (('put', 'SRC'), ('get', 'DST')):
        return []
    folder, name = posixpath.split(path)
    begin = word[:len(word) - len(name)]
    return sorted(begin + entry['name'] + '/' * bool(entry['isDir'])
                  for entry in host.call('listDir', vm, carried(folder or '/'))
                  if 'name64' not in entry and entry['name'].startswith('.') <= name.startswith('.'))


def meant(host: Client, wanted: Dict[str, Any], vm: str, verb: str) -> List[str]:
    """All that an argument of that verb could be, by its metavar; vm: the word before. Raises VMHostError."""
    metavar = wanted.get('metavar')
    if 'choices' in wanted:
        return list(wanted['choices'])
    if metavar == 'SIG':
        return list(agent.SIGNALS)
    if metavar == 'METHOD':
        return host.call('system.listMethods')
    if metavar == 'SNAPSHOT':
        return host.call('listSnapshots', vm)
    found = []  # type: List[str]
    if metavar in ('VM', 'VM|ID'):
        found += host.vm_names()
    if metavar in ('ID', 'VM|ID'):
        which = {'limit': FINISHED_SHOWN}  # type: Dict[str, Any]
        if verb in ('kill', 'shell'):
            which['finished'] = False
        if verb == 'shell':
            which['vm'] = vm
        found += [row['cmdId'] for row in host.call('listCmds', which)]
        if verb == 'kill':
            found += [row['id'] for row in host.call('listTransfers', {'finished': False})]
    return found
