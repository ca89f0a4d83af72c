"""Files over Chirp, the protocol of cctools: the door of the rooms behind it, and the command line.

chirpclient.py moves files and folders, by chirpupload.py and chirpdownload.py, and by the requests of
chirprequests.py; chirpserver.py serves a folder, in which chirproot.py keeps every path; chirpreal.py runs
cctools' own server instead. chirplocal.py and chirpwire.py are below them all. Programs outside find
``ChirpClient``, ``ChirpServer`` and ``RealChirpServer`` here.

What it is not: where any of that is done. Threads: main alone, here; a server has its own. No locks.
"""

import argparse
import contextlib
import errno
import os
import posixpath
import re
import signal
import ssl
import stat
import sys
import threading
import time
from typing import Any, Iterator, List, Optional, Sequence, Tuple, Union

import agent
from chirpclient import ChirpClient
from chirplanding import landing_here, landing_there
from chirpreal import RealChirpServer
from chirpserver import ChirpServer
from chirpwire import PORT, ChirpError, Incomplete, shown


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
    serve.add_argument('--server', choices=('embedded', 'chirp_server'), default='embedded',
                       help='ours, or the one of cctools (default %(default)s)')
    serve.add_argument('--cert', metavar='FILE', help='serve over TLS: certificate (PEM)')
    serve.add_argument('--key', metavar='FILE', help='and its private key')
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
                                         help='of silence, until it gives up (default %(default)s)')
        verbs.choices[verb].add_argument('--ca', metavar='FILE', help='over TLS: who must have signed')
    for parser_of_verb in verbs.choices.values():
        parser_of_verb.add_argument('--secret', metavar='FILE',
                                    help='64 hex digits: let in, or be let in, by these')
        parser_of_verb.add_argument('--id', default='', help='whose secret it is')
    parsed = parser.parse_args(words)
    if parsed.verb is None:
        parser.error('expected serve, put, get or ls')
    return parsed


def read_secret(path: Optional[str]) -> bytes:
    """Of a file; empty where there is none. Raises ChirpError."""
    if not path:
        return b''
    with open(path, 'rb') as file:
        data = file.read()
    try:
        digits = agent.decoded(data).strip()
    except UnicodeDecodeError:
        digits = ''
    if not re.match('[0-9a-f]{32,}$', digits) or len(digits) % 2:
        raise ChirpError('%s: expected 64 hex digits' % path)
    return bytes.fromhex(digits)


def make_server(words: argparse.Namespace) -> Union[ChirpServer, RealChirpServer]:
    """The server that was asked for. Raises ChirpError, OSError."""
    secret = read_secret(words.secret)
    allow = words.allow or (None if secret else ['127.0.0.1'])
    if words.server == 'chirp_server':
        if secret or words.cert:
            raise ChirpError('chirp_server knows neither --secret nor --cert')
        return RealChirpServer(words.folder, words.host, words.port, allow, words.rights)
    tls = None
    if words.cert:
        try:
            tls = agent.server_tls(words.cert, words.key or '')
        except agent.AgentError as error:
            raise ChirpError(str(error))
    return ChirpServer(words.folder, words.host, words.port, allow, words.rights,
                       'secret' if secret else 'address', secret, words.id, tls=tls)


def serve_folder(words: argparse.Namespace) -> None:
    told: List[int] = []    # a handler may wait for no lock, as an event has
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: told.append(number))
    server: Any = make_server(words)
    try:
        server.start()
    except OSError as error:
        raise ChirpError('%s:%d: %s' % (words.host, words.port, agent.why_not_listening(error)))
    try:
        print('serving %s on %s:%d' % ((words.folder,) + server.address), flush=True)
        while not told:
            time.sleep(0.2)
    finally:
        server.stop()


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


@contextlib.contextmanager
def standard_output() -> Iterator[Any]:
    """All that is written to it is out at the end. Raises OSError where it is closed, or full."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, 'the standard output is closed')
    try:
        yield sys.stdout
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())         # Python's end flushes it again
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + 13)         # as of a program that SIGPIPE ends: who read has enough
        raise


def inside(client: ChirpClient, path: str) -> str:
    """The path of what is served. Raises ChirpError for one that leads out: the server would take it as one
    that is within."""
    if posixpath.normpath(path).split('/')[0] == '..':
        raise ChirpError('%s is outside of what is served: name a path in there' % path)
    return client.without_climbing(path)


def move(client: ChirpClient, words: argparse.Namespace) -> None:
    """As ``cp -r`` does."""
    if not words.source or words.target == '':
        raise ChirpError('a path is empty: name a file or folder')
    bar = Bar()
    source, target = words.source, words.target or ''
    try:
        if words.verb == 'get':
            source = inside(client, source)
        if words.verb == 'put':
            client.put(source, landing_there(client, source, inside(client, target)), progress=bar)
        elif target == '-':
            with standard_output() as out:
                client.read(os.fsencode(source), out.buffer.write)
        else:
            client.get(os.fsencode(source), landing_here(client, source, target), progress=bar)
    finally:
        bar.end()
        for path, what in client.unkept.some:
            print('chirp.py: %s' % agent.printable('%s came without %s: the disk there doesn\'t keep that' % (
                path, what)), file=sys.stderr)


def print_listing(client: ChirpClient, words: argparse.Namespace) -> None:
    with standard_output() as out:
        for entry in sorted(client.ls(os.fsencode(inside(client, words.path)))):
            name = shown(entry.name) + ('/' if entry.is_dir else '')
            if words.long:
                stamp = time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(entry.mtime))
                name = '%s %12d %s %s' % (stat.filemode(entry.mode), entry.size, stamp, name)
            encoding = out.encoding or 'utf-8'
            print(name.encode(encoding, 'backslashreplace').decode(encoding), file=out)


def main(words: Optional[Sequence[str]] = None) -> int:
    """The command line; the exit code."""
    parsed = parse_words(words)
    try:
        if parsed.verb == 'serve':
            serve_folder(parsed)
            return 0
        tls = ssl.create_default_context(cafile=parsed.ca) if parsed.ca else None
        with ChirpClient(parsed.address[0], parsed.address[1], parsed.timeout, read_secret(parsed.secret),
                         parsed.id, tls) as client:
            (print_listing if parsed.verb == 'ls' else move)(client, parsed)
        return 0
    except Incomplete as incomplete:
        for failure in incomplete.failures:
            print('chirp.py: %s' % agent.printable('%s: %s' % failure), file=sys.stderr)
        return 1
    except (ChirpError, OSError) as error:
        print('chirp.py: %s' % agent.printable(agent.sentence(error)), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == '__main__':
    sys.exit(main())
