"""Bundles: a program of the project as one file, a zip that any Python runs, for an image or a download.

What it is not: loaded by an agent that runs. Any program may write any bundle, also out of a bundle itself.
No threads, no state.
"""

import contextlib
import errno
import importlib.util
import io
import os
import sys
from typing import Any, Dict, Iterable, List, Set

from agent import AgentError, how_to_get, replace

BUNDLE_MAIN = """\
import sys
if sys.version_info < (3, 6):
    sys.exit('%(name)s needs Python 3.6 or later, and this is %%s: try python3' %% sys.version.split()[0])
import importlib.machinery
import importlib.util
import os
import warnings
import zipimport
warnings.filterwarnings('ignore', category=SyntaxWarning)      # stomper's, on new Pythons

MODULES = %(modules)r
bundle = zipimport.zipimporter(os.path.abspath(__loader__.archive))


class Loader(importlib.machinery.SourceFileLoader):
    # Compiles a module once; zipimporter does so twice, first for the name of its file.

    def get_data(self, path):
        return bundle.get_data(path)

    def path_stats(self, path):
        raise OSError('a bundle holds no bytecode')


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in MODULES:
            return None
        place = os.path.join(bundle.archive, *MODULES[name].split('/'))
        return importlib.util.spec_from_file_location(name, place, loader=Loader(name, place))


sys.meta_path.insert(0, Finder)
import %(name)s
sys.exit(%(name)s.main(sys.argv[1:]))
"""
OLDEST_DATE = (1980, 1, 1, 0, 0, 0)    # that a zip can hold: a bundle's bytes depend on no clock


def bundle(path: str, main_module: str, data: Iterable[str] = (), programs: Iterable[str] = ()) -> int:
    """``write_bundle`` for a command line: says what is wrong on standard error; gives the exit code."""
    try:
        write_bundle(path, main_module, data, programs)
    except AgentError as error:
        print('%s: %s' % (main_module, error), file=sys.stderr)
        return 1
    return 0


def write_bundle(path: str, main_module: str, data: Iterable[str] = (), programs: Iterable[str] = ()) -> None:
    """Writes a zip that Python runs under any name: a module, what it imports, and a start of its ``main``.

    ``data``: names of text files that lie beside the main module, and do so in the bundle, too.
    ``programs``: modules that it runs without importing them, with what they import.
    The bytes are the same from every Python: stored, not compressed, since zlib's versions differ.
    Raises AgentError.
    """
    import zipfile  # brings compressors along, that an agent doesn't need
    files = {}  # type: Dict[str, str]
    for module in sorted(_modules_of(main_module, *programs)):
        files.update(_sources(module))
    named = {file[:-len('.py')].replace('/__init__', '').replace('/', '.'): file for file in sorted(files)}
    files['__main__.py'] = BUNDLE_MAIN % {'name': main_module, 'modules': named}
    for name in data:
        spec = importlib.util.find_spec(main_module)  # type: Any
        place = os.path.join(os.path.dirname(spec.origin), name)
        files[name] = spec.loader.get_data(place).decode('utf-8')
    buffer = io.BytesIO()
    buffer.write(b'#!/usr/bin/env python3\n')
    with zipfile.ZipFile(buffer, 'w') as bundle:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, OLDEST_DATE)
            entry.create_system = 3        # Unix, wherever it is written
            entry.external_attr = 0o644 << 16
            bundle.writestr(entry, files[name].encode('utf-8'))
    try:
        _write_program(path, buffer.getvalue())
    except OSError as error:
        raise AgentError('%s can\'t be written: %s' % (path, error.strerror or error))


def _write_program(path: str, content: bytes) -> None:
    """All at once, and executable. A device or a pipe is written to, and a link followed: they stay what they
    are. Raises OSError."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        with open(path, 'wb') as file:
            file.write(content)
        return
    path = os.path.realpath(path)
    if os.path.isdir(path):            # of which Windows says that another program has it open
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    try:
        with open(path + '.new', 'wb') as file:
            file.write(content)
        os.chmod(path + '.new', 0o755)
        replace(path + '.new', path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path + '.new')
        raise


def _modules_of(*main_modules: str) -> Set[str]:
    """The modules, all modules beside the first that it and they import, and the package stomper."""
    folder = os.path.dirname(_loader_of(main_modules[0]).get_filename(main_modules[0]))
    found = set(main_modules)
    to_read = list(main_modules)
    while to_read:
        module = to_read.pop()
        for name in _imports_of(_loader_of(module).get_source(module)) - found:
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.origin and os.path.dirname(spec.origin) == folder:
                found.add(name)
                to_read.append(name)
    return found | {'stomper'}


def _imports_of(source: str) -> Set[str]:
    """The modules that a source text imports, anywhere in it."""
    import ast  # needed here alone
    names = set()  # type: Set[str]
    nodes: List[Any] = [ast.parse(source)]
    for node in nodes:                 # what is in it is appended, but expressions: they import nothing
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        for block in ('body', 'handlers', 'orelse', 'finalbody', 'cases'):
            nodes.extend(getattr(node, block, ()))
    return {name.split('.')[0] for name in names}


def _loader_of(module: str) -> Any:
    """What gives the source of a module, wherever it lies. Raises AgentError where there is none."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise AgentError('the module %s is missing for this Python, and so can\'t go into the bundle: '
                         '%s' % (module, how_to_get(module)))
    return spec.loader


def _sources(module: str) -> Dict[str, str]:
    """{name in the bundle: source} of a module or package, also where this runs from a bundle itself."""
    loader = _loader_of(module)
    spec = importlib.util.find_spec(module)  # type: Any
    name = module.replace('.', '/')
    if spec.submodule_search_locations is None:
        return {name + '.py': loader.get_source(module)}
    files = {name + '/__init__.py': loader.get_source(module)}
    import pkgutil  # needed here alone
    for _, part, is_package in pkgutil.iter_modules(list(spec.submodule_search_locations)):
        if not is_package:
            files.update(_sources('%s.%s' % (module, part)))
    return files
