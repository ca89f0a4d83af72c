"""VirtualBox as Windows' programs find it, registered with COM, with a type library; behind it is the fake.

``python com_virtualbox.py FOLDER``, on the Windows rig, makes the type library in the folder, and registers
it and three classes with that Windows. From then on a VirtualBoxManager of vboxapi's part for Windows gets
the VMs of tests/fake_server.py by pywin32, gen_py's modules and COM's IDispatch. ``--unregister`` undoes it.

The library describes the three classes that vboxapi asks for, and no more: what they lead to is called by
names, as a script does. VirtualBox's own library describes everything.
"""

import os
import sys

import fake_server
import fake_virtualbox
import pythoncom
import pywintypes
import winerror
from win32com.server import register
from win32com.server.exception import COMException
from win32com.server.policy import DynamicPolicy
from win32com.server.util import unwrap, wrap

LIBRARY = '{D7569351-1750-46F0-936E-BD127D5BC264}', 1, 3           # as VirtualBox' own
CLASSES = {                    # name: id of the class, id of its interface
    'VirtualBox': ('{B1A7A4F2-47B9-4A1E-82B2-07CCD5323C3F}', '{768CD607-0001-4B5D-8A7C-6B2B5DB8F8C1}'),
    'Session': ('{3C02F46D-C9D2-4F11-A384-53F0CF917214}', '{768CD607-0002-4B5D-8A7C-6B2B5DB8F8C1}'),
    'VirtualBoxClient': ('{DD3FC71D-26C0-4FE1-BF6F-67F633265BBA}', '{768CD607-0003-4B5D-8A7C-6B2B5DB8F8C1}')}
PROPERTY = 1                   # the number of the only property in the library: VirtualBoxClient.virtualBox


class Policy(DynamicPolicy):
    """What is asked for by name; an object with an ``_iid_`` tells its type."""

    def _wrap_(self, thing):
        super()._wrap_(thing)
        self._name_to_dispid_['virtualbox'] = PROPERTY
        self._dyn_dispid_to_name_[PROPERTY] = 'virtualBox'

    def _build_typeinfos_(self):
        iid = getattr(self._obj_, '_iid_', None)
        return [] if iid is None else [
            pythoncom.LoadRegTypeLib(LIBRARY[0], LIBRARY[1], LIBRARY[2], 0).GetTypeInfoOfGuid(iid)]


class Thing:
    """A thing of the fake's, as COM has it."""

    def __init__(self, thing):
        self.thing = thing

    def _dynamic_(self, name, language, flags, args):
        try:
            if flags & (pythoncom.DISPATCH_PROPERTYPUT | pythoncom.DISPATCH_PROPERTYPUTREF):
                return setattr(self.thing, name, to_fake(args[0]))
            found = getattr(self.thing, name)
            if callable(found):
                if not flags & pythoncom.DISPATCH_METHOD:
                    raise COMException(scode=winerror.DISP_E_MEMBERNOTFOUND)
                found = found(*map(to_fake, args))
            return to_com(found)
        except fake_virtualbox.FakeError as error:
            raise COMException(error.msg, error.errno - (1 << 32))
        except AttributeError:
            raise COMException(scode=winerror.DISP_E_MEMBERNOTFOUND)


def to_com(value):
    if isinstance(value, (list, tuple)):
        return [to_com(each) for each in value]
    if isinstance(value, fake_server.PLAIN):
        return value
    return wrap(Thing(value), usePolicy=Policy)


def to_fake(value):
    if isinstance(value, (list, tuple)):
        return [to_fake(each) for each in value]
    return unwrap(value).thing if isinstance(value, pythoncom.TypeIIDs[pythoncom.IID_IDispatch]) else value


class VirtualBoxClient(Thing):
    """The class whose property is the fake VirtualBox."""
    _iid_ = CLASSES['VirtualBoxClient'][1]

    def __init__(self):
        manager = fake_server.VirtualBoxManager()
        super().__init__(fake_virtualbox.Named(virtualBox=manager.getVirtualBox()))


class VirtualBox(Thing):
    _iid_ = CLASSES['VirtualBox'][1]

    def __init__(self):
        super().__init__(fake_server.VirtualBoxManager().getVirtualBox())


class Session(Thing):
    _iid_ = CLASSES['Session'][1]

    def __init__(self):
        super().__init__(fake_server.VirtualBoxManager().getSessionObject())


def make_library(path):
    library = pythoncom.CreateTypeLib2(pythoncom.SYS_WIN32, path)
    library.SetGuid(pywintypes.IID(LIBRARY[0]))
    library.SetVersion(*LIBRARY[1:])
    library.SetName('VirtualBox')
    automation = pythoncom.LoadTypeLib('stdole2.tlb').GetTypeInfoOfGuid(pythoncom.IID_IDispatch)
    for name, (class_id, iid) in CLASSES.items():
        kind = library.CreateTypeInfo('I' + name, pythoncom.TKIND_DISPATCH)
        kind.SetGuid(pywintypes.IID(iid))
        kind.AddImplType(0, kind.AddRefTypeInfo(automation))
        if name == 'VirtualBoxClient':
            property_ = pythoncom.FUNCDESC()
            property_.memid, property_.invkind = PROPERTY, pythoncom.INVOKE_PROPERTYGET
            property_.funckind, property_.rettype = pythoncom.FUNC_DISPATCH, (pythoncom.VT_DISPATCH, 0, None)
            kind.AddFuncDesc(0, property_)
            kind.SetFuncAndParamNames(0, ('virtualBox',))
        kind.LayOut()
        class_ = library.CreateTypeInfo(name, pythoncom.TKIND_COCLASS)
        class_.SetGuid(pywintypes.IID(class_id))
        class_.AddImplType(0, class_.AddRefTypeInfo(kind.QueryInterface(pythoncom.IID_ITypeInfo)))
        class_.SetImplTypeFlags(0, pythoncom.IMPLTYPEFLAG_FDEFAULT)
        class_.LayOut()
    library.SaveAllChanges()


def register_all(folder):
    path = os.path.join(os.path.abspath(folder), 'VirtualBox.tlb')
    make_library(path)
    pythoncom.RegisterTypeLib(pythoncom.LoadTypeLib(path), path)
    for name, (class_id, _) in CLASSES.items():
        register.RegisterServer(class_id, 'com_virtualbox.' + name, name, 'VirtualBox.' + name,
                                policy='com_virtualbox.Policy', clsctx=pythoncom.CLSCTX_INPROC_SERVER,
                                addnPath=os.path.dirname(os.path.abspath(__file__)))


def unregister_all():
    pythoncom.UnRegisterTypeLib(*LIBRARY, 0, pythoncom.SYS_WIN32)
    for name, (class_id, _) in CLASSES.items():
        register.UnregisterServer(class_id, 'VirtualBox.' + name)


if __name__ == '__main__':
    unregister_all() if sys.argv[1] == '--unregister' else register_all(sys.argv[1])
