"""Makes a folder that a Windows user copies and starts: Python, the host agent, vmhost.cmd.

    python make_folder.py python-3.12.4-embed-amd64.zip vmhost.pyz vmhost

The first is Python's "Windows embeddable package", as python.org offers it; the second is made by
``python vmhost.py --bundle vmhost.pyz``; the third is the folder, which is made. Runs on any system.
"""

import glob
import os
import shutil
import sys
import zipfile

HERE = os.path.dirname(os.path.abspath(__file__))
BESIDE = ('vmhost.cmd', 'at-logon.cmd', 'vmhost-task.xml')


def make_folder(python, bundle, folder):
    """Raises OSError, or ValueError for what is no embeddable package, or no bundle, or for a folder that was
    made before; nothing is made then."""
    if os.path.lexists(os.path.join(folder, 'python')):
        raise ValueError('%s is there already: put a new vmhost.pyz into it, or name another folder' % folder)
    with zipfile.ZipFile(bundle) as program:
        if 'vmhost.py' not in program.namelist():
            raise ValueError('%s is no bundle: python vmhost.py --bundle vmhost.pyz makes one' % bundle)
    with zipfile.ZipFile(python) as package:
        if not {'python.exe', 'pythonw.exe'} <= set(package.namelist()):
            raise ValueError('%s is no embeddable package of Python for Windows' % python)
        os.makedirs(os.path.join(folder, 'python', 'Lib', 'site-packages'))
        package.extractall(os.path.join(folder, 'python'))
    for path in glob.glob(os.path.join(folder, 'python', 'python*._pth')):
        with open(path, 'a') as file:
            file.write('\nimport site\n')      # for what is put into Lib/site-packages: pywin32, vboxapi
    shutil.copy(bundle, os.path.join(folder, 'vmhost.pyz'))
    for name in BESIDE:
        with open(os.path.join(HERE, name)) as source, \
                open(os.path.join(folder, name), 'w', newline='\r\n') as target:     # as cmd wants its lines
            target.write(source.read())


if __name__ == '__main__':
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        make_folder(*sys.argv[1:])
    except zipfile.BadZipFile:
        sys.exit('make_folder.py: %s or %s is no zip, or a damaged one' % tuple(sys.argv[1:3]))
    except (OSError, ValueError) as error:
        sys.exit('make_folder.py: %s' % error)
