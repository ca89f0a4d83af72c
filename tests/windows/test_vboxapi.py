"""vboxapi's part for Windows, as far as it comes without a VirtualBox. Not beside test_com.py: it takes away
the registration of the type library, which that has made."""

import os
import shutil

import pytest
from agents import TOP
from wine import Program, path_there, python

VBOXAPI = os.environ.get('VMHOST_RIG', '/var/tmp/vmhost-rig') + '/usr/lib/python3/dist-packages/vboxapi'
# VirtualBox's type library, which a run of test_com.py leaves that was killed.
LIBRARY = r'HKCR\TypeLib\{D7569351-1750-46F0-936E-BD127D5BC264}'


@pytest.mark.skipif(not os.path.exists(VBOXAPI), reason='no vboxapi here: the VirtualBox rig has one')
def test_vboxapis_part_for_windows_runs_up_to_the_type_library(tmp_path, windows):
    """Wine has no VirtualBox: what its vboxapi imports, and asks pywin32 for, is there."""
    shutil.copytree(VBOXAPI, str(tmp_path / 'vboxapi'))
    Program('reg', 'delete', LIBRARY, '/f').wait()
    code, said = python('-c', 'import sys; sys.path[:0] = sys.argv[1:]; import virtualbox\n'
                        'try:\n    virtualbox.import_virtualbox()\n'
                        'except Exception as error:\n    print(error)', path_there(tmp_path), path_there(TOP))
    assert code == 0 and 'TYPE_E_LIBNOTREGISTERED' in said, said
