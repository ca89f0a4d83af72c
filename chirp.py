"""Files over Chirp, the protocol of cctools: a client, a server, and a wrapper round its chirp_server.

What it is not: a file system, a cache, or a server for the public: it serves one folder to the
addresses it was told of, and its rights are those of the one ACL it was given.

Threads: the client has none of its own, except, while a large file is verified that goes on after a cut, or
comes from a server that isn't ours, one that asks for its checksum (``chirp-hash``). A client object
belongs to one thread at a time. The server has one that accepts (``chirp``) and one per
connection (``chirp-N``); ``start``, ``stop``, ``allow`` and ``address`` may be called from any.

Paths of the server are text (or bytes), ``/`` between the names; bytes that are not UTF-8 are kept
as surrogate escapes.
"""

import argparse
import errno
import logging
import os
import re
import signal
import stat
import sys
import threading
import time
from typing import List, Optional, Sequence, Tuple

from chirpclient import ChirpClient
from chirpserver import ChirpServer
from chirpticket import Ticket
from chirpwire import (
    PORT,
    ChirpError,
    shown,
)

log = logging.getLogger('vmhost.chirp')


# --- the command line ------------------------------------------------------------------------

def parse_address(text: str) -> Tuple[str, int]:
    """HOST, HOST:PORT or [HOST]:PORT."""
    found = re.match(r'(?:\[(.+)\]|([^:]+))(?::([0-9]{1,5}))?$', text)
    if not found or int(found.group(3) or 0) > 65535:
        raise argparse.ArgumentTypeError('expected HOST:PORT, not %s' % text)
    return found.group(1) or found.group(2), int(found.group(3) or PORT)


def parse_port(text: str) -> int:
    if not re.match(r'[0-9]{1,5}$', text) or int(text) > 65535:
        raise argparse.ArgumentTypeError('expected 0 to 65535, not %s' % text)
    return int(text)


def parse_timeout(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= threading.TIMEOUT_MAX:       # nor is it nan
        raise argparse.ArgumentTypeError('expected seconds, more than 0, not %s' % text)
    return seconds


def parse_words(words: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='chirp.py', description='Files over Chirp.')
    verbs = parser.add_subparsers(dest='verb', metavar='serve|put|get|ls')
    serve = verbs.add_parser('serve', help='serve a folder until SIGTERM or Ctrl-C')
    serve.add_argument('folder')
    serve.add_argument('--host', default='127.0.0.1', help='address to listen on (default %(default)s)')
    serve.add_argument('--port', type=parse_port, default=PORT, help='default %(default)s; 0: any')
    serve.add_argument('--allow', action='append', metavar='ADDRESS',
                       help='who may connect, as often as wanted (default 127.0.0.1)')
    serve.add_argument('--rights', default='rwld', help='of r, w, l, d (default %(default)s)')
    serve.add_argument('--ticket', metavar='FILE', help='public key (PEM): let only its owner in')
    for verb, what in (('put', 'send a file or folder'), ('get', 'fetch a file or folder')):
        moving = verbs.add_parser(verb, help=what)
        moving.add_argument('address', type=parse_address, metavar='HOST:PORT')
        moving.add_argument('source')
        moving.add_argument('target', nargs='?', help='default: the name of the source')
    listing = verbs.add_parser('ls', help='list a folder')
    listing.add_argument('address', type=parse_address, metavar='HOST:PORT')
    listing.add_argument('path', nargs='?', default='/')
    listing.add_argument('-l', action='store_true', dest='long', help='with mode, size and time')
    for verb in ('put', 'get', 'ls'):
        verbs.choices[verb].add_argument('--timeout', type=parse_timeout, default=30.0, metavar='SECONDS',
                                         help='silence that is borne (default %(default)s)')
        verbs.choices[verb].add_argument('--ticket', metavar='FILE', help='private key (PEM)')
    parsed = parser.parse_args(words)
    if parsed.verb is None:
        parser.error('expected serve, put, get or ls')
    return parsed


def read_text(path: Optional[str]) -> str:
    if not path:
        return ''
    with open(path) as file:
        return file.read()


def serve_folder(words: argparse.Namespace) -> None:
    told: List[int] = []    # a handler may wait for no lock, as an event has
    for number_ in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number_, lambda number_, _: told.append(number_))
    server = ChirpServer(words.folder, words.host, words.port, words.allow or ['127.0.0.1'], words.rights,
                         'ticket' if words.ticket else 'address', read_text(words.ticket))
    with server:
        print('serving %s on %s:%d' % ((server.root.path,) + server.address), flush=True)
        while not told:
            time.sleep(0.2)


class Bar:
    """Progress on a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        self._shows = sys.stderr is not None and sys.stderr.isatty()       # None: it is closed

    def __call__(self, moved: int, total: int) -> None:
        if self._shows:
            sys.stderr.write('\r%3d %%  %d of %d bytes ' % (moved * 100 // max(total, 1), moved, total))
            sys.stderr.flush()

    def end(self) -> None:
        if self._shows:
            sys.stderr.write('\n')


def move(client: ChirpClient, words: argparse.Namespace) -> None:
    name = os.path.basename(words.source.rstrip('/' + (os.sep if words.verb == 'put' else '')))
    target = words.target or name
    if not target or target in ('.', '..'):
        raise ChirpError('name the target: %s has no name of its own' % words.source)
    bar = Bar()
    try:
        if words.verb == 'put':
            client.put(words.source, os.fsencode(target), progress=bar)
        else:
            client.get(os.fsencode(words.source), target, progress=bar)
    finally:
        bar.end()


def print_listing(client: ChirpClient, words: argparse.Namespace) -> None:
    if sys.stdout is None:
        raise OSError(errno.EBADF, 'the standard output is closed')
    for entry in client.ls(os.fsencode(words.path)):
        name = shown(entry.name) + ('/' if entry.is_dir else '')
        if words.long:
            stamp = time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(entry.mtime))
            name = '%s %12d %s %s' % (stat.filemode(entry.mode), entry.size, stamp, name)
        encoding = sys.stdout.encoding or 'utf-8'
        print(name.encode(encoding, 'backslashreplace').decode(encoding))


def main(words: Optional[Sequence[str]] = None) -> int:
    """The command line; the exit code."""
    parsed = parse_words(words)
    try:
        if parsed.verb == 'serve':
            serve_folder(parsed)
            return 0
        ticket = Ticket.from_pem(read_text(parsed.ticket)) if parsed.ticket else None
        with ChirpClient(parsed.address[0], parsed.address[1], parsed.timeout, ticket) as client:
            (print_listing if parsed.verb == 'ls' else move)(client, parsed)
        return 0
    except (ChirpError, OSError) as error:
        print('chirp.py: %s' % error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == '__main__':
    sys.exit(main())
